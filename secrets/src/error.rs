//! What the vault can refuse, and why. No message ever holds a value.

use std::path::PathBuf;

use ports::{Actor, Failure, SecretHandle};

/// What the vault could not do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The name is not an environment variable's.
    #[error(
        "{0:?} cannot name a secret: use a capital letter, then capital letters, digits and underscores, at most 64 in all, like WEATHER_API_KEY"
    )]
    Name(String),
    /// The value is empty, too long, or holds a zero byte.
    #[error("the value of {name} cannot be kept: {reason}")]
    Value {
        /// The secret's name.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The project has no such secret.
    #[error("the project has no secret {}; set it with `artel secrets set {} {}` or `/secret {}`", .0.name, .0.project, .0.name, .0.name)]
    Missing(SecretHandle),
    /// The project has it, but its service may not have it.
    #[error("{0} was not granted to the project's service, so it was not handed out")]
    NotGranted(SecretHandle),
    /// There are too many secrets.
    #[error(
        "the vault holds {limit} secrets, which is its limit; delete some that are not needed any more"
    )]
    Full {
        /// How many it can hold.
        limit: usize,
    },
    /// The key's file cannot be read or made.
    #[error("the age identity {path} cannot be {doing}; check that the folder exists and belongs to this user", path = .path.display())]
    IdentityFile {
        /// Which file.
        path: PathBuf,
        /// `read` or `written`.
        doing: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Other users of the machine can read the key.
    #[error("the age identity {path} can be read by other users (mode {mode:03o}); run `chmod 600 {path}`", path = .path.display())]
    IdentityExposed {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// What should be a key is none.
    #[error("{origin} holds no age identity; it needs a line that begins with AGE-SECRET-KEY-1")]
    IdentityMalformed {
        /// Where it came from.
        origin: String,
    },
    /// The key opens nothing of what is kept.
    #[error(
        "none of the {count} secrets in the vault opens with this age identity; put the identity back that they were encrypted with ({origin}), from a backup"
    )]
    WrongIdentity {
        /// How many secrets there are.
        count: usize,
        /// Where the identity came from.
        origin: String,
    },
    /// A row does not open, or does not belong where it stands.
    #[error("the stored value of {handle} cannot be used: {reason}; set it again")]
    Unreadable {
        /// Which secret.
        handle: SecretHandle,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A value could not be encrypted.
    #[error("the value could not be encrypted; this is a defect of the program")]
    Encrypt(#[source] age::EncryptError),
    /// The resolution could not be recorded, so it did not happen.
    #[error("{handle} was not handed out, because that could not be recorded")]
    Audit {
        /// Which secret.
        handle: SecretHandle,
        /// Why not.
        #[source]
        source: Box<Failure>,
    },
    /// The database refused.
    #[error("the vault's tables cannot be used; check the database and that `artel migrate` ran")]
    Database(#[from] sqlx::Error),
}

impl Error {
    /// A stable name for retry policies and front ends.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Name(_) => "secret_name",
            Self::Value { .. } => "secret_value",
            Self::Missing(_) => "secret_missing",
            Self::NotGranted(_) => "secret_not_granted",
            Self::Full { .. } => "vault_full",
            Self::IdentityFile { .. }
            | Self::IdentityExposed { .. }
            | Self::IdentityMalformed { .. }
            | Self::WrongIdentity { .. } => "vault_identity",
            Self::Unreadable { .. } => "secret_unreadable",
            Self::Encrypt(_) => "vault_encryption",
            Self::Audit { .. } => "vault_audit",
            Self::Database(_) => "vault_database",
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let actor = match &error {
            Error::Name(_) | Error::NotGranted(_) => Actor::Crew,
            Error::Value { .. } | Error::Missing(_) | Error::Unreadable { .. } => Actor::Owner,
            _ => Actor::Admin,
        };
        let mut evidence = String::new();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            if !evidence.is_empty() {
                evidence.push_str(": ");
            }
            evidence.push_str(&error.to_string());
            cause = error.source();
        }
        let failure = Self::new(error.kind(), error.to_string())
            .evidence(evidence)
            .actor(actor);
        match error {
            Error::Database(_) | Error::Audit { .. } => failure.retryable(),
            _ => failure,
        }
    }
}
