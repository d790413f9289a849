//! The engine beside LangGraph: the chain on one PostgreSQL, with pgbench's one-row commits, and LangGraph's own shapes in
//! memory. Everything takes turns in one run, on one server; ratios are taken round by round, so that whatever else the
//! machine does in a round, it does to all.
//!
//! `make bench-peers` installs LangGraph and starts the server. `ARTEL_BENCH_PYTHON` names the Python that has it,
//! `ARTEL_TEST_DATABASE_URL` the server, `ARTEL_BENCH_JSON` a file for the figures; `ARTEL_BENCH_ROUNDS` and
//! `ARTEL_BENCH_SECONDS` say how long it takes.

#[path = "workloads/chain.rs"]
mod chains;
mod lab;
#[path = "workloads/shapes.rs"]
mod shapes;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};

use chains::Chains;
use lab::{
    Failed, PATIENCE,
    commits::CommitLimit,
    database::{Database, server},
    report::{Bound, Report, median, median_ratio},
    setting,
};
use serde::{Deserialize, de::DeserializeOwned};

/// Threads at a time on PostgreSQL, and how many times as fast as LangGraph it has to be.
const PROMISES: [(usize, f64); 3] = [(1, 5.0), (16, 20.0), (64, 40.0)];
/// How many times as fast it has to be in memory.
const SHAPES_LIMIT: f64 = 50.0;
/// How often each shape is run in a round, on both sides.
const RUNS: u32 = 5;
const COMPILING: &str = "compile_sequential_1000";

/// LangGraph, in a Python that has it.
struct Peer {
    python: PathBuf,
    url: String,
}

#[derive(Deserialize)]
struct ChainRate {
    rate: f64,
    version: String,
}

/// Milliseconds of each run: without a checkpointer, and with one.
#[derive(Deserialize)]
struct ShapeTimes {
    alone: Vec<f64>,
    saved: Option<Vec<f64>>,
}

impl Peer {
    async fn run<T: DeserializeOwned>(
        &self,
        script: &str,
        arguments: &[String],
    ) -> Result<T, Failed> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("benches/peers")
            .join(script);
        let run = tokio::process::Command::new(&self.python)
            .arg(path)
            .args(arguments)
            .env("DATABASE_URL", &self.url)
            .stdin(Stdio::null())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .output();
        let output = tokio::time::timeout(3 * PATIENCE, run)
            .await
            .map_err(|_| format!("{script} does not end"))?
            .map_err(|error| format!("{} cannot be run: {error}", self.python.display()))?;
        if !output.status.success() {
            return Err(format!("{script} ended with {}", output.status).into());
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    async fn chains(&self, threads: usize, lasts: Duration) -> Result<ChainRate, Failed> {
        let arguments = [threads.to_string(), lasts.as_secs_f64().to_string()];
        self.run("langgraph_chain.py", &arguments).await
    }

    async fn shapes(&self) -> Result<BTreeMap<String, ShapeTimes>, Failed> {
        self.run("langgraph_shapes.py", &[RUNS.to_string()]).await
    }
}

/// What each contestant did, by what it was measured at, a figure for each round.
type Rounds = BTreeMap<String, Vec<f64>>;

fn add(rounds: &mut Rounds, name: String, figure: f64) {
    rounds.entry(name).or_default().push(figure);
}

async fn measure_shapes(
    peer: &Peer,
    shapes: &mut [shapes::Shape],
    rounds: &mut Rounds,
) -> Result<(), Failed> {
    for shape in shapes {
        let mut took = Vec::new();
        for run in 0..=RUNS {
            let run_took = shape.run().await?.as_secs_f64() * 1000.0;
            // The first run of a round is warming up, as on the other side.
            if run > 0 {
                took.push(run_took);
            }
        }
        add(
            rounds,
            format!("engine.shape.{}", shape.name),
            median(&took),
        );
    }
    let mut took = Vec::new();
    for _ in 0..RUNS {
        let builder = shapes::sequential();
        let begun = Instant::now();
        let compiled = builder.compile()?;
        took.push(begun.elapsed().as_secs_f64() * 1000.0);
        drop(compiled);
    }
    add(rounds, format!("engine.shape.{COMPILING}"), median(&took));
    for (name, times) in peer.shapes().await? {
        add(
            rounds,
            format!("langgraph.shape.{name}"),
            median(&times.alone),
        );
        if let Some(saved) = times.saved {
            add(
                rounds,
                format!("langgraph.saved_shape.{name}"),
                median(&saved),
            );
        }
    }
    Ok(())
}

fn report(rounds: &Rounds, report: &mut Report) {
    for (name, figures) in rounds {
        let unit = if name.contains("shape.") {
            "ms"
        } else if name.starts_with("pgbench") {
            "commits/s"
        } else {
            "supersteps/s"
        };
        report.rounds(name, unit, figures);
    }
    for (threads, limit) in PROMISES {
        let ours = &rounds[&format!("engine.chain.postgres.{threads}")];
        let theirs = &rounds[&format!("langgraph.chain.postgres.{threads}")];
        report.promise(
            format!("peers.langgraph.chain.{threads}"),
            format!("supersteps on PostgreSQL, {threads} threads at a time, beside LangGraph's"),
            "x",
            Bound::AtLeast(limit),
            median_ratio(ours, theirs),
        );
    }
    for (name, ours) in rounds {
        let Some(shape) = name.strip_prefix("engine.shape.") else {
            continue;
        };
        // Compiling is done once, and here it checks more: a figure, and no promise.
        if shape == COMPILING {
            continue;
        }
        for (key, with) in [
            ("shape", "without a checkpointer"),
            ("saved_shape", "with its memory saver"),
        ] {
            let Some(theirs) = rounds.get(&format!("langgraph.{key}.{shape}")) else {
                continue;
            };
            report.promise(
                format!("peers.langgraph.{key}.{shape}"),
                format!("{shape} in memory, beside LangGraph {with}"),
                "x",
                Bound::AtLeast(SHAPES_LIMIT),
                median_ratio(theirs, ours),
            );
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    // As a task, like all that a program does but its `main`: the runtime gives that a thread of its own, and waking another
    // thread twice in each run would cost more than some of the shapes.
    tokio::spawn(measure()).await?
}

async fn measure() -> Result<(), Failed> {
    let count = setting("ARTEL_BENCH_ROUNDS", 3)?.max(1);
    let lasts = Duration::from_secs(setting("ARTEL_BENCH_SECONDS", 2)?.max(1).into());
    let python = std::env::var_os("ARTEL_BENCH_PYTHON").ok_or(
        "ARTEL_BENCH_PYTHON names no Python that has LangGraph; run this as `make bench-peers`",
    )?;
    let database = Database::postgres().await;
    let url = database.url().ok_or("PostgreSQL has an address")?;
    let peer = Peer {
        python: python.into(),
        url: url.to_owned(),
    };
    let mut found = Report::default();
    found.about("postgres", server(url).await?);
    let limit = CommitLimit::on(url).await?;
    let chains = Chains::on(database.store.clone()).await?;
    chains.rate(2, Duration::from_millis(300)).await?;
    let mut all_shapes = shapes::all().await?;
    let mut rounds = Rounds::new();
    let mut version = String::new();
    for round in 1..=count {
        for (threads, _) in PROMISES {
            let commits = limit.rate(threads, lasts).await?;
            add(
                &mut rounds,
                format!("pgbench.one_row_commits.{threads}"),
                commits,
            );
            let ours = chains.rate(threads, lasts).await?;
            add(
                &mut rounds,
                format!("engine.chain.postgres.{threads}"),
                ours,
            );
            let theirs = peer.chains(threads, lasts).await?;
            add(
                &mut rounds,
                format!("langgraph.chain.postgres.{threads}"),
                theirs.rate,
            );
            version = theirs.version;
        }
        measure_shapes(&peer, &mut all_shapes, &mut rounds).await?;
        eprintln!("round {round} of {count} is done");
    }
    println!("LangGraph {version}");
    found.about("langgraph", version.into());
    report(&rounds, &mut found);
    found.finish()
}
