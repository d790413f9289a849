//! Agents that speak Anthropic's Messages or OpenAI's Responses.
#![allow(
    clippy::result_large_err,
    clippy::unnecessary_wraps,
    reason = "what the double answers is what the port answers"
)]

use super::*;
use futures::StreamExt as _;
use futures::stream;
use ports::WirePiece;

const MESSAGE: &str =
    r#"{"model": "x", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}"#;
const RESPONSE: &str = r#"{"model": "x", "input": [{"role": "user", "content": "hi"}]}"#;

fn used(input_tokens: u64, output_tokens: u64) -> ports::Usage {
    ports::Usage {
        input_tokens,
        output_tokens,
        cost_usd: Some(0.5),
    }
}

fn unavailable(status: u16, retryable: bool) -> ModelError {
    ModelError::Unavailable {
        endpoint: "https://models.example".to_owned(),
        message: "it said no".to_owned(),
        status: Some(status),
        retryable,
    }
}

fn pieces(pieces: Vec<Result<WirePiece, WireError>>) -> Turn {
    let stream = stream::iter(pieces).boxed();
    Ok((WireAnswer::Stream(stream), ports::Usage::default()))
}

async fn stage(
    turns: impl IntoIterator<Item = Turn>,
) -> (tempfile::TempDir, Arc<Scripted>, Broker) {
    let folder = tempfile::tempdir().unwrap();
    let models = Arc::<Scripted>::default();
    models.turns.lock().unwrap().extend(turns);
    let resolver = resolver(|_| Vec::new(), |_| None);
    let broker = broker_with(folder.path(), &models, resolver).await;
    (folder, models, broker)
}

#[tokio::test]
async fn each_format_is_passed_on_with_its_own_headers_and_counted() {
    let answer = json!({"content": []});
    let turn = |usage| Ok((WireAnswer::Json(answer.clone()), usage));
    let turns = [turn(used(100, 10)), turn(used(0, 0)), turn(used(50, 5))];
    let (_folder, models, broker) = stage(turns).await;
    for (path, body) in [
        ("/v1/messages?beta=true", MESSAGE),
        ("/v1/messages/count_tokens", MESSAGE),
        ("/v1/responses", RESPONSE),
    ] {
        let (status, _, body) = post(&broker, path, broker.key(), body).await;
        assert_eq!((status, body), (200, answer.to_string()), "{path}");
    }
    let usage = broker.usage();
    assert_eq!((usage.input_tokens, usage.output_tokens), (150, 15));
    assert_eq!(usage.cost_usd, Some(1.0), "counting tokens is free");
    let calls = models.calls.lock().unwrap();
    let formats: Vec<_> = calls.iter().map(|call| (call.format, call.beta)).collect();
    assert_eq!(
        formats,
        [
            (WireFormat::Messages, true),
            (WireFormat::CountTokens, false),
            (WireFormat::Responses, false)
        ]
    );
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    assert_eq!(
        calls[0].headers,
        [
            header("anthropic-beta", "b1"),
            header("anthropic-version", "2023-06-01")
        ],
        "neither the key nor a cookie"
    );
    assert_eq!(calls[0].call.thread, "job/task-r");
    assert_eq!(calls[0].call.body["max_tokens"], 10);
}

#[tokio::test]
async fn what_is_wrong_is_said_in_the_form_that_the_client_reads() {
    let no_endpoint = ModelError::NoEndpoint {
        format: "Anthropic's Messages",
        advice: "set ANTHROPIC_API_KEY".to_owned(),
    };
    let words = json!({"type": "error", "error": {"type": "rate_limit_error", "message": "later"}});
    let turns = [
        Err(no_endpoint.into()),
        Err(WireError {
            error: unavailable(429, true),
            body: Some(words.clone()),
            retry_after_s: Some(77),
        }),
        Err(unavailable(503, true).into()),
        Err(unavailable(401, false).into()),
    ];
    let (_folder, models, broker) = stage(turns).await;
    let key = broker.key();
    let (status, head, body) = post(&broker, "/v1/messages", key, MESSAGE).await;
    let said: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(status, 403);
    assert_eq!(said["error"]["type"], "permission_error");
    assert!(body.contains("set ANTHROPIC_API_KEY"), "{body}");
    assert!(head.contains("x-should-retry: false"), "{head}");
    assert_eq!(broker.model_trouble().unwrap().0, crate::kind::NO_MODEL);

    let (status, head, body) = post(&broker, "/v1/messages", key, MESSAGE).await;
    assert_eq!((status, body), (429, words.to_string()), "its own words");
    assert!(
        head.contains("retry-after: 77") && !head.contains("x-should-retry"),
        "{head}"
    );

    let (status, head, body) = post(&broker, "/v1/responses", key, RESPONSE).await;
    let said: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(
        (status, &said["error"]["code"]),
        (502, &json!("model_unavailable"))
    );
    assert!(head.contains("x-should-retry: false"), "{head}");
    assert_eq!(
        broker.model_trouble().unwrap().0,
        crate::kind::MODEL_UNAVAILABLE
    );
    let (status, _, _) = post(&broker, "/v1/responses", key, RESPONSE).await;
    assert_eq!(status, 401);

    // What does not get as far as the model.
    let image = r#"{"messages": [{"content": [{"type": "image", "source": {"type": "url", "url": "https://evil.example/x"}}]}]}"#;
    let large = format!("{{\"messages\": [\"{}\"]}}", "x".repeat(MAX_MODEL_BYTES));
    for (method, path, sent, status, kind) in [
        (
            "POST",
            "/v1/messages",
            "hello",
            400,
            "invalid_request_error",
        ),
        ("POST", "/v1/messages", "{}", 400, "invalid_request_error"),
        ("POST", "/v1/messages", image, 400, "invalid_request_error"),
        (
            "POST",
            "/v1/messages",
            large.as_str(),
            413,
            "request_too_large",
        ),
        ("POST", "/v1/messages/batches", "{}", 404, "not_found_error"),
        ("GET", "/v1/messages", "", 405, "invalid_request_error"),
        ("POST", "/v1/responses", "{}", 400, "invalid_request_error"),
        ("GET", "/v1/responses", "", 405, "method"),
    ] {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nAuthorization: Bearer {key}\r\nContent-Length: {}\r\n\r\n{sent}",
            sent.len()
        );
        let (seen, _, body) = exchange(broker.socket(), &request).await;
        assert_eq!(seen, status, "{method} {path}: {body}");
        let said: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(said["error"]["type"], kind, "{method} {path}: {body}");
        assert_eq!(
            said["type"] == "error",
            path.starts_with("/v1/messages"),
            "{body}"
        );
    }
    assert_eq!(models.calls.lock().unwrap().len(), 4);
    assert_eq!(broker.usage().input_tokens, 0);
}

#[tokio::test]
async fn the_budget_of_a_job_holds_in_every_format() {
    let spent = Ok((WireAnswer::Json(json!({})), used(9_000, 999)));
    let (_folder, models, broker) = stage([spent]).await;
    let (status, _, _) = post(&broker, "/v1/responses", broker.key(), RESPONSE).await;
    assert_eq!(status, 200);
    for (path, body, kind) in [
        ("/v1/messages", MESSAGE, "billing_error"),
        ("/v1/responses", RESPONSE, "budget"),
    ] {
        let (status, _, body) = post(&broker, path, broker.key(), body).await;
        let said: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &said["error"]["type"]), (402, &json!(kind)));
        assert!(body.contains("10000 tokens"), "{body}");
    }
    assert_eq!(models.calls.lock().unwrap().len(), 1, "nothing was asked");
    assert_eq!(broker.model_trouble().unwrap().0, crate::kind::BUDGET);
}

#[tokio::test]
async fn a_stream_passes_and_its_break_is_said_in_its_own_format() {
    let event = |text: &str| Ok(WirePiece::Events(Bytes::from(text.to_owned())));
    let turns = [
        pieces(vec![
            event("event: a\ndata: {}\n\n"),
            Ok(WirePiece::Used(used(1, 1))),
            Ok(WirePiece::Used(used(100, 10))),
            event("event: message_stop\ndata: {}\n\n"),
        ]),
        pieces(vec![
            event("event: a\ndata: {}\n\n"),
            Ok(WirePiece::Used(used(20, 2))),
            Err(unavailable(500, true).into()),
        ]),
        pieces(vec![
            event("event: a\ndata: {}\n\n"),
            Err(unavailable(500, true).into()),
        ]),
    ];
    let (_folder, _, broker) = stage(turns).await;
    let key = broker.key();
    let (status, head, body) = post(&broker, "/v1/messages", key, MESSAGE).await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: text/event-stream"), "{head}");
    assert!(
        body.contains("event: a") && body.contains("message_stop"),
        "{body}"
    );
    assert!(broker.model_trouble().is_none());

    let (_, _, body) = post(&broker, "/v1/messages", key, MESSAGE).await;
    assert!(body.contains("event: error\ndata: {"), "{body}");
    assert!(
        body.contains("api_error") && body.contains("it said no"),
        "{body}"
    );
    assert_eq!(
        broker.model_trouble().unwrap().0,
        crate::kind::MODEL_UNAVAILABLE
    );

    let before = broker.usage().input_tokens;
    assert_eq!(before, 120);
    let (_, _, body) = post(&broker, "/v1/responses", key, RESPONSE).await;
    assert!(body.contains("event: response.failed\ndata: {"), "{body}");
    assert!(
        body.contains("server_error") && body.contains("it said no"),
        "{body}"
    );
    assert!(
        broker.usage().input_tokens > before,
        "what nobody counted is estimated"
    );
}

#[tokio::test]
async fn a_stream_that_is_cut_for_the_budget_says_so_in_its_own_format() {
    let too_long = || ModelError::TooLong {
        endpoint: "https://models.example".to_owned(),
        limit: 700,
    };
    let event = || {
        Ok(WirePiece::Events(Bytes::from_static(
            b"event: a\ndata: {}\n\n",
        )))
    };
    let turn = || {
        pieces(vec![
            event(),
            Ok(WirePiece::Used(used(20, 900))),
            Err(too_long().into()),
        ])
    };
    let (_folder, models, broker) = stage([turn(), turn()]).await;
    let chat = vec![Ok(Bytes::from_static(b"data: {}\n\n")), Err(too_long())];
    models.chat.lock().unwrap().push_back(chat);
    let asked = r#"{"stream": true, "messages": [{"role": "user", "content": "hi"}]}"#;
    for (path, body, said) in [
        ("/v1/messages", MESSAGE, r#""type":"billing_error""#),
        ("/v1/responses", RESPONSE, r#""code":"insufficient_quota""#),
        (
            "/v1/chat/completions",
            asked,
            r#"data: {"error":{"code":"budget""#,
        ),
    ] {
        let (status, _, body) = post(&broker, path, broker.key(), body).await;
        assert_eq!(status, 200, "{path}");
        assert!(
            body.contains(said) && body.contains("limit of 700 tokens"),
            "{path}: {body}"
        );
        // A connection that is closed properly ends with this.
        assert!(body.ends_with("0\r\n\r\n"), "{path}: {body}");
        assert_eq!(
            broker.model_trouble().unwrap().0,
            crate::kind::BUDGET,
            "{path}"
        );
    }
    assert_eq!(
        broker.usage().output_tokens,
        900 + 900 + 700,
        "what was set aside is counted where nothing is told"
    );
}

#[tokio::test]
async fn a_stream_is_counted_whether_its_worker_asked_for_the_usage_or_not() {
    let (_folder, models, broker) = stage([]).await;
    for (asked, options) in [
        (false, ""),
        (true, r#""stream_options": {"include_usage": true},"#),
    ] {
        let before = broker.usage();
        let chat = [
            r#"{"choices": [{"delta": {"content": "hello"}}]}"#,
            r#"{"choices": [], "usage": {"prompt_tokens": 200, "completion_tokens": 300}}"#,
            "[DONE]",
        ];
        let chat = chat.map(|data| Ok(Bytes::from(format!("data: {data}\n\n"))));
        models.chat.lock().unwrap().push_back(chat.into());
        let body = format!(
            r#"{{"stream": true, {options} "messages": [{{"role": "user", "content": "hi"}}]}}"#
        );
        let (status, _, body) = post(&broker, "/v1/chat/completions", broker.key(), &body).await;
        assert_eq!(status, 200, "{body}");
        assert!(body.contains("hello") && body.contains("[DONE]"), "{body}");
        assert_eq!(body.contains("prompt_tokens"), asked, "{body}");
        let now = broker.usage();
        let (read, written) = (
            now.input_tokens - before.input_tokens,
            now.output_tokens - before.output_tokens,
        );
        assert_eq!((read, written), (200, 300));
    }
}

#[tokio::test]
async fn a_stream_that_runs_when_the_job_ends_is_ended_and_counted() {
    let first = vec![
        Ok(WirePiece::Used(used(100, 10))),
        Ok(WirePiece::Events(Bytes::from_static(
            b"event: a\ndata: {}\n\n",
        ))),
    ];
    let endless = stream::iter(first).chain(stream::pending()).boxed();
    let turn = Ok((WireAnswer::Stream(endless), ports::Usage::default()));
    let (folder, _, broker) = stage([turn]).await;
    let request = format!(
        "POST /v1/messages HTTP/1.1\r\nHost: b\r\nx-api-key: {}\r\nContent-Length: {}\r\n\r\n{MESSAGE}",
        broker.key(),
        MESSAGE.len()
    );
    let mut answer = ask(&broker, request).await;
    let mut line = String::new();
    while !line.starts_with("event: a") {
        line.clear();
        assert!(
            answer.read_line(&mut line).await.unwrap() > 0,
            "the event comes"
        );
    }
    drop(broker);
    let mut rest = Vec::new();
    let read = answer.read_to_end(&mut rest);
    let _ = tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("the stream ends with the job");
    // What it took is in the file that the next attempt of this request reads.
    let kept = async {
        loop {
            let text = std::fs::read_to_string(folder.path().join("broker.json"));
            let kept = text
                .ok()
                .and_then(|text| serde_json::from_str::<Value>(&text).ok());
            if let Some(kept) = kept.filter(|kept| kept["input_tokens"] == 100) {
                return kept;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let kept = tokio::time::timeout(Duration::from_secs(20), kept)
        .await
        .unwrap();
    assert_eq!(kept["output_tokens"], 10);
}
