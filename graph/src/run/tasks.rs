//! The tasks of one superstep: what is remembered of them, waking them, running them, and keeping what they did.

use std::{
    future::poll_fn,
    sync::Arc,
    task::Poll,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use serde_json::Value;
use tokio::task::JoinSet;
use tracing::Instrument;

use crate::{
    builder::Node,
    checkpoint::{Commit, WaitKind, WaitRecord, Write, WriteKind},
    command::{Handover, Outcome, Target},
    context::wait_id,
    error::TaskFailure,
    memo::{Attempts, Memo, RETRY, Suspension, Waiting},
    nest::Kept,
    plan::Planned,
    state::{State, Update},
    waits::{arrival, timer},
};

use super::{
    Broken, Run,
    attempt::{Ended, Failure, Handler, Job, TaskEnd, attempts_write},
    pause::PAUSE,
};

/// When a task outlives its siblings by so much, what the siblings did is made durable without waiting for it.
const OUTLIVES: Duration = Duration::from_millis(100);

pub(super) struct Task<S: State> {
    pub planned: Planned,
    pub node: Arc<Node<S>>,
    pub memo: Arc<Mutex<Memo>>,
    pub attempts: Attempts,
    pub status: Status<S>,
    /// What went wrong, if an error handler has taken over: the node, the path and all the rest are the handler's then.
    pub failure: Option<Arc<TaskFailure>>,
    /// Whether what is to be kept of it is in the database.
    pub recorded: bool,
    /// Whether it was finished before this run, or its result came from the cache.
    pub cached: bool,
    /// Whether those who follow the thread know what came of it.
    pub told: bool,
    /// The key under which its result is cached, if it may be.
    pub cache_key: Option<String>,
}

pub(super) enum Status<S: State> {
    Ready,
    Suspended,
    RetryAt(jiff::Timestamp),
    Done(Outcome<S>),
    Failed(Failure),
    Cancelled,
    /// Stopped between two supersteps of its subgraph, because the process is to stop.
    Yielded,
}

impl<S: State> Task<S> {
    /// From now on, the task is the handler's.
    fn take_over(&mut self, handler: Handler<S>) {
        self.planned.node = handler.node.name.to_string();
        self.planned.key = handler.key;
        self.node = handler.node;
        self.memo = handler.memo;
        self.failure = Some(handler.failure);
        self.cache_key = None;
    }
}

impl<S: State> Run<S> {
    /// The planned tasks, with what is remembered of them.
    pub(super) fn tasks(&mut self) -> Result<Vec<Task<S>>, String> {
        let mut tasks = Vec::new();
        for mut planned in self.plan.tasks() {
            if self.place.is_some() {
                planned.key = self.path(&planned.key);
            }
            let node = self.node(&planned.node)?;
            let mut task = Task {
                planned,
                node,
                memo: Arc::default(),
                attempts: Attempts::default(),
                status: Status::Ready,
                failure: None,
                recorded: false,
                cached: false,
                told: true,
                cache_key: None,
            };
            self.remember(&mut task)?;
            if let Some(error) = &task.attempts.handed_over
                && let Some(handler) = self.handler(&task)
            {
                let failure = TaskFailure {
                    node: task.planned.node.clone(),
                    error: error.clone(),
                    attempts: task.attempts.made,
                };
                task.attempts = Attempts::default();
                task.status = Status::Ready;
                task.take_over(Handler::new(handler, &task.planned.key, failure));
                self.remember(&mut task)?;
            }
            tasks.push(task);
        }
        Ok(tasks)
    }

    fn node(&self, name: &str) -> Result<Arc<Node<S>>, String> {
        self.graph.nodes.get(name).cloned().ok_or_else(|| {
            format!(
                "node `{name}` is to run next, but graph `{}` has no such node (any more)",
                self.graph.name
            )
        })
    }

    /// The node that takes over when a task fails for good. A handler has none.
    fn handler(&self, task: &Task<S>) -> Option<Arc<Node<S>>> {
        let name = task.node.on_error.as_ref()?;
        let handler = self.graph.nodes.get(name).cloned()?;
        task.failure.is_none().then_some(handler)
    }

    /// Reads what a task has written in earlier runs.
    fn remember(&mut self, task: &mut Task<S>) -> Result<(), String> {
        let key = &task.planned.key;
        let mut memo = task.memo.lock();
        for write in self.recall(key, &mut memo) {
            let fault = |error: serde_json::Error| {
                format!("what task `{key}` has written cannot be read: {error}")
            };
            match write.kind {
                WriteKind::Step | WriteKind::Wait | WriteKind::Take => memo.restore(&write),
                WriteKind::Attempts => {
                    task.attempts = serde_json::from_value(write.value).map_err(fault)?;
                }
                WriteKind::Suspended => {
                    let stored: Suspension = serde_json::from_value(write.value).map_err(fault)?;
                    memo.said = stored.said;
                    memo.waits = stored.waits;
                    for wait in &mut memo.waits {
                        // In a copy of a thread: not the original's.
                        wait.record.id = self.id_of(wait);
                    }
                }
                WriteKind::Result => {
                    if !write.value.is_null() {
                        let outcome = outcome_from::<S>(write.value).map_err(|error| {
                            format!("the result of task `{key}` cannot be read: {error}")
                        })?;
                        task.status = Status::Done(outcome);
                    }
                }
                // The subgraph reads it from the nest.
                WriteKind::Sub => {}
            }
        }
        task.recorded = !matches!(task.status, Status::Ready) || !memo.waits.is_empty();
        task.cached = matches!(task.status, Status::Done(_));
        if let Status::Ready = task.status {
            let around = self.place.as_ref().map(|place| &*place.nest);
            if !memo.waits.is_empty() && !memo.is_answered(key, around) {
                task.status = Status::Suspended;
            } else if let Some(at) = task.attempts.retry_at {
                task.status = Status::RetryAt(at);
            }
        }
        Ok(())
    }

    /// The id of a wait of a task, or of something inside it.
    fn id_of(&self, wait: &Waiting) -> String {
        let (task, name) = (&wait.record.task, &wait.record.name);
        if wait.space == RETRY {
            return self.wait_id("retry", task, wait.round);
        }
        if task.ends_with(PAUSE) {
            return self.wait_id(task, name, wait.round);
        }
        let space = match wait.record.kind {
            WaitKind::Interrupt => "interrupt",
            WaitKind::Wait | WaitKind::Timer => "wait",
        };
        wait_id(
            &self.shared,
            self.root_step(),
            task,
            space,
            name,
            wait.round,
        )
    }

    /// What a task has written in earlier runs. What runs inside it has, goes into its nest.
    pub(super) fn recall(&mut self, task: &str, memo: &mut Memo) -> Vec<Write> {
        if let Some(place) = &self.place {
            return place.nest.lock().writes(task);
        }
        if self.writes.is_empty() {
            return Vec::new();
        }
        let inside: Vec<String> = self
            .writes
            .range(task.to_owned()..)
            .map(|(other, _)| other)
            .take_while(|other| other.starts_with(task))
            .filter(|other| is_inside(other, task))
            .cloned()
            .collect();
        let mut own = self.writes.remove(task).unwrap_or_default();
        let has_records = own.iter().any(|write| write.kind == WriteKind::Sub);
        if has_records || !inside.is_empty() {
            let nest = memo.nest();
            let mut nest = nest.lock();
            nest.recalled = true;
            for write in own.extract_if(.., |write| write.kind == WriteKind::Sub) {
                nest.put(write);
            }
            for write in inside.into_iter().filter_map(|t| self.writes.remove(&t)) {
                for write in write {
                    nest.put(write);
                }
            }
        }
        own
    }

    /// Hands signals and times that have come to the tasks that wait for them, in the order of the tasks. Returns whether a
    /// task can go on.
    pub(super) fn wake(&self, tasks: &mut [Task<S>]) -> bool {
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
                        if let Some(expiry) = self.expiry(wait, &mut mailbox) {
                            memo.expired(&task.planned.key, wait, expiry.signal);
                            task.status = Status::Ready;
                            woken = true;
                            continue;
                        }
                        let came = mailbox
                            .take(|signal| arrival(&wait.record, signal))
                            .map(|(value, number)| (value, Some(number)))
                            .or_else(|| {
                                wait.record
                                    .until
                                    .filter(|_| wait.record.kind != WaitKind::Interrupt)
                                    .is_some_and(|until| until <= now)
                                    .then(|| (timer(), None))
                            });
                        if let Some((value, number)) = came {
                            memo.arrived(&task.planned.key, wait, value, number);
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
    pub(super) async fn run_ready(&mut self, tasks: &mut [Task<S>]) -> Result<(), Broken> {
        let ready: Vec<usize> = (0..tasks.len())
            .filter(|index| matches!(tasks[*index].status, Status::Ready))
            .collect();
        let undone = tasks
            .iter()
            .filter(|task| !matches!(task.status, Status::Done(_)))
            .count();
        // Futures in futures in futures need a stack of their own from time to time.
        let is_deep = self.place.as_ref().is_some_and(|place| place.is_deep());
        if let [index] = ready[..]
            && !is_deep
        {
            let job = self.job(&tasks[index], undone == 1);
            let lost = self.shared.controls.lost.clone();
            let ended = tokio::select! {
                ended = job.run() => ended,
                () = lost.cancelled() => return Err(Broken),
            };
            return Self::settle(&mut tasks[index], ended);
        }
        let slots = Arc::new(tokio::sync::Semaphore::new(self.graph.parallel));
        let mut running = JoinSet::new();
        let mut overdue: Option<tokio::time::Instant> = None;
        for index in ready {
            let job = self.job(&tasks[index], undone == 1);
            let (slots, node) = (slots.clone(), tasks[index].node.clone());
            let is_brisk = !is_deep && node.brisk.expected();
            let task = async move {
                // Tasks take their turn in order; the semaphore is never closed.
                let _slot = slots.acquire_owned().await;
                let begun = Instant::now();
                let ended = job.run().await;
                node.brisk.note(begun.elapsed());
                (index, ended)
            }
            .in_current_span();
            if !is_brisk {
                running.spawn(task);
                continue;
            }
            let mut task = Box::pin(task);
            match poll_fn(|context| Poll::Ready(task.as_mut().poll(context))).await {
                Poll::Ready((index, ended)) => {
                    Self::settle(&mut tasks[index], ended)?;
                    overdue.get_or_insert_with(|| tokio::time::Instant::now() + OUTLIVES);
                }
                // Whoever polls it next is whom it wakes.
                Poll::Pending => {
                    running.spawn(task);
                }
            }
        }
        while !running.is_empty() {
            tokio::select! {
                joined = running.join_next() => match joined {
                    Some(Ok((index, ended))) => {
                        Self::settle(&mut tasks[index], ended)?;
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
                    self.record_overdue(tasks).await?;
                }
                () = self.shared.controls.lost.cancelled() => return Err(Broken),
            }
        }
        Ok(())
    }

    /// Keeps what has been done while some tasks take their time.
    async fn record_overdue(&self, tasks: &mut [Task<S>]) -> Result<(), Broken> {
        if self.place.as_ref().is_some_and(|place| !place.records) {
            return Ok(());
        }
        let waits = self.open_waits(tasks);
        let mut commit = self.commit();
        Self::record(tasks, &mut commit);
        if commit == self.commit() {
            return Ok(());
        }
        let path = self.place.as_ref().map_or("", |place| &place.path);
        commit.waits = Some(self.shared.list_waits(path, waits));
        match &self.place {
            None => self.land(commit, &[]).await.map(|_| ()),
            Some(place) => place.share(&self.shared, commit).await,
        }
    }

    pub(super) fn job(&self, task: &Task<S>, alone: bool) -> Job<S> {
        Job {
            run: self.shared.clone(),
            place: self.place.clone(),
            node: task.node.clone(),
            state: self.state.clone(),
            key: task.planned.key.clone(),
            step: self.step + 1,
            argument: task.planned.argument.clone(),
            memo: task.memo.clone(),
            attempts: task.attempts.clone(),
            handler: self.handler(task),
            failure: task.failure.clone(),
            alone,
            may_wait: self.place.as_ref().is_none_or(|p| p.outer.may_wait),
            cleaning: false,
            cancel: match &self.place {
                None => self.shared.controls.tasks.clone(),
                Some(place) => place.outer.cancel.clone(),
            },
            grace: self.grace,
            bound: None,
        }
    }

    pub(super) fn settle(task: &mut Task<S>, ended: Ended<S>) -> Result<(), Broken> {
        if let Some(handler) = ended.handler {
            task.take_over(handler);
        }
        task.attempts = ended.attempts;
        task.recorded = false;
        task.status = match ended.end {
            TaskEnd::Done(outcome) => Status::Done(outcome),
            TaskEnd::Suspended => Status::Suspended,
            TaskEnd::RetryAt(at) => Status::RetryAt(at),
            TaskEnd::Failed(failure) => Status::Failed(failure),
            TaskEnd::Cancelled => Status::Cancelled,
            TaskEnd::Yielded => Status::Yielded,
            TaskEnd::Lost => return Err(Broken),
        };
        Ok(())
    }

    /// Puts into a commit what is to be kept of tasks although the step is not over: results, what suspended tasks have
    /// learned, and what both have said.
    pub(super) fn record(tasks: &mut [Task<S>], commit: &mut Commit) {
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
                Status::Cancelled | Status::Yielded => {
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

    /// The same for tasks that have failed: a retry by hand (or of the task around a subgraph) has all attempts again.
    pub(super) fn record_failed(tasks: &mut [Task<S>], commit: &mut Commit) {
        for task in tasks {
            if let Status::Failed(_) = task.status {
                task.attempts.base = task.attempts.made;
                task.memo.lock().flush_memory(commit);
                commit
                    .writes
                    .push(attempts_write(&task.planned.key, &task.attempts));
            }
        }
    }

    /// Puts into a commit that all tasks of the step have to run again, with what they remember, once the program is put
    /// right.
    pub(super) fn record_void(tasks: &mut [Task<S>], commit: &mut Commit) {
        for task in tasks {
            let mut memo = task.memo.lock();
            memo.flush_memory(commit);
            memo.waits.clear();
            let key = &task.planned.key;
            let value = serde_json::to_value(memo.suspension()).unwrap_or_default();
            commit.writes.push(write(key, WriteKind::Suspended, value));
            commit
                .writes
                .push(write(key, WriteKind::Result, Value::Null));
        }
    }

    pub(super) fn open_waits(&self, tasks: &[Task<S>]) -> Vec<WaitRecord> {
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
                Status::RetryAt(at) => waits.push(self.retry_wait(task, at)),
                _ => {}
            }
        }
        waits
    }
}

/// Whether a task path is that of something inside a task.
pub(crate) fn is_inside(path: &str, task: &str) -> bool {
    path.strip_prefix(task)
        .is_some_and(|rest| rest.starts_with(['/', '+']))
}

pub(super) fn write(task: &str, kind: WriteKind, value: Value) -> Write {
    Write {
        task: task.to_owned(),
        kind,
        name: String::new(),
        round: 0,
        value,
        kept: None,
    }
}

/// Stored under [`WriteKind::Result`].
#[derive(serde::Serialize, serde::Deserialize)]
struct StoredOutcome {
    #[serde(rename = "u", default, skip_serializing_if = "Vec::is_empty")]
    updates: Vec<Value>,
    #[serde(rename = "g", default, skip_serializing_if = "Vec::is_empty")]
    goto: Vec<Target>,
    #[serde(rename = "h", default, skip_serializing_if = "Vec::is_empty")]
    handovers: Vec<Handover>,
    #[serde(rename = "k", default, skip_serializing_if = "Vec::is_empty")]
    kept: Vec<Kept>,
}

pub(super) fn outcome_to<S: State>(
    outcome: &Outcome<S>,
) -> Result<Value, Box<dyn std::error::Error>> {
    let mut updates = Vec::new();
    for update in &outcome.updates {
        updates.push(Value::Object(update.to_channels()?));
    }
    Ok(serde_json::to_value(StoredOutcome {
        updates,
        goto: outcome.goto.clone(),
        handovers: outcome.handovers.clone(),
        kept: outcome.kept.clone(),
    })?)
}

pub(super) fn outcome_from<S: State>(
    value: Value,
) -> Result<Outcome<S>, Box<dyn std::error::Error>> {
    let stored: StoredOutcome = serde_json::from_value(value)?;
    let mut updates = Vec::new();
    for update in stored.updates {
        updates.push(S::Update::from_json(update)?);
    }
    Ok(Outcome {
        updates,
        goto: stored.goto,
        handovers: stored.handovers,
        kept: stored.kept,
    })
}

async fn until(at: Option<tokio::time::Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}
