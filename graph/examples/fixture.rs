//! Makes a database for the test that reads the rows of the previous release. How: `tests/fixtures/README.md`.
//!
//! `cargo run -p graph --example fixture -- FILE` or `… -- postgres://…`

#[path = "../tests/fixtures/scenario.rs"]
mod scenario;

use std::sync::Arc;

use graph::{PostgresCheckpointer, SqliteCheckpointer};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let target = std::env::args().nth(1).ok_or(
        "say where: the name of a new SQLite file, or the URL of an empty PostgreSQL schema",
    )?;
    if target.starts_with("postgres") {
        let store = PostgresCheckpointer::connect(&target).await?;
        scenario::make(Arc::new(store)).await;
    } else {
        let store = Arc::new(SqliteCheckpointer::open(&target).await?);
        scenario::make(store.clone()).await;
        store.close().await;
    }
    Ok(())
}
