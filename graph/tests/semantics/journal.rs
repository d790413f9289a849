//! Statements 34 and 35: what is said.

use std::time::{Duration, Instant};

use graph::{
    Appended, Context, Cursor, END, JournalFilter, NodeError, START, ServeOptions, StartOptions,
};
use serde_json::json;

use crate::lab::{
    SOON, entries, log, notes, options, promise, run, said, serve, start_and_run, start_as, takes,
};

promise! {
    async fn events_land_with_the_step_and_are_numbered_without_gaps_per_stream(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    for n in 0..3 {
                        ctx.emit("shared", "said", &json!({"by": ctx.thread(), "n": n}))?;
                        ctx.emit(ctx.thread().as_str(), "own", &n)?;
                    }
                    Ok(log("a"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        for n in 0..20 {
            start_as(&engine, &format!("t{n}")).await;
        }
        engine.run_due(ServeOptions { concurrency: 10, ..options() }).await.expect("runs");
        let shared = entries(&engine, "shared").await;
        assert_eq!(shared.len(), 60);
        for (index, entry) in shared.iter().enumerate() {
            assert_eq!(entry.number, index as u64 + 1);
            assert_eq!(entry.payload["by"], json!(entry.thread));
        }
        assert!(shared.windows(2).all(|two| two[0].cursor < two[1].cursor));
        // What one step says stays together and in order.
        for three in shared.chunks(3) {
            assert!(three.iter().all(|entry| entry.thread == three[0].thread));
            assert_eq!(three.iter().map(|entry| entry.payload["n"].as_u64()).collect::<Vec<_>>(), [Some(0), Some(1), Some(2)]);
        }
        let own = entries(&engine, "t7").await;
        let short: Vec<_> = own.iter().map(|entry| (entry.number, entry.name.as_str())).collect();
        assert_eq!(short, [(1, "own"), (2, "own"), (3, "own"), (4, "thread.done")]);
        // All streams in one order, page by page.
        let journal = engine.journal();
        let (mut after, mut seen) = (Cursor::START, 0);
        loop {
            let page = journal.read(&JournalFilter::all(), after, 7).await.expect("reads");
            let Some(last) = page.last() else { break };
            assert!(page.iter().all(|entry| entry.cursor > after));
            after = last.cursor;
            seen += page.len();
        }
        assert_eq!(seen, 20 * 7);
        assert_eq!(journal.end().await.expect("reads"), after);
    }
}

promise! {
    async fn what_is_said_at_once_survives_the_failure_of_its_task(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_, ctx: Context| async move {
                    let first = ctx.say_now("spent:1", "ledger", "spent", &3).await?;
                    let again = ctx.say_now("spent:1", "ledger", "spent", &3).await?;
                    assert_eq!((first, again), (Appended::New, Appended::Duplicate));
                    Err::<(), _>(NodeError::msg("no"))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start_and_run(&engine).await;
        assert_eq!(said(&engine, "ledger").await, ["spent 3"]);
    }
}

promise! {
    async fn others_than_nodes_may_append(lab) {
        let engine = lab.notes(notes("g").node("a", |_, _| async { Ok(()) }).edge(START, "a").edge("a", END)).await;
        let journal = engine.journal();
        let first = journal.append("id", "s", "outside", &1).await.expect("appends");
        let again = journal.append("id", "s", "outside", &2).await.expect("appends");
        assert_eq!((first, again), (Appended::New, Appended::Duplicate));
        let entries = entries(&engine, "s").await;
        assert_eq!((entries.len(), entries[0].thread.is_none(), entries[0].payload.clone()), (1, true, json!(1)));
    }
}

promise! {
    async fn a_reader_is_woken_when_there_is_something_new(lab) {
        let engine = lab.notes(notes("g").node("a", |_, _| async { Ok(()) }).edge(START, "a").edge("a", END)).await;
        let journal = engine.journal();
        // Nothing comes: it ends with the time.
        let before = Instant::now();
        journal.changed(Cursor::START, Duration::from_millis(30)).await.expect("reads");
        assert!(before.elapsed() >= Duration::from_millis(30));
        // Something comes while it waits.
        let before = Instant::now();
        let (waited, ()) = tokio::join!(
            journal.changed(Cursor::START, Duration::from_mins(1)),
            async {
                takes(20).await;
                engine.start("t", "g", &(), StartOptions::default()).await.expect("starts");
                run(&engine).await;
            }
        );
        waited.expect("reads");
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        // Something is there already.
        let before = Instant::now();
        journal.changed(Cursor::START, Duration::from_mins(1)).await.expect("reads");
        assert!(before.elapsed() < SOON);
    }
}

promise! {
    async fn a_reader_hears_of_what_another_process_says_within_a_second(lab) {
        let graph = || notes("g").node("a", |_, _| async { Ok(()) }).edge(START, "a").edge("a", END);
        let (reader, writer) = (lab.notes(graph()).await, lab.notes(graph()).await);
        let server = serve(&writer, options());
        let journal = reader.journal();
        let before = Instant::now();
        let (waited, ()) = tokio::join!(
            journal.changed(Cursor::START, Duration::from_mins(1)),
            async { takes(20).await; start_as(&writer, "t").await; }
        );
        waited.expect("reads");
        assert!(before.elapsed() < SOON, "{:?}", before.elapsed());
        server.drain().await;
    }
}
