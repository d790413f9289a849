//! The broker: the one way out of a worker, on a Unix socket of its own for every job.
//!
//! A request has to carry the job's random key; who the worker is (project, job, task) is known
//! from the socket and never taken from what it sends. The key is forgotten with the broker.
//!
//! * `POST /v1/chat/completions`, `GET /v1/models`: the model, metered and budgeted ([`model`]).
//! * `POST /v1/messages`, `POST /v1/messages/count_tokens`, `POST /v1/responses`: the same for agents that speak Anthropic's
//!   format or OpenAI's newer one ([`native`]).
//! * `POST /v1/progress`, `POST /v1/result`: what the worker says ([`said`]).
//! * `CONNECT` and absolute-form requests: the proxy to the hosts that the job may reach ([`proxy`]).

mod allow;
mod ledger;
mod model;
mod native;
mod proxy;
mod reach;
mod room;
mod said;
#[cfg(test)]
mod tests;

use crate::events::Events;
use crate::runtime::SOCKET;
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
use ports::{WireFormat, WorkerModels};
use protocol::{SpawnRequest, Usage};
pub(crate) use said::{Said, Status};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
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

/// What a worker can ask for.
const KNOWN: [&str; 7] = [
    "/v1/chat/completions",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/progress",
    "/v1/responses",
    "/v1/result",
];

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
    room: room::Room,
    end: CancellationToken,
    tasks: TaskTracker,
}

impl Broker {
    /// Listens for a worker of a request that will be started. `state` is a folder of ours that no worker sees.
    pub(crate) fn start(
        request: Arc<SpawnRequest>,
        models: Arc<dyn WorkerModels>,
        events: Events,
        state: &Path,
    ) -> io::Result<Self> {
        Self::with(request, models, events, state, proxy::Resolver::default())
    }

    /// Listens for a worker that a former process has started: in the same folder, for the key that it has.
    pub(crate) fn go_on(
        request: Arc<SpawnRequest>,
        models: Arc<dyn WorkerModels>,
        events: Events,
        state: &Path,
    ) -> io::Result<Self> {
        let ledger = Ledger::open(&request, state)?;
        let key_hash = ledger.key_hash().ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::NotFound,
                "nothing is known any more of the key that the worker has",
            )
        })?;
        let resolver = proxy::Resolver::default();
        Self::listen_for(request, models, events, state, resolver, ledger, key_hash)
    }

    fn with(
        request: Arc<SpawnRequest>,
        models: Arc<dyn WorkerModels>,
        events: Events,
        state: &Path,
        resolver: proxy::Resolver,
    ) -> io::Result<Self> {
        let key = format!("artel-{}", hex::encode(rand::random::<[u8; 32]>()));
        let key_hash = Sha256::digest(key.as_bytes()).into();
        let ledger = Ledger::open(&request, state)?;
        ledger.keep_key(&key_hash)?;
        let mut broker =
            Self::listen_for(request, models, events, state, resolver, ledger, key_hash)?;
        broker.key = key;
        Ok(broker)
    }

    fn listen_for(
        request: Arc<SpawnRequest>,
        models: Arc<dyn WorkerModels>,
        events: Events,
        state: &Path,
        resolver: proxy::Resolver,
        ledger: Ledger,
        key_hash: [u8; 32],
    ) -> io::Result<Self> {
        let folder = socket_folder(state)?;
        let socket = folder.join(SOCKET);
        // A process that was killed leaves it.
        crate::places::remove_any(&socket)?;
        let listener = UnixListener::bind(&socket)?;
        // The worker is somebody else; nobody but workers gets as far as the folder.
        std::fs::set_permissions(&socket, Permissions::from_mode(0o666))?;
        let end = CancellationToken::new();
        let inner = Arc::new(Inner {
            key_hash,
            allow: AllowList::new(&request.network.allow),
            said: watch::Sender::new(ledger.said()),
            request,
            models,
            ledger,
            events,
            resolver,
            room: room::Room::new(),
            end: end.clone(),
            tasks: TaskTracker::new(),
        });
        // What the worker asks for is part of its span.
        tokio::spawn(Arc::clone(&inner).listen(listener).in_current_span());
        Ok(Self {
            socket,
            key: String::new(),
            inner,
            end,
        })
    }

    /// The folder of the socket, on the host. It stays when this ends, so that a worker that has it mounted finds the next socket.
    pub(crate) fn folder(&self) -> &Path {
        self.socket.parent().unwrap_or(&self.socket)
    }

    /// The socket, on the host.
    #[cfg(test)]
    fn socket(&self) -> &Path {
        &self.socket
    }

    /// The job's key; empty when only a worker that was started before knows it.
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

    /// Answers no further question of the worker, because what pays for them is used up. What is being answered comes to its end.
    pub(crate) fn end_of_budget(&self) {
        self.inner.ledger.end();
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
    }
}

/// The folder of the socket, which is the same for every process that serves this workspace: in the state folder, or, as the
/// path of a socket has to be short (108 bytes), in a temporary one whose name is kept there.
fn socket_folder(state: &Path) -> io::Result<PathBuf> {
    let near = state.join("broker");
    let folder = if near.join(SOCKET).as_os_str().len() < 100 {
        near
    } else {
        let note = state.join("broker-at");
        match std::fs::read_to_string(&note) {
            Ok(kept) if is_private_folder(Path::new(&kept)) => Path::new(&kept).join("broker"),
            _ => {
                std::fs::create_dir_all(state)?;
                let name = format!("artel-{}", hex::encode(rand::random::<[u8; 8]>()));
                let folder = std::env::temp_dir().join(name);
                std::fs::create_dir(&folder)?;
                crate::places::private_folder(&folder)?;
                crate::places::write_whole(&note, folder.as_os_str().as_encoded_bytes())?;
                folder.join("broker")
            }
        }
    };
    std::fs::create_dir_all(&folder)?;
    // The folder around it is closed to everybody else; a worker gets this one alone, and may pass through it.
    std::fs::set_permissions(&folder, Permissions::from_mode(0o711))?;
    Ok(folder)
}

/// Whether only we can have made this.
fn is_private_folder(path: &Path) -> bool {
    let me = std::fs::metadata("/proc/self").map(|me| me.uid());
    std::fs::symlink_metadata(path).is_ok_and(|meta| {
        meta.is_dir() && meta.mode() & 0o777 == 0o700 && me.is_ok_and(|me| me == meta.uid())
    })
}

/// Whether a worker of this request has reported, in whatever process.
pub(crate) fn has_report(request: &SpawnRequest, state: &Path) -> bool {
    Ledger::open(request, state).is_ok_and(|ledger| ledger.said().is_some())
}

/// Removes what the [`Broker`] of a process that died has left of its way in. Nobody may work there meanwhile.
pub(crate) fn forget(state: &Path) -> io::Result<()> {
    crate::places::remove_any(&state.join("broker").join(SOCKET))?;
    forget_folder(state)
}

/// Removes what [`Broker`] keeps outside of the state folder.
pub(crate) fn forget_folder(state: &Path) -> io::Result<()> {
    match std::fs::read_to_string(state.join("broker-at")) {
        Ok(kept) if is_private_folder(Path::new(&kept)) => {
            crate::places::remove_any(Path::new(&kept))?;
            crate::places::remove_any(&state.join("broker-at"))
        }
        _ => Ok(()),
    }
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
        let path = request.uri().path().to_owned();
        let wrong = |status, code: &str, message: &str| {
            if path.starts_with("/v1/messages") {
                native::anthropic_problem(status, message)
            } else {
                problem(status, code, message)
            }
        };
        if !self.is_ours(request.headers(), false) {
            // Who is still sending would find the connection closed and never see why.
            let _ = read(request, MAX_SAID_BYTES).await;
            return wrong(
                StatusCode::UNAUTHORIZED,
                "unauthorized",
                "the broker needs the job's key: `Authorization: Bearer $ARTEL_BROKER_KEY`",
            );
        }
        let format = match path.as_str() {
            "/v1/messages" => Some(WireFormat::Messages),
            "/v1/messages/count_tokens" => Some(WireFormat::CountTokens),
            "/v1/responses" => Some(WireFormat::Responses),
            _ => None,
        };
        if let (&Method::POST, Some(format)) = (request.method(), format) {
            let headers = native::kept(request.headers());
            let beta = request.uri().query() == Some("beta=true");
            return match self.question(request).await {
                Ok((body, _taken)) => native::pass(&self, format, headers, beta, &body).await,
                Err((status, code, message)) => wrong(status, code, &message),
            };
        }
        match (request.method(), path.as_str()) {
            (&Method::POST, "/v1/chat/completions") => match self.question(request).await {
                Ok((body, _taken)) => model::complete(&self, body).await,
                Err((status, code, message)) => problem(status, code, &message),
            },
            (&Method::GET, "/v1/models") => model::list(&self),
            (&Method::POST, "/v1/result") => match read(request, MAX_SAID_BYTES).await {
                Ok(body) => said::result(&self, &body),
                Err((status, code, message)) => problem(status, code, &message),
            },
            (&Method::POST, "/v1/progress") => match read(request, MAX_SAID_BYTES).await {
                Ok(body) => said::progress(&self, &body),
                Err((status, code, message)) => problem(status, code, &message),
            },
            (method, known) if KNOWN.contains(&known) => wrong(
                StatusCode::METHOD_NOT_ALLOWED,
                "method",
                &format!("{method} is not possible on {path}"),
            ),
            _ => wrong(
                StatusCode::NOT_FOUND,
                "not_found",
                &format!("the broker has no {path}; it has {}", KNOWN.join(", ")),
            ),
        }
    }

    /// A question to the model, and the room that it takes until it is answered.
    async fn question(&self, request: Request<Incoming>) -> Result<(Bytes, room::Taken), Wrong> {
        let mut taken = room::Taken::default();
        let mut full = None;
        let body = read_while(request, MAX_MODEL_BYTES, |bytes| {
            full = self.room.hold(&mut taken, bytes).err();
            full.is_none()
        })
        .await?;
        let full = match full {
            None => self.room.hold_parsed(&mut taken, &body).err(),
            full => full,
        };
        match full {
            None => Ok((body, taken)),
            Some(room::Full::Now) => Err((
                StatusCode::TOO_MANY_REQUESTS,
                "too_much_at_once",
                "the questions of this worker that are not answered yet are too large together; ask again when one is".to_owned(),
            )),
            Some(room::Full::Ever) => Err((
                StatusCode::PAYLOAD_TOO_LARGE,
                "too_large",
                "the question has too many parts to be taken apart here".to_owned(),
            )),
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

/// The status, the code and the words of a refusal.
type Wrong = (StatusCode, &'static str, String);

/// A body of at most `limit` bytes. Some of a longer one is read and dropped, because a client that
/// is still sending would not see the answer.
async fn read(request: Request<Incoming>, limit: usize) -> Result<Bytes, Wrong> {
    read_while(request, limit, |_| true).await
}

/// The same, as long as there is room for so many bytes; when there is not, nothing is kept, and no error is given.
async fn read_while(
    request: Request<Incoming>,
    limit: usize,
    mut has_room: impl FnMut(usize) -> bool,
) -> Result<Bytes, Wrong> {
    let mut keeps = true;
    let mut body = request.into_body();
    let mut kept = BytesMut::new();
    let mut seen: usize = 0;
    let all = async {
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                seen = seen.saturating_add(data.len());
                if keeps && seen <= limit && !has_room(seen) {
                    keeps = false;
                    kept = BytesMut::new();
                }
                if keeps && seen <= limit {
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
        Ok(Ok(())) => Err((
            StatusCode::PAYLOAD_TOO_LARGE,
            "too_large",
            format!("a body may have at most {limit} bytes"),
        )),
        Ok(Err(error)) => Err((
            StatusCode::BAD_REQUEST,
            "body",
            format!("the body could not be read: {error}"),
        )),
        Err(_) => Err((
            StatusCode::REQUEST_TIMEOUT,
            "body",
            "the body did not arrive within a minute".to_owned(),
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
