use super::*;

#[test]
fn an_answer_of_any_endpoint_is_understood() {
    for (body, text) in [
        (json!({"choices": [{"message": {"content": "hi"}}]}), "hi"),
        (
            json!({"choices": [{"message": {"content": [{"type": "text", "text": "h"}, {"text": "i"}], "x": 1},
                "finish_reason": "eos_token", "novel": {}}], "usage": null, "service_tier": "x"}),
            "hi",
        ),
        (
            json!({"choices": [{"message": {"content": null, "reasoning_content": "hm"}}]}),
            "",
        ),
        (
            json!({"choices": [{"text": "hi", "finish_reason": 7}]}),
            "hi",
        ),
    ] {
        let completion = Completion::from_body(&body).unwrap();
        assert_eq!(completion.text, text, "{body}");
        assert!(completion.finish.is_some());
    }
    assert_eq!(Completion::from_body(&json!({"hello": 1})), None);
    assert_eq!(Completion::from_body(&json!("x")), None);
}

#[test]
fn calls_of_tools_are_told_apart_with_and_without_an_index() {
    let piece = |call: Value| json!({"choices": [{"delta": {"tool_calls": [call]}}]});
    let mut indexed = Completion::default();
    let mut bare = Completion::default();
    for (index, id, arguments) in [(0, "a", "{\"x\""), (0, "", ":1}"), (1, "b", "{}")] {
        let mut call = json!({"id": id, "function": {"name": "shell", "arguments": arguments}});
        bare.absorb(&piece(call.clone()));
        call["index"] = json!(index);
        indexed.absorb(&piece(call));
    }
    assert_eq!(bare.tool_calls, indexed.tool_calls);
    assert_eq!(bare.tool_calls[0].arguments, "{\"x\":1}");
    assert_eq!(bare.tool_calls.len(), 2);
}

#[test]
fn usage_is_read_in_every_spelling() {
    let read = |usage: Value| {
        let mut completion = Completion::default();
        completion.absorb(&json!({"usage": usage}));
        completion
            .tokens
            .map(|tokens| (tokens.input, tokens.output))
    };
    assert_eq!(
        read(json!({"prompt_tokens": 3, "completion_tokens": 4})),
        Some((3, 4))
    );
    assert_eq!(
        read(json!({"input_tokens": 3.0, "output_tokens": "4"})),
        Some((3, 4))
    );
    assert_eq!(read(json!({"prompt_tokens": 0})), None);
    assert_eq!(read(Value::Null), None);
}

#[test]
fn a_body_becomes_a_stream_and_the_same_answer_again() {
    let completion = Completion {
        text: "one".to_owned(),
        tool_calls: vec![ToolCall {
            id: "call_1".to_owned(),
            name: "shell".to_owned(),
            arguments: "{\"command\":\"ls\"}".to_owned(),
        }],
        finish: Some("tool_calls".to_owned()),
        tokens: Some(Tokens {
            input: 5,
            output: 6,
        }),
        model: Some("m".to_owned()),
        ..Completion::default()
    };
    let body = completion.to_body("id", 0, "m");
    assert_eq!(Completion::from_body(&body).unwrap(), completion);

    let events = body_to_events(&body, true).concat();
    let mut decoder = sse::Decoder::default();
    let mut again = Completion::default();
    for data in decoder.feed(&events).unwrap() {
        if data != "[DONE]" {
            again.absorb(&serde_json::from_str(&data).unwrap());
        }
    }
    assert_eq!(again, completion);
    assert_eq!(body_to_events(&body, false).len(), 3);
}

#[test]
fn json_is_found_in_its_wrapping() {
    for text in [
        "{\"a\":1}",
        "```json\n{\"a\":1}\n```",
        "<think>a { b</think>\n```\n{\"a\":1}\n```",
    ] {
        assert_eq!(bare_json(text), "{\"a\":1}", "{text}");
    }
    assert_eq!(
        bare_json("Here: ```{}``` and more"),
        "Here: ```{}``` and more"
    );
}

#[test]
fn errors_are_read_in_whatever_form_they_come() {
    for body in [
        json!({"error": {"message": "no"}}),
        json!({"error": "no"}),
        json!({"message": "no"}),
        json!({"detail": "no"}),
        json!([{"error": {"code": 400, "message": "no"}}]),
    ] {
        assert_eq!(error_message(&body), "no");
    }
}
