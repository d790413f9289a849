//! Several processes on one repository, and what a dead one leaves behind.

use forge::{LocalForge, suite};
use ports::{Forge, MergeOutcome, PullRequestStatus, RebaseOutcome};

use crate::world::{World, git};

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_open_pull_requests_at_once_without_gaps() {
    let world = World::new().await;
    let mut heads = Vec::new();
    for n in 0..6 {
        let branch = format!("task/{n}");
        let head = suite::commit(
            &world.forge,
            &world.project,
            &branch,
            &world.base,
            &branch,
            "x",
        )
        .await;
        heads.push((branch, head));
    }
    // A forge of its own shares no memory with another, only the files, as another process would.
    let opened = heads.iter().flat_map(|(branch, head)| {
        let new = suite::request(&world.project, branch, head);
        [new.clone(), new]
    });
    let tasks: Vec<_> = opened
        .map(|new| {
            let forge = LocalForge::new(world.home.path().join("repos"), None);
            tokio::spawn(async move { forge.open_pull_request(&new).await.unwrap() })
        })
        .collect();
    let mut numbers = Vec::new();
    for task in tasks {
        let pull = task.await.unwrap();
        numbers.push((pull.number, pull.branch));
    }
    numbers.sort();
    numbers.dedup();
    assert_eq!(
        numbers
            .iter()
            .map(|(number, _)| *number)
            .collect::<Vec<_>>(),
        [1, 2, 3, 4, 5, 6]
    );
    assert_eq!(
        world
            .forge
            .pull_requests(&world.project)
            .await
            .unwrap()
            .len(),
        6
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn of_merges_at_once_each_stands_on_the_one_before() {
    let world = World::new().await;
    let mut tasks = Vec::new();
    for n in 0..4 {
        let branch = format!("task/{n}");
        let head = suite::commit(
            &world.forge,
            &world.project,
            &branch,
            &world.base,
            &branch,
            "x",
        )
        .await;
        let number = suite::open(&world.forge, &world.project, &branch, &head)
            .await
            .number;
        let forge = LocalForge::new(world.home.path().join("repos"), None);
        let project = world.project.clone();
        tasks.push(tokio::spawn(async move {
            for _ in 0..20 {
                let head = match forge.rebase(&project, number).await.unwrap() {
                    RebaseOutcome::Rebased { head } | RebaseOutcome::UpToDate { head } => head,
                    RebaseOutcome::Conflict { files } => panic!("{files:?}"),
                };
                if let MergeOutcome::Merged { .. } =
                    forge.merge(&project, number, &head).await.unwrap()
                {
                    return;
                }
            }
            panic!("never merged");
        }));
    }
    for task in tasks {
        task.await.unwrap();
    }
    let merges = git(
        &world.bare(),
        &["rev-list", "--count", "--merges", "--first-parent", "main"],
    );
    assert_eq!(merges, "4");
    let tip = suite::main(&world.forge, &world.project).await;
    assert_eq!(
        world
            .forge
            .list_files(&world.project, &tip)
            .await
            .unwrap()
            .len(),
        4
    );
}

#[tokio::test]
async fn a_lock_that_a_killed_git_left_is_removed() {
    let world = World::new().await;
    let lock = world.bare().join("refs/heads/main.lock");
    std::fs::write(&lock, "").unwrap();
    let old = std::time::SystemTime::now() - std::time::Duration::from_mins(2);
    std::fs::File::options()
        .write(true)
        .open(&lock)
        .unwrap()
        .set_modified(old)
        .unwrap();
    let tip = suite::commit(&world.forge, &world.project, "main", &world.base, "a", "1").await;
    assert_eq!(suite::main(&world.forge, &world.project).await, tip);
    assert!(!lock.exists());
}

#[tokio::test]
async fn a_merge_whose_record_is_missing_is_found_again() {
    let world = World::new().await;
    let head = suite::commit(
        &world.forge,
        &world.project,
        "task/x",
        &world.base,
        "x",
        "1",
    )
    .await;
    let pull = suite::open(&world.forge, &world.project, "task/x", &head).await;
    let open = git(&world.bare(), &["rev-parse", "refs/artel/pulls/1"]);
    let merged = world
        .forge
        .merge(&world.project, pull.number, &head)
        .await
        .unwrap();
    let MergeOutcome::Merged { sha } = merged.clone() else {
        panic!("{merged:?}");
    };
    // As if the machine had died between one ref and the next.
    git(&world.bare(), &["update-ref", "refs/artel/pulls/1", &open]);
    let pull = world
        .forge
        .pull_request(&world.project, pull.number)
        .await
        .unwrap();
    assert_eq!(
        (pull.status, pull.merged),
        (PullRequestStatus::Merged, Some(sha))
    );
    git(&world.bare(), &["update-ref", "refs/artel/pulls/1", &open]);
    assert_eq!(
        world.forge.merge(&world.project, 1, &head).await.unwrap(),
        merged
    );
}
