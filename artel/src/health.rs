//! `/health` of every process that lasts: whether it lives, and whether it has what it needs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use graph::Journal;
use protocol::Transport;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::home::Home;

/// How long the database and the bus may take to answer.
const PATIENCE: Duration = Duration::from_secs(4);

/// What a process needs to be ready.
#[derive(Clone)]
pub struct Needs {
    /// Room on its disk.
    pub home: Home,
    /// The database, by its journal; a spawner has none.
    pub journal: Option<Journal>,
    /// The bus, where this process uses it.
    pub transport: Option<Arc<dyn Transport>>,
}

/// Listens for questions about health. An address that nobody chose and another process has gives way to any free port.
pub async fn listen(config: &Config) -> anyhow::Result<(TcpListener, SocketAddr)> {
    let wanted = config.http_addr;
    let mut bound = TcpListener::bind(wanted).await;
    let taken = |error: &std::io::Error| error.kind() == std::io::ErrorKind::AddrInUse;
    if bound.as_ref().is_err_and(taken)
        && config.redis_url.is_some()
        && config.is_default("ARTEL_HTTP_ADDR")
    {
        bound = TcpListener::bind(SocketAddr::new(wanted.ip(), 0)).await;
    }
    let listener = bound.map_err(|error| {
        anyhow::anyhow!(
            "{wanted} cannot be listened on: {error}; set ARTEL_HTTP_ADDR to another address, 127.0.0.1:0 for any free port"
        )
    })?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

/// Answers until the end.
pub async fn serve(
    listener: TcpListener,
    needs: Needs,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/health", get(readiness))
        .route("/health/liveness", get(|| async { "alive\n" }))
        .route("/health/readiness", get(readiness))
        .with_state(needs);
    axum::serve(listener, router)
        .with_graceful_shutdown(shutdown.cancelled_owned())
        .await?;
    Ok(())
}

async fn within<T, E: std::fmt::Display>(
    asked: impl Future<Output = Result<T, E>>,
) -> Result<T, String> {
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
    }
}

async fn readiness(State(needs): State<Needs>) -> (StatusCode, axum::Json<serde_json::Value>) {
    let mut fine = true;
    let mut body = serde_json::Map::new();
    let mut say = |what: &str, result: Result<serde_json::Value, String>| {
        fine &= result.is_ok();
        body.insert(what.to_owned(), result.unwrap_or_else(Into::into));
    };
    if let Some(journal) = &needs.journal {
        say("database", within(journal.end()).await.map(|_| "ok".into()));
    }
    let disk = crate::disk::enough(needs.home.path());
    say(
        "disk",
        disk.map(|()| "ok".into())
            .map_err(|error| error.to_string()),
    );
    if let Some(transport) = &needs.transport {
        let spawners = within(transport.spawners()).await;
        if let Ok(spawners) = &spawners {
            // None of them is a wait that a project's status tells of, and no illness of this process.
            say("spawners", Ok(spawners.len().into()));
        }
        say("bus", spawners.map(|_| "ok".into()));
    }
    let status = if fine { "ready" } else { "not ready" };
    body.insert("status".to_owned(), status.into());
    let code = if fine {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, axum::Json(body.into()))
}

/// Asks the process at an address whether it is ready; gives what it said, and whether it is.
pub async fn ask(address: SocketAddr) -> anyhow::Result<(bool, String)> {
    // Who listens on every address is asked on loopback.
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let url = format!(
        "http://{}/health/readiness",
        SocketAddr::new(ip, address.port())
    );
    let client = reqwest::Client::builder()
        .no_proxy()
        .timeout(PATIENCE * 3)
        .build()?;
    let answer = client
        .get(&url)
        .send()
        .await
        .map_err(|error| anyhow::anyhow!("nothing answers at {url}: {error}"))?;
    Ok((answer.status().is_success(), answer.text().await?))
}
