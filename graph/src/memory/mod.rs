//! A checkpointer in memory: for tests, and for graphs that need no tomorrow. Clones share the same threads.
//!
//! Not durable, and not for several processes; in all else it keeps the promises of [`Checkpointer`]. Updates and states are kept
//! as the program has them, and written down as JSON only when somebody asks for that: a value that shares something mutable
//! (a lock, a cell) would change in the past too, and is no value for a channel.

mod bell;
mod cache;
mod commit;
mod documents;
mod retention;
mod tables;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;

use crate::{
    cache::Cache,
    checkpoint::{
        AGING_S, Appended, Bell, CancelOutcome, CancelRequest, CheckpointRecord, Checkpointer,
        Claim, ClaimRequest, Claimed, Commit, Created, Entry, HistoryFilter, JournalFilter, Lease,
        LeaseRecord, Loaded, MAILBOX_LIMIT, NewCheckpoint, NewEvent, NewSignal, NewThread, Receipt,
        Renewed, Reopened, Retention, SignalOutcome, SignalRecord, StateRows, StorageError,
        ThreadFilter, ThreadRecord, ThreadStatus, Write,
    },
    documents::DocumentStore,
    ids::{Cursor, ThreadId},
};
pub use cache::MemoryCache;
pub use documents::MemoryDocuments;
use tables::{Branch, Checkpoint, Seen, Tables, Thread, plan};

/// Threads in memory. Clones share them.
#[derive(Clone, Default)]
pub struct MemoryCheckpointer {
    tables: Arc<Mutex<Tables>>,
    cache: MemoryCache,
    documents: MemoryDocuments,
    bell: bell::MemoryBell,
    /// How far its clock is ahead, in microseconds.
    ahead: Arc<AtomicI64>,
}

impl MemoryCheckpointer {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Another one, in which there is at this moment all that is in this one (but what is cached), and which goes its own way
    /// from then on: for whoever tries out several futures. A clone shares its threads with the original instead.
    #[must_use]
    pub fn duplicate(&self) -> Self {
        Self {
            tables: Arc::new(Mutex::new(self.tables.lock().clone())),
            documents: self.documents.duplicate(),
            ahead: Arc::new(AtomicI64::new(self.ahead.load(Ordering::SeqCst))),
            ..Self::default()
        }
    }

    /// Moves its clock forward, by which timers, deadlines and leases of threads end: for whoever does not want to wait for them.
    /// How old checkpoints and documents are is not changed by that.
    pub fn advance(&self, by: Duration) {
        let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
        let _ = self
            .ahead
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |ahead| {
                Some(ahead.saturating_add(by))
            });
    }

    fn now(&self) -> Timestamp {
        let now = Timestamp::now();
        let ahead = SignedDuration::from_micros(self.ahead.load(Ordering::SeqCst));
        now.checked_add(ahead).unwrap_or(Timestamp::MAX)
    }
}

impl std::fmt::Debug for MemoryCheckpointer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MemoryCheckpointer")
            .field("threads", &self.tables.lock().threads.len())
            .finish_non_exhaustive()
    }
}

fn after(now: Timestamp, duration: Duration) -> Timestamp {
    SignedDuration::try_from(duration)
        .ok()
        .and_then(|duration| now.checked_add(duration).ok())
        .unwrap_or(Timestamp::MAX)
}

#[async_trait]
impl Checkpointer for MemoryCheckpointer {
    fn name(&self) -> &'static str {
        "memory"
    }

    fn cache(&self) -> Option<Arc<dyn Cache>> {
        Some(Arc::new(self.cache.clone()))
    }

    fn documents(&self) -> Option<Arc<dyn DocumentStore>> {
        Some(Arc::new(self.documents.clone()))
    }

    fn keeps_values(&self) -> bool {
        true
    }

    async fn migrate(&self) -> Result<(), StorageError> {
        Ok(())
    }

    fn bell(&self) -> Option<Arc<dyn Bell>> {
        Some(Arc::new(self.bell.clone()))
    }

    async fn create_thread(&self, thread: NewThread) -> Result<Created, StorageError> {
        let mut tables = self.tables.lock();
        Ok(if tables.create(thread, self.now()) {
            Created::New
        } else {
            Created::Existing
        })
    }

    async fn signal(
        &self,
        signal: NewSignal,
        answers: Option<&str>,
    ) -> Result<SignalOutcome, StorageError> {
        let mut tables = self.tables.lock();
        let Some(thread) = tables.threads.get(&signal.thread) else {
            return Ok(SignalOutcome::UnknownThread);
        };
        if thread.keys.contains_key(&signal.key) {
            return Ok(SignalOutcome::Duplicate);
        }
        let now = self.now();
        if let Some(id) = answers {
            match thread.record.waits.iter().find(|wait| wait.id == id) {
                None => return Ok(SignalOutcome::NoSuchWait),
                Some(wait) if wait.until.is_some_and(|until| until <= now) => {
                    return Ok(SignalOutcome::Expired);
                }
                Some(_) => {}
            }
        }
        if thread.mailbox.len() as u64 >= MAILBOX_LIMIT {
            return Ok(SignalOutcome::MailboxFull);
        }
        tables.deliver(signal, now);
        Ok(SignalOutcome::New)
    }

    async fn cancel(&self, request: CancelRequest) -> Result<CancelOutcome, StorageError> {
        Ok(self.tables.lock().cancel(request, self.now()))
    }

    async fn reopen(&self, thread: &ThreadId) -> Result<Reopened, StorageError> {
        let mut tables = self.tables.lock();
        let Some(thread) = tables.threads.get_mut(thread) else {
            return Ok(Reopened::UnknownThread);
        };
        if !matches!(
            thread.record.status,
            ThreadStatus::Failed | ThreadStatus::Cancelled
        ) || thread.record.lease.is_some()
        {
            return Ok(Reopened::NotEnded(thread.record.status));
        }
        thread.ready(self.now());
        Ok(Reopened::Yes)
    }

    async fn thread(&self, thread: &ThreadId) -> Result<Option<ThreadRecord>, StorageError> {
        let found = self.tables.lock().threads.get(thread).map(Thread::seen);
        Ok(found.map(Seen::record))
    }

    async fn threads(&self, filter: &ThreadFilter) -> Result<Vec<ThreadRecord>, StorageError> {
        let tables = self.tables.lock();
        let found: Vec<Seen> = tables
            .threads
            .values()
            .filter(|thread| {
                let record = &thread.record;
                filter
                    .graph
                    .as_ref()
                    .is_none_or(|graph| *graph == record.graph)
                    && (filter.statuses.is_empty() || filter.statuses.contains(&record.status))
                    && filter.parent.as_ref().is_none_or(|parent| {
                        record.parent.as_ref().is_some_and(|p| p.thread == *parent)
                    })
                    && filter
                        .prefix
                        .as_ref()
                        .is_none_or(|prefix| record.id.as_str().starts_with(prefix))
                    && filter.after.as_ref().is_none_or(|after| record.id > *after)
            })
            .take(filter.limit.unwrap_or(1000))
            .map(Thread::seen)
            .collect();
        drop(tables);
        Ok(found.into_iter().map(Seen::record).collect())
    }

    async fn delete_thread(&self, thread: &ThreadId) -> Result<bool, StorageError> {
        Ok(self.tables.lock().threads.remove(thread).is_some())
    }

    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        let now = self.now();
        let mut tables = self.tables.lock();
        let tables = &mut *tables;
        let mut due = Vec::new();
        let mut next: Option<Timestamp> = None;
        for thread in tables.threads.values() {
            let Some(at) = thread.due_at else { continue };
            if !request.graphs.contains(&thread.record.graph) {
                continue;
            }
            if at <= now {
                let rank = i64::from(thread.record.priority.rank());
                let turn = at.saturating_add(SignedDuration::from_secs(rank * AGING_S));
                due.push((turn.unwrap_or(at), thread.record.id.clone()));
            } else {
                next = Some(next.map_or(at, |next| next.min(at)));
            }
        }
        due.sort();
        due.truncate(request.limit);
        let mut claims = Vec::new();
        for (_, id) in due {
            let Some(thread) = tables.threads.get_mut(&id) else {
                continue;
            };
            tables.tokens += 1;
            let expires_at = after(now, request.lease);
            if thread.record.lease.is_some() {
                thread.takeovers += 1;
            }
            thread.record.lease = Some(LeaseRecord {
                owner: request.owner.to_owned(),
                token: tables.tokens,
                expires_at,
            });
            thread.due_at = Some(expires_at);
            thread.record.status = ThreadStatus::Running;
            thread.record.updated_at = now;
            let is_fresh = thread.record.checkpoint == 0
                && thread.mailbox.is_empty()
                && !thread.writes.contains_key(&0);
            claims.push(Claim {
                lease: Lease {
                    thread: id,
                    token: tables.tokens,
                },
                loaded: is_fresh.then(|| Box::new(Loaded::fresh(&thread.record, thread.mail, now))),
                thread: thread.record.clone(),
                takeovers: thread.takeovers,
                unreadable: None,
            });
        }
        Ok(Claimed {
            claims,
            next_due: next
                .map(|next| Duration::try_from(next.duration_since(now)).unwrap_or_default()),
            now,
        })
    }

    async fn renew(
        &self,
        leases: &[Lease],
        duration: Duration,
    ) -> Result<Vec<Renewed>, StorageError> {
        let now = self.now();
        let mut tables = self.tables.lock();
        Ok(leases
            .iter()
            .map(|lease| {
                let thread = tables.held(lease).ok();
                Renewed {
                    thread: lease.thread.clone(),
                    held: thread.is_some(),
                    input: thread
                        .as_ref()
                        .is_some_and(|thread| thread.mailbox.values().any(|mail| mail.revives)),
                    cancel: thread.and_then(|thread| {
                        let expires_at = after(now, duration);
                        thread.due_at = Some(expires_at);
                        if let Some(lease) = &mut thread.record.lease {
                            lease.expires_at = expires_at;
                        }
                        thread.record.cancel.clone()
                    }),
                }
            })
            .collect())
    }

    async fn break_leases(&self, owner: &str) -> Result<u64, StorageError> {
        Ok(self.tables.lock().break_leases(owner, self.now()))
    }

    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        let mut tables = self.tables.lock();
        let thread = tables.held(lease)?;
        let checkpoint = thread.record.checkpoint;
        let state = match thread.hand_over() {
            Some(state) => StateRows {
                rows: Vec::new(),
                since_snapshot: Some(0),
                state: Some(state),
                ..thread.state_at(checkpoint)
            },
            None => thread.state_rows(None)?,
        };
        Ok(Loaded {
            thread: thread.record.clone(),
            state,
            writes: thread.pending_writes(),
            mailbox: thread
                .mailbox
                .values()
                .map(|mail| mail.record.clone())
                .collect(),
            mail: thread.mail,
            now: self.now(),
        })
    }

    async fn pending_writes(&self, thread: &ThreadId) -> Result<Vec<Write>, StorageError> {
        Ok(self.tables.lock().known(thread)?.pending_writes())
    }

    async fn mailbox(
        &self,
        thread: &ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        let tables = self.tables.lock();
        let thread = tables.known(thread)?;
        let signals = thread
            .mailbox
            .range(after + 1..)
            .map(|(_, mail)| mail.record.clone())
            .collect();
        Ok((signals, thread.mail))
    }

    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        self.tables.lock().commit(lease, commit, self.now())
    }

    async fn history(
        &self,
        thread: &ThreadId,
        filter: &HistoryFilter,
    ) -> Result<Vec<CheckpointRecord>, StorageError> {
        let tables = self.tables.lock();
        let known = tables.known(thread)?;
        let way = match filter.branch {
            Some(branch) => {
                let tip =
                    known
                        .branches
                        .get(&branch)
                        .ok_or_else(|| StorageError::UnknownBranch {
                            thread: thread.clone(),
                            branch,
                        })?;
                known.way(tip.tip)
            }
            None => known.checkpoints.keys().copied().collect(),
        };
        Ok(way
            .into_iter()
            .rev()
            .filter(|number| filter.before.is_none_or(|before| *number < before))
            .take(filter.limit.unwrap_or(100))
            .filter_map(|number| {
                let Checkpoint { new, at, .. } = known.checkpoints.get(&number)?;
                Some(CheckpointRecord {
                    checkpoint: number,
                    parent: new.parent,
                    branch: new.branch,
                    step: new.step,
                    source: new.source.clone(),
                    plan: plan(new),
                    at: *at,
                })
            })
            .collect())
    }

    async fn state_rows(
        &self,
        thread: &ThreadId,
        checkpoint: Option<u64>,
    ) -> Result<StateRows, StorageError> {
        self.tables.lock().known(thread)?.state_rows(checkpoint)
    }

    async fn fork(
        &self,
        thread: &ThreadId,
        mut checkpoint: NewCheckpoint,
    ) -> Result<(u32, u64), StorageError> {
        let mut tables = self.tables.lock();
        tables.known(thread)?.require(checkpoint.parent)?;
        let known: &mut Thread = tables.known_mut(thread)?;
        let branch = known.branches_made;
        known.branches_made += 1;
        known.newest += 1;
        checkpoint.branch = branch;
        known.branches.insert(branch, Branch { tip: known.newest });
        known
            .checkpoints
            .insert(known.newest, Checkpoint::new(checkpoint, self.now()));
        Ok((branch, known.newest))
    }

    async fn set_head(&self, thread: &ThreadId, branch: u32) -> Result<(), StorageError> {
        let mut tables = self.tables.lock();
        let known = tables.known_mut(thread)?;
        let Some(Branch { tip }) = known.branches.get(&branch).copied() else {
            return Err(StorageError::UnknownBranch {
                thread: thread.clone(),
                branch,
            });
        };
        known.record.branch = branch;
        known.record.checkpoint = tip;
        known.record.step = known.checkpoints.get(&tip).map_or(0, |c| c.new.step);
        known.record.lease = None;
        known.ready(self.now());
        Ok(())
    }

    async fn branches(&self, thread: &ThreadId) -> Result<BTreeMap<u32, u64>, StorageError> {
        let tables = self.tables.lock();
        let known = tables.known(thread)?;
        Ok(known
            .branches
            .iter()
            .map(|(branch, tip)| (*branch, tip.tip))
            .collect())
    }

    async fn journal(
        &self,
        filter: &JournalFilter,
        after: Cursor,
        limit: usize,
    ) -> Result<Vec<Entry>, StorageError> {
        let tables = self.tables.lock();
        let start = usize::try_from(after.0)
            .unwrap_or(usize::MAX)
            .min(tables.journal.len());
        Ok(tables.journal[start..]
            .iter()
            .filter(|entry| filter.streams.is_empty() || filter.streams.contains(&entry.stream))
            .filter(|entry| filter.thread.is_none() || filter.thread == entry.thread)
            .take(limit)
            .cloned()
            .collect())
    }

    async fn journal_end(&self) -> Result<Cursor, StorageError> {
        Ok(Cursor(self.tables.lock().journal.len() as u64))
    }

    async fn append(&self, id: &str, event: NewEvent) -> Result<Appended, StorageError> {
        let mut tables = self.tables.lock();
        if !tables.said.insert(id.to_owned()) {
            return Ok(Appended::Duplicate);
        }
        tables.append(event, self.now());
        Ok(Appended::New)
    }

    fn retention(&self) -> &dyn Retention {
        self
    }
}
