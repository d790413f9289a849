//! From rows to records.

use serde::de::DeserializeOwned;
use serde_json::Value;
use sqlx::{Row, sqlite::SqliteRow};

use crate::{
    checkpoint::{
        LeaseRecord, Parent, Priority, StorageError, StoredPart, ThreadRecord, ThreadStatus,
        WaitRecord,
    },
    ids::ThreadId,
    stored::{Fault, from_json, number, or_noted, small, status_from, time},
};

/// The status of the thread `t`: one that waited and got something is ready, before anybody has claimed it.
macro_rules! status_of_thread {
    () => {
        "case when t.status = 2 and t.owner is null and t.due_at is not null and t.due_at is not t.wake_at then 0 else t.status end"
    };
}
pub(super) use status_of_thread;

/// Selects threads in the form that [`thread`] reads; `t` is the thread.
macro_rules! select_threads {
    ($tail:literal) => {
        concat!(
            "select t.id, t.graph, t.parent, t.parent_name, t.priority, ",
            status_of_thread!(),
            ", t.branch, t.checkpoint, t.step, ",
            "t.token, t.owner, t.due_at, t.wake_at, t.created_at, t.updated_at, t.cancel, t.error, t.waits, t.output, ",
            "i.input, t.thread, t.last_signal, t.takeovers, t.branches ",
            "from graph_thread t left join graph_input i on i.thread = t.thread ",
            $tail
        )
    };
}
pub(super) use select_threads;

/// A thread, with what only the checkpointer knows about it.
pub(super) struct Thread {
    pub record: ThreadRecord,
    pub key: i64,
    pub token: u64,
    pub last_signal: u64,
    pub takeovers: u32,
    pub branches: u32,
}

impl Thread {
    /// Whether a lease with this token may write.
    pub fn holds(&self, token: u64) -> bool {
        self.token == token && self.record.lease.is_some()
    }
}

pub(super) fn thread(row: &SqliteRow) -> Result<Thread, Fault> {
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

/// The JSON in a column, if there is any.
fn json<T: DeserializeOwned>(
    row: &SqliteRow,
    column: usize,
    what: &str,
) -> Result<Option<T>, Fault> {
    let text: Option<&str> = row.try_get(column)?;
    Ok(text.map(|text| from_json(text, what)).transpose()?)
}

/// A thread as far as its row can be read, and what cannot be.
pub(super) fn thread_as_far(row: &SqliteRow) -> Result<(Thread, Option<String>), Fault> {
    let mut bad = None;
    let id: String = row.try_get(0)?;
    let parent: Option<String> = or_noted(&mut bad, None, row.try_get(2))?;
    let name: Option<String> = or_noted(&mut bad, None, row.try_get(3))?;
    let token = number(row.try_get(9)?);
    let owner: Option<String> = or_noted(&mut bad, None, row.try_get(10))?;
    let due_at: Option<i64> = or_noted(&mut bad, None, row.try_get(11))?;
    let status = row.try_get(5).map_err(Fault::from);
    let status = status.and_then(|code| Ok(status_from(code)?));
    let waits: Option<Vec<WaitRecord>> =
        or_noted(&mut bad, None, json(row, 17, "what it waits for"))?;
    let input = json(row, 19, "its input").and_then(|input| {
        let missing = StorageError::Corrupt {
            what: "its input is missing".to_owned(),
        };
        Ok(input.ok_or(missing)?)
    });
    let record = ThreadRecord {
        id: ThreadId::from(id),
        graph: row.try_get(1)?,
        parent: parent.zip(name).map(|(thread, name)| Parent {
            thread: thread.into(),
            name,
        }),
        priority: Priority::from_rank(u8::try_from(row.try_get::<i64, _>(4)?).unwrap_or(u8::MAX)),
        status: or_noted(&mut bad, ThreadStatus::Ready, status)?,
        branch: small(row.try_get(6)?),
        checkpoint: number(row.try_get(7)?),
        step: number(row.try_get(8)?),
        input: or_noted(&mut bad, Value::Null, input)?.into(),
        waits: waits.unwrap_or_default(),
        wake_at: or_noted(&mut bad, None, row.try_get::<Option<i64>, _>(12))?.map(time),
        error: or_noted(&mut bad, None, row.try_get(16))?,
        output: or_noted(&mut bad, None, json(row, 18, "its output"))?,
        cancel: or_noted(&mut bad, None, row.try_get(15))?,
        lease: owner.map(|owner| LeaseRecord {
            owner,
            token,
            expires_at: time(due_at.unwrap_or(0)),
        }),
        created_at: time(row.try_get(13)?),
        updated_at: time(row.try_get(14)?),
    };
    let thread = Thread {
        record,
        key: row.try_get(20)?,
        token,
        last_signal: number(row.try_get(21)?),
        takeovers: small(row.try_get(22)?),
        branches: small(row.try_get(23)?),
    };
    Ok((thread, bad))
}
