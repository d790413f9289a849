//! Why an attempt did not succeed, as the crew branches on it and as a person reads it.

use ports::plain;
use protocol::{Failure, ResultStatus};

/// The words for [`Failure::kind`].
pub mod kind {
    /// The agent ended without a commit beyond the base.
    pub const NO_COMMIT: &str = "no_commit";
    /// The agent said that it failed, or ended without a report.
    pub const AGENT_FAILED: &str = "agent_failed";
    /// The agent cannot go on without somebody's help.
    pub const AGENT_BLOCKED: &str = "agent_blocked";
    /// There is no such adapter or program here.
    pub const AGENT_MISSING: &str = "agent_missing";
    /// The workspace could not be made or brought up to date.
    pub const CLONE_FAILED: &str = "clone_failed";
    /// The base commit is not in the repository.
    pub const BASE_MISSING: &str = "base_missing";
    /// The repository is not there, or may not be seen.
    pub const REPOSITORY_MISSING: &str = "repository_missing";
    /// The repository's host refuses the spawner's credential, or there is none.
    pub const ACCESS_DENIED: &str = "access_denied";
    /// The repository's host gives no answer.
    pub const REMOTE_DOWN: &str = "remote_down";
    /// Somebody else changed the branch while the worker ran.
    pub const BRANCH_MOVED: &str = "branch_moved";
    /// The branch does not continue from the base, or from what was pushed before.
    pub const REWRITTEN_HISTORY: &str = "rewritten_history";
    /// What was committed may not be taken over: too much, too large, a link out of the tree, ….
    pub const CONTENT_REFUSED: &str = "content_refused";
    /// The workspace's Git folder is not one that can be read safely.
    pub const WORKSPACE_REFUSED: &str = "workspace_refused";
    /// The branch could not be written to the repository.
    pub const PUSH_FAILED: &str = "push_failed";
    /// The wall-clock limit was reached.
    pub const LIMIT_WALL: &str = "limit_wall";
    /// The worker gave no sign of life for too long.
    pub const LIMIT_IDLE: &str = "limit_idle";
    /// The memory limit was reached.
    pub const LIMIT_MEMORY: &str = "limit_memory";
    /// The limit of processes was reached.
    pub const LIMIT_PIDS: &str = "limit_pids";
    /// The limit of processor time was reached.
    pub const LIMIT_CPU: &str = "limit_cpu";
    /// The limit of disk space was reached.
    pub const LIMIT_DISK: &str = "limit_disk";
    /// The budget of the job or of the project is spent.
    pub const BUDGET: &str = "budget";
    /// The tape has no answer.
    pub const NOT_ON_TAPE: &str = "not_on_tape";
    /// No model is configured.
    pub const NO_MODEL: &str = "no_model";
    /// The model endpoint gives no answer.
    pub const MODEL_UNAVAILABLE: &str = "model_unavailable";
    /// The crew cancelled the request.
    pub const CANCELLED: &str = "cancelled";
    /// A later attempt of the same task took its place.
    pub const SUPERSEDED: &str = "superseded";
    /// The request asks for something that this spawner does not have.
    pub const UNSUPPORTED: &str = "unsupported";
    /// The task may use more than any spawner that lives has.
    pub const TOO_LARGE: &str = "too_large";
    /// The sandbox could not be started or watched.
    pub const SANDBOX_FAILED: &str = "sandbox_failed";
    /// The image of workers is not there.
    pub const IMAGE_MISSING: &str = "image_missing";
    /// The worker, or the spawner with it, was lost again and again.
    pub const LOST: &str = "lost";
}

/// Most that is kept of an evidence, in bytes; the end is kept.
const EVIDENCE_BYTES: usize = 8 * 1024;

/// An attempt that did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Trouble {
    pub(crate) status: ResultStatus,
    pub(crate) kind: &'static str,
    pub(crate) message: String,
    pub(crate) evidence: String,
}

impl Trouble {
    /// A failed attempt.
    pub(crate) fn failed(kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status: ResultStatus::Failed,
            kind,
            message: message.into(),
            evidence: String::new(),
        }
    }

    /// The same with another status.
    pub(crate) fn status(mut self, status: ResultStatus) -> Self {
        self.status = status;
        self
    }

    /// The same with what shows it.
    pub(crate) fn evidence(mut self, evidence: impl Into<String>) -> Self {
        tail(&evidence.into(), EVIDENCE_BYTES).clone_into(&mut self.evidence);
        self
    }

    pub(crate) fn cancelled() -> Self {
        Self::failed(kind::CANCELLED, "The job was cancelled.").status(ResultStatus::Cancelled)
    }

    pub(crate) fn into_failure(self) -> Failure {
        Failure {
            kind: self.kind.to_owned(),
            // Both may have words of a worker, and people read them on their terminals.
            message: plain(&self.message),
            evidence: plain(&self.evidence),
        }
    }
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        // Some errors say their cause themselves.
        if !text.contains(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

/// The last `bytes` of a text, from the beginning of a character.
pub(crate) fn tail(text: &str, bytes: usize) -> &str {
    let mut start = text.len().saturating_sub(bytes);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    &text[start..]
}
