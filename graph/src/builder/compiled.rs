//! What a graph is after its check.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::Arc,
};

use futures::future::BoxFuture;
use serde_json::Value;

use crate::{
    brisk::Brisk,
    command::{Goto, Outcome},
    context::Context,
    error::NodeError,
    options::NodeOptions,
    shape::Shape,
    state::State,
};

pub(crate) type NodeFunction<S> =
    Arc<dyn Fn(Arc<S>, Context) -> BoxFuture<'static, Result<Outcome<S>, NodeError>> + Send + Sync>;
pub(crate) type Condition<S> = Arc<dyn Fn(&S) -> Goto + Send + Sync>;
/// The conditional edges of a node, each with its declared targets.
pub(crate) type Conditions<S> = Vec<(Condition<S>, BTreeSet<String>)>;
pub(crate) type Output<S> = Arc<dyn Fn(&S) -> Value + Send + Sync>;

pub(crate) struct Node<S: State> {
    pub name: Arc<str>,
    pub run: NodeFunction<S>,
    pub options: NodeOptions,
    pub brisk: Brisk,
    /// Where static edges lead (but [`END`](crate::END)).
    pub edges: Vec<String>,
    /// The joins that wait for this node, by their place in [`Compiled::joins`].
    pub joins: Vec<usize>,
    pub conditions: Conditions<S>,
    /// Where its commands may go.
    pub goes: BTreeSet<String>,
    /// The node that takes over when it has failed for good.
    pub on_error: Option<String>,
}

pub(crate) struct Join {
    /// A stable name: it stands in checkpoints.
    pub key: String,
    pub sources: BTreeSet<String>,
    pub target: String,
}

/// What a graph is after its check. Shared by all clones of a [`CompiledGraph`].
pub(crate) struct Compiled<S: State> {
    pub name: Arc<str>,
    pub nodes: BTreeMap<String, Arc<Node<S>>>,
    /// What [`START`](crate::START) leads to: edges and conditions, like a node's.
    pub entry: Vec<String>,
    pub entry_conditions: Conditions<S>,
    pub joins: Vec<Join>,
    pub on_cancel: Option<String>,
    pub output: Option<Output<S>>,
    pub recursion_limit: u64,
    pub parallel: usize,
    pub pause_before: BTreeSet<String>,
    pub pause_after: BTreeSet<String>,
    pub shape: Shape,
    /// Whether any node is cached.
    pub caches: bool,
}

/// A checked graph. Cheap to clone.
pub struct CompiledGraph<S: State> {
    pub(crate) inner: Arc<Compiled<S>>,
}

impl<S: State> Clone for CompiledGraph<S> {
    fn clone(&self) -> Self {
        Self {
            inner: self.inner.clone(),
        }
    }
}

impl<S: State> fmt::Debug for CompiledGraph<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CompiledGraph")
            .field("name", &self.inner.name)
            .field("nodes", &self.inner.nodes.keys())
            .finish_non_exhaustive()
    }
}

impl<S: State> CompiledGraph<S> {
    /// The graph's name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// The nodes and edges as plain data.
    pub fn shape(&self) -> &Shape {
        &self.inner.shape
    }

    /// The graph as a Mermaid flowchart.
    pub fn to_mermaid(&self) -> String {
        self.inner.shape.to_mermaid()
    }

    /// The same with the insides of subgraphs, so many levels deep; those that are invoked in nodes are not known.
    pub fn to_mermaid_inside(&self, depth: usize) -> String {
        self.inner.shape.to_mermaid_inside(depth)
    }

    /// The graph in Graphviz's language.
    pub fn to_dot(&self) -> String {
        self.inner.shape.to_dot()
    }

    /// The same with the insides of subgraphs, so many levels deep, as clusters.
    pub fn to_dot_inside(&self, depth: usize) -> String {
        self.inner.shape.to_dot_inside(depth)
    }

    /// The graph as an SVG picture.
    pub fn to_svg(&self) -> String {
        self.inner.shape.to_svg()
    }

    /// The same with the insides of subgraphs, so many levels deep.
    pub fn to_svg_inside(&self, depth: usize) -> String {
        self.inner.shape.to_svg_inside(depth)
    }
}
