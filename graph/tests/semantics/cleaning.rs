//! Statements 23 and 31: subgraphs clean up when the thread is cancelled, from the inside out.

use std::sync::Arc;

use graph::{
    CompiledGraph, Context, END, Goto, GraphBuilder, NodeError, START, Send, SubgraphMemory,
    ThreadStatus,
};

use crate::{
    lab::{
        Count, Notes, NotesUpdate, eventually, log, notes, options, promise, run, said, serve,
        start, start_and_run, state, thread, until_cancelled, until_status,
    },
    subgraphs::{Inner, InnerUpdate, back, inner, line, nothing},
};

/// Logs, does something long, and has a node that cleans up.
fn tidy<F, Fut>(long: F) -> CompiledGraph<Inner>
where
    F: Fn(Context) -> Fut + std::marker::Send + Sync + 'static,
    Fut: Future<Output = Result<String, NodeError>> + std::marker::Send + 'static,
{
    inner("tidy")
        .node("first", |_, _| async { Ok(line("first")) })
        .node("long", move |_, ctx: Context| {
            let long = long(ctx);
            async move { Ok(line(long.await?)) }
        })
        .node("tidy", |s: Arc<Inner>, ctx: Context| async move {
            let paid: u32 = ctx.step("pay", |_| async { Ok::<_, NodeError>(1) }).await?;
            ctx.emit(
                "s",
                &format!("tidied {}", ctx.namespace().join("/")),
                &s.lines,
            )?;
            Ok(line("tidied").total(paid.into()))
        })
        .edge(START, "first")
        .edge("first", "long")
        .edge("long", END)
        .edge("tidy", END)
        .on_cancel("tidy")
        .compile()
        .expect("compiles")
}

/// A graph `g` around it, which cleans up too.
fn around(graph: &CompiledGraph<Inner>, memory: SubgraphMemory) -> GraphBuilder<Notes> {
    notes("g")
        .subgraph_with("sub", memory, graph, nothing, back)
        .node("clean", |s: Arc<Notes>, ctx: Context| async move {
            ctx.emit("s", "cleaned", &s.log)?;
            Ok(log("cleaned"))
        })
        .edge(START, "sub")
        .edge("sub", END)
        .edge("clean", END)
        .on_cancel("clean")
}

promise! {
    async fn a_subgraph_that_sleeps_cleans_up_and_can_be_resumed(lab) {
        for memory in [SubgraphMemory::Resumable, SubgraphMemory::Accumulating] {
            let id = format!("{memory:?}");
            let graph = || {
                let tidy = tidy(|ctx: Context| async move { ctx.interrupt("q", &()).await });
                around(&tidy, memory)
            };
            let engine = lab.notes(graph()).await;
            crate::lab::start_as(&engine, &id).await;
            run(&engine).await;
            engine.cancel(id.as_str(), "enough").await.expect("is there");
            // In another process.
            let other = lab.notes(graph()).await;
            run(&other).await;
            let cancelled = crate::lab::thread_as(&other, &id).await;
            assert_eq!(cancelled.status, ThreadStatus::Cancelled);
            let state: Option<Inner> = other.state_inside(id.as_str(), &["sub"]).await.expect("reads");
            assert_eq!(state.expect("is under way").lines, ["first", "tidied"]);
            other.retry(id.as_str()).await.expect("can be resumed");
            run(&other).await;
            let waiting = crate::lab::thread_as(&other, &id).await;
            other.answer(id.as_str(), &waiting.waits[0].id, "Ada").await.expect("is open");
            run(&other).await;
            let state: Notes = other.state(id.as_str()).await.expect("is there");
            assert_eq!(state.log, ["cleaned", "first", "tidied", "Ada"]);
            assert_eq!(state.sum, 1);
        }
        let engine = lab.notes(around(&tidy(|_| async { Ok(String::new()) }), SubgraphMemory::Resumable)).await;
        let once = ["tidied sub [\"first\"]", "cleaned []"];
        assert_eq!(said(&engine, "s").await, [once, once].concat());
    }
}

promise! {
    async fn a_subgraph_that_runs_is_stopped_and_cleans_up(lab) {
        let begun = Count::default();
        let counted = begun.clone();
        let tidy = tidy(move |ctx: Context| {
            let tries = counted.up();
            async move {
                if tries == 1 {
                    until_cancelled(&ctx).await;
                    return Err(NodeError::msg("was stopped"));
                }
                Ok("long".to_owned())
            }
        });
        let engine = lab.notes(around(&tidy, SubgraphMemory::Resumable)).await;
        start(&engine).await;
        let server = serve(&engine, options());
        eventually("it runs", || async { begun.get() == 1 }).await;
        engine.cancel("t", "enough").await.expect("is there");
        until_status(&engine, "t", ThreadStatus::Cancelled).await;
        assert_eq!(said(&engine, "s").await, ["tidied sub [\"first\"]", "cleaned []"]);
        engine.retry("t").await.expect("can be resumed");
        until_status(&engine, "t", ThreadStatus::Done).await;
        server.drain().await;
        assert_eq!(state(&engine).await.log, ["cleaned", "first", "tidied", "long"]);
    }
}

promise! {
    async fn subgraphs_clean_up_from_the_inside_out_and_what_was_done_is_not_done_again(lab) {
        let effects = Count::default();
        let counted = effects.clone();
        let lowest = tidy(|ctx: Context| async move { ctx.interrupt("q", &()).await });
        let call = move |_, ctx: Context| {
            let (lowest, effects) = (lowest.clone(), counted.clone());
            async move {
                ctx.step("effect", |_| async move { Ok::<_, NodeError>(effects.up()) }).await?;
                ctx.emit("s", "called", &())?;
                let end = ctx.invoke("low", &lowest, SubgraphMemory::Resumable, InnerUpdate::default()).await?;
                ctx.step("later", |_| async move { Ok::<_, NodeError>(()) }).await?;
                Ok(NotesUpdate::default().log(end.lines.clone()))
            }
        };
        let middle = notes("middle")
            .node("call", call)
            .node("mend", |_, ctx: Context| async move {
                ctx.emit("s", &format!("mended {}", ctx.namespace().join("/")), &())?;
                Ok(())
            })
            .edge(START, "call").edge("call", END).edge("mend", END)
            .on_cancel("mend")
            .compile().expect("compiles");
        let graph = || notes("g")
            .subgraph("sub", &middle, |_, _| Ok(NotesUpdate::default()), |s: &Notes| log(s.log.join(" ")))
            .node("beside", |_, _| async { Ok(log("beside")) })
            .conditional(START, ["sub", "beside"], |_: &Notes| {
                Goto::node("beside").and(Goto::sends([1, 2].map(|n| Send::new("sub", &n))))
            })
            .edge("sub", END).edge("beside", END);
        start_and_run(&lab.notes(graph()).await).await;
        let engine = lab.notes(graph()).await;
        engine.cancel("t", "enough").await.expect("is there");
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Cancelled);
        assert_eq!(said(&engine, "s").await, [
            "called null",
            "called null",
            "tidied 0:sub/call+low [\"first\"]",
            "mended 0:sub null",
            "tidied 1:sub/call+low [\"first\"]",
            "mended 1:sub null",
        ]);
        assert_eq!(effects.get(), 2);
        engine.retry("t").await.expect("can be resumed");
        run(&engine).await;
        for wait in thread(&engine).await.waits {
            engine.answer("t", &wait.id, "Ada").await.expect("is open");
        }
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["beside", "first tidied Ada", "first tidied Ada"]);
        assert_eq!(effects.get(), 2);
    }
}
