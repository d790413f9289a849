//! Telling those who follow a thread what its run does.

use serde_json::Value;

use crate::{
    checkpoint::{Receipt, Source, WaitRecord},
    engine::CheckpointInfo,
    follow::{Modes, Spot, StreamKind, TaskResult, Trigger},
    memo::Attempts,
    state::{State, Update},
};

use super::{
    Run, RunShared,
    tasks::{Status, Task},
};

/// A checkpoint that was written.
#[derive(Clone, Copy)]
pub(super) struct Landed {
    checkpoint: u64,
    parent: u64,
    at: jiff::Timestamp,
}

impl Landed {
    /// What a commit on a checkpoint has written, if it was one.
    pub fn on(parent: u64, receipt: &Receipt) -> Option<Self> {
        Some(Self {
            checkpoint: receipt.checkpoint?,
            parent,
            at: receipt.now,
        })
    }
}

impl RunShared {
    /// What those who follow the thread want to know.
    pub fn wanted(&self) -> Modes {
        self.engine.bus.wants(&self.thread)
    }

    /// Tells something that is not a part of a checkpoint.
    pub fn tell(&self, namespace: &[String], step: u64, kind: StreamKind) {
        let spot = Spot {
            step,
            on: self.base(),
            part_of: None,
        };
        self.engine.bus.send(&self.thread, namespace, spot, kind);
    }
}

impl<S: State> Run<S> {
    fn send(&self, landed: Option<Landed>, step: u64, kind: StreamKind) {
        let namespace = self.namespace();
        match landed {
            None => self.shared.tell(namespace, step, kind),
            Some(landed) => {
                let spot = Spot {
                    step,
                    on: landed.parent,
                    part_of: Some(landed.checkpoint),
                };
                let bus = &self.shared.engine.bus;
                bus.send(&self.shared.thread, namespace, spot, kind);
            }
        }
    }

    /// The tasks that are about to run, in the order of their paths. Costs nothing when nobody wants to know.
    pub(super) fn tell_started(&self, tasks: &mut [Task<S>]) {
        if !self.shared.wanted().has(Modes::TASKS) {
            return;
        }
        let mut started: Vec<_> = tasks
            .iter_mut()
            .filter(|task| matches!(task.status, Status::Ready))
            .collect();
        started.sort_by_key(|task| task.planned.order);
        for task in started {
            task.told = false;
            let argument = task.planned.argument.as_ref();
            let attempt = task.attempts.made + 1;
            let kind = started_item(&task.planned.key, &task.planned.node, attempt, argument);
            self.send(None, self.step + 1, kind);
        }
    }

    /// What came of the tasks that ran, in the order of their paths, although the step is not over.
    pub(super) fn tell_unfinished(&self, tasks: &mut [Task<S>]) {
        if !self.shared.wanted().has(Modes::TASKS) {
            return;
        }
        let mut ran: Vec<_> = tasks.iter_mut().filter(|task| !task.told).collect();
        ran.sort_by_key(|task| task.planned.order);
        for task in ran {
            task.told = true;
            if let Some(kind) = finished_item(task) {
                self.send(None, self.step + 1, kind);
            }
        }
    }

    /// What the tasks of a step did, in the order of their paths, and what became of the state.
    pub(super) fn tell(&self, tasks: &[Task<S>], landed: Option<Landed>) {
        let wanted = self.shared.wanted();
        for task in tasks {
            let Status::Done(outcome) = &task.status else {
                continue;
            };
            if wanted.has(Modes::TASKS)
                && (!task.told || task.cached)
                && let Some(kind) = finished_item(task)
            {
                self.send(landed, self.step, kind);
            }
            if !wanted.has(Modes::UPDATES) {
                continue;
            }
            let mut updates: Vec<Value> = outcome
                .updates
                .iter()
                .filter_map(|update| update.to_channels().ok().map(Value::Object))
                .collect();
            if updates.is_empty() {
                updates.push(Value::Null);
            }
            for update in updates {
                let kind = StreamKind::Updates {
                    task: task.planned.key.clone(),
                    node: task.planned.node.clone(),
                    update,
                    cached: task.cached,
                };
                self.send(landed, self.step, kind);
            }
        }
        self.tell_state(landed, Source::Step);
    }

    /// The state, and the checkpoint that it is now kept with.
    pub(super) fn tell_state(&self, landed: Option<Landed>, source: Source) {
        if !self.shared.engine.bus.is_followed(&self.shared.thread) {
            return;
        }
        if self.shared.wanted().has(Modes::VALUES)
            && let Ok(values) = self.state.channels()
        {
            let kind = StreamKind::Values(Value::Object(values));
            self.send(landed, self.step, kind);
        }
        if let Some(it) = landed {
            let info = CheckpointInfo {
                checkpoint: it.checkpoint,
                parent: Some(it.parent),
                branch: self.shared.branch,
                step: self.step,
                source,
                next: self.plan.names(),
                at: it.at,
            };
            self.send(landed, self.step, StreamKind::Checkpoint(info));
        }
    }

    /// The thread waits.
    pub(super) fn tell_suspended(&self, waits: Vec<WaitRecord>) {
        self.send(None, self.step, StreamKind::Suspended { waits });
    }
}

pub(super) fn started_item(
    task: &str,
    node: &str,
    attempt: u32,
    argument: Option<&Value>,
) -> StreamKind {
    StreamKind::TaskStarted {
        task: task.to_owned(),
        node: node.to_owned(),
        attempt,
        trigger: argument.map_or(Trigger::Edge, |argument| Trigger::Send(argument.clone())),
    }
}

/// An attempt that failed, and after which another one is made by itself.
pub(super) fn failed_item(task: &str, node: &str, attempts: &Attempts) -> StreamKind {
    StreamKind::TaskFinished {
        task: task.to_owned(),
        node: node.to_owned(),
        attempt: attempts.made,
        result: TaskResult::Failed {
            error: attempts.error.clone(),
            again: true,
        },
    }
}

fn finished_item<S: State>(task: &Task<S>) -> Option<StreamKind> {
    let (attempt, result) = match &task.status {
        Status::Done(_) => {
            let cached = task.cached;
            (task.attempts.made + 1, TaskResult::Done { cached })
        }
        Status::Suspended => {
            let memo = task.memo.lock();
            let waits = memo.waits.iter().map(|wait| wait.record.name.clone());
            let waits = waits.collect();
            (task.attempts.made + 1, TaskResult::Suspended { waits })
        }
        Status::Failed(failure) => {
            let error = failure.text.clone();
            let again = false;
            (task.attempts.made, TaskResult::Failed { error, again })
        }
        Status::Cancelled => (task.attempts.made + 1, TaskResult::Cancelled),
        // Told when it happened; or has not run.
        Status::RetryAt(_) | Status::Ready | Status::Yielded => return None,
    };
    Some(StreamKind::TaskFinished {
        task: task.planned.key.clone(),
        node: task.planned.node.clone(),
        attempt,
        result,
    })
}
