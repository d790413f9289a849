//! Checkpoints and branches: writing them, and reading state back.

use std::collections::BTreeMap;

use serde_json::json;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use super::{rows::Thread, threads};
use crate::{
    checkpoint::{
        Channels, CheckpointRecord, HistoryFilter, NewCheckpoint, StateRow, StateRows,
        StorageError, StoredPart,
    },
    ids::ThreadId,
    stored::{
        self, Fault, Fork, HISTORY_LIMIT, Segment, channels_text, from_json, int, json_text,
        lineage, number, small, source_from, source_text, time,
    },
};

pub(super) async fn insert(
    db: &mut SqliteConnection,
    thread: i64,
    number: u64,
    branch: u32,
    new: &NewCheckpoint,
    now: i64,
) -> Result<(), Fault> {
    sqlx::query(
        "insert into graph_checkpoint (thread, number, branch, parent, step, at, source, plan, appends, changes, snapshot) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)",
    )
    .bind(thread)
    .bind(int(number))
    .bind(i64::from(branch))
    .bind(int(new.parent))
    .bind(int(new.step))
    .bind(now)
    .bind(source_text(&new.source))
    .bind(json_text(&new.plan)?)
    .bind(channels_text(&new.appends)?)
    .bind(channels_text(&new.changes)?)
    .bind(new.snapshot.as_ref().map(json_text).transpose()?)
    .execute(db)
    .await?;
    Ok(())
}

/// Whether the checkpoint `c` of thread `?1` has not been forgotten.
macro_rules! is_there {
    () => {
        "(c.number >= coalesce((select h.horizon from graph_thread h where h.thread = ?1), 0) or c.fate = 1)"
    };
}
pub(super) use is_there;

pub(super) async fn known(db: &mut SqliteConnection, thread: &ThreadId) -> Result<Thread, Fault> {
    threads::find(db, thread)
        .await?
        .ok_or_else(|| StorageError::UnknownThread(thread.clone()).into())
}

pub(super) async fn forks(db: &mut SqliteConnection, thread: &Thread) -> Result<Vec<Fork>, Fault> {
    if thread.branches <= 1 {
        return Ok(Vec::new());
    }
    sqlx::query("select branch, from_branch, checkpoint from graph_branch where thread = ?1")
        .bind(thread.key)
        .fetch_all(db)
        .await?
        .iter()
        .map(|row| {
            Ok(Fork {
                branch: small(row.try_get(0)?),
                from_branch: small(row.try_get(1)?),
                checkpoint: number(row.try_get(2)?),
            })
        })
        .collect()
}

/// Segments as the JSON that the queries below join with: rows of a branch and a highest number.
fn segments_text(way: &[Segment]) -> String {
    json!(
        way.iter()
            .map(|segment| (segment.branch, int(segment.upto)))
            .collect::<Vec<_>>()
    )
    .to_string()
}

/// Rows on the way to a checkpoint: `?1` is the thread, `?2` the segments, `?3` the highest number.
macro_rules! on_the_way {
    ($columns:literal, $tail:literal) => {
        concat!(
            "select ",
            $columns,
            " from graph_checkpoint c where c.thread = ?1 and c.number <= ?3 and exists (select 1 from json_each(?2) s \
             where s.value ->> 0 = c.branch and s.value ->> 1 >= c.number) ",
            $tail
        )
    };
}

pub(super) async fn state_at(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    checkpoint: Option<u64>,
) -> Result<StateRows, Fault> {
    let found = known(db, thread).await?;
    let (branch, checkpoint) = match checkpoint {
        None => (found.record.branch, found.record.checkpoint),
        Some(0) => (0, 0),
        Some(wanted) => (branch_of(db, &found, wanted).await?, wanted),
    };
    state_on(db, &found, branch, checkpoint).await
}

async fn branch_of(
    db: &mut SqliteConnection,
    thread: &Thread,
    checkpoint: u64,
) -> Result<u32, Fault> {
    if checkpoint == 0 {
        return Ok(0);
    }
    let branch: Option<i64> = sqlx::query_scalar(concat!(
        "select c.branch from graph_checkpoint c where c.thread = ?1 and c.number = ?2 and ",
        is_there!()
    ))
    .bind(thread.key)
    .bind(int(checkpoint))
    .fetch_optional(db)
    .await?;
    branch.map(small).ok_or_else(|| {
        StorageError::UnknownCheckpoint {
            thread: thread.record.id.clone(),
            checkpoint,
        }
        .into()
    })
}

/// The state at a checkpoint whose branch is known.
pub(super) async fn state_on(
    db: &mut SqliteConnection,
    thread: &Thread,
    branch: u32,
    checkpoint: u64,
) -> Result<StateRows, Fault> {
    if checkpoint == 0 {
        return Ok(stored::state_rows(0, branch, 0, None, None, Vec::new()));
    }
    let id = &thread.record.id;
    let unreadable = |fault: Fault| fault.in_part(id, StoredPart::Checkpoint(checkpoint));
    let tip =
        sqlx::query("select step, plan from graph_checkpoint where thread = ?1 and number = ?2")
            .bind(thread.key)
            .bind(int(checkpoint))
            .fetch_optional(&mut *db)
            .await?
            .ok_or_else(|| StorageError::Unreadable {
                thread: id.clone(),
                part: StoredPart::Checkpoint(checkpoint),
                what: "it is missing".to_owned(),
            })?;
    let way = lineage(&forks(db, thread).await?, branch, checkpoint);
    let segments = segments_text(&way);
    let newest_snapshot: Option<i64> = sqlx::query_scalar(on_the_way!(
        "c.number",
        "and c.snapshot is not null order by c.number desc limit 1"
    ))
    .bind(thread.key)
    .bind(&segments)
    .bind(int(checkpoint))
    .fetch_optional(&mut *db)
    .await?;
    let rows = sqlx::query(on_the_way!(
        "c.number, c.appends, case when c.number >= ?4 then c.changes end, case when c.number = ?4 then c.snapshot end",
        "and (c.number >= ?4 or c.appends is not null) order by c.number"
    ))
    .bind(thread.key)
    .bind(&segments)
    .bind(int(checkpoint))
    .bind(newest_snapshot.unwrap_or(0))
    .fetch_all(db)
    .await?
    .iter()
    .map(|row| {
        let number = number(row.try_get(0)?);
        state_row(row).map_err(|fault| fault.in_part(id, StoredPart::Checkpoint(number)))
    })
    .collect::<Result<_, Fault>>()?;
    let plan = tip.try_get(1).map_err(Fault::from);
    let plan = plan.and_then(|text| Ok(from_json(text, "its plan")?));
    Ok(stored::state_rows(
        checkpoint,
        branch,
        number(tip.try_get(0)?),
        Some(plan.map_err(unreadable)?),
        newest_snapshot.map(number),
        rows,
    ))
}

fn state_row(row: &SqliteRow) -> Result<StateRow, Fault> {
    let channels = |index: usize, what: &str| -> Result<Option<Channels>, Fault> {
        let text: Option<&str> = row.try_get(index)?;
        Ok(text.map(|text| from_json(text, what)).transpose()?)
    };
    Ok(StateRow {
        checkpoint: number(row.try_get(0)?),
        appends: channels(1, "what it appended")?.unwrap_or_default(),
        changes: channels(2, "what it changed")?.unwrap_or_default(),
        snapshot: channels(3, "its snapshot")?,
        kept: None,
    })
}

pub(super) async fn list(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    filter: &HistoryFilter,
) -> Result<Vec<CheckpointRecord>, Fault> {
    let found = known(db, thread).await?;
    let upto = filter
        .before
        .map_or(u64::MAX, |before| before.saturating_sub(1));
    let way = match filter.branch {
        Some(branch) => {
            exists(db, &found, branch).await?;
            lineage(&forks(db, &found).await?, branch, u64::MAX)
        }
        None => (0..found.branches)
            .map(|branch| Segment {
                branch,
                upto: u64::MAX,
            })
            .collect(),
    };
    sqlx::query(on_the_way!(
        "c.number, c.parent, c.branch, c.step, c.source, c.plan, c.at",
        "and (c.number >= coalesce((select h.horizon from graph_thread h where h.thread = ?1), 0) or c.fate = 1) \
         order by c.number desc limit ?4"
    ))
    .bind(found.key)
    .bind(segments_text(&way))
    .bind(int(upto))
    .bind(stored::rows(filter.limit.unwrap_or(HISTORY_LIMIT)))
    .fetch_all(db)
    .await?
    .iter()
    .map(|row| {
        let checkpoint = number(row.try_get(0)?);
        Ok(CheckpointRecord {
            checkpoint,
            parent: number(row.try_get(1)?),
            branch: small(row.try_get(2)?),
            step: number(row.try_get(3)?),
            source: row
                .try_get(4)
                .map_err(Fault::from)
                .and_then(|text| Ok(source_from(text)?))
                .map_err(|fault| fault.in_part(thread, StoredPart::Checkpoint(checkpoint)))?,
            // Whoever looks for a checkpoint to go back to must see the others; reading this one says what is wrong with it.
            plan: row
                .try_get(5)
                .ok()
                .and_then(|text| from_json(text, "its plan").ok())
                .unwrap_or_default(),
            at: time(row.try_get(6)?),
        })
    })
    .collect()
}

async fn exists(db: &mut SqliteConnection, thread: &Thread, branch: u32) -> Result<(), Fault> {
    if branch < thread.branches && !gone(db, thread).await?.contains(&branch) {
        return Ok(());
    }
    Err(StorageError::UnknownBranch {
        thread: thread.record.id.clone(),
        branch,
    }
    .into())
}

/// The branches of which nothing is left.
pub(super) async fn gone(db: &mut SqliteConnection, thread: &Thread) -> Result<Vec<u32>, Fault> {
    if thread.branches <= 1 {
        return Ok(Vec::new());
    }
    let gone: Vec<i64> =
        sqlx::query_scalar("select branch from graph_branch where thread = ?1 and gone")
            .bind(thread.key)
            .fetch_all(db)
            .await?;
    Ok(gone.into_iter().map(small).collect())
}

pub(super) async fn fork(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    new: &NewCheckpoint,
    now: i64,
) -> Result<(u32, u64), Fault> {
    let found = known(db, thread).await?;
    let from = branch_of(db, &found, new.parent).await?;
    let number: i64 = sqlx::query_scalar(
        "update graph_thread set branches = branches + 1, last_checkpoint = last_checkpoint + 1, updated_at = ?2 \
         where thread = ?1 returning last_checkpoint",
    )
    .bind(found.key)
    .bind(now)
    .fetch_one(&mut *db)
    .await?;
    let number = stored::number(number);
    let branch = found.branches;
    sqlx::query("insert into graph_branch (thread, branch, from_branch, checkpoint) values (?1, ?2, ?3, ?4)")
        .bind(found.key)
        .bind(i64::from(branch))
        .bind(i64::from(from))
        .bind(int(new.parent))
        .execute(&mut *db)
        .await?;
    insert(db, found.key, number, branch, new, now).await?;
    Ok((branch, number))
}

pub(super) async fn set_head(
    db: &mut SqliteConnection,
    thread: &ThreadId,
    branch: u32,
    now: i64,
) -> Result<(), Fault> {
    let found = known(db, thread).await?;
    exists(db, &found, branch).await?;
    let tip = sqlx::query(
        "select number, step from graph_checkpoint where thread = ?1 and branch = ?2 order by number desc limit 1",
    )
    .bind(found.key)
    .bind(i64::from(branch))
    .fetch_optional(&mut *db)
    .await?;
    let (checkpoint, step): (i64, i64) = match tip {
        Some(row) => (row.try_get(0)?, row.try_get(1)?),
        None => (0, 0),
    };
    let token: i64 = sqlx::query_scalar(
        "update graph_counter set value = value + 1 where name = 'token' returning value",
    )
    .fetch_one(&mut *db)
    .await?;
    sqlx::query(
        "update graph_thread set branch = ?2, checkpoint = ?3, step = ?4, token = ?5, status = 0, owner = null, due_at = ?6, \
         wake_at = null, error = null, output = null, waits = null, updated_at = ?6 where thread = ?1",
    )
    .bind(found.key)
    .bind(i64::from(branch))
    .bind(checkpoint)
    .bind(step)
    .bind(token)
    .bind(now)
    .execute(db)
    .await?;
    Ok(())
}

pub(super) async fn branches(
    db: &mut SqliteConnection,
    thread: &ThreadId,
) -> Result<BTreeMap<u32, u64>, Fault> {
    let found = known(db, thread).await?;
    let mut tips: BTreeMap<u32, u64> = (0..found.branches).map(|branch| (branch, 0)).collect();
    let rows = sqlx::query(
        "select branch, max(number) from graph_checkpoint where thread = ?1 group by branch",
    )
    .bind(found.key)
    .fetch_all(&mut *db)
    .await?;
    for row in rows {
        tips.insert(small(row.try_get(0)?), number(row.try_get(1)?));
    }
    for branch in gone(db, &found).await? {
        tips.remove(&branch);
    }
    Ok(tips)
}
