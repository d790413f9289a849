//! The tool `shell`: one command in the workspace, its output bounded, its time limited.

use serde_json::{Value, json};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::Command;

/// The tool's name.
pub(super) const NAME: &str = "shell";

const DEFAULT_TIMEOUT_S: u64 = 120;
const MAX_TIMEOUT_S: u64 = 1800;

/// Keys that a command has no use for, so that no output shows them.
const KEPT_BACK: [&str; 3] = ["ARTEL_BROKER_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY"];

/// How the model is told of the tool.
pub(super) fn description() -> Value {
    json!({
        "type": "function",
        "function": {
            "name": NAME,
            "description": "Runs a command with bash in the repository's folder and returns its exit code and its output (standard output and standard error together; the middle of a long output is left out). Every command starts in the repository's folder with a fresh shell.",
            "parameters": {
                "type": "object",
                "properties": {
                    "command": {"type": "string", "description": "The command, several lines if need be."},
                    "timeout_s": {"type": "integer", "description": "Seconds after which it is killed; 120 if not given, 1800 at most."}
                },
                "required": ["command"]
            }
        }
    })
}

/// What a call of the tool asks for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Arguments {
    pub(super) command: String,
    pub(super) timeout: Duration,
}

impl Arguments {
    /// Reads the arguments of a call; the error is told to the model.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text)
            .map_err(|error| format!("the arguments are not valid JSON: {error}"))?;
        let Some(command) = value["command"].as_str() else {
            return Err("the arguments need `command`, a string".to_owned());
        };
        if command.trim().is_empty() {
            return Err("`command` is empty".to_owned());
        }
        if command.contains('\0') {
            return Err("`command` contains a zero byte".to_owned());
        }
        let timeout_s = match &value["timeout_s"] {
            Value::Null => DEFAULT_TIMEOUT_S,
            // Some models write numbers as text.
            Value::String(text) => text
                .trim()
                .parse()
                .map_err(|_| "`timeout_s` must be a whole number of seconds".to_owned())?,
            number => number
                .as_u64()
                .ok_or("`timeout_s` must be a whole number of seconds")?,
        };
        Ok(Self {
            command: command.to_owned(),
            timeout: Duration::from_secs(timeout_s.clamp(1, MAX_TIMEOUT_S)),
        })
    }
}

/// Runs a command; the text is what the model sees. What is printed also goes to our own output,
/// as it comes, which is the worker's log and its sign of life.
pub(super) async fn run(
    arguments: &Arguments,
    workspace: &Path,
    output_bytes: usize,
    left: Duration,
) -> String {
    let timeout = arguments.timeout.min(left);
    let mut command = Command::new("bash");
    command
        .arg("-c")
        .arg(format!("exec 2>&1\n{}", arguments.command))
        .current_dir(workspace)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    for name in KEPT_BACK {
        command.env_remove(name);
    }
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return format!("error: cannot run bash: {error}"),
    };
    let group = child.id();
    let mut kept = HeadAndTail::new(output_bytes);
    // Before the redirection takes effect bash itself may complain, about its syntax for example.
    let (Some(mut out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return "error: the command has no output".to_owned();
    };
    let waited = tokio::time::timeout(timeout, async {
        let mut open = true;
        let status = loop {
            tokio::select! {
                read = read_some(&mut out, &mut kept), if open => open = read,
                status = child.wait() => break status,
            }
        };
        // What is in the pipe is read; somebody in the background may hold it open for ever.
        let grace = Duration::from_millis(200);
        let _ = tokio::time::timeout(grace, async {
            while open && read_some(&mut out, &mut kept).await {}
            while read_some(&mut err, &mut kept).await {}
        })
        .await;
        status
    })
    .await;
    let end = match waited {
        Ok(Ok(status)) => match status.code() {
            Some(code) => format!("exit code {code}"),
            None => format!("ended by a signal ({status})"),
        },
        Ok(Err(error)) => format!("error: lost sight of the command: {error}"),
        Err(_) => {
            kill_group(group).await;
            // Reap it, so that its end is certain before the next command starts.
            let _ = tokio::time::timeout(Duration::from_secs(5), child.wait()).await;
            format!("killed after {} s (its time limit)", timeout.as_secs())
        }
    };
    let output = kept.text();
    let gap = if output.is_empty() || output.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    format!("{output}{gap}[{end}]")
}

/// Reads once; false at the end.
async fn read_some(from: &mut (impl AsyncRead + Unpin), kept: &mut HeadAndTail) -> bool {
    let mut buffer = [0_u8; 8192];
    match from.read(&mut buffer).await {
        Ok(0) | Err(_) => false,
        Ok(read) => {
            kept.push(&buffer[..read]);
            print!("{}", String::from_utf8_lossy(&buffer[..read]));
            true
        }
    }
}

/// Kills the command with everything that it started and did not detach.
async fn kill_group(group: Option<u32>) {
    let Some(group) = group else { return };
    let killed = Command::new("bash")
        .args(["-c", &format!("kill -KILL -- -{group}")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .status();
    // A group that is gone already is what we want.
    let _ = tokio::time::timeout(Duration::from_secs(5), killed).await;
}

/// The first and the last bytes of a stream, half of the limit each.
pub(super) struct HeadAndTail {
    half: usize,
    head: Vec<u8>,
    tail: std::collections::VecDeque<u8>,
    dropped: usize,
}

impl HeadAndTail {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            half: (limit / 2).max(1),
            head: Vec::new(),
            tail: std::collections::VecDeque::new(),
            dropped: 0,
        }
    }

    pub(super) fn push(&mut self, bytes: &[u8]) {
        let room = self.half - self.head.len();
        let (first, rest) = bytes.split_at(bytes.len().min(room));
        self.head.extend_from_slice(first);
        self.tail.extend(rest);
        let excess = self.tail.len().saturating_sub(self.half);
        self.tail.drain(..excess);
        self.dropped += excess;
    }

    pub(super) fn text(&self) -> String {
        let (front, back) = self.tail.as_slices();
        let tail = [front, back].concat();
        if self.dropped == 0 {
            let all = [self.head.as_slice(), &tail].concat();
            return String::from_utf8_lossy(&all).into_owned();
        }
        format!(
            "{}\n[… {} bytes left out …]\n{}",
            String::from_utf8_lossy(&self.head),
            self.dropped,
            String::from_utf8_lossy(&tail)
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn sh(command: &str, timeout_ms: u64) -> String {
        let folder = tempfile::tempdir().unwrap();
        let arguments = Arguments {
            command: command.to_owned(),
            timeout: Duration::from_millis(timeout_ms),
        };
        run(&arguments, folder.path(), 1000, Duration::from_mins(1)).await
    }

    #[tokio::test]
    async fn output_of_both_kinds_and_the_exit_code_are_seen() {
        let seen = sh("echo out; echo err >&2; exit 3", 5000).await;
        assert_eq!(seen, "out\nerr\n[exit code 3]");
        let seen = sh("if then", 5000).await;
        assert!(seen.contains("syntax error"), "{seen}");
    }

    #[tokio::test]
    async fn a_long_output_keeps_its_head_and_its_tail() {
        let seen = sh("seq 1 100000", 5000).await;
        assert!(seen.starts_with("1\n2\n"), "{seen}");
        assert!(seen.ends_with("99999\n100000\n[exit code 0]"), "{seen}");
        assert!(seen.contains("bytes left out"), "{seen}");
        assert!(seen.len() < 1100, "{}", seen.len());
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_killed_with_its_children() {
        let seen = sh("echo $$; (sleep 600) & sleep 600", 300).await;
        assert!(seen.contains("killed after"), "{seen}");
        let pid: u32 = seen.lines().next().unwrap().parse().unwrap();
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[tokio::test]
    async fn a_process_in_the_background_does_not_hold_the_tool_up() {
        let started = std::time::Instant::now();
        let seen = sh("sleep 5 & echo started", 20_000).await;
        assert_eq!(seen, "started\n[exit code 0]");
        assert!(started.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn arguments_that_are_wrong_are_explained() {
        for (text, said) in [
            ("{", "not valid JSON"),
            ("{}", "need `command`"),
            ("{\"command\": 3}", "need `command`"),
            ("{\"command\": \" \"}", "is empty"),
            ("{\"command\": \"ls\", \"timeout_s\": -1}", "whole number"),
        ] {
            let error = Arguments::parse(text).unwrap_err();
            assert!(error.contains(said), "{text}: {error}");
        }
        let fine = Arguments::parse("{\"command\": \"ls\", \"timeout_s\": \"99999\"}").unwrap();
        assert_eq!(fine.timeout, Duration::from_secs(MAX_TIMEOUT_S));
    }
}
