//! A scripted OpenAI-compatible endpoint and a broker in one server, and a repository to work in.

use axum::Router;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use worker::agent::{Agent, Options};
use worker::broker::{Broker, Report};
use worker::environment::Environment;

/// What the endpoint does when it is asked.
pub enum Reply {
    /// A body with status 200.
    Json(Value),
    /// A status, headers and a body.
    Status(u16, &'static str, &'static str),
    /// Server-sent events, as they are.
    Events(String),
    /// The connection breaks in the middle of the answer.
    Broken,
}

#[derive(Default)]
pub struct Seen {
    /// Bodies of the model requests.
    pub asked: Vec<Value>,
    /// `X-Artel-Thread`, `X-Artel-Role` and `Authorization` of the last one.
    pub headers: Vec<String>,
    pub progress: Vec<Value>,
    pub results: Vec<Value>,
}

#[derive(Clone)]
pub struct Endpoint {
    pub address: String,
    script: Arc<Mutex<VecDeque<Reply>>>,
    seen: Arc<Mutex<Seen>>,
}

/// An answer that runs a command.
pub fn runs(command: &str) -> Reply {
    calls("shell", &json!({"command": command}).to_string())
}

/// An answer that calls a tool.
pub fn calls(tool: &str, arguments: &str) -> Reply {
    Reply::Json(
        json!({"choices": [{"finish_reason": "tool_calls", "message": {
            "role": "assistant", "content": null,
            "tool_calls": [{"id": "c1", "type": "function",
                "function": {"name": tool, "arguments": arguments}}],
        }}]}),
    )
}

/// An answer that is an end.
pub fn says(text: &str) -> Reply {
    Reply::Json(json!({"choices": [{"finish_reason": "stop", "message": {
        "role": "assistant", "content": text,
    }}]}))
}

impl Endpoint {
    pub async fn start(script: impl IntoIterator<Item = Reply>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint = Self {
            address: format!("http://{}", listener.local_addr().unwrap()),
            script: Arc::new(Mutex::new(script.into_iter().collect())),
            seen: Arc::default(),
        };
        let app = Router::new().fallback(answer).with_state(endpoint.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        endpoint
    }

    pub fn push(&self, replies: impl IntoIterator<Item = Reply>) {
        self.script.lock().unwrap().extend(replies);
    }

    pub fn seen(&self) -> std::sync::MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// Contents of the tool outputs in the last model request.
    pub fn outputs(&self) -> Vec<String> {
        let seen = self.seen();
        seen.asked.last().unwrap()["messages"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|message| message["role"] == "tool")
            .map(|message| message["content"].as_str().unwrap().to_owned())
            .collect()
    }
}

async fn answer(State(endpoint): State<Endpoint>, request: Request) -> Response {
    let (parts, body) = request.into_parts();
    let bytes = axum::body::to_bytes(body, 8 << 20).await.unwrap();
    let body: Value = serde_json::from_slice(&bytes).unwrap();
    let header = |name: &str| {
        let value = parts.headers.get(name);
        value.map_or(String::new(), |v| v.to_str().unwrap().to_owned())
    };
    let mut seen = endpoint.seen.lock().unwrap();
    match parts.uri.path() {
        "/v1/progress" => {
            seen.progress.push(body);
            StatusCode::OK.into_response()
        }
        "/v1/result" => {
            assert_eq!(header("authorization"), "Bearer key");
            if !seen.results.is_empty() {
                return (StatusCode::CONFLICT, "already reported").into_response();
            }
            seen.results.push(body);
            StatusCode::OK.into_response()
        }
        "/v1/chat/completions" => {
            seen.headers = ["x-artel-thread", "x-artel-role", "authorization"]
                .map(header)
                .to_vec();
            seen.asked.push(body);
            drop(seen);
            let reply = endpoint.script.lock().unwrap().pop_front();
            match reply.expect("the script has an answer for every request") {
                Reply::Json(body) => axum::Json(body).into_response(),
                Reply::Status(status, retry_after, body) => (
                    StatusCode::from_u16(status).unwrap(),
                    [("retry-after", retry_after)],
                    body,
                )
                    .into_response(),
                Reply::Events(text) => {
                    ([("content-type", "text/event-stream")], text).into_response()
                }
                Reply::Broken => ([("content-length", "1000")], breaks_off()).into_response(),
            }
        }
        other => panic!("nobody should ask for {other}"),
    }
}

/// A body that breaks off after a few bytes.
fn breaks_off() -> axum::body::Body {
    let frames = [
        Ok(bytes::Bytes::from_static(b"{\"cho")),
        Err(std::io::Error::other("the cable was cut")),
    ];
    axum::body::Body::from_stream(futures::stream::iter(frames))
}

/// A repository with one commit, and a task.
pub struct Workspace {
    pub folder: tempfile::TempDir,
}

impl Workspace {
    pub fn new() -> Self {
        let workspace = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        workspace.git(&["init", "-q", "-b", "task/one"]);
        workspace.git(&["config", "user.name", "Test"]);
        workspace.git(&["config", "user.email", "test@example.org"]);
        workspace.git(&["commit", "-q", "--allow-empty", "-m", "base"]);
        std::fs::write(workspace.path().join(".git/info/exclude"), "/.artel/\n").unwrap();
        std::fs::create_dir(workspace.path().join(".artel")).unwrap();
        workspace.task("# Write a file\n");
        workspace
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn task_file(&self) -> PathBuf {
        self.path().join(".artel/TASK.md")
    }

    pub fn task(&self, text: &str) {
        std::fs::write(self.task_file(), text).unwrap();
    }

    pub fn git(&self, args: &[&str]) -> String {
        let output = Command::new("git")
            .arg("-C")
            .arg(self.path())
            .args(args)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn options(&self, endpoint: &Endpoint, attempt: u32) -> Options {
        let environment = Environment {
            task_id: "one".into(),
            attempt,
            broker_url: endpoint.address.clone(),
            broker_key: "key".into(),
            openai_base_url: format!("{}/v1", endpoint.address),
            openai_api_key: "key".into(),
            model: "some-model".into(),
            thread: "job-1/one".into(),
            base_sha: None,
            wall: Duration::from_secs(30),
            idle: Duration::from_secs(5),
            max_steps: 10,
        };
        Options {
            retry_pauses: vec![Duration::from_millis(1); 3],
            ..Options::new(self.path().to_owned(), self.task_file(), environment)
        }
    }

    pub async fn run(&self, endpoint: &Endpoint, attempt: u32) -> Report {
        run(self.options(endpoint, attempt)).await
    }
}

pub async fn run(options: Options) -> Report {
    let broker = Broker::new(&options.environment).unwrap();
    Agent::new(options, broker).run().await
}
