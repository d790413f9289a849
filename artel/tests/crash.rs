//! `kill -9` of the program at every boundary of its work. With `ARTEL_CRASH_FILE` a program that was built for tests kills
//! itself, with SIGKILL, the first time it comes to each boundary: before and after every commit, before and after every
//! remembered step, and at the start of every node. The test starts it again until the job is done.

mod support;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::Value;
use support::{Home, get};

const TAPE: &str = include_str!("support/tiny.yaml");

fn count(events: &[Value]) -> BTreeMap<(String, String), usize> {
    let mut counts = BTreeMap::new();
    for event in events {
        let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
        *counts.entry((text("event"), text("task"))).or_default() += 1;
    }
    counts
}

/// The whole job with a kill at every boundary; gives the boundaries.
async fn a_job_with_a_kill_at_every_boundary(mut home: Home) -> Vec<String> {
    std::fs::write(home.file("tiny.yaml"), TAPE).unwrap();
    let tape = home.file("tiny.yaml").display().to_string();
    let crashes = home.file("crashes");
    home.set("ARTEL_TAPE", &tape);
    home.set("ARTEL_CRASH_FILE", &crashes.display().to_string());

    // The first command may die at any moment; the message is durable or the same message can be sent again.
    let until = Instant::now() + Duration::from_mins(4);
    let mut ran = home.run(&["new", "Say hello", "--yes", "--json"]).await;
    let mut starts = 1;
    while ran.code == -1 {
        assert!(
            Instant::now() < until,
            "not done after {starts} starts: {:?}",
            std::fs::read_to_string(&crashes)
        );
        starts += 1;
        // A message that is stored founds its project by itself; one that is not was never heard.
        let threads = home.run(&["threads", "--json"]).await.success().json();
        let conversation = threads
            .iter()
            .find_map(|thread| thread["id"].as_str().filter(|id| !id.contains('/')));
        ran = match conversation {
            Some(project) => home.run(&["logs", project, "--until-idle", "--json"]).await,
            None => home.run(&["new", "Say hello", "--yes", "--json"]).await,
        };
    }
    assert_eq!(ran.code, 0, "{ran:#?}");
    let boundaries: Vec<String> = std::fs::read_to_string(&crashes)
        .unwrap()
        .lines()
        .map(str::to_owned)
        .collect();
    assert!(
        starts > boundaries.len(),
        "each boundary was a death: {starts} starts, {boundaries:#?}"
    );

    let report = home.status("tiny").await;
    assert_eq!(report["project"]["status"], "deployed", "{report:#}");
    let url = report["project"]["url"].as_str().unwrap();
    assert_eq!(
        get(&format!("{}/hello.txt", url.trim_end_matches('/')))
            .await
            .1,
        "hello\n"
    );

    let events = home
        .run(&["logs", "tiny", "--json", "-n", "1000"])
        .await
        .success()
        .json();
    let counts = count(&events);
    let once = |name: &str, task: &str| {
        assert_eq!(
            counts.get(&(name.to_owned(), task.to_owned())),
            Some(&1),
            "{name} {task}: {counts:#?}"
        );
    };
    for name in [
        "job.started",
        "plan.made",
        "repository.created",
        "deploy.started",
        "deploy.ended",
        "job.ended",
    ] {
        once(name, "");
    }
    for task in ["hello", "world"] {
        for name in ["task.started", "task.merged"] {
            once(name, task);
        }
    }
    assert_eq!(
        counts[&("task.attempt".to_owned(), "hello".to_owned())],
        1,
        "a crash is not an attempt"
    );
    assert_eq!(
        counts[&("task.attempt".to_owned(), "world".to_owned())],
        2,
        "one attempt and one after the send-back"
    );
    assert_eq!(counts[&("task.reviewed".to_owned(), "world".to_owned())], 2);

    // One pull request a task, one release, each model's answer paid for once.
    let numbers: Vec<u64> = report["tasks"]
        .as_array()
        .unwrap()
        .iter()
        .map(|task| task["pull_request"]["number"].as_u64().unwrap())
        .collect();
    assert_eq!(
        {
            let mut sorted = numbers.clone();
            sorted.sort_unstable();
            sorted
        },
        [1, 2],
        "{numbers:?}"
    );
    assert_eq!(report["deployments"].as_array().unwrap().len(), 1);
    let mut paid = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "model.used") {
        *paid
            .entry(event["data"]["spend"]["id"].as_str().unwrap().to_owned())
            .or_insert(0) += 1;
    }
    assert!(paid.values().all(|&times| times == 1), "{paid:#?}");
    let seq: Vec<u64> = events
        .iter()
        .map(|event| event["seq"].as_u64().unwrap())
        .collect();
    assert!(
        seq.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "the journal has no gap"
    );
    home.run(&["remove", "tiny", "--yes"]).await.success();
    boundaries
}

fn covers_every_node(boundaries: &[String]) {
    for node in [
        "brainstorm",
        "zavhoz",
        "architect",
        "developers",
        "developer",
        "reviewer",
        "devops",
    ] {
        for point in ["before-commit", "after-commit", "node-started"] {
            assert!(
                boundaries
                    .iter()
                    .any(|line| line.starts_with(point) && line.contains(node)),
                "no kill {point} at {node}: {boundaries:#?}"
            );
        }
    }
    for point in ["step-remembering", "step-remembered", "worker-running"] {
        assert!(
            boundaries.iter().any(|line| line.starts_with(point)),
            "no kill {point}: {boundaries:#?}"
        );
    }
}

#[tokio::test]
async fn a_job_survives_kill_9_at_every_boundary_on_sqlite() {
    covers_every_node(&a_job_with_a_kill_at_every_boundary(Home::new()).await);
}

#[tokio::test]
async fn a_job_survives_kill_9_at_every_boundary_on_postgresql() {
    let mut home = Home::new();
    home.on_postgres().await;
    covers_every_node(&a_job_with_a_kill_at_every_boundary(home).await);
}
