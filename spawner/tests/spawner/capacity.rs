//! Which spawner takes which job, and when: by what the job may use, and by whose turn it is.

use crate::stage::{
    Models, SOON, assert_succeeded, kind, options, repository, runtime, until, wait_result,
};
use futures::StreamExt as _;
use protocol::{EventKind, LocalTransport, Size, Source, SpawnRequest, Transport, local, suite};
use spawner::{Capacity, Keep, Options, Spawner};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const COMMIT: &str = "echo hello > hello.txt; git add hello.txt; git commit -qm Hello";

/// Spawners on one bus, each with a home of its own.
struct Fleet {
    bus: Arc<dyn Transport>,
    base: String,
    shutdown: CancellationToken,
    running: Vec<tokio::task::JoinHandle<Result<(), spawner::Error>>>,
    folder: tempfile::TempDir,
}

impl Fleet {
    async fn new() -> Self {
        Self::tuned(|_| {}).await
    }

    /// With a bus that is tuned.
    async fn tuned(tune: impl FnOnce(&mut local::Options)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = repository(folder.path());
        let mut options = local::Options::new(folder.path().join("bus"));
        tune(&mut options);
        Self {
            bus: Arc::new(LocalTransport::with(options).await.unwrap()),
            base,
            shutdown: CancellationToken::new(),
            running: Vec::new(),
            folder,
        }
    }

    async fn add(&mut self, name: &str, tune: impl FnOnce(&mut Options)) {
        self.add_at(name, name, tune).await;
    }

    /// One in the home of another one.
    async fn add_at(&mut self, home: &str, name: &str, tune: impl FnOnce(&mut Options)) {
        let home = self.folder.path().join(home);
        let (runtime, _) = runtime(&home).await;
        let models = Arc::new(Models::default());
        let mut options = options(&home, runtime, Arc::clone(&self.bus), models);
        name.clone_into(&mut options.name);
        tune(&mut options);
        let spawner = Spawner::new(options).unwrap();
        self.running
            .push(tokio::spawn(spawner.run(self.shutdown.clone())));
    }

    /// A task of its own, which runs until [`Fleet::go`] and commits.
    fn task(&self, project: &str, id: &str, size: Size) -> SpawnRequest {
        let mut request = suite::request(id);
        request.project_id = project.into();
        request.task_id = id.into();
        request.repository.source = Source::Path(
            self.folder
                .path()
                .join("repository.git")
                .display()
                .to_string(),
        );
        request.repository.base_sha.clone_from(&self.base);
        request.limits.memory_mb = size.memory_mb;
        #[allow(clippy::cast_precision_loss)] // small numbers
        let cores = size.cpu_milli as f64 / 1000.0;
        request.limits.cpu = cores;
        request.limits.wall_s = 120;
        request.agent.adapter = "command".into();
        let script =
            format!("touch here; while [ ! -e go ]; do sleep 0.02; done; rm here go; {COMMIT}");
        request.agent.command = ["sh", "-euc", &script].map(str::to_owned).to_vec();
        request
    }

    async fn submit(&self, request: &SpawnRequest) {
        self.bus.publish_job(request).await.unwrap();
    }

    fn workspace(&self, spawner: &str, request: &SpawnRequest) -> PathBuf {
        let path = Path::new("workspaces")
            .join(&request.project_id)
            .join(&request.job_id)
            .join(&request.task_id);
        self.folder.path().join(spawner).join(path)
    }

    /// Waits until the worker of this task is at work at this spawner.
    async fn works(&self, spawner: &str, request: &SpawnRequest) {
        let here = self.workspace(spawner, request).join("here");
        until(async || here.exists().then_some(())).await;
    }

    async fn go(&self, spawner: &str, request: &SpawnRequest) {
        std::fs::write(self.workspace(spawner, request).join("go"), "").unwrap();
        assert_succeeded(&wait_result(&self.bus, &request.request_id).await);
    }

    /// Who has begun a task that is over.
    async fn begun_by(&self, request: &SpawnRequest) -> Vec<String> {
        let events = self.bus.events(&request.request_id).await.unwrap();
        let events: Vec<_> = tokio::time::timeout(SOON, events.collect()).await.unwrap();
        events
            .into_iter()
            .filter_map(|event| match event.kind {
                EventKind::Started { spawner } => Some(spawner),
                _ => None,
            })
            .collect()
    }

    async fn stop(mut self) {
        self.stop_all().await;
    }

    /// Stops those that run. Others can be added.
    async fn stop_all(&mut self) {
        std::mem::take(&mut self.shutdown).cancel();
        for running in self.running.drain(..) {
            running.await.unwrap().unwrap();
        }
    }
}

/// A spawner of this size that gives up soon what fits nobody.
fn impatient(size: Size) -> Capacity {
    Capacity {
        grace: Duration::from_millis(50),
        ..Capacity::of(size)
    }
}

#[tokio::test]
async fn two_spawners_each_take_what_they_can_carry() {
    let mut fleet = Fleet::new().await;
    fleet
        .add("small", |o| o.capacity = Capacity::of(Size::new(1.0, 600)))
        .await;
    fleet
        .add("large", |o| o.capacity = Capacity::of(Size::new(4.0, 2000)))
        .await;
    let first = fleet.task("p", "first", Size::new(3.0, 700));
    let second = fleet.task("p", "second", Size::new(0.5, 1500));
    let third = fleet.task("p", "third", Size::new(1.0, 600));
    fleet.submit(&first).await;
    fleet.works("large", &first).await;
    // It has too much memory for the one, and too much beside what runs for the other.
    fleet.submit(&second).await;
    fleet.submit(&third).await;
    let at = until(async || {
        let mut places = ["small", "large"].into_iter();
        places.rfind(|name| fleet.workspace(name, &third).join("here").exists())
    })
    .await;
    for name in ["small", "large"] {
        assert!(!fleet.workspace(name, &second).exists(), "{name}");
    }
    // The third one may be beside the first, or alone on the small one.
    fleet.go(at, &third).await;
    fleet.go("large", &first).await;
    fleet.works("large", &second).await;
    fleet.go("large", &second).await;
    assert_eq!(
        fleet.begun_by(&second).await,
        ["large"],
        "and nobody before"
    );
    assert_eq!(fleet.begun_by(&first).await, ["large"]);
    fleet.stop().await;
}

#[tokio::test]
async fn a_task_that_fits_no_spawner_is_refused_and_one_that_fits_another_one_waits_for_it() {
    let mut fleet = Fleet::new().await;
    let beat = suite::beat("another", Size::new(16.0, 8000));
    fleet.bus.heartbeat(&beat).await.unwrap();
    let here = Size::new(2.0, 2000);
    // Full as well: a task that cannot be carried does not wait for place.
    fleet
        .add("here", |o| {
            o.max_workers = 1;
            o.capacity = impatient(here);
        })
        .await;
    let busy = fleet.task("p", "busy", Size::new(2.0, 500));
    fleet.submit(&busy).await;
    fleet.works("here", &busy).await;
    let waits = fleet.task("p", "waits", Size::new(16.0, 500));
    let never = fleet.task("p", "never", Size::new(0.5, 9000));
    fleet.submit(&waits).await;
    fleet.submit(&never).await;
    let result = wait_result(&fleet.bus, "never").await;
    assert_eq!(kind(&result), spawner::kind::TOO_LARGE);
    let message = &result.failure.as_ref().unwrap().message;
    for words in ["9000 MiB", "2000 MiB", "an admin", "SPAWNER_MEMORY_MB"] {
        assert!(message.contains(words), "{message}");
    }
    assert_eq!(fleet.bus.result("waits").await.unwrap(), None);
    let alive = fleet.bus.spawners().await.unwrap();
    let told = alive.iter().find(|beat| beat.spawner == "here").unwrap();
    assert_eq!((told.capacity, told.size), (1, Some(here)));
    fleet.go("here", &busy).await;
    fleet.stop().await;
}

#[tokio::test]
async fn a_task_waits_for_the_only_spawner_that_is_large_enough_until_that_has_left_for_good() {
    // A heartbeat counts for a moment only: whoever is gone is missed at once.
    let mut fleet = Fleet::tuned(|o| o.lives = Duration::from_millis(50)).await;
    let huge = Size::new(16.0, 8000);
    fleet
        .bus
        .heartbeat(&suite::beat("huge", huge))
        .await
        .unwrap();
    until(async || fleet.bus.spawners().await.unwrap().is_empty().then_some(())).await;
    fleet
        .add("here", |o| {
            o.capacity = impatient(Size::new(2.0, 2000));
        })
        .await;
    let waits = fleet.task("p", "waits", Size::new(16.0, 500));
    let never = fleet.task("p", "never", Size::new(0.5, 9000));
    fleet.submit(&waits).await;
    fleet.submit(&never).await;
    // That one fits nobody who may come back, and came later.
    let result = wait_result(&fleet.bus, "never").await;
    assert_eq!(kind(&result), spawner::kind::TOO_LARGE);
    assert_eq!(fleet.bus.result("waits").await.unwrap(), None);
    fleet.bus.farewell("huge").await.unwrap();
    let result = wait_result(&fleet.bus, "waits").await;
    assert_eq!(kind(&result), spawner::kind::TOO_LARGE);
    let message = &result.failure.as_ref().unwrap().message;
    assert!(message.contains("16 cores"), "{message}");
    fleet.stop().await;
}

#[tokio::test]
async fn a_spawner_that_is_drained_is_not_waited_for_and_one_that_is_stopped_may_come_back() {
    let mut fleet = Fleet::new().await;
    for name in ["drained", "stopped"] {
        fleet.add(name, |_| {}).await;
    }
    let names = async || -> Vec<(String, bool)> {
        let seen = fleet.bus.seen_spawners().await.unwrap().into_iter();
        seen.map(|seen| (seen.last.spawner, seen.last.draining))
            .collect()
    };
    let (drained, stopped) = ("drained".to_owned(), "stopped".to_owned());
    until(async || (names().await.len() == 2).then_some(())).await;
    let task = fleet.task("p", "task", Size::new(1.0, 500));
    fleet.submit(&task).await;
    let at = until(async || {
        let mut places = ["drained", "stopped"].into_iter();
        places.find(|name| fleet.workspace(name, &task).join("here").exists())
    })
    .await;
    // Whoever works says so while the task goes on, and farewell when it is done.
    fleet.bus.drain(Some(at)).await.unwrap();
    until(async || names().await.contains(&(at.to_owned(), true)).then_some(())).await;
    fleet.go(at, &task).await;
    let left = until(async || names().await.try_into().ok()).await;
    let [(left, drains)]: [(String, bool); 1] = left;
    assert!(!drains);
    assert_eq!(left, if at == drained { stopped } else { drained });
    let bus = Arc::clone(&fleet.bus);
    fleet.stop().await;
    let seen = bus.seen_spawners().await.unwrap();
    assert_eq!(seen.len(), 1, "who is stopped may be started again");
    assert_eq!(seen[0].last.spawner, left);
}

#[tokio::test]
async fn nobody_waits_for_the_old_size_of_a_spawner_that_came_back_smaller() {
    let mut fleet = Fleet::new().await;
    let (large, small) = (Size::new(16.0, 8000), Size::new(2.0, 2000));
    let names = async |fleet: &Fleet| -> Vec<String> {
        let seen = fleet.bus.seen_spawners().await.unwrap().into_iter();
        seen.map(|seen| seen.last.spawner).collect()
    };
    // Every process has a name of its own. The one elsewhere may come back as it was.
    for (home, name) in [("here", "here-1"), ("elsewhere", "elsewhere-1")] {
        let size = if home == "here" {
            large
        } else {
            Size::new(4.0, 2000)
        };
        fleet
            .add_at(home, name, |o| o.capacity = Capacity::of(size))
            .await;
    }
    until(async || (names(&fleet).await.len() == 2).then_some(())).await;
    fleet.stop_all().await;
    assert_eq!(names(&fleet).await, ["elsewhere-1", "here-1"]);
    fleet
        .add_at("here", "here-2", |o| o.capacity = impatient(small))
        .await;
    let waits = fleet.task("p", "waits", Size::new(4.0, 500));
    let never = fleet.task("p", "never", large);
    fleet.submit(&waits).await;
    fleet.submit(&never).await;
    let result = wait_result(&fleet.bus, "never").await;
    assert_eq!(kind(&result), spawner::kind::TOO_LARGE);
    assert_eq!(names(&fleet).await, ["elsewhere-1", "here-2"]);
    assert_eq!(fleet.bus.result("waits").await.unwrap(), None);
    // A neighbour of the same home that lives is not replaced.
    fleet
        .add_at("here", "here-3", |o| o.capacity = impatient(small))
        .await;
    let last = fleet.task("p", "last", large);
    until(async || (names(&fleet).await.len() == 3).then_some(())).await;
    fleet.submit(&last).await;
    assert_eq!(
        kind(&wait_result(&fleet.bus, "last").await),
        spawner::kind::TOO_LARGE
    );
    assert_eq!(names(&fleet).await, ["elsewhere-1", "here-2", "here-3"]);
    fleet.stop().await;
}

#[tokio::test]
async fn a_project_with_many_waiting_tasks_leaves_the_next_place_to_another_project() {
    let mut fleet = Fleet::new().await;
    fleet.add("one", |o| o.max_workers = 2).await;
    let size = Size::new(1.0, 500);
    let many: Vec<_> = (0..6)
        .map(|n| fleet.task("many", &format!("many-{n}"), size))
        .collect();
    for request in &many {
        fleet.submit(request).await;
    }
    for request in &many[..2] {
        fleet.works("one", request).await;
    }
    let other = fleet.task("few", "other", size);
    fleet.submit(&other).await;
    fleet.go("one", &many[0]).await;
    // The place that became free is not the third one's, which has waited for longer.
    fleet.works("one", &other).await;
    assert!(!fleet.workspace("one", &many[2]).exists());
    fleet.go("one", &other).await;
    fleet.works("one", &many[2]).await;
    fleet.stop().await;
}

#[tokio::test]
async fn a_workspace_goes_when_its_work_is_taken_over_and_not_while_somebody_works_in_it() {
    let mut fleet = Fleet::new().await;
    fleet
        .add("one", |o| {
            o.keep = Keep {
                every: Duration::from_millis(10),
                delivered: Duration::ZERO,
                ..Keep::default()
            };
        })
        .await;
    let size = Size::new(1.0, 500);
    let (works, done, fails) = (
        fleet.task("p", "works", size),
        fleet.task("p", "done", size),
        fleet.task("p", "fails", size),
    );
    fleet.submit(&works).await;
    fleet.works("one", &works).await;
    let mut fails = fails;
    fails.agent.command = ["sh", "-c", "echo work > work; exit 1"]
        .map(str::to_owned)
        .to_vec();
    fleet.submit(&fails).await;
    wait_result(&fleet.bus, "fails").await;
    fleet.submit(&done).await;
    fleet.works("one", &done).await;
    fleet.go("one", &done).await;
    let gone = async |request: &SpawnRequest| {
        let workspace = fleet.workspace("one", request);
        until(async || (!workspace.exists()).then_some(())).await;
    };
    gone(&done).await;
    // The one is at work, and the other one holds what nobody has taken over.
    assert!(fleet.workspace("one", &fails).join("work").exists());
    fleet.go("one", &works).await;
    gone(&works).await;
    fleet.stop().await;
}
