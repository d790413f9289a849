//! The typed answers that the crew asks models for. `docs/answers.md` shows one example of each.
//!
//! Not here: how an answer is got out of a model's text and repaired (see `ask.rs`).

use ports::{ChangeRequest, Plan, PlannedTask, ProjectSpec, ReviewVerdict, Service};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// An answer that can be checked beyond its form.
pub(crate) trait Answered: serde::de::DeserializeOwned + JsonSchema + Send {
    /// The type's name, as the schema is called.
    const NAME: &'static str;

    /// Reads it; what does not fit is named with its path.
    fn read(value: Value) -> Result<Self, String> {
        at_path(value)
    }

    /// What is wrong with it, in a sentence that the model can act on.
    fn validate(&self) -> Result<(), String>;
}

fn at_path<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, String> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let inner = error.into_inner();
        if path == "." {
            inner.to_string()
        } else {
            format!("{path}: {inner}")
        }
    })
}

/// What brainstorm makes of a message: exactly one of these.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "turn", rename_all = "snake_case")]
pub enum BrainstormTurn {
    /// The message was a question or small talk: this is the answer. It takes no turn.
    Answer {
        /// The answer, as short Markdown.
        text: String,
    },
    /// Something must be known before a proposal can be made.
    Ask {
        /// One to four questions, all at once.
        questions: Vec<ClarifyingQuestion>,
    },
    /// A new project, written down.
    ProposeProject {
        /// What it is to be.
        spec: ProjectSpec,
    },
    /// A change to the project that exists: a feature or a bug.
    ProposeChange {
        /// What is to change.
        change: ChangeRequest,
    },
    /// A wish about how the running job does its work.
    Steer {
        /// The wish, as the developers should read it.
        text: String,
    },
    /// An order that needs no specification.
    Order {
        /// Which one.
        order: OrderWord,
    },
}

/// A question to the owner with suggested answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ClarifyingQuestion {
    /// The question.
    pub question: String,
    /// Suggested answers, the recommended one first; may be empty.
    #[serde(default)]
    pub options: Vec<String>,
}

/// Orders that a person can give in plain words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OrderWord {
    /// Deploy what is merged, once more.
    Deploy,
    /// Stop the running job.
    Cancel,
    /// Say where things stand.
    Status,
    /// Try again what failed.
    Retry,
}

impl Answered for BrainstormTurn {
    const NAME: &'static str = "BrainstormTurn";

    /// A tagged enum forgets the path of what does not fit, so the two large variants are read by themselves first.
    fn read(value: Value) -> Result<Self, String> {
        let inner = |field: &str| value.get(field).cloned().unwrap_or(Value::Null);
        match value.get("turn").and_then(Value::as_str) {
            Some("propose_project") => {
                at_path::<ProjectSpec>(inner("spec")).map_err(|error| format!("spec.{error}"))?;
            }
            Some("propose_change") => {
                at_path::<ChangeRequest>(inner("change"))
                    .map_err(|error| format!("change.{error}"))?;
            }
            _ => {}
        }
        at_path(value)
    }

    fn validate(&self) -> Result<(), String> {
        match self {
            Self::Answer { text } | Self::Steer { text } => filled("text", text),
            Self::Ask { questions } => {
                if questions.is_empty() || questions.len() > MAX_QUESTIONS {
                    return Err(format!(
                        "questions: has {} entries; ask 1 to {MAX_QUESTIONS}",
                        questions.len()
                    ));
                }
                for (n, question) in questions.iter().enumerate() {
                    filled(&format!("questions[{n}].question"), &question.question)?;
                }
                Ok(())
            }
            Self::ProposeProject { spec } => {
                filled("spec.name", &spec.name)?;
                filled("spec.goal", &spec.goal)?;
                if spec.features.is_empty() {
                    return Err("spec.features: is empty; name at least one".to_owned());
                }
                if spec.acceptance.is_empty() {
                    return Err(
                        "spec.acceptance: is empty; at least one check must show that it works"
                            .to_owned(),
                    );
                }
                if spec.kind != HTTP_SERVICE {
                    return Err(format!(
                        "spec.kind: {:?} cannot be deployed; only {HTTP_SERVICE:?} can",
                        spec.kind
                    ));
                }
                checks("spec.acceptance", &spec.acceptance)?;
                needs("spec.needs", &spec.needs)
            }
            Self::ProposeChange { change } => {
                filled("change.title", &change.title)?;
                filled("change.description", &change.description)?;
                checks("change.acceptance", &change.acceptance)?;
                needs("change.needs", &change.needs)
            }
            Self::Order { .. } => Ok(()),
        }
    }
}

/// The most questions in one clarifying round.
pub(crate) const MAX_QUESTIONS: usize = 4;

/// The kind of project that can be deployed.
const HTTP_SERVICE: &str = "http_service";

/// The most acceptance checks of a specification or a change.
const MAX_CHECKS: usize = 30;

/// How a new project is built: the scaffold and the plan.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Architecture {
    /// What the parts are and how they fit together, in a paragraph.
    pub overview: String,
    /// How the repository is checked and its service is run.
    pub manifest: ManifestDraft,
    /// The text of `README.md`.
    pub readme: String,
    /// The text of `AGENTS.md`: conventions that every developer keeps to.
    pub agents_md: String,
    /// The tasks.
    pub tasks: Vec<PlannedTask>,
}

/// What the architect says of `artel.yaml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManifestDraft {
    /// The command that checks the repository, for `sh -c` in its root: exit code 0 means passed.
    pub checks: String,
    /// How the service is run; it must listen on `$HOST:$PORT`.
    pub service: Service,
}

impl Architecture {
    /// The plan in it.
    pub(crate) fn plan(&self) -> Plan {
        Plan {
            overview: self.overview.clone(),
            tasks: self.tasks.clone(),
        }
    }
}

impl Answered for Architecture {
    const NAME: &'static str = "Architecture";

    fn validate(&self) -> Result<(), String> {
        filled("overview", &self.overview)?;
        filled("readme", &self.readme)?;
        filled("manifest.checks", &self.manifest.checks)?;
        match self.manifest.service.command.first() {
            Some(program) => filled("manifest.service.command[0]", program)?,
            None => {
                return Err(
                    "manifest.service.command: is empty; name the program and its arguments"
                        .to_owned(),
                );
            }
        }
        if !self.manifest.service.health.starts_with('/') {
            return Err("manifest.service.health: must be a path that begins with /".to_owned());
        }
        Ok(())
    }
}

/// How a change to a project that exists is split.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ChangePlan {
    /// What changes and how the parts fit together, in a paragraph.
    pub overview: String,
    /// The tasks.
    pub tasks: Vec<PlannedTask>,
}

impl Answered for ChangePlan {
    const NAME: &'static str = "ChangePlan";

    fn validate(&self) -> Result<(), String> {
        filled("overview", &self.overview)
    }
}

/// A reviewer's word on a pull request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Verdict {
    /// Whether it can be merged.
    pub verdict: ReviewVerdict,
    /// What is to be changed, one point an entry; with an approval they are remarks.
    #[serde(default)]
    pub comments: Vec<String>,
}

impl Answered for Verdict {
    const NAME: &'static str = "Verdict";

    fn validate(&self) -> Result<(), String> {
        if self.verdict == ReviewVerdict::SendBack
            && self
                .comments
                .iter()
                .all(|comment| comment.trim().is_empty())
        {
            return Err(
                "comments: is empty, but the verdict is send_back; say what must be changed"
                    .to_owned(),
            );
        }
        Ok(())
    }
}

fn filled(field: &str, text: &str) -> Result<(), String> {
    if text.trim().is_empty() {
        Err(format!("{field}: is empty"))
    } else {
        Ok(())
    }
}

fn checks(field: &str, checks: &[ports::AcceptanceCheck]) -> Result<(), String> {
    if checks.len() > MAX_CHECKS {
        return Err(format!(
            "{field}: has {} checks; at most {MAX_CHECKS} are run",
            checks.len()
        ));
    }
    for (n, check) in checks.iter().enumerate() {
        filled(&format!("{field}[{n}].name"), &check.name)?;
        match &check.check {
            ports::Check::Http { path, .. } if !path.starts_with('/') => {
                return Err(format!("{field}[{n}].path: must begin with /"));
            }
            ports::Check::Command { argv, .. } if argv.is_empty() => {
                return Err(format!("{field}[{n}].argv: is empty; name the program"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// A need for a secret becomes the name of an environment variable, so it can be nothing else.
fn needs(field: &str, needs: &[ports::Need]) -> Result<(), String> {
    for (n, need) in needs.iter().enumerate() {
        if let ports::Need::Secret { name, .. } = need {
            let fits = !name.is_empty()
                && name.len() <= 64
                && name.starts_with(|c: char| c.is_ascii_uppercase())
                && name
                    .bytes()
                    .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_');
            if !fits {
                return Err(format!(
                    "{field}[{n}].name: {name:?} is no name of an environment variable; write it like WEATHER_API_KEY"
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every JSON block of the page is a valid answer of the type that its heading names.
    #[test]
    fn the_examples_in_the_documentation_are_valid_answers() {
        let page = include_str!("../docs/answers.md");
        let mut seen = 0;
        let mut heading = "";
        let mut rest = page;
        while let Some(start) = rest.find("```json\n") {
            if let Some(line) = rest[..start]
                .lines()
                .rev()
                .find(|line| line.starts_with("## "))
            {
                heading = line;
            }
            let body = &rest[start + 8..];
            let end = body.find("```").expect("an open block");
            let json = &body[..end];
            if heading.contains("BrainstormTurn") {
                parse::<BrainstormTurn>(json);
            } else if heading.contains("Architecture") {
                parse::<Architecture>(json);
            } else if heading.contains("ChangePlan") {
                parse::<ChangePlan>(json);
            } else if heading.contains("Verdict") {
                parse::<Verdict>(json);
            } else {
                panic!("a block under {heading:?}");
            }
            seen += 1;
            rest = &body[end + 3..];
        }
        assert!(seen >= 10, "{seen}");
    }

    fn parse<T: Answered>(json: &str) {
        let answer: T =
            serde_json::from_str(json).unwrap_or_else(|error| panic!("{error}: {json}"));
        answer.validate().unwrap();
    }

    #[test]
    fn an_answer_that_cannot_be_used_names_the_field() {
        for (json, says) in [
            (r#"{"turn": "answer", "text": " "}"#, "text: is empty"),
            (r#"{"turn": "ask", "questions": []}"#, "questions:"),
            (
                r#"{"turn": "propose_change", "change": {"title": "t", "description": "d", "needs": [{"need": "secret", "name": "../x", "description": ""}]}}"#,
                "change.needs[0].name",
            ),
            (
                r#"{"turn": "propose_change", "change": {"title": "t", "description": "d", "acceptance": [{"name": "n", "type": "http", "path": "x", "expect": {}}]}}"#,
                "change.acceptance[0].path",
            ),
        ] {
            let turn: BrainstormTurn = serde_json::from_str(json).unwrap();
            let error = turn.validate().unwrap_err();
            assert!(error.contains(says), "{error}");
        }
    }
}
