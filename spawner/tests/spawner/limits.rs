//! Limits, each with its own kind of failure.

use crate::stage::{Stage, Turn, kind, runs, says};
use ports::{ModelError, ProjectId, Role};
use protocol::ResultStatus;

#[tokio::test]
async fn the_wall_clock_ends_a_worker() {
    let stage = Stage::new([]).await;
    let mut request = stage.script("r1", 1, "while true; do echo busy; sleep 0.1; done");
    request.limits.wall_s = 1;
    let result = stage.run(&request).await;
    assert_eq!(result.status, ResultStatus::TimedOut);
    assert_eq!(kind(&result), spawner::kind::LIMIT_WALL, "{result:#?}");
    assert!(result.usage.wall_s < 30.0);
}

#[tokio::test]
async fn silence_ends_a_worker() {
    let stage = Stage::new([]).await;
    let mut request = stage.script("r1", 1, "sleep 600");
    request.limits.idle_s = 1;
    let result = stage.run(&request).await;
    assert_eq!(result.status, ResultStatus::TimedOut);
    assert_eq!(kind(&result), spawner::kind::LIMIT_IDLE);
}

#[tokio::test]
async fn memory_ends_a_worker() {
    let stage = Stage::new([]).await;
    let script = "exec python3 -c 'import time; x = bytearray(300 << 20); x[::4096] = b\"x\" * len(x[::4096]); time.sleep(60)'";
    let mut request = stage.script("r1", 1, script);
    request.limits.memory_mb = 128;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_MEMORY, "{result:#?}");
}

#[tokio::test]
async fn processes_end_a_worker() {
    let stage = Stage::new([]).await;
    // A fork bomb that takes no refusal for an answer.
    let bomb = r"exec python3 -c '
import os, time
while True:
    try:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
    except OSError:
        time.sleep(0.05)
'";
    let mut request = stage.script("r1", 1, bomb);
    request.limits.pids = 30;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_PIDS, "{result:#?}");
}

#[tokio::test]
async fn disk_ends_a_worker() {
    let stage = Stage::new([]).await;
    let bomb = "i=0; while [ $i -lt 40 ]; do head -c 2000000 /dev/zero > big$i; i=$((i+1)); done; sleep 600";
    let mut request = stage.script("r1", 1, bomb);
    request.limits.disk_mb = 20;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::LIMIT_DISK, "{result:#?}");
}

#[tokio::test]
async fn the_jobs_token_budget_stops_the_model() {
    let stage = Stage::new([runs("true"), says("never asked for")]).await;
    let mut request = stage.request("r1", 1);
    // The first question fits, with the answer that is expected; the next one does not any more.
    request.limits.tokens = Some(2_200);
    let script = "x".repeat(4 * 1_200);
    stage.push_first(runs(&format!("echo {script}")));
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::BUDGET, "{result:#?}");
    assert!(result.failure.unwrap().message.contains("2200 tokens"));
    assert_eq!(stage.calls().len(), 1);
    assert_eq!(result.usage.input_tokens, 100);
}

#[tokio::test]
async fn why_the_model_gave_no_answer_is_the_kind_of_failure() {
    let budget = ModelError::Budget {
        project: ProjectId::new("p"),
        spent: "5 USD".into(),
        limit: "5 USD".into(),
    };
    let tape = ModelError::NotOnTape {
        tape: "demo".into(),
        role: Role::Developer,
        thread: "job-1/one".into(),
        turn: 0,
        hint: "record it".into(),
    };
    let refused = ModelError::Unavailable {
        endpoint: "http://model".into(),
        message: "wrong key".into(),
        status: Some(401),
        retryable: false,
    };
    let stage = Stage::new([]).await;
    for (n, (error, expected)) in (1..).zip([
        (budget, spawner::kind::BUDGET),
        (tape, spawner::kind::NOT_ON_TAPE),
        (ModelError::NotConfigured, spawner::kind::NO_MODEL),
        (refused, spawner::kind::MODEL_UNAVAILABLE),
    ]) {
        let words = error.to_string();
        stage.push_first(Turn::Fail(error));
        let result = stage.run(&stage.request(&format!("r{n}"), n)).await;
        assert_eq!(kind(&result), expected);
        assert_eq!(result.failure.unwrap().message, words);
    }
}
