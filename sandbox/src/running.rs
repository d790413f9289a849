//! A running job: its output, its watcher, its end.

use std::os::fd::OwnedFd;
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::net::unix::pipe::Receiver;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::cgroup::Group;
use crate::clean::PrivateDirectory;
use crate::descriptors::MemoryFile;
use crate::lines::Line;
use crate::lookout::Lookout;
use crate::output::{Shared, elapsed_ms, pump};
use crate::tree::Tree;
use crate::{Error, Job, bubblewrap, spawning};

/// How long after a kill it is tried again.
const AGAIN: Duration = Duration::from_millis(500);
/// How often a dropped tree is killed again, a twentieth of a second apart.
const COLLECT: usize = 1200;
/// How long the last output may take after the end.
const DRAIN: Duration = Duration::from_secs(2);
/// Lines that wait for their reader.
const LINES: usize = 256;

/// Why a job ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// By itself, with this code; 127 if there is no such program.
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
    pub group: Option<Group>,
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
        let lookout = Lookout::start(tree, job, started, Arc::clone(&shared))
            .map_err(Error::start("starting the watching thread"))?;
        let watch = Watch {
            lookout,
            collected,
            cpu_limited: job.limits.cpu_s.is_some(),
            shared: Arc::clone(&shared),
            started,
            status: prepared.status,
            _files: prepared.files,
            _private: prepared.private,
            _group: prepared.group,
        };
        let watcher = tokio::spawn(watch.until_the_end(exit, stops, pump));
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
            // Gone within moments, as a rule; a thread of its own waits for it.
            let tree = self.tree;
            let _ = std::thread::Builder::new()
                .name("sandbox-collect".into())
                .spawn(move || collect(tree));
        }
    }
}

/// Waits for the root's end, killing again and again, and collects it.
fn collect(tree: Tree) {
    use rustix::process::{WaitOptions, waitpid};
    for _ in 0..COLLECT {
        // Anything but "not yet" means that there is nothing left to wait for.
        if !matches!(waitpid(Some(tree.root), WaitOptions::NOHANG), Ok(None)) {
            return;
        }
        tree.kill();
        std::thread::park_timeout(Duration::from_millis(50));
    }
}

/// The asynchronous half of watching: waits for the end and for requests. Bounds are kept by
/// [`Lookout`], on a thread that a busy machine does not starve.
struct Watch {
    // Ended before the process is collected, whose id may then be somebody else's.
    lookout: Lookout,
    collected: Collected,
    cpu_limited: bool,
    shared: Arc<Shared>,
    started: Instant,
    status: Option<MemoryFile>,
    _files: Vec<MemoryFile>,
    _private: Option<PrivateDirectory>,
    /// Goes after the tree.
    _group: Option<Group>,
}

impl Watch {
    async fn until_the_end(
        mut self,
        exit: AsyncFd<OwnedFd>,
        mut stops: mpsc::Receiver<Stop>,
        mut pump: JoinHandle<()>,
    ) -> Result<Ended, Error> {
        let tree = self.collected.tree;
        let mut stopping = false;
        let mut kill_at: Option<tokio::time::Instant> = None;
        loop {
            let due = kill_at.unwrap_or_else(tokio::time::Instant::now);
            tokio::select! {
                _ = exit.readable() => break,
                Some(stop) = stops.recv() => {
                    if !stopping {
                        stopping = true;
                        tree.terminate();
                    }
                    let at = tokio::time::Instant::now() + stop.grace;
                    kill_at = Some(kill_at.map_or(at, |before| before.min(at)));
                }
                () = tokio::time::sleep_until(due), if kill_at.is_some() => {
                    tree.kill();
                    // A process in the middle of a disk operation dies only after it.
                    kill_at = Some(tokio::time::Instant::now() + AGAIN);
                }
            }
        }
        let wall_ms = elapsed_ms(self.started);
        let seen = self.lookout.finish();
        // Ended but not collected: the root still knows what its descendants used.
        let cpu_ms = seen.cpu_ms.max(tree.final_cpu_ms());
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
        let reason = match seen.verdict {
            Some(reason) => reason,
            None if stopping => Reason::Stopped,
            None => self.reason(status)?,
        };
        Ok(Ended {
            reason,
            wall_s: seconds(wall_ms),
            cpu_s: seconds(cpu_ms),
            peak_memory_mb: seen.peak_kb / 1024,
        })
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
                    if message.starts_with("bwrap: execvp ") {
                        return Ok(Reason::Exited(127));
                    }
                    return Err(Error::Setup { message });
                }
            },
        };
        Ok(match code {
            152 if self.cpu_limited => Reason::Cpu,
            129..=192 => Reason::Signalled(code - 128),
            code => Reason::Exited(code),
        })
    }
}

#[allow(clippy::cast_precision_loss)] // milliseconds of a job fit a double many times over
fn seconds(ms: u64) -> f64 {
    ms as f64 / 1000.0
}
