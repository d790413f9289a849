//! What a thread stores that appends 200 bytes to one list in each of 1,000 steps, on each database that stores: less than three times
//! the bytes that it appended.
//!
//! `ARTEL_TEST_DATABASE_URL` names a PostgreSQL server (`make bench` starts one); `ARTEL_BENCH_JSON` names a file for the figures.

mod lab;

use std::sync::Arc;

use graph::{
    CompiledGraph, Context, END, Engine, Graph, START, ServeOptions, StartOptions, State,
    ThreadStatus,
};
use lab::{
    Failed, PATIENCE,
    database::Database,
    report::{Bound, Report},
};
use serde::{Deserialize, Serialize};

const STEPS: usize = 1000;
const BYTES: usize = 200;
/// How many times the bytes appended may be stored.
const LIMIT: f64 = 3.0;

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Log {
    #[channel(append)]
    lines: Vec<String>,
}

fn appending() -> Result<CompiledGraph<Log>, Failed> {
    Ok(Graph::<Log>::builder("appending")
        .node("append", |log: Arc<Log>, _: Context| async move {
            let line = format!("{:0BYTES$}", log.lines.len());
            Ok(LogUpdate::default().lines(vec![line]))
        })
        .edge(START, "append")
        .conditional("append", ["append", END], |log: &Log| {
            if log.lines.len() < STEPS {
                "append"
            } else {
                END
            }
        })
        .output(|log| log.lines.len().into())
        .compile()?)
}

async fn growth(database: &Database) -> Result<f64, Failed> {
    let engine = Engine::builder(database.store.clone())
        .graph(appending()?)
        .build()
        .await?;
    let before = database.size().await?;
    engine
        .start("t", "appending", &(), StartOptions::default())
        .await?;
    tokio::time::timeout(PATIENCE, engine.run_due(ServeOptions::default())).await??;
    let after = database.size().await?;
    let thread = engine.thread("t").await?.ok_or("it was started")?;
    let log: Log = engine.state("t").await?;
    if thread.status != ThreadStatus::Done || log.lines.len() != STEPS {
        return Err(format!("{:?} after {} lines", thread.status, log.lines.len()).into());
    }
    Ok(after - before)
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let mut report = Report::default();
    for database in [Database::postgres().await, Database::sqlite().await] {
        let stored = growth(&database).await?;
        let appended = f64::from(u32::try_from(STEPS * BYTES)?);
        let name = database.name;
        report.figure(format!("engine.growth.{name}"), "bytes", stored);
        report.promise(
            format!("engine.growth.{name}.factor"),
            format!("{STEPS} appends of {BYTES} bytes to one list, bytes stored on {name} for each byte appended"),
            "x",
            Bound::AtMost(LIMIT),
            stored / appended,
        );
    }
    report.finish()
}
