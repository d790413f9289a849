//! Where workers are: which phase of their work they are in and since when, as their spawners say. Nothing depends on it; it is
//! there so that no wait is without a name and an end.

use jiff::Timestamp;
use ports::{JobId, ProjectId, RequestId, TaskId, WorkerRecord};
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query};

use crate::db::{insert_new, int, val};
use crate::{Result, Row, Store};

/// The phase of a worker that no spawner has taken up.
pub const WAITING: &str = "waiting for a spawner";

/// A worker that somebody waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Awaited {
    /// The request.
    pub request: RequestId,
    /// The project.
    pub project: ProjectId,
    /// The job.
    pub job: JobId,
    /// The task.
    pub task: TaskId,
    /// The attempt, from 1.
    pub attempt: u32,
}

impl Store {
    /// Workers whose tasks wait for them, at most `limit`, oldest task first. Those that are known to have ended are not
    /// among them.
    pub async fn awaited_workers(&self, limit: u64) -> Result<Vec<Awaited>> {
        let ended = Query::select()
            .column("request")
            .from("workers")
            .and_where(Expr::col(("workers", "request")).equals(("tasks", "request")))
            .and_where(Expr::col(("workers", "ended_ms")).is_not_null())
            .take();
        let query = Query::select()
            .columns(["request", "project", "job", "id", "attempts"])
            .from("tasks")
            .and_where(Expr::col("phase").eq("working"))
            .and_where(Expr::col("request").is_not_null())
            .and_where(Expr::exists(ended).not())
            .order_by("started_ms", Order::Asc)
            .order_by("thread", Order::Asc)
            .limit(limit)
            .take();
        self.db
            .fetch_all(&query)
            .await?
            .iter()
            .map(|row| {
                Ok(Awaited {
                    request: RequestId::new(row.text("request")?),
                    project: ProjectId::new(row.text("project")?),
                    job: JobId::new(row.text("job")?),
                    task: TaskId::new(row.text("id")?),
                    attempt: u32::try_from(row.count("attempts")?).unwrap_or(u32::MAX),
                })
            })
            .collect()
    }

    /// A worker is waited for, until `until` at the latest. What is known of it already stays.
    pub async fn worker_awaited(&self, awaited: &Awaited, until: Timestamp) -> Result<()> {
        let row = insert_new(
            "workers",
            vec![
                ("request", val(awaited.request.as_str())),
                ("project", val(awaited.project.as_str())),
                ("job", val(awaited.job.as_str())),
                ("task", val(awaited.task.as_str())),
                ("attempt", int(awaited.attempt)),
                ("phase", val(WAITING)),
                ("since_ms", val(Timestamp::now().as_millisecond())),
                ("until_ms", val(until.as_millisecond())),
            ],
        );
        self.db.execute(&row).await?;
        Ok(())
    }

    /// A worker is in this phase since `since`. A phase that it is in already goes on.
    pub async fn worker_phase(
        &self,
        request: &RequestId,
        phase: &str,
        since: Timestamp,
    ) -> Result<()> {
        let update = Query::update()
            .table("workers")
            .value("phase", phase)
            .value("since_ms", since.as_millisecond())
            .and_where(Expr::col("request").eq(request.as_str()))
            .and_where(Expr::col("phase").ne(phase))
            .take();
        self.db.execute(&update).await?;
        Ok(())
    }

    /// Says why a worker that no spawner has taken up still waits.
    pub async fn worker_waits(&self, request: &RequestId, why: &str) -> Result<()> {
        let update = Query::update()
            .table("workers")
            .value("phase", why)
            .and_where(Expr::col("request").eq(request.as_str()))
            .and_where(Expr::col("phase").like(crate::record::beginning_with(WAITING)))
            .take();
        self.db.execute(&update).await?;
        Ok(())
    }

    /// A worker was taken up by this spawner.
    pub async fn worker_taken_up(&self, request: &RequestId, spawner: &str) -> Result<()> {
        let update = Query::update()
            .table("workers")
            .value("spawner", spawner)
            .and_where(Expr::col("request").eq(request.as_str()))
            .take();
        self.db.execute(&update).await?;
        Ok(())
    }

    /// A worker has ended.
    pub async fn worker_ended(&self, request: &RequestId) -> Result<()> {
        let update = Query::update()
            .table("workers")
            .value("ended_ms", self.db.now_ms())
            .and_where(Expr::col("request").eq(request.as_str()))
            .take();
        self.db.execute(&update).await?;
        Ok(())
    }

    /// The workers of a job that have not ended, by request.
    pub(crate) async fn workers_of(
        &self,
        project: &ProjectId,
        job: &JobId,
    ) -> Result<std::collections::HashMap<String, WorkerRecord>> {
        let query = Query::select()
            .column(Asterisk)
            .from("workers")
            .and_where(Expr::col("project").eq(project.as_str()))
            .and_where(Expr::col("job").eq(job.as_str()))
            .and_where(Expr::col("ended_ms").is_null())
            .take();
        let read = |row: &Row| {
            Ok((
                row.text("request")?,
                WorkerRecord {
                    phase: row.text("phase")?,
                    since: row.time("since_ms")?,
                    until: row.time("until_ms")?,
                    spawner: row.opt_text("spawner")?,
                },
            ))
        };
        self.db.fetch_all(&query).await?.iter().map(read).collect()
    }
}
