//! Secrets as handles. A value is only ever a [`Plaintext`], and only the vault, a front end on its way into the vault, and
//! the deployer hold one.

use std::fmt;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::{ProjectId, Result};

/// The name of a secret without its value: `secret://project/{id}/{name}`. Knowing it gives nothing.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SecretHandle {
    /// The project that it belongs to and for which alone it resolves.
    pub project: ProjectId,
    /// Its name: an environment variable's, such as `WEATHER_API_KEY`.
    pub name: String,
}

impl fmt::Display for SecretHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "secret://project/{}/{}", self.project, self.name)
    }
}

/// The value of a secret: it cannot be printed, serialized or compared, and is wiped when dropped.
pub struct Plaintext(Zeroizing<String>);

impl Plaintext {
    /// Takes a value.
    pub fn new(value: String) -> Self {
        Self(Zeroizing::new(value))
    }

    /// The value, for the one place that hands it on.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

/// What the crew may do with secrets: everything but see them.
#[async_trait]
pub trait Vault: Send + Sync {
    /// The names of the secrets that a project has.
    async fn names(&self, project: &ProjectId) -> Result<Vec<String>>;

    /// Lets the project's service have a secret that the project has; fails as `secret_missing` otherwise.
    async fn grant(&self, project: &ProjectId, name: &str) -> Result<SecretHandle>;

    /// The text with every known secret value replaced by its handle.
    fn redact(&self, text: &str) -> String;
}

/// Turns granted handles into values; only a deployer has one.
#[async_trait]
pub trait SecretResolver: Send + Sync {
    /// The value, if the handle was granted. `purpose` stands in the record of this resolution, such as `deploy release 3`.
    async fn resolve(&self, handle: &SecretHandle, purpose: &str) -> Result<Plaintext>;
}
