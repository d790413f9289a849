use store::{Db, Error, Location, Store};

use crate::journal::Journal;
use crate::world::World;

on_both!(
    what_was_written_is_there_after_opening_again,
    a_newer_schema_is_refused_with_both_versions,
    many_open_at_the_same_moment,
    the_pool_is_shared,
    a_database_belongs_to_one_data_folder,
);

async fn execute(world: &World, sql: &'static str) {
    match world.store.db() {
        Db::Sqlite(pool) => {
            sqlx::query(sql).execute(pool).await.unwrap();
        }
        Db::Postgres(pool) => {
            sqlx::query(sql).execute(pool).await.unwrap();
        }
    }
}

async fn what_was_written_is_there_after_opening_again(world: &World) {
    let journal = Journal::whole_life();
    let cursor = world.projector.catch_up(&journal).await.unwrap();
    let again = world.another().await;
    again.ping().await.unwrap();
    let projector = store::Projector::new(&again);
    assert_eq!(projector.cursor().await.unwrap(), cursor);
    assert_eq!(
        projector.dump().await.unwrap(),
        world.projector.dump().await.unwrap()
    );
    again.close().await;
}

async fn a_newer_schema_is_refused_with_both_versions(world: &World) {
    execute(
        world,
        "INSERT INTO _sqlx_migrations (version, description, success, checksum, execution_time)
         SELECT 9001, 'of the future', success, checksum, 1 FROM _sqlx_migrations WHERE version = 1",
    )
    .await;
    let error = Store::open(&world.location).await.unwrap_err();
    let supported = world.store.supported_schema_version();
    assert!(
        matches!(error, Error::NewerSchema { found: 9001, supported: s, .. } if s == supported),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("9001")
            && text.contains(&format!("up to {supported}"))
            && text.contains("install"),
        "{text}"
    );
}

async fn many_open_at_the_same_moment(world: &World) {
    let location = match &world.location {
        Location::Sqlite(path) => Location::Sqlite(path.with_file_name("fresh.db")),
        Location::Postgres(url) => {
            let drop = "DROP TABLE projection_cursors, projects, jobs, tasks, pull_requests, deployments, waits, ledger,
                messages, outbox_intents, chat_projects, chats, deliveries, people, pairing_codes, inbox, buttons,
                allocations, errands, _sqlx_migrations CASCADE";
            execute(world, drop).await;
            // Whatever later migrations made.
            execute(
                world,
                "DO $$ DECLARE t text; BEGIN
                   FOR t IN SELECT tablename FROM pg_tables WHERE schemaname = current_schema() LOOP
                     EXECUTE 'DROP TABLE ' || quote_ident(t) || ' CASCADE';
                   END LOOP; END $$",
            )
            .await;
            Location::Postgres(url.clone())
        }
    };
    let mut tasks = Vec::new();
    for _ in 0..8 {
        let location = location.clone();
        tasks.push(tokio::spawn(async move {
            let store = Store::open(&location).await.unwrap();
            let projects = store.projects().await.unwrap();
            store.close().await;
            projects.len()
        }));
    }
    for task in tasks {
        assert_eq!(task.await.unwrap(), 0);
    }
}

async fn the_pool_is_shared(world: &World) {
    let sqlite = matches!(world.location, Location::Sqlite(_));
    assert_eq!(world.store.sqlite_pool().is_some(), sqlite);
    assert_eq!(world.store.pg_pool().is_some(), !sqlite);
}

#[tokio::test]
async fn a_place_that_cannot_be_opened_is_named_without_its_password() {
    let location = Location::Postgres("postgres://artel:hunter2@127.0.0.1:1/x".to_owned());
    let error = Store::open(&location).await.unwrap_err();
    let text = format!("{error} {error:?} {location} {location:?}");
    assert!(text.contains("127.0.0.1:1/x"), "{text}");
    assert!(!text.contains("hunter2"), "{text}");

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "no folder").unwrap();
    let error = Store::open(&Location::Sqlite(file.join("artel.db")))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Folder { .. }), "{error:?}");

    let error = Store::open(&Location::Sqlite(folder.path().to_owned()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Open { .. }), "{error:?}");
}

#[tokio::test]
async fn a_file_that_is_no_database_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("artel.db");
    std::fs::write(&file, "this is no database, ".repeat(500)).unwrap();
    let error = Store::open(&Location::Sqlite(file.clone()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Open { .. }), "{error:?}");
    assert!(error.to_string().contains("artel.db"), "{error}");
    let kept = std::fs::read_to_string(&file).unwrap();
    assert!(kept.starts_with("this is no database"), "nothing was lost");
}

#[tokio::test]
async fn a_full_disk_is_named_and_loses_nothing() {
    let world = World::sqlite().await;
    let mut journal = Journal::whole_life();
    let cursor = world.projector.catch_up(&journal).await.unwrap();
    let before = world.projector.dump().await.unwrap();
    let pool = world.store.sqlite_pool().unwrap();
    let limit = async |pages: &'static str| {
        // The limit belongs to a connection, so every one of the pool gets it.
        let mut connections = Vec::new();
        for _ in 0..pool.options().get_max_connections() {
            connections.push(pool.acquire().await.unwrap());
        }
        for connection in &mut connections {
            sqlx::query(pages).execute(&mut **connection).await.unwrap();
        }
    };
    // A limit below what is used means what is used.
    limit("PRAGMA max_page_count = 1").await;
    journal.heard("long", &"word ".repeat(100_000));
    let error = world.projector.catch_up(&journal).await.unwrap_err();
    assert!(matches!(error, Error::DiskFull(_)), "{error:?}");
    let failure = ports::Failure::from(error);
    assert_eq!(failure.kind, "disk_full");
    assert!(failure.retryable);
    assert_eq!(world.projector.cursor().await.unwrap(), cursor);
    assert_eq!(world.projector.dump().await.unwrap(), before);

    limit("PRAGMA max_page_count = 1000000").await;
    assert_eq!(
        world.projector.catch_up(&journal).await.unwrap(),
        journal.last()
    );
    world.end().await;
}

async fn a_database_belongs_to_one_data_folder(world: &World) {
    let store = &world.store;
    assert!(store.belongs_to("first").await.unwrap());
    assert!(!store.belongs_to("second").await.unwrap());
    assert!(store.belongs_to("first").await.unwrap());
}
