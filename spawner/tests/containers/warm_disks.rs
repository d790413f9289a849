//! Containers that wait while workspaces are disks of their own: the disk is made beforehand with the container, and becomes the
//! workspace's. They need root and loop devices, as disks do.

use crate::stage::{assert_succeeded, containers, docker, kind, until, worker_image, workspace};
use crate::warm::{DISK_MB, Killed, Ready, finds_what_it_would_find_in_any_other, slots, waiting};
use spawner::Disk;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Works until there is a file `go`, and says before where it works.
const WAIT: &str = "cat /etc/hostname > .git/which; touch here
while [ ! -e go ]; do sleep 0.05; done; rm here go";

async fn ready() -> Ready {
    Ready::with(Disk::Loop, &worker_image()).await
}

/// How many disks in a folder are mounted, and how many have a loop device.
pub fn used(folder: &Path) -> (usize, usize) {
    let folder = folder.display().to_string();
    let count = |text: &str| text.lines().filter(|line| line.contains(&folder)).count();
    let devices = Command::new("losetup").arg("--list").output().unwrap();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    (
        count(&mounts),
        count(&String::from_utf8_lossy(&devices.stdout)),
    )
}

/// Ends the spawner, and sees that it leaves nothing of what waited.
async fn end(ready: Ready) {
    let label = ready.containers.label().to_owned();
    let folder = ready.stage.shut_down().await;
    assert!(containers(&label).is_empty(), "nobody waits any more");
    assert_eq!(slots(&folder.path().join("home")), 0);
    none_is_used(folder.path()).await;
}

pub async fn none_is_used(folder: &Path) {
    until(async || (used(folder) == (0, 0)).then_some(())).await;
}

fn image(home: &Path, task: &str) -> PathBuf {
    home.join(format!("workspaces/p/job-1/{task}~/disk.img"))
}

#[tokio::test]
async fn a_job_finds_what_it_would_find_in_any_container_also_when_its_disk_was_made_before() {
    finds_what_it_would_find_in_any_other(ready().await).await;
}

#[tokio::test]
async fn a_disk_bomb_in_a_container_that_waited_is_refused_its_writes() {
    let ready = ready().await;
    let first = ready.waiting(&[]).await;
    let home = ready.stage.home();
    assert_eq!(used(&home), (0, 1), "only the container has its disk");
    let script = format!("{WAIT}; head -c 300000000 /dev/zero > big");
    let mut request = ready.request("one", &script);
    request.limits.disk_mb = DISK_MB;
    ready.stage.submit(&request).await;
    until(async || workspace(&home).join("here").exists().then_some(())).await;
    let which = std::fs::read_to_string(workspace(&home).join(".git/which")).unwrap();
    assert!(first.starts_with(which.trim()), "it is the one that waited");
    std::fs::write(workspace(&home).join("go"), "").unwrap();
    let result = ready.stage.result("one").await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_DISK, "{result:#?}");
    let evidence = result.failure.unwrap().evidence;
    for words in ["No space left on device", "the disk of 32 MiB was full"] {
        assert!(evidence.contains(words), "{evidence}");
    }
    let taken = std::fs::metadata(image(&home, "one")).unwrap().blocks() * 512;
    assert!(taken <= DISK_MB << 20, "{taken} bytes of the machine");
    // The next attempt has an empty disk, in a container of its own.
    let mut second = ready.request("one", "");
    (second.request_id, second.attempt, second.fencing_token) = ("two".into(), 2, 2);
    assert_succeeded(&ready.stage.run(&second).await);
    assert!(image(&home, "one").with_file_name("broken.img").exists());
    end(ready).await;
}

#[tokio::test]
async fn a_later_attempt_finds_the_work_on_the_disk_that_was_made_before_the_first_and_can_have_more()
 {
    let ready = ready().await;
    let first = ready.waiting(&[]).await;
    let home = ready.stage.home();
    let request = ready.request("one", "cat /etc/hostname > draft; exit 1");
    let failed = ready.stage.run(&request).await;
    assert!(failed.failure.is_some(), "{failed:#?}");
    until(async || (!containers(ready.containers.label()).contains(&first)).then_some(())).await;
    let task = image(&home, "one").parent().unwrap().to_owned();
    none_is_used(&task).await;
    let mut second = ready.request("one", "git add draft");
    (second.request_id, second.attempt, second.fencing_token) = ("two".into(), 2, 2);
    // As when somebody has raised the limit.
    second.limits.disk_mb = 2 * DISK_MB;
    assert_succeeded(&ready.stage.run(&second).await);
    let draft = ready.stage.show("draft");
    assert!(first.starts_with(draft.trim()), "{draft}");
    assert!(!ready.ran_in("one", &first), "it serves one attempt");
    let size = std::fs::metadata(image(&home, "one")).unwrap().len();
    assert_eq!(size, (2 * DISK_MB) << 20);
    assert!(!task.join("broken.img").exists());
    end(ready).await;
}

#[tokio::test]
async fn a_job_with_a_disk_of_another_size_gets_a_container_of_its_own() {
    let ready = ready().await;
    let first = ready.waiting(&[]).await;
    let mut request = ready.request("one", "");
    request.limits.disk_mb = 2 * DISK_MB;
    assert_succeeded(&ready.stage.run(&request).await);
    assert!(!ready.ran_in("one", &first));
    let size = std::fs::metadata(image(&ready.stage.home(), "one"));
    assert_eq!(size.unwrap().len(), (2 * DISK_MB) << 20);
    assert_eq!(ready.waiting(&[]).await, first, "it waits still");
    end(ready).await;
}

#[tokio::test]
async fn a_container_that_does_not_take_its_job_leaves_it_the_disk() {
    let ready = ready().await;
    let first = ready.waiting(&[]).await;
    let before = std::fs::read_dir(ready.stage.home().join("pool")).unwrap();
    let slot = before.map(|slot| slot.unwrap().path()).next().unwrap();
    let disk = std::fs::metadata(slot.join("disk.img")).unwrap().ino();
    // It is there, and does nothing.
    docker(&["kill", "--signal", "STOP", &first]);
    ready.run("one", "").await;
    assert!(!ready.ran_in("one", &first));
    let of_task = std::fs::metadata(image(&ready.stage.home(), "one")).unwrap();
    assert_eq!(of_task.ino(), disk);
    until(async || (!containers(ready.containers.label()).contains(&first)).then_some(())).await;
    until(async || (!slot.exists()).then_some(())).await;
    end(ready).await;
}

#[tokio::test]
async fn a_container_whose_job_never_comes_to_its_start_is_removed() {
    let ready = ready().await;
    let first = ready.waiting(&[]).await;
    let bare = ready.stage.bare();
    std::fs::rename(&bare, bare.with_extension("away")).unwrap();
    let request = ready.request("one", "");
    let result = ready.stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::REPOSITORY_MISSING);
    until(async || (!containers(ready.containers.label()).contains(&first)).then_some(())).await;
    let task = image(&ready.stage.home(), "one");
    none_is_used(task.parent().unwrap()).await;
    ready.waiting(&[&first]).await;
    until(async || (slots(&ready.stage.home()) == 1).then_some(())).await;
    end(ready).await;
}

#[tokio::test]
async fn of_a_spawner_that_was_killed_the_worker_is_adopted_with_its_disk_and_disks_that_wait_are_removed()
 {
    let killed = Killed::on("loop", true).await;
    let before = waiting(&killed.label);
    let workspaces = killed.home.join("workspaces");
    assert_eq!(used(&workspaces), (1, 1), "of the one that works");
    none_is_used(&killed.home.join("pool")).await;
    killed.goes_on(async || killed.only(&before)).await;
    none_is_used(&killed.home).await;
    assert!(image(&killed.home, "one").exists(), "for the next attempt");
}

#[tokio::test]
async fn a_spawner_that_was_killed_between_the_disk_and_the_clone_has_left_an_empty_disk() {
    let killed = Killed::on("loop", false).await;
    let waited = containers(&killed.label).pop().unwrap();
    let mut slots = std::fs::read_dir(killed.home.join("pool")).unwrap();
    let slot = slots.next().unwrap().unwrap().path();
    // As if it had been killed there.
    let image = image(&killed.home, "one");
    std::fs::create_dir_all(image.parent().unwrap()).unwrap();
    std::fs::rename(slot.join("disk.img"), &image).unwrap();
    killed.goes_on(async || killed.another(&waited)).await;
    none_is_used(&killed.home).await;
    assert!(!image.with_file_name("broken.img").exists());
}
