//! Statement 6, with others: deferred nodes beside sends, joins, cancellations and forks.

use std::sync::Arc;

use graph::{Context, END, Goto, GraphBuilder, NodeError, NodeOptions, START, Send, ThreadStatus};

use crate::lab::{Count, Notes, log, notes, promise, run, says, start_and_run, state, thread};

fn deferred() -> NodeOptions {
    NodeOptions::default().deferred()
}

promise! {
    async fn a_deferred_node_waits_for_all_that_sends_have_started(lab) {
        let engine = lab.notes(
            notes("g")
                .node("split", |_, _| says("split"))
                .node("work", |_, ctx: Context| async move {
                    let n: u32 = ctx.argument()?;
                    Ok(log(format!("work {n}")))
                })
                .node("after", |_, _| says("after"))
                .node_with("last", deferred(), |_, _| says("last"))
                .edge(START, "split").edge("split", "last")
                .conditional("split", ["work"], |_: &Notes| {
                    Goto::sends((1..=3).map(|n| Send::new("work", &n)))
                })
                .edge("work", "after").edge("after", END).edge("last", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["split", "work 1", "work 2", "work 3", "after", "last"]);
    }
}

promise! {
    async fn a_send_to_a_deferred_node_is_a_task_of_the_next_step(lab) {
        let engine = lab.notes(
            notes("g")
                .node("split", |_, _| says("split"))
                .node("a", |_, _| says("a")).node("b", |_, _| says("b"))
                .node_with("last", deferred(), |_, ctx: Context| async move {
                    Ok(log(ctx.argument::<String>().unwrap_or_else(|_| "last".to_owned())))
                })
                .edge(START, "split").edge("split", "a").edge("split", "last").edge("a", "b").edge("b", END)
                .conditional("split", ["last"], |_: &Notes| Goto::from(Send::new("last", "sent")))
                .edge("last", END),
        ).await;
        start_and_run(&engine).await;
        // Who sends it an argument does not want it to wait; its edge still does.
        assert_eq!(state(&engine).await.log, ["split", "a", "sent", "b", "last"]);
    }
}

promise! {
    async fn a_join_into_a_deferred_node_and_one_out_of_it_wait_for_all(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a")).node("b", |_, _| says("b"))
                .node("c", |_, _| says("c")).node("d", |_, _| says("d"))
                .node_with("both", deferred(), |_, _| says("both"))
                .node("end", |_, _| says("end"))
                .edge(START, "a").edge(START, "b").edge(START, "c")
                .join(["a", "b"], "both")
                .edge("c", "d")
                // Half full when nothing else is left: the deferred node fills it.
                .join(["d", "both"], "end")
                .edge("end", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c", "d", "both", "end"]);
    }
}

/// `last` is deferred; `b` asks before it goes on.
fn asks() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, _| says("a"))
        .node("b", |_, ctx: Context| async move {
            ctx.interrupt::<()>("q", "?").await?;
            Ok(log("b"))
        })
        .node("c", |_, _| says("c"))
        .node_with("last", deferred(), |_, _| says("last"))
        .edge(START, "a")
        .edge("a", "last")
        .edge("a", "b")
        .edge("b", "c")
        .edge("c", END)
        .edge("last", END)
}

promise! {
    async fn a_deferred_node_does_not_run_when_a_thread_is_cancelled_but_when_it_is_resumed(lab) {
        let engine = lab.notes(asks()).await;
        start_and_run(&engine).await;
        engine.cancel("t", "enough").await.expect("is there");
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Cancelled);
        assert_eq!(state(&engine).await.log, ["a"]);
        engine.retry("t").await.expect("was cancelled");
        run(&engine).await;
        engine.answer("t", &thread(&engine).await.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c", "last"]);
    }
}

promise! {
    async fn a_fork_remembers_what_is_deferred(lab) {
        let engine = lab.notes(asks()).await;
        start_and_run(&engine).await;
        // As if `b` had run: `c` is next, and `last` still waits for it.
        let branch = engine.fork("t", 1, "b", &log("as b")).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "as b", "c", "last"]);
        // As if `c` had run, which nobody has asked to: what was planned is still there, and comes before `last`.
        let branch = engine.fork("t", 1, "c", &log("as c")).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "as c"]);
        engine.answer("t", &thread(&engine).await.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "as c", "b", "c", "last"]);
        // As if the deferred node had run: it does not run again.
        let branch = engine.fork("t", 1, "last", &log("as last")).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        engine.answer("t", &thread(&engine).await.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "as last", "b", "c"]);
    }
}

promise! {
    async fn a_deferred_node_waits_for_the_handler_of_a_failed_one_and_what_follows_it(lab) {
        let count = Count::default();
        let counted = count.clone();
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a"))
                .node("b", |_: Arc<Notes>, _| async { Err::<(), _>(NodeError::msg("broken")) })
                .node("mend", |_, _| says("mend")).node("after", |_, _| says("after"))
                .node_with("last", deferred(), move |_, _| { counted.up(); says("last") })
                .edge(START, "a").edge("a", "last").edge("a", "b").edge("b", END)
                .on_error(["b"], "mend").edge("mend", "after").edge("after", END).edge("last", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "mend", "after", "last"]);
        assert_eq!(count.get(), 1);
    }
}
