//! Commits: all or nothing, under a lease.

use serde_json::{Value, json};

use super::lab::{LONG, Lab, assert_fenced, channels, checkpoint, event, new_thread, signal};
use super::writes::write;
use crate::{
    checkpoint::{
        CancelRequest, Commit, NewThread, Parent, StorageError, Then, ThreadFilter, ThreadStatus,
        WaitKind, WaitRecord, WriteKind,
    },
    ids::ThreadId,
};

fn wait(id: &str) -> WaitRecord {
    WaitRecord {
        id: id.to_owned(),
        name: "approve".to_owned(),
        kind: WaitKind::Wait,
        task: "ask".to_owned(),
        value: Value::Null,
        signals: vec!["message".to_owned()],
        children: vec!["c".to_owned()],
        until: "2031-02-03T04:05:06.123456789Z".parse().ok(),
    }
}

fn child(parent: &str, name: &str) -> NewThread {
    NewThread {
        parent: Some(Parent {
            thread: parent.into(),
            name: name.to_owned(),
        }),
        ..new_thread(&format!("{parent}/{name}"))
    }
}

fn ending(status: ThreadStatus, error: Option<&str>, output: Option<Value>) -> Then {
    Then::End {
        status,
        error: error.map(str::to_owned),
        output,
    }
}

/// A commit with something in every field, on checkpoint 0 of a thread whose mailbox holds signal 1.
fn everything(id: &str) -> Commit {
    Commit {
        checkpoint: Some(checkpoint(0)),
        writes: vec![write("b", WriteKind::Result, "", 0, json!(2))],
        clear_writes: true,
        consumed: vec![1],
        events: vec![event("stream", "one"), event("stream", "two")],
        children: vec![child(id, "c")],
        signals: vec![signal("other", "from t"), signal("nobody", "k")],
        cancels: vec![CancelRequest {
            thread: "other".into(),
            reason: "enough".to_owned(),
        }],
        waits: Some(vec![wait("w1")]),
        then: Then::Yield,
        ..Commit::on(0)
    }
}

/// The state that a step changed, its plan and its place.
pub async fn a_commit_comes_back(lab: &Lab) {
    let lease = lab.running("t").await;
    let receipt = lab
        .commit(
            &lease,
            Commit {
                checkpoint: Some(checkpoint(0)),
                ..Commit::on(0)
            },
        )
        .await;
    assert_eq!(
        (receipt.checkpoint, receipt.released, receipt.mail),
        (Some(1), false, 0)
    );
    assert_eq!(receipt.cancel, None);
    assert!(receipt.undelivered.is_empty());
    assert_eq!(lab.step(&lease, 1).await, 2);
    let thread = lab.thread("t").await;
    assert_eq!((thread.checkpoint, thread.step), (2, 2));
    assert_eq!(thread.status, ThreadStatus::Running);
    let loaded = lab.load(&lease).await;
    assert_eq!(
        (
            loaded.state.checkpoint,
            loaded.state.branch,
            loaded.state.step
        ),
        (2, 0, 2)
    );
    assert_eq!(loaded.state.plan, Some(json!({"next": ["n1"]})));
    assert_eq!(loaded.state.since_snapshot, None);
    let rows: Vec<_> = loaded.state.rows.iter().map(|row| row.checkpoint).collect();
    assert_eq!(rows, [1, 2]);
    for (row, n) in loaded.state.rows.iter().zip(0..) {
        assert_eq!(row.appends, channels(json!({"log": [n]})));
        assert_eq!(row.changes, channels(json!({"n": n})));
        assert_eq!(row.snapshot, None);
    }
}

/// Each part of one commit is there afterwards.
pub async fn all_parts_of_a_commit_land(lab: &Lab) {
    lab.create("other").await;
    let lease = lab.running("t").await;
    lab.db
        .signal(signal("t", "k"), None)
        .await
        .expect("signals");
    let early = Commit {
        writes: vec![write("a", WriteKind::Result, "", 0, json!(1))],
        ..Commit::on(0)
    };
    lab.commit(&lease, early).await;
    let receipt = lab.commit(&lease, everything("t")).await;
    assert_eq!(receipt.checkpoint, Some(1));
    assert!(receipt.released);
    assert_eq!(receipt.mail, 1);
    assert_eq!(receipt.undelivered, [ThreadId::from("nobody")]);
    let claim = lab.claim("t").await;
    let loaded = lab.load(&claim.lease).await;
    assert_eq!(loaded.state.checkpoint, 1);
    assert_eq!(
        loaded.writes,
        [write("b", WriteKind::Result, "", 0, json!(2))]
    );
    assert!(loaded.mailbox.is_empty());
    assert_eq!(loaded.thread.waits, [wait("w1")]);
    let child = lab.thread("t/c").await;
    assert_eq!(child.status, ThreadStatus::Ready);
    assert_eq!(lab.keys("other").await, ["from t"]);
    assert_eq!(lab.thread("other").await.cancel.as_deref(), Some("enough"));
    let entries = lab
        .db
        .journal(
            &crate::checkpoint::JournalFilter::stream("stream"),
            crate::ids::Cursor::START,
            10,
        )
        .await
        .expect("reads");
    let said: Vec<(u64, &str)> = entries
        .iter()
        .map(|e| (e.number, e.name.as_str()))
        .collect();
    assert_eq!(said, [(1, "one"), (2, "two")]);
}

/// Not the checkpoint, not the events, not the children, not the signals: nothing.
pub async fn a_stale_lease_writes_nothing_at_all(lab: &Lab) {
    lab.create("other").await;
    let stale = lab.running("t").await;
    lab.db
        .signal(signal("t", "k"), None)
        .await
        .expect("signals");
    let early = Commit {
        writes: vec![write("a", WriteKind::Result, "", 0, json!(1))],
        ..Commit::on(0)
    };
    lab.commit(&stale, early).await;
    lab.db
        .set_head(&"t".into(), 0)
        .await
        .expect("fences the run off");
    let lease = lab.claim("t").await.lease;
    let threads = lab
        .db
        .threads(&ThreadFilter::default())
        .await
        .expect("lists");
    let before = format!("{:?}", lab.load(&lease).await.writes);

    assert_fenced(lab.db.commit(&stale, everything("t")).await, &stale);

    assert_eq!(
        lab.db
            .threads(&ThreadFilter::default())
            .await
            .expect("lists"),
        threads
    );
    let loaded = lab.load(&lease).await;
    assert_eq!(format!("{:?}", loaded.writes), before);
    assert_eq!(loaded.state.checkpoint, 0);
    assert_eq!(lab.keys("t").await, ["k"]);
    assert!(lab.keys("other").await.is_empty());
    assert_eq!(
        lab.db.journal_end().await.expect("reads"),
        crate::ids::Cursor::START
    );
    assert_eq!(lab.step(&lease, 0).await, 1, "the valid lease is not hurt");
}

/// A run that has let go of its thread has nothing more to say about it.
pub async fn a_lease_that_was_given_back_writes_nothing(lab: &Lab) {
    for (id, then) in [
        ("yielded", Then::Yield),
        (
            "asleep",
            Then::Wait {
                mail_seen: 0,
                wake_at: None,
            },
        ),
        ("ended", ending(ThreadStatus::Done, None, None)),
    ] {
        let lease = lab.running(id).await;
        let commit = Commit {
            then,
            ..Commit::on(0)
        };
        assert!(lab.commit(&lease, commit).await.released);
        let before = lab.thread(id).await;
        let late = Commit {
            checkpoint: Some(checkpoint(0)),
            events: vec![event("s", "late")],
            ..Commit::on(0)
        };
        assert_fenced(lab.db.commit(&lease, late).await, &lease);
        assert_eq!(lab.thread(id).await, before);
        let renewed = lab
            .db
            .renew(std::slice::from_ref(&lease), LONG)
            .await
            .expect("answers");
        assert!(!renewed[0].held, "{id}");
        assert_eq!(lab.thread(id).await, before);
    }
}

/// A checkpoint stands on the newest one of the head branch, or it is refused with all that came with it.
pub async fn only_the_tip_grows(lab: &Lab) {
    let lease = lab.running("t").await;
    lab.step(&lease, 0).await;
    for (parent, branch) in [(0, 0), (2, 0), (1, 1)] {
        let mut new = checkpoint(parent);
        new.branch = branch;
        let commit = Commit {
            checkpoint: Some(new),
            events: vec![event("s", "refused")],
            ..Commit::on(parent)
        };
        match lab.db.commit(&lease, commit).await {
            Err(StorageError::NotTheTip {
                thread,
                branch: b,
                parent: p,
            }) => assert_eq!((thread.as_str(), b, p), ("t", branch, parent)),
            other => panic!("{parent} on {branch} is not the tip, but: {other:?}"),
        }
    }
    assert_eq!(
        lab.db.journal_end().await.expect("reads"),
        crate::ids::Cursor::START
    );
    assert_eq!(lab.step(&lease, 1).await, 2);
}

/// Using what was used, or never was, is harmless.
pub async fn consumed_signals_leave_the_mailbox_and_their_keys_stay(lab: &Lab) {
    let lease = lab.running("t").await;
    for key in ["a", "b", "c"] {
        lab.db
            .signal(signal("t", key), None)
            .await
            .expect("signals");
    }
    for consumed in [vec![1, 3], vec![3, 99]] {
        let commit = Commit {
            consumed,
            ..Commit::on(0)
        };
        assert_eq!(lab.commit(&lease, commit).await.mail, 3);
        assert_eq!(lab.keys("t").await, ["b"]);
    }
    for key in ["a", "b", "c"] {
        let outcome = lab
            .db
            .signal(signal("t", key), None)
            .await
            .expect("signals");
        assert_eq!(outcome, crate::checkpoint::SignalOutcome::Duplicate);
    }
    assert_eq!(lab.load(&lease).await.mail, 3);
}

/// A re-run that starts its child again finds it as it is.
pub async fn a_child_is_started_once(lab: &Lab) {
    let lease = lab.running("t").await;
    let first = NewThread {
        input: json!({"n": 1}).into(),
        ..child("t", "c")
    };
    let commit = Commit {
        children: vec![first],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    let started = lab.thread("t/c").await;
    let second = NewThread {
        graph: "another".to_owned(),
        input: json!({"n": 2}).into(),
        ..child("t", "c")
    };
    let commit = Commit {
        children: vec![second, child("t", "d")],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(lab.thread("t/c").await, started);
    let filter = ThreadFilter {
        parent: Some("t".into()),
        ..ThreadFilter::default()
    };
    let children = lab.db.threads(&filter).await.expect("lists");
    let names: Vec<&str> = children
        .iter()
        .map(|c| c.parent.as_ref().expect("a parent").name.as_str())
        .collect();
    assert_eq!(names, ["c", "d"]);
    lab.claim("t/c").await;
}

/// A child ends in the same commit that tells its parent so.
pub async fn the_end_of_a_child_wakes_its_parent(lab: &Lab) {
    let parent = lab.running("t").await;
    let commit = Commit {
        children: vec![child("t", "c")],
        waits: Some(vec![wait("w")]),
        then: Then::Wait {
            mail_seen: 0,
            wake_at: None,
        },
        ..Commit::on(0)
    };
    assert!(lab.commit(&parent, commit).await.released);
    let lease = lab.claim("t/c").await.lease;
    let mut news = signal("t", "child:c");
    "child".clone_into(&mut news.kind);
    let commit = Commit {
        signals: vec![news],
        then: ending(ThreadStatus::Done, None, Some(json!({"ok": true}))),
        ..Commit::on(0)
    };
    assert!(lab.commit(&lease, commit).await.released);
    let claim = lab.claim("t").await;
    assert_eq!(
        claim.thread.waits,
        [wait("w")],
        "it still waits, until its run says otherwise"
    );
    let mailbox = lab.load(&claim.lease).await.mailbox;
    assert_eq!((mailbox.len(), mailbox[0].kind.as_str()), (1, "child"));
}

/// Signals are delivered after the children were made; one to itself is news to the run that sent it.
pub async fn signals_go_to_itself_and_to_new_children(lab: &Lab) {
    let lease = lab.running("t").await;
    let mut again = signal("t", "self");
    again.payload = json!("the second is dropped");
    let commit = Commit {
        children: vec![child("t", "c")],
        signals: vec![
            signal("t/c", "hello"),
            signal("t", "self"),
            again,
            signal("t/c", "world"),
            signal("gone", "a"),
            signal("gone", "b"),
        ],
        then: Then::Wait {
            mail_seen: 0,
            wake_at: None,
        },
        ..Commit::on(0)
    };
    let receipt = lab.commit(&lease, commit).await;
    assert!(!receipt.released);
    assert_eq!(receipt.mail, 1);
    assert_eq!(receipt.undelivered, [ThreadId::from("gone")], "told once");
    assert_eq!(lab.keys("t/c").await, ["hello", "world"]);
    let (mailbox, _) = lab.db.mailbox(&"t".into(), 0).await.expect("reads");
    assert_eq!(mailbox.len(), 1);
    assert_eq!(mailbox[0].payload, json!({"key": "self"}));
}

/// The ended and the unknown are skipped; a first reason stays.
pub async fn cancels_reach_the_living(lab: &Lab) {
    let ended = lab.running("ended").await;
    let commit = Commit {
        then: ending(ThreadStatus::Done, None, None),
        ..Commit::on(0)
    };
    lab.commit(&ended, commit).await;
    let sleeper = lab.running("sleeper").await;
    let commit = Commit {
        then: Then::Wait {
            mail_seen: 0,
            wake_at: None,
        },
        ..Commit::on(0)
    };
    lab.commit(&sleeper, commit).await;
    let runner = lab.running("runner").await;
    let lease = lab.running("t").await;
    for reason in ["first", "second"] {
        let commit = Commit {
            children: vec![child("t", "c")],
            cancels: ["ended", "unknown", "sleeper", "runner", "t/c"]
                .into_iter()
                .map(|thread| CancelRequest {
                    thread: thread.into(),
                    reason: reason.to_owned(),
                })
                .collect(),
            ..Commit::on(0)
        };
        lab.commit(&lease, commit).await;
    }
    assert_eq!(lab.thread("ended").await.cancel, None);
    for id in ["sleeper", "runner", "t/c"] {
        assert_eq!(
            lab.thread(id).await.cancel.as_deref(),
            Some("first"),
            "{id}"
        );
    }
    lab.claim("sleeper").await;
    assert!(lab.idle("runner").await, "its run will hear of it");
    let heard = lab.commit(&runner, Commit::on(0)).await;
    assert_eq!(heard.cancel.as_deref(), Some("first"));
}

/// Given, they replace; absent, they stay; an end clears them.
pub async fn waits_are_replaced_and_cleared(lab: &Lab) {
    let lease = lab.running("t").await;
    let waits = |waits| Commit {
        waits,
        ..Commit::on(0)
    };
    lab.commit(&lease, waits(Some(vec![wait("w1"), wait("w2")])))
        .await;
    lab.commit(&lease, waits(None)).await;
    assert_eq!(lab.thread("t").await.waits, [wait("w1"), wait("w2")]);
    lab.commit(&lease, waits(Some(vec![wait("w3")]))).await;
    assert_eq!(lab.thread("t").await.waits, [wait("w3")]);
    lab.commit(&lease, waits(Some(Vec::new()))).await;
    assert!(lab.thread("t").await.waits.is_empty());
    let commit = Commit {
        waits: Some(vec![wait("w4")]),
        then: ending(ThreadStatus::Done, None, None),
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert!(lab.thread("t").await.waits.is_empty());
}

/// Status, error and output; nothing is due.
pub async fn an_ended_thread_tells_how(lab: &Lab) {
    for (id, status, error, output) in [
        ("done", ThreadStatus::Done, None, Some(json!({"n": 1}))),
        ("failed", ThreadStatus::Failed, Some("it broke"), None),
        (
            "cancelled",
            ThreadStatus::Cancelled,
            Some("the user"),
            Some(json!(0)),
        ),
    ] {
        let lease = lab.running(id).await;
        let commit = Commit {
            checkpoint: Some(checkpoint(0)),
            then: ending(status, error, output.clone()),
            ..Commit::on(0)
        };
        let receipt = lab.commit(&lease, commit).await;
        assert_eq!((receipt.checkpoint, receipt.released), (Some(1), true));
        let thread = lab.thread(id).await;
        assert_eq!(thread.status, status);
        assert_eq!(thread.error.as_deref(), error);
        assert_eq!(thread.output, output);
        assert_eq!((thread.lease, thread.wake_at), (None, None));
        assert_eq!(thread.checkpoint, 1);
        assert!(lab.idle(id).await);
    }
}
