//! What can only happen with PostgreSQL.

mod storage;

use std::time::Duration;

use graph::{
    Appended, Cursor, JournalFilter, PostgresCheckpointer, Priority, Source, StorageError,
    checkpoint::{
        Checkpointer, ClaimRequest, Claimed, Commit, Lease, NewCheckpoint, NewEvent, NewThread,
        Write, WriteKind,
    },
};
use serde_json::json;
use sqlx::{Connection, PgConnection, PgPool, postgres::PgPoolOptions};
use storage::Schema;

async fn fresh() -> (PostgresCheckpointer, Schema) {
    let schema = Schema::make().await;
    let db = storage::connect(schema.url.clone()).await;
    db.migrate().await.expect("migrates");
    (db, schema)
}

async fn beside(schema: &Schema) -> PgConnection {
    PgConnection::connect(&schema.url).await.expect("connects")
}

fn event(stream: &str, name: &str) -> NewEvent {
    NewEvent {
        stream: stream.to_owned(),
        name: name.to_owned(),
        payload: json!(null),
        thread: None,
    }
}

async fn names(db: &PostgresCheckpointer, after: Cursor) -> Vec<String> {
    db.journal(&JournalFilter::all(), after, 100)
        .await
        .expect("reads")
        .into_iter()
        .map(|entry| entry.name)
        .collect()
}

async fn running(db: &PostgresCheckpointer, count: usize) -> Vec<Lease> {
    for i in 0..count {
        let thread = NewThread {
            id: format!("t{i}").into(),
            graph: "g".to_owned(),
            parent: None,
            priority: Priority::Medium,
            input: json!({}).into(),
        };
        db.create_thread(thread).await.expect("creates");
    }
    let claimed = db
        .claim(ClaimRequest {
            owner: "test",
            graphs: &["g".to_owned()],
            limit: count,
            lease: Duration::from_mins(1),
        })
        .await
        .expect("claims");
    assert_eq!(claimed.claims.len(), count);
    claimed
        .claims
        .into_iter()
        .map(|claim| claim.lease)
        .collect()
}

fn step(parent: u64, value: &str) -> Commit {
    let checkpoint = NewCheckpoint {
        parent,
        branch: 0,
        step: parent + 1,
        source: Source::Step,
        appends: json!({"log": [value]})
            .as_object()
            .cloned()
            .unwrap_or_default(),
        changes: serde_json::Map::new(),
        snapshot: None,
        plan: json!({}),
        kept: None,
    };
    Commit {
        checkpoint: Some(checkpoint),
        ..Commit::on(parent)
    }
}

/// Appends in a transaction that stays open.
async fn append_slowly(connection: &mut PgConnection, stream: &str, name: &str) {
    sqlx::query("select graph_append(gen_random_uuid(), $1, $2, 'null', null)")
        .bind(stream)
        .bind(name)
        .execute(connection)
        .await
        .expect("appends");
}

#[tokio::test]
async fn a_reader_waits_for_entries_that_become_visible_late() {
    let (db, schema) = fresh().await;
    db.append("1", event("a", "first")).await.expect("appends");
    let mut slow = beside(&schema).await;
    let mut transaction = slow.begin().await.expect("begins");
    append_slowly(&mut transaction, "slow", "second").await;
    for i in 3..6 {
        let appended = db
            .append(&i.to_string(), event("a", &format!("later {i}")))
            .await;
        assert_eq!(
            appended.expect("appends"),
            Appended::New,
            "writers do not wait"
        );
    }
    assert_eq!(names(&db, Cursor::START).await, ["first"]);
    let end = db.journal_end().await.expect("reads");
    assert_eq!(names(&db, end).await, [""; 0]);
    transaction.commit().await.expect("commits");
    assert_eq!(
        names(&db, end).await,
        ["second", "later 3", "later 4", "later 5"],
        "nothing was skipped"
    );
}

#[tokio::test]
async fn a_reader_goes_on_when_a_writer_gave_up() {
    let (db, schema) = fresh().await;
    let mut slow = beside(&schema).await;
    let mut transaction = slow.begin().await.expect("begins");
    append_slowly(&mut transaction, "slow", "never").await;
    db.append("1", event("a", "said")).await.expect("appends");
    assert_eq!(names(&db, Cursor::START).await, [""; 0]);
    transaction.rollback().await.expect("rolls back");
    assert_eq!(names(&db, Cursor::START).await, ["said"]);
}

#[tokio::test]
async fn long_transactions_of_others_do_not_hold_readers_up() {
    let (db, schema) = fresh().await;
    let mut other = beside(&schema).await;
    let mut transaction = other.begin().await.expect("begins");
    sqlx::raw_sql("create table something_else (x int); insert into something_else values (1)")
        .execute(&mut *transaction)
        .await
        .expect("writes");
    db.append("1", event("a", "said")).await.expect("appends");
    assert_eq!(names(&db, Cursor::START).await, ["said"]);
}

#[tokio::test]
async fn a_fenced_thread_is_judged_after_whoever_holds_its_row() {
    let (db, schema) = fresh().await;
    let lease = running(&db, 1).await.remove(0);
    // Somebody takes the thread over, and has not committed yet.
    let mut other = beside(&schema).await;
    let mut transaction = other.begin().await.expect("begins");
    sqlx::query("update graph_thread set token = nextval('graph_token') where id = 't0'")
        .execute(&mut *transaction)
        .await
        .expect("takes over");
    let late = {
        let (db, lease) = (db.clone(), lease.clone());
        tokio::spawn(async move { db.commit(&lease, step(0, "late")).await })
    };
    let mut side = beside(&schema).await;
    let mut blocked = false;
    for _ in 0..6000 {
        blocked = sqlx::query_scalar(
            "select exists (select 1 from pg_stat_activity where wait_event_type = 'Lock' and query like '%graph_checkpoint%' \
             and pid = any (select l.pid from pg_locks l where not l.granted))",
        )
        .fetch_one(&mut side)
        .await
        .expect("looks");
        if blocked {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(blocked, "the commit waits for the row");
    transaction.commit().await.expect("commits");
    let result = late.await.expect("does not panic");
    assert!(
        matches!(result, Err(StorageError::Fenced { .. })),
        "{result:?}"
    );
}

#[tokio::test]
async fn a_database_of_a_newer_release_is_refused_with_both_versions() {
    let (db, schema) = fresh().await;
    sqlx::raw_sql(
        "insert into graph_migrations (version, description, success, checksum, execution_time) values (9000, 'x', true, '', 0)",
    )
    .execute(&mut beside(&schema).await)
    .await
    .expect("a version from the future");
    for _ in 0..2 {
        let error = db.migrate().await.expect_err("is refused");
        assert!(
            matches!(
                error,
                StorageError::NewerSchema {
                    found: 9000,
                    known: 1..9000
                }
            ),
            "{error}"
        );
    }
}

#[tokio::test]
async fn lost_connections_are_replaced() {
    let schema = Schema::make().await;
    let joint = if schema.url.contains('?') { '&' } else { '?' };
    let name = format!("graph-{}", uuid::Uuid::now_v7().simple());
    let db = storage::connect(format!("{}{joint}application_name={name}", schema.url)).await;
    db.migrate().await.expect("migrates");
    let lease = running(&db, 1).await.remove(0);
    db.commit(&lease, step(0, "before")).await.expect("commits");
    let killed: i64 = sqlx::query_scalar(
        "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = $1",
    )
    .bind(&name)
    .fetch_one(&mut beside(&schema).await)
    .await
    .expect("ends the connections");
    assert!(killed >= 1);
    // Longer than connections are trusted without a look.
    tokio::time::sleep(Duration::from_millis(250)).await;
    db.commit(&lease, step(1, "after")).await.expect("commits");
}

#[tokio::test]
async fn a_bad_step_does_not_take_its_neighbours_with_it() {
    let (db, schema) = fresh().await;
    let leases = running(&db, 8).await;
    // The database refuses one of the rows, and with it the statement in which they all are.
    sqlx::raw_sql("alter table graph_checkpoint add check (appends::text not like '%poison%')")
        .execute(&mut beside(&schema).await)
        .await
        .expect("a constraint");
    for round in 0..5 {
        let commits = leases.iter().enumerate().map(|(i, lease)| {
            let value = if i == 3 { "poison" } else { "good" };
            db.commit(lease, step(if i == 3 { 0 } else { round }, value))
        });
        for (i, result) in futures::future::join_all(commits)
            .await
            .into_iter()
            .enumerate()
        {
            if i == 3 {
                assert!(
                    matches!(result, Err(StorageError::Backend { .. })),
                    "{result:?}"
                );
            } else {
                assert_eq!(result.expect("commits").checkpoint, Some(round + 1));
            }
        }
    }
}

/// What somebody else's pool of such connections is said to be. Nothing is changed over it.
async fn refused(schema: &Schema, setting: &'static str) -> String {
    let pool = PgPoolOptions::new()
        .max_connections(2)
        .after_connect(move |connection, _| {
            Box::pin(async move {
                sqlx::raw_sql(setting).execute(connection).await?;
                Ok(())
            })
        })
        .connect(&schema.url)
        .await
        .expect("connects");
    let error = PostgresCheckpointer::from_pool(pool).migrate().await;
    let error = error.expect_err("is refused");
    assert!(
        matches!(error, StorageError::UnfitConnections { .. }),
        "{error:?}"
    );
    let tables: i64 = sqlx::query_scalar(
        "select count(*) from pg_tables where schemaname = current_schema() and tablename like 'graph%'",
    )
    .fetch_one(&mut beside(schema).await)
    .await
    .expect("looks");
    assert_eq!(tables, 0);
    error.to_string()
}

#[tokio::test]
async fn a_pool_whose_connections_do_not_do_what_they_are_told_is_refused_before_anything_is_changed()
 {
    let schema = Schema::make().await;
    let said = refused(&schema, "begin").await;
    assert!(said.contains("begun by somebody else"), "{said}");
    let said = refused(&schema, "set default_transaction_read_only = on").await;
    assert!(said.contains("default_transaction_read_only"), "{said}");
    let said = refused(&schema, "set search_path = 'nowhere'").await;
    assert!(said.contains("search_path"), "{said}");
    // One that is set up for nothing else is taken.
    let pool = PgPool::connect(&schema.url).await.expect("connects");
    let db = PostgresCheckpointer::from_pool(pool);
    db.migrate().await.expect("migrates");
    assert_eq!(running(&db, 1).await.len(), 1);
}

#[tokio::test]
async fn a_pool_that_is_closed_or_leads_nowhere_is_an_error_of_the_database() {
    let schema = Schema::make().await;
    let closed = PgPool::connect(&schema.url).await.expect("connects");
    closed.close().await;
    // A port that nobody listens on, which nobody else is given while it is held.
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").expect("binds");
    let port = nobody.local_addr().expect("is bound").port();
    let silent = PgPoolOptions::new()
        .acquire_timeout(Duration::from_millis(100))
        .connect_lazy(&format!("postgres://nobody@127.0.0.1:{port}/nothing"))
        .expect("is a URL");
    for pool in [closed, silent] {
        let db = PostgresCheckpointer::from_pool(pool);
        let answers = [
            db.migrate().await.err(),
            db.thread(&"t".into()).await.err(),
            db.append("id", event("a", "first")).await.err(),
            db.break_leases("nobody").await.err(),
        ];
        for answer in answers {
            assert!(
                matches!(answer, Some(StorageError::Backend { .. })),
                "{answer:?}"
            );
        }
    }
}

async fn claim(db: &PostgresCheckpointer, lease: Duration) -> Claimed {
    db.claim(ClaimRequest {
        owner: "test",
        graphs: &["g".to_owned()],
        limit: 1,
        lease,
    })
    .await
    .expect("claims")
}

#[tokio::test]
async fn what_lands_while_a_thread_is_being_taken_over_is_seen_by_who_takes_it_over() {
    // The statement that claims has begun, and sees what there was then; a clock that waits holds it up.
    let schema = Schema::make_with_clock("0 s").await;
    let mut holder = beside(&schema).await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!(
        "create or replace function {}.now() returns timestamptz language plpgsql stable as $$ begin \
             if current_query() like '%nextval(''graph_token'')%' then \
                 perform pg_advisory_lock_shared(current_schema()::regnamespace::oid::bigint), \
                     pg_advisory_unlock_shared(current_schema()::regnamespace::oid::bigint); \
             end if; \
             return pg_catalog.now(); \
         end $$",
        schema.name()
    )))
    .execute(&mut holder)
    .await
    .expect("the clock can be held up");
    let db = storage::connect(schema.url.clone()).await;
    db.migrate().await.expect("migrates");
    db.create_thread(NewThread {
        id: "t".into(),
        graph: "g".to_owned(),
        parent: None,
        priority: Priority::Medium,
        input: json!({}).into(),
    })
    .await
    .expect("creates");
    let first = claim(&db, Duration::from_millis(1)).await.claims.remove(0);
    until(&mut holder, "select due_at < now() from graph_thread").await;

    sqlx::raw_sql("select pg_advisory_lock(current_schema()::regnamespace::oid::bigint)")
        .execute(&mut holder)
        .await
        .expect("holds the clock");
    let claiming = tokio::spawn({
        let db = db.clone();
        async move { claim(&db, Duration::from_mins(1)).await }
    });
    until(
        &mut holder,
        "select exists (select 1 from pg_locks where locktype = 'advisory' and not granted \
             and pg_backend_pid() = any (pg_blocking_pids(pid)))",
    )
    .await;
    let mut commit = Commit::on(0);
    commit.writes.push(Write {
        task: "a".to_owned(),
        kind: WriteKind::Step,
        name: "paid".to_owned(),
        round: 0,
        value: json!(7),
        kept: None,
    });
    db.commit(&first.lease, commit.clone())
        .await
        .expect("its lease is good until somebody else has one");
    sqlx::raw_sql("select pg_advisory_unlock(current_schema()::regnamespace::oid::bigint)")
        .execute(&mut holder)
        .await
        .expect("lets the clock go");

    let second = claiming.await.expect("claims").claims.remove(0);
    assert!(second.lease.token > first.lease.token);
    let loaded = match second.loaded {
        Some(loaded) => *loaded,
        None => db.load(&second.lease).await.expect("loads"),
    };
    assert_eq!(loaded.writes, commit.writes);
}

/// Waits until a query says yes.
async fn until(db: &mut PgConnection, question: &'static str) {
    for _ in 0..12_000 {
        let yes: bool = sqlx::query_scalar(question)
            .fetch_one(&mut *db)
            .await
            .expect("answers");
        if yes {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {question}");
}
