//! Programs of different releases on one database.

use std::sync::Arc;

use async_trait::async_trait;
use graph::{
    CompiledGraph, Context, END, Engine, EngineError, START, StorageError, ThreadStatus,
    checkpoint::Checkpointer,
};

use crate::{
    corruption::on_disk,
    lab::{Notes, log, notes, run, start, state, thread},
    storage::delegate::{Delegate, Delegating},
};

/// A program that knows the schema as it is, whatever that is: what the newer release does.
struct Newer(Arc<dyn Checkpointer>);

#[async_trait]
impl Delegate for Newer {
    fn inner(&self) -> &dyn Checkpointer {
        &*self.0
    }
    async fn migrate(&self) -> Result<(), StorageError> {
        Ok(())
    }
}

fn asks() -> CompiledGraph<Notes> {
    notes("g")
        .node("ask", |_, ctx: Context| async move {
            let answer: String = ctx.interrupt("q", "?").await?;
            Ok(log(answer))
        })
        .edge(START, "ask")
        .edge("ask", END)
        .compile()
        .expect("compiles")
}

on_disk! {
    async fn a_thread_goes_on_when_the_newer_program_comes_back(desk) {
        let store = desk.lab.store.clone();
        let newer = async || {
            let store = Arc::new(Delegating(Newer(store.clone())));
            Engine::builder(store).graph(asks()).build().await.expect("builds")
        };
        let first = desk.lab.engine(asks()).await;
        start(&first).await;
        run(&first).await;
        // What the newer release leaves behind.
        let columns = "insert into graph_migrations (version, description, success, checksum, execution_time)";
        desk.spoil(
            &format!("{columns} values (9000, 'x', true, x'00', 0)"),
            &format!("{columns} values (9000, 'x', true, '', 0)"),
        ).await;
        let question = thread(&first).await.waits[0].id.clone();
        newer().await.answer("t", &question, "yes").await.expect("is taken");
        let before = thread(&newer().await).await;
        // The older program comes, twice, and is told to go.
        for _ in 0..2 {
            match Engine::builder(store.clone()).graph(asks()).build().await {
                Err(EngineError::Storage(StorageError::NewerSchema { found: 9000, .. })) => {}
                Err(other) => panic!("{other}"),
                Ok(_) => panic!("it must not touch what it does not know"),
            }
        }
        let engine = newer().await;
        assert_eq!(thread(&engine).await, before, "nothing has changed");
        run(&engine).await;
        assert_eq!(thread(&engine).await.status, ThreadStatus::Done);
        assert_eq!(state(&engine).await.log, ["yes"]);
    }
}
