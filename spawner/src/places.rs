//! Where things are under `ARTEL_HOME`, and file operations that do not follow a worker's links.
//!
//! ```text
//! mirrors/{repository}.git, .lock        the mirror of a repository elsewhere; no worker sees it but read-only
//! workspaces/{project}/{job}/{task}/     what the worker sees as /workspace
//! workspaces/{project}/{job}/{task}~/    what the spawner keeps about it; no worker sees it. The workspace is in there when it is a disk
//!                                        of its own; see `disk`
//! ```

use crate::disk::Image;
pub(crate) use crate::remove::{let_us_in, remove_any};
use crate::runtime::{Identity, Limits};
use crate::seat::Sitting;
use protocol::SpawnRequest;
use sha2::{Digest as _, Sha256};
use std::fs::{File, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The folders of one task.
#[derive(Clone, Debug)]
pub(crate) struct Places {
    /// The workspace.
    pub(crate) workspace: PathBuf,
    /// The spawner's own notes about it.
    pub(crate) state: PathBuf,
    /// The mirrors of repositories elsewhere.
    pub(crate) mirrors: PathBuf,
    /// The disk that the workspace is on, when it is one of its own.
    pub(crate) disk: Option<Image>,
    /// The right to work there, once we have it.
    pub(crate) seat: Option<Arc<Sitting>>,
}

impl Places {
    pub(crate) fn of(home: &Path, request: &SpawnRequest) -> Self {
        Self::of_task(home, &Identity::of(request))
    }

    pub(crate) fn of_task(home: &Path, who: &Identity) -> Self {
        let job = project(home, &who.project).join(folder_name(&who.job));
        let task = folder_name(&who.task);
        Self {
            // No folder name has a tilde, so no task's workspace is another one's state.
            state: job.join(format!("{task}~")),
            workspace: job.join(task),
            mirrors: mirrors(home),
            disk: None,
            seat: None,
        }
    }

    /// Does something there that takes its time, where it may. What is begun goes on when nobody waits for it any more, as in an
    /// attempt that is stopped; whoever wants to work there comes after it.
    pub(crate) async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let seat = self.seat.clone();
        let work = move || {
            let done = work();
            drop(seat);
            done
        };
        let done = tokio::task::spawn_blocking(work).await;
        done.unwrap_or_else(|error| Err(io::Error::other(error)))
    }

    /// Removes a file or a folder there, which may be a worker's with as much in it as it liked.
    pub(crate) async fn remove(&self, path: PathBuf) -> io::Result<()> {
        self.blocking(move || remove_any(&path)).await
    }

    /// The same as they are to be used: a workspace that is there stays where it is; a new one is a disk of its own if
    /// workspaces are (`disks`). Whoever asks has the workspace's lock.
    pub(crate) fn settled(self, disks: bool) -> Self {
        let image = Image::of(&self.state);
        let is_folder = std::fs::symlink_metadata(&self.workspace).is_ok();
        if !image.exists() && (is_folder || !disks) {
            return self;
        }
        Self {
            workspace: image.workspace(),
            disk: Some(image),
            ..self
        }
    }

    /// A folder from which something can be renamed to the workspace.
    pub(crate) fn beside(&self) -> PathBuf {
        let disk = self.disk.as_ref();
        disk.map_or_else(|| self.state.clone(), Image::folder)
    }

    /// What a worker may use there. A disk that was made for a higher limit has to be looked at.
    pub(crate) fn limits(&self, limits: &protocol::Limits) -> Limits {
        let disk = self.disk.as_ref();
        Limits {
            disk_watched: disk.is_none_or(|disk| disk.size_mb() > limits.disk_mb),
            ..limits.into()
        }
    }
}

/// Everything that is kept for a project's workers.
pub(crate) fn project(home: &Path, project_id: &str) -> PathBuf {
    workspaces(home).join(folder_name(project_id))
}

/// All workspaces, by project.
pub(crate) fn workspaces(home: &Path) -> PathBuf {
    home.join("workspaces")
}

/// All mirrors.
pub(crate) fn mirrors(home: &Path) -> PathBuf {
    home.join("mirrors")
}

/// Anything as a name that nothing else has, with what is plain of it for people.
pub(crate) fn hashed_name(text: &str) -> String {
    let plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let kept: String = text.chars().filter(plain).take(40).collect();
    let hash = hex::encode(&Sha256::digest(text.as_bytes())[..8]);
    // Two equals signs cannot be in a plain name.
    format!("{kept}=={hash}")
}

/// An identifier as a folder's name: itself when it is plain, else what is plain of it and a hash.
fn folder_name(id: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if id.len() <= 80 && !id.starts_with('.') && !id.is_empty() && id.chars().all(plain) {
        return id.to_owned();
    }
    hashed_name(id)
}

/// Makes a folder that only we can enter.
pub(crate) fn private_folder(path: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path)?;
    std::fs::set_permissions(path, Permissions::from_mode(0o700))
}

/// Gives a folder with all that is in it to this user and group, where it is another one's. Links are not followed, and nothing
/// is done when we are not root. Nobody else may work in it meanwhile. Blocks.
pub(crate) fn hand_to(path: &Path, (user, group): (u32, u32)) -> io::Result<()> {
    if std::fs::metadata("/proc/self")?.uid() != 0 {
        return Ok(());
    }
    let give = |path: &Path| -> io::Result<bool> {
        let meta = std::fs::symlink_metadata(path)?;
        if (meta.uid(), meta.gid()) != (user, group) {
            std::os::unix::fs::lchown(path, Some(user), Some(group))?;
        }
        Ok(meta.is_dir())
    };
    give(path)?;
    let mut waiting = vec![path.to_owned()];
    while let Some(folder) = waiting.pop() {
        for entry in std::fs::read_dir(folder)? {
            let path = entry?.path();
            if give(&path)? {
                waiting.push(path);
            }
        }
    }
    Ok(())
}

/// Us, as user and group.
pub(crate) fn own_ids() -> io::Result<(u32, u32)> {
    let me = std::fs::metadata("/proc/self")?;
    Ok((me.uid(), me.gid()))
}

/// Makes sure that `parent/name` is a real folder, removing a link or a file of that name.
pub(crate) fn real_folder(parent: &Path, name: &str) -> io::Result<PathBuf> {
    let path = parent.join(name);
    match std::fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => return Ok(path),
        Ok(_) => std::fs::remove_file(&path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    std::fs::create_dir(&path)?;
    Ok(path)
}

/// Puts a file of this name and content there, whatever was in its place.
pub(crate) fn replace_file(folder: &Path, name: &str, content: &str) -> io::Result<()> {
    let path = folder.join(name);
    remove_any(&path)?;
    let mut file = File::options().write(true).create_new(true).open(&path)?;
    file.write_all(content.as_bytes())
}

/// Writes a file of ours whole or not at all.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let aside = path.with_extension("tmp");
    let mut file = File::create(&aside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(aside, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_identifier_leads_out_of_its_folder_or_into_anothers() {
        assert_eq!(folder_name("job-1"), "job-1");
        let names = [
            "../x",
            "a/b",
            "..",
            ".",
            "",
            "a b",
            "a~",
            "é",
            &"a".repeat(200),
            "a/ b",
        ];
        let mut seen = std::collections::HashSet::new();
        for name in names {
            let folder = folder_name(name);
            assert!(
                !folder.contains('/') && !folder.starts_with('.'),
                "{folder}"
            );
            assert!(folder.len() < 100 && !folder.contains('~'), "{folder}");
            assert!(seen.insert(folder), "{name} collides");
        }
    }

    #[test]
    fn a_folder_is_handed_over_without_following_its_links() {
        if own_ids().unwrap().0 != 0 {
            // Only root may give something away; anybody else keeps it.
            let folder = tempfile::tempdir().unwrap();
            hand_to(folder.path(), (12_345, 12_345)).unwrap();
            let meta = std::fs::metadata(folder.path()).unwrap();
            assert_eq!(meta.uid(), own_ids().unwrap().0);
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let (inside, outside) = (folder.path().join("inside"), folder.path().join("outside"));
        std::fs::create_dir_all(inside.join("deep/er")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(inside.join("deep/er/file"), "").unwrap();
        std::os::unix::fs::symlink(&outside, inside.join("link")).unwrap();
        hand_to(&inside, (1000, 1001)).unwrap();
        for path in ["", "deep", "deep/er", "deep/er/file", "link"] {
            let meta = std::fs::symlink_metadata(inside.join(path)).unwrap();
            assert_eq!((meta.uid(), meta.gid()), (1000, 1001), "{path}");
        }
        assert_eq!(std::fs::metadata(&outside).unwrap().uid(), 0);
    }

    #[test]
    fn a_link_in_the_way_is_replaced_and_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let outside = folder.path().join("outside");
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("kept"), "kept").unwrap();
        let inside = folder.path().join("inside");
        std::fs::create_dir(&inside).unwrap();
        std::os::unix::fs::symlink(&outside, inside.join(".artel")).unwrap();
        std::os::unix::fs::symlink(outside.join("kept"), inside.join("file")).unwrap();
        real_folder(&inside, ".artel").unwrap();
        replace_file(&inside, "file", "new").unwrap();
        assert_eq!(
            std::fs::read_to_string(outside.join("kept")).unwrap(),
            "kept"
        );
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1);
        assert_eq!(std::fs::read_to_string(inside.join("file")).unwrap(), "new");
    }
}
