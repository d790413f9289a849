//! Code hosting: repositories, pull requests, checks and merges, all bound to commits.

use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::{CheckResult, CheckStatus, ProjectId, Result, Sha, Slug};

/// A repository as the crew knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repository {
    /// The project it belongs to.
    pub project: ProjectId,
    /// Where people find it: a path or a URL.
    pub location: String,
    /// The bare repository on this machine, for a local forge.
    pub path: Option<PathBuf>,
    /// Where a spawner clones it from, for a remote forge.
    pub clone_url: Option<String>,
    /// The branch that is deployed, `main`.
    pub default_branch: String,
}

/// A file to write or to delete in a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileChange {
    /// Relative to the root, without `..`.
    pub path: String,
    /// The new text; `None` deletes.
    pub content: Option<String>,
}

/// A pull request to open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewPullRequest {
    /// The project.
    pub project: ProjectId,
    /// The branch with the work; one pull request a branch, so opening it twice opens it once.
    pub branch: String,
    /// The commit that the branch must point to.
    pub head: Sha,
    /// A line.
    pub title: String,
    /// What was done and why.
    pub body: String,
}

/// A pull request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PullRequest {
    /// Its number in the repository, from 1.
    pub number: u64,
    /// Its branch.
    pub branch: String,
    /// The branch's commit.
    pub head: Sha,
    /// Open, merged or closed.
    pub status: PullRequestStatus,
    /// Where people find it.
    pub url: String,
    /// The commit on the default branch, when merged.
    pub merged: Option<Sha>,
}

/// Where a pull request stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PullRequestStatus {
    /// Waiting for review, checks or its merge.
    Open,
    /// On the default branch.
    Merged,
    /// Given up.
    Closed,
}

/// What a pull request changes against the default branch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The merge base.
    pub base: Sha,
    /// The branch's commit.
    pub head: Sha,
    /// The files that it touches.
    pub files: Vec<String>,
    /// The unified diff, cut to the size that was asked for.
    pub text: String,
    /// Whether it was cut.
    pub truncated: bool,
}

/// How the repository's own checks ended at a commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChecksReport {
    /// The commit.
    pub sha: Sha,
    /// Passed, failed or timed out, all together.
    pub status: CheckStatus,
    /// One by one, with the end of the log where one did not pass.
    pub checks: Vec<CheckResult>,
}

/// How a rebase ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum RebaseOutcome {
    /// The branch already stands on the default branch's tip.
    UpToDate {
        /// Its commit.
        head: Sha,
    },
    /// The branch was moved onto the tip; its checks have to run again.
    Rebased {
        /// Its new commit.
        head: Sha,
    },
    /// It cannot be moved without a person's or a developer's hand; nothing was changed.
    Conflict {
        /// The files in conflict.
        files: Vec<String>,
    },
}

/// How a merge ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "outcome", rename_all = "snake_case")]
pub enum MergeOutcome {
    /// The default branch now holds it, at this commit. Merging what is merged says so again.
    Merged {
        /// The commit on the default branch.
        sha: Sha,
    },
    /// The default branch moved on, so the branch has to be rebased first; nothing was changed.
    BaseMoved,
    /// The pull request's head is not the commit that was reviewed; nothing was changed.
    HeadMoved {
        /// Where it is now.
        head: Sha,
    },
}

/// Code hosting. Every call is idempotent, so that a step which is repeated after a crash changes nothing more.
#[async_trait]
pub trait Forge: Send + Sync {
    /// Creates the project's repository with an empty first commit, or opens the one that exists.
    async fn create_repository(&self, project: &ProjectId, slug: &Slug) -> Result<Repository>;

    /// The project's repository, if it has one.
    async fn repository(&self, project: &ProjectId) -> Result<Option<Repository>>;

    /// The commit that a branch points to.
    async fn head(&self, project: &ProjectId, branch: &str) -> Result<Option<Sha>>;

    /// Commits files on top of `base` to a branch (compare-and-set: it fails as `base_moved` when the branch is elsewhere).
    /// The commit carries `key` in a trailer, so that the same call again finds the commit that it made.
    async fn commit_files(
        &self,
        project: &ProjectId,
        branch: &str,
        base: &Sha,
        message: &str,
        files: &[FileChange],
        key: &str,
    ) -> Result<Sha>;

    /// The paths of all files at a commit, at most 10,000.
    async fn list_files(&self, project: &ProjectId, sha: &Sha) -> Result<Vec<String>>;

    /// A text file at a commit; `None` when it is not there. Fails as `too_large` above 1 MiB.
    async fn read_file(&self, project: &ProjectId, sha: &Sha, path: &str)
    -> Result<Option<String>>;

    /// Opens a pull request, or gives the one that this branch has, with its head brought up to date.
    async fn open_pull_request(&self, new: &NewPullRequest) -> Result<PullRequest>;

    /// A pull request by number.
    async fn pull_request(&self, project: &ProjectId, number: u64) -> Result<PullRequest>;

    /// What a pull request changes, cut to `max_bytes`.
    async fn diff(&self, project: &ProjectId, number: u64, max_bytes: usize) -> Result<Diff>;

    /// Runs the repository's own checks (`checks` of its `artel.yaml`) at a commit, in a sandbox, within a bound. Takes
    /// minutes: nodes have it done as an errand.
    async fn run_checks(&self, project: &ProjectId, sha: &Sha) -> Result<ChecksReport>;

    /// Moves a pull request's branch onto the tip of the default branch.
    async fn rebase(&self, project: &ProjectId, number: u64) -> Result<RebaseOutcome>;

    /// Merges exactly `head`, if the default branch's tip is its ancestor.
    async fn merge(&self, project: &ProjectId, number: u64, head: &Sha) -> Result<MergeOutcome>;

    /// Closes a pull request that is given up. Closing what is closed or merged changes nothing.
    async fn close(&self, project: &ProjectId, number: u64) -> Result<()>;
}
