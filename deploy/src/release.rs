//! The files of a release: taken from a repository at a commit, and removed when they are old.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use ports::{Actor, Failure, MANIFEST_FILE, Manifest, Result, Sha};

use crate::failures;
use crate::layout::{Layout, private_directory, remove_directory};
use crate::state::State;

/// How long Git may take.
const PATIENCE: Duration = Duration::from_mins(2);
/// How the names of unfinished exports begin.
const STAGING: &[u8] = b".staging-";
/// Releases whose files are kept.
const KEPT: usize = 5;

/// Reads what the commit says about itself.
pub(crate) async fn manifest(repository: &Path, sha: &Sha) -> Result<Manifest> {
    if sha.as_str().len() != 40 || !sha.as_str().bytes().all(|b| b.is_ascii_hexdigit()) {
        let message = format!(
            "{:?} is no commit to deploy: 40 hexadecimal digits are",
            sha.as_str()
        );
        return Err(Failure::new("bad_commit", message));
    }
    let object = format!("{sha}:{MANIFEST_FILE}");
    let text = git(repository, None, &["cat-file", "blob", &object])
        .await
        .map_err(|said| {
            let message = format!("commit {sha} has no {MANIFEST_FILE} that says how to run it");
            Failure::new("no_manifest", message).evidence(said)
        })?;
    Manifest::parse(&text)
        .map_err(|error| Failure::new("bad_manifest", error.to_string()).evidence(text))
}

/// Puts the commit's files into a folder. The folder appears complete or not at all.
pub(crate) async fn export(repository: &Path, sha: &Sha, tree: &Path) -> Result<()> {
    let file = |error: std::io::Error| failures::file("writing the release", tree, &error);
    if tree.exists() {
        return Ok(());
    }
    let releases = tree.parent().unwrap_or(Path::new("."));
    // Left over from exports that were interrupted; a Git of theirs may have a moment to live, so
    // their names are not used again.
    for entry in std::fs::read_dir(releases).map_err(file)?.flatten() {
        if entry.file_name().as_encoded_bytes().starts_with(STAGING) {
            let _ = remove_directory(&entry.path());
        }
    }
    let moment = jiff::Timestamp::now().as_nanosecond();
    let staging = releases.join(format!(".staging-{}-{moment}", std::process::id()));
    let (fresh, index) = (staging.join("tree"), staging.join("index"));
    private_directory(&fresh).map_err(file)?;
    let into = Into {
        tree: &fresh,
        index: &index,
    };
    let exported = async {
        git(repository, Some(&into), &["read-tree", sha.as_str()]).await?;
        git(
            repository,
            Some(&into),
            &["checkout-index", "--all", "--force"],
        )
        .await
    }
    .await;
    if let Err(said) = exported {
        let full = is_full(&staging, &said);
        let _ = remove_directory(&staging);
        return Err(if full {
            failures::disk_full(&tree.display().to_string())
        } else {
            Failure::new(
                "export",
                format!("the files of commit {sha} could not be taken out"),
            )
            .actor(Actor::Admin)
            .retryable()
            .evidence(said)
        });
    }
    std::fs::rename(&fresh, tree).map_err(file)?;
    remove_directory(&staging).map_err(file)
}

/// Whether Git failed for want of space. It says so only sometimes; that it could not write on a
/// disk that is nearly full says it too.
fn is_full(at: &Path, said: &str) -> bool {
    const NEARLY_BYTES: u64 = 64 << 20;
    let left = rustix::fs::statvfs(at).map_or(u64::MAX, |disk| disk.f_bavail * disk.f_frsize);
    said.contains("No space left on device")
        || (said.contains("unable to write") && left < NEARLY_BYTES)
}

/// Forgets old releases, but never the live one nor the one to go back to.
pub(crate) fn prune(layout: &Layout, state: &mut State) {
    let mut numbers: Vec<u64> = state
        .releases
        .iter()
        .map(|release| release.number)
        .collect();
    numbers.sort_unstable_by(|a, b| b.cmp(a));
    let keep_anyway = [
        state.live,
        state.previous_good().map(|release| release.number),
    ];
    let pending = state.pending.as_ref().map(|pending| pending.release);
    for number in numbers.into_iter().skip(KEPT) {
        if keep_anyway.contains(&Some(number)) || pending == Some(number) {
            continue;
        }
        if let Some(release) = state.release(number) {
            let tree = layout.tree(number, &release.sha);
            if let Err(error) = remove_directory(&tree) {
                tracing::warn!(%error, path = %tree.display(), "an old release stays on disk");
                continue;
            }
        }
        let _ = remove_directory(&layout.run(number));
        state.releases.retain(|release| release.number != number);
    }
    // Files of orders that were interrupted before they were written down.
    for entry in std::fs::read_dir(layout.releases())
        .into_iter()
        .flatten()
        .flatten()
    {
        let known = state
            .releases
            .iter()
            .any(|release| layout.tree(release.number, &release.sha) == entry.path());
        if !known {
            let _ = remove_directory(&entry.path());
        }
    }
}

/// Where files are put, with an index of its own.
struct Into<'a> {
    tree: &'a Path,
    index: &'a Path,
}

/// Runs Git in a bare repository with nobody's configuration but the repository's; what it said
/// is the error.
async fn git(repository: &Path, into: Option<&Into<'_>>, args: &[&str]) -> Result<String, String> {
    let mut command = tokio::process::Command::new("git");
    command
        .arg("--git-dir")
        .arg(repository)
        .args([
            "-c",
            "core.hooksPath=/dev/null",
            "-c",
            "core.attributesFile=/dev/null",
        ])
        .args(args)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default())
        .env("HOME", "/nonexistent")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("LC_ALL", "C")
        .current_dir("/")
        .stdin(Stdio::null())
        .kill_on_drop(true);
    if let Some(into) = into {
        command.env("GIT_INDEX_FILE", into.index);
        command.env("GIT_WORK_TREE", into.tree);
        command.current_dir(into.tree);
    }
    let output = tokio::time::timeout(PATIENCE, command.output())
        .await
        .map_err(|_| format!("git did not end within {} s", PATIENCE.as_secs()))?
        .map_err(|error| format!("git cannot be started: {error}"))?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        Err(String::from_utf8_lossy(&output.stderr).into_owned())
    }
}
