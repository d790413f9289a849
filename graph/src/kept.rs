//! What is handed to checkpointers that keep values instead of writing them down: updates and states, with their types.

use std::sync::Arc;

use serde_json::Value;

use crate::{
    builder::Compiled,
    checkpoint::{Channels, Input, KeptState, KeptStep, StateRows, Step, Whole},
    nest::Pasts,
    plan::Plan,
    private::chain,
    state::{Changes, ChannelError, State, rebuild},
};

/// The updates of a step, in the order in which they are applied, and what comes next.
pub(crate) struct Updates<S: State> {
    pub updates: Vec<S::Update>,
    pub plan: Arc<Plan>,
}

impl<S: State> Step for Updates<S> {
    fn changes(&self) -> Result<(Channels, Channels), ChannelError> {
        let mut changes = Changes::default();
        for update in &self.updates {
            changes.add::<S>(update)?;
        }
        Ok((changes.appends, changes.changes))
    }

    fn plan(&self) -> Value {
        serde_json::to_value(&*self.plan).unwrap_or_default()
    }
}

impl<S: State> Updates<S> {
    /// The updates of a stored step, if the state is of this type.
    pub fn of(step: &KeptStep) -> Option<&[S::Update]> {
        Some(&step.downcast::<Self>()?.updates)
    }
}

/// A state between two steps, and the graph that knows what to make of it.
pub(crate) struct Held<S: State> {
    pub state: Arc<S>,
    pub graph: Arc<Compiled<S>>,
    /// What accumulating subgraphs have kept.
    pub pasts: Pasts,
}

impl<S: State> Whole for Held<S> {
    fn output(&self) -> Value {
        output(&self.graph, &self.state)
    }

    fn pasts(&self) -> Pasts {
        self.pasts.clone()
    }
}

impl<S: State> Held<S> {
    /// The stored state, if it is of this type.
    pub fn of(state: &KeptState) -> Option<Arc<S>> {
        Some(state.downcast::<Self>()?.state.clone())
    }
}

/// What a thread returns that ends with this state.
pub(crate) fn output<S: State>(graph: &Compiled<S>, state: &S) -> Value {
    match &graph.output {
        Some(output) => output(state),
        None => match state.channels() {
            Ok(channels) => Value::Object(channels),
            Err(error) => {
                tracing::warn!(graph = %graph.name, error = %chain(&error), "the state cannot be written down as the output");
                Value::Null
            }
        },
    }
}

/// The state that the rows lead to: the one that was kept, if it is of this type, else rebuilt.
pub(crate) fn restore<S: State>(
    input: &Input,
    rows: &mut StateRows,
) -> Result<Arc<S>, ChannelError> {
    // Taken out, so that the run is the only one who has it, and can change it in place.
    match rows.state.take().as_ref().and_then(Held::<S>::of) {
        Some(state) => Ok(state),
        None => Ok(Arc::new(rebuild(input, std::mem::take(&mut rows.rows))?)),
    }
}
