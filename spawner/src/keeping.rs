//! What is kept for later tasks and attempts, mirrors and workspaces, and for how long.
//!
//! A workspace whose work was taken over is only a saving of time; one whose work was not may hold the only copy of what a dead
//! attempt has done, so it goes by age alone, and late. Nothing that somebody uses is touched: each has a lock, which is taken
//! before anything is removed. What stays of a workspace is its lock and the highest fencing token that worked there, so that an
//! old job that comes late changes nothing; in the end these go as well.

use crate::disk;
use crate::mirror::try_lock_file;
use crate::places;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// The file in a workspace's state that says that its work was taken over.
pub(crate) const DELIVERED: &str = "delivered";

/// How much longer than a workspace what stays of it is kept.
const NOTES: u32 = 3;

/// How long and how much is kept under `ARTEL_HOME`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// How often it is looked.
    pub every: Duration,
    /// Mirrors that no task has used for so long are removed.
    pub mirrors: Duration,
    /// Workspaces whose work was taken over so long ago are removed.
    pub delivered: Duration,
    /// Workspaces that nobody has worked in for so long are removed, whatever became of the work.
    pub workspaces: Duration,
    /// What all of it together may take of the disk, in MiB. Beyond that mirrors and workspaces whose work was taken over go,
    /// those first that were used least recently.
    pub most_mb: u64,
}

impl Default for Keep {
    /// An hour; two weeks, three days, thirty days; 20 GiB.
    fn default() -> Self {
        const DAY: Duration = Duration::from_hours(24);
        Self {
            every: Duration::from_hours(1),
            mirrors: DAY * 14,
            delivered: DAY * 3,
            workspaces: DAY * 30,
            most_mb: 20 * 1024,
        }
    }
}

/// Something that is kept.
struct Kept {
    /// What is removed.
    paths: Vec<PathBuf>,
    lock: PathBuf,
    used: SystemTime,
    /// How long it is kept at most.
    most: Duration,
    /// Whether it may go earlier, when there is too much.
    is_spare: bool,
}

/// Looks again and again.
pub(crate) async fn forever(home: &Path, keep: Keep) {
    loop {
        let folder = home.to_owned();
        match tokio::task::spawn_blocking(move || once(&folder, &keep)).await {
            Ok(Ok(0)) => {}
            Ok(Ok(count)) => {
                tracing::info!("{count} mirrors and workspaces that nobody needs were removed");
            }
            Ok(Err(error)) => tracing::warn!(%error, "old workspaces cannot be looked at"),
            Err(error) => tracing::warn!(%error, "old workspaces were not looked at"),
        }
        tokio::time::sleep(keep.every).await;
    }
}

/// Removes what is too old or too much, and says how many. Blocks.
pub(crate) fn once(home: &Path, keep: &Keep) -> io::Result<usize> {
    let mut all = mirrors(home, keep)?;
    all.extend(workspaces(home, keep)?);
    all.sort_by_key(|kept| kept.used);
    let now = SystemTime::now();
    let mut removed = 0;
    let mut rest = Vec::new();
    for kept in all {
        let age = now.duration_since(kept.used).unwrap_or_default();
        if age >= kept.most {
            removed += usize::from(remove(&kept));
        } else {
            let size = kept
                .paths
                .iter()
                // What is mounted there is counted with its disk.
                .filter(|path| !path.ends_with("disk"))
                .map(|path| sandbox::used_mb(path))
                .sum::<u64>();
            rest.push((kept, size));
        }
    }
    let mut total: u64 = rest.iter().map(|(_, size)| size).sum();
    for (kept, size) in &rest {
        if total > keep.most_mb && kept.is_spare && remove(kept) {
            removed += 1;
            total -= size;
        }
    }
    if total > keep.most_mb {
        tracing::warn!(
            "workspaces take {total} MiB of the disk, more than the {} MiB that are meant for them, and hold work that was not taken over",
            keep.most_mb
        );
    }
    Ok(removed)
}

/// Removes it unless somebody uses it, and says whether.
fn remove(kept: &Kept) -> bool {
    let removed = try_lock_file(&kept.lock, File::try_lock).and_then(|held| {
        let Some(_held) = held else { return Ok(false) };
        // Somebody may have used it since we looked.
        if last_used(&kept.lock)? > kept.used {
            return Ok(false);
        }
        for path in &kept.paths {
            disk::unmount_all(path).map_err(io::Error::other)?;
            places::remove_any(path)?;
        }
        Ok(true)
    });
    removed.unwrap_or_else(|error| {
        tracing::warn!(%error, "{} was not removed; trying again later", kept.lock.display());
        false
    })
}

fn last_used(path: &Path) -> io::Result<SystemTime> {
    std::fs::symlink_metadata(path)?.modified()
}

fn mirrors(home: &Path, keep: &Keep) -> io::Result<Vec<Kept>> {
    let mut found = Vec::new();
    for path in listed(&places::mirrors(home))? {
        if path.extension().is_some_and(|end| end == "lock") {
            found.push(Kept {
                used: last_used(&path)?,
                paths: vec![path.with_extension("git"), path.clone()],
                lock: path,
                most: keep.mirrors,
                is_spare: true,
            });
        }
    }
    Ok(found)
}

fn workspaces(home: &Path, keep: &Keep) -> io::Result<Vec<Kept>> {
    let mut found = Vec::new();
    for project in listed(&places::workspaces(home))? {
        for job in listed(&project)? {
            for state in listed(&job)? {
                let name = state.file_name().and_then(|name| name.to_str());
                let Some(task) = name.and_then(|name| name.strip_suffix('~')) else {
                    continue;
                };
                let lock = state.join("lock");
                let Ok(used) = last_used(&lock) else { continue };
                let is_spare = state.join(DELIVERED).exists();
                let mut paths = vec![job.join(task)];
                paths.extend(listed(&state)?.into_iter().filter(|path| !stays(path)));
                paths.retain(|path| std::fs::symlink_metadata(path).is_ok());
                let most = match (paths.is_empty(), is_spare) {
                    (true, _) => keep.workspaces * NOTES,
                    (false, true) => keep.delivered,
                    (false, false) => keep.workspaces,
                };
                if paths.is_empty() {
                    paths.push(state);
                }
                found.push(Kept {
                    paths,
                    lock,
                    used,
                    most,
                    is_spare,
                });
            }
            remove_empty(&job);
        }
        remove_empty(&project);
    }
    Ok(found)
}

/// Removes a folder in which there is nothing; nobody misses it, and whoever is about to use it makes it again.
fn remove_empty(folder: &Path) {
    let name = folder.file_name().unwrap_or_default().as_encoded_bytes();
    // Not that of trials, which are made once.
    if !name.starts_with(b".") {
        let _ = std::fs::remove_dir(folder);
    }
}

fn stays(path: &Path) -> bool {
    ["lock", "fencing"].iter().any(|name| path.ends_with(name))
}

/// What is in a folder; nothing when there is no such folder, or when it is none.
fn listed(folder: &Path) -> io::Result<Vec<PathBuf>> {
    if !std::fs::symlink_metadata(folder).is_ok_and(|meta| meta.is_dir()) {
        return Ok(Vec::new());
    }
    std::fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    const DAY: Duration = Duration::from_hours(24);

    /// A workspace that was used so long ago, with a file of so many MiB in it.
    fn workspace(home: &Path, task: &str, age: Duration, mib: usize, delivered: bool) -> PathBuf {
        let workspace = places::workspaces(home).join("p/j").join(task);
        let state = workspace.with_file_name(format!("{task}~"));
        fs::create_dir_all(&workspace).unwrap();
        fs::create_dir_all(&state).unwrap();
        fs::write(workspace.join("file"), vec![1; mib << 20]).unwrap();
        fs::write(state.join("fencing"), "7").unwrap();
        if delivered {
            fs::write(state.join(DELIVERED), "").unwrap();
        }
        old(&state.join("lock"), age);
        workspace
    }

    fn mirror(home: &Path, name: &str, age: Duration) -> PathBuf {
        let mirror = places::mirrors(home).join(format!("{name}.git"));
        fs::create_dir_all(&mirror).unwrap();
        fs::write(mirror.join("HEAD"), vec![1; 1 << 20]).unwrap();
        old(&mirror.with_extension("lock"), age);
        mirror
    }

    fn old(lock: &Path, age: Duration) {
        let file = File::create(lock).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }

    #[test]
    fn what_is_old_goes_and_what_is_in_use_or_not_taken_over_stays() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let done = workspace(home, "done", DAY * 4, 0, true);
        let just_done = workspace(home, "just-done", DAY, 0, true);
        let open = workspace(home, "open", DAY * 29, 0, false);
        let forgotten = workspace(home, "forgotten", DAY * 31, 0, false);
        let used = workspace(home, "used", DAY * 99, 0, true);
        let lock = File::open(used.with_file_name("used~").join("lock")).unwrap();
        lock.lock().unwrap();
        let (unused, wanted) = (
            mirror(home, "unused", DAY * 15),
            mirror(home, "wanted", DAY),
        );
        let reading = mirror(home, "reading", DAY * 15);
        let reader = File::open(reading.with_extension("lock")).unwrap();
        reader.lock_shared().unwrap();
        assert_eq!(once(home, &Keep::default()).unwrap(), 3);
        for gone in [done, forgotten, unused] {
            assert!(!gone.exists(), "{}", gone.display());
        }
        for stays in [just_done, open, used, wanted, reading] {
            assert!(stays.exists(), "{}", stays.display());
        }
        let state = home.join("workspaces/p/j/done~");
        assert!(!state.join(DELIVERED).exists());
        assert_eq!(fs::read_to_string(state.join("fencing")).unwrap(), "7");
        assert_eq!(once(home, &Keep::default()).unwrap(), 0, "once is enough");
    }

    #[test]
    fn when_there_is_too_much_what_was_used_least_recently_goes_unless_it_holds_work() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let open = workspace(home, "open", DAY * 2, 3, false);
        let first = workspace(home, "first", Duration::from_hours(30), 3, true);
        let mirror = mirror(home, "mirror", Duration::from_hours(20));
        let last = workspace(home, "last", Duration::from_hours(1), 3, true);
        let keep = Keep {
            most_mb: 7,
            ..Keep::default()
        };
        assert_eq!(once(home, &keep).unwrap(), 1);
        assert!(!first.exists());
        for stays in [&open, &mirror, &last] {
            assert!(stays.exists(), "{}", stays.display());
        }
        let keep = Keep { most_mb: 1, ..keep };
        assert_eq!(once(home, &keep).unwrap(), 2);
        assert!(open.exists(), "its work was not taken over");
    }

    #[test]
    fn of_tasks_that_nobody_has_heard_of_for_long_nothing_is_left() {
        let home = tempfile::tempdir().unwrap();
        let home = home.path();
        let late = workspace(home, "late", DAY * 89, 0, true);
        let old = workspace(home, "old", DAY * 91, 0, true);
        let used = workspace(home, "used", DAY * 91, 0, true);
        let lock = File::open(used.with_file_name("used~").join("lock")).unwrap();
        lock.lock().unwrap();
        fs::remove_dir_all(&used).unwrap();
        fs::remove_file(used.with_file_name("used~").join(DELIVERED)).unwrap();
        let notes = |task: &str| home.join("workspaces/p/j").join(format!("{task}~"));
        assert_eq!(once(home, &Keep::default()).unwrap(), 2);
        assert!(!late.exists() && !old.exists());
        for task in ["late", "old", "used"] {
            assert!(notes(task).join("lock").exists(), "{task}");
        }
        assert_eq!(once(home, &Keep::default()).unwrap(), 1);
        assert!(notes("late").exists() && notes("used").exists() && !notes("old").exists());
        drop(lock);
        assert_eq!(once(home, &Keep::default()).unwrap(), 1);
        self::old(&notes("late").join("lock"), DAY * 91);
        assert_eq!(once(home, &Keep::default()).unwrap(), 1);
        assert_eq!(once(home, &Keep::default()).unwrap(), 0);
        assert!(places::workspaces(home).exists());
        assert!(!places::workspaces(home).join("p").exists());
    }
}
