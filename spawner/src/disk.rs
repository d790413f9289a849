//! Workspaces on disks of their own: a sparse file of the size of the job's limit, mounted while somebody works there.
//!
//! ```text
//! {task}~/disk.img         the disk; kept for the next attempt, and removed with the workspace
//! {task}~/disk/            where it is mounted
//! {task}~/disk/workspace/  what the worker sees as /workspace
//! {task}~/disk/waits/      the same of a container that waits, until the workspace is cloned; see `runtime::containers`
//! {task}~/broken.img       a disk that could not be used any more, for a person to look at (`mount -o loop,ro`)
//! ```
//!
//! A container that waits for its job has a disk as well, laid out in the same way in a folder of the pool. It becomes the
//! workspace's when a job takes the container.
//!
//! Whoever mounts or unmounts has the lock of the workspace; a mount whose lock is free was left by a spawner that died, and
//! [`sweep`] undoes it. A container keeps what it has mounted, whatever is unmounted here; the next mount is of the same loop
//! device then, because two of one file would ruin it.

use crate::mirror::try_lock_file;
use crate::places;
use crate::runtime::Runtime;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How often mounts are looked for that nobody needs.
const LOOK: Duration = Duration::from_mins(1);
/// How long one program may take, in seconds. Checking a large disk after a crash takes longest.
const PROGRAM_S: &str = "120";
/// The size of the disk that shows whether disks can be made at all, in MiB.
const TRIAL_MB: u64 = 8;
/// How long it is waited for the kernel to let go of a disk that is to grow.
const FREED: Duration = Duration::from_secs(5);
/// A disk with less space than this, in bytes, is full (an eighth of it when it is small, a fiftieth when it is large): what is
/// written in large pieces is refused before the last one fits.
const FULL_BYTES: u64 = 4 << 20;
/// What a disk is mounted with: no device and no program with another user's rights in it, space that is given back to the
/// machine when files are removed, and nothing written that nobody asked for.
const OPTIONS: &str = "nosuid,nodev,noatime,discard,noinit_itable";

/// How it is seen to that a workspace does not grow beyond its job's limit (`SPAWNER_DISK`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Disk {
    /// By disks of their own, where the runtime looks too seldom by itself and they can be had; else by looking.
    #[default]
    Auto,
    /// By disks of their own. A spawner that cannot make them does not begin.
    Loop,
    /// By looking how large it is.
    Polled,
}

/// Why a disk is not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "cannot run the program {0}; install the packages `mount`, `e2fsprogs` and `coreutils`"
    )]
    Start(&'static str, #[source] io::Error),
    #[error("`{program}` failed: {said}")]
    Failed { program: &'static str, said: String },
    #[error("cannot use {path}: {source}", path = .path.display())]
    Folder { path: PathBuf, source: io::Error },
    #[error("the task was ended meanwhile")]
    Ended,
}

/// Whether workspaces are disks of their own from now on. Says which, and why not.
pub(crate) async fn choose(
    disk: Disk,
    home: &Path,
    runtime: &dyn Runtime,
) -> Result<bool, crate::Error> {
    let wanted = match disk {
        Disk::Auto => runtime.looks_seldom(),
        Disk::Loop => true,
        Disk::Polled => false,
    };
    if !wanted {
        return Ok(false);
    }
    let found = match runtime.sees_mounts().await {
        Ok(()) => {
            let trial = trial(home);
            let tried = blocking(move || try_out(&trial)).await;
            tried.map_err(|error| error.to_string())
        }
        Err(reason) => Err(reason),
    };
    match found {
        Ok(()) => {
            tracing::info!("workspaces are disks of their own, as large as their jobs' limits");
            Ok(true)
        }
        Err(reason) if disk == Disk::Loop => Err(crate::Error::NoDisks { reason }),
        Err(reason) => {
            tracing::warn!(
                reason,
                "workspaces cannot be disks of their own; their size is looked at every second, and what grows faster takes this machine's space until then"
            );
            Ok(false)
        }
    }
}

/// A place for a trial that no neighbour has. It looks like a workspace that is used, so that what is left of it goes as these do,
/// should we be killed meanwhile.
fn trial(home: &Path) -> PathBuf {
    let name = hex::encode(rand::random::<[u8; 8]>());
    // No project has a name that begins with a dot.
    let folder = places::workspaces(home).join(".trial/.trial");
    folder.join(format!("{name}~"))
}

/// Makes a disk, mounts it, and takes it away again.
fn try_out(folder: &Path) -> Result<(), Error> {
    std::fs::create_dir_all(folder).map_err(at(folder))?;
    let lock = folder.join("lock");
    let _used = try_lock_file(&lock, File::try_lock).map_err(at(&lock))?;
    let image = Image::of(folder);
    image.mount(TRIAL_MB)?;
    image.unmount()?;
    places::remove_any(folder).map_err(at(folder))
}

/// Undoes mounts that nobody needs, again and again.
pub(crate) async fn forever(home: &Path) {
    loop {
        let folder = home.to_owned();
        let swept = blocking(move || sweep(&folder)).await;
        match swept {
            Ok(0) => {}
            Ok(count) => {
                tracing::info!("{count} disks were unmounted that a former spawner had mounted");
            }
            Err(error) => {
                tracing::warn!(%error, "mounted disks cannot be looked at; trying again");
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Unmounts the disks of workspaces in which nobody works, and says how many. Blocks.
pub(crate) fn sweep(home: &Path) -> Result<usize, Error> {
    let mut count = 0;
    for mount in mounts_under(&places::workspaces(home))? {
        let Some(state) = mount.parent().filter(|state| is_state(state)) else {
            continue;
        };
        let lock = state.join("lock");
        let held = try_lock_file(&lock, File::try_lock).map_err(at(&lock))?;
        if held.is_some() {
            Image::of(state).unmount()?;
            count += 1;
        }
    }
    Ok(count)
}

/// Unmounts whatever is mounted in a folder that is to be removed. Blocks.
pub(crate) fn unmount_all(folder: &Path) -> Result<(), Error> {
    for mount in mounts_under(folder)? {
        umount(&mount)?;
    }
    Ok(())
}

/// Runs what blocks where it may.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(Error::Ended))
}

/// The disk of one workspace, whether it is there or not. Everything blocks.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    state: PathBuf,
}

impl Image {
    /// The one in a workspace's state.
    pub(crate) fn of(state: &Path) -> Self {
        Self {
            state: state.to_owned(),
        }
    }

    /// Where it is mounted.
    pub(crate) fn folder(&self) -> PathBuf {
        self.state.join("disk")
    }

    /// The workspace on it.
    pub(crate) fn workspace(&self) -> PathBuf {
        self.folder().join("workspace")
    }

    /// What a container sees as its workspace that waits for the task of this one. Not yet what anybody takes for a workspace.
    pub(crate) fn waiting(&self) -> PathBuf {
        self.folder().join("waits")
    }

    fn file(&self) -> PathBuf {
        self.state.join("disk.img")
    }

    /// Whether it was made.
    pub(crate) fn exists(&self) -> bool {
        std::fs::symlink_metadata(self.file()).is_ok()
    }

    /// Its size in MiB; 0 when there is none.
    pub(crate) fn size_mb(&self) -> u64 {
        std::fs::symlink_metadata(self.file()).map_or(0, |meta| meta.len() >> 20)
    }

    /// Whether there is no space left on it, or no place for another file. One that cannot be asked is not full.
    pub(crate) fn is_full(&self) -> bool {
        if !self.is_mounted() {
            return false;
        }
        rustix::fs::statvfs(self.folder()).is_ok_and(|stat| {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let whole = stat.f_blocks.saturating_mul(stat.f_frsize);
            free < FULL_BYTES.min(whole / 8).max(whole / 50) || stat.f_favail == 0
        })
    }

    /// Mounts it, made or grown to `most_mb` if it is smaller. One that is larger stays as it is; one that is mounted already
    /// is fine.
    pub(crate) fn mount(&self, most_mb: u64) -> Result<(), Error> {
        std::fs::create_dir_all(&self.state).map_err(at(&self.state))?;
        self.mount_alone(most_mb, &self.alone()?)
    }

    /// Unmounts it; one that is not mounted is fine.
    pub(crate) fn unmount(&self) -> Result<(), Error> {
        self.detach(&self.alone()?)
    }

    /// Makes the disk of another place this one's, which is mounted nowhere here then; what a container has mounted of it stays.
    /// Returns whether it did: one that is here already is not replaced. After an error the other place may have it still, unmounted.
    pub(crate) fn take_over(&self, other: &Self) -> Result<bool, Error> {
        std::fs::create_dir_all(&self.state).map_err(at(&self.state))?;
        let _alone = self.alone()?;
        if self.exists() {
            return Ok(false);
        }
        let alone_there = other.alone()?;
        other.detach(&alone_there)?;
        std::fs::rename(other.file(), self.file()).map_err(at(&self.state))?;
        Ok(true)
    }

    /// Puts the disk aside, for a person to look at, and mounts an empty one.
    pub(crate) fn renew(&self, most_mb: u64) -> Result<(), Error> {
        let alone = self.alone()?;
        self.detach(&alone)?;
        self.set_aside()?;
        self.mount_alone(most_mb, &alone)
    }

    fn mount_alone(&self, most_mb: u64, alone: &Alone) -> Result<(), Error> {
        let (file, folder) = (self.file(), self.folder());
        let most_mb = most_mb.min(machine_mb(&self.state)?);
        if self.is_mounted() {
            if self.size_mb() >= most_mb {
                return Ok(());
            }
            self.detach(alone)?;
        }
        let device = if self.size_mb() < most_mb {
            freed(&file)?
        } else {
            attached(&file)?
        };
        if device.is_none() {
            if self.exists() && !self.is_sound(alone)? {
                tracing::warn!("the disk {} is broken; it is set aside", file.display());
                self.set_aside()?;
            }
            if !self.exists() {
                self.make(most_mb, alone)?;
            } else if self.size_mb() < most_mb {
                self.grow(most_mb, alone)?;
            }
        }
        std::fs::create_dir_all(&folder).map_err(at(&folder))?;
        let of = |source: &Path, options: &str| {
            let words: [&OsStr; 6] = [
                "-t".as_ref(),
                "ext4".as_ref(),
                "-o".as_ref(),
                options.as_ref(),
                source.as_ref(),
                folder.as_ref(),
            ];
            alone.run("mount", &words)
        };
        let Some(device) = device else {
            return of(&file, &format!("loop,{OPTIONS}"));
        };
        // While it is open the kernel gives it to nobody else, so it is this disk's or was lost before it was opened.
        let held = File::open(&device).map_err(at(&device))?;
        if attached(&file)?.as_ref() != Some(&device) {
            drop(held);
            return of(&file, &format!("loop,{OPTIONS}"));
        }
        of(&device, OPTIONS)
    }

    fn alone(&self) -> Result<Alone, Error> {
        let folder = File::open(&self.state).map_err(at(&self.state))?;
        folder.lock().map_err(at(&self.state))?;
        Ok(Alone(folder))
    }

    fn is_mounted(&self) -> bool {
        let device = |path: &Path| std::fs::symlink_metadata(path).map(|meta| meta.dev());
        match (device(&self.folder()), device(&self.state)) {
            (Ok(inside), Ok(outside)) => inside != outside,
            _ => false,
        }
    }

    fn detach(&self, alone: &Alone) -> Result<(), Error> {
        if self.is_mounted() {
            alone.run("umount", &[self.folder().as_ref()])?;
        }
        Ok(())
    }

    fn set_aside(&self) -> Result<(), Error> {
        let aside = self.state.join("broken.img");
        match std::fs::rename(self.file(), &aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(&aside)(error)),
            _ => Ok(()),
        }
    }

    /// Beside its name, so that half a disk is never one.
    fn make(&self, most_mb: u64, alone: &Alone) -> Result<(), Error> {
        let fresh = self.state.join("disk.new");
        let file = File::create(&fresh).map_err(at(&fresh))?;
        file.set_len(most_mb.saturating_mul(1 << 20))
            .map_err(at(&fresh))?;
        let mut words: Vec<&OsStr> = [
            // Without a journal, which would take space and time: after a crash the disk is checked as a whole.
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-m",
            "0",
            "-b",
            "4096",
            "-i",
            "8192",
            "-E",
            "nodiscard,lazy_itable_init=1",
        ]
        .map(OsStr::new)
        .into();
        words.push(fresh.as_os_str());
        alone.run("mke2fs", &words)?;
        std::fs::rename(&fresh, self.file()).map_err(at(&fresh))
    }

    /// Whether it has, or after mending had, no fault.
    fn is_sound(&self, alone: &Alone) -> Result<bool, Error> {
        let (code, said) = alone.ends("e2fsck", &["-p".as_ref(), self.file().as_ref()])?;
        // 1 and 2: there were faults, and they are mended.
        let sound = matches!(code, 0..=2);
        if !sound {
            tracing::warn!(code, said, "the disk {}", self.file().display());
        }
        Ok(sound)
    }

    fn grow(&self, most_mb: u64, alone: &Alone) -> Result<(), Error> {
        let path = self.file();
        let (code, said) = alone.ends("e2fsck", &["-f".as_ref(), "-p".as_ref(), path.as_ref()])?;
        if !matches!(code, 0..=2) {
            return Err(Error::Failed {
                program: "e2fsck",
                said,
            });
        }
        let file = File::options().write(true).open(&path).map_err(at(&path))?;
        file.set_len(most_mb.saturating_mul(1 << 20))
            .map_err(at(&path))?;
        alone.run("resize2fs", &[path.as_ref()])
    }
}

/// Whoever has this is alone with a disk. Nobody has it for longer than a few programs take. These have it as well, by their
/// standard input, which none of them reads: a spawner that is killed leaves them at work, and two that check, grow or mount one
/// disk at a time would ruin it.
struct Alone(File);

impl Alone {
    fn run(&self, program: &'static str, words: &[&OsStr]) -> Result<(), Error> {
        succeeded(program, self.ends(program, words)?)
    }

    fn ends(&self, program: &'static str, words: &[&OsStr]) -> Result<(i32, String), Error> {
        let lock = self.0.try_clone();
        let lock = lock.map_err(|error| Error::Start(program, error))?;
        ends_with(program, words, lock.into())
    }
}

fn is_state(folder: &Path) -> bool {
    folder
        .file_name()
        .is_some_and(|name| name.as_encoded_bytes().ends_with(b"~"))
}

pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Folder { path, source }
}

/// The size of what the folder is on, in MiB: no disk in it is larger.
fn machine_mb(folder: &Path) -> Result<u64, Error> {
    let stat = rustix::fs::statvfs(folder).map_err(|error| at(folder)(error.into()))?;
    Ok(stat.f_blocks.saturating_mul(stat.f_frsize) >> 20)
}

/// The loop device of a file, if it has one: something here, or a container, has it mounted.
fn attached(file: &Path) -> Result<Option<PathBuf>, Error> {
    if std::fs::symlink_metadata(file).is_err() {
        return Ok(None);
    }
    let words: [&OsStr; 5] = [
        "--noheadings".as_ref(),
        "--output".as_ref(),
        "NAME".as_ref(),
        "--associated".as_ref(),
        file.as_ref(),
    ];
    let (code, said) = ends("losetup", &words)?;
    if code != 0 {
        return Err(Error::Failed {
            program: "losetup",
            said,
        });
    }
    Ok(said.lines().next().map(|line| line.trim().into()))
}

fn umount(folder: &Path) -> Result<(), Error> {
    run("umount", &[folder.as_ref()])
}

fn succeeded(program: &'static str, (code, said): (i32, String)) -> Result<(), Error> {
    match code {
        0 => Ok(()),
        _ => Err(Error::Failed { program, said }),
    }
}

fn run(program: &'static str, words: &[&OsStr]) -> Result<(), Error> {
    succeeded(program, ends(program, words)?)
}

fn ends(program: &'static str, words: &[&OsStr]) -> Result<(i32, String), Error> {
    ends_with(program, words, Stdio::null())
}

/// Runs a program to its end, within bounds: its exit code, and what it said.
fn ends_with(
    program: &'static str,
    words: &[&OsStr],
    input: Stdio,
) -> Result<(i32, String), Error> {
    let output = bounded(program, words)
        .stdin(input)
        .output()
        .map_err(|error| Error::Start("timeout", error))?;
    let code = output.status.code().unwrap_or(-1);
    if code == 127 {
        return Err(Error::Start(program, io::ErrorKind::NotFound.into()));
    }
    let said = [output.stdout, output.stderr].concat();
    Ok((code, String::from_utf8_lossy(&said).trim().to_owned()))
}

fn bounded(program: &'static str, words: &[&OsStr]) -> Command {
    let mut command = Command::new("timeout");
    command
        .args(["--kill-after=5", PROGRAM_S, program])
        .args(words)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C");
    command
}

/// The loop device of a file that is to grow; none when the kernel has let go of it, which it does a moment after the last mount is
/// gone, or later where somebody just looks at the device. What a container has mounted stays.
fn freed(file: &Path) -> Result<Option<PathBuf>, Error> {
    let until = Instant::now() + FREED;
    loop {
        let device = attached(file)?;
        if device.is_none() || Instant::now() >= until {
            return Ok(device);
        }
        // Everything here blocks, on threads that are for that.
        #[allow(clippy::disallowed_methods)]
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Where something is mounted in a folder, the innermost first.
fn mounts_under(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let Ok(folder) = folder.canonicalize() else {
        return Ok(Vec::new());
    };
    let table = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(table).map_err(at(table))?;
    let mut found: Vec<PathBuf> = text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(plain)
        .filter(|path| path.starts_with(&folder))
        .collect();
    found.sort();
    found.reverse();
    Ok(found)
}

/// A path as the kernel writes it there: what would part the words is a backslash and three octal digits.
pub(crate) fn plain(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((first, after)) = rest.split_first() {
        let code = after.get(..3).filter(|_| *first == b'\\');
        let code = code.and_then(|code| std::str::from_utf8(code).ok());
        let byte = code.and_then(|code| u8::from_str_radix(code, 8).ok());
        rest = if byte.is_some() { &after[3..] } else { after };
        bytes.push(byte.unwrap_or(*first));
    }
    std::ffi::OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_found_whatever_its_path_has_in_it() {
        assert_eq!(plain(b"/a\\040b/c\\134d"), Path::new("/a b/c\\d"));
        assert_eq!(plain(b"/a\\04"), Path::new("/a\\04"));
        assert!(is_state(Path::new("/w/p/j/one~")));
        assert!(!is_state(Path::new("/w/p/j/one")));
    }

    /// A home where disks can be made. Where they cannot, a test fails that needs them, and says what is missing.
    fn home() -> tempfile::TempDir {
        let home = tempfile::tempdir().unwrap();
        if let Err(error) = try_out(&trial(home.path())) {
            panic!("disks are tried as root, with loop devices: {error}");
        }
        home
    }

    #[test]
    fn a_disk_takes_no_more_than_its_size_keeps_what_is_on_it_and_can_grow() {
        let home = home();
        let image = Image::of(&places::workspaces(home.path()).join("p/j/one~"));
        image.mount(16).unwrap();
        image.mount(16).unwrap();
        assert!(!image.is_full());
        let file = image.folder().join("file");
        let refused = std::fs::write(&file, vec![1; 32 << 20]).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        assert!(image.is_full());
        std::fs::write(&file, "kept").unwrap();
        image.unmount().unwrap();
        image.unmount().unwrap();
        assert!(!file.exists());
        image.mount(32).unwrap();
        assert_eq!(image.size_mb(), 32);
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
        std::fs::write(image.folder().join("more"), vec![1; 20 << 20]).unwrap();
        image.mount(8).unwrap();
        assert_eq!(image.size_mb(), 32, "what is on it is not cut off");
        image.renew(8).unwrap();
        assert!(!file.exists());
        assert_eq!(image.size_mb(), 8);
        image.unmount().unwrap();
        let path = image.file();
        assert_eq!(freed(&path).unwrap(), None);
    }

    #[test]
    fn a_disk_becomes_anothers_with_what_is_on_it_unless_that_has_one() {
        let home = home();
        let [waits, task] = ["pool/a", "one~"].map(|name| Image::of(&home.path().join(name)));
        waits.mount(8).unwrap();
        std::fs::create_dir(waits.waiting()).unwrap();
        assert!(task.take_over(&waits).unwrap());
        assert!(!waits.is_mounted() && !waits.exists());
        task.mount(8).unwrap();
        assert!(task.waiting().exists());
        waits.mount(8).unwrap();
        assert!(!task.take_over(&waits).unwrap());
        assert!(waits.is_mounted() && waits.exists());
        unmount_all(home.path()).unwrap();
        assert_eq!(freed(&task.file()).unwrap(), None);
    }

    #[test]
    fn a_disk_that_is_broken_is_set_aside() {
        let home = home();
        let state = home.path().join("one~");
        std::fs::create_dir(&state).unwrap();
        std::fs::write(state.join("disk.img"), "no disk").unwrap();
        let image = Image::of(&state);
        image.mount(8).unwrap();
        std::fs::write(image.folder().join("file"), "").unwrap();
        image.unmount().unwrap();
        let aside = std::fs::read_to_string(state.join("broken.img"));
        assert_eq!(aside.unwrap(), "no disk");
    }

    #[test]
    fn a_mount_that_a_dead_spawner_left_is_undone_and_one_that_is_in_use_is_not() {
        let home = home();
        let job = places::workspaces(home.path()).join("p/a job");
        let [left, used] = ["left~", "used~"].map(|name| Image::of(&job.join(name)));
        for image in [&left, &used] {
            image.mount(8).unwrap();
        }
        let lock = File::create(used.state.join("lock")).unwrap();
        lock.lock().unwrap();
        assert_eq!(sweep(home.path()).unwrap(), 1);
        assert!(!left.is_mounted() && left.exists());
        assert!(used.is_mounted());
        drop(lock);
        // A project that is removed takes its mounts along.
        crate::remove_workspaces(home.path(), "p").unwrap();
        assert!(!job.exists());
        assert_eq!(mounts_under(home.path()).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn spawners_of_one_home_try_at_the_same_time_and_what_one_leaves_is_undone() {
        let home = home();
        let tries = [(); 4].map(|()| {
            let trial = trial(home.path());
            std::thread::spawn(move || try_out(&trial))
        });
        for tried in tries {
            tried.join().unwrap().unwrap();
        }
        let left = trial(home.path());
        Image::of(&left).mount(TRIAL_MB).unwrap();
        assert_eq!(sweep(home.path()).unwrap(), 1);
        assert_eq!(mounts_under(home.path()).unwrap(), Vec::<PathBuf>::new());
    }

    #[test]
    fn a_program_that_outlives_its_spawner_keeps_everybody_from_its_disk() {
        let folder = tempfile::tempdir().unwrap();
        let alone = Image::of(folder.path()).alone().unwrap();
        let waits = "while [ ! -e go ]; do sleep 0.02; done";
        let mut program = {
            let mut command = bounded("sh", &["-c".as_ref(), waits.as_ref()]);
            command.current_dir(folder.path());
            command.stdin(alone.0.try_clone().unwrap()).spawn().unwrap()
        };
        // As when we are killed.
        drop(alone);
        let next = File::open(folder.path()).unwrap();
        assert!(next.try_lock().is_err());
        std::fs::write(folder.path().join("go"), "").unwrap();
        assert!(program.wait().unwrap().success());
        next.try_lock().unwrap();
    }
}
