//! Reading the ledger. Lines come from the journal alone: whoever spends appends `model.used` there, and has the projector
//! catch up before asking what was spent.

use jiff::Timestamp;
use ports::{JobId, ProjectId, Role, Spent, TaskId, Usage};
use sea_query::{Asterisk, Expr, ExprTrait as _, Order, Query, SelectStatement};

use crate::record::sums;
use crate::{Result, Store};

/// What one role spent with one model on one project.
#[derive(Clone, Debug, PartialEq)]
pub struct LedgerSum {
    /// Who paid.
    pub project: ProjectId,
    /// Which role asked.
    pub role: Role,
    /// Which model answered.
    pub model: String,
    /// US dollars; `None` when no price is known.
    pub cost_usd: Option<f64>,
    /// Tokens read and written.
    pub tokens: u64,
}

/// One line of the ledger.
#[derive(Clone, Debug, PartialEq)]
pub struct LedgerLine {
    /// Its unique id.
    pub id: String,
    /// For which job.
    pub job: Option<JobId>,
    /// For which task.
    pub task: Option<TaskId>,
    /// Which role asked.
    pub role: Role,
    /// Which model answered.
    pub model: String,
    /// What it took.
    pub usage: Usage,
    /// When.
    pub at: Timestamp,
}

impl Store {
    /// What a project spent so far, and the limits that its owner raised.
    pub async fn spent(&self, project: &ProjectId) -> Result<Spent> {
        let mut spent = Spent::default();
        let mut query = SelectStatement::new();
        sums(&mut query).and_where(Expr::col("project").eq(project.as_str()));
        if let Some(row) = self.db.fetch_optional(&query).await? {
            spent.cost_usd = row.opt_double("cost_usd")?.unwrap_or(0.0);
            spent.tokens = row.count("tokens")?;
        }
        let limits = Query::select()
            .columns(["limit_usd", "limit_tokens"])
            .from("projects")
            .and_where(Expr::col("id").eq(project.as_str()))
            .take();
        if let Some(row) = self.db.fetch_optional(&limits).await? {
            spent.limit_usd = row.opt_double("limit_usd")?;
            spent.limit_tokens = row
                .opt_int("limit_tokens")?
                .and_then(|limit| u64::try_from(limit).ok());
        }
        Ok(spent)
    }

    /// What was spent per project, role and model; of one project or of all.
    pub async fn ledger_sums(&self, project: Option<&ProjectId>) -> Result<Vec<LedgerSum>> {
        let mut query = SelectStatement::new();
        query.columns(["project", "role", "model"]);
        sums(&mut query)
            .and_where_option(project.map(|p| Expr::col("project").eq(p.as_str())))
            .group_by_columns(["project", "role", "model"])
            .order_by("project", Order::Asc)
            .order_by("role", Order::Asc)
            .order_by("model", Order::Asc);
        self.db
            .read(&query, |row| {
                Ok(LedgerSum {
                    project: ProjectId::new(row.text("project")?),
                    role: row.word("role")?,
                    model: row.text("model")?,
                    cost_usd: row.opt_double("cost_usd")?,
                    tokens: row.count("tokens")?,
                })
            })
            .await
    }

    /// What stands in the ledger of a task under ids that begin with `prefix`, and how many lines they are.
    pub async fn booked(
        &self,
        project: &ProjectId,
        job: &JobId,
        task: &TaskId,
        prefix: &str,
    ) -> Result<(u64, Usage)> {
        let query = Query::select()
            .columns(["id", "input_tokens", "output_tokens", "cost_usd"])
            .from("ledger")
            .and_where(Expr::col("project").eq(project.as_str()))
            .and_where(Expr::col("job").eq(job.as_str()))
            .and_where(Expr::col("task").eq(task.as_str()))
            .take();
        let mut lines = 0;
        let mut booked = Usage::default();
        for row in self.db.fetch_all(&query).await? {
            // Not by LIKE: a task has few lines, and an id may hold what a pattern means something else by.
            if row.text("id")?.starts_with(prefix) {
                lines += 1;
                booked.input_tokens += row.count("input_tokens")?;
                booked.output_tokens += row.count("output_tokens")?;
                if let Some(cost) = row.opt_double("cost_usd")? {
                    booked.cost_usd = Some(booked.cost_usd.unwrap_or(0.0) + cost);
                }
            }
        }
        Ok((lines, booked))
    }

    /// The last lines of a project's ledger, newest first, at most `limit`.
    pub async fn ledger_lines(&self, project: &ProjectId, limit: u64) -> Result<Vec<LedgerLine>> {
        let query = Query::select()
            .column(Asterisk)
            .from("ledger")
            .and_where(Expr::col("project").eq(project.as_str()))
            .order_by("spent_ms", Order::Desc)
            .order_by("id", Order::Asc)
            .limit(limit)
            .take();
        self.db
            .read(&query, |row| {
                Ok(LedgerLine {
                    id: row.text("id")?,
                    job: row.opt_text("job")?.map(JobId::new),
                    task: row.opt_text("task")?.map(TaskId::new),
                    role: row.word("role")?,
                    model: row.text("model")?,
                    usage: Usage {
                        input_tokens: row.count("input_tokens")?,
                        output_tokens: row.count("output_tokens")?,
                        cost_usd: row.opt_double("cost_usd")?,
                    },
                    at: row.time("spent_ms")?,
                })
            })
            .await
    }
}
