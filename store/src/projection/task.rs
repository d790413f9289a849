//! The tables of tasks and of their pull requests.

use ports::{
    CheckStatus, Event, Failure, JobId, ProjectId, ReviewVerdict, Sha, TaskId, TaskSummary, threads,
};
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query};

use super::{EndedBy, Fold, of_project, update, wait};
use crate::db::{insert_new, int, json, upsert, val};
use crate::{Result, Row};

/// A row of `tasks`.
pub(super) struct Task {
    pub(super) project: String,
    pub(super) job: String,
    pub(super) id: String,
    position: i64,
    pub(super) title: String,
    depends_on: Vec<String>,
    pub(super) thread: String,
    /// What its own events say: a status without `waiting`.
    pub(super) phase: String,
    pub(super) status: String,
    ended_by: Option<EndedBy>,
    /// Whether the last review approved it: what is checked again after a rebase goes straight to its merge.
    approved: bool,
    attempts: i64,
    pub(super) review_rounds: i64,
    request: Option<String>,
    summary: Option<String>,
    pub(super) failure: Option<Failure>,
    merged_sha: Option<String>,
    started_ms: Option<i64>,
    ended_ms: Option<i64>,
}

impl Task {
    fn read(row: &Row) -> Result<Self> {
        Ok(Self {
            project: row.text("project")?,
            job: row.text("job")?,
            id: row.text("id")?,
            position: row.int("position")?,
            title: row.text("title")?,
            depends_on: row.json("depends_on")?,
            thread: row.text("thread")?,
            phase: row.text("phase")?,
            status: row.text("status")?,
            ended_by: EndedBy::parse(row.opt_text("ended_by")?),
            approved: row.flag("approved")?,
            attempts: row.int("attempts")?,
            review_rounds: row.int("review_rounds")?,
            request: row.opt_text("request")?,
            summary: row.opt_text("summary")?,
            failure: row.opt_json("failure")?,
            merged_sha: row.opt_text("merged_sha")?,
            started_ms: row.opt_int("started_ms")?,
            ended_ms: row.opt_int("ended_ms")?,
        })
    }

    fn new(project: &ProjectId, job: &JobId, task: &TaskId, position: i64) -> Self {
        Self {
            project: project.to_string(),
            job: job.to_string(),
            id: task.to_string(),
            position,
            title: task.to_string(),
            depends_on: Vec::new(),
            thread: threads::task(project, job, task),
            phase: "planned".to_owned(),
            status: "planned".to_owned(),
            ended_by: None,
            approved: false,
            attempts: 0,
            review_rounds: 0,
            request: None,
            summary: None,
            failure: None,
            merged_sha: None,
            started_ms: None,
            ended_ms: None,
        }
    }

    pub(super) async fn save(self, fold: &mut Fold<'_>) -> Result<()> {
        let columns = vec![
            ("project", val(self.project)),
            ("job", val(self.job)),
            ("id", val(self.id)),
            ("position", val(self.position)),
            ("title", val(self.title)),
            ("depends_on", val(json(&self.depends_on))),
            ("thread", val(self.thread)),
            ("phase", val(self.phase)),
            ("status", val(self.status)),
            ("ended_by", val(self.ended_by.map(EndedBy::as_str))),
            ("approved", val(self.approved)),
            ("attempts", val(self.attempts)),
            ("review_rounds", val(self.review_rounds)),
            ("request", val(self.request)),
            ("summary", val(self.summary)),
            ("failure", val(self.failure.as_ref().map(json))),
            ("merged_sha", val(self.merged_sha)),
            ("started_ms", val(self.started_ms)),
            ("ended_ms", val(self.ended_ms)),
        ];
        fold.tx
            .execute(&upsert("tasks", &["project", "job", "id"], columns))
            .await?;
        Ok(())
    }

    pub(super) fn ended(&self) -> bool {
        matches!(self.phase.as_str(), "merged" | "failed" | "cancelled")
    }

    fn end(&mut self, fold: &Fold<'_>, phase: &str, by: EndedBy) {
        phase.clone_into(&mut self.phase);
        self.ended_by = Some(by);
        self.ended_ms = Some(fold.at_ms);
    }

    /// Goes on to a phase, unless it ended. A task whose thread failed was retried when it is heard of again.
    fn advance(&mut self, phase: &str) -> bool {
        let retried = self.ended_by == Some(EndedBy::Engine) && self.phase == "failed";
        if self.ended() && !retried {
            return false;
        }
        if retried {
            self.failure = None;
        }
        phase.clone_into(&mut self.phase);
        self.ended_by = None;
        self.ended_ms = None;
        true
    }
}

fn key(project: &ProjectId, job: &JobId) -> Expr {
    of_project(project).and(Expr::col("job").eq(job.as_str()))
}

/// The tasks of a job, in the plan's order.
pub(super) async fn of_job(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
) -> Result<Vec<Task>> {
    let query = Query::select()
        .column(Asterisk)
        .from("tasks")
        .and_where(key(project, job))
        .order_by("position", Order::Asc)
        .take();
    let rows = fold.tx.fetch_all(&query).await?;
    rows.iter().map(Task::read).collect()
}

async fn load(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
    task: &TaskId,
) -> Result<Option<Task>> {
    let query = Query::select()
        .column(Asterisk)
        .from("tasks")
        .and_where(key(project, job))
        .and_where(Expr::col("id").eq(task.as_str()))
        .take();
    fold.tx
        .fetch_optional(&query)
        .await?
        .as_ref()
        .map(Task::read)
        .transpose()
}

/// A plan, or a new plan: what it no longer names goes away if nobody began it.
pub(super) async fn planned(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
    tasks: &[TaskSummary],
) -> Result<()> {
    let known = of_job(fold, project, job).await?;
    let mut behind = i64::try_from(tasks.len()).unwrap_or(i64::MAX);
    for mut old in known {
        if tasks.iter().any(|task| task.id.as_str() == old.id) {
            continue;
        }
        if old.phase == "planned" {
            let gone = Query::delete()
                .from_table("tasks")
                .and_where(key(project, job))
                .and_where(Expr::col("id").eq(old.id.as_str()))
                .take();
            fold.tx.execute(&gone).await?;
        } else {
            behind += 1;
            old.position = behind;
            old.save(fold).await?;
        }
    }
    for (position, summary) in (1..).zip(tasks) {
        let mut task = load(fold, project, job, &summary.id)
            .await?
            .unwrap_or_else(|| Task::new(project, job, &summary.id, position));
        task.position = position;
        summary.title.clone_into(&mut task.title);
        task.depends_on = summary.depends_on.iter().map(ToString::to_string).collect();
        task.save(fold).await?;
    }
    Ok(())
}

pub(super) async fn event(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
    id: &TaskId,
    event: &Event,
) -> Result<()> {
    let mut task = if let Some(task) = load(fold, project, job, id).await? {
        task
    } else {
        let behind = of_job(fold, project, job)
            .await?
            .last()
            .map_or(1, |last| last.position + 1);
        Task::new(project, job, id, behind)
    };
    match event {
        Event::TaskStarted { thread } => {
            if task.phase != "merged" {
                // Started anew, whatever ended it before.
                "working".clone_into(&mut task.phase);
                task.ended_by = None;
                task.ended_ms = None;
                task.failure = None;
                thread.clone_into(&mut task.thread);
                task.started_ms.get_or_insert(fold.at_ms);
            }
        }
        Event::TaskAttempt { attempt, request } => {
            task.attempts = Ord::max(task.attempts, i64::from(*attempt));
            if task.advance("working") {
                task.approved = false;
                task.request = Some(request.to_string());
                task.started_ms.get_or_insert(fold.at_ms);
            }
        }
        Event::TaskWorked {
            summary, failure, ..
        } => {
            if task.advance("working") {
                task.summary = Some(summary.clone());
                task.failure.clone_from(failure);
            }
        }
        Event::PullRequestOpened { number, url, head } => {
            pull_request(fold, &task, *number, url, head).await?;
            task.advance("checking");
        }
        Event::TaskChecked { status, .. } => {
            let next = match status {
                CheckStatus::Passed if task.approved => "merging",
                CheckStatus::Passed => "reviewing",
                CheckStatus::Failed | CheckStatus::TimedOut => "working",
            };
            task.advance(next);
        }
        Event::TaskReviewed { round, verdict, .. } => {
            task.review_rounds = Ord::max(task.review_rounds, i64::from(*round));
            task.approved = *verdict == ReviewVerdict::Approve;
            task.advance(if task.approved { "merging" } else { "working" });
        }
        Event::TaskMerged { number, sha } => {
            merged(fold, project, *number, sha).await?;
            if task.ended_by != Some(EndedBy::Crew) {
                task.end(fold, "merged", EndedBy::Crew);
                task.failure = None;
                task.merged_sha = Some(sha.to_string());
                wait::closed_with_thread(fold, &task.thread).await?;
            }
        }
        Event::TaskEnded { status, failure } => {
            if task.ended_by != Some(EndedBy::Crew) {
                let phase = if status == "cancelled" {
                    "cancelled"
                } else {
                    "failed"
                };
                task.end(fold, phase, EndedBy::Crew);
                task.failure.clone_from(failure);
                close_pull_requests(fold, &task).await?;
                wait::closed_with_thread(fold, &task.thread).await?;
            }
        }
        other => {
            tracing::warn!(%project, %job, task = %id, event = other.name(), cursor = fold.seq, "an event of a task is unknown and was passed over");
            return Ok(());
        }
    }
    task.save(fold).await
}

async fn pull_request(
    fold: &mut Fold<'_>,
    task: &Task,
    number: u64,
    url: &str,
    head: &Sha,
) -> Result<()> {
    let columns = vec![
        ("project", val(task.project.as_str())),
        ("number", int(number)),
        ("job", val(task.job.as_str())),
        ("task", val(task.id.as_str())),
        ("status", val("open")),
        ("url", val(url)),
        ("head", val(head.as_str())),
        ("opened_ms", val(fold.at_ms)),
        ("changed_ms", val(fold.at_ms)),
    ];
    let opened = fold
        .tx
        .execute(&insert_new("pull_requests", columns))
        .await?;
    if opened == 0 {
        let columns = vec![
            ("status", val("open")),
            ("url", val(url)),
            ("head", val(head.as_str())),
            ("changed_ms", val(fold.at_ms)),
        ];
        let this = Expr::col("project")
            .eq(task.project.as_str())
            .and(Expr::col("number").eq(int(number)))
            .and(Expr::col("status").ne("merged"));
        fold.tx
            .execute(&update("pull_requests", columns, this))
            .await?;
    }
    Ok(())
}

async fn merged(fold: &mut Fold<'_>, project: &ProjectId, number: u64, sha: &Sha) -> Result<()> {
    let columns = vec![
        ("status", val("merged")),
        ("merged_sha", val(sha.as_str())),
        ("changed_ms", val(fold.at_ms)),
    ];
    let this = of_project(project).and(Expr::col("number").eq(int(number)));
    fold.tx
        .execute(&update("pull_requests", columns, this))
        .await?;
    Ok(())
}

/// What is given up is not merged any more.
async fn close_pull_requests(fold: &mut Fold<'_>, task: &Task) -> Result<()> {
    let columns = vec![("status", val("closed")), ("changed_ms", val(fold.at_ms))];
    let open = Expr::col("project")
        .eq(task.project.as_str())
        .and(Expr::col("job").eq(task.job.as_str()))
        .and(Expr::col("task").eq(task.id.as_str()))
        .and(Expr::col("status").eq("open"));
    fold.tx
        .execute(&update("pull_requests", columns, open))
        .await?;
    Ok(())
}

/// A job that ended without a result takes what is left of its tasks with it.
pub(super) async fn job_ended(fold: &mut Fold<'_>, project: &ProjectId, job: &JobId) -> Result<()> {
    for mut task in of_job(fold, project, job).await? {
        if !task.ended() {
            close_pull_requests(fold, &task).await?;
            task.end(fold, "cancelled", EndedBy::Engine);
            task.save(fold).await?;
        }
    }
    Ok(())
}

pub(super) async fn thread_failed(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
    id: &TaskId,
    error: &str,
) -> Result<()> {
    if let Some(mut task) = load(fold, project, job, id).await?
        && !task.ended()
    {
        task.end(fold, "failed", EndedBy::Engine);
        task.failure = Some(Failure::new("thread_failed", error));
        task.save(fold).await?;
    }
    Ok(())
}

pub(super) async fn thread_cancelled(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: &JobId,
    id: &TaskId,
) -> Result<()> {
    if let Some(mut task) = load(fold, project, job, id).await?
        && !task.ended()
    {
        close_pull_requests(fold, &task).await?;
        task.end(fold, "cancelled", EndedBy::Engine);
        task.save(fold).await?;
    }
    Ok(())
}
