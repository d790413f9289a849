//! Forgetting and copying.
//!
//! Forgetting is two things: saying what is forgotten, which is a few rows under the thread's lock, and cleaning up behind it, a
//! batch at a time, under no lock but that of the rows which nobody else needs. So a run that goes on meanwhile waits for next
//! to nothing.

mod deletion;

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use sqlx::{PgConnection, Row};

use super::{
    DEADLOCK_ATTEMPTS, PostgresCheckpointer, connection, history, is_transient,
    rows::{Thread, count, wide},
    threads,
    values::{Jsonb, text},
};
use crate::{
    checkpoint::{
        BATCH, Channels, Copied, DeleteFilter, Deleted, Forgotten, Keep, PrunePlan, Pruned,
        Retention, StorageError, SurveyFilter, Surveyed,
    },
    folding::{CHUNK, Old, fold},
    ids::ThreadId,
    stored::{self, DELETE_LIMIT, Fault, append_items, int, micros, number, small},
};
use deletion::{collect, delete, survey};

/// The longest age: a thousand years, which is older than anything and can be taken from now.
const OLDEST: i64 = 1000 * 366 * 86_400 * 1_000_000;

#[async_trait]
impl Retention for PostgresCheckpointer {
    async fn prune_plan(&self, thread: &ThreadId, keep: &Keep) -> Result<PrunePlan, StorageError> {
        let run = async {
            let mut db = self.read().await?;
            let found = history::known(&mut db, thread).await?;
            let before = cut(&mut db, &found, keep).await?;
            let bases = bare_bases(&mut db, &found, before).await?;
            Ok(PrunePlan { before, bases })
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("planning to prune thread {thread}")))
    }

    async fn prune(
        &self,
        thread: &ThreadId,
        before: u64,
        snapshots: &BTreeMap<u64, Channels>,
    ) -> Result<Pruned, StorageError> {
        let run = async {
            let mut db = self.begin().await?;
            let found = history::locked(&mut db, thread).await?;
            if let Some(needs) = forget(&mut db, &found, before, snapshots).await? {
                return Ok(Pruned::Needs(needs));
            }
            db.commit().await?;
            // A transaction of its own, which does not lock the thread.
            let mut db = self.begin().await?;
            let (removed, more) = clean(&mut db, &found).await?;
            db.commit().await?;
            Ok(Pruned::Done { removed, more })
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("pruning thread {thread}")))
    }

    async fn copy_thread(&self, from: &ThreadId, to: &ThreadId) -> Result<Copied, StorageError> {
        let mut attempt = 1;
        loop {
            let run = async {
                // What is read does not change, so nothing of the original is locked.
                let isolated = "begin isolation level repeatable read";
                let mut db = super::begin(&self.pool, self.limits, isolated).await?;
                let copied = copy(&mut db, from, to).await?;
                db.commit().await?;
                Ok(copied)
            };
            match self.limits.long(run).await {
                // Somebody else made the copy meanwhile.
                Err(Fault::Database(error))
                    if attempt < DEADLOCK_ATTEMPTS && is_transient(&error) =>
                {
                    attempt += 1;
                }
                result => {
                    return result.map_err(|fault: Fault| {
                        fault.during(&format!("copying thread {from} to {to}"))
                    });
                }
            }
        }
    }

    async fn delete_threads(&self, filter: &DeleteFilter) -> Result<Deleted, StorageError> {
        let run = async {
            let limit = filter.limit.unwrap_or(DELETE_LIMIT);
            let mut db = connection(&self.pool).await?;
            let threads = delete(&mut db, filter, limit).await?;
            drop(db);
            // They are gone. What is left of them is cleared away by the next one, if not now.
            let more = self.collect(None).await.unwrap_or_else(|fault| {
                let error = fault.during("clearing away deleted threads");
                tracing::warn!(error = %crate::private::chain(&error), "what is left of deleted threads is cleared away later");
                true
            });
            Ok(Deleted {
                more: more || (limit > 0 && threads.len() >= limit),
                threads,
            })
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("deleting threads"))
    }

    async fn forget_keys(
        &self,
        threads: &[ThreadId],
        age: Duration,
    ) -> Result<Forgotten, StorageError> {
        let run = async {
            let ids: Vec<String> = threads
                .iter()
                .map(|id| text(id.as_str()).into_owned())
                .collect();
            let mut db = connection(&self.pool).await?;
            let keys = sqlx::query(
                "with old as ( \
                     select s.thread, s.digest from graph_thread t join graph_signal s on s.thread = t.thread \
                     where t.id = any ($1) and s.payload is null and s.at < now() - $2 * interval '1 microsecond' limit $3 \
                 ) delete from graph_signal s using old where s.thread = old.thread and s.digest = old.digest",
            )
            .bind(ids)
            .bind(micros(age).min(OLDEST))
            .bind(stored::rows(BATCH))
            .execute(&mut *db)
            .await?
            .rows_affected();
            Ok(Forgotten {
                keys,
                more: keys >= BATCH as u64,
            })
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("forgetting keys of signals"))
    }

    async fn survey(&self, filter: &SurveyFilter) -> Result<Vec<Surveyed>, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            survey(&mut db, filter).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("looking for threads to sweep"))
    }
}

impl PostgresCheckpointer {
    /// Takes the rows of a deleted thread out of the database, a batch at a time.
    pub(super) async fn collect_all(&self, thread: i64) -> Result<(), Fault> {
        while self.collect(Some(thread)).await? {}
        Ok(())
    }

    /// Takes a batch of rows of deleted threads (of one, or of any) out of the database. Returns whether there is more.
    async fn collect(&self, thread: Option<i64>) -> Result<bool, Fault> {
        let mut db = self.begin().await?;
        let more = collect(&mut db, thread).await?;
        db.commit().await?;
        Ok(more)
    }
}

/// The number before which checkpoints go.
async fn cut(db: &mut PgConnection, thread: &Thread, keep: &Keep) -> Result<u64, Fault> {
    let mut before = None;
    if let Some(count) = keep.last {
        let oldest: Option<i32> = sqlx::query_scalar(concat!(
            "select c.number from graph_checkpoint c where c.thread = $1 and ",
            history::is_there!(),
            " order by c.number desc limit 1 offset $2"
        ))
        .bind(thread.key)
        .bind(int(count.max(1) - 1))
        .fetch_optional(&mut *db)
        .await?;
        before = Some(oldest.map_or(0, |oldest| number(oldest.into())));
    }
    if let Some(age) = keep.newer_than {
        let oldest: i32 = sqlx::query_scalar(
            "select coalesce( \
                 (select number from graph_checkpoint where thread = $1 and at >= now() - $2 * interval '1 microsecond' \
                  order by number limit 1), \
                 (select last_checkpoint + 1 from graph_thread where thread = $1))",
        )
        .bind(thread.key)
        .bind(micros(age).min(OLDEST))
        .fetch_one(&mut *db)
        .await?;
        let young = number(oldest.into());
        before = Some(before.map_or(young, |last: u64| last.min(young)));
    }
    Ok(before.unwrap_or(0))
}

/// The checkpoints that would become the oldest on their way, and have no snapshot.
async fn bare_bases(
    db: &mut PgConnection,
    thread: &Thread,
    before: u64,
) -> Result<Vec<u64>, Fault> {
    let bare: Vec<i32> = sqlx::query_scalar(
        "select number from graph_checkpoint where thread = $1 and (number >= $2 or number = $3) and snapshot is null \
         and parent < $2 and parent <> 0 and parent <> $3 order by number",
    )
    .bind(thread.key)
    .bind(int(before))
    .bind(int(thread.record.checkpoint))
    .fetch_all(db)
    .await?;
    Ok(bare.into_iter().map(|base| number(base.into())).collect())
}

/// Says what is forgotten from now on. Returns which checkpoints need a snapshot first, if some do. The thread is locked.
async fn forget(
    db: &mut PgConnection,
    thread: &Thread,
    before: u64,
    snapshots: &BTreeMap<u64, Channels>,
) -> Result<Option<Vec<u64>>, Fault> {
    let horizon: Option<i32> =
        sqlx::query_scalar("select horizon from graph_thread where thread = $1")
            .bind(thread.key)
            .fetch_one(&mut *db)
            .await?;
    let before = before.max(horizon.map_or(0, |horizon| number(horizon.into())));
    // Numbers are that wide; and no checkpoint has a number beyond.
    let before = before.min(u64::from(i32::MAX.unsigned_abs()));
    let mut needs = bare_bases(db, thread, before).await?;
    for base in &needs {
        if let Some(snapshot) = snapshots.get(base) {
            sqlx::query(
                "update graph_checkpoint set snapshot = $3 where thread = $1 and number = $2",
            )
            .bind(thread.key)
            .bind(int(*base))
            .bind(Jsonb::of(snapshot)?)
            .execute(&mut *db)
            .await?;
        }
    }
    needs.retain(|base| !snapshots.contains_key(base));
    if !needs.is_empty() {
        return Ok(Some(needs));
    }
    sqlx::query(
        "update graph_checkpoint set fate = case when number = $3 then 1 end \
         where thread = $1 and number < $2 and (number = $3 or fate = 1)",
    )
    .bind(thread.key)
    .bind(int(before))
    .bind(int(thread.record.checkpoint))
    .execute(&mut *db)
    .await?;
    if thread.branches > 1 {
        let newly_gone = sqlx::query(
            "insert into graph_branch as b (thread, branch, from_branch, checkpoint, gone) \
             select $1, branch, 0, 0, true from graph_checkpoint where thread = $1 \
             group by branch having max(number) < $2 and branch <> $3 \
             on conflict (thread, branch) do update set gone = true where not b.gone",
        )
        .bind(thread.key)
        .bind(int(before))
        .bind(i64::from(thread.record.branch))
        .execute(&mut *db)
        .await?
        .rows_affected();
        if newly_gone > 0 {
            // What was kept of such branches may be needed by nobody now: it is looked at again.
            sqlx::query(
                "update graph_checkpoint set fate = null where thread = $1 and fate = 2 \
                 and branch in (select branch from graph_branch where thread = $1 and gone)",
            )
            .bind(thread.key)
            .execute(&mut *db)
            .await?;
        }
    }
    sqlx::query(
        "update graph_thread set horizon = $2 where thread = $1 and $2 > coalesce(horizon, 0)",
    )
    .bind(thread.key)
    .bind(int(before))
    .execute(db)
    .await?;
    Ok(None)
}

/// Cleans up a batch of forgotten checkpoints. Returns how many, and whether there may be more.
///
/// What decides is read in this order: what is forgotten, then where the branches are. A fork from a checkpoint happened before that
/// one was forgotten, so it is seen.
async fn clean(db: &mut PgConnection, thread: &Thread) -> Result<(u64, bool), Fault> {
    let rows = sqlx::query(
        "select c.branch, c.number, pg_column_size(c.appends)::bigint from graph_checkpoint c \
         where c.thread = $1 and c.fate is null and c.number < (select horizon from graph_thread where thread = $1) \
         order by c.branch, c.number limit $2 for update of c",
    )
    .bind(thread.key)
    .bind(stored::rows(BATCH))
    .fetch_all(&mut *db)
    .await?;
    let mut old: Vec<Old> = Vec::with_capacity(rows.len());
    for row in &rows {
        let next = Old {
            branch: count(row, 0)?,
            number: wide(row, 1)?,
            bytes: row.try_get::<Option<i64>, _>(2)?.map(number),
        };
        if old.last().is_none_or(|last| last.branch != next.branch) {
            old.extend(newest_chunk(db, thread, &next).await?);
        }
        old.push(next);
    }
    if rows.is_empty() {
        return Ok((0, false));
    }
    let branches: i32 = sqlx::query_scalar("select branches from graph_thread where thread = $1")
        .bind(thread.key)
        .fetch_optional(&mut *db)
        .await?
        // Deleted meanwhile; so are these rows, or will be.
        .unwrap_or(0);
    let forked = sqlx::query(
        "select branch, from_branch, checkpoint, gone from graph_branch where thread = $1",
    )
    .bind(thread.key)
    .fetch_all(&mut *db)
    .await?;
    let mut forks = Vec::with_capacity(forked.len());
    let mut gone = Vec::new();
    for row in &forked {
        let fork = stored::Fork {
            branch: count(row, 0)?,
            from_branch: count(row, 1)?,
            checkpoint: wide(row, 2)?,
        };
        if row.try_get(3)? {
            gone.push(fork.branch);
        }
        forks.push(fork);
    }
    let folding = fold(&old, small(branches.into()), &forks, &gone);
    let mut unneeded: Vec<i64> = folding.unneeded.iter().copied().map(int).collect();
    for chunk in &folding.chunks {
        let Some((last, others)) = chunk.split_last() else {
            continue;
        };
        let appends = if others.is_empty() {
            None
        } else {
            unneeded.extend(others.iter().copied().map(int));
            Jsonb::channels(&together(db, thread, chunk).await?)?
        };
        sqlx::query(
            "update graph_checkpoint set fate = 2, plan = 'null', source = null, changes = null, snapshot = null, \
             appends = coalesce($3, appends) where thread = $1 and number = $2",
        )
        .bind(thread.key)
        .bind(int(*last))
        .bind(appends)
        .execute(&mut *db)
        .await?;
    }
    sqlx::query("delete from graph_checkpoint where thread = $1 and number = any ($2)")
        .bind(thread.key)
        .bind(unneeded)
        .execute(&mut *db)
        .await?;
    let numbers: Vec<i64> = old.iter().map(|row| int(row.number)).collect();
    sqlx::query("delete from graph_write where thread = $1 and checkpoint = any ($2)")
        .bind(thread.key)
        .bind(numbers)
        .execute(db)
        .await?;
    Ok((rows.len() as u64, rows.len() >= BATCH))
}

/// The newest row of what was cleaned up before on the same branch, if more can be put to it.
async fn newest_chunk(
    db: &mut PgConnection,
    thread: &Thread,
    next: &Old,
) -> Result<Option<Old>, Fault> {
    let row = sqlx::query(
        "select number, pg_column_size(appends)::bigint from graph_checkpoint \
         where thread = $1 and branch = $2 and number < $3 and fate = 2 order by number desc limit 1 for update",
    )
    .bind(thread.key)
    .bind(i64::from(next.branch))
    .bind(int(next.number))
    .fetch_optional(db)
    .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let chunk = Old {
        branch: next.branch,
        number: wide(&row, 0)?,
        bytes: row.try_get::<Option<i64>, _>(1)?.map(number),
    };
    Ok(Some(chunk).filter(|chunk| chunk.bytes.is_some_and(|bytes| bytes < CHUNK)))
}

/// What some checkpoints appended, in their order.
async fn together(
    db: &mut PgConnection,
    thread: &Thread,
    numbers: &[u64],
) -> Result<Channels, Fault> {
    let numbers: Vec<i64> = numbers.iter().copied().map(int).collect();
    let rows = sqlx::query(
        "select number, appends from graph_checkpoint where thread = $1 and appends is not null and number = any ($2) \
         order by number",
    )
    .bind(thread.key)
    .bind(numbers)
    .fetch_all(db)
    .await?;
    let mut all = Channels::new();
    for row in &rows {
        let what = format!(
            "checkpoint {} of thread {}",
            row.try_get::<i32, _>(0)?,
            thread.record.id
        );
        append_items(&mut all, row.try_get::<Jsonb, _>(1)?.parse(&what)?);
    }
    Ok(all)
}

async fn copy(db: &mut PgConnection, from: &ThreadId, to: &ThreadId) -> Result<Copied, Fault> {
    let Some(original) = threads::find(db, from).await? else {
        return Ok(Copied::UnknownThread);
    };
    let key: Option<i64> = sqlx::query_scalar(
        "insert into graph_thread (id, graph, priority, status, branch, checkpoint, step, last_checkpoint, branches, \
             last_signal, unread, revivals, due_at, error, output, input, horizon) \
         select $2, graph, priority, case when status >= 3 then status else 0 end, branch, checkpoint, step, \
             last_checkpoint, branches, last_signal, unread, revivals, \
             case when status < 3 or revivals > 0 then now() end, error, output, input, horizon \
         from graph_thread where thread = $1 on conflict (id) do nothing returning thread",
    )
    .bind(original.key)
    .bind(text(to.as_str()))
    .fetch_optional(&mut *db)
    .await?;
    let Some(key) = key else {
        return Ok(Copied::Existing);
    };
    for statement in [
        "insert into graph_branch (thread, branch, from_branch, checkpoint, gone) \
         select $2, branch, from_branch, checkpoint, gone from graph_branch where thread = $1",
        "insert into graph_checkpoint (thread, number, branch, parent, step, at, source, plan, appends, changes, snapshot, fate) \
         select $2, number, branch, parent, step, at, source, plan, appends, changes, snapshot, fate \
         from graph_checkpoint where thread = $1 order by number",
        "insert into graph_write (thread, checkpoint, digest, task, kind, name, round, value) \
         select $2, checkpoint, digest, task, kind, name, round, value from graph_write where thread = $1",
        "insert into graph_signal (thread, number, digest, revives, kind, key, payload, at) \
         select $2, number, digest, revives, kind, key, payload, at from graph_signal where thread = $1",
    ] {
        sqlx::query(statement)
            .bind(original.key)
            .bind(key)
            .execute(&mut *db)
            .await?;
    }
    Ok(Copied::New)
}
