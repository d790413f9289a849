//! Jobs or results in memory, by order of arrival, each perhaps held by somebody.

use crate::room::{self, Waiting};
use crate::{Room, Size, SpawnRequest, TransportError};
use std::collections::{BTreeMap, HashMap};
use tokio::time::Instant;

/// Entries by order of arrival, each perhaps held by somebody.
pub(super) struct Queue<T> {
    pub entries: BTreeMap<u64, Entry<T>>,
    orders: HashMap<String, u64>,
}

pub(super) struct Entry<T> {
    pub id: String,
    pub message: T,
    pub deliveries: u32,
    /// When it came, or when this program began.
    since: Instant,
    pub hold: Option<Hold>,
}

impl<T> Entry<T> {
    fn is_free(&self, now: Instant) -> bool {
        self.hold.as_ref().is_none_or(|hold| hold.until <= now)
    }
}

pub(super) struct Hold {
    pub receipt: String,
    pub until: Instant,
}

impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            orders: HashMap::new(),
        }
    }
}

impl<T> Queue<T> {
    pub fn insert(&mut self, order: u64, id: String, message: T, deliveries: u32) {
        self.orders.insert(id.clone(), order);
        self.entries.insert(
            order,
            Entry {
                id,
                message,
                deliveries,
                since: Instant::now(),
                hold: None,
            },
        );
    }

    pub fn get(&self, id: &str) -> Option<&Entry<T>> {
        self.orders
            .get(id)
            .and_then(|order| self.entries.get(order))
    }

    /// The oldest entry that nobody holds (any more).
    pub fn free(&self, now: Instant) -> Option<u64> {
        self.entries
            .iter()
            .find(|(_, entry)| entry.is_free(now))
            .map(|(order, _)| *order)
    }

    /// When the next hold runs out.
    pub fn next_expiry(&self) -> Option<Instant> {
        self.entries
            .values()
            .filter_map(|entry| entry.hold.as_ref().map(|hold| hold.until))
            .min()
    }

    pub fn held(&mut self, receipt: &str) -> Result<(u64, &mut Entry<T>), TransportError> {
        receipt
            .rsplit_once('#')
            .and_then(|(id, _)| self.orders.get(id).copied())
            .and_then(|order| self.entries.get_mut(&order).map(|entry| (order, entry)))
            .filter(|(_, entry)| {
                entry
                    .hold
                    .as_ref()
                    .is_some_and(|hold| hold.receipt == receipt)
            })
            .ok_or_else(|| TransportError::NotHeld {
                receipt: receipt.to_owned(),
            })
    }

    pub fn remove(&mut self, order: u64) {
        if let Some(entry) = self.entries.remove(&order) {
            self.orders.remove(&entry.id);
        }
    }
}

impl Queue<SpawnRequest> {
    /// The next job for this room.
    pub fn fitting(&self, now: Instant, room: &Room) -> Option<u64> {
        let mut held: HashMap<&str, usize> = HashMap::new();
        let mut waiting = Vec::new();
        for (place, entry) in &self.entries {
            let project = entry.message.project_id.as_str();
            if entry.is_free(now) {
                waiting.push(Waiting {
                    place: *place,
                    request: &entry.id,
                    project,
                    size: Size::of(&entry.message.limits),
                    age: now.duration_since(entry.since),
                });
            } else {
                *held.entry(project).or_default() += 1;
            }
        }
        room::choose(waiting, &held, room)
    }
}
