//! Requests that nobody can carry out: each is answered with its kind, with evidence, and with who can mend it.

use crate::stage::{Stage, Turn, kind};
use ports::ModelError;
use protocol::{ResultStatus, Source, SpawnRequest, WorkerResult};

/// What became of a request that was edited.
async fn answered(edit: impl FnOnce(&mut SpawnRequest)) -> WorkerResult {
    let stage = Stage::new([]).await;
    let mut request = stage.script("r1", 1, "echo begun; exit 3");
    edit(&mut request);
    let result = stage.run(&request).await;
    assert_eq!(result.status, ResultStatus::Failed, "{result:#?}");
    assert_eq!(stage.pushed(), None);
    result
}

#[track_caller]
fn says(result: &WorkerResult, wanted: &str, who: &str, evidence: &str) {
    assert_eq!(kind(result), wanted, "{result:#?}");
    let failure = result.failure.as_ref().unwrap();
    assert!(failure.message.contains(who), "{failure:#?}");
    assert!(failure.evidence.contains(evidence), "{failure:#?}");
    assert!(!failure.evidence.is_empty());
}

#[tokio::test]
async fn a_repository_that_is_not_there_is_said_so_with_who_can_bring_it_back() {
    let result = answered(|request| {
        request.repository.source = Source::Path("/no/such/repository.git".into());
    })
    .await;
    says(
        &result,
        spawner::kind::REPOSITORY_MISSING,
        "an admin has to bring it back",
        "No such file or directory",
    );
}

#[tokio::test]
async fn a_base_that_is_not_in_the_repository_is_said_so_with_what_is_there() {
    let base = "0123456789012345678901234567890123456789";
    let result = answered(|request| request.repository.base_sha = base.into()).await;
    says(
        &result,
        spawner::kind::BASE_MISSING,
        "its owner has to",
        base,
    );
    let failure = result.failure.unwrap();
    assert!(failure.evidence.contains(" main"), "{failure:#?}");
}

#[tokio::test]
async fn an_agent_that_is_not_installed_is_said_so_with_those_that_are_known() {
    let result = answered(|request| request.agent.adapter = "telepathy".into()).await;
    says(
        &result,
        spawner::kind::AGENT_MISSING,
        "ARTEL_AGENT can be artel-agent, command",
        "telepathy",
    );
    let result = answered(|request| request.agent.command = vec!["/no/such/agent".into()]).await;
    says(
        &result,
        spawner::kind::AGENT_MISSING,
        "/no/such/agent",
        "/no/such/agent",
    );
}

#[tokio::test]
async fn a_model_endpoint_that_is_down_is_said_so_with_its_words() {
    let down = ModelError::Unavailable {
        endpoint: "http://127.0.0.1:1/v1".into(),
        message: "connection refused".into(),
        status: None,
        retryable: false,
    };
    let stage = Stage::new([Turn::Fail(down)]).await;
    // An agent that asks once; the built-in one would go on asking for a while.
    let ask = r#"curl -s -H "Authorization: Bearer $OPENAI_API_KEY" -H 'content-type: application/json' \
        -d '{"model": "m", "messages": [{"role": "user", "content": "hi"}]}' "$OPENAI_BASE_URL/chat/completions"
        exit 1"#;
    let result = stage.run_script(ask).await;
    assert_eq!(result.status, ResultStatus::Failed, "{result:#?}");
    says(
        &result,
        spawner::kind::MODEL_UNAVAILABLE,
        "connection refused",
        "http://127.0.0.1:1/v1",
    );
}
