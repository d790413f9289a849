//! How long a worker takes to begin: from a job that was accepted to the agent's first instruction, in a fresh workspace and a new
//! container, beside a bare `docker run` of the same image, one after the other in the same run. What is compared is the median.
//!
//! Both are read from the clock of this machine: before the job is published or `docker` is called, and by the first command
//! inside. The worker's way has in it the bus (durable), clone, broker, container with all its limits, launcher and agent.
//!
//! `ARTEL_TEST_DOCKER_HOST` and `ARTEL_TEST_IMAGE` name an engine and an image (`scripts/with-docker` starts one).
//! `ARTEL_BENCH_JSON` names a file for the figures; `ARTEL_BENCH_ROUNDS` says how often each is started.

// The tests stand on it as well; each uses a part of it.
#[allow(dead_code)]
#[path = "../tests/spawner/stage.rs"]
mod stage;

use protocol::EventKind;
use serde_json::{Value, json};
use stage::{Stage, containers, until, variable, worker_image};
use std::path::Path;
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

type Failed = Box<dyn std::error::Error + Send + Sync>;

/// Whether workers are containers.
const IN_DOCKER: bool = true;
/// Starts of each kind that are measured, after one that is not.
const ROUNDS: u32 = 15;
/// What a worker's start may be of a bare container's.
const LIMIT: f64 = 1.3;
/// The first instruction, which says when it is.
const FIRST: &str = "date +%s%N > .git/began";

fn now_ms() -> Result<f64, Failed> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs_f64() * 1000.0)
}

/// The time that the first instruction wrote down, in milliseconds.
#[allow(clippy::cast_precision_loss)] // a double has microseconds here
fn began_ms(file: &Path) -> Result<f64, Failed> {
    let nanoseconds: u64 = std::fs::read_to_string(file)?.trim().parse()?;
    Ok(nanoseconds as f64 / 1e6)
}

/// One worker, and how long it took to begin; and how much of that was the clone.
async fn worker(stage: &Stage, label: &str, round: u32) -> Result<(f64, f64), Failed> {
    let id = format!("r{round}");
    let mut request = stage.script(&id, 1, FIRST);
    request.task_id.clone_from(&id);
    request.repository.branch = format!("task/{id}");
    request.limits.memory_mb = 512;
    let accepted = now_ms()?;
    stage.submit(&request).await;
    stage.result(&id).await;
    let workspace = stage.workspace().with_file_name(&id);
    let took = began_ms(&workspace.join(".git/began"))? - accepted;
    let events = stage.events(&id).await;
    let at = |wanted: &str| {
        let found = events
            .iter()
            .find(|event| matches!(&event.kind, EventKind::Phase { name } if name == wanted));
        found
            .map(|event| event.at)
            .ok_or_else(|| format!("job {id} had no phase {wanted}"))
    };
    let clone = at("starting")?.duration_since(at("cloning")?);
    // Nothing of it is in the way of what comes next.
    until(async || containers(label).is_empty().then_some(())).await;
    Ok((took, clone.as_secs_f64() * 1000.0))
}

/// A container with nothing but a folder, and how long it took to begin.
fn bare(folder: &Path, image: &str) -> Result<f64, Failed> {
    std::fs::create_dir_all(folder.join(".git"))?;
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
    Ok(began_ms(&folder.join(".git/began"))? - begun)
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
    let stage = Stage::new([]).await;
    let label = stage.cleanup.0.clone().ok_or("workers are no containers")?;
    let image = worker_image();
    let folder = tempfile::tempdir()?;
    let (mut ours, mut clones, mut theirs) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..=rounds {
        let (worker, clone) = worker(&stage, &label, round).await?;
        let bare = bare(folder.path(), &image)?;
        // The first of each warms up what both use.
        if round > 0 {
            ours.push(worker);
            clones.push(clone);
            theirs.push(bare);
        }
    }
    let folder = stage.shut_down().await;
    drop(folder);
    let ratio = rounded(median(&ours) / median(&theirs));
    let figures = vec![
        figure("worker.start.cold", &ours),
        figure("worker.start.cold.clone", &clones),
        figure("worker.start.docker_run", &theirs),
        json!({"name": "worker.start.ratio", "unit": "times", "value": ratio}),
    ];
    for figure in &figures {
        println!(
            "{:<28} {:>9} {}",
            figure["name"].as_str().unwrap_or_default(),
            figure["value"],
            figure["unit"].as_str().unwrap_or_default()
        );
    }
    let promises = [json!({
        "name": "worker.start.ratio",
        "promise": "job accepted to the agent's first instruction, cold, clone included, beside a bare `docker run` of the same image",
        "unit": "times", "bound": "at most", "limit": LIMIT, "figure": ratio, "met": ratio <= LIMIT,
    })];
    if let Some(path) = std::env::var_os("ARTEL_BENCH_JSON") {
        let report = json!({"figures": figures, "promises": promises});
        std::fs::write(path, serde_json::to_vec_pretty(&report)?)?;
    }
    Ok(())
}
