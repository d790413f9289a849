//! How a thread ends: done, failed, cancelled.

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use crate::{
    builder::Node,
    checkpoint::{
        CancelRequest, Commit, NewEvent, NewSignal, Source, Then, ThreadFilter, ThreadStatus,
        WriteKind,
    },
    command::Outcome,
    follow::StreamKind,
    kept::output,
    memo::{Attempts, Memo},
    private::chain,
    state::{State, Update},
    waits::{CHILD, ChildEnd},
};

use super::{
    Broken, ENDED, Run, RunShared,
    attempt::{Job, TaskEnd},
    tasks::{Task, is_inside, write},
    tell::Landed,
};

/// How long a node has to clean up after a cancellation.
pub(super) const CLEANUP: Duration = Duration::from_secs(30);
/// Its task path.
pub(super) const CLEAN_UP: &str = "~cancel";

impl<S: State> Run<S> {
    pub(super) fn output(&self) -> Value {
        output(&self.graph, &self.state)
    }

    /// Makes a commit the last one of a thread that ran to its end.
    pub(super) fn done(&self, commit: &mut Commit) {
        // Whoever keeps the state need not be told what it returns; a parent needs it as JSON.
        let output = if self.keeps && self.shared.parent.is_none() {
            Value::Null
        } else {
            self.output()
        };
        self.end(commit, ThreadStatus::Done, None, output, None);
        self.keep(commit);
    }

    /// Makes a commit the last one: the thread's own event, and the signal to its parent.
    pub(super) fn end(
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

    pub(super) fn ended(&self, status: ThreadStatus) {
        tracing::info!(thread = %self.shared.thread, graph = %self.graph.name, status = status.as_str(), step = self.step, "thread ended");
        let kind = StreamKind::Ended(status);
        self.shared.tell(&[], self.step, kind);
    }

    pub(super) async fn fail(
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
    pub(super) async fn cancel(&mut self, mut tasks: Vec<Task<S>>) -> Result<(), Broken> {
        let shared = self.shared.clone();
        let reason = shared
            .controls
            .reason
            .lock()
            .clone()
            .unwrap_or_else(|| "no reason was given".to_owned());
        let mut commit = self.commit();
        Self::record(&mut tasks, &mut commit);
        self.tell_unfinished(&mut tasks);
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

        // What accumulating subgraphs of the step would have kept is void.
        shared.claims.lock().clear();
        if tasks.is_empty() {
            // They sleep. What does not fit the program any more cannot clean up.
            tasks = self.tasks().unwrap_or_default();
        }
        let mut inside = self.commit();
        self.clean_up_inside(&mut tasks, &mut inside).await?;
        let mut commit = self.commit();
        if let Some(node) = self
            .graph
            .on_cancel
            .clone()
            .and_then(|name| self.graph.nodes.get(&name).cloned())
        {
            self.clean_up(&node, &mut commit).await?;
        }
        add_inside(&mut commit, inside);
        let output = self.output();
        self.end(
            &mut commit,
            ThreadStatus::Cancelled,
            Some(&reason),
            output,
            None,
        );
        let (parent, source) = (
            commit.base,
            commit.checkpoint.as_ref().map(|it| it.source.clone()),
        );
        let receipt = self.land(commit, &[]).await?;
        if let Some(source) = source {
            self.tell_state(Landed::on(parent, &receipt), source);
        }
        self.ended(ThreadStatus::Cancelled);
        Ok(())
    }

    pub(super) async fn clean_up(
        &mut self,
        node: &Arc<Node<S>>,
        commit: &mut Commit,
    ) -> Result<(), Broken> {
        let mut memo = Memo::default();
        for write in self.recall(CLEAN_UP, &mut memo) {
            memo.restore(&write);
        }
        let memo = Arc::new(Mutex::new(memo));
        // What accumulating subgraphs of the step would have kept is void.
        self.shared.claims.lock().clear();
        let job = Job {
            run: self.shared.clone(),
            place: None,
            node: node.clone(),
            state: self.state.clone(),
            key: CLEAN_UP.to_owned(),
            step: self.step + 1,
            argument: None,
            memo: memo.clone(),
            attempts: Attempts::default(),
            handler: None,
            failure: None,
            alone: true,
            may_wait: false,
            cleaning: false,
            cancel: CancellationToken::new(),
            grace: self.grace,
            bound: Some(CLEANUP),
        };
        let lost = self.shared.controls.lost.clone();
        let ended = tokio::select! {
            ended = job.run() => ended,
            () = lost.cancelled() => return Err(Broken),
        };
        let outcome = match ended.end {
            TaskEnd::Done(outcome) => outcome,
            TaskEnd::Lost => return Err(Broken),
            TaskEnd::Failed(failure) => {
                let error = failure.text;
                tracing::error!(thread = %self.shared.thread, %error, "cleaning up after a cancellation failed");
                Outcome::from(())
            }
            TaskEnd::Suspended | TaskEnd::RetryAt(_) | TaskEnd::Cancelled | TaskEnd::Yielded => {
                Outcome::from(())
            }
        };
        let kept = outcome.kept;
        let mut updates = Vec::new();
        for update in outcome.updates {
            if let Err(error) = update.to_channels() {
                tracing::error!(thread = %self.shared.thread, error = %chain(&error), "an update of the node that cleans up was dropped");
                continue;
            }
            Arc::make_mut(&mut self.state).apply(update.clone());
            updates.push(update);
        }
        // Each of them can be written down.
        let changes = self
            .written(&updates)
            .and_then(|written| self.add_kept(kept, written))
            .unwrap_or_default();
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
                    .filter(|write| write.task != CLEAN_UP && !is_inside(&write.task, CLEAN_UP)),
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
}

/// Adds what cleaning up inside has left, which came first.
fn add_inside(commit: &mut Commit, mut inside: Commit) {
    commit.writes.retain(|write| {
        !inside.forget.iter().any(|key| write.is(key))
            && !inside.writes.iter().any(|other| write.has_key(other))
    });
    commit.writes.append(&mut inside.writes);
    commit.forget.append(&mut inside.forget);
    commit.consumed.append(&mut inside.consumed);
    inside.events.append(&mut commit.events);
    inside.children.append(&mut commit.children);
    inside.signals.append(&mut commit.signals);
    inside.cancels.append(&mut commit.cancels);
    commit.events = inside.events;
    commit.children = inside.children;
    commit.signals = inside.signals;
    commit.cancels = inside.cancels;
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
    if matches!(status, ThreadStatus::Failed | ThreadStatus::Cancelled) {
        commit
            .writes
            .push(write(ENDED, WriteKind::Attempts, Value::Null));
    }
    commit.waits = Some(Vec::new());
    commit.then = Then::End {
        status,
        error: error.map(str::to_owned),
        output: (!output.is_null()).then_some(output),
    };
}
