//! What runs first inside a sandbox: starts the relays, then the command, and ends as it ends.
//!
//! Its arguments: `[--out IP:PORT=SOCKET]… [--in SOCKET=IP:PORT]… [--rlimit NAME=NUMBER]… -- COMMAND…`
//!
//! As the first process of a container it bounds that as well: what it takes along when it ends ([`MOST_S`]) needs nobody
//! outside who watches the time.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, Signal, WaitOptions, kill_process, setrlimit, wait};
use tokio::signal::unix::{SignalKind, signal};

use crate::relay;

/// Names, in the environment, the seconds after which the launcher ends, whatever the command does; without it, it has no bound.
/// No argument, so that a launcher of a former version in an old image does not stumble over it.
pub const MOST_S: &str = "ARTEL_LAUNCH_MOST_S";
/// The exit code of a launcher that has ended by its bound.
pub const OVER: u8 = 124;
/// How long open connections may go on after the command has ended.
const LAST_BYTES: Duration = Duration::from_millis(500);

/// Why the launcher could not run the command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An argument is not understood.
    #[error("{0:?} is no argument of the launcher")]
    Argument(String),
    /// There is no command after `--`.
    #[error("there is no command after `--`")]
    NoCommand,
    /// A limit cannot be set.
    #[error("cannot set the limit {0}")]
    Limit(String, #[source] std::io::Error),
    /// A relay cannot listen.
    #[error("cannot listen on {0}")]
    Listen(String, #[source] std::io::Error),
    /// The command cannot be started.
    #[error("cannot start {0:?}")]
    Command(OsString, #[source] std::io::Error),
}

/// The launcher's arguments, understood.
#[derive(Debug, PartialEq, Eq)]
pub struct Launcher {
    outbound: Vec<(SocketAddr, PathBuf)>,
    inbound: Vec<(PathBuf, SocketAddr)>,
    limits: Vec<(String, u64)>,
    command: Vec<OsString>,
    most: Option<Duration>,
}

/// Runs the launcher: the body of the hidden subcommand that callers name in
/// [`crate::Job::launcher`]. `args` are those behind the subcommand.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let most = std::env::var(MOST_S).ok();
    let launcher = Launcher::parse(args).and_then(|launcher| launcher.bounded(most.as_deref()));
    let ended = launcher.and_then(|launcher| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| Error::Listen("the loopback".into(), error))?;
        runtime.block_on(launcher.run())
    });
    match ended {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
            eprintln!("launch: {error}{}", cause.unwrap_or_default());
            ExitCode::from(127)
        }
    }
}

impl Launcher {
    /// Reads the arguments.
    pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let mut launcher = Self {
            outbound: Vec::new(),
            inbound: Vec::new(),
            limits: Vec::new(),
            command: Vec::new(),
            most: None,
        };
        let mut args = args.into_iter();
        loop {
            let flag = args.next().ok_or(Error::NoCommand)?;
            if flag == "--" {
                break;
            }
            let flag = flag.to_string_lossy().into_owned();
            let value = args.next().unwrap_or_default();
            let value = value.to_string_lossy();
            let wrong = || Error::Argument(format!("{flag} {value}"));
            match flag.as_str() {
                "--out" => {
                    let (address, socket) = value.split_once('=').ok_or_else(wrong)?;
                    let address = address.parse().map_err(|_| wrong())?;
                    launcher.outbound.push((address, socket.into()));
                }
                "--in" => {
                    let (socket, address) = value.rsplit_once('=').ok_or_else(wrong)?;
                    let address = address.parse().map_err(|_| wrong())?;
                    launcher.inbound.push((socket.into(), address));
                }
                "--rlimit" => {
                    let (name, number) = value.split_once('=').ok_or_else(wrong)?;
                    let number = number.parse().map_err(|_| wrong())?;
                    launcher.limits.push((name.into(), number));
                }
                _ => return Err(wrong()),
            }
        }
        launcher.command = args.collect();
        if launcher.command.is_empty() {
            return Err(Error::NoCommand);
        }
        Ok(launcher)
    }

    /// With the bound of [`MOST_S`].
    fn bounded(mut self, most_s: Option<&str>) -> Result<Self, Error> {
        let seconds = most_s.map(|text| {
            let wrong = |_| Error::Argument(format!("{MOST_S}={text}"));
            text.parse().map(Duration::from_secs).map_err(wrong)
        });
        self.most = seconds.transpose()?;
        Ok(self)
    }

    /// Starts the relays, then the command; its exit code, or 128 and its signal.
    async fn run(self) -> Result<u8, Error> {
        for (name, number) in &self.limits {
            let resource = match name.as_str() {
                "nproc" => Resource::Nproc,
                "nofile" => Resource::Nofile,
                "fsize" => Resource::Fsize,
                _ => return Err(Error::Argument(format!("--rlimit {name}"))),
            };
            let limit = Rlimit {
                current: Some(*number),
                maximum: Some(*number),
            };
            setrlimit(resource, limit).map_err(|errno| Error::Limit(name.clone(), errno.into()))?;
        }
        let (guard, mut carried) = tokio::sync::mpsc::channel::<()>(1);
        let mut relays = Vec::new();
        for (listen, socket) in self.outbound {
            let relay = relay::outbound(listen, socket)
                .await
                .map_err(|error| Error::Listen(listen.to_string(), error))?;
            relays.push(tokio::spawn(relay.serve_guarded(guard.clone())));
        }
        for (socket, to) in self.inbound {
            let relay = relay::inbound(&socket, to)
                .map_err(|error| Error::Listen(socket.display().to_string(), error))?;
            relays.push(tokio::spawn(relay.serve_guarded(guard.clone())));
        }
        let failed = |error| Error::Command(self.command[0].clone(), error);
        let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
        let mut ended = signal(SignalKind::child()).map_err(failed)?;
        let child = std::process::Command::new(&self.command[0])
            .args(&self.command[1..])
            .spawn()
            .map_err(failed)?;
        let pid = Pid::from_child(&child);
        let over = async {
            match self.most {
                Some(most) => tokio::time::sleep(most).await,
                None => std::future::pending().await,
            }
        };
        tokio::pin!(over);
        let status = loop {
            let sent = tokio::select! {
                _ = ended.recv() => match collect(pid).map_err(|errno| failed(errno.into()))? {
                    Some(status) => break status,
                    None => continue,
                },
                () = &mut over => {
                    let most = self.most.unwrap_or_default();
                    eprintln!("launch: ended after {most:?}, which is the most that it may take");
                    let _ = kill_process(pid, Signal::KILL);
                    return Ok(OVER);
                }
                _ = terminate.recv() => Signal::TERM,
                _ = interrupt.recv() => Signal::INT,
            };
            let _ = kill_process(pid, sent);
        };
        // What the command said last is still on its way.
        drop(guard);
        for relay in relays {
            relay.abort();
        }
        let _ = tokio::time::timeout(LAST_BYTES, carried.recv()).await;
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
        Ok(u8::try_from(code & 0xff).unwrap_or(u8::MAX))
    }
}

/// Collects every process that has ended: as the first process of a container we are given those whose parents are gone. The
/// status of `child`, if it is among them.
fn collect(child: Pid) -> Result<Option<ExitStatus>, rustix::io::Errno> {
    loop {
        match wait(WaitOptions::NOHANG) {
            Ok(Some((pid, status))) if pid == child => {
                return Ok(Some(ExitStatus::from_raw(status.as_raw())));
            }
            Ok(Some(_)) | Err(rustix::io::Errno::INTR) => {}
            Ok(None) => return Ok(None),
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> Result<Launcher, Error> {
        Launcher::parse(words.iter().map(OsString::from))
    }

    #[test]
    fn arguments_are_understood() {
        let launcher = parse(&[
            "--out",
            "127.0.0.1:8080=/run/a.sock",
            "--in",
            "/run/b=c.sock=127.0.0.1:9",
            "--rlimit",
            "nproc=7",
            "--",
            "sh",
            "-c",
            "--",
        ])
        .expect("understood");
        assert_eq!(launcher.outbound[0].1, PathBuf::from("/run/a.sock"));
        assert_eq!(launcher.inbound[0].0, PathBuf::from("/run/b=c.sock"));
        assert_eq!(launcher.limits, [("nproc".to_owned(), 7)]);
        assert_eq!(launcher.command, ["sh", "-c", "--"]);
    }

    #[tokio::test]
    async fn a_command_that_does_not_end_is_ended_with_the_launcher_and_a_quick_one_is_not() {
        let run = async |most: &str, command: &str| {
            let launcher = parse(&["--", "sh", "-c", command]).expect("understood");
            let launcher = launcher.bounded(Some(most)).expect("a number");
            launcher.run().await.expect("run")
        };
        assert_eq!(run("600", "exit 3").await, 3);
        // Deaf to being asked.
        let deaf = "trap '' TERM INT HUP; exec sleep 600";
        assert_eq!(run("1", deaf).await, OVER);
        let unbounded = parse(&["--", "a"]).expect("understood");
        assert_eq!(unbounded.bounded(None).expect("none").most, None);
        let wrong = parse(&["--", "a"])
            .expect("understood")
            .bounded(Some("soon"));
        assert!(wrong.expect_err("refused").to_string().contains("soon"));
    }

    #[test]
    fn what_is_not_understood_is_named() {
        let message = |words: &[&str]| parse(words).expect_err("refused").to_string();
        assert!(message(&["--out", "nowhere", "--", "a"]).contains("nowhere"));
        assert!(message(&["--what", "1", "--", "a"]).contains("--what"));
        assert!(message(&["--"]).contains("no command"));
        assert!(message(&[]).contains("no command"));
    }
}
