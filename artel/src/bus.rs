//! The way to the workers: the crew's port on the in-process transport, and back, each result as a signal.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use async_trait::async_trait;
use graph::Engine;
use ports::{Failure, RequestId, Workers};
use protocol::{LocalTransport, SpawnRequest, Transport, TransportError};
use tokio_util::sync::CancellationToken;

/// The transport of this process, once it does the work; only one process at a time may have it.
#[derive(Clone, Default)]
pub struct Bus {
    transport: Arc<OnceLock<Arc<LocalTransport>>>,
}

fn failure(error: &TransportError) -> Failure {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    Failure::new("bus", text).retryable()
}

impl Bus {
    /// Opens the transport in its folder, once in the life of this process. Whoever calls this holds the right to do the
    /// work.
    pub async fn open(&self, folder: PathBuf) -> Result<Arc<LocalTransport>, TransportError> {
        if let Some(transport) = self.transport.get() {
            return Ok(transport.clone());
        }
        let transport = Arc::new(LocalTransport::open(folder).await?);
        Ok(self.transport.get_or_init(|| transport).clone())
    }

    fn get(&self) -> ports::Result<&Arc<LocalTransport>> {
        self.transport.get().ok_or_else(|| {
            Failure::new(
                "bus",
                "this process does not do the work on this data folder; whoever does will go on",
            )
            .retryable()
        })
    }
}

#[async_trait]
impl Workers for Bus {
    async fn submit(&self, request: &SpawnRequest) -> ports::Result<()> {
        self.get()?
            .publish_job(request)
            .await
            .map(|_| ())
            .map_err(|error| failure(&error))
    }

    async fn cancel(&self, request: &RequestId) -> ports::Result<()> {
        self.get()?
            .cancel(request.as_str())
            .await
            .map_err(|error| failure(&error))
    }
}

/// Turns results into signals until the end. A result is acknowledged when it has become one.
pub async fn deliver_results(
    transport: Arc<LocalTransport>,
    engine: Engine,
    shutdown: CancellationToken,
) {
    const PATIENCE: Duration = Duration::from_secs(5);
    while !shutdown.is_cancelled() {
        let next = tokio::select! {
            () = shutdown.cancelled() => return,
            next = transport.next_result(PATIENCE) => next,
        };
        let delivery = match next {
            Ok(Some(delivery)) => delivery,
            Ok(None) => continue,
            Err(error) => {
                tracing::error!(%error, "workers' results cannot be read");
                tokio::time::sleep(PATIENCE).await;
                continue;
            }
        };
        let result = &delivery.result;
        let Some(thread) = nodes::thread_of_request(&RequestId::new(result.request_id.clone()))
        else {
            tracing::error!(
                request = result.request_id,
                "a result of a request that is not the crew's"
            );
            if let Err(error) = transport.ack_result(&delivery.receipt).await {
                tracing::error!(%error, "it could not be put aside");
            }
            continue;
        };
        let key = format!("worker:{}", result.request_id);
        let sent = match engine
            .signal(thread.as_str(), ports::RESULT_SIGNAL, &key, result)
            .await
        {
            // The thread is gone, and nobody will ever want the result.
            Ok(_) | Err(graph::EngineError::UnknownThread(_)) => {
                transport.ack_result(&delivery.receipt).await
            }
            Err(error) => {
                tracing::error!(request = result.request_id, %error, "a result did not become a signal; it is delivered again");
                transport.release_result(&delivery.receipt).await
            }
        };
        if let Err(error) = sent {
            tracing::error!(%error, "a result could not be acknowledged; it is delivered again, which changes nothing");
        }
    }
}
