//! Copies of threads.

use serde_json::json;

use super::{
    history::{numbers, put, rebuild, state},
    lab::{LONG, Lab, checkpoint, event, new_thread, signal},
    retention::{everything, fork, long, prune, result_of},
};
use crate::{
    checkpoint::{
        CancelRequest, Commit, Copied, JournalFilter, Keep, NewSignal, NewThread, Parent,
        SignalOutcome, Then, ThreadRecord, ThreadStatus, WaitKind, WaitRecord,
    },
    ids::Cursor,
};

fn question(id: &str) -> WaitRecord {
    WaitRecord {
        id: id.to_owned(),
        name: "q".to_owned(),
        kind: WaitKind::Interrupt,
        task: "ask".to_owned(),
        value: json!("?"),
        signals: Vec::new(),
        children: Vec::new(),
        until: None,
    }
}

/// History, branches, states, pending writes, mailbox, known keys. Then each goes its own way.
pub async fn a_copy_is_what_the_original_was(lab: &Lab) {
    let parent = Some(Parent {
        thread: "mother".into(),
        name: "t".to_owned(),
    });
    let new = NewThread {
        parent,
        input: json!({"log": ["in"]}).into(),
        ..new_thread("t")
    };
    lab.db.create_thread(new).await.expect("creates");
    let lease = lab.claim("t").await.lease;
    for parent in 0..9 {
        put(lab, &lease, checkpoint(parent)).await;
    }
    fork(lab, 4).await;
    prune(&*lab.db, "t", Keep::last(4)).await;
    for key in ["used", "unread"] {
        lab.db.signal(signal("t", key), None).await.expect("sends");
    }
    let commit = Commit {
        writes: vec![result_of("a")],
        consumed: vec![1],
        events: vec![event("s", "said")],
        ..Commit::on(9)
    };
    lab.commit(&lease, commit).await;
    let original = lab.thread("t").await;
    let copied = lab
        .db
        .retention()
        .copy_thread(&"t".into(), &"copy".into())
        .await;
    assert_eq!(copied.expect("copies"), Copied::New);
    assert_eq!(lab.thread("t").await, original, "is not touched");

    let copy = lab.thread("copy").await;
    assert_eq!(
        (copy.status, copy.lease, copy.parent),
        (ThreadStatus::Ready, None, None)
    );
    assert_eq!(
        (&copy.graph, &copy.input),
        (&original.graph, &original.input)
    );
    assert_eq!(
        (copy.branch, copy.checkpoint, copy.step, copy.priority),
        (
            original.branch,
            original.checkpoint,
            original.step,
            original.priority
        )
    );
    assert_eq!(everything(lab, "copy").await, everything(lab, "t").await);
    assert_eq!(
        lab.db.branches(&"copy".into()).await.expect("lists"),
        lab.db.branches(&"t".into()).await.expect("lists")
    );
    assert_eq!(lab.keys("copy").await, ["unread"]);
    for key in ["used", "unread"] {
        let again = lab.db.signal(signal("copy", key), None).await;
        assert_eq!(again.expect("answers"), SignalOutcome::Duplicate, "{key}");
    }
    let entries = lab
        .db
        .journal(&JournalFilter::all(), Cursor::START, 9)
        .await;
    assert_eq!(entries.expect("reads").len(), 1, "nothing is said twice");

    let claim = lab.claim("t").await;
    assert_eq!(claim.thread.id.as_str(), "copy");
    assert!(claim.lease.token > lease.token);
    let loaded = lab.load(&claim.lease).await;
    assert_eq!(loaded.writes, [result_of("a")]);
    assert_eq!(loaded.mail, 2);
    let seen = everything(lab, "copy").await;
    lab.step(&lease, 9).await;
    lab.step(&lease, 11).await;
    assert_eq!(everything(lab, "copy").await, seen);
    assert_eq!(lab.step(&claim.lease, 9).await, 11);
    assert!(lab.db.delete_thread(&"t".into()).await.expect("deletes"));
    let (log, n) = rebuild(&state(lab, "copy", None).await);
    assert_eq!((log, n), (numbers(0..10), json!(9)));
}

async fn copy_of(lab: &Lab, from: &str, to: &str) -> ThreadRecord {
    let copied = lab
        .db
        .retention()
        .copy_thread(&from.into(), &to.into())
        .await;
    assert_eq!(copied.expect("copies"), Copied::New);
    lab.thread(to).await
}

/// A copy of what has ended has ended; any other is due, and waits for nothing until it has run.
pub async fn a_copy_sleeps_as_its_original_or_is_due(lab: &Lab) {
    let end = |status| Then::End {
        status,
        error: Some("why".to_owned()),
        output: Some(json!({"out": 1})),
    };
    for (id, status) in [
        ("done", ThreadStatus::Done),
        ("failed", ThreadStatus::Failed),
        ("cancelled", ThreadStatus::Cancelled),
    ] {
        let lease = lab.running(id).await;
        let commit = Commit {
            then: end(status),
            ..Commit::on(0)
        };
        lab.commit(&lease, commit).await;
        let copy = copy_of(lab, id, &format!("copy of {id}")).await;
        assert_eq!(copy.status, status);
        assert_eq!(
            (copy.error.as_deref(), copy.output),
            (Some("why"), Some(json!({"out": 1})))
        );
        assert!(lab.idle(id).await, "{id} and its copy have ended");
    }
    // Ended, and something has come that revives it.
    let input = NewSignal {
        revives: true,
        ..signal("done", "more")
    };
    lab.db.signal(input, None).await.expect("sends");
    copy_of(lab, "done", "revived").await;
    let due = lab.try_claim("done", LONG).await.claims;
    let mut due: Vec<&str> = due.iter().map(|claim| claim.thread.id.as_str()).collect();
    due.sort_unstable();
    assert_eq!(due, ["done", "revived"]);

    let lease = lab.running("waits").await;
    let commit = Commit {
        waits: Some(vec![question("0.1")]),
        then: Then::Wait {
            mail_seen: 0,
            wake_at: None,
        },
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    let copy = copy_of(lab, "waits", "due").await;
    assert_eq!((copy.status, copy.waits.len()), (ThreadStatus::Ready, 0));
    let answer = lab.db.signal(signal("due", "a"), Some("0.1")).await;
    assert_eq!(answer.expect("answers"), SignalOutcome::NoSuchWait);
    let claim = lab.claim("waits").await;
    assert_eq!(claim.thread.id.as_str(), "due");
    let original = lab.thread("waits").await;
    assert_eq!(
        (original.status, original.waits.len()),
        (ThreadStatus::Waiting, 1)
    );
    // A request to cancel is for the original.
    lab.create("c").await;
    let request = CancelRequest {
        thread: "c".into(),
        reason: "stop".to_owned(),
    };
    lab.db.cancel(request).await.expect("cancels");
    assert_eq!(copy_of(lab, "c", "c2").await.cancel, None);
}

/// Many at the same time make one copy.
pub async fn copies_need_an_original_and_a_free_id(lab: &Lab) {
    let retention = lab.db.retention();
    let missing = retention.copy_thread(&"none".into(), &"x".into()).await;
    assert_eq!(missing.expect("answers"), Copied::UnknownThread);
    assert_eq!(lab.db.thread(&"x".into()).await.expect("answers"), None);
    long(lab, "t", 5).await;
    lab.create("taken").await;
    let taken = lab.thread("taken").await;
    let existing = retention.copy_thread(&"t".into(), &"taken".into()).await;
    assert_eq!(existing.expect("answers"), Copied::Existing);
    assert_eq!(lab.thread("taken").await, taken);
    let itself = retention.copy_thread(&"t".into(), &"t".into()).await;
    assert_eq!(itself.expect("answers"), Copied::Existing);
    let copies = (0..6).map(|_| {
        let open = lab.open();
        async move {
            let db = open.await;
            db.retention()
                .copy_thread(&"t".into(), &"copy".into())
                .await
                .expect("answers")
        }
    });
    let made = futures::future::join_all(copies).await;
    let new = made.iter().filter(|made| **made == Copied::New).count();
    assert_eq!(new, 1, "{made:?}");
    assert_eq!(everything(lab, "copy").await, everything(lab, "t").await);
}
