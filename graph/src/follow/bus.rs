//! Hands items to readers in this process.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::{Modes, StreamItem, StreamKind};
use crate::ids::ThreadId;

/// How many items a reader may lag behind before it misses some (and is told).
const CAPACITY: usize = 1024;

/// Where in the history something happens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spot {
    /// The superstep, from 1; 0 where there is none.
    pub step: u64,
    /// The checkpoint on which it happens: what led there was told before, or has to be told now.
    pub on: u64,
    /// The checkpoint that it is a part of, once that is written.
    pub part_of: Option<u64>,
}

/// What lies in a reader's queue.
pub(super) enum Queued {
    /// An item, and where it happened.
    Item(Box<StreamItem>, Spot),
    /// A checkpoint was written, but the reader does not want to know.
    Passed(Spot),
}

impl Queued {
    pub fn spot(&self) -> Spot {
        match self {
            Self::Item(_, spot) | Self::Passed(spot) => *spot,
        }
    }
}

/// What a reader has not read yet.
pub(super) struct Queue {
    modes: Modes,
    inner: Mutex<Inner>,
    /// Rings when something was added.
    pub added: Notify,
}

#[derive(Default)]
struct Inner {
    waiting: VecDeque<Queued>,
    /// How many items were dropped before those that are waiting.
    missed: u64,
    /// The newest checkpoint that they were part of.
    missed_checkpoint: u64,
}

/// What a reader finds first.
pub(super) enum First {
    Nothing,
    /// So many items were dropped, up to this checkpoint.
    Missed(u64, u64),
    /// Something at this spot.
    Something(Spot),
}

impl Queue {
    fn push(&self, queued: Queued) {
        let mut inner = self.inner.lock();
        if inner.waiting.len() >= CAPACITY
            && let Some(dropped) = inner.waiting.pop_front()
        {
            inner.missed += u64::from(matches!(dropped, Queued::Item(..)));
            let checkpoint = dropped.spot().part_of.unwrap_or_default();
            inner.missed_checkpoint = inner.missed_checkpoint.max(checkpoint);
        }
        match (inner.waiting.back_mut(), &queued) {
            // One mark is as good as many.
            (Some(Queued::Passed(before)), Queued::Passed(now)) => {
                before.part_of = now.part_of;
                before.step = now.step;
            }
            _ => inner.waiting.push_back(queued),
        }
        drop(inner);
        self.added.notify_one();
    }

    /// What comes first. Telling that something was missed is telling it.
    pub fn first(&self) -> First {
        let mut inner = self.inner.lock();
        if inner.missed > 0 {
            let missed = std::mem::take(&mut inner.missed);
            return First::Missed(missed, inner.missed_checkpoint);
        }
        match inner.waiting.front() {
            Some(queued) => First::Something(queued.spot()),
            None => First::Nothing,
        }
    }

    pub fn pop(&self) -> Option<Queued> {
        self.inner.lock().waiting.pop_front()
    }

    pub fn is_empty(&self) -> bool {
        let inner = self.inner.lock();
        inner.waiting.is_empty() && inner.missed == 0
    }
}

/// The readers of all threads that are followed in this process.
#[derive(Clone, Default)]
pub(crate) struct Bus {
    threads: Arc<Mutex<HashMap<ThreadId, Vec<Arc<Queue>>>>>,
    /// How many threads are followed, so that those of an engine without readers need no lock.
    followed: Arc<AtomicUsize>,
}

impl Bus {
    /// What the readers of a thread want to know.
    pub fn wants(&self, thread: &ThreadId) -> Modes {
        if self.followed.load(Ordering::Acquire) == 0 {
            return Modes::NONE;
        }
        self.threads
            .lock()
            .get(thread)
            .map_or(Modes::NONE, |queues| {
                queues
                    .iter()
                    .fold(Modes::NONE, |modes, queue| modes | queue.modes)
            })
    }

    /// Whether anybody follows a thread.
    pub fn is_followed(&self, thread: &ThreadId) -> bool {
        self.followed.load(Ordering::Acquire) > 0 && self.threads.lock().contains_key(thread)
    }

    pub fn send(&self, thread: &ThreadId, namespace: &[String], spot: Spot, kind: StreamKind) {
        if self.followed.load(Ordering::Acquire) == 0 {
            return;
        }
        let queues = match self.threads.lock().get(thread) {
            Some(queues) => queues.clone(),
            None => return,
        };
        let modes = kind.modes();
        let marks = matches!(kind, StreamKind::Checkpoint(_));
        let item = StreamItem {
            thread: thread.clone(),
            namespace: namespace.to_vec(),
            step: spot.step,
            at: Timestamp::now(),
            live: true,
            kind,
        };
        for queue in queues {
            // What belongs to every mode is for those too who asked for none.
            if queue.modes.has(modes) || modes == Modes::ALL {
                queue.push(Queued::Item(Box::new(item.clone()), spot));
            } else if marks {
                queue.push(Queued::Passed(spot));
            }
        }
    }

    pub(super) fn subscribe(&self, thread: &ThreadId, modes: Modes) -> Subscription {
        let queue = Arc::new(Queue {
            modes,
            inner: Mutex::default(),
            added: Notify::new(),
        });
        let mut threads = self.threads.lock();
        threads
            .entry(thread.clone())
            .or_default()
            .push(queue.clone());
        self.followed.store(threads.len(), Ordering::Release);
        Subscription {
            bus: self.clone(),
            thread: thread.clone(),
            queue,
        }
    }
}

/// While it lives, items are put into the queue.
pub(super) struct Subscription {
    bus: Bus,
    thread: ThreadId,
    pub queue: Arc<Queue>,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut threads = self.bus.threads.lock();
        if let Some(queues) = threads.get_mut(&self.thread) {
            queues.retain(|queue| !Arc::ptr_eq(queue, &self.queue));
            if queues.is_empty() {
                threads.remove(&self.thread);
            }
        }
        self.bus.followed.store(threads.len(), Ordering::Release);
    }
}
