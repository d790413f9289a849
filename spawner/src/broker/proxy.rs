//! The proxy: to listed hosts, on public addresses that it resolved itself, and nowhere else.

use super::allow::{forbidden, own};
use super::{Body, Inner, problem};
use futures::FutureExt as _;
use futures::future::{self, BoxFuture, Either};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::header::{CONNECTION, HOST, HeaderName, HeaderValue};
use hyper::http::uri::{Authority, PathAndQuery};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::io::InspectReader;

/// How long resolving a name, or connecting, may take.
const PATIENCE: Duration = Duration::from_secs(15);
/// How long a host may take to answer a request that is not sent through a tunnel; its body may take longer.
const ANSWER_WITHIN: Duration = Duration::from_mins(5);
/// How long a tunnel that one side has ended may be silent.
const LINGER: Duration = Duration::from_mins(1);
/// Largest head of an answer, in bytes, and what is read ahead of one.
const MAX_HEAD: usize = 64 * 1024;
/// Addresses of a host that are tried.
const MAX_ADDRESSES: usize = 4;

/// Headers that are between two neighbours only.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// Tunnels that a job may have at a time.
const MAX_TUNNELS: usize = 64;

/// Gives the addresses of a host, with the port.
type LookUp =
    Box<dyn Fn(String, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// How names become addresses, and which addresses are refused. Tests have their own.
pub(super) struct Resolver {
    pub(super) look_up: LookUp,
    pub(super) forbidden: fn(IpAddr) -> Option<&'static str>,
    pub(super) tunnels: Arc<Semaphore>,
    pub(super) answer_within: Duration,
    pub(super) linger: Duration,
}

impl Resolver {
    pub(super) fn new(look_up: LookUp, forbidden: fn(IpAddr) -> Option<&'static str>) -> Self {
        Self {
            look_up,
            forbidden,
            tunnels: Arc::new(Semaphore::new(MAX_TUNNELS)),
            answer_within: ANSWER_WITHIN,
            linger: LINGER,
        }
    }
}

impl Default for Resolver {
    fn default() -> Self {
        let look_up = |host: String, port| {
            async move {
                let found = tokio::net::lookup_host((host.as_str(), port)).await?;
                Ok(found.collect())
            }
            .boxed()
        };
        Self::new(Box::new(look_up), |address| {
            forbidden(address).or_else(|| own(address))
        })
    }
}

/// Why a request does not go on.
struct Refusal {
    status: StatusCode,
    reason: String,
}

pub(super) async fn pass(inner: &Arc<Inner>, request: Request<Incoming>) -> Response<Body> {
    let Some((host, port)) = target(&request) else {
        let wrong = "the request does not name a host and a port";
        return problem(StatusCode::BAD_REQUEST, "proxy", wrong);
    };
    let tunnelled = request.method() == Method::CONNECT;
    // What is asked for in absolute form is bounded by the worker's connections; a tunnel outlives the one it began on.
    let Ok(room) = Arc::clone(&inner.resolver.tunnels).try_acquire_owned() else {
        let wrong = format!("a worker may have {MAX_TUNNELS} tunnels at a time");
        return problem(StatusCode::TOO_MANY_REQUESTS, "proxy", &wrong);
    };
    match connect(inner, &host, port).await {
        Ok(stream) if tunnelled => {
            tunnel(inner, request, stream, room);
            Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync())
        }
        Ok(stream) => forward(inner, request, stream).await,
        Err(refusal) => {
            let place = format!("{host}:{port}");
            inner.events.refused(&place, &refusal.reason);
            problem(
                refusal.status,
                "proxy",
                &format!("{place}: {}", refusal.reason),
            )
        }
    }
}

fn target(request: &Request<Incoming>) -> Option<(String, u16)> {
    let authority = request.uri().authority()?;
    let port = match (authority.port_u16(), request.uri().scheme_str()) {
        (Some(port), _) => port,
        (None, Some("http")) => 80,
        // An https address in absolute form would have to be opened here.
        _ => return None,
    };
    let host = authority
        .host()
        .trim_start_matches('[')
        .trim_end_matches(']');
    Some((host.to_owned(), port))
}

/// Connects to an allowed host on an address that is not refused. Every address has to pass: a name
/// that also stands for an inner address is a trick.
async fn connect(inner: &Inner, host: &str, port: u16) -> Result<TcpStream, Refusal> {
    let refusal = |status, reason: String| Refusal { status, reason };
    if !inner.allow.allows(host, port) {
        return Err(refusal(
            StatusCode::FORBIDDEN,
            "not on the job's list of hosts".to_owned(),
        ));
    }
    // Once: what is looked at here is what is connected to, whatever the name stands for a moment later.
    let looked = (inner.resolver.look_up)(host.to_owned(), port);
    let addresses = tokio::time::timeout(PATIENCE, looked)
        .await
        .map_err(|_| {
            refusal(
                StatusCode::GATEWAY_TIMEOUT,
                "the name was not resolved in time".to_owned(),
            )
        })?
        .map_err(|error| {
            refusal(
                StatusCode::BAD_GATEWAY,
                format!("the name cannot be resolved: {error}"),
            )
        })?;
    for address in &addresses {
        if let Some(reason) = (inner.resolver.forbidden)(address.ip()) {
            return Err(refusal(
                StatusCode::FORBIDDEN,
                format!("it stands for {}: {reason}", address.ip()),
            ));
        }
    }
    let mut last = "the name stands for no address".to_owned();
    for address in addresses.iter().take(MAX_ADDRESSES) {
        match tokio::time::timeout(PATIENCE, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => last = format!("{address}: {error}"),
            Err(_) => last = format!("{address}: no answer in time"),
        }
    }
    Err(refusal(StatusCode::BAD_GATEWAY, last))
}

/// Joins the worker's connection and the host's, until both have ended, one has and the other is silent, or the job has.
fn tunnel(
    inner: &Arc<Inner>,
    request: Request<Incoming>,
    stream: TcpStream,
    room: OwnedSemaphorePermit,
) {
    let end = inner.end.clone();
    let activity = inner.events.activity().clone();
    let linger = inner.resolver.linger;
    inner.tasks.spawn(async move {
        let _room = room;
        let join = async {
            let upgraded = hyper::upgrade::on(request)
                .await
                .map_err(io::Error::other)?;
            let passed = AtomicU64::new(0);
            let seen = |_: &[u8]| {
                activity.touch();
                passed.fetch_add(1, Ordering::Relaxed);
            };
            let (mut host, mut to_host) = tokio::io::split(stream);
            let (mut worker, mut to_worker) = tokio::io::split(TokioIo::new(upgraded));
            let there = pin!(pass_on(&mut worker, &mut to_host, seen));
            let back = pin!(pass_on(&mut host, &mut to_worker, seen));
            let mut rest = match future::try_select(there, back).await {
                Ok(Either::Left(((), back))) => Either::Left(back),
                Ok(Either::Right(((), there))) => Either::Right(there),
                Err(failed) => return Err(failed.factor_first().0),
            };
            // Either side may be gone without a word, or never end its half.
            loop {
                let before = passed.load(Ordering::Relaxed);
                match tokio::time::timeout(linger, &mut rest).await {
                    Ok(ended) => return ended,
                    Err(_) if passed.load(Ordering::Relaxed) == before => {
                        return Err(io::ErrorKind::TimedOut.into());
                    }
                    Err(_) => {}
                }
            }
        };
        tokio::select! {
            () = end.cancelled() => {}
            joined = join => if let Err(error) = joined {
                tracing::debug!(%error, "a worker's tunnel ended early");
            },
        }
        activity.touch();
    });
}

/// Passes on what one side of a tunnel sends, and then that it has ended.
async fn pass_on(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    seen: impl FnMut(&[u8]),
) -> io::Result<()> {
    tokio::io::copy(&mut InspectReader::new(from, seen), to).await?;
    to.shutdown().await
}

async fn forward(
    inner: &Arc<Inner>,
    mut request: Request<Incoming>,
    stream: TcpStream,
) -> Response<Body> {
    let failed = |error: hyper::Error| {
        problem(
            StatusCode::BAD_GATEWAY,
            "proxy",
            &format!("the host gave no answer: {error}"),
        )
    };
    if request.uri().scheme_str() != Some("http") {
        let wrong = "only http:// can be asked for this way; use CONNECT";
        return problem(StatusCode::BAD_REQUEST, "proxy", wrong);
    }
    let authority = request.uri().authority().cloned();
    let path = request.uri().path_and_query().cloned();
    *request.uri_mut() = Uri::from(path.unwrap_or_else(|| PathAndQuery::from_static("/")));
    strip(request.headers_mut());
    let host = authority
        .as_ref()
        .map(without_user)
        .and_then(|host| HeaderValue::from_str(host).ok());
    if let Some(host) = host {
        request.headers_mut().insert(HOST, host);
    }
    let handshake = hyper::client::conn::http1::Builder::new()
        .max_buf_size(MAX_HEAD)
        .handshake(TokioIo::new(stream))
        .await;
    let (mut sender, connection) = match handshake {
        Ok(pair) => pair,
        Err(error) => return failed(error),
    };
    let end = inner.end.clone();
    inner.tasks.spawn(async move {
        tokio::select! {
            () = end.cancelled() => {}
            ended = connection => if let Err(error) = ended {
                tracing::debug!(%error, "a connection of a worker's request ended early");
            },
        }
    });
    let answered = tokio::time::timeout(inner.resolver.answer_within, sender.send_request(request));
    let Ok(answered) = answered.await else {
        let wrong = format!(
            "the host gave no answer within {} s",
            inner.resolver.answer_within.as_secs()
        );
        return problem(StatusCode::GATEWAY_TIMEOUT, "proxy", &wrong);
    };
    match answered {
        // Nobody asked for that here, and what would follow is not read as answers any more.
        Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => problem(
            StatusCode::BAD_GATEWAY,
            "proxy",
            "the host wants to speak another protocol; use CONNECT",
        ),
        Ok(mut response) => {
            strip(response.headers_mut());
            let activity = inner.events.activity().clone();
            response.map(|body: Incoming| {
                body.map_frame(move |frame| {
                    activity.touch();
                    frame
                })
                .map_err(io::Error::other)
                .boxed_unsync()
            })
        }
        Err(error) => failed(error),
    }
}

fn without_user(authority: &Authority) -> &str {
    let text = authority.as_str();
    text.rsplit_once('@').map_or(text, |(_, host)| host)
}

fn strip(headers: &mut hyper::HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}
