//! Each operation, killed before and after every one of its Git commands, and then done again by a new process.
//!
//! The Git that is killed is a script in front of the real one: at its n-th call it kills itself, before or after the real
//! one ran. What is left behind is what a killed program leaves behind, since nothing is cleaned up but scratch files.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use forge::{LocalForge, Options, suite};
use ports::{Forge, MergeOutcome, ProjectId, PullRequestStatus, RebaseOutcome, Sha, Slug};

/// More calls than any operation makes.
const MOST_CALLS: u32 = 60;

#[derive(Clone, Copy, Debug)]
enum Dies {
    Before,
    After,
}

fn project() -> ProjectId {
    ProjectId::founded_by("crash")
}

/// A forge over `home/repos` whose Git dies at its `at`-th call.
fn dying(home: &Path, at: u32, dies: Dies) -> LocalForge {
    let script = home.join("git");
    let counter = home.join("calls");
    let _ = std::fs::remove_file(&counter);
    let real = match dies {
        Dies::Before => String::new(),
        Dies::After => "git \"$@\" > /dev/null 2>&1".to_owned(),
    };
    let text = format!(
        "#!/bin/sh\necho x >> {counter}\nif [ $(wc -l < {counter}) -eq {at} ]; then\n{real}\nkill -9 $$\nfi\nexec git \"$@\"\n",
        counter = counter.display(),
    );
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    LocalForge::with(Options {
        git: script,
        ..Options::new(home.join("repos"), None)
    })
}

fn healthy(home: &Path) -> LocalForge {
    LocalForge::new(home.join("repos"), None)
}

fn copy(from: &Path, to: &Path) {
    let copied = Command::new("cp")
        .arg("-a")
        .arg(from)
        .arg(to)
        .status()
        .unwrap();
    assert!(copied.success());
}

/// Prepares a world once; then, for every call of `step`, copies it, lets `step` die there, lets it run again, and has
/// `check` look at what it answered. Returns how many deaths there were.
async fn at_every_call<T>(
    prepare: impl AsyncFn(&LocalForge),
    step: impl AsyncFn(&LocalForge) -> ports::Result<T>,
    check: impl AsyncFn(&LocalForge, T),
) {
    let folder = tempfile::tempdir().unwrap();
    let prepared = folder.path().join("prepared");
    std::fs::create_dir_all(prepared.join("repos")).unwrap();
    prepare(&healthy(&prepared)).await;
    let mut deaths = 0;
    for dies in [Dies::Before, Dies::After] {
        for at in 1..=MOST_CALLS {
            let home = folder.path().join(format!("{dies:?}-{at}"));
            copy(&prepared, &home);
            let died = step(&dying(&home, at, dies)).await;
            if died.is_ok()
                && std::fs::read_to_string(home.join("calls"))
                    .unwrap()
                    .lines()
                    .count()
                    < at as usize
            {
                assert!(at > 3, "the step made hardly any calls");
                break;
            }
            deaths += 1;
            assert!(at < MOST_CALLS, "the step makes more calls than expected");
            let forge = healthy(&home);
            let answer = step(&forge).await;
            let answer = answer.unwrap_or_else(|failure| panic!("{dies:?} call {at}: {failure:?}"));
            check(&forge, answer).await;
            std::fs::remove_dir_all(&home).unwrap();
        }
    }
    assert!(deaths > 6);
}

async fn branch(forge: &LocalForge) -> Sha {
    forge.head(&project(), "task/x").await.unwrap().unwrap()
}

async fn with_work(forge: &LocalForge) -> Sha {
    let base = suite::begin(forge, &project()).await;
    suite::commit(forge, &project(), "task/x", &base, "x", "1").await
}

async fn with_pull_request(forge: &LocalForge) {
    let head = with_work(forge).await;
    suite::open(forge, &project(), "task/x", &head).await;
}

#[tokio::test]
async fn a_repository_is_there_whole_or_not_at_all() {
    at_every_call(
        async |_| {},
        async |forge| {
            let found = forge.repository(&project()).await;
            if let Ok(Some(_)) = found {
                assert!(
                    forge.head(&project(), "main").await?.is_some(),
                    "half a repository"
                );
            }
            forge
                .create_repository(&project(), &Slug::from_title("x"))
                .await
        },
        async |forge, _| {
            let head = suite::main(forge, &project()).await;
            assert!(
                forge
                    .list_files(&project(), &head)
                    .await
                    .unwrap()
                    .is_empty()
            );
        },
    )
    .await;
}

#[tokio::test]
async fn files_are_committed_once() {
    at_every_call(
        async |forge| {
            suite::begin(forge, &project()).await;
        },
        async |forge| {
            let base = healthy_base(forge).await?;
            let files = [suite::file("a", "1"), suite::file("b", "2")];
            forge
                .commit_files(&project(), "main", &base, "Scaffold", &files, "key")
                .await
        },
        async |forge, sha| {
            assert_eq!(suite::main(forge, &project()).await, sha);
            // One commit on top of the first: nothing was committed twice.
            let again = forge
                .commit_files(
                    &project(),
                    "main",
                    &sha,
                    "Scaffold",
                    &[suite::file("a", "1")],
                    "key",
                )
                .await;
            assert_eq!(again.unwrap(), sha);
            assert_eq!(
                forge.list_files(&project(), &sha).await.unwrap(),
                ["a", "b"]
            );
            assert_eq!(commits(forge).await, 2);
        },
    )
    .await;
}

/// The tip as a node would have read it before the step: here simply now.
async fn healthy_base(forge: &LocalForge) -> ports::Result<Sha> {
    Ok(forge
        .head(&project(), "main")
        .await?
        .expect("the default branch"))
}

async fn commits(forge: &LocalForge) -> usize {
    let path = forge
        .repository(&project())
        .await
        .unwrap()
        .unwrap()
        .path
        .unwrap();
    let output = Command::new("git")
        .args(["rev-list", "--count", "main"])
        .env("GIT_DIR", path)
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap()
}

#[tokio::test]
async fn a_pull_request_is_opened_once() {
    at_every_call(
        async |forge| {
            with_work(forge).await;
        },
        async |forge| {
            let head = forge.head(&project(), "task/x").await?.expect("the branch");
            forge
                .open_pull_request(&suite::request(&project(), "task/x", &head))
                .await
        },
        async |forge, pull| {
            assert_eq!((pull.number, pull.status), (1, PullRequestStatus::Open));
            assert_eq!(forge.pull_requests(&project()).await.unwrap(), [pull]);
        },
    )
    .await;
}

#[tokio::test]
async fn a_branch_is_rebased_once() {
    at_every_call(
        async |forge| {
            with_pull_request(forge).await;
            let base = suite::main(forge, &project()).await;
            suite::commit(forge, &project(), "main", &base, "other", "1").await;
        },
        async |forge| forge.rebase(&project(), 1).await,
        async |forge, outcome| {
            let (RebaseOutcome::Rebased { head } | RebaseOutcome::UpToDate { head }) = outcome
            else {
                panic!("{outcome:?}");
            };
            assert_eq!(branch(forge).await, head);
            assert_eq!(forge.pull_request(&project(), 1).await.unwrap().head, head);
            let diff = forge.diff(&project(), 1, 10_000).await.unwrap();
            assert_eq!(diff.files, ["x"]);
        },
    )
    .await;
}

#[tokio::test]
async fn a_pull_request_is_merged_once() {
    at_every_call(
        with_pull_request,
        async |forge| {
            let head = forge.head(&project(), "task/x").await?.expect("the branch");
            forge.merge(&project(), 1, &head).await
        },
        async |forge, outcome| {
            let MergeOutcome::Merged { sha } = outcome else {
                panic!("{outcome:?}");
            };
            assert_eq!(suite::main(forge, &project()).await, sha);
            assert_eq!(commits(forge).await, 3, "merged twice");
            let pull = forge.pull_request(&project(), 1).await.unwrap();
            assert_eq!(
                (pull.status, pull.merged),
                (PullRequestStatus::Merged, Some(sha))
            );
        },
    )
    .await;
}

#[tokio::test]
async fn a_pull_request_is_closed_once() {
    at_every_call(
        with_pull_request,
        async |forge| forge.close(&project(), 1).await,
        async |forge, ()| {
            let pull = forge.pull_request(&project(), 1).await.unwrap();
            assert_eq!(pull.status, PullRequestStatus::Closed);
        },
    )
    .await;
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_any_more_is_done_to_its_end() {
    let home = tempfile::tempdir().unwrap();
    let forge = healthy(home.path());
    with_pull_request(&forge).await;
    let head = branch(&forge).await;
    let this = project();
    let dropped = tokio::time::timeout(
        std::time::Duration::from_millis(1),
        forge.merge(&this, 1, &head),
    )
    .await;
    assert!(dropped.is_err(), "it was too quick to be dropped");
    let merged = forge.merge(&this, 1, &head).await.unwrap();
    assert!(matches!(merged, MergeOutcome::Merged { .. }), "{merged:?}");
    assert_eq!(commits(&forge).await, 3, "merged twice");
}
