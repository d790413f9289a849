//! What a spawner has room for, and which of the waiting jobs is the next one for it.
//!
//! The transport decides, because only it sees all jobs, waiting and held: a job of the project of which the fewest jobs are held
//! comes first, and among those the oldest one; what does not fit now is passed over. Nothing is taken that cannot begin, so what
//! waits stays where it is durable and where any spawner can have it.

use crate::{JobDelivery, Limits};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::fmt;
use std::time::Duration;
use tokio::sync::watch;

/// Processors and memory: of a machine, or what a job may use of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Size {
    /// Processors, in thousandths of a core.
    pub cpu_milli: u64,
    /// Memory, in MiB.
    pub memory_mb: u64,
}

impl Size {
    /// Nothing.
    pub const ZERO: Self = Self {
        cpu_milli: 0,
        memory_mb: 0,
    };
    /// More than any job needs.
    pub const UNLIMITED: Self = Self {
        cpu_milli: u64::MAX,
        memory_mb: u64::MAX,
    };

    /// So many cores and MiB.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // what is too much is the most there is
    pub fn new(cores: f64, memory_mb: u64) -> Self {
        Self {
            cpu_milli: (cores * 1000.0).ceil() as u64,
            memory_mb,
        }
    }

    /// What a job may use.
    pub fn of(limits: &Limits) -> Self {
        Self::new(limits.cpu, limits.memory_mb)
    }

    /// Whether this fits into `room`.
    pub fn fits(self, room: Self) -> bool {
        self.cpu_milli <= room.cpu_milli && self.memory_mb <= room.memory_mb
    }

    /// Both together.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_add(other.cpu_milli),
            memory_mb: self.memory_mb.saturating_add(other.memory_mb),
        }
    }

    /// What is left of this beside `other`.
    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        Self {
            cpu_milli: self.cpu_milli.saturating_sub(other.cpu_milli),
            memory_mb: self.memory_mb.saturating_sub(other.memory_mb),
        }
    }
}

impl fmt::Display for Size {
    #[allow(clippy::cast_precision_loss)] // for people
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cores = self.cpu_milli as f64 / 1000.0;
        write!(f, "{cores} cores and {} MiB of memory", self.memory_mb)
    }
}

/// What a spawner that looks for a job has room for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Room {
    /// What is free now.
    pub free: Size,
    /// What is free when nothing runs.
    pub whole: Size,
    /// What the other spawners have when nothing runs: those that live, and those that may come back.
    pub others: Vec<Size>,
    /// Requests whose worker runs here already, left by a former process of this spawner. What they may use is not free, so their
    /// jobs need no more of it, and come first.
    pub ours: Vec<String>,
    /// How long a job may be passed over for smaller ones. Then place is kept free for it until it fits.
    pub patience: Duration,
    /// How long a job that fits no spawner waits for one that is large enough. Then it is handed out all the same, so that
    /// somebody can say so. None: it waits on.
    pub grace: Option<Duration>,
}

/// A room that changes while somebody waits for a job.
pub type Rooms = watch::Receiver<Room>;

impl Room {
    /// Of a spawner with room for everything.
    pub fn unlimited() -> Self {
        Self {
            free: Size::UNLIMITED,
            whole: Size::UNLIMITED,
            others: Vec::new(),
            ours: Vec::new(),
            patience: Duration::MAX,
            grace: None,
        }
    }
}

/// A job that waits.
pub(crate) struct Waiting<'a> {
    /// Its place in the queue.
    pub place: u64,
    pub request: &'a str,
    pub project: &'a str,
    pub size: Size,
    /// For how long it has been in the queue.
    pub age: Duration,
}

/// The place of the next job for this room. `held` is how many jobs of each project are held, by whomever. The script of the
/// transport over Redis says the same in its own words, and the suite holds both to it.
pub(crate) fn choose(
    mut waiting: Vec<Waiting<'_>>,
    held: &HashMap<&str, usize>,
    room: &Room,
) -> Option<u64> {
    let is_ours = |job: &&Waiting<'_>| {
        let here = room.ours.iter().any(|request| request == job.request);
        here && job.size.fits(room.whole)
    };
    let hopeless = |job: &&Waiting<'_>| {
        !job.size.fits(room.whole)
            && !room.others.iter().any(|other| job.size.fits(*other))
            && room.grace.is_some_and(|grace| job.age >= grace)
    };
    waiting.sort_by_key(|job| job.place);
    let first = waiting.iter().find(is_ours);
    if let Some(job) = first.or_else(|| waiting.iter().find(hopeless)) {
        return Some(job.place);
    }
    waiting.sort_by_key(|job| {
        let running = held.get(job.project).copied().unwrap_or_default();
        (running, job.place)
    });
    waiting
        .iter()
        .filter(|job| job.size.fits(room.whole))
        // One that was passed over for too long ends the search: what is free is kept for it.
        .find(|job| job.size.fits(room.free) || job.age >= room.patience)
        .filter(|job| job.size.fits(room.free))
        .map(|job| job.place)
}

/// Until the room changes; for ever when nobody is left who could change it.
pub(crate) async fn changed(rooms: &mut Rooms) {
    if rooms.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

impl JobDelivery {
    /// What the job may use.
    pub fn size(&self) -> Size {
        Size::of(&self.request.limits)
    }
}
