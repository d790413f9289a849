//! Forgetting, deleting and copying threads.

use std::{collections::BTreeMap, time::Duration};

use tokio_util::sync::CancellationToken;

use crate::{
    checkpoint::{
        BATCH, Copied, DeleteFilter, Deleted, Keep, Pruned, StorageError, SurveyFilter, Surveyed,
        ThreadStatus,
    },
    engine::Engine,
    error::EngineError,
    host::Shared,
    ids::ThreadId,
};

/// How often pruning is tried while somebody forks the thread's history at the same time.
const ATTEMPTS: usize = 4;

/// How many threads one batch of a sweep looks at.
const SWEPT_AT_ONCE: usize = 100;

/// How many batches of one thread's checkpoints one batch of a sweep cleans up.
const BATCHES_EACH: usize = 4;

/// What one batch of pruning did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PruneOutcome {
    /// How many checkpoints left the database in this batch.
    pub removed: u64,
    /// Whether there is more to clean up: prune again. What is to go can be seen by nobody any more, in either case.
    pub more: bool,
}

/// What a sweep forgets. With nothing set, nothing.
///
/// Checkpoints stay when one of `keep`'s rules keeps them; the head always does, and the state at it. The journal stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RetentionPolicy {
    /// Only threads of these graphs, of those that the engine knows; empty: of all that it knows.
    pub graphs: Vec<String>,
    /// Only threads whose ids begin so.
    pub prefix: Option<String>,
    /// Which checkpoints stay. Threads that have not ended may have a quarter more (16 at least) before they are pruned, so that one
    /// that runs is not pruned over and over.
    pub keep: Keep,
    /// Threads that have ended, and have not changed for so long, are deleted.
    pub delete_ended_after: Option<Duration>,
    /// The keys of consumed signals are forgotten after so long. Whoever sends a signal, an input or an answer later than that for the
    /// second time sends a new one; so this should be longer than anybody tries again.
    pub forget_keys_after: Option<Duration>,
}

/// What one batch of a sweep did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Swept {
    /// How many threads were looked at.
    pub seen: usize,
    /// How many checkpoints left the database.
    pub checkpoints: u64,
    /// Threads that were deleted.
    pub deleted: Vec<ThreadId>,
    /// How many keys of signals were forgotten.
    pub keys: u64,
    /// How many documents had expired and were cleaned up.
    pub documents: u64,
    /// Threads that could not be pruned, and why. They are left as they are.
    pub failed: Vec<(ThreadId, String)>,
    /// Where the next batch goes on: hand it to [`Engine::sweep`]. Nothing: every thread has been looked at.
    pub next: Option<ThreadId>,
}

/// How a server sweeps. See [`ServeOptions::sweep`](crate::ServeOptions).
#[derive(Clone, Debug)]
pub struct SweepOptions {
    /// What is forgotten.
    pub policy: RetentionPolicy,
    /// How long it rests after every thread has been looked at.
    pub every: Duration,
    /// How long it rests after each batch of a hundred threads.
    pub pause: Duration,
}

impl SweepOptions {
    /// Sweeps by this policy, every ten minutes.
    pub fn new(policy: RetentionPolicy) -> Self {
        Self {
            policy,
            every: Duration::from_mins(10),
            pause: Duration::from_millis(100),
        }
    }
}

impl Engine {
    /// Forgets checkpoints of a thread: those that `keep` does not name go, with their pending writes. The state at each of those that
    /// stay is exactly what it was; the input (number 0), the journal and a run under way are not touched.
    ///
    /// Each call cleans up a bounded amount behind it; call it again while it says that there is more.
    pub async fn prune(
        &self,
        thread: impl Into<ThreadId>,
        keep: Keep,
    ) -> Result<PruneOutcome, EngineError> {
        let thread = thread.into();
        prune(&self.shared, &thread, &keep).await
    }

    /// Copies a thread, as it is at this moment, under a new id: history with all branches, state, pending writes, mailbox.
    ///
    /// The copy is a thread of its own, without a parent. It has ended if the original has; otherwise it is due at once, and goes on
    /// from where the original was: if that waited, the copy's first run finds that it waits too and sleeps, for answers under ids
    /// of its own, so that none that is meant for the original reaches it. What the original has done in durable steps, and said,
    /// the copy does not do or say again; what it does from now on, it does once more, beside the original. Children are not
    /// copied: a copy that waits for one hears of no end that comes later.
    pub async fn copy_thread(
        &self,
        from: impl Into<ThreadId>,
        to: impl Into<ThreadId>,
    ) -> Result<(), EngineError> {
        let (from, to) = (from.into(), to.into());
        if let Some(fault) = to.fault() {
            return Err(EngineError::InvalidThreadId {
                id: to.as_str().chars().take(80).collect(),
                fault,
            });
        }
        match self
            .shared
            .store
            .retention()
            .copy_thread(&from, &to)
            .await?
        {
            Copied::New => {
                self.shared.wake();
                Ok(())
            }
            Copied::Existing => Err(EngineError::ThreadExists(to)),
            Copied::UnknownThread => Err(EngineError::UnknownThread(from)),
        }
    }

    /// Deletes a batch of threads: those that have ended, unless the filter names other statuses. Their children and what they said
    /// stay. Call it again while it says that there is more.
    pub async fn delete_threads(&self, filter: &DeleteFilter) -> Result<Deleted, EngineError> {
        Ok(self.shared.store.retention().delete_threads(filter).await?)
    }

    /// Forgets by a policy, at most a hundred threads at a time: after the one that the last batch ended with
    /// ([`Swept::next`]; nothing for the first batch). Cleans up behind deleted threads and expired documents, too. Several processes may sweep at the same time.
    pub async fn sweep(
        &self,
        policy: &RetentionPolicy,
        after: Option<&ThreadId>,
    ) -> Result<Swept, EngineError> {
        Ok(sweep(&self.shared, policy, after).await?)
    }
}

async fn prune(
    shared: &Shared,
    thread: &ThreadId,
    keep: &Keep,
) -> Result<PruneOutcome, EngineError> {
    let retention = shared.store.retention();
    let plan = retention.prune_plan(thread, keep).await?;
    if plan.before == 0 {
        return Ok(PruneOutcome::default());
    }
    let mut snapshots = BTreeMap::new();
    let mut needed = plan.bases;
    for _ in 0..ATTEMPTS {
        if !needed.is_empty() {
            let record = shared
                .store
                .thread(thread)
                .await?
                .ok_or_else(|| EngineError::UnknownThread(thread.clone()))?;
            let graph = shared.graph(&record.graph)?;
            for base in needed {
                let rows = match shared.store.state_rows(thread, Some(base)).await {
                    Ok(rows) => rows,
                    // Somebody else has pruned more meanwhile.
                    Err(StorageError::UnknownCheckpoint { .. }) => continue,
                    Err(error) => return Err(error.into()),
                };
                let snapshot = graph.snapshot(&record.input, rows).map_err(|source| {
                    EngineError::StoredState {
                        thread: thread.clone(),
                        checkpoint: base,
                        graph: record.graph.clone(),
                        source,
                    }
                })?;
                snapshots.insert(base, snapshot);
            }
        }
        match retention.prune(thread, plan.before, &snapshots).await? {
            Pruned::Done { removed, more } => return Ok(PruneOutcome { removed, more }),
            // Somebody has forked it, or made another branch the head.
            Pruned::Needs(bases) => needed = bases,
        }
    }
    Ok(PruneOutcome {
        removed: 0,
        more: true,
    })
}

async fn sweep(
    shared: &Shared,
    policy: &RetentionPolicy,
    after: Option<&ThreadId>,
) -> Result<Swept, StorageError> {
    let retention = shared.store.retention();
    let mut swept = Swept::default();
    let graphs: Vec<String> = shared
        .graphs
        .keys()
        .filter(|graph| policy.graphs.is_empty() || policy.graphs.contains(graph))
        .cloned()
        .collect();
    if graphs.is_empty() {
        return Ok(swept);
    }
    // Without an age, it only cleans up behind threads that were deleted before.
    let ended = DeleteFilter {
        graphs: graphs.clone(),
        prefix: policy.prefix.clone(),
        unchanged_for: policy.delete_ended_after,
        limit: Some(policy.delete_ended_after.map_or(0, |_| SWEPT_AT_ONCE)),
        ..DeleteFilter::default()
    };
    swept.deleted = retention.delete_threads(&ended).await?.threads;
    if let Some(documents) = &shared.documents {
        swept.documents = documents.store().sweep(BATCH).await?;
    }
    let threads = retention
        .survey(&SurveyFilter {
            graphs,
            prefix: policy.prefix.clone(),
            after: after.cloned(),
            limit: SWEPT_AT_ONCE,
        })
        .await?;
    swept.seen = threads.len();
    if threads.len() == SWEPT_AT_ONCE {
        swept.next = threads.last().map(|thread| thread.id.clone());
    }
    if let Some(age) = policy.forget_keys_after {
        let ids: Vec<ThreadId> = threads.iter().map(|thread| thread.id.clone()).collect();
        for _ in 0..BATCHES_EACH {
            let forgotten = retention.forget_keys(&ids, age).await?;
            swept.keys += forgotten.keys;
            if !forgotten.more {
                break;
            }
        }
    }
    for thread in threads {
        if !is_ripe(&thread, &policy.keep) {
            continue;
        }
        for _ in 0..BATCHES_EACH {
            match prune(shared, &thread.id, &policy.keep).await {
                Ok(done) => {
                    swept.checkpoints += done.removed;
                    if !done.more {
                        break;
                    }
                }
                // It was deleted meanwhile.
                Err(
                    EngineError::UnknownThread(_)
                    | EngineError::Storage(StorageError::UnknownThread(_)),
                ) => break,
                Err(error) => {
                    let reason = crate::private::chain(&error);
                    swept.failed.push((thread.id, reason));
                    break;
                }
            }
        }
    }
    Ok(swept)
}

/// Whether it is worth while to look closer.
fn is_ripe(thread: &Surveyed, keep: &Keep) -> bool {
    if keep.is_everything() || thread.checkpoints < 2 {
        return false;
    }
    let ended = matches!(
        thread.status,
        ThreadStatus::Done | ThreadStatus::Failed | ThreadStatus::Cancelled
    );
    match keep.last {
        Some(last) if ended => thread.checkpoints > last,
        Some(last) => thread.checkpoints > last.saturating_add((last / 4).max(16)),
        None => true,
    }
}

/// Sweeps until told to stop. A database that fails is left alone for a while.
pub(crate) async fn keep_swept(
    shared: std::sync::Arc<Shared>,
    options: SweepOptions,
    stop: CancellationToken,
) {
    let mut after = None;
    loop {
        let rest = match sweep(&shared, &options.policy, after.as_ref()).await {
            Ok(swept) => {
                for (thread, reason) in &swept.failed {
                    tracing::warn!(%thread, error = %reason, "the thread could not be pruned; it is left as it is");
                }
                if swept.checkpoints > 0
                    || swept.keys > 0
                    || swept.documents > 0
                    || !swept.deleted.is_empty()
                {
                    tracing::info!(
                        threads = swept.seen,
                        checkpoints = swept.checkpoints,
                        deleted = swept.deleted.len(),
                        keys = swept.keys,
                        documents = swept.documents,
                        "swept"
                    );
                }
                let unfinished = swept.deleted.len() == SWEPT_AT_ONCE;
                after = swept.next;
                if after.is_some() || unfinished {
                    options.pause
                } else {
                    options.every
                }
            }
            Err(error) => {
                tracing::warn!(error = %crate::private::chain(&error), "sweeping failed");
                after = None;
                options.every
            }
        };
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = stop.cancelled() => return,
        }
    }
}
