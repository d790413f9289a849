//! What each entry of the journal changes in the projections: a fold that reads nothing but the entry and the rows that
//! earlier entries made. No clock, no configuration, no randomness, so that a rebuild makes the same rows.

mod deployment;
mod job;
mod ledger;
mod progress;
mod project;
pub(crate) mod status;
mod task;
mod voice;
mod wait;

use ports::{Event, JobId, ProjectId, Recorded, TaskId};
use sea_query::{Expr, ExprTrait as _, Query, UpdateStatement};

use crate::db::Columns;
use crate::{JournalEntry, Result, Tx};

pub(crate) use project::slug_candidates;

/// The transaction of the batch, and the entry at hand.
pub(crate) struct Fold<'a> {
    tx: &'a mut Tx,
    /// The entry's cursor.
    seq: i64,
    /// The entry's time.
    at_ms: i64,
}

/// Who said that a job or a task ended. The crew's word stands; what follows from the engine's gives way to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EndedBy {
    /// An event of the crew.
    Crew,
    /// A thread's end.
    Engine,
}

impl EndedBy {
    fn as_str(self) -> &'static str {
        match self {
            Self::Crew => "crew",
            Self::Engine => "engine",
        }
    }

    fn parse(text: Option<String>) -> Option<Self> {
        text.map(|text| {
            if text == "crew" {
                Self::Crew
            } else {
                Self::Engine
            }
        })
    }
}

fn update(table: &'static str, columns: Columns, condition: Expr) -> UpdateStatement {
    Query::update()
        .table(table)
        .values(columns)
        .and_where(condition)
        .take()
}

fn of_project(project: &ProjectId) -> Expr {
    Expr::col("project").eq(project.as_str())
}

/// Applies one entry.
pub(crate) async fn apply(tx: &mut Tx, entry: &JournalEntry) -> Result<()> {
    let mut fold = Fold {
        tx,
        seq: entry.cursor,
        at_ms: entry.at.as_millisecond(),
    };
    match Recorded::from_journal(&entry.payload) {
        Some(recorded) if recorded.event.name() == entry.name => crew(&mut fold, &recorded).await,
        _ => match entry.name.as_str() {
            "thread.done" | "thread.failed" | "thread.cancelled" => {
                thread_ended(&mut fold, entry).await
            }
            name => {
                tracing::debug!(
                    name,
                    cursor = entry.cursor,
                    stream = entry.stream,
                    "an entry that no projection knows was passed over"
                );
                Ok(())
            }
        },
    }
}

async fn crew(fold: &mut Fold<'_>, recorded: &Recorded) -> Result<()> {
    let project = &recorded.project;
    let (job, task) = (recorded.job.as_ref(), recorded.task.as_ref());
    match &recorded.event {
        // These stand for themselves and may come before the project is founded.
        Event::ModelUsed { spend } => return ledger::line(fold, spend).await,
        Event::AdminNotice {
            severity,
            fingerprint,
            text,
        } => return voice::notice(fold, project, *severity, fingerprint, text).await,
        Event::SecretGranted { .. } | Event::SecretResolved { .. } => return Ok(()),
        _ => {}
    }
    project::ensure(fold, project).await?;
    match &recorded.event {
        Event::ModelUsed { .. }
        | Event::AdminNotice { .. }
        | Event::SecretGranted { .. }
        | Event::SecretResolved { .. } => return Ok(()),
        Event::MessageReceived { key, from, text } => {
            return voice::heard(fold, project, key, from, text).await;
        }
        Event::Said {
            key,
            to,
            kind,
            text,
        } => return voice::said(fold, recorded, key, *to, *kind, text).await,
        Event::JobSteered { text, by } => {
            tracing::trace!(%project, %by, bytes = text.len(), "a job was steered");
            return Ok(());
        }
        Event::ProjectFounded { owner } => project::founded(fold, project, owner).await?,
        Event::SpecApproved { slug, spec, .. } => {
            project::specified(fold, project, slug, spec).await?;
        }
        Event::PortAllocated { port } => project::port(fold, project, *port).await?,
        Event::RepositoryCreated { location } => {
            project::repository(fold, project, location).await?;
        }
        Event::BudgetRaised {
            limit_usd,
            limit_tokens,
            ..
        } => project::budget(fold, project, *limit_usd, *limit_tokens).await?,
        Event::ServiceChanged { status, .. } => {
            deployment::service_changed(fold, project, status).await?;
        }
        Event::WaitOpened {
            wait,
            thread,
            interrupt,
        } => wait::opened(fold, recorded, wait, thread, interrupt).await?,
        Event::WaitClosed { wait, answer, by } => {
            wait::closed(fold, wait, answer.as_deref(), by.as_deref()).await?;
        }
        Event::DeployStarted { sha } => {
            tracing::trace!(%project, %sha, "a deploy began");
        }
        Event::DeployEnded { deployment } => {
            deployment::ended(fold, project, job, deployment).await?;
        }
        event => match (job, task) {
            (Some(job), Some(task)) if event.name().starts_with("task.") => {
                task::event(fold, project, job, task, event).await?;
            }
            (Some(job), _) => job::event(fold, project, job, event).await?,
            (None, _) => {
                tracing::warn!(%project, event = event.name(), cursor = fold.seq, "an event names no job and was passed over");
            }
        },
    }
    status::refresh(fold, project, job).await?;
    if let Some(job) = job {
        progress::update(fold, project, job).await?;
    }
    Ok(())
}

/// The engine's own words, in the stream that is named after the thread.
async fn thread_ended(fold: &mut Fold<'_>, entry: &JournalEntry) -> Result<()> {
    let mut parts = entry.stream.splitn(3, '/');
    let project = ProjectId::from(parts.next().unwrap_or_default());
    let job = parts.next().map(JobId::from);
    let task = parts.next().map(TaskId::from);
    let error = entry.payload["error"].as_str().unwrap_or("no reason given");

    if entry.name != "thread.failed" {
        // A failed thread can be retried, and then its questions are still open.
        wait::closed_with_thread(fold, &entry.stream).await?;
    }
    // A thread that is done says nothing of how its work ended: the crew's own events do.
    match (entry.name.as_str(), &job, &task) {
        ("thread.failed", Some(job), Some(task)) => {
            task::thread_failed(fold, &project, job, task, error).await?;
        }
        ("thread.failed", Some(job), None) => {
            job::thread_failed(fold, &project, job, error).await?;
        }
        ("thread.cancelled", Some(job), Some(task)) => {
            task::thread_cancelled(fold, &project, job, task).await?;
        }
        ("thread.cancelled", Some(job), None) => {
            job::thread_cancelled(fold, &project, job).await?;
        }
        _ => {}
    }
    if entry.name == "thread.failed" {
        voice::thread_failed(fold, &project, &entry.stream, error).await?;
    }
    if project::load(fold, &project).await?.is_some() {
        status::refresh(fold, &project, job.as_ref()).await?;
        if let Some(job) = &job {
            progress::update(fold, &project, job).await?;
        }
    }
    Ok(())
}
