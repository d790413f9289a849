//! Developers: starts a task's thread as soon as everything that it depends on is merged, as many at a time as may run, and
//! the next ones the moment a merge frees them, while others still run. A task that failed does not stop the others.

use std::fmt::Write as _;

use graph::{Arrived, ChildEnd, Context, ThreadId, WaitFor};
use ports::{Actor, Event, Failure, PlannedTask, TaskId};

use crate::{
    Crew,
    effect::{Next, Stop},
    job::{Job, Progress, TaskStatus},
    person, signal,
    task::{GRAPH, TaskEnd, TaskOutcome, TaskUpdate},
};

/// How many wishes are taken at once.
const MAX_TAKEN: usize = 20;

pub(crate) async fn work(_: &Crew, job: &mut Job, ctx: &Context) -> Result<Next, Stop> {
    job.enter(ctx, "developers")?;
    if let Some(reply) = job.desk.take() {
        if reply.is(person::GIVE_UP) {
            return Ok(job.give_up(ctx, &reply)?);
        }
        if let Some(advice) = reply.advice() {
            job.steer(advice);
        }
        // Failed tasks are started once more, under a name of their own.
        retry(job, ctx, None)?;
    }
    take_wishes(job, ctx).await?;
    start_ready(job, ctx)?;
    let running: Vec<String> = with_status(job, TaskStatus::Running)
        .map(|(_, progress)| progress.child.clone())
        .collect();
    if running.is_empty() {
        return all_ended(job);
    }
    let what = WaitFor::new()
        .children(running)
        .signal(signal::STEER)
        .signal(signal::RETRY);
    match ctx.wait_any("tasks", &what).await? {
        Arrived::Child(end) => ended(job, ctx, &end)?,
        Arrived::Signal(arrived) if arrived.kind == signal::RETRY => {
            let retry_of: signal::Retry = arrived.payload().unwrap_or_default();
            retry(job, ctx, Some((&retry_of, &arrived.key)))?;
        }
        Arrived::Signal(arrived) => steer(job, ctx, &arrived)?,
        Arrived::Timer => {}
    }
    Ok(Next::Node("developers"))
}

fn with_status(job: &Job, status: TaskStatus) -> impl Iterator<Item = (&TaskId, &Progress)> {
    job.tasks
        .iter()
        .filter(move |(_, progress)| progress.status == status)
}

/// Takes what was wished for before, so that the next tasks know it from their first worker on.
pub(crate) async fn take_wishes(job: &mut Job, ctx: &Context) -> Result<(), Stop> {
    for _ in 0..MAX_TAKEN {
        let what = WaitFor::new().signal(signal::STEER);
        match ctx.try_take("wishes", &what).await? {
            Some(Arrived::Signal(arrived)) => steer(job, ctx, &arrived)?,
            _ => break,
        }
    }
    Ok(())
}

/// Keeps a wish for the tasks to come, and passes it on to those that run.
fn steer(job: &mut Job, ctx: &Context, arrived: &graph::Signal) -> Result<(), Stop> {
    let Ok(wish) = arrived.payload::<signal::Steer>() else {
        return Ok(());
    };
    job.steer(&wish.text);
    for (_, progress) in with_status(job, TaskStatus::Running) {
        let thread = ctx.thread().child(&progress.child);
        ctx.signal(&thread, signal::STEER, &arrived.key, &wish)?;
    }
    Ok(())
}

/// Starts every task that may run now, in the plan's order.
fn start_ready(job: &mut Job, ctx: &Context) -> Result<(), Stop> {
    let tasks = job.planned();
    let mut running = with_status(job, TaskStatus::Running).count();
    for task in &tasks {
        if running >= job.policy.max_parallel_tasks.max(1) {
            break;
        }
        let merged = |id: &TaskId| {
            job.tasks
                .get(id)
                .is_some_and(|progress| progress.status == TaskStatus::Merged)
        };
        if !job.tasks.contains_key(&task.id) && task.depends_on.iter().all(merged) {
            start(job, ctx, task, 1)?;
            running += 1;
        }
    }
    Ok(())
}

/// Starts a task's thread. The second run of a task has a thread and a branch of its own.
fn start(job: &mut Job, ctx: &Context, task: &PlannedTask, run: u32) -> Result<(), Stop> {
    let child = if run == 1 {
        task.id.to_string()
    } else {
        format!("{}.{run}", task.id)
    };
    let job_id = job.scope.job.as_ref().map_or("job", |id| id.as_str());
    let update = TaskUpdate::default()
        .scope(job.scope.task(task.id.clone()))
        .planned(Some(task.clone()))
        .overview(
            job.plan
                .as_ref()
                .map_or_else(String::new, |plan| plan.overview.clone()),
        )
        .spec(job.spec.clone())
        .repository(Some(job.repository()?.clone()))
        .policy(job.policy.clone())
        .branch(format!("artel/{job_id}/{child}"))
        .steering(job.steering.clone());
    ctx.spawn(&child, GRAPH, &update)?;
    job.tasks.insert(
        task.id.clone(),
        Progress {
            child,
            runs: run,
            status: TaskStatus::Running,
            failure: None,
        },
    );
    Ok(())
}

/// Writes down how a task ended.
fn ended(job: &mut Job, ctx: &Context, end: &ChildEnd) -> Result<(), Stop> {
    let Some((id, progress)) = job
        .tasks
        .iter_mut()
        .find(|(_, progress)| progress.child == end.name)
    else {
        return Ok(());
    };
    let outcome: Option<TaskOutcome> = serde_json::from_value(end.output.clone()).unwrap_or(None);
    match outcome {
        Some(outcome) if outcome.status == TaskEnd::Merged => progress.status = TaskStatus::Merged,
        Some(outcome) => {
            progress.status = TaskStatus::Failed;
            progress.failure = outcome.failure;
        }
        None => {
            // The thread itself broke down, so nobody has said so yet.
            let failure = broken_down(&end.thread, end.error.as_deref());
            progress.status = TaskStatus::Failed;
            progress.failure = Some(failure.clone());
            let id = id.clone();
            job.scope.task(id).tell(
                ctx,
                Event::TaskEnded {
                    status: "failed".to_owned(),
                    failure: Some(failure),
                },
            )?;
        }
    }
    Ok(())
}

/// A thread that ended by an error of its own.
pub(crate) fn broken_down(thread: &ThreadId, error: Option<&str>) -> Failure {
    Failure::new(
        "thread_failed",
        format!(
            "the thread {thread} broke down: {}; try again, and look into the log if it happens again",
            error.unwrap_or("no reason was given")
        ),
    )
    .actor(Actor::Admin)
}

/// Starts failed tasks again: the one that is named, or all of them. What still runs is told, in case it waits for a person.
fn retry(
    job: &mut Job,
    ctx: &Context,
    signalled: Option<(&signal::Retry, &str)>,
) -> Result<(), Stop> {
    for task in &job.planned() {
        let Some(progress) = job.tasks.get(&task.id) else {
            continue;
        };
        let meant = signalled
            .is_none_or(|(retry, _)| retry.task.as_ref().is_none_or(|wanted| *wanted == task.id));
        if !meant {
            continue;
        }
        match (progress.status, signalled) {
            (TaskStatus::Failed, _) => {
                let run = progress.runs + 1;
                start(job, ctx, task, run)?;
            }
            (TaskStatus::Running, Some((retry, key))) => {
                let thread = ctx.thread().child(&progress.child);
                ctx.signal(&thread, signal::RETRY, key, retry)?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Nothing runs: everything is merged, or what failed is put before a person.
fn all_ended(job: &Job) -> Result<Next, Stop> {
    let tasks = job.planned();
    let failed: Vec<&PlannedTask> = tasks
        .iter()
        .filter(|task| {
            job.tasks
                .get(&task.id)
                .is_some_and(|progress| progress.status == TaskStatus::Failed)
        })
        .collect();
    if failed.is_empty() {
        return Ok(Next::Node("devops"));
    }
    let waiting = tasks
        .iter()
        .filter(|task| !job.tasks.contains_key(&task.id))
        .count();
    let names: Vec<String> = failed.iter().map(|task| format!("`{}`", task.id)).collect();
    let mut evidence = String::new();
    let mut actor = Actor::Owner;
    for task in failed {
        if let Some(failure) = job
            .tasks
            .get(&task.id)
            .and_then(|progress| progress.failure.as_ref())
        {
            let _ = writeln!(evidence, "{}: {}", task.id, failure.message);
            if failure.actor == Actor::Admin {
                actor = Actor::Admin;
            }
        }
    }
    let rest = if waiting == 0 {
        String::new()
    } else {
        format!(", and {waiting} more wait for them")
    };
    Err(Failure::new(
        "tasks_failed",
        format!(
            "not everything could be built: {} failed{rest}; try them again, or give the job up",
            names.join(", ")
        ),
    )
    .evidence(evidence)
    .actor(actor)
    .into())
}
