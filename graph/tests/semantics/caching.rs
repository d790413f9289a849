//! Cached nodes (21).

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::StreamExt;
use graph::{
    Cache, CachePolicy, Command, CompiledGraph, Context, END, Engine, Fault, Goto, GraphBuilder,
    Modes, NodeError, NodeOptions, RetryPolicy, START, Send, StartOptions, State, StreamKind,
    ThreadStatus, WaitFor,
    cache::{CacheEntry, CacheLimits, CacheSpace},
    checkpoint::StorageError,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::lab::{
    Count, Notes, NotesUpdate, eventually, log, notes, promise, run, said, start, start_and_run,
    start_as, state, thread, thread_as,
};

fn cached() -> NodeOptions {
    NodeOptions::default().cache(CachePolicy::new())
}

/// A graph `g` of one cached node `a` that counts its runs.
fn one(options: NodeOptions, runs: &Count) -> GraphBuilder<Notes> {
    let runs = runs.clone();
    notes("g")
        .node_with("a", options, move |_, _| {
            let runs = runs.clone();
            async move { Ok(log(format!("run {}", runs.up()))) }
        })
        .edge(START, "a")
        .edge("a", END)
}

async fn notes_of(engine: &Engine, id: &str) -> Notes {
    engine.state(id).await.expect("has a state")
}

async fn with_input(engine: &Engine, id: &str, input: &NotesUpdate) {
    engine
        .start(id, "g", input, StartOptions::default())
        .await
        .expect("starts");
    run(engine).await;
    assert_eq!(thread_as(engine, id).await.status, ThreadStatus::Done);
}

promise! {
    async fn a_result_in_the_cache_takes_the_place_of_a_run(lab) {
        let (runs, after) = (Count::default(), Count::default());
        let counted = after.clone();
        let graph = || {
            let (runs, after) = (runs.clone(), counted.clone());
            notes("g")
                .node_with("a", cached(), move |_, _| {
                    let runs = runs.clone();
                    async move {
                        runs.up();
                        Ok(Command::goto("b").update(log("a").sum(2)))
                    }
                })
                .node("b", move |_, _| {
                    let after = after.clone();
                    async move {
                        after.up();
                        Ok(log("b"))
                    }
                })
                .edge(START, "a")
                .goes("a", ["b"])
                .edge("b", END)
        };
        let engine = lab.notes(graph()).await;
        start_and_run(&engine).await;
        start_as(&engine, "u").await;
        let mut items = engine.follow("u", Modes::UPDATES);
        run(&engine).await;
        // Another engine on the same database has what this one has put there.
        let other = lab.notes(graph()).await;
        start_as(&other, "v").await;
        run(&other).await;
        for id in ["t", "u", "v"] {
            let notes = notes_of(&engine, id).await;
            assert_eq!((notes.log, notes.sum), (vec!["a".to_owned(), "b".to_owned()], 2));
        }
        assert_eq!((runs.get(), after.get()), (1, 3));
        let mut streamed = Vec::new();
        while let Some(item) = items.next().await {
            if let StreamKind::Updates { node, cached, .. } = item.kind {
                streamed.push((node, cached));
            }
        }
        assert_eq!(streamed, [("a".to_owned(), true), ("b".to_owned(), false)]);
    }
}

promise! {
    async fn without_a_key_function_the_state_and_the_argument_are_the_key(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let engine = lab.notes(
            notes("g")
                .node_with("a", cached(), move |_, ctx: Context| {
                    let runs = counted.clone();
                    async move {
                        runs.up();
                        Ok(NotesUpdate::default().sum(ctx.argument::<i64>()?))
                    }
                })
                .conditional(START, ["a"], |_| Goto::sends([1, 2, 1].map(|n| Send::new("a", &n))))
                .edge("a", END),
        ).await;
        with_input(&engine, "t", &log("x")).await;
        // Tasks of one step do not see each other.
        assert_eq!(runs.get(), 3);
        with_input(&engine, "u", &log("x")).await;
        assert_eq!(runs.get(), 3);
        with_input(&engine, "v", &log("y")).await;
        assert_eq!(runs.get(), 6);
        for id in ["t", "u", "v"] {
            assert_eq!(notes_of(&engine, id).await.sum, 4);
        }
    }
}

promise! {
    async fn a_key_function_says_what_matters(lab) {
        let runs = Count::default();
        let options = NodeOptions::default().cache(CachePolicy::new().key(|notes: &Notes, _| notes.sum));
        let engine = lab.notes(one(options, &runs)).await;
        with_input(&engine, "t", &log("x").sum(1)).await;
        with_input(&engine, "u", &log("y").sum(1)).await;
        assert_eq!(notes_of(&engine, "u").await.log, ["y", "run 1"]);
        with_input(&engine, "v", &log("y").sum(2)).await;
        assert_eq!(notes_of(&engine, "v").await.log, ["y", "run 2"]);
    }
}

promise! {
    async fn a_cached_result_expires(lab) {
        let runs = Count::default();
        let options = NodeOptions::default().cache(CachePolicy::new().ttl(Duration::from_millis(300)));
        let engine = lab.notes(one(options, &runs)).await;
        start_and_run(&engine).await;
        let tries = Count::default();
        eventually("it expires", || async {
            start_as(&engine, &format!("u{}", tries.up())).await;
            run(&engine).await;
            runs.get() == 2
        }).await;
    }
}

promise! {
    async fn a_cleared_cache_is_empty(lab) {
        let runs = Count::default();
        let engine = lab.notes(one(cached(), &runs)).await;
        start_and_run(&engine).await;
        assert_eq!(engine.clear_cache("g", "a").await.expect("clears"), 1);
        assert_eq!(engine.clear_cache("g", "a").await.expect("clears"), 0);
        start_as(&engine, "u").await;
        run(&engine).await;
        assert_eq!(runs.get(), 2);
        assert_eq!(engine.clear_cache("g", "b").await.expect_err("no such node").to_string(), "graph `g` has no node `b`");
        assert!(engine.clear_cache("h", "a").await.is_err());
    }
}

promise! {
    async fn a_failed_attempt_is_never_cached(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let retry = RetryPolicy::default().attempts(2).first_interval(Duration::from_millis(1));
        let engine = lab.notes(
            notes("g")
                .node_with("a", cached().retry(retry), move |_, _| {
                    let run = counted.up();
                    async move {
                        // Two failures fail the first thread; the second one succeeds with its second attempt.
                        if run <= 3 { Err(NodeError::msg("not yet")) } else { Ok(log(format!("run {run}"))) }
                    }
                })
                .edge(START, "a")
                .edge("a", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Failed);
        assert_eq!(runs.get(), 2);
        for id in ["u", "v"] {
            start_as(&engine, id).await;
            run(&engine).await;
            assert_eq!(notes_of(&engine, id).await.log, ["run 4"]);
        }
        assert_eq!(runs.get(), 4);
        assert_eq!(engine.clear_cache("g", "a").await.expect("clears"), 1);
    }
}

promise! {
    async fn only_a_task_that_did_nothing_but_return_is_cached(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let graph = notes("g")
            .node_with("does", cached(), move |_, ctx: Context| {
                let runs = counted.clone();
                async move {
                    let what: String = ctx.argument()?;
                    if !what.starts_with("waits") || ctx.attempt() == 1 {
                        runs.up();
                    }
                    match what.as_str() {
                        "nothing" => {}
                        "streams" => ctx.custom("not kept anyhow")?,
                        "says" => ctx.emit("s", "said", &())?,
                        "says now" => { ctx.say_now(ctx.thread().as_str(), "s", "said", &()).await?; }
                        "spawns" => { ctx.spawn("kid", "child", &())?; }
                        "signals" => ctx.signal(&"t".into(), "news", ctx.thread().as_str(), &())?,
                        "cancels" => ctx.cancel_child("none")?,
                        "steps" => { ctx.step("pay", |_| async { Ok::<_, NodeError>(1) }).await?; }
                        "looks" => { ctx.try_take("mail", &WaitFor::new().signal("news")).await?; }
                        "waits" => ctx.sleep_until("nap", jiff::Timestamp::now()).await?,
                        _ => return Err(NodeError::msg("what?")),
                    }
                    Ok(log(what))
                }
            })
            .conditional(START, ["does"], |notes: &Notes| Goto::send(Send::new("does", &notes.last)))
            .edge("does", END);
        let child = notes("child").node("a", |_, _| async { Ok(()) }).edge(START, "a").edge("a", END);
        let compiled = |graph: GraphBuilder<Notes>| -> CompiledGraph<Notes> { graph.compile().expect("compiles") };
        let engine = Engine::builder(lab.store.clone())
            .graph(compiled(graph)).graph(compiled(child)).build().await.expect("builds");
        let cases = [
            ("nothing", true), ("streams", true), ("says", false), ("says now", false), ("spawns", false), ("signals", false),
            ("cancels", false), ("steps", false), ("looks", false), ("waits", false),
        ];
        for (what, kept) in cases {
            for id in ["t", "u"] {
                let input = NotesUpdate::default().last(what.to_owned());
                with_input(&engine, &format!("{id} {what}"), &input).await;
            }
            let cleared = engine.clear_cache("g", "does").await.expect("clears");
            assert_eq!(cleared, u64::from(kept), "{what}");
        }
        assert_eq!(said(&engine, "s").await.len(), 4);
    }
}

promise! {
    async fn a_hit_is_kept_while_its_siblings_wait(lab) {
        let runs = Count::default();
        let engine = lab.notes(
            one(cached(), &runs)
                .node("ask", |_, ctx: Context| async move {
                    let answer: String = if ctx.thread().as_str() == "t" { String::new() } else { ctx.interrupt("q", &()).await? };
                    Ok(log(format!("ask {answer}")))
                })
                .edge(START, "ask")
                .edge("ask", END),
        ).await;
        start_and_run(&engine).await;
        start_as(&engine, "u").await;
        run(&engine).await;
        // What was taken from the cache is the thread's own now.
        assert_eq!(engine.clear_cache("g", "a").await.expect("clears"), 1);
        let waiting = thread_as(&engine, "u").await;
        engine.answer("u", &waiting.waits[0].id, "yes").await.expect("answers");
        run(&engine).await;
        assert_eq!(notes_of(&engine, "u").await.log, ["run 1", "ask yes"]);
        assert_eq!(runs.get(), 1);
    }
}

promise! {
    async fn what_does_not_land_is_not_cached(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let engine = lab.notes(
            notes("g")
                .node_with("a", cached(), move |_, _| {
                    counted.up();
                    async { Ok(Command::<Notes>::goto("nowhere")) }
                })
                .edge(START, "a")
                .edge("a", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Failed);
        assert_eq!(engine.clear_cache("g", "a").await.expect("clears"), 0);
    }
}

/// The same channels with another type in one of them: what a next release may have.
#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Renewed {
    #[channel(append)]
    log: Vec<i64>,
    last: String,
}

promise! {
    async fn what_does_not_fit_the_graph_any_more_is_a_miss(lab) {
        let runs = Count::default();
        let options = || NodeOptions::default().cache(CachePolicy::new());
        let engine = lab.notes(one(options().cache(CachePolicy::new().key(|_: &Notes, _| 1)), &runs)).await;
        start_and_run(&engine).await;
        let renewed = graph::Graph::<Renewed>::builder("g")
            .node_with("a", options().cache(CachePolicy::new().key(|_: &Renewed, _| 1)), |_, _| async {
                Ok(RenewedUpdate::default().log(vec![7]))
            })
            .edge(START, "a")
            .edge("a", END);
        let engine = lab.engine(renewed.compile().expect("compiles")).await;
        start_as(&engine, "u").await;
        run(&engine).await;
        let state: Renewed = engine.state("u").await.expect("has a state");
        assert_eq!(state.log, [7]);
    }
}

/// A cache that has lost its database.
struct Broken;

#[async_trait]
impl Cache for Broken {
    async fn get(&self, _: &CacheSpace, _: &[String]) -> Result<Vec<Option<Value>>, StorageError> {
        Err(fault())
    }
    async fn put(
        &self,
        _: &CacheSpace,
        _: Vec<CacheEntry>,
        _: CacheLimits,
    ) -> Result<(), StorageError> {
        Err(fault())
    }
    async fn clear(&self, _: &CacheSpace) -> Result<u64, StorageError> {
        Err(fault())
    }
}

fn fault() -> StorageError {
    StorageError::Backend {
        operation: "caching".into(),
        source: "the connection broke".into(),
    }
}

promise! {
    async fn a_cache_that_fails_fails_nobody(lab) {
        let runs = Count::default();
        let engine = Engine::builder(lab.store.clone())
            .graph(one(cached(), &runs).compile().expect("compiles"))
            .cache(Arc::new(Broken))
            .build()
            .await
            .expect("builds");
        start(&engine).await;
        run(&engine).await;
        start_as(&engine, "u").await;
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["run 1"]);
        assert_eq!(notes_of(&engine, "u").await.log, ["run 2"]);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        // Whoever clears it hears of it.
        assert!(engine.clear_cache("g", "a").await.is_err());
    }
}

#[test]
fn a_key_of_another_state_is_refused_when_the_graph_is_compiled() {
    let options = NodeOptions::default().cache(CachePolicy::new().key(|_: &Renewed, _| 1));
    let error = one(options, &Count::default())
        .compile()
        .expect_err("is refused");
    assert!(
        matches!(&error.faults[..], [Fault::CacheOfOtherState { node, .. }] if node == "a"),
        "{error}"
    );
}
