//! Statements 18 and 24: whatever moment a process dies at, what is in the database is a whole, and another one goes on.

use std::{
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use graph::{
    Arrived, CompiledGraph, Context, END, Engine, Goto, GraphBuilder, NodeError, NodeOptions,
    Observer, Point, Priority, RetryPolicy, START, Send, ServeOptions, StartOptions, ThreadStatus,
    WaitFor,
    checkpoint::{Checkpointer, ClaimRequest, NewThread},
};

use crate::{
    lab::{
        Lab, Notes, NotesUpdate, log, notes, options, promise, said, serve, start, state, thread,
        until_status,
    },
    storage::{
        self,
        faulty::{Fault, Faulty},
    },
};

/// What goes on inside a task: a durable step, sends, and waits for signals of one kind, one after the other.
fn inside() -> CompiledGraph<Notes> {
    notes("inside")
        .node("pay", |_, ctx: Context| async move {
            let got: i64 = ctx.step("pay", |_| async { Ok::<_, NodeError>(7) }).await?;
            ctx.emit("s", "pay", &got)?;
            Ok(log(format!("paid {got}")))
        })
        .node("each", |_, ctx: Context| async move {
            let n: i64 = ctx.argument()?;
            ctx.emit("s", "each", &n)?;
            Ok(NotesUpdate::default().sum(n))
        })
        .node("more", |_, ctx: Context| async move {
            let Arrived::Signal(came) =
                ctx.wait_any("more", &WaitFor::new().signal("more")).await?
            else {
                return Err(NodeError::msg("not a signal"));
            };
            ctx.emit("s", "more", &came.key)?;
            Ok(log(came.key))
        })
        .edge(START, "pay")
        .conditional("pay", ["each"], |_| {
            Goto::sends([1, 2].map(|n| Send::new("each", &n)))
        })
        .edge("each", "more")
        .conditional("more", ["more", END], |s: &Notes| {
            if s.log.len() < 3 { "more" } else { END }
        })
        .compile()
        .expect("compiles")
}

/// A graph with one of everything: parallel tasks, sends, durable steps, a retry, a child, signals, waits, events, a subgraph.
fn everything() -> (GraphBuilder<Notes>, CompiledGraph<Notes>) {
    let main = notes("g")
        .node("begin", |_, ctx: Context| async move {
            ctx.emit("s", "begin", &())?;
            ctx.spawn("kid", "child", &log("kid"))?;
            Ok(log("begin"))
        })
        .node("work", |_, ctx: Context| async move {
            let n: i64 = ctx.argument()?;
            let got = ctx
                .step("pay", |_| async { Ok::<_, NodeError>(n * 10) })
                .await?;
            ctx.emit("s", "work", &n)?;
            Ok(log(format!("work {got}")).sum(n))
        })
        .node_with(
            "flaky",
            NodeOptions::default()
                .retry(RetryPolicy::default().first_interval(Duration::from_millis(1))),
            |_, ctx: Context| async move {
                if ctx.attempt() == 1 {
                    return Err(NodeError::msg("the first time fails"));
                }
                ctx.emit("s", "flaky", &())?;
                Ok(log("flaky"))
            },
        )
        .node("gather", |_, ctx: Context| async move {
            ctx.emit("s", "gather", &())?;
            let Arrived::Child(end) = ctx.wait_any("kid", &WaitFor::new().child("kid")).await?
            else {
                return Err(NodeError::msg("not a child"));
            };
            let Arrived::Signal(came) = ctx.wait_any("go", &WaitFor::new().signal("go")).await?
            else {
                return Err(NodeError::msg("not a signal"));
            };
            ctx.emit("s", "gathered", &())?;
            Ok(log(format!("gather {} {}", end.output["log"][1], came.key)))
        })
        .edge(START, "begin")
        .conditional("begin", ["work", "flaky"], |_| {
            Goto::node("flaky").and(Goto::sends((1..=3).map(|n| Send::new("work", &n))))
        })
        .edge("work", "gather")
        .edge("flaky", "gather")
        .subgraph(
            "inside",
            &inside(),
            |_, _| Ok(NotesUpdate::default()),
            |s: &Notes| log(format!("inside: {}", s.log.join(", "))).sum(s.sum),
        )
        .edge("gather", "inside")
        .edge("inside", END);
    let child = notes("child")
        .node("work", |_, ctx: Context| async move {
            ctx.emit("s", "child", &())?;
            ctx.signal(&"t".into(), "go", "from the kid", &())?;
            for key in ["first", "second"] {
                ctx.signal(&"t".into(), "more", key, &())?;
            }
            Ok(log("worked"))
        })
        .edge(START, "work")
        .edge("work", END)
        .compile()
        .expect("compiles");
    (main, child)
}

async fn engine_on(store: Arc<dyn Checkpointer>) -> Engine {
    let (main, child) = everything();
    Engine::builder(store)
        .graph(main.compile().expect("compiles"))
        .graph(child)
        .build()
        .await
        .expect("builds")
}

/// What must be there in the end, whatever happened on the way.
async fn expect_everything(engine: &Engine) {
    assert_eq!(thread(engine).await.status, ThreadStatus::Done);
    assert_eq!(
        state(engine).await,
        Notes {
            log: [
                "begin",
                "flaky",
                "work 10",
                "work 20",
                "work 30",
                "gather \"worked\" from the kid",
                "inside: paid 7, first, second",
            ]
            .map(Into::into)
            .into(),
            sum: 9,
            ..Notes::default()
        }
    );
    let mut lines = said(engine, "s").await;
    lines.sort();
    assert_eq!(
        lines,
        [
            "begin null",
            "child null",
            "each 1",
            "each 2",
            "flaky null",
            "gather null",
            "gathered null",
            "more \"first\"",
            "more \"second\"",
            "pay 7",
            "work 1",
            "work 2",
            "work 3"
        ]
    );
    assert_eq!(said(engine, "t").await, ["thread.done {}"]);
    assert_eq!(said(engine, "t/kid").await, ["thread.done {}"]);
}

/// Runs everything with one commit failing, and returns whether there was such a commit.
async fn with_fault(lab: &Lab, fails_at: u64, lands: bool) -> bool {
    let fault = if lands { Fault::After } else { Fault::Before };
    let store = Arc::new(Faulty::commits(lab.store.clone(), move |commit| {
        (commit == fails_at).then_some(fault)
    }));
    let engine = engine_on(store.clone()).await;
    start(&engine).await;
    let server = serve(
        &engine,
        ServeOptions {
            // Nobody waits for a lease to expire.
            lease: Duration::from_mins(5),
            poll: Duration::from_millis(10),
            ..options()
        },
    );
    until_status(&engine, "t", ThreadStatus::Done).await;
    until_status(&engine, "t/kid", ThreadStatus::Done).await;
    server.drain().await;
    expect_everything(&engine).await;
    store.seen() >= fails_at
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_fails_leaves_nothing_and_is_made_again_in_memory() {
    for lands in [false, true] {
        let mut fails_at = 1;
        while with_fault(&Lab::memory(), fails_at, lands).await {
            fails_at += 1;
            assert!(fails_at < 100, "it never ends");
        }
        assert!(fails_at > 8, "there are commits: {fails_at}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_fails_leaves_nothing_and_is_made_again_on_sqlite() {
    for lands in [false, true] {
        let mut fails_at = 1;
        while with_fault(&Lab::sqlite().await, fails_at, lands).await {
            fails_at += 1;
            assert!(fails_at < 100, "it never ends");
        }
        assert!(fails_at > 8, "there are commits: {fails_at}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_commit_that_fails_leaves_nothing_and_is_made_again_on_postgres() {
    for lands in [false, true] {
        let mut fails_at = 1;
        while with_fault(&Lab::postgres().await, fails_at, lands).await {
            // Every second one: the others are tried elsewhere, and a server takes its time.
            fails_at += 2;
            assert!(fails_at < 100, "it never ends");
        }
        assert!(fails_at > 8, "there are commits: {fails_at}");
    }
}

// ---- kill -9 ----

const VICTIM_DATABASE: &str = "GRAPH_TEST_VICTIM_DATABASE";
const VICTIM_DIES_AT: &str = "GRAPH_TEST_VICTIM_DIES_AT";

/// Kills its own process at a point.
pub struct Executioner {
    seen: AtomicU64,
    dies_at: u64,
}

impl Executioner {
    pub fn at(dies_at: u64) -> Self {
        Self {
            seen: AtomicU64::new(0),
            dies_at,
        }
    }
}

impl Observer for Executioner {
    fn on(&self, _: &Point<'_>) {
        if self.seen.fetch_add(1, Ordering::SeqCst) + 1 == self.dies_at {
            let pid = std::process::id().to_string();
            let _ = Command::new("kill").args(["-9", &pid]).status();
            loop {
                std::thread::park();
            }
        }
    }
}

/// Not a test by itself: the process that the tests below start and kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child process of the tests below"]
async fn victim() {
    let database = std::env::var(VICTIM_DATABASE).expect("is given by the test that starts it");
    let dies_at = std::env::var(VICTIM_DIES_AT)
        .ok()
        .and_then(|text| text.parse().ok())
        .expect("a number");
    let store = open(&database).await;
    let (main, child) = everything();
    let engine = Engine::builder(store)
        .graph(main.compile().expect("compiles"))
        .graph(child)
        .observer(Arc::new(Executioner::at(dies_at)))
        .build()
        .await
        .expect("builds");
    start(&engine).await;
    let server = serve(&engine, killed_options());
    until_status(&engine, "t", ThreadStatus::Done).await;
    until_status(&engine, "t/kid", ThreadStatus::Done).await;
    server.drain().await;
}

pub fn killed_options() -> ServeOptions {
    ServeOptions {
        lease: Duration::from_millis(100),
        poll: Duration::from_millis(10),
        ..options()
    }
}

/// Starts a process that dies at a point; returns whether it did.
fn kill_at(database: &str, dies_at: u64) -> bool {
    let status = Command::new(std::env::current_exe().expect("has a path"))
        .args(["--ignored", "--exact", "crashes::victim", "--nocapture"])
        .env(VICTIM_DATABASE, database)
        .env(VICTIM_DIES_AT, dies_at.to_string())
        .stdout(Stdio::null())
        .status()
        .expect("starts");
    assert!(
        status.success() || std::os::unix::process::ExitStatusExt::signal(&status) == Some(9),
        "the victim died of something else: {status}"
    );
    !status.success()
}

/// A database by its path, or by its URL.
pub async fn open(database: &str) -> Arc<dyn Checkpointer> {
    if database.contains("://") {
        Arc::new(storage::connect(database.to_owned()).await)
    } else {
        Arc::new(storage::sqlite(database.into()).await)
    }
}

/// Kills a process at one point; the next one must make up for it. Returns whether there was such a point.
async fn made_up_for(database: &str, dies_at: u64) -> bool {
    let died = kill_at(database, dies_at);
    let engine = engine_on(open(database).await).await;
    let server = serve(&engine, killed_options());
    // A process that dies early has not even started the thread.
    start(&engine).await;
    until_status(&engine, "t", ThreadStatus::Done).await;
    until_status(&engine, "t/kid", ThreadStatus::Done).await;
    server.drain().await;
    expect_everything(&engine).await;
    died
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_at_any_point_is_made_up_for_on_sqlite() {
    let mut dies_at = 1;
    loop {
        let (path, _dir) = storage::sqlite_path();
        if !made_up_for(path.to_str().expect("is text"), dies_at).await {
            break;
        }
        dies_at += 1;
        assert!(dies_at < 200, "it never ends");
    }
    assert!(dies_at > 20, "there are points to die at: {dies_at}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_at_any_point_is_made_up_for_on_postgres() {
    let mut dies_at = 1;
    loop {
        let schema = storage::Schema::make().await;
        if !made_up_for(&schema.url, dies_at).await {
            break;
        }
        // Every fourth point: the others are tried on SQLite, and a server takes its time.
        dies_at += 4;
        assert!(dies_at < 200, "it never ends");
    }
    assert!(dies_at > 20, "there are points to die at: {dies_at}");
}

promise! {
    async fn a_thread_whose_runs_all_die_fails_in_the_end(lab) {
        let engine = lab.notes(
            notes("g").node("a", |_, _| async { Ok(NotesUpdate::default()) }).edge(START, "a").edge("a", END),
        ).await;
        engine.start("t", "g", &(), StartOptions::default()).await.expect("starts");
        // Runs that claim and are never heard of again.
        for _ in 0..21 {
            let claimed = lab.store.claim(ClaimRequest {
                owner: "dies", graphs: &["g".to_owned()], limit: 1, lease: Duration::ZERO,
            }).await.expect("claims");
            assert_eq!(claimed.claims.len(), 1);
        }
        crate::lab::run(&engine).await;
        let failed = thread(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert!(failed.error.expect("says why").contains("runs in a row have died"));
    }
}

promise! {
    async fn a_thread_that_could_not_be_loaded_is_given_back_before_its_lease_expires(lab) {
        let store = Arc::new(Faulty::loads(lab.store.clone(), 1));
        let engine = engine_on(store.clone()).await;
        start(&engine).await;
        let server = serve(
            &engine,
            ServeOptions {
                lease: Duration::from_mins(5),
                poll: Duration::from_millis(10),
                ..options()
            },
        );
        until_status(&engine, "t", ThreadStatus::Done).await;
        until_status(&engine, "t/kid", ThreadStatus::Done).await;
        server.drain().await;
        assert_eq!(store.failing_loads_left(), 0);
        expect_everything(&engine).await;
    }
}

promise! {
    async fn a_task_does_not_fail_because_the_database_is_away_while_it_speaks(lab) {
        for lands in [false, true] {
            let fault = if lands { Fault::After } else { Fault::Before };
            let store = Faulty::appends(lab.store.clone(), move |append| (append == 1).then_some(fault));
            // It is tried once, so a failure would be the thread's.
            let graph = notes("g").node("a", |_, ctx: Context| async move {
                ctx.say_now(ctx.thread().as_str(), "s", ctx.thread().as_str(), &()).await?;
                Ok(log("a"))
            }).edge(START, "a").edge("a", END);
            let engine = Engine::builder(Arc::new(store)).graph(graph.compile().expect("compiles")).build().await.expect("builds");
            let id = if lands { "landed" } else { "lost" };
            crate::lab::start_as(&engine, id).await;
            let server = serve(&engine, killed_options());
            until_status(&engine, id, ThreadStatus::Done).await;
            server.drain().await;
        }
        assert_eq!(said(&lab.notes(notes("g").node("a", |_, _| crate::lab::says("a")).edge(START, "a").edge("a", END)).await, "s").await, ["lost null", "landed null"]);
    }
}

promise! {
    async fn a_second_failure_like_the_first_one_is_not_taken_for_it_when_its_commit_is_lost(lab) {
        let store = Arc::new(Faulty::commits(lab.store.clone(), |commit| (commit == 2).then_some(Fault::Before)));
        let graph = notes("g").node("a", |_, _| crate::lab::says("a")).edge(START, "a").edge("a", END);
        let engine = Engine::builder(store).graph(graph.compile().expect("compiles")).build().await.expect("builds");
        // What nobody checks when it is written past the engine.
        lab.store.create_thread(NewThread {
            id: "t".into(),
            graph: "g".to_owned(),
            parent: None,
            priority: Priority::default(),
            input: serde_json::json!({"log": 5}).into(),
        }).await.expect("creates");
        crate::lab::run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Failed);
        engine.retry("t").await.expect("is tried");
        // The lease would hold for longer than anybody waits.
        let server = serve(&engine, ServeOptions { lease: Duration::from_mins(5), ..options() });
        until_status(&engine, "t", ThreadStatus::Failed).await;
        server.drain().await;
        assert_eq!(said(&engine, "t").await.len(), 2);
    }
}

promise! {
    async fn a_commit_that_was_lost_is_made_again_though_its_writes_were_there_before(lab) {
        // A parent that sleeps, with something in its memory, and a child that sleeps too.
        let graphs = || {
            let parent = notes("g")
                .node("spawn", |_, ctx: Context| async move {
                    ctx.spawn("kid", "child", &())?;
                    Ok(log("spawned"))
                })
                .node("wait", |_, ctx: Context| async move {
                    ctx.step("pay", |_| async { Ok::<_, NodeError>(7) }).await?;
                    ctx.wait_any("kid", &WaitFor::new().child("kid")).await?;
                    Ok(log("waited"))
                })
                .edge(START, "spawn").edge("spawn", "wait").edge("wait", END)
                .compile().expect("compiles");
            let child = notes("child")
                .node("ask", |_, ctx: Context| async move { ctx.interrupt::<()>("q", "?").await })
                .edge(START, "ask").edge("ask", END)
                .compile().expect("compiles");
            (parent, child)
        };
        let engine = async |store: Arc<dyn Checkpointer>| {
            let (parent, child) = graphs();
            Engine::builder(store).graph(parent).graph(child).build().await.expect("builds")
        };
        let good = engine(lab.store.clone()).await;
        for fault in [Fault::Before, Fault::After] {
            for lost in 1..=3 {
                let id = format!("{fault:?}-{lost}");
                crate::lab::start_as(&good, &id).await;
                crate::lab::run(&good).await;
                let store = Arc::new(Faulty::commits(lab.store.clone(), move |commit| (commit == lost).then_some(fault)));
                let bad = engine(store.clone()).await;
                bad.cancel(&*id, "enough").await.expect("is there");
                // Nobody waits for a lease to expire.
                let server = serve(&bad, ServeOptions { lease: Duration::from_mins(5), ..options() });
                let both = [id.clone(), format!("{id}/kid")];
                for id in &both {
                    until_status(&good, id, ThreadStatus::Cancelled).await;
                }
                server.drain().await;
                for id in &both {
                    // What is in the journal can be read when nothing that was begun before it is under way any more.
                    crate::lab::eventually("it is said", || async { !said(&good, id).await.is_empty() }).await;
                    assert_eq!(said(&good, id).await.len(), 1, "{id}");
                }
                assert!(lost > 2 || store.seen() >= lost, "{id}: {}", store.seen());
            }
        }
    }
}
