//! Threads in PostgreSQL (15 or newer): [`PostgresCheckpointer`].
//!
//! Its tables, sequences and functions begin with `graph_` and live in the first schema of the search path, beside whatever
//! else is there. What a commit changes is one statement and one round trip, and whatever waits to be written at the same
//! moment shares a transaction. Acknowledged is as durable as the server's `synchronous_commit` says; leave it on.

mod bell;
mod cache;
mod claim;
mod documents;
mod hands;
mod history;
mod job;
mod journal;
mod land;
mod limits;
mod pace;
mod retention;
mod rows;
mod sharing;
mod step;
mod threads;
mod values;

use std::{collections::BTreeMap, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use sqlx::{
    PgPool, Postgres, Transaction,
    migrate::{MigrateError, Migrator},
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tracing::Instrument;

use crate::{
    cache::{Cache, Sweeps},
    checkpoint::{
        Appended, Bell, CancelOutcome, CancelRequest, CheckpointRecord, Checkpointer, Claim,
        ClaimRequest, Claimed, Commit, Created, Entry, HistoryFilter, JournalFilter, Lease,
        LeaseTerms, Loaded, NewCheckpoint, NewEvent, NewSignal, NewThread, Receipt, Renewed,
        Reopened, Retention, SignalOutcome, SignalRecord, StateRows, StorageError, ThreadFilter,
        ThreadRecord, Write,
    },
    documents::DocumentStore,
    ids::{Cursor, ThreadId},
    stored::Fault,
};

use hands::Hands;
use job::{Answer, CommitJob, Job, SignalJob, StartRow};
use limits::{Limits, is_well};
use sharing::Sharing;

/// How many connections [`PostgresCheckpointer::connect`] opens at most.
const CONNECTIONS: u32 = 12;

/// How long a request waits for a connection.
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(30);

/// Connections that were idle for longer are tried before they are used: the server may have been restarted.
const TRUSTED_IDLE: Duration = Duration::from_millis(200);

/// How often a transaction that the database rolled back because of another one is tried.
const DEADLOCK_ATTEMPTS: u32 = 8;

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/postgres");

/// The table that says which migrations were applied; not `sqlx`'s default, so that other schemas can live beside this one.
const MIGRATION_TABLE: &str = "graph_migrations";

/// A [`Checkpointer`] in a PostgreSQL database. Cloning it shares the connections.
#[derive(Clone, Debug)]
pub struct PostgresCheckpointer {
    pool: PgPool,
    bell: Arc<bell::PostgresBell>,
    hands: Arc<Hands>,
    sharing: Arc<Sharing>,
    limits: Limits,
}

impl PostgresCheckpointer {
    /// Connects to the database of a URL such as `postgres://user@host/database`. The schema is brought up to date by
    /// [`Checkpointer::migrate`].
    pub async fn connect(url: &str) -> Result<Self, StorageError> {
        // The URL is not part of the error: it may hold a password.
        let failed = |source| StorageError::Backend {
            operation: "connecting to PostgreSQL".to_owned(),
            source: Box::new(source),
        };
        let options: PgConnectOptions = url.parse().map_err(failed)?;
        let pool = PgPoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(ACQUIRE_TIMEOUT)
            .test_before_acquire(false)
            .before_acquire(|connection, about| {
                Box::pin(async move {
                    if about.idle_for < TRUSTED_IDLE {
                        return Ok(true);
                    }
                    Ok(is_well(connection).await)
                })
            })
            // The pool asks as well, but without end.
            .after_release(|connection, _| Box::pin(async move { Ok(is_well(connection).await) }))
            .after_connect(|connection, _| {
                // Everything that is read has an index; a plan that was made while a table was small must not outlive its
                // growth. And no statement here is worth compiling.
                Box::pin(async move {
                    sqlx::raw_sql("set enable_seqscan = off; set jit = off")
                        .execute(connection)
                        .await?;
                    Ok(())
                })
            })
            .connect_with(options)
            .await
            .map_err(failed)?;
        Ok(Self::from_pool(pool))
    }

    /// Uses somebody else's pool, whose search path says where the tables live. A few connections are taken out of it for
    /// good and set to this crate's needs: claims and commits go over them. It should have `test_before_acquire` off, which
    /// costs a round trip for each request. [`Checkpointer::migrate`], with which every engine begins, says whether it can be
    /// used: [`StorageError::UnfitConnections`] if statements over it would not do what they say, [`StorageError::Backend`] if it
    /// is closed or the server does not answer.
    #[must_use]
    pub fn from_pool(pool: PgPool) -> Self {
        Self::with(pool, Limits::new(limits::SHORT))
    }

    /// How long the database may take to answer what a run waits for (a claim, a renewal, a commit, a start, a signal) before
    /// the connection is given up: 30 seconds, if nothing else is said. Everything else may take ten times as long, and bringing
    /// the schema up to date 120 times. A commit that was not answered is looked for and, if it has not landed, made again.
    #[must_use]
    pub fn answer_within(self, limit: Duration) -> Self {
        Self::with(self.pool, Limits::new(limit))
    }

    fn with(pool: PgPool, limits: Limits) -> Self {
        let hands = Arc::new(Hands::new(pool.clone(), limits));
        Self {
            limits,
            bell: Arc::new(bell::PostgresBell::new(pool.clone())),
            pool,
            sharing: Arc::new(Sharing::new(hands.clone())),
            hands,
        }
    }

    async fn begin(&self) -> Result<Transaction<'static, Postgres>, Fault> {
        begin(&self.pool, self.limits, "begin").await
    }

    /// A transaction in which what is read does not change.
    async fn read(&self) -> Result<Transaction<'static, Postgres>, Fault> {
        let begun = begin(
            &self.pool,
            self.limits,
            "begin isolation level repeatable read read only",
        );
        begun.await
    }

    async fn run_migrations(&self) -> Result<(), Fault> {
        let migrator = Migrator {
            migrations: MIGRATIONS.migrations.clone(),
            table_name: MIGRATION_TABLE.into(),
            ..Migrator::DEFAULT
        };
        let mut connection = connection(&self.pool).await?;
        self.limits.short(limits::check(&mut connection)).await?;
        let limit: String = sqlx::query_scalar("show statement_timeout")
            .fetch_one(&mut *connection)
            .await?;
        sqlx::raw_sql("set statement_timeout = 0")
            .execute(&mut *connection)
            .await?;
        let result = migrator.run_direct(None, &mut *connection, false).await;
        if let Err(error) = result {
            // A failed migration leaves the connection with the lock that keeps other migrators out.
            connection.close().await?;
            return Err(migration_fault(error));
        }
        sqlx::query("select set_config('statement_timeout', $1, false)")
            .bind(limit)
            .execute(&mut *connection)
            .await?;
        let durable: String = sqlx::query_scalar("show synchronous_commit")
            .fetch_one(&mut *connection)
            .await?;
        if durable == "off" {
            tracing::warn!(
                "synchronous_commit is off: a crash of the server can lose steps that were acknowledged"
            );
        }
        Ok(())
    }
}

/// A connection of the pool, in a box: the future that gets one is a hundred times as large as what is done over it, and would be
/// copied with that.
fn connection(
    pool: &PgPool,
) -> Pin<Box<dyn Future<Output = Result<PoolConnection<Postgres>, sqlx::Error>> + Send>> {
    Box::pin(pool.acquire())
}

/// Begins a transaction, also when nobody waits for that any more: then it is rolled back.
///
/// Somebody who goes away between the request to begin and its answer would leave a connection in the pool whose transaction
/// only the server knows of: what others write over it would never be committed, and its locks would stay. When the server does
/// not answer within the limit either, the connection goes back and is found to be unwell ([`is_well`]).
async fn begin(
    pool: &PgPool,
    limits: Limits,
    statement: &'static str,
) -> Result<Transaction<'static, Postgres>, Fault> {
    let pool = pool.clone();
    let begun = tokio::spawn(
        async move {
            let begun = async { Ok(pool.begin_with(statement).await?) };
            limits.long(begun).await
        }
        .in_current_span(),
    );
    begun
        .await
        .unwrap_or_else(|error| Err(sqlx::Error::Io(std::io::Error::other(error)).into()))
}

/// Says what to do about a failed migration.
fn migration_fault(error: MigrateError) -> Fault {
    let known = MIGRATIONS.iter().map(|m| m.version).max().unwrap_or(0);
    match error {
        MigrateError::VersionMissing(found) => StorageError::NewerSchema { found, known }.into(),
        other => StorageError::Backend {
            operation: "bringing the schema up to date".to_owned(),
            source: Box::new(other),
        }
        .into(),
    }
}

/// Whether the database rolled a transaction back because of another one: a deadlock, or a failed serialization.
fn is_transient(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .is_some_and(|code| matches!(&*code, "40P01" | "40001"))
}

#[async_trait]
impl Checkpointer for PostgresCheckpointer {
    fn name(&self) -> &'static str {
        "postgres"
    }

    fn cache(&self) -> Option<Arc<dyn Cache>> {
        Some(Arc::new(cache::PostgresCache {
            pool: self.pool.clone(),
            limits: self.limits,
            sweeps: Sweeps::default(),
        }))
    }

    fn documents(&self) -> Option<Arc<dyn DocumentStore>> {
        Some(Arc::new(documents::PostgresDocuments {
            pool: self.pool.clone(),
            limits: self.limits,
        }))
    }

    async fn migrate(&self) -> Result<(), StorageError> {
        self.limits
            .longest(self.run_migrations())
            .await
            .map_err(|fault| fault.during("bringing the schema up to date"))
    }

    fn bell(&self) -> Option<Arc<dyn Bell>> {
        Some(self.bell.clone())
    }

    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        let job = Job::Start(StartRow::of(&thread)?);
        match self.sharing.write(job).await? {
            Answer::Created(created, _) => Ok(created),
            other => Err(other.unexpected()),
        }
    }

    fn creates_leased(&self) -> bool {
        true
    }

    async fn create_leased(
        &self,
        thread: NewThread,
        terms: LeaseTerms<'_>,
    ) -> Result<(Created, Option<Claim>), StorageError> {
        let job = Job::Start(StartRow::leased(&thread, terms)?);
        match self.sharing.write(job).await? {
            Answer::Created(created, leased) => {
                let claim = leased.map(|leased| leased.claim(thread, terms));
                Ok((created, claim))
            }
            other => Err(other.unexpected()),
        }
    }

    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        let job = Job::Signal(SignalJob::of(&signal, answers)?);
        match self.sharing.write(job).await? {
            Answer::Signalled(outcome) => Ok(outcome),
            other => Err(other.unexpected()),
        }
    }

    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        let run = async {
            let mut db = self.begin().await?;
            let outcome = threads::cancel(&mut db, &request).await?;
            db.commit().await?;
            Ok(outcome)
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("cancelling thread {}", request.thread)))
    }

    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError> {
        let run = async {
            let mut db = self.begin().await?;
            let outcome = threads::reopen(&mut db, thread).await?;
            db.commit().await?;
            Ok(outcome)
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("reopening thread {thread}")))
    }

    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadRecord>, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            threads::find(&mut db, thread).await
        };
        let found = run
            .await
            .map_err(|fault: Fault| fault.during(&format!("reading thread {thread}")))?;
        Ok(found.map(|thread| thread.record))
    }

    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            threads::list(&mut db, filter).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("listing threads"))
    }

    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            let key = threads::delete(&mut db, thread).await?;
            drop(db);
            // The thread is gone. What is left of it is cleared away by whoever deletes or sweeps next, if not now.
            if let Some(key) = key
                && let Err(fault) = self.collect_all(key).await
            {
                let error = fault.during("clearing away a deleted thread");
                tracing::warn!(%thread, error = %crate::private::chain(&error), "what is left of thread {thread} is cleared away later");
            }
            Ok(key.is_some())
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("deleting thread {thread}")))
    }

    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        let run = self.hands.lend(async |db| claim::claim(db, &request).await);
        self.limits
            .short(run)
            .await
            .map_err(|fault: Fault| fault.during("claiming threads"))
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            let mut attempt = 1;
            loop {
                match claim::renew(&mut db, leases, lease).await {
                    Err(Fault::Database(error))
                        if attempt < DEADLOCK_ATTEMPTS && is_transient(&error) =>
                    {
                        attempt += 1;
                    }
                    result => return result,
                }
            }
        };
        self.limits
            .short(run)
            .await
            .map_err(|fault: Fault| fault.during("renewing leases"))
    }

    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            claim::break_leases(&mut db, owner).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("breaking leases"))
    }

    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        let run = self.hands.lend(async |db| claim::load(db, lease).await);
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("loading thread {}", lease.thread)))
    }

    async fn pending_writes(&self, thread: &ThreadId) -> Result<Vec<Write>, StorageError> {
        let run = async {
            let mut db = self.read().await?;
            claim::pending_writes(&mut db, thread).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault| fault.during(&format!("reading what thread {thread} is doing")))
    }

    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            threads::mailbox(&mut db, thread, after).await
        };
        self.limits.long(run).await.map_err(|fault: Fault| {
            fault.during(&format!("reading the mailbox of thread {thread}"))
        })
    }

    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        self.commit_kept(lease, &Arc::new(commit)).await
    }

    async fn commit_kept(
        &self,
        lease: &Lease,
        commit: &Arc<Commit>,
    ) -> Result<Receipt, StorageError> {
        let job = Job::Commit(Box::new(CommitJob::of(lease, commit)?));
        match self.sharing.write(job).await? {
            Answer::Committed(receipt) => Ok(receipt),
            other => Err(other.unexpected()),
        }
    }

    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError> {
        let run = async {
            let mut db = self.read().await?;
            history::list(&mut db, thread, filter).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault| fault.during(&format!("listing the history of thread {thread}")))
    }

    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        let run = async {
            let mut db = self.read().await?;
            history::state_at(&mut db, thread, checkpoint).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault| fault.during(&format!("reading the state of thread {thread}")))
    }

    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        let run = async {
            let mut db = self.begin().await?;
            let forked = history::fork(&mut db, thread, &checkpoint).await?;
            db.commit().await?;
            Ok(forked)
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("forking thread {thread}")))
    }

    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        let run = async {
            let mut db = self.begin().await?;
            history::set_head(&mut db, thread, branch).await?;
            db.commit().await?;
            Ok(())
        };
        self.limits.long(run).await.map_err(|fault: Fault| {
            fault.during(&format!(
                "making branch {branch} the head of thread {thread}"
            ))
        })
    }

    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError> {
        let run = async {
            let mut db = self.read().await?;
            history::branches(&mut db, thread).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault| fault.during(&format!("listing the branches of thread {thread}")))
    }

    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            journal::read(&mut db, filter, after, limit).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("reading the journal"))
    }

    async fn journal_end(&self) -> Result<Cursor, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            journal::end(&mut db).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("looking for the end of the journal"))
    }

    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            journal::append(&mut db, id, &event).await
        };
        self.limits.long(run).await.map_err(|fault: Fault| {
            fault.during(&format!("appending to the stream {}", event.stream))
        })
    }

    fn retention(&self) -> &dyn Retention {
        self
    }
}
