//! A running job: its output, its watcher, its end.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::clean::PrivateDirectory;
use crate::descriptors::MemoryFile;
use crate::output::{Line, Shared, elapsed_ms, pump};
use crate::tree::Tree;
use crate::{Error, Job, Limits, bubblewrap, disk, spawning};

/// How often the tree is looked at.
const LOOK: Duration = Duration::from_millis(100);
/// How often the disk is measured.
const MEASURE: Duration = Duration::from_secs(3);
/// How long the last output may take after the end.
const DRAIN: Duration = Duration::from_secs(2);
/// Lines that wait for their reader.
const LINES: usize = 256;

/// Why a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// By itself, with this code.
    Exited(i32),
    /// By a signal that was not ours. A code of 129 to 192 counts as one, as shells have it.
    Signalled(i32),
    /// Killed: more memory than allowed.
    Memory,
    /// Killed: more processes than allowed.
    Pids,
    /// Killed: more CPU time than allowed.
    Cpu,
    /// Killed: more room on the disk than allowed.
    Disk,
    /// Killed: ran longer than allowed.
    Wall,
    /// Killed: was silent longer than allowed.
    Idle,
    /// Stopped because somebody asked.
    Stopped,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Exited(code) => write!(f, "exited with code {code}"),
            Self::Signalled(signal) => write!(f, "ended by signal {signal}"),
            Self::Memory => f.write_str("killed: used more memory than allowed"),
            Self::Pids => f.write_str("killed: started more processes than allowed"),
            Self::Cpu => f.write_str("killed: used more CPU time than allowed"),
            Self::Disk => f.write_str("killed: used more disk space than allowed"),
            Self::Wall => f.write_str("killed: ran longer than allowed"),
            Self::Idle => f.write_str("killed: was silent longer than allowed"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

/// The end of a job and what it used.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ended {
    /// Why.
    pub reason: Reason,
    /// Seconds from start to end.
    pub wall_s: f64,
    /// CPU seconds of all processes. Of a tree that was killed, as of the last look.
    pub cpu_s: f64,
    /// The most memory that was seen, in MiB; looks are a tenth of a second apart.
    pub peak_memory_mb: u64,
}

impl Ended {
    /// Whether it ended by itself with code 0.
    pub fn success(&self) -> bool {
        self.reason == Reason::Exited(0)
    }
}

/// A finished job.
#[derive(Debug, Clone)]
pub struct Output {
    /// How it ended.
    pub ended: Ended,
    /// The last 64 KiB of what it said, standard output and error together.
    pub tail: String,
}

/// A command ready to start, with what must stay until it ends.
pub(crate) struct Prepared {
    pub command: Command,
    pub status: Option<MemoryFile>,
    pub files: Vec<MemoryFile>,
    pub private: Option<PrivateDirectory>,
}

struct Stop {
    grace: Duration,
}

/// A job that was started. Dropping it kills everything that it started.
pub struct Running {
    tree: Tree,
    lines: Option<mpsc::Receiver<Line>>,
    shared: Arc<Shared>,
    stop: mpsc::Sender<Stop>,
    watcher: JoinHandle<Result<Ended, Error>>,
    ended: Option<Ended>,
}

/// Stops a job from elsewhere.
#[derive(Clone)]
pub struct Stopper(mpsc::Sender<Stop>);

impl Stopper {
    /// Asks the job to end (SIGTERM to all of it) and kills it after `grace`. Returns at once.
    pub fn stop(&self, grace: Duration) {
        let _ = self.0.try_send(Stop { grace });
    }
}

impl Running {
    pub(crate) fn start(mut prepared: Prepared, job: &Job) -> Result<Self, Error> {
        let (reader, writer) = std::io::pipe().map_err(Error::start("making a pipe"))?;
        let errors = writer.try_clone().map_err(Error::start("making a pipe"))?;
        prepared.command.stdout(writer).stderr(errors);
        rustix::io::ioctl_fionbio(&reader, true)
            .map_err(|errno| Error::start("preparing a pipe")(errno.into()))?;
        let pipe =
            Receiver::from_owned_fd(reader.into()).map_err(Error::start("preparing a pipe"))?;

        let started = Instant::now();
        let child =
            spawning::spawn(prepared.command).map_err(Error::start("starting a process"))?;
        let tree = Tree {
            root: Pid::from_child(&child),
            confined: prepared.status.is_some(),
        };
        // From here on dropping it kills the tree.
        let collected = Collected { child, tree };
        let exit = watch_exit(tree.root).map_err(Error::start("watching a process"))?;

        let shared = Shared::new(started);
        let (sender, lines) = mpsc::channel(LINES);
        let most_bytes = job.limits.output_mb.saturating_mul(1 << 20);
        let pump = tokio::spawn(pump(pipe, Arc::clone(&shared), sender, most_bytes));
        let (stop, stops) = mpsc::channel(8);
        let watch = Watch {
            collected,
            limits: job.limits.clone(),
            writable: job
                .mounts
                .iter()
                .filter(|mount| mount.writable)
                .map(|mount| mount.host.clone())
                .collect(),
            shared: Arc::clone(&shared),
            started,
            status: prepared.status,
            _files: prepared.files,
            _private: prepared.private,
            cpu_ms: 0,
            peak_kb: 0,
        };
        let watcher = tokio::spawn(watch.to_the_end(exit, stops, pump));
        Ok(Self {
            tree,
            lines: Some(lines),
            shared,
            stop,
            watcher,
            ended: None,
        })
    }

    /// The next line of output (standard output and error together); `None` at the end. A queue
    /// of 256 lines is between the command and its reader; when it is full, the command waits.
    pub async fn next_line(&mut self) -> Option<Line> {
        self.lines.as_mut()?.recv().await
    }

    /// Takes the lines away, to be read elsewhere.
    pub fn take_lines(&mut self) -> Option<mpsc::Receiver<Line>> {
        self.lines.take()
    }

    /// The last 64 KiB of output by now.
    pub fn tail(&self) -> String {
        self.shared.tail()
    }

    /// A handle that stops the job from elsewhere.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// The process id, on the host, of the root of the tree.
    pub fn pid(&self) -> u32 {
        self.tree.root.as_raw_nonzero().get().unsigned_abs()
    }

    /// Asks the job to end (SIGTERM to all of it), kills it after `grace`, and waits for the end.
    pub async fn stop(&mut self, grace: Duration) -> Result<Ended, Error> {
        self.stopper().stop(grace);
        self.wait().await
    }

    /// Waits for the end. Output that nobody took is dropped, but for the tail. May be called
    /// again, and may be cancelled.
    pub async fn wait(&mut self) -> Result<Ended, Error> {
        if let Some(ended) = &self.ended {
            return Ok(ended.clone());
        }
        self.lines = None;
        let ended = (&mut self.watcher).await.map_err(|_| Error::Lost)??;
        self.ended = Some(ended.clone());
        Ok(ended)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.watcher.is_finished() {
            // The watcher drops the child, which kills the tree; so it does when the runtime ends.
            self.watcher.abort();
        }
    }
}

/// Becomes readable when the process ends.
#[expect(
    deprecated,
    reason = "its replacement is unsafe, for types that lend a descriptor they do not own; this one is owned"
)]
fn watch_exit(pid: Pid) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::new(pidfd_open(pid, PidfdFlags::empty())?)
}

/// A child that is killed with all its descendants, and collected, when it is dropped.
struct Collected {
    child: Child,
    tree: Tree,
}

impl Drop for Collected {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(Some(_))) {
            self.tree.kill();
            // A killed process is gone within moments; a thread of its own waits for it.
            for _ in 0..20 {
                if matches!(self.child.try_wait(), Ok(Some(_))) {
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

struct Watch {
    collected: Collected,
    limits: Limits,
    writable: Vec<PathBuf>,
    shared: Arc<Shared>,
    started: Instant,
    status: Option<MemoryFile>,
    _files: Vec<MemoryFile>,
    _private: Option<PrivateDirectory>,
    cpu_ms: u64,
    peak_kb: u64,
}

impl Watch {
    async fn to_the_end(
        mut self,
        exit: AsyncFd<OwnedFd>,
        mut stops: mpsc::Receiver<Stop>,
        mut pump: JoinHandle<()>,
    ) -> Result<Ended, Error> {
        let tree = self.collected.tree;
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut measured = Instant::now();
        let mut measuring: Option<JoinHandle<u64>> = None;
        let mut verdict: Option<Reason> = None;
        let mut kill_at: Option<Instant> = None;
        loop {
            tokio::select! {
                _ = exit.readable() => break,
                Some(stop) = stops.recv() => {
                    if verdict.is_none() {
                        verdict = Some(Reason::Stopped);
                        tree.terminate();
                    }
                    let at = Instant::now() + stop.grace;
                    kill_at = Some(kill_at.map_or(at, |before| before.min(at)));
                }
                _ = look.tick() => {
                    if verdict.is_none() {
                        verdict = self.look();
                        if verdict.is_some() {
                            kill_at = Some(Instant::now());
                        }
                    }
                    if let Some(most) = self.limits.disk_mb
                        && verdict.is_none()
                    {
                        if let Some(task) = measuring.take_if(|task| task.is_finished()) {
                            if task.await.unwrap_or(0) > most.saturating_mul(1 << 20) {
                                verdict = Some(Reason::Disk);
                                kill_at = Some(Instant::now());
                            }
                            measured = Instant::now();
                        } else if measuring.is_none() && measured.elapsed() > MEASURE {
                            let paths = self.writable.clone();
                            measuring = Some(tokio::task::spawn_blocking(move || disk::used_bytes(&paths)));
                        }
                    }
                    if kill_at.is_some_and(|at| at <= Instant::now()) {
                        tree.kill();
                    }
                }
            }
        }
        let wall_ms = elapsed_ms(self.started);
        // Ended but not collected: the root still knows what its descendants used.
        self.cpu_ms = self.cpu_ms.max(tree.final_cpu_ms());
        let status = self
            .collected
            .child
            .wait()
            .map_err(Error::start("collecting a process"))?;
        if !tree.confined {
            let _ = rustix::process::kill_process_group(tree.root, rustix::process::Signal::KILL);
        }
        if tokio::time::timeout(DRAIN, &mut pump).await.is_err() {
            pump.abort();
        }
        let reason = match verdict {
            Some(reason) => reason,
            None => self.reason(status)?,
        };
        Ok(Ended {
            reason,
            wall_s: seconds(wall_ms),
            cpu_s: seconds(self.cpu_ms),
            peak_memory_mb: self.peak_kb / 1024,
        })
    }

    /// Which bound is broken, if any.
    fn look(&mut self) -> Option<Reason> {
        let limits = &self.limits;
        // Bubblewrap itself is two processes.
        let most_tasks = limits.pids + 2;
        let most_members = usize::try_from(most_tasks)
            .unwrap_or(usize::MAX)
            .saturating_add(1);
        let members = self.collected.tree.members(most_members);
        let usage = Tree::usage(&members);
        self.cpu_ms = self.cpu_ms.max(usage.cpu_ms);
        let most_kb = limits.memory_mb.saturating_mul(1024);
        let mut used_kb = usage.resident_kb;
        if used_kb > most_kb {
            used_kb = Tree::proportional_kb(&members);
        }
        self.peak_kb = self.peak_kb.max(used_kb);
        let over = |bound: Option<u64>, ms: u64| bound.is_some_and(|s| ms > s.saturating_mul(1000));
        if used_kb > most_kb {
            Some(Reason::Memory)
        } else if usage.tasks > most_tasks {
            Some(Reason::Pids)
        } else if over(limits.cpu_s, usage.cpu_ms) {
            Some(Reason::Cpu)
        } else if over(limits.wall_s, elapsed_ms(self.started)) {
            Some(Reason::Wall)
        } else if over(limits.idle_s, self.shared.silent_ms()) {
            Some(Reason::Idle)
        } else {
            None
        }
    }

    fn reason(&mut self, status: std::process::ExitStatus) -> Result<Reason, Error> {
        use std::os::unix::process::ExitStatusExt;
        let code = match &mut self.status {
            None => match (status.code(), status.signal()) {
                (Some(code), _) => code,
                (None, signal) => return Ok(Reason::Signalled(signal.unwrap_or(0))),
            },
            Some(file) => match bubblewrap::exit_code(&file.read()) {
                Some(code) => i32::try_from(code).unwrap_or(-1),
                None if status.signal().is_some() => {
                    return Ok(Reason::Signalled(status.signal().unwrap_or(0)));
                }
                None => {
                    let message = self.shared.tail().trim().to_owned();
                    return Err(Error::Setup { message });
                }
            },
        };
        Ok(match code {
            152 if self.limits.cpu_s.is_some() => Reason::Cpu,
            129..=192 => Reason::Signalled(code - 128),
            code => Reason::Exited(code),
        })
    }
}

#[allow(clippy::cast_precision_loss)] // milliseconds of a job fit a double many times over
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
