//! Local repositories as real Git sees them: what is pushed to them, cloned from them, and done to them at once.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use forge::{LocalForge, suite};
use ports::{Forge, MergeOutcome, ProjectId, PullRequestStatus, RebaseOutcome, Sha};

struct World {
    home: tempfile::TempDir,
    forge: LocalForge,
    project: ProjectId,
    base: Sha,
}

impl World {
    async fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        let forge = LocalForge::new(home.path().join("repos"), None);
        let project = ProjectId::founded_by("git");
        let base = suite::begin(&forge, &project).await;
        Self {
            home,
            forge,
            project,
            base,
        }
    }

    fn bare(&self) -> PathBuf {
        self.home.path().join(format!("repos/{}.git", self.project))
    }

    /// A worker's clone of everything.
    fn workspace(&self) -> PathBuf {
        let path = self
            .home
            .path()
            .join(format!("work-{}", uuid::Uuid::new_v4().simple()));
        git(
            self.home.path(),
            &[
                "clone",
                "-q",
                &self.bare().to_string_lossy(),
                &path.to_string_lossy(),
            ],
        );
        path
    }

    /// Writes an object straight into the repository, as a hostile worker's push could if it were not checked.
    fn object(&self, kind: &str, bytes: &[u8]) -> String {
        let file = self.home.path().join("object");
        std::fs::write(&file, bytes).unwrap();
        git(
            &self.bare(),
            &[
                "hash-object",
                "-t",
                kind,
                "-w",
                "--literally",
                &file.to_string_lossy(),
            ],
        )
    }

    /// A commit whose tree has these entries.
    fn crafted(&self, entries: &[(&str, &[u8], &str)]) -> Sha {
        let mut tree = Vec::new();
        for (mode, name, object) in entries {
            tree.extend_from_slice(format!("{mode} ").as_bytes());
            tree.extend_from_slice(name);
            tree.push(0);
            tree.extend(
                (0..40)
                    .step_by(2)
                    .map(|at| u8::from_str_radix(&object[at..at + 2], 16).unwrap()),
            );
        }
        let tree = self.object("tree", &tree);
        let text = format!(
            "tree {tree}\nparent {}\nauthor A <a@b> 1 +0000\ncommitter A <a@b> 1 +0000\n\nhostile\n",
            self.base
        );
        Sha::new(self.object("commit", text.as_bytes()))
    }

    async fn export(&self, sha: &Sha) -> Result<PathBuf, forge::Error> {
        let folder = self
            .home
            .path()
            .join(format!("export-{}", uuid::Uuid::new_v4().simple()));
        std::fs::create_dir(&folder).unwrap();
        self.forge
            .export(&self.project, sha, &folder)
            .await
            .map(|()| folder)
    }
}

fn run(folder: &Path, args: &[&str]) -> (bool, String) {
    let output = Command::new("git")
        .args([
            "-c",
            "user.name=Worker",
            "-c",
            "user.email=worker@localhost",
            "-c",
            "protocol.file.allow=always",
        ])
        .args(args)
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("GIT_CONFIG_GLOBAL", "/dev/null")
        .current_dir(folder)
        .output()
        .unwrap();
    let text = if output.status.success() {
        output.stdout
    } else {
        output.stderr
    };
    (
        output.status.success(),
        String::from_utf8_lossy(&text).trim().to_owned(),
    )
}

fn git(folder: &Path, args: &[&str]) -> String {
    let (success, text) = run(folder, args);
    assert!(success, "git {args:?}: {text}");
    text
}

/// Commits everything in a workspace and pushes it to a branch.
fn push(workspace: &Path, branch: &str) -> Sha {
    git(workspace, &["add", "-A"]);
    git(
        workspace,
        &[
            "commit",
            "-q",
            "--allow-empty",
            "-m",
            "Work\n\nCo-Worker: é",
        ],
    );
    git(
        workspace,
        &[
            "push",
            "-q",
            "-f",
            "origin",
            &format!("HEAD:refs/heads/{branch}"),
        ],
    );
    Sha::new(git(workspace, &["rev-parse", "HEAD"]))
}

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
