//! What waits to be written, in the form in which the database takes it. Values become text here, in their caller's task, so
//! that a value that cannot be stored is its caller's trouble alone.

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use super::values::{Jsonb, Time, text};
use crate::{
    checkpoint::{
        Claim, Commit, Created, Lease, LeaseRecord, LeaseTerms, Loaded, NewEvent, NewSignal,
        NewThread, Receipt, SignalOutcome, StorageError, Then, ThreadRecord, ThreadStatus, Write,
    },
    ids::ThreadId,
    stored::{digest, int, key_digest, micros, micros_after, source_text, status_code, time},
};

/// Something to be written, whole or not at all.
pub(super) enum Job {
    Commit(Box<CommitJob>),
    Start(StartRow),
    Signal(SignalJob),
}

/// What became of it.
#[derive(Debug)]
pub(super) enum Answer {
    Committed(Receipt),
    /// With the lease, if it was created with one.
    Created(Created, Option<Leased>),
    Signalled(SignalOutcome),
}

/// The lease with which a thread was created.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leased {
    pub token: u64,
    /// When, by the database's clock.
    pub now: Timestamp,
}

impl Leased {
    /// The claim of a thread that has just been created.
    pub fn claim(self, new: NewThread, terms: LeaseTerms<'_>) -> Claim {
        let Self { token, now } = self;
        let lease = Lease {
            thread: new.id.clone(),
            token,
        };
        let held = SignedDuration::try_from(terms.lease).unwrap_or(SignedDuration::MAX);
        let thread = ThreadRecord {
            status: ThreadStatus::Running,
            lease: Some(LeaseRecord {
                owner: terms.owner.to_owned(),
                token,
                expires_at: now.checked_add(held).unwrap_or(Timestamp::MAX),
            }),
            ..new.created(now)
        };
        Claim {
            lease,
            takeovers: 0,
            loaded: Some(Box::new(Loaded::fresh(&thread, 0, now))),
            unreadable: None,
            thread,
        }
    }
}

impl Job {
    /// About how many bytes it sends.
    pub fn bytes(&self) -> usize {
        match self {
            Self::Commit(commit) => commit.bytes(),
            Self::Start(start) => start.bytes(),
            Self::Signal(signal) => signal.row.bytes(),
        }
    }

    /// For errors.
    pub fn operation(&self) -> String {
        match self {
            Self::Commit(commit) => format!("committing a step of thread {}", commit.lease.thread),
            Self::Start(start) => format!("creating thread {}", start.thread),
            Self::Signal(signal) => format!("signalling thread {}", signal.row.receiver),
        }
    }

    /// What no two jobs in one transaction may have in common: a lease that is used twice at once, a thread that is created
    /// twice, or a signal that is sent twice. Which of them comes first is seen between transactions only.
    pub fn identity(&self) -> (u8, &str, Uuid) {
        match self {
            Self::Commit(commit) => (0, &commit.id, Uuid::nil()),
            Self::Start(start) => (1, &start.id, Uuid::nil()),
            Self::Signal(signal) => (2, &signal.row.thread, signal.row.digest),
        }
    }

    /// Commits come in the order of their threads; all else as it came.
    pub fn place(&self) -> &str {
        match self {
            Self::Commit(commit) => &commit.id,
            Self::Start(_) | Self::Signal(_) => "",
        }
    }
}

impl Answer {
    /// An answer of the wrong kind.
    pub fn unexpected(self) -> StorageError {
        StorageError::Corrupt {
            what: format!("the database answered something else than was asked: {self:?}"),
        }
    }
}

/// A commit.
pub(super) struct CommitJob {
    pub lease: Lease,
    pub id: String,
    pub token: i64,
    pub head: Option<Head>,
    /// Nothing: the commit is no more than a checkpoint.
    pub more: Option<More>,
}

/// A new checkpoint.
pub(super) struct Head {
    pub parent: u64,
    pub branch: u32,
    pub step: u64,
    pub source: Option<String>,
    pub plan: Jsonb,
    pub appends: Option<Jsonb>,
    pub changes: Option<Jsonb>,
    pub snapshot: Option<Jsonb>,
}

/// What only some commits have.
pub(super) struct More {
    pub base: i32,
    pub clear: bool,
    /// Of pending writes that are to be forgotten.
    pub forget: Vec<Uuid>,
    pub writes: Vec<WriteRow>,
    pub consumed: Vec<i64>,
    pub events: Vec<EventRow>,
    pub children: Vec<StartRow>,
    pub signals: Vec<SignalRow>,
    /// Threads and reasons.
    pub cancels: Vec<(String, String)>,
    pub waits: Option<Jsonb>,
    /// What becomes of the lease: 0 it is kept, 1 yield, 2 wait, 3 end.
    pub then: i16,
    pub mail_seen: i64,
    pub wake_at: Option<Time>,
    pub status: i16,
    pub error: Option<String>,
    pub output: Option<Jsonb>,
}

pub(super) struct WriteRow {
    pub digest: Uuid,
    pub task: String,
    pub kind: i16,
    pub name: String,
    pub round: i64,
    pub value: Jsonb,
}

pub(super) struct EventRow {
    pub stream: String,
    pub name: String,
    pub payload: Jsonb,
    pub thread: Option<String>,
}

/// A new thread.
pub(super) struct StartRow {
    pub thread: ThreadId,
    pub id: String,
    pub graph: String,
    pub parent: Option<String>,
    pub parent_name: Option<String>,
    pub priority: i16,
    pub input: Jsonb,
    /// The lease with which it is to be created: whose, and for how many microseconds.
    pub terms: Option<(String, i64)>,
}

pub(super) struct SignalRow {
    pub receiver: ThreadId,
    pub thread: String,
    pub digest: Uuid,
    pub kind: String,
    pub key: String,
    pub payload: Jsonb,
    pub revives: bool,
}

/// A signal from outside.
pub(super) struct SignalJob {
    pub row: SignalRow,
    /// Only if a wait with this id is open.
    pub wait: Option<String>,
}

impl SignalJob {
    pub fn of(signal: &NewSignal, answers: Option<&str>) -> Result<Self, StorageError> {
        Ok(Self {
            row: SignalRow::of(signal)?,
            wait: answers.map(owned),
        })
    }
}

fn owned(given: &str) -> String {
    text(given).into_owned()
}

/// Numbers of checkpoints, branches and steps. None is so large that it would not fit; one that were is on no tip.
pub(super) fn narrow(number: u64) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

fn each<'a, T, R>(
    list: &'a [T],
    row: impl Fn(&'a T) -> Result<R, StorageError>,
) -> Result<Vec<R>, StorageError> {
    list.iter().map(row).collect()
}

impl CommitJob {
    pub fn of(lease: &Lease, commit: &Commit) -> Result<Self, StorageError> {
        let head = match &commit.checkpoint {
            Some(new) => Some(Head {
                parent: new.parent,
                branch: new.branch,
                step: new.step,
                source: source_text(&new.source).map(|source| owned(&source)),
                plan: Jsonb::of(&new.plan)?,
                appends: Jsonb::channels(&new.appends)?,
                changes: Jsonb::channels(&new.changes)?,
                snapshot: new.snapshot.as_ref().map(Jsonb::of).transpose()?,
            }),
            None => None,
        };
        let more = match commit.only_checkpoint() {
            Some(_) => None,
            None => Some(More::of(commit)?),
        };
        Ok(Self {
            lease: lease.clone(),
            id: owned(lease.thread.as_str()),
            token: int(lease.token),
            head,
            more,
        })
    }

    fn bytes(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |head| {
            [&head.appends, &head.changes, &head.snapshot]
                .into_iter()
                .flatten()
                .map(Jsonb::len)
                .sum::<usize>()
                + head.plan.len()
        });
        head + self.more.as_ref().map_or(0, More::bytes)
    }

    pub fn fenced(&self) -> StorageError {
        StorageError::Fenced {
            thread: self.lease.thread.clone(),
            token: self.lease.token,
        }
    }

    /// Why it was refused, when it is known whether its lease is good.
    pub fn refusal(&self, holds: bool) -> StorageError {
        match &self.head {
            Some(head) if holds => StorageError::NotTheTip {
                thread: self.lease.thread.clone(),
                branch: head.branch,
                parent: head.parent,
            },
            _ => self.fenced(),
        }
    }
}

impl More {
    fn of(commit: &Commit) -> Result<Self, StorageError> {
        // By key, the last one of a key only: the database writes each row once.
        let mut writes: Vec<WriteRow> = Vec::with_capacity(commit.writes.len());
        for write in &commit.writes {
            let row = WriteRow::of(write)?;
            match writes.iter_mut().find(|other| other.digest == row.digest) {
                Some(other) => *other = row,
                None => writes.push(row),
            }
        }
        let mut consumed: Vec<i64> = commit.consumed.iter().copied().map(int).collect();
        consumed.sort_unstable();
        consumed.dedup();
        let mut more = Self {
            base: narrow(commit.base),
            clear: commit.clear_writes,
            forget: if commit.clear_writes {
                // They go with the others; the database deletes each row once.
                Vec::new()
            } else {
                commit.forget.iter().map(key_digest).collect()
            },
            writes,
            consumed,
            events: each(&commit.events, EventRow::of)?,
            children: each(&commit.children, StartRow::of)?,
            signals: each(&commit.signals, SignalRow::of)?,
            cancels: commit
                .cancels
                .iter()
                .map(|cancel| (owned(cancel.thread.as_str()), owned(&cancel.reason)))
                .collect(),
            waits: commit.waits.as_ref().map(Jsonb::of).transpose()?,
            then: 0,
            mail_seen: 0,
            wake_at: None,
            status: 0,
            error: None,
            output: None,
        };
        match &commit.then {
            Then::Keep => {}
            Then::Yield => more.then = 1,
            Then::Wait { mail_seen, wake_at } => {
                more.then = 2;
                more.mail_seen = int(*mail_seen);
                // Rounded up: it must not be woken too early.
                more.wake_at = wake_at.map(|at| Time(time(micros_after(at))));
            }
            Then::End {
                status,
                error,
                output,
            } => {
                more.then = 3;
                more.status = status_code(*status);
                more.error = error.as_deref().map(owned);
                more.output = output.as_ref().map(Jsonb::of).transpose()?;
            }
        }
        Ok(more)
    }

    /// Whether the commit has, beside its checkpoint, no more than signals that it consumes, events, and perhaps the thread's
    /// end: what most supersteps have.
    pub fn is_light(&self) -> bool {
        let Self {
            base: _,
            clear: false,
            forget,
            writes,
            consumed: _,
            events: _,
            children,
            signals,
            cancels,
            waits,
            then: 0 | 3,
            mail_seen: _,
            wake_at: _,
            status: _,
            error: _,
            output: _,
        } = self
        else {
            return false;
        };
        forget.is_empty()
            && writes.is_empty()
            && children.is_empty()
            && signals.is_empty()
            && cancels.is_empty()
            && waits.as_ref().is_none_or(|waits| waits.as_text() == "[]")
    }

    fn bytes(&self) -> usize {
        let writes = self.writes.iter().map(|row| row.value.len() + 64);
        let events = self.events.iter().map(|row| row.payload.len() + 64);
        let rest = [&self.waits, &self.output].into_iter().flatten();
        writes.sum::<usize>()
            + events.sum::<usize>()
            + self.children.iter().map(StartRow::bytes).sum::<usize>()
            + self.signals.iter().map(SignalRow::bytes).sum::<usize>()
            + rest.map(Jsonb::len).sum::<usize>()
    }
}

impl WriteRow {
    fn of(write: &Write) -> Result<Self, StorageError> {
        Ok(Self {
            digest: key_digest(&write.key()),
            task: owned(&write.task),
            kind: write.kind.code().into(),
            name: owned(&write.name),
            round: write.round.into(),
            value: Jsonb::of(&write.value)?,
        })
    }
}

impl EventRow {
    fn of(event: &NewEvent) -> Result<Self, StorageError> {
        Ok(Self {
            stream: owned(&event.stream),
            name: owned(&event.name),
            payload: Jsonb::of(&event.payload)?,
            thread: event.thread.as_ref().map(|thread| owned(thread.as_str())),
        })
    }
}

impl StartRow {
    pub fn leased(new: &NewThread, terms: LeaseTerms<'_>) -> Result<Self, StorageError> {
        let mut row = Self::of(new)?;
        row.terms = Some((owned(terms.owner), micros(terms.lease)));
        Ok(row)
    }

    pub fn of(new: &NewThread) -> Result<Self, StorageError> {
        Ok(Self {
            thread: new.id.clone(),
            id: owned(new.id.as_str()),
            graph: owned(&new.graph),
            parent: new.parent.as_ref().map(|p| owned(p.thread.as_str())),
            parent_name: new.parent.as_ref().map(|p| owned(&p.name)),
            priority: new.priority.rank().into(),
            input: Jsonb::of(&new.input)?,
            terms: None,
        })
    }

    pub fn owner(&self) -> Option<&str> {
        self.terms.as_ref().map(|(owner, _)| owner.as_str())
    }

    pub fn lease(&self) -> Option<i64> {
        self.terms.as_ref().map(|(_, lease)| *lease)
    }

    fn bytes(&self) -> usize {
        self.input.len() + 64
    }
}

impl SignalRow {
    fn of(signal: &NewSignal) -> Result<Self, StorageError> {
        Ok(Self {
            receiver: signal.thread.clone(),
            thread: owned(signal.thread.as_str()),
            digest: digest(&signal.key),
            kind: owned(&signal.kind),
            key: owned(&signal.key),
            payload: Jsonb::of(&signal.payload)?,
            revives: signal.revives,
        })
    }

    fn bytes(&self) -> usize {
        self.payload.len() + self.key.len() + 64
    }
}
