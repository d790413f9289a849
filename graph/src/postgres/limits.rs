//! How long the database may take to answer.
//!
//! A connection can hang without breaking: a router forgets it, a machine stops. Then nobody says anything any more, and whoever
//! waits for an answer would wait for ever. So every request has an end of its own here. The server is given a shorter time for
//! its statements (see [`Limits::statement`]), so that what is merely slow ends with an error that says that nothing was done.

use std::{io, time::Duration};

use futures::FutureExt as _;
use sqlx::{PgConnection, Row as _, postgres::PgDatabaseError};

use crate::{checkpoint::StorageError, stored::Fault};

/// How long what runs wait for may take.
pub(super) const SHORT: Duration = Duration::from_secs(30);

/// How much longer everything else may take: lists, histories, sweeps.
const LONG: u32 = 10;

/// How much longer changes of the schema may take.
const LONGEST: u32 = 120;

/// How long a connection that is given back may take to say that it is well.
const WELL: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    short: Duration,
}

impl Limits {
    pub fn new(short: Duration) -> Self {
        Self {
            short: short.max(Duration::from_millis(10)),
        }
    }

    /// What runs wait for: claims, renewals, commits, starts, signals.
    pub fn short<T>(
        self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> impl Future<Output = Result<T, Fault>> {
        within(self.short, work)
    }

    /// All else.
    pub fn long<T>(
        self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> impl Future<Output = Result<T, Fault>> {
        within(self.short * LONG, work)
    }

    /// Changes of the schema.
    pub fn longest<T>(
        self,
        work: impl Future<Output = Result<T, Fault>>,
    ) -> impl Future<Output = Result<T, Fault>> {
        within(self.short * LONGEST, work)
    }

    /// What the server is told about statements of the first kind, in milliseconds.
    pub fn statement(self) -> u128 {
        (self.short * 4 / 5).as_millis().max(1)
    }
}

/// No `async fn`: that would have the work twice, as what it was given and as what it waits for.
fn within<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, Fault>>,
) -> impl Future<Output = Result<T, Fault>> {
    tokio::time::timeout(limit, work).map(move |result| {
        result.unwrap_or_else(|_| {
            let text = format!("no answer within {limit:?}");
            Err(sqlx::Error::Io(io::Error::new(io::ErrorKind::TimedOut, text)).into())
        })
    })
}

/// Whether the connection answers, and is in no transaction that nobody here knows of. One that hangs must not keep its place
/// in a pool.
pub(super) async fn is_well(connection: &mut PgConnection) -> bool {
    // In a transaction, time stands still since it began.
    let fresh = sqlx::raw_sql("select pg_catalog.now() = pg_catalog.statement_timestamp()");
    let asked = fresh.fetch_one(connection);
    match tokio::time::timeout(WELL, asked).await {
        Ok(Ok(row)) => row.try_get(0).unwrap_or(false),
        _ => false,
    }
}

/// Finds out whether statements that go over a connection do what they say. A pool that somebody else has set up may be for
/// something else; better that it is refused at the beginning than that what is acknowledged is never committed.
pub(super) async fn check(connection: &mut PgConnection) -> Result<(), Fault> {
    // In a transaction, time stands still since it began.
    let asked = sqlx::raw_sql(
        "select pg_catalog.now() <> pg_catalog.statement_timestamp(), pg_catalog.pg_is_in_recovery(), \
             pg_catalog.current_setting('transaction_read_only') = 'on', pg_catalog.current_schema() is null",
    );
    let row = asked.fetch_one(connection).await?;
    let faults = [
        (
            "they come with a transaction that was begun by somebody else, so that nothing would be committed",
            "give it a pool whose connections are in no transaction",
        ),
        (
            "the server is a standby, which only reads",
            "name the primary server",
        ),
        (
            "they only read",
            "take `default_transaction_read_only` away from the role, the database or the pool",
        ),
        (
            "their search path names no schema that is there, so that there is no place for the tables",
            "create the schema, or set `search_path`",
        ),
    ];
    for (column, (what, remedy)) in faults.into_iter().enumerate() {
        if row.try_get(column)? {
            return Err(StorageError::UnfitConnections { what, remedy }.into());
        }
    }
    Ok(())
}

/// Whether the server gave a statement up because it took too long (or somebody asked it to).
pub(super) fn is_given_up(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        .is_some_and(|error| error.code() == "57014")
}
