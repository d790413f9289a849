//! What sleeping threads cost, and how soon one goes on: 10,000 threads are suspended on a question. Afterwards the process
//! is to be no larger than before, and any of them is to go on within 10 ms of its answer.
//!
//! `ARTEL_TEST_DATABASE_URL` names a PostgreSQL server (`make bench` starts one); `ARTEL_BENCH_JSON` names a file for the figures;
//! `ARTEL_BENCH_SLEEPERS` says how many threads there are. Arguments choose databases.

mod lab;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use graph::{
    CompiledGraph, Context, END, Engine, Graph, Observer, Point, START, StartOptions, State,
    ThreadId, ThreadStatus,
};
use lab::{
    Failed, PATIENCE, Serving, chosen,
    database::Database,
    each,
    process::resident_bytes,
    report::{Bound, Report, quantile},
    setting, until,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Threads that are suspended or started at the same time.
const AT_A_TIME: u64 = 64;
/// How many of the threads are resumed, one after the other.
const RESUMED: u64 = 1_000;
/// What a process that has put as many to sleep before may grow by for each further thread, in bytes. Not zero, because the
/// allocator's arenas and the databases' caches still breathe (some hundred kB, whatever the number of threads); but less than an id in a map
/// would take.
const MEMORY_LIMIT: f64 = 64.0;
const RESUME_LIMIT_MS: f64 = 10.0;

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Sleeper {
    #[channel(append)]
    log: Vec<String>,
    answer: u64,
}

fn sleeper() -> Result<CompiledGraph<Sleeper>, Failed> {
    Ok(Graph::<Sleeper>::builder("sleeper")
        .node("ask", |_: Arc<Sleeper>, context: Context| async move {
            let answer = context.interrupt("how many", "How many?").await?;
            Ok(SleeperUpdate::default().answer(answer))
        })
        .edge(START, "ask")
        .edge("ask", END)
        .compile()?)
}

/// Counts suspensions, and tells when a resumed step has landed.
#[derive(Default)]
struct Watch {
    landed: AtomicU64,
    awaited: Mutex<Option<oneshot::Sender<Instant>>>,
}

impl Observer for Watch {
    fn on(&self, point: &Point<'_>) {
        if let Point::AfterCommit { nodes, .. } = point
            && !nodes.is_empty()
        {
            self.landed.fetch_add(1, Ordering::Relaxed);
            if let Some(sender) = self.awaited.lock().take() {
                // Nobody listens any more when the bench is being broken off.
                let _ = sender.send(Instant::now());
            }
        }
    }
}

struct Bench {
    engine: Engine,
    watch: Arc<Watch>,
}

impl Bench {
    /// Starts threads and waits until all of them sleep.
    async fn put_to_sleep(&self, group: &'static str, count: u64) -> Result<(), Failed> {
        let before = self.watch.landed.load(Ordering::Relaxed);
        let engine = self.engine.clone();
        each(count, AT_A_TIME, move |number| {
            let engine = engine.clone();
            async move {
                let input = SleeperUpdate::default().log(vec!["x".repeat(64)]);
                engine
                    .start(
                        name(group, number),
                        "sleeper",
                        &input,
                        StartOptions::default(),
                    )
                    .await?;
                Ok(())
            }
        })
        .await?;
        until("all threads sleep", || {
            self.watch.landed.load(Ordering::Relaxed) - before >= count
        })
        .await
    }

    /// How long it takes from the call that answers to the commit of the step that used the answer, in milliseconds.
    async fn resume(&self, thread: ThreadId) -> Result<f64, Failed> {
        let asleep = self.engine.thread(thread.clone()).await?;
        let asleep = asleep.ok_or("a sleeping thread is gone")?;
        if asleep.status != ThreadStatus::Waiting || asleep.lease.is_some() {
            return Err(format!("{thread} does not sleep, it is {:?}", asleep.status).into());
        }
        let (sender, landed) = oneshot::channel();
        *self.watch.awaited.lock() = Some(sender);
        let begun = Instant::now();
        self.engine
            .answer(thread.clone(), &asleep.waits[0].id, &7)
            .await?;
        let landed = tokio::time::timeout(PATIENCE, landed).await??;
        let state: Sleeper = self.engine.state(thread.clone()).await?;
        if state.answer != 7 {
            return Err(format!("{thread} did not take its answer").into());
        }
        Ok((landed - begun).as_secs_f64() * 1000.0)
    }
}

fn name(group: &str, number: u64) -> ThreadId {
    ThreadId::from(format!("{group}:{number}"))
}

async fn measure(database: &Database, count: u64, report: &mut Report) -> Result<(), Failed> {
    let watch = Arc::new(Watch::default());
    let engine = Engine::builder(database.store.clone())
        .graph(sleeper()?)
        .observer(watch.clone())
        .build()
        .await?;
    let bench = Bench { engine, watch };
    let serving = Serving::start(&bench.engine, usize::try_from(AT_A_TIME)?);
    // Fills pools, caches and arenas.
    bench.put_to_sleep("before", count).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (memory, disk) = (resident_bytes()?, database.size().await?);
    bench.put_to_sleep("sleeper", count).await?;
    tokio::time::sleep(Duration::from_secs(1)).await;
    let threads = f64::from(u32::try_from(count)?);
    let memory = (resident_bytes()? - memory) / threads;
    let disk = (database.size().await? - disk) / threads;
    let mut took = Vec::new();
    for number in 0..RESUMED.min(count) {
        // From all over the table.
        let thread = name("sleeper", number * 7919 % count);
        took.push(bench.resume(thread).await?);
    }
    serving.stop().await?;

    let at = database.name;
    let durable = at != "memory";
    report.figure(
        format!("engine.sleeping.memory.{at}"),
        "bytes/thread",
        memory,
    );
    if durable {
        report.figure(format!("engine.sleeping.disk.{at}"), "bytes/thread", disk);
        report.promise(
            format!("engine.sleeping.memory.{at}"),
            format!(
                "what the process grows by for each of {count} further suspended threads on {at}"
            ),
            "bytes",
            Bound::AtMost(MEMORY_LIMIT),
            memory,
        );
    }
    for (share, text) in [(0.5, "p50"), (0.99, "p99"), (1.0, "max")] {
        let figure = quantile(&took, share);
        report.figure(format!("engine.resume.{at}.{text}"), "ms", figure);
        if text == "p99" {
            report.promise(
                format!("engine.resume.{at}.{text}"),
                format!("from the answer to one of {count} suspended threads on {at} to the commit of its step, {text}"),
                "ms",
                Bound::AtMost(RESUME_LIMIT_MS),
                figure,
            );
        }
    }
    Ok(())
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let count = u64::from(setting("ARTEL_BENCH_SLEEPERS", 10_000)?.max(1));
    let mut report = Report::default();
    let databases = [
        Database::postgres().await,
        Database::sqlite().await,
        Database::memory(),
    ];
    for database in databases {
        if chosen(database.name) {
            measure(&database, count, &mut report).await?;
        }
    }
    report.finish()
}
