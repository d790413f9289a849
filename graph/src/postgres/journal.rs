//! The journal. How cursors stay in the order in which entries become visible is told in the migration, beside the
//! functions that see to it.

use sqlx::{PgConnection, Row, postgres::PgRow};

use super::{
    rows::{optional, string},
    values::{Jsonb, Time, text},
};
use crate::{
    checkpoint::{Appended, Entry, JournalFilter, NewEvent},
    ids::{Cursor, ThreadId},
    stored::{self, Fault, digest, int, number},
};

pub(super) async fn append(
    db: &mut PgConnection,
    id: &str,
    event: &NewEvent,
) -> Result<Appended, Fault> {
    let new: bool = sqlx::query_scalar("select graph_append($1, $2, $3, $4, $5)")
        .bind(digest(id))
        .bind(text(&event.stream))
        .bind(text(&event.name))
        .bind(Jsonb::of(&event.payload)?)
        .bind(event.thread.as_ref().map(|thread| text(thread.as_str())))
        .fetch_one(db)
        .await?;
    Ok(if new {
        Appended::New
    } else {
        Appended::Duplicate
    })
}

pub(super) async fn read(
    db: &mut PgConnection,
    filter: &JournalFilter,
    after: Cursor,
    limit: usize,
) -> Result<Vec<Entry>, Fault> {
    let streams: Option<Vec<_>> = (!filter.streams.is_empty())
        .then(|| filter.streams.iter().map(|name| text(name)).collect());
    let found = sqlx::query("select cursor, stream, number, name, payload, thread, at from graph_read_journal($1, $2, $3, $4)")
        .bind(int(after.0))
        .bind(stored::rows(limit))
        .bind(streams)
        .bind(filter.thread.as_ref().map(|thread| text(thread.as_str())))
        .fetch_all(db)
        .await?;
    let cursors = found
        .iter()
        .map(|row| Ok(Cursor(number(row.try_get(0)?))))
        .collect::<Result<Vec<_>, Fault>>()?;
    stored::readable_entries(
        cursors
            .into_iter()
            .zip(&found)
            .map(|(at, row)| (at, entry(at, row))),
    )
}

fn entry(cursor: Cursor, row: &PgRow) -> Result<Entry, Fault> {
    Ok(Entry {
        cursor,
        stream: string(row, 1)?,
        number: number(row.try_get(2)?),
        name: string(row, 3)?,
        payload: row.try_get::<Jsonb, _>(4)?.parse("its payload")?,
        thread: optional(row, 5)?.map(ThreadId::from),
        at: row.try_get::<Time, _>(6)?.0,
    })
}

pub(super) async fn end(db: &mut PgConnection) -> Result<Cursor, Fault> {
    let end: i64 = sqlx::query_scalar("select graph_journal_end()")
        .fetch_one(db)
        .await?;
    Ok(Cursor(number(end)))
}
