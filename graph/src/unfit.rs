//! What is stored of a state, for people: channel by channel, so that one that does not fit its type hides no other.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::{
    checkpoint::{Channels, StateRow, StateRows},
    nest::HIDDEN,
    private::chain,
    state::{ChannelError, Reducer, State, rebuild},
};

/// What is stored of a thread's state at a checkpoint ([`Engine::stored_state`](crate::Engine::stored_state)).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoredState {
    /// The checkpoint.
    pub checkpoint: u64,
    /// The channels. Those that fit are as the graph sees them; the others as they are stored: a value, the items of a list, or
    /// (of a channel that merges, or has a function of its own) an array of the last known value, if there is one, and the
    /// updates since.
    pub channels: Map<String, Value>,
    /// What is wrong with those that do not fit the graph's state, by channel.
    pub faults: BTreeMap<String, String>,
}

impl StoredState {
    pub(crate) fn read<S: State>(
        graph: &str,
        input: &Value,
        rows: StateRows,
    ) -> Result<Self, ChannelError> {
        let mut known = rows.rows;
        for row in &mut known {
            if let Some(kept) = row.kept.take() {
                (row.appends, row.changes) = kept.json()?;
            }
        }
        let mut names: BTreeSet<&str> = S::CHANNELS.iter().map(|channel| channel.name).collect();
        names.extend(
            input
                .as_object()
                .into_iter()
                .flatten()
                .map(|(name, _)| name.as_str()),
        );
        for row in &known {
            let stored = [
                Some(&row.appends),
                Some(&row.changes),
                row.snapshot.as_ref(),
            ];
            let stored = stored.into_iter().flatten().flatten();
            names.extend(stored.map(|(name, _)| name.as_str()));
        }
        let mut read = Self {
            checkpoint: rows.checkpoint,
            channels: Map::new(),
            faults: BTreeMap::new(),
        };
        for name in names.into_iter().filter(|name| !name.starts_with(HIDDEN)) {
            let (value, fault) = channel::<S>(graph, name, input, &known);
            read.channels.insert(name.to_owned(), value);
            if let Some(fault) = fault {
                read.faults.insert(name.to_owned(), fault);
            }
        }
        Ok(read)
    }
}

fn channel<S: State>(
    graph: &str,
    name: &str,
    input: &Value,
    rows: &[StateRow],
) -> (Value, Option<String>) {
    let only = |channels: &Channels| -> Channels {
        let found = channels.get_key_value(name);
        found
            .map(|(name, value)| (name.clone(), value.clone()))
            .into_iter()
            .collect()
    };
    let input = Value::Object(input.as_object().map(only).unwrap_or_default());
    let rows: Vec<StateRow> = rows
        .iter()
        .map(|row| StateRow {
            checkpoint: row.checkpoint,
            appends: only(&row.appends),
            changes: only(&row.changes),
            snapshot: row.snapshot.as_ref().map(only),
            kept: None,
        })
        .collect();
    let place = S::CHANNELS.iter().position(|channel| channel.name == name);
    let Some(index) = place else {
        let fault = format!("the state of graph `{graph}` has no such channel (any more)");
        return (raw(name, None, &input, rows), Some(fault));
    };
    let fits =
        rebuild::<S>(&input.clone().into(), rows.clone()).and_then(|state| state.channel(index));
    match fits {
        Ok(value) => (value, None),
        Err(error) => {
            let reducer = S::CHANNELS[index].reducer;
            (raw(name, Some(reducer), &input, rows), Some(chain(&error)))
        }
    }
}

/// What is stored, put together without knowing the type.
fn raw(name: &str, reducer: Option<Reducer>, input: &Value, rows: Vec<StateRow>) -> Value {
    let mut base = input.get(name).cloned();
    let mut updates = Vec::new();
    for mut row in rows {
        if let Some(value) = row.snapshot.as_mut().and_then(|it| it.remove(name)) {
            base = Some(value);
            updates.clear();
            continue;
        }
        match (row.appends.remove(name), &mut base) {
            (Some(Value::Array(items)), Some(Value::Array(list))) => list.extend(items),
            (Some(items), _) => base = Some(items),
            (None, _) => {}
        }
        match (row.changes.remove(name), reducer) {
            (Some(Value::Array(more)), Some(Reducer::Merge | Reducer::Reduce)) => {
                updates.extend(more);
            }
            (Some(value), _) => base = Some(value),
            (None, _) => {}
        }
    }
    if updates.is_empty() {
        return base.unwrap_or_default();
    }
    Value::Array(base.into_iter().chain(updates).collect())
}
