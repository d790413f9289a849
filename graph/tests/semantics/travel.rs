//! Statements 30 and 32: history, states on the way, forks.

use std::sync::Arc;

use graph::{
    Context, END, EngineError, GraphBuilder, HistoryFilter, START, Source, StorageError,
    ThreadStatus,
};
use serde_json::json;

use crate::lab::{
    Count, Notes, NotesUpdate, log, notes, promise, run, said, start_and_run, state, thread,
};

/// a → b → c, each logging the state's sum; b is counted and says so.
fn line(count: &Count) -> GraphBuilder<Notes> {
    let count = count.clone();
    let node = |name: &'static str| {
        move |s: Arc<Notes>, _: Context| async move { Ok(log(format!("{name} {}", s.sum)).sum(1)) }
    };
    notes("g")
        .node("a", node("a"))
        .node("b", move |s: Arc<Notes>, ctx: Context| {
            count.up();
            async move {
                ctx.emit("s", "b", &s.sum)?;
                Ok(log(format!("b {}", s.sum)).sum(1))
            }
        })
        .node("c", node("c"))
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", "c")
        .edge("c", END)
}

promise! {
    async fn history_is_newest_first_and_every_state_is_there(lab) {
        let engine = lab.notes(line(&Count::default())).await;
        start_and_run(&engine).await;
        let history = engine.history("t", HistoryFilter::default()).await.expect("reads");
        let short: Vec<_> = history.iter().map(|at| (at.checkpoint, at.parent, at.step, at.next.join(","))).collect();
        assert_eq!(short, [
            (3, Some(2), 3, String::new()),
            (2, Some(1), 2, "c".into()),
            (1, Some(0), 1, "b".into()),
            (0, None, 0, String::new()),
        ]);
        assert_eq!(history[0].source, Source::Step);
        assert_eq!(history[3].source, Source::Input);
        for (checkpoint, lines) in [(0, 0), (1, 1), (2, 2), (3, 3)] {
            let at = engine.state_at("t", checkpoint).await.expect("reads");
            assert_eq!(at["log"].as_array().map(Vec::len), Some(lines));
            assert_eq!(at["sum"], json!(lines));
        }
        let error = engine.state_at("t", 9).await.expect_err("is refused");
        assert!(matches!(error, EngineError::Storage(StorageError::UnknownCheckpoint { checkpoint: 9, .. })), "{error}");
        let page = HistoryFilter { before: Some(3), limit: Some(1), ..HistoryFilter::default() };
        let page = engine.history("t", page).await.expect("reads");
        assert_eq!((page.len(), page[0].checkpoint), (1, 2));
    }
}

promise! {
    async fn a_replay_runs_what_came_after_and_not_what_came_before(lab) {
        let count = Count::default();
        let engine = lab.notes(line(&count)).await;
        start_and_run(&engine).await;
        // At checkpoint 2, b has run and c is next.
        let branch = engine.fork("t", 2, None, &()).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(count.get(), 1);
        assert_eq!(state(&engine).await.log, ["a 0", "b 1", "c 2"]);
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
    }
}

promise! {
    async fn a_fork_updates_the_state_as_a_node_and_both_branches_stay(lab) {
        let count = Count::default();
        let engine = lab.notes(line(&count)).await;
        start_and_run(&engine).await;
        let update = log("as a").sum(100);
        let branch = engine.fork("t", 1, "a", &update).await.expect("forks");
        assert_eq!(branch, 1);
        // The head is what it was, until somebody says otherwise.
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a 0", "b 1", "c 2"]);
        assert_eq!(thread(&engine).await.branch, 0);

        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a 0", "as a", "b 101", "c 102"]);
        assert_eq!(count.get(), 2);

        engine.set_head("t", 0).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a 0", "b 1", "c 2"]);
        let of_fork = HistoryFilter { branch: Some(1), ..HistoryFilter::default() };
        let way: Vec<u64> = engine.history("t", of_fork).await.expect("reads").iter().map(|at| at.checkpoint).collect();
        assert_eq!(way, [6, 5, 4, 1, 0]);
        let error = engine.fork("t", 1, "ghost", &()).await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownNode { .. }), "{error}");
        let error = engine.set_head("t", 9).await.expect_err("is refused");
        assert!(matches!(error, EngineError::Storage(StorageError::UnknownBranch { branch: 9, .. })), "{error}");
    }
}

promise! {
    async fn a_fork_from_the_input_begins_anew(lab) {
        let engine = lab.notes(line(&Count::default())).await;
        start_and_run(&engine).await;
        let branch = engine.fork("t", 0, None, &NotesUpdate::default().sum(50)).await.expect("forks");
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["a 50", "b 51", "c 52"]);
    }
}

promise! {
    async fn only_the_head_speaks(lab) {
        let engine = lab.notes(line(&Count::default())).await;
        start_and_run(&engine).await;
        engine.fork("t", 1, None, &NotesUpdate::default().sum(10)).await.expect("forks");
        run(&engine).await;
        assert_eq!(said(&engine, "s").await, ["b 1"]);
        engine.set_head("t", 1).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(said(&engine, "s").await, ["b 1", "b 11"]);
    }
}

promise! {
    async fn an_old_answer_cannot_reach_a_fork(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let answer: String = ctx.interrupt("q", "?").await?;
                    Ok(log(answer))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        let old = start_and_run(&engine).await.waits[0].id.clone();
        let branch = engine.fork("t", 0, None, &()).await.expect("forks");
        // Nothing has changed for the head.
        engine.set_head("t", branch).await.expect("is a branch");
        run(&engine).await;
        let new = thread(&engine).await.waits[0].id.clone();
        assert_ne!(old, new);
        let error = engine.answer("t", &old, "old").await.expect_err("is refused");
        assert!(matches!(error, EngineError::OtherBranch { branch: 0, head: 1, .. }), "{error}");
        engine.answer("t", &new, "new").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["new"]);
        // The old branch still asks, when it is the head again.
        engine.set_head("t", 0).await.expect("is a branch");
        run(&engine).await;
        assert_eq!(thread(&engine).await.waits[0].id, old);
        engine.answer("t", &old, "old after all").await.expect("is taken");
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["old after all"]);
    }
}

promise! {
    async fn the_state_is_asked_for_as_the_graphs_own_type(lab) {
        #[derive(Clone, Debug, Default, graph::State)]
        struct Other {
            nothing: u32,
        }
        let engine = lab.notes(line(&Count::default())).await;
        start_and_run(&engine).await;
        let error = engine.state::<Other>("t").await.expect_err("is refused");
        assert!(matches!(error, EngineError::OtherState { .. }), "{error}");
        let error = engine.state::<Notes>("nobody").await.expect_err("is refused");
        assert!(matches!(error, EngineError::UnknownThread(_)), "{error}");
        let _ = Other::default().nothing;
    }
}

promise! {
    async fn a_deleted_thread_is_gone_and_what_it_said_stays(lab) {
        let engine = lab.notes(line(&Count::default())).await;
        start_and_run(&engine).await;
        assert!(engine.delete("t").await.expect("deletes"));
        assert!(!engine.delete("t").await.expect("is gone already"));
        assert!(engine.thread("t").await.expect("reads").is_none());
        assert_eq!(said(&engine, "s").await, ["b 1"]);
    }
}
