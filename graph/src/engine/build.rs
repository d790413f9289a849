//! Putting an engine together.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use crate::{
    builder::CompiledGraph,
    cache::Cache,
    checkpoint::{Bell, Checkpointer},
    documents::{DocumentStore, Documents},
    error::EngineError,
    host::{AnyGraph, Shared},
    memory::MemoryCache,
    observer::Observer,
    state::State,
    traced::Traced,
};

use super::Engine;

/// How often the database is asked for what nobody told of.
const POLL: Duration = Duration::from_secs(1);

/// Puts an engine together. See [`Engine::builder`].
pub struct EngineBuilder {
    store: Arc<dyn Checkpointer>,
    graphs: Vec<Arc<dyn AnyGraph>>,
    observer: Option<Arc<dyn Observer>>,
    cache: Option<Arc<dyn Cache>>,
    documents: Option<Arc<dyn DocumentStore>>,
    bell: Option<Arc<dyn Bell>>,
    poll: Duration,
}

impl EngineBuilder {
    /// With this graph.
    #[must_use]
    pub fn graph<S: State>(mut self, graph: CompiledGraph<S>) -> Self {
        self.graphs.push(graph.inner);
        self
    }

    /// With somebody who looks on.
    #[must_use]
    pub fn observer(mut self, observer: Arc<dyn Observer>) -> Self {
        self.observer = Some(observer);
        self
    }

    /// With this cache for [cached](crate::NodeOptions::cache) nodes, in place of the one beside the threads.
    #[must_use]
    pub fn cache(mut self, cache: Arc<dyn Cache>) -> Self {
        self.cache = Some(cache);
        self
    }

    /// With this store of documents, in place of the one beside the threads.
    #[must_use]
    pub fn documents(mut self, documents: Arc<dyn DocumentStore>) -> Self {
        self.documents = Some(documents);
        self
    }

    /// With another way to reach other processes than the database's own.
    #[must_use]
    pub fn bell(mut self, bell: Arc<dyn Bell>) -> Self {
        self.bell = Some(bell);
        self
    }

    /// How often those who wait for the journal or follow a thread look into the database when nothing was heard; absent:
    /// a second. (Those who run threads have [`ServeOptions::poll`](crate::ServeOptions).)
    #[must_use]
    pub fn poll(mut self, every: Duration) -> Self {
        self.poll = every;
        self
    }

    /// Brings the database's schema up to date, and is ready.
    pub async fn build(self) -> Result<Engine, EngineError> {
        let mut graphs = BTreeMap::new();
        for graph in self.graphs {
            let name = graph.name().to_owned();
            if graphs.insert(name.clone(), graph).is_some() {
                return Err(EngineError::DuplicateGraph(name));
            }
        }
        self.store.migrate().await?;
        let cache = self
            .cache
            .or_else(|| self.store.cache())
            .unwrap_or_else(|| Arc::new(MemoryCache::new()));
        let documents = self.documents.or_else(|| self.store.documents());
        let bell = self.bell.or_else(|| self.store.bell());
        Ok(Engine {
            shared: Arc::new(Shared::new(
                Arc::new(Traced(self.store)),
                graphs,
                self.observer,
                cache,
                documents.map(Documents::new),
                bell,
                self.poll,
            )),
        })
    }
}

impl Engine {
    /// Begins an engine on a database.
    pub fn builder(store: Arc<dyn Checkpointer>) -> EngineBuilder {
        EngineBuilder {
            store,
            graphs: Vec::new(),
            observer: None,
            cache: None,
            documents: None,
            bell: None,
            poll: POLL,
        }
    }
}
