//! What is stored cannot be read, because somebody or something has written over it: who hears of it, and who does not.
//!
//! In memory there is nothing that could be written over.

use std::{path::PathBuf, sync::Arc};

use graph::{
    Arrived, Busy, Context, Cursor, END, Engine, EngineError, GraphBuilder, HistoryFilter,
    JournalFilter, NodeError, START, StorageError, StoredPart, ThreadStatus, WaitFor,
};
use sqlx::{AssertSqlSafe, Connection as _};

use crate::{
    lab::{Lab, Notes, entries, log, notes, run, said, says, start_as, thread_as},
    storage,
};

/// A database, and a way past whoever takes care of it.
pub struct Desk {
    pub lab: Lab,
    door: Door,
}

enum Door {
    Sqlite(PathBuf),
    Postgres(String),
}

impl Desk {
    pub async fn sqlite() -> Self {
        let (path, dir) = storage::sqlite_path();
        let store = Arc::new(storage::sqlite(path.clone()).await);
        Self {
            lab: Lab::of(store, dir),
            door: Door::Sqlite(path),
        }
    }

    pub async fn postgres() -> Self {
        let schema = storage::Schema::make().await;
        let store = Arc::new(storage::connect(schema.url.clone()).await);
        let door = Door::Postgres(schema.url.clone());
        Self {
            lab: Lab::of(store, schema),
            door,
        }
    }

    /// Writes over something; what can be written there differs.
    pub async fn spoil(&self, on_sqlite: &str, on_postgres: &str) {
        let changed = match &self.door {
            Door::Sqlite(path) => {
                let url = format!("sqlite://{}", path.display());
                let mut side = sqlx::SqliteConnection::connect(&url).await.expect("opens");
                let query = sqlx::query(AssertSqlSafe(on_sqlite));
                let done = query.execute(&mut side).await.expect("is written");
                done.rows_affected()
            }
            Door::Postgres(url) => {
                let mut side = sqlx::PgConnection::connect(url).await.expect("connects");
                let query = sqlx::query(AssertSqlSafe(on_postgres));
                let done = query.execute(&mut side).await.expect("is written");
                done.rows_affected()
            }
        };
        assert_eq!(changed, 1, "one row is spoilt");
    }
}

/// Makes a test of the case on each database that has rows.
macro_rules! on_disk {
    (async fn $name:ident($desk:ident) $body:block) => {
        mod $name {
            use super::*;

            async fn case($desk: crate::corruption::Desk) $body

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn sqlite() {
                case(crate::corruption::Desk::sqlite().await).await;
            }

            #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
            async fn postgres() {
                case(crate::corruption::Desk::postgres().await).await;
            }
        }
    };
}
pub(crate) use on_disk;

/// Checkpoints 1 and 2; then it has done something, and waits.
fn graph() -> GraphBuilder<Notes> {
    notes("g")
        .node("a", |_, _| says("a"))
        .node("b", |_, _| says("b"))
        .node("c", |_, ctx: Context| async move {
            ctx.step("once", |_| async { Ok::<_, NodeError>("done".to_owned()) })
                .await?;
            let Arrived::Signal(came) = ctx.wait_any("go", &WaitFor::new().signal("go")).await?
            else {
                return Err(NodeError::msg("not a signal"));
            };
            Ok(log(format!("c {}", came.key)))
        })
        .edge(START, "a")
        .edge("a", "b")
        .edge("b", "c")
        .edge("c", END)
}

async fn waiting(desk: &Desk, ids: &[&str]) -> Engine {
    let engine = desk.lab.notes(graph()).await;
    for id in ids {
        start_as(&engine, id).await;
    }
    run(&engine).await;
    for id in ids {
        let record = thread_as(&engine, id).await;
        assert_eq!(
            (record.status, record.checkpoint),
            (ThreadStatus::Waiting, 2)
        );
    }
    engine
}

async fn wake(engine: &Engine, id: &str) {
    engine.signal(id, "go", "k", &()).await.expect("is sent");
    run(engine).await;
}

fn unreadable<T: std::fmt::Debug>(answer: Result<T, EngineError>, id: &str) -> StoredPart {
    match answer {
        Err(EngineError::Storage(StorageError::Unreadable { thread, part, .. })) => {
            assert_eq!(thread.as_str(), id);
            part
        }
        other => panic!("{id}: {other:?}"),
    }
}

/// It has failed once, for that reason; and nobody tries again.
async fn has_failed_once(engine: &Engine, id: &str, part: StoredPart) {
    let failed = thread_as(engine, id).await;
    assert_eq!(failed.status, ThreadStatus::Failed, "{failed:?}");
    assert!(failed.lease.is_none());
    let error = failed.error.expect("says why");
    let expected = format!("{part} of thread `{id}` cannot be read");
    assert!(error.starts_with(&expected), "{error}");
    run(engine).await;
    let said = said(engine, id).await;
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("thread.failed "), "{said:?}");
}

/// From a checkpoint that can be read, the thread goes on to its end.
async fn goes_on_from_the_first_checkpoint(engine: &Engine, id: &str) {
    let state = engine.state_at(id, 1).await.expect("can be read");
    assert_eq!(state["log"], serde_json::json!(["a"]));
    let branch = engine.fork(id, 1, None, &()).await.expect("forks");
    engine.set_head(id, branch).await.expect("is the head");
    run(engine).await;
    let record = thread_as(engine, id).await;
    assert_eq!(record.status, ThreadStatus::Done, "{record:?}");
    let state: Notes = engine.state(id).await.expect("has a state");
    assert_eq!(state.log, ["a", "b", "c k"]);
}

on_disk! {
    async fn a_checkpoint_that_cannot_be_read_fails_its_thread_once_and_others_can_be_gone_back_to(desk) {
        let ids = ["garbage", "half", "other"];
        let engine = waiting(&desk, &ids).await;
        let postgres = "set appends = '[1]'";
        for (id, sqlite, postgres) in [
            ("garbage", "set appends = cast(x'ff00fe7b' as text)", postgres),
            ("half", "set plan = '{\"hops\":'", "set appends = '\"x\"'"),
            ("other", "set appends = '[1]'", postgres),
        ] {
            let row = format!("where number = 2 and thread = (select thread from graph_thread where id = '{id}')");
            desk.spoil(&format!("update graph_checkpoint {sqlite} {row}"), &format!("update graph_checkpoint {postgres} {row}")).await;
            let part = StoredPart::Checkpoint(2);
            assert_eq!(unreadable(engine.state_at(id, 2).await, id), part);
            assert_eq!(unreadable(engine.state::<Notes>(id).await, id), part);
            let history = engine.history(id, HistoryFilter::default()).await.expect("is listed");
            assert_eq!(history.iter().map(|it| it.checkpoint).collect::<Vec<_>>(), [2, 1, 0]);
            wake(&engine, id).await;
            has_failed_once(&engine, id, part).await;
            // What is tried again fails again, once.
            engine.retry(id).await.expect("is tried");
            run(&engine).await;
            assert_eq!(thread_as(&engine, id).await.status, ThreadStatus::Failed);
            assert_eq!(said(&engine, id).await.len(), 2);
            goes_on_from_the_first_checkpoint(&engine, id).await;
        }
    }
}

on_disk! {
    async fn a_pending_write_that_cannot_be_read_fails_its_thread_once(desk) {
        let engine = waiting(&desk, &["t"]).await;
        // What the durable step has returned.
        desk.spoil(
            "update graph_write set value = '{' where kind = 1",
            "update graph_write set kind = 99 where kind = 1",
        ).await;
        wake(&engine, "t").await;
        has_failed_once(&engine, "t", StoredPart::Writes(2)).await;
        goes_on_from_the_first_checkpoint(&engine, "t").await;
    }
}

on_disk! {
    async fn a_thread_whose_row_cannot_be_read_fails_and_holds_up_nobody(desk) {
        let engine = waiting(&desk, &["before", "bad", "worse"]).await;
        desk.spoil("update graph_thread set waits = '{' where id = 'bad'", "update graph_thread set waits = '5' where id = 'bad'").await;
        desk.spoil("update graph_thread set waits = '[1]', output = '[' where id = 'worse'", "update graph_thread set waits = '[1]' where id = 'worse'").await;
        assert_eq!(unreadable(engine.thread("bad").await, "bad"), StoredPart::Row);
        for id in ["bad", "before", "worse"] {
            engine.signal(id, "go", "k", &()).await.expect("is sent");
        }
        start_as(&engine, "later").await;
        run(&engine).await;
        assert_eq!(thread_as(&engine, "before").await.status, ThreadStatus::Done);
        assert_eq!(thread_as(&engine, "later").await.status, ThreadStatus::Waiting);
        for id in ["bad", "worse"] {
            has_failed_once(&engine, id, StoredPart::Row).await;
            // What could not be read was what it waited for, which it does not any more.
            engine.retry(id).await.expect("is tried");
            run(&engine).await;
            assert_eq!(thread_as(&engine, id).await.status, ThreadStatus::Done);
        }
    }
}

on_disk! {
    async fn a_further_input_to_a_thread_that_cannot_be_read_fails_it_once(desk) {
        let engine = waiting(&desk, &["t"]).await;
        wake(&engine, "t").await;
        assert_eq!(thread_as(&engine, "t").await.status, ThreadStatus::Done);
        desk.spoil("update graph_checkpoint set appends = '[1]' where number = 1", "update graph_checkpoint set appends = '[1]' where number = 1").await;
        engine.input("t", "more", &(), Busy::Reject).await.expect("is taken");
        run(&engine).await;
        let failed = thread_as(&engine, "t").await;
        assert_eq!(failed.status, ThreadStatus::Failed);
        assert!(failed.error.expect("says why").starts_with("checkpoint 1 of thread `t` cannot be read"));
        assert_eq!(said(&engine, "t").await.len(), 2, "done, then failed");
    }
}

on_disk! {
    async fn a_parent_hears_that_its_child_cannot_be_read(desk) {
        let parent = notes("p").node("p", |_, ctx: Context| async move {
            ctx.spawn("kid", "g", &())?;
            let Arrived::Child(end) = ctx.wait_any("kid", &WaitFor::new().child("kid")).await? else {
                return Err(NodeError::msg("not a child"));
            };
            Ok(log(end.error.unwrap_or_default()))
        }).edge(START, "p").edge("p", END);
        let engine = Engine::builder(desk.lab.store.clone())
            .graph(parent.compile().expect("compiles"))
            .graph(graph().compile().expect("compiles"))
            .build().await.expect("builds");
        engine.start("t", "p", &(), graph::StartOptions::default()).await.expect("starts");
        run(&engine).await;
        desk.spoil("update graph_thread set waits = '{' where id = 't/kid'", "update graph_thread set waits = '5' where id = 't/kid'").await;
        wake(&engine, "t/kid").await;
        assert_eq!(thread_as(&engine, "t").await.status, ThreadStatus::Done);
        let state: Notes = engine.state("t").await.expect("has a state");
        assert!(state.log[0].starts_with("the row of thread `t/kid` cannot be read"), "{:?}", state.log);
    }
}

/// PostgreSQL reads any payload that it has let in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_that_cannot_be_read_fails_its_thread_and_leaves_the_mailbox() {
    let desk = Desk::sqlite().await;
    let engine = waiting(&desk, &["t"]).await;
    for key in ["1", "2"] {
        engine.signal("t", "news", key, &()).await.expect("is sent");
    }
    let bad = "update graph_signal set payload = '{' where key = '1'";
    desk.spoil(bad, bad).await;
    run(&engine).await;
    has_failed_once(&engine, "t", StoredPart::Signal(1)).await;
    let (mailbox, _) = desk.lab.store.mailbox(&"t".into(), 0).await.expect("reads");
    assert_eq!(mailbox.len(), 1, "the other one is still there");
    engine.retry("t").await.expect("is tried");
    wake(&engine, "t").await;
    assert_eq!(thread_as(&engine, "t").await.status, ThreadStatus::Done);
}

/// PostgreSQL reads any payload that it has let in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_of_the_journal_that_cannot_be_read_is_named_and_can_be_passed() {
    let desk = Desk::sqlite().await;
    let engine = waiting(&desk, &[]).await;
    for name in ["one", "two", "three"] {
        let journal = engine.journal();
        journal.append(name, "s", name, &()).await.expect("is said");
    }
    let bad = "update graph_journal set payload = cast(x'80' as text) where name = 'two'";
    desk.spoil(bad, bad).await;
    let stream = JournalFilter::stream("s");
    let first = entries(&engine, "s").await;
    assert_eq!(first.len(), 1, "up to where it can be read: {first:?}");
    let journal = engine.journal();
    let at = match journal.read(&stream, first[0].cursor, 10).await {
        Err(EngineError::Storage(StorageError::UnreadableEntry { cursor, .. })) => cursor,
        other => panic!("{other:?}"),
    };
    assert_eq!(at, Cursor(first[0].cursor.0 + 1));
    let rest = journal.read(&stream, at, 10).await.expect("can be read");
    assert_eq!(rest[0].name, "three");
    // Numbers go on.
    journal
        .append("four", "s", "four", &())
        .await
        .expect("is said");
    let rest = journal.read(&stream, at, 10).await.expect("can be read");
    assert_eq!(rest.iter().map(|it| it.number).collect::<Vec<_>>(), [3, 4]);
}

on_disk! {
    async fn an_end_of_a_child_that_is_none_fails_its_parent_once_and_leaves_the_mailbox(desk) {
        let parent = || notes("g")
            .node("a", |_, ctx: Context| async move {
                ctx.spawn("kid", "child", &())?;
                let Arrived::Child(end) = ctx.wait_any("kid", &WaitFor::new().child("kid")).await? else {
                    return Err(NodeError::msg("not a child"));
                };
                Ok(log(end.name))
            })
            .edge(START, "a").edge("a", END).compile().expect("compiles");
        let child = || notes("child")
            .node("b", |_, ctx: Context| async move {
                let answer: String = ctx.interrupt("q", "?").await?;
                Ok(log(answer))
            })
            .edge(START, "b").edge("b", END).compile().expect("compiles");
        let both = Engine::builder(desk.lab.store.clone()).graph(parent()).graph(child()).build().await.expect("builds");
        start_as(&both, "t").await;
        run(&both).await;
        let question = thread_as(&both, "t/kid").await.waits[0].id.clone();
        both.answer("t/kid", &question, "yes").await.expect("is taken");
        // One that does not know the parent.
        let other = desk.lab.engine(child()).await;
        run(&other).await;
        assert_eq!(thread_as(&both, "t/kid").await.status, ThreadStatus::Done);
        let bad = "update graph_signal set payload = '{\"name\": \"kid\", \"status\": 7}' where kind = 'graph.child'";
        desk.spoil(bad, bad).await;
        run(&both).await;
        has_failed_once(&both, "t", StoredPart::Signal(1)).await;
        let (mailbox, _) = desk.lab.store.mailbox(&"t".into(), 0).await.expect("reads");
        assert!(mailbox.is_empty(), "{mailbox:?}");
        // It can be tried again, and hold up nobody.
        both.retry("t").await.expect("is tried");
        run(&both).await;
        assert_eq!(thread_as(&both, "t").await.status, ThreadStatus::Waiting);
    }
}
