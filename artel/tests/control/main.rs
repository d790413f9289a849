//! Who does the work, and how it is stopped, taken over and looked at: the real binary, as people and programs use it.

mod records;
mod services;
#[path = "../support/mod.rs"]
mod support;
#[path = "../support/tapes.rs"]
mod tapes;
mod workers;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Home, Running, eventually, get};
use tapes::{home, one, processes, works};

/// Bound of every wait; much more than a busy machine needs.
const SOON: Duration = Duration::from_mins(2);
const UP: &str = " is up on ";

async fn up(home: &Home) -> Running {
    let mut up = home.start(&["up"]);
    up.line("it is up", SOON, |line| line.contains(UP)).await;
    up
}

/// The crew's threads of a project, by name: status, and whether a lease is held.
async fn threads(home: &Home, project: &str) -> BTreeMap<String, (String, bool)> {
    let ran = home.run(&["threads", project, "--json"]).await.success();
    ran.json()
        .iter()
        .map(|thread| {
            let id = thread["id"].as_str().unwrap();
            let name = id.split_once('/').map_or("", |(_, rest)| rest);
            let status = thread["status"].as_str().unwrap().to_owned();
            (name.to_owned(), (status, !thread["lease"].is_null()))
        })
        .collect()
}

async fn events(home: &Home, project: &str) -> Vec<Value> {
    home.run(&["logs", project, "--json", "-n", "1000"])
        .await
        .success()
        .json()
}

fn count(events: &[Value], name: &str) -> usize {
    events.iter().filter(|event| event["event"] == name).count()
}

/// Waits until the project has this status.
async fn becomes(home: &Home, project: &str, status: &str) -> Value {
    eventually(&format!("{project} is {status}"), SOON, || async {
        let report = home.status(project).await;
        (report["project"]["status"] == status).then_some(report)
    })
    .await
}

fn page(url: &Value, path: &str) -> String {
    format!("{}/{path}", url.as_str().unwrap().trim_end_matches('/'))
}
