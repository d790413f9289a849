//! Threads, their mailboxes, and requests to cancel them.

use sqlx::{PgConnection, Postgres, QueryBuilder, Row};

use super::{
    job::{Answer, Leased, SignalJob, StartRow},
    rows::{self, Thread, select_threads, status_of_thread},
    values::{Time, text},
};
use crate::{
    checkpoint::{
        CancelOutcome, CancelRequest, Created, MAILBOX_LIMIT, Reopened, SignalOutcome,
        SignalRecord, StorageError, StoredPart, ThreadFilter, ThreadRecord, ThreadStatus,
    },
    ids::ThreadId,
    stored::{Fault, THREADS_LIMIT, int, number, status_code, status_from},
};

pub(super) async fn create(db: &mut PgConnection, new: &StartRow) -> Result<Answer, Fault> {
    let made = sqlx::query(
        "insert into graph_thread (id, graph, parent, parent_name, priority, input, owner, status, token, due_at) \
         values ($1, $2, $3, $4, $5, $6, $7, case when $7 is null then 0 else 1 end, \
             case when $7 is null then 0 else nextval('graph_token') end, now() + coalesce($8, 0) * interval '1 microsecond') \
         on conflict (id) do nothing returning token, now()",
    )
    .bind(&new.id)
    .bind(&new.graph)
    .bind(&new.parent)
    .bind(&new.parent_name)
    .bind(new.priority)
    .bind(&new.input)
    .bind(new.owner())
    .bind(new.lease())
    .fetch_optional(db)
    .await?;
    Ok(match made {
        None => Answer::Created(Created::Existing, None),
        Some(row) => created(new, row.try_get(0)?, row.try_get(1)?),
    })
}

/// What became of a thread that is new.
pub(super) fn created(new: &StartRow, token: i64, now: Time) -> Answer {
    let leased = new.terms.as_ref().map(|_| Leased {
        token: number(token),
        now: now.0,
    });
    Answer::Created(Created::New, leased)
}

/// A thread with all that is known about it.
pub(super) async fn find(
    db: &mut PgConnection,
    thread: &ThreadId,
) -> Result<Option<Thread>, Fault> {
    sqlx::query(select_threads!("from graph_thread t where t.id = $1"))
        .bind(text(thread.as_str()))
        .fetch_optional(db)
        .await?
        .map(|row| rows::thread(&row))
        .transpose()
}

/// The same, locked until the transaction ends.
pub(super) async fn lock(
    db: &mut PgConnection,
    thread: &ThreadId,
) -> Result<Option<Thread>, Fault> {
    sqlx::query(select_threads!(
        "from graph_thread t where t.id = $1 for no key update"
    ))
    .bind(text(thread.as_str()))
    .fetch_optional(db)
    .await?
    .map(|row| rows::thread(&row))
    .transpose()
}

pub(super) async fn list(
    db: &mut PgConnection,
    filter: &ThreadFilter,
) -> Result<Vec<ThreadRecord>, Fault> {
    let mut query: QueryBuilder<Postgres> =
        QueryBuilder::new(select_threads!("from graph_thread t where true"));
    if let Some(graph) = &filter.graph {
        query.push(" and t.graph = ").push_bind(text(graph));
    }
    if !filter.statuses.is_empty() {
        let codes: Vec<i16> = filter.statuses.iter().map(|s| status_code(*s)).collect();
        query
            .push(concat!(" and ", status_of_thread!(), " = any ("))
            .push_bind(codes)
            .push(")");
    }
    if let Some(parent) = &filter.parent {
        query
            .push(" and t.parent = ")
            .push_bind(text(parent.as_str()));
    }
    if let Some(prefix) = &filter.prefix {
        with_prefix(&mut query, prefix);
    }
    if let Some(after) = &filter.after {
        query.push(" and t.id > ").push_bind(text(after.as_str()));
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

/// Deletes the thread; its other rows are garbage from now on. In one statement.
pub(super) async fn delete(db: &mut PgConnection, thread: &ThreadId) -> Result<Option<i64>, Fault> {
    Ok(sqlx::query_scalar(
        "with gone as (delete from graph_thread where id = $1 returning thread) \
         insert into graph_garbage (thread) select thread from gone returning thread",
    )
    .bind(text(thread.as_str()))
    .fetch_optional(db)
    .await?)
}

/// Narrows a query of threads `t` to ids that begin so.
pub(super) fn with_prefix(query: &mut QueryBuilder<Postgres>, prefix: &str) {
    // The range uses the index; the comparison is exact.
    let prefix = text(prefix).into_owned();
    query
        .push(" and starts_with(t.id, ")
        .push_bind(prefix.clone())
        .push(") and t.id >= ")
        .push_bind(prefix.clone())
        .push(" and t.id < ")
        .push_bind(format!("{prefix}\u{10ffff}"));
}

pub(super) async fn signal(
    db: &mut PgConnection,
    signal: &SignalJob,
) -> Result<SignalOutcome, Fault> {
    let SignalJob { row, wait } = signal;
    let outcome: String = sqlx::query_scalar("select graph_send($1, $2, $3, $4, $5, $6, $7, $8)")
        .bind(&row.thread)
        .bind(row.digest)
        .bind(&row.kind)
        .bind(&row.key)
        .bind(&row.payload)
        .bind(row.revives)
        .bind(wait)
        .bind(int(MAILBOX_LIMIT))
        .fetch_one(db)
        .await?;
    Ok(match outcome.as_str() {
        "new" => SignalOutcome::New,
        "duplicate" => SignalOutcome::Duplicate,
        "no wait" => SignalOutcome::NoSuchWait,
        "expired" => SignalOutcome::Expired,
        "full" => SignalOutcome::MailboxFull,
        "unknown" => SignalOutcome::UnknownThread,
        other => {
            return Err(StorageError::Corrupt {
                what: format!("graph_send answered `{other}`"),
            }
            .into());
        }
    })
}

/// In one statement: what the newest signal is must fit what is in the mailbox.
pub(super) async fn mailbox(
    db: &mut PgConnection,
    thread: &ThreadId,
    after: u64,
) -> Result<(Vec<SignalRecord>, u64), Fault> {
    let found = sqlx::query(
        "select t.last_signal, s.number, s.kind, s.key, s.payload from graph_thread t \
         left join lateral ( \
             select number, kind, key, payload from graph_signal \
             where thread = t.thread and payload is not null and number > $2 offset 0 \
         ) s on true where t.id = $1 order by s.number",
    )
    .bind(text(thread.as_str()))
    .bind(int(after))
    .fetch_all(db)
    .await?;
    let newest: i64 = found
        .first()
        .ok_or_else(|| StorageError::UnknownThread(thread.clone()))?
        .try_get(0)?;
    let mut signals = Vec::with_capacity(found.len());
    for row in &found {
        if row.try_get::<Option<i64>, _>(1)?.is_some() {
            let number = number(row.try_get(1)?);
            let signal = rows::signal(row, 1);
            signals
                .push(signal.map_err(|fault| fault.in_part(thread, StoredPart::Signal(number)))?);
        }
    }
    Ok((signals, number(newest)))
}

/// In the caller's transaction.
pub(super) async fn cancel(
    db: &mut PgConnection,
    request: &CancelRequest,
) -> Result<CancelOutcome, Fault> {
    let row = sqlx::query(
        "select status, cancel is not null from graph_thread where id = $1 for no key update",
    )
    .bind(text(request.thread.as_str()))
    .fetch_optional(&mut *db)
    .await?;
    let Some(row) = row else {
        return Ok(CancelOutcome::UnknownThread);
    };
    if status_from(row.try_get::<i16, _>(0)?.into())?.is_ended() {
        return Ok(CancelOutcome::Ended);
    }
    if row.try_get(1)? {
        return Ok(CancelOutcome::AlreadyRequested);
    }
    sqlx::query(
        "update graph_thread set cancel = $2, updated_at = now(), \
         due_at = graph_due_on_arrival(due_at, owner, status, false) where id = $1",
    )
    .bind(text(request.thread.as_str()))
    .bind(text(&request.reason))
    .execute(db)
    .await?;
    Ok(CancelOutcome::Requested)
}

/// In the caller's transaction.
pub(super) async fn reopen(db: &mut PgConnection, thread: &ThreadId) -> Result<Reopened, Fault> {
    let status: Option<i16> =
        sqlx::query_scalar("select status from graph_thread where id = $1 for no key update")
            .bind(text(thread.as_str()))
            .fetch_optional(&mut *db)
            .await?;
    let Some(status) = status else {
        return Ok(Reopened::UnknownThread);
    };
    let status = status_from(status.into())?;
    if !matches!(status, ThreadStatus::Failed | ThreadStatus::Cancelled) {
        return Ok(Reopened::NotEnded(status));
    }
    sqlx::query(
        "update graph_thread set status = 0, error = null, output = null, due_at = now(), updated_at = now() where id = $1",
    )
    .bind(text(thread.as_str()))
    .execute(db)
    .await?;
    Ok(Reopened::Yes)
}
