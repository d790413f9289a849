//! The connection that listens: rings bells, passes orders on. What it misses while it is down costs a poll, not the work.

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use redis::Msg;
use redis::aio::{PubSub, PubSubSink};
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, broadcast, watch};
use tokio::task::JoinHandle;

use super::address::Address;
use crate::{Control, decode, names};

/// The longest pause between two tries to connect.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often a silent connection is asked whether it lives, and how long it may take to say so.
const PING: Duration = Duration::from_secs(10);
/// How many orders a listener may lag behind.
const ORDERS: usize = 256;

type Bell = watch::Sender<u64>;

/// What a process listens to.
pub(super) struct Hub {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
    /// Whether results are announced is asked for by the first who waits for one, once and for all.
    results: OnceLock<Watch>,
}

struct Shared {
    address: Arc<Address>,
    /// Rung when a job may be there.
    jobs: Bell,
    orders: broadcast::Sender<Control>,
    /// Channels that somebody watches, each with its bell and the number of watchers.
    watched: Mutex<HashMap<String, (Bell, usize)>>,
    changed: Notify,
    /// Grows with every connection that has subscribed to everything it should.
    ready: watch::Sender<u64>,
}

/// A channel that is being watched, until this is dropped.
pub(super) struct Watch {
    shared: Arc<Shared>,
    channel: String,
    bell: watch::Receiver<u64>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.shared.watched();
        if let Some((_, watchers)) = watched.get_mut(&self.channel) {
            *watchers -= 1;
            if *watchers == 0 {
                watched.remove(&self.channel);
                self.shared.changed.notify_one();
            }
        }
    }
}

impl Watch {
    /// Until the channel may have something new, but no longer than `at_most`.
    pub async fn wait(&mut self, at_most: Duration) {
        wait(&mut self.bell, at_most).await;
    }
}

/// Until the bell rings, but no longer than `at_most`. Hearing nothing and a bell that is gone mean the same: look again.
pub(super) async fn wait(bell: &mut watch::Receiver<u64>, at_most: Duration) {
    let _ = tokio::time::timeout(at_most, bell.changed()).await;
}

impl Hub {
    pub fn start(address: Arc<Address>) -> Self {
        let shared = Arc::new(Shared {
            address,
            jobs: Bell::new(0),
            orders: broadcast::Sender::new(ORDERS),
            watched: Mutex::default(),
            changed: Notify::new(),
            ready: watch::Sender::new(0),
        });
        Self {
            task: tokio::spawn(shared.clone().listen()),
            shared,
            results: OnceLock::new(),
        }
    }

    pub fn results(&self) -> watch::Receiver<u64> {
        let watch = self.results.get_or_init(|| self.watch(names::result("*")));
        watch.bell.clone()
    }

    pub fn jobs(&self) -> watch::Receiver<u64> {
        self.shared.jobs.subscribe()
    }

    /// Watches a channel (a pattern, if it ends with `*`).
    pub fn watch(&self, channel: String) -> Watch {
        let bell = {
            let mut watched = self.shared.watched();
            let (bell, watchers) = watched
                .entry(channel.clone())
                .or_insert_with(|| (Bell::new(0), 0));
            *watchers += 1;
            bell.subscribe()
        };
        self.shared.changed.notify_one();
        Watch {
            shared: self.shared.clone(),
            channel,
            bell,
        }
    }

    /// Orders from now on, as soon as there is a connection; waits for one at most so long.
    pub async fn orders(&self, at_most: Duration) -> BoxStream<'static, Control> {
        let receiver = self.shared.orders.subscribe();
        let mut ready = self.shared.ready.subscribe();
        // Without a connection they come when there is one.
        let _ = tokio::time::timeout(at_most, ready.wait_for(|count| *count > 0)).await;
        stream::unfold(receiver, |mut receiver| async move {
            loop {
                match receiver.recv().await {
                    Ok(order) => return Some((order, receiver)),
                    Err(broadcast::error::RecvError::Lagged(missed)) => {
                        tracing::warn!(missed, "orders came faster than they were read");
                    }
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        })
        .boxed()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn ring(bell: &Bell) {
    bell.send_modify(|rung| *rung = rung.wrapping_add(1));
}

impl Shared {
    fn watched(&self) -> std::sync::MutexGuard<'_, HashMap<String, (Bell, usize)>> {
        // Every change under this lock is one call, so a panic of another holder left it whole.
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn listen(self: Arc<Self>) {
        let mut failures = 0_u32;
        let mut attempt = 0;
        loop {
            match self.address.listen(attempt).await {
                Ok(connection) => match self.hear(connection, &mut failures).await {
                    Ok(()) => tracing::warn!(
                        "{} has closed the connection that listens",
                        self.address.shown()
                    ),
                    Err(error) => {
                        tracing::warn!(%error, "listening to {} failed", self.address.shown());
                    }
                },
                Err(error) => {
                    if failures == 0 {
                        tracing::warn!(%error, "cannot listen to {}; trying on", self.address.shown());
                    }
                }
            }
            attempt += 1;
            failures = failures.saturating_add(1);
            let pause = Duration::from_millis(50) * 2_u32.saturating_pow(failures.min(8));
            tokio::time::sleep(pause.min(LONGEST_PAUSE)).await;
        }
    }

    async fn hear(&self, connection: PubSub, failures: &mut u32) -> redis::RedisResult<()> {
        let (mut sink, mut messages) = connection.split();
        sink.subscribe(&[names::SPAWN, names::CONTROL][..]).await?;
        let mut subscribed = HashSet::new();
        self.follow(&mut sink, &mut subscribed).await?;
        *failures = 0;
        // Whatever was said meanwhile was missed.
        ring(&self.jobs);
        for (bell, _) in self.watched().values() {
            ring(bell);
        }
        ring(&self.ready);
        loop {
            tokio::select! {
                message = messages.next() => match message {
                    Some(message) => self.dispatch(&message),
                    None => return Ok(()),
                },
                () = self.changed.notified() => self.follow(&mut sink, &mut subscribed).await?,
                () = tokio::time::sleep(PING) => {
                    tokio::time::timeout(PING, sink.ping::<redis::Value>())
                        .await
                        .unwrap_or_else(|_| Err(std::io::Error::from(std::io::ErrorKind::TimedOut).into()))?;
                }
            }
        }
    }

    /// Subscribes to what is watched now, and to nothing else.
    async fn follow(
        &self,
        sink: &mut PubSubSink,
        subscribed: &mut HashSet<String>,
    ) -> redis::RedisResult<()> {
        let wanted: HashSet<String> = self.watched().keys().cloned().collect();
        for channel in subscribed.difference(&wanted) {
            if channel.ends_with('*') {
                sink.punsubscribe(channel).await?;
            } else {
                sink.unsubscribe(channel).await?;
            }
        }
        for channel in wanted.difference(subscribed) {
            if channel.ends_with('*') {
                sink.psubscribe(channel).await?;
            } else {
                sink.subscribe(channel).await?;
            }
        }
        // What was published between the watcher's first look and now was missed.
        for channel in wanted.difference(subscribed) {
            if let Some((bell, _)) = self.watched().get(channel) {
                ring(bell);
            }
        }
        *subscribed = wanted;
        Ok(())
    }

    fn dispatch(&self, message: &Msg) {
        match message.get_channel_name() {
            names::SPAWN => ring(&self.jobs),
            names::CONTROL => match decode::control(message.get_payload_bytes()) {
                // Nobody listening is fine.
                Ok(order) => {
                    let _ = self.orders.send(order.control);
                }
                Err(error) => tracing::warn!(%error, "an order cannot be read"),
            },
            channel => {
                let name = message
                    .get_pattern::<String>()
                    .unwrap_or_else(|_| channel.to_owned());
                if let Some((bell, _)) = self.watched().get(&name) {
                    ring(bell);
                }
            }
        }
    }
}
