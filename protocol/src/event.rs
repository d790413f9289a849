//! What is said while a job runs. Events are for watching: nothing may depend on having seen one.

use crate::{Usage, VERSION};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One thing that happened while a job ran. Version 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerEvent {
    /// Version of the message: 1.
    pub version: u32,
    /// The request.
    pub request_id: String,
    /// The task.
    pub task_id: String,
    /// The attempt.
    pub attempt: u32,
    /// Grows by one with every event of one run of the request.
    pub seq: u64,
    /// When it happened.
    pub at: Timestamp,
    /// What happened.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// The kinds of events.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// A spawner took the job up.
    Started {
        /// Name of the spawner.
        spawner: String,
    },
    /// The job entered a phase: `queued`, `cloning`, `starting`, `running: step 3`, `pushing`.
    Phase {
        /// Name of the phase.
        name: String,
    },
    /// The agent says what it is doing.
    Progress {
        /// One line.
        text: String,
        /// The agent's step, from 1, when it counts them.
        #[serde(default)]
        step: Option<u32>,
    },
    /// The end of the worker's output.
    Log {
        /// The last lines.
        tail: String,
    },
    /// What has been used up so far.
    Usage {
        /// The sums since the attempt began.
        usage: Usage,
    },
    /// The broker's proxy refused a connection.
    Refused {
        /// Host and port that were asked for.
        host: String,
        /// Why it was refused.
        reason: String,
    },
}

impl WorkerEvent {
    /// An event of `request`, now.
    pub fn new(request: &crate::SpawnRequest, seq: u64, kind: EventKind) -> Self {
        Self {
            version: VERSION,
            request_id: request.request_id.clone(),
            task_id: request.task_id.clone(),
            attempt: request.attempt,
            seq,
            at: Timestamp::now(),
            kind,
        }
    }
}
