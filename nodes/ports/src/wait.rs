//! Waits for people.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Audience, WaitId};

/// What is asked, as it stands in the interrupt, in the journal and on the buttons.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OpenWait {
    /// Opaque; made from the interrupt's id, so that every revision has its own.
    pub id: WaitId,
    /// What kind of decision.
    pub kind: WaitKind,
    /// The question, as Markdown.
    pub question: String,
    /// What can be chosen; empty for a free answer.
    pub options: Vec<Choice>,
    /// Whether a free text is an answer too.
    pub free_text: bool,
    /// Who is asked.
    pub audience: Audience,
}

/// A button.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Choice {
    /// What comes back: a short word such as `approve`.
    pub value: String,
    /// What stands on the button.
    pub label: String,
}

impl Choice {
    /// A button.
    pub fn new(value: &str, label: &str) -> Self {
        Self {
            value: value.to_owned(),
            label: label.to_owned(),
        }
    }
}

/// What kind of decision a person is asked for. Policies and `--yes` go by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum WaitKind {
    /// Questions before a specification is proposed.
    Clarify,
    /// The specification of a project or a change.
    Spec,
    /// A change that breaks users of the running project.
    BreakingChange,
    /// Money or tokens beyond the budget. Never approved by `--yes`.
    Budget,
    /// A secret that is missing; answered on the secret path, never in text.
    Secret,
    /// Deploying to where people use it.
    Deploy,
    /// The crew is at its end: a cap was reached or a failure cannot be mended without a person.
    Help,
}

/// A person's answer: the payload with which an interrupt is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Answer {
    /// The value of the choice, if a button was pressed or a whole word matched one.
    pub choice: Option<String>,
    /// What was typed.
    #[serde(default)]
    pub text: String,
    /// Who answered, as a `PersonId`; `policy:yes` when `--yes` did.
    pub by: String,
}
