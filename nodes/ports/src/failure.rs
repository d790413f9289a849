//! What went wrong, in a form that a person and a retry policy can both use.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A typed failure: cause, evidence, and who can do something about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// A stable name in snake case, such as `no_commit` or `port_taken`; the fingerprint that caps retries.
    pub kind: String,
    /// One sentence for a person: what happened, where, and what to do.
    pub message: String,
    /// The end of a log, an exit status, a diff: what shows it. May be empty; at most 16 KiB.
    #[serde(default)]
    pub evidence: String,
    /// Who can act.
    #[serde(default)]
    pub actor: Actor,
    /// Whether doing the same again may help.
    #[serde(default)]
    pub retryable: bool,
}

/// Who can do something about a failure.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Actor {
    /// The crew itself: another attempt with the evidence at hand.
    #[default]
    Crew,
    /// The owner of the project.
    Owner,
    /// An admin of this installation (money, servers, limits, configuration).
    Admin,
}

impl Failure {
    /// A failure that the crew may try to mend.
    pub fn new(kind: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            kind: kind.into(),
            message: message.into(),
            evidence: String::new(),
            actor: Actor::Crew,
            retryable: false,
        }
    }

    /// The same, with what shows it; only the last 16 KiB are kept.
    #[must_use]
    pub fn evidence(mut self, evidence: impl Into<String>) -> Self {
        const KEPT_BYTES: usize = 16 * 1024;
        let text = evidence.into();
        let mut start = text.len().saturating_sub(KEPT_BYTES);
        while !text.is_char_boundary(start) {
            start += 1;
        }
        text[start..].clone_into(&mut self.evidence);
        self
    }

    /// The same, for somebody else to act on.
    #[must_use]
    pub fn actor(mut self, actor: Actor) -> Self {
        self.actor = actor;
        self
    }

    /// The same, saying that doing it again may help.
    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }
}
