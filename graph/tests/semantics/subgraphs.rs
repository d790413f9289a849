//! Statements 31 and 8: graphs as nodes of graphs, what is remembered of them, and commands to the graph around.

use std::{sync::Arc, time::Duration};

use graph::{
    Command, Context, END, Goto, NodeError, NodeOptions, RetryPolicy, START, Send, SubgraphMemory,
    SubgraphOptions, ThreadStatus,
    checkpoint::{Write, WriteKind},
};
use serde_json::json;

use crate::lab::{
    Count, Notes, NotesUpdate, add, log, notes, promise, run, said, says, start, start_and_run,
    state, thread,
};

/// A state of another type.
#[derive(Clone, Debug, Default, PartialEq, graph::State)]
pub struct Inner {
    #[channel(append)]
    pub lines: Vec<String>,
    #[channel(reduce = add)]
    pub total: i64,
    pub topic: String,
}

pub fn line(text: impl Into<String>) -> InnerUpdate {
    InnerUpdate::default().lines(vec![text.into()])
}

pub fn inner(name: &str) -> graph::GraphBuilder<Inner> {
    graph::Graph::builder(name)
}

/// What a subgraph hands back: its lines, and its total.
pub fn back(inner: &Inner) -> NotesUpdate {
    NotesUpdate::default()
        .log(inner.lines.clone())
        .sum(inner.total)
}

/// Nothing to begin with.
#[allow(clippy::unnecessary_wraps, reason = "what the builder wants")]
pub fn nothing(_: &Notes, _: &Context) -> Result<InnerUpdate, NodeError> {
    Ok(InnerUpdate::default())
}

/// A step, a question, and a step; it counts how often each ran.
pub fn asks(ran: &[Count; 3]) -> graph::CompiledGraph<Inner> {
    let [first, second, third] = ran.clone();
    inner("asks")
        .node("before", move |_, ctx: Context| {
            first.up();
            async move {
                ctx.emit("s", "before", &())?;
                Ok(line("before").total(1))
            }
        })
        .node("ask", move |_, ctx: Context| {
            second.up();
            async move {
                ctx.emit("s", "asking", &ctx.interrupt_id("name"))?;
                let name: String = ctx.interrupt("name", "Who?").await?;
                Ok(line(name))
            }
        })
        .node("after", move |_, ctx: Context| {
            third.up();
            async move {
                ctx.emit("s", "after", &())?;
                Ok(line("after").total(10))
            }
        })
        .edge(START, "before")
        .edge("before", "ask")
        .edge("ask", "after")
        .edge("after", END)
        .compile()
        .expect("compiles")
}

promise! {
    async fn a_graph_of_another_state_is_a_node(lab) {
        let child = inner("child")
            .node("shout", |s: Arc<Inner>, ctx: Context| async move {
                Ok(line(format!("{} {:?} {}", s.topic, ctx.namespace(), ctx.step_number())))
            })
            .node("again", |s: Arc<Inner>, ctx: Context| async move {
                Ok(line(format!("{} {}", s.lines.len(), ctx.step_number())).total(2))
            })
            .edge(START, "shout").edge("shout", "again").edge("again", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .node("a", |_, _| async { Ok(log("a").last("tea".into())) })
                .subgraph("sub", &child, |s: &Notes, _: &Context| Ok(InnerUpdate::default().topic(s.last.clone())), back)
                .node("b", |_, _| says("b"))
                .edge(START, "a").edge("a", "sub").edge("sub", "b").edge("b", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        let state = state(&engine).await;
        assert_eq!(state.log, ["a", "tea [\"sub\"] 1", "1 2", "b"]);
        assert_eq!(state.sum, 2);
        // The steps of a subgraph are not the thread's.
        assert_eq!(thread(&engine).await.step, 3);
    }
}

promise! {
    async fn a_resumable_subgraph_goes_on_after_a_wait_and_does_nothing_twice(lab) {
        let ran = [Count::default(), Count::default(), Count::default()];
        let graph = || notes("g")
            .subgraph("sub", &asks(&ran), nothing, back)
            .edge(START, "sub").edge("sub", END);
        let engine = lab.notes(graph()).await;
        let waiting = start_and_run(&engine).await;
        assert_eq!(waiting.status, ThreadStatus::Waiting);
        assert_eq!(waiting.waits.len(), 1);
        assert_eq!(waiting.waits[0].task, "sub/2/ask");
        // What was said before the wait has landed, with the id that can be answered.
        let id = &waiting.waits[0].id;
        assert_eq!(said(&engine, "s").await, ["before null".to_owned(), format!("asking {}", json!(id))]);
        // In another process.
        let other = lab.notes(graph()).await;
        other.answer("t", id, "Ada").await.expect("is open");
        run(&other).await;
        assert_eq!(thread(&other).await.status, ThreadStatus::Done);
        assert_eq!(state(&other).await.log, ["before", "Ada", "after"]);
        assert_eq!(state(&other).await.sum, 11);
        assert_eq!([ran[0].get(), ran[1].get(), ran[2].get()], [1, 2, 1]);
        assert_eq!(said(&other, "s").await.len(), 3);
        // And the next invocation, in the next round, begins anew with a question of its own.
        other.input("t", "more", &(), graph::Busy::Reject).await.expect("is taken");
        run(&other).await;
        let again = thread(&other).await;
        assert_eq!(again.waits.len(), 1);
        assert_ne!(&again.waits[0].id, id);
        assert_eq!(ran[0].get(), 2);
    }
}

promise! {
    async fn a_fan_out_to_a_subgraph_runs_each_with_its_own_argument_and_namespace(lab) {
        let child = inner("child")
            .node("ask", |s: Arc<Inner>, ctx: Context| async move {
                let answer: i64 = ctx.interrupt("n", &s.topic).await?;
                Ok(line(format!("{} {}", ctx.namespace()[0], s.topic)).total(answer))
            })
            .node("end", |_, _| async { Ok(line("end")) })
            .edge(START, "ask").edge("ask", "end").edge("end", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .subgraph("sub", &child, |_, ctx: &Context| Ok(InnerUpdate::default().topic(ctx.argument()?)), back)
                .conditional(START, ["sub"], |_: &Notes| {
                    Goto::sends(["x", "y", "z"].map(|topic| Send::new("sub", topic)))
                })
                .edge("sub", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        let mut ids: Vec<&str> = waiting.waits.iter().map(|wait| wait.id.as_str()).collect();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), 3);
        // Answered in the wrong order, one after the other.
        for (index, wait) in waiting.waits.iter().enumerate().rev() {
            engine.answer("t", &wait.id, &(10_i64.pow(u32::try_from(index).expect("is small")))).await.expect("is open");
            run(&engine).await;
        }
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        let state = state(&engine).await;
        assert_eq!(state.log, ["0:sub x", "end", "1:sub y", "end", "2:sub z", "end"]);
        assert_eq!(state.sum, 111);
    }
}

promise! {
    async fn a_retry_of_a_subgraph_runs_only_what_failed_inside(lab) {
        let ran = [Count::default(), Count::default(), Count::default(), Count::default()];
        let [first, good, bad, _] = ran.clone();
        let child = inner("child")
            .node("first", move |_, _| { first.up(); async { Ok(line("first")) } })
            .node("good", move |_, ctx: Context| {
                good.up();
                async move {
                    ctx.emit("s", "good", &())?;
                    Ok(line("good"))
                }
            })
            .node("bad", move |_, ctx: Context| {
                let tries = bad.up();
                async move {
                    let paid: usize = ctx.step("pay", |_| async move { Ok::<_, NodeError>(tries) }).await?;
                    if tries < 3 {
                        return Err(NodeError::msg("not yet"));
                    }
                    Ok(line(format!("bad {tries} paid {paid}")))
                }
            })
            .edge(START, "first").edge("first", "good").edge("first", "bad").edge("good", END).edge("bad", END)
            .compile().expect("compiles");
        let retried = RetryPolicy::default().attempts(3).first_interval(Duration::from_millis(1));
        let outer = ran[3].clone();
        let engine = lab.notes(
            notes("g")
                .subgraph_with(
                    "sub",
                    SubgraphOptions::default().node(NodeOptions::default().retry(retried)),
                    &child,
                    move |_: &Notes, _: &Context| { outer.up(); Ok(InnerUpdate::default()) },
                    back,
                )
                .edge(START, "sub").edge("sub", END),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["first", "bad 3 paid 1", "good"]);
        assert_eq!(ran.each_ref().map(Count::get), [1, 1, 3, 3]);
        assert_eq!(said(&engine, "s").await, ["good null"]);
    }
}

promise! {
    async fn a_failure_inside_is_told_with_its_way_and_can_be_retried_by_hand(lab) {
        let ran = [Count::default(), Count::default()];
        let [first, bad] = ran.clone();
        let child = inner("child")
            .node("first", move |_, _| { first.up(); async { Ok(line("first")) } })
            .node("bad", move |_, _| {
                let tries = bad.up();
                async move {
                    if tries == 1 { Err(NodeError::msg("the disk is full")) } else { Ok(line("bad")) }
                }
            })
            .edge(START, "first").edge("first", "bad").edge("bad", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g").subgraph("sub", &child, nothing, back).edge(START, "sub").edge("sub", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert_eq!(failed.error.as_deref(), Some("node `sub`: node `bad`: the disk is full"));
        engine.retry("t").await.expect("can be retried");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["first", "bad"]);
        assert_eq!(ran.each_ref().map(Count::get), [1, 2]);
    }
}

promise! {
    async fn a_stateless_subgraph_remembers_nothing_and_cannot_wait(lab) {
        let ran = Count::default();
        let counted = ran.clone();
        let child = inner("child")
            .node("first", move |_, ctx: Context| {
                counted.up();
                async move {
                    ctx.emit("s", "first", &())?;
                    Ok(line("first"))
                }
            })
            .node("flaky", |_, ctx: Context| async move {
                if ctx.attempt() < 3 { Err(NodeError::msg("not yet")) } else { Ok(line("flaky")) }
            })
            .edge(START, "first").edge("first", "flaky").edge("flaky", END)
            .compile().expect("compiles");
        // Its own retries are counted in the process; those of the node around it begin anew.
        let asks = asks(&Default::default());
        let tries = Count::default();
        let engine = lab.notes(
            notes("g")
                .node_with(
                    "outer",
                    NodeOptions::default().retry(RetryPolicy::default().attempts(2).first_interval(Duration::from_millis(1))),
                    move |_, ctx: Context| {
                        let (child, tries) = (child.clone(), tries.clone());
                        async move {
                            let got = ctx.invoke("child", &child, SubgraphMemory::Stateless, InnerUpdate::default()).await;
                            assert!(got.is_err(), "it is not retried inside");
                            if tries.up() == 1 {
                                return Err(NodeError::msg("once more"));
                            }
                            Ok(log("outer"))
                        }
                    },
                )
                .subgraph_with("sub", SubgraphMemory::Stateless, &asks, nothing, back)
                .edge(START, "outer").edge("outer", "sub").edge("sub", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        let error = failed.error.expect("says why");
        assert!(error.contains("node `sub`: node `ask`") && error.contains("stateless"), "{error}");
        assert_eq!(state(&engine).await.log, ["outer"]);
        assert_eq!(ran.get(), 2);
        // Of the one that succeeded in the end, what it said landed once; of the one that failed, nothing did.
        assert_eq!(said(&engine, "s").await, ["first null"]);
        let writes = lab.store.pending_writes(&"t".into()).await.expect("reads");
        let inside = |write: &Write| write.task.contains('/') || write.kind == WriteKind::Sub;
        assert!(!writes.iter().any(inside), "{writes:?}");
    }
}

promise! {
    async fn an_accumulating_subgraph_goes_on_from_what_it_kept(lab) {
        let child = inner("child")
            .node("talk", |s: Arc<Inner>, _| async move {
                Ok(line(format!("{} after {}", s.topic, s.lines.len())).total(1))
            })
            .node("more", |s: Arc<Inner>, _| async move { Ok(line(format!("{}", s.total))) })
            .edge(START, "talk").edge("talk", "more").edge("more", END)
            .compile().expect("compiles");
        let graph = || notes("g")
            .subgraph_with(
                "sub", SubgraphMemory::Accumulating, &child,
                |s: &Notes, _: &Context| Ok(InnerUpdate::default().topic(format!("t{}", s.sum))),
                |inner: &Inner| NotesUpdate::default().log(vec![inner.lines.join(", ")]).sum(1),
            )
            .edge(START, "sub")
            .conditional("sub", ["sub", END], |s: &Notes| if s.sum % 2 == 1 { "sub" } else { END });
        let engine = lab.notes(graph()).await;
        start_and_run(&engine).await;
        let both = ["t0 after 0, 1".to_owned(), "t0 after 0, 1, t1 after 2, 2".to_owned()];
        assert_eq!(state(&engine).await.log, both);
        // In another process, with a further input.
        let other = lab.notes(graph()).await;
        other.input("t", "1", &(), graph::Busy::Reject).await.expect("is taken");
        run(&other).await;
        assert_eq!(state(&other).await.log[3], "t0 after 0, 1, t1 after 2, 2, t2 after 4, 3, t3 after 6, 4");
        // Nobody sees it in the thread's own state.
        let value = other.state_at("t", 4).await.expect("is there");
        assert_eq!(value.as_object().expect("is an object").keys().collect::<Vec<_>>(), ["last", "log", "seen", "sum"]);
        // A fork goes on from what was kept there.
        let fork = other.fork("t", 1, "sub", &NotesUpdate::default()).await.expect("forks");
        other.set_head("t", fork).await.expect("is there");
        run(&other).await;
        assert_eq!(state(&other).await.log[1], "t0 after 0, 1, t1 after 2, 2");
    }
}

promise! {
    async fn an_accumulating_subgraph_survives_snapshots_and_long_histories(lab) {
        let child = inner("child")
            .node("count", |_, _| async { Ok(InnerUpdate::default().total(1).lines(vec!["x".into()])) })
            .edge(START, "count").edge("count", END)
            .compile().expect("compiles");
        let graph = || notes("g")
            .subgraph_with("sub", SubgraphMemory::Accumulating, &child, nothing, |inner: &Inner| {
                NotesUpdate::default().last(format!("{} {}", inner.total, inner.lines.len())).sum(1)
            })
            .edge(START, "sub")
            .conditional("sub", ["sub", END], |s: &Notes| if s.sum % 40 == 0 { END } else { "sub" });
        for round in 1..=3 {
            // Another process each time: what is kept is read back.
            let engine = lab.notes(graph()).await;
            if round == 1 {
                start(&engine).await;
            } else {
                engine.input("t", &format!("{round}"), &(), graph::Busy::Reject).await.expect("is taken");
            }
            run(&engine).await;
            let total = round * 40;
            assert_eq!(state(&engine).await.last, format!("{total} {total}"));
        }
        let rows = lab.store.state_rows(&"t".into(), None).await.expect("reads");
        assert!(rows.since_snapshot.is_some(), "there is a snapshot");
    }
}

promise! {
    async fn an_accumulating_subgraph_is_reached_once_in_a_superstep(lab) {
        let child = inner("child")
            .node("a", |_, _| async { Ok(line("a")) })
            .edge(START, "a").edge("a", END)
            .compile().expect("compiles");
        let between = notes("between")
            .subgraph_with("sub", SubgraphMemory::Accumulating, &child, nothing, back)
            .edge(START, "sub").edge("sub", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .subgraph("between", &between, |_, _| Ok(NotesUpdate::default()), |_: &Notes| ())
                .conditional(START, ["between"], |_: &Notes| Goto::sends([1, 2].map(|n| Send::new("between", &n))))
                .edge("between", END),
        ).await;
        let failed = start_and_run(&engine).await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        let error = failed.error.expect("says why");
        assert!(error.contains("accumulating subgraph `between/sub`"), "{error}");
    }
}

promise! {
    async fn a_command_of_a_subgraph_addresses_the_graph_around_it(lab) {
        let child = inner("child")
            .node("a", |_, _| async { Ok(line("a")) })
            .node("hand_over", |_, _| async {
                let command = Command::<Notes>::goto("other").update(log("handed over").sum(5));
                Ok(vec![Command::new().update(line("lost")), Command::<Inner>::parent(command)])
            })
            .node("never", |_, _| async { Ok(line("never")) })
            .edge(START, "a").edge("a", "hand_over").edge("hand_over", "never").edge("never", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .subgraph("sub", &child, nothing, back)
                .node("next", |_, _| says("next"))
                .node("other", |_, _| says("other"))
                .edge(START, "sub").edge("sub", "next").edge("next", END).edge("other", END)
                .goes("sub", ["other"]),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        // It adds to the static edges, and takes the place of the subgraph's result.
        assert_eq!(state(&engine).await.log, ["handed over", "next", "other"]);
        assert_eq!(state(&engine).await.sum, 5);
    }
}

promise! {
    async fn a_command_goes_up_through_several_graphs_and_through_invocations(lab) {
        let lowest = inner("lowest")
            .node("up", |_, _| async {
                let top = Command::<Notes>::goto("other").update(log("from below"));
                Ok(Command::<Inner>::parent(Command::<Inner>::parent(top).update(line("between"))))
            })
            .edge(START, "up").edge("up", END)
            .compile().expect("compiles");
        let middle = inner("middle")
            .node("call", move |_, ctx: Context| {
                let lowest = lowest.clone();
                async move {
                    ctx.invoke("lowest", &lowest, SubgraphMemory::Resumable, InnerUpdate::default()).await?;
                    Ok(line("not reached"))
                }
            })
            .edge(START, "call").edge("call", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .subgraph("sub", &middle, nothing, back)
                .node("other", |_, _| says("other"))
                .edge(START, "sub").edge("sub", END).edge("other", END)
                .goes("sub", ["other"]),
        ).await;
        assert_eq!(start_and_run(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["from below", "other"]);
    }
}

promise! {
    async fn a_command_to_a_parent_that_is_not_there_or_cannot_follow_it_is_an_error(lab) {
        let child = notes("child")
            .node("up", |_, _| async { Ok(Command::<Notes>::parent(Command::<Notes>::goto("other"))) })
            .edge(START, "up").edge("up", END);
        let alone = notes("g")
            .node("up", |_, _| async { Ok(Command::<Notes>::parent(Command::<Notes>::new())) })
            .edge(START, "up").edge("up", END);
        let engine = lab.notes(alone).await;
        let failed = start_and_run(&engine).await.error.expect("says why");
        assert!(failed.contains("`up`") && failed.contains("has none"), "{failed}");
        // Not declared there.
        let engine = lab.notes(
            notes("g")
                .subgraph_shared("sub", SubgraphMemory::Resumable, &child.compile().expect("compiles"))
                .node("other", |_, _| says("other"))
                .edge(START, "sub").edge("sub", "other").edge("other", END),
        ).await;
        crate::lab::start_as(&engine, "u").await;
        run(&engine).await;
        let failed = crate::lab::thread_as(&engine, "u").await.error.expect("says why");
        assert!(failed.contains("node `sub` went to `other`") && failed.contains("goes"), "{failed}");
        // Of another state than it was made for.
        let child = notes("child")
            .node("up", |_, _| async { Ok(Command::<Notes>::parent(Command::<Inner>::new().update(line("x")))) })
            .edge(START, "up").edge("up", END).compile().expect("compiles");
        let engine = lab.notes(
            notes("g").subgraph_shared("sub", SubgraphMemory::Resumable, &child).edge(START, "sub").edge("sub", END),
        ).await;
        crate::lab::start_as(&engine, "v").await;
        run(&engine).await;
        let failed = crate::lab::thread_as(&engine, "v").await.error.expect("says why");
        assert!(failed.contains("does not fit the state of its parent") && failed.contains("`lines`"), "{failed}");
    }
}

promise! {
    async fn a_subgraph_that_shares_the_state_hands_back_what_it_changed(lab) {
        let child = notes("child")
            .node("a", |s: Arc<Notes>, _| async move { Ok(log(format!("sees {:?}", s.log)).sum(2).last("child".into())) })
            .node("b", |_, ctx: Context| async move {
                let word: String = ctx.interrupt("word", &()).await?;
                Ok(log(word).sum(3).last("b".into()).seen([("k".to_owned(), 1)].into()))
            })
            .node("c", |s: Arc<Notes>, _| async move { Ok(log(format!("{} {}", s.sum, s.last)).seen([("l".to_owned(), 2)].into())) })
            .edge(START, "a").edge("a", "b").edge("b", "c").edge("c", END)
            .compile().expect("compiles");
        let engine = lab.notes(
            notes("g")
                .node("first", |_, _| async { Ok(log("first").sum(100)) })
                .subgraph_shared("sub", SubgraphOptions::default(), &child)
                .edge(START, "first").edge("first", "sub").edge("sub", END),
        ).await;
        let waiting = start_and_run(&engine).await;
        engine.answer("t", &waiting.waits[0].id, "word").await.expect("is open");
        run(&engine).await;
        let state = state(&engine).await;
        assert_eq!(state.log, ["first", "sees [\"first\"]", "word", "105 b"]);
        assert_eq!((state.sum, state.last.as_str(), state.seen.len()), (105, "b", 2));
    }
}
