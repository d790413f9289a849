//! Threads of all kinds, many at a time, whoever serves them and however often that one dies; what is asked of them from
//! outside, again and again until it is acknowledged; and what must be there in the end.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::Write as _,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use graph::{
    Arrived, CancelOutcome, Context, Cursor, Delivered, END, Engine, EngineError, Entry, Goto,
    Graph, GraphBuilder, JournalFilter, NodeError, NodeOptions, RetryPolicy, START, Send,
    ServeOptions, StartOptions, State, StorageError, ThreadInfo, ThreadStatus, WaitFor,
    checkpoint::Checkpointer,
};
use jiff::{SignedDuration, Timestamp};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};

/// How many threads are under way at the same time.
const WIDTH: usize = 16;

/// The longest that a thread may take, with all that happens to its servers.
const PATIENCE: Duration = Duration::from_mins(1);

/// Asks until there is an answer: nothing is known about a request whose answer was lost, so it is made again.
macro_rules! insist {
    ($what:expr, $request:expr) => {{
        let deadline = Instant::now() + PATIENCE;
        loop {
            match $request.await {
                Ok(answer) => break answer,
                Err(EngineError::Storage(StorageError::Backend { .. }))
                    if Instant::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{}: {error:?}", $what),
            }
        }
    }};
}

const LINKS: usize = 12;
const SENDS: usize = 4;
const QUESTIONS: usize = 3;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, State)]
pub struct Log {
    #[channel(append)]
    lines: Vec<String>,
}

fn line(text: impl Into<String>) -> LogUpdate {
    LogUpdate::default().lines(vec![text.into()])
}

/// An effect in the outside world, which knows idempotency keys.
#[derive(Clone)]
struct Outside(Arc<PathBuf>);

impl Outside {
    async fn effect(&self, ctx: &Context, what: &str) -> Result<(), NodeError> {
        let text = |key: &dyn std::fmt::Display| format!("{}/{what} {key}\n", ctx.thread());
        ctx.step(what, |key| async move {
            std::fs::OpenOptions::new()
                .create(true)
                .append(true)
                .open(&*self.0)?
                .write_all(text(&key).as_bytes())?;
            Ok::<_, NodeError>(())
        })
        .await
    }
}

/// Says it in the thread's own stream, and in the one that all of them share.
fn say(ctx: &Context, what: &str) -> Result<(), NodeError> {
    ctx.emit(&own_stream(ctx.thread().as_str()), what, &())?;
    ctx.emit("all", &format!("{} {what}", ctx.thread()), &())
}

fn own_stream(thread: &str) -> String {
    format!("said by {thread}")
}

fn chain(outside: &Outside) -> GraphBuilder<Log> {
    let outside = outside.clone();
    Graph::builder("chain")
        .node("link", move |log: Arc<Log>, ctx: Context| {
            let outside = outside.clone();
            async move {
                let n = log.lines.len();
                say(&ctx, &n.to_string())?;
                if n == 3 {
                    outside.effect(&ctx, "paid").await?;
                }
                if n == 7 {
                    ctx.say_now(
                        &format!("{} at once", ctx.thread()),
                        "at once",
                        ctx.thread().as_str(),
                        &(),
                    )
                    .await?;
                }
                Ok(line(n.to_string()))
            }
        })
        .edge(START, "link")
        .conditional("link", ["link", END], |log: &Log| {
            Goto::node(if log.lines.len() < LINKS { "link" } else { END })
        })
}

fn fan(outside: &Outside) -> GraphBuilder<Log> {
    let outside = outside.clone();
    let flaky = NodeOptions::default().retry(
        RetryPolicy::default()
            .first_interval(Duration::from_millis(1))
            .attempts(30),
    );
    Graph::builder("fan")
        .node("begin", |_, ctx: Context| async move {
            say(&ctx, "begin")?;
            Ok(line("begin"))
        })
        .node_with("work", flaky, move |_, ctx: Context| {
            let outside = outside.clone();
            async move {
                let n: usize = ctx.argument()?;
                outside.effect(&ctx, &format!("work {n}")).await?;
                if ctx.attempt() == 1 && n == 2 {
                    return Err(NodeError::msg("the first time fails"));
                }
                say(&ctx, &format!("work {n}"))?;
                Ok(line(format!("work {n}")))
            }
        })
        .node("gather", |_, ctx: Context| async move {
            say(&ctx, "gather")?;
            Ok(line("gather"))
        })
        .edge(START, "begin")
        .conditional("begin", ["work"], |_| {
            Goto::sends((0..SENDS).map(|n| Send::new("work", &n)))
        })
        .edge("work", "gather")
        .edge("gather", END)
}

fn asks(outside: &Outside) -> GraphBuilder<Log> {
    let outside = outside.clone();
    Graph::builder("asks")
        .node("ask", move |log: Arc<Log>, ctx: Context| {
            let outside = outside.clone();
            async move {
                let n = log.lines.len();
                say(&ctx, &format!("asks {n}"))?;
                let Arrived::Signal(answer) = ctx
                    .wait_any("answer", &WaitFor::new().signal("answer"))
                    .await?
                else {
                    return Err(NodeError::msg("no signal"));
                };
                outside
                    .effect(&ctx, &format!("used {}", answer.key))
                    .await?;
                say(&ctx, &format!("got {}", answer.key))?;
                Ok(line(answer.key))
            }
        })
        .edge(START, "ask")
        .conditional("ask", ["ask", END], |log: &Log| {
            Goto::node(if log.lines.len() < QUESTIONS {
                "ask"
            } else {
                END
            })
        })
}

fn naps() -> GraphBuilder<Log> {
    Graph::builder("naps")
        .node("nap", |log: Arc<Log>, ctx: Context| async move {
            let until = Timestamp::now() + SignedDuration::from_millis(30);
            ctx.sleep_until("nap", until).await?;
            say(&ctx, &format!("slept {}", log.lines.len()))?;
            Ok(line("slept"))
        })
        .edge(START, "nap")
        .conditional("nap", ["nap", END], |log: &Log| {
            Goto::node(if log.lines.len() < 2 { "nap" } else { END })
        })
}

fn family() -> GraphBuilder<Log> {
    Graph::builder("family")
        .node("spawn", |_, ctx: Context| async move {
            say(&ctx, "spawns")?;
            for kid in ["a", "b"] {
                ctx.spawn(kid, "naps", &LogUpdate::default())?;
            }
            Ok(LogUpdate::default())
        })
        .node("hear", |log: Arc<Log>, ctx: Context| async move {
            let kids = WaitFor::new().children(
                ["a", "b"]
                    .into_iter()
                    .filter(|kid| !log.lines.contains(&(*kid).to_owned())),
            );
            let Arrived::Child(end) = ctx.wait_any("kid", &kids).await? else {
                return Err(NodeError::msg("not a child"));
            };
            if end.status != ThreadStatus::Done
                || end.output["lines"] != serde_json::json!(["slept", "slept"])
            {
                return Err(NodeError::msg(format!(
                    "the child came to another end: {end:?}"
                )));
            }
            say(&ctx, &format!("heard of {}", end.name))?;
            Ok(line(end.name))
        })
        .edge(START, "spawn")
        .edge("spawn", "hear")
        .conditional("hear", ["hear", END], |log: &Log| {
            Goto::node(if log.lines.len() < 2 { "hear" } else { END })
        })
}

/// Waits for what never comes, and so does its child.
fn doomed() -> GraphBuilder<Log> {
    Graph::builder("doomed")
        .node("wait", |_, ctx: Context| async move {
            if !ctx.thread().as_str().ends_with("/kid") {
                ctx.spawn("kid", "doomed", &LogUpdate::default())?;
            }
            ctx.wait_any("nothing", &WaitFor::new().signal("nothing"))
                .await?;
            Ok(line("it came"))
        })
        .edge(START, "wait")
        .edge("wait", END)
}

/// An engine that knows the graphs; effects go to a file.
pub async fn engine(store: Arc<dyn Checkpointer>, effects: &Path) -> Result<Engine, EngineError> {
    let outside = Outside(Arc::new(effects.to_owned()));
    let mut engine = Engine::builder(store);
    for graph in [
        chain(&outside),
        fan(&outside),
        asks(&outside),
        naps(),
        family(),
        doomed(),
    ] {
        engine = engine.graph(graph.compile().expect("compiles"));
    }
    engine.build().await
}

/// Leases so short that what a dead process ran is taken over soon.
pub fn options(owner: &str) -> ServeOptions {
    ServeOptions {
        concurrency: WIDTH,
        // Twenty in a row that expire fail a thread: in the long form, a busy machine has the time to come to that.
        lease: Duration::from_millis(crate::long(1500, 400)),
        poll: Duration::from_millis(25),
        owner: owner.to_owned(),
        ..ServeOptions::default()
    }
}

const KINDS: [&str; 6] = ["chain", "fan", "asks", "naps", "family", "doomed"];

fn kind(n: usize) -> &'static str {
    KINDS[n % KINDS.len()]
}

fn id(n: usize) -> String {
    format!("{}:{n}", kind(n))
}

/// A seed for what is random: given in the environment, else new. It is printed.
pub fn seed() -> u64 {
    let seed = match std::env::var("ARTEL_FAULTS_SEED") {
        Ok(seed) => seed.parse().expect("ARTEL_FAULTS_SEED is a number"),
        Err(_) => rand::random(),
    };
    println!("the seed is ARTEL_FAULTS_SEED={seed}");
    seed
}

/// Asks for things from outside, and looks at what comes of them. It serves nothing itself.
pub struct Driver {
    engine: Engine,
    effects: PathBuf,
}

impl Driver {
    pub async fn new(store: Arc<dyn Checkpointer>, effects: &Path) -> Self {
        Self {
            engine: engine(store, effects).await.expect("builds"),
            effects: effects.to_owned(),
        }
    }

    /// Starts threads, one after the other, until there are `least` and `done` says so; waits until all of them have ended,
    /// and checks that nothing was lost and nothing was done twice. Returns how many there were.
    pub async fn drive(&self, seed: u64, least: usize, done: &AtomicBool) -> usize {
        let over = Arc::new(AtomicBool::new(false));
        let follower = tokio::spawn(follow(self.engine.clone(), over.clone()));
        let room = Arc::new(Semaphore::new(WIDTH));
        let ended = Arc::new(AtomicUsize::new(0));
        let mut threads = JoinSet::new();
        let mut count = 0;
        while count < least || !done.load(Ordering::SeqCst) {
            let place = room.clone().acquire_owned().await.expect("is open");
            while let Some(thread) = threads.try_join_next() {
                let () = thread.expect("a thread goes its way");
            }
            let life = live(
                self.engine.clone(),
                count,
                StdRng::seed_from_u64(seed ^ count as u64),
            );
            let ended = ended.clone();
            threads.spawn(async move {
                life.await;
                ended.fetch_add(1, Ordering::SeqCst);
                drop(place);
            });
            count += 1;
        }
        while let Some(thread) = threads.join_next().await {
            let () = thread.expect("a thread goes its way");
        }
        over.store(true, Ordering::SeqCst);
        let followed = follower.await.expect("follows");
        self.check(count, &followed).await;
        count
    }

    async fn check(&self, count: usize, followed: &[Entry]) {
        let entries = entries(&self.engine, Cursor::START).await;
        assert!(
            followed == entries,
            "who followed the journal saw something else than what is in it"
        );
        let mut streams: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for entry in &entries {
            let stream = streams.entry(&entry.stream).or_default();
            stream.push(&entry.name);
            assert_eq!(
                entry.number,
                stream.len() as u64,
                "a gap in the stream {}",
                entry.stream
            );
        }
        let mut all = Vec::new();
        let mut effects = BTreeSet::new();
        for n in 0..count {
            let id = id(n);
            let (lines, said, end) = expected(n);
            let state: Log = insist!("reading a state", self.engine.state(id.as_str()));
            assert_eq!(
                sorted_if(kind(n) == "family", state.lines),
                lines,
                "the state of {id}"
            );
            let own = streams.remove(own_stream(&id).as_str()).unwrap_or_default();
            let own: Vec<String> = own.into_iter().map(str::to_owned).collect();
            // Tasks beside each other may speak in any order.
            let any_order = matches!(kind(n), "fan" | "family");
            assert_eq!(
                sorted_if(any_order, own.clone()),
                sorted_if(any_order, said),
                "what {id} said"
            );
            all.extend(own.iter().map(|what| format!("{id} {what}")));
            assert_eq!(
                streams.remove(id.as_str()),
                Some(vec![end]),
                "the end of {id}"
            );
            effects.extend(expected_effects(n));
            for kid in kids(n) {
                let kid = format!("{id}/{kid}");
                let own = streams
                    .remove(own_stream(&kid).as_str())
                    .unwrap_or_default();
                if kind(n) == "family" {
                    assert_eq!(own, ["slept 0", "slept 1"], "what {kid} said");
                }
                all.extend(own.iter().map(|what| format!("{kid} {what}")));
                // A thread that was cancelled early has started no child.
                let is_there = insist!("looking", self.engine.thread(kid.as_str())).is_some();
                assert!(is_there || kind(n) == "doomed", "{kid} is gone");
                let ended = is_there.then(|| vec![end]);
                assert_eq!(streams.remove(kid.as_str()), ended, "the end of {kid}");
            }
        }
        let sorted = |names: Option<Vec<&str>>| {
            let mut names: Vec<String> = names
                .unwrap_or_default()
                .into_iter()
                .map(str::to_owned)
                .collect();
            names.sort();
            names
        };
        all.sort();
        assert_eq!(
            sorted(streams.remove("all")),
            all,
            "what was said in the stream of all"
        );
        let of_kind = |wanted: &'static str| {
            let mut ids: Vec<String> = (0..count)
                .filter(|n| kind(*n) == wanted || wanted.is_empty())
                .map(id)
                .collect();
            ids.sort();
            ids
        };
        assert_eq!(
            sorted(streams.remove("at once")),
            of_kind("chain"),
            "what was said at once"
        );
        assert_eq!(
            sorted(streams.remove("outside")),
            of_kind(""),
            "what was said from outside"
        );
        assert!(
            streams.is_empty(),
            "nobody said these: {:?}",
            streams.keys()
        );
        self.check_effects(&effects);
    }

    /// Each effect happened, and whatever happened again did so with the same key.
    fn check_effects(&self, expected: &BTreeSet<String>) {
        let text = std::fs::read_to_string(&self.effects).expect("there were effects");
        let mut keys: BTreeMap<String, &str> = BTreeMap::new();
        for effect in text.lines() {
            let (what, key) = effect.rsplit_once(' ').expect("has a key");
            let known = keys.entry(what.to_owned()).or_insert(key);
            assert_eq!(*known, key, "{what} has two keys: it was done twice");
        }
        let done: BTreeSet<String> = keys.into_keys().collect();
        assert_eq!(&done, expected, "the effects");
    }
}

fn sorted_if(sort: bool, mut lines: Vec<String>) -> Vec<String> {
    if sort {
        lines.sort();
    }
    lines
}

fn kids(n: usize) -> &'static [&'static str] {
    match kind(n) {
        "family" => &["a", "b"],
        "doomed" => &["kid"],
        _ => &[],
    }
}

/// What a thread's state holds in the end, what it has said, and the name of its end.
fn expected(n: usize) -> (Vec<String>, Vec<String>, &'static str) {
    let words = |words: &[&str]| {
        words
            .iter()
            .map(|&word| word.to_owned())
            .collect::<Vec<_>>()
    };
    let (lines, said) = match kind(n) {
        "chain" => {
            let links: Vec<String> = (0..LINKS).map(|n| n.to_string()).collect();
            (links.clone(), links)
        }
        "fan" => {
            let work: Vec<String> = (0..SENDS).map(|n| format!("work {n}")).collect();
            let all = [words(&["begin"]), work, words(&["gather"])].concat();
            (all.clone(), all)
        }
        "asks" => {
            let keys: Vec<String> = (0..QUESTIONS).map(|n| format!("key {n}")).collect();
            let said = keys
                .iter()
                .enumerate()
                .flat_map(|(n, key)| [format!("asks {n}"), format!("got {key}")]);
            (keys.clone(), said.collect())
        }
        "naps" => (words(&["slept", "slept"]), words(&["slept 0", "slept 1"])),
        "family" => (
            words(&["a", "b"]),
            words(&["spawns", "heard of a", "heard of b"]),
        ),
        "doomed" => return (Vec::new(), Vec::new(), "thread.cancelled"),
        other => panic!("there is no {other}"),
    };
    (lines, said, "thread.done")
}

fn expected_effects(n: usize) -> Vec<String> {
    let what: Vec<String> = match kind(n) {
        "chain" => vec!["paid".to_owned()],
        "fan" => (0..SENDS).map(|n| format!("work {n}")).collect(),
        "asks" => (0..QUESTIONS).map(|n| format!("used key {n}")).collect(),
        _ => Vec::new(),
    };
    what.iter()
        .map(|what| format!("{}/{what}", id(n)))
        .collect()
}

/// One thread, with what is asked of it, to its end.
async fn live(engine: Engine, n: usize, mut random: StdRng) {
    let id = id(n);
    let mut pause =
        async || tokio::time::sleep(Duration::from_millis(random.random_range(0..60))).await;
    insist!(
        "starting",
        engine.start(
            id.as_str(),
            kind(n),
            &LogUpdate::default(),
            StartOptions::default(),
        )
    );
    insist!(
        "saying something",
        engine
            .journal()
            .append(&format!("{id} outside"), "outside", &id, &())
    );
    match kind(n) {
        "asks" => {
            for n in 0..QUESTIONS {
                pause().await;
                let key = format!("key {n}");
                let delivered = insist!(
                    "signalling",
                    engine.signal(id.as_str(), "answer", &key, &())
                );
                assert!(
                    matches!(delivered, Delivered::New | Delivered::Duplicate),
                    "{delivered:?}"
                );
            }
        }
        "doomed" => {
            pause().await;
            let outcome = insist!("cancelling", engine.cancel(id.as_str(), "enough"));
            assert!(outcome != CancelOutcome::UnknownThread, "{outcome:?}");
        }
        _ => {}
    }
    let status = if kind(n) == "doomed" {
        ThreadStatus::Cancelled
    } else {
        ThreadStatus::Done
    };
    ends(&engine, &id, status).await;
    if kind(n) == "doomed" {
        // The child may never have been started.
        let kid = format!("{id}/kid");
        if insist!("looking", engine.thread(kid.as_str())).is_some() {
            ends(&engine, &kid, status).await;
        }
    }
}

async fn ends(engine: &Engine, id: &str, status: ThreadStatus) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let found: Option<ThreadInfo> = insist!("looking", engine.thread(id));
        let found = found.expect("is there");
        if found.status == status {
            return;
        }
        assert!(
            !found.status.is_ended(),
            "{id} came to another end: {found:?}"
        );
        assert!(Instant::now() < deadline, "{id} is stuck: {found:?}");
        tokio::time::sleep(Duration::from_millis(40)).await;
    }
}

async fn entries(engine: &Engine, mut after: Cursor) -> Vec<Entry> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let some = insist!(
            "reading the journal",
            engine.journal().read(&JournalFilter::all(), after, 500)
        );
        let Some(last) = some.last() else {
            return all;
        };
        after = last.cursor;
        all.extend(some);
    }
}

/// Reads the journal by cursor while it grows, until it is over.
async fn follow(engine: Engine, over: Arc<AtomicBool>) -> Vec<Entry> {
    let mut all: Vec<Entry> = Vec::new();
    loop {
        let last_look = over.load(Ordering::SeqCst);
        let after = all.last().map_or(Cursor::START, |entry| entry.cursor);
        all.extend(entries(&engine, after).await);
        if last_look {
            return all;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
