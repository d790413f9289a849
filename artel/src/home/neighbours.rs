//! Processes that share a data folder: each has a name of its own, and a file `locks/processes/{name}` that it keeps locked
//! while it lives. The kernel lets go of the lock when the process ends, so a file that can be locked is that of a dead one,
//! whose leases need not be waited for. Processes on machines that do not share the folder do not see one another here; there,
//! leases run out.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

use rustix::fs::{FlockOperation, flock};

use super::{Error, Home};

/// What a process does, as its name begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Everything.
    Up,
    /// Runs.
    Runner,
    /// What one process does for all.
    Scheduler,
    /// Telegram.
    Bot,
    /// Workers.
    Spawner,
    /// One command, which does the work as long as it lasts.
    Command,
}

impl Part {
    /// As it is typed, where it is a command.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Runner => "runner",
            Self::Scheduler => "scheduler",
            Self::Bot => "bot",
            Self::Spawner => "spawner",
            Self::Command => "command",
        }
    }
}

/// A name that no other process has: what it does, the host, and chance.
pub fn own_name(part: Part) -> String {
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let host: String = host
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || *c == '-')
        .take(40)
        .collect();
    let host = if host.is_empty() { "host" } else { &host };
    let chance = &uuid::Uuid::new_v4().simple().to_string()[..8];
    format!("{}-{host}-{}-{chance}", part.as_str(), std::process::id())
}

/// A process that lives here; its file goes when this is dropped.
#[derive(Debug)]
pub struct Present {
    file: PathBuf,
    _lock: File,
}

impl Drop for Present {
    fn drop(&mut self) {
        // Whoever finds it unlocked removes it as well.
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A process that died without putting its things away. Its file is locked as long as this is held, so that one neighbour
/// at a time cleans up behind it.
#[derive(Debug)]
pub struct Gone {
    /// Its name.
    pub name: String,
    file: PathBuf,
    _lock: File,
}

impl Gone {
    /// Nothing of it is left.
    pub fn forget(self) {
        let _ = std::fs::remove_file(&self.file);
    }
}

impl Home {
    fn processes(&self) -> Result<PathBuf, Error> {
        let folder = self.join("locks/processes");
        std::fs::create_dir_all(&folder).map_err(|source| Error::Unusable {
            path: folder.clone(),
            source,
        })?;
        Ok(folder)
    }

    /// Shows the others that a process of this name lives, until what this gives is dropped or the process ends.
    pub fn appear(&self, name: &str) -> Result<Present, Error> {
        let folder = self.processes()?;
        let (aside, file) = (folder.join(format!(".{name}")), folder.join(name));
        let unusable = |source| Error::Unusable {
            path: file.clone(),
            source,
        };
        let mut lock = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)
            .map_err(unusable)?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|errno| unusable(errno.into()))?;
        writeln!(lock, "{}", std::process::id()).map_err(unusable)?;
        // Nobody ever sees it unlocked.
        std::fs::rename(&aside, &file).map_err(unusable)?;
        Ok(Present { file, _lock: lock })
    }

    /// The names of all files, each with its lock where nobody holds it.
    fn look_around(&self) -> Result<Vec<(String, PathBuf, Option<File>)>, Error> {
        let folder = self.processes()?;
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Some(name) = entry.file_name().to_str().map(str::to_owned) else {
                continue;
            };
            // It was there a moment ago; a process that ends in order takes its file away.
            let Ok(file) = File::open(entry.path()) else {
                continue;
            };
            if name.starts_with('.') {
                continue;
            }
            let free = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            found.push((name, entry.path(), free.then_some(file)));
        }
        found.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    /// Processes that died on this folder.
    pub fn gone(&self) -> Result<Vec<Gone>, Error> {
        let gone = self.look_around()?.into_iter();
        Ok(gone
            .filter_map(|(name, file, lock)| {
                Some(Gone {
                    name,
                    file,
                    _lock: lock?,
                })
            })
            .collect())
    }

    /// The names of processes that live on this folder and do one of these parts.
    pub fn present(&self, parts: &[Part]) -> Result<Vec<String>, Error> {
        let found = self.look_around()?.into_iter();
        Ok(found
            .filter(|(name, _, lock)| {
                let fits = |part: &Part| {
                    name.strip_prefix(part.as_str())
                        .is_some_and(|rest| rest.starts_with('-'))
                };
                lock.is_none() && parts.iter().any(fits)
            })
            .map(|(name, ..)| name)
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_never_the_same_and_say_what_a_process_does() {
        let (one, two) = (own_name(Part::Runner), own_name(Part::Runner));
        assert_ne!(one, two);
        assert!(one.starts_with("runner-") && !one.contains('/'), "{one}");
    }

    #[test]
    fn who_lives_is_present_and_who_died_is_found_once() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        let runner = home.appear("runner-here-1-a").unwrap();
        let bot = home.appear("bot-here-2-b").unwrap();
        assert_eq!(
            home.present(&[Part::Runner, Part::Up]).unwrap(),
            ["runner-here-1-a"]
        );
        assert!(home.gone().unwrap().is_empty());

        // A process that ends in order leaves nothing behind; one that is killed leaves its file.
        drop(bot);
        let file = home.join("locks/processes/runner-here-1-a");
        let left = std::fs::read(&file).unwrap();
        drop(runner);
        std::fs::write(&file, left).unwrap();
        assert!(home.present(&[Part::Runner, Part::Bot]).unwrap().is_empty());
        let mut gone = home.gone().unwrap();
        assert_eq!(gone.len(), 1);
        assert_eq!(gone[0].name, "runner-here-1-a");
        assert!(home.gone().unwrap().is_empty(), "one neighbour cleans up");
        gone.remove(0).forget();
        assert!(home.gone().unwrap().is_empty());
    }
}
