//! One way to SQLite and PostgreSQL: a query is written once as a sea-query statement and runs on both.
//!
//! Not here: any table. Columns are only ever text, 64-bit integers, doubles and booleans, which both databases agree on;
//! times are milliseconds in columns named `*_ms`, JSON is text.

use std::future::Future;

use jiff::Timestamp;
use sea_query::{
    Expr, InsertStatement, OnConflict, PostgresQueryBuilder, Query, SqliteQueryBuilder, Value,
};
use sea_query_sqlx::{SqlxBinder, SqlxValues};
use serde::de::DeserializeOwned;
use sqlx::postgres::{PgPool, PgRow};
use sqlx::sqlite::{SqlitePool, SqliteRow};
use sqlx::{AssertSqlSafe, Postgres, Row as _, Sqlite, Transaction};
use tracing::Instrument as _;

use crate::{Error, Result};

/// A pool of connections to either database.
#[derive(Clone, Debug)]
pub enum Db {
    /// An embedded file.
    Sqlite(SqlitePool),
    /// A server.
    Postgres(PgPool),
}

/// Which SQL is spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Dialect {
    Sqlite,
    Postgres,
}

/// A transaction; dropping it without [`Tx::commit`] takes everything back.
pub enum Tx {
    /// Begun with `BEGIN IMMEDIATE`, so that it never has to be upgraded, and never fails for that.
    Sqlite(Transaction<'static, Sqlite>),
    /// On a server, read committed.
    Postgres(Transaction<'static, Postgres>),
}

/// One row of an answer.
pub enum Row {
    /// From SQLite.
    Sqlite(SqliteRow),
    /// From PostgreSQL.
    Postgres(PgRow),
}

fn build(statement: &impl SqlxBinder, dialect: Dialect) -> (String, SqlxValues) {
    let (sql, mut values) = match dialect {
        Dialect::Sqlite => statement.build_sqlx(SqliteQueryBuilder),
        Dialect::Postgres => statement.build_sqlx(PostgresQueryBuilder),
    };
    // PostgreSQL cannot store U+0000 in text. A message that holds one must not stop a projection for ever.
    for value in &mut values.0.0 {
        if let Value::String(Some(text)) = value
            && text.contains('\0')
        {
            *text = text.replace('\0', "\u{FFFD}");
        }
    }
    (sql, values)
}

fn span(sql: &str) -> tracing::Span {
    tracing::debug_span!("db", sql)
}

impl Db {
    fn dialect(&self) -> Dialect {
        match self {
            Self::Sqlite(_) => Dialect::Sqlite,
            Self::Postgres(_) => Dialect::Postgres,
        }
    }

    /// Runs a statement by itself; says how many rows it changed.
    pub fn execute(
        &self,
        statement: &impl SqlxBinder,
    ) -> impl Future<Output = Result<u64>> + Send + '_ {
        let (sql, values) = build(statement, self.dialect());
        let span = span(&sql);
        async move {
            Ok(match self {
                Self::Sqlite(pool) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .execute(pool)
                    .await?
                    .rows_affected(),
                Self::Postgres(pool) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .execute(pool)
                    .await?
                    .rows_affected(),
            })
        }
        .instrument(span)
    }

    /// All rows of a query.
    pub fn fetch_all(
        &self,
        statement: &impl SqlxBinder,
    ) -> impl Future<Output = Result<Vec<Row>>> + Send + '_ {
        let (sql, values) = build(statement, self.dialect());
        let span = span(&sql);
        async move {
            Ok(match self {
                Self::Sqlite(pool) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .fetch_all(pool)
                    .await?
                    .into_iter()
                    .map(Row::Sqlite)
                    .collect(),
                Self::Postgres(pool) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .fetch_all(pool)
                    .await?
                    .into_iter()
                    .map(Row::Postgres)
                    .collect(),
            })
        }
        .instrument(span)
    }

    /// All rows of a query, each as it is read.
    pub(crate) async fn read<T>(
        &self,
        statement: &(impl SqlxBinder + Sync),
        read: impl FnMut(&Row) -> Result<T>,
    ) -> Result<Vec<T>> {
        self.fetch_all(statement).await?.iter().map(read).collect()
    }

    /// The first row of a query, if it has one.
    pub async fn fetch_optional(
        &self,
        statement: &(impl SqlxBinder + Sync),
    ) -> Result<Option<Row>> {
        Ok(self.fetch_all(statement).await?.into_iter().next())
    }

    /// Begins a transaction that will write.
    pub async fn begin(&self) -> Result<Tx> {
        Ok(match self {
            Self::Sqlite(pool) => Tx::Sqlite(pool.begin_with("BEGIN IMMEDIATE").await?),
            Self::Postgres(pool) => Tx::Postgres(pool.begin().await?),
        })
    }

    /// The database's own clock, in milliseconds: what leases and expiries go by, so that two machines agree.
    pub fn now_ms(&self) -> Expr {
        now_ms(self.dialect())
    }
}

fn now_ms(dialect: Dialect) -> Expr {
    Expr::cust(match dialect {
        Dialect::Sqlite => "CAST(unixepoch('subsec') * 1000 AS INTEGER)",
        Dialect::Postgres => "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS BIGINT)",
    })
}

impl Tx {
    fn dialect(&self) -> Dialect {
        match self {
            Self::Sqlite(_) => Dialect::Sqlite,
            Self::Postgres(_) => Dialect::Postgres,
        }
    }

    /// Runs a statement; says how many rows it changed.
    pub fn execute(
        &mut self,
        statement: &impl SqlxBinder,
    ) -> impl Future<Output = Result<u64>> + Send + '_ {
        let (sql, values) = build(statement, self.dialect());
        let span = span(&sql);
        async move {
            Ok(match self {
                Self::Sqlite(tx) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .execute(&mut **tx)
                    .await?
                    .rows_affected(),
                Self::Postgres(tx) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .execute(&mut **tx)
                    .await?
                    .rows_affected(),
            })
        }
        .instrument(span)
    }

    /// All rows of a query.
    pub fn fetch_all(
        &mut self,
        statement: &impl SqlxBinder,
    ) -> impl Future<Output = Result<Vec<Row>>> + Send + '_ {
        let (sql, values) = build(statement, self.dialect());
        let span = span(&sql);
        async move {
            Ok(match self {
                Self::Sqlite(tx) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .fetch_all(&mut **tx)
                    .await?
                    .into_iter()
                    .map(Row::Sqlite)
                    .collect(),
                Self::Postgres(tx) => sqlx::query_with(AssertSqlSafe(sql), values)
                    .fetch_all(&mut **tx)
                    .await?
                    .into_iter()
                    .map(Row::Postgres)
                    .collect(),
            })
        }
        .instrument(span)
    }

    /// The first row of a query, if it has one.
    pub async fn fetch_optional(
        &mut self,
        statement: &(impl SqlxBinder + Sync),
    ) -> Result<Option<Row>> {
        Ok(self.fetch_all(statement).await?.into_iter().next())
    }

    /// The database's own clock, in milliseconds.
    pub fn now_ms(&self) -> Expr {
        now_ms(self.dialect())
    }

    /// Makes everything durable.
    pub async fn commit(self) -> Result<()> {
        match self {
            Self::Sqlite(tx) => tx.commit().await?,
            Self::Postgres(tx) => tx.commit().await?,
        }
        Ok(())
    }
}

macro_rules! columns {
    ($($(#[$doc:meta])* $name:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        pub fn $name(&self, column: &str) -> Result<$type> {
            Ok(match self {
                Self::Sqlite(row) => row.try_get(column)?,
                Self::Postgres(row) => row.try_get(column)?,
            })
        }
    )*};
}

impl Row {
    columns! {
        /// A text.
        text: String;
        /// A text or null.
        opt_text: Option<String>;
        /// A number.
        int: i64;
        /// A number or null.
        opt_int: Option<i64>;
        /// A number with a fraction, or null.
        opt_double: Option<f64>;
        /// A truth value.
        flag: bool;
    }

    /// A time that was stored in milliseconds.
    pub fn time(&self, column: &'static str) -> Result<Timestamp> {
        timestamp(column, self.int(column)?)
    }

    /// A time that was stored in milliseconds, or null.
    pub fn opt_time(&self, column: &'static str) -> Result<Option<Timestamp>> {
        self.opt_int(column)?
            .map(|ms| timestamp(column, ms))
            .transpose()
    }

    /// A count, which is never negative.
    pub fn count(&self, column: &'static str) -> Result<u64> {
        let value = self.int(column)?;
        u64::try_from(value).map_err(|_| unreadable(column, &value))
    }

    /// A value that was stored as JSON.
    pub fn json<T: DeserializeOwned>(&self, column: &'static str) -> Result<T> {
        let text = self.text(column)?;
        serde_json::from_str(&text).map_err(|_| unreadable(column, &text))
    }

    /// A value that was stored as JSON, or null.
    pub fn opt_json<T: DeserializeOwned>(&self, column: &'static str) -> Result<Option<T>> {
        self.opt_text(column)?
            .map(|text| serde_json::from_str(&text).map_err(|_| unreadable(column, &text)))
            .transpose()
    }

    /// A value that was stored as the word that serde gives it.
    pub fn word<T: DeserializeOwned>(&self, column: &'static str) -> Result<T> {
        let text = self.text(column)?;
        serde_json::from_value(serde_json::Value::String(text.clone()))
            .map_err(|_| unreadable(column, &text))
    }
}

fn timestamp(column: &'static str, ms: i64) -> Result<Timestamp> {
    Timestamp::from_millisecond(ms).map_err(|_| unreadable(column, &ms))
}

fn unreadable(column: &'static str, value: &impl ToString) -> Error {
    Error::Unreadable {
        column,
        value: value.to_string().chars().take(80).collect(),
    }
}

/// Columns with their values, for [`insert`] and its kin.
pub(crate) type Columns = Vec<(&'static str, Expr)>;

/// `INSERT`; fails when the row is there.
pub(crate) fn insert(table: &'static str, columns: Columns) -> InsertStatement {
    let (names, values): (Vec<_>, Vec<_>) = columns.into_iter().unzip();
    Query::insert()
        .into_table(table)
        .columns(names)
        .values_panic(values)
        .take()
}

/// `INSERT … ON CONFLICT DO NOTHING`: changes no row when any constraint says that it is there.
pub(crate) fn insert_new(table: &'static str, columns: Columns) -> InsertStatement {
    insert(table, columns)
        .on_conflict(OnConflict::new().do_nothing().to_owned())
        .take()
}

/// `INSERT … ON CONFLICT (keys) DO UPDATE` of every other column.
pub(crate) fn upsert(
    table: &'static str,
    keys: &[&'static str],
    columns: Columns,
) -> InsertStatement {
    let others: Vec<&'static str> = columns
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| !keys.contains(name))
        .collect();
    insert(table, columns)
        .on_conflict(
            OnConflict::columns(keys.iter().copied())
                .update_columns(others)
                .to_owned(),
        )
        .take()
}

/// A value in a statement.
pub(crate) fn val(value: impl Into<Value>) -> Expr {
    Expr::val(value)
}

/// A time in milliseconds, as it is added to [`Db::now_ms`].
pub(crate) fn ms(duration: std::time::Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX / 4)
}

/// A number of another type as the databases hold it; what is too large becomes the largest.
pub(crate) fn int(value: impl TryInto<i64>) -> Expr {
    Expr::val(value.try_into().unwrap_or(i64::MAX))
}

/// The word that serde gives a value, such as `rolled_back`.
pub(crate) fn word(value: &impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(word)) => word,
        Ok(other) => other.to_string(),
        Err(_) => String::new(),
    }
}

/// JSON as text.
pub(crate) fn json(value: &impl serde::Serialize) -> String {
    serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned())
}
