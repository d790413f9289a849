//! Coding agents that others wrote: each is a row of data and a small function that reads what the program prints.
//!
//! An adapter says how the program is called, what it finds in its environment and in its home, how a session is taken up
//! again in the next attempt, and how its output is read. Everything else is the same for all of them ([`run()`]): the task comes
//! through standard input or a file, the home is in the workspace (so that sessions outlive the worker), and Git decides what
//! was done. See `docs/agents.md` for how to add one.

mod aider;
mod claude_code;
mod codex;
mod droid;
mod gemini;
mod opencode;
mod output;
mod run;

use crate::environment::Environment;
use serde_json::Value;
use std::path::Path;

pub use run::run;

/// How a program is told its task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// It reads the task from its standard input.
    Stdin,
    /// Its command line names the file, [`Call::prompt_file`].
    File,
}

/// What a command line is made from.
pub struct Call<'a> {
    /// The worker's environment: where the models are, and the job's key.
    pub environment: &'a Environment,
    /// The model to ask for; none leaves the choice to the program.
    pub model: Option<&'a str>,
    /// The session of the former attempt, if there was one.
    pub session: Option<&'a str>,
    /// The workspace.
    pub workspace: &'a Path,
    /// The task with our instructions, for programs that read a file.
    pub prompt_file: &'a Path,
    /// The program's home folder.
    pub home: &'a Path,
}

/// What a program said about itself, as far as its output tells.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Heard {
    /// The session, to be taken up by the next attempt.
    pub session: Option<String>,
    /// Its last words.
    pub summary: String,
    /// What went wrong, in its words.
    pub trouble: Option<String>,
    /// Tokens that it sent, by its own count; cached ones included.
    pub input_tokens: u64,
    /// Tokens that it received, by its own count.
    pub output_tokens: u64,
    /// Its own idea of the price, in US dollars.
    pub cost_usd: Option<f64>,
    /// What it is doing now, in one line; taken by whoever tells others.
    pub doing: Option<String>,
}

/// A coding agent that somebody else wrote.
pub struct Adapter {
    /// The name in `ARTEL_AGENT` and in `agent.adapter` of a request.
    pub name: &'static str,
    /// The program, as it is found on the path.
    pub program: &'static str,
    /// How it gets the task.
    pub prompt: Prompt,
    /// Its arguments.
    pub arguments: fn(&Call<'_>) -> Vec<String>,
    /// Variables beside those of the worker.
    pub environment: fn(&Call<'_>) -> Vec<(&'static str, String)>,
    /// Files in its home, by their path there.
    pub files: fn(&Call<'_>) -> Vec<(&'static str, String)>,
    /// What it leaves in the workspace and nobody is to commit, as patterns of Git.
    pub leaves: &'static [&'static str],
    /// Reads one line of its output.
    pub read: fn(&mut Heard, &str),
}

/// All of them, in the order of their names.
pub const ALL: [&Adapter; 6] = [
    &aider::ADAPTER,
    &claude_code::ADAPTER,
    &codex::ADAPTER,
    &droid::ADAPTER,
    &gemini::ADAPTER,
    &opencode::ADAPTER,
];

/// The adapter of this name.
pub fn named(name: &str) -> Option<&'static Adapter> {
    ALL.into_iter().find(|adapter| adapter.name == name)
}

fn nothing<T>(_: &Call<'_>) -> Vec<(&'static str, T)> {
    Vec::new()
}

/// A line of output that is a JSON object, with its `type`.
fn event(line: &str) -> Option<(String, Value)> {
    let value: Value = serde_json::from_str(line.trim()).ok()?;
    let kind = value.get("type")?.as_str()?.to_owned();
    Some((kind, value))
}

/// The first text under one of these JSON pointers.
fn text<'v>(value: &'v Value, pointers: &[&str]) -> Option<&'v str> {
    pointers
        .iter()
        .find_map(|pointer| value.pointer(pointer)?.as_str())
        .filter(|text| !text.is_empty())
}

/// The sum of the numbers under these JSON pointers.
fn sum(value: &Value, pointers: &[&str]) -> u64 {
    pointers
        .iter()
        .filter_map(|pointer| value.pointer(pointer)?.as_u64())
        .fold(0, u64::saturating_add)
}

impl Heard {
    fn keep_session(&mut self, value: &Value, pointers: &[&str]) {
        if let Some(session) = text(value, pointers) {
            self.session = Some(session.to_owned());
        }
    }

    fn says(&mut self, words: &str) {
        words.clone_into(&mut self.summary);
        self.does(words);
    }

    fn does(&mut self, words: &str) {
        let line = words.lines().find(|line| !line.trim().is_empty());
        self.doing = line.map(|line| line.trim().to_owned());
    }
}
