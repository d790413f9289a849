//! What the database keeps of a run in another process.

use std::collections::VecDeque;

use serde_json::Value;

use super::{Modes, StreamItem, StreamKind};
use crate::{
    checkpoint::{CheckpointRecord, HistoryFilter, Source, StateRows, ThreadRecord},
    engine::CheckpointInfo,
    error::EngineError,
    host::Shared,
    ids::ThreadId,
    plan::Plan,
};

/// How many checkpoints are listed at once.
const PAGE: usize = 200;

/// How many checkpoints a reader may lag behind before it misses some (and is told).
const MOST: usize = 5_000;

/// For how many checkpoints a reader reads states ahead.
const AHEAD: usize = 50;

/// What was read of the states at checkpoints that are still to be told. What leads to one leads to those before it too, back to
/// the newest snapshot on the way; so few requests read many states.
#[derive(Default)]
pub(super) struct Ahead {
    /// The newest first.
    read: Vec<StateRows>,
}

impl Ahead {
    /// What leads to the first of these checkpoints.
    pub async fn rows(
        &mut self,
        shared: &Shared,
        thread: &ThreadId,
        untold: &VecDeque<Untold>,
    ) -> Result<Option<StateRows>, EngineError> {
        let Some(first) = untold.front().map(Untold::checkpoint) else {
            return Ok(None);
        };
        while self.read.last().is_some_and(|it| it.checkpoint < first) {
            self.read.pop();
        }
        if let Some(rows) = self.known(first) {
            return Ok(Some(rows));
        }
        // From another branch, or from before something was forgotten.
        self.read.clear();
        let mut last = untold.len().min(AHEAD);
        // Each time back to a snapshot before the last one.
        while let Some(target) = untold.get(last.saturating_sub(1)) {
            let target = target.checkpoint();
            let read = shared.store.state_rows(thread, Some(target)).await?;
            let settled = settled(&read);
            let is_kept = read.state.is_some();
            self.read.push(read);
            if target == first || (!is_kept && settled <= first) {
                break;
            }
            last = if is_kept {
                // Nothing is saved where states are kept as they are: one at a time.
                self.read.clear();
                1
            } else {
                untold
                    .iter()
                    .take_while(|it| it.checkpoint() < settled)
                    .count()
            };
        }
        Ok(self.known(first))
    }

    fn known(&self, checkpoint: u64) -> Option<StateRows> {
        let read = self.read.last()?;
        if read.checkpoint == checkpoint {
            return Some(read.clone());
        }
        if read.state.is_some() || settled(read) > checkpoint {
            return None;
        }
        let rows = read.rows.iter().filter(|row| row.checkpoint <= checkpoint);
        Some(StateRows {
            checkpoint,
            rows: rows.cloned().collect(),
            branch: read.branch,
            step: read.step,
            plan: None,
            since_snapshot: None,
            state: None,
        })
    }
}

/// From which checkpoint on the rows are complete.
fn settled(rows: &StateRows) -> u64 {
    let newest = rows.rows.iter().rev().find(|row| row.snapshot.is_some());
    newest.map_or(0, |row| row.checkpoint)
}

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

/// The items of the first of these checkpoints.
pub(super) async fn items(
    shared: &Shared,
    thread: &ThreadRecord,
    untold: &VecDeque<Untold>,
    ahead: &mut Ahead,
    modes: Modes,
) -> Result<Vec<StreamItem>, EngineError> {
    let Some(first) = untold.front() else {
        return Ok(Vec::new());
    };
    let record = &first.record;
    let (at, step) = (record.at, record.step);
    let mut kinds = Vec::new();
    let graph = shared.graph(&thread.graph).ok();
    let rows = if graph.is_some() && modes.has(Modes::VALUES | Modes::UPDATES) {
        ahead.rows(shared, &thread.id, untold).await?
    } else {
        None
    };
    if let (Some(graph), Some(rows)) = (graph, rows) {
        // When what was before a checkpoint is forgotten, it holds the appended items of all that, and not only its own.
        let is_own = first.planned.is_some() || record.parent == 0;
        if modes.has(Modes::UPDATES) && record.source != Source::Input && is_own {
            let own = rows
                .rows
                .iter()
                .find(|row| row.checkpoint == record.checkpoint);
            kinds.push(StreamKind::StepUpdates {
                nodes: match (&record.source, &first.planned) {
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
