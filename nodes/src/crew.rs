//! The crew: the ports and the policy that its nodes work with.

use std::sync::Arc;

use ports::{Allocations, Errands, Forge, Ledger, Models, Record, Vault, Workers};

use crate::Policy;

/// Gives the W3C `traceparent` of the current span, if there is one.
pub type Traceparent = Arc<dyn Fn() -> Option<String> + Send + Sync>;

/// Everything outside of the crew, and what the crew may do. Cheap to clone.
#[derive(Clone)]
pub struct Crew {
    /// Language models.
    pub models: Arc<dyn Models>,
    /// Code hosting.
    pub forge: Arc<dyn Forge>,
    /// Coding workers.
    pub workers: Arc<dyn Workers>,
    /// Secrets as handles.
    pub vault: Arc<dyn Vault>,
    /// Ports and whatever else only one project can have.
    pub allocations: Arc<dyn Allocations>,
    /// Work of minutes, done outside of any run.
    pub errands: Arc<dyn Errands>,
    /// What is known of a project.
    pub record: Arc<dyn Record>,
    /// What was spent, and what may be.
    pub ledger: Arc<dyn Ledger>,
    /// Caps and approvals of new jobs.
    pub policy: Policy,
    /// Where the trace context of a worker's request comes from.
    pub traceparent: Traceparent,
}

impl Crew {
    /// How a run from a tape is named wherever it speaks, such as `from the demo tape`.
    pub(crate) fn tape_note(&self) -> Option<String> {
        self.models
            .tape()
            .map(|name| format!("from the {name} tape"))
    }
}
