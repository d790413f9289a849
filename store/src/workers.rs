//! Where workers are: which phase of their work they are in and since when, as their spawners say. Nothing depends on it; it is
//! there so that no wait is without a name and an end.

use jiff::Timestamp;
use ports::{JobId, ProjectId, RequestId, TaskId, WorkerRecord};
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query};

use crate::db::{insert_new, int, val};
use crate::{Result, Row, Store};

/// The phase of a worker that no spawner has taken up.
pub const WAITING: &str = "waiting for a spawner";

/// Lines that are kept of a worker; the oldest go first.
pub const LINES_KEPT: u64 = 300;
/// How long lines of workers are kept, in milliseconds: two weeks.
const LINES_LIVE: i64 = 14 * 24 * 3_600_000;

/// Something that a worker, or its spawner of it, said. It may have several lines of text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerLine {
    /// When, by its spawner's clock, in milliseconds since 1970.
    pub at_ms: i64,
    /// The spawner's count, which orders what was said in one millisecond.
    pub seq: i64,
    /// `phase`, `progress`, `log` or `refused`.
    pub kind: String,
    /// Its words.
    pub text: String,
}

/// A line, with whose it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SaidByWorker {
    /// The attempt of the task, from 1.
    pub attempt: u32,
    /// What was said.
    pub line: WorkerLine,
}

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
            .read(&query, |row| {
                Ok(Awaited {
                    request: RequestId::new(row.text("request")?),
                    project: ProjectId::new(row.text("project")?),
                    job: JobId::new(row.text("job")?),
                    task: TaskId::new(row.text("id")?),
                    attempt: u32::try_from(row.count("attempts")?).unwrap_or(u32::MAX),
                })
            })
            .await
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

    /// Keeps what a worker said, once, however often it is heard. Of each worker the last [`LINES_KEPT`] are kept.
    pub async fn worker_said(&self, request: &RequestId, line: &WorkerLine) -> Result<()> {
        let row = insert_new(
            "worker_lines",
            vec![
                ("request", val(request.as_str())),
                ("at_ms", val(line.at_ms)),
                ("seq", val(line.seq)),
                ("kind", val(line.kind.as_str())),
                ("text", val(line.text.as_str())),
            ],
        );
        if self.db.execute(&row).await? == 0 {
            return Ok(());
        }
        // Nothing is older than the oldest of those that stay, when there are fewer.
        let oldest = Query::select()
            .column("at_ms")
            .from("worker_lines")
            .and_where(Expr::col("request").eq(request.as_str()))
            .order_by("at_ms", Order::Desc)
            .order_by("seq", Order::Desc)
            .limit(1)
            .offset(LINES_KEPT - 1)
            .take();
        let Some(oldest) = self.db.fetch_optional(&oldest).await? else {
            return Ok(());
        };
        let delete = Query::delete()
            .from_table("worker_lines")
            .and_where(Expr::col("request").eq(request.as_str()))
            .and_where(Expr::col("at_ms").lt(oldest.int("at_ms")?))
            .take();
        self.db.execute(&delete).await?;
        Ok(())
    }

    /// The last `limit` things that workers of a task said after this moment and count, in the order in which they were said.
    /// `None`: no task of that name ever had a worker.
    pub async fn said_by_workers(
        &self,
        project: &ProjectId,
        task: &TaskId,
        (at_ms, seq): (i64, i64),
        limit: u64,
    ) -> Result<Option<Vec<SaidByWorker>>> {
        let of_task = |query: &mut sea_query::SelectStatement| {
            query
                .and_where(Expr::col(("workers", "project")).eq(project.as_str()))
                .and_where(Expr::col(("workers", "task")).eq(task.as_str()));
        };
        let query = Query::select()
            .columns([("worker_lines", "at_ms"), ("worker_lines", "seq")])
            .columns([("worker_lines", "kind"), ("worker_lines", "text")])
            .column(("workers", "attempt"))
            .from("worker_lines")
            .inner_join(
                "workers",
                Expr::col(("workers", "request")).equals(("worker_lines", "request")),
            )
            .apply(of_task)
            .and_where(
                Expr::col(("worker_lines", "at_ms"))
                    .gt(at_ms)
                    .or(Expr::col(("worker_lines", "at_ms"))
                        .eq(at_ms)
                        .and(Expr::col(("worker_lines", "seq")).gt(seq))),
            )
            .order_by(("worker_lines", "at_ms"), Order::Desc)
            .order_by(("worker_lines", "seq"), Order::Desc)
            .limit(limit)
            .take();
        let rows = self.db.fetch_all(&query).await?;
        if rows.is_empty() {
            let any = Query::select()
                .column("request")
                .from("workers")
                .apply(of_task)
                .limit(1)
                .take();
            if self.db.fetch_optional(&any).await?.is_none() {
                return Ok(None);
            }
        }
        let read = |row: &Row| {
            Ok(SaidByWorker {
                attempt: u32::try_from(row.count("attempt")?).unwrap_or(u32::MAX),
                line: WorkerLine {
                    at_ms: row.int("at_ms")?,
                    seq: row.int("seq")?,
                    kind: row.text("kind")?,
                    text: row.text("text")?,
                },
            })
        };
        let said: Result<Vec<_>> = rows.iter().rev().map(read).collect();
        Ok(Some(said?))
    }

    /// The tasks of a project that had workers, the last one first, at most `limit`.
    pub async fn tasks_with_workers(&self, project: &ProjectId, limit: u64) -> Result<Vec<TaskId>> {
        let query = Query::select()
            .column("task")
            .from("workers")
            .and_where(Expr::col("project").eq(project.as_str()))
            .group_by_col("task")
            .order_by_expr(Expr::col("since_ms").max(), Order::Desc)
            .limit(limit)
            .take();
        let read = |row: &Row| Ok(TaskId::new(row.text("task")?));
        self.db.read(&query, read).await
    }

    /// A worker has ended.
    pub async fn worker_ended(&self, request: &RequestId) -> Result<()> {
        let old = Query::delete()
            .from_table("worker_lines")
            .and_where(Expr::col("at_ms").lt(Timestamp::now().as_millisecond() - LINES_LIVE))
            .take();
        self.db.execute(&old).await?;
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
        Ok(self.db.read(&query, read).await?.into_iter().collect())
    }
}
