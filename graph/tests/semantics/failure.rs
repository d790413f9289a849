//! Statements 15, 17, 19 and 20: durable steps, failures, retries, time limits.

use std::{sync::Arc, time::Duration};

use graph::{
    Context, END, EngineError, GraphBuilder, NodeError, NodeOptions, RetryPolicy, START,
    ServeOptions, ThreadStatus, WaitKind,
};
use lines::Log;
use serde_json::json;

use crate::lab::{
    Count, Notes, NotesUpdate, entries, eventually, log, notes, options, promise, run, said, says,
    serve, start, start_and_run, state, thread, until_status,
};

fn quickly() -> RetryPolicy {
    RetryPolicy::default().first_interval(Duration::from_millis(5))
}

promise! {
    async fn a_step_runs_once_over_waits_and_retries(lab) {
        let (effects, tries) = (Count::default(), Count::default());
        let (effect, attempt) = (effects.clone(), tries.clone());
        let keys = Log::default();
        let seen = keys.clone();
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(quickly()), move |_, ctx: Context| {
                    let (effect, attempt, seen) = (effect.clone(), attempt.clone(), seen.clone());
                    async move {
                        let mut numbers = Vec::new();
                        for _ in 0..2 {
                            let (seen, effect) = (&seen, &effect);
                            let n = ctx.step("pay", |key| async move {
                                seen.add(key.to_string());
                                Ok::<_, NodeError>(effect.up())
                            }).await?;
                            numbers.push(n);
                        }
                        ctx.interrupt::<()>("q", "?").await?;
                        if attempt.up() < 3 {
                            return Err(NodeError::msg("not yet"));
                        }
                        Ok(log(format!("{numbers:?}")))
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["[1, 2]"]);
        assert_eq!((effects.get(), tries.get()), (2, 3));
        let keys = keys.all();
        assert_eq!(keys.len(), 2);
        assert_ne!(keys[0], keys[1], "each step has a key of its own");
    }
}

promise! {
    async fn the_error_of_a_step_is_not_remembered_and_its_key_stays(lab) {
        let tries = Count::default();
        let attempt = tries.clone();
        let keys = Log::default();
        let seen = keys.clone();
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(quickly()), move |_, ctx: Context| {
                    let (attempt, seen) = (attempt.clone(), seen.clone());
                    async move {
                        let (seen, attempt) = (&seen, &attempt);
                        let n = ctx.step("call", |key| async move {
                            seen.add(key.to_string());
                            if attempt.up() < 3 { Err(std::io::Error::other("refused")) } else { Ok(7) }
                        }).await?;
                        Ok(log(n.to_string()))
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["7"]);
        let keys = keys.all();
        assert_eq!(keys.len(), 3);
        assert!(keys.iter().all(|key| *key == keys[0]));
    }
}

promise! {
    async fn a_failed_task_is_tried_as_often_as_the_policy_says(lab) {
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(quickly()), |_, ctx: Context| async move {
                    ctx.say_now(&format!("try {}", ctx.attempt()), "tries", "try", &ctx.attempt()).await?;
                    Err::<(), _>(NodeError::msg("never works"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert_eq!(failed.error.as_deref(), Some("node `a`: never works"));
        assert_eq!(said(&engine, "tries").await, ["try 1", "try 2", "try 3"]);
        assert_eq!(
            said(&engine, "t").await,
            [format!("thread.failed {}", json!({"error": "node `a`: never works", "node": "a"}))]
        );
        // Retried by hand, it has as many again, and the count goes on.
        engine.retry("t").await.expect("retries");
        run(&engine).await;
        assert_eq!(said(&engine, "tries").await.len(), 6);
        assert_eq!(said(&engine, "tries").await[5], "try 6");
        assert_eq!(said(&engine, "t").await.len(), 2);
    }
}

promise! {
    async fn a_node_without_a_policy_is_tried_once(lab) {
        let tries = Count::default();
        let attempt = tries.clone();
        let engine = lab.notes(
            notes("g")
                .node("a", move |_, _| {
                    attempt.up();
                    async { Err::<(), _>(NodeError::msg("no")) }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Failed);
        assert_eq!(tries.get(), 1);
    }
}

promise! {
    async fn fatal_failures_and_those_the_predicate_refuses_are_not_retried(lab) {
        let tries = Count::default();
        let attempt = tries.clone();
        let engine = lab.notes(
            notes("g")
                .node_with(
                    "a",
                    NodeOptions::default().retry(quickly().when(NodeError::is_retryable)),
                    move |s: Arc<Notes>, _| {
                        let attempt = attempt.clone();
                        async move {
                            attempt.up();
                            Err::<(), _>(match s.last.as_str() {
                                "fatal" => NodeError::retryable("x").fatal(),
                                "retryable" => NodeError::retryable("x"),
                                _ => NodeError::msg("x"),
                            })
                        }
                    },
                )
                .edge(START, "a").edge("a", END),
        ).await;
        let mut before = 0;
        for (case, tried) in [("fatal", 1), ("retryable", 3), ("plain", 1)] {
            let input = NotesUpdate::default().last(case.into());
            engine.start(case, "g", &input, graph::StartOptions::default()).await.expect("starts");
            run(&engine).await;
            assert_eq!(tries.get() - before, tried, "{case}");
            before = tries.get();
        }
    }
}

promise! {
    async fn a_panic_counts_as_an_attempt(lab) {
        let tries = Count::default();
        let attempt = tries.clone();
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(quickly()), move |_, _| {
                    let attempt = attempt.clone();
                    async move {
                        let n = attempt.up();
                        assert!(n > 1, "the first one panics");
                        Ok(log("survived"))
                    }
                })
                .node("b", |s: Arc<Notes>, _| async move {
                    let [_, _, third] = &s.log[..] else { panic!("there are {} lines", s.log.len()) };
                    Ok(log(third.clone()))
                })
                .edge(START, "a").edge("a", "b").edge("b", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(tries.get(), 2);
        assert_eq!(failed.error.as_deref(), Some("node `b`: node `b` panicked: there are 1 lines"));
    }
}

promise! {
    async fn attempts_are_counted_over_crashes(lab) {
        // The process dies in the third attempt; the next one makes the third attempt, not the first.
        let starts = Count::default();
        let graph = |dies: bool| {
            let starts = starts.clone();
            notes("g")
                .node_with("a", NodeOptions::default().retry(quickly().attempts(4)), move |_, ctx: Context| {
                    let starts = starts.clone();
                    async move {
                        let attempt = ctx.attempt();
                        ctx.say_now(&starts.up().to_string(), "tries", "try", &attempt).await?;
                        if attempt == 3 && dies {
                            std::future::pending::<()>().await;
                        }
                        Err::<(), _>(NodeError::msg("no"))
                    }
                })
                .edge(START, "a").edge("a", END)
        };
        let first = lab.notes(graph(true)).await;
        start(&first).await;
        let server = serve(&first, ServeOptions { lease: Duration::from_millis(300), ..options() });
        eventually("the third attempt", || async { said(&first, "tries").await.len() == 3 }).await;
        drop(server);
        let second = lab.notes(graph(false)).await;
        let server = serve(&second, options());
        until_status(&second, "t", ThreadStatus::Failed).await;
        assert_eq!(said(&second, "tries").await, ["try 1", "try 2", "try 3", "try 3", "try 4"]);
        server.drain().await;
    }
}

promise! {
    async fn a_long_interval_is_a_timer_and_not_a_held_lease(lab) {
        let policy = RetryPolicy::default().first_interval(Duration::from_hours(1)).ceiling(Duration::from_hours(1)).jitter(false);
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(policy), |_, _| async {
                    Err::<(), _>(NodeError::msg("no"))
                })
                .node("b", |_, _| says("b"))
                .edge(START, "a").edge(START, "b").edge("a", END).edge("b", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!((waiting.status, waiting.lease.is_none()), (ThreadStatus::Waiting, true));
        assert_eq!((waiting.waits[0].name.as_str(), waiting.waits[0].kind), ("retry", WaitKind::Timer));
        let due = waiting.wake_at.expect("has a time").duration_since(jiff::Timestamp::now());
        assert!((3500..3700).contains(&due.as_secs()), "{due}");
    }
}

promise! {
    async fn a_timer_for_the_next_attempt_fires(lab) {
        let tries = Count::default();
        let attempt = tries.clone();
        // Longer than what a run waits for itself.
        let policy = RetryPolicy::default().first_interval(Duration::from_millis(2050)).jitter(false);
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(policy), move |_, ctx: Context| {
                    let attempt = attempt.clone();
                    async move {
                        assert_eq!(ctx.attempt() as usize, attempt.up());
                        if ctx.attempt() == 1 { return Err(NodeError::msg("no")); }
                        Ok(log("worked"))
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start(&engine).await;
        let server = serve(&engine, options());
        until_status(&engine, "t", ThreadStatus::Waiting).await;
        until_status(&engine, "t", ThreadStatus::Done).await;
        assert_eq!(state(&engine).await.log, ["worked"]);
        server.drain().await;
    }
}

/// `good` finishes, `bad` fails as long as it is told to.
fn good_and_bad(good: Count, bad: Count, until: usize) -> GraphBuilder<Notes> {
    notes("g")
        .node("good", move |_, ctx: Context| {
            let good = good.clone();
            async move {
                good.up();
                ctx.emit("s", "good", &())?;
                Ok(log("good"))
            }
        })
        .node("bad", move |_, ctx: Context| {
            let bad = bad.clone();
            async move {
                ctx.emit("s", "bad", &())?;
                if bad.up() < until {
                    return Err(NodeError::msg("bad luck"));
                }
                Ok(log("bad"))
            }
        })
        .edge(START, "good")
        .edge(START, "bad")
        .edge("good", END)
        .edge("bad", END)
}

promise! {
    async fn when_a_sibling_fails_a_retry_runs_only_what_failed(lab) {
        let (good, bad) = (Count::default(), Count::default());
        let engine = lab.notes(good_and_bad(good.clone(), bad.clone(), 3)).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Failed);
        assert_eq!(said(&engine, "s").await, ["good null"]);
        for _ in 0..2 {
            engine.retry("t").await.expect("retries");
            run(&engine).await;
        }
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!((good.get(), bad.get()), (1, 3));
        assert_eq!(state(&engine).await.log, ["bad", "good"]);
        assert_eq!(said(&engine, "s").await, ["good null", "bad null"]);
        let error = engine.retry("t").await.expect_err("is refused");
        assert!(matches!(error, EngineError::NotRetryable { status: ThreadStatus::Done, .. }));
    }
}

promise! {
    async fn what_a_task_did_is_durable_while_its_siblings_still_run(lab) {
        let (quick, slow) = (Count::default(), Count::default());
        let graph = || {
            let (runs, slow) = (quick.clone(), slow.clone());
            notes("g")
                .node("quick", move |_, _| { runs.up(); says("quick") })
                .node("slow", move |_, _| {
                    let slow = slow.clone();
                    async move {
                        if slow.up() == 1 {
                            std::future::pending::<()>().await;
                        }
                        Ok(log("slow"))
                    }
                })
                .edge(START, "quick").edge(START, "slow")
                .edge("quick", END).edge("slow", END)
        };
        let first = lab.notes(graph()).await;
        start(&first).await;
        let server = serve(&first, ServeOptions { lease: Duration::from_millis(400), ..options() });
        let store = lab.store.clone();
        eventually("the result of the quick one is in the database", || {
            let store = store.clone();
            async move {
                // A lease like the one of the run.
                let Some(lease) = store.thread(&"t".into()).await.expect("reads").expect("is there").lease else {
                    return false;
                };
                let lease = graph::checkpoint::Lease { thread: "t".into(), token: lease.token };
                store.load(&lease).await.is_ok_and(|loaded| {
                    loaded.writes.iter().any(|write| {
                        write.task == "quick" && write.kind == graph::checkpoint::WriteKind::Result
                    })
                })
            }
        }).await;
        drop(server);
        let second = lab.notes(graph()).await;
        let server = serve(&second, options());
        until_status(&second, "t", ThreadStatus::Done).await;
        assert_eq!(state(&second).await.log, ["quick", "slow"]);
        assert_eq!(quick.get(), 1);
        server.drain().await;
    }
}

promise! {
    async fn a_task_that_takes_too_long_fails_and_what_it_said_at_once_stays(lab) {
        // On a machine that stands still, a second may be too little to say something: then there is more of it.
        let mut patience = Duration::from_millis(1200);
        loop {
            let engine = lab.notes(
                notes("g")
                    .node_with(
                        "a",
                        NodeOptions::default().timeout(patience).retry(quickly().attempts(2)),
                        move |_, ctx: Context| async move {
                            ctx.emit("s", "with the commit", &())?;
                            ctx.say_now(&format!("spent {} of {patience:?}", ctx.attempt()), "s", "spent", &patience).await?;
                            std::future::pending::<()>().await;
                            Ok(log("late"))
                        },
                    )
                    .edge(START, "a").edge("a", END),
            ).await;
            let failed = start_and_run(&engine).await;
            assert_eq!(failed.error, Some(format!("node `a`: node `a` took longer than {patience:?}")));
            assert!(state(&engine).await.log.is_empty());
            let said = entries(&engine, "s").await;
            assert!(said.iter().all(|entry| entry.name == "spent"), "{said:?}");
            let spent = json!(patience);
            if said.iter().filter(|entry| entry.payload == spent).count() == 2 {
                break;
            }
            patience *= 2;
            assert!(patience < Duration::from_secs(10), "{said:?}");
            engine.delete("t").await.expect("deletes");
        }
    }
}

promise! {
    async fn a_task_without_signs_of_life_fails_and_one_with_them_does_not(lab) {
        // On a machine that stands still, signs of life come late: then they may.
        let mut idle = Duration::from_secs(1);
        loop {
            let options = || NodeOptions::default().idle_timeout(idle);
            let engine = lab.notes(
                notes("g")
                    .node_with("alive", options(), move |_, ctx: Context| async move {
                        for _ in 0..15 {
                            tokio::time::sleep(idle / 10).await;
                            ctx.heartbeat();
                        }
                        Ok(log("alive"))
                    })
                    .node_with("dead", options(), |_, _| async { std::future::pending::<()>().await; Ok(log("dead")) })
                    .edge(START, "alive").edge("alive", "dead").edge("dead", END),
            ).await;
            let failed = start_and_run(&engine).await;
            let why = failed.error.expect("says why");
            assert!(why.contains(&format!("no sign of life for {idle:?}")), "{why}");
            if state(&engine).await.log == ["alive"] {
                break;
            }
            idle *= 2;
            assert!(idle < Duration::from_secs(10), "one with signs of life failed: {why}");
            engine.delete("t").await.expect("deletes");
        }
    }
}

mod lines {
    use std::sync::{Arc, Mutex};

    /// Lines in the order in which they came.
    #[derive(Clone, Default)]
    pub struct Log(Arc<Mutex<Vec<String>>>);

    impl Log {
        pub fn add(&self, line: String) {
            self.0.lock().expect("no panic").push(line);
        }

        pub fn all(&self) -> Vec<String> {
            self.0.lock().expect("no panic").clone()
        }
    }
}

promise! {
    async fn a_value_that_cannot_be_stored_fails_the_thread_and_says_so(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let mut deep = serde_json::Value::Null;
                    for _ in 0..200 {
                        deep = json!([deep]);
                    }
                    ctx.emit("s", "deep", &deep)?;
                    Ok(log("a"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let ended = start_and_run(&engine).await;
        if lab.store.name() == "memory" {
            // Nothing is written there, so nothing has to be read back.
            assert_eq!(ended.status, ThreadStatus::Done);
            return;
        }
        assert_eq!(ended.status, ThreadStatus::Failed);
        assert!(ended.error.expect("says why").contains("cannot be stored"));
        assert!(said(&engine, "s").await.is_empty());
    }
}
