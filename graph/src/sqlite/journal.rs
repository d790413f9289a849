//! The journal. There is one writer at a time, so its rows become visible in the order of their cursors.

use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection, sqlite::SqliteRow};

use crate::{
    checkpoint::{Appended, Entry, JournalFilter, NewEvent},
    ids::{Cursor, ThreadId},
    stored::{self, Fault, digest, from_json, int, json_text, number, time},
};

async fn insert(
    db: &mut SqliteConnection,
    id: Option<&str>,
    event: &NewEvent,
    now: i64,
) -> Result<(), Fault> {
    let row = sqlx::query(
        "insert into graph_stream (name, last) values (?1, 1) on conflict (name) do update set last = last + 1 \
         returning stream, last",
    )
    .bind(&event.stream)
    .fetch_one(&mut *db)
    .await?;
    sqlx::query(
        "insert into graph_journal (stream, number, at, name, thread, digest, payload) values (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )
    .bind(row.try_get::<i64, _>(0)?)
    .bind(row.try_get::<i64, _>(1)?)
    .bind(now)
    .bind(&event.name)
    .bind(event.thread.as_ref().map(ThreadId::as_str))
    .bind(id.map(|id| digest(id).as_bytes().to_vec()))
    .bind(json_text(&event.payload)?)
    .execute(db)
    .await?;
    Ok(())
}

pub(super) async fn append_all(
    db: &mut SqliteConnection,
    events: &[NewEvent],
    now: i64,
) -> Result<(), Fault> {
    for event in events {
        insert(db, None, event, now).await?;
    }
    Ok(())
}

pub(super) async fn append(
    db: &mut SqliteConnection,
    id: &str,
    event: &NewEvent,
    now: i64,
) -> Result<Appended, Fault> {
    let there: bool =
        sqlx::query_scalar("select exists (select 1 from graph_journal where digest = ?1)")
            .bind(digest(id).as_bytes().as_slice())
            .fetch_one(&mut *db)
            .await?;
    if there {
        return Ok(Appended::Duplicate);
    }
    insert(db, Some(id), event, now).await?;
    Ok(Appended::New)
}

pub(super) async fn read(
    db: &mut SqliteConnection,
    filter: &JournalFilter,
    after: Cursor,
    limit: usize,
) -> Result<Vec<Entry>, Fault> {
    let mut query: QueryBuilder<Sqlite> = QueryBuilder::new(
        "select j.cursor, s.name, j.number, j.name, j.payload, j.thread, j.at \
         from graph_journal j join graph_stream s on s.stream = j.stream where j.cursor > ",
    );
    query.push_bind(int(after.0));
    if !filter.streams.is_empty() {
        query.push(" and j.stream in (select stream from graph_stream where name in (");
        let mut names = query.separated(", ");
        for name in &filter.streams {
            names.push_bind(name);
        }
        query.push("))");
    }
    if let Some(thread) = &filter.thread {
        query.push(" and j.thread = ").push_bind(thread.as_str());
    }
    query
        .push(" order by j.cursor limit ")
        .push_bind(stored::rows(limit));
    let found = query.build().fetch_all(db).await?;
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

fn entry(cursor: Cursor, row: &SqliteRow) -> Result<Entry, Fault> {
    Ok(Entry {
        cursor,
        stream: row.try_get(1)?,
        number: number(row.try_get(2)?),
        name: row.try_get(3)?,
        payload: from_json(row.try_get(4)?, "its payload")?,
        thread: row.try_get::<Option<String>, _>(5)?.map(ThreadId::from),
        at: time(row.try_get(6)?),
    })
}

pub(super) async fn end(db: &mut SqliteConnection) -> Result<Cursor, Fault> {
    let last: Option<i64> = sqlx::query_scalar("select max(cursor) from graph_journal")
        .fetch_one(db)
        .await?;
    Ok(last.map_or(Cursor::START, |last| Cursor(number(last))))
}
