//! `make up`: the images are built, Docker Compose starts the full size out of them, and it does what it is for.

mod house;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use house::House;
use support::openai::{Asked, KEY, OpenAi, Reply};
use support::{address_in, ask, docker, eventually, get};

const OWNER: i64 = 4_200_001;
/// Bounds of what is quick, and of what is work, on a machine that is busy.
const SOON: Duration = Duration::from_mins(2);
const WORK: Duration = Duration::from_mins(3);
/// Credentials that nobody outside of their file is to be seen with.
const CANARIES: &[(&str, &str)] = &[
    ("OPENAI_API_KEY", KEY),
    (
        "ANTHROPIC_API_KEY",
        "sk-ant-canary-of-the-other-endpoint-4711",
    ),
    ("GITHUB_TOKEN", "ghp_canaryOfTheCodeHost0123456789abcdef"),
];
const SERVICES: [&str; 6] = ["bot", "postgres", "redis", "runner", "scheduler", "spawner"];

/// Presses the button of the next proposal that speaks of `about`.
async fn approve(house: &House, about: &str) {
    let (id, proposal) = house
        .telegram
        .wait_for("a proposal", WORK, |seen| {
            seen.text.contains(about) && !seen.buttons.is_empty()
        })
        .await;
    let (_, button) = proposal
        .buttons
        .iter()
        .find(|(label, _)| label.contains("Build"))
        .unwrap_or_else(|| panic!("no button builds it: {proposal:#?}"));
    house.telegram.press(OWNER, id, button).await;
}

/// The address in the message that says that it is done.
async fn address(house: &House) -> String {
    let (_, result) = house
        .telegram
        .wait_for("the URL", WORK, |seen| address_in(&seen.text).is_some())
        .await;
    address_in(&result.text).unwrap()
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

#[tokio::test]
async fn a_message_becomes_a_service_that_answers_and_down_leaves_nothing() {
    let mut house = House::new().await;
    for (name, canary) in CANARIES {
        house.set(name, canary);
    }
    house.script("up", &[]).await;
    let seen = house.seen();
    assert!(seen.keys().eq(SERVICES.iter()), "{seen:#?}");
    assert!(seen.values().all(|service| service.healthy), "{seen:#?}");

    // Whoever runs sandboxes began as root, and has nothing of that left.
    for service in ["scheduler", "spawner"] {
        let status = house
            .script(
                "compose",
                &[
                    "exec",
                    "-T",
                    service,
                    "sh",
                    "-c",
                    "cat $(grep -lE '^Uid:.10001' /proc/[0-9]*/status)",
                ],
            )
            .await;
        for nothing in ["CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert!(
                status.contains(&format!("{nothing}:\t0000000000000000\n")),
                "{service}: {status}"
            );
        }
        assert!(status.contains("NoNewPrivs:\t1\n"), "{service}: {status}");
    }
    let processes = house.processes(&SERVICES);
    assert!(processes.contains("GITHUB_TOKEN_FILE=/run/secrets/github_token"));
    assert!(
        processes.contains("MODE=full") && processes.contains("redis-server"),
        "{processes}"
    );
    house.shows_no_secret(&house.about(&SERVICES), &processes);
    for service in SERVICES {
        let read = ["exec", "-T", service, "sh", "-c", "cat /run/secrets/*"];
        let files = house.script("compose", &read).await;
        for (name, canary) in CANARIES {
            let uses = match *name {
                "OPENAI_API_KEY" => ["runner", "spawner"].contains(&service),
                _ => service == "spawner",
            };
            assert_eq!(files.contains(canary), uses, "{service} and {name}");
        }
    }

    house.telegram.write(OWNER, "I want to keep notes").await;
    approve(&house, "notes").await;
    let url = address(&house).await;
    assert_eq!(get(&format!("{url}/health")).await.0, 200);
    let port: u16 = url.rsplit(':').next().unwrap().parse().unwrap();
    assert!(house.ports.contains(&port), "ARTEL_PORTS is heeded: {url}");
    let report = house.status("notes").await.expect("the record");
    assert_eq!(report["project"]["status"], "deployed", "{report:#}");

    house.script("compose", &["down"]).await;
    assert_eq!(house.of_project(&["ps", "-aq"]), "");
    assert_eq!(house.of_project(&["network", "ls", "-q"]), "");
    assert!(ask(&url).await.is_err(), "nobody answers at {url}");
    assert_eq!(house.of_project(&["volume", "ls", "-q"]).lines().count(), 3);

    // What was stopped comes back with everything that it had.
    house.script("up", &[]).await;
    eventually("the service answers again", WORK, || async {
        let answer = ask(&format!("{url}/health")).await.ok()?;
        (answer.0 == 200).then_some(())
    })
    .await;
    house.script("compose", &["down", "--volumes"]).await;
    assert_eq!(house.of_project(&["volume", "ls", "-q"]), "");
}

/// A model that knows one project, of two files. A coding agent gets its `n`-th answer, of both tasks, when `gate` is above `n`.
fn script(asked: &Asked, gate: &watch::Receiver<usize>) -> Reply {
    if let Some(turn) = turn(asked) {
        let file = if turn < 3 { "hello" } else { "world" };
        let reply = match turn % 3 {
            0 => Reply::Shell(format!("echo {file} > {file}.txt && ls")),
            1 => Reply::Shell(format!(
                "git add -A && git commit -qm {file} && git log --oneline"
            )),
            _ => Reply::Text(format!("It says {file}.")),
        };
        return Reply::When(gate.clone(), turn + 1, Box::new(reply));
    }
    let form = &asked.body["response_format"]["json_schema"]["name"];
    let answer = match form.as_str().unwrap_or_default() {
        "BrainstormTurn" => json!({"turn": "propose_project", "spec": {
            "name": "Hello", "goal": "Says hello.", "features": ["Says hello"],
            "acceptance": [{"name": "hello", "type": "http", "path": "/hello.txt", "expect": {"status": 200, "body_contains": ["hello"]}}],
        }}),
        "Architecture" => json!({
            "overview": "Two files and Python's own server.",
            "manifest": {
                "checks": "test -s hello.txt",
                "service": {"command": ["sh", "-c", "exec python3 -m http.server --bind \"$HOST\" \"$PORT\""], "health": "/"},
            },
            "readme": "# Hello\n", "agents_md": "Files of one line.\n",
            "tasks": [
                {"id": "hello", "title": "Hello", "description": "TASK-HELLO: write hello.txt.", "acceptance": ["It says hello"]},
                {"id": "world", "title": "World", "description": "TASK-WORLD: write world.txt.", "acceptance": ["It says world"], "depends_on": ["hello"]},
            ],
        }),
        "Verdict" => json!({"verdict": "approve", "comments": []}),
        other => {
            let what = format!("what is {other}?");
            return Reply::Status(400, None, json!({"error": {"message": what}}));
        }
    };
    Reply::Text(answer.to_string())
}

/// Which answer a coding agent wants: three for the first task, then three for the second.
fn turn(asked: &Asked) -> Option<usize> {
    let first = if asked.text().contains("TASK-HELLO") {
        0
    } else {
        3
    };
    asked.is_from_agent().then(|| first + asked.turn().min(2))
}

#[tokio::test]
async fn each_service_is_killed_in_the_middle_of_a_job_comes_back_and_the_job_ends_once() {
    let mut house = House::new().await;
    let (open, gate) = watch::channel(0);
    let model = OpenAi::start_on(&house.gateway, move |asked| script(asked, &gate)).await;
    house.set("ARTEL_TAPE", "");
    house.set("OPENAI_BASE_URL", &model.url);
    for (name, canary) in CANARIES {
        house.set(name, canary);
    }
    house.set("ARTEL_MODEL", "scripted");
    // The engine's runtime of that name gives containers a user namespace, and is no more of Sysbox.
    let data = house.workers_in("sysbox-runc");
    let workers = docker::Watch::start(&data);
    house.script("up", &[]).await;
    house.telegram.write(OWNER, "Say hello to the world").await;
    approve(&house, "Hello").await;

    // Each dies while an agent waits for its model, and the agent goes on while the service is away.
    for (at, service) in ["postgres", "redis", "runner", "spawner"]
        .iter()
        .enumerate()
    {
        eventually(&format!("the agent's turn {at}"), WORK, || async {
            let mut asked = model.asked().into_iter();
            asked.any(|asked| turn(&asked) == Some(at)).then_some(())
        })
        .await;
        // And the agent is in a container, which knows nothing that is not its own.
        let busy: Vec<String> = docker::containers(&data).into_keys().collect();
        assert!(!busy.is_empty(), "{service}");
        let mut inspect = vec!["inspect"];
        inspect.extend(busy.iter().map(String::as_str));
        house.shows_no_secret(&docker::docker(&inspect), &House::processes_of(&busy));
        let report = eventually("the record is read", WORK, || house.status("hello")).await;
        assert_eq!(
            report["job"]["status"], "running",
            "{service} is killed in the middle of it: {report:#}"
        );
        let before = house.kill(service).await;
        open.send_replace(at + 1);
        house.is_back(service, &before).await;
    }
    open.send_replace(usize::MAX);

    let url = address(&house).await;
    assert_eq!(get(&format!("{url}/world.txt")).await.1, "world\n");
    let events = eventually("the job has ended", SOON, || async {
        let events = house.events("hello").await?;
        let ended = events.iter().any(|event| event["event"] == "job.ended");
        ended.then_some(events)
    })
    .await;
    let counts = count(&events, "job-1");
    for name in ["job.started", "plan.made", "deploy.ended", "job.ended"] {
        let times = counts.get(&(name.to_owned(), String::new()));
        assert_eq!(times, Some(&1), "{name}: {counts:#?}");
    }
    for task in ["hello", "world"] {
        for name in ["task.started", "task.merged"] {
            let times = counts.get(&(name.to_owned(), task.to_owned()));
            assert_eq!(times, Some(&1), "{name} of {task}: {counts:#?}");
        }
    }
    let mut paid = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "model.used") {
        let id = event["data"]["spend"]["id"].as_str().unwrap();
        *paid.entry(id).or_insert(0) += 1;
    }
    assert!(
        !paid.is_empty() && paid.values().all(|&times| times == 1),
        "{paid:#?}"
    );
    let report = eventually("the record is read", SOON, || house.status("hello")).await;
    assert_eq!(report["project"]["status"], "deployed", "{report:#}");
    assert_eq!(report["deployments"].as_array().unwrap().len(), 1);
    eventually("all are well", SOON, || async {
        let seen = house.seen();
        seen.values().all(|service| service.healthy).then_some(())
    })
    .await;
    house.shows_no_secret(&house.about(&SERVICES), &house.processes(&SERVICES));
    eventually("the last container is removed", SOON, || async {
        docker::containers(&data).is_empty().then_some(())
    })
    .await;
    let seen = workers.end();
    assert!(seen.len() >= 2, "one for each task, at the least: {seen:?}");
}
