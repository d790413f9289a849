//! Errors: [`NodeError`] is what nodes return; [`EngineError`] is what callers of the engine get. What a database does wrong
//! is a [`StorageError`].

use std::{error::Error, fmt};

use crate::{
    builder::CompileError,
    checkpoint::{StorageError, ThreadStatus, WaitKind},
    command::Handover,
    ids::ThreadId,
    private::chain,
    state::ChannelError,
};

/// Why a node could not finish: a failure, or one of the engine's own reasons (suspended, cancelled), which travel the same
/// way so that nodes can use `?` for all of them.
///
/// Made from any error by `?`. It does not implement [`Error`] itself, like `anyhow::Error`, for the same reason.
pub struct NodeError {
    kind: Kind,
}

enum Kind {
    Failed {
        error: Box<dyn Error + Send + Sync>,
        retry: Option<bool>,
    },
    Suspended,
    Cancelled,
    Lost,
    /// The process is to stop, and the work goes on in another.
    Yielded,
    /// A subgraph has addressed the graph around it.
    Handover(Vec<Handover>),
}

#[derive(Debug)]
struct Message(String);

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Message {}

#[derive(Debug)]
struct WithContext {
    context: String,
    source: Box<dyn Error + Send + Sync>,
}

impl fmt::Display for WithContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.context)
    }
}

impl Error for WithContext {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        Some(&*self.source)
    }
}

impl NodeError {
    /// A failure with this text.
    pub fn msg(message: impl fmt::Display) -> Self {
        Self::failed(Box::new(Message(message.to_string())), None)
    }

    /// A failure with this text that passes: the default predicate of a [`RetryPolicy`](crate::RetryPolicy), and every
    /// sensible other one, retries it.
    pub fn retryable(message: impl fmt::Display) -> Self {
        Self::failed(Box::new(Message(message.to_string())), Some(true))
    }

    /// The same failure, never to be retried.
    #[must_use]
    pub fn fatal(mut self) -> Self {
        if let Kind::Failed { retry, .. } = &mut self.kind {
            *retry = Some(false);
        }
        self
    }

    /// The same failure, with a sentence before its text. Suspensions pass through untouched.
    #[must_use]
    pub fn context(self, context: impl fmt::Display) -> Self {
        match self.kind {
            Kind::Failed { error, retry } => Self::failed(
                Box::new(WithContext {
                    context: context.to_string(),
                    source: error,
                }),
                retry,
            ),
            kind => Self { kind },
        }
    }

    fn failed(error: Box<dyn Error + Send + Sync>, retry: Option<bool>) -> Self {
        Self {
            kind: Kind::Failed { error, retry },
        }
    }

    pub(crate) fn suspended() -> Self {
        Self {
            kind: Kind::Suspended,
        }
    }

    pub(crate) fn cancelled() -> Self {
        Self {
            kind: Kind::Cancelled,
        }
    }

    /// The run has lost its lease or its database: stop without a trace.
    pub(crate) fn lost() -> Self {
        Self { kind: Kind::Lost }
    }

    /// The run is to give its lease back; the task runs again in the next one.
    pub(crate) fn yielded() -> Self {
        Self {
            kind: Kind::Yielded,
        }
    }

    /// A subgraph has addressed the graph around it: what it says is what the task hands back.
    pub(crate) fn handover(handovers: Vec<Handover>) -> Self {
        Self {
            kind: Kind::Handover(handovers),
        }
    }

    /// What a subgraph says to the graph around it, if this is how it ended.
    pub(crate) fn take_handover(self) -> Result<Vec<Handover>, Self> {
        match self.kind {
            Kind::Handover(handovers) => Ok(handovers),
            kind => Err(Self { kind }),
        }
    }

    /// Whether it is no failure at all: the task waits for something and will run again when it has come. Must be returned.
    pub fn is_suspended(&self) -> bool {
        matches!(self.kind, Kind::Suspended | Kind::Yielded)
    }

    pub(crate) fn is_yielded(&self) -> bool {
        matches!(self.kind, Kind::Yielded)
    }

    /// Whether the thread is being cancelled.
    pub fn is_cancelled(&self) -> bool {
        matches!(self.kind, Kind::Cancelled)
    }

    pub(crate) fn is_lost(&self) -> bool {
        matches!(self.kind, Kind::Lost)
    }

    /// Whether it is a failure, as opposed to a suspension or a cancellation.
    pub fn is_failure(&self) -> bool {
        matches!(self.kind, Kind::Failed { .. })
    }

    /// Whether it must never be retried.
    pub fn is_fatal(&self) -> bool {
        matches!(
            self.kind,
            Kind::Failed {
                retry: Some(false),
                ..
            }
        )
    }

    /// Whether it was made by [`NodeError::retryable`].
    pub fn is_retryable(&self) -> bool {
        matches!(
            self.kind,
            Kind::Failed {
                retry: Some(true),
                ..
            }
        )
    }

    /// The failure's own error, if it is (or was caused by) one of this type.
    pub fn downcast_ref<E: Error + 'static>(&self) -> Option<&E> {
        let Kind::Failed { error, .. } = &self.kind else {
            return None;
        };
        let mut error: &(dyn Error + 'static) = &**error;
        loop {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            error = error.source()?;
        }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for NodeError {
    fn from(error: E) -> Self {
        Self::failed(Box::new(error), None)
    }
}

impl fmt::Display for NodeError {
    /// The text with all causes, on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Failed { error, .. } => f.write_str(&chain(&**error)),
            Kind::Suspended => f.write_str("the task is suspended"),
            Kind::Cancelled => f.write_str("the thread is being cancelled"),
            Kind::Lost => f.write_str("the run has lost its thread"),
            Kind::Yielded => f.write_str("the run is about to be handed to another process"),
            Kind::Handover(_) => f.write_str("a subgraph has handed over to the graph around it"),
        }
    }
}

impl fmt::Debug for NodeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Failed { error, retry } => f
                .debug_struct("NodeError")
                .field("error", error)
                .field("retry", retry)
                .finish(),
            _ => write!(f, "NodeError({self})"),
        }
    }
}

/// What a node that takes over after a failure finds in [`Context::failure`](crate::Context::failure).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TaskFailure {
    /// The node that failed.
    pub node: String,
    /// The failure of its last attempt, with all causes.
    pub error: String,
    /// How many attempts it had, counted over crashes and retries by hand.
    pub attempts: u32,
}

/// Why a parent has nothing of a child that it could read ([`ChildEnd::output_as`](crate::ChildEnd::output_as)).
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChildError {
    /// The child failed or was cancelled, so it has returned nothing.
    #[error(
        "child `{child}` has returned nothing: it is {}{}; look at it with `Engine::thread`", status.as_str(), error.as_ref().map(|error| format!(" ({error})")).unwrap_or_default()
    )]
    NotDone {
        /// The child.
        child: ThreadId,
        /// How it ended.
        status: ThreadStatus,
        /// Why.
        error: Option<String>,
    },
    /// What it has returned is not of the type that its parent reads.
    #[error(
        "what child `{child}` returned is not what its parent reads, and the first end counts; retry the parent (`Engine::retry`) with a program that can read it"
    )]
    Unfit {
        /// The child.
        child: ThreadId,
        /// What does not fit.
        #[source]
        source: serde_json::Error,
    },
}

/// Why the engine could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The id cannot be a thread's.
    #[error("`{id}` cannot be the id of a thread: {fault}")]
    InvalidThreadId {
        /// The id, cut to a readable length.
        id: String,
        /// What is wrong with it.
        fault: &'static str,
    },
    /// There is no such thread.
    #[error("there is no thread `{0}`")]
    UnknownThread(ThreadId),
    /// There is no store of documents.
    #[error(
        "this database has no store of documents; give the engine one with `EngineBuilder::documents`"
    )]
    NoDocuments,
    /// A thread cannot be copied to an id that another one has.
    #[error("there is a thread `{0}` already; copy to another id, or delete it first")]
    ThreadExists(ThreadId),
    /// This engine was built without that graph.
    #[error("this engine knows no graph `{graph}`; it knows {known}")]
    UnknownGraph {
        /// The name that was given.
        graph: String,
        /// The names that exist.
        known: String,
    },
    /// Two graphs of the same name were given.
    #[error("two graphs are called `{0}`; give them different names")]
    DuplicateGraph(String),
    /// There is no such node.
    #[error("graph `{graph}` has no node `{node}`")]
    UnknownNode {
        /// The graph.
        graph: String,
        /// The name that was given.
        node: String,
    },
    /// Kinds that begin with `graph.` are the engine's own.
    #[error("the signal kind `{0}` is reserved; choose one that does not begin with `graph.`")]
    ReservedKind(String),
    /// The mailbox is full.
    #[error("the mailbox of thread `{0}` is full: it has {limit} signals that nobody has taken", limit = crate::checkpoint::MAILBOX_LIMIT)]
    MailboxFull(ThreadId),
    /// Nothing with this id is being asked.
    #[error(
        "thread `{thread}`, at checkpoint {checkpoint}, is not asking `{interrupt}` (any more); what it asks now is in the waits of `Engine::thread`"
    )]
    UnknownInterrupt {
        /// The thread.
        thread: ThreadId,
        /// The checkpoint on which it stands.
        checkpoint: u64,
        /// The id that was given.
        interrupt: String,
    },
    /// The thread waits under this id, but for something else than an answer.
    #[error(
        "`{wait}` of thread `{thread}`, at checkpoint {checkpoint}, is no question: under the name `{name}` the thread waits for signals, children or a time ({kind:?}); send it a signal that it waits for (`Engine::signal`), or answer one of its waits that is an interrupt"
    )]
    NotAQuestion {
        /// The thread.
        thread: ThreadId,
        /// The checkpoint on which it stands.
        checkpoint: u64,
        /// The id that was given.
        wait: String,
        /// The name of the wait in its node.
        name: String,
        /// What kind of waiting it is.
        kind: WaitKind,
    },
    /// The question was asked until a time ([`Context::interrupt_until`](crate::Context::interrupt_until)), which has passed.
    #[error(
        "the time to answer `{interrupt}` of thread `{thread}`, at checkpoint {checkpoint}, is over, and the thread goes on without an answer; what it asks now is in the waits of `Engine::thread`"
    )]
    Expired {
        /// The thread.
        thread: ThreadId,
        /// The checkpoint on which it stands.
        checkpoint: u64,
        /// The id that was given.
        interrupt: String,
    },
    /// The question has its answer already; the first one counts.
    #[error(
        "`{interrupt}` of thread `{thread}`, at checkpoint {checkpoint}, has been answered already, and the first answer counts; to ask again, fork the thread from a checkpoint before that"
    )]
    AlreadyAnswered {
        /// The thread.
        thread: ThreadId,
        /// The checkpoint on which it stands.
        checkpoint: u64,
        /// The id that was given.
        interrupt: String,
    },
    /// The question was asked on a branch that is not the head.
    #[error(
        "`{interrupt}` was asked on branch {branch} of thread `{thread}`, whose head is branch {head}, at checkpoint {checkpoint}; answer what the head asks, or make that branch the head (`Engine::set_head`)"
    )]
    OtherBranch {
        /// The thread.
        thread: ThreadId,
        /// The checkpoint on which it stands.
        checkpoint: u64,
        /// The id that was given.
        interrupt: String,
        /// The branch on which it was asked.
        branch: u32,
        /// The head branch.
        head: u32,
    },
    /// The thread cannot be retried: it has neither failed nor been cancelled.
    #[error("thread `{thread}` is {status:?}; only a failed or cancelled thread can be retried")]
    NotRetryable {
        /// The thread.
        thread: ThreadId,
        /// What it is instead.
        status: ThreadStatus,
    },
    /// The thread is busy, and the input was to be rejected then.
    #[error(
        "thread `{thread}` is {status:?}; a further input is taken when it has ended, or with `Busy::Enqueue`"
    )]
    Busy {
        /// The thread.
        thread: ThreadId,
        /// What it is doing.
        status: ThreadStatus,
    },
    /// An input or an update does not fit the state.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// What is stored does not fit the type of the graph's state (any more).
    #[error(
        "the state of thread `{thread}` at checkpoint {checkpoint} does not fit graph `{graph}`; look at it with `Engine::stored_state`, and then use a graph that it fits, or go on from a fork with another state (`Engine::fork_with_state`)"
    )]
    StoredState {
        /// The thread.
        thread: ThreadId,
        /// The checkpoint.
        checkpoint: u64,
        /// The graph.
        graph: String,
        /// What does not fit.
        #[source]
        source: ChannelError,
    },
    /// The state of a subgraph was asked for as another type than it has, or stored values do not fit any more.
    #[error(
        "what is stored of subgraph `{namespace}` of thread `{thread}` does not fit the type that was asked for: {fault}"
    )]
    StateInside {
        /// The thread.
        thread: ThreadId,
        /// The subgraph.
        namespace: String,
        /// What does not fit.
        fault: String,
    },
    /// The state was asked for as another type than the graph's.
    #[error("thread `{thread}` runs graph `{graph}`, whose state is of another type")]
    OtherState {
        /// The thread.
        thread: ThreadId,
        /// Its graph.
        graph: String,
    },
    /// The plan of a fork cannot be made.
    #[error("thread `{thread}` cannot be forked: {fault}")]
    Fork {
        /// The thread.
        thread: ThreadId,
        /// What is wrong.
        fault: String,
    },
    /// A payload cannot be written as JSON.
    #[error("the value cannot be written as JSON")]
    Json(#[from] serde_json::Error),
    /// A graph does not compile.
    #[error(transparent)]
    Compile(#[from] CompileError),
    /// The database.
    #[error(transparent)]
    Storage(#[from] StorageError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_with_its_causes() {
        let error =
            NodeError::from(std::io::Error::other("the disk is full")).context("writing the plan");
        assert_eq!(error.to_string(), "writing the plan: the disk is full");
        assert!(error.downcast_ref::<std::io::Error>().is_some());
        assert!(error.downcast_ref::<fmt::Error>().is_none());
        assert!(error.is_failure() && !error.is_fatal());
        assert!(error.fatal().context("again").is_fatal());
    }

    #[test]
    fn a_suspension_stays_one_whatever_is_said_about_it() {
        let error = NodeError::suspended().context("x").fatal();
        assert!(error.is_suspended() && !error.is_failure() && !error.is_fatal());
    }
}
