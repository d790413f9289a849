//! How much room directories take.

use std::ffi::OsString;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// More entries than this are not looked at.
const MOST_ENTRIES: usize = 2_000_000;

/// MiB on disk under a folder: of what can be looked at, so at least so many. Links are not followed. Blocks.
pub fn used_mb(folder: &Path) -> u64 {
    measure(&[folder.to_owned()], MOST_ENTRIES).bytes >> 20
}

/// Whether a folder has more than so many MiB on disk. One in which something cannot be counted, because there are more than two
/// million entries or a path is too long for the system, counts as larger than anything: whoever works there would else be
/// bounded by nothing. Links are not followed. Blocks.
pub fn exceeds_mb(folder: &Path, most_mb: u64) -> bool {
    exceeds(&[folder.to_owned()], most_mb.saturating_mul(1 << 20))
}

/// Whether the paths together have more than so many bytes on disk, as in [`exceeds_mb`].
pub(crate) fn exceeds(roots: &[PathBuf], most: u64) -> bool {
    let measured = measure(roots, MOST_ENTRIES);
    measured.bytes > most || !measured.whole
}

struct Measured {
    bytes: u64,
    /// Whether everything was looked at.
    whole: bool,
}

fn measure(roots: &[PathBuf], most_entries: usize) -> Measured {
    // A folder that waits shares the path of the one that it is in, so that two million of them fit into memory.
    let mut waiting: Vec<(Arc<Path>, OsString)> = Vec::new();
    let mut measured = Measured {
        bytes: 0,
        whole: true,
    };
    for root in roots {
        if visit(root, &mut measured) {
            waiting.push((root.as_path().into(), OsString::new()));
        }
    }
    let mut seen = 0;
    while let Some((parent, name)) = waiting.pop() {
        let folder: Arc<Path> = if name.is_empty() {
            parent
        } else {
            parent.join(name).into()
        };
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            seen += 1;
            if seen > most_entries {
                measured.whole = false;
                return measured;
            }
            if visit(&entry.path(), &mut measured) {
                waiting.push((Arc::clone(&folder), entry.file_name()));
            }
        }
    }
    measured
}

/// Counts an entry; whether it is a folder.
fn visit(path: &Path, measured: &mut Measured) -> bool {
    match std::fs::symlink_metadata(path) {
        Ok(meta) => {
            measured.bytes = measured.bytes.saturating_add(meta.blocks() * 512);
            meta.is_dir()
        }
        Err(error) => {
            if error.kind() == io::ErrorKind::InvalidFilename {
                measured.whole = false;
            }
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat};

    #[test]
    fn what_cannot_be_counted_is_more_than_anything() {
        let folder = tempfile::tempdir().expect("directory");
        for n in 0..20 {
            std::fs::write(folder.path().join(n.to_string()), "x").expect("written");
        }
        let roots = [folder.path().to_owned()];
        assert!(measure(&roots, 20).whole);
        assert!(!measure(&roots, 19).whole);
        assert!(!exceeds_mb(folder.path(), 1));
        // Deeper than a path can say.
        let mut here = openat(
            CWD,
            folder.path(),
            OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .expect("open");
        for _ in 0..30 {
            let name = "d".repeat(200);
            mkdirat(&here, &name, Mode::RWXU).expect("made");
            here = openat(
                &here,
                &name,
                OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .expect("open");
        }
        assert!(exceeds_mb(folder.path(), 1));
        assert_eq!(used_mb(folder.path()), 0);
    }
}
