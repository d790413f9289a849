//! Databases for tests: a fresh file, or a fresh schema on the server that `ARTEL_TEST_DATABASE_URL` names.

// Each test binary uses a part of it.
#![allow(dead_code)]

pub mod delegate;
pub mod faulty;

use std::{path::PathBuf, time::Duration};

use graph::{postgres::PostgresCheckpointer, sqlite::SqliteCheckpointer};

/// The path of a database file that does not exist yet; it goes with the directory.
pub fn sqlite_path() -> (PathBuf, tempfile::TempDir) {
    let dir = tempfile::tempdir().expect("a temporary directory can be made");
    (dir.path().join("threads.db"), dir)
}

pub async fn sqlite(path: PathBuf) -> SqliteCheckpointer {
    SqliteCheckpointer::open(path)
        .await
        .expect("the file opens")
}

/// A schema of its own in the test server's database; dropped with the value.
pub struct Schema {
    /// Connections made with it work in the schema.
    pub url: String,
    server: String,
    name: String,
}

impl Schema {
    pub async fn make() -> Self {
        let server = server();
        let name = format!("graph_test_{}", uuid::Uuid::now_v7().simple());
        let pool = sqlx::PgPool::connect(&server)
            .await
            .expect("the test server answers");
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create schema {name}")))
            .execute(&pool)
            .await
            .expect("the schema is made");
        pool.close().await;
        let joint = if server.contains('?') { '&' } else { '?' };
        let url = format!("{server}{joint}options=-csearch_path%3D{name}");
        Self { url, server, name }
    }

    /// One whose clock goes wrong by so much, such as `1 hour`.
    pub async fn make_with_clock(wrong_by: &str) -> Self {
        let mut schema = Self::make().await;
        let pool = sqlx::PgPool::connect(&schema.server)
            .await
            .expect("the test server answers");
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "create function {}.now() returns timestamptz language sql stable as \
             $$ select pg_catalog.now() + interval '{wrong_by}' $$",
            schema.name
        )))
        .execute(&pool)
        .await
        .expect("the clock is moved");
        pool.close().await;
        schema.url.push_str("%2Cpg_catalog");
        schema
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// A database of its own on the test server; dropped with the value. For what other tests could disturb in a schema: as long
/// as any transaction of a database is open, dead rows anywhere in that database stay where they are.
pub struct Database {
    pub url: String,
    server: String,
    name: String,
}

impl Database {
    pub async fn make() -> Self {
        let server = server();
        let name = format!("graph_test_{}", uuid::Uuid::now_v7().simple());
        let pool = sqlx::PgPool::connect(&server)
            .await
            .expect("the test server answers");
        // From the template that nobody can be connected to, which would be in the way.
        sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
            "create database {name} template template0"
        )))
        .execute(&pool)
        .await
        .expect("the database is made");
        pool.close().await;
        let mut url = url::Url::parse(&server).expect("ARTEL_TEST_DATABASE_URL is a URL");
        url.set_path(&name);
        Self {
            url: url.into(),
            server,
            name,
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        let sql = format!("drop database {} with (force)", self.name);
        cleared_away(&self.server, &self.name, sql);
    }
}

pub async fn connect(url: String) -> PostgresCheckpointer {
    PostgresCheckpointer::connect(&url)
        .await
        .expect("the test server answers")
}

impl Drop for Schema {
    fn drop(&mut self) {
        let sql = format!("set lock_timeout = '5s'; drop schema {} cascade", self.name);
        cleared_away(&self.server, &self.name, sql);
    }
}

/// The server on which tests may make what they need.
fn server() -> String {
    std::env::var("ARTEL_TEST_DATABASE_URL").expect(
        "ARTEL_TEST_DATABASE_URL names a PostgreSQL server on which tests may make schemas and databases; `make test` starts one",
    )
}

/// Drops what a test has made.
fn cleared_away(server: &str, name: &str, sql: String) {
    // On a thread with a runtime of its own: the test's may be gone, and may have only one thread.
    let server = server.to_owned();
    let cleaner = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        runtime.block_on(async {
            let work = async {
                let pool = sqlx::PgPool::connect(&server).await?;
                sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
                    .execute(&pool)
                    .await?;
                Ok::<_, sqlx::Error>(())
            };
            tokio::time::timeout(Duration::from_secs(10), work)
                .await
                .map_err(std::io::Error::other)?
                .map_err(std::io::Error::other)
        })
    });
    match cleaner.join() {
        Ok(Ok(())) => {}
        other => eprintln!("{name} was not dropped: {other:?}"),
    }
}
