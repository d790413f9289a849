//! Workers outlive their spawner: whoever comes next adopts them, reports what became of them, and leaves nothing behind.

use crate::stage::{
    Another, Cleanup, Models, Stage, assert_succeeded, containers, docker, git, kind, options,
    repository, runtime, script, transport, until, variable, wait_result, workspace,
};
use futures::StreamExt as _;
use protocol::{EventKind, ResultStatus, Size, SpawnRequest, Transport};
use spawner::{Capacity, Options, Spawner};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

const HOME: &str = "ARTEL_TEST_ADOPTION_HOME";
const COMMIT: &str = "echo hello > hello.txt; git add hello.txt; git commit -qm Hello";

/// The program that dies: not a test of its own, but the other process of those below.
#[tokio::test]
#[ignore = "runs as the child process of the tests below"]
async fn the_program_that_dies() {
    let home = PathBuf::from(std::env::var_os(HOME).expect("started by a test below"));
    let bus = transport(&home).await;
    let (runtime, _cleanup) = runtime(&home).await;
    let spawner = Spawner::new(options(&home, runtime, bus, Arc::new(Models::default()))).unwrap();
    spawner.run(CancellationToken::new()).await.unwrap();
}

/// A worker whose spawner was killed.
struct Orphan {
    home: PathBuf,
    bare: PathBuf,
    request: SpawnRequest,
    label: String,
    // In this order: containers, then what they have mounted.
    _cleanup: Cleanup,
    folder: tempfile::TempDir,
}

impl Orphan {
    /// The script works until there is a file `go`; then `rest` is done.
    async fn new(rest: &str) -> Self {
        Self::on("polled", rest).await
    }

    /// The same, with workspaces as `ARTEL_TEST_DISK` says.
    async fn on(disk: &str, rest: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = repository(folder.path());
        let home = folder.path().join("home");
        let bare = folder.path().join("repository.git");
        let (_, cleanup) = runtime(&home).await;
        let work = format!(
            "echo run >> .git/runs; touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {rest}"
        );
        let mut request = script(folder.path(), &base, "r1", 1, &work);
        request.limits.memory_mb = 256;
        let bus = transport(&home).await;
        bus.publish_job(&request).await.unwrap();
        drop(bus);
        let orphan = Self {
            label: cleanup.0.clone().unwrap(),
            home,
            bare,
            request,
            _cleanup: cleanup,
            folder,
        };
        let mut spawner = orphan.spawner(disk);
        until(async || orphan.workspace().join("here").exists().then_some(())).await;
        spawner.kill();
        // It outlives its spawner. The engine may say so a moment later than the worker itself.
        until(async || (orphan.running() == 1).then_some(())).await;
        orphan
    }

    fn spawner(&self, disk: &str) -> Another {
        let env = [
            (HOME, self.home.as_os_str()),
            ("ARTEL_TEST_DISK", OsStr::new(disk)),
        ];
        Another::start("adoption::the_program_that_dies", env)
    }

    fn workspace(&self) -> PathBuf {
        workspace(&self.home)
    }

    fn go(&self) {
        std::fs::write(self.workspace().join("go"), "").unwrap();
    }

    fn running(&self) -> usize {
        let filter = format!("label=artel.home={}", self.label);
        let running = docker(&["ps", "-q", "--filter", &filter]);
        running.split_whitespace().count()
    }

    fn runs(&self) -> String {
        std::fs::read_to_string(self.workspace().join(".git/runs")).unwrap()
    }

    async fn gone(&self) {
        until(async || containers(&self.label).is_empty().then_some(())).await;
    }
}

/// The next spawner of the same home.
struct Next {
    bus: Arc<dyn Transport>,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), spawner::Error>>,
}

impl Next {
    async fn start(orphan: &Orphan, bus: Arc<dyn Transport>) -> Self {
        Self::tuned(orphan, bus, |_| {}).await
    }

    async fn tuned(
        orphan: &Orphan,
        bus: Arc<dyn Transport>,
        tune: impl FnOnce(&mut Options),
    ) -> Self {
        let (runtime, mut cleanup) = runtime(&orphan.home).await;
        // The orphan has one already.
        cleanup.0 = None;
        let models = Arc::new(Models::default());
        let mut options = options(&orphan.home, runtime, Arc::clone(&bus), models);
        tune(&mut options);
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(Spawner::new(options).unwrap().run(shutdown.clone()));
        Self {
            bus,
            shutdown,
            running,
        }
    }

    /// Waits until it has adopted the worker of this request.
    async fn adopts(&self, request: &str) {
        let mut events = self.bus.events(request).await.unwrap();
        let adopted = async {
            while let Some(event) = events.next().await {
                if matches!(&event.kind, EventKind::Phase { name } if name == "adopted") {
                    return true;
                }
            }
            false
        };
        assert!(adopted.await, "the worker was adopted");
    }

    async fn stop(self) {
        self.shutdown.cancel();
        self.running.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn a_spawner_that_was_killed_leaves_its_worker_to_the_next_one_which_adopts_it() {
    let orphan = Orphan::new(COMMIT).await;
    let before = containers(&orphan.label);
    let labels = docker(&["inspect", "-f", "{{json .Config.Labels}}", &before[0]]);
    let labels: serde_json::Value = serde_json::from_str(&labels).unwrap();
    for (name, value) in [
        ("home", orphan.label.as_str()),
        ("project", "p"),
        ("job", "job-1"),
        ("task", "one"),
        ("request", "r1"),
        ("attempt", "1"),
        ("part", "agent"),
        ("memory_mb", "256"),
    ] {
        assert_eq!(labels[format!("artel.{name}")], value, "{labels:#}");
    }
    // Should nobody come: a minute after its wall clock it is over by itself.
    let env = docker(&["inspect", "-f", "{{json .Config.Env}}", &before[0]]);
    let most_s = orphan.request.limits.wall_s + 60;
    let bound = format!("\"{}={most_s}\"", sandbox::launcher::MOST_S);
    assert!(env.contains(&bound), "{env}");
    // Of the process that died. The next one has another name, and the same home.
    let spawner = labels["artel.spawner"].as_str().unwrap();
    let ours = format!("spawner-here-{}-", std::process::id());
    assert!(spawner.starts_with("spawner-here-") && !spawner.starts_with(&ours));
    let next = Next::start(&orphan, transport(&orphan.home).await).await;
    next.adopts("r1").await;
    assert_eq!(containers(&orphan.label), before, "it is the same one");
    // It goes on, and tells its result to the new broker with the key that it has from the old one.
    orphan.go();
    let result = wait_result(&next.bus, "r1").await;
    assert_succeeded(&result);
    assert_eq!(
        git(&orphan.bare, &["show", "task/one:hello.txt"]),
        "hello\n"
    );
    assert_eq!(orphan.runs(), "run\n", "it worked once");
    orphan.gone().await;
    next.stop().await;
}

#[tokio::test]
async fn a_worker_that_is_not_adopted_yet_has_its_place_and_its_job_needs_no_other() {
    let orphan = Orphan::new(COMMIT).await;
    let bus = transport(&orphan.home).await;
    // As if its job could not be had yet, because the hold of the one that died has not run out.
    let held = bus.next_job(Duration::ZERO).await.unwrap().unwrap();
    assert_eq!(held.request.request_id, "r1");
    let mut other = script(
        orphan.folder.path(),
        &orphan.request.repository.base_sha,
        "other",
        1,
        COMMIT,
    );
    other.task_id = "two".into();
    other.repository.branch = "task/two".into();
    other.limits.memory_mb = 256;
    bus.publish_job(&other).await.unwrap();
    // One that is answered however little place there is, after it was looked for jobs.
    let mut huge = other.clone();
    huge.request_id = "huge".into();
    huge.task_id = "three".into();
    huge.limits.memory_mb = 10_000;
    bus.publish_job(&huge).await.unwrap();
    let next = Next::tuned(&orphan, bus, |options| {
        // Place for one of them.
        options.capacity = Capacity {
            grace: Duration::from_millis(50),
            ..Capacity::of(Size::new(8.0, 500))
        };
    })
    .await;
    let refused = wait_result(&next.bus, "huge").await;
    assert_eq!(kind(&refused), spawner::kind::TOO_LARGE);
    let begun = orphan.home.join("workspaces/p/job-1/two~");
    assert!(!begun.exists(), "there is no place for it");
    next.bus.release_job(&held.receipt).await.unwrap();
    next.adopts("r1").await;
    assert!(!begun.exists());
    orphan.go();
    let first = wait_result(&next.bus, "r1").await;
    assert_succeeded(&first);
    let second = wait_result(&next.bus, "other").await;
    assert_succeeded(&second);
    assert!(first.finished_at <= second.started_at);
    assert_eq!(orphan.runs(), "run\n", "it worked once");
    orphan.gone().await;
    next.stop().await;
}

#[tokio::test]
async fn a_killed_spawner_leaves_its_workers_disk_to_the_next_one_which_takes_it_away_at_the_end() {
    let orphan = Orphan::on("loop", COMMIT).await;
    let image = orphan.home.join("workspaces/p/job-1/one~/disk.img");
    let devices = || {
        let all = Command::new("losetup").arg("--list").output().unwrap();
        let all = String::from_utf8_lossy(&all.stdout).into_owned();
        let mine = all
            .lines()
            .filter(|line| line.contains(image.to_str().unwrap()));
        mine.count()
    };
    let mounts = || {
        let all = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let home = orphan.home.display().to_string();
        all.lines().filter(|line| line.contains(&home)).count()
    };
    assert_eq!((mounts(), devices()), (1, 1));
    // As after a restart of what had it mounted, but for the worker, which has it still.
    let unmounted = Command::new("umount")
        .arg(orphan.workspace().parent().unwrap())
        .status();
    assert!(unmounted.unwrap().success());
    assert_eq!((mounts(), devices()), (0, 1));
    let next = Next::start(&orphan, transport(&orphan.home).await).await;
    until(async || orphan.workspace().join("here").exists().then_some(())).await;
    assert_eq!(devices(), 1, "two of one file would ruin it");
    orphan.go();
    assert_succeeded(&wait_result(&next.bus, "r1").await);
    assert_eq!(
        git(&orphan.bare, &["show", "task/one:hello.txt"]),
        "hello\n"
    );
    orphan.gone().await;
    until(async || ((mounts(), devices()) == (0, 0)).then_some(())).await;
    next.stop().await;
}

#[tokio::test]
async fn a_worker_that_died_of_its_memory_while_nobody_watched_is_reported_so() {
    // Something in it dies for want of memory, and then the agent with it.
    let bomb = "python3 -c 'x = []
while True: x.append(bytearray(1 << 20))' || true; kill -9 $PPID; sleep 60";
    let orphan = Orphan::new(bomb).await;
    orphan.go();
    until(async || (orphan.running() == 0).then_some(())).await;
    let next = Next::start(&orphan, transport(&orphan.home).await).await;
    let result = wait_result(&next.bus, "r1").await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_MEMORY, "{result:#?}");
    let evidence = &result.failure.as_ref().unwrap().evidence;
    assert!(
        evidence.contains("exit code 137, out of memory: yes"),
        "{evidence}"
    );
    orphan.gone().await;
    next.stop().await;
}

#[tokio::test]
async fn an_exit_that_nobody_saw_is_told_with_its_code_and_its_last_words() {
    let orphan = Orphan::new("echo last words; kill -9 $PPID; sleep 60").await;
    orphan.go();
    until(async || (orphan.running() == 0).then_some(())).await;
    let next = Next::start(&orphan, transport(&orphan.home).await).await;
    let result = wait_result(&next.bus, "r1").await;
    assert_eq!(result.status, ResultStatus::Failed);
    let failure = result.failure.unwrap();
    assert_eq!(failure.kind, spawner::kind::AGENT_FAILED);
    for words in ["last words", "exit code 137, out of memory: no"] {
        assert!(failure.evidence.contains(words), "{}", failure.evidence);
    }
    assert_eq!(orphan.runs(), "run\n", "the workspace is kept as it was");
    orphan.gone().await;
    next.stop().await;
}

#[tokio::test]
async fn a_worker_whose_job_is_not_offered_again_is_gone_before_the_next_attempt_begins() {
    let orphan = Orphan::new(COMMIT).await;
    // A bus that knows nothing of the first request.
    let bus = transport(&orphan.home.join("other")).await;
    let mut second = orphan.request.clone();
    second.request_id = "r2".into();
    second.attempt = 2;
    second.fencing_token += 1;
    let work = format!("echo run >> .git/runs; rm -f here; {COMMIT}");
    second.agent.command = ["sh", "-euc", &work].map(str::to_owned).to_vec();
    bus.publish_job(&second).await.unwrap();
    let next = Next::start(&orphan, bus).await;
    assert_succeeded(&wait_result(&next.bus, "r2").await);
    assert_eq!(orphan.runs(), "run\nrun\n", "in the same workspace");
    orphan.gone().await;
    next.stop().await;
}

#[tokio::test]
async fn what_is_left_of_jobs_that_are_over_is_cleared_away_and_nothing_else_is_touched() {
    let stage = Stage::new([]).await;
    let label = stage.cleanup.0.clone().unwrap();
    assert_succeeded(&stage.run_script(COMMIT).await);
    until(async || containers(&label).is_empty().then_some(())).await;
    let image = variable("ARTEL_TEST_IMAGE");
    let made = |labels: &[String]| {
        let mut args = vec!["run", "-d", "--network", "none"];
        for label in labels {
            args.extend(["--label", label]);
        }
        args.extend([image.as_str(), "sleep", "600"]);
        docker(&args).trim().to_owned()
    };
    let of = |home: &str, request: &str, deadline: i64| {
        [
            "artel.spawner=spawner-here-1".to_owned(),
            format!("artel.home={home}"),
            format!("artel.request={request}"),
            "artel.part=agent".to_owned(),
            format!("artel.deadline={deadline}"),
        ]
    };
    let other = format!("{label}-other");
    let over = made(&of(&label, "r1", i64::MAX));
    // A former version had the home in another place.
    let mut former = of(&label, "r1", i64::MAX).to_vec();
    former.remove(1);
    former[0] = format!("artel.spawner={label}");
    let former = made(&former);
    let waits = made(&of(&label, "r7", i64::MAX));
    let late = made(&of(&label, "r8", 1));
    // Whoever has a name that looks like our home is not of our home.
    let mut named = of(&other, "r1", 1);
    named[0] = format!("artel.spawner={label}");
    let strangers = [made(&of(&other, "r1", 1)), made(&named), made(&[])];
    let state = |id: &str| {
        docker(&["inspect", "-f", "{{.State.Status}}", id])
            .trim()
            .to_owned()
    };
    for id in [&over, &former] {
        until(async || state(id).is_empty().then_some(())).await;
    }
    until(async || (state(&late) != "running").then_some(())).await;
    assert_eq!(state(&waits), "running", "its job may be offered again");
    for id in &strangers {
        assert_eq!(state(id), "running", "it is not ours");
        docker(&["rm", "-f", id]);
    }
}

#[tokio::test]
async fn a_spawner_that_is_started_again_goes_on_with_its_workers() {
    let stage = Stage::new([]).await;
    let script = format!(
        "echo run >> .git/runs; touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {COMMIT}"
    );
    stage.submit(&stage.script("r1", 1, &script)).await;
    let here = stage.workspace().join("here");
    until(async || here.exists().then_some(())).await;
    let stage = stage.restart().await;
    std::fs::write(stage.workspace().join("go"), "").unwrap();
    assert_succeeded(&stage.result("r1").await);
    let runs = std::fs::read_to_string(stage.workspace().join(".git/runs")).unwrap();
    assert_eq!(runs, "run\n");
}
