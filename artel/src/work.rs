//! Doing the work on a data folder: runs, projections, errands, workers, the bot. Alone, one process does all of it; see
//! [`crate::home`]. On PostgreSQL and Redis any number of processes do parts of it, and leases in the database say who does what
//! only one may do at a time.

mod dead;
mod parts;
mod schedule;
#[cfg(test)]
mod tests;
mod workers;

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use graph::{Keep, RetentionPolicy, ServeOptions, SweepOptions};
use protocol::Transport;
use spawner::Spawner;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::config::Config;
use crate::health::{self, Needs};
use crate::home::neighbours::{Part, Present, own_name};
use crate::home::{Held, Home};
use crate::lead::lead;

use self::dead::{alone, bury_the_dead, take_over_jobs};
use self::parts::Parts;
use self::schedule::{projections, reconcile, schedule};
use self::workers::SPAWNER;
pub use self::workers::{Workers, capacity, containers, git_tokens, runtime};

/// Threads that run at the same time.
const CONCURRENCY: usize = 16;
/// How long a run's lease holds without renewal: after so long another host takes over from one that vanished.
const LEASE: Duration = Duration::from_secs(15);
/// How many of the newest steps of a thread stay, however old they are.
const STEPS_KEPT: u64 = 100;
/// How long everything has to come to an end when it is told to.
const DRAIN: Duration = Duration::from_secs(10);
/// How long the projections wait for news that nobody announced.
const PATIENCE: Duration = Duration::from_secs(1);

/// How threads are run, and what is forgotten of them from time to time: steps that are older than this.
fn serving(owner: String, history: Option<Duration>) -> ServeOptions {
    let sweep = history.map(|age| {
        SweepOptions::new(RetentionPolicy {
            keep: Keep {
                last: Some(STEPS_KEPT),
                newer_than: Some(age),
            },
            forget_keys_after: Some(age),
            ..RetentionPolicy::default()
        })
    });
    ServeOptions {
        concurrency: CONCURRENCY,
        lease: LEASE,
        owner,
        drain: DRAIN / 2,
        sweep,
        ..ServeOptions::default()
    }
}

/// The work, going on until it is told to stop.
pub struct Work {
    parts: Parts,
    /// Whether this goes on until it is told to stop, and not only until one command has what it wants.
    lasting: Arc<AtomicBool>,
    /// The name under which this process has leases.
    owner: String,
    /// Shows the neighbours that we live. Taken back before the right to work.
    present: Option<Present>,
    /// Given back last.
    held: Held,
}

impl Work {
    /// All of the work. `held` proves that nobody else does it, or that all who do it share it.
    pub async fn start(app: &App, held: Held, part: Part) -> anyhow::Result<Self> {
        app.ready_to_work()?;
        let tokens = git_tokens(&app.config)?;
        if app.is_shared() {
            let mut work = Self::join(&app.home, held, part)?;
            let transport = work.neighbourly(app).await?;
            work.runner(app);
            work.scheduler(app, transport.clone());
            let name = work.owner.clone();
            work.spawner(Workers::of(app, transport, tokens, &name).await?)?;
            return Ok(work);
        }
        let owner = alone(&app.home);
        let mut work = Self::new(held, owner, None);
        let transport = app.bus.open(app.home.join("bus"), None).await?;
        // Whoever held leases under this name died without giving them back: the lock is ours.
        app.engine.checkpointer().break_leases(&work.owner).await?;
        app.store.break_leases().await?;
        bury_the_dead(app).await?;

        work.runner(app);
        schedule(app, &transport, &mut work.parts);
        work.spawner(Workers::of(app, transport, tokens, SPAWNER).await?)?;
        work.household(app);
        reconcile(app).await;
        Ok(work)
    }

    fn new(held: Held, owner: String, present: Option<Present>) -> Self {
        Self {
            parts: Parts::new(CancellationToken::new()),
            lasting: Arc::default(),
            owner,
            present,
            held,
        }
    }

    /// A part of the work, to which nothing belongs yet. `held` proves that nobody does it alone.
    pub fn join(home: &Home, held: Held, part: Part) -> anyhow::Result<Self> {
        let name = own_name(part);
        let present = home.appear(&name)?;
        Ok(Self::new(held, name, Some(present)))
    }

    /// What every process does that shares a database: opens the bus, looks after its neighbours and itself.
    pub async fn neighbourly(&mut self, app: &App) -> anyhow::Result<Arc<dyn Transport>> {
        let name = Some(self.owner.as_str());
        let transport = app.bus.open(app.home.join("bus"), name).await?;
        // Whoever worked here alone is dead: we could not share the lock otherwise.
        let alone = alone(&app.home);
        app.engine.checkpointer().break_leases(&alone).await?;
        bury_the_dead(app).await?;
        let neighbour = app.clone();
        self.part("neighbours", |token| async move {
            while tokio::time::timeout(PATIENCE, token.cancelled())
                .await
                .is_err()
            {
                if let Err(error) = bury_the_dead(&neighbour).await {
                    tracing::warn!("it cannot be seen who of the neighbours died: {error:#}");
                }
            }
            Ok(())
        });
        self.household(app);
        Ok(transport)
    }

    /// What a spawner does for its neighbours, now and from time to time.
    pub async fn watch_spawners(
        &mut self,
        home: &Home,
        transport: &Arc<dyn Transport>,
    ) -> anyhow::Result<()> {
        take_over_jobs(home, transport).await?;
        let (home, transport) = (home.clone(), transport.clone());
        self.part("neighbours", |token| async move {
            while tokio::time::timeout(PATIENCE, token.cancelled())
                .await
                .is_err()
            {
                if let Err(error) = take_over_jobs(&home, &transport).await {
                    tracing::warn!("it cannot be seen who of the neighbours died: {error:#}");
                }
            }
            Ok(())
        });
        Ok(())
    }

    /// The name under which this process has leases.
    pub fn owner(&self) -> &str {
        &self.owner
    }

    /// What every process does that has a database.
    fn household(&mut self, app: &App) {
        self.disk(&app.home);
        let vault = app.vault.clone();
        self.part("secrets", |token| async move {
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
    }

    /// Watches the disk.
    pub fn disk(&mut self, home: &Home) {
        let (home, lasting) = (home.path().to_owned(), self.lasting.clone());
        self.part("disk", |token| crate::disk::watch(home, lasting, token));
    }

    /// Answers questions about health; gives where.
    pub async fn health(&mut self, config: &Config, needs: Needs) -> anyhow::Result<String> {
        let (listener, address) = health::listen(config).await?;
        self.part("health", |token| health::serve(listener, needs, token));
        Ok(format!("http://{address}"))
    }

    /// Runs threads.
    pub fn runner(&mut self, app: &App) {
        let engine = app.engine.clone();
        let options = serving(self.owner.clone(), app.config.history);
        self.part("runner", |token| async move {
            Ok(engine.serve(options, token).await?)
        });
    }

    /// Does what one process at a time does for all, as soon as nobody else does it.
    pub fn scheduler(&mut self, app: &App, transport: Arc<dyn Transport>) {
        let (app, owner) = (app.clone(), self.owner.clone());
        self.part("scheduler", |token| async move {
            let store = app.store.clone();
            lead(store, store::SCHEDULER, owner, token, |token| {
                let (app, transport) = (app.clone(), transport.clone());
                async move {
                    let mut parts = Parts::new(token.clone());
                    schedule(&app, &transport, &mut parts);
                    parts.add("services", |token| async move {
                        reconcile(&app).await;
                        token.cancelled().await;
                        Ok(())
                    });
                    let first = parts.ended().await;
                    let told = token.is_cancelled();
                    token.cancel();
                    while parts.ended().await.is_some() {}
                    match first {
                        Some((name, Ok(()))) if !told => {
                            Err(anyhow::anyhow!("the part {name} ended by itself"))
                        }
                        Some((name, Err(error))) => {
                            Err(error.context(format!("the part {name} ended")))
                        }
                        _ => Ok(()),
                    }
                }
            })
            .await
        });
    }

    /// Runs workers.
    pub fn spawner(&mut self, workers: Workers) -> anyhow::Result<()> {
        tracing::info!("workers: {}", workers.runtime.describe());
        let mut options = spawner::Options::new(
            workers.home,
            workers.runtime,
            workers.transport,
            workers.models,
        );
        options.tokens = workers.tokens;
        options.max_workers = workers.max;
        options.capacity = workers.capacity;
        options.disk = workers.disk;
        options.name = workers.name;
        options.continue_trace = telemetry::set_parent;
        let spawner = Spawner::new(options)?;
        let handle = spawner.handle();
        self.part(
            "spawner",
            |token| async move { Ok(spawner.run(token).await?) },
        );
        if cfg!(debug_assertions) {
            self.part("worker crash point", |token| {
                worker_crash_point(handle, token)
            });
        }
        Ok(())
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
        self.parts.add(name, run);
    }

    /// Speaks with people over Telegram, if there is a token; shared, as soon as nobody else does.
    pub async fn bot(&mut self, app: &App) -> anyhow::Result<()> {
        if app.config.telegram_bot_token.is_none() {
            return Ok(());
        }
        if self.present.is_none() {
            let bot = telegram(app).await?;
            self.part("bot", |token| async move { Ok(bot.run(token).await?) });
            return Ok(());
        }
        let (app, owner) = (app.clone(), self.owner.clone());
        self.part("bot", |token| async move {
            let store = app.store.clone();
            lead(store, store::BOT, owner, token, |token| {
                let app = app.clone();
                async move {
                    let bot = telegram(&app).await?;
                    // The sender is rung when projections move on, and they may move in another process. It is rung until
                    // the bot has ended.
                    let news = CancellationToken::new();
                    let _news = news.clone().drop_guard();
                    tokio::select! {
                        ended = bot.run(token) => Ok(ended?),
                        moved = projections(app)(news) => moved,
                    }
                }
            })
            .await
        });
        Ok(())
    }

    /// Comes back when a part ends before it was told to, with what it said.
    pub async fn broken(&mut self) -> anyhow::Error {
        match self.parts.ended().await {
            Some((name, Ok(()))) => anyhow::anyhow!("the part {name} ended by itself"),
            // They say all there is to say.
            Some(("disk" | "panicked", Err(error))) => error,
            Some((name, Err(error))) => error.context(format!("the part {name} ended")),
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
        self.parts.shutdown.cancel();
        let all = async {
            while let Some((name, ended)) = self.parts.ended().await {
                if let Err(error) = ended {
                    tracing::error!(part = name, "{error:#}");
                }
            }
        };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            tracing::warn!(
                "not everything came to an end in {} s; it goes on with the next start",
                DRAIN.as_secs()
            );
        }
        drop(self.present);
        drop(self.held);
    }
}

/// The Telegram front end. There is a token.
async fn telegram(app: &App) -> anyhow::Result<bot::Bot> {
    let token = app.config.telegram_bot_token.as_ref();
    let options = bot::Options {
        token: token.map_or_else(String::new, |token| token.expose().to_owned()),
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
    Ok(bot)
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
