//! Where a project's things are, and the lock that makes one change at a time.

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ports::{Failure, ProjectId, Result, Sha};
use rustix::fs::{FlockOperation, flock};

use crate::failures;

/// How long a change waits for another one to finish.
const PATIENCE: Duration = Duration::from_mins(5);

/// A project's folder.
#[derive(Debug, Clone)]
pub(crate) struct Layout(PathBuf);

/// Held while a project is changed; the lock lasts as long as any copy.
#[derive(Clone)]
pub(crate) struct Lock {
    _file: Arc<File>,
}

impl Layout {
    /// The folder under `home`; a project's id is part of a path and is checked for it.
    pub(crate) fn new(home: &Path, project: &ProjectId) -> Result<Self> {
        let name = project.as_str();
        let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        if name.is_empty() || name.len() > 80 || !name.chars().all(plain) {
            return Err(Failure::new(
                "bad_project",
                format!("{name:?} cannot be the name of a project's folder"),
            ));
        }
        Ok(Self(Self::all(home).join(name)))
    }

    /// The folder of all projects.
    pub(crate) fn all(home: &Path) -> PathBuf {
        home.join("deploy")
    }

    /// Whose it is.
    pub(crate) fn project(&self) -> ProjectId {
        let name = self.0.file_name().unwrap_or_default();
        ProjectId::new(name.to_string_lossy())
    }

    pub(crate) fn root(&self) -> &Path {
        &self.0
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.0.join("state.json")
    }

    pub(crate) fn supervisor(&self) -> PathBuf {
        self.0.join("supervisor.json")
    }

    pub(crate) fn supervisor_lock(&self) -> PathBuf {
        self.0.join("supervisor.lock")
    }

    pub(crate) fn control(&self) -> PathBuf {
        self.0.join("control.sock")
    }

    pub(crate) fn releases(&self) -> PathBuf {
        self.0.join("releases")
    }

    pub(crate) fn tree(&self, release: u64, sha: &Sha) -> PathBuf {
        self.releases().join(format!("{release}-{sha}"))
    }

    /// The folder of a running release's socket.
    pub(crate) fn run(&self, release: u64) -> PathBuf {
        self.0.join("run").join(release.to_string())
    }

    pub(crate) fn door(&self, release: u64) -> PathBuf {
        self.run(release).join(DOOR)
    }

    pub(crate) fn data(&self) -> PathBuf {
        self.0.join("data")
    }

    pub(crate) fn log(&self) -> PathBuf {
        self.0.join("logs").join("service.log")
    }

    pub(crate) fn supervisor_log(&self) -> PathBuf {
        self.0.join("logs").join("supervisor.log")
    }

    /// Makes the folders that are not there yet; only we may enter them.
    pub(crate) fn create(&self) -> Result<()> {
        for part in ["releases", "run", "data", "logs"] {
            let path = self.0.join(part);
            private_directory(&path)
                .map_err(|error| failures::file("making a folder", &path, &error))?;
        }
        Ok(())
    }

    /// Waits, within a bound, until nobody else changes the project.
    pub(crate) async fn lock(&self) -> Result<Lock> {
        let path = self.0.join("lock");
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(|error| failures::file("opening the lock", &path, &error))?;
        let until = tokio::time::Instant::now() + PATIENCE;
        while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
            if tokio::time::Instant::now() > until {
                return Err(Failure::new(
                    "deploy_busy",
                    "another change of this project's service is still under way; try again later",
                )
                .retryable());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(Lock {
            _file: Arc::new(file),
        })
    }
}

/// The name of a release's socket.
pub(crate) const DOOR: &str = "in.sock";

pub(crate) fn private_directory(path: &Path) -> io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
}

/// Removes a folder; that there is none is fine.
pub(crate) fn remove_directory(path: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Replaces a file so that a crash leaves the old or the new content, never a part of it.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    use std::io::Write;
    let directory = path.parent().unwrap_or(Path::new("."));
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.new", std::process::id()));
    let fresh = directory.join(name);
    let written = File::create(&fresh).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    if let Err(error) = written.and_then(|()| std::fs::rename(&fresh, path)) {
        let _ = std::fs::remove_file(&fresh);
        return Err(error);
    }
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_project_is_never_a_way_out_of_its_folder() {
        for bad in ["", "..", "a/b", "../x", "a\0b", "."] {
            assert!(
                Layout::new(Path::new("/h"), &ProjectId::from(bad)).is_err(),
                "{bad:?}"
            );
        }
        let layout = Layout::new(Path::new("/h"), &ProjectId::from("pabc")).expect("good");
        assert_eq!(layout.root(), Path::new("/h/deploy/pabc"));
    }

    #[test]
    fn a_file_is_replaced_whole() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("state.json");
        replace(&path, b"one").expect("written");
        replace(&path, b"two").expect("replaced");
        assert_eq!(std::fs::read(&path).expect("read"), b"two");
        assert_eq!(
            std::fs::read_dir(directory.path()).expect("listed").count(),
            1
        );
    }
}
