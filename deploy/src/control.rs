//! How the deployer tells a supervisor what to do: one JSON line there, one back, a connection
//! each. Every order may be given twice.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ports::{Failure, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use zeroize::Zeroizing;

use crate::failures;
use crate::layout::Layout;

/// A longer line is refused.
pub(crate) const LINE_BYTES: u64 = 4 << 20;
/// How long an answer may take; retiring a release that does not want to end is the slowest.
const PATIENCE: Duration = Duration::from_secs(20);

/// An order.
#[derive(Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub(crate) enum Order {
    /// Says how it is.
    Status,
    /// Answers on this port too.
    Listen { port: u16 },
    /// Runs a release, if it does not run already. It is not live yet, and not restarted.
    Run(Start),
    /// Makes a running release live, on this port alone.
    Switch { release: u64, port: u16 },
    /// Ends a release.
    Retire { release: u64 },
    /// Ends everything, the supervisor included.
    Shutdown,
}

/// A release to run.
#[derive(Serialize, Deserialize)]
pub(crate) struct Start {
    pub release: u64,
    pub tree: PathBuf,
    pub command: Vec<String>,
    /// Values of secrets by name. They live in the supervisor's memory and nowhere else.
    pub secrets: BTreeMap<String, String>,
}

/// What the supervisor says.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Reply {
    Done(Status),
    Refused { kind: String, message: String },
}

/// How a supervisor is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Status {
    pub pid: u32,
    pub live: Option<u64>,
    pub ports: Vec<u16>,
    pub releases: Vec<ReleaseStatus>,
}

/// How a release is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct ReleaseStatus {
    pub release: u64,
    pub phase: Phase,
    /// Starts after the first one.
    pub restarts: u32,
    /// How it ended last, in words.
    pub last_end: Option<String>,
    /// The last lines that it wrote.
    pub tail: Vec<String>,
}

/// What a release does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Phase {
    Running,
    /// It died and will be started again.
    Waiting,
    /// It died too often, or before it was live.
    Failed,
}

impl Status {
    pub(crate) fn release(&self, number: u64) -> Option<&ReleaseStatus> {
        self.releases
            .iter()
            .find(|release| release.release == number)
    }
}

impl ReleaseStatus {
    /// What shows why it ended.
    pub(crate) fn evidence(&self) -> String {
        let end = self.last_end.as_deref().unwrap_or("it did not end");
        if self.tail.is_empty() {
            format!("{end}; it wrote nothing")
        } else {
            format!("{end}; its last lines:\n{}", self.tail.join("\n"))
        }
    }
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("nobody listens")]
    Nobody(#[source] std::io::Error),
    #[error("no reply within {} s", PATIENCE.as_secs())]
    Silent,
    #[error("the conversation broke off")]
    Broken(#[source] std::io::Error),
    #[error("what was said is not understood")]
    Malformed(#[source] serde_json::Error),
    #[error("{message}")]
    Refused { kind: String, message: String },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Refused { kind, message } if kind == "port_taken" => {
                Failure::new(kind, message).retryable()
            }
            Error::Refused { kind, message } => Failure::new(kind, message),
            other => {
                failures::supervisor(&format!("the service's supervisor cannot be told: {other}"))
            }
        }
    }
}

/// Gives an order and waits for the reply.
pub(crate) async fn tell(layout: &Layout, order: &Order) -> Result<Status, Error> {
    match tokio::time::timeout(PATIENCE, converse(layout, order)).await {
        Ok(Ok(Reply::Done(status))) => Ok(status),
        Ok(Ok(Reply::Refused { kind, message })) => Err(Error::Refused { kind, message }),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(Error::Silent),
    }
}

async fn converse(layout: &Layout, order: &Order) -> Result<Reply, Error> {
    let mut stream = sandbox::relay::connect(&layout.control())
        .await
        .map_err(Error::Nobody)?;
    // It may hold values of secrets.
    let mut line = Zeroizing::new(serde_json::to_vec(order).map_err(Error::Malformed)?);
    line.push(b'\n');
    stream.write_all(&line).await.map_err(Error::Broken)?;
    let mut reply = Vec::new();
    BufReader::new(stream)
        .take(LINE_BYTES)
        .read_until(b'\n', &mut reply)
        .await
        .map_err(Error::Broken)?;
    serde_json::from_slice(&reply).map_err(Error::Malformed)
}
