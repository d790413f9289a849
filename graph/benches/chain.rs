//! The engine against the limit of its database: how many supersteps a second it takes on each of them, beside how many
//! one-row commits a second `pgbench` makes on the same server, in the same minutes.
//!
//! A chain of 20 nodes, each of which adds one and appends 64 bytes; every superstep is committed before the next one
//! starts. So many threads at a time as the table says: as soon as one ends the next one is started, and its start and end
//! count as time but not as steps.
//!
//! `ARTEL_TEST_DATABASE_URL` names the server (`make bench` starts one). `ARTEL_BENCH_JSON` names a file for the figures;
//! `ARTEL_BENCH_ROUNDS` and `ARTEL_BENCH_SECONDS` say how long it takes.

#[path = "../tests/storage/mod.rs"]
mod storage;

use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use graph::{
    CompiledGraph, Context, END, Engine, Graph, MemoryCheckpointer, Observer, Point, START,
    ServeOptions, StartOptions, State, ThreadId, ThreadStatus, checkpoint::Checkpointer,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::oneshot, task::JoinSet};
use tokio_util::sync::CancellationToken;

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Nodes of the chain.
const NODES: u64 = 20;
/// What a node appends, in bytes.
const BYTES: usize = 64;
/// Threads at a time, on every contestant.
const THREADS: [usize; 3] = [1, 16, 64];
/// Threads at a time, on PostgreSQL only: more than the limit is measured with.
const CROWD: usize = 256;
/// How long one chain may take before the engine counts as stuck.
const PATIENCE: Duration = Duration::from_mins(1);
/// Threads at a time, the clients whose commits they are compared with, and how many per cent of them it has to be.
const PROMISES: [(usize, usize, f64); 4] = [
    (1, 1, 70.0),
    (16, 16, 80.0),
    (64, 64, 130.0),
    (CROWD, 64, 200.0),
];

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Chain {
    n: u64,
    #[channel(append)]
    log: Vec<String>,
}

fn node_name(index: u64) -> String {
    format!("n{index:02}")
}

fn chain() -> Result<CompiledGraph<Chain>, Failed> {
    let mut builder = Graph::<Chain>::builder("chain");
    for index in 0..NODES {
        builder = builder.node(
            node_name(index),
            |chain: Arc<Chain>, _: Context| async move {
                Ok(ChainUpdate::default()
                    .n(chain.n + 1)
                    .log(vec!["x".repeat(BYTES)]))
            },
        );
    }
    builder = builder.edge(START, node_name(0));
    for index in 1..NODES {
        builder = builder.edge(node_name(index - 1), node_name(index));
    }
    Ok(builder.edge(node_name(NODES - 1), END).compile()?)
}

/// Tells whoever started a thread that its last step has landed.
#[derive(Default)]
struct Ends(Mutex<HashMap<ThreadId, oneshot::Sender<()>>>);

impl Ends {
    fn of(&self, thread: ThreadId) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.0.lock().insert(thread, sender);
        receiver
    }
}

impl Observer for Ends {
    fn on(&self, point: &Point<'_>) {
        let Point::AfterCommit { thread, nodes } = point else {
            return;
        };
        if nodes.iter().any(|node| *node == node_name(NODES - 1))
            && let Some(sender) = self.0.lock().remove(*thread)
        {
            // Nobody listens any more when the bench is being broken off.
            let _ = sender.send(());
        }
    }
}

/// An engine on one database.
#[derive(Clone)]
struct Contestant {
    engine: Engine,
    ends: Arc<Ends>,
    started: Arc<AtomicU64>,
}

impl Contestant {
    async fn on(store: Arc<dyn Checkpointer>) -> Result<Self, Failed> {
        let ends = Arc::new(Ends::default());
        let engine = Engine::builder(store)
            .graph(chain()?)
            .observer(ends.clone())
            .build()
            .await?;
        Ok(Self {
            engine,
            ends,
            started: Arc::default(),
        })
    }

    /// One chain, from its start to its end; gives its thread.
    async fn run_one(&self) -> Result<ThreadId, Failed> {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let thread = ThreadId::from(format!("chain:{number}"));
        let end = self.ends.of(thread.clone());
        self.engine
            .start(
                thread.clone(),
                "chain",
                &ChainUpdate::default(),
                StartOptions::default(),
            )
            .await?;
        match tokio::time::timeout(PATIENCE, end).await {
            Ok(Ok(())) => Ok(thread),
            _ => Err(format!("{thread} did not end within {PATIENCE:?}").into()),
        }
    }

    /// Supersteps a second, with so many threads at a time.
    async fn rate(&self, threads: usize, lasts: Duration) -> Result<f64, Failed> {
        let stop = CancellationToken::new();
        let options = ServeOptions {
            concurrency: threads,
            ..ServeOptions::default()
        };
        let serving = tokio::spawn({
            let (engine, stop) = (self.engine.clone(), stop.clone());
            async move { engine.serve(options, stop).await }
        });
        let begun = Instant::now();
        let mut drivers = JoinSet::new();
        for _ in 0..threads {
            let it = self.clone();
            drivers.spawn(async move {
                let (mut chains, mut last) = (0_u32, None);
                while begun.elapsed() < lasts {
                    last = Some(it.run_one().await?);
                    chains += 1;
                }
                Ok::<_, Failed>((chains, last))
            });
        }
        let (mut chains, mut last) = (0_u32, None);
        while let Some(driver) = drivers.join_next().await {
            let (more, thread) = driver??;
            chains += more;
            last = thread.or(last);
        }
        let took = begun.elapsed();
        stop.cancel();
        serving.await??;
        self.check(last.ok_or("no chain ended")?).await?;
        Ok(f64::from(chains) * f64::from(u32::try_from(NODES)?) / took.as_secs_f64())
    }

    /// Quick is not enough: the steps have been taken.
    async fn check(&self, thread: ThreadId) -> Result<(), Failed> {
        let state: Chain = self.engine.state(thread.clone()).await?;
        let record = self.engine.thread(thread.clone()).await?;
        let status = record.map(|record| record.status);
        let bytes: usize = state.log.iter().map(String::len).sum();
        let appended = usize::try_from(NODES)? * BYTES;
        if status != Some(ThreadStatus::Done) || state.n != NODES || bytes != appended {
            return Err(format!("{thread} is {status:?} with n = {} and {bytes} bytes of log, expected {NODES} and {appended}", state.n).into());
        }
        Ok(())
    }
}

/// One-row commits, each a transaction of its own.
struct CommitLimit {
    program: PathBuf,
    script: PathBuf,
    url: String,
}

impl CommitLimit {
    async fn on(url: &str) -> Result<Self, Failed> {
        let pool = sqlx::PgPool::connect(url).await?;
        sqlx::raw_sql(include_str!("commit_limit_table.sql"))
            .execute(&pool)
            .await?;
        pool.close().await;
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("benches/commit_limit.sql");
        Ok(Self {
            program: pgbench(),
            script,
            url: url.to_owned(),
        })
    }

    /// Commits a second, with so many clients.
    async fn rate(&self, clients: usize, lasts: Duration) -> Result<f64, Failed> {
        let run = tokio::process::Command::new(&self.program)
            .args(["--no-vacuum", "--protocol=prepared", "--jobs=2"])
            .arg(format!("--client={clients}"))
            .arg(format!("--time={}", lasts.as_secs().max(1)))
            .arg("--file")
            .arg(&self.script)
            .arg(&self.url)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(lasts + PATIENCE, run)
            .await
            .map_err(|_| "pgbench does not end")?
            .map_err(|error| format!("{} cannot be run: {error}", self.program.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let rate = text
            .lines()
            .find_map(|line| line.strip_prefix("tps = "))
            .and_then(|rest| rest.split_whitespace().next())
            .and_then(|number| number.parse().ok());
        match rate {
            Some(rate) if output.status.success() => Ok(rate),
            _ => Err(format!(
                "pgbench ({}) said: {text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            )
            .into()),
        }
    }
}

/// On the path, or where Debian keeps the programs of a server.
fn pgbench() -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path().join("bin/pgbench")))
        .filter(|path| path.is_file())
        .collect();
    found.sort();
    found.pop().unwrap_or_else(|| PathBuf::from("pgbench"))
}

/// How the server is set; commits that need not reach the disk would prove nothing.
async fn server(url: &str) -> Result<Value, Failed> {
    let pool = sqlx::PgPool::connect(url).await?;
    let mut settings = serde_json::Map::new();
    for name in [
        "server_version",
        "fsync",
        "synchronous_commit",
        "full_page_writes",
        "shared_buffers",
    ] {
        let (value,): (String,) = sqlx::query_as("select current_setting($1)")
            .bind(name)
            .fetch_one(&pool)
            .await?;
        settings.insert(name.to_owned(), value.into());
    }
    pool.close().await;
    for name in ["fsync", "synchronous_commit"] {
        if settings[name] != "on" {
            return Err(format!("the server has {name} = {}: commits that may get lost are not what is measured here", settings[name]).into());
        }
    }
    Ok(Value::Object(settings))
}

/// All rates of a contestant, by threads at a time, a rate for each round.
type Rates = BTreeMap<(&'static str, usize), Vec<f64>>;

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

fn tenths(figure: f64) -> f64 {
    (figure * 10.0).round() / 10.0
}

fn setting(name: &str, default: u32) -> Result<u32, Failed> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .map_err(|_| format!("{name} is {text:?}; it has to be a number").into()),
        Err(_) => Ok(default),
    }
}

async fn measure(rounds: u32, lasts: Duration) -> Result<(Rates, Value), Failed> {
    let schema = storage::Schema::make().await;
    let server = server(&schema.url).await?;
    let (path, _folder) = storage::sqlite_path();
    let limit = CommitLimit::on(&schema.url).await?;
    let engines = [
        (
            "postgres",
            Contestant::on(Arc::new(storage::connect(schema.url.clone()).await)).await?,
        ),
        (
            "sqlite",
            Contestant::on(Arc::new(storage::sqlite(path).await)).await?,
        ),
        (
            "memory",
            Contestant::on(Arc::new(MemoryCheckpointer::new())).await?,
        ),
    ];
    for (_, engine) in &engines {
        engine.rate(2, Duration::from_millis(300)).await?;
    }
    let mut rates = Rates::new();
    for round in 1..=rounds {
        for threads in THREADS {
            let rate = limit.rate(threads, lasts).await?;
            rates.entry(("commits", threads)).or_default().push(rate);
            for (name, engine) in &engines {
                let rate = engine.rate(threads, lasts).await?;
                rates.entry((name, threads)).or_default().push(rate);
            }
        }
        let (name, engine) = &engines[0];
        let rate = engine.rate(CROWD, lasts).await?;
        rates.entry((name, CROWD)).or_default().push(rate);
        eprintln!("round {round} of {rounds} is done");
    }
    Ok((rates, server))
}

fn print(rates: &Rates) {
    println!(
        "chain of {NODES} nodes, supersteps/s, medians; beside them pgbench's one-row commits/s"
    );
    println!(
        "{:>10} {:>10} {:>10} {:>10} {:>10}",
        "threads", "commits", "postgres", "sqlite", "memory"
    );
    for threads in THREADS.into_iter().chain([CROWD]) {
        let cell = |name| {
            rates
                .get(&(name, threads))
                .map_or_else(|| "-".to_owned(), |rates| format!("{:.0}", median(rates)))
        };
        println!(
            "{threads:>10} {:>10} {:>10} {:>10} {:>10}",
            cell("commits"),
            cell("postgres"),
            cell("sqlite"),
            cell("memory")
        );
    }
}

fn report(rates: &Rates, server: &Value) -> Value {
    let figures: Vec<Value> = rates
        .iter()
        .map(|((name, threads), rates)| {
            let (name, unit) = match *name {
                "commits" => (format!("pgbench.one_row_commits.{threads}"), "commits/s"),
                name => (format!("engine.chain.{name}.{threads}"), "supersteps/s"),
            };
            let rounds: Vec<f64> = rates.iter().copied().map(tenths).collect();
            json!({"name": name, "unit": unit, "value": tenths(median(rates)), "rounds": rounds})
        })
        .collect();
    let promises: Vec<Value> = PROMISES
        .iter()
        .map(|(threads, clients, limit)| {
            // Round by round: what else the machine did in a round, it did to both.
            let shares: Vec<f64> = rates[&("postgres", *threads)]
                .iter()
                .zip(&rates[&("commits", *clients)])
                .map(|(steps, commits)| 100.0 * steps / commits)
                .collect();
            let share = median(&shares);
            json!({
                "name": format!("engine.chain.share_of_commits.{threads}"),
                "promise": format!("supersteps on PostgreSQL, {threads} threads at a time, as a share of one-row commits of {clients} clients"),
                "unit": "%", "bound": "at least", "limit": limit, "figure": tenths(share), "met": share >= *limit,
            })
        })
        .collect();
    json!({"figures": figures, "promises": promises, "postgres": server})
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let rounds = setting("ARTEL_BENCH_ROUNDS", 5)?.max(1);
    let seconds = setting("ARTEL_BENCH_SECONDS", 2)?.max(1);
    let (rates, server) = measure(rounds, Duration::from_secs(seconds.into())).await?;
    print(&rates);
    let report = report(&rates, &server);
    for promise in report["promises"].as_array().into_iter().flatten() {
        println!(
            "{}: {} %, {} {} %",
            promise["promise"].as_str().unwrap_or_default(),
            promise["figure"],
            promise["bound"].as_str().unwrap_or_default(),
            promise["limit"]
        );
    }
    if let Some(path) = std::env::var_os("ARTEL_BENCH_JSON") {
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}
