//! What a node has besides the state: who it is, waits, children, durable steps, and what it says.

use std::{future::Future, sync::Arc, time::Duration};

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use sha2::{Digest, Sha256};
use tokio_util::sync::CancellationToken;
use tracing::Instrument;

use crate::{
    builder::{CompiledGraph, name_fault},
    checkpoint::{
        Appended, CancelRequest, Commit, NewEvent, NewSignal, NewThread, Parent, StorageError,
        WaitKind, WaitRecord, Write, WriteKind,
    },
    documents::Documents,
    error::{EngineError, NodeError, TaskFailure},
    follow::{MessageChunk, Modes, StreamKind},
    ids::{IdempotencyKey, ThreadId},
    memo::{Emission, Memo, Waiting},
    observer::Point,
    run::{Begin, Broken, Place, RunShared, invoke},
    state::State,
    subgraph::SubgraphMemory,
    waits::{Arrived, RESERVED, WaitFor, arrival, timer},
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

    // ---- waiting ----

    /// Asks something and suspends the thread until the answer has come ([`Engine::answer`](crate::Engine::answer)).
    ///
    /// The same name again in one task is the next question.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn interrupt<A: DeserializeOwned>(
        &self,
        name: &str,
        question: &(impl Serialize + ?Sized + Sync),
    ) -> Result<A, NodeError> {
        self.check_name(name)?;
        let round = self.inner.memo.lock().round("interrupt", name);
        let wait = WaitRecord {
            id: self.wait_id("interrupt", name, round),
            name: name.to_owned(),
            kind: WaitKind::Interrupt,
            task: self.inner.task.clone(),
            value: serde_json::to_value(question)?,
            signals: Vec::new(),
            children: Vec::new(),
            until: None,
        };
        let value = self.wait(wait, round)?;
        serde_json::from_value(value).map_err(|error| {
            NodeError::from(error)
                .context(format!("the answer to `{name}` is not of the right type"))
                .fatal()
        })
    }

    /// The id that the coming interrupt of this name will have, so that it can stand in an event said before it.
    pub fn interrupt_id(&self, name: &str) -> String {
        let round = self.inner.memo.lock().next_round("interrupt", name);
        self.wait_id("interrupt", name, round)
    }

    /// Suspends the thread until the first of several things comes: the oldest matching signal in the mailbox, or the time.
    ///
    /// The same name again in one task is the next wait. Signals that nobody waits for stay in the mailbox.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn wait_any(&self, name: &str, what: &WaitFor) -> Result<Arrived, NodeError> {
        self.check_name(name)?;
        if what.signals.is_empty() && what.children.is_empty() && what.until.is_none() {
            return Err(NodeError::msg(format!(
                "`{name}` waits for nothing, and would wait for ever; name a signal, a child or a time"
            ))
            .fatal());
        }
        let round = self.inner.memo.lock().round("wait", name);
        let value = self.wait(self.record(name, round, WaitKind::Wait, what)?, round)?;
        Ok(serde_json::from_value(value)?)
    }

    /// Suspends the thread until that time, by the database's clock.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn sleep_until(&self, name: &str, at: Timestamp) -> Result<(), NodeError> {
        self.check_name(name)?;
        let round = self.inner.memo.lock().round("wait", name);
        let what = WaitFor::new().until(at);
        self.wait(self.record(name, round, WaitKind::Timer, &what)?, round)?;
        Ok(())
    }

    /// Like [`Context::wait_any`], but returns at once, with nothing if nothing has come. Remembered too.
    #[allow(clippy::unused_async, reason = "whoever waits, awaits")]
    pub async fn try_take(&self, name: &str, what: &WaitFor) -> Result<Option<Arrived>, NodeError> {
        self.check_name(name)?;
        self.inner.check_run()?;
        self.check_memory(name)?;
        let inner = &*self.inner;
        let mut memo = inner.memo.lock();
        let round = memo.round("take", name);
        if let Some(value) = memo.get(WriteKind::Take, name, round) {
            return Ok(serde_json::from_value(value.clone())?);
        }
        let wait = self.record(name, round, WaitKind::Wait, what)?;
        let (value, consumed) = match self.look(&wait) {
            Some((value, consumed)) => (value, consumed),
            None => (Value::Null, None),
        };
        memo.note(
            &inner.task,
            WriteKind::Take,
            name,
            round,
            value.clone(),
            consumed,
        );
        Ok(serde_json::from_value(value)?)
    }

    fn record(
        &self,
        name: &str,
        round: u32,
        kind: WaitKind,
        what: &WaitFor,
    ) -> Result<WaitRecord, NodeError> {
        if let Some(kind) = what.signals.iter().find(|kind| kind.starts_with(RESERVED)) {
            return Err(
                NodeError::msg(format!("the signal kind `{kind}` is the engine's own")).fatal(),
            );
        }
        Ok(WaitRecord {
            id: self.wait_id("wait", name, round),
            name: name.to_owned(),
            kind,
            task: self.inner.task.clone(),
            value: Value::Null,
            signals: what.signals.clone(),
            children: what.children.clone(),
            until: what.until,
        })
    }

    /// Takes the oldest matching signal, or finds that the time has come.
    fn look(&self, wait: &WaitRecord) -> Option<(Value, Option<u64>)> {
        let run = &self.inner.run;
        if let Some((value, number)) = run.mailbox.lock().take(|signal| arrival(wait, signal)) {
            return Some((value, Some(number)));
        }
        wait.until
            .is_some_and(|until| until <= run.now())
            .then(|| (timer(), None))
    }

    fn wait(&self, wait: WaitRecord, round: u32) -> Result<Value, NodeError> {
        let inner = &*self.inner;
        inner.check_run()?;
        self.check_memory(&wait.name)?;
        let space = if wait.kind == WaitKind::Interrupt {
            // Interrupts and waits of one name do not meet.
            format!("?{}", wait.name)
        } else {
            wait.name.clone()
        };
        let mut memo = inner.memo.lock();
        if let Some(value) = memo.get(WriteKind::Wait, &space, round) {
            return Ok(value.clone());
        }
        if !inner.may_wait {
            return Err(NodeError::msg(format!(
                "node `{}` cleans up after a cancellation and cannot wait (for `{}`)",
                inner.node, wait.name
            ))
            .fatal());
        }
        if inner.is_alone()
            && memo.waits.is_empty()
            && let Some((value, consumed)) = self.look(&wait)
        {
            memo.note(
                &inner.task,
                WriteKind::Wait,
                &space,
                round,
                value.clone(),
                consumed,
            );
            return Ok(value);
        }
        memo.waits.push(Waiting {
            record: wait,
            space,
            round,
        });
        Err(NodeError::suspended())
    }

    fn wait_id(&self, space: &str, name: &str, round: u32) -> String {
        let inner = &*self.inner;
        wait_id(
            &inner.run,
            inner.root_step(),
            &inner.task,
            space,
            name,
            round,
        )
    }

    // ---- children and other threads ----

    /// Starts a child thread with the commit of this task; its input is the child's first update (an object of channels).
    ///
    /// Its name is unique among the children of the thread: the same name again starts nothing.
    pub fn spawn(
        &self,
        name: &str,
        graph: &str,
        input: &(impl Serialize + ?Sized),
    ) -> Result<ThreadId, NodeError> {
        self.check_name(name)?;
        if name.contains('/') {
            return Err(NodeError::msg(format!(
                "`{name}` cannot be a child's name: it contains a slash"
            ))
            .fatal());
        }
        let run = &self.inner.run;
        let input = serde_json::to_value(input)?;
        run.engine
            .graph(graph)
            .map_err(|error| NodeError::from(error).fatal())?
            .check_input(&input)
            .map_err(|error| NodeError::from(error).fatal())?;
        let id = run.thread.child(name);
        if let Some(fault) = id.fault() {
            return Err(NodeError::msg(format!("`{id}` cannot be a thread's id: {fault}")).fatal());
        }
        self.say(Emission::Spawn(NewThread {
            id: id.clone(),
            graph: graph.to_owned(),
            parent: Some(Parent {
                thread: run.thread.clone(),
                name: name.to_owned(),
            }),
            priority: run.priority,
            input,
        }));
        Ok(id)
    }

    /// Sends a signal to another thread with the commit of this task; unique by (thread, key).
    pub fn signal(
        &self,
        thread: &ThreadId,
        kind: &str,
        key: &str,
        payload: &(impl Serialize + ?Sized),
    ) -> Result<(), NodeError> {
        if kind.starts_with(RESERVED) {
            return Err(
                NodeError::msg(format!("the signal kind `{kind}` is the engine's own")).fatal(),
            );
        }
        self.say(Emission::Signal(NewSignal {
            thread: thread.clone(),
            kind: kind.to_owned(),
            key: key.to_owned(),
            payload: serde_json::to_value(payload)?,
            revives: false,
        }));
        Ok(())
    }

    /// Cancels a child with the commit of this task. Its end comes as a child's end.
    pub fn cancel_child(&self, name: &str) -> Result<(), NodeError> {
        self.say(Emission::Cancel(CancelRequest {
            thread: self.inner.run.thread.child(name),
            reason: format!("cancelled by its parent `{}`", self.inner.run.thread),
        }));
        Ok(())
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

    // ---- speaking ----

    /// Says an event: it lands in the journal with the commit of this task, once, whatever happens in between. With a
    /// suspension, what was said before it lands.
    pub fn emit(
        &self,
        stream: &str,
        name: &str,
        payload: &(impl Serialize + ?Sized),
    ) -> Result<(), NodeError> {
        self.say(Emission::Event(self.event(stream, name, payload)?));
        Ok(())
    }

    /// Says an event at once, whatever becomes of the task; unique by `id`.
    pub async fn say_now(
        &self,
        id: &str,
        stream: &str,
        name: &str,
        payload: &(impl Serialize + ?Sized + Sync),
    ) -> Result<Appended, NodeError> {
        let event = self.event(stream, name, payload)?;
        let engine = &self.inner.run.engine;
        self.inner.memo.lock().spoke = true;
        let appended = match engine.store.append(id, event).await {
            Ok(appended) => appended,
            // The database is away. That is no fault of the task, and must not use up its attempts.
            Err(error @ StorageError::Backend { .. }) => {
                self.inner.run.fail(error);
                return Err(NodeError::lost());
            }
            Err(error) => return Err(error.into()),
        };
        engine.journal_grew();
        Ok(appended)
    }

    /// Sends something to whoever follows the run now ([`Modes::CUSTOM`]), such as progress. Not stored.
    pub fn custom(&self, payload: &(impl Serialize + ?Sized)) -> Result<(), NodeError> {
        let inner = &*self.inner;
        if inner.run.wanted().has(Modes::CUSTOM) {
            let kind = StreamKind::Custom {
                task: inner.task.clone(),
                node: inner.node.to_string(),
                payload: serde_json::to_value(payload)?,
            };
            inner.run.tell(inner.namespace(), inner.step, kind);
        }
        Ok(())
    }

    /// Passes a part of a message on to whoever follows the run now ([`Modes::MESSAGES`]), such as what a model has said so
    /// far. Not stored: the whole message belongs into the state, or into an event.
    pub fn message(&self, chunk: MessageChunk) {
        let inner = &*self.inner;
        if inner.run.wanted().has(Modes::MESSAGES) {
            let kind = StreamKind::Message {
                task: inner.task.clone(),
                node: inner.node.to_string(),
                chunk,
            };
            inner.run.tell(inner.namespace(), inner.step, kind);
        }
    }

    fn event(
        &self,
        stream: &str,
        name: &str,
        payload: &(impl Serialize + ?Sized),
    ) -> Result<NewEvent, NodeError> {
        Ok(NewEvent {
            stream: stream.to_owned(),
            name: name.to_owned(),
            payload: serde_json::to_value(payload)?,
            thread: Some(self.inner.run.thread.clone()),
        })
    }

    fn say(&self, emission: Emission) {
        let mut memo = self.inner.memo.lock();
        // What comes after a suspension (from a future joined with the one that waits) is said when the node runs again.
        if memo.waits.is_empty() {
            memo.say(emission);
        }
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
    format!("{}.{hash}", run.branch)
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
