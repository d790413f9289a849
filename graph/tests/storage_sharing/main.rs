//! What waits at the same moment is written in one transaction on PostgreSQL, whatever it is, and each one's fate is its own.
//!
//! The tests hold the rows of two threads, so that both writers are stuck; whatever is asked for then waits in the queue, and
//! is written when the rows are let go.

mod stage;
#[path = "../storage/mod.rs"]
mod storage;

use std::collections::BTreeSet;

use graph::{
    JournalFilter, StorageError, ThreadStatus,
    checkpoint::{
        CancelRequest, Checkpointer, Commit, Created, Lease, MAILBOX_LIMIT, NewThread,
        SignalOutcome, Then, Write, WriteKind,
    },
};
use serde_json::json;

use stage::{Stage, answer, asked, asleep, commit, ended, event, signal, step, thread};

#[tokio::test]
async fn what_waits_is_written_in_one_transaction_whatever_it_is() {
    let mut stage = Stage::with(8).await;
    let db = stage.db.clone();
    for lease in &stage.leases[1..3] {
        db.signal(signal(lease.thread.as_str(), "early"), None)
            .await
            .expect("signals");
    }
    let stuck = stage.stop_writers().await;
    let l = stage.leases.clone();
    let bare = asked(commit(&db, &l[0], step(0, "bare"))).await;
    let uses = Commit {
        consumed: vec![1],
        events: vec![event("a", "used"), event("b", "used")],
        ..step(0, "uses")
    };
    let uses = asked(commit(&db, &l[1], uses)).await;
    // One has read its mail, the other has not.
    let sleeps = asked(commit(&db, &l[2], asleep(step(0, "sleeps"), 1))).await;
    let wakes = asked(commit(&db, &l[3], asleep(step(0, "wakes"), 0))).await;
    let ends = Commit {
        events: vec![event("a", "ended")],
        signals: vec![signal(l[0].thread.as_str(), "end"), signal("nobody", "end")],
        cancels: vec![CancelRequest {
            thread: l[5].thread.clone(),
            reason: "enough".to_owned(),
        }],
        ..ended(step(0, "ends"))
    };
    let ends = asked(commit(&db, &l[4], ends)).await;
    let writes = Commit {
        writes: vec![Write {
            task: "a".to_owned(),
            kind: WriteKind::Step,
            name: "s".to_owned(),
            round: 0,
            value: json!(1),
            kept: None,
        }],
        children: vec![thread("child")],
        ..Commit::on(0)
    };
    let writes = asked(commit(&db, &l[5], writes)).await;
    let yields = Commit {
        then: Then::Yield,
        ..Commit::on(0)
    };
    let yields = asked(commit(&db, &l[6], yields)).await;
    let created = {
        let db = db.clone();
        asked(async move { db.create_thread(thread("new")).await }).await
    };
    let existing = {
        let (db, id) = (db.clone(), l[0].thread.clone());
        asked(async move { db.create_thread(thread(id.as_str())).await }).await
    };
    let signalled = {
        let (db, to) = (db.clone(), l[3].thread.clone());
        asked(async move { db.signal(signal(to.as_str(), "late"), None).await }).await
    };
    let unknown = {
        let db = db.clone();
        asked(async move { db.signal(signal("nobody", "late"), None).await }).await
    };
    stage.let_go().await;

    assert_eq!(answer(bare).await.expect("commits").checkpoint, Some(1));
    let used = answer(uses).await.expect("commits");
    assert_eq!((used.checkpoint, used.mail), (Some(1), 1));
    let sleeps = answer(sleeps).await.expect("commits");
    assert!(sleeps.released, "{sleeps:?}");
    let wakes = answer(wakes).await.expect("commits");
    assert_eq!((wakes.released, wakes.mail), (false, 1), "there was news");
    let ends = answer(ends).await.expect("commits");
    assert!(ends.released);
    assert_eq!(ends.undelivered, ["nobody".into()]);
    let writes = answer(writes).await.expect("commits");
    assert_eq!(
        (writes.checkpoint, writes.cancel.as_deref()),
        (None, Some("enough"))
    );
    assert!(answer(yields).await.expect("commits").released);
    assert_eq!(answer(created).await.expect("creates"), Created::New);
    assert_eq!(answer(existing).await.expect("creates"), Created::Existing);
    assert_eq!(answer(signalled).await.expect("asks"), SignalOutcome::New);
    let unknown = answer(unknown).await.expect("asks");
    assert_eq!(unknown, SignalOutcome::UnknownThread);
    for stuck in stuck {
        answer(stuck).await.expect("commits");
    }

    let transactions = stage
        .transactions(
            "select xmin::text from graph_thread where id not in (select id from graph_thread order by id desc limit 2) \
                 and id not in ('t07', 't08', 't09') \
             union all select xmin::text from graph_checkpoint where appends::text not like '%held%' \
             union all select xmin::text from graph_journal union all select xmin::text from graph_write \
             union all select xmin::text from graph_signal where key in ('end', 'late')",
        )
        .await;
    assert_eq!(transactions.len(), 1, "{transactions:?}");
    let entries = db
        .journal(&JournalFilter::stream("a"), graph::Cursor::START, 10)
        .await
        .expect("reads");
    let said: Vec<_> = entries.iter().map(|e| (e.number, &*e.name)).collect();
    assert_eq!(said, [(1, "used"), (2, "ended")]);
    let done = db.thread(&l[4].thread).await.expect("reads");
    let done = done.expect("is there");
    assert_eq!(
        (done.status, done.output),
        (ThreadStatus::Done, Some(json!("out")))
    );
    let (mail, newest) = db.mailbox(&l[1].thread, 0).await.expect("reads");
    assert_eq!((mail.len(), newest), (0, 1));
}

#[tokio::test]
async fn who_is_refused_does_not_take_the_others_along() {
    let mut stage = Stage::with(6).await;
    let db = stage.db.clone();
    let stuck = stage.stop_writers().await;
    let l = stage.leases.clone();
    let speaking = |name: &str| Commit {
        events: vec![event("s", name)],
        signals: vec![signal("t00", name)],
        ..step(0, name)
    };
    let first = asked(commit(&db, &l[1], speaking("first"))).await;
    let stale = Lease {
        token: l[2].token + 1000,
        ..l[2].clone()
    };
    let stale = asked(commit(&db, &stale, speaking("stale"))).await;
    let lost = Commit {
        events: vec![event("s", "lost")],
        ..step(7, "lost")
    };
    let lost = asked(commit(&db, &l[3], lost)).await;
    let second = asked(commit(&db, &l[4], speaking("second"))).await;
    // The same lease twice: another transaction judges it.
    let twice = asked(commit(&db, &l[4], speaking("twice"))).await;
    let bare = asked(commit(&db, &l[5], step(0, "bare"))).await;
    stage.let_go().await;

    answer(first).await.expect("commits");
    answer(bare).await.expect("commits");
    let stale = answer(stale).await;
    assert!(
        matches!(stale, Err(StorageError::Fenced { .. })),
        "{stale:?}"
    );
    let lost = answer(lost).await;
    assert!(
        matches!(lost, Err(StorageError::NotTheTip { parent: 7, .. })),
        "{lost:?}"
    );
    // Only one of the two stands on the tip, whichever.
    let (second, twice) = (answer(second).await, answer(twice).await);
    let landed = if second.is_ok() { "second" } else { "twice" };
    assert!(
        matches!(
            (&second, &twice),
            (Ok(_), Err(StorageError::NotTheTip { .. }))
                | (Err(StorageError::NotTheTip { .. }), Ok(_))
        ),
        "{second:?}, {twice:?}"
    );
    for stuck in stuck {
        answer(stuck).await.expect("commits");
    }
    let entries = db
        .journal(&JournalFilter::all(), graph::Cursor::START, 10)
        .await
        .expect("reads");
    let numbers: Vec<_> = entries.iter().map(|entry| entry.number).collect();
    assert_eq!(numbers, [1, 2], "without gaps");
    let said: BTreeSet<_> = entries.iter().map(|entry| &*entry.name).collect();
    assert_eq!(said, BTreeSet::from(["first", landed]));
    let (mail, _) = db.mailbox(&"t00".into(), 0).await.expect("reads");
    let keys: BTreeSet<_> = mail.iter().map(|signal| &*signal.key).collect();
    assert_eq!((mail.len(), keys), (2, said));
}

#[tokio::test]
async fn what_the_database_refuses_is_refused_alone() {
    let mut stage = Stage::with(4).await;
    let db = stage.db.clone();
    stage
        .run(
            "alter table graph_journal add check (payload::text not like '%poison%'); \
             alter table graph_thread add check (input::text not like '%poison%')",
        )
        .await;
    let stuck = stage.stop_writers().await;
    let l = stage.leases.clone();
    let said = |name: &str| Commit {
        events: vec![event("s", name)],
        ..step(0, name)
    };
    let bad = asked(commit(&db, &l[0], said("poison"))).await;
    let good = asked(commit(&db, &l[1], said("good"))).await;
    let bare = asked(commit(&db, &l[2], step(0, "bare"))).await;
    let bad_start = {
        let db = db.clone();
        let poisoned = NewThread {
            input: json!("poison").into(),
            ..thread("bad")
        };
        asked(async move { db.create_thread(poisoned).await }).await
    };
    let good_start = {
        let db = db.clone();
        asked(async move { db.create_thread(thread("good")).await }).await
    };
    stage.let_go().await;
    for stuck in stuck {
        answer(stuck).await.expect("commits");
    }
    for refused in [
        answer(bad).await.map(|_| ()),
        answer(bad_start).await.map(|_| ()),
    ] {
        assert!(
            matches!(refused, Err(StorageError::Backend { .. })),
            "{refused:?}"
        );
    }
    answer(good).await.expect("commits");
    answer(bare).await.expect("commits");
    assert_eq!(answer(good_start).await.expect("creates"), Created::New);
    assert!(db.thread(&"bad".into()).await.expect("reads").is_none());
    let refused = db.thread(&l[0].thread).await.expect("reads");
    assert_eq!(refused.expect("is there").checkpoint, 0);
}

#[tokio::test]
async fn signals_that_share_a_transaction_are_judged_one_by_one() {
    use SignalOutcome::{Duplicate, MailboxFull, New, NoSuchWait};

    let mut stage = Stage::with(3).await;
    let db = stage.db.clone();
    let l = stage.leases.clone();
    let receipt = db
        .commit(&l[0], asleep(step(0, "waits"), 0))
        .await
        .expect("commits");
    assert!(receipt.released);
    sqlx::query("update graph_thread set unread = $1 where id = 't01'")
        .bind(i64::try_from(MAILBOX_LIMIT).expect("fits") - 2)
        .execute(&mut stage.side)
        .await
        .expect("a mailbox that is nearly full");
    let stuck = stage.stop_writers().await;
    let ask = |to: &str, key: &str, answers: Option<&'static str>| {
        let (db, signal) = (db.clone(), signal(to, key));
        asked(async move { db.signal(signal, answers).await })
    };
    let mut asked = Vec::new();
    for (to, key, answers) in [
        ("t00", "x", Some("other")),
        ("t00", "y", Some("w")),
        ("t00", "y", Some("w")),
        ("t00", "z", None),
        ("t01", "a", None),
        ("t01", "b", None),
        ("t01", "c", None),
        ("t01", "a", None),
    ] {
        asked.push(ask(to, key, answers).await);
    }
    // Signals of commits are never too many.
    let sends = Commit {
        signals: vec![signal("t01", "sent")],
        ..step(0, "sends")
    };
    let sends = self::asked(commit(&db, &l[2], sends)).await;
    stage.let_go().await;
    let mut outcomes = Vec::new();
    for asked in asked {
        outcomes.push(answer(asked).await.expect("asks"));
    }
    answer(sends).await.expect("commits");
    for stuck in stuck {
        answer(stuck).await.expect("commits");
    }
    // Of two that are the same, either may be the first.
    let count = |range: &[SignalOutcome], of| range.iter().filter(|o| **o == of).count();
    assert_eq!((outcomes[0], outcomes[3]), (NoSuchWait, New));
    assert_eq!(
        (
            count(&outcomes[1..3], New),
            count(&outcomes[1..3], Duplicate)
        ),
        (1, 1),
        "{outcomes:?}"
    );
    // There was room for two, if the commit's own did not come first.
    let new = count(&outcomes[4..], New);
    let full = count(&outcomes[4..], MailboxFull);
    assert!((1..=2).contains(&new), "{outcomes:?}");
    assert!((1..=3).contains(&full), "{outcomes:?}");
    assert_eq!(new + full + count(&outcomes[4..], Duplicate), 4);
    let (mail, newest) = db.mailbox(&"t01".into(), 0).await.expect("reads");
    assert_eq!(mail.len() as u64, newest, "numbered without gaps");
    assert_eq!(mail.iter().filter(|m| m.key == "sent").count(), 1);
    assert_eq!(mail.len(), new + 1);
    let keys: Vec<_> = db.mailbox(&"t00".into(), 0).await.expect("reads").0;
    let keys: Vec<_> = keys.iter().map(|m| (m.number, &*m.key)).collect();
    assert_eq!(keys, [(1, "y"), (2, "z")]);
}

#[tokio::test]
async fn when_both_writers_die_others_write_what_waits() {
    let mut stage = Stage::with(6).await;
    let db = stage.db.clone();
    let stuck = stage.stop_writers().await;
    let mut waiting = Vec::new();
    for lease in &stage.leases {
        waiting.push(asked(commit(&db, lease, step(0, "waits"))).await);
    }
    for stuck in &stuck {
        stuck.abort();
    }
    // The rows are still held, and what waits does not want them.
    for waiting in waiting {
        assert_eq!(answer(waiting).await.expect("commits").checkpoint, Some(1));
    }
    stage.let_go().await;
}

#[tokio::test]
async fn a_connection_that_dies_in_the_middle_fails_its_batch_and_nothing_else() {
    let mut stage = Stage::with(4).await;
    let db = stage.db.clone();
    let stuck = stage.stop_writers().await;
    let mut waiting = Vec::new();
    for lease in &stage.leases {
        let speaks = Commit {
            events: vec![event("s", "said")],
            ..step(0, "waits")
        };
        waiting.push(asked(commit(&db, lease, speaks)).await);
    }
    let holder = stage.holder_pid().await;
    let killed: i64 = sqlx::query_scalar(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where $1 = any (pg_blocking_pids(pid))",
    )
    .bind(holder)
    .fetch_one(&mut stage.side)
    .await
    .expect("ends connections");
    assert_eq!(killed, 2);
    for stuck in stuck {
        let died = answer(stuck).await;
        assert!(
            matches!(died, Err(StorageError::Backend { .. })),
            "{died:?}"
        );
    }
    for waiting in waiting {
        assert_eq!(answer(waiting).await.expect("commits").checkpoint, Some(1));
    }
    stage.let_go().await;
    for lease in stage.held.clone() {
        db.commit(&lease, step(0, "again")).await.expect("commits");
    }
}
