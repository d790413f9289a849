//! What the crew itself costs, a superstep at a time: the whole crew builds projects in a world that answers at once (no
//! model, no worker, no repository on a disk), on each database.
//!
//! A superstep is measured from the start of its first node to the moment its commit has landed: reading the state, writing
//! prompts, checking answers, durable steps, the commit. Beside it stands the time of everything (claims, loading,
//! signals, ends) shared among the supersteps. The databases are opened as the program opens them.
//!
//! `ARTEL_TEST_DATABASE_URL` names a PostgreSQL server (`make bench` starts one). `ARTEL_BENCH_JSON` names a file for the
//! figures; `ARTEL_BENCH_ROUNDS` says how long it takes.

// The tests of the crew live in this world as well; each uses a part of it.
#[allow(dead_code)]
#[path = "../tests/crew/forge.rs"]
mod forge;
#[allow(dead_code)]
#[path = "../tests/crew/stage.rs"]
mod stage;
#[allow(dead_code)]
#[path = "../tests/crew/world.rs"]
mod world;

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use graph::{
    Engine, MemoryCheckpointer, Observer, Point, PostgresCheckpointer, ServeOptions,
    SqliteCheckpointer, StartOptions, ThreadId, ThreadStatus, checkpoint::Checkpointer,
};
use nodes::{Policy, signal};
use parking_lot::Mutex;
use ports::{PersonId, ProjectId, Role, threads};
use serde_json::{Value, json};
use store::{Location, Store};

use crate::stage::{send_back, task};

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Projects in each round, on each database.
const PROJECTS: u32 = 4;
/// How long one project may take before the crew counts as stuck.
const PATIENCE: Duration = Duration::from_mins(1);
/// Threads that the program runs at the same time.
const CONCURRENCY: usize = 16;
/// What a superstep may cost on SQLite at the median, in milliseconds.
const LIMIT_MS: f64 = 5.0;

/// Notes how long every superstep takes.
#[derive(Default)]
struct Watch(Mutex<Seen>);

#[derive(Default)]
struct Seen {
    begun: HashMap<ThreadId, Instant>,
    steps: Vec<(String, Duration)>,
    remembered: u32,
}

impl Observer for Watch {
    fn on(&self, point: &Point<'_>) {
        let now = Instant::now();
        let mut seen = self.0.lock();
        match point {
            Point::NodeStarted { thread, .. } => {
                seen.begun.entry((*thread).clone()).or_insert(now);
            }
            Point::StepRemembered { .. } => seen.remembered += 1,
            Point::AfterCommit { thread, nodes } => {
                if let Some(begun) = seen.begun.remove(*thread) {
                    seen.steps.push((nodes.join("+"), now - begun));
                }
            }
            _ => {}
        }
    }
}

/// One database, and what was seen on it.
struct Contestant {
    name: &'static str,
    store: Arc<dyn Checkpointer>,
    watch: Arc<Watch>,
    elapsed: Duration,
}

impl Contestant {
    fn on(name: &'static str, store: Arc<dyn Checkpointer>) -> Self {
        Self {
            name,
            store,
            watch: Arc::default(),
            elapsed: Duration::ZERO,
        }
    }

    /// A whole project, from its first message to its release: four tasks, two of them at a time, one sent back once.
    async fn build(&mut self, number: u32) -> Result<(), Failed> {
        let tasks = [
            task("storage", &[]),
            task("search", &[]),
            task("api", &["storage"]),
            task("docs", &["api", "search"]),
        ];
        let world = stage::world(&tasks);
        world.answer(
            Role::Reviewer,
            "job-1/api",
            0,
            send_back("there is no test"),
        );
        let (conversation, job, task) = nodes::graphs(&world.crew(Policy::default()))?;
        let engine = Engine::builder(self.store.clone())
            .graph(conversation)
            .graph(job)
            .graph(task)
            .observer(self.watch.clone())
            .build()
            .await?;
        let project = ProjectId::founded_by(&format!("bench:{number}"));
        let begun = Instant::now();
        let owner = PersonId::new("local:owner");
        let thread = threads::conversation(&project);
        engine
            .start(
                thread.as_str(),
                nodes::conversation::GRAPH,
                &nodes::conversation::found(project.clone(), owner.clone()),
                StartOptions::default(),
            )
            .await?;
        let message = signal::Message {
            key: "m1".to_owned(),
            from: owner,
            text: "Build me a notes service".to_owned(),
            yes: true,
        };
        engine
            .signal(thread.as_str(), signal::MESSAGE, "m1", &message)
            .await?;
        loop {
            let options = ServeOptions {
                concurrency: CONCURRENCY,
                ..ServeOptions::default()
            };
            tokio::time::timeout(PATIENCE, engine.run_due(options))
                .await
                .map_err(|_| format!("project {number} got stuck on {}", self.name))??;
            let due = std::mem::take(&mut world.state.lock().due);
            if due.is_empty() {
                break;
            }
            for due in due {
                engine
                    .signal(due.thread.as_str(), &due.kind, &due.key, &due.payload)
                    .await?;
            }
        }
        self.elapsed += begun.elapsed();
        let job = engine.thread(format!("{project}/job-1")).await?;
        let status = job.map(|job| job.status);
        let deployed = world
            .state
            .lock()
            .errands
            .values()
            .any(|errand| matches!(errand.work, ports::ErrandWork::Deploy(_)));
        if status != Some(ThreadStatus::Done) || world.forge.pulls().len() != 4 || !deployed {
            return Err(format!(
                "project {number} was not built on {}: its job is {status:?}",
                self.name
            )
            .into());
        }
        Ok(())
    }

    fn report(&self) -> Report {
        let seen = self.watch.0.lock();
        let all: Vec<f64> = seen.steps.iter().map(|(_, took)| ms(*took)).collect();
        let mut by_node: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        for (node, took) in &seen.steps {
            by_node.entry(node).or_default().push(ms(*took));
        }
        let count = f64::from(u32::try_from(all.len()).unwrap_or(u32::MAX));
        Report {
            name: self.name,
            supersteps: all.len(),
            remembered: seen.remembered,
            median_ms: quantile(&all, 0.5),
            p95_ms: quantile(&all, 0.95),
            everything_ms: thousandths(ms(self.elapsed) / count),
            by_node: by_node
                .into_iter()
                .map(|(node, took)| (node.to_owned(), took.len(), quantile(&took, 0.5)))
                .collect(),
        }
    }
}

struct Report {
    name: &'static str,
    supersteps: usize,
    remembered: u32,
    median_ms: f64,
    p95_ms: f64,
    everything_ms: f64,
    by_node: Vec<(String, usize, f64)>,
}

impl Report {
    fn figures(&self) -> Vec<Value> {
        let name = |what: &str| format!("crew.superstep.{}.{what}", self.name);
        let by_node: serde_json::Map<String, Value> = self
            .by_node
            .iter()
            .map(|(node, count, median)| {
                (
                    node.clone(),
                    json!({"supersteps": count, "median_ms": median}),
                )
            })
            .collect();
        vec![
            json!({"name": name("median"), "unit": "ms", "value": self.median_ms, "supersteps": self.supersteps, "durable_steps": self.remembered, "by_node": by_node}),
            json!({"name": name("p95"), "unit": "ms", "value": self.p95_ms}),
            json!({"name": name("with_claims_and_signals"), "unit": "ms", "value": self.everything_ms}),
        ]
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

fn thousandths(figure: f64) -> f64 {
    (figure * 1000.0).round() / 1000.0
}

/// The smallest value that is at least as large as this share of them.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss
)]
fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    sorted
        .get(rank.max(1) - 1)
        .copied()
        .map_or(f64::NAN, thousandths)
}

/// A schema of its own on the server; gives the URL that leads there, and the statement that drops it.
async fn schema() -> Result<(String, String, String), Failed> {
    let server = std::env::var("ARTEL_TEST_DATABASE_URL").map_err(
        |_| "ARTEL_TEST_DATABASE_URL names a PostgreSQL server on which a schema may be made; `make bench` starts one",
    )?;
    let name = format!("bench_{}", uuid::Uuid::now_v7().simple());
    execute(&server, format!("create schema {name}")).await?;
    let joint = if server.contains('?') { '&' } else { '?' };
    let url = format!("{server}{joint}options=-csearch_path%3D{name}");
    Ok((server, url, format!("drop schema {name} cascade")))
}

async fn execute(server: &str, statement: String) -> Result<(), Failed> {
    let pool = sqlx::PgPool::connect(server).await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(statement))
        .execute(&pool)
        .await?;
    pool.close().await;
    Ok(())
}

async fn measure(rounds: u32) -> Result<Vec<Report>, Failed> {
    let folder = tempfile::tempdir()?;
    let file = folder.path().join("artel.db");
    let (server, url, drop_schema) = schema().await?;
    // As the program does it: SQLite's file has two tenants, PostgreSQL's pool as well.
    let beside = Store::open(&Location::Sqlite(file.clone())).await?;
    let full = Store::open(&Location::Postgres(url)).await?;
    let pool = full.pg_pool().ok_or("the store has no pool")?.clone();
    let mut contestants = [
        Contestant::on("memory", Arc::new(MemoryCheckpointer::new())),
        Contestant::on("sqlite", Arc::new(SqliteCheckpointer::open(&file).await?)),
        Contestant::on("postgres", Arc::new(PostgresCheckpointer::from_pool(pool))),
    ];
    let mut number = 0;
    for contestant in &mut contestants {
        // A first project that is not counted: schemas, caches, connections.
        contestant.build(number).await?;
        contestant.watch = Arc::default();
        contestant.elapsed = Duration::ZERO;
    }
    for round in 1..=rounds {
        for _ in 0..PROJECTS {
            number += 1;
            for contestant in &mut contestants {
                contestant.build(number).await?;
            }
        }
        eprintln!("round {round} of {rounds} is done");
    }
    let reports = contestants.iter().map(Contestant::report).collect();
    drop(contestants);
    beside.close().await;
    full.close().await;
    execute(&server, drop_schema).await?;
    Ok(reports)
}

fn print(reports: &[Report]) {
    println!("the crew, a superstep, without model and worker, in ms");
    println!(
        "{:>10} {:>10} {:>10} {:>10} {:>24}",
        "", "supersteps", "median", "p95", "with claims and signals"
    );
    for report in reports {
        println!(
            "{:>10} {:>10} {:>10.3} {:>10.3} {:>24.3}",
            report.name, report.supersteps, report.median_ms, report.p95_ms, report.everything_ms
        );
    }
    for report in reports {
        let nodes: Vec<String> = report
            .by_node
            .iter()
            .map(|(node, count, median)| format!("{node} {median:.3} ({count})"))
            .collect();
        println!(
            "{:>10} by node: {}; durable steps: {}",
            report.name,
            nodes.join(", "),
            report.remembered
        );
    }
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let rounds: u32 = match std::env::var("ARTEL_BENCH_ROUNDS") {
        Ok(text) => text
            .parse()
            .map_err(|_| format!("ARTEL_BENCH_ROUNDS is {text:?}; it has to be a number"))?,
        Err(_) => 3,
    };
    let reports = measure(rounds.max(1)).await?;
    print(&reports);
    let figures: Vec<Value> = reports.iter().flat_map(Report::figures).collect();
    let promises: Vec<Value> = reports
        .iter()
        .filter(|report| report.name == "sqlite")
        .map(|report| {
            json!({
                "name": "crew.superstep.sqlite.median",
                "promise": "the crew's own overhead per superstep on SQLite, at the median, without model and worker",
                "unit": "ms", "bound": "at most", "limit": LIMIT_MS, "figure": report.median_ms, "met": report.median_ms <= LIMIT_MS,
            })
        })
        .collect();
    if let Some(path) = std::env::var_os("ARTEL_BENCH_JSON") {
        let report = json!({"figures": figures, "promises": promises});
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}
