//! Values as the program has them: for checkpointers that keep them in this process instead of writing them down.
//!
//! Such a one says so with [`Checkpointer::keeps_values`](super::Checkpointer::keeps_values), and is then given these instead of
//! JSON. It shares them with the run, so that a step costs what it changes and not what it would be as text. Each of them can
//! still be read as JSON, for whoever asks.

use std::{any::Any, fmt, sync::Arc};

use serde_json::Value;

use super::{Channels, StorageError};
use crate::{nest::Pasts, private::chain, state::ChannelError};

/// A superstep's changes, whatever the state.
pub(crate) trait Step: Any + Send + Sync {
    /// The new items of append channels, and the changes of the others.
    fn changes(&self) -> Result<(Channels, Channels), ChannelError>;
    fn plan(&self) -> Value;
}

/// A state, whatever its type.
pub(crate) trait Whole: Any + Send + Sync {
    fn output(&self) -> Value;
    /// What accumulating subgraphs have kept beside it.
    fn pasts(&self) -> Pasts;
}

/// What a task has written, whatever its type.
pub(crate) trait Noted: Any + Send + Sync {
    fn json(&self) -> Result<Value, ChannelError>;
}

/// What a checkpoint changed, as the program has it. Cheap to clone.
#[derive(Clone)]
pub struct KeptStep(Arc<dyn Step>);

impl KeptStep {
    pub(crate) fn new(step: impl Step) -> Self {
        Self(Arc::new(step))
    }

    pub(crate) fn downcast<T: 'static>(&self) -> Option<&T> {
        let step: &dyn Any = &*self.0;
        step.downcast_ref()
    }

    pub(crate) fn json(&self) -> Result<(Channels, Channels), ChannelError> {
        self.0.changes()
    }

    /// The same as JSON: [`NewCheckpoint::appends`](super::NewCheckpoint::appends) and
    /// [`NewCheckpoint::changes`](super::NewCheckpoint::changes). Refused if a value cannot be JSON.
    pub fn changes(&self) -> Result<(Channels, Channels), StorageError> {
        self.json().map_err(|error| StorageError::Unstorable {
            what: chain(&error),
        })
    }

    /// The same as JSON: [`NewCheckpoint::plan`](super::NewCheckpoint::plan).
    pub fn plan(&self) -> Value {
        self.0.plan()
    }
}

impl PartialEq for KeptStep {
    /// Whether they are the same one.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for KeptStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeptStep")
    }
}

/// A thread's whole state, as the program has it. Cheap to clone.
#[derive(Clone)]
pub struct KeptState(Arc<dyn Whole>);

impl KeptState {
    pub(crate) fn new(state: impl Whole) -> Self {
        Self(Arc::new(state))
    }

    pub(crate) fn downcast<T: 'static>(&self) -> Option<&T> {
        let state: &dyn Any = &*self.0;
        state.downcast_ref()
    }

    pub(crate) fn pasts(&self) -> Pasts {
        self.0.pasts()
    }

    /// What the thread returns if it ends with this state.
    pub fn output(&self) -> Option<Value> {
        let output = self.0.output();
        (!output.is_null()).then_some(output)
    }
}

impl PartialEq for KeptState {
    /// Whether they are the same one.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for KeptState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeptState")
    }
}

/// A pending write, as the program has it. Cheap to clone.
#[derive(Clone)]
pub struct KeptWrite(Arc<dyn Noted>);

impl KeptWrite {
    pub(crate) fn new(noted: impl Noted) -> Self {
        Self(Arc::new(noted))
    }

    pub(crate) fn downcast<T: 'static>(&self) -> Option<&T> {
        let noted: &dyn Any = &*self.0;
        noted.downcast_ref()
    }

    /// The same as JSON: [`Write::value`](super::Write::value). Refused if it cannot be JSON.
    pub fn value(&self) -> Result<Value, StorageError> {
        self.0.json().map_err(|error| StorageError::Unstorable {
            what: chain(&error),
        })
    }
}

impl PartialEq for KeptWrite {
    /// Whether they are the same one.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl fmt::Debug for KeptWrite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("KeptWrite")
    }
}
