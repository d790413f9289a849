//! Devops: releases what is merged. The deployer starts the release beside the live one, runs the acceptance checks, switches
//! or goes back; this node hands that over as an errand, bound to one commit. A release that failed is repaired by a task of
//! its own once; after that a person decides, or the job fails when nobody is there to ask.

use graph::Context;
use ports::{
    Actor, Audience, CheckStatus, Choice, DeployRequest, Deployment, DeploymentStatus, Errand,
    ErrandOutcome, ErrandWork, Event, Failure, JobStatus, OpenWait, Plan, PlannedTask, TaskId,
    WaitId, WaitKind,
};

use crate::{
    Crew, architect,
    effect::{Next, Stop, clock, effect, later},
    job::{Job, PendingErrand},
    person, reviewer,
};

/// The kind of failure that another port may mend.
const PORT_TAKEN: &str = "port_taken";

pub(crate) async fn work(crew: &Crew, job: &mut Job, ctx: &Context) -> Result<Next, Stop> {
    job.enter(ctx, "devops")?;
    if let Some(reply) = job.desk.take() {
        if reply.is(person::GIVE_UP) {
            return Ok(job.give_up(ctx, &reply)?);
        }
        if let Some(advice) = reply.advice() {
            job.steer(advice);
        }
        job.deploy_approved |= reply.is(person::APPROVE) || reply.is(person::RETRY);
    }
    match job.errand.clone() {
        Some(errand) => receive(crew, job, ctx, &errand).await,
        None if job.policy.approve_deploy && !job.yes && !job.deploy_approved => {
            Ok(ask_approval(job, ctx))
        }
        None => deploy(crew, job, ctx).await,
    }
}

/// The key of a deploy of this thread; the same whenever it is handed over again after a crash.
pub(crate) fn errand_key(ctx: &Context, number: u32) -> String {
    format!("{}:{}:deploy:{number}", ctx.thread(), ctx.branch())
}

fn ask_approval(job: &mut Job, ctx: &Context) -> Next {
    let name = job
        .spec
        .as_ref()
        .map_or("the project", |spec| spec.name.as_str());
    let wait = OpenWait {
        id: WaitId::new(""),
        kind: WaitKind::Deploy,
        question: format!(
            "**{name} is built and reviewed.** Shall it be deployed now? {} checks will be run on it.",
            job.acceptance().len()
        ),
        options: vec![
            Choice::new(person::APPROVE, "Deploy"),
            Choice::new(person::GIVE_UP, "Do not deploy"),
        ],
        free_text: false,
        audience: Audience::Owner,
    };
    let question = job.desk.ask(ctx, "devops", wait);
    question.failure =
        Some(Failure::new("not_deployed", "the deploy was not approved").actor(Actor::Owner));
    Next::Node(person::NODE)
}

/// Hands the release of everything that is merged over.
async fn deploy(crew: &Crew, job: &mut Job, ctx: &Context) -> Result<Next, Stop> {
    let project = job.scope.project.clone();
    let repository = job.repository()?.clone();
    let branch = &repository.default_branch;
    let sha = effect(ctx, "sha", || crew.forge.head(&project, branch)).await?;
    let sha = sha.ok_or_else(|| {
        Failure::new(
            "nothing_to_deploy",
            format!(
                "branch {branch} of {} has no commit; merge something first",
                repository.location
            ),
        )
        .actor(Actor::Owner)
    })?;
    let port = job.port.ok_or_else(|| {
        Failure::new(
            "no_port",
            format!("project {project} has no port; try again"),
        )
    })?;
    job.deploys += 1;
    let key = errand_key(ctx, job.deploys);
    job.scope
        .tell(ctx, Event::DeployStarted { sha: sha.clone() })?;
    let errand = Errand {
        key: key.clone(),
        reply_to: ctx.thread().to_string(),
        work: ErrandWork::Deploy(DeployRequest {
            key: key.clone(),
            project,
            repository,
            sha: sha.clone(),
            port,
            secrets: job.secrets.clone(),
            acceptance: job.acceptance(),
        }),
    };
    effect(ctx, "hand over", || crew.errands.hand_over(&errand)).await?;
    let now = clock(ctx, "clock").await?;
    job.errand = Some(PendingErrand {
        key,
        sha,
        until: later(now, job.policy.deploy_wait_s),
    });
    Ok(Next::Node("devops"))
}

/// Waits for the release.
async fn receive(
    crew: &Crew,
    job: &mut Job,
    ctx: &Context,
    errand: &PendingErrand,
) -> Result<Next, Stop> {
    let outcome = reviewer::await_errand(ctx, errand).await?;
    job.errand = None;
    job.deploy_approved = false;
    match outcome {
        Some(ErrandOutcome::Deploy(deployment)) => released(crew, job, ctx, &deployment),
        Some(ErrandOutcome::Failed(failure)) if failure.kind == PORT_TAKEN => {
            another_port(crew, job, ctx, failure).await
        }
        Some(ErrandOutcome::Failed(failure)) => failed(job, ctx, failure),
        Some(ErrandOutcome::Cancelled | ErrandOutcome::Checks(_)) => failed(
            job,
            ctx,
            Failure::new(
                "deploy_cancelled",
                format!("the deploy of commit {} was stopped; try again", errand.sha),
            ),
        ),
        None => {
            effect(ctx, "take back", || crew.errands.cancel(&errand.key)).await?;
            failed(
                job,
                ctx,
                Failure::new(
                    "deploy_lost",
                    format!(
                        "the deploy of commit {} gave no result within {} s; look at the machine that it goes to, then try again",
                        errand.sha, job.policy.deploy_wait_s
                    ),
                )
                .actor(Actor::Admin),
            )
        }
    }
}

/// The release lives, or it was rolled back and is repaired.
fn released(
    crew: &Crew,
    job: &mut Job,
    ctx: &Context,
    deployment: &Deployment,
) -> Result<Next, Stop> {
    job.scope.tell(
        ctx,
        Event::DeployEnded {
            deployment: deployment.clone(),
        },
    )?;
    let live = deployment.status == DeploymentStatus::Live;
    job.deployment = Some(deployment.clone());
    if live {
        return Ok(job.end(ctx, JobStatus::Deployed, None)?);
    }
    let failure = release_failure(crew, deployment);
    if job.repairs < job.policy.max_repairs && job.plan.is_some() {
        add_repair(job, ctx, deployment, &failure)?;
        return Ok(Next::Node("developers"));
    }
    failed(job, ctx, failure)
}

/// What a release that failed its checks was like.
fn release_failure(crew: &Crew, deployment: &Deployment) -> Failure {
    let evidence: Vec<String> = deployment
        .checks
        .iter()
        .filter(|check| check.status != CheckStatus::Passed)
        .map(|check| format!("{}: {}", check.name, check.detail))
        .collect();
    let now = match deployment.live_release {
        Some(release) => format!("release {release} answers as before"),
        None => "there was no earlier release to go back to".to_owned(),
    };
    // The first thing that went wrong stands in the sentence; the rest, and the logs, are evidence.
    let why = evidence
        .first()
        .and_then(|first| first.lines().next())
        .map(|line| format!(": {}", line.trim_end_matches("; its last lines:")))
        .unwrap_or_default();
    Failure::new(
        "release_failed",
        crew.vault.redact(&format!(
            "release {} (commit {}) did not pass its checks{why}; {now}",
            deployment.release, deployment.sha
        )),
    )
    .evidence(crew.vault.redact(&evidence.join("\n")))
}

/// Adds a task to the plan that repairs the release, with what was seen.
fn add_repair(
    job: &mut Job,
    ctx: &Context,
    deployment: &Deployment,
    failure: &Failure,
) -> Result<(), Stop> {
    job.repairs += 1;
    let id = free_id(job);
    let plan = job.plan.get_or_insert_with(|| Plan {
        overview: String::new(),
        tasks: Vec::new(),
    });
    plan.tasks.push(PlannedTask {
        id,
        title: format!("Repair release {}", deployment.release),
        description: format!(
            "The merged code passed its own checks, but its release did not pass the acceptance checks on the running service, so it \
             was rolled back. Find out why, mend it, and add a test that would have shown it.\n\nWhat was seen:\n\n{}",
            failure.evidence
        ),
        scope: Vec::new(),
        acceptance: deployment
            .checks
            .iter()
            .filter(|check| check.status != CheckStatus::Passed)
            .map(|check| format!("The check \"{}\" passes on the running service", check.name))
            .collect(),
        depends_on: Vec::new(),
    });
    let event = Event::PlanMade {
        overview: plan.overview.clone(),
        tasks: architect::summaries(plan),
    };
    Ok(job.scope.tell(ctx, event)?)
}

/// An id that no task of the plan has.
fn free_id(job: &Job) -> TaskId {
    let tasks = job.planned();
    // One more than there are tasks: one of them is free.
    (0..=tasks.len())
        .map(|number| TaskId::new(format!("repair-{}", number + 1)))
        .find(|id| tasks.iter().all(|task| task.id != *id))
        .unwrap_or_else(|| TaskId::new("repair"))
}

/// Something that is not ours listens on the port: takes another one, a few times.
async fn another_port(
    crew: &Crew,
    job: &mut Job,
    ctx: &Context,
    failure: Failure,
) -> Result<Next, Stop> {
    if job.port_changes >= job.policy.max_port_changes {
        return failed(job, ctx, failure);
    }
    job.port_changes += 1;
    job.deploy_approved = true;
    let project = job.scope.project.clone();
    let taken = job.port;
    let port = effect(ctx, "another port", || {
        crew.allocations.port(&project, taken)
    })
    .await?;
    job.scope.tell(ctx, Event::PortAllocated { port })?;
    job.port = Some(port);
    Ok(Next::Node("devops"))
}

/// A person decides; when nobody is there to ask, the job fails.
fn failed(job: &mut Job, ctx: &Context, failure: Failure) -> Result<Next, Stop> {
    if job.yes {
        return Ok(job.end(ctx, JobStatus::Failed, Some(failure))?);
    }
    Err(failure.into())
}
