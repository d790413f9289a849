//! A tree of processes as `/proc` shows it: who is in it, what it uses, how it is killed.
//!
//! A confined tree is complete: an orphan's parent becomes the first process of its namespace,
//! which is itself a descendant of ours, and killing that one kills them all.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::OnceLock;

use rustix::process::{Pid, Signal, kill_process, kill_process_group};

/// The kernel counts CPU time for user space in hundredths of a second on every architecture.
const MS_PER_TICK: u64 = 10;

/// What a tree uses at one moment.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Usage {
    /// Processes and threads.
    pub tasks: u64,
    /// Resident memory in KiB; pages that processes share count for each of them.
    pub resident_kb: u64,
    /// CPU time of living processes and of those that they waited for, in milliseconds.
    pub cpu_ms: u64,
}

/// A process that we started and everything below it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tree {
    pub root: Pid,
    pub confined: bool,
}

impl Tree {
    /// The root and its descendants, at most `most` of them.
    pub(crate) fn members(self, most: usize) -> Vec<Pid> {
        if most == 1 {
            return vec![self.root];
        }
        let everybody = (!has_children_files()).then(parents);
        let mut found = vec![self.root];
        let mut next = 0;
        while next < found.len() && found.len() < most {
            let pid = found[next];
            next += 1;
            match &everybody {
                Some(everybody) => found.extend(everybody.get(&pid).into_iter().flatten()),
                None => found.extend(children(pid, most - found.len())),
            }
        }
        found.truncate(most);
        found
    }

    /// Adds up what the members use.
    pub(crate) fn usage(members: &[Pid]) -> Usage {
        let mut sum = Usage::default();
        for pid in members {
            let Some(stat) = Stat::read(*pid) else {
                continue;
            };
            sum.tasks += stat.threads;
            sum.cpu_ms += stat.cpu_ms;
            sum.resident_kb += resident_kb(*pid);
        }
        sum
    }

    /// Memory with shared pages counted once, in KiB; slower than [`Tree::usage`].
    pub(crate) fn proportional_kb(members: &[Pid]) -> u64 {
        members
            .iter()
            .map(|pid| {
                let path = format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero());
                let text = std::fs::read_to_string(path).unwrap_or_default();
                field_kb(&text, "Pss:").unwrap_or_else(|| resident_kb(*pid))
            })
            .sum()
    }

    /// CPU time of the whole tree, once its root has ended and before it is collected.
    pub(crate) fn final_cpu_ms(self) -> u64 {
        Stat::read(self.root).map_or(0, |stat| stat.cpu_ms)
    }

    /// Asks everybody in the tree to end.
    pub(crate) fn terminate(self) {
        let members = self.members(4096);
        // Of a confined tree the first two are bubblewrap itself: it ends with the command.
        let skip = if self.confined { 2 } else { 0 };
        for pid in members.into_iter().skip(skip) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    /// Kills everybody in the tree; the root stays to be collected. To be repeated until the root
    /// has ended: it may be about to make its first child.
    pub(crate) fn kill(self) {
        if self.confined {
            // With the first process of the namespace the kernel kills all of it. Bubblewrap ends
            // when that is done; killed itself, it would say so before.
            let members = self.members(64);
            let most = if members.len() > 1 {
                &members[1..]
            } else {
                &members[..]
            };
            for pid in most {
                let _ = kill_process(*pid, Signal::KILL);
            }
            return;
        }
        // Stopped, the root makes no new child between our look and the end.
        let _ = kill_process(self.root, Signal::STOP);
        for _ in 0..20 {
            let members = self.members(65_536);
            if members.len() == 1 {
                break;
            }
            for pid in members.into_iter().skip(1) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        let _ = kill_process_group(self.root, Signal::KILL);
        let _ = kill_process(self.root, Signal::KILL);
    }
}

struct Stat {
    parent: i32,
    threads: u64,
    cpu_ms: u64,
}

impl Stat {
    fn read(pid: Pid) -> Option<Self> {
        let path = format!("/proc/{}/stat", pid.as_raw_nonzero());
        Self::parse(&std::fs::read_to_string(path).ok()?)
    }

    /// The name in the second field may contain anything; what follows its last parenthesis does
    /// not.
    fn parse(text: &str) -> Option<Self> {
        let rest = &text[text.rfind(')')? + 1..];
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let number = |index: usize| fields.get(index)?.parse::<u64>().ok();
        let ticks: u64 = (11..=14).filter_map(number).sum();
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            threads: number(17)?.max(1),
            cpu_ms: ticks * MS_PER_TICK,
        })
    }
}

fn resident_kb(pid: Pid) -> u64 {
    let path = format!("/proc/{}/status", pid.as_raw_nonzero());
    let text = std::fs::read_to_string(path).unwrap_or_default();
    field_kb(&text, "VmRSS:").unwrap_or(0)
}

fn field_kb(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

/// Whether the kernel lists the children of a thread.
fn has_children_files() -> bool {
    static HAS: OnceLock<bool> = OnceLock::new();
    *HAS.get_or_init(|| std::fs::exists("/proc/thread-self/children").unwrap_or(false))
}

/// The beginning of the list, at least `most` numbers if there are so many. The kernel walks all
/// siblings for each entry of a list that changes as it is read, and keeps the whole machine from
/// forking meanwhile: a bomb's list must not be read to its end.
fn first_bytes(path: &Path, most: usize) -> String {
    // A number has at most seven digits.
    let bound = most.saturating_add(1).saturating_mul(8) as u64;
    let mut bytes = Vec::new();
    if let Ok(file) = File::open(path) {
        let _ = file.take(bound).read_to_end(&mut bytes);
    }
    let mut text = String::from_utf8(bytes).unwrap_or_default();
    // The last number may be a part of one.
    if let Some(end) = text.rfind(' ') {
        text.truncate(end);
    }
    text
}

fn children(pid: Pid, most: usize) -> Vec<Pid> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{}/task", pid.as_raw_nonzero())) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for thread in threads.flatten() {
        let text = first_bytes(&thread.path().join("children"), most);
        let pids = text.split_whitespace().filter_map(|pid| pid.parse().ok());
        found.extend(pids.filter_map(Pid::from_raw));
    }
    found
}

/// Everybody's children, from a look at every process of the machine.
fn parents() -> HashMap<Pid, Vec<Pid>> {
    let mut map: HashMap<Pid, Vec<Pid>> = HashMap::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.and_then(Pid::from_raw) else {
            continue;
        };
        if let Some(parent) = Stat::read(pid).and_then(|stat| Pid::from_raw(stat.parent)) {
            map.entry(parent).or_default().push(pid);
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_with_a_nasty_name_is_read() {
        let line = "42 (a) R 7 b) S 7 42 42 0 -1 4194560 100 200 0 0 3 4 5 6 20 0 9 0 1000 1 2";
        let stat = Stat::parse(line).expect("parsed");
        assert_eq!((stat.parent, stat.threads, stat.cpu_ms), (7, 9, 180));
    }

    #[test]
    fn both_ways_of_finding_children_agree() {
        let mut child = std::process::Command::new("sleep")
            .arg("30")
            .spawn()
            .expect("spawned");
        let me = rustix::process::getpid();
        let pid = Pid::from_child(&child);
        let listed = children(me, 1000).contains(&pid) || !has_children_files();
        let scanned = parents().get(&me).is_some_and(|found| found.contains(&pid));
        child.kill().expect("killed");
        child.wait().expect("collected");
        assert!(listed && scanned);
    }
}
