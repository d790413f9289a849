//! Every checkpointer passes the same suite.

mod sqlite {
    use graph::{conformance::Lab, sqlite::SqliteCheckpointer};

    async fn lab() -> Lab {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("threads.db");
        Lab::new(
            move || {
                let path = path.clone();
                async move { SqliteCheckpointer::open(path).await.expect("opens") }
            },
            dir,
        )
        .await
    }

    graph::checkpointer_conformance!(lab());
}
