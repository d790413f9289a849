//! Leases: taking them, prolonging them, and reading what a run needs.

use std::time::Duration;

use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use super::{
    history,
    rows::{self, Thread, select_threads, status_of_thread},
    threads,
};
use crate::{
    checkpoint::{
        AGING_S, Claim, ClaimRequest, Claimed, Lease, Loaded, Renewed, StorageError, StoredPart,
        Write,
    },
    ids::ThreadId,
    private::chain,
    stored::{self, Fault, from_json, int, json_text, micros, number, small, time, write_kind},
};

/// The most that priorities can move a thread in the queue.
const LONGEST_AGING: i64 = 3 * AGING_S * 1_000_000;

/// How many of the next threads in the queue are looked at to find the next time something is due.
const LOOKAHEAD: i64 = 200;

pub(super) async fn any_due(
    db: &mut SqliteConnection,
    request: &ClaimRequest<'_>,
    now: i64,
) -> Result<bool, Fault> {
    Ok(sqlx::query_scalar(
        "select exists (select 1 from graph_thread where due_at is not null and urgency <= ?1 + ?2 and due_at <= ?1 \
         and graph in (select value from json_each(?3)))",
    )
    .bind(now)
    .bind(LONGEST_AGING)
    .bind(json_text(request.graphs)?)
    .fetch_one(db)
    .await?)
}

/// The answer when nothing is due, or nothing was asked for.
pub(super) async fn nothing(
    db: &mut SqliteConnection,
    request: &ClaimRequest<'_>,
    now: i64,
) -> Result<Claimed, Fault> {
    Ok(Claimed {
        claims: Vec::new(),
        next_due: next_due(db, &json_text(request.graphs)?, now).await?,
        now: time(now),
    })
}

async fn next_due(
    db: &mut SqliteConnection,
    graphs: &str,
    now: i64,
) -> Result<Option<Duration>, Fault> {
    let next: Option<i64> = sqlx::query_scalar(
        "select min(due_at) from (select due_at from graph_thread where due_at is not null and urgency > ?1 and due_at > ?1 \
         and graph in (select value from json_each(?2)) order by urgency limit ?3)",
    )
    .bind(now)
    .bind(graphs)
    .bind(LOOKAHEAD)
    .fetch_one(db)
    .await?;
    Ok(next.map(|next| Duration::from_micros(number(next - now))))
}

pub(super) async fn claim(
    db: &mut SqliteConnection,
    request: &ClaimRequest<'_>,
    now: i64,
) -> Result<Claimed, Fault> {
    let graphs = json_text(request.graphs)?;
    let due: Vec<i64> = sqlx::query_scalar(
        "select thread from graph_thread where due_at is not null and urgency <= ?1 + ?2 and due_at <= ?1 \
         and graph in (select value from json_each(?3)) order by urgency, thread limit ?4",
    )
    .bind(now)
    .bind(LONGEST_AGING)
    .bind(&graphs)
    .bind(stored::rows(request.limit))
    .fetch_all(&mut *db)
    .await?;
    let mut claims = Vec::with_capacity(due.len());
    for key in due {
        let token: i64 = sqlx::query_scalar(
            "update graph_counter set value = value + 1 where name = 'token' returning value",
        )
        .fetch_one(&mut *db)
        .await?;
        // The lease of a thread that has one has expired: its run died.
        sqlx::query(
            "update graph_thread set token = ?2, takeovers = takeovers + (owner is not null), owner = ?3, status = 1, \
             due_at = ?4, updated_at = ?5 where thread = ?1",
        )
        .bind(key)
        .bind(token)
        .bind(request.owner)
        .bind(now.saturating_add(micros(request.lease)))
        .bind(now)
        .execute(&mut *db)
        .await?;
        let row = sqlx::query(select_threads!("where t.thread = ?1"))
            .bind(key)
            .fetch_one(&mut *db)
            .await?;
        let (thread, unreadable) = match rows::thread_as_far(&row) {
            Ok(read) => read,
            // Not even who it is. The others are run; it comes again when its lease has expired.
            Err(fault) => {
                let error = fault.during("claiming threads");
                tracing::error!(error = %chain(&error), "a claimed thread cannot be read at all");
                continue;
            }
        };
        let Thread {
            record, takeovers, ..
        } = thread;
        claims.push(Claim {
            lease: Lease {
                thread: record.id.clone(),
                token: number(token),
            },
            loaded: None,
            thread: record,
            takeovers,
            unreadable,
        });
    }
    Ok(Claimed {
        claims,
        next_due: next_due(db, &graphs, now).await?,
        now: time(now),
    })
}

pub(super) async fn renew(
    db: &mut SqliteConnection,
    leases: &[Lease],
    lease: Duration,
    now: i64,
) -> Result<Vec<Renewed>, Fault> {
    let mut renewed = Vec::with_capacity(leases.len());
    for held in leases {
        let row = sqlx::query(
            "update graph_thread set due_at = ?3 where id = ?1 and token = ?2 and owner is not null \
             returning cancel, revivals > 0",
        )
        .bind(held.thread.as_str())
        .bind(int(held.token))
        .bind(now.saturating_add(micros(lease)))
        .fetch_optional(&mut *db)
        .await?;
        renewed.push(Renewed {
            thread: held.thread.clone(),
            held: row.is_some(),
            input: row.as_ref().map_or(Ok(false), |row| row.try_get(1))?,
            cancel: row.map_or(Ok(None), |row| row.try_get(0))?,
        });
    }
    Ok(renewed)
}

pub(super) async fn break_leases(
    db: &mut SqliteConnection,
    owner: &str,
    now: i64,
) -> Result<u64, Fault> {
    let broken =
        sqlx::query("update graph_thread set due_at = ?2 where owner = ?1 and due_at > ?2")
            .bind(owner)
            .bind(now)
            .execute(db)
            .await?;
    Ok(broken.rows_affected())
}

pub(super) async fn load(
    db: &mut SqliteConnection,
    lease: &Lease,
    now: i64,
) -> Result<Loaded, Fault> {
    let thread = threads::find(db, &lease.thread)
        .await?
        .filter(|thread| thread.holds(lease.token))
        .ok_or_else(|| StorageError::Fenced {
            thread: lease.thread.clone(),
            token: lease.token,
        })?;
    let (branch, checkpoint) = (thread.record.branch, thread.record.checkpoint);
    let state = history::state_on(db, &thread, branch, checkpoint).await?;
    let writes = writes(db, &thread).await?;
    Ok(Loaded {
        state,
        writes,
        mailbox: threads::unread(db, &lease.thread, thread.key, 0).await?,
        mail: thread.last_signal,
        thread: thread.record,
        now: time(now),
    })
}

pub(super) async fn pending_writes(
    db: &mut SqliteConnection,
    thread: &ThreadId,
) -> Result<Vec<Write>, Fault> {
    let found = history::known(db, thread).await?;
    writes(db, &found).await
}

async fn writes(db: &mut SqliteConnection, thread: &Thread) -> Result<Vec<Write>, Fault> {
    let checkpoint = thread.record.checkpoint;
    let unreadable =
        |fault: Fault| fault.in_part(&thread.record.id, StoredPart::Writes(checkpoint));
    sqlx::query(
        "select task, kind, name, round, value from graph_write where thread = ?1 and checkpoint = ?2 \
         order by task, kind, name, round",
    )
    .bind(thread.key)
    .bind(int(checkpoint))
    .fetch_all(db)
    .await?
    .iter()
    .map(|row| write(row).map_err(unreadable))
    .collect()
}

fn write(row: &SqliteRow) -> Result<Write, Fault> {
    let task: String = row.try_get(0)?;
    Ok(Write {
        kind: write_kind(row.try_get(1)?)?,
        name: row.try_get(2)?,
        round: small(row.try_get(3)?),
        value: from_json(row.try_get(4)?, &format!("the one of task {task}"))?,
        task,
        kept: None,
    })
}
