//! The database refuses in the middle: before or after any statement, inside of functions as well, and at the commit.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};

use graph::{SqliteCheckpointer, StorageError, checkpoint::Checkpointer};
use sqlx::{
    AssertSqlSafe,
    sqlite::{SqliteConnectOptions, SqlitePoolOptions},
};

use crate::{
    connections::within_patience,
    database::{Postgres, Sqlite, has_landed, same},
    long,
    operations::{OPERATIONS, STAGED, Staged, World, is_whole, prepare},
    storage::{self, Schema},
};

/// Triggers on every table count what happens, in a sequence, which no rollback takes back; at a number they refuse. The
/// last kind refuses when the transaction is about to commit.
fn refusing_triggers<'a>(tables: impl Iterator<Item = &'a str>) -> String {
    let mut sql = "
        create sequence fault_count;
        create table fault (at bigint not null);
        insert into fault values (0);
        create function fault() returns trigger language plpgsql as $$ begin
            if nextval('fault_count') = (select at from fault) then raise 'injected'; end if;
            return null;
        end $$;"
        .to_owned();
    for table in tables {
        for change in ["insert", "update", "delete"] {
            sql.extend(["before", "after"].map(|moment| {
                format!(
                    "create trigger fault_{moment}_{change} {moment} {change} on {table} \
                     for each statement execute function fault();"
                )
            }));
            sql.extend([format!(
                "create constraint trigger fault_commit_{change} after {change} on {table} \
                 deferrable initially deferred for each row execute function fault();"
            )]);
        }
    }
    sql
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn postgres_keeps_the_old_state_when_any_statement_of_any_write_fails() {
    let schema = Schema::make().await;
    let db = storage::connect(schema.url.clone()).await;
    let world = prepare(&db).await.expect("prepares");
    let mut side = Postgres::look(&schema.url).await;
    side.save().await;
    let sql = refusing_triggers(side.tables());
    sqlx::raw_sql(AssertSqlSafe(sql))
        .execute(&mut side.connection)
        .await
        .expect("triggers");
    for operation in OPERATIONS {
        let name = operation.name;
        let mut faults = 0;
        loop {
            // What puts the world back does not count.
            sqlx::raw_sql("update fault set at = 0")
                .execute(&mut side.connection)
                .await
                .expect("none");
            side.restore().await;
            let before = side.dump().await;
            sqlx::raw_sql(AssertSqlSafe(format!(
                "select setval('fault_count', 1, false); update fault set at = {}",
                faults + 1
            )))
            .execute(&mut side.connection)
            .await
            .expect("a fault");
            match within_patience(name, (operation.run)(&db, &world)).await {
                Ok(_) => break,
                Err(StorageError::Backend { source, .. }) => {
                    assert!(source.to_string().contains("injected"), "{name}: {source}");
                }
                Err(other) => panic!("{name}, fault {faults}: {other:?}"),
            }
            assert_eq!(side.dump().await, before, "{name}, fault {faults}");
            faults += 1;
            assert!(faults < 500, "{name} never ends");
        }
        // Before, after, and at the commit.
        assert!(faults >= 3, "{name}: {faults} faults");
    }
    for staged in STAGED {
        let name = staged.name;
        sqlx::raw_sql("update fault set at = 0")
            .execute(&mut side.connection)
            .await
            .expect("none");
        let seen = moments(staged, &db, &world, async || side.restore().await).await;
        let mut faults = 0;
        loop {
            side.restore().await;
            sqlx::raw_sql(AssertSqlSafe(format!(
                "select setval('fault_count', 1, false); update fault set at = {}",
                faults + 1
            )))
            .execute(&mut side.connection)
            .await
            .expect("a fault");
            // The first put of a connection is the one that does most.
            let fresh = storage::connect(schema.url.clone()).await;
            let answer = within_patience(name, (staged.run)(&fresh, &world)).await;
            sqlx::raw_sql("update fault set at = 0")
                .execute(&mut side.connection)
                .await
                .expect("none");
            is_whole(
                &format!("{name}, fault {faults}"),
                staged,
                &db,
                &world,
                [&seen[0], &seen[1]],
            )
            .await;
            if answer.is_ok() {
                break;
            }
            faults += 1;
            assert!(faults < 500, "{name} never ends");
        }
        assert!(faults >= 3, "{name}: {faults} faults");
    }
}

/// What can be seen before it is done, and after.
pub(crate) async fn moments(
    staged: &Staged,
    db: &dyn Checkpointer,
    world: &World,
    mut restore: impl AsyncFnMut(),
) -> [String; 2] {
    restore().await;
    let before = (staged.look)(db, world).await.expect("can be seen");
    (staged.run)(db, world).await.expect("is done");
    let after = (staged.look)(db, world).await.expect("can be seen");
    assert_ne!(before, after, "{}", staged.name);
    [before, after]
}

/// Interrupts SQLite when it looks for the n-th time whether it should stop: when a statement is prepared, begins, jumps back
/// or ends. One more is the commit itself.
#[derive(Clone, Default)]
struct Interrupts(Arc<AtomicI64>);

impl Interrupts {
    const OFF: i64 = i64::MIN / 2;

    fn at(&self, n: i64) {
        self.0.store(n, Ordering::SeqCst);
    }

    /// Whether to go on.
    fn look(&self) -> bool {
        self.0.fetch_sub(1, Ordering::SeqCst) != 1
    }

    /// Whether it has interrupted something since it was told to.
    fn off(&self) -> bool {
        self.0.swap(Self::OFF, Ordering::SeqCst) <= 0
    }

    async fn open(&self, path: &std::path::Path) -> SqliteCheckpointer {
        let interrupts = self.clone();
        let pool = SqlitePoolOptions::new()
            .max_connections(1)
            .acquire_timeout(Duration::from_secs(10))
            .after_connect(move |connection, _| {
                let (looks, commits) = (interrupts.clone(), interrupts.clone());
                Box::pin(async move {
                    let mut handle = connection.lock_handle().await?;
                    handle.set_progress_handler(1, move || looks.look());
                    handle.set_commit_hook(move || commits.look());
                    Ok(())
                })
            })
            .connect_with(
                SqliteConnectOptions::new()
                    .filename(path)
                    .create_if_missing(true)
                    .journal_mode(sqlx::sqlite::SqliteJournalMode::Wal)
                    // Nobody pulls the plug in this test.
                    .synchronous(sqlx::sqlite::SqliteSynchronous::Off),
            )
            .await
            .expect("opens");
        SqliteCheckpointer::from_pool(pool)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sqlite_keeps_the_old_state_when_any_write_is_interrupted_anywhere() {
    let (path, _dir) = storage::sqlite_path();
    let interrupts = Interrupts::default();
    interrupts.off();
    let db = interrupts.open(&path).await;
    let world = prepare(&db).await.expect("prepares");
    let mut side = Sqlite::look(&path).await;
    side.save().await;
    for operation in OPERATIONS {
        let name = operation.name;
        side.restore().await;
        let run = async || {
            let answer = within_patience(name, (operation.run)(&db, &world)).await;
            answer.map_err(|error| {
                (
                    matches!(error, StorageError::Backend { .. }),
                    error.to_string(),
                )
            })
        };
        let first = run().await;
        let new = side.dump().await.shape;
        let second = run().await;
        let twice = side.dump().await.shape;
        let mut faults = 0;
        for n in (1..).step_by(long(1, 13)) {
            assert!(n < 20_000, "{name} never ends");
            let at = format!("{name}, interrupt {n}");
            side.restore().await;
            let before = side.dump().await;
            interrupts.at(n);
            let answer = run().await;
            let interrupted = interrupts.off();
            let landed = has_landed(&at, &before, &side.dump().await, &new);
            match answer {
                Ok(_) => {
                    assert!(landed, "{at}: it said that it was done");
                    assert_eq!(answer, first, "{at}");
                }
                Err((true, error)) => {
                    assert!(interrupted, "{at}: it failed by itself: {error}");
                    faults += 1;
                }
                Err((false, error)) => panic!("{at}: {error}"),
            }
            assert_eq!(run().await, *if landed { &second } else { &first }, "{at}");
            same(
                &at,
                &side.dump().await.shape,
                if landed { &twice } else { &new },
            );
            if !interrupted {
                break;
            }
        }
        assert!(faults >= 3, "{name}: {faults} faults");
    }
    for staged in STAGED {
        let name = staged.name;
        let seen = moments(staged, &db, &world, async || side.restore().await).await;
        let mut faults = 0;
        // At first at every moment, where transactions begin.
        for n in (1..20).chain((20..).step_by(long(1, 13))) {
            assert!(n < 20_000, "{name} never ends");
            side.restore().await;
            interrupts.at(n);
            let answer = within_patience(name, (staged.run)(&db, &world)).await;
            let interrupted = interrupts.off();
            let at = format!("{name}, interrupt {n}");
            is_whole(&at, staged, &db, &world, [&seen[0], &seen[1]]).await;
            faults += u32::from(answer.is_err());
            if !interrupted {
                break;
            }
        }
        assert!(faults >= 3, "{name}: {faults} faults");
    }
}
