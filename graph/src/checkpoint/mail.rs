//! What goes out of and into threads: events of the journal, and signals.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::ids::{Cursor, ThreadId};

/// The most unconsumed signals that a thread's mailbox holds before [`Checkpointer::signal`](super::Checkpointer::signal) refuses more.
pub const MAILBOX_LIMIT: u64 = 10_000;

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
    /// The wait that it must answer is open, but its time ([`WaitRecord::until`](super::WaitRecord)) has passed, by the
    /// database's clock; nothing was changed.
    Expired,
    /// The mailbox holds [`MAILBOX_LIMIT`] unconsumed signals; nothing was changed.
    MailboxFull,
    /// There is no such thread.
    UnknownThread,
}

/// What became of an entry that is unique by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// It is in the journal.
    New,
    /// An entry with this id was there already; nothing was changed.
    Duplicate,
}
