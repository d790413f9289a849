//! Runs a coding agent that somebody else wrote, and says how it ended.

use super::output::Lines;
use super::{Adapter, Call, Heard, Prompt};
use crate::broker::{Broker, Report};
use crate::command;
use crate::environment::Environment;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::Instant;

/// How often the spawner is told what the agent is doing, at most.
const TELL_EVERY: Duration = Duration::from_secs(2);

/// What every agent is told beside the task.
const RULES: &str = "\n\n---\nWork in the current directory, which is a Git repository on the right branch. Nobody can answer \
questions. When the work is done and its tests pass, commit everything with a clear message; do not push, and do not change the \
branch. What is not committed does not count.\n";

/// Runs the adapter's program on the task.
pub async fn run(
    adapter: &Adapter,
    workspace: &Path,
    task: &Path,
    environment: &Environment,
    broker: &Broker,
) -> Report {
    let failed = |reason: String| Report::Failed {
        summary: String::new(),
        reason,
    };
    let place = match Place::prepare(adapter, workspace, task) {
        Ok(place) => place,
        Err(error) => {
            return failed(format!(
                "the home of {} cannot be made ready: {error}",
                adapter.name
            ));
        }
    };
    let call = Call {
        environment,
        model: Some(environment.model.as_str()).filter(|model| *model != "default"),
        session: place.session.as_deref(),
        workspace,
        prompt_file: &place.prompt,
        home: &place.home,
    };
    if let Err(error) = place.write(&(adapter.files)(&call)) {
        return failed(format!("{} cannot be configured: {error}", adapter.name));
    }
    let base = command::base(workspace, environment).await;
    let mut heard = Heard::default();
    let end = converse(adapter, &call, &place, broker, &mut heard).await;
    if let Some(session) = &heard.session {
        // Without it the next attempt begins a session of its own.
        if let Err(error) = std::fs::write(&place.session_file, session) {
            println!("artel-agent: the session cannot be kept: {error}");
        }
    }
    let summary = summary(adapter, &heard);
    let trouble = heard.trouble.filter(|words| !words.is_empty());
    match (end, trouble) {
        (Ok(()), None) => {
            command::judge(adapter.program, workspace, base.as_deref(), summary).await
        }
        (Ok(()), Some(words)) => Report::Failed {
            summary,
            reason: format!("{} reported: {words}", adapter.program),
        },
        (Err(reason), words) => Report::Failed {
            summary,
            reason: match words {
                Some(words) => format!("{reason}; it reported: {words}"),
                None => reason,
            },
        },
    }
}

/// Starts the program, gives it the task, and listens until it has ended.
async fn converse(
    adapter: &Adapter,
    call: &Call<'_>,
    place: &Place,
    broker: &Broker,
    heard: &mut Heard,
) -> Result<(), String> {
    let program = adapter.program;
    let stdin = match adapter.prompt {
        Prompt::Stdin => Stdio::piped(),
        Prompt::File => Stdio::null(),
    };
    let mut child = Command::new(program)
        .args((adapter.arguments)(call))
        .current_dir(call.workspace)
        .env("HOME", &place.home)
        .envs((adapter.environment)(call))
        .stdin(stdin)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(|error| format!("cannot run {program}: {error}"))?;
    let (mut input, output) = (child.stdin.take(), child.stdout.take());
    let talk = async {
        let say = async {
            if let Some(input) = input.as_mut() {
                // A program that does not want to hear it says so in other ways.
                let _ = input.write_all(place.text.as_bytes()).await;
            }
            drop(input);
        };
        let listen = async {
            let Some(output) = output else { return Ok(()) };
            let mut lines = Lines::new(output);
            let mut told: Option<Instant> = None;
            let mut step = 0;
            while let Some(line) = lines.next().await? {
                println!("{line}");
                (adapter.read)(heard, &line);
                if told.is_none_or(|at| at.elapsed() >= TELL_EVERY)
                    && let Some(doing) = heard.doing.take()
                {
                    step += 1;
                    told = Some(Instant::now());
                    broker.progress(&doing, step).await;
                }
            }
            Ok::<_, io::Error>(())
        };
        let ((), listened) = tokio::join!(say, listen);
        listened?;
        child.wait().await
    };
    let ended = tokio::time::timeout(call.environment.wall, talk).await;
    match ended {
        Ok(Ok(status)) if status.success() => Ok(()),
        Ok(Ok(status)) => Err(format!("{program} ended with {status}")),
        Ok(Err(error)) => Err(format!("lost sight of {program}: {error}")),
        // Its whole family ends with the worker.
        Err(_) => Err(format!(
            "{program} did not end within {} s",
            call.environment.wall.as_secs()
        )),
    }
}

fn summary(adapter: &Adapter, heard: &Heard) -> String {
    let mut summary = heard.summary.trim().to_owned();
    if heard.input_tokens + heard.output_tokens > 0 {
        let separator = if summary.is_empty() { "" } else { "\n\n" };
        let _ = write!(
            summary,
            "{separator}By its own count, {} sent {} and received {} tokens",
            adapter.program, heard.input_tokens, heard.output_tokens
        );
        if let Some(cost) = heard.cost_usd {
            let _ = write!(summary, ", for ${cost:.4}");
        }
        summary.push('.');
    }
    summary
}

/// Tells Git of this workspace alone that nobody wants these.
fn exclude(workspace: &Path, patterns: &[&str]) -> io::Result<()> {
    let folder = workspace.join(".git/info");
    let file = folder.join("exclude");
    let mut all = std::fs::read_to_string(&file).unwrap_or_default();
    let known = |pattern: &str| all.lines().any(|line| line == pattern);
    let new: Vec<_> = patterns
        .iter()
        .filter(|pattern| !known(pattern))
        .copied()
        .collect();
    if new.is_empty() {
        return Ok(());
    }
    if !all.is_empty() && !all.ends_with('\n') {
        all.push('\n');
    }
    for pattern in new {
        all.push_str(pattern);
        all.push('\n');
    }
    std::fs::create_dir_all(&folder)?;
    std::fs::write(file, all)
}

/// Where an agent keeps what it must not commit: under the workspace's `.artel`, which Git ignores and the next attempt finds.
struct Place {
    home: PathBuf,
    prompt: PathBuf,
    /// The task with our rules.
    text: String,
    session_file: PathBuf,
    session: Option<String>,
}

impl Place {
    fn prepare(adapter: &Adapter, workspace: &Path, task: &Path) -> io::Result<Self> {
        let home = workspace.join(".artel/home").join(adapter.name);
        std::fs::create_dir_all(&home)?;
        exclude(workspace, adapter.leaves)?;
        let mut text = std::fs::read_to_string(task)?;
        text.push_str(RULES);
        let prompt = home.join("prompt.md");
        std::fs::write(&prompt, &text)?;
        let session_file = home.join("session");
        let session = std::fs::read_to_string(&session_file)
            .ok()
            .map(|session| session.trim().to_owned())
            .filter(|session| !session.is_empty());
        Ok(Self {
            home,
            prompt,
            text,
            session_file,
            session,
        })
    }

    fn write(&self, files: &[(&str, String)]) -> io::Result<()> {
        for (path, content) in files {
            let path = self.home.join(path);
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder)?;
            }
            std::fs::write(path, content)?;
        }
        Ok(())
    }
}
