//! What a subgraph leaves of a superstep, so that the next run of the task around it goes on after it. Databases that keep values
//! are given it as it is; the others as JSON.

use std::sync::Arc;

use crate::{
    checkpoint::{Channels, KeptWrite, Noted},
    command::Handover,
    nest::{Input, Kept, Record, Recorded},
    plan::Plan,
    private::chain,
    run::apply::Written,
    state::{Changes, ChannelError, Reducer, State, Update, channels_weight},
};

/// What a subgraph began with.
#[derive(Clone)]
pub(super) enum Given<T: State> {
    /// This update.
    Update(T::Update),
    /// This update on top of what it had kept.
    Kept(T::Update),
    /// The state of the graph around it.
    State,
}

/// The record of a superstep.
#[derive(Clone)]
pub(super) struct Recording<T: State> {
    /// What the subgraph began with; in the first record only.
    pub input: Option<Given<T>>,
    /// What the superstep has changed.
    pub written: Written<T>,
    /// Whether it stands for all records before it.
    pub base: bool,
    /// The full values of all channels but the append ones, after the changes.
    pub full: Option<Channels>,
    /// Whether the graph has a node that cleans up when the thread is cancelled; said with the input.
    pub cleans: bool,
    /// What runs next.
    pub plan: Option<Arc<Plan>>,
    /// What accumulating subgraphs inside have added.
    pub kept: Vec<Kept>,
    pub handovers: Vec<Handover>,
}

impl<T: State> Default for Recording<T> {
    fn default() -> Self {
        Self {
            input: None,
            written: Written::default(),
            base: false,
            full: None,
            cleans: false,
            plan: None,
            kept: Vec::new(),
            handovers: Vec::new(),
        }
    }
}

impl<T: State> Recording<T> {
    /// Reads one. The error says what is wrong with it.
    pub fn read(recorded: &Recorded) -> Result<Self, String> {
        if let Recorded::Kept(kept) = recorded
            && let Some(recording) = kept.downcast::<Self>()
        {
            return Ok(recording.clone());
        }
        let record = recorded.record()?;
        let update = |value| T::Update::from_json(value).map_err(|error| chain(&error));
        Ok(Self {
            input: match record.input {
                Some(Input::Update(value)) => Some(Given::Update(update(value)?)),
                Some(Input::Kept(value)) => Some(Given::Kept(update(value)?)),
                Some(Input::State) => Some(Given::State),
                None => None,
            },
            written: Written::Json(Changes {
                appends: record.appends,
                changes: record.changes,
            }),
            base: record.base,
            full: record.full,
            cleans: record.cleans,
            plan: record.plan.map(Arc::new),
            kept: record.kept,
            handovers: record.handovers,
        })
    }

    /// As JSON.
    pub fn record(&self) -> Result<Record, ChannelError> {
        let update = |update: &T::Update| Ok::<_, ChannelError>(update.to_channels()?.into());
        let changes = self.written.clone().json()?;
        Ok(Record {
            input: match &self.input {
                Some(Given::Update(given)) => Some(Input::Update(update(given)?)),
                Some(Given::Kept(given)) => Some(Input::Kept(update(given)?)),
                Some(Given::State) => Some(Input::State),
                None => None,
            },
            appends: changes.appends,
            changes: changes.changes,
            base: self.base,
            full: self.full.clone(),
            cleans: self.cleans,
            plan: self.plan.as_deref().cloned(),
            kept: self.kept.clone(),
            handovers: self.handovers.clone(),
        })
    }

    /// About how many bytes its changes take as JSON.
    pub fn weight(&self) -> usize {
        match &self.written {
            Written::Json(changes) => weight(changes),
            Written::Values(_) => self
                .written
                .clone()
                .json()
                .map_or(0, |changes| weight(&changes)),
        }
    }

    /// Does to a state what the superstep did.
    pub fn replay(&self, state: &mut T) -> Result<(), ChannelError> {
        match &self.written {
            Written::Values(updates) => {
                for update in updates {
                    state.apply(update.clone());
                }
            }
            Written::Json(changes) => changes.clone().replay(state)?,
        }
        for (name, value) in self.full.iter().flatten() {
            if let Some(index) = T::CHANNELS.iter().position(|c| c.name == *name) {
                state.overwrite(index, value.clone())?;
            }
        }
        Ok(())
    }
}

impl<T: State> Noted for Recording<T> {
    fn json(&self) -> Result<serde_json::Value, ChannelError> {
        // Nothing in a record but the state's own values can fail to be JSON, and those are.
        Ok(serde_json::to_value(self.record()?).unwrap_or_default())
    }
}

impl<T: State> From<Recording<T>> for KeptWrite {
    fn from(recording: Recording<T>) -> Self {
        Self::new(recording)
    }
}

pub(super) fn weight(changes: &Changes) -> usize {
    channels_weight(&changes.appends) + channels_weight(&changes.changes)
}

/// All items of the append channels.
pub(super) fn appends<T: State>(state: &T) -> Result<Channels, ChannelError> {
    let mut appends = Channels::new();
    for (index, channel) in T::CHANNELS.iter().enumerate() {
        if channel.reducer == Reducer::Append {
            appends.insert(channel.name.to_owned(), state.channel(index)?);
        }
    }
    Ok(appends)
}

/// The state that records lead to, for whoever looks on. `before` is what an accumulating subgraph had kept, `around` the state of
/// the graph around. The error says what does not fit.
pub(crate) fn recorded_state<'r, T: State>(
    records: impl IntoIterator<Item = (&'r u32, &'r Recorded)>,
    before: impl FnOnce() -> Result<Arc<T>, String>,
    around: impl FnOnce() -> Result<Arc<T>, String>,
) -> Result<T, String> {
    let mut recordings: Vec<Recording<T>> = Vec::new();
    for (_, recorded) in records {
        let recording = Recording::read(recorded)?;
        if recording.base {
            recordings.clear();
        }
        recordings.push(recording);
    }
    let given = recordings.iter_mut().find_map(|record| record.input.take());
    let mut state = match given {
        Some(Given::Update(update)) => {
            let mut state = T::default();
            state.apply(update);
            state
        }
        Some(Given::Kept(update)) => {
            let mut state = Arc::unwrap_or_clone(before()?);
            state.apply(update);
            state
        }
        Some(Given::State) => Arc::unwrap_or_clone(around()?),
        None => return Err("it is not known what it began with".to_owned()),
    };
    for recording in recordings {
        recording
            .replay(&mut state)
            .map_err(|error| chain(&error))?;
    }
    Ok(state)
}
