//! Answers that stream: they arrive as they come, and are counted however they end.

use super::*;

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
