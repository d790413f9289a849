//! Why a checkpointer could not do what it was asked.

use crate::ids::ThreadId;

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
