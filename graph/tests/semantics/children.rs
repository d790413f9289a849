//! Statement 13: threads that a thread started.

use std::{sync::Arc, time::Duration};

use graph::{
    Arrived, ChildEnd, ChildError, Context, END, Engine, NodeError, NodeOptions, Priority,
    RetryPolicy, START, StartOptions, ThreadFilter, ThreadStatus, WaitFor,
};
use serde_json::json;

use crate::lab::{
    Count, Lab, Notes, NotesUpdate, log, notes, promise, run, start, state, thread, thread_as,
};

fn child(arrived: Arrived) -> ChildEnd {
    match arrived {
        Arrived::Child(end) => end,
        other => panic!("not a child: {other:?}"),
    }
}

/// A parent `g` that starts three children, waits for each as it comes, and logs how it ended.
async fn family(lab: &Lab) -> Engine {
    let parent = notes("g")
        .node("spawn", |_, ctx: Context| async move {
            for name in ["one", "two", "three"] {
                let id = ctx.spawn(name, "child", &log(name))?;
                assert_eq!(id.as_str(), format!("t/{name}"));
            }
            Ok(log("spawned"))
        })
        .node("gather", |_, ctx: Context| async move {
            let mut left = vec!["one", "two", "three"];
            let mut lines = Vec::new();
            while !left.is_empty() {
                let end = child(
                    ctx.wait_any("child", &WaitFor::new().children(left.clone()))
                        .await?,
                );
                assert_eq!(end.thread.as_str(), format!("t/{}", end.name));
                left.retain(|name| *name != end.name);
                lines.push(format!(
                    "{} {:?} {} {}",
                    end.name,
                    end.status,
                    end.output,
                    end.error.unwrap_or_default()
                ));
            }
            lines.sort();
            Ok(NotesUpdate::default().log(lines))
        })
        .edge(START, "spawn")
        .edge("spawn", "gather")
        .edge("gather", END)
        .compile()
        .expect("compiles");
    let child = notes("child")
        .node("work", |s: Arc<Notes>, ctx: Context| async move {
            match s.log[0].as_str() {
                "two" => Err(NodeError::msg("two cannot")),
                "three" => {
                    ctx.interrupt::<()>("wait", "?").await?;
                    Ok(NotesUpdate::default())
                }
                _ => Ok(NotesUpdate::default()),
            }
        })
        .edge(START, "work")
        .edge("work", END)
        .output(|s: &Notes| json!(s.log[0]))
        .compile()
        .expect("compiles");
    Engine::builder(lab.store.clone())
        .graph(parent)
        .graph(child)
        .build()
        .await
        .expect("builds")
}

promise! {
    async fn the_end_of_a_child_is_a_signal_to_its_parent(lab) {
        let engine = family(&lab).await;
        start(&engine).await;
        run(&engine).await;
        let three = thread_as(&engine, "t/three").await;
        assert_eq!(three.parent.as_ref().map(|parent| parent.thread.as_str()), Some("t"));
        engine.answer("t/three", &three.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(
            state(&engine).await.log,
            ["spawned", "one Done \"one\" ", "three Done \"three\" ", "two Failed null node `work`: two cannot"]
        );
        let children = engine.threads(&ThreadFilter { parent: Some("t".into()), ..ThreadFilter::default() }).await.expect("reads");
        assert_eq!(children.len(), 3);
    }
}

promise! {
    async fn a_child_is_started_once_however_often_its_parent_runs(lab) {
        let parent = notes("g")
            .node("a", |_, ctx: Context| async move {
                ctx.spawn("kid", "child", &log("first"))?;
                ctx.interrupt::<()>("q", "?").await?;
                // The same name again starts nothing.
                ctx.spawn("kid", "child", &log("second"))?;
                let end = child(ctx.wait_any("kid", &WaitFor::new().child("kid")).await?);
                Ok(log(end.output.to_string()))
            })
            .edge(START, "a").edge("a", END).compile().expect("compiles");
        let kid = notes("child")
            .node("work", |_, _| async { Ok(NotesUpdate::default()) })
            .edge(START, "work").edge("work", END)
            .output(|s: &Notes| json!(s.log))
            .compile().expect("compiles");
        let engine = Engine::builder(lab.store.clone()).graph(parent).graph(kid).build().await.expect("builds");
        engine.start("t", "g", &(), StartOptions::default().priority(Priority::High)).await.expect("starts");
        run(&engine).await;
        assert_eq!(thread_as(&engine, "t/kid").await.status, ThreadStatus::Done);
        assert_eq!(thread_as(&engine, "t/kid").await.priority, Priority::High);
        let waiting = thread(&engine).await;
        engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["[\"first\"]"]);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn a_failing_node_starts_no_child_and_says_nothing(lab) {
        let parent = notes("g")
            .node("a", |_, ctx: Context| async move {
                ctx.spawn("kid", "child", &())?;
                ctx.emit("s", "said", &())?;
                Err::<(), _>(NodeError::msg("no"))
            })
            .edge(START, "a").edge("a", END).compile().expect("compiles");
        let kid = notes("child").node("work", |_, _| async { Ok(()) })
            .edge(START, "work").edge("work", END).compile().expect("compiles");
        let engine = Engine::builder(lab.store.clone()).graph(parent).graph(kid).build().await.expect("builds");
        start(&engine).await;
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Failed);
        assert!(engine.thread("t/kid").await.expect("reads").is_none());
        assert!(crate::lab::said(&engine, "s").await.is_empty());
    }
}

promise! {
    async fn a_child_of_an_unknown_graph_or_with_a_wrong_input_fails_the_node(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |s: Arc<Notes>, ctx: Context| async move {
                    match s.last.as_str() {
                        "graph" => ctx.spawn("kid", "ghost", &())?,
                        "name" => ctx.spawn("a/b", "g", &())?,
                        _ => ctx.spawn("kid", "g", &json!({"sum": "x"}))?,
                    };
                    Ok(())
                })
                .edge(START, "a").edge("a", END),
        ).await;
        for (case, expected) in [
            ("graph", "no graph `ghost`"),
            ("name", "contains a slash"),
            ("input", "channel `sum`: the value does not fit its type"),
        ] {
            engine.start(case, "g", &NotesUpdate::default().last(case.into()), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            let error = thread_as(&engine, case).await.error.expect("failed");
            assert!(error.contains(expected), "{error}");
        }
    }
}

promise! {
    async fn threads_send_each_other_signals_with_their_commits(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |s: Arc<Notes>, ctx: Context| async move {
                    if s.last == "sender" {
                        ctx.signal(&"receiver".into(), "hello", "1", "from sender")?;
                        ctx.signal(&"receiver".into(), "hello", "1", "again")?;
                        ctx.signal(&"nobody".into(), "hello", "1", "is lost")?;
                        return Ok(NotesUpdate::default());
                    }
                    let wait = WaitFor::new().signal("hello");
                    let Arrived::Signal(came) = ctx.wait_any("hello", &wait).await? else {
                        return Err(NodeError::msg("not a signal"));
                    };
                    Ok(log(came.payload::<String>()?))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        engine.start("receiver", "g", &(), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        engine.start("sender", "g", &NotesUpdate::default().last("sender".into()), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        assert_eq!(thread_as(&engine, "sender").await.status, ThreadStatus::Done);
        let received: Notes = engine.state("receiver").await.expect("reads");
        assert_eq!(received.log, ["from sender"]);
    }
}

promise! {
    async fn a_parent_cancels_a_child_and_hears_of_its_end(lab) {
        let parent = notes("g")
            .node("a", |_, ctx: Context| async move {
                ctx.spawn("kid", "child", &())?;
                ctx.interrupt::<()>("q", "?").await?;
                ctx.cancel_child("kid")?;
                Ok(())
            })
            .node("b", |_, ctx: Context| async move {
                let end = child(ctx.wait_any("kid", &WaitFor::new().child("kid")).await?);
                Ok(log(format!("{:?} {}", end.status, end.error.unwrap_or_default())))
            })
            .edge(START, "a").edge("a", "b").edge("b", END).compile().expect("compiles");
        let kid = notes("child")
            .node("work", |_, ctx: Context| async move { ctx.interrupt::<()>("q", "?").await })
            .edge(START, "work").edge("work", END).compile().expect("compiles");
        let engine = Engine::builder(lab.store.clone()).graph(parent).graph(kid).build().await.expect("builds");
        start(&engine).await;
        run(&engine).await;
        let waiting = thread(&engine).await;
        engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["Cancelled cancelled by its parent `t`"]);
        assert_eq!(thread_as(&engine, "t/kid").await.status, ThreadStatus::Cancelled);
    }
}

promise! {
    async fn what_a_child_returned_that_its_parent_cannot_read_is_a_failure_for_good_that_says_what_to_do(lab) {
        let runs = Count::default();
        let engine = async |reads: fn(&ChildEnd) -> Result<String, NodeError>| {
            let counted = runs.clone();
            let retried = NodeOptions::default()
                .retry(RetryPolicy::default().first_interval(Duration::from_millis(1)));
            let parent = notes("g")
                .node("spawn", |_, ctx: Context| async move {
                    ctx.spawn("kid", "child", &log("kid"))?;
                    ctx.spawn("sick", "child", &log("sick"))?;
                    Ok(())
                })
                .node_with("read", retried, move |_, ctx: Context| {
                    counted.up();
                    async move {
                        let sick = child(ctx.wait_any("sick", &WaitFor::new().child("sick")).await?);
                        let error = sick.output_as::<u32>().expect_err("has returned nothing");
                        let Some(ChildError::NotDone { child: id, status, error: why }) = error.downcast_ref() else {
                            return Err(error);
                        };
                        assert_eq!((id.as_str(), *status), ("t/sick", ThreadStatus::Failed));
                        assert!(why.as_ref().is_some_and(|why| why.contains("cannot")), "{why:?}");
                        let end = child(ctx.wait_any("kid", &WaitFor::new().child("kid")).await?);
                        Ok(log(reads(&end)?))
                    }
                })
                .edge(START, "spawn").edge("spawn", "read").edge("read", END)
                .compile().expect("compiles");
            let kid = notes("child")
                .node("work", |s: Arc<Notes>, _| async move {
                    if s.log == ["sick"] { Err(NodeError::msg("cannot")) } else { Ok(()) }
                })
                .edge(START, "work").edge("work", END)
                .output(|_: &Notes| json!({"lines": 3}))
                .compile().expect("compiles");
            Engine::builder(lab.store.clone()).graph(parent).graph(kid).build().await.expect("builds")
        };
        let old = engine(|end| Ok(end.output_as::<Vec<u32>>()?.len().to_string())).await;
        start(&old).await;
        run(&old).await;
        let failed = thread(&old).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        let why = failed.error.expect("says why");
        for part in ["node `read`", "child `t/kid`", "Engine::retry", "expected a sequence"] {
            assert!(why.contains(part), "{part} in: {why}");
        }
        let tried = runs.get();
        run(&old).await;
        assert_eq!(runs.get(), tried, "for good");
        // A program that reads what is there goes on with the end that came.
        let new = engine(|end| {
            let lines = end.output_as::<std::collections::BTreeMap<String, u32>>()?;
            Ok(lines["lines"].to_string())
        }).await;
        new.retry("t").await.expect("has failed");
        run(&new).await;
        assert_eq!(state(&new).await.log, ["3"]);
    }
}
