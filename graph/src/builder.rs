//! Building a graph: nodes, edges, and the check of the whole.

use std::{
    any::TypeId,
    collections::{BTreeMap, BTreeSet},
    fmt,
    future::Future,
    sync::Arc,
};

use futures::future::BoxFuture;
use serde_json::Value;

use crate::{
    command::{END, Goto, Outcome, START},
    context::Context,
    error::NodeError,
    options::NodeOptions,
    run::{Begin, invoke},
    shape::{EdgeKind, Shape, ShapeEdge, ShapeNode},
    state::State,
    subgraph::{SubgraphMemory, SubgraphOptions},
};

pub(crate) type NodeFunction<S> =
    Arc<dyn Fn(Arc<S>, Context) -> BoxFuture<'static, Result<Outcome<S>, NodeError>> + Send + Sync>;
pub(crate) type Condition<S> = Arc<dyn Fn(&S) -> Goto + Send + Sync>;
/// The conditional edges of a node, each with its declared targets.
pub(crate) type Conditions<S> = Vec<(Condition<S>, BTreeSet<String>)>;
pub(crate) type Output<S> = Arc<dyn Fn(&S) -> Value + Send + Sync>;

/// A name for graphs of a state; see [`Graph::builder`].
pub struct Graph<S> {
    state: std::marker::PhantomData<S>,
}

impl<S: State> Graph<S> {
    /// Begins a graph. The name says which graph a thread runs, so it must stay.
    pub fn builder(name: impl Into<String>) -> GraphBuilder<S> {
        GraphBuilder {
            name: name.into(),
            nodes: Vec::new(),
            edges: Vec::new(),
            joins: Vec::new(),
            conditions: Vec::new(),
            goes: Vec::new(),
            on_error: Vec::new(),
            on_cancel: None,
            output: None,
            recursion_limit: 1000,
            parallel: 64,
            pause_before: BTreeSet::new(),
            pause_after: BTreeSet::new(),
            faults: Vec::new(),
        }
    }
}

pub(crate) struct Node<S: State> {
    pub name: Arc<str>,
    pub run: NodeFunction<S>,
    pub options: NodeOptions,
    /// Where static edges lead (but [`END`]).
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
    /// What [`START`] leads to: edges and conditions, like a node's.
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

/// A graph being built. See [`Graph::builder`].
pub struct GraphBuilder<S: State> {
    name: String,
    nodes: Vec<(String, NodeOptions, NodeFunction<S>)>,
    edges: Vec<(String, String)>,
    joins: Vec<(Vec<String>, String)>,
    conditions: Vec<(String, Vec<String>, Condition<S>)>,
    goes: Vec<(String, Vec<String>)>,
    on_error: Vec<(String, String)>,
    on_cancel: Option<String>,
    output: Option<Output<S>>,
    recursion_limit: u64,
    parallel: usize,
    pause_before: BTreeSet<String>,
    pause_after: BTreeSet<String>,
    /// What is known to be wrong already.
    faults: Vec<Fault>,
}

impl<S: State> GraphBuilder<S> {
    /// Adds a node: an async function of the state (shared, not cloned) and its context.
    #[must_use]
    pub fn node<F, Fut, O>(self, name: impl Into<String>, run: F) -> Self
    where
        F: Fn(Arc<S>, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, NodeError>> + Send + 'static,
        O: Into<Outcome<S>>,
    {
        self.node_with(name, NodeOptions::default(), run)
    }

    /// Adds a node with retries or time limits.
    #[must_use]
    pub fn node_with<F, Fut, O>(
        mut self,
        name: impl Into<String>,
        options: NodeOptions,
        run: F,
    ) -> Self
    where
        F: Fn(Arc<S>, Context) -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<O, NodeError>> + Send + 'static,
        O: Into<Outcome<S>>,
    {
        let run: NodeFunction<S> = Arc::new(move |state, context| {
            let future = run(state, context);
            Box::pin(async move { future.await.map(Into::into) })
        });
        self.nodes.push((name.into(), options, run));
        self
    }

    /// Adds a graph as a node: a [resumable](crate::SubgraphMemory::Resumable) subgraph, with a state of its own.
    ///
    /// `into` makes the subgraph's first update from the state around it (the context has the argument, if a
    /// [`Send`](crate::Send) started the task); `back` makes from its last state what the node hands back: an update, a
    /// command, several, or nothing. Everything that goes at the top goes inside too: waits, durable steps, retries, events,
    /// children. See [`SubgraphMemory`](crate::SubgraphMemory) for what survives what.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use graph::{CompileError, Context, END, Graph, START};
    /// #[derive(Clone, Default, graph::State)]
    /// struct Draft {
    ///     topic: String,
    ///     text: String,
    /// }
    ///
    /// #[derive(Clone, Default, graph::State)]
    /// struct Issue {
    ///     topic: String,
    ///     #[channel(append)]
    ///     articles: Vec<String>,
    /// }
    ///
    /// # fn issue() -> Result<graph::CompiledGraph<Issue>, CompileError> {
    /// let write = Graph::<Draft>::builder("write")
    ///     .node("draft", |draft: Arc<Draft>, _: Context| async move {
    ///         Ok(DraftUpdate::default().text(format!("About {}.", draft.topic)))
    ///     })
    ///     .edge(START, "draft")
    ///     .edge("draft", END)
    ///     .compile()?;
    /// Graph::<Issue>::builder("issue")
    ///     .subgraph(
    ///         "write",
    ///         &write,
    ///         |issue, _| Ok(DraftUpdate::default().topic(issue.topic.clone())),
    ///         |draft| IssueUpdate::default().articles(vec![draft.text.clone()]),
    ///     )
    ///     .edge(START, "write")
    ///     .edge("write", END)
    ///     .compile()
    /// # }
    /// # issue().unwrap();
    /// ```
    #[must_use]
    pub fn subgraph<T: State, O: Into<Outcome<S>>>(
        self,
        name: impl Into<String>,
        graph: &CompiledGraph<T>,
        into: impl Fn(&S, &Context) -> Result<T::Update, NodeError> + Send + Sync + 'static,
        back: impl Fn(&T) -> O + Send + Sync + 'static,
    ) -> Self {
        self.subgraph_with(name, SubgraphOptions::default(), graph, into, back)
    }

    /// The same with retries, time limits, or another memory.
    #[must_use]
    pub fn subgraph_with<T: State, O: Into<Outcome<S>>>(
        mut self,
        name: impl Into<String>,
        options: impl Into<SubgraphOptions>,
        graph: &CompiledGraph<T>,
        into: impl Fn(&S, &Context) -> Result<T::Update, NodeError> + Send + Sync + 'static,
        back: impl Fn(&T) -> O + Send + Sync + 'static,
    ) -> Self {
        let options = options.into();
        let memory = options.memory;
        let shared = Arc::new((graph.inner.clone(), into, back));
        let run: NodeFunction<S> = Arc::new(move |state, context| {
            let shared = shared.clone();
            Box::pin(async move {
                let (graph, into, back) = &*shared;
                let update = into(&state, &context)?;
                drop(state);
                let begin = Begin::Update(update);
                let ended = invoke(&context, graph, memory, None, begin).await?;
                Ok(back(&ended.state).into())
            })
        });
        self.nodes.push((name.into(), options.node, run));
        self
    }

    /// Adds a graph of the same state as a node: it begins with the state around it, and all that it changes is handed back:
    /// to append channels the items that it added, to channels with a function the updates that it made. It cannot be
    /// accumulating.
    #[must_use]
    pub fn subgraph_shared(
        mut self,
        name: impl Into<String>,
        options: impl Into<SubgraphOptions>,
        graph: &CompiledGraph<S>,
    ) -> Self {
        let name = name.into();
        let options = options.into();
        let memory = options.memory;
        if memory == SubgraphMemory::Accumulating {
            self.faults.push(Fault::SharesAndAccumulates(name.clone()));
        }
        let graph = graph.inner.clone();
        let run: NodeFunction<S> = Arc::new(move |state, context| {
            let graph = graph.clone();
            Box::pin(async move {
                let begin = Begin::State(state);
                let ended = invoke(&context, &graph, memory, None, begin).await?;
                let mut outcome = Outcome::from(());
                outcome.updates = ended.changes.updates::<S>()?;
                Ok(outcome)
            })
        });
        self.nodes.push((name, options.node, run));
        self
    }

    /// After `from` comes `to`. [`START`] leads to the first nodes, and to [`END`] lead the last ones.
    #[must_use]
    pub fn edge(mut self, from: impl Into<String>, to: impl Into<String>) -> Self {
        self.edges.push((from.into(), to.into()));
        self
    }

    /// `to` comes after *all* of `from`, and again in every round of a loop.
    #[must_use]
    pub fn join<N: Into<String>>(
        mut self,
        from: impl IntoIterator<Item = N>,
        to: impl Into<String>,
    ) -> Self {
        self.joins
            .push((from.into_iter().map(Into::into).collect(), to.into()));
        self
    }

    /// After `from` comes what the function says: one or several of `targets` (by name or by `Send`). It sees the state with
    /// the writes of `from`, but not those of nodes that ran beside it.
    #[must_use]
    pub fn conditional<N: Into<String>, G: Into<Goto>>(
        mut self,
        from: impl Into<String>,
        targets: impl IntoIterator<Item = N>,
        condition: impl Fn(&S) -> G + Send + Sync + 'static,
    ) -> Self {
        self.conditions.push((
            from.into(),
            targets.into_iter().map(Into::into).collect(),
            Arc::new(move |state| condition(state).into()),
        ));
        self
    }

    /// Declares where the commands of `node` may go, for the check and for drawings. A command that goes elsewhere fails.
    #[must_use]
    pub fn goes<N: Into<String>>(
        mut self,
        node: impl Into<String>,
        targets: impl IntoIterator<Item = N>,
    ) -> Self {
        self.goes
            .push((node.into(), targets.into_iter().map(Into::into).collect()));
        self
    }

    /// When a task of one of these nodes has failed for good (after its last attempt), `handler` takes the task over, in the same
    /// step: it sees the state (and the task's argument) and what went wrong in [`Context::failure`], and what it hands back
    /// counts in place of the failed task; what follows are its own edges and commands, not those of the failed node.
    ///
    /// That the task was handed over is in the database before the handler runs. Whatever becomes of the process, or of
    /// attempts of the handler, the failed node does not run again. When the handler fails for good too, the thread fails.
    #[must_use]
    pub fn on_error<N: Into<String>>(
        mut self,
        nodes: impl IntoIterator<Item = N>,
        handler: impl Into<String>,
    ) -> Self {
        let handler = handler.into();
        self.on_error
            .extend(nodes.into_iter().map(|node| (node.into(), handler.clone())));
        self
    }

    /// This node runs when the thread is cancelled, before it ends: a bounded chance to clean up. It cannot wait.
    #[must_use]
    pub fn on_cancel(mut self, node: impl Into<String>) -> Self {
        self.on_cancel = Some(node.into());
        self
    }

    /// What a thread returns at its end. Without it: the whole state.
    #[must_use]
    pub fn output(mut self, output: impl Fn(&S) -> Value + Send + Sync + 'static) -> Self {
        self.output = Some(Arc::new(output));
        self
    }

    /// How many supersteps may run without a wait between them before the thread fails; 1000 if not given.
    #[must_use]
    pub fn recursion_limit(mut self, steps: u64) -> Self {
        self.recursion_limit = steps;
        self
    }

    /// How many tasks of one step run at once; 64 if not given. The order of their results does not depend on it.
    #[must_use]
    pub fn parallel(mut self, tasks: usize) -> Self {
        self.parallel = tasks.max(1);
        self
    }

    /// Threads stop before these nodes, with an open interrupt named `before:{node}`; any answer lets them go on.
    #[must_use]
    pub fn interrupt_before<N: Into<String>>(mut self, nodes: impl IntoIterator<Item = N>) -> Self {
        self.pause_before.extend(nodes.into_iter().map(Into::into));
        self
    }

    /// Threads stop after these nodes, with an open interrupt named `after:{node}`; any answer lets them go on.
    #[must_use]
    pub fn interrupt_after<N: Into<String>>(mut self, nodes: impl IntoIterator<Item = N>) -> Self {
        self.pause_after.extend(nodes.into_iter().map(Into::into));
        self
    }

    /// Checks the graph, and names everything that is wrong with it at once.
    pub fn compile(mut self) -> Result<CompiledGraph<S>, CompileError> {
        let mut faults = std::mem::take(&mut self.faults);
        let mut names = BTreeSet::new();
        for (name, options, _) in &self.nodes {
            if let Some(key) = options
                .cache
                .as_ref()
                .and_then(|policy| policy.key.as_ref())
                && key.state != TypeId::of::<S>()
            {
                faults.push(Fault::CacheOfOtherState {
                    node: name.clone(),
                    state: key.state_name,
                });
            }
            if let Some(fault) = name_fault(name) {
                faults.push(Fault::BadName {
                    node: name.clone(),
                    fault,
                });
            }
            if !names.insert(name.as_str()) {
                faults.push(Fault::DuplicateNode(name.clone()));
            }
        }
        if self.recursion_limit == 0 {
            faults.push(Fault::NoSteps);
        }
        let shape = self.shape(&names, &mut faults);
        shape.check(self.on_cancel.as_deref(), &mut faults);
        if !faults.is_empty() {
            return Err(CompileError {
                graph: self.name,
                faults,
            });
        }
        Ok(self.assemble(shape))
    }

    fn shape(&self, names: &BTreeSet<&str>, faults: &mut Vec<Fault>) -> Shape {
        let mut edges: Vec<ShapeEdge> = Vec::new();
        let mut add =
            |faults: &mut Vec<Fault>, from: &str, to: &str, kind: EdgeKind, label: &str| {
                let from_known = names.contains(from)
                    || (from == START && !matches!(kind, EdgeKind::Command | EdgeKind::Error));
                if !from_known {
                    faults.push(Fault::UnknownSource {
                        from: from.to_owned(),
                        to: to.to_owned(),
                    });
                }
                let to_known = names.contains(to) || (to == END && kind != EdgeKind::Error);
                if !to_known {
                    faults.push(Fault::UnknownTarget {
                        from: from.to_owned(),
                        to: to.to_owned(),
                    });
                }
                if from_known && to_known {
                    let edge = ShapeEdge {
                        from: from.to_owned(),
                        to: to.to_owned(),
                        kind,
                        label: label.to_owned(),
                    };
                    if !edges.contains(&edge) {
                        edges.push(edge);
                    }
                }
            };
        for (from, to) in &self.edges {
            add(faults, from, to, EdgeKind::Static, "");
        }
        for (from, to) in &self.joins {
            if from.is_empty() {
                faults.push(Fault::EmptyJoin(to.clone()));
            }
            for source in from {
                if source == START {
                    faults.push(Fault::UnknownSource {
                        from: source.clone(),
                        to: to.clone(),
                    });
                } else {
                    add(faults, source, to, EdgeKind::Join, "");
                }
            }
        }
        for (from, targets, _) in &self.conditions {
            if targets.is_empty() {
                faults.push(Fault::NoTargets(from.clone()));
            }
            for to in targets {
                add(faults, from, to, EdgeKind::Conditional, "");
            }
        }
        for (from, targets) in &self.goes {
            for to in targets {
                add(faults, from, to, EdgeKind::Command, "");
            }
        }
        let mut handled = BTreeSet::new();
        for (node, handler) in &self.on_error {
            add(faults, node, handler, EdgeKind::Error, "error");
            if node == handler {
                faults.push(Fault::HandlesItself(node.clone()));
            }
            if !handled.insert(node) {
                faults.push(Fault::TwoHandlers(node.clone()));
            }
        }
        for name in self
            .on_cancel
            .iter()
            .chain(&self.pause_before)
            .chain(&self.pause_after)
        {
            if !names.contains(name.as_str()) {
                faults.push(Fault::UnknownNode(name.clone()));
            }
        }
        if !edges.iter().any(|edge| edge.from == START) {
            faults.push(Fault::NoEntry);
        }
        Shape {
            name: self.name.clone(),
            nodes: self
                .nodes
                .iter()
                .map(|(name, options, _)| ShapeNode {
                    name: name.clone(),
                    deferred: options.deferred,
                    on_cancel: self.on_cancel.as_deref() == Some(name),
                })
                .collect(),
            edges,
        }
    }

    fn assemble(self, shape: Shape) -> CompiledGraph<S> {
        let joins: Vec<Join> = self
            .joins
            .into_iter()
            .map(|(from, target)| {
                let sources: BTreeSet<String> = from.into_iter().collect();
                let list: Vec<&str> = sources.iter().map(String::as_str).collect();
                Join {
                    key: format!("{}>{target}", list.join("+")),
                    sources,
                    target,
                }
            })
            .collect();
        let mut edges: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (from, to) in self.edges {
            if to != END {
                edges.entry(from).or_default().push(to);
            }
        }
        let mut conditions: BTreeMap<String, Conditions<S>> = BTreeMap::new();
        for (from, targets, condition) in self.conditions {
            conditions
                .entry(from)
                .or_default()
                .push((condition, targets.into_iter().collect()));
        }
        let mut goes: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, targets) in self.goes {
            goes.entry(from).or_default().extend(targets);
        }
        let mut on_error: BTreeMap<String, String> = self.on_error.into_iter().collect();
        let caches = self
            .nodes
            .iter()
            .any(|(_, options, _)| options.cache.is_some());
        let nodes = self
            .nodes
            .into_iter()
            .map(|(name, options, run)| {
                let node = Node {
                    name: name.as_str().into(),
                    run,
                    options,
                    edges: edges.remove(&name).unwrap_or_default(),
                    joins: (0..joins.len())
                        .filter(|index| joins[*index].sources.contains(&name))
                        .collect(),
                    conditions: conditions.remove(&name).unwrap_or_default(),
                    goes: goes.remove(&name).unwrap_or_default(),
                    on_error: on_error.remove(&name),
                };
                (name, Arc::new(node))
            })
            .collect();
        CompiledGraph {
            inner: Arc::new(Compiled {
                name: self.name.into(),
                nodes,
                entry: edges.remove(START).unwrap_or_default(),
                entry_conditions: conditions.remove(START).unwrap_or_default(),
                joins,
                on_cancel: self.on_cancel,
                output: self.output,
                recursion_limit: self.recursion_limit,
                parallel: self.parallel,
                pause_before: self.pause_before,
                pause_after: self.pause_after,
                shape,
                caches,
            }),
        }
    }
}

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

    /// The graph in Graphviz's language.
    pub fn to_dot(&self) -> String {
        self.inner.shape.to_dot()
    }

    /// The graph as an SVG picture.
    pub fn to_svg(&self) -> String {
        self.inner.shape.to_svg()
    }
}

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
