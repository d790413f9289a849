//! What a superstep costs on the way to the server: one statement, which is its transaction, whatever it writes.

use std::time::Duration;

use graph::{
    Priority, ThreadStatus,
    checkpoint::{
        CancelRequest, Checkpointer, ClaimRequest, Commit, NewEvent, NewSignal, Then, Write,
        WriteKind,
    },
};
use serde_json::json;

use crate::{
    operations::{checkpoint, thread},
    proxy::Proxy,
    storage::{self, Schema},
};

fn signal(to: &str, key: usize) -> NewSignal {
    NewSignal {
        thread: to.into(),
        kind: "k".to_owned(),
        key: key.to_string(),
        payload: json!(key),
        revives: false,
    }
}

fn event(stream: usize, n: usize) -> NewEvent {
    NewEvent {
        stream: format!("s{stream}"),
        name: "e".to_owned(),
        payload: json!(n),
        thread: Some("t".into()),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_superstep_is_one_statement_whatever_it_writes() {
    let schema = Schema::make().await;
    let proxy = Proxy::before(&schema.url).await;
    let db = storage::connect(proxy.url(&schema.url)).await;
    db.migrate().await.expect("migrates");
    for id in ["t", "other"] {
        db.create_thread(thread(id)).await.expect("creates");
    }
    for key in 0..20 {
        db.signal(signal("t", key), None).await.expect("signals");
    }
    let claimed = db
        .claim(ClaimRequest {
            owner: "test",
            graphs: &["g".to_owned()],
            limit: 2,
            lease: Duration::from_mins(5),
        })
        .await
        .expect("claims");
    let lease = claimed
        .claims
        .into_iter()
        .map(|claim| claim.lease)
        .find(|lease| lease.thread.as_str() == "t")
        .expect("is due");
    let (mail, _) = db.mailbox(&"t".into(), 0).await.expect("reads");
    let mail: Vec<u64> = mail.iter().map(|signal| signal.number).collect();
    assert_eq!(mail.len(), 20);

    let step = |parent| Commit {
        checkpoint: Some(checkpoint(parent)),
        ..Commit::on(parent)
    };
    let child = |n: usize| {
        let mut child = thread(&format!("t/{n}"));
        child.priority = Priority::Low;
        child
    };
    let write = |n: usize| Write {
        task: n.to_string(),
        kind: WriteKind::Result,
        name: String::new(),
        round: 0,
        value: json!(n),
        kept: None,
    };
    let commits = [
        ("nothing but a checkpoint", step(0)),
        (
            "a signal and an event",
            Commit {
                consumed: mail[..1].to_vec(),
                events: vec![event(0, 0)],
                ..step(1)
            },
        ),
        (
            "much of everything",
            Commit {
                consumed: mail[1..].to_vec(),
                events: (0..60).map(|n| event(n % 3, n)).collect(),
                children: (0..20).map(child).collect(),
                signals: (0..20).map(|key| signal("other", key)).collect(),
                cancels: vec![CancelRequest {
                    thread: "other".into(),
                    reason: "enough".to_owned(),
                }],
                writes: (0..20).map(write).collect(),
                ..step(2)
            },
        ),
        (
            "an end",
            Commit {
                clear_writes: true,
                events: vec![event(0, 0)],
                then: Then::End {
                    status: ThreadStatus::Done,
                    error: None,
                    output: Some(json!("done")),
                },
                ..step(3)
            },
        ),
    ];
    for (what, commit) in commits {
        let before = proxy.statements();
        let receipt = db.commit(&lease, commit).await.expect(what);
        assert_eq!(proxy.statements() - before, 1, "{what}");
        assert!(receipt.checkpoint.is_some());
    }
    // It is all there.
    let entries = db
        .journal(&graph::JournalFilter::all(), graph::Cursor::START, 1000)
        .await
        .expect("reads");
    assert_eq!(entries.len(), 62);
    let (other, _) = db.mailbox(&"other".into(), 0).await.expect("reads");
    assert_eq!(other.len(), 20);
    let end = db.thread(&"t".into()).await.expect("reads");
    assert_eq!(end.expect("is there").status, ThreadStatus::Done);
}
