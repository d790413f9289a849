//! What of a worker's commits may be taken over: how much, and which entries. Looked at in a repository of ours.

use crate::git::{self, Git};
use crate::trouble::{Trouble, kind};
use std::fmt::Write as _;

/// What a worker may hand over in one attempt.
pub(super) const BOUNDS: Bounds = Bounds {
    commits: 500,
    objects: 50_000,
    object_bytes: 64 * 1024 * 1024,
    total_bytes: 512 * 1024 * 1024,
};

/// How much is taken over at most.
#[derive(Clone, Copy)]
pub(super) struct Bounds {
    commits: usize,
    /// Files, folders and commits.
    objects: usize,
    object_bytes: u64,
    total_bytes: u64,
}

pub(super) fn refused_content(message: String) -> Trouble {
    Trouble::failed(kind::CONTENT_REFUSED, message)
}

/// An error of ours, or one of Git that the caller gives a meaning.
pub(super) struct Objection(Result<Trouble, git::Error>);

impl Objection {
    pub(super) fn unwrap_or_else(self, meaning: impl FnOnce(git::Error) -> Trouble) -> Trouble {
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

/// Counts and sizes, before anything is unpacked. Gives what is excluded because it was there before.
pub(super) async fn weigh(
    view: &Git,
    base: &str,
    before: Option<&str>,
    tip: &str,
    most: Bounds,
) -> Result<Vec<String>, Objection> {
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
    Ok(known)
}

/// Looks at every entry that differs from the base: no link out of the tree, no submodule, and no
/// change of what the code host runs unless the task may.
pub(super) async fn judge_tree(
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

/// Whether a link at `path` to `target` may lead out of the tree, or into its Git folder.
///
/// The folders above a link are real ones, so steps up lead where they seem to as long as they come first. Behind a name they do
/// not, because that name may be another link: `a/up/../x`, with `up` leading to the root, is beside the tree.
fn leaves_tree(path: &str, target: &str) -> bool {
    if target.starts_with('/') || target.contains('\0') {
        return true;
    }
    let mut above = path.split('/').count() - 1;
    let mut down = false;
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." if down || above == 0 => return true,
            ".." => above -= 1,
            part if part.eq_ignore_ascii_case(".git") => return true,
            _ => down = true,
        }
    }
    false
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
            ("link", "a/.."),
            // With `a/up` a link to `..`, these are beside the tree and in its Git folder.
            ("link", "a/up/../x"),
            ("a/link", "up/.git/config"),
        ] {
            assert!(leaves_tree(path, target), "{path} -> {target}");
        }
        for (path, target) in [
            ("link", "file"),
            ("a/link", "../file"),
            ("a/b/link", "../../c/./d"),
            ("link", "a/up/x"),
            ("link", ".github/x"),
        ] {
            assert!(!leaves_tree(path, target), "{path} -> {target}");
        }
    }
}
