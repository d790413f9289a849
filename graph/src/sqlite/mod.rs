//! Threads in one SQLite file: [`SqliteCheckpointer`].
//!
//! # How it is kept safe
//! - Write-ahead logging with `synchronous = FULL`: a commit is on the disk before it is acknowledged. (`NORMAL` would be
//!   quicker, and a power cut could take back what an effect in the outside world already relies on.)
//! - One writer: a gate in this process, `BEGIN IMMEDIATE` between processes, and a busy timeout. Several processes may share
//!   the file, on one machine (write-ahead logging needs shared memory, so not over a network file system).
//! - Readers never wait for the writer.
//! - Commits that wait at the same time share a transaction (and the wait for the disk), each in a savepoint of its own.
//!
//! Order and leases go by this machine's clock, which is the only one there is: the processes share it with the file.

#[cfg(unix)]
mod bell;
mod cache;
mod claim;
mod commit;
mod documents;
mod history;
mod journal;
mod retention;
mod rows;
mod sharing;
mod steps;
#[cfg(test)]
mod tests;
mod threads;
mod writer;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::{
    Pool, Sqlite, Transaction,
    migrate::{MigrateError, Migrator},
    sqlite::{
        SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
    },
};

use crate::{
    cache::{Cache, Sweeps},
    checkpoint::{
        Appended, Bell, CancelOutcome, CancelRequest, CheckpointRecord, Checkpointer, ClaimRequest,
        Claimed, Commit, Created, Entry, HistoryFilter, JournalFilter, Lease, Loaded,
        NewCheckpoint, NewEvent, NewSignal, NewThread, Receipt, Renewed, Reopened, Retention,
        SignalOutcome, SignalRecord, StateRows, StorageError, ThreadFilter, ThreadRecord, Write,
    },
    documents::DocumentStore,
    ids::{Cursor, ThreadId},
    stored::Fault,
};

use writer::{Writer, Writing, begin};

/// How long a connection waits for another process's transaction before it gives up.
const BUSY_TIMEOUT: Duration = Duration::from_secs(15);

/// How many connections read at the same time.
const READERS: u32 = 4;

/// How often switching a new file to write-ahead logging is tried while another process does the same.
const OPEN_ATTEMPTS: u32 = 20;

static MIGRATIONS: Migrator = sqlx::migrate!("migrations/sqlite");

/// The table that says which migrations were applied; not `sqlx`'s default, so that the file can hold other schemas too.
const MIGRATION_TABLE: &str = "graph_migrations";

/// A [`Checkpointer`] in an SQLite file. Cloning is not needed: put it into an `Arc`.
#[derive(Debug)]
pub struct SqliteCheckpointer {
    writer: Arc<Writer>,
    sharing: Arc<sharing::Sharing>,
    readers: SqlitePool,
    /// Absent when it is in memory.
    file: Option<PathBuf>,
}

impl SqliteCheckpointer {
    /// Opens the file, or makes it. The schema is brought up to date by [`Checkpointer::migrate`].
    pub async fn open(path: impl AsRef<Path>) -> Result<Self, StorageError> {
        let path = path.as_ref();
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .busy_timeout(BUSY_TIMEOUT)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true);
        let failed = |source: sqlx::Error| StorageError::Backend {
            operation: format!("opening the file {}", path.display()),
            source: Box::new(source),
        };
        let mut attempt = 1;
        let writer = loop {
            let opened = SqlitePoolOptions::new()
                .max_connections(1)
                // It is in this process, and each look costs a way to the thread that it lives on.
                .test_before_acquire(false)
                .acquire_timeout(BUSY_TIMEOUT * 2)
                .connect_with(options.clone())
                .await;
            match opened {
                Ok(pool) => break pool,
                // The busy timeout does not cover the switch to write-ahead logging.
                Err(error) if is_busy(&error) && attempt < OPEN_ATTEMPTS => {
                    attempt += 1;
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => return Err(failed(error)),
            }
        };
        let readers = SqlitePoolOptions::new()
            .max_connections(READERS)
            .test_before_acquire(false)
            .acquire_timeout(BUSY_TIMEOUT * 2)
            .connect_lazy_with(options.pragma("query_only", "true"));
        Ok(Self {
            writer: Writer::new(writer),
            sharing: Arc::default(),
            readers,
            file: Some(path.to_owned()),
        })
    }

    /// Uses somebody else's pool, to read and to write. Its connections should have write-ahead logging, a busy timeout and
    /// `synchronous = FULL`; what is acknowledged is as durable as they make it.
    #[must_use]
    pub fn from_pool(pool: Pool<Sqlite>) -> Self {
        let file = pool.connect_options().get_filename().to_owned();
        Self {
            // Databases in memory have a name that is no file's.
            file: file.is_file().then_some(file),
            writer: Writer::new(pool.clone()),
            sharing: Arc::default(),
            readers: pool,
        }
    }

    async fn write(&self) -> Result<Writing<'_>, Fault> {
        self.writer.write().await
    }

    /// A transaction that reads: what it sees does not change under it.
    async fn read(&self) -> Result<Transaction<'static, Sqlite>, Fault> {
        Ok(begin(&self.readers, "begin").await?)
    }

    async fn run_migrations(&self) -> Result<(), Fault> {
        let mut writing = self.write().await?;
        let migrator = Migrator {
            migrations: MIGRATIONS.migrations.clone(),
            table_name: MIGRATION_TABLE.into(),
            ..Migrator::DEFAULT
        };
        // Inside the transaction that holds the write lock: two processes that start together take turns.
        match migrator.run_direct(None, &mut *writing, false).await {
            Ok(()) => writing.finish().await,
            Err(error) => Err(migration_fault(error)),
        }
    }
}

/// Says what to do about a failed migration.
pub(crate) fn migration_fault(error: MigrateError) -> Fault {
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

fn is_busy(error: &sqlx::Error) -> bool {
    // The primary result codes SQLITE_BUSY and SQLITE_LOCKED, which are the low byte of the extended ones.
    error
        .as_database_error()
        .and_then(sqlx::error::DatabaseError::code)
        .and_then(|code| code.parse::<i32>().ok())
        .is_some_and(|code| matches!(code & 0xff, 5 | 6))
}

/// The time by the only clock there is, in microseconds since 1970.
fn now() -> i64 {
    Timestamp::now().as_microsecond()
}

#[async_trait]
impl Checkpointer for SqliteCheckpointer {
    fn name(&self) -> &'static str {
        "sqlite"
    }

    fn cache(&self) -> Option<Arc<dyn Cache>> {
        Some(Arc::new(cache::SqliteCache {
            writer: self.writer.clone(),
            readers: self.readers.clone(),
            sweeps: Sweeps::default(),
        }))
    }

    fn documents(&self) -> Option<Arc<dyn DocumentStore>> {
        Some(Arc::new(documents::SqliteDocuments {
            writer: self.writer.clone(),
            readers: self.readers.clone(),
        }))
    }

    async fn migrate(&self) -> Result<(), StorageError> {
        self.run_migrations()
            .await
            .map_err(|fault| fault.during("bringing the schema up to date"))
    }

    #[cfg(unix)]
    fn bell(&self) -> Option<Arc<dyn Bell>> {
        Some(Arc::new(bell::SqliteBell::new(self.file.clone()?)))
    }

    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let created = threads::create(&mut writing, &thread, now()).await?;
            writing.finish().await?;
            Ok(created)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("creating thread {}", thread.id)))
    }

    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let outcome = threads::signal(&mut writing, &signal, answers, now()).await?;
            writing.finish().await?;
            Ok(outcome)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("signalling thread {}", signal.thread)))
    }

    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let outcome = threads::cancel(&mut writing, &request, now()).await?;
            writing.finish().await?;
            Ok(outcome)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("cancelling thread {}", request.thread)))
    }

    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let outcome = threads::reopen(&mut writing, thread, now()).await?;
            writing.finish().await?;
            Ok(outcome)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("reopening thread {thread}")))
    }

    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadRecord>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            threads::get(&mut reading, thread).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("reading thread {thread}")))
    }

    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            threads::list(&mut reading, filter).await
        };
        run.await.map_err(|fault| fault.during("listing threads"))
    }

    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let key = threads::delete(&mut writing, thread).await?;
            writing.finish().await?;
            // The thread is gone. What is left of it is cleared away by whoever deletes or sweeps next, if not now.
            if let Some(key) = key
                && let Err(fault) = self.collect_all(key).await
            {
                let error = fault.during("clearing away a deleted thread");
                tracing::warn!(%thread, error = %crate::private::chain(&error), "what is left of thread {thread} is cleared away later");
            }
            Ok(key.is_some())
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("deleting thread {thread}")))
    }

    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        let run = async {
            // Most looks find nothing; they need not take the write lock.
            let mut reading = self.read().await?;
            let now_ = now();
            if request.limit == 0 || !claim::any_due(&mut reading, &request, now_).await? {
                return claim::nothing(&mut reading, &request, now_).await;
            }
            drop(reading);
            let mut writing = self.write().await?;
            let claimed = claim::claim(&mut writing, &request, now()).await?;
            writing.finish().await?;
            Ok(claimed)
        };
        run.await
            .map_err(|fault: Fault| fault.during("claiming threads"))
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let renewed = claim::renew(&mut writing, leases, lease, now()).await?;
            writing.finish().await?;
            Ok(renewed)
        };
        run.await
            .map_err(|fault: Fault| fault.during("renewing leases"))
    }

    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let broken = claim::break_leases(&mut writing, owner, now()).await?;
            writing.finish().await?;
            Ok(broken)
        };
        run.await
            .map_err(|fault: Fault| fault.during("breaking leases"))
    }

    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            claim::load(&mut reading, lease, now()).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("loading thread {}", lease.thread)))
    }

    async fn pending_writes(&self, thread: &ThreadId) -> Result<Vec<Write>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            claim::pending_writes(&mut reading, thread).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("reading what thread {thread} is doing")))
    }

    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            threads::mailbox(&mut reading, thread, after).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("reading the mailbox of thread {thread}")))
    }

    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        self.commit_kept(lease, &Arc::new(commit)).await
    }

    async fn commit_kept(
        &self,
        lease: &Lease,
        commit: &Arc<Commit>,
    ) -> Result<Receipt, StorageError> {
        self.sharing
            .commit(&self.writer, lease, commit.clone())
            .await
    }

    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            history::list(&mut reading, thread, filter).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("listing the history of thread {thread}")))
    }

    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            history::state_at(&mut reading, thread, checkpoint).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("reading the state of thread {thread}")))
    }

    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let forked = history::fork(&mut writing, thread, &checkpoint, now()).await?;
            writing.finish().await?;
            Ok(forked)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("forking thread {thread}")))
    }

    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            history::set_head(&mut writing, thread, branch, now()).await?;
            writing.finish().await
        };
        run.await.map_err(|fault: Fault| {
            fault.during(&format!(
                "making branch {branch} the head of thread {thread}"
            ))
        })
    }

    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            history::branches(&mut reading, thread).await
        };
        run.await
            .map_err(|fault| fault.during(&format!("listing the branches of thread {thread}")))
    }

    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            journal::read(&mut reading, filter, after, limit).await
        };
        run.await
            .map_err(|fault| fault.during("reading the journal"))
    }

    async fn journal_end(&self) -> Result<Cursor, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            journal::end(&mut reading).await
        };
        run.await
            .map_err(|fault| fault.during("looking for the end of the journal"))
    }

    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let appended = journal::append(&mut writing, id, &event, now()).await?;
            if appended == Appended::New {
                writing.finish().await?;
            }
            Ok(appended)
        };
        run.await.map_err(|fault: Fault| {
            fault.during(&format!("appending to the stream {}", event.stream))
        })
    }

    fn retention(&self) -> &dyn Retention {
        self
    }
}

impl SqliteCheckpointer {
    /// Closes the connections, so that the write-ahead log is folded into the file. Dropping does the same a little later.
    pub async fn close(&self) {
        self.readers.close().await;
        self.writer.pool.close().await;
    }
}

/// Opens one more connection of the pool's kind, which is what a test of the schema needs.
#[cfg(test)]
async fn single(path: &Path) -> sqlx::SqliteConnection {
    use sqlx::Connection;

    sqlx::SqliteConnection::connect_with(&SqliteConnectOptions::new().filename(path))
        .await
        .expect("the file opens")
}
