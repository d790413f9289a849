//! Statement 31: what stops a thread stops what goes on inside its subgraphs, which can be gone on with.

use graph::{
    Busy, CompiledGraph, Context, END, EngineError, NodeError, START, SubgraphMemory, ThreadStatus,
};

use crate::{
    inside::{around, compiled},
    lab::{
        Count, Notes, eventually, log, options, promise, run, said, serve, start, state, thread,
        thread_as, until_cancelled, until_status,
    },
    subgraphs::{Inner, asks, inner, line},
};

/// Says and logs that it began, and then goes on until it is stopped, the first time.
fn stopped(begun: &Count) -> CompiledGraph<Inner> {
    let begun = begun.clone();
    compiled(
        inner("stopped")
            .node("first", |_, ctx: Context| async move {
                ctx.emit("s", "first", &())?;
                Ok(line("first"))
            })
            .node("beside", |_, ctx: Context| async move {
                ctx.emit("s", "beside", &())?;
                Ok(line("beside"))
            })
            .node("long", move |_, ctx: Context| {
                let tries = begun.up();
                async move {
                    if tries == 1 {
                        until_cancelled(&ctx).await;
                        return Err(NodeError::msg("was stopped"));
                    }
                    Ok(line("long"))
                }
            })
            .edge(START, "first")
            .edge("first", "beside")
            .edge("first", "long")
            .edge("beside", END)
            .edge("long", END),
    )
}

promise! {
    async fn cancelling_reaches_a_task_inside_and_leaves_what_can_be_resumed(lab) {
        let begun = Count::default();
        let engine = lab.notes(around(&stopped(&begun), SubgraphMemory::Resumable)).await;
        start(&engine).await;
        let server = serve(&engine, options());
        eventually("it runs", || async { begun.get() == 1 }).await;
        engine.cancel("t", "enough").await.expect("is there");
        until_status(&engine, "t", ThreadStatus::Cancelled).await;
        engine.retry("t").await.expect("can be resumed");
        until_status(&engine, "t", ThreadStatus::Done).await;
        server.drain().await;
        assert_eq!(state(&engine).await.log, ["first", "beside", "long"]);
        let mut said = said(&engine, "s").await;
        said.sort();
        assert_eq!(said, ["beside null", "first null"]);
    }
}

promise! {
    async fn draining_stops_between_two_steps_inside_and_another_process_goes_on(lab) {
        let (begun, go, ran) = (Count::default(), Count::default(), Count::default());
        let child = {
            let (begun, go, ran) = (begun.clone(), go.clone(), ran.clone());
            compiled(inner("child")
                .node("first", move |_, ctx: Context| {
                    begun.up();
                    let go = go.clone();
                    async move {
                        eventually("it may go on", || async { go.get() > 0 }).await;
                        ctx.emit("s", "first", &())?;
                        Ok(line("first"))
                    }
                })
                .node("second", move |_, _| { ran.up(); async { Ok(line("second")) } })
                .edge(START, "first").edge("first", "second").edge("second", END))
        };
        let (engine, drained) = lab.drained_notes(around(&child, SubgraphMemory::Resumable)).await;
        start(&engine).await;
        let server = serve(&engine, options());
        eventually("it runs", || async { begun.get() == 1 }).await;
        server.begin_to_drain(&drained).await;
        go.up();
        server.drain().await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Ready);
        assert_eq!((begun.get(), ran.get()), (1, 0));
        assert_eq!(said(&engine, "s").await, ["first null"]);
        let other = lab.notes(around(&child, SubgraphMemory::Resumable)).await;
        run(&other).await;
        assert_eq!(state(&other).await.log, ["first", "second"]);
        assert_eq!((begun.get(), ran.get()), (1, 1));
        assert_eq!(said(&other, "s").await, ["first null"]);
    }
}

promise! {
    async fn an_input_that_stops_a_round_inside_begins_the_subgraph_anew(lab) {
        for (id, busy, lines) in [
            ("interrupted", Busy::Interrupt, vec!["one", "two", "before", "Ada", "after"]),
            ("rolled back", Busy::Rollback, vec!["two", "before", "Ada", "after"]),
        ] {
            let ran = <[Count; 3]>::default();
            let engine = lab.notes(around(&asks(&ran), SubgraphMemory::Resumable)).await;
            engine.start(id, "g", &(), graph::StartOptions::default()).await.expect("starts");
            run(&engine).await;
            let first = thread_as(&engine, id).await.waits[0].id.clone();
            engine.answer(id, &first, "Eve").await.expect("is open");
            run(&engine).await;
            assert_eq!(thread_as(&engine, id).await.status, ThreadStatus::Done);
            // The second round is stopped while it waits inside.
            engine.input(id, "1", &log("one"), Busy::Reject).await.expect("is taken");
            run(&engine).await;
            let asked = thread_as(&engine, id).await.waits[0].id.clone();
            engine.input(id, "2", &log("two"), busy).await.expect("is taken");
            run(&engine).await;
            let waiting = thread_as(&engine, id).await;
            assert_eq!(waiting.waits.len(), 1, "{waiting:?}");
            assert_ne!(waiting.waits[0].id, asked);
            let gone = engine.answer(id, &asked, "late").await.expect_err("is gone");
            assert!(matches!(gone, EngineError::UnknownInterrupt { .. } | EngineError::OtherBranch { .. }), "{gone}");
            assert_eq!(ran[0].get(), 3, "it begins anew");
            engine.answer(id, &waiting.waits[0].id, "Ada").await.expect("is open");
            run(&engine).await;
            let state: Notes = engine.state(id).await.expect("is there");
            assert_eq!(state.log[3..], lines);
        }
    }
}
