//! Health and acceptance checks of a release.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::time::Duration;

use ports::{AcceptanceCheck, Check, CheckResult, CheckStatus};
use sandbox::{Job, Limits, Reason, Sandbox};
use serde_json::Value;

use crate::exchange::{Ask, Error, Place, exchange};

/// How long an answer to a check may take.
const ANSWER: Duration = Duration::from_secs(15);
/// How long a command may take, in seconds.
const COMMAND_S: u64 = 120;
/// Where the files of a release are inside.
const TREE: &str = "/app";
/// Where the folder of the door is inside.
const DOORWAY: &str = "/run/artel/io";
/// The port inside that leads to the service.
const PORT_INSIDE: u16 = 8080;

/// A release under examination.
pub(crate) struct Subject<'a> {
    pub sandbox: &'a Sandbox,
    pub launcher: &'a Path,
    pub launcher_args: &'a [String],
    /// Its files.
    pub tree: &'a Path,
    /// Its door.
    pub door: &'a Path,
}

/// Whether the service answers its health check; `Err` says what was seen instead.
pub(crate) async fn health(place: &Place, path: &str, within: Duration) -> Result<(), String> {
    let ask = Ask {
        method: "GET",
        path,
        headers: &BTreeMap::new(),
        body: Vec::new(),
    };
    match exchange(place, &ask, within).await {
        Ok((status, _)) if status < 400 => Ok(()),
        Ok((status, body)) => Err(format!("status {status}: {}", head(&body))),
        Err(error) => Err(error.to_string()),
    }
}

impl Subject<'_> {
    /// Runs the checks in their order, against the release's own door. All of them run, so that
    /// whoever mends sees everything at once.
    pub(crate) async fn accept(&self, checks: &[AcceptanceCheck]) -> Vec<CheckResult> {
        let place = Place::Door(self.door.to_owned());
        let mut results = Vec::new();
        for check in checks {
            let (status, detail) = match &check.check {
                Check::Command { argv, exit_code } => self.command(argv, *exit_code).await,
                http @ Check::Http { .. } => request(&place, http).await,
            };
            results.push(CheckResult {
                name: check.name.clone(),
                status,
                detail,
            });
        }
        results
    }

    async fn command(&self, argv: &[String], wanted: i32) -> (CheckStatus, String) {
        let failed = |detail: String| (CheckStatus::Failed, detail);
        let Some(doorway) = self.door.parent() else {
            return failed("the service has no socket".to_owned());
        };
        let port = if self.sandbox.is_confined() {
            PORT_INSIDE
        } else {
            let free = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .and_then(|listener| Ok(listener.local_addr()?.port()));
            match free {
                Ok(port) => port,
                Err(error) => return failed(format!("no port is free: {error}")),
            }
        };
        let name = self.door.file_name().unwrap_or_default();
        let job = Job::new(argv)
            .mount_ro(self.tree, TREE)
            .mount_ro(doorway, DOORWAY)
            .cwd(TREE)
            .env("SERVICE_URL", format!("http://127.0.0.1:{port}"))
            .limits(Limits {
                memory_mb: 512,
                wall_s: Some(COMMAND_S),
                ..Limits::default()
            })
            .launcher(self.launcher, self.launcher_args.to_vec())
            .relay_out(
                SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
                Path::new(DOORWAY).join(name),
            );
        match self.sandbox.run(&job).await {
            Ok(output) if output.ended.reason == Reason::Exited(wanted) => {
                (CheckStatus::Passed, end(&output.tail))
            }
            Ok(output) => {
                let detail = format!(
                    "{}; its output:\n{}",
                    output.ended.reason,
                    end(&output.tail)
                );
                let status = match output.ended.reason {
                    Reason::Wall => CheckStatus::TimedOut,
                    _ => CheckStatus::Failed,
                };
                (status, detail)
            }
            Err(error) => failed(error.to_string()),
        }
    }
}

/// Runs the HTTP checks among them against the live URL.
pub(crate) async fn accept_live(port: u16, checks: &[AcceptanceCheck]) -> Vec<CheckResult> {
    let mut results = Vec::new();
    for check in checks {
        if matches!(check.check, Check::Http { .. }) {
            let (status, detail) = request(&Place::Port(port), &check.check).await;
            results.push(CheckResult {
                name: format!("{} (live)", check.name),
                status,
                detail,
            });
        }
    }
    results
}

async fn request(place: &Place, check: &Check) -> (CheckStatus, String) {
    let Check::Http {
        method,
        path,
        headers,
        body,
        expect,
    } = check
    else {
        return (CheckStatus::Failed, "not a request".to_owned());
    };
    let mut headers = headers.clone();
    let body = match body {
        None => Vec::new(),
        Some(Value::String(text)) => text.clone().into_bytes(),
        Some(value) => {
            let named = headers
                .keys()
                .any(|name| name.eq_ignore_ascii_case("content-type"));
            if !named {
                headers.insert("content-type".to_owned(), "application/json".to_owned());
            }
            value.to_string().into_bytes()
        }
    };
    let ask = Ask {
        method,
        path,
        headers: &headers,
        body,
    };
    match exchange(place, &ask, ANSWER).await {
        Ok((status, text)) => match expect.verdict(status, &text) {
            Ok(()) => (
                CheckStatus::Passed,
                format!("status {status}: {}", head(&text)),
            ),
            Err(seen) => (CheckStatus::Failed, seen),
        },
        Err(error @ Error::TimedOut(_)) => (CheckStatus::TimedOut, error.to_string()),
        Err(error) => (CheckStatus::Failed, error.to_string()),
    }
}

pub(crate) fn passed(results: &[CheckResult]) -> bool {
    results
        .iter()
        .all(|result| result.status == CheckStatus::Passed)
}

fn head(text: &str) -> String {
    ports::plain(text).trim().chars().take(300).collect()
}

/// The last lines of a text, some two thousand characters.
fn end(text: &str) -> String {
    let text = ports::plain(text);
    let text = text.trim();
    let over = text.chars().count().saturating_sub(2000);
    text.chars().skip(over).collect()
}
