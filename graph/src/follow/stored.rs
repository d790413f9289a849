//! What the database keeps of a run in another process.

use serde_json::Value;

use super::{Modes, StreamItem, StreamKind};
use crate::{
    checkpoint::{CheckpointRecord, HistoryFilter, Source, ThreadRecord},
    engine::CheckpointInfo,
    error::EngineError,
    host::Shared,
    plan::Plan,
};

/// How many checkpoints are listed at once.
const PAGE: usize = 200;

/// How many checkpoints a reader may lag behind before it misses some (and is told).
const MOST: usize = 5_000;

/// A checkpoint that is to be told, and what was planned before it.
pub(super) struct Untold {
    record: CheckpointRecord,
    /// The plan of the one before; absent when that is the input, or is not there any more.
    planned: Option<Value>,
}

impl Untold {
    pub fn checkpoint(&self) -> u64 {
        self.record.checkpoint
    }

    pub fn parent(&self) -> u64 {
        self.record.parent
    }

    pub fn step(&self) -> u64 {
        self.record.step
    }
}

/// Checkpoints on the way to the head with a number above `after`, up to `last`, oldest first.
pub(super) async fn untold(
    shared: &Shared,
    thread: &ThreadRecord,
    after: u64,
    last: u64,
) -> Result<Vec<Untold>, EngineError> {
    let mut records: Vec<CheckpointRecord> = Vec::new();
    let mut before = last.saturating_add(1);
    // One more than is asked for: its plan says what the first one ran.
    while records.len() < MOST && records.last().is_none_or(|it| it.checkpoint > after) {
        let filter = HistoryFilter {
            branch: Some(thread.branch),
            before: Some(before),
            limit: Some(PAGE),
        };
        let page = shared.store.history(&thread.id, &filter).await?;
        let Some(oldest) = page.last() else { break };
        before = oldest.checkpoint;
        let whole = page.len() == PAGE;
        records.extend(page);
        if !whole {
            break;
        }
    }
    records.reverse();
    let mut untold = Vec::new();
    let mut previous: Option<CheckpointRecord> = None;
    for record in records {
        if record.checkpoint > after {
            let planned = previous
                .filter(|it| it.checkpoint == record.parent)
                .map(|it| it.plan);
            untold.push(Untold {
                record: record.clone(),
                planned,
            });
        }
        previous = Some(record);
    }
    Ok(untold)
}

/// The items of a checkpoint.
pub(super) async fn items(
    shared: &Shared,
    thread: &ThreadRecord,
    untold: &Untold,
    modes: Modes,
) -> Result<Vec<StreamItem>, EngineError> {
    let record = &untold.record;
    let (at, step) = (record.at, record.step);
    let mut kinds = Vec::new();
    let graph = shared.graph(&thread.graph).ok();
    if let Some(graph) = graph.filter(|_| modes.has(Modes::VALUES | Modes::UPDATES)) {
        let rows = shared
            .store
            .state_rows(&thread.id, Some(record.checkpoint))
            .await?;
        // When what was before a checkpoint is forgotten, it holds the appended items of all that, and not only its own.
        let is_own = untold.planned.is_some() || record.parent == 0;
        if modes.has(Modes::UPDATES) && record.source != Source::Input && is_own {
            let own = rows
                .rows
                .iter()
                .find(|row| row.checkpoint == record.checkpoint);
            kinds.push(StreamKind::StepUpdates {
                nodes: match (&record.source, &untold.planned) {
                    (Source::Update(node), _) => vec![node.clone()],
                    (_, Some(plan)) => serde_json::from_value::<Plan>(plan.clone())
                        .map(|plan| plan.names())
                        .unwrap_or_default(),
                    (_, None) if record.parent == 0 => graph.entry(&thread.input),
                    _ => Vec::new(),
                },
                updates: own.map(|row| graph.updates(row)).unwrap_or_default(),
            });
        }
        if modes.has(Modes::VALUES) {
            let values =
                graph
                    .values(&thread.input, rows)
                    .map_err(|source| EngineError::StoredState {
                        thread: thread.id.clone(),
                        checkpoint: record.checkpoint,
                        graph: thread.graph.clone(),
                        source,
                    })?;
            kinds.push(StreamKind::Values(values));
        }
    }
    if modes.has(Modes::CHECKPOINTS) {
        kinds.push(StreamKind::Checkpoint(CheckpointInfo::from(record.clone())));
    }
    Ok(kinds
        .into_iter()
        .map(|kind| item(thread, step, at, kind))
        .collect())
}

pub(super) fn item(
    thread: &ThreadRecord,
    step: u64,
    at: jiff::Timestamp,
    kind: StreamKind,
) -> StreamItem {
    StreamItem {
        thread: thread.id.clone(),
        namespace: Vec::new(),
        step,
        at,
        live: false,
        kind,
    }
}
