//! Statements 1 to 9: what runs when, and what it sees.

use std::sync::Arc;

use graph::{
    Command, Context, END, Engine, EngineError, Goto, HistoryFilter, NodeOptions, START, Send,
    StartOptions, ThreadStatus,
};
use serde_json::json;
use tokio::sync::Barrier;

use crate::lab::{
    Count, Notes, NotesUpdate, Peak, log, notes, promise, run, says, start, start_and_run,
    start_as, state, takes, thread, thread_as,
};
use crate::storage::faulty::Faulty;

promise! {
    async fn channels_do_not_change_during_a_step(lab) {
        // Both see the state from before the step, though one has long finished when the other looks.
        let barrier = Arc::new(Barrier::new(2));
        let (first, second) = (barrier.clone(), barrier);
        let engine = lab.notes(
            notes("g")
                .node("a", move |s: Arc<Notes>, _| {
                    let barrier = first.clone();
                    async move {
                        let seen = s.sum;
                        barrier.wait().await;
                        Ok(log(format!("a saw {seen}")).sum(1))
                    }
                })
                .node("b", move |s: Arc<Notes>, _| {
                    let barrier = second.clone();
                    async move {
                        barrier.wait().await;
                        takes(20).await;
                        Ok(log(format!("b saw {}", s.sum)).sum(10))
                    }
                })
                .node("c", |s: Arc<Notes>, _| async move { Ok(log(format!("c saw {}", s.sum))) })
                .edge(START, "a")
                .edge(START, "b")
                .join(["a", "b"], "c")
                .edge("c", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a saw 0", "b saw 0", "c saw 11"]);
    }
}

promise! {
    async fn a_node_runs_once_for_each_step_in_which_it_was_triggered(lab) {
        // b and c trigger d in one step: it runs once. e triggers it a step later: once more.
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a"))
                .node("b", |_, _| says("b"))
                .node("c", |_, _| says("c"))
                .node("d", |_, _| says("d"))
                .node("e", |_, _| says("e"))
                .edge(START, "a")
                .edge("a", "b")
                .edge("a", "c")
                .edge("b", "d")
                .edge("c", "d")
                .edge("c", "e")
                .edge("e", "d")
                .edge("d", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c", "d", "e", "d"]);
        assert_eq!(thread(&engine).await.step, 4);
    }
}

promise! {
    async fn writes_are_applied_by_task_path_whatever_finishes_first(lab) {
        let engine = lab.notes(
            notes("g")
                .node("start", |_, _| async {
                    Ok(Command::<Notes>::goto("a").and(Goto::sends([
                        Send::new("z", &30),
                        Send::new("z", &0),
                        Send::new("b", &0),
                    ])).and("c"))
                })
                .node("a", |_, _| async { takes(40).await; Ok(log("a")) })
                .node("b", |_, _| says("b sent"))
                .node("c", |_, _| async { takes(20).await; Ok(log("c")) })
                .node("z", |_, ctx: Context| async move {
                    let wait: u64 = ctx.argument()?;
                    takes(wait).await;
                    Ok(log(format!("z {wait}")))
                })
                .edge(START, "start")
                .goes("start", ["a", "b", "c", "z"])
                .edge("a", END).edge("b", END).edge("c", END).edge("z", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "c", "z 30", "z 0", "b sent"]);
        // Planned were the sends first, in order, then the nodes by name.
        let history = engine.history("t", HistoryFilter::default()).await.expect("reads");
        assert_eq!(history[1].next, ["z", "z", "b", "a", "c"]);
    }
}

promise! {
    async fn two_updates_of_a_last_value_channel_in_one_step_are_an_error(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(NotesUpdate::default().last("a".into())) })
                .node("b", |_, _| async { Ok(NotesUpdate::default().last("b".into())) })
                .edge(START, "a").edge(START, "b").edge("a", END).edge("b", END),
        ).await;
        let thread = start_and_run(&engine).await;
        assert_eq!(thread.status, ThreadStatus::Failed);
        let error = thread.error.expect("says why");
        for word in ["`last`", "`a`", "`b`"] {
            assert!(error.contains(word), "{word} is not in: {error}");
        }
        assert_eq!(state(&engine).await, Notes::default());
    }
}

promise! {
    async fn each_send_starts_a_task_with_its_own_argument(lab) {
        let engine = lab.notes(
            notes("g")
                .node("split", |_, _| says("split"))
                .node("work", |_, ctx: Context| async move {
                    let n: i64 = ctx.argument()?;
                    Ok(log(format!("work {n}")).sum(n))
                })
                .node("done", |s: Arc<Notes>, _| async move { Ok(log(format!("sum {}", s.sum))) })
                .edge(START, "split")
                .conditional("split", ["work"], |_| {
                    Goto::sends((1..=4).map(|n| Send::new("work", &n)))
                })
                .edge("work", "done")
                .edge("done", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(
            state(&engine).await.log,
            ["split", "work 1", "work 2", "work 3", "work 4", "sum 10"]
        );
        assert_eq!(thread(&engine).await.step, 3);
    }
}

promise! {
    async fn a_limit_on_parallel_tasks_is_kept_and_keeps_the_order_of_results(lab) {
        let (running, most) = (Count::default(), Peak::default());
        let (inside, peak) = (running.clone(), most.clone());
        let engine = lab.notes(
            notes("g")
                .node("work", move |_, ctx: Context| {
                    let (inside, peak) = (inside.clone(), peak.clone());
                    async move {
                        let n: u64 = ctx.argument()?;
                        peak.see(inside.up());
                        takes(12 - n).await;
                        inside.down();
                        Ok(log(n.to_string()))
                    }
                })
                .conditional(START, ["work"], |_| Goto::sends((0..10).map(|n| Send::new("work", &n))))
                .edge("work", END)
                .parallel(3),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
        assert_eq!(most.get(), 3);
        assert_eq!(running.get(), 0);
    }
}

promise! {
    async fn a_superstep_is_one_commit_whatever_number_of_tasks_it_has(lab) {
        let mut commits = 0;
        for round in 0..20 {
            let store = Arc::new(Faulty::commits(lab.store.clone(), |_| None));
            let graph = notes("g")
                .node("split", |_, _| says("split"))
                .node("work", |_, ctx: Context| async move {
                    let n: i64 = ctx.argument()?;
                    ctx.emit("s", "work", &n)?;
                    ctx.signal(&ctx.thread().clone(), "unused", &n.to_string(), &())?;
                    Ok(NotesUpdate::default().sum(1))
                })
                .node("done", |_, _| says("done"))
                .edge(START, "split")
                .conditional("split", ["work"], |_| {
                    Goto::sends((0..30).map(|n| Send::new("work", &n)))
                })
                .edge("work", "done")
                .edge("done", END);
            let engine = Engine::builder(store.clone())
                .graph(graph.compile().expect("compiles"))
                .build()
                .await
                .expect("builds");
            let id = format!("t{round}");
            start_as(&engine, &id).await;
            run(&engine).await;
            let thread = thread_as(&engine, &id).await;
            assert_eq!((thread.status, thread.step), (ThreadStatus::Done, 3));
            assert_eq!(engine.state::<Notes>(&id).await.expect("is there").sum, 30);
            commits = store.seen();
            // More only when the machine was so busy that a task outlived its siblings, whose work was made durable then.
            if commits == 3 {
                break;
            }
        }
        assert_eq!(commits, 3);
    }
}

promise! {
    async fn sending_to_the_end_is_an_error(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a"))
                .edge(START, "a")
                .conditional("a", [END], |_| Goto::send(Send::new(END, &1))),
        ).await;
        let thread = start_and_run(&engine).await;
        assert_eq!(thread.status, ThreadStatus::Failed);
        assert!(thread.error.expect("says why").contains("node `a` sent a task to the end"));
    }
}

promise! {
    async fn sending_to_an_unknown_node_is_an_error(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(Command::<Notes>::send(Send::new("ghost", &1))) })
                .edge(START, "a").edge("a", END),
        ).await;
        let thread = start_and_run(&engine).await;
        assert_eq!(thread.status, ThreadStatus::Failed);
        assert!(thread.error.expect("says why").contains("`ghost`, which is no node"));
    }
}

promise! {
    async fn going_where_nobody_declared_is_an_error(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(Command::<Notes>::goto("c")) })
                .node("b", |_, _| says("b"))
                .node("c", |_, _| says("c"))
                .edge(START, "a").edge("a", "b").edge("b", "c").edge("c", END)
                .goes("a", ["b"]),
        ).await;
        let thread = start_and_run(&engine).await;
        assert!(thread.error.expect("says why").contains("`c`, which is not among the declared targets"));
    }
}

promise! {
    async fn a_join_waits_for_all_in_every_round(lab) {
        // b takes one step, c two; d runs after both, and the loop comes round twice.
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a"))
                .node("b", |_, _| says("b"))
                .node("c1", |_, _| says("c1"))
                .node("c2", |_, _| says("c2"))
                .node("d", |_, _| async { Ok(log("d").sum(1)) })
                .edge(START, "a")
                .edge("a", "b").edge("a", "c1").edge("c1", "c2")
                .join(["b", "c2"], "d")
                .conditional("d", ["a", END], |s: &Notes| if s.sum < 2 { "a" } else { END }),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(
            state(&engine).await.log,
            ["a", "b", "c1", "c2", "d", "a", "b", "c1", "c2", "d"]
        );
    }
}

promise! {
    async fn a_deferred_node_runs_when_nothing_else_is_left(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a"))
                .node("b", |_, _| says("b"))
                .node("c", |_, _| says("c"))
                .node_with("last", NodeOptions::default().deferred(), |_, _| says("last"))
                .edge(START, "a")
                .edge("a", "last").edge("a", "b").edge("b", "c").edge("c", END)
                .edge("last", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c", "last"]);
    }
}

promise! {
    async fn a_conditional_edge_sees_its_own_nodes_writes_only(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(NotesUpdate::default().sum(1)) })
                .node("b", |_, _| async { Ok(NotesUpdate::default().sum(10)) })
                .node("one", |_, _| says("a saw 1"))
                .node("ten", |_, _| says("b saw 10"))
                .node("other", |_, _| says("somebody saw more"))
                .edge(START, "a").edge(START, "b")
                .conditional("a", ["one", "other"], |s: &Notes| if s.sum == 1 { "one" } else { "other" })
                .conditional("b", ["ten", "other"], |s: &Notes| if s.sum == 10 { "ten" } else { "other" })
                .edge("one", END).edge("ten", END).edge("other", END),
        ).await;
        start_and_run(&engine).await;
        let state = state(&engine).await;
        assert_eq!(state.log, ["a saw 1", "b saw 10"]);
        assert_eq!(state.sum, 11);
    }
}

promise! {
    async fn a_command_adds_to_static_edges(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(Command::<Notes>::goto("c").update(log("a"))) })
                .node("b", |_, _| says("b"))
                .node("c", |_, _| says("c"))
                .edge(START, "a").edge("a", "b").goes("a", ["c"])
                .edge("b", END).edge("c", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c"]);
    }
}

promise! {
    async fn a_chain_of_n_nodes_needs_a_limit_of_exactly_n(lab) {
        let chain = |limit| {
            notes("g")
                .node("a", |_, _| says("a"))
                .node("b", |_, _| says("b"))
                .node("c", |_, _| says("c"))
                .edge(START, "a").edge("a", "b").edge("b", "c").edge("c", END)
                .recursion_limit(limit)
        };
        let engine = lab.notes(chain(3)).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);

        let engine = lab.notes(chain(2)).await;
        engine.start("short", "g", &(), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        let short = engine.thread("short").await.expect("reads").expect("is there");
        assert_eq!(short.status, ThreadStatus::Failed);
        assert!(short.error.expect("says why").contains("recursion limit of 2"));
        assert_eq!(short.step, 2);

        // Whoever retries it by hand gives it as many steps again.
        engine.retry("short").await.expect("retries");
        run(&engine).await;
        let short = engine.thread("short").await.expect("reads").expect("is there");
        assert_eq!((short.status, short.step), (ThreadStatus::Done, 3));
    }
}

promise! {
    async fn the_limit_counts_steps_since_the_last_wait(lab) {
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move {
                    let more: bool = ctx.interrupt("more", &()).await?;
                    Ok(log("asked").last(more.to_string()))
                })
                .edge(START, "ask")
                .conditional("ask", ["ask", END], |s: &Notes| if s.last == "true" { "ask" } else { END })
                .recursion_limit(2),
        ).await;
        start(&engine).await;
        for more in [true, true, true, true, false] {
            run(&engine).await;
            let waits = thread(&engine).await.waits;
            engine.answer("t", &waits[0].id, &more).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log.len(), 5);
    }
}

promise! {
    async fn the_output_is_what_the_graph_says_else_the_whole_state(lab) {
        let engine = lab.notes(notes("g").node("a", |_, _| says("a")).edge(START, "a").edge("a", END)).await;
        let thread = start_and_run(&engine).await;
        assert_eq!(thread.output, Some(json!({"log": ["a"], "seen": {}, "sum": 0, "last": ""})));

        let engine = lab.notes(
            notes("h").node("a", |_, _| says("a")).edge(START, "a").edge("a", END)
                .output(|s: &Notes| json!(s.log.len())),
        ).await;
        engine.start("u", "h", &(), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        let thread = engine.thread("u").await.expect("reads").expect("is there");
        assert_eq!(thread.output, Some(json!(1)));
    }
}

promise! {
    async fn starting_is_idempotent_and_checks_the_input(lab) {
        let engine = lab.notes(notes("g").node("a", |_, _| says("a")).edge(START, "a").edge("a", END)).await;
        let first = engine.start("t", "g", &log("input"), StartOptions::default()).await.expect("starts");
        let second = engine.start("t", "g", &log("other"), StartOptions::default()).await.expect("starts");
        assert_eq!((first, second), (graph::Started::New, graph::Started::Existing));
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["input", "a"]);

        let error = engine.start("u", "g", &json!({"nope": 1}), StartOptions::default()).await.expect_err("is refused");
        assert!(error.to_string().contains("no channel `nope`"), "{error}");
        let error = engine.start("u", "g", &json!({"sum": "x"}), StartOptions::default()).await.expect_err("is refused");
        assert!(error.to_string().contains("channel `sum`"), "{error}");
        let error = engine.start("", "g", &(), StartOptions::default()).await.expect_err("is refused");
        assert!(matches!(error, EngineError::InvalidThreadId { .. }));
        let error = engine.start("u", "h", &(), StartOptions::default()).await.expect_err("is refused");
        assert!(error.to_string().contains("knows no graph `h`; it knows `g`"), "{error}");
        assert!(engine.thread("u").await.expect("reads").is_none());
    }
}

promise! {
    async fn long_histories_are_read_back_from_a_snapshot(lab) {
        // More steps than lie between two snapshots, then a fresh process goes on.
        let chain = || notes("g")
            .node("a", |s: Arc<Notes>, _| async move {
                Ok(log(s.sum.to_string()).sum(1).last(format!("step {}", s.sum))
                    .seen([((s.sum % 3).to_string(), s.sum)].into()))
            })
            .node("ask", |_, ctx: Context| async move { ctx.interrupt::<()>("go", &()).await?; Ok(()) })
            .edge(START, "a")
            .conditional("a", ["a", "ask"], |s: &Notes| if s.sum % 80 == 0 { "ask" } else { "a" })
            .conditional("ask", ["a", END], |s: &Notes| if s.sum < 160 { "a" } else { END });
        let engine = lab.notes(chain()).await;
        let waiting = start_and_run(&engine).await;
        let engine = lab.notes(chain()).await;
        engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        let state = state(&engine).await;
        assert_eq!(state.sum, 160);
        assert_eq!(state.log.len(), 160);
        assert_eq!(state.log[159], "159");
        assert_eq!(state.last, "step 159");
        assert_eq!(state.seen, [("0".into(), 159), ("1".into(), 157), ("2".into(), 158)].into());
        let rows = lab.store.state_rows(&"t".into(), None).await.expect("reads");
        assert!(rows.since_snapshot.is_some_and(|since| since < 64), "{:?}", rows.since_snapshot);
        // Every state on the way is still there.
        let at = engine.state_at("t", 50).await.expect("reads");
        assert_eq!((&at["sum"], at["log"].as_array().map(Vec::len)), (&json!(50), Some(50)));
    }
}

promise! {
    async fn a_loop_of_a_thousand_steps_comes_to_its_end(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(NotesUpdate::default().sum(1)) })
                .edge(START, "a")
                .conditional("a", ["a", END], |s: &Notes| if s.sum < 1000 { "a" } else { END }),
        ).await;
        assert_eq!(start_and_run(&engine).await.step, 1000);
    }
}
