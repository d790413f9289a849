//! What an engine leaves that is killed between making a container and beginning it.

use crate::stage::{Stage, docker, runtime, until, variable};
use serde_json::{Value, json};
use std::path::Path;
use std::process::Command;

/// A container that the engine's runtime has made and never begins, as an engine leaves it that is killed in between.
struct Unbegun {
    folder: tempfile::TempDir,
    id: String,
}

impl Unbegun {
    /// Of this id, with this folder as its workspace.
    fn new(id: &str, workspace: &Path) -> Self {
        let unbegun = Self {
            folder: tempfile::tempdir().unwrap(),
            id: id.to_owned(),
        };
        let bundle = unbegun.folder.path().join("bundle");
        std::fs::create_dir_all(bundle.join("rootfs")).unwrap();
        unbegun.runc(&["spec", "--bundle", bundle.to_str().unwrap()]);
        let path = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        config["process"]["terminal"] = false.into();
        config["process"]["args"] = json!(["/bin/sleep", "600"]);
        config["linux"]["cgroupsPath"] = format!("/artel-test/{id}").into();
        let mounts = config["mounts"].as_array_mut().unwrap();
        let mut bind = |host: &Path, guest: &str| {
            mounts.push(json!({
                "destination": guest, "type": "bind", "source": host, "options": ["bind", "ro"]
            }));
        };
        // What its program needs is this machine's.
        for folder in ["/usr", "/bin", "/lib", "/lib64"] {
            if Path::new(folder).exists() {
                bind(Path::new(folder), folder);
            }
        }
        bind(workspace, "/workspace");
        std::fs::write(&path, config.to_string()).unwrap();
        let number = unbegun.folder.path().join("number");
        let words = ["create", "--bundle", bundle.to_str().unwrap(), "--pid-file"];
        unbegun.runc(&[&words[..], &[number.to_str().unwrap(), id]].concat());
        assert!(unbegun.waits());
        unbegun
    }

    fn runc(&self, words: &[&str]) {
        let said = std::fs::File::create(self.folder.path().join("said")).unwrap();
        let status = Command::new("runc")
            .arg("--root")
            .arg(self.folder.path().join("state"))
            .args(words)
            .stdin(std::process::Stdio::null())
            // A file: what waits keeps it open.
            .stdout(said.try_clone().unwrap())
            .stderr(said)
            .status()
            .expect("runc can be started (Debian's package runc, as root)");
        let said = std::fs::read_to_string(self.folder.path().join("said")).unwrap();
        assert!(status.success(), "runc {words:?}: {said}");
    }

    /// Whether its process waits for its beginning.
    fn waits(&self) -> bool {
        let number = std::fs::read_to_string(self.folder.path().join("number")).unwrap();
        let line = std::fs::read(format!("/proc/{}/cmdline", number.trim())).unwrap_or_default();
        line == b"runc\0init\0"
    }
}

impl Drop for Unbegun {
    fn drop(&mut self) {
        self.runc(&["delete", "--force", &self.id]);
    }
}

#[tokio::test]
async fn what_was_made_of_a_container_and_never_begun_is_ended_and_nobody_elses_is() {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let (runtime, cleanup) = runtime(&home).await;
    let ours = home.join("workspaces/p/job-1/lost");
    let others = folder
        .path()
        .join("home-of-another/workspaces/p/job-1/lost");
    for workspace in [&ours, &others] {
        std::fs::create_dir_all(workspace).unwrap();
    }
    // The engine knows nothing of the first and the last, and may be about to begin the other one.
    let strangers = Unbegun::new(&"0b".repeat(32), &others);
    let made = docker(&["create", &variable("ARTEL_TEST_IMAGE"), "true"]);
    let known = Unbegun::new(made.trim(), &ours);
    // It is ended last, because it was made last.
    let lost = Unbegun::new(&"0a".repeat(32), &ours);
    let stage = Stage::with(folder, runtime, cleanup, []).await;
    until(async || (!lost.waits()).then_some(())).await;
    assert!(strangers.waits() && known.waits());
    stage.shut_down().await;
    assert!(strangers.waits() && known.waits());
    docker(&["rm", made.trim()]);
}
