//! The main job with a model that is no tape: an OpenAI-compatible server that streams, calls tools, answers prose where JSON
//! was asked for, limits the rate and drops a connection, for a project that no tape has heard of.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use support::openai::{Asked, KEY, OpenAi, Reply};
use support::{Home, get};

const APP: &str = r#"
import json, os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from counter import Counter

COUNTER = Counter()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"count": COUNTER.next() if self.path == "/count" else COUNTER.value}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

if __name__ == "__main__":
    ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Handler).serve_forever()
"#;

/// What the model answers: by the form that is asked for, and for coding agents by the task and the turn.
fn script(asked: &Asked, brainstorms: &AtomicUsize, drops: &AtomicUsize) -> Reply {
    if asked.is_from_agent() {
        return developer(asked);
    }
    let wanted = asked.text();
    if wanted.contains("BrainstormTurn")
        || asked.body["response_format"]["json_schema"]["name"] == "BrainstormTurn"
    {
        return match brainstorms.fetch_add(1, Ordering::SeqCst) {
            0 => Reply::Status(429, Some(1), json!({"error": {"message": "slow down"}})),
            1 => Reply::Text("Sure! I would build a lovely counter for you.".to_owned()),
            _ => Reply::Text(
                "Here it is:\n```json\n".to_owned()
                    + &json!({"turn": "propose_project", "spec": {
                        "name": "Visit Counter", "goal": "Counts visits.", "features": ["Count visits"],
                        "acceptance": [
                            {"name": "it counts", "type": "http", "path": "/count", "expect": {"status": 200, "body_contains": ["count"]}},
                            {"name": "its tests pass", "type": "command", "argv": ["python3", "-m", "unittest", "-q"]},
                        ],
                    }})
                    .to_string()
                    + "\n```\nShall I go on?",
            ),
        };
    }
    match asked.body["response_format"]["json_schema"]["name"]
        .as_str()
        .unwrap_or_default()
    {
        "Architecture" => {
            if drops.fetch_add(1, Ordering::SeqCst) == 0 {
                return Reply::Drop;
            }
            Reply::Text(
                json!({
                    "overview": "app.py serves what counter.py counts.",
                    "manifest": {"checks": "python3 -m unittest -q", "service": {"command": ["python3", "app.py"], "health": "/"}},
                    "readme": "# Visit Counter\n", "agents_md": "Standard library only.\n",
                    "tasks": [
                        {"id": "counter", "title": "Count", "description": "TASK-COUNTER: write counter.py with a class Counter.", "acceptance": ["next() counts up"]},
                        {"id": "web", "title": "Serve", "description": "TASK-WEB: write app.py.", "acceptance": ["GET /count answers JSON"], "depends_on": ["counter"]},
                    ],
                })
                .to_string(),
            )
        }
        "Verdict" => Reply::Text(json!({"verdict": "approve", "comments": []}).to_string()),
        other => Reply::Status(
            400,
            None,
            json!({"error": {"message": format!("what is {other}?")}}),
        ),
    }
}

fn developer(asked: &Asked) -> Reply {
    let counter = asked.text().contains("TASK-COUNTER");
    match asked.turn() {
        0 if counter => Reply::Shell(
            "cat > counter.py <<'EOF'\nclass Counter:\n    def __init__(self):\n        self.value = 0\n\n    def next(self):\n        self.value += 1\n        return self.value\nEOF\n\
             cat > test_counter.py <<'EOF'\nimport unittest\nfrom counter import Counter\n\nclass Test(unittest.TestCase):\n    def test_it_counts(self):\n        self.assertEqual(Counter().next(), 1)\nEOF\n\
             python3 -m unittest -q; env; cat /proc/1/environ; ls -la / /root 2>&1"
                .to_owned(),
        ),
        0 => Reply::Shell(format!("cat > app.py <<'EOF'\n{APP}EOF\n")),
        1 => Reply::Shell("git add -A && git commit -q -m 'Do the task' && git log --oneline".to_owned()),
        _ => Reply::Text("Done, with a test.".to_owned()),
    }
}

#[tokio::test]
async fn a_project_that_no_tape_has_heard_of_is_built_with_a_model() {
    let (brainstorms, drops) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let server = OpenAi::start(move |asked| script(asked, &brainstorms, &drops)).await;
    let mut home = Home::new();
    home.set("OPENAI_BASE_URL", &server.url);
    home.set("OPENAI_API_KEY", KEY);
    home.set("ARTEL_MODEL", "scripted");

    let ran = home
        .run(&["new", "Count the visits of my page", "--yes", "--json"])
        .await
        .success();
    let end = ran.end();
    assert_eq!(end["event"], "end");
    assert_eq!(end["status"], "deployed", "{end}");
    let url = end["url"].as_str().unwrap();
    let (status, body) = get(&format!("{}/count", url.trim_end_matches('/'))).await;
    assert!(status == 200 && body.contains("count"), "{body}");

    // Every line is an event as documented.
    for line in &ran.json()[..ran.json().len() - 1] {
        for field in ["at", "project", "job", "task", "seq", "event", "data"] {
            assert!(line.get(field).is_some(), "{field} in {line}");
        }
    }

    // The malformed answer was sent back with what was wrong; rate limit and dropped connection were got over.
    let asked = server.asked();
    assert!(
        asked
            .iter()
            .any(|asked| !asked.is_from_agent() && asked.text().contains("lovely counter")),
        "the repair shows what was said"
    );
    assert!(
        asked.iter().any(|asked| asked.body["stream"] == true),
        "the crew streams"
    );

    // Nothing that a worker could see or that was written down holds the key.
    let agents: String = asked
        .iter()
        .filter(|asked| asked.is_from_agent())
        .map(Asked::text)
        .collect();
    assert!(!agents.contains(KEY), "a worker saw the key of the model");
    assert!(
        agents.contains("ARTEL_TASK_ID=") && agents.contains("WORKSPACE")
            || agents.contains("PWD=/workspace"),
        "the worker did look"
    );
    let found = std::process::Command::new("grep")
        .args(["-rlF", KEY])
        .arg(home.path())
        .output()
        .unwrap();
    assert!(
        found.stdout.is_empty(),
        "the key was written to {}",
        String::from_utf8_lossy(&found.stdout)
    );

    // The ledger counted what was used.
    let report = home.status("visit-counter").await;
    assert!(
        report["project"]["tokens"].as_u64().unwrap() >= 120 * 8,
        "{report}"
    );
    home.run(&["remove", "visit-counter", "--yes"])
        .await
        .success();
}

#[tokio::test]
async fn a_model_that_only_answers_prose_ends_in_one_clear_sentence() {
    let server = OpenAi::start(|_| Reply::Text("I am a poet, not a planner.".to_owned())).await;
    let mut home = Home::new();
    home.set("OPENAI_BASE_URL", &server.url);
    home.set("OPENAI_API_KEY", KEY);
    home.set("ARTEL_MODEL", "scripted");
    let ran = home.run(&["new", "Something", "--yes", "--json"]).await;
    assert!(ran.code == 1 || ran.code == 3, "{ran:#?}");
    let asked = server.asked().len();
    assert!(
        (3..=9).contains(&asked),
        "asked {asked} times: once and two repairs, with a bounded number of retries"
    );
}

#[tokio::test]
async fn without_an_endpoint_that_answers_the_end_says_where_and_what_to_do() {
    let mut home = Home::new();
    home.set("OPENAI_BASE_URL", "http://127.0.0.1:9/v1");
    home.set("ARTEL_MODEL", "none");
    let ran = home.run(&["new", "Something", "--yes", "--json"]).await;
    assert!(ran.code == 1 || ran.code == 3, "{ran:#?}");
    assert!(ran.stdout.contains("127.0.0.1:9"), "{ran:#?}");
}
