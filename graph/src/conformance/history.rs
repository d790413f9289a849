//! Checkpoints, branches, and reading state back.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::lab::{Lab, assert_fenced, channels, checkpoint};
use crate::checkpoint::{
    Commit, HistoryFilter, Lease, NewCheckpoint, Source, StateRows, StorageError, Then,
    ThreadStatus,
};

/// Rebuilds the state as the engine does: the newest snapshot and the changes after it, all items that were appended.
pub(super) fn rebuild(state: &StateRows) -> (Vec<Value>, Value) {
    let mut log = Vec::new();
    let mut n = Value::Null;
    let newest = state.rows.iter().rposition(|row| row.snapshot.is_some());
    for (i, row) in state.rows.iter().enumerate() {
        if let Some(items) = row.appends.get("log") {
            log.extend(items.as_array().expect("an array").iter().cloned());
        }
        if newest.is_some_and(|newest| i < newest) {
            continue;
        }
        match &row.snapshot {
            Some(snapshot) if newest == Some(i) => n = snapshot["n"].clone(),
            _ => {
                if let Some(value) = row.changes.get("n") {
                    n = value.clone();
                }
            }
        }
    }
    (log, n)
}

pub(super) fn numbers(range: impl IntoIterator<Item = u64>) -> Vec<Value> {
    range.into_iter().map(|n| json!(n)).collect()
}

/// A checkpoint with a snapshot of what [`checkpoint`] sets.
pub(super) fn snapshot(parent: u64) -> NewCheckpoint {
    NewCheckpoint {
        snapshot: Some(channels(json!({"n": parent}))),
        ..checkpoint(parent)
    }
}

pub(super) async fn put(lab: &Lab, lease: &Lease, new: NewCheckpoint) -> u64 {
    let commit = Commit {
        base: new.parent,
        checkpoint: Some(new),
        ..Commit::on(0)
    };
    lab.commit(lease, commit)
        .await
        .checkpoint
        .expect("a checkpoint")
}

pub(super) async fn state(lab: &Lab, thread: &str, at: Option<u64>) -> StateRows {
    lab.db.state_rows(&thread.into(), at).await.expect("reads")
}

pub(super) async fn list(lab: &Lab, filter: HistoryFilter) -> Vec<u64> {
    lab.db
        .history(&"t".into(), &filter)
        .await
        .expect("lists")
        .iter()
        .map(|record| record.checkpoint)
        .collect()
}

/// With parent, branch, step, source, plan; by `before` and `limit`.
pub async fn checkpoints_are_listed_newest_first(lab: &Lab) {
    let lease = lab.running("t").await;
    let other = lab.running("other").await;
    for parent in 0..5 {
        lab.step(&lease, parent).await;
        lab.step(&other, parent).await;
    }
    let mut input = checkpoint(5);
    input.source = Source::Input;
    put(lab, &lease, input).await;
    let all = lab
        .db
        .history(&"t".into(), &HistoryFilter::default())
        .await
        .expect("lists");
    assert_eq!(all.len(), 6, "the input is not among them");
    for (record, number) in all.iter().zip((1..=6).rev()) {
        assert_eq!((record.checkpoint, record.parent), (number, number - 1));
        assert_eq!((record.branch, record.step), (0, number));
        assert_eq!(record.plan, json!({"next": [format!("n{}", number - 1)]}));
    }
    assert_eq!(
        (&all[0].source, &all[1].source),
        (&Source::Input, &Source::Step)
    );
    assert!(all.iter().is_sorted_by(|newer, older| newer.at >= older.at));
    let before = |before, limit| HistoryFilter {
        before,
        limit,
        ..HistoryFilter::default()
    };
    assert_eq!(list(lab, before(Some(4), None)).await, [3, 2, 1]);
    assert_eq!(list(lab, before(None, Some(2))).await, [6, 5]);
    assert_eq!(list(lab, before(Some(5), Some(2))).await, [4, 3]);
    assert_eq!(list(lab, before(Some(1), None)).await, [0; 0]);
    assert_eq!(list(lab, before(Some(0), None)).await, [0; 0]);
    assert_eq!(list(lab, before(None, Some(0))).await, [0; 0]);
    assert_eq!(list(lab, before(Some(u64::MAX), Some(1))).await, [6]);
}

/// Everything after the newest snapshot, in full, with the distance to it.
pub async fn state_is_rebuilt_from_the_newest_snapshot(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..10 {
        let new = if parent % 4 == 2 {
            snapshot(parent)
        } else {
            checkpoint(parent)
        };
        put(lab, &lease, new).await;
        let now = state(lab, "t", None).await;
        assert_eq!((now.checkpoint, now.step), (parent + 1, parent + 1));
        let since = if parent < 2 {
            None
        } else {
            Some((parent - 2) % 4)
        };
        assert_eq!(now.since_snapshot, since, "after {parent}");
        assert_eq!(rebuild(&now), (numbers(0..=parent), json!(parent)));
        assert_eq!(rebuild(&lab.load(&lease).await.state), rebuild(&now));
    }
}

/// Rows from before the snapshot are read for what they appended, and only for that.
pub async fn append_items_from_before_the_snapshot_are_kept(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..30 {
        let mut new = if parent == 25 {
            snapshot(parent)
        } else {
            checkpoint(parent)
        };
        if parent % 10 != 0 {
            new.appends.clear();
        }
        put(lab, &lease, new).await;
    }
    let now = state(lab, "t", None).await;
    assert_eq!(rebuild(&now), (numbers([0, 10, 20]), json!(29)));
    assert_eq!(now.since_snapshot, Some(4));
    let needed: Vec<u64> = now
        .rows
        .iter()
        .map(|row| row.checkpoint)
        .filter(|number| *number >= 26 || [1, 11, 21].contains(number))
        .collect();
    assert_eq!(needed, [1, 11, 21, 26, 27, 28, 29, 30]);
    assert!(now.rows.iter().is_sorted_by_key(|row| row.checkpoint));
}

/// Also at those before and at the input.
pub async fn state_at_any_checkpoint(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..6 {
        let new = if parent == 3 {
            snapshot(parent)
        } else {
            checkpoint(parent)
        };
        put(lab, &lease, new).await;
    }
    for at in 1..=6_u64 {
        let then = state(lab, "t", Some(at)).await;
        assert_eq!((then.checkpoint, then.branch, then.step), (at, 0, at));
        assert_eq!(rebuild(&then), (numbers(0..at), json!(at - 1)), "at {at}");
        assert_eq!(then.since_snapshot, at.checked_sub(4), "at {at}");
        assert_eq!(then.plan, Some(json!({"next": [format!("n{}", at - 1)]})));
    }
    let input = state(lab, "t", Some(0)).await;
    assert_eq!((input.checkpoint, input.branch, input.step), (0, 0, 0));
    assert_eq!((input.plan, input.since_snapshot), (None, None));
    assert!(input.rows.is_empty());
}

/// Both stay; numbers are the thread's; the head stays where it is.
pub async fn a_fork_grows_beside_its_origin(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..4 {
        put(
            lab,
            &lease,
            if parent == 0 {
                snapshot(0)
            } else {
                checkpoint(parent)
            },
        )
        .await;
    }
    let mut update = checkpoint(2);
    update.source = Source::Update("human".to_owned());
    update.appends = channels(json!({"log": [100]}));
    update.changes = channels(json!({"n": 100}));
    update.branch = 77;
    let (branch, number) = lab
        .db
        .fork(&"t".into(), update.clone())
        .await
        .expect("forks");
    assert_eq!((branch, number), (1, 5));
    update.parent = 0;
    let (from_input, number) = lab.db.fork(&"t".into(), update).await.expect("forks");
    assert_eq!((from_input, number), (2, 6));

    let thread = lab.thread("t").await;
    assert_eq!((thread.branch, thread.checkpoint, thread.step), (0, 4, 4));
    assert_eq!(
        put(lab, &lease, checkpoint(4)).await,
        7,
        "the head goes on, with the next number"
    );
    assert_eq!(
        rebuild(&state(lab, "t", None).await),
        (numbers(0..5), json!(4))
    );
    let fork = state(lab, "t", Some(5)).await;
    assert_eq!((fork.branch, fork.since_snapshot), (1, Some(2)));
    assert_eq!(rebuild(&fork), (numbers([0, 1, 100]), json!(100)));
    let fork = state(lab, "t", Some(6)).await;
    assert_eq!((fork.branch, fork.since_snapshot), (2, None));
    assert_eq!(rebuild(&fork), (numbers([100]), json!(100)));

    let branch = |branch| HistoryFilter {
        branch,
        ..HistoryFilter::default()
    };
    assert_eq!(list(lab, branch(None)).await, [7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(list(lab, branch(Some(0))).await, [7, 4, 3, 2, 1]);
    assert_eq!(list(lab, branch(Some(1))).await, [5, 2, 1]);
    assert_eq!(list(lab, branch(Some(2))).await, [6]);
    let paged = HistoryFilter {
        branch: Some(1),
        before: Some(5),
        limit: Some(1),
    };
    assert_eq!(list(lab, paged).await, [2]);
    assert_eq!(
        lab.db.branches(&"t".into()).await.expect("lists"),
        BTreeMap::from([(0, 7), (1, 5), (2, 6)])
    );
    let records = lab
        .db
        .history(&"t".into(), &branch(Some(1)))
        .await
        .expect("lists");
    assert_eq!(records[0].source, Source::Update("human".to_owned()));
    assert_eq!((records[0].parent, records[1].branch), (2, 0));
}

/// Items and snapshots of every branch on the way, none of the others.
pub async fn a_fork_of_a_fork_knows_its_whole_way(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..3 {
        put(lab, &lease, checkpoint(parent)).await;
    }
    // Branch 1 from 2, with a snapshot, and one more step; branch 2 from that step.
    let (one, four) = lab.db.fork(&"t".into(), snapshot(2)).await.expect("forks");
    lab.db
        .set_head(&"t".into(), one)
        .await
        .expect("sets the head");
    let lease = lab.claim("t").await.lease;
    let mut step = checkpoint(four);
    step.branch = one;
    let five = put(lab, &lease, step).await;
    let (two, six) = lab
        .db
        .fork(&"t".into(), checkpoint(five))
        .await
        .expect("forks");
    // The origin of the fork goes on; that must not be seen from it.
    let mut step = checkpoint(five);
    step.branch = one;
    let seven = put(lab, &lease, step).await;
    assert_eq!((one, four, five, two, six, seven), (1, 4, 5, 2, 6, 7));
    let state_six = state(lab, "t", Some(six)).await;
    assert_eq!(state_six.since_snapshot, Some(2));
    assert_eq!(rebuild(&state_six), (numbers([0, 1, 2, 4, 5]), json!(5)));
    let filter = HistoryFilter {
        branch: Some(two),
        ..HistoryFilter::default()
    };
    assert_eq!(list(lab, filter).await, [6, 5, 4, 2, 1]);
}

/// The old run is fenced off; the thread is due, on the other branch.
pub async fn a_new_head_fences_the_run_and_goes_on_from_its_tip(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..3 {
        lab.step(&lease, parent).await;
    }
    let commit = Commit {
        then: Then::End {
            status: ThreadStatus::Failed,
            error: Some("broke".to_owned()),
            output: Some(json!(1)),
        },
        ..Commit::on(3)
    };
    lab.commit(&lease, commit).await;
    let mut update = checkpoint(1);
    update.step = 20;
    let (branch, number) = lab.db.fork(&"t".into(), update).await.expect("forks");
    assert!(lab.idle("t").await, "a fork alone changes nothing");
    lab.db
        .set_head(&"t".into(), branch)
        .await
        .expect("sets the head");
    let thread = lab.thread("t").await;
    assert_eq!(thread.status, ThreadStatus::Ready);
    assert_eq!(
        (thread.branch, thread.checkpoint, thread.step),
        (branch, number, 20)
    );
    assert_eq!((thread.error, thread.output), (None, None));
    let first = lab.claim("t").await.lease;
    assert_eq!(lab.load(&first).await.state.checkpoint, number);
    lab.db
        .set_head(&"t".into(), 0)
        .await
        .expect("sets the head");
    assert_fenced(lab.db.commit(&first, Commit::on(number)).await, &first);
    let second = lab.claim("t").await.lease;
    assert!(second.token > first.token);
    let state = lab.load(&second).await.state;
    assert_eq!((state.branch, state.checkpoint, state.step), (0, 3, 3));
    assert_eq!(lab.step(&second, 3).await, number + 1);
}

/// With typed errors that name them; nothing changes.
pub async fn unknown_checkpoints_and_branches_are_refused(lab: &Lab) {
    let lease = lab.running("t").await;
    lab.step(&lease, 0).await;
    let before = lab.thread("t").await;
    let thread = "t".into();
    assert!(matches!(
        lab.db.state_rows(&thread, Some(2)).await,
        Err(StorageError::UnknownCheckpoint { checkpoint: 2, .. })
    ));
    assert!(matches!(
        lab.db.fork(&thread, checkpoint(2)).await,
        Err(StorageError::UnknownCheckpoint { checkpoint: 2, .. })
    ));
    assert!(matches!(
        lab.db.set_head(&thread, 1).await,
        Err(StorageError::UnknownBranch { branch: 1, .. })
    ));
    let filter = HistoryFilter {
        branch: Some(1),
        ..HistoryFilter::default()
    };
    assert!(matches!(
        lab.db.history(&thread, &filter).await,
        Err(StorageError::UnknownBranch { branch: 1, .. })
    ));
    assert_eq!(lab.thread("t").await, before);
    assert_eq!(
        lab.db.branches(&thread).await.expect("lists"),
        BTreeMap::from([(0, 1)])
    );
}
