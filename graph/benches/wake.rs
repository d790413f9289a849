//! Two processes on one PostgreSQL: one sends a signal, the other runs the thread that sleeps for it. How long it takes from
//! the call that sends to the moment the node goes on in the other process.
//!
//! `ARTEL_TEST_DATABASE_URL` names the server (`make bench` starts one); `ARTEL_BENCH_JSON` names a file for the figures.

mod lab;

use std::{
    io::Write,
    process::Stdio,
    sync::Arc,
    time::{Duration, Instant},
};

use graph::{
    CompiledGraph, Context, Engine, Graph, START, ServeOptions, StartOptions, State, ThreadId,
    ThreadStatus, WaitFor,
};
use lab::{
    Failed, PATIENCE,
    database::Database,
    report::{Bound, Report, quantile},
    storage,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
};
use tokio_util::sync::CancellationToken;

/// Tells the second process where the database is.
const URL: &str = "ARTEL_BENCH_WAKE_URL";
/// Threads that sleep.
const SLEEPERS: usize = 50;
/// How many signals are sent, at most.
const SIGNALS: u32 = 500;
/// After so long, no more are sent.
const LASTS: Duration = Duration::from_secs(30);
const LIMIT_MS: f64 = 20.0;

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Sleeper {
    heard: u64,
}

/// Sleeps until it hears something, says so to the first process, and sleeps again.
fn sleeper() -> Result<CompiledGraph<Sleeper>, Failed> {
    Ok(Graph::<Sleeper>::builder("sleeper")
        .node(
            "hear",
            |sleeper: Arc<Sleeper>, context: Context| async move {
                context.wait_any("go", &WaitFor::new().signal("go")).await?;
                let mut out = std::io::stdout().lock();
                writeln!(out, "{}", context.thread())?;
                out.flush()?;
                Ok(SleeperUpdate::default().heard(sleeper.heard + 1))
            },
        )
        .edge(START, "hear")
        .conditional("hear", ["hear", graph::END], |_: &Sleeper| "hear")
        .compile()?)
}

/// The second process: runs threads until its standard input is closed.
async fn serve(url: String) -> Result<(), Failed> {
    let engine = Engine::builder(Arc::new(storage::connect(url).await))
        .graph(sleeper()?)
        .build()
        .await?;
    let stop = CancellationToken::new();
    tokio::spawn({
        let stop = stop.clone();
        async move {
            // Whatever comes of it, the first process has left.
            let _ = tokio::io::stdin().read_to_end(&mut Vec::new()).await;
            stop.cancel();
        }
    });
    Ok(engine.serve(ServeOptions::default(), stop).await?)
}

struct Other {
    process: Child,
    heard: Lines<BufReader<ChildStdout>>,
}

impl Other {
    fn start(url: &str) -> Result<Self, Failed> {
        let mut process = Command::new(std::env::current_exe()?)
            .env(URL, url)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()?;
        let out = process.stdout.take().ok_or("it has no standard output")?;
        Ok(Self {
            process,
            heard: BufReader::new(out).lines(),
        })
    }

    async fn hears(&mut self, thread: &ThreadId) -> Result<(), Failed> {
        let line = tokio::time::timeout(PATIENCE, self.heard.next_line()).await??;
        if line.as_deref() == Some(thread.as_str()) {
            Ok(())
        } else {
            Err(format!("{thread} was to go on, but the other process said {line:?}").into())
        }
    }

    async fn stop(mut self) -> Result<(), Failed> {
        drop(self.process.stdin.take());
        let status = tokio::time::timeout(PATIENCE, self.process.wait()).await??;
        if status.success() {
            Ok(())
        } else {
            Err(format!("the other process ended with {status}").into())
        }
    }
}

/// Waits until the thread sleeps: nobody holds it, and it waits for something.
async fn asleep(engine: &Engine, thread: &ThreadId) -> Result<(), Failed> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let record = engine.thread(thread.clone()).await?;
        if record.is_some_and(|it| it.status == ThreadStatus::Waiting) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Err(format!("{thread} does not go to sleep").into())
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    if let Ok(url) = std::env::var(URL) {
        return serve(url).await;
    }
    let database = Database::postgres().await;
    let url = database.url().ok_or("PostgreSQL has an address")?;
    let engine = Engine::builder(database.store.clone())
        .graph(sleeper()?)
        .build()
        .await?;
    let threads: Vec<ThreadId> = (0..SLEEPERS)
        .map(|number| ThreadId::from(format!("sleeper:{number}")))
        .collect();
    for thread in &threads {
        engine
            .start(thread.clone(), "sleeper", &(), StartOptions::default())
            .await?;
    }
    let mut other = Other::start(url)?;
    for thread in &threads {
        asleep(&engine, thread).await?;
    }
    let begun = Instant::now();
    let mut took = Vec::new();
    for (number, thread) in (0..SIGNALS).zip(threads.iter().cycle()) {
        if begun.elapsed() > LASTS {
            break;
        }
        asleep(&engine, thread).await?;
        // Never in step with whatever the other process does from time to time.
        tokio::time::sleep(Duration::from_millis(u64::from(number * 7 % 31))).await;
        let sent = Instant::now();
        engine
            .signal(thread.clone(), "go", &format!("go:{number}"), &number)
            .await?;
        other.hears(thread).await?;
        took.push(sent.elapsed().as_secs_f64() * 1000.0);
    }
    other.stop().await?;

    let mut report = Report::default();
    for (share, text) in [(0.5, "p50"), (0.99, "p99"), (1.0, "max")] {
        report.figure(
            format!("engine.wake.postgres.{text}"),
            "ms",
            quantile(&took, share),
        );
    }
    report.promise(
        "engine.wake.postgres.p99",
        format!("from a signal of one process to the next step of a sleeping thread in another, on PostgreSQL, p99 of {}", took.len()),
        "ms",
        Bound::AtMost(LIMIT_MS),
        quantile(&took, 0.99),
    );
    report.finish()
}
