//! Looking at threads: their states, their histories, what happens in them.

use std::{any::TypeId, sync::Arc};

use futures::stream::BoxStream;
use serde::Serialize;
use serde_json::Value;

use crate::{
    checkpoint::{CheckpointRecord, HistoryFilter, Source, ThreadFilter, ThreadRecord},
    error::EngineError,
    follow::{Modes, StreamItem, follow},
    ids::ThreadId,
    journal::Journal,
    kept::restore,
    plan::Plan,
    state::State,
    unfit::StoredState,
};

use super::Engine;

/// A checkpoint in a thread's history.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CheckpointInfo {
    /// Its number in the thread; 0 is the input.
    pub checkpoint: u64,
    /// The one before it; none for the input.
    pub parent: Option<u64>,
    /// The branch on which it was written.
    pub branch: u32,
    /// How many supersteps led to it.
    pub step: u64,
    /// Where it came from.
    pub source: Source,
    /// The nodes that were to run next, a node once for each of its tasks.
    pub next: Vec<String>,
    /// When, by the database's clock.
    pub at: jiff::Timestamp,
}

impl From<CheckpointRecord> for CheckpointInfo {
    fn from(record: CheckpointRecord) -> Self {
        let plan: Plan = serde_json::from_value(record.plan).unwrap_or_default();
        Self {
            checkpoint: record.checkpoint,
            parent: Some(record.parent),
            branch: record.branch,
            step: record.step,
            source: record.source,
            next: plan.names(),
            at: record.at,
        }
    }
}

impl Engine {
    /// A thread, if there is one of this id.
    pub async fn thread(
        &self,
        thread: impl Into<ThreadId>,
    ) -> Result<Option<ThreadRecord>, EngineError> {
        Ok(self.shared.store.thread(&thread.into()).await?)
    }

    /// Threads, in the order of their ids.
    pub async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, EngineError> {
        Ok(self.shared.store.threads(filter).await?)
    }

    /// The state of a thread at its head.
    pub async fn state<S: State>(&self, thread: impl Into<ThreadId>) -> Result<S, EngineError> {
        let thread = thread.into();
        let record = self.require(&thread).await?;
        let graph = self.shared.graph(&record.graph)?;
        if graph.state_type() != TypeId::of::<S>() {
            return Err(EngineError::OtherState {
                thread,
                graph: record.graph,
            });
        }
        let mut rows = self.shared.store.state_rows(&thread, None).await?;
        let checkpoint = rows.checkpoint;
        let state = restore(&record.input, &mut rows);
        state
            .map(Arc::unwrap_or_clone)
            .map_err(|source| EngineError::StoredState {
                thread,
                checkpoint,
                graph: record.graph,
                source,
            })
    }

    /// The state of a thread at a checkpoint (0: its input), as an object of channels.
    pub async fn state_at(
        &self,
        thread: impl Into<ThreadId>,
        checkpoint: u64,
    ) -> Result<Value, EngineError> {
        let thread = thread.into();
        let record = self.require(&thread).await?;
        let rows = self
            .shared
            .store
            .state_rows(&thread, Some(checkpoint))
            .await?;
        self.shared
            .graph(&record.graph)?
            .values(&record.input, rows)
            .map_err(|source| EngineError::StoredState {
                thread,
                checkpoint,
                graph: record.graph,
                source,
            })
    }

    /// What is stored of the state of a thread at a checkpoint (absent: at its head), channel by channel, whether or not it fits
    /// the type of its graph's state.
    pub async fn stored_state(
        &self,
        thread: impl Into<ThreadId>,
        checkpoint: impl Into<Option<u64>>,
    ) -> Result<StoredState, EngineError> {
        let (thread, checkpoint) = (thread.into(), checkpoint.into());
        let record = self.require(&thread).await?;
        let rows = self.shared.store.state_rows(&thread, checkpoint).await?;
        let checkpoint = rows.checkpoint;
        self.shared
            .graph(&record.graph)?
            .stored(&record.input, rows)
            .map_err(|source| EngineError::StoredState {
                thread,
                checkpoint,
                graph: record.graph,
                source,
            })
    }

    /// The checkpoints of a thread, newest first, down to its input (number 0).
    pub async fn history(
        &self,
        thread: impl Into<ThreadId>,
        filter: HistoryFilter,
    ) -> Result<Vec<CheckpointInfo>, EngineError> {
        let thread = thread.into();
        let record = self.require(&thread).await?;
        let records = self.shared.store.history(&thread, &filter).await?;
        let mut history: Vec<CheckpointInfo> = records.into_iter().map(Into::into).collect();
        let wants_input = filter.before.is_none_or(|before| before > 0);
        if wants_input && history.len() < filter.limit.unwrap_or(100) {
            history.push(CheckpointInfo {
                checkpoint: 0,
                parent: None,
                branch: 0,
                step: 0,
                source: Source::Input,
                next: Vec::new(),
                at: record.created_at,
            });
        }
        Ok(history)
    }

    /// What has been said, by all threads.
    pub fn journal(&self) -> Journal {
        Journal::new(self.shared.clone())
    }

    /// What happens in a thread from now on, wherever it runs; ends with the thread. One that has not been started yet, or has
    /// ended, is followed from its start, or its next round.
    ///
    /// What happens in this process comes as it happens: all kinds of items, from the moment this returns, in a defined order:
    /// - tasks that start, in the order of their paths (nodes by name, then sends by index);
    /// - custom items and messages, as nodes send them, and attempts that failed and are made again;
    /// - when the step is in the database: for each task, in the order of the paths, that it finished, and its updates; the
    ///   values; the checkpoint.
    /// - When a step does not get to its end, because a task waits, fails for good or is cancelled: the tasks that ran, and
    ///   then the suspension or the end. Tasks that had finished do not run again; their updates are marked as cached.
    /// - What happens inside of a subgraph, in the same order, between the start of the task that it runs in and what came of
    ///   that; subgraphs that run at the same time are told apart by their namespaces.
    ///
    /// Of what happens in other processes there is what the database keeps ([`StreamItem::live`] is false), from the moment the
    /// stream is first polled: of each checkpoint the updates of its step (together), the values, and the checkpoint;
    /// suspensions that last until it looks; the end. It comes as soon as a message tells of it (see [`Bell`](crate::checkpoint::Bell)), else within a second. Custom items,
    /// messages and tasks are stored nowhere, so there are none. Values and updates need the thread's graph in this engine.
    ///
    /// A thread may move between processes at any time: each checkpoint is told once, and in order. A reader that is more than
    /// 1,024 items behind is told how many it missed.
    pub fn follow(
        &self,
        thread: impl Into<ThreadId>,
        modes: Modes,
    ) -> BoxStream<'static, StreamItem> {
        follow(self.shared.clone(), thread.into(), None, modes)
    }

    /// Like [`Engine::follow`], but from a checkpoint on (0: the input), so that nothing is missed between what a reader knows
    /// and now: what is in the database comes first. Ends at once when the thread has ended there.
    pub fn follow_from(
        &self,
        thread: impl Into<ThreadId>,
        checkpoint: u64,
        modes: Modes,
    ) -> BoxStream<'static, StreamItem> {
        follow(self.shared.clone(), thread.into(), Some(checkpoint), modes)
    }
}
