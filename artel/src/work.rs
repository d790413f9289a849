//! Doing the work on a data folder: runs, projections, errands, workers, the bot. One process at a time does it; see
//! [`crate::home`].

use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use graph::ServeOptions;
use spawner::Spawner;
use spawner::runtime::{Containers, DockerOptions, Local, Runtime};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::bus;
use crate::config::Config;
use crate::errands::Runner;
use crate::home::Held;

/// Threads that run at the same time.
const CONCURRENCY: usize = 16;
/// How long a run's lease holds without renewal: after so long another host takes over from one that vanished.
const LEASE: Duration = Duration::from_secs(15);
/// The name of the spawner in this process.
const SPAWNER: &str = "local";
/// How long everything has to come to an end when it is told to.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the projections wait for news that nobody announced.
const PATIENCE: Duration = Duration::from_secs(1);

/// The work, going on until it is told to stop.
pub struct Work {
    shutdown: CancellationToken,
    parts: JoinSet<(&'static str, anyhow::Result<()>)>,
    /// Whether this goes on until it is told to stop, and not only until one command has what it wants.
    lasting: Arc<AtomicBool>,
    /// Given back last.
    held: Held,
}

impl Work {
    /// Starts the work. `held` proves that nobody else does it.
    pub async fn start(app: &App, held: Held) -> anyhow::Result<Self> {
        app.ready_to_work()?;
        let shutdown = CancellationToken::new();
        let mut work = Self {
            shutdown: shutdown.clone(),
            parts: JoinSet::new(),
            lasting: Arc::default(),
            held,
        };

        let transport = app.bus.open(app.home.join("bus")).await?;
        let owner = format!("home:{}", app.home.path().display());
        // Whoever held leases under this name died without giving them back: the lock is ours.
        app.engine.checkpointer().break_leases(&owner).await?;
        app.store.break_leases().await?;

        let engine = app.engine.clone();
        let options = ServeOptions {
            concurrency: CONCURRENCY,
            lease: LEASE,
            owner,
            drain: DRAIN / 2,
            ..ServeOptions::default()
        };
        work.part("runner", |token| async move {
            Ok(engine.serve(options, token).await?)
        });
        work.part("projections", projections(app.clone()));
        let (home, lasting) = (app.home.path().to_owned(), work.lasting.clone());
        work.part("disk", |token| crate::disk::watch(home, lasting, token));
        let errands = Runner {
            desk: app.errands.clone(),
            forge: app.forge.clone(),
            deployer: Arc::new(app.deployer.clone()),
            engine: app.engine.clone(),
        };
        work.part("errands", |token| async move {
            errands.run(token).await;
            Ok(())
        });
        let (results, engine) = (transport.clone(), app.engine.clone());
        work.part("results", |token| async move {
            bus::deliver_results(results, engine, token).await;
            Ok(())
        });
        let runtime: Arc<dyn Runtime> = match containers(&app.config, app.home.path()).await? {
            Some(containers) => Arc::new(containers),
            None => Arc::new(Local::new(app.sandbox.clone(), &app.program)),
        };
        tracing::info!("workers: {}", runtime.describe());
        let spawner = Spawner::new(spawner::Options {
            home: app.home.path().to_owned(),
            runtime,
            transport: transport.clone(),
            models: app.worker_models.clone(),
            max_workers: app.config.max_workers,
            name: SPAWNER.to_owned(),
            continue_trace: telemetry::set_parent,
        })?;
        let handle = spawner.handle();
        work.part(
            "spawner",
            |token| async move { Ok(spawner.run(token).await?) },
        );
        let vault = app.vault.clone();
        work.part("secrets", |token| async move {
            // Another process may have stored one; the redactor has to know it.
            while tokio::time::timeout(PATIENCE * 2, token.cancelled())
                .await
                .is_err()
            {
                if let Err(error) = vault.refresh().await {
                    tracing::error!(%error, "new secrets cannot be read, so they are not redacted");
                }
            }
            Ok(())
        });
        if cfg!(debug_assertions) {
            work.part("worker crash point", |token| {
                worker_crash_point(handle, token)
            });
        }

        for (project, found) in app.deployer.reconcile().await {
            match found {
                deploy::Reconciled::Started => {
                    tracing::info!(%project, "a service that had died was started again");
                }
                deploy::Reconciled::Failed(failure) => {
                    tracing::error!(%project, %failure, "a service could not be started again");
                }
                _ => {}
            }
        }
        Ok(work)
    }

    /// From now on this goes on until it is told to stop: what a command would give up is waited for.
    pub fn lasts(&self) {
        self.lasting.store(true, Ordering::Relaxed);
    }

    /// Starts one more part.
    pub fn part<F, Fut>(&mut self, name: &'static str, run: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let run = run(self.shutdown.clone());
        self.parts.spawn(async move { (name, run.await) });
    }

    /// Starts the bot.
    pub async fn bot(&mut self, app: &App) -> anyhow::Result<()> {
        let Some(token) = &app.config.telegram_bot_token else {
            return Ok(());
        };
        let options = bot::Options {
            token: token.expose().to_owned(),
            server: app.config.telegram_api_url.clone(),
            allowed_users: app.config.allowed_users.clone(),
            admin_chats: app.config.admin_chat_ids.clone(),
            tape: app.tape.clone(),
        };
        let bot = bot::Bot::new(
            options,
            app.store.clone(),
            app.desk.clone(),
            app.moved.clone(),
        )
        .await?;
        self.part("bot", |token| async move { Ok(bot.run(token).await?) });
        Ok(())
    }

    /// Comes back when a part ends before it was told to, with what it said.
    pub async fn broken(&mut self) -> anyhow::Error {
        match self.parts.join_next().await {
            Some(Ok((name, Ok(())))) => anyhow::anyhow!("the part {name} ended by itself"),
            // It says all there is to say.
            Some(Ok(("disk", Err(error)))) => error,
            Some(Ok((name, Err(error)))) => error.context(format!("the part {name} ended")),
            Some(Err(error)) => anyhow::anyhow!(error).context("a part of the program panicked"),
            None => anyhow::anyhow!("nothing is left to do"),
        }
    }

    /// What a part said that ended before it was told to, if one did by now.
    pub async fn ended(&mut self) -> Option<anyhow::Error> {
        tokio::select! {
            biased;
            error = self.broken() => Some(error),
            () = std::future::ready(()) => None,
        }
    }

    /// Stops everything, within a bound. Services that were deployed go on.
    pub async fn stop(mut self) {
        self.shutdown.cancel();
        let all = async {
            while let Some(ended) = self.parts.join_next().await {
                match ended {
                    Ok((_, Ok(()))) => {}
                    Ok((name, Err(error))) => tracing::error!(part = name, "{error:#}"),
                    Err(error) => tracing::error!(%error, "a part panicked"),
                }
            }
        };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            tracing::warn!(
                "not everything came to an end in {} s; it goes on with the next start",
                DRAIN.as_secs()
            );
        }
        drop(self.held);
    }
}

/// Workers in Docker, if the configuration says so.
pub(crate) async fn containers(config: &Config, home: &Path) -> anyhow::Result<Option<Containers>> {
    let Some(runtime) = &config.docker_runtime else {
        return Ok(None);
    };
    let options = DockerOptions {
        host: Some(config.docker_host.clone()),
        runtime: runtime.clone(),
        image: config.worker_image.clone(),
        spawner: SPAWNER.to_owned(),
        home: home.to_owned(),
    };
    let containers = Containers::connect(options).await;
    let containers = containers
        .with_context(|| format!("workers cannot run in Docker (SPAWNER_RUNTIME={runtime})"))?;
    Ok(Some(containers))
}

/// Keeps the projections up to date.
fn projections(
    app: App,
) -> impl FnOnce(CancellationToken) -> std::pin::Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>
{
    move |token| {
        Box::pin(async move {
            let journal = app.engine.journal();
            loop {
                let cursor = match app.books.catch_up().await {
                    Ok(cursor) => {
                        app.moved.notify_waiters();
                        cursor
                    }
                    Err(error) => {
                        tracing::error!(%error, "the projections could not be brought up to date");
                        app.books.journal().end().await.unwrap_or_default()
                    }
                };
                tokio::select! {
                    () = token.cancelled() => return Ok(()),
                    changed = journal.changed(cursor, PATIENCE) => {
                        if let Err(error) = changed {
                            tracing::error!(%error, "the journal cannot be read");
                            tokio::time::sleep(PATIENCE).await;
                        }
                    }
                }
            }
        })
    }
}

/// Dies while a worker runs, if this run is told to.
async fn worker_crash_point(
    spawner: spawner::Handle,
    token: CancellationToken,
) -> anyhow::Result<()> {
    if std::env::var_os("ARTEL_CRASH_FILE").is_none() {
        token.cancelled().await;
        return Ok(());
    }
    let mut tick = tokio::time::interval(Duration::from_millis(2));
    loop {
        tokio::select! {
            () = token.cancelled() => return Ok(()),
            _ = tick.tick() => {}
        }
        if spawner.running() > 0 {
            crate::crash::at("worker-running", "/a-worker", "spawner");
        }
    }
}
