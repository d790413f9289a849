//! A graph as a node of another: what is remembered of it, and how it is run.

use serde::{Deserialize, Serialize};

use crate::options::NodeOptions;

/// How deep subgraphs can be nested.
pub const MAX_DEPTH: usize = 16;

/// What is remembered of a subgraph.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum SubgraphMemory {
    /// Nothing: it is like a function. When the task around it runs again, it begins anew. Waits, questions, looks into the
    /// mailbox and durable steps inside are refused, because nothing could remember what came; retries wait in the process.
    /// What it says lands with the task around it.
    Stateless,
    /// Each invocation is remembered until the superstep around it has landed: waits, retries and crashes go on after the
    /// last superstep of the subgraph that was done. The next invocation begins anew.
    #[default]
    Resumable,
    /// As resumable; and its state stays with the thread, and the next invocation goes on from it. It is a part of the
    /// thread's checkpoints: a fork goes on from what it was there. In one superstep of the thread it can be reached once.
    Accumulating,
}

/// How a subgraph is run as a node. The default: [resumable](SubgraphMemory::Resumable), with the default options of a node.
#[derive(Clone, Debug, Default)]
pub struct SubgraphOptions {
    pub(crate) memory: SubgraphMemory,
    pub(crate) node: NodeOptions,
}

impl SubgraphOptions {
    /// What is remembered of it.
    #[must_use]
    pub fn memory(mut self, memory: SubgraphMemory) -> Self {
        self.memory = memory;
        self
    }

    /// Retries and time limits of the node, which are those of the whole subgraph. A retry goes on after the last superstep
    /// of the subgraph that was done, and runs only those of its tasks again that failed.
    #[must_use]
    pub fn node(mut self, options: NodeOptions) -> Self {
        self.node = options;
        self
    }
}

impl From<SubgraphMemory> for SubgraphOptions {
    fn from(memory: SubgraphMemory) -> Self {
        Self::default().memory(memory)
    }
}
