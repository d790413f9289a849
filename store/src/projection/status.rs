//! What the status words mean. A job or task has a *phase*, which its own events say; its *status* is that, or `waiting`
//! while a person is asked. A project's status follows from its jobs, its waits and its live release.

use ports::{JobId, ProjectId};
use sea_query::{Expr, ExprTrait as _, Order, Query};

use super::{Fold, job, of_project, project, task, wait};
use crate::Result;

/// What a project's status follows from.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Facts<'a> {
    /// `stopped`, `removed`, `archived` or empty.
    hold: &'a str,
    /// Whether it has an approved specification.
    approved: bool,
    /// Whether a release is live.
    live: bool,
    /// Whether anybody is asked anything.
    asked: bool,
    /// The status of the running job, or else of the last.
    job: Option<&'a str>,
}

/// The project's status.
pub(crate) fn of_the_project(facts: Facts<'_>) -> &'static str {
    match (facts.hold, facts.job) {
        ("archived", _) => "archived",
        (_, Some("waiting")) => "waiting",
        (_, Some("running")) => "building",
        ("stopped" | "removed", _) => "stopped",
        _ if facts.asked => "waiting",
        _ if facts.live => "deployed",
        (_, Some("failed")) => "failed",
        (_, Some("cancelled")) => "stopped",
        (_, Some("deployed")) => "deployed",
        _ if facts.approved => "building",
        _ => "draft",
    }
}

/// The job's status: it waits when it asks, or when a task asks and no other task can go on meanwhile.
fn of_a_job(phase: &str, asks: bool, tasks: &[&str]) -> String {
    let works = |status: &&str| matches!(*status, "working" | "checking" | "reviewing" | "merging");
    let stuck = tasks.contains(&"waiting") && !tasks.iter().any(works);
    if phase == "running" && (asks || stuck) {
        "waiting".to_owned()
    } else {
        phase.to_owned()
    }
}

/// Brings the statuses of the project, its running jobs and their tasks up to date.
///
/// `touched` is the job that the entry is about, which may be none of these any more.
pub(super) async fn refresh(
    fold: &mut Fold<'_>,
    id: &ProjectId,
    touched: Option<&JobId>,
) -> Result<()> {
    let asking = wait::open_threads(fold, id).await?;
    let jobs = job::newest(fold, id).await?;
    let mut newest = None;
    let mut running = None;
    for mut job in jobs {
        let mut statuses = Vec::new();
        let looked_at = touched.is_some_and(|touched| touched.as_str() == job.id);
        if job.running() || newest.is_none() || looked_at {
            for mut task in task::of_job(fold, id, &JobId::new(job.id.as_str())).await? {
                let status = if !task.ended() && asking.contains(&task.thread) {
                    "waiting".to_owned()
                } else {
                    task.phase.clone()
                };
                statuses.push(status.clone());
                if status != task.status {
                    task.status = status;
                    task.save(fold).await?;
                }
            }
        }
        let tasks: Vec<&str> = statuses.iter().map(String::as_str).collect();
        let status = of_a_job(&job.phase, asking.contains(&job.thread), &tasks);
        newest.get_or_insert_with(|| status.clone());
        if job.running() {
            running.get_or_insert_with(|| status.clone());
        }
        if status != job.status {
            job.status = status;
            job.save(fold).await?;
        }
    }
    let live = Query::select()
        .column("url")
        .from("deployments")
        .and_where(of_project(id))
        .and_where(Expr::col("status").eq("live"))
        .order_by("release", Order::Desc)
        .limit(1)
        .take();
    let url = fold
        .tx
        .fetch_optional(&live)
        .await?
        .map(|row| row.text("url"))
        .transpose()?;
    if let Some(mut row) = project::load(fold, id).await? {
        let status = of_the_project(Facts {
            hold: &row.hold,
            approved: row.approved,
            live: url.is_some(),
            asked: !asking.is_empty(),
            job: running.as_deref().or(newest.as_deref()),
        });
        if row.status != status || row.url != url {
            status.clone_into(&mut row.status);
            row.url = url;
            row.save(fold).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_projects_status_follows_from_its_facts() {
        let facts = Facts::default();
        for (expected, facts) in [
            ("draft", facts),
            (
                "waiting",
                Facts {
                    asked: true,
                    ..facts
                },
            ),
            (
                "building",
                Facts {
                    approved: true,
                    ..facts
                },
            ),
            (
                "building",
                Facts {
                    job: Some("running"),
                    live: true,
                    asked: true,
                    ..facts
                },
            ),
            (
                "waiting",
                Facts {
                    job: Some("waiting"),
                    live: true,
                    ..facts
                },
            ),
            (
                "deployed",
                Facts {
                    job: Some("failed"),
                    live: true,
                    ..facts
                },
            ),
            (
                "failed",
                Facts {
                    job: Some("failed"),
                    ..facts
                },
            ),
            (
                "stopped",
                Facts {
                    job: Some("cancelled"),
                    ..facts
                },
            ),
            (
                "stopped",
                Facts {
                    job: Some("deployed"),
                    hold: "stopped",
                    ..facts
                },
            ),
            (
                "archived",
                Facts {
                    job: Some("running"),
                    hold: "archived",
                    ..facts
                },
            ),
        ] {
            assert_eq!(of_the_project(facts), expected, "{facts:?}");
        }
    }

    #[test]
    fn a_job_waits_only_when_nothing_else_can_go_on() {
        assert_eq!(
            of_a_job("running", false, &["waiting", "working"]),
            "running"
        );
        assert_eq!(
            of_a_job("running", false, &["waiting", "planned"]),
            "waiting"
        );
        assert_eq!(of_a_job("running", true, &["working"]), "waiting");
        assert_eq!(of_a_job("failed", true, &["waiting"]), "failed");
    }
}
