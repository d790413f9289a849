//! The one mirror that all tasks of a repository elsewhere share, and who may do what with it when.
//!
//! Whoever changes it (fetching, taking a branch over, making it anew) is alone; whoever reads it (cloning, pushing) only keeps those
//! out. Locks are the kernel's, so they hold between processes and end with their holder; every wait for one has a bound. A worker
//! never has the mirror's files: what it gets is copied, and what it is shown while its workspace is refreshed is read-only.

use crate::places;
use std::fs::{File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// How long others may keep a mirror: a little longer than one transfer may take.
const PATIENCE: Duration = Duration::from_mins(12);
/// How often it is looked whether they are done.
const LOOK: Duration = Duration::from_millis(50);

/// The mirror of one repository.
#[derive(Clone, Debug)]
pub(crate) struct Mirror {
    /// The bare repository.
    pub(crate) folder: PathBuf,
    lock: PathBuf,
}

/// The right to use a mirror, until this is dropped.
#[derive(Debug)]
pub(crate) struct Right(#[allow(dead_code)] File);

impl Mirror {
    pub(crate) fn of(mirrors: &Path, url: &url::Url) -> Self {
        let name = places::hashed_name(url.as_str());
        Self {
            folder: mirrors.join(format!("{name}.git")),
            lock: mirrors.join(format!("{name}.lock")),
        }
    }

    /// Whether it was made.
    pub(crate) fn exists(&self) -> bool {
        self.folder.join("HEAD").is_file()
    }

    /// To change it.
    pub(crate) async fn alone(&self) -> io::Result<Right> {
        self.wait(File::try_lock).await
    }

    /// To read it.
    pub(crate) async fn beside_others(&self) -> io::Result<Right> {
        self.wait(File::try_lock_shared).await
    }

    async fn wait(&self, lock: impl Fn(&File) -> Result<(), TryLockError>) -> io::Result<Right> {
        if let Some(folder) = self.lock.parent() {
            places::private_folder(folder)?;
        }
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(file) = try_lock_file(&self.lock, &lock)? {
                // Says when it was used last.
                file.set_modified(SystemTime::now())?;
                return Ok(Right(file));
            }
            if Instant::now() >= until {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!(
                        "other tasks have used the mirror {} for {} s",
                        self.folder.display(),
                        PATIENCE.as_secs()
                    ),
                ));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

/// Locks the file of this name, which is made if it is missing; none when somebody else has locked it. A file that was removed
/// by whoever had it locked is not taken for the one that is there now.
pub(crate) fn try_lock_file(
    path: &Path,
    lock: impl Fn(&File) -> Result<(), TryLockError>,
) -> io::Result<Option<File>> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)?;
    match lock(&file) {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(None),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let same = std::fs::symlink_metadata(path).and_then(|there| {
        Ok((there.dev(), there.ino()) == (file.metadata()?.dev(), file.metadata()?.ino()))
    });
    Ok(same.unwrap_or(false).then_some(file))
}
