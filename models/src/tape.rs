//! Tapes: recordings of a model's answers in a readable YAML file.
//!
//! ```yaml
//! tape: notes
//! about: A service that keeps notes.
//! delay_ms: 300                  # waited before each answer, so that a person can watch; default 0
//! answers:
//!   architect:                   # the role
//!     job-1:                     # the thread within the project: `conversation`, `job-1`, `job-1/storage`
//!       - json: {tasks: []}      # turn 0; the answer is this document as JSON text
//!       - text: |                # turn 1: one more than the entry before, unless `turn` says otherwise
//!           Any text.
//!   brainstorm:
//!     conversation:
//!       - when: (?i)how far      # a regular expression on the last user message
//!         text: Two of four tasks are merged.
//!   developer:
//!     job-1/storage:
//!       - text: First the tests.
//!         tool_calls:
//!           - shell: cat README.md                       # the same as
//!           - {name: shell, arguments: {command: ls}}    # this form, for any tool
//!         usage: {input_tokens: 900, output_tokens: 40}  # default: by the size of question and answer
//!       - when: sent back        # `when` with `turn`: only at that turn, before what else stands there
//!         turn: 1
//!         text: …
//! ```
//!
//! The turn of a question of the crew's own is `ModelCall::turn`, that of a worker's is the number of assistant messages in
//! it. An entry with `when` and no `turn` answers any number of times and takes no turn. Several entries at one turn are for
//! a structured answer that is repaired: the question that repeats the n-th of them as the model's last word gets the one
//! after it.

mod player;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use ports::Role;
use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::wire::{Tokens, ToolCall};

pub use player::Player;

/// The longest tape that is read.
const MAX_TAPE_BYTES: u64 = 32 * 1024 * 1024;
/// A recorded message can be long; its pattern is mostly plain text.
const MAX_PATTERN_BYTES: usize = 64 * 1024 * 1024;
/// The longest wait before an answer.
const MAX_DELAY_MS: u64 = 60_000;

/// Why a tape cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapeError {
    /// The file cannot be read.
    #[error("the tape {} cannot be read; is the path right?", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file cannot be written.
    #[error("the tape {} cannot be written", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is no tape.
    #[error("{tape} is not a tape: {message}")]
    Format {
        /// The tape's name or file.
        tape: String,
        /// What is wrong, and where.
        message: String,
    },
}

/// A recording, ready to answer.
#[derive(Clone, Debug)]
pub struct Tape {
    name: String,
    about: String,
    delay_ms: u64,
    answers: BTreeMap<Role, BTreeMap<String, Vec<Entry>>>,
}

/// One answer.
#[derive(Clone, Debug)]
pub(crate) struct Entry {
    turn: Option<u32>,
    when: Option<Regex>,
    pub text: String,
    pub tool_calls: Vec<ToolCall>,
    pub tokens: Option<Tokens>,
}

/// A question, as far as a tape looks at it.
pub(crate) struct Question<'a> {
    pub role: Role,
    pub thread: &'a str,
    pub turn: u32,
    pub last_user: &'a str,
    /// What the model said last, by which the repair of an answer is known.
    pub last_assistant: &'a str,
}

impl Tape {
    /// The tape that ships with the program.
    pub fn demo() -> Result<Self, TapeError> {
        Self::parse(include_str!("../tapes/demo.yaml"), "the built-in tape")
    }

    /// What `ARTEL_TAPE` names: `demo` is the tape that ships with the program, anything else a file.
    pub fn open(name: &str) -> Result<Self, TapeError> {
        match name.trim() {
            "demo" => Self::demo(),
            path => Self::load(Path::new(path)),
        }
    }

    /// Reads a tape from a file.
    pub fn load(path: &Path) -> Result<Self, TapeError> {
        Self::parse(&read(path)?, &path.display().to_string())
    }

    /// Reads a tape; `origin` stands in errors.
    pub fn parse(yaml: &str, origin: &str) -> Result<Self, TapeError> {
        Self::from_file(TapeFile::parse(yaml, origin)?, origin)
    }

    /// The name that is said wherever an answer comes from this tape.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the tape shows.
    pub fn about(&self) -> &str {
        &self.about
    }

    /// The wait before each answer, in milliseconds.
    pub fn delay_ms(&self) -> u64 {
        self.delay_ms
    }

    /// The same tape with another wait before each answer, in milliseconds; at most a minute.
    #[must_use]
    pub fn with_delay_ms(mut self, delay_ms: u64) -> Self {
        self.delay_ms = delay_ms.min(MAX_DELAY_MS);
        self
    }

    fn from_file(file: TapeFile, origin: &str) -> Result<Self, TapeError> {
        let mut answers: BTreeMap<Role, BTreeMap<String, Vec<Entry>>> = BTreeMap::new();
        for (role, threads) in file.answers.unwrap_or_default() {
            for (thread, raw) in threads.unwrap_or_default() {
                let mut next = 0;
                let mut entries = Vec::new();
                for (position, raw) in raw.into_iter().enumerate() {
                    let entry = raw.compile(next).map_err(|message| TapeError::Format {
                        tape: origin.to_owned(),
                        message: format!("answers.{role}.{thread}[{position}]: {message}"),
                    })?;
                    if entry.when.is_none() {
                        next = entry.turn.map_or(next, |turn| turn.saturating_add(1));
                    }
                    entries.push(entry);
                }
                answers.entry(role).or_default().insert(thread, entries);
            }
        }
        Ok(Self {
            name: file.tape,
            about: file.about,
            delay_ms: file.delay_ms.min(MAX_DELAY_MS),
            answers,
        })
    }

    /// The answer to a question, or what to say instead.
    pub(crate) fn find(&self, question: &Question<'_>) -> Result<&Entry, String> {
        let threads = self.answers.get(&question.role);
        let Some(entries) = threads.and_then(|threads| threads.get(question.thread)) else {
            let known: Vec<_> = threads
                .into_iter()
                .flat_map(BTreeMap::keys)
                .map(String::as_str)
                .collect();
            return Err(if known.is_empty() {
                format!("it has nothing for the role {}", question.role)
            } else {
                format!("for this role it has the threads {}", known.join(", "))
            });
        };
        let fits = |entry: &&Entry| {
            entry
                .when
                .as_ref()
                .is_some_and(|when| when.is_match(question.last_user))
        };
        let when = entries
            .iter()
            .filter(fits)
            .find(|entry| entry.turn == Some(question.turn))
            .or_else(|| {
                entries
                    .iter()
                    .filter(fits)
                    .find(|entry| entry.turn.is_none())
            });
        if let Some(entry) = when {
            return Ok(entry);
        }
        let at_turn: Vec<_> = entries
            .iter()
            .filter(|entry| entry.when.is_none() && entry.turn == Some(question.turn))
            .collect();
        let said = question.last_assistant.trim();
        let repaired = at_turn
            .iter()
            .rposition(|entry| !said.is_empty() && entry.text.trim() == said)
            .map_or(0, |position| position + 1);
        at_turn
            .get(repaired.min(at_turn.len().saturating_sub(1)))
            .copied()
            .ok_or_else(|| turns_hint(entries))
    }
}

fn turns_hint(entries: &[Entry]) -> String {
    let mut turns: Vec<_> = entries
        .iter()
        .filter(|entry| entry.when.is_none())
        .filter_map(|entry| entry.turn)
        .collect();
    turns.sort_unstable();
    turns.dedup();
    let turns: Vec<_> = turns.iter().map(u32::to_string).collect();
    let whens = entries.iter().filter(|entry| entry.when.is_some()).count();
    let mut hint = if turns.is_empty() {
        "it has no turns for this thread".to_owned()
    } else {
        format!("for this thread it has the turns {}", turns.join(", "))
    };
    if whens > 0 {
        hint.push_str(" and answers to messages that do not fit this one");
    }
    hint
}

pub(crate) fn read(path: &Path) -> Result<String, TapeError> {
    use std::io::Read;
    let failed = |source| TapeError::Read {
        path: path.to_owned(),
        source,
    };
    let file = std::fs::File::open(path).map_err(failed)?;
    let mut text = String::new();
    let read = file
        .take(MAX_TAPE_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(failed)?;
    if read as u64 > MAX_TAPE_BYTES {
        return Err(TapeError::Format {
            tape: path.display().to_string(),
            message: "it is longer than 32 MiB".to_owned(),
        });
    }
    Ok(text)
}

/// The answers of one role, by thread.
pub(crate) type RawThreads = BTreeMap<String, Vec<RawEntry>>;

/// A tape as it stands in a file.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct TapeFile {
    pub tape: String,
    #[serde(default)]
    pub about: String,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub delay_ms: u64,
    #[serde(default)]
    pub answers: Option<BTreeMap<Role, Option<RawThreads>>>,
}

// Serde hands a reference to what it asks.
#[allow(clippy::trivially_copy_pass_by_ref)]
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl TapeFile {
    pub fn parse(yaml: &str, origin: &str) -> Result<Self, TapeError> {
        serde_yaml_ng::from_str(yaml).map_err(|error| TapeError::Format {
            tape: origin.to_owned(),
            message: error.to_string(),
        })
    }
}

/// One answer as it stands in a file.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct RawEntry {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub turn: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub when: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<Value>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<RawToolCall>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<RawUsage>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum RawToolCall {
    Shell {
        shell: String,
    },
    Named {
        name: String,
        #[serde(default)]
        arguments: Value,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RawUsage {
    pub input_tokens: u64,
    pub output_tokens: u64,
}

impl RawEntry {
    fn compile(self, next_turn: u32) -> Result<Entry, String> {
        let text = match (self.text, self.json) {
            (Some(_), Some(_)) => return Err("has both text and json; keep one".to_owned()),
            (Some(text), None) => text,
            (None, Some(json)) => json.to_string(),
            (None, None) if !self.tool_calls.is_empty() => String::new(),
            (None, None) => return Err("has no text, json or tool_calls".to_owned()),
        };
        let when = self
            .when
            .map(|pattern| {
                RegexBuilder::new(&pattern)
                    .size_limit(MAX_PATTERN_BYTES)
                    .build()
                    .map_err(|error| format!("when is no regular expression: {error}"))
            })
            .transpose()?;
        let turn = match (&when, self.turn) {
            (None, None) => Some(next_turn),
            (_, turn) => turn,
        };
        let tool_calls = self
            .tool_calls
            .into_iter()
            .map(|call| {
                let (name, arguments) = match call {
                    RawToolCall::Shell { shell } => ("shell".to_owned(), json!({"command": shell})),
                    RawToolCall::Named { name, arguments } => (name, arguments),
                };
                ToolCall {
                    id: String::new(),
                    name,
                    // Recorded arguments that were no JSON object stand as the text that they were.
                    arguments: match arguments {
                        Value::String(text) => text,
                        Value::Null => "{}".to_owned(),
                        other => other.to_string(),
                    },
                }
            })
            .collect();
        Ok(Entry {
            turn,
            when,
            text,
            tool_calls,
            tokens: self.usage.map(|usage| Tokens {
                input: usage.input_tokens,
                output: usage.output_tokens,
            }),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TAPE: &str = r#"
tape: small
about: For tests.
answers:
  brainstorm:
    conversation:
      - text: zero
      - when: (?i)how far
        text: far
      - turn: 3
        text: bad
      - turn: 3
        json: {"good": true}
      - text: four
  developer:
    job-1/a:
      - tool_calls: [{shell: "ls"}, {name: other, arguments: {x: 1}}]
      - when: sent back
        turn: 0
        text: again
"#;

    fn find<'a>(tape: &'a Tape, turn: u32, user: &str, said: &str) -> Result<&'a str, String> {
        tape.find(&Question {
            role: Role::Brainstorm,
            thread: "conversation",
            turn,
            last_user: user,
            last_assistant: said,
        })
        .map(|entry| entry.text.as_str())
    }

    #[test]
    fn answers_are_found_by_message_and_by_turn() {
        let tape = Tape::parse(TAPE, "test").unwrap();
        assert_eq!(find(&tape, 0, "hello", "").unwrap(), "zero");
        assert_eq!(find(&tape, 0, "so, How far?", "").unwrap(), "far");
        assert_eq!(find(&tape, 9, "how far?", "").unwrap(), "far");
        assert_eq!(find(&tape, 4, "hello", "").unwrap(), "four");
        let hint = find(&tape, 1, "hello", "").unwrap_err();
        assert!(hint.contains("0, 3, 4"), "{hint}");
        let nothing = tape.find(&Question {
            role: Role::Developer,
            thread: "job-1/b",
            turn: 0,
            last_user: "",
            last_assistant: "",
        });
        assert!(nothing.unwrap_err().contains("job-1/a"));
    }

    #[test]
    fn a_repair_gets_the_next_answer_of_its_turn() {
        let tape = Tape::parse(TAPE, "test").unwrap();
        assert_eq!(find(&tape, 3, "do", "").unwrap(), "bad");
        assert_eq!(find(&tape, 3, "do", "zero").unwrap(), "bad");
        let good = find(&tape, 3, "that was no JSON", "bad\n").unwrap();
        assert_eq!(good, r#"{"good":true}"#);
        assert_eq!(find(&tape, 3, "do", good).unwrap(), good);
        assert_eq!(find(&tape, 0, "mend", "zero").unwrap(), "zero");
    }

    #[test]
    fn a_message_at_a_turn_goes_before_the_turn() {
        let tape = Tape::parse(TAPE, "test").unwrap();
        let ask = |turn, last_user| {
            tape.find(&Question {
                role: Role::Developer,
                thread: "job-1/a",
                turn,
                last_user,
                last_assistant: "",
            })
        };
        let first = ask(0, "task").unwrap();
        assert_eq!(first.tool_calls[0].name, "shell");
        assert_eq!(first.tool_calls[0].arguments, r#"{"command":"ls"}"#);
        assert_eq!(first.tool_calls[1].arguments, r#"{"x":1}"#);
        assert_eq!(ask(0, "sent back: mend it").unwrap().text, "again");
        assert!(ask(1, "sent back").is_err());
    }

    #[test]
    fn a_broken_tape_says_where() {
        for (yaml, says) in [
            (
                "tape: x\nanswers: {architect: {job-1: [{text: a, json: {}}]}}",
                "answers.architect.job-1[0]: has both",
            ),
            (
                "tape: x\nanswers: {architect: {job-1: [{text: a}, {turn: 2}]}}",
                "answers.architect.job-1[1]: has no text",
            ),
            (
                "tape: x\nanswers: {architect: {job-1: [{when: '(', text: a}]}}",
                "regular expression",
            ),
            ("tape: x\nanswers: {painter: {}}", "painter"),
            ("tape: x\nanwsers: {}", "anwsers"),
            ("- 1", "x.yaml"),
        ] {
            let message = Tape::parse(yaml, "x.yaml").unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
        assert!(Tape::parse("tape: x\nanswers:\n", "x").is_ok());
        assert!(Tape::load(Path::new("/nowhere/x.yaml")).is_err());
    }

    #[test]
    fn the_tape_that_ships_is_a_tape() {
        let tape = Tape::open("demo").unwrap();
        assert_eq!(tape.name(), "demo");
        assert!(!tape.about().is_empty());
    }
}
