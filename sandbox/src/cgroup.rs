//! A control group that bounds how many processes a job can have, where we may make one.
//!
//! The kernel does not count processes of root against a limit of resources, so that a fork bomb under us as root could fill
//! the machine's table of processes before any watcher notices. A group of the `pids` controller holds for everybody.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Once;
use std::time::Duration;

/// How often a group that still holds dying processes is tried again, a twentieth of a second apart.
const TRIES: usize = 600;

/// A group that is older than this has its processes, or never will.
const SETTLED: Duration = Duration::from_mins(1);

/// Once in the life of a process, groups are removed that a killed one left behind.
static SWEPT: Once = Once::new();

/// Removes empty groups of ours; the kernel keeps those that hold a process.
fn sweep(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let ours = entry.file_name().to_string_lossy().starts_with("artel-");
        let age = entry
            .metadata()
            .and_then(|meta| meta.modified())
            .ok()
            .and_then(|at| at.elapsed().ok());
        if ours && age.is_some_and(|age| age > SETTLED) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// A group; it is removed when it is dropped, as soon as it is empty.
#[derive(Debug)]
pub(crate) struct Group(PathBuf);

impl Group {
    /// Makes a group with room for `most` processes and threads, or says why there can be none.
    pub(crate) fn new(most: u64) -> io::Result<Self> {
        let parent = parent()?;
        SWEPT.call_once(|| sweep(&parent));
        let path = parent.join(format!("artel-{}", uuid::Uuid::new_v4().simple()));
        fs::create_dir(&path)?;
        let group = Self(path);
        fs::write(group.0.join("pids.max"), most.to_string())?;
        Ok(group)
    }

    /// The file into which a process writes its id to belong to the group.
    pub(crate) fn members(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

/// The group under which ours are made: our own of the first version's `pids` hierarchy, or the root of the second version,
/// when it hands the controller on.
fn parent() -> io::Result<PathBuf> {
    let missing = || {
        io::Error::new(
            io::ErrorKind::NotFound,
            "no cgroup with the pids controller is writable here",
        )
    };
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let first = own.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        controllers
            .split(',')
            .any(|name| name == "pids")
            .then_some(path)
    });
    if let Some(path) = first {
        let group = Path::new("/sys/fs/cgroup/pids").join(path.trim_start_matches('/'));
        return if group.join("cgroup.procs").exists() {
            Ok(group)
        } else {
            Err(missing())
        };
    }
    let root = PathBuf::from("/sys/fs/cgroup");
    let handed_on = fs::read_to_string(root.join("cgroup.subtree_control"))?;
    if handed_on.split_whitespace().any(|name| name == "pids") {
        Ok(root)
    } else {
        Err(missing())
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if fs::remove_dir(&self.0).is_ok() {
            return;
        }
        // Its last processes are still dying.
        let path = self.0.clone();
        let _ = std::thread::Builder::new()
            .name("sandbox-cgroup".into())
            .spawn(move || {
                for _ in 0..TRIES {
                    if !path.exists() || fs::remove_dir(&path).is_ok() {
                        return;
                    }
                    std::thread::park_timeout(Duration::from_millis(50));
                }
            });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_gone_when_nobody_needs_it() {
        // Only root may make one; elsewhere the limit of resources does the work.
        if !rustix::process::geteuid().is_root() {
            assert!(Group::new(5).is_err() || parent().is_ok());
            return;
        }
        let group = Group::new(5).expect("root can make control groups here");
        let path = group.0.clone();
        assert_eq!(
            fs::read_to_string(path.join("pids.max")).unwrap().trim(),
            "5"
        );
        drop(group);
        assert!(!path.exists());
    }
}
