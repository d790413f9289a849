//! Releases: what runs where.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{AcceptanceCheck, CheckResult, ProjectId, Repository, Result, SecretHandle, Sha};

/// What to deploy.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DeployRequest {
    /// The same on every try: a deploy with a known key is not done again, its outcome is returned.
    pub key: String,
    /// The project.
    pub project: ProjectId,
    /// Where the code is.
    pub repository: Repository,
    /// The commit; its `artel.yaml` says how it is run.
    pub sha: Sha,
    /// The port that was allocated.
    pub port: u16,
    /// Secrets that the service gets in its environment, under their names.
    pub secrets: Vec<SecretHandle>,
    /// What must hold before the new release takes over, and again on the live URL.
    pub acceptance: Vec<AcceptanceCheck>,
}

/// A release and how it went.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Deployment {
    /// The release's number within the project, from 1.
    pub release: u64,
    /// Its commit.
    pub sha: Sha,
    /// Whether it is live.
    pub status: DeploymentStatus,
    /// Where it answers.
    pub url: String,
    /// The checks that were run, with what they saw.
    pub checks: Vec<CheckResult>,
    /// When a release was rolled back: the release that is live instead, if there is one.
    pub live_release: Option<u64>,
}

/// Where a release stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeploymentStatus {
    /// It answers people's requests.
    Live,
    /// A newer one does.
    Superseded,
    /// It failed, and the last good one answers instead.
    RolledBack,
    /// It failed, and there was nothing to go back to.
    Failed,
    /// It was stopped on purpose.
    Stopped,
}

/// What a project's service does at the moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceState {
    /// Whether it is running.
    pub running: bool,
    /// Whether it answers its health check.
    pub healthy: bool,
    /// The live release.
    pub release: Option<u64>,
    /// Its commit.
    pub sha: Option<Sha>,
    /// Where it answers.
    pub url: Option<String>,
    /// Why it does not run, if it should.
    pub trouble: Option<String>,
}

/// Brings releases to life and takes them down.
#[async_trait]
pub trait Deployer: Send + Sync {
    /// Starts the release beside the live one, checks it, switches, checks again; goes back to the last good one when it
    /// fails. A release that failed its checks is an `Ok` with status `RolledBack` or `Failed` and the evidence in `checks`;
    /// `Err` means that deploying itself could not be done (`port_taken`, `disk_full`, …). Takes up to minutes: nodes have
    /// it done as an errand.
    async fn deploy(&self, request: &DeployRequest) -> Result<Deployment>;

    /// Makes the last good release before the live one live again.
    async fn rollback(&self, project: &ProjectId, key: &str) -> Result<Deployment>;

    /// Stops the service; it stays stopped until `start`.
    async fn stop(&self, project: &ProjectId) -> Result<()>;

    /// Starts the live release again.
    async fn start(&self, project: &ProjectId) -> Result<Deployment>;

    /// Stops the service and removes its releases and its data.
    async fn remove(&self, project: &ProjectId) -> Result<()>;

    /// What the service does at the moment.
    async fn state(&self, project: &ProjectId) -> Result<ServiceState>;

    /// The last lines that the service wrote, oldest first, at most `lines`.
    async fn logs(&self, project: &ProjectId, lines: usize) -> Result<Vec<String>>;
}

/// Things that only one project can have, unique by constraint at the moment they are given.
#[async_trait]
pub trait Allocations: Send + Sync {
    /// The project's port: the one it has, or a free one that becomes its own. `avoid` is a port that turned out to be
    /// taken by something that is not ours.
    async fn port(&self, project: &ProjectId, avoid: Option<u16>) -> Result<u16>;

    /// Gives back everything that the project has.
    async fn release(&self, project: &ProjectId) -> Result<()>;
}
