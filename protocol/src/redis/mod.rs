//! The transport over Redis (7 or newer; one server, Sentinel, or Cluster): for a crew and spawners in several processes.
//!
//! Jobs and results are entries of streams, held by whoever took them until they are settled or their hold runs out
//! (`queue.rs`); an acknowledged entry is deleted and nothing else ever trims a stream. Pub/sub only announces (`hub.rs`): who
//! missed an announcement finds the entry within a second. Beside the names of [`crate::names`] there are, per queue, the keys
//! `{stream}:known:{request}`, which make publishing idempotent, `{stream}:at:{request}`, its entry while it is not over, and, for the jobs, the hash
//! `{stream}:about` with project and size of each entry, so that looking for the next job reads no message.
//!
//! How durable a message is, is the server's setting: `appendonly yes` with `appendfsync always` survives a power cut.

mod address;
mod events;
mod hub;
mod letters;
mod link;
mod queue;
mod seen;
mod settings;

use crate::request::check_request_id;
use crate::room;
use crate::transport::{
    ControlStream, EventStream, JobDelivery, LATELY, LIVES, Published, ResultDelivery, Seen,
    Transport, TransportError,
};
use crate::{
    Control, ControlMessage, Heartbeat, Rooms, Size, SpawnRequest, WorkerEvent, WorkerResult,
    chain, decode, encode, names,
};
use address::Address;
use async_trait::async_trait;
use hub::Hub;
use link::Link;
use queue::Queue;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long whoever waits goes without looking when no announcement comes.
const POLL: Duration = Duration::from_secs(1);

/// An entry of a stream: its place, its fields.
type Entry = (String, Vec<(String, Vec<u8>)>);

/// What can be chosen about a [`RedisTransport`].
#[derive(Clone)]
pub struct Options {
    /// `REDIS_URL`.
    pub url: String,
    /// How many jobs, and how many results, may be there at a time; publishing more is refused.
    pub capacity: usize,
    /// How long a delivery is held without a renewal before it is handed out again.
    pub lease: Duration,
    /// How many events are kept per request; the oldest go first.
    pub events: usize,
    /// How long a process that holds nothing is remembered after it has last asked for something.
    pub forget: Duration,
    /// How many dead letters are kept; the oldest go first.
    pub letters: usize,
    /// How long a heartbeat counts.
    pub lives: Duration,
    /// How long a spawner that is not heard of any more is remembered.
    pub lately: Duration,
    /// How long a command is tried again while Redis cannot be reached.
    pub patience: Duration,
    /// The name under which what this process takes is held; no other process may ever have it. Whoever finds that the process
    /// died gives it to [`Transport::abandon`]. If absent, one that nobody else knows.
    pub holder: Option<String>,
}

impl Options {
    /// The usual choices: 1024 entries, a lease of a minute, 256 events a request, 1000 dead letters, 15 seconds of patience.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            capacity: 1024,
            lease: Duration::from_mins(1),
            events: 256,
            forget: Duration::from_hours(24),
            letters: 1000,
            lives: LIVES,
            lately: LATELY,
            patience: Duration::from_secs(15),
            holder: None,
        }
    }
}

/// The transport over Redis. Cheap to share; every process has one of its own.
pub struct RedisTransport {
    shared: Arc<Shared>,
}

struct Shared {
    options: Options,
    link: Link,
    hub: Hub,
    jobs: Queue,
    results: Queue,
}

impl RedisTransport {
    /// Connects with the usual choices.
    pub async fn connect(url: &str) -> Result<Self, TransportError> {
        Self::with(Options::new(url)).await
    }

    /// Connects. Fails when Redis cannot be reached within [`Options::patience`].
    pub async fn with(options: Options) -> Result<Self, TransportError> {
        let address = Arc::new(Address::parse(&options.url)?);
        let link = Link::new(address.clone(), options.patience);
        // Consumers are told apart by this name; what a dead one held is taken over when its hold runs out, or before, by whoever
        // knows that it died. A receipt has it between slashes.
        let consumer = match &options.holder {
            Some(holder) => holder.replace('/', "_"),
            None => format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple()),
        };
        let queue =
            |stream, group| Queue::new(stream, group, &consumer, options.capacity, options.lease);
        let shared = Shared {
            jobs: queue(names::JOBS, names::GROUP_SPAWNERS),
            results: queue(names::RESULTS, names::GROUP_CREW),
            hub: Hub::start(address),
            link,
            options,
        };
        shared
            .jobs
            .prepare(&shared.link, shared.options.forget)
            .await?;
        shared
            .results
            .prepare(&shared.link, shared.options.forget)
            .await?;
        Ok(Self {
            shared: Arc::new(shared),
        })
    }
}

impl Shared {
    async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, TransportError> {
        self.link.ask(redis::cmd("GET").arg(key)).await
    }

    /// Announces. Nobody listening is fine.
    async fn say(&self, channel: &str, message: &str) -> Result<(), TransportError> {
        self.link
            .ask(redis::cmd("PUBLISH").arg(channel).arg(message))
            .await
    }

    async fn exists(&self, key: &str) -> Result<bool, TransportError> {
        self.link.ask(redis::cmd("EXISTS").arg(key)).await
    }

    /// Sets a key that expires, and publishes on the channel of the same (or another) name.
    async fn set_and_say(
        &self,
        key: &str,
        value: &str,
        keep_s: u64,
        channel: &str,
        message: &str,
    ) -> Result<(), TransportError> {
        self.link
            .ask::<()>(redis::cmd("SET").arg(key).arg(value).arg("EX").arg(keep_s))
            .await?;
        self.say(channel, message).await
    }

    /// The message that a receipt names, while it is held.
    async fn held_body(&self, queue: &Queue, receipt: &str) -> Result<Vec<u8>, TransportError> {
        // A receipt that is not held any more is refused here, before anything is written.
        queue.renew(&self.link, receipt).await?;
        let entry = receipt.split('/').next().unwrap_or_default();
        let found: Vec<Entry> = self
            .link
            .ask(redis::cmd("XRANGE").arg(queue.stream).arg(entry).arg(entry))
            .await?;
        found
            .into_iter()
            .flat_map(|(_, fields)| fields)
            .find_map(|(name, value)| (name == names::FIELD).then_some(value))
            .ok_or_else(|| TransportError::NotHeld {
                receipt: receipt.to_owned(),
            })
    }
}

#[async_trait]
impl Transport for RedisTransport {
    async fn publish_job(&self, request: &SpawnRequest) -> Result<Published, TransportError> {
        request.validate()?;
        let text = encode(request, decode::MAX_REQUEST_BYTES)?;
        let shared = &self.shared;
        let id = request.request_id.as_str();
        if shared.exists(&shared.results.known(id)).await? {
            return Ok(Published::Known);
        }
        let published = shared
            .jobs
            .publish(
                &shared.link,
                id,
                &text,
                &seen::noted(Size::of(&request.limits)),
            )
            .await?;
        if published == Published::New {
            shared.say(names::SPAWN, id).await?;
        }
        Ok(published)
    }

    async fn next_job_for(
        &self,
        rooms: &Rooms,
        wait: Duration,
    ) -> Result<Option<JobDelivery>, TransportError> {
        let shared = &self.shared;
        let deadline = Instant::now() + wait;
        let mut bell = shared.hub.jobs();
        let mut rooms = rooms.clone();
        loop {
            bell.mark_unchanged();
            let room = rooms.borrow_and_update().clone();
            if let Some(handed) = shared.jobs.take_for(&shared.link, &room).await? {
                match decode::request(&handed.data) {
                    Ok(request) => {
                        return Ok(Some(JobDelivery {
                            receipt: handed.receipt(&request.request_id),
                            deliveries: handed.deliveries,
                            request,
                        }));
                    }
                    Err(error) => {
                        let reason = chain(&error);
                        // Before it is put aside, so that a crash in between tells it twice and not never.
                        if let Some(refusal) = decode::refusal(&handed.data, &reason) {
                            self.publish_result(&refusal).await?;
                        }
                        shared.bury(&shared.jobs, &handed, &reason).await?;
                        continue;
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            tokio::select! {
                () = hub::wait(&mut bell, left.min(POLL).min(shared.options.lease)) => {}
                () = room::changed(&mut rooms) => {}
            }
        }
    }

    async fn renew_job(&self, receipt: &str) -> Result<(), TransportError> {
        self.shared.jobs.renew(&self.shared.link, receipt).await
    }

    async fn ack_job(&self, receipt: &str) -> Result<(), TransportError> {
        self.shared.jobs.settle(&self.shared.link, receipt).await
    }

    async fn release_job(&self, receipt: &str) -> Result<(), TransportError> {
        let shared = &self.shared;
        shared.jobs.release(&shared.link, receipt).await?;
        let id = receipt.rsplit('/').next().unwrap_or_default();
        shared.say(names::SPAWN, id).await
    }

    async fn abandon(&self, holder: &str) -> Result<u32, TransportError> {
        let shared = &self.shared;
        let holder = holder.replace('/', "_");
        let jobs = shared.jobs.abandon(&shared.link, &holder).await?;
        let results = shared.results.abandon(&shared.link, &holder).await?;
        if jobs > 0 {
            shared.say(names::SPAWN, "").await?;
        }
        Ok(jobs + results)
    }

    async fn dead_letter(&self, receipt: &str, reason: &str) -> Result<(), TransportError> {
        let shared = &self.shared;
        let body = shared.held_body(&shared.jobs, receipt).await?;
        shared.keep_letter(&body, reason).await?;
        shared.jobs.settle(&shared.link, receipt).await
    }

    async fn dead_letters(&self, limit: usize) -> Result<Vec<(String, String)>, TransportError> {
        self.shared.letters(limit).await
    }

    async fn publish_event(&self, event: &WorkerEvent) -> Result<(), TransportError> {
        self.shared.publish_event(event).await
    }

    async fn events(&self, request_id: &str) -> Result<EventStream, TransportError> {
        check_request_id(request_id)?;
        Ok(self.shared.clone().follow(request_id))
    }

    async fn publish_result(&self, result: &WorkerResult) -> Result<Published, TransportError> {
        result.validate()?;
        let text = encode(result, decode::MAX_RESULT_BYTES)?;
        let shared = &self.shared;
        let id = result.request_id.as_str();
        let published = shared
            .results
            .publish(&shared.link, id, &text, &text)
            .await?;
        let channel = names::result(id);
        let text = match published {
            Published::New => text,
            // Whoever published it may have died before it was announced.
            Published::Known if !shared.exists(&channel).await? => {
                let known = shared.get(&shared.results.known(id)).await?;
                String::from_utf8_lossy(&known.unwrap_or_default()).into_owned()
            }
            Published::Known => return Ok(published),
        };
        shared
            .set_and_say(&channel, &text, names::KEEP_S, &channel, &text)
            .await?;
        Ok(published)
    }

    async fn result(&self, request_id: &str) -> Result<Option<WorkerResult>, TransportError> {
        check_request_id(request_id)?;
        let known = self.shared.results.known(request_id);
        match self.shared.get(&known).await? {
            Some(text) => Ok(Some(decode::result(&text)?)),
            None => Ok(None),
        }
    }

    async fn next_result(&self, wait: Duration) -> Result<Option<ResultDelivery>, TransportError> {
        let shared = &self.shared;
        let deadline = Instant::now() + wait;
        let mut bell = shared.hub.results();
        loop {
            bell.mark_unchanged();
            if let Some(handed) = shared.results.take(&shared.link).await? {
                match decode::result(&handed.data) {
                    Ok(result) => {
                        return Ok(Some(ResultDelivery {
                            receipt: handed.receipt(&result.request_id),
                            result,
                        }));
                    }
                    Err(error) => {
                        let reason = chain(&error);
                        // Kept before it is told, and gone when that was acknowledged: a crash in between tells it twice.
                        if let Some(result) = decode::unreadable(&handed.data, &reason) {
                            shared.keep_letter(&handed.data, &reason).await?;
                            let receipt = handed.receipt(&result.request_id);
                            return Ok(Some(ResultDelivery { result, receipt }));
                        }
                        shared.bury(&shared.results, &handed, &reason).await?;
                        continue;
                    }
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            hub::wait(&mut bell, left.min(POLL).min(shared.options.lease)).await;
        }
    }

    async fn ack_result(&self, receipt: &str) -> Result<(), TransportError> {
        self.shared.results.settle(&self.shared.link, receipt).await
    }

    async fn release_result(&self, receipt: &str) -> Result<(), TransportError> {
        self.shared
            .results
            .release(&self.shared.link, receipt)
            .await
    }

    async fn cancel(&self, request_id: &str) -> Result<(), TransportError> {
        check_request_id(request_id)?;
        let order = ControlMessage::from(Control::Cancel {
            request_id: request_id.to_owned(),
        });
        let order = encode(&order, decode::MAX_CONTROL_BYTES)?;
        let key = names::cancel(request_id);
        self.shared
            .set_and_say(&key, "1", names::KEEP_UNSETTLED_S, names::CONTROL, &order)
            .await
    }

    async fn cancelled(&self, request_id: &str) -> Result<bool, TransportError> {
        check_request_id(request_id)?;
        self.shared.exists(&names::cancel(request_id)).await
    }

    async fn unpaid(&self, request_id: &str) -> Result<(), TransportError> {
        check_request_id(request_id)?;
        let order = ControlMessage::from(Control::Unpaid {
            request_id: request_id.to_owned(),
        });
        let order = encode(&order, decode::MAX_CONTROL_BYTES)?;
        self.shared.say(names::CONTROL, &order).await
    }

    async fn drain(&self, spawner: Option<&str>) -> Result<(), TransportError> {
        let order = ControlMessage::from(Control::Drain {
            spawner: spawner.map(str::to_owned),
        });
        let order = encode(&order, decode::MAX_CONTROL_BYTES)?;
        self.shared.say(names::CONTROL, &order).await
    }

    async fn controls(&self) -> Result<ControlStream, TransportError> {
        Ok(self.shared.hub.orders(self.shared.options.patience).await)
    }

    async fn heartbeat(&self, heartbeat: &Heartbeat) -> Result<(), TransportError> {
        let text = encode(heartbeat, decode::MAX_CONTROL_BYTES)?;
        let Options { lives, lately, .. } = self.shared.options;
        seen::beat(
            &self.shared.link,
            &heartbeat.spawner,
            &text,
            (lives, lately),
        )
        .await
    }

    async fn spawners(&self) -> Result<Vec<Heartbeat>, TransportError> {
        seen::alive(&self.shared.link).await
    }

    async fn seen_spawners(&self) -> Result<Vec<Seen>, TransportError> {
        seen::lately(&self.shared.link, self.shared.options.lately).await
    }

    async fn farewell(&self, spawner: &str) -> Result<(), TransportError> {
        seen::farewell(&self.shared.link, spawner).await
    }

    async fn may_lose(&self) -> Result<Option<String>, TransportError> {
        settings::may_lose(&self.shared.link).await
    }

    async fn job_size(&self, request_id: &str) -> Result<Option<Size>, TransportError> {
        check_request_id(request_id)?;
        let known = self.shared.jobs.known(request_id);
        let noted = self.shared.get(&known).await?;
        Ok(noted.and_then(|noted| seen::read_note(&noted)))
    }
}
