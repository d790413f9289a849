//! A fresh database, engines on it, and short ways to say what a test does.

use std::{
    any::Any,
    collections::BTreeMap,
    future::Future,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use graph::{
    CompiledGraph, Context, Cursor, Engine, Entry, Graph, GraphBuilder, JournalFilter,
    MemoryCheckpointer, NodeError, Point, ServeOptions, StartOptions, State, ThreadInfo,
    ThreadStatus, checkpoint::Checkpointer,
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::storage;

/// Makes a test of the case on each database.
macro_rules! promise {
    ($(#[$attribute:meta])* async fn $name:ident($lab:ident) $body:block) => {
        mod $name {
            #[allow(unused_imports)]
            use super::*;

            $(#[$attribute])*
            async fn case($lab: crate::lab::Lab) $body

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn memory() {
                case(crate::lab::Lab::memory()).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() {
                case(crate::lab::Lab::sqlite().await).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgres() {
                case(crate::lab::Lab::postgres().await).await;
            }
        }
    };
}
pub(crate) use promise;

pub fn add(sum: &mut i64, more: i64) {
    *sum += more;
}

/// A state with a channel of each kind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, State)]
pub struct Notes {
    #[channel(append)]
    pub log: Vec<String>,
    #[channel(merge)]
    pub seen: BTreeMap<String, i64>,
    #[channel(reduce = add)]
    pub sum: i64,
    pub last: String,
}

/// An update that logs one line.
pub fn log(line: impl Into<String>) -> NotesUpdate {
    NotesUpdate::default().log(vec![line.into()])
}

pub fn notes(name: &str) -> GraphBuilder<Notes> {
    Graph::builder(name)
}

/// How often something happened.
#[derive(Clone, Debug, Default)]
pub struct Count(Arc<AtomicUsize>);

impl Count {
    /// Counts one more, and returns the new count.
    pub fn up(&self) -> usize {
        self.0.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Counts one less.
    pub fn down(&self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// The largest number seen.
#[derive(Clone, Debug, Default)]
pub struct Peak(Arc<AtomicUsize>);

impl Peak {
    pub fn see(&self, number: usize) {
        self.0.fetch_max(number, Ordering::SeqCst);
    }

    pub fn get(&self) -> usize {
        self.0.load(Ordering::SeqCst)
    }
}

/// A database of its own for each test.
pub struct Lab {
    pub store: Arc<dyn Checkpointer>,
    _keep: Box<dyn Any + Send + Sync>,
}

impl Lab {
    pub fn memory() -> Self {
        Self {
            store: Arc::new(MemoryCheckpointer::new()),
            _keep: Box::new(()),
        }
    }

    /// One that was made elsewhere, with what it must not outlive.
    pub fn of(store: Arc<dyn Checkpointer>, keep: impl Any + Send + Sync) -> Self {
        Self {
            store,
            _keep: Box::new(keep),
        }
    }

    pub async fn sqlite() -> Self {
        let (path, dir) = storage::sqlite_path();
        Self {
            store: Arc::new(storage::sqlite(path).await),
            _keep: Box::new(dir),
        }
    }

    pub async fn postgres() -> Self {
        let schema = storage::Schema::make().await;
        Self {
            store: Arc::new(storage::connect(schema.url.clone()).await),
            _keep: Box::new(schema),
        }
    }

    /// An engine with one graph: what a process is.
    pub async fn engine<S: State>(&self, graph: CompiledGraph<S>) -> Engine {
        Engine::builder(self.store.clone())
            .graph(graph)
            .build()
            .await
            .expect("builds")
    }

    /// An engine with one graph of notes, and how often a loop of it has told its runs to stop after their step.
    pub async fn drained_notes(&self, graph: GraphBuilder<Notes>) -> (Engine, Count) {
        let drained = Count::default();
        let count = drained.clone();
        let engine = Engine::builder(self.store.clone())
            .graph(graph.compile().expect("compiles"))
            .observer(Arc::new(move |point: &Point<'_>| {
                if let Point::Draining = point {
                    count.up();
                }
            }))
            .build()
            .await
            .expect("builds");
        (engine, drained)
    }

    /// An engine with one graph of notes.
    pub async fn notes(&self, graph: GraphBuilder<Notes>) -> Engine {
        self.engine(graph.compile().expect("compiles")).await
    }
}

pub fn options() -> ServeOptions {
    ServeOptions {
        owner: "test".to_owned(),
        ..ServeOptions::default()
    }
}

/// Starts a thread of the graph `g` called `t`, with nothing in its input.
pub async fn start(engine: &Engine) {
    start_as(engine, "t").await;
}

pub async fn start_as(engine: &Engine, id: &str) {
    engine
        .start(id, "g", &(), StartOptions::default())
        .await
        .expect("starts");
}

/// Runs what is due until nothing is.
pub async fn run(engine: &Engine) {
    tokio::time::timeout(Duration::from_mins(1), engine.run_due(options()))
        .await
        .expect("comes to rest")
        .expect("runs");
}

/// Starts `t` of `g`, and runs it.
pub async fn start_and_run(engine: &Engine) -> ThreadInfo {
    start(engine).await;
    run(engine).await;
    thread(engine).await
}

pub async fn thread(engine: &Engine) -> ThreadInfo {
    thread_as(engine, "t").await
}

pub async fn thread_as(engine: &Engine, id: &str) -> ThreadInfo {
    engine.thread(id).await.expect("reads").expect("is there")
}

pub async fn state(engine: &Engine) -> Notes {
    engine.state("t").await.expect("has a state")
}

/// Everything in a stream, as names with payloads.
pub async fn said(engine: &Engine, stream: &str) -> Vec<String> {
    entries(engine, stream)
        .await
        .into_iter()
        .map(|entry| format!("{} {}", entry.name, entry.payload))
        .collect()
}

pub async fn entries(engine: &Engine, stream: &str) -> Vec<Entry> {
    engine
        .journal()
        .read(&JournalFilter::stream(stream), Cursor::START, 1000)
        .await
        .expect("reads")
}

/// A server in the background. Stops when dropped, as a killed process would: leases stay.
pub struct Server {
    pub stop: CancellationToken,
    handle: tokio::task::JoinHandle<()>,
}

impl Server {
    /// Tells it to stop, and waits until its runs know that.
    pub async fn begin_to_drain(&self, drained: &Count) {
        self.stop.cancel();
        eventually("it drains", || async { drained.get() > 0 }).await;
    }

    /// Stops as a process that is told to: finishes steps, gives leases back.
    pub async fn drain(mut self) {
        self.stop.cancel();
        tokio::time::timeout(SOON, &mut self.handle)
            .await
            .expect("drains in time")
            .expect("did not panic");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.handle.abort();
    }
}

pub fn serve(engine: &Engine, options: ServeOptions) -> Server {
    let stop = CancellationToken::new();
    let handle = tokio::spawn({
        let (engine, stop) = (engine.clone(), stop.clone());
        async move { engine.serve(options, stop).await.expect("serves") }
    });
    Server { stop, handle }
}

/// In less time than anybody waits who has to be woken, and more than a busy machine needs.
pub const SOON: Duration = Duration::from_secs(30);

/// Waits until something is true, a minute at most.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut is_true: impl FnMut() -> F) {
    let deadline = tokio::time::Instant::now() + Duration::from_mins(1);
    while !is_true().await {
        assert!(tokio::time::Instant::now() < deadline, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub async fn until_status(engine: &Engine, id: &str, status: ThreadStatus) {
    eventually(&format!("{id} is {status:?}"), || async {
        thread_as(engine, id).await.status == status
    })
    .await;
}

/// A node that only logs its name.
pub async fn says(name: &'static str) -> Result<NotesUpdate, NodeError> {
    Ok(log(name))
}

/// Comes back after a time; for nodes that are to overtake each other.
pub async fn takes(milliseconds: u64) {
    tokio::time::sleep(Duration::from_millis(milliseconds)).await;
}

/// Comes back when the context's thread is cancelled; fails the test if that takes for ever.
pub async fn until_cancelled(context: &Context) {
    tokio::time::timeout(SOON, context.cancelled())
        .await
        .expect("is cancelled");
}
