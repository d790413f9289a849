//! The checkpoint with which a new branch begins.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    builder::Compiled,
    checkpoint::{Channels, Input, NewCheckpoint, Source, StateRows},
    error::EngineError,
    ids::ThreadId,
    kept::restore,
    nest::Pasts,
    plan::Plan,
    state::{Changes, State, Update},
};

/// What a fork does to the state.
pub(crate) enum Forked {
    /// Updates it.
    Update(Value),
    /// Puts these values of all channels in its place.
    State(Channels),
}

/// The checkpoint of a fork: the state at a checkpoint, changed as if by a node.
pub(crate) fn forked<S: State>(
    graph: &Compiled<S>,
    thread: &ThreadId,
    input: &Input,
    mut rows: StateRows,
    as_node: Option<&str>,
    change: Forked,
) -> Result<NewCheckpoint, EngineError> {
    let checkpoint = rows.checkpoint;
    let mut changes = Changes::default();
    let mut snapshot = None;
    let (mut state, update) = match change {
        Forked::Update(update) => {
            let update = S::Update::from_json(update)?;
            changes.add::<S>(&update)?;
            let state = restore::<S>(input, &mut rows);
            let state = state.map_err(|source| EngineError::StoredState {
                thread: thread.clone(),
                checkpoint,
                graph: graph.name.to_string(),
                source,
            })?;
            (Arc::unwrap_or_clone(state), update)
        }
        Forked::State(mut channels) => {
            let mut state = S::default();
            for (index, channel) in S::CHANNELS.iter().enumerate() {
                if let Some(value) = channels.get(channel.name) {
                    state.overwrite(index, value.clone())?;
                }
            }
            // What accumulating subgraphs have kept stays.
            Pasts::of(&rows).put(&mut channels);
            snapshot = Some(channels);
            (state, S::Update::default())
        }
    };
    let bad_plan = |fault: String| EngineError::Fork {
        thread: thread.clone(),
        fault,
    };
    let mut plan = match rows.plan {
        Some(plan) => serde_json::from_value::<Plan>(plan).map_err(|error| {
            bad_plan(format!(
                "the plan of checkpoint {}: {error}",
                rows.checkpoint
            ))
        })?,
        None => Plan::entry(graph, &state).map_err(|error| bad_plan(error.to_string()))?,
    };
    state.apply(update);
    if let Some(node) = as_node {
        if !graph.nodes.contains_key(node) {
            return Err(EngineError::UnknownNode {
                graph: graph.name.to_string(),
                node: node.to_owned(),
            });
        }
        plan = plan
            .as_if(graph, node, &state)
            .map_err(|error| bad_plan(error.to_string()))?;
    }
    plan.hops = 0;
    plan.version = Plan::VERSION;
    Ok(NewCheckpoint {
        parent: rows.checkpoint,
        branch: rows.branch,
        step: rows.step,
        source: Source::Update(as_node.unwrap_or_default().to_owned()),
        appends: changes.appends,
        changes: changes.changes,
        snapshot,
        plan: serde_json::to_value(&plan).unwrap_or_default(),
        kept: None,
    })
}
