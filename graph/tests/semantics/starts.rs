//! Statements 24, 25 and 29: a thread that is started where there is room begins at once, overtakes nobody, and goes on
//! whatever becomes of whoever started it.

use std::{sync::Arc, time::Duration};

use graph::{Context, END, Engine, GraphBuilder, START, ServeOptions, StartOptions, ThreadStatus};
use parking_lot::Mutex;
use tokio::sync::Semaphore;

use crate::lab::{
    Notes, Server, eventually, log, notes, options, promise, says, serve, start_as, thread_as,
    until_status,
};
use crate::storage::faulty::{Fault, Faulty};

fn brief() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, _| says("a"))
        .edge(START, "a")
        .edge("a", END)
}

/// Runs threads, and never polls.
fn serve_deaf(engine: &Engine, concurrency: usize) -> Server {
    let options = ServeOptions {
        concurrency,
        poll: Duration::from_hours(1),
        lease: Duration::from_hours(1),
        ..options()
    };
    serve(engine, options)
}

promise! {
    async fn a_thread_that_is_started_where_there_is_room_need_not_be_claimed(lab) {
        const THREADS: u64 = 30;
        let store = Arc::new(Faulty::creations(lab.store.clone(), |_| None));
        let engine = Engine::builder(store.clone())
            .graph(brief().compile().expect("compiles"))
            .build()
            .await
            .expect("builds");
        let server = serve_deaf(&engine, 1);
        for n in 0..THREADS {
            let id = n.to_string();
            start_as(&engine, &id).await;
            until_status(&engine, &id, ThreadStatus::Done).await;
        }
        // The first ones may meet the server's own first looks.
        let claims = store.claims_seen();
        if lab.store.creates_leased() {
            assert!(claims < THREADS / 2, "{claims} claims");
        } else {
            assert!(claims >= THREADS, "{claims} claims");
        }
        server.drain().await;
    }
}

promise! {
    async fn a_thread_that_is_started_does_not_overtake_those_that_wait_for_room(lab) {
        let order = Arc::new(Mutex::new(Vec::new()));
        let go = Arc::new(Semaphore::new(0));
        let (noted, held) = (order.clone(), go.clone());
        let graph = notes("g")
            .node("a", move |_, ctx: Context| {
                let (order, go) = (noted.clone(), held.clone());
                async move {
                    order.lock().push(ctx.thread().to_string());
                    go.acquire().await.expect("is not closed").forget();
                    Ok(log("a"))
                }
            })
            .edge(START, "a")
            .edge("a", END);
        let engine = lab.notes(graph).await;
        let server = serve_deaf(&engine, 1);
        let begun = |count: usize| {
            let order = order.clone();
            async move {
                eventually("as many have begun", || async { order.lock().len() == count }).await;
            }
        };
        start_as(&engine, "1").await;
        begun(1).await;
        // There is no room for these.
        start_as(&engine, "2").await;
        start_as(&engine, "3").await;
        go.add_permits(1);
        begun(2).await;
        start_as(&engine, "4").await;
        go.add_permits(1);
        begun(3).await;
        start_as(&engine, "5").await;
        go.add_permits(3);
        for id in ["1", "2", "3", "4", "5"] {
            until_status(&engine, id, ThreadStatus::Done).await;
        }
        assert_eq!(*order.lock(), ["1", "2", "3", "4", "5"]);
        server.drain().await;
    }
}

promise! {
    async fn a_thread_whose_start_was_not_answered_goes_on(lab) {
        // The second and the third; the first one finds out whether there is room.
        let store = Faulty::creations(lab.store.clone(), |n| match n {
            2 => Some(Fault::After),
            3 => Some(Fault::Mute),
            _ => None,
        });
        let engine = Engine::builder(Arc::new(store))
            .graph(brief().compile().expect("compiles"))
            .build()
            .await
            .expect("builds");
        // A lease that nobody gives back holds for longer than the test waits.
        let options = ServeOptions {
            lease: Duration::from_hours(1),
            ..options()
        };
        let server = serve(&engine, options);
        start_as(&engine, "1").await;
        until_status(&engine, "1", ThreadStatus::Done).await;
        let lost = engine.start("2", "g", &(), StartOptions::default()).await;
        lost.expect_err("the answer is lost");
        let mute = engine.start("3", "g", &(), StartOptions::default());
        let there = eventually("it is created", || async {
            engine.thread("3").await.expect("reads").is_some()
        });
        tokio::select! {
            answer = mute => panic!("it was answered: {answer:?}"),
            // Whoever started it goes away.
            () = there => {}
        }
        for id in ["2", "3"] {
            until_status(&engine, id, ThreadStatus::Done).await;
            assert_eq!(thread_as(&engine, id).await.step, 1);
        }
        server.drain().await;
    }
}
