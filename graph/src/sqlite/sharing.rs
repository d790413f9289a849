//! Commits that share a transaction: making sure that the log is on the disk is what takes the time, and one transaction does
//! it once for all that it holds.
//!
//! A commit gets into a queue, and one task writes whatever waits at the moment (nobody waits for a batch to fill), each in a
//! savepoint: one that is refused leaves no trace and does not hurt the others. When the database itself fails, everything
//! is rolled back, and each commit is tried alone.

use std::{collections::VecDeque, sync::Arc};

use parking_lot::Mutex;
use sqlx::Connection;
use tokio::sync::oneshot;

use super::{Writer, commit::commit, now};
use crate::{
    checkpoint::{Commit, Lease, Receipt, StorageError},
    stored::Fault,
};

/// The most commits in one transaction.
const MOST: usize = 64;

struct Waiting {
    lease: Lease,
    commit: Commit,
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
        commit: Commit,
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
    if batch.len() > 1
        && let Ok(receipts) = together(writer, &batch).await
    {
        for (waiting, receipt) in batch.into_iter().zip(receipts) {
            // Nobody listens any more: the commit landed all the same.
            let _ = waiting.answer.send(receipt);
        }
        return;
    }
    for waiting in batch {
        let receipt = alone(writer, &waiting)
            .await
            .map_err(|fault| fault.during(&operation(&waiting.lease)));
        let _ = waiting.answer.send(receipt);
    }
}

async fn alone(writer: &Writer, waiting: &Waiting) -> Result<Receipt, Fault> {
    let mut writing = writer.write().await?;
    let receipt = commit(&mut writing, &waiting.lease, &waiting.commit, now()).await?;
    writing.finish().await?;
    Ok(receipt)
}

/// One answer for each; or a failure of the database, which leaves none of them.
async fn together(
    writer: &Writer,
    batch: &[Waiting],
) -> Result<Vec<Result<Receipt, StorageError>>, Fault> {
    let mut writing = writer.write().await?;
    let mut receipts = Vec::with_capacity(batch.len());
    for waiting in batch {
        let mut savepoint = (*writing).begin().await?;
        match commit(&mut savepoint, &waiting.lease, &waiting.commit, now()).await {
            Ok(receipt) => {
                savepoint.commit().await?;
                receipts.push(Ok(receipt));
            }
            Err(Fault::Said(refusal)) => {
                savepoint.rollback().await?;
                receipts.push(Err(refusal));
            }
            // It may have rolled back more than the savepoint, by itself.
            Err(fault @ Fault::Database(_)) => return Err(fault),
        }
    }
    writing.finish().await?;
    Ok(receipts)
}
