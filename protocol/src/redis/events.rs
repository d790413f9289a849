//! What is said while a job runs: kept for latecomers, announced, and followed until the result is there.

use super::hub::Watch;
use super::{Entry, POLL, Shared};
use crate::transport::EventStream;
use crate::{TransportError, WorkerEvent, decode, encode, names};
use futures::{StreamExt as _, stream};
use redis::Script;
use std::collections::VecDeque;
use std::sync::{Arc, LazyLock};

/// How many events a follower reads at a time.
const PAGE: usize = 128;

/// Keeps an event for latecomers and announces it, in one round trip.
static EVENT: LazyLock<Script> = LazyLock::new(|| {
    Script::new(
        r"
        redis.call('XADD', KEYS[1], 'MAXLEN', ARGV[2], '*', 'data', ARGV[1])
        redis.call('EXPIRE', KEYS[1], ARGV[3])
        return redis.call('PUBLISH', KEYS[1], ARGV[1])",
    )
});

impl Shared {
    pub async fn publish_event(&self, event: &WorkerEvent) -> Result<(), TransportError> {
        let text = encode(event, decode::MAX_EVENT_BYTES)?;
        let (text, key) = (text.as_str(), names::events(&event.request_id));
        let (key, kept) = (key.as_str(), self.options.events.max(1));
        self.link
            .run(|mut live| async move {
                EVENT
                    .key(key)
                    .arg(text)
                    .arg(kept)
                    .arg(names::KEEP_S)
                    .invoke_async::<()>(&mut live)
                    .await
            })
            .await
    }

    pub fn follow(self: Arc<Self>, request_id: &str) -> EventStream {
        let hub = &self.hub;
        let follower = Follower {
            watch: (
                hub.watch(names::events(request_id)),
                hub.watch(names::result(request_id)),
            ),
            shared: self.clone(),
            request_id: request_id.to_owned(),
            last: "0-0".to_owned(),
            read: VecDeque::new(),
        };
        stream::unfold(follower, Follower::next).boxed()
    }

    /// Events after `last`, oldest first, each with its place. What cannot be read is left out.
    async fn events_after(
        &self,
        request_id: &str,
        last: &str,
    ) -> Result<Vec<(String, Option<WorkerEvent>)>, TransportError> {
        let found: Vec<Entry> = self
            .link
            .ask(
                redis::cmd("XRANGE")
                    .arg(names::events(request_id))
                    .arg(format!("({last}"))
                    .arg("+")
                    .arg("COUNT")
                    .arg(PAGE),
            )
            .await?;
        Ok(found
            .into_iter()
            .map(|(place, fields)| {
                let event = fields
                    .iter()
                    .find(|(name, _)| name == names::FIELD)
                    .and_then(|(_, data)| decode::event(data).ok());
                (place, event)
            })
            .collect())
    }
}

/// A follower of the events of one request.
struct Follower {
    shared: Arc<Shared>,
    request_id: String,
    watch: (Watch, Watch),
    last: String,
    read: VecDeque<WorkerEvent>,
}

impl Follower {
    async fn next(mut self) -> Option<(WorkerEvent, Self)> {
        loop {
            if let Some(event) = self.read.pop_front() {
                return Some((event, self));
            }
            // In this order: what was said before the result is read before the end is believed.
            let over = self
                .shared
                .exists(&self.shared.results.known(&self.request_id))
                .await;
            let page = self.shared.events_after(&self.request_id, &self.last).await;
            match (page, over) {
                (Ok(page), _) if !page.is_empty() => {
                    if let Some((place, _)) = page.last() {
                        self.last.clone_from(place);
                    }
                    self.read.extend(page.into_iter().filter_map(|(_, e)| e));
                    continue;
                }
                (Ok(_), Ok(true)) => return None,
                (Ok(_), Ok(false)) => {}
                (Err(error), _) | (_, Err(error)) => {
                    tracing::warn!(%error, request = self.request_id, "events cannot be read; trying on");
                }
            }
            let (events, result) = &mut self.watch;
            tokio::select! {
                () = events.wait(POLL) => {}
                () = result.wait(POLL) => {}
            }
        }
    }
}
