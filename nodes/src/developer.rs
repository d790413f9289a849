//! The developer: sends the task to a worker on a branch of its own, verifies that what came back is a commit on the code
//! host, and opens the pull request. On a send-back the next worker goes on in the same workspace. Retries are capped by
//! number and by what went wrong; at the cap a person is asked.

use graph::{Arrived, Context, WaitFor};
use jiff::Timestamp;
use ports::{Actor, Event, Failure, NewPullRequest, RESULT_SIGNAL, RequestId, Role, Sha};
use protocol::{ResultStatus, SpawnRequest, WorkerResult};
use serde_json::json;

use crate::{
    Crew, ask,
    effect::{Next, Stop, effect, later},
    person, prompts, signal,
    task::{Task, Working},
};

/// How many signals are passed over or kept in one go while a worker works.
const MAX_TAKEN: usize = 50;

/// Failures that another worker of the same installation meets as well, so that its admins are asked at once.
const INSTALLATION: [&str; 10] = [
    "access_denied",
    "agent_missing",
    "bad_request",
    "bad_result",
    "image_missing",
    "model_unavailable",
    "no_model",
    "not_on_tape",
    "too_large",
    "unsupported",
];

/// Failures that only the repository's owner can mend, and that another worker would meet as well.
const REPOSITORY: [&str; 2] = ["base_missing", "repository_missing"];

/// How much of a worker's summary is kept, in bytes.
const SUMMARY_BYTES: usize = 4 * 1024;

pub(crate) async fn work(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    task.scope.known(ctx)?;
    if let Some(reply) = task.desk.take() {
        if reply.is(person::GIVE_UP) {
            return task.give_up(crew, ctx, &reply).await;
        }
        if let Some(advice) = reply.advice() {
            task.steer(advice);
        }
        task.tries = 0;
        task.failures.clear();
    }
    match task.working.clone() {
        None => send(crew, task, ctx).await,
        Some(working) => receive(crew, task, ctx, &working).await,
    }
}

/// The request of an attempt; the same whenever the attempt is made again after a crash.
pub(crate) fn request_id(ctx: &Context, attempt: u32) -> RequestId {
    let thread = ctx.thread().as_str().replace('/', ".");
    let branch = match ctx.branch() {
        0 => String::new(),
        branch => format!(".b{branch}"),
    };
    RequestId::new(format!("{thread}{branch}.{attempt}"))
}

/// The thread that waits for the result of a request; `None` when the id is not one that [`request_id`] made.
pub(crate) fn thread_of_request(request: &RequestId) -> Option<String> {
    // Projects and jobs hold no dot; a task that was started again does (`storage.2`).
    let (mut thread, attempt) = request.as_str().rsplit_once('.')?;
    attempt.parse::<u32>().ok()?;
    if let Some((rest, last)) = thread.rsplit_once('.')
        && last
            .strip_prefix('b')
            .is_some_and(|branch| branch.parse::<u32>().is_ok())
        && rest.matches('.').count() >= 2
    {
        thread = rest;
    }
    let (project, rest) = thread.split_once('.')?;
    let (job, task) = rest.split_once('.')?;
    Some(format!("{project}/{job}/{task}"))
}

/// Asks for a worker.
async fn send(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Next, Stop> {
    take_wishes(task, ctx).await?;
    if task.attempt == 0 {
        task.scope.tell(
            ctx,
            Event::TaskStarted {
                thread: ctx.thread().to_string(),
            },
        )?;
    }
    let base = base(crew, task, ctx).await?;
    task.attempt += 1;
    task.tries += 1;
    let request = request(crew, task, ctx, &base)?;
    let created_at: Timestamp = effect(ctx, "submit", || {
        let request = SpawnRequest {
            created_at: Timestamp::now(),
            ..request.clone()
        };
        async move {
            crew.workers.submit(&request).await?;
            Ok(request.created_at)
        }
    })
    .await?;
    let id = RequestId::new(request.request_id);
    task.scope.tell(
        ctx,
        Event::TaskAttempt {
            attempt: task.attempt,
            request: id.clone(),
        },
    )?;
    let patience_s = task.policy.limits.wall_s + task.policy.worker_margin_s;
    task.working = Some(Working {
        request: id,
        until: later(created_at, patience_s),
    });
    Ok(Next::Node("developer"))
}

/// The commit that the branch starts from: the tip of the default branch when the first worker was asked for.
async fn base(crew: &Crew, task: &mut Task, ctx: &Context) -> Result<Sha, Stop> {
    if let Some(base) = &task.base {
        return Ok(base.clone());
    }
    let project = &task.scope.project;
    let branch = &task.repository()?.default_branch;
    let tip = effect(ctx, "base", || crew.forge.head(project, branch)).await?;
    let base = tip.ok_or_else(|| {
        Failure::new(
            "no_default_branch",
            format!("the repository of project {project} has no branch {branch}; push one, then try again"),
        )
        .actor(Actor::Owner)
    })?;
    task.base = Some(base.clone());
    Ok(base)
}

fn request(crew: &Crew, task: &Task, ctx: &Context, base: &Sha) -> Result<SpawnRequest, Stop> {
    let planned = task.planned()?;
    let repository = task.repository()?;
    let source = match (&repository.path, &repository.clone_url) {
        (Some(path), _) => protocol::Source::Path(path.display().to_string()),
        (None, Some(url)) => protocol::Source::CloneUrl(url.clone()),
        (None, None) => {
            return Err(Failure::new(
                "no_clone_source",
                format!(
                    "the repository {} names neither a path nor an address to clone from; look into the configuration of the code host",
                    repository.location
                ),
            )
            .actor(Actor::Admin)
            .into());
        }
    };
    let failures: Vec<String> = task
        .failures
        .iter()
        .map(|failure| format!("{}\n{}", failure.message, ask::end_of(&failure.evidence)))
        .collect();
    let body = prompts::render(
        Role::Developer.as_str(),
        "task",
        json!({
            "title": planned.title,
            "description": planned.description,
            "scope": planned.scope,
            "acceptance": planned.acceptance,
            "comments": task.comments,
            "failures": failures,
            "steering": task.steering,
            "overview": task.overview,
        }),
    )?;
    Ok(SpawnRequest {
        version: protocol::VERSION,
        request_id: request_id(ctx, task.attempt).to_string(),
        project_id: task.scope.project.to_string(),
        job_id: task
            .scope
            .job
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        task_id: task
            .scope
            .task
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        attempt: task.attempt,
        fencing_token: u64::from(task.attempt),
        repository: protocol::Repository {
            source,
            base_sha: base.to_string(),
            branch: task.branch.clone(),
            workflows: planned.scope.iter().any(|part| {
                let part = part.trim_start_matches("./");
                part.starts_with(".github/workflows")
            }),
        },
        task: protocol::TaskBrief {
            title: crew.vault.redact(&planned.title),
            body_markdown: crew.vault.redact(&body),
            acceptance: planned
                .acceptance
                .iter()
                .map(|line| crew.vault.redact(line))
                .collect(),
        },
        agent: task.policy.agent.clone(),
        limits: task.policy.limits.clone(),
        docker: task.policy.docker,
        network: protocol::Network {
            allow: task.policy.network_allow.clone(),
        },
        secrets: Vec::new(),
        trace_context: (crew.traceparent)(),
        created_at: Timestamp::UNIX_EPOCH,
    })
}

/// Takes what was wished for before, so that this worker knows it.
async fn take_wishes(task: &mut Task, ctx: &Context) -> Result<(), Stop> {
    for _ in 0..MAX_TAKEN {
        match ctx
            .try_take("wishes", &WaitFor::new().signal(signal::STEER))
            .await?
        {
            Some(Arrived::Signal(arrived)) => keep_wish(task, &arrived),
            _ => break,
        }
    }
    Ok(())
}

fn keep_wish(task: &mut Task, arrived: &graph::Signal) {
    if let Ok(wish) = arrived.payload::<signal::Steer>() {
        task.steer(&wish.text);
    }
}

/// Waits for the worker's result, or for so long that there will be none.
async fn receive(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    working: &Working,
) -> Result<Next, Stop> {
    let what = WaitFor::new()
        .signal(RESULT_SIGNAL)
        .signal(signal::STEER)
        .until(working.until);
    for _ in 0..MAX_TAKEN {
        match ctx.wait_any("worker", &what).await? {
            Arrived::Signal(arrived) if arrived.kind == signal::STEER => keep_wish(task, &arrived),
            Arrived::Signal(arrived) => {
                // A result of an earlier attempt comes too late to count.
                if let Ok(result) = arrived.payload::<WorkerResult>()
                    && result.request_id == working.request.as_str()
                    && result.fencing_token == u64::from(task.attempt)
                {
                    return ended(crew, task, ctx, result).await;
                }
            }
            Arrived::Timer => return lost(crew, task, ctx, working).await,
            Arrived::Child(_) => {}
        }
    }
    // The wishes are kept now; the wait goes on.
    Ok(Next::Node("developer"))
}

/// No result came: the worker is stopped, wherever it is.
async fn lost(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    working: &Working,
) -> Result<Next, Stop> {
    effect(ctx, "stop the worker", || {
        crew.workers.cancel(&working.request)
    })
    .await?;
    let waited_s = task.policy.limits.wall_s + task.policy.worker_margin_s;
    let failure = Failure::new(
        "worker_lost",
        format!(
            "no result came from worker {} within {waited_s} s, so it was stopped; look whether a spawner runs and has room",
            working.request
        ),
    )
    .actor(Actor::Admin)
    .retryable();
    tell_worked(
        task,
        ctx,
        working,
        ResultStatus::Lost,
        None,
        "",
        Some(&failure),
    )?;
    task.working = None;
    failed(task, failure)
}

/// A worker ended: its word counts for nothing, the commit on the code host counts.
async fn ended(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    result: WorkerResult,
) -> Result<Next, Stop> {
    let Some(working) = task.working.take() else {
        return Ok(Next::Node("developer"));
    };
    task.usage.input_tokens += result.usage.input_tokens;
    task.usage.output_tokens += result.usage.output_tokens;
    if let Some(cost) = result.usage.cost_usd {
        task.usage.cost_usd = Some(task.usage.cost_usd.unwrap_or(0.0) + cost);
    }
    let summary = &result.summary_markdown;
    let summary = crew
        .vault
        .redact(&summary[..summary.floor_char_boundary(SUMMARY_BYTES.min(summary.len()))]);
    let verified = if result.status == ResultStatus::Succeeded {
        verify(crew, task, ctx, result.head_sha.as_deref()).await?
    } else {
        Err(failure_of(crew, &result))
    };
    let head = verified.as_ref().ok();
    tell_worked(
        task,
        ctx,
        &working,
        result.status,
        head,
        &summary,
        verified.as_ref().err(),
    )?;
    match verified {
        Ok(head) => {
            task.summary = summary;
            open_pull_request(crew, task, ctx, head).await
        }
        // Only a person can give what a blocked worker asks for.
        Err(failure) if result.status == ResultStatus::Blocked => Err(failure.into()),
        Err(failure) => failed(task, failure),
    }
}

/// The commit, if the code host has it at the tip of the task's branch and it is something new.
async fn verify(
    crew: &Crew,
    task: &Task,
    ctx: &Context,
    claimed: Option<&str>,
) -> Result<Result<Sha, Failure>, Stop> {
    let project = &task.scope.project;
    let branch = &task.branch;
    let found = effect(ctx, "verify", || crew.forge.head(project, branch)).await?;
    let Some(claimed) = claimed.map(Sha::new) else {
        return Ok(Err(Failure::new(
            "no_commit",
            "the worker reported success without a commit; whatever it did is not on its branch",
        )));
    };
    if found.as_ref() != Some(&claimed) {
        let found = found.map_or_else(|| "nothing".to_owned(), |sha| sha.to_string());
        return Ok(Err(Failure::new(
            "head_mismatch",
            format!(
                "the worker reported commit {claimed}, but branch {branch} is at {found} on the code host"
            ),
        )));
    }
    if task.head.as_ref().or(task.base.as_ref()) == Some(&claimed) {
        return Ok(Err(Failure::new(
            "no_commit",
            format!("the worker changed nothing: branch {branch} is still at {claimed}"),
        )));
    }
    Ok(Ok(claimed))
}

fn failure_of(crew: &Crew, result: &WorkerResult) -> Failure {
    match &result.failure {
        Some(failure) => {
            let seen = Failure::new(failure.kind.clone(), crew.vault.redact(&failure.message))
                .evidence(crew.vault.redact(&failure.evidence));
            if INSTALLATION.contains(&failure.kind.as_str()) {
                seen.actor(Actor::Admin)
            } else if person::is_budget(&seen)
                || result.status == ResultStatus::Blocked
                || REPOSITORY.contains(&failure.kind.as_str())
            {
                seen.actor(Actor::Owner)
            } else {
                seen
            }
        }
        None => Failure::new(
            result.status.as_str(),
            format!(
                "the worker ended as {} and said no more",
                result.status.as_str()
            ),
        ),
    }
}

fn tell_worked(
    task: &Task,
    ctx: &Context,
    working: &Working,
    status: ResultStatus,
    head: Option<&Sha>,
    summary: &str,
    failure: Option<&Failure>,
) -> Result<(), Stop> {
    task.scope.tell(
        ctx,
        Event::TaskWorked {
            request: working.request.clone(),
            status: status.as_str().to_owned(),
            head: head.cloned(),
            summary: summary.to_owned(),
            failure: failure.cloned(),
        },
    )?;
    Ok(())
}

async fn open_pull_request(
    crew: &Crew,
    task: &mut Task,
    ctx: &Context,
    head: Sha,
) -> Result<Next, Stop> {
    let planned = task.planned()?;
    let new = NewPullRequest {
        project: task.scope.project.clone(),
        branch: task.branch.clone(),
        head: head.clone(),
        title: planned.title.clone(),
        body: task.summary.clone(),
    };
    let pull = effect(ctx, "pull request", || crew.forge.open_pull_request(&new)).await?;
    task.scope.tell(
        ctx,
        Event::PullRequestOpened {
            number: pull.number,
            url: pull.url.clone(),
            head: head.clone(),
        },
    )?;
    task.pull_request = Some(pull);
    task.head = Some(head);
    task.checked = None;
    task.approved = false;
    task.comments.clear();
    task.failures.clear();
    task.tries = 0;
    Ok(Next::Node("reviewer"))
}

/// Decides what follows a failure: another worker, or a person.
fn failed(task: &mut Task, failure: Failure) -> Result<Next, Stop> {
    let same = task
        .failures
        .iter()
        .filter(|earlier| fingerprint(earlier) == fingerprint(&failure))
        .count();
    task.failures.push(failure.clone());
    let same = u32::try_from(same + 1).unwrap_or(u32::MAX);
    let at_the_cap = task.tries >= task.policy.max_attempts || same >= task.policy.max_same_failure;
    let hopeless = INSTALLATION
        .iter()
        .chain(&REPOSITORY)
        .any(|kind| *kind == failure.kind);
    if at_the_cap || hopeless || person::is_budget(&failure) {
        return Err(failure.into());
    }
    Ok(Next::Node("developer"))
}

/// What is the same when the same thing goes wrong again: the kind and the message without its numbers and ids.
fn fingerprint(failure: &Failure) -> String {
    let words = failure
        .message
        .split_whitespace()
        .filter(|word| !word.contains(|c: char| c.is_ascii_digit()));
    std::iter::once(failure.kind.as_str())
        .chain(words)
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_leads_back_to_its_thread() {
        for (request, thread) in [
            ("p1.job-1.storage.1", Some("p1/job-1/storage")),
            ("p1.job-12.storage.2.3", Some("p1/job-12/storage.2")),
            ("p1.job-1.storage.b1.3", Some("p1/job-1/storage")),
            ("p1.job-1.b1.3", Some("p1/job-1/b1")),
            ("p1.job-1.storage.2.b4.1", Some("p1/job-1/storage.2")),
            ("p1.job-1.x", None),
            ("nonsense", None),
        ] {
            assert_eq!(
                thread_of_request(&RequestId::new(request)).as_deref(),
                thread,
                "{request}"
            );
        }
    }

    #[test]
    fn numbers_and_ids_do_not_make_another_failure() {
        let one = Failure::new("no_commit", "branch artel/job-1/a is still at 0a1b2c");
        let two = Failure::new("no_commit", "branch artel/job-1/a is still at 9f8e7d");
        let other = Failure::new("agent_failed", "branch artel/job-1/a is still at 0a1b2c");
        assert_eq!(fingerprint(&one), fingerprint(&two));
        assert_ne!(fingerprint(&one), fingerprint(&other));
    }
}
