//! The cache of the results of nodes, in the file of the threads.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;
use sqlx::{Row, SqliteConnection, SqlitePool};

use super::{
    now,
    writer::{Writer, begin},
};
use crate::{
    cache::{Cache, CacheEntry, CacheLimits, CacheSpace, SWEEP_ROWS, Sweeps},
    checkpoint::StorageError,
    stored::{Fault, digest, from_json, int, json_text, micros, rows, space_digest},
};

pub(super) struct SqliteCache {
    pub writer: Arc<Writer>,
    pub readers: SqlitePool,
    pub sweeps: Sweeps,
}

#[async_trait]
impl Cache for SqliteCache {
    async fn get(
        &self,
        space: &CacheSpace,
        keys: &[String],
    ) -> Result<Vec<Option<Value>>, StorageError> {
        let run = async {
            let mut reading = begin(&self.readers, "begin").await?;
            let mut found = Vec::with_capacity(keys.len());
            for key in keys {
                found.push(read(&mut reading, space, key).await?);
            }
            Ok(found)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("reading the cache of {space}")))
    }

    async fn put(
        &self,
        space: &CacheSpace,
        entries: Vec<CacheEntry>,
        limits: CacheLimits,
    ) -> Result<(), StorageError> {
        let run = async {
            let mut texts = Vec::with_capacity(entries.len());
            for entry in &entries {
                texts.push((entry, json_text(&entry.value)?));
            }
            let mut writing = self.writer.write().await?;
            let now = now();
            let mut bytes = 0;
            for (entry, text) in texts {
                bytes += text.len();
                write(&mut writing, space, entry, &text, now).await?;
            }
            if self.sweeps.is_due(space, limits, (entries.len(), bytes)) {
                sweep(&mut writing, space, limits, now).await?;
            }
            writing.finish().await
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("writing to the cache of {space}")))
    }

    async fn clear(&self, space: &CacheSpace) -> Result<u64, StorageError> {
        let run = async {
            let mut writing = self.writer.write().await?;
            let gone = sqlx::query("delete from graph_cache where space = ?1")
                .bind(space_digest(space).as_bytes().as_slice())
                .execute(&mut *writing)
                .await?
                .rows_affected();
            writing.finish().await?;
            Ok(gone)
        };
        run.await
            .map_err(|fault: Fault| fault.during(&format!("clearing the cache of {space}")))
    }
}

async fn read(
    db: &mut SqliteConnection,
    space: &CacheSpace,
    key: &str,
) -> Result<Option<Value>, Fault> {
    let row = sqlx::query(
        "select value from graph_cache where space = ?1 and key = ?2 and (expires_at is null or expires_at > ?3)",
    )
    .bind(space_digest(space).as_bytes().as_slice())
    .bind(digest(key).as_bytes().as_slice())
    .bind(now())
    .fetch_optional(db)
    .await?;
    let Some(row) = row else { return Ok(None) };
    let what = format!("an entry in the cache of {space}");
    Ok(Some(from_json(row.try_get(0)?, &what)?))
}

async fn write(
    db: &mut SqliteConnection,
    space: &CacheSpace,
    entry: &CacheEntry,
    text: &str,
    now: i64,
) -> Result<(), Fault> {
    // Replacing gives a new row id, so that the entry is the youngest again.
    sqlx::query(
        "insert or replace into graph_cache (space, key, expires_at, size, value) values (?1, ?2, ?3, ?4, ?5)",
    )
    .bind(space_digest(space).as_bytes().as_slice())
    .bind(digest(&entry.key).as_bytes().as_slice())
    .bind(entry.ttl.map(|ttl| now.saturating_add(micros(ttl))))
    .bind(int(text.len() as u64))
    .bind(text)
    .execute(db)
    .await?;
    Ok(())
}

async fn sweep(
    db: &mut SqliteConnection,
    space: &CacheSpace,
    limits: CacheLimits,
    now: i64,
) -> Result<(), Fault> {
    sqlx::query(
        "delete from graph_cache where rowid in \
         (select rowid from graph_cache where expires_at <= ?1 order by expires_at limit ?2)",
    )
    .bind(now)
    .bind(rows(SWEEP_ROWS))
    .execute(&mut *db)
    .await?;
    sqlx::query(
        "delete from graph_cache where rowid in ( \
         select id from ( \
         select rowid as id, row_number() over w as place, sum(size) over w as bytes from graph_cache where space = ?1 \
         window w as (order by rowid desc rows unbounded preceding) \
         ) where place > ?2 or bytes > ?3 order by id limit ?4)",
    )
    .bind(space_digest(space).as_bytes().as_slice())
    .bind(rows(limits.entries))
    .bind(rows(limits.bytes))
    .bind(rows(SWEEP_ROWS))
    .execute(db)
    .await?;
    Ok(())
}
