//! The chain: 20 nodes, each of which adds one and appends 64 bytes. Every superstep is committed before the next starts.

// Each bench uses a part of it.
#![allow(dead_code)]

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use graph::{
    CompiledGraph, Context, END, Engine, Graph, Observer, Point, START, StartOptions, State,
    ThreadId, ThreadStatus, WaitFor, checkpoint::Checkpointer,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::{sync::oneshot, task::JoinSet};

use crate::lab::{Failed, PATIENCE, Serving, each, until};

/// Nodes of the chain.
pub const NODES: u32 = 20;
/// What a node appends, in bytes.
pub const BYTES: usize = 64;
/// The last node.
const LAST: &str = "n19";

/// Chains with mail for each thread that runs at a time: so many that the last ones do not matter.
const MAILED_EACH: u64 = 4;
/// The most chains that are given mail for one rate.
const MAILED_AT_MOST: u64 = 4000;

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
pub struct Chain {
    n: u64,
    #[channel(append)]
    log: Vec<String>,
}

fn node_name(index: u32) -> String {
    format!("n{index:02}")
}

fn chain(name: &str, with_mail: bool) -> Result<CompiledGraph<Chain>, Failed> {
    let mut builder = Graph::<Chain>::builder(name);
    for index in 0..NODES {
        builder = builder.node(
            node_name(index),
            move |chain: Arc<Chain>, context: Context| async move {
                if with_mail {
                    let go = context.try_take("go", &WaitFor::new().signal("go")).await?;
                    if go.is_none() {
                        return Err(graph::NodeError::msg("there is no signal to consume"));
                    }
                    context.emit(context.thread().as_str(), "went", &chain.n)?;
                }
                Ok(ChainUpdate::default()
                    .n(chain.n + 1)
                    .log(vec!["x".repeat(BYTES)]))
            },
        );
    }
    builder = builder.edge(START, node_name(0));
    for index in 1..NODES {
        builder = builder.edge(node_name(index - 1), node_name(index));
    }
    Ok(builder.edge(LAST, END).compile()?)
}

/// Counts steps, and tells whoever started a thread that its last step has landed.
#[derive(Default)]
struct Watch {
    ends: Mutex<HashMap<ThreadId, oneshot::Sender<()>>>,
    steps: AtomicU64,
    ended: AtomicU64,
}

impl Watch {
    fn end_of(&self, thread: ThreadId) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self.ends.lock().insert(thread, sender);
        receiver
    }
}

impl Observer for Watch {
    fn on(&self, point: &Point<'_>) {
        let Point::AfterCommit { thread, nodes } = point else {
            return;
        };
        if nodes.is_empty() {
            return;
        }
        self.steps.fetch_add(1, Ordering::Relaxed);
        if nodes.iter().any(|node| node == LAST) {
            self.ended.fetch_add(1, Ordering::Relaxed);
            if let Some(sender) = self.ends.lock().remove(*thread) {
                // Nobody listens any more when the bench is being broken off.
                let _ = sender.send(());
            }
        }
    }
}

/// An engine on one database.
#[derive(Clone)]
pub struct Chains {
    engine: Engine,
    watch: Arc<Watch>,
    started: Arc<AtomicU64>,
    /// What the last rate with mail was, in steps a second: how many chains the next one needs.
    mailed: Arc<AtomicU64>,
}

impl Chains {
    pub async fn on(store: Arc<dyn Checkpointer>) -> Result<Self, Failed> {
        let watch = Arc::new(Watch::default());
        let engine = Engine::builder(store)
            .graph(chain("chain", false)?)
            .graph(chain("mailed", true)?)
            .observer(watch.clone())
            .build()
            .await?;
        Ok(Self {
            engine,
            watch,
            started: Arc::default(),
            mailed: Arc::default(),
        })
    }

    /// The name of a thread that does not exist yet.
    fn next(&self, graph: &str) -> ThreadId {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        ThreadId::from(format!("{graph}:{number}"))
    }

    async fn start(&self, thread: &ThreadId, graph: &str) -> Result<(), Failed> {
        let (input, options) = (ChainUpdate::default(), StartOptions::default());
        self.engine
            .start(thread.clone(), graph, &input, options)
            .await?;
        Ok(())
    }

    /// One chain, from its start to its end; gives its thread.
    async fn run_one(&self) -> Result<ThreadId, Failed> {
        let thread = self.next("chain");
        let end = self.watch.end_of(thread.clone());
        self.start(&thread, "chain").await?;
        match tokio::time::timeout(PATIENCE, end).await {
            Ok(Ok(())) => Ok(thread),
            _ => Err(format!("{thread} did not end within {PATIENCE:?}").into()),
        }
    }

    /// Supersteps a second, with so many threads at a time: as soon as one ends the next one is started, and its start and
    /// end count as time but not as steps.
    pub async fn rate(&self, threads: usize, lasts: Duration) -> Result<f64, Failed> {
        let serving = Serving::start(&self.engine, threads);
        let begun = Instant::now();
        let mut drivers = JoinSet::new();
        for _ in 0..threads {
            let it = self.clone();
            drivers.spawn(async move {
                let (mut chains, mut last) = (0_u32, None);
                while begun.elapsed() < lasts {
                    last = Some(it.run_one().await?);
                    chains += 1;
                }
                Ok::<_, Failed>((chains, last))
            });
        }
        let (mut chains, mut last) = (0_u32, None);
        while let Some(driver) = drivers.join_next().await {
            let (more, thread) = driver??;
            chains += more;
            last = thread.or(last);
        }
        let took = begun.elapsed();
        serving.stop().await?;
        self.check(last.ok_or("no chain ended")?).await?;
        Ok(f64::from(chains * NODES) / took.as_secs_f64())
    }

    /// The same when each step consumes a signal and says an event. The signals are in the mailboxes before the clock starts,
    /// and it stops when there are not enough threads left to run so many at a time.
    pub async fn mailed_rate(&self, threads: usize, lasts: Duration) -> Result<f64, Failed> {
        let at_a_time = threads as u64;
        let by_last_time =
            self.mailed.load(Ordering::Relaxed) * lasts.as_secs().max(1) / u64::from(NODES);
        let chains = by_last_time.clamp(
            MAILED_EACH * at_a_time,
            MAILED_AT_MOST.max(MAILED_EACH * at_a_time),
        );
        let last = Arc::new(Mutex::new(None));
        each(chains, 64, {
            let (it, last) = (self.clone(), last.clone());
            move |_| {
                let (it, last) = (it.clone(), last.clone());
                async move {
                    let thread = it.next("mailed");
                    it.start(&thread, "mailed").await?;
                    for number in 0..NODES {
                        it.engine
                            .signal(thread.clone(), "go", &format!("go:{number}"), &number)
                            .await?;
                    }
                    *last.lock() = Some(thread);
                    Ok(())
                }
            }
        })
        .await?;
        let watch = &self.watch;
        let ended_before = watch.ended.load(Ordering::Relaxed);
        let steps_before = watch.steps.load(Ordering::Relaxed);
        let ended = || watch.ended.load(Ordering::Relaxed) - ended_before;
        let begun = Instant::now();
        let serving = Serving::start(&self.engine, threads);
        until("the chains with mail end", || ended() + at_a_time > chains).await?;
        let steps = watch.steps.load(Ordering::Relaxed) - steps_before;
        let took = begun.elapsed();
        until("the last chains with mail end", || ended() == chains).await?;
        serving.stop().await?;
        let last = last.lock().take();
        self.check(last.ok_or("no chain was started")?).await?;
        let rate = f64::from(u32::try_from(steps)?) / took.as_secs_f64();
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "steps a second, positive and small"
        )]
        self.mailed.store(rate as u64, Ordering::Relaxed);
        Ok(rate)
    }

    /// Quick is not enough: the steps have been taken.
    async fn check(&self, thread: ThreadId) -> Result<(), Failed> {
        let state: Chain = self.engine.state(thread.clone()).await?;
        let record = self.engine.thread(thread.clone()).await?;
        let status = record.map(|record| record.status);
        let bytes: usize = state.log.iter().map(String::len).sum();
        let appended = usize::try_from(NODES)? * BYTES;
        if status != Some(ThreadStatus::Done) || state.n != u64::from(NODES) || bytes != appended {
            return Err(format!("{thread} is {status:?} with n = {} and {bytes} bytes of log, expected {NODES} and {appended}", state.n).into());
        }
        Ok(())
    }
}
