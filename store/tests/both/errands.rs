use std::time::Duration;

use ports::{Errand, ErrandOutcome, ErrandWork, Failure};
use store::{ErrandStatus, Finished, MAX_ERRAND_ATTEMPTS};

use crate::world::World;

on_both!(
    an_errand_handed_over_twice_is_done_once,
    an_errand_is_claimed_by_one_at_a_time,
    an_expired_lease_is_claimed_again_and_the_old_one_is_worth_nothing,
    an_errand_that_never_ends_fails_in_the_end,
    an_errand_that_is_taken_back_stays_so,
    an_errand_given_back_is_not_counted,
    an_outcome_is_delivered_until_it_was,
    what_a_dead_process_held_is_free_at_once,
);

const LEASE: Duration = Duration::from_mins(1);

fn errand(key: &str) -> Errand {
    Errand {
        key: key.to_owned(),
        reply_to: "p1/job-1/a".to_owned(),
        work: ErrandWork::Checks {
            project: "p1".into(),
            sha: "abc".into(),
        },
    }
}

fn failed() -> ErrandOutcome {
    ErrandOutcome::Failed(Failure::new("x", "y"))
}

async fn an_errand_handed_over_twice_is_done_once(world: &World) {
    let store = &world.store;
    store.hand_over_errand(&errand("e1")).await.unwrap();
    store.hand_over_errand(&errand("e1")).await.unwrap();
    let claimed = store.claim_errand(LEASE).await.unwrap().unwrap();
    assert_eq!(claimed.errand, errand("e1"));
    assert_eq!(claimed.attempt, 1);
    assert_eq!(store.claim_errand(LEASE).await.unwrap(), None);
    store
        .finish_errand("e1", &claimed.token, &failed())
        .await
        .unwrap();
    store.hand_over_errand(&errand("e1")).await.unwrap();
    assert_eq!(store.claim_errand(LEASE).await.unwrap(), None);
    assert_eq!(
        store.errand_status("e1").await.unwrap(),
        Some(ErrandStatus::Done)
    );
}

async fn an_errand_is_claimed_by_one_at_a_time(world: &World) {
    for number in 0..12 {
        let errand = errand(&format!("e{number}"));
        world.store.hand_over_errand(&errand).await.unwrap();
    }
    let mut claimers = Vec::new();
    for _ in 0..4 {
        let store = world.another().await;
        claimers.push(tokio::spawn(async move {
            let mut mine = Vec::new();
            while let Some(claimed) = store.claim_errand(LEASE).await.unwrap() {
                mine.push(claimed.errand.key);
            }
            store.close().await;
            mine
        }));
    }
    let mut all = Vec::new();
    for claimer in claimers {
        all.extend(claimer.await.unwrap());
    }
    all.sort();
    let claimed = all.len();
    all.dedup();
    assert_eq!((claimed, all.len()), (12, 12));
}

async fn an_expired_lease_is_claimed_again_and_the_old_one_is_worth_nothing(world: &World) {
    let store = &world.store;
    store.hand_over_errand(&errand("e1")).await.unwrap();
    let old = store.claim_errand(Duration::ZERO).await.unwrap().unwrap();
    assert!(
        store
            .renew_errand("e1", &old.token, Duration::ZERO)
            .await
            .unwrap()
    );
    let new = store.claim_errand(LEASE).await.unwrap().unwrap();
    assert_eq!(new.attempt, 2);
    assert!(!store.renew_errand("e1", &old.token, LEASE).await.unwrap());
    assert_eq!(
        store
            .finish_errand("e1", &old.token, &failed())
            .await
            .unwrap(),
        Finished::Refused
    );
    assert!(store.renew_errand("e1", &new.token, LEASE).await.unwrap());
    assert_eq!(
        store
            .finish_errand("e1", &new.token, &failed())
            .await
            .unwrap(),
        Finished::Recorded
    );
    assert_eq!(
        store
            .finish_errand("e1", &new.token, &failed())
            .await
            .unwrap(),
        Finished::Refused
    );
}

async fn an_errand_that_never_ends_fails_in_the_end(world: &World) {
    let store = &world.store;
    store.hand_over_errand(&errand("e1")).await.unwrap();
    for attempt in 1..=MAX_ERRAND_ATTEMPTS {
        let claimed = store.claim_errand(Duration::ZERO).await.unwrap().unwrap();
        assert_eq!(i64::from(claimed.attempt), attempt);
    }
    assert_eq!(store.claim_errand(LEASE).await.unwrap(), None);
    let replies = store.undelivered_errands(10).await.unwrap();
    assert!(
        matches!(&replies[0].outcome, ErrandOutcome::Failed(f) if f.kind == "errand_lost"),
        "{replies:?}"
    );
}

async fn an_errand_that_is_taken_back_stays_so(world: &World) {
    let store = &world.store;
    for key in ["queued", "running", "done"] {
        store.hand_over_errand(&errand(key)).await.unwrap();
    }
    // The oldest first; handed over within one millisecond, by name.
    let mut claims = Vec::new();
    for _ in 0..3 {
        claims.push(store.claim_errand(LEASE).await.unwrap().unwrap());
    }
    let token = |key: &str| {
        claims
            .iter()
            .find(|c| c.errand.key == key)
            .unwrap()
            .token
            .clone()
    };
    store
        .give_back_errand("queued", &token("queued"))
        .await
        .unwrap();
    store
        .finish_errand("done", &token("done"), &failed())
        .await
        .unwrap();
    for key in ["queued", "running", "done", "unknown"] {
        store.cancel_errand(key).await.unwrap();
    }
    assert_eq!(store.claim_errand(LEASE).await.unwrap(), None);
    assert!(
        !store
            .renew_errand("running", &token("running"), LEASE)
            .await
            .unwrap()
    );
    assert_eq!(
        store
            .finish_errand("running", &token("running"), &failed())
            .await
            .unwrap(),
        Finished::Refused
    );
    let mut outcomes: Vec<_> = store
        .undelivered_errands(10)
        .await
        .unwrap()
        .into_iter()
        .map(|r| (r.key, r.outcome == ErrandOutcome::Cancelled))
        .collect();
    outcomes.sort();
    assert_eq!(
        outcomes,
        [
            ("done".to_owned(), false),
            ("queued".to_owned(), true),
            ("running".to_owned(), true)
        ]
    );
}

async fn an_errand_given_back_is_not_counted(world: &World) {
    let store = &world.store;
    store.hand_over_errand(&errand("e1")).await.unwrap();
    for _ in 0..=MAX_ERRAND_ATTEMPTS {
        let claimed = store.claim_errand(LEASE).await.unwrap().unwrap();
        assert_eq!(claimed.attempt, 1);
        store.give_back_errand("e1", "not mine").await.unwrap();
        assert_eq!(store.claim_errand(LEASE).await.unwrap(), None);
        store.give_back_errand("e1", &claimed.token).await.unwrap();
    }
}

async fn an_outcome_is_delivered_until_it_was(world: &World) {
    let store = &world.store;
    store.hand_over_errand(&errand("e1")).await.unwrap();
    assert_eq!(store.undelivered_errands(10).await.unwrap(), []);
    let claimed = store.claim_errand(LEASE).await.unwrap().unwrap();
    store
        .finish_errand("e1", &claimed.token, &failed())
        .await
        .unwrap();
    for _ in 0..2 {
        let replies = store.undelivered_errands(10).await.unwrap();
        assert_eq!(replies.len(), 1);
        assert_eq!(replies[0].reply_to, "p1/job-1/a");
        assert_eq!(replies[0].outcome, failed());
    }
    store.errand_delivered("e1").await.unwrap();
    assert_eq!(store.undelivered_errands(10).await.unwrap(), []);
}

async fn what_a_dead_process_held_is_free_at_once(world: &World) {
    let store = &world.store;
    store.hand_over_errand(&errand("e1")).await.unwrap();
    let dead = store.claim_errand(LEASE).await.unwrap().unwrap();
    assert_eq!(store.claim_errand(LEASE).await.unwrap(), None);
    store.break_leases().await.unwrap();
    let next = store.claim_errand(LEASE).await.unwrap().unwrap();
    assert_eq!(next.attempt, 2);
    assert_eq!(
        store
            .finish_errand("e1", &dead.token, &failed())
            .await
            .unwrap(),
        Finished::Refused
    );
}
