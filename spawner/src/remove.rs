//! Removes what a worker left, whatever it did to keep it.
//!
//! A tree may be many thousand folders deep, or closed to its own owner. So nothing here goes down a level in memory or in
//! open files: a folder that is not empty is lifted to the top of the tree, and emptied there.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::path::Arg;
use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

/// How often a folder is emptied that has something new in it every time.
const TRIES: usize = 8;

/// Removes a file, a link or a whole folder; nothing there is fine. Links are not followed. Blocks.
pub(crate) fn remove_any(path: &Path) -> io::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => remove_tree(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Lets us into a folder of ours that is closed even to us. A link is not followed, and what is no folder stays as it is.
pub(crate) fn let_us_in(folder: &Path) -> io::Result<()> {
    match open(CWD, folder) {
        Ok(_) | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn remove_tree(path: &Path) -> io::Result<()> {
    let top = open(CWD, path)?;
    // Nobody can have put something of this name there.
    let prefix = hex::encode(rand::random::<[u8; 16]>());
    let mut lifted: u64 = 0;
    let mut waiting = empty(&top)?;
    while let Some(name) = waiting.pop() {
        let mut tries = 0;
        loop {
            let folder = open(&top, name.as_c_str())?;
            for child in empty(&folder)? {
                // A folder that is closed cannot be moved.
                drop(open(&folder, child.as_c_str())?);
                lifted += 1;
                let aside = CString::new(format!("{prefix}-{lifted}"))?;
                rustix::fs::renameat(&folder, child.as_c_str(), &top, aside.as_c_str())?;
                waiting.push(aside);
            }
            tries += 1;
            match rustix::fs::unlinkat(&top, name.as_c_str(), AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => break,
                Err(Errno::NOTEMPTY | Errno::EXIST) if tries < TRIES => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    drop(top);
    match std::fs::remove_dir(path) {
        // Something came in while the first look at it lasted.
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
            std::fs::remove_dir_all(path)
        }
        removed => removed,
    }
}

/// Removes what is in a folder but folders that are not empty, whose names it gives.
fn empty(folder: &OwnedFd) -> io::Result<Vec<CString>> {
    let mut left = Vec::new();
    let mut entries = Dir::read_from(folder)?;
    while let Some(entry) = entries.read() {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let file = match entry.file_type() {
            FileType::Directory => Err(Errno::ISDIR),
            _ => rustix::fs::unlinkat(folder, name, AtFlags::empty()),
        };
        match file {
            Ok(()) | Err(Errno::NOENT) => continue,
            Err(Errno::ISDIR | Errno::PERM) => {}
            Err(error) => return Err(error.into()),
        }
        match rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(Errno::NOTEMPTY | Errno::EXIST) => left.push(name.to_owned()),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(left)
}

/// Opens a folder, through no link, and lets us in where it was closed to us.
fn open(at: impl AsFd, name: impl Arg + Copy) -> rustix::io::Result<OwnedFd> {
    let real = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let at = at.as_fd();
    let place = rustix::fs::openat(at, name, real | OFlags::PATH, Mode::empty())?;
    let mode = Mode::from_raw_mode(rustix::fs::fstat(&place)?.st_mode);
    if !mode.contains(Mode::RWXU) {
        // The place itself, whatever its name stands for by now. It is another one's when this fails, and then we may need no leave.
        let place = format!("/proc/self/fd/{}", place.as_raw_fd());
        let _ = rustix::fs::chmod(place, mode | Mode::RWXU);
    }
    rustix::fs::openat(at, name, real | OFlags::RDONLY, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    /// A chain of folders with something in each of them, deeper than any path can say.
    fn dig(top: &Path, levels: usize) {
        std::fs::create_dir(top).unwrap();
        let mut here = open(CWD, top).unwrap();
        for _ in 0..levels {
            rustix::fs::mkdirat(&here, "deeper", Mode::RWXU).unwrap();
            rustix::fs::symlinkat("/etc/passwd", &here, "link").unwrap();
            here = open(&here, "deeper").unwrap();
        }
    }

    #[test]
    fn however_deep_it_is_it_goes_and_takes_no_room_for_that() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("deep");
        // A level of open files or of calls each would be the end of the process, or of its other work.
        dig(&deep, 3_000);
        let outside = folder.path().join("outside");
        std::fs::create_dir_all(outside.join("kept")).unwrap();
        std::os::unix::fs::symlink(&outside, deep.join("link-out")).unwrap();
        std::fs::create_dir_all(deep.join("wide/a/b")).unwrap();
        std::fs::write(deep.join("wide/a/b/file"), "x").unwrap();
        remove_any(&deep).unwrap();
        assert!(!deep.exists());
        assert!(outside.join("kept").exists(), "no link was followed");
        remove_any(&deep).unwrap();
    }

    #[test]
    fn what_is_closed_to_its_owner_goes_as_well() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let closed = folder.path().join("closed");
        let work = move || {
            // Root is kept out by nothing, so somebody else tries; this is the thread's identity alone.
            let me = rustix::process::geteuid();
            let somebody = if me.is_root() {
                rustix::process::Uid::from_raw(61_234)
            } else {
                me
            };
            rustix::thread::set_thread_res_uid(somebody, somebody, somebody).unwrap();
            std::fs::create_dir_all(closed.join("a/b/c")).unwrap();
            std::fs::write(closed.join("a/b/c/file"), "x").unwrap();
            for path in ["a/b/c", "a/b", "a", ""] {
                let mode = std::fs::Permissions::from_mode(0o000);
                std::fs::set_permissions(closed.join(path), mode).unwrap();
            }
            assert!(std::fs::read_dir(&closed).is_err(), "it is closed");
            let_us_in(&closed).unwrap();
            assert!(std::fs::read_dir(&closed).is_ok());
            remove_any(&closed).unwrap();
            assert!(std::fs::symlink_metadata(&closed).is_err());
        };
        std::thread::spawn(work).join().unwrap();
    }
}
