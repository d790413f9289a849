//! Statement 16: stopping before and after named nodes, beside sends, joins, forks, inputs and error handlers.

use std::sync::Arc;

use graph::{
    Busy, Context, END, Engine, EngineError, Goto, GraphBuilder, NodeError, NodeOptions, START,
    Send, ThreadStatus,
};

use crate::lab::{Notes, log, notes, promise, run, says, start_and_run, state, thread};

/// The name of the one stop that is open.
async fn stop(engine: &Engine) -> String {
    let waits = thread(engine).await.waits;
    assert_eq!(waits.len(), 1, "{waits:?}");
    waits[0].name.clone()
}

/// Lets the thread go on from all its stops.
async fn go_on(engine: &Engine) {
    for wait in thread(engine).await.waits {
        engine.answer("t", &wait.id, &()).await.expect("is taken");
    }
    run(engine).await;
}

promise! {
    async fn a_thread_stops_once_before_and_after_all_tasks_that_sends_start(lab) {
        let engine = lab.notes(
            notes("g")
                .node("split", |_, _| says("split"))
                .node("work", |_, ctx: Context| async move {
                    let n: u32 = ctx.argument()?;
                    Ok(log(format!("work {n}")))
                })
                .node("after", |_, _| says("after"))
                .edge(START, "split")
                .conditional("split", ["work"], |_: &Notes| {
                    Goto::sends((1..=3).map(|n| Send::new("work", &n)))
                })
                .edge("work", "after").edge("after", END)
                .interrupt_before(["work"]).interrupt_after(["work"]),
        ).await;
        let stopped = start_and_run(&engine).await;
        assert_eq!(stop(&engine).await, "before:work");
        assert_eq!(stopped.waits[0].value["next"], serde_json::json!(["work", "work", "work"]));
        go_on(&engine).await;
        assert_eq!(stop(&engine).await, "after:work");
        assert_eq!(state(&engine).await.log, ["split", "work 1", "work 2", "work 3"]);
        go_on(&engine).await;
        assert_eq!(state(&engine).await.log.len(), 5);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn a_thread_stops_before_the_target_of_a_join_when_that_is_next_and_in_every_round(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a")).node("b", |_, _| says("b")).node("c", |_, _| says("c"))
                .node("both", |_, _| says("both"))
                .edge(START, "a").edge(START, "b").edge("b", "c")
                .join(["a", "c"], "both")
                .conditional("both", ["a", "b", END], |s: &Notes| {
                    if s.log.len() < 8 { Goto::nodes(["a", "b"]) } else { Goto::from(END) }
                })
                .interrupt_before(["both"]).interrupt_after(["a"]),
        ).await;
        start_and_run(&engine).await;
        let mut stops = Vec::new();
        while thread(&engine).await.status == ThreadStatus::Waiting {
            stops.push((stop(&engine).await, state(&engine).await.log.len()));
            go_on(&engine).await;
        }
        let expected = [("after:a", 2), ("before:both", 3), ("after:a", 6), ("before:both", 7)];
        assert_eq!(stops, expected.map(|(name, lines)| (name.to_owned(), lines)));
        assert_eq!(state(&engine).await.log, ["a", "b", "c", "both", "a", "b", "c", "both"]);
    }
}

/// a → b, stopping before `b` and after it.
fn line() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, _| says("a"))
        .node("b", |_, _| says("b"))
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", END)
        .interrupt_before(["b"])
        .interrupt_after(["b"])
}

promise! {
    async fn a_thread_stops_after_its_last_node_too(lab) {
        let engine = lab.notes(line()).await;
        start_and_run(&engine).await;
        go_on(&engine).await;
        assert_eq!(stop(&engine).await, "after:b");
        assert_eq!(thread(&engine).await.status, ThreadStatus::Waiting);
        go_on(&engine).await;
        let ended = thread(&engine).await;
        assert_eq!((ended.status, ended.checkpoint), (ThreadStatus::Done, 2));
        // The next round stops in the same places.
        engine.input("t", "1", &log("again"), Busy::Reject).await.expect("begins again");
        run(&engine).await;
        for expected in ["before:b", "after:b"] {
            assert_eq!(stop(&engine).await, expected);
            go_on(&engine).await;
        }
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["a", "b", "again", "a", "b"]);
    }
}

promise! {
    async fn a_thread_that_stopped_after_its_last_node_makes_way_and_can_be_cancelled(lab) {
        let engine = lab.notes(line()).await;
        start_and_run(&engine).await;
        go_on(&engine).await;
        let old = thread(&engine).await.waits[0].id.clone();
        engine.input("t", "1", &log("instead"), Busy::Interrupt).await.expect("is taken");
        run(&engine).await;
        assert_eq!(stop(&engine).await, "before:b");
        let error = engine.answer("t", &old, &()).await.expect_err("is gone");
        assert!(matches!(error, EngineError::UnknownInterrupt { .. }), "{error}");
        go_on(&engine).await;
        assert_eq!(stop(&engine).await, "after:b");
        engine.cancel("t", "enough").await.expect("is there");
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Cancelled);
        engine.retry("t").await.expect("was cancelled");
        run(&engine).await;
        assert_eq!(stop(&engine).await, "after:b");
        go_on(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["a", "b", "instead", "a", "b"]);
    }
}

promise! {
    async fn a_fork_stops_where_its_plan_says_under_ids_of_its_own(lab) {
        let engine = lab.notes(line()).await;
        let old = start_and_run(&engine).await.waits[0].id.clone();
        let branch = engine.fork("t", 1, "a", &log("as a")).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(stop(&engine).await, "before:b");
        let error = engine.answer("t", &old, &()).await.expect_err("is of another branch");
        assert!(matches!(error, EngineError::OtherBranch { .. }), "{error}");
        go_on(&engine).await;
        go_on(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "as a", "b"]);
        // As if `b` had run: the stop before it is behind, that after it is not.
        let branch = engine.fork("t", 1, "b", &log("as b")).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(stop(&engine).await, "after:b");
        go_on(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["a", "as b"]);
    }
}

promise! {
    async fn an_error_handler_takes_over_without_a_stop_before_it_and_with_one_after_it(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_: Arc<Notes>, _| async { Err::<(), _>(NodeError::msg("broken")) })
                .node("mend", |_, _| says("mend")).node("next", |_, _| says("next"))
                .edge(START, "a").edge("a", "next").edge("next", END)
                .on_error(["a"], "mend").edge("mend", "next")
                // The handler works in the step of the failed node, which was not planned to stop; `a` never gets done.
                .interrupt_before(["mend"]).interrupt_after(["a", "mend"]),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(stop(&engine).await, "after:mend");
        assert_eq!(state(&engine).await.log, ["mend"]);
        go_on(&engine).await;
        assert_eq!(state(&engine).await.log, ["mend", "next"]);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn a_thread_stops_before_a_deferred_node_when_its_turn_has_come(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a")).node("b", |_, _| says("b")).node("c", |_, _| says("c"))
                .node_with("last", NodeOptions::default().deferred(), |_, _| says("last"))
                .edge(START, "a").edge("a", "last").edge("a", "b").edge("b", "c").edge("c", END)
                .edge("last", END)
                .interrupt_before(["last"]),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(stop(&engine).await, "before:last");
        assert_eq!(state(&engine).await.log, ["a", "b", "c"]);
        go_on(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c", "last"]);
    }
}
