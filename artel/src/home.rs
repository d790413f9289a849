//! The data folder, and who does what on it at the moment.
//!
//! Each part of the program that must be there once (bot, scheduler, spawner) holds a lock of its own while it runs;
//! runners hold one together. A command takes the parts that nobody runs, and otherwise leaves the work to whoever does.
//! The kernel lets go of a lock when its process ends, however it ends.

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The format of the data folder that this program writes and reads.
pub const FORMAT: u32 = 1;

/// What is wrong with the data folder.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be created or written.
    #[error("the data folder {path} cannot be used: {source}; set ARTEL_HOME to a folder that you can write to")]
    Unusable {
        /// The folder or a file in it.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A newer program wrote it.
    #[error(
        "the data folder {path} has format {found}, and this artel {version} reads up to {FORMAT}: use the newer artel that wrote it, \
         or set ARTEL_HOME to another folder"
    )]
    Newer {
        /// The folder.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// This program's version.
        version: &'static str,
    },
}

/// A part of the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Part {
    /// Executes runs.
    Runner,
    /// Projections, errands, results, deploys.
    Scheduler,
    /// Coding workers.
    Spawner,
    /// Telegram.
    Bot,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Runner, Self::Scheduler, Self::Spawner, Self::Bot];

    fn name(self) -> &'static str {
        match self {
            Self::Runner => "runner",
            Self::Scheduler => "scheduler",
            Self::Spawner => "spawner",
            Self::Bot => "bot",
        }
    }
}

/// The right to run a part, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Held {
    /// Which part.
    pub part: Part,
    _lock: File,
}

/// The data folder.
#[derive(Clone, Debug)]
pub struct Home {
    path: PathBuf,
}

impl Home {
    /// Opens the data folder, creating what is missing, for this user alone.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let unusable = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Unusable { path, source }
        };
        let locks = path.join("locks");
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&locks)
            .map_err(unusable(path))?;
        let path = path.canonicalize().map_err(unusable(path))?;
        let mode = std::fs::metadata(&path).map_err(unusable(&path))?.permissions().mode();
        if mode & 0o007 != 0 {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode & 0o770)).map_err(unusable(&path))?;
        }

        let file = path.join("format");
        let mut format = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&file)
            .map_err(unusable(&file))?;
        let mut text = String::new();
        format.read_to_string(&mut text).map_err(unusable(&file))?;
        if text.trim().is_empty() {
            format.rewind().map_err(unusable(&file))?;
            writeln!(format, "{FORMAT}").map_err(unusable(&file))?;
        } else {
            let found = text.trim().parse().unwrap_or(u32::MAX);
            if found > FORMAT {
                return Err(Error::Newer { path, found, version: env!("CARGO_PKG_VERSION") });
            }
        }
        Ok(Self { path })
    }

    /// Its absolute path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path inside of it.
    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Takes a part if nobody runs it. Runners share theirs: `exclusive` asks for it only if there is no other.
    pub fn take(&self, part: Part, exclusive: bool) -> Result<Option<Held>, Error> {
        let file = self.path.join("locks").join(part.name());
        let unusable = |source| Error::Unusable { path: file.clone(), source };
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&file)
            .map_err(unusable)?;
        let alone = flock(&lock, FlockOperation::NonBlockingLockExclusive);
        match (part, exclusive, alone) {
            (Part::Runner, _, Ok(())) | (Part::Runner, false, Err(rustix::io::Errno::WOULDBLOCK)) => {
                // From here on others may run beside it.
                flock(&lock, FlockOperation::NonBlockingLockShared)
                    .map_err(|errno| unusable(errno.into()))?;
                Ok(Some(Held { part, _lock: lock }))
            }
            (_, _, Ok(())) => Ok(Some(Held { part, _lock: lock })),
            (_, _, Err(rustix::io::Errno::WOULDBLOCK)) => Ok(None),
            (_, _, Err(errno)) => Err(unusable(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_run_once_and_runners_side_by_side() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        let bot = home.take(Part::Bot, true).unwrap();
        assert!(bot.is_some());
        assert!(home.take(Part::Bot, true).unwrap().is_none());
        drop(bot);
        assert!(home.take(Part::Bot, true).unwrap().is_some());

        let runner = home.take(Part::Runner, true).unwrap().unwrap();
        assert!(home.take(Part::Runner, true).unwrap().is_none(), "a command leaves the work to it");
        let second = home.take(Part::Runner, false).unwrap();
        assert!(second.is_some(), "another runner may join");
        drop((runner, second));
        assert!(home.take(Part::Runner, true).unwrap().is_some());
    }

    #[test]
    fn a_newer_data_folder_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("format"), "7\n").unwrap();
        let error = Home::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("format 7") && error.contains("ARTEL_HOME"), "{error}");
        assert_eq!(std::fs::read_to_string(folder.path().join("format")).unwrap(), "7\n");
    }
}
