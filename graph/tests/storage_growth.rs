//! What is stored grows with what changed, and reading it back stays bounded.

mod storage;

use std::{sync::Arc, time::Duration};

use graph::{
    Context, END, Engine, Goto, Graph, START, ServeOptions, StartOptions, State, ThreadStatus,
    checkpoint::Checkpointer,
};
use serde::{Deserialize, Serialize};
use sqlx::Connection;

const STEPS: usize = 1000;
/// No step more than it needs.
const LIMIT: u64 = 1000;
const BYTES: usize = 200;

#[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
struct Log {
    #[channel(append)]
    log: Vec<String>,
    n: usize,
}

/// One thread that appends a string of 200 bytes in each of 1,000 steps.
async fn append_all(store: Arc<dyn Checkpointer>) -> Engine {
    let graph = Graph::<Log>::builder("g")
        .node("a", |s: Arc<Log>, _: Context| async move {
            Ok(LogUpdate::default()
                .log(vec![format!("{:0BYTES$}", s.n)])
                .n(s.n + 1))
        })
        .edge(START, "a")
        .conditional("a", ["a", END], |s: &Log| {
            if s.n < STEPS {
                Goto::node("a")
            } else {
                Goto::end()
            }
        })
        .output(|s: &Log| serde_json::json!(s.n))
        .recursion_limit(LIMIT)
        .compile()
        .expect("compiles");
    let engine = Engine::builder(store)
        .graph(graph)
        .build()
        .await
        .expect("builds");
    engine
        .start("t", "g", &(), StartOptions::default())
        .await
        .expect("starts");
    tokio::time::timeout(
        Duration::from_mins(1),
        engine.run_due(ServeOptions::default()),
    )
    .await
    .expect("comes to rest")
    .expect("runs");
    let thread = engine.thread("t").await.expect("reads").expect("is there");
    assert_eq!(thread.status, ThreadStatus::Done);
    let state: Log = engine.state("t").await.expect("has a state");
    assert_eq!((state.log.len(), state.n), (STEPS, STEPS));
    engine
}

/// Beyond the appended items (each once, in the row that appended it), what is read back is bounded.
async fn reads_back_bounded(store: &dyn Checkpointer) {
    let rows = store.state_rows(&"t".into(), None).await.expect("reads");
    let items: usize = rows
        .rows
        .iter()
        .map(|row| row.appends["log"].as_array().map_or(0, Vec::len))
        .sum();
    assert_eq!(items, STEPS, "each item once");
    let changes = rows
        .rows
        .iter()
        .filter(|row| !row.changes.is_empty())
        .count();
    assert!(
        changes < 200,
        "{changes} rows with changes of other channels"
    );
    let snapshots: Vec<usize> = rows
        .rows
        .iter()
        .filter_map(|row| row.snapshot.as_ref())
        .map(|snapshot| serde_json::to_string(snapshot).expect("JSON").len())
        .collect();
    assert_eq!(snapshots.len(), 1, "only the newest snapshot is read");
    assert!(
        snapshots[0] < 1000,
        "it does not hold the list: {snapshots:?}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appending_in_sqlite_stores_less_than_three_times_the_bytes() {
    let (path, _dir) = storage::sqlite_path();
    let store = Arc::new(storage::sqlite(path.clone()).await);
    store.migrate().await.expect("migrates");
    let size = async || {
        let mut side = sqlx::SqliteConnection::connect(&format!("sqlite://{}", path.display()))
            .await
            .expect("opens");
        let pages: i64 = sqlx::query_scalar("pragma page_count")
            .fetch_one(&mut side)
            .await
            .expect("pages");
        let page: i64 = sqlx::query_scalar("pragma page_size")
            .fetch_one(&mut side)
            .await
            .expect("a size");
        usize::try_from(pages * page).expect("a size")
    };
    let before = size().await;
    append_all(store.clone()).await;
    reads_back_bounded(&*store).await;
    let stored = size().await - before;
    println!("sqlite: {stored} bytes for {} appended", STEPS * BYTES);
    assert!(stored < 3 * STEPS * BYTES, "{stored}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn appending_in_postgres_stores_less_than_three_times_the_bytes() {
    // Of its own: the row that each step updates would grow a copy with each as long as another test has a transaction open.
    let database = storage::Database::make().await;
    let store = Arc::new(storage::connect(database.url.clone()).await);
    store.migrate().await.expect("migrates");
    let size = async || {
        let mut side = sqlx::PgConnection::connect(&database.url)
            .await
            .expect("connects");
        let bytes: i64 = sqlx::query_scalar(
            "select sum(pg_total_relation_size(oid))::bigint from pg_class \
             where relkind = 'r' and relnamespace = current_schema()::regnamespace",
        )
        .fetch_one(&mut side)
        .await
        .expect("a size");
        usize::try_from(bytes).expect("a size")
    };
    let before = size().await;
    append_all(store.clone()).await;
    reads_back_bounded(&*store).await;
    let stored = size().await - before;
    println!("postgres: {stored} bytes for {} appended", STEPS * BYTES);
    assert!(stored < 3 * STEPS * BYTES, "{stored}");
}
