//! Signals, mailboxes, answers, and requests to cancel.

use std::collections::BTreeSet;

use futures::future::join_all;
use serde_json::json;

use super::lab::{LONG, Lab, signal};
use crate::checkpoint::{
    CancelOutcome, CancelRequest, Commit, MAILBOX_LIMIT, NewSignal, SignalOutcome, Then,
    ThreadFilter, ThreadStatus, WaitKind, WaitRecord,
};

fn sleep(mail_seen: u64) -> Then {
    Then::Wait {
        mail_seen,
        wake_at: None,
    }
}

fn end() -> Then {
    Then::End {
        status: ThreadStatus::Done,
        error: None,
        output: None,
    }
}

fn cancel(thread: &str, reason: &str) -> CancelRequest {
    CancelRequest {
        thread: thread.into(),
        reason: reason.to_owned(),
    }
}

/// A second one of the same key is dropped, before and after the first was used.
pub async fn a_signal_arrives_once(lab: &Lab) {
    lab.create("t").await;
    lab.create("other").await;
    let db = &lab.db;
    let send =
        |thread, key| async move { db.signal(signal(thread, key), None).await.expect("sends") };
    assert_eq!(send("t", "k").await, SignalOutcome::New);
    assert_eq!(send("t", "k").await, SignalOutcome::Duplicate);
    assert_eq!(
        send("other", "k").await,
        SignalOutcome::New,
        "keys are each thread's own"
    );
    let (mailbox, newest) = db.mailbox(&"t".into(), 0).await.expect("reads");
    assert_eq!((mailbox.len(), newest), (1, 1));
    assert_eq!(mailbox[0].payload, json!({"key": "k"}));
    assert_eq!(mailbox[0].kind, "message");
    let lease = lab.claim("t").await.lease;
    let commit = Commit {
        consumed: vec![1],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(
        send("t", "k").await,
        SignalOutcome::Duplicate,
        "used keys stay known"
    );
    assert_eq!(lab.keys("t").await, [""; 0]);
    assert_eq!(lab.keys("other").await, ["k"]);
}

/// From 1, growing, whether or not those before were used.
pub async fn signals_are_numbered_in_the_order_of_arrival(lab: &Lab) {
    let lease = lab.running("t").await;
    for key in ["a", "b", "c"] {
        lab.db.signal(signal("t", key), None).await.expect("sends");
    }
    let commit = Commit {
        consumed: vec![2, 3],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    lab.db.signal(signal("t", "d"), None).await.expect("sends");
    let (mailbox, newest) = lab.db.mailbox(&"t".into(), 0).await.expect("reads");
    let seen: Vec<(u64, &str)> = mailbox.iter().map(|s| (s.number, s.key.as_str())).collect();
    assert_eq!(seen, [(1, "a"), (4, "d")]);
    assert_eq!(newest, 4);
    let (newer, newest) = lab.db.mailbox(&"t".into(), 1).await.expect("reads");
    assert_eq!((newer.len(), newest), (1, 4));
    let loaded = lab.load(&lease).await;
    assert_eq!((loaded.mailbox, loaded.mail), (mailbox, 4));
}

/// However many senders there are.
pub async fn signals_at_the_same_time_get_numbers_without_gaps(lab: &Lab) {
    lab.create("t").await;
    let other = lab.open().await;
    let sent = join_all((0..40).map(|i| {
        let db = if i % 2 == 0 { &lab.db } else { &other };
        db.signal(signal("t", &format!("k{i}")), None)
    }))
    .await;
    for outcome in sent {
        assert_eq!(outcome.expect("sends"), SignalOutcome::New);
    }
    let (mailbox, newest) = lab.db.mailbox(&"t".into(), 0).await.expect("reads");
    let numbers: Vec<u64> = mailbox.iter().map(|signal| signal.number).collect();
    assert_eq!(numbers, (1..=40).collect::<Vec<_>>());
    assert_eq!(newest, 40);
    let keys: BTreeSet<&str> = mailbox.iter().map(|signal| signal.key.as_str()).collect();
    assert_eq!(keys.len(), 40);
}

/// Exactly one of the senders is told that it was new.
pub async fn the_same_signal_at_the_same_time_arrives_once(lab: &Lab) {
    lab.create("t").await;
    let other = lab.open().await;
    let sent = join_all((0..20).map(|i| {
        let db = if i % 2 == 0 { &lab.db } else { &other };
        db.signal(signal("t", "k"), None)
    }))
    .await;
    let new = sent
        .into_iter()
        .filter(|outcome| *outcome.as_ref().expect("sends") == SignalOutcome::New)
        .count();
    assert_eq!(new, 1);
    assert_eq!(lab.keys("t").await, ["k"]);
}

/// An answer is for one open wait; the same answer again is a duplicate even when the wait is gone.
pub async fn an_answer_needs_an_open_wait(lab: &Lab) {
    let lease = lab.running("t").await;
    let wait = WaitRecord {
        id: "w1".to_owned(),
        name: "approve".to_owned(),
        kind: WaitKind::Interrupt,
        task: "ask".to_owned(),
        value: json!("really?"),
        signals: Vec::new(),
        children: Vec::new(),
        until: None,
    };
    let commit = Commit {
        waits: Some(vec![wait]),
        then: sleep(0),
        ..Commit::on(0)
    };
    assert!(lab.commit(&lease, commit).await.released);
    let db = &lab.db;
    let answer = |key, wait| async move {
        db.signal(signal("t", key), Some(wait))
            .await
            .expect("sends")
    };
    assert_eq!(answer("a", "w2").await, SignalOutcome::NoSuchWait);
    assert_eq!(answer("a", "w").await, SignalOutcome::NoSuchWait);
    assert!(lab.keys("t").await.is_empty());
    assert!(lab.idle("t").await, "a refused answer wakes nobody");
    assert_eq!(answer("a", "w1").await, SignalOutcome::New);
    assert_eq!(answer("a", "w1").await, SignalOutcome::Duplicate);
    let lease = lab.claim("t").await.lease;
    let commit = Commit {
        consumed: vec![1],
        waits: Some(Vec::new()),
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(answer("a", "w1").await, SignalOutcome::Duplicate);
    assert_eq!(answer("b", "w1").await, SignalOutcome::NoSuchWait);
}

/// An answer to a wait whose time has passed is refused, whatever arrives with it at the same moment.
pub async fn an_answer_after_its_time_is_refused(lab: &Lab) {
    let now = lab.try_claim("nothing", LONG).await.now;
    let hour = jiff::SignedDuration::from_hours(1);
    let threads: Vec<String> = (0..12).map(|i| format!("t{i}")).collect();
    for id in &threads {
        let lease = lab.running(id).await;
        let wait = |name: &str, until| WaitRecord {
            id: format!("{name} of {id}"),
            name: name.to_owned(),
            kind: WaitKind::Interrupt,
            task: "ask".to_owned(),
            value: json!("really?"),
            signals: Vec::new(),
            children: Vec::new(),
            until: Some(until),
        };
        let commit = Commit {
            waits: Some(vec![wait("early", now + hour), wait("late", now - hour)]),
            then: sleep(0),
            ..Commit::on(0)
        };
        assert!(lab.commit(&lease, commit).await.released);
    }
    let answers = threads.iter().flat_map(|id| {
        ["late", "early", "never"].map(|name| async move {
            let wait = format!("{name} of {id}");
            let outcome = lab.db.signal(signal(id, name), Some(&wait)).await;
            (name, outcome.expect("sends"))
        })
    });
    for (name, outcome) in join_all(answers).await {
        let expected = match name {
            "early" => SignalOutcome::New,
            "late" => SignalOutcome::Expired,
            _ => SignalOutcome::NoSuchWait,
        };
        assert_eq!(outcome, expected, "{name}");
    }
    for id in &threads {
        assert_eq!(lab.keys(id).await, ["early"]);
        // The key is looked at first.
        let wait = format!("late of {id}");
        let again = lab.db.signal(signal(id, "early"), Some(&wait)).await;
        assert_eq!(again.expect("sends"), SignalOutcome::Duplicate);
    }
}

/// [`MAILBOX_LIMIT`] unconsumed signals are enough; consuming one makes room.
pub async fn a_full_mailbox_refuses(lab: &Lab) {
    lab.create("t").await;
    let lease = lab.running("sender").await;
    let commit = Commit {
        signals: (0..MAILBOX_LIMIT)
            .map(|i| NewSignal {
                payload: json!(null),
                ..signal("t", &format!("k{i}"))
            })
            .collect(),
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    let send = |key: &'static str| lab.db.signal(signal("t", key), None);
    assert_eq!(
        send("x").await.expect("answers"),
        SignalOutcome::MailboxFull
    );
    assert_eq!(send("k7").await.expect("answers"), SignalOutcome::Duplicate);
    let (_, newest) = lab
        .db
        .mailbox(&"t".into(), MAILBOX_LIMIT)
        .await
        .expect("reads");
    assert_eq!(newest, MAILBOX_LIMIT);
    let lease = lab.claim("t").await.lease;
    let commit = Commit {
        consumed: vec![5],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(send("x").await.expect("answers"), SignalOutcome::New);
    assert_eq!(
        send("y").await.expect("answers"),
        SignalOutcome::MailboxFull
    );
}

/// A waiting thread is not due; a signal makes it so.
pub async fn a_signal_wakes_a_waiting_thread(lab: &Lab) {
    let lease = lab.running("t").await;
    let commit = Commit {
        then: sleep(0),
        ..Commit::on(0)
    };
    let receipt = lab.commit(&lease, commit).await;
    assert!(receipt.released);
    let thread = lab.thread("t").await;
    assert_eq!((thread.status, thread.lease), (ThreadStatus::Waiting, None));
    assert!(lab.idle("t").await);
    let ready = ThreadFilter {
        statuses: vec![ThreadStatus::Ready],
        ..ThreadFilter::default()
    };
    assert_eq!(lab.db.threads(&ready).await.expect("lists"), []);
    lab.db.signal(signal("t", "k"), None).await.expect("sends");
    // Whoever looks before it is claimed sees that it is not waiting any more.
    assert_eq!(lab.thread("t").await.status, ThreadStatus::Ready);
    assert_eq!(lab.db.threads(&ready).await.expect("lists").len(), 1);
    let claim = lab.claim("t").await;
    assert_eq!(claim.thread.status, ThreadStatus::Running);
    assert_eq!(claim.takeovers, 0);
    assert_eq!(lab.load(&claim.lease).await.mailbox.len(), 1);
}

/// A late signal stays in the mailbox of an ended thread; a further input starts it again.
pub async fn a_signal_wakes_an_ended_thread_only_if_it_revives(lab: &Lab) {
    let lease = lab.running("t").await;
    let commit = Commit {
        then: end(),
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(
        lab.db
            .signal(signal("t", "late"), None)
            .await
            .expect("sends"),
        SignalOutcome::New
    );
    assert!(lab.idle("t").await);
    let input = |key| NewSignal {
        revives: true,
        ..signal("t", key)
    };
    lab.db.signal(input("in1"), None).await.expect("sends");
    let claim = lab.claim("t").await;
    // One that comes while the thread runs revives it when it ends.
    lab.db.signal(input("in2"), None).await.expect("sends");
    let commit = Commit {
        consumed: vec![2],
        then: end(),
        ..Commit::on(0)
    };
    assert!(lab.commit(&claim.lease, commit).await.released);
    assert_eq!(lab.thread("t").await.status, ThreadStatus::Done);
    let claim = lab.claim("t").await;
    assert_eq!(lab.keys("t").await, ["late", "in2"]);
    let commit = Commit {
        consumed: vec![3],
        then: end(),
        ..Commit::on(0)
    };
    lab.commit(&claim.lease, commit).await;
    assert!(lab.idle("t").await, "used inputs revive nothing");
    assert_eq!(lab.keys("t").await, ["late"]);
}

/// A run that wants to sleep keeps its lease when something came that it has not seen; the rest of the commit lands.
pub async fn what_arrives_during_a_run_is_not_slept_over(lab: &Lab) {
    let lease = lab.running("t").await;
    lab.db.signal(signal("t", "a"), None).await.expect("sends");
    assert!(lab.idle("t").await, "its run will see it");
    let commit = Commit {
        waits: Some(Vec::new()),
        events: vec![super::lab::event("t", "slept")],
        then: sleep(0),
        ..Commit::on(0)
    };
    let receipt = lab.commit(&lease, commit).await;
    assert!(!receipt.released);
    assert_eq!(receipt.mail, 1);
    let thread = lab.thread("t").await;
    assert_eq!(thread.status, ThreadStatus::Running);
    assert!(thread.lease.is_some());
    assert_ne!(
        lab.db.journal_end().await.expect("reads").0,
        0,
        "the rest landed"
    );
    // Having seen it (and having left it for later), it may sleep.
    let commit = Commit {
        then: sleep(1),
        ..Commit::on(0)
    };
    let receipt = lab.commit(&lease, commit).await;
    assert!(receipt.released);
    assert!(
        lab.idle("t").await,
        "what it left for later does not wake it"
    );
    lab.db.signal(signal("t", "b"), None).await.expect("sends");
    let lease = lab.claim("t").await.lease;
    // What it used in the same commit is no news either.
    let commit = Commit {
        consumed: vec![2],
        then: sleep(1),
        ..Commit::on(0)
    };
    assert!(lab.commit(&lease, commit).await.released);
    assert_eq!(lab.keys("t").await, ["a"]);
}

/// The first reason stays; a sleeping thread wakes, a running one hears of it.
pub async fn a_request_to_cancel_reaches_the_thread_once(lab: &Lab) {
    let lease = lab.running("t").await;
    let commit = Commit {
        then: sleep(0),
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    let ask = |reason| lab.db.cancel(cancel("t", reason));
    assert_eq!(ask("first").await.expect("asks"), CancelOutcome::Requested);
    assert_eq!(
        ask("second").await.expect("asks"),
        CancelOutcome::AlreadyRequested
    );
    assert_eq!(lab.thread("t").await.cancel.as_deref(), Some("first"));
    let claim = lab.claim("t").await;
    assert_eq!(claim.thread.cancel.as_deref(), Some("first"));
    let renewed = lab
        .db
        .renew(std::slice::from_ref(&claim.lease), LONG)
        .await
        .expect("renews");
    assert!(renewed[0].held);
    assert_eq!(renewed[0].cancel.as_deref(), Some("first"));
    let commit = Commit {
        then: sleep(0),
        ..Commit::on(0)
    };
    let receipt = lab.commit(&claim.lease, commit).await;
    assert!(!receipt.released, "it is not slept over");
    assert_eq!(receipt.cancel.as_deref(), Some("first"));
    assert_eq!(
        lab.commit(&claim.lease, Commit::on(0))
            .await
            .cancel
            .as_deref(),
        Some("first")
    );
}

/// An ended thread cannot be cancelled; ending forgets the request.
pub async fn a_request_to_cancel_is_forgotten_when_the_thread_ends(lab: &Lab) {
    let lease = lab.running("t").await;
    lab.db.cancel(cancel("t", "stop")).await.expect("asks");
    let commit = Commit {
        then: Then::End {
            status: ThreadStatus::Cancelled,
            error: Some("stop".to_owned()),
            output: None,
        },
        ..Commit::on(0)
    };
    assert!(lab.commit(&lease, commit).await.released);
    let thread = lab.thread("t").await;
    assert_eq!(thread.status, ThreadStatus::Cancelled);
    assert_eq!(
        (thread.cancel, thread.error.as_deref()),
        (None, Some("stop"))
    );
    assert_eq!(
        lab.db.cancel(cancel("t", "again")).await.expect("asks"),
        CancelOutcome::Ended
    );
    assert!(lab.idle("t").await);
}
