//! A disk that is full, or cannot be written, before a worker begins.

use crate::stage::{Stage, assert_succeeded, kind, runtime};
use std::path::{Path, PathBuf};
use std::process::Command;

const COMMIT: &str = "echo hello > hello.txt && git add hello.txt && git commit -q -m 'Add hello'";
const WAITING: &str = "waiting: the disk of the spawner is full";

/// A small disk where the workspaces of a job are, which root can make. It is full.
struct FullDisk(PathBuf);

impl FullDisk {
    fn new(home: &Path) -> Self {
        let folder = home.join("workspaces/p/job-1");
        std::fs::create_dir_all(&folder).unwrap();
        let disk = Self(folder);
        disk.mount("size=64k");
        let filled = std::fs::write(disk.0.join("filler"), vec![0; 128 * 1024]);
        assert_eq!(filled.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
        disk
    }

    fn mount(&self, options: &str) {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(
            status.success(),
            "a small disk can only be made by root with the right to mount; run the tests so"
        );
    }

    fn make_room(&self) {
        self.mount("remount,size=8g");
    }
}

impl Drop for FullDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

async fn stage() -> (Stage, FullDisk) {
    let folder = tempfile::tempdir().unwrap();
    let home = folder.path().join("home");
    let (runtime, cleanup) = runtime(&home).await;
    let disk = FullDisk::new(&home);
    (Stage::with(folder, runtime, cleanup, []).await, disk)
}

#[tokio::test]
async fn a_job_waits_for_room_on_a_full_disk_and_is_done_when_there_is_some() {
    let (stage, disk) = stage().await;
    stage.submit(&stage.script("r1", 1, COMMIT)).await;
    stage.until_phase("r1", WAITING).await;
    disk.make_room();
    let result = stage.result("r1").await;
    assert_succeeded(&result);
    stage.shut_down().await;
}

#[tokio::test]
async fn a_job_that_waits_for_room_can_be_cancelled() {
    let (stage, _disk) = stage().await;
    stage.submit(&stage.script("r1", 1, COMMIT)).await;
    stage.until_phase("r1", WAITING).await;
    stage.transport.cancel("r1").await.unwrap();
    let result = stage.result("r1").await;
    assert_eq!(kind(&result), spawner::kind::CANCELLED);
    stage.shut_down().await;
}

#[tokio::test]
async fn a_place_that_cannot_be_written_ends_the_attempt_and_says_who_has_to_look() {
    let stage = Stage::new([]).await;
    // Where a number is to be written.
    let notes = stage.home().join("workspaces/p/job-1/one~/fencing");
    std::fs::create_dir_all(notes.join("not a number")).unwrap();
    let result = stage.run_script(COMMIT).await;
    assert_eq!(kind(&result), spawner::kind::CLONE_FAILED);
    let failure = result.failure.unwrap();
    assert!(failure.message.contains("admin"), "{failure:?}");
    assert!(failure.evidence.contains("fencing"), "{failure:?}");
}
