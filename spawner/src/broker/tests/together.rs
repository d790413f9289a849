//! What a worker asks for at the same time, with one key.
#![allow(
    clippy::result_large_err,
    reason = "what the double answers is what the port answers"
)]

use super::*;
use futures::StreamExt as _;
use futures::stream;
use tokio::sync::Notify;

fn question(path: &str, key: &str, body: &str) -> String {
    format!(
        "POST {path} HTTP/1.1\r\nHost: b\r\nx-api-key: {key}\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )
}

async fn status(answer: &mut BufReader<UnixStream>) -> u16 {
    let mut line = String::new();
    let read = answer.read_line(&mut line);
    tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("an answer comes")
        .unwrap();
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn answers_that_are_still_streaming_hold_their_part_of_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let models = Arc::<Scripted>::default();
    for _ in 0..40 {
        let endless = stream::pending().boxed();
        let turn = Ok((WireAnswer::Stream(endless), ports::Usage::default()));
        models.turns.lock().unwrap().push_back(turn);
    }
    let broker = broker_with(folder.path(), &models, resolver(|_| Vec::new(), |_| None)).await;
    // About 1,000 of 10,000 tokens each, and as much for the answer as there is room for.
    let body = serde_json::json!({
        "max_tokens": 32_000, "stream": true,
        "messages": [{"role": "user", "content": "x".repeat(4_000)}],
    })
    .to_string();
    let mut open = Vec::new();
    for _ in 0..2 {
        let mut answer = ask(&broker, question("/v1/messages", broker.key(), &body)).await;
        assert_eq!(status(&mut answer).await, 200);
        open.push(answer);
    }
    let bounds = |models: &Scripted| -> Vec<u64> {
        let calls = models.calls.lock().unwrap();
        let bounds = calls.iter().map(|call| call.call.most_output.unwrap());
        bounds.collect()
    };
    let asked = bounds(&models);
    let all: u64 = asked.iter().sum::<u64>() + 2 * (body.len() as u64 / 4);
    assert!(asked[0] > 4_000 && asked[1] > 3_000, "{asked:?}");
    assert!(
        (9_000..=10_000).contains(&all),
        "what is asked for is what there is: {all}"
    );

    // The next one waits, and whoever leaves an answer makes room for it.
    let mut third = ask(&broker, question("/v1/messages", broker.key(), &body)).await;
    let waits = async {
        while broker.inner.tasks.len() < 3 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), waits)
        .await
        .unwrap();
    assert_eq!(bounds(&models).len(), 2, "it is not asked yet");
    open.pop();
    assert_eq!(status(&mut third).await, 200);
    assert_eq!(bounds(&models)[2], asked[1], "the room that was left");
}

/// Models that answer when they are told to.
#[derive(Default)]
struct Slow {
    asked: Notify,
    go: Notify,
}

#[async_trait::async_trait]
impl WorkerModels for Slow {
    async fn complete(&self, _: WorkerCall) -> Result<(WorkerAnswer, ports::Usage), ModelError> {
        Err(ModelError::NotConfigured)
    }

    async fn native(&self, _: WireCall) -> Turn {
        self.asked.notify_one();
        self.go.notified().await;
        let answer = serde_json::json!({"input_tokens": 1});
        Ok((WireAnswer::Json(answer), ports::Usage::default()))
    }
}

#[tokio::test]
async fn questions_that_are_large_in_memory_are_refused_before_they_are_taken_apart() {
    let folder = tempfile::tempdir().unwrap();
    let models = Arc::<Slow>::default();
    let resolver = resolver(|_| Vec::new(), |_| None);
    let broker = broker_of(folder.path(), models.clone(), resolver).await;
    // Counting is not in the job's budget.
    let path = "/v1/messages/count_tokens";
    let of = |parts: usize| {
        let nothing = "{\"\":{}},".repeat(parts / 4);
        format!("{{\"messages\": [{nothing}0]}}")
    };
    let bomb = of(1 << 20);
    let mut answer = ask(&broker, question(path, broker.key(), &bomb)).await;
    assert_eq!(
        status(&mut answer).await,
        413,
        "at no time there is so much"
    );

    // A sixth of all room each: so many fit that the seventh does not.
    let large = of(43_000);
    let mut open = Vec::new();
    for _ in 0..5 {
        let answer = ask(&broker, question(path, broker.key(), &large)).await;
        tokio::time::timeout(Duration::from_secs(20), models.asked.notified())
            .await
            .expect("the question is asked");
        open.push(answer);
    }
    let mut refused = ask(&broker, question(path, broker.key(), &of(86_000))).await;
    assert_eq!(status(&mut refused).await, 429);
    // An answer makes room again.
    models.go.notify_one();
    let again = async {
        loop {
            let mut answer = ask(&broker, question(path, broker.key(), &of(86_000))).await;
            tokio::select! {
                () = models.asked.notified() => return,
                status = status(&mut answer) => assert_eq!(status, 429),
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), again)
        .await
        .unwrap();
}
