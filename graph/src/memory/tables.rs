//! What is kept in memory, and how it changes. Everything here happens under one lock.

use std::collections::{BTreeMap, HashMap, HashSet};

use jiff::Timestamp;
use serde_json::Value;

use crate::{
    checkpoint::{
        CancelOutcome, CancelRequest, Entry, KeptState, KeptStep, KeptWrite, Lease, NewCheckpoint,
        NewEvent, NewSignal, NewThread, SignalRecord, StateRow, StateRows, StorageError,
        ThreadRecord, ThreadStatus, Write, WriteKey,
    },
    ids::{Cursor, ThreadId},
};

#[derive(Clone, Default)]
pub(super) struct Tables {
    pub threads: BTreeMap<ThreadId, Thread>,
    pub journal: Vec<Entry>,
    pub streams: HashMap<String, u64>,
    /// Ids of entries that are unique.
    pub said: HashSet<String>,
    /// The newest fencing token. One count for all threads: a deleted thread's tokens do not come back.
    pub tokens: u64,
}

#[derive(Clone)]
pub(super) struct Checkpoint {
    pub new: NewCheckpoint,
    pub at: Timestamp,
    /// What was before it has been pruned: the way to it begins here.
    pub base: bool,
}

impl Checkpoint {
    pub fn new(new: NewCheckpoint, at: Timestamp) -> Self {
        Self {
            new,
            at,
            base: false,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Branch {
    pub tip: u64,
}

#[derive(Clone)]
pub(super) struct Mail {
    pub record: SignalRecord,
    pub revives: bool,
}

/// The value of a pending write.
type Noted = (Value, Option<KeptWrite>);

#[derive(Clone)]
pub(super) struct Thread {
    pub record: ThreadRecord,
    pub branches: BTreeMap<u32, Branch>,
    /// How many branches there ever were.
    pub branches_made: u32,
    pub checkpoints: BTreeMap<u64, Checkpoint>,
    /// The newest checkpoint of all branches.
    pub newest: u64,
    pub writes: HashMap<u64, BTreeMap<WriteKey, Noted>>,
    pub mailbox: BTreeMap<u64, Mail>,
    /// With the time of their arrival.
    pub keys: BTreeMap<String, Timestamp>,
    pub mail: u64,
    pub takeovers: u32,
    /// From when on it can be claimed: its lease's expiry while it has one.
    pub due_at: Option<Timestamp>,
    /// The state at this checkpoint, while no run has it.
    pub state: Option<(u64, KeptState)>,
    /// Whether what it returned is made from that state when somebody asks.
    pub returns_state: bool,
}

/// A thread's record, and the state from which its output is made: which takes its time, so it is done without the lock.
pub(super) struct Seen {
    record: ThreadRecord,
    returns: Option<KeptState>,
}

impl Seen {
    pub fn record(mut self) -> ThreadRecord {
        if let Some(state) = self.returns {
            self.record.output = state.output();
        }
        self.record
    }
}

/// What is to run after a checkpoint.
pub(super) fn plan(new: &NewCheckpoint) -> Value {
    new.kept
        .as_ref()
        .map_or_else(|| new.plan.clone(), KeptStep::plan)
}

impl Thread {
    pub fn seen(&self) -> Seen {
        let state = self.state.as_ref().filter(|_| self.returns_state);
        Seen {
            record: self.record.clone(),
            returns: state.map(|(_, state)| state.clone()),
        }
    }

    /// Gives away the state at the head, so that who gets it is the only one who has it.
    pub fn hand_over(&mut self) -> Option<KeptState> {
        let (checkpoint, state) = self.state.take()?;
        if std::mem::take(&mut self.returns_state) {
            self.record.output = state.output();
        }
        (checkpoint == self.record.checkpoint).then_some(state)
    }

    /// What the step under way has done.
    pub fn pending_writes(&self) -> Vec<Write> {
        let writes = self.writes.get(&self.record.checkpoint);
        writes
            .into_iter()
            .flatten()
            .map(|(key, (value, kept))| Write {
                task: key.task.clone(),
                kind: key.kind,
                name: key.name.clone(),
                round: key.round,
                value: value.clone(),
                kept: kept.clone(),
            })
            .collect()
    }

    /// Gives the lease back.
    pub fn release(&mut self, status: ThreadStatus, due_at: Option<Timestamp>) {
        self.record.status = status;
        self.record.lease = None;
        self.returns_state = false;
        self.due_at = due_at;
        self.takeovers = 0;
    }

    pub fn ready(&mut self, now: Timestamp) {
        self.release(ThreadStatus::Ready, Some(now));
        self.record.error = None;
        self.record.output = None;
        self.record.waits = Vec::new();
        self.record.wake_at = None;
        self.record.cancel = None;
        self.record.updated_at = now;
    }

    /// Makes it due, unless a run holds it or it has ended.
    fn wake(&mut self, now: Timestamp, revives: bool) {
        if self.record.lease.is_none() && (revives || !self.record.status.is_ended()) {
            self.due_at = Some(self.due_at.map_or(now, |due| due.min(now)));
            if self.record.status == ThreadStatus::Waiting {
                self.record.status = ThreadStatus::Ready;
            }
        }
    }

    /// Adds a checkpoint to the head branch.
    pub fn grow(&mut self, new: NewCheckpoint, now: Timestamp) -> u64 {
        self.newest += 1;
        self.record.checkpoint = self.newest;
        self.record.step = new.step;
        self.branches
            .insert(new.branch, Branch { tip: self.newest });
        self.checkpoints
            .insert(self.newest, Checkpoint::new(new, now));
        self.newest
    }

    pub fn require(&self, checkpoint: u64) -> Result<(), StorageError> {
        if checkpoint == 0 || self.checkpoints.contains_key(&checkpoint) {
            Ok(())
        } else {
            Err(StorageError::UnknownCheckpoint {
                thread: self.record.id.clone(),
                checkpoint,
            })
        }
    }

    /// The checkpoints that lead to one, oldest first, with it.
    pub fn way(&self, checkpoint: u64) -> Vec<u64> {
        let mut way = Vec::new();
        let mut number = checkpoint;
        while let Some(found) = self.checkpoints.get(&number) {
            way.push(number);
            if found.base {
                break;
            }
            number = found.new.parent;
        }
        way.reverse();
        way
    }

    pub fn state_rows(&self, checkpoint: Option<u64>) -> Result<StateRows, StorageError> {
        let number = checkpoint.unwrap_or(self.record.checkpoint);
        self.require(number)?;
        let way = self.way(number);
        let snapshot = way
            .iter()
            .rposition(|number| self.checkpoints[number].new.snapshot.is_some());
        let mut rows = Vec::with_capacity(way.len());
        for (index, number) in way.iter().enumerate() {
            let new = &self.checkpoints[number].new;
            let old = snapshot.is_some_and(|snapshot| index < snapshot);
            let row = StateRow {
                checkpoint: *number,
                appends: new.appends.clone(),
                changes: new.changes.clone(),
                snapshot: new.snapshot.clone(),
                kept: new.kept.clone(),
            };
            if !old {
                rows.push(row);
                continue;
            }
            // Of what was before the snapshot, only what was appended counts.
            let appends = match &row.kept {
                Some(kept) => kept.changes()?.0,
                None => row.appends,
            };
            if !appends.is_empty() {
                rows.push(StateRow {
                    appends,
                    changes: serde_json::Map::new(),
                    snapshot: None,
                    kept: None,
                    ..row
                });
            }
        }
        let state = self.state.as_ref().filter(|(at, _)| *at == number);
        Ok(StateRows {
            since_snapshot: match (&state, snapshot) {
                (Some(_), _) => Some(0),
                (None, snapshot) => snapshot.map(|index| (way.len() - 1 - index) as u64),
            },
            rows,
            state: state.map(|(_, state)| state.clone()),
            ..self.state_at(number)
        })
    }

    /// What is known of a checkpoint beside the rows that lead to it.
    pub fn state_at(&self, checkpoint: u64) -> StateRows {
        let tip = self.checkpoints.get(&checkpoint).map(|found| &found.new);
        StateRows {
            checkpoint,
            branch: tip.map_or(0, |new| new.branch),
            step: tip.map_or(0, |new| new.step),
            plan: tip.map(plan),
            since_snapshot: None,
            rows: Vec::new(),
            state: None,
        }
    }
}

impl Tables {
    pub fn known(&self, thread: &ThreadId) -> Result<&Thread, StorageError> {
        self.threads
            .get(thread)
            .ok_or_else(|| StorageError::UnknownThread(thread.clone()))
    }

    pub fn known_mut(&mut self, thread: &ThreadId) -> Result<&mut Thread, StorageError> {
        self.threads
            .get_mut(thread)
            .ok_or_else(|| StorageError::UnknownThread(thread.clone()))
    }

    /// Lets every lease of an owner expire now.
    pub fn break_leases(&mut self, owner: &str, now: Timestamp) -> u64 {
        let mut broken = 0;
        for thread in self.threads.values_mut() {
            if let Some(lease) = &mut thread.record.lease
                && lease.owner == owner
                && lease.expires_at > now
            {
                lease.expires_at = now;
                thread.due_at = Some(now);
                broken += 1;
            }
        }
        broken
    }

    /// The thread, if the lease is its newest and was not given back.
    pub fn held(&mut self, lease: &Lease) -> Result<&mut Thread, StorageError> {
        self.threads
            .get_mut(&lease.thread)
            .filter(|thread| {
                thread
                    .record
                    .lease
                    .as_ref()
                    .is_some_and(|held| held.token == lease.token)
            })
            .ok_or_else(|| StorageError::Fenced {
                thread: lease.thread.clone(),
                token: lease.token,
            })
    }

    pub fn create(&mut self, new: NewThread, now: Timestamp) -> bool {
        if self.threads.contains_key(&new.id) {
            return false;
        }
        let id = new.id.clone();
        let record = new.created(now);
        self.threads.insert(
            id,
            Thread {
                record,
                branches: BTreeMap::from([(0, Branch { tip: 0 })]),
                branches_made: 1,
                checkpoints: BTreeMap::new(),
                newest: 0,
                writes: HashMap::new(),
                mailbox: BTreeMap::new(),
                keys: BTreeMap::new(),
                mail: 0,
                takeovers: 0,
                due_at: Some(now),
                state: None,
                returns_state: false,
            },
        );
        true
    }

    /// Puts a signal into a mailbox that exists, unless its key is known.
    pub fn deliver(&mut self, signal: NewSignal, now: Timestamp) {
        let Some(thread) = self.threads.get_mut(&signal.thread) else {
            return;
        };
        if thread.keys.contains_key(&signal.key) {
            return;
        }
        thread.keys.insert(signal.key.clone(), now);
        thread.mail += 1;
        let number = thread.mail;
        thread.mailbox.insert(
            number,
            Mail {
                record: SignalRecord {
                    number,
                    kind: signal.kind,
                    key: signal.key,
                    payload: signal.payload,
                },
                revives: signal.revives,
            },
        );
        thread.record.updated_at = now;
        thread.wake(now, signal.revives);
    }

    pub fn cancel(&mut self, request: CancelRequest, now: Timestamp) -> CancelOutcome {
        let Some(thread) = self.threads.get_mut(&request.thread) else {
            return CancelOutcome::UnknownThread;
        };
        if thread.record.status.is_ended() {
            return CancelOutcome::Ended;
        }
        if thread.record.cancel.is_some() {
            return CancelOutcome::AlreadyRequested;
        }
        thread.record.cancel = Some(request.reason);
        thread.record.updated_at = now;
        thread.wake(now, false);
        CancelOutcome::Requested
    }

    pub fn append(&mut self, event: NewEvent, now: Timestamp) {
        let number = self.streams.entry(event.stream.clone()).or_default();
        *number += 1;
        self.journal.push(Entry {
            cursor: Cursor(self.journal.len() as u64 + 1),
            stream: event.stream,
            number: *number,
            name: event.name,
            payload: event.payload,
            thread: event.thread,
            at: now,
        });
    }
}
