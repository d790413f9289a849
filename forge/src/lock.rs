//! One change at a time to a repository, whichever process makes it.

use std::fs::{File, OpenOptions, TryLockError};
use std::path::Path;
use std::time::{Duration, Instant};

use ports::ProjectId;

use crate::Error;

/// How long to wait for others.
const WAIT_S: u64 = 120;
/// How long between two tries.
const AGAIN: Duration = Duration::from_millis(5);

/// A locked file; the system releases it when this or its process ends.
pub(crate) struct Lock(#[expect(dead_code, reason = "held for its drop")] File);

impl Lock {
    /// Waits for the lock file at `path`.
    pub(crate) async fn take(path: &Path, project: &ProjectId) -> Result<Self, Error> {
        Self::take_within(path, project, WAIT_S).await
    }

    pub(crate) async fn take_within(
        path: &Path,
        project: &ProjectId,
        seconds: u64,
    ) -> Result<Self, Error> {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder).map_err(Error::io("making", folder))?;
        }
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .map_err(Error::io("opening", path))?;
        let deadline = Instant::now() + Duration::from_secs(seconds);
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self(file)),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    tokio::time::sleep(AGAIN).await;
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(Error::Busy {
                        project: project.clone(),
                        seconds,
                    });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(Error::io("locking", path)(source));
                }
            }
        }
    }
}
