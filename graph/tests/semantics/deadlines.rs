//! Statement 11, with a deadline: questions that can be answered until a time.

use std::sync::Arc;

use graph::{
    Context, END, Engine, EngineError, Graph, GraphBuilder, NodeError, Reply, START,
    SubgraphMemory, ThreadStatus, WaitKind,
};
use jiff::{SignedDuration, Timestamp};
use tokio::sync::Notify;

use crate::lab::{
    Count, Notes, entries, eventually, log, notes, options, promise, run, says, serve, start,
    start_and_run, state, thread, until_status,
};

fn soon() -> Timestamp {
    Timestamp::now() + SignedDuration::from_millis(150)
}

fn late() -> Timestamp {
    Timestamp::now() + SignedDuration::from_hours(1)
}

fn told(reply: Reply<String>) -> String {
    reply.answer().unwrap_or_else(|| "nobody".to_owned())
}

/// Asks until the time, then without one.
fn asks(deadline: impl Fn() -> Timestamp + Copy + Sync + Send + 'static) -> GraphBuilder<Notes> {
    notes("g")
        .node("ask", move |_, ctx: Context| async move {
            ctx.emit("ids", "id", &ctx.interrupt_id("who"))?;
            let first = told(ctx.interrupt_until("who", "first?", deadline()).await?);
            let second: String = ctx.interrupt("who", "second?").await?;
            Ok(log(format!("{first}, {second}")))
        })
        .edge(START, "ask")
        .edge("ask", END)
}

async fn asked(engine: &Engine) -> String {
    thread(engine).await.waits[0].id.clone()
}

/// The id of the question with a deadline, whether or not it is still open.
async fn first_asked(engine: &Engine) -> String {
    let ids = entries(engine, "ids").await;
    ids[0].payload.as_str().expect("is an id").to_owned()
}

/// Runs `t` until it asks the question with this text.
async fn until_asked(engine: &Engine, question: &str) {
    eventually(question, || async {
        let waits = thread(engine).await.waits;
        waits.iter().any(|wait| wait.value == *question)
    })
    .await;
}

promise! {
    async fn an_answer_before_the_deadline_counts(lab) {
        let engine = lab.notes(asks(late)).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.waits[0].kind, WaitKind::Interrupt);
        assert_eq!(waiting.wake_at, waiting.waits[0].until);
        assert!(waiting.wake_at.is_some());
        let first = asked(&engine).await;
        engine.answer("t", &first, "Ada").await.expect("is taken");
        let error = engine.answer("t", &first, "Bob").await.expect_err("is refused");
        assert!(matches!(error, EngineError::AlreadyAnswered { .. }), "{error}");
        run(&engine).await;
        let second = asked(&engine).await;
        assert_ne!(first, second);
        engine.answer("t", &second, "Eve").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["Ada, Eve"]);
    }
}

promise! {
    async fn a_question_expires_by_itself_and_that_is_remembered(lab) {
        let engine = lab.notes(asks(soon)).await;
        start(&engine).await;
        let server = serve(&engine, options());
        until_asked(&engine, "second?").await;
        server.drain().await;
        let first = first_asked(&engine).await;
        // Another process, and a run of the node more.
        let other = lab.notes(asks(soon)).await;
        let error = other.answer("t", &first, "late").await.expect_err("is refused");
        let EngineError::Expired { thread: of, checkpoint, interrupt } = &error else {
            panic!("{error}");
        };
        assert_eq!((of.as_str(), *checkpoint, interrupt), ("t", 0, &first));
        other.answer("t", &asked(&other).await, "Eve").await.expect("is taken");
        run(&other).await;
        assert_eq!(state(&other).await.log, ["nobody, Eve"]);
        let error = other.answer("t", &first, "later still").await.expect_err("is refused");
        assert!(matches!(error, EngineError::Expired { checkpoint: 1, .. }), "{error}");
        // Nothing of it is left in the mailbox.
        assert!(lab.store.mailbox(&"t".into(), 0).await.expect("reads").0.is_empty());
    }
}

promise! {
    async fn an_answer_after_the_deadline_is_refused_also_before_anybody_ran_the_thread(lab) {
        // A machine that stands still may run the thread only when the time is over: then there is more of it.
        let mut patience = SignedDuration::from_millis(200);
        let engine = loop {
            let deadline = Timestamp::now() + patience;
            let engine = lab.notes(asks(move || deadline)).await;
            start_and_run(&engine).await;
            if thread(&engine).await.waits[0].value == "first?" {
                break engine;
            }
            engine.delete("t").await.expect("deletes");
            patience *= 2;
        };
        let waiting = thread(&engine).await;
        let (id, until) = (&waiting.waits[0].id, waiting.waits[0].until.expect("has one"));
        eventually("the deadline has passed", || async move {
            Timestamp::now() > until + SignedDuration::from_millis(20)
        }).await;
        let error = engine.answer("t", id, "late").await.expect_err("is refused");
        assert!(matches!(error, EngineError::Expired { .. }), "{error}");
        assert_eq!(thread(&engine).await.waits.len(), 1, "nobody has looked yet");
        run(&engine).await;
        engine.answer("t", &asked(&engine).await, "Eve").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["nobody, Eve"]);
    }
}

promise! {
    async fn a_deadline_that_has_passed_already_asks_nobody(lab) {
        let engine = lab.notes(asks(|| Timestamp::MIN)).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.waits.len(), 1);
        assert_eq!(waiting.waits[0].value, "second?");
        engine.answer("t", &waiting.waits[0].id, "Eve").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["nobody, Eve"]);
    }
}

promise! {
    async fn the_first_deadline_stays_whatever_a_rerun_gives(lab) {
        let runs = Count::default();
        let counted = runs.clone();
        let graph = move || {
            let counted = counted.clone();
            notes("g")
                .node("ask", move |_, ctx: Context| {
                    let counted = counted.clone();
                    async move {
                        counted.up();
                        let (one, two, until) = tokio::join!(
                            ctx.interrupt::<String>("one", "?"),
                            ctx.interrupt::<String>("two", "?"),
                            ctx.interrupt_until::<String>("until", "?", late()),
                        );
                        Ok(log(format!("{} {} {}", one?, two?, told(until?))))
                    }
                })
                .edge(START, "ask").edge("ask", END)
        };
        let engine = lab.notes(graph()).await;
        let mut deadlines = Vec::new();
        start(&engine).await;
        for name in ["one", "two", "until"] {
            // Each time in another process.
            let engine = lab.notes(graph()).await;
            run(&engine).await;
            let waits = thread(&engine).await.waits;
            deadlines.extend(waits.iter().filter_map(|wait| wait.until));
            let wait = waits.iter().find(|wait| wait.name == name).expect("is asked");
            engine.answer("t", &wait.id, name).await.expect("is taken");
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["one two until"]);
        assert_eq!((deadlines.len(), runs.get()), (3, 4));
        deadlines.dedup();
        assert_eq!(deadlines.len(), 1);
    }
}

promise! {
    async fn an_answer_that_came_first_counts_however_late_the_run_looks(lab) {
        let go = Arc::new(Notify::new());
        let wait = go.clone();
        let engine = lab.notes(
            notes("g")
                .node("ask", |_, ctx: Context| async move {
                    let deadline = Timestamp::now() + SignedDuration::from_secs(2);
                    Ok(log(told(ctx.interrupt_until("who", "?", deadline).await?)))
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
        until_asked(&engine, "?").await;
        let asking = thread(&engine).await;
        assert_eq!(asking.status, ThreadStatus::Running);
        let until = asking.waits[0].until.expect("has one");
        let taken = engine.answer("t", &asking.waits[0].id, "Ada").await;
        // The run knows of no answer yet, and its clock says that the time is over.
        eventually("the deadline has passed", || async move {
            Timestamp::now() > until + SignedDuration::from_millis(20)
        }).await;
        go.notify_one();
        until_status(&engine, "t", ThreadStatus::Done).await;
        // On a machine that stood still for two seconds it came too late; then that is what was said.
        let expected = match taken {
            Ok(()) => "Ada",
            Err(EngineError::Expired { .. }) => "nobody",
            Err(other) => panic!("{other}"),
        };
        assert_eq!(state(&engine).await.log, [expected, "quick", "worked"]);
        server.drain().await;
    }
}

promise! {
    async fn a_question_of_a_subgraph_expires_too(lab) {
        let inner = Graph::<Notes>::builder("inner")
            .node("ask", |_, ctx: Context| async move {
                ctx.emit("ids", "id", &ctx.interrupt_id("who"))?;
                Ok(log(told(ctx.interrupt_until("who", "inside?", soon()).await?)))
            })
            .edge(START, "ask").edge("ask", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .node("outer", move |_, ctx: Context| {
                    let inner = inner.clone();
                    async move {
                        let ended = ctx.invoke("inner", &inner, SubgraphMemory::Resumable, log("begun")).await?;
                        let after: String = ctx.interrupt("after", "outside?").await?;
                        Ok::<_, NodeError>(log(format!("{} {after}", ended.log.join(" "))))
                    }
                })
                .edge(START, "outer").edge("outer", END),
        ).await;
        start(&engine).await;
        let server = serve(&engine, options());
        until_asked(&engine, "outside?").await;
        let inside = first_asked(&engine).await;
        let error = engine.answer("t", &inside, "late").await.expect_err("is refused");
        assert!(matches!(error, EngineError::Expired { .. }), "{error}");
        engine.answer("t", &asked(&engine).await, "Eve").await.expect("is taken");
        until_status(&engine, "t", ThreadStatus::Done).await;
        assert_eq!(state(&engine).await.log, ["begun nobody Eve"]);
        server.drain().await;
    }
}
