//! Results of nodes from the cache, and into it.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use crate::{
    cache::{CacheEntry, CachePolicy, CacheSpace},
    checkpoint::StorageError,
    private::chain,
    state::State,
};

use super::{
    Run,
    tasks::{Status, Task, outcome_from, outcome_to},
};

/// A cache that takes longer is not waited for: it must not hold up what it is there to hasten.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a step puts into the cache when it has landed, by node.
pub(super) type Fresh = BTreeMap<Arc<str>, Vec<CacheEntry>>;

impl<S: State> Run<S> {
    /// Finishes tasks whose results are in the cache. Trouble with the cache is a miss.
    pub(super) async fn take_cached(&self, tasks: &mut [Task<S>]) {
        if !self.graph.caches {
            return;
        }
        let mut wanted: BTreeMap<Arc<str>, Vec<usize>> = BTreeMap::new();
        for (index, task) in tasks.iter_mut().enumerate() {
            let Some(policy) = &task.node.options.cache else {
                continue;
            };
            if !matches!(task.status, Status::Ready)
                || task.failure.is_some()
                || !task.memo.lock().is_pure()
            {
                continue;
            }
            match policy.make_key(&*self.state, task.planned.argument.as_ref()) {
                Ok(key) => {
                    task.cache_key = Some(key);
                    wanted
                        .entry(task.node.name.clone())
                        .or_default()
                        .push(index);
                }
                Err(fault) => {
                    tracing::warn!(thread = %self.shared.thread, node = %task.node.name, fault, "a key for the cache could not be made; the node runs");
                }
            }
        }
        for (node, indices) in wanted {
            let space = self.space(&node);
            let keys: Vec<String> = indices
                .iter()
                .filter_map(|index| tasks[*index].cache_key.clone())
                .collect();
            let getting = self.shared.engine.cache.get(&space, &keys);
            let Some(found) = self.patiently(&space, getting).await else {
                continue;
            };
            for (index, value) in indices.into_iter().zip(found) {
                let Some(value) = value else { continue };
                match outcome_from::<S>(value) {
                    Ok(outcome) => {
                        tasks[index].status = Status::Done(outcome);
                        tasks[index].cached = true;
                    }
                    Err(error) => {
                        tracing::warn!(thread = %self.shared.thread, %node, %error, "what the cache holds does not fit the graph any more; the node runs");
                    }
                }
            }
        }
    }

    /// What this step has to give to the cache: pure results of tasks that ran in it.
    pub(super) fn cacheable(&self, tasks: &[Task<S>]) -> Fresh {
        let mut fresh = Fresh::new();
        if !self.graph.caches {
            return fresh;
        }
        for task in tasks {
            if let Status::Done(outcome) = &task.status
                && !task.cached
                && let Some(key) = &task.cache_key
                && let Some(policy) = &task.node.options.cache
                && task.memo.lock().is_pure()
                && let Ok(value) = outcome_to(outcome)
            {
                fresh
                    .entry(task.node.name.clone())
                    .or_default()
                    .push(CacheEntry {
                        key: key.clone(),
                        value,
                        ttl: policy.ttl,
                    });
            }
        }
        fresh
    }

    /// Puts it there. Trouble with the cache is nobody else's.
    pub(super) async fn keep_cached(&self, fresh: Fresh) {
        for (node, entries) in fresh {
            let limits = self
                .graph
                .nodes
                .get(&*node)
                .and_then(|node| node.options.cache.as_ref())
                .map(|policy: &CachePolicy| policy.limits)
                .unwrap_or_default();
            let space = self.space(&node);
            let putting = self.shared.engine.cache.put(&space, entries, limits);
            self.patiently(&space, putting).await;
        }
    }

    fn space(&self, node: &str) -> CacheSpace {
        CacheSpace::new(&*self.graph.name, node)
    }

    async fn patiently<T>(
        &self,
        space: &CacheSpace,
        work: impl Future<Output = Result<T, StorageError>>,
    ) -> Option<T> {
        match tokio::time::timeout(PATIENCE, work).await {
            Ok(Ok(done)) => Some(done),
            Ok(Err(error)) => {
                tracing::warn!(thread = %self.shared.thread, %space, error = %chain(&error), "the cache failed; going on without it");
                None
            }
            Err(_) => {
                tracing::warn!(thread = %self.shared.thread, %space, patience = ?PATIENCE, "the cache did not answer in time; going on without it");
                None
            }
        }
    }
}
