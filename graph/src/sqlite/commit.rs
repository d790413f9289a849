//! The commit: all that a superstep writes, in the transaction that the caller opened.
//!
//! Every refusal comes before the first write, or fails the transaction.

use sqlx::{Row, SqliteConnection};

use super::{
    history, journal,
    threads::{self, Delivery},
};
use crate::{
    checkpoint::{Commit, Lease, Receipt, StorageError, Then},
    ids::ThreadId,
    stored::{Fault, int, json_text, key_digest, micros_after, number, small, status_code, time},
};

/// What the fence reads about the thread.
struct Own {
    key: i64,
    branch: u32,
    checkpoint: u64,
    last_checkpoint: u64,
    last_signal: u64,
    cancel: Option<String>,
}

pub(super) async fn commit(
    db: &mut SqliteConnection,
    lease: &Lease,
    commit: &Commit,
    now: i64,
) -> Result<Receipt, Fault> {
    let mut own = fence(db, lease).await?;
    let mut made = None;
    if let Some(new) = &commit.checkpoint {
        if new.branch != own.branch || new.parent != own.checkpoint {
            return Err(StorageError::NotTheTip {
                thread: lease.thread.clone(),
                branch: new.branch,
                parent: new.parent,
            }
            .into());
        }
        let number = own.last_checkpoint + 1;
        history::insert(db, own.key, number, new.branch, new, now).await?;
        sqlx::query(
            "update graph_thread set checkpoint = ?2, last_checkpoint = ?2, step = ?3, takeovers = 0, updated_at = ?4 \
             where thread = ?1",
        )
            .bind(own.key)
            .bind(int(number))
            .bind(int(new.step))
            .bind(now)
            .execute(&mut *db)
            .await?;
        made = Some(number);
    }
    writes(db, own.key, made.unwrap_or(commit.base), commit).await?;
    consume(db, own.key, &commit.consumed).await?;
    journal::append_all(db, &commit.events, now).await?;
    for child in &commit.children {
        threads::create(db, child, now).await?;
    }
    let mut undelivered: Vec<ThreadId> = Vec::new();
    for signal in &commit.signals {
        if threads::deliver(db, signal, now).await? == Delivery::UnknownThread
            && !undelivered.contains(&signal.thread)
        {
            undelivered.push(signal.thread.clone());
        }
    }
    for request in &commit.cancels {
        threads::cancel(db, request, now).await?;
    }
    if let Some(waits) = &commit.waits {
        let text = if waits.is_empty() {
            None
        } else {
            Some(json_text(waits)?)
        };
        sqlx::query("update graph_thread set waits = ?2 where thread = ?1")
            .bind(own.key)
            .bind(text)
            .execute(&mut *db)
            .await?;
    }
    if !commit.signals.is_empty() || !commit.cancels.is_empty() {
        // Some may have been to itself.
        own = fence(db, lease).await?;
    }
    let released = then(db, &own, &commit.then, made.is_some(), now).await?;
    Ok(Receipt {
        checkpoint: made,
        released,
        mail: own.last_signal,
        // An end forgets it.
        cancel: own
            .cancel
            .filter(|_| !matches!(commit.then, Then::End { .. })),
        undelivered,
        now: time(now),
    })
}

/// Refuses a lease that is not the newest one, or was given back. The write lock is held already, so it stays true.
async fn fence(db: &mut SqliteConnection, lease: &Lease) -> Result<Own, Fault> {
    let row = sqlx::query(
        "select thread, branch, checkpoint, last_checkpoint, last_signal, cancel from graph_thread where id = ?1 and token = ?2 and owner is not null",
    )
    .bind(lease.thread.as_str())
    .bind(int(lease.token))
    .fetch_optional(db)
    .await?
    .ok_or_else(|| StorageError::Fenced {
        thread: lease.thread.clone(),
        token: lease.token,
    })?;
    Ok(Own {
        key: row.try_get(0)?,
        branch: small(row.try_get(1)?),
        checkpoint: number(row.try_get(2)?),
        last_checkpoint: number(row.try_get(3)?),
        last_signal: number(row.try_get(4)?),
        cancel: row.try_get(5)?,
    })
}

async fn writes(
    db: &mut SqliteConnection,
    thread: i64,
    newest: u64,
    commit: &Commit,
) -> Result<(), Fault> {
    if commit.clear_writes {
        sqlx::query("delete from graph_write where thread = ?1 and checkpoint = ?2")
            .bind(thread)
            .bind(int(commit.base))
            .execute(&mut *db)
            .await?;
    }
    for key in &commit.forget {
        sqlx::query(
            "delete from graph_write where thread = ?1 and checkpoint = ?2 and digest = ?3",
        )
        .bind(thread)
        .bind(int(commit.base))
        .bind(key_digest(key).as_bytes().as_slice())
        .execute(&mut *db)
        .await?;
    }
    for write in &commit.writes {
        sqlx::query(
            "insert into graph_write (thread, checkpoint, digest, task, kind, name, round, value) \
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) on conflict (thread, checkpoint, digest) do update set value = excluded.value",
        )
        .bind(thread)
        .bind(int(newest))
        .bind(key_digest(&write.key()).as_bytes().as_slice())
        .bind(&write.task)
        .bind(i64::from(write.kind.code()))
        .bind(&write.name)
        .bind(i64::from(write.round))
        .bind(json_text(&write.value)?)
        .execute(&mut *db)
        .await?;
    }
    Ok(())
}

async fn consume(db: &mut SqliteConnection, thread: i64, numbers: &[u64]) -> Result<(), Fault> {
    if numbers.is_empty() {
        return Ok(());
    }
    let used: Vec<bool> = sqlx::query_scalar(
        "update graph_signal set payload = null where thread = ?1 and payload is not null \
         and number in (select value from json_each(?2)) returning revives",
    )
    .bind(thread)
    .bind(json_text(numbers)?)
    .fetch_all(&mut *db)
    .await?;
    sqlx::query(
        "update graph_thread set unread = unread - ?2, revivals = revivals - ?3 where thread = ?1",
    )
    .bind(thread)
    .bind(int(used.len() as u64))
    .bind(int(used.iter().filter(|revives| **revives).count() as u64))
    .execute(db)
    .await?;
    Ok(())
}

/// Settles the lease. Returns whether it was given back.
async fn then(
    db: &mut SqliteConnection,
    own: &Own,
    then: &Then,
    progress: bool,
    now: i64,
) -> Result<bool, Fault> {
    match then {
        Then::Keep => {}
        Then::Yield => {
            sqlx::query(
                "update graph_thread set status = 0, owner = null, due_at = ?2, wake_at = null, takeovers = 0, updated_at = ?2 \
                 where thread = ?1",
            )
            .bind(own.key)
            .bind(now)
            .execute(db)
            .await?;
            return Ok(true);
        }
        Then::Wait { mail_seen, wake_at } => {
            if own.cancel.is_none() && !has_news(db, own, *mail_seen).await? {
                sqlx::query(
                    "update graph_thread set status = 2, owner = null, due_at = ?2, wake_at = ?2, takeovers = 0, updated_at = ?3 \
                     where thread = ?1",
                )
                .bind(own.key)
                .bind(wake_at.map(micros_after))
                .bind(now)
                .execute(db)
                .await?;
                return Ok(true);
            }
        }
        Then::End {
            status,
            error,
            output,
        } => {
            sqlx::query(
                "update graph_thread set status = ?2, error = ?3, output = ?4, waits = null, wake_at = null, cancel = null, \
                 owner = null, due_at = case when revivals > 0 then ?5 end, takeovers = 0, updated_at = ?5 where thread = ?1",
            )
            .bind(own.key)
            .bind(i64::from(status_code(*status)))
            .bind(error)
            .bind(output.as_ref().map(json_text).transpose()?)
            .bind(now)
            .execute(db)
            .await?;
            return Ok(true);
        }
    }
    if !progress {
        sqlx::query("update graph_thread set updated_at = ?2 where thread = ?1")
            .bind(own.key)
            .bind(now)
            .execute(db)
            .await?;
    }
    Ok(false)
}

/// Whether the mailbox holds a signal that the run has not seen.
async fn has_news(
    db: &mut SqliteConnection,
    own: &Own,
    mail_seen: u64,
) -> Result<bool, sqlx::Error> {
    if own.last_signal <= mail_seen {
        return Ok(false);
    }
    sqlx::query_scalar(
        "select exists (select 1 from graph_signal where thread = ?1 and payload is not null and number > ?2)",
    )
    .bind(own.key)
    .bind(int(mail_seen))
    .fetch_one(db)
    .await
}
