//! What a node hands back: an update, a [`Command`] (update and where to go), or several; and where edges may lead.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;

use crate::state::State;

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

/// An update and where to go, in one. Going somewhere adds to the static edges of the node.
#[derive(Clone, Debug)]
pub struct Command<S: State> {
    update: Option<S::Update>,
    goto: Goto,
}

impl<S: State> Command<S> {
    /// Neither updates nor goes anywhere.
    pub fn new() -> Self {
        Self {
            update: None,
            goto: Goto::default(),
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
        Self { update: None, goto }
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
}

impl<S: State> Outcome<S> {
    /// One update.
    pub fn update(update: S::Update) -> Self {
        Self {
            updates: vec![update],
            goto: Vec::new(),
        }
    }
}

impl<S: State> From<()> for Outcome<S> {
    fn from((): ()) -> Self {
        Self {
            updates: Vec::new(),
            goto: Vec::new(),
        }
    }
}

impl<S: State> From<Command<S>> for Outcome<S> {
    fn from(command: Command<S>) -> Self {
        Self {
            updates: command.update.into_iter().collect(),
            goto: command.goto.targets,
        }
    }
}

impl<S: State> From<Vec<Command<S>>> for Outcome<S> {
    fn from(commands: Vec<Command<S>>) -> Self {
        let mut outcome = Self::from(());
        for command in commands {
            outcome.updates.extend(command.update);
            outcome.goto.extend(command.goto.targets);
        }
        outcome
    }
}
