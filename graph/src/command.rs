//! What a node hands back: an update, a [`Command`] (update and where to go), or several; and where edges may lead.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::{
    error::NodeError,
    nest::Kept,
    private::chain,
    state::{State, Update},
};

/// Where a graph begins. An edge from here names a first node.
pub const START: &str = "__start__";
/// Where a graph ends. An edge to here says that nothing follows.
pub const END: &str = "__end__";

/// One more task of a node, in the next step, with an argument of its own.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Send {
    #[serde(rename = "n")]
    pub(crate) node: String,
    #[serde(rename = "a")]
    pub(crate) argument: Value,
    #[serde(skip)]
    pub(crate) fault: Option<String>,
}

impl Send {
    /// A task of `node` that finds `argument` in [`Context::argument`](crate::Context::argument). An argument that cannot be
    /// written as JSON fails the node that returns it.
    pub fn new<A: Serialize + ?Sized>(node: impl Into<String>, argument: &A) -> Self {
        let (argument, fault) = match serde_json::to_value(argument) {
            Ok(value) => (value, None),
            Err(error) => (Value::Null, Some(error.to_string())),
        };
        Self {
            node: node.into(),
            argument,
            fault,
        }
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The argument, read back.
    pub fn argument<A: DeserializeOwned>(&self) -> Result<A, serde_json::Error> {
        serde_json::from_value(self.argument.clone())
    }
}

/// One place to go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum Target {
    Node(String),
    Send(Send),
}

/// Where a conditional edge leads.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Goto {
    pub(crate) targets: Vec<Target>,
}

impl Goto {
    /// To one node (or [`END`]).
    pub fn node(name: impl Into<String>) -> Self {
        Self {
            targets: vec![Target::Node(name.into())],
        }
    }

    /// To several nodes, which run in the same step.
    pub fn nodes<N: Into<String>>(names: impl IntoIterator<Item = N>) -> Self {
        Self {
            targets: names
                .into_iter()
                .map(|name| Target::Node(name.into()))
                .collect(),
        }
    }

    /// To a task with its own argument.
    pub fn send(send: Send) -> Self {
        Self {
            targets: vec![Target::Send(send)],
        }
    }

    /// To several tasks with their own arguments.
    pub fn sends(sends: impl IntoIterator<Item = Send>) -> Self {
        Self {
            targets: sends.into_iter().map(Target::Send).collect(),
        }
    }

    /// To the end.
    pub fn end() -> Self {
        Self::node(END)
    }

    /// Here and there.
    #[must_use]
    pub fn and(mut self, other: Self) -> Self {
        self.targets.extend(other.targets);
        self
    }
}

impl From<&str> for Goto {
    fn from(name: &str) -> Self {
        Self::node(name)
    }
}

impl From<String> for Goto {
    fn from(name: String) -> Self {
        Self::node(name)
    }
}

impl From<Send> for Goto {
    fn from(send: Send) -> Self {
        Self::send(send)
    }
}

impl From<Vec<Send>> for Goto {
    fn from(sends: Vec<Send>) -> Self {
        Self::sends(sends)
    }
}

/// A command to the graph around a subgraph, whatever its state.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Handover {
    #[serde(rename = "u", default, skip_serializing_if = "Value::is_null")]
    update: Value,
    #[serde(rename = "g", default, skip_serializing_if = "Vec::is_empty")]
    goto: Vec<Target>,
    /// What it says to the graph around that one.
    #[serde(rename = "h", default, skip_serializing_if = "Vec::is_empty")]
    further: Vec<Handover>,
    #[serde(skip)]
    fault: Option<String>,
}

/// An update and where to go, in one. Going somewhere adds to the static edges of the node.
#[derive(Clone, Debug)]
pub struct Command<S: State> {
    update: Option<S::Update>,
    goto: Goto,
    parent: Vec<Handover>,
}

impl<S: State> Command<S> {
    /// Neither updates nor goes anywhere.
    pub fn new() -> Self {
        Self::to(Goto::default())
    }

    /// Addresses the graph around this one, of which it is a subgraph: that one's state is updated, and what follows the
    /// subgraph's node there is where the command goes (declared for that node with
    /// [`GraphBuilder::goes`](crate::GraphBuilder::goes)) beside its static edges. The superstep in which a node says this is
    /// the subgraph's last, and the command takes the place of the subgraph's result. In a graph that is nobody's subgraph
    /// it is an error.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use graph::{Command, CompileError, Context, END, Graph, Goto, START};
    /// # #[derive(Clone, Default, graph::State)]
    /// # struct Office { desk: String }
    /// # #[derive(Clone, Default, graph::State)]
    /// # struct Talk { said: String }
    /// # fn office() -> Result<graph::CompiledGraph<Office>, CompileError> {
    /// let talk = Graph::<Talk>::builder("talk")
    ///     .node("listen", |_, _: Context| async {
    ///         let handover = Command::<Office>::goto("billing").update(OfficeUpdate::default().desk("billing".into()));
    ///         Ok(Command::<Talk>::parent(handover))
    ///     })
    ///     .edge(START, "listen")
    ///     .edge("listen", END)
    ///     .compile()?;
    /// Graph::<Office>::builder("office")
    ///     .subgraph("talk", &talk, |_, _| Ok(TalkUpdate::default()), |_| OfficeUpdate::default())
    ///     .node("billing", |_, _: Context| async { Ok(()) })
    ///     .edge(START, "talk")
    ///     .goes("talk", ["billing"])
    ///     .edge("talk", END)
    ///     .edge("billing", END)
    ///     .compile()
    /// # }
    /// # office().unwrap();
    /// ```
    pub fn parent<P: State>(command: Command<P>) -> Self {
        let mut handover = Handover {
            goto: command.goto.targets,
            further: command.parent,
            ..Handover::default()
        };
        match command.update.map(|update| update.to_channels()) {
            Some(Ok(channels)) => handover.update = Value::Object(channels),
            Some(Err(error)) => handover.fault = Some(chain(&error)),
            None => {}
        }
        Self {
            parent: vec![handover],
            ..Self::new()
        }
    }

    /// Goes to a node. Declare it with [`GraphBuilder::goes`](crate::GraphBuilder::goes).
    pub fn goto(node: impl Into<String>) -> Self {
        Self::to(Goto::node(node))
    }

    /// Goes to the end: nowhere but where static edges lead.
    pub fn end() -> Self {
        Self::to(Goto::end())
    }

    /// Starts a task with its own argument.
    pub fn send(send: Send) -> Self {
        Self::to(Goto::send(send))
    }

    /// Goes wherever `goto` says.
    pub fn to(goto: Goto) -> Self {
        Self {
            update: None,
            goto,
            parent: Vec::new(),
        }
    }

    /// Goes there too.
    #[must_use]
    pub fn and(mut self, goto: impl Into<Goto>) -> Self {
        self.goto = self.goto.and(goto.into());
        self
    }

    /// With this update.
    #[must_use]
    pub fn update(mut self, update: S::Update) -> Self {
        self.update = Some(update);
        self
    }
}

impl<S: State> Default for Command<S> {
    fn default() -> Self {
        Self::new()
    }
}

/// All that a node hands back. Made by `into()` from an update, a [`Command`], a list of commands, or `()`.
#[derive(Clone, Debug)]
pub struct Outcome<S: State> {
    pub(crate) updates: Vec<S::Update>,
    pub(crate) goto: Vec<Target>,
    /// What it says to the graph around this one.
    pub(crate) handovers: Vec<Handover>,
    /// What accumulating subgraphs in the task have added.
    pub(crate) kept: Vec<Kept>,
}

impl<S: State> Outcome<S> {
    /// One update.
    pub fn update(update: S::Update) -> Self {
        Self {
            updates: vec![update],
            ..Self::from(())
        }
    }

    /// What is wrong with what it says to the graph around it, if something is.
    pub(crate) fn fault(&self) -> Option<&str> {
        self.handovers
            .iter()
            .find_map(|handover| handover.fault.as_deref())
    }

    /// What a task hands back whose subgraph has addressed its graph.
    pub(crate) fn handed_over(handovers: Vec<Handover>) -> Result<Self, NodeError> {
        let mut outcome = Self::from(());
        for handover in handovers {
            if !handover.update.is_null() {
                let update = S::Update::from_json(handover.update).map_err(|error| {
                    NodeError::from(error)
                        .context("the subgraph's command does not fit the state of its parent")
                        .fatal()
                })?;
                outcome.updates.push(update);
            }
            outcome.goto.extend(handover.goto);
            outcome.handovers.extend(handover.further);
        }
        Ok(outcome)
    }
}

impl<S: State> From<()> for Outcome<S> {
    fn from((): ()) -> Self {
        Self {
            updates: Vec::new(),
            goto: Vec::new(),
            handovers: Vec::new(),
            kept: Vec::new(),
        }
    }
}

impl<S: State> From<Command<S>> for Outcome<S> {
    fn from(command: Command<S>) -> Self {
        Self {
            updates: command.update.into_iter().collect(),
            goto: command.goto.targets,
            handovers: command.parent,
            kept: Vec::new(),
        }
    }
}

impl<S: State> From<Vec<Command<S>>> for Outcome<S> {
    fn from(commands: Vec<Command<S>>) -> Self {
        let mut outcome = Self::from(());
        for command in commands {
            outcome.updates.extend(command.update);
            outcome.goto.extend(command.goto.targets);
            outcome.handovers.extend(command.parent);
        }
        outcome
    }
}
