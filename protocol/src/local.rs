//! The in-process transport: queues in memory, and a folder from which a restarted program goes on.
//!
//! ```text
//! lock                 held by the one process that uses the folder
//! jobs/{id}.json       from publish to acknowledgement, with the number of deliveries
//! results/{id}.json    from publish until the crew acknowledges it
//! ended/{id}.json      acknowledged results, for a day
//! cancelled/{id}       cancelled requests, for thirty days
//! dead/{id}.json       poison, with its reason, for thirty days
//! ```
//! Every file appears whole (written aside, synced, renamed). Events, orders and heartbeats live in
//! memory only: they are for those who listen now.

mod feeds;
mod folder;
mod queue;

use crate::request::check_request_id;
use crate::room;
use crate::transport::{
    ControlStream, EventStream, JobDelivery, LATELY, LIVES, Published, REMEMBERED, ResultDelivery,
    Seen, Transport, TransportError,
};
use crate::{
    Control, Heartbeat, Rooms, Size, SpawnRequest, WorkerEvent, WorkerResult, chain, decode,
    encode, names,
};
use async_trait::async_trait;
use feeds::Feeds;
use folder::{Folder, Kind, Stored};
use queue::{Hold, Queue};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;
use tokio::sync::{broadcast, watch};
use tokio::time::Instant;

/// How long whoever waits for a job goes without looking again.
const POLL: Duration = Duration::from_secs(1);

/// What can be chosen about a [`LocalTransport`].
#[derive(Clone, Debug)]
pub struct Options {
    /// The folder; made when it is missing.
    pub folder: PathBuf,
    /// How many jobs and unacknowledged results may be kept; publishing more is refused.
    pub capacity: usize,
    /// How long a delivery is held without a renewal before it is handed out again.
    pub lease: Duration,
    /// How many events are kept per request; the oldest go first.
    pub events: usize,
    /// How long a heartbeat counts.
    pub lives: Duration,
    /// How long a spawner that is not heard of any more is remembered.
    pub lately: Duration,
}

impl Options {
    /// The usual choices for `folder`: 1024 entries, a lease of a minute, 256 events a request.
    pub fn new(folder: impl Into<PathBuf>) -> Self {
        Self {
            folder: folder.into(),
            capacity: 1024,
            lease: Duration::from_mins(1),
            events: 256,
            lives: LIVES,
            lately: LATELY,
        }
    }
}

/// The in-process transport. One process at a time may use a folder.
pub struct LocalTransport {
    options: Options,
    folder: Folder,
    state: tokio::sync::Mutex<State>,
    /// Rung when a job or a result may have become available.
    bell: watch::Sender<u64>,
    feeds: Feeds,
    controls: broadcast::Sender<Control>,
    /// What each spawner said last, and when.
    heartbeats: Mutex<BTreeMap<String, (Heartbeat, Instant)>>,
}

#[derive(Default)]
struct State {
    jobs: Queue<SpawnRequest>,
    results: Queue<WorkerResult>,
    /// Order of the next entry; grows for ever.
    next_order: u64,
    /// Number of the next delivery, to make receipts unique.
    next_delivery: u64,
    pruned: Option<Instant>,
}

impl LocalTransport {
    /// Opens a folder with the usual choices.
    pub async fn open(folder: impl AsRef<Path>) -> Result<Self, TransportError> {
        Self::with(Options::new(folder.as_ref())).await
    }

    /// Opens a folder. What a former process left unfinished is offered again; files that are not
    /// messages become dead letters.
    pub async fn with(options: Options) -> Result<Self, TransportError> {
        let folder = Folder::open(options.folder.clone()).await?;
        let mut state = State::default();
        let mut poison = Vec::new();
        for (id, text) in folder.read_all(Kind::Jobs).await? {
            match Stored::parse(&text).and_then(|s| Ok((decode::request(s.body())?, s))) {
                Ok((request, stored)) if request.request_id == id => {
                    state.next_order = state.next_order.max(stored.order + 1);
                    state
                        .jobs
                        .insert(stored.order, id, request, stored.deliveries);
                }
                Ok(_) => poison.push((Kind::Jobs, id, text, "names another request".to_owned())),
                Err(error) => poison.push((Kind::Jobs, id, text, chain(&error))),
            }
        }
        for (id, text) in folder.read_all(Kind::Results).await? {
            match Stored::parse(&text).and_then(|s| Ok((decode::result(s.body())?, s))) {
                Ok((result, stored)) if result.request_id == id => {
                    state.next_order = state.next_order.max(stored.order + 1);
                    state.results.insert(stored.order, id, result, 0);
                }
                Ok(_) => poison.push((Kind::Results, id, text, "names another request".to_owned())),
                Err(error) => poison.push((Kind::Results, id, text, chain(&error))),
            }
        }
        // Last, when the places of all that can be read are known.
        for (kind, id, text, reason) in poison {
            answer(&folder, &mut state, kind, &id, &text, &reason).await?;
        }
        Ok(Self {
            feeds: Feeds::new(options.events),
            options,
            folder,
            state: tokio::sync::Mutex::new(state),
            bell: watch::Sender::new(0),
            controls: broadcast::Sender::new(256),
            heartbeats: Mutex::default(),
        })
    }

    /// Spawners that were heard of within this time, by name.
    fn heard_within(&self, time: Duration) -> Vec<Seen> {
        let now = Instant::now();
        let beats = lock(&self.heartbeats);
        let seen = beats.values().map(|(beat, at)| Seen {
            last: beat.clone(),
            silent: now.duration_since(*at),
        });
        seen.filter(|seen| seen.silent < time).collect()
    }

    fn ring(&self) {
        self.bell.send_modify(|rung| *rung = rung.wrapping_add(1));
    }

    async fn prune(&self, state: &mut State) -> Result<(), TransportError> {
        let now = Instant::now();
        let due = state
            .pruned
            .is_none_or(|at| now.duration_since(at) > Duration::from_hours(1));
        if due {
            state.pruned = Some(now);
            let keep = Duration::from_secs(names::KEEP_S);
            self.folder.prune(Kind::Ended, keep).await?;
            let long = Duration::from_secs(names::KEEP_UNSETTLED_S);
            self.folder.prune(Kind::Cancelled, long).await?;
            self.folder.prune(Kind::Dead, long).await?;
        }
        Ok(())
    }

    /// Waits until something may have changed, but not beyond `deadline`; false when it is reached.
    async fn wait(
        bell: &mut watch::Receiver<u64>,
        expiry: Option<Instant>,
        deadline: Instant,
    ) -> bool {
        let until = expiry.map_or(deadline, |expiry| expiry.min(deadline));
        // A closed or silent bell both mean: look again, or give up at the deadline.
        let _ = tokio::time::timeout_at(until, bell.changed()).await;
        Instant::now() < deadline
    }
}

/// Puts a file aside that cannot be read. Whoever waits for what it was about is told so, if it says whom that is.
async fn answer(
    folder: &Folder,
    state: &mut State,
    kind: Kind,
    id: &str,
    text: &str,
    reason: &str,
) -> Result<(), TransportError> {
    let body = Stored::parse(text).ok();
    let said = body.and_then(|stored| match kind {
        Kind::Jobs => decode::refusal(stored.body(), reason),
        _ => decode::unreadable(stored.body(), reason),
    });
    let told = matches!(kind, Kind::Jobs)
        && (state.results.get(id).is_some() || folder.exists(Kind::Ended, id).await?);
    let Some(result) = said.filter(|result| result.request_id == id && !told) else {
        return bury(folder, kind, id, text, reason).await;
    };
    // Kept, then told, then forgotten: a crash in between does it again.
    folder
        .write(Kind::Dead, id, folder::dead_letter(reason, text))
        .await?;
    let order = state.next_order;
    state.next_order += 1;
    let message = encode(&result, decode::MAX_RESULT_BYTES)?;
    let stored = folder::stored(order, 0, &message);
    folder.write(Kind::Results, id, stored).await?;
    state.results.insert(order, id.to_owned(), result, 0);
    if matches!(kind, Kind::Jobs) {
        folder.remove(kind, id).await?;
    }
    tracing::error!(
        id,
        reason,
        "message {id} is poison ({reason}) and was put aside"
    );
    Ok(())
}

async fn bury(
    folder: &Folder,
    kind: Kind,
    id: &str,
    body: &str,
    reason: &str,
) -> Result<(), TransportError> {
    tracing::error!(
        id,
        reason,
        "message {id} is poison ({reason}) and was put aside"
    );
    let letter = folder::dead_letter(reason, body);
    folder.write(Kind::Dead, id, letter).await?;
    folder.remove(kind, id).await
}

#[async_trait]
impl Transport for LocalTransport {
    async fn publish_job(&self, request: &SpawnRequest) -> Result<Published, TransportError> {
        request.validate()?;
        let text = encode(request, decode::MAX_REQUEST_BYTES)?;
        let id = request.request_id.as_str();
        let mut state = self.state.lock().await;
        self.prune(&mut state).await?;
        if state.jobs.get(id).is_some()
            || state.results.get(id).is_some()
            || self.folder.exists(Kind::Ended, id).await?
            || self.folder.exists(Kind::Dead, id).await?
        {
            return Ok(Published::Known);
        }
        if state.jobs.entries.len() + state.results.entries.len() >= self.options.capacity {
            return Err(TransportError::Full {
                queue: names::JOBS,
                limit: self.options.capacity,
            });
        }
        let order = state.next_order;
        state.next_order += 1;
        let stored = folder::stored(order, 0, &text);
        self.folder.write(Kind::Jobs, id, stored).await?;
        state.jobs.insert(order, id.to_owned(), request.clone(), 0);
        drop(state);
        self.ring();
        Ok(Published::New)
    }

    async fn next_job_for(
        &self,
        rooms: &Rooms,
        wait: Duration,
    ) -> Result<Option<JobDelivery>, TransportError> {
        let deadline = Instant::now() + wait;
        let mut bell = self.bell.subscribe();
        let mut rooms = rooms.clone();
        loop {
            let room = rooms.borrow_and_update().clone();
            let expiry = {
                let mut state = self.state.lock().await;
                if let Some(order) = state.jobs.fitting(Instant::now(), &room) {
                    let entry = &state.jobs.entries[&order];
                    let deliveries = entry.deliveries.saturating_add(1);
                    let text = encode(&entry.message, decode::MAX_REQUEST_BYTES)?;
                    let stored = folder::stored(order, deliveries, &text);
                    self.folder
                        .write(Kind::Jobs, &entry.id.clone(), stored)
                        .await?;
                    // No await from here on: a caller that goes away holds nothing.
                    let number = state.next_delivery;
                    state.next_delivery += 1;
                    let lease = self.options.lease;
                    if let Some(entry) = state.jobs.entries.get_mut(&order) {
                        let receipt = format!("{}#{number}", entry.id);
                        entry.deliveries = deliveries;
                        entry.hold = Some(Hold {
                            receipt: receipt.clone(),
                            until: Instant::now() + lease,
                        });
                        return Ok(Some(JobDelivery {
                            request: entry.message.clone(),
                            receipt,
                            deliveries,
                        }));
                    }
                }
                // What waits grows older, until place is kept for it or its grace is over.
                let again = Instant::now() + POLL;
                let expiry = state.jobs.next_expiry();
                Some(expiry.map_or(again, |expiry| expiry.min(again)))
            };
            let goes_on = tokio::select! {
                goes_on = Self::wait(&mut bell, expiry, deadline) => goes_on,
                () = room::changed(&mut rooms) => true,
            };
            if !goes_on {
                return Ok(None);
            }
        }
    }

    async fn renew_job(&self, receipt: &str) -> Result<(), TransportError> {
        let mut state = self.state.lock().await;
        let lease = self.options.lease;
        let (_, entry) = state.jobs.held(receipt)?;
        if let Some(hold) = entry.hold.as_mut() {
            hold.until = Instant::now() + lease;
        }
        Ok(())
    }

    async fn ack_job(&self, receipt: &str) -> Result<(), TransportError> {
        let mut state = self.state.lock().await;
        let (order, entry) = state.jobs.held(receipt)?;
        let id = entry.id.clone();
        self.folder.remove(Kind::Jobs, &id).await?;
        state.jobs.remove(order);
        Ok(())
    }

    async fn release_job(&self, receipt: &str) -> Result<(), TransportError> {
        let mut state = self.state.lock().await;
        let (_, entry) = state.jobs.held(receipt)?;
        entry.hold = None;
        drop(state);
        self.ring();
        Ok(())
    }

    async fn dead_letter(&self, receipt: &str, reason: &str) -> Result<(), TransportError> {
        let mut state = self.state.lock().await;
        let (order, entry) = state.jobs.held(receipt)?;
        let id = entry.id.clone();
        let body = encode(&entry.message, decode::MAX_REQUEST_BYTES)?;
        bury(&self.folder, Kind::Jobs, &id, &body, reason).await?;
        state.jobs.remove(order);
        Ok(())
    }

    async fn dead_letters(&self, limit: usize) -> Result<Vec<(String, String)>, TransportError> {
        let letters = self.folder.read_oldest(Kind::Dead, limit).await?;
        Ok(letters
            .into_iter()
            .map(|(_, text)| folder::open_dead_letter(text))
            .collect())
    }

    async fn publish_event(&self, event: &WorkerEvent) -> Result<(), TransportError> {
        encode(event, decode::MAX_EVENT_BYTES)?;
        self.feeds.publish(event);
        Ok(())
    }

    async fn events(&self, request_id: &str) -> Result<EventStream, TransportError> {
        check_request_id(request_id)?;
        let over = self.result(request_id).await?.is_some();
        Ok(self.feeds.subscribe(request_id, over))
    }

    async fn publish_result(&self, result: &WorkerResult) -> Result<Published, TransportError> {
        result.validate()?;
        let text = encode(result, decode::MAX_RESULT_BYTES)?;
        let id = result.request_id.as_str();
        let mut state = self.state.lock().await;
        if state.results.get(id).is_some() || self.folder.exists(Kind::Ended, id).await? {
            return Ok(Published::Known);
        }
        let order = state.next_order;
        state.next_order += 1;
        let stored = folder::stored(order, 0, &text);
        self.folder.write(Kind::Results, id, stored).await?;
        state
            .results
            .insert(order, id.to_owned(), result.clone(), 0);
        drop(state);
        self.feeds.end(id);
        self.ring();
        Ok(Published::New)
    }

    async fn result(&self, request_id: &str) -> Result<Option<WorkerResult>, TransportError> {
        check_request_id(request_id)?;
        let state = self.state.lock().await;
        if let Some(entry) = state.results.get(request_id) {
            return Ok(Some(entry.message.clone()));
        }
        let Some(text) = self.folder.read(Kind::Ended, request_id).await? else {
            return Ok(None);
        };
        Ok(Some(decode::result(Stored::parse(&text)?.body())?))
    }

    async fn next_result(&self, wait: Duration) -> Result<Option<ResultDelivery>, TransportError> {
        let deadline = Instant::now() + wait;
        let mut bell = self.bell.subscribe();
        loop {
            let expiry = {
                let mut guard = self.state.lock().await;
                let state = &mut *guard;
                let lease = self.options.lease;
                let free = state.results.free(Instant::now());
                if let Some(entry) = free.and_then(|order| state.results.entries.get_mut(&order)) {
                    let receipt = format!("{}#{}", entry.id, state.next_delivery);
                    state.next_delivery += 1;
                    entry.hold = Some(Hold {
                        receipt: receipt.clone(),
                        until: Instant::now() + lease,
                    });
                    return Ok(Some(ResultDelivery {
                        result: entry.message.clone(),
                        receipt,
                    }));
                }
                state.results.next_expiry()
            };
            if !Self::wait(&mut bell, expiry, deadline).await {
                return Ok(None);
            }
        }
    }

    async fn ack_result(&self, receipt: &str) -> Result<(), TransportError> {
        let mut state = self.state.lock().await;
        let (order, entry) = state.results.held(receipt)?;
        let id = entry.id.clone();
        self.folder.rename(Kind::Results, Kind::Ended, &id).await?;
        state.results.remove(order);
        Ok(())
    }

    async fn release_result(&self, receipt: &str) -> Result<(), TransportError> {
        let mut state = self.state.lock().await;
        let (_, entry) = state.results.held(receipt)?;
        entry.hold = None;
        drop(state);
        self.ring();
        Ok(())
    }

    async fn cancel(&self, request_id: &str) -> Result<(), TransportError> {
        check_request_id(request_id)?;
        self.folder
            .write(Kind::Cancelled, request_id, String::new())
            .await?;
        // Nobody listening is fine: the order is durable.
        let _ = self.controls.send(Control::Cancel {
            request_id: request_id.to_owned(),
        });
        Ok(())
    }

    async fn cancelled(&self, request_id: &str) -> Result<bool, TransportError> {
        check_request_id(request_id)?;
        self.folder.exists(Kind::Cancelled, request_id).await
    }

    async fn unpaid(&self, request_id: &str) -> Result<(), TransportError> {
        check_request_id(request_id)?;
        // Nobody listening is fine: then it does not run.
        let _ = self.controls.send(Control::Unpaid {
            request_id: request_id.to_owned(),
        });
        Ok(())
    }

    async fn drain(&self, spawner: Option<&str>) -> Result<(), TransportError> {
        // Nobody listening is fine: there is nobody to drain.
        let _ = self.controls.send(Control::Drain {
            spawner: spawner.map(str::to_owned),
        });
        Ok(())
    }

    async fn controls(&self) -> Result<ControlStream, TransportError> {
        Ok(feeds::live(self.controls.subscribe()))
    }

    async fn heartbeat(&self, heartbeat: &Heartbeat) -> Result<(), TransportError> {
        encode(heartbeat, decode::MAX_CONTROL_BYTES)?;
        let mut beats = lock(&self.heartbeats);
        let now = Instant::now();
        beats.insert(heartbeat.spawner.clone(), (heartbeat.clone(), now));
        beats.retain(|_, (_, at)| now.duration_since(*at) < self.options.lately);
        if beats.len() > REMEMBERED
            && let Some((longest, _)) = beats.iter().min_by_key(|(_, (_, at))| *at)
        {
            let longest = longest.clone();
            beats.remove(&longest);
        }
        Ok(())
    }

    async fn spawners(&self) -> Result<Vec<Heartbeat>, TransportError> {
        let alive = self.heard_within(self.options.lives);
        Ok(alive.into_iter().map(|seen| seen.last).collect())
    }

    async fn seen_spawners(&self) -> Result<Vec<Seen>, TransportError> {
        Ok(self.heard_within(self.options.lately))
    }

    async fn farewell(&self, spawner: &str) -> Result<(), TransportError> {
        lock(&self.heartbeats).remove(spawner);
        Ok(())
    }

    async fn job_size(&self, request_id: &str) -> Result<Option<Size>, TransportError> {
        check_request_id(request_id)?;
        let state = self.state.lock().await;
        let job = state.jobs.get(request_id);
        Ok(job.map(|entry| Size::of(&entry.message.limits)))
    }
}

/// Locks, going on after a panic of another holder: every change under these locks is one call.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}
