//! Statements 25 to 29: who runs a thread, in which order, and how they hear of it.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use graph::{
    Busy, Context, Delivered, END, Engine, EngineError, GraphBuilder, NodeError, Point, Priority,
    START, ServeOptions, StartOptions, ThreadStatus, WaitFor,
    checkpoint::{ClaimRequest, Commit, Lease, StorageError},
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::lab::{
    Count, Lab, Notes, NotesUpdate, SOON, eventually, log, notes, options, promise, run, said,
    says, serve, start, start_and_run, start_as, state, takes, thread, until_status,
};
use crate::storage::faulty::Faulty;

/// Tells that it has started, and waits to be let go.
fn held(started: Arc<Notify>, go: Arc<Notify>) -> GraphBuilder<Notes> {
    notes("g")
        .node("a", move |_, ctx: Context| {
            let (started, go) = (started.clone(), go.clone());
            async move {
                ctx.emit("s", "a", &())?;
                started.notify_one();
                go.notified().await;
                Ok(log("a"))
            }
        })
        .node("b", |_, _| says("b"))
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", END)
}

promise! {
    async fn a_run_that_lost_its_lease_writes_nothing(lab) {
        let (started, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let engine = lab.notes(held(started.clone(), go.clone())).await;
        start(&engine).await;
        // Its heartbeat is slow: it does not notice that the lease has run out.
        let server = serve(&engine, ServeOptions { lease: Duration::from_millis(1), ..options() });
        started.notified().await;
        let token = thread(&engine).await.lease.expect("is leased").token;
        let newer = steal(&lab).await;
        assert!(newer.token > token, "tokens grow");
        go.notify_one();
        eventually("the old run has given up", || async { Arc::strong_count(&go) == 2 }).await;
        server.drain().await;
        assert!(said(&engine, "s").await.is_empty());
        assert!(state(&engine).await.log.is_empty());
        // The new lease is good.
        lab.store.commit(&newer, Commit::on(0)).await.expect("is the newest");
        let stale = Lease { token, ..newer };
        let error = lab.store.commit(&stale, Commit::on(0)).await.expect_err("is refused");
        assert!(matches!(error, StorageError::Fenced { .. }));
    }
}

/// Claims `t` as soon as its lease has run out.
async fn steal(lab: &Lab) -> Lease {
    for _ in 0..1000 {
        let claimed = lab
            .store
            .claim(ClaimRequest {
                owner: "thief",
                graphs: &["g".to_owned()],
                limit: 1,
                lease: Duration::from_mins(1),
            })
            .await
            .expect("claims");
        if let Some(claim) = claimed.claims.into_iter().next() {
            return claim.lease;
        }
        takes(5).await;
    }
    panic!("the lease never ran out");
}

promise! {
    async fn a_run_that_gives_its_lease_back_is_not_taken_for_one_that_lost_it(lab) {
        let store = Arc::new(Faulty::late_ends(lab.store.clone()));
        let told = Count::default();
        let counted = told.clone();
        let graph = notes("g").node("a", |_, _| says("a")).edge(START, "a").edge("a", END);
        let engine = Engine::builder(store)
            .graph(graph.compile().expect("compiles"))
            .observer(Arc::new(move |point: &Point<'_>| {
                if let Point::AfterCommit { .. } = point {
                    counted.up();
                }
            }))
            .build()
            .await
            .expect("builds");
        start(&engine).await;
        let server = serve(&engine, ServeOptions { lease: Duration::from_millis(300), ..options() });
        eventually("its end is told", || async { told.get() == 1 }).await;
        server.drain().await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn a_serving_loop_that_is_dropped_leaves_nothing_behind(lab) {
        // The process goes on, and with it whatever was not ended. As long as anything of an engine is there, so is its database.
        let without = Arc::strong_count(&lab.store);
        for until_idle in [false, true] {
            let (started, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
            let engine = lab.notes(held(started.clone(), go)).await;
            let id = if until_idle { "u" } else { "t" };
            start_as(&engine, id).await;
            let serving = {
                let engine = engine.clone();
                tokio::spawn(async move {
                    if until_idle {
                        engine.run_due(options()).await
                    } else {
                        engine.serve(options(), CancellationToken::new()).await
                    }
                })
            };
            started.notified().await;
            serving.abort();
            drop(engine);
            eventually("nothing of it is left", || async {
                Arc::strong_count(&lab.store) == without
            }).await;
        }
    }
}

promise! {
    async fn a_lease_is_renewed_while_a_task_takes_its_time(lab) {
        // On a machine that stands still for longer than a lease, a renewal comes too late: then the lease is longer.
        for (id, lease) in [("t", 2), ("u", 4), ("v", 8)] {
            let lease = Duration::from_secs(lease);
            let runs = Count::default();
            let graph = || {
                let counted = runs.clone();
                notes("g")
                    .node("slow", move |_, _| {
                        counted.up();
                        async move { tokio::time::sleep(lease * 13 / 10).await; Ok(log("slow")) }
                    })
                    .edge(START, "slow").edge("slow", END)
            };
            let (engine, other) = (lab.notes(graph()).await, lab.notes(graph()).await);
            start_as(&engine, id).await;
            let quick = |owner: &str| ServeOptions {
                lease,
                poll: Duration::from_millis(20),
                owner: owner.to_owned(),
                ..options()
            };
            let (one, two) = (serve(&engine, quick("one")), serve(&other, quick("two")));
            until_status(&engine, id, ThreadStatus::Done).await;
            one.drain().await;
            two.drain().await;
            if runs.get() == 1 {
                return;
            }
        }
        panic!("a lease that is renewed ran out");
    }
}

promise! {
    async fn a_signal_wakes_a_server_at_once(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    ctx.wait_any("m", &WaitFor::new().signal("m")).await?;
                    Ok(log("woke"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        // Nothing is polled for minutes: only being woken helps.
        let server = serve(&engine, ServeOptions { poll: Duration::from_mins(2), ..options() });
        start(&engine).await;
        until_status(&engine, "t", ThreadStatus::Waiting).await;
        let before = Instant::now();
        engine.signal("t", "m", "1", &()).await.expect("is taken");
        until_status(&engine, "t", ThreadStatus::Done).await;
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        server.drain().await;
    }
}

promise! {
    async fn a_signal_from_another_process_is_found_within_the_poll(lab) {
        let graph = || notes("g")
            .node("a", |_, ctx: Context| async move {
                ctx.wait_any("m", &WaitFor::new().signal("m")).await?;
                Ok(log("woke"))
            })
            .edge(START, "a").edge("a", END);
        let (runner, other) = (lab.notes(graph()).await, lab.notes(graph()).await);
        let server = serve(&runner, options());
        start(&other).await;
        until_status(&other, "t", ThreadStatus::Waiting).await;
        let before = Instant::now();
        other.signal("t", "m", "1", &()).await.expect("is taken");
        until_status(&other, "t", ThreadStatus::Done).await;
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        server.drain().await;
    }
}

promise! {
    async fn urgent_threads_run_first(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    ctx.say_now(ctx.thread().as_str(), "order", ctx.thread().as_str(), &()).await?;
                    Ok(())
                })
                .edge(START, "a").edge("a", END),
        ).await;
        for (id, priority) in [("low", Priority::Low), ("medium", Priority::Medium), ("critical", Priority::Critical), ("high", Priority::High)] {
            engine.start(id, "g", &(), StartOptions::default().priority(priority)).await.expect("starts");
        }
        engine.run_due(ServeOptions { concurrency: 1, ..options() }).await.expect("runs");
        assert_eq!(said(&engine, "order").await, ["critical null", "high null", "medium null", "low null"]);
    }
}

promise! {
    async fn as_many_threads_run_at_once_as_allowed(lab) {
        let (running, peak) = (Count::default(), crate::lab::Peak::default());
        let (inside, most) = (running.clone(), peak.clone());
        let engine = lab.notes(
            notes("g")
                .node("a", move |_, _| {
                    let (inside, most) = (inside.clone(), most.clone());
                    async move {
                        most.see(inside.up());
                        takes(30).await;
                        inside.down();
                        Ok(())
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        for n in 0..9 {
            start_as(&engine, &n.to_string()).await;
        }
        let server = serve(&engine, ServeOptions { concurrency: 3, ..options() });
        for n in 0..9 {
            until_status(&engine, &n.to_string(), ThreadStatus::Done).await;
        }
        assert_eq!(peak.get(), 3);
        server.drain().await;
    }
}

promise! {
    async fn draining_finishes_the_step_and_gives_the_lease_back(lab) {
        let (started, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (engine, drained) = lab.drained_notes(held(started.clone(), go.clone())).await;
        start(&engine).await;
        let server = serve(&engine, options());
        started.notified().await;
        server.begin_to_drain(&drained).await;
        go.notify_one();
        server.drain().await;
        let left = thread(&engine).await;
        assert_eq!((left.status, left.lease.is_none(), left.step), (ThreadStatus::Ready, true, 1));
        assert_eq!(state(&engine).await.log, ["a"]);
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b"]);
    }
}

promise! {
    async fn draining_stops_what_takes_too_long_and_another_process_runs_it_again(lab) {
        let (started, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let engine = lab.notes(held(started.clone(), go.clone())).await;
        start(&engine).await;
        let server = serve(&engine, ServeOptions { drain: Duration::from_millis(30), ..options() });
        started.notified().await;
        server.drain().await;
        let left = thread(&engine).await;
        assert_eq!((left.status, left.lease.is_none(), left.step), (ThreadStatus::Ready, true, 0));
        go.notify_one();
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b"]);
        assert_eq!(said(&engine, "s").await.len(), 1);
    }
}

promise! {
    async fn a_further_input_to_a_busy_thread_is_rejected_or_queued(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |s: Arc<Notes>, ctx: Context| async move {
                    if s.last != "quick" {
                        ctx.interrupt::<()>("q", "?").await?;
                    }
                    Ok(log(format!("ran {}", s.log.len())))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        let quick = |line: &str| log(line).last("quick".into());
        let error = engine.input("t", "1", &quick("one"), Busy::Reject).await.expect_err("is refused");
        assert!(matches!(error, EngineError::Busy { status: ThreadStatus::Waiting, .. }), "{error}");
        assert_eq!(engine.input("t", "2", &quick("two"), Busy::Enqueue).await.expect("is taken"), Delivered::New);
        assert_eq!(engine.input("t", "2", &quick("two"), Busy::Enqueue).await.expect("is taken"), Delivered::Duplicate);
        engine.input("t", "3", &quick("three"), Busy::Enqueue).await.expect("is taken");
        run(&engine).await;
        assert!(state(&engine).await.log.is_empty(), "inputs wait for the end");
        engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["ran 0", "two", "ran 2", "three", "ran 4"]);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(said(&engine, "t").await.len(), 3, "each round has its end");
        engine.input("t", "4", &quick("four"), Busy::Reject).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log.len(), 7);
        let error = engine.input("t", "5", &serde_json::json!({"nope": 1}), Busy::Enqueue).await.expect_err("is refused");
        assert!(matches!(error, EngineError::Channel(_)), "{error}");
    }
}

promise! {
    async fn the_other_threads_go_on_when_one_fails(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    if ctx.thread().as_str() == "bad" { return Err(NodeError::msg("bad")); }
                    Ok(NotesUpdate::default())
                })
                .edge(START, "a").edge("a", END),
        ).await;
        for id in ["one", "bad", "two"] {
            start_as(&engine, id).await;
        }
        run(&engine).await;
        for (id, status) in [("one", ThreadStatus::Done), ("bad", ThreadStatus::Failed), ("two", ThreadStatus::Done)] {
            until_status(&engine, id, status).await;
        }
    }
}
