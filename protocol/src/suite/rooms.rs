//! Who gets which job: by what spawners have room for, and by what projects hold already.

use super::*;

/// A request of this project that may use so much.
fn sized(id: &str, project: &str, cores: f64, memory_mb: u64) -> SpawnRequest {
    let mut request = request(id);
    project.clone_into(&mut request.project_id);
    (request.limits.cpu, request.limits.memory_mb) = (cores, memory_mb);
    request
}

/// A spawner of this size of which so much is free, without patience for large jobs or grace for those that fit nobody.
fn room(free: Size, whole: Size) -> Room {
    Room {
        free,
        whole,
        ..Room::unlimited()
    }
}

/// The next job for a room that does not change.
async fn job_for(bus: &Arc<dyn Transport>, room: &Room, wait: Duration) -> Option<JobDelivery> {
    let (_sender, rooms): (_, Rooms) = watch::channel(room.clone());
    bus.next_job_for(&rooms, wait).await.unwrap()
}

/// See the name.
pub async fn a_job_is_taken_only_by_who_has_room_for_it(harness: &dyn Harness) {
    let bus = harness.open_for(LONG).await;
    let (small, large) = (Size::new(1.0, 1000), Size::new(8.0, 8000));
    for request in [
        sized("processors", "p", 4.0, 100),
        sized("memory", "p", 0.5, 4000),
        sized("little", "p", 0.5, 1000),
    ] {
        bus.publish_job(&request).await.unwrap();
    }
    let little = job_for(&bus, &room(small, small), SOON).await.unwrap();
    assert_eq!(little.request.request_id, "little");
    assert_eq!(little.deliveries, 1);
    let more = job_for(&bus, &room(small, small), NOT_NOW).await;
    assert!(more.is_none(), "{more:?}");
    let busy = job_for(&bus, &room(small, large), NOT_NOW).await;
    assert!(busy.is_none(), "{busy:?}");
    let first = job_for(&bus, &room(large, large), SOON).await.unwrap();
    assert_eq!(first.request.request_id, "processors", "the oldest one");
    let rest = large.minus(first.size());
    let second = job_for(&bus, &room(rest, large), SOON).await.unwrap();
    assert_eq!(second.request.request_id, "memory");
    assert_eq!((first.deliveries, second.deliveries), (1, 1));
    for held in [little, first, second] {
        bus.ack_job(&held.receipt).await.unwrap();
    }
    no_job(&bus).await;
}

/// See the name.
pub async fn a_waiting_spawner_takes_a_job_when_its_room_grows(harness: &dyn Harness) {
    let bus = harness.open_for(LONG).await;
    let whole = Size::new(2.0, 1000);
    let (sender, rooms) = watch::channel(room(Size::ZERO, whole));
    bus.publish_job(&sized("a", "p", 2.0, 1000)).await.unwrap();
    let (held, ()) = futures::join!(bus.next_job_for(&rooms, SOON), async {
        tokio::task::yield_now().await;
        sender.send_modify(|room| room.free = whole);
    });
    assert_eq!(held.unwrap().unwrap().request.request_id, "a");
}

/// See the name.
pub async fn place_is_kept_for_a_job_that_was_passed_over_for_too_long(harness: &dyn Harness) {
    let bus = harness.open_for(LONG).await;
    let whole = Size::new(4.0, 4000);
    let half = room(Size::new(2.0, 2000), whole);
    bus.publish_job(&sized("large", "p", 4.0, 4000))
        .await
        .unwrap();
    for id in ["a", "b"] {
        bus.publish_job(&sized(id, "p", 1.0, 1000)).await.unwrap();
    }
    let passed = job_for(&bus, &half, SOON).await.unwrap();
    assert_eq!(passed.request.request_id, "a", "for now");
    bus.ack_job(&passed.receipt).await.unwrap();
    let no_patience = Room {
        patience: Duration::ZERO,
        ..half
    };
    let kept = job_for(&bus, &no_patience, NOT_NOW).await;
    assert!(kept.is_none(), "{kept:?}");
    let free = Room {
        free: whole,
        ..no_patience
    };
    let large = job_for(&bus, &free, SOON).await.unwrap();
    assert_eq!(large.request.request_id, "large");
}

/// See the name.
pub async fn a_job_whose_worker_runs_here_already_needs_no_room_and_comes_first(
    harness: &dyn Harness,
) {
    let bus = harness.open_for(LONG).await;
    let whole = Size::new(4.0, 4000);
    for request in [
        sized("large", "p", 4.0, 4000),
        sized("little", "p", 1.0, 1000),
        sized("too-large", "p", 8.0, 1000),
        sized("here", "p", 2.0, 2000),
        sized("also", "a b", 2.0, 2000),
    ] {
        bus.publish_job(&request).await.unwrap();
    }
    let full = Room {
        ours: ["unknown", "also", "too-large", "here"]
            .map(str::to_owned)
            .into(),
        // However long the large one has waited.
        patience: Duration::ZERO,
        ..room(Size::ZERO, whole)
    };
    let first = job_for(&bus, &full, SOON).await.unwrap();
    assert_eq!(first.request.request_id, "here", "the older one of them");
    let second = job_for(&bus, &full, SOON).await.unwrap();
    assert_eq!(second.request.request_id, "also");
    let none = job_for(&bus, &full, NOT_NOW).await;
    assert!(none.is_none(), "nothing else is ours and fits: {none:?}");
    // Given back, and offered to whoever has room for it.
    bus.release_job(&second.receipt).await.unwrap();
    let elsewhere = room(Size::new(2.0, 2000), whole);
    let next = job_for(&bus, &elsewhere, SOON).await.unwrap();
    assert_eq!(
        next.request.request_id, "also",
        "its project has the fewest"
    );
}

/// See the name.
pub async fn a_job_that_fits_nobody_is_handed_out_when_its_grace_is_over(harness: &dyn Harness) {
    let bus = harness.open_for(LONG).await;
    let whole = Size::new(4.0, 4000);
    bus.publish_job(&sized("huge", "p", 64.0, 100))
        .await
        .unwrap();
    // One that has nothing free says so all the same.
    let waits = room(Size::ZERO, whole);
    assert!(job_for(&bus, &waits, NOT_NOW).await.is_none());
    let somebody = Room {
        grace: Some(Duration::ZERO),
        others: vec![Size::new(1.0, 1000), Size::new(64.0, 1000)],
        ..waits.clone()
    };
    let left = job_for(&bus, &somebody, NOT_NOW).await;
    assert!(left.is_none(), "another one can carry it: {left:?}");
    let nobody = Room {
        others: vec![Size::new(64.0, 50), Size::new(1.0, 1000)],
        grace: Some(Duration::from_millis(20)),
        ..waits
    };
    let handed = job_for(&bus, &nobody, SOON).await.unwrap();
    assert_eq!(handed.request.request_id, "huge");
}

/// See the name.
pub async fn a_project_with_forty_waiting_jobs_does_not_hold_up_another_one(harness: &dyn Harness) {
    let bus = harness.open_for(LONG).await;
    for n in 0..40 {
        let many = sized(&format!("many-{n}"), "many", 1.0, 1);
        bus.publish_job(&many).await.unwrap();
    }
    let running = job(&bus).await;
    assert_eq!(running.request.request_id, "many-0");
    bus.publish_job(&sized("other", "few", 1.0, 1))
        .await
        .unwrap();
    // Whatever is free next goes to the project of which nothing runs, also for a program that starts just now.
    drop(bus);
    let bus = harness.open_for(LONG).await;
    let first = job(&bus).await;
    if first.request.project_id == "many" {
        // Nobody held anything after the restart: the oldest one came first.
        assert_eq!(job(&bus).await.request.request_id, "other");
    } else {
        assert_eq!(first.request.request_id, "other");
    }
}

/// See the name.
pub async fn what_is_handed_out_alternates_between_projects_by_what_they_hold(
    harness: &dyn Harness,
) {
    let bus = harness.open_for(LONG).await;
    for id in ["a-1", "a-2", "a-3", "a-4", "b-1", "b-2", "c-1"] {
        let project = id.split('-').next().unwrap_or_default();
        bus.publish_job(&sized(id, project, 1.0, 1)).await.unwrap();
    }
    let mut order = Vec::new();
    let mut held = Vec::new();
    for _ in 0..5 {
        let next = job(&bus).await;
        order.push(next.request.request_id.clone());
        held.push(next);
    }
    assert_eq!(order, ["a-1", "b-1", "c-1", "a-2", "b-2"]);
    // The two of `b` are done; only `a` has any left, and gets all there is.
    for done in [1, 4] {
        bus.ack_job(&held[done].receipt).await.unwrap();
    }
    bus.publish_job(&sized("b-3", "b", 1.0, 1)).await.unwrap();
    assert_eq!(job(&bus).await.request.request_id, "b-3", "before a-3");
    assert_eq!(job(&bus).await.request.request_id, "a-3");
}

/// See the name.
pub async fn a_project_whose_spawner_died_does_not_count_as_running(harness: &dyn Harness) {
    let bus = harness.open_for(harness.lease()).await;
    bus.publish_job(&sized("a", "a", 1.0, 1)).await.unwrap();
    let lost = job(&bus).await;
    // Longer than the hold; then nobody holds anything, and the oldest one is next.
    tokio::time::sleep(harness.lease() * 2).await;
    bus.publish_job(&sized("b", "b", 1.0, 1)).await.unwrap();
    let again = job(&bus).await;
    assert_eq!(
        (again.request.request_id.as_str(), again.deliveries),
        ("a", 2)
    );
    let late = bus.ack_job(&lost.receipt).await;
    assert!(
        matches!(late, Err(TransportError::NotHeld { .. })),
        "{late:?}"
    );
}
