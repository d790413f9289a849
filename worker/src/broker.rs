//! The worker's side of the broker: progress, and the one report at the end.

use crate::environment::Environment;
use crate::http;
use serde_json::json;
use std::time::Duration;

/// The pauses between tries to deliver the report, in milliseconds.
const PAUSES_MS: [u64; 10] = [
    100, 400, 1_600, 3_200, 5_000, 10_000, 20_000, 40_000, 40_000, 0,
];

/// What a worker says at its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// The task is done and committed.
    Succeeded {
        /// What was done, in Markdown.
        summary: String,
    },
    /// It did not work out.
    Failed {
        /// What was done, in Markdown.
        summary: String,
        /// Why it failed.
        reason: String,
    },
    /// It cannot go on without somebody's help.
    Blocked {
        /// What was done, in Markdown.
        summary: String,
        /// What is missing.
        reason: String,
    },
}

impl Report {
    /// The report in one line, for the log.
    pub fn line(&self) -> String {
        match self {
            Self::Succeeded { .. } => "succeeded".to_owned(),
            Self::Failed { reason, .. } => format!("failed: {reason}"),
            Self::Blocked { reason, .. } => format!("blocked: {reason}"),
        }
    }

    fn body(&self) -> serde_json::Value {
        match self {
            Self::Succeeded { summary } => json!({"status": "succeeded", "summary": summary}),
            Self::Failed { summary, reason } => {
                json!({"status": "failed", "summary": summary, "reason": reason})
            }
            Self::Blocked { summary, reason } => {
                json!({"status": "blocked", "summary": summary, "reason": reason})
            }
        }
    }
}

/// Why a report did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The client could not be made.
    #[error("cannot make an HTTP client for the broker")]
    Client(#[source] reqwest::Error),
    /// The broker refused it.
    #[error("the broker answered {status}: {body}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The broker's words.
        body: String,
    },
    /// The broker could not be reached.
    #[error("the broker at {url} cannot be reached: {reason}")]
    Unreachable {
        /// Its address.
        url: String,
        /// What happened last.
        reason: String,
    },
}

/// A client of the broker.
#[derive(Clone)]
pub struct Broker {
    client: reqwest::Client,
    url: String,
    key: String,
}

impl Broker {
    /// A client for the broker of this environment.
    pub fn new(environment: &Environment) -> Result<Self, Error> {
        Ok(Self {
            client: http::client(&environment.broker_url, Duration::from_secs(20))
                .map_err(Error::Client)?,
            url: environment.broker_url.clone(),
            key: environment.broker_key.clone(),
        })
    }

    /// Says what the worker is doing. Nobody depends on it, so a failure is only a line in the log.
    pub async fn progress(&self, text: &str, step: u32) {
        let text: String = text.chars().take(300).collect();
        let sent = self
            .client
            .post(format!("{}/v1/progress", self.url))
            .bearer_auth(&self.key)
            .timeout(Duration::from_secs(5))
            .json(&json!({"text": text, "step": step}))
            .send()
            .await;
        match sent {
            Ok(response) if response.status().is_success() => {}
            Ok(response) => println!("artel-agent: progress was refused: {}", response.status()),
            Err(error) => println!("artel-agent: no progress sent: {}", http::chain(&error)),
        }
    }

    /// Delivers the report; a report that was recorded before is delivered. Tries for two minutes: a spawner that is being
    /// started again is back by then.
    pub async fn report(&self, report: &Report) -> Result<(), Error> {
        let mut reason = String::new();
        for pause_ms in PAUSES_MS {
            let sent = self
                .client
                .post(format!("{}/v1/result", self.url))
                .bearer_auth(&self.key)
                .timeout(Duration::from_secs(20))
                .json(&report.body())
                .send()
                .await;
            match sent {
                Ok(mut response) => {
                    let status = response.status();
                    if status.is_success() || status.as_u16() == 409 {
                        return Ok(());
                    }
                    let body = http::body(&mut response, 2000).await.unwrap_or_default();
                    if !status.is_server_error() {
                        let status = status.as_u16();
                        return Err(Error::Refused { status, body });
                    }
                    reason = format!("{status} {body}");
                }
                Err(error) => reason = http::chain(&error),
            }
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
        }
        Err(Error::Unreachable {
            url: self.url.clone(),
            reason,
        })
    }
}
