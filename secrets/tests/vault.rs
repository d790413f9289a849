//! The vault on real databases.

use std::error::Error as _;
use std::fmt::Write as _;
use std::str::FromStr;
use std::sync::Arc;

use async_trait::async_trait;
use parking_lot::Mutex;
use ports::{Actor, Failure, Plaintext, ProjectId, SecretHandle};
use secrets::{Audit, Database, Error, Identity, IdentitySource, Redactor, Vault};
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::sqlite::{SqliteConnectOptions, SqlitePoolOptions};
use sqlx::{AssertSqlSafe, Executor};

const CANARY: &str = "canary-7f3a9c-do-not-print";

#[derive(Default)]
struct Recorder {
    resolved: Mutex<Vec<String>>,
    refuse: bool,
}

#[async_trait]
impl Audit for Recorder {
    async fn resolved(&self, handle: &SecretHandle, purpose: &str) -> Result<(), Failure> {
        if self.refuse {
            return Err(Failure::new("journal", "the journal is not there"));
        }
        self.resolved.lock().push(format!("{handle} for {purpose}"));
        Ok(())
    }
}

/// A database with the vault's tables, in a folder that goes with it.
struct World {
    folder: tempfile::TempDir,
    database: Database,
    audit: Arc<Recorder>,
}

impl World {
    async fn sqlite() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = SqliteConnectOptions::new()
            .filename(folder.path().join("artel.db"))
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new()
            .connect_with(options)
            .await
            .unwrap();
        let migration = include_str!("../../migrations/sqlite/0002_vault.sql");
        sqlx::raw_sql(migration).execute(&pool).await.unwrap();
        Self::new(folder, Database::Sqlite(pool))
    }

    async fn postgres() -> Self {
        let url = std::env::var("ARTEL_TEST_DATABASE_URL").expect(
            "ARTEL_TEST_DATABASE_URL is not set: run `make test`, which starts a PostgreSQL, or set it to one",
        );
        let schema = format!("vault_{}", uuid::Uuid::new_v4().simple());
        let options = PgConnectOptions::from_str(&url).unwrap();
        let admin = PgPoolOptions::new()
            .max_connections(1)
            .connect_with(options.clone())
            .await
            .unwrap();
        let create = format!("CREATE SCHEMA {schema}");
        admin
            .execute(sqlx::raw_sql(AssertSqlSafe(create)))
            .await
            .unwrap();
        admin.close().await;
        let options = options.options([("search_path", schema.as_str())]);
        let pool = PgPoolOptions::new()
            .max_connections(3)
            .connect_with(options)
            .await
            .unwrap();
        let migration = include_str!("../../migrations/postgres/0002_vault.sql");
        sqlx::raw_sql(migration).execute(&pool).await.unwrap();
        Self::new(tempfile::tempdir().unwrap(), Database::Postgres(pool))
    }

    fn new(folder: tempfile::TempDir, database: Database) -> Self {
        Self {
            folder,
            database,
            audit: Arc::default(),
        }
    }

    fn identity(&self) -> Identity {
        Identity::load(&IdentitySource::choose(self.folder.path(), None, None)).unwrap()
    }

    async fn open(&self) -> Vault {
        Vault::open(
            self.database.clone(),
            self.identity(),
            Redactor::new(),
            self.audit.clone(),
        )
        .await
        .unwrap()
    }

    async fn sql(&self, statement: &'static str) -> u64 {
        match &self.database {
            Database::Sqlite(pool) => sqlx::query(statement)
                .execute(pool)
                .await
                .unwrap()
                .rows_affected(),
            Database::Postgres(pool) => sqlx::query(statement)
                .execute(pool)
                .await
                .unwrap()
                .rows_affected(),
        }
    }
}

fn project() -> ProjectId {
    ProjectId::founded_by("test:1")
}

fn canary() -> Plaintext {
    Plaintext::new(CANARY.to_owned())
}

fn whole(error: &Error) -> String {
    let mut text = format!("{error} {error:?}");
    let mut cause = error.source();
    while let Some(error) = cause {
        write!(text, " {error} {error:?}").unwrap();
        cause = error.source();
    }
    text
}

macro_rules! on_both_databases {
    ($($(#[$meta:meta])* async fn $name:ident($world:ident: &World) $body:block)*) => {$(
        mod $name {
            use super::*;

            async fn body($world: &World) $body

            #[tokio::test]
            async fn sqlite() {
                body(&World::sqlite().await).await;
            }

            #[tokio::test]
            async fn postgres() {
                body(&World::postgres().await).await;
            }
        }
    )*};
}

on_both_databases! {
    async fn a_granted_secret_resolves_and_the_resolution_is_recorded(world: &World) {
        let vault = world.open().await;
        let handle = vault.put(&project(), "WEATHER_KEY", canary()).await.unwrap();
        assert_eq!(vault.names(&project()).await.unwrap(), ["WEATHER_KEY"]);
        assert!(vault.has(&project(), "WEATHER_KEY").await.unwrap());
        assert_eq!(vault.grant(&project(), "WEATHER_KEY").await.unwrap(), handle);
        vault.grant(&project(), "WEATHER_KEY").await.unwrap();
        assert_eq!(vault.grants(&project()).await.unwrap(), ["WEATHER_KEY"]);
        let value = vault.resolve(&handle, "deploy release 1").await.unwrap();
        assert_eq!(value.expose(), CANARY);
        assert_eq!(*world.audit.resolved.lock(), [format!("{handle} for deploy release 1")]);
    }

    async fn nothing_resolves_without_its_own_projects_grant(world: &World) {
        let vault = world.open().await;
        let other = ProjectId::founded_by("test:2");
        let handle = vault.put(&project(), "KEY", canary()).await.unwrap();
        let error = vault.resolve(&handle, "x").await.err().unwrap();
        assert!(matches!(error, Error::NotGranted(_)), "{error}");
        vault.put(&other, "KEY", Plaintext::new("another value".to_owned())).await.unwrap();
        vault.grant(&other, "KEY").await.unwrap();
        assert!(matches!(vault.resolve(&handle, "x").await.err().unwrap(), Error::NotGranted(_)));
        let missing = SecretHandle { project: other.clone(), name: "NONE".to_owned() };
        assert!(matches!(vault.resolve(&missing, "x").await.err().unwrap(), Error::Missing(_)));
        let failure = ports::Vault::grant(&vault, &other, "NONE").await.unwrap_err();
        assert_eq!((failure.kind.as_str(), failure.actor), ("secret_missing", Actor::Owner));
        assert!(failure.message.contains("artel secrets set"), "{}", failure.message);
        vault.grant(&project(), "KEY").await.unwrap();
        assert!(vault.revoke(&project(), "KEY").await.unwrap());
        assert!(!vault.revoke(&project(), "KEY").await.unwrap());
        assert!(matches!(vault.resolve(&handle, "x").await.err().unwrap(), Error::NotGranted(_)));
        assert!(world.audit.resolved.lock().is_empty());
    }

    async fn a_value_is_replaced_and_deleted_with_its_grant(world: &World) {
        let vault = world.open().await;
        let handle = vault.put(&project(), "KEY", Plaintext::new("first-value".to_owned())).await.unwrap();
        vault.grant(&project(), "KEY").await.unwrap();
        vault.put(&project(), "KEY", Plaintext::new("second-value".to_owned())).await.unwrap();
        assert_eq!(vault.resolve(&handle, "x").await.unwrap().expose(), "second-value");
        assert_eq!(vault.redactor().redact("first-value second-value"), format!("{handle} {handle}"));
        assert!(vault.delete(&project(), "KEY").await.unwrap());
        assert!(!vault.delete(&project(), "KEY").await.unwrap());
        assert!(matches!(vault.resolve(&handle, "x").await.err().unwrap(), Error::Missing(_)));
        vault.put(&project(), "KEY", canary()).await.unwrap();
        assert!(matches!(vault.resolve(&handle, "x").await.err().unwrap(), Error::NotGranted(_)), "the old grant came back");
    }

    async fn what_was_stored_before_is_known_after_opening_again(world: &World) {
        let handle = world.open().await.put(&project(), "KEY", canary()).await.unwrap();
        let again = world.open().await;
        assert_eq!(ports::Vault::redact(&again, &format!("<{CANARY}>")), format!("<{handle}>"));
    }

    async fn what_another_process_stores_is_known_after_a_refresh(world: &World) {
        let (one, two) = (world.open().await, world.open().await);
        let handle = one.put(&project(), "KEY", canary()).await.unwrap();
        assert_eq!(two.redactor().redact(CANARY), CANARY);
        assert_eq!(two.refresh().await.unwrap(), 1);
        assert_eq!(two.refresh().await.unwrap(), 0);
        assert_eq!(two.redactor().redact(CANARY), handle.to_string());
        one.delete(&project(), "KEY").await.unwrap();
        one.put(&project(), "KEY", Plaintext::new("another-value".to_owned())).await.unwrap();
        assert_eq!(two.refresh().await.unwrap(), 1);
        assert_eq!(two.redactor().redact("another-value"), handle.to_string());
    }

    async fn a_row_cannot_be_passed_off_as_another(world: &World) {
        let vault = world.open().await;
        let other = ProjectId::founded_by("test:2");
        vault.put(&project(), "MINE", canary()).await.unwrap();
        let theirs = vault.put(&other, "THEIRS", Plaintext::new("their-own-value".to_owned())).await.unwrap();
        vault.grant(&other, "THEIRS").await.unwrap();
        let swapped = world.sql(
            "UPDATE vault_secrets SET ciphertext = (SELECT ciphertext FROM vault_secrets WHERE name = 'MINE') WHERE name = 'THEIRS'",
        ).await;
        assert_eq!(swapped, 1);
        let error = vault.resolve(&theirs, "x").await.err().unwrap();
        assert!(matches!(error, Error::Unreadable { .. }), "{error}");
        assert!(!whole(&error).contains(CANARY));
        // Opening goes on with what can be read.
        assert!(!world.open().await.redactor().redact(CANARY).contains(CANARY));
    }

    async fn another_identity_is_refused_with_what_to_do(world: &World) {
        world.open().await.put(&project(), "KEY", canary()).await.unwrap();
        let error = Vault::open(world.database.clone(), Identity::generate(), Redactor::new(), world.audit.clone())
            .await
            .unwrap_err();
        assert!(matches!(error, Error::WrongIdentity { count: 1, .. }), "{error}");
        assert!(error.to_string().contains("backup"), "{error}");
    }

    async fn a_resolution_that_cannot_be_recorded_does_not_happen(world: &World) {
        let audit = Arc::new(Recorder { refuse: true, ..Recorder::default() });
        let vault = Vault::open(world.database.clone(), world.identity(), Redactor::new(), audit).await.unwrap();
        let handle = vault.put(&project(), "KEY", canary()).await.unwrap();
        vault.grant(&project(), "KEY").await.unwrap();
        let error = vault.resolve(&handle, "x").await.err().unwrap();
        let failure = Failure::from(error);
        assert_eq!(failure.kind, "vault_audit");
        assert!(failure.retryable && failure.evidence.contains("journal"), "{failure:?}");
    }

    async fn a_canary_is_in_no_error_and_no_debug_output(world: &World) {
        let vault = world.open().await;
        let handle = vault.put(&project(), "KEY", canary()).await.unwrap();
        let mut texts = vec![format!("{vault:?} {handle:?} {handle}")];
        for name in ["key", CANARY, "../KEY"] {
            texts.push(whole(&vault.put(&project(), name, canary()).await.unwrap_err()));
        }
        texts.push(whole(&vault.put(&project(), "KEY", Plaintext::new(format!("{CANARY}\0"))).await.unwrap_err()));
        texts.push(whole(&vault.resolve(&handle, CANARY).await.err().unwrap()));
        world.sql("DROP TABLE vault_grants").await;
        world.sql("DROP TABLE vault_secrets").await;
        let error = vault.put(&project(), "KEY", canary()).await.unwrap_err();
        assert!(matches!(error, Error::Database(_)), "{error}");
        texts.push(whole(&error));
        texts.push(format!("{:?}", Failure::from(error)));
        for text in texts {
            assert!(!text.contains(CANARY), "{text}");
        }
    }

    async fn a_purpose_that_holds_a_value_is_redacted(world: &World) {
        let vault = world.open().await;
        let handle = vault.put(&project(), "KEY", canary()).await.unwrap();
        vault.grant(&project(), "KEY").await.unwrap();
        vault.resolve(&handle, &format!("deploy {CANARY}")).await.unwrap();
        assert_eq!(*world.audit.resolved.lock(), [format!("{handle} for deploy {handle}")]);
    }

    async fn values_of_every_size_come_back_as_they_were(world: &World) {
        let vault = world.open().await;
        for value in ["x".to_owned(), "é\n\t\"\\\u{1}".repeat(100), "y".repeat(secrets::MAX_VALUE_BYTES)] {
            let handle = vault.put(&project(), "KEY", Plaintext::new(value.clone())).await.unwrap();
            vault.grant(&project(), "KEY").await.unwrap();
            assert!(vault.resolve(&handle, "x").await.unwrap().expose() == value);
        }
    }
}

#[tokio::test]
async fn the_value_is_nowhere_in_the_files() {
    let world = World::sqlite().await;
    let vault = world.open().await;
    let handle = vault.put(&project(), "KEY", canary()).await.unwrap();
    vault.grant(&project(), "KEY").await.unwrap();
    vault.resolve(&handle, "x").await.unwrap();
    let Database::Sqlite(pool) = &world.database else {
        unreachable!("it is SQLite")
    };
    pool.close().await;
    let forms = [CANARY.to_owned(), hex::encode(CANARY)];
    let mut searched = 0;
    for entry in std::fs::read_dir(world.folder.path()).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for form in &forms {
            assert!(
                !bytes
                    .windows(form.len())
                    .any(|window| window == form.as_bytes())
            );
        }
        searched += 1;
    }
    assert!(
        searched >= 2,
        "the database and the identity should be there"
    );
}

#[tokio::test]
async fn the_value_is_nowhere_in_the_rows_of_postgresql() {
    let world = World::postgres().await;
    let vault = world.open().await;
    vault.put(&project(), "KEY", canary()).await.unwrap();
    let Database::Postgres(pool) = &world.database else {
        unreachable!("it is PostgreSQL")
    };
    let row: (Vec<u8>, String) =
        sqlx::query_as("SELECT ciphertext, row_to_json(vault_secrets)::text FROM vault_secrets")
            .fetch_one(pool)
            .await
            .unwrap();
    let hex = hex::encode(CANARY);
    assert!(!row.1.contains(CANARY) && !row.1.contains(&hex));
    assert!(
        !row.0
            .windows(CANARY.len())
            .any(|window| window == CANARY.as_bytes())
    );
}

#[tokio::test]
async fn a_full_vault_takes_no_more_but_can_be_changed() {
    let world = World::sqlite().await;
    let vault = world.open().await;
    vault.put(&project(), "KEY", canary()).await.unwrap();
    world
        .sql(
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 9999) \
             INSERT INTO vault_secrets SELECT 'other', 'K' || i, x'00', 'r', 't' FROM n",
        )
        .await;
    let error = vault.put(&project(), "NEW", canary()).await.unwrap_err();
    assert!(matches!(error, Error::Full { .. }), "{error}");
    vault
        .put(&project(), "KEY", Plaintext::new("another".to_owned()))
        .await
        .unwrap();
    world.open().await;
    world
        .sql("INSERT INTO vault_secrets VALUES ('other', 'K', x'00', 'r', 't')")
        .await;
    let error = Vault::open(
        world.database.clone(),
        world.identity(),
        Redactor::new(),
        world.audit.clone(),
    )
    .await
    .unwrap_err();
    assert!(matches!(error, Error::Full { .. }), "{error}");
}
