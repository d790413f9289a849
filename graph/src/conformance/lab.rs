//! The fresh database of a case, and short ways to say what a case does with it.

use std::{any::Any, fmt, future::Future, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use serde_json::{Value, json};

use crate::{
    checkpoint::{
        Channels, Checkpointer, Claim, ClaimRequest, Claimed, Commit, Created, Lease, Loaded,
        NewCheckpoint, NewEvent, NewSignal, NewThread, Priority, Receipt, Source, StorageError,
        ThreadRecord,
    },
    ids::ThreadId,
};

type Open = Box<dyn Fn() -> BoxFuture<'static, Arc<dyn Checkpointer>> + Send + Sync>;

/// A fresh database, which can be opened several times, as by several processes.
pub struct Lab {
    open: Open,
    /// The first handle.
    pub db: Arc<dyn Checkpointer>,
    _keep: Box<dyn Any + Send + Sync>,
}

impl fmt::Debug for Lab {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lab")
            .field("db", &self.db.name())
            .finish_non_exhaustive()
    }
}

/// A lease that does not run out during a test.
pub(super) const LONG: Duration = Duration::from_mins(1);

impl Lab {
    /// A lab whose database `open` opens; it is migrated here. `keep` lives as long as the lab: a temporary directory, for
    /// instance. A checkpointer in memory gives clones of one and the same handle.
    pub async fn new<C, F, K>(open: impl Fn() -> F + Send + Sync + 'static, keep: K) -> Self
    where
        C: Checkpointer,
        F: Future<Output = C> + Send + 'static,
        K: Any + Send + Sync,
    {
        let open: Open = Box::new(move || {
            let opened = open();
            Box::pin(async move { Arc::new(opened.await) as Arc<dyn Checkpointer> })
        });
        let db = open().await;
        db.migrate().await.expect("a fresh database is migrated");
        Self {
            open,
            db,
            _keep: Box::new(keep),
        }
    }

    /// Another handle on the same database.
    pub async fn open(&self) -> Arc<dyn Checkpointer> {
        (self.open)().await
    }

    /// Creates a thread whose graph has the thread's own name, so that it can be claimed by itself.
    pub(super) async fn create(&self, id: &str) -> ThreadId {
        self.create_with(id, id, Priority::Medium).await
    }

    pub(super) async fn create_with(&self, id: &str, graph: &str, priority: Priority) -> ThreadId {
        let created = self
            .db
            .create_thread(NewThread {
                graph: graph.to_owned(),
                priority,
                ..new_thread(id)
            })
            .await
            .expect("creates");
        assert_eq!(created, Created::New, "{id} is new");
        id.into()
    }

    /// Creates a thread and claims it.
    pub(super) async fn running(&self, id: &str) -> Lease {
        self.create(id).await;
        self.claim(id).await.lease
    }

    /// Claims the one thread of a graph, which must be due.
    pub(super) async fn claim(&self, graph: &str) -> Claim {
        let mut claimed = self.try_claim(graph, LONG).await;
        assert_eq!(claimed.claims.len(), 1, "a thread of {graph} is due");
        let claim = claimed.claims.remove(0);
        if let Some(brought) = &claim.loaded {
            let mut read = self.load(&claim.lease).await;
            assert!(read.now >= brought.now);
            read.now = brought.now;
            assert_eq!(**brought, read, "the claim brought what there is to load");
        }
        claim
    }

    pub(super) async fn try_claim(&self, graph: &str, lease: Duration) -> Claimed {
        claim_from(&*self.db, graph, 10, lease).await
    }

    /// Whether a thread of this graph is due. Only for graphs whose threads must not be: a claim cannot be undone.
    pub(super) async fn idle(&self, graph: &str) -> bool {
        self.try_claim(graph, LONG).await.claims.is_empty()
    }

    /// Claims a thread of the graph as soon as one is due, within a minute.
    pub(super) async fn claim_soon(&self, graph: &str, lease: Duration) -> Claim {
        for _ in 0..6000 {
            let mut claimed = self.try_claim(graph, lease).await;
            if let Some(claim) = claimed.claims.pop() {
                return claim;
            }
            let pause = claimed.next_due.unwrap_or(Duration::from_millis(10));
            tokio::time::sleep(pause.min(Duration::from_millis(10))).await;
        }
        panic!("no thread of {graph} became due within a minute");
    }

    pub(super) async fn commit(&self, lease: &Lease, commit: Commit) -> Receipt {
        self.db.commit(lease, commit).await.expect("commits")
    }

    /// Commits a step that appends one item and sets `n`; returns its number.
    pub(super) async fn step(&self, lease: &Lease, parent: u64) -> u64 {
        let commit = Commit {
            checkpoint: Some(checkpoint(parent)),
            ..Commit::on(parent)
        };
        self.commit(lease, commit)
            .await
            .checkpoint
            .expect("a checkpoint was made")
    }

    pub(super) async fn thread(&self, id: &str) -> ThreadRecord {
        self.db
            .thread(&id.into())
            .await
            .expect("reads")
            .unwrap_or_else(|| panic!("{id} exists"))
    }

    pub(super) async fn load(&self, lease: &Lease) -> Loaded {
        self.db.load(lease).await.expect("loads")
    }

    pub(super) async fn keys(&self, id: &str) -> Vec<String> {
        let (signals, _) = self.db.mailbox(&id.into(), 0).await.expect("reads");
        signals.into_iter().map(|signal| signal.key).collect()
    }
}

pub(super) async fn claim_from(
    db: &dyn Checkpointer,
    graph: &str,
    limit: usize,
    lease: Duration,
) -> Claimed {
    db.claim(ClaimRequest {
        owner: "lab",
        graphs: &[graph.to_owned()],
        limit,
        lease,
    })
    .await
    .expect("claims")
}

pub(super) fn new_thread(id: &str) -> NewThread {
    NewThread {
        id: id.into(),
        graph: id.to_owned(),
        parent: None,
        priority: Priority::Medium,
        input: json!({}).into(),
    }
}

pub(super) fn channels(value: Value) -> Channels {
    match value {
        Value::Object(map) => map,
        other => panic!("{other} is an object"),
    }
}

/// The checkpoint after `parent`, on branch 0: appends the parent's number to `log`, sets `n` to it.
pub(super) fn checkpoint(parent: u64) -> NewCheckpoint {
    NewCheckpoint {
        parent,
        branch: 0,
        step: parent + 1,
        source: Source::Step,
        appends: channels(json!({"log": [parent]})),
        changes: channels(json!({"n": parent})),
        snapshot: None,
        plan: json!({"next": [format!("n{parent}")]}),
        kept: None,
    }
}

pub(super) fn signal(thread: &str, key: &str) -> NewSignal {
    NewSignal {
        thread: thread.into(),
        kind: "message".to_owned(),
        key: key.to_owned(),
        payload: json!({"key": key}),
        revives: false,
    }
}

pub(super) fn event(stream: &str, name: &str) -> NewEvent {
    NewEvent {
        stream: stream.to_owned(),
        name: name.to_owned(),
        payload: json!({"name": name}),
        thread: None,
    }
}

/// Checks that a write was refused because of its lease.
pub(super) fn assert_fenced<T: fmt::Debug>(result: Result<T, StorageError>, lease: &Lease) {
    match result {
        Err(StorageError::Fenced { thread, token }) => {
            assert_eq!((&thread, token), (&lease.thread, lease.token));
        }
        other => panic!("{lease:?} is fenced off, but: {other:?}"),
    }
}
