//! What a task can wait for, and what comes.

use jiff::Timestamp;
use serde::{
    Deserialize, Serialize,
    de::{DeserializeOwned, IgnoredAny},
};
use serde_json::Value;

use crate::{
    checkpoint::{SignalRecord, StorageError, StoredPart, ThreadStatus, WaitKind, WaitRecord},
    error::{ChildError, NodeError},
    ids::ThreadId,
};

/// Kinds of signals that are the engine's own begin so.
pub(crate) const RESERVED: &str = "graph.";
/// The answer to an interrupt; the payload is an [`Answer`].
pub(crate) const ANSWER: &str = "graph.answer";
/// The time to answer a question is over; the payload is an [`Expiry`]. Sent by the run that finds it, to its own thread.
pub(crate) const EXPIRED: &str = "graph.expired";
/// The end of a child; the payload is a [`ChildEnd`].
pub(crate) const CHILD: &str = "graph.child";
/// A further input to a thread that has ended, or will; the payload is an update.
pub(crate) const INPUT: &str = "graph.input";
/// A further input that does not wait for the end of the round under way.
pub(crate) const INTERRUPT: &str = "graph.input.interrupt";
/// A further input that undoes the round under way.
pub(crate) const ROLLBACK: &str = "graph.input.rollback";

pub(crate) fn is_input(kind: &str) -> bool {
    matches!(kind, INPUT | INTERRUPT | ROLLBACK)
}

/// Whether a signal ends a question.
pub(crate) fn is_reply(kind: &str) -> bool {
    matches!(kind, ANSWER | EXPIRED)
}

/// Whether a round under way makes way for such a signal.
pub(crate) fn preempts(kind: &str) -> bool {
    matches!(kind, INTERRUPT | ROLLBACK)
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Answer {
    pub id: String,
    pub value: Value,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Expiry {
    pub id: String,
}

/// The key of the signal that a question has expired. It stays known, so that a late answer is told what it came too late for.
pub(crate) fn expiry_key(interrupt: &str) -> String {
    format!("{EXPIRED}:{interrupt}")
}

/// What became of a question that had a deadline ([`Context::interrupt_until`](crate::Context::interrupt_until)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply<A> {
    /// The answer came in time.
    Answered(A),
    /// The deadline passed without an answer. One that comes now is an error for whoever gives it.
    Expired,
}

impl<A> Reply<A> {
    /// The answer, if it came in time.
    pub fn answer(self) -> Option<A> {
        match self {
            Self::Answered(answer) => Some(answer),
            Self::Expired => None,
        }
    }
}

/// A set of things to wait for: the first that comes ends the wait.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WaitFor {
    pub(crate) signals: Vec<String>,
    pub(crate) children: Vec<String>,
    pub(crate) until: Option<Timestamp>,
}

impl WaitFor {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A signal of this kind.
    #[must_use]
    pub fn signal(mut self, kind: impl Into<String>) -> Self {
        self.signals.push(kind.into());
        self
    }

    /// The end of the child with this name.
    #[must_use]
    pub fn child(mut self, name: impl Into<String>) -> Self {
        self.children.push(name.into());
        self
    }

    /// The ends of the children with these names, whichever comes first.
    #[must_use]
    pub fn children<N: Into<String>>(mut self, names: impl IntoIterator<Item = N>) -> Self {
        self.children.extend(names.into_iter().map(Into::into));
        self
    }

    /// This time, by the database's clock. Of several, the earliest.
    #[must_use]
    pub fn until(mut self, at: Timestamp) -> Self {
        self.until = Some(self.until.map_or(at, |present| present.min(at)));
        self
    }
}

/// A signal that was waited for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Signal {
    /// What kind of news it is.
    pub kind: String,
    /// Its unique key.
    pub key: String,
    /// The details.
    pub payload: Value,
}

impl Signal {
    /// The payload, as a type.
    pub fn payload<T: DeserializeOwned>(&self) -> Result<T, serde_json::Error> {
        T::deserialize(&self.payload)
    }
}

/// How a child ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChildEnd {
    /// The name under which it was spawned.
    pub name: String,
    /// Its id.
    pub thread: ThreadId,
    /// Done, failed or cancelled.
    pub status: ThreadStatus,
    /// What it returned; null if it returned nothing.
    pub output: Value,
    /// Why it failed or was cancelled.
    pub error: Option<String>,
}

impl ChildEnd {
    /// What it returned, as a type. Of a child that is not done, or whose output does not fit, a failure for good with a
    /// [`ChildError`] in it ([`NodeError::downcast_ref`]): another attempt would read the same.
    pub fn output_as<T: DeserializeOwned>(&self) -> Result<T, NodeError> {
        let child = self.thread.clone();
        let error = if self.status == ThreadStatus::Done {
            match T::deserialize(&self.output) {
                Ok(output) => return Ok(output),
                Err(source) => ChildError::Unfit { child, source },
            }
        } else {
            ChildError::NotDone {
                child,
                status: self.status,
                error: self.error.clone(),
            }
        };
        Err(NodeError::from(error).fatal())
    }
}

/// What ended a wait.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Arrived {
    /// A signal.
    Signal(Signal),
    /// A child's end.
    Child(ChildEnd),
    /// The time.
    Timer,
}

/// Whether a signal ends a wait, and as what a re-run gets it: the answer's value, or an [`Arrived`].
pub(crate) fn arrival(wait: &WaitRecord, signal: &SignalRecord) -> Option<Value> {
    match signal.kind.as_str() {
        ANSWER => {
            if wait.kind != WaitKind::Interrupt {
                return None;
            }
            let answer = Answer::deserialize(&signal.payload).ok()?;
            (answer.id == wait.id).then_some(answer.value)
        }
        CHILD => {
            let name = signal.payload.get("name")?.as_str()?;
            if wait.children.iter().all(|child| child != name) {
                return None;
            }
            let end = ChildEnd::deserialize(&signal.payload).ok()?;
            serde_json::to_value(Arrived::Child(end)).ok()
        }
        kind if kind.starts_with(RESERVED) => None,
        kind => {
            if wait.signals.iter().all(|wanted| wanted != kind) {
                return None;
            }
            serde_json::to_value(Arrived::Signal(Signal {
                kind: signal.kind.clone(),
                key: signal.key.clone(),
                payload: signal.payload.clone(),
            }))
            .ok()
        }
    }
}

/// What is wrong with the engine's own signals among these, if something is: whoever waits for one that cannot be read would
/// wait for ever.
pub(crate) fn readable(thread: &ThreadId, signals: &[SignalRecord]) -> Result<(), StorageError> {
    /// An end without its output, which is as large as the child likes.
    #[derive(Deserialize)]
    #[allow(dead_code, reason = "only whether it can be read is of interest")]
    struct Bare<'a> {
        name: &'a str,
        thread: &'a str,
        status: ThreadStatus,
        output: IgnoredAny,
        error: Option<&'a str>,
    }
    #[derive(Deserialize)]
    #[allow(dead_code, reason = "only whether it can be read is of interest")]
    struct Meant<'a> {
        id: &'a str,
    }
    for signal in signals {
        let read = match signal.kind.as_str() {
            CHILD => Bare::deserialize(&signal.payload).map(|_| ()),
            ANSWER | EXPIRED => Meant::deserialize(&signal.payload).map(|_| ()),
            _ => Ok(()),
        };
        if let Err(error) = read {
            return Err(StorageError::Unreadable {
                thread: thread.clone(),
                part: StoredPart::Signal(signal.number),
                what: format!(
                    "it is a `{}` and not as such a one is: {error}",
                    signal.kind
                ),
            });
        }
    }
    Ok(())
}

/// Whether a signal says that the time of a question is over.
pub(crate) fn expires(wait: &WaitRecord, signal: &SignalRecord) -> bool {
    signal.kind == EXPIRED
        && wait.kind == WaitKind::Interrupt
        && Expiry::deserialize(&signal.payload).is_ok_and(|expiry| expiry.id == wait.id)
}

/// What a re-run gets when the time has come.
pub(crate) fn timer() -> Value {
    Value::String("timer".to_owned())
}
