//! Workers in containers of a Docker engine on this machine.
//!
//! The labels of a container say whose it is, so that whoever comes after us knows without any other memory: home and spawner,
//! project, job, task, request, attempt, part, what it may use, and when its time is over. One that was made before its job
//! ([`Warm`]) has that written down beside it instead. Whoever comes after us on the same home may have another name, as every
//! process of a program has, so it is the home that says what is ours.

mod go;
mod pool;
mod warm;

pub use go::wait_for_go;
pub use pool::Warm;

use super::{
    BROKER, Ended, Error, Identity, Inside, LeftOver, Limits, Part, Relay, Runtime, WORKSPACE,
    Work, Worker,
};
use crate::docker::{self, Engine, Found, HOME, LABEL, Mount, Running, Spec, Stopper};
use async_trait::async_trait;
use pool::Pool;
use protocol::Size;
use sandbox::Line;
use sha2::{Digest as _, Sha256};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// The program in the image that carries launcher and agent.
const PROGRAM: &str = "/usr/local/bin/artel-inside";
/// Who workers are when we are root, as user and group.
const WORKER: (u32, u32) = (1000, 1000);
/// The size of `/tmp` and of the home folder, in MiB each; they are memory.
const TMP_MB: u64 = 128;
/// How often a container is made anew that the engine fails to start.
const START_TRIES: u32 = 3;
/// How long containers are made anew that were spoilt because the engine went away meanwhile, however often it does.
const SPOILT: Duration = Duration::from_mins(1);
/// The pause before that.
const START_PAUSE: Duration = Duration::from_millis(500);
/// The labels that say what a container may use: thousandths of a core, MiB.
const CPU: &str = "cpu_milli";
const MEMORY: &str = "memory_mb";
/// What is added to a worker's wall clock before somebody else may end it.
const LATE: Duration = Duration::from_mins(1);
/// How often it is looked what other homes have left.
const ABANDONED: Duration = Duration::from_hours(1);

/// Which engine, and what for.
#[derive(Clone, Debug)]
pub struct DockerOptions {
    /// `DOCKER_HOST`, a Unix socket; the usual one if absent.
    pub host: Option<String>,
    /// The engine's runtime: `sysbox-runc`, or another one that was chosen openly (`SPAWNER_RUNTIME`).
    pub runtime: String,
    /// `WORKER_IMAGE`.
    pub image: String,
    /// The spawner's name, for people: it tells which process has started a container.
    pub spawner: String,
    /// The spawner's `ARTEL_HOME`: whoever has it adopts the containers that another one of the same home has left.
    pub home: PathBuf,
    /// Containers that are kept ready.
    pub warm: Warm,
}

/// Workers in containers; they outlive this process.
pub struct Containers {
    engine: Engine,
    image: String,
    /// Our name.
    spawner: String,
    /// Our home, among all whose spawners use the engine.
    home: String,
    /// Where it is.
    folder: PathBuf,
    /// User and group of workers, and whether that is somebody else than us.
    user: ((u32, u32), bool),
    pool: Pool,
    /// When we looked for what other homes have left.
    looked: Mutex<Option<Instant>>,
}

impl Containers {
    /// Connects to the engine and checks that it has the runtime, and that the image is there or can be had.
    pub async fn connect(options: DockerOptions) -> Result<Self, docker::Error> {
        let host = options.host.as_deref();
        if let Some(host) = host.filter(|host| !host.starts_with("unix://")) {
            return Err(docker::Error::Remote {
                host: host.to_owned(),
            });
        }
        let engine = Engine::connect(host, &options.runtime).await?;
        engine.image(&options.image).await?;
        let home = std::path::absolute(&options.home).unwrap_or(options.home);
        let home = home.canonicalize().unwrap_or(home);
        Ok(Self {
            engine,
            image: options.image,
            spawner: options.spawner,
            // The names of containers are made of it as well, and have to stay what they are.
            home: format!("local-{}", hash(home.as_os_str().as_encoded_bytes())),
            user: user(),
            pool: Pool::new(&home, options.warm),
            folder: home,
            looked: Mutex::default(),
        })
    }

    /// The name by which the engine knows the containers of this spawner, and of all others of its home: the value of the label
    /// `artel.home`.
    pub fn label(&self) -> &str {
        &self.home
    }

    /// Unique on the engine, and the same for the next process.
    fn name(&self, who: &Identity, part: Part) -> String {
        let whole = format!("{}\0{}", self.home, who.request);
        let part = match part {
            Part::Agent => "",
            Part::Refresh => "-refresh",
        };
        format!("artel-{}{part}", hash(whole.as_bytes()))
    }

    fn owner_outside(&self) -> Option<(u32, u32)> {
        let (user, is_other) = self.user;
        is_other.then_some(user)
    }

    fn spec(&self, work: &Work, image: String) -> Spec {
        let who = &work.who;
        let argv = argv(work);
        let mut mounts = vec![mount(&work.workspace, Path::new(WORKSPACE), true)];
        mounts.extend(
            work.relay
                .iter()
                .map(|relay| mount(&relay.folder, Path::new(BROKER), false)),
        );
        mounts.extend(
            work.shown
                .iter()
                .map(|(host, guest)| mount(host, guest, false)),
        );
        let mut env = base_env();
        env.extend(env_of(work));
        let mut labels = self.labels(part_name(work.part), &work.limits);
        labels.extend(whose(who, deadline_s(&work.limits)));
        Spec {
            name: self.name(who, work.part),
            image,
            argv,
            env,
            user: self.user.0,
            cwd: WORKSPACE.into(),
            mounts,
            limits: docker_limits(&work.limits, &work.workspace),
            labels,
            docker_inside: work.docker,
        }
    }

    /// The labels of every container of ours.
    fn labels(&self, part: &str, limits: &Limits) -> BTreeMap<String, String> {
        let size = Size::new(limits.cpu, limits.memory_mb);
        let labels = [
            (docker::HOME_LABEL, self.home.clone()),
            ("spawner", self.spawner.clone()),
            ("part", part.to_owned()),
            (CPU, size.cpu_milli.to_string()),
            (MEMORY, size.memory_mb.to_string()),
        ];
        BTreeMap::from(labels.map(|(name, value)| (name.to_owned(), value)))
    }

    async fn start_once(&self, work: &Work) -> Result<Box<dyn Worker>, Error> {
        // A tag that is moved meanwhile does not matter to a worker that has begun; the id stays.
        let image = self.engine.image(&self.image).await?;
        if let Some(worker) = self.start_warm(work, &image).await {
            return Ok(worker);
        }
        let spec = self.spec(work, image);
        let id = self.engine.create(&spec).await?;
        match self.engine.start(&id, &spec.limits).await {
            Ok(running) => Ok(Contained::watch(running, None)),
            Err(error) => {
                if let Err(error) = self.engine.remove(&id).await {
                    tracing::warn!(%error, container = id, "a container that did not start was not removed; it will be");
                }
                Err(error.into())
            }
        }
    }

    /// Whether it is time to look for what other homes have left.
    fn is_due(&self) -> bool {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = looked.is_none_or(|at| at.elapsed() >= ABANDONED);
        if is_due {
            *looked = Some(Instant::now());
        }
        is_due
    }

    async fn of_task(&self, who: &Identity) -> Result<Vec<Found>, docker::Error> {
        let mut all = self.at_work().await?;
        all.retain(|found| {
            [
                ("project", &who.project),
                ("job", &who.job),
                ("task", &who.task),
            ]
            .iter()
            .all(|(name, value)| label(found, name) == value.as_str())
        });
        Ok(all)
    }
}

/// The labels that say for whom a container works, and until when.
fn whose(who: &Identity, deadline_s: i64) -> [(String, String); 6] {
    let labels = [
        ("project", who.project.clone()),
        ("job", who.job.clone()),
        ("task", who.task.clone()),
        ("request", who.request.clone()),
        ("attempt", who.attempt.to_string()),
        ("deadline", deadline_s.to_string()),
    ];
    labels.map(|(name, value)| (name.to_owned(), value))
}

/// What a container may use. One of a former version does not say; it counts as one of ordinary size.
fn size(found: &Found) -> Size {
    let said = |name| label(found, name).parse::<u64>().ok();
    match (said(CPU), said(MEMORY)) {
        (Some(cpu_milli), Some(memory_mb)) => Size {
            cpu_milli,
            memory_mb,
        },
        _ => Size::of(&protocol::Limits::default()),
    }
}

/// What is run inside.
fn argv(work: &Work) -> Vec<String> {
    let mut argv = Vec::new();
    if let Some(relay) = &work.relay {
        let out = format!("{}={}", relay.listen(), Relay::socket());
        argv.extend(program(&["launch", "--out", &out, "--"]));
    }
    match &work.inside {
        Inside::Program(words) => argv.extend(words.iter().cloned()),
        Inside::Agent(words) => {
            argv.extend(program(&["agent"]));
            argv.extend(words.iter().cloned());
        }
    }
    argv
}

/// Words for the program in the image.
fn program(words: &[&str]) -> Vec<String> {
    let all = [PROGRAM, "internal"].iter().chain(words);
    all.map(|word| (*word).to_owned()).collect()
}

fn mount(host: &Path, guest: &Path, writable: bool) -> Mount {
    Mount {
        host: host.to_owned(),
        guest: guest.to_owned(),
        writable,
    }
}

/// What every worker's environment begins with.
fn base_env() -> Vec<(String, String)> {
    [
        ("HOME", HOME),
        ("LANG", "C.UTF-8"),
        ("TMPDIR", "/tmp"),
        ("USER", "artel"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into()
}

/// The environment of the work. Its first process ends by itself when somebody else may end it, should nobody be there who does.
fn env_of(work: &Work) -> Vec<(String, String)> {
    let most_s = (
        sandbox::launcher::MOST_S.to_owned(),
        most_s(&work.limits).to_string(),
    );
    work.env.iter().cloned().chain([most_s]).collect()
}

/// How long it may be there, in seconds.
fn most_s(limits: &Limits) -> u64 {
    limits.wall_s.saturating_add(LATE.as_secs())
}

/// When somebody else may end what begins now, in seconds since 1970.
fn deadline_s(limits: &Limits) -> i64 {
    let most_s = most_s(limits);
    jiff::Timestamp::now()
        .as_second()
        .saturating_add(i64::try_from(most_s).unwrap_or(i64::MAX))
}

/// A short name of anything.
fn hash(bytes: &[u8]) -> String {
    hex::encode(&Sha256::digest(bytes)[..8])
}

fn part_name(part: Part) -> &'static str {
    match part {
        Part::Agent => "agent",
        Part::Refresh => "refresh",
    }
}

fn label<'a>(found: &'a Found, name: &str) -> &'a str {
    found
        .labels
        .get(&format!("{LABEL}.{name}"))
        .map_or("", String::as_str)
}

/// Who workers are. Root never runs one as root; anybody else is who they are, so that files stay theirs.
fn user() -> ((u32, u32), bool) {
    match std::fs::metadata("/proc/self") {
        Ok(me) if me.uid() != 0 => ((me.uid(), me.gid()), false),
        _ => (WORKER, true),
    }
}

fn docker_limits(limits: &Limits, workspace: &Path) -> docker::Limits {
    docker::Limits {
        cpu: limits.cpu,
        memory_mb: limits.memory_mb,
        pids: limits.pids,
        tmp_mb: TMP_MB,
        wall_s: Some(limits.wall_s),
        disk: limits
            .disk_watched
            .then(|| (workspace.to_owned(), limits.disk_mb)),
        system_mb: Some(limits.disk_mb),
    }
}

#[async_trait]
impl Runtime for Containers {
    fn describe(&self) -> String {
        format!("{}, image {}", self.engine.describe(), self.image)
    }

    fn check(&self) -> Result<(), crate::Error> {
        // All of it was looked at when we connected, and is looked at again for every worker.
        Ok(())
    }

    fn owner(&self) -> Option<(u32, u32)> {
        self.owner_outside()
    }

    fn outlives(&self) -> bool {
        true
    }

    fn looks_seldom(&self) -> bool {
        true
    }

    async fn sees_mounts(&self) -> Result<(), String> {
        self.engine.shares_mounts().await
    }

    async fn docker_inside(&self) -> Result<(), Error> {
        let (_, root) = self.user;
        if !root {
            return Err(Error::NoDockerInside(
                "root of a worker's namespace writes files that only root can take over; run the spawner as root",
            ));
        }
        Ok(self.engine.has_sysbox().await?)
    }

    async fn start(&self, work: &Work) -> Result<Box<dyn Worker>, Error> {
        let mut tries = 1;
        let begun = Instant::now();
        loop {
            match self.start_once(work).await {
                // An engine that died while it started a container may never be able to start that one: a new one, then.
                Err(Error::Docker(error @ docker::Error::Spoilt { .. }))
                    if begun.elapsed() < SPOILT =>
                {
                    tracing::warn!(%error, "trying with a new one");
                    tokio::time::sleep(START_PAUSE).await;
                }
                Err(Error::Docker(error)) if error.is_failure() && tries < START_TRIES => {
                    tracing::warn!(%error, tries, "a container did not start; trying with a new one");
                    tries += 1;
                    tokio::time::sleep(START_PAUSE).await;
                }
                started => return started,
            }
        }
    }

    async fn adopt(
        &self,
        who: &Identity,
        limits: &Limits,
        workspace: &Path,
    ) -> Result<Option<Box<dyn Worker>>, Error> {
        let taken = self.adopt_taken(who, limits, workspace).await?;
        if taken.is_some() {
            return Ok(taken);
        }
        let name = self.name(who, Part::Agent);
        let limits = docker_limits(limits, workspace);
        let adopted = self
            .engine
            .find_and_adopt(&name, &self.home, &limits, None)
            .await?;
        Ok(adopted.map(|running| Contained::watch(running, None)))
    }

    async fn clear(&self, who: &Identity) -> Result<(), Error> {
        for found in self.of_task(who).await? {
            self.engine.remove(&found.id).await?;
        }
        Ok(())
    }

    async fn discard(&self, who: &Identity) -> Result<(), Error> {
        for part in [Part::Agent, Part::Refresh] {
            self.engine.remove(&self.name(who, part)).await?;
        }
        self.discard_taken(who).await
    }

    async fn left_over(&self) -> Result<Vec<LeftOver>, Error> {
        let all = self.at_work().await?;
        let left = all.into_iter().map(|found| LeftOver {
            who: Identity {
                project: label(&found, "project").to_owned(),
                job: label(&found, "job").to_owned(),
                task: label(&found, "task").to_owned(),
                request: label(&found, "request").to_owned(),
                attempt: label(&found, "attempt").parse().unwrap_or(0),
            },
            size: size(&found),
            part: if label(&found, "part") == part_name(Part::Refresh) {
                Part::Refresh
            } else {
                Part::Agent
            },
            running: found.running,
            made_at_s: found.created_s,
            // One without a deadline that can be read is over.
            deadline_s: label(&found, "deadline").parse().unwrap_or(0),
            id: found.id,
        });
        Ok(left.collect())
    }

    async fn end_strays(&self) -> Result<usize, Error> {
        let ended = self.engine.end_unbegun(&self.folder, Path::new(WORKSPACE));
        let ended = ended.await? + self.end_without_slot().await?;
        if !self.is_due() {
            return Ok(ended);
        }
        Ok(ended + self.engine.remove_abandoned(&self.home).await?)
    }

    async fn keep_warm(&self, disks: bool, stop: &CancellationToken) {
        self.keep_pool(disks, stop).await;
    }

    async fn lend_disk(
        &self,
        who: &Identity,
        limits: &Limits,
        state: &Path,
    ) -> Result<bool, Error> {
        self.lend(who, limits, state).await
    }

    async fn kill(&self, id: &str) -> Result<(), Error> {
        Ok(self.engine.kill(id).await?)
    }

    async fn remove(&self, id: &str) -> Result<(), Error> {
        Ok(self.engine.remove(id).await?)
    }
}

struct Contained {
    running: Running,
    stopper: Stopper,
    /// Keeps its slot, if it has waited in one.
    _slot: Option<File>,
}

impl Contained {
    fn watch(running: Running, slot: Option<File>) -> Box<dyn Worker> {
        Box::new(Self {
            stopper: running.stopper(),
            running,
            _slot: slot,
        })
    }
}

#[async_trait]
impl Worker for Contained {
    fn take_lines(&mut self) -> Option<mpsc::Receiver<Line>> {
        self.running.take_lines()
    }

    fn tail(&self) -> String {
        self.running.tail()
    }

    fn stop(&self, grace: Duration) {
        self.stopper.stop(grace);
    }

    async fn wait(&mut self) -> Result<Ended, Error> {
        let ended = self.running.wait().await?;
        let (read, written) = ended.io_bytes;
        Ok(Ended {
            reason: ended.reason,
            wall_s: ended.wall_s,
            cpu_s: ended.cpu_s,
            peak_memory_mb: ended.peak_memory_mb,
            evidence: format!(
                "container {}: exit code {}, out of memory: {}, {read} bytes read and {written} written on disks{}",
                self.running.id().get(..12).unwrap_or_default(),
                ended.exit_code,
                if ended.out_of_memory { "yes" } else { "no" },
                ended
                    .from_outside
                    .as_ref()
                    .map(|words| format!("; {words}"))
                    .unwrap_or_default(),
            ),
            from_outside: ended.from_outside,
        })
    }
}
