//! What a node has besides the state: who it is, waits, children, durable steps, and what it says.

mod speaking;
mod waiting;

use std::{future::Future, sync::Arc, time::Duration};

use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    builder::{CompiledGraph, name_fault},
    checkpoint::{Commit, Write, WriteKind},
    documents::Documents,
    error::{EngineError, NodeError, TaskFailure},
    ids::{IdempotencyKey, ThreadId},
    memo::Memo,
    observer::Point,
    run::{Begin, Broken, Place, RunShared, invoke},
    state::State,
    subgraph::SubgraphMemory,
};

/// The largest name of a wait, step or child, in bytes.
const MAX_NAME_BYTES: usize = 200;

/// One attempt of one task, as its node sees it. Cheap to clone.
///
/// A node may run several times for one result: after a wait, after a failure, after a crash. What the context's methods
/// returned before, they return again, so that the second time takes the same way up to the new part. For that, a node
/// must call them in the same order whenever it gets the same answers.
#[derive(Clone)]
pub struct Context {
    pub(crate) inner: Arc<TaskContext>,
}

pub(crate) struct TaskContext {
    pub run: Arc<RunShared>,
    pub node: Arc<str>,
    /// The subgraph that the node is in; absent: the thread's own graph.
    pub place: Option<Arc<Place>>,
    /// The task's path in its step, from the outside in.
    pub task: String,
    /// The number of the step that it is part of, in its graph.
    pub step: u64,
    pub attempt: u32,
    pub argument: Option<Value>,
    pub failure: Option<Arc<TaskFailure>>,
    /// Whether no other task of the step can take a signal before it, so that waits may look into the mailbox at once.
    pub alone: bool,
    /// Whether it may wait at all.
    pub may_wait: bool,
    /// Whether it runs only to get to the subgraphs inside that have to clean up: it does nothing that it has not done before.
    pub cleaning: bool,
    pub cancel: CancellationToken,
    /// How long a task may go on after a cancellation.
    pub grace: Duration,
    pub memo: Arc<Mutex<Memo>>,
    pub alive: Mutex<tokio::time::Instant>,
}

impl TaskContext {
    pub fn namespace(&self) -> &[String] {
        self.place.as_ref().map_or(&[], |place| &place.namespace)
    }

    /// Whether no other task of the thread can take a signal before it.
    fn is_alone(&self) -> bool {
        let around = |place: &Arc<Place>| {
            let only = {
                let memo = place.outer.memo.lock();
                memo.inside == 1 && memo.waits.is_empty()
            };
            only && place.outer.is_alone()
        };
        self.alone && self.place.as_ref().is_none_or(around)
    }

    /// Whether what it remembers is kept.
    fn records(&self) -> bool {
        self.place.as_ref().is_none_or(|place| place.records)
    }

    /// The number of the thread's superstep.
    fn root_step(&self) -> u64 {
        self.place
            .as_ref()
            .map_or(self.step, |place| place.root_step)
    }

    fn heartbeat(&self) {
        *self.alive.lock() = tokio::time::Instant::now();
        if let Some(place) = &self.place {
            place.outer.heartbeat();
        }
    }

    pub fn check_run(&self) -> Result<(), NodeError> {
        if self.run.is_broken() {
            return Err(NodeError::lost());
        }
        if self.cancel.is_cancelled() {
            return Err(NodeError::cancelled());
        }
        self.heartbeat();
        Ok(())
    }
}

impl Context {
    /// The thread that runs.
    pub fn thread(&self) -> &ThreadId {
        &self.inner.run.thread
    }

    /// The node that runs.
    pub fn node(&self) -> &str {
        &self.inner.node
    }

    /// Which attempt of the task this is, from 1. Counted over crashes; a re-run after a wait is the same attempt.
    pub fn attempt(&self) -> u32 {
        self.inner.attempt
    }

    /// The branch of the thread's history that runs; the first is 0.
    pub fn branch(&self) -> u32 {
        self.inner.run.branch
    }

    /// The subgraph in which the node runs, from the outside in: the tasks of the subgraphs around it. Empty in the thread's
    /// own graph. A task is called as its node, with `{index}:` before it if a [`Send`](crate::Send) started it, and
    /// `+{name}` after it if the subgraph was [invoked](Context::invoke).
    pub fn namespace(&self) -> &[String] {
        self.inner.namespace()
    }

    /// The number of the superstep that the task is part of, from 1, in its graph: a subgraph counts its own.
    pub fn step_number(&self) -> u64 {
        self.inner.step
    }

    /// The argument of the [`Send`](crate::Send) that started this task.
    pub fn argument<T: DeserializeOwned>(&self) -> Result<T, NodeError> {
        let argument = self.inner.argument.as_ref().ok_or_else(|| {
            NodeError::msg(format!(
                "node `{}` was started by an edge and has no argument",
                self.node()
            ))
            .fatal()
        })?;
        T::deserialize(argument).map_err(|error| NodeError::from(error).fatal())
    }

    /// What went wrong, if the node has taken over from one that failed for good
    /// ([`GraphBuilder::on_error`](crate::GraphBuilder::on_error)).
    pub fn failure(&self) -> Option<&TaskFailure> {
        self.inner.failure.as_deref()
    }

    /// Long-term memory: documents that belong to no thread. What is written there is written at once, and not with the commit of
    /// the step; see [`graph::documents`](crate::documents). An error if there is no store of them.
    pub fn documents(&self) -> Result<Documents, NodeError> {
        let documents = self.inner.run.engine.documents.clone();
        documents.ok_or_else(|| NodeError::from(EngineError::NoDocuments).fatal())
    }

    // ---- subgraphs ----

    /// Runs a graph inside this task, to its end, and returns its last state.
    ///
    /// Whatever goes in a node at the top goes inside too; when it waits, so does this task. As the other methods here, this
    /// one remembers (see [`SubgraphMemory`]): when the node runs again, a resumable or accumulating graph goes on where it
    /// stood, with the update it was begun with, and one that has ended returns at once. The same name again in one task is
    /// the next invocation. When the graph addresses its parent ([`Command::parent`](crate::Command::parent)), what comes
    /// back is an error that must be returned with `?`, and the command is what this node hands back.
    ///
    /// ```
    /// # use std::sync::Arc;
    /// # use graph::{CompiledGraph, Context, NodeError, SubgraphMemory};
    /// # #[derive(Clone, Default, graph::State)]
    /// # struct Talk { #[channel(append)] said: Vec<String> }
    /// # #[derive(Clone, Default, graph::State)]
    /// # struct Day { talks: usize }
    /// # async fn node(talk: CompiledGraph<Talk>, ctx: Context) -> Result<DayUpdate, NodeError> {
    /// let hello = TalkUpdate::default().said(vec!["hello".into()]);
    /// let talk = ctx.invoke("talk", &talk, SubgraphMemory::Accumulating, hello).await?;
    /// Ok(DayUpdate::default().talks(talk.said.len()))
    /// # }
    /// ```
    pub async fn invoke<T: State>(
        &self,
        name: &str,
        graph: &CompiledGraph<T>,
        memory: SubgraphMemory,
        update: T::Update,
    ) -> Result<Arc<T>, NodeError> {
        if let Some(fault) = name_fault(name) {
            let shown: String = name.chars().take(50).collect();
            return Err(NodeError::msg(format!(
                "node `{}`: `{shown}` cannot be the name of a subgraph: {fault}",
                self.inner.node
            ))
            .fatal());
        }
        let begin = Begin::Update(update);
        let ended = invoke(self, &graph.inner, memory, Some(name), begin).await?;
        Ok(ended.state)
    }

    // ---- effects ----

    /// Does something once: runs the effect and remembers its result in the database before it returns. A re-run gets the
    /// remembered result. An error is not remembered.
    ///
    /// The key is the same whenever this step of this task is tried: hand it to systems that know idempotency keys, because
    /// a crash between the effect and its record runs the effect again. The same name again in one task is the next step.
    pub async fn step<T, E, F, Fut>(&self, name: &str, effect: F) -> Result<T, NodeError>
    where
        T: Serialize + DeserializeOwned,
        E: Into<NodeError>,
        F: FnOnce(IdempotencyKey) -> Fut,
        Fut: Future<Output = Result<T, E>>,
    {
        self.check_name(name)?;
        self.inner.check_run()?;
        self.check_memory(name)?;
        let inner = &*self.inner;
        let round = {
            let mut memo = inner.memo.lock();
            let round = memo.round("step", name);
            if let Some(value) = memo.get(WriteKind::Step, name, round) {
                let value = value.clone();
                return serde_json::from_value(value).map_err(|error| {
                    NodeError::from(error)
                        .context(format!(
                            "the remembered result of step `{name}` is not of the right type"
                        ))
                        .fatal()
                });
            }
            round
        };
        if inner.cleaning {
            return Err(NodeError::cancelled());
        }
        let key = IdempotencyKey::new(digest(
            &[
                inner.run.thread.as_str(),
                &inner.run.branch.to_string(),
                &inner.root_step().to_string(),
                &inner.task,
                "step",
                name,
                &round.to_string(),
            ],
            16,
        ));
        let span = tracing::debug_span!(
            "step",
            thread = %inner.run.thread,
            node = %inner.node,
            name,
        );
        let result = effect(key).instrument(span).await.map_err(Into::into)?;
        let value = serde_json::to_value(&result)?;
        let point = |name| (&inner.run.thread, &*inner.node, name);
        let (thread, node, step) = point(name);
        inner.run.engine.observe(&Point::StepRemembering {
            thread,
            node,
            name: step,
        });
        let write = Write {
            task: inner.task.clone(),
            kind: WriteKind::Step,
            name: name.to_owned(),
            round,
            value: value.clone(),
            kept: None,
        };
        match &inner.place {
            None => inner.run.write(vec![write]).await?,
            Some(place) => {
                let mut commit = Commit::on(inner.run.base());
                commit.writes.push(write);
                place
                    .share(&inner.run, commit)
                    .await
                    .map_err(|Broken| NodeError::lost())?;
            }
        }
        inner.run.engine.observe(&Point::StepRemembered {
            thread,
            node,
            name: step,
        });
        inner.memo.lock().learn(WriteKind::Step, name, round, value);
        self.heartbeat();
        Ok(result)
    }

    // ---- being stopped ----

    /// Comes back when the thread is being cancelled.
    pub async fn cancelled(&self) {
        self.inner.cancel.cancelled().await;
    }

    /// Whether the thread is being cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.inner.cancel.is_cancelled()
    }

    /// A sign of life, for nodes with an idle timeout. In a subgraph, it is one of the nodes around it too.
    pub fn heartbeat(&self) {
        self.inner.heartbeat();
    }

    /// What is to be remembered cannot be in a subgraph of which nothing is.
    fn check_memory(&self, name: &str) -> Result<(), NodeError> {
        if self.inner.records() {
            return Ok(());
        }
        Err(NodeError::msg(format!(
            "node `{}` is in a stateless subgraph, of which nothing is remembered: it can neither wait, ask, nor look for signals, nor have durable steps (`{name}`); make the subgraph resumable",
            self.inner.node
        ))
        .fatal())
    }

    fn check_name(&self, name: &str) -> Result<(), NodeError> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
            let shown: String = name.chars().take(50).collect();
            return Err(NodeError::msg(format!(
                "node `{}`: `{shown}` cannot be a name; it must have 1 to {MAX_NAME_BYTES} bytes and no control characters",
                self.inner.node
            ))
            .fatal());
        }
        Ok(())
    }

    /// How long ago the last sign of life was.
    pub(crate) fn idle(&self) -> Duration {
        self.inner.alive.lock().elapsed()
    }
}

impl std::fmt::Debug for Context {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Context")
            .field("thread", self.thread())
            .field("task", &self.inner.task)
            .field("step", &self.inner.step)
            .field("attempt", &self.inner.attempt)
            .finish_non_exhaustive()
    }
}

/// The id of a wait of this branch.
pub(crate) fn wait_named(branch: u32, space: &str, hash: &str) -> String {
    match space {
        "wait" | "retry" => format!("{branch}{NO_QUESTION}{hash}"),
        _ => format!("{branch}.{hash}"),
    }
}

/// After the branch, in the ids of waits that are no questions.
const NO_QUESTION: &str = ".w.";

/// Whether an id is that of a wait that nobody can answer: for a signal, a child or a time.
pub(crate) fn is_no_question(wait: &str) -> bool {
    wait.split_once(NO_QUESTION)
        .is_some_and(|(branch, _)| branch.parse::<u32>().is_ok())
}

/// The id of a wait: the same whenever the task comes to it, and in no other thread or branch.
pub(crate) fn wait_id(
    run: &RunShared,
    step: u64,
    task: &str,
    space: &str,
    name: &str,
    round: u32,
) -> String {
    let hash = digest(
        &[
            run.thread.as_str(),
            &run.branch.to_string(),
            &step.to_string(),
            task,
            space,
            name,
            &round.to_string(),
        ],
        12,
    );
    wait_named(run.branch, space, &hash)
}

/// The first bytes of a hash over parts, as hexadecimal digits.
pub(crate) fn digest(parts: &[&str], bytes: usize) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(part.len().to_le_bytes());
        hash.update(part.as_bytes());
    }
    hex::encode(&hash.finalize()[..bytes])
}
