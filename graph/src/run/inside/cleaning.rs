//! Cleaning up inside when the thread is cancelled: subgraphs that have begun, from the inside out.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::{
    checkpoint::{Commit, Write},
    error::NodeError,
    memo::{Attempts, Memo},
    private::chain,
    run::{
        Broken, Run,
        apply::Written,
        attempt::{Job, TaskEnd},
        ending::{CLEAN_UP, CLEANUP},
        tasks::{Status, Task},
    },
    state::{Extent, State, Update, snapshot},
};

use super::{Inner, landing::record_write, record::Recording};

impl<S: State> Run<S> {
    /// Lets the subgraphs inside the tasks of a superstep clean up: each task that has begun one that wants to runs once more, only
    /// to get there. What they leave is put into the commit.
    pub(in crate::run) async fn clean_up_inside(
        &self,
        tasks: &mut [Task<S>],
        left: &mut Commit,
    ) -> Result<(), Broken> {
        let deadline = Instant::now() + CLEANUP;
        for task in tasks {
            if matches!(task.status, Status::Done(_)) {
                continue;
            }
            let key = &task.planned.key;
            let cleans = match &self.place {
                Some(place) => place.nest.lock().cleans(key),
                None => task.memo.lock().nest().lock().cleans(key),
            };
            if !cleans {
                continue;
            }
            let job = Job {
                handler: None,
                may_wait: false,
                cleaning: true,
                cancel: CancellationToken::new(),
                bound: Some(deadline.saturating_duration_since(Instant::now())),
                ..self.job(task, true)
            };
            let ended = tokio::select! {
                ended = job.run() => ended,
                () = self.shared.controls.lost.cancelled() => return Err(Broken),
            };
            if let TaskEnd::Lost = ended.end {
                return Err(Broken);
            }
            task.memo.lock().flush_memory(left);
        }
        Ok(())
    }
}

impl<T: State> Inner<T> {
    /// Lets the subgraphs inside clean up, and then the node of this one that does. What it hands back belongs to the state from
    /// which the subgraph goes on if the thread is resumed.
    pub(super) async fn clean_up(&mut self) -> Result<(), NodeError> {
        let mut left = self.run.commit();
        let mut tasks = self
            .run
            .tasks()
            .map_err(|fault| NodeError::msg(fault).fatal())?;
        self.run
            .clean_up_inside(&mut tasks, &mut left)
            .await
            .map_err(|Broken| NodeError::lost())?;
        let graph = self.run.graph.clone();
        let node = graph
            .on_cancel
            .as_ref()
            .and_then(|name| graph.nodes.get(name));
        if let Some(node) = node {
            let key = self.run.path(CLEAN_UP);
            let mut memo = Memo::default();
            for write in self.place.nest.lock().writes(&key) {
                memo.restore(&write);
            }
            let memo = Arc::new(Mutex::new(memo));
            let job = Job {
                run: self.run.shared.clone(),
                place: Some(self.place.clone()),
                node: node.clone(),
                state: self.run.state.clone(),
                key: key.clone(),
                step: self.run.step + 1,
                argument: None,
                memo: memo.clone(),
                attempts: Attempts::default(),
                handler: None,
                failure: None,
                alone: true,
                may_wait: false,
                cleaning: false,
                cancel: CancellationToken::new(),
                grace: self.run.grace,
                bound: Some(CLEANUP),
            };
            match job.run().await.end {
                TaskEnd::Done(outcome) => {
                    if let Some(write) = self.add_to_last(outcome.updates)? {
                        left.writes.push(write);
                    }
                }
                TaskEnd::Lost => return Err(NodeError::lost()),
                TaskEnd::Failed(failure) => {
                    let (thread, error) = (&self.run.shared.thread, failure.text);
                    tracing::error!(%thread, graph = %graph.name, %error, "cleaning up inside after a cancellation failed");
                }
                TaskEnd::Suspended
                | TaskEnd::RetryAt(_)
                | TaskEnd::Cancelled
                | TaskEnd::Yielded => {}
            }
            let mut memo = memo.lock();
            memo.flush_consumed(&mut left);
            memo.flush_said(&mut left);
            // Another cancellation cleans up again.
            left.forget.extend(self.place.nest.lock().forget_task(&key));
        }
        self.place.leave(left);
        Ok(())
    }

    /// The last record, with updates that were made after it.
    fn add_to_last(&mut self, updates: Vec<T::Update>) -> Result<Option<Write>, NodeError> {
        let place = self.place.clone();
        let nest = place.nest.lock();
        let last = nest
            .records(&place.path)
            .and_then(|all| all.last_key_value());
        let Some((round, recorded)) = last else {
            return Ok(None);
        };
        let mut recording = Recording::<T>::read(recorded).map_err(NodeError::msg)?;
        let mut changes = recording.written.json()?;
        for update in updates {
            if let Err(error) = update.to_channels() {
                tracing::error!(thread = %self.run.shared.thread, error = %chain(&error), "an update of the node that cleans up was dropped");
                continue;
            }
            changes.add::<T>(&update)?;
            Arc::make_mut(&mut self.run.state).apply(update);
        }
        if recording.full.is_some() {
            changes.changes.clear();
            recording.full = Some(snapshot(&*self.run.state, Extent::Usual)?);
        }
        recording.written = Written::Json(changes);
        recording.plan.get_or_insert_with(|| self.run.plan.clone());
        record_write(&place, u64::from(*round), recording).map(Some)
    }
}
