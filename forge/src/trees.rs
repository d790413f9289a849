//! Trees: what is in them, and new ones out of changed files.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use ports::{FileChange, Sha};

use crate::repo::{NONE, Repo};
use crate::{Error, check_names};

/// How many files one commit may change.
const MAX_CHANGED_FILES: usize = 10_000;
/// How many bytes one commit may bring.
const MAX_CHANGED_BYTES: usize = 64 << 20;

/// One entry of a tree, with its full path.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub mode: Mode,
    pub object: String,
    /// Of blobs.
    pub size: u64,
    /// As Git has it: bytes.
    pub path: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    File,
    Executable,
    Symlink,
    Submodule,
}

impl Repo {
    /// Every entry of a commit or tree that is no tree itself, in Git's order.
    pub(crate) async fn entries(&self, treeish: &str) -> Result<Vec<Entry>, Error> {
        let output = self
            .git
            .call(["ls-tree", "-r", "-z", "-l", "--full-tree", treeish])
            .ok()
            .await?;
        parse(&output)
    }

    /// The entry at a path of a commit, when it is no tree.
    pub(crate) async fn entry(&self, commit: &Sha, path: &str) -> Result<Option<Entry>, Error> {
        let output = self
            .git
            .call([
                "ls-tree",
                "-z",
                "-l",
                "--full-tree",
                commit.as_str(),
                "--",
                path,
            ])
            .ok()
            .await?;
        if output.windows(6).any(|word| word == b" tree ") && output.starts_with(b"040000") {
            return Ok(None);
        }
        Ok(parse(&output)?.into_iter().next())
    }

    /// The tree of `base` with files changed.
    pub(crate) async fn tree_with(
        &self,
        base: &Sha,
        files: &[FileChange],
    ) -> Result<String, Error> {
        check(files)?;
        let scratch = Scratch::new(&self.scratch)?;
        let index = scratch.path().join("index");
        self.git
            .call(["read-tree", base.as_str()])
            .env("GIT_INDEX_FILE", &index)
            .ok()
            .await?;
        let blobs = self.write_blobs(scratch.path(), files).await?;
        let modes: HashMap<Vec<u8>, Mode> = self
            .entries(base.as_str())
            .await?
            .into_iter()
            .map(|entry| (entry.path, entry.mode))
            .collect();
        let mut lines = String::new();
        // Deletions first, so that a file can make way for a folder of its name.
        for file in files.iter().filter(|file| file.content.is_none()) {
            let _ = write!(lines, "0 {NONE}\t{}\0", file.path);
        }
        let written = files
            .iter()
            .filter_map(|file| Some((file, file.content.as_ref()?)));
        for ((file, content), blob) in written.zip(blobs) {
            let mode = match modes.get(file.path.as_bytes()) {
                Some(Mode::Executable) => "100755",
                Some(Mode::File) => "100644",
                _ if content.starts_with("#!") => "100755",
                _ => "100644",
            };
            let _ = write!(lines, "{mode} {blob}\t{}\0", file.path);
        }
        self.git
            .call(["update-index", "--add", "--replace", "-z", "--index-info"])
            .env("GIT_INDEX_FILE", &index)
            .stdin(lines)
            .ok()
            .await?;
        self.git
            .call(["write-tree"])
            .env("GIT_INDEX_FILE", &index)
            .line()
            .await
    }

    /// Writes the contents of all files that have one, in order.
    async fn write_blobs(
        &self,
        scratch: &Path,
        files: &[FileChange],
    ) -> Result<Vec<String>, Error> {
        let mut paths = String::new();
        let mut count = 0_usize;
        for content in files.iter().filter_map(|file| file.content.as_ref()) {
            let path = scratch.join(count.to_string());
            std::fs::write(&path, content).map_err(Error::io("writing", &path))?;
            paths.push_str(&path.to_string_lossy());
            paths.push('\n');
            count += 1;
        }
        if count == 0 {
            return Ok(Vec::new());
        }
        let output = self
            .git
            .call(["hash-object", "-w", "--no-filters", "--stdin-paths"])
            .stdin(paths)
            .line()
            .await?;
        let blobs: Vec<String> = output.lines().map(str::to_owned).collect();
        if blobs.len() == count {
            Ok(blobs)
        } else {
            Err(Error::Unexpected {
                command: "hash-object",
                said: format!("{} ids for {count} files", blobs.len()),
            })
        }
    }
}

fn check(files: &[FileChange]) -> Result<(), Error> {
    let too_large = |size: String, limit: String| Error::TooLarge {
        what: "the commit".to_owned(),
        size,
        limit,
    };
    if files.len() > MAX_CHANGED_FILES {
        return Err(too_large(
            format!("{} files", files.len()),
            format!("{MAX_CHANGED_FILES} files"),
        ));
    }
    let mut seen = HashSet::new();
    let mut bytes = 0;
    for file in files {
        check_names::path(&file.path)?;
        if !seen.insert(file.path.as_str()) {
            return Err(Error::Name {
                what: "the path",
                name: file.path.chars().take(100).collect(),
                reason: "it is changed twice in one commit",
            });
        }
        bytes += file.content.as_ref().map_or(0, String::len);
    }
    if bytes > MAX_CHANGED_BYTES {
        return Err(too_large(
            format!("{bytes} bytes"),
            format!("{MAX_CHANGED_BYTES} bytes"),
        ));
    }
    Ok(())
}

/// `{mode} {type} {object} {size}\t{path}\0`
fn parse(output: &[u8]) -> Result<Vec<Entry>, Error> {
    output
        .split(|byte| *byte == 0)
        .filter(|record| !record.is_empty())
        .map(|record| {
            parse_entry(record).ok_or_else(|| Error::Unexpected {
                command: "ls-tree",
                said: String::from_utf8_lossy(&record[..record.len().min(200)]).into_owned(),
            })
        })
        .collect()
}

fn parse_entry(record: &[u8]) -> Option<Entry> {
    let tab = record.iter().position(|byte| *byte == b'\t')?;
    let mut fields = std::str::from_utf8(&record[..tab])
        .ok()?
        .split_ascii_whitespace();
    let mode = match fields.next()? {
        "120000" => Mode::Symlink,
        "160000" => Mode::Submodule,
        "100755" => Mode::Executable,
        mode if mode.starts_with("100") => Mode::File,
        _ => return None,
    };
    let _kind = fields.next()?;
    let object = fields.next()?.to_owned();
    let size = match fields.next()? {
        "-" => 0,
        size => size.parse().ok()?,
    };
    Some(Entry {
        mode,
        object,
        size,
        path: record[tab + 1..].to_vec(),
    })
}

/// A folder that goes when its owner goes; what a killed process leaves is swept later.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(parent: &Path) -> Result<Self, Error> {
        let path = parent.join(uuid::Uuid::new_v4().simple().to_string());
        std::fs::create_dir_all(&path).map_err(Error::io("making", &path))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if remove_all(&self.0).is_err() {
            tracing::warn!(folder = %self.0.display(), "a scratch folder could not be removed; it is swept later");
        }
    }
}

/// Removes a folder, even when what ran in it took away the rights to do so.
pub(crate) fn remove_all(folder: &Path) -> std::io::Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            open_up(folder, 64);
            std::fs::remove_dir_all(folder)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn open_up(folder: &Path, depth: u32) {
    use std::os::unix::fs::PermissionsExt;
    let _ = std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o700));
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        // The type of the entry itself: links are not followed.
        if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path(), depth - 1);
        }
    }
}
