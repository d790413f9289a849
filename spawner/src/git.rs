//! The `git` program on the spawner's side: its own configuration and nobody else's, no prompt, no
//! hook, no network, bounded time and output. It is never run with a worker's `.git`.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

/// Longest that one command may take.
const TIME: Duration = Duration::from_mins(5);
/// Most that one command may print, in bytes.
const OUTPUT_BYTES: u64 = 64 * 1024 * 1024;

/// Settings of every command. A repository that Git's own helper (upload-pack) opens does not see
/// them; [`QUARANTINE_CONFIG`] says the same in its file.
const SETTINGS: [&str; 14] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.commitGraph=false",
    "core.multiPackIndex=false",
    "core.askPass=",
    "credential.helper=",
    "protocol.allow=never",
    "protocol.file.allow=always",
    "transfer.fsckObjects=true",
    "fetch.recurseSubmodules=false",
    "submodule.recurse=false",
    "gc.auto=0",
    "maintenance.auto=false",
    "safe.directory=*",
];

/// Configuration of a repository that reads a worker's objects: nothing that a file beside the
/// objects claims (ancestry, bitmaps) is believed.
pub(crate) const QUARANTINE_CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\thooksPath = /dev/null\n\tfsmonitor = false\n\tcommitGraph = false\n\tmultiPackIndex = false\n[pack]\n\tuseBitmaps = false\n[gc]\n\tauto = 0\n[uploadpack]\n\tallowFilter = false\n";

/// A command that did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The program is missing or the system refuses it.
    #[error("cannot run the program git: {0}; install the package `git`")]
    Start(#[source] std::io::Error),
    /// It ran too long.
    #[error("`git {0}` did not end within {seconds} s", seconds = TIME.as_secs())]
    Time(String),
    /// It printed too much.
    #[error("`git {0}` printed more than {OUTPUT_BYTES} bytes")]
    Output(String),
    /// It ended badly.
    #[error("`git {command}` failed: {said}")]
    Failed {
        command: String,
        code: Option<i32>,
        said: String,
    },
}

/// Git in one folder.
#[derive(Clone, Debug)]
pub(crate) struct Git {
    folder: PathBuf,
}

impl Git {
    pub(crate) fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
        }
    }

    /// Runs a command and gives what it printed, without the end of the last line.
    pub(crate) async fn text(&self, args: &[&str]) -> Result<String, Error> {
        let bytes = self.bytes(args, None).await?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    }

    /// Whether a command that answers with its exit code says yes.
    pub(crate) async fn asks(&self, args: &[&str]) -> Result<bool, Error> {
        match self.bytes(args, None).await {
            Ok(_) => Ok(true),
            Err(Error::Failed { code: Some(1), .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The commit that a name stands for; none when there is no such name or commit.
    pub(crate) async fn commit(&self, name: &str) -> Result<Option<String>, Error> {
        let name = format!("{name}^{{commit}}");
        let args = [
            "rev-parse",
            "--verify",
            "--quiet",
            "--end-of-options",
            &name,
        ];
        match self.text(&args).await {
            Ok(sha) => Ok(Some(sha)),
            Err(Error::Failed { code: Some(1), .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Runs a command with `input`, and gives what it printed.
    #[tracing::instrument(name = "git", level = "debug", skip_all, fields(command = args.first(), repository = %self.folder.display()))]
    pub(crate) async fn bytes(
        &self,
        args: &[&str],
        input: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        let shown = || args.iter().take(4).copied().collect::<Vec<_>>().join(" ");
        let mut command = clean(&self.folder);
        command.args(args);
        let mut child = command.spawn().map_err(Error::Start)?;
        let mut stdin = child.stdin.take();
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let work = async {
            let feed = async {
                if let (Some(stdin), Some(input)) = (stdin.as_mut(), input) {
                    // A command that ends early does not read all; its exit code tells.
                    let _ = stdin.write_all(&input).await;
                }
                drop(stdin.take());
            };
            let mut out = Vec::new();
            let mut said = Vec::new();
            let read_out = async {
                match stdout {
                    Some(pipe) => pipe.take(OUTPUT_BYTES + 1).read_to_end(&mut out).await,
                    None => Ok(0),
                }
            };
            let read_said = async {
                match stderr {
                    Some(pipe) => pipe.take(64 * 1024).read_to_end(&mut said).await,
                    None => Ok(0),
                }
            };
            let ((), read, _) = tokio::join!(feed, read_out, read_said);
            read.map_err(Error::Start)?;
            if out.len() as u64 > OUTPUT_BYTES {
                return Err(Error::Output(shown()));
            }
            let status = child.wait().await.map_err(Error::Start)?;
            if status.success() {
                return Ok(out);
            }
            Err(Error::Failed {
                command: shown(),
                code: status.code(),
                said: String::from_utf8_lossy(&said).trim().to_owned(),
            })
        };
        match tokio::time::timeout(TIME, work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Time(shown())),
        }
    }
}

/// Git with an environment of its own.
fn clean(folder: &Path) -> Command {
    let mut command = Command::new("git");
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", "/nonexistent")
        .env("LC_ALL", "C")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_ATTR_NOSYSTEM", "1")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_NO_REPLACE_OBJECTS", "1")
        .env("GIT_NO_LAZY_FETCH", "1")
        .env("GIT_ADVICE", "0")
        .arg("-C")
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    for setting in SETTINGS {
        command.args(["-c", setting]);
    }
    command
}
