//! Processes that go on until they are told to stop, and do one part of the work: `artel runner`, `scheduler`, `bot`, `spawner`;
//! and what they share with `artel up`.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::app::{self, Minds};
use crate::config::{self, Mode};
use crate::health::Needs;
use crate::home::neighbours::Part;
use crate::home::{Held, Home};
use crate::words;
use crate::work::{Work, Workers, capacity, git_tokens, runtime};

use super::Context;

/// How often a process that waits to take over looks whether it can.
const LOOK: Duration = Duration::from_millis(200);

/// SIGINT or SIGTERM.
pub(super) struct Stop(CancellationToken);

impl Stop {
    /// Listens from now on.
    pub(super) fn listen() -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let (mut interrupt, mut terminate) = (
            signal(SignalKind::interrupt())?,
            signal(SignalKind::terminate())?,
        );
        let told = stop.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
            told.cancel();
        });
        Ok(Self(stop))
    }
}

/// The right to do the work, alone or with others, after whoever does it alone now; `None` when told to stop before.
pub(super) async fn right(
    context: &Context,
    home: &Home,
    shared: bool,
    stop: &Stop,
) -> anyhow::Result<Option<Held>> {
    let mut said = false;
    loop {
        let held = if shared {
            home.join_work()?
        } else {
            home.take_work()?
        };
        if let Some(held) = held {
            return Ok(Some(held));
        }
        if !said {
            let text = format!(
                "another artel does the work on {}; this one takes over when it ends",
                home.path().display()
            );
            context.say(&serde_json::json!({ "note": text }), &text);
            said = true;
        }
        tokio::select! {
            () = stop.0.cancelled() => return Ok(None),
            () = tokio::time::sleep(LOOK) => {}
        }
    }
}

/// Goes on until it is told to stop, or a part ends before.
pub(super) async fn until_told(mut work: Work, stop: &Stop) -> anyhow::Result<u8> {
    let broken = tokio::select! {
        () = stop.0.cancelled() => None,
        error = work.broken() => Some(error),
    };
    work.stop().await;
    match broken {
        None => Ok(0),
        Some(error) => Err(error),
    }
}

/// Says that a part has begun.
async fn begun(context: &Context, work: &mut Work, part: Part, needs: Needs) -> anyhow::Result<()> {
    let home = needs.home.path().display().to_string();
    let health = format!("{}/health", work.health(&context.config, needs).await?);
    let (version, part) = (env!("CARGO_PKG_VERSION"), part.as_str());
    let name = work.owner();
    context.say(
        &serde_json::json!({part: true, "name": name, "version": version, "home": home, "health": health}),
        &format!("artel {version} {part} {name} is up on {home}, health at {health}"),
    );
    Ok(())
}

/// A process with a database does `part`.
async fn part(context: &Context, part: Part) -> anyhow::Result<u8> {
    let app = context.app().await?;
    let stop = Stop::listen()?;
    let Some(held) = right(context, &app.home, true, &stop).await? else {
        return Ok(0);
    };
    let mut work = Work::join(&app.home, held, part)?;
    work.lasts();
    let transport = work.neighbourly(&app).await?;
    match part {
        Part::Runner => {
            app.ready_to_ask()?;
            work.runner(&app);
        }
        Part::Bot => {
            work.bot(&app).await?;
            super::up::say_pairing_code(context, &app).await?;
        }
        _ => {
            app.ready_to_work()?;
            work.scheduler(&app, transport);
        }
    }
    begun(context, &mut work, part, app.needs()).await?;
    until_told(work, &stop).await
}

/// `artel runner`.
pub(super) async fn runner(context: &Context) -> anyhow::Result<u8> {
    part(context, Part::Runner).await
}

/// `artel scheduler`.
pub(super) async fn scheduler(context: &Context) -> anyhow::Result<u8> {
    part(context, Part::Scheduler).await
}

/// `artel bot`.
pub(super) async fn bot(context: &Context) -> anyhow::Result<u8> {
    part(context, Part::Bot).await
}

/// `artel spawner`, and the program `spawner`: no database, no journal.
pub(super) async fn spawner(context: &Context) -> anyhow::Result<u8> {
    let config = &context.config.of_spawner();
    let Some(redis) = &config.redis_url else {
        return Err(config::Error::Missing("REDIS_URL is not set".to_owned()).into());
    };
    let tokens = git_tokens(config)?;
    let home = Home::open(&config.home)?;
    let minds = Minds::of(config, &context.redactor).await?;
    if let Some(unclear) = &minds.unclear {
        return Err(config::Error::Missing(unclear.clone()).into());
    }
    let may_be_unconfined = minds.shipped && config.mode != Mode::Full;
    let (sandbox, unconfined) = app::confinement(may_be_unconfined, &home);
    if config.docker_runtime.is_none() {
        app::confined(&sandbox)?;
    }
    if !minds.shipped {
        app::mark_foreign(&home)?;
    }
    let stop = Stop::listen()?;
    let Some(held) = right(context, &home, true, &stop).await? else {
        return Ok(0);
    };
    let mut work = Work::join(&home, held, Part::Spawner)?;
    let transport = crate::bus::redis(redis, Some(work.owner())).await?;
    work.watch_spawners(&home, &transport).await?;
    work.lasts();
    work.disk(&home);
    let name = work.owner().to_owned();
    work.spawner(Workers {
        home: home.path().to_owned(),
        runtime: runtime(config, home.path(), &name, &sandbox, &app::own_program()?).await?,
        name,
        transport: transport.clone(),
        models: minds.for_workers()?,
        tokens,
        max: config.max_workers,
        capacity: capacity(config),
        disk: config.worker_disk,
    })?;
    let needs = Needs {
        home,
        journal: None,
        transport: Some(transport),
    };
    begun(context, &mut work, Part::Spawner, needs).await?;
    if let Some(reason) = unconfined.filter(|_| config.docker_runtime.is_none()) {
        let text = format!(
            "Workers run UNCONFINED, with all your rights: {reason}. Only the tape that ships with Artel may do so."
        );
        context.say(&serde_json::json!({ "note": text }), &text);
    }
    until_told(work, &stop).await
}

/// `artel health`: exit code 1 when the process at ARTEL_HTTP_ADDR is not ready, or is not there.
pub(super) async fn health(context: &Context) -> anyhow::Result<u8> {
    let (ready, said) = crate::health::ask(context.config.http_addr).await?;
    words::say(&said);
    Ok(u8::from(!ready))
}
