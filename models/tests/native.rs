//! Workers' requests in Anthropic's Messages and OpenAI's Responses, against a server that speaks them on the wire.

mod support;

use std::sync::Arc;

use futures::StreamExt;
use models::{ApiKey, Config, EndpointConfig, ModelChoice, Provider, RoleConfig, Speaks};
use ports::{
    ModelError, Role, Usage, WireAnswer, WireCall, WireError, WireFormat, WirePiece, WorkerModels,
};
use serde_json::{Value, json};
use support::{
    Book, Reply, Server, config, error, eventually, json_reply, with_header, worker_call,
};

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

#[tokio::test]
async fn streams_go_through_event_by_event_and_are_counted_by_their_own_usage() {
    for (question, events, used) in [
        (message(true), message_events("Hello"), (100, 15)),
        (response(true), response_events("Hello"), (100, 20)),
    ] {
        // Cut anywhere on the way, the events are the same.
        let text = wire(&events).concat();
        let pieces = text.as_bytes().chunks(70);
        let server = Server::scripted([Reply::Wire {
            pieces: pieces
                .map(|piece| String::from_utf8(piece.to_vec()).unwrap())
                .collect(),
            wait_ms: 1,
            cut: false,
        }])
        .await;
        let (provider, book) = provider(&both(&server));
        let (answer, _) = provider.native(question).await.unwrap();
        let (seen, told, error) = drain(answer).await;
        assert!(error.is_none(), "{error:?}");
        assert_eq!(seen, text);
        let usage = only_line(&book);
        assert_eq!((usage.input_tokens, usage.output_tokens), used);
        assert_eq!(told, Some(usage), "the broker is told the same");
    }
}

#[tokio::test]
async fn a_stream_that_is_cut_is_counted_and_ends_in_an_error() {
    for (question, events) in [
        (message(true), message_events("twelve bytes")),
        (response(true), response_events("twelve bytes")),
    ] {
        // All but the last event; once the connection breaks, once it ends as if that were all.
        let most = wire(&events[..events.len() - 1]);
        for cut in [true, false] {
            let mut pieces = most.clone();
            pieces.push("event: half\ndata: {\"type\": \"ha".to_owned());
            let reply = Reply::Wire {
                pieces,
                wait_ms: 1,
                cut,
            };
            let server = Server::scripted([reply]).await;
            let (provider, book) = provider(&both(&server));
            let (answer, _) = provider.native(question.clone()).await.unwrap();
            let (seen, _, error) = drain(answer).await;
            assert_eq!(seen, most.concat(), "half an event is none");
            let failure = error.unwrap().error.to_failure();
            assert_eq!(failure.kind, "model_unavailable");
            assert!(failure.retryable);
            let usage = only_line(&book);
            assert!(
                usage.input_tokens > 0 && usage.output_tokens >= 4,
                "{usage:?}"
            );
        }
    }
}

#[tokio::test]
async fn an_error_inside_of_a_stream_ends_it_with_the_endpoints_own_words() {
    let overloaded =
        json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}});
    let mut events = message_events("Hello");
    events.truncate(4);
    events.push(overloaded.clone());
    let server = Server::scripted([streams(&events)]).await;
    let (provider, _) = provider(&both(&server));
    let (answer, _) = provider.native(message(true)).await.unwrap();
    let (seen, _, error) = drain(answer).await;
    assert_eq!(seen, wire(&events[..4]).concat());
    let error = error.unwrap();
    assert_eq!(error.body, Some(overloaded));
    assert!(error.to_string().contains("Overloaded"), "{error}");

    let failed = json!({"type": "response.failed", "response": {"status": "failed", "usage": {"input_tokens": 7, "output_tokens": 0},
        "error": {"code": "context_length_exceeded", "message": "too long"}}});
    let mut events = response_events("Hello");
    events.truncate(2);
    events.push(failed.clone());
    let server = Server::scripted([streams(&events)]).await;
    let (provider, book) = self::provider(&both(&server));
    let (answer, _) = provider.native(response(true)).await.unwrap();
    let error = drain(answer).await.2.unwrap();
    assert_eq!(error.body, Some(failed));
    assert!(!error.error.to_failure().retryable);
    assert_eq!(only_line(&book).input_tokens, 7);
}

#[tokio::test]
async fn failures_before_the_first_event_are_tried_again_and_obey_retry_after() {
    let overloaded =
        json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}});
    let server = Server::scripted([
        with_header(json_reply(529, &overloaded), "retry-after-ms", "20"),
        streams(std::slice::from_ref(&overloaded)),
        Reply::Wire {
            pieces: vec![],
            wait_ms: 1,
            cut: true,
        },
        streams(&message_events("at last")),
    ])
    .await;
    let (provider, book) = provider(&both(&server));
    let (answer, _) = provider.native(message(true)).await.unwrap();
    assert!(drain(answer).await.2.is_none());
    assert_eq!(server.count(), 4);
    assert_eq!(
        only_line(&book).input_tokens,
        100,
        "tries that came to nothing cost nothing"
    );
}

#[tokio::test]
async fn what_is_for_the_worker_to_read_comes_as_the_endpoint_said_it() {
    let long = json!({"type": "error", "error": {"type": "invalid_request_error", "message": "prompt is too long: sk-ant-canary"}});
    let busy =
        json!({"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}});
    let server = Server::scripted([
        json_reply(400, &long),
        // Longer than we wait: the worker may.
        with_header(json_reply(429, &busy), "retry-after", "3600"),
        error(401, "bad key sk-ant-canary"),
    ])
    .await;
    let (provider, book) = provider(&both(&server));
    let first = refused(&provider, message(false)).await;
    assert_eq!(
        first.body.unwrap()["error"]["message"],
        "prompt is too long: …"
    );
    assert!(matches!(
        first.error,
        ModelError::Unavailable {
            status: Some(400),
            ..
        }
    ));
    let second = refused(&provider, message(false)).await;
    assert_eq!(
        (second.body, second.retry_after_s),
        (Some(busy), Some(3600))
    );
    let third = refused(&provider, message(false)).await;
    assert!(third.body.is_none(), "our key is not the worker's to mend");
    let text = third.to_string();
    assert!(
        text.contains("check the key") && !text.contains("canary"),
        "{text}"
    );
    assert_eq!(server.count(), 3);
    assert!(book.ids().is_empty());
}

#[tokio::test]
async fn an_endpoint_that_gives_up_nothing_is_given_up_within_its_bounds() {
    let server = Server::with(|_| Reply::Hang).await;
    let mut config = both(&server);
    config.timeouts.idle_s = 1;
    config.retry.tries = 2;
    let (provider, _) = provider(&config);
    let error = refused(&provider, message(true)).await;
    assert!(
        error.to_string().contains("nothing came from it for 1 s"),
        "{error}"
    );
    assert_eq!(server.count(), 2);

    // One that nobody listens at.
    let mut config = both(&server);
    let gone = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", gone.local_addr().unwrap());
    drop(gone);
    config.endpoints.get_mut("anthropic").unwrap().base_url = address;
    let (provider, _) = self::provider(&config);
    let error = refused(&provider, message(true)).await;
    assert!(error.to_string().contains("no connection to it"), "{error}");
    assert!(error.error.to_failure().retryable);
}

#[tokio::test]
async fn a_slow_stream_arrives_as_it_comes_and_a_worker_that_goes_away_is_counted() {
    let server = Server::scripted([Reply::Wire {
        pieces: wire(&message_events("Hello")),
        wait_ms: 400,
        cut: false,
    }])
    .await;
    let (provider, book) = provider(&both(&server));
    let (answer, _) = provider.native(message(true)).await.unwrap();
    let WireAnswer::Stream(mut stream) = answer else {
        panic!("not a stream")
    };
    let first = stream.next().await.unwrap().unwrap();
    let WirePiece::Events(first) = first else {
        panic!("{first:?}")
    };
    assert!(first.starts_with(b"event: message_start\n"));
    assert_eq!(book.ids(), [""; 0], "it goes on");
    drop(stream);
    eventually("the ledger has the line", || book.ids().len() == 1).await;
    assert_eq!(only_line(&book).input_tokens, 100);
}

#[tokio::test]
async fn usage_that_is_missing_is_estimated_and_never_nothing() {
    let mut events = message_events(&"x".repeat(300));
    events[0]["message"]["usage"] = Value::Null;
    events[5]["usage"] = Value::Null;
    let server = Server::scripted([
        streams(&events),
        json_reply(200, &json!({"output": [{"text": "y".repeat(300)}]})),
    ])
    .await;
    let (provider, book) = provider(&both(&server));
    let (answer, _) = provider.native(message(true)).await.unwrap();
    let (_, used, error) = drain(answer).await;
    assert!(error.is_none());
    let usage = only_line(&book);
    assert!(
        usage.input_tokens > 10 && usage.output_tokens == 100,
        "{usage:?}"
    );
    assert_eq!(used, Some(usage));
    let (_, usage) = provider.native(response(false)).await.unwrap();
    assert!(
        usage.input_tokens > 10 && usage.output_tokens >= 100,
        "{usage:?}"
    );
}

#[tokio::test]
async fn huge_events_pass_and_endless_ones_are_refused() {
    // The last event of a response holds all of it again.
    let events = response_events(&"z".repeat(1_000_000));
    let server = Server::scripted([streams(&events)]).await;
    let mut config = both(&server);
    config.prices.clear();
    let (provider, book) = provider(&config);
    let mut question = response(true);
    question.call.body["max_output_tokens"] = json!(200_000);
    let (answer, _) = provider.native(question).await.unwrap();
    let (seen, _, error) = drain(answer).await;
    assert!(error.is_none(), "{error:?}");
    assert_eq!(seen.len(), wire(&events).concat().len());
    assert_eq!(only_line(&book).output_tokens, 20);

    let mut pieces = wire(&response_events("short")[..1]);
    pieces.push("data: ".to_owned());
    pieces.extend(std::iter::repeat_n("x".repeat(1024 * 1024), 9));
    let server = Server::scripted([Reply::Wire {
        pieces,
        wait_ms: 1,
        cut: false,
    }])
    .await;
    let (provider, _) = self::provider(&both(&server));
    let (answer, _) = provider.native(response(true)).await.unwrap();
    let error = drain(answer).await.2.unwrap();
    assert!(error.to_string().contains("longer than 8 MiB"), "{error}");
}

#[tokio::test]
async fn a_format_without_an_endpoint_is_refused_with_what_to_configure() {
    let server = Server::scripted([json_reply(404, &json!({"detail": "Not Found"}))]).await;
    let (provider, _) = provider(&config(&server.base_url));
    for format in [WireFormat::Messages, WireFormat::CountTokens] {
        let error = refused(&provider, call(format, json!({"messages": []}))).await;
        assert!(matches!(error.error, ModelError::NoEndpoint { .. }));
        assert!(
            error.to_string().contains("set ANTHROPIC_API_KEY"),
            "{error}"
        );
        assert_eq!(error.error.to_failure().actor, ports::Actor::Admin);
    }
    assert_eq!(server.count(), 0);
    // An OpenAI-compatible endpoint may lack Responses; that is found out by asking.
    let error = refused(&provider, response(true)).await;
    let text = error.to_string();
    assert!(
        matches!(error.error, ModelError::NoEndpoint { .. }),
        "{text}"
    );
    assert!(
        text.contains("no such address") && text.contains("OPENAI_BASE_URL"),
        "{text}"
    );
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn counting_tokens_is_free_and_never_refused_for_money() {
    let server = Server::scripted([json_reply(200, &json!({"input_tokens": 14}))]).await;
    let (provider, book) = provider(&both(&server));
    *book.limits.lock().unwrap() = (Some(0.0), Some(0));
    let count = call(
        WireFormat::CountTokens,
        json!({"model": "x", "messages": []}),
    );
    let (answer, usage) = provider.native(count).await.unwrap();
    assert_eq!(whole(answer), json!({"input_tokens": 14}));
    assert_eq!(usage.input_tokens + usage.output_tokens, 0);
    assert_eq!(server.seen()[0].path, "/v1/messages/count_tokens");
    assert_eq!(server.seen()[0].body["model"], "c");
    assert!(book.ids().is_empty());
    let error = refused(&provider, message(false)).await;
    assert!(matches!(error.error, ModelError::Budget { .. }), "{error}");
    assert_eq!(server.count(), 1, "nothing was sent");
}

#[tokio::test]
async fn what_cannot_be_metered_is_not_sent() {
    let server = Server::scripted([]).await;
    let (provider, _) = provider(&both(&server));
    for body in [json!({"input": "x", "background": true}), json!("x")] {
        let error = refused(&provider, call(WireFormat::Responses, body)).await;
        assert!(error.to_string().contains("nothing was sent"), "{error}");
    }
    assert_eq!(server.count(), 0);
}

#[tokio::test]
async fn the_developers_chain_goes_before_an_endpoints_own_model_and_its_limit_holds() {
    let server = Server::scripted([
        error(404, "model: first is not known"),
        json_reply(
            200,
            &json!({"content": [], "usage": {"input_tokens": 1, "output_tokens": 1}}),
        ),
    ])
    .await;
    let mut config = both(&server);
    let at = |model: &str| ModelChoice::At {
        endpoint: "anthropic".to_owned(),
        model: model.to_owned(),
    };
    let role = RoleConfig {
        models: vec![at("first"), at("second")],
        max_output_tokens: Some(5000),
        ..RoleConfig::default()
    };
    config.roles.insert(Role::Developer, role);
    let (provider, _) = provider(&config);
    let mut question = message(false);
    question.call.body["max_tokens"] = json!(32_000);
    question.call.body["thinking"] = json!({"type": "enabled", "budget_tokens": 31_999});
    provider.native(question).await.unwrap();
    let seen = server.seen();
    let asked: Vec<_> = seen.iter().map(|seen| seen.body["model"].clone()).collect();
    assert_eq!(asked, ["first", "second"]);
    assert_eq!(seen[1].body["max_tokens"], 5000);
    assert_eq!(seen[1].body["thinking"]["budget_tokens"], 2500);

    // The crew itself cannot talk to such an endpoint.
    let mut config = both(&server);
    let role = RoleConfig {
        models: vec![at("first")],
        ..RoleConfig::default()
    };
    config.roles.insert(Role::Reviewer, role);
    let wrong = config.validate().unwrap_err().to_string();
    assert!(wrong.contains("models.roles.reviewer"), "{wrong}");
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

/// Events of an answer that is as long as it may be, or endless; a word is a token.
fn long_answer(seen: &support::Seen, obeys: bool) -> Reply {
    let messages = seen.path.ends_with("/messages");
    let name = if messages {
        "max_tokens"
    } else {
        "max_output_tokens"
    };
    let words = match seen.body[name].as_u64() {
        Some(limit) if obeys => limit,
        _ => 100_000,
    };
    if seen.body["stream"] != json!(true) {
        let usage = json!({"input_tokens": 20, "output_tokens": words});
        return json_reply(200, &json!({"content": [], "output": [], "usage": usage}));
    }
    let text = "word ".repeat(100);
    let delta = if messages {
        json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": text}})
    } else {
        json!({"type": "response.output_text.delta", "item_id": "m", "delta": text})
    };
    let mut events = vec![delta; usize::try_from(words / 100).unwrap()];
    if messages {
        events.insert(0, json!({"type": "message_start", "message": {"usage": {"input_tokens": 20, "output_tokens": 1}}}));
        events.push(json!({"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": words}}));
        events.push(json!({"type": "message_stop"}));
    } else {
        let usage = json!({"input_tokens": 20, "output_tokens": words});
        events.push(json!({"type": "response.incomplete", "response": {"status": "incomplete", "usage": usage}}));
    }
    Reply::Wire {
        pieces: vec![wire(&events).concat()],
        wait_ms: 0,
        cut: false,
    }
}

#[tokio::test]
async fn an_answer_is_bounded_by_what_its_job_has_left_in_each_format() {
    let server = Server::with(|seen| long_answer(seen, true)).await;
    let (provider, _) = provider(&both(&server));
    for stream in [true, false] {
        for (mut question, name, asked) in [
            (message(stream), "max_tokens", Some(1000)),
            (response(stream), "max_output_tokens", None),
        ] {
            for (left, bound) in [
                (Some(700), Some(700)),
                (Some(5_000), asked.or(Some(5_000))),
                (None, asked),
            ] {
                question.call.most_output = left;
                if bound.is_none() {
                    // Nobody bounds it, and it ends by itself.
                    continue;
                }
                match provider.native(question.clone()).await.unwrap() {
                    (answer @ WireAnswer::Stream(_), _) => {
                        let (_, used, error) = drain(answer).await;
                        assert!(error.is_none(), "what obeys is whole: {error:?}");
                        assert_eq!(used.map(|used| used.output_tokens), bound);
                    }
                    (_, usage) => assert_eq!(Some(usage.output_tokens), bound),
                }
                let sent = server.seen().pop().unwrap().body;
                assert_eq!(sent[name].as_u64(), bound, "{left:?}");
            }
        }
    }
    // A thought is shorter than its answer, and where there is no room for one there is none.
    for (left, thinking) in [
        (4_000, json!({"type": "enabled", "budget_tokens": 2_000})),
        (1_500, json!({"type": "enabled", "budget_tokens": 1_024})),
        (1_000, json!({"type": "disabled"})),
    ] {
        let mut question = message(false);
        question.call.body["max_tokens"] = json!(32_000);
        question.call.body["thinking"] = json!({"type": "enabled", "budget_tokens": 31_999});
        question.call.body["context_management"] =
            json!({"edits": [{"type": "clear_thinking_20251015"}, {"type": "other"}]});
        question.call.most_output = Some(left);
        provider.native(question).await.unwrap();
        let sent = server.seen().pop().unwrap().body;
        assert_eq!(
            (&sent["max_tokens"], &sent["thinking"]),
            (&json!(left), &thinking)
        );
        let edits = sent["context_management"]["edits"].as_array().unwrap();
        assert_eq!(edits.len(), if left > 1_024 { 2 } else { 1 });
    }
}

#[tokio::test]
async fn a_stream_that_pays_no_heed_to_its_bound_is_cut_in_each_format() {
    let server = Server::with(|seen| long_answer(seen, false)).await;
    let (provider, book) = provider(&both(&server));
    for mut question in [message(true), response(true)] {
        question.call.most_output = Some(800);
        let (answer, _) = provider.native(question).await.unwrap();
        let (text, used, error) = drain(answer).await;
        let error = error.expect("it is cut").error;
        assert!(
            matches!(error, ModelError::TooLong { limit: 800, .. }),
            "{error}"
        );
        assert!(text.len() < 100_000, "{}", text.len());
        let used = used.expect("what came is paid for").output_tokens;
        assert!((800..8_000).contains(&used), "{used}");
    }
    assert_eq!(book.ids().len(), 2);
}

#[tokio::test]
async fn a_bound_that_is_more_than_the_model_can_write_is_lowered() {
    let server = Server::with(|seen| match seen.body["max_output_tokens"].as_u64() {
        Some(limit) if limit <= 16_384 => long_answer(seen, true),
        _ => error(400, "max_output_tokens: at most 16384 for this model"),
    })
    .await;
    let mut config = both(&server);
    config.prices.clear();
    let (provider, _) = provider(&config);
    let mut question = response(false);
    question.call.most_output = Some(60_000);
    let (_, usage) = provider.native(question.clone()).await.unwrap();
    assert_eq!(usage.output_tokens, 15_000);
    // What the worker says itself it may hear about.
    question.call.body["max_output_tokens"] = json!(50_000);
    let Err(refused) = provider.native(question).await else {
        panic!("it is refused");
    };
    assert!(refused.to_string().contains("at most 16384"), "{refused}");
}

#[tokio::test]
async fn a_project_with_little_left_bounds_answers_and_then_refuses_them() {
    let server = Server::with(|seen| long_answer(seen, true)).await;
    let mut config = both(&server);
    config.prices.clear();
    config.budget.tokens = Some(8_000);
    let (provider, book) = provider(&config);
    let mut bounds = Vec::new();
    let refused = loop {
        match provider.native(response(false)).await {
            Ok((_, usage)) => bounds.push(usage.output_tokens),
            Err(refused) => break refused,
        }
        assert!(bounds.len() < 10, "{bounds:?}");
    };
    assert!(
        matches!(refused.error, ModelError::Budget { .. }),
        "{refused}"
    );
    assert_eq!(bounds.len(), 2, "{bounds:?}");
    assert!(bounds[0] == 4_096 && bounds[1] < 4_096, "{bounds:?}");
    assert!(book.total().1 <= 8_000);
}
