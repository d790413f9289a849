//! Containers that are made before their job: what takes them, what does not, and that nothing else differs.

use crate::stage::{
    Another, Cleanup, Models, SOON, Stage, assert_succeeded, containers, docker, git, options,
    phases, repository, script, spawner_name, transport, until, variable, wait_result,
    worker_image, workspace,
};
use protocol::{Limits, SpawnRequest, suite};
use spawner::runtime::{Containers, DockerOptions, Warm};
use spawner::{Disk, Spawner};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub const HOME: &str = "ARTEL_TEST_WARM_HOME";
/// The disk of every job here, in MiB, when workspaces are disks of their own.
pub const DISK_MB: u64 = 32;
/// Which container it is, in the result.
const WHICH: &str = "cat /etc/hostname > which; git add which; git commit -qm Which";

/// What every job here may use.
fn limits() -> Limits {
    Limits {
        disk_mb: DISK_MB,
        ..suite::request("r").limits
    }
}

pub async fn connect(home: &Path, image: &str, count: usize) -> (Arc<Containers>, Cleanup) {
    std::fs::create_dir_all(home).unwrap();
    let containers = Containers::connect(DockerOptions {
        host: Some(variable("ARTEL_TEST_DOCKER_HOST")),
        runtime: "runc".to_owned(),
        image: image.to_owned(),
        spawner: spawner_name(),
        home: home.to_owned(),
        warm: Warm {
            count,
            limits: (&limits()).into(),
        },
    })
    .await
    .unwrap();
    let cleanup = Cleanup(Some(containers.label().to_owned()));
    (Arc::new(containers), cleanup)
}

/// A stage with one container that waits.
pub struct Ready {
    pub stage: Stage,
    pub containers: Arc<Containers>,
}

impl Ready {
    async fn new() -> Self {
        Self::with(Disk::Polled, &worker_image()).await
    }

    pub async fn with(disk: Disk, image: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (containers, cleanup) = connect(&folder.path().join("home"), image, 1).await;
        let tune = |options: &mut spawner::Options| options.disk = disk;
        let stage = Stage::tuned(folder, containers.clone(), cleanup, [], tune).await;
        Self { stage, containers }
    }

    /// The container that waits, as soon as one does that is not among these.
    pub async fn waiting(&self, but: &[&str]) -> String {
        until(async || {
            let all = waiting(self.containers.label());
            let new = all.into_iter().find(|id| !but.contains(&id.as_str()))?;
            (self.containers.waiting() == 1).then_some(new)
        })
        .await
    }

    /// Runs a script as a task of its own, which tells in the file `which` where it ran.
    pub async fn run(&self, task: &str, script: &str) -> SpawnRequest {
        let request = self.request(task, script);
        assert_succeeded(&self.stage.run(&request).await);
        request
    }

    pub fn request(&self, task: &str, script: &str) -> SpawnRequest {
        let mut request = self.stage.script(task, 1, &format!("{script}\n{WHICH}"));
        request.limits = Limits {
            wall_s: request.limits.wall_s,
            ..limits()
        };
        request.task_id = task.into();
        request.repository.branch = format!("task/{task}");
        request
    }

    fn show(&self, task: &str, path: &str) -> String {
        let file = format!("task/{task}:{path}");
        git(
            &self.stage.folder.path().join("repository.git"),
            &["show", &file],
        )
    }

    /// Whether a task ran in this container.
    pub fn ran_in(&self, task: &str, container: &str) -> bool {
        container.starts_with(self.show(task, "which").trim())
    }
}

/// Ids of the containers that were made to wait, and of those that have waited.
pub fn waiting(label: &str) -> Vec<String> {
    let filter = format!("label=artel.home={label}");
    let part = "label=artel.part=pool";
    let all = docker(&[
        "ps",
        "-q",
        "--no-trunc",
        "--filter",
        &filter,
        "--filter",
        part,
    ]);
    all.split_whitespace().map(str::to_owned).collect()
}

pub fn slots(home: &Path) -> usize {
    std::fs::read_dir(home.join("pool")).map_or(0, Iterator::count)
}

#[tokio::test]
async fn a_job_takes_the_container_that_waits_and_finds_what_it_would_find_in_any_other() {
    finds_what_it_would_find_in_any_other(Ready::new().await).await;
}

/// In the container that waits, and in the one that the next job gets.
pub async fn finds_what_it_would_find_in_any_other(ready: Ready) {
    let first = ready.waiting(&[]).await;
    // Names of the environment, what is mounted where, who it is, the first process, and what there is of the broker.
    let look = "{ env | cut -d= -f1 | sort; cut -d' ' -f5,6 /proc/self/mountinfo | sort; id -u; id -g; pwd; ls -A; ls -ld . | tr -s ' ' | cut -d' ' -f1,3,4
        tr '\\0' ' ' < /proc/1/cmdline; ls -ld /run/artel/broker /run/artel/broker/socket | tr -s ' ' | cut -d' ' -f1,3,4,9
        curl -s -o /dev/null -w '%{http_code}' -H \"Authorization: Bearer $ARTEL_BROKER_KEY\" $ARTEL_BROKER_URL/v1/models; } > found
        git add found";
    let warm = ready.run("warm", look).await;
    assert!(ready.ran_in("warm", &first));
    let second = ready.waiting(&[&first]).await;
    // A cold one beside it.
    let mut cold = ready.request("cold", look);
    cold.limits.memory_mb += 1;
    assert_succeeded(&ready.stage.run(&cold).await);
    assert!(!ready.ran_in("cold", &second), "its limits differ");
    let found = ready.show("warm", "found");
    assert_eq!(found, ready.show("cold", "found"));
    assert!(
        found.contains("ARTEL_BROKER_KEY") && found.ends_with("200"),
        "{found}"
    );
    let (one, other) = (
        ready.stage.events(&warm.request_id).await,
        ready.stage.events(&cold.request_id).await,
    );
    assert_eq!(phases(&one), phases(&other));
    // It served one job and is gone; the one that waits is still the same.
    until(async || (containers(ready.containers.label()) == [second.clone()]).then_some(())).await;
    let home = ready.stage.folder.path().join("home");
    assert_eq!(slots(&home), 1);
    let label = ready.containers.label().to_owned();
    let folder = ready.stage.shut_down().await;
    assert!(
        containers(&label).is_empty(),
        "nobody waits for what has ended"
    );
    assert_eq!(slots(&home), 0);
    drop(folder);
}

#[tokio::test]
async fn nothing_of_one_job_is_to_be_seen_in_the_next() {
    let ready = Ready::new().await;
    let mut known: Vec<String> = Vec::new();
    for task in ["one", "two"] {
        let but: Vec<&str> = known.iter().map(String::as_str).collect();
        let container = ready.waiting(&but).await;
        let script = "for place in /workspace/.git /tmp $HOME; do ls -A $place; done > /tmp/there; if grep trace /tmp/there; then exit 1; fi
            for place in /workspace/.git /tmp $HOME; do touch $place/trace; done
            env > env; git add env";
        ready.run(task, script).await;
        assert!(ready.ran_in(task, &container));
        known.push(container);
    }
    let key = |task| {
        let environment = ready.show(task, "env");
        let line = environment
            .lines()
            .find_map(|line| line.strip_prefix("ARTEL_BROKER_KEY="));
        line.unwrap().to_owned()
    };
    assert_ne!(key("one"), key("two"));
    assert!(!ready.show("two", "env").contains(&key("one")));
    assert!(ready.show("two", "env").contains("ARTEL_TASK_ID=two"));
}

#[tokio::test]
async fn a_job_of_a_later_image_gets_a_container_of_its_own_and_so_does_the_pool() {
    let name = format!("artel-test-moved:{}", std::process::id());
    docker(&["tag", &worker_image(), &name]);
    let ready = Ready::with(Disk::Polled, &name).await;
    let first = ready.waiting(&[]).await;
    let made = docker(&["create", &worker_image(), "true"]);
    docker(&["commit", "--change", "ENV MOVED=yes", made.trim(), &name]);
    docker(&["rm", made.trim()]);
    ready.run("one", "test $MOVED = yes").await;
    assert!(!ready.ran_in("one", &first));
    let second = ready.waiting(&[&first]).await;
    ready.run("two", "test $MOVED = yes").await;
    assert!(ready.ran_in("two", &second));
    ready.stage.shut_down().await;
    docker(&["rmi", "-f", &name]);
}

#[tokio::test]
async fn a_later_attempt_finds_the_work_of_the_first_one_which_had_a_container_that_waited() {
    let ready = Ready::new().await;
    let first = ready.waiting(&[]).await;
    let script = "echo draft > draft; exit 1";
    let failed = ready.stage.run(&ready.stage.script("r1", 1, script)).await;
    assert!(failed.failure.is_some(), "{failed:#?}");
    until(async || (!containers(ready.containers.label()).contains(&first)).then_some(())).await;
    let script = "git add draft; git commit -qm Draft";
    assert_succeeded(&ready.stage.run(&ready.stage.script("r2", 2, script)).await);
    assert_eq!(ready.stage.show("draft"), "draft\n");
}

#[tokio::test]
async fn a_container_that_died_while_it_waited_is_replaced_and_the_job_is_done() {
    let ready = Ready::new().await;
    let first = ready.waiting(&[]).await;
    docker(&["kill", &first]);
    ready.run("one", "").await;
    assert!(!ready.ran_in("one", &first));
    let second = ready.waiting(&[&first]).await;
    ready.run("two", "").await;
    assert!(ready.ran_in("two", &second));
    until(async || (!containers(ready.containers.label()).contains(&first)).then_some(())).await;
}

#[tokio::test]
async fn a_container_that_does_not_take_its_job_is_removed_and_the_job_is_done_in_another() {
    let ready = Ready::new().await;
    let first = ready.waiting(&[]).await;
    // It is there, and does nothing.
    docker(&["kill", "--signal", "STOP", &first]);
    ready.run("one", "").await;
    assert!(!ready.ran_in("one", &first));
    until(async || (!containers(ready.containers.label()).contains(&first)).then_some(())).await;
}

/// The program that dies: not a test of its own, but the other process of those below. It takes the job that it finds in the
/// home, if there is one.
#[tokio::test]
#[ignore = "runs as the child process of the tests below"]
async fn the_program_that_dies() {
    let home = PathBuf::from(std::env::var_os(HOME).expect("started by a test below"));
    let (containers, cleanup) = connect(&home, &worker_image(), 1).await;
    // Whoever started us has one.
    std::mem::forget(cleanup);
    let bus = transport(&home).await;
    let models = Arc::new(Models::default());
    let options = options(&home, containers.clone(), Arc::clone(&bus), models);
    let spawner = tokio::spawn(Spawner::new(options).unwrap().run(CancellationToken::new()));
    until(async || (containers.waiting() == 1).then_some(())).await;
    if let Ok(request) = std::fs::read(home.join("request")) {
        let taken = waiting(containers.label());
        let request = serde_json::from_slice(&request).unwrap();
        bus.publish_job(&request).await.unwrap();
        // The job has taken it, and there is another one.
        until(async || {
            let now = waiting(containers.label());
            let both = now.len() == 2 && taken.iter().all(|id| now.contains(id));
            (both && containers.waiting() == 1).then_some(())
        })
        .await;
    }
    std::fs::write(home.join("ready"), "").unwrap();
    spawner.await.unwrap().unwrap();
}

/// A home in which a spawner was killed, and what the next one has, which keeps no container ready.
pub struct Killed {
    pub home: PathBuf,
    bare: PathBuf,
    request: SpawnRequest,
    pub label: String,
    next: Arc<Containers>,
    // In this order: containers, then what they have mounted.
    _cleanup: Cleanup,
    _folder: tempfile::TempDir,
}

impl Killed {
    /// While a container waited, and, `at_work`, another one worked, until there is a file `go`.
    async fn new(at_work: bool) -> Self {
        Self::on("polled", at_work).await
    }

    /// The same, with workspaces as `ARTEL_TEST_DISK` says.
    pub async fn on(disk: &str, at_work: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = repository(folder.path());
        let home = folder.path().join("home");
        let bare = folder.path().join("repository.git");
        let (next, cleanup) = connect(&home, &worker_image(), 0).await;
        let work = format!(
            "echo run >> .git/runs; touch here; while [ ! -e go ]; do sleep 0.05; done; rm here go; {WHICH}"
        );
        let mut request = script(folder.path(), &base, "r1", 1, &work);
        request.limits = Limits {
            wall_s: request.limits.wall_s,
            ..limits()
        };
        if at_work {
            let request = serde_json::to_vec(&request).unwrap();
            std::fs::write(home.join("request"), request).unwrap();
        }
        let env = [
            (HOME, home.as_os_str()),
            ("ARTEL_TEST_DISK", OsStr::new(disk)),
        ];
        let mut program = Another::start("warm::the_program_that_dies", env);
        let sign = home.join("ready");
        until(async || sign.exists().then_some(())).await;
        let works = async || workspace(&home).join("here").exists().then_some(());
        if at_work {
            until(works).await;
        }
        program.kill();
        Self {
            home,
            bare,
            request,
            label: cleanup.0.clone().unwrap(),
            next,
            _cleanup: cleanup,
            _folder: folder,
        }
    }

    pub fn workspace(&self) -> PathBuf {
        workspace(&self.home)
    }

    /// Finds the one container there is when it has begun to work, and is not this one.
    pub fn another(&self, waited: &str) -> Option<String> {
        let all = containers(&self.label);
        let at_work = all.len() == 1 && all[0] != waited;
        let here = self.workspace().join("here").exists();
        (at_work && here).then(|| all[0].clone())
    }

    /// Finds the one container there is, which has waited when its spawner was killed.
    pub fn only(&self, before: &[String]) -> Option<String> {
        let all = containers(&self.label);
        let one = all.len() == 1 && before.contains(&all[0]);
        one.then(|| all[0].clone())
    }

    /// The next spawner brings the job to its end and leaves nothing. `worker` finds the container that works on it.
    pub async fn goes_on(&self, worker: impl AsyncFn() -> Option<String>) {
        let bus = transport(&self.home).await;
        let first = bus.next_job(std::time::Duration::ZERO).await.unwrap();
        match first {
            Some(kept) => bus.release_job(&kept.receipt).await.unwrap(),
            None => drop(bus.publish_job(&self.request).await.unwrap()),
        }
        let models = Arc::new(Models::default());
        let options = options(&self.home, self.next.clone(), Arc::clone(&bus), models);
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(Spawner::new(options).unwrap().run(shutdown.clone()));
        let worker = until(worker).await;
        // A disk is unmounted here for a moment, until the worker is adopted.
        let runs = async || std::fs::read_to_string(self.workspace().join(".git/runs")).ok();
        assert_eq!(until(runs).await, "run\n", "it works for the first time");
        until(async || std::fs::write(self.workspace().join("go"), "").ok()).await;
        assert_succeeded(&wait_result(&bus, "r1").await);
        let which = git(&self.bare, &["show", "task/one:which"]);
        assert!(worker.starts_with(which.trim()), "it is the same one");
        until(async || containers(&self.label).is_empty().then_some(())).await;
        until(async || (slots(&self.home) == 0).then_some(())).await;
        shutdown.cancel();
        let ended = tokio::time::timeout(SOON, running).await.unwrap();
        ended.unwrap().unwrap();
    }
}

#[tokio::test]
async fn of_a_spawner_that_was_killed_the_worker_is_adopted_and_what_waits_is_removed() {
    let killed = Killed::new(true).await;
    let before = waiting(&killed.label);
    killed.goes_on(async || killed.only(&before)).await;
}

#[tokio::test]
async fn a_spawner_that_was_killed_before_the_last_word_to_a_container_has_begun_nothing() {
    let killed = Killed::new(false).await;
    let waited = containers(&killed.label).pop().unwrap();
    // It ends with its spawner, and says so.
    let code = || {
        let format = "{{.State.Status}} {{.State.ExitCode}}";
        docker(&["inspect", "-f", format, &waited])
    };
    until(async || (code().trim() == "exited 120").then_some(())).await;
    // As if it had been killed between these two.
    let mut slots = std::fs::read_dir(killed.home.join("pool")).unwrap();
    let slot = slots.next().unwrap().unwrap().path();
    let taken = serde_json::json!({
        "container": waited, "project": "p", "job": "job-1", "task": "one", "request": "r1", "attempt": 1,
        "at_s": 0, "deadline_s": i64::MAX,
    });
    std::fs::write(slot.join("taken"), taken.to_string()).unwrap();
    killed.goes_on(async || killed.another(&waited)).await;
}
