//! Runs the `git` program: nobody's configuration, no hooks, no prompts, bounded in time and output.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tracing::Instrument as _;

use crate::Error;

/// How long one call may take.
const CALL_S: u64 = 60;
/// How much of an answer is kept, in bytes, unless a call says otherwise.
const ANSWER_BYTES: usize = 64 << 20;
/// How much of what it says on standard error is kept.
const SAID_BYTES: u64 = 8 * 1024;

/// Whose commits these are.
pub(crate) const IDENT: &str = "Artel <artel@localhost>";

/// Set for every call, over anything that a repository's own configuration says.
const CONFIGURATION: [&str; 10] = [
    "core.hooksPath=/dev/null",
    "core.fsmonitor=false",
    "core.attributesFile=/dev/null",
    "core.fsync=committed,reference",
    "core.quotePath=false",
    "gc.autoDetach=false",
    "maintenance.auto=false",
    "protocol.allow=never",
    "protocol.file.allow=always",
    "advice.detachedHead=false",
];

/// The `git` program on one repository.
#[derive(Clone, Debug)]
pub(crate) struct Git {
    program: Arc<Path>,
    repository: PathBuf,
}

/// One call, being put together.
pub(crate) struct Call<'a> {
    git: &'a Git,
    args: Vec<OsString>,
    env: Vec<(&'static str, OsString)>,
    stdin: Vec<u8>,
    limit: usize,
    cut: bool,
    seconds: u64,
    bare: bool,
}

/// What came back.
pub(crate) struct Answer {
    /// The exit code; -1 for a signal.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub said: String,
    /// Whether the output was longer than its limit.
    pub cut: bool,
    command: String,
    repository: PathBuf,
    status: String,
}

impl Git {
    pub(crate) fn new(program: Arc<Path>, repository: PathBuf) -> Self {
        Self {
            program,
            repository,
        }
    }

    pub(crate) fn repository(&self) -> &Path {
        &self.repository
    }

    /// Begins a call on the repository.
    pub(crate) fn call<I>(&self, args: I) -> Call<'_>
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        Call {
            git: self,
            args: args.into_iter().map(Into::into).collect(),
            env: Vec::new(),
            stdin: Vec::new(),
            limit: ANSWER_BYTES,
            cut: false,
            seconds: CALL_S,
            bare: true,
        }
    }

    /// Checks that Git is there and new enough.
    pub(crate) async fn check_version(&self) -> Result<(), Error> {
        let answer = self.call(["--version"]).outside().ok().await?;
        let text = String::from_utf8_lossy(&answer).trim().to_owned();
        if version(&text).is_some_and(|version| version >= (2, 38)) {
            Ok(())
        } else {
            Err(Error::GitTooOld { found: text })
        }
    }
}

/// Major and minor, of `git version 2.47.3 (Apple Git-1)`.
fn version(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.strip_prefix("git version ")?.split(['.', ' ', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

impl Call<'_> {
    pub(crate) fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = bytes.into();
        self
    }

    pub(crate) fn env(mut self, name: &'static str, value: impl Into<OsString>) -> Self {
        self.env.push((name, value.into()));
        self
    }

    /// Keeps at most so much of the output and ends Git when there is more.
    pub(crate) fn cut_at(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self.cut = true;
        self
    }

    /// Fails above so much output.
    pub(crate) fn limit(mut self, bytes: usize) -> Self {
        self.limit = bytes;
        self
    }

    pub(crate) fn seconds(mut self, seconds: u64) -> Self {
        self.seconds = seconds;
        self
    }

    /// Not on the repository: a call that makes one, or needs none.
    pub(crate) fn outside(mut self) -> Self {
        self.bare = false;
        self
    }

    /// Runs it; output only when it succeeded.
    pub(crate) async fn ok(self) -> Result<Vec<u8>, Error> {
        let answer = self.run().await?;
        if answer.code == 0 {
            Ok(answer.stdout)
        } else {
            Err(answer.failed())
        }
    }

    /// Runs it; the output as one line of text.
    pub(crate) async fn line(self) -> Result<String, Error> {
        let bytes = self.ok().await?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    }

    /// Runs it, however it ends.
    pub(crate) async fn run(self) -> Result<Answer, Error> {
        let command = self.args[0].to_string_lossy().into_owned();
        let span =
            tracing::debug_span!("git", command, repository = %self.git.repository.display());
        let seconds = self.seconds;
        let repository = self.git.repository.clone();
        let running = self.start(command.clone()).instrument(span);
        tokio::time::timeout(Duration::from_secs(seconds), running)
            .await
            .unwrap_or(Err(Error::GitTimeout {
                command,
                repository,
                seconds,
            }))
    }

    async fn start(self, command: String) -> Result<Answer, Error> {
        let mut process = Command::new(&*self.git.program);
        process
            .env_clear()
            .env(
                "PATH",
                std::env::var_os("PATH").unwrap_or_else(|| "/usr/local/bin:/usr/bin:/bin".into()),
            )
            .env("HOME", "/nonexistent")
            .env("LC_ALL", "C")
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_CONFIG_SYSTEM", "/dev/null")
            .env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_ATTR_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("GIT_NO_REPLACE_OBJECTS", "1")
            .env("GIT_LITERAL_PATHSPECS", "1")
            .env("GIT_OPTIONAL_LOCKS", "0")
            .env("GIT_NO_LAZY_FETCH", "1")
            .env("GIT_AUTHOR_NAME", "Artel")
            .env("GIT_AUTHOR_EMAIL", "artel@localhost")
            .env("GIT_COMMITTER_NAME", "Artel")
            .env("GIT_COMMITTER_EMAIL", "artel@localhost")
            .envs(self.env.iter().map(|(name, value)| (*name, value)));
        if self.bare {
            // Named outright, so that Git neither looks for a repository nor asks whose it is.
            process.env("GIT_DIR", &self.git.repository);
        }
        for setting in CONFIGURATION {
            process.arg("-c").arg(setting);
        }
        process
            .args(&self.args)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // Ctrl-C is for us, not for a Git in the middle of a ref.
            .process_group(0)
            .kill_on_drop(true);
        let mut child = process.spawn().map_err(|source| Error::GitMissing {
            program: self.git.program.to_path_buf(),
            source,
        })?;
        let (Some(mut stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Error::Interrupted);
        };
        let input = self.stdin;
        let write = async move {
            // A Git that ends early closes it; its exit code tells.
            let _ = stdin.write_all(&input).await;
            drop(stdin);
        };
        let limit = self.limit;
        let read = async move {
            let mut kept = Vec::new();
            let most = u64::try_from(limit).unwrap_or(u64::MAX).saturating_add(1);
            let read = stdout.take(most).read_to_end(&mut kept).await;
            let over = kept.len() > limit;
            kept.truncate(limit);
            (read, kept, over)
        };
        let say = async move {
            let mut said = Vec::new();
            let mut stderr = stderr;
            let _ = (&mut stderr).take(SAID_BYTES).read_to_end(&mut said).await;
            let _ = tokio::io::copy(&mut stderr, &mut tokio::io::sink()).await;
            String::from_utf8_lossy(&said).trim().to_owned()
        };
        // Writing goes on beside reading; when the output is over its limit, nobody waits for the rest.
        let talk = async {
            let ((), said) = tokio::join!(write, say);
            said
        };
        tokio::pin!(talk);
        tokio::pin!(read);
        let (read, said) = tokio::select! {
            read = &mut read => {
                if read.2 {
                    let _ = child.start_kill();
                }
                (read, talk.await)
            }
            said = &mut talk => (read.await, said),
        };
        let (read, stdout, over) = read;
        if over {
            let _ = child.start_kill();
        }
        let waited = child.wait().await;
        let path = &self.git.repository;
        read.map_err(Error::io("reading what Git says about", path))?;
        let status = waited.map_err(Error::io("waiting for Git in", path))?;
        if over && !self.cut {
            return Err(Error::TooMuch {
                command,
                repository: self.git.repository.clone(),
                limit,
            });
        }
        Ok(Answer {
            code: if over { 0 } else { status.code().unwrap_or(-1) },
            stdout,
            said,
            cut: over,
            command,
            repository: self.git.repository.clone(),
            status: status.to_string(),
        })
    }
}

impl Answer {
    /// This answer as an error.
    pub(crate) fn failed(self) -> Error {
        Error::Git {
            command: self.command,
            repository: self.repository,
            status: self.status,
            said: self.said,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn fake(folder: &Path, script: &str) -> Git {
        let program = folder.join("git");
        std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        Git::new(program.into(), folder.to_owned())
    }

    #[tokio::test]
    async fn an_old_git_is_named_with_what_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        for (says, fits) in [
            ("git version 2.34.1", false),
            ("git version 2.38.0", true),
            ("git version 2.47.3 (Apple Git-1)", true),
            ("git version 3.0-rc1", true),
            ("something else", false),
        ] {
            let checked = fake(folder.path(), &format!("echo '{says}'"))
                .check_version()
                .await;
            assert_eq!(checked.is_ok(), fits, "{says}");
        }
        let missing = Git::new(folder.path().join("none").into(), folder.path().to_owned());
        let error = missing.check_version().await.unwrap_err().to_string();
        assert!(error.contains("apt-get install git"), "{error}");
    }

    #[tokio::test]
    async fn a_git_that_hangs_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let git = fake(folder.path(), "exec sleep 100");
        let error = git.call(["hang"]).seconds(1).ok().await.unwrap_err();
        assert!(
            matches!(error, Error::GitTimeout { seconds: 1, .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn more_output_than_allowed_is_refused_or_cut() {
        let folder = tempfile::tempdir().unwrap();
        let git = fake(folder.path(), "exec yes");
        let error = git.call(["yes"]).limit(1000).ok().await.unwrap_err();
        assert!(
            matches!(error, Error::TooMuch { limit: 1000, .. }),
            "{error}"
        );
        let answer = git.call(["yes"]).cut_at(1000).run().await.unwrap();
        assert_eq!(
            (answer.stdout.len(), answer.cut, answer.code),
            (1000, true, 0)
        );
    }

    #[tokio::test]
    async fn nothing_of_our_environment_reaches_git() {
        let folder = tempfile::tempdir().unwrap();
        let git = fake(folder.path(), "env");
        let text = String::from_utf8(git.call(["env"]).ok().await.unwrap()).unwrap();
        assert!(!text.contains("CARGO"), "{text}");
        assert!(text.contains("GIT_CONFIG_GLOBAL=/dev/null"), "{text}");
    }
}
