//! The broker: the one way out of a worker, on a Unix socket of its own for every job.
//!
//! A request has to carry the job's random key; who the worker is (project, job, task) is known
//! from the socket and never taken from what it sends. The key is forgotten with the broker.
//!
//! * `POST /v1/chat/completions`, `GET /v1/models`: the model, metered and budgeted ([`model`]).
//! * `POST /v1/progress`, `POST /v1/result`: what the worker says ([`said`]).
//! * `CONNECT` and absolute-form requests: the proxy to the hosts that the job may reach ([`proxy`]).

mod allow;
mod ledger;
mod model;
mod proxy;
mod said;

use crate::events::Events;
use allow::AllowList;
use base64::Engine as _;
use bytes::{Bytes, BytesMut};
use futures::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::{
    AUTHORIZATION, CONTENT_TYPE, HeaderMap, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION,
};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use ledger::Ledger;
use ports::WorkerModels;
use protocol::{SpawnRequest, Usage};
pub(crate) use said::{Said, Status};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

/// Connections that a job may have at a time.
const MAX_CONNECTIONS: usize = 64;
/// Largest request to the model, in bytes.
const MAX_MODEL_BYTES: usize = 16 * 1024 * 1024;
/// Largest report or progress line, in bytes.
const MAX_SAID_BYTES: usize = 256 * 1024;

type Body = UnsyncBoxBody<Bytes, io::Error>;

/// A broker that listens. Dropping it ends every connection and removes the socket.
pub(crate) struct Broker {
    socket: PathBuf,
    key: String,
    inner: Arc<Inner>,
    end: CancellationToken,
}

struct Inner {
    key_hash: [u8; 32],
    request: Arc<SpawnRequest>,
    models: Arc<dyn WorkerModels>,
    allow: AllowList,
    ledger: Ledger,
    events: Events,
    said: watch::Sender<Option<Said>>,
    resolver: proxy::Resolver,
    end: CancellationToken,
    tasks: TaskTracker,
}

impl Broker {
    /// Listens for the worker of a request. `state` is a folder of ours that no worker sees.
    pub(crate) fn start(
        request: Arc<SpawnRequest>,
        models: Arc<dyn WorkerModels>,
        events: Events,
        state: &Path,
    ) -> io::Result<Self> {
        Self::with(request, models, events, state, proxy::Resolver::default())
    }

    fn with(
        request: Arc<SpawnRequest>,
        models: Arc<dyn WorkerModels>,
        events: Events,
        state: &Path,
        resolver: proxy::Resolver,
    ) -> io::Result<Self> {
        let key = format!("artel-{}", hex::encode(rand::random::<[u8; 32]>()));
        let socket = socket_path(state)?;
        let listener = UnixListener::bind(&socket)?;
        let end = CancellationToken::new();
        let ledger = Ledger::open(&request, state)?;
        let inner = Arc::new(Inner {
            key_hash: Sha256::digest(key.as_bytes()).into(),
            allow: AllowList::new(&request.network.allow),
            said: watch::Sender::new(ledger.said()),
            request,
            models,
            ledger,
            events,
            resolver,
            end: end.clone(),
            tasks: TaskTracker::new(),
        });
        // What the worker asks for is part of its span.
        tokio::spawn(Arc::clone(&inner).listen(listener).in_current_span());
        Ok(Self {
            socket,
            key,
            inner,
            end,
        })
    }

    /// The socket, on the host.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The job's key.
    pub(crate) fn key(&self) -> &str {
        &self.key
    }

    /// What the worker reported, if it did.
    pub(crate) fn said(&self) -> Option<Said> {
        self.inner.said.borrow().clone()
    }

    /// Waits for the worker's report.
    pub(crate) async fn wait_said(&self) {
        // The sender lives as long as we do.
        let _ = self.inner.said.subscribe().wait_for(Option::is_some).await;
    }

    /// Tokens and cost so far.
    pub(crate) fn usage(&self) -> Usage {
        self.inner.ledger.usage()
    }

    /// The kind and the words of the last model error, if no answer followed it.
    pub(crate) fn model_trouble(&self) -> Option<(&'static str, String)> {
        self.inner.ledger.trouble()
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.end.cancel();
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::debug!(socket = %self.socket.display(), %error, "cannot remove a socket");
        }
        if let Some(folder) = self.socket.parent() {
            // Only a folder of its own, made for a path that would have been too long, is empty.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// A path short enough for a socket (108 bytes): in the state folder, or in a private temporary one.
fn socket_path(state: &Path) -> io::Result<PathBuf> {
    let name = format!("{}.sock", hex::encode(rand::random::<[u8; 4]>()));
    let path = state.join(&name);
    if path.as_os_str().len() < 100 {
        return Ok(path);
    }
    let folder =
        std::env::temp_dir().join(format!("artel-{}", hex::encode(rand::random::<[u8; 8]>())));
    std::fs::create_dir(&folder)?;
    crate::places::private_folder(&folder)?;
    Ok(folder.join(name))
}

impl Inner {
    async fn listen(self: Arc<Self>, listener: UnixListener) {
        let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            let accepted = tokio::select! {
                () = self.end.cancelled() => return,
                accepted = async {
                    let permit = Arc::clone(&room).acquire_owned().await;
                    (permit, listener.accept().await)
                } => accepted,
            };
            match accepted {
                (Ok(permit), Ok((stream, _))) => {
                    let inner = Arc::clone(&self);
                    let connection = async move {
                        let end = inner.end.clone();
                        tokio::select! {
                            () = end.cancelled() => {}
                            () = inner.connection(stream) => {}
                        }
                        drop(permit);
                    };
                    self.tasks.spawn(connection.in_current_span());
                }
                (_, Err(error)) => {
                    tracing::warn!(%error, "a broker cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                (Err(_), _) => return,
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: UnixStream) {
        let service = service_fn(move |request| {
            let inner = Arc::clone(&self);
            async move { Ok::<_, std::convert::Infallible>(inner.answer(request).await) }
        });
        let served = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(Duration::from_secs(30))
            .max_buf_size(64 * 1024)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await;
        if let Err(error) = served {
            tracing::debug!(%error, "a worker's connection ended early");
        }
    }

    async fn answer(self: Arc<Self>, request: Request<Incoming>) -> Response<Body> {
        self.events.activity().touch();
        let is_proxy = request.method() == Method::CONNECT || request.uri().authority().is_some();
        if is_proxy {
            if !self.is_ours(request.headers(), true) {
                let mut refusal = problem(
                    StatusCode::PROXY_AUTHENTICATION_REQUIRED,
                    "unauthorized",
                    "the proxy needs the job's key: use HTTP_PROXY as it is given",
                );
                refusal.headers_mut().insert(
                    PROXY_AUTHENTICATE,
                    hyper::header::HeaderValue::from_static("Basic realm=\"artel\""),
                );
                return refusal;
            }
            return proxy::pass(&self, request).await;
        }
        if !self.is_ours(request.headers(), false) {
            return problem(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "the broker needs the job's key: `Authorization: Bearer $ARTEL_BROKER_KEY`",
            );
        }
        let path = request.uri().path().to_owned();
        match (request.method(), path.as_str()) {
            (&Method::POST, "/v1/chat/completions") => match read(request, MAX_MODEL_BYTES).await {
                Ok(body) => model::complete(&self, body).await,
                Err(refusal) => refusal,
            },
            (&Method::GET, "/v1/models") => model::list(&self),
            (&Method::POST, "/v1/result") => match read(request, MAX_SAID_BYTES).await {
                Ok(body) => said::result(&self, &body),
                Err(refusal) => refusal,
            },
            (&Method::POST, "/v1/progress") => match read(request, MAX_SAID_BYTES).await {
                Ok(body) => said::progress(&self, &body),
                Err(refusal) => refusal,
            },
            (_, "/v1/chat/completions" | "/v1/models" | "/v1/result" | "/v1/progress") => problem(
                StatusCode::METHOD_NOT_ALLOWED,
                "method",
                &format!("{} is not possible on {path}", request.method()),
            ),
            _ => problem(
                StatusCode::NOT_FOUND,
                "not_found",
                &format!(
                    "the broker has no {path}; it has /v1/chat/completions, /v1/models, /v1/progress and /v1/result"
                ),
            ),
        }
    }

    /// Whether a request carries the job's key. Hashes are compared, so that time tells nothing.
    fn is_ours(&self, headers: &HeaderMap, proxy: bool) -> bool {
        let names: &[_] = if proxy {
            &[PROXY_AUTHORIZATION.as_str()]
        } else {
            &[AUTHORIZATION.as_str(), "x-api-key"]
        };
        names
            .iter()
            .filter_map(|name| headers.get(*name)?.to_str().ok())
            .filter_map(given_key)
            .any(|key| <[u8; 32]>::from(Sha256::digest(key.as_bytes())) == self.key_hash)
    }
}

/// The key in `Bearer KEY`, `Basic base64(anybody:KEY)`, or by itself.
fn given_key(value: &str) -> Option<String> {
    match value.split_once(' ') {
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("bearer") => {
            Some(rest.trim().to_owned())
        }
        Some((scheme, rest)) if scheme.eq_ignore_ascii_case("basic") => {
            let bytes = base64::engine::general_purpose::STANDARD
                .decode(rest.trim())
                .ok()?;
            let text = String::from_utf8(bytes).ok()?;
            Some(text.split_once(':')?.1.to_owned())
        }
        Some(_) => None,
        None => Some(value.to_owned()),
    }
}

/// A body of at most `limit` bytes. Some of a longer one is read and dropped, because a client that
/// is still sending would not see the answer.
async fn read(request: Request<Incoming>, limit: usize) -> Result<Bytes, Response<Body>> {
    let mut body = request.into_body();
    let mut kept = BytesMut::new();
    let mut seen: usize = 0;
    let all = async {
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                seen = seen.saturating_add(data.len());
                if seen <= limit {
                    kept.extend_from_slice(&data);
                } else if seen > limit.saturating_mul(8) {
                    break;
                }
            }
        }
        Ok::<_, hyper::Error>(())
    };
    match tokio::time::timeout(Duration::from_mins(1), all).await {
        Ok(Ok(())) if seen <= limit => Ok(kept.freeze()),
        Ok(Ok(())) => Err(problem(
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_large",
            &format!("a body may have at most {limit} bytes"),
        )),
        Ok(Err(error)) => Err(problem(
            StatusCode::BAD_REQUEST,
            "body",
            &format!("the body could not be read: {error}"),
        )),
        Err(_) => Err(problem(
            StatusCode::REQUEST_TIMEOUT,
            "body",
            "the body did not arrive within a minute",
        )),
    }
}

/// An error in the form that clients of OpenAI's interface read.
fn problem(status: StatusCode, code: &str, message: &str) -> Response<Body> {
    reply(
        status,
        &json!({"error": {"message": message, "type": code, "code": code, "param": null}}),
    )
}

fn reply(status: StatusCode, value: &Value) -> Response<Body> {
    let body = Full::new(Bytes::from(value.to_string()))
        .map_err(|never| match never {})
        .boxed_unsync();
    with_type(status, "application/json", body)
}

fn streamed(
    events: impl Stream<Item = Result<Frame<Bytes>, io::Error>> + Send + 'static,
) -> Response<Body> {
    let body = StreamBody::new(events).boxed_unsync();
    with_type(StatusCode::OK, "text/event-stream", body)
}

fn with_type(status: StatusCode, kind: &'static str, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use ports::{ModelError, WorkerAnswer, WorkerCall};
    use protocol::{LocalTransport, suite};
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

    struct NoModels;

    #[async_trait::async_trait]
    impl WorkerModels for NoModels {
        async fn complete(
            &self,
            _: WorkerCall,
        ) -> Result<(WorkerAnswer, ports::Usage), ModelError> {
            Err(ModelError::NotConfigured)
        }
    }

    /// A broker whose names all lead to `host`, and which refuses no address.
    async fn broker(folder: &Path, host: std::net::SocketAddr) -> Broker {
        let mut request = suite::request("r");
        request.network.allow = vec!["site.example:80".to_owned()];
        let request = Arc::new(request);
        let bus = LocalTransport::open(folder.join("bus")).await.unwrap();
        let (events, _) = Events::start(Arc::new(bus), Arc::clone(&request));
        let resolver = proxy::Resolver {
            fixed: Some(host),
            forbidden: |_| None,
        };
        Broker::with(request, Arc::new(NoModels), events, folder, resolver).unwrap()
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
        let login =
            base64::engine::general_purpose::STANDARD.encode(format!("job:{}", broker.key()));

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
        drop(broker);
        assert_eq!(tunnel.read(&mut four).await.unwrap_or(0), 0);
        assert_eq!(
            std::fs::read_dir(folder.path())
                .unwrap()
                .filter(|e| e
                    .as_ref()
                    .unwrap()
                    .path()
                    .extension()
                    .is_some_and(|x| x == "sock"))
                .count(),
            0
        );
    }

    #[tokio::test]
    async fn a_home_with_a_long_name_still_has_sockets() {
        let folder = tempfile::tempdir().unwrap();
        let long = folder.path().join("x".repeat(120));
        std::fs::create_dir(&long).unwrap();
        let broker = broker(&long, "127.0.0.1:9".parse().unwrap()).await;
        let socket = broker.socket().to_owned();
        assert!(socket.exists() && socket.as_os_str().len() < 108);
        drop(broker);
        assert!(!socket.parent().unwrap().exists());
    }
}
