//! Workers outlive their spawner: whoever comes next adopts them, reports what became of them, and leaves nothing behind.

use crate::stage::{
    Cleanup, Models, Stage, assert_succeeded, containers, docker, git, kind, options, repository,
    runtime, until, variable, wait_result, workspace,
};
use futures::StreamExt as _;
use protocol::{EventKind, LocalTransport, ResultStatus, Source, SpawnRequest, Transport, suite};
use spawner::Spawner;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

const HOME: &str = "ARTEL_TEST_ADOPTION_HOME";
const COMMIT: &str = "echo hello > hello.txt; git add hello.txt; git commit -qm Hello";

async fn transport(home: &Path) -> Arc<dyn Transport> {
    Arc::new(LocalTransport::open(home.join("bus")).await.unwrap())
}

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
    _folder: tempfile::TempDir,
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
        let mut request = suite::request("r1");
        request.project_id = "p".into();
        request.job_id = "job-1".into();
        request.task_id = "one".into();
        request.repository.source = Source::Path(bare.to_str().unwrap().into());
        request.repository.base_sha = base;
        request.repository.branch = "task/one".into();
        request.limits.memory_mb = 256;
        request.agent.adapter = "command".into();
        let script = format!(
            "echo run >> .git/runs; touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {rest}"
        );
        request.agent.command = ["sh", "-euc", &script].map(str::to_owned).to_vec();
        let bus = transport(&home).await;
        bus.publish_job(&request).await.unwrap();
        drop(bus);
        let orphan = Self {
            label: cleanup.0.clone().unwrap(),
            home,
            bare,
            request,
            _cleanup: cleanup,
            _folder: folder,
        };
        let mut spawner = orphan.spawner(disk);
        until(async || orphan.workspace().join("here").exists().then_some(())).await;
        spawner.kill().unwrap();
        spawner.wait().unwrap();
        // It outlives its spawner. The engine may say so a moment later than the worker itself.
        until(async || (orphan.running() == 1).then_some(())).await;
        orphan
    }

    fn spawner(&self, disk: &str) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "adoption::the_program_that_dies",
                "--ignored",
                "--nocapture",
            ])
            .env(HOME, &self.home)
            .env("ARTEL_TEST_DISK", disk)
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn workspace(&self) -> PathBuf {
        workspace(&self.home)
    }

    fn go(&self) {
        std::fs::write(self.workspace().join("go"), "").unwrap();
    }

    fn running(&self) -> usize {
        let filter = format!("label=artel.spawner={}", self.label);
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
        let (runtime, mut cleanup) = runtime(&orphan.home).await;
        // The orphan has one already.
        cleanup.0 = None;
        let models = Arc::new(Models::default());
        let options = options(&orphan.home, runtime, Arc::clone(&bus), models);
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(Spawner::new(options).unwrap().run(shutdown.clone()));
        Self {
            bus,
            shutdown,
            running,
        }
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
    let next = Next::start(&orphan, transport(&orphan.home).await).await;
    let mut events = next.bus.events("r1").await.unwrap();
    let adopted = async {
        while let Some(event) = events.next().await {
            if matches!(&event.kind, EventKind::Phase { name } if name == "adopted") {
                return true;
            }
        }
        false
    };
    assert!(adopted.await, "the worker was adopted");
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
    let script = format!("echo run >> .git/runs; rm -f here; {COMMIT}");
    second.agent.command = ["sh", "-euc", &script].map(str::to_owned).to_vec();
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
    let of = |label: &str, request: &str, deadline: i64| {
        [
            format!("artel.spawner={label}"),
            format!("artel.request={request}"),
            "artel.part=agent".to_owned(),
            format!("artel.deadline={deadline}"),
        ]
    };
    let other = format!("{label}-other");
    let over = made(&of(&label, "r1", i64::MAX));
    let waits = made(&of(&label, "r7", i64::MAX));
    let late = made(&of(&label, "r8", 1));
    let strangers = [made(&of(&other, "r1", 1)), made(&[])];
    let state = |id: &str| {
        docker(&["inspect", "-f", "{{.State.Status}}", id])
            .trim()
            .to_owned()
    };
    until(async || state(&over).is_empty().then_some(())).await;
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
