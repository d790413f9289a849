//! How the work is split.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::TaskId;

/// The plan of a job: a directed acyclic graph of tasks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Plan {
    /// What the parts are and how they fit together, in a paragraph.
    pub overview: String,
    /// The tasks, at least one.
    pub tasks: Vec<PlannedTask>,
}

/// One item of the plan, done by one developer on one branch and merged by one pull request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PlannedTask {
    /// A slug unique in the plan, such as `storage`.
    pub id: TaskId,
    /// A line.
    pub title: String,
    /// What is to be done, with everything that a developer who sees only this and the repository must know.
    pub description: String,
    /// Files or folders that it may touch.
    #[serde(default)]
    pub scope: Vec<String>,
    /// What must hold when it is done, a line each.
    pub acceptance: Vec<String>,
    /// Tasks that must be merged before this one starts.
    #[serde(default)]
    pub depends_on: Vec<TaskId>,
}
