//! The request to begin a transaction is under way when whoever has made it goes away, or when the connection hangs. No
//! transaction is left behind that nobody knows of, and no place in the pool is lost.

use std::{sync::Arc, time::Duration};

use graph::{
    PostgresCheckpointer, StorageError,
    checkpoint::{CancelRequest, Checkpointer, ClaimRequest},
};
use sqlx::postgres::PgPoolOptions;

use crate::{
    connections::within_patience,
    operations::thread,
    proxy::Proxy,
    storage::{self, Schema},
};

fn request(thread: &str) -> CancelRequest {
    CancelRequest {
        thread: thread.into(),
        reason: "enough".to_owned(),
    }
}

async fn until(what: &str, mut is_true: impl FnMut() -> bool) {
    within_patience(what, async {
        while !is_true() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// A server behind a proxy, with threads of these names.
async fn stage(threads: &[&str]) -> (Schema, PostgresCheckpointer, Proxy) {
    let schema = Schema::make().await;
    let direct = storage::connect(schema.url.clone()).await;
    direct.migrate().await.expect("migrates");
    for id in threads {
        direct.create_thread(thread(id)).await.expect("creates");
    }
    let proxy = Proxy::before(&schema.url).await;
    (schema, direct, proxy)
}

/// Whether somebody else sees that a thread is to be cancelled.
async fn is_cancelled(db: &PostgresCheckpointer, id: &str) -> bool {
    let record = db.thread(&id.into()).await.expect("reads");
    record.expect("is there").cancel.is_some()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_dropped_while_its_transaction_begins_leaves_no_transaction_behind() {
    let (schema, direct, proxy) = stage(&["a", "b"]).await;
    // Whoever comes next gets the same connection.
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .test_before_acquire(false)
        .connect(&proxy.url(&schema.url))
        .await
        .expect("connects");
    let db = Arc::new(PostgresCheckpointer::from_pool(pool));
    for _ in 0..5 {
        let claim = ClaimRequest {
            owner: "dead",
            graphs: &["g".to_owned()],
            limit: 10,
            lease: Duration::from_hours(1),
        };
        let claimed = direct.claim(claim).await.expect("claims");
        assert_eq!(claimed.claims.len(), 2, "their leases were broken");
        proxy.hold_beginnings();
        let caller = tokio::spawn({
            let db = db.clone();
            async move { db.cancel(request("a")).await }
        });
        until("the answer is kept back", || proxy.held() == 1).await;
        caller.abort();
        assert!(caller.await.expect_err("went away").is_cancelled());
        proxy.resume();
        // A statement by itself: in a transaction that is never ended, nobody else would see what it does.
        let broken = within_patience("a write", db.break_leases("dead")).await;
        assert_eq!(broken.expect("is written"), 2);
        assert!(!is_cancelled(&direct, "a").await, "nobody waited for it");
    }
    within_patience("another request", db.cancel(request("b")))
        .await
        .expect("is recorded");
    assert!(is_cancelled(&direct, "b").await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_hang_while_transactions_begin_keep_no_place_in_the_pool() {
    let (schema, direct, proxy) = stage(&["a", "b"]).await;
    let db = storage::connect(proxy.url(&schema.url)).await;
    let db = Arc::new(db.answer_within(Duration::from_millis(50)));
    proxy.hold_beginnings();
    // More than the pool has places.
    let callers: Vec<_> = (0..16)
        .map(|_| {
            let db = db.clone();
            tokio::spawn(async move { db.cancel(request("a")).await })
        })
        .collect();
    for caller in callers {
        let answer = within_patience("a request", caller)
            .await
            .expect("is answered");
        assert!(
            matches!(answer, Err(StorageError::Backend { .. })),
            "{answer:?}"
        );
    }
    assert!(proxy.held() >= 2, "{} hung", proxy.held());
    // From now on, but what hangs hangs for ever.
    proxy.forget_held();
    within_patience("a place becomes free", async {
        while db.cancel(request("b")).await.is_err() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    assert!(is_cancelled(&direct, "b").await);
    assert!(!is_cancelled(&direct, "a").await);
}
