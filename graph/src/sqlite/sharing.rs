//! Commits that share a transaction: making sure that the log is on the disk is what takes the time, and one transaction does
//! it once for all that it holds.
//!
//! A commit gets into a queue, and one task writes whatever waits at the moment (nobody waits for a batch to fill): plain steps
//! with the same few statements, the others each in a savepoint: one that is refused leaves no trace and does not hurt the
//! others. When the database itself fails, everything is rolled back, and each commit is tried alone.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
};

use parking_lot::Mutex;
use sqlx::Connection;
use tokio::sync::oneshot;

use super::{commit::commit, now, steps::Steps, writer::Writer};
use crate::{
    checkpoint::{Commit, Lease, Receipt, StorageError},
    stored::Fault,
};

/// The most commits in one transaction.
const MOST: usize = 64;

struct Waiting {
    lease: Lease,
    commit: Arc<Commit>,
    answer: oneshot::Sender<Result<Receipt, StorageError>>,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Waiting>,
    writing: bool,
}

/// The queue. It holds at most one commit for each caller that waits.
#[derive(Default)]
pub(super) struct Sharing {
    queue: Mutex<Queue>,
}

impl std::fmt::Debug for Sharing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let queue = self.queue.lock();
        f.debug_struct("Sharing")
            .field("waiting", &queue.waiting.len())
            .field("writing", &queue.writing)
            .finish()
    }
}

fn operation(lease: &Lease) -> String {
    format!("committing a step of thread {}", lease.thread)
}

impl Sharing {
    pub async fn commit(
        self: &Arc<Self>,
        writer: &Arc<Writer>,
        lease: &Lease,
        commit: Arc<Commit>,
    ) -> Result<Receipt, StorageError> {
        let (answer, answered) = oneshot::channel();
        let start = {
            let mut queue = self.queue.lock();
            queue.waiting.push_back(Waiting {
                lease: lease.clone(),
                commit,
                answer,
            });
            !std::mem::replace(&mut queue.writing, true)
        };
        if start {
            // A task of its own: the caller may be dropped, and must not take the others' commits with it.
            let turn = Turn {
                sharing: self.clone(),
                given_back: false,
            };
            let writer = writer.clone();
            tokio::spawn(async move { turn.run(&writer).await });
        }
        answered.await.unwrap_or_else(|gone| {
            Err(StorageError::Backend {
                operation: operation(lease),
                source: Box::new(gone),
            })
        })
    }
}

/// The right to write what is in the queue; given back when it is dropped, also by a panic or with the runtime.
struct Turn {
    sharing: Arc<Sharing>,
    given_back: bool,
}

impl Drop for Turn {
    fn drop(&mut self) {
        if !self.given_back {
            let mut queue = self.sharing.queue.lock();
            queue.writing = false;
            // Whoever still waits is told so, by the end of its channel.
            queue.waiting.clear();
        }
    }
}

impl Turn {
    async fn run(mut self, writer: &Writer) {
        loop {
            let batch: Vec<Waiting> = {
                let mut queue = self.sharing.queue.lock();
                let count = queue.waiting.len().min(MOST);
                if count == 0 {
                    // Under the same lock as the look: whoever comes next starts another task.
                    queue.writing = false;
                    self.given_back = true;
                    return;
                }
                queue.waiting.drain(..count).collect()
            };
            write(writer, batch).await;
        }
    }
}

async fn write(writer: &Writer, batch: Vec<Waiting>) {
    let mut steps = Steps::default();
    for (place, waiting) in batch.iter().enumerate() {
        steps.take(place, &waiting.lease, &waiting.commit);
    }
    let written = if steps.len() == batch.len() {
        only_steps(writer, &steps).await
    } else if batch.len() > 1 {
        together(writer, &steps, &batch).await
    } else {
        Ok(Receipts::new())
    };
    let mut receipts = match (written, &batch[..]) {
        (Ok(receipts), _) => receipts,
        (Err(fault), [waiting]) => {
            Receipts::from([(0, Err(fault.during(&operation(&waiting.lease))))])
        }
        (Err(_), _) => Receipts::new(),
    };
    for (place, waiting) in batch.into_iter().enumerate() {
        let receipt = match receipts.remove(&place) {
            Some(receipt) => receipt,
            // It is no plain step; or its batch failed, or it was refused, and now it is found out why.
            None => alone(writer, &waiting)
                .await
                .map_err(|fault| fault.during(&operation(&waiting.lease))),
        };
        // Nobody listens any more: the commit landed all the same.
        let _ = waiting.answer.send(receipt);
    }
}

/// The answers to commits of a batch, by their places in it.
type Receipts = BTreeMap<usize, Result<Receipt, StorageError>>;

/// A batch of nothing but plain steps. There is no answer to those that were refused.
async fn only_steps(writer: &Writer, steps: &Steps) -> Result<Receipts, Fault> {
    let _gate = writer.gate.lock().await;
    let mut connection = writer.pool.acquire().await?;
    match steps.write_alone(&mut connection, now()).await {
        Ok(receipts) => Ok(receipts
            .into_iter()
            .map(|(place, receipt)| (place, Ok(receipt)))
            .collect()),
        Err(fault) => {
            // Which takes back what was begun.
            if let Err(error) = connection.close().await {
                tracing::debug!(%error, "a connection with a failed transaction was not closed cleanly");
            }
            Err(fault)
        }
    }
}

async fn alone(writer: &Writer, waiting: &Waiting) -> Result<Receipt, Fault> {
    let mut writing = writer.write().await?;
    let receipt = commit(&mut writing, &waiting.lease, &waiting.commit, now()).await?;
    writing.finish().await?;
    Ok(receipt)
}

/// One answer for each; or a failure of the database, which leaves none of them.
async fn together(writer: &Writer, steps: &Steps, batch: &[Waiting]) -> Result<Receipts, Fault> {
    let mut writing = writer.write().await?;
    let mut receipts = Receipts::new();
    if steps.len() > 0 {
        for (place, receipt) in steps.write(&mut writing, now()).await? {
            receipts.insert(place, Ok(receipt));
        }
    }
    for (place, waiting) in batch.iter().enumerate() {
        if receipts.contains_key(&place) {
            continue;
        }
        let mut savepoint = (*writing).begin().await?;
        match commit(&mut savepoint, &waiting.lease, &waiting.commit, now()).await {
            Ok(receipt) => {
                savepoint.commit().await?;
                receipts.insert(place, Ok(receipt));
            }
            Err(Fault::Said(refusal)) => {
                savepoint.rollback().await?;
                receipts.insert(place, Err(refusal));
            }
            // It may have rolled back more than the savepoint, by itself.
            Err(fault @ Fault::Database(_)) => return Err(fault),
        }
    }
    writing.finish().await?;
    Ok(receipts)
}
