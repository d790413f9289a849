//! The program itself, and the adapter for any other command.

use crate::endpoint::{Endpoint, Workspace, runs, says};
use serde_json::Value;
use std::process::{ExitStatus, Stdio};

/// Runs the binary as a spawner does.
pub async fn agent(workspace: &Workspace, endpoint: &Endpoint, args: &[&str]) -> ExitStatus {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_artel-agent"))
        .args(["--workspace", workspace.path().to_str().unwrap()])
        .args(args)
        .env_clear()
        .env("PATH", std::env::var("PATH").unwrap())
        .env("ARTEL_TASK_ID", "one")
        .env("ARTEL_ATTEMPT", "1")
        .env("ARTEL_BROKER_URL", &endpoint.address)
        .env("ARTEL_BROKER_KEY", "key")
        .env("OPENAI_BASE_URL", format!("{}/v1", endpoint.address))
        .env("OPENAI_API_KEY", "key")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .unwrap()
}

async fn command(workspace: &Workspace, script: &str) -> (Option<i32>, Value) {
    let endpoint = Endpoint::start([]).await;
    let status = agent(workspace, &endpoint, &["command", "--", "sh", "-c", script]).await;
    let result = endpoint.seen().results[0].clone();
    (status.code(), result)
}

#[tokio::test]
async fn the_program_reports_what_the_agent_did() {
    let endpoint = Endpoint::start([
        runs("echo x > x && git add x && git commit -q -m x"),
        says("done"),
    ])
    .await;
    let workspace = Workspace::new();
    assert!(agent(&workspace, &endpoint, &[]).await.success());
    assert_eq!(endpoint.seen().results[0]["status"], "succeeded");
    assert_eq!(endpoint.seen().results[0]["summary"], "done");
    let again = agent(&workspace, &endpoint, &[]).await;
    assert!(again.success(), "reported already, which is no failure");
    assert_eq!(endpoint.seen().asked.len(), 2);
}

#[tokio::test]
async fn a_command_that_commits_succeeds() {
    let workspace = Workspace::new();
    let script = "cp \"$ARTEL_TASK_FILE\" copy.md && git add copy.md && git commit -q -m Copy";
    let (code, result) = command(&workspace, script).await;
    assert_eq!(code, Some(0));
    assert_eq!(result["status"], "succeeded");
    assert_eq!(workspace.git(&["show", "HEAD:copy.md"]), "# Write a file\n");
}

#[tokio::test]
async fn a_command_that_ends_well_without_a_commit_failed() {
    let (code, result) = command(&Workspace::new(), "true").await;
    assert_eq!(code, Some(1));
    assert_eq!(result["status"], "failed");
    let reason = result["reason"].as_str().unwrap();
    assert!(reason.starts_with("no commit"), "{reason}");
}

#[tokio::test]
async fn a_command_that_fails_or_leaves_changes_says_so() {
    let (_, result) = command(&Workspace::new(), "exit 7").await;
    assert_eq!(result["status"], "failed");
    assert!(
        result["reason"]
            .as_str()
            .unwrap()
            .contains("exit status: 7")
    );
    let script = "git commit -q --allow-empty -m x && echo left > left.txt";
    let (_, result) = command(&Workspace::new(), script).await;
    assert_eq!(result["status"], "blocked");
    assert!(result["reason"].as_str().unwrap().contains("left.txt"));
}

#[tokio::test]
async fn a_missing_program_or_environment_is_named() {
    let workspace = Workspace::new();
    let endpoint = Endpoint::start([]).await;
    agent(
        &workspace,
        &endpoint,
        &["command", "--", "/no/such/program"],
    )
    .await;
    let reason = endpoint.seen().results[0]["reason"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(reason.contains("/no/such/program"), "{reason}");

    let output = std::process::Command::new(env!("CARGO_BIN_EXE_artel-agent"))
        .env_clear()
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("ARTEL_ATTEMPT"), "{said}");
}
