//! `artel-agent`: a loop between a model and one tool, a shell in the workspace.
//!
//! The model is asked; what it wants run is run, and it is asked again with the outcome; an answer
//! without tool calls ends the work. Every answer and every outcome is written to the session
//! before the next thing happens, so that a worker that died goes on where it was.

mod completion;
mod session;
mod shell;

use crate::broker::{Broker, Report};
use crate::environment::Environment;
use crate::git;
use completion::{Answer, Model, ToolCall};
use serde_json::{Value, json};
use session::Session;
use std::path::PathBuf;
use std::time::Duration;
use tokio::time::Instant;

const SYSTEM: &str = include_str!("../prompts/agent.md");
const UNCOMMITTED: &str = include_str!("../prompts/uncommitted.md");
const NO_COMMIT: &str = include_str!("../prompts/no_commit.md");

/// Largest task text that is read, in bytes.
const MAX_TASK_BYTES: u64 = 512 * 1024;

/// What can be chosen about an [`Agent`].
#[derive(Clone)]
pub struct Options {
    /// The folder with the repository.
    pub workspace: PathBuf,
    /// The task, in Markdown.
    pub task: PathBuf,
    /// What the worker was told.
    pub environment: Environment,
    /// Longest output of a command that the model sees, in bytes; the middle is left out.
    pub output_bytes: usize,
    /// Size of a conversation from which on old outputs are shortened, in bytes.
    pub context_bytes: usize,
    /// The pauses between tries of a model request; one more try than pauses.
    pub retry_pauses: Vec<Duration>,
}

impl Options {
    /// The usual choices.
    pub fn new(workspace: PathBuf, task: PathBuf, environment: Environment) -> Self {
        Self {
            workspace,
            task,
            environment,
            output_bytes: 16 * 1024,
            context_bytes: 400 * 1024,
            retry_pauses: [1, 2, 4, 8, 15, 30].map(Duration::from_secs).to_vec(),
        }
    }
}

/// The built-in coding agent.
pub struct Agent {
    options: Options,
    broker: Broker,
}

impl Agent {
    /// An agent that reports progress to `broker`. The final report is the caller's.
    pub fn new(options: Options, broker: Broker) -> Self {
        Self { options, broker }
    }

    /// Works until the task is done or cannot be, and says which.
    pub async fn run(&self) -> Report {
        match self.work().await {
            Ok(report) => report,
            Err(reason) => Report::Failed {
                summary: String::new(),
                reason,
            },
        }
    }

    /// Notes that the spawner has the report, so that a further attempt goes on working. Without this note, it reports the same
    /// final answer instead of asking the model for another one.
    ///
    /// # Errors
    /// What could not be written.
    pub fn reported(&self) -> Result<(), String> {
        Session::note_reported(self.session())
    }

    /// The file with the conversation.
    fn session(&self) -> PathBuf {
        self.options.workspace.join(".artel/session.json")
    }

    async fn work(&self) -> Result<Report, String> {
        let options = &self.options;
        let environment = &options.environment;
        let task = self.read_task().await?;
        let head = git::head(&options.workspace).await;
        let head = head.as_deref();
        let mut session = Session::open(self.session(), SYSTEM, &task, environment, head)?;
        let model = Model::new(options)?;
        let end = Instant::now() + environment.wall;
        loop {
            if let Some(text) = session.final_answer() {
                if let Some(report) = self.conclude(&mut session, &text).await? {
                    return Ok(report);
                }
                continue;
            }
            if session.steps() >= environment.max_steps {
                return Ok(Report::Failed {
                    summary: session.last_text(),
                    reason: format!(
                        "the model did not finish within {} steps",
                        environment.max_steps
                    ),
                });
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(Report::Failed {
                    summary: session.last_text(),
                    reason: format!(
                        "the model did not finish within {} s",
                        environment.wall.as_secs()
                    ),
                });
            }
            let answer = tokio::time::timeout(left, model.ask(session.messages())).await;
            let Ok(answer) = answer else { continue };
            let answer = answer?;
            session.answer(answer.message())?;
            let step = session.steps();
            if !answer.text.trim().is_empty() {
                println!("[{step}] {}", answer.text.trim());
            }
            if answer.calls.is_empty() {
                Self::settle(&mut session, &answer)?;
                continue;
            }
            for call in &answer.calls {
                let left = end.saturating_duration_since(Instant::now());
                let outcome = self.call(call, &answer, step, left).await;
                session.outcome(&call.id, &outcome)?;
            }
        }
    }

    async fn read_task(&self) -> Result<String, String> {
        let path = &self.options.task;
        let shown = path.display();
        let size = tokio::fs::metadata(path)
            .await
            .map_err(|error| format!("cannot read the task {shown}: {error}"))?
            .len();
        if size > MAX_TASK_BYTES {
            return Err(format!(
                "the task {shown} has {size} bytes; at most {MAX_TASK_BYTES} are read"
            ));
        }
        tokio::fs::read_to_string(path)
            .await
            .map_err(|error| format!("cannot read the task {shown}: {error}"))
    }

    /// An answer without tool calls that is not an end: empty, or cut off.
    fn settle(session: &mut Session, answer: &Answer) -> Result<(), String> {
        if answer.cut_off {
            return session.tell("Your answer was cut off at its length limit. Go on.", true);
        }
        if answer.text.trim().is_empty() {
            return session.tell(
                "Your answer was empty. Use the tool, or give your final answer.",
                true,
            );
        }
        println!("[{}] the model says that it is done", session.steps());
        Ok(())
    }

    /// Runs one tool call; whatever is wrong with it is an answer to the model.
    async fn call(&self, call: &ToolCall, answer: &Answer, step: u32, left: Duration) -> String {
        if call.name != shell::NAME {
            return format!(
                "error: there is no tool {:?}; the only tool is `{}`",
                call.name,
                shell::NAME
            );
        }
        let arguments = match shell::Arguments::parse(&call.arguments) {
            Ok(arguments) => arguments,
            Err(reason) => return format!("error: {reason}"),
        };
        let said = answer.text.lines().find(|line| !line.trim().is_empty());
        let shown = said.or_else(|| arguments.command.lines().next());
        self.broker.progress(shown.unwrap_or_default(), step).await;
        println!("[{step}] $ {}", arguments.command);
        shell::run(
            &arguments,
            &self.options.workspace,
            self.options.output_bytes,
            left,
        )
        .await
    }

    /// Looks at what a final answer left behind. None: the model was told something and goes on.
    async fn conclude(&self, session: &mut Session, text: &str) -> Result<Option<Report>, String> {
        let summary = text.trim().to_owned();
        if let Some(reason) = blocked(text) {
            return Ok(Some(Report::Blocked { summary, reason }));
        }
        let left = git::status(&self.options.workspace).await?;
        if !left.is_empty() {
            if session.tell_once(
                "uncommitted",
                &UNCOMMITTED.replace("{status}", left.trim_end()),
            )? {
                return Ok(None);
            }
            let reason = format!("uncommitted changes:\n{left}");
            return Ok(Some(Report::Blocked { summary, reason }));
        }
        let head = git::head(&self.options.workspace).await;
        if head.is_none() || head.as_deref() == session.base() {
            if session.tell_once("no_commit", NO_COMMIT)? {
                return Ok(None);
            }
            let reason = "no commit: the model says that it is done but committed nothing".into();
            return Ok(Some(Report::Failed { summary, reason }));
        }
        Ok(Some(Report::Succeeded { summary }))
    }
}

/// What a model that cannot go on lacks: the text behind `BLOCKED:` at the start of a line.
fn blocked(text: &str) -> Option<String> {
    let line = text.lines().find(|line| !line.trim().is_empty())?;
    let line = line.trim().trim_start_matches(['*', '#', '`', ' ']);
    let rest = line.strip_prefix("BLOCKED:")?;
    Some(rest.trim().trim_end_matches(['*', '`']).to_owned())
}

/// The tools, as the model is told of them.
fn tools() -> Value {
    json!([shell::description()])
}

#[cfg(test)]
mod tests {
    use super::blocked;

    #[test]
    fn a_blocked_answer_says_so_in_its_first_line() {
        assert_eq!(blocked("BLOCKED: no key"), Some("no key".into()));
        assert_eq!(
            blocked("\n**BLOCKED: no key**\nmore"),
            Some("no key".into())
        );
        assert_eq!(blocked("I was BLOCKED: not really"), None);
        assert_eq!(blocked("done\nBLOCKED: late"), None);
    }
}
