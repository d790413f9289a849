//! The loop around the attempts: takes jobs, as many as may run; keeps them; ends them when asked;
//! and never forgets one.

use crate::attempt::Attempt;
use crate::capacity::{self, Fit, Load};
use crate::events::Events;
use crate::places::{self, Places};
use crate::reading::Reading;
use crate::runtime::Identity;
use crate::seat::{Desks, Seat};
use crate::stop::{self, Stop, Why};
use crate::trouble::{Trouble, chain, kind};
use crate::{Error, Options, disk, keeping, presence, reconcile};
use futures::StreamExt as _;
use jiff::Timestamp;
use protocol::{
    Control, Heartbeat, JobDelivery, LATELY, ResultStatus, Size, SpawnRequest, TransportError,
    VERSION, WorkerResult,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::{OnceCell, watch};
use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument as _;

/// How often a job may be handed out before it counts as poison: that often the spawner died with it.
const MAX_DELIVERIES: u32 = 20;
/// How long one wait for a job is.
const POLL: Duration = Duration::from_secs(5);
/// How often it is looked what other spawners have.
const LOOK_AROUND: Duration = Duration::from_secs(5);
/// How often a running job is renewed and its cancellation looked up.
const RENEW: Duration = Duration::from_secs(2);
/// How long the transport may fail until a result is given up (the job is offered again then).
const PUBLISH_TRIES: u32 = 30;
/// How long nothing is taken as long as it is not known which workers run here already. An engine that is away for longer is
/// said so by the jobs that need it.
const FIRST_LOOK: Duration = Duration::from_secs(30);
/// How long removing what is left of a worker may take.
const DISCARD: Duration = Duration::from_secs(30);
/// How long everything may take to end when the program does.
const FAREWELL: Duration = Duration::from_secs(10);

/// Takes jobs from the transport and runs their workers in this process.
pub struct Spawner {
    shared: Arc<Shared>,
}

/// Looks at a running [`Spawner`] and steers it; cheap to clone.
#[derive(Clone)]
pub struct Handle(Arc<Shared>);

struct Shared {
    options: Options,
    load: Arc<Load>,
    drain: CancellationToken,
    /// Stops of the attempts that run, by request.
    running: Mutex<HashMap<String, Stop>>,
    /// Newer receipts of those, by request: a hold that ran out while the transport was away, and came back to us.
    again: Mutex<HashMap<String, String>>,
    /// Whether workspaces are disks of their own, once it is known.
    disks: OnceLock<bool>,
    /// What reads the work of workers, once it is known.
    reading: OnceCell<Reading>,
    /// Who works in a workspace.
    desks: Desks,
    /// It was said that we live, and that those whose place we have taken do not any more.
    introduced: CancellationToken,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Handle {
    /// How many workers run now.
    pub fn running(&self) -> usize {
        lock(&self.0.running).len()
    }

    /// Takes no more jobs; [`Spawner::run`] returns when those that run have ended.
    pub fn drain(&self) {
        self.0.drain.cancel();
    }
}

impl Spawner {
    /// Checks what is needed. Nothing starts before [`Spawner::run`].
    pub fn new(options: Options) -> Result<Self, Error> {
        if options.max_workers == 0 {
            return Err(Error::NoRoom);
        }
        options.runtime.check()?;
        let workspaces = options.home.join("workspaces");
        places::private_folder(&workspaces).map_err(|source| Error::Home {
            path: workspaces.clone(),
            source,
        })?;
        let load = Arc::new(Load::new(options.max_workers, &options.capacity));
        Ok(Self {
            shared: Arc::new(Shared {
                options,
                load,
                drain: CancellationToken::new(),
                running: Mutex::default(),
                again: Mutex::default(),
                disks: OnceLock::new(),
                reading: OnceCell::new(),
                desks: Desks::default(),
                introduced: CancellationToken::new(),
            }),
        })
    }

    /// A handle to this spawner.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }

    /// Works until `shutdown` (the jobs are offered again; workers are ended, or go on where they can and wait to be adopted) or
    /// until it is drained (the workers that run are finished).
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Error> {
        let shared = self.shared;
        let options = &shared.options;
        let disks = disk::choose(options.disk, &options.home, options.runtime.as_ref()).await?;
        shared.disks.get_or_init(|| disks);
        let transport = &options.transport;
        let controls = transport.controls().await.map_err(Error::Transport)?;
        let _here = shared.show_presence().await;
        let tasks = TaskTracker::new();
        // Ends the helpers when the last worker has ended, however this returns.
        let over = CancellationToken::new();
        let _over = over.clone().drop_guard();
        tokio::spawn(over.clone().run_until_cancelled_owned({
            let shared = Arc::clone(&shared);
            async move { shared.obey(controls).await }
        }));
        let beating = tokio::spawn(over.clone().run_until_cancelled_owned({
            let shared = Arc::clone(&shared);
            async move { shared.beat().await }
        }));
        let (looked, mut known) = watch::channel(0);
        tokio::spawn(over.clone().run_until_cancelled_owned({
            let shared = Arc::clone(&shared);
            async move {
                let is_running = |id: &str| lock(&shared.running).contains_key(id);
                let (options, load) = (&shared.options, &shared.load);
                reconcile::forever(options, load, &looked, is_running).await;
            }
        }));
        tokio::spawn(over.clone().run_until_cancelled_owned({
            let shared = Arc::clone(&shared);
            async move { shared.look_around().await }
        }));
        tokio::spawn(over.clone().run_until_cancelled_owned({
            let (home, keep) = (shared.options.home.clone(), shared.options.keep);
            async move { keeping::forever(&home, keep).await }
        }));
        // As long as jobs are taken.
        let taking = over.child_token();
        let warm = tokio::spawn({
            let (shared, stop) = (Arc::clone(&shared), taking.clone());
            async move { shared.options.runtime.keep_warm(disks, &stop).await }
        });
        tokio::spawn(over.clone().run_until_cancelled_owned({
            let home = shared.options.home.clone();
            async move { disk::forever(&home).await }
        }));
        // Said at the start, and not with the first job.
        shared.reading().await;
        let rooms = shared.load.rooms();
        // What runs here already is not free, and has to be known before anything is taken.
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = shared.drain.cancelled() => {}
            _ = tokio::time::timeout(FIRST_LOOK, known.wait_for(|looked| *looked > 0)) => {}
        }
        loop {
            let delivery = tokio::select! {
                () = shutdown.cancelled() => break,
                () = shared.drain.cancelled() => break,
                delivery = transport.next_job_for(&rooms, POLL) => delivery,
            };
            match delivery {
                Ok(Some(delivery)) => {
                    // Before the next job is looked for.
                    let request = &delivery.request;
                    let load = shared.load.begin(&request.request_id, delivery.size());
                    let shared = Arc::clone(&shared);
                    let shutdown = shutdown.clone();
                    let span = tracing::info_span!(
                        "worker",
                        request = request.request_id,
                        project = request.project_id,
                        job = request.job_id,
                        task = request.task_id,
                        attempt = request.attempt,
                    );
                    if let Some(parent) = &request.trace_context {
                        (shared.options.continue_trace)(&span, parent);
                    }
                    tasks.spawn(
                        async move {
                            shared.handle(delivery, &shutdown).await;
                            drop(load);
                        }
                        .instrument(span),
                    );
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot take a job; trying again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        taking.cancel();
        tasks.close();
        tokio::select! {
            () = tasks.wait() => {}
            () = async {
                shutdown.cancelled().await;
                tokio::time::sleep(FAREWELL).await;
            } => tracing::warn!("some workers did not end in time; their jobs are offered again"),
        }
        // What is not cleared away by then is found by the next one.
        if tokio::time::timeout(FAREWELL, warm).await.is_err() {
            tracing::warn!("containers that waited for a job were not removed in time");
        }
        // What was interrupted is mounted still. A worker that goes on keeps its disk.
        let home = options.home.clone();
        if let Err(error) = disk::blocking(move || disk::sweep(&home)).await {
            tracing::warn!(%error, "disks stay mounted; the next spawner unmounts them");
        }
        over.cancel();
        // A last heartbeat may not come after the farewell.
        let _ = beating.await;
        if shared.drain.is_cancelled() {
            shared.say_farewell().await;
        }
        Ok(())
    }
}

impl Shared {
    /// Follows the orders.
    async fn obey(&self, mut controls: protocol::ControlStream) {
        while let Some(control) = controls.next().await {
            match control {
                Control::Cancel { request_id } => self.stop(&request_id, Why::Cancelled),
                Control::Unpaid { request_id } => self.stop(&request_id, Why::Unpaid),
                Control::Drain { spawner } => {
                    if spawner.is_none_or(|name| name == self.options.name) {
                        tracing::info!("this spawner takes no more jobs");
                        self.drain.cancel();
                    }
                }
            }
        }
    }

    fn stop(&self, request_id: &str, why: Why) {
        if let Some(stop) = lock(&self.running).get(request_id) {
            stop.stop(why);
        }
    }

    /// Says every few seconds that we live.
    async fn beat(&self) {
        let mut tick = tokio::time::interval(Duration::from_secs(10));
        let mut drains = false;
        loop {
            tokio::select! {
                _ = tick.tick() => {}
                // Said at once, and once: nothing large may go on waiting for us.
                () = self.drain.cancelled(), if !drains => drains = true,
            }
            let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            let beat = Heartbeat {
                version: VERSION,
                spawner: self.options.name.clone(),
                capacity: count(self.options.max_workers),
                running: count(lock(&self.running).len()),
                size: Some(self.options.capacity.size),
                used: Some(self.load.used()),
                draining: self.drain.is_cancelled(),
                versions: [
                    ("artel".to_owned(), env!("CARGO_PKG_VERSION").to_owned()),
                    ("sandbox".to_owned(), self.options.runtime.describe()),
                ]
                .into(),
                at: Timestamp::now(),
            };
            if let Err(error) = self.options.transport.heartbeat(&beat).await {
                tracing::warn!(%error, "no heartbeat sent");
            } else if !self.introduced.is_cancelled() && self.replace_the_dead().await {
                self.introduced.cancel();
            }
        }
    }

    /// Whoever comes after us in this home knows by it when we are gone.
    async fn show_presence(&self) -> Option<File> {
        let (home, name) = (self.options.home.clone(), self.options.name.clone());
        let shown = tokio::task::spawn_blocking(move || presence::show(&home, &name)).await;
        let shown = shown.unwrap_or_else(|error| Err(io::Error::other(error)));
        shown.unwrap_or_else(|error| {
            tracing::warn!(%error, "the next spawner of this home will not know that this one is gone");
            None
        })
    }

    /// Says farewell for the former spawners of this home: we have taken their place, and may be smaller. Returns whether that
    /// is done.
    async fn replace_the_dead(&self) -> bool {
        let (home, name) = (self.options.home.clone(), self.options.name.clone());
        let dead = tokio::task::spawn_blocking(move || presence::dead(&home, &name)).await;
        let dead = match dead.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(dead) => dead,
            Err(error) => {
                let minutes = LATELY.as_secs() / 60;
                tracing::warn!(%error, "it is not known who worked in this home before; jobs may wait for that one for {minutes} minutes");
                return true;
            }
        };
        for dead in dead {
            if let Err(error) = self.options.transport.farewell(&dead.name).await {
                tracing::warn!(%error, "no farewell was said for {}; trying again", dead.name);
                return false;
            }
            tracing::info!("the spawner {} is replaced by this one", dead.name);
            let forgotten = tokio::task::spawn_blocking(move || presence::forget(&dead)).await;
            if let Err(error) = forgotten.unwrap_or_else(|error| Err(io::Error::other(error))) {
                tracing::warn!(%error, "a farewell will be said once more");
            }
        }
        true
    }

    /// We were drained, and do not come back. Who is only stopped may be started again, and says nothing.
    async fn say_farewell(&self) {
        let transport = &self.options.transport;
        let said = tokio::time::timeout(FAREWELL, transport.farewell(&self.options.name)).await;
        if !matches!(said, Ok(Ok(()))) {
            let minutes = LATELY.as_secs() / 60;
            tracing::warn!(
                "no farewell was said; large jobs may wait for this spawner for {minutes} minutes"
            );
        }
    }

    /// From when a job may have waited for long enough on: keeps in mind what other spawners have, so that a job that fits none
    /// is found out.
    async fn look_around(&self) {
        let capacity = &self.options.capacity;
        tokio::time::sleep(capacity.grace).await;
        // Those whose place we have taken are nobody's hope.
        let _ = tokio::time::timeout(FIRST_LOOK, self.introduced.cancelled()).await;
        loop {
            match self.options.transport.seen_spawners().await {
                Ok(seen) => {
                    let others = capacity::others(&seen, &self.options.name);
                    self.load.may_refuse(others, capacity.grace);
                }
                Err(error) => tracing::warn!(%error, "other spawners are not known"),
            }
            tokio::time::sleep(LOOK_AROUND).await;
        }
    }

    /// Who can carry a job. One that was handed to us although another can is offered again, and they take it.
    async fn fit(&self, request: &SpawnRequest) -> Result<Fit, TransportError> {
        let (needs, here) = (Size::of(&request.limits), self.options.capacity.size);
        if needs.fits(here) {
            return Ok(Fit::Here);
        }
        let seen = self.options.transport.seen_spawners().await?;
        let others = capacity::others(&seen, &self.options.name);
        if others.iter().any(|other| needs.fits(*other)) {
            self.load.may_refuse(others, self.options.capacity.grace);
            return Ok(Fit::Elsewhere);
        }
        Ok(Fit::Nowhere(capacity::too_large(needs, here)))
    }

    /// Brings one job to its end: a result and an acknowledgement, or an offer to the next one.
    async fn handle(&self, delivery: JobDelivery, shutdown: &CancellationToken) {
        let id = delivery.request.request_id.clone();
        let transport = &self.options.transport;
        let stop = Stop::default();
        match lock(&self.running).entry(id.clone()) {
            Entry::Vacant(place) => {
                place.insert(stop.clone());
            }
            // It was not renewed in time, and nobody else was faster: the attempt goes on, under the new receipt.
            Entry::Occupied(_) => {
                tracing::warn!(
                    request = id,
                    "job {id} came back to where it runs; it goes on"
                );
                lock(&self.again).insert(id, delivery.receipt);
                return;
            }
        }
        let settled = tokio::select! {
            () = shutdown.cancelled() => Settled::Later,
            settled = self.settle(&delivery, &stop) => settled,
        };
        match settled {
            // The result is known: nothing of this request is needed any more.
            Settled::Over | Settled::Poison(_) => self.discard(&delivery.request).await,
            Settled::Later | Settled::Lost => {}
        }
        let newer = {
            let mut running = lock(&self.running);
            running.remove(&id);
            lock(&self.again).remove(&id)
        };
        let was_newer = newer.is_some();
        let receipt = newer.unwrap_or(delivery.receipt);
        let told = match settled {
            Settled::Over => transport.ack_job(&receipt).await,
            Settled::Poison(reason) => transport.dead_letter(&receipt, &reason).await,
            Settled::Later => transport.release_job(&receipt).await,
            // It came back to us a moment too late.
            Settled::Lost if was_newer => transport.release_job(&receipt).await,
            Settled::Lost => return,
        };
        if let Err(error) = told {
            // It will be offered again; its result, if it has one, is read first then.
            tracing::warn!(%error, request = id, "job {id} could not be given back");
        }
    }

    /// What cannot be removed now is found again by [`reconcile`].
    async fn discard(&self, request: &SpawnRequest) {
        let who = Identity::of(request);
        let discarded = tokio::time::timeout(DISCARD, self.options.runtime.discard(&who)).await;
        let error = match discarded {
            Ok(Ok(())) => return self.load.gone(&request.request_id),
            Ok(Err(error)) => chain(&error),
            Err(_) => format!("it took longer than {} s", DISCARD.as_secs()),
        };
        let id = &request.request_id;
        tracing::warn!(
            error,
            "what is left of the worker of job {id} was not removed; it will be"
        );
    }

    async fn settle(&self, delivery: &JobDelivery, stop: &Stop) -> Settled {
        let request = &delivery.request;
        let id = request.request_id.as_str();
        let transport = &self.options.transport;
        let state = async {
            let over = transport.result(id).await?.is_some();
            Ok::<_, TransportError>((over, transport.cancelled(id).await?))
        };
        let trouble = match state.await {
            Err(error) => {
                tracing::error!(%error, "the state of job {id} cannot be read; it is offered again");
                tokio::time::sleep(Duration::from_secs(1)).await;
                return Settled::Later;
            }
            Ok((true, _)) => return Settled::Over,
            Ok((false, true)) => Some(Trouble::cancelled()),
            Ok((false, false)) if delivery.deliveries > MAX_DELIVERIES => Some(
                Trouble::failed(
                    kind::LOST,
                    format!("The job was handed out {MAX_DELIVERIES} times, and each time its spawner died or could not begin; it is not tried again. An admin has to look at the spawner's log, and at its disk, before the task is tried once more."),
                )
                .status(ResultStatus::Lost),
            ),
            Ok((false, false)) => match self.fit(request).await {
                Ok(Fit::Here) => None,
                Ok(Fit::Nowhere(trouble)) => Some(trouble),
                other => {
                    tracing::info!(?other, "job {id} does not fit here; it is offered again");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                    return Settled::Later;
                }
            },
        };
        if let Some(trouble) = trouble {
            let poison = (trouble.kind == kind::LOST).then(|| trouble.message.clone());
            let result = failed(request, trouble);
            return match (self.publish(&result).await, poison) {
                (Settled::Over, Some(reason)) => Settled::Poison(reason),
                (settled, _) => settled,
            };
        }
        let attempt = self.attempt(request, stop);
        tokio::pin!(attempt);
        // Beside the attempt: a transport that is away for a while must not keep it from going on.
        let result = tokio::select! {
            result = &mut attempt => result,
            () = self.keep(delivery, stop) => {
                // Before the attempt is dropped, which has the workspace: whoever gets that next may not be robbed of its worker.
                self.discard(request).await;
                return Settled::Lost;
            }
        };
        match result {
            Some(result) => self.publish(&result).await,
            None => Settled::Later,
        }
    }

    /// Holds the job, and obeys an order to cancel it; returns when it is somebody else's.
    async fn keep(&self, delivery: &JobDelivery, stop: &Stop) {
        let id = delivery.request.request_id.as_str();
        let transport = &self.options.transport;
        let mut missed = 0;
        let mut renew = tokio::time::interval(RENEW);
        renew.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            renew.tick().await;
            let receipt = lock(&self.again).get(id).cloned();
            let receipt = receipt.as_ref().unwrap_or(&delivery.receipt);
            match transport.renew_job(receipt).await {
                Err(error @ TransportError::NotHeld { .. }) => {
                    missed += 1;
                    // Once is not enough: it may just be on its way back to us.
                    if missed > 1 {
                        tracing::warn!(%error, "job {id} is somebody else's now; the worker is ended");
                        return;
                    }
                }
                Err(error) => tracing::warn!(%error, "job {id} cannot be renewed; trying again"),
                Ok(()) => missed = 0,
            }
            // The order may have been given while nobody listened.
            if matches!(transport.cancelled(id).await, Ok(true)) {
                stop.stop(Why::Cancelled);
            }
        }
    }

    /// Makes the result durable; the first one of a request stands.
    async fn publish(&self, result: &WorkerResult) -> Settled {
        let id = result.request_id.as_str();
        for n in 1..=PUBLISH_TRIES {
            match self.options.transport.publish_result(result).await {
                Ok(_) => {
                    let status = result.status.as_str();
                    let kind = result.failure.as_ref().map(|failure| failure.kind.as_str());
                    tracing::info!(status, kind, "worker of job {id} ended: {status}");
                    return Settled::Over;
                }
                Err(error) => {
                    tracing::error!(%error, try_number = n, "the result of job {id} cannot be published");
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        }
        Settled::Later
    }

    /// Runs the attempt when the workspace is free. None: it could not be had; later.
    async fn attempt(&self, request: &SpawnRequest, stop: &Stop) -> Option<WorkerResult> {
        let (events, publisher) = Events::start(
            Arc::clone(&self.options.transport),
            Arc::new(request.clone()),
        );
        events.phase("queued");
        let places = Places::of(&self.options.home, request);
        let full = || events.phase("waiting: the disk of the spawner is full");
        let result = match self.desks.sit_down(&places, request, stop, full).await {
            Seat::Free(seat) => {
                let places = Places {
                    seat: Some(Arc::new(seat)),
                    ..places.settled(self.disks.get() == Some(&true))
                };
                let attempt = Attempt {
                    options: &self.options,
                    request: Arc::new(request.clone()),
                    places: &places,
                    events: &events,
                    stop,
                    reading: self.reading().await,
                };
                let result = attempt.run().await;
                self.unmount(&places).await;
                Some(result)
            }
            Seat::Stale => Some(failed(request, stop::superseded())),
            Seat::Stopped => Some(failed(request, stop.trouble())),
            Seat::Unusable(error) => {
                let message = "No worker can begin on the spawner's host; an admin has to look at its disk, whether it is full and may be written.";
                let trouble = Trouble::failed(kind::CLONE_FAILED, message);
                Some(failed(request, trouble.evidence(error.to_string())))
            }
            Seat::Taken => None,
        };
        drop(events);
        // What was said last should be heard before the result; but not at any price.
        let _ = tokio::time::timeout(Duration::from_secs(1), publisher).await;
        result
    }

    async fn reading(&self) -> &Reading {
        let runtime = self.options.runtime.as_ref();
        self.reading.get_or_init(|| Reading::find(runtime)).await
    }

    /// What cannot be unmounted now is found again by [`disk::forever`].
    async fn unmount(&self, places: &Places) {
        if let Some(image) = places.disk.clone()
            && let Err(error) = disk::blocking(move || image.unmount()).await
        {
            tracing::warn!(%error, "the disk of a workspace stays mounted; trying again later");
        }
    }
}

/// What becomes of a job.
enum Settled {
    /// It has its result.
    Over,
    /// It has its result, and is kept as poison.
    Poison(String),
    /// It is offered again.
    Later,
    /// It is somebody else's.
    Lost,
}

fn failed(request: &SpawnRequest, trouble: Trouble) -> WorkerResult {
    let mut result = WorkerResult::of(request, trouble.status, Timestamp::now());
    result.failure = Some(trouble.into_failure());
    result
}
