//! Takes the commits of a worker over into the repository, believing nothing that it left.
//!
//! The workspace's `.git` is data here: Git is never run with it. Its branch is read as a file; its
//! objects are lent to a repository of ours (`view`), whose configuration is ours; from there they
//! are fetched into another one (`incoming`), which computes every object's name anew and checks
//! its form; what arrived is judged there, and only then is it fetched into the repository itself.

use crate::git::{self, Git, QUARANTINE_CONFIG};
use crate::places::{self, Places};
use crate::trouble::{Trouble, kind};
use protocol::Repository;
use std::fmt::Write as _;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

/// What a worker may hand over in one attempt.
const BOUNDS: Bounds = Bounds {
    commits: 500,
    objects: 50_000,
    object_bytes: 64 * 1024 * 1024,
    total_bytes: 512 * 1024 * 1024,
};

/// How much is taken over at most.
#[derive(Clone, Copy)]
struct Bounds {
    commits: usize,
    /// Files, folders and commits.
    objects: usize,
    object_bytes: u64,
    total_bytes: u64,
}

/// Files in the workspace's object folder that are looked at.
const MAX_OBJECT_FILES: usize = 500_000;
/// Largest `packed-refs` that is read, in bytes.
const MAX_REFS_BYTES: u64 = 4 * 1024 * 1024;

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
) -> Result<Taken, Trouble> {
    let (base, branch) = (repository.base_sha.as_str(), repository.branch.as_str());
    let workspace = places.workspace.clone();
    let name = branch.to_owned();
    let looked = tokio::task::spawn_blocking(move || look(&workspace, &name)).await;
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
    let pull = Pull::new(places, bare, &objects).map_err(|error| {
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

fn refused_content(message: String) -> Trouble {
    Trouble::failed(kind::CONTENT_REFUSED, message)
}

/// The two repositories between the workspace and the real one.
struct Pull {
    folder: PathBuf,
    view: PathBuf,
    incoming: PathBuf,
}

impl Pull {
    fn new(places: &Places, bare: &Path, objects: &Path) -> io::Result<Self> {
        let folder = places.state.join("pull");
        places::remove_any(&folder)?;
        let pull = Self {
            view: folder.join("view.git"),
            incoming: folder.join("incoming.git"),
            folder,
        };
        quarantine(&pull.view, objects)?;
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
            refused_content("The worker's commits cannot be read.".to_owned())
                .evidence(error.to_string())
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

        let view = Git::new(&self.view);
        weigh(&view, base, before.as_deref(), tip, BOUNDS)
            .await
            .map_err(|trouble| trouble.unwrap_or_else(unreadable))?;
        view.text(&["update-ref", "refs/heads/work", tip])
            .await
            .map_err(unreadable)?;
        let incoming = Git::new(&self.incoming);
        let from = self.view.display().to_string();
        fetch(&incoming, &from, "refs/heads/work:refs/heads/work")
            .await
            .map_err(unreadable)?;

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

/// An error of ours, or one of Git that the caller gives a meaning.
struct Objection(Result<Trouble, git::Error>);

impl Objection {
    fn unwrap_or_else(self, meaning: impl FnOnce(git::Error) -> Trouble) -> Trouble {
        self.0.unwrap_or_else(meaning)
    }
}

impl From<git::Error> for Objection {
    fn from(error: git::Error) -> Self {
        Self(Err(error))
    }
}

impl From<Trouble> for Objection {
    fn from(trouble: Trouble) -> Self {
        Self(Ok(trouble))
    }
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

/// Counts and sizes, before anything is unpacked.
async fn weigh(
    view: &Git,
    base: &str,
    before: Option<&str>,
    tip: &str,
    most: Bounds,
) -> Result<(), Objection> {
    // What the workspace was cloned from is not counted; a commit that it lost is not excluded.
    let mut known = Vec::new();
    for commit in [Some(base), before].into_iter().flatten() {
        if view.commit(commit).await?.is_some() {
            known.push(format!("^{commit}"));
        }
    }
    let enough = (most.commits + 1).to_string();
    let mut args = vec!["rev-list", "--count", "--max-count", &enough, tip];
    args.extend(known.iter().map(String::as_str));
    let commits: usize = view.text(&args).await?.parse().unwrap_or(usize::MAX);
    if commits > most.commits {
        let message = format!("There are more than {} commits.", most.commits);
        return Err(refused_content(message).into());
    }
    let mut args = vec!["rev-list", "--objects", "--no-object-names", tip];
    args.extend(known.iter().map(String::as_str));
    let listed = view.bytes(&args, None).await?;
    let count = listed.split(|byte| *byte == b'\n').count() - 1;
    if count > most.objects {
        return Err(refused_content(format!(
            "There are {count} new files, folders and commits; at most {} are taken over.",
            most.objects
        ))
        .into());
    }
    let args = ["cat-file", "--batch-check=%(objectsize) %(objectname)"];
    let sizes = view.bytes(&args, Some(listed)).await?;
    let mut total: u64 = 0;
    for line in String::from_utf8_lossy(&sizes).lines() {
        let (size, object) = line.split_once(' ').unwrap_or((line, ""));
        // An object that is missing has no size; the fetch will name it.
        let size: u64 = size.parse().unwrap_or(0);
        if size > most.object_bytes {
            return Err(refused_content(format!(
                "Object {object} has {size} bytes; at most {} are taken over.",
                most.object_bytes
            ))
            .into());
        }
        total = total.saturating_add(size);
    }
    if total > most.total_bytes {
        return Err(refused_content(format!(
            "The new commits have {total} bytes; at most {} are taken over.",
            most.total_bytes
        ))
        .into());
    }
    Ok(())
}

/// Looks at every entry that differs from the base: no link out of the tree, no submodule, and no
/// change of what the code host runs unless the task may.
async fn judge_tree(
    incoming: &Git,
    base: &str,
    tip: &str,
    workflows: bool,
) -> Result<usize, Objection> {
    let args = [
        "diff-tree",
        "-r",
        "-z",
        "--raw",
        "--no-renames",
        "--no-ext-diff",
        base,
        tip,
    ];
    let raw = incoming.bytes(&args, None).await?;
    let mut fields = raw.split(|byte| *byte == 0);
    let mut files = 0;
    let mut bad = String::new();
    while let (Some(entry), Some(path)) = (fields.next(), fields.next()) {
        files += 1;
        let entry = String::from_utf8_lossy(entry);
        let path = String::from_utf8_lossy(path);
        let mut words = entry.trim_start_matches(':').split(' ');
        let (mode, object) = (
            words.nth(1).unwrap_or_default(),
            words.nth(1).unwrap_or_default(),
        );
        let objection = match mode {
            _ if !workflows && is_workflow(&path) => {
                Some("is run by the code host, and this task may not change it".to_owned())
            }
            "000000" => None,
            _ if path == ".artel" || path.starts_with(".artel/") => {
                Some("belongs to the worker, not to the project".to_owned())
            }
            "160000" => Some("is a submodule".to_owned()),
            "120000" => {
                let target = incoming.bytes(&["cat-file", "blob", object], None).await?;
                let target = String::from_utf8_lossy(&target).into_owned();
                leaves_tree(&path, &target)
                    .then(|| format!("is a link out of the tree, to {target}"))
            }
            _ => None,
        };
        if let Some(objection) = objection {
            // Writing to a string does not fail.
            let _ = writeln!(bad, "{path} {objection}");
        }
    }
    if bad.is_empty() {
        return Ok(files);
    }
    Err(refused_content(
        "The commits contain entries that are not taken over; remove them and commit again."
            .to_owned(),
    )
    .evidence(bad)
    .into())
}

/// Whether an entry is, or stands in for, one of the workflows that GitHub runs with a repository's secrets.
fn is_workflow(path: &str) -> bool {
    let mut parts = path.split('/');
    let github = parts
        .next()
        .is_some_and(|part| part.eq_ignore_ascii_case(".github"));
    // `.github` itself is listed only when it is no folder.
    github
        && parts
            .next()
            .is_none_or(|part| part.eq_ignore_ascii_case("workflows"))
}

/// Whether a link at `path` to `target` points out of the tree, or into its Git folder.
fn leaves_tree(path: &str, target: &str) -> bool {
    if target.starts_with('/') || target.contains('\0') {
        return true;
    }
    let mut place: Vec<&str> = path.split('/').collect();
    place.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                if place.pop().is_none() {
                    return true;
                }
            }
            part => place.push(part),
        }
    }
    place
        .first()
        .is_some_and(|first| first.eq_ignore_ascii_case(".git"))
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
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_bound_is_kept_and_names_itself() {
        let folder = tempfile::tempdir().unwrap();
        let git = |args: &[&str]| {
            let output = std::process::Command::new("git")
                .args(["-c", "user.name=T", "-c", "user.email=t@example.org", "-C"])
                .arg(folder.path())
                .args(args)
                .output()
                .unwrap();
            assert!(output.status.success(), "{output:?}");
            String::from_utf8(output.stdout).unwrap().trim().to_owned()
        };
        git(&["init", "-q", "-b", "main"]);
        git(&["commit", "-q", "--allow-empty", "-m", "Base"]);
        let base = git(&["rev-parse", "HEAD"]);
        // Two commits with two folders and three files of 1000 different bytes each.
        for (n, names) in [(1, &["a", "b"][..]), (2, &["c"][..])] {
            for name in names {
                std::fs::write(folder.path().join(name), name.repeat(1000)).unwrap();
            }
            git(&["add", "."]);
            git(&["commit", "-q", "-m", &format!("Number {n}")]);
        }
        let tip = git(&["rev-parse", "HEAD"]);
        let view = Git::new(folder.path());
        let enough = Bounds {
            commits: 2,
            objects: 7,
            object_bytes: 1000,
            total_bytes: 4000,
        };
        let judged = async |most: Bounds| {
            let weighed = weigh(&view, &base, None, &tip, most).await;
            let trouble = weighed.err()?.0.ok()?;
            assert_eq!(trouble.kind, kind::CONTENT_REFUSED);
            Some(trouble.message)
        };
        assert_eq!(judged(enough).await, None);
        for (most, said) in [
            (
                Bounds {
                    commits: 1,
                    ..enough
                },
                "more than 1 commits",
            ),
            (
                Bounds {
                    objects: 6,
                    ..enough
                },
                "7 new files",
            ),
            (
                Bounds {
                    object_bytes: 999,
                    ..enough
                },
                "1000 bytes; at most 999",
            ),
            (
                Bounds {
                    total_bytes: 3000,
                    ..enough
                },
                "at most 3000",
            ),
        ] {
            let message = judged(most).await.unwrap();
            assert!(message.contains(said), "{message}");
        }
        // What was there before does not count.
        assert!(
            weigh(
                &view,
                &base,
                Some(&tip),
                &tip,
                Bounds {
                    commits: 0,
                    objects: 0,
                    ..enough
                }
            )
            .await
            .is_ok()
        );
    }

    #[test]
    fn workflows_are_known_by_where_they_are() {
        for path in [
            ".github/workflows/ci.yml",
            ".github/workflows/a/b",
            ".github/workflows",
            ".github",
            ".GitHub/Workflows/ci.yml",
        ] {
            assert!(is_workflow(path), "{path}");
        }
        for path in [
            ".github/dependabot.yml",
            "docs/.github/workflows/ci.yml",
            ".githubx/workflows/x",
            "github/workflows/x",
        ] {
            assert!(!is_workflow(path), "{path}");
        }
    }

    #[test]
    fn links_are_judged_by_where_they_end() {
        for (path, target) in [
            ("link", "/etc/passwd"),
            ("link", "../outside"),
            ("a/b/link", "../../../outside"),
            ("a/link", "../.git/config"),
            ("link", "a/../../x"),
            ("link", ".GIT/config"),
        ] {
            assert!(leaves_tree(path, target), "{path} -> {target}");
        }
        for (path, target) in [
            ("link", "file"),
            ("a/link", "../file"),
            ("a/b/link", "../../c/./d"),
            ("link", "a/.."),
            ("link", ".github/x"),
        ] {
            assert!(!leaves_tree(path, target), "{path} -> {target}");
        }
    }
}
