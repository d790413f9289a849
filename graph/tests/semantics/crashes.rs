//! Statements 18 and 24: whatever moment a process dies at, what is in the database is a whole, and another one goes on.

use std::{
    collections::BTreeMap,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use graph::{
    Arrived, CompiledGraph, Context, Cursor, END, Engine, Entry, Goto, GraphBuilder, JournalFilter,
    NodeError, NodeOptions, Observer, Point, RetryPolicy, START, Send, ServeOptions, StartOptions,
    ThreadId, ThreadInfo, ThreadStatus, WaitFor,
    checkpoint::{
        Appended, CancelOutcome, CancelRequest, CheckpointRecord, Checkpointer, ClaimRequest,
        Claimed, Commit, Created, HistoryFilter, Lease, Loaded, NewCheckpoint, NewEvent, NewSignal,
        NewThread, Receipt, Renewed, Reopened, Retention, SignalOutcome, SignalRecord, StateRows,
        StorageError, ThreadFilter,
    },
};

use crate::{
    lab::{
        Lab, Notes, NotesUpdate, log, notes, options, promise, said, serve, start, state, thread,
        until_status,
    },
    storage,
};

/// A graph with one of everything: parallel tasks, sends, durable steps, a retry, a child, signals, waits, events.
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
        .edge("gather", END);
    let child = notes("child")
        .node("work", |_, ctx: Context| async move {
            ctx.emit("s", "child", &())?;
            ctx.signal(&"t".into(), "go", "from the kid", &())?;
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
            ]
            .map(Into::into)
            .into(),
            sum: 6,
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
            "flaky null",
            "gather null",
            "gathered null",
            "work 1",
            "work 2",
            "work 3"
        ]
    );
    assert_eq!(said(engine, "t").await, ["thread.done {}"]);
    assert_eq!(said(engine, "t/kid").await, ["thread.done {}"]);
}

/// Fails at one commit: before it lands, or after it has landed (the answer is lost).
struct Faulty {
    inner: Arc<dyn Checkpointer>,
    commits: AtomicU64,
    fails_at: u64,
    lands: bool,
    /// So many times, a run cannot even load its thread.
    failing_loads: AtomicU64,
}

impl Faulty {
    fn fault() -> StorageError {
        StorageError::Backend {
            operation: "committing".into(),
            source: "the connection broke".into(),
        }
    }
}

#[async_trait]
impl Checkpointer for Faulty {
    fn name(&self) -> &'static str {
        "faulty"
    }
    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        if self.commits.fetch_add(1, Ordering::SeqCst) + 1 != self.fails_at {
            return self.inner.commit(lease, commit).await;
        }
        if self.lands {
            self.inner.commit(lease, commit).await?;
        }
        Err(Self::fault())
    }
    async fn migrate(&self) -> Result<(), StorageError> {
        self.inner.migrate().await
    }
    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        self.inner.create_thread(thread).await
    }
    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        self.inner.signal(signal, answers).await
    }
    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        self.inner.cancel(request).await
    }
    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError> {
        self.inner.reopen(thread).await
    }
    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadInfo>, StorageError> {
        self.inner.thread(thread).await
    }
    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadInfo>, StorageError> {
        self.inner.threads(filter).await
    }
    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError> {
        self.inner.delete_thread(thread).await
    }
    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        self.inner.claim(request).await
    }
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        self.inner.renew(leases, lease).await
    }
    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
        self.inner.break_leases(owner).await
    }
    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        let failing = self
            .failing_loads
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        if failing.is_ok() {
            return Err(Self::fault());
        }
        self.inner.load(lease).await
    }
    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        self.inner.mailbox(thread, after).await
    }
    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError> {
        self.inner.history(thread, filter).await
    }
    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        self.inner.state_rows(thread, checkpoint).await
    }
    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        self.inner.fork(thread, checkpoint).await
    }
    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        self.inner.set_head(thread, branch).await
    }
    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError> {
        self.inner.branches(thread).await
    }
    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        self.inner.journal(filter, after, limit).await
    }
    async fn journal_end(&self) -> Result<Cursor, StorageError> {
        self.inner.journal_end().await
    }
    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        self.inner.append(id, event).await
    }
    fn retention(&self) -> &dyn Retention {
        self.inner.retention()
    }
}

/// Runs everything with one commit failing, and returns whether there was such a commit.
async fn with_fault(lab: &Lab, fails_at: u64, lands: bool) -> bool {
    let store = Arc::new(Faulty {
        inner: lab.store.clone(),
        commits: AtomicU64::new(0),
        fails_at,
        lands,
        failing_loads: AtomicU64::new(0),
    });
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
    store.commits.load(Ordering::SeqCst) >= fails_at
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
            fails_at += 1;
            assert!(fails_at < 100, "it never ends");
        }
        assert!(fails_at > 8, "there are commits: {fails_at}");
    }
}

// ---- kill -9 ----

const VICTIM_DATABASE: &str = "GRAPH_TEST_VICTIM_DATABASE";
const VICTIM_DIES_AT: &str = "GRAPH_TEST_VICTIM_DIES_AT";

/// Kills its own process at a point.
struct Executioner {
    seen: AtomicU64,
    dies_at: u64,
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
async fn victim() {
    let Ok(database) = std::env::var(VICTIM_DATABASE) else {
        return;
    };
    let dies_at = std::env::var(VICTIM_DIES_AT)
        .ok()
        .and_then(|text| text.parse().ok())
        .expect("a number");
    let store = open(&database).await;
    let (main, child) = everything();
    let engine = Engine::builder(store)
        .graph(main.compile().expect("compiles"))
        .graph(child)
        .observer(Arc::new(Executioner {
            seen: AtomicU64::new(0),
            dies_at,
        }))
        .build()
        .await
        .expect("builds");
    start(&engine).await;
    let server = serve(&engine, killed_options());
    until_status(&engine, "t", ThreadStatus::Done).await;
    until_status(&engine, "t/kid", ThreadStatus::Done).await;
    server.drain().await;
}

fn killed_options() -> ServeOptions {
    ServeOptions {
        lease: Duration::from_millis(100),
        poll: Duration::from_millis(10),
        ..options()
    }
}

/// Starts a process that dies at a point; returns whether it did.
fn kill_at(database: &str, dies_at: u64) -> bool {
    let status = Command::new(std::env::current_exe().expect("has a path"))
        .args(["--exact", "crashes::victim", "--nocapture"])
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
async fn open(database: &str) -> Arc<dyn Checkpointer> {
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
        // Every third point: the others are tried on SQLite, and a server takes its time.
        dies_at += 3;
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
        let store = Arc::new(Faulty {
            inner: lab.store.clone(),
            commits: AtomicU64::new(0),
            fails_at: 0,
            lands: false,
            failing_loads: AtomicU64::new(1),
        });
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
        assert_eq!(store.failing_loads.load(Ordering::SeqCst), 0);
        expect_everything(&engine).await;
    }
}
