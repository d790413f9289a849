//! Statements 23 and 29 between processes: waking is by message, and what is lost is found with the next poll.

use std::{
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt};
use graph::{
    Context, Cursor, END, Engine, GraphBuilder, NodeError, START, ServeOptions, StartOptions,
    ThreadStatus, WaitFor,
    checkpoint::{Bell, Checkpointer, StorageError},
};
use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use crate::{
    lab::{
        Lab, Notes, SOON, eventually, log, notes, options, promise, run, serve, start, start_as,
        takes, thread_as, until_cancelled, until_status,
    },
    storage,
};

/// Nothing is found by polling before a test has failed.
const NEVER: Duration = Duration::from_mins(10);

fn patient() -> ServeOptions {
    ServeOptions {
        poll: NEVER,
        lease: 4 * NEVER,
        ..options()
    }
}

/// Sleeps until the signal `m`, and then until the signal `n`.
fn sleeper() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, ctx: Context| async move {
            ctx.wait_any("m", &WaitFor::new().signal("m")).await?;
            ctx.wait_any("n", &WaitFor::new().signal("n")).await?;
            Ok(log("woke"))
        })
        .edge(START, "a")
        .edge("a", END)
}

/// Runs until it is cancelled.
fn worker(started: Arc<Notify>) -> GraphBuilder<Notes> {
    notes("g")
        .node("a", move |_, ctx: Context| {
            let started = started.clone();
            async move {
                started.notify_one();
                until_cancelled(&ctx).await;
                Err::<(), _>(NodeError::msg("stopped"))
            }
        })
        .edge(START, "a")
        .edge("a", END)
}

fn nothing() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, _| async { Ok(()) })
        .edge(START, "a")
        .edge("a", END)
}

/// An engine whose readers look into the database only when they are told to.
async fn patient_engine(store: Arc<dyn Checkpointer>, graph: GraphBuilder<Notes>) -> Engine {
    Engine::builder(store)
        .graph(graph.compile().expect("compiles"))
        .poll(NEVER)
        .build()
        .await
        .expect("builds")
}

promise! {
    async fn starts_and_signals_from_another_process_wake_a_server_without_a_poll(lab) {
        let (runner, other) = (lab.notes(sleeper()).await, lab.notes(sleeper()).await);
        let server = serve(&runner, patient());
        // One after the other, so that the server has gone to sleep in between.
        for id in ["1", "2", "3"] {
            start_as(&other, id).await;
            until_status(&other, id, ThreadStatus::Waiting).await;
            for kind in ["m", "n"] {
                other.signal(id, kind, kind, &()).await.expect("is taken");
                let open = || async { thread_as(&other, id).await.waits.iter().any(|wait| wait.name == kind) };
                eventually("the answer is taken", || async { !open().await }).await;
            }
            until_status(&other, id, ThreadStatus::Done).await;
        }
        server.drain().await;
    }
}

promise! {
    async fn cancelling_reaches_a_task_in_another_process_without_a_poll(lab) {
        let started = Arc::new(Notify::new());
        let runner = lab.notes(worker(started.clone())).await;
        let other = lab.notes(worker(Arc::default())).await;
        start(&runner).await;
        let server = serve(&runner, patient());
        started.notified().await;
        other.cancel("t", "enough").await.expect("is taken");
        until_status(&other, "t", ThreadStatus::Cancelled).await;
        server.drain().await;
    }
}

promise! {
    async fn a_deleted_thread_is_stopped_in_another_process_without_a_poll(lab) {
        let started = Arc::new(Notify::new());
        let alive = started.clone();
        let runner = lab.notes(worker(started.clone())).await;
        let other = lab.notes(worker(Arc::default())).await;
        start(&runner).await;
        let server = serve(&runner, patient());
        started.notified().await;
        let running = Arc::strong_count(&alive);
        other.delete("t").await.expect("is deleted");
        eventually("the run has stopped", || async { Arc::strong_count(&alive) < running }).await;
        server.drain().await;
    }
}

promise! {
    async fn a_reader_of_the_journal_hears_another_process_without_a_poll(lab) {
        let reader = patient_engine(lab.store.clone(), nothing()).await;
        let writer = lab.notes(nothing()).await;
        let server = serve(&writer, patient());
        let journal = reader.journal();
        let mut after = Cursor::START;
        for id in ["1", "2", "3"] {
            let wait = tokio::time::timeout(SOON, journal.changed(after, NEVER));
            let (changed, ()) = tokio::join!(wait, async {
                takes(10).await;
                start_as(&writer, id).await;
            });
            changed.expect("is woken").expect("reads");
            after = journal.end().await.expect("reads");
        }
        server.drain().await;
    }
}

promise! {
    async fn a_process_without_room_leaves_work_to_another(lab) {
        let (go, started) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let graph = |go: Arc<Notify>, started: Arc<Notify>| notes("g")
            .node("a", move |_, ctx: Context| {
                let (go, started) = (go.clone(), started.clone());
                async move {
                    if ctx.thread().as_str() == "long" {
                        started.notify_one();
                        go.notified().await;
                    }
                    Ok(())
                }
            })
            .edge(START, "a").edge("a", END);
        let busy = lab.notes(graph(go.clone(), started.clone())).await;
        let idle = lab.notes(graph(go.clone(), started.clone())).await;
        let full = serve(&busy, ServeOptions { concurrency: 1, ..patient() });
        start_as(&busy, "long").await;
        started.notified().await;
        let other = serve(&idle, patient());
        // The first may be found by the look that a server begins with.
        for id in ["1", "2", "3"] {
            start_as(&busy, id).await;
            until_status(&busy, id, ThreadStatus::Done).await;
        }
        go.notify_one();
        until_status(&busy, "long", ThreadStatus::Done).await;
        full.drain().await;
        other.drain().await;
    }
}

promise! {
    async fn what_a_draining_process_gives_back_is_taken_by_another_without_a_poll(lab) {
        let (go, started) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let graph = |go: Arc<Notify>, started: Arc<Notify>| notes("g")
            .node("a", move |_, _| {
                let (go, started) = (go.clone(), started.clone());
                async move {
                    started.notify_one();
                    go.notified().await;
                    Ok(log("a"))
                }
            })
            .node("b", |_, _| async { Ok(log("b")) })
            .edge(START, "a").edge("a", "b").edge("b", END);
        let (first, drained) = lab.drained_notes(graph(go.clone(), started.clone())).await;
        let second = lab.notes(graph(go.clone(), started.clone())).await;
        let leaving = serve(&first, patient());
        start(&first).await;
        started.notified().await;
        let staying = serve(&second, patient());
        leaving.begin_to_drain(&drained).await;
        go.notify_one();
        leaving.drain().await;
        until_status(&second, "t", ThreadStatus::Done).await;
        staying.drain().await;
    }
}

// ---- what is told, and what is lost ----

/// Passes messages on, unless it is told not to, and remembers them.
struct Tapped {
    inner: Arc<dyn Bell>,
    /// Messages get lost, and nobody can listen.
    broken: AtomicBool,
    cut: watch::Sender<u64>,
    rung: Mutex<Vec<String>>,
}

impl Tapped {
    fn on(store: &Arc<dyn Checkpointer>, broken: bool) -> Arc<Self> {
        Arc::new(Self {
            inner: store.bell().expect("has a bell"),
            broken: AtomicBool::new(broken),
            cut: watch::Sender::new(0),
            rung: Mutex::default(),
        })
    }

    /// Whoever listens hears nothing any more, and has to listen again.
    fn cut(&self) {
        self.cut.send_modify(|count| *count += 1);
    }

    /// Messages that say where to look; the others say who is there.
    fn news(&self) -> Vec<String> {
        let rung = self.rung.lock();
        rung.iter()
            .filter(|message| {
                let message: serde_json::Value = serde_json::from_str(message).expect("is JSON");
                let message = message.as_object().expect("is an object");
                message
                    .keys()
                    .any(|key| !["f", "i", "h"].contains(&key.as_str()))
            })
            .cloned()
            .collect()
    }

    async fn engine(self: &Arc<Self>, lab: &Lab, graph: GraphBuilder<Notes>) -> Engine {
        Engine::builder(lab.store.clone())
            .graph(graph.compile().expect("compiles"))
            .bell(self.clone())
            .build()
            .await
            .expect("builds")
    }
}

fn fault() -> StorageError {
    StorageError::Backend {
        operation: "telling other processes".into(),
        source: "the connection broke".into(),
    }
}

#[async_trait]
impl Bell for Tapped {
    fn is_heard(&self) -> bool {
        self.inner.is_heard()
    }

    async fn ring(&self, message: &str) -> Result<(), StorageError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(fault());
        }
        self.rung.lock().push(message.to_owned());
        self.inner.ring(message).await
    }

    async fn listen(&self) -> Result<BoxStream<'static, String>, StorageError> {
        if self.broken.load(Ordering::SeqCst) {
            return Err(fault());
        }
        let mut cut = self.cut.subscribe();
        let heard = self.inner.listen().await?;
        Ok(heard
            .take_until(async move {
                let _ = cut.changed().await;
            })
            .boxed())
    }
}

promise! {
    async fn what_no_message_tells_is_found_within_the_poll(lab) {
        let bell = Tapped::on(&lab.store, true);
        let (runner, other) = (bell.engine(&lab, sleeper()).await, bell.engine(&lab, sleeper()).await);
        let quick = ServeOptions { poll: Duration::from_millis(50), ..options() };
        let server = serve(&runner, quick);
        start(&other).await;
        until_status(&other, "t", ThreadStatus::Waiting).await;
        for kind in ["m", "n"] {
            other.signal("t", kind, kind, &()).await.expect("is taken");
        }
        until_status(&other, "t", ThreadStatus::Done).await;
        start_as(&other, "c").await;
        until_status(&other, "c", ThreadStatus::Waiting).await;
        other.cancel("c", "enough").await.expect("is taken");
        until_status(&other, "c", ThreadStatus::Cancelled).await;
        server.drain().await;
        assert!(bell.rung.lock().is_empty());
    }
}

promise! {
    async fn a_lost_connection_is_made_again_and_nothing_is_overslept(lab) {
        let bell = Tapped::on(&lab.store, false);
        let runner = bell.engine(&lab, sleeper()).await;
        let other = lab.notes(sleeper()).await;
        let server = serve(&runner, patient());
        start(&other).await;
        until_status(&other, "t", ThreadStatus::Waiting).await;
        // While nobody can hear it, the thread becomes due.
        bell.broken.store(true, Ordering::SeqCst);
        bell.cut();
        eventually("nobody listens", || async { bell.cut.receiver_count() == 0 }).await;
        other.signal("t", "m", "m", &()).await.expect("is taken");
        other.flush().await;
        // Whoever hears again looks first.
        bell.broken.store(false, Ordering::SeqCst);
        let open = || async { thread_as(&other, "t").await.waits.iter().any(|wait| wait.name == "n") };
        eventually("the first signal is found", open).await;
        other.signal("t", "n", "n", &()).await.expect("is taken");
        until_status(&other, "t", ThreadStatus::Done).await;
        server.drain().await;
    }
}

promise! {
    async fn steps_that_wake_nobody_send_nothing(lab) {
        let mut chain = notes("g").edge(START, "n00");
        for number in 0..20 {
            let name = format!("n{number:02}");
            chain = chain.node(name.clone(), |_, _| async { Ok(log("step")) });
            chain = chain.edge(name, if number == 19 { END.to_owned() } else { format!("n{:02}", number + 1) });
        }
        let bell = Tapped::on(&lab.store, false);
        let engine = bell.engine(&lab, chain).await;
        let server = serve(&engine, patient());
        let serves = || async { bell.rung.lock().iter().any(|message| message.contains("\"g\":[")) };
        eventually("it says that it runs threads", serves).await;
        let mut runs = 0;
        eventually("it is known who else is there", || {
            runs += 1;
            let (engine, bell) = (engine.clone(), bell.clone());
            async move {
                bell.rung.lock().clear();
                let id = format!("t{runs}");
                start_as(&engine, &id).await;
                until_status(&engine, &id, ThreadStatus::Done).await;
                engine.flush().await;
                // Neither a start in a process that has room nor a step that wakes nobody is told; what is said is, until it
                // is known that nobody listens.
                let news = bell.news();
                assert!(news.iter().all(|message| !message.contains("\"d\"") && !message.contains("\"a\"")), "{news:?}");
                assert!(news.len() <= 2, "{news:?}");
                news.is_empty()
            }
        })
        .await;
        server.drain().await;
    }
}

#[tokio::test]
async fn in_memory_nothing_is_told_while_nobody_listens() {
    let lab = Lab::memory();
    let bell = Tapped::on(&lab.store, false);
    let engine = bell
        .engine(
            &lab,
            notes("g")
                .node("a", |_, _| async { Ok(log("a")) })
                .edge(START, "a")
                .edge("a", END),
        )
        .await;
    start_as(&engine, "alone").await;
    run(&engine).await;
    assert_eq!(*bell.rung.lock(), Vec::<String>::new());
    let listening = bell.listen().await.expect("listens");
    start_as(&engine, "heard").await;
    run(&engine).await;
    assert_ne!(*bell.rung.lock(), Vec::<String>::new());
    drop(listening);
    bell.rung.lock().clear();
    start_as(&engine, "alone again").await;
    run(&engine).await;
    assert_eq!(*bell.rung.lock(), Vec::<String>::new());
}

promise! {
    async fn many_wakes_at_once_are_told_in_few_messages(lab) {
        let bell = Tapped::on(&lab.store, false);
        let engine = bell.engine(&lab, nothing()).await;
        let _listening = bell.listen().await.expect("listens");
        // It does not run threads itself: whoever does has to be told.
        let starts = (0..200).map(|number| {
            let engine = engine.clone();
            async move { start_as(&engine, &number.to_string()).await }
        });
        let before = tokio::time::Instant::now();
        futures::future::join_all(starts).await;
        engine.flush().await;
        let most = 2 + before.elapsed().as_millis() / 3;
        let news = bell.news();
        assert!(!news.is_empty() && (news.len() as u128) <= most, "{} messages, {most} at most", news.len());
    }
}

promise! {
    async fn of_many_processes_that_are_woken_one_runs_the_thread(lab) {
        let mut servers = Vec::new();
        for number in 0..4 {
            let engine = lab.notes(sleeper()).await;
            let options = ServeOptions { owner: format!("process {number}"), ..patient() };
            servers.push(serve(&engine, options));
        }
        let other = lab.notes(sleeper()).await;
        start(&other).await;
        until_status(&other, "t", ThreadStatus::Waiting).await;
        for kind in ["m", "n"] {
            other.signal("t", kind, kind, &()).await.expect("is taken");
        }
        until_status(&other, "t", ThreadStatus::Done).await;
        assert_eq!(crate::lab::state(&other).await.log, ["woke"]);
        for server in servers {
            server.drain().await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_the_server_closes_is_made_again() {
    let schema = storage::Schema::make().await;
    let engine = |url: String| async {
        let store: Arc<dyn Checkpointer> = Arc::new(storage::connect(url).await);
        patient_engine(store, sleeper()).await
    };
    // Its connections can be told from those of others by their name.
    let name = schema
        .url
        .rsplit("%3D")
        .next()
        .expect("a schema")
        .to_owned();
    let runner = engine(format!("{}&application_name={name}", schema.url)).await;
    let other = engine(schema.url.clone()).await;
    let server = serve(&runner, patient());
    start(&other).await;
    until_status(&other, "t", ThreadStatus::Waiting).await;
    let admin = sqlx::PgPool::connect(&schema.url).await.expect("connects");
    eventually("the connection is closed", || async {
        let closed: i64 = sqlx::query_scalar(
            "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = $1 and query like 'LISTEN%'",
        )
        .bind(&name)
        .fetch_one(&admin)
        .await
        .expect("looks");
        closed == 1
    })
    .await;
    for kind in ["m", "n"] {
        other.signal("t", kind, kind, &()).await.expect("is taken");
    }
    until_status(&other, "t", ThreadStatus::Done).await;
    server.drain().await;
}

// ---- processes ----

const DATABASE: &str = "GRAPH_TEST_SERVER_DATABASE";

async fn open(database: &str) -> Arc<dyn Checkpointer> {
    if database.contains("://") {
        Arc::new(storage::connect(database.to_owned()).await)
    } else {
        Arc::new(storage::sqlite(database.into()).await)
    }
}

/// Not a test by itself: the process that the tests below start. It is killed when they have seen enough, and ends by itself
/// when they could not kill it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child process of the tests below"]
async fn server_process() {
    let database = std::env::var(DATABASE).expect("is given by the test that starts it");
    let engine = patient_engine(open(&database).await, sleeper()).await;
    let _server = serve(&engine, patient());
    tokio::time::sleep(Duration::from_mins(1)).await;
}

struct Process(Child);

impl Process {
    fn start(database: &str) -> Self {
        let child = Command::new(std::env::current_exe().expect("has a path"))
            .args([
                "--ignored",
                "--exact",
                "wakes::server_process",
                "--nocapture",
            ])
            .env(DATABASE, database)
            .stdout(Stdio::null())
            .spawn()
            .expect("starts");
        Self(child)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn signals_reach_a_sleeping_thread_of(database: &str) {
    let engine = patient_engine(open(database).await, sleeper()).await;
    let _process = Process::start(database);
    for id in ["1", "2"] {
        engine
            .start(id, "g", &(), StartOptions::default())
            .await
            .expect("starts");
        until_status(&engine, id, ThreadStatus::Waiting).await;
        for kind in ["m", "n"] {
            engine.signal(id, kind, kind, &()).await.expect("is taken");
        }
        until_status(&engine, id, ThreadStatus::Done).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_from_one_process_runs_the_step_in_another_on_sqlite() {
    let (path, _dir) = storage::sqlite_path();
    signals_reach_a_sleeping_thread_of(path.to_str().expect("is text")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_from_one_process_runs_the_step_in_another_on_postgres() {
    let schema = storage::Schema::make().await;
    signals_reach_a_sleeping_thread_of(&schema.url).await;
}
