//! The full size: PostgreSQL and Redis, and a process for each part of the work.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;
use support::docker;
use support::redis::Redis;
use support::telegram::{Seen, TOKEN, Telegram};
use support::{Home, Running, address_in, eventually, get};

const TINY: &str = include_str!("support/tiny.yaml");
const DEMO: &str = include_str!("../../models/tapes/demo.yaml");
const OWNER: i64 = 4_200_001;
const SOON: Duration = Duration::from_mins(2);
const WORK: Duration = Duration::from_secs(150);

/// A data folder on PostgreSQL and Redis.
async fn servers(tape: &str) -> (Home, Redis) {
    let mut home = Home::new();
    home.on_postgres().await;
    let redis = Redis::start().await;
    home.set("REDIS_URL", &redis.url());
    // The full size would ask for Sysbox.
    home.set("SPAWNER_RUNTIME", "bubblewrap");
    std::fs::write(home.file("tape.yaml"), tape).unwrap();
    let tape = home.file("tape.yaml").display().to_string();
    home.set("ARTEL_TAPE", &tape);
    (home, redis)
}

async fn up(running: &mut Running) {
    running
        .line("it is up", SOON, |line| line.contains(" is up on "))
        .await;
}

/// The events of a project.
async fn events(home: &Home, project: &str) -> Vec<Value> {
    home.run(&["logs", project, "--json", "-n", "2000"])
        .await
        .success()
        .json()
}

/// How often each event happened to each task of a job.
fn count(events: &[Value], job: &str) -> BTreeMap<(String, String), usize> {
    let mut counts = BTreeMap::new();
    for event in events.iter().filter(|event| event["job"] == job) {
        let text = |field: &str| event[field].as_str().unwrap_or_default().to_owned();
        *counts.entry((text("event"), text("task"))).or_default() += 1;
    }
    counts
}

/// Every line of the ledger stands there once, and what workers used is what their brokers counted.
fn is_paid_once(home: &Home, events: &[Value]) {
    let mut lines = BTreeMap::new();
    let mut booked: BTreeMap<String, u64> = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "model.used") {
        let spend = &event["data"]["spend"];
        let id = spend["id"].as_str().unwrap().to_owned();
        if let Some((request, _)) = id.split_once('#') {
            *booked.entry(request.to_owned()).or_default() += tokens(&spend["usage"]);
        }
        *lines.entry(id).or_insert(0) += 1;
    }
    assert!(lines.values().all(|times| *times == 1), "{lines:#?}");
    let mut counted = 0;
    for folder in folders(&home.file("workspaces"), 3) {
        let Ok(text) = std::fs::read(folder.join("broker.json")) else {
            continue;
        };
        let kept: Value = serde_json::from_slice(&text).unwrap();
        let request = kept["request_id"].as_str().unwrap();
        assert_eq!(booked.get(request), Some(&tokens(&kept)), "{request}");
        counted += 1;
    }
    assert!(counted >= 2, "{counted} workers counted what they used");
}

fn tokens(usage: &Value) -> u64 {
    usage["input_tokens"].as_u64().unwrap() + usage["output_tokens"].as_u64().unwrap()
}

/// The folders that lie `depth` levels below one.
fn folders(folder: &Path, depth: usize) -> Vec<PathBuf> {
    if depth == 0 {
        return vec![folder.to_owned()];
    }
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .flat_map(|entry| folders(&entry.path(), depth - 1))
        .collect()
}

#[tokio::test]
async fn one_process_does_it_all_on_postgresql_and_redis() {
    let (home, _redis) = servers(TINY).await;
    let mut all = home.start(&["up"]);
    up(&mut all).await;
    let end = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .success()
        .end();
    assert_eq!(end["status"], "deployed", "{end:#}");
    let events = events(&home, "tiny").await;
    is_paid_once(&home, &events);
    let report = home.status("tiny").await;
    let lines = events.iter().filter(|event| event["event"] == "model.used");
    let all_tokens: u64 = lines
        .map(|event| tokens(&event["data"]["spend"]["usage"]))
        .sum();
    assert_eq!(report["project"]["tokens"], all_tokens);
    assert!(
        !home.file("bus").exists(),
        "the bus is not in the folder: it is in Redis"
    );
    assert_eq!(all.terminate(SOON).await, 0);

    // Without anybody who works, a command does the work itself, on the same servers.
    let end = home
        .run(&["say", "tiny", "Say bye", "--json"])
        .await
        .code(3)
        .end();
    assert_eq!(end["wait"]["kind"], "spec", "{end:#}");
    home.run(&["remove", "tiny", "--yes"]).await.success();
}

#[tokio::test]
async fn what_processes_need_is_said_and_a_command_waits_for_them() {
    let home = Home::with_tape();
    for (process, missing) in [
        ("runner", &["DATABASE_URL", "REDIS_URL"][..]),
        ("scheduler", &["DATABASE_URL", "REDIS_URL"]),
        ("bot", &["DATABASE_URL", "REDIS_URL", "TELEGRAM_BOT_TOKEN"]),
        ("spawner", &["REDIS_URL"]),
    ] {
        let ran = home.run(&[process]).await.code(2);
        for name in missing {
            assert!(ran.stderr.contains(name), "{process}: {ran:#?}");
        }
        assert!(!ran.stderr.contains("panicked"), "{ran:#?}");
    }
    assert!(!home.file("artel.db").exists(), "nothing was done");
    home.run(&["health"]).await.code(1);

    let (mut home, _redis) = servers(TINY).await;
    home.set("ARTEL_MODE", "full");
    // The command does nothing itself; it says what it waits for, and goes on when there is a runner.
    let mut command = home.start(&["new", "Say hello", "--json"]);
    eventually("it says that nobody works", SOON, || async {
        std::fs::read_to_string(home.file("test-stderr.log"))
            .is_ok_and(|log| log.contains("no runner lives") && log.contains("artel runner"))
            .then_some(())
    })
    .await;
    let mut runner = home.start(&["runner"]);
    up(&mut runner).await;
    assert_eq!(command.ended(WORK).await, 3, "{:#?}", command.seen);
    assert_eq!(runner.terminate(SOON).await, 0);
}

#[tokio::test]
async fn a_worker_is_never_waited_for_without_a_phase_and_an_end() {
    let tape = format!("delay_ms: 1500\n{TINY}");
    let (home, _redis) = servers(&tape).await;
    let mut runner = home.start(&["runner"]);
    let mut scheduler = home.start(&["scheduler"]);
    up(&mut runner).await;
    up(&mut scheduler).await;
    let mut command = home.start(&["new", "Say hello", "--yes", "--json"]);
    let said = |wanted: &'static str| {
        let home = &home;
        move || async move {
            let ran = home.run(&["status"]).await;
            let line = ran.stdout.lines().find(|line| line.contains(wanted));
            line.map(str::to_owned)
        }
    };
    let line = eventually("nobody can run it", WORK, said("none lives")).await;
    for part in [
        "waiting for a spawner",
        " for ",
        "given up in",
        "nobody yet",
    ] {
        assert!(line.contains(part), "{line}");
    }
    let mut spawner = home.start_spawner();
    up(&mut spawner).await;
    let worker = eventually("a worker at work", WORK, || async {
        let report = home.status("tiny").await;
        let mut tasks = report["tasks"].as_array()?.iter();
        let worker = tasks.find_map(|task| task["worker"]["spawner"].as_str().map(|_| task))?;
        Some(worker["worker"].clone())
    })
    .await;
    assert!(
        worker["spawner"].as_str().unwrap().starts_with("spawner-"),
        "{worker}"
    );
    let end: jiff::Timestamp = worker["until"].as_str().unwrap().parse().unwrap();
    assert!(end > jiff::Timestamp::now(), "{worker}");
    assert_eq!(command.ended(WORK).await, 0, "{:#?}", command.seen);
    let report = home.status("tiny").await;
    assert!(!report.to_string().contains("\"worker\""), "{report:#}");
    for process in [&mut runner, &mut scheduler, &mut spawner] {
        assert_eq!(process.terminate(SOON).await, 0);
    }
    home.run(&["remove", "tiny", "--yes"]).await.success();
}

#[tokio::test]
async fn a_budget_holds_where_the_spawner_has_no_ledger_and_goes_on_when_it_is_raised() {
    const LIMIT: u64 = 9_000;
    let (home, _redis) = servers(DEMO).await;
    std::fs::write(
        home.file("artel.toml"),
        format!("[models.budget]\ntokens = {LIMIT}\n"),
    )
    .unwrap();
    let mut ran = home
        .run(&["new", "Notes, please", "--yes", "--json"])
        .await
        .code(3);
    assert_eq!(ran.end()["wait"]["kind"], "budget", "{ran:#?}");
    let project = ran.end()["project"].as_str().unwrap().to_owned();
    let spent = |report: &Value| report["project"]["tokens"].as_u64().unwrap();
    let report = home.status(&project).await;
    // Each worker was bounded by what was left when it was sent, and two run beside each other.
    assert!(spent(&report) <= 2 * LIMIT, "{report:#}");
    let mut answers = 0;
    while ran.code == 3 {
        assert!(answers < 8, "it never ends: {ran:#?}");
        let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
        ran = home.run(&["approve", &wait, "--json"]).await;
        answers += 1;
    }
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    is_paid_once(&home, &events(&home, &project).await);
    home.run(&["remove", &project, "--yes"]).await.success();
}

fn button(proposal: &Seen) -> String {
    let mut buttons = proposal.buttons.iter();
    let found = buttons.find(|(label, _)| label.contains("Build"));
    found.expect("a button builds it").1.clone()
}

#[tokio::test]
async fn separate_processes_build_the_demo_and_a_killed_one_is_replaced() {
    demo_of_many_processes(|_| ()).await;
}

#[tokio::test]
async fn separate_processes_build_the_demo_with_workers_in_containers() {
    let seen = demo_of_many_processes(|home| {
        home.set("SPAWNER_RUNTIME", "runc");
        home.set("DOCKER_HOST", &docker::host());
        home.set("WORKER_IMAGE", &docker::worker_image());
        docker::Watch::start(home.path())
    })
    .await;
    let seen = seen.end();
    // Two tasks and the change, at the least.
    assert!(seen.len() >= 3, "{seen:?} were seen");
    for spawner in seen.values() {
        assert!(spawner.starts_with("spawner-"), "{spawner} is no process");
    }
}

/// From a message to a service that answers, and a change in the middle of which processes are killed. Returns what `prepare`
/// makes on the data folder before anything is started.
async fn demo_of_many_processes<T>(prepare: impl FnOnce(&mut Home) -> T) -> T {
    // Answers take a moment, as a model's do, so that there is something to be killed in.
    let tape = DEMO.replacen("\nanswers:", "\ndelay_ms: 300\nanswers:", 1);
    assert!(tape.contains("delay_ms: 300"));
    let telegram = Telegram::start().await;
    let (mut home, _redis) = servers(&tape).await;
    home.set("ARTEL_MODE", "full");
    home.set("TELEGRAM_BOT_TOKEN", TOKEN);
    home.set("TELEGRAM_API_URL", &telegram.url);
    home.set("ALLOWED_USERS", &OWNER.to_string());
    home.set("ADMIN_CHAT_IDS", &OWNER.to_string());
    let prepared = prepare(&mut home);
    let mut runner = home.start(&["runner"]);
    let mut second = home.start(&["runner"]);
    let mut scheduler = home.start(&["scheduler"]);
    let mut bot = home.start(&["bot"]);
    let mut spawner = home.start_spawner();
    for process in [
        &mut runner,
        &mut second,
        &mut scheduler,
        &mut bot,
        &mut spawner,
    ] {
        up(process).await;
    }

    // From a message to a service that answers.
    telegram.write(OWNER, "I want to keep notes").await;
    let (id, proposal) = telegram
        .wait_for("a proposal", SOON, |seen| !seen.buttons.is_empty())
        .await;
    telegram.press(OWNER, id, &button(&proposal)).await;
    let (_, result) = telegram
        .wait_for("the URL", WORK, |seen| {
            seen.text.contains("http://127.0.0.1:") && seen.text.contains("demo tape")
        })
        .await;
    let url = address_in(&result.text).unwrap();
    assert_eq!(get(&format!("{url}/health")).await.0, 200);

    // In the middle of another job, one after the other is killed and replaced.
    telegram.write(OWNER, "Add a search").await;
    let (id, proposal) = telegram
        .wait_for("a proposal for the change", SOON, |seen| {
            seen.text.contains("earch") && !seen.buttons.is_empty()
        })
        .await;
    telegram.press(OWNER, id, &button(&proposal)).await;
    let happened = |name: &'static str| {
        let home = &home;
        move || async move {
            let events = events(home, "notes").await;
            let mut of_job = events.iter().filter(|event| event["job"] == "job-2");
            of_job.any(|event| event["event"] == name).then_some(())
        }
    };
    eventually("a worker is asked for", WORK, happened("task.attempt")).await;
    spawner.kill().await;
    let mut spawner = home.start_spawner();
    runner.kill().await;
    let mut third = home.start(&["runner"]);
    scheduler.kill().await;
    let mut other_scheduler = home.start(&["scheduler"]);
    for process in [&mut spawner, &mut third, &mut other_scheduler] {
        up(process).await;
    }
    let report = home.status("notes").await;
    assert_eq!(report["job"]["id"], "job-2");
    assert_eq!(
        report["job"]["status"], "running",
        "they were killed in the middle of it: {report:#}"
    );

    eventually("the change is live", WORK, || async {
        let (status, body) = get(&format!("{url}/notes?q=zebra-crossing")).await;
        (status == 200 && body == "{\"notes\": []}").then_some(())
    })
    .await;
    eventually("the job has ended", SOON, happened("job.ended")).await;

    let events = events(&home, "notes").await;
    for job in ["job-1", "job-2"] {
        let counts = count(&events, job);
        for name in ["job.started", "plan.made", "deploy.ended", "job.ended"] {
            let times = counts.get(&(name.to_owned(), String::new()));
            assert_eq!(times, Some(&1), "{name} of {job}: {counts:#?}");
        }
        for ((name, task), times) in &counts {
            if matches!(name.as_str(), "task.started" | "task.merged") {
                assert_eq!(*times, 1, "{name} of {task} of {job}: {counts:#?}");
            }
        }
    }
    is_paid_once(&home, &events);
    let report = home.status("notes").await;
    assert_eq!(report["project"]["status"], "deployed", "{report:#}");
    assert_eq!(report["deployments"].as_array().unwrap().len(), 2);
    assert!(
        report["tasks"]
            .as_array()
            .unwrap()
            .iter()
            .all(|task| task["status"] == "merged"),
        "{report:#}"
    );

    for process in [
        &mut second,
        &mut third,
        &mut other_scheduler,
        &mut bot,
        &mut spawner,
    ] {
        assert_eq!(process.terminate(SOON).await, 0);
    }
    home.run(&["remove", "notes", "--yes"]).await.success();
    prepared
}
