//! Endpoints that are broken or mean harm: whatever they send, a question to them ends, in a failure that says why.

mod support;

use std::sync::Arc;
use std::time::Duration;

use models::{Config, Provider};
use ports::{ModelError, Models, WireCall, WireFormat, WorkerModels};
use serde_json::json;
use support::{Book, Server, call, config, says, then_ask, worker_body, worker_call};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What is sent over and over, and how long between two pieces.
#[derive(Clone)]
struct Endless {
    begins: String,
    goes_on: Vec<u8>,
    wait: Duration,
}

impl Endless {
    /// As fast as it is taken.
    fn fast(begins: impl Into<String>, goes_on: &str) -> Self {
        // Large pieces, so that a slow machine gets to a limit soon.
        let goes_on = goes_on.repeat((64 * 1024 / goes_on.len()).max(1));
        Self {
            begins: begins.into(),
            goes_on: goes_on.into_bytes(),
            wait: Duration::ZERO,
        }
    }

    /// A byte now and then, well within the patience for silence.
    fn trickling(begins: impl Into<String>, goes_on: &str) -> Self {
        Self {
            begins: begins.into(),
            goes_on: goes_on.into(),
            wait: Duration::from_millis(50),
        }
    }
}

/// The head of an answer.
fn head(status: &str, kind: &str) -> String {
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n")
}

fn document() -> String {
    head("200 OK", "application/json")
}

fn events() -> String {
    head("200 OK", "text/event-stream")
}

/// A server that answers everything with this until nobody listens any more; its base URL.
async fn endless(endless: Endless) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let base_url = format!("http://{}/v1", listener.local_addr().unwrap());
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let endless = endless.clone();
            // Whoever asked goes away in the middle; that ends it.
            tokio::spawn(async move { drop(send(stream, &endless).await) });
        }
    });
    base_url
}

async fn send(mut stream: TcpStream, endless: &Endless) -> std::io::Result<()> {
    let mut seen = Vec::new();
    while !seen.windows(4).any(|four| four == b"\r\n\r\n") {
        let mut piece = [0; 4096];
        let read = stream.read(&mut piece).await?;
        seen.extend_from_slice(&piece[..read]);
    }
    stream.write_all(endless.begins.as_bytes()).await?;
    loop {
        stream.write_all(&endless.goes_on).await?;
        tokio::time::sleep(endless.wait).await;
    }
}

/// One try, little patience with silence, and `total_s` for everything.
fn impatient(base_url: &str, total_s: u64) -> Config {
    let mut config = config(base_url);
    config.retry.tries = 1;
    config.timeouts.idle_s = 1;
    config.timeouts.total_s = total_s;
    config
}

fn provider(config: &Config) -> Provider {
    Provider::new(config, Arc::new(Book::default())).unwrap()
}

/// How a question ends that is asked in each form of the crew's and of workers: nothing waits for ever.
async fn ends(config: &Config, format: Option<WireFormat>, stream: bool) -> String {
    let provider = provider(config);
    let mut body = worker_body(0, stream);
    let ended = async {
        let error: ModelError = match format {
            None if stream => provider.ask(&call("k", "hi")).await.unwrap_err(),
            None => match provider.complete(worker_call("r", body)).await {
                Err(error) => error,
                Ok(_) => panic!("this is no answer"),
            },
            Some(format) => {
                body["input"] = json!([]);
                let call = WireCall {
                    call: worker_call("r", body),
                    format,
                    headers: Vec::new(),
                    beta: false,
                };
                match provider.native(call).await {
                    Err(error) => error.error,
                    Ok((ports::WireAnswer::Stream(stream), _)) => {
                        use futures::StreamExt as _;
                        let errors = stream.filter_map(async |piece| piece.err());
                        let mut errors = std::pin::pin!(errors);
                        errors.next().await.expect("it breaks").error
                    }
                    Ok(_) => panic!("this is no answer"),
                }
            }
        };
        assert!(matches!(error, ModelError::Unavailable { .. }), "{error}");
        assert_eq!(error.to_failure().kind, "model_unavailable");
        error.to_string()
    };
    tokio::time::timeout(Duration::from_mins(1), ended)
        .await
        .expect("it ends")
}

#[tokio::test]
async fn a_document_without_an_end_is_not_read_for_ever() {
    let document = document();
    for (begins, goes_on) in [
        ("{\"choices\": [{\"message\": {\"content\": \"", "word "),
        // Small on the wire and large in memory.
        ("{\"choices\": [", "[],"),
    ] {
        let base_url = endless(Endless::fast(format!("{document}{begins}"), goes_on)).await;
        let config = impatient(&base_url, 60);
        for format in [None, Some(WireFormat::Responses)] {
            let said = ends(&config, format, false).await;
            assert!(said.contains("longer than 8 MiB"), "{said}");
        }
    }
}

#[tokio::test]
async fn nothing_but_signs_of_life_ends_as_well() {
    // Blank space before a document, and comments in a stream.
    let comment = format!(": {}\n\n", "x".repeat(30_000));
    for (begins, goes_on) in [(document(), " \n"), (events(), &comment)] {
        let base_url = endless(Endless::fast(begins, goes_on)).await;
        let said = ends(&impatient(&base_url, 60), None, true).await;
        assert!(said.contains("longer than 8 MiB"), "{said}");
    }
}

#[tokio::test]
async fn headers_without_an_end_are_not_read_for_ever() {
    let head = "HTTP/1.1 200 OK\r\n";
    for (begins, goes_on) in [
        (head.to_owned(), "x-more: of it\r\n"),
        (format!("{head}x-long: "), "x"),
    ] {
        let base_url = endless(Endless::fast(begins, goes_on)).await;
        let said = ends(&impatient(&base_url, 60), None, true).await;
        assert!(said.contains("connection to it broke"), "{said}");
    }
    // Slowly: more patience than for silence they do not get.
    let base_url = endless(Endless::trickling(format!("{head}x-long: "), "x")).await;
    let said = ends(&impatient(&base_url, 60), None, true).await;
    assert!(said.contains("nothing came from it for 1 s"), "{said}");
}

#[tokio::test]
async fn an_answer_that_trickles_ends_with_the_time_for_the_call() {
    let trickling = async |begins: String| {
        let mut config = impatient(&endless(Endless::trickling(begins, "x")).await, 2);
        config.timeouts.idle_s = 60;
        config
    };
    let document = trickling(format!("{}{{\"choices\": \"", document())).await;
    let stream = trickling(format!("{}data: ", events())).await;
    let responses = Some(WireFormat::Responses);
    let all = futures::future::join_all([
        ends(&document, None, true),
        ends(&document, responses, true),
        ends(&stream, None, true),
        ends(&stream, responses, true),
    ]);
    for said in all.await {
        assert!(
            said.contains("the time for the whole call is over"),
            "{said}"
        );
    }
}

#[tokio::test]
async fn a_refusal_that_trickles_leaves_time_for_the_next_model() {
    let begins = head("503 Service Unavailable", "text/plain");
    let base_url = endless(Endless::trickling(begins, "x")).await;
    let second = Server::scripted([says("from the second", 1, 1)]).await;
    let mut config = impatient(&base_url, 20);
    config.timeouts.idle_s = 3;
    then_ask(&mut config, &second, "other");
    let answer = provider(&config).ask(&call("k", "hi")).await.unwrap();
    assert_eq!(answer.text, "from the second");
}

#[tokio::test]
async fn packed_bytes_are_not_unpacked() {
    let begins = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-encoding: gzip\r\ncontent-length: 65536\r\n\r\n";
    let base_url = endless(Endless::fast(begins, "\u{1f}\u{8b}\u{8}packed")).await;
    let said = ends(&impatient(&base_url, 60), None, true).await;
    assert!(said.contains("neither JSON nor a stream"), "{said}");
    // And nobody asks for them.
    let server = Server::scripted([says("hi", 1, 1)]).await;
    provider(&config(&server.base_url))
        .ask(&call("k", "hi"))
        .await
        .unwrap();
    assert!(server.seen()[0].headers.get("accept-encoding").is_none());
}

#[tokio::test]
async fn a_list_of_models_without_an_end_is_no_list() {
    support::install_tls();
    let begins = format!("{}{{\"data\": [", document());
    let base_url = endless(Endless::fast(begins, "{\"id\": \"m\"},")).await;
    let within = Duration::from_mins(1);
    let offered = tokio::time::timeout(within, models::offered_models(&base_url, None, within));
    assert_eq!(offered.await.expect("it ends"), None);
    let checked = tokio::time::timeout(within, models::live_check(&base_url, None, "m"));
    let error = checked.await.expect("it ends").unwrap_err().to_string();
    assert!(error.contains("longer than 8 MiB"), "{error}");

    // A long one is taken in part, and as words.
    let names: Vec<_> = (0..5_000)
        .map(|n| json!({"id": format!("model-{n}\u{1b}[2J")}))
        .chain([json!({"id": "x".repeat(10_000)})])
        .rev()
        .collect();
    let body = json!({"data": names});
    let server = Server::with(move |_| support::json_reply(200, &body)).await;
    let offered = models::offered_models(&server.base_url, None, within).await;
    let offered = offered.expect("a list");
    assert_eq!((offered.len(), offered[0].as_str()), (1_000, "model-4999"));
}
