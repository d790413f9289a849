//! The way to the workers: the crew's port on a transport (in process, or over Redis), and back, each result as a signal.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use graph::Engine;
use ports::{Failure, RequestId, Workers};
use protocol::{LocalTransport, RedisTransport, SpawnRequest, Transport, TransportError};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

use crate::config::SecretValue;
use crate::spending::Tally;

/// How long a job or a result is held by a process that does not renew it: after so long another one gets it.
const HOLD: Duration = Duration::from_secs(20);

/// The transport of this process, once it takes part in the work.
#[derive(Clone)]
pub struct Bus {
    redis: Option<SecretValue>,
    /// Books what workers cost, where their spawner cannot.
    tally: Option<Tally>,
    transport: Arc<OnceCell<Arc<dyn Transport>>>,
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

/// The transport over Redis. What is taken from it is held in the name of `holder`, if this is a process that its neighbours
/// know by name.
pub async fn redis(
    url: &SecretValue,
    holder: Option<&str>,
) -> Result<Arc<dyn Transport>, TransportError> {
    let mut options = protocol::redis::Options::new(url.expose());
    options.lease = HOLD;
    options.holder = holder.map(str::to_owned);
    Ok(Arc::new(RedisTransport::with(options).await?))
}

impl Bus {
    /// A bus over Redis when there is an address, and then with a tally; otherwise within this process.
    pub fn new(redis: Option<SecretValue>, tally: Tally) -> Self {
        Self {
            tally: redis.is_some().then_some(tally),
            redis,
            transport: Arc::default(),
        }
    }

    /// Opens the transport, once in the life of this process: over Redis, or in its folder. Whoever calls this takes part in
    /// the work, and has the folder alone; or is known to its neighbours by the name `holder`.
    pub async fn open(
        &self,
        folder: PathBuf,
        holder: Option<&str>,
    ) -> Result<Arc<dyn Transport>, TransportError> {
        let open = || async {
            let transport: Arc<dyn Transport> = match &self.redis {
                Some(url) => redis(url, holder).await?,
                None => Arc::new(LocalTransport::open(folder).await?),
            };
            Ok(transport)
        };
        self.transport.get_or_try_init(open).await.cloned()
    }

    /// Books what workers cost, where their spawner cannot.
    pub fn tally(&self) -> Option<&Tally> {
        self.tally.as_ref()
    }

    /// The transport, if this process has opened it.
    pub fn transport(&self) -> Option<Arc<dyn Transport>> {
        self.transport.get().cloned()
    }

    fn get(&self) -> ports::Result<&Arc<dyn Transport>> {
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
        let transport = self.get()?;
        let published = match &self.tally {
            Some(tally) => transport.publish_job(&tally.bounded(request).await?).await,
            None => transport.publish_job(request).await,
        };
        published.map(|_| ()).map_err(|error| failure(&error))
    }

    async fn cancel(&self, request: &RequestId) -> ports::Result<()> {
        self.get()?
            .cancel(request.as_str())
            .await
            .map_err(|error| failure(&error))
    }
}

/// Turns results into signals until the end. A result is acknowledged when it has become one, and what it cost is booked
/// before.
pub async fn deliver_results(
    transport: Arc<dyn Transport>,
    engine: Engine,
    tally: Option<Tally>,
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
                let _ = tokio::time::timeout(PATIENCE, shutdown.cancelled()).await;
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
        let booked = match &tally {
            Some(tally) => tally
                .book(&result.request_id, &result.usage)
                .await
                .map(|_| ()),
            None => Ok(()),
        };
        if let Err(error) = booked {
            tracing::error!(
                request = result.request_id,
                "what a worker cost is not booked, so its result waits: {error:#}"
            );
            if let Err(error) = transport.release_result(&delivery.receipt).await {
                tracing::error!(%error, "it could not be given back; its hold will run out");
            }
            let _ = tokio::time::timeout(PATIENCE, shutdown.cancelled()).await;
            continue;
        }
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
