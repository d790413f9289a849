//! Statements 36 and 37: what is only interesting while it happens.

use std::sync::Arc;

use futures::StreamExt;
use graph::{Context, END, Modes, NodeError, START, StreamItem, StreamKind, ThreadStatus};
use serde_json::{Value, json};

use crate::lab::{Count, Notes, log, notes, promise, run, start, start_and_run, thread};

fn short(item: &StreamItem) -> String {
    match &item.kind {
        StreamKind::Values(values) => format!("{} values {}", item.step, values["log"]),
        StreamKind::Updates {
            node,
            update,
            cached,
        } => {
            let cached = if *cached { " cached" } else { "" };
            format!("{} {node} {update}{cached}", item.step)
        }
        StreamKind::Custom { node, payload } => format!("{} {node}: {payload}", item.step),
        StreamKind::Ended(status) => format!("{status:?}"),
        StreamKind::Missed(count) => format!("missed {count}"),
        other => format!("{other:?}"),
    }
}

fn graph() -> graph::GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, ctx: Context| async move {
            ctx.custom(&json!("half way"))?;
            Ok(log("a"))
        })
        .node("b", |_, _| async { Ok(log("b")) })
        .node("c", |_, _| async { Ok(()) })
        .edge(START, "a")
        .edge(START, "b")
        .join(["a", "b"], "c")
        .edge("c", END)
}

promise! {
    async fn values_updates_and_custom_items_come_in_order(lab) {
        let engine = lab.notes(graph()).await;
        let all = engine.follow("t", Modes::ALL);
        let some = engine.follow("t", Modes::VALUES | Modes::CUSTOM);
        start_and_run(&engine).await;
        let lines: Vec<String> = all.map(|item| short(&item)).collect().await;
        assert_eq!(lines, [
            "1 a: \"half way\"",
            "1 a {\"log\":[\"a\"]}",
            "1 b {\"log\":[\"b\"]}",
            "1 values [\"a\",\"b\"]",
            "2 c null",
            "2 values [\"a\",\"b\"]",
            "Done",
        ]);
        let lines: Vec<String> = some.map(|item| short(&item)).collect().await;
        assert_eq!(lines, ["1 a: \"half way\"", "1 values [\"a\",\"b\"]", "2 values [\"a\",\"b\"]", "Done"]);
        assert!(crate::lab::said(&engine, "g").await.is_empty(), "none of it is in the journal");
    }
}

promise! {
    async fn what_succeeded_before_a_retry_is_streamed_as_cached(lab) {
        let tries = Count::default();
        let counted = tries.clone();
        let engine = lab.notes(
            notes("g")
                .node("good", |_, _| async { Ok(log("good")) })
                .node("bad", move |_, _| {
                    let n = counted.up();
                    async move { if n == 1 { Err(NodeError::msg("no")) } else { Ok(log("bad")) } }
                })
                .edge(START, "good").edge(START, "bad").edge("good", END).edge("bad", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Failed);
        let updates = engine.follow("t", Modes::UPDATES);
        engine.retry("t").await.expect("retries");
        run(&engine).await;
        let lines: Vec<String> = updates.map(|item| short(&item)).collect().await;
        assert_eq!(lines, ["1 bad {\"log\":[\"bad\"]}", "1 good {\"log\":[\"good\"]} cached", "Done"]);
    }
}

promise! {
    async fn a_slow_reader_is_told_what_it_missed(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    for n in 0..3000 {
                        ctx.custom(&n)?;
                    }
                    Ok(log("a"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let items = engine.follow("t", Modes::CUSTOM);
        start(&engine).await;
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        let items: Vec<StreamItem> = items.collect().await;
        let StreamKind::Missed(missed) = items[0].kind else { panic!("not told: {:?}", items[0]) };
        let first = match &items[1].kind {
            StreamKind::Custom { payload: Value::Number(n), .. } => n.as_u64().expect("a number"),
            other => panic!("{other:?}"),
        };
        assert_eq!(missed, first, "as many as it says");
        assert!(matches!(items.last().map(|item| &item.kind), Some(StreamKind::Ended(ThreadStatus::Done))));
    }
}

promise! {
    async fn the_state_is_shared_with_nodes_and_not_cloned(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |s: Arc<Notes>, _| async move { Ok(log(format!("{}", Arc::strong_count(&s) > 1))) })
                .edge(START, "a").edge("a", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(crate::lab::state(&engine).await.log, ["true"]);
    }
}
