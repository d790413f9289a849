//! What a worker says: its progress, and one report.

use super::{Body, Inner, problem, reply};
use hyper::{Response, StatusCode};
use protocol::EventKind;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Longest summary and reason that are kept, in bytes.
const KEPT_BYTES: usize = 64 * 1024;
/// Longest progress line, in characters.
const LINE_CHARS: usize = 300;

/// The report of a worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Said {
    pub(crate) status: Status,
    pub(crate) summary: String,
    /// Why it is not a success; empty when it is.
    pub(crate) reason: String,
}

/// How the worker says it went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Status {
    Succeeded,
    Failed,
    Blocked,
}

pub(super) fn result(inner: &Inner, body: &[u8]) -> Response<Body> {
    let said = match parse(body) {
        Ok(said) => said,
        Err(wrong) => return problem(StatusCode::BAD_REQUEST, "invalid", &wrong),
    };
    match inner.ledger.say(said.clone()) {
        Ok(true) => {
            inner.said.send_replace(Some(said));
            reply(StatusCode::OK, &json!({"recorded": true}))
        }
        Ok(false) => problem(
            StatusCode::CONFLICT,
            "already_reported",
            "this worker has reported its result already; the first report stands",
        ),
        Err(error) => {
            tracing::error!(request = inner.request.request_id, %error, "a report could not be kept");
            problem(
                StatusCode::SERVICE_UNAVAILABLE,
                "not_recorded",
                &format!("the report could not be written to disk ({error}); try again"),
            )
        }
    }
}

fn parse(body: &[u8]) -> Result<Said, String> {
    let value: Value =
        serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))?;
    let status = match value["status"].as_str() {
        Some("succeeded") => Status::Succeeded,
        Some("failed") => Status::Failed,
        Some("blocked") => Status::Blocked,
        _ => return Err("`status` must be succeeded, failed or blocked".to_owned()),
    };
    let text = |name: &str| match &value[name] {
        Value::Null => Ok(String::new()),
        Value::String(text) => Ok(text.chars().take(KEPT_BYTES / 4).collect::<String>()),
        _ => Err(format!("`{name}` must be a string")),
    };
    let (summary, reason) = (text("summary")?, text("reason")?);
    if status != Status::Succeeded && reason.trim().is_empty() {
        return Err("`reason` must say why it is not a success".to_owned());
    }
    Ok(Said {
        status,
        summary,
        reason,
    })
}

pub(super) fn progress(inner: &Inner, body: &[u8]) -> Response<Body> {
    let value: Value = match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(error) => {
            let wrong = format!("the body is not JSON: {error}");
            return problem(StatusCode::BAD_REQUEST, "invalid", &wrong);
        }
    };
    let Some(text) = value["text"].as_str() else {
        return problem(
            StatusCode::BAD_REQUEST,
            "invalid",
            "`text` must be a string",
        );
    };
    let step = value["step"]
        .as_u64()
        .and_then(|step| u32::try_from(step).ok());
    if let Some(step) = step {
        inner.events.step(step);
    }
    inner.events.say(EventKind::Progress {
        text: text.chars().take(LINE_CHARS).collect(),
        step,
    });
    reply(StatusCode::OK, &json!({"recorded": true}))
}

#[cfg(test)]
mod tests {
    use super::{Status, parse};

    #[test]
    fn a_report_that_is_wrong_is_told_what_is_wrong() {
        for (body, said) in [
            ("{", "not JSON"),
            ("{}", "`status`"),
            ("{\"status\": \"done\"}", "`status`"),
            ("{\"status\": \"failed\"}", "`reason`"),
            ("{\"status\": \"succeeded\", \"summary\": 3}", "`summary`"),
        ] {
            let error = parse(body.as_bytes()).unwrap_err();
            assert!(error.contains(said), "{body}: {error}");
        }
        let fine = parse(b"{\"status\": \"succeeded\", \"extra\": 1}").unwrap();
        assert_eq!(fine.status, Status::Succeeded);
    }
}
