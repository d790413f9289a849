//! What can be wrong with a graph.

use std::fmt;

use crate::command::{END, START};

/// One thing that is wrong with a graph.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Two nodes of one name.
    #[error("there are two nodes `{0}`")]
    DuplicateNode(String),
    /// A name that cannot be a node's.
    #[error("`{node}` cannot be a node's name: {fault}")]
    BadName {
        /// The name.
        node: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// An edge to nowhere.
    #[error("the edge `{from}` → `{to}` leads to a node that does not exist")]
    UnknownTarget {
        /// Where it begins.
        from: String,
        /// Where it leads.
        to: String,
    },
    /// An edge from nowhere.
    #[error("the edge `{from}` → `{to}` begins at a node that does not exist")]
    UnknownSource {
        /// Where it begins.
        from: String,
        /// Where it leads.
        to: String,
    },
    /// A node named by `on_cancel` or for stepping does not exist.
    #[error("there is no node `{0}`")]
    UnknownNode(String),
    /// A cache whose key is made of something else than the graph's state.
    #[error(
        "the cache of node `{node}` makes its key of a `{state}`, which is not the graph's state"
    )]
    CacheOfOtherState {
        /// The node.
        node: String,
        /// The type of which the key is made.
        state: &'static str,
    },
    /// A join of nothing.
    #[error("the join before `{0}` waits for nothing")]
    EmptyJoin(String),
    /// A conditional edge without targets.
    #[error("the conditional edge of `{0}` declares no targets")]
    NoTargets(String),
    /// Nothing follows the start.
    #[error("nothing follows START; add an edge from it")]
    NoEntry,
    /// A node with two error handlers.
    #[error("node `{0}` has two error handlers")]
    TwoHandlers(String),
    /// A node that is its own error handler.
    #[error("node `{0}` is its own error handler; to try again, give it a retry policy")]
    HandlesItself(String),
    /// An accumulating subgraph has a state of its own, so it cannot have the state around it.
    #[error(
        "subgraph `{0}` cannot both share the state around it and accumulate its own; map the states with `subgraph_with`"
    )]
    SharesAndAccumulates(String),
    /// A recursion limit of 0.
    #[error("a recursion limit of 0 lets nothing run")]
    NoSteps,
    /// A node that never runs.
    #[error("nothing leads to node `{0}`")]
    Unreachable(String),
    /// A node after which the graph cannot end.
    #[error("no way leads from node `{0}` to END")]
    NoWayOut(String),
}

/// A graph that is not right, with everything that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompileError {
    /// The graph's name.
    pub graph: String,
    /// What is wrong, at least one.
    pub faults: Vec<Fault>,
}

impl fmt::Display for CompileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "graph `{}` is not right: ", self.graph)?;
        for (index, fault) in self.faults.iter().enumerate() {
            if index > 0 {
                f.write_str("; ")?;
            }
            write!(f, "{fault}")?;
        }
        Ok(())
    }
}

impl std::error::Error for CompileError {}

pub(crate) fn name_fault(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name == START || name == END {
        Some("it is the engine's own")
    } else if name.len() > 100 {
        Some("it is longer than 100 bytes")
    } else if name
        .chars()
        .any(|c| c.is_control() || matches!(c, '/' | ':' | '+' | '>' | '~' | '"'))
    {
        Some("it contains one of `/ : + > ~ \"` or a control character")
    } else {
        None
    }
}
