//! A container that runs: its output, what it uses, its end with the evidence. The engine may go away meanwhile and come back.

use bollard::Docker;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerStateStatusEnum, ContainerStatsResponse};
use bollard::query_parameters::{
    KillContainerOptionsBuilder, StatsOptionsBuilder, WaitContainerOptionsBuilder,
};
use futures::StreamExt as _;
use sandbox::{Line, Reason, Tail};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use super::noticed::{Noticed, witness};
use super::output::listen;
use super::system::weigh;
use super::{AGAIN, Error, Limits, PATIENCE, is_missing};

/// Lines that wait for their reader; more of them are dropped, but for the tail.
const LINES: usize = 256;
/// How often the disk is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// How long the last output may take after the end: the engine may have much of it to read from its disk.
const DRAIN: Duration = Duration::from_secs(15);

/// How long the engine may take to tell of an end that we know of already.
const TOLD: Duration = Duration::from_secs(2);
/// How often in a row the engine has to see the limit of processes reached: a second apart.
const PIDS_SEEN: u32 = 2;

/// What was before we began to watch.
#[derive(Clone, Copy, Debug)]
pub(super) enum Past {
    /// Nothing: we start it.
    None,
    /// Somebody else has started it. It has run for so long, and runs still or is over.
    Adopted { age: Duration, over: bool },
}

/// The end of a container and what it used.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Why.
    pub reason: Reason,
    /// Its exit code, as the engine knows it.
    pub exit_code: i64,
    /// Whether the kernel killed something in it for want of memory.
    pub out_of_memory: bool,
    /// Seconds from start to end, as seen from here.
    pub wall_s: f64,
    /// Processor seconds, as of the last look.
    pub cpu_s: f64,
    /// The most memory that was seen, in MiB; looks are a second apart.
    pub peak_memory_mb: u64,
    /// Bytes read from and written to disks, as of the last look.
    pub io_bytes: (u64, u64),
    /// Who else ended it, when neither it nor we did: somebody who has told the engine so, or the engine's own end.
    pub from_outside: Option<String>,
}

/// What it has used so far.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    cpu_ns: u64,
    peak_bytes: u64,
    read: u64,
    written: u64,
    /// How often in a row it had all the processes that it may have.
    pids_full: u32,
}

/// A container that is being watched. Dropping it stops the watching, not the container.
pub struct Running {
    id: String,
    lines: Option<mpsc::Receiver<Line>>,
    tail: Arc<Tail>,
    begin: watch::Sender<bool>,
    stop: mpsc::Sender<(Reason, Duration)>,
    watcher: JoinHandle<Result<Ended, Error>>,
    ended: Option<Ended>,
}

/// Stops a container from elsewhere.
#[derive(Clone)]
pub struct Stopper(mpsc::Sender<(Reason, Duration)>);

impl Stopper {
    /// Asks the container to end (SIGTERM) and kills it after `grace`. Returns at once.
    pub fn stop(&self, grace: Duration) {
        // A full queue holds such a request already.
        let _ = self.0.try_send((Reason::Stopped, grace));
    }
}

impl Running {
    pub(super) fn watch(docker: Docker, id: String, limits: Limits, past: Past) -> Self {
        let (begin, begun) = watch::channel(false);
        let (lines_in, lines) = mpsc::channel(LINES);
        let (stop, stops) = mpsc::channel(8);
        let tail = Arc::<Tail>::default();
        let watch = Watch {
            docker,
            id: id.clone(),
            limits,
            past,
            tail: tail.clone(),
            lines: lines_in,
        };
        Self {
            watcher: tokio::spawn(watch.until_the_end(begun, stops)),
            id,
            lines: Some(lines),
            tail,
            begin,
            stop,
            ended: None,
        }
    }

    pub(super) fn started(&self) {
        self.begin.send_replace(true);
    }

    /// The engine's id of it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Takes the lines away, to be read elsewhere. A reader that is too slow misses some.
    pub fn take_lines(&mut self) -> Option<mpsc::Receiver<Line>> {
        self.lines.take()
    }

    /// The last 64 KiB of output by now, standard output and error together.
    pub fn tail(&self) -> String {
        self.tail.text()
    }

    /// A handle that stops it from elsewhere.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Waits for the end. May be called again, and may be cancelled.
    pub async fn wait(&mut self) -> Result<Ended, Error> {
        if let Some(ended) = &self.ended {
            return Ok(ended.clone());
        }
        let gone = |_| Error::Gone {
            container: self.id.clone(),
        };
        let ended = (&mut self.watcher).await.map_err(gone)??;
        self.ended = Some(ended.clone());
        Ok(ended)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.watcher.abort();
    }
}

struct Watch {
    docker: Docker,
    id: String,
    limits: Limits,
    past: Past,
    tail: Arc<Tail>,
    lines: mpsc::Sender<Line>,
}

impl Watch {
    async fn until_the_end(
        self,
        mut begun: watch::Receiver<bool>,
        mut stops: mpsc::Receiver<(Reason, Duration)>,
    ) -> Result<Ended, Error> {
        if begun.wait_for(|begun| *begun).await.is_err() {
            return Err(self.gone());
        }
        let started = Instant::now();
        let (adopted, age, over) = match self.past {
            Past::None => (false, Duration::ZERO, false),
            Past::Adopted { age, over } => (true, age, over),
        };
        let used = Arc::new(Mutex::new(Used::default()));
        let mut helpers = AbortOnDrop(vec![tokio::spawn(measure(
            self.docker.clone(),
            self.id.clone(),
            self.limits.pids,
            used.clone(),
        ))]);
        let system_full = Arc::<AtomicBool>::default();
        if let Some(most_mb) = self.limits.system_mb.filter(|_| !over) {
            helpers.0.push(tokio::spawn(weigh(
                self.docker.clone(),
                self.id.clone(),
                most_mb,
                system_full.clone(),
            )));
        }
        let noticed = Arc::new(Mutex::new(Noticed::default()));
        let mut witness = AbortOnDrop(vec![tokio::spawn(witness(
            self.docker.clone(),
            self.id.clone(),
            age,
            noticed.clone(),
        ))]);
        let mut output = AbortOnDrop(vec![tokio::spawn(listen(
            self.docker.clone(),
            self.id.clone(),
            adopted,
            self.tail.clone(),
            self.lines.clone(),
        ))]);
        let wall = self.limits.wall_s.map(Duration::from_secs);
        let mut verdict: Option<Reason> = None;
        let mut kill_at: Option<tokio::time::Instant> = None;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let end = self.wait_for_end();
        tokio::pin!(end);
        let (exit_code, out_of_memory) = loop {
            let due = kill_at.unwrap_or_else(tokio::time::Instant::now);
            tokio::select! {
                end = &mut end => break end?,
                Some((reason, grace)) = stops.recv() => {
                    if verdict.is_none() {
                        verdict = Some(reason);
                        self.signal("SIGTERM").await;
                    }
                    let at = tokio::time::Instant::now() + grace;
                    kill_at = Some(kill_at.map_or(at, |before| before.min(at)));
                }
                () = tokio::time::sleep_until(due), if kill_at.is_some() => {
                    self.signal("SIGKILL").await;
                    kill_at = Some(tokio::time::Instant::now() + AGAIN);
                }
                // What is over is not judged again.
                _ = look.tick(), if !over => {
                    let pids_full = lock(&used).pids_full;
                    let found = if wall.is_some_and(|wall| age + started.elapsed() >= wall) {
                        Some(Reason::Wall)
                    } else if pids_full >= PIDS_SEEN {
                        Some(Reason::Pids)
                    } else if system_full.load(Ordering::Relaxed) {
                        Some(Reason::Disk)
                    } else {
                        self.is_disk_full().await.then_some(Reason::Disk)
                    };
                    if let (None, Some(reason)) = (verdict, found) {
                        verdict = Some(reason);
                        kill_at = Some(tokio::time::Instant::now());
                    }
                }
            }
        };
        drop(helpers);
        for listener in &mut output.0 {
            // What it said last is still on its way.
            let _ = tokio::time::timeout(DRAIN, listener).await;
        }
        for witness in &mut witness.0 {
            // What the engine tells of the end is told beside the end.
            let _ = tokio::time::timeout(TOLD, witness).await;
        }
        let used = *lock(&used);
        let overdue = wall.is_some_and(|wall| age >= wall);
        let reason = verdict.unwrap_or(match i32::try_from(exit_code).unwrap_or(-1) {
            0 => Reason::Exited(0),
            // Killed for its time while nobody watched.
            137 if overdue && !out_of_memory => Reason::Wall,
            _ if out_of_memory => Reason::Memory,
            code @ 129..=192 => Reason::Signalled(code - 128),
            code => Reason::Exited(code),
        });
        let is_ours =
            verdict.is_some() || out_of_memory || exit_code == 0 || reason == Reason::Wall;
        Ok(Ended {
            reason,
            from_outside: if is_ours {
                None
            } else {
                lock(&noticed).outside(exit_code)
            },
            exit_code,
            out_of_memory,
            wall_s: (age + started.elapsed()).as_secs_f64(),
            cpu_s: Duration::from_nanos(used.cpu_ns).as_secs_f64(),
            peak_memory_mb: used.peak_bytes >> 20,
            io_bytes: (used.read, used.written),
        })
    }

    fn gone(&self) -> Error {
        Error::Gone {
            container: self.id.clone(),
        }
    }

    /// The exit code, and whether memory was short. The engine may be down for a while; what it says then is what counts.
    async fn wait_for_end(&self) -> Result<(i64, bool), Error> {
        let mut silent_since: Option<Instant> = None;
        loop {
            let options = WaitContainerOptionsBuilder::default()
                .condition("not-running")
                .build();
            let mut wait = self.docker.wait_container(&self.id, Some(options));
            // Whatever it says, or why it says nothing: the state is read below.
            let _ = wait.next().await;
            match self.docker.inspect_container(&self.id, None).await {
                Ok(about) => {
                    silent_since = None;
                    let state = about.state.unwrap_or_default();
                    let over = matches!(
                        state.status,
                        Some(ContainerStateStatusEnum::EXITED | ContainerStateStatusEnum::DEAD)
                    );
                    if over {
                        return Ok((
                            state.exit_code.unwrap_or(-1),
                            state.oom_killed.unwrap_or(false),
                        ));
                    }
                }
                Err(error) if is_missing(&error) => return Err(self.gone()),
                Err(error) => {
                    let since = *silent_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > PATIENCE {
                        return Err(Error::refused("to look at a container")(error));
                    }
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn signal(&self, signal: &str) {
        let options = KillContainerOptionsBuilder::default()
            .signal(signal)
            .build();
        match self.docker.kill_container(&self.id, Some(options)).await {
            // 409: it does not run any more.
            Ok(())
            | Err(DockerError::DockerResponseServerError {
                status_code: 404 | 409,
                ..
            }) => {}
            Err(error) => {
                tracing::warn!(%error, container = self.id, "the container could not be sent {signal}; trying again");
            }
        }
    }

    async fn is_disk_full(&self) -> bool {
        let Some((folder, most_mb)) = self.limits.disk.clone() else {
            return false;
        };
        tokio::task::spawn_blocking(move || sandbox::exceeds_mb(&folder, most_mb))
            .await
            .unwrap_or(false)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tasks that end with this.
struct AbortOnDrop(Vec<JoinHandle<()>>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        for task in &self.0 {
            task.abort();
        }
    }
}

/// Keeps what the engine says of its use, once a second.
async fn measure(docker: Docker, id: String, pids: u64, used: Arc<Mutex<Used>>) {
    loop {
        let options = StatsOptionsBuilder::default().stream(true).build();
        let mut stats = docker.stats(&id, Some(options));
        while let Some(Ok(seen)) = stats.next().await {
            lock(&used).add(&seen, pids);
        }
        tokio::time::sleep(AGAIN).await;
    }
}

impl Used {
    fn add(&mut self, seen: &ContainerStatsResponse, pids: u64) {
        let now = seen.pids_stats.as_ref().and_then(|pids| pids.current);
        self.pids_full = match now {
            Some(now) if now >= pids => self.pids_full + 1,
            _ => 0,
        };
        let cpu_ns = seen
            .cpu_stats
            .as_ref()
            .and_then(|cpu| cpu.cpu_usage.as_ref())
            .and_then(|usage| usage.total_usage)
            .unwrap_or_default();
        self.cpu_ns = self.cpu_ns.max(cpu_ns);
        if let Some(memory) = &seen.memory_stats {
            // Version 2 of control groups has no maximum of its own.
            let most = memory.max_usage.into_iter().chain(memory.usage).max();
            self.peak_bytes = self.peak_bytes.max(most.unwrap_or_default());
        }
        let io = seen
            .blkio_stats
            .as_ref()
            .and_then(|io| io.io_service_bytes_recursive.as_deref())
            .unwrap_or_default();
        let sum = |wanted: &str| {
            io.iter()
                .filter(|entry| {
                    let op = entry.op.as_deref().unwrap_or_default();
                    op.eq_ignore_ascii_case(wanted)
                })
                .filter_map(|entry| entry.value)
                .sum()
        };
        self.read = self.read.max(sum("read"));
        self.written = self.written.max(sum("write"));
    }
}
