//! What became of a job.

use crate::{DecodeError, SpawnRequest, VERSION};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How one attempt of one task ended. Version 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerResult {
    /// Version of the message: 1.
    pub version: u32,
    /// The request that this answers.
    pub request_id: String,
    /// The task.
    pub task_id: String,
    /// The attempt.
    pub attempt: u32,
    /// The request's token, echoed.
    pub fencing_token: u64,
    /// How it ended.
    pub status: ResultStatus,
    /// The branch that carries the work.
    pub branch: String,
    /// The commit at the branch's tip, checked in the repository; none when nothing was pushed.
    #[serde(default)]
    pub head_sha: Option<String>,
    /// What the agent says it did, in Markdown.
    #[serde(default)]
    pub summary_markdown: String,
    /// What was checked, and how it went.
    #[serde(default)]
    pub checks: Vec<Check>,
    /// What was used up.
    pub usage: Usage,
    /// Why it did not succeed; none when it did.
    #[serde(default)]
    pub failure: Option<Failure>,
    /// When the spawner took the job up.
    pub started_at: Timestamp,
    /// When it was over.
    pub finished_at: Timestamp,
}

/// The ways in which an attempt ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResultStatus {
    /// A commit is on the branch.
    Succeeded,
    /// It did not work out; `failure` says why.
    Failed,
    /// The agent cannot go on without somebody's help.
    Blocked,
    /// The crew cancelled it.
    Cancelled,
    /// A time limit was reached.
    TimedOut,
    /// The worker is gone and nobody knows more.
    Lost,
}

impl ResultStatus {
    /// The name on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Blocked => "blocked",
            Self::Cancelled => "cancelled",
            Self::TimedOut => "timed_out",
            Self::Lost => "lost",
        }
    }
}

/// One thing that was checked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// What was checked.
    pub name: String,
    /// How it went.
    pub status: CheckStatus,
    /// Evidence, or nothing.
    #[serde(default)]
    pub detail: String,
}

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// It holds.
    Passed,
    /// It does not hold.
    Failed,
    /// It was not looked at.
    Skipped,
}

/// What an attempt used up.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Usage {
    /// Tokens that went to models.
    pub input_tokens: u64,
    /// Tokens that came from models.
    pub output_tokens: u64,
    /// US dollars; none when no price is known.
    #[serde(default)]
    pub cost_usd: Option<f64>,
    /// Wall clock, in seconds.
    pub wall_s: f64,
    /// Processor time, in seconds; 0 when the sandbox cannot tell.
    #[serde(default)]
    pub cpu_s: f64,
    /// Highest memory use, in MiB; 0 when the sandbox cannot tell.
    #[serde(default)]
    pub peak_memory_mb: u64,
}

/// Why an attempt did not succeed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// A stable word to branch on: `no_commit`, `agent_failed`, `limit_wall`, …
    pub kind: String,
    /// One sentence for a person: what happened and what to do.
    pub message: String,
    /// What it is concluded from: exit status, output tail, Git's words.
    #[serde(default)]
    pub evidence: String,
}

impl WorkerResult {
    /// A result for `request` that says how it ended and nothing else yet.
    pub fn of(request: &SpawnRequest, status: ResultStatus, started_at: Timestamp) -> Self {
        Self {
            version: VERSION,
            request_id: request.request_id.clone(),
            task_id: request.task_id.clone(),
            attempt: request.attempt,
            fencing_token: request.fencing_token,
            status,
            branch: request.repository.branch.clone(),
            head_sha: None,
            summary_markdown: String::new(),
            checks: Vec::new(),
            usage: Usage::default(),
            failure: None,
            started_at,
            finished_at: Timestamp::now(),
        }
    }

    /// Checks what the types cannot say.
    pub fn validate(&self) -> Result<(), DecodeError> {
        if self.version != VERSION {
            return Err(DecodeError::Version {
                found: self.version.into(),
                supported: VERSION,
            });
        }
        crate::request::check_request_id(&self.request_id)?;
        if self.status == ResultStatus::Succeeded && self.head_sha.is_none() {
            return Err(DecodeError::invalid(
                "head_sha",
                "a success must name its commit",
            ));
        }
        if self.status != ResultStatus::Succeeded && self.failure.is_none() {
            return Err(DecodeError::invalid(
                "failure",
                "an attempt that did not succeed must say why",
            ));
        }
        Ok(())
    }
}
