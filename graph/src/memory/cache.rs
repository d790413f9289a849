//! A cache in memory: of one process, gone with it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Instant,
};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    cache::{Cache, CacheEntry, CacheLimits, CacheSpace, SWEEP_ROWS},
    checkpoint::StorageError,
};

/// A [`Cache`] in memory. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct MemoryCache {
    spaces: Arc<Mutex<Spaces>>,
}

#[derive(Debug, Default)]
struct Spaces {
    by_name: HashMap<CacheSpace, Space>,
    /// What expires when: the time, then the entry's number.
    expiries: BTreeMap<(Instant, u64), (CacheSpace, String)>,
    /// How many entries were ever put.
    count: u64,
}

#[derive(Debug, Default)]
struct Space {
    entries: HashMap<String, Kept>,
    /// Keys by the numbers of their entries: what was put first comes first.
    order: BTreeMap<u64, String>,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    value: Value,
    number: u64,
    bytes: usize,
    expires_at: Option<Instant>,
}

impl MemoryCache {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl Spaces {
    fn remove(&mut self, space: &CacheSpace, key: &str) {
        let Some(found) = self.by_name.get_mut(space) else {
            return;
        };
        let Some(kept) = found.entries.remove(key) else {
            return;
        };
        found.order.remove(&kept.number);
        found.bytes -= kept.bytes;
        if found.entries.is_empty() {
            self.by_name.remove(space);
        }
        if let Some(at) = kept.expires_at {
            self.expiries.remove(&(at, kept.number));
        }
    }

    fn put(&mut self, space: &CacheSpace, entry: CacheEntry, now: Instant) {
        self.remove(space, &entry.key);
        self.count += 1;
        let number = self.count;
        let bytes = entry.value.to_string().len();
        let expires_at = entry.ttl.and_then(|ttl| now.checked_add(ttl));
        if let Some(at) = expires_at {
            self.expiries
                .insert((at, number), (space.clone(), entry.key.clone()));
        }
        let found = self.by_name.entry(space.clone()).or_default();
        found.order.insert(number, entry.key.clone());
        found.bytes += bytes;
        let kept = Kept {
            value: entry.value,
            number,
            bytes,
            expires_at,
        };
        found.entries.insert(entry.key, kept);
    }

    /// Removes a batch of what has expired.
    fn expire(&mut self, now: Instant) {
        for _ in 0..SWEEP_ROWS {
            let Some(((at, _), (space, key))) = self.expiries.first_key_value() else {
                return;
            };
            if *at > now {
                return;
            }
            let (space, key) = (space.clone(), key.clone());
            self.remove(&space, &key);
        }
    }

    fn oldest_over(&self, space: &CacheSpace, limits: CacheLimits) -> Option<String> {
        let found = self.by_name.get(space)?;
        if found.entries.len() <= limits.entries && found.bytes <= limits.bytes {
            return None;
        }
        found.order.first_key_value().map(|(_, key)| key.clone())
    }
}

#[async_trait]
impl Cache for MemoryCache {
    async fn get(
        &self,
        space: &CacheSpace,
        keys: &[String],
    ) -> Result<Vec<Option<Value>>, StorageError> {
        let now = Instant::now();
        let spaces = self.spaces.lock();
        let found = spaces.by_name.get(space);
        Ok(keys
            .iter()
            .map(|key| {
                let kept = found?.entries.get(key)?;
                kept.expires_at
                    .is_none_or(|at| at > now)
                    .then(|| kept.value.clone())
            })
            .collect())
    }

    async fn put(
        &self,
        space: &CacheSpace,
        entries: Vec<CacheEntry>,
        limits: CacheLimits,
    ) -> Result<(), StorageError> {
        let now = Instant::now();
        let mut spaces = self.spaces.lock();
        spaces.expire(now);
        for entry in entries {
            spaces.put(space, entry, now);
        }
        while let Some(key) = spaces.oldest_over(space, limits) {
            spaces.remove(space, &key);
        }
        Ok(())
    }

    async fn clear(&self, space: &CacheSpace) -> Result<u64, StorageError> {
        let mut spaces = self.spaces.lock();
        let Some(found) = spaces.by_name.remove(space) else {
            return Ok(0);
        };
        for kept in found.entries.values() {
            if let Some(at) = kept.expires_at {
                spaces.expiries.remove(&(at, kept.number));
            }
        }
        Ok(found.entries.len() as u64)
    }
}
