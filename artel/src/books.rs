//! What is written into the journal from outside of nodes (money, resolved secrets, orders of people), and how the
//! projections read it.

use std::sync::Arc;

use async_trait::async_trait;
use graph::checkpoint::Checkpointer;
use graph::{Cursor, Journal, JournalFilter};
use ports::{Event, Failure, Ledger, ProjectId, Recorded, SecretHandle, Spend, Spent};
use store::{JournalEntry, JournalSource, Projector, Store};

/// The journal with the tables that are made from it.
#[derive(Clone)]
pub struct Books {
    journal: Journal,
    store: Store,
    projector: Arc<Projector>,
}

fn unwritten(error: &graph::EngineError) -> Failure {
    Failure::new("journal", format!("the journal cannot be written: {error}")).retryable()
}

fn unread(error: &store::Error) -> Failure {
    Failure::new("database", error.to_string()).retryable()
}

impl Books {
    /// The books of a database. The engine behind the journal needs no graphs.
    pub async fn open(
        checkpointer: Arc<dyn Checkpointer>,
        store: &Store,
    ) -> Result<Self, graph::EngineError> {
        let engine = graph::Engine::builder(checkpointer).build().await?;
        Ok(Self {
            journal: engine.journal(),
            store: store.clone(),
            projector: Arc::new(Projector::new(store)),
        })
    }

    /// The journal.
    pub fn journal(&self) -> &Journal {
        &self.journal
    }

    /// Writes an event, once for each id.
    pub async fn write(&self, id: &str, recorded: &Recorded) -> Result<(), Failure> {
        self.journal
            .append(id, recorded.stream(), recorded.event.name(), recorded)
            .await
            .map(|_| ())
            .map_err(|error| unwritten(&error))
    }

    /// Brings the projections up to date; gives the cursor that they stand at.
    pub async fn catch_up(&self) -> Result<Cursor, store::Error> {
        self.projector.catch_up(self).await.map(from_store)
    }

    /// Throws the projections away and makes them again.
    pub async fn rebuild(&self) -> Result<(), store::Error> {
        self.projector.rebuild(self).await.map(|_| ())
    }
}

fn from_store(cursor: i64) -> Cursor {
    Cursor(u64::try_from(cursor).unwrap_or(0))
}

#[async_trait]
impl JournalSource for Books {
    async fn read(&self, after: i64, limit: usize) -> Result<Vec<JournalEntry>, String> {
        let entries = self
            .journal
            .read(&JournalFilter::all(), from_store(after), limit)
            .await
            .map_err(|error| error.to_string())?;
        Ok(entries
            .into_iter()
            .map(|entry| JournalEntry {
                cursor: i64::try_from(entry.cursor.0).unwrap_or(i64::MAX),
                stream: entry.stream,
                number: i64::try_from(entry.number).unwrap_or(i64::MAX),
                name: entry.name,
                payload: entry.payload,
                at: entry.at,
            })
            .collect())
    }
}

#[async_trait]
impl Ledger for Books {
    async fn spent(&self, project: &ProjectId) -> ports::Result<Spent> {
        // The ledger is a projection: what was written a moment ago must count.
        self.catch_up().await.map_err(|error| unread(&error))?;
        self.store
            .spent(project)
            .await
            .map_err(|error| unread(&error))
    }

    async fn record(&self, spend: &Spend) -> ports::Result<()> {
        let recorded = Recorded {
            project: spend.project.clone(),
            job: spend.job.clone(),
            task: spend.task.clone(),
            event: Event::ModelUsed {
                spend: spend.clone(),
            },
        };
        self.write(&format!("spend:{}:{}", spend.project, spend.id), &recorded)
            .await
    }
}

#[async_trait]
impl secrets::Audit for Books {
    async fn resolved(&self, handle: &SecretHandle, purpose: &str) -> Result<(), Failure> {
        let event = Event::SecretResolved {
            name: handle.name.clone(),
            purpose: purpose.to_owned(),
        };
        let id = format!("resolved:{}", uuid::Uuid::now_v7());
        self.write(&id, &Recorded::new(handle.project.clone(), event))
            .await
    }
}
