//! Workers' requests in Anthropic's Messages and OpenAI's Responses, against a server that speaks them on the wire.

mod bounds;
mod refusals;
mod streams;
#[path = "../support/mod.rs"]
mod support;

use std::sync::Arc;

use futures::StreamExt;
use models::{ApiKey, Config, EndpointConfig, Provider, Speaks};
use ports::{
    ModelError, Role, Usage, WireAnswer, WireCall, WireError, WireFormat, WirePiece, WorkerModels,
};
use serde_json::{Value, json};
use support::{Book, Reply, Server, config, eventually, json_reply, worker_call};

/// `config` with Anthropic's endpoint on the same server.
fn both(server: &Server) -> Config {
    let mut config = config(&server.base_url);
    let root = server.base_url.trim_end_matches("/v1");
    let mut anthropic = EndpointConfig::new(root, Some(ApiKey::new("sk-ant-canary".to_owned())));
    anthropic.speaks = vec![Speaks::Messages];
    anthropic.model = Some("c".to_owned());
    config.endpoints.insert("anthropic".to_owned(), anthropic);
    config
}

fn provider(config: &Config) -> (Provider, Arc<Book>) {
    let book = Arc::new(Book::default());
    (Provider::new(config, book.clone()).unwrap(), book)
}

fn call(format: WireFormat, body: Value) -> WireCall {
    WireCall {
        call: worker_call("r1", body),
        format,
        headers: vec![("anthropic-version".to_owned(), "2023-06-01".to_owned())],
        beta: false,
    }
}

fn message(stream: bool) -> WireCall {
    let body = json!({"model": "claude-any", "max_tokens": 1000, "stream": stream, "messages": [{"role": "user", "content": "Hi"}]});
    call(WireFormat::Messages, body)
}

fn response(stream: bool) -> WireCall {
    let body = json!({"model": "gpt-any", "stream": stream, "store": false, "input": [{"role": "user", "content": "Hi"}]});
    call(WireFormat::Responses, body)
}

/// Events as both formats have them on the wire.
fn wire(events: &[Value]) -> Vec<String> {
    events
        .iter()
        .map(|event| {
            format!(
                "event: {}\ndata: {event}\n\n",
                event["type"].as_str().unwrap()
            )
        })
        .collect()
}

fn streams(events: &[Value]) -> Reply {
    Reply::Wire {
        pieces: wire(events),
        wait_ms: 1,
        cut: false,
    }
}

fn message_events(text: &str) -> Vec<Value> {
    vec![
        json!({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "content": [],
            "usage": {"input_tokens": 10, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 85, "output_tokens": 1}}}),
        json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}}),
        json!({"type": "ping"}),
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}}),
        json!({"type": "content_block_stop", "index": 0}),
        json!({"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 15}}),
        json!({"type": "message_stop"}),
    ]
}

fn response_events(text: &str) -> Vec<Value> {
    let usage = json!({"input_tokens": 100, "input_tokens_details": {"cached_tokens": 60}, "output_tokens": 20, "total_tokens": 120});
    vec![
        json!({"type": "response.created", "sequence_number": 0, "response": {"id": "resp_1", "status": "in_progress", "usage": null}}),
        json!({"type": "response.output_text.delta", "sequence_number": 1, "item_id": "m", "delta": text}),
        json!({"type": "response.completed", "sequence_number": 2, "response": {"id": "resp_1", "status": "completed",
            "output": [{"type": "message", "content": [{"type": "output_text", "text": text}]}], "usage": usage}}),
    ]
}

/// What the worker gets, what the broker is told last, and the error at the end.
async fn drain(answer: WireAnswer) -> (String, Option<Usage>, Option<WireError>) {
    let WireAnswer::Stream(mut stream) = answer else {
        panic!("not a stream")
    };
    let (mut text, mut used) = (String::new(), None);
    while let Some(piece) = stream.next().await {
        match piece {
            Ok(WirePiece::Events(bytes)) => text.push_str(std::str::from_utf8(&bytes).unwrap()),
            Ok(WirePiece::Used(usage)) => used = Some(usage),
            Err(error) => return (text, used, Some(error)),
        }
    }
    (text, used, None)
}

fn whole(answer: WireAnswer) -> Value {
    match answer {
        WireAnswer::Json(body) => body,
        WireAnswer::Stream(_) => panic!("asked for no stream"),
    }
}

fn only_line(book: &Book) -> Usage {
    let ids = book.ids();
    assert_eq!(ids.len(), 1, "{ids:?}");
    assert!(ids[0].starts_with("r1:native-"), "{ids:?}");
    book.line(&ids[0]).usage
}

async fn refused(provider: &Provider, call: WireCall) -> WireError {
    provider.native(call).await.map(drop).unwrap_err()
}

#[tokio::test]
async fn a_message_goes_through_with_our_key_and_the_jobs_model_and_is_counted() {
    let body = json!({"id": "msg_1", "type": "message", "content": [{"type": "text", "text": "Hello"}], "odd": 1,
        "usage": {"input_tokens": 10, "cache_read_input_tokens": 90, "output_tokens": 5}});
    let server = Server::scripted([json_reply(200, &body)]).await;
    let mut config = both(&server);
    config.prices.insert("c".to_owned(), {
        let mut price = models::Price::new(10.0, 100.0, jiff::civil::date(2026, 5, 1));
        price.cache_read_per_million_usd = Some(1.0);
        price
    });
    let (provider, book) = provider(&config);
    let mut question = message(false);
    question.beta = true;
    question
        .headers
        .push(("anthropic-beta".to_owned(), "some-beta".to_owned()));
    let (answer, usage) = provider.native(question).await.unwrap();
    assert_eq!(whole(answer), body, "untouched");
    assert_eq!((usage.input_tokens, usage.output_tokens), (100, 5));
    let expected = (10.0 * 10.0 + 90.0 + 5.0 * 100.0) / 1e6;
    assert!((usage.cost_usd.unwrap() - expected).abs() < 1e-12);
    assert_eq!(only_line(&book), usage);

    let seen = &server.seen()[0];
    assert_eq!(seen.path, "/v1/messages");
    assert_eq!(seen.query.as_deref(), Some("beta=true"));
    assert_eq!(seen.body["model"], "c");
    assert_eq!(seen.body["max_tokens"], 1000);
    assert_eq!(seen.headers["x-api-key"], "sk-ant-canary");
    assert_eq!(seen.headers["anthropic-version"], "2023-06-01");
    assert_eq!(seen.headers["anthropic-beta"], "some-beta");
    assert!(!seen.headers.contains_key("authorization"));
}

#[tokio::test]
async fn a_response_goes_through_with_our_key_and_the_jobs_model_and_is_counted() {
    let body = json!({"id": "resp_1", "object": "response", "status": "completed", "output": [],
        "usage": {"input_tokens": 100, "input_tokens_details": {"cached_tokens": 60}, "output_tokens": 20}});
    let server = Server::scripted([json_reply(200, &body)]).await;
    let (provider, book) = provider(&config(&server.base_url));
    let (answer, usage) = provider.native(response(false)).await.unwrap();
    assert_eq!(whole(answer), body);
    assert_eq!((usage.input_tokens, usage.output_tokens), (100, 20));
    assert_eq!(only_line(&book), usage);
    let seen = &server.seen()[0];
    assert_eq!(seen.path, "/v1/responses");
    assert_eq!(seen.body["model"], "m");
    assert_eq!(seen.body["store"], false);
    assert_eq!(seen.headers["authorization"], "Bearer sk-canary-key");
}

#[test]
fn the_environment_describes_anthropics_endpoint() {
    let env = |pairs: &'static [(&str, &str)]| {
        Config::from_env(|name| {
            let found = pairs.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        })
    };
    let config = env(&[("ANTHROPIC_API_KEY", "k"), ("ANTHROPIC_MODEL", "c")]);
    let endpoint = &config.endpoints["anthropic"];
    assert_eq!(endpoint.base_url, "https://api.anthropic.com");
    assert_eq!(endpoint.model.as_deref(), Some("c"));
    assert!(endpoint.speaks(Speaks::Messages) && !endpoint.speaks(Speaks::Chat));
    assert_eq!(config.worker_model(Speaks::Messages).as_deref(), Some("c"));
    assert_eq!(config.worker_model(Speaks::Responses), None);
    assert!(!config.is_complete(), "the crew itself still has no model");
    let config = env(&[("ANTHROPIC_BASE_URL", "http://127.0.0.1:1/v1")]);
    assert!(config.endpoints["anthropic"].api_key.is_none());
    assert!(env(&[("OPENAI_API_KEY", "k")]).endpoints.is_empty());
}
