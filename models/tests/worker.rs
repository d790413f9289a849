//! Workers' requests: passed through, metered, within the budget.

mod support;

use std::sync::Arc;

use futures::StreamExt;
use models::{Config, Provider, RoleConfig};
use ports::{Role, WorkerAnswer, WorkerModels};
use serde_json::{Value, json};
use support::{
    Book, Reply, Server, config, delta, drain, error, eventually, finish, json_reply, says, usage,
    worker_body, worker_call,
};

fn provider(config: &Config) -> (Provider, Arc<Book>) {
    let book = Arc::new(Book::default());
    (Provider::new(config, book.clone()).unwrap(), book)
}

fn whole(content: &str) -> Value {
    json!({"id": "1", "odd": 1, "choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10}})
}

#[tokio::test]
async fn a_request_goes_through_with_the_models_name_and_limits_replaced() {
    let server = Server::scripted([json_reply(200, &whole("done"))]).await;
    let mut config = config(&server.base_url);
    let role = RoleConfig {
        max_output_tokens: Some(1000),
        temperature: Some(0.5),
        ..RoleConfig::default()
    };
    config.roles.insert(Role::Developer, role);
    let (provider, book) = provider(&config);

    let mut body = worker_body(2, false);
    body["max_completion_tokens"] = json!(99_999);
    body["parallel_tool_calls"] = json!(false);
    let (answer, cost) = provider
        .complete(worker_call("r1", body.clone()))
        .await
        .unwrap();
    let WorkerAnswer::Json(answer) = answer else {
        panic!("asked for no stream")
    };
    assert_eq!(answer, whole("done"), "untouched");
    assert_eq!((cost.input_tokens, cost.output_tokens), (100, 10));
    let line = book.line("r1:2");
    assert_eq!((line.usage, line.role), (cost, Role::Developer));
    assert_eq!(line.task.unwrap().as_str(), "api");

    let sent = &server.seen()[0].body;
    assert_eq!(sent["model"], "m");
    assert_eq!(sent["max_tokens"], 1000);
    assert!(sent.get("max_completion_tokens").is_none());
    assert_eq!(sent["temperature"], 0.5);
    for name in ["messages", "tools", "tool_choice", "parallel_tool_calls"] {
        assert_eq!(sent[name], body[name], "{name}");
    }
}

#[tokio::test]
async fn a_stream_goes_through_event_by_event_and_is_counted_at_its_end() {
    let call = json!({"choices": [{"index": 0, "delta": {"tool_calls": [{"index": 0, "id": "c", "function":
        {"name": "shell", "arguments": "{}"}}]}, "odd": 1}]})
    .to_string();
    let events = vec![
        call.clone(),
        finish("tool_calls"),
        usage(1000, 20),
        "[DONE]".to_owned(),
    ];
    let server =
        Server::scripted([Reply::Events(events.clone()), Reply::Events(events.clone())]).await;
    let (provider, book) = provider(&config(&server.base_url));

    // Without asking for the usage: the chunk that has no choice stays here, and is counted.
    let request = worker_call("r1", worker_body(0, true));
    let (answer, _) = provider.complete(request).await.unwrap();
    let (data, error) = drain(answer).await;
    assert!(error.is_none());
    assert_eq!(
        data,
        [call.clone(), finish("tool_calls"), "[DONE]".to_owned()]
    );
    assert_eq!(book.line("r1:0").usage.input_tokens, 1000);
    assert_eq!(
        server.seen()[0].body["stream_options"]["include_usage"],
        true
    );

    let mut body = worker_body(1, true);
    body["stream_options"] = json!({"include_usage": true});
    let (answer, _) = provider.complete(worker_call("r1", body)).await.unwrap();
    assert_eq!(drain(answer).await.0, events);
    assert_eq!(book.ids(), ["r1:0", "r1:1"]);
}

#[tokio::test]
async fn a_stream_that_breaks_is_counted_and_ends_in_an_error() {
    for reply in [
        Reply::Cut(vec![delta("half of it")]),
        Reply::Events(vec![delta("half of it")]),
    ] {
        let server = Server::scripted([reply, says("ok", 7, 7)]).await;
        let (provider, book) = provider(&config(&server.base_url));
        let request = worker_call("r1", worker_body(0, true));
        let (answer, _) = provider.complete(request.clone()).await.unwrap();
        let (data, error) = drain(answer).await;
        assert_eq!(data, [delta("half of it")]);
        assert!(error.unwrap().to_failure().retryable);
        assert!(book.line("r1:0").usage.output_tokens > 0);
        // Asking again at the same turn is paid again.
        let (answer, _) = provider.complete(request).await.unwrap();
        assert!(drain(answer).await.1.is_none());
        assert_eq!(book.line("r1:0.2").usage.input_tokens, 7);
    }
}

#[tokio::test]
async fn failures_before_the_first_event_are_tried_again() {
    let broken = json!({"error": {"message": "busy", "code": 503}}).to_string();
    let server = Server::scripted([
        error(500, "oops"),
        Reply::Cut(vec![]),
        Reply::Events(vec![broken]),
        says("ok", 1, 1),
    ])
    .await;
    let (provider, book) = provider(&config(&server.base_url));
    let request = worker_call("r1", worker_body(0, true));
    let (answer, _) = provider.complete(request).await.unwrap();
    assert!(drain(answer).await.1.is_none());
    assert_eq!(book.ids(), ["r1:0"]);
    assert_eq!(server.count(), 4);
}

#[tokio::test]
async fn a_worker_that_goes_away_is_counted_for_what_came() {
    let many: Vec<_> = (0..2000).map(|_| delta("word ")).collect();
    let server = Server::scripted([Reply::Events(many)]).await;
    let (provider, book) = provider(&config(&server.base_url));
    let request = worker_call("r1", worker_body(0, true));
    let (answer, _) = provider.complete(request).await.unwrap();
    let WorkerAnswer::Stream(mut stream) = answer else {
        panic!("not a stream")
    };
    stream.next().await.unwrap().unwrap();
    drop(stream);
    eventually("the ledger has the line", || {
        book.ids() == ["r1:0".to_owned()]
    })
    .await;
    let written = book.line("r1:0").usage.output_tokens;
    assert!(written > 0 && written < 2000, "{written}");
}

#[tokio::test]
async fn a_server_without_streams_answers_a_worker_that_wants_one() {
    let server = Server::scripted([json_reply(200, &whole("done")), says("streamed", 3, 3)]).await;
    let (provider, _) = provider(&config(&server.base_url));
    let request = worker_call("r1", worker_body(0, true));
    let (answer, cost) = provider.complete(request).await.unwrap();
    let (data, error) = drain(answer).await;
    assert!(error.is_none() && data.last().unwrap() == "[DONE]");
    assert!(data[0].contains("done"), "{data:?}");
    assert_eq!(cost.input_tokens, 100);

    // And one that streams unasked answers a worker that wants a document.
    let request = worker_call("r1", worker_body(1, false));
    let (answer, cost) = provider.complete(request).await.unwrap();
    let WorkerAnswer::Json(body) = answer else {
        panic!("asked for no stream")
    };
    assert_eq!(body["choices"][0]["message"]["content"], "streamed");
    assert_eq!(cost.output_tokens, 3);
}

#[tokio::test]
async fn what_is_no_request_is_refused_without_asking() {
    let server = Server::scripted([]).await;
    let (provider, _) = provider(&config(&server.base_url));
    let answer = provider.complete(worker_call("r1", json!("x"))).await;
    let text = answer.err().unwrap().to_string();
    assert!(text.contains("not a JSON object"), "{text}");
    assert_eq!(server.count(), 0);
}
