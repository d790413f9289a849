//! What a run reads and writes.

use jiff::Timestamp;
use serde_json::Value;

use super::{
    CancelRequest, KeptState, NewCheckpoint, NewEvent, NewSignal, NewThread, SignalRecord,
    StateRows, ThreadRecord, ThreadStatus, WaitRecord, Write, WriteKey,
};
use crate::ids::ThreadId;

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
    /// Forget these pending writes of `base`, if they are there: what a loop inside a task has left is not needed when it has gone
    /// further. None of them is in `writes`.
    pub forget: Vec<WriteKey>,
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
    /// The state at the newest checkpoint after this commit, for whoever runs or reads the thread next; and, with a
    /// [`Then::End`] that has no output, what the thread returns. Given only to checkpointers that
    /// [keep values](super::Checkpointer::keeps_values).
    pub state: Option<KeptState>,
}

impl Commit {
    /// A commit that changes nothing and keeps the lease.
    pub fn on(base: u64) -> Self {
        Self {
            base,
            checkpoint: None,
            writes: Vec::new(),
            clear_writes: false,
            forget: Vec::new(),
            consumed: Vec::new(),
            events: Vec::new(),
            children: Vec::new(),
            signals: Vec::new(),
            cancels: Vec::new(),
            waits: None,
            then: Then::Keep,
            state: None,
        }
    }

    /// Its checkpoint, if it is nothing but that, as most supersteps are. (The state is not for those who write values down.)
    pub(crate) fn only_checkpoint(&self) -> Option<&NewCheckpoint> {
        let Self {
            base: _,
            checkpoint,
            writes,
            clear_writes,
            forget,
            consumed,
            events,
            children,
            signals,
            cancels,
            waits,
            then,
            state: _,
        } = self;
        let nothing_else = writes.is_empty()
            && !clear_writes
            && forget.is_empty()
            && consumed.is_empty()
            && events.is_empty()
            && children.is_empty()
            && signals.is_empty()
            && cancels.is_empty()
            && waits.is_none()
            && *then == Then::Keep;
        checkpoint.as_ref().filter(|_| nothing_else)
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
#[derive(Clone, Debug, PartialEq)]
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

impl Loaded {
    /// A thread that has its input, and nothing else yet: no checkpoint, no pending write, no unconsumed signal. `mail` is the
    /// number of the newest signal that ever arrived.
    pub fn fresh(thread: &ThreadRecord, mail: u64, now: Timestamp) -> Self {
        Self {
            state: StateRows {
                checkpoint: 0,
                branch: thread.branch,
                step: 0,
                plan: None,
                since_snapshot: None,
                rows: Vec::new(),
                state: None,
            },
            writes: Vec::new(),
            mailbox: Vec::new(),
            mail,
            now,
            thread: thread.clone(),
        }
    }
}
