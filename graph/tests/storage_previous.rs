//! Rows of the previous release are read, and its threads go on to their ends. See `tests/fixtures/README.md`.

#[path = "fixtures/scenario.rs"]
mod scenario;
mod storage;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use graph::{
    Appended, Busy, Cursor, Delivered, Engine, EngineError, HistoryFilter, JournalFilter, Keep,
    ThreadFilter, ThreadStatus,
    checkpoint::{Checkpointer, NewEvent},
};
use scenario::{Notes, engine, options};
use serde_json::json;
use sqlx::Connection;

async fn statuses(engine: &Engine) -> BTreeMap<String, ThreadStatus> {
    let threads = engine.threads(&ThreadFilter::default()).await;
    let threads = threads.expect("lists").into_iter();
    threads
        .map(|thread| (thread.id.to_string(), thread.status))
        .collect()
}

async fn run(engine: &Engine) {
    tokio::time::timeout(Duration::from_secs(30), engine.run_due(options()))
        .await
        .expect("comes to rest")
        .expect("runs");
}

async fn state(engine: &Engine, id: &str) -> Notes {
    engine.state(id).await.expect("has a state")
}

/// Answers the one open question of a thread.
async fn answer(engine: &Engine, id: &str) {
    let thread = engine.thread(id).await.expect("reads").expect("is there");
    assert_eq!(thread.waits.len(), 1, "{id} asks one thing");
    assert_eq!(
        (thread.waits[0].name.as_str(), &thread.waits[0].value),
        ("question", &json!("what?"))
    );
    engine
        .answer(id, &thread.waits[0].id, "answer")
        .await
        .expect("is taken");
}

async fn goes_on(store: Arc<dyn Checkpointer>) {
    let engine = engine(store.clone()).await;
    what_was_written_is_read(&engine, &*store).await;

    // What was due goes on by itself: an answer, an input, a request to cancel, a timer, a dead process's thread.
    run(&engine).await;
    let now = statuses(&engine).await;
    let done = |id: &str| assert_eq!(now[id], ThreadStatus::Done, "{id}");
    for id in ["done", "again", "answered", "naps", "ready", "retries"] {
        done(id);
    }
    assert_eq!(now["cancelling"], ThreadStatus::Cancelled);
    assert_eq!(now["running"], ThreadStatus::Failed);
    assert_eq!(state(&engine, "again").await.sum, 100);
    assert_eq!(
        state(&engine, "answered").await.log,
        ["input", "before", "yes", "beside"]
    );
    assert_eq!(state(&engine, "retries").await.log, ["input", "attempt 2"]);
    assert!(state(&engine, "naps").await.log[1].contains("\"k\""));

    // The others go on when somebody does what they wait for.
    let other = state(&engine, "branches").await;
    assert_eq!(other.log, ["input", "before", "fork"]);
    for id in ["asks", "branches", "parent/kid"] {
        answer(&engine, id).await;
    }
    engine.signal("waits", "go", "k", &2).await.expect("sends");
    for id in ["fails", "running", "cancelled", "cancelling"] {
        engine.retry(id).await.expect("can be retried");
    }
    run(&engine).await;
    for id in ["cancelled", "cancelling"] {
        answer(&engine, id).await;
    }
    let naps = async || {
        engine
            .thread("waits")
            .await
            .expect("reads")
            .expect("is there")
            .status
    };
    for _ in 0..1000 {
        run(&engine).await;
        if naps().await == ThreadStatus::Done {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for (id, status) in statuses(&engine).await {
        assert_eq!(status, ThreadStatus::Done, "{id}");
    }
    for id in ["asks", "cancelled", "cancelling"] {
        let asked = state(&engine, id).await;
        assert_eq!(asked.log, ["input", "before", "answer", "beside"], "{id}");
        assert_eq!(
            (asked.sum, asked.last.len()),
            (1, 32),
            "the durable step is remembered"
        );
    }
    assert_eq!(
        state(&engine, "branches").await.log,
        ["input", "before", "fork", "answer", "beside"]
    );
    assert_eq!(
        state(&engine, "fails").await.log,
        ["input", "part 1", "part 2"]
    );
    assert!(state(&engine, "parent").await.log[1].contains("\"kid\""));
    nothing_is_said_twice(&engine).await;

    // And what this release can do with threads, it can do with these.
    let before = state(&engine, "done").await;
    engine.copy_thread("done", "copy").await.expect("copies");
    engine.prune("done", Keep::latest()).await.expect("prunes");
    assert_eq!(state(&engine, "done").await, before);
    assert_eq!(state(&engine, "copy").await, before);
    engine.set_head("branches", 0).await.expect("is a branch");
    run(&engine).await;
    answer(&engine, "branches").await;
    run(&engine).await;
    assert_eq!(
        state(&engine, "branches").await.log,
        ["input", "before", "answer", "beside"]
    );
}

async fn what_was_written_is_read(engine: &Engine, store: &dyn Checkpointer) {
    use ThreadStatus::{Cancelled, Done, Failed, Ready, Running, Waiting};
    let expected = [
        ("again", Done),
        ("answered", Ready),
        ("asks", Waiting),
        ("branches", Waiting),
        ("cancelled", Cancelled),
        ("cancelling", Ready),
        ("done", Done),
        ("fails", Failed),
        ("naps", Waiting),
        ("parent", Waiting),
        ("parent/kid", Waiting),
        ("ready", Ready),
        ("retries", Waiting),
        ("running", Running),
        ("waits", Ready),
    ];
    let expected: BTreeMap<String, ThreadStatus> =
        expected.map(|(id, status)| (id.to_owned(), status)).into();
    assert_eq!(statuses(engine).await, expected);

    let done = state(engine, "done").await;
    assert_eq!(
        (
            done.sum,
            done.log.len(),
            done.seen.len(),
            done.last.as_str()
        ),
        (50, 51, 7, "50")
    );
    assert_eq!(done.log[50], "round 50\u{0}");
    let filter = HistoryFilter {
        limit: Some(1000),
        ..HistoryFilter::default()
    };
    assert_eq!(
        engine.history("done", filter).await.expect("reads").len(),
        51
    );
    let then = engine.state_at("done", 20).await.expect("reads");
    assert_eq!((&then["sum"], &then["last"]), (&json!(20), &json!("20")));
    let failed = engine
        .thread("fails")
        .await
        .expect("reads")
        .expect("is there");
    assert_eq!(
        failed.error.as_deref(),
        Some("node `part`: the first time fails")
    );
    let kid = engine
        .thread("parent/kid")
        .await
        .expect("reads")
        .expect("is there");
    assert_eq!(kid.parent.expect("has one").name, "kid");

    // What was sent once is still sent once.
    let again = engine.signal("naps", "go", "k", &1).await.expect("answers");
    assert_eq!(again, Delivered::Duplicate);
    let update = json!({"sum": 1});
    let again = engine
        .input("again", "k", &update, Busy::Enqueue)
        .await
        .expect("answers");
    assert_eq!(again, Delivered::Duplicate);
    let event = NewEvent {
        stream: "said".to_owned(),
        name: "outside".to_owned(),
        payload: json!(1),
        thread: None,
    };
    let again = store.append("outside", event).await.expect("answers");
    assert_eq!(again, Appended::Duplicate);
    let open = engine
        .thread("answered")
        .await
        .expect("reads")
        .expect("is there")
        .waits;
    let error = engine
        .answer("answered", &open[0].id, "again")
        .await
        .expect_err("is refused");
    assert!(
        matches!(error, EngineError::AlreadyAnswered { .. }),
        "{error}"
    );
}

/// Numbers go on where the previous release stopped.
async fn nothing_is_said_twice(engine: &Engine) {
    let said = engine
        .journal()
        .read(&JournalFilter::stream("said"), Cursor::START, 1000)
        .await
        .expect("reads");
    let numbers: Vec<u64> = said.iter().map(|entry| entry.number).collect();
    assert_eq!(numbers, (1..=said.len() as u64).collect::<Vec<_>>());
    let mut asked: Vec<&str> = said
        .iter()
        .filter(|entry| entry.name == "asked")
        .map(|entry| entry.payload.as_str().expect("a name"))
        .collect();
    asked.sort_unstable();
    // Each branch of the one with two has asked for itself.
    let expected = [
        "answered",
        "asks",
        "branches",
        "branches",
        "cancelled",
        "cancelling",
        "parent/kid",
    ];
    assert_eq!(asked, expected);
    let outside = said
        .iter()
        .find(|entry| entry.name == "outside")
        .expect("is there");
    assert_eq!(outside.payload, json!({"nul": "\u{0}"}));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_of_the_previous_release_go_on_on_sqlite() {
    let (path, _dir) = storage::sqlite_path();
    let options = sqlx::sqlite::SqliteConnectOptions::new()
        .filename(&path)
        .create_if_missing(true);
    let mut db = sqlx::SqliteConnection::connect_with(&options)
        .await
        .expect("the file opens");
    sqlx::raw_sql(include_str!("fixtures/previous/sqlite.sql"))
        .execute(&mut db)
        .await
        .expect("the dump is loaded");
    db.close().await.expect("closes");
    goes_on(Arc::new(storage::sqlite(path).await)).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn threads_of_the_previous_release_go_on_on_postgres() {
    let schema = storage::Schema::make().await;
    let dump = include_str!("fixtures/previous/postgres.sql")
        .replace("CREATE SCHEMA graph_fixture;\n", "")
        .replace("graph_fixture", schema.name());
    let mut db = sqlx::PgConnection::connect(&schema.url)
        .await
        .expect("the test server answers");
    sqlx::raw_sql(sqlx::AssertSqlSafe(dump))
        .execute(&mut db)
        .await
        .expect("the dump is loaded");
    db.close().await.expect("closes");
    goes_on(Arc::new(storage::connect(schema.url.clone()).await)).await;
}
