//! The end of a superstep: folds what its tasks handed back into the state, plans, and commits.

use std::{pin::pin, sync::Arc};

use serde_json::Value;

use crate::{
    checkpoint::{Channels, KeptStep, NewCheckpoint, Source, Then, ThreadStatus},
    follow::Modes,
    kept::Updates,
    nest::Kept,
    plan::{Finished, Plan, PlanError, conflicts},
    private::{chain, meanwhile},
    state::{Changes, ChannelError, State, channels_weight, snapshot},
};

use super::{
    Broken, Flow, Run,
    tasks::{Status, Task},
    tell::Landed,
};

/// After so many checkpoints without one, a snapshot is considered.
pub(super) const SNAPSHOT_AFTER: u64 = 32;
/// After so many, it is made, whatever it weighs.
pub(super) const SNAPSHOT_AT_LAST: u64 = 1024;

#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("an update cannot be stored: {}", chain(.0))]
    Channel(#[from] ChannelError),
    #[error(
        "node `{node}` addressed the parent of its graph, but `{graph}` runs as a thread of its own here and has none"
    )]
    NoParent { node: String, graph: String },
}

/// What a step changed, as its database wants it.
#[derive(Clone)]
pub(super) enum Written<S: State> {
    Json(Changes),
    Values(Vec<S::Update>),
}

impl<S: State> Written<S> {
    pub(super) fn json(self) -> Result<Changes, ChannelError> {
        match self {
            Self::Json(changes) => Ok(changes),
            Self::Values(updates) => {
                let mut changes = Changes::default();
                for update in &updates {
                    changes.add::<S>(update)?;
                }
                Ok(changes)
            }
        }
    }
}

impl<S: State> Default for Written<S> {
    fn default() -> Self {
        Self::Values(Vec::new())
    }
}

impl<S: State> Run<S> {
    /// All tasks are done: applies their writes, plans, commits.
    pub(super) async fn apply(
        &mut self,
        mut tasks: Vec<Task<S>>,
        names: &[String],
    ) -> Result<Flow, Broken> {
        // By task path: nodes by name, then sends by index, whatever finished first.
        tasks.sort_by_key(|task| task.planned.order);
        let wanted = self.shared.wanted();
        let fresh = self.cacheable(&tasks);
        let added = kept(&mut tasks);
        let applied = self
            .fold(&mut tasks, wanted.has(Modes::UPDATES))
            .and_then(|(written, plan)| Ok((self.add_kept(added, written)?, plan)));
        let (changes, plan) = match applied {
            Ok(applied) => applied,
            Err(fault) => {
                // The tasks have to run again, once the program is put right.
                let mut commit = self.commit();
                Self::record_void(&mut tasks, &mut commit);
                self.fail(commit, &fault.to_string(), None).await?;
                return Ok(Flow::Released);
            }
        };
        self.step += 1;
        self.plan = Arc::new(plan);
        self.writes.clear();
        let mut commit = self.commit();
        commit.clear_writes = self.shared.is_dirty();
        for task in &tasks {
            let mut memo = task.memo.lock();
            memo.flush_consumed(&mut commit);
            if !task.recorded {
                memo.flush_said(&mut commit);
            }
        }
        // Answers to questions of this step that nobody needs any more.
        commit.consumed.extend(self.shared.discard_replies());
        if self.shared.forget_waits() {
            commit.waits = Some(Vec::new());
        }
        self.shared.claims.lock().clear();
        commit.checkpoint = Some(self.checkpoint(changes, Source::Step));
        let ends = self.plan.is_over();
        if ends {
            self.done(&mut commit);
        } else if self.shared.controls.drain.is_cancelled() {
            commit.then = Then::Yield;
            self.keep(&mut commit);
        }
        let parent = commit.base;
        let over = || {
            if wanted == Modes::NONE {
                tasks.clear();
            }
        };
        let receipt = {
            let landed = pin!(self.land(commit, names));
            meanwhile(landed, over).await?
        };
        self.keep_cached(fresh).await;
        if wanted != Modes::NONE {
            self.tell(&tasks, Landed::on(parent, &receipt));
        }
        if ends {
            self.ended(ThreadStatus::Done);
        }
        Ok(if receipt.released {
            Flow::Released
        } else {
            Flow::On
        })
    }

    /// Folds what the tasks handed back into the state, and finds out what comes next.
    pub(super) fn fold(
        &mut self,
        tasks: &mut [Task<S>],
        followed: bool,
    ) -> Result<(Written<S>, Plan), Fault> {
        let finished = finished(tasks);
        conflicts(&finished)?;
        if self.place.is_none()
            && let Some(task) = finished
                .iter()
                .find(|task| !task.outcome.handovers.is_empty())
        {
            return Err(Fault::NoParent {
                node: task.node.to_owned(),
                graph: self.graph.name.to_string(),
            });
        }
        let changes = self.written(finished.iter().flat_map(|task| &task.outcome.updates))?;
        // Only conditional edges of nodes that did not run alone need the state as it was.
        let needs_before = finished.len() > 1
            && finished.iter().any(|task| {
                self.graph
                    .nodes
                    .get(task.node)
                    .is_some_and(|node| !node.conditions.is_empty())
            });
        if needs_before {
            let before = self.state.clone();
            let state = Arc::make_mut(&mut self.state);
            for update in finished.iter().flat_map(|task| &task.outcome.updates) {
                state.apply(update.clone());
            }
            let plan = self
                .plan
                .next(&self.graph, &finished, Some(&*before), &self.state)?;
            return Ok((changes, plan));
        }
        // Nobody else holds the state now, so it changes in place; whoever follows the run gets copies of the updates.
        let state = Arc::make_mut(&mut self.state);
        for task in &mut *tasks {
            let Status::Done(outcome) = &mut task.status else {
                continue;
            };
            if followed {
                for update in &outcome.updates {
                    state.apply(update.clone());
                }
            } else {
                for update in std::mem::take(&mut outcome.updates) {
                    state.apply(update);
                }
            }
        }
        let plan = self
            .plan
            .next(&self.graph, &self::finished(tasks), None, &self.state)?;
        Ok((changes, plan))
    }

    /// Adds what accumulating subgraphs have added.
    pub(super) fn add_kept(
        &self,
        kept: Vec<Kept>,
        written: Written<S>,
    ) -> Result<Written<S>, ChannelError> {
        if kept.is_empty() {
            return Ok(written);
        }
        let mut changes = written.json()?;
        self.shared.pasts.lock().add(kept, &mut changes);
        Ok(Written::Json(changes))
    }

    /// What updates are written down as.
    pub(super) fn written<'u>(
        &self,
        updates: impl IntoIterator<Item = &'u S::Update>,
    ) -> Result<Written<S>, ChannelError> {
        let updates = updates.into_iter();
        if self.keeps {
            return Ok(Written::Values(updates.cloned().collect()));
        }
        let mut changes = Changes::default();
        for update in updates {
            changes.add::<S>(update)?;
        }
        Ok(Written::Json(changes))
    }

    pub(super) fn checkpoint(&mut self, written: Written<S>, source: Source) -> NewCheckpoint {
        let mut checkpoint = NewCheckpoint {
            parent: self.shared.base(),
            branch: self.shared.branch,
            step: self.step,
            source,
            appends: Channels::new(),
            changes: Channels::new(),
            snapshot: None,
            plan: Value::Null,
            kept: None,
        };
        match written {
            Written::Values(updates) => {
                let plan = self.plan.clone();
                checkpoint.kept = Some(KeptStep::new(Updates::<S> { updates, plan }));
            }
            Written::Json(changes) => {
                self.changed_since_snapshot += channels_weight(&changes.changes);
                self.since_snapshot += 1;
                // Who keeps the state itself needs none.
                if !self.keeps {
                    checkpoint.snapshot = self.snapshot();
                }
                checkpoint.plan = serde_json::to_value(&*self.plan).unwrap_or_default();
                checkpoint.appends = changes.appends;
                checkpoint.changes = changes.changes;
            }
        }
        checkpoint
    }

    /// From time to time, so that reading back stays bounded, but not so often that snapshots outweigh the changes.
    pub(super) fn snapshot(&mut self) -> Option<Channels> {
        if self.since_snapshot < self.next_snapshot || self.changed_since_snapshot <= 2 {
            return None;
        }
        let mut snapshot = snapshot(&*self.state, self.extent).ok()?;
        self.shared.pasts.lock().put(&mut snapshot);
        if channels_weight(&snapshot) > self.changed_since_snapshot
            && self.since_snapshot < SNAPSHOT_AT_LAST
        {
            self.next_snapshot = self.since_snapshot * 2;
            return None;
        }
        self.since_snapshot = 0;
        self.changed_since_snapshot = 0;
        self.next_snapshot = SNAPSHOT_AFTER;
        Some(snapshot)
    }
}

/// What accumulating subgraphs have added in a step, in the order of its tasks.
pub(super) fn kept<S: State>(tasks: &mut [Task<S>]) -> Vec<Kept> {
    let mut kept = Vec::new();
    for task in tasks {
        if let Status::Done(outcome) = &mut task.status {
            kept.append(&mut outcome.kept);
        }
    }
    kept
}

fn finished<S: State>(tasks: &[Task<S>]) -> Vec<Finished<'_, S>> {
    tasks
        .iter()
        .filter_map(|task| match &task.status {
            Status::Done(outcome) => Some(Finished {
                node: &task.planned.node,
                outcome,
            }),
            _ => None,
        })
        .collect()
}
