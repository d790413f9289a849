use serde_json::json;
use store::{Error, PROJECTION_TABLES, Projector};

use crate::journal::{Journal, P};
use crate::world::World;

on_both!(
    rebuilding_makes_the_same_rows_and_sends_nothing,
    the_size_of_batches_changes_nothing,
    entries_that_were_applied_change_nothing,
    a_batch_that_leaves_a_gap_is_refused,
    projectors_at_the_same_time_apply_each_entry_once,
    nothing_is_handed_out_before_a_rebuild_is_back_where_it_was,
    a_batch_that_cannot_be_applied_changes_nothing,
);

async fn send_everything(world: &World) -> Vec<(String, i64)> {
    let mut sent = Vec::new();
    for _ in 0..500 {
        let deliveries = world.store.next_deliveries("telegram", 10).await.unwrap();
        if deliveries.is_empty() {
            return sent;
        }
        for delivery in deliveries {
            let id = delivery
                .message_id
                .clone()
                .unwrap_or_else(|| format!("m{}", sent.len()));
            world.store.delivery_sent(&delivery, &id).await.unwrap();
            sent.push((delivery.intent, delivery.revision));
        }
    }
    panic!("the outbox never ends: {sent:?}");
}

async fn listening(world: &World) {
    let store = &world.store;
    for project in [P, "pbbbbbbbbbb"] {
        store
            .set_current_project("telegram", "7", Some(&project.into()))
            .await
            .unwrap();
    }
    store
        .set_admin_chats("telegram", &["1".to_owned()])
        .await
        .unwrap();
}

async fn rebuilding_makes_the_same_rows_and_sends_nothing(world: &World) {
    listening(world).await;
    let journal = Journal::whole_life();
    let mut sent = Vec::new();
    let mut cursor = 0;
    for batch in journal.entries.chunks(1) {
        cursor = world.projector.apply(cursor, batch).await.unwrap().cursor;
        sent.extend(send_everything(world).await);
    }
    assert_eq!(cursor, journal.last());
    // An edit of a progress message keeps its distance from the one before.
    tokio::time::sleep(store::PROGRESS_PACE).await;
    sent.extend(send_everything(world).await);
    // Something of every kind was sent, so that silence afterwards means something.
    for kind in [
        "said:paaaaaaaaaa:r1",
        "said:paaaaaaaaaa:r2",
        "wait:w1",
        "wait:w4",
        "progress:",
        "notice:deploy",
    ] {
        assert!(
            sent.iter().any(|(intent, _)| intent.starts_with(kind)),
            "{kind} in {sent:?}"
        );
    }
    let before = world.projector.dump().await.unwrap();
    for table in PROJECTION_TABLES {
        assert!(!before[table].is_empty(), "{table} is not tested");
    }

    assert_eq!(world.projector.rebuild(&journal).await.unwrap(), cursor);

    assert_eq!(world.projector.dump().await.unwrap(), before);
    assert_eq!(send_everything(world).await, []);
}

async fn the_size_of_batches_changes_nothing(world: &World) {
    let journal = Journal::whole_life();
    let mut cursor = 0;
    for entry in &journal.entries {
        let one = std::slice::from_ref(entry);
        cursor = world.projector.apply(cursor, one).await.unwrap().cursor;
    }
    let one_by_one = world.projector.dump().await.unwrap();
    world.projector.reset().await.unwrap();
    world.projector.apply(0, &journal.entries).await.unwrap();
    assert_eq!(world.projector.dump().await.unwrap(), one_by_one);
}

async fn entries_that_were_applied_change_nothing(world: &World) {
    let journal = Journal::whole_life();
    let first = world.projector.apply(0, &journal.entries).await.unwrap();
    assert_eq!(first.entries, journal.entries.len());
    let before = world.projector.dump().await.unwrap();
    let again = world.projector.apply(0, &journal.entries).await.unwrap();
    assert_eq!((again.entries, again.cursor), (0, first.cursor));
    assert_eq!(world.projector.dump().await.unwrap(), before);
}

async fn a_batch_that_leaves_a_gap_is_refused(world: &World) {
    let journal = Journal::whole_life();
    let (head, tail) = journal.entries.split_at(10);
    let stands = world.projector.apply(0, head).await.unwrap().cursor;
    let after = tail[4].cursor;
    let refused = world.projector.apply(after, &tail[5..]).await;
    assert!(
        matches!(refused, Err(Error::Gap { stands: s, given }) if s == stands && given == after),
        "{refused:?}"
    );
    assert_eq!(world.projector.cursor().await.unwrap(), stands);
}

async fn projectors_at_the_same_time_apply_each_entry_once(world: &World) {
    let journal = Journal::whole_life();
    world.projector.catch_up(&journal).await.unwrap();
    let expected = world.projector.dump().await.unwrap();
    world.projector.reset().await.unwrap();

    let mut tasks = Vec::new();
    for number in 0..4_usize {
        let store = world.another().await;
        let journal = journal.clone();
        tasks.push(tokio::spawn(async move {
            let projector = Projector::new(&store);
            let mut applied = 0;
            loop {
                let cursor = projector.cursor().await.unwrap();
                let batch: Vec<_> = journal
                    .entries
                    .iter()
                    .filter(|e| e.cursor > cursor)
                    .take(3 + number)
                    .cloned()
                    .collect();
                if batch.is_empty() {
                    break;
                }
                applied += projector.apply(cursor, &batch).await.unwrap().entries;
            }
            store.close().await;
            applied
        }));
    }
    let mut applied = 0;
    for task in tasks {
        applied += task.await.unwrap();
    }
    assert_eq!(applied, journal.entries.len());
    assert_eq!(world.projector.dump().await.unwrap(), expected);
}

async fn nothing_is_handed_out_before_a_rebuild_is_back_where_it_was(world: &World) {
    listening(world).await;
    let journal = Journal::whole_life();
    // Nobody saw the question w1 before it was answered, so it was never sent.
    world.projector.catch_up(&journal).await.unwrap();
    let sent = send_everything(world).await;
    assert!(
        sent.iter().all(|(intent, _)| intent != "wait:w1"),
        "{sent:?}"
    );

    world.projector.reset().await.unwrap();
    let mut cursor = 0;
    let mut halfway = 0;
    for entry in &journal.entries {
        let one = std::slice::from_ref(entry);
        cursor = world.projector.apply(cursor, one).await.unwrap().cursor;
        assert_eq!(send_everything(world).await, [], "at {cursor}");
        let waits = world.store.open_waits(None).await.unwrap();
        halfway += usize::from(waits.iter().any(|w| w.id.as_str() == "w1"));
    }
    assert!(
        halfway > 0,
        "the rebuild went through the time when w1 was open"
    );
    // Whoever joins while the past is told again hears none of it.
    let mut journal = journal;
    journal
        .about(P, None, None)
        .heard("telegram:9", "hello")
        .said("r9", ports::SaidKind::Reply, "Hello.");
    world.projector.catch_up(&journal).await.unwrap();
    assert_eq!(
        send_everything(world).await,
        [("said:paaaaaaaaaa:r9".to_owned(), journal.last())]
    );
}

async fn a_batch_that_cannot_be_applied_changes_nothing(world: &World) {
    let mut journal = Journal::new();
    journal.founded().heard("k1", "first");
    world.projector.catch_up(&journal).await.unwrap();
    let before = world.projector.dump().await.unwrap();
    let cursor = world.projector.cursor().await.unwrap();
    // Make the second of two entries fail: its table is gone.
    let break_it = |sql: &'static str| async move {
        match world.store.db() {
            store::Db::Sqlite(pool) => {
                sqlx::query(sql).execute(pool).await.unwrap();
            }
            store::Db::Postgres(pool) => {
                sqlx::query(sql).execute(pool).await.unwrap();
            }
        }
    };
    break_it("ALTER TABLE ledger RENAME TO away").await;
    journal
        .heard("k2", "second")
        .spent("s1", ports::Role::Brainstorm, None);
    assert!(matches!(
        world.projector.catch_up(&journal).await,
        Err(Error::Database(_))
    ));
    break_it("ALTER TABLE away RENAME TO ledger").await;
    assert_eq!(world.projector.cursor().await.unwrap(), cursor);
    assert_eq!(world.projector.dump().await.unwrap(), before);

    // A payload that is no event, under an event's name, stops nothing.
    journal.entry(P, "task.merged", json!({"project": 5}));
    assert_eq!(
        world.projector.catch_up(&journal).await.unwrap(),
        journal.last()
    );
}
