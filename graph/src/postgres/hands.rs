//! Connections that are kept for the statements of the hot path: commits, claims, and what a run reads when it begins.
//!
//! They are taken out of the pool for good, so that each keeps its prepared statements and no commit waits for one, and they are
//! set to plan each statement once: planning takes longer than all else of a small commit. Everything that is looked for has
//! an index, so the planner is told to use it: a plan that was made while a table was small must not outlive its growth.

use std::{ops::ControlFlow, time::Instant};

use parking_lot::Mutex;
use sqlx::{
    AssertSqlSafe, PgConnection, PgPool,
    postgres::{PgDatabaseError, PgSeverity},
};

use tokio::sync::Semaphore;

use super::{
    TRUSTED_IDLE,
    limits::{Limits, is_well},
};
use crate::stored::Fault;

/// How many others than the writers of shared transactions have a connection at a time. Opening one takes as long as dozens of
/// statements, so that it is better to wait for another's.
const OTHERS: usize = 4;

/// The most connections that are kept while nobody uses them.
const KEPT: usize = super::sharing::WRITERS + OTHERS;

const SETTINGS: &str = "set plan_cache_mode = force_generic_plan; set jit = off; set enable_seqscan = off; \
    set enable_bitmapscan = off; set enable_hashjoin = off; set enable_mergejoin = off";

/// The connections that nobody uses at the moment, the last used one last.
#[derive(Debug)]
pub(super) struct Hands {
    pool: PgPool,
    pub limits: Limits,
    settings: String,
    idle: Mutex<Vec<(PgConnection, Instant)>>,
    others: Semaphore,
}

impl Hands {
    pub fn new(pool: PgPool, limits: Limits) -> Self {
        Self {
            pool,
            limits,
            settings: format!("{SETTINGS}; set statement_timeout = {}", limits.statement()),
            idle: Mutex::default(),
            others: Semaphore::new(OTHERS),
        }
    }

    /// Does some work that is no shared transaction, when a connection is free for it.
    pub async fn lend<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        // Never closed.
        let _turn = self.others.acquire().await;
        let mut connection = self.take().await?;
        let result = work(&mut connection).await;
        match &result {
            Err(Fault::Database(error)) => self.give_after(connection, error),
            _ => self.give(connection),
        }
        result
    }

    /// A connection for one use. Whoever does not give it back, because it is broken or its caller went away, closes it.
    pub async fn take(&self) -> Result<PgConnection, sqlx::Error> {
        while let ControlFlow::Continue(kept) = self.pop() {
            // What is rare is boxed: every statement carries the room for it about otherwise, and is copied with it.
            let Some((mut connection, since)) = kept else {
                return Box::pin(self.another()).await;
            };
            // The server may have been restarted meanwhile.
            if since.elapsed() < TRUSTED_IDLE || Box::pin(is_well(&mut connection)).await {
                return Ok(connection);
            }
        }
        Err(sqlx::Error::PoolClosed)
    }

    /// A connection that was not here before.
    async fn another(&self) -> Result<PgConnection, sqlx::Error> {
        let mut connection = self.pool.acquire().await?.detach();
        sqlx::raw_sql(AssertSqlSafe(self.settings.as_str()))
            .execute(&mut connection)
            .await?;
        Ok(connection)
    }

    /// Breaks when the pool was closed: then these connections are not to be used either.
    fn pop(&self) -> ControlFlow<(), Option<(PgConnection, Instant)>> {
        let mut idle = self.idle.lock();
        if self.pool.is_closed() {
            idle.clear();
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(idle.pop())
    }

    /// Gives a connection back that has nothing left to answer.
    pub fn give(&self, connection: PgConnection) {
        let mut idle = self.idle.lock();
        if idle.len() < KEPT && !self.pool.is_closed() {
            idle.push((connection, Instant::now()));
        }
    }

    /// The same after a failure, if the connection survived it.
    pub fn give_after(&self, connection: PgConnection, error: &sqlx::Error) {
        if is_refusal(error) {
            self.give(connection);
        }
    }
}

/// Whether the database said no and goes on: then nothing of the statement was done. After anything else, nothing is known.
pub(super) fn is_refusal(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(|error| error.try_downcast_ref::<PgDatabaseError>())
        .is_some_and(|error| error.severity() == PgSeverity::Error)
}
