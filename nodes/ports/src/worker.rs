//! Coding workers, seen from the crew.

use async_trait::async_trait;
use protocol::SpawnRequest;

use crate::{RequestId, Result};

/// Sends jobs to workers. A result comes back as the signal [`RESULT_SIGNAL`] to the task's thread, under the key
/// `worker:{request_id}`, with a `protocol::WorkerResult` as payload.
#[async_trait]
pub trait Workers: Send + Sync {
    /// Hands a job over, durably; the same request id twice is one job.
    async fn submit(&self, request: &SpawnRequest) -> Result<()>;

    /// Stops a job within seconds, wherever it is; one that ended stays as it is.
    async fn cancel(&self, request: &RequestId) -> Result<()>;
}

/// The kind of the signal that carries a worker's result.
pub const RESULT_SIGNAL: &str = "worker.result";
