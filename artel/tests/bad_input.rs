//! Bad input of every kind, with the real binary: one clear sentence says what is wrong, where, and what to do, and nothing
//! is lost.

mod support;
#[path = "support/tapes.rs"]
mod tapes;

use std::net::TcpListener;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::Connection as _;
use support::{Home, Ran, get};
use tapes::{home, one, plan, play, policy, processes, spec, works};
use tokio::io::AsyncWriteExt;

/// The text has all of these.
#[track_caller]
fn says(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not said in: {text}");
    }
}

/// What `artel` said on standard error, in one line.
#[track_caller]
fn sentence(ran: &Ran) -> &str {
    let lines: Vec<&str> = ran.stderr.lines().collect();
    assert_eq!(lines.len(), 1, "one sentence: {ran:#?}");
    assert!(lines[0].starts_with("artel: "), "{ran:#?}");
    assert!(!lines[0].contains("panicked"), "{ran:#?}");
    lines[0]
}

/// Runs a command with something on its standard input.
async fn piped(home: &Home, args: &[&str], input: &[u8]) -> (i32, String) {
    let mut child = home
        .artel(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    // It may have read enough before all is written.
    let _ = stdin.write_all(input).await;
    drop(stdin);
    let output = tokio::time::timeout(Duration::from_mins(1), child.wait_with_output())
        .await
        .unwrap()
        .unwrap();
    (
        output.status.code().unwrap_or(-1),
        String::from_utf8(output.stderr).unwrap(),
    )
}

/// The project of a command that did work.
#[track_caller]
fn id(ran: &Ran) -> String {
    ran.end()["project"].as_str().unwrap().to_owned()
}

/// What a command that did work ended with: its question.
#[track_caller]
fn question(ran: &Ran) -> String {
    let end = ran.end();
    assert_eq!(end["status"], "waiting", "{ran:#?}");
    end["wait"]["question"].as_str().unwrap().to_owned()
}

fn count(events: &[Value], name: &str) -> usize {
    events.iter().filter(|event| event["event"] == name).count()
}

#[tokio::test]
async fn messages_that_are_empty_or_too_long_are_refused_and_change_nothing() {
    let home = home(&one());
    for text in ["", "  \n"] {
        let ran = home.run(&["new", text]).await.code(1);
        says(
            sentence(&ran),
            &["The message is empty", "write what you want"],
        );
    }
    let ran = home.run(&["projects", "--json"]).await.success();
    assert_eq!(ran.stdout, "");

    let ran = home.run(&["new", "Say hello", "--json"]).await.code(3);
    let (wait, project) = (ran.end()["wait"]["id"].clone(), id(&ran));
    let megabyte = vec![b'a'; 1024 * 1024];
    let (code, said) = piped(&home, &["new", "-"], &megabyte).await;
    assert_eq!(code, 1, "{said}");
    says(&said, &["1024 KiB", "at most 64 KiB", "send the essence"]);
    let (code, said) = piped(&home, &["say", &project, "-"], &megabyte).await;
    assert_eq!(code, 1, "{said}");
    says(&said, &["1024 KiB", "at most 64 KiB"]);
    let ran = home.run(&["say", &project, ""]).await.code(1);
    says(sentence(&ran), &["The message is empty"]);

    // Nothing was lost, nothing was added.
    let report = home.status(&project).await;
    assert_eq!(report["waits"][0]["id"], wait, "{report:#}");
    let projects = home.run(&["projects", "--json"]).await.success();
    assert_eq!(projects.json().len(), 1, "{projects:#?}");
}

#[tokio::test]
async fn names_never_lead_out_of_the_data_folder() {
    let mut tape = one();
    spec(&mut tape)["name"] = json!("../../etc");
    let home = home(&tape);
    for args in [
        &["status", "../x"][..],
        &["clone", "../../etc"],
        &["say", "../x", "hello"],
        &["stop", "../../etc/passwd"],
        &["remove", "..", "--yes"],
        &["secrets", "list", "../x"],
    ] {
        let ran = home.run(args).await.code(1);
        says(sentence(&ran), &["there is no project", "artel projects"]);
    }
    home.run(&["new", "Say hello", "--yes"]).await.success();
    let report = home.status("etc").await;
    assert_eq!(report["project"]["slug"], "etc");
    let repository = report["project"]["repository"].as_str().unwrap();
    assert!(
        repository.starts_with(&*home.file("repos").to_string_lossy()),
        "{repository}"
    );
    home.run(&["clone", "etc"]).await.success();
    assert!(home.file("etc/hello.txt").is_file());
    let ran = home.run(&["clone", "etc"]).await.code(1);
    says(sentence(&ran), &["etc"]);
    let ran = home.run(&["secrets", "set", "etc", "../KEY"]).await.code(1);
    says(sentence(&ran), &["cannot name a secret", "capital letter"]);
    home.run(&["remove", "etc", "--yes"]).await.success();
}

#[tokio::test]
async fn a_plan_that_cannot_be_carried_out_goes_back_three_times_and_then_to_a_person() {
    let task = |id: &str, on: &[&str]| json!({"id": id, "title": id, "description": "Write it.", "acceptance": [], "depends_on": on});
    for (tasks, parts) in [
        (
            [task("a", &["b"]), task("b", &["a"])],
            &["circle", "a → b"][..],
        ),
        (
            [task("a", &[]), task("b", &["zz"])],
            &["\"b\" depends on \"zz\"", "not in the plan"],
        ),
        (
            [task("a", &[]), task("a", &[])],
            &["two tasks", "\"a\"", "unique"],
        ),
    ] {
        let mut tape = one();
        plan(&mut tape)["tasks"] = json!(tasks);
        let answers = tape["answers"]["architect"]["job-1"]
            .as_array_mut()
            .unwrap();
        *answers = std::iter::repeat_n(answers[0].clone(), 6).collect();
        let home = home(&tape);
        let ran = home
            .run(&["new", "Say hello", "--yes", "--json"])
            .await
            .code(3);
        let asked = question(&ran);
        if parts[0] == "circle" {
            says(&asked, &["circle"]);
            assert!(
                asked.contains("a → b → a") || asked.contains("b → a → b"),
                "{asked}"
            );
        } else {
            says(&asked, parts);
        }
        says(&asked, &["4 times in a row"]);
        let calls = ran
            .json()
            .iter()
            .filter(|line| {
                line["event"] == "model.used" && line["data"]["spend"]["role"] == "architect"
            })
            .count();
        assert_eq!(calls, 4, "once, and three times sent back: {ran:#?}");

        // It waits, and a person can end it.
        let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
        let ran = home.run(&["reject", &wait, "--json"]).await.code(1);
        assert_eq!(ran.end()["status"], "failed", "{ran:#?}");
        let ran = home.run(&["approve", &wait]).await.code(1);
        says(sentence(&ran), &["answered before", "nothing changed"]);
    }
}

#[tokio::test]
async fn a_worker_that_exits_0_without_a_commit_ends_in_a_persons_hands() {
    let mut home = home(&one());
    home.set("ARTEL_AGENT", "command");
    home.set("ARTEL_AGENT_COMMAND", "[\"true\"]");
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
    says(&question(&ran), &["Hello", "commit"]);
    assert_eq!(count(&ran.json(), "task.attempt"), 2, "{ran:#?}");
    let report = home.status("one").await;
    assert_eq!(report["tasks"][0]["attempts"], 2, "{report:#}");
    assert_eq!(report["tasks"][0]["pull_request"], Value::Null);

    // A person gives the task up, then the job; nobody is asked a third time.
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["reject", &wait, "--json"]).await.code(3);
    says(&question(&ran), &["hello"]);
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["reject", &wait, "--json"]).await.code(1);
    assert_eq!(ran.end()["status"], "failed", "{ran:#?}");
}

#[tokio::test]
async fn a_task_that_changes_nothing_ends_in_a_persons_hands() {
    let mut tape = one();
    works(&mut tape, "git log --oneline", 4);
    let home = home(&tape);
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
    says(&question(&ran), &["Hello", "commit"]);
    assert_eq!(count(&ran.json(), "task.attempt"), 2, "{ran:#?}");
}

#[tokio::test]
async fn checks_that_never_end_are_ended_and_count_as_failed() {
    let mut tape = one();
    plan(&mut tape)["manifest"]["checks"] = json!("echo looking; sleep 98761");
    works(
        &mut tape,
        "date +%s%N >> hello.txt; git add -A; git commit -qm hello; git log --oneline",
        2,
    );
    let home = home(&tape);
    policy(&home, "checks_wall_s = 1\nmax_review_rounds = 2");
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
    says(
        &question(&ran),
        &[
            "sent back 2 times",
            "did not end in time",
            "within 1 s",
            "looking",
        ],
    );
    assert_eq!(count(&ran.json(), "task.checked"), 2, "{ran:#?}");
    assert_eq!(processes("98761"), []);
}

#[tokio::test]
async fn a_service_that_exits_at_once_fails_its_release_with_what_it_said() {
    let mut tape = one();
    plan(&mut tape)["manifest"]["service"]["command"] =
        json!(["sh", "-c", "echo no such table >&2; exit 3"]);
    let home = home(&tape);
    policy(&home, "max_repairs = 0");
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(1);
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
async fn a_service_that_never_listens_fails_its_release_and_does_not_go_on() {
    let mut tape = one();
    plan(&mut tape)["manifest"]["service"]["command"] = json!(["sleep", "98762"]);
    let home = home(&tape);
    policy(&home, "max_repairs = 0\nservice_ready_s = 1");
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(1);
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
    let ran = home
        .run(&["new", "Say hello", "--yes", "--json"])
        .await
        .code(3);
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

#[tokio::test]
async fn a_data_folder_of_a_newer_version_is_refused_and_left_alone() {
    let home = home(&one());
    let project = id(&home.run(&["new", "Say hello", "--json"]).await.code(3));
    for (format, found) in [("2", "format 2,"), ("later", "format later,")] {
        std::fs::write(home.file("format"), format!("{format}\n")).unwrap();
        for args in [&["projects"][..], &["new", "x"], &["up"], &["migrate"]] {
            let ran = home.run(args).await.code(1);
            says(
                sentence(&ran),
                &[
                    "data folder",
                    &home.path().to_string_lossy(),
                    found,
                    "ARTEL_HOME",
                ],
            );
        }
        assert_eq!(
            std::fs::read_to_string(home.file("format")).unwrap(),
            format!("{format}\n")
        );
    }
    std::fs::write(home.file("format"), "1\n").unwrap();
    let report = home.status(&project).await;
    assert_eq!(report["waits"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_database_of_a_newer_schema_is_refused_and_left_alone() {
    let home = home(&one());
    let project = id(&home.run(&["new", "Say hello", "--json"]).await.code(3));
    let url = format!("sqlite://{}", home.file("artel.db").display());
    let mut database = sqlx::SqliteConnection::connect(&url).await.unwrap();
    for table in ["graph_migrations", "_sqlx_migrations"] {
        let insert = format!(
            "insert into {table} (version, description, success, checksum, execution_time) values (99990101000000, 'later', true, x'00', 0)"
        );
        sqlx::query(sqlx::AssertSqlSafe(insert))
            .execute(&mut database)
            .await
            .unwrap();
        for args in [&["projects"][..], &["up"], &["migrate"]] {
            let ran = home.run(args).await.code(1);
            says(sentence(&ran), &["newer", "99990101000000"]);
        }
        let delete = format!("delete from {table} where version = 99990101000000");
        sqlx::query(sqlx::AssertSqlSafe(delete))
            .execute(&mut database)
            .await
            .unwrap();
    }
    let report = home.status(&project).await;
    assert_eq!(report["waits"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_broken_configuration_is_named_with_file_and_line_before_anything_is_done() {
    let home = Home::new();
    let file = home.file("artel.toml");
    for (text, line, parts) in [
        (
            "artel_log = \"text\"\nartel_ports = [\n",
            "line 2",
            &["cannot be read"][..],
        ),
        (
            "\n\nthis is prose\n",
            "line 3",
            &["cannot be read", "mend it"],
        ),
        (
            "\nspawner_max_wokers = 2\n",
            "line 2",
            &["spawner_max_wokers", "artel config check"],
        ),
        (
            "spawner_max_workers = \"many\"\n",
            "line 1",
            &["SPAWNER_MAX_WORKERS", "many", "from 1 to 64"],
        ),
        (
            "[policy]\nmax_attempts = \"three\"\n",
            "line 2",
            &["policy.max_attempts", "mend that line"],
        ),
        (
            "[policy]\nmax_atempts = 3\n",
            "line 2",
            &["policy.max_atempts", "max_attempts"],
        ),
        (
            "[policy.limits]\nwall_s = -1\n",
            "line 2",
            &["policy.limits.wall_s"],
        ),
        ("[models]\nmodle = \"x\"\n", "line 2", &["models.modle"]),
    ] {
        std::fs::write(&file, text).unwrap();
        for args in [
            &["projects"][..],
            &["config", "check"],
            &["new", "Say hello"],
        ] {
            let ran = home.run(args).await.code(2);
            says(sentence(&ran), &[&file.to_string_lossy(), line]);
            says(sentence(&ran), parts);
        }
    }
    assert!(!home.file("artel.db").exists(), "nothing was done");
    std::fs::remove_file(&file).unwrap();

    let secret = "sk-canary-1234 and-more";
    std::fs::write(home.file(".env"), format!("\nOPENAI_API_KEY={secret}\n")).unwrap();
    let ran = home.run(&["projects"]).await.code(2);
    says(sentence(&ran), &[".env, line 2", "NAME=value"]);
    assert!(!ran.stderr.contains("canary"), "{ran:#?}");
    std::fs::remove_file(home.file(".env")).unwrap();
    home.run(&["projects"]).await.success();
}

#[tokio::test]
async fn what_is_missing_from_the_environment_is_named() {
    let mut home = Home::new();
    home.set("ARTEL_MODE", "full");
    says(
        sentence(&home.run(&["projects"]).await.code(2)),
        &["ARTEL_MODE=full", "DATABASE_URL", "REDIS_URL"],
    );
    home.set("DATABASE_URL", "postgres://nobody@127.0.0.1:9/nothing");
    says(
        sentence(&home.run(&["projects"]).await.code(2)),
        &["ARTEL_MODE=full", "REDIS_URL", "ARTEL_MODE=embedded"],
    );
    home.set("ARTEL_MODE", "half");
    says(
        sentence(&home.run(&["projects"]).await.code(2)),
        &["ARTEL_MODE", "half", "`embedded` or `full`"],
    );
    home.set("ARTEL_MODE", "embedded");
    let ran = home.run(&["projects"]).await.code(1);
    says(&ran.stderr, &["127.0.0.1:9"]);

    let mut home = Home::new();
    home.set("ARTEL_TAPE", "/nowhere/tape.yaml");
    let ran = home.run(&["new", "Say hello"]).await.code(2);
    says(
        sentence(&ran),
        &["/nowhere/tape.yaml", "is the path right?"],
    );
    std::fs::write(home.file("no-tape.yaml"), "answers: 3\n").unwrap();
    let tape = home.file("no-tape.yaml").display().to_string();
    home.set("ARTEL_TAPE", &tape);
    let ran = home.run(&["new", "Say hello"]).await.code(2);
    says(sentence(&ran), &[&tape, "not a tape"]);
    home.set("ARTEL_TAPE", "demo");
    home.set("ARTEL_AGENT", "command");
    let ran = home.run(&["projects"]).await.code(2);
    says(sentence(&ran), &["ARTEL_AGENT_COMMAND"]);
}

#[tokio::test]
async fn commands_that_are_none_and_waits_that_are_gone_are_said_so() {
    let home = home(&one());
    for args in [
        &["frobnicate"][..],
        &[],
        &["new"],
        &["graph", "--format", "gif"],
        &["project", "set", "x", "colour", "red"],
    ] {
        let ran = home.run(args).await.code(2);
        says(&ran.stderr, &["--help"]);
    }
    for args in [
        &["approve", "nothing"][..],
        &["reject", "../x"],
        &["answer", "w0", "yes"],
    ] {
        let ran = home.run(args).await.code(1);
        says(
            sentence(&ran),
            &["nothing waits under", args[1], "artel status"],
        );
    }
    for args in [
        &["cancel", "x"][..],
        &["retry", "x"],
        &["deploy", "x"],
        &["logs", "x"],
    ] {
        let ran = home.run(args).await.code(1);
        says(
            sentence(&ran),
            &["there is no project \"x\"", "artel projects"],
        );
    }
    let ran = home.run(&["history", "nothing"]).await.code(1);
    says(sentence(&ran), &["nothing"]);

    let ran = home.run(&["new", "Say hello", "--json"]).await.code(3);
    let project = id(&ran);
    let wait = ran.end()["wait"]["id"].as_str().unwrap().to_owned();
    let ran = home.run(&["reject", &wait, "--json"]).await;
    assert!([0, 3].contains(&ran.code), "{ran:#?}");
    for command in ["approve", "reject"] {
        let ran = home.run(&[command, &wait]).await.code(1);
        says(sentence(&ran), &["answered before", "nothing changed"]);
    }
    for args in [&["cancel", &project][..], &["retry", &project]] {
        let ran = home.run(args).await.code(1);
        says(sentence(&ran), &[&project]);
    }
    for args in [
        &["rollback", &project][..],
        &["start", &project],
        &["logs", &project, "--service"],
    ] {
        let ran = home.run(args).await;
        assert!(ran.code == 1, "{ran:#?}");
        says(sentence(&ran), &["deployed"]);
    }
}

/// A data folder on a small disk of its own, which root can make. Whatever runs on it is ended before it is taken away.
struct SmallDisk {
    home: Home,
    mount: Mount,
}

struct Mount(std::path::PathBuf);

impl SmallDisk {
    fn new(tape: &Value, size: &str) -> Self {
        let mut home = Home::new();
        let mount = Mount(home.path().to_owned());
        mount.options(&format!("size={size}"));
        play(&mut home, tape);
        Self { home, mount }
    }

    fn resize(&self, size: &str) {
        self.mount.options(&format!("remount,size={size}"));
    }

    /// Leaves so much room and no more.
    fn leave(&self, kib: u64) {
        let found = rustix::fs::statvfs(&self.mount.0).unwrap();
        let used = (found.f_blocks - found.f_bfree) * found.f_frsize / 1024;
        self.resize(&format!("{}k", used + kib));
    }
}

impl Mount {
    fn options(&self, options: &str) {
        let status = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(&self.0)
            .status()
            .unwrap();
        assert!(
            status.success(),
            "a small disk can only be made by root with the right to mount; run the tests so"
        );
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount")
            .arg("--lazy")
            .arg(&self.0)
            .status();
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[tokio::test]
async fn a_full_disk_is_said_so_and_with_room_the_job_goes_on() {
    let disk = SmallDisk::new(&one(), "100k");
    let ran = disk.home.run(&["new", "Say hello", "--yes"]).await.code(1);
    says(sentence(&ran), &["disk is full", "make room"]);

    // In the middle of a job.
    disk.resize("64m");
    let ran = disk.home.run(&["new", "Say hello", "--json"]).await.code(3);
    let (wait, project) = (
        ran.end()["wait"]["id"].as_str().unwrap().to_owned(),
        id(&ran),
    );
    disk.leave(300);
    let ran = disk.home.run(&["approve", &wait, "--json"]).await;
    let said = ran.end().to_string();
    assert!([1, 3].contains(&ran.code), "{ran:#?}");
    says(&said, &["disk", "full"]);
    assert!(said.contains("room") || said.contains("space"), "{said}");

    disk.resize("64m");
    let mut last = None;
    for _ in 0..3 {
        let report = disk.home.status(&project).await;
        let ran = if let Some(wait) = report["waits"][0]["id"].as_str() {
            disk.home.run(&["approve", wait, "--json"]).await
        } else {
            let args = ["logs", &project, "--until-idle", "--json"];
            disk.home.run(&args).await
        };
        let done = ran.code == 0 && ran.end()["status"] == "deployed";
        last = Some(ran);
        if done {
            break;
        }
    }
    let ran = last.unwrap();
    assert_eq!(ran.end()["status"], "deployed", "{ran:#?}");
    let url = ran.end()["url"].as_str().unwrap().to_owned();
    assert_eq!(
        get(&format!("{}/hello.txt", url.trim_end_matches('/')))
            .await
            .1,
        "hello\n"
    );
    let events = disk
        .home
        .run(&["logs", "one", "--json", "-n", "1000"])
        .await
        .success()
        .json();
    for name in ["job.started", "task.started", "task.merged", "job.ended"] {
        assert_eq!(count(&events, name), 1, "{name}: {events:#?}");
    }
    disk.home.run(&["remove", "one", "--yes"]).await.success();
}
