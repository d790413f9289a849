//! A commit as the JSON document that the database function `graph_commit` takes: written straight from the commit, without
//! copying its values.

use serde::{Serialize, Serializer, ser::SerializeMap};
use serde_json::Value;
use uuid::Uuid;

use super::values::Jsonb;
use crate::{
    checkpoint::{
        CancelRequest, Channels, Commit, Lease, NewCheckpoint, NewEvent, NewSignal, NewThread,
        StorageError, Then, Write,
    },
    stored::{digest, micros_after, source_text, status_code, time, write_digest},
};

/// The document of a commit under a lease.
pub(super) fn of(lease: &Lease, commit: &Commit) -> Result<Jsonb, StorageError> {
    Jsonb::of(&Document { lease, commit })
}

struct Document<'a> {
    lease: &'a Lease,
    commit: &'a Commit,
}

impl Serialize for Document<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { lease, commit } = self;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("id", &lease.thread)?;
        map.serialize_entry("token", &lease.token)?;
        map.serialize_entry("base", &commit.base)?;
        // What else is locked, with the thread's own row, in one order.
        let mut others: Vec<&str> = commit
            .signals
            .iter()
            .map(|signal| signal.thread.as_str())
            .chain(commit.cancels.iter().map(|cancel| cancel.thread.as_str()))
            .filter(|id| *id != lease.thread.as_str())
            .collect();
        others.sort_unstable();
        others.dedup();
        list(&mut map, "others", &others)?;
        if let Some(checkpoint) = &commit.checkpoint {
            map.serialize_entry("checkpoint", &Checkpoint::from(checkpoint))?;
        }
        if commit.clear_writes {
            map.serialize_entry("clear", &true)?;
        }
        // By key, the last one of a key only: the database writes each row once.
        let mut writes: Vec<WriteRow<'_>> = Vec::with_capacity(commit.writes.len());
        for write in &commit.writes {
            let row = WriteRow::from(write);
            match writes.iter_mut().find(|other| other.digest == row.digest) {
                Some(other) => *other = row,
                None => writes.push(row),
            }
        }
        list(&mut map, "writes", &writes)?;
        list(&mut map, "consumed", &commit.consumed)?;
        list(
            &mut map,
            "children",
            &each::<_, Child<'_>>(&commit.children),
        )?;
        list(&mut map, "signals", &each::<_, Signal<'_>>(&commit.signals))?;
        list(&mut map, "cancels", &each::<_, Cancel<'_>>(&commit.cancels))?;
        list(&mut map, "events", &each::<_, Event<'_>>(&commit.events))?;
        if let Some(waits) = &commit.waits {
            map.serialize_entry("waits", waits)?;
        }
        match &commit.then {
            Then::Keep => map.serialize_entry("then", &0)?,
            Then::Yield => map.serialize_entry("then", &1)?,
            Then::Wait { mail_seen, wake_at } => {
                map.serialize_entry("then", &2)?;
                map.serialize_entry("mail_seen", mail_seen)?;
                // Rounded up here: the database would round to the nearest, and might wake it too early.
                map.serialize_entry("wake_at", &wake_at.map(|at| time(micros_after(at))))?;
            }
            Then::End {
                status,
                error,
                output,
            } => {
                map.serialize_entry("then", &3)?;
                map.serialize_entry("status", &status_code(*status))?;
                map.serialize_entry("error", error)?;
                if let Some(output) = output {
                    map.serialize_entry("output", output)?;
                }
            }
        }
        map.end()
    }
}

fn list<M: SerializeMap, T: Serialize>(
    map: &mut M,
    key: &'static str,
    list: &[T],
) -> Result<(), M::Error> {
    if list.is_empty() {
        Ok(())
    } else {
        map.serialize_entry(key, list)
    }
}

fn each<'a, T, R: From<&'a T>>(list: &'a [T]) -> Vec<R> {
    list.iter().map(R::from).collect()
}

#[derive(Serialize)]
struct Checkpoint<'a> {
    parent: u64,
    branch: u32,
    step: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    source: Option<String>,
    plan: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    appends: Option<&'a Channels>,
    #[serde(skip_serializing_if = "Option::is_none")]
    changes: Option<&'a Channels>,
    #[serde(skip_serializing_if = "Option::is_none")]
    snapshot: Option<&'a Channels>,
}

impl<'a> From<&'a NewCheckpoint> for Checkpoint<'a> {
    fn from(new: &'a NewCheckpoint) -> Self {
        Self {
            parent: new.parent,
            branch: new.branch,
            step: new.step,
            source: source_text(&new.source),
            plan: &new.plan,
            appends: Some(&new.appends).filter(|channels| !channels.is_empty()),
            changes: Some(&new.changes).filter(|channels| !channels.is_empty()),
            snapshot: new.snapshot.as_ref(),
        }
    }
}

#[derive(Serialize)]
struct WriteRow<'a> {
    digest: Uuid,
    task: &'a str,
    kind: u8,
    name: &'a str,
    round: u32,
    value: &'a Value,
}

impl<'a> From<&'a Write> for WriteRow<'a> {
    fn from(write: &'a Write) -> Self {
        Self {
            digest: write_digest(write),
            task: &write.task,
            kind: write.kind.code(),
            name: &write.name,
            round: write.round,
            value: &write.value,
        }
    }
}

#[derive(Serialize)]
struct Child<'a> {
    id: &'a str,
    graph: &'a str,
    parent: Option<&'a str>,
    parent_name: Option<&'a str>,
    priority: u8,
    input: &'a Value,
}

impl<'a> From<&'a NewThread> for Child<'a> {
    fn from(new: &'a NewThread) -> Self {
        Self {
            id: new.id.as_str(),
            graph: &new.graph,
            parent: new.parent.as_ref().map(|parent| parent.thread.as_str()),
            parent_name: new.parent.as_ref().map(|parent| parent.name.as_str()),
            priority: new.priority.rank(),
            input: &new.input,
        }
    }
}

#[derive(Serialize)]
struct Signal<'a> {
    thread: &'a str,
    digest: Uuid,
    kind: &'a str,
    key: &'a str,
    payload: &'a Value,
    revives: bool,
}

impl<'a> From<&'a NewSignal> for Signal<'a> {
    fn from(new: &'a NewSignal) -> Self {
        Self {
            thread: new.thread.as_str(),
            digest: digest(&new.key),
            kind: &new.kind,
            key: &new.key,
            payload: &new.payload,
            revives: new.revives,
        }
    }
}

#[derive(Serialize)]
struct Cancel<'a> {
    thread: &'a str,
    reason: &'a str,
}

impl<'a> From<&'a CancelRequest> for Cancel<'a> {
    fn from(request: &'a CancelRequest) -> Self {
        Self {
            thread: request.thread.as_str(),
            reason: &request.reason,
        }
    }
}

#[derive(Serialize)]
struct Event<'a> {
    stream: &'a str,
    name: &'a str,
    payload: &'a Value,
    #[serde(skip_serializing_if = "Option::is_none")]
    thread: Option<&'a str>,
}

impl<'a> From<&'a NewEvent> for Event<'a> {
    fn from(event: &'a NewEvent) -> Self {
        Self {
            stream: &event.stream,
            name: &event.name,
            payload: &event.payload,
            thread: event.thread.as_ref().map(crate::ids::ThreadId::as_str),
        }
    }
}
