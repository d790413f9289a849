//! Workspaces that are disks of their own. They need root and loop devices; where those are missing the spawner says so, and these
//! tests fail.

use crate::stage::{Stage, assert_succeeded, git, kind, runtime};
use spawner::Disk;
use std::os::unix::fs::MetadataExt as _;
use std::process::Command;

const COMMIT: &str = "echo hello > hello.txt; git add hello.txt; git commit -qm Hello";

async fn stage() -> Stage {
    let folder = tempfile::tempdir().unwrap();
    let (runtime, cleanup) = runtime(&folder.path().join("home")).await;
    Stage::tuned(folder, runtime, cleanup, [], |options| {
        options.disk = Disk::Loop;
    })
    .await
}

/// What of a stage is mounted, or has a loop device.
fn mounted(stage: &Stage) -> Vec<String> {
    let devices = Command::new("losetup").arg("--list").output().unwrap();
    let devices = String::from_utf8_lossy(&devices.stdout).into_owned();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    let home = stage.home().display().to_string();
    let all = devices.lines().chain(mounts.lines());
    all.filter(|line| line.contains(&home))
        .map(str::to_owned)
        .collect()
}

#[tokio::test]
async fn a_disk_bomb_is_refused_its_writes_and_the_machine_keeps_its_space() {
    let stage = stage().await;
    // More than there is place for, faster than anybody looks.
    let mut request = stage.script("r1", 1, "head -c 300000000 /dev/zero > big");
    request.limits.disk_mb = 32;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_DISK, "{result:#?}");
    let failure = result.failure.unwrap();
    assert!(failure.message.contains("32 MiB"), "{failure:#?}");
    for words in ["No space left on device", "the disk of 32 MiB was full"] {
        assert!(failure.evidence.contains(words), "{failure:#?}");
    }
    let image = stage.home().join("workspaces/p/job-1/one~/disk.img");
    let taken = std::fs::metadata(&image).unwrap().blocks() * 512;
    assert!(taken <= 32 << 20, "{taken} bytes of the machine");
    crate::stage::until(async || mounted(&stage).is_empty().then_some(())).await;
    // The next attempt has an empty disk; the full one is there for a person to look at.
    let mut second = stage.script("r2", 2, COMMIT);
    second.limits.disk_mb = 32;
    assert_succeeded(&stage.run(&second).await);
    assert!(image.with_file_name("broken.img").exists());
}

#[tokio::test]
async fn a_worker_that_makes_room_again_goes_on_and_the_next_attempt_finds_what_it_left() {
    let stage = stage().await;
    let script = format!(
        "head -c 300000000 /dev/zero > big || true; rm big; echo mine > .git/kept; {COMMIT}"
    );
    let mut request = stage.script("r1", 1, &script);
    request.limits.disk_mb = 32;
    assert_succeeded(&stage.run(&request).await);
    assert_eq!(stage.show("hello.txt"), "hello\n");
    crate::stage::until(async || mounted(&stage).is_empty().then_some(())).await;
    let mut second = stage.script(
        "r2",
        2,
        "cp .git/kept kept.txt; git add kept.txt; git commit -qm Kept",
    );
    // More than before, as when somebody has raised the limit.
    second.limits.disk_mb = 64;
    assert_succeeded(&stage.run(&second).await);
    assert_eq!(stage.show("kept.txt"), "mine\n");
    let image = stage.home().join("workspaces/p/job-1/one~/disk.img");
    assert_eq!(std::fs::metadata(image).unwrap().len(), 64 << 20);
}

#[tokio::test]
async fn a_repository_that_does_not_fit_on_its_disk_is_said_so() {
    let stage = stage().await;
    let author = stage.folder.path().join("author");
    // Nothing that could be pressed together.
    let mut noise = std::fs::File::open("/dev/urandom").unwrap();
    let mut large = std::fs::File::create(author.join("large")).unwrap();
    std::io::copy(&mut std::io::Read::take(&mut noise, 24 << 20), &mut large).unwrap();
    git(&author, &["add", "large"]);
    git(&author, &["commit", "-q", "-m", "Add much"]);
    git(
        &author,
        &["push", "-q", stage.bare().to_str().unwrap(), "main"],
    );
    let mut request = stage.script("r1", 1, COMMIT);
    request.limits.disk_mb = 16;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_DISK, "{result:#?}");
    let message = result.failure.unwrap().message;
    assert!(message.contains("does not fit"), "{message}");
}
