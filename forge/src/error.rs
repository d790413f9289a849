//! What a local forge can refuse or fail at.

use std::path::{Path, PathBuf};

use ports::{Actor, Failure, ProjectId, Sha};

/// What the forge could not do: what happened, where, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `git` program.
    #[error("the program `{program}` cannot be started; install Git 2.38 or newer (Debian, Ubuntu: `sudo apt-get install git`)", program = .program.display())]
    GitMissing {
        /// Which program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// It lacks `merge-tree --write-tree`.
    #[error("Git here is {found}, and Artel needs 2.38 or newer; install a newer one")]
    GitTooOld {
        /// What it says that it is.
        found: String,
    },
    /// Git failed.
    #[error("`git {command}` failed in {repository} ({status}): {said}", repository = .repository.display())]
    Git {
        /// Its subcommand.
        command: String,
        /// Where.
        repository: PathBuf,
        /// Its exit status.
        status: String,
        /// What it said.
        said: String,
    },
    /// Git did not end.
    #[error("`git {command}` did not end within {seconds} s in {repository} and was killed; see whether the disk is slow or full", repository = .repository.display())]
    GitTimeout {
        /// Its subcommand.
        command: String,
        /// Where.
        repository: PathBuf,
        /// The bound.
        seconds: u64,
    },
    /// Git answered more than anybody wants in memory.
    #[error("`git {command}` answered more than {limit} bytes in {repository}; the repository is too large for Artel", repository = .repository.display())]
    TooMuch {
        /// Its subcommand.
        command: String,
        /// Where.
        repository: PathBuf,
        /// The bound.
        limit: usize,
    },
    /// Git answered something that we do not understand.
    #[error("`git {command}` answered something unexpected: {said}")]
    Unexpected {
        /// Its subcommand.
        command: &'static str,
        /// What it said.
        said: String,
    },
    /// The file system refused.
    #[error("{doing} {path} failed", path = .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// A name that cannot be part of a path, a ref or a commit.
    #[error("{what} {name:?} cannot be used: {reason}")]
    Name {
        /// `the path`, `the branch`, …
        what: &'static str,
        /// Its beginning.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The project has no repository yet.
    #[error("project {0} has no repository")]
    NoRepository(ProjectId),
    /// There is no such branch.
    #[error("the repository has no branch {0}; push it first")]
    NoBranch(String),
    /// There is no such commit.
    #[error("the repository has no commit {0}; push it first")]
    NoCommit(Sha),
    /// There is no such pull request.
    #[error("the repository has no pull request #{0}")]
    NoPullRequest(u64),
    /// A branch is not where it was expected.
    #[error(
        "branch {branch} is at {now} and not at {expected}; look at what is new and do it again on top"
    )]
    BaseMoved {
        /// Which branch.
        branch: String,
        /// Where it should have been.
        expected: Sha,
        /// Where it is, or that it is missing.
        now: String,
    },
    /// A pull request's branch is not at the commit that it should be opened with.
    #[error(
        "branch {branch} is at {now} and not at {expected}, so no pull request was opened for it"
    )]
    HeadMoved {
        /// Which branch.
        branch: String,
        /// Where it should have been.
        expected: Sha,
        /// Where it is.
        now: Sha,
    },
    /// A branch without work.
    #[error("branch {branch} has no commit that {DEFAULT} lacks; commit something to it", DEFAULT = crate::DEFAULT_BRANCH)]
    NoCommits {
        /// Which branch.
        branch: String,
    },
    /// A closed pull request cannot be merged or rebased.
    #[error("pull request #{0} is closed; open it again before it is merged or rebased")]
    Closed(u64),
    /// A branch that shares no commit with the default branch.
    #[error("branch {branch} shares no commit with {DEFAULT}; start it from {DEFAULT}", DEFAULT = crate::DEFAULT_BRANCH)]
    Unrelated {
        /// Which branch.
        branch: String,
    },
    /// Too many files or too many bytes at once.
    #[error("{what} is too large: {size}, and the limit is {limit}")]
    TooLarge {
        /// What.
        what: String,
        /// How large it is.
        size: String,
        /// How large it may be.
        limit: String,
    },
    /// A file that is no text.
    #[error("{path} is no UTF-8 text, so it cannot be shown")]
    NotText {
        /// Which file.
        path: String,
    },
    /// A tree that cannot be written to a disk without danger.
    #[error("the files of {sha} cannot be written out: {path:?} {reason}")]
    Hostile {
        /// The commit.
        sha: Sha,
        /// The entry.
        path: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// Others hold the repository for too long.
    #[error(
        "the repository of {project} was in use for more than {seconds} s; look for a process that hangs, then try again"
    )]
    Busy {
        /// Whose repository.
        project: ProjectId,
        /// The bound.
        seconds: u64,
    },
    /// What we wrote about a pull request cannot be read.
    #[error(
        "what is stored about pull request {name} cannot be read; was it written by a newer version?"
    )]
    Stored {
        /// Its ref.
        name: String,
        /// Why not.
        #[source]
        source: serde_json::Error,
    },
    /// Refs went on changing under our hands.
    #[error("the refs of the repository of {0} kept changing; try again")]
    Contended(ProjectId),
    /// Checks cannot be run here.
    #[error(
        "the checks of a repository run in a sandbox, and there is none here; `artel doctor` says why"
    )]
    NoSandbox,
    /// The sandbox failed, not the checks.
    #[error("the sandbox for the checks failed")]
    Sandbox(#[from] sandbox::Error),
    /// A folder to clone into is in use.
    #[error("{path} is not an empty folder; name another one to clone into", path = .0.display())]
    CloneTarget(PathBuf),
    /// The program is ending.
    #[error(
        "the work on the repository was interrupted because the program ends; it goes on at the next start"
    )]
    Interrupted,
}

impl Error {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io {
            doing,
            path,
            source,
        }
    }

    /// A stable name for retry policies.
    pub fn kind(&self) -> &'static str {
        if self.disk_is_full() {
            return "disk_full";
        }
        match self {
            Self::GitMissing { .. } => "git_missing",
            Self::GitTooOld { .. } => "git_too_old",
            Self::Git { .. } | Self::Unexpected { .. } => "git_failed",
            Self::GitTimeout { .. } => "git_timeout",
            Self::Io { .. } => "forge_io",
            Self::Name { .. } => "bad_name",
            Self::NoRepository(_) => "no_repository",
            Self::NoBranch(_) => "no_branch",
            Self::NoCommit(_) => "unknown_commit",
            Self::NoPullRequest(_) => "no_pull_request",
            Self::BaseMoved { .. } => "base_moved",
            Self::HeadMoved { .. } => "head_moved",
            Self::NoCommits { .. } => "no_commit",
            Self::Closed(_) => "pull_request_closed",
            Self::Unrelated { .. } => "unrelated_history",
            Self::TooLarge { .. } | Self::TooMuch { .. } => "too_large",
            Self::NotText { .. } => "not_text",
            Self::Hostile { .. } => "hostile_tree",
            Self::Busy { .. } | Self::Contended(_) => "repository_busy",
            Self::Stored { .. } => "forge_data",
            Self::NoSandbox => "no_sandbox",
            Self::Sandbox(_) => "sandbox_failed",
            Self::CloneTarget(_) => "clone_target",
            Self::Interrupted => "interrupted",
        }
    }

    fn disk_is_full(&self) -> bool {
        match self {
            Self::Git { said, .. } => said.contains("No space left on device"),
            Self::Io { source, .. } => source.kind() == std::io::ErrorKind::StorageFull,
            _ => false,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let kind = error.kind();
        let actor = match kind {
            "git_missing" | "git_too_old" | "git_failed" | "git_timeout" | "forge_io"
            | "forge_data" | "disk_full" | "no_sandbox" | "sandbox_failed" => Actor::Admin,
            "clone_target" => Actor::Owner,
            _ => Actor::Crew,
        };
        let retryable = matches!(
            kind,
            "git_timeout"
                | "forge_io"
                | "disk_full"
                | "repository_busy"
                | "sandbox_failed"
                | "interrupted"
        );
        let mut evidence = String::new();
        let mut cause = std::error::Error::source(&error);
        while let Some(error) = cause {
            if !evidence.is_empty() {
                evidence.push_str(": ");
            }
            evidence.push_str(&error.to_string());
            cause = error.source();
        }
        let mut message = error.to_string();
        if kind == "disk_full" {
            message = format!("the disk is full; make room, then try again ({message})");
        }
        let failure = Self::new(kind, message).evidence(evidence).actor(actor);
        if retryable {
            failure.retryable()
        } else {
            failure
        }
    }
}
