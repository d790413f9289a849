//! The checkpoint with which a new branch begins.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    builder::Compiled,
    checkpoint::{NewCheckpoint, Source, StateRows},
    command::Outcome,
    error::EngineError,
    ids::ThreadId,
    kept::restore,
    plan::{Finished, Plan},
    state::{Changes, State, Update},
};

/// The checkpoint of a fork: the state at a checkpoint, updated as if by a node.
pub(crate) fn forked<S: State>(
    graph: &Compiled<S>,
    thread: &ThreadId,
    input: &Value,
    mut rows: StateRows,
    as_node: Option<&str>,
    update: Value,
) -> Result<NewCheckpoint, EngineError> {
    let update = S::Update::from_json(update)?;
    let mut state = Arc::unwrap_or_clone(restore::<S>(input, &mut rows)?);
    let mut changes = Changes::default();
    changes.add::<S>(&update)?;
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
        let outcome = Outcome::from(());
        let finished = [Finished::<S> {
            node,
            outcome: &outcome,
        }];
        let mut next = plan
            .next(graph, &finished, None, &state)
            .map_err(|error| bad_plan(error.to_string()))?;
        // What else was planned still is.
        plan.nodes.remove(node);
        next.nodes.append(&mut plan.nodes);
        plan.sends.retain(|send| send.node() != node);
        plan.sends.append(&mut next.sends);
        next.sends = plan.sends;
        plan = next;
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
        snapshot: None,
        plan: serde_json::to_value(&plan).unwrap_or_default(),
        kept: None,
    })
}
