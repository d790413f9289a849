//! What of the past is forgotten, and copies of it: pruning, deleting, copying.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;

use super::{Channels, StorageError, ThreadStatus};
use crate::ids::ThreadId;

/// Which checkpoints of a thread stay: those that any of its rules keeps, and always the head.
///
/// A branch of which nothing stays is gone too. With no rule, everything stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keep {
    /// The newest so many, over all branches. 0 counts as 1.
    pub last: Option<u64>,
    /// Those not older than this, by the database's clock.
    pub newer_than: Option<Duration>,
}

impl Keep {
    /// The newest `count` checkpoints.
    pub fn last(count: u64) -> Self {
        Self {
            last: Some(count),
            newer_than: None,
        }
    }

    /// Only the newest: the state stays, its history goes.
    pub fn latest() -> Self {
        Self::last(1)
    }

    /// Checkpoints not older than `age`.
    pub fn newer_than(age: Duration) -> Self {
        Self {
            last: None,
            newer_than: Some(age),
        }
    }

    /// Whether it keeps everything.
    pub fn is_everything(&self) -> bool {
        self.last.is_none() && self.newer_than.is_none()
    }
}

/// What pruning a thread would do. See [`Retention::prune_plan`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PrunePlan {
    /// Checkpoints with a smaller number go, except the head.
    pub before: u64,
    /// Those that become the oldest on their way, and have no snapshot to be rebuilt from.
    pub bases: Vec<u64>,
}

/// What one batch of pruning did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pruned {
    /// It is done, as far as one batch goes.
    Done {
        /// How many checkpoints left the database in this batch.
        removed: u64,
        /// Whether there is more to clean up behind it. What is to go can be seen by nobody any more, in either case.
        more: bool,
    },
    /// Nothing was changed: these need a snapshot first.
    Needs(Vec<u64>),
}

/// Which threads to delete.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeleteFilter {
    /// Only of these graphs; empty: of any.
    pub graphs: Vec<String>,
    /// Only ids that begin so.
    pub prefix: Option<String>,
    /// Only with one of these statuses; empty: any that is an end. Unfinished threads go only when their status is named.
    pub statuses: Vec<ThreadStatus>,
    /// Only those that have not changed for so long, by the database's clock: for ended ones, since their end.
    pub unchanged_for: Option<Duration>,
    /// At most so many; absent: 100.
    pub limit: Option<usize>,
}

impl DeleteFilter {
    /// The statuses that are meant.
    pub fn statuses(&self) -> Vec<ThreadStatus> {
        if self.statuses.is_empty() {
            vec![
                ThreadStatus::Done,
                ThreadStatus::Failed,
                ThreadStatus::Cancelled,
            ]
        } else {
            self.statuses.clone()
        }
    }
}

/// What one batch of deleting did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Deleted {
    /// The threads that are gone, in the order of their ids.
    pub threads: Vec<ThreadId>,
    /// Whether there is more to do: more threads that fit the filter, or rows of deleted ones to clean up.
    pub more: bool,
}

/// What one batch of forgetting keys did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Forgotten {
    /// How many keys are gone.
    pub keys: u64,
    /// Whether there are more to forget.
    pub more: bool,
}

/// What became of a request to copy a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Copied {
    /// The copy exists now.
    New,
    /// A thread of the copy's id was there already; nothing was changed.
    Existing,
    /// There is no thread to copy.
    UnknownThread,
}

/// Which threads to look at when sweeping, in the order of their ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SurveyFilter {
    /// Only of these graphs; empty: of any.
    pub graphs: Vec<String>,
    /// Only ids that begin so.
    pub prefix: Option<String>,
    /// Only ids after this one.
    pub after: Option<ThreadId>,
    /// At most so many.
    pub limit: usize,
}

/// What a sweep needs to know of a thread: small, whatever the thread holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Surveyed {
    /// Its id.
    pub id: ThreadId,
    /// The name of its graph.
    pub graph: String,
    /// Where it is in its life.
    pub status: ThreadStatus,
    /// How many checkpoints it has, about: found without counting them.
    pub checkpoints: u64,
}

/// The most checkpoints that one call of [`Retention::prune`] takes out of the database, and the most rows of deleted threads,
/// or keys of signals, that one call cleans up.
pub const BATCH: usize = 1000;

/// Forgets and copies threads; part of every [`Checkpointer`](super::Checkpointer).
///
/// What forgets does a bounded amount of work in each call, so that nobody waits long for it, and says whether there is more.
#[async_trait]
pub trait Retention: Send + Sync {
    /// What pruning would do: the number before which checkpoints go, and which of the others need a snapshot for that. Changes
    /// nothing.
    async fn prune_plan(&self, thread: &ThreadId, keep: &Keep) -> Result<PrunePlan, StorageError>;

    /// Forgets the checkpoints with a number below `before`, except the head, and their pending writes; then takes at most
    /// [`BATCH`] of them out of the database. Called again with the same number, it goes on with that.
    ///
    /// They can be seen by nobody as soon as this returns: not listed, not read, not forked. The input (number 0) stays. The
    /// state at each of the others is what it was, which takes two things: the oldest one on each way gets the snapshot that is
    /// handed in, if it has none (is none handed in, nothing changes and the answer is [`Pruned::Needs`]); and what was
    /// appended before it stays, in whatever rows. A branch without any checkpoint left is gone, and its number is not given
    /// again. A run under way is not disturbed: it keeps its lease and commits.
    async fn prune(
        &self,
        thread: &ThreadId,
        before: u64,
        snapshots: &BTreeMap<u64, Channels>,
    ) -> Result<Pruned, StorageError>;

    /// Makes a copy of a thread, as it is at this moment: its input, checkpoints with numbers, times and branches, pending
    /// writes, mailbox and known keys. It has no parent, no lease and no request to cancel. If the original has ended, so has
    /// the copy (and is due only if its mailbox holds a signal that revives); otherwise the copy is ready, due now, and waits
    /// for nothing yet: its first run finds out what it waits for. Neither the children nor the journal are touched, and a run
    /// of the original is not disturbed.
    async fn copy_thread(&self, from: &ThreadId, to: &ThreadId) -> Result<Copied, StorageError>;

    /// Deletes threads that fit a filter, as [`Checkpointer::delete_thread`](super::Checkpointer::delete_thread) does, and cleans
    /// up at most [`BATCH`] rows of deleted ones. Ended ones that are due again stay.
    async fn delete_threads(&self, filter: &DeleteFilter) -> Result<Deleted, StorageError>;

    /// Forgets the keys of consumed signals that arrived longer ago than `age`, at most [`BATCH`] of them: such a signal, sent
    /// once more, is a new one.
    async fn forget_keys(
        &self,
        threads: &[ThreadId],
        age: Duration,
    ) -> Result<Forgotten, StorageError>;

    /// Threads, in the order of their ids, with what a sweep needs to know of them.
    async fn survey(&self, filter: &SurveyFilter) -> Result<Vec<Surveyed>, StorageError>;
}
