//! The files under the in-process transport: whole or absent, never half.

use crate::{DecodeError, TransportError};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::fs::{File, TryLockError};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};
use tokio::time::Instant;

/// How long somebody else may take to let go of the folder.
const LETTING_GO: Duration = Duration::from_secs(3);
/// How often it is tried meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// The sub-folders.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    Jobs,
    Results,
    Ended,
    Cancelled,
    Dead,
}

impl Kind {
    const ALL: [Self; 5] = [
        Self::Jobs,
        Self::Results,
        Self::Ended,
        Self::Cancelled,
        Self::Dead,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Jobs => "jobs",
            Self::Results => "results",
            Self::Ended => "ended",
            Self::Cancelled => "cancelled",
            Self::Dead => "dead",
        }
    }
}

/// A message in a file: its place in the queue, and the message as it was sent.
#[derive(Deserialize)]
pub(super) struct Stored {
    pub(super) order: u64,
    #[serde(default)]
    pub(super) deliveries: u32,
    message: Box<RawValue>,
}

impl Stored {
    pub(super) fn parse(text: &str) -> Result<Self, DecodeError> {
        serde_json::from_str(text).map_err(DecodeError::Json)
    }

    pub(super) fn body(&self) -> &[u8] {
        self.message.get().as_bytes()
    }
}

pub(super) fn stored(order: u64, deliveries: u32, message: &str) -> String {
    format!("{{\"order\":{order},\"deliveries\":{deliveries},\"message\":{message}}}")
}

#[derive(Serialize, Deserialize)]
struct DeadLetter {
    reason: String,
    body: String,
}

pub(super) fn dead_letter(reason: &str, body: &str) -> String {
    serde_json::json!(DeadLetter {
        reason: reason.to_owned(),
        body: body.to_owned(),
    })
    .to_string()
}

/// Reason and body; a letter that cannot be read is its own body.
pub(super) fn open_dead_letter(text: String) -> (String, String) {
    match serde_json::from_str::<DeadLetter>(&text) {
        Ok(letter) => (letter.reason, letter.body),
        Err(error) => (format!("the letter itself cannot be read: {error}"), text),
    }
}

/// The folder of one transport, locked for this process.
pub(super) struct Folder {
    root: Arc<PathBuf>,
    _lock: File,
}

impl Folder {
    pub(super) async fn open(root: PathBuf) -> Result<Self, TransportError> {
        let root = Arc::new(root);
        let place = Arc::clone(&root);
        let file = blocking("open", &root, move || {
            std::fs::create_dir_all(&*place)?;
            File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(place.join("lock"))
        })
        .await?;
        let lock = Self::locked(&root, file).await?;
        let place = Arc::clone(&root);
        blocking("open", &root, move || {
            for kind in Kind::ALL {
                let folder = place.join(kind.name());
                std::fs::create_dir_all(&folder)?;
                for entry in std::fs::read_dir(&folder)? {
                    let path = entry?.path();
                    if path.extension().is_some_and(|e| e == "tmp") {
                        std::fs::remove_file(path)?;
                    }
                }
            }
            Ok(())
        })
        .await?;
        Ok(Self { root, _lock: lock })
    }

    /// Whoever had it may be about to end: it lets go of one thing after the other, and a program that it is just starting has
    /// all of them for a moment.
    async fn locked(root: &Path, file: File) -> Result<File, TransportError> {
        let deadline = Instant::now() + LETTING_GO;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(TryLockError::WouldBlock) => {
                    return Err(TransportError::InUse {
                        place: root.display().to_string(),
                    });
                }
                Err(TryLockError::Error(source)) => {
                    return Err(TransportError::Io {
                        action: "lock",
                        place: root.display().to_string(),
                        source,
                    });
                }
            }
        }
    }

    fn path(&self, kind: Kind, id: &str) -> PathBuf {
        self.root.join(kind.name()).join(format!("{id}.json"))
    }

    /// Writes the whole file, durably, or nothing.
    pub(super) async fn write(
        &self,
        kind: Kind,
        id: &str,
        text: String,
    ) -> Result<(), TransportError> {
        let path = self.path(kind, id);
        let target = path.clone();
        blocking("write", &path, move || {
            let aside = target.with_extension("tmp");
            let mut file = File::create(&aside)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            std::fs::rename(&aside, &target)?;
            sync_parent(&target)
        })
        .await
    }

    /// Removes the file; one that is gone already is fine.
    pub(super) async fn remove(&self, kind: Kind, id: &str) -> Result<(), TransportError> {
        let path = self.path(kind, id);
        let target = path.clone();
        blocking("remove", &path, move || {
            match std::fs::remove_file(&target) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            sync_parent(&target)
        })
        .await
    }

    /// Moves a file from one kind to another.
    pub(super) async fn rename(
        &self,
        from: Kind,
        to: Kind,
        id: &str,
    ) -> Result<(), TransportError> {
        let path = self.path(from, id);
        let (source, target) = (path.clone(), self.path(to, id));
        blocking("move", &path, move || {
            std::fs::rename(&source, &target)?;
            // What is kept for a while is kept from now on.
            File::options()
                .write(true)
                .open(&target)?
                .set_modified(SystemTime::now())?;
            sync_parent(&target)?;
            sync_parent(&source)
        })
        .await
    }

    pub(super) async fn exists(&self, kind: Kind, id: &str) -> Result<bool, TransportError> {
        let path = self.path(kind, id);
        tokio::fs::try_exists(&path)
            .await
            .map_err(|source| TransportError::Io {
                action: "look for",
                place: path.display().to_string(),
                source,
            })
    }

    pub(super) async fn read(
        &self,
        kind: Kind,
        id: &str,
    ) -> Result<Option<String>, TransportError> {
        let path = self.path(kind, id);
        match tokio::fs::read_to_string(&path).await {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(TransportError::Io {
                action: "read",
                place: path.display().to_string(),
                source,
            }),
        }
    }

    /// Id and text of every file of a kind. Text that is not UTF-8 is made so, to fail decoding.
    pub(super) async fn read_all(
        &self,
        kind: Kind,
    ) -> Result<Vec<(String, String)>, TransportError> {
        self.read_oldest(kind, usize::MAX).await
    }

    /// As [`Folder::read_all`], by time of writing, at most `limit`.
    pub(super) async fn read_oldest(
        &self,
        kind: Kind,
        limit: usize,
    ) -> Result<Vec<(String, String)>, TransportError> {
        let folder = self.root.join(kind.name());
        let place = folder.clone();
        blocking("read", &folder, move || {
            let mut found = Vec::new();
            for entry in std::fs::read_dir(&place)? {
                let entry = entry?;
                let path = entry.path();
                let id = path.file_stem().and_then(|stem| stem.to_str());
                if path.extension().is_some_and(|e| e == "json")
                    && let Some(id) = id
                {
                    found.push((entry.metadata()?.modified()?, id.to_owned(), path));
                }
            }
            found.sort();
            found
                .into_iter()
                .take(limit)
                .map(|(_, id, path)| {
                    let bytes = std::fs::read(path)?;
                    Ok((id, String::from_utf8_lossy(&bytes).into_owned()))
                })
                .collect()
        })
        .await
    }

    /// Removes what was written longer ago than `keep`.
    pub(super) async fn prune(&self, kind: Kind, keep: Duration) -> Result<(), TransportError> {
        let folder = self.root.join(kind.name());
        let place = folder.clone();
        blocking("tidy", &folder, move || {
            let now = SystemTime::now();
            for entry in std::fs::read_dir(&place)? {
                let entry = entry?;
                let age = now.duration_since(entry.metadata()?.modified()?);
                if age.is_ok_and(|age| age > keep) {
                    std::fs::remove_file(entry.path())?;
                }
            }
            Ok(())
        })
        .await
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

async fn blocking<T: Send + 'static>(
    action: &'static str,
    place: &Path,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, TransportError> {
    let failed = |source| TransportError::Io {
        action,
        place: place.display().to_string(),
        source,
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome.map_err(failed),
        Err(panicked) => Err(failed(io::Error::other(panicked))),
    }
}
