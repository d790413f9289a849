//! Where workers are.

use jiff::Timestamp;
use ports::JobKind;

use crate::journal::{Journal, P};
use crate::world::World;

on_both!(
    a_worker_is_awaited_until_it_ended_and_shown_with_its_phase,
    why_a_worker_waits_is_told_until_it_is_taken_up,
);

/// A job with two tasks that work.
fn journal() -> Journal {
    let mut journal = Journal::new();
    journal
        .founded()
        .specified("notes")
        .job(
            "job-1",
            JobKind::New {
                spec: crate::journal::spec(),
            },
        )
        .planned(&[("a", &[]), ("b", &[])]);
    for task in ["a", "b"] {
        journal.task(task).attempt(1);
    }
    journal
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).unwrap()
}

async fn a_worker_is_awaited_until_it_ended_and_shown_with_its_phase(world: &World) {
    let store = &world.store;
    world.projector.catch_up(&journal()).await.unwrap();
    let awaited = store.awaited_workers(10).await.unwrap();
    let requests: Vec<_> = awaited.iter().map(|one| one.request.as_str()).collect();
    assert_eq!(requests, ["a-1", "b-1"]);
    assert_eq!(store.awaited_workers(1).await.unwrap().len(), 1);
    for _ in 0..2 {
        store.worker_awaited(&awaited[0], at(9_000)).await.unwrap();
    }
    let a = &awaited[0].request;
    store.worker_taken_up(a, "spawner-1").await.unwrap();
    store.worker_phase(a, "cloning", at(1_000)).await.unwrap();
    // A phase that goes on began when it began.
    store.worker_phase(a, "cloning", at(2_000)).await.unwrap();

    let tasks = store.tasks(&P.into(), &"job-1".into()).await.unwrap();
    let worker = tasks[0].worker.as_ref().unwrap();
    assert_eq!(worker.phase, "cloning");
    assert_eq!((worker.since, worker.until), (at(1_000), at(9_000)));
    assert_eq!(worker.spawner.as_deref(), Some("spawner-1"));
    assert_eq!(tasks[1].worker, None, "nothing is known of it");

    store.worker_ended(a).await.unwrap();
    let tasks = store.tasks(&P.into(), &"job-1".into()).await.unwrap();
    assert_eq!(tasks[0].worker, None);
    let awaited = store.awaited_workers(10).await.unwrap();
    let requests: Vec<_> = awaited.iter().map(|one| one.request.as_str()).collect();
    assert_eq!(requests, ["b-1"]);
}

async fn why_a_worker_waits_is_told_until_it_is_taken_up(world: &World) {
    let store = &world.store;
    world.projector.catch_up(&journal()).await.unwrap();
    let awaited = store.awaited_workers(1).await.unwrap().remove(0);
    let phase = || async {
        let tasks = store.tasks(&P.into(), &"job-1".into()).await.unwrap();
        tasks[0].worker.clone().unwrap().phase
    };
    store.worker_awaited(&awaited, at(9_000)).await.unwrap();
    assert_eq!(phase().await, "waiting for a spawner");
    let request = &awaited.request;
    store
        .worker_waits(request, "waiting for a spawner: none lives")
        .await
        .unwrap();
    assert_eq!(phase().await, "waiting for a spawner: none lives");
    store.worker_phase(request, "queued", at(1)).await.unwrap();
    store
        .worker_waits(request, "waiting for a spawner: none lives")
        .await
        .unwrap();
    assert_eq!(phase().await, "queued");
}
