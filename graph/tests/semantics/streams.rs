//! Statements 36 and 37: what is interesting while it happens.

use std::{sync::Arc, time::Duration};

use futures::{StreamExt, stream::BoxStream};
use graph::{
    Context, Cursor, END, Goto, GraphBuilder, JournalFilter, MessageChunk, Modes, NodeError,
    NodeOptions, RetryPolicy, START, Send, StreamItem, StreamKind, SubgraphMemory, SubgraphOptions,
    TaskResult, ThreadStatus, Trigger,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::inside::around;
use crate::lab::{
    Count, Notes, SOON, log, notes, options, promise, run, serve, start, start_and_run, takes,
    thread, until_cancelled,
};
use crate::subgraphs::{Inner, InnerUpdate, asks, back, inner, line, nothing};

fn short(item: &StreamItem) -> String {
    let step = item.step;
    let live = if item.live { "" } else { "stored " };
    let line = match &item.kind {
        StreamKind::Values(values) => format!("{step} values {}", values["log"]),
        StreamKind::Updates {
            node,
            update,
            cached,
            ..
        } => {
            let cached = if *cached { " cached" } else { "" };
            format!("{step} {node} {update}{cached}")
        }
        StreamKind::StepUpdates { nodes, updates } => {
            format!(
                "{step} {} {}",
                nodes.join("+"),
                Value::from(updates.clone())
            )
        }
        StreamKind::TaskStarted {
            task,
            attempt,
            trigger,
            ..
        } => match trigger {
            Trigger::Edge => format!("{step} start {task} #{attempt}"),
            Trigger::Send(argument) => format!("{step} start {task}({argument}) #{attempt}"),
        },
        StreamKind::TaskFinished {
            task,
            attempt,
            result,
            ..
        } => match result {
            TaskResult::Done { cached: false } => format!("{step} done {task} #{attempt}"),
            TaskResult::Done { cached: true } => format!("{step} done {task} cached"),
            TaskResult::Suspended { waits } => {
                format!("{step} suspended {task} on {}", waits.join(","))
            }
            TaskResult::Failed { error, again } => {
                let again = if *again { " again" } else { "" };
                format!("{step} failed {task} #{attempt}: {error}{again}")
            }
            TaskResult::Cancelled => format!("{step} cancelled {task}"),
            other => format!("{other:?}"),
        },
        StreamKind::Checkpoint(info) => format!(
            "{step} checkpoint {} on {:?} then {}",
            info.checkpoint,
            info.parent.unwrap_or(0),
            info.next.join("+")
        ),
        StreamKind::Custom { node, payload, .. } => format!("{step} {node}: {payload}"),
        StreamKind::Message { node, chunk, .. } => {
            format!("{step} {node} {} {}: {}", chunk.id, chunk.role, chunk.delta)
        }
        StreamKind::Suspended { waits } => {
            let names: Vec<_> = waits.iter().map(|wait| wait.name.as_str()).collect();
            format!("waits for {}", names.join(","))
        }
        StreamKind::Ended(status) => format!("{status:?}"),
        StreamKind::Missed(count) => format!("missed {count}"),
        other => format!("{other:?}"),
    };
    format!("{live}{line}")
}

/// What comes until the thread has ended.
pub async fn lines(items: BoxStream<'static, StreamItem>) -> Vec<String> {
    told(items, |item| short(&item)).await
}

/// The same, each with the subgraph that it comes from.
async fn placed(items: BoxStream<'static, StreamItem>) -> Vec<String> {
    told(items, |item| match &item.namespace[..] {
        [] => short(&item),
        inside => format!("{}: {}", inside.join("/"), short(&item)),
    })
    .await
}

async fn told(
    items: BoxStream<'static, StreamItem>,
    line: impl Fn(StreamItem) -> String,
) -> Vec<String> {
    tokio::time::timeout(SOON, items.map(line).collect())
        .await
        .expect("the stream ends with the thread")
}

/// So many items.
pub async fn some(items: &mut BoxStream<'static, StreamItem>, count: usize) -> Vec<String> {
    let some = items.take(count).map(|item| short(&item)).collect();
    tokio::time::timeout(SOON, some).await.expect("they come")
}

/// Tells that it has begun, and goes on until it is cancelled.
async fn until_stopped(ctx: Context, begun: Arc<Notify>) -> Result<(), NodeError> {
    begun.notify_one();
    until_cancelled(&ctx).await;
    Err(NodeError::msg("stopped"))
}

fn graph() -> GraphBuilder<Notes> {
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
        let most = engine.follow("t", Modes::VALUES | Modes::UPDATES | Modes::CUSTOM);
        let some = engine.follow("t", Modes::VALUES | Modes::CUSTOM);
        start_and_run(&engine).await;
        assert_eq!(lines(most).await, [
            "1 a: \"half way\"",
            "1 a {\"log\":[\"a\"]}",
            "1 b {\"log\":[\"b\"]}",
            "1 values [\"a\",\"b\"]",
            "2 c null",
            "2 values [\"a\",\"b\"]",
            "Done",
        ]);
        assert_eq!(lines(some).await, ["1 a: \"half way\"", "1 values [\"a\",\"b\"]", "2 values [\"a\",\"b\"]", "Done"]);
        // None of it is in the journal.
        let journal = engine.journal().read(&JournalFilter::all(), Cursor::START, 100).await.expect("reads");
        let names: Vec<_> = journal.iter().map(|entry| entry.name.as_str()).collect();
        assert_eq!(names, ["thread.done"]);
    }
}

promise! {
    async fn all_modes_together_come_in_the_order_that_is_promised(lab) {
        let engine = lab.notes(
            notes("g")
                .node("plan", |_, _| async { Ok(log("plan")) })
                .node("side", |_, ctx: Context| async move {
                    for word in ["so", " far"] {
                        ctx.message(MessageChunk::new("m1", "assistant", word));
                    }
                    Ok(log("side"))
                })
                .node("work", |_, ctx: Context| async move {
                    let n: u64 = ctx.argument()?;
                    // The first one finishes last.
                    takes(50 - 40 * n).await;
                    Ok(log(format!("work {n}")))
                })
                .edge(START, "plan")
                .conditional("plan", ["work", "side"], |_| {
                    Goto::sends((0..2).map(|n| Send::new("work", &n))).and(Goto::node("side"))
                })
                .edge("side", END).edge("work", END),
        ).await;
        let all = engine.follow("t", Modes::DEBUG);
        start_and_run(&engine).await;
        assert_eq!(lines(all).await, [
            "1 start plan #1",
            "1 done plan #1",
            "1 plan {\"log\":[\"plan\"]}",
            "1 values [\"plan\"]",
            "1 checkpoint 1 on 0 then work+work+side",
            "2 start side #1",
            "2 start 0:work(0) #1",
            "2 start 1:work(1) #1",
            "2 side m1 assistant: \"so\"",
            "2 side m1 assistant: \" far\"",
            "2 done side #1",
            "2 side {\"log\":[\"side\"]}",
            "2 done 0:work #1",
            "2 work {\"log\":[\"work 0\"]}",
            "2 done 1:work #1",
            "2 work {\"log\":[\"work 1\"]}",
            "2 values [\"plan\",\"side\",\"work 0\",\"work 1\"]",
            "2 checkpoint 2 on 1 then ",
            "Done",
        ]);
    }
}

promise! {
    async fn each_item_has_its_time_its_kind_and_its_thread(lab) {
        let engine = lab.notes(graph()).await;
        let all = engine.follow("t", Modes::DEBUG);
        let before = jiff::Timestamp::now();
        start_and_run(&engine).await;
        let mut kinds = std::collections::BTreeSet::new();
        for item in all.collect::<Vec<_>>().await {
            assert!(item.live && item.namespace.is_empty());
            assert!(item.at >= before && item.at <= jiff::Timestamp::now());
            let json = serde_json::to_value(&item).expect("is JSON");
            assert_eq!(json["thread"], "t");
            assert_eq!(json["step"], item.step);
            kinds.insert(json["kind"].as_str().expect("a kind").to_owned());
            assert!(json.get("data").is_some(), "{json}");
        }
        let kinds: Vec<_> = kinds.iter().map(String::as_str).collect();
        assert_eq!(kinds, ["checkpoint", "custom", "ended", "task_finished", "task_started", "updates", "values"]);
    }
}

promise! {
    async fn waits_and_what_came_of_each_task_are_seen(lab) {
        let engine = lab.notes(
            notes("g")
                .node("asks", |_, ctx: Context| async move {
                    let answer: String = ctx.interrupt("name", "?").await?;
                    Ok(log(answer))
                })
                .node("good", |_, _| async { Ok(log("good")) })
                .edge(START, "asks").edge(START, "good").edge("asks", END).edge("good", END),
        ).await;
        let items = engine.follow("t", Modes::TASKS | Modes::UPDATES);
        // A suspension is told to whoever follows anything.
        let mut values = engine.follow("t", Modes::VALUES);
        let waiting = start_and_run(&engine).await;
        assert_eq!(some(&mut values, 1).await, ["waits for name"]);
        engine.answer("t", &waiting.waits[0].id, "Ada").await.expect("is taken");
        run(&engine).await;
        assert_eq!(lines(items).await, [
            "1 start asks #1",
            "1 start good #1",
            "1 suspended asks on name",
            "1 done good #1",
            "waits for name",
            "1 start asks #1",
            "1 done asks #1",
            "1 asks {\"log\":[\"Ada\"]}",
            "1 done good cached",
            "1 good {\"log\":[\"good\"]} cached",
            "Done",
        ]);
    }
}

promise! {
    async fn failures_and_further_attempts_are_seen(lab) {
        let engine = lab.notes(
            notes("g")
                .node_with(
                    "a",
                    NodeOptions::default().retry(RetryPolicy::default().attempts(2).first_interval(Duration::from_millis(1))),
                    |_, ctx: Context| async move { Err::<(), _>(NodeError::msg(format!("no {}", ctx.attempt()))) },
                )
                .edge(START, "a").edge("a", END),
        ).await;
        let items = engine.follow("t", Modes::TASKS);
        start_and_run(&engine).await;
        assert_eq!(lines(items).await, [
            "1 start a #1",
            "1 failed a #1: node `a`: no 1 again",
            "1 start a #2",
            "1 failed a #2: node `a`: no 2",
            "Failed",
        ]);
    }
}

promise! {
    async fn what_is_cancelled_is_seen(lab) {
        let started = Arc::new(Notify::new());
        let tell = started.clone();
        let engine = lab.notes(
            notes("g")
                .node("a", move |_, ctx: Context| until_stopped(ctx, tell.clone()))
                .edge(START, "a").edge("a", END)
                .node("tidy", |_, _| async { Ok(log("tidy")) })
                .on_cancel("tidy"),
        ).await;
        let items = engine.follow("t", Modes::TASKS | Modes::VALUES | Modes::CHECKPOINTS);
        let server = serve(&engine, options());
        start(&engine).await;
        started.notified().await;
        engine.cancel("t", "enough").await.expect("is taken");
        assert_eq!(lines(items).await, [
            "1 start a #1",
            "1 cancelled a",
            "0 values [\"tidy\"]",
            "0 checkpoint 1 on 0 then a",
            "Cancelled",
        ]);
        server.drain().await;
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
        assert_eq!(lines(updates).await, ["1 bad {\"log\":[\"bad\"]}", "1 good {\"log\":[\"good\"]} cached", "Done"]);
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

promise! {
    async fn an_error_handler_that_takes_over_is_seen_in_the_step_of_the_failed_task(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_: Arc<Notes>, _| async { Err::<(), _>(NodeError::msg("broken")) })
                .node("mend", |_, _| async { Ok(log("mended")) })
                .edge(START, "a").edge("a", END)
                .on_error(["a"], "mend").edge("mend", END),
        ).await;
        let items = engine.follow("t", Modes::TASKS | Modes::UPDATES | Modes::CHECKPOINTS);
        start_and_run(&engine).await;
        assert_eq!(lines(items).await, [
            "1 start a #1",
            "1 failed a #1: node `a`: broken again",
            "1 start a~mend #1",
            "1 done a~mend #1",
            "1 mend {\"log\":[\"mended\"]}",
            "1 checkpoint 1 on 0 then ",
            "Done",
        ]);
    }
}

// ---- tasks inside of subgraphs ----

promise! {
    async fn tasks_inside_of_subgraphs_are_seen_where_they_are(lab) {
        let ran = [Count::default(), Count::default(), Count::default()];
        let engine = lab.notes(around(&asks(&ran), SubgraphOptions::default())).await;
        let tasks = engine.follow("t", Modes::TASKS);
        // Who wants something else is not told of them.
        let values = engine.follow("t", Modes::CHECKPOINTS);
        let waiting = start_and_run(&engine).await;
        engine.answer("t", &waiting.waits[0].id, "Ada").await.expect("is taken");
        run(&engine).await;
        assert_eq!(placed(tasks).await, [
            "1 start sub #1",
            "sub: 1 start sub/1/before #1",
            "sub: 1 done sub/1/before #1",
            "sub: 2 start sub/2/ask #1",
            "sub: 2 suspended sub/2/ask on name",
            "1 suspended sub on name",
            "waits for name",
            "1 start sub #1",
            "sub: 2 start sub/2/ask #1",
            "sub: 2 done sub/2/ask #1",
            "sub: 3 start sub/3/after #1",
            "sub: 3 done sub/3/after #1",
            "1 done sub #1",
            "Done",
        ]);
        assert_eq!(placed(values).await, ["waits for name", "1 checkpoint 1 on 0 then ", "Done"]);
    }
}

promise! {
    async fn what_fails_inside_of_a_subgraph_is_seen_and_what_is_not_run_again(lab) {
        let tries = Count::default();
        let counted = tries.clone();
        let child = inner("child")
            .node("bad", move |_, _| {
                let n = counted.up();
                async move { if n == 1 { Err(NodeError::msg("no")) } else { Ok(line("bad")) } }
            })
            .node("good", |_, _| async { Ok(line("good")) })
            .edge(START, "bad").edge(START, "good").edge("bad", END).edge("good", END)
            .compile().expect("compiles");
        let retry = RetryPolicy::default().attempts(2).first_interval(Duration::from_millis(1));
        let options = SubgraphOptions::default().node(NodeOptions::default().retry(retry));
        let engine = lab.notes(around(&child, options)).await;
        let tasks = engine.follow("t", Modes::TASKS);
        start_and_run(&engine).await;
        let told = placed(tasks).await;
        assert_eq!(told[..5], [
            "1 start sub #1",
            "sub: 1 start sub/1/bad #1",
            "sub: 1 start sub/1/good #1",
            "sub: 1 failed sub/1/bad #1: node `bad`: no",
            "sub: 1 done sub/1/good #1",
        ]);
        assert!(told[5].starts_with("1 failed sub #1: ") && told[5].ends_with(" again"), "{}", told[5]);
        assert_eq!(told[6..], [
            "1 start sub #2",
            "sub: 1 start sub/1/bad #2",
            "sub: 1 done sub/1/bad #2",
            "sub: 1 done sub/1/good cached",
            "1 done sub #2",
            "Done",
        ]);
    }
}

promise! {
    async fn what_is_cancelled_inside_of_a_subgraph_is_seen(lab) {
        let started = Arc::new(Notify::new());
        let tell = started.clone();
        let child = inner("child")
            .node("a", move |_, ctx: Context| until_stopped(ctx, tell.clone()))
            .edge(START, "a").edge("a", END)
            .compile().expect("compiles");
        let engine = lab.notes(around(&child, SubgraphOptions::default())).await;
        let tasks = engine.follow("t", Modes::TASKS);
        let server = serve(&engine, options());
        start(&engine).await;
        started.notified().await;
        engine.cancel("t", "enough").await.expect("is taken");
        assert_eq!(placed(tasks).await, [
            "1 start sub #1",
            "sub: 1 start sub/1/a #1",
            "sub: 1 cancelled sub/1/a",
            "1 cancelled sub",
            "Cancelled",
        ]);
        server.drain().await;
    }
}

promise! {
    async fn each_task_of_a_fan_out_is_seen_with_what_runs_inside_of_it_however_deep(lab) {
        let deepest = inner("deepest")
            .node("leaf", |_: Arc<Inner>, _| async { Ok(line("leaf")) })
            .edge(START, "leaf").edge("leaf", END)
            .compile().expect("compiles");
        let middle = inner("middle")
            .node("calls", move |_: Arc<Inner>, ctx: Context| {
                let deepest = deepest.clone();
                async move {
                    // Also one that leaves nothing behind.
                    let leaf = ctx.invoke("deep", &deepest, SubgraphMemory::Stateless, InnerUpdate::default()).await?;
                    Ok(InnerUpdate::default().lines(leaf.lines.clone()))
                }
            })
            .edge(START, "calls").edge("calls", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .subgraph("sub", &middle, nothing, back)
                .conditional(START, ["sub"], |_| Goto::sends((0..2).map(|n| Send::new("sub", &n))))
                .edge("sub", END),
        ).await;
        let tasks = engine.follow("t", Modes::TASKS);
        start_and_run(&engine).await;
        let told = placed(tasks).await;
        for task in ["0:sub", "1:sub"] {
            let of_it: Vec<&String> = told.iter().filter(|line| line.contains(task)).collect();
            let n = &task[..1];
            assert_eq!(of_it, [
                &format!("1 start {task}({n}) #1"),
                &format!("{task}: 1 start {task}/1/calls #1"),
                &format!("{task}/calls+deep: 1 start {task}/1/calls+deep/1/leaf #1"),
                &format!("{task}/calls+deep: 1 done {task}/1/calls+deep/1/leaf #1"),
                &format!("{task}: 1 done {task}/1/calls #1"),
                &format!("1 done {task} #1"),
            ], "{told:?}");
        }
        assert_eq!(told.len(), 13);
    }
}
