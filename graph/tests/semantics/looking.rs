//! Statement 31: looking at subgraphs from outside.

use std::sync::Arc;

use graph::{
    Busy, Context, END, Engine, EngineError, Goto, NodeError, START, Send, SubgraphMemory,
    ThreadStatus,
};

use crate::{
    lab::{Notes, NotesUpdate, log, notes, promise, run, start_and_run, thread},
    subgraphs::{Inner, InnerUpdate, asks, back, inner, line, nothing},
};

async fn inside(engine: &Engine, namespace: &[&str]) -> Option<Inner> {
    engine.state_inside("t", namespace).await.expect("reads")
}

/// Namespaces, supersteps, and what is next.
async fn seen(engine: &Engine) -> Vec<String> {
    let found = engine.subgraphs("t").await.expect("reads");
    found
        .into_iter()
        .map(|info| {
            let keeps = if info.keeps { " keeps" } else { "" };
            format!(
                "{} {} {:?}{keeps}",
                info.namespace.join("/"),
                info.step,
                info.next
            )
        })
        .collect()
}

async fn answer(engine: &Engine, index: usize, value: &str) {
    let waiting = thread(engine).await;
    let id = &waiting.waits[index].id;
    engine.answer("t", id, value).await.expect("is open");
    run(engine).await;
}

promise! {
    async fn the_state_of_a_subgraph_that_waits_can_be_looked_at(lab) {
        let ran = Default::default();
        let graph = || notes("g")
            .subgraph("sub", &asks(&ran), |_, _| Ok(InnerUpdate::default().topic("tea".into())), back)
            .edge(START, "sub").edge("sub", END);
        let engine = lab.notes(graph()).await;
        start_and_run(&engine).await;
        // From another process too.
        for engine in [&engine, &lab.notes(graph()).await] {
            assert_eq!(seen(engine).await, ["sub 1 [\"ask\"]"]);
            let state = inside(engine, &["sub"]).await.expect("is under way");
            assert_eq!((state.lines, state.total, state.topic.as_str()), (vec!["before".to_owned()], 1, "tea"));
            assert_eq!(inside(engine, &["other"]).await, None);
        }
        let other: Result<Option<Notes>, _> = engine.state_inside("t", &["sub"]).await;
        let error = other.expect_err("is of another type");
        assert!(matches!(&error, EngineError::StateInside { .. }), "{error}");
        assert!(error.to_string().contains("subgraph `sub` of thread `t`"), "{error}");
        answer(&engine, 0, "Ada").await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        // The superstep around it has landed: a resumable one leaves nothing.
        assert_eq!((seen(&engine).await.len(), inside(&engine, &["sub"]).await), (0, None));
        let unknown = engine.subgraphs("nobody").await.expect_err("is unknown");
        assert!(unknown.to_string().contains("nobody"), "{unknown}");
    }
}

promise! {
    async fn each_task_of_a_fan_out_and_each_depth_has_a_namespace_to_look_at(lab) {
        let lowest = || inner("lowest")
            .node("ask", |s: Arc<Inner>, ctx: Context| async move {
                let answer: String = ctx.interrupt("q", &s.topic).await?;
                Ok(line(answer))
            })
            .node("again", |_, ctx: Context| async move {
                let answer: String = ctx.interrupt("q", &()).await?;
                Ok(line(answer))
            })
            .edge(START, "ask").edge("ask", "again").edge("again", END)
            .compile().expect("compiles");
        let middle = || {
            let lowest = lowest();
            notes("middle")
                .node("first", |_, _| async { Ok(log("first")) })
                .node("call", move |_, ctx: Context| {
                    let lowest = lowest.clone();
                    async move {
                        let update = InnerUpdate::default().topic(ctx.namespace().join("/"));
                        let end = ctx.invoke("deep", &lowest, SubgraphMemory::Resumable, update).await?;
                        Ok(NotesUpdate::default().log(end.lines.clone()))
                    }
                })
                .edge(START, "first").edge("first", "call").edge("call", END)
                .compile().expect("compiles")
        };
        let graph = || notes("g")
            .node("begin", |_, _| async { Ok(log("begin")) })
            .subgraph_shared("sub", SubgraphMemory::Resumable, &middle())
            .edge(START, "begin")
            .conditional("begin", ["sub"], |_: &Notes| Goto::sends([1, 2].map(|n| Send::new("sub", &n))))
            .edge("sub", END);
        start_and_run(&lab.notes(graph()).await).await;
        let engine = lab.notes(graph()).await;
        answer(&engine, 1, "yes").await;
        assert_eq!(seen(&engine).await, [
            "0:sub 1 [\"call\"]",
            "0:sub/call+deep 0 [\"ask\"]",
            "1:sub 1 [\"call\"]",
            "1:sub/call+deep 1 [\"again\"]",
        ]);
        let deep = inside(&engine, &["0:sub", "call+deep"]).await.expect("is under way");
        assert_eq!((deep.topic.as_str(), deep.lines.len()), ("0:sub", 0));
        assert_eq!(inside(&engine, &["1:sub", "call+deep"]).await.expect("is under way").lines, ["yes"]);
        // One that shares the state around it has what it has changed, on top of that.
        let middle: Option<Notes> = engine.state_inside("t", &["1:sub"]).await.expect("reads");
        assert_eq!(middle.expect("is under way").log, ["begin", "first"]);
    }
}

promise! {
    async fn what_an_accumulating_subgraph_kept_can_be_looked_at_at_every_checkpoint(lab) {
        let talk = || inner("talk")
            .node("hear", |_, ctx: Context| async move {
                let word: String = ctx.interrupt("word", &()).await?;
                Ok(line(word).total(1))
            })
            .node("say", |s: Arc<Inner>, ctx: Context| async move {
                if s.lines.len() == 5 {
                    return Err(NodeError::msg("speechless"));
                }
                Ok(line(format!("{} in {}", s.total, ctx.namespace().join("/"))))
            })
            .edge(START, "hear").edge("hear", "say").edge("say", END)
            .compile().expect("compiles");
        let graph = || notes("g")
            .subgraph_with("sub", SubgraphMemory::Accumulating, &talk(), nothing, |s: &Inner| log(s.lines.join(", ")))
            .edge(START, "sub").edge("sub", END);
        let engine = lab.notes(graph()).await;
        start_and_run(&engine).await;
        // It is under way, and has kept nothing yet.
        assert_eq!(seen(&engine).await, ["sub 0 [\"hear\"]"]);
        assert_eq!(inside(&engine, &["sub"]).await, Some(Inner::default()));
        for (key, word) in [("1", "a"), ("2", "b")] {
            answer(&engine, 0, word).await;
            assert_eq!(seen(&engine).await, ["sub 0 [] keeps"]);
            engine.input("t", key, &(), Busy::Reject).await.expect("is taken");
            run(&engine).await;
        }
        // Another process sees the third round: what was kept, and what this one has done on top.
        let engine = lab.notes(graph()).await;
        assert_eq!(seen(&engine).await, ["sub 0 [\"hear\"] keeps"]);
        answer(&engine, 0, "c").await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Failed);
        assert_eq!(seen(&engine).await, ["sub 1 [\"say\"] keeps"]);
        let now = inside(&engine, &["sub"]).await.expect("is under way");
        assert_eq!(now.lines, ["a", "1 in sub", "b", "2 in sub", "c"]);
        let at = |checkpoint| {
            let engine = engine.clone();
            async move {
                let state: Option<Inner> = engine.state_inside_at("t", checkpoint, &["sub"]).await.expect("reads");
                state.map(|state| (state.lines.len(), state.total))
            }
        };
        // The input, a step, an input, a step, an input.
        let kept = [at(0).await, at(1).await, at(2).await, at(3).await, at(4).await];
        assert_eq!(kept, [None, Some((2, 1)), Some((2, 1)), Some((4, 2)), Some((4, 2))]);
        let unknown = engine.state_inside_at::<Inner>("t", 99, &["sub"]).await;
        assert!(unknown.is_err());
    }
}
