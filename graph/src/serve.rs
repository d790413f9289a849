//! Claims threads and runs them, until told to stop.

use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    checkpoint::{Claim, ClaimRequest, Commit, Lease, StorageError, Then},
    engine::Engine,
    error::EngineError,
    host::Shared,
    observer::Point,
    retention::{SweepOptions, keep_swept},
    run::{Controls, give_back},
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

/// The leases held by a server.
type Held = Arc<Mutex<HashMap<Lease, Controls>>>;

impl Engine {
    /// Claims due threads and runs them until the token is cancelled; then takes no more, lets runs finish their step within
    /// `options.drain`, and gives their leases back. A database that fails is asked again, ever more slowly.
    pub async fn serve(
        &self,
        options: ServeOptions,
        stop: CancellationToken,
    ) -> Result<(), EngineError> {
        let mut server = Server::new(self.shared.clone(), options);
        let beat = tokio::spawn(
            heartbeat(
                self.shared.clone(),
                server.held.clone(),
                server.look.clone(),
                server.options.lease,
                server.options.poll,
            )
            .in_current_span(),
        );
        let wakes = &self.shared.wakes;
        let serving = wakes.serving();
        wakes.listen();
        let mut due = wakes.due_here();
        // A set, so that it ends with this, however this ends.
        let mut sweeper = JoinSet::new();
        if let Some(options) = server.options.sweep.clone() {
            let sweep = keep_swept(self.shared.clone(), options, stop.clone());
            sweeper.spawn(sweep.in_current_span());
        }
        let mut failures = 0_u32;
        while !stop.is_cancelled() {
            due.mark_unchanged();
            let pause = match server.claim().await {
                Ok(pause) => {
                    failures = 0;
                    pause
                }
                Err(error) => {
                    failures = failures.saturating_add(1);
                    let pause = server.options.poll * failures.min(10);
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
                Some(_) = server.runs.join_next() => {}
                // Without room too: others may have some.
                _ = due.changed() => {}
                () = tokio::time::sleep(pause), if server.has_room() => {}
            }
        }
        drop(serving);
        server.drain().await;
        beat.abort();
        wakes.flush().await;
        sweeper.shutdown().await;
        Ok(())
    }

    /// Claims and runs what is due now, and what becomes due by that, until nothing is. Timers are not waited for. For
    /// programs that come and go, and for tests.
    pub async fn run_due(&self, options: ServeOptions) -> Result<(), EngineError> {
        let mut server = Server::new(self.shared.clone(), options);
        let beat = tokio::spawn(heartbeat(
            self.shared.clone(),
            server.held.clone(),
            server.look.clone(),
            server.options.lease,
            server.options.poll,
        ));
        let wakes = &self.shared.wakes;
        let serving = wakes.serving();
        let mut due = wakes.due_here();
        let result = loop {
            due.mark_unchanged();
            let before = server.runs.len();
            if let Err(error) = server.claim().await {
                break Err(error.into());
            }
            if server.runs.len() > before && server.has_room() {
                continue;
            }
            if server.runs.is_empty() {
                break Ok(());
            }
            tokio::select! {
                Some(_) = server.runs.join_next() => {}
                _ = due.changed(), if server.has_room() => {}
            }
        };
        drop(serving);
        server.drain().await;
        beat.abort();
        wakes.flush().await;
        result
    }
}

struct Server {
    shared: Arc<Shared>,
    options: ServeOptions,
    graphs: Vec<String>,
    held: Held,
    /// Rings when a lease should be looked at.
    look: Arc<Notify>,
    runs: JoinSet<()>,
}

impl Server {
    fn new(shared: Arc<Shared>, options: ServeOptions) -> Self {
        Self {
            graphs: shared.graphs.keys().cloned().collect(),
            shared,
            options,
            held: Held::default(),
            look: Arc::default(),
            runs: JoinSet::new(),
        }
    }

    fn has_room(&self) -> bool {
        self.runs.len() < self.options.concurrency.max(1)
    }

    /// Claims as much as there is room for. Returns how long to wait before asking again.
    async fn claim(&mut self) -> Result<Duration, StorageError> {
        let fresh = self.shared.wakes.take_fresh();
        while self.runs.try_join_next().is_some() {}
        let room = self
            .options
            .concurrency
            .max(1)
            .saturating_sub(self.runs.len());
        if room == 0 {
            self.shared.wakes.pass_on(fresh);
            return Ok(self.options.poll);
        }
        let claimed = self
            .shared
            .store
            .claim(ClaimRequest {
                owner: &self.options.owner,
                graphs: &self.graphs,
                limit: room,
                lease: self.options.lease,
            })
            .await;
        if claimed.as_ref().map_or(true, |it| it.claims.len() >= room) {
            // There may be more than there is room for.
            self.shared.wakes.pass_on(fresh);
        }
        let claimed = claimed?;
        for claim in claimed.claims {
            self.run(claim);
        }
        Ok(claimed
            .next_due
            .map_or(self.options.poll, |due| due.min(self.options.poll)))
    }

    fn run(&mut self, claim: Claim) {
        let Ok(graph) = self.shared.graph(&claim.thread.graph).cloned() else {
            tracing::error!(thread = %claim.thread.id, graph = %claim.thread.graph, "claimed a thread of a graph that this engine does not know");
            return;
        };
        let controls = Controls {
            lease: self.options.lease,
            look: self.look.clone(),
            ..Controls::default()
        };
        let lease = claim.lease.clone();
        self.held.lock().insert(lease.clone(), controls.clone());
        self.shared
            .wakes
            .enter(lease.thread.clone(), lease.token, controls.clone());
        let guard = Guard {
            shared: self.shared.clone(),
            held: self.held.clone(),
            lease,
        };
        let span = tracing::info_span!(
            "run",
            thread = %claim.thread.id,
            graph = %claim.thread.graph,
            token = claim.lease.token,
        );
        self.shared.observe(&Point::RunStarted {
            thread: &claim.thread.id,
            span: &span,
        });
        let engine = self.shared.clone();
        let (shared, within) = (self.shared.clone(), self.options.lease);
        let name = claim.thread.graph.clone();
        let grace = self.options.cancel_grace;
        self.runs.spawn(
            async move {
                let lost = controls.lost.clone();
                let run = graph.run(engine, claim, controls, grace);
                let result = tokio::select! {
                    result = run => result,
                    () = lost.cancelled() => {
                        tracing::warn!(thread = %guard.lease.thread, "the lease was lost; the run stops");
                        Ok(())
                    }
                };
                match result {
                    Ok(()) => {}
                    Err(error @ StorageError::Fenced { .. }) => {
                        tracing::warn!(%error, "somebody else runs the thread now");
                    }
                    Err(error) => {
                        tracing::error!(thread = %guard.lease.thread, error = %crate::private::chain(&error), "the run broke off");
                        // Whoever claims the thread then finds out what the database knows.
                        if let StorageError::Backend { .. } = error {
                            give_back(&shared, &guard.lease, &name, within).await;
                        }
                    }
                }
                drop(guard);
            }
            .instrument(span),
        );
    }

    /// Lets runs finish their step, and stops what takes too long.
    async fn drain(mut self) {
        for controls in self.held.lock().values() {
            controls.drain.cancel();
        }
        let deadline = tokio::time::Instant::now() + self.options.drain;
        while let Ok(Some(_)) = tokio::time::timeout_at(deadline, self.runs.join_next()).await {}
        if self.runs.is_empty() {
            return;
        }
        let left: Vec<Lease> = self.held.lock().keys().cloned().collect();
        self.runs.shutdown().await;
        for lease in left {
            tracing::warn!(thread = %lease.thread, "did not finish its step in time; another process runs it again");
            let mut commit = Commit::on(0);
            commit.then = Then::Yield;
            let released = self.shared.store.commit(&lease, commit).await;
            self.shared.wake();
            if let Err(error) = released {
                tracing::warn!(thread = %lease.thread, error = %crate::private::chain(&error), "the lease could not be given back; it will expire");
            }
        }
    }
}

/// Strikes a run off the lists, however it ends.
struct Guard {
    shared: Arc<Shared>,
    held: Held,
    lease: Lease,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.held.lock().remove(&self.lease);
        self.shared
            .wakes
            .leave(&self.lease.thread, self.lease.token);
    }
}

/// Renews leases, and hears of lost ones and of cancellations from other processes.
async fn heartbeat(
    shared: Arc<Shared>,
    held: Held,
    look: Arc<Notify>,
    lease: Duration,
    poll: Duration,
) {
    let mut beat = tokio::time::interval((lease / 3).min(poll.max(BEAT)));
    beat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    beat.tick().await;
    loop {
        tokio::select! {
            _ = beat.tick() => {}
            () = look.notified() => {}
        }
        let leases: Vec<Lease> = held.lock().keys().cloned().collect();
        if leases.is_empty() {
            continue;
        }
        let renewed = match shared.store.renew(&leases, lease).await {
            Ok(renewed) => renewed,
            Err(error) => {
                tracing::warn!(error = %crate::private::chain(&error), "renewing leases failed");
                continue;
            }
        };
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
    }
}
