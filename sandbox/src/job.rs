//! What to run and within which bounds.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::SocketAddr;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::Error;

/// Where [`Job::launcher`] is mounted inside.
pub(crate) const LAUNCHER: &str = "/run/artel/launch";

/// Bounds of a job. `None` means no bound; only services that run for months should use it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Memory of all processes together, in MiB (proportional share of shared pages). The private
    /// `/tmp`, `$HOME` and `/dev/shm` come on top, see `tmp_mb`.
    pub memory_mb: u64,
    /// Processes and threads together.
    pub pids: u64,
    /// CPU time of all processes together, in seconds.
    pub cpu_s: Option<u64>,
    /// Seconds from start to end.
    pub wall_s: Option<u64>,
    /// Seconds without a byte of output.
    pub idle_s: Option<u64>,
    /// Largest file that can be written, in MiB.
    pub file_mb: u64,
    /// Space of everything under the writable mounts together, in MiB; measured every few seconds.
    pub disk_mb: Option<u64>,
    /// Size of the private `/tmp`, in MiB (memory). `$HOME` and `/dev/shm` have as much each.
    pub tmp_mb: u64,
    /// Output that is kept and passed on, in MiB; the rest is read and dropped, with a mark.
    pub output_mb: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory_mb: 1024,
            pids: 256,
            cpu_s: None,
            wall_s: Some(600),
            idle_s: None,
            file_mb: 256,
            disk_mb: None,
            tmp_mb: 128,
            output_mb: 32,
        }
    }
}

/// What the command reads.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Stdin {
    /// Nothing.
    #[default]
    Null,
    /// These bytes, then the end.
    Bytes(Vec<u8>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mount {
    pub host: PathBuf,
    pub guest: PathBuf,
    pub writable: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Launcher {
    pub program: PathBuf,
    pub prefix_args: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Relay {
    Out { listen: SocketAddr, socket: PathBuf },
    In { socket: PathBuf, to: SocketAddr },
}

/// A command with everything that it may see and use. Nothing is inherited.
#[derive(Clone)]
pub struct Job {
    pub(crate) argv: Vec<OsString>,
    pub(crate) env: BTreeMap<String, String>,
    pub(crate) cwd: Option<PathBuf>,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) limits: Limits,
    pub(crate) die_with_parent: bool,
    pub(crate) stdin: Stdin,
    pub(crate) launcher: Option<Launcher>,
    pub(crate) relays: Vec<Relay>,
}

impl Job {
    /// A command: program (a name on the sandbox's `PATH`, or a path inside) and arguments.
    pub fn new<I>(argv: I) -> Self
    where
        I: IntoIterator,
        I::Item: Into<OsString>,
    {
        Self {
            argv: argv.into_iter().map(Into::into).collect(),
            env: BTreeMap::new(),
            cwd: None,
            mounts: Vec::new(),
            limits: Limits::default(),
            die_with_parent: true,
            stdin: Stdin::Null,
            launcher: None,
            relays: Vec::new(),
        }
    }

    /// One variable of the environment. Besides these there are only `PATH`, `HOME`, `LANG`,
    /// `TMPDIR` and `USER`, which may be given here too.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// The working directory, as a path inside. Default: the home directory inside.
    #[must_use]
    pub fn cwd(mut self, guest: impl Into<PathBuf>) -> Self {
        self.cwd = Some(guest.into());
        self
    }

    /// Shows a host path (file, directory or Unix socket) inside, read-only.
    #[must_use]
    pub fn mount_ro(self, host: impl Into<PathBuf>, guest: impl Into<PathBuf>) -> Self {
        self.mount(host.into(), guest.into(), false)
    }

    /// Shows a host path inside, writable. What the sandbox writes there belongs, outside, to the
    /// user that runs us.
    #[must_use]
    pub fn mount_rw(self, host: impl Into<PathBuf>, guest: impl Into<PathBuf>) -> Self {
        self.mount(host.into(), guest.into(), true)
    }

    fn mount(mut self, host: PathBuf, guest: PathBuf, writable: bool) -> Self {
        self.mounts.push(Mount {
            host,
            guest,
            writable,
        });
        self
    }

    /// Bounds; [`Limits::default`] otherwise.
    #[must_use]
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Whether the command is killed when this process ends, however it ends. Default: yes.
    #[must_use]
    pub fn die_with_parent(mut self, yes: bool) -> Self {
        self.die_with_parent = yes;
        self
    }

    /// What the command reads. Default: nothing.
    #[must_use]
    pub fn stdin(mut self, stdin: Stdin) -> Self {
        self.stdin = stdin;
        self
    }

    /// The program that carries [`crate::launcher::main`] and the arguments that lead to it, for
    /// example the running program and `["internal", "launch"]`. It is mounted read-only and runs
    /// the relays and then the command. Needed for [`Job::relay_out`] and [`Job::relay_in`].
    #[must_use]
    pub fn launcher(mut self, program: impl Into<PathBuf>, prefix_args: Vec<String>) -> Self {
        self.launcher = Some(Launcher {
            program: program.into(),
            prefix_args,
        });
        self
    }

    /// A way out: a loopback address inside whose connections go to a Unix socket (a path inside,
    /// on a mount). Needs [`Job::launcher`].
    #[must_use]
    pub fn relay_out(mut self, listen: SocketAddr, socket: impl Into<PathBuf>) -> Self {
        let socket = socket.into();
        self.relays.push(Relay::Out { listen, socket });
        self
    }

    /// A way in: a Unix socket (a path inside, on a writable mount) whose connections go to a
    /// loopback address inside. Needs [`Job::launcher`].
    #[must_use]
    pub fn relay_in(mut self, socket: impl Into<PathBuf>, to: SocketAddr) -> Self {
        let socket = socket.into();
        self.relays.push(Relay::In { socket, to });
        self
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        let bad = |message: String| Err(Error::Job(message));
        if self.argv.first().is_none_or(|program| program.is_empty()) {
            return bad("it has no command".into());
        }
        if self
            .argv
            .iter()
            .any(|arg| arg.as_encoded_bytes().contains(&0))
        {
            return bad("an argument contains a zero byte".into());
        }
        for (name, value) in &self.env {
            let plain = |c: char| c == '_' || c.is_ascii_alphanumeric();
            if name.is_empty() || !name.chars().all(plain) || name.starts_with(char::is_numeric) {
                return bad(format!("{name:?} is no name of an environment variable"));
            }
            if value.contains('\0') {
                return bad(format!("the value of {name} contains a zero byte"));
            }
        }
        for mount in &self.mounts {
            guest_path(&mount.guest)?;
            if mount.guest == Path::new("/") {
                return bad("the root of the sandbox cannot be replaced by a mount".into());
            }
            std::fs::metadata(&mount.host).map_err(|source| Error::Mount {
                host: mount.host.clone(),
                source,
            })?;
        }
        if let Some(cwd) = &self.cwd {
            guest_path(cwd)?;
        }
        for relay in &self.relays {
            let (Relay::Out { socket, .. } | Relay::In { socket, .. }) = relay;
            guest_path(socket)?;
        }
        if self.launcher.is_none() && !self.relays.is_empty() {
            return bad("relays need the launcher program".into());
        }
        let limits = &self.limits;
        if limits.memory_mb == 0 || limits.pids == 0 || limits.file_mb == 0 || limits.tmp_mb == 0 {
            return bad("memory_mb, pids, file_mb and tmp_mb must be above zero".into());
        }
        Ok(())
    }

    /// The command, behind the launcher if there is one; `place` says where a guest path is.
    pub(crate) fn launch_args(
        &self,
        rlimits: &[(&str, u64)],
        before_command: &[OsString],
        place: impl Fn(&Path) -> PathBuf,
    ) -> Vec<OsString> {
        let Some(launcher) = &self.launcher else {
            return [before_command, &self.argv].concat();
        };
        let mut args: Vec<OsString> = vec![LAUNCHER.into()];
        args.extend(launcher.prefix_args.iter().map(OsString::from));
        for relay in &self.relays {
            match relay {
                Relay::Out { listen, socket } => {
                    args.push("--out".into());
                    args.push(format!("{listen}={}", place(socket).display()).into());
                }
                Relay::In { socket, to } => {
                    args.push("--in".into());
                    args.push(format!("{}={to}", place(socket).display()).into());
                }
            }
        }
        for (name, value) in rlimits {
            args.push("--rlimit".into());
            args.push(format!("{name}={value}").into());
        }
        args.push("--".into());
        args.extend_from_slice(before_command);
        args.extend_from_slice(&self.argv);
        args
    }
}

impl std::fmt::Debug for Job {
    /// Names of the environment only: values may be secrets.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Job")
            .field("argv", &self.argv)
            .field("env", &self.env.keys())
            .field("cwd", &self.cwd)
            .field("mounts", &self.mounts)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

fn guest_path(path: &Path) -> Result<(), Error> {
    let plain = path
        .components()
        .all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if path.is_absolute() && plain {
        Ok(())
    } else {
        Err(Error::Job(format!(
            "{} is not an absolute path without `.` and `..`",
            path.display()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(job: &Job) -> String {
        job.check().expect_err("refused").to_string()
    }

    #[test]
    fn nonsense_is_refused_with_what_is_wrong() {
        let none: [&str; 0] = [];
        assert!(message(&Job::new(none)).contains("no command"));
        assert!(message(&Job::new(["a"]).env("A-B", "1")).contains("A-B"));
        assert!(message(&Job::new(["a"]).cwd("../up")).contains("../up"));
        assert!(message(&Job::new(["a"]).mount_ro("/usr", "/")).contains("root"));
        let missing = message(&Job::new(["a"]).mount_ro("/does/not/exist", "/x"));
        assert!(missing.contains("/does/not/exist"), "{missing}");
    }

    #[test]
    fn values_of_the_environment_are_not_printed() {
        let job = Job::new(["a"]).env("TOKEN", "hunter2");
        let text = format!("{job:?}");
        assert!(
            text.contains("TOKEN") && !text.contains("hunter2"),
            "{text}"
        );
    }
}
