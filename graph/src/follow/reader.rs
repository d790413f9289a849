//! One reader of a thread: items of this process as they come, and what the database keeps of what others do.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::stream::{BoxStream, StreamExt, unfold};

use super::{
    Modes, StreamItem, StreamKind,
    bus::{First, Queued, Spot, Subscription},
    stored::{self, Ahead, Untold},
};
use crate::{
    checkpoint::{StorageError, ThreadRecord, ThreadStatus},
    error::EngineError,
    host::Shared,
    ids::ThreadId,
    wakes::Following,
};

/// Follows a thread: from a checkpoint, or from now on.
pub(crate) fn follow(
    shared: Arc<Shared>,
    thread: ThreadId,
    from: Option<u64>,
    modes: Modes,
) -> BoxStream<'static, StreamItem> {
    let subscription = shared.bus.subscribe(&thread, modes);
    let following = shared.wakes.following(&thread);
    let reader = Reader {
        shared,
        thread,
        modes,
        subscription,
        following,
        told: from,
        // The input is no step.
        told_step: from.filter(|from| *from == 0),
        told_rest: None,
        untold: VecDeque::new(),
        ahead: Ahead::default(),
        record: None,
        ready: VecDeque::new(),
        faults: 0,
        ended: false,
    };
    unfold(reader, |mut reader| async move {
        let item = reader.next().await?;
        Some((item, reader))
    })
    .boxed()
}

/// What a thread does when it does nothing: what it waits for, or that it has ended.
#[derive(Clone, Debug, PartialEq)]
enum Rest {
    Waits(Vec<String>),
    Ended(ThreadStatus, jiff::Timestamp),
}

struct Reader {
    shared: Arc<Shared>,
    thread: ThreadId,
    modes: Modes,
    subscription: Subscription,
    following: Following,
    /// All checkpoints up to this one have been told, or are none of the reader's business; absent: not known yet.
    told: Option<u64>,
    /// The step that led there, if it is known.
    told_step: Option<u64>,
    told_rest: Option<Rest>,
    /// Checkpoints of other processes that are to be told, oldest first.
    untold: VecDeque<Untold>,
    /// What was read of them beforehand.
    ahead: Ahead,
    /// The thread when that was found out.
    record: Option<ThreadRecord>,
    /// Items that were read back.
    ready: VecDeque<StreamItem>,
    /// How often in a row the database has failed.
    faults: u32,
    ended: bool,
}

impl Reader {
    async fn next(&mut self) -> Option<StreamItem> {
        while !self.ended {
            if let Some(item) = self.ready.pop_front() {
                self.ended = matches!(item.kind, StreamKind::Ended(_));
                return Some(item);
            }
            if self.untold.front().is_some() {
                if let Err(error) = self.read_back().await {
                    self.failed(&error).await;
                }
                continue;
            }
            match self.subscription.queue.first() {
                First::Missed(count, checkpoint) => {
                    self.told = self.told.max(Some(checkpoint));
                    return Some(StreamItem {
                        thread: self.thread.clone(),
                        namespace: Vec::new(),
                        step: 0,
                        at: jiff::Timestamp::now(),
                        live: true,
                        kind: StreamKind::Missed(count),
                    });
                }
                First::Something(spot) => {
                    if let Some(item) = self.live(spot).await {
                        return Some(item);
                    }
                }
                First::Nothing => {
                    if let Err(error) = self.look().await {
                        self.failed(&error).await;
                    }
                }
            }
        }
        None
    }

    /// Takes what comes first from the queue, when all that was before it has been told.
    async fn live(&mut self, spot: Spot) -> Option<StreamItem> {
        let told = *self.told.get_or_insert(spot.on);
        if spot.on > told {
            // The thread went on in another process in the meantime, or another branch is its head now.
            self.record = None;
            match self.catch_up(spot.on).await {
                Ok(true) => return None,
                // They are gone.
                Ok(false) => self.told = Some(spot.on),
                Err(error) => {
                    self.failed(&error).await;
                    return None;
                }
            }
        }
        let queued = self.subscription.queue.pop()?;
        let known = spot
            .part_of
            .is_some_and(|checkpoint| Some(checkpoint) <= self.told);
        let (item, marks) = match queued {
            Queued::Passed(_) => (None, true),
            Queued::Item(item, _) => {
                let marks = matches!(item.kind, StreamKind::Checkpoint(_));
                (Some(*item).filter(|_| !known), marks)
            }
        };
        if marks && !known {
            self.told = spot.part_of;
            self.told_step = Some(spot.step);
        }
        match item.as_ref().map(|item| &item.kind) {
            Some(StreamKind::Suspended { waits }) => {
                let ids = waits.iter().map(|wait| wait.id.clone()).collect();
                self.told_rest = Some(Rest::Waits(ids));
            }
            Some(StreamKind::Ended(_)) => self.ended = true,
            _ => {}
        }
        item
    }

    /// Looks what other processes have done, and waits if there is nothing.
    async fn look(&mut self) -> Result<(), EngineError> {
        // From now on nothing that happens is overlooked.
        let moved = self.following.moved.clone();
        let moved = moved.notified();
        tokio::pin!(moved);
        moved.as_mut().enable();
        if self.told.is_none() || !self.shared.wakes.is_live(&self.thread) {
            let record = self.shared.store.thread(&self.thread).await?;
            self.faults = 0;
            if !self.subscription.queue.is_empty() {
                // It runs here now: that comes first, and says how far the others got.
                return Ok(());
            }
            if self.find_news(record).await? {
                return Ok(());
            }
        }
        let queue = self.subscription.queue.clone();
        tokio::select! {
            () = queue.added.notified() => {}
            () = moved => {}
            () = tokio::time::sleep(self.shared.wakes.poll) => {}
        }
        Ok(())
    }

    async fn find_news(&mut self, record: Option<ThreadRecord>) -> Result<bool, EngineError> {
        let Some(record) = record else {
            // It begins when it is started.
            self.told.get_or_insert(0);
            return Ok(false);
        };
        let rest = match record.status {
            ThreadStatus::Waiting => Some(Rest::Waits(
                record.waits.iter().map(|wait| wait.id.clone()).collect(),
            )),
            status if status.is_ended() => Some(Rest::Ended(status, record.updated_at)),
            _ => None,
        };
        let Some(told) = self.told else {
            // The first look: what was before is none of the reader's business.
            self.told = Some(record.checkpoint);
            self.told_step = Some(record.step);
            self.told_rest = rest;
            return Ok(false);
        };
        if record.checkpoint > told {
            let last = record.checkpoint;
            self.record = Some(record);
            if self.catch_up(last).await? {
                return Ok(true);
            }
            self.told = Some(last);
            return Ok(true);
        }
        if rest == self.told_rest || rest.is_none() {
            if rest.is_none() {
                self.told_rest = None;
            }
            return Ok(false);
        }
        self.told_rest = rest;
        let kind = match record.status {
            ThreadStatus::Waiting => StreamKind::Suspended {
                waits: record.waits.clone(),
            },
            status => StreamKind::Ended(status),
        };
        self.ready
            .push_back(stored::item(&record, record.step, record.updated_at, kind));
        Ok(true)
    }

    /// Finds the checkpoints that have not been told, up to this one. Returns whether there are any.
    async fn catch_up(&mut self, last: u64) -> Result<bool, EngineError> {
        let record = match self.record.take() {
            Some(record) => record,
            None => match self.shared.store.thread(&self.thread).await? {
                Some(record) => record,
                None => return Ok(false),
            },
        };
        let told = self.told.unwrap_or(last);
        let untold = stored::untold(&self.shared, &record, told, last).await?;
        self.faults = 0;
        self.record = Some(record);
        self.untold = untold.into();
        self.ahead = Ahead::default();
        Ok(!self.untold.is_empty())
    }

    /// Reads the items of one checkpoint.
    async fn read_back(&mut self) -> Result<(), EngineError> {
        let (Some(untold), Some(record)) = (self.untold.front(), &self.record) else {
            self.untold.clear();
            return Ok(());
        };
        let (checkpoint, parent) = (untold.checkpoint(), untold.parent());
        let step = untold.step();
        let items = stored::items(
            &self.shared,
            record,
            &self.untold,
            &mut self.ahead,
            self.modes,
        );
        let items = match items.await {
            Ok(items) => items,
            Err(EngineError::Storage(StorageError::UnknownCheckpoint { .. })) => {
                // It was forgotten after it had been listed. What there is now says how much is missing.
                self.untold.clear();
                self.record = None;
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        self.faults = 0;
        if parent > self.told.unwrap_or(parent) {
            // What is between is gone; the numbers of steps say how much it was, or else those of the checkpoints.
            let missed = match self.told_step {
                Some(known) => step.saturating_sub(known + 1),
                None => parent.saturating_sub(self.told.unwrap_or(parent)),
            };
            let missed = missed.max(1);
            let kind = StreamKind::Missed(missed);
            self.ready
                .push_back(stored::item(record, 0, record.updated_at, kind));
        }
        self.ready.extend(items);
        self.untold.pop_front();
        self.told = Some(checkpoint);
        self.told_step = Some(step);
        Ok(())
    }

    async fn failed(&mut self, error: &EngineError) {
        self.faults = self.faults.saturating_add(1);
        let poll = self.shared.wakes.poll.min(Duration::from_secs(1));
        let pause = poll * self.faults.min(10);
        tracing::warn!(thread = %self.thread, error = %crate::private::chain(error), again_in = ?pause, "what other processes do in the thread could not be read");
        tokio::time::sleep(pause).await;
    }
}
