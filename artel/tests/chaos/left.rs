//! Nothing is left over: not in Redis, not on the engine, not among the machine's processes, mounts, sockets and folders.

use crate::engine::Engine;
use crate::support::Home;
use std::collections::BTreeSet;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

/// Keys of Redis that stay, because they are what it is all about; none of them grows with the jobs.
const STAY: [&str; 3] = ["worker:jobs", "worker:results", "spawner:heartbeats"];
/// What a spawner keeps about a workspace on purpose, as long as the project is there.
const KEPT: [&str; 7] = [
    "fencing",
    "lock",
    "broker",
    "broker.json",
    "delivered",
    "disk",
    "disk.img",
];

/// In Redis: no job, no result, no pending entry, no dead letter, no key that stays for ever.
pub fn in_redis(url: &str) {
    let mut redis = redis::Client::open(url).unwrap().get_connection().unwrap();
    for (stream, group) in [("worker:jobs", "spawners"), ("worker:results", "crew")] {
        let length: u64 = redis::cmd("XLEN").arg(stream).query(&mut redis).unwrap();
        assert_eq!(length, 0, "entries of {stream}");
        let pending: (u64, redis::Value, redis::Value, redis::Value) = redis::cmd("XPENDING")
            .arg(stream)
            .arg(group)
            .query(&mut redis)
            .unwrap();
        assert_eq!(pending.0, 0, "pending of {stream}");
    }
    let letters: u64 = redis::cmd("XLEN")
        .arg("worker:dead")
        .query(&mut redis)
        .unwrap();
    assert_eq!(letters, 0, "dead letters");
    let keys: Vec<String> = redis::cmd("KEYS").arg("*").query(&mut redis).unwrap();
    assert!(keys.len() > STAY.len());
    for key in keys.iter().filter(|key| !STAY.contains(&key.as_str())) {
        let left: i64 = redis::cmd("TTL").arg(key).query(&mut redis).unwrap();
        assert!(left >= 0, "{key} has no end");
    }
}

/// What an engine leaves behind that is killed while it makes a container: one that was made and never begun, which the next
/// daemon does not know. The spawner ends it.
pub fn unbegun(home: &Home) -> Vec<(PathBuf, String)> {
    let mut processes = processes_of(&home.path().display().to_string());
    processes.retain(|(_, line)| line.trim() == "runc init");
    processes
}

/// On the machine, after the spawner has ended.
pub fn on_the_machine(home: &Home, engine: Option<&Engine>, tasks: usize) {
    if let Some(engine) = engine {
        let all = engine.of_home(home.path());
        assert!(all.is_empty(), "containers: {all:?}");
    }
    let path = home.path().display().to_string();
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    let mounts: Vec<_> = mounts.lines().filter(|line| line.contains(&path)).collect();
    assert!(mounts.is_empty(), "{mounts:?}");
    let slots = home.file("pool");
    assert!(!slots.exists() || names(&slots).next().is_none());
    let processes = processes_of(&path);
    assert!(processes.is_empty(), "{processes:?}");
    let mut sockets = Vec::new();
    walk(home.path(), &mut |path, kind| {
        if kind.is_socket() {
            sockets.push(path.to_owned());
        }
        assert!(
            path.file_name().is_none_or(|name| name != "broker-at"),
            "{}",
            path.display()
        );
    });
    assert!(sockets.is_empty(), "{sockets:?}");
    // One workspace for every task, and what is known about it, and nothing else.
    let job = home.file("workspaces/p/job-1");
    let found: BTreeSet<String> = names(&job).collect();
    let wanted: BTreeSet<String> = (0..tasks)
        .map(crate::crew::task)
        .flat_map(|task| {
            let state = format!("{task}~");
            // In there, when it is a disk of its own.
            let is_disk = job.join(&state).join("disk.img").exists();
            [Some(state), (!is_disk).then_some(task)]
        })
        .flatten()
        .collect();
    assert_eq!(found, wanted);
    for state in found.iter().filter(|name| name.ends_with('~')) {
        for name in names(&job.join(state)) {
            assert!(KEPT.contains(&name.as_str()), "{state} has {name}");
        }
    }
}

fn names(folder: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(folder).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap())
}

fn walk(folder: &Path, see: &mut impl FnMut(&Path, std::fs::FileType)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        see(&path, kind);
        if kind.is_dir() {
            walk(&path, see);
        }
    }
}

/// Processes whose command line names the home, or who see a part of it as a mount.
fn processes_of(home: &str) -> Vec<(PathBuf, String)> {
    let mut found = Vec::new();
    let name = Path::new(home).file_name().unwrap().to_str().unwrap();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Ok(line) = std::fs::read(entry.path().join("cmdline")) else {
            continue;
        };
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let mounts = std::fs::read_to_string(entry.path().join("mountinfo")).unwrap_or_default();
        if line.contains(home) || mounts.contains(name) {
            found.push((entry.path(), line));
        }
    }
    found
}
