//! Nodes that take over after a failure (22).

use std::{future::Future, sync::Arc, time::Duration};

use graph::{
    Command, Context, END, Engine, Goto, GraphBuilder, NodeError, NodeOptions, RetryPolicy, START,
    Send, ServeOptions, ThreadStatus,
};

use crate::lab::{
    Count, Notes, NotesUpdate, eventually, log, notes, options, promise, run, said, serve, start,
    start_and_run, state, thread, until_cancelled, until_status,
};

fn quick(attempts: u32) -> RetryPolicy {
    RetryPolicy::default()
        .attempts(attempts)
        .first_interval(Duration::from_millis(1))
}

/// A node that fails, and counts how often.
fn fails(count: &Count) -> impl Future<Output = Result<NotesUpdate, NodeError>> + use<> {
    std::future::ready(Err(NodeError::msg(format!("failure {}", count.up()))))
}

/// A graph `g`: `a` always fails, `mend` takes over.
fn failing(count: &Count) -> GraphBuilder<Notes> {
    let count = count.clone();
    notes("g")
        .node("a", move |_, _| fails(&count))
        .edge(START, "a")
        .edge("a", END)
        .on_error(["a"], "mend")
        .edge("mend", END)
}

promise! {
    async fn a_handler_takes_over_after_the_last_attempt(lab) {
        let count = Count::default();
        let counted = count.clone();
        let engine = lab.notes(
            notes("g")
                .node("first", |_, _| async { Ok(NotesUpdate::default().last("seen".to_owned())) })
                .node_with("a", NodeOptions::default().retry(quick(3)), move |_, ctx: Context| {
                    let count = counted.clone();
                    async move {
                        assert!(ctx.failure().is_none());
                        ctx.emit("s", "never said", &())?;
                        fails(&count).await
                    }
                })
                .node("next", |_, _| async { Ok(log("next")) })
                .node("mend", |notes: Arc<Notes>, ctx: Context| async move {
                    let failure = ctx.failure().ok_or_else(|| NodeError::msg("no failure"))?;
                    ctx.emit("s", "mended", &ctx.attempt())?;
                    let line = format!("{} {} {} {}", failure.node, failure.error, failure.attempts, notes.last);
                    Ok(Command::goto("other").update(log(line)))
                })
                .node("other", |_, _| async { Ok(log("other")) })
                .edge(START, "first")
                .edge("first", "a")
                .edge("a", "next")
                .edge("next", END)
                .on_error(["a"], "mend")
                .goes("mend", ["other"])
                .edge("other", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        // What follows is the handler's way, not the failed node's.
        assert_eq!(state(&engine).await.log, ["a failure 3 3 seen", "other"]);
        assert_eq!(count.get(), 3);
        assert_eq!(said(&engine, "s").await, ["mended 1"]);
    }
}

promise! {
    async fn siblings_of_a_failed_task_keep_their_writes(lab) {
        let (count, beside) = (Count::default(), Count::default());
        let counted = beside.clone();
        let engine = lab.notes(
            failing(&count)
                .node("b", move |_, _| {
                    counted.up();
                    async { Ok(log("b")) }
                })
                .node("mend", |_, ctx: Context| async move {
                    let answer: String = ctx.interrupt("how", "Now what?").await?;
                    Ok(log(format!("mended with {answer}")))
                })
                .edge(START, "b")
                .edge("b", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.status, ThreadStatus::Waiting);
        engine.answer("t", &waiting.waits[0].id, "care").await.expect("answers");
        run(&engine).await;
        // The handler's writes stand where the failed task's would have stood.
        assert_eq!(state(&engine).await.log, ["mended with care", "b"]);
        assert_eq!((count.get(), beside.get()), (1, 1));
    }
}

promise! {
    async fn every_kind_of_failure_is_handled(lab) {
        let engine = lab.notes(
            notes("g")
                .node_with("work", NodeOptions::default().timeout(Duration::from_millis(50)), |_, ctx: Context| async move {
                    match ctx.argument::<u32>()? {
                        0 => Err(NodeError::msg("plain")),
                        1 => Err(NodeError::msg("fatal").fatal()),
                        2 => panic!("it broke"),
                        3 => { std::future::pending::<()>().await; Ok(()) }
                        _ => Ok(()),
                    }
                })
                .node("mend", |_, ctx: Context| async move {
                    // The task's argument is the handler's now.
                    let argument: u32 = ctx.argument()?;
                    Ok(log(format!("{argument}: {}", ctx.failure().map_or("", |failure| &failure.error))))
                })
                .conditional(START, ["work"], |_| Goto::sends((0..5).map(|n| Send::new("work", &n))))
                .edge("work", END)
                .on_error(["work"], "mend")
                .edge("mend", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, [
            "0: plain", "1: fatal", "2: node `work` panicked: it broke", "3: node `work` took longer than 50ms",
        ]);
    }
}

promise! {
    async fn a_retry_of_the_handler_runs_only_the_handler(lab) {
        let (count, tries) = (Count::default(), Count::default());
        let counted = tries.clone();
        let engine = lab.notes(
            failing(&count).node_with("mend", NodeOptions::default().retry(quick(2)), move |_, ctx: Context| {
                let tries = counted.clone();
                async move {
                    let paid: usize = ctx.step("pay", |_| {
                        let tries = tries.clone();
                        async move { Ok::<_, NodeError>(tries.get()) }
                    }).await?;
                    match tries.up() {
                        4 => Ok(log(format!("mended {} {paid}", ctx.attempt()))),
                        other => Err(NodeError::msg(format!("no {other}"))),
                    }
                }
            }),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert_eq!(
            failed.error.as_deref(),
            Some("node `a`: failure 1; its error handler failed too: node `mend`: no 2"),
        );
        // By hand, there are two attempts again; the durable step keeps its value.
        engine.retry("t").await.expect("is retried");
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["mended 4 0"]);
        assert_eq!(count.get(), 1);
    }
}

promise! {
    async fn after_a_crash_only_the_handler_runs_again(lab) {
        let (count, begun) = (Count::default(), Count::default());
        let graph = |hangs: bool| {
            let begun = begun.clone();
            failing(&count).node("mend", move |_, ctx: Context| {
                let begun = begun.clone();
                async move {
                    begun.up();
                    if hangs {
                        std::future::pending::<()>().await;
                    }
                    let failure = ctx.failure().ok_or_else(|| NodeError::msg("no failure"))?;
                    Ok(log(format!("{} {}", failure.error, failure.attempts)))
                }
            })
        };
        let brief = || ServeOptions {
            lease: Duration::from_millis(100),
            poll: Duration::from_millis(10),
            ..options()
        };
        let first = lab.notes(graph(true)).await;
        start(&first).await;
        let killed = serve(&first, brief());
        eventually("the handler runs", || async { begun.get() == 1 }).await;
        drop(killed);
        let second = lab.notes(graph(false)).await;
        let server = serve(&second, brief());
        until_status(&second, "t", ThreadStatus::Done).await;
        server.drain().await;
        assert_eq!(state(&second).await.log, ["failure 1 1"]);
        assert_eq!((count.get(), begun.get()), (1, 2));
    }
}

promise! {
    async fn a_handler_waits_for_its_next_attempt_without_a_lease(lab) {
        let (count, tries) = (Count::default(), Count::default());
        let counted = tries.clone();
        let retry = RetryPolicy::default().first_interval(Duration::from_hours(1));
        let engine = lab.notes(
            failing(&count).node_with("mend", NodeOptions::default().retry(retry), move |_, _| fails(&counted)),
        ).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.status, ThreadStatus::Waiting);
        assert_eq!(waiting.waits[0].task, "a~mend");
        run(&engine).await;
        assert_eq!((count.get(), tries.get()), (1, 1));
    }
}

promise! {
    async fn a_handler_may_also_be_a_node_like_others(lab) {
        let engine = lab.notes(
            notes("g")
                .node("mend", |_, ctx: Context| async move {
                    let line = ctx.failure().map_or("as planned".to_owned(), |failure| failure.error.clone());
                    Ok(log(line))
                })
                .node("a", |notes: Arc<Notes>, _| async move {
                    if notes.log.len() < 2 { Err(NodeError::msg("boom")) } else { Ok(log("a")) }
                })
                .edge(START, "mend")
                .edge("mend", "a")
                .on_error(["a"], "mend")
                .edge("a", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["as planned", "boom", "a"]);
    }
}

promise! {
    async fn a_handler_has_no_handler_when_it_takes_over(lab) {
        let engine = lab.notes(
            failing(&Count::default())
                .node("mend", |_, _| async { Err::<(), _>(NodeError::msg("bang")) })
                .node("last", |_, _| async { Ok(log("never")) })
                .on_error(["mend"], "last")
                .edge("last", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(
            failed.error.as_deref(),
            Some("node `a`: failure 1; its error handler failed too: node `mend`: bang"),
        );
    }
}

promise! {
    async fn a_cancelled_task_is_no_failed_one(lab) {
        let begun = Count::default();
        let counted = begun.clone();
        let engine: Engine = lab.notes(
            notes("g")
                .node("a", move |_, ctx: Context| {
                    counted.up();
                    async move {
                        until_cancelled(&ctx).await;
                        Err::<(), _>(NodeError::msg("because of that"))
                    }
                })
                .node("mend", |_, _| async { Ok(log("never")) })
                .edge(START, "a")
                .edge("a", END)
                .on_error(["a"], "mend")
                .edge("mend", END),
        ).await;
        start(&engine).await;
        let server = serve(&engine, options());
        eventually("it runs", || async { begun.get() == 1 }).await;
        engine.cancel("t", "enough").await.expect("cancels");
        until_status(&engine, "t", ThreadStatus::Cancelled).await;
        server.drain().await;
        assert!(state(&engine).await.log.is_empty());
    }
}
