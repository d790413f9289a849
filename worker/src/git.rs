//! What Git says about the workspace. It runs inside the worker's confinement, so the workspace's
//! own configuration can do no more than the agent can anyway.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// Longest answer that is kept, in bytes.
const KEPT_BYTES: usize = 4000;

/// What `git status --porcelain` prints; empty when everything is committed.
pub(crate) async fn status(workspace: &Path) -> Result<String, String> {
    git(workspace, &["status", "--porcelain"]).await
}

/// The commit that is checked out; none before the first one.
pub(crate) async fn head(workspace: &Path) -> Option<String> {
    git(workspace, &["rev-parse", "--verify", "--quiet", "HEAD"])
        .await
        .ok()
        .map(|sha| sha.trim().to_owned())
}

async fn git(workspace: &Path, args: &[&str]) -> Result<String, String> {
    let run = Command::new("git")
        .arg("-C")
        .arg(workspace)
        .args(args)
        .env("GIT_TERMINAL_PROMPT", "0")
        .env("GIT_OPTIONAL_LOCKS", "0")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = tokio::time::timeout(Duration::from_mins(1), run)
        .await
        .map_err(|_| format!("`git {}` did not end within a minute", args.join(" ")))?
        .map_err(|error| format!("cannot run git: {error}"))?;
    let text =
        |bytes: &[u8]| String::from_utf8_lossy(&bytes[..bytes.len().min(KEPT_BYTES)]).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(format!(
            "`git {}` failed: {}",
            args.join(" "),
            text(&output.stderr).trim()
        ))
    }
}
