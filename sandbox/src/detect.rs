//! Which confinement this machine offers.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::running::{Output, Running};
use crate::{Error, Job, bubblewrap, direct};

/// Why commands cannot be confined here, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// Not Linux.
    #[error("sandboxed commands need Linux; on other systems use Docker workers")]
    NotLinux,
    /// A program that confinement needs is not installed.
    #[error(
        "the program `{program}` is not installed; install the package `{package}` (Debian, Ubuntu: `sudo apt-get install {package}`)"
    )]
    MissingProgram {
        /// The program's name.
        program: &'static str,
        /// The package that has it.
        package: &'static str,
    },
    /// Bubblewrap lacks an option that we rely on.
    #[error("bubblewrap here ({found}) is too old: it has no `{option}`; install 0.8.0 or newer")]
    TooOld {
        /// Its version.
        found: String,
        /// The option that it lacks.
        option: &'static str,
    },
    /// Bubblewrap is there but a trial run failed.
    #[error("bubblewrap does not work here: {detail}. {advice}")]
    DoesNotWork {
        /// What it said.
        detail: String,
        /// What usually helps.
        advice: &'static str,
    },
}

/// Why somebody runs a command without confinement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unconfined {
    /// What runs is the tape that ships with the program, so its commands are known beforehand.
    ShippedTape,
}

/// A way to run commands.
#[derive(Debug, Clone)]
pub struct Sandbox {
    pub(crate) kind: Kind,
}

#[derive(Debug, Clone)]
pub(crate) enum Kind {
    Bubblewrap(bubblewrap::Programs),
    Direct(direct::Programs),
    Missing(Unavailable),
}

impl Sandbox {
    /// Looks for bubblewrap and tries it once, with everything that jobs use. Takes some ten
    /// milliseconds and blocks; keep the result.
    pub fn detect() -> Result<Self, Unavailable> {
        if !cfg!(target_os = "linux") {
            return Err(Unavailable::NotLinux);
        }
        let bwrap = find("bwrap").ok_or(Unavailable::MissingProgram {
            program: "bwrap",
            package: "bubblewrap",
        })?;
        let prlimit = find("prlimit").ok_or(Unavailable::MissingProgram {
            program: "prlimit",
            package: "util-linux",
        })?;
        let help = bounded_output(Command::new(&bwrap).arg("--help"));
        for option in ["--size", "--perms", "--disable-userns", "--json-status-fd"] {
            if !help.contains(option) {
                let found = bounded_output(Command::new(&bwrap).arg("--version"));
                return Err(Unavailable::TooOld {
                    found: found.trim().to_owned(),
                    option,
                });
            }
        }
        let programs = bubblewrap::Programs::new(bwrap, prlimit);
        programs
            .trial()
            .map_err(|detail| Unavailable::DoesNotWork {
                advice: advice(&detail),
                detail,
            })?;
        Ok(Self {
            kind: Kind::Bubblewrap(programs),
        })
    }

    /// Runs commands as they are, with this user's rights: limits of time, memory and processes
    /// are still watched, nothing is hidden. Guest paths at the start of an argument, a variable
    /// or the working directory become the host paths of their mounts.
    pub fn unconfined(reason: Unconfined) -> Self {
        Self {
            kind: Kind::Direct(direct::Programs::new(reason)),
        }
    }

    /// Runs nothing: every job is refused with this reason. For programs that are of use without it, too.
    pub fn missing(reason: Unavailable) -> Self {
        Self {
            kind: Kind::Missing(reason),
        }
    }

    /// Why no job can run, if none can.
    pub fn check(&self) -> Result<(), Unavailable> {
        match &self.kind {
            Kind::Missing(reason) => Err(reason.clone()),
            Kind::Bubblewrap(_) | Kind::Direct(_) => Ok(()),
        }
    }

    /// Whether commands are confined: all that run are, unless this was made by [`Sandbox::unconfined`].
    pub fn is_confined(&self) -> bool {
        !matches!(self.kind, Kind::Direct(_))
    }

    /// One sentence for people and logs.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Bubblewrap(programs) => programs.describe(),
            Kind::Direct(programs) => programs.describe(),
            Kind::Missing(reason) => format!("no commands run: {reason}"),
        }
    }

    /// Starts a job. Must be called within a tokio runtime; blocks for a few milliseconds.
    pub fn spawn(&self, job: &Job) -> Result<Running, Error> {
        job.check()?;
        let prepared = match &self.kind {
            Kind::Bubblewrap(programs) => programs.prepare(job)?,
            Kind::Direct(programs) => programs.prepare(job)?,
            Kind::Missing(reason) => return Err(reason.clone().into()),
        };
        Running::start(prepared, job)
    }

    /// Runs a job to its end and keeps the end of what it said.
    pub async fn run(&self, job: &Job) -> Result<Output, Error> {
        let mut running = self.spawn(job)?;
        let ended = running.wait().await?;
        Ok(Output {
            ended,
            tail: running.tail(),
        })
    }
}

/// Finds a program on `PATH`, and where administrators' programs live.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let standard = ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/sbin"];
    std::env::split_paths(&path)
        .chain(standard.iter().map(PathBuf::from))
        .filter(|directory| directory.is_absolute())
        .map(|directory| directory.join(program))
        .find(|candidate| is_executable(candidate))
}

fn is_executable(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    std::fs::metadata(path)
        .is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}

/// Standard output of a command that ends within ten seconds, whole, and of at most 64 KiB; none of any other one.
pub(crate) fn answer(command: &mut Command) -> Option<Vec<u8>> {
    use std::io::Read;
    let streams = command.stdin(Stdio::null()).stderr(Stdio::null());
    let mut child = streams.stdout(Stdio::piped()).spawn().ok()?;
    let reader = child.stdout.take();
    let (sender, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let read = reader.map(|reader| reader.take(64 * 1024).read_to_end(&mut text));
        let _ = sender.send(read.and_then(Result::ok).map(|_| text));
    });
    let text = said.recv_timeout(Duration::from_secs(10)).ok().flatten();
    if text.is_none() {
        let _ = child.kill();
    }
    let _ = child.wait();
    text
}

/// Standard output and error of a quick command; whatever it said within ten seconds.
pub(crate) fn bounded_output(command: &mut Command) -> String {
    use std::io::Read;
    let Ok((mut reader, writer)) = std::io::pipe() else {
        return String::new();
    };
    let Ok(errors) = writer.try_clone() else {
        return String::new();
    };
    let spawned = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn();
    // The command holds the pipe's writing end until it is spawned anew or dropped.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let Ok(mut child) = spawned else {
        return String::new();
    };
    let (sender, said) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut text = Vec::new();
        let _ = reader.by_ref().take(64 * 1024).read_to_end(&mut text);
        let _ = sender.send(text);
    });
    let text = said
        .recv_timeout(Duration::from_secs(10))
        .unwrap_or_default();
    let _ = child.kill();
    let _ = child.wait();
    String::from_utf8_lossy(&text).into_owned()
}

fn advice(detail: &str) -> &'static str {
    if detail.contains("setting up uid map") || detail.contains("loopback") {
        "An AppArmor rule forbids user namespaces: allow them for bwrap with a profile, or set `sysctl kernel.apparmor_restrict_unprivileged_userns=0`"
    } else if detail.contains("No space left") {
        "User namespaces are switched off: set `sysctl user.max_user_namespaces` above zero"
    } else {
        "Enable unprivileged user namespaces (`sysctl kernel.unprivileged_userns_clone=1` on some systems; inside Docker the container needs a seccomp profile that allows them)"
    }
}
