//! What the benches share: databases, the limit they are measured against, ways to run threads, and the report.

// Each bench uses a part of it.
#![allow(dead_code)]

pub mod commits;
pub mod database;
pub mod process;
pub mod report;

#[path = "../../tests/storage/mod.rs"]
pub mod storage;

use std::{future::Future, time::Duration};

use graph::{Engine, ServeOptions};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A bench that does not run says why; slow figures are no failure.
pub type Failed = Box<dyn std::error::Error + Send + Sync>;

/// How long anything may take before the engine counts as stuck.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// A number from the environment.
pub fn setting(name: &str, default: u32) -> Result<u32, Failed> {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .map_err(|_| format!("{name} is {text:?}; it has to be a number").into()),
        Err(_) => Ok(default),
    }
}

/// Whether the command line asks for this part: it names a piece of the name, or nothing at all.
pub fn chosen(name: &str) -> bool {
    let mut wanted = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .peekable();
    wanted.peek().is_none() || wanted.any(|part| name.contains(&part))
}

/// The engine at work in the background, until [`Serving::stop`].
pub struct Serving {
    stop: CancellationToken,
    work: JoinHandle<Result<(), graph::EngineError>>,
}

impl Serving {
    pub fn start(engine: &Engine, concurrency: usize) -> Self {
        let stop = CancellationToken::new();
        let options = ServeOptions {
            concurrency,
            ..ServeOptions::default()
        };
        let work = tokio::spawn({
            let (engine, stop) = (engine.clone(), stop.clone());
            async move { engine.serve(options, stop).await }
        });
        Self { stop, work }
    }

    pub async fn stop(self) -> Result<(), Failed> {
        self.stop.cancel();
        Ok(tokio::time::timeout(PATIENCE, self.work).await???)
    }
}

/// Waits until something is true.
pub async fn until(what: &str, mut is_true: impl FnMut() -> bool) -> Result<(), Failed> {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !is_true() {
        if tokio::time::Instant::now() > deadline {
            return Err(format!("not within {PATIENCE:?}: {what}").into());
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    Ok(())
}

/// Does something with each number below `count`, so many at a time.
pub async fn each<F, Fut>(count: u64, at_a_time: u64, work: F) -> Result<(), Failed>
where
    F: Fn(u64) -> Fut + Clone + Send + 'static,
    Fut: Future<Output = Result<(), Failed>> + Send,
{
    let mut workers = tokio::task::JoinSet::new();
    for first in 0..at_a_time {
        let work = work.clone();
        workers.spawn(async move {
            let mut number = first;
            while number < count {
                work(number).await?;
                number += at_a_time;
            }
            Ok::<_, Failed>(())
        });
    }
    while let Some(worker) = workers.join_next().await {
        worker??;
    }
    Ok(())
}
