//! The store as nodes and programs use it.

use std::{fmt, sync::Arc, time::Duration};

use serde::{Serialize, de::DeserializeOwned};

use super::{
    Document, DocumentKey, DocumentStore, DocumentWrite, Namespace, NamespaceFilter, Search,
};
use crate::checkpoint::StorageError;

/// Documents: long-term memory beside threads. Cheap to clone. See [`graph::documents`](crate::documents).
#[derive(Clone)]
pub struct Documents(Arc<dyn DocumentStore>);

impl fmt::Debug for Documents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Documents")
    }
}

impl Documents {
    /// The documents of a store.
    pub fn new(store: Arc<dyn DocumentStore>) -> Self {
        Self(store)
    }

    /// Puts a document there, in place of the one that is there. It stays until it is deleted.
    pub async fn put(
        &self,
        namespace: impl Into<Namespace>,
        key: impl Into<String>,
        value: &(impl Serialize + ?Sized + Sync),
    ) -> Result<(), StorageError> {
        self.put_with(namespace, key, value, None).await
    }

    /// The same, for a time only.
    pub async fn put_for(
        &self,
        namespace: impl Into<Namespace>,
        key: impl Into<String>,
        value: &(impl Serialize + ?Sized + Sync),
        ttl: Duration,
    ) -> Result<(), StorageError> {
        self.put_with(namespace, key, value, Some(ttl)).await
    }

    async fn put_with(
        &self,
        namespace: impl Into<Namespace>,
        key: impl Into<String>,
        value: &(impl Serialize + ?Sized + Sync),
        ttl: Option<Duration>,
    ) -> Result<(), StorageError> {
        let at = DocumentKey::new(namespace, key);
        let value = serde_json::to_value(value).map_err(|error| StorageError::Unstorable {
            what: format!("document {at} is not JSON: {error}"),
        })?;
        self.0
            .write(vec![DocumentWrite::Put { at, value, ttl }])
            .await
    }

    /// What a document says, as a type; nothing if it is not there.
    pub async fn get<T: DeserializeOwned>(
        &self,
        namespace: impl Into<Namespace>,
        key: impl Into<String>,
    ) -> Result<Option<T>, StorageError> {
        let at = DocumentKey::new(namespace, key);
        let what = at.to_string();
        let Some(document) = self.document(at, false).await? else {
            return Ok(None);
        };
        serde_json::from_value(document.value)
            .map(Some)
            .map_err(|error| StorageError::OtherType {
                what: format!("document {what}"),
                source: error,
            })
    }

    /// A document with its times. `refresh`: it lives on for its whole time to live from now on.
    pub async fn document(
        &self,
        at: DocumentKey,
        refresh: bool,
    ) -> Result<Option<Document>, StorageError> {
        let mut found = self.0.get(&[at], refresh).await?;
        Ok(found.pop().flatten())
    }

    /// Takes a document away, if it is there.
    pub async fn delete(
        &self,
        namespace: impl Into<Namespace>,
        key: impl Into<String>,
    ) -> Result<(), StorageError> {
        let at = DocumentKey::new(namespace, key);
        self.0.write(vec![DocumentWrite::Delete { at }]).await
    }

    /// Writes several at once: all of them or nothing.
    pub async fn write(&self, writes: Vec<DocumentWrite>) -> Result<(), StorageError> {
        self.0.write(writes).await
    }

    /// Reads several at once, in the order of their names.
    pub async fn get_many(
        &self,
        keys: &[DocumentKey],
        refresh: bool,
    ) -> Result<Vec<Option<Document>>, StorageError> {
        self.0.get(keys, refresh).await
    }

    /// Documents by what they say.
    pub async fn search(&self, search: &Search) -> Result<Vec<Document>, StorageError> {
        self.0.search(search).await
    }

    /// Namespaces that have documents.
    pub async fn namespaces(
        &self,
        filter: &NamespaceFilter,
    ) -> Result<Vec<Namespace>, StorageError> {
        self.0.namespaces(filter).await
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn DocumentStore> {
        &self.0
    }
}
