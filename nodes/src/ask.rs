//! Asks a model for a typed answer: schema, extraction, validation, and at most two requests to mend what does not fit.

use graph::{Context, NodeError};
use ports::{Actor, Failure, Message, ModelAnswer, ModelCall, Role, Schema, Speaker};
use serde_json::json;

use crate::{Crew, Scope, answers::Answered, extract, prompts};

/// How often a model is asked to mend an answer that does not fit.
pub const MAX_REPAIRS: u32 = 2;

/// The most of an answer that is kept as evidence or shown to the model again, in bytes.
const SHOWN_BYTES: usize = 8 * 1024;

/// One question to a role.
pub(crate) struct Question<'a> {
    /// Who asks.
    pub role: Role,
    /// For what.
    pub scope: &'a Scope,
    /// The thread's name within the project: a tape's key.
    pub thread: &'a str,
    /// How many turns this role has taken there.
    pub turn: u32,
    /// The name of the durable step; the question's key is made from it.
    pub step: &'a str,
    /// The task at hand, with everything from outside marked as data.
    pub prompt: String,
    /// What was said after it: earlier answers, and why they came back.
    pub since: Vec<Message>,
}

/// What came of it.
pub(crate) struct Told<T> {
    /// How many turns it took: one, and one for every repair; a call that gave no answer takes none.
    pub turns: u32,
    /// The answer, or why there is none.
    pub answer: Result<T, Failure>,
    /// What the model wrote last.
    pub text: String,
}

/// Asks until the answer fits. `check` says what the type cannot.
pub(crate) async fn typed<T: Answered>(
    crew: &Crew,
    ctx: &Context,
    question: Question<'_>,
    check: impl Fn(&T) -> Result<(), String>,
) -> Result<Told<T>, NodeError> {
    let schema = schemars::schema_for!(T).to_value();
    let form = prompts::render("answer", "form", json!({"schema": schema.to_string()}))?;
    let system = prompts::render(question.role.as_str(), "system", json!({"form": form}))?;
    let mut messages = vec![
        said(crew, Speaker::System, &system),
        said(crew, Speaker::User, &question.prompt),
    ];
    messages.extend(question.since);
    let mut turns = 0;
    loop {
        let call = ModelCall {
            role: question.role,
            project: question.scope.project.clone(),
            job: question.scope.job.clone(),
            task: question.scope.task.clone(),
            thread: question.thread.to_owned(),
            turn: question.turn + turns,
            key: String::new(),
            messages: messages.clone(),
            schema: Some(Schema {
                name: T::NAME.to_owned(),
                schema: schema.clone(),
            }),
        };
        let answer: Result<ModelAnswer, Failure> = ctx
            .step(question.step, |key| async move {
                let call = ModelCall {
                    key: key.to_string(),
                    ..call
                };
                Ok::<_, NodeError>(
                    crew.models
                        .ask(&call)
                        .await
                        .map_err(|error| error.to_failure()),
                )
            })
            .await?;
        let answer = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                return Ok(Told {
                    turns,
                    answer: Err(failure),
                    text: String::new(),
                });
            }
        };
        turns += 1;
        let reason = match read::<T>(&answer.text, &check) {
            Ok(value) => {
                return Ok(Told {
                    turns,
                    answer: Ok(value),
                    text: answer.text,
                });
            }
            Err(reason) => reason,
        };
        if turns > MAX_REPAIRS {
            let failure = Failure::new(
                "bad_answer",
                format!(
                    "the model of the {} gave no usable {} in {turns} tries ({reason}); try again, or give the role another model in artel.toml",
                    question.role,
                    T::NAME,
                ),
            )
            .evidence(crew.vault.redact(end_of(&answer.text)))
            .actor(Actor::Admin);
            return Ok(Told {
                turns,
                answer: Err(failure),
                text: answer.text,
            });
        }
        messages.push(said(crew, Speaker::Assistant, start_of(&answer.text)));
        let repair = prompts::render("answer", "repair", json!({"reason": reason}))?;
        messages.push(said(crew, Speaker::User, &repair));
    }
}

/// A message of a prompt, without any known secret in it.
pub(crate) fn said(crew: &Crew, speaker: Speaker, text: &str) -> Message {
    Message {
        speaker,
        text: crew.vault.redact(text),
    }
}

fn read<T: Answered>(text: &str, check: &impl Fn(&T) -> Result<(), String>) -> Result<T, String> {
    let Some(object) = extract::json_object(text) else {
        return Err("it holds no JSON object".to_owned());
    };
    let value: serde_json::Value =
        serde_json::from_str(object).map_err(|error| format!("it is not JSON: {error}"))?;
    let value = T::read(value)?;
    value.validate()?;
    check(&value)?;
    Ok(value)
}

/// The first bytes of a text, up to what is shown.
pub(crate) fn start_of(text: &str) -> &str {
    &text[..text.floor_char_boundary(SHOWN_BYTES.min(text.len()))]
}

/// The last bytes of a text, up to what is shown.
pub(crate) fn end_of(text: &str) -> &str {
    &text[text.ceil_char_boundary(text.len().saturating_sub(SHOWN_BYTES))..]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::answers::{Architecture, BrainstormTurn, Verdict};

    fn reason<T: Answered>(text: &str) -> String {
        read::<T>(text, &|_| Ok(())).err().expect("a reason")
    }

    #[test]
    fn a_reason_names_the_place() {
        for (reason, says) in [
            (reason::<Verdict>("Looks good to me!"), "no JSON object"),
            (
                reason::<Verdict>(r#"{"verdict": "maybe"}"#),
                "verdict: unknown variant",
            ),
            (
                reason::<Verdict>(r#"{"verdict": "send_back"}"#),
                "comments: is empty",
            ),
            (
                reason::<Architecture>(
                    r#"{"overview": "o", "manifest": {"checks": "x", "service": {"command": "python3"}}}"#,
                ),
                "manifest.service.command: invalid type",
            ),
            (
                reason::<BrainstormTurn>(
                    r#"{"turn": "propose_project", "spec": {"name": "n", "goal": 7}}"#,
                ),
                "spec.goal: invalid type",
            ),
            (
                reason::<BrainstormTurn>(r#"{"turn": "dance"}"#),
                "unknown variant `dance`",
            ),
        ] {
            assert!(reason.contains(says), "{reason}");
        }
    }
}
