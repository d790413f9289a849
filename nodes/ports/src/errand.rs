//! Errands: work of minutes that is done outside of any run, and whose outcome comes back as a signal.
//!
//! A node hands an errand over in a durable step, waits for the signal `errand.done` and holds nothing meanwhile. An errand
//! is stored before it is started; after a crash it is done again, which its work allows because ports are idempotent.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{ChecksReport, DeployRequest, Deployment, Failure, ProjectId, Result, Sha};

/// A piece of work with its sender.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Errand {
    /// Unique; the same errand handed over twice is done once. Also the key of the signal that answers it.
    pub key: String,
    /// The thread that gets the signal.
    pub reply_to: String,
    /// What is to be done.
    pub work: ErrandWork,
}

/// What can be done as an errand.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "work", rename_all = "snake_case")]
pub enum ErrandWork {
    /// The repository's own checks at a commit.
    Checks {
        /// The project.
        project: ProjectId,
        /// The commit.
        sha: Sha,
    },
    /// A deploy.
    Deploy(DeployRequest),
}

/// What came of an errand: the payload of the signal `errand.done`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum ErrandOutcome {
    /// The checks ended.
    Checks(ChecksReport),
    /// The deploy ended, well or not.
    Deploy(Deployment),
    /// It could not be done.
    Failed(Failure),
    /// It was taken back before it ended.
    Cancelled,
}

impl ErrandOutcome {
    /// The kind of the signal that carries an outcome.
    pub const SIGNAL: &'static str = "errand.done";
}

/// Does errands.
#[async_trait]
pub trait Errands: Send + Sync {
    /// Stores an errand; it is started soon.
    async fn hand_over(&self, errand: &Errand) -> Result<()>;

    /// Takes an errand back; one that runs is stopped where its work allows it.
    async fn cancel(&self, key: &str) -> Result<()>;
}
