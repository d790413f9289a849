//! A task: one item of the plan, from a branch to its merge. The wiring is at the end of this page: developer ⇄ reviewer, and
//! `person` from both.
//!
//! A task is a child of its job.

use std::sync::Arc;

use graph::{Command, CompileError, CompiledGraph, Context, END, Graph, NodeError, START, State};
use jiff::Timestamp;
use ports::{
    Event, Failure, PlannedTask, ProjectSpec, PullRequest, Repository, RequestId, Sha, Usage,
};
use serde::{Deserialize, Serialize};

use crate::{
    Crew, Policy, Scope, developer,
    effect::{Next, Stop},
    job::{MAX_STEERING, PendingErrand},
    person::{self, Desk},
    reviewer,
};

/// The graph's name.
pub const GRAPH: &str = "task";

/// The state of a task.
#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
pub struct Task {
    /// Which project, which job, which task.
    pub scope: Scope,
    /// What is to be done.
    pub planned: Option<PlannedTask>,
    /// How the parts of the plan fit together.
    pub overview: String,
    /// The project's specification.
    pub spec: Option<ProjectSpec>,
    /// Where the code is.
    pub repository: Option<Repository>,
    /// What this task may do; its job's.
    pub policy: Policy,
    /// The branch of its own.
    pub branch: String,
    /// What people said about how the work is to be done, oldest first.
    #[channel(append)]
    pub steering: Vec<String>,
    /// The commit that the branch started from.
    pub base: Option<Sha>,
    /// Workers that were asked for; also the fencing token of the last one.
    pub attempt: u32,
    /// Workers that were asked for in this round of work.
    pub tries: u32,
    /// What went wrong in this round of work.
    pub failures: Vec<Failure>,
    /// The worker whose result is awaited.
    pub working: Option<Working>,
    /// The branch's commit, as far as it was verified.
    pub head: Option<Sha>,
    /// What the last worker said it did, redacted.
    pub summary: String,
    /// The pull request.
    pub pull_request: Option<PullRequest>,
    /// Why the work was sent back: for the next worker.
    pub comments: Vec<String>,
    /// What earlier reviews asked for: for the next review.
    pub earlier: Vec<String>,
    /// Errands that were handed out.
    pub errands: u32,
    /// The checks that run.
    pub errand: Option<PendingErrand>,
    /// The commit whose checks passed.
    pub checked: Option<Sha>,
    /// Whether the change was approved; a rebase does not undo it, new work does.
    pub approved: bool,
    /// Reviews that were made.
    pub reviews: u32,
    /// Turns that the reviewer has taken.
    pub turns: u32,
    /// How often the work was sent back since a person last looked at it.
    pub send_backs: u32,
    /// How often the branch had to be moved since a person last looked at it.
    pub rebases: u32,
    /// Tokens and money that its workers used.
    pub usage: Usage,
    /// Questions to people.
    pub desk: Desk,
    /// How it ended.
    pub outcome: Option<TaskOutcome>,
}

/// A worker whose result is awaited.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Working {
    /// Its request.
    pub request: RequestId,
    /// How long its result is waited for.
    pub until: Timestamp,
}

/// How a task ended: what its thread returns.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TaskOutcome {
    /// `merged`, `failed` or `cancelled`.
    pub status: TaskEnd,
    /// Its branch.
    pub branch: String,
    /// The branch's commit.
    pub head: Option<Sha>,
    /// The pull request's number.
    pub pull_request: Option<u64>,
    /// The commit on the default branch.
    pub merged: Option<Sha>,
    /// Workers that it took.
    pub attempts: u32,
    /// Tokens and money that they used.
    pub usage: Usage,
    /// What went wrong.
    pub failure: Option<Failure>,
}

/// The ways in which a task ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskEnd {
    /// It is on the default branch.
    Merged,
    /// It was given up.
    Failed,
    /// It was stopped.
    Cancelled,
}

impl TaskEnd {
    /// The name in events.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Merged => "merged",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

impl Task {
    /// What is to be done; a task without it was started wrongly.
    pub(crate) fn planned(&self) -> Result<&PlannedTask, NodeError> {
        self.planned.as_ref().ok_or_else(|| {
            NodeError::msg("the task was started without its plan: give its state `planned`")
                .fatal()
        })
    }

    /// Where the code is.
    pub(crate) fn repository(&self) -> Result<&Repository, NodeError> {
        self.repository.as_ref().ok_or_else(|| {
            NodeError::msg("the task was started without a repository: give its state `repository`")
                .fatal()
        })
    }

    /// The commit that is reviewed.
    pub(crate) fn head(&self) -> Result<&Sha, NodeError> {
        self.head
            .as_ref()
            .ok_or_else(|| NodeError::msg("the task has no commit to review").fatal())
    }

    /// The pull request.
    pub(crate) fn pull_request(&self) -> Result<&PullRequest, NodeError> {
        self.pull_request
            .as_ref()
            .ok_or_else(|| NodeError::msg("the task has no pull request to review").fatal())
    }

    /// Remembers what somebody wishes.
    pub(crate) fn steer(&mut self, text: &str) {
        if self.steering.len() < MAX_STEERING && !text.trim().is_empty() {
            self.steering.push(text.to_owned());
        }
    }

    /// Sends the work back: the next worker mends it on the same branch.
    pub(crate) fn send_back(&mut self, comments: Vec<String>) {
        self.comments = comments;
        self.approved = false;
        self.checked = None;
        self.tries = 0;
        self.failures.clear();
    }

    /// Ends the task.
    pub(crate) fn end(
        &mut self,
        ctx: &Context,
        status: TaskEnd,
        merged: Option<Sha>,
        failure: Option<Failure>,
    ) -> Result<Next, NodeError> {
        if status != TaskEnd::Merged {
            self.scope.tell(
                ctx,
                Event::TaskEnded {
                    status: status.as_str().to_owned(),
                    failure: failure.clone(),
                },
            )?;
        }
        self.outcome = Some(TaskOutcome {
            status,
            branch: self.branch.clone(),
            head: self.head.clone(),
            pull_request: self.pull_request.as_ref().map(|pull| pull.number),
            merged,
            attempts: self.attempt,
            usage: self.usage,
            failure,
        });
        Ok(Next::End)
    }

    /// Ends the task because a person gave it up; its pull request is closed.
    pub(crate) async fn give_up(
        &mut self,
        crew: &Crew,
        ctx: &Context,
        reply: &person::Reply,
    ) -> Result<Next, Stop> {
        if let Some(pull) = &self.pull_request {
            crate::effect::effect(ctx, "close", || {
                crew.forge.close(&self.scope.project, pull.number)
            })
            .await?;
        }
        let failure = reply
            .failure
            .clone()
            .unwrap_or_else(|| Failure::new("given_up", "the task was given up"));
        Ok(self.end(ctx, TaskEnd::Failed, None, Some(failure))?)
    }

    /// What changed since `before`, as an update.
    fn since(self, before: &Self) -> TaskUpdate {
        let mut update = TaskUpdate::default();
        crate::changed!(update, before, self; scope, planned, overview, spec, repository, policy, branch, base, attempt, tries,
            failures, working, head, summary, pull_request, comments, earlier, errands, errand, checked, approved, reviews,
            turns, send_backs, rebases, usage, desk, outcome);
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
    before: &Task,
    mut task: Task,
    next: Result<Next, Stop>,
) -> Result<Command<Task>, NodeError> {
    let next = match next {
        Ok(next) => next,
        Err(Stop::Engine(error)) => return Err(error),
        Err(Stop::Trouble(failure)) => {
            let title = task.planned.as_ref().map_or_else(String::new, |planned| {
                format!("{} ({})", planned.title, planned.id)
            });
            let title = format!("Task {title}: the {node} needs help");
            let policy = task.policy.clone();
            task.desk.trouble(crew, ctx, &policy, node, &title, failure);
            Next::Node(person::NODE)
        }
    };
    let command = match next {
        Next::Node(name) => Command::goto(name),
        Next::End => Command::end(),
    };
    Ok(command.update(task.since(before)))
}

/// Asks the question on the desk.
async fn ask_person(
    crew: Crew,
    before: Arc<Task>,
    ctx: Context,
) -> Result<Command<Task>, NodeError> {
    let mut task = Task::clone(&before);
    let policy = task.policy.clone();
    let back = person::listen(&crew, &ctx, &before.scope, &mut task.desk, &policy).await?;
    Ok(Command::goto(back).update(task.since(&before)))
}

/// Runs when the task is cancelled: stops the worker, takes the checks back, closes what is open.
async fn stopped(crew: Crew, before: Arc<Task>, ctx: Context) -> Result<Command<Task>, NodeError> {
    let mut task = Task::clone(&before);
    // The running node may have asked for the next worker, or handed out the next errand, without having said so.
    let next = task.attempt + 1;
    let current = task.working.as_ref().map(|_| task.attempt);
    for attempt in current.into_iter().chain([next]) {
        let request = developer::request_id(&ctx, attempt);
        let _ = ctx
            .step("stop the worker", |_| async {
                Ok::<_, NodeError>(crew.workers.cancel(&request).await)
            })
            .await?;
    }
    for number in [task.errands, task.errands + 1] {
        let key = reviewer::errand_key(&ctx, number);
        let _ = ctx
            .step("take back", |_| async {
                Ok::<_, NodeError>(crew.errands.cancel(&key).await)
            })
            .await?;
    }
    if let Some(pull) = &task.pull_request {
        let _ = ctx
            .step("close", |_| async {
                Ok::<_, NodeError>(crew.forge.close(&task.scope.project, pull.number).await)
            })
            .await?;
    }
    task.desk.withdraw(&ctx, &before.scope)?;
    task.working = None;
    task.errand = None;
    task.end(&ctx, TaskEnd::Cancelled, None, None)?;
    Ok(Command::end().update(task.since(&before)))
}

/// The wiring of a task.
pub(crate) fn graph(crew: &Crew) -> Result<CompiledGraph<Task>, CompileError> {
    macro_rules! node {
        ($name:literal, $module:ident) => {{
            let crew = crew.clone();
            move |before: Arc<Task>, ctx: Context| {
                let crew = crew.clone();
                async move {
                    let mut task = Task::clone(&before);
                    let next = $module::work(&crew, &mut task, &ctx).await;
                    command(&crew, &ctx, $name, &before, task, next)
                }
            }
        }};
    }
    let (asking, stopping) = (crew.clone(), crew.clone());
    Graph::<Task>::builder(GRAPH)
        .node_with(
            "developer",
            crate::node_options(),
            node!("developer", developer),
        )
        .node_with(
            "reviewer",
            crate::node_options(),
            node!("reviewer", reviewer),
        )
        .node_with(person::NODE, crate::node_options(), move |task, ctx| {
            ask_person(asking.clone(), task, ctx)
        })
        .node("stopped", move |task, ctx| {
            stopped(stopping.clone(), task, ctx)
        })
        .edge(START, "developer")
        .goes("developer", ["developer", "reviewer", person::NODE, END])
        .goes("reviewer", ["reviewer", "developer", person::NODE, END])
        .goes(person::NODE, ["developer", "reviewer"])
        .goes("stopped", [END])
        .on_cancel("stopped")
        .output(|task: &Task| serde_json::to_value(&task.outcome).unwrap_or_default())
        .compile()
}
