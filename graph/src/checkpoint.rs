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

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ids::{Cursor, ThreadId};

/// The most unconsumed signals that a thread's mailbox holds before [`Checkpointer::signal`] refuses more.
pub const MAILBOX_LIMIT: u64 = 10_000;

/// How much longer a thread of the next lower priority waits before it is served first, in seconds.
///
/// Due threads are claimed in the order of `(the time since when it is due) + rank × AGING_S`, so the low ones never starve.
pub const AGING_S: i64 = 30;

/// A value that is a JSON object: channel name to value.
pub type Channels = Map<String, Value>;

/// Four levels of urgency.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    /// Before everything else.
    Critical,
    /// People wait for it.
    High,
    /// The default.
    #[default]
    Normal,
    /// Whenever there is time; ages like the others, so its turn comes.
    Low,
}

impl Priority {
    /// 0 for critical to 3 for low: what databases store and multiply with [`AGING_S`].
    pub fn rank(self) -> u8 {
        match self {
            Self::Critical => 0,
            Self::High => 1,
            Self::Normal => 2,
            Self::Low => 3,
        }
    }

    /// The inverse of [`Priority::rank`]; ranks above 3 are low.
    pub fn from_rank(rank: u8) -> Self {
        match rank {
            0 => Self::Critical,
            1 => Self::High,
            2 => Self::Normal,
            _ => Self::Low,
        }
    }
}

/// Where a thread is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ThreadStatus {
    /// Can be claimed, or will be at once: new, yielded, reopened.
    Ready,
    /// A run holds its lease (live or expired).
    Running,
    /// Nothing to do until a signal or its wake time.
    Waiting,
    /// Ended: ran to its end.
    Done,
    /// Ended: a task failed for good. Can be reopened.
    Failed,
    /// Ended: was cancelled. Can be reopened.
    Cancelled,
}

impl ThreadStatus {
    /// Whether the thread has ended.
    pub fn is_ended(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// The name that is stored and shown, such as `waiting`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Running => "running",
            Self::Waiting => "waiting",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }

    /// The inverse of [`ThreadStatus::as_str`].
    pub fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "ready" => Self::Ready,
            "running" => Self::Running,
            "waiting" => Self::Waiting,
            "done" => Self::Done,
            "failed" => Self::Failed,
            "cancelled" => Self::Cancelled,
            _ => return None,
        })
    }
}

/// The thread that started this one, and the name under which it knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// The parent's id.
    pub thread: ThreadId,
    /// The child's name, unique among the parent's children.
    pub name: String,
}

/// A thread to be created.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NewThread {
    /// Its id; unique.
    pub id: ThreadId,
    /// The name of the graph that it runs.
    pub graph: String,
    /// Who started it, if a thread did.
    pub parent: Option<Parent>,
    /// How urgent it is.
    pub priority: Priority,
    /// Its first update: an object of channels.
    pub input: Value,
}

/// What became of a request to create a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// It exists now, and is due.
    New,
    /// A thread of this id was there already; nothing was changed.
    Existing,
}

/// What kind of waiting an open wait is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaitKind {
    /// For an answer to a question.
    Interrupt,
    /// For signals, children, or a time.
    Wait,
    /// For a time only (a sleep, or the next attempt of a failed task).
    Timer,
}

/// Something that a thread waits for now. Stored in the thread's row, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WaitRecord {
    /// Unique over threads, branches, tasks and rounds; an answer names it.
    pub id: String,
    /// The name given in the node.
    pub name: String,
    /// What kind of waiting it is.
    pub kind: WaitKind,
    /// The task that waits.
    pub task: String,
    /// The question of an interrupt; null otherwise.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub value: Value,
    /// Kinds of signals that end it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub signals: Vec<String>,
    /// Names of children whose end ends it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub children: Vec<String>,
    /// When it ends by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<Timestamp>,
}

/// Who runs a thread, as shown to people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRecord {
    /// The name of the process that holds it.
    pub owner: String,
    /// The fencing token.
    pub token: u64,
    /// When it expires, by the database's clock.
    pub expires_at: Timestamp,
}

/// A thread as the database knows it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ThreadRecord {
    /// Its id.
    pub id: ThreadId,
    /// The name of the graph that it runs.
    pub graph: String,
    /// Who started it, if a thread did.
    pub parent: Option<Parent>,
    /// How urgent it is.
    pub priority: Priority,
    /// Where it is in its life.
    pub status: ThreadStatus,
    /// The head branch; the first is 0.
    pub branch: u32,
    /// The newest checkpoint of the head branch; 0 is the input.
    pub checkpoint: u64,
    /// How many supersteps led to it.
    pub step: u64,
    /// Its first update.
    pub input: Value,
    /// What it waits for.
    pub waits: Vec<WaitRecord>,
    /// When its wait ends by itself.
    pub wake_at: Option<Timestamp>,
    /// Why it failed, or the reason given when it was cancelled.
    pub error: Option<String>,
    /// What it returned, if it is done (and perhaps if it was cancelled).
    pub output: Option<Value>,
    /// The reason of a request to cancel that no run has carried out yet.
    pub cancel: Option<String>,
    /// Who holds it now. Absent when nobody does.
    pub lease: Option<LeaseRecord>,
    /// When it was created, by the database's clock.
    pub created_at: Timestamp,
    /// When it last changed, by the database's clock. Not a sign of life.
    pub updated_at: Timestamp,
}

/// The right to write to a thread: given by a claim, void as soon as anybody else got a newer one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The thread.
    pub thread: ThreadId,
    /// Grows with every claim of the thread (and with every [`Checkpointer::set_head`]).
    pub token: u64,
}

/// What to claim.
#[derive(Clone, Debug)]
pub struct ClaimRequest<'a> {
    /// The name of the claiming process, for people.
    pub owner: &'a str,
    /// Only threads of these graphs.
    pub graphs: &'a [String],
    /// At most so many.
    pub limit: usize,
    /// How long a lease holds without renewal.
    pub lease: Duration,
}

/// A claimed thread.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The right to write to it.
    pub lease: Lease,
    /// The thread, after the claim.
    pub thread: ThreadRecord,
    /// How many leases in a row have expired without any commit of a run that lived: this one's predecessor died so often.
    pub takeovers: u32,
}

/// The answer to a [`ClaimRequest`].
#[derive(Clone, Debug)]
pub struct Claimed {
    /// What was claimed, most urgent first.
    pub claims: Vec<Claim>,
    /// In how long the next wake time or lease expiry is due, if one is known (only of the graphs asked for): a hint when to
    /// claim again without being woken.
    pub next_due: Option<Duration>,
    /// The database's clock.
    pub now: Timestamp,
}

/// What a renewal found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Renewed {
    /// The thread.
    pub thread: ThreadId,
    /// Whether the lease is still ours; if not, the run must stop.
    pub held: bool,
    /// The reason of a pending request to cancel.
    pub cancel: Option<String>,
}

/// Where a checkpoint came from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A further input to a thread that had ended (the first input has no checkpoint row).
    Input,
    /// A superstep.
    Step,
    /// An update from outside, as if by this node (a fork).
    Update(String),
}

/// A checkpoint to be written: only what changed.
#[derive(Clone, Debug, PartialEq)]
pub struct NewCheckpoint {
    /// The checkpoint before it; must be the newest one of the branch (0: the input).
    pub parent: u64,
    /// The branch that grows.
    pub branch: u32,
    /// How many supersteps led to it.
    pub step: u64,
    /// Where it came from.
    pub source: Source,
    /// New items of append channels: channel to array. Empty: store nothing.
    pub appends: Channels,
    /// What changed in all other channels, in a form that only the engine reads. Empty: store nothing.
    pub changes: Channels,
    /// From time to time: the full values of the non-append channels *after* this step (and of append channels only
    /// when they were overwritten). What came before is not needed to read them back.
    pub snapshot: Option<Channels>,
    /// What to run next and what the scheduler must remember. Opaque, small.
    pub plan: Value,
}

/// One row of a branch, for reading state back. See [`StateRows`].
#[derive(Clone, Debug, PartialEq)]
pub struct StateRow {
    /// The checkpoint's number.
    pub checkpoint: u64,
    /// As in [`NewCheckpoint`].
    pub appends: Channels,
    /// As in [`NewCheckpoint`]; may be left empty in rows before the newest snapshot.
    pub changes: Channels,
    /// As in [`NewCheckpoint`]; may be left out in all but the newest row that has one.
    pub snapshot: Option<Channels>,
}

/// All that is needed to rebuild the state at one checkpoint, oldest first, along its branch and the branches it grew from.
///
/// Needed are: the newest row with a snapshot and all rows after it, in full; and of the rows before it, those with
/// `appends`. Rows that add nothing may be left out.
#[derive(Clone, Debug, PartialEq)]
pub struct StateRows {
    /// The checkpoint they lead to; 0 when there is only the input.
    pub checkpoint: u64,
    /// Its branch.
    pub branch: u32,
    /// Its step number.
    pub step: u64,
    /// Its plan; absent at checkpoint 0.
    pub plan: Option<Value>,
    /// How many checkpoints back the newest snapshot is (0: the checkpoint itself has it); absent when there is none.
    /// Counting along the branch.
    pub since_snapshot: Option<u64>,
    /// The rows.
    pub rows: Vec<StateRow>,
}

/// What a pending write holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WriteKind {
    /// The task's outcome: it need not run again.
    Result,
    /// The value of a durable step.
    Step,
    /// What a wait was answered with.
    Wait,
    /// What a look into the mailbox found.
    Take,
    /// How much the task has said already, and what it is suspended on.
    Suspended,
    /// How often the task was tried.
    Attempts,
}

impl WriteKind {
    /// A small number for databases.
    pub fn code(self) -> u8 {
        match self {
            Self::Result => 0,
            Self::Step => 1,
            Self::Wait => 2,
            Self::Take => 3,
            Self::Suspended => 4,
            Self::Attempts => 5,
        }
    }

    /// The inverse of [`WriteKind::code`].
    pub fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0 => Self::Result,
            1 => Self::Step,
            2 => Self::Wait,
            3 => Self::Take,
            4 => Self::Suspended,
            5 => Self::Attempts,
            _ => return None,
        })
    }
}

/// A pending write. Its key is (thread, checkpoint, task, kind, name, round); writing the same key again replaces the value.
#[derive(Clone, Debug, PartialEq)]
pub struct Write {
    /// The task, by its path.
    pub task: String,
    /// What it holds.
    pub kind: WriteKind,
    /// The name given in the node; empty where there is none.
    pub name: String,
    /// How often this name came before in the task.
    pub round: u32,
    /// The value.
    pub value: Value,
}

/// An event for the journal.
#[derive(Clone, Debug, PartialEq)]
pub struct NewEvent {
    /// The stream in which it is numbered.
    pub stream: String,
    /// What happened.
    pub name: String,
    /// The details.
    pub payload: Value,
    /// The thread that said it.
    pub thread: Option<ThreadId>,
}

/// An entry of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// Its place in the journal.
    pub cursor: Cursor,
    /// Its stream.
    pub stream: String,
    /// Its number in the stream: from 1, without gaps.
    pub number: u64,
    /// What happened.
    pub name: String,
    /// The details.
    pub payload: Value,
    /// The thread that said it, if one did.
    pub thread: Option<ThreadId>,
    /// When, by the database's clock. For people; the order is the cursor's.
    pub at: Timestamp,
}

/// Which entries of the journal to read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct JournalFilter {
    /// Only these streams; empty: all.
    pub streams: Vec<String>,
    /// Only entries said by this thread.
    pub thread: Option<ThreadId>,
}

impl JournalFilter {
    /// Everything.
    pub fn all() -> Self {
        Self::default()
    }

    /// One stream.
    pub fn stream(name: impl Into<String>) -> Self {
        Self {
            streams: vec![name.into()],
            thread: None,
        }
    }
}

/// A signal to be put into a thread's mailbox.
#[derive(Clone, Debug, PartialEq)]
pub struct NewSignal {
    /// To whom.
    pub thread: ThreadId,
    /// What kind of news it is; waits name kinds.
    pub kind: String,
    /// Unique in the thread for ever, consumed or not: a second one with the same key is dropped.
    pub key: String,
    /// The details.
    pub payload: Value,
    /// Whether it makes even an ended thread due (a further input).
    pub revives: bool,
}

/// A signal in a mailbox.
#[derive(Clone, Debug, PartialEq)]
pub struct SignalRecord {
    /// Grows in each thread in the order of arrival, from 1.
    pub number: u64,
    /// What kind of news it is.
    pub kind: String,
    /// Its unique key.
    pub key: String,
    /// The details.
    pub payload: Value,
}

/// What became of a signal from outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SignalOutcome {
    /// It is in the mailbox.
    New,
    /// One of the same key was there already (perhaps consumed); nothing was changed.
    Duplicate,
    /// The wait that it must answer is not open; nothing was changed. (Checked after the key.)
    NoSuchWait,
    /// The mailbox holds [`MAILBOX_LIMIT`] unconsumed signals; nothing was changed.
    MailboxFull,
    /// There is no such thread.
    UnknownThread,
}

/// A request to cancel a thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CancelRequest {
    /// Which thread.
    pub thread: ThreadId,
    /// Why, for people.
    pub reason: String,
}

/// What became of a request to cancel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CancelOutcome {
    /// Recorded; the thread is due (or its run will hear of it).
    Requested,
    /// One was recorded already; its reason stays.
    AlreadyRequested,
    /// The thread had ended; nothing was changed.
    Ended,
    /// There is no such thread.
    UnknownThread,
}

/// What becomes of the lease with a commit.
#[derive(Clone, Debug, PartialEq)]
pub enum Then {
    /// The run goes on.
    Keep,
    /// The run stops here; the thread is due at once.
    Yield,
    /// The thread sleeps. But if its mailbox holds a signal with a number above `mail_seen`, or a request to cancel is
    /// pending, the rest of the commit lands, the lease is **kept**, and the receipt says `released: false`.
    Wait {
        /// The newest signal that the run knows of.
        mail_seen: u64,
        /// When it wakes by itself.
        wake_at: Option<Timestamp>,
    },
    /// The thread has ended, and its lease with it. A pending request to cancel is forgotten. If its mailbox holds an
    /// unconsumed signal that revives, the thread is due at once (with this status).
    End {
        /// Done, failed or cancelled.
        status: ThreadStatus,
        /// Why it failed, or was cancelled.
        error: Option<String>,
        /// What it returns.
        output: Option<Value>,
    },
}

/// Everything that one superstep, suspension, durable step or end writes: all of it lands, or nothing.
#[derive(Clone, Debug, PartialEq)]
pub struct Commit {
    /// The checkpoint that the run stands on.
    pub base: u64,
    /// A new checkpoint on top of `base` (its `parent`). Its number becomes the thread's `checkpoint`, its step the thread's `step`.
    pub checkpoint: Option<NewCheckpoint>,
    /// Pending writes. They belong to the newest checkpoint after this commit: to `checkpoint` if there is one (what must
    /// be carried over to it), else to `base`.
    pub writes: Vec<Write>,
    /// Forget the pending writes of `base` (they became part of the checkpoint), before `writes` are written. Set only if
    /// there are any.
    pub clear_writes: bool,
    /// Numbers of the signals that were used: they leave the mailbox; their keys stay known.
    pub consumed: Vec<u64>,
    /// Events, numbered in this order in their streams.
    pub events: Vec<NewEvent>,
    /// New threads. One whose id exists already is left as it is.
    pub children: Vec<NewThread>,
    /// Signals to other threads (or to itself). Duplicates by key are dropped silently; unknown threads are reported in the receipt.
    pub signals: Vec<NewSignal>,
    /// Requests to cancel other threads. Ended and unknown ones are skipped.
    pub cancels: Vec<CancelRequest>,
    /// Replaces what the thread waits for, if given. Ending a thread clears it.
    pub waits: Option<Vec<WaitRecord>>,
    /// What becomes of the lease.
    pub then: Then,
}

impl Commit {
    /// A commit that changes nothing and keeps the lease.
    pub fn on(base: u64) -> Self {
        Self {
            base,
            checkpoint: None,
            writes: Vec::new(),
            clear_writes: false,
            consumed: Vec::new(),
            events: Vec::new(),
            children: Vec::new(),
            signals: Vec::new(),
            cancels: Vec::new(),
            waits: None,
            then: Then::Keep,
        }
    }
}

/// What a commit found and did.
#[derive(Clone, Debug, PartialEq)]
pub struct Receipt {
    /// The number of the new checkpoint, if there is one.
    pub checkpoint: Option<u64>,
    /// Whether the lease was given back.
    pub released: bool,
    /// The number of the newest signal that ever arrived at the thread; 0: none did.
    pub mail: u64,
    /// The reason of a pending request to cancel.
    pub cancel: Option<String>,
    /// Receivers of signals that do not exist.
    pub undelivered: Vec<ThreadId>,
    /// The database's clock.
    pub now: Timestamp,
}

/// All that a run needs to go on with a thread.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The thread.
    pub thread: ThreadRecord,
    /// The state at the tip of its head branch.
    pub state: StateRows,
    /// The pending writes of that checkpoint.
    pub writes: Vec<Write>,
    /// Unconsumed signals, oldest first.
    pub mailbox: Vec<SignalRecord>,
    /// The number of the newest signal that ever arrived; 0: none did.
    pub mail: u64,
    /// The database's clock.
    pub now: Timestamp,
}

/// Which checkpoints to list: newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HistoryFilter {
    /// Only those on the way to the tip of this branch (the branches it grew from included); absent: those of all branches.
    pub branch: Option<u32>,
    /// Only those with a smaller number.
    pub before: Option<u64>,
    /// At most so many; absent: 100.
    pub limit: Option<usize>,
}

/// A checkpoint in a list.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// Its number in the thread.
    pub checkpoint: u64,
    /// The one before it; 0 is the input.
    pub parent: u64,
    /// The branch on which it was written.
    pub branch: u32,
    /// How many supersteps led to it.
    pub step: u64,
    /// Where it came from.
    pub source: Source,
    /// What was to run next.
    pub plan: Value,
    /// When, by the database's clock.
    pub at: Timestamp,
}

/// Which threads to list, in the order of their ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadFilter {
    /// Only of this graph.
    pub graph: Option<String>,
    /// Only with one of these statuses; empty: any.
    pub statuses: Vec<ThreadStatus>,
    /// Only children of this thread.
    pub parent: Option<ThreadId>,
    /// Only ids that begin so.
    pub prefix: Option<String>,
    /// Only ids after this one (for paging).
    pub after: Option<ThreadId>,
    /// At most so many; absent: 1000.
    pub limit: Option<usize>,
}

/// What became of an entry that is unique by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is in the journal.
    New,
    /// An entry with this id was there already; nothing was changed.
    Duplicate,
}

/// What became of a request to reopen a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reopened {
    /// It is due again, on the checkpoint and with the pending writes it had.
    Yes,
    /// It has not failed and was not cancelled.
    NotEnded(ThreadStatus),
    /// There is no such thread.
    UnknownThread,
}

/// Why a checkpointer could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StorageError {
    /// The lease is not the newest one of its thread (or the thread is gone): somebody else runs it now. Nothing was written.
    #[error(
        "the lease on thread `{thread}` (token {token}) is not valid any more; nothing was written"
    )]
    Fenced {
        /// The thread.
        thread: ThreadId,
        /// The stale token.
        token: u64,
    },
    /// There is no such thread.
    #[error("there is no thread `{0}`")]
    UnknownThread(ThreadId),
    /// There is no such checkpoint.
    #[error("thread `{thread}` has no checkpoint {checkpoint}")]
    UnknownCheckpoint {
        /// The thread.
        thread: ThreadId,
        /// The number asked for.
        checkpoint: u64,
    },
    /// There is no such branch.
    #[error("thread `{thread}` has no branch {branch}")]
    UnknownBranch {
        /// The thread.
        thread: ThreadId,
        /// The branch asked for.
        branch: u32,
    },
    /// The new checkpoint's parent is not the tip of its branch. Nothing was written.
    #[error(
        "checkpoint {parent} is not the newest of branch {branch} of thread `{thread}`; nothing was written"
    )]
    NotTheTip {
        /// The thread.
        thread: ThreadId,
        /// The branch.
        branch: u32,
        /// The parent that the new checkpoint named.
        parent: u64,
    },
    /// What is stored cannot be read.
    #[error("stored data cannot be read ({what}); restore it from a backup, or delete the thread")]
    Corrupt {
        /// Which row, and what is wrong with it.
        what: String,
    },
    /// A value is such that it could not be read back. Nothing was written.
    #[error("a value cannot be stored: {what}")]
    Unstorable {
        /// What is wrong with it.
        what: String,
    },
    /// The database was written by a newer release.
    #[error(
        "the database has schema {found}, this program knows up to {known}; use the newer release"
    )]
    NewerSchema {
        /// The version found.
        found: i64,
        /// The newest version known.
        known: i64,
    },
    /// The database could not be reached, refused, or failed. Nothing is known about the request's effect.
    #[error("the database failed while {operation}")]
    Backend {
        /// What was being done, such as `committing a step of thread job:1`.
        operation: String,
        /// The cause.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

/// A database that keeps threads.
#[async_trait]
pub trait Checkpointer: Send + Sync + 'static {
    /// A short name for logs and errors, such as `sqlite`.
    fn name(&self) -> &'static str;

    /// Brings the schema up to date. Called once before anything else; safe to call again and from several processes.
    async fn migrate(&self) -> Result<(), StorageError>;

    // ---- threads and signals, from anywhere ----

    /// Creates a thread; idempotent by its id.
    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError>;

    /// Puts a signal into a mailbox and makes the thread due. `answers`: only if a wait with this id is open.
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
}
