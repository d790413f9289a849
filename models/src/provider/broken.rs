//! Streams to workers that do not get to their end: what is logged, and what the worker is told.

use ports::ModelError;
use tracing::warn;

use crate::backoff::TryError;

/// A stream went on beyond what was set aside for it.
pub(super) fn too_long(endpoint: String, model: &str, limit: u64) -> ModelError {
    warn!(
        endpoint,
        model, limit, "a worker's stream was cut off: it went on beyond its limit of tokens"
    );
    ModelError::TooLong { endpoint, limit }
}

/// A stream ended before the answer did.
pub(super) fn broke_off(endpoint: String, model: &str, error: &TryError) -> ModelError {
    warn!(
        endpoint,
        model,
        error = error.message,
        "a worker's stream broke"
    );
    ModelError::Unavailable {
        endpoint,
        message: format!("{} (model {model})", error.message),
        status: error.status,
        retryable: error.retryable,
    }
}
