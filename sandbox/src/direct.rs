//! A job as a plain command, without confinement: only for commands that are known beforehand.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::clean::PrivateDirectory;
use crate::descriptors::MemoryFile;
use crate::detect::{Unconfined, find};
use crate::job::{LAUNCHER, Mount};
use crate::running::Prepared;
use crate::{Error, Job, Stdin};

/// The programs that help where they are installed.
#[derive(Debug, Clone)]
pub(crate) struct Programs {
    reason: Unconfined,
    setpriv: Option<PathBuf>,
}

impl Programs {
    pub(crate) fn new(reason: Unconfined) -> Self {
        Self {
            reason,
            setpriv: find("setpriv"),
        }
    }

    pub(crate) fn describe(&self) -> String {
        match self.reason {
            Unconfined::ShippedTape => "commands run WITHOUT confinement, which is allowed only because they come from the tape that ships with the program".to_owned(),
        }
    }

    pub(crate) fn prepare(&self, job: &Job) -> Result<Prepared, Error> {
        let private = PrivateDirectory::new()?;
        let mut mounts = job.mounts.clone();
        if let Some(launcher) = &job.launcher {
            mounts.push(Mount {
                host: launcher.program.clone(),
                guest: LAUNCHER.into(),
                writable: false,
            });
        }
        // The command dies with the launcher, and the launcher with us. What the command starts in
        // turn is killed when we stop it, but outlives a kill of ours.
        let dies: Vec<OsString> = match &self.setpriv {
            Some(setpriv) if job.die_with_parent => {
                let flags = ["--pdeathsig", "KILL", "--"].map(OsString::from);
                [vec![setpriv.clone().into_os_string()], flags.to_vec()].concat()
            }
            _ => Vec::new(),
        };
        let inner = if job.launcher.is_some() {
            &dies[..]
        } else {
            &[]
        };
        let words = job.launch_args(&[], inner, |guest| place(guest.as_os_str(), &mounts).into());
        let mut words = dies
            .iter()
            .cloned()
            .chain(words.into_iter().map(|word| place(&word, &mounts)));
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).env_clear();
        command.env("PATH", std::env::var_os("PATH").unwrap_or_default());
        command.env("LANG", "C.UTF-8").env("USER", "artel");
        command.env("HOME", private.path());
        command.env("TMPDIR", private.path());
        for (name, value) in &job.env {
            command.env(name, place(OsStr::new(value), &mounts));
        }
        match &job.cwd {
            Some(cwd) => command.current_dir(place(cwd.as_os_str(), &mounts)),
            None => command.current_dir(private.path()),
        };
        let stdin = match &job.stdin {
            Stdin::Null => Stdio::null(),
            Stdin::Bytes(bytes) => Stdio::from(MemoryFile::new(bytes)?.into_file()),
        };
        command.stdin(stdin).process_group(0);
        Ok(Prepared {
            command,
            status: None,
            files: Vec::new(),
            private: Some(private),
            group: None,
        })
    }
}

/// A guest path, alone or with something behind it, becomes its host path; the innermost mount
/// wins. Everything else stays.
fn place(word: &OsStr, mounts: &[Mount]) -> OsString {
    let bytes = word.as_bytes();
    let best = mounts
        .iter()
        .filter(|mount| {
            let guest = mount.guest.as_os_str().as_bytes();
            bytes
                .strip_prefix(guest)
                .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
        })
        .max_by_key(|mount| mount.guest.as_os_str().len());
    let Some(mount) = best else {
        return word.to_owned();
    };
    let rest = &bytes[mount.guest.as_os_str().len()..];
    let mut placed = absolute(&mount.host).into_os_string().into_vec();
    placed.extend(rest);
    OsString::from_vec(placed)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_paths_become_host_paths_and_nothing_else_changes() {
        let mount = |host: &str, guest: &str| Mount {
            host: host.into(),
            guest: guest.into(),
            writable: true,
        };
        let mounts = [mount("/srv/a", "/app"), mount("/srv/d", "/app/data")];
        let placed = |word: &str| {
            place(OsStr::new(word), &mounts)
                .into_string()
                .expect("text")
        };
        assert_eq!(placed("/app"), "/srv/a");
        assert_eq!(placed("/app/main.py"), "/srv/a/main.py");
        assert_eq!(placed("/app/data/x"), "/srv/d/x");
        assert_eq!(placed("/apple"), "/apple");
        assert_eq!(placed("--dir=/app"), "--dir=/app");
    }
}
