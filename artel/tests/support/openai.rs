//! An OpenAI-compatible server for tests that is scripted by a function: not a tape, and not always well-behaved.

use std::sync::Arc;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

/// What the server does with a request.
pub enum Reply {
    /// Answers with this text.
    Text(String),
    /// Asks for one call of the tool `shell`.
    Shell(String),
    /// Answers with a status, `Retry-After` in seconds if given, and a body.
    Status(u16, Option<u64>, Value),
    /// Begins an answer and drops the connection.
    Drop,
    /// Gives the other reply when this has become at least so much.
    When(watch::Receiver<usize>, usize, Box<Reply>),
}

/// A request as the script sees it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub body: Value,
    /// How many requests came before, of any kind.
    pub count: usize,
}

impl Asked {
    /// The text of all messages.
    pub fn text(&self) -> String {
        self.body["messages"].to_string()
    }

    /// The text of the last message.
    pub fn last(&self) -> String {
        let last = self.body["messages"]
            .as_array()
            .and_then(|messages| messages.last().cloned())
            .unwrap_or_default();
        match &last["content"] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }

    /// How many messages of the assistant are in it: the turn.
    pub fn turn(&self) -> usize {
        let messages = self.body["messages"]
            .as_array()
            .cloned()
            .unwrap_or_default();
        messages
            .iter()
            .filter(|message| message["role"] == "assistant")
            .count()
    }

    /// Whether it comes from a coding agent.
    pub fn is_from_agent(&self) -> bool {
        self.body["tools"]
            .as_array()
            .is_some_and(|tools| !tools.is_empty())
    }
}

type Script = dyn Fn(&Asked) -> Reply + Send + Sync;

#[derive(Clone)]
pub struct OpenAi {
    pub url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
    script: Arc<Script>,
}

pub const KEY: &str = "sk-test-canary-of-the-model-endpoint-1234567890";

impl OpenAi {
    pub async fn start(script: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        Self::start_on("127.0.0.1", script).await
    }

    /// On another address of this machine.
    pub async fn start_on(
        address: &str,
        script: impl Fn(&Asked) -> Reply + Send + Sync + 'static,
    ) -> Self {
        let listener = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
        let url = format!("http://{}/v1", listener.local_addr().unwrap());
        let server = Self {
            url,
            asked: Arc::default(),
            script: Arc::new(script),
        };
        let app = Router::new()
            .route("/v1/chat/completions", post(complete))
            .route(
                "/v1/models",
                get(|| async {
                    axum::Json(
                        json!({"object": "list", "data": [{"id": "scripted", "object": "model"}]}),
                    )
                }),
            )
            .with_state(server.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        server
    }

    /// Everything that was asked.
    pub fn asked(&self) -> Vec<Asked> {
        self.asked.lock().clone()
    }
}

async fn complete(State(server): State<OpenAi>, headers: HeaderMap, body: Bytes) -> Response {
    if headers
        .get("authorization")
        .and_then(|value| value.to_str().ok())
        != Some(&format!("Bearer {KEY}"))
    {
        return (
            StatusCode::UNAUTHORIZED,
            axum::Json(json!({"error": {"message": "no such key"}})),
        )
            .into_response();
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let asked = {
        let mut all = server.asked.lock();
        let asked = Asked {
            body,
            count: all.len(),
        };
        all.push(asked.clone());
        asked
    };
    let stream = asked.body["stream"] == json!(true);
    let usage = json!({"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120});
    let mut reply = (server.script)(&asked);
    while let Reply::When(mut reached, enough, then) = reply {
        let _ = reached.wait_for(|now| *now >= enough).await;
        reply = *then;
    }
    let (message, reason) = match reply {
        Reply::Text(text) => (json!({"role": "assistant", "content": text}), "stop"),
        Reply::Shell(command) => (
            json!({"role": "assistant", "content": null, "tool_calls": [{
                "id": format!("call_{}", asked.count), "type": "function", "index": 0,
                "function": {"name": "shell", "arguments": json!({"command": command}).to_string()},
            }]}),
            "tool_calls",
        ),
        Reply::Status(status, retry_after, body) => {
            let mut response =
                (StatusCode::from_u16(status).unwrap(), axum::Json(body)).into_response();
            if let Some(seconds) = retry_after {
                response.headers_mut().insert("retry-after", seconds.into());
            }
            return response;
        }
        Reply::When(..) => unreachable!("it was waited for"),
        Reply::Drop => {
            let parts: Vec<Result<Bytes, std::io::Error>> = vec![
                Ok(Bytes::from_static(
                    b"data: {\"choices\":[{\"index\":0,\"delta\":{\"content\":\"half\"}}]}\n\n",
                )),
                Err(std::io::Error::other("dropped")),
            ];
            let kind = if stream {
                "text/event-stream"
            } else {
                "application/json"
            };
            return Response::builder()
                .header("content-type", kind)
                .body(Body::from_stream(futures::stream::iter(parts)))
                .unwrap();
        }
    };
    let id = format!("chatcmpl-{}", asked.count);
    if !stream {
        return axum::Json(json!({
            "id": id, "object": "chat.completion", "created": 1, "model": "scripted", "system_fingerprint": null,
            "choices": [{"index": 0, "message": message, "finish_reason": reason, "logprobs": null, "a_field_of_tomorrow": 1}],
            "usage": usage,
        }))
        .into_response();
    }
    // The text in pieces, as real servers send it.
    let mut events = Vec::new();
    let chunk = |delta: Value, reason: Value| {
        json!({"id": id, "object": "chat.completion.chunk", "created": 1, "model": "scripted",
               "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]})
    };
    if let Some(text) = message["content"].as_str() {
        let letters: Vec<char> = text.chars().collect();
        for piece in letters.chunks(40) {
            events.push(chunk(
                json!({"content": piece.iter().collect::<String>()}),
                Value::Null,
            ));
        }
    } else {
        events.push(chunk(
            json!({"tool_calls": message["tool_calls"]}),
            Value::Null,
        ));
    }
    events.push(chunk(json!({}), json!(reason)));
    events.push(json!({"id": id, "object": "chat.completion.chunk", "created": 1, "model": "scripted", "choices": [], "usage": usage}));
    let mut text = String::new();
    for event in &events {
        text.push_str("data: ");
        text.push_str(&event.to_string());
        text.push_str("\n\n");
    }
    text.push_str("data: [DONE]\n\n");
    ([("content-type", "text/event-stream")], text).into_response()
}
