//! The table of releases, and what people do to the running service.

use ports::{Deployment, DeploymentStatus, JobId, ProjectId};
use sea_query::{Expr, ExprTrait as _, Query};

use super::{Fold, of_project, project, update};
use crate::Result;
use crate::db::{insert_new, int, json, val, word};

pub(super) async fn ended(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    job: Option<&JobId>,
    deployment: &Deployment,
) -> Result<()> {
    let changing = vec![
        ("sha", val(deployment.sha.as_str())),
        ("status", val(word(&deployment.status))),
        ("url", val(deployment.url.as_str())),
        ("checks", val(json(&deployment.checks))),
        ("changed_ms", val(fold.at_ms)),
    ];
    let mut columns = vec![
        ("project", val(project.as_str())),
        ("release", int(deployment.release)),
        ("job", val(job.map(ToString::to_string))),
        ("deployed_ms", val(fold.at_ms)),
    ];
    columns.extend(changing.iter().cloned());
    let this = || of_project(project).and(Expr::col("release").eq(int(deployment.release)));
    if fold.tx.execute(&insert_new("deployments", columns)).await? == 0 {
        // A release that is known came back to life, or an outcome was told again.
        fold.tx
            .execute(&update("deployments", changing, this()))
            .await?;
    }
    match deployment.status {
        DeploymentStatus::Live => {
            only_live(fold, project, deployment.release).await?;
            project::hold(fold, project, "").await?;
        }
        DeploymentStatus::RolledBack => {
            if let Some(live) = deployment.live_release {
                set_status(
                    fold,
                    of_project(project).and(Expr::col("release").eq(int(live))),
                    DeploymentStatus::Live,
                )
                .await?;
                only_live(fold, project, live).await?;
            }
        }
        DeploymentStatus::Superseded | DeploymentStatus::Failed | DeploymentStatus::Stopped => {}
    }
    Ok(())
}

/// Whatever else was live or stopped gave way: an older release was superseded, a newer one rolled back.
async fn only_live(fold: &mut Fold<'_>, project: &ProjectId, release: u64) -> Result<()> {
    let others = || of_project(project).and(Expr::col("status").is_in(["live", "stopped"]));
    set_status(
        fold,
        others().and(Expr::col("release").lt(int(release))),
        DeploymentStatus::Superseded,
    )
    .await?;
    set_status(
        fold,
        others().and(Expr::col("release").gt(int(release))),
        DeploymentStatus::RolledBack,
    )
    .await
}

async fn set_status(fold: &mut Fold<'_>, which: Expr, status: DeploymentStatus) -> Result<()> {
    let columns = vec![
        ("status", val(word(&status))),
        ("changed_ms", val(fold.at_ms)),
    ];
    fold.tx
        .execute(&update("deployments", columns, which))
        .await?;
    Ok(())
}

pub(super) async fn service_changed(
    fold: &mut Fold<'_>,
    project: &ProjectId,
    status: &str,
) -> Result<()> {
    match status {
        "stopped" | "removed" | "archived" => {
            let live = of_project(project).and(Expr::col("status").eq("live"));
            set_status(fold, live, DeploymentStatus::Stopped).await?;
            project::hold(fold, project, status).await
        }
        "started" => {
            let newest = Query::select()
                .column("release")
                .from("deployments")
                .and_where(of_project(project))
                .and_where(Expr::col("status").eq("stopped"))
                .order_by("release", sea_query::Order::Desc)
                .limit(1)
                .take();
            if let Some(row) = fold.tx.fetch_optional(&newest).await? {
                let release = row.int("release")?;
                let this = of_project(project).and(Expr::col("release").eq(release));
                set_status(fold, this, DeploymentStatus::Live).await?;
            }
            project::hold(fold, project, "").await
        }
        other => {
            tracing::warn!(%project, status = other, "an unknown change of the service was passed over");
            Ok(())
        }
    }
}
