//! Takes a thread through its supersteps, from a claim to the point where only waiting is left.

mod apply;
mod attempt;
mod cached;
mod ending;
mod expiry;
mod fork;
mod inside;
mod landing;
mod pause;
mod place;
mod preempt;
mod shared;
mod tasks;
mod tell;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use serde_json::Value;
use tracing::Instrument;

use crate::{
    builder::Compiled,
    checkpoint::{
        Commit, KeptState, Loaded, Receipt, Source, Then, ThreadStatus, WaitRecord, Write,
        WriteKind,
    },
    context::{digest, wait_named},
    kept::{Held, restore},
    observer::Point,
    plan::Plan,
    private::chain,
    state::{Extent, State, Update, channels_weight},
    waits::is_input,
};

use apply::SNAPSHOT_AFTER;
pub(crate) use ending::end_thread;
pub(crate) use fork::{Forked, forked};
pub(crate) use inside::{Begin, invoke, recorded_state};
pub(crate) use landing::give_back;
pub(crate) use place::Place;
pub(crate) use preempt::watch;
pub(crate) use shared::{Broken, Controls, RunShared};
use tasks::Status;
pub(crate) use tasks::is_inside;
use tell::Landed;

/// The task path of the mark that a thread has reached its recursion limit.
const LIMIT: &str = "~limit";
/// The task path of the mark that a round has failed or was cancelled: a further input begins another one.
const ENDED: &str = "~ended";

/// Whether the run goes on.
enum Flow {
    On,
    Released,
}

/// A run of one thread.
pub(crate) struct Run<S: State> {
    shared: Arc<RunShared>,
    graph: Arc<Compiled<S>>,
    state: Arc<S>,
    plan: Arc<Plan>,
    step: u64,
    /// Whether the database is given values instead of JSON.
    keeps: bool,
    /// Pending writes of the current checkpoint that no task has picked up yet, by task.
    writes: BTreeMap<String, Vec<Write>>,
    since_snapshot: u64,
    changed_since_snapshot: usize,
    next_snapshot: u64,
    extent: Extent,
    /// Whether the round under way had ended, failed or cancelled, and nobody has asked to try it again.
    failed: bool,
    grace: Duration,
    /// The subgraph that this is a run of; absent: the thread's own graph.
    place: Option<Arc<Place>>,
}

/// Why a thread cannot even begin to run; it fails.
pub(crate) struct Unfit(pub String);

impl<S: State> Run<S> {
    pub fn new(
        graph: Arc<Compiled<S>>,
        shared: Arc<RunShared>,
        mut loaded: Loaded,
        grace: Duration,
    ) -> Result<Self, Unfit> {
        let (thread, checkpoint) = (shared.thread.clone(), loaded.state.checkpoint);
        let unfit = |what: String| {
            Unfit(format!(
                "what is stored of thread `{thread}` at checkpoint {checkpoint} does not fit graph `{}`: {what}; look at it with `Engine::stored_state`, and then retry the thread with a graph that it fits, or go on from a fork with another state (`Engine::fork_with_state`)",
                graph.name
            ))
        };
        let extent = Extent::on::<S>(&loaded.state.rows);
        let changed_since_snapshot = loaded
            .state
            .rows
            .iter()
            .map(|row| channels_weight(&row.changes))
            .sum();
        let state = restore::<S>(&loaded.thread.input, &mut loaded.state)
            .map_err(|error| unfit(chain(&error)))?;
        let plan = match loaded.state.plan {
            Some(plan) => serde_json::from_value::<Plan>(plan)
                .map_err(|error| unfit(format!("the plan: {error}")))?,
            None => Plan::entry(&graph, &state).map_err(|error| Unfit(error.to_string()))?,
        };
        if plan.version > Plan::VERSION {
            return Err(unfit(format!(
                "the checkpoint was written by a newer release (format {}, known is {})",
                plan.version,
                Plan::VERSION
            )));
        }
        shared.renamed.lock().clone_from(&plan.renamed);
        let mut writes: BTreeMap<String, Vec<Write>> = BTreeMap::new();
        for write in loaded.writes {
            writes.entry(write.task.clone()).or_default().push(write);
        }
        // Whoever retries a thread clears its error.
        let failed = loaded.thread.error.is_some() && writes.contains_key(ENDED);
        let since_snapshot = loaded.state.since_snapshot.unwrap_or(loaded.state.step);
        Ok(Self {
            keeps: shared.engine.store.keeps_values(),
            shared,
            graph,
            state,
            plan: Arc::new(plan),
            step: loaded.state.step,
            writes,
            since_snapshot,
            changed_since_snapshot,
            next_snapshot: since_snapshot.max(SNAPSHOT_AFTER),
            extent,
            failed,
            grace,
            place: None,
        })
    }

    /// Runs until the lease is given back.
    pub async fn go(&mut self) -> Result<(), Broken> {
        loop {
            if self.shared.controls.cancel.is_cancelled() {
                return self.cancel(Vec::new()).await;
            }
            self.forget_begun().await?;
            let flow = if self.plan.is_over() {
                self.next_input().await?
            } else if self.must_make_way() {
                self.make_way().await?
            } else if self.shared.controls.preempted.is_cancelled() {
                // Tasks that begin now would be stopped at once.
                self.give_way(&mut []).await?;
                Flow::Released
            } else if self.plan.is_empty() {
                self.stop_after_all().await?
            } else {
                self.step_or_drain().await?
            };
            if let Flow::Released = flow {
                return Ok(());
            }
        }
    }

    async fn step_or_drain(&mut self) -> Result<Flow, Broken> {
        if self.shared.controls.drain.is_cancelled() {
            let mut commit = self.commit();
            commit.then = Then::Yield;
            self.keep(&mut commit);
            self.shared.commit(commit).await?;
            return Ok(Flow::Released);
        }
        let span = tracing::info_span!(
            "superstep",
            thread = %self.shared.thread,
            step = self.step + 1,
        );
        self.superstep().instrument(span).await
    }

    fn commit(&self) -> Commit {
        Commit::on(self.shared.base())
    }

    /// Nothing is planned: a further input begins the next round, or the thread has ended.
    async fn next_input(&mut self) -> Result<Flow, Broken> {
        let mut commit = self.commit();
        let is_there = self
            .shared
            .mailbox
            .lock()
            .any(|signal| is_input(&signal.kind));
        if is_there {
            return self.begin(commit, Vec::new()).await;
        }
        self.done(&mut commit);
        self.land(commit, &[]).await?;
        self.ended(ThreadStatus::Done);
        Ok(Flow::Released)
    }

    /// Begins a round with the oldest input in the mailbox.
    /// `stopped`: the children of a round that was stopped for it.
    async fn begin(&mut self, mut commit: Commit, stopped: Vec<String>) -> Result<Flow, Broken> {
        let input = self
            .shared
            .mailbox
            .lock()
            .take(|signal| is_input(&signal.kind).then(|| signal.payload.clone()));
        let Some((input, number)) = input else {
            return Ok(Flow::On);
        };
        commit.consumed.push(number);
        let begun = S::Update::from_json(input)
            .map_err(|error| chain(&error))
            .and_then(|update| {
                let changes = self.written([&update]).map_err(|error| chain(&error))?;
                Arc::make_mut(&mut self.state).apply(update);
                let plan =
                    Plan::entry(&self.graph, &self.state).map_err(|error| error.to_string())?;
                Ok((changes, plan.instead_of(&self.plan, stopped)))
            });
        match begun {
            Ok((changes, plan)) => {
                self.shared.renamed.lock().clone_from(&plan.renamed);
                self.plan = Arc::new(plan);
                commit.checkpoint = Some(self.checkpoint(changes, Source::Input));
                let parent = commit.base;
                let receipt = self.land(commit, &[]).await?;
                self.tell_state(Landed::on(parent, &receipt), Source::Input);
                Ok(Flow::On)
            }
            Err(fault) => {
                self.fail(commit, &fault, None).await?;
                Ok(Flow::Released)
            }
        }
    }

    async fn superstep(&mut self) -> Result<Flow, Broken> {
        if let Some((mark, text)) = self.limit(self.writes.contains_key(LIMIT)) {
            let mut commit = self.commit();
            commit.writes.push(mark);
            self.fail(commit, &text, None).await?;
            return Ok(Flow::Released);
        }
        if let Flow::Released = self.pause().await? {
            return Ok(Flow::Released);
        }
        let mut tasks = match self.tasks() {
            Ok(tasks) => tasks,
            Err(fault) => {
                let commit = self.commit();
                self.fail(commit, &fault, None).await?;
                return Ok(Flow::Released);
            }
        };
        self.take_cached(&mut tasks).await;
        let names: Vec<String> = tasks.iter().map(|task| task.planned.node.clone()).collect();
        loop {
            if self.must_make_way() {
                return Ok(Flow::On);
            }
            self.expire(&tasks).await?;
            if self.wake(&mut tasks) {
                self.waited();
            }
            self.tell_started(&mut tasks);
            self.run_ready(&mut tasks).await?;
            let settled = tasks
                .iter()
                .all(|task| matches!(task.status, Status::Done(_)));
            if settled {
                return self.apply(tasks, &names).await;
            }
            if self.shared.controls.cancel.is_cancelled() {
                self.cancel(tasks).await?;
                return Ok(Flow::Released);
            }
            if self.shared.controls.preempted.is_cancelled() {
                self.give_way(&mut tasks).await?;
                return Ok(Flow::Released);
            }
            let failure = tasks.iter().find_map(|task| match &task.status {
                Status::Failed(failure) => Some((failure.text.clone(), task.planned.node.clone())),
                _ => None,
            });
            if let Some((text, node)) = failure {
                let mut commit = self.commit();
                Self::record(&mut tasks, &mut commit);
                Self::record_failed(&mut tasks, &mut commit);
                self.tell_unfinished(&mut tasks);
                self.fail(commit, &text, Some(&node)).await?;
                return Ok(Flow::Released);
            }
            if tasks
                .iter()
                .any(|task| matches!(task.status, Status::Yielded))
            {
                let waits = self.open_waits(&tasks);
                let mut commit = self.commit();
                Self::record(&mut tasks, &mut commit);
                commit.waits = Some(self.shared.list_waits("", waits));
                commit.then = Then::Yield;
                self.land(commit, &names).await?;
                return Ok(Flow::Released);
            }
            self.expire(&tasks).await?;
            if self.wake(&mut tasks) {
                self.waited();
                continue;
            }
            let waits = self.open_waits(&tasks);
            let mut commit = self.commit();
            Self::record(&mut tasks, &mut commit);
            self.tell_unfinished(&mut tasks);
            if let Flow::Released = self.suspend(commit, waits, &names).await? {
                return Ok(Flow::Released);
            }
        }
    }

    /// If the recursion limit is reached, the mark that says so and the failure's text. Who finds the mark (in a retry) has as
    /// many steps again.
    fn limit(&mut self, marked: bool) -> Option<(Write, String)> {
        if marked {
            self.waited();
        }
        let limit = self.graph.recursion_limit;
        if self.plan.hops < limit {
            return None;
        }
        let mark = Write {
            task: self.path(LIMIT),
            kind: WriteKind::Attempts,
            name: String::new(),
            round: 0,
            value: Value::Null,
            kept: None,
        };
        let text = format!(
            "the recursion limit of {limit} supersteps was reached; a loop has no way out, or the limit is too low"
        );
        Some((mark, text))
    }

    /// The path of a task of the coming step.
    fn path(&self, task: &str) -> String {
        match &self.place {
            None => task.to_owned(),
            Some(place) => format!("{}/{}/{task}", place.path, self.step + 1),
        }
    }

    /// The number of the coming superstep of the thread.
    fn root_step(&self) -> u64 {
        self.place
            .as_ref()
            .map_or(self.step + 1, |place| place.root_step)
    }

    fn namespace(&self) -> &[String] {
        self.place.as_ref().map_or(&[], |place| &place.namespace)
    }

    /// Gives the lease back, unless there is news.
    async fn suspend(
        &mut self,
        mut commit: Commit,
        waits: Vec<WaitRecord>,
        names: &[String],
    ) -> Result<Flow, Broken> {
        commit.then = Then::Wait {
            mail_seen: self.shared.mailbox.lock().seen,
            wake_at: waits.iter().filter_map(|wait| wait.until).min(),
        };
        let listed = self.shared.list_waits("", waits);
        let followed = self.shared.engine.bus.is_followed(&self.shared.thread);
        let told = followed.then(|| listed.clone());
        commit.waits = Some(listed);
        self.keep(&mut commit);
        let receipt = self.land(commit, names).await?;
        if receipt.released {
            if let Some(waits) = told {
                self.tell_suspended(waits);
            }
            return Ok(Flow::Released);
        }
        if receipt.mail > self.shared.mailbox.lock().seen {
            self.shared.fetch_mail().await?;
        }
        Ok(Flow::On)
    }

    /// The thread has waited: it may take as many steps again.
    fn waited(&mut self) {
        if self.plan.hops != 0 {
            Arc::make_mut(&mut self.plan).hops = 0;
        }
    }

    /// Lets a database that keeps values keep the state that the commit leads to.
    fn keep(&self, commit: &mut Commit) {
        if self.keeps {
            commit.state = Some(KeptState::new(Held {
                state: self.state.clone(),
                graph: self.graph.clone(),
                pasts: self.shared.pasts.lock().clone(),
            }));
        }
    }

    fn wait_id(&self, space: &str, name: &str, round: u32) -> String {
        let hash = digest(
            &[
                self.shared.thread.as_str(),
                &self.shared.branch.to_string(),
                &self.root_step().to_string(),
                space,
                name,
                &round.to_string(),
            ],
            12,
        );
        wait_named(self.shared.branch, space, &hash)
    }

    /// Commits, with whoever looks on.
    async fn land(&self, commit: Commit, nodes: &[String]) -> Result<Receipt, Broken> {
        let shared = &*self.shared;
        if commit.checkpoint.is_some() || commit.then != Then::Keep {
            shared.shared_all().await;
        }
        shared.engine.observe(&Point::BeforeCommit {
            thread: &shared.thread,
            nodes,
        });
        let receipt = shared.commit(commit).await?;
        shared.engine.observe(&Point::AfterCommit {
            thread: &shared.thread,
            nodes,
        });
        Ok(receipt)
    }
}
