//! What a task remembers over its re-runs, and what it has said.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    checkpoint::{
        CancelRequest, Commit, NewEvent, NewSignal, NewThread, WaitKind, WaitRecord, Write,
        WriteKey, WriteKind,
    },
    nest::{Kept, Nest},
};

/// The space of the timer of a task inside a subgraph that is to be tried again: nothing is remembered of its end.
pub(crate) const RETRY: &str = "~retry";

/// The space under which it is remembered that a question has expired; no name of a wait contains a line break.
pub(crate) fn expired(space: &str) -> String {
    format!("{space}\nexpired")
}

/// Something that a task says: it takes effect with the commit that makes the task's work durable.
#[derive(Clone, Debug)]
pub(crate) enum Emission {
    Event(NewEvent),
    Spawn(NewThread),
    Signal(NewSignal),
    Cancel(CancelRequest),
}

impl Emission {
    pub fn put(self, commit: &mut Commit) {
        match self {
            Self::Event(event) => commit.events.push(event),
            Self::Spawn(thread) => commit.children.push(thread),
            Self::Signal(signal) => commit.signals.push(signal),
            Self::Cancel(request) => commit.cancels.push(request),
        }
    }
}

/// Stored under [`WriteKind::Suspended`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Suspension {
    /// How much the task has said already: a re-run's first so many emissions are skipped.
    #[serde(default)]
    pub said: usize,
    /// What it waits for; empty if it is not suspended.
    #[serde(default)]
    pub waits: Vec<Waiting>,
}

/// An open wait of a task, and the key under which its memory keeps what came.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Waiting {
    #[serde(flatten)]
    pub record: WaitRecord,
    /// Interrupts and waits of one name do not meet.
    pub space: String,
    pub round: u32,
}

/// Stored under [`WriteKind::Attempts`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Attempts {
    /// How many attempts have failed.
    pub made: u32,
    /// How many of them do not count for the policy any more: the thread had failed and was retried by hand.
    #[serde(default)]
    pub base: u32,
    /// The last failure.
    #[serde(default)]
    pub error: String,
    /// When the next attempt is due, if that is a timer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<jiff::Timestamp>,
    /// The failure for which the error handler has taken over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub handed_over: Option<String>,
}

type Key = (WriteKind, String, u32);

/// The memory of one task.
#[derive(Debug, Default)]
pub(crate) struct Memo {
    remembered: HashMap<Key, Value>,
    /// How often each name was used in this run of the node.
    rounds: HashMap<(&'static str, String), u32>,
    /// What is remembered but not in the database yet.
    fresh: Vec<Write>,
    /// What is in the database (perhaps) and not needed there any more.
    stale: Vec<WriteKey>,
    /// Signals taken, whose consumption is not in the database yet.
    consumed: Vec<u64>,
    /// What this run of the node has said, in call order.
    emissions: Vec<Emission>,
    /// How many emissions have landed.
    pub said: usize,
    /// What the task is suspended on.
    pub waits: Vec<Waiting>,
    /// The deadlines of the questions that an earlier run of the node has asked: task, space and round to time.
    deadlines: HashMap<(String, String, u32), jiff::Timestamp>,
    /// Whether it has said something at once, beside its step.
    pub spoke: bool,
    /// What supersteps of subgraphs in the task have said: their work is done, so it lands with the task's memory.
    carried: Vec<Emission>,
    /// What runs inside the task remembers, if anything does.
    nest: Option<Arc<Mutex<Nest>>>,
    /// What accumulating subgraphs have added in this run of the node.
    pub kept: Vec<Kept>,
    /// How many subgraphs run in it now.
    pub inside: usize,
}

impl Memo {
    /// Whether the task has done nothing so far that its result does not hold.
    pub fn is_pure(&self) -> bool {
        self.remembered.is_empty()
            && self.emissions.is_empty()
            && self.said == 0
            && self.waits.is_empty()
            && !self.spoke
            && self.nest.as_ref().is_none_or(|nest| !nest.lock().recalled)
    }

    /// Before the node runs (again): rounds are counted from 0, and what it says replaces what it said without landing.
    pub fn rewind(&mut self) {
        self.rounds.clear();
        self.emissions.clear();
        for Waiting {
            record,
            space,
            round,
        } in self.waits.drain(..)
        {
            if let (WaitKind::Interrupt, Some(until)) = (record.kind, record.until) {
                self.deadlines.insert((record.task, space, round), until);
            }
        }
        self.kept.clear();
        self.inside = 0;
    }

    /// The deadline with which a task asked this question first, if it has.
    pub fn deadline(&self, task: &str, space: &str, round: u32) -> Option<jiff::Timestamp> {
        let key = (task.to_owned(), space.to_owned(), round);
        self.deadlines.get(&key).copied()
    }

    /// The memory of what runs inside the task.
    pub fn nest(&mut self) -> Arc<Mutex<Nest>> {
        self.nest.get_or_insert_default().clone()
    }

    /// Takes up what a subgraph in the task leaves to be kept with the task. Its nest knows of it already.
    pub fn absorb(&mut self, mut left: Commit) {
        for write in left.writes.drain(..) {
            self.put_fresh(write);
        }
        self.stale.append(&mut left.forget);
        self.consumed.append(&mut left.consumed);
        self.carried
            .extend(left.events.into_iter().map(Emission::Event));
        self.carried
            .extend(left.children.into_iter().map(Emission::Spawn));
        self.carried
            .extend(left.signals.into_iter().map(Emission::Signal));
        self.carried
            .extend(left.cancels.into_iter().map(Emission::Cancel));
    }

    /// A key stands once in a commit.
    fn put_fresh(&mut self, write: Write) {
        match self.fresh.iter_mut().find(|fresh| fresh.has_key(&write)) {
            Some(present) => *present = write,
            None => self.fresh.push(write),
        }
    }

    /// What the task (or something inside it) has waited for has come.
    pub fn arrived(&mut self, task: &str, wait: &Waiting, value: Value, consumed: Option<u64>) {
        self.keep(task, wait, &wait.space, value, consumed);
    }

    /// The time of a question of the task (or of something inside it) is over.
    pub fn expired(&mut self, task: &str, wait: &Waiting, consumed: Option<u64>) {
        self.keep(task, wait, &expired(&wait.space), Value::Null, consumed);
    }

    fn keep(
        &mut self,
        task: &str,
        wait: &Waiting,
        space: &str,
        value: Value,
        consumed: Option<u64>,
    ) {
        if wait.record.task == task {
            self.note(task, WriteKind::Wait, space, wait.round, value, consumed);
        } else if wait.space != RETRY {
            let write = Write {
                task: wait.record.task.clone(),
                kind: WriteKind::Wait,
                name: space.to_owned(),
                round: wait.round,
                value,
                kept: None,
            };
            self.nest().lock().put(write.clone());
            self.fresh.push(write);
            self.consumed.extend(consumed);
        }
    }

    pub fn restore(&mut self, write: &Write) {
        self.remembered.insert(
            (write.kind, write.name.clone(), write.round),
            write.value.clone(),
        );
    }

    /// The round of this use of a name: 0 for the first.
    pub fn round(&mut self, space: &'static str, name: &str) -> u32 {
        let round = self.rounds.entry((space, name.to_owned())).or_default();
        *round += 1;
        *round - 1
    }

    /// The round that the next use of a name will have.
    pub fn next_round(&self, space: &'static str, name: &str) -> u32 {
        self.rounds
            .get(&(space, name.to_owned()))
            .copied()
            .unwrap_or_default()
    }

    pub fn get(&self, kind: WriteKind, name: &str, round: u32) -> Option<&Value> {
        self.remembered.get(&(kind, name.to_owned(), round))
    }

    /// Remembers what is in the database already.
    pub fn learn(&mut self, kind: WriteKind, name: &str, round: u32, value: Value) {
        self.remembered
            .insert((kind, name.to_owned(), round), value);
    }

    /// Remembers what goes into the database with the next commit that keeps the task's memory.
    pub fn note(
        &mut self,
        task: &str,
        kind: WriteKind,
        name: &str,
        round: u32,
        value: Value,
        consumed: Option<u64>,
    ) {
        self.fresh.push(Write {
            task: task.to_owned(),
            kind,
            name: name.to_owned(),
            round,
            value: value.clone(),
            kept: None,
        });
        self.consumed.extend(consumed);
        self.learn(kind, name, round, value);
    }

    pub fn say(&mut self, emission: Emission) {
        self.emissions.push(emission);
    }

    /// Puts into a commit what has been learned since the last one.
    pub fn flush_memory(&mut self, commit: &mut Commit) {
        let stale = &self.stale;
        self.fresh
            .retain(|write| !stale.iter().any(|key| write.is(key)));
        commit.writes.append(&mut self.fresh);
        commit.forget.append(&mut self.stale);
        self.flush_consumed(commit);
    }

    /// Puts into a commit which signals were used; the rest of the memory ends with the step.
    pub fn flush_consumed(&mut self, commit: &mut Commit) {
        self.fresh.clear();
        self.stale.clear();
        commit.consumed.append(&mut self.consumed);
        for emission in self.carried.drain(..) {
            emission.put(commit);
        }
    }

    /// Puts into a commit what has been said and has not landed.
    pub fn flush_said(&mut self, commit: &mut Commit) {
        let said = self.emissions.len();
        for emission in self.emissions.iter().skip(self.said) {
            emission.clone().put(commit);
        }
        self.said = self.said.max(said);
    }

    /// What this run of the node has said, for the task around a subgraph that records nothing.
    pub fn take_said(&mut self) -> Vec<Emission> {
        let mut said = std::mem::take(&mut self.carried);
        said.append(&mut self.emissions);
        said
    }

    /// Whether one of its waits has been answered, so that running the node again gets further. `around` is the memory of the
    /// thread's task around it, if it is in a subgraph: what came for something inside it is there.
    pub fn is_answered(&self, task: &str, around: Option<&Mutex<Nest>>) -> bool {
        self.waits.iter().any(|wait| {
            let is_there = |space: &str| {
                if wait.record.task == task {
                    return self.get(WriteKind::Wait, space, wait.round).is_some();
                }
                around.or(self.nest.as_deref()).is_some_and(|nest| {
                    let task = &wait.record.task;
                    nest.lock()
                        .get(task, WriteKind::Wait, space, wait.round)
                        .is_some()
                })
            };
            let expires = wait.record.kind == WaitKind::Interrupt && wait.record.until.is_some();
            is_there(&wait.space) || (expires && is_there(&expired(&wait.space)))
        })
    }

    /// What is stored about it beside what it remembers.
    pub fn suspension(&self) -> Suspension {
        Suspension {
            said: self.said,
            waits: self.waits.clone(),
        }
    }
}
