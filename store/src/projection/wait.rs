//! The table of waits for people.

use ports::{OpenWait, Recorded, WaitId};
use sea_query::{Expr, ExprTrait as _, LikeExpr, Query};

use super::{Fold, of_project, update, voice};
use crate::Result;
use crate::db::{json, upsert, val, word};

pub(super) async fn opened(
    fold: &mut Fold<'_>,
    recorded: &Recorded,
    wait: &OpenWait,
    thread: &str,
    interrupt: &str,
) -> Result<()> {
    let columns = vec![
        ("id", val(wait.id.as_str())),
        ("project", val(recorded.project.as_str())),
        ("job", val(recorded.job.as_ref().map(ToString::to_string))),
        ("task", val(recorded.task.as_ref().map(ToString::to_string))),
        ("kind", val(word(&wait.kind))),
        ("question", val(wait.question.as_str())),
        ("options", val(json(&wait.options))),
        ("free_text", val(wait.free_text)),
        ("audience", val(word(&wait.audience))),
        ("thread", val(thread)),
        ("interrupt", val(interrupt)),
        ("status", val("open")),
        ("answer", val(None::<String>)),
        ("answered_by", val(None::<String>)),
        ("seq", val(fold.seq)),
        ("opened_ms", val(fold.at_ms)),
        ("closed_ms", val(None::<i64>)),
    ];
    fold.tx.execute(&upsert("waits", &["id"], columns)).await?;
    voice::asked(fold, recorded, wait).await
}

pub(super) async fn closed(
    fold: &mut Fold<'_>,
    wait: &WaitId,
    answer: Option<&str>,
    by: Option<&str>,
) -> Result<()> {
    let query = Query::select()
        .column("project")
        .from("waits")
        .and_where(Expr::col("id").eq(wait.as_str()))
        .and_where(Expr::col("status").eq("open"))
        .take();
    let Some(row) = fold.tx.fetch_optional(&query).await? else {
        return Ok(());
    };
    let project = row.text("project")?;
    close(fold, wait.as_str(), answer, by).await?;
    voice::answered(fold, &project, wait.as_str(), answer, by).await
}

async fn close(
    fold: &mut Fold<'_>,
    wait: &str,
    answer: Option<&str>,
    by: Option<&str>,
) -> Result<()> {
    let columns = vec![
        ("status", val("closed")),
        ("answer", val(answer)),
        ("answered_by", val(by)),
        ("closed_ms", val(fold.at_ms)),
    ];
    let this = Expr::col("id").eq(wait);
    fold.tx.execute(&update("waits", columns, this)).await?;
    Ok(())
}

/// A thread that ended, and what was below it, asks nobody any more.
pub(super) async fn closed_with_thread(fold: &mut Fold<'_>, thread: &str) -> Result<()> {
    let project = ports::ProjectId::from(thread.split('/').next().unwrap_or_default());
    let below: String = thread
        .chars()
        .flat_map(|c| {
            matches!(c, '%' | '_' | '\\')
                .then_some('\\')
                .into_iter()
                .chain([c])
        })
        .chain("/%".chars())
        .collect();
    let query = Query::select()
        .column("id")
        .from("waits")
        .and_where(of_project(&project))
        .and_where(Expr::col("status").eq("open"))
        .and_where(
            Expr::col("thread")
                .eq(thread)
                .or(Expr::col("thread").like(LikeExpr::new(below).escape('\\'))),
        )
        .take();
    for row in fold.tx.fetch_all(&query).await? {
        let id = row.text("id")?;
        close(fold, &id, None, None).await?;
        voice::answered(fold, project.as_str(), &id, None, None).await?;
    }
    Ok(())
}

/// The threads of the project in which somebody is asked.
pub(super) async fn open_threads(
    fold: &mut Fold<'_>,
    project: &ports::ProjectId,
) -> Result<Vec<String>> {
    let query = Query::select()
        .column("thread")
        .from("waits")
        .and_where(of_project(project))
        .and_where(Expr::col("status").eq("open"))
        .take();
    let rows = fold.tx.fetch_all(&query).await?;
    rows.iter().map(|row| row.text("thread")).collect()
}
