//! What the engine asks of a database: the [`Checkpointer`] trait and its plain data types.
//!
//! A checkpointer stores and orders; it knows no graph, no node and no reducer. Values are `serde_json` values. It decides
//! nothing: *what* a signal means is found out by the run that it wakes.
//!
//! # The model
//! A **thread** is a row: what it runs, where its head is, what it waits for, who holds its lease. Its history is a list of
//! **checkpoints**, numbered from 1 in each thread over all branches; number 0 stands for the state right after the thread's
//! input and has no row of its own (the input is in the thread's row). A checkpoint holds only what its step changed, so
//! writing costs what changed; reading back walks the branch from its last snapshot (see [`StateRows`]).
//! **Pending writes** belong to a checkpoint and a task: what the next step has already done. **Signals** wait in the
//! thread's mailbox until a commit consumes them. The **journal** is append-only and outlives threads.
//!
//! # When a thread is claimable ("due")
//! - it is new, was yielded, reopened, or got a new head;
//! - a signal or a request to cancel arrived (and the thread has not ended, or the signal has `revives`);
//! - the wake time of its wait has passed;
//! - its lease has expired.
//!
//! A thread under a live lease is never claimable; what arrives meanwhile makes it due when it is released: see
//! [`Then::Wait`].
//!
//! # Rules for implementations
//! - Every method is atomic: all or nothing. [`Checkpointer::commit`] may share a database transaction with the commits of
//!   other threads, as long as a refused one (stale token) leaves no trace and does not hurt the others.
//! - Order never depends on a host's clock: leases, timers and `at` columns use the database's clock.
//! - A commit may touch other threads' rows (signals, children, cancels). Lock them in one global order, or retry when the
//!   database reports a deadlock.
//! - No lock and no transaction is held between calls.

mod bell;
mod commit;
mod error;
mod input;
mod kept;
mod mail;
mod retention;
mod state;
mod thread;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;

use crate::{
    cache::Cache,
    documents::DocumentStore,
    ids::{Cursor, ThreadId},
};

pub use bell::{Bell, MAX_MESSAGE_BYTES};
pub use commit::{Commit, Loaded, Receipt, Then};
pub use error::{StorageError, StoredPart};
pub use input::Input;
pub use kept::{KeptState, KeptStep, KeptWrite};
pub(crate) use kept::{Noted, Step, Whole};
pub use mail::{
    Appended, Entry, JournalFilter, MAILBOX_LIMIT, NewEvent, NewSignal, SignalOutcome, SignalRecord,
};
pub use retention::{
    BATCH, Copied, DeleteFilter, Deleted, Forgotten, Keep, PrunePlan, Pruned, Retention,
    SurveyFilter, Surveyed,
};
pub use state::{
    Channels, CheckpointRecord, HistoryFilter, NewCheckpoint, Source, StateRow, StateRows, Write,
    WriteKey, WriteKind,
};
pub use thread::{
    AGING_S, CancelOutcome, CancelRequest, Claim, ClaimRequest, Claimed, Created, Lease,
    LeaseRecord, LeaseTerms, NewThread, Parent, Priority, Renewed, Reopened, ThreadFilter,
    ThreadRecord, ThreadStatus, WaitKind, WaitRecord,
};

/// A database that keeps threads.
#[async_trait]
pub trait Checkpointer: Send + Sync + 'static {
    /// A short name for logs and errors, such as `sqlite`.
    fn name(&self) -> &'static str;

    /// The cache that lives beside the threads; without one, an engine keeps what it caches in its own memory.
    fn cache(&self) -> Option<Arc<dyn Cache>> {
        None
    }

    /// The store of documents that lives beside the threads, if there is one.
    fn documents(&self) -> Option<Arc<dyn DocumentStore>> {
        None
    }

    /// Whether it keeps values as the program has them, in this process, and is to be given [`NewCheckpoint::kept`] and
    /// [`Commit::state`] instead of JSON. Whoever writes values down does not.
    fn keeps_values(&self) -> bool {
        false
    }

    /// Brings the schema up to date. Called once before anything else; safe to call again and from several processes.
    async fn migrate(&self) -> Result<(), StorageError>;

    /// What carries messages between the processes that use this database, so that they need not poll often; see [`Bell`].
    fn bell(&self) -> Option<Arc<dyn Bell>> {
        None
    }

    // ---- threads and signals, from anywhere ----

    /// Creates a thread; idempotent by its id.
    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError>;

    /// Whether [`Checkpointer::create_leased`] gives leases. Whoever does so also says in [`Claimed::next_due`] when a claim
    /// did not get all that is due: it is zero then, and only then.
    fn creates_leased(&self) -> bool {
        false
    }

    /// Creates a thread that is claimed already, in the same commit: for a process that has room to run it at once. A thread
    /// that is there stays as it is, and is not claimed. Whoever has no such commit creates the thread due, without a claim.
    async fn create_leased(
        &self,
        thread: NewThread,
        _terms: LeaseTerms<'_>,
    ) -> Result<(Created, Option<Claim>), StorageError> {
        Ok((self.create_thread(thread).await?, None))
    }

    /// Puts a signal into a mailbox and makes the thread due. `answers`: only if a wait with this id is open,
    /// and its time has not passed.
    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError>;

    /// Records a request to cancel and makes the thread due.
    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError>;

    /// Makes a failed or cancelled thread due again: status ready, no error, no output.
    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError>;

    /// A thread, or nothing.
    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadRecord>, StorageError>;

    /// Threads, in the order of their ids.
    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError>;

    /// Deletes a thread with its checkpoints, writes and signals (its children and the journal stay). Returns whether it was
    /// there. A run of it is fenced off.
    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError>;

    // ---- running ----

    /// Claims due threads, most urgent first (see [`AGING_S`]); none twice, by however many callers.
    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError>;

    /// Prolongs leases (which have not been taken over, even if they have expired) and tells which are lost.
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError>;

    /// Lets every lease of an owner expire now, so that its threads can be claimed at once. For a process that knows that
    /// whoever claimed under this name is dead, because it holds what that one held. Returns how many there were.
    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError>;

    /// Reads what a run needs. Refused if the lease is stale.
    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError>;

    /// The pending writes of a thread's newest checkpoint on its head branch: what the step under way has done. For looking;
    /// no lease is needed.
    async fn pending_writes(&self, thread: &ThreadId) -> Result<Vec<Write>, StorageError>;

    /// Unconsumed signals with a number above `after`, oldest first, and the number of the newest that ever arrived.
    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError>;

    /// Writes a [`Commit`], if the lease's token is still the thread's: checked inside the transaction by a locked read. A
    /// lease that has expired but was not taken over still counts. A commit with a checkpoint, or that releases, sets
    /// [`Claim::takeovers`] back to 0.
    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError>;

    /// The same for a caller that keeps the commit, to make it again when no answer comes. What only reads a commit should
    /// say how it does without a copy.
    async fn commit_kept(
        &self,
        lease: &Lease,
        commit: &Arc<Commit>,
    ) -> Result<Receipt, StorageError> {
        self.commit(lease, Commit::clone(commit)).await
    }

    // ---- time travel ----

    /// Checkpoints, newest first. The input (number 0) is not among them.
    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError>;

    /// What is needed to rebuild the state at a checkpoint (absent: at the tip of the head branch). 0 is the input.
    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError>;

    /// Writes a checkpoint on a new branch that grows from the checkpoint's `parent` (any of the thread's, or 0); its `branch`
    /// is ignored. The head stays where it is. Returns the new branch and the checkpoint's number.
    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError>;

    /// Makes a branch the head: the thread goes on from its tip. Status ready and due, no error, no output, no waits; a run
    /// under way is fenced off (the token grows).
    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError>;

    /// The branches of a thread, with their tips: branch to checkpoint.
    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError>;

    // ---- journal ----

    /// Entries after a cursor, in order. An entry that becomes visible later never has a cursor below one that has been
    /// returned, whatever commits run at the same time.
    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError>;

    /// The cursor of the newest visible entry; [`Cursor::START`] when there is none.
    async fn journal_end(&self) -> Result<Cursor, StorageError>;

    /// Appends an event at once, outside any step, unique by `id`.
    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError>;

    // ---- beside it ----

    /// What forgets and copies threads.
    fn retention(&self) -> &dyn Retention;
}
