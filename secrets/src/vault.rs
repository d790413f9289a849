//! The vault over the product's database.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use parking_lot::Mutex;
use ports::{Failure, Plaintext, ProjectId, SecretHandle};
use sqlx::{PgPool, SqlitePool};
use uuid::Uuid;

use crate::{Error, Identity, Redactor, check_name, check_value, envelope};

/// How many secrets a vault holds, over all projects: all of them are known to the redactor, in memory.
pub const MAX_SECRETS: usize = 10_000;

/// The database with the tables `vault_secrets` and `vault_grants`.
#[derive(Clone, Debug)]
pub enum Database {
    /// The embedded size.
    Sqlite(SqlitePool),
    /// The full size.
    Postgres(PgPool),
}

/// Runs the same statements on either pool.
macro_rules! on {
    ($database:expr, $pool:ident => $body:expr) => {
        match $database {
            Database::Sqlite($pool) => $body,
            Database::Postgres($pool) => $body,
        }
    };
}

/// Told of each resolution before the value is handed out.
#[async_trait]
pub trait Audit: Send + Sync {
    /// Records that `handle` is resolved for `purpose`. When this fails, the value stays in the vault.
    async fn resolved(&self, handle: &SecretHandle, purpose: &str) -> Result<(), Failure>;
}

/// Values by project and name, encrypted at rest. Clones are cheap and are the same vault.
#[derive(Clone)]
pub struct Vault(Arc<Inner>);

struct Inner {
    database: Database,
    identity: Identity,
    redactor: Redactor,
    audit: Arc<dyn Audit>,
    /// Which values the redactor has seen, by their revision.
    seen: Mutex<HashMap<SecretHandle, String>>,
}

type Row = (String, String, Vec<u8>, String);

const ALL: &str = "SELECT project, name, ciphertext, revision FROM vault_secrets LIMIT $1";
const REVISIONS: &str = "SELECT project, name, revision FROM vault_secrets LIMIT $1";
const ONE: &str = "SELECT project, name, ciphertext, revision FROM vault_secrets WHERE project = $1 AND name = $2";
const COUNT: &str = "SELECT COUNT(*) FROM vault_secrets";
const NAMES: &str = "SELECT name FROM vault_secrets WHERE project = $1 ORDER BY name";
const PUT: &str = "INSERT INTO vault_secrets (project, name, ciphertext, revision, updated_at) VALUES ($1, $2, $3, $4, $5) \
    ON CONFLICT (project, name) DO UPDATE SET ciphertext = excluded.ciphertext, revision = excluded.revision, updated_at = excluded.updated_at";
const DELETE: &str = "DELETE FROM vault_secrets WHERE project = $1 AND name = $2";
const GRANT: &str = "INSERT INTO vault_grants (project, name, granted_at) \
    SELECT project, name, $3 FROM vault_secrets WHERE project = $1 AND name = $2 ON CONFLICT (project, name) DO NOTHING";
const REVOKE: &str = "DELETE FROM vault_grants WHERE project = $1 AND name = $2";
const GRANTS: &str = "SELECT name FROM vault_grants WHERE project = $1 ORDER BY name";

impl Vault {
    /// Opens the vault: decrypts every value once, so that `redactor` knows it.
    ///
    /// Single values that cannot be read are logged and stay unusable until they are set again; when none can be read,
    /// the identity is the wrong one and this fails.
    pub async fn open(
        database: Database,
        identity: Identity,
        redactor: Redactor,
        audit: Arc<dyn Audit>,
    ) -> Result<Self, Error> {
        let vault = Self(Arc::new(Inner {
            database,
            identity,
            redactor,
            audit,
            seen: Mutex::default(),
        }));
        let count = vault.count().await?;
        if count > MAX_SECRETS {
            return Err(Error::Full { limit: MAX_SECRETS });
        }
        let limit = row_limit();
        let rows: Vec<Row> =
            on!(&vault.0.database, pool => sqlx::query_as(ALL).bind(limit).fetch_all(pool).await)?;
        let count = rows.len();
        if count > 0 && vault.learn(rows).await == 0 {
            return Err(Error::WrongIdentity {
                count,
                origin: vault.0.identity.origin().to_owned(),
            });
        }
        Ok(vault)
    }

    /// What keeps the values out of texts.
    pub fn redactor(&self) -> &Redactor {
        &self.0.redactor
    }

    /// Lets the redactor know what other processes have stored since; cheap when nothing changed. Returns how many values
    /// were new.
    pub async fn refresh(&self) -> Result<usize, Error> {
        let limit = row_limit();
        let stored: Vec<(String, String, String)> = on!(&self.0.database, pool => sqlx::query_as(REVISIONS).bind(limit).fetch_all(pool).await)?;
        let changed: Vec<SecretHandle> = {
            let seen = self.0.seen.lock();
            stored
                .into_iter()
                .filter_map(|(project, name, revision)| {
                    let handle = handle(project, name);
                    (seen.get(&handle) != Some(&revision)).then_some(handle)
                })
                .collect()
        };
        let mut rows = Vec::new();
        for handle in changed {
            rows.extend(self.row(&handle).await?);
        }
        Ok(self.learn(rows).await)
    }

    /// Keeps a value, in place of the one that this name had. A grant given to the name stays.
    pub async fn put(
        &self,
        project: &ProjectId,
        name: &str,
        value: Plaintext,
    ) -> Result<SecretHandle, Error> {
        check_name(name)?;
        check_value(name, &value)?;
        let handle = handle(project.as_str(), name);
        if !self.has(project, name).await? && self.count().await? >= MAX_SECRETS {
            return Err(Error::Full { limit: MAX_SECRETS });
        }
        let ciphertext = envelope::seal(&self.0.identity, &handle, &value)?;
        // Known to the redactor first: from the moment it is stored, any text may meet it.
        self.0.redactor.add_secret(&handle, &value);
        drop(value);
        let revision = Uuid::now_v7().simple().to_string();
        let now = Timestamp::now().to_string();
        on!(&self.0.database, pool => sqlx::query(PUT)
            .bind(project.as_str()).bind(name).bind(ciphertext).bind(&revision).bind(now)
            .execute(pool).await.map(drop))?;
        self.0.seen.lock().insert(handle.clone(), revision);
        tracing::info!(secret = %handle, "a secret was stored");
        Ok(handle)
    }

    /// Deletes a value and its grant; `false` when there was none. The redactor goes on knowing it.
    pub async fn delete(&self, project: &ProjectId, name: &str) -> Result<bool, Error> {
        let (project, name) = (project.as_str(), name);
        let deleted = on!(&self.0.database, pool => {
            let mut transaction = pool.begin().await?;
            sqlx::query(REVOKE).bind(project).bind(name).execute(&mut *transaction).await?;
            let deleted = sqlx::query(DELETE).bind(project).bind(name).execute(&mut *transaction).await?.rows_affected();
            transaction.commit().await?;
            deleted
        });
        Ok(deleted > 0)
    }

    /// The names that a project has, sorted.
    pub async fn names(&self, project: &ProjectId) -> Result<Vec<String>, Error> {
        self.list(NAMES, project).await
    }

    /// Whether a project has a secret of this name.
    pub async fn has(&self, project: &ProjectId, name: &str) -> Result<bool, Error> {
        Ok(self.row(&handle(project.as_str(), name)).await?.is_some())
    }

    /// Lets the project's service have a secret; granting twice is granting once.
    pub async fn grant(&self, project: &ProjectId, name: &str) -> Result<SecretHandle, Error> {
        check_name(name)?;
        let handle = handle(project.as_str(), name);
        let now = Timestamp::now().to_string();
        on!(&self.0.database, pool => sqlx::query(GRANT)
            .bind(project.as_str()).bind(name).bind(now)
            .execute(pool).await.map(drop))?;
        if self.is_granted(project, name).await? {
            Ok(handle)
        } else {
            Err(Error::Missing(handle))
        }
    }

    /// Takes a grant back; `false` when there was none.
    pub async fn revoke(&self, project: &ProjectId, name: &str) -> Result<bool, Error> {
        let revoked = on!(&self.0.database, pool => sqlx::query(REVOKE)
            .bind(project.as_str()).bind(name)
            .execute(pool).await?.rows_affected());
        Ok(revoked > 0)
    }

    /// The names that the project's service may have, sorted.
    pub async fn grants(&self, project: &ProjectId) -> Result<Vec<String>, Error> {
        self.list(GRANTS, project).await
    }

    /// The value of a granted handle. `purpose` stands in the record of this resolution, such as `deploy release 3`.
    pub async fn resolve(&self, handle: &SecretHandle, purpose: &str) -> Result<Plaintext, Error> {
        check_name(&handle.name)?;
        let Some((_, _, ciphertext, revision)) = self.row(handle).await? else {
            return Err(Error::Missing(handle.clone()));
        };
        if !self.is_granted(&handle.project, &handle.name).await? {
            return Err(Error::NotGranted(handle.clone()));
        }
        let value = envelope::open(&self.0.identity, handle, &ciphertext)?;
        self.0.redactor.add_secret(handle, &value);
        self.0.seen.lock().insert(handle.clone(), revision);
        let purpose = self.0.redactor.redact(purpose);
        self.0
            .audit
            .resolved(handle, &purpose)
            .await
            .map_err(|source| Error::Audit {
                handle: handle.clone(),
                source: Box::new(source),
            })?;
        Ok(value)
    }

    async fn is_granted(&self, project: &ProjectId, name: &str) -> Result<bool, Error> {
        Ok(self
            .grants(project)
            .await?
            .iter()
            .any(|granted| granted == name))
    }

    async fn count(&self) -> Result<usize, Error> {
        let count: i64 =
            on!(&self.0.database, pool => sqlx::query_scalar(COUNT).fetch_one(pool).await)?;
        Ok(usize::try_from(count).unwrap_or(usize::MAX))
    }

    async fn list(&self, query: &'static str, project: &ProjectId) -> Result<Vec<String>, Error> {
        let names = on!(&self.0.database, pool => sqlx::query_scalar(query).bind(project.as_str()).fetch_all(pool).await)?;
        Ok(names)
    }

    async fn row(&self, handle: &SecretHandle) -> Result<Option<Row>, Error> {
        let row = on!(&self.0.database, pool => sqlx::query_as(ONE)
            .bind(handle.project.as_str()).bind(&handle.name)
            .fetch_optional(pool).await)?;
        Ok(row)
    }

    /// Opens rows for the redactor and returns how many could be opened.
    async fn learn(&self, rows: Vec<Row>) -> usize {
        let vault = self.clone();
        // Thousands of curve operations: not on a thread that others wait for.
        let learnt = tokio::task::spawn_blocking(move || {
            let mut opened = Vec::new();
            for (project, name, ciphertext, revision) in rows {
                let handle = handle(project, name);
                match envelope::open(&vault.0.identity, &handle, &ciphertext) {
                    Ok(value) => opened.push((handle, value, revision)),
                    Err(error) => {
                        tracing::error!(secret = %handle, %error, "a stored secret cannot be read");
                    }
                }
            }
            vault
                .0
                .redactor
                .add_secrets(opened.iter().map(|(handle, value, _)| (handle, value)));
            let mut seen = vault.0.seen.lock();
            let count = opened.len();
            seen.extend(
                opened
                    .into_iter()
                    .map(|(handle, _, revision)| (handle, revision)),
            );
            count
        });
        learnt.await.unwrap_or(0)
    }
}

fn handle(project: impl Into<String>, name: impl Into<String>) -> SecretHandle {
    SecretHandle {
        project: ProjectId::new(project),
        name: name.into(),
    }
}

fn row_limit() -> i64 {
    i64::try_from(MAX_SECRETS).unwrap_or(i64::MAX)
}

impl std::fmt::Debug for Vault {
    /// Where it is and whose it is; no value.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vault")
            .field("identity", &self.0.identity)
            .field("redactor", &self.0.redactor)
            .finish_non_exhaustive()
    }
}

#[async_trait]
impl ports::Vault for Vault {
    async fn names(&self, project: &ProjectId) -> ports::Result<Vec<String>> {
        Ok(Self::names(self, project).await?)
    }

    async fn grant(&self, project: &ProjectId, name: &str) -> ports::Result<SecretHandle> {
        Ok(Self::grant(self, project, name).await?)
    }

    fn redact(&self, text: &str) -> String {
        self.0.redactor.redact(text).into_owned()
    }
}

#[async_trait]
impl ports::SecretResolver for Vault {
    async fn resolve(&self, handle: &SecretHandle, purpose: &str) -> ports::Result<Plaintext> {
        Ok(Self::resolve(self, handle, purpose).await?)
    }
}
