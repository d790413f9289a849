//! The names that cross every boundary of the engine: threads, cursors, idempotency keys.

use std::{borrow::Borrow, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

/// The name of a thread: chosen by whoever starts it, readable by people, unique in a database.
///
/// A child's id is `{parent}/{name}`. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ThreadId(Arc<str>);

/// The longest thread id that is accepted, in bytes.
pub const MAX_THREAD_ID_BYTES: usize = 512;

impl ThreadId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The id that a child of this thread with that name has.
    #[must_use]
    pub fn child(&self, name: &str) -> Self {
        Self(format!("{}/{name}", self.0).into())
    }

    /// Says what is wrong with the id, if something is.
    pub(crate) fn fault(&self) -> Option<&'static str> {
        if self.0.is_empty() {
            Some("it is empty")
        } else if self.0.len() > MAX_THREAD_ID_BYTES {
            Some("it is longer than 512 bytes")
        } else if self.0.chars().any(char::is_control) {
            Some("it contains a control character")
        } else {
            None
        }
    }
}

impl fmt::Display for ThreadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for ThreadId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", &*self.0)
    }
}

impl From<&str> for ThreadId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl From<String> for ThreadId {
    fn from(id: String) -> Self {
        Self(id.into())
    }
}

impl From<&String> for ThreadId {
    fn from(id: &String) -> Self {
        Self(id.as_str().into())
    }
}

impl From<&ThreadId> for ThreadId {
    fn from(id: &ThreadId) -> Self {
        id.clone()
    }
}

impl AsRef<str> for ThreadId {
    fn as_ref(&self) -> &str {
        &self.0
    }
}

impl Borrow<str> for ThreadId {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A place in the journal: everything up to and including it has been read.
///
/// Cursors are ordered as the entries became visible and may have gaps; `Cursor::START` is before the first entry.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Cursor(pub u64);

impl Cursor {
    /// Before the first entry.
    pub const START: Self = Self(0);
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// The stable name of one durable step (`Context::step`): the same in every re-run, attempt and process, so that an outside
/// system which knows idempotency keys does the work once.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct IdempotencyKey(Arc<str>);

impl IdempotencyKey {
    pub(crate) fn new(key: String) -> Self {
        Self(key.into())
    }

    /// The key as text: 32 hexadecimal digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for IdempotencyKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_is_named_after_its_parent() {
        assert_eq!(ThreadId::from("job:1").child("t1").as_str(), "job:1/t1");
    }

    #[test]
    fn ids_that_cannot_be_are_told() {
        assert_eq!(ThreadId::from("job:1").fault(), None);
        assert!(ThreadId::from("").fault().is_some());
        assert!(ThreadId::from("a\nb").fault().is_some());
        assert!(ThreadId::from("x".repeat(513)).fault().is_some());
    }
}
