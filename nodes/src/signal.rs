//! What comes in: the kinds of signals to the crew's threads, with their payloads. Whoever sends one gives it a key that is
//! unique in the thread, so that sending it twice is sending it once.

use ports::{PersonId, TaskId, WaitId};
use serde::{Deserialize, Serialize};

/// To a conversation: a person said something ([`Message`]).
pub const MESSAGE: &str = "message";
/// To a conversation: an order that needs no model ([`Order`]).
pub const ORDER: &str = "order";
/// To a job or a task: somebody steers it ([`Steer`]).
pub const STEER: &str = "steer";
/// To a job: a secret of the project was set ([`SecretSet`]).
pub const SECRET: &str = "secret";
/// To a job or a task: try again what failed ([`Retry`]).
pub const RETRY: &str = "retry";

/// How the kinds of answers to people's waits begin.
pub const ANSWER_PREFIX: &str = "answer:";

/// The kind and the key under which a wait is answered, with a `ports::Answer` as payload: a second answer is a duplicate.
pub fn answer(wait: &WaitId) -> String {
    format!("{ANSWER_PREFIX}{wait}")
}

/// A person said something.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// The message's unique key, also the signal's.
    pub key: String,
    /// Who.
    pub from: PersonId,
    /// What.
    pub text: String,
    /// Whether the specification, the plan and the deploy that come of it are approved beforehand, within the budget.
    #[serde(default)]
    pub yes: bool,
}

/// An order to a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Order {
    /// The order's unique key, also the signal's.
    pub key: String,
    /// Who gives it.
    pub by: PersonId,
    /// Whether what would need an approval is approved beforehand, within the budget.
    #[serde(default)]
    pub yes: bool,
    /// What is to be done.
    #[serde(flatten)]
    pub what: OrderKind,
}

/// What can be ordered. Written as `{"order": "deploy"}`, `{"order": "retry", "task": "storage"}`, …
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case")]
pub enum OrderKind {
    /// Deploy what is merged, once more.
    Deploy,
    /// Try again what failed: one task, whatever waits for it, or the last job when none runs.
    Retry {
        /// The task that is meant.
        #[serde(default)]
        task: Option<TaskId>,
    },
    /// Stop the running job and drop what is queued.
    Cancel,
    /// Say where things stand.
    Status,
    /// End the conversation; its job is cancelled with it.
    Archive,
}

/// Somebody steers a job or a task.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Steer {
    /// What they want, redacted.
    pub text: String,
    /// Who.
    pub by: PersonId,
}

/// A secret of the project was set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretSet {
    /// Its name.
    pub name: String,
}

/// Try again what failed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retry {
    /// The task that is meant; `None`: whatever waits for it.
    #[serde(default)]
    pub task: Option<TaskId>,
    /// Who wants it.
    #[serde(default)]
    pub by: Option<PersonId>,
}
