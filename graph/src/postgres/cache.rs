//! The cache of the results of nodes, beside the threads.

use std::collections::BTreeMap;

use async_trait::async_trait;
use serde_json::Value;
use sqlx::{PgPool, Row};
use uuid::Uuid;

use super::limits::Limits;
use crate::{
    cache::{Cache, CacheEntry, CacheLimits, CacheSpace, SWEEP_ROWS, Sweeps},
    checkpoint::StorageError,
    stored::{Fault, digest, from_json, json_text, micros, rows, space_digest},
};

pub(super) struct PostgresCache {
    pub pool: PgPool,
    pub limits: Limits,
    pub sweeps: Sweeps,
}

impl PostgresCache {
    async fn read(&self, space: &CacheSpace, keys: &[String]) -> Result<Vec<Option<Value>>, Fault> {
        let digests: Vec<Uuid> = keys.iter().map(|key| digest(key)).collect();
        let rows = sqlx::query(
            "select key, value::text from graph_cache \
             where space = $1 and key = any ($2) and (expires_at is null or expires_at > now())",
        )
        .bind(space_digest(space))
        .bind(&digests)
        .fetch_all(&self.pool)
        .await?;
        let what = format!("an entry in the cache of {space}");
        let mut found = BTreeMap::new();
        for row in &rows {
            let key: Uuid = row.try_get(0)?;
            let value: Value = from_json(row.try_get(1)?, &what)?;
            found.insert(key, value);
        }
        Ok(digests
            .iter()
            .map(|digest| found.get(digest).cloned())
            .collect())
    }

    async fn write(
        &self,
        space: &CacheSpace,
        entries: &[CacheEntry],
        limits: CacheLimits,
    ) -> Result<(), Fault> {
        // By key: a row is written once, and all writers lock rows in one order.
        let mut by_key = BTreeMap::new();
        for entry in entries {
            by_key.insert(
                digest(&entry.key),
                (json_text(&entry.value)?, entry.ttl.map(micros)),
            );
        }
        let mut keys: Vec<Uuid> = Vec::new();
        let mut values: Vec<String> = Vec::new();
        let mut ttls: Vec<Option<i64>> = Vec::new();
        for (key, (value, ttl)) in by_key {
            keys.push(key);
            values.push(value);
            ttls.push(ttl);
        }
        let put = (keys.len(), values.iter().map(String::len).sum());
        // Times far away are never: an interval has its limits.
        sqlx::query(
            "insert into graph_cache (space, key, expires_at, size, value) \
             select $1, e.key, case when e.ttl < 1000000::bigint * 86400 * 36500 then now() + e.ttl * interval '1 microsecond' end, \
             octet_length(e.value), e.value::json \
             from unnest($2::uuid[], $3::text[], $4::bigint[]) as e (key, value, ttl) order by e.key \
             on conflict (space, key) do update set \
             put_at = excluded.put_at, expires_at = excluded.expires_at, size = excluded.size, value = excluded.value",
        )
        .bind(space_digest(space))
        .bind(&keys)
        .bind(&values)
        .bind(&ttls)
        .execute(&self.pool)
        .await?;
        if self.sweeps.is_due(space, limits, put) {
            self.sweep(space, limits).await?;
        }
        Ok(())
    }

    async fn sweep(&self, space: &CacheSpace, limits: CacheLimits) -> Result<(), Fault> {
        // What somebody else is at is left to them.
        sqlx::query(
            "delete from graph_cache c using \
             (select space, key from graph_cache where expires_at <= now() order by expires_at limit $1 for update skip locked) gone \
             where c.space = gone.space and c.key = gone.key",
        )
        .bind(rows(SWEEP_ROWS))
        .execute(&self.pool)
        .await?;
        sqlx::query(
            "delete from graph_cache c using ( \
             select key from ( \
             select key, put_at, row_number() over w as place, sum(size) over w as bytes from graph_cache where space = $1 \
             window w as (order by put_at desc, key rows unbounded preceding) \
             ) ranked where place > $2 or bytes > $3 order by put_at limit $4 \
             ) old where c.space = $1 and c.key = old.key",
        )
        .bind(space_digest(space))
        .bind(rows(limits.entries))
        .bind(rows(limits.bytes))
        .bind(rows(SWEEP_ROWS))
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

#[async_trait]
impl Cache for PostgresCache {
    async fn get(
        &self,
        space: &CacheSpace,
        keys: &[String],
    ) -> Result<Vec<Option<Value>>, StorageError> {
        self.limits
            .long(self.read(space, keys))
            .await
            .map_err(|fault| fault.during(&format!("reading the cache of {space}")))
    }

    async fn put(
        &self,
        space: &CacheSpace,
        entries: Vec<CacheEntry>,
        limits: CacheLimits,
    ) -> Result<(), StorageError> {
        self.limits
            .long(self.write(space, &entries, limits))
            .await
            .map_err(|fault| fault.during(&format!("writing to the cache of {space}")))
    }

    async fn clear(&self, space: &CacheSpace) -> Result<u64, StorageError> {
        let run = async {
            let gone = sqlx::query("delete from graph_cache where space = $1")
                .bind(space_digest(space))
                .execute(&self.pool)
                .await?;
            Ok(gone.rows_affected())
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during(&format!("clearing the cache of {space}")))
    }
}
