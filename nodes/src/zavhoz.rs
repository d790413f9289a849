//! Zavhoz, the quartermaster: reads what the specification needs, allocates the port, has secrets granted, and asks the owner
//! on the secret path for those that are missing. Deterministic: no model. It writes handles, never values.

use std::fmt::Write as _;

use graph::Context;
use ports::{Audience, Choice, Event, JobKind, JobStatus, Need, OpenWait, WaitId, WaitKind};

use crate::{
    Crew,
    effect::{Next, Stop, effect},
    job::Job,
    person, signal,
};

pub(crate) async fn work(crew: &Crew, job: &mut Job, ctx: &Context) -> Result<Next, Stop> {
    job.enter(ctx, "zavhoz")?;
    if let Some(reply) = job.desk.take()
        && reply.is(person::GIVE_UP)
    {
        return Ok(job.give_up(ctx, &reply)?);
    }
    if job.port.is_none() {
        let project = &job.scope.project;
        let port = effect(ctx, "port", || crew.allocations.port(project, None)).await?;
        job.scope.tell(ctx, Event::PortAllocated { port })?;
        job.port = Some(port);
    }
    let missing = grant_secrets(crew, job, ctx).await?;
    if !missing.is_empty() {
        let question = question(job, &missing);
        let asked = job.desk.ask(ctx, "zavhoz", question);
        asked.also = vec![signal::SECRET.to_owned(), signal::RETRY.to_owned()];
        asked.failure = Some(ports::Failure::new(
            "secret_missing",
            format!("the secret {} was not given", missing[0].0),
        ));
        return Ok(Next::Node(person::NODE));
    }
    match job.work()? {
        JobKind::New { .. } | JobKind::Change { .. } => Ok(Next::Node("architect")),
        JobKind::Redeploy => {
            let project = &job.scope.project;
            job.repository = effect(ctx, "repository", || crew.forge.repository(project)).await?;
            match job.repository() {
                Ok(_) => Ok(Next::Node("devops")),
                Err(failure) => Ok(job.end(ctx, JobStatus::Failed, Some(failure))?),
            }
        }
    }
}

/// Grants every secret that is needed and there; gives name and description of those that are not.
async fn grant_secrets(
    crew: &Crew,
    job: &mut Job,
    ctx: &Context,
) -> Result<Vec<(String, String)>, Stop> {
    let needed: Vec<(String, String)> = job
        .needs()
        .into_iter()
        .filter_map(|need| match need {
            Need::Secret { name, description } => Some((name, description)),
            Need::Port => None,
        })
        .collect();
    if needed.is_empty() {
        return Ok(Vec::new());
    }
    let project = job.scope.project.clone();
    let present = effect(ctx, "secrets", || crew.vault.names(&project)).await?;
    let mut missing = Vec::new();
    for (name, description) in needed {
        if job.secrets.iter().any(|handle| handle.name == name)
            || missing.iter().any(|(known, _)| *known == name)
        {
            continue;
        }
        if !present.contains(&name) {
            missing.push((name, description));
            continue;
        }
        let handle = effect(ctx, "grant", || crew.vault.grant(&project, &name)).await?;
        job.secrets.push(handle);
        job.scope.tell(ctx, Event::SecretGranted { name })?;
    }
    Ok(missing)
}

/// Says what is missing, who can give it, and how; a value never comes as an answer.
fn question(job: &Job, missing: &[(String, String)]) -> OpenWait {
    let slug = job
        .slug
        .as_ref()
        .map_or_else(|| job.scope.project.to_string(), ToString::to_string);
    let mut text = "**The service needs secrets that only you have.**\n".to_owned();
    for (name, description) in missing {
        let _ = write!(
            text,
            "\n- `{name}`: {}\n  Give it with `artel secrets set {slug} {name}`, or send `/secret {name}` here.",
            person::sentence(description)
        );
    }
    text.push_str("\n\nNever send a value as an ordinary message. The work goes on by itself when everything is there.");
    OpenWait {
        id: WaitId::new(""),
        kind: WaitKind::Secret,
        question: text,
        options: vec![
            Choice::new(person::CHECK, "It is set"),
            Choice::new(person::GIVE_UP, "Give up"),
        ],
        free_text: false,
        audience: Audience::Owner,
    }
}
