//! What the tests stand on: a home, a bare repository, a running spawner, scripted models.

use async_trait::async_trait;
use futures::StreamExt as _;
use ports::{ModelError, Usage, WorkerAnswer, WorkerCall, WorkerModels};
use protocol::{
    EventKind, LocalTransport, ResultStatus, Source, SpawnRequest, Transport, WorkerEvent,
    WorkerResult, suite,
};
use serde_json::{Value, json};
use spawner::runtime::{Containers, DockerOptions, Local, Runtime, Warm};
use spawner::{Disk, Options, Spawner};
use std::collections::VecDeque;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// Bound of every wait; much more than a busy machine needs.
pub const SOON: Duration = Duration::from_secs(90);

/// What a scripted model does.
pub enum Turn {
    Json(Value, Usage),
    Stream(Vec<&'static str>),
    Fail(ModelError),
}

/// An answer that runs a command, for 100 tokens in and 10 out.
pub fn runs(command: &str) -> Turn {
    answer(
        &json!({"role": "assistant", "content": null, "tool_calls": [
        {"id": "c", "type": "function", "function": {
            "name": "shell", "arguments": json!({"command": command}).to_string()}}]}),
    )
}

/// An answer that is an end.
pub fn says(text: &str) -> Turn {
    answer(&json!({"role": "assistant", "content": text}))
}

fn answer(message: &Value) -> Turn {
    let usage = Usage {
        input_tokens: 100,
        output_tokens: 10,
        cost_usd: Some(0.01),
    };
    let body = json!({"choices": [{"finish_reason": "stop", "message": message}]});
    Turn::Json(body, usage)
}

#[derive(Default)]
pub struct Models {
    script: Mutex<VecDeque<Turn>>,
    calls: Mutex<Vec<WorkerCall>>,
}

#[async_trait]
impl WorkerModels for Models {
    async fn complete(&self, call: WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError> {
        self.calls.lock().unwrap().push(call);
        let turn = self.script.lock().unwrap().pop_front();
        match turn.expect("the script has an answer for every question") {
            Turn::Json(body, usage) => Ok((WorkerAnswer::Json(body), usage)),
            Turn::Stream(parts) => {
                let parts = parts.into_iter().map(|part| Ok(part.into()));
                let stream = futures::stream::iter(parts).boxed();
                Ok((WorkerAnswer::Stream(stream), Usage::default()))
            }
            Turn::Fail(error) => Err(error),
        }
    }
}

pub struct Stage {
    pub transport: Arc<dyn Transport>,
    pub models: Arc<Models>,
    pub base: String,
    shutdown: CancellationToken,
    running: tokio::task::JoinHandle<Result<(), spawner::Error>>,
    /// After the spawner, before the folder.
    pub cleanup: Cleanup,
    pub folder: tempfile::TempDir,
}

/// A bare repository with one commit on `main`.
pub fn repository(folder: &Path) -> String {
    let bare = folder.join("repository.git");
    let work = folder.join("author");
    git(
        folder,
        &["init", "-q", "--bare", "-b", "main", bare.to_str().unwrap()],
    );
    git(
        folder,
        &["init", "-q", "-b", "main", work.to_str().unwrap()],
    );
    std::fs::write(work.join("README.md"), "# A project\n").unwrap();
    git(&work, &["add", "."]);
    git(&work, &["commit", "-q", "-m", "Begin"]);
    git(&work, &["push", "-q", bare.to_str().unwrap(), "main"]);
    git(&work, &["rev-parse", "HEAD"]).trim().to_owned()
}

pub fn git(folder: &Path, args: &[&str]) -> String {
    let output = Command::new("git")
        .args(["-c", "user.name=Test", "-c", "user.email=test@example.org"])
        .arg("-C")
        .arg(folder)
        .args(args)
        .output()
        .unwrap();
    assert!(output.status.success(), "git {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The transport of a home.
pub async fn transport(home: &Path) -> Arc<dyn Transport> {
    Arc::new(LocalTransport::open(home.join("bus")).await.unwrap())
}

/// A request of the task `one` for a shell script, in the repository of this folder.
pub fn script(folder: &Path, base: &str, id: &str, attempt: u32, script: &str) -> SpawnRequest {
    let mut request = suite::request(id);
    request.project_id = "p".into();
    request.job_id = "job-1".into();
    request.task_id = "one".into();
    request.attempt = attempt;
    request.fencing_token = attempt.into();
    request.repository.source =
        Source::Path(folder.join("repository.git").to_str().unwrap().into());
    request.repository.base_sha = base.into();
    request.repository.branch = "task/one".into();
    request.limits.wall_s = 60;
    request.agent.adapter = "command".into();
    request.agent.command = ["sh", "-euc", script].map(str::to_owned).to_vec();
    request
}

/// Another process of this binary, which is one of its ignored tests. It is killed at the latest when this is dropped.
pub struct Another(Child);

impl Another {
    pub fn start<'a>(test: &str, env: impl IntoIterator<Item = (&'a str, &'a OsStr)>) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture"])
            .envs(env)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }

    /// `kill -9`.
    pub fn kill(&mut self) {
        let _ = self.0.kill();
        self.0.wait().unwrap();
    }
}

impl Drop for Another {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Launcher and agent.
pub const PROGRAM: &str = env!("CARGO_BIN_EXE_artel-inside");

/// Where the workers of this binary run, and what clears away what they leave on the machine.
pub async fn runtime(home: &Path) -> (Arc<dyn Runtime>, Cleanup) {
    if !crate::IN_DOCKER {
        let sandbox = sandbox::Sandbox::detect();
        let sandbox = sandbox.expect("bubblewrap works here; `apt-get install bubblewrap`");
        return (Arc::new(Local::new(sandbox, PROGRAM)), Cleanup(None));
    }
    std::fs::create_dir_all(home).unwrap();
    let containers = Containers::connect(DockerOptions {
        host: Some(variable("ARTEL_TEST_DOCKER_HOST")),
        runtime: "runc".to_owned(),
        image: worker_image(),
        spawner: spawner_name(),
        home: home.to_owned(),
        warm: Warm::default(),
    })
    .await
    .unwrap();
    let cleanup = Cleanup(Some(containers.label().to_owned()));
    (Arc::new(containers), cleanup)
}

/// A name that no other spawner has, as those of processes are.
pub fn spawner_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let n = COUNT.fetch_add(1, Ordering::Relaxed);
    format!("spawner-here-{}-{n}", std::process::id())
}

/// Removes the containers of one spawner.
pub struct Cleanup(pub Option<String>);

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Some(label) = &self.0 {
            for id in containers(label) {
                docker(&["rm", "-f", &id]);
            }
        }
    }
}

/// Ids of all containers of a spawner's home, by its label.
pub fn containers(label: &str) -> Vec<String> {
    let filter = format!("label=artel.home={label}");
    let all = docker(&["ps", "-aq", "--no-trunc", "--filter", &filter]);
    all.split_whitespace().map(str::to_owned).collect()
}

pub fn variable(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| {
        panic!("{name} is not set; run the tests through scripts/test, which starts what they need")
    })
}

/// Docker's own client, and what it said.
pub fn docker(args: &[&str]) -> String {
    let output = Command::new("docker")
        .env("DOCKER_HOST", variable("ARTEL_TEST_DOCKER_HOST"))
        .args(args)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The tests' image with our program where workers' images have it; made once for every build of the program.
pub fn worker_image() -> String {
    let built = std::fs::metadata(PROGRAM).unwrap().modified().unwrap();
    let built = built.duration_since(std::time::UNIX_EPOCH).unwrap();
    let name = format!("artel-test-with-agent:{}", built.as_nanos());
    let alone = std::fs::File::create(std::env::temp_dir().join("artel-test-image.lock")).unwrap();
    alone.lock().unwrap();
    if !docker(&["image", "ls", "-q", &name]).trim().is_empty() {
        return name;
    }
    let layer = tempfile::tempdir().unwrap();
    let program = layer.path().join("usr/local/bin/artel-inside");
    std::fs::create_dir_all(program.parent().unwrap()).unwrap();
    std::fs::copy(PROGRAM, &program).unwrap();
    let made = docker(&["create", &variable("ARTEL_TEST_IMAGE"), "true"]);
    let container = made.trim();
    let from = format!("{}/usr", layer.path().display());
    docker(&["cp", &from, &format!("{container}:/")]);
    docker(&["commit", container, &name]);
    docker(&["rm", container]);
    name
}

/// How workspaces are kept small: looked at, but where a test wants disks; `ARTEL_TEST_DISK=loop` has all tests want them.
fn disk() -> Disk {
    match std::env::var_os("ARTEL_TEST_DISK") {
        Some(chosen) if chosen == "loop" => Disk::Loop,
        _ => Disk::Polled,
    }
}

pub fn options(
    home: &Path,
    runtime: Arc<dyn Runtime>,
    transport: Arc<dyn Transport>,
    models: Arc<Models>,
) -> Options {
    let mut options = Options::new(home, runtime, transport, models);
    options.disk = disk();
    options
}

impl Stage {
    pub async fn new(script: impl IntoIterator<Item = Turn>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
        Self::with(folder, runtime, cleanup, script).await
    }

    pub async fn with(
        folder: tempfile::TempDir,
        runtime: Arc<dyn Runtime>,
        cleanup: Cleanup,
        script: impl IntoIterator<Item = Turn>,
    ) -> Self {
        Self::tuned(folder, runtime, cleanup, script, |_| {}).await
    }

    /// With options of its own.
    pub async fn tuned(
        folder: tempfile::TempDir,
        runtime: Arc<dyn Runtime>,
        cleanup: Cleanup,
        script: impl IntoIterator<Item = Turn>,
        tune: impl FnOnce(&mut Options),
    ) -> Self {
        let base = repository(folder.path());
        let transport = transport(&folder.path().join("home")).await;
        let models = Arc::new(Models::default());
        models.script.lock().unwrap().extend(script);
        let home = folder.path().join("home");
        let mut options = options(&home, runtime, Arc::clone(&transport), Arc::clone(&models));
        tune(&mut options);
        let spawner = Spawner::new(options);
        let shutdown = CancellationToken::new();
        Self {
            transport,
            models,
            base,
            running: tokio::spawn(spawner.unwrap().run(shutdown.clone())),
            shutdown,
            cleanup,
            folder,
        }
    }

    pub fn push(&self, script: impl IntoIterator<Item = Turn>) {
        self.models.script.lock().unwrap().extend(script);
    }

    /// What the models were asked so far.
    pub fn calls(&self) -> Vec<WorkerCall> {
        self.models.calls.lock().unwrap().clone()
    }

    /// Ends the spawner in the middle of what it does, and starts another one.
    pub async fn restart(self) -> Self {
        let Self {
            folder,
            transport,
            models,
            base,
            shutdown,
            running,
            cleanup,
        } = self;
        shutdown.cancel();
        running.await.unwrap().unwrap();
        let home = folder.path().join("home");
        let (runtime, mut second) = runtime(&home).await;
        // One of the two is enough, and this one must not come first.
        second.0 = None;
        let options = options(&home, runtime, Arc::clone(&transport), Arc::clone(&models));
        let shutdown = CancellationToken::new();
        let running = tokio::spawn(Spawner::new(options).unwrap().run(shutdown.clone()));
        Self {
            transport,
            models,
            base,
            shutdown,
            running,
            cleanup,
            folder,
        }
    }

    /// Puts a turn before all others.
    pub fn push_first(&self, turn: Turn) {
        self.models.script.lock().unwrap().push_front(turn);
    }

    pub fn home(&self) -> PathBuf {
        self.folder.path().join("home")
    }

    pub fn bare(&self) -> PathBuf {
        self.folder.path().join("repository.git")
    }

    pub fn workspace(&self) -> PathBuf {
        workspace(&self.home())
    }

    /// A request for the built-in agent.
    pub fn request(&self, id: &str, attempt: u32) -> SpawnRequest {
        SpawnRequest {
            agent: suite::request(id).agent,
            ..self.script(id, attempt, "")
        }
    }

    /// A request for a shell script.
    pub fn script(&self, id: &str, attempt: u32, words: &str) -> SpawnRequest {
        script(self.folder.path(), &self.base, id, attempt, words)
    }

    pub async fn submit(&self, request: &SpawnRequest) {
        self.transport.publish_job(request).await.unwrap();
    }

    pub async fn result(&self, id: &str) -> WorkerResult {
        wait_result(&self.transport, id).await
    }

    pub async fn run(&self, request: &SpawnRequest) -> WorkerResult {
        self.submit(request).await;
        self.result(&request.request_id).await
    }

    /// Runs a script as the first attempt.
    pub async fn run_script(&self, script: &str) -> WorkerResult {
        self.run(&self.script("r1", 1, script)).await
    }

    /// Waits until a request is in this phase.
    pub async fn until_phase(&self, id: &str, wanted: &str) {
        let mut events = self.transport.events(id).await.unwrap();
        let wait = async {
            while let Some(event) = events.next().await {
                if matches!(&event.kind, EventKind::Phase { name } if name == wanted) {
                    return;
                }
            }
            panic!("{id} ended without the phase {wanted}");
        };
        tokio::time::timeout(SOON, wait).await.unwrap();
    }

    /// Everything that was said about a request, after its end.
    pub async fn events(&self, id: &str) -> Vec<WorkerEvent> {
        let stream = self.transport.events(id).await.unwrap();
        tokio::time::timeout(SOON, stream.collect()).await.unwrap()
    }

    pub async fn shut_down(self) -> tempfile::TempDir {
        self.shutdown.cancel();
        self.ended().await
    }

    /// Waits until the spawner has ended.
    pub async fn ended(self) -> tempfile::TempDir {
        tokio::time::timeout(SOON, self.running)
            .await
            .expect("the spawner ends")
            .unwrap()
            .unwrap();
        self.folder
    }

    /// The branch in the bare repository.
    pub fn pushed(&self) -> Option<String> {
        let refs = git(
            &self.bare(),
            &["for-each-ref", "--format=%(objectname) %(refname)"],
        );
        refs.lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(_, name)| *name == "refs/heads/task/one")
            .map(|(sha, _)| sha.to_owned())
    }

    pub fn show(&self, path: &str) -> String {
        git(&self.bare(), &["show", &format!("task/one:{path}")])
    }
}

/// Where the task's workspace is, or will be when it is no disk of its own.
pub fn workspace(home: &Path) -> PathBuf {
    let job = home.join("workspaces/p/job-1");
    if job.join("one~/disk.img").exists() {
        return job.join("one~/disk/workspace");
    }
    job.join("one")
}

pub async fn wait_result(transport: &Arc<dyn Transport>, id: &str) -> WorkerResult {
    until(async || transport.result(id).await.unwrap()).await
}

/// Looks until there is something, within bounds.
pub async fn until<T>(look: impl AsyncFn() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(start.elapsed() < SOON, "nothing within {SOON:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The kind of a failure; panics with the whole result when it is a success.
pub fn kind(result: &WorkerResult) -> &str {
    let Some(failure) = &result.failure else {
        panic!("a failure was expected: {result:#?}");
    };
    &failure.kind
}

pub fn assert_succeeded(result: &WorkerResult) {
    assert_eq!(result.status, ResultStatus::Succeeded, "{result:#?}");
}

pub fn phases(events: &[WorkerEvent]) -> Vec<&str> {
    events
        .iter()
        .filter_map(|event| match &event.kind {
            EventKind::Phase { name } => Some(name.as_str()),
            _ => None,
        })
        .collect()
}
