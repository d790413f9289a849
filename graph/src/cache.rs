//! Remembering what nodes returned, over threads and processes: the [`Cache`] port, and the [`CachePolicy`] of a node.
//!
//! A cache is not a record: what is in it may be gone at any time, and a thread never depends on it. Only what is a pure
//! result is kept (see [`CachePolicy`]).

use std::{any::TypeId, collections::HashMap, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;

use crate::{checkpoint::StorageError, context::digest, state::State};

/// The entries of one node of one graph.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CacheSpace {
    /// The graph.
    pub graph: String,
    /// The node.
    pub node: String,
}

impl CacheSpace {
    /// The entries of this node of this graph.
    pub fn new(graph: impl Into<String>, node: impl Into<String>) -> Self {
        Self {
            graph: graph.into(),
            node: node.into(),
        }
    }
}

impl fmt::Display for CacheSpace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node `{}` of graph `{}`", self.node, self.graph)
    }
}

/// Something to be kept.
#[derive(Clone, Debug, PartialEq)]
pub struct CacheEntry {
    /// Under which key in its space. Of two entries with one key, the later one stays.
    pub key: String,
    /// What is kept.
    pub value: Value,
    /// For how long, by the cache's clock; absent: until it is cleared, or pushed out by the limits.
    pub ttl: Option<Duration>,
}

/// How much a space holds. What was put first goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheLimits {
    /// How many entries.
    pub entries: usize,
    /// How many bytes of JSON, over all entries.
    pub bytes: usize,
}

impl Default for CacheLimits {
    /// 10,000 entries, 64 MiB.
    fn default() -> Self {
        Self {
            entries: 10_000,
            bytes: 64 << 20,
        }
    }
}

/// A cache for the results of nodes. [`conformance::cache`](crate::conformance::cache) says what it must do.
///
/// Whatever it answers is taken as a miss when it is an error, so an implementation need not try again.
#[async_trait]
pub trait Cache: Send + Sync + 'static {
    /// What is kept under these keys and has not expired, in their order.
    async fn get(
        &self,
        space: &CacheSpace,
        keys: &[String],
    ) -> Result<Vec<Option<Value>>, StorageError>;

    /// Keeps entries, in place of others with the same keys. From time to time, removes what has expired (in any space), and
    /// what is over the limits in this one: a space may be over them by an eighth, and at most by 64 entries, for each
    /// process that writes to it.
    async fn put(
        &self,
        space: &CacheSpace,
        entries: Vec<CacheEntry>,
        limits: CacheLimits,
    ) -> Result<(), StorageError>;

    /// Forgets a space. Returns how many entries it had, expired ones perhaps included.
    async fn clear(&self, space: &CacheSpace) -> Result<u64, StorageError>;
}

type MakeKey =
    Arc<dyn Fn(&dyn std::any::Any, Option<&Value>) -> Result<Value, String> + Send + Sync>;

/// Makes the key of a task, for states of one type.
#[derive(Clone)]
pub(crate) struct KeyFunction {
    pub state: TypeId,
    pub state_name: &'static str,
    make: MakeKey,
}

/// How the results of a node are cached: see [`NodeOptions::cache`](crate::NodeOptions::cache).
///
/// When a task's key is in the cache, its node does not run; the task's updates and where it goes are taken from there, and are
/// streamed as cached. What is put there is the result of a successful attempt, when its step has landed, and only if that
/// result is all the task did: a task that waited or looked into its mailbox, said an event (also with
/// [`say_now`](crate::Context::say_now)), spawned, signalled or cancelled, or used a durable step, is not cached. What it
/// sent to [`custom`](crate::Context::custom) is not repeated by a hit. Nor is a node cached that takes over after a failure,
/// or cleans up after a cancellation.
///
/// A node whose result depends on more than its key (the clock, the thread's id, the world) should not be cached, or not for
/// long. Entries outlive a change of the program; see [`Engine::clear_cache`](crate::Engine::clear_cache).
#[derive(Clone, Default)]
pub struct CachePolicy {
    pub(crate) ttl: Option<Duration>,
    pub(crate) key: Option<KeyFunction>,
    pub(crate) limits: CacheLimits,
}

impl CachePolicy {
    /// For ever, by all that the node gets: the whole state, and the argument of the [`Send`](crate::Send) if one started it.
    pub fn new() -> Self {
        Self::default()
    }

    /// For so long. Without it: for ever.
    #[must_use]
    pub fn ttl(mut self, ttl: Duration) -> Self {
        self.ttl = Some(ttl);
        self
    }

    /// By what this function makes of the state and of the argument of the [`Send`](crate::Send), if one started the task.
    /// The state must be the graph's; that is checked when the graph is compiled.
    #[must_use]
    pub fn key<S: State, K: Serialize>(
        mut self,
        key: impl Fn(&S, Option<&Value>) -> K + Send + Sync + 'static,
    ) -> Self {
        self.key = Some(KeyFunction {
            state: TypeId::of::<S>(),
            state_name: std::any::type_name::<S>(),
            make: Arc::new(move |state, argument| {
                let state: &S = state
                    .downcast_ref()
                    .ok_or_else(|| "the key is made of another state".to_owned())?;
                serde_json::to_value(key(state, argument)).map_err(|error| error.to_string())
            }),
        });
        self
    }

    /// How much is kept for the node.
    #[must_use]
    pub fn limits(mut self, limits: CacheLimits) -> Self {
        self.limits = limits;
        self
    }

    /// The key of a task.
    pub(crate) fn make_key<S: State>(
        &self,
        state: &S,
        argument: Option<&Value>,
    ) -> Result<String, String> {
        let text = |value: &Value| value.to_string();
        if let Some(key) = &self.key {
            return Ok(digest(&["key", &text(&(key.make)(state, argument)?)], 32));
        }
        let channels = state.channels().map_err(|error| error.to_string())?;
        let channels = text(&Value::Object(channels));
        Ok(match argument {
            Some(argument) => digest(&["send", &channels, &text(argument)], 32),
            None => digest(&["state", &channels], 32),
        })
    }
}

impl fmt::Debug for CachePolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CachePolicy")
            .field("ttl", &self.ttl)
            .field("key", &self.key.as_ref().map(|key| key.state_name))
            .field("limits", &self.limits)
            .finish()
    }
}

/// When a process should sweep a space, so that the cost of sweeping is shared by many puts.
#[derive(Debug, Default)]
pub(crate) struct Sweeps {
    /// Entries and bytes put since the last sweep.
    since: Mutex<HashMap<CacheSpace, (usize, usize)>>,
}

/// How many rows a sweep removes at most, of those expired and of those over the limits each.
pub(crate) const SWEEP_ROWS: usize = 1000;

impl Sweeps {
    /// Counts what was put, and says whether it is time.
    pub fn is_due(&self, space: &CacheSpace, limits: CacheLimits, put: (usize, usize)) -> bool {
        let mut since = self.since.lock();
        // The first put of a process sweeps: who knows what the one before left.
        let counted = since
            .entry(space.clone())
            .or_insert((usize::MAX >> 1, usize::MAX >> 1));
        counted.0 += put.0;
        counted.1 += put.1;
        let due = counted.0 >= (limits.entries / 8).clamp(1, 64)
            || counted.1 >= (limits.bytes / 8).max(1);
        if due {
            *counted = (0, 0);
        }
        due
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sweeping_is_due_at_first_and_then_after_an_eighth_of_the_limits() {
        let sweeps = Sweeps::default();
        let space = CacheSpace::new("g", "n");
        let limits = CacheLimits {
            entries: 24,
            bytes: 800,
        };
        let due = |entries, bytes| sweeps.is_due(&space, limits, (entries, bytes));
        assert!(due(1, 1));
        assert!(!due(1, 1));
        assert!(!due(1, 1));
        assert!(due(1, 1));
        assert!(!due(1, 99));
        assert!(due(1, 1));
        assert!(sweeps.is_due(&CacheSpace::new("g", "other"), limits, (1, 1)));
    }
}
