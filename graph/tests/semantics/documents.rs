//! Statement 38: long-term memory beside threads.

use std::{sync::Arc, time::Duration};

use graph::{
    Context, DocumentKey, END, Engine, EngineError, MemoryCheckpointer, RetentionPolicy, START,
    documents::{Filter, NamespaceFilter, Order, Search},
};
use serde::{Deserialize, Serialize};

use crate::lab::{Notes, NotesUpdate, log, notes, promise, run, start_as, state};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Like {
    what: String,
    much: u32,
}

promise! {
    async fn what_one_thread_learns_another_one_knows(lab) {
        let engine = lab.notes(
            notes("g")
                .node("a", |_: Arc<Notes>, ctx: Context| async move {
                    let memory = ctx.documents()?;
                    if ctx.thread().as_str() == "learns" {
                        for (key, much) in [("tea", 10), ("coffee", 9), ("water", 100)] {
                            let like = Like { what: key.to_uppercase(), much };
                            memory.put(["users", "anna"], key, &like).await?;
                        }
                        memory.put_for(["users", "anna"], "mood", &"good", Duration::from_hours(1)).await?;
                        return Ok(NotesUpdate::default());
                    }
                    let search = Search::below(["users"]).filter(Filter::new().gt("much", 9)).order(Order::Key);
                    let found = memory.search(&search).await?;
                    Ok(log(found.iter().map(|document| document.key.as_str()).collect::<Vec<_>>().join(" ")))
                })
                .edge(START, "a").edge("a", END),
        ).await;
        start_as(&engine, "learns").await;
        run(&engine).await;
        start_as(&engine, "t").await;
        run(&engine).await;
        assert_eq!(state(&engine).await.log, ["tea water"]);
        // Threads go, documents stay.
        assert!(engine.delete("learns").await.expect("deletes"));
        let memory = engine.documents().expect("there is a store");
        let like: Option<Like> = memory.get(["users", "anna"], "tea").await.expect("reads");
        assert_eq!(like, Some(Like { what: "TEA".to_owned(), much: 10 }));
        let wrong = memory.get::<u32>(["users", "anna"], "tea").await.expect_err("is no number");
        assert!(matches!(wrong, graph::StorageError::OtherType { .. }), "{wrong}");
        memory.delete(["users", "anna"], "tea").await.expect("deletes");
        assert_eq!(memory.get::<Like>(["users", "anna"], "tea").await.expect("reads"), None);
        let mood = memory.document(DocumentKey::new(["users", "anna"], "mood"), true).await.expect("reads");
        assert!(mood.is_some_and(|mood| mood.expires_at.is_some()));
        let all = memory.namespaces(&NamespaceFilter::default()).await.expect("lists");
        assert_eq!(all, [["users", "anna"].into()]);
        memory.put_for(["users", "anna"], "mood", &"gone", Duration::ZERO).await.expect("writes");
        assert_eq!(engine.sweep(&RetentionPolicy::default(), None).await.expect("sweeps").documents, 1);
    }
}

#[tokio::test]
async fn an_engine_can_be_given_another_store() {
    let other = MemoryCheckpointer::new();
    let store = graph::checkpoint::Checkpointer::documents(&other).expect("has one");
    let engine = Engine::builder(Arc::new(MemoryCheckpointer::new()))
        .documents(store.clone())
        .build()
        .await
        .expect("builds");
    let memory = engine.documents().expect("has one");
    memory.put(["n"], "k", &1).await.expect("writes");
    let found = store.get(&[DocumentKey::new(["n"], "k")], false).await;
    assert!(found.expect("reads")[0].is_some());
    let text = EngineError::NoDocuments.to_string();
    assert!(
        text.contains("EngineBuilder::documents"),
        "it says what to do: {text}"
    );
}
