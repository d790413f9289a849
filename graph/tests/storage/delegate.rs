//! Databases that hand every request on to another one. Each request stands here once; a test says only what is to be otherwise.

use std::{ops::Deref, sync::Arc};

use graph::{
    Cache, DocumentStore,
    checkpoint::{
        Appended, Bell, CancelOutcome, CancelRequest, CheckpointRecord, Checkpointer, Claim,
        ClaimRequest, Claimed, Commit, Created, Entry, HistoryFilter, JournalFilter, Lease,
        LeaseTerms, Loaded, NewCheckpoint, NewEvent, NewSignal, NewThread, Receipt, Renewed,
        Reopened, Retention, SignalOutcome, SignalRecord, StateRows, StorageError, ThreadFilter,
        ThreadRecord, Write,
    },
};

/// An `impl` (or a trait) whose methods are those that a checkpointer must have, each handed on to `self.$to`.
macro_rules! handed_on {
    ([$($header:tt)*] [$($to:tt)*] { $($own:tt)* }) => {
        #[async_trait::async_trait]
        $($header)* {
            $($own)*
            async fn migrate(&self) -> Result<(), StorageError> {
                self.$($to)*.migrate().await
            }
            async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
                self.$($to)*.create_thread(thread).await
            }
            async fn signal(&self, signal: NewSignal, answers: Option<&str>) -> Result<SignalOutcome, StorageError> {
                self.$($to)*.signal(signal, answers).await
            }
            async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
                self.$($to)*.cancel(request).await
            }
            async fn reopen(&self, thread: &graph::ThreadId) -> Result<Reopened, StorageError> {
                self.$($to)*.reopen(thread).await
            }
            async fn thread(&self, thread: &graph::ThreadId) -> Result<Option<ThreadRecord>, StorageError> {
                self.$($to)*.thread(thread).await
            }
            async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError> {
                self.$($to)*.threads(filter).await
            }
            async fn delete_thread(&self, thread: &graph::ThreadId) -> Result<bool, StorageError> {
                self.$($to)*.delete_thread(thread).await
            }
            async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
                self.$($to)*.claim(request).await
            }
            async fn renew(&self, leases: &[Lease], lease: std::time::Duration) -> Result<Vec<Renewed>, StorageError> {
                self.$($to)*.renew(leases, lease).await
            }
            async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
                self.$($to)*.break_leases(owner).await
            }
            async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
                self.$($to)*.load(lease).await
            }
            async fn pending_writes(&self, thread: &graph::ThreadId) -> Result<Vec<Write>, StorageError> {
                self.$($to)*.pending_writes(thread).await
            }
            async fn mailbox(&self, thread: &graph::ThreadId, after: u64) -> Result<(Vec<SignalRecord>, u64), StorageError> {
                self.$($to)*.mailbox(thread, after).await
            }
            async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
                self.$($to)*.commit(lease, commit).await
            }
            async fn history(&self, thread: &graph::ThreadId, filter: &HistoryFilter) -> Result<Vec<CheckpointRecord>, StorageError> {
                self.$($to)*.history(thread, filter).await
            }
            async fn state_rows(&self, thread: &graph::ThreadId, checkpoint: Option<u64>) -> Result<StateRows, StorageError> {
                self.$($to)*.state_rows(thread, checkpoint).await
            }
            async fn fork(&self, thread: &graph::ThreadId, checkpoint: NewCheckpoint) -> Result<(u32, u64), StorageError> {
                self.$($to)*.fork(thread, checkpoint).await
            }
            async fn set_head(&self, thread: &graph::ThreadId, branch: u32) -> Result<(), StorageError> {
                self.$($to)*.set_head(thread, branch).await
            }
            async fn branches(&self, thread: &graph::ThreadId) -> Result<std::collections::BTreeMap<u32, u64>, StorageError> {
                self.$($to)*.branches(thread).await
            }
            async fn journal(&self, filter: &JournalFilter, after: graph::Cursor, limit: usize) -> Result<Vec<Entry>, StorageError> {
                self.$($to)*.journal(filter, after, limit).await
            }
            async fn journal_end(&self) -> Result<graph::Cursor, StorageError> {
                self.$($to)*.journal_end().await
            }
            async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
                self.$($to)*.append(id, event).await
            }
            fn retention(&self) -> &dyn Retention {
                self.$($to)*.retention()
            }
        }
    };
}
#[allow(unused_imports, reason = "each test binary uses a part of it")]
pub(crate) use handed_on;

/// The same with what a checkpointer may have.
macro_rules! all_handed_on {
    ([$($header:tt)*] [$($to:tt)*] { $($own:tt)* }) => {
        handed_on! {
            [$($header)*] [$($to)*] {
                $($own)*
                fn name(&self) -> &'static str {
                    self.$($to)*.name()
                }
                fn cache(&self) -> Option<Arc<dyn Cache>> {
                    self.$($to)*.cache()
                }
                fn documents(&self) -> Option<Arc<dyn DocumentStore>> {
                    self.$($to)*.documents()
                }
                fn keeps_values(&self) -> bool {
                    self.$($to)*.keeps_values()
                }
                fn bell(&self) -> Option<Arc<dyn Bell>> {
                    self.$($to)*.bell()
                }
                fn creates_leased(&self) -> bool {
                    self.$($to)*.creates_leased()
                }
                async fn create_leased(
                    &self,
                    thread: NewThread,
                    terms: LeaseTerms<'_>,
                ) -> Result<(Created, Option<Claim>), StorageError> {
                    self.$($to)*.create_leased(thread, terms).await
                }
            }
        }
    };
}

all_handed_on! {
    [pub trait Delegate: Send + Sync + 'static] [inner()] {
        /// Who does what is not done here.
        fn inner(&self) -> &dyn Checkpointer;
    }
}

/// A database that does what its delegate says, and hands the rest on.
pub struct Delegating<D>(pub D);

impl<D> Deref for Delegating<D> {
    type Target = D;

    fn deref(&self) -> &D {
        &self.0
    }
}

all_handed_on! { [impl<D: Delegate> Checkpointer for Delegating<D>] [0] {} }
