//! Bytes to messages: sizes are bounded, versions are checked before anything else is looked at,
//! and an error names the field.

use crate::request::check_request_id;
use crate::{
    ControlMessage, Failure, Heartbeat, ResultStatus, SpawnRequest, Usage, VERSION, WorkerEvent,
    WorkerResult,
};
use jiff::Timestamp;
use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::collections::BTreeSet;
use std::fmt;

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
/// The kind of the failure that stands for a result that cannot be read.
pub const BAD_RESULT: &str = "bad_result";
/// So much of such a message is shown in its answer, in bytes.
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
    answer(
        bytes,
        BAD_REQUEST,
        "No spawner can read this request",
        reason,
    )
}

/// What is said in the place of a result that cannot be read, so that nobody waits for it; none when it does not even say whose it
/// is. `reason` is what [`result`] said.
pub fn unreadable(bytes: &[u8], reason: &str) -> Option<WorkerResult> {
    answer(
        bytes,
        BAD_RESULT,
        "The crew cannot read this result",
        reason,
    )
}

fn answer(bytes: &[u8], kind: &str, what: &str, reason: &str) -> Option<WorkerResult> {
    let whom = Whom::read(bytes)?;
    let now = Timestamp::now();
    let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(SHOWN_BYTES)]);
    let reason = crate::shortened(reason);
    let result = WorkerResult {
        version: VERSION,
        request_id: whom.text("request_id"),
        task_id: whom.text("task_id"),
        attempt: u32::try_from(whom.number("attempt")).unwrap_or_default(),
        fencing_token: whom.number("fencing_token"),
        status: ResultStatus::Failed,
        branch: whom.text("branch"),
        head_sha: None,
        summary_markdown: String::new(),
        checks: Vec::new(),
        usage: Usage::default(),
        failure: Some(Failure {
            kind: kind.to_owned(),
            message: format!(
                "{what}: {reason}. It is kept in worker:dead; an admin has to bring crew and spawners to one version, or to mend what sent it."
            ),
            evidence: format!("{} bytes, which begin with: {shown}", bytes.len()),
        }),
        started_at: now,
        finished_at: now,
    };
    // What cannot be sent is no answer, and nobody waits under such names.
    let sent = result.validate().is_ok() && crate::encode(&result, MAX_RESULT_BYTES).is_ok();
    sent.then_some(result)
}

/// The request that a message is of which cannot be read otherwise; empty when it does not say.
pub(crate) fn named(bytes: &[u8]) -> String {
    let id = Whom::read(bytes).map(|whom| whom.text("request_id"));
    let id = id.unwrap_or_default();
    if check_request_id(&id).is_ok() {
        id
    } else {
        String::new()
    }
}

/// Which attempt a message is of that cannot be read otherwise: its names and numbers, whatever else is wrong with it.
struct Whom(Map<String, Value>);

impl Whom {
    const NAMES: [&str; 5] = [
        "request_id",
        "task_id",
        "attempt",
        "fencing_token",
        "branch",
    ];

    fn read(bytes: &[u8]) -> Option<Self> {
        Self::deserialize(&mut serde_json::Deserializer::from_slice(bytes)).ok()
    }

    /// Empty when it does not say.
    fn text(&self, name: &str) -> String {
        let value = self.0.get(name).and_then(Value::as_str);
        value.unwrap_or_default().to_owned()
    }

    /// 0 when it does not say.
    fn number(&self, name: &str) -> u64 {
        self.0.get(name).and_then(Value::as_u64).unwrap_or_default()
    }
}

impl<'de> Deserialize<'de> for Whom {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Reader;
        impl<'de> Visitor<'de> for Reader {
            type Value = Whom;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a message")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<Whom, A::Error> {
                let mut found = Map::new();
                while let Some(name) = fields.next_key::<String>()? {
                    if Whom::NAMES.contains(&name.as_str()) && !found.contains_key(&name) {
                        found.insert(name, fields.next_value()?);
                    } else if name == "repository" {
                        let place: Value = fields.next_value()?;
                        if let Some(branch) = place.get("branch") {
                            found.insert("branch".to_owned(), branch.clone());
                        }
                    } else {
                        // Passed over without being kept.
                        fields.next_value::<IgnoredAny>()?;
                    }
                }
                Ok(Whom(found))
            }
        }
        from.deserialize_map(Reader)
    }
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
    if let Some(field) = twice(bytes) {
        return Err(DecodeError::invalid(
            crate::shortened(&field),
            "is there twice",
        ));
    }
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

/// A field that an object has twice: readers differ in which of the two counts, and so the message says nothing.
fn twice(bytes: &[u8]) -> Option<String> {
    let mut found = None;
    // What is no JSON was found out before.
    let _ = Once(&mut found).deserialize(&mut serde_json::Deserializer::from_slice(bytes));
    found
}

/// Reads over a value, up to the first field that is there twice, and leaves its name.
struct Once<'a>(&'a mut Option<String>);

impl<'de> DeserializeSeed<'de> for Once<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, from: D) -> Result<(), D::Error> {
        from.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Once<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        let mut seen = BTreeSet::new();
        while let Some(name) = fields.next_key::<String>()? {
            if seen.contains(&name) {
                *self.0 = Some(name);
                return Err(serde::de::Error::custom("a field is there twice"));
            }
            seen.insert(name);
            fields.next_value_seed(Once(&mut *self.0))?;
        }
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while items.next_element_seed(Once(&mut *self.0))?.is_some() {}
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
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
