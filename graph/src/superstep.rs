//! Takes a thread through its supersteps, from a claim to the point where only waiting is left.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{
    attempt::{Job, TaskEnd, attempts_write},
    builder::{Compiled, Node},
    checkpoint::{
        CancelRequest, Channels, Commit, Loaded, NewCheckpoint, NewEvent, NewSignal, Receipt,
        Source, Then, ThreadFilter, ThreadStatus, WaitKind, WaitRecord, Write, WriteKind,
    },
    command::{Outcome, Target},
    context::digest,
    error::EngineError,
    follow::StreamKind,
    memo::{Attempts, Memo, Suspension, Waiting},
    observer::Point,
    plan::{Finished, Plan, PlanError, Planned, conflicts},
    private::chain,
    run::{Broken, RunShared},
    state::{Changes, ChannelError, State, Update, channels_weight, rebuild, snapshot},
    waits::{ANSWER, CHILD, ChildEnd, INPUT, arrival, timer},
};

/// When a task outlives its siblings by so much, what the siblings did is made durable without waiting for it.
const OUTLIVES: Duration = Duration::from_millis(100);
/// How long a node has to clean up after a cancellation.
const CLEANUP: Duration = Duration::from_secs(30);
/// After so many checkpoints without one, a snapshot is considered.
const SNAPSHOT_AFTER: u64 = 32;
/// After so many, it is made, whatever it weighs.
const SNAPSHOT_AT_LAST: u64 = 1024;
/// Task paths that are not nodes'.
const PAUSE: &str = "~pause";
const LIMIT: &str = "~limit";
const CLEAN_UP: &str = "~cancel";

/// Whether the run goes on.
enum Flow {
    On,
    Released,
}

struct Task<S: State> {
    planned: Planned,
    node: Arc<Node<S>>,
    memo: Arc<Mutex<Memo>>,
    attempts: Attempts,
    status: Status<S>,
    /// Whether what is to be kept of it is in the database.
    recorded: bool,
    /// Whether it was finished before this run.
    cached: bool,
}

enum Status<S: State> {
    Ready,
    Suspended,
    RetryAt(jiff::Timestamp),
    Done(Outcome<S>),
    Failed(String),
    Cancelled,
}

/// A run of one thread.
pub(crate) struct Run<S: State> {
    shared: Arc<RunShared>,
    graph: Arc<Compiled<S>>,
    state: Arc<S>,
    plan: Plan,
    step: u64,
    /// Pending writes of the current checkpoint that no task has picked up yet, by task.
    writes: BTreeMap<String, Vec<Write>>,
    since_snapshot: u64,
    changed_since_snapshot: usize,
    next_snapshot: u64,
    /// Whether the thread's row names open waits.
    waiting: bool,
    grace: Duration,
}

/// Why a thread cannot even begin to run; it fails.
pub(crate) struct Unfit(pub String);

impl<S: State> Run<S> {
    pub fn new(
        graph: Arc<Compiled<S>>,
        shared: Arc<RunShared>,
        loaded: Loaded,
        grace: Duration,
    ) -> Result<Self, Unfit> {
        let unfit = |what: String| {
            Unfit(format!(
                "what is stored does not fit graph `{}`: {what}",
                graph.name
            ))
        };
        let changed_since_snapshot = loaded
            .state
            .rows
            .iter()
            .map(|row| channels_weight(&row.changes))
            .sum();
        let state: S = rebuild(&loaded.thread.input, loaded.state.rows)
            .map_err(|error| unfit(chain(&error)))?;
        let plan = match loaded.state.plan {
            Some(plan) => {
                serde_json::from_value::<Plan>(plan).map_err(|error| unfit(error.to_string()))?
            }
            None => Plan::entry(&graph, &state).map_err(|error| Unfit(error.to_string()))?,
        };
        if plan.version > Plan::VERSION {
            return Err(unfit(format!(
                "the checkpoint was written by a newer release (format {}, known is {})",
                plan.version,
                Plan::VERSION
            )));
        }
        let mut writes: BTreeMap<String, Vec<Write>> = BTreeMap::new();
        for write in loaded.writes {
            writes.entry(write.task.clone()).or_default().push(write);
        }
        let since_snapshot = loaded.state.since_snapshot.unwrap_or(loaded.state.step);
        Ok(Self {
            shared,
            graph,
            state: Arc::new(state),
            plan,
            step: loaded.state.step,
            writes,
            since_snapshot,
            changed_since_snapshot,
            next_snapshot: since_snapshot.max(SNAPSHOT_AFTER),
            waiting: !loaded.thread.waits.is_empty(),
            grace,
        })
    }

    /// Runs until the lease is given back.
    pub async fn go(&mut self) -> Result<(), Broken> {
        loop {
            if self.shared.controls.cancel.is_cancelled() {
                return self.cancel(Vec::new()).await;
            }
            if self.plan.is_empty() {
                match self.next_input().await? {
                    Flow::On => continue,
                    Flow::Released => return Ok(()),
                }
            }
            if self.shared.controls.drain.is_cancelled() {
                let mut commit = self.commit();
                commit.then = Then::Yield;
                self.shared.commit(commit).await?;
                return Ok(());
            }
            if let Flow::Released = self.superstep().await? {
                return Ok(());
            }
        }
    }

    fn commit(&self) -> Commit {
        Commit::on(self.shared.base())
    }

    /// Nothing is planned: a further input begins the next round, or the thread has ended.
    async fn next_input(&mut self) -> Result<Flow, Broken> {
        let input = self
            .shared
            .mailbox
            .lock()
            .take(|signal| (signal.kind == INPUT).then(|| signal.payload.clone()));
        let mut commit = self.commit();
        let Some((input, number)) = input else {
            let output = self.output();
            self.end(&mut commit, ThreadStatus::Done, None, output, None);
            self.land(commit, &[]).await?;
            self.ended(ThreadStatus::Done);
            return Ok(Flow::Released);
        };
        commit.consumed.push(number);
        let begun = S::Update::from_json(input)
            .map_err(|error| chain(&error))
            .and_then(|update| {
                let mut changes = Changes::default();
                changes.add::<S>(&update).map_err(|error| chain(&error))?;
                Arc::make_mut(&mut self.state).apply(update);
                let plan =
                    Plan::entry(&self.graph, &self.state).map_err(|error| error.to_string())?;
                Ok((changes, plan))
            });
        match begun {
            Ok((changes, plan)) => {
                self.plan = plan;
                commit.checkpoint = Some(self.checkpoint(changes, Source::Input));
                self.land(commit, &[]).await?;
                Ok(Flow::On)
            }
            Err(fault) => {
                self.fail(commit, &fault, None).await?;
                Ok(Flow::Released)
            }
        }
    }

    // ---- one superstep ----

    async fn superstep(&mut self) -> Result<Flow, Broken> {
        let limit = self.graph.recursion_limit;
        if self.plan.hops >= limit && !self.writes.contains_key(LIMIT) {
            let mut commit = self.commit();
            // A retry by hand finds this, and gets as many steps again.
            commit.writes.push(Write {
                task: LIMIT.to_owned(),
                kind: WriteKind::Attempts,
                name: String::new(),
                round: 0,
                value: Value::Null,
            });
            let text = format!(
                "the recursion limit of {limit} supersteps was reached; a loop has no way out, or the limit is too low"
            );
            self.fail(commit, &text, None).await?;
            return Ok(Flow::Released);
        }
        if self.writes.contains_key(LIMIT) {
            self.plan.hops = 0;
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
        let names: Vec<String> = tasks.iter().map(|task| task.planned.node.clone()).collect();
        loop {
            if self.wake(&mut tasks) {
                self.plan.hops = 0;
            }
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
            let failure = tasks.iter().find_map(|task| match &task.status {
                Status::Failed(text) => Some((text.clone(), task.planned.node.clone())),
                _ => None,
            });
            if let Some((text, node)) = failure {
                let mut commit = self.commit();
                self.record(&mut tasks, &mut commit);
                for task in &mut tasks {
                    if let Status::Failed(_) = task.status {
                        // A retry by hand has all attempts again.
                        task.attempts.base = task.attempts.made;
                        task.memo.lock().flush_memory(&mut commit);
                        commit
                            .writes
                            .push(attempts_write(&task.planned.key, &task.attempts));
                    }
                }
                self.fail(commit, &text, Some(&node)).await?;
                return Ok(Flow::Released);
            }
            if self.wake(&mut tasks) {
                self.plan.hops = 0;
                continue;
            }
            let waits = self.open_waits(&tasks);
            let mut commit = self.commit();
            self.record(&mut tasks, &mut commit);
            if let Flow::Released = self.suspend(commit, waits, &names).await? {
                return Ok(Flow::Released);
            }
        }
    }

    /// The planned tasks, with what is remembered of them.
    fn tasks(&mut self) -> Result<Vec<Task<S>>, String> {
        let mut tasks = Vec::new();
        for planned in self.plan.tasks() {
            let node = self
                .graph
                .nodes
                .get(&planned.node)
                .cloned()
                .ok_or_else(|| {
                    format!(
                        "node `{}` is to run next, but graph `{}` has no such node (any more)",
                        planned.node, self.graph.name
                    )
                })?;
            let mut memo = Memo::default();
            let mut attempts = Attempts::default();
            let mut status = Status::Ready;
            for write in self.writes.remove(&planned.key).unwrap_or_default() {
                let fault = |error: serde_json::Error| {
                    format!(
                        "what task `{}` has written cannot be read: {error}",
                        planned.key
                    )
                };
                match write.kind {
                    WriteKind::Step | WriteKind::Wait | WriteKind::Take => memo.restore(&write),
                    WriteKind::Attempts => {
                        attempts = serde_json::from_value(write.value).map_err(fault)?;
                    }
                    WriteKind::Suspended => {
                        let stored: Suspension =
                            serde_json::from_value(write.value).map_err(fault)?;
                        memo.said = stored.said;
                        memo.waits = stored.waits;
                    }
                    WriteKind::Result => {
                        if !write.value.is_null() {
                            let outcome = outcome_from::<S>(write.value).map_err(|error| {
                                format!(
                                    "the result of task `{}` cannot be read: {error}",
                                    planned.key
                                )
                            })?;
                            status = Status::Done(outcome);
                        }
                    }
                }
            }
            let recorded = !matches!(status, Status::Ready) || !memo.waits.is_empty();
            let cached = matches!(status, Status::Done(_));
            if let Status::Ready = status {
                if !memo.waits.is_empty() && !memo.is_answered() {
                    status = Status::Suspended;
                } else if let Some(at) = attempts.retry_at {
                    status = Status::RetryAt(at);
                }
            }
            tasks.push(Task {
                planned,
                node,
                memo: Arc::new(Mutex::new(memo)),
                attempts,
                status,
                recorded,
                cached,
            });
        }
        Ok(tasks)
    }

    /// Hands signals and times that have come to the tasks that wait for them, in the order of the tasks. Returns whether a
    /// task can go on.
    fn wake(&self, tasks: &mut [Task<S>]) -> bool {
        let now = self.shared.now();
        let mut mailbox = self.shared.mailbox.lock();
        let mut woken = false;
        for task in tasks {
            match task.status {
                Status::RetryAt(at) if at <= now => {
                    task.attempts.retry_at = None;
                    task.status = Status::Ready;
                    woken = true;
                }
                Status::Suspended => {
                    let mut memo = task.memo.lock();
                    let waits = memo.waits.clone();
                    for wait in &waits {
                        let came = mailbox
                            .take(|signal| arrival(&wait.record, signal))
                            .map(|(value, number)| (value, Some(number)))
                            .or_else(|| {
                                wait.record
                                    .until
                                    .is_some_and(|until| until <= now)
                                    .then(|| (timer(), None))
                            });
                        if let Some((value, number)) = came {
                            memo.note(
                                &task.planned.key,
                                WriteKind::Wait,
                                &wait.space,
                                wait.round,
                                value,
                                number,
                            );
                            task.status = Status::Ready;
                            woken = true;
                        }
                    }
                }
                _ => {}
            }
        }
        woken
    }

    /// Runs the tasks that can run, and waits for all of them.
    async fn run_ready(&mut self, tasks: &mut [Task<S>]) -> Result<(), Broken> {
        let ready: Vec<usize> = (0..tasks.len())
            .filter(|index| matches!(tasks[*index].status, Status::Ready))
            .collect();
        let undone = tasks
            .iter()
            .filter(|task| !matches!(task.status, Status::Done(_)))
            .count();
        if let [index] = ready[..] {
            let job = self.job(&tasks[index], undone == 1);
            let lost = self.shared.controls.lost.clone();
            let (end, attempts) = tokio::select! {
                end = job.run() => end,
                () = lost.cancelled() => return Err(Broken),
            };
            return Self::settle(&mut tasks[index], end, attempts);
        }
        let slots = Arc::new(tokio::sync::Semaphore::new(self.graph.parallel));
        let mut running = JoinSet::new();
        for index in ready {
            let job = self.job(&tasks[index], false);
            let slots = slots.clone();
            running.spawn(async move {
                // Tasks take their turn in order; the semaphore is never closed.
                let _slot = slots.acquire_owned().await;
                (index, job.run().await)
            });
        }
        let mut overdue: Option<tokio::time::Instant> = None;
        while !running.is_empty() {
            tokio::select! {
                joined = running.join_next() => match joined {
                    Some(Ok((index, (end, attempts)))) => {
                        Self::settle(&mut tasks[index], end, attempts)?;
                        overdue.get_or_insert_with(|| tokio::time::Instant::now() + OUTLIVES);
                    }
                    Some(Err(error)) => {
                        tracing::error!(thread = %self.shared.thread, %error, "a task was lost by the runtime");
                        return Err(Broken);
                    }
                    None => {}
                },
                () = until(overdue) => {
                    overdue = None;
                    let waits = self.open_waits(tasks);
                    let mut commit = self.commit();
                    self.record(tasks, &mut commit);
                    if commit != self.commit() {
                        self.waiting |= !waits.is_empty();
                        commit.waits = Some(waits);
                        self.land(commit, &[]).await?;
                    }
                }
                () = self.shared.controls.lost.cancelled() => return Err(Broken),
            }
        }
        Ok(())
    }

    fn job(&self, task: &Task<S>, alone: bool) -> Job<S> {
        Job {
            run: self.shared.clone(),
            node: task.node.clone(),
            state: self.state.clone(),
            key: task.planned.key.clone(),
            step: self.step + 1,
            argument: task.planned.argument.clone(),
            memo: task.memo.clone(),
            attempts: task.attempts.clone(),
            alone,
            may_wait: true,
            cancel: self.shared.controls.cancel.clone(),
            grace: self.grace,
            bound: None,
        }
    }

    fn settle(task: &mut Task<S>, end: TaskEnd<S>, attempts: Attempts) -> Result<(), Broken> {
        task.attempts = attempts;
        task.recorded = false;
        task.status = match end {
            TaskEnd::Done(outcome) => Status::Done(outcome),
            TaskEnd::Suspended => Status::Suspended,
            TaskEnd::RetryAt(at) => Status::RetryAt(at),
            TaskEnd::Failed(text) => Status::Failed(text),
            TaskEnd::Cancelled => Status::Cancelled,
            TaskEnd::Lost => return Err(Broken),
        };
        Ok(())
    }

    /// Puts into a commit what is to be kept of tasks although the step is not over: results, what suspended tasks have
    /// learned, and what both have said.
    fn record(&self, tasks: &mut [Task<S>], commit: &mut Commit) {
        for task in tasks {
            let mut memo = task.memo.lock();
            if let Status::Ready = task.status {
                // Answered, but not run yet.
                memo.flush_memory(commit);
                continue;
            }
            if task.recorded {
                continue;
            }
            let key = &task.planned.key;
            match &task.status {
                Status::Done(outcome) => {
                    memo.flush_memory(commit);
                    match outcome_to(outcome) {
                        Ok(value) => commit.writes.push(write(key, WriteKind::Result, value)),
                        // The step's own commit says what is wrong with it.
                        Err(_) => continue,
                    }
                }
                Status::Suspended => memo.flush_memory(commit),
                Status::RetryAt(_) | Status::Failed(_) => continue,
                Status::Cancelled => {
                    memo.flush_memory(commit);
                    continue;
                }
                Status::Ready => {}
            }
            memo.flush_said(commit);
            let suspension = memo.suspension();
            if suspension != Suspension::default() {
                let value = serde_json::to_value(suspension).unwrap_or_default();
                commit.writes.push(write(key, WriteKind::Suspended, value));
            }
            drop(memo);
            task.recorded = true;
        }
    }

    fn open_waits(&self, tasks: &[Task<S>]) -> Vec<WaitRecord> {
        let mut waits = Vec::new();
        for task in tasks {
            match task.status {
                Status::Suspended => {
                    waits.extend(
                        task.memo
                            .lock()
                            .waits
                            .iter()
                            .map(|wait| wait.record.clone()),
                    );
                }
                Status::RetryAt(at) => waits.push(WaitRecord {
                    id: self.wait_id("retry", &task.planned.key, task.attempts.made),
                    name: "retry".to_owned(),
                    kind: WaitKind::Timer,
                    task: task.planned.key.clone(),
                    value: Value::Null,
                    signals: Vec::new(),
                    children: Vec::new(),
                    until: Some(at),
                }),
                _ => {}
            }
        }
        waits
    }

    fn wait_id(&self, space: &str, name: &str, round: u32) -> String {
        let hash = digest(
            &[
                self.shared.thread.as_str(),
                &self.shared.branch.to_string(),
                &(self.step + 1).to_string(),
                space,
                name,
                &round.to_string(),
            ],
            12,
        );
        format!("{}.{hash}", self.shared.branch)
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
        self.waiting = !waits.is_empty();
        commit.waits = Some(waits);
        let receipt = self.land(commit, names).await?;
        if receipt.released {
            return Ok(Flow::Released);
        }
        if receipt.mail > self.shared.mailbox.lock().seen {
            self.shared.fetch_mail().await?;
        }
        Ok(Flow::On)
    }

    /// Stepping by hand: stops before or after named nodes until somebody lets the thread go on.
    async fn pause(&mut self) -> Result<Flow, Broken> {
        let after = self
            .plan
            .pause_after
            .iter()
            .map(|node| format!("after:{node}"));
        let next = self.plan.names();
        let before = self
            .graph
            .pause_before
            .iter()
            .filter(|node| next.contains(node))
            .map(|node| format!("before:{node}"));
        let stops: Vec<String> = after.chain(before).collect();
        if stops.is_empty() {
            return Ok(Flow::On);
        }
        let mut memo = Memo::default();
        for write in self.writes.remove(PAUSE).unwrap_or_default() {
            memo.restore(&write);
        }
        memo.waits = stops
            .into_iter()
            .map(|name| Waiting {
                record: WaitRecord {
                    id: self.wait_id(PAUSE, &name, 0),
                    kind: WaitKind::Interrupt,
                    task: PAUSE.to_owned(),
                    value: json!({ "next": &next }),
                    signals: Vec::new(),
                    children: Vec::new(),
                    until: None,
                    name: name.clone(),
                },
                space: name,
                round: 0,
            })
            .collect();
        loop {
            let mut open = Vec::new();
            for wait in memo.waits.clone() {
                if memo.get(WriteKind::Wait, &wait.space, 0).is_some() {
                    continue;
                }
                let answer = self
                    .shared
                    .mailbox
                    .lock()
                    .take(|signal| arrival(&wait.record, signal));
                match answer {
                    Some((value, number)) => {
                        memo.note(PAUSE, WriteKind::Wait, &wait.space, 0, value, Some(number));
                        self.plan.hops = 0;
                    }
                    None => open.push(wait.record),
                }
            }
            if self.shared.controls.cancel.is_cancelled() {
                return self.cancel(Vec::new()).await.map(|()| Flow::Released);
            }
            let mut commit = self.commit();
            memo.flush_memory(&mut commit);
            if open.is_empty() {
                if commit != self.commit() {
                    self.land(commit, &[]).await?;
                }
                return Ok(Flow::On);
            }
            if let Flow::Released = self.suspend(commit, open, &[]).await? {
                return Ok(Flow::Released);
            }
        }
    }

    /// All tasks are done: applies their writes, plans, commits.
    async fn apply(&mut self, mut tasks: Vec<Task<S>>, names: &[String]) -> Result<Flow, Broken> {
        // By task path: nodes by name, then sends by index, whatever finished first.
        tasks.sort_by_key(|task| task.planned.order);
        let applied = self.fold(&tasks);
        let (changes, plan) = match applied {
            Ok(applied) => applied,
            Err(fault) => {
                // The tasks have to run again, once the program is put right.
                let mut commit = self.commit();
                for task in &mut tasks {
                    let mut memo = task.memo.lock();
                    memo.flush_memory(&mut commit);
                    memo.waits.clear();
                    let suspension = memo.suspension();
                    let key = &task.planned.key;
                    let value = serde_json::to_value(suspension).unwrap_or_default();
                    commit.writes.push(write(key, WriteKind::Suspended, value));
                    commit
                        .writes
                        .push(write(key, WriteKind::Result, Value::Null));
                }
                self.fail(commit, &fault.to_string(), None).await?;
                return Ok(Flow::Released);
            }
        };
        self.step += 1;
        self.plan = plan;
        self.writes.clear();
        let mut commit = self.commit();
        commit.clear_writes = self.shared.is_dirty();
        for task in &tasks {
            let mut memo = task.memo.lock();
            memo.flush_consumed(&mut commit);
            if !task.recorded {
                memo.flush_said(&mut commit);
            }
        }
        // Answers to questions of this step that nobody needs any more.
        commit
            .consumed
            .extend(self.shared.mailbox.lock().discard(ANSWER));
        if std::mem::take(&mut self.waiting) {
            commit.waits = Some(Vec::new());
        }
        commit.checkpoint = Some(self.checkpoint(changes, Source::Step));
        let ends = self.plan.is_empty();
        if ends {
            let output = self.output();
            self.end(&mut commit, ThreadStatus::Done, None, output, None);
        } else if self.shared.controls.drain.is_cancelled() {
            commit.then = Then::Yield;
        }
        let receipt = self.land(commit, names).await?;
        self.tell(&tasks);
        if ends {
            self.ended(ThreadStatus::Done);
        }
        Ok(if receipt.released {
            Flow::Released
        } else {
            Flow::On
        })
    }

    /// Folds what the tasks handed back into the state, and finds out what comes next.
    fn fold(&mut self, tasks: &[Task<S>]) -> Result<(Changes, Plan), Fault> {
        let finished: Vec<Finished<'_, S>> = tasks
            .iter()
            .filter_map(|task| match &task.status {
                Status::Done(outcome) => Some(Finished {
                    node: &task.planned.node,
                    outcome,
                }),
                _ => None,
            })
            .collect();
        conflicts(&finished)?;
        let mut changes = Changes::default();
        for task in &finished {
            for update in &task.outcome.updates {
                changes.add::<S>(update)?;
            }
        }
        // Only conditional edges of nodes that did not run alone need the state as it was.
        let needs_before = finished.len() > 1
            && finished.iter().any(|task| {
                self.graph
                    .nodes
                    .get(task.node)
                    .is_some_and(|node| !node.conditions.is_empty())
            });
        let before = needs_before.then(|| self.state.clone());
        let mut after = self.state.clone();
        if !needs_before {
            // Nobody else holds the state now, so it is changed in place.
            self.state = Arc::new(S::default());
        }
        let state = Arc::make_mut(&mut after);
        for task in &finished {
            for update in &task.outcome.updates {
                state.apply(update.clone());
            }
        }
        self.state = after;
        let plan = self
            .plan
            .next(&self.graph, &finished, before.as_deref(), &self.state)?;
        Ok((changes, plan))
    }

    fn checkpoint(&mut self, changes: Changes, source: Source) -> NewCheckpoint {
        self.changed_since_snapshot += channels_weight(&changes.changes);
        self.since_snapshot += 1;
        let snapshot = self.snapshot();
        NewCheckpoint {
            parent: self.shared.base(),
            branch: self.shared.branch,
            step: self.step,
            source,
            appends: changes.appends,
            changes: changes.changes,
            snapshot,
            plan: serde_json::to_value(&self.plan).unwrap_or_default(),
        }
    }

    /// From time to time, so that reading back stays bounded, but not so often that snapshots outweigh the changes.
    fn snapshot(&mut self) -> Option<Channels> {
        if self.since_snapshot < self.next_snapshot || self.changed_since_snapshot <= 2 {
            return None;
        }
        let snapshot = snapshot(&*self.state).ok()?;
        if channels_weight(&snapshot) > self.changed_since_snapshot
            && self.since_snapshot < SNAPSHOT_AT_LAST
        {
            self.next_snapshot = self.since_snapshot * 2;
            return None;
        }
        self.since_snapshot = 0;
        self.changed_since_snapshot = 0;
        self.next_snapshot = SNAPSHOT_AFTER;
        Some(snapshot)
    }

    // ---- ends ----

    fn output(&self) -> Value {
        match &self.graph.output {
            Some(output) => output(&self.state),
            None => self.state.channels().map(Value::Object).unwrap_or_default(),
        }
    }

    /// Makes a commit the last one: the thread's own event, and the signal to its parent.
    fn end(
        &self,
        commit: &mut Commit,
        status: ThreadStatus,
        error: Option<&str>,
        output: Value,
        node: Option<&str>,
    ) {
        let shared = &*self.shared;
        end_thread(shared, commit, status, error, output, node);
    }

    fn ended(&self, status: ThreadStatus) {
        tracing::info!(thread = %self.shared.thread, graph = %self.graph.name, status = status.as_str(), step = self.step, "thread ended");
        let bus = &self.shared.engine.bus;
        bus.send(&self.shared.thread, self.step, StreamKind::Ended(status));
    }

    async fn fail(
        &mut self,
        mut commit: Commit,
        error: &str,
        node: Option<&str>,
    ) -> Result<(), Broken> {
        tracing::error!(thread = %self.shared.thread, graph = %self.graph.name, error, "thread failed");
        self.end(
            &mut commit,
            ThreadStatus::Failed,
            Some(error),
            Value::Null,
            node,
        );
        self.land(commit, &[]).await?;
        self.ended(ThreadStatus::Failed);
        Ok(())
    }

    /// The thread is cancelled: so are its children; then the node that cleans up has its chance. What the tasks of the
    /// step have done is kept, so that the thread can be resumed.
    async fn cancel(&mut self, mut tasks: Vec<Task<S>>) -> Result<(), Broken> {
        let shared = self.shared.clone();
        let reason = shared
            .controls
            .reason
            .lock()
            .clone()
            .unwrap_or_else(|| "no reason was given".to_owned());
        let mut commit = self.commit();
        self.record(&mut tasks, &mut commit);
        let filter = ThreadFilter {
            parent: Some(shared.thread.clone()),
            statuses: vec![
                ThreadStatus::Ready,
                ThreadStatus::Running,
                ThreadStatus::Waiting,
            ],
            limit: Some(usize::MAX >> 1),
            ..ThreadFilter::default()
        };
        let spawned: Vec<_> = commit
            .children
            .iter()
            .map(|child| child.id.clone())
            .collect();
        let children = match shared.engine.store.threads(&filter).await {
            Ok(children) => children,
            Err(error) => {
                shared.fail(error);
                return Err(Broken);
            }
        };
        commit.cancels.extend(
            children
                .into_iter()
                .map(|child| child.id)
                .chain(spawned)
                .map(|thread| CancelRequest {
                    thread,
                    reason: reason.clone(),
                }),
        );
        if commit != self.commit() {
            self.land(commit, &[]).await?;
        }

        let mut commit = self.commit();
        if let Some(node) = self
            .graph
            .on_cancel
            .clone()
            .and_then(|name| self.graph.nodes.get(&name).cloned())
        {
            self.clean_up(&node, &mut commit).await?;
        }
        let output = self.output();
        self.end(
            &mut commit,
            ThreadStatus::Cancelled,
            Some(&reason),
            output,
            None,
        );
        self.land(commit, &[]).await?;
        self.ended(ThreadStatus::Cancelled);
        Ok(())
    }

    async fn clean_up(&mut self, node: &Arc<Node<S>>, commit: &mut Commit) -> Result<(), Broken> {
        let mut memo = Memo::default();
        for write in self.writes.remove(CLEAN_UP).unwrap_or_default() {
            memo.restore(&write);
        }
        let memo = Arc::new(Mutex::new(memo));
        let job = Job {
            run: self.shared.clone(),
            node: node.clone(),
            state: self.state.clone(),
            key: CLEAN_UP.to_owned(),
            step: self.step + 1,
            argument: None,
            memo: memo.clone(),
            attempts: Attempts::default(),
            alone: true,
            may_wait: false,
            cancel: CancellationToken::new(),
            grace: self.grace,
            bound: Some(CLEANUP),
        };
        let lost = self.shared.controls.lost.clone();
        let (end, _) = tokio::select! {
            end = job.run() => end,
            () = lost.cancelled() => return Err(Broken),
        };
        let outcome = match end {
            TaskEnd::Done(outcome) => outcome,
            TaskEnd::Lost => return Err(Broken),
            TaskEnd::Failed(error) => {
                tracing::error!(thread = %self.shared.thread, %error, "cleaning up after a cancellation failed");
                Outcome::from(())
            }
            TaskEnd::Suspended | TaskEnd::RetryAt(_) | TaskEnd::Cancelled => Outcome::from(()),
        };
        let mut changes = Changes::default();
        for update in outcome.updates {
            if let Err(error) = changes.add::<S>(&update) {
                tracing::error!(thread = %self.shared.thread, error = %chain(&error), "an update of the node that cleans up was dropped");
                continue;
            }
            Arc::make_mut(&mut self.state).apply(update);
        }
        {
            let mut memo = memo.lock();
            memo.flush_consumed(commit);
            memo.flush_said(commit);
        }
        // What the tasks of the step remember moves to the new checkpoint; what cleaning up remembered does not, so that
        // another cancellation cleans up again.
        let loaded = self.shared.engine.store.load(&self.shared.lease).await;
        match loaded {
            Ok(loaded) => commit.writes.extend(
                loaded
                    .writes
                    .into_iter()
                    .filter(|write| write.task != CLEAN_UP),
            ),
            Err(error) => {
                self.shared.fail(error);
                return Err(Broken);
            }
        }
        commit.clear_writes = self.shared.is_dirty();
        commit.checkpoint = Some(self.checkpoint(changes, Source::Update(node.name.to_string())));
        Ok(())
    }

    // ---- telling ----

    /// Commits, with whoever looks on.
    async fn land(&self, commit: Commit, nodes: &[String]) -> Result<Receipt, Broken> {
        let shared = &*self.shared;
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

    /// Tells followers about a step.
    fn tell(&self, tasks: &[Task<S>]) {
        let shared = &*self.shared;
        let bus = &shared.engine.bus;
        if !bus.is_followed(&shared.thread) {
            return;
        }
        for task in tasks {
            let Status::Done(outcome) = &task.status else {
                continue;
            };
            let mut updates: Vec<Value> = outcome
                .updates
                .iter()
                .filter_map(|update| update.to_channels().ok().map(Value::Object))
                .collect();
            if updates.is_empty() {
                updates.push(Value::Null);
            }
            for update in updates {
                let node = task.planned.node.clone();
                let cached = task.cached;
                bus.send(
                    &shared.thread,
                    self.step,
                    StreamKind::Updates {
                        node,
                        update,
                        cached,
                    },
                );
            }
        }
        if let Ok(values) = self.state.channels() {
            bus.send(
                &shared.thread,
                self.step,
                StreamKind::Values(Value::Object(values)),
            );
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("an update cannot be stored: {}", chain(.0))]
    Channel(#[from] ChannelError),
}

/// Makes a commit the last one of a thread.
pub(crate) fn end_thread(
    shared: &RunShared,
    commit: &mut Commit,
    status: ThreadStatus,
    error: Option<&str>,
    output: Value,
    node: Option<&str>,
) {
    let (name, payload) = match status {
        ThreadStatus::Failed => ("thread.failed", json!({ "error": error, "node": node })),
        ThreadStatus::Cancelled => ("thread.cancelled", json!({ "reason": error })),
        _ => ("thread.done", json!({})),
    };
    commit.events.push(NewEvent {
        stream: shared.thread.to_string(),
        name: name.to_owned(),
        payload,
        thread: Some(shared.thread.clone()),
    });
    if let Some(parent) = &shared.parent {
        let end = ChildEnd {
            name: parent.name.clone(),
            thread: shared.thread.clone(),
            status,
            output: output.clone(),
            error: error.map(str::to_owned),
        };
        commit.signals.push(NewSignal {
            thread: parent.thread.clone(),
            kind: CHILD.to_owned(),
            // A thread may end again after a retry; each end is news.
            key: format!("{CHILD}:{}:{}", parent.name, shared.lease.token),
            payload: serde_json::to_value(end).unwrap_or_default(),
            revives: false,
        });
    }
    commit.waits = Some(Vec::new());
    commit.then = Then::End {
        status,
        error: error.map(str::to_owned),
        output: (!output.is_null()).then_some(output),
    };
}

/// The checkpoint of a fork: the state at a checkpoint, updated as if by a node.
pub(crate) fn forked<S: State>(
    graph: &Compiled<S>,
    thread: &crate::ids::ThreadId,
    input: &Value,
    rows: crate::checkpoint::StateRows,
    as_node: Option<&str>,
    update: Value,
) -> Result<NewCheckpoint, EngineError> {
    let update = S::Update::from_json(update)?;
    let mut state: S = rebuild(input, rows.rows)?;
    let mut changes = Changes::default();
    changes.add::<S>(&update)?;
    let bad_plan = |fault: String| EngineError::Fork {
        thread: thread.clone(),
        fault,
    };
    let mut plan = match rows.plan {
        Some(plan) => serde_json::from_value::<Plan>(plan).map_err(|error| {
            bad_plan(format!(
                "the plan of checkpoint {}: {error}",
                rows.checkpoint
            ))
        })?,
        None => Plan::entry(graph, &state).map_err(|error| bad_plan(error.to_string()))?,
    };
    state.apply(update);
    if let Some(node) = as_node {
        if !graph.nodes.contains_key(node) {
            return Err(EngineError::UnknownNode {
                graph: graph.name.to_string(),
                node: node.to_owned(),
            });
        }
        let outcome = Outcome::from(());
        let finished = [Finished::<S> {
            node,
            outcome: &outcome,
        }];
        let mut next = plan
            .next(graph, &finished, None, &state)
            .map_err(|error| bad_plan(error.to_string()))?;
        // What else was planned still is.
        plan.nodes.remove(node);
        next.nodes.append(&mut plan.nodes);
        plan.sends.retain(|send| send.node() != node);
        plan.sends.append(&mut next.sends);
        next.sends = plan.sends;
        plan = next;
    }
    plan.hops = 0;
    plan.version = Plan::VERSION;
    Ok(NewCheckpoint {
        parent: rows.checkpoint,
        branch: rows.branch,
        step: rows.step,
        source: Source::Update(as_node.unwrap_or_default().to_owned()),
        appends: changes.appends,
        changes: changes.changes,
        snapshot: None,
        plan: serde_json::to_value(&plan).unwrap_or_default(),
    })
}

fn write(task: &str, kind: WriteKind, value: Value) -> Write {
    Write {
        task: task.to_owned(),
        kind,
        name: String::new(),
        round: 0,
        value,
    }
}

/// Stored under [`WriteKind::Result`].
#[derive(serde::Serialize, serde::Deserialize)]
struct StoredOutcome {
    #[serde(rename = "u", default, skip_serializing_if = "Vec::is_empty")]
    updates: Vec<Value>,
    #[serde(rename = "g", default, skip_serializing_if = "Vec::is_empty")]
    goto: Vec<Target>,
}

fn outcome_to<S: State>(outcome: &Outcome<S>) -> Result<Value, Box<dyn std::error::Error>> {
    let mut updates = Vec::new();
    for update in &outcome.updates {
        updates.push(Value::Object(update.to_channels()?));
    }
    Ok(serde_json::to_value(StoredOutcome {
        updates,
        goto: outcome.goto.clone(),
    })?)
}

fn outcome_from<S: State>(value: Value) -> Result<Outcome<S>, Box<dyn std::error::Error>> {
    let stored: StoredOutcome = serde_json::from_value(value)?;
    let mut updates = Vec::new();
    for update in stored.updates {
        updates.push(S::Update::from_json(update)?);
    }
    Ok(Outcome {
        updates,
        goto: stored.goto,
    })
}

async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
