//! Further inputs to busy threads (26).

use std::{sync::Arc, time::Duration};

use graph::{
    Arrived, Busy, Context, Delivered, END, Engine, EngineError, GraphBuilder, HistoryFilter,
    NodeError, START, ServeOptions, Source, StartOptions, ThreadStatus, WaitFor,
};

use crate::lab::{
    Count, Lab, Notes, NotesUpdate, eventually, log, notes, options, promise, run, said, serve,
    start, start_and_run, state, thread, thread_as, until_cancelled, until_status,
};

/// A graph `g`: `a` logs, and unless the state says `quick`, `b` goes on until it is stopped.
fn long(begun: &Count) -> GraphBuilder<Notes> {
    let begun = begun.clone();
    notes("g")
        .node("a", |notes: Arc<Notes>, _| async move {
            Ok(log(format!("a after {}", notes.log.len())))
        })
        .node("b", move |notes: Arc<Notes>, ctx: Context| {
            let begun = begun.clone();
            async move {
                if notes.last != "quick" {
                    begun.up();
                    until_cancelled(&ctx).await;
                    return Err(NodeError::msg("was stopped"));
                }
                Ok(log("b"))
            }
        })
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", END)
}

/// A graph `g`: `a` asks, unless the state says `quick`.
fn asking() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |notes: Arc<Notes>, ctx: Context| async move {
            if notes.last != "quick" {
                let answer: String = ctx.interrupt("q", "?").await?;
                return Ok(log(format!("told {answer}")));
            }
            Ok(log(format!("a after {}", notes.log.len())))
        })
        .edge(START, "a")
        .edge("a", END)
}

fn quick(line: &str) -> NotesUpdate {
    log(line).last("quick".to_owned())
}

async fn input(engine: &Engine, key: &str, update: &NotesUpdate, busy: Busy) {
    let delivered = engine
        .input("t", key, update, busy)
        .await
        .expect("is taken");
    assert_eq!(delivered, Delivered::New);
}

fn brief() -> ServeOptions {
    ServeOptions {
        poll: Duration::from_millis(20),
        ..options()
    }
}

/// Runs a round that goes on for ever, stops it with a quick input from `sender`, and waits for the end.
async fn stop_a_running_round(lab: &Lab, busy: Busy, elsewhere: bool) -> Engine {
    let begun = Count::default();
    let engine = lab.notes(long(&begun)).await;
    engine
        .start("t", "g", &log("first"), StartOptions::default())
        .await
        .expect("starts");
    let server = serve(&engine, brief());
    eventually("it runs", || async { begun.get() == 1 }).await;
    if elsewhere {
        let other = lab.notes(long(&begun)).await;
        input(&other, "1", &quick("second"), busy).await;
    } else {
        input(&engine, "1", &quick("second"), busy).await;
    }
    until_status(&engine, "t", ThreadStatus::Done).await;
    server.drain().await;
    engine
}

promise! {
    async fn an_interrupting_input_stops_the_round_and_keeps_what_it_did(lab) {
        let engine = stop_a_running_round(&lab, Busy::Interrupt, false).await;
        assert_eq!(state(&engine).await.log, ["first", "a after 1", "second", "a after 3", "b"]);
        let history = engine.history("t", HistoryFilter::default()).await.expect("has one");
        assert!(history.iter().all(|checkpoint| checkpoint.branch == 0));
        // The stopped round has no end of its own.
        assert_eq!(said(&engine, "t").await, ["thread.done {}"]);
    }
}

promise! {
    async fn an_interrupting_input_reaches_a_round_in_another_process(lab) {
        let engine = stop_a_running_round(&lab, Busy::Interrupt, true).await;
        assert_eq!(state(&engine).await.log, ["first", "a after 1", "second", "a after 3", "b"]);
    }
}

promise! {
    async fn a_rollback_begins_where_the_thread_stood_before_the_round(lab) {
        let engine = stop_a_running_round(&lab, Busy::Rollback, false).await;
        // It was the thread's first round.
        assert_eq!(state(&engine).await.log, ["second", "a after 1", "b"]);
        let head = thread(&engine).await;
        assert_eq!(head.branch, 1);
        // What was done is still there, on the branch that was left.
        let old = engine.state_at("t", 1).await.expect("is there");
        assert_eq!(old["log"], serde_json::json!(["first", "a after 1"]));
        let history = engine.history("t", HistoryFilter { branch: Some(1), ..HistoryFilter::default() }).await.expect("has one");
        assert_eq!(history[2].source, Source::Input);
        assert_eq!(history.len(), 4, "an input, two steps, and the thread's beginning");
    }
}

promise! {
    async fn a_rollback_reaches_a_round_in_another_process(lab) {
        let engine = stop_a_running_round(&lab, Busy::Rollback, true).await;
        assert_eq!(state(&engine).await.log, ["second", "a after 1", "b"]);
    }
}

promise! {
    async fn a_rollback_undoes_only_the_round_under_way(lab) {
        let engine = lab.notes(asking()).await;
        engine.start("t", "g", &quick("one"), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        input(&engine, "2", &log("two").last(String::new()), Busy::Reject).await;
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Waiting);
        input(&engine, "3", &quick("three"), Busy::Rollback).await;
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["one", "a after 1", "three", "a after 3"]);
        // And again, from the new branch.
        input(&engine, "4", &log("four").last(String::new()), Busy::Rollback).await;
        run(&engine).await;
        let asks = thread(&engine).await;
        input(&engine, "5", &quick("five"), Busy::Rollback).await;
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["one", "a after 1", "three", "a after 3", "five", "a after 5"]);
        let error = engine.answer("t", &asks.waits[0].id, "late").await.expect_err("is of another branch");
        assert!(matches!(error, EngineError::OtherBranch { branch: 1, head: 2, .. }), "{error}");
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn an_interrupted_sleeper_asks_anew_and_the_old_answer_is_an_error(lab) {
        let engine = lab.notes(asking()).await;
        let first = start_and_run(&engine).await;
        input(&engine, "1", &log("second"), Busy::Interrupt).await;
        run(&engine).await;
        let second = thread(&engine).await;
        assert_eq!(second.status, ThreadStatus::Waiting);
        assert_ne!(first.waits[0].id, second.waits[0].id);
        let error = engine.answer("t", &first.waits[0].id, "old").await.expect_err("is gone");
        assert!(matches!(error, EngineError::UnknownInterrupt { .. }), "{error}");
        engine.answer("t", &second.waits[0].id, "new").await.expect("is open");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["second", "told new"]);
    }
}

promise! {
    async fn an_answer_on_its_way_goes_with_the_round_that_asked(lab) {
        for busy in [Busy::Interrupt, Busy::Rollback] {
            let id = format!("{busy:?}");
            let engine = lab.notes(asking()).await;
            engine.start(id.as_str(), "g", &log("first"), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            let asks = thread_as(&engine, &id).await;
            // Nobody runs the thread between these two.
            engine.answer(id.as_str(), &asks.waits[0].id, "old").await.expect("is open");
            engine.input(id.as_str(), "1", &log("second"), busy).await.expect("is taken");
            run(&engine).await;
            let asks = thread_as(&engine, &id).await;
            assert_eq!(asks.status, ThreadStatus::Waiting, "{busy:?}");
            engine.answer(id.as_str(), &asks.waits[0].id, "new").await.expect("is open");
            run(&engine).await;
            let notes: Notes = engine.state(id.as_str()).await.expect("has a state");
            assert_eq!(notes.log.last().map(String::as_str), Some("told new"));
        }
    }
}

promise! {
    async fn several_inputs_keep_their_order(lab) {
        type Case = (&'static [(&'static str, Busy)], &'static [&'static str]);
        let cases: [Case; 4] = [
            (&[("1", Busy::Enqueue), ("2", Busy::Interrupt), ("3", Busy::Enqueue)],
             &["first", "1", "2", "a after 3", "3", "a after 5"]),
            (&[("1", Busy::Interrupt), ("2", Busy::Interrupt)], &["first", "1", "2", "a after 3"]),
            (&[("1", Busy::Enqueue), ("2", Busy::Rollback), ("3", Busy::Enqueue)], &["1", "2", "a after 2", "3", "a after 4"]),
            (&[("1", Busy::Interrupt), ("2", Busy::Rollback)], &["first", "2", "a after 2"]),
        ];
        let engine = lab.notes(asking()).await;
        for (number, (inputs, expected)) in cases.into_iter().enumerate() {
            let id = format!("t{number}");
            engine.start(id.as_str(), "g", &log("first"), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            for (key, busy) in inputs {
                engine.input(id.as_str(), key, &quick(key), *busy).await.expect("is taken");
            }
            run(&engine).await;
            let notes: Notes = engine.state(id.as_str()).await.expect("has a state");
            assert_eq!(notes.log, expected, "{inputs:?}");
            assert_eq!(thread_as(&engine, &id).await.status, ThreadStatus::Done);
        }
    }
}

promise! {
    async fn an_input_counts_once_whatever_is_said_of_it(lab) {
        let engine = lab.notes(asking()).await;
        start_and_run(&engine).await;
        input(&engine, "1", &quick("second"), Busy::Interrupt).await;
        for busy in [Busy::Interrupt, Busy::Rollback, Busy::Enqueue] {
            let again = engine.input("t", "1", &quick("again"), busy).await.expect("is known");
            assert_eq!(again, Delivered::Duplicate);
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["second", "a after 1"]);
        let again = engine.input("t", "1", &quick("again"), Busy::Rollback).await.expect("is known");
        assert_eq!(again, Delivered::Duplicate);
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["second", "a after 1"]);
        let error = engine.input("t", "2", &serde_json::json!({"nope": 1}), Busy::Rollback).await.expect_err("does not fit");
        assert!(matches!(error, EngineError::Channel(_)), "{error}");
    }
}

promise! {
    async fn an_ended_round_is_neither_stopped_nor_rolled_back(lab) {
        let engine = lab.notes(asking()).await;
        engine.start("t", "g", &quick("one"), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        input(&engine, "2", &quick("two"), Busy::Rollback).await;
        run(&engine).await;
        input(&engine, "3", &quick("three"), Busy::Interrupt).await;
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["one", "a after 1", "two", "a after 3", "three", "a after 5"]);
        assert_eq!(said(&engine, "t").await.len(), 3);
    }
}

promise! {
    async fn a_round_that_ends_while_it_is_stopped_has_ended(lab) {
        for busy in [Busy::Interrupt, Busy::Rollback] {
            let id = format!("{busy:?}");
            let begun = Count::default();
            let counted = begun.clone();
            let engine = lab.notes(
                notes("g")
                    .node("a", move |notes: Arc<Notes>, ctx: Context| {
                        let begun = counted.clone();
                        async move {
                            if notes.last != "quick" {
                                begun.up();
                                until_cancelled(&ctx).await;
                            }
                            // It has what it needs, and hands it back.
                            Ok(log("made it"))
                        }
                    })
                    .edge(START, "a")
                    .edge("a", END),
            ).await;
            engine.start(id.as_str(), "g", &log("first"), StartOptions::default()).await.expect("starts");
            let server = serve(&engine, brief());
            eventually("it runs", || async { begun.get() == 1 }).await;
            engine.input(id.as_str(), "1", &quick("second"), busy).await.expect("is taken");
            eventually("both rounds end", || async { said(&engine, &id).await.len() == 2 }).await;
            server.drain().await;
            let notes: Notes = engine.state(id.as_str()).await.expect("has a state");
            assert_eq!(notes.log, ["first", "made it", "second", "made it"]);
        }
    }
}

promise! {
    async fn children_of_a_stopped_round_are_cancelled_and_others_are_not(lab) {
        for busy in [Busy::Interrupt, Busy::Rollback] {
            let id = format!("{busy:?}");
            let parent = notes("g")
                .node("a", |notes: Arc<Notes>, ctx: Context| async move {
                    ctx.spawn(&notes.last, "child", &NotesUpdate::default())?;
                    Ok(NotesUpdate::default())
                })
                .node("b", |notes: Arc<Notes>, ctx: Context| async move {
                    if notes.last == "asks" {
                        ctx.interrupt::<()>("q", "?").await?;
                    }
                    Ok(log("b"))
                })
                .edge(START, "a")
                .edge("a", "b")
                .edge("b", END);
            let child = notes("child")
                .node("c", |_, ctx: Context| async move {
                    ctx.interrupt::<()>("q", "?").await?;
                    Ok(())
                })
                .edge(START, "c")
                .edge("c", END);
            let engine = Engine::builder(lab.store.clone())
                .graph(parent.compile().expect("compiles"))
                .graph(child.compile().expect("compiles"))
                .build()
                .await
                .expect("builds");
            let says = |word: &str| NotesUpdate::default().last(word.to_owned());
            engine.start(id.as_str(), "g", &says("one"), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            engine.input(id.as_str(), "2", &says("asks"), Busy::Reject).await.expect("is taken");
            run(&engine).await;
            engine.input(id.as_str(), "3", &says("three"), busy).await.expect("is taken");
            run(&engine).await;
            assert_eq!(thread_as(&engine, &id).await.status, ThreadStatus::Done);
            for (child, status) in [("one", ThreadStatus::Waiting), ("asks", ThreadStatus::Cancelled), ("three", ThreadStatus::Waiting)] {
                let child = thread_as(&engine, &format!("{id}/{child}")).await;
                assert_eq!(child.status, status, "{busy:?} {}", child.id);
            }
        }
    }
}

promise! {
    async fn what_a_stopped_round_did_is_not_taken_for_what_the_next_one_does(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |notes: Arc<Notes>, ctx: Context| async move {
                    let key: String = ctx.step("pay", |key| async move { Ok::<_, NodeError>(key.to_string()) }).await?;
                    ctx.emit("keys", "paid", &key)?;
                    if notes.last != "quick" {
                        ctx.interrupt::<()>("q", "?").await?;
                    }
                    Ok(())
                })
                .edge(START, "a")
                .edge("a", END),
        ).await;
        start_and_run(&engine).await;
        input(&engine, "1", &log("second"), Busy::Interrupt).await;
        run(&engine).await;
        input(&engine, "2", &log("third"), Busy::Rollback).await;
        run(&engine).await;
        input(&engine, "3", &quick("fourth"), Busy::Interrupt).await;
        run(&engine).await;
        let mut keys = said(&engine, "keys").await;
        assert_eq!(keys.len(), 4);
        keys.sort();
        keys.dedup();
        assert_eq!(keys.len(), 4, "each round pays with a key of its own");
    }
}

promise! {
    async fn a_round_that_has_failed_makes_way_for_the_next_input(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let engine = lab.notes(
            notes("g")
                .node("a", move |notes: Arc<Notes>, _| {
                    counted.up();
                    async move {
                        if notes.last == "quick" { Ok(log("a")) } else { Err(NodeError::msg("bad")) }
                    }
                })
                .edge(START, "a")
                .edge("a", END),
        ).await;
        for (id, busy) in [("t", Busy::Reject), ("u", Busy::Enqueue), ("v", Busy::Rollback)] {
            let before = runs.get();
            engine.start(id, "g", &log("first"), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            assert_eq!(thread_as(&engine, id).await.status, ThreadStatus::Failed);
            engine.input(id, "1", &quick("second"), busy).await.expect("is taken");
            run(&engine).await;
            assert_eq!(thread_as(&engine, id).await.status, ThreadStatus::Done);
            let notes: Notes = engine.state(id).await.expect("has a state");
            assert_eq!(notes.log, ["first", "second", "a"]);
            assert_eq!(runs.get() - before, 2, "what failed is not tried again");
        }
        // An input that was queued while the round was under way waits for its end, also after a retry.
        engine.start("w", "g", &log("first"), StartOptions::default()).await.expect("starts");
        engine.input("w", "1", &log("second"), Busy::Enqueue).await.expect("is taken");
        engine.input("w", "2", &quick("third"), Busy::Enqueue).await.expect("is taken");
        run(&engine).await;
        assert_eq!(thread_as(&engine, "w").await.status, ThreadStatus::Done);
        assert_eq!(said(&engine, "w").await.len(), 3);
    }
}

promise! {
    async fn a_round_stopped_before_its_first_step_leaves_its_input(lab) {
        let engine = lab.notes(asking()).await;
        start(&engine).await;
        input(&engine, "1", &quick("second"), Busy::Interrupt).await;
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["second", "a after 1"]);
        assert_eq!(said(&engine, "t").await.len(), 1);
    }
}

promise! {
    async fn a_thread_that_stops_between_nodes_makes_way_too(lab) {
        for busy in [Busy::Interrupt, Busy::Rollback] {
            let id = format!("{busy:?}");
            let engine = lab.notes(asking().interrupt_before(["a"])).await;
            engine.start(id.as_str(), "g", &log("first"), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            let stops = thread_as(&engine, &id).await;
            engine.input(id.as_str(), "1", &quick("second"), busy).await.expect("is taken");
            run(&engine).await;
            let again = thread_as(&engine, &id).await;
            assert_eq!(again.waits[0].name, "before:a");
            assert_ne!(again.waits[0].id, stops.waits[0].id);
            assert!(engine.answer(id.as_str(), &stops.waits[0].id, &()).await.is_err());
            engine.answer(id.as_str(), &again.waits[0].id, &()).await.expect("is open");
            run(&engine).await;
            assert_eq!(thread_as(&engine, &id).await.status, ThreadStatus::Done);
        }
    }
}

promise! {
    async fn a_round_whose_beginning_is_forgotten_is_not_rolled_back(lab) {
        for rounds in [1, 2] {
            let id = format!("t{rounds}");
            let engine = lab.notes(
                notes("g")
                    .node("a", |_, _| async { Ok(log("a")) })
                    .node("b", |notes: Arc<Notes>, ctx: Context| async move {
                        if notes.last != "quick" {
                            ctx.interrupt::<()>("q", "?").await?;
                        }
                        Ok(log("b"))
                    })
                    .edge(START, "a")
                    .edge("a", "a2")
                    .node("a2", |_, _| async { Ok(()) })
                    .edge("a2", "b")
                    .edge("b", END),
            ).await;
            let mut expected = Vec::new();
            if rounds == 2 {
                engine.start(id.as_str(), "g", &quick("one"), StartOptions::default()).await.expect("starts");
                run(&engine).await;
                engine.input(id.as_str(), "2", &log("two").last(String::new()), Busy::Reject).await.expect("is taken");
                expected.extend(["one", "a", "b"]);
            } else {
                engine.start(id.as_str(), "g", &log("two"), StartOptions::default()).await.expect("starts");
            }
            run(&engine).await;
            engine.prune(id.as_str(), graph::Keep::latest()).await.expect("prunes");
            engine.input(id.as_str(), "3", &quick("three"), Busy::Rollback).await.expect("is taken");
            run(&engine).await;
            // It says so, and goes on where it is.
            let ends = said(&engine, &id).await;
            assert!(ends[rounds - 1].contains("no longer kept"), "{ends:?}");
            assert_eq!(thread_as(&engine, &id).await.status, ThreadStatus::Done);
            let notes: Notes = engine.state(id.as_str()).await.expect("has a state");
            expected.extend(["two", "a", "three", "a", "b"]);
            assert_eq!(notes.log, expected);
        }
    }
}

/// Starts a child and waits for its end, which it logs.
fn with_child() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |notes: Arc<Notes>, ctx: Context| async move {
            ctx.spawn("kid", "kid", &log(notes.log.join(" ")))?;
            let end = match ctx.wait_any("kid", &WaitFor::new().child("kid")).await? {
                Arrived::Child(end) => end,
                other => panic!("not a child: {other:?}"),
            };
            Ok(log(format!(
                "{} {:?} {}",
                end.name, end.status, end.output["log"][0]
            )))
        })
        .edge(START, "a")
        .edge("a", END)
}

promise! {
    async fn a_child_of_a_stopped_round_is_not_taken_for_one_of_the_next(lab) {
        let kid = || notes("kid")
            .node("ask", |_, ctx: Context| async move { ctx.interrupt::<()>("q", "?").await })
            .edge(START, "ask").edge("ask", END);
        for (busy, kept) in [(Busy::Interrupt, "first second third"), (Busy::Rollback, "third")] {
            let engine = Engine::builder(lab.store.clone())
                .graph(with_child().compile().expect("compiles"))
                .graph(kid().compile().expect("compiles"))
                .build().await.expect("builds");
            let id = format!("{busy:?}");
            let child = |name: &str| format!("{id}/{name}");
            engine.start(id.as_str(), "g", &log("first"), StartOptions::default()).await.expect("starts");
            run(&engine).await;
            for (key, text) in [("1", "second"), ("2", "third")] {
                engine.input(id.as_str(), key, &log(text), busy).await.expect("is taken");
                run(&engine).await;
            }
            for (name, status) in [("kid", ThreadStatus::Cancelled), ("kid~1", ThreadStatus::Cancelled), ("kid~2", ThreadStatus::Waiting)] {
                assert_eq!(thread_as(&engine, &child(name)).await.status, status, "{busy:?} {name}");
            }
            // It is the third one's end that counts, under the name that the node knows.
            let asked = thread_as(&engine, &child("kid~2")).await;
            engine.answer(asked.id, &asked.waits[0].id, &()).await.expect("is taken");
            run(&engine).await;
            let notes: Notes = engine.state(id.as_str()).await.expect("reads");
            assert_eq!(notes.log.join(" "), format!("{kept} kid Done \"{kept}\""));
            assert_eq!(thread_as(&engine, &id).await.status, ThreadStatus::Done);
        }
    }
}
