//! The process dies at every boundary, once; another one goes on. Nothing is done twice, and nothing is said twice.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
    mpsc,
};

use graph::{MemoryCheckpointer, Observer, Point};
use nodes::Policy;
use ports::Role;
use serde_json::json;

use crate::{
    stage::{Stage, approve, closed, names, open_waits, says, send_back, spec, task, world},
    world::{Deploy, Work, World},
};

/// Where a process dies.
#[derive(Clone, Copy, PartialEq)]
enum Boundary {
    /// Effects have happened, nothing of the step is stored.
    BeforeCommit,
    /// The step is stored, nobody was told.
    AfterCommit,
    /// An effect has happened, its result is not stored.
    StepRemembering,
    /// The result is stored, the step is not.
    StepRemembered,
}

/// Kills the process (its runtime, that is) at the second boundary it comes to, so that every boundary but the first is met
/// once by a process that dies there and once by one that passes it.
struct Killer {
    boundary: Boundary,
    seen: AtomicUsize,
    dies_at: usize,
    dead: mpsc::SyncSender<()>,
}

impl Observer for Killer {
    fn on(&self, point: &Point<'_>) {
        let met = matches!(
            (point, self.boundary),
            (Point::BeforeCommit { .. }, Boundary::BeforeCommit)
                | (Point::AfterCommit { .. }, Boundary::AfterCommit)
                | (Point::StepRemembering { .. }, Boundary::StepRemembering)
                | (Point::StepRemembered { .. }, Boundary::StepRemembered)
        );
        if met && self.seen.fetch_add(1, Ordering::SeqCst) + 1 == self.dies_at {
            let _ = self.dead.try_send(());
            loop {
                // A dead process does nothing more; its runtime is thrown away from outside.
                std::thread::park();
            }
        }
    }
}

/// What is built, and by whom.
#[derive(Clone, Copy)]
enum Scene {
    /// Parallel tasks, a send-back, a moved base, everything approved beforehand.
    Alone,
    /// Every kind of question to people: a proposal, a secret, a task at its end, a release that fails.
    WithPeople,
}

fn world_of(scene: Scene) -> World {
    match scene {
        Scene::Alone => alone(),
        Scene::WithPeople => with_people(),
    }
}

fn with_people() -> World {
    let world = world(&[task("api", &[])]);
    let mut spec = spec();
    spec["spec"]["needs"] = json!([{"need": "secret", "name": "KEY", "description": "a key"}]);
    world
        .answer(Role::Brainstorm, "conversation", 0, spec)
        .works(
            "job-1/api",
            &[
                Work::Fails("agent_failed", "it broke"),
                Work::Fails("agent_failed", "it broke"),
                Work::Commit(vec![]),
            ],
        )
        .answer(Role::Reviewer, "job-1/repair-1", 0, approve());
    world.state.lock().deploys = vec![Deploy::RolledBack, Deploy::Fails("disk_full"), Deploy::Live];
    world
}

fn alone() -> World {
    let world = world(&[
        task("storage", &[]),
        task("search", &[]),
        task("api", &["storage"]),
    ]);
    world.answer(
        Role::Reviewer,
        "job-1/api",
        0,
        send_back("there is no test"),
    );
    world.forge.intrude(1);
    world
}

/// Answers whatever is asked until the job has ended.
async fn play(stage: &Stage, scene: Scene) -> Vec<String> {
    let yes = matches!(scene, Scene::Alone);
    stage.message("m1", "Build me a notes service", yes).await;
    loop {
        let next = stage
            .until("a question or the end", |events| {
                if says(events).iter().any(|text| text.contains("is live")) {
                    return Some(None);
                }
                open_waits(events).pop().map(Some)
            })
            .await;
        let Some(wait) = next else {
            return names(&stage.events().await);
        };
        stage.world.state.lock().secrets.insert("KEY".into());
        // A second press is a duplicate, so a life that begins again may answer again.
        let choice = wait.wait.options[0].value.clone();
        stage.press(&wait, &choice).await;
        stage
            .until("the end of the wait", |events| {
                closed(events, &wait.wait.id)
            })
            .await;
    }
}

/// What there is to compare between two runs: everything that happened outside, and everything that was said.
#[derive(Debug, PartialEq)]
struct Trace {
    forge: Vec<String>,
    workers: Vec<String>,
    errands: usize,
    questions: usize,
    ports: Vec<u16>,
    events: Vec<String>,
}

fn trace(world: &World, mut events: Vec<String>) -> Trace {
    let state = world.state.lock();
    let mut forge = world.forge.log();
    // How often a branch must be moved depends on who is merged first; all else does not.
    forge.retain(|line| !line.starts_with("rebased"));
    forge.sort();
    events
        .retain(|name| !name.starts_with("task.checked") && !name.starts_with("task.pull_request"));
    events.sort();
    let mut ports = state.ports.clone();
    ports.sort_unstable();
    let deploys = state
        .errands
        .values()
        .filter(|errand| matches!(errand.work, ports::ErrandWork::Deploy(_)))
        .count();
    let workers = state.requests.keys().cloned().collect();
    drop(state);
    Trace {
        forge,
        workers,
        errands: deploys,
        questions: world.questions().len(),
        ports,
        events,
    }
}

fn undisturbed(scene: Scene) -> Trace {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let world = world_of(scene);
        let stage = Stage::new(world.clone(), Policy::default()).await;
        let names = play(&stage, scene).await;
        trace(&world, names)
    })
}

fn dying_at(boundary: Boundary, scene: Scene) -> (Trace, usize) {
    const MOST_LIVES: usize = 400;
    let store = Arc::new(MemoryCheckpointer::new());
    let world = world_of(scene);
    for life in 0..MOST_LIVES {
        let (dead, death) = mpsc::sync_channel(1);
        let killer = Arc::new(Killer {
            boundary,
            seen: AtomicUsize::new(0),
            dies_at: if life == 0 { 1 } else { 2 },
            dead: dead.clone(),
        });
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime");
        let (store, world_now) = (store.clone(), world.clone());
        let (done, ends) = mpsc::sync_channel(1);
        runtime.spawn(async move {
            let stage = Stage::on(store, world_now.clone(), Policy::default(), Some(killer)).await;
            let names = play(&stage, scene).await;
            let _ = done.try_send(names);
            let _ = dead.try_send(());
        });
        death.recv().expect("either death or the end");
        runtime.shutdown_background();
        if let Ok(names) = ends.try_recv() {
            return (trace(&world, names), life);
        }
    }
    panic!("the job did not end within {MOST_LIVES} lives");
}

fn survives(boundary: Boundary) {
    for scene in [Scene::Alone, Scene::WithPeople] {
        let expected = undisturbed(scene);
        let (found, lives) = dying_at(boundary, scene);
        assert!(lives > 10, "it died {lives} times only");
        assert_eq!(found, expected, "after {lives} deaths");
    }
}

#[test]
fn death_before_every_commit_changes_nothing() {
    survives(Boundary::BeforeCommit);
}

#[test]
fn death_after_every_commit_changes_nothing() {
    survives(Boundary::AfterCommit);
}

#[test]
fn death_between_an_effect_and_its_record_does_nothing_twice() {
    survives(Boundary::StepRemembering);
}

#[test]
fn death_after_the_record_of_an_effect_does_nothing_twice() {
    survives(Boundary::StepRemembered);
}
