//! What a log may know of a model call: who asked, which model, how many tokens. Never what was said.

mod support;

use std::io::Write;
use std::sync::{Arc, Mutex};

use models::Provider;
use ports::{Models, WorkerModels};
use support::{
    Book, Reply, Server, call, config, delta, drain, error, says, worker_body, worker_call,
};
use tracing_subscriber::fmt::format::FmtSpan;

#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_call_is_a_span_with_its_tokens_and_without_its_words() {
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_env_filter("models=trace")
        .with_span_events(FmtSpan::CLOSE)
        .with_writer(move || writer.clone())
        .json()
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);

    let server = Server::scripted([
        error(500, "oops"),
        Reply::Cut(vec![delta("canary-half")]),
        says("canary-answer", 11, 22),
        says("canary-worker", 33, 44),
    ])
    .await;
    let book = Arc::new(Book::default());
    let provider = Provider::new(&config(&server.base_url), book).unwrap();
    provider.ask(&call("k", "canary-question")).await.unwrap();
    let request = worker_call("r1", worker_body(0, true));
    let (answer, _) = provider.complete(request).await.unwrap();
    drain(answer).await;

    let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
    assert!(!text.contains("canary"), "{text}");
    let closed: Vec<serde_json::Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|line: &serde_json::Value| line["fields"]["message"] == "close")
        .collect();
    let span = &closed[0]["span"];
    assert_eq!(span["name"], "model_call");
    assert_eq!(
        (&span["role"], &span["model"]),
        (&"architect".into(), &"m".into())
    );
    assert_eq!(
        (&span["input_tokens"], &span["output_tokens"]),
        (&11.into(), &22.into())
    );
    assert_eq!(span["job"], "job-1");
    // In full, as the engine's spans name it.
    let thread = format!("{}/job-1", span["project"].as_str().unwrap());
    assert_eq!(span["thread"], thread);
    assert!(text.contains("trying again"), "{text}");
}
