//! Random graphs come to the same end and say the same, in the same order, whatever the timing, the limit on parallel tasks,
//! the database, and the commits that fail on the way.

mod design;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use graph::{
    Cursor, Engine, JournalFilter, MemoryCheckpointer, ServeOptions, StartOptions, ThreadInfo,
    ThreadStatus, checkpoint::Checkpointer,
};
use parking_lot::Mutex;
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{FileFailurePersistence, TestCaseResult},
};
use rand::{SeedableRng as _, rngs::StdRng};
use serde_json::Value;

use crate::{
    long,
    storage::{
        self, Schema,
        faulty::{Fault, Faulty},
    },
};
use design::{Delays, Design, Log, LogUpdate, design, kid};

/// What must not matter.
#[derive(Clone, Debug)]
struct Circumstances {
    /// For delays.
    seed: Option<u64>,
    parallel: usize,
    /// One in so many commits fails, before or after it has landed; 0: none.
    faults: u32,
    /// Signals are sent before anybody waits for them.
    early: bool,
}

const CALM: Circumstances = Circumstances {
    seed: None,
    parallel: 64,
    faults: 0,
    early: true,
};

fn circumstances() -> impl Strategy<Value = Circumstances> {
    let seed = any::<u64>().prop_map(Some);
    let faults = prop_oneof![Just(0), 2..9_u32];
    (
        seed,
        prop_oneof![Just(1), Just(2), Just(64)],
        faults,
        any::<bool>(),
    )
        .prop_map(|(seed, parallel, faults, early)| Circumstances {
            seed,
            parallel,
            faults,
            early,
        })
}

/// What there is in the end.
#[derive(Debug, PartialEq)]
struct End {
    status: ThreadStatus,
    error: Option<String>,
    steps: u64,
    state: Log,
    /// What was said in each stream, in order.
    streams: BTreeMap<String, Vec<String>>,
}

/// The most commits that fail: a thread is given up when twenty runs of it in a row have died.
const MOST_FAULTS: u32 = 15;

/// How many signals each node can use up.
const SIGNALS: usize = 12;

async fn send(engine: &Engine, node: &str, n: usize) {
    engine
        .signal("t", &format!("for {node}"), &format!("{node} {n}"), &())
        .await
        .expect("signals");
}

async fn run(
    design: &Design,
    store: Arc<dyn Checkpointer>,
    longest: u64,
    circumstances: &Circumstances,
) -> End {
    let delays = Delays {
        random: circumstances
            .seed
            .map(|seed| Arc::new(Mutex::new(StdRng::seed_from_u64(seed)))),
        longest,
    };
    let (every, faulty_seed) = (circumstances.faults, circumstances.seed.unwrap_or_default());
    let left = AtomicU32::new(MOST_FAULTS);
    let store = Arc::new(Faulty::commits(store, move |commit| {
        let mut random = StdRng::seed_from_u64(faulty_seed ^ commit);
        let fails = every > 0 && random.random_ratio(1, every);
        let less = |left: u32| left.checked_sub(1);
        if !fails
            || left
                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
                .is_err()
        {
            return None;
        }
        Some(if random.random() {
            Fault::Before
        } else {
            Fault::After
        })
    }));
    let engine = Engine::builder(store.clone())
        .graph(design.compile(circumstances.parallel, &delays))
        .graph(kid())
        .build()
        .await
        .expect("builds");
    engine
        .start("t", "main", &LogUpdate::default(), StartOptions::default())
        .await
        .expect("starts");
    if circumstances.early {
        for node in design.asking() {
            for n in 0..SIGNALS {
                send(&engine, &node, n).await;
            }
        }
    }
    let mut sent: BTreeMap<String, usize> = BTreeMap::new();
    for _ in 0..5000 {
        let options = ServeOptions {
            owner: "test".to_owned(),
            ..ServeOptions::default()
        };
        engine.run_due(options).await.expect("runs");
        let thread = engine.thread("t").await.expect("reads").expect("is there");
        if thread.status.is_ended() {
            return end(&engine, thread).await;
        }
        if !circumstances.early {
            for wait in thread.waits.iter().filter(|wait| wait.name == "ask") {
                let n = sent.entry(wait.signals[0].clone()).or_default();
                send(&engine, wait.signals[0].trim_start_matches("for "), *n).await;
                *n += 1;
            }
        }
        // What a commit that failed has left behind: its run is dead.
        store.break_leases("test").await.expect("breaks");
        // Timers go by the clock of the database, which does not stand still with the test's.
        #[expect(
            clippy::disallowed_methods,
            reason = "the clock of the runtime stands still"
        )]
        std::thread::sleep(Duration::from_micros(500));
    }
    panic!("it never ends: {:?}", engine.thread("t").await);
}

async fn end(engine: &Engine, thread: ThreadInfo) -> End {
    let entries = engine
        .journal()
        .read(&JournalFilter::all(), Cursor::START, 100_000)
        .await
        .expect("reads");
    let mut streams: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for entry in entries {
        let stream = streams.entry(entry.stream).or_default();
        stream.push(format!("{} {}", entry.name, entry.payload));
        assert_eq!(entry.number, stream.len() as u64, "a gap");
    }
    // Tasks beside each other may speak in any order; one step after the other they do not.
    if let Some(all) = streams.get_mut("of all") {
        let step = |line: &String| -> u64 {
            let json = line.split_once(' ').map_or("", |(_, json)| json);
            serde_json::from_str::<Value>(json)
                .ok()
                .and_then(|value| value[0].as_u64())
                .unwrap_or_default()
        };
        assert!(
            all.is_sorted_by_key(step),
            "the steps are out of order: {all:?}"
        );
        all.sort();
    }
    End {
        status: thread.status,
        error: thread.error,
        steps: thread.step,
        state: engine.state("t").await.expect("has a state"),
        streams,
    }
}

fn in_memory<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .expect("a runtime")
        .block_on(work)
}

fn on_disk<T>(work: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime")
        .block_on(work)
}

/// In memory, without anything that disturbs.
fn calm(design: &Design) -> End {
    in_memory(run(design, Arc::new(MemoryCheckpointer::new()), 0, &CALM))
}

fn same(end: &End, calm: &End) -> TestCaseResult {
    prop_assert_eq!(end, calm);
    Ok(())
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(long(3000, 96)))]

    #[test]
    fn a_graph_does_the_same_whatever_the_timing_and_whatever_fails(design in design(), others in vec(circumstances(), 3)) {
        let calm = calm(&design);
        for circumstances in others {
            // Longer than what a task waits for its siblings before it is made durable.
            let end = in_memory(run(&design, Arc::new(MemoryCheckpointer::new()), 150, &circumstances));
            same(&end, &calm)?;
        }
    }
}

proptest! {
    #![proptest_config(cases(long(150, 5)))]

    #[test]
    fn a_graph_does_the_same_on_sqlite(design in design(), circumstances in circumstances()) {
        let end = on_disk(async {
            let (path, _dir) = storage::sqlite_path();
            run(&design, Arc::new(storage::sqlite(path).await), 2, &circumstances).await
        });
        same(&end, &calm(&design))?;
    }
}

proptest! {
    #![proptest_config(cases(long(150, 5)))]

    #[test]
    fn a_graph_does_the_same_on_postgres(design in design(), circumstances in circumstances()) {
        let end = on_disk(async {
            let schema = Schema::make().await;
            run(&design, Arc::new(storage::connect(schema.url.clone()).await), 2, &circumstances).await
        });
        same(&end, &calm(&design))?;
    }
}
