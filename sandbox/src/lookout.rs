//! Keeps a job's bounds, on a thread of its own.
//!
//! A bomb of a thousand processes takes a thousand shares of the processors. The kernel bounds the
//! number of processes for everybody but root; run by root, the lookout therefore goes before all
//! ordinary work, and looks again at once when the machine's number of threads jumps.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::Pid;

use crate::detect::find;
use crate::output::{Shared, elapsed_ms};
use crate::tree::Tree;
use crate::{Job, Limits, Reason, disk};

/// The shortest time between two looks.
const GLANCE: Duration = Duration::from_millis(20);
/// The longest time between two looks.
const LOOK: Duration = Duration::from_millis(100);
/// When a job counts as a quiet one.
const SETTLED: Duration = Duration::from_mins(1);
/// This many threads more on the machine are reason for a look.
const JUMP: u64 = 16;
/// How often the disk is measured.
const MEASURE: Duration = Duration::from_secs(2);

/// What the lookout saw until the end.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// The broken bound, if one was; the tree was killed then.
    pub verdict: Option<Reason>,
    pub cpu_ms: u64,
    pub peak_kb: u64,
}

/// A thread that watches a tree until it is told to finish, or dropped.
pub(crate) struct Lookout(Option<(Sender<()>, JoinHandle<Seen>)>);

impl Lookout {
    pub(crate) fn start(
        tree: Tree,
        job: &Job,
        started: Instant,
        shared: Arc<Shared>,
    ) -> std::io::Result<Self> {
        let (finish, finished) = channel();
        let writable = job.mounts.iter().filter(|mount| mount.writable);
        let watching = Watching {
            tree,
            limits: job.limits.clone(),
            writable: writable.map(|mount| mount.host.clone()).collect(),
            shared,
            started,
            measured: Instant::now(),
            measuring: Duration::ZERO,
            seen: Seen::default(),
        };
        let seen = std::thread::Builder::new()
            .name("sandbox-watch".into())
            .spawn(move || watching.watch(&finished))?;
        Ok(Self(Some((finish, seen))))
    }

    /// Ends the watch, within a look's time. From then on it kills nobody.
    pub(crate) fn finish(&mut self) -> Seen {
        self.0.take().map_or_else(Seen::default, |(finish, seen)| {
            drop(finish);
            seen.join().unwrap_or_default()
        })
    }
}

impl Drop for Lookout {
    fn drop(&mut self) {
        self.finish();
    }
}

struct Watching {
    tree: Tree,
    limits: Limits,
    writable: Vec<PathBuf>,
    shared: Arc<Shared>,
    started: Instant,
    measured: Instant,
    measuring: Duration,
    seen: Seen,
}

impl Watching {
    fn watch(mut self, finished: &Receiver<()>) -> Seen {
        // Only root may; for everybody else the kernel itself bounds the number of processes.
        let root = rustix::process::geteuid().is_root();
        if root {
            hurry(rustix::thread::gettid());
        }
        let mut looked = Instant::now();
        let mut threads = machine_threads();
        // The first look is at once, so that even a short command is seen.
        let mut pause = Duration::from_millis(2);
        while finished.recv_timeout(pause) == Err(RecvTimeoutError::Timeout) {
            // What was quiet for a while is a service; it shall not wake the machine so often.
            let settled = self.started.elapsed() > SETTLED;
            pause = if settled { LOOK } else { GLANCE };
            let now = machine_threads();
            if now < threads + JUMP && looked.elapsed() < LOOK {
                threads = threads.min(now);
                continue;
            }
            threads = now;
            if let Some(reason) = self.look() {
                // Said twice, the first one counts: what follows is the kill's doing.
                self.seen.verdict.get_or_insert(reason);
                if root && let Some(first) = self.tree.members(2).get(1) {
                    // It has to run in order to die, and the others live until it does.
                    hurry(*first);
                }
                self.tree.kill();
            }
            looked = Instant::now();
        }
        self.seen
    }

    /// Which bound is broken, if any.
    fn look(&mut self) -> Option<Reason> {
        let limits = &self.limits;
        // Bubblewrap itself is two processes.
        let most_tasks = limits.pids.saturating_add(2);
        let most_members = usize::try_from(most_tasks).unwrap_or(usize::MAX);
        let members = self.tree.members(most_members.saturating_add(1));
        if members.len() > most_members {
            return Some(Reason::Pids);
        }
        let usage = Tree::usage(&members);
        self.seen.cpu_ms = self.seen.cpu_ms.max(usage.cpu_ms);
        let most_kb = limits.memory_mb.saturating_mul(1024);
        let mut used_kb = usage.resident_kb;
        if used_kb > most_kb {
            used_kb = Tree::proportional_kb(&members);
        }
        self.seen.peak_kb = self.seen.peak_kb.max(used_kb);
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
            self.measure()
        }
    }

    fn measure(&mut self) -> Option<Reason> {
        let most = self.limits.disk_mb?.saturating_mul(1 << 20);
        // Never more than a twentieth of the time goes into it.
        if self.measured.elapsed() < MEASURE.max(self.measuring * 20) {
            return None;
        }
        let begun = Instant::now();
        let exceeds = disk::exceeds(&self.writable, most);
        self.measuring = begun.elapsed();
        self.measured = Instant::now();
        exceeds.then_some(Reason::Disk)
    }
}

/// Puts a thread before all ordinary work. That it cannot be is no reason not to watch.
fn hurry(thread: Pid) {
    static CHRT: OnceLock<Option<PathBuf>> = OnceLock::new();
    let Some(chrt) = CHRT.get_or_init(|| find("chrt")) else {
        let _ = rustix::process::setpriority_process(Some(thread), -15);
        return;
    };
    let _ = Command::new(chrt)
        .args(["--rr", "--pid", "10"])
        .arg(thread.as_raw_nonzero().to_string())
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}

/// Threads of the whole machine; cheap to ask for.
fn machine_threads() -> u64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let counts = text.split_whitespace().nth(3);
    counts
        .and_then(|counts| counts.split_once('/')?.1.parse().ok())
        .unwrap_or(0)
}
