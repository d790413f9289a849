//! What all tasks of a run share: the lease, the mailbox, the clock, and the way to the database.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::{BuildHasher, RandomState},
    pin::pin,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::Poll,
    time::{Duration, Instant},
};

use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde_json::Value;
use tokio::sync::{Notify, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    checkpoint::{
        Commit, Lease, Loaded, Parent, Priority, Receipt, SignalRecord, StorageError, Then,
        WaitRecord, Write,
    },
    error::NodeError,
    host::Shared,
    ids::ThreadId,
    nest::Pasts,
    observer::Point,
    private::meanwhile,
    room::Seat,
    waits::{is_input, is_reply, readable},
};

/// The unconsumed signals that the run knows of.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    signals: Vec<SignalRecord>,
    /// The number of the newest signal known.
    pub seen: u64,
}

impl Mailbox {
    /// Takes the oldest signal for which `arrival` has a value.
    pub fn take(
        &mut self,
        arrival: impl Fn(&SignalRecord) -> Option<Value>,
    ) -> Option<(Value, u64)> {
        let (index, value) = self
            .signals
            .iter()
            .enumerate()
            .find_map(|(index, signal)| Some((index, arrival(signal)?)))?;
        let signal = self.signals.remove(index);
        Some((value, signal.number))
    }

    /// Takes all signals that are meant, and returns their numbers.
    pub fn discard_if(&mut self, is_meant: impl Fn(&SignalRecord) -> bool) -> Vec<u64> {
        let mut numbers = Vec::new();
        self.signals.retain(|signal| {
            let discard = is_meant(signal);
            if discard {
                numbers.push(signal.number);
            }
            !discard
        });
        numbers
    }

    pub fn any(&self, is_meant: impl Fn(&SignalRecord) -> bool) -> bool {
        self.signals.iter().any(is_meant)
    }

    pub fn filtered(&self, is_meant: impl Fn(&SignalRecord) -> bool) -> Vec<SignalRecord> {
        let meant = self.signals.iter().filter(|signal| is_meant(signal));
        meant.cloned().collect()
    }

    fn add(&mut self, signals: Vec<SignalRecord>, seen: u64) {
        let known = self.seen;
        self.signals
            .extend(signals.into_iter().filter(|signal| signal.number > known));
        self.seen = self.seen.max(seen);
    }
}

/// How the process that runs threads talks to one of its runs.
#[derive(Clone, Debug, Default)]
pub(crate) struct Controls {
    /// How long the lease holds without renewal.
    pub lease: Duration,
    /// The thread is to be cancelled.
    pub cancel: CancellationToken,
    pub reason: Arc<Mutex<Option<String>>>,
    /// The tasks are to stop, for whatever reason.
    pub tasks: CancellationToken,
    /// The round under way makes way for an input: stop, and give the lease back.
    pub preempted: CancellationToken,
    /// An input may have arrived.
    pub news: Arc<Notify>,
    /// Stop after this step and give the lease back.
    pub drain: CancellationToken,
    /// The lease is lost: stop at once.
    pub lost: CancellationToken,
    /// A commit is giving the lease back, or has done so. Whoever finds the lease gone then need not say so: the answer of the
    /// commit tells, and what follows from it is still to be done.
    pub leaving: Arc<AtomicBool>,
    /// The lease, or what the thread is asked to do, may have changed: find out.
    pub look: Arc<Notify>,
    /// The place that the run takes.
    pub seat: Seat,
}

impl Controls {
    pub fn request_cancel(&self, reason: String) {
        self.reason.lock().get_or_insert(reason);
        self.cancel.cancel();
        self.tasks.cancel();
    }

    pub fn make_way(&self) {
        self.preempted.cancel();
        self.tasks.cancel();
    }
}

/// Shared by the run and its tasks.
pub(crate) struct RunShared {
    pub engine: Arc<Shared>,
    pub thread: ThreadId,
    pub graph: Arc<str>,
    pub parent: Option<Parent>,
    pub priority: Priority,
    pub created_at: Timestamp,
    pub branch: u32,
    pub lease: Lease,
    pub controls: Controls,
    pub mailbox: Mutex<Mailbox>,
    base: AtomicU64,
    clock: Mutex<(Timestamp, Instant)>,
    broken: AtomicBool,
    trouble: Mutex<Option<StorageError>>,
    /// Whether the current checkpoint has pending writes in the database.
    dirty: AtomicBool,
    /// What the thread's row says it waits for, by the path of the graph whose tasks wait: empty for the thread's own.
    waits: Mutex<BTreeMap<String, Vec<WaitRecord>>>,
    /// Whether it may name some.
    listed: AtomicBool,
    /// What accumulating subgraphs have kept, as of the current checkpoint.
    pub pasts: Mutex<Pasts>,
    /// The accumulating subgraphs that this superstep has reached: namespace to the paths by which.
    pub claims: Mutex<BTreeMap<String, Vec<String>>>,
    /// Names of children that rounds which were stopped have taken; see [`Plan`](crate::plan::Plan).
    pub renamed: Mutex<BTreeMap<String, u32>>,
    /// The questions that this run has found to be over.
    pub expired: Mutex<HashSet<String>>,
    queue: Mutex<Queue>,
    idle: Notify,
    /// The newest commit, which is not needed any more: it is dropped while the next one is written, when that delays nobody.
    spent: Mutex<Option<Arc<Commit>>>,
}

/// Commits of parallel subgraphs that wait for each other's.
#[derive(Default)]
struct Queue {
    waiting: Vec<(Commit, oneshot::Sender<Result<(), Broken>>)>,
    busy: bool,
}

impl RunShared {
    pub fn new(engine: Arc<Shared>, lease: Lease, controls: Controls, loaded: &mut Loaded) -> Self {
        let mut mailbox = Mailbox::default();
        mailbox.add(std::mem::take(&mut loaded.mailbox), loaded.mail);
        Self {
            engine,
            thread: loaded.thread.id.clone(),
            graph: loaded.thread.graph.as_str().into(),
            parent: loaded.thread.parent.clone(),
            priority: loaded.thread.priority,
            created_at: loaded.thread.created_at,
            branch: loaded.state.branch,
            lease,
            controls,
            mailbox: Mutex::new(mailbox),
            base: AtomicU64::new(loaded.state.checkpoint),
            clock: Mutex::new((loaded.now, Instant::now())),
            broken: AtomicBool::new(false),
            trouble: Mutex::new(None),
            dirty: AtomicBool::new(!loaded.writes.is_empty()),
            waits: Mutex::new(if loaded.thread.waits.is_empty() {
                BTreeMap::new()
            } else {
                BTreeMap::from([(String::new(), loaded.thread.waits.clone())])
            }),
            listed: AtomicBool::new(!loaded.thread.waits.is_empty()),
            pasts: Mutex::new(Pasts::of(&loaded.state)),
            claims: Mutex::default(),
            renamed: Mutex::default(),
            expired: Mutex::default(),
            queue: Mutex::default(),
            idle: Notify::new(),
            spent: Mutex::default(),
        }
    }

    /// Notes what the tasks of one graph wait for, and returns what the thread's row is to name.
    pub fn list_waits(&self, path: &str, waits: Vec<WaitRecord>) -> Vec<WaitRecord> {
        let mut all = self.waits.lock();
        if waits.is_empty() {
            all.remove(path);
        } else {
            all.insert(path.to_owned(), waits);
        }
        let all: Vec<WaitRecord> = all.values().flatten().cloned().collect();
        if !all.is_empty() {
            self.listed.store(true, Ordering::Release);
        }
        all
    }

    /// Strikes off some waits. Returns what the thread's row is to name, if that is something else now.
    pub fn strike_waits(&self, is_meant: impl Fn(&WaitRecord) -> bool) -> Option<Vec<WaitRecord>> {
        let mut all = self.waits.lock();
        if all.is_empty() {
            return None;
        }
        let count =
            |all: &BTreeMap<String, Vec<WaitRecord>>| all.values().map(Vec::len).sum::<usize>();
        let before = count(&all);
        all.retain(|_, waits| {
            waits.retain(|wait| !is_meant(wait));
            !waits.is_empty()
        });
        (count(&all) != before).then(|| all.values().flatten().cloned().collect())
    }

    /// The superstep is over: nothing in it waits any more. Returns whether the thread's row may say something else.
    pub fn forget_waits(&self) -> bool {
        self.waits.lock().clear();
        self.listed.swap(false, Ordering::AcqRel)
    }

    /// Commits together with whatever else waits at the moment. It lands (or the run breaks) even when nobody waits for the
    /// answer any more.
    pub async fn share(self: &Arc<Self>, commit: Commit) -> Result<(), Broken> {
        if self.engine.store.keeps_values() {
            // Nothing is saved by waiting for others where no message goes anywhere.
            let run = self.clone();
            let mut landing = Box::pin(async move { land(&run, commit).await });
            if let Poll::Ready(landed) = futures::poll!(&mut landing) {
                return landed;
            }
            let landing = tokio::spawn(landing.in_current_span());
            return landing.await.unwrap_or(Err(Broken));
        }
        let (tell, told) = oneshot::channel();
        let first = {
            let mut queue = self.queue.lock();
            queue.waiting.push((commit, tell));
            !std::mem::replace(&mut queue.busy, true)
        };
        if first {
            tokio::spawn(collect(self.clone()).in_current_span());
        }
        told.await.unwrap_or(Err(Broken))
    }

    /// Comes back when no shared commit is under way: there may be one whose task has been given up.
    pub async fn shared_all(&self) {
        loop {
            let idle = self.idle.notified();
            tokio::pin!(idle);
            idle.as_mut().enable();
            if !self.queue.lock().busy {
                return;
            }
            idle.await;
        }
    }

    /// Takes what has ended questions that nobody asks any more out of the mailbox, and returns the numbers.
    pub fn discard_replies(&self) -> Vec<u64> {
        let mut mailbox = self.mailbox.lock();
        mailbox.discard_if(|signal| is_reply(&signal.kind))
    }

    /// The checkpoint that the run stands on.
    pub fn base(&self) -> u64 {
        self.base.load(Ordering::Acquire)
    }

    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Acquire)
    }

    /// The database's clock, as far as it is known here.
    pub fn now(&self) -> Timestamp {
        let (then, since) = *self.clock.lock();
        let passed = SignedDuration::try_from(since.elapsed()).unwrap_or_default();
        then.checked_add(passed).unwrap_or(then)
    }

    /// Whether the run must stop without a trace.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire) || self.controls.lost.is_cancelled()
    }

    /// Why, once. After that the lease can be tried again.
    pub fn take_trouble(&self) -> Option<StorageError> {
        let trouble = self.trouble.lock().take();
        self.broken.store(false, Ordering::Release);
        trouble
    }

    /// Writes pending writes at once.
    pub async fn write(&self, writes: Vec<Write>) -> Result<(), NodeError> {
        let mut commit = Commit::on(self.base());
        commit.writes = writes;
        self.commit(commit)
            .await
            .map(|_| ())
            .map_err(|Broken| NodeError::lost())
    }

    /// Commits. When the database fails, it is asked again. When that fails too, the run is broken: what the database knows now
    /// is found out by the next one.
    pub async fn commit(&self, commit: Commit) -> Result<Receipt, Broken> {
        if self.is_broken() {
            return Err(Broken);
        }
        let mut due: BTreeSet<Option<String>> = commit
            .children
            .iter()
            .map(|child| Some(child.graph.clone()))
            .collect();
        if !commit.signals.is_empty() || !commit.cancels.is_empty() {
            due.insert(None);
        }
        let ends = matches!(commit.then, Then::End { .. });
        let sets_timer = matches!(
            commit.then,
            Then::Wait {
                wake_at: Some(_),
                ..
            }
        );
        if commit.then == Then::Yield {
            due.insert(Some(self.graph.to_string()));
        }
        let speaks = !commit.events.is_empty();
        let cancels: Vec<_> = commit.cancels.clone();
        let advances = commit.checkpoint.is_some();
        let writes = !commit.writes.is_empty();
        let base = commit.base;
        let leaves = commit.then != Then::Keep;
        self.controls.leaving.store(leaves, Ordering::Release);
        let store = &self.engine.store;
        let result = if store.keeps_values() {
            // Whoever keeps values keeps them here, where no connection breaks.
            match store.commit(&self.lease, commit).await {
                Err(error @ StorageError::Backend { .. }) => self.find_out(base, None, error).await,
                result => result,
            }
        } else {
            let (commit, spent) = (Arc::new(commit), self.spent.lock().take());
            let written = store.commit_kept(&self.lease, &commit);
            let result = match meanwhile(pin!(written), || drop(spent)).await {
                Err(error @ StorageError::Backend { .. }) => {
                    self.find_out(base, Some(&commit), error).await
                }
                result => result,
            };
            *self.spent.lock() = Some(commit);
            result
        };
        match result {
            Ok(receipt) => {
                if let Some(checkpoint) = receipt.checkpoint {
                    self.base.store(checkpoint, Ordering::Release);
                }
                if advances {
                    self.dirty.store(writes, Ordering::Release);
                } else if writes {
                    self.dirty.store(true, Ordering::Release);
                }
                *self.clock.lock() = (receipt.now, Instant::now());
                self.controls
                    .leaving
                    .store(receipt.released, Ordering::Release);
                if let Some(reason) = &receipt.cancel
                    && !receipt.released
                {
                    self.controls.request_cancel(reason.clone());
                }
                for thread in &receipt.undelivered {
                    tracing::warn!(from = %self.thread, to = %thread, "a signal went to a thread that does not exist");
                }
                let wakes = &self.engine.wakes;
                for request in cancels {
                    wakes.cancel(&request.thread, &request.reason);
                }
                if ends && self.may_begin_again(receipt.mail) {
                    due.insert(Some(self.graph.to_string()));
                }
                for graph in due {
                    wakes.due(graph.as_deref());
                }
                if sets_timer {
                    // Whoever runs threads here knew of earlier ones only.
                    wakes.look_for_due();
                }
                if receipt.released {
                    self.controls.seat.leave();
                }
                if receipt.released || receipt.checkpoint.is_some() {
                    wakes.moved(&self.thread);
                }
                if speaks {
                    self.engine.journal_grew();
                }
                Ok(receipt)
            }
            Err(error) => {
                self.fail(error);
                Err(Broken)
            }
        }
    }

    /// Whether the thread, which has ended, may have a further input: a signal that has not been read may be one.
    fn may_begin_again(&self, mail: u64) -> bool {
        let mailbox = self.mailbox.lock();
        mail > mailbox.seen || mailbox.any(|signal| is_input(&signal.kind))
    }

    /// Reads signals that arrived since the mailbox was read.
    pub async fn fetch_mail(&self) -> Result<(), Broken> {
        let seen = self.mailbox.lock().seen;
        let mail = self.engine.store.mailbox(&self.thread, seen).await;
        match mail.and_then(|mail| readable(&self.thread, &mail.0).map(|()| mail)) {
            Ok((signals, mail)) => {
                self.mailbox.lock().add(signals, mail);
                Ok(())
            }
            Err(error) => {
                self.fail(error);
                Err(Broken)
            }
        }
    }

    pub fn fail(&self, error: StorageError) {
        self.trouble.lock().get_or_insert(error);
        self.broken.store(true, Ordering::Release);
    }
}

async fn land(run: &RunShared, commit: Commit) -> Result<(), Broken> {
    let thread = &run.thread;
    let nodes = &[];
    run.engine.observe(&Point::BeforeCommit { thread, nodes });
    let landed = run.commit(commit).await.map(|_| ());
    run.engine.observe(&Point::AfterCommit { thread, nodes });
    landed
}

/// Commits what waits, all at once, until nothing does.
async fn collect(run: Arc<RunShared>) {
    let hashes = RandomState::new();
    let mut keys = HashSet::new();
    loop {
        keys.clear();
        // Whoever is ready to commit now, comes along.
        tokio::task::yield_now().await;
        let waiting = {
            let mut queue = run.queue.lock();
            if queue.waiting.is_empty() {
                queue.busy = false;
                break;
            }
            std::mem::take(&mut queue.waiting)
        };
        let mut all = Commit::on(run.base());
        let mut tell = Vec::with_capacity(waiting.len());
        for (mut commit, told) in waiting {
            // Of one key, the last write counts; only a task that was given up and began again can have written one twice.
            for write in commit.writes.drain(..) {
                let key = (&write.task, write.kind, &write.name, write.round);
                let is_new = keys.insert(hashes.hash_one(key));
                match all.writes.iter_mut().find(|w| !is_new && w.has_key(&write)) {
                    Some(present) => *present = write,
                    None => all.writes.push(write),
                }
            }
            all.forget.append(&mut commit.forget);
            all.consumed.append(&mut commit.consumed);
            all.events.append(&mut commit.events);
            all.children.append(&mut commit.children);
            all.signals.append(&mut commit.signals);
            all.cancels.append(&mut commit.cancels);
            if commit.waits.is_some() {
                all.waits = commit.waits;
            }
            tell.push(told);
        }
        if !all.forget.is_empty() {
            let Commit { forget, writes, .. } = &mut all;
            forget.retain(|key| !writes.iter().any(|write| write.is(key)));
        }
        let landed = land(&run, all).await;
        for told in tell {
            // It may have been given up.
            let _ = told.send(landed);
        }
    }
    run.idle.notify_waiters();
}

/// The run has lost its lease or its database; the reason is kept in [`RunShared::take_trouble`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Broken;
