//! Databases for benches: fresh ones, opened as a program opens them.

use std::{any::Any, path::PathBuf, sync::Arc};

use graph::{MemoryCheckpointer, checkpoint::Checkpointer};
use serde_json::Value;
use sqlx::Connection;

use super::{Failed, storage};

/// A fresh database.
pub struct Database {
    pub name: &'static str,
    pub store: Arc<dyn Checkpointer>,
    place: Place,
    _keep: Box<dyn Any + Send + Sync>,
}

enum Place {
    Memory,
    File(PathBuf),
    Schema(String),
}

impl Database {
    pub fn memory() -> Self {
        Self {
            name: "memory",
            store: Arc::new(MemoryCheckpointer::new()),
            place: Place::Memory,
            _keep: Box::new(()),
        }
    }

    pub async fn sqlite() -> Self {
        let (path, folder) = storage::sqlite_path();
        Self {
            name: "sqlite",
            store: Arc::new(storage::sqlite(path.clone()).await),
            place: Place::File(path),
            _keep: Box::new(folder),
        }
    }

    /// A schema of its own on the server that `ARTEL_TEST_DATABASE_URL` names.
    pub async fn postgres() -> Self {
        let schema = storage::Schema::make().await;
        Self {
            name: "postgres",
            store: Arc::new(storage::connect(schema.url.clone()).await),
            place: Place::Schema(schema.url.clone()),
            _keep: Box::new(schema),
        }
    }

    /// The address, if it has one.
    pub fn url(&self) -> Option<&str> {
        match &self.place {
            Place::Schema(url) => Some(url),
            Place::Memory | Place::File(_) => None,
        }
    }

    /// What it takes on the disk, in bytes; in memory: nothing.
    pub async fn size(&self) -> Result<f64, Failed> {
        let bytes: i64 = match &self.place {
            Place::Memory => 0,
            Place::File(path) => {
                let mut side =
                    sqlx::SqliteConnection::connect(&format!("sqlite://{}", path.display()))
                        .await?;
                let pages: i64 = sqlx::query_scalar("pragma page_count")
                    .fetch_one(&mut side)
                    .await?;
                let page: i64 = sqlx::query_scalar("pragma page_size")
                    .fetch_one(&mut side)
                    .await?;
                pages * page
            }
            Place::Schema(url) => {
                let mut side = sqlx::PgConnection::connect(url).await?;
                sqlx::query_scalar(
                    "select coalesce(sum(pg_total_relation_size(oid)), 0)::bigint from pg_class \
                     where relkind = 'r' and relnamespace = current_schema()::regnamespace",
                )
                .fetch_one(&mut side)
                .await?
            }
        };
        Ok(f64::from(u32::try_from(bytes / 1024)?) * 1024.0)
    }
}

/// How the server is set; commits that need not reach the disk would prove nothing.
pub async fn server(url: &str) -> Result<Value, Failed> {
    let pool = sqlx::PgPool::connect(url).await?;
    let mut settings = serde_json::Map::new();
    for name in [
        "server_version",
        "fsync",
        "synchronous_commit",
        "full_page_writes",
        "shared_buffers",
    ] {
        let (value,): (String,) = sqlx::query_as("select current_setting($1)")
            .bind(name)
            .fetch_one(&pool)
            .await?;
        settings.insert(name.to_owned(), value.into());
    }
    pool.close().await;
    for name in ["fsync", "synchronous_commit"] {
        if settings[name] != "on" {
            return Err(format!("the server has {name} = {}: commits that may get lost are not what is measured here", settings[name]).into());
        }
    }
    Ok(Value::Object(settings))
}
