//! Bytes to messages: sizes are bounded, versions are checked before anything else is looked at,
//! and an error names the field.

use crate::{
    ControlMessage, Failure, Heartbeat, ResultStatus, SpawnRequest, Usage, VERSION, WorkerEvent,
    WorkerResult,
};
use jiff::Timestamp;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

/// Largest request that is read, in bytes.
pub const MAX_REQUEST_BYTES: usize = 1024 * 1024;
/// Largest result that is read, in bytes.
pub const MAX_RESULT_BYTES: usize = 1024 * 1024;
/// Largest event that is read, in bytes.
pub const MAX_EVENT_BYTES: usize = 64 * 1024;
/// Largest order or heartbeat that is read, in bytes.
pub const MAX_CONTROL_BYTES: usize = 8 * 1024;

/// The kind of the failure that answers a request that cannot be read.
pub const BAD_REQUEST: &str = "bad_request";
/// So much of such a request is shown in its answer, in bytes.
const SHOWN_BYTES: usize = 1024;

/// Why bytes are not a message.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// Written by a newer (or broken) program.
    #[error(
        "message has version {found}, but this program reads version {supported}; update the older of the two programs"
    )]
    Version {
        /// The version that was found.
        found: u64,
        /// The version that is read here.
        supported: u32,
    },
    /// A field that must be there is not.
    #[error("message lacks the field `{field}`")]
    Missing {
        /// The field.
        field: String,
    },
    /// A field has a value that it may not have.
    #[error("field `{field}`: {reason}")]
    Invalid {
        /// The field, with its path.
        field: String,
        /// What is wrong.
        reason: String,
    },
    /// More bytes than a message of this kind may have.
    #[error("message has {bytes} bytes; at most {limit} are accepted")]
    TooLarge {
        /// The size that was found.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// Not JSON at all, or not of the shape.
    #[error("message is not valid JSON of its type")]
    Json(#[source] serde_json::Error),
}

impl DecodeError {
    pub(crate) fn invalid(field: &str, reason: &str) -> Self {
        Self::Invalid {
            field: field.to_owned(),
            reason: reason.to_owned(),
        }
    }
}

/// Reads a request and checks it.
pub fn request(bytes: &[u8]) -> Result<SpawnRequest, DecodeError> {
    let value = versioned(bytes, MAX_REQUEST_BYTES)?;
    if let Some(repository) = value.get("repository").and_then(Value::as_object) {
        match (
            repository.contains_key("path"),
            repository.contains_key("clone_url"),
        ) {
            (false, false) => {
                return Err(DecodeError::Missing {
                    field: "repository.path or repository.clone_url".to_owned(),
                });
            }
            (true, true) => {
                return Err(DecodeError::invalid(
                    "repository",
                    "has both `path` and `clone_url`; exactly one is allowed",
                ));
            }
            _ => {}
        }
    }
    let request: SpawnRequest = typed(value)?;
    request.validate()?;
    Ok(request)
}

/// The answer to a request that cannot be read, so that nobody waits for it; none when it does not even say which one it is.
/// `reason` is what [`request`] said.
pub fn refusal(bytes: &[u8], reason: &str) -> Option<WorkerResult> {
    /// Whom the answer is for. Everything else is passed over without being kept.
    #[derive(Deserialize)]
    struct Whom {
        request_id: String,
        #[serde(default)]
        task_id: String,
        #[serde(default)]
        attempt: u32,
        #[serde(default)]
        fencing_token: u64,
        #[serde(default)]
        repository: Option<Where>,
    }
    #[derive(Deserialize)]
    struct Where {
        #[serde(default)]
        branch: String,
    }
    let whom: Whom = serde_json::from_slice(bytes).ok()?;
    let now = Timestamp::now();
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]);
    let result = WorkerResult {
        version: VERSION,
        request_id: whom.request_id,
        task_id: whom.task_id,
        attempt: whom.attempt,
        fencing_token: whom.fencing_token,
        status: ResultStatus::Failed,
        branch: whom
            .repository
            .map(|place| place.branch)
            .unwrap_or_default(),
        head_sha: None,
        summary_markdown: String::new(),
        checks: Vec::new(),
        usage: Usage::default(),
        failure: Some(Failure {
            kind: BAD_REQUEST.to_owned(),
            message: format!(
                "No spawner can read this request: {reason}. It is kept in worker:dead; an admin has to bring crew and spawners to one version, or to mend what sent it."
            ),
            evidence: format!("{} bytes, which begin with: {shown}", bytes.len()),
        }),
        started_at: now,
        finished_at: now,
    };
    result.validate().is_ok().then_some(result)
}

/// Reads a result and checks it.
pub fn result(bytes: &[u8]) -> Result<WorkerResult, DecodeError> {
    let result: WorkerResult = typed(versioned(bytes, MAX_RESULT_BYTES)?)?;
    result.validate()?;
    Ok(result)
}

/// Reads an event.
pub fn event(bytes: &[u8]) -> Result<WorkerEvent, DecodeError> {
    typed(versioned(bytes, MAX_EVENT_BYTES)?)
}

/// Reads an order.
pub fn control(bytes: &[u8]) -> Result<ControlMessage, DecodeError> {
    typed(versioned(bytes, MAX_CONTROL_BYTES)?)
}

/// Reads a heartbeat.
pub fn heartbeat(bytes: &[u8]) -> Result<Heartbeat, DecodeError> {
    typed(versioned(bytes, MAX_CONTROL_BYTES)?)
}

fn versioned(bytes: &[u8], limit: usize) -> Result<Value, DecodeError> {
    if bytes.len() > limit {
        return Err(DecodeError::TooLarge {
            bytes: bytes.len(),
            limit,
        });
    }
    let value: Value = serde_json::from_slice(bytes).map_err(DecodeError::Json)?;
    let Some(version) = value.get("version") else {
        return Err(DecodeError::Missing {
            field: "version".to_owned(),
        });
    };
    match version.as_u64() {
        Some(found) if found == u64::from(VERSION) => Ok(value),
        Some(found) => Err(DecodeError::Version {
            found,
            supported: VERSION,
        }),
        None => Err(DecodeError::invalid("version", "must be a whole number")),
    }
}

fn typed<T: DeserializeOwned>(value: Value) -> Result<T, DecodeError> {
    serde_json::from_value(value).map_err(|error| {
        let text = error.to_string();
        match text
            .strip_prefix("missing field `")
            .and_then(|rest| rest.split('`').next())
        {
            Some(field) => DecodeError::Missing {
                field: field.to_owned(),
            },
            None => DecodeError::Json(error),
        }
    })
}
