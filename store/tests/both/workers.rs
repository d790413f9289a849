//! Where workers are.

use jiff::Timestamp;
use ports::JobKind;
use store::{LINES_KEPT, WorkerLine};

use crate::journal::{Journal, P};
use crate::world::World;

on_both!(
    a_worker_is_awaited_until_it_ended_and_shown_with_its_phase,
    why_a_worker_waits_is_told_until_it_is_taken_up,
    what_workers_say_is_kept_once_in_order_and_read_on_from_where_one_was,
    of_what_a_worker_says_the_last_lines_are_kept_and_old_ones_go,
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

fn line(at_ms: i64, seq: i64, text: &str) -> WorkerLine {
    WorkerLine {
        at_ms,
        seq,
        kind: "log".to_owned(),
        text: text.to_owned(),
    }
}

async fn what_workers_say_is_kept_once_in_order_and_read_on_from_where_one_was(world: &World) {
    let store = &world.store;
    world.projector.catch_up(&journal()).await.unwrap();
    let (project, task) = (P.into(), "a".into());
    let start = (i64::MIN, i64::MIN);
    let texts = |after, limit| async move {
        let (project, task) = (P.into(), "a".into());
        let said = store.said_by_workers(&project, &task, after, limit).await;
        let texts = said.unwrap().unwrap().into_iter();
        texts.map(|one| one.line.text).collect::<Vec<_>>()
    };
    let unknown = store.said_by_workers(&project, &task, start, 10).await;
    assert_eq!(unknown.unwrap(), None, "it never had a worker");
    let awaited = store.awaited_workers(2).await.unwrap();
    for one in &awaited {
        store.worker_awaited(one, at(9_000)).await.unwrap();
    }
    assert_eq!(texts(start, 10).await, [""; 0]);

    let request = &awaited[0].request;
    for (at_ms, seq, text) in [(5, 1, "one"), (7, 3, "three"), (7, 2, "two"), (5, 1, "one")] {
        let line = line(at_ms, seq, text);
        store.worker_said(request, &line).await.unwrap();
    }
    let other = line(6, 1, "another's");
    store
        .worker_said(&awaited[1].request, &other)
        .await
        .unwrap();
    assert_eq!(texts(start, 10).await, ["one", "two", "three"]);
    assert_eq!(texts(start, 2).await, ["two", "three"]);
    assert_eq!(texts((7, 2), 10).await, ["three"]);
    assert_eq!(texts((7, 3), 10).await, [""; 0]);
    let said = store.said_by_workers(&project, &task, start, 1).await;
    assert_eq!(said.unwrap().unwrap()[0].attempt, 1);
    let mut tasks = store.tasks_with_workers(&project, 10).await.unwrap();
    tasks.sort();
    assert_eq!(tasks, ["a".into(), "b".into()]);
}

async fn of_what_a_worker_says_the_last_lines_are_kept_and_old_ones_go(world: &World) {
    let store = &world.store;
    world.projector.catch_up(&journal()).await.unwrap();
    let awaited = store.awaited_workers(2).await.unwrap();
    let now = Timestamp::now().as_millisecond();
    for one in &awaited {
        store.worker_awaited(one, at(9_000)).await.unwrap();
    }
    let kept = i64::try_from(LINES_KEPT).unwrap();
    for n in 0..kept + 20 {
        let line = line(now + n, n, "again");
        store.worker_said(&awaited[0].request, &line).await.unwrap();
    }
    let old = line(now - 15 * 24 * 3_600_000, 1, "long ago");
    store.worker_said(&awaited[1].request, &old).await.unwrap();
    let all = |task: &'static str| async move {
        let start = (i64::MIN, i64::MIN);
        let (project, task) = (P.into(), task.into());
        let said = store.said_by_workers(&project, &task, start, 2 * LINES_KEPT);
        said.await.unwrap().unwrap()
    };
    let said = all("a").await;
    assert_eq!(said.len(), usize::try_from(kept).unwrap());
    assert_eq!(said[0].line.seq, 20);
    assert_eq!(all("b").await.len(), 1);
    store.worker_ended(&awaited[0].request).await.unwrap();
    assert_eq!(all("a").await.len(), usize::try_from(kept).unwrap());
    assert_eq!(all("b").await.len(), 0);
}
