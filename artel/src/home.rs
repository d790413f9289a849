//! The data folder, and who does what on it at the moment.
//!
//! Alone, one process at a time does the work on a data folder: it holds the lock `locks/work`. A command that finds nobody
//! doing it does its own work; otherwise it leaves it to whoever does and follows. On servers (PostgreSQL and Redis) any number
//! of processes share the lock, and leases in the database say who does what; see [`neighbours`]. The kernel lets go of a lock
//! when its process ends, however it ends, so that the next one can go on at once.

pub mod neighbours;

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
    #[error(
        "the data folder {path} cannot be used: {source}; set ARTEL_HOME to a folder that you can write to"
    )]
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
        /// Its format, as it is written there.
        found: String,
        /// This program's version.
        version: &'static str,
    },
}

/// The right to do the work, held until it is dropped or the process ends.
#[derive(Debug)]
pub struct Held {
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
        let mode = std::fs::metadata(&path)
            .map_err(unusable(&path))?
            .permissions()
            .mode();
        if mode & 0o007 != 0 {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode & 0o770))
                .map_err(unusable(&path))?;
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
            let found = text.trim();
            if !found.parse().is_ok_and(|found: u32| found <= FORMAT) {
                return Err(Error::Newer {
                    path,
                    found: found.chars().take(40).collect(),
                    version: env!("CARGO_PKG_VERSION"),
                });
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

    /// What the folder is known by, wherever it is moved to; made when it is asked for first.
    pub fn id(&self) -> Result<String, Error> {
        let file = self.path.join("id");
        let unusable = |source| Error::Unusable {
            path: file.clone(),
            source,
        };
        if !file.exists() {
            // Written aside and linked, so that of two processes one is first and nobody reads half of it.
            let fresh = self.path.join(format!("id.{}", uuid::Uuid::new_v4()));
            std::fs::write(&fresh, format!("{}\n", uuid::Uuid::new_v4())).map_err(unusable)?;
            let linked = std::fs::hard_link(&fresh, &file);
            std::fs::remove_file(&fresh).map_err(unusable)?;
            match linked {
                Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                    return Err(unusable(error));
                }
                _ => {}
            }
        }
        Ok(std::fs::read_to_string(&file)
            .map_err(unusable)?
            .trim()
            .to_owned())
    }

    /// Takes the work on if nobody does it, alone or with others.
    pub fn take_work(&self) -> Result<Option<Held>, Error> {
        self.lock_work(FlockOperation::NonBlockingLockExclusive)
    }

    /// Takes part in the work, unless somebody does it alone. Who does what is decided by leases in the database.
    pub fn join_work(&self) -> Result<Option<Held>, Error> {
        self.lock_work(FlockOperation::NonBlockingLockShared)
    }

    fn lock_work(&self, operation: FlockOperation) -> Result<Option<Held>, Error> {
        let file = self.path.join("locks/work");
        let unusable = |source| Error::Unusable {
            path: file.clone(),
            source,
        };
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&file)
            .map_err(unusable)?;
        match flock(&lock, operation) {
            Ok(()) => Ok(Some(Held { _lock: lock })),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(unusable(errno.into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_keeps_its_id() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        let id = home.id().unwrap();
        assert_eq!(id.len(), 36);
        assert_eq!(Home::open(folder.path()).unwrap().id().unwrap(), id);
        assert_eq!(
            std::fs::read_dir(folder.path()).unwrap().count(),
            3,
            "locks, format, id"
        );
    }

    #[test]
    fn one_process_does_the_work_and_the_next_can_go_on() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        let held = home.take_work().unwrap();
        assert!(held.is_some());
        assert!(home.take_work().unwrap().is_none());
        drop(held);
        assert!(home.take_work().unwrap().is_some());
    }

    #[test]
    fn many_share_the_work_and_nobody_does_it_alone_beside_them() {
        let folder = tempfile::tempdir().unwrap();
        let home = Home::open(folder.path()).unwrap();
        let first = home.join_work().unwrap();
        let second = home.join_work().unwrap();
        assert!(first.is_some() && second.is_some());
        drop(first);
        assert!(home.take_work().unwrap().is_none());
        drop(second);
        let alone = home.take_work().unwrap();
        assert!(alone.is_some());
        assert!(home.join_work().unwrap().is_none());
    }

    #[test]
    fn a_newer_data_folder_is_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("format"), "7\n").unwrap();
        let error = Home::open(folder.path()).unwrap_err().to_string();
        assert!(
            error.contains("format 7") && error.contains("ARTEL_HOME"),
            "{error}"
        );
        assert_eq!(
            std::fs::read_to_string(folder.path().join("format")).unwrap(),
            "7\n"
        );
    }
}
