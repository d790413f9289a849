//! Supersteps that do nothing but make a checkpoint, which most do: all that wait are written by the same few statements.
//!
//! The driver runs statements on a thread of its own, and each call of it is a way there and back. That way takes longer than
//! the statement, so these make it once, with the beginning and the end of the transaction.

use std::collections::{BTreeMap, btree_map::Entry};

use serde_json::json;
use sqlx::{Row, SqliteConnection, sqlite::SqliteRow};

use crate::{
    checkpoint::{Commit, Lease, NewCheckpoint, Receipt, StorageError},
    ids::ThreadId,
    stored::{Fault, channels_text, json_text, number, source_text, time},
};

/// `?1`: the steps, each an array as [`row`] makes it; `?2`: now. A step whose fence does not hold (see [`super::commit`]), or
/// that is not on the tip, writes nothing and is not returned.
macro_rules! write {
    () => {
        "insert into graph_checkpoint (thread, number, branch, parent, step, at, source, plan, appends, changes, snapshot) \
         select t.thread, t.last_checkpoint + 1, t.branch, t.checkpoint, s.value ->> 4, ?2, s.value ->> 5, s.value ->> 6, \
         s.value ->> 7, s.value ->> 8, s.value ->> 9 from json_each(?1) s cross join graph_thread t on t.id = s.value ->> 0 \
         and t.token = s.value ->> 1 and t.owner is not null and t.branch = s.value ->> 2 and t.checkpoint = s.value ->> 3; \
         update graph_thread as t set checkpoint = t.last_checkpoint + 1, last_checkpoint = t.last_checkpoint + 1, \
         step = s.step, takeovers = 0, updated_at = ?2 from (select value ->> 0 as id, value ->> 1 as token, \
         value ->> 2 as branch, value ->> 3 as parent, value ->> 4 as step from json_each(?1)) s where t.id = s.id \
         and t.token = s.token and t.owner is not null and t.branch = s.branch and t.checkpoint = s.parent \
         returning id, checkpoint, last_signal, cancel"
    };
}

/// The steps of a batch that can be written together, as the database reads them.
#[derive(Default)]
pub(super) struct Steps {
    /// The places of their commits in the batch.
    places: BTreeMap<ThreadId, usize>,
    rows: Vec<serde_json::Value>,
}

impl Steps {
    /// Takes a commit, if it is such a step, and the first one of its thread.
    pub fn take(&mut self, place: usize, lease: &Lease, commit: &Commit) {
        let Some(new) = commit.only_checkpoint() else {
            return;
        };
        // What cannot be stored is refused where it is alone.
        if let Ok(row) = row(lease, new)
            && let Entry::Vacant(entry) = self.places.entry(lease.thread.clone())
        {
            entry.insert(place);
            self.rows.push(row);
        }
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Writes them in a transaction of their own. A failure leaves the connection in any state: it must be closed.
    pub async fn write_alone(
        &self,
        db: &mut SqliteConnection,
        now: i64,
    ) -> Result<Vec<(usize, Receipt)>, Fault> {
        self.run(db, concat!("begin immediate; ", write!(), "; commit"), now)
            .await
    }

    /// Writes them in the transaction of the caller. There are receipts for those that were not refused.
    pub async fn write(
        &self,
        db: &mut SqliteConnection,
        now: i64,
    ) -> Result<Vec<(usize, Receipt)>, Fault> {
        self.run(db, write!(), now).await
    }

    async fn run(
        &self,
        db: &mut SqliteConnection,
        sql: &'static str,
        now: i64,
    ) -> Result<Vec<(usize, Receipt)>, Fault> {
        let rows = sqlx::query(sql)
            .bind(json_text(&self.rows)?)
            .bind(now)
            .fetch_all(db)
            .await?;
        rows.iter()
            .map(|row| {
                let thread: &str = row.try_get(0)?;
                let place = self
                    .places
                    .get(thread)
                    .ok_or_else(|| StorageError::Corrupt {
                        what: format!(
                            "a step of thread {thread} was written, which nobody asked for"
                        ),
                    })?;
                Ok((*place, receipt(row, now)?))
            })
            .collect()
    }
}

fn row(lease: &Lease, new: &NewCheckpoint) -> Result<serde_json::Value, StorageError> {
    Ok(json!([
        lease.thread.as_str(),
        lease.token,
        new.branch,
        new.parent,
        new.step,
        source_text(&new.source),
        json_text(&new.plan)?,
        channels_text(&new.appends)?,
        channels_text(&new.changes)?,
        new.snapshot.as_ref().map(json_text).transpose()?,
    ]))
}

fn receipt(row: &SqliteRow, now: i64) -> Result<Receipt, Fault> {
    Ok(Receipt {
        checkpoint: Some(number(row.try_get(1)?)),
        released: false,
        mail: number(row.try_get(2)?),
        cancel: row.try_get(3)?,
        undelivered: Vec::new(),
        now: time(now),
    })
}
