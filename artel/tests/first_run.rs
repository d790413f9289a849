//! What a newcomer meets: a machine without a sandbox, `init`, `doctor`, `config check`, the service unit, a chat over a pipe, a
//! budget that is used up, and what the program prints for programs.

mod support;

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use support::openai::{KEY, OpenAi, Reply};
use support::telegram::{TOKEN, Telegram};
use support::{Home, Ran, get};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

const TAPE: &str = include_str!("support/tiny.yaml");

/// A home that plays the small tape of the tests, which does not ship with the program.
fn with_tiny_tape() -> Home {
    let mut home = Home::new();
    std::fs::write(home.file("tiny.yaml"), TAPE).unwrap();
    let tape = home.file("tiny.yaml").display().to_string();
    home.set("ARTEL_TAPE", &tape);
    home
}

/// Every `bwrap` that the program could find.
fn bubblewraps() -> BTreeSet<PathBuf> {
    let path = std::env::var_os("PATH").unwrap();
    std::env::split_paths(&path)
        .chain(["/usr/local/bin", "/usr/bin", "/bin"].map(PathBuf::from))
        .filter_map(|folder| folder.join("bwrap").canonicalize().ok())
        .collect()
}

/// Runs the program where there is no bubblewrap: it is hidden from it, by itself.
async fn run_without_bubblewrap(home: &Home, args: &[&str]) -> Ran {
    let plain = home.artel(args);
    let plain = plain.as_std();
    let mut command = Command::new("bwrap");
    command.args(["--dev-bind", "/", "/"]);
    for path in bubblewraps() {
        command.args(["--ro-bind", "/dev/null"]).arg(path);
    }
    command
        .arg("--")
        .arg(plain.get_program())
        .args(plain.get_args())
        .env_clear()
        .envs(
            plain
                .get_envs()
                .filter_map(|(name, value)| Some((name, value?))),
        )
        .current_dir(home.path())
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(100), command.output())
        .await
        .unwrap_or_else(|_| panic!("artel {args:?} did not end"))
        .unwrap();
    Ran::new(args, output)
}

/// One clear sentence on standard error, and nothing else.
#[track_caller]
fn one_sentence(ran: &Ran, says: &[&str]) {
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:#?}");
    assert!(ran.stderr.starts_with("artel: "), "{ran:#?}");
    for part in says {
        assert!(ran.stderr.contains(part), "{part} in {ran:#?}");
    }
}

#[track_caller]
fn has_fields(value: &Value, fields: &[&str]) {
    let object = value
        .as_object()
        .unwrap_or_else(|| panic!("no object: {value}"));
    let found: BTreeSet<&str> = object.keys().map(String::as_str).collect();
    assert_eq!(found, fields.iter().copied().collect(), "{value:#}");
}

#[tokio::test]
async fn without_bubblewrap_the_demo_runs_and_says_that_it_is_unconfined() {
    let home = Home::new();
    let ran = run_without_bubblewrap(&home, &["demo"]).await.success();
    assert!(ran.stdout.contains("UNCONFINED"), "{ran:#?}");
    assert!(
        ran.stdout.contains("install the package `bubblewrap`"),
        "{ran:#?}"
    );
    let url = ran
        .stdout
        .lines()
        .find_map(|line| line.strip_prefix("deployed "))
        .and_then(|line| line.split_whitespace().next())
        .unwrap_or_else(|| panic!("{ran:#?}"));
    assert_eq!(get(&format!("{url}health")).await.0, 200);

    let doctor = run_without_bubblewrap(&home, &["doctor"]).await.code(1);
    assert!(
        doctor
            .stdout
            .lines()
            .any(|line| line.starts_with("FAIL  sandbox") && line.contains("bubblewrap")),
        "{doctor:#?}"
    );
    run_without_bubblewrap(&home, &["remove", "notes", "--yes"])
        .await
        .success();
}

#[tokio::test]
async fn without_bubblewrap_nothing_else_runs_and_what_needs_no_sandbox_does() {
    let server = OpenAi::start(|_| Reply::Text("I was asked.".to_owned())).await;
    let mut home = with_tiny_tape();

    // Another tape than the one that ships.
    let refused = run_without_bubblewrap(&home, &["new", "Say hello", "--yes"])
        .await
        .code(1);
    one_sentence(&refused, &["only runs in a sandbox", "`bubblewrap`"]);

    // With a sandbox it runs; from then on not even the tape that ships goes without one here.
    home.run(&["new", "Say hello", "--yes"]).await.success();
    home.set("ARTEL_TAPE", "demo");
    let refused = run_without_bubblewrap(&home, &["say", "tiny", "Say bye", "--yes"])
        .await
        .code(1);
    one_sentence(&refused, &["only runs in a sandbox", "nothing else"]);

    // A model.
    home.set("ARTEL_TAPE", "");
    home.set("OPENAI_BASE_URL", &server.url);
    home.set("OPENAI_API_KEY", KEY);
    home.set("ARTEL_MODEL", "scripted");
    let refused = run_without_bubblewrap(&home, &["new", "Something", "--yes", "--json"])
        .await
        .code(1);
    let error = &refused.end()["error"];
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("only runs in a sandbox"), "{refused:#?}");
    assert!(server.asked().is_empty(), "it was refused before");
    let projects = run_without_bubblewrap(&home, &["projects", "--json"])
        .await
        .success();
    assert_eq!(projects.json().len(), 1, "nothing was begun: {projects:#?}");

    // What runs no command works all the same.
    let status = run_without_bubblewrap(&home, &["status", "tiny"])
        .await
        .success();
    assert!(status.stdout.contains("deployed"), "{status:#?}");
    run_without_bubblewrap(&home, &["stop", "tiny"])
        .await
        .success();
    let started = run_without_bubblewrap(&home, &["start", "tiny"])
        .await
        .code(1);
    assert!(started.stderr.contains("bubblewrap"), "{started:#?}");
    home.run(&["remove", "tiny", "--yes"]).await.success();
}

#[tokio::test]
async fn init_tries_everything_and_writes_only_what_works() {
    let server = OpenAi::start(|_| Reply::Text("yes".to_owned())).await;
    let telegram = Telegram::start().await;
    let home = Home::new();
    let file = home.file(".env");
    let url = format!("OPENAI_BASE_URL={}", server.url);
    let api = format!("TELEGRAM_API_URL={}", telegram.url);
    let token = format!("TELEGRAM_BOT_TOKEN={TOKEN}");
    let init = |key: &str, more: &[&str]| {
        let key = format!("OPENAI_API_KEY={key}");
        let mut args: Vec<String> = ["init", "--no-input"].map(str::to_owned).to_vec();
        for pair in [&url, &api, &token, &key, "ARTEL_MODEL=scripted"] {
            args.extend(["--set".to_owned(), pair.to_owned()]);
        }
        args.extend(more.iter().map(|&arg| arg.to_owned()));
        args
    };
    let run = async |args: Vec<String>| {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        home.run(&args).await
    };
    let keeps_quiet = |ran: &Ran, secrets: &[&str]| {
        for secret in secrets {
            assert!(!ran.stdout.contains(secret), "{ran:#?}");
            assert!(!ran.stderr.contains(secret), "{ran:#?}");
        }
    };

    let bad = "sk-bad-canary-0123456789";
    let refused = run(init(bad, &[])).await.code(1);
    assert!(refused.stdout.contains("FAIL  model"), "{refused:#?}");
    one_sentence(&refused, &["nothing was written", "--force"]);
    assert!(!file.exists());
    keeps_quiet(&refused, &[bad, TOKEN]);

    run(init(bad, &["--force"])).await.success();
    assert!(std::fs::read_to_string(&file).unwrap().contains(bad));

    let ran = run(init(KEY, &[])).await.success();
    for line in ["ok    model", "ok    telegram", "ok    sandbox"] {
        assert!(ran.stdout.contains(line), "{line} in {ran:#?}");
    }
    keeps_quiet(&ran, &[KEY, TOKEN]);
    let written = std::fs::read_to_string(&file).unwrap();
    assert!(written.contains(KEY) && !written.contains(bad));
    let mode = std::fs::metadata(&file).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "for this user alone");

    // What was written counts, and it is said where it came from.
    let check = home.run(&["config", "check", "--json"]).await.success();
    keeps_quiet(&check, &[KEY, TOKEN]);
    let found = |name: &str| {
        let all = check.json();
        let found = all.into_iter().find(|setting| setting["name"] == name);
        found.unwrap_or_else(|| panic!("{name} in {check:#?}"))
    };
    let dotenv = file.display().to_string();
    assert_eq!(found("ARTEL_MODEL")["value"], "scripted");
    for name in ["ARTEL_MODEL", "OPENAI_API_KEY", "TELEGRAM_BOT_TOKEN"] {
        let source = found(name)["source"].as_str().unwrap().to_owned();
        assert!(source.contains(&dotenv), "{name}: {source}");
    }
    assert_eq!(found("OPENAI_API_KEY")["value"], "(set, not shown)");
    assert_eq!(found("ARTEL_HTTP_ADDR")["source"], "the environment");
    assert_eq!(found("ARTEL_LOG")["source"], "default");

    // For programs, too; and one model needs no name.
    std::fs::remove_file(&file).unwrap();
    let mut args = init(KEY, &["--json"]);
    let at = args.iter().position(|arg| arg == "ARTEL_MODEL=scripted");
    args.drain(at.unwrap() - 1..=at.unwrap());
    let lines = run(args).await.success().json();
    let model = lines.iter().find(|line| line["what"] == "model").unwrap();
    assert!(
        model["detail"]
            .as_str()
            .unwrap()
            .contains("scripted answers"),
        "{model}"
    );
    assert_eq!(lines.last().unwrap()["file"], json!(file));

    let unknown = home
        .run(&["init", "--no-input", "--set", "FOO=1"])
        .await
        .code(1);
    one_sentence(&unknown, &["\"FOO\" is no setting"]);
}

#[tokio::test]
async fn doctor_names_what_is_wrong() {
    let server = OpenAi::start(|_| Reply::Text("yes".to_owned())).await;
    let telegram = Telegram::start().await;
    let refusal = json!({"ok": false, "error_code": 401, "description": "Unauthorized"});
    telegram.refuse_once("getMe", refusal).await;
    let mut home = Home::new();
    let nothing = home.file("nothing");
    std::fs::create_dir(&nothing).unwrap();
    home.set("PATH", nothing.to_str().unwrap());
    home.set("OPENAI_BASE_URL", &server.url);
    home.set("OPENAI_API_KEY", "sk-wrong");
    home.set("ARTEL_MODEL", "scripted");
    home.set("TELEGRAM_BOT_TOKEN", TOKEN);
    home.set("TELEGRAM_API_URL", &telegram.url);
    home.set("SPAWNER_RUNTIME", "runc");
    home.set("DOCKER_HOST", "unix:///nonexistent/docker.sock");
    let ran = home.run(&["doctor", "--json"]).await.code(1);
    let findings = ran.json();
    let found = |what: &str| {
        let finding = findings.iter().find(|finding| finding["what"] == what);
        finding.unwrap_or_else(|| panic!("{what} in {ran:#?}"))
    };
    for (what, says) in [
        ("git", "install git"),
        ("python3", "install python3"),
        ("model", "key"),
        ("telegram", "token"),
        ("workers", "/nonexistent/docker.sock"),
    ] {
        assert_eq!(found(what)["ok"], false, "{what}");
        let detail = found(what)["detail"].as_str().unwrap();
        assert!(detail.contains(says), "{what}: {detail}");
    }
    for what in ["sandbox", "data folder", "disk", "database"] {
        assert_eq!(found(what)["ok"], true, "{ran:#?}");
    }
    assert!(!ran.stdout.contains(TOKEN), "{ran:#?}");
}

#[tokio::test]
async fn the_service_unit_runs_this_program_on_this_folder() {
    let mut home = Home::new();
    let config = home.file("config");
    home.set("XDG_CONFIG_HOME", config.to_str().unwrap());
    let ran = home.run(&["service", "install"]).await.success();
    let file = config.join("systemd/user/artel.service");
    assert!(ran.stdout.contains(file.to_str().unwrap()), "{ran:#?}");
    assert!(ran.stdout.contains("systemctl --user enable --now artel"));
    let unit = std::fs::read_to_string(&file).unwrap();
    let program = Path::new(env!("CARGO_BIN_EXE_artel"))
        .canonicalize()
        .unwrap();
    let line = |text: String| {
        assert!(unit.lines().any(|line| line == text), "{text} in {unit}");
    };
    line(format!("ExecStart=\"{}\" up", program.display()));
    line(format!(
        "Environment=\"ARTEL_HOME={}\"",
        home.path().display()
    ));
    // Services that were deployed outlive the crew.
    line("KillMode=process".to_owned());
}

#[tokio::test]
async fn a_chat_over_a_pipe_builds_a_project_in_the_one_conversation() {
    let home = with_tiny_tape();
    let mut chat = home
        .artel(&["chat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut input = chat.stdin.take().unwrap();
    let mut lines = BufReader::new(chat.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    let bound = Duration::from_secs(100);
    input.write_all(b"Say hello\n").await.unwrap();
    let wait = tokio::time::timeout(bound, async {
        while let Some(line) = lines.next_line().await.unwrap() {
            let question = line.trim().strip_prefix("(w").map(str::to_owned);
            said.push(line);
            if let Some(rest) = question {
                let (id, options) = rest.split_once(')').unwrap();
                assert!(options.contains("approve"), "{options}");
                return format!("w{id}");
            }
        }
        panic!("nothing was asked: {said:#?}");
    })
    .await
    .unwrap();
    let answer = format!("/answer {wait} approve\n");
    input.write_all(answer.as_bytes()).await.unwrap();
    drop(input);
    let ended = tokio::time::timeout(bound, async {
        while let Some(line) = lines.next_line().await.unwrap() {
            said.push(line);
        }
        chat.wait().await.unwrap()
    })
    .await
    .unwrap();
    assert!(ended.success(), "{said:#?}");
    let last = said.join("\n");
    assert!(
        last.contains("**Tiny** is live: http://127.0.0.1:"),
        "the end is told before the chat ends: {last}"
    );

    // The same conversation from another place.
    let events = home
        .run(&["logs", "tiny", "--json", "-n", "1000"])
        .await
        .success()
        .json();
    let heard: Vec<_> = events
        .iter()
        .filter(|event| event["event"] == "message.received")
        .map(|event| event["data"]["text"].as_str().unwrap())
        .collect();
    assert_eq!(heard, ["Say hello"]);
    let lines = home.run(&["logs", "tiny"]).await.success().stdout;
    for line in lines.lines() {
        assert!(said.iter().any(|seen| seen == line), "{line} in {said:#?}");
    }
    home.run(&["remove", "tiny", "--yes"]).await.success();
}

#[tokio::test]
async fn a_budget_stops_parallel_workers_before_it_is_exceeded_and_goes_on_when_it_is_raised() {
    const LIMIT: u64 = 9_000;
    let home = Home::with_tape();
    std::fs::write(
        home.file("artel.toml"),
        format!("[models.budget]\ntokens = {LIMIT}\n"),
    )
    .unwrap();
    let mut ran = home
        .run(&["new", "Notes, please", "--yes", "--json"])
        .await
        .code(3);
    let end = ran.end();
    assert_eq!(end["status"], "waiting", "{end:#}");
    assert_eq!(end["wait"]["kind"], "budget", "{end:#}");
    let project = end["project"].as_str().unwrap().to_owned();
    let spent = |report: &Value| report["project"]["tokens"].as_u64().unwrap();
    let report = home.status(&project).await;
    assert!(spent(&report) <= LIMIT, "{report:#}");
    assert!(spent(&report) > LIMIT / 2, "it went as far as it could");

    // Whoever was stopped asks by itself; each is answered, and the job goes on to its end.
    let mut answers = 0;
    while ran.code == 3 {
        assert!(answers < 6, "it never ends: {ran:#?}");
        let end = ran.end();
        let wait = end["wait"]["id"].as_str().unwrap().to_owned();
        ran = home.run(&["approve", &wait, "--json"]).await;
        answers += 1;
    }
    assert_eq!(ran.code, 0, "{ran:#?}");
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    let report = home.status(&project).await;
    assert!(spent(&report) > LIMIT, "{report:#}");
    home.run(&["remove", &project, "--yes"]).await.success();
}

#[tokio::test]
async fn two_terminals_at_once_both_finish_and_say_what_is_documented() {
    let home = with_tiny_tape();
    let (one, other) = tokio::join!(
        home.run(&["new", "Say hello", "--yes", "--json"]),
        home.run(&["new", "Say hello again", "--yes", "--json"]),
    );
    let (one, other) = (one.success(), other.success());
    for ran in [&one, &other] {
        let lines = ran.json();
        let (end, events) = lines.split_last().unwrap();
        has_fields(end, &["event", "project", "status", "url", "wait", "error"]);
        assert_eq!(end["event"], "end");
        assert_eq!(end["status"], "deployed");
        assert_eq!(
            (&end["wait"], &end["error"]),
            (&Value::Null, &Value::Null),
            "{end}"
        );
        let mut last = 0;
        for event in events {
            has_fields(
                event,
                &["at", "project", "job", "task", "seq", "event", "data"],
            );
            assert_eq!(event["project"], end["project"]);
            let at: Result<jiff::Timestamp, _> = event["at"].as_str().unwrap().parse();
            assert!(at.is_ok(), "{event}");
            assert!(event["data"].is_object(), "{event}");
            let seq = event["seq"].as_u64().unwrap();
            assert!(seq > last, "{event}");
            last = seq;
        }
        assert!(
            events
                .iter()
                .any(|event| event["event"] == "task.merged" && event["task"] == "hello"),
            "{ran:#?}"
        );
    }
    let (one, other) = (one.end(), other.end());
    assert_ne!(one["project"], other["project"]);
    assert_ne!(one["url"], other["url"]);
    for end in [&one, &other] {
        let url = end["url"].as_str().unwrap().trim_end_matches('/');
        assert_eq!(get(&format!("{url}/hello.txt")).await.1, "hello\n");
    }

    let report = home.status(one["project"].as_str().unwrap()).await;
    has_fields(
        &report,
        &["project", "job", "tasks", "waits", "deployments"],
    );
    has_fields(
        &report["project"],
        &[
            "id",
            "slug",
            "name",
            "status",
            "url",
            "repository",
            "cost_usd",
            "tokens",
        ],
    );
    has_fields(&report["job"], &["id", "status", "node"]);
    for task in report["tasks"].as_array().unwrap() {
        has_fields(
            task,
            &[
                "id",
                "title",
                "status",
                "attempts",
                "review_rounds",
                "pull_request",
                "depends_on",
                "cost_usd",
            ],
        );
        has_fields(&task["pull_request"], &["number", "status", "url"]);
    }
    assert_eq!(report["tasks"][1]["depends_on"], json!(["hello"]));
    assert_eq!(report["tasks"][1]["review_rounds"], 2);
    assert_eq!(report["waits"], json!([]));
    for deployment in report["deployments"].as_array().unwrap() {
        has_fields(deployment, &["release", "sha", "status", "url", "at"]);
    }

    // A command that was waited for by a person says on what.
    let slug = report["project"]["slug"].as_str().unwrap();
    let waiting = home
        .run(&["say", slug, "Say bye", "--json"])
        .await
        .code(3)
        .end();
    has_fields(&waiting["wait"], &["id", "kind", "question", "options"]);
    let report = home.status(slug).await;
    assert_eq!(report["waits"], json!([waiting["wait"]]));

    // A clone goes into no folder that holds something.
    let full = home.file("full");
    std::fs::create_dir(&full).unwrap();
    std::fs::write(full.join("mine"), "keep").unwrap();
    let refused = home
        .run(&["clone", slug, full.to_str().unwrap()])
        .await
        .code(1);
    one_sentence(&refused, &["is not an empty folder", "name another one"]);
    assert_eq!(std::fs::read_dir(&full).unwrap().count(), 1);
    for end in [&one, &other] {
        let project = end["project"].as_str().unwrap();
        home.run(&["remove", project, "--yes"]).await.success();
    }
}

#[tokio::test]
async fn an_endpoint_with_one_model_needs_no_name_and_one_with_more_asks_for_it() {
    let server = OpenAi::start(|_| Reply::Text("I am a poet, not a planner.".to_owned())).await;
    let mut home = Home::new();
    home.set("OPENAI_BASE_URL", &server.url);
    home.set("OPENAI_API_KEY", KEY);
    home.run(&["new", "Something", "--yes", "--json"]).await;
    let asked = server.asked();
    assert!(!asked.is_empty(), "the model is asked, and not a tape");
    assert!(asked.iter().all(|asked| asked.body["model"] == "scripted"));

    let many = axum::Router::new().fallback(|| async {
        axum::Json(json!({"object": "list", "data": [{"id": "small"}, {"id": "large"}]}))
    });
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, many).await.unwrap() });
    home.set("OPENAI_BASE_URL", &url);
    let refused = home.run(&["new", "Something", "--yes"]).await.code(2);
    one_sentence(&refused, &["ARTEL_MODEL is not set", "small, large"]);

    // Endpoints without a model for every role are no leave to play the tape either.
    home.set("OPENAI_BASE_URL", "");
    std::fs::write(
        home.file("artel.toml"),
        format!("[models.endpoints.other]\nbase_url = \"{url}\"\n"),
    )
    .unwrap();
    let refused = home.run(&["new", "Something", "--yes"]).await.code(2);
    one_sentence(&refused, &["not a model for every role", "[models]"]);
}
