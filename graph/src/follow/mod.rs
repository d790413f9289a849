//! The stream of a run: what is interesting while it happens.
//!
//! # What is promised
//! Whoever follows a thread with [`Engine::follow`](crate::Engine::follow) hears of it wherever it runs. What happens in this
//! process comes as it happens ([`StreamItem::live`]): all kinds of items. Of what happens in other processes there is what
//! the database keeps: of each checkpoint the step's updates, the values and the checkpoint itself; suspensions; the end. Custom
//! items, messages and tasks are stored nowhere, so there are none. A thread may move between processes at any time; each
//! checkpoint is told once, and in order.
//!
//! # The order
//! In each step:
//! 1. [`StreamKind::TaskStarted`] of the tasks that run, in the order of their paths (nodes by name, then sends by index);
//! 2. [`StreamKind::Custom`] and [`StreamKind::Message`] as nodes send them; between them, as they happen, attempts that failed
//!    and are made again ([`StreamKind::TaskFinished`], [`StreamKind::TaskStarted`]);
//! 3. when the step is in the database: for each task, in the order of the paths, [`StreamKind::TaskFinished`] and its
//!    [`StreamKind::Updates`];
//! 4. [`StreamKind::Values`];
//! 5. [`StreamKind::Checkpoint`].
//!
//! When a step does not get to its end, because a task waits, fails for good or is cancelled: [`StreamKind::TaskFinished`] of
//! the tasks that ran, in that order, and then [`StreamKind::Suspended`] or [`StreamKind::Ended`]. When the thread goes on, the
//! tasks that wait start once more; those that had finished do not, and their updates are marked as cached.

mod bus;
mod reader;
mod stored;

use std::ops::BitOr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    checkpoint::{ThreadStatus, WaitRecord},
    engine::CheckpointInfo,
    ids::ThreadId,
};

pub(crate) use bus::{Bus, Spot};
pub(crate) use reader::follow;

/// Which items to follow. Combine with `|`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Modes(u8);

impl Modes {
    /// The whole state after each step.
    pub const VALUES: Self = Self(1);
    /// What each task of a step changed.
    pub const UPDATES: Self = Self(2);
    /// What nodes send with [`Context::custom`](crate::Context::custom).
    pub const CUSTOM: Self = Self(4);
    /// Tasks that start and finish.
    pub const TASKS: Self = Self(8);
    /// Checkpoints that are written.
    pub const CHECKPOINTS: Self = Self(16);
    /// What nodes send with [`Context::message`](crate::Context::message).
    pub const MESSAGES: Self = Self(32);
    /// All of them.
    pub const ALL: Self = Self(63);
    /// All of them, to see what a thread does: each item has its time, its kind and its step.
    pub const DEBUG: Self = Self::ALL;

    pub(crate) const NONE: Self = Self(0);

    /// Whether one of the others is among them.
    pub(crate) fn has(self, others: Self) -> bool {
        self.0 & others.0 != 0
    }
}

impl BitOr for Modes {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Something that happens in a thread.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamItem {
    /// The thread.
    pub thread: ThreadId,
    /// The subgraph in which it happens, from the outside in; empty: the thread's own graph.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespace: Vec<String>,
    /// The superstep, from 1; 0 where there is none.
    pub step: u64,
    /// When: by this process's clock, or by the database's if it is not live. For people.
    pub at: Timestamp,
    /// Whether it happens in this process, now. If not, it was read back from the database.
    pub live: bool,
    /// What happens.
    #[serde(flatten)]
    pub kind: StreamKind,
}

/// What happens in a thread. The order is described at [`Engine::follow`](crate::Engine::follow).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "kind", content = "data")]
#[non_exhaustive]
pub enum StreamKind {
    /// The whole state after a step.
    Values(Value),
    /// What a task changed: an object of channels, or null if it changed nothing. A task that hands back several updates has
    /// as many of these.
    Updates {
        /// The task, by its path in the step.
        task: String,
        /// The task's node.
        node: String,
        /// What it changed.
        update: Value,
        /// Whether the task had run earlier and was not run again.
        cached: bool,
    },
    /// What a step changed that was taken in another process. The database keeps the changes of all its tasks together: these
    /// updates, one after the other, have their effect. Not told of a checkpoint before which others were forgotten. (With
    /// [`Modes::UPDATES`].)
    StepUpdates {
        /// The nodes that ran, a node once for each of its tasks.
        nodes: Vec<String>,
        /// Objects of channels.
        updates: Vec<Value>,
    },
    /// An attempt of a task begins (or waits for its turn, if not all may run at once).
    TaskStarted {
        /// The task, by its path in the step.
        task: String,
        /// Its node.
        node: String,
        /// Which attempt it is, from 1.
        attempt: u32,
        /// Why it runs.
        trigger: Trigger,
    },
    /// An attempt of a task is over.
    TaskFinished {
        /// The task, by its path in the step.
        task: String,
        /// Its node.
        node: String,
        /// Which attempt it was, from 1.
        attempt: u32,
        /// What came of it.
        result: TaskResult,
    },
    /// A checkpoint was written.
    Checkpoint(CheckpointInfo),
    /// Whatever a node sends.
    Custom {
        /// The task, by its path in the step.
        task: String,
        /// The node.
        node: String,
        /// What it sent.
        payload: Value,
    },
    /// A part of a message that a node passes on while it comes in.
    Message {
        /// The task, by its path in the step.
        task: String,
        /// The node.
        node: String,
        /// The part.
        chunk: MessageChunk,
    },
    /// The thread waits: for an answer, a signal, a child, a time. Of every mode.
    Suspended {
        /// What it waits for.
        waits: Vec<WaitRecord>,
    },
    /// The thread has ended; nothing follows. Of every mode.
    Ended(ThreadStatus),
    /// The reader was too slow and missed so many items of its modes. Of what was read back from the database: so many steps,
    /// whose checkpoints are not there any more. Of every mode.
    Missed(u64),
}

/// Why a task runs.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Trigger {
    /// An edge, a join, a condition or a command led to its node.
    Edge,
    /// A [`Send`](crate::Send), with this argument.
    Send(Value),
}

/// What came of an attempt of a task.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum TaskResult {
    /// It is done.
    Done {
        /// Whether it had been done earlier and was not run again.
        cached: bool,
    },
    /// It waits.
    Suspended {
        /// The names of what it waits for.
        waits: Vec<String>,
    },
    /// It failed.
    Failed {
        /// Why.
        error: String,
        /// Whether the step goes on: with another attempt, at once or when a timer fires; or with the node's error handler.
        again: bool,
    },
    /// It was stopped, because the thread is being cancelled.
    Cancelled,
}

/// A part of a message, such as a few words of a model's answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MessageChunk {
    /// The message that it is a part of; the parts with the same id, one after the other, are the message.
    pub id: String,
    /// Who speaks, such as `assistant`.
    pub role: String,
    /// What is added: a text, or whatever else messages of this role are made of.
    pub delta: Value,
}

impl MessageChunk {
    /// A part of a message.
    pub fn new(id: impl Into<String>, role: impl Into<String>, delta: impl Into<Value>) -> Self {
        Self {
            id: id.into(),
            role: role.into(),
            delta: delta.into(),
        }
    }
}

impl StreamKind {
    /// The modes in which it is told.
    fn modes(&self) -> Modes {
        match self {
            Self::Values(_) => Modes::VALUES,
            Self::Updates { .. } | Self::StepUpdates { .. } => Modes::UPDATES,
            Self::TaskStarted { .. } | Self::TaskFinished { .. } => Modes::TASKS,
            Self::Checkpoint(_) => Modes::CHECKPOINTS,
            Self::Custom { .. } => Modes::CUSTOM,
            Self::Message { .. } => Modes::MESSAGES,
            Self::Suspended { .. } | Self::Ended(_) | Self::Missed(_) => Modes::ALL,
        }
    }
}
