//! Documents, in the file of the threads.
//!
//! Numbers are compared as decimal text by a collation of our own: SQLite's own numbers would round what is larger than 64 bits
//! with a sign can hold. Text is compared by its bytes, which in UTF-8 is by code point.

use std::sync::Arc;

use async_trait::async_trait;
use sqlx::{QueryBuilder, Row, Sqlite, SqliteConnection, SqlitePool, sqlite::SqliteRow};

use super::{
    now,
    writer::{Writer, begin},
};
use crate::{
    checkpoint::StorageError,
    documents::{
        Condition, Document, DocumentKey, DocumentStore, DocumentWrite, Namespace, NamespaceFilter,
        Scalar, Search, check_keys, check_writes, compare_numbers,
        sql::{COLUMNS, Dialect, json_path, push_prefix, push_search},
    },
    stored::{Fault, from_json, micros, rows, time},
};

/// The name of the collation that compares numbers.
const NUMBERS: &str = "graph_number";

pub(super) struct SqliteDocuments {
    pub writer: Arc<Writer>,
    pub readers: SqlitePool,
}

#[async_trait]
impl DocumentStore for SqliteDocuments {
    async fn write(&self, writes: Vec<DocumentWrite>) -> Result<(), StorageError> {
        let texts = check_writes(&writes)?;
        let run = async {
            let mut writing = self.writer.write().await?;
            let now = now();
            for (write, text) in writes.iter().zip(texts) {
                apply(&mut writing, write, text, now).await?;
            }
            writing.finish().await
        };
        run.await
            .map_err(|fault: Fault| fault.during("writing documents"))
    }

    async fn get(
        &self,
        keys: &[DocumentKey],
        refresh: bool,
    ) -> Result<Vec<Option<Document>>, StorageError> {
        check_keys(keys)?;
        let run = async {
            if refresh {
                let mut writing = self.writer.write().await?;
                let now = now();
                for key in keys {
                    touch(&mut writing, &key.namespace.path(), &key.key, now).await?;
                }
                let found = read(&mut writing, keys, now).await?;
                writing.finish().await?;
                return Ok(found);
            }
            let mut reading = begin(&self.readers, "begin").await?;
            read(&mut reading, keys, now()).await
        };
        run.await
            .map_err(|fault: Fault| fault.during("reading documents"))
    }

    async fn search(&self, search: &Search) -> Result<Vec<Document>, StorageError> {
        search.check()?;
        let run = async {
            if search.refresh {
                let mut writing = self.writer.write().await?;
                let now = now();
                let mut found = find(&mut writing, search, now).await?;
                for document in &mut found {
                    let path = document.namespace.path();
                    let until = touch(&mut writing, &path, &document.key, now).await?;
                    document.expires_at = until.map(time);
                }
                writing.finish().await?;
                return Ok(found);
            }
            let mut reading = begin(&self.readers, "begin").await?;
            find(&mut reading, search, now()).await
        };
        run.await
            .map_err(|fault: Fault| fault.during("searching documents"))
    }

    async fn namespaces(&self, filter: &NamespaceFilter) -> Result<Vec<Namespace>, StorageError> {
        filter.prefix.check()?;
        let run = async {
            let mut reading = begin(&self.readers, "begin").await?;
            namespaces(&mut reading, filter, now()).await
        };
        run.await
            .map_err(|fault: Fault| fault.during("listing namespaces"))
    }

    async fn sweep(&self, limit: usize) -> Result<u64, StorageError> {
        let run = async {
            let mut writing = self.writer.write().await?;
            let gone = sqlx::query(
                "delete from graph_document where rowid in \
                 (select rowid from graph_document where expires_at <= ?1 order by expires_at limit ?2)",
            )
            .bind(now())
            .bind(rows(limit))
            .execute(&mut *writing)
            .await?
            .rows_affected();
            writing.finish().await?;
            Ok(gone)
        };
        run.await
            .map_err(|fault: Fault| fault.during("sweeping documents"))
    }
}

async fn apply(
    db: &mut SqliteConnection,
    write: &DocumentWrite,
    text: Option<String>,
    now: i64,
) -> Result<(), Fault> {
    match write {
        DocumentWrite::Put { at, ttl, .. } => {
            let ttl = ttl.map(micros);
            sqlx::query(
                "insert into graph_document as d (path, key, value, created_at, updated_at, ttl, expires_at) \
                 values (?1, ?2, ?3, ?4, ?4, ?5, ?6) on conflict (path, key) do update set \
                 value = excluded.value, ttl = excluded.ttl, expires_at = excluded.expires_at, updated_at = ?4, \
                 created_at = case when d.expires_at <= ?4 then ?4 else d.created_at end",
            )
            .bind(at.namespace.path())
            .bind(&at.key)
            .bind(text)
            .bind(now)
            .bind(ttl)
            .bind(ttl.map(|ttl| now.saturating_add(ttl)))
            .execute(db)
            .await?;
        }
        DocumentWrite::Delete { at } => {
            sqlx::query("delete from graph_document where path = ?1 and key = ?2")
                .bind(at.namespace.path())
                .bind(&at.key)
                .execute(db)
                .await?;
        }
    }
    Ok(())
}

/// Lets a document live on for its whole time to live. Returns until when, if it ends.
async fn touch(
    db: &mut SqliteConnection,
    path: &str,
    key: &str,
    now: i64,
) -> Result<Option<i64>, Fault> {
    let until: Option<i64> = sqlx::query_scalar(
        "update graph_document set expires_at = ?3 + ttl \
         where path = ?1 and key = ?2 and expires_at > ?3 returning expires_at",
    )
    .bind(path)
    .bind(key)
    .bind(now)
    .fetch_optional(db)
    .await?;
    Ok(until)
}

async fn read(
    db: &mut SqliteConnection,
    keys: &[DocumentKey],
    now: i64,
) -> Result<Vec<Option<Document>>, Fault> {
    let mut found = Vec::with_capacity(keys.len());
    for at in keys {
        let row = sqlx::query(
            "select path, key, value, created_at, updated_at, expires_at from graph_document \
             where path = ?1 and key = ?2 and (expires_at is null or expires_at > ?3)",
        )
        .bind(at.namespace.path())
        .bind(&at.key)
        .bind(now)
        .fetch_optional(&mut *db)
        .await?;
        found.push(row.as_ref().map(document).transpose()?);
    }
    Ok(found)
}

fn document(row: &SqliteRow) -> Result<Document, Fault> {
    let namespace = Namespace::from_path(row.try_get(0)?);
    let key: String = row.try_get(1)?;
    let what = format!("document {namespace}/{key}");
    Ok(Document {
        value: from_json(row.try_get(2)?, &what)?,
        namespace,
        key,
        created_at: time(row.try_get(3)?),
        updated_at: time(row.try_get(4)?),
        expires_at: row.try_get::<Option<i64>, _>(5)?.map(time),
    })
}

/// Narrows a query to a prefix of namespaces, and to what has not expired.
fn below(query: &mut QueryBuilder<Sqlite>, prefix: &Namespace, now: i64) {
    query
        .push("(d.expires_at is null or d.expires_at > ")
        .push_bind(now)
        .push(")");
    push_prefix(query, prefix);
}

async fn find(
    db: &mut SqliteConnection,
    search: &Search,
    now: i64,
) -> Result<Vec<Document>, Fault> {
    db.lock_handle()
        .await?
        .create_collation(NUMBERS, compare_numbers)?;
    let mut query: QueryBuilder<Sqlite> =
        QueryBuilder::new(format!("select {COLUMNS} from graph_document d where "));
    below(&mut query, &search.prefix, now);
    push_search(&mut query, search);
    let found = query.build().fetch_all(db).await?;
    found.iter().map(document).collect()
}

impl Dialect for Sqlite {
    fn stands(query: &mut QueryBuilder<Self>, condition: &Condition) {
        query
            .push("json_type(d.value, ")
            .push_bind(json_path(condition))
            .push(")");
    }

    fn case(query: &mut QueryBuilder<Self>, condition: &Condition) {
        query.push("case ");
        Self::stands(query, condition);
    }

    fn when(
        query: &mut QueryBuilder<Self>,
        condition: &Condition,
        operator: &'static str,
        with: &Scalar,
    ) {
        match with {
            Scalar::Null => {}
            Scalar::Bool(with) => {
                for (kind, value) in [("true", 1), ("false", 0)] {
                    query
                        .push(format_args!(" when '{kind}' then {value} {operator} "))
                        .push_bind(*with);
                }
            }
            Scalar::Number(with) => {
                for kind in ["integer", "real"] {
                    query
                        .push(format_args!(" when '{kind}' then (d.value -> "))
                        .push_bind(json_path(condition))
                        .push(format_args!(") {operator} "))
                        .push_bind(with.to_string())
                        .push(" collate ")
                        .push(NUMBERS);
                }
            }
            Scalar::Text(with) => {
                query
                    .push(" when 'text' then (d.value ->> ")
                    .push_bind(json_path(condition))
                    .push(format_args!(") {operator} "))
                    .push_bind(with.clone());
            }
        }
    }

    fn spelled(text: String) -> String {
        text
    }
}

/// One after the other: each is found by a look into the index, however many documents are between them.
async fn namespaces(
    db: &mut SqliteConnection,
    filter: &NamespaceFilter,
    now: i64,
) -> Result<Vec<Namespace>, Fault> {
    let depth = filter.depth.unwrap_or(usize::MAX).max(1);
    let mut found = Vec::new();
    let mut seen = 0;
    let mut from = filter.prefix.path();
    while found.len() < filter.limit() {
        let mut query: QueryBuilder<Sqlite> =
            QueryBuilder::new("select d.path from graph_document d where ");
        below(&mut query, &filter.prefix, now);
        query.push(" and d.path >= ").push_bind(from);
        query.push(" order by d.path limit 1");
        let next: Option<String> = query.build_query_scalar().fetch_optional(&mut *db).await?;
        let Some(next) = next else { break };
        let whole = Namespace::from_path(&next);
        let cut = whole.cut(depth);
        from = if cut == whole && depth > whole.labels().len() {
            // Those below it come next.
            format!("{next}\u{1}")
        } else {
            cut.path_after().unwrap_or(next)
        };
        seen += 1;
        if seen > filter.offset {
            found.push(cut);
        }
    }
    Ok(found)
}
