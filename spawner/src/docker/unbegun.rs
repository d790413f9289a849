//! What an engine leaves behind that is killed between making a container and beginning it: a process of its runtime, which waits
//! for a word that nobody gives any more, and the shim that watches it. The next engine does not know of them, so nobody can ask
//! it to remove them.
//!
//! Such a process is ended when all of this is certain: it is a runtime's `init`, which has not become the container's program;
//! what it has mounted as the workspace is in our home; and the engine says that it has no container of this id, which it would
//! say of none that is about to begin.

use super::{Engine, Error, is_missing, patiently};
use crate::disk::plain;
use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

/// Most processes that are looked at in a row.
const PROCESSES: usize = 100_000;

/// A process that waits to become a container's.
#[derive(Debug)]
struct Unbegun {
    /// The engine's id of the container.
    id: String,
    process: OwnedFd,
    /// Who watches it for the engine, if anybody does.
    shim: Option<OwnedFd>,
}

impl Engine {
    /// Ends what a former engine has made of containers with a workspace of this home, mounted at `guest`, and never begun; says
    /// how many there were. Finds nothing where the engine's processes cannot be seen.
    pub async fn end_unbegun(&self, home: &Path, guest: &Path) -> Result<usize, Error> {
        let (home, guest) = (home.to_owned(), guest.to_owned());
        let found = tokio::task::spawn_blocking(move || find(&home, &guest)).await;
        let mut count = 0;
        for left in found.unwrap_or_default() {
            match patiently(|| self.docker.inspect_container(&left.id, None)).await {
                Ok(_) => continue,
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(Error::refused("to look at a container")(error)),
            }
            // Its watcher first, or that would find it dead and wait for somebody to ask how it ended.
            for process in left.shim.iter().chain([&left.process]) {
                // It may have ended by itself.
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            tracing::info!(
                container = left.id,
                "what a former engine had made of a container and never begun was ended"
            );
            count += 1;
        }
        Ok(count)
    }
}

/// All of them that can be seen here. Blocks.
fn find(home: &Path, guest: &Path) -> Vec<Unbegun> {
    let Some(home) = Place::of(home) else {
        return Vec::new();
    };
    let processes = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers
        .take(PROCESSES)
        .filter_map(|number| unbegun(number, &home, guest))
        .collect()
}

fn unbegun(number: i32, home: &Place, guest: &Path) -> Option<Unbegun> {
    // Most processes go no further than this.
    if !waits_to_begin(&words(number)?) {
        return None;
    }
    // From here on it is this process that is looked at, or its end is noticed.
    let process = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
    let folder = PathBuf::from(format!("/proc/{number}"));
    let id = container(&std::fs::read_to_string(folder.join("cgroup")).ok()?)?;
    let mounts = std::fs::read(folder.join("mountinfo")).ok()?;
    let is_ours = mounted(&mounts).any(|mount| mount.at == guest && home.has(&mount));
    let parent = parent(&std::fs::read_to_string(folder.join("stat")).ok()?);
    let shim = parent.and_then(|parent| shim(parent, &id));
    let still = waits_to_begin(&words(number)?);
    (is_ours && still).then_some(Unbegun { id, process, shim })
}

/// The shim of the container of this id, if this process is it.
fn shim(number: i32, id: &str) -> Option<OwnedFd> {
    let process = pidfd_open(Pid::from_raw(number)?, PidfdFlags::empty()).ok()?;
    let words = words(number)?;
    let is_shim = words.first()?.contains("containerd-shim");
    let is_of = words.windows(2).any(|pair| pair == ["-id", id]);
    (is_shim && is_of).then_some(process)
}

/// The command line of a process.
fn words(number: i32) -> Option<Vec<String>> {
    let line = std::fs::read(format!("/proc/{number}/cmdline")).ok()?;
    let words = line
        .split(|byte| *byte == 0)
        .filter(|word| !word.is_empty());
    Some(
        words
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect(),
    )
}

/// Whether this is the command line of what `runc` and its like leave in a container until it begins.
fn waits_to_begin(words: &[String]) -> bool {
    matches!(words, [runtime, init] if runtime.ends_with("runc") && init == "init")
}

/// The id of the container that a process is in, by its control groups.
fn container(groups: &str) -> Option<String> {
    let words = groups.split(|c: char| !c.is_ascii_alphanumeric());
    let mut ids = words.filter(|word| {
        let is_digit = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        word.len() == 64 && word.bytes().all(is_digit)
    });
    let id = ids.next()?;
    // Of one in another one we do not know which is meant.
    ids.all(|other| other == id).then(|| id.to_owned())
}

/// The parent of a process, out of its `stat`: the second word behind the name, which may have anything in it.
fn parent(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(1)?.parse().ok()
}

/// A line of a table of mounts.
pub(super) struct Mounted {
    /// Major and minor number of the device.
    device: String,
    /// What of the device is mounted.
    pub(super) root: PathBuf,
    /// Where.
    pub(super) at: PathBuf,
    /// Whether one may write there.
    pub(super) writable: bool,
    /// The kind of file system.
    pub(super) kind: String,
}

impl Mounted {
    /// Whether it is a part of what another one is of.
    pub(super) fn is_of(&self, whole: &Self) -> bool {
        self.device == whole.device && self.root.starts_with(&whole.root)
    }
}

pub(super) fn mounted(table: &[u8]) -> impl Iterator<Item = Mounted> {
    table.split(|byte| *byte == b'\n').filter_map(|line| {
        let text = |word: &[u8]| String::from_utf8(word.to_owned()).ok();
        let mut words = line.split(|byte| *byte == b' ').skip(2);
        let device = text(words.next()?)?;
        let (root, at) = (plain(words.next()?), plain(words.next()?));
        let writable = words
            .next()?
            .split(|byte| *byte == b',')
            .any(|option| option == b"rw");
        // Optional words end with a dash.
        let kind = words.skip_while(|word| *word != b"-").nth(1);
        Some(Mounted {
            device,
            root,
            at,
            writable,
            kind: kind.and_then(text).unwrap_or_default(),
        })
    })
}

/// Where a folder is, however it is mounted elsewhere.
struct Place {
    path: PathBuf,
    device: String,
    root: PathBuf,
}

impl Place {
    fn of(folder: &Path) -> Option<Self> {
        let path = folder.canonicalize().ok()?;
        let table = std::fs::read("/proc/self/mountinfo").ok()?;
        let under = mounted(&table).filter(|mount| path.starts_with(&mount.at));
        // The innermost, and of several at one place the last.
        let mount = under.max_by_key(|mount| mount.at.components().count())?;
        let root = mount.root.join(path.strip_prefix(&mount.at).ok()?);
        Some(Self {
            path,
            device: mount.device,
            root,
        })
    }

    /// Whether what is mounted is of this folder: a part of it, or a disk whose file is in it.
    fn has(&self, mount: &Mounted) -> bool {
        if mount.device == self.device {
            return mount.root.starts_with(&self.root);
        }
        let file = format!("/sys/dev/block/{}/loop/backing_file", mount.device);
        std::fs::read(file).is_ok_and(|path| {
            let path = path.trim_ascii_end();
            Path::new(OsStr::from_bytes(path)).starts_with(&self.path)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_to_begin_is_told_from_everything_else() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        for line in ["runc init", "/usr/bin/runc init", "sysbox-runc init"] {
            assert!(waits_to_begin(&words(line)), "{line}");
        }
        for line in ["init", "runc init now", "runc start", "sh init"] {
            assert!(!waits_to_begin(&words(line)), "{line}");
        }
        assert_eq!(parent("7 (a) b) S 42 7 7"), Some(42));
        assert_eq!(parent("7 (a"), None);
    }

    #[test]
    fn the_container_of_a_process_is_in_its_control_groups() {
        let (one, two) = ("0a".repeat(32), "1b".repeat(32));
        let of = |text: String| container(&text);
        assert_eq!(of(format!("0::/docker/{one}\n")).as_ref(), Some(&one));
        let scope = format!("0::/system.slice/docker-{one}.scope\n");
        assert_eq!(of(scope).as_ref(), Some(&one));
        let many = format!("9:name=systemd:/docker/{one}\n8:pids:/docker/{one}\n0::/\n");
        assert_eq!(of(many).as_ref(), Some(&one));
        assert_eq!(of(format!("0::/docker/{one}/docker/{two}\n")), None);
        assert_eq!(of("0::/user.slice\n".to_owned()), None);
    }

    #[test]
    fn a_part_of_a_folder_is_known_however_it_is_mounted() {
        let folder = tempfile::tempdir().unwrap();
        let place = Place::of(folder.path()).unwrap();
        let mount = |device: &str, root: &Path| Mounted {
            writable: true,
            kind: String::new(),
            device: device.to_owned(),
            root: root.to_owned(),
            at: "/workspace".into(),
        };
        assert!(place.has(&mount(&place.device, &place.root.join("workspaces/p"))));
        let beside = place.root.with_extension("other");
        assert!(!place.has(&mount(&place.device, &beside)));
        assert!(!place.has(&mount("0:0", &place.root)));
        let line = b"36 35 98:0 /a\\040b /mnt/c rw - ext4 /dev/root rw";
        let read: Vec<Mounted> = mounted(line).collect();
        assert_eq!(read[0].device, "98:0");
        assert_eq!(
            (&*read[0].root, &*read[0].at),
            (Path::new("/a b"), Path::new("/mnt/c"))
        );
    }
}
