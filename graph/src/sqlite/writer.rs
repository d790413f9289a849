//! Who may write: one at a time, and what begins with a transaction.

use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

use sqlx::{
    Connection as _, SqlSafeStr as _, Sqlite, SqliteConnection, Transaction, sqlite::SqlitePool,
};
use tokio::sync::{Mutex, MutexGuard};

use crate::stored::Fault;

/// What may write.
#[derive(Debug)]
pub(super) struct Writer {
    /// One connection, unless it is somebody else's pool.
    pub pool: SqlitePool,
    /// Lets one task write at a time, in the order of arrival: SQLite's own waiting is a fight.
    pub gate: Mutex<()>,
}

impl Writer {
    pub fn new(pool: SqlitePool) -> Arc<Self> {
        Arc::new(Self {
            pool,
            gate: Mutex::new(()),
        })
    }

    pub async fn write(&self) -> Result<Writing<'_>, Fault> {
        let gate = self.gate.lock().await;
        Ok(Writing {
            transaction: begin(&self.pool, "begin immediate").await?,
            _gate: gate,
        })
    }
}

/// Begins a transaction on a connection that has none. When SQLite takes a transaction back by itself (the disk is full) the
/// driver goes on counting it; when it is interrupted while it begins one, the driver does not know of it. Such connections
/// are closed instead of being used.
pub(super) async fn begin(
    pool: &SqlitePool,
    statement: &'static str,
) -> Result<Transaction<'static, Sqlite>, sqlx::Error> {
    let mut unusable = 0;
    loop {
        let mut connection = pool.acquire().await?;
        if connection.is_in_transaction() {
            connection.close().await?;
            continue;
        }
        let failed = match Transaction::begin(connection, Some(statement.into_sql_str())).await {
            Ok(transaction) => return Ok(transaction),
            Err(error) => error,
        };
        if !is_nested(&failed) || unusable > pool.options().get_max_connections() {
            return Err(failed);
        }
        unusable += 1;
        // The pool hands out first what came back last.
        connection = pool.acquire().await?;
        connection.close().await?;
    }
}

/// Whether a transaction could not begin because there was one already.
fn is_nested(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .is_some_and(|error| error.message().contains("within a transaction"))
}

/// A transaction that may write, and the right to do so.
pub(super) struct Writing<'a> {
    transaction: Transaction<'static, Sqlite>,
    _gate: MutexGuard<'a, ()>,
}

impl Writing<'_> {
    pub async fn finish(self) -> Result<(), Fault> {
        Ok(self.transaction.commit().await?)
    }
}

impl Deref for Writing<'_> {
    type Target = SqliteConnection;

    fn deref(&self) -> &SqliteConnection {
        &self.transaction
    }
}

impl DerefMut for Writing<'_> {
    fn deref_mut(&mut self) -> &mut SqliteConnection {
        &mut self.transaction
    }
}
