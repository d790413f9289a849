//! What workers cost, where their spawner is another process. A spawner has no database: its broker counts what a job uses up,
//! holds it to the job's own limits, and says so, in events while it runs and in the result. From that the crew writes the
//! ledger here, as lines `{request}#{n}` that add up to what was said last. On the in-process transport the spawner's models
//! write to the ledger themselves, call by call; nothing is booked here then.

use std::sync::Arc;

use async_trait::async_trait;
use models::BudgetLimits;
use ports::{JobId, Ledger, ProjectId, RequestId, Role, Spend, Spent, TaskId, Usage};
use protocol::SpawnRequest;
use store::Store;

use crate::books::Books;

/// How often it is tried to bring a request's lines up to what it used: each try fails only when another process has
/// written a line meanwhile.
const TRIES: u32 = 8;
/// Differences below this many dollars are noise of the arithmetic.
const NOISE_USD: f64 = 1e-9;

/// The ledger of a process without a database: knows of nothing that was spent, and leaves the books to the crew.
pub struct Elsewhere;

#[async_trait]
impl Ledger for Elsewhere {
    async fn spent(&self, _: &ProjectId) -> ports::Result<Spent> {
        Ok(Spent::default())
    }

    async fn record(&self, _: &Spend) -> ports::Result<()> {
        Ok(())
    }
}

/// No limit of projects: a spawner knows only that of a job.
pub const NO_BUDGET: BudgetLimits = BudgetLimits {
    cost_usd: None,
    tokens: None,
};

/// Where a request comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The project.
    pub project: ProjectId,
    /// The job.
    pub job: JobId,
    /// The task.
    pub task: TaskId,
}

impl Origin {
    /// The task that a request works for; `None` when the request is not the crew's.
    pub fn of(request: &RequestId) -> Option<Self> {
        let thread = nodes::thread_of_request(request)?;
        let mut parts = thread.splitn(3, '/');
        Some(Self {
            project: ProjectId::new(parts.next()?),
            job: JobId::new(parts.next()?),
            task: TaskId::new(parts.next()?),
        })
    }
}

/// Books what workers cost, and bounds what they may.
#[derive(Clone)]
pub struct Tally {
    books: Books,
    store: Store,
    /// What the ledger calls the workers' model.
    model: Arc<str>,
    /// Whether its price is known.
    priced: bool,
    budget: BudgetLimits,
}

impl Tally {
    /// Books into `books`, under the name of the model that workers are given here.
    pub fn new(
        books: Books,
        store: Store,
        model: &str,
        priced: bool,
        budget: BudgetLimits,
    ) -> Self {
        Self {
            books,
            store,
            model: model.into(),
            priced,
            budget,
        }
    }

    /// A request with limits that are within what is left of its project's budget. Workers that run beside each other may
    /// pass it together, until they are stopped (see [`crate::watch`]).
    pub async fn bounded(&self, request: &SpawnRequest) -> ports::Result<SpawnRequest> {
        let spent = self
            .books
            .spent(&ProjectId::new(request.project_id.as_str()))
            .await?;
        let mut request = request.clone();
        let limits = &mut request.limits;
        match self.left(&spent) {
            Left::Usd(left) => {
                limits.cost_usd = Some(limits.cost_usd.map_or(left, |limit| limit.min(left)));
            }
            Left::Tokens(left) => {
                limits.tokens = Some(limits.tokens.map_or(left, |limit| limit.min(left)));
            }
            Left::Everything => {}
        }
        Ok(request)
    }

    /// Whether a project has used up its budget.
    pub async fn is_used_up(&self, project: &ProjectId) -> ports::Result<bool> {
        let spent = self.books.spent(project).await?;
        Ok(match self.left(&spent) {
            Left::Usd(left) => left <= 0.0,
            Left::Tokens(left) => left == 0,
            Left::Everything => false,
        })
    }

    /// What is left, in what the workers' model is held to.
    fn left(&self, spent: &Spent) -> Left {
        let usd = spent.limit_usd.or(self.budget.cost_usd);
        let tokens = spent.limit_tokens.or(self.budget.tokens);
        match (usd, tokens) {
            (Some(limit), _) if self.priced => Left::Usd((limit - spent.cost_usd).max(0.0)),
            (_, Some(limit)) => Left::Tokens(limit.saturating_sub(spent.tokens)),
            _ => Left::Everything,
        }
    }

    /// Brings what the ledger has of a request up to what it has used, which only grows. Saying the same twice, or something
    /// older, changes nothing, whoever says it. Gives whether anything was written.
    pub async fn book(&self, request: &str, used: &protocol::Usage) -> anyhow::Result<bool> {
        let Some(Origin { project, job, task }) = Origin::of(&RequestId::new(request)) else {
            return Ok(false);
        };
        let prefix = format!("{request}#");
        let mut wrote = false;
        for _ in 0..TRIES {
            // The ledger is a projection: what was written a moment ago must count.
            self.books.catch_up().await?;
            let (lines, booked) = self.store.booked(&project, &job, &task, &prefix).await?;
            let Some(usage) = rest(used, &booked) else {
                return Ok(wrote);
            };
            // Whoever else has seen as many lines writes under the same id, and one of us is heard.
            let spend = Spend {
                id: format!("{prefix}{}", lines + 1),
                project: project.clone(),
                job: Some(job.clone()),
                task: Some(task.clone()),
                role: Role::Developer,
                model: self.model.to_string(),
                usage,
            };
            self.books.record(&spend).await?;
            wrote = true;
        }
        anyhow::bail!("what worker {request} used was not booked in {TRIES} tries");
    }
}

/// What is left of a budget.
enum Left {
    Usd(f64),
    Tokens(u64),
    /// There is no limit.
    Everything,
}

/// What was used beyond what is booked; `None` when that is nothing.
fn rest(used: &protocol::Usage, booked: &Usage) -> Option<Usage> {
    let cost_usd = used
        .cost_usd
        .map(|cost| cost - booked.cost_usd.unwrap_or(0.0));
    let rest = Usage {
        input_tokens: used.input_tokens.saturating_sub(booked.input_tokens),
        output_tokens: used.output_tokens.saturating_sub(booked.output_tokens),
        cost_usd: cost_usd.map(|cost| cost.max(0.0)),
    };
    let costs = rest.cost_usd.is_some_and(|cost| cost > NOISE_USD);
    (rest.input_tokens > 0 || rest.output_tokens > 0 || costs).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(input_tokens: u64, output_tokens: u64, cost_usd: Option<f64>) -> protocol::Usage {
        protocol::Usage {
            input_tokens,
            output_tokens,
            cost_usd,
            ..protocol::Usage::default()
        }
    }

    #[test]
    fn only_what_is_new_is_booked() {
        let nothing = Usage::default();
        let first = rest(&used(10, 2, Some(0.3)), &nothing).unwrap();
        assert_eq!((first.input_tokens, first.output_tokens), (10, 2));
        assert_eq!(rest(&used(10, 2, Some(0.3)), &first), None);
        assert_eq!(rest(&used(4, 1, None), &first), None, "something older");
        let second = rest(&used(15, 2, Some(0.4)), &first).unwrap();
        assert_eq!((second.input_tokens, second.output_tokens), (5, 0));
        assert!((second.cost_usd.unwrap() - 0.1).abs() < 1e-9);
        assert_eq!(rest(&used(0, 0, None), &nothing), None);
    }

    #[test]
    fn a_request_says_where_it_comes_from() {
        let origin = Origin::of(&RequestId::new("p1.job-1.storage.2.3")).unwrap();
        assert_eq!(origin.project.as_str(), "p1");
        assert_eq!(origin.job.as_str(), "job-1");
        assert_eq!(origin.task.as_str(), "storage.2");
        assert_eq!(Origin::of(&RequestId::new("strange")), None);
    }
}
