//! The main job from the demo tape, as a newcomer starts it.

mod support;

use serde_json::Value;
use support::{Home, ask, get};

#[tokio::test]
async fn the_demo_deploys_a_service_extends_it_and_says_how_to_stop_it() {
    let home = Home::new();
    let ran = home.run(&["demo"]).await.success();
    let url = ran
        .stdout
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("deployed "))
        .unwrap_or_else(|| panic!("no line says where it is: {ran:#?}"))
        .split_whitespace()
        .next()
        .unwrap()
        .to_owned();
    assert!(
        url.starts_with("http://127.0.0.1:") && url.ends_with('/'),
        "{url}"
    );
    let last = ran.stdout.lines().last().unwrap();
    assert!(
        last.contains("artel stop notes"),
        "the last line says how to stop it: {last}"
    );
    assert!(
        ran.stdout.contains("demo tape"),
        "a run from a tape says so"
    );

    // The service answers, the change is in it.
    assert_eq!(get(&format!("{url}health")).await.0, 200);
    let (status, found) = get(&format!("{url}notes?q=ACCEPTANCE")).await;
    assert!(
        status == 200 && found.contains("A note from the acceptance check"),
        "{found}"
    );

    // The record shows every task, pull request, review round and the URL.
    let report = home.status("notes").await;
    assert_eq!(report["project"]["status"], "deployed");
    assert_eq!(
        report["project"]["url"]
            .as_str()
            .unwrap()
            .trim_end_matches('/'),
        url.trim_end_matches('/')
    );
    assert!(report["project"]["tokens"].as_u64().unwrap() > 10_000);
    assert_eq!(
        report["project"]["cost_usd"],
        Value::Null,
        "a tape has no price"
    );
    assert_eq!(report["job"]["id"], "job-2");
    assert_eq!(report["tasks"].as_array().unwrap().len(), 2);
    for task in report["tasks"].as_array().unwrap() {
        assert_eq!(task["status"], "merged", "{task}");
        assert_eq!(task["pull_request"]["status"], "merged", "{task}");
        assert!(task["review_rounds"].as_u64().unwrap() >= 1, "{task}");
    }
    let text = home.run(&["status", "notes"]).await.success().stdout;
    for part in ["search-box", "merged", url.trim_end_matches('/')] {
        assert!(text.contains(part), "{part} in {text}");
    }

    // The first job, from the journal: two tasks at once, one started while another still ran, one sent back once.
    let events = home
        .run(&["logs", "notes", "--json", "-n", "1000"])
        .await
        .success()
        .json();
    let at = |name: &str, task: &str| {
        events
            .iter()
            .position(|event| {
                event["event"] == name && event["task"] == task && event["job"] == "job-1"
            })
            .unwrap_or_else(|| panic!("{name} of {task}"))
    };
    assert!(
        at("task.started", "storage") < at("task.merged", "http"),
        "http and storage ran at once"
    );
    assert!(
        at("task.merged", "http") < at("task.started", "page"),
        "page waited for http"
    );
    assert!(
        at("task.started", "page") < at("task.merged", "storage"),
        "page started while storage still ran"
    );
    let sent_back: Vec<_> = events
        .iter()
        .filter(|event| {
            event["event"] == "task.reviewed" && event["data"]["verdict"] == "send_back"
        })
        .map(|event| event["task"].as_str().unwrap())
        .collect();
    assert_eq!(sent_back, ["storage"]);
    let numbers: Vec<u64> = events
        .iter()
        .map(|event| event["seq"].as_u64().unwrap())
        .collect();
    assert!(numbers.is_sorted());

    // The repository has the merges.
    home.run(&["clone", "notes", "code"]).await.success();
    let log = std::process::Command::new("git")
        .args(["log", "--merges", "--oneline"])
        .current_dir(home.file("code"))
        .output()
        .unwrap();
    assert_eq!(String::from_utf8_lossy(&log.stdout).lines().count(), 6);

    home.run(&["stop", "notes"]).await.success();
    assert!(ask(&format!("{url}health")).await.is_err(), "it is stopped");
    home.run(&["start", "notes"]).await.success();
    assert_eq!(get(&format!("{url}health")).await.0, 200);
    home.run(&["remove", "notes", "--yes"]).await.success();
    assert!(ask(&format!("{url}health")).await.is_err(), "it is removed");
}
