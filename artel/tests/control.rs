//! Who does the work, and how it is stopped, taken over and looked at: the real binary, as people and programs use it.

mod support;
#[path = "support/tapes.rs"]
mod tapes;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Home, Running, ask, eventually, get};
use tapes::{home, one, plan, processes, spec, works};
use tokio::io::AsyncWriteExt;

const SOON: Duration = Duration::from_secs(30);
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

/// Runs a command with something on its standard input; gives what it printed.
async fn piped(home: &Home, args: &[&str], input: &str) -> (i32, String) {
    let mut child = home
        .artel(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).await.unwrap();
    drop(stdin);
    let output = tokio::time::timeout(SOON, child.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    let mut said = String::from_utf8(output.stdout).unwrap();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    (output.status.code().unwrap_or(-1), said)
}

fn page(url: &Value, path: &str) -> String {
    format!("{}/{path}", url.as_str().unwrap().trim_end_matches('/'))
}

#[tokio::test]
async fn while_a_worker_runs_no_lease_is_held_and_cancelling_ends_it_within_3_seconds() {
    let mut tape = one();
    works(&mut tape, "sleep 98771", 1);
    let home = home(&tape);
    let mut up = up(&home).await;
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let project = new.event("task.attempt", SOON).await["project"]
        .as_str()
        .unwrap()
        .to_owned();
    eventually("the worker runs", SOON, || async {
        (!processes("sleep 98771").is_empty()).then_some(())
    })
    .await;
    eventually("no lease is held", SOON, || async {
        let threads = threads(&home, &project).await;
        assert_eq!(threads.len(), 3, "{threads:?}");
        threads.values().all(|(_, leased)| !leased).then_some(())
    })
    .await;
    for _ in 0..3 {
        for (name, (status, leased)) in threads(&home, &project).await {
            assert!(status == "waiting" && !leased, "{name} is {status}");
        }
    }

    // What a command takes that does nothing says how busy the machine is.
    let before = Instant::now();
    home.run(&["threads", &project]).await.success();
    let idle = before.elapsed();
    let before = Instant::now();
    home.run(&["cancel", &project]).await.success();
    let took = before.elapsed();
    let most = Duration::from_secs(3) + 10 * idle;
    assert!(
        took < most,
        "it took {took:?}, and a command alone {idle:?}"
    );
    assert_eq!(processes("sleep 98771"), []);
    let threads = threads(&home, &project).await;
    for name in ["job-1", "job-1/hello"] {
        assert_eq!(threads[name], ("cancelled".to_owned(), false), "{name}");
    }
    assert_eq!(new.ended(SOON).await, 1, "{:#?}", new.seen);
    let end: Value = serde_json::from_str(new.seen.last().unwrap()).unwrap();
    assert_eq!(end["status"], "cancelled");
    let report = home.status(&project).await;
    assert_eq!(report["job"]["status"], "cancelled", "{report:#}");
    assert_eq!(report["tasks"][0]["status"], "cancelled", "{report:#}");
    let again = home.run(&["cancel", &project]).await.code(1);
    assert!(again.stderr.contains("no job"), "{again:#?}");
    assert_eq!(up.terminate(Duration::from_secs(15)).await, 0);
}

#[tokio::test]
async fn what_a_worker_says_and_is_refused_is_read_while_it_works() {
    let mut tape = one();
    let command = "curl -sS -m 20 http://packages.example/index; sleep 98773";
    works(&mut tape, command, 1);
    let home = home(&tape);
    let mut up = up(&home).await;
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let attempt = new.event("task.attempt", SOON).await;
    let project = attempt["project"].as_str().unwrap();
    let mut follows = home.start(&["logs", project, "--task", "hello", "-f"]);
    follows
        .line("the refusal", SOON, |line| {
            line.contains("attempt 1: was refused packages.example:80: ")
        })
        .await;
    eventually("all of it is kept", SOON, || async {
        let args = ["logs", project, "--task", "hello", "--json"];
        let said = home.run(&args).await.success().json();
        let has = |kind: &str, words: &str| {
            said.iter()
                .any(|one| one["kind"] == kind && one["text"].as_str().unwrap().contains(words))
        };
        assert!(said.iter().all(|one| one["attempt"] == 1), "{said:#?}");
        (has("phase", "running: step 1")
            && has("log", "curl -sS")
            && has("refused", "packages.example:80"))
        .then_some(())
    })
    .await;
    let ran = home
        .run(&["logs", project, "--task", "hello", "-n", "2"])
        .await
        .success();
    assert_eq!(ran.stdout.lines().count(), 2, "{ran:#?}");
    let ran = home.run(&["logs", project, "--task", "bye"]).await.code(1);
    assert!(
        ran.stderr.contains("no worker of") && ran.stderr.contains("hello"),
        "{ran:#?}"
    );
    home.run(&["cancel", project]).await.success();
    assert_eq!(new.ended(SOON).await, 1, "{:#?}", new.seen);
    assert_eq!(up.terminate(Duration::from_secs(15)).await, 0);
}

#[tokio::test]
async fn a_second_process_takes_the_job_over_from_one_that_was_killed() {
    let mut tape = one();
    works(
        &mut tape,
        "sleep 2; echo hello > hello.txt; git add -A; git commit -qm hello; git log --oneline",
        3,
    );
    let mut home = home(&tape);
    home.on_postgres().await;
    let mut first = up(&home).await;
    let mut second = home.start(&["up"]);
    second
        .line("it waits", SOON, |line| {
            line.contains("takes over when it ends")
        })
        .await;
    // It only says what is wanted; whoever is up does it.
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let project = new.event("task.attempt", SOON).await["project"]
        .as_str()
        .unwrap()
        .to_owned();
    new.kill().await;
    first.kill().await;
    second
        .line("it took over", SOON, |line| line.contains(UP))
        .await;
    let report = becomes(&home, &project, "deployed").await;
    let url = &report["project"]["url"];
    assert_eq!(get(&page(url, "hello.txt")).await.1, "hello\n");
    let events = events(&home, &project).await;
    for name in ["job.started", "task.merged", "deploy.ended", "job.ended"] {
        assert_eq!(count(&events, name), 1, "{name}: {events:#?}");
    }
    home.run(&["remove", &project, "--yes"]).await.success();
    assert_eq!(second.terminate(Duration::from_secs(15)).await, 0);
}

#[tokio::test]
async fn what_up_was_doing_when_it_was_told_to_stop_is_done_by_its_next_start() {
    let mut tape = one();
    works(
        &mut tape,
        "sleep 2; echo hello > hello.txt; git add -A; git commit -qm hello; git log --oneline",
        3,
    );
    let home = home(&tape);
    let mut running = up(&home).await;
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let project = new.event("task.attempt", SOON).await["project"]
        .as_str()
        .unwrap()
        .to_owned();
    new.kill().await;
    assert_eq!(running.terminate(Duration::from_secs(15)).await, 0);
    let report = home.status(&project).await;
    assert_ne!(report["project"]["status"], "deployed", "{report:#}");

    let mut running = up(&home).await;
    becomes(&home, &project, "deployed").await;
    let events = events(&home, &project).await;
    for name in ["job.started", "task.merged", "deploy.ended", "job.ended"] {
        assert_eq!(count(&events, name), 1, "{name}: {events:#?}");
    }
    home.run(&["remove", &project, "--yes"]).await.success();
    assert_eq!(running.terminate(Duration::from_secs(15)).await, 0);
}

fn parent(pid: i32) -> Option<i32> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(1)?
        .parse()
        .ok()
}

/// Whether a process descends from another.
fn descends(pid: i32, from: i32) -> bool {
    let mut at = Some(pid);
    for _ in 0..20 {
        match at {
            Some(pid) if pid == from => return true,
            Some(pid) if pid > 1 => at = parent(pid),
            _ => return false,
        }
    }
    false
}

fn kill(pid: i32) {
    let status = std::process::Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success(), "{pid} was not there");
}

fn supervisor(home: &Home, project: &str) -> i32 {
    let file = home.file("deploy").join(project).join("supervisor.json");
    let state: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    i32::try_from(state["pid"].as_i64().unwrap()).unwrap()
}

/// The service's own processes.
fn service(supervisor: i32) -> Vec<i32> {
    processes("http.server")
        .into_iter()
        .map(|(pid, _)| pid)
        .filter(|pid| descends(*pid, supervisor))
        .collect()
}

#[tokio::test]
async fn a_killed_service_is_restarted_and_a_killed_supervisor_is_brought_back() {
    let home = home(&one());
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .success();
    let end = ran.end();
    let project = end["project"].as_str().unwrap();
    let hello = page(&end["url"], "hello.txt");
    let answers = || async { ask(&hello).await.ok().filter(|(status, _)| *status == 200) };

    let keeper = supervisor(&home, project);
    let before = service(keeper);
    assert!(!before.is_empty());
    for pid in &before {
        // The first takes the others with it.
        let _ = std::process::Command::new("kill")
            .args(["-9", &pid.to_string()])
            .status();
    }
    eventually("the service is restarted", SOON, || async {
        let now = service(keeper);
        let new = !now.is_empty() && now.iter().all(|pid| !before.contains(pid));
        if new { answers().await } else { None }
    })
    .await;
    assert_eq!(supervisor(&home, project), keeper);

    kill(keeper);
    eventually("it went with its supervisor", SOON, || async {
        answers().await.is_none().then_some(())
    })
    .await;
    let mut up = up(&home).await;
    eventually("up brings it back", SOON, answers).await;
    assert_ne!(supervisor(&home, project), keeper);
    home.run(&["remove", "one", "--yes"]).await.success();
    assert_eq!(up.terminate(Duration::from_secs(15)).await, 0);
}

#[tokio::test]
async fn a_service_is_changed_rolled_back_deployed_stopped_started_archived_and_removed() {
    let home = home(&one());
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .success();
    let url = ran.end()["url"].clone();
    let (hello, bye) = (page(&url, "hello.txt"), page(&url, "bye.txt"));
    let ran = home
        .run(&["say", "one", "Say bye too", "--yes", "--json"])
        .await
        .success();
    assert_eq!(ran.end()["status"], "deployed");
    assert_eq!(get(&bye).await, (200, "bye\n".to_owned()));

    let ran = home.run(&["rollback", "one"]).await.success();
    assert!(ran.stdout.contains("release 1 is live"), "{ran:#?}");
    assert_eq!(get(&bye).await.0, 404);
    assert_eq!(get(&hello).await.0, 200);
    let report = home.status("one").await;
    let release = |report: &Value, number: u64| {
        let all = report["deployments"].as_array().unwrap().clone();
        all.into_iter()
            .find(|one| one["release"] == number)
            .unwrap()["status"]
            .clone()
    };
    assert_eq!(release(&report, 1), "live", "{report:#}");

    let ran = home
        .run(&["deploy", "one", "--yes", "--json"])
        .await
        .success();
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    assert_eq!(get(&bye).await.0, 200);

    let ran = home.run(&["stop", "one"]).await.success();
    assert!(ran.stdout.contains("artel start one"), "{ran:#?}");
    assert!(ask(&hello).await.is_err());
    assert_eq!(home.status("one").await["project"]["status"], "stopped");
    home.run(&["start", "one"]).await.success();
    assert_eq!(get(&hello).await.0, 200);
    assert_eq!(home.status("one").await["project"]["status"], "deployed");

    let ran = home.run(&["logs", "one", "--service"]).await.success();
    assert!(ran.stdout.contains("GET /hello.txt"), "{ran:#?}");
    let ran = home.run(&["logs", "one", "-n", "3"]).await.success();
    assert!(!ran.stdout.is_empty());

    home.run(&["archive", "one"]).await.success();
    assert!(ask(&hello).await.is_err());
    let ran = home.run(&["projects", "--json"]).await.success();
    assert_eq!(ran.stdout, "", "it left the list");
    home.run(&["project", "set", "one", "status", "deployed"])
        .await
        .success();
    home.run(&["start", "one"]).await.success();
    assert_eq!(get(&hello).await.0, 200);

    let ran = home.run(&["remove", "one"]).await.code(1);
    assert!(ran.stderr.contains("--yes"), "{ran:#?}");
    assert_eq!(get(&hello).await.0, 200);
    home.run(&["remove", "one", "--yes"]).await.success();
    assert!(ask(&hello).await.is_err());
    home.run(&["clone", "one", "kept"]).await.success();
    assert!(home.file("kept/bye.txt").is_file(), "the repository stays");
}

#[tokio::test]
async fn a_task_in_a_persons_hands_is_tried_again_in_its_workspace() {
    let mut tape = one();
    works(
        &mut tape,
        "echo x >> .artel/tries; test $(wc -l < .artel/tries) -lt 5 || { echo hello > hello.txt; git add hello.txt; git commit -qm hello; }; git log --oneline",
        6,
    );
    let home = home(&tape);
    home.run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
    let ran = home
        .run(&["retry", "one", "hello", "--json"])
        .await
        .success();
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    let report = home.status("one").await;
    assert_eq!(report["tasks"][0]["attempts"], 3, "{report:#}");
    let ran = home.run(&["retry", "one"]).await.code(1);
    assert!(ran.stderr.contains("nothing of one waits"), "{ran:#?}");
    home.run(&["remove", "one", "--yes"]).await.success();
}

/// Files with these bytes in them.
fn files_with(folder: &Path, bytes: &str) -> String {
    let found = std::process::Command::new("grep")
        .args(["-rlaF", bytes])
        .arg(folder)
        .output()
        .unwrap();
    String::from_utf8_lossy(&found.stdout).into_owned()
}

#[tokio::test]
async fn a_secret_that_is_missing_is_waited_for_and_only_the_service_gets_it() {
    const VALUE: &str = "canary-5d1e-of-the-weather";
    let mut tape = one();
    spec(&mut tape)["needs"] = json!([{"need": "secret", "name": "WEATHER_API_KEY", "description": "A key of weather.example"}]);
    // What it was given is shown as a digest only.
    plan(&mut tape)["manifest"]["service"]["command"] = json!([
        "sh",
        "-c",
        "cd \"$DATA_DIR\" && echo hello > hello.txt && printf %s \"$WEATHER_API_KEY\" | sha256sum > seen.txt && exec python3 -m http.server --bind \"$HOST\" \"$PORT\""
    ]);
    let home = home(&tape);
    let mut up = up(&home).await;
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
    let wait = &ran.end()["wait"];
    assert_eq!(wait["kind"], "secret", "{wait}");
    let question = wait["question"].as_str().unwrap();
    assert!(
        question.contains("artel secrets set one WEATHER_API_KEY"),
        "{question}"
    );

    let (code, said) = piped(&home, &["secrets", "set", "one", "WEATHER_API_KEY"], "\n").await;
    assert!(code == 1 && said.contains("no value"), "{said}");
    let value = format!("{VALUE}\n");
    let (code, said) = piped(&home, &["secrets", "set", "one", "WEATHER_API_KEY"], &value).await;
    assert_eq!(code, 0, "{said}");
    assert!(
        said.contains("encrypted") && !said.contains(VALUE),
        "{said}"
    );
    // It goes on by itself.
    let report = becomes(&home, "one", "deployed").await;
    let seen = get(&page(&report["project"]["url"], "seen.txt")).await.1;
    let digest = std::process::Command::new("sh")
        .args(["-c", "printf %s \"$0\" | sha256sum", VALUE])
        .output()
        .unwrap();
    assert_eq!(seen, String::from_utf8(digest.stdout).unwrap());

    let ran = home.run(&["secrets", "list", "one"]).await.success();
    assert_eq!(ran.stdout, "WEATHER_API_KEY\n");
    for args in [
        &["logs", "one", "--json", "-n", "1000"][..],
        &["logs", "one", "--service"],
        &["status", "one", "--json"],
        &["threads", "one", "--json"],
    ] {
        let ran = home.run(args).await.success();
        assert!(
            !ran.stdout.contains(VALUE) && !ran.stderr.contains(VALUE),
            "{args:?} show it"
        );
    }
    let events = events(&home, "one").await;
    assert_eq!(count(&events, "secret.granted"), 1);
    assert!(
        count(&events, "secret.resolved") >= 1,
        "each use is written down"
    );
    home.run(&["secrets", "remove", "one", "WEATHER_API_KEY"])
        .await
        .success();
    let ran = home
        .run(&["secrets", "remove", "one", "WEATHER_API_KEY"])
        .await
        .code(1);
    assert!(ran.stderr.contains("there is no secret"), "{ran:#?}");
    // Who writes it where nobody else can read it: nobody.
    assert_eq!(files_with(home.path(), VALUE), "");
    home.run(&["remove", "one", "--yes"]).await.success();
    assert_eq!(up.terminate(Duration::from_secs(15)).await, 0);
    assert_eq!(files_with(home.path(), VALUE), "");
}

#[tokio::test]
async fn the_crew_is_drawn_with_its_seven_nodes() {
    let home = home(&one());
    for (format, begins) in [
        ("mermaid", "flowchart"),
        ("dot", "digraph"),
        ("svg", "<svg"),
    ] {
        let ran = home.run(&["graph", "--format", format]).await.success();
        assert!(ran.stdout.contains(begins), "{format}: {}", ran.stdout);
        for node in [
            "brainstorm",
            "zavhoz",
            "architect",
            "developers",
            "developer",
            "reviewer",
            "devops",
        ] {
            assert!(ran.stdout.contains(node), "{node} in {format}");
        }
    }
}

#[tokio::test]
async fn a_run_is_recorded_replayed_looked_at_and_its_projections_made_again() {
    let first = home(&one());
    let ran = first
        .run(&[
            "new",
            "Say hello",
            "--yes",
            "--json",
            "--record",
            "recorded.yaml",
        ])
        .await
        .success();
    let project = ran.end()["project"].as_str().unwrap().to_owned();

    // The recording is a tape of its own.
    let mut second = Home::new();
    second.set(
        "ARTEL_TAPE",
        &first.file("recorded.yaml").display().to_string(),
    );
    let ran = second
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .success();
    let url = ran.end()["url"].clone();
    assert_eq!(get(&page(&url, "hello.txt")).await.1, "hello\n");
    second.run(&["remove", "one", "--yes"]).await.success();

    // Threads and their history.
    let threads = threads(&first, "one").await;
    let names: Vec<_> = threads.keys().map(String::as_str).collect();
    assert_eq!(names, ["", "job-1", "job-1/hello"]);
    assert_eq!(threads["job-1"].0, "done");
    let thread = format!("{project}/job-1");
    let history = first.run(&["history", &thread, "--json"]).await.success();
    let steps = history.json();
    assert!(steps.len() >= 4, "{steps:#?}");
    let checkpoint = steps[steps.len() / 2]["checkpoint"].to_string();
    let ran = first.run(&["replay", &thread, &checkpoint]).await.code(1);
    assert!(ran.stderr.contains("--live"), "{ran:#?}");
    let ran = first
        .run(&["fork", &thread, &checkpoint, "--json"])
        .await
        .success();
    assert!(ran.end()["branch"].as_u64().unwrap() > 0, "{ran:#?}");
    let ran = first.run(&["fork", &thread, "first"]).await.code(1);
    assert!(ran.stderr.contains("artel history"), "{ran:#?}");

    // What is made from the journal can be thrown away.
    let status = first.status("one").await;
    let spoken = events(&first, "one").await.len();
    first
        .run(&["migrate", "--rebuild-projections"])
        .await
        .success();
    assert_eq!(first.status("one").await, status);
    assert_eq!(events(&first, "one").await.len(), spoken);
    first.run(&["remove", "one", "--yes"]).await.success();
}

#[tokio::test]
async fn projections_are_made_again_on_postgresql_too() {
    let mut home = home(&one());
    home.on_postgres().await;
    home.run(&["new", "Say hello", "--yes"]).await.success();
    let status = home.status("one").await;
    home.run(&["migrate", "--rebuild-projections"])
        .await
        .success();
    assert_eq!(home.status("one").await, status);
    home.run(&["remove", "one", "--yes"]).await.success();
}

#[tokio::test]
async fn a_database_of_another_data_folder_is_refused() {
    let mut first = Home::with_tape();
    first.on_postgres().await;
    first.run(&["projects"]).await.success();
    let mut second = Home::with_tape();
    second.set("DATABASE_URL", first.setting("DATABASE_URL").unwrap());
    let refused = second.run(&["projects"]).await.code(1);
    for part in ["another data folder", "ARTEL_HOME", "DATABASE_URL"] {
        assert!(refused.stderr.contains(part), "{part} in {refused:#?}");
    }
    first.run(&["projects"]).await.success();
}
