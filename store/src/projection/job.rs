//! The table of jobs.

use ports::{Event, Failure, JobId, JobKind, JobStatus, ProjectId, threads};
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query};

use super::{EndedBy, Fold, of_project, project, task, wait};
use crate::db::{json, upsert, val, word};
use crate::{Result, Row};

/// A row of `jobs`.
pub(super) struct Job {
    pub(super) project: String,
    pub(super) id: String,
    pub(super) seq: i64,
    pub(super) kind: String,
    pub(super) title: String,
    pub(super) thread: String,
    /// What its own events say: `running`, `deployed`, `failed`, `cancelled`.
    pub(super) phase: String,
    pub(super) status: String,
    pub(super) ended_by: Option<EndedBy>,
    pub(super) node: Option<String>,
    pub(super) overview: Option<String>,
    pub(super) url: Option<String>,
    pub(super) failure: Option<Failure>,
    pub(super) started_ms: i64,
    pub(super) ended_ms: Option<i64>,
}

impl Job {
    fn read(row: &Row) -> Result<Self> {
        Ok(Self {
            project: row.text("project")?,
            id: row.text("id")?,
            seq: row.int("seq")?,
            kind: row.text("kind")?,
            title: row.text("title")?,
            thread: row.text("thread")?,
            phase: row.text("phase")?,
            status: row.text("status")?,
            ended_by: EndedBy::parse(row.opt_text("ended_by")?),
            node: row.opt_text("node")?,
            overview: row.opt_text("overview")?,
            url: row.opt_text("url")?,
            failure: row.opt_json("failure")?,
            started_ms: row.int("started_ms")?,
            ended_ms: row.opt_int("ended_ms")?,
        })
    }

    fn new(fold: &Fold<'_>, project: &ProjectId, job: &JobId) -> Self {
        Self {
            project: project.to_string(),
            id: job.to_string(),
            seq: fold.seq,
            kind: String::new(),
            title: job.to_string(),
            thread: threads::job(project, job),
            phase: "running".to_owned(),
            status: "running".to_owned(),
            ended_by: None,
            node: None,
            overview: None,
            url: None,
            failure: None,
            started_ms: fold.at_ms,
            ended_ms: None,
        }
    }

    pub(super) fn running(&self) -> bool {
        self.phase == "running"
    }

    pub(super) async fn save(self, fold: &mut Fold<'_>) -> Result<()> {
        let columns = vec![
            ("project", val(self.project)),
            ("id", val(self.id)),
            ("seq", val(self.seq)),
            ("kind", val(self.kind)),
            ("title", val(self.title)),
            ("thread", val(self.thread)),
            ("phase", val(self.phase)),
            ("status", val(self.status)),
            ("ended_by", val(self.ended_by.map(EndedBy::as_str))),
            ("node", val(self.node)),
            ("overview", val(self.overview)),
            ("url", val(self.url)),
            ("failure", val(self.failure.as_ref().map(json))),
            ("started_ms", val(self.started_ms)),
            ("ended_ms", val(self.ended_ms)),
        ];
        fold.tx
            .execute(&upsert("jobs", &["project", "id"], columns))
            .await?;
        Ok(())
    }

    fn end(&mut self, fold: &Fold<'_>, phase: &str, by: EndedBy) {
        phase.clone_into(&mut self.phase);
        self.ended_by = Some(by);
        self.ended_ms = Some(fold.at_ms);
    }

    fn revive(&mut self) {
        "running".clone_into(&mut self.phase);
        self.ended_by = None;
        self.ended_ms = None;
        self.failure = None;
    }
}

pub(super) async fn load(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
) -> Result<Option<Job>> {
    let query = Query::select()
        .column(Asterisk)
        .from("jobs")
        .and_where(of_project(project))
        .and_where(Expr::col("id").eq(job.as_str()))
        .take();
    fold.tx
        .fetch_optional(&query)
        .await?
        .as_ref()
        .map(Job::read)
        .transpose()
}

/// The project's jobs, newest first, at most 50.
pub(super) async fn newest(fold: &mut Fold<'_>, project: &ProjectId) -> Result<Vec<Job>> {
    let query = Query::select()
        .column(Asterisk)
        .from("jobs")
        .and_where(of_project(project))
        .order_by("seq", Order::Desc)
        .limit(50)
        .take();
    let rows = fold.tx.fetch_all(&query).await?;
    rows.iter().map(Job::read).collect()
}

pub(super) async fn event(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    id: &JobId,
    event: &Event,
) -> Result<()> {
    let known = load(fold, project, id).await?;
    let mut job = known.unwrap_or_else(|| Job::new(fold, project, id));
    match event {
        Event::JobStarted { work, thread } => {
            job.revive();
            word_of(work).clone_into(&mut job.kind);
            work.title().clone_into(&mut job.title);
            thread.clone_into(&mut job.thread);
            let held = project::load(fold, project)
                .await?
                .is_some_and(|p| matches!(p.hold.as_str(), "archived" | "removed"));
            if held {
                project::hold(fold, project, "").await?;
            }
        }
        Event::JobNode { node } => {
            if job.ended_by == Some(EndedBy::Engine) && job.phase == "failed" {
                // The failed thread was retried and goes on.
                job.revive();
            }
            if job.running() {
                job.node = Some(node.clone());
            }
        }
        Event::PlanMade { overview, tasks } => {
            job.overview = Some(overview.clone());
            task::planned(fold, project, id, tasks).await?;
        }
        Event::JobEnded {
            status,
            url,
            failure,
        } => {
            if job.ended_by != Some(EndedBy::Crew) {
                job.end(fold, &word(status), EndedBy::Crew);
                job.url.clone_from(url);
                job.failure.clone_from(failure);
                wait::closed_with_thread(fold, &job.thread).await?;
                if *status != JobStatus::Deployed {
                    task::job_ended(fold, project, id).await?;
                }
            }
        }
        other => {
            tracing::warn!(%project, job = %id, event = other.name(), cursor = fold.seq, "an event names no task and was passed over");
            return Ok(());
        }
    }
    job.save(fold).await
}

fn word_of(work: &JobKind) -> &'static str {
    match work {
        JobKind::New { .. } => "new",
        JobKind::Change { .. } => "change",
        JobKind::Redeploy => "redeploy",
    }
}

/// The job's thread failed: it can be retried, so its tasks stay as they are.
pub(super) async fn thread_failed(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    id: &JobId,
    error: &str,
) -> Result<()> {
    if let Some(mut job) = load(fold, project, id).await?
        && job.running()
    {
        job.end(fold, "failed", EndedBy::Engine);
        job.failure = Some(Failure::new("thread_failed", error));
        job.save(fold).await?;
    }
    Ok(())
}

pub(super) async fn thread_cancelled(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    id: &JobId,
) -> Result<()> {
    if let Some(mut job) = load(fold, project, id).await?
        && job.running()
    {
        job.end(fold, "cancelled", EndedBy::Engine);
        job.save(fold).await?;
        task::job_ended(fold, project, id).await?;
    }
    Ok(())
}
