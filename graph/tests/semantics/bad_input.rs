//! Bad input from outside, and what the next release makes of what this one has stored: a typed error that says where and what to
//! do, and a thread that can be used afterwards.

use std::{collections::BTreeMap, sync::Arc};

use graph::{
    Busy, CompiledGraph, Context, END, Engine, EngineError, Graph, HistoryFilter, Keep, NodeError,
    NodeOptions, RetryPolicy, START, StartOptions, State, StorageError, ThreadStatus, WaitFor,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::lab::{
    Lab, Notes, NotesUpdate, log, notes, promise, run, start, start_and_run, start_as, state,
    thread, thread_as,
};

/// What the first release keeps.
#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Cart {
    #[channel(append)]
    items: Vec<String>,
    #[channel(merge)]
    prices: BTreeMap<String, i64>,
    note: String,
    old: u64,
}

/// What the next one makes of it: other items, other prices, no `old`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, State)]
struct Basket {
    #[channel(append)]
    items: Vec<u64>,
    #[channel(merge)]
    prices: BTreeMap<String, (i64, String)>,
    note: String,
}

fn first() -> CompiledGraph<Cart> {
    Graph::<Cart>::builder("g")
        .node("fill", |_: Arc<Cart>, _: Context| async move {
            Ok(CartUpdate::default()
                .items(vec!["pear".to_owned()])
                .prices(BTreeMap::from([("pear".to_owned(), 3)]))
                .note("filled".to_owned())
                .old(7))
        })
        .node("ask", |_: Arc<Cart>, ctx: Context| async move {
            let more: String = ctx.interrupt("more", "What else?").await?;
            Ok(CartUpdate::default().items(vec![more]))
        })
        .edge(START, "fill")
        .edge("fill", "ask")
        .edge("ask", END)
        .compile()
        .expect("compiles")
}

/// Asks, counts to 100 item by item, and ends.
fn next() -> CompiledGraph<Basket> {
    Graph::<Basket>::builder("g")
        .node("fill", |_: Arc<Basket>, _: Context| async move { Ok(()) })
        .node("ask", |_: Arc<Basket>, ctx: Context| async move {
            let more: u64 = ctx.interrupt("more", "How many?").await?;
            Ok(BasketUpdate::default().items(vec![more]))
        })
        .node("count", |basket: Arc<Basket>, _: Context| async move {
            let next = basket.items.len() as u64;
            Ok(BasketUpdate::default()
                .items(vec![next])
                .note(format!("counted {next}")))
        })
        .edge(START, "fill")
        .edge("fill", "ask")
        .edge("ask", "count")
        .conditional("count", ["count", END], |basket: &Basket| {
            if basket.items.len() < 100 {
                "count"
            } else {
                END
            }
        })
        .compile()
        .expect("compiles")
}

/// A thread of the first release that waits for an answer at checkpoint 1, and the id of its question.
async fn filled(lab: &Lab) -> (Engine, String) {
    let engine = lab.engine(first()).await;
    let input = CartUpdate::default().items(vec!["fig".to_owned()]).old(1);
    engine
        .start("t", "g", &input, StartOptions::default())
        .await
        .expect("starts");
    run(&engine).await;
    let waiting = thread(&engine).await;
    (engine, waiting.waits[0].id.clone())
}

promise! {
    async fn a_state_that_does_not_fit_fails_the_thread_which_goes_on_with_a_program_that_it_fits(lab) {
        let (old, question) = filled(&lab).await;
        old.answer("t", &question, "plum").await.expect("is taken");
        let new = lab.engine(next()).await;
        // Comes to rest, so it does not run it again and again.
        run(&new).await;
        let failed = thread(&new).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        let why = failed.error.expect("says why");
        for part in ["thread `t`", "checkpoint 1", "channel `items`", "Engine::stored_state", "retry"] {
            assert!(why.contains(part), "{part} in: {why}");
        }
        run(&new).await;
        assert_eq!(thread(&new).await.checkpoint, 1);
        // Retried by the same program, it fails again; by one that it fits, it goes on, with the answer it was given.
        new.retry("t").await.expect("has failed");
        run(&new).await;
        assert_eq!(thread(&new).await.status, ThreadStatus::Failed);
        old.retry("t").await.expect("has failed");
        run(&old).await;
        assert_eq!(thread(&old).await.status, ThreadStatus::Done);
        let cart: Cart = old.state("t").await.expect("fits");
        assert_eq!(cart.items, ["fig", "pear", "plum"]);
    }
}

promise! {
    async fn a_state_that_does_not_fit_can_be_looked_at_and_replaced(lab) {
        filled(&lab).await;
        let new = lab.engine(next()).await;
        let error = new.state::<Basket>("t").await.expect_err("does not fit");
        let EngineError::StoredState { thread: of, checkpoint, graph, .. } = &error else {
            panic!("{error}");
        };
        assert_eq!((of.as_str(), *checkpoint, graph.as_str()), ("t", 1, "g"));
        for error in [
            new.state_at("t", 1).await.expect_err("does not fit"),
            new.fork("t", 1, None, &()).await.expect_err("does not fit"),
        ] {
            assert!(matches!(error, EngineError::StoredState { checkpoint: 1, .. }), "{error}");
        }

        let stored = new.stored_state("t", None).await.expect("reads");
        assert_eq!(stored.checkpoint, 1);
        assert_eq!(Value::Object(stored.channels.clone()), json!({
            "items": ["fig", "pear"],
            "prices": [{"pear": 3}],
            "note": "filled",
            "old": 7,
        }));
        let unfit: Vec<&str> = stored.faults.keys().map(String::as_str).collect();
        assert_eq!(unfit, ["items", "old", "prices"]);
        let input = new.stored_state("t", 0).await.expect("reads");
        assert_eq!((&input.channels["items"], &input.channels["note"]), (&json!(["fig"]), &json!("")));

        let mended = Basket { items: vec![10, 11], note: stored.channels["note"].to_string(), ..Basket::default() };
        let error = new.fork_with_state("t", 1, None, &Notes::default()).await.expect_err("is another type");
        assert!(matches!(error, EngineError::OtherState { .. }), "{error}");
        let branch = new.fork_with_state("t", 1, None, &mended).await.expect("forks");
        new.set_head("t", branch).await.expect("is a branch");
        assert_eq!(new.state::<Basket>("t").await.expect("fits"), mended);
        run(&new).await;
        let asked = thread(&new).await;
        new.answer("t", &asked.waits[0].id, &12).await.expect("is taken");
        run(&new).await;
        // Through many supersteps and snapshots, in another process too.
        let other = lab.engine(next()).await;
        let ended: Basket = other.state("t").await.expect("fits");
        let expected: Vec<u64> = [10, 11, 12].into_iter().chain(3..100).collect();
        assert_eq!((ended.items, ended.note), (expected.clone(), "counted 99".to_owned()));
        assert_eq!(thread(&other).await.status, ThreadStatus::Done);
        // Also when what was before is forgotten.
        other.prune("t", Keep::last(1)).await.expect("prunes");
        other.input("t", "more", &BasketUpdate::default().items(vec![1000]), Busy::Reject).await.expect("begins again");
        run(&other).await;
        let ended: Basket = lab.engine(next()).await.state("t").await.expect("fits");
        let expected: Vec<u64> = expected.into_iter().chain([1000]).collect();
        assert_eq!(ended.items, expected);
    }
}

promise! {
    async fn a_channel_that_is_gone_is_passed_over_in_the_input_as_in_all_steps(lab) {
        #[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
        struct Smaller {
            #[channel(append)]
            items: Vec<String>,
        }
        let (old, question) = filled(&lab).await;
        old.answer("t", &question, "plum").await.expect("is taken");
        let graph = Graph::<Smaller>::builder("g")
            .node("ask", |_: Arc<Smaller>, _: Context| async move { Ok(SmallerUpdate::default().items(vec!["end".to_owned()])) })
            .edge(START, "ask").edge("ask", END)
            .compile().expect("compiles");
        let engine = lab.engine(graph).await;
        run(&engine).await;
        assert_eq!(thread(&engine).await.output, Some(json!({"items": ["fig", "pear", "end"]})));
    }
}

promise! {
    async fn a_rolled_back_first_round_leaves_nothing_behind_however_long_the_next_one_is(lab) {
        let graph = || notes("g")
            .node("ask", |notes: Arc<Notes>, ctx: Context| async move {
                if notes.log == ["first"] {
                    ctx.interrupt::<()>("q", "?").await?;
                }
                Ok(NotesUpdate::default().sum(1))
            })
            .node("count", |notes: Arc<Notes>, _| async move { Ok(log(notes.sum.to_string()).sum(1)) })
            .edge(START, "ask").edge("ask", "count")
            .conditional("count", ["count", END], |s: &Notes| if s.sum < 101 { "count" } else { END });
        let engine = lab.notes(graph()).await;
        engine.start("t", "g", &log("first"), StartOptions::default()).await.expect("starts");
        run(&engine).await;
        engine.input("t", "1", &log("second"), Busy::Rollback).await.expect("is taken");
        run(&engine).await;
        let other = lab.notes(graph()).await;
        let expected: Vec<String> = std::iter::once("second".to_owned())
            .chain((1..101).map(|n| n.to_string())).collect();
        assert_eq!(thread(&other).await.status, ThreadStatus::Done);
        assert_eq!(state(&other).await.log, expected);
    }
}

/// Asks, and logs the answer.
fn asking() -> graph::GraphBuilder<Notes> {
    notes("g")
        .node("ask", |_, ctx: Context| async move {
            let n: u32 = ctx.interrupt("n", "how many?").await?;
            Ok(log(n.to_string()))
        })
        .edge(START, "ask")
        .edge("ask", END)
}

promise! {
    async fn after_an_answer_of_the_wrong_type_a_fork_asks_again(lab) {
        let engine = lab.notes(asking()).await;
        let id = start_and_run(&engine).await.waits[0].id.clone();
        engine.answer("t", &id, "many").await.expect("is taken");
        run(&engine).await;
        let why = thread(&engine).await.error.expect("says why");
        for part in ["`n` is not of the right type", "thread `t`", "checkpoint 0", "fork"] {
            assert!(why.contains(part), "{part} in: {why}");
        }
        let branch = engine.fork("t", 0, None, &()).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        let asked = thread(&engine).await;
        assert_ne!(asked.waits[0].id, id);
        engine.answer("t", &asked.waits[0].id, &3).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["3"]);
    }
}

promise! {
    async fn refused_answers_say_where_the_thread_stands_and_change_nothing(lab) {
        let engine = lab.notes(
            notes("g")
                .node("first", |_, _| async { Ok(log("first")) })
                .node("ask", |_, ctx: Context| async move {
                    let n: u32 = ctx.interrupt("n", "how many?").await?;
                    Ok(log(n.to_string()))
                })
                .edge(START, "first").edge("first", "ask").edge("ask", END),
        ).await;
        let id = start_and_run(&engine).await.waits[0].id.clone();
        let error = engine.answer("t", "0.ghost", &1).await.expect_err("is refused");
        assert!(matches!(&error, EngineError::UnknownInterrupt { thread, checkpoint: 1, .. } if thread.as_str() == "t"), "{error}");
        let error = engine.answer("t", "5.ghost", &1).await.expect_err("is refused");
        assert!(matches!(error, EngineError::OtherBranch { checkpoint: 1, branch: 5, head: 0, .. }), "{error}");
        let error = engine.answer("nobody", &id, &1).await.expect_err("is refused");
        assert!(matches!(&error, EngineError::UnknownThread(id) if id.as_str() == "nobody"), "{error}");
        engine.answer("t", &id, &2).await.expect("is taken");
        let error = engine.answer("t", &id, &3).await.expect_err("is refused");
        assert!(matches!(error, EngineError::AlreadyAnswered { checkpoint: 1, .. }), "{error}");
        run(&engine).await;
        let error = engine.answer("t", &id, &3).await.expect_err("is refused");
        assert!(matches!(error, EngineError::AlreadyAnswered { checkpoint: 2, .. }), "{error}");
        assert_eq!(state(&engine).await.log, ["first", "2"]);
    }
}

promise! {
    async fn a_fork_from_a_checkpoint_of_another_thread_is_refused_and_both_go_on(lab) {
        let engine = lab.notes(asking()).await;
        start(&engine).await;
        start_as(&engine, "u").await;
        run(&engine).await;
        engine.answer("u", &thread_as(&engine, "u").await.waits[0].id, &1).await.expect("is taken");
        run(&engine).await;
        let theirs = engine.history("u", HistoryFilter::default()).await.expect("reads")[0].checkpoint;
        assert_eq!(theirs, 1);
        for error in [
            engine.fork("t", theirs, None, &()).await.expect_err("is not its own"),
            engine.fork_with_state("t", theirs, None, &Notes::default()).await.expect_err("is not its own"),
        ] {
            let EngineError::Storage(StorageError::UnknownCheckpoint { thread, checkpoint }) = &error else {
                panic!("{error}");
            };
            assert_eq!((thread.as_str(), *checkpoint), ("t", 1));
        }
        assert_eq!(thread(&engine).await.branch, 0);
        engine.answer("t", &thread(&engine).await.waits[0].id, &2).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["2"]);
    }
}

promise! {
    async fn a_thread_that_is_not_there_is_told_by_its_id_whatever_is_asked_of_it(lab) {
        let engine = lab.notes(asking()).await;
        let none = "nobody";
        let errors = [
            engine.input(none, "k", &(), Busy::Enqueue).await.map(|_| ()),
            engine.answer(none, "0.x", &()).await,
            engine.retry(none).await,
            engine.cancel(none, "why").await.map(|_| ()),
            engine.state::<Notes>(none).await.map(|_| ()),
            engine.state_at(none, 0).await.map(|_| ()),
            engine.stored_state(none, None).await.map(|_| ()),
            engine.history(none, HistoryFilter::default()).await.map(|_| ()),
            engine.fork(none, 0, None, &()).await.map(|_| ()),
            engine.fork_with_state(none, 0, None, &Notes::default()).await.map(|_| ()),
            engine.set_head(none, 0).await,
        ];
        for (index, error) in errors.into_iter().enumerate() {
            let error = error.expect_err("is refused");
            let told = match &error {
                EngineError::UnknownThread(id) | EngineError::Storage(StorageError::UnknownThread(id)) => id.as_str(),
                _ => panic!("{index}: {error}"),
            };
            assert_eq!(told, none);
        }
        assert!(engine.thread(none).await.expect("reads").is_none());
    }
}

promise! {
    async fn an_input_or_update_that_does_not_fit_names_the_channel_and_changes_nothing(lab) {
        let engine = lab.notes(asking()).await;
        let wrong = json!({"sum": "many"});
        let error = engine.start("u", "g", &wrong, StartOptions::default()).await.expect_err("is refused");
        assert!(error.to_string().contains("`sum`"), "{error}");
        assert!(engine.thread("u").await.expect("reads").is_none());
        start_and_run(&engine).await;
        for error in [
            engine.input("t", "k", &wrong, Busy::Enqueue).await.map(|_| ()).expect_err("is refused"),
            engine.fork("t", 0, None, &json!({"ghost": 1})).await.map(|_| ()).expect_err("is refused"),
            engine.fork("t", 0, None, &json!([1])).await.map(|_| ()).expect_err("is refused"),
        ] {
            assert!(matches!(error, EngineError::Channel(_)), "{error}");
        }
        engine.answer("t", &thread(&engine).await.waits[0].id, &2).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["2"]);
    }
}

promise! {
    async fn an_answer_to_a_wait_that_is_no_question_is_refused_and_changes_nothing(lab) {
        let engine = lab.notes(notes("g")
            .node("wait", |_, ctx: Context| async move {
                let news = ctx.wait_any("news", &WaitFor::new().signal("news")).await?;
                Ok(log(format!("{news:?}")))
            })
            .node("sleep", |_, ctx: Context| async move {
                let far = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
                ctx.sleep_until("nap", far).await
            })
            .node_with(
                "flaky",
                NodeOptions::default().retry(RetryPolicy::default().first_interval(std::time::Duration::from_hours(1))),
                |_, _| async { Err::<(), _>(NodeError::msg("later")) },
            )
            .edge(START, "wait").edge(START, "sleep").edge(START, "flaky")
            .edge("wait", END).edge("sleep", END).edge("flaky", END)).await;
        let waits = start_and_run(&engine).await.waits;
        let mut names: Vec<&str> = waits.iter().map(|wait| wait.name.as_str()).collect();
        names.sort_unstable();
        assert_eq!(names, ["nap", "news", "retry"]);
        for wait in &waits {
            let error = engine.answer("t", &wait.id, "yes").await.expect_err("is refused");
            let EngineError::NotAQuestion { thread: of, checkpoint, wait: id, name, kind } = &error else {
                panic!("{error}");
            };
            assert_eq!((of.as_str(), *checkpoint, id, name, *kind), ("t", 0, &wait.id, &wait.name, wait.kind));
            assert!(error.to_string().contains("Engine::signal"), "{error}");
        }
        // One that is not there (any more) is unknown, as always.
        let gone = format!("{}0", waits[0].id);
        let error = engine.answer("t", &gone, "yes").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownInterrupt { .. }), "{error}");
        let error = engine.answer("nobody", &waits[0].id, "yes").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownThread(_)), "{error}");
        let (mailbox, mail) = lab.store.mailbox(&"t".into(), 0).await.expect("reads");
        assert_eq!((mailbox.len(), mail), (0, 0), "nothing was sent");
        engine.signal("t", "news", "1", &()).await.expect("is sent");
        run(&engine).await;
        assert_eq!(thread(&engine).await.waits.len(), 2, "what it waits for has come");
    }
}
