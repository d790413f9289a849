//! The kinds of threads that are under way at the same time, and what each must have come to in the end.

use std::{
    io::Write as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use graph::{
    Arrived, Context, END, Engine, EngineError, Goto, Graph, GraphBuilder, NodeError, NodeOptions,
    RetryPolicy, START, Send, ServeOptions, State, ThreadStatus, WaitFor, checkpoint::Checkpointer,
};
use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

use super::WIDTH;

const LINKS: usize = 12;
const SENDS: usize = 4;
/// How many answers a thread that asks takes.
pub const QUESTIONS: usize = 3;

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, State)]
pub struct Log {
    #[channel(append)]
    pub lines: Vec<String>,
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

pub fn own_stream(thread: &str) -> String {
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

/// The graph of a thread.
pub fn kind(n: usize) -> &'static str {
    KINDS[n % KINDS.len()]
}

/// The id of a thread.
pub fn id(n: usize) -> String {
    format!("{}:{n}", kind(n))
}

/// The names of a thread's children.
pub fn kids(n: usize) -> &'static [&'static str] {
    match kind(n) {
        "family" => &["a", "b"],
        "doomed" => &["kid"],
        _ => &[],
    }
}

/// What a thread's state holds in the end, what it has said, and the name of its end.
pub fn expected(n: usize) -> (Vec<String>, Vec<String>, &'static str) {
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

/// What a thread has done to the outside world in the end.
pub fn expected_effects(n: usize) -> Vec<String> {
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
