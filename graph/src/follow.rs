//! The stream of a run: what is only interesting while it happens. Nothing here is stored.

use std::{collections::HashMap, ops::BitOr, sync::Arc};

use futures::stream::{BoxStream, StreamExt, unfold};
use parking_lot::Mutex;
use serde::Serialize;
use serde_json::Value;
use tokio::sync::broadcast::{self, error::RecvError};

use crate::{checkpoint::ThreadStatus, ids::ThreadId};

/// How many items a reader may lag behind before it misses some (and is told).
const CAPACITY: usize = 1024;

/// Which items to follow. Combine with `|`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Modes(u8);

impl Modes {
    /// The whole state after each step.
    pub const VALUES: Self = Self(1);
    /// What each task of a step changed.
    pub const UPDATES: Self = Self(2);
    /// What nodes send with [`Context::custom`](crate::Context::custom).
    pub const CUSTOM: Self = Self(4);
    /// All of them.
    pub const ALL: Self = Self(7);

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

impl BitOr for Modes {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// Something that happens in a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StreamItem {
    /// The thread.
    pub thread: ThreadId,
    /// The subgraph in which it happens, from the outside in; empty: the thread's own graph.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub namespace: Vec<String>,
    /// The superstep, from 1; 0 where there is none.
    pub step: u64,
    /// What happens.
    pub kind: StreamKind,
}

/// What happens in a run. In each step: the updates by task path, then the values; custom items come as they are sent.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StreamKind {
    /// The whole state after a step.
    Values(Value),
    /// What a task changed: an object of channels, or null if it changed nothing.
    Updates {
        /// The task's node.
        node: String,
        /// What it changed.
        update: Value,
        /// Whether the task had run earlier and was not run again.
        cached: bool,
    },
    /// Whatever a node sends.
    Custom {
        /// The node.
        node: String,
        /// What it sent.
        payload: Value,
    },
    /// The thread has ended; nothing follows.
    Ended(ThreadStatus),
    /// The reader was too slow and missed so many items (of all modes).
    Missed(u64),
}

impl StreamKind {
    fn is_in(&self, modes: Modes) -> bool {
        match self {
            Self::Values(_) => modes.has(Modes::VALUES),
            Self::Updates { .. } => modes.has(Modes::UPDATES),
            Self::Custom { .. } => modes.has(Modes::CUSTOM),
            Self::Ended(_) | Self::Missed(_) => true,
        }
    }
}

/// Hands items to readers in this process.
#[derive(Clone, Default)]
pub(crate) struct Bus {
    threads: Arc<Mutex<HashMap<ThreadId, broadcast::Sender<StreamItem>>>>,
}

impl Bus {
    pub fn is_followed(&self, thread: &ThreadId) -> bool {
        self.threads.lock().contains_key(thread)
    }

    pub fn send(&self, thread: &ThreadId, namespace: &[String], step: u64, kind: StreamKind) {
        let mut threads = self.threads.lock();
        let Some(sender) = threads.get(thread) else {
            return;
        };
        let item = StreamItem {
            thread: thread.clone(),
            namespace: namespace.to_vec(),
            step,
            kind,
        };
        if sender.send(item).is_err() {
            // The last reader has left.
            threads.remove(thread);
        }
    }

    pub fn follow(&self, thread: &ThreadId, modes: Modes) -> BoxStream<'static, StreamItem> {
        let receiver = self
            .threads
            .lock()
            .entry(thread.clone())
            .or_insert_with(|| broadcast::channel(CAPACITY).0)
            .subscribe();
        let thread = thread.clone();
        unfold(Some(receiver), move |receiver| {
            let thread = thread.clone();
            async move {
                let mut receiver = receiver?;
                let item = match receiver.recv().await {
                    Ok(item) => item,
                    Err(RecvError::Lagged(missed)) => StreamItem {
                        thread,
                        namespace: Vec::new(),
                        step: 0,
                        kind: StreamKind::Missed(missed),
                    },
                    Err(RecvError::Closed) => return None,
                };
                let ended = matches!(item.kind, StreamKind::Ended(_));
                Some((item, (!ended).then_some(receiver)))
            }
        })
        .filter(move |item| futures::future::ready(item.kind.is_in(modes)))
        .boxed()
    }
}
