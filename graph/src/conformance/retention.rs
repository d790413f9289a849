//! Pruning: what goes, and the state at what stays.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};

use super::{
    history::{list, numbers, put, rebuild, snapshot, state},
    lab::{LONG, Lab, channels, checkpoint, event},
};
use crate::{
    checkpoint::{
        Checkpointer, Commit, HistoryFilter, JournalFilter, Keep, NewCheckpoint, Pruned,
        StorageError, Write, WriteKind,
    },
    ids::{Cursor, ThreadId},
};

/// Prunes as the engine does: works out the snapshots that are needed, and goes on until nothing is left to clean up.
pub(super) async fn prune(db: &dyn Checkpointer, thread: &str, keep: Keep) -> u64 {
    let thread = ThreadId::from(thread);
    let plan = db
        .retention()
        .prune_plan(&thread, &keep)
        .await
        .expect("plans");
    let mut snapshots = BTreeMap::new();
    let mut needed = plan.bases;
    let mut sum = 0;
    for _ in 0..100 {
        for base in std::mem::take(&mut needed) {
            match db.state_rows(&thread, Some(base)).await {
                Ok(rows) => {
                    snapshots.insert(base, channels(json!({"n": rebuild(&rows).1})));
                }
                Err(StorageError::UnknownCheckpoint { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        match db
            .retention()
            .prune(&thread, plan.before, &snapshots)
            .await
            .expect("prunes")
        {
            Pruned::Done { removed, more } => {
                sum += removed;
                if !more {
                    return sum;
                }
            }
            Pruned::Needs(bases) => needed = bases,
        }
    }
    panic!("pruning {thread} never ends");
}

/// Everything that can be read of the history: each checkpoint with its record, its plan and its rebuilt state.
pub(super) async fn everything(
    lab: &Lab,
    thread: &str,
) -> BTreeMap<u64, (String, Vec<Value>, Value)> {
    let filter = HistoryFilter {
        limit: Some(10_000),
        ..HistoryFilter::default()
    };
    let records = lab
        .db
        .history(&thread.into(), &filter)
        .await
        .expect("lists");
    let mut all = BTreeMap::new();
    for record in records {
        let rows = state(lab, thread, Some(record.checkpoint)).await;
        assert_eq!(rows.plan.as_ref(), Some(&record.plan));
        assert_eq!((rows.branch, rows.step), (record.branch, record.step));
        let (log, n) = rebuild(&rows);
        all.insert(record.checkpoint, (format!("{record:?}"), log, n));
    }
    all
}

/// Checks that of a history those from `first` on (and `head`) are left, and are what they were.
async fn assert_left(
    lab: &Lab,
    thread: &str,
    before: &BTreeMap<u64, (String, Vec<Value>, Value)>,
    stays: impl Fn(u64) -> bool,
) {
    let left: BTreeMap<_, _> = before
        .iter()
        .filter(|(number, _)| stays(**number))
        .map(|(number, seen)| (*number, seen.clone()))
        .collect();
    assert_eq!(everything(lab, thread).await, left);
    for gone in before.keys().filter(|number| !stays(**number)) {
        let error = lab.db.state_rows(&thread.into(), Some(*gone)).await;
        assert!(
            matches!(error, Err(StorageError::UnknownCheckpoint { checkpoint, .. }) if checkpoint == *gone),
            "{gone} is gone"
        );
        let error = lab.db.fork(&thread.into(), checkpoint(*gone)).await;
        assert!(
            matches!(error, Err(StorageError::UnknownCheckpoint { .. })),
            "nobody forks from {gone}"
        );
    }
}

/// A thread with a long history: some steps append, some do not, some have snapshots.
pub(super) async fn long(lab: &Lab, thread: &str, steps: u64) -> crate::checkpoint::Lease {
    let lease = lab.running(thread).await;
    for parent in 0..steps {
        let mut new = if parent % 7 == 3 {
            snapshot(parent)
        } else {
            checkpoint(parent)
        };
        if parent % 3 == 1 {
            new.appends.clear();
        }
        put(lab, &lease, new).await;
    }
    lease
}

/// By the number of the newest, down to the latest alone; other threads and the journal are untouched.
pub async fn what_is_pruned_is_gone_and_the_state_at_the_rest_is_what_it_was(lab: &Lab) {
    let lease = long(lab, "t", 40).await;
    long(lab, "other", 12).await;
    lab.db.append("e", event("s", "said")).await.expect("says");
    let other = everything(lab, "other").await;
    let input = state(lab, "t", Some(0)).await;
    let seen = everything(lab, "t").await;
    for (keep, first, removed) in [(40, 1, 0), (33, 8, 7), (9, 32, 24), (1, 40, 8)] {
        assert_eq!(prune(&*lab.db, "t", Keep::last(keep)).await, removed);
        assert_left(lab, "t", &seen, |number| number >= first).await;
        assert_eq!(prune(&*lab.db, "t", Keep::last(keep)).await, 0, "once");
    }
    let page = HistoryFilter {
        before: Some(40),
        ..HistoryFilter::default()
    };
    assert_eq!(list(lab, page).await, [0; 0]);
    assert_eq!(state(lab, "t", Some(0)).await, input, "the input stays");
    assert_eq!(everything(lab, "other").await, other);
    // Its run goes on as if nothing had been.
    let loaded = lab.load(&lease).await;
    assert_eq!(
        rebuild(&loaded.state),
        rebuild(&state(lab, "t", None).await)
    );
    assert_eq!(lab.step(&lease, 40).await, 41);
    assert_eq!(state(lab, "t", None).await.since_snapshot, Some(1));
    let filter = JournalFilter::stream("s");
    let entries = lab.db.journal(&filter, Cursor::START, 9).await;
    assert_eq!(entries.expect("reads").len(), 1);
    // Nothing is named, so everything stays; and so it does in a thread that has only its input.
    let all = everything(lab, "t").await;
    prune(&*lab.db, "t", Keep::default()).await;
    assert_eq!(everything(lab, "t").await, all);
    lab.create("new").await;
    assert_eq!(prune(&*lab.db, "new", Keep::latest()).await, 0);
    assert_eq!(lab.thread("new").await.checkpoint, 0);
    let missing = lab
        .db
        .retention()
        .prune_plan(&"none".into(), &Keep::latest())
        .await;
    assert!(matches!(missing, Err(StorageError::UnknownThread(_))));
    let missing = lab
        .db
        .retention()
        .prune(&"none".into(), 1, &BTreeMap::new())
        .await;
    assert!(matches!(missing, Err(StorageError::UnknownThread(_))));
}

/// A thread that lives long and is swept often is read back from a few rows, with all that it ever appended.
pub async fn pruning_again_and_again_keeps_the_state_and_few_rows(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..150 {
        lab.step(&lease, parent).await;
        if parent % 10 == 9 {
            prune(&*lab.db, "t", Keep::last(3)).await;
            assert_eq!(
                list(lab, HistoryFilter::default()).await,
                [parent + 1, parent, parent - 1]
            );
        }
        let now = state(lab, "t", None).await;
        assert_eq!(rebuild(&now), (numbers(0..=parent), json!(parent)));
        assert!(
            now.rows.len() <= 14,
            "{} rows after {parent}",
            now.rows.len()
        );
    }
}

/// The answer says which are missing.
pub async fn pruning_without_the_snapshots_it_needs_changes_nothing(lab: &Lab) {
    let lease = lab.running("t").await;
    for parent in 0..6 {
        lab.step(&lease, parent).await;
    }
    let seen = everything(lab, "t").await;
    let thread = "t".into();
    let retention = lab.db.retention();
    let plan = retention
        .prune_plan(&thread, &Keep::last(2))
        .await
        .expect("plans");
    assert_eq!((plan.before, &plan.bases[..]), (5, &[5][..]));
    let none = BTreeMap::new();
    let answer = retention.prune(&thread, 5, &none).await.expect("answers");
    assert_eq!(answer, Pruned::Needs(vec![5]));
    assert_eq!(everything(lab, "t").await, seen);
    // Somebody forks between the plan and the deed: the fork needs one too.
    let (_, fork) = lab.db.fork(&thread, checkpoint(2)).await.expect("forks");
    let one = BTreeMap::from([(5, channels(json!({"n": 4})))]);
    let answer = retention.prune(&thread, 5, &one).await.expect("answers");
    assert_eq!(answer, Pruned::Needs(vec![fork]));
    let mut forked = everything(lab, "t").await;
    forked.remove(&fork);
    assert_eq!(forked, seen);
}

/// And kept is what either rule keeps.
pub async fn young_checkpoints_are_kept_by_the_clock_of_the_database(lab: &Lab) {
    let lease = long(lab, "t", 10).await;
    let seen = everything(lab, "t").await;
    let hour = Duration::from_hours(1);
    prune(&*lab.db, "t", Keep::newer_than(hour)).await;
    assert_eq!(everything(lab, "t").await, seen);
    prune(&*lab.db, "t", Keep::newer_than(Duration::MAX)).await;
    assert_eq!(everything(lab, "t").await, seen);
    // Long enough for any clock to move on.
    let old = Duration::from_millis(200);
    tokio::time::sleep(old * 2).await;
    let both = Keep {
        last: Some(4),
        newer_than: Some(old),
    };
    prune(&*lab.db, "t", both).await;
    assert_left(lab, "t", &seen, |number| number >= 7).await;
    lab.step(&lease, 10).await;
    prune(&*lab.db, "t", Keep::newer_than(Duration::from_mins(1))).await;
    assert_eq!(list(lab, HistoryFilter::default()).await.len(), 5);
    tokio::time::sleep(old * 2).await;
    prune(&*lab.db, "t", Keep::newer_than(old)).await;
    assert_eq!(
        list(lab, HistoryFilter::default()).await,
        [11],
        "the head stays"
    );
    assert_eq!(state(lab, "t", None).await.checkpoint, 11);
}

pub(super) async fn fork(lab: &Lab, parent: u64) -> (u32, u64) {
    let mut new = checkpoint(parent);
    new.appends = channels(json!({"log": [parent, "fork"]}));
    lab.db.fork(&"t".into(), new).await.expect("forks")
}

async fn grow(lab: &Lab, branch: u32, steps: u64) -> u64 {
    lab.db
        .set_head(&"t".into(), branch)
        .await
        .expect("is a branch");
    let lease = lab.claim("t").await.lease;
    let mut tip = lab.thread("t").await.checkpoint;
    for _ in 0..steps {
        let new = NewCheckpoint {
            branch,
            ..checkpoint(tip)
        };
        tip = put(lab, &lease, new).await;
    }
    tip
}

/// Forks from before, at and after the cut, and forks of forks.
pub async fn branches_are_pruned_without_touching_what_others_grew_from(lab: &Lab) {
    long(lab, "t", 12).await;
    let (early, _) = fork(lab, 4).await;
    let (late, _) = fork(lab, 11).await;
    let (from_input, _) = fork(lab, 0).await;
    grow(lab, early, 6).await;
    let (second, _) = fork(lab, 18).await;
    let (_third, _) = fork(lab, 17).await;
    grow(lab, second, 4).await;
    grow(lab, late, 3).await;
    grow(lab, from_input, 3).await;
    let tip = grow(lab, early, 2).await;
    let seen = everything(lab, "t").await;
    assert_eq!(seen.len() as u64, tip);
    for first in [3, 6, 13, 14, 17, 18, 19, 22, 25, 28] {
        prune(&*lab.db, "t", Keep::last(tip + 1 - first)).await;
        assert_left(lab, "t", &seen, |number| number >= first).await;
    }
    // Those that are left go on.
    let tips = lab.db.branches(&"t".into()).await.expect("lists");
    for (branch, tip) in tips {
        let (mut log, _) = rebuild(&state(lab, "t", Some(tip)).await);
        let new = grow(lab, branch, 1).await;
        log.push(json!(tip));
        assert_eq!(
            rebuild(&state(lab, "t", Some(new)).await),
            (log, json!(tip))
        );
    }
}

/// It is not listed, cannot become the head, and its number is not used again.
pub async fn a_branch_of_which_nothing_is_left_is_gone_for_good(lab: &Lab) {
    long(lab, "t", 6).await;
    let (one, _) = fork(lab, 3).await;
    grow(lab, one, 6).await;
    let thread = "t".into();
    prune(&*lab.db, "t", Keep::last(4)).await;
    let left = lab.db.branches(&thread).await.expect("lists");
    assert_eq!(left.keys().copied().collect::<Vec<_>>(), [one]);
    for gone in [0, 7] {
        assert!(matches!(
            lab.db.set_head(&thread, gone).await,
            Err(StorageError::UnknownBranch { branch, .. }) if branch == gone
        ));
        let filter = HistoryFilter {
            branch: Some(gone),
            ..HistoryFilter::default()
        };
        assert!(matches!(
            lab.db.history(&thread, &filter).await,
            Err(StorageError::UnknownBranch { branch, .. }) if branch == gone
        ));
    }
    let tip = lab.thread("t").await.checkpoint;
    let (two, _) = fork(lab, tip).await;
    grow(lab, two, 5).await;
    prune(&*lab.db, "t", Keep::last(2)).await;
    let (log, n) = rebuild(&state(lab, "t", None).await);
    let (three, _) = fork(lab, lab.thread("t").await.checkpoint).await;
    assert_eq!((two, three), (one + 1, one + 2));
    assert_eq!(rebuild(&state(lab, "t", None).await), (log, n));
}

/// Also when it grows again, and is pruned again.
pub async fn a_head_that_is_older_than_what_stays_is_kept(lab: &Lab) {
    long(lab, "t", 5).await;
    let (branch, _) = fork(lab, 2).await;
    grow(lab, branch, 5).await;
    grow(lab, 0, 0).await;
    let seen = everything(lab, "t").await;
    prune(&*lab.db, "t", Keep::last(3)).await;
    assert_left(lab, "t", &seen, |number| number >= 9 || number == 5).await;
    // Another head: the old one is still there, until the next time.
    lab.db.set_head(&"t".into(), branch).await.expect("is one");
    assert_left(lab, "t", &seen, |number| number >= 9 || number == 5).await;
    lab.db.set_head(&"t".into(), 0).await.expect("is one");
    let lease = lab.claim("t").await.lease;
    let twelve = put(lab, &lease, checkpoint(5)).await;
    assert_eq!(twelve, 12);
    let seen = everything(lab, "t").await;
    assert_eq!(seen[&12].1.last(), Some(&json!(5)));
    prune(&*lab.db, "t", Keep::last(2)).await;
    assert_left(lab, "t", &seen, |number| number >= 11).await;
    prune(&*lab.db, "t", Keep::latest()).await;
    assert_left(lab, "t", &seen, |number| number >= 12).await;
}

pub(super) fn result_of(task: &str) -> Write {
    Write {
        task: task.to_owned(),
        kind: WriteKind::Result,
        name: String::new(),
        round: 0,
        value: json!({"of": task}),
        kept: None,
    }
}

/// What a task of the coming step has done already is needed.
pub async fn pending_writes_of_the_head_survive_pruning(lab: &Lab) {
    let lease = long(lab, "t", 8).await;
    let commit = Commit {
        writes: vec![result_of("a"), result_of("b")],
        ..Commit::on(8)
    };
    lab.commit(&lease, commit).await;
    prune(&*lab.db, "t", Keep::latest()).await;
    let loaded = lab.load(&lease).await;
    assert_eq!(loaded.writes, [result_of("a"), result_of("b")]);
    let commit = Commit {
        clear_writes: true,
        checkpoint: Some(checkpoint(8)),
        ..Commit::on(8)
    };
    lab.commit(&lease, commit).await;
    assert!(lab.load(&lease).await.writes.is_empty());
}

/// Every state that is read is whole, whatever is cleaned up meanwhile, and the run is held up by nothing.
pub async fn pruning_reading_and_running_at_the_same_time(lab: &Lab) {
    const STEPS: u64 = 120;
    let lease = lab.running("t").await;
    let done = Arc::new(AtomicBool::new(false));
    let pruners = (0..2).map(|_| {
        let (open, done) = (lab.open(), done.clone());
        async move {
            let db = open.await;
            while !done.load(Ordering::SeqCst) {
                prune(&*db, "t", Keep::last(2)).await;
                tokio::task::yield_now().await;
            }
        }
    });
    let reader = async {
        let mut reads = 0;
        while !done.load(Ordering::SeqCst) {
            let loaded = lab.load(&lease).await;
            let at = loaded.state.checkpoint;
            let n = at.checked_sub(1).map_or(Value::Null, |n| json!(n));
            assert_eq!(rebuild(&loaded.state), (numbers(0..at), n), "at {at}");
            reads += 1;
            tokio::task::yield_now().await;
        }
        assert!(reads > 0, "somebody read");
    };
    let run = async {
        for parent in 0..STEPS {
            assert_eq!(lab.step(&lease, parent).await, parent + 1);
        }
        done.store(true, Ordering::SeqCst);
    };
    let all = async {
        tokio::join!(futures::future::join_all(pruners), reader, run);
    };
    tokio::time::timeout(LONG, all).await.expect("in time");
    prune(&*lab.db, "t", Keep::last(2)).await;
    let now = state(lab, "t", None).await;
    assert_eq!(rebuild(&now), (numbers(0..STEPS), json!(STEPS - 1)));
    assert_eq!(
        list(lab, HistoryFilter::default()).await,
        [STEPS, STEPS - 1]
    );
}
