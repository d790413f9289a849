//! How much of this machine workers may use together, and how much of it is free now.

use crate::trouble::{Trouble, kind};
use protocol::{Heartbeat, Room, Rooms, Size};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// How many tasks of ordinary size share a core: most of the time a worker waits for its model.
const SHARE_A_CORE: f64 = 4.0;
/// What a container that waits for a job takes of the memory, with what the engine has for it, in MiB. It does not use its
/// limits before there is a job, and that counts by itself.
const WAITING_MB: u64 = 16;

/// What all workers together may use, and what becomes of jobs that do not fit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Capacity {
    /// The sum of the limits of those that run is never more.
    pub size: Size,
    /// How long a job may be passed over for smaller ones; then place is kept free for it.
    pub patience: Duration,
    /// How long a job that fits no spawner that lives waits for one that is large enough. Longer than a heartbeat counts, so
    /// that any spawner that lives was heard of.
    pub grace: Duration,
}

impl Capacity {
    /// So much, with the usual patience (a minute) and grace (40 s).
    pub fn of(size: Size) -> Self {
        Self {
            size,
            patience: Duration::from_mins(1),
            grace: Duration::from_secs(40),
        }
    }

    /// Only the number of workers counts.
    pub fn unlimited() -> Self {
        Self::of(Size::UNLIMITED)
    }

    /// What was configured (cores, MiB); what was not is what this machine, or our control group, has: its memory, and its cores
    /// four times over, because a worker waits for its model most of the time. Never less than one task of ordinary size, which
    /// is slower on a small machine, but runs. Of memory that was not configured something is left for so many containers that
    /// wait.
    pub fn detect(cores: Option<f64>, memory_mb: Option<u64>, waiting: usize) -> Self {
        let ordinary = Size::of(&protocol::Limits::default());
        let detected = || {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            let cores = u32::try_from(cores).unwrap_or(u32::MAX);
            Size::new(f64::from(cores) * SHARE_A_CORE, 0)
                .cpu_milli
                .max(ordinary.cpu_milli)
        };
        Self::of(Size {
            cpu_milli: cores.map_or_else(detected, |cores| Size::new(cores, 0).cpu_milli),
            memory_mb: memory_mb.unwrap_or_else(|| {
                let waiting = u64::try_from(waiting).unwrap_or(u64::MAX);
                machine_memory_mb()
                    .saturating_sub(waiting.saturating_mul(WAITING_MB))
                    .max(ordinary.memory_mb)
            }),
        })
    }
}

/// Memory of this machine, or of our control group if that is less, in MiB; 0 when nobody says.
fn machine_memory_mb() -> u64 {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let machine = read("/proc/meminfo")
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok())
        .map(|kib| kib >> 10);
    let ours = read("/proc/self/cgroup")
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .map(|group| format!("/sys/fs/cgroup{}/memory.max", group.trim_end_matches('/')))
        .and_then(|path| read(&path).trim().parse::<u64>().ok())
        .map(|bytes| bytes >> 20);
    machine.into_iter().chain(ours).min().unwrap_or_default()
}

/// What the spawners that live have, but for the one of this name. One that does not say has room for anything.
pub(crate) fn others(alive: &[Heartbeat], name: &str) -> Vec<Size> {
    let others = alive.iter().filter(|beat| beat.spawner != name);
    others
        .map(|beat| beat.size.unwrap_or(Size::UNLIMITED))
        .collect()
}

/// Who can carry a job.
#[derive(Debug)]
pub(crate) enum Fit {
    Here,
    Elsewhere,
    /// Nobody that lives; what the job is told.
    Nowhere(Trouble),
}

/// What a job is told that fits nobody.
pub(crate) fn too_large(needs: Size, here: Size) -> Trouble {
    Trouble::failed(
        kind::TOO_LARGE,
        format!(
            "The task may use {needs}, and no spawner that lives has so much (this one has {here}); an admin has to raise SPAWNER_CPUS and SPAWNER_MEMORY_MB of one, or to start a larger one, or the project's limits have to be lowered."
        ),
    )
}

/// What runs, counted, and the room that is left.
pub(crate) struct Load {
    workers: usize,
    begun: Mutex<Begun>,
    room: watch::Sender<Room>,
}

#[derive(Default)]
struct Begun {
    jobs: usize,
    used: Sum,
}

/// A sum of sizes, as wide as it may get.
type Sum = (u128, u128);

/// A job that counts until this is dropped.
pub(crate) struct Counted {
    load: Arc<Load>,
    size: Size,
}

impl Load {
    pub(crate) fn new(workers: usize, capacity: &Capacity) -> Self {
        let room = Room {
            free: capacity.size,
            whole: capacity.size,
            others: Vec::new(),
            patience: capacity.patience,
            grace: None,
        };
        Self {
            workers,
            begun: Mutex::default(),
            room: watch::Sender::new(room),
        }
    }

    /// The room that there is, now and later.
    pub(crate) fn rooms(&self) -> Rooms {
        self.room.subscribe()
    }

    /// Counts a job.
    pub(crate) fn begin(self: &Arc<Self>, size: Size) -> Counted {
        self.count(|begun| {
            begun.jobs += 1;
            begun.used.0 += u128::from(size.cpu_milli);
            begun.used.1 += u128::from(size.memory_mb);
        });
        Counted {
            load: Arc::clone(self),
            size,
        }
    }

    /// What the jobs that were begun may use.
    pub(crate) fn used(&self) -> Size {
        used(&self.lock())
    }

    /// From now on a job that fits neither us nor these is handed to us after so long.
    pub(crate) fn may_refuse(&self, others: Vec<Size>, grace: Duration) {
        self.room.send_if_modified(|room| {
            let (others, grace) = (others, Some(grace));
            let changes = room.others != others || room.grace != grace;
            (room.others, room.grace) = (others, grace);
            changes
        });
    }

    fn lock(&self) -> MutexGuard<'_, Begun> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn count(&self, change: impl FnOnce(&mut Begun)) {
        let mut begun = self.lock();
        change(&mut begun);
        let (jobs, used) = (begun.jobs, used(&begun));
        // Under the lock, so that the last word is the last count.
        self.room.send_modify(|room| {
            room.free = if jobs < self.workers {
                room.whole.minus(used)
            } else {
                Size::ZERO
            };
        });
    }
}

fn used(begun: &Begun) -> Size {
    let most = |sum: u128| u64::try_from(sum).unwrap_or(u64::MAX);
    Size {
        cpu_milli: most(begun.used.0),
        memory_mb: most(begun.used.1),
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.load.count(|begun| {
            begun.jobs = begun.jobs.saturating_sub(1);
            begun.used.0 = begun.used.0.saturating_sub(self.size.cpu_milli.into());
            begun.used.1 = begun.used.1.saturating_sub(self.size.memory_mb.into());
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_configured_counts_and_what_is_detected_is_never_too_small_for_an_ordinary_task() {
        let configured = Capacity::detect(Some(0.5), Some(100), 16).size;
        assert_eq!(configured, Size::new(0.5, 100));
        let beside = Capacity::detect(None, None, usize::MAX).size;
        assert!(Size::of(&protocol::Limits::default()).fits(beside));
        let detected = Capacity::detect(None, None, 0).size;
        assert!(beside.memory_mb <= detected.memory_mb);
        assert!(Size::of(&protocol::Limits::default()).fits(detected));
        assert!(machine_memory_mb() > 0, "this machine says how much it has");
    }

    #[test]
    fn what_runs_is_not_free_and_is_free_again_when_it_ends() {
        let capacity = Capacity::of(Size::new(4.0, 4000));
        let load = Arc::new(Load::new(2, &capacity));
        let rooms = load.rooms();
        let one = load.begin(Size::new(1.0, 3000));
        assert_eq!(rooms.borrow().free, Size::new(3.0, 1000));
        let two = load.begin(Size::new(1.0, 500));
        assert_eq!(rooms.borrow().free, Size::ZERO, "both places are taken");
        assert_eq!(load.used(), Size::new(2.0, 3500));
        // One that is handed out to be refused is larger than everything, and leaves no trace.
        let huge = load.begin(Size::UNLIMITED);
        drop(huge);
        drop(one);
        assert_eq!(rooms.borrow().free, Size::new(3.0, 3500));
        drop(two);
        assert_eq!(rooms.borrow().free, capacity.size);
    }
}
