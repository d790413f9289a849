//! The `git` program on the spawner's side: its own configuration and nobody else's, no prompt, no
//! hook, no network but to the one host of a [`Login`], bounded time and output. It is never run
//! with a worker's `.git`. What reads a worker's objects runs in a sandbox ([`Git::inside`]).

use crate::reading::Confined;
use crate::tokens::GitToken;
use std::fs::File;
use std::io::Read as _;
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

/// The environment of every command, beside `PATH`.
const ENVIRONMENT: [(&str, &str); 9] = [
    ("HOME", "/nonexistent"),
    ("LC_ALL", "C"),
    ("GIT_CONFIG_NOSYSTEM", "1"),
    ("GIT_CONFIG_GLOBAL", "/dev/null"),
    ("GIT_ATTR_NOSYSTEM", "1"),
    ("GIT_TERMINAL_PROMPT", "0"),
    ("GIT_NO_REPLACE_OBJECTS", "1"),
    ("GIT_NO_LAZY_FETCH", "1"),
    ("GIT_ADVICE", "0"),
];

/// Configuration of a repository that reads a worker's objects: nothing that a file beside the
/// objects claims (ancestry, bitmaps) is believed.
pub(crate) const QUARANTINE_CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\thooksPath = /dev/null\n\tfsmonitor = false\n\tcommitGraph = false\n\tmultiPackIndex = false\n[pack]\n\tuseBitmaps = false\n[gc]\n\tauto = 0\n[uploadpack]\n\tallowFilter = false\n";

/// A credential helper that says what stands in the environment of its own process, which is the
/// command's; the secret itself is in no argument.
pub(crate) const HELPER: &str = "!f() { test \"$1\" = get && printf 'username=%s\\npassword=%s\\n' \"$ARTEL_GIT_USER\" \"$ARTEL_GIT_SECRET\"; }; f";

/// What one command needs that reaches another host.
pub(crate) struct Login {
    /// Settings beside those of every command.
    pub(crate) settings: Vec<String>,
    /// The credential, for the helper alone.
    pub(crate) token: Option<GitToken>,
    /// Longest that the command may take.
    pub(crate) time: Duration,
    /// Whether the way to the host is the one that the spawner's environment names.
    pub(crate) proxied: bool,
}

/// Of the spawner's own environment, what says how other hosts are reached.
const WAYS: [&str; 8] = [
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "GIT_SSL_CAINFO",
];

/// A command that did not do what it should.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The program is missing or the system refuses it.
    #[error("cannot run the program git: {0}; install the package `git`")]
    Start(#[source] std::io::Error),
    /// It ran too long.
    #[error("`git {0}` did not end within {seconds} s", seconds = .1.as_secs())]
    Time(String, Duration),
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
    /// Its sandbox could not be started or watched.
    #[error("git cannot be confined: {}", crate::trouble::chain(.0))]
    Confine(#[source] sandbox::Error),
    /// It broke a bound of its sandbox, or ended by a signal.
    #[error("`git {command}` was {reason} in its sandbox: {said}")]
    Ended {
        command: String,
        reason: sandbox::Reason,
        said: String,
    },
}

/// What a command reads.
enum Input {
    Nothing,
    Bytes(Vec<u8>),
    File(File),
}

/// Git in one folder.
pub(crate) struct Git {
    folder: PathBuf,
    login: Option<Login>,
    confined: Option<Confined>,
}

impl Git {
    pub(crate) fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            login: None,
            confined: None,
        }
    }

    /// Git in a sandbox, in a folder as it is named there.
    pub(crate) fn inside(folder: impl Into<PathBuf>, confined: Confined) -> Self {
        Self {
            confined: Some(confined),
            ..Self::new(folder)
        }
    }

    /// The same, for a command that reaches another host.
    pub(crate) fn with(mut self, login: Login) -> Self {
        self.login = Some(login);
        self
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
    pub(crate) async fn bytes(
        &self,
        args: &[&str],
        input: Option<Vec<u8>>,
    ) -> Result<Vec<u8>, Error> {
        if let Some(confined) = &self.confined {
            let (answer, length) = self.confined(confined, args, input).await?;
            if length > OUTPUT_BYTES {
                return Err(Error::Output(args.join(" ")));
            }
            let mut out = Vec::new();
            // What it has said is of this length and no longer grows; the bound is for whoever holds it open all the same.
            let read = answer.take(OUTPUT_BYTES).read_to_end(&mut out);
            return read.map(|_| out).map_err(Error::Start);
        }
        let input = input.map_or(Input::Nothing, Input::Bytes);
        self.beside(args, input).await
    }

    /// Runs a command, and gives what it printed as a file, of any length that its sandbox allows. Only in a sandbox.
    pub(crate) async fn answered(
        &self,
        args: &[&str],
        input: Option<Vec<u8>>,
    ) -> Result<File, Error> {
        let Some(confined) = &self.confined else {
            let reason = "there is no sandbox for it";
            return Err(Error::Start(std::io::Error::other(reason)));
        };
        let (answer, _) = self.confined(confined, args, input).await?;
        Ok(answer)
    }

    /// Runs a command that reads a file.
    pub(crate) async fn fed(&self, args: &[&str], input: File) -> Result<(), Error> {
        self.beside(args, Input::File(input)).await.map(drop)
    }

    #[tracing::instrument(name = "git", level = "debug", skip_all, fields(command = args.first(), repository = %self.folder.display(), confined = true))]
    async fn confined(
        &self,
        confined: &Confined,
        args: &[&str],
        input: Option<Vec<u8>>,
    ) -> Result<(File, u64), Error> {
        let folder = self.folder.display().to_string();
        let words = [&["-C", &folder], args].concat();
        confined
            .run(&ENVIRONMENT, &SETTINGS, &words, input, TIME)
            .await
    }

    #[tracing::instrument(name = "git", level = "debug", skip_all, fields(command = args.first(), repository = %self.folder.display()))]
    async fn beside(&self, args: &[&str], input: Input) -> Result<Vec<u8>, Error> {
        let shown = || args.iter().take(4).copied().collect::<Vec<_>>().join(" ");
        let mut command = clean(&self.folder, self.login.as_ref());
        command.args(args);
        let input = match input {
            Input::Nothing => None,
            Input::Bytes(bytes) => Some(bytes),
            Input::File(file) => {
                command.stdin(file);
                None
            }
        };
        let mut child = command.spawn().map_err(Error::Start)?;
        let mut family = Family(child.id());
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
            family.0 = None;
            if status.success() {
                return Ok(out);
            }
            Err(Error::Failed {
                command: shown(),
                code: status.code(),
                said: self.without_secret(String::from_utf8_lossy(&said).trim()),
            })
        };
        let time = self.login.as_ref().map_or(TIME, |login| login.time);
        match tokio::time::timeout(time, work).await {
            Ok(outcome) => outcome,
            Err(_) => Err(Error::Time(shown(), time)),
        }
    }

    /// A host may repeat what it was sent.
    fn without_secret(&self, text: &str) -> String {
        let token = self.login.as_ref().and_then(|login| login.token.as_ref());
        match token {
            Some(token) if !token.secret.expose().is_empty() => {
                text.replace(token.secret.expose(), "…")
            }
            _ => text.to_owned(),
        }
    }
}

/// A command and whoever it started: those that speak to other hosts do not end with it by themselves.
struct Family(Option<u32>);

impl Drop for Family {
    fn drop(&mut self) {
        let group = self
            .0
            .and_then(|id| rustix::process::Pid::from_raw(i32::try_from(id).ok()?));
        if let Some(group) = group {
            // It may have ended this moment.
            let _ = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
    }
}

/// Git with an environment of its own.
fn clean(folder: &Path, login: Option<&Login>) -> Command {
    let mut command = Command::new("git");
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .envs(ENVIRONMENT)
        .arg("-C")
        .arg(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    for setting in SETTINGS {
        command.args(["-c", setting]);
    }
    let Some(login) = login else { return command };
    for setting in &login.settings {
        command.args(["-c", setting]);
    }
    if let Some(token) = &login.token {
        command
            .env("ARTEL_GIT_USER", &token.user)
            .env("ARTEL_GIT_SECRET", token.secret.expose());
    }
    if login.proxied {
        for name in WAYS {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
    }
    command
}
