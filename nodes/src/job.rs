//! A job: one approved change, from its resources to its release. The wiring is at the end of this page:
//! zavhoz → architect → developers → devops, and `person` from everywhere.
//!
//! A job is a child of its conversation, and its tasks are its children.

use std::{collections::BTreeMap, sync::Arc};

use graph::{Command, CompileError, CompiledGraph, Context, END, Graph, NodeError, START, State};
use ports::{
    AcceptanceCheck, Deployment, Event, Failure, JobKind, JobStatus, Need, Plan, PlannedTask,
    ProjectSpec, Repository, SecretHandle, Sha, Slug, TaskId,
};
use serde::{Deserialize, Serialize};

use crate::{
    Crew, Policy, Scope, architect, developers, devops,
    effect::{Next, Stop},
    person::{self, Desk},
    zavhoz,
};

/// The graph's name.
pub const GRAPH: &str = "job";

/// The most wishes that a job keeps.
pub(crate) const MAX_STEERING: usize = 50;

/// The state of a job.
#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
pub struct Job {
    /// Which project, which job.
    pub scope: Scope,
    /// What it is about.
    pub work: Option<JobKind>,
    /// The project's specification, without this change.
    pub spec: Option<ProjectSpec>,
    /// The project's short name.
    pub slug: Option<Slug>,
    /// Whether deploys were approved beforehand.
    pub yes: bool,
    /// What this job may do; fixed when it starts.
    pub policy: Policy,
    /// The node that it came to last.
    pub at: String,
    /// The project's port.
    pub port: Option<u16>,
    /// How often another port had to be taken.
    pub port_changes: u32,
    /// Secrets that the service gets.
    pub secrets: Vec<SecretHandle>,
    /// The project's repository.
    pub repository: Option<Repository>,
    /// Turns that the architect has taken.
    pub turns: u32,
    /// The plan; grows by a task when a release is repaired.
    pub plan: Option<Plan>,
    /// How far each task is.
    #[channel(merge)]
    pub tasks: BTreeMap<TaskId, Progress>,
    /// What people said about how it is to be done, oldest first.
    #[channel(append)]
    pub steering: Vec<String>,
    /// Deploys that were started.
    pub deploys: u32,
    /// Failed releases that were given to a task to repair.
    pub repairs: u32,
    /// The deploy that runs.
    pub errand: Option<PendingErrand>,
    /// Whether the coming deploy was approved.
    pub deploy_approved: bool,
    /// The last deployment.
    pub deployment: Option<Deployment>,
    /// Questions to people.
    pub desk: Desk,
    /// How it ended.
    pub outcome: Option<JobOutcome>,
}

/// An errand whose outcome is awaited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingErrand {
    /// Its key, also the key of its signal.
    pub key: String,
    /// The commit that it is about.
    pub sha: Sha,
    /// How long it is waited for.
    pub until: jiff::Timestamp,
}

/// How far a task of the plan is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// The name of its thread, the last one if it was started again.
    pub child: String,
    /// How often it was started.
    pub runs: u32,
    /// Where it stands.
    pub status: TaskStatus,
    /// Why it failed.
    #[serde(default)]
    pub failure: Option<Failure>,
}

/// Where a started task stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskStatus {
    /// Its thread runs.
    Running,
    /// It is on the default branch.
    Merged,
    /// It ended without a merge.
    Failed,
}

/// How a job ended: what its thread returns.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobOutcome {
    /// How.
    pub status: JobStatus,
    /// Where the project answers.
    #[serde(default)]
    pub url: Option<String>,
    /// What is released.
    #[serde(default)]
    pub sha: Option<Sha>,
    /// What went wrong.
    #[serde(default)]
    pub failure: Option<Failure>,
}

impl Job {
    /// What it is about; a job without work was started wrongly.
    pub(crate) fn work(&self) -> Result<&JobKind, NodeError> {
        self.work.as_ref().ok_or_else(|| {
            NodeError::msg("the job was started without work: give its state `work`").fatal()
        })
    }

    /// The specification of the project.
    pub(crate) fn spec(&self) -> Result<&ProjectSpec, NodeError> {
        self.spec.as_ref().ok_or_else(|| {
            NodeError::msg("the job was started without a specification: give its state `spec`")
                .fatal()
        })
    }

    /// The tasks of the plan, in its order; none before there is one.
    pub(crate) fn planned(&self) -> Vec<PlannedTask> {
        self.plan
            .as_ref()
            .map_or_else(Vec::new, |plan| plan.tasks.clone())
    }

    /// The project's repository, which the architect opened or an earlier job made.
    pub(crate) fn repository(&self) -> Result<&Repository, Failure> {
        self.repository.as_ref().ok_or_else(|| {
            Failure::new(
                "no_repository",
                format!(
                    "project {} has no repository yet: build it before you deploy it",
                    self.scope.project
                ),
            )
        })
    }

    /// What the project needs, with what the change adds.
    pub(crate) fn needs(&self) -> Vec<Need> {
        let mut needs: Vec<Need> = self
            .spec
            .iter()
            .flat_map(|spec| spec.needs.clone())
            .collect();
        if let Some(JobKind::Change { change }) = &self.work {
            needs.extend(change.needs.iter().cloned());
        }
        needs
    }

    /// What the released service must pass: the project's checks, and those of the change.
    pub(crate) fn acceptance(&self) -> Vec<AcceptanceCheck> {
        let mut checks: Vec<AcceptanceCheck> = self
            .spec
            .iter()
            .flat_map(|spec| spec.acceptance.clone())
            .collect();
        if let Some(JobKind::Change { change }) = &self.work {
            checks.extend(change.acceptance.iter().cloned());
        }
        checks
    }

    /// Says once that the job came to a node.
    pub(crate) fn enter(&mut self, ctx: &Context, node: &str) -> Result<(), NodeError> {
        self.scope.known(ctx)?;
        if self.at != node {
            node.clone_into(&mut self.at);
            self.scope.tell(
                ctx,
                Event::JobNode {
                    node: node.to_owned(),
                },
            )?;
        }
        Ok(())
    }

    /// Ends the job.
    pub(crate) fn end(
        &mut self,
        ctx: &Context,
        status: JobStatus,
        failure: Option<Failure>,
    ) -> Result<Next, NodeError> {
        let live = (status == JobStatus::Deployed)
            .then_some(self.deployment.as_ref())
            .flatten();
        let outcome = JobOutcome {
            status,
            url: live.map(|live| live.url.clone()),
            sha: live.map(|live| live.sha.clone()),
            failure,
        };
        self.scope.tell(
            ctx,
            Event::JobEnded {
                status,
                url: outcome.url.clone(),
                failure: outcome.failure.clone(),
            },
        )?;
        self.outcome = Some(outcome);
        Ok(Next::End)
    }

    /// Ends the job because a person gave it up.
    pub(crate) fn give_up(
        &mut self,
        ctx: &Context,
        reply: &person::Reply,
    ) -> Result<Next, NodeError> {
        let failure = reply
            .failure
            .clone()
            .unwrap_or_else(|| Failure::new("given_up", "the job was given up"));
        self.end(ctx, JobStatus::Failed, Some(failure))
    }

    /// Remembers what somebody wishes.
    pub(crate) fn steer(&mut self, text: &str) {
        if self.steering.len() < MAX_STEERING && !text.trim().is_empty() {
            self.steering.push(text.to_owned());
        }
    }

    /// What changed since `before`, as an update.
    fn since(self, before: &Self) -> JobUpdate {
        let mut update = JobUpdate::default();
        crate::changed!(update, before, self; scope, work, spec, slug, yes, policy, at, port, port_changes, secrets, repository,
            turns, plan, deploys, repairs, errand, deploy_approved, deployment, desk, outcome);
        let tasks: BTreeMap<_, _> = self
            .tasks
            .into_iter()
            .filter(|(id, progress)| before.tasks.get(id) != Some(progress))
            .collect();
        if !tasks.is_empty() {
            update = update.tasks(tasks);
        }
        let wishes = self.steering[before.steering.len().min(self.steering.len())..].to_vec();
        if !wishes.is_empty() {
            update = update.steering(wishes);
        }
        update
    }
}

/// Turns what a node did into the engine's command. Trouble goes to a person, and back to the node.
fn command(
    crew: &Crew,
    ctx: &Context,
    node: &'static str,
    before: &Job,
    mut job: Job,
    next: Result<Next, Stop>,
) -> Result<Command<Job>, NodeError> {
    let next = match next {
        Ok(next) => next,
        Err(Stop::Engine(error)) => return Err(error),
        Err(Stop::Trouble(failure)) => {
            let policy = job.policy.clone();
            let title = match node {
                "zavhoz" => "The quartermaster needs help",
                "architect" => "The architect needs help",
                "developers" => "Some tasks failed",
                _ => "The release needs help",
            };
            job.desk.trouble(crew, ctx, &policy, node, title, failure);
            Next::Node(person::NODE)
        }
    };
    let command = match next {
        Next::Node(name) => Command::goto(name),
        Next::End => Command::end(),
    };
    Ok(command.update(job.since(before)))
}

/// Asks the question on the desk.
async fn ask_person(crew: Crew, before: Arc<Job>, ctx: Context) -> Result<Command<Job>, NodeError> {
    let mut job = Job::clone(&before);
    let policy = job.policy.clone();
    let back = person::listen(&crew, &ctx, &before.scope, &mut job.desk, &policy).await?;
    Ok(Command::goto(back).update(job.since(&before)))
}

/// Runs when the job is cancelled: takes back what is under way, closes what is asked. Its tasks are cancelled by themselves.
async fn stopped(crew: Crew, before: Arc<Job>, ctx: Context) -> Result<Command<Job>, NodeError> {
    let mut job = Job::clone(&before);
    // The running node may have handed out the next errand without having said so.
    for number in [job.deploys, job.deploys + 1] {
        let key = devops::errand_key(&ctx, number);
        let _ = ctx
            .step("take back", |_| async {
                Ok::<_, NodeError>(crew.errands.cancel(&key).await)
            })
            .await?;
    }
    job.desk.withdraw(&ctx, &before.scope)?;
    job.errand = None;
    job.end(&ctx, JobStatus::Cancelled, None)?;
    Ok(Command::end().update(job.since(&before)))
}

/// The wiring of a job.
pub(crate) fn graph(crew: &Crew) -> Result<CompiledGraph<Job>, CompileError> {
    macro_rules! node {
        ($name:literal, $module:ident) => {{
            let crew = crew.clone();
            move |before: Arc<Job>, ctx: Context| {
                let crew = crew.clone();
                async move {
                    let mut job = Job::clone(&before);
                    let next = $module::work(&crew, &mut job, &ctx).await;
                    command(&crew, &ctx, $name, &before, job, next)
                }
            }
        }};
    }
    let (asking, stopping) = (crew.clone(), crew.clone());
    Graph::<Job>::builder(GRAPH)
        .node_with("zavhoz", crate::node_options(), node!("zavhoz", zavhoz))
        .node_with(
            "architect",
            crate::node_options(),
            node!("architect", architect),
        )
        .node_with(
            "developers",
            crate::node_options(),
            node!("developers", developers),
        )
        .node_with("devops", crate::node_options(), node!("devops", devops))
        .node_with(person::NODE, crate::node_options(), move |job, ctx| {
            ask_person(asking.clone(), job, ctx)
        })
        .node("stopped", move |job, ctx| {
            stopped(stopping.clone(), job, ctx)
        })
        .edge(START, "zavhoz")
        .goes("zavhoz", ["architect", "devops", person::NODE, END])
        .goes("architect", ["developers", person::NODE, END])
        .goes("developers", ["developers", "devops", person::NODE, END])
        .goes("devops", ["devops", "developers", person::NODE, END])
        .goes(
            person::NODE,
            ["zavhoz", "architect", "developers", "devops"],
        )
        .goes("stopped", [END])
        .on_cancel("stopped")
        .output(|job: &Job| serde_json::to_value(&job.outcome).unwrap_or_default())
        .compile()
}
