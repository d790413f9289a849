//! What a hostile worker might push, and what it must not reach.

use std::os::unix::fs::PermissionsExt;

use forge::suite;
use ports::Forge;

use crate::world::{World, git, push, run};

#[tokio::test]
async fn only_branches_of_tasks_can_be_pushed_to() {
    let world = World::new().await;
    let workspace = world.workspace();
    let head = push(&workspace, "task/x");
    suite::commit(
        &world.forge,
        &world.project,
        "task/y",
        &world.base,
        "y",
        "1",
    )
    .await;
    for target in ["refs/heads/main", "refs/pull/1/head", "refs/artel/pulls/1"] {
        let (success, said) = run(&workspace, &["push", "origin", &format!("{head}:{target}")]);
        assert!(!success && said.contains("hidden"), "{target}: {said}");
    }
    let (success, said) = run(&workspace, &["push", "origin", ":refs/heads/task/y"]);
    assert!(!success, "{said}");
    assert_eq!(suite::main(&world.forge, &world.project).await, world.base);
}

#[tokio::test]
async fn a_hook_in_the_repository_is_never_run() {
    let world = World::new().await;
    let ran = world.home.path().join("ran");
    let hooks = world.bare().join("hooks");
    std::fs::create_dir_all(&hooks).unwrap();
    for name in [
        "post-receive",
        "reference-transaction",
        "update",
        "post-update",
    ] {
        let hook = hooks.join(name);
        std::fs::write(&hook, format!("#!/bin/sh\ntouch {}\n", ran.display())).unwrap();
        std::fs::set_permissions(&hook, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let head = push(&world.workspace(), "task/x");
    suite::open(&world.forge, &world.project, "task/x", &head).await;
    assert!(!ran.exists());
}

#[tokio::test]
async fn hostile_trees_are_not_written_out() {
    let world = World::new().await;
    let blob = world.object("blob", b"x");
    let passwd = world.object("blob", b"/etc/passwd");
    let up = world.object("blob", b"../../outside");
    let through = world.object("blob", b"dir/../../outside");
    let config = world.object(
        "tree",
        &[b"100644 config\0".as_slice(), &hex(&blob)].concat(),
    );
    for (what, entries) in [
        (
            "an absolute link",
            vec![("120000", b"link".as_slice(), passwd.as_str())],
        ),
        (
            "a link up",
            vec![("120000", b"link".as_slice(), up.as_str())],
        ),
        (
            "a link through",
            vec![("120000", b"link".as_slice(), through.as_str())],
        ),
        (
            "a parent",
            vec![("100644", b"..".as_slice(), blob.as_str())],
        ),
        (
            "git's folder",
            vec![("40000", b".git".as_slice(), config.as_str())],
        ),
        (
            "git's folder in capitals",
            vec![("40000", b".GIT".as_slice(), config.as_str())],
        ),
        (
            "a slash",
            vec![("100644", b"../evil".as_slice(), blob.as_str())],
        ),
    ] {
        let sha = world.crafted(&entries);
        let error = world
            .export(&sha)
            .await
            .err()
            .unwrap_or_else(|| panic!("{what} was written"));
        assert!(
            matches!(error, forge::Error::Hostile { .. }),
            "{what}: {error}"
        );
    }
    assert!(
        !world.home.path().join("outside").exists() && !world.home.path().join("evil").exists()
    );
    // A link and a folder of one name: whatever comes second fails, nothing is written through the link.
    let inner = world.object("tree", &[b"100644 f\0".as_slice(), &hex(&blob)].concat());
    let here = world.object("blob", b"other");
    let sha = world.crafted(&[("120000", b"a", &here), ("40000", b"a", &inner)]);
    assert!(world.export(&sha).await.is_err());
}

fn hex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap())
        .collect()
}

#[tokio::test]
async fn harmless_links_executables_and_submodules_are_written_as_they_are() {
    let world = World::new().await;
    let workspace = world.workspace();
    std::fs::create_dir(workspace.join("dir")).unwrap();
    std::fs::write(workspace.join("dir/file"), "x").unwrap();
    std::os::unix::fs::symlink("../dir/file", workspace.join("dir/link")).unwrap();
    std::fs::write(workspace.join("script"), "#!/bin/sh\n").unwrap();
    std::fs::set_permissions(
        workspace.join("script"),
        std::fs::Permissions::from_mode(0o755),
    )
    .unwrap();
    std::fs::write(
        workspace.join(".gitattributes"),
        "* export-ignore text eol=crlf ident filter=evil\n",
    )
    .unwrap();
    git(&workspace, &["config", "filter.evil.clean", "cat"]);
    git(
        &workspace,
        &[
            "update-index",
            "--add",
            "--cacheinfo",
            &format!("160000,{},sub", world.base),
        ],
    );
    std::fs::write(workspace.join("keyword"), "$Id$\n").unwrap();
    std::fs::create_dir(workspace.join("sub")).unwrap();
    git(&workspace, &["init", "-q", "sub"]);
    let head = push(&workspace, "task/x");
    let folder = world.export(&head).await.unwrap();
    assert_eq!(
        std::fs::read_to_string(folder.join("dir/link")).unwrap(),
        "x"
    );
    assert_eq!(
        std::fs::read_to_string(folder.join("keyword")).unwrap(),
        "$Id$\n"
    );
    let mode = std::fs::metadata(folder.join("script"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o111, 0o111);
    assert!(
        !world
            .forge
            .list_files(&world.project, &head)
            .await
            .unwrap()
            .contains(&"sub".to_owned())
    );
    assert_eq!(
        world
            .forge
            .read_file(&world.project, &head, "dir/link")
            .await
            .unwrap(),
        None
    );
}

#[tokio::test]
async fn at_most_ten_thousand_files_are_listed() {
    let world = World::new().await;
    let blob = world.object("blob", b"x");
    let names: Vec<String> = (0..10_050).map(|n| format!("file{n:05}")).collect();
    let entries: Vec<(&str, &[u8], &str)> = names
        .iter()
        .map(|name| ("100644", name.as_bytes(), blob.as_str()))
        .collect();
    let sha = world.crafted(&entries);
    assert_eq!(
        world
            .forge
            .list_files(&world.project, &sha)
            .await
            .unwrap()
            .len(),
        forge::MAX_LISTED_FILES
    );
    let folder = world.export(&sha).await.unwrap();
    assert_eq!(std::fs::read_dir(folder).unwrap().count(), 10_050);
}
