//! The architect: creates or opens the repository, writes the scaffold of a new project, and splits the work into a plan, a
//! graph of tasks checked with petgraph. A bad plan goes back with the reason; after that a person is asked.

use graph::Context;
use ports::{
    Actor, Event, Failure, JobKind, MANIFEST_FILE, Plan, Role, Sha, Slug, Speaker, TaskSummary,
};
use serde_json::{Value, json};

use crate::{
    Crew,
    answers::{Answered, Architecture, ChangePlan},
    ask::{self, Question, Told},
    developers,
    effect::{Next, Stop, effect},
    job::Job,
    person, plan, prompts, reading, scaffold,
    scope::within_project,
};

pub(crate) async fn work(crew: &Crew, job: &mut Job, ctx: &Context) -> Result<Next, Stop> {
    job.enter(ctx, "architect")?;
    if let Some(reply) = job.desk.take() {
        if reply.is(person::GIVE_UP) {
            return Ok(job.give_up(ctx, &reply)?);
        }
        if let Some(advice) = reply.advice() {
            job.steer(advice);
        }
    }
    developers::take_wishes(job, ctx).await?;
    let head = open_repository(crew, job, ctx).await?;
    let reading = reading::read(
        crew,
        ctx,
        &job.scope.project,
        &head,
        job.policy.reading_bytes,
    )
    .await?;
    let planned = if reading.has(MANIFEST_FILE) {
        let prompt = prompts::render("architect", "change", change_context(job, &reading)?)?;
        plan_with::<ChangePlan>(crew, job, ctx, prompt, |change| Plan {
            overview: change.overview.clone(),
            tasks: change.tasks.clone(),
        })
        .await?
        .0
    } else {
        let prompt = prompts::render("architect", "new", new_context(job)?)?;
        let (planned, architecture) = plan_with(crew, job, ctx, prompt, Architecture::plan).await?;
        write_scaffold(crew, job, ctx, &head, &architecture).await?;
        planned
    };
    job.scope.tell(
        ctx,
        Event::PlanMade {
            overview: crew.vault.redact(&planned.overview),
            tasks: summaries(&planned),
        },
    )?;
    job.plan = Some(planned);
    Ok(Next::Node("developers"))
}

/// The tasks as the journal names them.
pub(crate) fn summaries(plan: &Plan) -> Vec<TaskSummary> {
    plan.tasks
        .iter()
        .map(|task| TaskSummary {
            id: task.id.clone(),
            title: task.title.clone(),
            depends_on: task.depends_on.clone(),
        })
        .collect()
}

/// Creates or opens the repository; gives the tip of its default branch.
async fn open_repository(crew: &Crew, job: &mut Job, ctx: &Context) -> Result<Sha, Stop> {
    let project = job.scope.project.clone();
    let known = effect(ctx, "repository", || crew.forge.repository(&project)).await?;
    let repository = if let Some(repository) = known {
        repository
    } else {
        let slug = job
            .slug
            .clone()
            .unwrap_or_else(|| Slug::from_title(project.as_str()));
        let repository = effect(ctx, "create repository", || {
            crew.forge.create_repository(&project, &slug)
        })
        .await?;
        job.scope.tell(
            ctx,
            Event::RepositoryCreated {
                location: repository.location.clone(),
            },
        )?;
        repository
    };
    let branch = repository.default_branch.clone();
    job.repository = Some(repository);
    let head = effect(ctx, "head", || crew.forge.head(&project, &branch)).await?;
    Ok(head.ok_or_else(|| {
        Failure::new(
            "no_default_branch",
            format!("the repository of project {project} has no branch {branch}; push one, then try again"),
        )
        .actor(Actor::Owner)
    })?)
}

/// Asks for a plan, and sends it back with the reason while it cannot be carried out.
async fn plan_with<T: Answered + serde::Serialize>(
    crew: &Crew,
    job: &mut Job,
    ctx: &Context,
    prompt: String,
    plan_of: impl Fn(&T) -> Plan,
) -> Result<(Plan, T), Stop> {
    let mut since = Vec::new();
    let mut returns = 0;
    loop {
        let told: Told<T> = ask::typed(
            crew,
            ctx,
            Question {
                role: Role::Architect,
                scope: &job.scope,
                thread: within_project(ctx),
                turn: job.turns,
                step: "plan",
                prompt: prompt.clone(),
                since: since.clone(),
            },
            |_| Ok(()),
        )
        .await?;
        job.turns += told.turns;
        let answer = told.answer?;
        let planned = plan_of(&answer);
        let Err(error) = plan::check(&planned) else {
            return Ok((planned, answer));
        };
        if returns == job.policy.max_plan_returns {
            return Err(Failure::new(
                "bad_plan",
                format!(
                    "the architect's plan could not be carried out {} times in a row: {error}; try again, or write what should be different",
                    returns + 1
                ),
            )
            .evidence(crew.vault.redact(ask::end_of(&told.text)))
            .actor(Actor::Owner)
            .into());
        }
        returns += 1;
        let reason = prompts::render(
            "architect",
            "returned",
            json!({"reason": error.to_string()}),
        )?;
        since.push(ask::said(
            crew,
            Speaker::Assistant,
            ask::start_of(&told.text),
        ));
        since.push(ask::said(crew, Speaker::User, &reason));
    }
}

/// Commits what every developer finds in the repository.
async fn write_scaffold(
    crew: &Crew,
    job: &Job,
    ctx: &Context,
    head: &Sha,
    architecture: &Architecture,
) -> Result<(), Stop> {
    let branch = &job.repository()?.default_branch;
    let files = scaffold::files(architecture);
    let key = format!("{}:scaffold", ctx.thread());
    effect(ctx, "scaffold", || {
        crew.forge.commit_files(
            &job.scope.project,
            branch,
            head,
            "Set up the project",
            &files,
            &key,
        )
    })
    .await?;
    Ok(())
}

fn new_context(job: &Job) -> Result<Value, Stop> {
    Ok(json!({
        "spec": pretty(job.spec()?),
        "secrets": secret_names(job),
        "steering": job.steering,
    }))
}

fn change_context(job: &Job, reading: &reading::Reading) -> Result<Value, Stop> {
    let change = match job.work()? {
        JobKind::Change { change } => pretty(change),
        JobKind::New { .. } | JobKind::Redeploy => {
            "Build what the specification asks for and the repository lacks.".to_owned()
        }
    };
    Ok(json!({
        "change": change,
        "spec": pretty(job.spec()?),
        "secrets": secret_names(job),
        "steering": job.steering,
        "files": reading.paths.join("\n"),
        "contents": reading.files,
        "truncated": reading.truncated,
    }))
}

fn secret_names(job: &Job) -> Vec<&str> {
    job.secrets
        .iter()
        .map(|handle| handle.name.as_str())
        .collect()
}

/// A value as readable JSON for a prompt.
pub(crate) fn pretty(value: &impl serde::Serialize) -> String {
    serde_json::to_string_pretty(value).unwrap_or_default()
}
