//! Threads of all kinds, many at a time, whoever serves them and however often that one dies; what is asked of them from
//! outside, again and again until it is acknowledged; and what must be there in the end.

mod kinds;

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use graph::{
    CancelOutcome, Cursor, Delivered, Engine, EngineError, Entry, JournalFilter, StartOptions,
    StorageError, ThreadInfo, ThreadStatus, checkpoint::Checkpointer,
};
use rand::{RngExt as _, SeedableRng as _, rngs::StdRng};
use tokio::{sync::Semaphore, task::JoinSet, time::Instant};

use kinds::{Log, LogUpdate, QUESTIONS, expected, expected_effects, id, kids, kind, own_stream};
pub use kinds::{engine, options};

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
