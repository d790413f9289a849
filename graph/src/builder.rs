//! Building a graph: nodes, edges, and the check of the whole.

mod check;
mod compiled;
mod fault;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    sync::Arc,
};

use serde_json::Value;

use crate::{
    command::{Goto, Outcome},
    context::Context,
    error::NodeError,
    options::NodeOptions,
    run::{Begin, invoke},
    shape::Shape,
    state::State,
    subgraph::{SubgraphMemory, SubgraphOptions},
};

pub use compiled::CompiledGraph;
pub(crate) use compiled::{Compiled, Condition, Node};
use compiled::{NodeFunction, Output};
pub(crate) use fault::name_fault;
pub use fault::{CompileError, Fault};

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
            insides: BTreeMap::new(),
            recursion_limit: 1000,
            parallel: 64,
            pause_before: BTreeSet::new(),
            pause_after: BTreeSet::new(),
            faults: Vec::new(),
        }
    }
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
    /// The shapes of the graphs that are nodes, for drawings.
    insides: BTreeMap<String, Shape>,
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
    /// children. See [`SubgraphMemory`] for what survives what.
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
        let name = name.into();
        self.insides.insert(name.clone(), graph.shape().clone());
        self.nodes.push((name, options.node, run));
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
        self.insides.insert(name.clone(), graph.shape().clone());
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

    /// After `from` comes `to`. [`START`](crate::START) leads to the first nodes, and to [`END`](crate::END) lead the last ones.
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
    ///
    /// In a subgraph, it runs if the subgraph has begun and not ended, from the inside out, and the thread's own node comes last.
    /// To get there, nodes that [invoke](Context::invoke) run once more, up to where they were and no further. What it hands back
    /// belongs to the state of the subgraph, which goes on from there if the thread is resumed. Nothing is known of stateless
    /// subgraphs, so those do not clean up.
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
}
