//! The one message per job that is edited in place while it works.

use std::fmt::Write as _;

use ports::{Audience, JobId, ProjectId};
use sea_query::{Asterisk, Expr, ExprTrait as _, Query};

use super::job::{self, Job};
use super::task::{self, Task};
use super::voice::Intent;
use super::{Fold, update as changed};
use crate::Result;
use crate::db::val;

/// Brings the job's message up to date; a text that stays the same is no new revision.
pub(super) async fn update(fold: &mut Fold<'_>, project: &ProjectId, id: &JobId) -> Result<()> {
    let Some(job) = job::load(fold, project, id).await? else {
        return Ok(());
    };
    let tasks = task::of_job(fold, project, id).await?;
    let body = render(&job, &tasks);
    let key = format!("progress:{project}/{id}");
    let query = Query::select()
        .column(Asterisk)
        .from("outbox_intents")
        .and_where(Expr::col("id").eq(key.as_str()))
        .take();
    match fold.tx.fetch_optional(&query).await? {
        Some(row) if row.text("body")? == body => Ok(()),
        Some(_) => {
            let columns = vec![
                ("body", val(body)),
                ("revision", val(fold.seq)),
                ("last_ms", val(fold.at_ms)),
            ];
            let this = Expr::col("id").eq(key);
            fold.tx
                .execute(&changed("outbox_intents", columns, this))
                .await?;
            Ok(())
        }
        None => {
            Intent {
                id: &key,
                project: project.as_str(),
                job: Some(id.to_string()),
                audience: Audience::Owner,
                kind: "progress",
                body: &body,
                wait: None,
                notice: None,
            }
            .write(fold)
            .await?;
            Ok(())
        }
    }
}

fn render(job: &Job, tasks: &[Task]) -> String {
    let mut text = format!("**{}** ({}): ", job.title, job.id);
    match job.status.as_str() {
        "running" => match &job.node {
            Some(node) => {
                let _ = write!(text, "{node} at work");
            }
            None => text.push_str("starting"),
        },
        "waiting" => text.push_str("waits for an answer"),
        "deployed" => match &job.url {
            Some(url) => {
                let _ = write!(text, "deployed {url}");
            }
            None => text.push_str("deployed"),
        },
        other => text.push_str(other),
    }
    if job.status == "failed"
        && let Some(failure) = &job.failure
    {
        let _ = write!(text, ": {}", failure.message);
    }
    if !tasks.is_empty() {
        let merged = tasks.iter().filter(|t| t.phase == "merged").count();
        let _ = write!(text, "\n{merged} of {} tasks merged", tasks.len());
    }
    for task in tasks {
        let mark = match task.status.as_str() {
            "merged" => "✓",
            "planned" => "○",
            "failed" | "cancelled" => "✗",
            "waiting" => "?",
            _ => "●",
        };
        let _ = write!(text, "\n{mark} {}: {}", task.title, task.status);
        if task.review_rounds > 1 {
            let _ = write!(text, ", review round {}", task.review_rounds);
        }
        if task.status == "failed"
            && let Some(failure) = &task.failure
        {
            let _ = write!(text, " ({})", failure.message);
        }
    }
    text
}
