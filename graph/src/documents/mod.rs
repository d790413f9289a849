//! Long-term memory beside threads: documents in namespaces, with a time to live, found by what is in them.
//!
//! A document is a JSON value under a key, in a namespace: a list of labels, such as `["users", "anna", "likes"]`. It belongs to no
//! thread, so whatever one thread has learned, others can use. Nodes reach it with [`Context::documents`](crate::Context::documents),
//! programs with [`Engine::documents`](crate::Engine::documents).
//!
//! What a node writes here is written at once, and not with the commit of its step: it is an effect like any other. A node that runs
//! again writes it again, which under the same key is harmless.
//!
//! Not a vector index, and not a place for what must change together with a thread's state: that is what channels are for.

mod filter;
mod handle;
pub(crate) mod sql;

use std::{fmt, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{checkpoint::StorageError, stored::json_text};

pub(crate) use filter::compare_numbers;
pub use filter::{Condition, FieldPath, Filter, MAX_CHOICES, MAX_CONDITIONS, Scalar, Test};
pub use handle::Documents;

/// The largest value of a document, in bytes of JSON.
pub const MAX_DOCUMENT_BYTES: usize = 4 << 20;

/// The largest namespace, in bytes of its labels (and one for each of them).
pub const MAX_NAMESPACE_BYTES: usize = 1024;

/// The largest key, in bytes.
pub const MAX_KEY_BYTES: usize = 512;

/// The most that one search or listing returns.
pub const MAX_RESULTS: usize = 1000;

/// The most writes in one batch, and the most keys in one request.
pub const MAX_BATCH: usize = 1000;

/// Ends a label in a path. No label contains it, and nothing that a label can contain comes before it.
const END_OF_LABEL: char = '\u{1f}';

/// Where a document lives: labels from the general to the special, such as `["users", "anna"]`.
///
/// As a prefix it means every namespace that begins with these labels, itself included; an empty one means all.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Namespace(Vec<String>);

impl Namespace {
    /// The prefix of every namespace.
    pub fn all() -> Self {
        Self::default()
    }

    /// Its labels.
    pub fn labels(&self) -> &[String] {
        &self.0
    }

    /// The namespace below this one with that label.
    #[must_use]
    pub fn child(mut self, label: impl Into<String>) -> Self {
        self.0.push(label.into());
        self
    }

    /// Only its first so many labels.
    pub(crate) fn cut(&self, depth: usize) -> Self {
        Self(self.0.iter().take(depth).cloned().collect())
    }

    /// The labels, each with its end: text whose order is that of the namespaces, and whose prefixes are theirs.
    pub(crate) fn path(&self) -> String {
        let mut path = String::new();
        for label in &self.0 {
            path.push_str(label);
            path.push(END_OF_LABEL);
        }
        path
    }

    /// The path before which all that begins with this namespace comes; none if that is everything.
    pub(crate) fn path_after(&self) -> Option<String> {
        let mut path = self.path();
        path.pop()?;
        path.push(' ');
        Some(path)
    }

    /// The inverse of [`Namespace::path`].
    pub(crate) fn from_path(path: &str) -> Self {
        Self(
            path.split_terminator(END_OF_LABEL)
                .map(str::to_owned)
                .collect(),
        )
    }

    /// Refuses what cannot be a namespace, or a prefix of one.
    pub(crate) fn check(&self) -> Result<(), StorageError> {
        let bytes = self.0.iter().map(|label| label.len() + 1).sum();
        at_most("a namespace", bytes, MAX_NAMESPACE_BYTES)?;
        for label in &self.0 {
            plain("a label of a namespace", label)?;
        }
        Ok(())
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("/"))
    }
}

impl<L: Into<String>> FromIterator<L> for Namespace {
    fn from_iter<I: IntoIterator<Item = L>>(labels: I) -> Self {
        Self(labels.into_iter().map(Into::into).collect())
    }
}

impl<L: Into<String>, const N: usize> From<[L; N]> for Namespace {
    fn from(labels: [L; N]) -> Self {
        labels.into_iter().collect()
    }
}

impl From<Vec<String>> for Namespace {
    fn from(labels: Vec<String>) -> Self {
        Self(labels)
    }
}

impl From<&Namespace> for Namespace {
    fn from(namespace: &Namespace) -> Self {
        namespace.clone()
    }
}

fn at_most(what: &str, bytes: usize, most: usize) -> Result<(), StorageError> {
    if bytes > most {
        return Err(StorageError::TooLarge {
            what: what.to_owned(),
            bytes,
            most,
        });
    }
    Ok(())
}

fn plain(what: &str, text: &str) -> Result<(), StorageError> {
    if text.is_empty() || text.chars().any(char::is_control) {
        return Err(StorageError::Unstorable {
            what: format!("{what} is empty or has a control character in it: {text:?}"),
        });
    }
    Ok(())
}

/// Names a document.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DocumentKey {
    /// Where it lives; not the empty one.
    pub namespace: Namespace,
    /// Its name there.
    pub key: String,
}

impl DocumentKey {
    /// This key in this namespace.
    pub fn new(namespace: impl Into<Namespace>, key: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            key: key.into(),
        }
    }

    /// Refuses what cannot name a document.
    pub(crate) fn check(&self) -> Result<(), StorageError> {
        if self.namespace.labels().is_empty() {
            return Err(StorageError::Unstorable {
                what: format!("the document `{}` has no namespace", self.key),
            });
        }
        self.namespace.check()?;
        at_most("the key of a document", self.key.len(), MAX_KEY_BYTES)?;
        plain("the key of a document", &self.key)
    }
}

impl fmt::Display for DocumentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.key)
    }
}

/// A document.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Document {
    /// Where it lives.
    pub namespace: Namespace,
    /// Its name there.
    pub key: String,
    /// What it says.
    pub value: Value,
    /// When it was first put there, by the database's clock.
    pub created_at: Timestamp,
    /// When it was last put there, by the database's clock.
    pub updated_at: Timestamp,
    /// When it is gone, if it is not put there or refreshed before.
    pub expires_at: Option<Timestamp>,
}

/// One of a batch of writes.
#[derive(Clone, Debug, PartialEq)]
pub enum DocumentWrite {
    /// Puts a document there, in place of the one that is there.
    Put {
        /// Its name.
        at: DocumentKey,
        /// What it says.
        value: Value,
        /// How long it lives, from now on and from each time it is refreshed; absent: for ever.
        ttl: Option<Duration>,
    },
    /// Takes a document away, if there is one.
    Delete {
        /// Its name.
        at: DocumentKey,
    },
}

impl DocumentWrite {
    /// Its value as text, if it has one. Refuses what cannot be written.
    fn text(&self) -> Result<Option<String>, StorageError> {
        match self {
            Self::Delete { at } => at.check().map(|()| None),
            Self::Put { at, value, .. } => {
                at.check()?;
                let text = json_text(value)?;
                at_most(&format!("document {at}"), text.len(), MAX_DOCUMENT_BYTES)?;
                Ok(Some(text))
            }
        }
    }
}

/// In which order documents are found. Those of the same time are ordered by namespace and key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Order {
    /// The one that was put there last comes first.
    #[default]
    NewestFirst,
    /// The one that was put there last comes last.
    OldestFirst,
    /// By namespace and key, by code point.
    Key,
}

/// What to look for.
#[derive(Clone, Debug, PartialEq)]
pub struct Search {
    /// Only in namespaces that begin so.
    pub prefix: Namespace,
    /// Only documents that say so.
    pub filter: Filter,
    /// In which order.
    pub order: Order,
    /// At most so many, and never more than [`MAX_RESULTS`].
    pub limit: usize,
    /// Without the first so many.
    pub offset: usize,
    /// Whether what is found lives on for its whole time to live from now on.
    pub refresh: bool,
}

impl Search {
    /// All documents below a namespace, the newest hundred of them.
    pub fn below(prefix: impl Into<Namespace>) -> Self {
        Self {
            prefix: prefix.into(),
            filter: Filter::default(),
            order: Order::default(),
            limit: 100,
            offset: 0,
            refresh: false,
        }
    }

    /// Only those that say so.
    #[must_use]
    pub fn filter(mut self, filter: Filter) -> Self {
        self.filter = filter;
        self
    }

    /// In this order.
    #[must_use]
    pub fn order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }

    /// At most `limit`, without the first `offset`.
    #[must_use]
    pub fn page(mut self, offset: usize, limit: usize) -> Self {
        (self.offset, self.limit) = (offset, limit);
        self
    }

    /// And refreshes them.
    #[must_use]
    pub fn refresh(mut self) -> Self {
        self.refresh = true;
        self
    }

    pub(crate) fn check(&self) -> Result<(), StorageError> {
        self.prefix.check()?;
        self.filter.check()
    }
}

/// Which namespaces to list, in their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NamespaceFilter {
    /// Only those that begin so.
    pub prefix: Namespace,
    /// Only their first so many labels, each such beginning once.
    pub depth: Option<usize>,
    /// At most so many, and never more than [`MAX_RESULTS`]; absent: 100.
    pub limit: Option<usize>,
    /// Without the first so many.
    pub offset: usize,
}

impl NamespaceFilter {
    pub(crate) fn limit(&self) -> usize {
        self.limit.unwrap_or(100).min(MAX_RESULTS)
    }
}

/// A store of documents. [`documents_conformance!`](crate::documents_conformance) is the suite that each of them passes.
///
/// What has expired is not there: it is not found, not listed, not refreshed. Time is the database's. Filters are evaluated in the
/// database. Every call is atomic.
#[async_trait]
pub trait DocumentStore: Send + Sync + 'static {
    /// Writes all of a batch or nothing, in its order. At most [`MAX_BATCH`].
    async fn write(&self, writes: Vec<DocumentWrite>) -> Result<(), StorageError>;

    /// The documents of these names, in their order; those that are not there are nothing. `refresh`: they live on for their whole
    /// time to live from now on. At most [`MAX_BATCH`].
    async fn get(
        &self,
        keys: &[DocumentKey],
        refresh: bool,
    ) -> Result<Vec<Option<Document>>, StorageError>;

    /// Documents by what they say.
    async fn search(&self, search: &Search) -> Result<Vec<Document>, StorageError>;

    /// Namespaces that have documents.
    async fn namespaces(&self, filter: &NamespaceFilter) -> Result<Vec<Namespace>, StorageError>;

    /// Cleans up behind at most `limit` documents that have expired. Returns how many there were.
    async fn sweep(&self, limit: usize) -> Result<u64, StorageError>;
}

/// Refuses batches that are too large, and names that cannot be.
pub(crate) fn check_keys(keys: &[DocumentKey]) -> Result<(), StorageError> {
    check_batch(keys.len())?;
    keys.iter().try_for_each(DocumentKey::check)
}

/// The values of a batch as text, where it writes some. Refuses batches that are too large, and what cannot be written.
pub(crate) fn check_writes(writes: &[DocumentWrite]) -> Result<Vec<Option<String>>, StorageError> {
    check_batch(writes.len())?;
    writes.iter().map(DocumentWrite::text).collect()
}

fn check_batch(count: usize) -> Result<(), StorageError> {
    if count > MAX_BATCH {
        return Err(StorageError::Unstorable {
            what: format!("a batch of {count} documents is more than {MAX_BATCH}; make several"),
        });
    }
    Ok(())
}
