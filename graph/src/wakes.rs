//! Who is woken by what: in this process at once, in others by messages.
//!
//! A message only ever says where to look. It is sent after the commit, by a task in the background that puts together what
//! there is to tell while one message is under way. Processes that listen say what they care for, so that nobody is told
//! what nobody wants to know: a process that is alone sends next to nothing, and a commit that wakes nobody sends nothing.
//! What is lost is found with the next poll.

mod listening;
mod message;

use std::{
    collections::{BTreeSet, HashMap},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::{checkpoint::Bell, ids::ThreadId, run::Controls};
use message::{Interests, Message};

/// The time between two messages: what there is to tell in the meantime goes with the second.
const SPACING: Duration = Duration::from_millis(3);

/// How long sending may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long nothing is sent after a failure, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);

/// After so long without a sign of life, another process is no longer counted with.
const FORGOTTEN: Duration = Duration::from_mins(1);

/// So long after it began to listen, a process may not know yet who else does.
const SETTLING: Duration = Duration::from_secs(2);

/// A journal that nobody has waited for in such a time has no reader.
const READING: Duration = Duration::from_mins(1);

/// How many other processes are remembered; of more, everything is assumed.
const MOST_OTHERS: usize = 1000;

/// How long [`Wakes::flush`] waits.
const FLUSH: Duration = Duration::from_secs(1);

pub(crate) struct Wakes {
    /// Tells messages of this engine from others.
    me: String,
    bell: Option<Arc<dyn Bell>>,
    /// How often readers of the journal and followers look when nothing was heard.
    pub poll: Duration,
    graphs: BTreeSet<String>,
    due: watch::Sender<u64>,
    journal: watch::Sender<u64>,
    live: Mutex<HashMap<ThreadId, (u64, Controls)>>,
    followed: Mutex<HashMap<ThreadId, Followed>>,
    /// How many loops run threads here.
    servers: AtomicUsize,
    /// What may have become due, and whoever runs threads here is about to find out whether there is room for it.
    fresh: Mutex<Fresh>,
    last_read: Mutex<Option<Instant>>,
    /// What this process cares for has changed.
    interests_changed: Arc<Notify>,
    pending: Mutex<Pending>,
    sent: Notify,
    /// Somebody waits for what is to be sent.
    hurry: Notify,
    others: Mutex<Others>,
    /// Whether others read the journal, or follow threads; so that commits need not look it up.
    others_read: AtomicBool,
    others_follow: AtomicBool,
    listening: AtomicBool,
    /// The engine is gone.
    pub gone: CancellationToken,
}

/// Threads that may be due.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fresh {
    graphs: BTreeSet<String>,
    /// Also of graphs that are not known.
    any: bool,
}

#[derive(Default)]
struct Pending {
    message: Message,
    /// Whether a task is sending.
    sending: bool,
    /// Whether that task has sent everything and only keeps its distance to the next message.
    resting: bool,
}

impl Pending {
    fn is_sent(&self) -> bool {
        !self.sending || (self.resting && self.message.is_empty())
    }
}

#[derive(Default)]
struct Others {
    /// Since when this process hears; absent: it does not.
    since: Option<Instant>,
    heard: HashMap<String, (Instant, Interests)>,
}

struct Followed {
    readers: usize,
    moved: Arc<Notify>,
}

impl Wakes {
    pub fn new(
        bell: Option<Arc<dyn Bell>>,
        poll: Duration,
        graphs: impl Iterator<Item = String>,
    ) -> Self {
        Self {
            me: uuid::Uuid::new_v4().simple().to_string(),
            bell,
            poll,
            graphs: graphs.collect(),
            due: watch::Sender::new(0),
            journal: watch::Sender::new(0),
            live: Mutex::default(),
            followed: Mutex::default(),
            servers: AtomicUsize::new(0),
            fresh: Mutex::default(),
            last_read: Mutex::default(),
            interests_changed: Arc::default(),
            pending: Mutex::default(),
            sent: Notify::new(),
            hurry: Notify::new(),
            others: Mutex::default(),
            others_read: AtomicBool::new(false),
            others_follow: AtomicBool::new(false),
            listening: AtomicBool::new(false),
            gone: CancellationToken::new(),
        }
    }

    // ---- threads that are due ----

    /// A thread may be due, of this graph if it is known. Whoever runs threads here looks first; others are told when there is
    /// nobody here, or no room.
    pub fn due(self: &Arc<Self>, graph: Option<&str>) {
        if self.bell.is_some() {
            let ours = match graph {
                Some(graph) => self.graphs.contains(graph),
                None => !self.others_want(|other| {
                    other
                        .serves
                        .iter()
                        .any(|graph| !self.graphs.contains(graph))
                }),
            };
            let mut fresh = Fresh::default();
            match graph {
                Some(graph) => _ = fresh.graphs.insert(graph.to_owned()),
                None => fresh.any = true,
            }
            if ours && self.servers.load(Ordering::Acquire) > 0 {
                self.fresh.lock().add(fresh);
            } else {
                self.pass_on(fresh);
            }
        }
        self.look_for_due();
    }

    /// Whoever runs threads here looks what is due.
    pub fn look_for_due(&self) {
        self.due.send_modify(|count| *count += 1);
    }

    pub fn due_here(&self) -> watch::Receiver<u64> {
        self.due.subscribe()
    }

    /// How often something may have become due.
    pub fn news(&self) -> u64 {
        *self.due.borrow()
    }

    /// What whoever runs threads here is about to look for.
    pub fn take_fresh(&self) -> Fresh {
        std::mem::take(&mut *self.fresh.lock())
    }

    /// There was no room here for all that may be due.
    pub fn pass_on(self: &Arc<Self>, fresh: Fresh) {
        if fresh == Fresh::default() {
            return;
        }
        let wanted = self.others_want(|other| {
            if fresh.any {
                !other.serves.is_empty()
            } else {
                other
                    .serves
                    .iter()
                    .any(|graph| fresh.graphs.contains(graph))
            }
        });
        if wanted {
            self.tell(|message| {
                message.any |= fresh.any;
                message.due.extend(fresh.graphs);
            });
        }
    }

    /// This process runs threads, as long as the guard lives. Whether it also listens is another matter.
    pub fn serving(self: &Arc<Self>) -> Serving {
        self.servers.fetch_add(1, Ordering::AcqRel);
        self.interests_changed.notify_one();
        Serving(self.clone())
    }

    // ---- the journal ----

    /// The journal has new entries.
    pub fn journal_grew(self: &Arc<Self>) {
        self.journal.send_modify(|count| *count += 1);
        if self.bell.is_some()
            && (self.others_read.load(Ordering::Acquire) || self.others_want(|_| false))
        {
            self.tell(|message| message.said = true);
        }
    }

    pub fn journal_growth(&self) -> watch::Receiver<u64> {
        self.journal.subscribe()
    }

    /// Somebody here waits for the journal to grow.
    pub fn reads_journal(self: &Arc<Self>) {
        let before = self.last_read.lock().replace(Instant::now());
        if before.is_none_or(|before| before.elapsed() >= READING) {
            self.interests_changed.notify_one();
        }
        self.listen();
    }

    // ---- runs, wherever they are ----

    pub fn enter(&self, thread: ThreadId, token: u64, controls: Controls) {
        self.live.lock().insert(thread, (token, controls));
    }

    pub fn leave(&self, thread: &ThreadId, token: u64) {
        let mut live = self.live.lock();
        // A newer run of the thread may have taken the place.
        if live
            .get(thread)
            .is_some_and(|(present, _)| *present == token)
        {
            live.remove(thread);
        }
        drop(live);
        self.moved_here(thread);
    }

    /// Whether a run of the thread is under way here.
    pub fn is_live(&self, thread: &ThreadId) -> bool {
        self.live.lock().contains_key(thread)
    }

    /// A thread is to be cancelled: reaches its run at once, here or in another process, if one is under way.
    pub fn cancel(self: &Arc<Self>, thread: &ThreadId, reason: &str) {
        let live = self.live.lock().get(thread).cloned();
        match live {
            Some((_, controls)) => controls.request_cancel(reason.to_owned()),
            None => self.look_elsewhere(thread),
        }
    }

    /// The lease of a thread, or what it is asked to do, has changed: its run finds out at once.
    pub fn look_at(self: &Arc<Self>, thread: &ThreadId) {
        if !self.look_here(thread) {
            self.look_elsewhere(thread);
        }
    }

    fn look_here(&self, thread: &ThreadId) -> bool {
        let live = self.live.lock();
        let controls = live.get(thread);
        if let Some((_, controls)) = controls {
            controls.look.notify_one();
        }
        controls.is_some()
    }

    fn look_elsewhere(self: &Arc<Self>, thread: &ThreadId) {
        if self.others_want(|other| !other.serves.is_empty()) {
            self.tell(|message| message.look_at(thread));
        }
    }

    // ---- followers of runs ----

    /// A thread has a new checkpoint, or its run is over.
    pub fn moved(self: &Arc<Self>, thread: &ThreadId) {
        self.moved_here(thread);
        if self.others_follow.load(Ordering::Acquire)
            && self
                .others
                .lock()
                .any(|other| other.follows_all || other.follows.contains(thread))
        {
            self.tell(|message| message.moved(thread));
        }
    }

    fn moved_here(&self, thread: &ThreadId) {
        if let Some(followed) = self.followed.lock().get(thread) {
            followed.moved.notify_waiters();
        }
    }

    /// Somebody here follows a thread, as long as the guard lives.
    pub fn following(self: &Arc<Self>, thread: &ThreadId) -> Following {
        let mut followed = self.followed.lock();
        let entry = followed.entry(thread.clone()).or_insert_with(|| Followed {
            readers: 0,
            moved: Arc::default(),
        });
        entry.readers += 1;
        let moved = entry.moved.clone();
        drop(followed);
        self.interests_changed.notify_one();
        self.listen();
        Following {
            wakes: self.clone(),
            thread: thread.clone(),
            moved,
        }
    }

    // ---- sending ----

    /// Whether another process wants to know. Where that is not known, one may.
    fn others_want(&self, wants: impl Fn(&Interests) -> bool) -> bool {
        if !self.bell.as_ref().is_some_and(|bell| bell.is_heard()) {
            return false;
        }
        let others = self.others.lock();
        match others.since {
            Some(since) if since.elapsed() >= SETTLING => others.any(wants),
            _ => true,
        }
    }

    fn tell(self: &Arc<Self>, add: impl FnOnce(&mut Message)) {
        let Some(bell) = &self.bell else { return };
        let mut pending = self.pending.lock();
        add(&mut pending.message);
        if pending.sending {
            return;
        }
        // Without a runtime nobody can send; others poll.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else {
            return;
        };
        pending.sending = true;
        // A runtime that is being shut down drops the task at once, which takes the lock.
        drop(pending);
        let sender = Sender {
            wakes: self.clone(),
            done: false,
        };
        runtime.spawn(send(sender, bell.clone()));
    }

    /// Comes back when all there is to tell has been sent, or after a second.
    pub async fn flush(&self) {
        let all_sent = async {
            loop {
                let sent = self.sent.notified();
                if self.pending.lock().is_sent() {
                    return;
                }
                self.hurry.notify_one();
                sent.await;
            }
        };
        let _ = tokio::time::timeout(FLUSH, all_sent).await;
    }
}

impl Fresh {
    fn add(&mut self, more: Self) {
        self.any |= more.any;
        self.graphs.extend(more.graphs);
    }
}

impl Others {
    fn any(&self, wants: impl Fn(&Interests) -> bool) -> bool {
        self.heard.len() >= MOST_OTHERS
            || self
                .heard
                .values()
                .any(|(at, interests)| at.elapsed() < FORGOTTEN && wants(interests))
    }
}

/// Says that nobody sends any more, however the task ends.
struct Sender {
    wakes: Arc<Wakes>,
    /// It has said so already.
    done: bool,
}

impl Drop for Sender {
    fn drop(&mut self) {
        if !self.done {
            self.wakes.pending.lock().sending = false;
        }
        self.wakes.sent.notify_waiters();
    }
}

/// Sends until there is nothing left to tell.
async fn send(mut sender: Sender, bell: Arc<dyn Bell>) {
    let wakes = sender.wakes.clone();
    let mut failures = 0_u32;
    loop {
        let message = {
            let mut pending = wakes.pending.lock();
            if pending.message.is_empty() {
                // Under the lock: who comes now begins anew.
                pending.sending = false;
                sender.done = true;
                break;
            }
            pending.resting = false;
            std::mem::take(&mut pending.message)
        };
        let text = message.encode(&wakes.me);
        let pause = match tokio::time::timeout(PATIENCE, bell.ring(&text)).await {
            Ok(Ok(())) => {
                failures = 0;
                wakes.pending.lock().resting = true;
                wakes.sent.notify_waiters();
                // Whoever wants to leave does not wait for the distance.
                tokio::select! {
                    () = tokio::time::sleep(SPACING) => {}
                    () = wakes.hurry.notified() => {}
                }
                continue;
            }
            Ok(Err(error)) => {
                failures += 1;
                tracing::debug!(error = %crate::private::chain(&error), "other processes could not be told; they poll");
                (SPACING * 2_u32.saturating_pow(failures + 4)).min(LONGEST_PAUSE)
            }
            Err(_) => LONGEST_PAUSE,
        };
        tokio::time::sleep(pause).await;
    }
}

/// While it lives, this process runs threads.
pub(crate) struct Serving(Arc<Wakes>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.servers.fetch_sub(1, Ordering::AcqRel);
        self.0.interests_changed.notify_one();
        // What nobody here will look for any more.
        let fresh = self.0.take_fresh();
        self.0.pass_on(fresh);
    }
}

/// While it lives, others tell this process how far a thread is.
pub(crate) struct Following {
    wakes: Arc<Wakes>,
    thread: ThreadId,
    /// Rings when the thread has moved.
    pub moved: Arc<Notify>,
}

impl Drop for Following {
    fn drop(&mut self) {
        let mut followed = self.wakes.followed.lock();
        if let Some(entry) = followed.get_mut(&self.thread) {
            entry.readers -= 1;
            if entry.readers == 0 {
                followed.remove(&self.thread);
                self.wakes.interests_changed.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{MemoryCheckpointer, checkpoint::Checkpointer};

    /// Tells something when it is dropped, as what a runtime leaves behind may.
    struct Last(Arc<Wakes>);

    impl Drop for Last {
        fn drop(&mut self) {
            self.0.due(None);
        }
    }

    #[test]
    fn what_is_told_while_a_runtime_shuts_down_holds_nothing_up() {
        let bell = MemoryCheckpointer::new().bell();
        let wakes = Arc::new(Wakes::new(bell, Duration::from_secs(1), std::iter::empty()));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let last = Last(wakes.clone());
        runtime.spawn(async move {
            let _last = last;
            std::future::pending::<()>().await;
        });
        drop(runtime);
        assert!(!wakes.pending.lock().sending);
    }
}
