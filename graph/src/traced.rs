//! A database whose every call is a span, at level debug: `db`, with the operation and, where there is one, the thread.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use tracing::instrument;

use crate::{
    cache::Cache,
    checkpoint::{
        Appended, Bell, CancelOutcome, CancelRequest, Channels, CheckpointRecord, Checkpointer,
        Claim, ClaimRequest, Claimed, Commit, Copied, Created, DeleteFilter, Deleted, Entry,
        Forgotten, HistoryFilter, JournalFilter, Keep, Lease, LeaseTerms, Loaded, NewCheckpoint,
        NewEvent, NewSignal, NewThread, PrunePlan, Pruned, Receipt, Renewed, Reopened, Retention,
        SignalOutcome, SignalRecord, StateRows, StorageError, SurveyFilter, Surveyed, ThreadFilter,
        ThreadRecord, Write,
    },
    documents::DocumentStore,
    ids::{Cursor, ThreadId},
};

/// Passes every call on.
pub(crate) struct Traced(pub Arc<dyn Checkpointer>);

#[async_trait]
impl Checkpointer for Traced {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cache(&self) -> Option<Arc<dyn Cache>> {
        self.0.cache()
    }

    fn documents(&self) -> Option<Arc<dyn DocumentStore>> {
        self.0.documents()
    }

    fn keeps_values(&self) -> bool {
        self.0.keeps_values()
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "migrate"))]
    async fn migrate(&self) -> Result<(), StorageError> {
        self.0.migrate().await
    }

    fn bell(&self) -> Option<Arc<dyn Bell>> {
        self.0.bell()
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "create_thread", thread = %thread.id))]
    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        self.0.create_thread(thread).await
    }

    fn creates_leased(&self) -> bool {
        self.0.creates_leased()
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "create_leased", thread = %thread.id))]
    async fn create_leased(
        &self,
        thread: NewThread,
        terms: LeaseTerms<'_>,
    ) -> Result<(Created, Option<Claim>), StorageError> {
        self.0.create_leased(thread, terms).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "signal", thread = %signal.thread, signal = signal.kind, key = signal.key))]
    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        self.0.signal(signal, answers).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "cancel", thread = %request.thread))]
    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        self.0.cancel(request).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "reopen", %thread))]
    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError> {
        self.0.reopen(thread).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "thread", %thread))]
    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadRecord>, StorageError> {
        self.0.thread(thread).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "threads"))]
    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError> {
        self.0.threads(filter).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "delete_thread", %thread))]
    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError> {
        self.0.delete_thread(thread).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "claim"))]
    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        self.0.claim(request).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "renew"))]
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        self.0.renew(leases, lease).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "break_leases"))]
    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
        self.0.break_leases(owner).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "load", thread = %lease.thread))]
    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        self.0.load(lease).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "pending_writes", %thread))]
    async fn pending_writes(&self, thread: &ThreadId) -> Result<Vec<Write>, StorageError> {
        self.0.pending_writes(thread).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "mailbox", %thread))]
    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        self.0.mailbox(thread, after).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "commit", thread = %lease.thread))]
    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        self.0.commit(lease, commit).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "commit", thread = %lease.thread))]
    async fn commit_kept(
        &self,
        lease: &Lease,
        commit: &Arc<Commit>,
    ) -> Result<Receipt, StorageError> {
        self.0.commit_kept(lease, commit).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "history", %thread))]
    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError> {
        self.0.history(thread, filter).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "state_rows", %thread))]
    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        self.0.state_rows(thread, checkpoint).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "fork", %thread))]
    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        self.0.fork(thread, checkpoint).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "set_head", %thread))]
    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        self.0.set_head(thread, branch).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "branches", %thread))]
    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError> {
        self.0.branches(thread).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "journal"))]
    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        self.0.journal(filter, after, limit).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "journal_end"))]
    async fn journal_end(&self) -> Result<Cursor, StorageError> {
        self.0.journal_end().await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "append", id))]
    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        self.0.append(id, event).await
    }

    fn retention(&self) -> &dyn Retention {
        self
    }
}

#[async_trait]
impl Retention for Traced {
    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "prune_plan", %thread))]
    async fn prune_plan(&self, thread: &ThreadId, keep: &Keep) -> Result<PrunePlan, StorageError> {
        self.0.retention().prune_plan(thread, keep).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "prune", %thread))]
    async fn prune(
        &self,
        thread: &ThreadId,
        before: u64,
        snapshots: &BTreeMap<u64, Channels>,
    ) -> Result<Pruned, StorageError> {
        self.0.retention().prune(thread, before, snapshots).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "copy_thread", thread = %from, copy = %to))]
    async fn copy_thread(&self, from: &ThreadId, to: &ThreadId) -> Result<Copied, StorageError> {
        self.0.retention().copy_thread(from, to).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "delete_threads"))]
    async fn delete_threads(&self, filter: &DeleteFilter) -> Result<Deleted, StorageError> {
        self.0.retention().delete_threads(filter).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "forget_keys"))]
    async fn forget_keys(
        &self,
        threads: &[ThreadId],
        age: Duration,
    ) -> Result<Forgotten, StorageError> {
        self.0.retention().forget_keys(threads, age).await
    }

    #[instrument(name = "db", level = "debug", skip_all, fields(system = self.name(), operation = "survey"))]
    async fn survey(&self, filter: &SurveyFilter) -> Result<Vec<Surveyed>, StorageError> {
        self.0.retention().survey(filter).await
    }
}
