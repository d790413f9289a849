//! Pending writes: what tasks of a step have done before the step is over.

use serde_json::{Value, json};

use super::lab::{Lab, checkpoint};
use crate::checkpoint::{Commit, Lease, StorageError, Write, WriteKind};

pub(super) fn write(task: &str, kind: WriteKind, name: &str, round: u32, value: Value) -> Write {
    Write {
        task: task.to_owned(),
        kind,
        name: name.to_owned(),
        round,
        value,
        kept: None,
    }
}

/// The key is (task, kind, name, round); all of it.
pub async fn pending_writes_are_replaced_by_their_key(lab: &Lab) {
    let lease = lab.running("t").await;
    let keys = [
        ("a", WriteKind::Result, "", 0),
        ("a", WriteKind::Step, "", 0),
        ("a", WriteKind::Step, "x", 0),
        ("a", WriteKind::Step, "x", 1),
        ("ax", WriteKind::Step, "", 0),
        ("a", WriteKind::Wait, "x", 0),
        ("a", WriteKind::Take, "x", 0),
        ("a", WriteKind::Suspended, "", 0),
        ("a", WriteKind::Attempts, "", 0),
        ("a", WriteKind::Sub, "", 0),
        ("a", WriteKind::Sub, "", 1),
        ("a/1/b", WriteKind::Step, "", 0),
    ];
    for round in 0..2 {
        let commit = Commit {
            writes: keys
                .iter()
                .enumerate()
                .map(|(i, (task, kind, name, r))| write(task, *kind, name, *r, json!([i, round])))
                .collect(),
            ..Commit::on(0)
        };
        lab.commit(&lease, commit).await;
    }
    let one = Commit {
        writes: vec![write("a", WriteKind::Result, "", 0, json!("last"))],
        ..Commit::on(0)
    };
    lab.commit(&lease, one).await;
    let mut stored = lab.load(&lease).await.writes;
    // Whoever only looks sees the same.
    let seen = lab.db.pending_writes(&"t".into()).await.expect("reads");
    assert_eq!(seen, stored);
    assert!(matches!(
        lab.db.pending_writes(&"nobody".into()).await,
        Err(StorageError::UnknownThread(_))
    ));
    let mut expected: Vec<Write> = keys
        .iter()
        .enumerate()
        .map(|(i, (task, kind, name, r))| {
            let value = if i == 0 { json!("last") } else { json!([i, 1]) };
            write(task, *kind, name, *r, value)
        })
        .collect();
    let order = |w: &Write| (w.task.clone(), w.kind, w.name.clone(), w.round);
    stored.sort_by_key(order);
    expected.sort_by_key(order);
    assert_eq!(stored, expected);
}

/// To the checkpoint of the same commit, if it has one; each checkpoint has its own.
pub async fn pending_writes_belong_to_the_newest_checkpoint(lab: &Lab) {
    let lease = lab.running("t").await;
    let first = write("a", WriteKind::Result, "", 0, json!("on 0"));
    let commit = Commit {
        writes: vec![first.clone()],
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(lab.load(&lease).await.writes, [first]);
    let second = write("a", WriteKind::Result, "", 0, json!("on 1"));
    let commit = Commit {
        checkpoint: Some(checkpoint(0)),
        writes: vec![second.clone()],
        clear_writes: true,
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(lab.load(&lease).await.writes, [second]);
    lab.step(&lease, 1).await;
    assert!(lab.load(&lease).await.writes.is_empty());
}

/// Clearing comes before writing, and touches no other checkpoint's writes and no other thread's.
pub async fn pending_writes_are_forgotten_when_they_became_part_of_a_checkpoint(lab: &Lab) {
    let lease = lab.running("t").await;
    let other = lab.running("other").await;
    for lease in [&lease, &other] {
        let commit = Commit {
            writes: vec![
                write("a", WriteKind::Result, "", 0, json!(1)),
                write("b", WriteKind::Step, "x", 0, json!(2)),
            ],
            ..Commit::on(0)
        };
        lab.commit(lease, commit).await;
    }
    let kept = write("c", WriteKind::Result, "", 0, json!(3));
    let commit = Commit {
        writes: vec![kept.clone()],
        clear_writes: true,
        ..Commit::on(0)
    };
    lab.commit(&lease, commit).await;
    assert_eq!(lab.load(&lease).await.writes, [kept]);
    assert_eq!(lab.load(&other).await.writes.len(), 2);
}

/// By their keys, with the rest of the commit or not at all; those that are not there, and those of other threads, are none of
/// its business.
pub async fn single_pending_writes_are_forgotten(lab: &Lab) {
    let leases = [lab.running("t").await, lab.running("other").await];
    let all = [
        write("a", WriteKind::Sub, "", 1, json!(1)),
        write("a", WriteKind::Sub, "", 2, json!(2)),
        write("a/1/b", WriteKind::Step, "x", 0, json!(3)),
        write("a/1/b", WriteKind::Wait, "x", 0, json!(4)),
    ];
    for lease in &leases {
        let commit = Commit {
            writes: all.to_vec(),
            ..Commit::on(0)
        };
        lab.commit(lease, commit).await;
    }
    let more = write("a", WriteKind::Sub, "", 3, json!(5));
    let forgets = |forget: &[usize]| Commit {
        writes: vec![more.clone()],
        forget: forget.iter().map(|index| all[*index].key()).collect(),
        ..Commit::on(0)
    };
    let stale = Lease {
        token: leases[0].token + 1000,
        ..leases[0].clone()
    };
    let refused = lab.db.commit(&stale, forgets(&[0, 1, 2, 3])).await;
    assert!(refused.is_err());
    assert_eq!(lab.load(&leases[0]).await.writes.len(), 4);
    // At the same time, so that they may share a transaction.
    tokio::join!(
        lab.commit(&leases[0], forgets(&[0, 2])),
        lab.commit(&leases[1], forgets(&[3])),
    );
    let again = forgets(&[0, 2]);
    lab.commit(&leases[0], again).await;
    for (lease, left) in leases.iter().zip([vec![1, 3], vec![0, 1, 2]]) {
        let mut expected: Vec<Write> = left.into_iter().map(|index| all[index].clone()).collect();
        expected.push(more.clone());
        let mut writes = lab.load(lease).await.writes;
        for writes in [&mut expected, &mut writes] {
            writes.sort_by_key(|write| (write.task.clone(), write.kind, write.round));
        }
        assert_eq!(writes, expected);
    }
    let commit = Commit {
        checkpoint: Some(checkpoint(0)),
        clear_writes: true,
        ..forgets(&[1, 3])
    };
    lab.commit(&leases[0], commit).await;
    assert_eq!(lab.load(&leases[0]).await.writes, [more]);
}
