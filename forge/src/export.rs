//! Writes the files of a commit into a folder, exactly as they were committed: no attributes, filters or hooks are
//! consulted, nothing is written outside of the folder, and no link in it leads out.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use ports::Sha;

use crate::repo::Repo;
use crate::trees::{Entry, Mode};
use crate::{Error, check_names};

/// How many files are written out at most.
const MAX_FILES: usize = 50_000;
/// How many bytes are written out at most.
const MAX_BYTES: u64 = 1 << 30;
/// How large one file may be.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// How many bytes are in memory at once, but for a single larger file.
const BATCH_BYTES: u64 = 16 << 20;
const BATCH_FILES: usize = 1000;

/// Writes the files of `sha` into `folder`, which must exist and be empty. Submodules become empty folders.
pub(crate) async fn export(repo: &Repo, sha: &Sha, folder: &Path) -> Result<(), Error> {
    repo.need_commit(sha).await?;
    let mut entries = repo.entries(sha.as_str()).await?;
    check(sha, &entries)?;
    // Links last, so that nothing can be written through them.
    entries.sort_by_key(|entry| entry.mode == Mode::Symlink);
    let mut rest = entries.as_slice();
    while !rest.is_empty() {
        let (batch, after) = rest.split_at(batch_len(rest));
        rest = after;
        let names = batch
            .iter()
            .filter(|entry| entry.mode != Mode::Submodule)
            .map(|entry| entry.object.as_str());
        let mut contents = repo.objects(names).await?.into_iter();
        for entry in batch {
            let content = if entry.mode == Mode::Submodule {
                Vec::new()
            } else {
                contents
                    .next()
                    .flatten()
                    .ok_or_else(|| Error::NoCommit(sha.clone()))?
            };
            write(sha, folder, entry, &content)?;
        }
        tokio::task::yield_now().await;
    }
    Ok(())
}

fn batch_len(entries: &[Entry]) -> usize {
    let mut bytes = 0;
    let fitting = entries.iter().take(BATCH_FILES).take_while(|entry| {
        bytes += entry.size;
        bytes <= BATCH_BYTES
    });
    fitting.count().max(1)
}

fn check(sha: &Sha, entries: &[Entry]) -> Result<(), Error> {
    let too_large = |size: String, limit: String| Error::TooLarge {
        what: format!("the repository at {sha}"),
        size,
        limit,
    };
    if entries.len() > MAX_FILES {
        let size = format!("{} files", entries.len());
        return Err(too_large(size, format!("{MAX_FILES} files")));
    }
    let mut bytes = 0_u64;
    for entry in entries {
        let path = String::from_utf8_lossy(&entry.path);
        if let Some(reason) = check_names::path_fault(&path) {
            return Err(hostile(sha, entry, reason));
        }
        if entry.size > MAX_FILE_BYTES {
            return Err(Error::TooLarge {
                what: path.into_owned(),
                size: format!("{} bytes", entry.size),
                limit: format!("{MAX_FILE_BYTES} bytes"),
            });
        }
        bytes = bytes.saturating_add(entry.size);
    }
    if bytes > MAX_BYTES {
        return Err(too_large(
            format!("{bytes} bytes"),
            format!("{MAX_BYTES} bytes"),
        ));
    }
    Ok(())
}

fn hostile(sha: &Sha, entry: &Entry, reason: &'static str) -> Error {
    Error::Hostile {
        sha: sha.clone(),
        path: String::from_utf8_lossy(&entry.path)
            .chars()
            .take(200)
            .collect(),
        reason,
    }
}

fn write(sha: &Sha, folder: &Path, entry: &Entry, content: &[u8]) -> Result<(), Error> {
    let path = folder.join(std::ffi::OsStr::from_bytes(&entry.path));
    let failed = |source| Error::io("writing", &path)(source);
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match entry.mode {
        Mode::File => create(&path, 0o644, content).map_err(failed),
        Mode::Executable => create(&path, 0o755, content).map_err(failed),
        Mode::Submodule => std::fs::create_dir_all(&path).map_err(failed),
        Mode::Symlink => {
            let depth = entry.path.split(|byte| *byte == b'/').count() - 1;
            if let Some(reason) = link_fault(content, depth) {
                return Err(hostile(sha, entry, reason));
            }
            let target = PathBuf::from(std::ffi::OsStr::from_bytes(content));
            std::os::unix::fs::symlink(target, &path).map_err(failed)
        }
    }
}

fn create(path: &Path, mode: u32, content: &[u8]) -> std::io::Result<()> {
    let mut file: File = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)?;
    file.write_all(content)
}

/// Why a link must not be written. `..` may only stand at the beginning, where it is counted against the depth of real
/// folders: behind another link it could lead anywhere.
fn link_fault(target: &[u8], depth: usize) -> Option<&'static str> {
    if target.is_empty() || target.contains(&0) || target.len() > 4000 {
        return Some("is a link to no usable path");
    }
    if target.starts_with(b"/") {
        return Some("is a link to an absolute path");
    }
    let parts = || {
        target
            .split(|byte| *byte == b'/')
            .filter(|part| !part.is_empty() && *part != b".")
    };
    let ups = parts().take_while(|part| *part == b"..").count();
    if ups > depth || parts().skip(ups).any(|part| part == b"..") {
        return Some("is a link that may lead out of the repository");
    }
    if parts().any(|part| part.eq_ignore_ascii_case(b".git")) {
        return Some("is a link into Git's own folder");
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_never_leads_out() {
        for (target, depth) in [
            ("a", 0),
            ("./a/b", 0),
            ("../a", 1),
            ("../../a", 2),
            (".", 0),
            ("..", 1),
        ] {
            assert_eq!(link_fault(target.as_bytes(), depth), None, "{target}");
        }
        for (target, depth) in [
            ("/etc/passwd", 5),
            ("..", 0),
            ("../a", 0),
            ("../../a", 1),
            ("a/../../b", 1),
            ("a/../b", 3),
            ("./..", 0),
            ("", 0),
            ("a\0b", 0),
            (".git/config", 0),
        ] {
            assert!(link_fault(target.as_bytes(), depth).is_some(), "{target}");
        }
    }
}
