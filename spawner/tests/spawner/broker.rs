//! The broker as a worker meets it, from inside the sandbox.

use crate::stage::{Stage, Turn, assert_succeeded, runs, says};
use protocol::EventKind;
use serde_json::Value;

const ASK: &str = include_str!("ask.py");

#[tokio::test]
async fn it_answers_its_own_worker_and_refuses_everything_else() {
    let stage = Stage::new([
        says("hi"),
        Turn::Stream(vec![
            "data: {\"choices\": [{\"delta\": {\"content\": \"hi\"}}]}\n\n",
            "data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 7, \"completion_tokens\": 3}}\n\ndata: [DO",
            "NE]\n\n",
        ]),
    ])
    .await;
    let script = "printf %s \"$1\" > /tmp/ask.py; python3 /tmp/ask.py; git add answers.json; git commit -qm Answers";
    let mut request = stage.script("r1", 1, script);
    request
        .agent
        .command
        .extend(["sh".to_owned(), ASK.to_owned()]);
    request.network.allow = ["169.254.169.254:80", "localhost:22", "10.0.0.1:80"]
        .map(str::to_owned)
        .to_vec();
    request.agent.model = Some("some-model".into());
    let result = stage.run(&request).await;
    assert_succeeded(&result);
    assert_eq!(
        result.summary_markdown, "succeeded",
        "the first report stands"
    );
    let answers: Value = serde_json::from_str(&stage.show("answers.json")).unwrap();
    for (name, status) in [
        ("no key", 401),
        ("wrong key", 401),
        ("anthropic's header", 200),
        ("models", 200),
        ("elsewhere", 404),
        ("wrong method", 405),
        ("no json", 400),
        ("no messages", 400),
        ("too large", 413),
        ("bad result", 400),
        ("no text", 400),
        ("json", 200),
        ("stream", 200),
        ("proxy without key", 407),
        ("not listed", 403),
        ("metadata", 403),
        ("loopback", 403),
        ("absolute form", 403),
        ("report succeeded", 200),
        ("report failed", 409),
    ] {
        assert_eq!(answers[name][0], status, "{name}: {}", answers[name][1]);
    }
    let text = |name: &str| answers[name][1].as_str().unwrap().to_owned();
    assert!(text("models").contains("some-model"));
    assert!(text("bad result").contains("succeeded, failed or blocked"));
    assert!(
        text("stream").ends_with("data: [DONE]\n\n"),
        "{}",
        text("stream")
    );
    let error: Value = serde_json::from_str(&text("no key")).unwrap();
    assert!(
        error["error"]["message"]
            .as_str()
            .unwrap()
            .contains("ARTEL_BROKER_KEY")
    );

    // Who asks is known from the socket; headers are not believed.
    let calls = stage.calls();
    assert_eq!(calls[0].thread, "job-1/one");
    assert_eq!(calls[1].body["stream"], true);
    assert_eq!(
        result.usage.input_tokens, 107,
        "what the stream told is counted"
    );
    assert_eq!(result.usage.output_tokens, 13);

    let refused: Vec<String> = stage
        .events("r1")
        .await
        .into_iter()
        .filter_map(|event| match event.kind {
            EventKind::Refused { host, reason } => Some(format!("{host} {reason}")),
            _ => None,
        })
        .collect();
    assert_eq!(refused.len(), 4, "{refused:?}");
    assert!(
        refused[0].contains("example.org:443 not on the job's list"),
        "{refused:?}"
    );
    assert!(refused[1].contains("metadata"), "{refused:?}");
    assert!(refused[2].contains("loopback"), "{refused:?}");
    assert!(
        refused[3].contains("10.0.0.1:80") && refused[3].contains("private"),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_blocked_agent_says_what_it_needs() {
    let stage = Stage::new([runs("true"), says("BLOCKED: which colour?")]).await;
    let result = stage.run(&stage.request("r1", 1)).await;
    assert_eq!(result.status, protocol::ResultStatus::Blocked);
    let failure = result.failure.unwrap();
    assert_eq!(failure.kind, spawner::kind::AGENT_BLOCKED);
    assert_eq!(failure.message, "which colour?");
    assert_eq!(result.usage.input_tokens, 200);
}
