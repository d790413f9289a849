//! Statements 10 to 12, 14 and 16: signals, interrupts, waits, and what happens beside them.

use std::{sync::Arc, time::Duration};

use graph::{
    Arrived, Command, Context, Delivered, END, EngineError, Goto, GraphBuilder, NodeError,
    NodeOptions, RetryPolicy, START, Send, Signal, ThreadStatus, WaitFor, WaitKind,
};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::lab::{
    Count, Notes, entries, eventually, log, notes, options, promise, run, said, says, serve, start,
    start_and_run, state, thread, until_status,
};

fn signal(arrived: Arrived) -> Signal {
    match arrived {
        Arrived::Signal(signal) => signal,
        other => panic!("not a signal: {other:?}"),
    }
}

/// Waits for a message and logs it, until one says `stop`.
fn listener() -> GraphBuilder<Notes> {
    notes("g")
        .node("listen", |_, ctx: Context| async move {
            let wait = WaitFor::new().signal("message");
            let message = signal(ctx.wait_any("message", &wait).await?);
            let text: String = message.payload()?;
            Ok(log(format!("{} {text}", message.key)).last(text))
        })
        .edge(START, "listen")
        .conditional("listen", ["listen", END], |s: &Notes| {
            if s.last == "stop" { END } else { "listen" }
        })
}

promise! {
    async fn a_signal_sent_twice_is_sent_once(lab) {
        let engine = lab.notes(listener()).await;
        start(&engine).await;
        let first = engine.signal("t", "message", "1", "hello").await.expect("is taken");
        let again = engine.signal("t", "message", "1", "hello").await.expect("is taken");
        assert_eq!((first, again), (Delivered::New, Delivered::Duplicate));
        run(&engine).await;
        // Also when it has long been used.
        let late = engine.signal("t", "message", "1", "hello").await.expect("is taken");
        assert_eq!(late, Delivered::Duplicate);
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["1 hello"]);
    }
}

promise! {
    async fn signals_are_taken_oldest_first_and_others_stay_until_somebody_waits_for_them(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let wanted = WaitFor::new().signal("message");
                    let one = signal(ctx.wait_any("m", &wanted).await?);
                    let two = signal(ctx.wait_any("m", &wanted).await?);
                    Ok(log(format!("{} {}", one.key, two.key)))
                })
                .node("b", |_, ctx: Context| async move {
                    let either = WaitFor::new().signal("message").signal("steer");
                    let one = signal(ctx.wait_any("x", &either).await?);
                    Ok(log(format!("{} {}", one.kind, one.key)))
                })
                .edge(START, "a").edge("a", "b").edge("b", END),
        ).await;
        start(&engine).await;
        for (kind, key) in [("steer", "s1"), ("message", "m1"), ("other", "o1"), ("message", "m2"), ("message", "m3")] {
            engine.signal("t", kind, key, &()).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["m1 m2", "steer s1"]);
        let (mailbox, _) = lab.store.mailbox(&"t".into(), 0).await.expect("reads");
        let left: Vec<&str> = mailbox.iter().map(|signal| signal.key.as_str()).collect();
        assert_eq!(left, ["o1", "m3"]);
    }
}

promise! {
    async fn a_signal_leaves_the_mailbox_in_the_commit_of_the_step_that_used_it(lab) {
        let (taken, go) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (tell, wait) = (taken.clone(), go.clone());
        let engine = lab.notes(
            notes("g")
                .node("a", move |_, ctx: Context| {
                    let (tell, wait) = (tell.clone(), wait.clone());
                    async move {
                        signal(ctx.wait_any("m", &WaitFor::new().signal("m")).await?);
                        tell.notify_one();
                        wait.notified().await;
                        Ok(log("used"))
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start(&engine).await;
        engine.signal("t", "m", "1", &()).await.expect("is taken");
        let server = serve(&engine, options());
        taken.notified().await;
        assert_eq!(lab.store.mailbox(&"t".into(), 0).await.expect("reads").0.len(), 1);
        go.notify_one();
        until_status(&engine, "t", ThreadStatus::Done).await;
        assert_eq!(lab.store.mailbox(&"t".into(), 0).await.expect("reads").0.len(), 0);
        server.drain().await;
    }
}

promise! {
    async fn reserved_kinds_and_unknown_threads_are_refused(lab) {
        let engine = lab.notes(listener()).await;
        start(&engine).await;
        let error = engine.signal("t", "graph.answer", "1", &()).await.expect_err("is refused");
        assert!(matches!(error, EngineError::ReservedKind(_)));
        let error = engine.signal("nobody", "message", "1", &()).await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownThread(id) if id.as_str() == "nobody"));
    }
}

fn asks() -> GraphBuilder<Notes> {
    notes("g")
        .node("ask", |_, ctx: Context| async move {
            let id = ctx.interrupt_id("name");
            ctx.emit("questions", "asked", &json!({"id": id}))?;
            let name: String = ctx.interrupt("name", "What is your name?").await?;
            let age: u32 = ctx.interrupt("age", &format!("How old is {name}?")).await?;
            Ok(log(format!("{name} is {age}")))
        })
        .edge(START, "ask")
        .edge("ask", END)
}

promise! {
    async fn an_interrupt_returns_the_answer_in_another_process(lab) {
        let engine = lab.notes(asks()).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.status, ThreadStatus::Waiting);
        assert_eq!(waiting.waits.len(), 1);
        assert_eq!((waiting.waits[0].name.as_str(), waiting.waits[0].kind), ("name", WaitKind::Interrupt));
        assert_eq!(waiting.waits[0].value, json!("What is your name?"));

        let other = lab.notes(asks()).await;
        other.answer("t", &waiting.waits[0].id, "Ada").await.expect("is taken");
        run(&other).await;
        let waiting = thread(&other).await;
        assert_eq!(waiting.waits[0].value, json!("How old is Ada?"));
        engine.answer("t", &waiting.waits[0].id, &36).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["Ada is 36"]);
        assert!(thread(&engine).await.waits.is_empty());
    }
}

promise! {
    async fn the_id_of_an_interrupt_is_known_before_it_and_said_once(lab) {
        let engine = lab.notes(asks()).await;
        let waiting = start_and_run(&engine).await;
        let id = waiting.waits[0].id.clone();
        assert_eq!(said(&engine, "questions").await, [format!("asked {}", json!({"id": id}))]);
        engine.answer("t", &id, "Ada").await.expect("is taken");
        run(&engine).await;
        assert_eq!(said(&engine, "questions").await.len(), 1);
    }
}

promise! {
    async fn a_second_answer_and_an_unknown_question_are_errors(lab) {
        let engine = lab.notes(asks()).await;
        let id = start_and_run(&engine).await.waits[0].id.clone();
        engine.answer("t", &id, "Ada").await.expect("is taken");
        let error = engine.answer("t", &id, "Bob").await.expect_err("is refused");
        assert!(matches!(error, EngineError::AlreadyAnswered { .. }), "{error}");
        run(&engine).await;
        let error = engine.answer("t", &id, "Bob").await.expect_err("is refused");
        assert!(matches!(error, EngineError::AlreadyAnswered { .. }), "{error}");
        let error = engine.answer("t", "0.nonsense", "x").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownInterrupt { .. }), "{error}");
        let error = engine.answer("nobody", &id, "x").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownThread(_)), "{error}");
        let second = thread(&engine).await.waits[0].id.clone();
        engine.answer("t", &second, &36).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["Ada is 36"]);
    }
}

promise! {
    async fn an_answer_to_a_question_of_a_failed_thread_is_an_error(lab) {
        let engine = lab.notes(asks()).await;
        let id = start_and_run(&engine).await.waits[0].id.clone();
        engine.cancel("t", "enough").await.expect("is taken");
        run(&engine).await;
        let error = engine.answer("t", &id, "Ada").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownInterrupt { .. }), "{error}");
    }
}

promise! {
    async fn the_same_name_again_is_the_next_question(lab) {
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move {
                    let mut answers = Vec::new();
                    for _ in 0..3 {
                        answers.push(ctx.interrupt::<u32>("number", &answers.len()).await?.to_string());
                    }
                    Ok(log(answers.join(" ")))
                })
                .edge(START, "ask").edge("ask", END),
        ).await;
        start(&engine).await;
        let mut ids = Vec::new();
        for answer in [7, 8, 9] {
            run(&engine).await;
            ids.push(thread(&engine).await.waits[0].id.clone());
            engine.answer("t", ids.last().expect("one"), &answer).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["7 8 9"]);
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 3);
    }
}

promise! {
    async fn an_answer_of_the_wrong_type_fails_the_node_for_good(lab) {
        let engine = lab.notes(
            notes("g")
                .node_with("ask", NodeOptions::default().retry(RetryPolicy::default()), |_, ctx: Context| async move {
                    let n: u32 = ctx.interrupt("n", "how many?").await?;
                    Ok(log(n.to_string()))
                })
                .edge(START, "ask").edge("ask", END),
        ).await;
        let id = start_and_run(&engine).await.waits[0].id.clone();
        engine.answer("t", &id, "many").await.expect("is taken");
        run(&engine).await;
        let failed = thread(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert!(failed.error.expect("says why").contains("the answer to `n` is not of the right type"));
    }
}

promise! {
    async fn an_answer_is_accepted_while_siblings_still_run(lab) {
        let go = Arc::new(Notify::new());
        let wait = go.clone();
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move {
                    let name: String = ctx.interrupt("name", "?").await?;
                    Ok(log(name))
                })
                .node("quick", |_, _| says("quick"))
                .node("work", move |_, _| {
                    let wait = wait.clone();
                    async move { wait.notified().await; Ok(log("worked")) }
                })
                .edge(START, "ask").edge(START, "quick").edge(START, "work")
                .edge("ask", END).edge("quick", END).edge("work", END),
        ).await;
        start(&engine).await;
        let server = serve(&engine, options());
        eventually("the question is open", || async { !thread(&engine).await.waits.is_empty() }).await;
        let asking = thread(&engine).await;
        assert_eq!(asking.status, ThreadStatus::Running);
        engine.answer("t", &asking.waits[0].id, "Ada").await.expect("is taken");
        let error = engine.answer("t", &asking.waits[0].id, "Bob").await.expect_err("is refused");
        assert!(matches!(error, EngineError::AlreadyAnswered { .. }), "{error}");
        go.notify_one();
        until_status(&engine, "t", ThreadStatus::Done).await;
        assert_eq!(state(&engine).await.log, ["Ada", "quick", "worked"]);
        server.drain().await;
    }
}

promise! {
    async fn a_wait_ends_with_the_first_thing_that_comes_and_remembers_it(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let engine = lab.notes(
            notes("g")
                .node("a", move |_, ctx: Context| {
                    let counted = counted.clone();
                    async move {
                        counted.up();
                        let wait = WaitFor::new().signal("x").signal("y")
                            .until(Timestamp::now() + jiff::SignedDuration::from_hours(1));
                        let first = signal(ctx.wait_any("first", &wait).await?);
                        // A second wait makes the node run again: the first one returns what it returned.
                        let second = signal(ctx.wait_any("second", &WaitFor::new().signal("x")).await?);
                        Ok(log(format!("{} {}", first.key, second.key)))
                    }
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.waits[0].kind, WaitKind::Wait);
        assert!(waiting.waits[0].until.is_some());
        assert_eq!(waiting.waits[0].signals, ["x", "y"]);
        engine.signal("t", "y", "y1", &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(thread(&engine).await.waits[0].name, "second");
        engine.signal("t", "x", "x1", &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["y1 x1"]);
        assert_eq!(runs.get(), 3);
    }
}

promise! {
    async fn a_wait_ends_when_its_time_has_come(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let at = ctx.step("at", |_| async {
                        Ok::<_, NodeError>(Timestamp::now() + jiff::SignedDuration::from_secs(1))
                    }).await?;
                    let wait = WaitFor::new().signal("never").until(at);
                    assert_eq!(ctx.wait_any("w", &wait).await?, Arrived::Timer);
                    assert!(Timestamp::now() >= at, "not before its time");
                    ctx.sleep_until("s", at).await?;
                    Ok(log("woke"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start(&engine).await;
        // It is not polling that finds the time: nothing is polled here for a minute.
        let server = serve(&engine, graph::ServeOptions { poll: Duration::from_mins(1), ..options() });
        // On a machine that stands still for a second the time is over before anybody has seen the thread wait.
        eventually("t waits, or has waited", || async {
            let seen = thread(&engine).await;
            if seen.status == ThreadStatus::Waiting {
                assert!(seen.wake_at.is_some() && seen.lease.is_none(), "{seen:?}");
            }
            matches!(seen.status, ThreadStatus::Waiting | ThreadStatus::Done)
        }).await;
        until_status(&engine, "t", ThreadStatus::Done).await;
        server.drain().await;
    }
}

promise! {
    async fn sleeping_is_a_wait_for_a_time(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    ctx.sleep_until("nap", Timestamp::MAX).await?;
                    Ok(())
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.status, ThreadStatus::Waiting);
        assert_eq!((waiting.waits[0].name.as_str(), waiting.waits[0].kind), ("nap", WaitKind::Timer));
    }
}

promise! {
    async fn a_wait_for_nothing_is_refused(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move { ctx.wait_any("w", &WaitFor::new()).await?; Ok(()) })
                .edge(START, "a").edge("a", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert!(failed.error.expect("says why").contains("`w` waits for nothing"));
    }
}

promise! {
    async fn looking_without_waiting_is_remembered_too(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let wanted = WaitFor::new().signal("m");
                    let none = ctx.try_take("look", &wanted).await?;
                    let one = signal(ctx.wait_any("m", &wanted).await?);
                    let two = ctx.try_take("look", &wanted).await?.map(signal);
                    ctx.interrupt::<()>("pause", &()).await?;
                    Ok(log(format!("{} {} {}", none.is_none(), one.key, two.map(|s| s.key).unwrap_or_default())))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start_and_run(&engine).await;
        engine.signal("t", "m", "1", &()).await.expect("is taken");
        engine.signal("t", "m", "2", &()).await.expect("is taken");
        run(&engine).await;
        engine.signal("t", "m", "3", &()).await.expect("is taken");
        run(&engine).await;
        let waiting = thread(&engine).await;
        engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["true 1 2"]);
        let (mailbox, _) = lab.store.mailbox(&"t".into(), 0).await.expect("reads");
        assert_eq!(mailbox.len(), 1, "the third was taken by nobody");
    }
}

promise! {
    async fn two_tasks_that_wait_for_the_same_get_one_each_in_their_order(lab) {
        let engine = lab.notes(
            notes("g")
                .node("w", |_, ctx: Context| async move {
                    let n: u32 = ctx.argument()?;
                    let came = signal(ctx.wait_any("m", &WaitFor::new().signal("m")).await?);
                    Ok(log(format!("{n} {}", came.key)))
                })
                .conditional(START, ["w"], |_| Goto::sends((0..3).map(|n| Send::new("w", &n))))
                .edge("w", END),
        ).await;
        start(&engine).await;
        for key in ["a", "b", "c"] {
            engine.signal("t", "m", key, &()).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["0 a", "1 b", "2 c"]);
    }
}

promise! {
    async fn siblings_of_a_suspended_task_finish_and_keep_their_writes(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move {
                    let name: String = ctx.interrupt("name", "?").await?;
                    Ok(log(name))
                })
                .node("work", move |_, ctx: Context| {
                    let counted = counted.clone();
                    async move {
                        counted.up();
                        ctx.emit("work", "worked", &())?;
                        Ok(Command::<Notes>::goto("after").update(log("work")))
                    }
                })
                .node("after", |_, _| says("after"))
                .edge(START, "ask").edge(START, "work")
                .goes("work", ["after"])
                .edge("ask", END).edge("after", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(runs.get(), 1);
        assert_eq!(said(&engine, "work").await, ["worked null"]);
        assert_eq!(waiting.step, 0, "the step is not over");
        // Being woken for nothing changes nothing.
        engine.signal("t", "other", "1", &()).await.expect("is taken");
        let engine = {
            run(&engine).await;
            engine
        };
        engine.answer("t", &waiting.waits[0].id, "Ada").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["Ada", "work", "after"]);
        assert_eq!(runs.get(), 1, "what was finished does not run again");
        assert_eq!(said(&engine, "work").await.len(), 1);
    }
}

promise! {
    async fn a_suspended_thread_holds_no_lease_and_suspending_is_no_failure(lab) {
        let engine = lab.notes(
            notes("g")
                .node_with("a", NodeOptions::default().retry(RetryPolicy::default()), |_, ctx: Context| async move {
                    assert_eq!(ctx.attempt(), 1);
                    for _ in 0..5 {
                        ctx.wait_any("m", &WaitFor::new().signal("m")).await?;
                    }
                    Ok(log(ctx.attempt().to_string()))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start(&engine).await;
        for n in 0..5 {
            run(&engine).await;
            let waiting = thread(&engine).await;
            assert_eq!((waiting.status, waiting.lease.is_none()), (ThreadStatus::Waiting, true));
            engine.signal("t", "m", &n.to_string(), &()).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["1"]);
    }
}

promise! {
    async fn a_node_that_swallows_its_suspension_fails(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let _ = ctx.interrupt::<Value>("name", "?").await;
                    Ok(log("went on"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert!(failed.error.expect("says why").contains("went on after it was suspended"));
    }
}

promise! {
    async fn what_was_said_before_a_wait_lands_with_it_and_once(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    ctx.emit("s", "one", &())?;
                    ctx.interrupt::<()>("q", "?").await?;
                    ctx.emit("s", "two", &())?;
                    ctx.interrupt::<()>("r", "?").await?;
                    ctx.emit("s", "three", &())?;
                    Ok(())
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start(&engine).await;
        for expected in 1..3 {
            run(&engine).await;
            assert_eq!(said(&engine, "s").await.len(), expected);
            let waiting = thread(&engine).await;
            engine.answer("t", &waiting.waits[0].id, &()).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(said(&engine, "s").await, ["one null", "two null", "three null"]);
        let numbers: Vec<u64> = entries(&engine, "s").await.iter().map(|entry| entry.number).collect();
        assert_eq!(numbers, [1, 2, 3]);
    }
}

promise! {
    async fn a_thread_stops_before_and_after_named_nodes(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| says("a")).node("b", |_, _| says("b")).node("c", |_, _| says("c"))
                .edge(START, "a").edge("a", "b").edge("b", "c").edge("c", END)
                .interrupt_before(["b"]).interrupt_after(["b"]),
        ).await;
        let stopped = start_and_run(&engine).await;
        assert_eq!(stopped.waits[0].name, "before:b");
        assert_eq!(state(&engine).await.log, ["a"]);
        engine.answer("t", &stopped.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        let stopped = thread(&engine).await;
        assert_eq!(stopped.waits[0].name, "after:b");
        assert_eq!(state(&engine).await.log, ["a", "b"]);
        engine.answer("t", &stopped.waits[0].id, &()).await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a", "b", "c"]);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn waits_with_names_like_the_engines_own_are_waits_of_their_own(lab) {
        let graph = || notes("g")
            .node("a", |_, ctx: Context| async move {
                let (asked, waited, slept) = tokio::join!(
                    ctx.interrupt::<String>("x", "?"),
                    async { ctx.wait_any("?x", &WaitFor::new().signal("news")).await.map(signal) },
                    async { ctx.wait_any("~retry", &WaitFor::new().signal("more")).await.map(signal) },
                );
                Ok(log(format!("{} {} {}", asked?, waited?.key, slept?.key)))
            })
            .edge(START, "a").edge("a", END);
        let engine = lab.notes(graph()).await;
        let waits = start_and_run(&engine).await.waits;
        assert_eq!(waits.len(), 3);
        let question = waits.iter().find(|wait| wait.kind == WaitKind::Interrupt).expect("is asked");
        assert_eq!(question.name, "x");
        // Each in another process: what came is remembered for what waited for it.
        engine.answer("t", &question.id, "yes").await.expect("is taken");
        run(&lab.notes(graph()).await).await;
        assert_eq!(thread(&engine).await.waits.len(), 2);
        engine.signal("t", "more", "2", &()).await.expect("is sent");
        run(&lab.notes(graph()).await).await;
        assert_eq!(thread(&engine).await.waits.len(), 1);
        engine.signal("t", "news", "1", &()).await.expect("is sent");
        run(&lab.notes(graph()).await).await;
        assert_eq!(state(&engine).await.log, ["yes 1 2"]);
    }
}
