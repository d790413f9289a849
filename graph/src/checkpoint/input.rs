//! What a thread begins with.

use std::{any::Any, fmt, ops::Deref, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::Value;

/// A thread's first update: an object of channels. Cheap to clone.
///
/// As far as anybody can see it is JSON, and reads as such by reference. In the process that has looked whether it fits its
/// graph it is also what that look came to, so that the thread's run need not read it once more.
#[derive(Clone, Default)]
pub struct Input {
    json: Arc<Value>,
    update: Option<Arc<dyn Any + Send + Sync>>,
}

impl Input {
    /// One that has been read as this update.
    pub(crate) fn read<U: Any + Send + Sync>(json: Value, update: U) -> Self {
        Self {
            json: Arc::new(json),
            update: Some(Arc::new(update)),
        }
    }

    /// The update as which it has been read, if it was, and if it was as one of this type.
    pub(crate) fn update<U: 'static>(&self) -> Option<&U> {
        self.update.as_deref()?.downcast_ref()
    }
}

impl From<Value> for Input {
    fn from(json: Value) -> Self {
        Self {
            json: Arc::new(json),
            update: None,
        }
    }
}

impl Deref for Input {
    type Target = Value;

    fn deref(&self) -> &Value {
        &self.json
    }
}

impl PartialEq for Input {
    /// Whether they are the same JSON.
    fn eq(&self, other: &Self) -> bool {
        self.json == other.json
    }
}

impl PartialEq<Value> for Input {
    fn eq(&self, other: &Value) -> bool {
        *self.json == *other
    }
}

impl fmt::Debug for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.json.fmt(f)
    }
}

impl Serialize for Input {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.json.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Input {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::from)
    }
}
