//! Reading the record: what `/status`, `artel projects` and the conversation see. Also the port [`ports::Record`].

use std::collections::BTreeMap;

use async_trait::async_trait;
use jiff::Timestamp;
use ports::{
    Audience, Choice, DeploymentRecord, JobId, JobRecord, PersonId, ProjectId, ProjectRecord,
    PullRequestRecord, Record, Sha, Slug, StatusReport, TaskId, TaskRecord, WaitId, WaitKind,
    WaitRecord,
};
use sea_query::{Asterisk, Expr, ExprTrait as _, Func, LikeExpr, Order, Query, SelectStatement};

use crate::db::{insert_new, val};
use crate::projection::slug_candidates;
use crate::{Error, Result, Row, Store};

/// What the program shows of a project besides its [`ProjectRecord`].
#[derive(Clone, Debug, PartialEq)]
pub struct ProjectDetails {
    /// The record.
    pub record: ProjectRecord,
    /// Who founded it.
    pub owner: Option<PersonId>,
    /// What it is for.
    pub goal: String,
    /// Its port, while it has one.
    pub port: Option<u16>,
    /// The first thing known of it.
    pub founded_at: Timestamp,
}

/// A wait with everything that is needed to show it and to answer it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WaitRow {
    /// Its opaque id.
    pub id: WaitId,
    /// The project.
    pub project: ProjectId,
    /// The job, when one asks.
    pub job: Option<JobId>,
    /// The task, when one asks.
    pub task: Option<TaskId>,
    /// What kind of decision.
    pub kind: WaitKind,
    /// The question, as Markdown.
    pub question: String,
    /// What can be chosen.
    pub options: Vec<Choice>,
    /// Whether a free text is an answer too.
    pub free_text: bool,
    /// Who is asked.
    pub audience: Audience,
    /// The thread that waits.
    pub thread: String,
    /// The interrupt in it.
    pub interrupt: String,
    /// Whether it waits still.
    pub open: bool,
    /// What was chosen or typed.
    pub answer: Option<String>,
    /// Who answered.
    pub answered_by: Option<String>,
    /// When it was asked.
    pub opened_at: Timestamp,
}

impl WaitRow {
    pub(crate) fn read(row: &Row) -> Result<Self> {
        Ok(Self {
            id: WaitId::new(row.text("id")?),
            project: ProjectId::new(row.text("project")?),
            job: row.opt_text("job")?.map(JobId::new),
            task: row.opt_text("task")?.map(TaskId::new),
            kind: row.word("kind")?,
            question: row.text("question")?,
            options: row.json("options")?,
            free_text: row.flag("free_text")?,
            audience: row.word("audience")?,
            thread: row.text("thread")?,
            interrupt: row.text("interrupt")?,
            open: row.text("status")? == "open",
            answer: row.opt_text("answer")?,
            answered_by: row.opt_text("answered_by")?,
            opened_at: row.time("opened_ms")?,
        })
    }

    /// The wait as `status` shows it.
    pub fn to_record(&self) -> WaitRecord {
        WaitRecord {
            id: self.id.to_string(),
            kind: crate::db::word(&self.kind),
            question: self.question.clone(),
            options: self.options.iter().map(|o| o.value.clone()).collect(),
        }
    }
}

/// Something that was said in the conversation of a project.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessageRow {
    /// Its place; grows.
    pub seq: i64,
    /// `message` and `answer` of people; `reply`, `news`, `result` and `question` of the crew.
    pub kind: String,
    /// Who said it; `None`: the crew.
    pub author: Option<String>,
    /// The text, as Markdown.
    pub text: String,
    /// When.
    pub at: Timestamp,
}

/// Why a project was not found by what somebody typed.
#[derive(Debug, thiserror::Error)]
pub enum FindProject {
    /// None fits.
    #[error("there is no project {0:?}; `artel projects` lists them")]
    Unknown(String),
    /// More than one begins so.
    #[error("{wanted:?} fits more than one project: {}; write more of the name", fits.join(", "))]
    Ambiguous {
        /// What was typed.
        wanted: String,
        /// The slugs that fit, at most 10.
        fits: Vec<String>,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] Error),
}

fn projects() -> SelectStatement {
    Query::select().column(Asterisk).from("projects").take()
}

fn waits() -> SelectStatement {
    Query::select()
        .column(Asterisk)
        .from("waits")
        .order_by("seq", Order::Asc)
        .take()
}

fn of(project: &ProjectId) -> Expr {
    Expr::col("project").eq(project.as_str())
}

/// A `LIKE` pattern for everything that begins with a text.
pub(crate) fn beginning_with(text: &str) -> LikeExpr {
    let mut pattern = String::with_capacity(text.len() + 1);
    for c in text.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('%');
    LikeExpr::new(pattern).escape('\\')
}

/// Money and tokens of one line of a grouped query over the ledger.
pub(crate) fn sums(query: &mut SelectStatement) -> &mut SelectStatement {
    let tokens = Expr::col("input_tokens").add(Expr::col("output_tokens"));
    query
        .expr_as(Func::sum(Expr::col("cost_usd")), "cost_usd")
        .expr_as(
            Func::cast_as(
                Func::coalesce([Func::sum(tokens).into(), Expr::val(0_i64)]),
                "BIGINT",
            ),
            "tokens",
        )
        .from("ledger")
}

impl Store {
    async fn with_sums(&self, row: &Row) -> Result<ProjectRecord> {
        let id = ProjectId::new(row.text("id")?);
        let (cost_usd, tokens) = self.spent_by(&id, None).await?;
        Ok(ProjectRecord {
            slug: row.text("slug")?,
            name: row.text("name")?,
            status: row.text("status")?,
            url: row.opt_text("url")?,
            repository: row.opt_text("repository")?,
            cost_usd,
            tokens,
            id,
        })
    }

    async fn spent_by(
        &self,
        project: &ProjectId,
        job: Option<&JobId>,
    ) -> Result<(Option<f64>, u64)> {
        let mut query = SelectStatement::new();
        sums(&mut query).and_where(of(project));
        if let Some(job) = job {
            query.and_where(Expr::col("job").eq(job.as_str()));
        }
        match self.db.fetch_optional(&query).await? {
            Some(row) => Ok((row.opt_double("cost_usd")?, row.count("tokens")?)),
            None => Ok((None, 0)),
        }
    }

    /// Every project, the one that changed last first.
    pub async fn projects(&self) -> Result<Vec<ProjectRecord>> {
        let query = projects()
            .order_by("changed_ms", Order::Desc)
            .order_by("id", Order::Asc)
            .take();
        let mut totals = BTreeMap::new();
        let mut per_project = SelectStatement::new();
        per_project.column("project");
        sums(&mut per_project).group_by_col("project");
        for row in self.db.fetch_all(&per_project).await? {
            totals.insert(
                row.text("project")?,
                (row.opt_double("cost_usd")?, row.count("tokens")?),
            );
        }
        self.db
            .read(&query, |row| {
                let id = row.text("id")?;
                let (cost_usd, tokens) = totals.get(&id).copied().unwrap_or((None, 0));
                Ok(ProjectRecord {
                    id: ProjectId::new(id),
                    slug: row.text("slug")?,
                    name: row.text("name")?,
                    status: row.text("status")?,
                    url: row.opt_text("url")?,
                    repository: row.opt_text("repository")?,
                    cost_usd,
                    tokens,
                })
            })
            .await
    }

    /// A project by its id.
    pub async fn project(&self, id: &ProjectId) -> Result<Option<ProjectDetails>> {
        let query = projects().and_where(Expr::col("id").eq(id.as_str())).take();
        match self.db.fetch_optional(&query).await? {
            Some(row) => Ok(Some(self.details(&row).await?)),
            None => Ok(None),
        }
    }

    async fn details(&self, row: &Row) -> Result<ProjectDetails> {
        Ok(ProjectDetails {
            record: self.with_sums(row).await?,
            owner: row.opt_text("owner")?.map(PersonId::new),
            goal: row.text("goal")?,
            port: row.opt_int("port")?.and_then(|p| u16::try_from(p).ok()),
            founded_at: row.time("founded_ms")?,
        })
    }

    /// The project that somebody means: its id, its slug, or what only one id or slug begins with.
    pub async fn find_project(&self, wanted: &str) -> Result<ProjectDetails, FindProject> {
        let wanted = wanted.trim();
        for column in ["id", "slug"] {
            let query = projects().and_where(Expr::col(column).eq(wanted)).take();
            if let Some(row) = self.db.fetch_optional(&query).await? {
                return Ok(self.details(&row).await?);
            }
        }
        let unknown = || FindProject::Unknown(wanted.chars().take(60).collect());
        if wanted.is_empty() {
            return Err(unknown());
        }
        let query = projects()
            .and_where(
                Expr::col("id")
                    .like(beginning_with(wanted))
                    .or(Expr::col("slug").like(beginning_with(wanted))),
            )
            .order_by("slug", Order::Asc)
            .limit(10)
            .take();
        let rows = self.db.fetch_all(&query).await?;
        match rows.as_slice() {
            [] => Err(unknown()),
            [row] => Ok(self.details(row).await?),
            rows => Err(FindProject::Ambiguous {
                wanted: wanted.to_owned(),
                fits: rows
                    .iter()
                    .map(|row| row.text("slug"))
                    .collect::<Result<_>>()?,
            }),
        }
    }

    /// The waits that are open, of one project or of all, oldest first.
    pub async fn open_waits(&self, project: Option<&ProjectId>) -> Result<Vec<WaitRow>> {
        let query = waits()
            .and_where(Expr::col("status").eq("open"))
            .and_where_option(project.map(of))
            .take();
        self.db.read(&query, WaitRow::read).await
    }

    /// A wait by its opaque id, open or closed.
    pub async fn wait(&self, id: &WaitId) -> Result<Option<WaitRow>> {
        let query = waits().and_where(Expr::col("id").eq(id.as_str())).take();
        self.db
            .fetch_optional(&query)
            .await?
            .as_ref()
            .map(WaitRow::read)
            .transpose()
    }

    /// The project's releases, newest first.
    pub async fn deployments(&self, project: &ProjectId) -> Result<Vec<DeploymentRecord>> {
        let query = Query::select()
            .column(Asterisk)
            .from("deployments")
            .and_where(of(project))
            .order_by("release", Order::Desc)
            .take();
        self.db
            .read(&query, |row| {
                Ok(DeploymentRecord {
                    release: row.count("release")?,
                    sha: Sha::new(row.text("sha")?),
                    status: row.text("status")?,
                    url: row.text("url")?,
                    at: row.time("deployed_ms")?,
                })
            })
            .await
    }

    /// The last things that were said about a project, at most `limit`, oldest first.
    pub async fn messages(&self, project: &ProjectId, limit: u64) -> Result<Vec<MessageRow>> {
        let query = Query::select()
            .column(Asterisk)
            .from("messages")
            .and_where(of(project))
            .order_by("seq", Order::Desc)
            .limit(limit)
            .take();
        let mut messages = self
            .db
            .fetch_all(&query)
            .await?
            .iter()
            .map(|row| {
                Ok(MessageRow {
                    seq: row.int("seq")?,
                    kind: row.text("kind")?,
                    author: row.opt_text("author")?,
                    text: row.text("body")?,
                    at: row.time("said_ms")?,
                })
            })
            .collect::<Result<Vec<_>>>()?;
        messages.reverse();
        Ok(messages)
    }

    /// The running job, or else the last one.
    pub async fn current_job(&self, project: &ProjectId) -> Result<Option<JobRecord>> {
        let running = Expr::case(Expr::col("phase").eq("running"), 0_i64).finally(1_i64);
        let query = Query::select()
            .columns(["id", "status", "node"])
            .from("jobs")
            .and_where(of(project))
            .order_by_expr(running.into(), Order::Asc)
            .order_by("seq", Order::Desc)
            .limit(1)
            .take();
        let row = self.db.fetch_optional(&query).await?;
        row.map(|row| {
            Ok(JobRecord {
                id: JobId::new(row.text("id")?),
                status: row.text("status")?,
                node: row.opt_text("node")?,
            })
        })
        .transpose()
    }

    /// The tasks of a job, in the plan's order.
    pub async fn tasks(&self, project: &ProjectId, job: &JobId) -> Result<Vec<TaskRecord>> {
        let of_job = || of(project).and(Expr::col("job").eq(job.as_str()));
        let mut pull_requests = BTreeMap::new();
        let query = Query::select()
            .column(Asterisk)
            .from("pull_requests")
            .and_where(of_job())
            .order_by("number", Order::Asc)
            .take();
        for row in self.db.fetch_all(&query).await? {
            // The newest one of a task stands.
            pull_requests.insert(
                row.text("task")?,
                PullRequestRecord {
                    number: row.count("number")?,
                    status: row.text("status")?,
                    url: row.text("url")?,
                },
            );
        }
        let mut costs = BTreeMap::new();
        let mut query = SelectStatement::new();
        query.column("task");
        sums(&mut query)
            .and_where(of_job())
            .and_where(Expr::col("task").is_not_null())
            .group_by_col("task");
        for row in self.db.fetch_all(&query).await? {
            costs.insert(row.text("task")?, row.opt_double("cost_usd")?);
        }
        let query = Query::select()
            .column(Asterisk)
            .from("tasks")
            .and_where(of_job())
            .order_by("position", Order::Asc)
            .order_by("id", Order::Asc)
            .take();
        let mut workers = self.workers_of(project, job).await?;
        self.db
            .fetch_all(&query)
            .await?
            .iter()
            .map(|row| {
                let id = row.text("id")?;
                let small =
                    |column| Ok::<_, Error>(u32::try_from(row.count(column)?).unwrap_or(u32::MAX));
                Ok(TaskRecord {
                    title: row.text("title")?,
                    status: row.text("status")?,
                    attempts: small("attempts")?,
                    review_rounds: small("review_rounds")?,
                    pull_request: pull_requests.remove(&id),
                    depends_on: row.json("depends_on")?,
                    cost_usd: costs.get(&id).copied().flatten(),
                    worker: row
                        .opt_text("request")?
                        .and_then(|request| workers.remove(&request)),
                    id: TaskId::new(id),
                })
            })
            .collect()
    }

    /// Everything that is known of a project: what `artel status PROJECT --json` prints.
    pub async fn status_report(&self, project: &ProjectId) -> Result<Option<StatusReport>> {
        let Some(details) = self.project(project).await? else {
            return Ok(None);
        };
        let job = self.current_job(project).await?;
        let tasks = match &job {
            Some(job) => self.tasks(project, &job.id).await?,
            None => Vec::new(),
        };
        let waits = self.open_waits(Some(project)).await?;
        Ok(Some(StatusReport {
            project: details.record,
            job,
            tasks,
            waits: waits.iter().map(WaitRow::to_record).collect(),
            deployments: self.deployments(project).await?,
        }))
    }

    /// A slug that is this project's from now on, because it is reserved where only one can have it.
    pub async fn reserve_slug(&self, project: &ProjectId, wanted: &Slug) -> Result<Slug> {
        let mut tx = self.db.begin().await?;
        for candidate in slug_candidates(wanted.as_str()) {
            let taken = Query::select()
                .column("id")
                .from("projects")
                .and_where(
                    Expr::col("slug")
                        .eq(candidate.as_str())
                        .or(Expr::col("id").eq(candidate.as_str())),
                )
                .and_where(Expr::col("id").ne(project.as_str()))
                .limit(1)
                .take();
            let reserved = Query::select()
                .column("project")
                .from("allocations")
                .and_where(Expr::col("kind").eq("slug"))
                .and_where(Expr::col("value").eq(candidate.as_str()))
                .and_where(Expr::col("project").ne(project.as_str()))
                .take();
            if tx.fetch_optional(&taken).await?.is_some()
                || tx.fetch_optional(&reserved).await?.is_some()
            {
                continue;
            }
            let Ok(slug) = Slug::parse(&candidate) else {
                continue;
            };
            let earlier = Query::delete()
                .from_table("allocations")
                .and_where(Expr::col("kind").eq("slug"))
                .and_where(of(project))
                .take();
            tx.execute(&earlier).await?;
            let now = tx.now_ms();
            let columns = vec![
                ("kind", val("slug")),
                ("value", val(candidate.as_str())),
                ("project", val(project.as_str())),
                ("allocated_ms", now),
            ];
            if tx.execute(&insert_new("allocations", columns)).await? == 1 {
                tx.commit().await?;
                return Ok(slug);
            }
        }
        Err(Error::NoSlug(wanted.to_string()))
    }
}

#[async_trait]
impl Record for Store {
    async fn status(&self, project: &ProjectId) -> ports::Result<Option<StatusReport>> {
        Ok(self.status_report(project).await?)
    }

    async fn free_slug(&self, project: &ProjectId, wanted: &Slug) -> ports::Result<Slug> {
        Ok(self.reserve_slug(project, wanted).await?)
    }
}
