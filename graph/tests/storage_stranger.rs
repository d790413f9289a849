//! Somebody else's checkpointer: a type of its own around one of ours, as a stranger would write it, passes the suite. So the suite
//! needs nothing that only this crate can have.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use graph::{
    Cursor, MemoryCheckpointer, ThreadId,
    checkpoint::{
        Appended, CancelOutcome, CancelRequest, CheckpointRecord, Checkpointer, ClaimRequest,
        Claimed, Commit, Created, Entry, HistoryFilter, JournalFilter, Lease, Loaded,
        NewCheckpoint, NewEvent, NewSignal, NewThread, Receipt, Renewed, Reopened, Retention,
        SignalOutcome, SignalRecord, StateRows, StorageError, ThreadFilter, ThreadRecord, Write,
    },
    conformance::Lab,
};

/// Has what a checkpointer must have, and nothing that it may have.
#[derive(Clone, Debug, Default)]
struct Stranger {
    inner: MemoryCheckpointer,
}

#[async_trait]
impl Checkpointer for Stranger {
    fn name(&self) -> &'static str {
        "stranger"
    }
    async fn migrate(&self) -> Result<(), StorageError> {
        self.inner.migrate().await
    }
    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        self.inner.create_thread(thread).await
    }
    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        self.inner.signal(signal, answers).await
    }
    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        self.inner.cancel(request).await
    }
    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError> {
        self.inner.reopen(thread).await
    }
    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadRecord>, StorageError> {
        self.inner.thread(thread).await
    }
    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError> {
        self.inner.threads(filter).await
    }
    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError> {
        self.inner.delete_thread(thread).await
    }
    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        self.inner.claim(request).await
    }
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        self.inner.renew(leases, lease).await
    }
    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
        self.inner.break_leases(owner).await
    }
    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        self.inner.load(lease).await
    }
    async fn pending_writes(&self, thread: &ThreadId) -> Result<Vec<Write>, StorageError> {
        self.inner.pending_writes(thread).await
    }
    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        self.inner.mailbox(thread, after).await
    }
    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        self.inner.commit(lease, commit).await
    }
    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError> {
        self.inner.history(thread, filter).await
    }
    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        self.inner.state_rows(thread, checkpoint).await
    }
    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        self.inner.fork(thread, checkpoint).await
    }
    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        self.inner.set_head(thread, branch).await
    }
    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError> {
        self.inner.branches(thread).await
    }
    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        self.inner.journal(filter, after, limit).await
    }
    async fn journal_end(&self) -> Result<Cursor, StorageError> {
        self.inner.journal_end().await
    }
    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        self.inner.append(id, event).await
    }
    fn retention(&self) -> &dyn Retention {
        self.inner.retention()
    }
}

async fn lab() -> Lab {
    let stranger = Stranger::default();
    Lab::new(
        move || {
            let stranger = stranger.clone();
            async move { stranger }
        },
        (),
    )
    .await
}

graph::checkpointer_conformance!(lab());
