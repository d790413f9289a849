//! How a container that waits is told what to do: both ends of one connection, which the container makes when it has started.
//!
//! ```text
//! spawner ─ length, command ─► container      the command, whole
//!         ◄─────── READY ─────                it can be run
//!         ──────── BEGIN ────►                and is, from here on and never before
//! ```
//!
//! Nothing of a worker runs inside before the last of these, so that whoever does not come so far has done nothing. A spawner
//! that dies closes the connection, and the container ends.

use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// The socket's name in the broker's folder, while a container waits.
pub(super) const SOCKET: &str = "go";
/// The exit code of a container that was never told to begin. A worker may end with it as well, and proves nothing by that.
pub(super) const NEVER_BEGAN: u8 = 120;
/// Longest command, in bytes.
const COMMAND_BYTES: usize = 1 << 20;
const READY: u8 = b'r';
const BEGIN: u8 = b'b';

/// What a container that waits becomes.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Go {
    /// Program and arguments.
    pub(super) argv: Vec<String>,
    /// What is added to its environment.
    pub(super) env: Vec<(String, String)>,
}

impl Go {
    /// As it is sent; none when it is too long.
    pub(super) fn frame(&self) -> Option<Vec<u8>> {
        let body = serde_json::to_vec(self).ok()?;
        let length = u32::try_from(body.len()).ok()?;
        (body.len() <= COMMAND_BYTES).then(|| [&length.to_be_bytes(), body.as_slice()].concat())
    }
}

/// The spawner's end.
#[derive(Debug)]
pub(super) struct Line(pub(super) tokio::net::UnixStream);

impl Line {
    /// Whether the container still waits, as far as this can be told at once.
    pub(super) fn is_open(&self) -> bool {
        let error = self.0.try_read(&mut [0]).map_err(|error| error.kind());
        // It says nothing unless it is asked.
        error == Err(io::ErrorKind::WouldBlock)
    }

    /// Tells it the command; returns when it can be run.
    pub(super) async fn tell(&mut self, frame: &[u8]) -> io::Result<()> {
        self.0.write_all(frame).await?;
        match self.0.read_u8().await? {
            READY => Ok(()),
            _ => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Has it begin.
    pub(super) async fn begin(&mut self) -> io::Result<()> {
        self.0.write_all(&[BEGIN]).await
    }
}

/// The container's end, as its first process: waits at the socket that its argument names, and becomes what it is told. The
/// body of `artel-inside internal wait SOCKET`; returns only if there was nothing to become.
pub fn wait_for_go(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(socket) = args.next() else {
        eprintln!("wait: the socket is missing");
        return ExitCode::from(2);
    };
    let go = match told(Path::new(&socket)) {
        Ok(go) => go,
        Err(error) => {
            eprintln!("wait: nobody said what to do: {error}");
            return ExitCode::from(NEVER_BEGAN);
        }
    };
    let (program, rest) = go.argv.split_first().unzip();
    let program = program.map_or("", String::as_str);
    let error = Command::new(program)
        .args(rest.unwrap_or_default())
        .envs(go.env)
        .exec();
    eprintln!("wait: cannot start {program:?}: {error}");
    ExitCode::from(127)
}

/// Waits for as long as the spawner lives. The connection is closed when this returns.
fn told(socket: &Path) -> io::Result<Go> {
    let mut line = UnixStream::connect(socket)?;
    let mut length = [0; 4];
    line.read_exact(&mut length)?;
    let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
    if length > COMMAND_BYTES {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let mut body = vec![0; length];
    line.read_exact(&mut body)?;
    let go = serde_json::from_slice(&body)?;
    line.write_all(&[READY])?;
    let mut word = [0];
    line.read_exact(&mut word)?;
    if word != [BEGIN] {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok(go)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn go() -> Go {
        Go {
            argv: vec!["sh".to_owned(), "-c".to_owned(), "é\n".to_owned()],
            env: vec![("A".to_owned(), "b".to_owned())],
        }
    }

    /// Both ends: the spawner's, and what the container's came to.
    async fn ends(folder: &Path) -> (Line, tokio::task::JoinHandle<Result<Go, io::ErrorKind>>) {
        let path = folder.join(SOCKET);
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let inside = tokio::task::spawn_blocking(move || told(&path).map_err(|e| e.kind()));
        let (stream, _) = listener.accept().await.unwrap();
        (Line(stream), inside)
    }

    #[tokio::test]
    async fn who_waits_learns_the_command_and_begins_when_it_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let (mut line, inside) = ends(folder.path()).await;
        assert!(line.is_open());
        line.tell(&go().frame().unwrap()).await.unwrap();
        assert!(!inside.is_finished());
        line.begin().await.unwrap();
        assert_eq!(inside.await.unwrap(), Ok(go()));
        assert!(!line.is_open(), "what runs does not have the connection");
    }

    #[tokio::test]
    async fn a_spawner_that_dies_before_the_last_word_has_begun_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (mut line, inside) = ends(folder.path()).await;
        line.tell(&go().frame().unwrap()).await.unwrap();
        drop(line);
        assert_eq!(inside.await.unwrap(), Err(io::ErrorKind::UnexpectedEof));
    }

    #[test]
    fn a_command_that_is_too_long_is_not_sent() {
        let mut go = go();
        go.argv.push("x".repeat(COMMAND_BYTES));
        assert_eq!(go.frame(), None);
    }
}
