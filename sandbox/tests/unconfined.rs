//! Commands that run without confinement still run within limits.

use std::time::Duration;

use sandbox::{Job, Limits, Reason, Sandbox, Unconfined};

#[tokio::test]
async fn without_a_sandbox_nothing_runs_and_the_reason_is_said() {
    let missing = Sandbox::missing(sandbox::Unavailable::MissingProgram {
        program: "bwrap",
        package: "bubblewrap",
    });
    assert!(missing.is_confined(), "nobody may take it for leave");
    let folder = tempfile::tempdir().unwrap();
    let mark = folder.path().join("ran");
    let job = Job::new(["touch", mark.to_str().unwrap()]);
    let error = missing.run(&job).await.unwrap_err().to_string();
    assert!(
        error.contains("install the package `bubblewrap`"),
        "{error}"
    );
    assert!(!mark.exists());
    assert!(missing.check().is_err());
}

fn sandbox() -> Sandbox {
    Sandbox::unconfined(Unconfined::ShippedTape)
}

#[tokio::test]
async fn guest_paths_lead_to_their_mounts() {
    let directory = tempfile::tempdir().expect("directory");
    std::fs::write(directory.path().join("hello"), "hi\n").expect("written");
    let job = Job::new([
        "sh",
        "-c",
        "cat hello \"$0\" \"$WHERE/hello\"; env",
        "/workspace/hello",
    ])
    .mount_rw(directory.path(), "/workspace")
    .cwd("/workspace")
    .env("WHERE", "/workspace");
    let output = sandbox().run(&job).await.expect("ran");
    assert!(output.tail.starts_with("hi\nhi\nhi\n"), "{}", output.tail);
    assert!(!output.tail.contains("CARGO"), "{}", output.tail);
    assert!(!sandbox().is_confined());
    assert!(sandbox().describe().contains("WITHOUT"));
}

#[tokio::test]
async fn limits_end_it_with_its_children() {
    let limits = Limits {
        wall_s: Some(1),
        ..Limits::default()
    };
    let script = "sleep 97531.5 & sleep 97531.5";
    let output = sandbox()
        .run(&Job::new(["sh", "-c", script]).limits(limits))
        .await
        .expect("ran");
    assert_eq!(output.ended.reason, Reason::Wall);
    let left = std::process::Command::new("pgrep")
        .args(["-f", "^sleep 97531.5"])
        .status();
    assert!(!left.expect("pgrep runs").success());
}

#[tokio::test]
async fn it_can_be_stopped() {
    let script = "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done";
    let mut running = sandbox()
        .spawn(&Job::new(["sh", "-c", script]))
        .expect("started");
    running.next_line().await.expect("a line");
    let ended = running.stop(Duration::from_secs(40)).await.expect("ended");
    assert_eq!(ended.reason, Reason::Stopped);
    assert!(ended.wall_s < 30.0);
}
