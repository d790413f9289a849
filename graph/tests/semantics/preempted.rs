//! Statements 24 and 26 together: a process dies at any write while a round makes way for an input, whether what it was writing
//! has landed or not.

use std::sync::Arc;

use graph::{Busy, Context, END, Engine, START, ServeOptions, StartOptions, ThreadStatus, WaitFor};

use crate::{
    lab::{Lab, Notes, eventually, log, notes, options, run, said, thread_as},
    storage::faulty::{Fault, Faulty},
};

/// The process that dies.
const VICTIM: &str = "the victim";

/// A round says something, starts a child if it is the first, and waits.
async fn engine_on(store: Arc<dyn graph::checkpoint::Checkpointer>) -> Engine {
    let graph = notes("g")
        .node("a", |s: Arc<Notes>, ctx: Context| async move {
            ctx.emit(ctx.thread().as_str(), "a", &())?;
            if s.log.last().is_some_and(|line| line == "first") {
                ctx.spawn("kid", "child", &())?;
            }
            Ok(log("a"))
        })
        .node("b", |_, ctx: Context| async move {
            ctx.emit(ctx.thread().as_str(), "b", &())?;
            ctx.wait_any("go", &WaitFor::new().signal("go")).await?;
            Ok(log("b"))
        })
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", END);
    let child = notes("child")
        .node("c", |_, ctx: Context| async move {
            ctx.wait_any("never", &WaitFor::new().signal("never"))
                .await?;
            Ok(log("c"))
        })
        .edge(START, "c")
        .edge("c", END);
    Engine::builder(store)
        .graph(graph.compile().expect("compiles"))
        .graph(child.compile().expect("compiles"))
        .build()
        .await
        .expect("builds")
}

/// A process dies at its n-th write while it carries out an input; the next one goes on. Returns whether there was such a write.
async fn made_up_for(lab: &Lab, id: &str, busy: Busy, dies_at: u64, fault: Fault) -> bool {
    let at = format!("{busy:?}, {fault:?} write {dies_at}");
    let calm = engine_on(lab.store.clone()).await;
    calm.start(id, "g", &log("first"), StartOptions::default())
        .await
        .expect("starts");
    run(&calm).await;
    assert_eq!(
        thread_as(&calm, id).await.status,
        ThreadStatus::Waiting,
        "{at}"
    );
    calm.input(id, "second", &log("second"), busy)
        .await
        .expect("is taken");

    let store = Arc::new(Faulty::mortal(lab.store.clone(), dies_at, fault));
    let victim = engine_on(store.clone()).await;
    let as_victim = ServeOptions {
        owner: VICTIM.to_owned(),
        ..options()
    };
    let died = tokio::select! {
        ended = victim.run_due(as_victim) => {
            ended.expect("runs");
            false
        }
        () = store.dead() => true,
    };
    drop(victim);
    calm.signal(id, "go", "k", &()).await.expect("is sent");
    let kid = format!("{id}/kid");
    eventually(&at, async || {
        // Time passes. What was on its way when the victim died may land later: so again and again.
        lab.store.break_leases(VICTIM).await.expect("breaks");
        run(&calm).await;
        thread_as(&calm, id).await.status == ThreadStatus::Done
            && thread_as(&calm, &kid).await.status == ThreadStatus::Cancelled
    })
    .await;
    let state: Notes = calm.state(id).await.expect("has a state");
    let branches = lab.store.branches(&id.into()).await.expect("reads").len();
    if busy == Busy::Rollback {
        assert_eq!(state.log, ["second", "a", "b"], "{at}");
        assert_eq!(branches, 2, "{at}");
    } else {
        assert_eq!(state.log, ["first", "a", "second", "a", "b"], "{at}");
        assert_eq!(branches, 1, "{at}");
    }
    let once_a_round = ["a null", "b null", "a null", "b null", "thread.done {}"];
    assert_eq!(said(&calm, id).await, once_a_round, "{at}");
    assert_eq!(said(&calm, &kid).await.len(), 1, "{at}");
    died
}

/// At every write, or at every so many.
async fn at_any_write(lab: Lab, busy: Busy, every: usize) {
    for fault in [Fault::Before, Fault::After] {
        let mut deaths = 0;
        for dies_at in (1..).step_by(every) {
            assert!(dies_at < 100, "it never ends");
            let id = format!("{fault:?}{dies_at}");
            if !made_up_for(&lab, &id, busy, dies_at, fault).await {
                break;
            }
            deaths += 1;
        }
        assert!(deaths * every >= 6, "there are writes to die at: {deaths}");
    }
}

macro_rules! at_any_write {
    ($name:ident, $busy:ident) => {
        mod $name {
            use super::*;

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn memory() {
                at_any_write(Lab::memory(), Busy::$busy, 1).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() {
                at_any_write(Lab::sqlite().await, Busy::$busy, 1).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgres() {
                // The others are tried elsewhere, and a server takes its time.
                at_any_write(Lab::postgres().await, Busy::$busy, 4).await;
            }
        }
    };
}

at_any_write!(
    a_process_that_dies_at_any_write_of_a_rollback_is_made_up_for,
    Rollback
);
at_any_write!(
    a_process_that_dies_at_any_write_of_an_interruption_is_made_up_for,
    Interrupt
);
