//! A database of its own for each test.

use std::str::FromStr;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor};
use store::{Location, Projector, Store};
use tempfile::TempDir;

pub struct World {
    pub store: Store,
    pub projector: Projector,
    pub location: Location,
    schema: Option<(String, String)>,
    _folder: TempDir,
}

impl World {
    pub async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::Sqlite(folder.path().join("data/artel.db"));
        Self::at(location, None, folder).await
    }

    pub async fn postgres() -> Self {
        let server = std::env::var("ARTEL_TEST_DATABASE_URL").expect(
            "ARTEL_TEST_DATABASE_URL is not set: run the tests with `make test`, which starts a PostgreSQL server",
        );
        let schema = format!("store_{}", uuid::Uuid::new_v4().simple());
        run(&server, format!("CREATE SCHEMA {schema}")).await;
        let separator = if server.contains('?') { '&' } else { '?' };
        let url = format!("{server}{separator}options[search_path]={schema}");
        let folder = tempfile::tempdir().unwrap();
        Self::at(Location::Postgres(url), Some((server, schema)), folder).await
    }

    async fn at(location: Location, schema: Option<(String, String)>, folder: TempDir) -> Self {
        let store = Store::open(&location).await.unwrap();
        Self {
            projector: Projector::new(&store),
            store,
            location,
            schema,
            _folder: folder,
        }
    }

    /// The same database once more, as another process would open it.
    pub async fn another(&self) -> Store {
        Store::open(&self.location).await.unwrap()
    }

    pub async fn end(self) {
        self.store.close().await;
        if let Some((server, schema)) = self.schema {
            run(&server, format!("DROP SCHEMA {schema} CASCADE")).await;
        }
    }
}

async fn run(server: &str, sql: String) {
    let mut connection = PgConnectOptions::from_str(server)
        .unwrap()
        .connect()
        .await
        .expect("the server of ARTEL_TEST_DATABASE_URL answers");
    connection.execute(AssertSqlSafe(sql)).await.unwrap();
    connection.close().await.unwrap();
}
