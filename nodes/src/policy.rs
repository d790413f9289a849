//! What the crew may do, and how often: every cap in one place. A job keeps the policy that it was started with.

use protocol::Limits;
use serde::{Deserialize, Serialize};

/// Caps, approvals and limits. Stored with every job and task, so that a change of the configuration changes new jobs only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// Whether a person must approve a specification or a change. `yes` of a message approves it beforehand.
    pub approve_spec: bool,
    /// Whether a person must approve every deploy. `yes` approves it beforehand. Off for the machine at hand.
    pub approve_deploy: bool,
    /// Rounds of clarifying questions before a proposal must be made with stated assumptions.
    pub max_clarify_rounds: u32,
    /// Approved changes that may wait for the running job.
    pub max_queued_changes: usize,
    /// How often a bad plan goes back to the architect before a person is asked.
    pub max_plan_returns: u32,
    /// Tasks that may run at the same time.
    pub max_parallel_tasks: usize,
    /// Workers that a task may use up in one round of work before a person is asked.
    pub max_attempts: u32,
    /// How often the same failure may happen to a task in one round of work.
    pub max_same_failure: u32,
    /// Reviews and failed checks that send a task back before a person is asked.
    pub max_review_rounds: u32,
    /// How often a task's branch is moved because others were merged first.
    pub max_rebases: u32,
    /// How often a release that failed is repaired by a task of its own before a person is asked.
    pub max_repairs: u32,
    /// How often another port is tried when the allocated one turns out to be taken.
    pub max_port_changes: u32,
    /// Which agent does the work of a developer.
    pub agent: protocol::Agent,
    /// What one attempt of a worker may use up.
    pub limits: Limits,
    /// Hosts that workers may reach, as `host`, `*.host`, `host:port`.
    pub network_allow: Vec<String>,
    /// Whether workers get Docker inside.
    pub docker: bool,
    /// How much longer than its wall-clock limit a worker's result is waited for, in seconds: queueing, clone and push.
    pub worker_margin_s: u64,
    /// How long one run of a repository's checks may take, in seconds; then it is ended, and counts as not passed. It goes
    /// for all jobs at once, with the next start of the program.
    pub checks_wall_s: u64,
    /// How long a new release may take until it answers its health check, in seconds. It goes for all jobs at once, with the
    /// next start of the program.
    pub service_ready_s: u64,
    /// How long the outcome of checks is waited for, in seconds.
    pub checks_wait_s: u64,
    /// How long the outcome of a deploy is waited for, in seconds.
    pub deploy_wait_s: u64,
    /// By how many US dollars over what is spent a raise lifts the budget.
    pub budget_raise_usd: f64,
    /// By how many tokens over what is spent a raise lifts the budget.
    pub budget_raise_tokens: u64,
    /// How much of a diff a reviewer reads, in bytes.
    pub diff_bytes: usize,
    /// How much of a repository an architect reads, in bytes.
    pub reading_bytes: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            approve_spec: true,
            approve_deploy: false,
            max_clarify_rounds: 3,
            max_queued_changes: 20,
            max_plan_returns: 3,
            max_parallel_tasks: 4,
            max_attempts: 3,
            max_same_failure: 2,
            max_review_rounds: 3,
            max_rebases: 5,
            max_repairs: 1,
            max_port_changes: 3,
            agent: protocol::Agent {
                adapter: "artel-agent".to_owned(),
                command: Vec::new(),
                model: None,
            },
            limits: Limits::default(),
            network_allow: Vec::new(),
            docker: false,
            worker_margin_s: 1800,
            checks_wall_s: 300,
            service_ready_s: 60,
            checks_wait_s: 1800,
            deploy_wait_s: 1800,
            budget_raise_usd: 5.0,
            budget_raise_tokens: 2_000_000,
            diff_bytes: 120 * 1024,
            reading_bytes: 60 * 1024,
        }
    }
}
