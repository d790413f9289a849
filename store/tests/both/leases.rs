//! Work that one process at a time does.

use std::time::Duration;

use ports::{Errand, ErrandWork, ProjectId, Sha};
use store::{BOT, SCHEDULER};

use crate::world::World;

on_both!(
    a_lease_is_held_by_one_and_taken_over_when_it_runs_out,
    a_lease_that_is_given_back_is_free_at_once,
    a_dead_process_is_buried_with_what_it_held,
    what_was_taken_over_is_not_buried_with_the_dead,
);

const LONG: Duration = Duration::from_mins(1);

async fn errand_is_claimed(world: &World) -> String {
    let errand = Errand {
        key: "e1".to_owned(),
        reply_to: "p1/job-1/a".to_owned(),
        work: ErrandWork::Checks {
            project: ProjectId::new("p1"),
            sha: Sha::new("a".repeat(40)),
        },
    };
    world.store.hand_over_errand(&errand).await.unwrap();
    world.store.claim_errand(LONG).await.unwrap().unwrap().token
}

async fn a_lease_is_held_by_one_and_taken_over_when_it_runs_out(world: &World) {
    let (one, two) = (&world.store, world.another().await);
    let first = one.take_lease(SCHEDULER, "one", LONG).await.unwrap();
    let first = first.expect("nobody holds it");
    assert_eq!(two.take_lease(SCHEDULER, "two", LONG).await.unwrap(), None);
    assert_eq!(
        two.lease_holder(SCHEDULER).await.unwrap().as_deref(),
        Some("one")
    );
    // Leases of other names are other leases.
    assert!(two.take_lease(BOT, "two", LONG).await.unwrap().is_some());
    assert!(one.keep_lease(SCHEDULER, &first, LONG).await.unwrap());

    assert!(
        one.keep_lease(SCHEDULER, &first, Duration::ZERO)
            .await
            .unwrap()
    );
    let second = two.take_lease(SCHEDULER, "two", LONG).await.unwrap();
    let second = second.expect("its time ran out");
    assert!(!one.keep_lease(SCHEDULER, &first, LONG).await.unwrap());
    one.leave_lease(SCHEDULER, &first).await.unwrap();
    assert!(two.keep_lease(SCHEDULER, &second, LONG).await.unwrap());
    two.close().await;
}

async fn a_lease_that_is_given_back_is_free_at_once(world: &World) {
    let store = &world.store;
    let first = store.take_lease(BOT, "one", LONG).await.unwrap().unwrap();
    store.leave_lease(BOT, &first).await.unwrap();
    assert_eq!(store.lease_holder(BOT).await.unwrap(), None);
    assert!(!store.keep_lease(BOT, &first, LONG).await.unwrap());
    assert!(store.take_lease(BOT, "two", LONG).await.unwrap().is_some());
}

async fn a_dead_process_is_buried_with_what_it_held(world: &World) {
    let store = &world.store;
    store.take_lease(SCHEDULER, "one", LONG).await.unwrap();
    errand_is_claimed(world).await;
    assert_eq!(store.bury_process("somebody else").await.unwrap(), [""; 0]);
    assert_eq!(store.claim_errand(LONG).await.unwrap(), None);

    assert_eq!(store.bury_process("one").await.unwrap(), [SCHEDULER]);
    assert_eq!(store.bury_process("one").await.unwrap(), [""; 0]);
    let next = store.take_lease(SCHEDULER, "two", LONG).await.unwrap();
    assert!(next.is_some());
    let again = store.claim_errand(LONG).await.unwrap().unwrap();
    assert_eq!(again.attempt, 2);
}

async fn what_was_taken_over_is_not_buried_with_the_dead(world: &World) {
    let store = &world.store;
    let first = store.take_lease(SCHEDULER, "one", LONG).await.unwrap();
    let first = first.unwrap();
    store
        .keep_lease(SCHEDULER, &first, Duration::ZERO)
        .await
        .unwrap();
    let second = store.take_lease(SCHEDULER, "two", LONG).await.unwrap();
    let token = errand_is_claimed(world).await;
    assert_eq!(store.bury_process("one").await.unwrap(), [""; 0]);
    assert!(
        store
            .keep_lease(SCHEDULER, &second.unwrap(), LONG)
            .await
            .unwrap()
    );
    assert!(store.renew_errand("e1", &token, LONG).await.unwrap());
}
