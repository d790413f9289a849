//! Makes a task's workspace, or brings the one that a former attempt left up to date.
//!
//! A fresh workspace is cloned here, from a repository that is ours (for one that is elsewhere, from
//! its mirror). An existing one belongs to
//! the worker: its Git configuration, hooks and locks are replaced with plain file operations, and
//! what Git has to do in it is done in the sandbox ([`REFRESH`]), where it can do no more than the
//! worker could.

use crate::collect::{self, Taken};
use crate::disk::Image;
use crate::git::{self, Git};
use crate::mirror::Right;
use crate::places::{self, Places};
use crate::reading::Reading;
use crate::remote::{Reach, Remote};
use crate::runtime::{self, Ended, Identity, Inside, Limits, Part, Runtime, Work};
use crate::trouble::{Trouble, chain, kind};
use protocol::{Source, SpawnRequest};
use sandbox::Reason;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Runs in the sandbox to bring a workspace up to date.
const REFRESH: &str = include_str!("refresh.sh");
/// How often it is run when something else ends it, with a pause.
const REFRESHES: u32 = 4;
const REFRESH_PAUSE: Duration = Duration::from_millis(500);
/// Where the refresh finds the repository.
const REPOSITORY: &str = "/run/artel/repository";

/// Configuration of every workspace.
const CONFIG: &str = "[core]\n\trepositoryformatversion = 0\n\tfilemode = true\n\tbare = false\n\tlogallrefupdates = true\n";

/// What the repository's ignore file may lack: the task and the session, and what Python leaves.
const EXCLUDE: &str = "/.artel/\n__pycache__/\n*.pyc\n";

/// Makes the workspace ready and puts the task into it. Returns whether there is nothing else in it but a fresh clone.
pub(crate) async fn prepare(
    runtime: &dyn Runtime,
    places: &Places,
    request: &SpawnRequest,
    reach: &Reach<'_>,
) -> Result<bool, Trouble> {
    std::fs::create_dir_all(&places.state).map_err(|e| clone_failed("making a folder", &e))?;
    places::private_folder(&places.state).map_err(|e| clone_failed("making a folder", &e))?;
    let repository = repository(request, places, reach)?;
    if let Some(image) = places.disk.as_ref().filter(|image| image.is_full()) {
        tracing::warn!("the disk of the workspace is full since a former attempt; it is set aside");
        renew(places, image, request).await?;
    }
    // Whoever reads a mirror keeps those out who would change it.
    let mut right: Option<Right> = None;
    let bare = match &repository {
        Where::Here(bare) => {
            has_base(bare, &request.repository.base_sha).await?;
            *bare
        }
        Where::Elsewhere(remote) => {
            right = Some(remote.bring(&request.repository).await?);
            remote.mirror()
        }
    };
    let mut fresh = true;
    places::let_us_in(&places.workspace).map_err(|e| clone_failed("entering the workspace", &e))?;
    if is_usable(&places.workspace) {
        match bring_up(runtime, places, request, bare).await? {
            Refreshed::Done => fresh = false,
            Refreshed::Broken(said) => {
                let workspace = places.workspace.display();
                tracing::warn!(
                    said,
                    "the workspace {workspace} cannot be brought up to date; it is set aside and cloned anew"
                );
            }
        }
    }
    if fresh {
        set_aside(places, request).await?;
        match (clone(places, request, bare).await, &repository) {
            (Ok(()), _) => {}
            (Err(trouble), _) if is_too_large(places, &trouble) => {
                return Err(too_large(request, trouble));
            }
            (Err(trouble), Where::Here(_)) => return Err(trouble),
            (Err(trouble), Where::Elsewhere(remote)) => {
                tracing::warn!(
                    evidence = trouble.evidence,
                    "the mirror {} cannot be cloned; it is made anew",
                    bare.display()
                );
                drop(right.take());
                right = Some(remote.bring_anew(&request.repository).await?);
                clone(places, request, bare).await?;
            }
        }
    }
    drop(right);
    write_task(&places.workspace, request).map_err(|e| clone_failed("writing the task", &e))?;
    hand_over(runtime, places, &places.workspace).await?;
    Ok(fresh)
}

/// Brings an existing workspace up to date. One that a worker made so that it cannot be tidied is broken.
async fn bring_up(
    runtime: &dyn Runtime,
    places: &Places,
    request: &SpawnRequest,
    bare: &Path,
) -> Result<Refreshed, Trouble> {
    match tidy(places, &places.workspace).await {
        Ok(()) => {}
        // That is no fault of the workspace, and its work is worth another try.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
            ) =>
        {
            return Err(clone_failed("tidying the workspace", &error));
        }
        Err(error) => return Ok(Refreshed::Broken(error.to_string())),
    }
    if let Err(trouble) = hand_over(runtime, places, &places.workspace).await {
        return Ok(Refreshed::Broken(trouble.evidence));
    }
    let refreshed = refresh(runtime, places, request, bare).await;
    places
        .remove(places.state.join("lent.git"))
        .await
        .map_err(|e| clone_failed("removing a copy", &e))?;
    refreshed
}

/// Gives a folder to whoever works in it.
async fn hand_over(runtime: &dyn Runtime, places: &Places, folder: &Path) -> Result<(), Trouble> {
    let owner = runtime.owner();
    let folder = folder.to_owned();
    let handed = places.blocking(move || {
        let owner = owner.map_or_else(places::own_ids, Ok)?;
        places::hand_to(&folder, owner)
    });
    handed
        .await
        .map_err(|e| clone_failed("giving the workspace to the worker", &e))
}

/// What the refresh fetches from: the repository itself, or, for a worker who may not be able to read what is ours, a copy of
/// its branches.
async fn lend(
    runtime: &dyn Runtime,
    places: &Places,
    request: &SpawnRequest,
    bare: &Path,
) -> Result<PathBuf, Trouble> {
    if runtime.owner().is_none() {
        return Ok(bare.to_owned());
    }
    let failed = |error: git::Error| clone_failed("copying the repository", &error);
    let copy = places.state.join("lent.git");
    let removed = places.remove(copy.clone()).await;
    removed.map_err(|e| clone_failed("making a folder", &e))?;
    std::fs::create_dir_all(&copy).map_err(|e| clone_failed("making a folder", &e))?;
    let git = Git::new(&copy);
    git.text(&[
        "init",
        "--quiet",
        "--bare",
        "--template=",
        "--initial-branch=main",
    ])
    .await
    .map_err(failed)?;
    let base = format!("+{}:refs/artel/base", request.repository.base_sha);
    let bare = bare.display().to_string();
    let args = ["fetch", "--quiet", "--no-tags", "--end-of-options", &bare];
    git.text(&[&args[..], &["+refs/heads/*:refs/heads/*", &base]].concat())
        .await
        .map_err(failed)?;
    hand_over(runtime, places, &copy).await?;
    Ok(copy)
}

/// Takes the worker's commits over into the repository, wherever that is.
pub(crate) async fn deliver(
    places: &Places,
    request: &SpawnRequest,
    reach: &Reach<'_>,
    reading: &Reading,
) -> Result<Taken, Trouble> {
    match repository(request, places, reach)? {
        Where::Here(bare) => collect::take_over(places, bare, &request.repository, reading).await,
        Where::Elsewhere(remote) => remote.deliver(places, &request.repository, reading).await,
    }
}

/// Where a repository is.
enum Where<'a> {
    /// A bare repository on this machine.
    Here(&'a Path),
    Elsewhere(Remote<'a>),
}

fn repository<'a>(
    request: &'a SpawnRequest,
    places: &Places,
    reach: &'a Reach<'a>,
) -> Result<Where<'a>, Trouble> {
    match &request.repository.source {
        Source::Path(path) if Path::new(path).is_absolute() => Ok(Where::Here(Path::new(path))),
        Source::Path(path) => Err(Trouble::failed(
            kind::CLONE_FAILED,
            format!("The repository {path} is not an absolute path."),
        )),
        Source::CloneUrl(url) => Remote::new(url, places, reach).map(Where::Elsewhere),
    }
}

async fn has_base(bare: &Path, base: &str) -> Result<(), Trouble> {
    if !bare.is_dir() {
        let found = match std::fs::metadata(bare) {
            Ok(_) => "there is something else of that name".to_owned(),
            Err(error) => error.to_string(),
        };
        return Err(Trouble::failed(
            kind::REPOSITORY_MISSING,
            format!(
                "The repository {} is not there; an admin has to bring it back, or its owner to name another one.",
                bare.display()
            ),
        )
        .evidence(format!("{}: {found}", bare.display())));
    }
    match Git::new(bare).commit(base).await {
        Ok(Some(_)) => Ok(()),
        Ok(None) => Err(Trouble::failed(
            kind::BASE_MISSING,
            format!("Commit {base} is not in the repository {}; its owner has to push it, or the plan to begin from one that is there.", bare.display()),
        )
        .evidence(format!("git has no commit {base}; it has {}", heads(bare).await))),
        Err(error) => Err(clone_failed("reading the repository", &error)),
    }
}

/// What a repository has instead, in some words.
async fn heads(bare: &Path) -> String {
    let args = [
        "for-each-ref",
        "--count=10",
        "--format=%(objectname:short) %(refname:short)",
    ];
    match Git::new(bare).text(&args).await {
        Ok(text) => text.trim().replace('\n', ", "),
        Err(error) => format!("no branch that can be read: {error}"),
    }
}

fn clone_failed(doing: &str, error: &dyn std::error::Error) -> Trouble {
    Trouble::failed(
        kind::CLONE_FAILED,
        format!("The workspace could not be made ready: {doing} failed."),
    )
    .evidence(error.to_string())
}

/// A workspace whose Git folder is a real folder with real folders in it.
fn is_usable(workspace: &Path) -> bool {
    let is_folder = |path: PathBuf| std::fs::symlink_metadata(path).is_ok_and(|m| m.is_dir());
    is_folder(workspace.to_owned())
        && [".git", ".git/objects", ".git/refs", ".git/refs/heads"]
            .iter()
            .all(|part| is_folder(workspace.join(part)))
}

/// Keeps what is left of a broken workspace, for a person to look at.
async fn set_aside(places: &Places, request: &SpawnRequest) -> Result<(), Trouble> {
    if std::fs::symlink_metadata(&places.workspace).is_err() {
        return Ok(());
    }
    if let Some(image) = &places.disk {
        return renew(places, image, request).await;
    }
    let aside = places.state.join(format!("broken-{}", request.attempt));
    let workspace = places.workspace.clone();
    let set_aside = move || {
        places::remove_any(&aside)?;
        std::fs::rename(workspace, aside)
    };
    places
        .blocking(set_aside)
        .await
        .map_err(|e| clone_failed("setting the old workspace aside", &e))
}

/// Puts a disk aside with all that is on it, and an empty one in its place.
async fn renew(places: &Places, image: &Image, request: &SpawnRequest) -> Result<(), Trouble> {
    let (image, most_mb) = (image.clone(), request.limits.disk_mb);
    let renew = move || image.renew(most_mb).map_err(io::Error::other);
    let renewed = places.blocking(renew).await;
    renewed.map_err(|e| clone_failed("making a new disk", &e))
}

/// Whether a clone failed because the disk is too small for it. Git takes away what it could not finish.
fn is_too_large(places: &Places, trouble: &Trouble) -> bool {
    let disk = places.disk.as_ref();
    disk.is_some_and(|disk| disk.is_full() || trouble.evidence.contains("No space left on device"))
}

fn too_large(request: &SpawnRequest, trouble: Trouble) -> Trouble {
    Trouble::failed(
        kind::LIMIT_DISK,
        format!(
            "The repository does not fit on the {} MiB of disk that the task may use; the project's limit has to be raised.",
            request.limits.disk_mb
        ),
    )
    .evidence(trouble.evidence)
}

/// Takes away what a worker may have left for Git to obey or to stumble over.
async fn tidy(places: &Places, workspace: &Path) -> io::Result<()> {
    let workspace = workspace.to_owned();
    places.blocking(move || tidy_now(&workspace)).await
}

/// Blocks: a worker may have left any number of files there.
fn tidy_now(workspace: &Path) -> io::Result<()> {
    let git = workspace.join(".git");
    places::replace_file(&git, "config", CONFIG)?;
    for name in [
        "config.worktree",
        "hooks",
        "commondir",
        "gitdir",
        "shallow",
        "worktrees",
        "modules",
    ] {
        places::remove_any(&git.join(name))?;
    }
    for name in ["alternates", "http-alternates"] {
        let info = places::real_folder(&git.join("objects"), "info")?;
        places::remove_any(&info.join(name))?;
    }
    let info = places::real_folder(&git, "info")?;
    for name in ["attributes", "grafts", "sparse-checkout"] {
        places::remove_any(&info.join(name))?;
    }
    places::replace_file(&info, "exclude", EXCLUDE)?;
    // A Git that was killed leaves locks; nobody runs in the workspace now.
    remove_locks(&git, 0)
}

/// Removes locks, and what is neither a file nor a folder: Git would wait for a pipe for ever.
fn remove_locks(folder: &Path, depth: u32) -> io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let path = entry.path();
        let kind = entry.file_type()?;
        if kind.is_dir() {
            if depth < 16 && !(depth == 0 && entry.file_name() == "objects") {
                remove_locks(&path, depth + 1)?;
            }
        } else if !kind.is_file() || path.extension().is_some_and(|e| e == "lock") {
            std::fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Clones beside the workspace and renames it, so that half a clone is never a workspace.
async fn clone(places: &Places, request: &SpawnRequest, bare: &Path) -> Result<(), Trouble> {
    let failed = |error: git::Error| clone_failed("cloning", &error);
    let fresh = places.beside().join("clone");
    let removed = places.remove(fresh.clone()).await;
    removed.map_err(|e| clone_failed("making a folder", &e))?;
    std::fs::create_dir_all(&fresh).map_err(|e| clone_failed("making a folder", &e))?;
    let git = Git::new(&fresh);
    git.text(&["init", "--quiet", "--template=", "--initial-branch=main"])
        .await
        .map_err(failed)?;
    let bare = bare.display().to_string();
    git.text(&[
        "fetch",
        "--quiet",
        "--no-tags",
        "--end-of-options",
        &bare,
        "+refs/heads/*:refs/remotes/origin/*",
    ])
    .await
    .map_err(failed)?;
    let base = &request.repository.base_sha;
    if git.commit(base).await.map_err(failed)?.is_none() {
        git.text(&[
            "fetch",
            "--quiet",
            "--no-tags",
            "--end-of-options",
            &bare,
            base,
        ])
        .await
        .map_err(failed)?;
    }
    let branch = &request.repository.branch;
    let pushed = format!("refs/remotes/origin/{branch}");
    let start = git.commit(&pushed).await.map_err(failed)?;
    let start = start.as_ref().unwrap_or(base);
    git.text(&["checkout", "--quiet", "--no-track", "-B", branch, start])
        .await
        .map_err(failed)?;
    let tidied = tidy(places, &fresh).await;
    tidied.map_err(|e| clone_failed("tidying the workspace", &e))?;
    std::fs::rename(&fresh, &places.workspace)
        .map_err(|e| clone_failed("putting the workspace in place", &e))
}

/// Fetches the base and the branch into an existing workspace, keeping what was done there. What is ended from outside meanwhile,
/// as by an engine that dies, is begun again, because it says nothing about the workspace.
async fn refresh(
    runtime: &dyn Runtime,
    places: &Places,
    request: &SpawnRequest,
    bare: &Path,
) -> Result<Refreshed, Trouble> {
    let mut tries = 1;
    loop {
        let (ended, said) = refresh_once(runtime, places, request, bare).await?;
        let failed = |who: &dyn std::fmt::Display| {
            let message = format!(
                "The workspace of the former attempt could not be brought up to date ({who}); it is kept."
            );
            Trouble::failed(kind::CLONE_FAILED, message).evidence(&said)
        };
        if let Some(who) = ended.from_outside {
            if tries == REFRESHES {
                return Err(failed(&who));
            }
            tracing::warn!(
                who,
                tries,
                "bringing a workspace up to date was ended from outside; once more"
            );
            tries += 1;
            tokio::time::sleep(REFRESH_PAUSE).await;
            continue;
        }
        return match ended.reason {
            Reason::Exited(0) => Ok(Refreshed::Done),
            // Also when Git came to no end: a pipe where it looks for a file is enough for that.
            Reason::Exited(_) | Reason::Wall | Reason::Memory | Reason::Pids | Reason::Cpu => {
                Ok(Refreshed::Broken(format!("Git {}: {said}", ended.reason)))
            }
            reason => Err(failed(&format_args!("Git {reason}"))),
        };
    }
}

async fn refresh_once(
    runtime: &dyn Runtime,
    places: &Places,
    request: &SpawnRequest,
    bare: &Path,
) -> Result<(Ended, String), Trouble> {
    let failed = |error: &runtime::Error| {
        Trouble::failed(
            kind::CLONE_FAILED,
            format!("The workspace could not be brought up to date: {error}."),
        )
        .evidence(chain(error))
    };
    let lent = lend(runtime, places, request, bare).await?;
    let env = [
        ("REPOSITORY", REPOSITORY.to_owned()),
        ("BASE", request.repository.base_sha.clone()),
        ("BRANCH", request.repository.branch.clone()),
        ("ATTEMPT", request.attempt.to_string()),
        ("GIT_CONFIG_NOSYSTEM", "1".to_owned()),
        ("GIT_CONFIG_GLOBAL", "/dev/null".to_owned()),
        ("GIT_TERMINAL_PROMPT", "0".to_owned()),
        ("GIT_AUTHOR_NAME", "artel".to_owned()),
        ("GIT_AUTHOR_EMAIL", "artel@localhost".to_owned()),
        ("GIT_COMMITTER_NAME", "artel".to_owned()),
        ("GIT_COMMITTER_EMAIL", "artel@localhost".to_owned()),
    ];
    let work = Work {
        who: Identity::of(request),
        part: Part::Refresh,
        inside: Inside::Program(["sh", "-c", REFRESH, "refresh"].map(str::to_owned).into()),
        env: env.map(|(name, value)| (name.to_owned(), value)).into(),
        workspace: places.workspace.clone(),
        shown: vec![(lent, REPOSITORY.into())],
        relay: None,
        limits: Limits {
            wall_s: 120,
            cpu: 2.0,
            memory_mb: 1024,
            pids: 256,
            ..places.limits(&request.limits)
        },
        fresh: false,
        docker: false,
    };
    let mut worker = runtime.start(&work).await.map_err(|error| failed(&error))?;
    let ended = worker.wait().await.map_err(|error| failed(&error))?;
    let tail = worker.tail();
    drop(worker);
    let discarded = runtime.discard(&work.who).await;
    discarded.map_err(|error| failed(&error))?;
    Ok((ended, tail))
}

/// What became of an existing workspace.
enum Refreshed {
    Done,
    /// Git cannot make sense of it; its words.
    Broken(String),
}

fn write_task(workspace: &Path, request: &SpawnRequest) -> io::Result<()> {
    let folder = places::real_folder(workspace, ".artel")?;
    places::replace_file(&folder, "TASK.md", &task_text(request))
}

/// The task as the agent reads it.
fn task_text(request: &SpawnRequest) -> String {
    let task = &request.task;
    let mut text = format!("# {}\n\n{}\n", task.title.trim(), task.body_markdown.trim());
    if !task.acceptance.is_empty() {
        text.push_str("\n## Done when\n\n");
        for item in &task.acceptance {
            // Writing to a string does not fail.
            let _ = writeln!(text, "- {}", item.trim());
        }
    }
    text
}

#[cfg(test)]
mod tests;
