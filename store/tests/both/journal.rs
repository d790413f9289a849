//! A journal to project: entries as the crew and the engine write them.

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use ports::{
    AcceptanceCheck, Audience, ChangeRequest, Check, CheckResult, CheckStatus, Choice, Deployment,
    DeploymentStatus, Event, Failure, HttpExpectation, JobKind, JobStatus, NoticeSeverity,
    OpenWait, ProjectId, ProjectSpec, Recorded, ReviewVerdict, Role, SaidKind, Spend, TaskSummary,
    Usage, WaitKind,
};
use serde_json::{Value, json};
use store::{JournalEntry, JournalSource};

pub const P: &str = "paaaaaaaaaa";

#[derive(Clone, Default)]
pub struct Journal {
    pub entries: Vec<JournalEntry>,
    numbers: BTreeMap<String, i64>,
    cursor: i64,
    /// What the next events are about.
    pub project: String,
    pub job: Option<String>,
    pub task: Option<String>,
}

#[async_trait]
impl JournalSource for Journal {
    async fn read(&self, after: i64, limit: usize) -> Result<Vec<JournalEntry>, String> {
        Ok(self
            .entries
            .iter()
            .filter(|entry| entry.cursor > after)
            .take(limit)
            .cloned()
            .collect())
    }
}

impl Journal {
    pub fn new() -> Self {
        Self {
            project: P.to_owned(),
            ..Self::default()
        }
    }

    pub fn about(&mut self, project: &str, job: Option<&str>, task: Option<&str>) -> &mut Self {
        project.clone_into(&mut self.project);
        self.job = job.map(str::to_owned);
        self.task = task.map(str::to_owned);
        self
    }

    pub fn entry(&mut self, stream: &str, name: &str, payload: Value) -> &mut Self {
        // Cursors have gaps, as a sequence of a database has.
        self.cursor += 1 + i64::from(self.cursor % 5 == 0);
        let number = self.numbers.entry(stream.to_owned()).or_insert(0);
        *number += 1;
        let start: Timestamp = "2026-03-01T10:00:00Z".parse().unwrap();
        self.entries.push(JournalEntry {
            cursor: self.cursor,
            stream: stream.to_owned(),
            number: *number,
            name: name.to_owned(),
            payload,
            at: start + SignedDuration::from_millis(self.cursor * 1250),
        });
        self
    }

    pub fn say(&mut self, event: Event) -> &mut Self {
        let recorded = Recorded {
            project: self.project.as_str().into(),
            job: self.job.as_deref().map(Into::into),
            task: self.task.as_deref().map(Into::into),
            event,
        };
        let name = recorded.event.name();
        let stream = recorded.stream().to_owned();
        self.entry(&stream, name, serde_json::to_value(&recorded).unwrap())
    }

    pub fn last(&self) -> i64 {
        self.cursor
    }

    pub fn founded(&mut self) -> &mut Self {
        self.say(Event::ProjectFounded {
            owner: "telegram:7".into(),
        })
    }

    pub fn heard(&mut self, key: &str, text: &str) -> &mut Self {
        self.say(Event::MessageReceived {
            key: key.to_owned(),
            from: "telegram:7".into(),
            text: text.to_owned(),
        })
    }

    pub fn said(&mut self, key: &str, kind: SaidKind, text: &str) -> &mut Self {
        self.say(Event::Said {
            key: key.to_owned(),
            to: Audience::Owner,
            kind,
            text: text.to_owned(),
        })
    }

    pub fn asks(&mut self, id: &str, kind: WaitKind, audience: Audience) -> &mut Self {
        let thread = [Some(&self.project), self.job.as_ref(), self.task.as_ref()]
            .into_iter()
            .flatten()
            .cloned()
            .collect::<Vec<_>>()
            .join("/");
        self.say(Event::WaitOpened {
            wait: OpenWait {
                id: id.into(),
                kind,
                question: format!("Shall we? ({id})"),
                options: vec![Choice::new("approve", "Yes"), Choice::new("reject", "No")],
                free_text: true,
                audience,
            },
            thread,
            interrupt: format!("interrupt-{id}"),
        })
    }

    pub fn answered(&mut self, id: &str, answer: Option<&str>) -> &mut Self {
        self.say(Event::WaitClosed {
            wait: id.into(),
            answer: answer.map(str::to_owned),
            by: answer.map(|_| "telegram:7".to_owned()),
        })
    }

    pub fn specified(&mut self, slug: &str) -> &mut Self {
        self.say(Event::SpecApproved {
            slug: slug.to_owned(),
            spec: spec(),
            by: "telegram:7".to_owned(),
        })
    }

    pub fn job(&mut self, job: &str, work: JobKind) -> &mut Self {
        let thread = format!("{}/{job}", self.project);
        self.job = Some(job.to_owned());
        self.task = None;
        self.say(Event::JobStarted { work, thread })
    }

    pub fn node(&mut self, node: &str) -> &mut Self {
        self.say(Event::JobNode {
            node: node.to_owned(),
        })
    }

    pub fn planned(&mut self, tasks: &[(&str, &[&str])]) -> &mut Self {
        self.say(Event::PlanMade {
            overview: "Parts".to_owned(),
            tasks: tasks
                .iter()
                .map(|(id, needs)| TaskSummary {
                    id: (*id).into(),
                    title: format!("The {id}"),
                    depends_on: needs.iter().map(|n| (*n).into()).collect(),
                })
                .collect(),
        })
    }

    pub fn task(&mut self, task: &str) -> &mut Self {
        self.task = Some(task.to_owned());
        let thread = format!("{}/{}/{task}", self.project, self.job.clone().unwrap());
        self.say(Event::TaskStarted { thread })
    }

    pub fn on(&mut self, task: Option<&str>) -> &mut Self {
        self.task = task.map(str::to_owned);
        self
    }

    pub fn attempt(&mut self, attempt: u32) -> &mut Self {
        let request = format!("{}-{attempt}", self.task.clone().unwrap());
        self.say(Event::TaskAttempt {
            attempt,
            request: request.as_str().into(),
        })
        .say(Event::TaskWorked {
            request: request.as_str().into(),
            status: "succeeded".to_owned(),
            head: Some("abc".into()),
            summary: "did it".to_owned(),
            failure: None,
        })
    }

    pub fn pull_request(&mut self, number: u64, head: &str) -> &mut Self {
        self.say(Event::PullRequestOpened {
            number,
            url: format!("repo/pull/{number}"),
            head: head.into(),
        })
    }

    pub fn checked(&mut self, status: CheckStatus) -> &mut Self {
        self.say(Event::TaskChecked {
            sha: "abc".into(),
            status,
            detail: String::new(),
        })
    }

    pub fn reviewed(&mut self, round: u32, verdict: ReviewVerdict) -> &mut Self {
        self.say(Event::TaskReviewed {
            round,
            verdict,
            comments: vec!["a word".to_owned()],
        })
    }

    pub fn merged(&mut self, number: u64) -> &mut Self {
        self.say(Event::TaskMerged {
            number,
            sha: format!("merge{number}").as_str().into(),
        })
    }

    pub fn whole_task(&mut self, task: &str, number: u64) -> &mut Self {
        self.task(task)
            .attempt(1)
            .pull_request(number, "h1")
            .checked(CheckStatus::Passed)
            .reviewed(1, ReviewVerdict::Approve)
            .merged(number)
            .on(None)
    }

    pub fn deployed(&mut self, release: u64, status: DeploymentStatus) -> &mut Self {
        let live_release =
            (status == DeploymentStatus::RolledBack).then(|| release.saturating_sub(1));
        self.say(Event::DeployStarted {
            sha: format!("sha{release}").as_str().into(),
        })
        .say(Event::DeployEnded {
            deployment: Deployment {
                release,
                sha: format!("sha{release}").as_str().into(),
                status,
                url: "http://127.0.0.1:20000/".to_owned(),
                checks: vec![CheckResult {
                    name: "health".to_owned(),
                    status: CheckStatus::Passed,
                    detail: String::new(),
                }],
                live_release,
            },
        })
    }

    pub fn ended(&mut self, status: JobStatus) -> &mut Self {
        self.task = None;
        let deployed = status == JobStatus::Deployed;
        self.say(Event::JobEnded {
            status,
            url: deployed.then(|| "http://127.0.0.1:20000/".to_owned()),
            failure: (!deployed).then(|| Failure::new("broken", "it broke")),
        })
    }

    pub fn spent(&mut self, id: &str, role: Role, cost_usd: Option<f64>) -> &mut Self {
        let spend = Spend {
            id: id.to_owned(),
            project: ProjectId::new(self.project.clone()),
            job: self.job.as_deref().map(Into::into),
            task: self.task.as_deref().map(Into::into),
            role,
            model: "m1".to_owned(),
            usage: Usage {
                input_tokens: 100,
                output_tokens: 11,
                cost_usd,
            },
        };
        self.say(Event::ModelUsed { spend })
    }

    pub fn notice(&mut self, fingerprint: &str, text: &str) -> &mut Self {
        self.say(Event::AdminNotice {
            severity: NoticeSeverity::Warning,
            fingerprint: fingerprint.to_owned(),
            text: text.to_owned(),
        })
    }

    pub fn service(&mut self, status: &str) -> &mut Self {
        self.say(Event::ServiceChanged {
            status: status.to_owned(),
            by: "telegram:7".to_owned(),
        })
    }

    /// A project from its first message over two jobs, a second project that never comes to anything, and what goes wrong
    /// on the way.
    pub fn whole_life() -> Self {
        let mut j = Self::new();
        j.spent("s0", Role::Brainstorm, Some(0.01)) // before the commit that founds the project
            .founded()
            .heard("telegram:1", "a notes service\0 please")
            .asks("w1", WaitKind::Clarify, Audience::Owner)
            .answered("w1", Some("approve"))
            .said("r1", SaidKind::Reply, "Good, I wrote it down.")
            .asks("w2", WaitKind::Spec, Audience::Owner)
            .answered("w2", Some("approve"))
            .specified("notes")
            .job("job-1", JobKind::New { spec: spec() })
            .node("zavhoz")
            .say(Event::PortAllocated { port: 20000 })
            .say(Event::SecretGranted {
                name: "KEY".to_owned(),
            })
            .say(Event::RepositoryCreated {
                location: "/repos/notes.git".to_owned(),
            })
            .node("architect")
            .planned(&[("a", &[]), ("b", &[]), ("c", &["a"]), ("d", &["b", "c"])])
            .node("developers")
            .task("a")
            .spent("s1", Role::Developer, Some(0.25))
            .spent("s1", Role::Developer, Some(0.25))
            .attempt(1)
            .pull_request(1, "h1")
            .task("b")
            .attempt(1)
            .pull_request(2, "h2")
            .checked(CheckStatus::Failed)
            .attempt(2)
            .pull_request(2, "h3")
            .on(Some("a"))
            .checked(CheckStatus::Passed)
            .reviewed(1, ReviewVerdict::SendBack)
            .attempt(2)
            .checked(CheckStatus::Passed)
            .reviewed(2, ReviewVerdict::Approve)
            .merged(1)
            .on(Some("b"))
            .spent("s2", Role::Reviewer, None)
            .checked(CheckStatus::Passed)
            .reviewed(1, ReviewVerdict::Approve)
            .pull_request(2, "h4")
            .checked(CheckStatus::Passed)
            .merged(2)
            .whole_task("c", 3)
            .task("d")
            .asks("w3", WaitKind::Help, Audience::Owner)
            .answered("w3", Some("go on"))
            .whole_task("d", 4)
            .node("devops")
            .deployed(1, DeploymentStatus::Live)
            .ended(JobStatus::Deployed);
        j.entry(&format!("{P}/job-1"), "thread.done", json!({}));
        j.about(P, None, None)
            .said("r2", SaidKind::Result, "It runs.")
            .heard("telegram:2", "search, too")
            .say(Event::JobSteered {
                text: "faster".to_owned(),
                by: "telegram:7".into(),
            })
            .job(
                "job-2",
                JobKind::Change {
                    change: ChangeRequest {
                        title: "Search".to_owned(),
                        description: "in notes".to_owned(),
                        acceptance: vec![],
                        needs: vec![],
                        breaking: false,
                    },
                },
            )
            .planned(&[("x", &[]), ("y", &[])])
            .planned(&[("x", &[])])
            .asks("w4", WaitKind::Budget, Audience::Admins)
            .answered("w4", Some("approve"))
            .say(Event::BudgetRaised {
                limit_usd: Some(5.0),
                limit_tokens: None,
                by: "telegram:1".to_owned(),
            })
            .whole_task("x", 5)
            .deployed(2, DeploymentStatus::RolledBack)
            .notice("deploy", "release 2 failed")
            .notice("deploy", "release 2 failed again")
            .deployed(3, DeploymentStatus::Live)
            .ended(JobStatus::Deployed)
            .about(P, None, None)
            .service("stopped")
            .service("started");
        // A second project wants the same name; its task is lost and its job is cancelled.
        j.about("pbbbbbbbbbb", None, None)
            .founded()
            .specified("notes")
            .job("job-1", JobKind::New { spec: spec() })
            .planned(&[("a", &[]), ("b", &[])])
            .task("a")
            .pull_request(1, "h1")
            .on(None);
        j.entry(
            "pbbbbbbbbbb/job-1/a",
            "thread.failed",
            json!({"error": "no space left"}),
        );
        j.task("b").asks("w5", WaitKind::Help, Audience::Owner);
        j.entry(
            "pbbbbbbbbbb/job-1",
            "thread.cancelled",
            json!({"reason": "asked to"}),
        );
        j.entry("pbbbbbbbbbb", "something.new", json!({"what": 1}));
        j
    }
}

pub fn spec() -> ProjectSpec {
    ProjectSpec {
        name: "Notes service".to_owned(),
        goal: "Keeps notes.".to_owned(),
        features: vec!["notes".to_owned()],
        acceptance: vec![AcceptanceCheck {
            name: "health".to_owned(),
            check: Check::Http {
                method: "GET".to_owned(),
                path: "/health".to_owned(),
                headers: BTreeMap::default(),
                body: None,
                expect: HttpExpectation {
                    status: 200,
                    body_contains: vec![],
                    json: None,
                },
            },
        }],
        needs: vec![],
        kind: "http_service".to_owned(),
        risks: vec![],
    }
}
