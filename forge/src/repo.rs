//! One bare repository: refs and objects, in the words that the operations use.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use jiff::Timestamp;
use ports::{ProjectId, Sha};

use crate::git::{Git, IDENT};
use crate::lock::Lock;
use crate::{DEFAULT_BRANCH, Error};

/// A lock file of Git's that is older than this was left by a Git that was killed: refs are held for milliseconds.
const STALE_LOCK: Duration = Duration::from_secs(30);
/// How often a ref that somebody else holds is tried again, a tenth of a second apart.
const REF_TRIES: u32 = 50;
/// The object that is not there.
pub(crate) const NONE: &str = "0000000000000000000000000000000000000000";

/// A project's repository; with a lock when something is to be changed.
pub(crate) struct Repo {
    pub(crate) git: Git,
    pub(crate) project: ProjectId,
    /// Where short-lived files go.
    pub(crate) scratch: PathBuf,
    /// Held as long as this is, when something is to be changed.
    pub(crate) lock: Option<Lock>,
}

/// One ref that changes.
pub(crate) enum RefChange {
    /// To `new`, if it is at `old`; `None` means that it must not exist.
    Move {
        name: String,
        new: String,
        old: Option<String>,
    },
    /// To `new`, wherever it was.
    Set { name: String, new: String },
    /// Stays, but must be at `at`.
    Verify { name: String, at: String },
}

/// A commit to be written.
pub(crate) struct NewCommit<'a> {
    pub tree: &'a str,
    pub parents: &'a [&'a Sha],
    pub message: &'a str,
}

/// A commit as it is stored.
pub(crate) struct RawCommit {
    pub sha: Sha,
    pub tree: String,
    pub parents: Vec<Sha>,
    /// The author's line, without its name.
    author: Vec<u8>,
    encoding: Option<Vec<u8>>,
    message: Vec<u8>,
}

impl Repo {
    pub(crate) fn path(&self) -> &Path {
        self.git.repository()
    }

    /// Where a ref points; `None` when there is no such ref.
    pub(crate) async fn reference(&self, name: &str) -> Result<Option<Sha>, Error> {
        let answer = self
            .git
            .call(["rev-parse", "--verify", "--quiet", name])
            .run()
            .await?;
        match answer.code {
            0 => {
                let sha = String::from_utf8_lossy(&answer.stdout).trim().to_owned();
                Ok(Some(Sha::new(sha)))
            }
            // Nothing else counts as missing: a Git that was killed has not looked.
            1 => Ok(None),
            _ => Err(answer.failed()),
        }
    }

    pub(crate) async fn branch(&self, name: &str) -> Result<Option<Sha>, Error> {
        self.reference(&branch_ref(name)).await
    }

    /// The tip of the default branch.
    pub(crate) async fn tip(&self) -> Result<Sha, Error> {
        self.branch(DEFAULT_BRANCH)
            .await?
            .ok_or_else(|| Error::NoBranch(DEFAULT_BRANCH.to_owned()))
    }

    /// Fails unless the repository holds this commit.
    pub(crate) async fn need_commit(&self, sha: &Sha) -> Result<(), Error> {
        crate::check_names::sha(sha)?;
        let answer = self
            .git
            .call(["cat-file", "-t", sha.as_str()])
            .run()
            .await?;
        match answer.code {
            0 if answer.stdout.trim_ascii() == b"commit" => Ok(()),
            0 | 128 => Err(Error::NoCommit(sha.clone())),
            _ => Err(answer.failed()),
        }
    }

    pub(crate) async fn is_ancestor(&self, ancestor: &Sha, of: &Sha) -> Result<bool, Error> {
        let answer = self
            .git
            .call([
                "merge-base",
                "--is-ancestor",
                ancestor.as_str(),
                of.as_str(),
            ])
            .run()
            .await?;
        match answer.code {
            0 => Ok(true),
            1 => Ok(false),
            _ => Err(answer.failed()),
        }
    }

    pub(crate) async fn merge_base(&self, one: &Sha, two: &Sha) -> Result<Option<Sha>, Error> {
        let answer = self
            .git
            .call(["merge-base", one.as_str(), two.as_str()])
            .run()
            .await?;
        match answer.code {
            0 => Ok(Some(Sha::new(
                String::from_utf8_lossy(&answer.stdout).trim(),
            ))),
            1 => Ok(None),
            _ => Err(answer.failed()),
        }
    }

    pub(crate) async fn tree(&self, commit: &Sha) -> Result<String, Error> {
        self.git
            .call(["rev-parse", "--verify", &format!("{commit}^{{tree}}")])
            .line()
            .await
    }

    pub(crate) async fn write_blob(&self, bytes: Vec<u8>) -> Result<String, Error> {
        self.git
            .call(["hash-object", "-w", "--stdin"])
            .stdin(bytes)
            .line()
            .await
    }

    /// Writes a commit of our own.
    pub(crate) async fn write_commit(&self, new: &NewCommit<'_>) -> Result<Sha, Error> {
        let now = Timestamp::now().as_second();
        let author = format!("{IDENT} {now} +0000");
        self.store_commit(
            new.tree,
            new.parents,
            author.as_bytes(),
            None,
            new.message.as_bytes(),
        )
        .await
    }

    /// Writes a commit like `original` with another tree and parent: its author and message stay.
    pub(crate) async fn copy_commit(
        &self,
        original: &RawCommit,
        tree: &str,
        parent: &Sha,
    ) -> Result<Sha, Error> {
        self.store_commit(
            tree,
            &[parent],
            &original.author,
            original.encoding.as_deref(),
            &original.message,
        )
        .await
    }

    async fn store_commit(
        &self,
        tree: &str,
        parents: &[&Sha],
        author: &[u8],
        encoding: Option<&[u8]>,
        message: &[u8],
    ) -> Result<Sha, Error> {
        let now = Timestamp::now().as_second();
        let mut text = format!("tree {tree}\n").into_bytes();
        for parent in parents {
            text.extend_from_slice(format!("parent {parent}\n").as_bytes());
        }
        text.extend_from_slice(b"author ");
        text.extend_from_slice(author);
        text.extend_from_slice(format!("\ncommitter {IDENT} {now} +0000\n").as_bytes());
        if let Some(encoding) = encoding {
            text.extend_from_slice(b"encoding ");
            text.extend_from_slice(encoding);
            text.push(b'\n');
        }
        text.push(b'\n');
        text.extend_from_slice(message);
        if !message.ends_with(b"\n") {
            text.push(b'\n');
        }
        let sha = self
            .git
            .call(["hash-object", "-t", "commit", "-w", "--stdin"])
            .stdin(text)
            .line()
            .await?;
        Ok(Sha::new(sha))
    }

    /// Reads commits.
    pub(crate) async fn commits(&self, shas: &[Sha]) -> Result<Vec<RawCommit>, Error> {
        let objects = self.objects(shas.iter().map(Sha::as_str)).await?;
        objects
            .into_iter()
            .zip(shas)
            .map(|(bytes, sha)| {
                bytes
                    .and_then(|bytes| parse_commit(sha, &bytes))
                    .ok_or_else(|| Error::NoCommit(sha.clone()))
            })
            .collect()
    }

    /// Reads objects, in order; `None` for what is not there. All of them are in memory at once.
    pub(crate) async fn objects<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<Option<Vec<u8>>>, Error> {
        let mut input = String::new();
        for name in names {
            input.push_str(name);
            input.push('\n');
        }
        let count = input.lines().count();
        if count == 0 {
            return Ok(Vec::new());
        }
        let output = self
            .git
            .call(["cat-file", "--batch"])
            .stdin(input)
            .limit(320 << 20)
            .ok()
            .await?;
        parse_batch(&output, count).ok_or_else(|| Error::Unexpected {
            command: "cat-file --batch",
            said: String::from_utf8_lossy(&output[..output.len().min(200)]).into_owned(),
        })
    }

    /// Changes all refs or none. `false` when one of them is not where it was expected.
    pub(crate) async fn change_refs(&self, changes: &[RefChange]) -> Result<bool, Error> {
        let mut input = Vec::new();
        for change in changes {
            let line = match change {
                RefChange::Move { name, new, old } => {
                    format!("update {name}\0{new}\0{}\0", old.as_deref().unwrap_or(NONE))
                }
                RefChange::Set { name, new } => format!("update {name}\0{new}\0\0"),
                RefChange::Verify { name, at } => format!("verify {name}\0{at}\0"),
            };
            input.extend_from_slice(line.as_bytes());
        }
        let mut tries = 0;
        loop {
            let answer = self
                .git
                .call(["update-ref", "--no-deref", "--stdin", "-z"])
                .stdin(input.clone())
                .run()
                .await?;
            if answer.code == 0 {
                return Ok(true);
            }
            tries += 1;
            if let Some(lock) = held_lock(&answer.said, self.path())
                && tries < REF_TRIES
            {
                if is_stale(&lock) {
                    tracing::warn!(lock = %lock.display(), "removing a lock that a killed Git left");
                    let _ = std::fs::remove_file(&lock);
                } else {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                continue;
            }
            let moved = [
                "but expected",
                "reference already exists",
                "unable to resolve reference",
                "reference is missing",
            ];
            if moved.iter().any(|says| answer.said.contains(says)) {
                return Ok(false);
            }
            return Err(answer.failed());
        }
    }
}

pub(crate) fn branch_ref(name: &str) -> String {
    format!("refs/heads/{name}")
}

/// The lock file that Git complains about, when it is one of this repository.
fn held_lock(said: &str, repository: &Path) -> Option<PathBuf> {
    let (_, rest) = said.split_once("Unable to create '")?;
    let (path, rest) = rest.split_once("':")?;
    let path = PathBuf::from(path);
    let ours = path.starts_with(repository) && path.extension().is_some_and(|end| end == "lock");
    (rest.contains("File exists") && ours).then_some(path)
}

fn is_stale(lock: &Path) -> bool {
    let modified = std::fs::metadata(lock).and_then(|meta| meta.modified());
    modified.is_ok_and(|at| {
        SystemTime::now()
            .duration_since(at)
            .is_ok_and(|age| age > STALE_LOCK)
    })
}

fn parse_commit(sha: &Sha, bytes: &[u8]) -> Option<RawCommit> {
    let end = bytes.windows(2).position(|pair| pair == b"\n\n")?;
    let (head, message) = (&bytes[..end], &bytes[end + 2..]);
    let mut commit = RawCommit {
        sha: sha.clone(),
        tree: String::new(),
        parents: Vec::new(),
        author: Vec::new(),
        encoding: None,
        message: message.to_vec(),
    };
    for line in head.split(|byte| *byte == b'\n') {
        let Some(space) = line.iter().position(|byte| *byte == b' ') else {
            continue;
        };
        let value = &line[space + 1..];
        match &line[..space] {
            b"tree" => commit.tree = String::from_utf8(value.to_vec()).ok()?,
            b"parent" => commit
                .parents
                .push(Sha::new(String::from_utf8(value.to_vec()).ok()?)),
            b"author" => commit.author = value.to_vec(),
            b"encoding" => commit.encoding = Some(value.to_vec()),
            // Signatures are of the original and of nothing else.
            _ => {}
        }
    }
    (!commit.tree.is_empty() && !commit.author.is_empty()).then_some(commit)
}

/// `{id} {type} {size}\n{bytes}\n`, or `{name} missing\n`, `count` times.
fn parse_batch(mut output: &[u8], count: usize) -> Option<Vec<Option<Vec<u8>>>> {
    let mut objects = Vec::with_capacity(count);
    while objects.len() < count {
        let end = output.iter().position(|byte| *byte == b'\n')?;
        let line = std::str::from_utf8(&output[..end]).ok()?;
        output = &output[end + 1..];
        if line.ends_with(" missing") {
            objects.push(None);
            continue;
        }
        let size: usize = line.rsplit(' ').next()?.parse().ok()?;
        objects.push(Some(output.get(..size)?.to_vec()));
        output = output.get(size + 1..)?;
    }
    Some(objects)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_read_object_by_object() {
        let output = b"aa blob 3\na\nb\nbb missing\ncc blob 0\n\n";
        let objects = parse_batch(output, 3).unwrap();
        assert_eq!(objects, [Some(b"a\nb".to_vec()), None, Some(Vec::new())]);
        assert_eq!(parse_batch(b"aa blob 9\nshort\n", 1), None);
    }

    #[test]
    fn only_a_lock_of_this_repository_is_ever_removed() {
        let said = "fatal: cannot lock ref 'refs/heads/x': Unable to create '/r/p.git/refs/heads/x.lock': File exists.\n\nAnother git process seems";
        assert_eq!(
            held_lock(said, Path::new("/r/p.git")),
            Some("/r/p.git/refs/heads/x.lock".into())
        );
        assert_eq!(held_lock(said, Path::new("/r/q.git")), None);
        assert_eq!(held_lock("fatal: something", Path::new("/r/p.git")), None);
    }

    #[test]
    fn a_copied_commit_keeps_author_and_message_and_loses_its_signature() {
        let raw = b"tree 1111\nparent 2222\nauthor A \xe9 <a@b> 1 +0200\ncommitter C <c@d> 2 +0000\nencoding latin1\ngpgsig -----BEGIN\n line\n -----END\n\nsubject\n\nbody\n";
        let commit = parse_commit(&Sha::new("3333"), raw).unwrap();
        assert_eq!(commit.tree, "1111");
        assert_eq!(commit.parents, [Sha::new("2222")]);
        assert_eq!(commit.author, b"A \xe9 <a@b> 1 +0200");
        assert_eq!(commit.encoding.as_deref(), Some(&b"latin1"[..]));
        assert_eq!(commit.message, b"subject\n\nbody\n");
    }
}
