//! Opening the database: where it is, how its connections behave, and bringing its schema up to date.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use sea_query::{Expr, Query};
use sqlx::migrate::{MigrateError, Migrator};
use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions};
use sqlx::{Connection as _, Executor as _};

use crate::{Db, Error, Result};

static SQLITE: Migrator = sqlx::migrate!("../migrations/sqlite");
static POSTGRES: Migrator = sqlx::migrate!("../migrations/postgres");

/// How long a connection waits for a lock, and a query for a connection.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long an idle connection is trusted to be alive.
const TRUSTED_IDLE: Duration = Duration::from_millis(200);

/// Processes that open one SQLite file at the same moment meet twice: where it becomes a file with a write-ahead log, for
/// which SQLite asks no busy handler, and in the migrations. The later one tries again.
const OPENING_TRIES: u32 = 40;
const BETWEEN_TRIES: Duration = Duration::from_millis(50);

/// Where the database is. Printing it never shows a password.
#[derive(Clone, PartialEq, Eq)]
pub enum Location {
    /// A file; its folder is made if need be.
    Sqlite(PathBuf),
    /// `postgres://user:password@host:port/database`.
    Postgres(String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "{}", path.display()),
            Self::Postgres(url) => match PgConnectOptions::from_str(url) {
                Ok(options) => write!(
                    f,
                    "postgres://{}:{}/{}",
                    options.get_host(),
                    options.get_port(),
                    options.get_database().unwrap_or_default()
                ),
                Err(_) => f.write_str("postgres://… (not a valid URL)"),
            },
        }
    }
}

impl fmt::Debug for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The product's tables. Cheap to clone; all clones share one pool.
#[derive(Clone, Debug)]
pub struct Store {
    pub(crate) db: Db,
    location: Location,
}

impl Store {
    /// Opens the database, creates it if it is a file that does not exist, and brings its tables up to date.
    pub async fn open(location: &Location) -> Result<Self> {
        let db = match location {
            Location::Sqlite(path) => Db::Sqlite(open_sqlite(path, location).await?),
            Location::Postgres(url) => Db::Postgres(open_postgres(url, location).await?),
        };
        let store = Self {
            db,
            location: location.clone(),
        };
        store.migrate().await?;
        Ok(store)
    }

    /// The database, for statements of one's own.
    pub fn db(&self) -> &Db {
        &self.db
    }

    /// Where it is.
    pub fn location(&self) -> &Location {
        &self.location
    }

    /// The pool, when the database is SQLite.
    pub fn sqlite_pool(&self) -> Option<&SqlitePool> {
        match &self.db {
            Db::Sqlite(pool) => Some(pool),
            Db::Postgres(_) => None,
        }
    }

    /// The pool, when the database is PostgreSQL.
    pub fn pg_pool(&self) -> Option<&PgPool> {
        match &self.db {
            Db::Sqlite(_) => None,
            Db::Postgres(pool) => Some(pool),
        }
    }

    /// The newest version of the schema that this program knows.
    pub fn supported_schema_version(&self) -> i64 {
        newest(self.migrator())
    }

    /// Closes every connection, waiting for those in use.
    pub async fn close(&self) {
        match &self.db {
            Db::Sqlite(pool) => pool.close().await,
            Db::Postgres(pool) => pool.close().await,
        }
    }

    /// Whether the database answers.
    pub async fn ping(&self) -> Result<()> {
        self.db
            .fetch_all(&Query::select().expr(Expr::val(1_i64)).take())
            .await?;
        Ok(())
    }

    fn migrator(&self) -> &'static Migrator {
        match self.db {
            Db::Sqlite(_) => &SQLITE,
            Db::Postgres(_) => &POSTGRES,
        }
    }

    async fn migrate(&self) -> Result<()> {
        let mut tries = 1;
        loop {
            match self.try_migrate().await {
                Ok(()) => return Ok(()),
                Err(MigrateError::VersionMissing(missing)) => {
                    return Err(Error::NewerSchema {
                        location: self.location.to_string(),
                        found: self.applied_version().await.unwrap_or(missing),
                        supported: newest(self.migrator()),
                    });
                }
                Err(MigrateError::Execute(_) | MigrateError::ExecuteMigration(..))
                    if matches!(self.db, Db::Sqlite(_)) && tries < OPENING_TRIES =>
                {
                    tries += 1;
                    tokio::time::sleep(BETWEEN_TRIES).await;
                }
                Err(source) => {
                    return Err(Error::Migrate {
                        location: self.location.to_string(),
                        source: Box::new(source),
                    });
                }
            }
        }
    }

    async fn try_migrate(&self) -> Result<(), MigrateError> {
        match &self.db {
            Db::Sqlite(pool) => SQLITE.run(pool).await,
            Db::Postgres(pool) => {
                // On a connection of its own: the migrator's lock belongs to the session, and goes with it on failure.
                let mut connection = pool.acquire().await?.detach();
                let outcome = POSTGRES.run_direct(None, &mut connection, false).await;
                connection.close().await?;
                outcome
            }
        }
    }

    async fn applied_version(&self) -> Option<i64> {
        let query = Query::select()
            .expr_as(Expr::cust("MAX(version)"), "version")
            .from("_sqlx_migrations")
            .take();
        let row = self.db.fetch_optional(&query).await.ok()??;
        row.opt_int("version").ok()?
    }
}

fn newest(migrator: &Migrator) -> i64 {
    migrator.iter().map(|m| m.version).max().unwrap_or(0)
}

async fn open_sqlite(path: &std::path::Path, location: &Location) -> Result<SqlitePool> {
    if let Some(folder) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        tokio::fs::create_dir_all(folder)
            .await
            .map_err(|source| Error::Folder {
                path: folder.display().to_string(),
                source,
            })?;
    }
    let options = SqliteConnectOptions::new()
        .filename(path)
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(PATIENCE)
        .foreign_keys(true);
    let pool = SqlitePoolOptions::new()
        .max_connections(8)
        .acquire_timeout(PATIENCE)
        // When the disk is full SQLite takes a transaction back by itself; the driver goes on counting it, and the
        // connection could begin no other. Such a connection is closed instead of being handed out.
        .before_acquire(|connection, _| {
            let usable = !connection.is_in_transaction();
            Box::pin(async move { Ok(usable) })
        });
    let mut tries = 1;
    loop {
        match pool.clone().connect_with(options.clone()).await {
            Ok(pool) => return Ok(pool),
            Err(error) if tries < OPENING_TRIES && is_busy(&error) => {
                tries += 1;
                tokio::time::sleep(BETWEEN_TRIES).await;
            }
            Err(source) => {
                return Err(Error::Open {
                    location: location.to_string(),
                    source,
                });
            }
        }
    }
}

/// Whether somebody else holds the file: the primary result codes SQLITE_BUSY and SQLITE_LOCKED, which are the low byte of
/// the extended ones.
fn is_busy(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .and_then(|code| code.parse::<i32>().ok())
        .is_some_and(|code| matches!(code & 0xff, 5 | 6))
}

async fn open_postgres(url: &str, location: &Location) -> Result<PgPool> {
    let failed = |source| Error::Open {
        location: location.to_string(),
        source,
    };
    let options = PgConnectOptions::from_str(url)
        .map_err(failed)?
        .application_name("artel");
    PgPoolOptions::new()
        .max_connections(10)
        .acquire_timeout(PATIENCE)
        // Only what was idle for a while is tried before it is used, which takes a round trip: the server may have been
        // restarted meanwhile.
        .test_before_acquire(false)
        .before_acquire(|connection, about| {
            Box::pin(async move {
                if about.idle_for < TRUSTED_IDLE {
                    return Ok(true);
                }
                Ok(connection.ping().await.is_ok())
            })
        })
        .after_connect(|connection, _| {
            Box::pin(async move {
                connection
                    .execute(
                        "SET lock_timeout = '15s'; SET idle_in_transaction_session_timeout = '60s'",
                    )
                    .await?;
                Ok(())
            })
        })
        .connect_with(options)
        .await
        .map_err(failed)
}
