//! The conversation with the model, on disk after every change.

use crate::environment::Environment;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::PathBuf;

const RESUMED: &str = include_str!("../../prompts/resumed.md");
const AGAIN: &str = include_str!("../../prompts/again.md");
const REVISED: &str = include_str!("../../prompts/revised.md");

/// How often an attempt may be told that its answer was empty or cut off.
const MAX_NUDGES: u32 = 3;

/// The one version of the file.
const VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Kept {
    version: u32,
    /// The task's text, to notice that it changed.
    task: String,
    attempt: u32,
    /// The commit that the work started from.
    base: Option<String>,
    /// Answers of the model in this attempt.
    steps: u32,
    nudges: u32,
    /// What the model was told once already in this attempt.
    told: BTreeSet<String>,
    /// Commands whose outcome was lost with a worker and was marked so.
    repaired: u32,
    /// Whether the spawner has the report of the last final answer.
    #[serde(default)]
    reported: bool,
    messages: Vec<Value>,
}

/// A conversation that survives its worker.
pub(super) struct Session {
    path: PathBuf,
    kept: Kept,
}

impl Session {
    /// Goes on with the kept conversation, or begins one. `head` is what is checked out now, which
    /// a new conversation starts from unless the environment names another commit.
    pub(super) fn open(
        path: PathBuf,
        system: &str,
        task: &str,
        environment: &Environment,
        head: Option<&str>,
    ) -> Result<Self, String> {
        let attempt = environment.attempt;
        let fresh = || Kept {
            version: VERSION,
            task: task.to_owned(),
            attempt,
            base: environment.base_sha.clone().or(head.map(str::to_owned)),
            steps: 0,
            nudges: 0,
            told: BTreeSet::new(),
            repaired: 0,
            reported: false,
            messages: vec![
                json!({"role": "system", "content": system}),
                json!({"role": "user", "content": task}),
            ],
        };
        let (kept, begun) = match std::fs::read(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => (fresh(), true),
            Err(error) => {
                return Err(format!(
                    "cannot read the session {}: {error}",
                    path.display()
                ));
            }
            Ok(bytes) => match serde_json::from_slice::<Kept>(&bytes) {
                Ok(kept) if kept.version == VERSION && kept.messages.len() >= 2 => (kept, false),
                _ => {
                    println!("artel-agent: the session cannot be read; a new one begins");
                    let aside = path.with_extension("broken.json");
                    std::fs::rename(&path, &aside)
                        .map_err(|error| format!("cannot put the session aside: {error}"))?;
                    (fresh(), true)
                }
            },
        };
        let mut session = Self { path, kept };
        if !begun {
            session.repair();
            if session.kept.task != task {
                session.begin_again(attempt, Some(&REVISED.replace("{task}", task)));
                task.clone_into(&mut session.kept.task);
            } else if session.kept.attempt != attempt {
                let former = session.kept.attempt.to_string();
                // A worker that was ended between its final answer and its report: the answer is paid for and still stands.
                let unheard = !session.kept.reported && session.final_answer().is_some();
                let text = (!unheard).then(|| {
                    AGAIN
                        .replace("{former}", &former)
                        .replace("{attempt}", &attempt.to_string())
                });
                session.begin_again(attempt, text.as_deref());
            }
            if let Some(base) = &environment.base_sha {
                session.kept.base = Some(base.clone());
            }
        }
        session.save()?;
        Ok(session)
    }

    fn begin_again(&mut self, attempt: u32, text: Option<&str>) {
        self.kept.attempt = attempt;
        self.kept.steps = 0;
        self.kept.nudges = 0;
        self.kept.told.clear();
        if let Some(text) = text {
            self.push_user(text);
        }
    }

    /// Every tool call gets an answer, because endpoints refuse a conversation where one lacks.
    fn repair(&mut self) {
        let Some(last) = self
            .kept
            .messages
            .iter()
            .rposition(|message| message["role"] == "assistant")
        else {
            return;
        };
        let calls = self.kept.messages[last]["tool_calls"].as_array().cloned();
        for call in calls.unwrap_or_default() {
            let answered = self.kept.messages[last + 1..]
                .iter()
                .any(|message| message["tool_call_id"] == call["id"]);
            if !answered {
                self.kept.messages.push(json!({
                    "role": "tool", "tool_call_id": call["id"], "content": RESUMED.trim(),
                }));
                self.kept.repaired += 1;
            }
        }
    }

    fn push_user(&mut self, text: &str) {
        self.kept
            .messages
            .push(json!({"role": "user", "content": text}));
    }

    pub(super) fn messages(&self) -> &[Value] {
        &self.kept.messages
    }

    pub(super) fn steps(&self) -> u32 {
        self.kept.steps
    }

    pub(super) fn base(&self) -> Option<&str> {
        self.kept.base.as_deref()
    }

    /// The text of a final answer that nothing was said to yet.
    pub(super) fn final_answer(&self) -> Option<String> {
        let last = self.kept.messages.last()?;
        let calls = last["tool_calls"].as_array().is_some_and(|c| !c.is_empty());
        let text = last["content"].as_str().unwrap_or_default();
        (last["role"] == "assistant" && !calls && !text.trim().is_empty()).then(|| text.to_owned())
    }

    /// The last words of the model, for a report.
    pub(super) fn last_text(&self) -> String {
        self.kept
            .messages
            .iter()
            .rev()
            .filter(|message| message["role"] == "assistant")
            .find_map(|message| message["content"].as_str())
            .unwrap_or_default()
            .to_owned()
    }

    /// Keeps an answer of the model.
    pub(super) fn answer(&mut self, message: Value) -> Result<(), String> {
        self.kept.steps += 1;
        self.kept.reported = false;
        self.kept.messages.push(message);
        self.save()
    }

    /// Notes in the conversation at `path` that the spawner has the report of its final answer. Nothing happens where there
    /// is none that can be read.
    pub(super) fn note_reported(path: PathBuf) -> Result<(), String> {
        let kept = std::fs::read(&path)
            .ok()
            .and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let Some(mut kept) = kept else { return Ok(()) };
        kept.reported = true;
        Self { path, kept }.save()
    }

    /// Keeps the outcome of a tool call.
    pub(super) fn outcome(&mut self, call: &str, text: &str) -> Result<(), String> {
        self.kept
            .messages
            .push(json!({"role": "tool", "tool_call_id": call, "content": text}));
        self.save()
    }

    /// Says something to the model; when it is a nudge, only a few times in an attempt.
    pub(super) fn tell(&mut self, text: &str, nudge: bool) -> Result<(), String> {
        if nudge {
            self.kept.nudges += 1;
            if self.kept.nudges > MAX_NUDGES {
                return Err(format!(
                    "the model gave {MAX_NUDGES} empty or cut-off answers; check its token limit"
                ));
            }
        }
        self.push_user(text);
        self.save()
    }

    /// Says something to the model that it is told once in an attempt; false when it was told.
    pub(super) fn tell_once(&mut self, what: &str, text: &str) -> Result<bool, String> {
        if !self.kept.told.insert(what.to_owned()) {
            return Ok(false);
        }
        self.push_user(text);
        self.save()?;
        Ok(true)
    }

    fn save(&self) -> Result<(), String> {
        let failed = |error: std::io::Error| {
            format!("cannot write the session {}: {error}", self.path.display())
        };
        let bytes =
            serde_json::to_vec(&self.kept).map_err(|error| failed(std::io::Error::other(error)))?;
        if let Some(folder) = self.path.parent() {
            std::fs::create_dir_all(folder).map_err(failed)?;
        }
        let aside = self.path.with_extension("tmp");
        std::fs::write(&aside, bytes).map_err(failed)?;
        std::fs::rename(&aside, &self.path).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(folder: &std::path::Path, task: &str, attempt: u32) -> Session {
        let path = folder.join(".artel/session.json");
        let environment = Environment::from_lookup(|name| {
            Some(match name {
                "ARTEL_ATTEMPT" => attempt.to_string(),
                "ARTEL_BROKER_URL" | "OPENAI_BASE_URL" => "http://127.0.0.1:9".to_owned(),
                name if name.ends_with("_S") || name.ends_with("STEPS") => "9".to_owned(),
                _ => "x".to_owned(),
            })
        });
        Session::open(path, "system", task, &environment.unwrap(), None).unwrap()
    }

    fn asks_for_two_commands() -> Value {
        json!({"role": "assistant", "content": null, "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "shell", "arguments": "{}"}},
            {"id": "b", "type": "function", "function": {"name": "shell", "arguments": "{}"}},
        ]})
    }

    #[test]
    fn a_command_whose_outcome_was_lost_is_answered_as_unknown() {
        let folder = tempfile::tempdir().unwrap();
        let mut session = open(folder.path(), "task", 1);
        session.answer(asks_for_two_commands()).unwrap();
        session.outcome("a", "fine").unwrap();
        drop(session);
        let session = open(folder.path(), "task", 1);
        let last = session.messages().last().unwrap();
        assert_eq!(last["tool_call_id"], "b");
        assert!(last["content"].as_str().unwrap().contains("not known"));
        assert_eq!(session.kept.repaired, 1);
        assert_eq!(session.steps(), 1, "steps go on counting");
        let again = open(folder.path(), "task", 1);
        assert_eq!(again.messages().len(), session.messages().len());
    }

    #[test]
    fn a_revised_task_is_the_next_user_message() {
        let folder = tempfile::tempdir().unwrap();
        let mut session = open(folder.path(), "task", 1);
        session
            .answer(json!({"role": "assistant", "content": "done"}))
            .unwrap();
        assert_eq!(session.final_answer().as_deref(), Some("done"));
        let session = open(folder.path(), "task, with comments", 2);
        let last = session.messages().last().unwrap();
        assert_eq!(last["role"], "user");
        assert!(last["content"].as_str().unwrap().contains("with comments"));
        assert_eq!((session.final_answer(), session.steps()), (None, 0));
    }

    #[test]
    fn the_same_attempt_after_its_final_answer_asks_nothing_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut session = open(folder.path(), "task", 1);
        session
            .answer(json!({"role": "assistant", "content": "done"}))
            .unwrap();
        assert_eq!(
            open(folder.path(), "task", 1).final_answer().as_deref(),
            Some("done")
        );
        let path = folder.path().join(".artel/session.json");
        Session::note_reported(path).unwrap();
        let next = open(folder.path(), "task", 2);
        assert_eq!(next.final_answer(), None, "another attempt goes on working");
    }

    #[test]
    fn a_final_answer_whose_report_was_lost_is_reported_by_the_next_attempt() {
        let folder = tempfile::tempdir().unwrap();
        let mut session = open(folder.path(), "task", 1);
        session
            .answer(json!({"role": "assistant", "content": "done"}))
            .unwrap();
        let next = open(folder.path(), "task", 2);
        assert_eq!(next.final_answer().as_deref(), Some("done"));
        assert_eq!(next.steps(), 0);
        let revised = open(folder.path(), "task, with comments", 3);
        assert_eq!(
            revised.final_answer(),
            None,
            "it was the answer to another task"
        );
    }

    #[test]
    fn a_session_that_cannot_be_read_is_put_aside() {
        let folder = tempfile::tempdir().unwrap();
        drop(open(folder.path(), "task", 1));
        let path = folder.path().join(".artel/session.json");
        std::fs::write(&path, "{\"half").unwrap();
        assert_eq!(open(folder.path(), "task", 1).messages().len(), 2);
        let aside = folder.path().join(".artel/session.broken.json");
        assert_eq!(std::fs::read_to_string(aside).unwrap(), "{\"half");
    }
}
