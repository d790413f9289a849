//! Threads as rows: making, listing, reading and deleting them.

use serde_json::{Value, json};

use super::lab::{Lab, assert_fenced, channels, checkpoint, event, new_thread, signal};
use crate::{
    checkpoint::{
        CancelOutcome, CancelRequest, Commit, Created, HistoryFilter, JournalFilter, NewSignal,
        NewThread, Parent, Priority, Renewed, Reopened, SignalOutcome, Source, StorageError, Then,
        ThreadFilter, ThreadStatus, WaitKind, WaitRecord, Write, WriteKind,
    },
    ids::Cursor,
};

/// Every field of a new thread comes back.
pub async fn a_new_thread_is_as_it_was_given(lab: &Lab) {
    lab.create("mother").await;
    let given = NewThread {
        id: "mother/child".into(),
        graph: "task".to_owned(),
        parent: Some(Parent {
            thread: "mother".into(),
            name: "child".to_owned(),
        }),
        priority: Priority::Critical,
        input: json!({"spec": {"title": "x"}, "n": 1}).into(),
    };
    lab.db.create_thread(given.clone()).await.expect("creates");
    let thread = lab.thread("mother/child").await;
    assert_eq!(thread.id, given.id);
    assert_eq!(thread.graph, given.graph);
    assert_eq!(thread.parent, given.parent);
    assert_eq!(thread.priority, given.priority);
    assert_eq!(thread.input, given.input);
    assert_eq!(thread.status, ThreadStatus::Ready);
    assert_eq!((thread.branch, thread.checkpoint, thread.step), (0, 0, 0));
    assert!(thread.waits.is_empty());
    assert_eq!(thread.wake_at, None);
    assert_eq!((thread.error, thread.output), (None, None));
    assert_eq!((thread.cancel, thread.lease), (None, None));
    assert!(thread.created_at <= thread.updated_at);
}

/// A second request with the same id leaves the thread as it is.
pub async fn creating_a_thread_again_changes_nothing(lab: &Lab) {
    lab.create("t").await;
    let before = lab.thread("t").await;
    let again = NewThread {
        graph: "other".to_owned(),
        priority: Priority::Low,
        input: json!({"other": true}).into(),
        ..new_thread("t")
    };
    let created = lab.db.create_thread(again).await.expect("answers");
    assert_eq!(created, Created::Existing);
    assert_eq!(lab.thread("t").await, before);
}

/// A thread that does not exist is an answer or a typed error, never a surprise.
pub async fn what_is_missing_is_said_to_be_missing(lab: &Lab) {
    let db = &lab.db;
    let none = "none".into();
    assert_eq!(db.thread(&none).await.expect("answers"), None);
    assert!(!db.delete_thread(&none).await.expect("answers"));
    assert_eq!(
        db.signal(signal("none", "k"), None).await.expect("answers"),
        SignalOutcome::UnknownThread
    );
    let cancel = CancelRequest {
        thread: "none".into(),
        reason: "x".to_owned(),
    };
    assert_eq!(
        db.cancel(cancel).await.expect("answers"),
        CancelOutcome::UnknownThread
    );
    assert_eq!(
        db.reopen(&none).await.expect("answers"),
        Reopened::UnknownThread
    );
    let unknown = |error: Option<StorageError>| {
        assert!(
            matches!(&error, Some(StorageError::UnknownThread(id)) if id.as_str() == "none"),
            "{error:?}"
        );
    };
    unknown(db.mailbox(&none, 0).await.err());
    unknown(db.history(&none, &HistoryFilter::default()).await.err());
    unknown(db.state_rows(&none, None).await.err());
    unknown(db.state_rows(&none, Some(3)).await.err());
    unknown(db.fork(&none, checkpoint(0)).await.err());
    unknown(db.set_head(&none, 0).await.err());
    unknown(db.branches(&none).await.err());
    let lease = crate::checkpoint::Lease {
        thread: "none".into(),
        token: 1,
    };
    assert_fenced(db.load(&lease).await, &lease);
    assert_fenced(db.commit(&lease, Commit::on(0)).await, &lease);
    let renewed = db.renew(&[lease], super::lab::LONG).await.expect("answers");
    assert_eq!(
        renewed,
        [Renewed {
            input: false,
            thread: "none".into(),
            held: false,
            cancel: None
        }]
    );
    assert!(
        db.threads(&ThreadFilter::default())
            .await
            .expect("answers")
            .is_empty()
    );
    assert!(
        db.journal(&JournalFilter::all(), Cursor::START, 10)
            .await
            .expect("answers")
            .is_empty()
    );
    assert_eq!(db.journal_end().await.expect("answers"), Cursor::START);
}

/// Graph, status, parent, prefix, page and limit; the order is that of the bytes.
pub async fn threads_are_listed_by_every_filter_in_the_order_of_their_ids(lab: &Lab) {
    for (id, graph, parent) in [
        ("b", "job", None),
        ("a%1", "job", None),
        ("a_1", "task", None),
        ("ab1", "task", None),
        ("Z", "job", None),
        ("ä", "job", None),
        ("b/x", "task", Some("b")),
        ("b/y", "task", Some("b")),
    ] {
        let parent = parent.map(|thread| Parent {
            thread: thread.into(),
            name: id.rsplit('/').next().unwrap_or_default().to_owned(),
        });
        lab.db
            .create_thread(NewThread {
                graph: graph.to_owned(),
                parent,
                ..new_thread(id)
            })
            .await
            .expect("creates");
    }
    let all = ThreadFilter::default();
    let cases: [(&str, ThreadFilter, &[&str]); 10] = [
        (
            "all",
            all.clone(),
            &["Z", "a%1", "a_1", "ab1", "b", "b/x", "b/y", "ä"],
        ),
        (
            "graph",
            ThreadFilter {
                graph: Some("job".to_owned()),
                ..all.clone()
            },
            &["Z", "a%1", "b", "ä"],
        ),
        (
            "prefix",
            ThreadFilter {
                prefix: Some("a".to_owned()),
                ..all.clone()
            },
            &["a%1", "a_1", "ab1"],
        ),
        (
            "a prefix with a wildcard's sign",
            ThreadFilter {
                prefix: Some("a_".to_owned()),
                ..all.clone()
            },
            &["a_1"],
        ),
        (
            "a prefix beyond ASCII",
            ThreadFilter {
                prefix: Some("ä".to_owned()),
                ..all.clone()
            },
            &["ä"],
        ),
        (
            "parent",
            ThreadFilter {
                parent: Some("b".into()),
                ..all.clone()
            },
            &["b/x", "b/y"],
        ),
        (
            "after and limit",
            ThreadFilter {
                after: Some("a_1".into()),
                limit: Some(2),
                ..all.clone()
            },
            &["ab1", "b"],
        ),
        (
            "status",
            ThreadFilter {
                statuses: vec![ThreadStatus::Running],
                ..all.clone()
            },
            &[],
        ),
        (
            "several statuses",
            ThreadFilter {
                statuses: vec![ThreadStatus::Running, ThreadStatus::Ready],
                graph: Some("task".to_owned()),
                limit: Some(1),
                ..all.clone()
            },
            &["a_1"],
        ),
        (
            "none",
            ThreadFilter {
                limit: Some(0),
                ..all
            },
            &[],
        ),
    ];
    for (name, filter, expected) in cases {
        let found = lab.db.threads(&filter).await.expect("lists");
        let ids: Vec<&str> = found.iter().map(|thread| thread.id.as_str()).collect();
        assert_eq!(ids, expected, "by {name}");
    }
    lab.try_claim("job", super::lab::LONG).await;
    let running = ThreadFilter {
        statuses: vec![ThreadStatus::Running],
        ..ThreadFilter::default()
    };
    let found = lab.db.threads(&running).await.expect("lists");
    let ids: Vec<&str> = found.iter().map(|thread| thread.id.as_str()).collect();
    assert_eq!(ids, ["Z", "a%1", "b", "ä"]);
}

/// Checkpoints, writes and signals go with it; children, other threads and the journal stay.
pub async fn a_deleted_thread_leaves_the_others_and_the_journal(lab: &Lab) {
    let gone = lab.running("gone").await;
    let stays = lab.running("stays").await;
    for lease in [&gone, &stays] {
        let id = lease.thread.as_str();
        let commit = Commit {
            checkpoint: Some(checkpoint(0)),
            writes: vec![Write {
                task: "a".to_owned(),
                kind: WriteKind::Result,
                name: String::new(),
                round: 0,
                value: json!(1),
                kept: None,
            }],
            events: vec![event(id, "said")],
            children: vec![NewThread {
                parent: Some(Parent {
                    thread: lease.thread.clone(),
                    name: "c".to_owned(),
                }),
                ..new_thread(&format!("{id}/c"))
            }],
            ..Commit::on(0)
        };
        lab.commit(lease, commit).await;
        lab.db.signal(signal(id, "k"), None).await.expect("signals");
    }
    let stayed = lab.thread("stays").await;
    let read = |db: std::sync::Arc<dyn crate::checkpoint::Checkpointer>| async move {
        db.journal(&JournalFilter::all(), Cursor::START, 10)
            .await
            .expect("reads")
    };
    let journal = read(lab.db.clone()).await;

    assert!(lab.db.delete_thread(&gone.thread).await.expect("deletes"));

    assert_eq!(lab.db.thread(&gone.thread).await.expect("reads"), None);
    assert_fenced(lab.db.commit(&gone, Commit::on(1)).await, &gone);
    assert_eq!(lab.thread("stays").await, stayed);
    let loaded = lab.load(&stays).await;
    assert_eq!((loaded.writes.len(), loaded.mailbox.len()), (1, 1));
    assert_eq!(loaded.state.rows.len(), 1);
    assert_eq!(
        lab.thread("gone/c").await.parent.expect("a parent").thread,
        gone.thread
    );
    assert_eq!(read(lab.db.clone()).await, journal);
    assert!(!lab.db.delete_thread(&gone.thread).await.expect("answers"));
}

/// A thread that is deleted and made again starts afresh, and an old run cannot write to it.
pub async fn a_lease_of_a_deleted_thread_is_no_good_for_its_namesake(lab: &Lab) {
    let old = lab.running("t").await;
    lab.step(&old, 0).await;
    lab.db
        .signal(signal("t", "k"), None)
        .await
        .expect("signals");
    assert!(lab.db.delete_thread(&old.thread).await.expect("deletes"));
    let new = lab.running("t").await;
    assert_fenced(lab.db.commit(&old, Commit::on(0)).await, &old);
    let loaded = lab.load(&new).await;
    assert_eq!(loaded.state.checkpoint, 0);
    assert!(loaded.mailbox.is_empty());
    assert_eq!(loaded.mail, 0);
    let outcome = lab
        .db
        .signal(signal("t", "k"), None)
        .await
        .expect("signals");
    assert_eq!(outcome, SignalOutcome::New, "old keys are forgotten");
}

/// Unicode, NUL, large and small numbers, empty things: in values, in keys of objects, and in names.
pub async fn values_of_every_kind_come_back(lab: &Lab) {
    let odd =
        "NUL \0, \u{fdd0}, \u{fffd}, \\u0000, \\\\\0, \"quoted\", ü, 漢, 🦀, \u{10ffff}\r\n\t";
    let value = json!({
        "text": odd,
        odd: "as a key",
        "empty": ["", [], {}, null],
        "numbers": [0, -1, i64::MIN, i64::MAX, u64::MAX, 0.1, -1.5, 1e-7, 1.0e300],
        "booleans": [true, false],
        "deep": (0..80).fold(json!(1), |inner, _| json!([inner])),
    });
    lab.db
        .create_thread(NewThread {
            input: value.clone().into(),
            ..new_thread("t")
        })
        .await
        .expect("creates");
    let lease = lab.claim("t").await.lease;
    let write = Write {
        task: odd.to_owned(),
        kind: WriteKind::Step,
        name: odd.to_owned(),
        round: 7,
        value: value.clone(),
        kept: None,
    };
    let wait = WaitRecord {
        id: odd.to_owned(),
        name: odd.to_owned(),
        kind: WaitKind::Interrupt,
        task: odd.to_owned(),
        value: value.clone(),
        signals: vec![odd.to_owned()],
        children: Vec::new(),
        until: None,
    };
    let mut made = checkpoint(0);
    made.source = Source::Update(odd.to_owned());
    made.appends = channels(json!({"log": [value, odd]}));
    made.changes = channels(value.clone());
    made.snapshot = Some(channels(value.clone()));
    made.plan = value.clone();
    let commit = Commit {
        checkpoint: Some(made.clone()),
        writes: vec![write.clone()],
        events: vec![crate::checkpoint::NewEvent {
            stream: odd.to_owned(),
            name: odd.to_owned(),
            payload: value.clone(),
            thread: Some("t".into()),
        }],
        signals: vec![NewSignal {
            kind: odd.to_owned(),
            payload: value.clone(),
            ..signal("t", odd)
        }],
        waits: Some(vec![wait.clone()]),
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    let outcome = lab
        .db
        .signal(signal("t", "answer"), Some(odd))
        .await
        .expect("signals");
    assert_eq!(outcome, SignalOutcome::New, "the wait is found by its id");

    let loaded = lab.load(&lease).await;
    assert_eq!(loaded.thread.input, value);
    assert_eq!(loaded.thread.waits, [wait]);
    assert_eq!(loaded.writes, [write]);
    assert_eq!(loaded.state.plan, Some(value.clone()));
    let row = &loaded.state.rows[0];
    assert_eq!(row.appends, made.appends);
    assert_eq!(row.changes, made.changes);
    assert_eq!(row.snapshot, made.snapshot);
    let mail = &loaded.mailbox[0];
    assert_eq!((mail.kind.as_str(), mail.key.as_str()), (odd, odd));
    assert_eq!(mail.payload, value);
    let history = lab
        .db
        .history(&"t".into(), &HistoryFilter::default())
        .await
        .expect("lists");
    assert_eq!(history[0].source, made.source);
    let entry = lab
        .db
        .journal(&JournalFilter::stream(odd), Cursor::START, 10)
        .await
        .expect("reads")
        .remove(0);
    assert_eq!((entry.stream.as_str(), entry.name.as_str()), (odd, odd));
    assert_eq!(entry.payload, value);

    let end = Then::End {
        status: ThreadStatus::Failed,
        error: Some(odd.to_owned()),
        output: Some(Value::Null),
    };
    lab.commit(
        &lease,
        Commit {
            then: end,
            ..Commit::on(1)
        },
    )
    .await;
    let thread = lab.thread("t").await;
    assert_eq!(thread.error.as_deref(), Some(odd));
    assert_eq!(thread.output, Some(Value::Null), "null is not nothing");
}

/// A value of ten megabytes, wherever a value can stand.
pub async fn ten_megabytes_come_back(lab: &Lab) {
    let big = json!("0123456789abcdef".repeat(10 * 1024 * 1024 / 16));
    let lease = lab.running("t").await;
    let mut made = checkpoint(0);
    made.appends = channels(json!({"log": [big]}));
    let commit = Commit {
        checkpoint: Some(made),
        events: vec![crate::checkpoint::NewEvent {
            payload: big.clone(),
            ..event("s", "big")
        }],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    lab.db
        .signal(
            NewSignal {
                payload: big.clone(),
                ..signal("t", "big")
            },
            None,
        )
        .await
        .expect("signals");
    let loaded = lab.load(&lease).await;
    assert!(loaded.state.rows[0].appends["log"][0] == big);
    assert!(loaded.mailbox[0].payload == big);
    let entries = lab
        .db
        .journal(&JournalFilter::stream("s"), Cursor::START, 1)
        .await
        .expect("reads");
    assert!(entries[0].payload == big);
}

/// Reopening makes a thread due on the checkpoint it had.
pub async fn only_a_failed_or_cancelled_thread_can_be_reopened(lab: &Lab) {
    for (id, status, expected) in [
        (
            "done",
            ThreadStatus::Done,
            Reopened::NotEnded(ThreadStatus::Done),
        ),
        ("failed", ThreadStatus::Failed, Reopened::Yes),
        ("cancelled", ThreadStatus::Cancelled, Reopened::Yes),
    ] {
        let lease = lab.running(id).await;
        let early = lab.db.reopen(&id.into()).await.expect("answers");
        assert_eq!(early, Reopened::NotEnded(ThreadStatus::Running), "{id}");
        lab.step(&lease, 0).await;
        let end = Then::End {
            status,
            error: Some("why".to_owned()),
            output: Some(json!(1)),
        };
        lab.commit(
            &lease,
            Commit {
                then: end,
                ..Commit::on(1)
            },
        )
        .await;
        let outcome = lab.db.reopen(&id.into()).await.expect("answers");
        assert_eq!(outcome, expected, "{id}");
        let thread = lab.thread(id).await;
        if outcome == Reopened::Yes {
            assert_eq!(thread.status, ThreadStatus::Ready, "{id}");
            assert_eq!((thread.error, thread.output), (None, None), "{id}");
            let claim = lab.claim(id).await;
            assert_eq!(claim.thread.checkpoint, 1, "{id}");
        } else {
            assert_eq!(thread.status, status, "{id}");
            assert!(lab.idle(id).await, "{id}");
        }
    }
}

/// Several processes that start together, and one that starts again.
pub async fn migrating_again_and_at_the_same_time_is_harmless(lab: &Lab) {
    lab.create("t").await;
    let others = futures::future::join_all((0..4).map(|_| lab.open())).await;
    for result in futures::future::join_all(others.iter().map(|db| db.migrate())).await {
        result.expect("migrates");
    }
    lab.thread("t").await;
}
