//! Endpoints that fail, refuse or are missing, and what is not sent at all.

use super::*;
use models::{ModelChoice, RoleConfig};
use support::{error, with_header};

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
