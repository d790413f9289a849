//! Random graphs come to the same end and say the same, in the same order, whatever the timing, the limit on parallel tasks,
//! the database, and the commits that fail on the way.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use graph::{
    Arrived, CompiledGraph, Context, Cursor, END, Engine, Goto, Graph, JournalFilter,
    MemoryCheckpointer, NodeError, NodeOptions, RetryPolicy, START, Send, ServeOptions,
    StartOptions, State, ThreadInfo, ThreadStatus, WaitFor, checkpoint::Checkpointer,
};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use proptest::{
    collection::vec,
    prelude::*,
    test_runner::{FileFailurePersistence, TestCaseResult},
};
use rand::{SeedableRng as _, rngs::StdRng};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    long,
    storage::{
        self, Schema,
        faulty::{Fault, Faulty},
    },
};

// ---- graphs as data ----

/// Layers of nodes, one after the other, in rounds. After the last layer comes `turn`.
#[derive(Clone, Debug)]
struct Design {
    layers: Vec<Layer>,
    /// How often `turn` leads back to the first layer.
    rounds: usize,
}

#[derive(Clone, Debug)]
struct Layer {
    nodes: Vec<Deeds>,
    next: Next,
    /// An edge from the first node past the next layer.
    skips: bool,
}

/// How a layer leads to the next one.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// Each node leads to each.
    Edges,
    /// Each of the next waits for all.
    Join,
    /// A condition that looks at the state picks one.
    Condition,
    /// Each node sends so many to the first of the next, and goes to the others.
    Sends(usize),
}

/// What a node does, in this order.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a deed, done or not")]
struct Deeds {
    /// How many attempts fail.
    fails: u32,
    step: bool,
    asks: bool,
    naps: bool,
    kid: bool,
    events: usize,
}

fn deeds() -> impl Strategy<Value = Deeds> {
    let seldom = || prop::bool::weighted(0.25);
    (
        prop_oneof![4 => Just(0), 1 => 1..3_u32],
        seldom(),
        seldom(),
        seldom(),
        seldom(),
        0..3_usize,
    )
        .prop_map(|(fails, step, asks, naps, kid, events)| Deeds {
            fails,
            step,
            asks,
            naps,
            kid,
            events,
        })
}

fn layer() -> impl Strategy<Value = Layer> {
    let next = prop_oneof![
        Just(Next::Edges),
        Just(Next::Join),
        Just(Next::Condition),
        (1..4_usize).prop_map(Next::Sends),
    ];
    (vec(deeds(), 1..4), next, prop::bool::weighted(0.2)).prop_map(|(nodes, next, skips)| Layer {
        nodes,
        next,
        skips,
    })
}

fn design() -> impl Strategy<Value = Design> {
    (vec(layer(), 1..4), 0..3_usize).prop_map(|(layers, rounds)| Design { layers, rounds })
}

// ---- graphs that run ----

fn add(sum: &mut usize, more: usize) {
    *sum += more;
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, State)]
struct Log {
    #[channel(append)]
    lines: Vec<String>,
    #[channel(reduce = add)]
    rounds: usize,
}

/// Where a run loses time: nowhere, or here and there.
#[derive(Clone)]
struct Delays {
    random: Option<Arc<Mutex<StdRng>>>,
    /// The longest, in milliseconds. In memory the clock is the test's, and time costs nothing.
    longest: u64,
}

impl Delays {
    async fn here(&self) {
        let Some(random) = &self.random else { return };
        let (yields, sleeps) = {
            let mut random = random.lock();
            (
                random.random_range(0..4),
                random
                    .random_bool(0.3)
                    .then(|| random.random_range(0..=self.longest)),
            )
        };
        for _ in 0..yields {
            tokio::task::yield_now().await;
        }
        if let Some(milliseconds) = sleeps {
            tokio::time::sleep(Duration::from_millis(milliseconds)).await;
        }
    }
}

/// What a task is called in what it says: its node, and its argument.
fn name_of(ctx: &Context, is_sent: bool) -> Result<String, NodeError> {
    Ok(if is_sent {
        format!("{}({})", ctx.node(), ctx.argument::<String>()?)
    } else {
        ctx.node().to_owned()
    })
}

async fn act(
    log: Arc<Log>,
    ctx: Context,
    deeds: Deeds,
    is_sent: bool,
    delays: Delays,
) -> Result<LogUpdate, NodeError> {
    let name = name_of(&ctx, is_sent)?;
    let step = ctx.step_number();
    let mut told = vec![format!("{step} {name} saw {}", log.lines.len())];
    let tell = |n: usize, when: &str| -> Result<(), NodeError> {
        ctx.emit(&format!("of {name}"), when, &(step, n))?;
        ctx.emit("of all", when, &(step, &name, n))
    };
    for n in 0..deeds.events {
        tell(n, "before")?;
    }
    delays.here().await;
    if deeds.step {
        let did = ctx
            .step("deed", |_| async { Ok::<_, NodeError>("did".to_owned()) })
            .await?;
        told.push(did);
    }
    if ctx.attempt() <= deeds.fails {
        return Err(NodeError::msg("an attempt that fails"));
    }
    if deeds.asks && !is_sent {
        let kind = format!("for {}", ctx.node());
        let Arrived::Signal(signal) = ctx.wait_any("ask", &WaitFor::new().signal(kind)).await?
        else {
            return Err(NodeError::msg("no signal"));
        };
        told.push(format!("got {}", signal.key));
    }
    delays.here().await;
    if deeds.naps {
        ctx.sleep_until("nap", Timestamp::now() + SignedDuration::from_millis(1))
            .await?;
    }
    if deeds.kid {
        let kid = format!("{name} {step}");
        ctx.spawn(&kid, "kid", &LogUpdate::default())?;
        let Arrived::Child(end) = ctx.wait_any("kid", &WaitFor::new().child(kid)).await? else {
            return Err(NodeError::msg("no child"));
        };
        told.push(format!("heard {}", end.output["lines"]));
    }
    for n in 0..deeds.events {
        tell(n, "after")?;
    }
    delays.here().await;
    Ok(LogUpdate::default().lines(vec![told.join(" ")]))
}

fn node(layer: usize, place: usize) -> String {
    format!("n{layer}{place}")
}

impl Design {
    fn names(&self, layer: usize) -> Vec<String> {
        self.layers.get(layer).map_or_else(
            || vec!["turn".to_owned()],
            |found| {
                (0..found.nodes.len())
                    .map(|place| node(layer, place))
                    .collect()
            },
        )
    }

    /// Whether a node is started by sends, with an argument.
    fn is_sent(&self, layer: usize, place: usize) -> bool {
        place == 0 && layer > 0 && matches!(self.layers[layer - 1].next, Next::Sends(_))
    }

    fn compile(&self, parallel: usize, delays: &Delays) -> CompiledGraph<Log> {
        let mut graph = Graph::<Log>::builder("main").parallel(parallel);
        for (index, layer) in self.layers.iter().enumerate() {
            for (place, deeds) in layer.nodes.iter().enumerate() {
                let (deeds, delays) = (deeds.clone(), delays.clone());
                let is_sent = self.is_sent(index, place);
                // Crashes use up attempts as well.
                let retry = RetryPolicy::default()
                    .attempts(40)
                    .first_interval(Duration::from_millis(1))
                    .factor(1.0);
                graph = graph.node_with(
                    node(index, place),
                    NodeOptions::default().retry(retry),
                    move |log, ctx| act(log, ctx, deeds.clone(), is_sent, delays.clone()),
                );
            }
        }
        let rounds = self.rounds;
        graph = graph
            .node("turn", |_, ctx: Context| async move {
                ctx.emit("turns", "turn", &ctx.step_number())?;
                Ok(LogUpdate::default().rounds(1))
            })
            .conditional("turn", [self.names(0), vec![END.to_owned()]].concat(), {
                let first = self.names(0);
                move |log: &Log| {
                    if log.rounds > rounds {
                        Goto::end()
                    } else {
                        Goto::nodes(first.clone())
                    }
                }
            });
        for name in self.names(0) {
            graph = graph.edge(START, name);
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let (from, to) = (self.names(index), self.names(index + 1));
            // What is not a node of the design takes no argument.
            let next = match layer.next {
                Next::Sends(_) if index + 1 == self.layers.len() => Next::Edges,
                next => next,
            };
            match next {
                Next::Edges => {
                    for from in &from {
                        for to in &to {
                            graph = graph.edge(from, to);
                        }
                    }
                }
                Next::Join => {
                    for to in &to {
                        graph = graph.join(from.clone(), to);
                    }
                }
                Next::Condition => {
                    for (place, from) in from.iter().enumerate() {
                        let targets = to.clone();
                        graph = graph.conditional(from, to.clone(), move |log: &Log| {
                            let pick = (log.lines.len() + place) % targets.len();
                            Goto::node(targets[pick].clone())
                        });
                    }
                }
                Next::Sends(count) => {
                    for from in from {
                        let targets = to.clone();
                        graph = graph.conditional(&from, to.clone(), move |log: &Log| {
                            // Which task it is says its own line, the last one: no two of them send the same.
                            let own = log.lines.last().and_then(|line| line.split(' ').nth(1));
                            let argument = |n| format!("{}.{n}", own.unwrap_or_default());
                            let sends = (0..count).map(|n| Send::new(&targets[0], &argument(n)));
                            Goto::sends(sends).and(Goto::nodes(targets[1..].to_vec()))
                        });
                    }
                }
            }
            if layer.skips {
                // To one that takes no argument.
                let past = self.names(index + 2).last().cloned().unwrap_or_default();
                let place = self.names(index + 2).len() - 1;
                if index + 1 < self.layers.len()
                    && (index + 2 >= self.layers.len() || !self.is_sent(index + 2, place))
                {
                    graph = graph.edge(node(index, 0), past);
                }
            }
        }
        graph.compile().expect("compiles")
    }

    /// The nodes that ask.
    fn asking(&self) -> Vec<String> {
        let places = self.layers.iter().enumerate().flat_map(|(layer, found)| {
            found
                .nodes
                .iter()
                .enumerate()
                .map(move |(place, deeds)| (layer, place, deeds.asks))
        });
        places
            .filter(|(layer, place, asks)| *asks && !self.is_sent(*layer, *place))
            .map(|(layer, place, _)| node(layer, place))
            .collect()
    }
}

fn kid() -> CompiledGraph<Log> {
    Graph::<Log>::builder("kid")
        .node("only", |_, ctx: Context| async move {
            ctx.emit(&format!("of {}", ctx.thread()), "kid", &())?;
            Ok(LogUpdate::default().lines(vec!["kid".to_owned()]))
        })
        .edge(START, "only")
        .edge("only", END)
        .compile()
        .expect("compiles")
}

// ---- running them ----

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
