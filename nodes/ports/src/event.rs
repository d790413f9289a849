//! The events of the journal. Everything that is read or said is made from them, so they are the one place where the
//! product's history is written down.
//!
//! In the journal an event stands in the stream of its project, under its [name](Event::name), with a [`Recorded`] as
//! payload. Fields may be added with `#[serde(default)]`; names and meanings stay, because journals outlive programs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    ChangeRequest, CheckStatus, Deployment, Failure, JobId, OpenWait, PersonId, ProjectId,
    ProjectSpec, RequestId, Sha, Spend, TaskId, WaitId,
};

/// An event with what it is about: the payload in the journal.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Recorded {
    /// The project.
    pub project: ProjectId,
    /// The job, when it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobId>,
    /// The task, when it is about one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub task: Option<TaskId>,
    /// What happened.
    #[serde(flatten)]
    pub event: Event,
}

/// Who something is said to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Audience {
    /// The people of the project, where they talk about it.
    Owner,
    /// The admins of this installation.
    Admins,
}

/// What kind of message something is, so that front ends can show it fittingly.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum SaidKind {
    /// An answer to what somebody said.
    Reply,
    /// Something that happened and that people want to know.
    News,
    /// The end of a job: its result, with the URL.
    Result,
    /// The crew could not do what a message asked for; it says why and what to do.
    Trouble,
}

/// How pressing a notice to admins is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum NoticeSeverity {
    /// Good to know.
    Info,
    /// Somebody should look at it.
    Warning,
    /// People are affected now.
    Critical,
}

/// What a job is about.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum JobKind {
    /// The first job of a project.
    New {
        /// What it is to be.
        spec: ProjectSpec,
    },
    /// A change to a project that exists.
    Change {
        /// What is to change.
        change: ChangeRequest,
    },
    /// Deploying what is merged, once more.
    Redeploy,
}

impl JobKind {
    /// A line for people.
    pub fn title(&self) -> &str {
        match self {
            Self::New { spec } => &spec.name,
            Self::Change { change } => &change.title,
            Self::Redeploy => "Deploy again",
        }
    }
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// What was wanted runs.
    Deployed,
    /// It was given up.
    Failed,
    /// Somebody stopped it.
    Cancelled,
}

/// A reviewer's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReviewVerdict {
    /// It can be merged.
    Approve,
    /// It goes back with comments.
    SendBack,
}

/// A task as the plan names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TaskSummary {
    /// Its id.
    pub id: TaskId,
    /// Its title.
    pub title: String,
    /// What must be merged before.
    pub depends_on: Vec<TaskId>,
}

/// What can happen. Serialized as `{"event": name, "data": {…}}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", content = "data")]
pub enum Event {
    /// A first message founded a project; it is a draft until a specification is approved.
    #[serde(rename = "project.founded")]
    ProjectFounded {
        /// Who said it.
        owner: PersonId,
    },
    /// A person said something.
    #[serde(rename = "message.received")]
    MessageReceived {
        /// The message's unique key.
        key: String,
        /// Who.
        from: PersonId,
        /// What, redacted.
        text: String,
    },
    /// The crew says something to people: an intent; its delivery is kept apart.
    #[serde(rename = "message.said")]
    Said {
        /// Unique: one intent, one message.
        key: String,
        /// To whom.
        to: Audience,
        /// What kind of message.
        kind: SaidKind,
        /// The text, as Markdown.
        text: String,
    },
    /// The project has a specification, and with it a name.
    #[serde(rename = "spec.approved")]
    SpecApproved {
        /// Its short name.
        slug: String,
        /// The specification.
        spec: ProjectSpec,
        /// Who approved it.
        by: String,
    },
    /// A person is asked.
    #[serde(rename = "wait.opened")]
    WaitOpened {
        /// What is asked.
        wait: OpenWait,
        /// The thread that waits.
        thread: String,
        /// The interrupt in it.
        interrupt: String,
    },
    /// The wait is over.
    #[serde(rename = "wait.closed")]
    WaitClosed {
        /// Which one.
        wait: WaitId,
        /// What was chosen or typed, redacted; `None` when it was withdrawn.
        answer: Option<String>,
        /// Who answered.
        by: Option<String>,
    },
    /// A job began.
    #[serde(rename = "job.started")]
    JobStarted {
        /// What it is about.
        work: JobKind,
        /// Its thread.
        thread: String,
    },
    /// A job came to a node.
    #[serde(rename = "job.node")]
    JobNode {
        /// The node's name.
        node: String,
    },
    /// A job ended.
    #[serde(rename = "job.ended")]
    JobEnded {
        /// How.
        status: JobStatus,
        /// Where the project answers.
        url: Option<String>,
        /// What went wrong.
        failure: Option<Failure>,
    },
    /// Somebody steered a running job.
    #[serde(rename = "job.steered")]
    JobSteered {
        /// What they want, redacted.
        text: String,
        /// Who.
        by: PersonId,
    },
    /// The project has a port.
    #[serde(rename = "port.allocated")]
    PortAllocated {
        /// Which one.
        port: u16,
    },
    /// A secret may be used by the project's service.
    #[serde(rename = "secret.granted")]
    SecretGranted {
        /// Its name.
        name: String,
    },
    /// A secret's value was handed out.
    #[serde(rename = "secret.resolved")]
    SecretResolved {
        /// Its name.
        name: String,
        /// For what.
        purpose: String,
    },
    /// The project has a repository.
    #[serde(rename = "repository.created")]
    RepositoryCreated {
        /// Where it is.
        location: String,
    },
    /// The work is split.
    #[serde(rename = "plan.made")]
    PlanMade {
        /// How the parts fit together.
        overview: String,
        /// The tasks.
        tasks: Vec<TaskSummary>,
    },
    /// A task's thread began.
    #[serde(rename = "task.started")]
    TaskStarted {
        /// Its thread.
        thread: String,
    },
    /// A worker was asked for.
    #[serde(rename = "task.attempt")]
    TaskAttempt {
        /// The attempt, from 1.
        attempt: u32,
        /// The worker's request.
        request: RequestId,
    },
    /// A worker ended.
    #[serde(rename = "task.worked")]
    TaskWorked {
        /// The worker's request.
        request: RequestId,
        /// As `protocol::ResultStatus` is written.
        status: String,
        /// The branch's commit.
        head: Option<Sha>,
        /// What it says it did, redacted.
        summary: String,
        /// What went wrong.
        failure: Option<Failure>,
    },
    /// A pull request was opened, or its head moved.
    #[serde(rename = "task.pull_request")]
    PullRequestOpened {
        /// Its number.
        number: u64,
        /// Where people find it.
        url: String,
        /// Its commit.
        head: Sha,
    },
    /// The repository's checks ran.
    #[serde(rename = "task.checked")]
    TaskChecked {
        /// The commit.
        sha: Sha,
        /// How they ended.
        status: CheckStatus,
        /// The end of the log, when they did not pass.
        detail: String,
    },
    /// A review was made.
    #[serde(rename = "task.reviewed")]
    TaskReviewed {
        /// Which round, from 1.
        round: u32,
        /// The word.
        verdict: ReviewVerdict,
        /// What was said, a line each.
        comments: Vec<String>,
    },
    /// A task is on the default branch.
    #[serde(rename = "task.merged")]
    TaskMerged {
        /// The pull request.
        number: u64,
        /// The commit on the default branch.
        sha: Sha,
    },
    /// A task ended without a merge.
    #[serde(rename = "task.ended")]
    TaskEnded {
        /// `failed` or `cancelled`.
        status: String,
        /// What went wrong.
        failure: Option<Failure>,
    },
    /// A release is being brought up.
    #[serde(rename = "deploy.started")]
    DeployStarted {
        /// Its commit.
        sha: Sha,
    },
    /// A deploy ended: `deployment.status` says how.
    #[serde(rename = "deploy.ended")]
    DeployEnded {
        /// The release.
        deployment: Deployment,
    },
    /// The service was stopped, started or removed by a person.
    #[serde(rename = "service.changed")]
    ServiceChanged {
        /// `stopped`, `started`, `removed`, `archived`.
        status: String,
        /// Who did it.
        by: String,
    },
    /// Tokens were used. Appended at once, outside of any step.
    #[serde(rename = "model.used")]
    ModelUsed {
        /// The line of the ledger.
        spend: Spend,
    },
    /// The owner or an admin raised the budget.
    #[serde(rename = "budget.raised")]
    BudgetRaised {
        /// The new limit in US dollars.
        limit_usd: Option<f64>,
        /// The new limit in tokens.
        limit_tokens: Option<u64>,
        /// Who.
        by: String,
    },
    /// Admins must know something.
    #[serde(rename = "admin.notice")]
    AdminNotice {
        /// How pressing it is.
        severity: NoticeSeverity,
        /// What is the same in repetitions; notices with one fingerprint are folded together.
        fingerprint: String,
        /// What happened and what to do.
        text: String,
    },
}

impl Event {
    /// The event's name in the journal, such as `task.merged`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::ProjectFounded { .. } => "project.founded",
            Self::MessageReceived { .. } => "message.received",
            Self::Said { .. } => "message.said",
            Self::SpecApproved { .. } => "spec.approved",
            Self::WaitOpened { .. } => "wait.opened",
            Self::WaitClosed { .. } => "wait.closed",
            Self::JobStarted { .. } => "job.started",
            Self::JobNode { .. } => "job.node",
            Self::JobEnded { .. } => "job.ended",
            Self::JobSteered { .. } => "job.steered",
            Self::PortAllocated { .. } => "port.allocated",
            Self::SecretGranted { .. } => "secret.granted",
            Self::SecretResolved { .. } => "secret.resolved",
            Self::RepositoryCreated { .. } => "repository.created",
            Self::PlanMade { .. } => "plan.made",
            Self::TaskStarted { .. } => "task.started",
            Self::TaskAttempt { .. } => "task.attempt",
            Self::TaskWorked { .. } => "task.worked",
            Self::PullRequestOpened { .. } => "task.pull_request",
            Self::TaskChecked { .. } => "task.checked",
            Self::TaskReviewed { .. } => "task.reviewed",
            Self::TaskMerged { .. } => "task.merged",
            Self::TaskEnded { .. } => "task.ended",
            Self::DeployStarted { .. } => "deploy.started",
            Self::DeployEnded { .. } => "deploy.ended",
            Self::ServiceChanged { .. } => "service.changed",
            Self::ModelUsed { .. } => "model.used",
            Self::BudgetRaised { .. } => "budget.raised",
            Self::AdminNotice { .. } => "admin.notice",
        }
    }
}

impl Recorded {
    /// An event about the project as a whole.
    pub fn new(project: ProjectId, event: Event) -> Self {
        Self {
            project,
            job: None,
            task: None,
            event,
        }
    }

    /// The stream of the journal that it stands in.
    pub fn stream(&self) -> &str {
        self.project.as_str()
    }

    /// Reads what the journal holds; `None` when the entry is not one of the crew's events, such as the engine's own.
    pub fn from_journal(payload: &Value) -> Option<Self> {
        Self::deserialize(payload).ok()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_event_in_the_journal_names_itself() {
        let recorded = Recorded {
            project: "p1".into(),
            job: Some("job-1".into()),
            task: Some("api".into()),
            event: Event::TaskMerged {
                number: 2,
                sha: "abc".into(),
            },
        };
        let value = serde_json::to_value(&recorded).unwrap();
        assert_eq!(
            value,
            json!({"project": "p1", "job": "job-1", "task": "api", "event": "task.merged", "data": {"number": 2, "sha": "abc"}})
        );
        assert_eq!(value["event"], recorded.event.name());
        assert_eq!(Recorded::from_journal(&value), Some(recorded));
        assert_eq!(Recorded::from_journal(&json!({"error": "x"})), None);
    }
}
