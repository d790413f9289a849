//! How much of this machine workers may use together, and how much of it is free now.

use crate::trouble::{Trouble, kind};
use protocol::{LATELY, Room, Rooms, Seen, Size};
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, HashSet};
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
    /// How long a job that fits no spawner, neither one that lives nor one that was heard of lately, waits for one that is large
    /// enough. Longer than a heartbeat counts, so that any spawner that lives was heard of.
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

/// What the spawners have that live or may come back, but for the one of this name and those that take no more jobs. One that
/// does not say has room for anything.
pub(crate) fn others(seen: &[Seen], name: &str) -> Vec<Size> {
    let beats = seen.iter().map(|seen| &seen.last);
    let others = beats.filter(|beat| beat.spawner != name && !beat.draining);
    let mut sizes: Vec<Size> = Vec::new();
    for size in others.map(|beat| beat.size.unwrap_or(Size::UNLIMITED)) {
        // A spawner that was started again and again is many, and of one size.
        if !sizes.contains(&size) {
            sizes.push(size);
        }
    }
    sizes
}

/// Who can carry a job.
#[derive(Debug)]
pub(crate) enum Fit {
    Here,
    Elsewhere,
    /// Nobody that lives or may come back; what the job is told.
    Nowhere(Trouble),
}

/// What a job is told that fits nobody.
pub(crate) fn too_large(needs: Size, here: Size) -> Trouble {
    Trouble::failed(
        kind::TOO_LARGE,
        format!(
            "The task may use {needs}, and no spawner that lives, or did within the last {} minutes, has so much (this one has {here}); an admin has to raise SPAWNER_CPUS and SPAWNER_MEMORY_MB of one, or to start a larger one, or the project's limits have to be lowered.",
            LATELY.as_secs() / 60
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
    /// By request, with how often it was handed to us: a hold that ran out comes back to where the job runs.
    jobs: HashMap<String, (usize, Size)>,
    /// Workers that run here and that a former process of ours has started, by request; also when their job has begun again.
    left: BTreeMap<String, Size>,
    /// Requests of which nothing is left since somebody began to look what is left; none while nobody looks.
    gone: Option<HashSet<String>>,
}

/// A job that counts until this is dropped.
pub(crate) struct Counted {
    load: Arc<Load>,
    request: String,
}

impl Load {
    pub(crate) fn new(workers: usize, capacity: &Capacity) -> Self {
        let room = Room {
            free: capacity.size,
            whole: capacity.size,
            others: Vec::new(),
            ours: Vec::new(),
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

    /// Counts the job of a request.
    pub(crate) fn begin(self: &Arc<Self>, request: &str, size: Size) -> Counted {
        self.count(|begun| {
            let job = begun.jobs.entry(request.to_owned());
            job.or_insert((0, size)).0 += 1;
        });
        Counted {
            load: Arc::clone(self),
            request: request.to_owned(),
        }
    }

    /// Somebody begins to look which workers run here; [`Load::found`] says which.
    pub(crate) fn look(&self) {
        self.lock().gone = Some(HashSet::new());
    }

    /// The workers that run here and that no living process watches, by request, as of the last [`Load::look`].
    pub(crate) fn found(&self, left: impl IntoIterator<Item = (String, Size)>) {
        self.count(|begun| {
            let gone = begun.gone.take().unwrap_or_default();
            let mut now: BTreeMap<_, _> = left.into_iter().collect();
            now.retain(|request, _| !gone.contains(request));
            // Its attempt watches it, and says when it is gone.
            let watched = std::mem::take(&mut begun.left).into_iter();
            now.extend(watched.filter(|(request, _)| begun.jobs.contains_key(request)));
            begun.left = now;
        });
    }

    /// Nothing is left of the worker of this request.
    pub(crate) fn gone(&self, request: &str) {
        self.count(|begun| {
            begun.left.remove(request);
            if let Some(gone) = &mut begun.gone {
                gone.insert(request.to_owned());
            }
        });
    }

    /// What the workers may use of the jobs that were begun, and of those that are left here.
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
        let waits: Vec<&String> = waits(&begun).map(|(request, _)| request).collect();
        let (workers, used) = (begun.jobs.len() + waits.len(), used(&begun));
        // Under the lock, so that the last word is the last count.
        self.room.send_if_modified(|room| {
            let free = if workers < self.workers {
                room.whole.minus(used)
            } else {
                Size::ZERO
            };
            let changes = room.free != free || !room.ours.iter().eq(waits.iter().copied());
            room.free = free;
            room.ours = waits.into_iter().cloned().collect();
            changes
        });
    }
}

/// The workers that are left here and whose job was not handed to us again, so far.
fn waits(begun: &Begun) -> impl Iterator<Item = (&String, &Size)> {
    let left = begun.left.iter();
    left.filter(|(request, _)| !begun.jobs.contains_key(*request))
}

fn used(begun: &Begun) -> Size {
    let jobs = begun.jobs.values().map(|(_, size)| size);
    let all = jobs.chain(waits(begun).map(|(_, size)| size));
    all.fold(Size::ZERO, |sum, size| sum.plus(*size))
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.load.count(|begun| {
            if let Entry::Occupied(mut job) = begun.jobs.entry(std::mem::take(&mut self.request)) {
                job.get_mut().0 -= 1;
                if job.get().0 == 0 {
                    job.remove();
                }
            }
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
        let one = load.begin("one", Size::new(1.0, 3000));
        assert_eq!(rooms.borrow().free, Size::new(3.0, 1000));
        // It came back to where it runs.
        drop(load.begin("one", Size::new(1.0, 3000)));
        assert_eq!(rooms.borrow().free, Size::new(3.0, 1000));
        let two = load.begin("two", Size::new(1.0, 500));
        assert_eq!(rooms.borrow().free, Size::ZERO, "both places are taken");
        assert_eq!(load.used(), Size::new(2.0, 3500));
        // One that is handed out to be refused is larger than everything, and leaves no trace.
        let huge = load.begin("huge", Size::UNLIMITED);
        drop(huge);
        drop(one);
        assert_eq!(rooms.borrow().free, Size::new(3.0, 3500));
        drop(two);
        assert_eq!(rooms.borrow().free, capacity.size);
    }

    #[test]
    fn what_a_former_process_left_here_is_not_free_until_it_is_gone_and_counts_once() {
        let size = Size::new(1.0, 1000);
        let load = Arc::new(Load::new(3, &Capacity::of(Size::new(4.0, 4000))));
        let rooms = load.rooms();
        let ours = || rooms.borrow().ours.clone();
        load.look();
        load.found(["a", "b"].map(|id| (id.to_owned(), size)));
        assert_eq!(rooms.borrow().free, Size::new(2.0, 2000));
        assert_eq!(ours(), ["a", "b"]);
        // Its job is handed to us again: it is the same worker.
        let a = load.begin("a", size);
        assert_eq!(rooms.borrow().free, Size::new(2.0, 2000));
        assert_eq!(ours(), ["b"]);
        let c = load.begin("c", size);
        assert_eq!(rooms.borrow().free, Size::ZERO, "all places are taken");
        assert_eq!(load.used(), Size::new(3.0, 3000));
        // Somebody looks while the worker is removed: what was seen before that is not there.
        load.look();
        load.gone("a");
        drop(a);
        load.found(["a", "b"].map(|id| (id.to_owned(), size)));
        assert_eq!(ours(), ["b"]);
        assert_eq!(load.used(), Size::new(2.0, 2000));
        // A job that is given back leaves its worker here; one of ours that is watched is not looked at.
        let b = load.begin("b", size);
        load.look();
        load.found([]);
        drop(b);
        assert_eq!(ours(), ["b"]);
        load.look();
        load.found([]);
        drop(c);
        assert_eq!(rooms.borrow().free, Size::new(4.0, 4000));
    }
}
