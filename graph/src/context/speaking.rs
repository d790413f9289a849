//! What a node says: events, children, signals to other threads, and what is only interesting while it happens.

use serde::Serialize;

use crate::{
    checkpoint::{Appended, CancelRequest, NewEvent, NewSignal, NewThread, Parent, StorageError},
    error::NodeError,
    follow::{MessageChunk, Modes, StreamKind},
    ids::ThreadId,
    memo::Emission,
    plan::{child_name, given_name},
    waits::RESERVED,
};

use super::Context;

impl Context {
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
        if self.inner.cleaning {
            return Err(NodeError::cancelled());
        }
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

    // ---- children and other threads ----

    /// Starts a child thread with the commit of this task; its input is the child's first update (an object of channels).
    ///
    /// Its name is unique among the children of the thread: the same name again starts nothing. But a child of a round that made
    /// way for an input ([`Busy`](crate::Busy)) is not taken for one of the round that came after: of the same name, that
    /// starts another one, whose id ends in `{name}~1` (and so on).
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
        if given_name(name) != name {
            return Err(NodeError::msg(format!(
                "`{name}` cannot be a child's name: it ends like one that the engine makes"
            ))
            .fatal());
        }
        let run = &self.inner.run;
        let input = serde_json::to_value(input)?;
        let input = run
            .engine
            .graph(graph)
            .map_err(|error| NodeError::from(error).fatal())?
            .read_input(input)
            .map_err(|error| NodeError::from(error).fatal())?;
        let name = child_name(&run.renamed.lock(), name);
        let id = run.thread.child(&name);
        if let Some(fault) = id.fault() {
            return Err(NodeError::msg(format!("`{id}` cannot be a thread's id: {fault}")).fatal());
        }
        self.say(Emission::Spawn(NewThread {
            id: id.clone(),
            graph: graph.to_owned(),
            parent: Some(Parent {
                thread: run.thread.clone(),
                name,
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
        let run = &self.inner.run;
        let name = child_name(&run.renamed.lock(), name);
        self.say(Emission::Cancel(CancelRequest {
            thread: run.thread.child(&name),
            reason: format!("cancelled by its parent `{}`", run.thread),
        }));
        Ok(())
    }
}
