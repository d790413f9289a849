//! Runs one task of a superstep: attempts, time limits, panics, cancellation.

use std::{panic::AssertUnwindSafe, sync::Arc, time::Duration};

use futures::FutureExt;
use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    builder::Node,
    checkpoint::{Commit, Write, WriteKind},
    command::Outcome,
    context::{Context, TaskContext},
    error::{NodeError, TaskFailure},
    follow::Modes,
    memo::{Attempts, Memo},
    observer::Point,
    options::RetryPolicy,
    state::State,
};

use super::{
    Broken, Place, RunShared,
    tell::{failed_item, started_item},
};

/// A retry after a longer time is a timer; after a shorter one, the run waits for it.
const HELD_RETRY: Duration = Duration::from_secs(2);

/// How a task left a run.
pub(super) enum TaskEnd<S: State> {
    Done(Outcome<S>),
    Suspended,
    RetryAt(jiff::Timestamp),
    Failed(Failure),
    Cancelled,
    /// The run is about to be handed to another process.
    Yielded,
    /// The run has lost its lease or its database.
    Lost,
}

/// A job that is over.
pub(super) struct Ended<S: State> {
    pub end: TaskEnd<S>,
    pub attempts: Attempts,
    /// The node that took over, after the one that was planned had failed for good.
    pub handler: Option<Handler<S>>,
}

/// A node that takes over from another.
pub(super) struct Handler<S: State> {
    pub node: Arc<Node<S>>,
    /// The task path under which it remembers.
    pub key: String,
    pub memo: Arc<Mutex<Memo>>,
    pub failure: Arc<TaskFailure>,
}

impl<S: State> Handler<S> {
    /// `failed` is the path of the task that has failed.
    pub fn new(node: Arc<Node<S>>, failed: &str, failure: TaskFailure) -> Self {
        Self {
            key: format!("{failed}~{}", node.name),
            node,
            memo: Arc::default(),
            failure: Arc::new(failure),
        }
    }
}

/// Why a task has failed for good.
pub(super) struct Failure {
    /// With the node's name.
    pub text: String,
    pub error: NodeError,
}

/// All that a task needs to run.
pub(super) struct Job<S: State> {
    pub run: Arc<RunShared>,
    /// The subgraph that it is part of.
    pub place: Option<Arc<Place>>,
    pub node: Arc<Node<S>>,
    pub state: Arc<S>,
    pub key: String,
    pub step: u64,
    pub argument: Option<serde_json::Value>,
    pub memo: Arc<Mutex<Memo>>,
    pub attempts: Attempts,
    /// The node that takes over when this one has failed for good.
    pub handler: Option<Arc<Node<S>>>,
    /// What went wrong, if the node has taken over.
    pub failure: Option<Arc<TaskFailure>>,
    pub alone: bool,
    pub may_wait: bool,
    /// Whether it runs only to get to the subgraphs inside that have to clean up.
    pub cleaning: bool,
    pub cancel: CancellationToken,
    /// How long it may go on after a cancellation.
    pub grace: Duration,
    /// A limit beside those of the node.
    pub bound: Option<Duration>,
}

impl<S: State> Job<S> {
    /// The tasks around it, from the outside in.
    fn namespace(&self) -> &[String] {
        self.place.as_ref().map_or(&[], |place| &place.namespace)
    }

    /// Runs the task until it is done, suspended, or has failed for now.
    pub async fn run(mut self) -> Ended<S> {
        let mut handler = None;
        loop {
            let attempt = self.attempts.made + 1;
            self.run.engine.observe(&Point::NodeStarted {
                thread: &self.run.thread,
                node: &self.node.name,
                attempt,
            });
            let span = tracing::info_span!(
                "node",
                thread = %self.run.thread,
                node = %self.node.name,
                step = self.step,
                attempt,
                branch = self.run.branch,
            );
            let result = self.attempt(attempt).instrument(span).await;
            let result = self.judge(result).map(|mut outcome| {
                outcome.kept.append(&mut self.memo.lock().kept);
                outcome
            });
            self.run.engine.observe(&Point::NodeFinished {
                thread: &self.run.thread,
                node: &self.node.name,
                attempt,
                result: match &result {
                    Ok(_) => "done",
                    Err(error) if error.is_suspended() => "suspended",
                    Err(error) if error.is_cancelled() => "cancelled",
                    Err(_) => "failed",
                },
            });
            let end = match result {
                Ok(outcome) => TaskEnd::Done(outcome),
                Err(error) if error.is_yielded() => TaskEnd::Yielded,
                Err(error) if error.is_suspended() => TaskEnd::Suspended,
                Err(error) if error.is_lost() => TaskEnd::Lost,
                Err(error) if error.is_cancelled() => TaskEnd::Cancelled,
                Err(error) if self.cleaning => {
                    tracing::error!(thread = %self.run.thread, node = %self.node.name, %error, "a subgraph could not clean up");
                    TaskEnd::Cancelled
                }
                Err(error) => match self.failed(attempt, error).await {
                    Some(TaskEnd::Failed(failure)) => match self.hand_over(&failure.error).await {
                        Ok(Some(taken)) => {
                            handler = Some(taken);
                            continue;
                        }
                        Ok(None) => TaskEnd::Failed(failure),
                        Err(Broken) => TaskEnd::Lost,
                    },
                    Some(end) => end,
                    None => continue,
                },
            };
            return Ended {
                end,
                attempts: self.attempts,
                handler,
            };
        }
    }

    async fn attempt(&self, attempt: u32) -> Result<Outcome<S>, NodeError> {
        self.memo.lock().rewind();
        let context = Context {
            inner: Arc::new(TaskContext {
                run: self.run.clone(),
                node: self.node.name.clone(),
                place: self.place.clone(),
                task: self.key.clone(),
                step: self.step,
                attempt,
                argument: self.argument.clone(),
                failure: self.failure.clone(),
                alone: self.alone,
                may_wait: self.may_wait,
                cleaning: self.cleaning,
                cancel: self.cancel.clone(),
                grace: self.grace,
                memo: self.memo.clone(),
                alive: Mutex::new(Instant::now()),
            }),
        };
        let node = &self.node;
        // A node may also panic while it makes its future.
        let future =
            AssertUnwindSafe(async { (node.run)(self.state.clone(), context.clone()).await })
                .catch_unwind();
        tokio::pin!(future);
        let total = [self.node.options.timeout, self.bound]
            .into_iter()
            .flatten()
            .min();
        let result = tokio::select! {
            result = &mut future => result,
            () = sleep_for(total) => {
                return Err(NodeError::msg(format!(
                    "node `{}` took longer than {:?}",
                    node.name,
                    total.unwrap_or_default()
                )));
            }
            () = went_idle(&context, self.node.options.idle_timeout) => {
                return Err(NodeError::msg(format!(
                    "node `{}` gave no sign of life for {:?}",
                    node.name,
                    self.node.options.idle_timeout.unwrap_or_default()
                )));
            }
            () = self.cancel.cancelled() => {
                match tokio::time::timeout(self.grace, &mut future).await {
                    Ok(result) => result,
                    Err(_) => return Err(NodeError::cancelled()),
                }
            }
        };
        result.unwrap_or_else(|panic| {
            let text = panic
                .downcast_ref::<&str>()
                .map(|text| (*text).to_owned())
                .or_else(|| panic.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "no message".to_owned());
            Err(NodeError::msg(format!(
                "node `{}` panicked: {text}",
                node.name
            )))
        })
    }

    /// A node must not swallow its suspension, nor go on without its run.
    fn judge(&self, result: Result<Outcome<S>, NodeError>) -> Result<Outcome<S>, NodeError> {
        if self.run.is_broken() {
            return Err(NodeError::lost());
        }
        let memo = self.memo.lock();
        if memo.waits.is_empty() {
            let result = result.or_else(|error| Outcome::handed_over(error.take_handover()?));
            return match result {
                Ok(outcome) => match outcome.fault() {
                    None => Ok(outcome),
                    Some(fault) => Err(NodeError::msg(format!(
                        "the command to the parent cannot be written as JSON: {fault}"
                    ))
                    .fatal()),
                },
                Err(error) if error.is_yielded() => Err(error),
                Err(error) if error.is_suspended() => Err(NodeError::msg(format!(
                    "node `{}` returned a suspension that is not its own",
                    self.node.name
                ))
                .fatal()),
                // What goes wrong while a thread is being cancelled is a consequence of that.
                Err(error) if error.is_failure() && self.cancel.is_cancelled() => {
                    tracing::debug!(node = %self.node.name, %error, "failed while being cancelled");
                    Err(NodeError::cancelled())
                }
                result => result,
            };
        }
        match result {
            Ok(_) => Err(NodeError::msg(format!(
                "node `{}` went on after it was suspended; a suspension must be returned with `?`",
                self.node.name
            ))
            .fatal()),
            Err(error) if error.is_lost() || error.is_cancelled() => Err(error),
            Err(_) => Err(NodeError::suspended()),
        }
    }

    /// Counts a failure in the database, and waits if the next attempt is soon.
    async fn failed(&mut self, attempt: u32, error: NodeError) -> Option<TaskEnd<S>> {
        let mut text = format!("node `{}`: {error}", self.node.name);
        if let Some(failure) = &self.failure {
            text = format!(
                "node `{}`: {}; its error handler failed too: {text}",
                failure.node, failure.error
            );
        }
        tracing::warn!(thread = %self.run.thread, node = %self.node.name, attempt, %error, "attempt failed");
        self.attempts.made = attempt;
        self.attempts.error.clone_from(&text);
        self.attempts.retry_at = None;
        let policy = self.node.options.retry.as_ref();
        let tried = attempt.saturating_sub(self.attempts.base);
        let Some(policy) = policy.filter(|policy| may_retry(policy, tried, &error)) else {
            return Some(TaskEnd::Failed(Failure { text, error }));
        };
        let interval = policy.interval(tried);
        // A subgraph that remembers nothing cannot be left and come back to.
        let records = self.place.as_ref().is_none_or(|place| place.records);
        let held = interval <= HELD_RETRY || !records;
        let at = self.run.now() + jiff::SignedDuration::try_from(interval).unwrap_or_default();
        if !held {
            self.attempts.retry_at = Some(at);
        }
        let mut commit = Commit::on(self.run.base());
        self.memo.lock().flush_memory(&mut commit);
        commit
            .writes
            .push(attempts_write(&self.key, &self.attempts));
        let counted = match &self.place {
            None => self.run.commit(commit).await.map(|_| ()),
            Some(place) => place.share(&self.run, commit).await,
        };
        if counted.is_err() {
            return Some(TaskEnd::Lost);
        }
        let followed = self.run.wanted().has(Modes::TASKS);
        if followed {
            let kind = failed_item(&self.key, &self.node.name, &self.attempts);
            self.run.tell(self.namespace(), self.step, kind);
        }
        if !held {
            return Some(TaskEnd::RetryAt(at));
        }
        tokio::select! {
            () = tokio::time::sleep(interval) => {
                if followed {
                    let argument = self.argument.as_ref();
                    let kind = started_item(&self.key, &self.node.name, attempt + 1, argument);
                    self.run.tell(self.namespace(), self.step, kind);
                }
                None
            }
            () = self.cancel.cancelled() => Some(TaskEnd::Cancelled),
        }
    }
}

impl<S: State> Job<S> {
    /// Lets the error handler take over, if there is one. From then on the failed node does not run again, whatever happens.
    async fn hand_over(&mut self, error: &NodeError) -> Result<Option<Handler<S>>, Broken> {
        let Some(node) = self.handler.take() else {
            return Ok(None);
        };
        let error = error.to_string();
        self.attempts.handed_over = Some(error.clone());
        let mut commit = Commit::on(self.run.base());
        self.memo.lock().flush_memory(&mut commit);
        commit
            .writes
            .push(attempts_write(&self.key, &self.attempts));
        match &self.place {
            None => self.run.commit(commit).await.map(|_| ())?,
            Some(place) => place.share(&self.run, commit).await?,
        }
        tracing::warn!(thread = %self.run.thread, node = %self.node.name, handler = %node.name, "the error handler takes over");
        let followed = self.run.wanted().has(Modes::TASKS);
        if followed {
            let kind = failed_item(&self.key, &self.node.name, &self.attempts);
            self.run.tell(self.namespace(), self.step, kind);
        }
        let failure = TaskFailure {
            node: self.node.name.to_string(),
            error,
            attempts: self.attempts.made,
        };
        let handler = Handler::new(node, &self.key, failure);
        if followed {
            let kind = started_item(&handler.key, &handler.node.name, 1, self.argument.as_ref());
            self.run.tell(self.namespace(), self.step, kind);
        }
        self.node = handler.node.clone();
        self.key.clone_from(&handler.key);
        self.memo = handler.memo.clone();
        self.failure = Some(handler.failure.clone());
        self.attempts = Attempts::default();
        Ok(Some(handler))
    }
}

fn may_retry(policy: &RetryPolicy, tried: u32, error: &NodeError) -> bool {
    tried < policy.attempts && (policy.retryable)(error)
}

pub(super) fn attempts_write(task: &str, attempts: &Attempts) -> Write {
    Write {
        task: task.to_owned(),
        kind: WriteKind::Attempts,
        name: String::new(),
        round: 0,
        value: serde_json::to_value(attempts).unwrap_or_default(),
        kept: None,
    }
}

async fn sleep_for(limit: Option<Duration>) {
    match limit {
        Some(limit) => tokio::time::sleep(limit).await,
        None => std::future::pending().await,
    }
}

async fn went_idle(context: &Context, limit: Option<Duration>) {
    let Some(limit) = limit else {
        return std::future::pending().await;
    };
    loop {
        let idle = context.idle();
        if idle >= limit {
            return;
        }
        tokio::time::sleep(limit.saturating_sub(idle)).await;
    }
}
