//! Statements 36 and 37: what is interesting while it happens.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use graph::{
    Context, END, Engine, Goto, GraphBuilder, Keep, MessageChunk, Modes, NodeError, NodeOptions,
    RetryPolicy, START, Send, ServeOptions, StorageError, StreamItem, StreamKind, TaskResult,
    ThreadId, ThreadStatus, Trigger, WaitFor,
    checkpoint::{Checkpointer, StateRows},
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::lab::{
    Count, Notes, log, notes, options, promise, run, serve, start, start_and_run, start_as, takes,
    thread,
};
use crate::storage::delegate::{Delegate, Delegating};

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
async fn lines(items: BoxStream<'static, StreamItem>) -> Vec<String> {
    let all = items.map(|item| short(&item)).collect();
    tokio::time::timeout(Duration::from_secs(10), all)
        .await
        .expect("the stream ends with the thread")
}

/// So many items.
async fn some(items: &mut BoxStream<'static, StreamItem>, count: usize) -> Vec<String> {
    let some = items.take(count).map(|item| short(&item)).collect();
    tokio::time::timeout(Duration::from_secs(10), some)
        .await
        .expect("they come")
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
        assert!(crate::lab::said(&engine, "g").await.is_empty(), "none of it is in the journal");
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
                .node("a", move |_, ctx: Context| {
                    let tell = tell.clone();
                    async move {
                        tell.notify_one();
                        crate::lab::until_cancelled(&ctx).await;
                        Err::<(), _>(NodeError::msg("stopped"))
                    }
                })
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

// ---- runs in other processes ----

/// Two steps, a wait, and two more.
fn relay() -> GraphBuilder<Notes> {
    let mut graph = notes("g").node("wait", |_, ctx: Context| async move {
        ctx.wait_any("go", &WaitFor::new().signal("go")).await?;
        Ok(log("wait").seen([("went".to_owned(), 1)].into()))
    });
    for name in ["a", "b", "c", "d"] {
        graph = graph.node(name, move |_, ctx: Context| async move {
            ctx.custom(&name)?;
            Ok(log(name).sum(1))
        });
    }
    graph
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", "wait")
        .edge("wait", "c")
        .edge("c", "d")
        .edge("d", END)
}

const KEPT: Modes = Modes::VALUES;

promise! {
    async fn a_run_in_another_process_is_followed_by_what_the_database_keeps(lab) {
        let (runner, reader) = (lab.notes(relay()).await, lab.notes(relay()).await);
        let waits = Arc::new(Notify::new());
        let tell = waits.clone();
        let items = reader.follow_from("t", 0, Modes::ALL).inspect(move |item| {
            if matches!(item.kind, StreamKind::Suspended { .. }) {
                tell.notify_one();
            }
        }).boxed();
        let server = serve(&runner, options());
        let told = tokio::spawn(lines(items));
        start(&runner).await;
        waits.notified().await;
        runner.signal("t", "go", "1", &()).await.expect("is taken");
        assert_eq!(told.await.expect("did not panic"), [
            "stored 1 a [{\"log\":[\"a\"],\"sum\":1}]",
            "stored 1 values [\"a\"]",
            "stored 1 checkpoint 1 on 0 then b",
            "stored 2 b [{\"log\":[\"b\"],\"sum\":1}]",
            "stored 2 values [\"a\",\"b\"]",
            "stored 2 checkpoint 2 on 1 then wait",
            "stored waits for go",
            "stored 3 wait [{\"log\":[\"wait\"],\"seen\":{\"went\":1}}]",
            "stored 3 values [\"a\",\"b\",\"wait\"]",
            "stored 3 checkpoint 3 on 2 then c",
            "stored 4 c [{\"log\":[\"c\"],\"sum\":1}]",
            "stored 4 values [\"a\",\"b\",\"wait\",\"c\"]",
            "stored 4 checkpoint 4 on 3 then d",
            "stored 5 d [{\"log\":[\"d\"],\"sum\":1}]",
            "stored 5 values [\"a\",\"b\",\"wait\",\"c\",\"d\"]",
            "stored 5 checkpoint 5 on 4 then ",
            "stored Done",
        ]);
        server.drain().await;
    }
}

promise! {
    async fn a_follower_stays_with_a_thread_that_moves_between_processes(lab) {
        let (here, there) = (lab.notes(relay()).await, lab.notes(relay()).await);
        // The first part here, the rest there.
        let mut items = here.follow("t", KEPT);
        start(&here).await;
        run(&here).await;
        assert_eq!(some(&mut items, 3).await, ["1 values [\"a\"]", "2 values [\"a\",\"b\"]", "waits for go"]);
        there.signal("t", "go", "1", &()).await.expect("is taken");
        run(&there).await;
        assert_eq!(lines(items).await, [
            "stored 3 values [\"a\",\"b\",\"wait\"]",
            "stored 4 values [\"a\",\"b\",\"wait\",\"c\"]",
            "stored 5 values [\"a\",\"b\",\"wait\",\"c\",\"d\"]",
            "stored Done",
        ]);
    }
}

promise! {
    async fn what_happened_elsewhere_is_told_before_what_happens_here(lab) {
        let (here, there) = (lab.notes(relay()).await, lab.notes(relay()).await);
        let items = here.follow_from("t", 0, KEPT);
        // The first part there; nobody reads until it is over here.
        start(&there).await;
        run(&there).await;
        here.signal("t", "go", "1", &()).await.expect("is taken");
        run(&here).await;
        assert_eq!(lines(items).await, [
            "stored 1 values [\"a\"]",
            "stored 2 values [\"a\",\"b\"]",
            "3 values [\"a\",\"b\",\"wait\"]",
            "4 values [\"a\",\"b\",\"wait\",\"c\"]",
            "5 values [\"a\",\"b\",\"wait\",\"c\",\"d\"]",
            "Done",
        ]);
    }
}

promise! {
    async fn a_reader_goes_on_from_the_checkpoint_that_it_knows(lab) {
        let engine = lab.notes(relay()).await;
        start_and_run(&engine).await;
        let mut items = engine.follow_from("t", 1, KEPT);
        assert_eq!(some(&mut items, 2).await, ["stored 2 values [\"a\",\"b\"]", "stored waits for go"]);
        engine.signal("t", "go", "1", &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(lines(engine.follow_from("t", 4, KEPT)).await, ["stored 5 values [\"a\",\"b\",\"wait\",\"c\",\"d\"]", "stored Done"]);
        assert_eq!(lines(engine.follow_from("t", 5, KEPT)).await, ["stored Done"]);
    }
}

promise! {
    async fn a_follower_hears_of_another_process_without_a_poll(lab) {
        let (runner, other) = (lab.notes(relay()).await, lab.notes(relay()).await);
        let never = Duration::from_mins(10);
        let reader: Engine = Engine::builder(lab.store.clone())
            .graph(relay().compile().expect("compiles"))
            .poll(never)
            .build()
            .await
            .expect("builds");
        let server = serve(&runner, ServeOptions { poll: never, ..options() });
        let mut items = reader.follow_from("t", 0, KEPT);
        let mut told = Vec::new();
        let (some, ()) = tokio::join!(some(&mut items, 3), async {
            takes(20).await;
            start(&other).await;
        });
        told.extend(some);
        other.signal("t", "go", "1", &()).await.expect("is taken");
        told.extend(lines(items).await);
        assert_eq!(told.len(), 7, "{told:?}");
        assert_eq!(told.last().map(String::as_str), Some("stored Done"));
        server.drain().await;
    }
}

/// Counts how often states are read.
struct Counted {
    inner: Arc<dyn Checkpointer>,
    reads: Count,
}

#[async_trait]
impl Delegate for Counted {
    fn inner(&self) -> &dyn Checkpointer {
        &*self.inner
    }
    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        self.reads.up();
        self.inner.state_rows(thread, checkpoint).await
    }
}

promise! {
    async fn a_follower_that_has_much_to_catch_up_with_reads_many_states_at_once(lab) {
        const STEPS: u32 = 400;
        let runner = lab.notes(counting(STEPS.into())).await;
        start_and_run(&runner).await;
        let reads = Count::default();
        let store = Arc::new(Delegating(Counted { inner: lab.store.clone(), reads: reads.clone() }));
        let graph = counting(STEPS.into()).compile().expect("compiles");
        let reader = Engine::builder(store).graph(graph).build().await.expect("builds");
        let told = lines(reader.follow_from("t", 0, Modes::VALUES | Modes::UPDATES)).await;
        let mut log = Vec::new();
        let mut expected = Vec::new();
        for n in 0..STEPS {
            log.push(n.to_string());
            expected.push(format!("stored {} count [{{\"log\":[\"{n}\"],\"sum\":1}}]", n + 1));
            expected.push(format!("stored {} values {}", n + 1, json!(log)));
        }
        expected.push("stored Done".to_owned());
        assert!(told == expected, "{:?}", told.iter().zip(&expected).find(|(told, expected)| told != expected));
        // Where states are kept as they are, each is looked up by itself.
        if !lab.store.keeps_values() {
            assert!(reads.get() * 10 <= STEPS as usize, "{} requests", reads.get());
        }
    }
}

/// Counts to so many, a step each.
fn counting(to: i64) -> GraphBuilder<Notes> {
    notes("g")
        .node("count", |notes: Arc<Notes>, _| async move {
            Ok(log(notes.sum.to_string()).sum(1))
        })
        .edge(START, "count")
        .conditional("count", ["count", END], move |s: &Notes| {
            if s.sum < to { "count" } else { END }
        })
}

promise! {
    async fn a_reader_is_told_what_pruning_has_taken_before_it_came(lab) {
        let engine = lab.notes(counting(5)).await;
        start_and_run(&engine).await;
        engine.prune("t", Keep::latest()).await.expect("prunes");
        let last = ["stored 5 values [\"0\",\"1\",\"2\",\"3\",\"4\"]", "stored Done"];
        for (from, missed) in [(0, "stored missed 4"), (1, "stored missed 3"), (3, "stored missed 1")] {
            let told = lines(engine.follow_from("t", from, KEPT)).await;
            assert_eq!(told, [missed, last[0], last[1]], "from {from}");
        }
        // Who knows the one before has missed nothing.
        assert_eq!(lines(engine.follow_from("t", 4, KEPT)).await, last);
    }
}

promise! {
    async fn a_reader_is_told_what_pruning_takes_while_it_reads(lab) {
        let engine = lab.notes(counting(200)).await;
        start_and_run(&engine).await;
        let mut items = engine.follow_from("t", 0, Modes::UPDATES);
        // The list of all of them is read with the first, and what is in some of them.
        let first = some(&mut items, 1).await;
        assert_eq!(first, ["stored 1 count [{\"log\":[\"0\"],\"sum\":1}]"]);
        engine.prune("t", Keep::latest()).await.expect("prunes");
        let mut rest = lines(items).await;
        assert_eq!(rest.pop().as_deref(), Some("stored Done"));
        let missed = rest.pop().expect("says how much is missing");
        for (line, n) in rest.iter().zip(1..) {
            assert_eq!(*line, format!("stored {} count [{{\"log\":[\"{n}\"],\"sum\":1}}]", n + 1));
        }
        assert!(rest.len() < 60, "{}", rest.len());
        // What the last step changed is not kept apart from what was before it.
        assert_eq!(missed, format!("stored missed {}", 198 - rest.len()));
    }
}

promise! {
    async fn a_follower_goes_along_when_another_branch_becomes_the_head(lab) {
        let (here, there) = (lab.notes(relay()).await, lab.notes(relay()).await);
        for (id, runner) in [("live", &here), ("stored", &there)] {
            start_as(runner, id).await;
            run(runner).await;
            let mut items = here.follow_from(id, 0, KEPT);
            let first = some(&mut items, 3).await;
            assert_eq!(first, ["stored 1 values [\"a\"]", "stored 2 values [\"a\",\"b\"]", "stored waits for go"]);
            // As if `wait` had run, on a branch from where it was to run.
            let branch = runner.fork(id, 2, "wait", &log("as wait")).await.expect("forks");
            runner.set_head(id, branch).await.expect("is a branch");
            run(runner).await;
            let rest = lines(items).await;
            let states: Vec<&str> = rest.iter().map(|line| line.trim_start_matches("stored ")).collect();
            assert_eq!(states, [
                "2 values [\"a\",\"b\",\"as wait\"]",
                "3 values [\"a\",\"b\",\"as wait\",\"c\"]",
                "4 values [\"a\",\"b\",\"as wait\",\"c\",\"d\"]",
                "Done",
            ], "{id}");
        }
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
