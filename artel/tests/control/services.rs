//! Services: killed, changed, stopped, and given their secrets.

use super::*;
use std::path::Path;
use std::process::Stdio;
use support::ask;
use tapes::{plan, spec};
use tokio::io::AsyncWriteExt;

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
    assert_eq!(up.terminate(SOON).await, 0);
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
    assert_eq!(up.terminate(SOON).await, 0);
    assert_eq!(files_with(home.path(), VALUE), "");
}
