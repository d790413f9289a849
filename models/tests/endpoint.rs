//! What real endpoints do, on the wire, to the crew's own questions.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use models::{Config, Provider, RoleConfig, live_check, offered_models};
use ports::{ModelError, Models, Role, Schema};
use serde_json::{Value, json};
use support::{
    Book, Reply, Server, call, config, delta, error, finish, json_reply, key, says, then_ask,
    with_header,
};

fn provider(config: &Config) -> (Provider, Arc<Book>) {
    let book = Arc::new(Book::default());
    (Provider::new(config, book.clone()).unwrap(), book)
}

fn plan_schema() -> Schema {
    Schema {
        name: "Plan".to_owned(),
        schema: json!({"type": "object", "properties": {"tasks": {"type": "array"}}}),
    }
}

#[tokio::test]
async fn a_streamed_answer_is_put_together_and_counted() {
    let server = Server::scripted([Reply::Events(vec![
        delta("he"),
        delta("llo"),
        finish("stop"),
        support::usage(1000, 100),
        "[DONE]".to_owned(),
    ])])
    .await;
    let mut config = config(&server.base_url);
    let role = RoleConfig {
        temperature: Some(0.2),
        max_output_tokens: Some(500),
        ..RoleConfig::default()
    };
    config.roles.insert(Role::Architect, role);
    let (provider, book) = provider(&config);

    let answer = provider.ask(&call("k", "hi")).await.unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.model.as_str()),
        ("hello", "m")
    );
    assert!(!answer.from_tape && provider.tape().is_none());
    assert_eq!(answer.usage.input_tokens, 1000);
    assert!((answer.usage.cost_usd.unwrap() - 0.02).abs() < 1e-9);
    let line = book.line("k");
    assert_eq!((line.usage, line.role), (answer.usage, Role::Architect));

    let seen = &server.seen()[0];
    assert_eq!(seen.path, "/v1/chat/completions");
    assert_eq!(seen.headers["authorization"], "Bearer sk-canary-key");
    assert_eq!(seen.body["stream"], true);
    assert_eq!(seen.body["stream_options"]["include_usage"], true);
    assert_eq!(seen.body["temperature"].to_string(), "0.2");
    assert_eq!(seen.body["max_tokens"], 500);
    assert_eq!(seen.body["messages"][0]["role"], "system");
    assert_eq!(seen.body["messages"][1]["content"], "hi");
}

#[tokio::test]
async fn a_429_is_tried_again_after_the_time_it_names() {
    let server = Server::scripted([
        with_header(error(429, "slow down"), "retry-after", "1"),
        says("ok", 1, 1),
    ])
    .await;
    let (provider, book) = provider(&config(&server.base_url));
    let before = Instant::now();
    assert_eq!(provider.ask(&call("k", "hi")).await.unwrap().text, "ok");
    assert!(before.elapsed() >= Duration::from_secs(1));
    assert_eq!(server.count(), 2);
    assert_eq!(book.ids(), ["k"]);
}

#[tokio::test]
async fn an_endpoint_that_wants_a_long_wait_is_given_up_for_now() {
    let reply = with_header(error(429, "come back tomorrow"), "retry-after", "86400");
    let server = Server::scripted([reply]).await;
    let (provider, _) = provider(&config(&server.base_url));
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    let ModelError::Unavailable {
        status, retryable, ..
    } = &error
    else {
        panic!("{error}")
    };
    assert_eq!((*status, *retryable), (Some(429), true));
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn a_500_and_a_cut_connection_and_an_early_end_are_tried_again() {
    let server = Server::scripted([
        error(500, "oops"),
        Reply::Cut(vec![delta("half an ans")]),
        Reply::Events(vec![delta("half")]),
        says("whole", 10, 1),
    ])
    .await;
    let (provider, book) = provider(&config(&server.base_url));
    let answer = provider.ask(&call("k", "hi")).await.unwrap();
    assert_eq!(answer.text, "whole");
    assert_eq!(server.count(), 4);
    // The answer stands once under its key; the two halves were paid as well.
    let ids = book.ids();
    assert_eq!(ids.len(), 3);
    assert_eq!(ids[0], "k");
    assert!(ids[1].starts_with("k#lost-") && ids[2].starts_with("k#lost-"));
    assert_eq!(book.line("k").usage, answer.usage);
}

#[tokio::test]
async fn tries_end_and_say_what_happened_last() {
    let server = Server::with(|_| error(503, "overloaded")).await;
    let mut config = config(&server.base_url);
    config.retry.tries = 3;
    let (provider, book) = provider(&config);
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("503") && text.contains("overloaded") && text.contains("after 3 tries"),
        "{text}"
    );
    assert!(error.to_failure().retryable);
    assert_eq!(server.count(), 3);
    assert!(book.ids().is_empty());
}

#[tokio::test]
async fn a_silent_endpoint_is_left_after_the_idle_time() {
    let server = Server::scripted([Reply::Hang, says("ok", 1, 1)]).await;
    let mut config = config(&server.base_url);
    config.timeouts.idle_s = 1;
    let (provider, _) = provider(&config);
    assert_eq!(provider.ask(&call("k", "hi")).await.unwrap().text, "ok");
}

#[tokio::test]
async fn all_tries_together_have_a_bound() {
    let server = Server::with(|_| Reply::Hang).await;
    let mut config = config(&server.base_url);
    config.timeouts.total_s = 1;
    let (provider, _) = provider(&config);
    let before = Instant::now();
    assert!(provider.ask(&call("k", "hi")).await.is_err());
    assert!(before.elapsed() < Duration::from_secs(30));
}

#[tokio::test]
async fn a_refused_key_is_said_at_once_and_never_shown() {
    let server = Server::with(|_| error(401, "Incorrect API key: sk-canary-key")).await;
    let (provider, _) = provider(&config(&server.base_url));
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains("refused the key (401)"), "{text}");
    assert!(!text.contains("canary"), "{text}");
    assert!(!error.to_failure().retryable);
    assert_eq!(server.count(), 1);
}

#[tokio::test]
async fn answers_that_no_client_library_would_take_are_understood() {
    let odd = json!({"object": "chat.completion.odd", "surprise": [1], "usage": null, "choices": [{"novel": true,
        "finish_reason": "eos_token", "message": {"content": [{"type": "text", "text": "fine"}], "reasoning_content": "hm",
        "annotations": null}}]});
    let server = Server::scripted([
        // A server that ignores `stream`, another that never says how an answer ended, a third without [DONE].
        json_reply(200, &odd),
        Reply::Events(vec![
            ": not json".to_owned(),
            delta("fi"),
            json!({"choices": [{"delta": {"content": null, "reasoning_content": "hm"}}]})
                .to_string(),
            delta("ne"),
            "[DONE]".to_owned(),
        ]),
        Reply::Events(vec![delta("fine"), finish("something_new")]),
    ])
    .await;
    let (provider, book) = provider(&config(&server.base_url));
    for key in ["a", "b", "c"] {
        let answer = provider.ask(&call(key, "hi")).await.unwrap();
        assert_eq!(answer.text, "fine", "{key}");
        // No usage came: it is estimated, never nothing.
        assert!(answer.usage.input_tokens > 0 && answer.usage.output_tokens > 0);
    }
    assert_eq!(book.ids(), ["a", "b", "c"]);
    assert_eq!(server.count(), 3);
}

#[tokio::test]
async fn an_error_inside_a_stream_is_an_error() {
    let broken = json!({"error": {"message": "upstream died", "code": 502}}).to_string();
    let server = Server::scripted([Reply::Events(vec![broken]), says("ok", 1, 1)]).await;
    let (provider, _) = provider(&config(&server.base_url));
    assert_eq!(provider.ask(&call("k", "hi")).await.unwrap().text, "ok");
}

#[tokio::test]
async fn an_answer_that_was_all_thinking_says_what_to_change() {
    let thinking = json!({"choices": [{"delta": {"reasoning_content": "hm, hm"}}]}).to_string();
    let server = Server::scripted([Reply::Events(vec![thinking, finish("length")])]).await;
    let (provider, book) = provider(&config(&server.base_url));
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    assert!(error.to_string().contains("max_output_tokens"), "{error}");
    assert_eq!(book.ids().len(), 1, "it is paid for all the same");
}

#[tokio::test]
async fn a_schema_that_is_refused_goes_into_the_message_from_then_on() {
    let server = Server::with(|seen| {
        if seen.body.get("response_format").is_some() {
            error(400, "response_format: json_schema is not supported")
        } else {
            says("```json\n{\"tasks\": []}\n```", 5, 5)
        }
    })
    .await;
    let (provider, _) = provider(&config(&server.base_url));
    for key in ["a", "b"] {
        let question = ports::ModelCall {
            schema: Some(plan_schema()),
            ..call(key, "plan it")
        };
        let answer = provider.ask(&question).await.unwrap();
        assert_eq!(answer.text, "{\"tasks\": []}");
    }
    let seen = server.seen();
    assert_eq!(seen.len(), 3, "the refusal is remembered");
    let format = &seen[0].body["response_format"];
    assert_eq!(format["type"], "json_schema");
    assert_eq!(format["json_schema"]["name"], "Plan");
    let text = seen[2].body["messages"][1]["content"].as_str().unwrap();
    assert!(
        text.starts_with("plan it") && text.contains("\"tasks\""),
        "{text}"
    );
}

#[tokio::test]
async fn parallel_questions_survive_the_refusal_of_a_schema_together() {
    let server = Server::with(|seen| {
        if seen.body.get("response_format").is_some() {
            error(400, "bad request")
        } else {
            says("{}", 5, 5)
        }
    })
    .await;
    let (provider, _) = provider(&config(&server.base_url));
    let asks = (0..8).map(|n| {
        let provider = provider.clone();
        async move {
            let question = ports::ModelCall {
                schema: Some(plan_schema()),
                ..call(&format!("k{n}"), "plan it")
            };
            provider.ask(&question).await.unwrap()
        }
    });
    assert_eq!(futures::future::join_all(asks).await.len(), 8);
}

#[tokio::test]
async fn a_schema_that_is_ignored_goes_into_the_message_of_the_repair() {
    let server = Server::scripted([says("Sure! Here you go.", 5, 5), says("{}", 5, 5)]).await;
    let (provider, _) = provider(&config(&server.base_url));
    for key in ["a", "b"] {
        let question = ports::ModelCall {
            schema: Some(plan_schema()),
            ..call(key, "plan it")
        };
        provider.ask(&question).await.unwrap();
    }
    let bodies: Vec<Value> = server.seen().into_iter().map(|seen| seen.body).collect();
    let text = |n: usize| bodies[n]["messages"][1]["content"].as_str().unwrap();
    assert_eq!(text(0), "plan it");
    assert!(text(1).contains("JSON Schema (Plan)"));
    assert!(bodies[1].get("response_format").is_some());
}

#[tokio::test]
async fn parameters_that_are_refused_are_left_out() {
    let server = Server::with(|seen| {
        let body = &seen.body;
        if body.get("max_tokens").is_some() {
            error(400, "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead.")
        } else if body.get("temperature").is_some() {
            error(400, "Unsupported value: 'temperature' does not support 0.2")
        } else if body.get("stream_options").is_some() {
            error(422, "extra fields not permitted: stream_options")
        } else {
            says("ok", 1, 1)
        }
    })
    .await;
    let mut config = config(&server.base_url);
    let role = RoleConfig {
        temperature: Some(0.2),
        ..RoleConfig::default()
    };
    config.roles.insert(Role::Architect, role);
    let (provider, _) = provider(&config);
    provider.ask(&call("a", "hi")).await.unwrap();
    assert_eq!(server.count(), 4);
    provider.ask(&call("b", "hi")).await.unwrap();
    assert_eq!(server.count(), 5);
    assert_eq!(server.seen()[4].body["max_completion_tokens"], 8192);
}

#[tokio::test]
async fn the_next_model_of_the_chain_answers_when_the_first_does_not() {
    let first = Server::with(|_| error(404, "no such model")).await;
    let second = Server::scripted([says("from the second", 1, 1)]).await;
    let mut config = config(&first.base_url);
    then_ask(&mut config, &second, "other/model");
    let (provider, book) = provider(&config);
    let answer = provider.ask(&call("k", "hi")).await.unwrap();
    assert_eq!(
        (answer.text.as_str(), answer.model.as_str()),
        ("from the second", "other/model")
    );
    assert_eq!(answer.usage.cost_usd, None, "its price is not known");
    assert_eq!(first.count(), 1);
    let seen = &second.seen()[0];
    assert!(seen.headers.get("authorization").is_none());
    assert_eq!(book.line("k").model, "other/model");

    let error = provider
        .ask(&call("l", "hi"))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("404") && error.contains("500"), "{error}");
}

#[tokio::test]
async fn without_a_model_it_says_what_to_set() {
    support::install_tls();
    let (provider, _) = provider(&Config::default());
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    assert!(matches!(error, ModelError::NotConfigured));
}

#[tokio::test]
async fn an_address_that_redirects_says_where_to() {
    let server = Server::with(|_| {
        with_header(
            error(308, "moved"),
            "location",
            "https://new.example/v1/chat",
        )
    })
    .await;
    let (provider, _) = provider(&config(&server.base_url));
    let error = provider
        .ask(&call("k", "hi"))
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains("https://new.example"), "{error}");
}

#[tokio::test]
async fn a_live_check_tells_a_working_endpoint_from_a_refused_key_and_a_wrong_address() {
    support::install_tls();
    let server = Server::with(|seen| {
        if seen
            .headers
            .get("authorization")
            .is_none_or(|key| key != "Bearer good")
        {
            return error(401, "bad key");
        }
        match seen.path.as_str() {
            "/v1/models" => json_reply(200, &json!({"data": [{"id": "m"}, {"id": "n"}]})),
            "/v1/chat/completions" if seen.body["model"] == "m" => {
                json_reply(200, &json!({"choices": [{"message": {"content": "y"}}]}))
            }
            "/v1/chat/completions" => error(404, "The model `x` does not exist"),
            _ => json_reply(200, &json!({"hello": "world"})),
        }
    })
    .await;
    let said = live_check(&server.base_url, Some(&key("good")), "m").await;
    assert!(said.unwrap().contains("(2 models there)"));
    assert_eq!(server.seen()[1].body["max_tokens"], 1);
    let soon = Duration::from_secs(5);
    let offered = offered_models(&server.base_url, Some(&key("good")), soon).await;
    assert_eq!(offered.unwrap(), ["m", "n"]);
    let refused = offered_models(&server.base_url, Some(&key("bad")), soon).await;
    assert_eq!(refused, None);
    for (base_url, key_text, model, says) in [
        (server.base_url.clone(), "bad", "m", "refused the key"),
        (server.base_url.clone(), "good", "x", "does not exist"),
        (
            server.base_url.replace("/v1", "/wrong"),
            "good",
            "m",
            "with /v1",
        ),
        (
            "http://127.0.0.1:1/v1".to_owned(),
            "good",
            "m",
            "no connection",
        ),
        ("nonsense".to_owned(), "good", "m", "not an address"),
    ] {
        let error = live_check(&base_url, Some(&key(key_text)), model).await;
        let error = error.unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[tokio::test]
async fn an_endless_answer_ends() {
    // Noise; of text much less would be too much.
    let noise = json!({"choices": [], "noise": "x".repeat(7 * 1024 * 1024)}).to_string();
    let mut events = vec![noise; 12];
    events[0] = delta("a word");
    let server = Server::scripted([Reply::Events(events)]).await;
    let (provider, book) = provider(&config(&server.base_url));
    let error = provider.ask(&call("k", "hi")).await.unwrap_err();
    assert!(error.to_string().contains("longer than 64 MiB"), "{error}");
    assert!(!error.to_failure().retryable);
    assert_eq!(book.ids().len(), 1, "what came is counted");
}

#[tokio::test]
async fn a_key_that_is_named_and_not_set_is_said_before_anything_is_asked() {
    support::install_tls();
    let mut config = config("http://127.0.0.1:1/v1");
    let endpoint = config.endpoints.get_mut("default").unwrap();
    endpoint.api_key = None;
    endpoint.api_key_env = Some("MY_KEY".to_owned());
    let error = Provider::new(&config, Arc::new(Book::default())).err();
    let error = error.unwrap().to_string();
    assert!(error.contains("MY_KEY"), "{error}");
}

#[tokio::test]
async fn a_stream_is_understood_however_it_is_cut_into_pieces() {
    let event = delta("hello");
    let end = finish("stop");
    for pieces in [
        vec![
            "\n".to_owned(),
            "data: ".to_owned(),
            event.clone(),
            "\n".to_owned(),
            "\n".to_owned(),
            format!("data: {end}\n\n"),
        ],
        vec![
            format!("data: {event}"),
            "\n\n".to_owned(),
            format!("data: {end}"),
        ],
        vec![format!(
            ": hi\n\ndata: {{\"choices\": [{{\"message\": {{\"content\": \"hello\"}}, \"finish_reason\": \"stop\"}}]}}"
        )],
    ] {
        let server = Server::scripted([Reply::Wire {
            pieces: pieces.clone(),
            wait_ms: 20,
            cut: false,
        }])
        .await;
        let (provider, _) = provider(&config(&server.base_url));
        let answer = provider.ask(&call("k", "hi")).await.unwrap();
        assert_eq!(answer.text, "hello", "{pieces:?}");
    }
}
