//! The budget of a project: what a call may cost at most is set aside before it is sent, so that calls in parallel, the
//! crew's and all workers', cannot pass the limit together.
//!
//! What is spent stands in the ledger and is read again for every reservation, because owners raise limits and another
//! process may spend too. What is set aside is known to this process only: two processes that work for one project at the
//! same moment see each other's calls once they have ended.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use ports::{LEAST_OUTPUT, Ledger, ModelError, ProjectId, Spend, Spent, fair_output};
use tracing::warn;

use crate::config::{BudgetLimits, Price};

/// How often a line is written to a ledger that fails before the call itself fails.
const RECORD_TRIES: u32 = 4;

/// What a call takes at most.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// Tokens read and written.
    pub tokens: u64,
    /// US dollars; `None` when no price is known.
    pub cost_usd: Option<f64>,
}

/// A question whose answer may be bounded to what is left.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question {
    /// Tokens read.
    pub input: u64,
    /// The most output tokens that are of use.
    pub want: u64,
    pub price: Option<Price>,
}

impl Question {
    /// What it takes at most with an answer of so many tokens.
    fn with(&self, output: u64) -> Estimate {
        Estimate {
            tokens: self.input.saturating_add(output),
            cost_usd: self.price.map(|price| price.cost_usd(self.input, output)),
        }
    }
}

/// The budgets of all projects of this process: cheap to clone, one for everything that spends.
#[derive(Clone)]
pub struct Budgets {
    shared: Arc<Shared>,
}

struct Shared {
    ledger: Arc<dyn Ledger>,
    defaults: BudgetLimits,
    projects: Mutex<HashMap<ProjectId, Arc<Project>>>,
}

#[derive(Default)]
struct Project {
    /// Held while the ledger is read or written, so that what is spent and what is set aside are seen together.
    gate: tokio::sync::Mutex<()>,
    aside: Mutex<Aside>,
}

#[derive(Clone, Copy, Default)]
struct Aside {
    tokens: u64,
    cost_usd: f64,
}

impl Budgets {
    /// Budgets over a ledger, with the limits of projects whose owners set none.
    pub fn new(ledger: Arc<dyn Ledger>, defaults: BudgetLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                ledger,
                defaults,
                projects: Mutex::default(),
            }),
        }
    }

    /// Sets the estimate aside, or refuses.
    pub async fn reserve(
        &self,
        project: &ProjectId,
        estimate: Estimate,
    ) -> Result<Reservation, ModelError> {
        let reserved = self.set_aside(project, |_, _| (estimate, ())).await?;
        Ok(reserved.0)
    }

    /// Sets aside what the question takes, with an answer as long as it wants to be, or as there is room for; says how long
    /// that is ([`fair_output`]).
    pub(crate) async fn reserve_up_to(
        &self,
        project: &ProjectId,
        question: Question,
    ) -> Result<(Reservation, u64), ModelError> {
        let least = question.want.min(LEAST_OUTPUT);
        self.set_aside(project, |spent, aside| {
            let room = self.room(spent, aside, &question);
            let output = fair_output(question.want, room).max(least);
            (question.with(output), output)
        })
        .await
    }

    /// Sets aside what `take` makes of what is spent and of what is set aside already, or refuses that; one at a time for each
    /// project.
    async fn set_aside<T>(
        &self,
        project: &ProjectId,
        take: impl FnOnce(&Spent, Aside) -> (Estimate, T),
    ) -> Result<(Reservation, T), ModelError> {
        let entry = self.project(project);
        let _gate = entry.gate.lock().await;
        let spent = self
            .shared
            .ledger
            .spent(project)
            .await
            .map_err(|source| ModelError::Ledger { source })?;
        let (estimate, taken) = {
            let mut aside = lock(&entry.aside);
            let (estimate, taken) = take(&spent, *aside);
            self.check(project, &spent, *aside, estimate)?;
            aside.tokens += estimate.tokens;
            aside.cost_usd += estimate.cost_usd.unwrap_or(0.0);
            (estimate, taken)
        };
        let reservation = Reservation {
            budgets: self.clone(),
            project: entry.clone(),
            estimate,
            open: true,
            at_risk: None,
            dropped: false,
        };
        Ok((reservation, taken))
    }

    /// How many output tokens there is room for.
    fn room(&self, spent: &Spent, aside: Aside, question: &Question) -> u64 {
        let limit_usd = spent.limit_usd.or(self.shared.defaults.cost_usd);
        let limit_tokens = spent.limit_tokens.or(self.shared.defaults.tokens);
        match (question.price, limit_usd, limit_tokens) {
            (Some(price), Some(limit), _) => {
                let left = limit - spent.cost_usd - aside.cost_usd;
                price.affordable_output(left - price.cost_usd(question.input, 0))
            }
            (_, _, Some(limit)) => limit
                .saturating_sub(spent.tokens)
                .saturating_sub(aside.tokens)
                .saturating_sub(question.input),
            _ => u64::MAX,
        }
    }

    fn check(
        &self,
        project: &ProjectId,
        spent: &Spent,
        aside: Aside,
        estimate: Estimate,
    ) -> Result<(), ModelError> {
        let limit_usd = spent.limit_usd.or(self.shared.defaults.cost_usd);
        let limit_tokens = spent.limit_tokens.or(self.shared.defaults.tokens);
        let refuse = |spent: String, limit: String| {
            Err(ModelError::Budget {
                project: project.clone(),
                spent,
                limit,
            })
        };
        match (estimate.cost_usd, limit_usd, limit_tokens) {
            (Some(cost), Some(limit), _) => {
                let taken = spent.cost_usd + aside.cost_usd;
                // A millionth of a dollar is below the resolution of what is summed up.
                if taken + cost > limit + 1e-6 {
                    return refuse(format!("{taken:.2} USD"), format!("{limit:.2} USD"));
                }
            }
            (_, _, Some(limit)) => {
                let taken = spent.tokens.saturating_add(aside.tokens);
                if taken.saturating_add(estimate.tokens) > limit {
                    return refuse(format!("{taken} tokens"), format!("{limit} tokens"));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn project(&self, project: &ProjectId) -> Arc<Project> {
        lock(&self.shared.projects)
            .entry(project.clone())
            .or_default()
            .clone()
    }

    async fn record(&self, spend: &Spend) -> Result<(), ModelError> {
        let mut tried = 0;
        loop {
            match self.shared.ledger.record(spend).await {
                Ok(()) => return Ok(()),
                Err(source) => {
                    tried += 1;
                    if tried >= RECORD_TRIES {
                        return Err(ModelError::Ledger { source });
                    }
                    warn!(project = %spend.project, error = %source, "a line of the ledger could not be written; trying again");
                    tokio::time::sleep(Duration::from_millis(50) * tried).await;
                }
            }
        }
    }
}

/// What is set aside for one call. Dropping it gives it back; what the call may have cost by then is still counted.
pub struct Reservation {
    budgets: Budgets,
    project: Arc<Project>,
    estimate: Estimate,
    open: bool,
    at_risk: Option<Spend>,
    /// Whether a drop has already started a task that counts; a second one would not fare better.
    dropped: bool,
}

impl Reservation {
    /// Notes what the call has taken so far, to be counted if it comes to no answer or is dropped.
    pub fn at_risk(&mut self, spend: Spend) {
        self.at_risk = Some(spend);
    }

    /// What was noted as taken so far.
    pub fn risked(&mut self) -> Option<&mut Spend> {
        self.at_risk.as_mut()
    }

    /// Counts what the call took and gives the rest back. When the ledger cannot be written the reservation stays, so that
    /// the budget holds.
    pub async fn settle(mut self, spend: &Spend) -> Result<(), ModelError> {
        // Should this be dropped while it waits, the line is written all the same.
        self.at_risk = Some(spend.clone());
        let project = self.project.clone();
        let _gate = project.gate.lock().await;
        let recorded = self.budgets.record(spend).await;
        self.at_risk = None;
        if recorded.is_ok() {
            self.give_back();
        } else {
            self.open = false;
        }
        recorded
    }

    /// Counts what a call without an answer took, if it took anything.
    pub async fn settle_lost(mut self) -> Result<(), ModelError> {
        match self.at_risk.take() {
            Some(spend) => self.settle(&spend).await,
            None => Ok(()),
        }
    }

    fn give_back(&mut self) {
        if std::mem::take(&mut self.open) {
            let mut aside = lock(&self.project.aside);
            aside.tokens = aside.tokens.saturating_sub(self.estimate.tokens);
            aside.cost_usd = (aside.cost_usd - self.estimate.cost_usd.unwrap_or(0.0)).max(0.0);
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(spend) = self.at_risk.take().filter(|_| self.open && !self.dropped) else {
            self.give_back();
            return;
        };
        // The call was cancelled midway: what it took is counted by a task of its own.
        self.open = false;
        let rest = Self {
            budgets: self.budgets.clone(),
            project: self.project.clone(),
            estimate: self.estimate,
            open: true,
            at_risk: None,
            dropped: true,
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                runtime.spawn(async move {
                    if let Err(error) = rest.settle(&spend).await {
                        warn!(project = %spend.project, %error, "what a cancelled call took is not in the ledger");
                    }
                });
            }
            Err(_) => drop(rest),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
