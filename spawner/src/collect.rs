//! Takes the commits of a worker over into the repository, believing nothing that it left.
//!
//! The workspace's `.git` is data here: Git is never run with it. Its branch is read as a file; its
//! objects are lent to a repository of ours (`view`), whose configuration is ours, and are read there
//! in a sandbox ([`Reading`]), of which one pack comes out; another repository (`incoming`) takes that
//! in, computes every object's name anew and checks its form, as for any pack that a host is sent; what
//! arrived is judged there, and only then is it fetched into the repository itself. Where there is no
//! sandbox, `incoming` fetches from `view`.

mod judge;

use crate::git::{self, Git, QUARANTINE_CONFIG};
use crate::places::{self, Places};
use crate::reading::{self, Confined, Reading};
use crate::trouble::{Trouble, kind};
use protocol::Repository;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use judge::{BOUNDS, judge_tree, refused_content, weigh};

/// Files in the workspace's object folder that are looked at.
const MAX_OBJECT_FILES: usize = 500_000;
/// Largest `packed-refs` that is read, in bytes.
const MAX_REFS_BYTES: u64 = 4 * 1024 * 1024;

/// Largest pack that is taken in, in bytes; what is in it was weighed before, and packed it is smaller.
const MOST_PACK_BYTES: u64 = 640 * 1024 * 1024;

/// What was taken over.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Taken {
    /// The branch's new tip, read back from the repository.
    pub(crate) head_sha: String,
    /// Commits since the base.
    pub(crate) commits: usize,
    /// Files that differ from the base.
    pub(crate) files: usize,
}

/// Takes the request's branch over from the workspace into `bare`.
pub(crate) async fn take_over(
    places: &Places,
    bare: &Path,
    repository: &Repository,
    reading: &Reading,
) -> Result<Taken, Trouble> {
    let (base, branch) = (repository.base_sha.as_str(), repository.branch.as_str());
    let workspace = places.workspace.clone();
    let name = branch.to_owned();
    let is_confined = reading.is_confined();
    let look = move || {
        let found = look(&workspace, &name)?;
        if is_confined {
            // In the sandbox we are a user like any other, who may not read what is a container's alone.
            let given = places::own_ids().and_then(|us| places::hand_to(&found.0, us));
            given.map_err(|error| format!("{}: {error}", found.0.display()))?;
        }
        Ok::<_, String>(found)
    };
    let looked = places.blocking(move || Ok(look())).await;
    let (objects, tip) = looked
        .map_err(|error| refused_workspace(&error.to_string()))?
        .map_err(|reason| refused_workspace(&reason))?;
    let Some(tip) = tip else {
        return Err(no_commit(&format!("there is no branch {branch}")));
    };
    if tip == base {
        return Err(no_commit(&format!(
            "branch {branch} is still at the base {base}"
        )));
    }
    let pull = Pull::new(places, bare, &objects, reading).map_err(|error| {
        Trouble::failed(kind::PUSH_FAILED, "The commits could not be looked at.")
            .evidence(error.to_string())
    })?;
    let taken = pull.run(bare, repository, &tip).await;
    // Whatever happened, what was fetched on the way is not needed any more.
    pull.remove();
    taken
}

fn no_commit(evidence: &str) -> Trouble {
    Trouble::failed(
        kind::NO_COMMIT,
        "The agent ended without a commit beyond the base.",
    )
    .evidence(evidence)
}

fn refused_workspace(reason: &str) -> Trouble {
    Trouble::failed(
        kind::WORKSPACE_REFUSED,
        "The Git folder of the workspace cannot be read safely, so nothing was taken over.",
    )
    .evidence(reason)
}

/// The two repositories between the workspace and the real one.
struct Pull {
    folder: PathBuf,
    view: PathBuf,
    incoming: PathBuf,
    /// What reads the one of them; none: there is no sandbox.
    confined: Option<Confined>,
}

impl Pull {
    fn new(places: &Places, bare: &Path, objects: &Path, reading: &Reading) -> io::Result<Self> {
        let folder = places.state.join("pull");
        places::remove_any(&folder)?;
        let view = folder.join("view.git");
        let shown = vec![
            (view.clone(), reading::VIEW.into()),
            (objects.to_owned(), reading::OBJECTS.into()),
        ];
        let pull = Self {
            confined: reading.confined(shown, folder.join("answer")),
            incoming: folder.join("incoming.git"),
            view,
            folder,
        };
        let lent = match &pull.confined {
            // Found in the sandbox, and nowhere else.
            Some(_) => Path::new(reading::OBJECTS),
            None => objects,
        };
        quarantine(&pull.view, lent)?;
        quarantine(&pull.incoming, &bare.join("objects"))?;
        Ok(pull)
    }

    fn remove(&self) {
        if let Err(error) = places::remove_any(&self.folder) {
            tracing::warn!(folder = %self.folder.display(), %error, "cannot remove {}", self.folder.display());
        }
    }

    async fn run(&self, bare: &Path, asked: &Repository, tip: &str) -> Result<Taken, Trouble> {
        let (base, branch) = (asked.base_sha.as_str(), asked.branch.as_str());
        let unreadable = |error: git::Error| {
            let evidence = error.to_string();
            let trouble = if matches!(error, git::Error::Confine(_)) {
                // Which is no fault of the worker's.
                Trouble::failed(
                    kind::SANDBOX_FAILED,
                    "The worker's commits could not be read, because there was no sandbox for that. An admin has to look at the spawner's host.",
                )
            } else {
                refused_content("The worker's commits cannot be read.".to_owned())
            };
            trouble.evidence(evidence)
        };
        let repository = Git::new(bare);
        let target = format!("refs/heads/{branch}");
        let push_failed = |error: git::Error| {
            Trouble::failed(
                kind::PUSH_FAILED,
                format!("Branch {branch} could not be written to the repository."),
            )
            .evidence(error.to_string())
        };
        let before = repository.commit(&target).await.map_err(push_failed)?;

        let view = match &self.confined {
            Some(confined) => Git::inside(reading::VIEW, confined.clone()),
            None => Git::new(&self.view),
        };
        let known = weigh(&view, base, before.as_deref(), tip, BOUNDS)
            .await
            .map_err(|trouble| trouble.unwrap_or_else(unreadable))?;
        let incoming = Git::new(&self.incoming);
        if self.confined.is_some() {
            pass(&view, &incoming, tip, &known)
                .await
                .map_err(unreadable)?;
        } else {
            view.text(&["update-ref", "refs/heads/work", tip])
                .await
                .map_err(unreadable)?;
            let from = self.view.display().to_string();
            fetch(&incoming, &from, "refs/heads/work:refs/heads/work")
                .await
                .map_err(unreadable)?;
        }

        // Once more where every object is what its name says: in the workspace's own, one that is not can hide others.
        weigh(&incoming, base, before.as_deref(), tip, BOUNDS)
            .await
            .map_err(|trouble| trouble.unwrap_or_else(unreadable))?;
        let mut follows = vec![("the base", base)];
        if let Some(before) = &before {
            follows.push(("what was pushed before", before));
        }
        for (what, commit) in follows {
            let args = ["merge-base", "--is-ancestor", commit, tip];
            if !incoming.asks(&args).await.map_err(unreadable)? {
                return Err(Trouble::failed(
                    kind::REWRITTEN_HISTORY,
                    format!("Branch {branch} does not continue from {what} ({commit}); history may not be rewritten."),
                )
                .evidence(format!("the branch's tip is {tip}")));
            }
        }
        let range = format!("{base}..{tip}");
        let commits = incoming
            .text(&["rev-list", "--count", &range])
            .await
            .map_err(unreadable)?
            .parse()
            .unwrap_or(0);
        if commits == 0 {
            return Err(no_commit(&format!("{range} is empty")));
        }
        let files = judge_tree(&incoming, base, tip, asked.workflows)
            .await
            .map_err(|trouble| trouble.unwrap_or_else(unreadable))?;

        let from = self.incoming.display().to_string();
        fetch(&repository, &from, &format!("refs/heads/work:{target}"))
            .await
            .map_err(push_failed)?;
        let head_sha = repository.commit(&target).await.map_err(push_failed)?;
        match head_sha {
            Some(head_sha) if head_sha == tip => Ok(Taken {
                head_sha,
                commits,
                files,
            }),
            other => Err(Trouble::failed(
                kind::PUSH_FAILED,
                format!("Branch {branch} was written but is not at {tip}."),
            )
            .evidence(other.unwrap_or_else(|| "it is missing".to_owned()))),
        }
    }
}

/// Has what is new of `tip` written as one pack in the sandbox, and takes that in as any host does that is pushed to.
async fn pass(view: &Git, incoming: &Git, tip: &str, known: &[String]) -> Result<(), git::Error> {
    let mut wanted = tip.to_owned();
    for known in known {
        wanted.push('\n');
        wanted.push_str(known);
    }
    wanted.push('\n');
    let args = [
        "pack-objects",
        "--quiet",
        "--revs",
        "--thin",
        "--delta-base-offset",
        "--stdout",
    ];
    let pack = view.answered(&args, Some(wanted.into_bytes())).await?;
    let most = format!("--max-input-size={MOST_PACK_BYTES}");
    let args = ["index-pack", "--stdin", "--fix-thin", "--strict", &most];
    incoming.fed(&args, pack).await?;
    let named = incoming.text(&["update-ref", "refs/heads/work", tip]).await;
    named.map(drop)
}

async fn fetch(to: &Git, from: &str, refspec: &str) -> Result<(), git::Error> {
    to.text(&[
        "fetch",
        "--quiet",
        "--no-tags",
        "--no-write-fetch-head",
        "--no-auto-gc",
        "--end-of-options",
        from,
        refspec,
    ])
    .await
    .map(drop)
}

/// A bare repository of ours that borrows the objects of another one.
fn quarantine(path: &Path, objects: &Path) -> io::Result<()> {
    std::fs::create_dir_all(path.join("objects/info"))?;
    std::fs::create_dir_all(path.join("refs/heads"))?;
    std::fs::write(path.join("HEAD"), "ref: refs/heads/work\n")?;
    std::fs::write(path.join("config"), QUARANTINE_CONFIG)?;
    let objects = objects.display().to_string();
    if objects.contains(['\n', '"']) {
        return Err(io::Error::other(format!(
            "{objects:?} cannot be named to Git"
        )));
    }
    std::fs::write(path.join("objects/info/alternates"), objects + "\n")
}

/// Reads the workspace's Git folder as files: where its objects are, and the branch's tip.
fn look(workspace: &Path, branch: &str) -> Result<(PathBuf, Option<String>), String> {
    let git = workspace.join(".git");
    let objects = git.join("objects");
    for folder in [workspace, &git, &objects] {
        real(folder, true)?;
    }
    let mut seen = 0;
    no_links(&objects, 0, &mut seen)?;
    for name in ["alternates", "http-alternates"] {
        let path = objects.join("info").join(name);
        if std::fs::symlink_metadata(&path).is_ok() {
            return Err(format!("{} borrows objects from elsewhere", path.display()));
        }
    }
    let loose = format!("refs/heads/{branch}");
    let mut path = git.clone();
    let mut found = true;
    for part in loose.split('/') {
        path.push(part);
        match std::fs::symlink_metadata(&path) {
            Ok(meta) if meta.is_symlink() => return Err(format!("{} is a link", path.display())),
            Ok(_) => {}
            Err(_) => {
                found = false;
                break;
            }
        }
    }
    let text = if found {
        real(&path, false)?;
        Some(read_bounded(&path, 256)?)
    } else {
        let packed = git.join("packed-refs");
        if std::fs::symlink_metadata(&packed).is_ok() {
            real(&packed, false)?;
            let text = read_bounded(&packed, MAX_REFS_BYTES)?;
            text.lines()
                .filter_map(|line| line.split_once(' '))
                .find(|(_, name)| *name == loose)
                .map(|(sha, _)| sha.to_owned())
        } else {
            None
        }
    };
    let Some(text) = text else {
        return Ok((objects, None));
    };
    let sha = text.trim();
    if !matches!(sha.len(), 40 | 64) || !sha.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(format!("{loose} does not name a commit"));
    }
    Ok((objects, Some(sha.to_owned())))
}

fn real(path: &Path, folder: bool) -> Result<(), String> {
    let shown = path.display();
    let meta = std::fs::symlink_metadata(path).map_err(|error| format!("{shown}: {error}"))?;
    if (folder && meta.is_dir()) || (!folder && meta.is_file()) {
        Ok(())
    } else {
        Err(format!(
            "{shown} is not a plain {}",
            if folder { "folder" } else { "file" }
        ))
    }
}

fn no_links(folder: &Path, depth: u32, seen: &mut usize) -> Result<(), String> {
    if depth > 8 {
        return Err(format!("{} is too deep", folder.display()));
    }
    let failed = |error: io::Error| format!("{}: {error}", folder.display());
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        *seen += 1;
        if *seen > MAX_OBJECT_FILES {
            return Err(format!(
                "there are more than {MAX_OBJECT_FILES} files of objects"
            ));
        }
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            no_links(&entry.path(), depth + 1, seen)?;
        } else if !kind.is_file() {
            return Err(format!("{} is not a plain file", entry.path().display()));
        }
    }
    Ok(())
}

fn read_bounded(path: &Path, limit: u64) -> Result<String, String> {
    let failed = |error: io::Error| format!("{}: {error}", path.display());
    let mut text = Vec::new();
    let read = std::fs::File::open(path)
        .map_err(failed)?
        .take(limit + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    if read as u64 > limit {
        return Err(format!("{} has more than {limit} bytes", path.display()));
    }
    Ok(String::from_utf8_lossy(&text).into_owned())
}

#[cfg(test)]
mod tests;
