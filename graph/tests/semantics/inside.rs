//! Statement 31: what goes on inside a subgraph is what would go on at the top: waits, limits, and ends.

use std::{sync::Arc, time::Duration};

use graph::{
    Arrived, Busy, CachePolicy, CompiledGraph, Context, END, Goto, GraphBuilder, Keep, NodeError,
    NodeOptions, RetryPolicy, START, Send, SubgraphMemory, SubgraphOptions, ThreadStatus, WaitFor,
    checkpoint::{Checkpointer, Write},
};
use jiff::Timestamp;

use crate::{
    lab::{
        Count, Notes, NotesUpdate, log, notes, options, promise, run, said, says, serve,
        start_and_run, start_as, state, thread, thread_as, until_status,
    },
    subgraphs::{Inner, InnerUpdate, back, inner, line, nothing},
};

fn quick(attempts: u32) -> RetryPolicy {
    RetryPolicy::default()
        .attempts(attempts)
        .first_interval(Duration::from_millis(1))
}

/// A graph `g` of one subgraph.
pub fn around(
    graph: &CompiledGraph<Inner>,
    options: impl Into<SubgraphOptions>,
) -> GraphBuilder<Notes> {
    notes("g")
        .subgraph_with("sub", options, graph, nothing, back)
        .edge(START, "sub")
        .edge("sub", END)
}

pub fn compiled(graph: GraphBuilder<Inner>) -> CompiledGraph<Inner> {
    graph.compile().expect("compiles")
}

async fn writes_inside(store: &Arc<dyn Checkpointer>, task: &str) -> Vec<Write> {
    let mut writes = store.pending_writes(&"t".into()).await.expect("reads");
    writes.retain(|write| write.task.starts_with(task));
    writes
}

// ---- waiting ----

promise! {
    async fn a_timer_inside_wakes_the_thread_that_sleeps(lab) {
        let child = compiled(inner("child")
            .node("nap", |_, ctx: Context| async move {
                let at = Timestamp::now() + Duration::from_millis(30);
                ctx.sleep_until("nap", at).await?;
                Ok(line("awake"))
            })
            .node("after", |_, _| async { Ok(line("after")) })
            .edge(START, "nap").edge("nap", "after").edge("after", END));
        let engine = lab.notes(around(&child, SubgraphMemory::Resumable)).await;
        let waiting = start_and_run(&engine).await;
        if waiting.status == ThreadStatus::Waiting {
            assert!(waiting.lease.is_none() && waiting.wake_at.is_some(), "{waiting:?}");
        }
        let server = serve(&engine, options());
        until_status(&engine, "t", ThreadStatus::Done).await;
        server.drain().await;
        assert_eq!(state(&engine).await.log, ["awake", "after"]);
    }
}

promise! {
    async fn signals_inside_are_used_in_order_and_once(lab) {
        let child = || compiled(inner("child")
            .node("take", |_, ctx: Context| async move {
                let Arrived::Signal(came) = ctx.wait_any("go", &WaitFor::new().signal("go")).await? else {
                    return Err(NodeError::msg("not a signal"));
                };
                Ok(line(came.key).total(1))
            })
            .edge(START, "take")
            .conditional("take", ["take", END], |s: &Inner| if s.total < 5 { "take" } else { END }));
        let graph = || around(&child(), SubgraphMemory::Resumable);
        let engine = lab.notes(graph()).await;
        start_and_run(&engine).await;
        for key in ["a", "b"] {
            engine.signal("t", "go", key, &()).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Waiting);
        // In another process, one by one and all at once.
        let other = lab.notes(graph()).await;
        other.signal("t", "go", "c", &()).await.expect("is taken");
        run(&other).await;
        for key in ["d", "a", "e", "f"] {
            other.signal("t", "go", key, &()).await.expect("is taken");
        }
        run(&other).await;
        assert_eq!(thread(&other).await.status, ThreadStatus::Done);
        assert_eq!(state(&other).await.log, ["a", "b", "c", "d", "e"]);
    }
}

promise! {
    async fn a_child_started_inside_tells_the_subgraph_of_its_end(lab) {
        let starts = compiled(inner("starts")
            .node("spawn", |_, ctx: Context| async move {
                ctx.spawn("kid", "kid", &log("hello"))?;
                Ok(line("spawned"))
            })
            .node("gather", |_, ctx: Context| async move {
                match ctx.wait_any("kid", &WaitFor::new().child("kid")).await? {
                    Arrived::Child(end) => Ok(line(format!("{:?} {}", end.status, end.output["log"]))),
                    other => Err(NodeError::msg(format!("{other:?}"))),
                }
            })
            .edge(START, "spawn").edge("spawn", "gather").edge("gather", END));
        let kid = notes("kid").node("work", |_, _| says("worked")).edge(START, "work").edge("work", END);
        let engine = graph::Engine::builder(lab.store.clone())
            .graph(around(&starts, SubgraphMemory::Resumable).compile().expect("compiles"))
            .graph(kid.compile().expect("compiles"))
            .build().await.expect("builds");
        start_and_run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["spawned", "Done [\"hello\",\"worked\"]"]);
    }
}

// ---- the shape of a graph ----

promise! {
    async fn joins_and_deferred_nodes_keep_their_meaning_inside(lab) {
        let child = compiled(inner("child")
            .node("a", |_, _| async { Ok(line("a")) })
            .node("b", |_, _| async { Ok(line("b")) })
            .node("b2", |_, ctx: Context| async move {
                let answer: String = ctx.interrupt("b2", &()).await?;
                Ok(line(answer))
            })
            .node("c", |_, _| async { Ok(line("c").total(1)) })
            .node_with("last", NodeOptions::default().deferred(), |s: Arc<Inner>, _| async move {
                Ok(line(format!("last {}", s.total)))
            })
            .edge(START, "a").edge(START, "b").edge(START, "last")
            .edge("b", "b2")
            .join(["a", "b2"], "c")
            .conditional("c", ["a", "b", END], |s: &Inner| {
                if s.total < 2 { Goto::node("a").and(Goto::node("b")) } else { Goto::node(END) }
            })
            .edge("last", END));
        let graph = || around(&child, SubgraphMemory::Resumable);
        start_and_run(&lab.notes(graph()).await).await;
        for round in ["one", "two"] {
            // The half-full join and the deferred node are known to the next process.
            let engine = lab.notes(graph()).await;
            let waiting = thread(&engine).await;
            assert_eq!(waiting.waits.len(), 1, "{waiting:?}");
            engine.answer("t", &waiting.waits[0].id, round).await.expect("is open");
            run(&engine).await;
        }
        let engine = lab.notes(graph()).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["a", "b", "one", "c", "a", "b", "two", "c", "last 2"]);
    }
}

promise! {
    async fn the_recursion_limit_inside_counts_the_steps_inside(lab) {
        let child = |limit| compiled(inner("child")
            .node("step", |_, _| async { Ok(InnerUpdate::default().total(1)) })
            .edge(START, "step")
            .conditional("step", ["step", END], |s: &Inner| if s.total < 5 { "step" } else { END })
            .recursion_limit(limit));
        let engine = lab.notes(around(&child(4), SubgraphMemory::Resumable)).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        let error = failed.error.expect("says why");
        assert!(error.contains("subgraph `child`") && error.contains("recursion limit of 4"), "{error}");
        // Who retries it has as many steps again, and goes on where it stopped.
        engine.retry("t").await.expect("can be retried");
        run(&engine).await;
        assert_eq!(state(&engine).await.sum, 5);
        // Five steps need exactly five; those of the graph around do not count.
        let engine = lab.notes(around(&child(5), SubgraphMemory::Stateless).recursion_limit(1)).await;
        start_as(&engine, "u").await;
        run(&engine).await;
        assert_eq!(thread_as(&engine, "u").await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn subgraphs_nest_sixteen_deep(lab) {
        let nested = |depth: usize| {
            let mut graph = notes("lowest")
                .node("ask", |_, ctx: Context| async move {
                    let answer: String = ctx.interrupt("q", &()).await?;
                    Ok(log(format!("{answer} at {}", ctx.namespace().len())))
                })
                .edge(START, "ask").edge("ask", END);
            for level in (0..depth).rev() {
                let inside = graph.compile().expect("compiles");
                graph = notes(if level == 0 { "g" } else { "between" })
                    .subgraph_shared("sub", SubgraphMemory::Resumable, &inside)
                    .edge(START, "sub").edge("sub", END);
            }
            graph
        };
        let waiting = start_and_run(&lab.notes(nested(16)).await).await;
        let other = lab.notes(nested(16)).await;
        other.answer("t", &waiting.waits[0].id, "deep").await.expect("is open");
        run(&other).await;
        assert_eq!(state(&other).await.log, ["deep at 16"]);
        let engine = lab.notes(nested(17)).await;
        start_as(&engine, "u").await;
        run(&engine).await;
        let error = thread_as(&engine, "u").await.error.expect("fails");
        assert!(error.contains("as deep as they go"), "{error}");
    }
}

promise! {
    async fn a_long_loop_inside_leaves_only_what_is_needed_to_go_on(lab) {
        const STEPS: i64 = 40;
        let looping = || inner("looping")
            .node("step", |s: Arc<Inner>, ctx: Context| async move {
                let n = s.total + 1;
                let done: i64 = ctx.step("once", |_| async { Ok::<_, NodeError>(n) }).await?;
                if n % STEPS == 38 {
                    let word: String = ctx.interrupt("word", &()).await?;
                    return Ok(line(format!("{word} {n}")).total(1));
                }
                Ok(InnerUpdate::default().total(1).topic(format!("topic {done}")))
            })
            .edge(START, "step")
            .conditional("step", ["step", END], |s: &Inner| if s.total % STEPS == 0 { END } else { "step" });
        let child = || compiled(looping());
        let shared = || notes("shared")
            .node("step", |s: Arc<Notes>, ctx: Context| async move {
                let n = s.seen.len() + 1;
                if n == 38 {
                    let word: String = ctx.interrupt("word", &()).await?;
                    return Ok(log(word).seen([(n.to_string(), 1)].into()));
                }
                Ok(NotesUpdate::default().last(n.to_string()).seen([(n.to_string(), 1)].into()))
            })
            .edge(START, "step")
            .conditional("step", ["step", END], |s: &Notes| if s.seen.len() == 40 { END } else { "step" })
            .compile().expect("compiles");
        let graph = || notes("g")
            .subgraph("res", &child(), nothing, |s: &Inner| log(format!("{:?} {} {}", s.lines, s.total, s.topic)))
            .subgraph_with("acc", SubgraphMemory::Accumulating, &child(), nothing, |s: &Inner| {
                log(format!("{:?} {} {}", s.lines, s.total, s.topic)).sum(1)
            })
            .subgraph_shared("shr", SubgraphMemory::Resumable, &shared())
            .edge(START, "res").edge("res", "acc").edge("shr", END)
            .conditional("acc", ["acc", "shr"], |s: &Notes| if s.sum < 2 { "acc" } else { "shr" });
        start_and_run(&lab.notes(graph()).await).await;
        for (task, word) in [("res", "one"), ("acc", "two"), ("acc", "three"), ("shr", "four")] {
            let left = writes_inside(&lab.store, task).await;
            assert!((2..=12).contains(&left.len()), "{task}: {} are left", left.len());
            // In another process.
            let engine = lab.notes(graph()).await;
            let waiting = thread(&engine).await;
            assert_eq!(waiting.waits.len(), 1, "{task}: {waiting:?}");
            engine.answer("t", &waiting.waits[0].id, word).await.expect("is open");
            run(&engine).await;
        }
        let engine = lab.notes(graph()).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done, "{:?}", thread(&engine).await.error);
        let state = state(&engine).await;
        assert_eq!(state.log, [
            "[\"one 38\"] 40 topic 40",
            "[\"two 38\"] 40 topic 40",
            "[\"two 38\", \"three 78\"] 80 topic 80",
            "four",
        ]);
        assert_eq!((state.last.as_str(), state.seen.len()), ("40", 40));
    }
}

// ---- failing ----

promise! {
    async fn a_time_limit_ends_a_task_inside_or_the_whole_subgraph(lab) {
        let tries = [Count::default(), Count::default()];
        let [limited, endless] = tries.clone();
        let limit = |attempts| NodeOptions::default().timeout(Duration::from_millis(200)).retry(quick(attempts));
        let child = compiled(inner("child")
            .node("first", |_, ctx: Context| async move {
                ctx.emit("s", "first", &())?;
                Ok(line("first"))
            })
            .node_with("limited", limit(50), move |_, _| {
                let tries = limited.up();
                async move {
                    if tries == 1 {
                        std::future::pending::<()>().await;
                    }
                    Ok(line("limited"))
                }
            })
            .node("endless", move |_, _| {
                let tries = endless.up();
                async move {
                    if tries == 1 {
                        std::future::pending::<()>().await;
                    }
                    Ok(line("endless"))
                }
            })
            .edge(START, "first").edge("first", "limited").edge("limited", "endless").edge("endless", END));
        let whole = NodeOptions::default().timeout(Duration::from_millis(800)).retry(quick(50));
        let engine = lab.notes(around(&child, SubgraphOptions::default().node(whole))).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["first", "limited", "endless"]);
        assert!(tries.iter().all(|tries| tries.get() >= 2));
        // What was done before the limit was kept.
        assert_eq!(said(&engine, "s").await, ["first null"]);
    }
}

promise! {
    async fn an_error_handler_inside_takes_over_inside(lab) {
        let ran = [Count::default(), Count::default()];
        let [bad, after] = ran.clone();
        let child = compiled(inner("child")
            .node("bad", move |_, _| { bad.up(); async { Err::<InnerUpdate, _>(NodeError::msg("the disk is full")) } })
            .node("mend", |_, ctx: Context| async move {
                let failure = ctx.failure().ok_or_else(|| NodeError::msg("no failure"))?;
                let answer: String = ctx.interrupt("mend", &failure.error).await?;
                Ok(line(format!("{} {} {:?}", failure.node, answer, ctx.namespace())))
            })
            .node("after", move |_, _| { after.up(); async { Ok(line("after")) } })
            .edge(START, "bad").edge("bad", END)
            .on_error(["bad"], "mend").edge("mend", "after").edge("after", END));
        let graph = || around(&child, SubgraphMemory::Resumable);
        let waiting = start_and_run(&lab.notes(graph()).await).await;
        assert_eq!(waiting.waits.len(), 1, "{waiting:?}");
        let other = lab.notes(graph()).await;
        other.answer("t", &waiting.waits[0].id, "mended").await.expect("is open");
        run(&other).await;
        assert_eq!(state(&other).await.log, ["bad mended [\"sub\"]", "after"]);
        assert_eq!(ran.each_ref().map(Count::get), [1, 1]);
    }
}

promise! {
    async fn a_cached_node_inside_is_not_run_twice(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let child = compiled(inner("child")
            .node_with("cached", NodeOptions::default().cache(CachePolicy::new()), move |_, _| {
                let run = counted.up();
                async move { Ok(line(format!("run {run}"))) }
            })
            .edge(START, "cached").edge("cached", END));
        for memory in [SubgraphMemory::Resumable, SubgraphMemory::Stateless] {
            let engine = lab.notes(around(&child, memory)).await;
            let id = format!("{memory:?}");
            start_as(&engine, &id).await;
            run(&engine).await;
            assert_eq!(engine.state::<Notes>(id).await.expect("is there").log, ["run 1"]);
        }
        assert_eq!(runs.get(), 1);
    }
}

promise! {
    async fn a_subgraph_that_has_begun_is_not_replaced_by_a_cached_result(lab) {
        let (fails, runs) = (Count::default(), Count::default());
        let (failing, counted) = (fails.clone(), runs.clone());
        let child = compiled(inner("child")
            .node("first", move |_, _| { let run = counted.up(); async move { Ok(line(format!("run {run}"))) } })
            .node("bad", move |_, _| {
                let tries = failing.up();
                async move { if tries == 1 { Err(NodeError::msg("not yet")) } else { Ok(line("bad")) } }
            })
            .edge(START, "first").edge("first", "bad").edge("bad", END));
        let options = SubgraphOptions::default().node(NodeOptions::default().cache(CachePolicy::new()));
        let engine = lab.notes(around(&child, options)).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Failed);
        // Another thread puts a result there; a third one takes it.
        for id in ["u", "v"] {
            start_as(&engine, id).await;
            run(&engine).await;
            assert_eq!(engine.state::<Notes>(id).await.expect("is there").log, ["run 2", "bad"]);
        }
        assert_eq!(runs.get(), 2);
        // The first one goes on with what it has done.
        engine.retry("t").await.expect("can be retried");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["run 1", "bad"]);
    }
}

// ---- what is kept ----

promise! {
    async fn a_pruned_or_copied_thread_has_what_its_subgraphs_kept(lab) {
        let child = compiled(inner("child")
            .node("talk", |s: Arc<Inner>, ctx: Context| async move {
                let word: String = ctx.interrupt("word", &s.lines).await?;
                Ok(line(word).total(1))
            })
            .edge(START, "talk").edge("talk", END));
        let graph = || notes("g")
            .subgraph_with("sub", SubgraphMemory::Accumulating, &child, nothing, |s: &Inner| {
                log(s.lines.join(" ")).sum(s.total)
            })
            .edge(START, "sub").edge("sub", END);
        let engine = lab.notes(graph()).await;
        start_and_run(&engine).await;
        for word in ["a", "b", "c"] {
            let waiting = thread(&engine).await;
            engine.answer("t", &waiting.waits[0].id, word).await.expect("is open");
            run(&engine).await;
            let pruned = engine.prune("t", Keep::latest()).await.expect("prunes");
            assert!(!pruned.more);
            engine.input("t", word, &(), Busy::Reject).await.expect("is taken");
            // In another process, which reads what is kept.
            run(&lab.notes(graph()).await).await;
        }
        engine.copy_thread("t", "u").await.expect("copies");
        for (id, word) in [("u", "x"), ("t", "y")] {
            let other = lab.notes(graph()).await;
            run(&other).await;
            let waiting = thread_as(&other, id).await;
            assert_eq!(waiting.waits[0].value, serde_json::json!(["a", "b", "c"]));
            other.answer(id, &waiting.waits[0].id, word).await.expect("is open");
            run(&other).await;
            let state: Notes = other.state(id).await.expect("is there");
            assert_eq!(state.log, ["a", "a b", "a b c", &format!("a b c {word}")]);
            assert_eq!(state.sum, 1 + 2 + 3 + 4);
        }
    }
}

promise! {
    async fn each_task_of_a_fan_out_invokes_a_subgraph_of_its_own(lab) {
        let child = compiled(inner("child")
            .node("ask", |s: Arc<Inner>, ctx: Context| async move {
                let answer: String = ctx.interrupt("q", &s.topic).await?;
                Ok(line(format!("{} {answer}", ctx.namespace().join("/"))))
            })
            .edge(START, "ask").edge("ask", END));
        let graph = || {
            let child = child.clone();
            notes("g")
                .node("call", move |_, ctx: Context| {
                    let child = child.clone();
                    async move {
                        let mut lines = Vec::new();
                        for word in ["x", "y"] {
                            let update = InnerUpdate::default().topic(format!("{} {word}", ctx.argument::<i64>()?));
                            let end = ctx.invoke("child", &child, SubgraphMemory::Resumable, update).await?;
                            lines.extend(end.lines.clone());
                        }
                        Ok(NotesUpdate::default().log(lines))
                    }
                })
                .conditional(START, ["call"], |_: &Notes| Goto::sends([1, 2].map(|n| Send::new("call", &n))))
                .edge("call", END)
        };
        start_and_run(&lab.notes(graph()).await).await;
        // Each asks for its first invocation, and then for its second.
        for _ in 0..2 {
            let engine = lab.notes(graph()).await;
            let waits = thread(&engine).await.waits;
            assert_eq!(waits.len(), 2, "{waits:?}");
            for wait in &waits {
                engine.answer("t", &wait.id, &wait.value).await.expect("is open");
            }
            run(&engine).await;
        }
        let engine = lab.notes(graph()).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, [
            "0:call+child 1 x", "0:call+child:1 1 y", "1:call+child 2 x", "1:call+child:1 2 y",
        ]);
    }
}
