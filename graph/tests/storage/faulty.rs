//! A database that fails when it is told to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use graph::{
    ThreadId,
    checkpoint::{
        Appended, CancelOutcome, CancelRequest, Checkpointer, Claim, ClaimRequest, Claimed, Commit,
        Created, Lease, LeaseTerms, Loaded, NewCheckpoint, NewEvent, NewSignal, NewThread, Receipt,
        Renewed, SignalOutcome, StorageError, Then,
    },
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::delegate::{Delegate, Delegating};

/// What is wrong with a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does not reach the database.
    Before,
    /// It is carried out; the answer is lost.
    After,
    /// It is carried out, and never answered.
    Mute,
}

/// Says which requests fail, by their number, from 1.
type Plan = Box<dyn Fn(u64) -> Option<Fault> + Send + Sync>;

/// Hands requests on to another database, and fails some commits and appends.
pub type Faulty = Delegating<Faults>;

/// What goes wrong, and how much has gone by.
pub struct Faults {
    inner: Arc<dyn Checkpointer>,
    commits: AtomicU64,
    commit_fails: Plan,
    appends: AtomicU64,
    append_fails: Plan,
    creations: AtomicU64,
    creation_fails: Plan,
    claims: AtomicU64,
    /// So many times, a run cannot even load its thread.
    failing_loads: AtomicU64,
    /// When a thread has ended, its run hears of that only after two renewals have found the lease gone.
    late_ends: bool,
    not_held: Notify,
    /// The process dies at this write.
    dies: Option<(u64, Fault)>,
    writes: AtomicU64,
    dead: CancellationToken,
}

impl Faulty {
    pub fn commits(
        inner: Arc<dyn Checkpointer>,
        fails: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        Self(Faults::failing(inner, fails))
    }

    /// The process that asks it dies at its n-th write (claims count): that one, and whatever it would write later, is never
    /// answered.
    pub fn mortal(inner: Arc<dyn Checkpointer>, dies_at: u64, fault: Fault) -> Self {
        Self(Faults {
            dies: Some((dies_at, fault)),
            ..Faults::failing(inner, |_| None)
        })
    }

    /// The ends of threads land at once, and are answered after two renewals have found their leases gone.
    pub fn late_ends(inner: Arc<dyn Checkpointer>) -> Self {
        Self(Faults {
            late_ends: true,
            ..Faults::failing(inner, |_| None)
        })
    }

    /// The first so many runs cannot load their threads.
    pub fn loads(inner: Arc<dyn Checkpointer>, fail: u64) -> Self {
        Self(Faults {
            failing_loads: AtomicU64::new(fail),
            ..Faults::failing(inner, |_| None)
        })
    }

    pub fn appends(
        inner: Arc<dyn Checkpointer>,
        fails: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        Self(Faults {
            append_fails: Box::new(fails),
            ..Faults::failing(inner, |_| None)
        })
    }

    /// Threads are created, with a lease or without.
    pub fn creations(
        inner: Arc<dyn Checkpointer>,
        fails: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        Self(Faults {
            creation_fails: Box::new(fails),
            ..Faults::failing(inner, |_| None)
        })
    }
}

impl Faults {
    fn failing(
        inner: Arc<dyn Checkpointer>,
        fails: impl Fn(u64) -> Option<Fault> + Send + Sync + 'static,
    ) -> Self {
        Self {
            inner,
            commits: AtomicU64::new(0),
            commit_fails: Box::new(fails),
            appends: AtomicU64::new(0),
            append_fails: Box::new(|_| None),
            creations: AtomicU64::new(0),
            creation_fails: Box::new(|_| None),
            claims: AtomicU64::new(0),
            failing_loads: AtomicU64::new(0),
            late_ends: false,
            not_held: Notify::new(),
            dies: None,
            writes: AtomicU64::new(0),
            dead: CancellationToken::new(),
        }
    }

    /// Comes back when the process has died.
    pub async fn dead(&self) {
        self.dead.cancelled().await;
    }

    /// Carries a write out, if the process still lives.
    async fn alive<T>(&self, request: impl Future<Output = T>) -> T {
        let Some((at, fault)) = self.dies else {
            return request.await;
        };
        let write = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        if write < at {
            return request.await;
        }
        if write == at && fault == Fault::After {
            request.await;
        }
        self.dead.cancel();
        std::future::pending().await
    }

    /// How many loads have still to fail.
    pub fn failing_loads_left(&self) -> u64 {
        self.failing_loads.load(Ordering::SeqCst)
    }

    /// How many claims there were.
    pub fn claims_seen(&self) -> u64 {
        self.claims.load(Ordering::SeqCst)
    }

    fn creation_fault(&self) -> Option<Fault> {
        (self.creation_fails)(self.creations.fetch_add(1, Ordering::SeqCst) + 1)
    }

    /// How many commits there were.
    pub fn seen(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }
}

/// Carries a request out, or not, or without saying so.
async fn through<T>(
    fault: Option<Fault>,
    request: impl Future<Output = Result<T, StorageError>>,
) -> Result<T, StorageError> {
    match fault {
        None => return request.await,
        Some(Fault::Before) => {}
        Some(Fault::After) => {
            request.await?;
        }
        Some(Fault::Mute) => {
            request.await?;
            std::future::pending::<()>().await;
        }
    }
    Err(StorageError::Backend {
        operation: "doing what it was asked".into(),
        source: "the connection broke".into(),
    })
}

#[async_trait]
impl Delegate for Faults {
    fn inner(&self) -> &dyn Checkpointer {
        &*self.inner
    }
    fn name(&self) -> &'static str {
        "faulty"
    }
    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        let commits = self.commits.fetch_add(1, Ordering::SeqCst) + 1;
        let is_late = self.late_ends && matches!(commit.then, Then::End { .. });
        let fault = (self.commit_fails)(commits);
        let result = self
            .alive(through(fault, self.inner.commit(lease, commit)))
            .await;
        if is_late {
            for _ in 0..2 {
                let heard = tokio::time::timeout(Duration::from_mins(1), self.not_held.notified());
                heard.await.expect("leases are renewed");
            }
        }
        result
    }
    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        let fault = self.creation_fault();
        self.alive(through(fault, self.inner.create_thread(thread)))
            .await
    }
    async fn create_leased(
        &self,
        thread: NewThread,
        terms: LeaseTerms<'_>,
    ) -> Result<(Created, Option<Claim>), StorageError> {
        let fault = self.creation_fault();
        self.alive(through(fault, self.inner.create_leased(thread, terms)))
            .await
    }
    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        self.alive(self.inner.signal(signal, answers)).await
    }
    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        self.alive(self.inner.cancel(request)).await
    }
    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        self.claims.fetch_add(1, Ordering::SeqCst);
        let mut claimed = self.alive(self.inner.claim(request)).await?;
        if self.failing_loads_left() > 0 {
            // What a claim brings along need not be loaded.
            for claim in &mut claimed.claims {
                claim.loaded = None;
            }
        }
        Ok(claimed)
    }
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        if self.dead.is_cancelled() {
            std::future::pending::<()>().await;
        }
        let renewed = self.inner.renew(leases, lease).await?;
        if renewed.iter().any(|renewed| !renewed.held) {
            self.not_held.notify_one();
        }
        Ok(renewed)
    }
    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        let failing = self
            .failing_loads
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        let fault = failing.is_ok().then_some(Fault::Before);
        through(fault, self.inner.load(lease)).await
    }
    async fn fork(
        &self,
        thread: &ThreadId,
        checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        self.alive(self.inner.fork(thread, checkpoint)).await
    }
    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        self.alive(self.inner.set_head(thread, branch)).await
    }
    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        let fault = (self.append_fails)(self.appends.fetch_add(1, Ordering::SeqCst) + 1);
        self.alive(through(fault, self.inner.append(id, event)))
            .await
    }
}
