//! Points at which somebody may look on: tests that kill the process there, and spans.

use crate::ids::ThreadId;

/// A moment in a run. More may be added.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum Point<'a> {
    /// A run of a thread begins.
    RunStarted {
        /// The thread.
        thread: &'a ThreadId,
        /// The run's span, which nobody has entered yet: whoever looks on may give it a parent, so that the runs of a thread,
        /// between which it sleeps, are joined into one trace.
        span: &'a tracing::Span,
    },
    /// An attempt of a task begins.
    NodeStarted {
        /// The thread.
        thread: &'a ThreadId,
        /// The node.
        node: &'a str,
        /// From 1.
        attempt: u32,
    },
    /// An attempt of a task is over.
    NodeFinished {
        /// The thread.
        thread: &'a ThreadId,
        /// The node.
        node: &'a str,
        /// From 1.
        attempt: u32,
        /// `done`, `suspended`, `cancelled` or `failed`.
        result: &'a str,
    },
    /// The effect of a durable step has happened, and its result is about to be remembered.
    StepRemembering {
        /// The thread.
        thread: &'a ThreadId,
        /// The node.
        node: &'a str,
        /// The step's name.
        name: &'a str,
    },
    /// The result of a durable step is in the database.
    StepRemembered {
        /// The thread.
        thread: &'a ThreadId,
        /// The node.
        node: &'a str,
        /// The step's name.
        name: &'a str,
    },
    /// A commit of the run is about to be sent to the database (a superstep's, a suspension's or an end's).
    BeforeCommit {
        /// The thread.
        thread: &'a ThreadId,
        /// The nodes of the step.
        nodes: &'a [String],
    },
    /// That commit has landed.
    AfterCommit {
        /// The thread.
        thread: &'a ThreadId,
        /// The nodes of the step.
        nodes: &'a [String],
    },
    /// A loop that serves was told to stop, takes no more threads, and has told its runs to stop after the step they are in.
    Draining,
}

/// Looks on. Called synchronously in the middle of what happens: be quick.
pub trait Observer: Send + Sync + 'static {
    /// Something is happening.
    fn on(&self, point: &Point<'_>);
}

impl<F: Fn(&Point<'_>) + Send + Sync + 'static> Observer for F {
    fn on(&self, point: &Point<'_>) {
        self(point);
    }
}
