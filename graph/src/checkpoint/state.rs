//! Checkpoints and pending writes: what is stored of a thread's state.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{KeptState, KeptStep, KeptWrite, StorageError};

/// A value that is a JSON object: channel name to value.
pub type Channels = Map<String, Value>;

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
    /// Stands in for `appends`, `changes` and `plan`, which are empty then. Given only to checkpointers that
    /// [keep values](super::Checkpointer::keeps_values).
    pub kept: Option<KeptStep>,
}

impl NewCheckpoint {
    /// Makes JSON of what is kept as a value.
    pub fn settle(&mut self) -> Result<(), StorageError> {
        if let Some(kept) = &self.kept {
            (self.appends, self.changes) = kept.changes()?;
            self.plan = kept.plan();
            self.kept = None;
        }
        Ok(())
    }
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
    /// As in [`NewCheckpoint`]: stands in for `appends` and `changes`.
    pub kept: Option<KeptStep>,
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
    /// The state itself, from a checkpointer that [keeps values](super::Checkpointer::keeps_values) and still has it; the rows
    /// are not needed then and may be left out, and `since_snapshot` is 0.
    pub state: Option<KeptState>,
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
    /// What one superstep of a subgraph inside the task has changed.
    Sub,
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
            Self::Sub => 6,
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
            6 => Self::Sub,
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
    /// Stands in for `value`, which is null then. Given only to checkpointers that
    /// [keep values](super::Checkpointer::keeps_values).
    pub kept: Option<KeptWrite>,
}

/// What no two pending writes of a checkpoint have in common.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteKey {
    /// As in [`Write`].
    pub task: String,
    /// As in [`Write`].
    pub kind: WriteKind,
    /// As in [`Write`].
    pub name: String,
    /// As in [`Write`].
    pub round: u32,
}

impl Write {
    /// What another one must have to replace this one.
    pub fn key(&self) -> WriteKey {
        WriteKey {
            task: self.task.clone(),
            kind: self.kind,
            name: self.name.clone(),
            round: self.round,
        }
    }

    /// Whether it is the one of this key.
    pub(crate) fn is(&self, key: &WriteKey) -> bool {
        (self.kind, self.round) == (key.kind, key.round)
            && self.name == key.name
            && self.task == key.task
    }

    /// Whether another one has the same key (and would replace this one).
    pub(crate) fn has_key(&self, other: &Self) -> bool {
        (self.kind, self.round) == (other.kind, other.round)
            && self.name == other.name
            && self.task == other.task
    }
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
