//! Random graphs: what they are made of, and how they are put together.

use std::{sync::Arc, time::Duration};

use graph::{
    Arrived, CompiledGraph, Context, END, Goto, Graph, NodeError, NodeOptions, RetryPolicy, START,
    Send, State, WaitFor,
};
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use proptest::{collection::vec, prelude::*};
use rand::rngs::StdRng;
use serde::{Deserialize, Serialize};

// ---- graphs as data ----

/// Layers of nodes, one after the other, in rounds. After the last layer comes `turn`.
#[derive(Clone, Debug)]
pub struct Design {
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

pub fn design() -> impl Strategy<Value = Design> {
    (vec(layer(), 1..4), 0..3_usize).prop_map(|(layers, rounds)| Design { layers, rounds })
}

// ---- graphs that run ----

fn add(sum: &mut usize, more: usize) {
    *sum += more;
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, State)]
pub struct Log {
    #[channel(append)]
    pub lines: Vec<String>,
    #[channel(reduce = add)]
    pub rounds: usize,
}

/// Where a run loses time: nowhere, or here and there.
#[derive(Clone)]
pub struct Delays {
    pub random: Option<Arc<Mutex<StdRng>>>,
    /// The longest, in milliseconds. In memory the clock is the test's, and time costs nothing.
    pub longest: u64,
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

    pub fn compile(&self, parallel: usize, delays: &Delays) -> CompiledGraph<Log> {
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
    pub fn asking(&self) -> Vec<String> {
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

/// The child that nodes start.
pub fn kid() -> CompiledGraph<Log> {
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
