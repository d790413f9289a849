//! The front desk: what every front end (terminal, Telegram, HTTP) can ask for, in one place, so that none of them knows the
//! engine. Everything that changes something is stored before it returns, and is unique by the key or by what it names.

use async_trait::async_trait;

use crate::{
    Answer, Deployment, NoticeSeverity, PersonId, Plaintext, ProjectId, ProjectRecord, Result,
    StatusReport, TaskId, WaitId,
};

/// Something that a person said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Incoming {
    /// Unique: the same message twice is one, such as `telegram:{update_id}`.
    pub key: String,
    /// The project that it is about; `None` founds a new one.
    pub project: Option<ProjectId>,
    /// Who said it.
    pub from: PersonId,
    /// What was said.
    pub text: String,
    /// Whether they approve specification, plan and deploy beforehand, within the budget.
    pub yes: bool,
}

/// What became of an answer to a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answered {
    /// It counts.
    Accepted,
    /// Somebody answered before; nothing changed.
    Already,
    /// There is no such wait, or it was withdrawn.
    Gone,
}

/// What can be done with a project's service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ServiceOrder {
    /// Stop it.
    Stop,
    /// Start it again.
    Start,
    /// Stop it and delete its releases and its data.
    Remove,
    /// Stop it and put the project away.
    Archive,
}

/// What every front end can ask for.
#[async_trait]
pub trait FrontDesk: Send + Sync {
    /// Stores a message and gives the project that it belongs to, new or not. Fails as `message_empty` or
    /// `message_too_long` (above 64 KiB).
    async fn message(&self, message: Incoming) -> Result<ProjectId>;

    /// Answers a wait. The caller has checked that this person may.
    async fn answer(&self, wait: &WaitId, answer: Answer) -> Result<Answered>;

    /// Stops the running job of a project; `false` when none runs.
    async fn cancel(&self, project: &ProjectId, by: &PersonId) -> Result<bool>;

    /// Deploys what is merged once more.
    async fn redeploy(
        &self,
        project: &ProjectId,
        by: &PersonId,
        key: &str,
        yes: bool,
    ) -> Result<()>;

    /// Goes back to the last good release.
    async fn rollback(&self, project: &ProjectId, by: &PersonId, key: &str) -> Result<Deployment>;

    /// Stops, starts or removes the service, or puts the project away.
    async fn service(&self, project: &ProjectId, order: ServiceOrder, by: &PersonId) -> Result<()>;

    /// Tries again what failed: one task, or whatever waits for it; `false` when nothing does.
    async fn retry(
        &self,
        project: &ProjectId,
        task: Option<&TaskId>,
        by: &PersonId,
    ) -> Result<bool>;

    /// Stores a secret of a project and wakes whoever waits for it.
    async fn set_secret(
        &self,
        project: &ProjectId,
        name: &str,
        value: Plaintext,
        by: &PersonId,
    ) -> Result<()>;

    /// The project of this name, id, or unique beginning of an id. Fails as `no_project` or `ambiguous_project`.
    async fn find(&self, name: &str) -> Result<ProjectId>;

    /// Everything that is known of a project.
    async fn status(&self, project: &ProjectId) -> Result<StatusReport>;

    /// All projects but the archived ones, the latest first.
    async fn projects(&self) -> Result<Vec<ProjectRecord>>;

    /// Tells the admins something about the installation itself, such as a front end in trouble. Notices with one fingerprint
    /// are folded together. The text holds nothing secret.
    async fn notice(&self, severity: NoticeSeverity, fingerprint: &str, text: &str) -> Result<()>;
}
