//! Who lives, who may come back, and what waits for them.

use super::*;
use crate::Heartbeat;
use std::collections::BTreeMap;

/// What a spawner of this name says of itself.
pub fn beat(spawner: &str, size: Size) -> Heartbeat {
    Heartbeat {
        version: VERSION,
        spawner: spawner.to_owned(),
        capacity: 2,
        running: 1,
        size: Some(size),
        used: Some(Size::ZERO),
        draining: false,
        versions: BTreeMap::new(),
        at: Timestamp::now(),
    }
}

async fn seen(bus: &Arc<dyn Transport>) -> Vec<Heartbeat> {
    let seen = bus.seen_spawners().await.unwrap();
    seen.into_iter().map(|seen| seen.last).collect()
}

/// Waits until it is so.
async fn until(what: &str, is_so: impl AsyncFn() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < SOON, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// See the name.
pub async fn a_spawner_that_lives_is_listed(harness: &dyn Harness) {
    let bus = harness.open().await;
    assert!(bus.spawners().await.unwrap().is_empty());
    let beat = beat("here", Size::new(2.5, 4096));
    bus.heartbeat(&beat).await.unwrap();
    assert_eq!(seen(&bus).await, bus.spawners().await.unwrap());
    assert_eq!(bus.spawners().await.unwrap(), [beat]);
}

/// See the name.
pub async fn a_spawner_that_was_heard_of_lately_may_come_back_until_it_says_farewell(
    harness: &dyn Harness,
) {
    let lives = Duration::from_millis(40);
    let bus = harness.open_remembering(lives, LONG).await;
    let (large, small) = (
        beat("large", Size::new(16.0, 8000)),
        beat("small", Size::new(1.0, 500)),
    );
    bus.heartbeat(&small).await.unwrap();
    bus.heartbeat(&large).await.unwrap();
    until("nobody lives any more", async || {
        bus.spawners().await.unwrap().is_empty()
    })
    .await;
    let both = bus.seen_spawners().await.unwrap();
    assert_eq!(seen(&bus).await, [large, small.clone()], "by name");
    for seen in both {
        assert!(seen.silent >= lives / 2 && seen.silent < LONG, "{seen:?}");
    }
    bus.farewell("large").await.unwrap();
    bus.farewell("nobody").await.unwrap();
    assert_eq!(seen(&bus).await, [small]);
    // Who comes back after all is one that lives, and says anew how large it is.
    let again = beat("large", Size::new(2.0, 1000));
    bus.heartbeat(&again).await.unwrap();
    assert!(seen(&bus).await.contains(&again));
    bus.farewell("large").await.unwrap();
    let alive = bus.spawners().await.unwrap();
    assert!(
        alive.iter().all(|beat| beat.spawner != "large"),
        "{alive:?}"
    );
}

/// See the name.
pub async fn a_spawner_that_is_silent_for_too_long_is_forgotten(harness: &dyn Harness) {
    let (lives, lately) = (Duration::from_millis(10), Duration::from_millis(100));
    let bus = harness.open_remembering(lives, lately).await;
    bus.heartbeat(&beat("gone", Size::ZERO)).await.unwrap();
    until("it is forgotten", async || seen(&bus).await.is_empty()).await;
    bus.heartbeat(&beat("new", Size::ZERO)).await.unwrap();
    assert!(seen(&bus).await.iter().all(|beat| beat.spawner != "gone"));
}

/// See the name.
pub async fn of_too_many_spawners_those_are_forgotten_that_were_silent_for_the_longest_time(
    harness: &dyn Harness,
) {
    let lives = Duration::from_millis(1);
    let bus = harness.open_remembering(lives, LONG).await;
    let most = crate::transport::REMEMBERED;
    bus.heartbeat(&beat("first", Size::ZERO)).await.unwrap();
    for n in 0..most {
        let other = beat(&format!("other-{n}"), Size::ZERO);
        bus.heartbeat(&other).await.unwrap();
    }
    until("nobody lives any more", async || {
        bus.spawners().await.unwrap().is_empty()
    })
    .await;
    let seen = seen(&bus).await;
    assert_eq!(seen.len(), most);
    assert!(seen.iter().all(|beat| beat.spawner != "first"));
}

/// See the name.
pub async fn what_a_job_may_use_is_known_while_it_waits(harness: &dyn Harness) {
    let bus = harness.open_for(LONG).await;
    let mut sized = request("a");
    (sized.limits.cpu, sized.limits.memory_mb) = (2.5, 3000);
    assert_eq!(bus.job_size("a").await.unwrap(), None);
    bus.publish_job(&sized).await.unwrap();
    let size = Some(Size::new(2.5, 3000));
    assert_eq!(bus.job_size("a").await.unwrap(), size);
    // Also for a program that starts just now.
    drop(bus);
    let bus = harness.open_for(LONG).await;
    assert_eq!(bus.job_size("a").await.unwrap(), size);
    let wrong = bus.job_size("a/b").await;
    assert!(
        matches!(wrong, Err(TransportError::Message(_))),
        "{wrong:?}"
    );
}
