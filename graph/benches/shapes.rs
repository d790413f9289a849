//! Shapes in memory: what the engine itself costs when no database does.
//!
//! `ARTEL_BENCH_JSON` names a file for the figures; `ARTEL_BENCH_ROUNDS` says how often each shape is run. Arguments choose
//! shapes by any piece of their names.

mod lab;
#[path = "workloads/shapes.rs"]
mod shapes;

use std::time::Instant;

use lab::{Failed, chosen, report::Report, setting};

/// How often each shape is run before it is measured.
const WARM_UP: u32 = 3;

#[tokio::main]
async fn main() -> Result<(), Failed> {
    // As a task, like all that a program does but its `main`: the runtime gives that a thread of its own, and waking another
    // thread twice in each run would cost more than the run.
    tokio::spawn(measure()).await?
}

async fn measure() -> Result<(), Failed> {
    let rounds = setting("ARTEL_BENCH_ROUNDS", 5)?.max(1) * 4;
    let mut report = Report::default();
    for mut shape in shapes::all().await? {
        if !chosen(shape.name) {
            continue;
        }
        let mut took = Vec::new();
        for round in 0..WARM_UP + rounds {
            let run = shape.run().await?.as_secs_f64() * 1000.0;
            if round >= WARM_UP {
                took.push(run);
            }
        }
        report.rounds(format!("engine.shape.{}", shape.name), "ms", &took);
    }
    if chosen("compile_sequential_1000") {
        let mut took = Vec::new();
        for _ in 0..rounds {
            let builder = shapes::sequential();
            let begun = Instant::now();
            let graph = builder.compile()?;
            took.push(begun.elapsed().as_secs_f64() * 1000.0);
            drop(graph);
        }
        report.rounds("engine.shape.compile_sequential_1000", "ms", &took);
    }
    report.finish()
}
