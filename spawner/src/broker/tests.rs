//! The broker by itself, over its socket.

mod keys;
mod native;
mod proxying;
mod together;

use super::*;
use futures::FutureExt as _;
use ports::{ModelError, WireAnswer, WireCall, WireError, WorkerAnswer, WorkerCall};
use protocol::{LocalTransport, suite};
use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Mutex;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;

#[test]
fn a_key_is_found_in_every_form_that_clients_send() {
    assert_eq!(given_key("Bearer k1").as_deref(), Some("k1"));
    assert_eq!(given_key("bearer  k1 ").as_deref(), Some("k1"));
    assert_eq!(given_key("Basic am9iOmsx").as_deref(), Some("k1"));
    assert_eq!(given_key("k1").as_deref(), Some("k1"));
    assert_eq!(given_key("Digest k1"), None);
    assert_eq!(given_key("Basic !"), None);
}

type Turn = Result<(WireAnswer, ports::Usage), WireError>;

/// What a stream of chat completions brings.
type Chat = Vec<Result<Bytes, ModelError>>;

/// Models that answer from a script.
#[derive(Default)]
struct Scripted {
    chat: Mutex<VecDeque<Chat>>,
    turns: Mutex<VecDeque<Turn>>,
    calls: Mutex<Vec<WireCall>>,
}

#[async_trait::async_trait]
impl WorkerModels for Scripted {
    async fn complete(&self, _: WorkerCall) -> Result<(WorkerAnswer, ports::Usage), ModelError> {
        let chat = self.chat.lock().unwrap().pop_front();
        let events = chat.ok_or(ModelError::NotConfigured)?;
        let stream = futures::StreamExt::boxed(futures::stream::iter(events));
        Ok((WorkerAnswer::Stream(stream), ports::Usage::default()))
    }

    async fn native(&self, call: WireCall) -> Turn {
        self.calls.lock().unwrap().push(call);
        let turn = self.turns.lock().unwrap().pop_front();
        turn.expect("the script has an answer for every question")
    }
}

/// How a test's proxy finds addresses.
fn resolver(
    look_up: impl Fn(&str) -> Vec<SocketAddr> + Send + Sync + 'static,
    forbidden: fn(std::net::IpAddr) -> Option<&'static str>,
) -> proxy::Resolver {
    let look_up = move |host: String, _| {
        let found = look_up(&host);
        async move { Ok(found) }.boxed()
    };
    proxy::Resolver::new(Box::new(look_up), forbidden)
}

/// A broker for a request that may reach `site.example`, with 10,000 tokens.
async fn broker_with(folder: &Path, models: &Arc<Scripted>, resolver: proxy::Resolver) -> Broker {
    broker_of(folder, models.clone(), resolver).await
}

/// The same with any models.
async fn broker_of(
    folder: &Path,
    models: Arc<dyn WorkerModels>,
    resolver: proxy::Resolver,
) -> Broker {
    let mut request = suite::request("r");
    request.network.allow = ["site.example:80", "site.example:443", "other.example"]
        .map(str::to_owned)
        .to_vec();
    request.limits.tokens = Some(10_000);
    let request = Arc::new(request);
    let bus = LocalTransport::open(folder.join("bus")).await.unwrap();
    let (events, _) = Events::start(Arc::new(bus), Arc::clone(&request));
    Broker::with(request, models, events, folder, resolver).unwrap()
}

/// A broker whose names all lead to `host`, and which refuses no address.
async fn broker(folder: &Path, host: SocketAddr) -> Broker {
    let resolver = resolver(move |_| vec![host], |_| None);
    broker_with(folder, &Arc::default(), resolver).await
}

fn login(key: &str) -> String {
    base64::engine::general_purpose::STANDARD.encode(format!("job:{key}"))
}

/// Sends what is written here and gives the answer's status, its headers in lower case, and its body as far as it comes.
async fn exchange(socket: &Path, request: &str) -> (u16, String, String) {
    let mut stream = UnixStream::connect(socket).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut seen = Vec::new();
    let read = stream.read_to_end(&mut seen);
    // The other side may end a stream roughly; what came until then is the answer.
    let _ = tokio::time::timeout(Duration::from_secs(20), read)
        .await
        .expect("an answer comes and ends");
    let text = String::from_utf8(seen).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.split(' ').nth(1).and_then(|word| word.parse().ok());
    (status.unwrap_or(0), head.to_lowercase(), body.to_owned())
}

/// Posts JSON with the key in a header of its own.
async fn post(broker: &Broker, path: &str, key: &str, body: &str) -> (u16, String, String) {
    let length = body.len();
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: b\r\nConnection: close\r\nx-api-key: {key}\r\nAnthropic-Beta: b1\r\nCookie: c\r\nContent-Length: {length}\r\n\r\n{body}"
    );
    exchange(broker.socket(), &request).await
}

async fn ask(broker: &Broker, text: String) -> BufReader<UnixStream> {
    let mut stream = UnixStream::connect(broker.socket()).await.unwrap();
    stream.write_all(text.as_bytes()).await.unwrap();
    BufReader::new(stream)
}

#[tokio::test]
async fn a_listed_host_is_reached_by_tunnel_and_by_request_without_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let broker = broker(folder.path(), listener.local_addr().unwrap()).await;
    let login = login(broker.key());

    let connect = format!(
        "CONNECT site.example:80 HTTP/1.1\r\nHost: site.example:80\r\nProxy-Authorization: Basic {login}\r\n\r\n"
    );
    let mut tunnel = ask(&broker, connect).await;
    let (mut host, _) = listener.accept().await.unwrap();
    let mut line = String::new();
    while line != "\r\n" {
        assert!(!line.contains("HTTP/1.1 4"), "{line}");
        line.clear();
        tunnel.read_line(&mut line).await.unwrap();
    }
    tunnel.get_mut().write_all(b"ping").await.unwrap();
    let mut four = [0; 4];
    host.read_exact(&mut four).await.unwrap();
    assert_eq!(&four, b"ping");
    host.write_all(b"pong").await.unwrap();
    tunnel.read_exact(&mut four).await.unwrap();
    assert_eq!(&four, b"pong");

    let get = format!(
        "GET http://site.example/page?x=1 HTTP/1.1\r\nHost: other\r\nX-Mine: yes\r\nConnection: X-Hop\r\nX-Hop: no\r\nProxy-Authorization: Basic {login}\r\n\r\n"
    );
    let mut answer = ask(&broker, get).await;
    let (mut host, _) = listener.accept().await.unwrap();
    let mut seen = vec![0; 4096];
    let read = host.read(&mut seen).await.unwrap();
    let seen = String::from_utf8_lossy(&seen[..read]).to_lowercase();
    assert!(seen.starts_with("get /page?x=1 http/1.1\r\n"), "{seen}");
    assert!(
        seen.contains("host: site.example\r\n") && seen.contains("x-mine: yes"),
        "{seen}"
    );
    assert!(
        !seen.contains("proxy-authorization") && !seen.contains("x-hop"),
        "{seen}"
    );
    host.write_all(b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok")
        .await
        .unwrap();
    line.clear();
    answer.read_line(&mut line).await.unwrap();
    assert_eq!(line, "HTTP/1.1 201 Created\r\n");

    // With the broker, everything that went through it ends.
    let socket = broker.socket().to_owned();
    assert!(socket.exists());
    drop(broker);
    assert_eq!(tunnel.read(&mut four).await.unwrap_or(0), 0);
    assert!(!socket.exists());
}

#[tokio::test]
async fn a_home_with_a_long_name_still_has_sockets_and_keeps_their_place() {
    let folder = tempfile::tempdir().unwrap();
    let long = folder.path().join("x".repeat(120));
    std::fs::create_dir(&long).unwrap();
    let first = broker(&long, "127.0.0.1:9".parse().unwrap()).await;
    let socket = first.socket().to_owned();
    assert!(socket.exists() && socket.as_os_str().len() < 108);
    let (request, events) = (Arc::clone(&first.inner.request), first.inner.events.clone());
    drop(first);
    assert!(!socket.exists());
    let models = Arc::new(Scripted::default());
    let second = Broker::start(request, models, events, &long).unwrap();
    assert_eq!(second.socket(), socket);
    drop(second);
    forget_folder(&long).unwrap();
    assert!(!socket.parent().unwrap().parent().unwrap().exists());
}

#[tokio::test]
async fn the_next_broker_knows_the_key_of_a_worker_that_is_still_there() {
    let folder = tempfile::tempdir().unwrap();
    let first = broker(folder.path(), "127.0.0.1:9".parse().unwrap()).await;
    let (request, key) = (Arc::clone(&first.inner.request), first.key().to_owned());
    let events = first.inner.events.clone();
    drop(first);
    let go_on = |request| {
        let models = Arc::new(Scripted::default());
        Broker::go_on(request, models, events.clone(), folder.path())
    };
    let second = go_on(Arc::clone(&request)).unwrap();
    for (key, expected) in [(key.as_str(), 200), ("other", 401)] {
        let get = format!(
            "GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n"
        );
        let (status, _, body) = exchange(second.socket(), &get).await;
        assert_eq!(status, expected, "{body}");
    }
    let kept = std::fs::read_to_string(folder.path().join("broker.json")).unwrap();
    assert!(!kept.contains(&key), "the key itself is nowhere");
    // Another request's worker has another key, whatever is kept.
    drop(second);
    let mut other = (*request).clone();
    other.request_id = "other".to_owned();
    assert!(go_on(Arc::new(other)).is_err());
}
