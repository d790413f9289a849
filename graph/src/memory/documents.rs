//! Documents in memory.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::{SignedDuration, Timestamp};
use parking_lot::Mutex;
use serde_json::Value;

use crate::{
    checkpoint::StorageError,
    documents::{
        Document, DocumentKey, DocumentStore, DocumentWrite, MAX_RESULTS, Namespace,
        NamespaceFilter, Order, Search, check_keys, check_writes,
    },
};

/// Documents in memory. Clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryDocuments(Arc<Mutex<BTreeMap<DocumentKey, Kept>>>);

impl MemoryDocuments {
    /// The same documents, which are not shared.
    pub(super) fn duplicate(&self) -> Self {
        Self(Arc::new(Mutex::new(self.0.lock().clone())))
    }
}

#[derive(Clone, Debug)]
struct Kept {
    value: Value,
    created_at: Timestamp,
    updated_at: Timestamp,
    ttl: Option<Duration>,
    expires_at: Option<Timestamp>,
}

impl Kept {
    fn is_there(&self, now: Timestamp) -> bool {
        self.expires_at.is_none_or(|at| at > now)
    }

    fn refresh(&mut self, now: Timestamp) {
        self.expires_at = self.ttl.map(|ttl| after(now, ttl));
    }

    fn seen(&self, at: &DocumentKey) -> Document {
        Document {
            namespace: at.namespace.clone(),
            key: at.key.clone(),
            value: self.value.clone(),
            created_at: self.created_at,
            updated_at: self.updated_at,
            expires_at: self.expires_at,
        }
    }
}

fn after(now: Timestamp, ttl: Duration) -> Timestamp {
    SignedDuration::try_from(ttl)
        .ok()
        .and_then(|ttl| now.checked_add(ttl).ok())
        .unwrap_or(Timestamp::MAX)
}

#[async_trait]
impl DocumentStore for MemoryDocuments {
    async fn write(&self, writes: Vec<DocumentWrite>) -> Result<(), StorageError> {
        check_writes(&writes)?;
        let mut documents = self.0.lock();
        let now = Timestamp::now();
        for write in writes {
            match write {
                DocumentWrite::Put { at, value, ttl } => {
                    let before = documents.get(&at).filter(|kept| kept.is_there(now));
                    let kept = Kept {
                        value,
                        created_at: before.map_or(now, |before| before.created_at),
                        updated_at: now,
                        ttl,
                        expires_at: ttl.map(|ttl| after(now, ttl)),
                    };
                    documents.insert(at, kept);
                }
                DocumentWrite::Delete { at } => {
                    documents.remove(&at);
                }
            }
        }
        Ok(())
    }

    async fn get(
        &self,
        keys: &[DocumentKey],
        refresh: bool,
    ) -> Result<Vec<Option<Document>>, StorageError> {
        check_keys(keys)?;
        let mut documents = self.0.lock();
        let now = Timestamp::now();
        let found = keys.iter().map(|at| {
            let kept = documents.get_mut(at).filter(|kept| kept.is_there(now))?;
            if refresh {
                kept.refresh(now);
            }
            Some(kept.seen(at))
        });
        Ok(found.collect())
    }

    async fn search(&self, search: &Search) -> Result<Vec<Document>, StorageError> {
        search.check()?;
        let labels = search.prefix.labels();
        let mut documents = self.0.lock();
        let now = Timestamp::now();
        let mut found: Vec<(&DocumentKey, &mut Kept)> = documents
            .iter_mut()
            .filter(|(at, kept)| {
                at.namespace.labels().starts_with(labels)
                    && kept.is_there(now)
                    && search.filter.holds(&kept.value)
            })
            .collect();
        // They come by namespace and key, and sorting keeps that order among equals.
        match search.order {
            Order::NewestFirst => {
                found.sort_by_key(|(_, kept)| std::cmp::Reverse(kept.updated_at));
            }
            Order::OldestFirst => found.sort_by_key(|(_, kept)| kept.updated_at),
            Order::Key => {}
        }
        let page = found
            .into_iter()
            .skip(search.offset)
            .take(search.limit.min(MAX_RESULTS));
        Ok(page
            .map(|(at, kept)| {
                if search.refresh {
                    kept.refresh(now);
                }
                kept.seen(at)
            })
            .collect())
    }

    async fn namespaces(&self, filter: &NamespaceFilter) -> Result<Vec<Namespace>, StorageError> {
        filter.prefix.check()?;
        let documents = self.0.lock();
        let now = Timestamp::now();
        let mut all: Vec<Namespace> = documents
            .iter()
            .filter(|(at, kept)| {
                at.namespace.labels().starts_with(filter.prefix.labels()) && kept.is_there(now)
            })
            .map(|(at, _)| at.namespace.cut(filter.depth.unwrap_or(usize::MAX)))
            .collect();
        all.dedup();
        Ok(all
            .into_iter()
            .skip(filter.offset)
            .take(filter.limit())
            .collect())
    }

    async fn sweep(&self, limit: usize) -> Result<u64, StorageError> {
        let mut documents = self.0.lock();
        let now = Timestamp::now();
        let gone: Vec<DocumentKey> = documents
            .iter()
            .filter(|(_, kept)| !kept.is_there(now))
            .take(limit)
            .map(|(at, _)| at.clone())
            .collect();
        for at in &gone {
            documents.remove(at);
        }
        Ok(gone.len() as u64)
    }
}
