//! Claims threads and runs them, until told to stop.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use tokio::task::JoinSet;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::Instrument;

use crate::{
    checkpoint::{ClaimRequest, Claimed, Commit, Lease, StorageError, Then},
    engine::Engine,
    error::EngineError,
    host::Shared,
    observer::Point,
    retention::{SweepOptions, keep_swept},
    room::Room,
};

/// How often leases are looked at, if not even less is asked for.
const BEAT: Duration = Duration::from_secs(1);

/// How threads are run.
#[derive(Clone, Debug)]
pub struct ServeOptions {
    /// How many threads run at once.
    pub concurrency: usize,
    /// How long a lease holds without renewal: after so long, another process takes over what a dead one ran.
    pub lease: Duration,
    /// The name of this process, for people.
    pub owner: String,
    /// How often the database is asked for due threads when nothing was heard. Signals, starts and cancellations are told by
    /// messages, also between processes (see [`Bell`](crate::checkpoint::Bell)); this is for those that get lost. Above a
    /// second, leases are renewed as seldom, but at least every third of their time.
    pub poll: Duration,
    /// How long runs may take to finish their step when told to stop.
    pub drain: Duration,
    /// How long a task may go on after its thread was cancelled.
    pub cancel_grace: Duration,
    /// What [`Engine::serve`] forgets of the past from time to time, if anything.
    pub sweep: Option<SweepOptions>,
}

impl Default for ServeOptions {
    fn default() -> Self {
        Self {
            concurrency: 8,
            lease: Duration::from_secs(30),
            owner: format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple()),
            poll: Duration::from_secs(1),
            drain: Duration::from_secs(20),
            cancel_grace: Duration::from_secs(1),
            sweep: None,
        }
    }
}

impl Engine {
    /// Claims due threads and runs them until the token is cancelled; then takes no more, lets runs finish their step within
    /// `options.drain`, and gives their leases back. A database that fails is asked again, ever more slowly.
    pub async fn serve(
        &self,
        options: ServeOptions,
        stop: CancellationToken,
    ) -> Result<(), EngineError> {
        let server = Server::new(self.shared.clone(), options);
        let room = server.room.clone();
        let options = &room.options;
        let beat = beating(&room);
        let wakes = &self.shared.wakes;
        let serving = wakes.serving();
        wakes.listen();
        let mut due = wakes.due_here();
        // A set, so that it ends with this, however this ends.
        let mut sweeper = JoinSet::new();
        if let Some(options) = options.sweep.clone() {
            let sweep = keep_swept(self.shared.clone(), options, stop.clone());
            sweeper.spawn(sweep.in_current_span());
        }
        if self.shared.store.creates_leased() {
            self.shared.rooms.add(&room);
        }
        let mut failures = 0_u32;
        while !stop.is_cancelled() {
            due.mark_unchanged();
            let claimed = match server.others_first(&stop).await {
                Ok(()) => server.claim().await,
                Err(error) => Err(error),
            };
            let pause = match claimed {
                Ok(pause) => {
                    failures = 0;
                    pause
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let pause = options.poll * failures.min(10);
                    tracing::error!(error = %crate::private::chain(&error), retry_in = ?pause, "claiming threads failed");
                    pause
                }
            };
            if failures > 0 {
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = stop.cancelled() => {}
                }
                continue;
            }
            tokio::select! {
                () = stop.cancelled() => {}
                () = room.freed() => {}
                // Without room too: others may have some.
                _ = due.changed() => {}
                () = tokio::time::sleep(pause), if room.has_room() => {}
            }
        }
        drop(serving);
        server.drain().await;
        drop(beat);
        wakes.flush().await;
        sweeper.shutdown().await;
        Ok(())
    }

    /// Claims and runs what is due now, and what becomes due by that, until nothing is. Timers are not waited for. For
    /// programs that come and go, and for tests.
    pub async fn run_due(&self, options: ServeOptions) -> Result<(), EngineError> {
        let server = Server::new(self.shared.clone(), options);
        let room = server.room.clone();
        let beat = beating(&room);
        let wakes = &self.shared.wakes;
        let serving = wakes.serving();
        let mut due = wakes.due_here();
        let result = loop {
            due.mark_unchanged();
            let before = room.running();
            if let Err(error) = server.claim().await {
                break Err(error.into());
            }
            if room.running() > before && room.has_room() {
                continue;
            }
            if room.running() == 0 {
                break Ok(());
            }
            tokio::select! {
                () = room.one_over() => {}
                _ = due.changed(), if room.has_room() => {}
            }
        };
        drop(serving);
        server.drain().await;
        drop(beat);
        wakes.flush().await;
        result
    }
}

struct Server {
    room: Arc<Room>,
    graphs: Vec<String>,
}

/// However it ends: what runs here ends with it.
impl Drop for Server {
    fn drop(&mut self) {
        drop(self.room.close());
    }
}

impl Server {
    fn new(shared: Arc<Shared>, options: ServeOptions) -> Self {
        Self {
            graphs: shared.graphs.keys().cloned().collect(),
            room: Room::new(shared, options),
        }
    }

    /// When the database is back after a time in which leases may have expired: lets those renew theirs who hold them.
    async fn others_first(&self, stop: &CancellationToken) -> Result<(), StorageError> {
        let Room {
            shared,
            options,
            touch,
            ..
        } = &*self.room;
        if !touch.was_long_lost() {
            return Ok(());
        }
        // It changes nothing, and tells whether there is anybody.
        shared.store.journal_end().await?;
        let pause = beat(options) * 2;
        tracing::info!(
            ?pause,
            "the database is back; others renew their leases first"
        );
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = stop.cancelled() => {}
        }
        if self.room.held.lock().is_empty() {
            touch.found();
        }
        Ok(())
    }

    /// Claims as much as there is room for. Returns how long to wait before asking again.
    async fn claim(&self) -> Result<Duration, StorageError> {
        let Room {
            shared,
            options,
            touch,
            ..
        } = &*self.room;
        self.room.reap();
        // In this order: what becomes due now is news.
        let (news, since) = (shared.wakes.news(), Instant::now());
        if let Some(pause) = self.room.clear_for(news) {
            return Ok(pause);
        }
        if touch.must_renew() {
            // Or else it would take its own threads away from itself.
            renew(&self.room).await?;
        }
        let fresh = shared.wakes.take_fresh();
        let mut seats = self.room.take_all();
        let room = seats.len();
        if room == 0 {
            shared.wakes.pass_on(fresh);
            return Ok(options.poll);
        }
        let claimed = shared
            .store
            .claim(ClaimRequest {
                owner: &options.owner,
                graphs: &self.graphs,
                limit: room,
                lease: options.lease,
            })
            .await;
        match &claimed {
            Ok(_) => touch.found(),
            Err(StorageError::Backend { .. }) => touch.lost(),
            Err(_) => {}
        }
        if claimed.as_ref().map_or(true, |it| it.claims.len() >= room) {
            // There may be more than there is room for.
            shared.wakes.pass_on(fresh);
        }
        let Claimed {
            claims, next_due, ..
        } = claimed?;
        // As many as were asked for: only some databases say that there was no more.
        let is_all = claims.len() < room
            || (shared.store.creates_leased() && next_due != Some(Duration::ZERO));
        for claim in claims {
            let seat = seats.pop().unwrap_or_default();
            // Only this closes the room.
            let _ = self.room.run(claim, seat);
        }
        if is_all {
            self.room.note_clear(since, news, next_due);
        } else {
            self.room.note_unclear();
        }
        Ok(next_due.map_or(options.poll, |due| due.min(options.poll)))
    }

    /// Lets runs finish their step, and stops what takes too long.
    async fn drain(self) {
        let Room {
            shared,
            options,
            held,
            ..
        } = &*self.room;
        let mut runs = self.room.close();
        for controls in held.lock().values() {
            controls.drain.cancel();
        }
        if !runs.is_empty() {
            shared.observe(&Point::Draining);
        }
        let deadline = tokio::time::Instant::now() + options.drain;
        while let Ok(Some(_)) = tokio::time::timeout_at(deadline, runs.join_next()).await {}
        if runs.is_empty() {
            return;
        }
        let left: Vec<Lease> = held.lock().keys().cloned().collect();
        runs.shutdown().await;
        for lease in left {
            tracing::warn!(thread = %lease.thread, "did not finish its step in time; another process runs it again");
            let mut commit = Commit::on(0);
            commit.then = Then::Yield;
            let released = shared.store.commit(&lease, commit).await;
            shared.wake();
            if let Err(error) = released {
                tracing::warn!(thread = %lease.thread, error = %crate::private::chain(&error), "the lease could not be given back; it will expire");
            }
        }
    }
}

/// How often leases are looked at.
fn beat(options: &ServeOptions) -> Duration {
    (options.lease / 3).min(options.poll.max(BEAT))
}

/// Renews leases again and again, as long as the guard lives: a loop that is dropped must not keep its engine alive.
fn beating(room: &Arc<Room>) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(heartbeat(room.clone()).in_current_span()))
}

async fn heartbeat(room: Arc<Room>) {
    let mut beat = tokio::time::interval(beat(&room.options));
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    beat.tick().await;
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            () = room.look.notified() => {}
        }
        if let Err(error) = renew(&room).await {
            tracing::warn!(error = %crate::private::chain(&error), "renewing leases failed");
        }
    }
}

/// Renews leases, and hears of lost ones and of cancellations from other processes.
async fn renew(room: &Room) -> Result<(), StorageError> {
    let Room {
        shared,
        held,
        touch,
        options,
        ..
    } = room;
    let since = tokio::time::Instant::now();
    let leases: Vec<Lease> = held.lock().keys().cloned().collect();
    if leases.is_empty() {
        return Ok(());
    }
    let renewed = match shared.store.renew(&leases, options.lease).await {
        Ok(renewed) => renewed,
        Err(error) => {
            touch.lost();
            return Err(error);
        }
    };
    touch.renewed(since);
    let held = held.lock();
    for renewal in renewed {
        let found = held
            .iter()
            .find(|(lease, _)| lease.thread == renewal.thread && leases.contains(lease));
        let Some((_, controls)) = found else { continue };
        if renewal.input {
            controls.news.notify_one();
        }
        if !renewal.held {
            if !controls.leaving.load(Ordering::Acquire) {
                controls.lost.cancel();
            }
        } else if let Some(reason) = renewal.cancel {
            controls.request_cancel(reason);
        }
    }
    Ok(())
}
