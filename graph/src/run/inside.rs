//! A run of a subgraph: inside a task of the graph around it, in the same run, under the same lease. Where the thread's own
//! graph makes checkpoints, it leaves records of its supersteps with that task; the next run of the task goes on from them.

mod cleaning;
mod landing;
mod record;

use std::sync::Arc;

use serde_json::Value;

use crate::{
    builder::Compiled,
    checkpoint::{Commit, WaitKind, WaitRecord, WriteKind},
    command::Handover,
    context::Context,
    error::NodeError,
    memo::{RETRY, Waiting},
    nest::Kept,
    plan::Plan,
    private::chain,
    state::{Changes, Extent, State, snapshot},
    subgraph::SubgraphMemory,
};

use super::{
    Broken, LIMIT, Place, Run,
    apply::SNAPSHOT_AFTER,
    tasks::{Status, Task},
};
use landing::record_write;
pub(crate) use record::recorded_state;
use record::{Given, Recording};

/// What a subgraph begins with.
pub(crate) enum Begin<T: State> {
    /// An update, on nothing or on what it has kept.
    Update(T::Update),
    /// The state of the graph around it, which has the same type.
    State(Arc<T>),
}

/// What a subgraph has come to.
pub(crate) struct Ended<T> {
    pub state: Arc<T>,
    /// What it has changed, if it began with the state of the graph around it.
    pub changes: Changes,
}

/// Runs a graph inside a task, from where it stood to its end.
pub(crate) async fn invoke<T: State>(
    context: &Context,
    graph: &Arc<Compiled<T>>,
    memory: SubgraphMemory,
    name: Option<&str>,
    begin: Begin<T>,
) -> Result<Ended<T>, NodeError> {
    let outer = &context.inner;
    outer.check_run()?;
    let place = Arc::new(Place::inside(outer, memory, name)?);
    let accumulates = memory == SubgraphMemory::Accumulating;
    if outer.cleaning && place.nest.lock().records(&place.path).is_none() {
        // It has not begun.
        return Err(NodeError::cancelled());
    }
    if accumulates {
        place.claim(&outer.run)?;
    }
    let mut inner = Inner::restore(place, graph.clone(), begin, accumulates)?;
    if outer.cleaning && inner.handovers.is_empty() && !inner.run.plan.is_empty() {
        inner.clean_up().await?;
        return Err(NodeError::cancelled());
    }
    inner.go().await
}

struct Inner<T: State> {
    run: Run<T>,
    place: Arc<Place>,
    /// The tasks of the superstep under way.
    tasks: Vec<Task<T>>,
    /// What it began with, until that is recorded.
    input: Option<Given<T>>,
    /// All that it has changed, if anybody will want to know.
    total: Option<Changes>,
    /// Whether of the total only the appended items are complete, and the rest is to be made from the state.
    is_long: bool,
    accumulates: bool,
    handovers: Vec<Handover>,
    log: Log,
}

/// The records since the last one that stands for all before it.
#[derive(Default)]
struct Log {
    records: u64,
    /// About how many bytes they take, as far as that is known.
    weight: usize,
    /// When so many are there, they may be put together.
    next: u64,
}

impl<T: State> Inner<T> {
    fn restore(
        place: Arc<Place>,
        graph: Arc<Compiled<T>>,
        begin: Begin<T>,
        accumulates: bool,
    ) -> Result<Self, NodeError> {
        let unfit = |fault: String| {
            NodeError::msg(format!(
                "what is stored does not fit subgraph `{}` at `{}`: {fault}",
                graph.name, place.path
            ))
            .fatal()
        };
        let mut records: Vec<(u32, Recording<T>)> = Vec::new();
        for (round, recorded) in place.nest.lock().records(&place.path).into_iter().flatten() {
            let recording = Recording::read(recorded).map_err(unfit)?;
            if recording.base {
                records.clear();
            }
            records.push((*round, recording));
        }
        let begun = records
            .iter_mut()
            .find_map(|(_, record)| record.input.take());
        let mut input = None;
        let mut total = None;
        let mut state = match begin {
            Begin::State(state) => {
                total = Some(Changes::default());
                if begun.is_none() {
                    input = Some(Given::State);
                }
                state
            }
            Begin::Update(update) => {
                let update = match begun {
                    // What was given then counts, whatever is given now.
                    Some(Given::Update(stored) | Given::Kept(stored)) => stored,
                    Some(Given::State) | None => {
                        if place.records {
                            let update = update.clone();
                            input = Some(if accumulates {
                                Given::Kept(update)
                            } else {
                                Given::Update(update)
                            });
                        }
                        update
                    }
                };
                let mut state = if accumulates {
                    let mut changes = Changes::default();
                    changes.add::<T>(&update)?;
                    total = Some(changes);
                    place
                        .past()
                        .state::<T>()
                        .map_err(|error| unfit(chain(&error)))?
                } else {
                    Arc::new(T::default())
                };
                Arc::make_mut(&mut state).apply(update);
                state
            }
        };
        let mut step = 0;
        let mut plan = None;
        let mut handovers = Vec::new();
        let mut is_long = false;
        let mut log = Log {
            next: SNAPSHOT_AFTER,
            ..Log::default()
        };
        for (round, record) in records {
            if round > 0 {
                step = if record.base { round.into() } else { step + 1 };
                if u64::from(round) != step {
                    return Err(unfit(format!("the record of superstep {step} is missing")));
                }
                log.records += 1;
            }
            if record.plan.is_some() {
                plan.clone_from(&record.plan);
            }
            if !record.base {
                log.weight += record.weight();
            }
            is_long |= record.full.is_some();
            if let Some(total) = &mut total {
                let changes = record.written.clone().json();
                total.merge::<T>(changes.map_err(|error| unfit(chain(&error)))?);
            }
            record
                .replay(Arc::make_mut(&mut state))
                .map_err(|error| unfit(chain(&error)))?;
            place.kept.lock().extend(record.kept);
            handovers = record.handovers;
        }
        let plan = match plan {
            Some(plan) if plan.version > Plan::VERSION => {
                return Err(unfit(format!(
                    "it was written by a newer release (format {}, known is {})",
                    plan.version,
                    Plan::VERSION
                )));
            }
            Some(plan) => plan,
            None => Arc::new(
                Plan::entry(&graph, &state).map_err(|error| NodeError::from(error).fatal())?,
            ),
        };
        {
            let mut memo = place.outer.memo.lock();
            memo.inside += 1;
            // Whether what is done already has only changed the state, nobody knows now.
            memo.spoke |= step > 0 || accumulates;
        }
        Ok(Self {
            run: Run::inside(graph, place.clone(), state, plan, step),
            place,
            tasks: Vec::new(),
            input,
            total,
            is_long,
            accumulates,
            handovers,
            log,
        })
    }

    async fn go(&mut self) -> Result<Ended<T>, NodeError> {
        let outer = self.place.outer.clone();
        while self.handovers.is_empty() && !self.run.plan.is_empty() {
            outer.check_run()?;
            // Another process goes on from the records, if there are any.
            let may_stop = self.place.records && outer.may_wait;
            if may_stop && outer.run.controls.drain.is_cancelled() {
                return Err(NodeError::yielded());
            }
            self.superstep().await?;
        }
        let mut kept = std::mem::take(&mut *self.place.kept.lock());
        let mut changes = self.total.take().unwrap_or_default();
        let state = self.run.state.clone();
        let mut ended = Ended {
            state: state.clone(),
            changes: Changes::default(),
        };
        if self.accumulates {
            let mut full = None;
            if self.is_long {
                changes.changes.clear();
                full = Some(snapshot(&*state, Extent::Usual)?);
            }
            kept.push(Kept {
                namespace: self.place.kept_as.clone(),
                appends: changes.appends,
                changes: changes.changes,
                full,
                live: Some(state),
            });
        } else {
            ended.changes = changes;
        }
        outer.memo.lock().kept.extend(kept);
        if self.handovers.is_empty() {
            Ok(ended)
        } else {
            Err(NodeError::handover(std::mem::take(&mut self.handovers)))
        }
    }

    async fn superstep(&mut self) -> Result<(), NodeError> {
        let run = &mut self.run;
        let marked = run.plan.hops >= run.graph.recursion_limit && {
            let nest = self.place.nest.lock();
            let mark = nest.get(&run.path(LIMIT), WriteKind::Attempts, "", 0);
            mark.is_some()
        };
        if let Some((mark, text)) = run.limit(marked) {
            if self.place.records {
                let mut left = run.commit();
                left.writes.push(mark);
                self.leave(left);
            }
            let name = &self.run.graph.name;
            return Err(NodeError::msg(format!("subgraph `{name}`: {text}")).fatal());
        }
        self.pause()?;
        let run = &mut self.run;
        self.tasks = run.tasks().map_err(|fault| NodeError::msg(fault).fatal())?;
        run.take_cached(&mut self.tasks).await;
        let now = run.shared.now();
        for task in &mut self.tasks {
            match task.status {
                Status::RetryAt(at) if at <= now => {
                    task.attempts.retry_at = None;
                    task.status = Status::Ready;
                    run.waited();
                }
                Status::Ready if !task.memo.lock().waits.is_empty() => run.waited(),
                _ => {}
            }
        }
        run.tell_started(&mut self.tasks);
        run.run_ready(&mut self.tasks)
            .await
            .map_err(|Broken| NodeError::lost())?;
        if run.shared.is_broken() {
            return Err(NodeError::lost());
        }
        let all = |is: fn(&Status<T>) -> bool| self.tasks.iter().all(|task| is(&task.status));
        let any = |is: fn(&Status<T>) -> bool| self.tasks.iter().any(|task| is(&task.status));
        if all(|status| matches!(status, Status::Done(_))) {
            return self.land().await;
        }
        if self.place.outer.cancel.is_cancelled() || any(|s| matches!(s, Status::Cancelled)) {
            self.set_aside();
            return Err(NodeError::cancelled());
        }
        let yielded = any(|status| matches!(status, Status::Yielded));
        let waits = self.waits();
        for task in self.set_aside() {
            if let Status::Failed(failure) = task.status {
                let node = &task.planned.node;
                return Err(failure.error.context(format!("node `{node}`")));
            }
        }
        if yielded {
            return Err(NodeError::yielded());
        }
        self.place.outer.memo.lock().waits.extend(waits);
        Err(NodeError::suspended())
    }

    /// Stepping by hand.
    fn pause(&mut self) -> Result<(), NodeError> {
        let stops = self.run.stops();
        if stops.is_empty() {
            return Ok(());
        }
        let outer = self.place.outer.clone();
        if !self.place.records || !outer.may_wait {
            let name = &self.run.graph.name;
            return Err(NodeError::msg(format!(
                "subgraph `{name}` is to stop before or after its nodes, but it cannot wait here: it is stateless, or the thread is being cancelled"
            ))
            .fatal());
        }
        let all = stops.len();
        let open: Vec<Waiting> = {
            let nest = self.place.nest.lock();
            stops
                .into_iter()
                .filter(|stop| {
                    let task = &stop.record.task;
                    nest.get(task, WriteKind::Wait, &stop.space, 0).is_none()
                })
                .collect()
        };
        if open.len() < all {
            self.run.waited();
        }
        if open.is_empty() {
            return Ok(());
        }
        let left = self.run.commit();
        self.leave(left);
        outer.memo.lock().waits.extend(open);
        Err(NodeError::suspended())
    }

    /// What its tasks wait for.
    fn waits(&self) -> Vec<Waiting> {
        let mut waits = Vec::new();
        for task in &self.tasks {
            match task.status {
                Status::Suspended => waits.extend(task.memo.lock().waits.iter().cloned()),
                Status::RetryAt(at) => waits.push(Waiting {
                    record: self.run.retry_wait(task, at),
                    space: RETRY.to_owned(),
                    round: task.attempts.made,
                }),
                _ => {}
            }
        }
        waits
    }

    /// Keeps what the tasks of a superstep that is not over have done.
    fn set_aside(&mut self) -> Vec<Task<T>> {
        let mut tasks = std::mem::take(&mut self.tasks);
        if !self.run.shared.is_broken() {
            self.run.tell_unfinished(&mut tasks);
        }
        if self.place.records && !tasks.is_empty() {
            let mut left = self.run.commit();
            Run::record(&mut tasks, &mut left);
            Run::record_failed(&mut tasks, &mut left);
            self.leave(left);
        }
        tasks
    }

    /// Leaves something with the task around, and before that, what it began with.
    fn leave(&mut self, mut left: Commit) {
        if let Some(input) = self.input.take() {
            let recording = Recording {
                input: Some(input),
                cleans: self.run.graph.on_cancel.is_some(),
                plan: Some(self.run.plan.clone()),
                ..Recording::default()
            };
            match record_write(&self.place, 0, recording) {
                Ok(write) => left.writes.push(write),
                Err(error) => {
                    tracing::error!(path = self.place.path, %error, "what a subgraph began with cannot be kept");
                }
            }
        }
        self.run.shared.list_waits(&self.place.path, Vec::new());
        self.place.leave(left);
    }
}

impl<T: State> Drop for Inner<T> {
    /// Also when its future is dropped, because it took too long: what its tasks have learned stays.
    fn drop(&mut self) {
        self.set_aside();
        let mut memo = self.place.outer.memo.lock();
        memo.inside = memo.inside.saturating_sub(1);
    }
}

impl<S: State> Run<S> {
    /// A run of a subgraph.
    fn inside(
        graph: Arc<Compiled<S>>,
        place: Arc<Place>,
        state: Arc<S>,
        plan: Arc<Plan>,
        step: u64,
    ) -> Self {
        let shared = place.outer.run.clone();
        Self {
            // What nobody writes down need not be JSON.
            keeps: shared.engine.store.keeps_values() || !place.records,
            shared,
            graph,
            state,
            plan,
            step,
            writes: std::collections::BTreeMap::new(),
            since_snapshot: 0,
            changed_since_snapshot: 0,
            next_snapshot: 0,
            extent: Extent::Usual,
            failed: false,
            grace: place.outer.grace,
            place: Some(place),
        }
    }

    /// The timer of a task that is to be tried again.
    pub(super) fn retry_wait(&self, task: &Task<S>, at: jiff::Timestamp) -> WaitRecord {
        WaitRecord {
            id: self.wait_id("retry", &task.planned.key, task.attempts.made),
            name: "retry".to_owned(),
            kind: WaitKind::Timer,
            task: task.planned.key.clone(),
            value: Value::Null,
            signals: Vec::new(),
            children: Vec::new(),
            until: Some(at),
        }
    }
}
