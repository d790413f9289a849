//! Taking over, in the sandbox and without one, with a Git that looks around first.

use super::*;
use crate::places::Places;
use sandbox::Sandbox;
use std::fmt::Write as _;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output, Stdio};

/// A repository with a history, and a workspace of it in which a worker was.
struct Scene {
    folder: tempfile::TempDir,
    places: Places,
    asked: Repository,
}

fn git(folder: &Path, args: &[&str], input: &str) -> String {
    let mut child = Command::new("git")
        .args(["-c", "user.name=T", "-c", "user.email=t@example.org", "-C"])
        .arg(folder)
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(input.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "git {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// A history of so many commits on a branch, each with a new text in one of twenty files, for `git fast-import`.
fn history(branch: &str, from: Option<&str>, commits: usize) -> String {
    let mut text = String::new();
    for n in 0..commits {
        let parent = match (n, from) {
            (0, Some(from)) => format!("\nfrom {from}"),
            _ => String::new(),
        };
        let (name, content) = (
            format!("{branch}-{}", n % 20),
            format!("{branch} has {n}\n"),
        );
        let size = content.len();
        // Writing to a string does not fail.
        let _ = writeln!(
            text,
            "commit refs/heads/{branch}\ncommitter T <t@example.org> {n} +0000\ndata 1\nc{parent}\nM 100644 inline {name}\ndata {size}\n{content}"
        );
    }
    text + "done\n"
}

impl Scene {
    fn new(base_commits: usize, task_commits: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut request = protocol::suite::request("r1");
        request.repository.branch = "task".into();
        let places = Places::of(&folder.path().join("home"), &request);
        let bare = folder.path().join("bare.git");
        for path in [&places.state, &places.workspace, &bare] {
            std::fs::create_dir_all(path).unwrap();
        }
        git(&bare, &["init", "-q", "--bare", "-b", "main"], "");
        let import = ["fast-import", "--quiet", "--done"];
        git(&bare, &import, &history("main", None, base_commits));
        request.repository.base_sha = git(&bare, &["rev-parse", "main"], "");
        let work = &places.workspace;
        git(work, &["init", "-q", "-b", "task"], "");
        git(
            work,
            &["fetch", "-q", bare.to_str().unwrap(), "main:main"],
            "",
        );
        let tasks = history("task", Some("refs/heads/main^0"), task_commits);
        git(work, &import, &tasks);
        Self {
            asked: request.repository,
            places,
            folder,
        }
    }

    fn bare(&self) -> PathBuf {
        self.folder.path().join("bare.git")
    }

    async fn taken(&self, reading: &Reading) -> Result<Taken, Trouble> {
        take_over(&self.places, &self.bare(), &self.asked, reading).await
    }

    /// Another Git, which runs this before it becomes the real one.
    fn double(&self, before: &str) -> PathBuf {
        let folder = self.folder.path().join("double");
        std::fs::create_dir_all(&folder).unwrap();
        let (double, real) = (folder.join("git"), sandbox_git());
        let text = format!("#!/bin/bash\n{before}\nexec {real} \"$@\"\n");
        std::fs::write(&double, text).unwrap();
        std::fs::set_permissions(&double, std::fs::Permissions::from_mode(0o755)).unwrap();
        folder
    }
}

/// Where the real one is.
fn sandbox_git() -> String {
    let output = Command::new("sh").args(["-c", "command -v git"]).output();
    String::from_utf8(output.unwrap().stdout)
        .unwrap()
        .trim()
        .to_owned()
}

fn confined() -> Confined {
    let sandbox = Sandbox::detect().expect("bubblewrap is here, as for every test of this crate");
    Confined::new(sandbox)
}

fn inside(programs: PathBuf) -> Reading {
    Reading::within(confined().with_programs(programs))
}

#[tokio::test]
async fn what_reads_a_workers_objects_sees_them_and_nothing_else() {
    let scene = Scene::new(3, 2);
    let canary = scene.folder.path().join("canary");
    std::fs::write(&canary, "secret").unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let (secret, state) = (canary.display(), scene.places.state.display());
    let objects = scene.places.workspace.join(".git/objects");
    let looks = [
        ("file", format!("cat {secret} >/dev/null 2>&1")),
        (
            "network",
            format!("(exec 3<>/dev/tcp/127.0.0.1/{port}) 2>/dev/null"),
        ),
        ("state", format!("ls {state} >/dev/null 2>&1")),
        ("process", format!("kill -0 {}", std::process::id())),
        (
            "objects",
            format!(
                "touch {} {}/trace 2>/dev/null",
                objects.join("trace").display(),
                reading::OBJECTS
            ),
        ),
        (
            "home",
            "ls -A /root /home/*/.ssh 2>/dev/null | grep -q .".to_owned(),
        ),
    ];
    let asked = looks
        .iter()
        .map(|(what, look)| format!("{look} && {{ echo finds {what} >&2; exit 77; }}"));
    let asked = asked.collect::<Vec<_>>().join("\n");
    let taken = scene.taken(&inside(scene.double(&asked))).await.unwrap();
    assert_eq!((taken.commits, taken.files), (2, 2));
    // They are good questions: outside, each of the first four is answered with yes.
    for (what, look) in &looks[..4] {
        let double = scene.double(&format!("{look} && exit 77")).join("git");
        let Output { status, .. } = Command::new(double).arg("--version").output().unwrap();
        assert_eq!(status.code(), Some(77), "{what}");
    }
    // And it was asked.
    let mute = inside(scene.double("echo asked the double >&2; exit 3"));
    let trouble = scene.taken(&mute).await.unwrap_err();
    assert!(trouble.evidence.contains("asked the double"), "{trouble:?}");
}

#[tokio::test]
async fn a_sandbox_that_cannot_be_had_is_no_fault_of_the_worker() {
    let scene = Scene::new(2, 1);
    let missing = scene.folder.path().join("missing");
    let trouble = scene.taken(&inside(missing)).await.unwrap_err();
    assert_eq!(trouble.kind, kind::SANDBOX_FAILED, "{trouble:?}");
}

#[tokio::test]
async fn a_git_that_breaks_its_bounds_is_ended_and_says_which() {
    let scene = Scene::new(2, 1);
    let many = "for n in $(seq 60); do sleep 60 & done; wait";
    let trouble = scene.taken(&inside(scene.double(many))).await.unwrap_err();
    assert_eq!(trouble.kind, kind::CONTENT_REFUSED);
    assert!(trouble.evidence.contains("more processes"), "{trouble:?}");
    let pushed = git(&scene.bare(), &["branch", "--list", "task"], "");
    assert_eq!(pushed, "");
}

#[tokio::test]
async fn a_long_history_is_taken_over_alike_in_the_sandbox_and_without_one() {
    let scene = Scene::new(4000, 450);
    let within = scene.taken(&Reading::within(confined())).await.unwrap();
    assert_eq!((within.commits, within.files), (450, 20));
    let bare = scene.bare();
    assert_eq!(git(&bare, &["rev-parse", "task"], ""), within.head_sha);
    git(&bare, &["fsck", "--strict", "--no-dangling"], "");
    git(&bare, &["update-ref", "-d", "refs/heads/task"], "");
    let without = scene.taken(&Reading::default()).await.unwrap();
    assert_eq!(within, without);
    // Nothing of the way is left, and what is there already is no trouble.
    assert!(!scene.places.state.join("pull").exists());
    let again = scene.taken(&Reading::within(confined())).await.unwrap();
    assert_eq!(again.head_sha, within.head_sha);
}

#[tokio::test]
async fn what_is_missing_or_broken_in_a_workspace_is_refused_in_the_sandbox_too() {
    let scene = Scene::new(2, 2);
    let work = &scene.places.workspace;
    let file = |name: &str| {
        let object = git(work, &["rev-parse", name], "");
        work.join(".git/objects")
            .join(&object[..2])
            .join(&object[2..])
    };
    let (one, other) = (file("task:task-0"), file("task:task-1"));
    let good = std::fs::read(&one).unwrap();
    // It is gone, it is another one, it is none.
    for bad in [None, Some(std::fs::read(other).unwrap()), Some(b"x".into())] {
        std::fs::remove_file(&one).unwrap();
        if let Some(bad) = &bad {
            std::fs::write(&one, bad).unwrap();
        }
        let refused = scene.taken(&Reading::within(confined())).await;
        assert_eq!(refused.unwrap_err().kind, kind::CONTENT_REFUSED, "{bad:?}");
        std::fs::write(&one, &good).unwrap();
    }
    let taken = scene.taken(&Reading::within(confined())).await.unwrap();
    assert_eq!(taken.commits, 2);
}
