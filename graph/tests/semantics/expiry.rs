//! Statement 11, at the moment at which the time of a question is over: an answer and the expiry meet, and processes die. One of
//! them counts, for whoever answered and for the node alike.

use std::{
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use graph::{
    Context, END, Engine, EngineError, GraphBuilder, START, StartOptions, StorageError,
    ThreadStatus, WaitFor,
    checkpoint::{Checkpointer, ClaimRequest, Claimed, Commit, Lease, Loaded, Receipt, Renewed},
};
use jiff::{SignedDuration, Timestamp};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    crashes::{Executioner, killed_options, open},
    lab::{
        Notes, eventually, log, notes, options, promise, run, serve, state, thread_as, until_status,
    },
    storage::{
        self,
        delegate::{Delegate, Delegating},
    },
};

/// Asks until a time, and can be run in between.
fn asks(graph: &str, deadline: Timestamp) -> GraphBuilder<Notes> {
    notes(graph)
        .node("ask", move |_, ctx: Context| async move {
            let poke = WaitFor::new().signal("poke");
            let (reply, _) = tokio::join!(
                ctx.interrupt_until::<String>("who", "?", deadline),
                ctx.wait_any("poke", &poke),
            );
            Ok(log(reply?.answer().unwrap_or_else(|| "nobody".to_owned())))
        })
        .edge(START, "ask")
        .edge("ask", END)
}

async fn engine_on(store: Arc<dyn Checkpointer>, graph: GraphBuilder<Notes>) -> Engine {
    let graph = graph.compile().expect("compiles");
    let engine = Engine::builder(store).graph(graph).build().await;
    engine.expect("builds")
}

/// When the answer is given.
#[derive(Clone, Copy, Debug)]
enum Order {
    /// Right before the run says that the time is over.
    AnswerFirst,
    Together,
    ExpiryFirst,
}

/// What becomes of the process that says so, or of what it says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Lives,
    DiesBefore,
    DiesAfter,
    RequestLost,
    AnswerLost,
}

type Answered = Result<(), EngineError>;

/// The database of a process whose clock is two hours ahead, so that it takes questions for over that can still be answered.
struct Ahead {
    inner: Arc<dyn Checkpointer>,
    order: Order,
    fate: Fate,
    /// Who answers, and which question.
    desk: Engine,
    thread: String,
    question: String,
    answered: Mutex<Option<Answered>>,
    /// Whoever holds it takes or renews leases, or dies.
    leases: tokio::sync::Mutex<()>,
    dead: CancellationToken,
}

impl Ahead {
    fn wrong(now: Timestamp) -> Timestamp {
        now + SignedDuration::from_hours(2)
    }

    /// Comes back with the right to take leases, unless the process is dead.
    async fn alive(&self) -> tokio::sync::MutexGuard<'_, ()> {
        let guard = self.leases.lock().await;
        if self.dead.is_cancelled() {
            std::future::pending::<()>().await;
        }
        guard
    }

    async fn answer(&self) {
        let answered = self.desk.answer(&*self.thread, &self.question, "Ada").await;
        *self.answered.lock().expect("is whole") = Some(answered);
    }

    async fn expire(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        if matches!(self.fate, Fate::DiesBefore | Fate::RequestLost) {
            return Err(lost());
        }
        self.inner.commit(lease, commit).await
    }
}

fn lost() -> StorageError {
    StorageError::Backend {
        operation: "saying that the time is over".to_owned(),
        source: "the connection broke".into(),
    }
}

#[async_trait]
impl Delegate for Ahead {
    fn inner(&self) -> &dyn Checkpointer {
        &*self.inner
    }

    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        let _alive = self.alive().await;
        let mut claimed = self.inner.claim(request).await?;
        for claim in &mut claimed.claims {
            if let Some(loaded) = &mut claim.loaded {
                loaded.now = Self::wrong(loaded.now);
            }
        }
        Ok(claimed)
    }

    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        let _alive = self.alive().await;
        self.inner.renew(leases, lease).await
    }

    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        let mut loaded = self.inner.load(lease).await?;
        loaded.now = Self::wrong(loaded.now);
        Ok(loaded)
    }

    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        if self.dead.is_cancelled() {
            std::future::pending::<()>().await;
        }
        let expires = commit.signals.iter().any(|it| it.kind == "graph.expired");
        let first = self.answered.lock().expect("is whole").is_none();
        if !(expires && first) {
            let mut receipt = self.inner.commit(lease, commit).await?;
            receipt.now = Self::wrong(receipt.now);
            return Ok(receipt);
        }
        let receipt = match self.order {
            Order::AnswerFirst => {
                self.answer().await;
                self.expire(lease, commit).await
            }
            Order::Together => tokio::join!(self.expire(lease, commit), self.answer()).0,
            Order::ExpiryFirst => {
                let receipt = self.expire(lease, commit).await;
                self.answer().await;
                receipt
            }
        };
        match self.fate {
            Fate::DiesBefore | Fate::DiesAfter => {
                let _last = self.leases.lock().await;
                self.dead.cancel();
                std::future::pending().await
            }
            Fate::AnswerLost => Err(lost()),
            Fate::Lives | Fate::RequestLost => receipt,
        }
    }
}

/// One meeting, from the start of the thread to its end.
async fn meet(store: Arc<dyn Checkpointer>, order: Order, fate: Fate) {
    let case = format!("{order:?}-{fate:?}");
    // Nobody's clock gets there but one that is wrong.
    let deadline = Timestamp::now() + SignedDuration::from_hours(1);
    let desk = engine_on(store.clone(), asks(&case, deadline)).await;
    desk.start(&*case, &case, &(), StartOptions::default())
        .await
        .expect("starts");
    run(&desk).await;
    let waits = thread_as(&desk, &case).await.waits;
    let question = waits.iter().find(|wait| wait.name == "who");
    let ahead = Arc::new(Delegating(Ahead {
        inner: store.clone(),
        order,
        fate,
        desk: desk.clone(),
        thread: case.clone(),
        question: question.expect("is asked").id.clone(),
        answered: Mutex::new(None),
        leases: tokio::sync::Mutex::default(),
        dead: CancellationToken::new(),
    }));
    desk.signal(&*case, "poke", "poke", &())
        .await
        .expect("is sent");
    let process = engine_on(ahead.clone(), asks(&case, deadline)).await;
    let server = serve(
        &process,
        graph::ServeOptions {
            owner: case.clone(),
            lease: Duration::from_mins(5),
            ..options()
        },
    );
    if matches!(fate, Fate::DiesBefore | Fate::DiesAfter) {
        let died = tokio::time::timeout(Duration::from_mins(1), ahead.dead.cancelled()).await;
        died.expect("dies");
        drop(server);
        store.break_leases(&case).await.expect("is dead");
        run(&desk).await;
    } else {
        until_status(&desk, &case, ThreadStatus::Done).await;
        server.drain().await;
    }
    let answered = ahead.answered.lock().expect("is whole").take();
    let answered = answered.expect("somebody has answered");
    let ended: Notes = desk.state(&*case).await.expect("has a state");
    let told = match &answered {
        Ok(()) => "Ada",
        Err(EngineError::Expired { .. }) => "nobody",
        Err(other) => panic!("{case}: {other}"),
    };
    assert_eq!(ended.log, [told], "{case}: {answered:?}");
    match (order, fate) {
        (Order::AnswerFirst, _) | (_, Fate::DiesBefore) => assert_eq!(told, "Ada", "{case}"),
        (Order::ExpiryFirst, Fate::Lives | Fate::DiesAfter | Fate::AnswerLost) => {
            assert_eq!(told, "nobody", "{case}");
        }
        _ => {}
    }
    let again = desk.answer(&*case, &ahead.question, "Bob").await;
    match again.expect_err("is refused") {
        EngineError::AlreadyAnswered { .. } => assert_eq!(told, "Ada", "{case}"),
        EngineError::Expired { .. } => assert_eq!(told, "nobody", "{case}"),
        other => panic!("{case}: {other}"),
    }
    let (mailbox, _) = store
        .mailbox(&case.as_str().into(), 0)
        .await
        .expect("reads");
    assert!(mailbox.is_empty(), "{case}: {mailbox:?}");
}

promise! {
    async fn of_an_answer_and_an_expiry_that_meet_one_counts_whatever_dies_between(lab) {
        let mut cases = JoinSet::new();
        for order in [Order::AnswerFirst, Order::Together, Order::ExpiryFirst] {
            for fate in [Fate::Lives, Fate::DiesBefore, Fate::DiesAfter, Fate::RequestLost, Fate::AnswerLost] {
                cases.spawn(meet(lab.store.clone(), order, fate));
            }
        }
        while let Some(done) = cases.join_next().await {
            done.expect("one outcome");
        }
    }
}

// ---- kill -9 ----

/// Starts the thread and pokes it, whoever has done so before, and runs it to its end.
async fn asked_to_the_end(engine: &Engine) {
    crate::lab::start(engine).await;
    engine
        .signal("t", "poke", "poke", &())
        .await
        .expect("is sent");
    let server = serve(engine, killed_options());
    until_status(engine, "t", ThreadStatus::Done).await;
    server.drain().await;
}

const DATABASE: &str = "GRAPH_TEST_EXPIRY_DATABASE";
const DIES_AT: &str = "GRAPH_TEST_EXPIRY_DIES_AT";
const DEADLINE: &str = "GRAPH_TEST_EXPIRY_DEADLINE";

/// Not a test by itself: the process that the tests below start and kill.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "runs as the child process of the tests below"]
async fn victim() {
    let given = |name| std::env::var(name).expect("is given by the test that starts it");
    let deadline: Timestamp = given(DEADLINE).parse().expect("a time");
    let graph = asks("g", deadline).compile().expect("compiles");
    let dies_at = given(DIES_AT).parse().expect("a number");
    let engine = Engine::builder(open(&given(DATABASE)).await)
        .graph(graph)
        .observer(Arc::new(Executioner::at(dies_at)))
        .build()
        .await
        .expect("builds");
    asked_to_the_end(&engine).await;
}

fn begin(database: &str, dies_at: u64, deadline: Timestamp) -> Child {
    Command::new(std::env::current_exe().expect("has a path"))
        .args(["--ignored", "--exact", "expiry::victim", "--nocapture"])
        .env(DATABASE, database)
        .env(DIES_AT, dies_at.to_string())
        .env(DEADLINE, deadline.to_string())
        .stdout(Stdio::null())
        .spawn()
        .expect("starts")
}

/// The question, if it is asked before the victim is gone.
async fn asked(engine: &Engine, victim: &mut Child) -> Option<String> {
    for _ in 0..12_000 {
        if let Some(thread) = engine.thread("t").await.expect("reads") {
            let question = thread.waits.iter().find(|wait| wait.name == "who");
            if let Some(question) = question {
                return Some(question.id.clone());
            }
            if thread.status.is_ended() {
                return None;
            }
        }
        if victim.try_wait().expect("can be asked").is_some() {
            return None;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the victim neither asks nor dies");
}

/// Kills a process at one point, answers at about the deadline, and lets another process make up for it. Returns whether there
/// was such a point.
async fn made_up_for(database: String, dies_at: u64) -> bool {
    let deadline = Timestamp::now() + SignedDuration::from_millis(400);
    let mut victim = begin(&database, dies_at, deadline);
    let engine = engine_on(open(&database).await, asks("g", deadline)).await;
    let question = asked(&engine, &mut victim).await;
    let mut answered = None;
    if let Some(question) = &question {
        let offset = i64::try_from(dies_at % 5).expect("is small") - 2;
        let moment = deadline + SignedDuration::from_millis(offset);
        eventually("the moment has come", || async move {
            Timestamp::now() >= moment - SignedDuration::from_millis(5)
        })
        .await;
        let rest = Duration::try_from(Timestamp::now().duration_until(moment)).unwrap_or_default();
        tokio::time::sleep(rest).await;
        answered = Some(engine.answer("t", question, "Ada").await);
    }
    let status = tokio::task::spawn_blocking(move || victim.wait());
    let status = status.await.expect("waits").expect("ends");
    let died = std::os::unix::process::ExitStatusExt::signal(&status) == Some(9);
    assert!(died || status.success(), "died of something else: {status}");
    // A process that dies early has not even started the thread.
    asked_to_the_end(&engine).await;
    let told = state(&engine).await.log;
    match &answered {
        Some(Ok(())) => assert_eq!(told, ["Ada"], "killed at {dies_at}"),
        None | Some(Err(EngineError::Expired { .. })) => {
            assert_eq!(told, ["nobody"], "killed at {dies_at}");
        }
        Some(Err(other)) => panic!("killed at {dies_at}: {other}"),
    }
    died
}

/// Kills processes at all these points, a few at a time. Returns at how many they died.
async fn killed_at<K: Send + 'static>(
    points: impl Iterator<Item = u64>,
    mut database: impl AsyncFnMut() -> (String, K),
) -> usize {
    let mut deaths = 0;
    let mut cases = JoinSet::new();
    let mut over = |done: Result<bool, tokio::task::JoinError>| {
        deaths += usize::from(done.expect("is made up for"));
    };
    for dies_at in points {
        let (database, keep) = database().await;
        cases.spawn(async move {
            let died = made_up_for(database, dies_at).await;
            drop(keep);
            died
        });
        if cases.len() == 4 {
            over(cases.join_next().await.expect("there are some"));
        }
    }
    while let Some(done) = cases.join_next().await {
        over(done);
    }
    deaths
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_as_a_question_expires_is_made_up_for_on_sqlite() {
    let deaths = killed_at(1..=10, async || {
        let (path, dir) = storage::sqlite_path();
        (path.to_str().expect("is text").to_owned(), dir)
    })
    .await;
    assert!(deaths >= 6, "there are points to die at: {deaths}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_killed_as_a_question_expires_is_made_up_for_on_postgres() {
    let deaths = killed_at([2, 4, 5, 6, 7].into_iter(), async || {
        let schema = storage::Schema::make().await;
        (schema.url.clone(), schema)
    })
    .await;
    assert!(deaths >= 3, "there are points to die at: {deaths}");
}
