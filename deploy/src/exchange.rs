//! One HTTP request to a service, over its socket or its port. Bounded in time and size; follows
//! no redirects, because an expectation is about the first answer.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::Request;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};

/// More of an answer is not read.
const MOST_BYTES: usize = 1 << 20;

/// Where a service is.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// A release's own door.
    Door(PathBuf),
    /// The public port on loopback.
    Port(u16),
}

/// What is asked.
pub(crate) struct Ask<'a> {
    pub method: &'a str,
    pub path: &'a str,
    pub headers: &'a BTreeMap<String, String>,
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("no answer within {0} s")]
    TimedOut(u64),
    #[error("cannot connect: {0}")]
    Connect(#[source] std::io::Error),
    #[error("the request cannot be sent: {0}")]
    Request(#[source] hyper::http::Error),
    #[error("the connection broke: {0}")]
    Broken(#[source] hyper::Error),
    #[error("the answer broke off or is larger than 1 MiB: {0}")]
    Body(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// The status and the body of the answer.
pub(crate) async fn exchange(
    place: &Place,
    ask: &Ask<'_>,
    within: Duration,
) -> Result<(u16, String), Error> {
    tokio::time::timeout(within, connect(place, ask))
        .await
        .unwrap_or(Err(Error::TimedOut(within.as_secs())))
}

async fn connect(place: &Place, ask: &Ask<'_>) -> Result<(u16, String), Error> {
    match place {
        Place::Door(socket) => {
            let stream = sandbox::relay::connect(socket).await;
            talk(stream.map_err(Error::Connect)?, ask, "127.0.0.1").await
        }
        Place::Port(port) => {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, *port));
            let stream = tokio::net::TcpStream::connect(address).await;
            talk(stream.map_err(Error::Connect)?, ask, &address.to_string()).await
        }
    }
}

async fn talk<S>(stream: S, ask: &Ask<'_>, host: &str) -> Result<(u16, String), Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut request = Request::builder().method(ask.method).uri(ask.path);
    let has = |name: &str| ask.headers.keys().any(|key| key.eq_ignore_ascii_case(name));
    if !has("host") {
        request = request.header("host", host);
    }
    for (name, value) in ask.headers {
        request = request.header(name, value);
    }
    let request = request
        .header("connection", "close")
        .body(Full::new(Bytes::from(ask.body.clone())))
        .map_err(Error::Request)?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(Error::Broken)?;
    // Ends with the sender, at the latest with this future.
    let carrying = tokio::spawn(connection);
    let guard = AbortOnDrop(carrying);
    let answer = sender.send_request(request).await.map_err(Error::Broken)?;
    let status = answer.status().as_u16();
    let body = Limited::new(answer.into_body(), MOST_BYTES)
        .collect()
        .await
        .map_err(Error::Body)?;
    drop(guard);
    Ok((
        status,
        String::from_utf8_lossy(&body.to_bytes()).into_owned(),
    ))
}

struct AbortOnDrop<T>(tokio::task::JoinHandle<T>);

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
