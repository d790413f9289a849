//! A fault between any two statements of a commit leaves the old state, in every table; without it, the same commit lands.

mod storage;

use std::time::Duration;

use graph::{
    JournalFilter, Parent, Priority, Source, StorageError, ThreadStatus,
    checkpoint::{
        CancelRequest, Checkpointer, ClaimRequest, Commit, Lease, NewCheckpoint, NewEvent,
        NewSignal, NewThread, Then, Write, WriteKind,
    },
};
use serde_json::{Value, json};
use sqlx::{AssertSqlSafe, Connection, PgConnection, Row, SqliteConnection};

/// All tables, with what a commit does to them.
const FAULTS: [(&str, &str); 10] = [
    ("graph_thread", "insert"),
    ("graph_thread", "update"),
    ("graph_checkpoint", "insert"),
    ("graph_write", "insert"),
    ("graph_write", "delete"),
    ("graph_signal", "insert"),
    ("graph_signal", "update"),
    ("graph_stream", "insert"),
    ("graph_stream", "update"),
    ("graph_journal", "insert"),
];

const TABLES: [&str; 7] = [
    "graph_thread",
    "graph_branch",
    "graph_checkpoint",
    "graph_write",
    "graph_signal",
    "graph_stream",
    "graph_journal",
];

fn thread(id: &str) -> NewThread {
    NewThread {
        id: id.into(),
        graph: "g".to_owned(),
        parent: None,
        priority: Priority::Normal,
        input: json!({}),
    }
}

fn signal(to: &str, key: &str) -> NewSignal {
    NewSignal {
        thread: to.into(),
        kind: "k".to_owned(),
        key: key.to_owned(),
        payload: Value::Null,
        revives: false,
    }
}

fn event(stream: &str) -> NewEvent {
    NewEvent {
        stream: stream.to_owned(),
        name: "e".to_owned(),
        payload: Value::Null,
        thread: None,
    }
}

fn write(task: &str) -> Write {
    Write {
        task: task.to_owned(),
        kind: WriteKind::Result,
        name: String::new(),
        round: 0,
        value: json!(1),
    }
}

fn step() -> Commit {
    let checkpoint = NewCheckpoint {
        parent: 0,
        branch: 0,
        step: 1,
        source: Source::Step,
        appends: json!({"log": ["x"]})
            .as_object()
            .cloned()
            .unwrap_or_default(),
        changes: serde_json::Map::new(),
        snapshot: None,
        plan: json!({}),
    };
    Commit {
        checkpoint: Some(checkpoint),
        ..Commit::on(0)
    }
}

/// Touches every table, in every way that a commit can.
fn everything() -> Commit {
    Commit {
        writes: vec![write("b")],
        clear_writes: true,
        consumed: vec![1],
        events: vec![event("known"), event("new")],
        children: vec![NewThread {
            parent: Some(Parent {
                thread: "t".into(),
                name: "c".to_owned(),
            }),
            ..thread("t/c")
        }],
        signals: vec![signal("other", "from t")],
        cancels: vec![CancelRequest {
            thread: "other".into(),
            reason: "enough".to_owned(),
        }],
        waits: Some(Vec::new()),
        then: Then::End {
            status: ThreadStatus::Done,
            error: None,
            output: Some(json!(1)),
        },
        ..step()
    }
}

/// A running thread with a signal in its mailbox and a pending write, another thread, and a stream.
async fn prepare(db: &dyn Checkpointer) -> Lease {
    db.migrate().await.expect("migrates");
    db.create_thread(thread("t")).await.expect("creates");
    let claimed = db
        .claim(ClaimRequest {
            owner: "test",
            graphs: &["g".to_owned()],
            limit: 1,
            lease: Duration::from_mins(1),
        })
        .await
        .expect("claims");
    let lease = claimed.claims[0].lease.clone();
    db.create_thread(thread("other")).await.expect("creates");
    db.signal(signal("t", "k"), None).await.expect("signals");
    let early = Commit {
        writes: vec![write("a")],
        events: vec![event("known")],
        ..Commit::on(0)
    };
    db.commit(&lease, early).await.expect("commits");
    lease
}

async fn refused(db: &dyn Checkpointer, lease: &Lease, commit: Commit, fault: &str) {
    match db.commit(lease, commit).await {
        Err(StorageError::Backend { operation, source }) => {
            assert_eq!(operation, "committing a step of thread t");
            assert!(source.to_string().contains("injected"), "{fault}: {source}");
        }
        other => panic!("with a fault at {fault}: {other:?}"),
    }
}

async fn lands(db: &dyn Checkpointer, lease: &Lease) {
    let receipt = db.commit(lease, everything()).await.expect("commits");
    assert_eq!(receipt.checkpoint, Some(1));
    let entries = db
        .journal(&JournalFilter::all(), graph::Cursor::START, 10)
        .await
        .expect("reads");
    assert_eq!(entries.len(), 3);
}

#[tokio::test]
async fn sqlite_keeps_the_old_state_when_any_statement_fails() {
    async fn dump(db: &mut SqliteConnection) -> Vec<String> {
        let mut all = Vec::new();
        for table in TABLES {
            let columns: Vec<String> =
                sqlx::query_scalar("select 'quote(' || name || ')' from pragma_table_info(?1)")
                    .bind(table)
                    .fetch_all(&mut *db)
                    .await
                    .expect("columns");
            let sql = format!("select {} from {table}", columns.join("||','||"));
            let rows = sqlx::query(AssertSqlSafe(sql))
                .fetch_all(&mut *db)
                .await
                .expect("rows");
            all.extend(
                rows.iter()
                    .map(|row| format!("{table}: {}", row.get::<String, _>(0))),
            );
        }
        all
    }
    let (path, _dir) = storage::sqlite_path();
    let db = storage::sqlite(path.clone()).await;
    let lease = prepare(&db).await;
    let mut side = SqliteConnection::connect(&format!("sqlite://{}", path.display()))
        .await
        .expect("opens");
    let before = dump(&mut side).await;
    assert!(before.len() > 5);
    for (table, change) in FAULTS {
        let fault = format!("{change} of {table}");
        for moment in ["before", "after"] {
            sqlx::raw_sql(AssertSqlSafe(format!(
                "create trigger fault {moment} {change} on {table} begin select raise(abort, 'injected'); end"
            )))
            .execute(&mut side)
            .await
            .expect("a trigger");
            refused(&db, &lease, everything(), &fault).await;
            sqlx::raw_sql("drop trigger fault")
                .execute(&mut side)
                .await
                .expect("no trigger");
            assert_eq!(dump(&mut side).await, before, "after a fault at {fault}");
        }
    }
    lands(&db, &lease).await;
}

#[tokio::test]
async fn postgres_keeps_the_old_state_when_any_statement_fails() {
    async fn dump(db: &mut PgConnection) -> Vec<String> {
        let mut all = Vec::new();
        for table in TABLES {
            let sql = format!("select '{table}: ' || t::text from {table} t order by 1");
            let rows: Vec<String> = sqlx::query_scalar(AssertSqlSafe(sql))
                .fetch_all(&mut *db)
                .await
                .expect("rows");
            all.extend(rows);
        }
        all
    }
    let schema = storage::Schema::make().await;
    let db = storage::connect(schema.url.clone()).await;
    let lease = prepare(&db).await;
    let mut side = PgConnection::connect(&schema.url).await.expect("connects");
    sqlx::raw_sql(
        "create function injected() returns trigger language plpgsql as $$ begin raise 'injected'; end $$",
    )
    .execute(&mut side)
    .await
    .expect("a function");
    let before = dump(&mut side).await;
    assert!(before.len() > 5);
    for (table, change) in FAULTS {
        let fault = format!("{change} of {table}");
        for moment in ["before", "after"] {
            sqlx::raw_sql(AssertSqlSafe(format!(
                "create trigger fault {moment} {change} on {table} for each row execute function injected()"
            )))
            .execute(&mut side)
            .await
            .expect("a trigger");
            refused(&db, &lease, everything(), &fault).await;
            if matches!(
                (table, change),
                ("graph_thread", "update") | ("graph_checkpoint", "insert")
            ) {
                // The way on which steps share a transaction.
                refused(&db, &lease, step(), &fault).await;
            }
            sqlx::raw_sql(AssertSqlSafe(format!("drop trigger fault on {table}")))
                .execute(&mut side)
                .await
                .expect("no trigger");
            assert_eq!(dump(&mut side).await, before, "after a fault at {fault}");
        }
    }
    lands(&db, &lease).await;
}
