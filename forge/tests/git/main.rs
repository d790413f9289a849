//! Local repositories as real Git sees them: what is pushed to them, cloned from them, and done to them at once.

mod at_once;
mod hostile;
mod world;

use std::os::unix::fs::PermissionsExt;

use forge::suite;
use ports::{Forge, MergeOutcome, ProjectId, RebaseOutcome};

use world::{World, git, push};

#[tokio::test]
async fn the_history_shows_the_merges() {
    let world = World::new().await;
    for branch in ["task/one", "task/two"] {
        let workspace = world.workspace();
        std::fs::write(workspace.join(branch.replace('/', "-")), "x").unwrap();
        let head = push(&workspace, branch);
        let pull = suite::open(&world.forge, &world.project, branch, &head).await;
        world
            .forge
            .merge(&world.project, pull.number, &head)
            .await
            .unwrap();
    }
    let log = git(
        &world.bare(),
        &["log", "--first-parent", "--format=%s|%an <%ae>", "main"],
    );
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(
        lines,
        [
            "Merge pull request #2 from task/two: Work on task/two|Artel <artel@localhost>",
            "Merge pull request #1 from task/one: Work on task/one|Artel <artel@localhost>",
            "Begin my-notes|Artel <artel@localhost>",
        ]
    );
    git(&world.bare(), &["fsck", "--strict"]);
}

#[tokio::test]
async fn a_rebase_keeps_authors_and_messages() {
    let world = World::new().await;
    let workspace = world.workspace();
    std::fs::write(workspace.join("run.sh"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(
        workspace.join("run.sh"),
        std::fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    let first = push(&workspace, "task/x");
    std::fs::write(workspace.join("b"), "b").unwrap();
    let head = push(&workspace, "task/x");
    let pull = suite::open(&world.forge, &world.project, "task/x", &head).await;
    suite::commit(
        &world.forge,
        &world.project,
        "main",
        &world.base,
        "other",
        "1",
    )
    .await;
    let RebaseOutcome::Rebased { head: moved } = world
        .forge
        .rebase(&world.project, pull.number)
        .await
        .unwrap()
    else {
        panic!("it was not rebased");
    };
    let range = format!("main..{moved}");
    let log = git(
        &world.bare(),
        &[
            "log",
            "--format=%an|%s|%(trailers:key=Co-Worker,valueonly,separator=;)",
            &range,
        ],
    );
    assert_eq!(log, "Worker|Work|é\nWorker|Work|é");
    assert!(git(&world.bare(), &["ls-tree", moved.as_str(), "run.sh"]).starts_with("100755"));
    assert_ne!(first, moved);
    git(&world.bare(), &["fsck", "--strict"]);
}

#[tokio::test]
async fn a_branch_with_merges_in_it_is_joined_with_the_tip() {
    let world = World::new().await;
    let workspace = world.workspace();
    std::fs::write(workspace.join("a"), "a").unwrap();
    push(&workspace, "task/x");
    suite::commit(
        &world.forge,
        &world.project,
        "main",
        &world.base,
        "one",
        "1",
    )
    .await;
    git(&workspace, &["fetch", "-q", "origin"]);
    git(&workspace, &["merge", "-q", "--no-edit", "origin/main"]);
    std::fs::write(workspace.join("b"), "b").unwrap();
    let head = push(&workspace, "task/x");
    let pull = suite::open(&world.forge, &world.project, "task/x", &head).await;
    let tip = suite::main(&world.forge, &world.project).await;
    suite::commit(&world.forge, &world.project, "main", &tip, "two", "2").await;
    let RebaseOutcome::Rebased { head: moved } = world
        .forge
        .rebase(&world.project, pull.number)
        .await
        .unwrap()
    else {
        panic!("it was not rebased");
    };
    let merged = world
        .forge
        .merge(&world.project, pull.number, &moved)
        .await
        .unwrap();
    assert!(matches!(merged, MergeOutcome::Merged { .. }), "{merged:?}");
    let tip = suite::main(&world.forge, &world.project).await;
    assert_eq!(
        world.forge.list_files(&world.project, &tip).await.unwrap(),
        ["a", "b", "one", "two"]
    );
}

#[tokio::test]
async fn a_branch_of_another_history_is_refused() {
    let world = World::new().await;
    let workspace = world.workspace();
    git(&workspace, &["checkout", "-q", "--orphan", "alone"]);
    let head = push(&workspace, "task/alone");
    let new = suite::request(&world.project, "task/alone", &head);
    let failure = world.forge.open_pull_request(&new).await.unwrap_err();
    assert_eq!(failure.kind, "unrelated_history");
}

#[tokio::test]
async fn a_clone_has_the_default_branch_and_nothing_of_ours() {
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
    world
        .forge
        .merge(&world.project, pull.number, &head)
        .await
        .unwrap();
    let folder = world.home.path().join("my clone");
    world
        .forge
        .clone_into(&world.project, &folder)
        .await
        .unwrap();
    assert_eq!(std::fs::read_to_string(folder.join("x")).unwrap(), "1");
    let refs = git(&folder, &["for-each-ref", "--format=%(refname)"]);
    assert_eq!(
        refs,
        "refs/heads/main\nrefs/remotes/origin/HEAD\nrefs/remotes/origin/main"
    );
    let advertised = git(&folder, &["ls-remote", "origin"]);
    assert!(
        !advertised.contains("refs/artel") && !advertised.contains("refs/pull"),
        "{advertised}"
    );
    let error = world
        .forge
        .clone_into(&world.project, &folder)
        .await
        .unwrap_err();
    assert!(matches!(error, forge::Error::CloneTarget(_)), "{error}");
    let empty = world.home.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    world
        .forge
        .clone_into(&world.project, &empty)
        .await
        .unwrap();
    let nobody = ProjectId::founded_by("nobody");
    let error = world
        .forge
        .clone_into(&nobody, &world.home.path().join("z"))
        .await
        .unwrap_err();
    assert!(matches!(error, forge::Error::NoRepository(_)), "{error}");
}
