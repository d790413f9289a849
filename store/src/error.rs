//! What can go wrong with the tables, in words for the person who has to do something about it.

use ports::{Actor, Failure};

/// Which error to use: [`Error`] for everything that the database refuses or cannot do. What a *person* is refused (a
/// button pressed twice, a wrong pairing code) is no error of the database and has a type of its own where it happens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The database could not be opened.
    #[error(
        "the database {location} could not be opened; check that the folder can be written, or that the server runs and DATABASE_URL is right"
    )]
    Open {
        /// Where it is, without credentials.
        location: String,
        /// What the driver said.
        #[source]
        source: sqlx::Error,
    },
    /// The folder for the database could not be made.
    #[error(
        "the folder {path} could not be created; choose another ARTEL_HOME or make it writable"
    )]
    Folder {
        /// The folder.
        path: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The database was written by a newer program.
    #[error(
        "the database {location} has schema version {found}, and this program knows versions up to {supported}; install the newer Artel that wrote it, or restore a backup of the older version"
    )]
    NewerSchema {
        /// Where it is, without credentials.
        location: String,
        /// The version of its schema.
        found: i64,
        /// The newest version that this program knows.
        supported: i64,
    },
    /// The schema could not be brought up to date.
    #[error(
        "the tables of {location} could not be brought up to date; nothing was lost, see the cause"
    )]
    Migrate {
        /// Where it is, without credentials.
        location: String,
        /// What the migrator said.
        #[source]
        source: Box<sqlx::migrate::MigrateError>,
    },
    /// No space is left for the database.
    #[error(
        "the disk that holds the database is full; free some space and try again, nothing was lost"
    )]
    DiskFull(#[source] sqlx::Error),
    /// Somebody else held the database for longer than we wait.
    #[error(
        "the database was busy for too long; try again, and see whether another program holds it"
    )]
    Busy(#[source] sqlx::Error),
    /// The database failed otherwise.
    #[error("the database refused a query; see the cause")]
    Database(#[source] sqlx::Error),
    /// A stored value is not what the program writes.
    #[error(
        "the table column {column} holds {value:?}, which this program cannot read; was it changed by hand?"
    )]
    Unreadable {
        /// The column.
        column: &'static str,
        /// The beginning of what it holds.
        value: String,
    },
    /// Entries of the journal were handed over with a gap before them.
    #[error(
        "the projections stand at entry {stands} of the journal and were given the entries after {given}; read again from {stands}"
    )]
    Gap {
        /// Where they stand.
        stands: i64,
        /// After which entry the given ones begin.
        given: i64,
    },
    /// The journal could not be read while rebuilding.
    #[error("the journal could not be read: {0}")]
    Journal(String),
    /// Every port of the range is taken.
    #[error(
        "every port from {first} to {last} is taken; remove a project, or widen the range in artel.toml"
    )]
    NoPort {
        /// The first port of the range.
        first: u16,
        /// The last one.
        last: u16,
    },
    /// Too many names like this one exist.
    #[error("no free short name like {0:?} was found; choose another name")]
    NoSlug(String),
}

impl From<sqlx::Error> for Error {
    fn from(error: sqlx::Error) -> Self {
        let code = error
            .as_database_error()
            .and_then(|e| e.code().map(std::borrow::Cow::into_owned));
        match code.as_deref() {
            // SQLITE_FULL, and PostgreSQL's disk_full.
            Some("13" | "53100") => Self::DiskFull(error),
            // SQLITE_BUSY and its kinds, and PostgreSQL's lock_not_available.
            Some("5" | "261" | "517" | "55P03") => Self::Busy(error),
            _ if matches!(error, sqlx::Error::PoolTimedOut) => Self::Busy(error),
            _ => Self::Database(error),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let (kind, retryable) = match &error {
            Error::Open { .. } | Error::Folder { .. } => ("database_unreachable", true),
            Error::NewerSchema { .. } => ("newer_schema", false),
            Error::Migrate { .. } => ("migration_failed", false),
            Error::DiskFull(_) => ("disk_full", true),
            Error::Busy(_) => ("database_busy", true),
            Error::Database(_) | Error::Journal(_) => ("database", true),
            Error::Unreadable { .. } => ("database_unreadable", false),
            Error::Gap { .. } => ("journal_gap", true),
            Error::NoPort { .. } => ("no_free_port", false),
            Error::NoSlug(_) => ("no_free_name", false),
        };
        let actor = if matches!(error, Error::NoSlug(_)) {
            Actor::Owner
        } else {
            Actor::Admin
        };
        let cause = std::error::Error::source(&error)
            .map(ToString::to_string)
            .unwrap_or_default();
        let failure = Self::new(kind, error.to_string())
            .evidence(cause)
            .actor(actor);
        if retryable {
            failure.retryable()
        } else {
            failure
        }
    }
}

/// What the tables answer.
pub type Result<T, E = Error> = std::result::Result<T, E>;
