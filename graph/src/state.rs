//! State: a struct whose fields are channels, each with a reducer.
//!
//! Both traits here are implemented by `#[derive(State)]`; nobody writes them by hand.

#[cfg(test)]
mod tests;

use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};

use crate::{
    checkpoint::{Channels, Input, StateRow},
    kept::Updates,
    nest::HIDDEN,
};

/// How an update of a channel becomes its new value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Reducer {
    /// The new value replaces the old one; two updates in one step are an error.
    Last,
    /// New items go to the end of a list. Only the new items are stored.
    Append,
    /// New entries are put into a map or a set.
    Merge,
    /// A function folds the update into the value.
    Reduce,
}

/// A channel: a field of the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Channel {
    /// The field's name.
    pub name: &'static str,
    /// What happens to updates.
    pub reducer: Reducer,
}

/// A channel's value is not of the channel's type.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// There is no such channel.
    #[error("there is no channel `{channel}`; the channels are {known}")]
    Unknown {
        /// The name that was given.
        channel: String,
        /// The names that exist.
        known: String,
    },
    /// The value does not fit, or cannot be written as JSON.
    #[error("channel `{channel}`: the value does not fit its type")]
    Value {
        /// The channel.
        channel: &'static str,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The update as a whole is not a JSON object.
    #[error("an update must be a JSON object of channels, not {0}")]
    NotAnObject(&'static str),
}

/// A state: made by `#[derive(State)]` on a struct with named fields.
///
/// The struct also needs `Clone` and `Default` (the state before the first update); the fields' types need serde's traits.
///
/// An unknown channel or a wrong type is a compile error:
///
/// ```
/// #[derive(Clone, Default, graph::State)]
/// struct Job {
///     #[channel(append)]
///     log: Vec<String>,
/// }
/// let update = JobUpdate::default().log(vec!["begun".into()]);
/// ```
/// ```compile_fail,E0599
/// # #[derive(Clone, Default, graph::State)]
/// # struct Job {
/// #     #[channel(append)]
/// #     log: Vec<String>,
/// # }
/// let update = JobUpdate::default().lag(vec!["begun".into()]);
/// ```
/// ```compile_fail,E0308
/// # #[derive(Clone, Default, graph::State)]
/// # struct Job {
/// #     #[channel(append)]
/// #     log: Vec<String>,
/// # }
/// let update = JobUpdate::default().log(7);
/// ```
/// So is a reducer that does not exist, or a state that is not a struct with named fields:
///
/// ```compile_fail
/// #[derive(Clone, Default, graph::State)]
/// struct Job {
///     #[channel(prepend)]
///     log: Vec<String>,
/// }
/// ```
/// ```compile_fail
/// #[derive(Clone, Default, graph::State)]
/// struct Job(Vec<String>);
/// ```
pub trait State: Clone + Default + Send + Sync + 'static {
    /// The partial update.
    type Update: Update;

    /// The channels, in the order of the fields.
    const CHANNELS: &'static [Channel];

    /// Folds an update into the state.
    fn apply(&mut self, update: Self::Update);

    /// The value of the channel at this place in [`State::CHANNELS`], as JSON.
    fn channel(&self, index: usize) -> Result<Value, ChannelError>;

    /// Overwrites the channel at this place in [`State::CHANNELS`].
    fn overwrite(&mut self, index: usize, value: Value) -> Result<(), ChannelError>;

    /// All channels as a JSON object.
    fn channels(&self) -> Result<Channels, ChannelError> {
        let mut channels = Map::new();
        for (index, channel) in Self::CHANNELS.iter().enumerate() {
            channels.insert(channel.name.to_owned(), self.channel(index)?);
        }
        Ok(channels)
    }
}

/// A partial update of a state: made by `#[derive(State)]`, named like the state with `Update` after it.
pub trait Update: Clone + Default + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Whether it changes the channel at this place in [`State::CHANNELS`].
    fn touches(&self, index: usize) -> bool;

    /// What it changes, as a JSON object.
    fn to_channels(&self) -> Result<Channels, ChannelError>;

    /// The inverse of [`Update::to_channels`]; unknown channels are an error.
    fn from_channels(channels: Channels) -> Result<Self, ChannelError>;

    /// From any JSON value: null is the empty update, an object is read by [`Update::from_channels`].
    fn from_json(value: Value) -> Result<Self, ChannelError> {
        match value {
            Value::Null => Ok(Self::default()),
            Value::Object(channels) => Self::from_channels(channels),
            Value::Bool(_) => Err(ChannelError::NotAnObject("a boolean")),
            Value::Number(_) => Err(ChannelError::NotAnObject("a number")),
            Value::String(_) => Err(ChannelError::NotAnObject("a string")),
            Value::Array(_) => Err(ChannelError::NotAnObject("an array")),
        }
    }

    /// The same of a value that is needed afterwards: [`Update::from_json`] without taking it.
    fn read(value: &Value) -> Result<Self, ChannelError> {
        match value {
            Value::Object(channels) => Self::read_channels(channels),
            other => Self::from_json(other.clone()),
        }
    }

    /// [`Update::from_channels`] without taking them.
    fn read_channels(channels: &Channels) -> Result<Self, ChannelError> {
        Self::from_channels(channels.clone())
    }
}

/// What a step changes, in the form in which checkpointers store it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Changes {
    /// Append channels: the new items.
    pub appends: Channels,
    /// The others: last value channels with the value; the rest with an array of updates, in order.
    pub changes: Channels,
}

impl From<Channels> for Changes {
    /// Items of append channels.
    fn from(appends: Channels) -> Self {
        Self {
            appends,
            changes: Channels::new(),
        }
    }
}

impl Changes {
    /// Adds an update.
    pub fn add<S: State>(&mut self, update: &S::Update) -> Result<(), ChannelError> {
        let mut values = update.to_channels()?;
        for channel in S::CHANNELS {
            let Some(value) = values.remove(channel.name) else {
                continue;
            };
            match channel.reducer {
                Reducer::Last => {
                    self.changes.insert(channel.name.to_owned(), value);
                }
                Reducer::Append => {
                    let Value::Array(items) = value else { continue };
                    if items.is_empty() {
                        continue;
                    }
                    match self.appends.get_mut(channel.name) {
                        Some(Value::Array(list)) => list.extend(items),
                        _ => {
                            self.appends
                                .insert(channel.name.to_owned(), Value::Array(items));
                        }
                    }
                }
                Reducer::Merge | Reducer::Reduce => match self.changes.get_mut(channel.name) {
                    Some(Value::Array(list)) => list.push(value),
                    _ => {
                        self.changes
                            .insert(channel.name.to_owned(), Value::Array(vec![value]));
                    }
                },
            }
        }
        Ok(())
    }

    /// Adds later ones.
    pub fn merge<S: State>(&mut self, later: Self) {
        let both = [
            (&mut self.appends, later.appends),
            (&mut self.changes, later.changes),
        ];
        for (present, later) in both {
            for (name, value) in later {
                let replaces = S::CHANNELS
                    .iter()
                    .any(|channel| channel.name == name && channel.reducer == Reducer::Last);
                match (present.get_mut(&name), value) {
                    (Some(Value::Array(list)), Value::Array(more)) if !replaces => {
                        list.extend(more);
                    }
                    (_, value) => {
                        present.insert(name, value);
                    }
                }
            }
        }
    }

    /// As updates that change the same.
    pub fn updates<S: State>(self) -> Result<Vec<S::Update>, ChannelError> {
        let mut first = self.appends;
        let mut further: Vec<Channels> = Vec::new();
        for (name, value) in self.changes {
            let folded = S::CHANNELS.iter().any(|channel| {
                channel.name == name && matches!(channel.reducer, Reducer::Merge | Reducer::Reduce)
            });
            match value {
                Value::Array(updates) if folded => {
                    for (index, update) in updates.into_iter().enumerate() {
                        let at = match index.checked_sub(1) {
                            None => &mut first,
                            Some(index) => {
                                if further.len() <= index {
                                    further.push(Map::new());
                                }
                                &mut further[index]
                            }
                        };
                        at.insert(name.clone(), update);
                    }
                }
                value => {
                    first.insert(name, value);
                }
            }
        }
        std::iter::once(first)
            .chain(further)
            .filter(|channels| !channels.is_empty())
            .map(S::Update::from_channels)
            .collect()
    }

    /// Folds stored changes into a state. Channels that the struct does not have any more are passed over.
    pub fn replay<S: State>(self, state: &mut S) -> Result<(), ChannelError> {
        for (name, value) in self.appends.into_iter().chain(self.changes) {
            let Some(channel) = S::CHANNELS.iter().find(|channel| channel.name == name) else {
                if name.starts_with(HIDDEN) {
                    continue;
                }
                tracing::debug!(channel = %name, "a stored channel is not in the state any more");
                continue;
            };
            match (channel.reducer, value) {
                (Reducer::Merge | Reducer::Reduce, Value::Array(updates)) => {
                    for update in updates {
                        state.apply(single::<S>(&name, update)?);
                    }
                }
                (_, value) => state.apply(single::<S>(&name, value)?),
            }
        }
        Ok(())
    }
}

/// The updates whose effect, one after the other, is that of a row's changes.
pub(crate) fn updates_of<S: State>(row: &StateRow) -> Vec<Value> {
    let kept = row.kept.as_ref().and_then(|kept| kept.json().ok());
    let (appends, changes) = kept.unwrap_or_else(|| (row.appends.clone(), row.changes.clone()));
    let mut updates = vec![appends];
    updates[0].retain(|name, _| !name.starts_with(HIDDEN));
    for (name, value) in changes.iter().filter(|(name, _)| !name.starts_with(HIDDEN)) {
        let folds = S::CHANNELS.iter().any(|channel| {
            channel.name == name && matches!(channel.reducer, Reducer::Merge | Reducer::Reduce)
        });
        match value {
            Value::Array(several) if folds => {
                for (index, value) in several.iter().enumerate() {
                    if updates.len() <= index {
                        updates.push(Map::new());
                    }
                    updates[index].insert(name.clone(), value.clone());
                }
            }
            value => _ = updates[0].insert(name.clone(), value.clone()),
        }
    }
    updates
        .into_iter()
        .filter(|update| !update.is_empty())
        .map(Value::Object)
        .collect()
}

fn single<S: State>(channel: &str, value: Value) -> Result<S::Update, ChannelError> {
    let mut channels = Map::new();
    channels.insert(channel.to_owned(), value);
    S::Update::from_channels(channels)
}

/// Which channels a snapshot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// All but the append ones: their items are in the rows.
    Usual,
    /// All. It stands for everything before it, which may have been something else.
    Whole,
}

impl Extent {
    /// The extent of snapshots on top of these rows. Of what is before a snapshot, all items that were appended are read; so
    /// once one has put other lists in their place, the later ones have to do so too.
    pub fn on<S: State>(rows: &[StateRow]) -> Self {
        let newest = rows.iter().rev().find_map(|row| row.snapshot.as_ref());
        let mut appends = S::CHANNELS.iter().filter(|c| c.reducer == Reducer::Append);
        let is_whole = newest
            .is_some_and(|snapshot| appends.any(|channel| snapshot.contains_key(channel.name)));
        if is_whole { Self::Whole } else { Self::Usual }
    }
}

/// The full values of channels.
pub(crate) fn snapshot<S: State>(state: &S, extent: Extent) -> Result<Channels, ChannelError> {
    let mut channels = Map::new();
    for (index, channel) in S::CHANNELS.iter().enumerate() {
        if extent == Extent::Whole || channel.reducer != Reducer::Append {
            channels.insert(channel.name.to_owned(), state.channel(index)?);
        }
    }
    Ok(channels)
}

/// Rebuilds a state from its first update and the rows of its branch.
pub(crate) fn rebuild<S: State>(input: &Input, mut rows: Vec<StateRow>) -> Result<S, ChannelError> {
    let mut state = S::default();
    if let Some(update) = input.update::<S::Update>()
        && rows.iter().all(|row| row.snapshot.is_none())
    {
        state.apply(update.clone());
        replay(&mut state, rows)?;
        return Ok(state);
    }
    let mut first = Value::clone(input);
    if let Value::Object(channels) = &mut first {
        // What the struct does not have any more is passed over, as in the rows.
        channels.retain(|name, _| S::CHANNELS.iter().any(|channel| channel.name == name));
    }
    forget_settled(&mut first, &mut rows);
    state.apply(S::Update::from_json(first)?);
    replay(&mut state, rows)?;
    Ok(state)
}

/// Folds the rows of a branch into a state.
fn replay<S: State>(state: &mut S, rows: Vec<StateRow>) -> Result<(), ChannelError> {
    for row in rows {
        let mut appends = row.appends;
        let mut changes = row.changes;
        if let Some(kept) = &row.kept {
            if let (Some(updates), None) = (Updates::<S>::of(kept), &row.snapshot) {
                for update in updates {
                    state.apply(update.clone());
                }
                continue;
            }
            // Of another type than the state has now.
            (appends, changes) = kept.json()?;
        }
        if let Some(snapshot) = row.snapshot {
            // A snapshot holds the values after its own step: of that step, only appends to other channels are still to come.
            changes = Map::new();
            for (name, value) in snapshot {
                appends.remove(&name);
                if let Some(index) = S::CHANNELS.iter().position(|c| c.name == name) {
                    state.overwrite(index, value)?;
                }
            }
        }
        Changes { appends, changes }.replay(state)?;
    }
    Ok(())
}

/// Takes out what the newest snapshot has values for anyway: it need not even fit the channels' types.
fn forget_settled(input: &mut Value, rows: &mut [StateRow]) {
    let Some(newest) = rows.iter().rposition(|row| row.snapshot.is_some()) else {
        return;
    };
    let (before, after) = rows.split_at_mut(newest);
    let Some(settled) = after.first().and_then(|row| row.snapshot.as_ref()) else {
        return;
    };
    let forget = |channels: &mut Channels| channels.retain(|name, _| !settled.contains_key(name));
    if let Value::Object(channels) = input {
        forget(channels);
    }
    for row in before {
        forget(&mut row.appends);
        forget(&mut row.changes);
        if let Some(snapshot) = &mut row.snapshot {
            forget(snapshot);
        }
    }
}

/// Rebuilds a state from the values that it had once and what changed since.
pub(crate) fn rebuild_from<S: State>(
    state: &mut S,
    full: Option<Channels>,
    appends: Channels,
    changes: Vec<Channels>,
) -> Result<(), ChannelError> {
    for (name, value) in full.into_iter().flatten() {
        if let Some(index) = S::CHANNELS.iter().position(|c| c.name == name) {
            state.overwrite(index, value)?;
        }
    }
    let appended = Changes {
        appends,
        changes: Map::new(),
    };
    appended.replay(state)?;
    for changes in changes {
        let changed = Changes {
            appends: Map::new(),
            changes,
        };
        changed.replay(state)?;
    }
    Ok(())
}

/// About how many bytes a value takes as JSON; never more than a factor off.
pub(crate) fn weight(value: &Value) -> usize {
    match value {
        Value::Null | Value::Bool(_) | Value::Number(_) => 8,
        Value::String(text) => text.len() + 2,
        Value::Array(items) => items.iter().map(|item| weight(item) + 1).sum::<usize>() + 2,
        Value::Object(fields) => channels_weight(fields),
    }
}

/// The same for a whole object.
pub(crate) fn channels_weight(fields: &Channels) -> usize {
    fields
        .iter()
        .map(|(name, value)| name.len() + weight(value) + 4)
        .sum::<usize>()
        + 2
}
