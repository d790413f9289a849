//! Why a checkpointer could not do what it was asked.

use std::fmt;

use crate::ids::{Cursor, ThreadId};

/// A part of what is stored of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum StoredPart {
    /// Its own row: what it is, its input, what it waits for, what it returned.
    Row,
    /// This checkpoint: what its step changed, or what was to run next.
    Checkpoint(u64),
    /// What tasks have done already on top of this checkpoint.
    Writes(u64),
    /// The signal with this number.
    Signal(u64),
}

impl fmt::Display for StoredPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Row => f.write_str("the row"),
            Self::Checkpoint(number) => write!(f, "checkpoint {number}"),
            Self::Writes(number) => write!(f, "a pending write on checkpoint {number}"),
            Self::Signal(number) => write!(f, "signal {number}"),
        }
    }
}

impl StoredPart {
    /// What can be done when it cannot be read.
    fn remedy(self) -> &'static str {
        match self {
            Self::Row => "restore it from a backup, or delete the thread",
            Self::Checkpoint(_) | Self::Writes(_) => {
                "go on from another checkpoint (`Engine::history`, `Engine::fork`, `Engine::set_head`), restore it from a backup, or delete the thread"
            }
            Self::Signal(_) => {
                "a run that finds it fails the thread and takes it out of the mailbox: then retry the thread, and send the signal again under another key"
            }
        }
    }
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
    /// The connections that the checkpointer was given are such that it cannot work over them. Nothing was changed.
    #[error("the database cannot be used over these connections: {what}; {remedy}")]
    UnfitConnections {
        /// What is wrong with them.
        what: &'static str,
        /// What to do about it.
        remedy: &'static str,
    },
    /// What is stored cannot be read.
    #[error("stored data cannot be read ({what}); restore it from a backup, or delete the thread")]
    Corrupt {
        /// Which row, and what is wrong with it.
        what: String,
    },
    /// A part of what is stored of a thread cannot be read. Its other parts can, and other threads.
    #[error("{part} of thread `{thread}` cannot be read: {what}; {remedy}", remedy = part.remedy())]
    Unreadable {
        /// The thread.
        thread: ThreadId,
        /// Which part.
        part: StoredPart,
        /// What is wrong with it.
        what: String,
    },
    /// An entry of the journal cannot be read. Those before it and after it can.
    #[error(
        "the entry of the journal at cursor {} cannot be read: {what}; go on reading after it, or restore it from a backup", cursor.0
    )]
    UnreadableEntry {
        /// Where it stands: reading after it gives the next one.
        cursor: Cursor,
        /// What is wrong with it.
        what: String,
    },
    /// A value is such that it could not be read back. Nothing was written.
    #[error("a value cannot be stored: {what}")]
    Unstorable {
        /// What is wrong with it.
        what: String,
    },
    /// Something is larger than what is accepted. Nothing was written.
    #[error("{what} has {bytes} bytes, and at most {most} are accepted")]
    TooLarge {
        /// What it is.
        what: String,
        /// How large it is.
        bytes: usize,
        /// How large it may be.
        most: usize,
    },
    /// A search cannot be made as it was asked for.
    #[error("the filter is not valid: {what}")]
    InvalidFilter {
        /// What is wrong with it.
        what: String,
    },
    /// What is stored is not of the type that it was asked for as.
    #[error("{what} is of another type than was asked for")]
    OtherType {
        /// What it is.
        what: String,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
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

impl StorageError {
    /// Whether something stored is at fault, which the next try would find like this one did.
    pub(crate) fn is_unreadable(&self) -> bool {
        matches!(self, Self::Corrupt { .. } | Self::Unreadable { .. })
    }

    /// The signal that cannot be read, if that is what it says.
    pub(crate) fn unreadable_signal(&self) -> Option<u64> {
        match self {
            Self::Unreadable {
                part: StoredPart::Signal(number),
                ..
            } => Some(*number),
            _ => None,
        }
    }
}
