//! Threads, their mailboxes, and requests to cancel them.

use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection, sqlite::SqliteRow};

use super::rows::{self, Thread, select_threads, status_of_thread};
use crate::{
    checkpoint::{
        CancelOutcome, CancelRequest, Created, MAILBOX_LIMIT, NewSignal, NewThread, Reopened,
        SignalOutcome, SignalRecord, StorageError, StoredPart, ThreadFilter, ThreadRecord,
        ThreadStatus, WaitRecord,
    },
    ids::ThreadId,
    stored::{
        Fault, THREADS_LIMIT, digest, from_json, int, json_text, micros_after, number, status_code,
        status_from,
    },
};

/// What an arrival does to the time from which on its thread is due: nothing while it is leased (the run will see it), or
/// when it has ended (unless the arrival revives it). `?1` is now, `?2` whether it revives.
macro_rules! due_on_arrival {
    () => {
        "due_at = case when owner is not null then due_at when status >= 3 and not ?2 then due_at else min(coalesce(due_at, ?1), ?1) end"
    };
}

pub(super) async fn create(
    db: &mut SqliteConnection,
    thread: &NewThread,
    now: i64,
) -> Result<Created, Fault> {
    let input = json_text(&thread.input)?;
    let key: Option<i64> = sqlx::query_scalar(
        "insert into graph_thread (id, graph, parent, parent_name, priority, due_at, created_at, updated_at) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?6) on conflict (id) do nothing returning thread",
    )
    .bind(thread.id.as_str())
    .bind(&thread.graph)
    .bind(thread.parent.as_ref().map(|parent| parent.thread.as_str()))
    .bind(thread.parent.as_ref().map(|parent| parent.name.as_str()))
    .bind(i64::from(thread.priority.rank()))
    .bind(now)
    .fetch_optional(&mut *db)
    .await?;
    let Some(key) = key else {
        return Ok(Created::Existing);
    };
    sqlx::query("insert into graph_input (thread, input) values (?1, ?2)")
        .bind(key)
        .bind(input)
        .execute(db)
        .await?;
    Ok(Created::New)
}

/// A thread with all that is known about it.
pub(super) async fn find(
    db: &mut SqliteConnection,
    thread: &ThreadId,
) -> Result<Option<Thread>, Fault> {
    sqlx::query(select_threads!("where t.id = ?1"))
        .bind(thread.as_str())
        .fetch_optional(db)
        .await?
        .map(|row| rows::thread(&row))
        .transpose()
}

pub(super) async fn get(
    db: &mut SqliteConnection,
    thread: &ThreadId,
) -> Result<Option<ThreadRecord>, Fault> {
    Ok(find(db, thread).await?.map(|thread| thread.record))
}

pub(super) async fn list(
    db: &mut SqliteConnection,
    filter: &ThreadFilter,
) -> Result<Vec<ThreadRecord>, Fault> {
    let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(select_threads!("where true"));
    if let Some(graph) = &filter.graph {
        query.push(" and t.graph = ").push_bind(graph);
    }
    if !filter.statuses.is_empty() {
        query.push(concat!(" and ", status_of_thread!(), " in ("));
        let mut list = query.separated(", ");
        for status in &filter.statuses {
            list.push_bind(i64::from(status_code(*status)));
        }
        query.push(")");
    }
    if let Some(parent) = &filter.parent {
        query.push(" and t.parent = ").push_bind(parent.as_str());
    }
    if let Some(prefix) = &filter.prefix {
        with_prefix(&mut query, prefix);
    }
    if let Some(after) = &filter.after {
        query.push(" and t.id > ").push_bind(after.as_str());
    }
    query
        .push(" order by t.id limit ")
        .push_bind(crate::stored::rows(filter.limit.unwrap_or(THREADS_LIMIT)));
    let found = query.build().fetch_all(db).await?;
    found
        .iter()
        .map(|row| rows::thread(row).map(|thread| thread.record))
        .collect()
}

/// Narrows a query of threads `t` to ids that begin so.
pub(super) fn with_prefix(query: &mut QueryBuilder<Sqlite>, prefix: &str) {
    // The range uses the index; the comparison is exact.
    query.push(" and t.id >= ").push_bind(prefix.to_owned());
    query
        .push(" and substr(cast(t.id as blob), 1, ")
        .push_bind(int(prefix.len() as u64))
        .push(") = cast(")
        .push_bind(prefix.to_owned())
        .push(" as blob)");
    query
        .push(" and t.id < ")
        .push_bind(format!("{prefix}\u{10ffff}"));
}

/// Deletes the thread; its other rows are garbage from now on.
pub(super) async fn delete(
    db: &mut SqliteConnection,
    thread: &ThreadId,
) -> Result<Option<i64>, Fault> {
    let key: Option<i64> =
        sqlx::query_scalar("delete from graph_thread where id = ?1 returning thread")
            .bind(thread.as_str())
            .fetch_optional(&mut *db)
            .await?;
    if let Some(key) = key {
        sqlx::query("insert into graph_garbage (thread) values (?1)")
            .bind(key)
            .execute(db)
            .await?;
    }
    Ok(key)
}

/// What became of a signal on its way into a mailbox.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Delivery {
    New,
    Duplicate,
    UnknownThread,
}

/// Puts a signal into a mailbox, whatever it holds already.
pub(super) async fn deliver(
    db: &mut SqliteConnection,
    signal: &NewSignal,
    now: i64,
) -> Result<Delivery, Fault> {
    let row = sqlx::query("select thread, last_signal from graph_thread where id = ?1")
        .bind(signal.thread.as_str())
        .fetch_optional(&mut *db)
        .await?;
    let Some(row) = row else {
        return Ok(Delivery::UnknownThread);
    };
    let (key, last): (i64, i64) = (row.try_get(0)?, row.try_get(1)?);
    let inserted = sqlx::query(
        "insert into graph_signal (thread, number, digest, revives, kind, key, payload, at) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) \
         on conflict (thread, digest) do nothing",
    )
    .bind(key)
    .bind(last + 1)
    .bind(digest(&signal.key).as_bytes().as_slice())
    .bind(signal.revives)
    .bind(&signal.kind)
    .bind(&signal.key)
    .bind(json_text(&signal.payload)?)
    .bind(now)
    .execute(&mut *db)
    .await?
    .rows_affected();
    if inserted == 0 {
        return Ok(Delivery::Duplicate);
    }
    sqlx::query(concat!(
        "update graph_thread set last_signal = last_signal + 1, unread = unread + 1, revivals = revivals + ?2, updated_at = ?1, ",
        due_on_arrival!(),
        " where thread = ?3"
    ))
    .bind(now)
    .bind(signal.revives)
    .bind(key)
    .execute(db)
    .await?;
    Ok(Delivery::New)
}

pub(super) async fn signal(
    db: &mut SqliteConnection,
    signal: &NewSignal,
    answers: Option<&str>,
    now: i64,
) -> Result<SignalOutcome, Fault> {
    let row = sqlx::query(
        "select t.unread, t.waits, exists (select 1 from graph_signal s where s.thread = t.thread and s.digest = ?2) \
         from graph_thread t where t.id = ?1",
    )
    .bind(signal.thread.as_str())
    .bind(digest(&signal.key).as_bytes().as_slice())
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else {
        return Ok(SignalOutcome::UnknownThread);
    };
    if row.try_get(2)? {
        return Ok(SignalOutcome::Duplicate);
    }
    if let Some(wait) = answers {
        let waits: Option<&str> = row.try_get(1)?;
        let waits: Vec<WaitRecord> = waits.map_or(Ok(Vec::new()), |text| {
            from_json(text, &format!("the waits of thread {}", signal.thread))
        })?;
        match waits.iter().find(|open| open.id == wait) {
            None => return Ok(SignalOutcome::NoSuchWait),
            Some(open) if open.until.is_some_and(|until| micros_after(until) <= now) => {
                return Ok(SignalOutcome::Expired);
            }
            Some(_) => {}
        }
    }
    if number(row.try_get(0)?) >= MAILBOX_LIMIT {
        return Ok(SignalOutcome::MailboxFull);
    }
    Ok(match deliver(db, signal, now).await? {
        Delivery::New => SignalOutcome::New,
        Delivery::Duplicate => SignalOutcome::Duplicate,
        Delivery::UnknownThread => SignalOutcome::UnknownThread,
    })
}

pub(super) async fn mailbox(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    after: u64,
) -> Result<(Vec<SignalRecord>, u64), Fault> {
    let row = sqlx::query("select thread, last_signal from graph_thread where id = ?1")
        .bind(thread.as_str())
        .fetch_optional(&mut *db)
        .await?
        .ok_or_else(|| StorageError::UnknownThread(thread.clone()))?;
    let signals = unread(db, thread, row.try_get(0)?, after).await?;
    Ok((signals, number(row.try_get(1)?)))
}

/// The unconsumed signals of a thread.
pub(super) async fn unread(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    row: i64,
    after: u64,
) -> Result<Vec<SignalRecord>, Fault> {
    let found = sqlx::query(
        "select number, kind, key, payload from graph_signal \
         where thread = ?1 and payload is not null and number > ?2 order by number",
    )
    .bind(row)
    .bind(int(after))
    .fetch_all(db)
    .await?;
    found
        .iter()
        .map(|row| {
            let number = number(row.try_get(0)?);
            record(number, row).map_err(|fault| fault.in_part(thread, StoredPart::Signal(number)))
        })
        .collect()
}

fn record(number: u64, row: &SqliteRow) -> Result<SignalRecord, Fault> {
    Ok(SignalRecord {
        number,
        kind: row.try_get(1)?,
        key: row.try_get(2)?,
        payload: from_json(row.try_get(3)?, "its payload")?,
    })
}

pub(super) async fn cancel(
    db: &mut SqliteConnection,
    request: &CancelRequest,
    now: i64,
) -> Result<CancelOutcome, Fault> {
    let row = sqlx::query("select status, cancel is not null from graph_thread where id = ?1")
        .bind(request.thread.as_str())
        .fetch_optional(&mut *db)
        .await?;
    let Some(row) = row else {
        return Ok(CancelOutcome::UnknownThread);
    };
    if status_from(row.try_get(0)?)?.is_ended() {
        return Ok(CancelOutcome::Ended);
    }
    if row.try_get(1)? {
        return Ok(CancelOutcome::AlreadyRequested);
    }
    sqlx::query(concat!(
        "update graph_thread set cancel = ?3, updated_at = ?1, ",
        due_on_arrival!(),
        " where id = ?4"
    ))
    .bind(now)
    .bind(false)
    .bind(&request.reason)
    .bind(request.thread.as_str())
    .execute(db)
    .await?;
    Ok(CancelOutcome::Requested)
}

pub(super) async fn reopen(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    now: i64,
) -> Result<Reopened, Fault> {
    let status: Option<i64> = sqlx::query_scalar("select status from graph_thread where id = ?1")
        .bind(thread.as_str())
        .fetch_optional(&mut *db)
        .await?;
    let Some(status) = status else {
        return Ok(Reopened::UnknownThread);
    };
    let status = status_from(status)?;
    if !matches!(status, ThreadStatus::Failed | ThreadStatus::Cancelled) {
        return Ok(Reopened::NotEnded(status));
    }
    sqlx::query(
        "update graph_thread set status = 0, error = null, output = null, due_at = ?1, updated_at = ?1 where id = ?2",
    )
    .bind(now)
    .bind(thread.as_str())
    .execute(db)
    .await?;
    Ok(Reopened::Yes)
}
