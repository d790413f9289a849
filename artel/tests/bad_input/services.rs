//! What deployed services do.

use std::net::TcpListener;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::get;
use crate::tapes::{home, one, plan, policy, processes, works};
use crate::{built, question, says};

#[tokio::test]
async fn a_service_that_exits_at_once_fails_its_release_with_what_it_said() {
    let mut tape = one();
    plan(&mut tape)["manifest"]["service"]["command"] =
        json!(["sh", "-c", "echo no such table >&2; exit 3"]);
    let home = home(&tape);
    policy(&home, "max_repairs = 0");
    let ran = built(&home, 1).await;
    let end = ran.end();
    assert_eq!(end["status"], "failed", "{ran:#?}");
    assert_eq!(end["error"]["code"], "release_failed");
    says(
        end["error"]["message"].as_str().unwrap(),
        &["release 1", "the service ended", "code 3"],
    );
    says(end["error"]["action"].as_str().unwrap(), &["artel logs"]);
    assert!(ran.stdout.contains("no such table"), "{ran:#?}");
    let report = home.status("one").await;
    assert_eq!(report["deployments"][0]["status"], "failed", "{report:#}");
    assert_eq!(report["tasks"][0]["status"], "merged", "the work is kept");
    says(
        &home.run(&["logs", "one"]).await.success().stdout,
        &["release 1 failed", "code 3"],
    );
}

#[tokio::test]
async fn what_programs_and_models_say_reaches_people_without_what_a_terminal_obeys() {
    let mut tape = one();
    plan(&mut tape)["tasks"][0]["title"] =
        json!("Hello \u{1b}]0;title\u{7}\u{1b}[2Jto\u{202e} you");
    let said = r"printf '\033]0;title\007\033[2Jready \342\200\256it\000 is\n'; head -c 1000000 /dev/zero | tr '\0' x; echo";
    plan(&mut tape)["manifest"]["service"]["command"] = json!([
        "sh",
        "-c",
        format!("{said}; exec python3 -u -m http.server --bind \"$HOST\" \"$PORT\"")
    ]);
    let home = home(&tape);
    built(&home, 0).await;
    for (command, expected) in [
        (&["status", "one"][..], "Hello to you"),
        (&["logs", "one"], "release 1 is live"),
        (&["logs", "one", "--service", "-n", "1000"], "ready it is"),
    ] {
        let seen = home.run(command).await.success().stdout;
        says(&seen, &[expected]);
        let obeyed = |c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}';
        assert!(
            !seen.contains(obeyed) && !seen.contains("title"),
            "{seen:?}"
        );
        let longest = seen.lines().map(|line| line.chars().count()).max();
        assert!(longest < Some(5_000), "{longest:?}");
    }
    home.run(&["remove", "one", "--yes"]).await.success();
}

#[tokio::test]
async fn a_service_that_never_listens_fails_its_release_and_does_not_go_on() {
    let mut tape = one();
    plan(&mut tape)["manifest"]["service"]["command"] = json!(["sleep", "98762"]);
    let home = home(&tape);
    policy(&home, "max_repairs = 0\nservice_ready_s = 1");
    let ran = built(&home, 1).await;
    let end = ran.end();
    says(
        end["error"]["message"].as_str().unwrap(),
        &["release 1", "not ready within 1 s"],
    );
    assert_eq!(processes("98762"), []);
}

#[tokio::test]
async fn without_a_free_port_a_person_is_asked_and_the_job_goes_on_when_there_is_one() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let mut home = home(&one());
    home.set("ARTEL_PORTS", &format!("{port}-{port}"));
    let ran = built(&home, 3).await;
    says(
        &question(&ran),
        &["port", &format!("{port}"), "taken", "widen the range"],
    );
    drop(taken);
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["approve", &wait, "--json"]).await.success();
    assert_eq!(
        ran.end()["url"].as_str().unwrap().trim_end_matches('/'),
        format!("http://127.0.0.1:{port}")
    );
    home.run(&["remove", "one", "--yes"]).await.success();
}

#[tokio::test]
async fn a_port_that_somebody_else_took_meanwhile_is_exchanged_for_another() {
    let mut tape = one();
    works(
        &mut tape,
        "sleep 1; echo hello > hello.txt; git add -A; git commit -qm hello; git log --oneline",
        1,
    );
    let home = home(&tape);
    let mut new = home.start(&["new", "Say hello", "--yes", "--json"]);
    let within = Duration::from_secs(30);
    let first = new.event("port.allocated", within).await["data"]["port"].clone();
    let _taken = TcpListener::bind(("127.0.0.1", u16::try_from(first.as_u64().unwrap()).unwrap()))
        .expect("the service is not there yet");
    let second = new.event("port.allocated", within).await["data"]["port"].clone();
    assert_ne!(first, second);
    assert_eq!(new.ended(within).await, 0, "{:#?}", new.seen);
    let end: Value = serde_json::from_str(new.seen.last().unwrap()).unwrap();
    assert_eq!(
        end["url"].as_str().unwrap().trim_end_matches('/'),
        format!("http://127.0.0.1:{second}")
    );
    assert_eq!(
        get(&format!("http://127.0.0.1:{second}/hello.txt")).await.1,
        "hello\n"
    );
    home.run(&["remove", "one", "--yes"]).await.success();
}
