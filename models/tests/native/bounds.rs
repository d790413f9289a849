//! How long an answer may be.

use super::*;
use support::error;

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
