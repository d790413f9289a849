//! The adapter `command`: any program can be the worker.
//!
//! It runs in the workspace with `ARTEL_TASK_FILE` in its environment, besides everything that a
//! worker has. Exit code 0 and a new commit are success; Git decides, not what was printed.

use crate::broker::Report;
use crate::environment::Environment;
use crate::git;
use std::ffi::OsString;
use std::path::Path;
use std::process::Stdio;
use tokio::process::Command;

/// Runs `argv` and says how it ended.
pub async fn run(
    argv: &[OsString],
    workspace: &Path,
    task: &Path,
    environment: &Environment,
) -> Report {
    let failed = |reason: String| Report::Failed {
        summary: String::new(),
        reason,
    };
    let Some((program, args)) = argv.split_first() else {
        return failed("the command is empty".to_owned());
    };
    let base = base(workspace, environment).await;
    let shown = program.display();
    let child = Command::new(program)
        .args(args)
        .current_dir(workspace)
        .env("ARTEL_TASK_FILE", task)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => return failed(format!("cannot run {shown}: {error}")),
    };
    let status = match tokio::time::timeout(environment.wall, child.wait()).await {
        Ok(Ok(status)) => status,
        Ok(Err(error)) => return failed(format!("lost sight of {shown}: {error}")),
        Err(_) => {
            // Its whole family ends with the worker.
            let _ = child.start_kill();
            let limit = environment.wall.as_secs();
            return failed(format!("{shown} did not end within {limit} s"));
        }
    };
    if !status.success() {
        return failed(format!("{shown} ended with {status}"));
    }
    let summary = format!("`{shown}` ended with exit code 0.");
    judge(&shown.to_string(), workspace, base.as_deref(), summary).await
}

/// The commit that the work starts from.
pub(crate) async fn base(workspace: &Path, environment: &Environment) -> Option<String> {
    match &environment.base_sha {
        Some(sha) => Some(sha.clone()),
        None => git::head(workspace).await,
    }
}

/// What a program that ended well has done, as Git sees it.
pub(crate) async fn judge(
    shown: &str,
    workspace: &Path,
    base: Option<&str>,
    summary: String,
) -> Report {
    let head = git::head(workspace).await;
    if head.is_none() || head.as_deref() == base {
        return Report::Failed {
            summary,
            reason: format!("no commit: {shown} ended well but committed nothing"),
        };
    }
    match git::status(workspace).await {
        Ok(left) if left.is_empty() => Report::Succeeded { summary },
        Ok(left) => Report::Blocked {
            summary,
            reason: format!("uncommitted changes:\n{left}"),
        },
        Err(reason) => Report::Failed { summary, reason },
    }
}
