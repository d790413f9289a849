//! How long a worker takes to begin: from a job that was accepted to the agent's first instruction, in a fresh workspace, without
//! the clone, which takes as long as the repository is large. Once in a new container and once in one that waited, beside a bare
//! `docker run` of the same image, one after the other in the same run. What is compared is the median.
//!
//! All are read from the clock of this machine: before the job is published or `docker` is called, and by the first command
//! inside. The worker's way has in it the bus (durable), broker, container with all its limits, launcher and agent. Workspaces are as
//! they are by default: for root with loop devices, disks of their own.
//!
//! `ARTEL_TEST_DOCKER_HOST` and `ARTEL_TEST_IMAGE` name an engine and an image (`scripts/with-docker` starts one).
//! `ARTEL_BENCH_JSON` names a file for the figures; `ARTEL_BENCH_ROUNDS` says how often each is started.

// The tests stand on it as well; each uses a part of it.
#[allow(dead_code)]
#[path = "../tests/spawner/stage.rs"]
mod stage;

use protocol::{EventKind, suite};
use serde_json::{Value, json};
use spawner::Disk;
use spawner::runtime::{Containers, DockerOptions, Warm};
use stage::{Cleanup, Stage, containers, until, variable, worker_image};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Whether workers are containers.
const IN_DOCKER: bool = true;
/// Starts of each kind that are measured, after one that is not.
const ROUNDS: u32 = 15;
/// What a worker's start may be of a bare container's.
const LIMIT: f64 = 1.3;
/// What it may be in a container that waited, in milliseconds.
const WARM_LIMIT_MS: f64 = 100.0;
/// The first instruction, which says when it is, and then where.
const FIRST: &str = "echo began $(date +%s%N) $(cat /etc/hostname)";

fn now_ms() -> Result<f64, Failed> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() * 1000.0)
}

/// What the first instruction said: when it was, in milliseconds, and where.
#[allow(clippy::cast_precision_loss)] // a double has microseconds here
fn began(said: &str) -> Result<(f64, &str), Failed> {
    let line = said.lines().find_map(|line| line.strip_prefix("began "));
    let (when, which) = line
        .and_then(|line| line.trim().split_once(' '))
        .ok_or_else(|| format!("the first instruction said nothing: {said}"))?;
    let nanoseconds: u64 = when.parse()?;
    Ok((nanoseconds as f64 / 1e6, which))
}

/// How long a worker took to begin, in milliseconds.
#[derive(Default)]
struct Begun {
    /// Until its workspace was cloned.
    accepted: Vec<f64>,
    clone: Vec<f64>,
    /// From then to the first instruction.
    started: Vec<f64>,
    /// The first and the last of these.
    whole: Vec<f64>,
}

impl Begun {
    fn add(&mut self, (accepted, clone, started): (f64, f64, f64)) {
        self.accepted.push(accepted);
        self.clone.push(clone);
        self.started.push(started);
        self.whole.push(accepted + started);
    }

    fn figures(&self, name: &str) -> [Value; 4] {
        let name = format!("worker.start.{name}");
        [
            figure(&name, &self.whole),
            figure(&format!("{name}.accepted"), &self.accepted),
            figure(&format!("{name}.clone"), &self.clone),
            figure(&format!("{name}.started"), &self.started),
        ]
    }
}

/// A stage with one container that waits.
struct Ready {
    stage: Stage,
    containers: Arc<Containers>,
}

impl Ready {
    async fn new(image: &str) -> Result<Self, Failed> {
        let folder = tempfile::tempdir()?;
        let home = folder.path().join("home");
        std::fs::create_dir_all(&home)?;
        let containers = Containers::connect(DockerOptions {
            host: Some(variable("ARTEL_TEST_DOCKER_HOST")),
            runtime: "runc".to_owned(),
            image: image.to_owned(),
            spawner: "local".to_owned(),
            home,
            warm: Warm {
                count: 1,
                limits: (&suite::request("r").limits).into(),
            },
        });
        let containers = Arc::new(containers.await?);
        let cleanup = Cleanup(Some(containers.label().to_owned()));
        let tune = |options: &mut spawner::Options| options.disk = Disk::default();
        let stage = Stage::tuned(folder, containers.clone(), cleanup, [], tune).await;
        Ok(Self { stage, containers })
    }

    /// The one container that waits, when nothing else is left that would be in the way.
    async fn settled(&self) -> String {
        until(async || {
            let all = containers(self.containers.label());
            let alone = all.len() == 1 && self.containers.waiting() == 1;
            alone.then(|| all.into_iter().next()).flatten()
        })
        .await
    }

    /// One worker, in a container that waited or in another one.
    async fn worker(&self, id: &str, warm: bool) -> Result<(f64, f64, f64), Failed> {
        let waits = self.settled().await;
        let stage = &self.stage;
        let mut request = stage.script(id, 1, FIRST);
        request.task_id = id.into();
        request.repository.branch = format!("task/{id}");
        // Nearly the same limits, which no container waits with.
        request.limits.pids += u64::from(!warm);
        let published = now_ms()?;
        stage.submit(&request).await;
        let result = stage.result(id).await;
        // It made no commit, so what it said is evidence.
        let said = result.failure.map(|failure| failure.evidence);
        let said = said.unwrap_or_default();
        let (began, which) = began(&said)?;
        if waits.starts_with(which) != warm {
            return Err(format!("job {id} ran in the wrong container").into());
        }
        let events = stage.events(id).await;
        let at = |wanted: &str| {
            let found = events
                .iter()
                .find(|event| matches!(&event.kind, EventKind::Phase { name } if name == wanted));
            found
                .map(|event| milliseconds(event.at))
                .ok_or_else(|| format!("job {id} had no phase {wanted}"))
        };
        let (cloning, starting) = (at("cloning")?, at("starting")?);
        Ok((cloning - published, starting - cloning, began - starting))
    }
}

#[allow(clippy::cast_precision_loss)] // a double has microseconds here
fn milliseconds(at: jiff::Timestamp) -> f64 {
    at.as_microsecond() as f64 / 1e3
}

/// A container with nothing but a folder, and how long it took to begin.
fn bare(folder: &Path, image: &str) -> Result<f64, Failed> {
    let mount = format!("{}:/workspace", folder.display());
    let begun = now_ms()?;
    let output = Command::new("docker")
        .env("DOCKER_HOST", variable("ARTEL_TEST_DOCKER_HOST"))
        .args(["run", "--rm", "--runtime", "runc", "--network", "none"])
        .args(["--volume", &mount, "--workdir", "/workspace", image])
        .args(["sh", "-c", FIRST])
        .output()?;
    if !output.status.success() {
        return Err(format!("docker run: {output:?}").into());
    }
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(began(&said)?.0 - begun)
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn rounded(figure: f64) -> f64 {
    (figure * 100.0).round() / 100.0
}

fn figure(name: &str, values: &[f64]) -> Value {
    let rounds: Vec<f64> = values.iter().copied().map(rounded).collect();
    json!({"name": name, "unit": "ms", "value": rounded(median(values)), "rounds": rounds})
}

#[tokio::main]
async fn main() -> Result<(), Failed> {
    let rounds = match std::env::var("ARTEL_BENCH_ROUNDS") {
        Ok(text) => text
            .parse()
            .map_err(|_| format!("ARTEL_BENCH_ROUNDS is {text:?}; it has to be a number"))?,
        Err(_) => ROUNDS,
    };
    let image = worker_image();
    let ready = Ready::new(&image).await?;
    let folder = tempfile::tempdir()?;
    let (mut cold, mut warm, mut theirs) = (Begun::default(), Begun::default(), Vec::new());
    for round in 0..=rounds {
        let in_new = ready.worker(&format!("cold{round}"), false).await?;
        ready.settled().await;
        let bare = bare(folder.path(), &image)?;
        let in_waiting = ready.worker(&format!("warm{round}"), true).await?;
        // The first of each warms up what all use.
        if round > 0 {
            cold.add(in_new);
            theirs.push(bare);
            warm.add(in_waiting);
        }
    }
    let image = ready
        .stage
        .home()
        .join("workspaces/p/job-1/warm1~/disk.img");
    if image.exists() {
        println!("workspaces are disks of their own");
    } else {
        println!("workspaces are folders: no disks of their own can be made here");
    }
    let folder = ready.stage.shut_down().await;
    drop(folder);
    let ratio = rounded(median(&cold.whole) / median(&theirs));
    let warm_ms = rounded(median(&warm.whole));
    let mut figures = vec![
        figure("worker.start.docker_run", &theirs),
        json!({"name": "worker.start.ratio", "unit": "times", "value": ratio}),
    ];
    figures.extend(cold.figures("cold"));
    figures.extend(warm.figures("warm"));
    for figure in &figures {
        println!(
            "{:<28} {:>9} {}",
            figure["name"].as_str().unwrap_or_default(),
            figure["value"],
            figure["unit"].as_str().unwrap_or_default()
        );
    }
    let promises = [
        json!({
            "name": "worker.start.ratio",
            "promise": "job accepted to the agent's first instruction, cold, without the clone, beside a bare `docker run` of the same image",
            "unit": "times", "bound": "at most", "limit": LIMIT, "figure": ratio, "met": ratio <= LIMIT,
        }),
        json!({
            "name": "worker.start.warm",
            "promise": "the same in a container that waited",
            "unit": "ms", "bound": "at most", "limit": WARM_LIMIT_MS, "figure": warm_ms, "met": warm_ms <= WARM_LIMIT_MS,
        }),
    ];
    if let Some(path) = std::env::var_os("ARTEL_BENCH_JSON") {
        let report = json!({"figures": figures, "promises": promises});
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}
