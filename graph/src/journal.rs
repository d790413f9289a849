//! Reading and writing the journal from outside of nodes.

use std::{sync::Arc, time::Duration};

use serde::Serialize;

use crate::{
    checkpoint::{Appended, Entry, JournalFilter, NewEvent},
    error::EngineError,
    host::Shared,
    ids::Cursor,
};

/// What has been said, by all threads and others: append-only, in one order.
#[derive(Clone)]
pub struct Journal {
    shared: Arc<Shared>,
}

impl Journal {
    pub(crate) fn new(shared: Arc<Shared>) -> Self {
        Self { shared }
    }

    /// At most `limit` entries after a cursor, in order.
    pub async fn read(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, EngineError> {
        Ok(self.shared.store.journal(filter, after, limit).await?)
    }

    /// The cursor of the newest entry.
    pub async fn end(&self) -> Result<Cursor, EngineError> {
        Ok(self.shared.store.journal_end().await?)
    }

    /// Comes back when there may be entries after the cursor, or when the time is over. What is written is noticed at
    /// once, whoever writes it; what others write and no message tells of (see [`Bell`](crate::checkpoint::Bell)), within a
    /// second.
    pub async fn changed(&self, after: Cursor, timeout: Duration) -> Result<(), EngineError> {
        let deadline = tokio::time::Instant::now() + timeout;
        let wakes = &self.shared.wakes;
        let mut growth = wakes.journal_growth();
        loop {
            growth.mark_unchanged();
            wakes.reads_journal();
            if self.shared.store.journal_end().await? > after {
                return Ok(());
            }
            let poll = deadline.min(tokio::time::Instant::now() + wakes.poll);
            tokio::select! {
                _ = growth.changed() => {}
                () = tokio::time::sleep_until(poll) => {
                    if tokio::time::Instant::now() >= deadline {
                        return Ok(());
                    }
                }
            }
        }
    }

    /// Appends an entry at once, unique by its id.
    pub async fn append(
        &self,
        id: &str,
        stream: &str,
        name: &str,
        payload: &(impl Serialize + ?Sized + Sync),
    ) -> Result<Appended, EngineError> {
        let event = NewEvent {
            stream: stream.to_owned(),
            name: name.to_owned(),
            payload: serde_json::to_value(payload)?,
            thread: None,
        };
        let appended = self.shared.store.append(id, event).await?;
        self.shared.journal_grew();
        Ok(appended)
    }
}
