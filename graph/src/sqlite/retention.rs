//! Forgetting and copying.
//!
//! Forgetting is two things: saying what is forgotten, which is a few rows, and cleaning up behind it, a batch at a time. Each is a
//! transaction, after which others that want to write have their turn.

use std::{collections::BTreeMap, time::Duration};

use async_trait::async_trait;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection};

use super::{
    SqliteCheckpointer, history, now,
    rows::{Thread, status_of_thread},
    threads,
};
use crate::{
    checkpoint::{
        BATCH, Channels, Copied, DeleteFilter, Deleted, Forgotten, Keep, PrunePlan, Pruned,
        Retention, StorageError, SurveyFilter, Surveyed,
    },
    folding::{CHUNK, Old, fold},
    ids::ThreadId,
    stored::{
        DELETE_LIMIT, Fault, append_items, from_json, int, json_text, micros, number, small,
        status_code, status_from,
    },
};

#[async_trait]
impl Retention for SqliteCheckpointer {
    async fn prune_plan(&self, thread: &ThreadId, keep: &Keep) -> Result<PrunePlan, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            let found = history::known(&mut reading, thread).await?;
            let before = cut(&mut reading, &found, keep, now()).await?;
            let bases = bare_bases(&mut reading, &found, before).await?;
            Ok(PrunePlan { before, bases })
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("planning to prune thread {thread}")))
    }

    async fn prune(
        &self,
        thread: &ThreadId,
        before: u64,
        snapshots: &BTreeMap<u64, Channels>,
    ) -> Result<Pruned, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let found = history::known(&mut writing, thread).await?;
            if let Some(needs) = forget(&mut writing, &found, before, snapshots).await? {
                return Ok(Pruned::Needs(needs));
            }
            let (removed, more) = clean(&mut writing, &found).await?;
            writing.finish().await?;
            Ok(Pruned::Done { removed, more })
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("pruning thread {thread}")))
    }

    async fn copy_thread(&self, from: &ThreadId, to: &ThreadId) -> Result<Copied, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let copied = copy(&mut writing, from, to, now()).await?;
            writing.finish().await?;
            Ok(copied)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("copying thread {from} to {to}")))
    }

    async fn delete_threads(&self, filter: &DeleteFilter) -> Result<Deleted, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let limit = filter.limit.unwrap_or(DELETE_LIMIT);
            let threads = select(&mut writing, filter, limit, now()).await?;
            for thread in &threads {
                threads::delete(&mut writing, thread).await?;
            }
            let more = collect(&mut writing, None).await?;
            writing.finish().await?;
            Ok(Deleted {
                more: more || (limit > 0 && threads.len() >= limit),
                threads,
            })
        };
        run.await
            .map_err(|fault: Fault| fault.during("deleting threads"))
    }

    async fn forget_keys(
        &self,
        threads: &[ThreadId],
        age: Duration,
    ) -> Result<Forgotten, StorageError> {
        let run = async {
            let mut writing = self.write().await?;
            let keys = sqlx::query(
                "delete from graph_signal where rowid in ( \
                     select s.rowid from graph_thread t cross join graph_signal s on s.thread = t.thread \
                     where t.id in (select value from json_each(?1)) and s.payload is null and s.at < ?2 limit ?3)",
            )
            .bind(json_text(threads)?)
            .bind(now().saturating_sub(micros(age)))
            .bind(crate::stored::rows(BATCH))
            .execute(&mut *writing)
            .await?
            .rows_affected();
            writing.finish().await?;
            Ok(Forgotten {
                keys,
                more: keys >= BATCH as u64,
            })
        };
        run.await
            .map_err(|fault: Fault| fault.during("forgetting keys of signals"))
    }

    async fn survey(&self, filter: &SurveyFilter) -> Result<Vec<Surveyed>, StorageError> {
        let run = async {
            let mut reading = self.read().await?;
            survey(&mut reading, filter).await
        };
        run.await
            .map_err(|fault: Fault| fault.during("looking for threads to sweep"))
    }
}

impl SqliteCheckpointer {
    /// Takes the rows of a deleted thread out of the file, a batch at a time.
    pub(super) async fn collect_all(&self, thread: i64) -> Result<(), Fault> {
        loop {
            let mut writing = self.write().await?;
            let more = collect(&mut writing, Some(thread)).await?;
            writing.finish().await?;
            if !more {
                return Ok(());
            }
        }
    }
}

async fn horizon(db: &mut SqliteConnection, thread: &Thread) -> Result<u64, Fault> {
    let horizon: Option<i64> =
        sqlx::query_scalar("select horizon from graph_thread where thread = ?1")
            .bind(thread.key)
            .fetch_one(db)
            .await?;
    Ok(horizon.map_or(0, number))
}

/// The number before which checkpoints go.
async fn cut(
    db: &mut SqliteConnection,
    thread: &Thread,
    keep: &Keep,
    now: i64,
) -> Result<u64, Fault> {
    let mut before = None;
    if let Some(count) = keep.last {
        let oldest: Option<i64> = sqlx::query_scalar(concat!(
            "select c.number from graph_checkpoint c where c.thread = ?1 and ",
            history::is_there!(),
            " order by c.number desc limit 1 offset ?2"
        ))
        .bind(thread.key)
        .bind(int(count.max(1) - 1))
        .fetch_optional(&mut *db)
        .await?;
        before = Some(oldest.map_or(0, number));
    }
    if let Some(age) = keep.newer_than {
        let oldest: i64 = sqlx::query_scalar(
            "select coalesce( \
                 (select number from graph_checkpoint where thread = ?1 and at >= ?2 order by number limit 1), \
                 (select last_checkpoint + 1 from graph_thread where thread = ?1))",
        )
        .bind(thread.key)
        .bind(now.saturating_sub(micros(age)))
        .fetch_one(&mut *db)
        .await?;
        let young = number(oldest);
        before = Some(before.map_or(young, |last: u64| last.min(young)));
    }
    Ok(before.unwrap_or(0))
}

/// The checkpoints that would become the oldest on their way, and have no snapshot.
async fn bare_bases(
    db: &mut SqliteConnection,
    thread: &Thread,
    before: u64,
) -> Result<Vec<u64>, Fault> {
    let bare: Vec<i64> = sqlx::query_scalar(
        "select number from graph_checkpoint where thread = ?1 and (number >= ?2 or number = ?3) and snapshot is null \
         and parent < ?2 and parent not in (0, ?3) order by number",
    )
    .bind(thread.key)
    .bind(int(before))
    .bind(int(thread.record.checkpoint))
    .fetch_all(db)
    .await?;
    Ok(bare.into_iter().map(number).collect())
}

/// Says what is forgotten from now on. Returns which checkpoints need a snapshot first, if some do.
async fn forget(
    db: &mut SqliteConnection,
    thread: &Thread,
    before: u64,
    snapshots: &BTreeMap<u64, Channels>,
) -> Result<Option<Vec<u64>>, Fault> {
    let before = before.max(horizon(db, thread).await?);
    let mut needs = bare_bases(db, thread, before).await?;
    for base in &needs {
        if let Some(snapshot) = snapshots.get(base) {
            sqlx::query(
                "update graph_checkpoint set snapshot = ?3 where thread = ?1 and number = ?2",
            )
            .bind(thread.key)
            .bind(int(*base))
            .bind(json_text(snapshot)?)
            .execute(&mut *db)
            .await?;
        }
    }
    needs.retain(|base| !snapshots.contains_key(base));
    if !needs.is_empty() {
        return Ok(Some(needs));
    }
    sqlx::query(
        "update graph_checkpoint set fate = case when number = ?3 then 1 end \
         where thread = ?1 and number < ?2 and (number = ?3 or fate = 1)",
    )
    .bind(thread.key)
    .bind(int(before))
    .bind(int(thread.record.checkpoint))
    .execute(&mut *db)
    .await?;
    if thread.branches > 1 {
        let newly_gone = sqlx::query(
            "insert into graph_branch (thread, branch, from_branch, checkpoint, gone) \
             select ?1, branch, 0, 0, 1 from graph_checkpoint where thread = ?1 \
             group by branch having max(number) < ?2 and branch <> ?3 \
             on conflict (thread, branch) do update set gone = 1 where not gone",
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
                "update graph_checkpoint set fate = null where thread = ?1 and fate = 2 \
                 and branch in (select branch from graph_branch where thread = ?1 and gone)",
            )
            .bind(thread.key)
            .execute(&mut *db)
            .await?;
        }
    }
    sqlx::query("update graph_thread set horizon = ?2 where thread = ?1 and ?2 > 0")
        .bind(thread.key)
        .bind(int(before))
        .execute(db)
        .await?;
    Ok(None)
}

/// Cleans up a batch of forgotten checkpoints. Returns how many, and whether there may be more.
async fn clean(db: &mut SqliteConnection, thread: &Thread) -> Result<(u64, bool), Fault> {
    let rows = sqlx::query(
        "select c.branch, c.number, length(c.appends) from graph_checkpoint c where c.thread = ?1 and c.fate is null \
         and c.number < (select horizon from graph_thread where thread = ?1) order by c.branch, c.number limit ?2",
    )
    .bind(thread.key)
    .bind(crate::stored::rows(BATCH))
    .fetch_all(&mut *db)
    .await?;
    let mut old: Vec<Old> = Vec::with_capacity(rows.len());
    for row in &rows {
        let next = Old {
            branch: small(row.try_get(0)?),
            number: number(row.try_get(1)?),
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
    let forks = history::forks(db, thread).await?;
    let gone = history::gone(db, thread).await?;
    let folding = fold(&old, thread.branches, &forks, &gone);
    let mut unneeded = folding.unneeded;
    for chunk in &folding.chunks {
        let Some((last, others)) = chunk.split_last() else {
            continue;
        };
        let appends = if others.is_empty() {
            None
        } else {
            unneeded.extend(others);
            Some(json_text(&together(db, thread, chunk).await?)?)
        };
        sqlx::query(
            "update graph_checkpoint set fate = 2, plan = 'null', source = null, changes = null, snapshot = null, \
             appends = coalesce(?3, appends) where thread = ?1 and number = ?2",
        )
        .bind(thread.key)
        .bind(int(*last))
        .bind(appends)
        .execute(&mut *db)
        .await?;
    }
    sqlx::query(
        "delete from graph_checkpoint where thread = ?1 and number in (select value from json_each(?2))",
    )
    .bind(thread.key)
    .bind(json_text(&unneeded)?)
    .execute(&mut *db)
    .await?;
    let numbers: Vec<u64> = old.iter().map(|row| row.number).collect();
    sqlx::query(
        "delete from graph_write where thread = ?1 and checkpoint in (select value from json_each(?2))",
    )
    .bind(thread.key)
    .bind(json_text(&numbers)?)
    .execute(db)
    .await?;
    Ok((rows.len() as u64, rows.len() >= BATCH))
}

/// The newest row of what was cleaned up before on the same branch, if more can be put to it.
async fn newest_chunk(
    db: &mut SqliteConnection,
    thread: &Thread,
    next: &Old,
) -> Result<Option<Old>, Fault> {
    let row = sqlx::query(
        "select number, length(appends) from graph_checkpoint \
         where thread = ?1 and branch = ?2 and number < ?3 and fate = 2 order by number desc limit 1",
    )
    .bind(thread.key)
    .bind(i64::from(next.branch))
    .bind(int(next.number))
    .fetch_optional(db)
    .await?;
    let Some(row) = row else {
        return Ok(None);
    };
    let bytes: Option<i64> = row.try_get(1)?;
    let chunk = Old {
        branch: next.branch,
        number: number(row.try_get(0)?),
        bytes: bytes.map(number),
    };
    Ok(Some(chunk).filter(|chunk| chunk.bytes.is_some_and(|bytes| bytes < CHUNK)))
}

/// What some checkpoints appended, in their order.
async fn together(
    db: &mut SqliteConnection,
    thread: &Thread,
    numbers: &[u64],
) -> Result<Channels, Fault> {
    let rows = sqlx::query(
        "select number, appends from graph_checkpoint where thread = ?1 and appends is not null \
         and number in (select value from json_each(?2)) order by number",
    )
    .bind(thread.key)
    .bind(json_text(numbers)?)
    .fetch_all(db)
    .await?;
    let mut all = Channels::new();
    for row in &rows {
        let what = format!(
            "checkpoint {} of thread {}",
            row.try_get::<i64, _>(0)?,
            thread.record.id
        );
        append_items(&mut all, from_json(row.try_get(1)?, &what)?);
    }
    Ok(all)
}

async fn copy(
    db: &mut SqliteConnection,
    from: &ThreadId,
    to: &ThreadId,
    now: i64,
) -> Result<Copied, Fault> {
    let Some(original) = threads::find(db, from).await? else {
        return Ok(Copied::UnknownThread);
    };
    let key: Option<i64> = sqlx::query_scalar(
        "insert into graph_thread (id, graph, priority, status, branch, checkpoint, step, last_checkpoint, branches, \
             last_signal, unread, revivals, due_at, created_at, updated_at, error, output, horizon) \
         select ?2, graph, priority, case when status >= 3 then status else 0 end, branch, checkpoint, step, \
             last_checkpoint, branches, last_signal, unread, revivals, \
             case when status < 3 or revivals > 0 then ?3 end, ?3, ?3, error, output, horizon \
         from graph_thread where thread = ?1 on conflict (id) do nothing returning thread",
    )
    .bind(original.key)
    .bind(to.as_str())
    .bind(now)
    .fetch_optional(&mut *db)
    .await?;
    let Some(key) = key else {
        return Ok(Copied::Existing);
    };
    for statement in [
        "insert into graph_input (thread, input) select ?2, input from graph_input where thread = ?1",
        "insert into graph_branch (thread, branch, from_branch, checkpoint, gone) \
         select ?2, branch, from_branch, checkpoint, gone from graph_branch where thread = ?1",
        "insert into graph_checkpoint (thread, number, branch, parent, step, at, source, plan, appends, changes, snapshot, fate) \
         select ?2, number, branch, parent, step, at, source, plan, appends, changes, snapshot, fate \
         from graph_checkpoint where thread = ?1 order by number",
        "insert into graph_write (thread, checkpoint, digest, task, kind, name, round, value) \
         select ?2, checkpoint, digest, task, kind, name, round, value from graph_write where thread = ?1",
        "insert into graph_signal (thread, number, digest, revives, kind, key, payload, at) \
         select ?2, number, digest, revives, kind, key, payload, at from graph_signal where thread = ?1",
    ] {
        sqlx::query(statement)
            .bind(original.key)
            .bind(key)
            .execute(&mut *db)
            .await?;
    }
    Ok(Copied::New)
}

/// The threads that a filter means.
async fn select(
    db: &mut SqliteConnection,
    filter: &DeleteFilter,
    limit: usize,
    now: i64,
) -> Result<Vec<ThreadId>, Fault> {
    let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
        "select t.id from graph_thread t where (t.status < 3 or t.due_at is null)",
    );
    query.push(concat!(" and ", status_of_thread!(), " in ("));
    let mut list = query.separated(", ");
    for status in filter.statuses() {
        list.push_bind(i64::from(status_code(status)));
    }
    query.push(")");
    choose(&mut query, &filter.graphs, filter.prefix.as_deref())?;
    if let Some(age) = filter.unchanged_for {
        query
            .push(" and t.updated_at < ")
            .push_bind(now.saturating_sub(micros(age)));
    }
    query
        .push(" order by t.id limit ")
        .push_bind(crate::stored::rows(limit));
    let found: Vec<String> = query.build_query_scalar().fetch_all(db).await?;
    Ok(found.into_iter().map(ThreadId::from).collect())
}

/// Narrows a query to graphs and to a prefix of ids.
fn choose(
    query: &mut QueryBuilder<Sqlite>,
    graphs: &[String],
    prefix: Option<&str>,
) -> Result<(), StorageError> {
    if !graphs.is_empty() {
        query
            .push(" and t.graph in (select value from json_each(")
            .push_bind(json_text(graphs)?)
            .push("))");
    }
    if let Some(prefix) = prefix {
        threads::with_prefix(query, prefix);
    }
    Ok(())
}

async fn survey(db: &mut SqliteConnection, filter: &SurveyFilter) -> Result<Vec<Surveyed>, Fault> {
    let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(concat!(
        "select t.id, t.graph, ",
        status_of_thread!(),
        ", t.last_checkpoint - coalesce(t.horizon, 1) + 1 from graph_thread t where true"
    ));
    choose(&mut query, &filter.graphs, filter.prefix.as_deref())?;
    if let Some(after) = &filter.after {
        query
            .push(" and t.id > ")
            .push_bind(after.as_str().to_owned());
    }
    query
        .push(" order by t.id limit ")
        .push_bind(crate::stored::rows(filter.limit));
    let rows = query.build().fetch_all(db).await?;
    rows.iter()
        .map(|row| {
            Ok(Surveyed {
                id: row.try_get::<String, _>(0)?.into(),
                graph: row.try_get(1)?,
                status: status_from(row.try_get(2)?)?,
                checkpoints: number(row.try_get(3)?),
            })
        })
        .collect()
}

/// Takes a batch of rows of deleted threads (of one, or of any) out of the file. Returns whether there is more.
async fn collect(db: &mut SqliteConnection, thread: Option<i64>) -> Result<bool, Fault> {
    let mut room = crate::stored::rows(BATCH);
    loop {
        let next: Option<i64> = sqlx::query_scalar(
            "select thread from graph_garbage where ?1 is null or thread = ?1 limit 1",
        )
        .bind(thread)
        .fetch_optional(&mut *db)
        .await?;
        let Some(next) = next else {
            return Ok(false);
        };
        for delete in [
            "delete from graph_checkpoint where rowid in (select rowid from graph_checkpoint where thread = ?1 limit ?2)",
            "delete from graph_write where rowid in (select rowid from graph_write where thread = ?1 limit ?2)",
            "delete from graph_signal where rowid in (select rowid from graph_signal where thread = ?1 limit ?2)",
            "delete from graph_input where thread = ?1 and ?2 > 0",
            "delete from graph_branch where thread = ?1 and branch in \
             (select branch from graph_branch where thread = ?1 limit ?2)",
        ] {
            let gone = sqlx::query(delete)
                .bind(next)
                .bind(room)
                .execute(&mut *db)
                .await?
                .rows_affected();
            room -= int(gone);
            if room <= 0 {
                return Ok(true);
            }
        }
        sqlx::query("delete from graph_garbage where thread = ?1")
            .bind(next)
            .execute(&mut *db)
            .await?;
    }
}
