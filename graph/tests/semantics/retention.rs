//! Statement 33: pruning, copying, deleting, sweeping.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use graph::{
    Context, DeleteFilter, END, EngineError, GraphBuilder, HistoryFilter, JournalFilter, Keep,
    NodeError, RetentionPolicy, START, ServeOptions, StorageError, SweepOptions, ThreadFilter,
    ThreadStatus, WaitFor,
};
use serde_json::{Value, json};

use crate::lab::{
    Count, Notes, NotesUpdate, eventually, log, notes, options, promise, run, said, serve, start,
    start_and_run, start_as, state, takes, thread, thread_as, until_status,
};

/// Goes round `rounds` times, and writes all kinds of channels.
fn rounds(rounds: i64) -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |s: Arc<Notes>, _: Context| async move {
            let n = s.sum + 1;
            let mut update = NotesUpdate::default().sum(1).last(format!("last {n}"));
            if n % 3 != 0 {
                update = update.log(vec![format!("line {n}")]);
            }
            Ok(update.seen([(format!("key {}", n % 5), n)].into()))
        })
        .edge(START, "a")
        .conditional(
            "a",
            ["a", END],
            move |s: &Notes| {
                if s.sum < rounds { "a" } else { END }
            },
        )
        .recursion_limit(10_000)
}

/// The state at every checkpoint that is left, by number.
async fn states(engine: &graph::Engine, id: &str) -> Vec<(u64, Value)> {
    let filter = HistoryFilter {
        limit: Some(10_000),
        ..HistoryFilter::default()
    };
    let mut states = Vec::new();
    for at in engine.history(id, filter).await.expect("reads") {
        let state = engine.state_at(id, at.checkpoint).await.expect("reads");
        states.push((at.checkpoint, state));
    }
    states
}

promise! {
    async fn what_pruning_leaves_is_what_it_was_and_the_thread_goes_on(lab) {
        let engine = lab.notes(rounds(100)).await;
        start_and_run(&engine).await;
        let before = states(&engine, "t").await;
        assert_eq!(before.len(), 101);
        for keep in [60, 7, 1] {
            let pruned = engine.prune("t", Keep::last(keep)).await.expect("prunes");
            assert!(pruned.removed > 0 && !pruned.more, "{pruned:?}");
            let mut left = before[..usize::try_from(keep).expect("small")].to_vec();
            // The input is always there.
            left.push(before[100].clone());
            assert_eq!(states(&engine, "t").await, left);
        }
        let error = engine.state_at("t", 99).await.expect_err("is gone");
        assert!(matches!(error, EngineError::Storage(StorageError::UnknownCheckpoint { checkpoint: 99, .. })), "{error}");
        let branch = engine.fork("t", 100, "a", &NotesUpdate::default().sum(-2)).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        let now = state(&engine).await;
        assert_eq!((now.sum, now.last.as_str(), now.log.len()), (100, "last 100", 68));
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        let error = engine.prune("nobody", Keep::latest()).await.expect_err("is unknown");
        assert!(matches!(error, EngineError::Storage(StorageError::UnknownThread(_))), "{error}");
    }
}

promise! {
    async fn a_thread_is_pruned_while_it_runs(lab) {
        let engine = lab.notes(rounds(300)).await;
        start(&engine).await;
        let server = serve(&engine, options());
        let removed = AtomicU64::new(0);
        eventually("it is done", || async {
            let pruned = engine.prune("t", Keep::last(2)).await.expect("prunes");
            removed.fetch_add(pruned.removed, Ordering::Relaxed);
            thread(&engine).await.status == ThreadStatus::Done
        }).await;
        server.drain().await;
        let mut removed = removed.into_inner();
        removed += engine.prune("t", Keep::last(2)).await.expect("prunes").removed;
        assert_eq!(removed, 298);
        let now = state(&engine).await;
        assert_eq!((now.sum, now.log.len(), now.seen.len()), (300, 200, 5));
        assert_eq!(now.log.last().map(String::as_str), Some("line 299"));
        assert_eq!(thread(&engine).await.step, 300);
        assert_eq!(states(&engine, "t").await.len(), 3);
    }
}

/// Charges once, says so, asks, and logs the answer.
fn asks(count: &Count) -> GraphBuilder<Notes> {
    let count = count.clone();
    notes("g")
        .node("ask", move |_: Arc<Notes>, ctx: Context| {
            let count = count.clone();
            async move {
                let receipt: usize = ctx
                    .step("charge", |_| async move { Ok::<_, NodeError>(count.up()) })
                    .await?;
                ctx.emit("s", "asked", &receipt)?;
                let answer: String = ctx.interrupt("q", "?").await?;
                Ok(log(format!("{answer} {receipt}")))
            }
        })
        .edge(START, "ask")
        .edge("ask", END)
}

promise! {
    async fn a_copy_asks_under_an_id_of_its_own_and_does_nothing_twice(lab) {
        let count = Count::default();
        let engine = lab.notes(asks(&count)).await;
        let original = start_and_run(&engine).await;
        engine.copy_thread("t", "copy").await.expect("copies");
        assert_eq!(thread(&engine).await, original, "the original does not notice");
        run(&engine).await;
        let copy = thread_as(&engine, "copy").await;
        assert_eq!((copy.status, copy.waits.len()), (ThreadStatus::Waiting, 1));
        let (old, new) = (&original.waits[0].id, &copy.waits[0].id);
        assert_ne!(old, new);
        assert_eq!((&copy.waits[0].name, &copy.waits[0].value), (&"q".to_owned(), &json!("?")));

        let error = engine.answer("copy", old, "stray").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownInterrupt { .. }), "{error}");
        engine.answer("t", old, "old").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["old 1"]);
        assert_eq!(thread_as(&engine, "copy").await.status, ThreadStatus::Waiting);
        engine.answer("copy", new, "new").await.expect("is taken");
        run(&engine).await;
        let copied: Notes = engine.state("copy").await.expect("reads");
        assert_eq!(copied.log, ["new 1"]);
        assert_eq!(count.get(), 1, "what was done is not done again");
        assert_eq!(said(&engine, "s").await, ["asked 1"], "nor said");
        for (from, to, fault) in [("t", "copy", "exists"), ("nobody", "x", "unknown"), ("t", "", "id")] {
            let error = engine.copy_thread(from, to).await.expect_err("is refused");
            let fits = match fault {
                "exists" => matches!(error, EngineError::ThreadExists(_)),
                "unknown" => matches!(error, EngineError::UnknownThread(_)),
                _ => matches!(error, EngineError::InvalidThreadId { .. }),
            };
            assert!(fits, "{error}");
        }
    }
}

promise! {
    async fn an_answer_on_its_way_to_the_original_does_not_reach_the_copy(lab) {
        let engine = lab.notes(asks(&Count::default())).await;
        let original = start_and_run(&engine).await;
        // Accepted, and not used yet.
        engine.answer("t", &original.waits[0].id, "old").await.expect("is taken");
        engine.copy_thread("t", "copy").await.expect("copies");
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        let copy = thread_as(&engine, "copy").await;
        assert_eq!(copy.status, ThreadStatus::Waiting);
        engine.answer("copy", &copy.waits[0].id, "new").await.expect("is taken");
        run(&engine).await;
        let copied: Notes = engine.state("copy").await.expect("reads");
        assert_eq!(copied.log, ["new 1"]);
    }
}

promise! {
    async fn a_copy_hears_what_the_original_had_not_used_and_wakes_by_itself(lab) {
        let engine = lab.notes(
            notes("g")
                .node("wait", |_: Arc<Notes>, ctx: Context| async move {
                    let came = ctx.wait_any("first", &WaitFor::new().signal("go")).await?;
                    let at = ctx.step("at", |_| async { Ok::<_, NodeError>(jiff::Timestamp::now() + Duration::from_millis(300)) }).await?;
                    ctx.sleep_until("nap", at).await?;
                    Ok(log(serde_json::to_string(&came)?))
                })
                .edge(START, "wait").edge("wait", END),
        ).await;
        start_and_run(&engine).await;
        engine.signal("t", "go", "k", &1).await.expect("sends");
        engine.copy_thread("t", "copy").await.expect("copies");
        run(&engine).await;
        // Both took the signal, and sleep; a copy of the sleeper wakes when it would.
        engine.copy_thread("t", "second").await.expect("copies");
        let server = serve(&engine, options());
        for id in ["t", "copy", "second"] {
            until_status(&engine, id, ThreadStatus::Done).await;
            let state: Notes = engine.state(id).await.expect("reads");
            assert_eq!(state.log.len(), 1);
            assert!(state.log[0].contains("\"k\""), "{:?}", state.log);
        }
        server.drain().await;
    }
}

promise! {
    async fn many_threads_are_deleted_and_what_they_said_stays(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_: Arc<Notes>, ctx: Context| async move {
                    ctx.emit("s", "was", ctx.thread().as_str())?;
                    Ok(NotesUpdate::default())
                })
                .edge(START, "a").edge("a", END),
        ).await;
        for id in ["job/1", "job/2", "job/3", "other"] {
            start_as(&engine, id).await;
        }
        run(&engine).await;
        start_as(&engine, "job/new").await;
        let filter = DeleteFilter { prefix: Some("job/".to_owned()), limit: Some(2), ..DeleteFilter::default() };
        assert!(engine.delete_threads(&filter).await.expect("deletes").more);
        assert!(!engine.delete_threads(&filter).await.expect("deletes").more);
        let left: Vec<String> = engine.threads(&ThreadFilter::default()).await.expect("lists")
            .iter().map(|thread| thread.id.to_string()).collect();
        assert_eq!(left, ["job/new", "other"]);
        assert_eq!(said(&engine, "s").await.len(), 4);
    }
}

promise! {
    async fn a_sweep_forgets_what_its_policy_says_and_nothing_else(lab) {
        let engine = lab.notes(rounds(40)).await;
        for id in ["a", "b", "c"] {
            start_as(&engine, id).await;
        }
        run(&engine).await;
        engine.signal("a", "news", "k", &1).await.expect("sends");
        let nothing = engine.sweep(&RetentionPolicy::default(), None).await.expect("sweeps");
        assert_eq!((nothing.seen, nothing.checkpoints, nothing.next), (3, 0, None));
        let policy = RetentionPolicy {
            keep: Keep::last(5),
            prefix: Some("a".to_owned()),
            forget_keys_after: Some(Duration::ZERO),
            ..RetentionPolicy::default()
        };
        let swept = engine.sweep(&policy, None).await.expect("sweeps");
        assert_eq!((swept.seen, swept.checkpoints, swept.keys), (1, 35, 0), "an unread signal keeps its key");
        assert_eq!(states(&engine, "a").await.len(), 6);
        assert_eq!(states(&engine, "b").await.len(), 41);
        let others = RetentionPolicy { graphs: vec!["another".to_owned()], keep: Keep::latest(), ..RetentionPolicy::default() };
        assert_eq!(engine.sweep(&others, None).await.expect("sweeps").seen, 0);

        // In a server, every so often. Threads that have ended go after a while.
        takes(20).await;
        let policy = RetentionPolicy { keep: Keep::latest(), delete_ended_after: Some(Duration::from_millis(1)), ..RetentionPolicy::default() };
        let every = Duration::from_millis(20);
        let server = serve(&engine, ServeOptions {
            sweep: Some(SweepOptions { every, ..SweepOptions::new(policy) }),
            ..options()
        });
        eventually("all that has ended is gone", || async {
            engine.threads(&ThreadFilter::default()).await.expect("lists").is_empty()
        }).await;
        server.drain().await;
    }
}

/// A program whose state has changed beyond recognition.
#[derive(Clone, Debug, Default, graph::State)]
struct Other {
    sum: Vec<String>,
}

promise! {
    async fn a_sweep_leaves_a_thread_that_it_cannot_read_and_goes_on(lab) {
        let engine = lab.notes(rounds(40)).await;
        for id in ["a", "b"] {
            start_as(&engine, id).await;
        }
        run(&engine).await;
        let graph = graph::Graph::<Other>::builder("g")
            .node("a", |_: Arc<Other>, _: Context| async move { Ok(OtherUpdate::default()) })
            .edge(START, "a").edge("a", END)
            .compile().expect("compiles");
        let stranger = lab.engine(graph).await;
        let policy = RetentionPolicy { keep: Keep::last(3), ..RetentionPolicy::default() };
        let swept = stranger.sweep(&policy, None).await.expect("sweeps");
        let failed: Vec<&str> = swept.failed.iter().map(|(thread, _)| thread.as_str()).collect();
        assert_eq!((failed, swept.checkpoints), (vec!["a", "b"], 0));
        assert!(swept.failed[0].1.contains("sum"), "{:?}", swept.failed);
        assert_eq!(states(&engine, "a").await.len(), 41);
        assert_eq!(engine.sweep(&policy, None).await.expect("sweeps").checkpoints, 74);
        assert_eq!(Other::default().sum.len(), 0);
        let all = engine.journal().read(&JournalFilter::all(), graph::Cursor::START, 100).await;
        assert_eq!(all.expect("reads").len(), 2, "the ends of the threads are in the journal");
    }
}
