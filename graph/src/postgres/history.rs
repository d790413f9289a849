//! Checkpoints and branches: reading state back, and forks.

use std::collections::BTreeMap;

use sqlx::{PgConnection, Row, postgres::PgRow};

use super::{
    rows::{Thread, count, optional, wide},
    threads,
    values::{Jsonb, Time, text},
};
use crate::{
    checkpoint::{
        Channels, CheckpointRecord, HistoryFilter, NewCheckpoint, StateRow, StateRows,
        StorageError, StoredPart,
    },
    ids::ThreadId,
    stored::{
        self, Fault, Fork, HISTORY_LIMIT, Segment, int, lineage, small, source_from, source_text,
    },
};

/// Whether the checkpoint `c` of thread `$1` has not been forgotten.
macro_rules! is_there {
    () => {
        "(c.number >= coalesce((select h.horizon from graph_thread h where h.thread = $1), 0) or c.fate = 1)"
    };
}
pub(super) use is_there;

pub(super) async fn known(db: &mut PgConnection, thread: &ThreadId) -> Result<Thread, Fault> {
    threads::find(db, thread)
        .await?
        .ok_or_else(|| StorageError::UnknownThread(thread.clone()).into())
}

pub(super) async fn locked(db: &mut PgConnection, thread: &ThreadId) -> Result<Thread, Fault> {
    threads::lock(db, thread)
        .await?
        .ok_or_else(|| StorageError::UnknownThread(thread.clone()).into())
}

pub(super) async fn forks(db: &mut PgConnection, thread: &Thread) -> Result<Vec<Fork>, Fault> {
    if thread.branches <= 1 {
        return Ok(Vec::new());
    }
    sqlx::query("select branch, from_branch, checkpoint from graph_branch where thread = $1")
        .bind(thread.key)
        .fetch_all(db)
        .await?
        .iter()
        .map(|row| {
            Ok(Fork {
                branch: count(row, 0)?,
                from_branch: count(row, 1)?,
                checkpoint: wide(row, 2)?,
            })
        })
        .collect()
}

fn branch_int(branch: u32) -> i32 {
    i32::try_from(branch).unwrap_or(i32::MAX)
}

/// The segments of a way, as the two arrays that the queries below take.
fn arrays(way: &[Segment]) -> (Vec<i32>, Vec<i64>) {
    way.iter()
        .map(|segment| (branch_int(segment.branch), int(segment.upto)))
        .unzip()
}

/// Rows on the way to a checkpoint: `$1` is the thread, `$2` and `$3` the segments, `$4` the highest number. A plain filter,
/// so that the primary key gives the order.
macro_rules! on_the_way {
    ($columns:literal, $tail:literal) => {
        concat!(
            "select ",
            $columns,
            " from graph_checkpoint c where c.thread = $1 and c.number <= $4 \
             and c.number <= ($3::bigint[])[array_position($2::int[], c.branch)] ",
            $tail
        )
    };
}

pub(super) async fn state_at(
    db: &mut PgConnection,
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

async fn branch_of(db: &mut PgConnection, thread: &Thread, checkpoint: u64) -> Result<u32, Fault> {
    if checkpoint == 0 {
        return Ok(0);
    }
    let branch: Option<i32> = sqlx::query_scalar(concat!(
        "select c.branch from graph_checkpoint c where c.thread = $1 and c.number = $2 and ",
        is_there!()
    ))
    .bind(thread.key)
    .bind(int(checkpoint))
    .fetch_optional(db)
    .await?;
    branch.map(|branch| small(branch.into())).ok_or_else(|| {
        StorageError::UnknownCheckpoint {
            thread: thread.record.id.clone(),
            checkpoint,
        }
        .into()
    })
}

/// The state at a checkpoint whose branch is known.
///
/// Perhaps not in one transaction. If the thread is pruned in between, rows from before may have lost what they changed; then one
/// of those after them has a snapshot, which is why all snapshots are read.
pub(super) async fn state_on(
    db: &mut PgConnection,
    thread: &Thread,
    branch: u32,
    checkpoint: u64,
) -> Result<StateRows, Fault> {
    if checkpoint == 0 {
        return Ok(stored::state_rows(0, branch, 0, None, None, Vec::new()));
    }
    let id = &thread.record.id;
    let missing = || StorageError::Unreadable {
        thread: id.clone(),
        part: StoredPart::Checkpoint(checkpoint),
        what: "it is missing".to_owned(),
    };
    let (branches, upto) = arrays(&lineage(&forks(db, thread).await?, branch, checkpoint));
    let newest_snapshot: Option<i32> = sqlx::query_scalar(on_the_way!(
        "c.number",
        "and c.snapshot is not null order by c.number desc limit 1"
    ))
    .bind(thread.key)
    .bind(&branches)
    .bind(&upto)
    .bind(int(checkpoint))
    .fetch_optional(&mut *db)
    .await?;
    let found = sqlx::query(on_the_way!(
        "c.number, c.appends, case when c.number >= $5 then c.changes end, case when c.number >= $5 then c.snapshot end, \
         c.step, case when c.number = $4 then c.plan::jsonb end",
        "and (c.number >= $5 or c.appends is not null) order by c.number"
    ))
    .bind(thread.key)
    .bind(&branches)
    .bind(&upto)
    .bind(int(checkpoint))
    .bind(newest_snapshot.unwrap_or(0))
    .fetch_all(db)
    .await?;
    let tip = found.last().ok_or_else(missing)?;
    let plan: Option<Jsonb> = tip.try_get(5)?;
    let plan = plan.ok_or_else(missing)?.parse("its plan");
    let plan =
        plan.map_err(|error| Fault::from(error).in_part(id, StoredPart::Checkpoint(checkpoint)))?;
    let rows = found
        .iter()
        .map(|row| {
            let number = wide(row, 0)?;
            state_row(row).map_err(|fault| fault.in_part(id, StoredPart::Checkpoint(number)))
        })
        .collect::<Result<_, Fault>>()?;
    Ok(stored::state_rows(
        checkpoint,
        branch,
        wide(tip, 4)?,
        Some(plan),
        newest_snapshot.map(|number| small(number.into()).into()),
        rows,
    ))
}

fn state_row(row: &PgRow) -> Result<StateRow, Fault> {
    let channels = |index: usize, what: &str| -> Result<Option<Channels>, Fault> {
        let stored: Option<Jsonb> = row.try_get(index)?;
        Ok(stored.map(|stored| stored.parse(what)).transpose()?)
    };
    Ok(StateRow {
        checkpoint: wide(row, 0)?,
        appends: channels(1, "what it appended")?.unwrap_or_default(),
        changes: channels(2, "what it changed")?.unwrap_or_default(),
        snapshot: channels(3, "its snapshot")?,
        kept: None,
    })
}

pub(super) async fn list(
    db: &mut PgConnection,
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
    let (branches, ends) = arrays(&way);
    sqlx::query(on_the_way!(
        "c.number, c.parent, c.branch, c.step, c.source, c.plan::jsonb, c.at",
        "and (c.number >= coalesce((select h.horizon from graph_thread h where h.thread = $1), 0) or c.fate = 1) \
         order by c.number desc limit $5"
    ))
    .bind(found.key)
    .bind(branches)
    .bind(ends)
    .bind(int(upto))
    .bind(stored::rows(filter.limit.unwrap_or(HISTORY_LIMIT)))
    .fetch_all(db)
    .await?
    .iter()
    .map(|row| {
        let checkpoint = wide(row, 0)?;
        Ok(CheckpointRecord {
            checkpoint,
            parent: wide(row, 1)?,
            branch: count(row, 2)?,
            step: wide(row, 3)?,
            source: source_from(optional(row, 4)?.as_deref())
                .map_err(|error| Fault::from(error).in_part(thread, StoredPart::Checkpoint(checkpoint)))?,
            plan: row.try_get::<Jsonb, _>(5)?.parse("its plan")?,
            at: row.try_get::<Time, _>(6)?.0,
        })
    })
    .collect()
}

async fn exists(db: &mut PgConnection, thread: &Thread, branch: u32) -> Result<(), Fault> {
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
pub(super) async fn gone(db: &mut PgConnection, thread: &Thread) -> Result<Vec<u32>, Fault> {
    if thread.branches <= 1 {
        return Ok(Vec::new());
    }
    let gone: Vec<i32> =
        sqlx::query_scalar("select branch from graph_branch where thread = $1 and gone")
            .bind(thread.key)
            .fetch_all(db)
            .await?;
    Ok(gone
        .into_iter()
        .map(|branch| small(branch.into()))
        .collect())
}

/// In the caller's transaction.
pub(super) async fn fork(
    db: &mut PgConnection,
    thread: &ThreadId,
    new: &NewCheckpoint,
) -> Result<(u32, u64), Fault> {
    let found = locked(db, thread).await?;
    let from = branch_of(db, &found, new.parent).await?;
    let row = sqlx::query(
        "update graph_thread set branches = branches + 1, last_checkpoint = last_checkpoint + 1, updated_at = now() \
         where thread = $1 returning last_checkpoint",
    )
    .bind(found.key)
    .fetch_one(&mut *db)
    .await?;
    let number = wide(&row, 0)?;
    let branch = found.branches;
    sqlx::query("insert into graph_branch (thread, branch, from_branch, checkpoint) values ($1, $2, $3, $4)")
        .bind(found.key)
        .bind(branch_int(branch))
        .bind(branch_int(from))
        .bind(int(new.parent))
        .execute(&mut *db)
        .await?;
    sqlx::query(
        "insert into graph_checkpoint (thread, number, parent, branch, step, source, plan, appends, changes, snapshot) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
    )
    .bind(found.key)
    .bind(int(number))
    .bind(int(new.parent))
    .bind(branch_int(branch))
    .bind(int(new.step))
    .bind(source_text(&new.source).map(|source| text(&source).into_owned()))
    .bind(Jsonb::of(&new.plan)?)
    .bind(Jsonb::channels(&new.appends)?)
    .bind(Jsonb::channels(&new.changes)?)
    .bind(new.snapshot.as_ref().map(Jsonb::of).transpose()?)
    .execute(db)
    .await?;
    Ok((branch, number))
}

/// In the caller's transaction.
pub(super) async fn set_head(
    db: &mut PgConnection,
    thread: &ThreadId,
    branch: u32,
) -> Result<(), Fault> {
    let found = locked(db, thread).await?;
    exists(db, &found, branch).await?;
    sqlx::query(
        "update graph_thread t set branch = $2, checkpoint = coalesce(c.number, 0), step = coalesce(c.step, 0), \
             token = nextval('graph_token'), status = 0, owner = null, due_at = now(), wake_at = null, error = null, \
             output = null, waits = null, updated_at = now() \
         from (select 1) one left join lateral ( \
             select number, step from graph_checkpoint where thread = $1 and branch = $2 order by number desc limit 1 \
         ) c on true where t.thread = $1",
    )
    .bind(found.key)
    .bind(branch_int(branch))
    .execute(db)
    .await?;
    Ok(())
}

pub(super) async fn branches(
    db: &mut PgConnection,
    thread: &ThreadId,
) -> Result<BTreeMap<u32, u64>, Fault> {
    let found = known(db, thread).await?;
    let mut tips: BTreeMap<u32, u64> = (0..found.branches).map(|branch| (branch, 0)).collect();
    let tip_rows = sqlx::query(
        "select branch, max(number) from graph_checkpoint where thread = $1 group by branch",
    )
    .bind(found.key)
    .fetch_all(&mut *db)
    .await?;
    for row in &tip_rows {
        tips.insert(count(row, 0)?, wide(row, 1)?);
    }
    for branch in gone(db, &found).await? {
        tips.remove(&branch);
    }
    Ok(tips)
}
