//! Threads as rows: what they are, what they wait for, who holds them.

use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Input, Loaded};
use crate::ids::ThreadId;

/// How much longer a thread of the next lower priority waits before it is served first, in seconds.
///
/// Due threads are claimed in the order of `(the time since when it is due) + rank × AGING_S`, so the low ones never starve.
pub const AGING_S: i64 = 30;

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
    /// The default. (Once called `normal`, which can still be read.)
    #[default]
    #[serde(alias = "normal")]
    Medium,
    /// Whenever there is time; ages like the others, so its turn comes.
    Low,
}

impl Priority {
    /// 0 for critical to 3 for low: what databases store and multiply with [`AGING_S`].
    pub fn rank(self) -> u8 {
        match self {
            Self::Critical => 0,
            Self::High => 1,
            Self::Medium => 2,
            Self::Low => 3,
        }
    }

    /// The inverse of [`Priority::rank`]; ranks above 3 are low.
    pub fn from_rank(rank: u8) -> Self {
        match rank {
            0 => Self::Critical,
            1 => Self::High,
            2 => Self::Medium,
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
    pub input: Input,
}

impl NewThread {
    /// The thread as it is when it has just been created, which nobody holds.
    pub(crate) fn created(self, now: Timestamp) -> ThreadRecord {
        ThreadRecord {
            id: self.id,
            graph: self.graph,
            parent: self.parent,
            priority: self.priority,
            status: ThreadStatus::Ready,
            branch: 0,
            checkpoint: 0,
            step: 0,
            input: self.input,
            waits: Vec::new(),
            wake_at: None,
            error: None,
            output: None,
            cancel: None,
            lease: None,
            created_at: now,
            updated_at: now,
        }
    }
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
    pub input: Input,
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
    /// Grows with every claim of the thread (and with every [`Checkpointer::set_head`](super::Checkpointer::set_head)).
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

/// The lease with which a thread is created.
#[derive(Clone, Copy, Debug)]
pub struct LeaseTerms<'a> {
    /// The name of the process that is to run it, for people.
    pub owner: &'a str,
    /// How long the lease holds without renewal.
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
    /// What [`Checkpointer::load`](super::Checkpointer::load) would answer, if the claim came across it anyway: for a thread
    /// that has just begun, a run need not ask again.
    pub loaded: Option<Box<Loaded>>,
    /// What of the thread's own row cannot be read, if anything: that is empty in `thread`. Claimed nevertheless, so that it
    /// is not in the way of others: its run is to fail it.
    pub unreadable: Option<String>,
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
    /// Whether its mailbox holds an unconsumed signal that revives.
    pub input: bool,
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
