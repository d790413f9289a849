//! Long-term memory: documents, in the database of the threads.
//!
//! Numbers are compared as `numeric`, which is exact. Text is compared by code point; see [`text_value`] for the one character that
//! PostgreSQL cannot hold.

use std::collections::BTreeMap;

use async_trait::async_trait;
use sqlx::{PgConnection, PgPool, Postgres, QueryBuilder, Row, postgres::PgRow};

use super::{
    DEADLOCK_ATTEMPTS, connection, is_transient,
    limits::Limits,
    rows::string,
    values::{Jsonb, Time, nul, text},
};
use crate::{
    checkpoint::StorageError,
    documents::{
        Condition, Document, DocumentKey, DocumentStore, DocumentWrite, Namespace, NamespaceFilter,
        Scalar, Search, check_keys, check_writes,
        sql::{COLUMNS, Dialect, json_path, push_page, push_prefix, push_search},
    },
    stored::{Fault, micros, rows},
};

pub(super) struct PostgresDocuments {
    pub pool: PgPool,
    pub limits: Limits,
}

#[async_trait]
impl DocumentStore for PostgresDocuments {
    async fn write(&self, writes: Vec<DocumentWrite>) -> Result<(), StorageError> {
        check_writes(&writes)?;
        let mut attempt = 1;
        loop {
            let run = async {
                let mut db = super::begin(&self.pool, self.limits, "begin").await?;
                apply(&mut db, &writes).await?;
                Ok(db.commit().await?)
            };
            match self.limits.long(run).await {
                // Another batch with the same documents.
                Err(Fault::Database(error))
                    if attempt < DEADLOCK_ATTEMPTS && is_transient(&error) =>
                {
                    attempt += 1;
                }
                result => {
                    return result.map_err(|fault: Fault| fault.during("writing documents"));
                }
            }
        }
    }

    async fn get(
        &self,
        keys: &[DocumentKey],
        refresh: bool,
    ) -> Result<Vec<Option<Document>>, StorageError> {
        check_keys(keys)?;
        let run = async {
            let mut db = connection(&self.pool).await?;
            get(&mut db, keys, refresh).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("reading documents"))
    }

    async fn search(&self, search: &Search) -> Result<Vec<Document>, StorageError> {
        search.check()?;
        let run = async {
            let mut db = connection(&self.pool).await?;
            let mut found = find(&mut db, search).await?;
            if search.refresh {
                let names: Vec<DocumentKey> = found
                    .iter()
                    .map(|found| DocumentKey::new(&found.namespace, &found.key))
                    .collect();
                let touched = touch(&mut db, &names).await?;
                for row in &touched {
                    let (path, key) = (string(row, 0)?, string(row, 1)?);
                    let namespace = Namespace::from_path(&path);
                    let document = found
                        .iter_mut()
                        .find(|found| found.namespace == namespace && found.key == key);
                    if let Some(document) = document {
                        document.expires_at = row.try_get::<Option<Time>, _>(2)?.map(|at| at.0);
                    }
                }
            }
            Ok(found)
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("searching documents"))
    }

    async fn namespaces(&self, filter: &NamespaceFilter) -> Result<Vec<Namespace>, StorageError> {
        filter.prefix.check()?;
        let run = async {
            let mut db = connection(&self.pool).await?;
            namespaces(&mut db, filter).await
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("listing namespaces"))
    }

    async fn sweep(&self, limit: usize) -> Result<u64, StorageError> {
        let run = async {
            let mut db = connection(&self.pool).await?;
            let gone = sqlx::query(
                "with gone as ( \
                     select path, key from graph_document where expires_at <= now() order by expires_at limit $1 \
                     for update skip locked \
                 ) delete from graph_document d using gone where d.path = gone.path and d.key = gone.key",
            )
            .bind(rows(limit))
            .execute(&mut *db)
            .await?;
            Ok(gone.rows_affected())
        };
        self.limits
            .long(run)
            .await
            .map_err(|fault: Fault| fault.during("sweeping documents"))
    }
}

fn path(namespace: &Namespace) -> String {
    text(&namespace.path()).into_owned()
}

/// The last write to each document, in the order of their names: two batches lock them in the same order.
async fn apply(db: &mut PgConnection, writes: &[DocumentWrite]) -> Result<(), Fault> {
    let last: BTreeMap<&DocumentKey, &DocumentWrite> = writes
        .iter()
        .map(|write| match write {
            DocumentWrite::Put { at, .. } | DocumentWrite::Delete { at } => (at, write),
        })
        .collect();
    let (paths, keys) = columns(last.keys().copied());
    if last.len() > 1 {
        sqlx::query(
            "select 1 from graph_document d join unnest($1::text[], $2::text[]) as k (path, key) \
                 on d.path = k.path and d.key = k.key order by d.path, d.key for update of d",
        )
        .bind(&paths)
        .bind(&keys)
        .fetch_all(&mut *db)
        .await?;
    }
    let mut put: (Vec<&DocumentKey>, Vec<Jsonb>, Vec<Option<i64>>) = Default::default();
    let mut gone = Vec::new();
    for (at, write) in last {
        match write {
            DocumentWrite::Put { value, ttl, .. } => {
                put.0.push(at);
                put.1.push(Jsonb::of(value)?);
                put.2.push(ttl.map(|ttl| micros(ttl).min(LONGEST)));
            }
            DocumentWrite::Delete { .. } => gone.push(at),
        }
    }
    if !put.0.is_empty() {
        let (paths, keys) = columns(put.0.into_iter());
        sqlx::query(
            "insert into graph_document as d (path, key, value, ttl, expires_at) \
             select k.path, k.key, k.value, k.ttl, now() + k.ttl * interval '1 microsecond' \
             from unnest($1::text[], $2::text[], $3::jsonb[], $4::bigint[]) with ordinality \
                 as k (path, key, value, ttl, ord) order by k.ord \
             on conflict (path, key) do update set value = excluded.value, ttl = excluded.ttl, \
                 expires_at = excluded.expires_at, updated_at = now(), \
                 created_at = case when d.expires_at <= now() then now() else d.created_at end",
        )
        .bind(paths)
        .bind(keys)
        .bind(put.1)
        .bind(put.2)
        .execute(&mut *db)
        .await?;
    }
    if !gone.is_empty() {
        let (paths, keys) = columns(gone.into_iter());
        sqlx::query(
            "delete from graph_document d using unnest($1::text[], $2::text[]) as k (path, key) \
             where d.path = k.path and d.key = k.key",
        )
        .bind(paths)
        .bind(keys)
        .execute(db)
        .await?;
    }
    Ok(())
}

/// Names of documents, as the two arrays that the statements take.
fn columns<'a>(keys: impl Iterator<Item = &'a DocumentKey>) -> (Vec<String>, Vec<String>) {
    keys.map(|at| (path(&at.namespace), text(&at.key).into_owned()))
        .unzip()
}

/// The longest time to live: ten thousand years, which is for ever and can be added to now.
const LONGEST: i64 = 10_000 * 366 * 86_400 * 1_000_000;

/// Lets documents live on for their whole time to live. Returns of those that end which they are, and when.
async fn touch(db: &mut PgConnection, keys: &[DocumentKey]) -> Result<Vec<PgRow>, Fault> {
    let (paths, keys) = columns(keys.iter());
    // The rows are locked in one order, whoever asks.
    Ok(sqlx::query(
        "with k as ( \
             select d.path, d.key from graph_document d join unnest($1::text[], $2::text[]) as k (path, key) \
                 on d.path = k.path and d.key = k.key \
             where d.expires_at > now() order by d.path, d.key for update of d \
         ) update graph_document d set expires_at = now() + d.ttl * interval '1 microsecond' \
         from k where d.path = k.path and d.key = k.key returning d.path, d.key, d.expires_at",
    )
    .bind(paths)
    .bind(keys)
    .fetch_all(db)
    .await?)
}

async fn get(
    db: &mut PgConnection,
    keys: &[DocumentKey],
    refresh: bool,
) -> Result<Vec<Option<Document>>, Fault> {
    if refresh {
        touch(db, keys).await?;
    }
    let (paths, names) = columns(keys.iter());
    let found = sqlx::query(
        "select d.path, d.key, d.value, d.created_at, d.updated_at, d.expires_at, k.ord \
         from unnest($1::text[], $2::text[]) with ordinality as k (path, key, ord) \
         join graph_document d on d.path = k.path and d.key = k.key \
         where d.expires_at is null or d.expires_at > now()",
    )
    .bind(paths)
    .bind(names)
    .fetch_all(db)
    .await?;
    let mut documents = vec![None; keys.len()];
    for row in &found {
        let at = usize::try_from(row.try_get::<i64, _>(6)? - 1).unwrap_or(usize::MAX);
        if let Some(place) = documents.get_mut(at) {
            *place = Some(document(row)?);
        }
    }
    Ok(documents)
}

fn document(row: &PgRow) -> Result<Document, Fault> {
    let namespace = Namespace::from_path(&string(row, 0)?);
    let key = string(row, 1)?;
    let what = format!("document {namespace}/{key}");
    Ok(Document {
        value: row.try_get::<Jsonb, _>(2)?.parse(&what)?,
        namespace,
        key,
        created_at: row.try_get::<Time, _>(3)?.0,
        updated_at: row.try_get::<Time, _>(4)?.0,
        expires_at: row.try_get::<Option<Time>, _>(5)?.map(|at| at.0),
    })
}

/// Narrows a query to a prefix of namespaces, and to what has not expired.
fn below(query: &mut QueryBuilder<Postgres>, prefix: &Namespace) {
    query.push("(d.expires_at is null or d.expires_at > now())");
    push_prefix(query, prefix);
}

async fn find(db: &mut PgConnection, search: &Search) -> Result<Vec<Document>, Fault> {
    let mut query: QueryBuilder<Postgres> =
        QueryBuilder::new(format!("select {COLUMNS} from graph_document d where "));
    below(&mut query, &search.prefix);
    push_search(&mut query, search);
    let found = query.build().fetch_all(db).await?;
    found.iter().map(document).collect()
}

impl Dialect for Postgres {
    fn stands(query: &mut QueryBuilder<Self>, condition: &Condition) {
        // Strict, so that lists are not looked into; and silent about what is not there.
        let path = format!("strict {}", text(&json_path(condition)));
        query
            .push("jsonb_path_query_first(d.value, ")
            .push_bind(path)
            .push("::jsonpath, '{}', true)");
    }

    fn case(query: &mut QueryBuilder<Self>, condition: &Condition) {
        // In a case, because nothing else keeps the database from trying to make a number of a text.
        query.push("case jsonb_typeof(");
        Self::stands(query, condition);
        query.push(")");
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
                query.push(" when 'boolean' then ");
                Self::stands(query, condition);
                query
                    .push(format_args!("::boolean {operator} "))
                    .push_bind(*with);
            }
            Scalar::Number(with) => {
                query.push(" when 'number' then ");
                Self::stands(query, condition);
                query
                    .push(format_args!("::numeric {operator} "))
                    .push_bind(with.to_string())
                    .push("::numeric");
            }
            Scalar::Text(with) => {
                query.push(" when 'string' then ");
                text_value(query, |query| {
                    Self::stands(query, condition);
                    query.push(" #>> '{}'");
                });
                query.push(format_args!(" {operator} "));
                text_value(query, |query| {
                    query.push_bind(text(with).into_owned());
                });
            }
        }
    }

    fn spelled(given: String) -> String {
        text(&given).into_owned()
    }
}

/// Text to be compared: split where U+0000 would be, which is stored as two other characters. What is before it decides first, and
/// if that is the same, the shorter list is less: as if the character were there, being less than all others.
fn text_value(query: &mut QueryBuilder<Postgres>, value: impl FnOnce(&mut QueryBuilder<Postgres>)) {
    query.push("string_to_array(");
    value(query);
    query.push(", ").push_bind(nul()).push(") collate \"C\"");
}

/// Distinct beginnings of paths.
async fn namespaces(
    db: &mut PgConnection,
    filter: &NamespaceFilter,
) -> Result<Vec<Namespace>, Fault> {
    let depth = filter.depth.unwrap_or(usize::MAX).max(1);
    let mut query: QueryBuilder<Postgres> =
        QueryBuilder::new("select distinct array_to_string((string_to_array(d.path, chr(31)))[1:");
    // A path ends with the end of its last label, behind which there is one more, empty part.
    query
        .push_bind(i32::try_from(depth).unwrap_or(i32::MAX))
        .push("], chr(31)) as cut from graph_document d where ");
    below(&mut query, &filter.prefix);
    query.push(" order by cut");
    push_page(&mut query, filter.limit(), filter.offset);
    let found = query.build().fetch_all(db).await?;
    found
        .iter()
        .map(|row| Ok(Namespace::from_path(&string(row, 0)?)))
        .collect()
}
