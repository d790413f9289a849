//! Rounds that make way for a further input, because it asks for that or because they have failed.
//!
//! Nobody takes a run's tasks away while it goes on: a run that hears of such an input stops its tasks and gives its lease back.
//! The next one finds the input in the mailbox and the round unfinished, whether the thread slept, ran here or ran elsewhere.

use std::sync::Arc;

use jiff::Timestamp;

use crate::{
    checkpoint::{
        CancelRequest, HistoryFilter, NewCheckpoint, SignalRecord, Source, StorageError, Then,
        ThreadFilter, ThreadRecord,
    },
    kept::restore,
    plan::Plan,
    private::chain,
    state::{Changes, State, Update},
    waits::{ROLLBACK, is_input, is_reply, preempts},
};

use super::{Broken, Flow, Run, RunShared};

/// How many checkpoints (or children) are read at once on the way back to the beginning of a round.
const PAGE: usize = 500;

const FORGOTTEN: &str = "the checkpoints from before it are no longer kept";

/// Where the round under way began.
struct Round {
    before: Before,
    since: Timestamp,
}

/// What was before a round.
enum Before {
    /// Nothing: it is the thread's first.
    Nothing,
    Checkpoint(u64),
    /// Its beginning is no longer kept.
    Forgotten,
}

impl<S: State> Run<S> {
    /// Whether the round under way is not to go on.
    pub(super) fn must_make_way(&self) -> bool {
        if self.plan.is_over() {
            return false;
        }
        let mailbox = self.shared.mailbox.lock();
        mailbox.any(|signal| preempts(&signal.kind))
            || (self.failed && mailbox.any(|signal| is_input(&signal.kind)))
    }

    /// Stops the round under way and begins with the input that is to come next.
    pub(super) async fn make_way(&mut self) -> Result<Flow, Broken> {
        let inputs = self
            .shared
            .mailbox
            .lock()
            .filtered(|signal| is_input(&signal.kind));
        // What was queued before an input that does not wait comes with it, in order. (Without one, the round has failed.)
        let first = inputs
            .iter()
            .position(|signal| preempts(&signal.kind))
            .unwrap_or(0);
        let Some(input) = inputs.get(first) else {
            return Ok(Flow::On);
        };
        tracing::info!(thread = %self.shared.thread, input = %input.key, "the round under way makes way for an input");
        let round = self.round().await.map_err(|error| self.broke(error))?;
        let children = self
            .children_since(round.since)
            .await
            .map_err(|error| self.broke(error))?;
        let names: Vec<String> = children
            .iter()
            .filter_map(|child| Some(child.parent.as_ref()?.name.clone()))
            .collect();
        let cancels = self.cancels(children);
        // A round that has failed is over, so there is nothing to be taken back.
        if input.kind == ROLLBACK && !self.failed {
            if !cancels.is_empty() {
                let mut commit = self.commit();
                commit.cancels = cancels;
                self.land(commit, &[]).await?;
            }
            self.roll_back(&round, &inputs[..=first], names)
                .await
                .map_err(|error| self.broke(error))?;
            return Ok(Flow::Released);
        }
        self.failed = false;
        let mut left = Some((cancels, names));
        for _ in 0..=first {
            // The step that was stopped counts: what it asked and did must not be taken for what the next one asks and does.
            self.step += 1;
            self.writes.clear();
            let mut commit = self.commit();
            commit.clear_writes = self.shared.is_dirty();
            let (cancels, names) = left.take().unwrap_or_default();
            commit.cancels = cancels;
            commit.consumed.extend(self.shared.discard_replies());
            self.shared.claims.lock().clear();
            if self.shared.forget_waits() {
                commit.waits = Some(Vec::new());
            }
            if let Flow::Released = self.begin(commit, names).await? {
                return Ok(Flow::Released);
            }
        }
        Ok(Flow::On)
    }

    /// After a rollback: the inputs with which the branch began are still in the mailbox, and perhaps answers to questions
    /// of the branch that was left.
    pub(super) async fn forget_begun(&mut self) -> Result<(), Broken> {
        let Some(begun) = self.plan.begun else {
            return Ok(());
        };
        let numbers = {
            let mut mailbox = self.shared.mailbox.lock();
            mailbox.discard_if(|signal| {
                signal.number <= begun && (is_input(&signal.kind) || is_reply(&signal.kind))
            })
        };
        if numbers.is_empty() {
            return Ok(());
        }
        let mut commit = self.commit();
        commit.consumed = numbers;
        self.land(commit, &[]).await?;
        Ok(())
    }

    /// Gives the lease back with what the tasks have done so far.
    pub(super) async fn give_way(
        &mut self,
        tasks: &mut [super::tasks::Task<S>],
    ) -> Result<(), Broken> {
        let mut commit = self.commit();
        Self::record(tasks, &mut commit);
        self.tell_unfinished(tasks);
        commit.then = Then::Yield;
        self.keep(&mut commit);
        self.land(commit, &[]).await?;
        Ok(())
    }

    fn broke(&self, error: StorageError) -> Broken {
        self.shared.fail(error);
        Broken
    }

    /// Finds the newest input on the way to where the thread stands.
    async fn round(&self) -> Result<Round, StorageError> {
        let shared = &*self.shared;
        let mut filter = HistoryFilter {
            branch: Some(shared.branch),
            before: None,
            limit: Some(PAGE),
        };
        loop {
            let page = shared.engine.store.history(&shared.thread, &filter).await?;
            let input = page.iter().find(|record| record.source == Source::Input);
            if let Some(record) = input {
                let plan = serde_json::from_value::<Plan>(record.plan.clone());
                let is_first = record.parent == 0 && plan.is_ok_and(|plan| plan.anew);
                return Ok(Round {
                    before: if is_first {
                        Before::Nothing
                    } else {
                        Before::Checkpoint(record.parent)
                    },
                    since: record.at,
                });
            }
            match page.last() {
                Some(oldest) if page.len() == PAGE => filter.before = Some(oldest.checkpoint),
                Some(oldest) if oldest.parent != 0 => {
                    return Ok(Round {
                        before: Before::Forgotten,
                        since: oldest.at,
                    });
                }
                _ => {
                    return Ok(Round {
                        before: Before::Nothing,
                        since: shared.created_at,
                    });
                }
            }
        }
    }

    /// The children that the round has started. Both times are the database's.
    async fn children_since(&self, since: Timestamp) -> Result<Vec<ThreadRecord>, StorageError> {
        let shared = &*self.shared;
        let mut filter = ThreadFilter {
            parent: Some(shared.thread.clone()),
            limit: Some(PAGE),
            ..ThreadFilter::default()
        };
        let mut children = Vec::new();
        loop {
            let page = shared.engine.store.threads(&filter).await?;
            filter.after = page.last().map(|child| child.id.clone());
            let is_last = page.len() < PAGE;
            children.extend(page.into_iter().filter(|child| child.created_at >= since));
            if is_last {
                return Ok(children);
            }
        }
    }

    /// Requests to cancel those of them that have not ended.
    fn cancels(&self, children: Vec<ThreadRecord>) -> Vec<CancelRequest> {
        let parent = &self.shared.thread;
        children
            .into_iter()
            .filter(|child| !child.status.is_ended())
            .map(|child| CancelRequest {
                thread: child.id,
                reason: format!("the round of `{parent}` that started it made way for an input"),
            })
            .collect()
    }

    /// Begins anew where the thread stood before the round, on a branch of its own, which becomes the head. The lease is gone
    /// then. The branch says up to which signal it has begun with, so that this can be done again after a crash.
    async fn roll_back(
        &self,
        round: &Round,
        inputs: &[SignalRecord],
        children: Vec<String>,
    ) -> Result<(), StorageError> {
        let shared = &*self.shared;
        let store = &shared.engine.store;
        let begun = inputs.last().map_or(0, |signal| signal.number);
        let newest = HistoryFilter {
            limit: Some(1),
            ..HistoryFilter::default()
        };
        let newest = store.history(&shared.thread, &newest).await?;
        let made = newest.first().filter(|record| {
            record.branch != shared.branch
                && serde_json::from_value::<Plan>(record.plan.clone())
                    .is_ok_and(|plan| plan.begun == Some(begun))
        });
        let branch = if let Some(record) = made {
            record.branch
        } else {
            let checkpoint = self.before(round, inputs, begun, children).await?;
            store.fork(&shared.thread, checkpoint).await?.0
        };
        store.set_head(&shared.thread, branch).await?;
        shared.engine.wakes.due(Some(&shared.graph));
        shared.engine.wakes.moved(&shared.thread);
        Ok(())
    }

    /// The checkpoint with which the new branch begins.
    async fn before(
        &self,
        round: &Round,
        inputs: &[SignalRecord],
        begun: u64,
        children: Vec<String>,
    ) -> Result<NewCheckpoint, StorageError> {
        let (store, thread) = (&self.shared.engine.store, &self.shared.thread);
        let (mut state, parent, step) = match round.before {
            // Before its first input, a thread has the default state.
            Before::Nothing => (S::default(), 0, 0),
            Before::Forgotten => return Err(no_way_back(FORGOTTEN)),
            Before::Checkpoint(checkpoint) => {
                let mut rows = match store.state_rows(thread, Some(checkpoint)).await {
                    Err(StorageError::UnknownCheckpoint { .. }) => {
                        return Err(no_way_back(FORGOTTEN));
                    }
                    rows => rows?,
                };
                let record = store.thread(thread).await?;
                let input = record.map(|record| record.input).unwrap_or_default();
                let state =
                    restore::<S>(&input, &mut rows).map_err(|error| no_way_back(&chain(&error)))?;
                (Arc::unwrap_or_clone(state), checkpoint, rows.step)
            }
        };
        let mut changes = Changes::default();
        for input in inputs {
            let update = S::Update::from_json(input.payload.clone())
                .map_err(|error| no_way_back(&chain(&error)))?;
            changes
                .add::<S>(&update)
                .map_err(|error| no_way_back(&chain(&error)))?;
            state.apply(update);
        }
        let plan =
            Plan::entry(&self.graph, &state).map_err(|error| no_way_back(&error.to_string()))?;
        let mut plan = plan.instead_of(&self.plan, children);
        plan.begun = Some(begun);
        let mut snapshot = None;
        if let Before::Nothing = round.before {
            plan.anew = true;
            // Checkpoint 0 has the first input in it: a snapshot of everything stands above that.
            changes = Changes::default();
            let channels = state
                .channels()
                .map_err(|error| no_way_back(&chain(&error)))?;
            snapshot = Some(channels);
        }
        Ok(NewCheckpoint {
            parent,
            branch: 0,
            step,
            source: Source::Input,
            appends: changes.appends,
            changes: changes.changes,
            snapshot,
            plan: serde_json::to_value(&plan).unwrap_or_default(),
            kept: None,
        })
    }
}

/// Fails the thread: the values are at fault, not the database.
fn no_way_back(fault: &str) -> StorageError {
    StorageError::Unstorable {
        what: format!("the round cannot be rolled back: {fault}"),
    }
}

/// Stops the tasks of a run when an input has arrived that does not wait. Never comes back.
pub(crate) async fn watch(shared: &RunShared) {
    loop {
        shared.controls.news.notified().await;
        let seen = shared.mailbox.lock().seen;
        match shared.engine.store.mailbox(&shared.thread, seen).await {
            Ok((signals, _)) => {
                if signals.iter().any(|signal| preempts(&signal.kind)) {
                    shared.controls.make_way();
                }
            }
            // The next heartbeat asks again.
            Err(error) => {
                tracing::warn!(thread = %shared.thread, error = %chain(&error), "looking for an input failed");
            }
        }
    }
}
