//! A scripted OpenAI-compatible server on the wire, and a ledger in memory.
#![allow(dead_code, missing_docs)]

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Response, Uri};
use futures::StreamExt;
use models::{ApiKey, Config, EndpointConfig, ModelChoice, RoleConfig};
use ports::{
    Failure, JobId, Ledger, Message, ModelCall, ProjectId, RequestId, Role, Speaker, Spend, Spent,
    TaskId, WorkerAnswer, WorkerCall,
};
use serde_json::{Value, json};

/// What the server does with one request.
#[derive(Clone, Debug)]
pub enum Reply {
    /// A whole answer.
    Whole {
        status: u16,
        headers: Vec<(&'static str, String)>,
        body: String,
    },
    /// Events, then a proper end.
    Events(Vec<String>),
    /// Events, then the connection is cut.
    Cut(Vec<String>),
    /// A stream as it is on the wire, piece by piece, each so many milliseconds after the other; then a proper end, or a cut.
    Wire {
        pieces: Vec<String>,
        wait_ms: u64,
        cut: bool,
    },
    /// Nothing, for a long time.
    Hang,
}

pub fn error(status: u16, message: &str) -> Reply {
    json_reply(status, &json!({"error": {"message": message}}))
}

pub fn json_reply(status: u16, body: &Value) -> Reply {
    Reply::Whole {
        status,
        headers: vec![("content-type", "application/json".to_owned())],
        body: body.to_string(),
    }
}

pub fn with_header(reply: Reply, name: &'static str, value: &str) -> Reply {
    match reply {
        Reply::Whole {
            status,
            mut headers,
            body,
        } => {
            headers.push((name, value.to_owned()));
            Reply::Whole {
                status,
                headers,
                body,
            }
        }
        other => other,
    }
}

pub fn delta(text: &str) -> String {
    json!({"id": "x", "choices": [{"index": 0, "delta": {"content": text}}]}).to_string()
}

pub fn finish(reason: &str) -> String {
    json!({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}).to_string()
}

pub fn usage(input: u64, output: u64) -> String {
    json!({"choices": [], "usage": {"prompt_tokens": input, "completion_tokens": output}})
        .to_string()
}

/// A proper stream with one text.
pub fn says(text: &str, input: u64, output: u64) -> Reply {
    Reply::Events(vec![
        delta(text),
        finish("stop"),
        usage(input, output),
        "[DONE]".to_owned(),
    ])
}

/// One request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub query: Option<String>,
    pub headers: HeaderMap,
    pub body: Value,
}

type Script = Box<dyn FnMut(&Seen) -> Reply + Send>;

#[derive(Clone)]
pub struct Server {
    pub base_url: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

#[derive(Clone)]
struct Stage {
    script: Arc<Mutex<Script>>,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Server {
    /// Answers with these, in this order, and with 500 afterwards.
    pub async fn scripted(replies: impl IntoIterator<Item = Reply>) -> Self {
        let mut replies: VecDeque<_> = replies.into_iter().collect();
        Self::with(move |_| {
            replies
                .pop_front()
                .unwrap_or_else(|| error(500, "the script is over"))
        })
        .await
    }

    pub async fn with(script: impl FnMut(&Seen) -> Reply + Send + 'static) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
        let seen = Arc::new(Mutex::default());
        let stage = Stage {
            script: Arc::new(Mutex::new(Box::new(script))),
            seen: Arc::clone(&seen),
        };
        let app = axum::Router::new().fallback(answer).with_state(stage);
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self { base_url, seen }
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }
}

async fn answer(
    State(stage): State<Stage>,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let seen = Seen {
        path: uri.path().to_owned(),
        query: uri.query().map(str::to_owned),
        headers,
        body: serde_json::from_slice(&body).unwrap_or(Value::Null),
    };
    stage.seen.lock().unwrap().push(seen.clone());
    let reply = (stage.script.lock().unwrap())(&seen);
    let wire = |pieces: Vec<String>, wait_ms: u64, cut: bool| {
        let mut pieces: Vec<std::io::Result<String>> = pieces.into_iter().map(Ok).collect();
        if cut {
            pieces.push(Err(std::io::Error::other("cut")));
        }
        // Each piece for itself, so that what came before the cut is sent.
        let pieces = futures::stream::iter(pieces).then(move |piece| async move {
            tokio::time::sleep(Duration::from_millis(wait_ms)).await;
            piece
        });
        Response::builder()
            .header("content-type", "text/event-stream")
            .body(Body::from_stream(pieces))
            .unwrap()
    };
    let events = |events: Vec<String>, cut: bool| {
        let pieces = events.into_iter();
        wire(
            pieces.map(|data| format!("data: {data}\n\n")).collect(),
            2,
            cut,
        )
    };
    match reply {
        Reply::Wire {
            pieces,
            wait_ms,
            cut,
        } => wire(pieces, wait_ms, cut),
        Reply::Whole {
            status,
            headers,
            body,
        } => {
            let mut response = Response::builder().status(status);
            for (name, value) in headers {
                response = response.header(name, value);
            }
            response.body(Body::from(body)).unwrap()
        }
        Reply::Events(data) => events(data, false),
        Reply::Cut(data) => events(data, true),
        Reply::Hang => {
            tokio::time::sleep(Duration::from_mins(1)).await;
            Response::new(Body::empty())
        }
    }
}

/// A ledger in memory, with limits that a test may raise.
#[derive(Default)]
pub struct Book {
    pub lines: Mutex<BTreeMap<String, Spend>>,
    pub writes: Mutex<Vec<String>>,
    pub limits: Mutex<(Option<f64>, Option<u64>)>,
    /// Fails this many writes.
    pub failing: Mutex<u32>,
}

impl Book {
    pub fn ids(&self) -> Vec<String> {
        self.lines.lock().unwrap().keys().cloned().collect()
    }

    pub fn line(&self, id: &str) -> Spend {
        self.lines.lock().unwrap()[id].clone()
    }

    pub fn total(&self) -> (f64, u64) {
        let lines = self.lines.lock().unwrap();
        lines.values().fold((0.0, 0), |(cost, tokens), line| {
            let usage = line.usage;
            (
                cost + usage.cost_usd.unwrap_or(0.0),
                tokens + usage.input_tokens + usage.output_tokens,
            )
        })
    }
}

#[async_trait]
impl Ledger for Book {
    async fn spent(&self, _: &ProjectId) -> ports::Result<Spent> {
        let (cost_usd, tokens) = self.total();
        let (limit_usd, limit_tokens) = *self.limits.lock().unwrap();
        Ok(Spent {
            cost_usd,
            tokens,
            limit_usd,
            limit_tokens,
        })
    }

    async fn record(&self, spend: &Spend) -> ports::Result<()> {
        let mut failing = self.failing.lock().unwrap();
        if *failing > 0 {
            *failing -= 1;
            return Err(Failure::new("disk_full", "the disk is full").retryable());
        }
        self.writes.lock().unwrap().push(spend.id.clone());
        let mut lines = self.lines.lock().unwrap();
        lines
            .entry(spend.id.clone())
            .or_insert_with(|| spend.clone());
        Ok(())
    }
}

/// Installs TLS and configures one endpoint with the model `m`, a priced one, and short waits.
pub fn config(base_url: &str) -> Config {
    install_tls();
    let mut config = Config::single(base_url, Some("sk-canary-key".to_owned()), "m");
    config.retry.first_wait_ms = 1;
    config.retry.max_wait_s = 2;
    config.timeouts.total_s = 20;
    config.prices.insert(
        "m".to_owned(),
        models::Price::new(10.0, 100.0, jiff::civil::date(2026, 5, 1)),
    );
    config
}

pub fn install_tls() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

pub fn key(text: &str) -> ApiKey {
    ApiKey::new(text.to_owned())
}

pub fn project() -> ProjectId {
    ProjectId::founded_by("test")
}

pub fn call(key: &str, text: &str) -> ModelCall {
    ModelCall {
        role: Role::Architect,
        project: project(),
        job: Some(JobId::new("job-1")),
        task: None,
        thread: "job-1".to_owned(),
        turn: 0,
        key: key.to_owned(),
        messages: vec![
            message(Speaker::System, "Plan."),
            message(Speaker::User, text),
        ],
        schema: None,
    }
}

pub fn message(speaker: Speaker, text: &str) -> Message {
    Message {
        speaker,
        text: text.to_owned(),
    }
}

pub fn worker_call(request: &str, body: Value) -> WorkerCall {
    WorkerCall {
        request: RequestId::new(request),
        project: project(),
        job: JobId::new("job-1"),
        task: TaskId::new("api"),
        thread: "job-1/api".to_owned(),
        body,
        most_output: None,
    }
}

/// The body of a worker's request at a turn.
pub fn worker_body(turn: usize, stream: bool) -> Value {
    let mut messages = vec![json!({"role": "user", "content": "Do it."})];
    for n in 0..turn {
        messages.push(json!({"role": "assistant", "content": null, "tool_calls": [{"id": format!("c{n}"), "type": "function",
            "function": {"name": "shell", "arguments": "{\"command\":\"ls\"}"}}]}));
        messages.push(json!({"role": "tool", "tool_call_id": format!("c{n}"), "content": "ok"}));
    }
    let mut body = json!({"model": "whatever", "messages": messages, "tools": [{"type": "function",
        "function": {"name": "shell", "parameters": {"type": "object"}}}], "tool_choice": "auto"});
    if stream {
        body["stream"] = json!(true);
    }
    body
}

/// The data of every event of a stream, and the error that ended it.
pub async fn drain(answer: WorkerAnswer) -> (Vec<String>, Option<ports::ModelError>) {
    let WorkerAnswer::Stream(mut stream) = answer else {
        panic!("not a stream");
    };
    let mut text = String::new();
    while let Some(piece) = stream.next().await {
        match piece {
            Ok(bytes) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
            Err(error) => return (events(&text), Some(error)),
        }
    }
    (events(&text), None)
}

fn events(text: &str) -> Vec<String> {
    text.split("\n\n")
        .filter_map(|event| event.strip_prefix("data: "))
        .map(str::to_owned)
        .collect()
}

/// Waits for something that happens in the background, at most five seconds.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("did not happen within 5 s: {what}");
}

/// Has the architect ask the model `m` first, and then this one of another server.
pub fn then_ask(config: &mut Config, other: &Server, model: &str) {
    let backup = EndpointConfig::new(&other.base_url, None);
    config.endpoints.insert("backup".to_owned(), backup);
    let chain = RoleConfig {
        models: vec![
            ModelChoice::Name("m".to_owned()),
            ModelChoice::At {
                endpoint: "backup".to_owned(),
                model: model.to_owned(),
            },
        ],
        ..RoleConfig::default()
    };
    config.roles.insert(Role::Architect, chain);
}
