//! What a thread is about, and the one way in which the crew writes to the journal.

use graph::{Context, NodeError};
use ports::{
    Audience, Event, JobId, NoticeSeverity, ProjectId, Recorded, SaidKind, TaskId, threads,
};
use serde::{Deserialize, Serialize};

/// The project, job and task of a thread.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scope {
    /// The project.
    pub project: ProjectId,
    /// The job, in the threads of jobs and tasks.
    #[serde(default)]
    pub job: Option<JobId>,
    /// The task, in the threads of tasks.
    #[serde(default)]
    pub task: Option<TaskId>,
}

impl Default for Scope {
    /// No project: what a state holds before its first update.
    fn default() -> Self {
        Self::project(ProjectId::new(""))
    }
}

impl Scope {
    /// A project as a whole.
    pub fn project(project: ProjectId) -> Self {
        Self {
            project,
            job: None,
            task: None,
        }
    }

    /// One of its jobs.
    #[must_use]
    pub fn job(&self, job: JobId) -> Self {
        Self {
            project: self.project.clone(),
            job: Some(job),
            task: None,
        }
    }

    /// One of the job's tasks.
    #[must_use]
    pub fn task(&self, task: TaskId) -> Self {
        Self {
            task: Some(task),
            ..self.clone()
        }
    }

    /// Refuses a state that nobody filled, with a sentence for whoever started the thread.
    pub(crate) fn known(&self, ctx: &Context) -> Result<&Self, NodeError> {
        if self.project.as_str().is_empty() {
            return Err(NodeError::msg(format!(
                "thread {} was started without a project: give its state a `scope`",
                ctx.thread()
            ))
            .fatal());
        }
        Ok(self)
    }

    /// Writes an event about this scope, with the commit of the step.
    pub(crate) fn tell(&self, ctx: &Context, event: Event) -> Result<(), NodeError> {
        let recorded = self.record(event);
        ctx.emit(recorded.stream(), recorded.event.name(), &recorded)?;
        Ok(())
    }

    /// Writes an event about this scope at once, unique by `id`: for what must be known before the step ends.
    pub(crate) async fn tell_now(
        &self,
        ctx: &Context,
        id: &str,
        event: Event,
    ) -> Result<(), NodeError> {
        let recorded = self.record(event);
        ctx.say_now(id, recorded.stream(), recorded.event.name(), &recorded)
            .await?;
        Ok(())
    }

    /// Says something to the people of the project. `key` is unique in the project.
    pub(crate) fn say(
        &self,
        ctx: &Context,
        kind: SaidKind,
        key: impl Into<String>,
        text: impl Into<String>,
    ) -> Result<(), NodeError> {
        self.tell(
            ctx,
            Event::Said {
                key: key.into(),
                to: Audience::Owner,
                kind,
                text: text.into(),
            },
        )
    }

    /// Lets the admins know.
    pub(crate) fn notify(
        &self,
        ctx: &Context,
        severity: NoticeSeverity,
        fingerprint: impl Into<String>,
        text: impl Into<String>,
    ) -> Result<(), NodeError> {
        self.tell(
            ctx,
            Event::AdminNotice {
                severity,
                fingerprint: fingerprint.into(),
                text: text.into(),
            },
        )
    }

    fn record(&self, event: Event) -> Recorded {
        Recorded {
            project: self.project.clone(),
            job: self.job.clone(),
            task: self.task.clone(),
            event,
        }
    }
}

/// The thread's name within its project.
pub(crate) fn within_project(ctx: &Context) -> &str {
    threads::within_project(ctx.thread().as_str())
}
