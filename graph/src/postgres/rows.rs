//! From rows to records.

use serde_json::Value;
use sqlx::{Row, postgres::PgRow};

use super::values::{Jsonb, Time, plain};
use crate::{
    checkpoint::{
        LeaseRecord, Parent, Priority, SignalRecord, StorageError, StoredPart, ThreadRecord,
        ThreadStatus, Write,
    },
    ids::ThreadId,
    stored::{Fault, number, or_noted, small, status_from, time, write_kind},
};

/// The status of the thread `t`: one that waited and got something is ready, before anybody has claimed it.
macro_rules! status_of_thread {
    () => {
        "case when t.status = 2 and t.owner is null and t.due_at is distinct from t.wake_at then 0::smallint else t.status end"
    };
}
pub(super) use status_of_thread;

/// Selects threads in the form that [`thread`] reads.
macro_rules! select_threads {
    ($from:literal) => {
        select_threads!("", $from)
    };
    ($with:literal, $from:literal) => {
        concat!(
            $with,
            "select t.id, t.graph, t.parent, t.parent_name, t.priority, ",
            status_of_thread!(),
            ", t.branch, t.checkpoint, t.step, ",
            "t.token, t.owner, t.due_at, t.wake_at, t.created_at, t.updated_at, t.cancel, t.error, t.waits, t.output, ",
            "t.input, t.thread, t.takeovers, t.branches, now() ",
            $from
        )
    };
}
pub(super) use select_threads;

/// A thread, with what only the checkpointer knows about it.
pub(super) struct Thread {
    pub record: ThreadRecord,
    pub key: i64,
    pub token: u64,
    pub takeovers: u32,
    pub branches: u32,
    /// The database's clock.
    pub now: jiff::Timestamp,
}

/// A text column.
pub(super) fn string(row: &PgRow, index: usize) -> Result<String, Fault> {
    Ok(plain(row.try_get(index)?))
}

/// A text column that may be null.
pub(super) fn optional(row: &PgRow, index: usize) -> Result<Option<String>, Fault> {
    Ok(row.try_get::<Option<String>, _>(index)?.map(plain))
}

/// An integer column, as a count.
pub(super) fn count(row: &PgRow, index: usize) -> Result<u32, Fault> {
    Ok(small(row.try_get::<i32, _>(index)?.into()))
}

/// An integer column, as a number that the interface makes wide.
pub(super) fn wide(row: &PgRow, index: usize) -> Result<u64, Fault> {
    Ok(count(row, index)?.into())
}

pub(super) fn thread(row: &PgRow) -> Result<Thread, Fault> {
    let (thread, unreadable) = thread_as_far(row)?;
    match unreadable {
        None => Ok(thread),
        Some(what) => Err(StorageError::Unreadable {
            thread: thread.record.id,
            part: StoredPart::Row,
            what,
        }
        .into()),
    }
}

/// A thread as far as its row can be read, and what cannot be.
pub(super) fn thread_as_far(row: &PgRow) -> Result<(Thread, Option<String>), Fault> {
    let mut bad = None;
    let id = string(row, 0)?;
    let parent = optional(row, 2)?;
    let name = optional(row, 3)?;
    let token = number(row.try_get(9)?);
    let owner = optional(row, 10)?;
    let due_at: Option<Time> = or_noted(&mut bad, None, row.try_get(11))?;
    let waits: Option<Jsonb> = row.try_get(17)?;
    let output: Option<Jsonb> = row.try_get(18)?;
    let status = status_from(row.try_get::<i16, _>(5)?.into());
    let waits = waits.map_or(Ok(Vec::new()), |waits| waits.parse("what it waits for"));
    let output = output.map(|output| output.parse("its output")).transpose();
    let wake_at = row.try_get::<Option<Time>, _>(12);
    let input = row.try_get::<Jsonb, _>(19)?.parse("its input");
    let record = ThreadRecord {
        id: ThreadId::from(id),
        graph: string(row, 1)?,
        parent: parent.zip(name).map(|(thread, name)| Parent {
            thread: thread.into(),
            name,
        }),
        priority: Priority::from_rank(u8::try_from(row.try_get::<i16, _>(4)?).unwrap_or(u8::MAX)),
        status: or_noted(&mut bad, ThreadStatus::Ready, status)?,
        branch: count(row, 6)?,
        checkpoint: wide(row, 7)?,
        step: wide(row, 8)?,
        input: or_noted(&mut bad, Value::Null, input)?.into(),
        waits: or_noted(&mut bad, Vec::new(), waits)?,
        wake_at: or_noted(&mut bad, None, wake_at)?.map(|time| time.0),
        error: optional(row, 16)?,
        output: or_noted(&mut bad, None, output)?,
        cancel: optional(row, 15)?,
        lease: owner.map(|owner| LeaseRecord {
            owner,
            token,
            expires_at: due_at.map_or_else(|| time(0), |due_at| due_at.0),
        }),
        created_at: row.try_get::<Time, _>(13)?.0,
        updated_at: row.try_get::<Time, _>(14)?.0,
    };
    let thread = Thread {
        record,
        key: row.try_get(20)?,
        token,
        takeovers: count(row, 21)?,
        branches: count(row, 22)?,
        now: row.try_get::<Time, _>(23)?.0,
    };
    Ok((thread, bad))
}

/// A signal, from its number, kind, key and payload, beginning at a column.
pub(super) fn signal(row: &PgRow, first: usize) -> Result<SignalRecord, Fault> {
    Ok(SignalRecord {
        number: number(row.try_get(first)?),
        kind: string(row, first + 1)?,
        key: string(row, first + 2)?,
        payload: row.try_get::<Jsonb, _>(first + 3)?.parse("its payload")?,
    })
}

/// A pending write, from its task, kind, name, round and value.
pub(super) fn write(row: &PgRow) -> Result<Write, Fault> {
    let task = string(row, 0)?;
    Ok(Write {
        kind: write_kind(row.try_get::<i16, _>(1)?.into())?,
        name: string(row, 2)?,
        round: small(row.try_get(3)?),
        value: row
            .try_get::<Jsonb, _>(4)?
            .parse(&format!("the one of task {task}"))?,
        task,
        kept: None,
    })
}
