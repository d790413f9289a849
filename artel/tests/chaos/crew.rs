//! The crew's side of the bus: sends jobs, takes results, sends the next attempt of what was lost; counts every outcome.

use protocol::{RedisTransport, ResultStatus, Size, Source, SpawnRequest, Transport, WorkerResult};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What a job may use.
pub const CORES: f64 = 0.5;
pub const MEMORY_MB: u64 = 128;
/// Disk of a worker, in MiB.
pub const DISK_MB: u64 = 128;
/// Attempts of one task, at most.
const ATTEMPTS: u32 = 10;

/// Runs Git, and gives what it says.
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

/// The name of the n-th task.
pub fn task(n: usize) -> String {
    format!("t{n:02}")
}

/// One crew with its repository.
pub struct Crew {
    pub bus: Arc<RedisTransport>,
    folder: tempfile::TempDir,
    base: String,
    /// What the n-th task does.
    script: Box<dyn Fn(usize) -> String + Send + Sync>,
    sent: Mutex<BTreeMap<String, usize>>,
    /// Entries of the results' stream, by request.
    entries: Mutex<BTreeMap<String, BTreeSet<String>>>,
    results: Mutex<BTreeMap<String, WorkerResult>>,
}

/// A task that commits one file, once, however often it is run; it takes a moment, so that there is something to be killed in.
pub fn commits(n: usize, moment: &str) -> String {
    format!(
        "echo run >> .git/runs; sleep {moment}
git log --format=%s | grep -qx 'Task {n}' && exit 0
echo {n} > {n}.txt; git add {n}.txt; git commit -qm 'Task {n}'"
    )
}

impl Crew {
    pub async fn new(
        redis: &str,
        script: impl Fn(usize) -> String + Send + Sync + 'static,
    ) -> Self {
        let folder = tempfile::Builder::new()
            .prefix("artel-crew-")
            .tempdir()
            .unwrap();
        let (bare, work) = (folder.path().join("bare.git"), folder.path().join("author"));
        let init = |args: &[&str], to: &Path| {
            git(
                folder.path(),
                &[&["init", "-q", "-b", "main"], args, &[to.to_str().unwrap()]].concat(),
            );
        };
        init(&["--bare"], &bare);
        init(&[], &work);
        std::fs::write(work.join("README.md"), "# A project\n").unwrap();
        git(&work, &["add", "."]);
        git(&work, &["commit", "-q", "-m", "Begin"]);
        git(&work, &["push", "-q", bare.to_str().unwrap(), "main"]);
        let base = git(&work, &["rev-parse", "HEAD"]).trim().to_owned();
        Self {
            bus: Arc::new(RedisTransport::connect(redis).await.unwrap()),
            folder,
            base,
            script: Box::new(script),
            sent: Mutex::default(),
            entries: Mutex::default(),
            results: Mutex::default(),
        }
    }

    pub fn bare(&self) -> PathBuf {
        self.folder.path().join("bare.git")
    }

    /// The request of the first attempt of the n-th task.
    pub fn first(n: usize) -> String {
        format!("{}-1", task(n))
    }

    fn request(&self, n: usize, attempt: u32) -> SpawnRequest {
        let task = task(n);
        let mut request = protocol::suite::request(&format!("{task}-{attempt}"));
        request.project_id = "p".into();
        request.job_id = "job-1".into();
        request.attempt = attempt;
        request.fencing_token = attempt.into();
        request.repository.source = Source::Path(self.bare().to_str().unwrap().into());
        request.repository.base_sha.clone_from(&self.base);
        request.repository.branch = format!("task/{task}");
        request.task_id = task;
        request.agent.adapter = "command".into();
        request.agent.command = ["sh", "-euc", &(self.script)(n)].map(str::to_owned).into();
        request.limits.cpu = CORES;
        request.limits.memory_mb = MEMORY_MB;
        request.limits.disk_mb = DISK_MB;
        request.limits.wall_s = 300;
        request
    }

    pub async fn send(&self, n: usize, attempt: u32) {
        self.publish(n, &self.request(n, attempt)).await;
    }

    /// The first attempt of a task that may use so much.
    pub async fn send_sized(&self, n: usize, size: Size) {
        let mut request = self.request(n, 1);
        #[allow(clippy::cast_precision_loss)] // small numbers
        let cores = size.cpu_milli as f64 / 1000.0;
        (request.limits.cpu, request.limits.memory_mb) = (cores, size.memory_mb);
        self.publish(n, &request).await;
    }

    async fn publish(&self, n: usize, request: &SpawnRequest) {
        self.sent
            .lock()
            .unwrap()
            .insert(request.request_id.clone(), n);
        // Redis may be away for longer than one call is patient; publishing twice is publishing once.
        let start = Instant::now();
        while let Err(error) = self.bus.publish_job(request).await {
            assert!(start.elapsed() < Duration::from_mins(2), "{error}");
        }
    }

    /// Results so far.
    pub fn done(&self) -> usize {
        self.results.lock().unwrap().len()
    }

    pub fn result(&self, request: &str) -> Option<WorkerResult> {
        self.results.lock().unwrap().get(request).cloned()
    }

    /// Takes results until every task has ended for good; what was lost is sent again, as the crew does.
    pub async fn until_all_is_done(&self, within: Duration) {
        let start = Instant::now();
        while self.done() < self.sent.lock().unwrap().len() {
            assert!(
                start.elapsed() < within,
                "within {within:?} there were {} results; none of {:?}",
                self.done(),
                self.missing()
            );
            let Ok(Some(delivery)) = self.bus.next_result(Duration::from_secs(1)).await else {
                continue;
            };
            let result = delivery.result;
            let id = result.request_id.clone();
            let entry = delivery.receipt.split('/').next().unwrap().to_owned();
            self.entries
                .lock()
                .unwrap()
                .entry(id.clone())
                .or_default()
                .insert(entry);
            if result.status == ResultStatus::Lost && self.result(&id).is_none() {
                assert!(
                    result.attempt < ATTEMPTS,
                    "lost again and again: {result:#?}"
                );
                let n = self.sent.lock().unwrap()[&id];
                self.send(n, result.attempt + 1).await;
            }
            self.results.lock().unwrap().insert(id, result);
            // One that is not taken is delivered again, as the same entry.
            let _ = self.bus.ack_result(&delivery.receipt).await;
        }
        // What was acknowledged while Redis was away is taken once more.
        while let Some(delivery) = self.bus.next_result(Duration::ZERO).await.unwrap() {
            let id = delivery.result.request_id.clone();
            let entry = delivery.receipt.split('/').next().unwrap().to_owned();
            self.entries
                .lock()
                .unwrap()
                .entry(id)
                .or_default()
                .insert(entry);
            self.bus.ack_result(&delivery.receipt).await.unwrap();
        }
    }

    fn missing(&self) -> Vec<String> {
        let results = self.results.lock().unwrap();
        let sent = self.sent.lock().unwrap();
        sent.keys()
            .filter(|id| !results.contains_key(*id))
            .cloned()
            .collect()
    }

    /// Every request has one outcome; of every task the last one is a success, whose commit is on its branch. Gives how many
    /// requests were lost on the way.
    pub fn every_job_ended_once(&self, tasks: usize) -> usize {
        let results = self.results.lock().unwrap();
        assert_eq!(results.len(), self.sent.lock().unwrap().len());
        for (id, entries) in &*self.entries.lock().unwrap() {
            assert_eq!(entries.len(), 1, "outcomes of {id}");
            assert!(results.contains_key(id));
        }
        let mut lost = 0;
        let mut succeeded = BTreeMap::new();
        for result in results.values() {
            match result.status {
                ResultStatus::Succeeded => {
                    let before = succeeded.insert(result.task_id.clone(), result);
                    assert!(before.is_none(), "{} succeeded twice", result.task_id);
                }
                ResultStatus::Lost => {
                    let failure = result.failure.as_ref().unwrap();
                    assert!(!failure.evidence.is_empty(), "{result:#?}");
                    lost += 1;
                }
                _ => panic!("neither done nor lost: {result:#?}"),
            }
        }
        assert_eq!(succeeded.len(), tasks);
        for n in 0..tasks {
            let (task, branch) = (task(n), format!("task/{}", task(n)));
            let head = git(&self.bare(), &["rev-parse", &branch]);
            assert_eq!(
                succeeded[&task].head_sha.as_deref(),
                Some(head.trim()),
                "{task}"
            );
            let text = git(&self.bare(), &["show", &format!("{branch}:{n}.txt")]);
            assert_eq!(text, format!("{n}\n"));
            let range = format!("main..{branch}");
            let commits = git(&self.bare(), &["rev-list", "--count", &range]);
            assert_eq!(commits.trim(), "1", "{task}");
        }
        let heads = git(&self.bare(), &["for-each-ref", "--format=%(refname)"]);
        assert_eq!(heads.lines().count(), tasks + 1, "{heads}");
        lost
    }
}
