//! Data of another version, and a disk that is full.

use serde_json::Value;
use sqlx::Connection as _;

use crate::support::{Home, get};
use crate::tapes::{home, one, play};
use crate::{count, id, says, sentence};

#[tokio::test]
async fn a_data_folder_of_a_newer_version_is_refused_and_left_alone() {
    let home = home(&one());
    let project = id(&home.run(&["new", "Say hello", "--json"]).await.code(3));
    for (format, found) in [("2", "format 2,"), ("later", "format later,")] {
        std::fs::write(home.file("format"), format!("{format}\n")).unwrap();
        for args in [&["projects"][..], &["new", "x"], &["up"], &["migrate"]] {
            let ran = home.run(args).await.code(1);
            says(
                sentence(&ran),
                &[
                    "data folder",
                    &home.path().to_string_lossy(),
                    found,
                    "ARTEL_HOME",
                ],
            );
        }
        assert_eq!(
            std::fs::read_to_string(home.file("format")).unwrap(),
            format!("{format}\n")
        );
    }
    std::fs::write(home.file("format"), "1\n").unwrap();
    let report = home.status(&project).await;
    assert_eq!(report["waits"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_database_of_a_newer_schema_is_refused_and_left_alone() {
    let home = home(&one());
    let project = id(&home.run(&["new", "Say hello", "--json"]).await.code(3));
    let url = format!("sqlite://{}", home.file("artel.db").display());
    let mut database = sqlx::SqliteConnection::connect(&url).await.unwrap();
    for table in ["graph_migrations", "_sqlx_migrations"] {
        let insert = format!(
            "insert into {table} (version, description, success, checksum, execution_time) values (99990101000000, 'later', true, x'00', 0)"
        );
        sqlx::query(sqlx::AssertSqlSafe(insert))
            .execute(&mut database)
            .await
            .unwrap();
        for args in [&["projects"][..], &["up"], &["migrate"]] {
            let ran = home.run(args).await.code(1);
            says(sentence(&ran), &["newer", "99990101000000"]);
        }
        let delete = format!("delete from {table} where version = 99990101000000");
        sqlx::query(sqlx::AssertSqlSafe(delete))
            .execute(&mut database)
            .await
            .unwrap();
    }
    let report = home.status(&project).await;
    assert_eq!(report["waits"].as_array().unwrap().len(), 1);
}

/// A data folder on a small disk of its own, which root can make. Whatever runs on it is ended before it is taken away.
struct SmallDisk {
    home: Home,
    mount: Mount,
}

struct Mount(std::path::PathBuf);

impl SmallDisk {
    fn new(tape: &Value, size: &str) -> Self {
        let mut home = Home::new();
        let mount = Mount(home.path().to_owned());
        mount.options(&format!("size={size}"));
        play(&mut home, tape);
        Self { home, mount }
    }

    fn resize(&self, size: &str) {
        self.mount.options(&format!("remount,size={size}"));
    }

    /// Leaves so much room and no more.
    fn leave(&self, kib: u64) {
        let found = rustix::fs::statvfs(&self.mount.0).unwrap();
        let used = (found.f_blocks - found.f_bfree) * found.f_frsize / 1024;
        self.resize(&format!("{}k", used + kib));
    }
}

impl Mount {
    fn options(&self, options: &str) {
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(
            status.success(),
            "a small disk can only be made by root with the right to mount; run the tests so"
        );
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[tokio::test]
async fn a_full_disk_is_said_so_and_with_room_the_job_goes_on() {
    let disk = SmallDisk::new(&one(), "100k");
    let ran = disk.home.run(&["new", "Say hello", "--yes"]).await.code(1);
    says(sentence(&ran), &["disk is full", "make room"]);

    // In the middle of a job.
    disk.resize("64m");
    let ran = disk.home.run(&["new", "Say hello", "--json"]).await.code(3);
    let (wait, project) = (
        ran.end()["wait"]["id"].as_str().unwrap().to_owned(),
        id(&ran),
    );
    disk.leave(300);
    let ran = disk.home.run(&["approve", &wait, "--json"]).await;
    let said = ran.end().to_string();
    assert!([1, 3].contains(&ran.code), "{ran:#?}");
    says(&said, &["disk", "full"]);
    assert!(said.contains("room") || said.contains("space"), "{said}");

    disk.resize("64m");
    let mut last = None;
    for _ in 0..3 {
        let report = disk.home.status(&project).await;
        let ran = if let Some(wait) = report["waits"][0]["id"].as_str() {
            disk.home.run(&["approve", wait, "--json"]).await
        } else {
            let args = ["logs", &project, "--until-idle", "--json"];
            disk.home.run(&args).await
        };
        let done = ran.code == 0 && ran.end()["status"] == "deployed";
        last = Some(ran);
        if done {
            break;
        }
    }
    let ran = last.unwrap();
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    let url = ran.end()["url"].as_str().unwrap().to_owned();
    assert_eq!(
        get(&format!("{}/hello.txt", url.trim_end_matches('/')))
            .await
            .1,
        "hello\n"
    );
    let events = disk
        .home
        .run(&["logs", "one", "--json", "-n", "1000"])
        .await
        .success()
        .json();
    for name in ["job.started", "task.started", "task.merged", "job.ended"] {
        assert_eq!(count(&events, name), 1, "{name}: {events:#?}");
    }
    disk.home.run(&["remove", "one", "--yes"]).await.success();
}
