//! How messages travel between the crew and the spawners: durable first, announced second.

use crate::{
    Control, DecodeError, Heartbeat, Room, Rooms, Size, SpawnRequest, WorkerEvent, WorkerResult,
};
use async_trait::async_trait;
use futures::stream::BoxStream;
use std::time::Duration;
use tokio::sync::watch;

/// How long a heartbeat counts: who was heard of within it lives.
pub const LIVES: Duration = Duration::from_secs(30);
/// How long a spawner that is not heard of any more counts as one that may come back, as one does that is started again.
pub const LATELY: Duration = Duration::from_mins(10);
/// How many spawners are remembered; those that were silent for the longest time are forgotten first.
pub(crate) const REMEMBERED: usize = 256;

/// What publishing did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Published {
    /// It is durable now.
    New,
    /// The same request was published before (or is over); nothing changed.
    Known,
}

/// A job that was handed to one spawner, which holds it until it acknowledges, dead-letters or
/// releases it, or stops renewing it.
#[derive(Clone, Debug)]
pub struct JobDelivery {
    /// The job.
    pub request: SpawnRequest,
    /// Names this delivery to the transport.
    pub receipt: String,
    /// How often the job has been handed out, this time included; survives restarts.
    pub deliveries: u32,
}

/// A result that was handed to the crew, to be acknowledged when it has become a signal.
#[derive(Clone, Debug)]
pub struct ResultDelivery {
    /// The result.
    pub result: WorkerResult,
    /// Names this delivery to the transport.
    pub receipt: String,
}

/// A spawner that lives, or did lately.
#[derive(Clone, Debug, PartialEq)]
pub struct Seen {
    /// What it said last.
    pub last: Heartbeat,
    /// How long ago that was, by the clock of the transport.
    pub silent: Duration,
}

/// Events of one request: those kept so far, then new ones; ends after the result was published.
pub type EventStream = BoxStream<'static, WorkerEvent>;
/// Orders from now on.
pub type ControlStream = BoxStream<'static, Control>;

/// Why a transport could not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// Too much is waiting already.
    #[error("{queue} holds {limit} entries, which is its limit; wait until some are done")]
    Full {
        /// What is full.
        queue: &'static str,
        /// The limit.
        limit: usize,
    },
    /// The message itself is wrong.
    #[error("the message cannot be sent")]
    Message(#[from] DecodeError),
    /// The delivery is not held any more: acknowledged, or handed to somebody else.
    #[error("delivery {receipt} is not held any more")]
    NotHeld {
        /// The receipt.
        receipt: String,
    },
    /// Another process uses the store.
    #[error("{place} is in use by another process; stop that one first")]
    InUse {
        /// The store.
        place: String,
    },
    /// The store cannot be read or written.
    #[error("cannot {action} {place}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        place: String,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A remote store answered with an error.
    #[error("{place}: {reason}")]
    Remote {
        /// The store.
        place: String,
        /// Its words.
        reason: String,
    },
}

/// The bus between the crew and the spawners.
///
/// Jobs and results are delivered at least once: what a crashed holder held is handed out again.
/// Whoever takes a job reads its state first ([`Transport::result`], [`Transport::cancelled`]).
#[async_trait]
pub trait Transport: Send + Sync + 'static {
    /// Makes a job durable, then announces it. Publishing the same `request_id` again does nothing.
    async fn publish_job(&self, request: &SpawnRequest) -> Result<Published, TransportError>;

    /// The next job for whoever has room for everything: of the project of which the fewest jobs are held, and of its jobs the
    /// oldest one. None when nothing came within `wait`.
    async fn next_job(&self, wait: Duration) -> Result<Option<JobDelivery>, TransportError> {
        // The sender stays, or the room could not be waited on.
        let (_room, rooms) = watch::channel(Room::unlimited());
        self.next_job_for(&rooms, wait).await
    }

    /// As [`Transport::next_job`], for whoever has the room that `rooms` says, now and while this waits. What does not fit stays
    /// where it is, for this one later or for another one now. A job that fits no spawner is handed out when the room's grace is
    /// over, so that somebody can say so.
    async fn next_job_for(
        &self,
        rooms: &Rooms,
        wait: Duration,
    ) -> Result<Option<JobDelivery>, TransportError>;

    /// Says that the job is still being worked on, so that nobody else gets it. Spawners call it
    /// every few seconds. [`TransportError::NotHeld`] means that it is somebody else's now.
    async fn renew_job(&self, receipt: &str) -> Result<(), TransportError>;

    /// The job is over: forget it. Call it after [`Transport::publish_result`].
    async fn ack_job(&self, receipt: &str) -> Result<(), TransportError>;

    /// Gives the job back, to be handed out again.
    async fn release_job(&self, receipt: &str) -> Result<(), TransportError>;

    /// A process that took jobs or results under this name is dead: what it held is handed out again at once, not only when the
    /// hold has run out. Returns how much that was. Only for whoever is sure of the death; a transport that knows no processes
    /// has nothing to do.
    async fn abandon(&self, _holder: &str) -> Result<u32, TransportError> {
        Ok(0)
    }

    /// The job is poison: keeps its body with the reason, and never hands it out again.
    async fn dead_letter(&self, receipt: &str, reason: &str) -> Result<(), TransportError>;

    /// What was dead-lettered: reason and body of each message, oldest first, at most `limit`.
    async fn dead_letters(&self, limit: usize) -> Result<Vec<(String, String)>, TransportError>;

    /// Tells watchers what happens. Events may be dropped when nobody reads them; the oldest go first.
    async fn publish_event(&self, event: &WorkerEvent) -> Result<(), TransportError>;

    /// Events of a request.
    async fn events(&self, request_id: &str) -> Result<EventStream, TransportError>;

    /// Makes a result durable, then announces it. The first result of a request is the result;
    /// another one changes nothing.
    async fn publish_result(&self, result: &WorkerResult) -> Result<Published, TransportError>;

    /// The result of a request, for at least a day after it was published.
    async fn result(&self, request_id: &str) -> Result<Option<WorkerResult>, TransportError>;

    /// The next result that nobody holds, oldest first; none when nothing came within `wait`.
    async fn next_result(&self, wait: Duration) -> Result<Option<ResultDelivery>, TransportError>;

    /// The result has become a signal: do not deliver it again.
    async fn ack_result(&self, receipt: &str) -> Result<(), TransportError>;

    /// Gives the result back, to be delivered again.
    async fn release_result(&self, receipt: &str) -> Result<(), TransportError>;

    /// Cancels a request, whether it waits, runs, or is not even published yet. Durable.
    async fn cancel(&self, request_id: &str) -> Result<(), TransportError>;

    /// Whether a request was cancelled within the last thirty days.
    async fn cancelled(&self, request_id: &str) -> Result<bool, TransportError>;

    /// Ends a request whose budget is used up, if it runs now. Not durable: whoever finds it running again says it again.
    async fn unpaid(&self, request_id: &str) -> Result<(), TransportError>;

    /// Asks one spawner, or all, to take no more jobs.
    async fn drain(&self, spawner: Option<&str>) -> Result<(), TransportError>;

    /// Orders, as they are given.
    async fn controls(&self) -> Result<ControlStream, TransportError>;

    /// Says that a spawner lives; counts for [`LIVES`].
    async fn heartbeat(&self, heartbeat: &Heartbeat) -> Result<(), TransportError>;

    /// Spawners that live.
    async fn spawners(&self) -> Result<Vec<Heartbeat>, TransportError>;

    /// Spawners that live, and those that do not but were heard of within [`LATELY`] and have not said farewell: they may come
    /// back. By name. A transport that remembers nobody knows of those that live.
    async fn seen_spawners(&self) -> Result<Vec<Seen>, TransportError> {
        let alive = self.spawners().await?.into_iter();
        let silent = Duration::ZERO;
        Ok(alive.map(|last| Seen { last, silent }).collect())
    }

    /// A spawner has ended for good: nobody waits for it to come back. Without it, it is forgotten after [`LATELY`].
    async fn farewell(&self, _spawner: &str) -> Result<(), TransportError> {
        Ok(())
    }

    /// What of the store's settings may lose messages, in a sentence for its admin; none: nothing.
    async fn may_lose(&self) -> Result<Option<String>, TransportError> {
        Ok(None)
    }

    /// What a job that was published may use, for as long as it is not over; none of one that is not known.
    async fn job_size(&self, _request_id: &str) -> Result<Option<Size>, TransportError> {
        Ok(None)
    }
}
