//! Statement 23: cancelling.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use graph::{
    Arrived, CancelOutcome, Context, END, Engine, EngineError, GraphBuilder, NodeError, START,
    ServeOptions, ThreadStatus, WaitFor,
};
use tokio::sync::Notify;

use crate::lab::{
    Count, Notes, NotesUpdate, SOON, log, notes, options, promise, run, said, says, serve, start,
    start_and_run, state, takes, thread, thread_as, until_cancelled, until_status,
};

/// Works until cancelled; then cleans up.
fn worker(started: Arc<Notify>) -> GraphBuilder<Notes> {
    notes("g")
        .node("work", move |_, ctx: Context| {
            let started = started.clone();
            async move {
                if ctx.attempt() == 1 && ctx.thread().as_str() == "t" {
                    started.notify_one();
                }
                until_cancelled(&ctx).await;
                Err::<(), _>(NodeError::msg("was interrupted"))
            }
        })
        .node("stopped", |s: Arc<Notes>, ctx: Context| async move {
            ctx.emit("s", "cleaned up", &s.log.len())?;
            Ok(log("stopped"))
        })
        .edge(START, "work")
        .edge("work", END)
        .on_cancel("stopped")
}

promise! {
    async fn cancelling_reaches_a_running_task_at_once(lab) {
        let started = Arc::new(Notify::new());
        let engine = lab.notes(worker(started.clone())).await;
        start(&engine).await;
        // Nothing is polled or renewed for minutes: only being told helps.
        let server = serve(&engine, ServeOptions {
            poll: Duration::from_mins(2),
            lease: Duration::from_mins(10),
            ..options()
        });
        started.notified().await;
        let before = Instant::now();
        assert_eq!(engine.cancel("t", "enough").await.expect("is taken"), CancelOutcome::Requested);
        until_status(&engine, "t", ThreadStatus::Cancelled).await;
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        assert_eq!(thread(&engine).await.error.as_deref(), Some("enough"));
        assert_eq!(state(&engine).await.log, ["stopped"]);
        assert_eq!(said(&engine, "s").await, ["cleaned up 0"]);
        assert_eq!(said(&engine, "t").await, ["thread.cancelled {\"reason\":\"enough\"}"]);
        assert_eq!(engine.cancel("t", "again").await.expect("is taken"), CancelOutcome::Ended);
        server.drain().await;
    }
}

promise! {
    async fn cancelling_reaches_a_task_in_another_process_within_a_second(lab) {
        let started = Arc::new(Notify::new());
        let runner = lab.notes(worker(started.clone())).await;
        let other = lab.notes(worker(Arc::default())).await;
        start(&runner).await;
        let server = serve(&runner, options());
        started.notified().await;
        let before = Instant::now();
        other.cancel("t", "enough").await.expect("is taken");
        until_status(&other, "t", ThreadStatus::Cancelled).await;
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        server.drain().await;
    }
}

promise! {
    async fn a_task_that_does_not_listen_is_stopped_after_its_grace(lab) {
        let started = Arc::new(Notify::new());
        let tell = started.clone();
        let engine = lab.notes(
            notes("g")
                .node("deaf", move |_, _| {
                    let tell = tell.clone();
                    async move {
                        tell.notify_one();
                        takes(60_000).await;
                        Ok(log("done"))
                    }
                })
                .edge(START, "deaf").edge("deaf", END),
        ).await;
        start(&engine).await;
        let server = serve(&engine, ServeOptions { cancel_grace: Duration::from_millis(50), ..options() });
        started.notified().await;
        engine.cancel("t", "enough").await.expect("is taken");
        until_status(&engine, "t", ThreadStatus::Cancelled).await;
        assert!(state(&engine).await.log.is_empty());
        server.drain().await;
    }
}

promise! {
    async fn cancelling_wakes_a_sleeping_thread(lab) {
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move { ctx.interrupt::<()>("q", "?").await })
                .node("stopped", |_, ctx: Context| async move {
                    assert!(!ctx.is_cancelled(), "cleaning up is not cancelled itself");
                    let n = ctx.step("clean", |_| async { Ok::<_, NodeError>(1) }).await?;
                    Ok(log(format!("stopped {n}")))
                })
                .edge(START, "ask").edge("ask", END).on_cancel("stopped"),
        ).await;
        start_and_run(&engine).await;
        engine.cancel("t", "enough").await.expect("is taken");
        run(&engine).await;
        let ended = thread(&engine).await;
        assert_eq!((ended.status, ended.waits.len()), (ThreadStatus::Cancelled, 0));
        assert_eq!(state(&engine).await.log, ["stopped 1"]);
    }
}

promise! {
    async fn a_cancelled_thread_can_be_resumed_with_what_it_remembers(lab) {
        let effects = Count::default();
        let effect = effects.clone();
        let engine = lab.notes(
            notes("g")
                .node("a", move |_, ctx: Context| {
                    let effect = effect.clone();
                    async move {
                        ctx.step("pay", |_| async { Ok::<_, NodeError>(effect.up()) }).await?;
                        ctx.emit("s", "asked", &())?;
                        ctx.interrupt::<()>("q", "?").await?;
                        Ok(log("answered"))
                    }
                })
                .node("b", |_, _| says("b"))
                .node("stopped", |_, _| says("stopped"))
                .edge(START, "a").edge(START, "b").edge("a", END).edge("b", END)
                .on_cancel("stopped"),
        ).await;
        let waiting = start_and_run(&engine).await;
        for _ in 0..2 {
            engine.cancel("t", "enough").await.expect("is taken");
            run(&engine).await;
            assert_eq!(thread(&engine).await.status, ThreadStatus::Cancelled);
            engine.retry("t").await.expect("retries");
            run(&engine).await;
        }
        let again = thread(&engine).await;
        assert_eq!(again.waits[0].id, waiting.waits[0].id, "it is the same question");
        engine.answer("t", &again.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["stopped", "stopped", "answered", "b"]);
        assert_eq!(effects.get(), 1);
        assert_eq!(said(&engine, "s").await.len(), 1);
    }
}

promise! {
    async fn children_are_cancelled_too_all_the_way_down(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |s: Arc<Notes>, ctx: Context| async move {
                    if s.sum > 0 {
                        ctx.spawn("kid", "g", &NotesUpdate::default().sum(s.sum - 1))?;
                    }
                    match ctx.wait_any("w", &WaitFor::new().child("kid").signal("never")).await? {
                        Arrived::Child(_) => Ok(()),
                        _ => Err(NodeError::msg("not a child")),
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        engine.start("t", "g", &NotesUpdate::default().sum(2), graph::StartOptions::default()).await.expect("starts");
        run(&engine).await;
        engine.cancel("t", "enough").await.expect("is taken");
        run(&engine).await;
        for id in ["t", "t/kid", "t/kid/kid"] {
            let ended = thread_as(&engine, id).await;
            assert_eq!((ended.status, ended.error.as_deref()), (ThreadStatus::Cancelled, Some("enough")), "{id}");
        }
    }
}

promise! {
    async fn cleaning_up_that_fails_or_waits_does_not_hold_up_the_end(lab) {
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move { ctx.interrupt::<()>("q", "?").await })
                .node("stopped", |s: Arc<Notes>, ctx: Context| async move {
                    if s.last == "wait" {
                        ctx.interrupt::<()>("r", "?").await?;
                    }
                    Err::<(), _>(NodeError::msg("no"))
                })
                .edge(START, "ask").edge("ask", END).on_cancel("stopped"),
        ).await;
        for case in ["wait", "fail"] {
            let input = NotesUpdate::default().last(case.into());
            engine.start(case, "g", &input, graph::StartOptions::default()).await.expect("starts");
            run(&engine).await;
            engine.cancel(case, "enough").await.expect("is taken");
            run(&engine).await;
            assert_eq!(thread_as(&engine, case).await.status, ThreadStatus::Cancelled);
        }
    }
}

promise! {
    async fn cancelling_an_unknown_thread_is_an_error(lab) {
        let engine: Engine = lab.notes(worker(Arc::default())).await;
        let error = engine.cancel("nobody", "x").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownThread(_)));
    }
}
