//! Threads whose writers can be held up, and short ways to say what is written.

use std::{collections::BTreeSet, time::Duration};

use graph::{
    PostgresCheckpointer, Priority, Source, StorageError, ThreadStatus, WaitInfo, WaitKind,
    checkpoint::{
        Checkpointer, ClaimRequest, Commit, Lease, NewCheckpoint, NewEvent, NewSignal, NewThread,
        Receipt, Then,
    },
};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio::task::JoinHandle;

use crate::storage::{self, Schema};

const PATIENCE: Duration = Duration::from_mins(1);

pub fn thread(id: &str) -> NewThread {
    NewThread {
        id: id.into(),
        graph: "g".to_owned(),
        parent: None,
        priority: Priority::Medium,
        input: json!({}).into(),
    }
}

pub fn signal(to: &str, key: &str) -> NewSignal {
    NewSignal {
        thread: to.into(),
        kind: "k".to_owned(),
        key: key.to_owned(),
        payload: json!(key),
        revives: false,
    }
}

pub fn event(stream: &str, name: &str) -> NewEvent {
    NewEvent {
        stream: stream.to_owned(),
        name: name.to_owned(),
        payload: json!(name),
        thread: None,
    }
}

pub fn step(parent: u64, value: &str) -> Commit {
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

pub fn wait(id: &str) -> WaitInfo {
    WaitInfo {
        id: id.to_owned(),
        name: id.to_owned(),
        kind: WaitKind::Wait,
        task: "a".to_owned(),
        value: Value::Null,
        signals: vec!["k".to_owned()],
        children: Vec::new(),
        until: None,
    }
}

pub fn asleep(commit: Commit, mail_seen: u64) -> Commit {
    Commit {
        waits: Some(vec![wait("w")]),
        then: Then::Wait {
            mail_seen,
            wake_at: None,
        },
        ..commit
    }
}

pub fn ended(commit: Commit) -> Commit {
    Commit {
        then: Then::End {
            status: ThreadStatus::Done,
            error: None,
            output: Some(json!("out")),
        },
        ..commit
    }
}

/// A database with running threads, two of which only serve to keep the writers busy.
pub struct Stage {
    pub db: PostgresCheckpointer,
    pub side: PgConnection,
    pub holder: PgConnection,
    pub held: Vec<Lease>,
    pub leases: Vec<Lease>,
    _schema: Schema,
}

impl Stage {
    pub async fn with(threads: usize) -> Self {
        let schema = Schema::make().await;
        let db = storage::connect(schema.url.clone()).await;
        db.migrate().await.expect("migrates");
        for i in 0..threads + 2 {
            db.create_thread(thread(&format!("t{i:02}")))
                .await
                .expect("creates");
        }
        let claimed = db
            .claim(ClaimRequest {
                owner: "test",
                graphs: &["g".to_owned()],
                limit: threads + 2,
                lease: Duration::from_mins(1),
            })
            .await
            .expect("claims");
        let mut leases: Vec<Lease> = claimed.claims.into_iter().map(|c| c.lease).collect();
        leases.sort_by(|a, b| a.thread.cmp(&b.thread));
        let held = leases.split_off(threads);
        assert_eq!((leases.len(), held.len()), (threads, 2));
        Self {
            db,
            side: PgConnection::connect(&schema.url).await.expect("connects"),
            holder: PgConnection::connect(&schema.url).await.expect("connects"),
            held,
            leases,
            _schema: schema,
        }
    }

    pub async fn run(&mut self, sql: &'static str) {
        sqlx::raw_sql(sql)
            .execute(&mut self.holder)
            .await
            .expect("runs");
    }

    /// Whoever wants the rows of the two threads waits from now on, and both writers want them.
    pub async fn stop_writers(&mut self) -> Vec<JoinHandle<Result<Receipt, StorageError>>> {
        self.run("begin; select from graph_thread order by id desc limit 2 for update")
            .await;
        let mut stuck = Vec::new();
        for (lease, count) in self.held.clone().into_iter().zip(1..) {
            let db = self.db.clone();
            stuck.push(tokio::spawn(async move {
                db.commit(&lease, step(0, "held")).await
            }));
            let mut waiting = 0;
            for _ in 0..1000 {
                waiting = sqlx::query_scalar::<_, i64>(
                    "select count(*) from pg_locks l join pg_stat_activity a using (pid) \
                     where not l.granted and a.query like '%graph_checkpoint%' and $1 = any (pg_blocking_pids(a.pid))",
                )
                .bind(self.holder_pid().await)
                .fetch_one(&mut self.side)
                .await
                .expect("looks");
                if waiting >= count {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert_eq!(waiting, count, "a writer waits for the row");
        }
        stuck
    }

    pub async fn holder_pid(&mut self) -> i32 {
        sqlx::query_scalar("select pg_backend_pid()")
            .fetch_one(&mut self.holder)
            .await
            .expect("has one")
    }

    pub async fn let_go(&mut self) {
        self.run("rollback").await;
    }

    /// The transactions in which rows of a table were written, of threads that are not held.
    pub async fn transactions(&mut self, sql: &'static str) -> BTreeSet<String> {
        let found: Vec<String> = sqlx::query_scalar(sql)
            .fetch_all(&mut self.side)
            .await
            .expect("reads");
        found.into_iter().collect()
    }
}

/// Asks for something, and sees to it that it waits in the queue before the next thing is asked for.
pub async fn asked<T: Send + 'static>(
    work: impl Future<Output = T> + Send + 'static,
) -> JoinHandle<T> {
    let task = tokio::spawn(work);
    // One turn is enough for it to get into the queue on a runtime of one thread.
    tokio::task::yield_now().await;
    task
}

pub async fn answer<T>(task: JoinHandle<T>) -> T {
    tokio::time::timeout(PATIENCE, task)
        .await
        .expect("is answered")
        .expect("does not panic")
}

pub fn commit(
    db: &PostgresCheckpointer,
    lease: &Lease,
    commit: Commit,
) -> impl Future<Output = Result<Receipt, StorageError>> + Send + 'static {
    let (db, lease) = (db.clone(), lease.clone());
    async move { db.commit(&lease, commit).await }
}
