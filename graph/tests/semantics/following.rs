//! Statement 37: a thread is followed wherever it runs, by what the database keeps.

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::StreamExt;
use graph::{
    Context, END, Engine, GraphBuilder, Keep, Modes, START, ServeOptions, StorageError, StreamKind,
    ThreadId, WaitFor,
    checkpoint::{Checkpointer, StateRows},
};
use serde_json::json;
use tokio::sync::Notify;

use crate::lab::{
    Count, Notes, log, notes, options, promise, run, serve, start, start_and_run, start_as, takes,
};
use crate::storage::delegate::{Delegate, Delegating};
use crate::streams::{lines, some};

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
