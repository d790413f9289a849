//! The room that a serving loop has for runs.
//!
//! A thread that is started where there is room, while nothing else is known to wait for it, need not go through the queue: it
//! is created with a lease, in one commit, and runs at once. As soon as anything may be due (a signal, a timer, another
//! process's message, or nobody has looked for a while), new threads line up with the rest, so that none is overtaken.

use std::{
    collections::HashMap,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::{runtime::Handle, sync::Notify, task::JoinSet};
use tracing::{Instrument, Span};

use crate::{
    checkpoint::{Claim, Commit, Created, Lease, LeaseTerms, NewThread, StorageError, Then},
    host::Shared,
    ids::ThreadId,
    observer::Point,
    run::{Controls, give_back},
    serve::ServeOptions,
    touch::Touch,
};

/// How often a thread whose creation was not answered is looked for.
const LOOKS: u32 = 5;

/// The pause before the first look; doubled each time.
const FIRST_LOOK: Duration = Duration::from_millis(250);

/// The leases held by a server.
type Held = Arc<Mutex<HashMap<Lease, Controls>>>;

/// Places for runs, and whether anything else is known to want one.
#[derive(Debug)]
struct Seats {
    state: Mutex<State>,
    capacity: usize,
    /// Rings when a place becomes free.
    freed: Notify,
}

#[derive(Debug, Default)]
struct State {
    taken: usize,
    closed: bool,
    clear: Option<Clear>,
}

/// Nothing was due that had not been claimed.
#[derive(Clone, Copy, Debug)]
struct Clear {
    /// Not known for longer: a timer is due, or a message may have got lost.
    until: Instant,
    /// How often something may have become due before.
    news: u64,
}

/// The right to run one thread, until it is dropped or the lease is given back.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seat(Option<Arc<Taken>>);

#[derive(Debug)]
struct Taken {
    seats: Arc<Seats>,
    left: AtomicBool,
}

impl Seat {
    /// The thread's lease has been given back: what is left of the run needs no place.
    pub fn leave(&self) {
        if let Some(taken) = &self.0 {
            taken.leave();
        }
    }
}

impl Taken {
    fn leave(&self) {
        if !self.left.swap(true, Ordering::AcqRel) {
            self.seats.state.lock().taken -= 1;
            self.seats.freed.notify_one();
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Where a serving loop's threads run.
pub(crate) struct Room {
    pub shared: Arc<Shared>,
    pub options: ServeOptions,
    pub held: Held,
    /// Whether the database answers.
    pub touch: Touch,
    /// Rings when a lease should be looked at.
    pub look: Arc<Notify>,
    seats: Arc<Seats>,
    /// Absent: nothing begins to run here any more.
    runs: Mutex<Option<JoinSet<()>>>,
    /// Where runs run, whoever begins them.
    runtime: Handle,
    /// What they are part of.
    span: Span,
}

impl Room {
    /// In the runtime of the caller.
    pub fn new(shared: Arc<Shared>, options: ServeOptions) -> Arc<Self> {
        Arc::new(Self {
            shared,
            held: Held::default(),
            touch: Touch::new(options.lease),
            look: Arc::default(),
            seats: Arc::new(Seats {
                state: Mutex::default(),
                capacity: options.concurrency.max(1),
                freed: Notify::new(),
            }),
            runs: Mutex::new(Some(JoinSet::new())),
            runtime: Handle::current(),
            span: Span::current(),
            options,
        })
    }

    /// Comes back when a place has become free since the last time.
    pub async fn freed(&self) {
        self.seats.freed.notified().await;
    }

    pub fn has_room(&self) -> bool {
        self.seats.state.lock().taken < self.seats.capacity
    }

    /// How many runs there are, those included that have given their lease back and are about to end.
    pub fn running(&self) -> usize {
        self.runs.lock().as_ref().map_or(0, JoinSet::len)
    }

    /// Forgets runs that are over.
    pub fn reap(&self) {
        if let Some(runs) = &mut *self.runs.lock() {
            while runs.try_join_next().is_some() {}
        }
    }

    /// Comes back when a run is over; at once if there is none.
    pub async fn one_over(&self) {
        std::future::poll_fn(|context| match &mut *self.runs.lock() {
            Some(runs) => runs.poll_join_next(context).map(|_| ()),
            None => std::task::Poll::Ready(()),
        })
        .await;
    }

    /// All places that are free.
    pub fn take_all(&self) -> Vec<Seat> {
        let mut state = self.seats.state.lock();
        let free = self.seats.capacity.saturating_sub(state.taken);
        state.taken += free;
        (0..free).map(|_| self.seat()).collect()
    }

    fn seat(&self) -> Seat {
        Seat(Some(Arc::new(Taken {
            seats: self.seats.clone(),
            left: AtomicBool::new(false),
        })))
    }

    /// Nothing was due that has not been claimed, as of a look that began at a time, after so much news.
    pub fn note_clear(&self, since: Instant, news: u64, within: Option<Duration>) {
        let within = within.map_or(self.options.poll, |due| due.min(self.options.poll));
        self.seats.state.lock().clear = Some(Clear {
            until: since + within,
            news,
        });
    }

    /// Something may be due that has not been claimed.
    pub fn note_unclear(&self) {
        self.seats.state.lock().clear = None;
    }

    /// How long nothing is due, as far as is known.
    pub fn clear_for(&self, news: u64) -> Option<Duration> {
        self.seats.state.lock().clear_for(news)
    }

    /// A place for a thread that is about to be created, if there is one and nothing else wants it.
    fn take_clear(&self) -> Option<Seat> {
        let news = self.shared.wakes.news();
        let mut state = self.seats.state.lock();
        if state.closed || state.taken >= self.seats.capacity {
            return None;
        }
        state.clear_for(news)?;
        state.taken += 1;
        drop(state);
        Some(self.seat())
    }

    /// Runs what was claimed, in its place. Without effect when nothing begins to run here any more: then it returns the lease.
    pub fn run(self: &Arc<Self>, claim: Claim, seat: Seat) -> Result<(), Lease> {
        let lease = claim.lease.clone();
        let Ok(graph) = self.shared.graph(&claim.thread.graph).cloned() else {
            tracing::error!(thread = %claim.thread.id, graph = %claim.thread.graph, "claimed a thread of a graph that this engine does not know");
            return Ok(());
        };
        let controls = Controls {
            lease: self.options.lease,
            look: self.look.clone(),
            seat: seat.clone(),
            ..Controls::default()
        };
        let mut runs = self.runs.lock();
        let Some(runs) = &mut *runs else {
            return Err(lease);
        };
        self.held.lock().insert(lease.clone(), controls.clone());
        self.shared
            .wakes
            .enter(lease.thread.clone(), lease.token, controls.clone());
        let guard = Guard {
            shared: self.shared.clone(),
            held: self.held.clone(),
            lease,
            seat,
        };
        let span = tracing::info_span!(
            parent: &self.span,
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
        let run = async move {
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
        };
        runs.spawn_on(run.instrument(span), &self.runtime);
        Ok(())
    }

    /// Lets nothing begin any more, and hands over what runs.
    pub fn close(&self) -> JoinSet<()> {
        self.seats.state.lock().closed = true;
        self.runs.lock().take().unwrap_or_default()
    }
}

impl State {
    fn clear_for(&self, news: u64) -> Option<Duration> {
        let clear = self.clear.filter(|clear| clear.news == news)?;
        let left = clear.until.saturating_duration_since(Instant::now());
        (!left.is_zero()).then_some(left)
    }
}

/// Strikes a run off the lists, however it ends.
struct Guard {
    shared: Arc<Shared>,
    held: Held,
    lease: Lease,
    seat: Seat,
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.held.lock().remove(&self.lease);
        self.shared
            .wakes
            .leave(&self.lease.thread, self.lease.token);
        self.seat.leave();
    }
}

/// The rooms of an engine.
#[derive(Default)]
pub(crate) struct Rooms(Mutex<Vec<Weak<Room>>>);

impl Rooms {
    pub fn add(&self, room: &Arc<Room>) {
        let mut rooms = self.0.lock();
        rooms.retain(|room| room.strong_count() > 0);
        rooms.push(Arc::downgrade(room));
    }

    fn take_clear(&self) -> Option<(Arc<Room>, Seat)> {
        let rooms = self.0.lock();
        rooms.iter().find_map(|room| {
            let room = room.upgrade()?;
            let seat = room.take_clear()?;
            Some((room, seat))
        })
    }
}

/// Creates a thread, and runs it at once where there is room for it. The answer says whether it is on its way: else somebody
/// has to look for it.
pub(crate) async fn create(
    shared: &Shared,
    thread: NewThread,
) -> Result<(Created, bool), StorageError> {
    let Some((room, seat)) = shared.rooms.take_clear() else {
        return Ok((shared.store.create_thread(thread).await?, false));
    };
    let mut birth = Birth {
        thread: thread.id.clone(),
        graph: thread.graph.clone(),
        room,
        is_known: false,
    };
    let options = &birth.room.options;
    let terms = LeaseTerms {
        owner: &options.owner,
        lease: options.lease,
    };
    let result = shared.store.create_leased(thread, terms).await;
    birth.is_known = !matches!(result, Err(StorageError::Backend { .. }));
    let (created, claim) = result?;
    let Some(claim) = claim else {
        return Ok((created, false));
    };
    if let Err(lease) = birth.room.run(claim, seat) {
        birth.is_known = false;
        let mut commit = Commit::on(0);
        commit.then = Then::Yield;
        shared.store.commit(&lease, commit).await?;
        birth.is_known = true;
        return Ok((created, false));
    }
    Ok((created, true))
}

/// A thread that is being created with a lease. When its creator goes away or hears nothing, nobody may know that it is there:
/// then it is looked for, and its lease is given back, so that it need not expire.
struct Birth {
    thread: ThreadId,
    graph: String,
    room: Arc<Room>,
    is_known: bool,
}

impl Drop for Birth {
    fn drop(&mut self) {
        if !self.is_known {
            let look = look_for(self.room.clone(), self.thread.clone(), self.graph.clone());
            self.room.runtime.spawn(look.in_current_span());
        }
    }
}

async fn look_for(room: Arc<Room>, thread: ThreadId, graph: String) {
    let store = &room.shared.store;
    let mut pause = FIRST_LOOK.min(room.options.lease / 4);
    for _ in 0..LOOKS {
        tokio::time::sleep(pause).await;
        pause *= 2;
        // Not there: perhaps not yet.
        let Ok(Some(record)) = store.thread(&thread).await else {
            continue;
        };
        let is_ours = |owner: &str| owner == room.options.owner && record.checkpoint == 0;
        let Some(lease) = record.lease.as_ref().filter(|it| is_ours(&it.owner)) else {
            return;
        };
        let lease = Lease {
            thread: thread.clone(),
            token: lease.token,
        };
        if room.held.lock().contains_key(&lease) {
            return;
        }
        tracing::warn!(%thread, "a thread was created whose creator did not hear of it; it goes on");
        let mut commit = Commit::on(0);
        commit.then = Then::Yield;
        let given_back = store.commit(&lease, commit).await;
        if !matches!(given_back, Err(StorageError::Backend { .. })) {
            room.shared.wakes.due(Some(&graph));
            return;
        }
    }
}
