//! The record: what `/status` shows and what the conversation answers questions from. A projection of the journal.

use async_trait::async_trait;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{JobId, ProjectId, Result, Sha, TaskId};

/// Everything that is known of a project: the object that `artel status PROJECT --json` prints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StatusReport {
    /// The project.
    pub project: ProjectRecord,
    /// Its running job, or else its last.
    pub job: Option<JobRecord>,
    /// The tasks of that job, in the plan's order.
    pub tasks: Vec<TaskRecord>,
    /// What waits for a person.
    pub waits: Vec<WaitRecord>,
    /// Releases, newest first.
    pub deployments: Vec<DeploymentRecord>,
}

/// A project.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct ProjectRecord {
    /// Its id.
    pub id: ProjectId,
    /// Its short name in commands and URLs, unique; the id until a specification named it.
    pub slug: String,
    /// Its name for people.
    pub name: String,
    /// `draft`, `building`, `deployed`, `failed`, `stopped`, `waiting`, `archived`, …
    pub status: String,
    /// Where it answers.
    pub url: Option<String>,
    /// Where its code is.
    pub repository: Option<String>,
    /// US dollars spent, where prices are known; `None` when none is.
    pub cost_usd: Option<f64>,
    /// Tokens spent.
    pub tokens: u64,
}

/// A job.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct JobRecord {
    /// Its id within the project.
    pub id: JobId,
    /// `running`, `waiting`, `deployed`, `failed`, `cancelled`.
    pub status: String,
    /// The node it is at.
    pub node: Option<String>,
}

/// A task.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct TaskRecord {
    /// Its id within the job.
    pub id: TaskId,
    /// Its title.
    pub title: String,
    /// `planned`, `working`, `checking`, `reviewing`, `merging`, `merged`, `waiting`, `failed`, `cancelled`.
    pub status: String,
    /// Workers that were started for it.
    pub attempts: u32,
    /// Reviews that it had.
    pub review_rounds: u32,
    /// Its pull request.
    pub pull_request: Option<PullRequestRecord>,
    /// Tasks that had to be merged before.
    pub depends_on: Vec<TaskId>,
    /// US dollars spent on it; `None` when no price is known.
    pub cost_usd: Option<f64>,
    /// Where its worker is, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<WorkerRecord>,
}

/// A worker that a task waits for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WorkerRecord {
    /// What it is doing: `waiting for a spawner`, `queued`, `cloning`, `starting`, `running: step 3`, `pushing`, ….
    pub phase: String,
    /// Since when.
    #[schemars(with = "String")]
    pub since: jiff::Timestamp,
    /// When the crew gives it up at the latest.
    #[schemars(with = "String")]
    pub until: jiff::Timestamp,
    /// Who runs it.
    pub spawner: Option<String>,
}

impl WorkerRecord {
    /// What it is doing and for how long, as of `now`.
    pub fn in_words(&self, now: jiff::Timestamp) -> String {
        let seconds = now.duration_since(self.since).as_secs().max(0);
        let left = self.until.duration_since(now).as_secs().max(0);
        format!(
            "{} for {} (given up in {})",
            self.phase,
            roughly(seconds),
            roughly(left)
        )
    }
}

/// A time of so many seconds, for people.
fn roughly(seconds: i64) -> String {
    match seconds {
        ..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        _ => format!("{} h", seconds / 3600),
    }
}

/// A pull request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PullRequestRecord {
    /// Its number.
    pub number: u64,
    /// `open`, `merged`, `closed`.
    pub status: String,
    /// Where people find it.
    pub url: String,
}

/// A wait for a person.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct WaitRecord {
    /// Its opaque id, as `artel approve` takes it.
    pub id: String,
    /// Its kind, as `WaitKind` is written.
    pub kind: String,
    /// The question.
    pub question: String,
    /// The values that can be chosen.
    pub options: Vec<String>,
}

/// A release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DeploymentRecord {
    /// Its number.
    pub release: u64,
    /// Its commit.
    pub sha: Sha,
    /// Its status, as `DeploymentStatus` is written.
    pub status: String,
    /// Where it answers or answered.
    pub url: String,
    /// When it was deployed.
    #[schemars(with = "String")]
    pub at: jiff::Timestamp,
}

/// Reads the record.
#[async_trait]
pub trait Record: Send + Sync {
    /// Everything that is known of a project.
    async fn status(&self, project: &ProjectId) -> Result<Option<StatusReport>>;

    /// A slug for a new project made from `wanted`: itself, or with a number when another project has it.
    async fn free_slug(&self, project: &ProjectId, wanted: &crate::Slug) -> Result<crate::Slug>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_told_with_its_phase_how_long_and_its_end() {
        let at = |seconds| jiff::Timestamp::from_second(seconds).unwrap();
        let worker = WorkerRecord {
            phase: "running: step 3".to_owned(),
            since: at(1_000),
            until: at(10_000),
            spawner: None,
        };
        assert_eq!(
            worker.in_words(at(1_042)),
            "running: step 3 for 42 s (given up in 2 h)"
        );
        assert_eq!(
            worker.in_words(at(9_990)),
            "running: step 3 for 2 h (given up in 10 s)"
        );
        // A spawner's clock may be a little ahead.
        assert!(worker.in_words(at(990)).contains("for 0 s"));
    }
}
