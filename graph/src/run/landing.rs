//! Commits whose answer did not come: finding out whether they landed, and making them again if they did not.
//!
//! Only who has the lease writes to a thread, so what has changed since was changed by the commit in question. Renewing the
//! lease first waits for a transaction of ours that may still be under way, because both lock the thread's row.

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;

use crate::{
    checkpoint::{Commit, Lease, Loaded, Receipt, StorageError, Then},
    host::Shared,
    private::chain,
};

use super::RunShared;

/// The pause before the first look; doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

impl RunShared {
    /// What became of a commit that failed because of the database. Tries as long as the lease would hold without renewal.
    /// Without the commit itself, one that has not landed is not made again.
    pub(super) async fn find_out(
        &self,
        base: u64,
        commit: Option<&Arc<Commit>>,
        mut error: StorageError,
    ) -> Result<Receipt, StorageError> {
        let deadline = Instant::now() + self.controls.lease;
        let mut pause = FIRST_PAUSE;
        while let StorageError::Backend { .. } = error
            && Instant::now() + pause < deadline
        {
            tracing::warn!(thread = %self.thread, error = %chain(&error), retry_in = ?pause, "the database failed; trying again");
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
            error = match self.look(base, commit.map(|commit| &**commit)).await {
                Ok(Some(receipt)) => return Ok(receipt),
                Ok(None) => {
                    let Some(commit) = commit else {
                        return Err(error);
                    };
                    match self.engine.store.commit_kept(&self.lease, commit).await {
                        Ok(receipt) => return Ok(receipt),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
        }
        Err(error)
    }

    /// The receipt of the commit, if it has landed.
    async fn look(
        &self,
        base: u64,
        commit: Option<&Commit>,
    ) -> Result<Option<Receipt>, StorageError> {
        let store = &self.engine.store;
        let leases = [self.lease.clone()];
        let renewed = store.renew(&leases, self.controls.lease).await?;
        if !renewed.iter().any(|renewed| renewed.held) {
            // It has landed and given the lease back, or somebody else has the thread. Nothing is left to be done here.
            return Err(StorageError::Fenced {
                thread: self.thread.clone(),
                token: self.lease.token,
            });
        }
        let loaded = store.load(&self.lease).await?;
        let advanced = loaded.state.checkpoint != base;
        // What gives the lease back has not landed while it is held, whatever its writes say: a thread may fail twice alike.
        let gives_back = |commit: &Commit| matches!(commit.then, Then::End { .. } | Then::Yield);
        let landed = advanced
            || commit.is_some_and(|commit| !gives_back(commit) && is_written(commit, &loaded));
        Ok(landed.then(|| Receipt {
            checkpoint: advanced.then_some(loaded.state.checkpoint),
            released: false,
            mail: loaded.mail,
            cancel: loaded.thread.cancel,
            undelivered: Vec::new(),
            now: loaded.now,
        }))
    }
}

/// Whether a commit without a checkpoint has landed, and must not be made again: one that says something, which always writes how
/// much has been said. All else is there once however often it is written, and its writes may have been there before.
fn is_written(commit: &Commit, loaded: &Loaded) -> bool {
    !commit.events.is_empty()
        && !commit.writes.is_empty()
        && commit
            .writes
            .iter()
            .all(|write| loaded.writes.contains(write))
}

/// Gives back the lease of a run that broke off, as soon as the database answers: within the time that it would hold anyway.
pub(crate) async fn give_back(engine: &Shared, lease: &Lease, graph: &str, within: Duration) {
    let deadline = Instant::now() + within;
    // Not at once: whoever claims the thread should find a database that answers.
    let mut pause = LONGEST_PAUSE.min(within / 4);
    while Instant::now() + pause < deadline {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE * 4);
        let mut commit = Commit::on(0);
        commit.then = Then::Yield;
        match engine.store.commit(lease, commit).await {
            Ok(_) => {
                engine.wakes.due(Some(graph));
                return;
            }
            Err(StorageError::Backend { .. }) => {}
            // Somebody else has it, or it was given back after all.
            Err(_) => return,
        }
    }
    tracing::warn!(thread = %lease.thread, "the lease could not be given back; it will expire");
}
