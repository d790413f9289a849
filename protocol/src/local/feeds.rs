//! Events in memory: a bounded history per request, and whoever listens now.

use super::lock;
use crate::{EventStream, WorkerEvent};
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use std::collections::{HashMap, VecDeque};
use std::sync::Mutex;
use tokio::sync::broadcast::{self, error::RecvError};

/// How many requests have a history at a time; those that ended first go first.
const MAX_FEEDS: usize = 256;

pub(super) struct Feeds {
    history: usize,
    feeds: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    by_request: HashMap<String, Feed>,
    next: u64,
}

struct Feed {
    born: u64,
    history: VecDeque<WorkerEvent>,
    /// None once the request has its result.
    live: Option<broadcast::Sender<WorkerEvent>>,
}

impl Feeds {
    pub(super) fn new(history: usize) -> Self {
        Self {
            history: history.max(1),
            feeds: Mutex::new(Table::default()),
        }
    }

    pub(super) fn publish(&self, event: &WorkerEvent) {
        let mut table = lock(&self.feeds);
        let feed = table.feed(&event.request_id, self.history);
        if feed.history.len() == self.history {
            feed.history.pop_front();
        }
        feed.history.push_back(event.clone());
        if let Some(live) = &feed.live {
            // Nobody listening is fine.
            let _ = live.send(event.clone());
        }
    }

    pub(super) fn subscribe(&self, request_id: &str, over: bool) -> EventStream {
        let mut table = lock(&self.feeds);
        if over && !table.by_request.contains_key(request_id) {
            return stream::empty().boxed();
        }
        let feed = table.feed(request_id, self.history);
        let past = stream::iter(feed.history.clone());
        match &feed.live {
            Some(sender) => past.chain(live(sender.subscribe())).boxed(),
            None => past.boxed(),
        }
    }

    /// The request has its result: streams end after what they have still to read.
    pub(super) fn end(&self, request_id: &str) {
        if let Some(feed) = lock(&self.feeds).by_request.get_mut(request_id) {
            feed.live = None;
        }
    }
}

impl Table {
    fn feed(&mut self, request_id: &str, history: usize) -> &mut Feed {
        if !self.by_request.contains_key(request_id) && self.by_request.len() >= MAX_FEEDS {
            let oldest = self
                .by_request
                .iter()
                .min_by_key(|(_, feed)| (feed.live.is_some(), feed.born))
                .map(|(id, _)| id.clone());
            if let Some(id) = oldest {
                self.by_request.remove(&id);
            }
        }
        let born = self.next;
        self.next += 1;
        self.by_request
            .entry(request_id.to_owned())
            .or_insert_with(|| Feed {
                born,
                history: VecDeque::new(),
                live: Some(broadcast::Sender::new(history)),
            })
    }
}

/// What a broadcast receiver still gets; a reader that is too slow misses the oldest.
pub(super) fn live<T: Clone + Send + 'static>(
    receiver: broadcast::Receiver<T>,
) -> BoxStream<'static, T> {
    stream::unfold(receiver, |mut receiver| async move {
        loop {
            match receiver.recv().await {
                Ok(message) => return Some((message, receiver)),
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return None,
            }
        }
    })
    .boxed()
}
