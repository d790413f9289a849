//! A project with a repository, and a worker's Git that works on it.

use std::path::{Path, PathBuf};
use std::process::Command;

use forge::{LocalForge, suite};
use ports::{ProjectId, Sha};

pub struct World {
    pub home: tempfile::TempDir,
    pub forge: LocalForge,
    pub project: ProjectId,
    pub base: Sha,
}

impl World {
    pub async fn new() -> Self {
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

    pub fn bare(&self) -> PathBuf {
        self.home.path().join(format!("repos/{}.git", self.project))
    }

    /// A worker's clone of everything.
    pub fn workspace(&self) -> PathBuf {
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
    pub fn object(&self, kind: &str, bytes: &[u8]) -> String {
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
    pub fn crafted(&self, entries: &[(&str, &[u8], &str)]) -> Sha {
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

    pub async fn export(&self, sha: &Sha) -> Result<PathBuf, forge::Error> {
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

pub fn run(folder: &Path, args: &[&str]) -> (bool, String) {
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

pub fn git(folder: &Path, args: &[&str]) -> String {
    let (success, text) = run(folder, args);
    assert!(success, "git {args:?}: {text}");
    text
}

/// Commits everything in a workspace and pushes it to a branch.
pub fn push(workspace: &Path, branch: &str) -> Sha {
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
