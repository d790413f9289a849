//! Every cache passes the same suite.

mod storage;

use std::sync::Arc;

use graph::{
    cache::Cache, checkpoint::Checkpointer, conformance::cache::CacheLab, memory::MemoryCache,
};

/// The cache beside the threads of a database.
async fn beside(store: impl Checkpointer) -> Arc<dyn Cache> {
    store.migrate().await.expect("migrates");
    store.cache().expect("has a cache")
}

mod sqlite {
    use super::*;

    async fn lab() -> CacheLab {
        let (path, dir) = storage::sqlite_path();
        CacheLab::new(
            move || {
                let path = path.clone();
                async move { beside(storage::sqlite(path).await).await }
            },
            dir,
        )
        .await
    }

    graph::cache_conformance!(lab());
}

mod postgres {
    use super::*;

    async fn lab() -> CacheLab {
        let schema = storage::Schema::make().await;
        let url = schema.url.clone();
        CacheLab::new(
            move || {
                let url = url.clone();
                async move { beside(storage::connect(url).await).await }
            },
            schema,
        )
        .await
    }

    graph::cache_conformance!(lab());
}

mod memory {
    use super::*;

    async fn lab() -> CacheLab {
        let cache = MemoryCache::new();
        CacheLab::new(
            move || {
                let cache: Arc<dyn Cache> = Arc::new(cache.clone());
                async move { cache }
            },
            (),
        )
        .await
    }

    graph::cache_conformance!(lab());
}
