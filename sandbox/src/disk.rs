//! How much room directories take.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// More entries than this are not looked at.
const MOST_ENTRIES: usize = 500_000;

/// MiB on disk under a folder; links are not followed, and of more than half a million entries only so many are looked at.
/// Blocks.
pub fn used_mb(folder: &Path) -> u64 {
    used_bytes(&[folder.to_owned()]) >> 20
}

/// Bytes on disk under the paths together; links are not followed. Blocks.
pub(crate) fn used_bytes(roots: &[PathBuf]) -> u64 {
    let mut waiting: Vec<PathBuf> = Vec::new();
    let mut bytes = 0;
    for root in roots {
        visit(root, &mut waiting, &mut bytes);
    }
    let mut seen = 0;
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
            seen += 1;
            if seen > MOST_ENTRIES {
                return bytes;
            }
            visit(&entry.path(), &mut waiting, &mut bytes);
        }
    }
    bytes
}

fn visit(path: &Path, waiting: &mut Vec<PathBuf>, bytes: &mut u64) {
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        *bytes += meta.blocks() * 512;
        if meta.is_dir() {
            waiting.push(path.to_owned());
        }
    }
}
