//! Events as lines: for people, and as JSON for programs.

use jiff::Timestamp;
use ports::{
    Answer, CheckStatus, DeploymentStatus, Event, JobStatus, OpenWait, Recorded, ReviewVerdict,
    WaitRecord,
};
use serde::Serialize;
use serde_json::Value;

/// An event as `--json` prints it.
#[derive(Debug, Serialize)]
pub struct EventLine<'a> {
    /// When, by the database's clock.
    pub at: Timestamp,
    /// The project.
    pub project: &'a str,
    /// The job, when it is about one.
    pub job: Option<&'a str>,
    /// The task, when it is about one.
    pub task: Option<&'a str>,
    /// Its number in the project's stream, from 1, without gaps.
    pub seq: u64,
    /// Its name, such as `task.merged`.
    pub event: &'a str,
    /// What happened.
    pub data: Value,
}

impl<'a> EventLine<'a> {
    /// The line of an event.
    pub fn new(recorded: &'a Recorded, seq: u64, at: Timestamp) -> Self {
        let data = serde_json::to_value(&recorded.event)
            .ok()
            .and_then(|mut value| value.get_mut("data").map(Value::take))
            .unwrap_or_default();
        Self {
            at,
            project: recorded.project.as_str(),
            job: recorded.job.as_ref().map(ports::JobId::as_str),
            task: recorded.task.as_ref().map(ports::TaskId::as_str),
            seq,
            event: recorded.event.name(),
            data,
        }
    }
}

/// How a command that does work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EndStatus {
    /// What was wanted runs.
    Deployed,
    /// A question was answered.
    Answered,
    /// A person has to decide.
    Waiting,
    /// It did not work.
    Failed,
    /// Somebody stopped it.
    Cancelled,
}

/// The last line of a command that does work.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct End {
    /// Always `end`.
    pub event: &'static str,
    /// The project.
    pub project: Option<String>,
    /// How it ended.
    pub status: EndStatus,
    /// Where the project answers.
    pub url: Option<String>,
    /// What waits, when something does.
    pub wait: Option<WaitRecord>,
    /// What went wrong.
    pub error: Option<EndError>,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndError {
    /// A stable name.
    pub code: String,
    /// What happened.
    pub message: String,
    /// What to do.
    pub action: String,
}

impl End {
    /// An end with nothing more to say.
    pub fn new(project: Option<&str>, status: EndStatus) -> Self {
        Self {
            event: "end",
            project: project.map(str::to_owned),
            status,
            url: None,
            wait: None,
            error: None,
        }
    }

    /// The exit code that says the same: 0, 1 failed, 3 waits for a person.
    pub fn exit_code(&self) -> u8 {
        match self.status {
            EndStatus::Deployed | EndStatus::Answered => 0,
            EndStatus::Failed | EndStatus::Cancelled => 1,
            EndStatus::Waiting => 3,
        }
    }
}

/// A wait as the record has it.
pub fn wait_record(wait: &OpenWait) -> WaitRecord {
    WaitRecord {
        id: wait.id.to_string(),
        kind: serde_json::to_value(wait.kind)
            .ok()
            .and_then(|kind| kind.as_str().map(str::to_owned))
            .unwrap_or_default(),
        question: wait.question.clone(),
        options: wait
            .options
            .iter()
            .map(|option| option.value.clone())
            .collect(),
    }
}

/// An answer that a person at this terminal gave.
pub fn typed_answer(choice: Option<&str>, text: &str, by: &ports::PersonId) -> Answer {
    Answer {
        choice: choice.map(str::to_owned),
        text: text.to_owned(),
        by: by.to_string(),
    }
}

/// The event in a line for people, whatever others put into it; `None` for what only programs want to know.
pub fn for_people(recorded: &Recorded) -> Option<String> {
    words(recorded).map(|words| ports::plain(&words))
}

fn words(recorded: &Recorded) -> Option<String> {
    let task = recorded.task.as_ref().map_or("", |task| task.as_str());
    let short = |sha: &ports::Sha| sha.as_str().chars().take(8).collect::<String>();
    Some(match &recorded.event {
        Event::Said { text, .. } => text.clone(),
        Event::SpecApproved { spec, by, .. } => {
            format!("specification of {} approved by {by}", spec.name)
        }
        Event::WaitOpened { wait, .. } => {
            let options: Vec<_> = wait
                .options
                .iter()
                .map(|option| option.value.as_str())
                .collect();
            format!(
                "waits for you: {}\n  ({}) {}",
                wait.question,
                wait.id,
                options.join(" | ")
            )
        }
        Event::JobStarted { work, .. } => {
            format!("{} started: {}", recorded.job.as_ref()?, work.title())
        }
        Event::JobNode { node } => format!("{}: {node}", recorded.job.as_ref()?),
        Event::PortAllocated { port } => format!("port {port} allocated"),
        Event::SecretGranted { name } => format!("secret {name} granted"),
        Event::RepositoryCreated { location } => format!("repository created: {location}"),
        Event::PlanMade { tasks, .. } => {
            let names: Vec<_> = tasks
                .iter()
                .map(|task| {
                    let after: Vec<_> = task.depends_on.iter().map(ports::TaskId::as_str).collect();
                    if after.is_empty() {
                        task.id.to_string()
                    } else {
                        format!("{} (after {})", task.id, after.join(", "))
                    }
                })
                .collect();
            format!("plan: {}", names.join(", "))
        }
        Event::TaskAttempt { attempt, .. } => format!("{task}: worker started (attempt {attempt})"),
        Event::TaskWorked {
            status,
            head,
            failure,
            ..
        } => match (head, failure) {
            (_, Some(failure)) => format!("{task}: worker {status}: {}", failure.message),
            (Some(head), None) => format!("{task}: worker {status} at {}", short(head)),
            (None, None) => format!("{task}: worker {status}"),
        },
        Event::PullRequestOpened { number, head, .. } => {
            format!("{task}: pull request #{number} at {}", short(head))
        }
        Event::TaskChecked { sha, status, .. } => match status {
            CheckStatus::Passed => format!("{task}: checks passed at {}", short(sha)),
            CheckStatus::Failed => format!("{task}: checks failed at {}", short(sha)),
            CheckStatus::TimedOut => format!("{task}: checks did not end at {}", short(sha)),
        },
        Event::TaskReviewed {
            round,
            verdict,
            comments,
        } => match verdict {
            ReviewVerdict::Approve => format!("{task}: review {round}: approved"),
            ReviewVerdict::SendBack => {
                format!("{task}: review {round}: sent back: {}", comments.join("; "))
            }
        },
        Event::TaskMerged { number, sha } => {
            format!("{task}: pull request #{number} merged as {}", short(sha))
        }
        Event::TaskEnded { status, failure } => match failure {
            Some(failure) => format!("{task}: {status}: {}", failure.message),
            None => format!("{task}: {status}"),
        },
        Event::DeployStarted { sha } => format!("deploying {}", short(sha)),
        Event::DeployEnded { deployment } => {
            let passed = deployment
                .checks
                .iter()
                .filter(|check| check.status == CheckStatus::Passed)
                .count();
            let mut checks = format!("{passed} of {} checks passed", deployment.checks.len());
            let failed = deployment
                .checks
                .iter()
                .find(|check| check.status != CheckStatus::Passed);
            if let Some(failed) = failed {
                let why = failed.detail.lines().next().unwrap_or_default();
                checks = format!(
                    "{checks}; {}: {}",
                    failed.name,
                    why.trim_end_matches("; its last lines:")
                );
            }
            match deployment.status {
                DeploymentStatus::Live => {
                    format!(
                        "release {} is live at {}: {checks}",
                        deployment.release, deployment.url
                    )
                }
                DeploymentStatus::RolledBack => {
                    format!(
                        "release {} failed and was rolled back: {checks}",
                        deployment.release
                    )
                }
                _ => format!("release {} failed: {checks}", deployment.release),
            }
        }
        Event::JobEnded {
            status,
            url,
            failure,
        } => match (status, url, failure) {
            (JobStatus::Deployed, Some(url), _) => {
                format!("{} deployed {url}", recorded.job.as_ref()?)
            }
            (JobStatus::Cancelled, ..) => format!("{} cancelled", recorded.job.as_ref()?),
            (_, _, Some(failure)) => {
                format!("{} failed: {}", recorded.job.as_ref()?, failure.message)
            }
            _ => format!("{} ended", recorded.job.as_ref()?),
        },
        Event::ServiceChanged { status, by } => format!("service {status} by {by}"),
        Event::BudgetRaised { by, .. } => format!("budget raised by {by}"),
        Event::AdminNotice { text, .. } => format!("for admins: {text}"),
        Event::ProjectFounded { .. }
        | Event::MessageReceived { .. }
        | Event::WaitClosed { .. }
        | Event::JobSteered { .. }
        | Event::SecretResolved { .. }
        | Event::TaskStarted { .. }
        | Event::ModelUsed { .. } => return None,
    })
}
