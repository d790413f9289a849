//! Doing the work on a data folder: runs, projections, errands, workers, the bot. Alone, one process does all of it; see
//! [`crate::home`]. On PostgreSQL and Redis any number of processes do parts of it, and leases in the database say who does what
//! only one may do at a time.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use graph::{Keep, RetentionPolicy, ServeOptions, SweepOptions};
use ports::WorkerModels;
use protocol::Transport;
use sandbox::Sandbox;
use spawner::runtime::{Containers, DockerOptions, Local, Runtime, Warm};
use spawner::{GitTokens, HostToken, NoTokens, Spawner};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::bus;
use crate::config::Config;
use crate::errands::Runner;
use crate::health::{self, Needs};
use crate::home::neighbours::{Part, Present, own_name};
use crate::home::{Held, Home};
use crate::lead::lead;
use crate::watch::Watch;

/// Threads that run at the same time.
const CONCURRENCY: usize = 16;
/// How long a run's lease holds without renewal: after so long another host takes over from one that vanished.
const LEASE: Duration = Duration::from_secs(15);
/// How many of the newest steps of a thread stay, however old they are.
const STEPS_KEPT: u64 = 100;
/// The name of the spawner in this process.
const SPAWNER: &str = "local";
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

/// Parts that go on beside each other until they are told to stop.
struct Parts {
    shutdown: CancellationToken,
    running: JoinSet<(&'static str, anyhow::Result<()>)>,
}

impl Parts {
    fn new(shutdown: CancellationToken) -> Self {
        Self {
            shutdown,
            running: JoinSet::new(),
        }
    }

    fn add<F, Fut>(&mut self, name: &'static str, run: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let run = run(self.shutdown.clone());
        self.running.spawn(async move { (name, run.await) });
    }

    /// Comes back when a part ends.
    async fn ended(&mut self) -> Option<(&'static str, anyhow::Result<()>)> {
        Some(match self.running.join_next().await? {
            Ok(ended) => ended,
            Err(error) => {
                let error = anyhow::anyhow!(error).context("a part of the program panicked");
                ("panicked", Err(error))
            }
        })
    }
}

/// What a spawner in this process needs.
pub struct Workers {
    /// The data folder.
    pub home: PathBuf,
    /// Where workers run.
    pub runtime: Arc<dyn Runtime>,
    /// Where jobs come from.
    pub transport: Arc<dyn Transport>,
    /// Who answers them.
    pub models: Arc<dyn WorkerModels>,
    /// Whence credentials for repositories elsewhere come.
    pub tokens: Arc<dyn GitTokens>,
    /// At a time.
    pub max: usize,
    /// What they may use together.
    pub capacity: spawner::Capacity,
    /// How their workspaces are kept small.
    pub disk: spawner::Disk,
}

/// The credentials that the configuration has for repositories elsewhere.
pub fn git_tokens(config: &Config) -> Arc<dyn GitTokens> {
    let github = config
        .github_token
        .as_ref()
        .and_then(|token| HostToken::github(&config.github_api_url, token.expose().to_owned()));
    match github {
        Some(token) => Arc::new(token),
        None => Arc::new(NoTokens),
    }
}

/// What all workers of this machine may use together.
pub fn capacity(config: &Config) -> spawner::Capacity {
    let waiting = config.docker_runtime.as_ref().map_or(0, |_| config.warm);
    spawner::Capacity::detect(config.worker_cpus, config.worker_memory_mb, waiting)
}

impl Workers {
    /// Those of a program that has everything.
    async fn of(app: &App, transport: Arc<dyn Transport>) -> anyhow::Result<Self> {
        let home = app.home.path();
        Ok(Self {
            home: home.to_owned(),
            runtime: runtime(&app.config, home, &app.sandbox, &app.program).await?,
            transport,
            models: app.worker_models.clone(),
            tokens: git_tokens(&app.config),
            max: app.config.max_workers,
            capacity: capacity(&app.config),
            disk: app.config.worker_disk,
        })
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
        if app.is_shared() {
            let mut work = Self::join(&app.home, held, part)?;
            let transport = work.neighbourly(app).await?;
            work.runner(app);
            work.scheduler(app, transport.clone());
            work.spawner(Workers::of(app, transport).await?)?;
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
        work.spawner(Workers::of(app, transport).await?)?;
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
        let name = match &self.present {
            Some(_) => self.owner.clone(),
            None => SPAWNER.to_owned(),
        };
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
        options.name = name;
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

/// Where workers run, as the configuration says.
pub async fn runtime(
    config: &Config,
    home: &Path,
    sandbox: &Sandbox,
    program: &Path,
) -> anyhow::Result<Arc<dyn Runtime>> {
    Ok(match containers(config, home).await? {
        Some(containers) => Arc::new(containers),
        None => Arc::new(Local::new(sandbox.clone(), program)),
    })
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
        warm: Warm {
            count: config.warm,
            limits: (&config.policy()?.limits).into(),
        },
    };
    let containers = Containers::connect(options).await;
    let containers = containers.with_context(|| {
        if config.is_default("SPAWNER_RUNTIME") {
            format!("workers cannot run in Docker with {runtime}, the default of the full size; SPAWNER_RUNTIME=bubblewrap has them run in a sandbox of this machine")
        } else {
            format!("workers cannot run in Docker (SPAWNER_RUNTIME={runtime})")
        }
    })?;
    Ok(Some(containers))
}

/// The name under which a process has leases that works on a data folder alone.
fn alone(home: &Home) -> String {
    format!("home:{}", home.path().display())
}

/// Lets go of what processes held that died on this data folder, so that nobody waits for their leases to run out.
async fn bury_the_dead(app: &App) -> anyhow::Result<()> {
    let home = app.home.clone();
    for gone in tokio::task::spawn_blocking(move || home.gone()).await?? {
        let runs = app.engine.checkpointer().break_leases(&gone.name).await?;
        let leases = app.store.bury_process(&gone.name).await?;
        let messages = match app.bus.transport() {
            Some(transport) => transport.abandon(&gone.name).await?,
            None => 0,
        };
        tracing::warn!(
            process = gone.name,
            runs,
            ?leases,
            messages,
            "{} died; what it held is free",
            gone.name
        );
        gone.forget();
    }
    Ok(())
}

/// The same for a process without a database: the jobs that a spawner held which died on this data folder are offered again at
/// once, and its workers adopted, if they outlived it.
async fn take_over_jobs(home: &Home, transport: &Arc<dyn Transport>) -> anyhow::Result<()> {
    let home = home.clone();
    for gone in tokio::task::spawn_blocking(move || home.gone()).await?? {
        let messages = transport.abandon(&gone.name).await?;
        tracing::warn!(
            process = gone.name,
            messages,
            "{} died; the jobs that it held are free",
            gone.name
        );
        // What others held besides jobs is found by whoever has the database.
        if gone
            .name
            .starts_with(&format!("{}-", Part::Spawner.as_str()))
        {
            gone.forget();
        }
    }
    Ok(())
}

/// What one process at a time does for all.
fn schedule(app: &App, transport: &Arc<dyn Transport>, parts: &mut Parts) {
    parts.add("projections", projections(app.clone()));
    let errands = Runner {
        desk: app.errands.clone(),
        forge: app.forge.clone(),
        deployer: Arc::new(app.deployer.clone()),
        engine: app.engine.clone(),
    };
    parts.add("errands", |token| async move {
        errands.run(token).await;
        Ok(())
    });
    let tally = app.bus.tally().cloned();
    let watch = Watch {
        store: app.store.clone(),
        transport: transport.clone(),
        tally: tally.clone(),
        patience: app.worker_patience,
    };
    parts.add("watch", |token| async move {
        watch.run(token).await;
        Ok(())
    });
    let (results, engine) = (transport.clone(), app.engine.clone());
    parts.add("results", |token| async move {
        bus::deliver_results(results, engine, tally, token).await;
        Ok(())
    });
}

/// Starts services again that died.
async fn reconcile(app: &App) {
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

#[cfg(test)]
mod tests {
    use graph::{
        Context, END, Engine, Graph, HistoryFilter, START, SqliteCheckpointer, StartOptions, State,
    };
    use serde::{Deserialize, Serialize};

    use super::*;

    #[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
    struct Counter {
        n: u64,
    }

    /// 150 steps.
    async fn engine(path: &Path) -> Engine {
        let graph = Graph::<Counter>::builder("count")
            .node("up", |state: Arc<Counter>, _: Context| async move {
                Ok(CounterUpdate::default().n(state.n + 1))
            })
            .edge(START, "up")
            .conditional(
                "up",
                ["up", END],
                |state: &Counter| {
                    if state.n < 150 { "up" } else { END }
                },
            )
            .compile()
            .unwrap();
        let store = Arc::new(SqliteCheckpointer::open(path).await.unwrap());
        Engine::builder(store).graph(graph).build().await.unwrap()
    }

    async fn steps(engine: &Engine) -> usize {
        let all = HistoryFilter {
            limit: Some(1000),
            ..HistoryFilter::default()
        };
        engine.history("t", all).await.unwrap().len()
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn whoever_runs_threads_forgets_their_old_steps() {
        let folder = tempfile::tempdir().unwrap();
        let engine = engine(&folder.path().join("threads.db")).await;
        engine
            .start("t", "count", &(), StartOptions::default())
            .await
            .unwrap();
        engine.run_due(ServeOptions::default()).await.unwrap();
        // The input, and what came of it.
        assert_eq!(steps(&engine).await, 151);
        // Everything stays if that is said, and else what is younger than is said.
        assert!(serving("test".to_owned(), None).sweep.is_none());
        let month = serving("test".to_owned(), Some(Duration::from_hours(24 * 30)));
        let policy = month.sweep.unwrap().policy;
        let swept = engine.sweep(&policy, None).await.unwrap();
        assert_eq!((swept.seen, swept.checkpoints), (1, 0));
        // The newest hundred, and the input, which is never forgotten.
        let kept = 101;
        // As if all of it were old. It looks again and again, however the thread comes to lie there.
        let mut options = serving("test".to_owned(), Some(Duration::ZERO));
        options.sweep.as_mut().unwrap().every = Duration::from_millis(50);
        let stop = CancellationToken::new();
        let server = tokio::spawn({
            let (engine, stop) = (engine.clone(), stop.clone());
            async move { engine.serve(options, stop).await }
        });
        tokio::time::timeout(Duration::from_mins(1), async {
            while steps(&engine).await > kept {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        })
        .await
        .expect("it sweeps by itself");
        stop.cancel();
        server.await.unwrap().unwrap();
        assert_eq!(steps(&engine).await, kept);
        assert_eq!(engine.state::<Counter>("t").await.unwrap().n, 150);
    }
}
