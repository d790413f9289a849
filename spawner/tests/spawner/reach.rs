//! What a worker can see and reach: its workspace, its broker, and nothing else.

use crate::stage::{Stage, assert_succeeded, kind, until, variable};
use protocol::EventKind;
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

const REACH: &str = include_str!("reach.py");
/// What nobody but the host may know.
const CANARY: &str = "canary-5d1f0e7c";

/// Somebody at an address, and all that was ever said to them.
struct Listener {
    address: SocketAddr,
    heard: Arc<Mutex<Vec<String>>>,
}

impl Listener {
    fn at(host: &str) -> Self {
        let listener = TcpListener::bind((host, 0)).unwrap_or_else(|error| {
            panic!(
                "{host} is no address of this machine ({error}); run the tests through scripts/test"
            )
        });
        let address = listener.local_addr().unwrap();
        let heard: Arc<Mutex<Vec<String>>> = Arc::default();
        let ears = Arc::clone(&heard);
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut said = [0; 64];
                let _ = stream.set_read_timeout(Some(Duration::from_secs(20)));
                let read = stream.read(&mut said).unwrap_or(0);
                let said = String::from_utf8_lossy(&said[..read]).into_owned();
                ears.lock().unwrap().push(said);
            }
        });
        Self { address, heard }
    }

    /// Says something from the host, and waits until it is heard: whoever listens does hear.
    async fn control(&self) {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.write_all(b"control").unwrap();
        drop(stream);
        let heard = Arc::clone(&self.heard);
        until(async || (!heard.lock().unwrap().is_empty()).then_some(())).await;
    }
}

#[tokio::test]
async fn metadata_and_private_addresses_hear_nothing_of_a_worker_whatever_is_allowed() {
    let forbidden = variable("ARTEL_TEST_FORBIDDEN");
    let mut listeners: Vec<Listener> = forbidden.split_whitespace().map(Listener::at).collect();
    assert!(listeners.len() > 3, "{forbidden}");
    // The host itself, by its loopback.
    listeners.push(Listener::at("127.0.0.1"));
    for listener in &listeners {
        listener.control().await;
    }
    let mut places: Vec<String> = listeners
        .iter()
        .map(|listener| listener.address.to_string())
        .collect();
    let local = listeners.last().unwrap().address.port();
    places.push(format!("localhost:{local}"));

    let stage = Stage::new([]).await;
    let script = "printf %s \"$1\" > /tmp/reach.py; shift; python3 /tmp/reach.py \"$@\"; git add answers.json; git commit -qm Answers";
    let mut request = stage.script("r1", 1, script);
    request
        .agent
        .command
        .extend(["sh".to_owned(), REACH.to_owned()]);
    request.agent.command.extend(places.iter().cloned());
    request.network.allow.clone_from(&places);
    assert_succeeded(&stage.run(&request).await);

    let answers: Value = serde_json::from_str(&stage.show("answers.json")).unwrap();
    for place in &places {
        let direct = answers[format!("direct {place}")].as_str().unwrap();
        assert!(direct.starts_with("no: "), "{place}: {direct}");
        for way in ["CONNECT", "GET"] {
            assert_eq!(
                answers[format!("{way} {place}")],
                403,
                "{way} {place}: {answers}"
            );
        }
    }
    for listener in &listeners {
        let heard = listener.heard.lock().unwrap();
        assert_eq!(*heard, ["control"], "{}", listener.address);
    }
    let refused = stage.events("r1").await;
    let refused = refused
        .iter()
        .filter(|event| matches!(event.kind, EventKind::Refused { .. }));
    assert_eq!(refused.count(), places.len() * 2, "each refusal is told");
}

/// A program of the host whose arguments and environment are nobody's business.
struct Stranger(std::process::Child);

impl Stranger {
    fn start() -> Self {
        let child = Command::new("sh")
            .args(["-c", "exec sleep 600 # \"$0\"", CANARY])
            .env("STRANGER", CANARY)
            .stdin(Stdio::null())
            .spawn();
        Self(child.unwrap())
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn plant(path: &Path) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, CANARY).unwrap();
}

#[tokio::test]
async fn canaries_in_files_environments_and_processes_of_the_host_are_not_found() {
    let stage = Stage::new([]).await;
    // In the host's temporary folder, which the tests' own folder is in; in the data folder; beside the workspace.
    plant(&stage.folder.path().join("canary.txt"));
    plant(&stage.home().join("canary.txt"));
    plant(&stage.home().join("workspaces/p/job-1/one~/canary.txt"));
    plant(&stage.home().join("workspaces/other/job-1/one/canary.txt"));
    let _stranger = Stranger::start();
    // The word is put together inside, so that what looks for it is not what is found.
    let (first, rest) = CANARY.split_at(4);
    let script = format!(
        "word={first}; word=${{word}}{rest}
{{ env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'; }} > /tmp/all || true
grep -c $word /tmp/all > /tmp/said || true
# The system itself is the same for everybody, and large.
grep -rIls --exclude-dir=proc --exclude-dir=sys --exclude-dir=dev --exclude-dir=usr --exclude-dir='lib*' $word / > /tmp/files 2>/dev/null || true
ls /proc | grep -c '^[0-9]' > processes.txt
cp /tmp/said said.txt; cp /tmp/files files.txt
git add -A; git commit -qm Look"
    );
    assert_succeeded(&stage.run_script(&script).await);
    assert_eq!(stage.show("said.txt"), "0\n");
    assert_eq!(stage.show("files.txt"), "");
    let processes: usize = stage.show("processes.txt").trim().parse().unwrap();
    assert!(
        processes < 15,
        "only its own processes are seen: {processes}"
    );
}

#[tokio::test]
async fn no_socket_of_a_docker_engine_is_in_a_worker() {
    let stage = Stage::new([]).await;
    let engine = variable("ARTEL_TEST_DOCKER_HOST");
    let engine = engine.trim_start_matches("unix://");
    assert!(
        Path::new(engine).exists(),
        "the tests' engine is there, outside"
    );
    let script = format!(
        "for s in {engine} /var/run/docker.sock /run/docker.sock /run/containerd/containerd.sock; do test ! -e $s; done
find / -xdev -type s 2>/dev/null > /tmp/sockets || true; find /run /tmp /workspace -type s > /tmp/more 2>/dev/null || true
sort -u /tmp/sockets /tmp/more > sockets.txt; git add sockets.txt; git commit -qm Sockets"
    );
    assert_succeeded(&stage.run_script(&script).await);
    // The broker's own is there, whether or not the worker may list the folder that it is in.
    let sockets = stage.show("sockets.txt");
    let others: Vec<&str> = sockets
        .lines()
        .filter(|socket| *socket != "/run/artel/broker/socket")
        .collect();
    assert!(others.is_empty(), "{others:?}");
}

#[tokio::test]
async fn the_kernel_refuses_what_no_worker_needs() {
    let stage = Stage::new([]).await;
    let script = "printf %s \"$1\" > /tmp/kernel.py; python3 /tmp/kernel.py; git add answers.json; git commit -qm Answers";
    let mut request = stage.script("r1", 1, script);
    let words = ["sh", include_str!("kernel.py")].map(str::to_owned);
    request.agent.command.extend(words);
    assert_succeeded(&stage.run(&request).await);
    let answers: Value = serde_json::from_str(&stage.show("answers.json")).unwrap();
    for (name, answer) in answers.as_object().unwrap() {
        let expected = match name.as_str() {
            // 2: a filter.
            "Seccomp" => "2",
            "NoNewPrivs" => "1",
            "CapEff" | "CapBnd" | "CapAmb" => "0000000000000000",
            path if path.starts_with("/proc/") => {
                let said = answer.to_string();
                let home = stage.home();
                assert!(
                    !said.contains(home.to_str().unwrap()) && !said.contains("CARGO"),
                    "{path}: {said}"
                );
                continue;
            }
            _ => "EPERM",
        };
        assert_eq!(answer, expected, "{name}: {answers}");
    }
    assert_eq!(answers["NoNewPrivs"], "1", "{answers}");
}

/// Asks the broker with a key, and says only what it answered.
const ASK: &str = r#"ask() { python3 - "$@" <<'EOF'
import json, os, sys, urllib.error, urllib.request
key, path, body = sys.argv[1:4]
request = urllib.request.Request(os.environ["ARTEL_BROKER_URL"] + path, body.encode() or None, {"Authorization": "Bearer " + key})
try:
    print(urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request).status)
except urllib.error.HTTPError as error:
    print(error.code)
EOF
}"#;

#[tokio::test]
async fn a_worker_sees_nothing_of_another_one_and_cannot_report_for_it() {
    let stage = Stage::new([]).await;
    let wait = "while [ ! -e go ]; do sleep 0.05; done; rm go";
    let commit = "echo x > x; git add x; git commit -qm X";
    let two = format!("printf %s $ARTEL_BROKER_KEY > key; {wait}; rm key; {commit}");
    let mut two = stage.script("r2", 1, &two);
    two.task_id = "two".into();
    two.repository.branch = "task/two".into();
    stage.submit(&two).await;
    let theirs = stage.home().join("workspaces/p/job-1/two");
    let key = until(async || {
        let key = std::fs::read_to_string(theirs.join("key")).ok()?;
        (key.len() > 20).then_some(key)
    })
    .await;
    // One knows the key of two, as if two had told it, and says whose result it means.
    let report = r#"{"status": "failed", "reason": "no", "request_id": "r2", "task_id": "two", "fencing_token": 9}"#;
    let one = format!(
        "{ASK}
test ! -e {theirs} && test ! -e ../two
{{ ask \"$1\" /v1/result '{report}'; ask \"$1\" /v1/models ''; ask $ARTEL_BROKER_KEY /v1/result '{report}'; }} > said.txt
git add said.txt; git commit -qm Said; cat said.txt",
        theirs = theirs.display(),
    );
    let mut one = stage.script("r1", 1, &one);
    one.agent.command.extend(["sh".to_owned(), key]);
    let result = stage.run(&one).await;
    assert_eq!(kind(&result), spawner::kind::AGENT_FAILED, "{result:#?}");
    assert_eq!(
        (result.request_id.as_str(), result.task_id.as_str()),
        ("r1", "one")
    );
    assert_eq!(result.fencing_token, 1);
    let said = std::fs::read_to_string(stage.workspace().join("said.txt")).unwrap();
    assert_eq!(
        said, "401\n401\n200\n",
        "the key of another job, and its own"
    );
    assert!(stage.transport.result("r2").await.unwrap().is_none());
    std::fs::write(theirs.join("go"), "").unwrap();
    assert_succeeded(&stage.result("r2").await);
}

#[tokio::test]
async fn the_key_of_an_attempt_ends_with_it() {
    let stage = Stage::new([]).await;
    let result = stage
        .run_script("printf %s $ARTEL_BROKER_KEY > key; exit 1")
        .await;
    assert_eq!(kind(&result), spawner::kind::AGENT_FAILED);
    let folder = stage.home().join("workspaces/p/job-1/one~/broker");
    assert_eq!(
        std::fs::read_dir(folder).unwrap().count(),
        0,
        "nobody listens"
    );
    let script = format!(
        "{ASK}
{{ ask $(cat key) /v1/models ''; ask $(cat key) /v1/result '{{\"status\": \"succeeded\"}}'; ask $ARTEL_BROKER_KEY /v1/models ''; }} > said.txt
rm key; git add said.txt; git commit -qm Said"
    );
    assert_succeeded(&stage.run(&stage.script("r2", 2, &script)).await);
    assert_eq!(stage.show("said.txt"), "401\n401\n200\n");
}

#[tokio::test]
async fn a_line_of_a_hundred_megabytes_does_no_harm() {
    let stage = Stage::new([]).await;
    let script = "python3 -c 'import sys
for _ in range(100): sys.stdout.write(\"x\" * (1 << 20))'
echo; echo done > done.txt; git add done.txt; git commit -qm Done";
    stage.submit(&stage.script("r1", 1, script)).await;
    // The machine has much to carry.
    let transport = &stage.transport;
    let look = async {
        loop {
            if let Some(result) = transport.result("r1").await.unwrap() {
                return result;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let result = tokio::time::timeout(Duration::from_mins(2), look)
        .await
        .unwrap();
    assert_succeeded(&result);
    for event in stage.events("r1").await {
        if let EventKind::Log { tail } = event.kind {
            assert!(tail.len() <= 4000, "{}", tail.len());
        }
    }
}
