//! Forgetting and copying. In memory there is nothing to clean up later: what is forgotten is gone at once.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};

use super::{
    MemoryCheckpointer,
    tables::{Tables, Thread},
};
use crate::{
    checkpoint::{
        BATCH, Channels, Copied, DeleteFilter, Deleted, Forgotten, Keep, PrunePlan, Pruned,
        Retention, StorageError, SurveyFilter, Surveyed, ThreadStatus,
    },
    ids::ThreadId,
    stored::{DELETE_LIMIT, append_items},
};

fn ago(duration: Duration) -> Timestamp {
    SignedDuration::try_from(duration)
        .ok()
        .and_then(|duration| Timestamp::now().checked_sub(duration).ok())
        .unwrap_or(Timestamp::MIN)
}

impl Thread {
    /// The number before which checkpoints go.
    fn cut(&self, keep: &Keep) -> u64 {
        let last = keep.last.map(|count| {
            let skip = usize::try_from(count.max(1) - 1).unwrap_or(usize::MAX);
            self.checkpoints
                .keys()
                .rev()
                .nth(skip)
                .copied()
                .unwrap_or(0)
        });
        let young = keep.newer_than.map(|age| {
            let since = ago(age);
            self.checkpoints
                .iter()
                .find(|(_, checkpoint)| checkpoint.at >= since)
                .map_or(self.newest + 1, |(number, _)| *number)
        });
        match (last, young) {
            (Some(last), Some(young)) => last.min(young),
            (one, other) => one.or(other).unwrap_or(0),
        }
    }

    fn stays(&self, number: u64, before: u64) -> bool {
        number >= before || number == self.record.checkpoint
    }

    /// Those that become the oldest on their way.
    fn bases(&self, before: u64) -> Vec<u64> {
        self.checkpoints
            .iter()
            .filter(|(number, checkpoint)| {
                let parent = checkpoint.new.parent;
                self.stays(**number, before)
                    && !checkpoint.base
                    && parent != 0
                    && !self.stays(parent, before)
            })
            .map(|(number, _)| *number)
            .collect()
    }

    /// Those of them that have no snapshot.
    fn bare_bases(&self, before: u64) -> Vec<u64> {
        let mut bases = self.bases(before);
        bases.retain(|number| self.checkpoints[number].new.snapshot.is_none());
        bases
    }

    fn prune(
        &mut self,
        before: u64,
        snapshots: &BTreeMap<u64, Channels>,
    ) -> Result<Pruned, StorageError> {
        let mut bare = self.bare_bases(before);
        bare.retain(|number| !snapshots.contains_key(number));
        if !bare.is_empty() {
            return Ok(Pruned::Needs(bare));
        }
        // All that can fail comes first.
        let mut bases = Vec::new();
        for base in self.bases(before) {
            let mut appends = Channels::new();
            for number in self.way(base) {
                let mut new = self.checkpoints[&number].new.clone();
                new.settle()?;
                append_items(&mut appends, new.appends);
            }
            bases.push((base, appends));
        }
        for (base, appends) in bases {
            if let Some(checkpoint) = self.checkpoints.get_mut(&base) {
                let new = &mut checkpoint.new;
                new.settle()?;
                new.appends = appends;
                new.changes = Channels::new();
                if new.snapshot.is_none() {
                    new.snapshot = snapshots.get(&base).cloned();
                }
                checkpoint.base = true;
            }
        }
        let gone: Vec<u64> = self
            .checkpoints
            .keys()
            .copied()
            .filter(|number| !self.stays(*number, before))
            .collect();
        for number in &gone {
            self.checkpoints.remove(number);
            self.writes.remove(number);
        }
        let checkpoints = &self.checkpoints;
        let head = self.record.branch;
        self.branches.retain(|branch, tip| {
            *branch == head || tip.tip == 0 || checkpoints.contains_key(&tip.tip)
        });
        Ok(Pruned::Done {
            removed: gone.len() as u64,
            more: false,
        })
    }
}

impl Tables {
    fn copy(&mut self, from: &ThreadId, to: &ThreadId, now: Timestamp) -> Copied {
        let Some(original) = self.threads.get(from) else {
            return Copied::UnknownThread;
        };
        if self.threads.contains_key(to) {
            return Copied::Existing;
        }
        let mut copy = original.clone();
        copy.record.id = to.clone();
        copy.record.parent = None;
        copy.record.lease = None;
        copy.record.cancel = None;
        copy.record.waits = Vec::new();
        copy.record.wake_at = None;
        copy.record.created_at = now;
        copy.record.updated_at = now;
        copy.takeovers = 0;
        if copy.record.status.is_ended() {
            let revived = copy.mailbox.values().any(|mail| mail.revives);
            copy.due_at = revived.then_some(now);
        } else {
            copy.record.status = ThreadStatus::Ready;
            copy.due_at = Some(now);
        }
        self.threads.insert(to.clone(), copy);
        Copied::New
    }
}

#[async_trait]
impl Retention for MemoryCheckpointer {
    async fn prune_plan(&self, thread: &ThreadId, keep: &Keep) -> Result<PrunePlan, StorageError> {
        let tables = self.tables.lock();
        let known = tables.known(thread)?;
        let before = known.cut(keep);
        Ok(PrunePlan {
            before,
            bases: known.bare_bases(before),
        })
    }

    async fn prune(
        &self,
        thread: &ThreadId,
        before: u64,
        snapshots: &BTreeMap<u64, Channels>,
    ) -> Result<Pruned, StorageError> {
        self.tables
            .lock()
            .known_mut(thread)?
            .prune(before, snapshots)
    }

    async fn copy_thread(&self, from: &ThreadId, to: &ThreadId) -> Result<Copied, StorageError> {
        Ok(self.tables.lock().copy(from, to, self.now()))
    }

    async fn delete_threads(&self, filter: &DeleteFilter) -> Result<Deleted, StorageError> {
        let statuses = filter.statuses();
        let limit = filter.limit.unwrap_or(DELETE_LIMIT);
        let changed_before = filter.unchanged_for.map(ago);
        let mut tables = self.tables.lock();
        let mut found = tables.threads.values().filter(|thread| {
            let record = &thread.record;
            (filter.graphs.is_empty() || filter.graphs.contains(&record.graph))
                && filter
                    .prefix
                    .as_ref()
                    .is_none_or(|prefix| record.id.as_str().starts_with(prefix))
                && statuses.contains(&record.status)
                && !(record.status.is_ended() && thread.due_at.is_some())
                && changed_before.is_none_or(|before| record.updated_at < before)
        });
        let threads: Vec<ThreadId> = found
            .by_ref()
            .take(limit)
            .map(|thread| thread.record.id.clone())
            .collect();
        let more = limit > 0 && found.next().is_some();
        for thread in &threads {
            tables.threads.remove(thread);
        }
        Ok(Deleted { threads, more })
    }

    async fn forget_keys(
        &self,
        threads: &[ThreadId],
        age: Duration,
    ) -> Result<Forgotten, StorageError> {
        let before = ago(age);
        let mut forgotten = Forgotten::default();
        let mut tables = self.tables.lock();
        for thread in threads {
            let Some(known) = tables.threads.get_mut(thread) else {
                continue;
            };
            let unread: BTreeSet<&str> = known
                .mailbox
                .values()
                .map(|mail| mail.record.key.as_str())
                .collect();
            let old: Vec<String> = known
                .keys
                .iter()
                .filter(|(key, at)| **at < before && !unread.contains(key.as_str()))
                .map(|(key, _)| key.clone())
                .collect();
            for key in old {
                if forgotten.keys == BATCH as u64 {
                    forgotten.more = true;
                    return Ok(forgotten);
                }
                known.keys.remove(&key);
                forgotten.keys += 1;
            }
        }
        Ok(forgotten)
    }

    async fn survey(&self, filter: &SurveyFilter) -> Result<Vec<Surveyed>, StorageError> {
        let tables = self.tables.lock();
        Ok(tables
            .threads
            .values()
            .filter(|thread| {
                let record = &thread.record;
                (filter.graphs.is_empty() || filter.graphs.contains(&record.graph))
                    && filter
                        .prefix
                        .as_ref()
                        .is_none_or(|prefix| record.id.as_str().starts_with(prefix))
                    && filter.after.as_ref().is_none_or(|after| record.id > *after)
            })
            .take(filter.limit)
            .map(|thread| Surveyed {
                id: thread.record.id.clone(),
                graph: thread.record.graph.clone(),
                status: thread.record.status,
                checkpoints: thread.checkpoints.len() as u64,
            })
            .collect())
    }
}
