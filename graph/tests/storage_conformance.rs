//! Every checkpointer passes the same suite.

mod storage;

mod sqlite {
    use graph::conformance::Lab;

    use crate::storage;

    async fn lab() -> Lab {
        let (path, dir) = storage::sqlite_path();
        Lab::new(move || storage::sqlite(path.clone()), dir).await
    }

    graph::checkpointer_conformance!(lab());
    graph::documents_conformance!(lab());
}

mod postgres {
    use graph::conformance::Lab;

    use crate::storage::{self, Schema};

    async fn lab() -> Lab {
        let schema = Schema::make().await;
        let url = schema.url.clone();
        Lab::new(move || storage::connect(url.clone()), schema).await
    }

    graph::checkpointer_conformance!(lab());
    graph::documents_conformance!(lab());
}

mod memory {
    use graph::{MemoryCheckpointer, conformance::Lab};

    async fn lab() -> Lab {
        let memory = MemoryCheckpointer::new();
        Lab::new(
            move || {
                let memory = memory.clone();
                async move { memory }
            },
            (),
        )
        .await
    }

    graph::checkpointer_conformance!(lab());
    graph::documents_conformance!(lab());
}
