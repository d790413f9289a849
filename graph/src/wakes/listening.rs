//! Hearing what other processes tell.

use std::{
    collections::BTreeSet,
    sync::{Arc, Weak, atomic::Ordering},
    time::{Duration, Instant},
};

use futures::{StreamExt, stream::BoxStream};
use tokio_util::sync::CancellationToken;

use super::{
    FORGOTTEN, MOST_OTHERS, Others, READING, Wakes,
    message::{Interests, Message},
};
use crate::checkpoint::Bell;

/// How often a process says what it cares for.
const REPEATED: Duration = Duration::from_secs(20);

/// Who does not hear itself in such a time hears nobody.
const DEAF: Duration = Duration::from_secs(10);

/// How long beginning to listen may take.
const PATIENCE: Duration = Duration::from_secs(15);

/// How long it takes to try again, at first and at most.
const AGAIN: Duration = Duration::from_millis(250);
const AGAIN_AT_MOST: Duration = Duration::from_secs(15);

/// How many threads one process names that it follows.
const MOST_FOLLOWED: usize = 100;

impl Wakes {
    /// Begins to listen, if that has not been begun yet. Ends when the engine is gone.
    pub fn listen(self: &Arc<Self>) {
        let Some(bell) = &self.bell else { return };
        if self.listening.swap(true, Ordering::AcqRel) {
            return;
        }
        let listener = Listener(Arc::downgrade(self));
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(hear(listener, bell.clone(), self.gone.clone()));
            }
            // Somebody else begins, in a runtime.
            Err(_) => drop(listener),
        }
    }

    fn interests(&self) -> Interests {
        let followed = self.followed.lock();
        let follows_all = followed.len() > MOST_FOLLOWED;
        Interests {
            serves: if self.servers.load(Ordering::Acquire) > 0 {
                self.graphs.clone()
            } else {
                BTreeSet::new()
            },
            reads: self
                .last_read
                .lock()
                .is_some_and(|at| at.elapsed() < READING),
            follows: if follows_all {
                BTreeSet::new()
            } else {
                followed.keys().cloned().collect()
            },
            follows_all,
        }
    }

    fn announce(self: &Arc<Self>, hello: bool) {
        let interests = self.interests();
        self.tell(|message| {
            message.interests = Some(interests);
            message.hello |= hello;
        });
    }

    /// Whatever has happened while nobody listened.
    fn look_at_everything(&self) {
        self.look_for_due();
        self.journal.send_modify(|count| *count += 1);
        self.all_may_have_moved();
    }

    fn all_may_have_moved(&self) {
        for (_, controls) in self.live.lock().values() {
            controls.look.notify_one();
        }
        for followed in self.followed.lock().values() {
            followed.moved.notify_waiters();
        }
    }

    /// Takes a message in. Returns whether it was this engine's own.
    fn heard(self: &Arc<Self>, text: &str) -> bool {
        let message = Message::decode(text);
        if message.from == self.me {
            return true;
        }
        if message.any || message.due.iter().any(|graph| self.graphs.contains(graph)) {
            self.look_for_due();
        }
        if message.said {
            self.journal.send_modify(|count| *count += 1);
        }
        if message.all {
            self.all_may_have_moved();
        }
        for thread in &message.look {
            self.look_here(thread);
        }
        for thread in &message.moved {
            self.moved_here(thread);
        }
        if let Some(interests) = message.interests {
            let mut others = self.others.lock();
            if others.heard.len() < MOST_OTHERS || others.heard.contains_key(&message.from) {
                others
                    .heard
                    .insert(message.from, (Instant::now(), interests));
            }
            self.note(&others);
        }
        if message.hello {
            self.announce(false);
        }
        false
    }

    fn forget(&self) {
        let mut others = self.others.lock();
        others.heard.retain(|_, (at, _)| at.elapsed() < FORGOTTEN);
        self.note(&others);
    }

    fn note(&self, others: &Others) {
        let read = others.any(|other| other.reads);
        let follow = others.any(|other| other.follows_all || !other.follows.is_empty());
        self.others_read.store(read, Ordering::Release);
        self.others_follow.store(follow, Ordering::Release);
    }
}

/// Says that nobody listens any more, however the task ends.
struct Listener(Weak<Wakes>);

impl Drop for Listener {
    fn drop(&mut self) {
        if let Some(wakes) = self.0.upgrade() {
            wakes.others.lock().since = None;
            wakes.listening.store(false, Ordering::Release);
        }
    }
}

async fn hear(listener: Listener, bell: Arc<dyn Bell>, gone: CancellationToken) {
    let mut failures = 0_u32;
    loop {
        let begun = tokio::select! {
            () = gone.cancelled() => return,
            begun = tokio::time::timeout(PATIENCE, bell.listen()) => begun,
        };
        let fault = match begun {
            Ok(Ok(stream)) => {
                if failures > 0 {
                    tracing::info!("other processes are heard again");
                }
                let since = Instant::now();
                let Some(fault) = attend(&listener, stream, &gone).await else {
                    return;
                };
                if since.elapsed() > REPEATED + DEAF {
                    failures = 0;
                }
                fault.to_owned()
            }
            Ok(Err(error)) => crate::private::chain(&error),
            Err(_) => format!("it took longer than {PATIENCE:?}"),
        };
        failures = failures.saturating_add(1);
        let pause = (AGAIN * 2_u32.saturating_pow(failures - 1)).min(AGAIN_AT_MOST);
        if failures == 1 {
            tracing::warn!(error = %fault, "other processes are not heard; until they are, the database is polled");
        } else {
            tracing::debug!(error = %fault, again_in = ?pause, "other processes are not heard");
        }
        tokio::select! {
            () = gone.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Listens until the connection is lost, and says why it is; nothing: the engine is gone.
async fn attend(
    listener: &Listener,
    mut stream: BoxStream<'static, String>,
    gone: &CancellationToken,
) -> Option<&'static str> {
    {
        let wakes = listener.0.upgrade()?;
        wakes.others.lock().since = Some(Instant::now());
        wakes.look_at_everything();
        wakes.announce(true);
    }
    let mut own = Some(Instant::now());
    let mut repeat = tokio::time::interval_at(tokio::time::Instant::now() + REPEATED, REPEATED);
    repeat.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let fault = loop {
        let changed = listener.0.upgrade()?.interests_changed.clone();
        tokio::select! {
            () = gone.cancelled() => return None,
            message = stream.next() => match message {
                Some(message) => {
                    if listener.0.upgrade()?.heard(&message) {
                        own = None;
                    }
                }
                None => break "the connection was lost",
            },
            () = changed.notified() => listener.0.upgrade()?.announce(false),
            _ = repeat.tick() => {
                if own.is_some_and(|at| at.elapsed() >= DEAF) {
                    break "what this process sent did not come back (does a pooler stand between it and the database?)";
                }
                own.get_or_insert_with(Instant::now);
                let wakes = listener.0.upgrade()?;
                wakes.forget();
                wakes.announce(false);
            }
        }
    };
    let wakes = listener.0.upgrade()?;
    let mut others = wakes.others.lock();
    others.since = None;
    Some(fault)
}
