//! Bytes to messages: sizes are bounded, versions are checked before anything else is looked at,
//! and an error names the field.

use crate::{ControlMessage, Heartbeat, SpawnRequest, VERSION, WorkerEvent, WorkerResult};
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
