//! The database goes away for longer than leases hold, and comes back: what runs goes on, and is not begun again.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use graph::{
    Context, END, Engine, GraphBuilder, MemoryCheckpointer, NodeError, START, ServeOptions,
    StorageError, ThreadStatus,
    checkpoint::{
        Checkpointer, ClaimRequest, Claimed, Commit, Lease, Loaded, Receipt, Renewed, SignalRecord,
    },
};
use tokio::sync::Notify;

use crate::{
    lab::{
        Count, Notes, eventually, log, notes, options, promise, serve, start, state, until_status,
    },
    storage::delegate::{Delegate, Delegating},
};

/// What runs need of the database is not to be had while it is away.
struct Away {
    inner: Arc<dyn Checkpointer>,
    gone: Arc<AtomicBool>,
    claimed: AtomicU64,
    refused: AtomicU64,
}

impl Away {
    fn on(inner: &Arc<dyn Checkpointer>, away: &Arc<AtomicBool>) -> Arc<Delegating<Self>> {
        Arc::new(Delegating(Self {
            inner: inner.clone(),
            gone: away.clone(),
            claimed: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        }))
    }

    fn there(&self) -> Result<(), StorageError> {
        if !self.gone.load(Ordering::SeqCst) {
            return Ok(());
        }
        self.refused.fetch_add(1, Ordering::SeqCst);
        Err(StorageError::Backend {
            operation: "doing what it was asked".to_owned(),
            source: "nobody is there".into(),
        })
    }
}

#[async_trait]
impl Delegate for Away {
    fn inner(&self) -> &dyn Checkpointer {
        &*self.inner
    }
    async fn claim(&self, request: ClaimRequest<'_>) -> Result<Claimed, StorageError> {
        self.there()?;
        let claimed = self.inner.claim(request).await;
        self.claimed.fetch_add(1, Ordering::SeqCst);
        claimed
    }
    async fn renew(&self, leases: &[Lease], lease: Duration) -> Result<Vec<Renewed>, StorageError> {
        self.there()?;
        self.inner.renew(leases, lease).await
    }
    async fn load(&self, lease: &Lease) -> Result<Loaded, StorageError> {
        self.there()?;
        self.inner.load(lease).await
    }
    async fn mailbox(
        &self,
        thread: &graph::ThreadId,
        after: u64,
    ) -> Result<(Vec<SignalRecord>, u64), StorageError> {
        self.there()?;
        self.inner.mailbox(thread, after).await
    }
    async fn commit(&self, lease: &Lease, commit: Commit) -> Result<Receipt, StorageError> {
        self.there()?;
        self.inner.commit(lease, commit).await
    }
    async fn journal_end(&self) -> Result<graph::Cursor, StorageError> {
        self.there()?;
        self.inner.journal_end().await
    }
}

/// Works until it is told that it is done, and counts how often it began.
fn works(begun: &Count, done: &Arc<Notify>) -> GraphBuilder<Notes> {
    let (begun, done) = (begun.clone(), done.clone());
    notes("g")
        .node("work", move |_, _: Context| {
            begun.up();
            let done = done.clone();
            async move {
                done.notified().await;
                Ok::<_, NodeError>(log("worked"))
            }
        })
        .edge(START, "work")
        .edge("work", END)
}

async fn engine_on(store: Arc<dyn Checkpointer>, graph: GraphBuilder<Notes>) -> Engine {
    let graph = graph.compile().expect("compiles");
    let engine = Engine::builder(store).graph(graph).build().await;
    engine.expect("builds")
}

promise! {
    async fn a_process_does_not_take_its_own_threads_away_however_often_the_database_was_away(lab) {
        let (begun, done) = (Count::default(), Arc::new(Notify::new()));
        let away = Arc::new(AtomicBool::new(false));
        let store = Away::on(&lab.store, &away);
        let engine = engine_on(store.clone(), works(&begun, &done)).await;
        start(&engine).await;
        let server = serve(&engine, ServeOptions {
            lease: Duration::from_mins(5),
            poll: Duration::from_millis(5),
            ..options()
        });
        eventually("it works", || async { begun.get() == 1 }).await;
        // More often than runs of one thread may die in a row.
        for _ in 0..25 {
            let refused = store.refused.load(Ordering::SeqCst);
            away.store(true, Ordering::SeqCst);
            eventually("it is missed", || async { store.refused.load(Ordering::SeqCst) > refused }).await;
            // As if the lease had run out meanwhile.
            assert_eq!(lab.store.break_leases("test").await.expect("breaks"), 1);
            let claimed = store.claimed.load(Ordering::SeqCst);
            away.store(false, Ordering::SeqCst);
            eventually("it claims again", || async { store.claimed.load(Ordering::SeqCst) > claimed }).await;
        }
        done.notify_one();
        until_status(&engine, "t", ThreadStatus::Done).await;
        server.drain().await;
        assert_eq!((begun.get(), state(&engine).await.log), (1, vec!["worked".to_owned()]));
    }
}

/// Two processes, on a clock that jumps when nobody has anything to do.
#[tokio::test(start_paused = true)]
async fn who_finds_the_database_back_lets_others_renew_their_leases_first() {
    let inner: Arc<dyn Checkpointer> = Arc::new(MemoryCheckpointer::new());
    let away = Arc::new(AtomicBool::new(false));
    let (begun, done) = (Count::default(), Arc::new(Notify::new()));
    let works_on = engine_on(Away::on(&inner, &away), works(&begun, &done)).await;
    start(&works_on).await;
    let first = serve(&works_on, options());
    eventually("it works", || async { begun.get() == 1 }).await;
    let idle = Away::on(&inner, &away);
    let other = engine_on(idle.clone(), works(&begun, &done)).await;
    let second = serve(
        &other,
        ServeOptions {
            owner: "other".to_owned(),
            // It asks far more often than leases are renewed.
            poll: Duration::from_millis(10),
            ..options()
        },
    );
    eventually("both are there", || async {
        idle.claimed.load(Ordering::SeqCst) > 0
    })
    .await;
    for _ in 0..25 {
        away.store(true, Ordering::SeqCst);
        tokio::time::sleep(options().lease).await;
        inner.break_leases("test").await.expect("breaks");
        let claimed = idle.claimed.load(Ordering::SeqCst);
        away.store(false, Ordering::SeqCst);
        while idle.claimed.load(Ordering::SeqCst) == claimed {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(begun.get(), 1, "nobody takes over what is alive");
    }
    done.notify_one();
    until_status(&works_on, "t", ThreadStatus::Done).await;
    assert_eq!(begun.get(), 1);
    // Of a process that is dead, others take over when the database is back.
    drop((first, second));
}
