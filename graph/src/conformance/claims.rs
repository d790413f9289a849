//! Leases: who gets a thread, in which order, for how long.

use std::{collections::BTreeSet, time::Duration};

use futures::future::join_all;
use jiff::SignedDuration;

use serde_json::json;

use super::lab::{LONG, Lab, assert_fenced, checkpoint, claim_from, new_thread, signal};
use crate::checkpoint::{
    AGING_S, ClaimRequest, Commit, Created, Lease, LeaseTerms, NewThread, Priority, Then,
    ThreadStatus, Write, WriteKind,
};

/// A lease that runs out while a test waits for it.
const SHORT: Duration = Duration::from_millis(150);

/// A claimed thread is not claimed again while its lease lives, and tells who has it.
pub async fn a_thread_is_claimed_once(lab: &Lab) {
    lab.create("t").await;
    let claimed = lab.try_claim("t", LONG).await;
    assert_eq!(claimed.claims.len(), 1);
    let claim = &claimed.claims[0];
    assert_eq!(claim.takeovers, 0);
    assert_eq!(claim.thread.status, ThreadStatus::Running);
    let lease = claim.thread.lease.as_ref().expect("a lease");
    assert_eq!(
        (lease.owner.as_str(), lease.token),
        ("lab", claim.lease.token)
    );
    let left = lease.expires_at.duration_since(claimed.now);
    assert!(
        left <= SignedDuration::from_secs(60) && left > SignedDuration::from_secs(50),
        "{left}"
    );
    assert!(lab.idle("t").await);
    assert_eq!(lab.thread("t").await, claim.thread);
    let none = claim_from(&*lab.db, "t", 0, LONG).await;
    assert!(none.claims.is_empty());
}

/// A thread that is created with a lease is claimed already; by a database that gives no such leases, it is created due.
/// One that was there stays as it was.
pub async fn a_thread_is_created_with_a_lease_or_due(lab: &Lab) {
    let terms = LeaseTerms {
        owner: "creator",
        lease: LONG,
    };
    let new = new_thread("t");
    let (created, claim) = lab
        .db
        .create_leased(new.clone(), terms)
        .await
        .expect("creates");
    assert_eq!(created, Created::New);
    assert_eq!(claim.is_some(), lab.db.creates_leased());
    let lease = if let Some(claim) = claim {
        assert_eq!(claim.takeovers, 0);
        assert_eq!(claim.thread, lab.thread("t").await);
        let given = claim.thread.lease.as_ref().expect("a lease");
        assert_eq!(
            (given.owner.as_str(), given.token),
            ("creator", claim.lease.token)
        );
        let loaded = claim.loaded.as_deref().expect("nothing is to be loaded");
        let read = lab.load(&claim.lease).await;
        assert_eq!(
            (&loaded.thread, &loaded.state, loaded.mail),
            (&read.thread, &read.state, read.mail)
        );
        assert!(lab.idle("t").await, "it is not due");
        claim.lease
    } else {
        lab.claim("t").await.lease
    };
    let again = lab.db.create_leased(new, terms).await.expect("answers");
    assert!(matches!(again, (Created::Existing, None)), "{again:?}");
    let step = Commit {
        checkpoint: Some(checkpoint(0)),
        then: Then::Yield,
        ..Commit::on(0)
    };
    assert!(lab.commit(&lease, step).await.released);
    let next = lab.claim("t").await;
    assert!(next.lease.token > lease.token, "tokens grow");
    assert_eq!(next.takeovers, 0);
    // A lease that nobody keeps is taken over like any other.
    let short = LeaseTerms {
        lease: Duration::ZERO,
        ..terms
    };
    let new = new_thread("left");
    let (_, left) = lab.db.create_leased(new, short).await.expect("creates");
    let taken = lab.claim("left").await;
    assert_eq!(taken.takeovers, u32::from(left.is_some()));
    if let Some(left) = left {
        assert_fenced(lab.db.commit(&left.lease, Commit::on(0)).await, &left.lease);
    }
}

/// What a claim brings is what loading reads, whatever the thread has by then (the lab compares).
pub async fn a_claim_brings_nothing_but_what_loading_reads(lab: &Lab) {
    async fn again(lab: &Lab, lease: Lease, commit: Commit) -> Lease {
        let commit = Commit {
            then: Then::Yield,
            ..commit
        };
        assert!(lab.commit(&lease, commit).await.released);
        lab.claim("t").await.lease
    }
    let mut lease = lab.running("t").await;
    lease = again(lab, lease, Commit::on(0)).await;
    lab.db
        .signal(signal("t", "unread"), None)
        .await
        .expect("signals");
    lease = again(lab, lease, Commit::on(0)).await;
    assert_eq!(lab.load(&lease).await.mailbox.len(), 1);
    let used = Commit {
        consumed: vec![1],
        ..Commit::on(0)
    };
    lease = again(lab, lease, used).await;
    let loaded = lab.load(&lease).await;
    assert_eq!((loaded.mail, loaded.mailbox.len()), (1, 0));
    let started = Commit {
        writes: vec![Write {
            task: "a".to_owned(),
            kind: WriteKind::Step,
            name: "s".to_owned(),
            round: 0,
            value: json!(1),
            kept: None,
        }],
        ..Commit::on(0)
    };
    lease = again(lab, lease, started).await;
    assert_eq!(lab.load(&lease).await.writes.len(), 1);
    let step = Commit {
        checkpoint: Some(checkpoint(0)),
        clear_writes: true,
        ..Commit::on(0)
    };
    lease = again(lab, lease, step).await;
    assert_eq!(lab.load(&lease).await.state.checkpoint, 1);
}

/// Many claimers at once, through several handles: every thread is claimed by exactly one of them.
pub async fn two_claimers_never_get_one_thread(lab: &Lab) {
    const THREADS: usize = 40;
    for i in 0..THREADS {
        lab.create_with(&format!("t{i}"), "job", Priority::Medium)
            .await;
    }
    let others = [lab.db.clone(), lab.open().await, lab.open().await];
    let claimers = (0..9).map(|i| {
        let db = others[i % 3].clone();
        tokio::spawn(async move {
            let mut mine = Vec::new();
            let mut empty = 0;
            while empty < 20 {
                let claimed = claim_from(&*db, "job", 3, LONG).await;
                if claimed.claims.is_empty() {
                    // Others may hold what is left for a moment.
                    empty += 1;
                    tokio::task::yield_now().await;
                }
                mine.extend(claimed.claims.into_iter().map(|claim| claim.lease));
            }
            mine
        })
    });
    let mut all = Vec::new();
    for mine in join_all(claimers).await {
        all.extend(mine.expect("a claimer does not panic"));
    }
    let threads: BTreeSet<&str> = all.iter().map(|lease| lease.thread.as_str()).collect();
    assert_eq!(threads.len(), THREADS, "every thread was claimed");
    assert_eq!(all.len(), THREADS, "and no thread twice");
}

/// Strictly, over the life of a thread.
pub async fn tokens_grow_with_every_claim(lab: &Lab) {
    lab.create("t").await;
    let mut last = 0;
    for _ in 0..4 {
        let lease = lab.claim("t").await.lease;
        assert!(lease.token > last, "{} > {last}", lease.token);
        last = lease.token;
        let commit = Commit {
            then: Then::Yield,
            ..Commit::on(0)
        };
        lab.commit(&lease, commit).await;
    }
    lab.claim("t").await;
    lab.db
        .set_head(&"t".into(), 0)
        .await
        .expect("sets the head");
    assert!(lab.claim("t").await.lease.token > last + 1);
}

/// A process takes only what it can run.
pub async fn only_the_graphs_asked_for_are_claimed(lab: &Lab) {
    for (id, graph) in [("a", "job"), ("b", "task"), ("c", "other")] {
        lab.create_with(id, graph, Priority::Medium).await;
    }
    let claimed = lab
        .db
        .claim(ClaimRequest {
            owner: "lab",
            graphs: &["job".to_owned(), "other".to_owned()],
            limit: 10,
            lease: LONG,
        })
        .await
        .expect("claims");
    let ids: BTreeSet<&str> = claimed
        .claims
        .iter()
        .map(|c| c.lease.thread.as_str())
        .collect();
    assert_eq!(ids, BTreeSet::from(["a", "c"]));
    let nobody = ClaimRequest {
        owner: "lab",
        graphs: &[],
        limit: 10,
        lease: LONG,
    };
    assert!(
        lab.db
            .claim(nobody)
            .await
            .expect("claims")
            .claims
            .is_empty()
    );
    assert_eq!(lab.claim("task").await.lease.thread.as_str(), "b");
}

/// Critical, high, normal, low; the older first among equals.
pub async fn urgent_threads_are_claimed_first(lab: &Lab) {
    for (id, priority) in [
        ("low", Priority::Low),
        ("medium", Priority::Medium),
        ("critical", Priority::Critical),
        ("high", Priority::High),
        ("medium2", Priority::Medium),
    ] {
        lab.create_with(id, "job", priority).await;
    }
    let mut order = Vec::new();
    for limit in [1, 2, 10] {
        let claimed = claim_from(&*lab.db, "job", limit, LONG).await;
        order.extend(
            claimed
                .claims
                .into_iter()
                .map(|c| c.lease.thread.to_string()),
        );
    }
    assert_eq!(order, ["critical", "high", "medium", "medium2", "low"]);
}

/// Every rank costs [`AGING_S`] seconds of waiting, no more: low ones never starve.
pub async fn a_low_thread_that_waited_long_goes_first(lab: &Lab) {
    let threads = [
        ("critical", Priority::Critical, 0),
        ("low, long", Priority::Low, 3 * AGING_S + 5),
        ("low, not long", Priority::Low, 3 * AGING_S - 5),
        ("high, long", Priority::High, AGING_S + 10),
    ];
    for (id, priority, _) in threads {
        lab.create_with(id, "job", priority).await;
    }
    let claimed = claim_from(&*lab.db, "job", 10, LONG).await;
    for claim in &claimed.claims {
        let (_, _, waited_s) = threads
            .iter()
            .find(|(id, ..)| *id == claim.lease.thread.as_str())
            .expect("one of them");
        // A wake time in the past: due since then.
        let commit = Commit {
            then: Then::Wait {
                mail_seen: 0,
                wake_at: Some(claimed.now - SignedDuration::from_secs(*waited_s)),
            },
            ..Commit::on(0)
        };
        assert!(lab.commit(&claim.lease, commit).await.released);
    }
    let claimed = claim_from(&*lab.db, "job", 10, LONG).await;
    let order: Vec<&str> = claimed
        .claims
        .iter()
        .map(|claim| claim.lease.thread.as_str())
        .collect();
    assert_eq!(
        order,
        ["high, long", "low, long", "critical", "low, not long"]
    );
}

/// The thread of a process that died is taken over by another one, which knows how often that happened.
pub async fn an_expired_lease_is_taken_over(lab: &Lab) {
    lab.create("t").await;
    let first = lab.claim_soon("t", SHORT).await;
    assert!(lab.idle("t").await);
    let second = lab.claim_soon("t", SHORT).await;
    assert_eq!(second.takeovers, 1);
    assert!(second.lease.token > first.lease.token);
    assert_fenced(
        lab.db.commit(&first.lease, Commit::on(0)).await,
        &first.lease,
    );
    assert_fenced(lab.db.load(&first.lease).await, &first.lease);
    let third = lab.claim_soon("t", LONG).await;
    assert_eq!(third.takeovers, 2);
    lab.step(&third.lease, 0).await;
}

/// Only deaths in a row count.
pub async fn progress_forgets_the_takeovers(lab: &Lab) {
    lab.create("t").await;
    lab.claim_soon("t", SHORT).await;
    let claim = lab.claim_soon("t", SHORT).await;
    assert_eq!(claim.takeovers, 1);
    // A commit without a checkpoint is no progress.
    lab.commit(&claim.lease, Commit::on(0)).await;
    let claim = lab.claim_soon("t", SHORT).await;
    assert_eq!(claim.takeovers, 2);
    lab.step(&claim.lease, 0).await;
    let claim = lab.claim_soon("t", LONG).await;
    assert_eq!(
        claim.takeovers, 1,
        "only the last one died without progress"
    );
    let commit = Commit {
        then: Then::Yield,
        ..Commit::on(1)
    };
    lab.commit(&claim.lease, commit).await;
    assert_eq!(lab.claim("t").await.takeovers, 0, "giving back is living");
}

/// Renewing moves the expiry; what was taken over is lost, and stays so.
pub async fn a_renewed_lease_is_kept_and_a_lost_one_is_said_to_be_lost(lab: &Lab) {
    lab.create("kept").await;
    lab.create("lost").await;
    let kept = lab.claim_soon("kept", SHORT).await.lease;
    let lost = lab.claim_soon("lost", SHORT).await.lease;
    let renewed = lab
        .db
        .renew(std::slice::from_ref(&kept), LONG)
        .await
        .expect("renews");
    assert!(renewed[0].held);
    let thief = lab.claim_soon("lost", LONG).await.lease;
    let renewed = lab
        .db
        .renew(&[lost.clone(), kept.clone()], LONG)
        .await
        .expect("renews");
    let held: Vec<(&str, bool)> = renewed
        .iter()
        .map(|r| (r.thread.as_str(), r.held))
        .collect();
    assert_eq!(
        held,
        [("lost", false), ("kept", true)],
        "in the order asked"
    );
    assert!(lab.idle("kept").await);
    assert!(lab.idle("lost").await);
    let record = lab.thread("lost").await.lease.expect("a lease");
    assert_eq!(record.token, thief.token);
    assert!(lab.db.renew(&[], LONG).await.expect("renews").is_empty());
}

/// Late is not lost: as long as nobody else took the thread, its run may commit and renew.
pub async fn an_expired_lease_that_nobody_took_still_counts(lab: &Lab) {
    lab.create("t").await;
    let claim = lab.claim_soon("t", Duration::from_millis(1)).await;
    tokio::time::sleep(Duration::from_millis(20)).await;
    lab.step(&claim.lease, 0).await;
    let renewed = lab
        .db
        .renew(std::slice::from_ref(&claim.lease), LONG)
        .await
        .expect("renews");
    assert!(renewed[0].held);
    assert!(lab.idle("t").await);
}

/// All of one owner, none of another's; whoever held them is fenced off by the next claim, and counts as dead.
pub async fn broken_leases_are_claimed_at_once(lab: &Lab) {
    lab.create("a").await;
    lab.create("b").await;
    lab.create("other").await;
    let dead = [lab.claim("a").await.lease, lab.claim("b").await.lease];
    let other = ClaimRequest {
        owner: "other",
        graphs: &["other".to_owned()],
        limit: 1,
        lease: LONG,
    };
    let other = lab.db.claim(other).await.expect("claims").claims.remove(0);
    let asleep = lab.running("asleep").await;
    let commit = Commit {
        then: Then::Wait {
            mail_seen: 0,
            wake_at: None,
        },
        ..Commit::on(0)
    };
    lab.commit(&asleep, commit).await;
    assert_eq!(lab.db.break_leases("lab").await.expect("breaks"), 2);
    assert_eq!(lab.db.break_leases("nobody").await.expect("breaks"), 0);
    assert!(lab.idle("asleep").await, "it had no lease");
    assert!(lab.idle("other").await, "its owner lives");
    lab.commit(&other.lease, Commit::on(0)).await;
    for (id, dead) in ["a", "b"].into_iter().zip(dead) {
        let claim = lab.claim(id).await;
        assert_eq!(claim.takeovers, 1);
        assert_fenced(lab.db.commit(&dead, Commit::on(0)).await, &dead);
    }
}

/// A thread that waits for a time is due then, not before; the claimer is told when to look again.
pub async fn a_timer_wakes_by_the_clock_of_the_database(lab: &Lab) {
    // A machine that stands still for longer than the wait shows nothing, and gets a longer one.
    for (name, wait_ms) in [("a", 250), ("b", 2_000), ("c", 20_000), ("d", 60_000)] {
        if timer_wakes(lab, name, wait_ms).await >= 1 {
            return;
        }
    }
    panic!("it was due at once each time");
}

/// How often a thread that waits for so long was looked at in vain before it was due.
async fn timer_wakes(lab: &Lab, name: &str, wait_ms: u64) -> u32 {
    let wait = Duration::from_millis(wait_ms);
    let lease = lab.running(name).await;
    let wake_at = lab.load(&lease).await.now + wait;
    let commit = Commit {
        then: Then::Wait {
            mail_seen: 0,
            wake_at: Some(wake_at),
        },
        ..Commit::on(0)
    };
    let receipt = lab.commit(&lease, commit).await;
    assert!(receipt.released);
    let shown = lab.thread(name).await.wake_at.expect("a wake time");
    assert!(shown >= wake_at && shown < wake_at + SignedDuration::from_millis(1));
    let mut looks = 0;
    let claimed = loop {
        let claimed = lab.try_claim(name, LONG).await;
        if !claimed.claims.is_empty() {
            break claimed;
        }
        looks += 1;
        assert!(looks < 1000, "it never became due");
        let next = claimed.next_due.expect("the wake time is known");
        assert!(next <= wait, "{next:?}");
        assert!(claimed.now < wake_at, "it is overdue");
        tokio::time::sleep(next.max(Duration::from_millis(1))).await;
    };
    assert!(claimed.now >= wake_at);
    assert!(lab.idle(name).await);
    looks
}

/// Giving a thread back without an end or a wait.
pub async fn a_yielded_thread_is_due_at_once(lab: &Lab) {
    let lease = lab.running("t").await;
    let commit = Commit {
        then: Then::Yield,
        ..Commit::on(0)
    };
    assert!(lab.commit(&lease, commit).await.released);
    let thread = lab.thread("t").await;
    assert_eq!((thread.status, thread.lease), (ThreadStatus::Ready, None));
    lab.claim("t").await;
}

/// What a run reads is what its lease gives it.
pub async fn loading_needs_the_lease(lab: &Lab) {
    lab.db
        .create_thread(NewThread {
            input: serde_json::json!({"n": 1}).into(),
            ..new_thread("t")
        })
        .await
        .expect("creates");
    let claim = lab.claim("t").await;
    let loaded = lab.load(&claim.lease).await;
    assert_eq!(loaded.thread, claim.thread);
    assert_eq!(
        (
            loaded.state.checkpoint,
            loaded.state.branch,
            loaded.state.step
        ),
        (0, 0, 0)
    );
    assert_eq!(
        (loaded.state.plan, loaded.state.since_snapshot),
        (None, None)
    );
    assert!(loaded.state.rows.is_empty() && loaded.writes.is_empty() && loaded.mailbox.is_empty());
    assert_eq!(loaded.mail, 0);
    let mut stale = claim.lease.clone();
    stale.token += 1;
    assert_fenced(lab.db.load(&stale).await, &stale);
    let commit = Commit {
        then: Then::Yield,
        ..Commit::on(0)
    };
    lab.commit(&claim.lease, commit).await;
    assert_fenced(lab.db.load(&claim.lease).await, &claim.lease);
}
