//! Commits of several threads at the same time.

use std::collections::BTreeSet;

use futures::future::join_all;
use serde_json::{Value, json};

use super::lab::{Lab, assert_fenced, checkpoint, event, signal};
use crate::checkpoint::{Commit, Lease, StorageError};

/// Each thread's chain is whole, however many there are.
pub async fn threads_commit_at_the_same_time(lab: &Lab) {
    const STEPS: u64 = 10;
    let handles = [lab.db.clone(), lab.open().await];
    let mut leases = Vec::new();
    for i in 0..8 {
        leases.push(lab.running(&format!("t{i}")).await);
    }
    let runs = leases.iter().cloned().enumerate().map(|(i, lease)| {
        let db = handles[i % 2].clone();
        tokio::spawn(async move {
            for parent in 0..STEPS {
                let commit = Commit {
                    checkpoint: Some(checkpoint(parent)),
                    ..Commit::on(parent)
                };
                let receipt = db.commit(&lease, commit).await.expect("commits");
                assert_eq!(receipt.checkpoint, Some(parent + 1));
            }
        })
    });
    for run in join_all(runs).await {
        run.expect("a run does not panic");
    }
    for lease in &leases {
        let state = lab.load(lease).await.state;
        let log: Vec<Value> = state
            .rows
            .iter()
            .flat_map(|row| row.appends["log"].as_array().cloned().unwrap_or_default())
            .collect();
        assert_eq!(log, (0..STEPS).map(|n| json!(n)).collect::<Vec<_>>());
    }
}

/// Commits that touch each other's threads in every order neither block each other for good nor fail.
pub async fn threads_that_signal_each_other_at_the_same_time_get_through(lab: &Lab) {
    const THREADS: usize = 4;
    const ROUNDS: usize = 8;
    let handles = [lab.db.clone(), lab.open().await];
    let mut leases = Vec::new();
    for i in 0..THREADS {
        leases.push(lab.running(&format!("t{i}")).await);
    }
    let runs = leases.iter().cloned().enumerate().map(|(i, lease)| {
        let db = handles[i % 2].clone();
        tokio::spawn(async move {
            for round in 0..ROUNDS {
                let mut signals: Vec<_> = (0..THREADS)
                    .map(|to| signal(&format!("t{to}"), &format!("{i} to {to}, {round}")))
                    .collect();
                signals.rotate_left(i);
                let commit = Commit {
                    signals,
                    events: vec![event("shared", "round"), event(&format!("s{i}"), "round")],
                    ..Commit::on(0)
                };
                db.commit(&lease, commit).await.expect("commits");
            }
        })
    });
    for run in join_all(runs).await {
        run.expect("a run does not panic");
    }
    for lease in &leases {
        let (mailbox, newest) = lab.db.mailbox(&lease.thread, 0).await.expect("reads");
        let numbers: BTreeSet<u64> = mailbox.iter().map(|signal| signal.number).collect();
        let all = (THREADS * ROUNDS) as u64;
        assert_eq!(numbers, (1..=all).collect());
        assert_eq!(newest, all);
    }
}

/// Commits that may share a transaction do not share their fate.
pub async fn commits_of_one_stale_and_one_valid_lease_do_not_hurt_each_other(lab: &Lab) {
    let mut leases: Vec<Lease> = Vec::new();
    for i in 0..12 {
        let mut lease = lab.running(&format!("t{i}")).await;
        if i % 3 == 0 {
            lease.token -= 1;
        }
        leases.push(lease);
    }
    let commits = leases.iter().enumerate().map(|(i, lease)| {
        // Every fourth one stands on a checkpoint that is not there.
        let parent = if i % 4 == 1 { 7 } else { 0 };
        lab.db.commit(
            lease,
            Commit {
                checkpoint: Some(checkpoint(parent)),
                ..Commit::on(parent)
            },
        )
    });
    for (i, result) in join_all(commits).await.into_iter().enumerate() {
        let id = format!("t{i}");
        let made = if i % 3 == 0 {
            assert_fenced(result, &leases[i]);
            0
        } else if i % 4 == 1 {
            assert!(
                matches!(result, Err(StorageError::NotTheTip { parent: 7, .. })),
                "{result:?}"
            );
            0
        } else {
            assert_eq!(result.expect("commits").checkpoint, Some(1));
            1
        };
        assert_eq!(lab.thread(&id).await.checkpoint, made, "{id}");
    }
}

/// Whoever stops waiting for its commit leaves the others' alone, and a thread that can go on: its own landed, or did not.
pub async fn a_caller_that_goes_away_takes_nobody_with_it(lab: &Lab) {
    let mut leases: Vec<Lease> = Vec::new();
    for i in 0..5 {
        leases.push(lab.running(&format!("t{i}")).await);
    }
    for round in 0..10 {
        let commit = || Commit {
            checkpoint: Some(checkpoint(round)),
            ..Commit::on(round)
        };
        let mut runs: Vec<_> = leases
            .iter()
            .cloned()
            .map(|lease| {
                let (db, commit) = (lab.db.clone(), commit());
                tokio::spawn(async move { db.commit(&lease, commit).await })
            })
            .collect();
        // The first to come may be the one that writes for the others.
        tokio::task::yield_now().await;
        let gone = runs.remove(0);
        gone.abort();
        let gone = gone.await;
        for run in runs {
            run.await.expect("does not panic").expect("commits");
        }
        if !matches!(gone, Ok(Ok(_))) {
            match lab.db.commit(&leases[0], commit()).await {
                Ok(_) | Err(StorageError::NotTheTip { .. }) => {}
                Err(error) => panic!("the thread cannot go on: {error}"),
            }
        }
        assert_eq!(lab.thread("t0").await.checkpoint, round + 1);
    }
}
