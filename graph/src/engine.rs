//! The engine: starting threads, sending them signals, looking at them. Running them is in [`serve`](crate::ServeOptions).

mod build;
mod inside;
mod looking;

use std::{any::TypeId, sync::Arc};

use serde::Serialize;
use serde_json::Value;

use crate::{
    cache::CacheSpace,
    checkpoint::{
        CancelOutcome, CancelRequest, Checkpointer, Created, NewSignal, NewThread, Priority,
        Reopened, SignalOutcome, ThreadRecord, WaitKind,
    },
    context::is_no_question,
    documents::Documents,
    error::EngineError,
    host::Shared,
    ids::ThreadId,
    room::create,
    run::Forked,
    shape::Shape,
    state::State,
    waits::{ANSWER, Answer, EXPIRED, INPUT, INTERRUPT, RESERVED, ROLLBACK, expiry_key, preempts},
};

pub use build::EngineBuilder;
pub use inside::SubgraphInfo;
pub use looking::CheckpointInfo;

/// How a thread starts.
#[derive(Clone, Debug, Default)]
pub struct StartOptions {
    pub(crate) priority: Priority,
}

impl StartOptions {
    /// How urgent it is; its children inherit it.
    #[must_use]
    pub fn priority(mut self, priority: Priority) -> Self {
        self.priority = priority;
        self
    }
}

/// What became of a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Started {
    /// The thread exists now.
    New,
    /// It was there already; nothing was changed.
    Existing,
}

/// What became of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivered {
    /// It is in the thread's mailbox.
    New,
    /// One of the same key was there already, or had been consumed.
    Duplicate,
}

/// What happens to a further input to a thread that has not ended: its *round*, from its input to its end, is still under way.
///
/// Inputs are taken in the order in which they arrived. One that does not wait takes those along that were queued before it:
/// they are applied to the state, in their order, and only it is run. With the round that is stopped go its open questions and
/// waits (an answer is an error from then on) and the children that it has started, which are cancelled. When the round ends
/// by itself before it can be stopped, the input begins the next one, like any other: an ended round is not rolled back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Busy {
    /// It is an error.
    Reject,
    /// It is taken when the round under way has ended.
    Enqueue,
    /// The round under way is stopped at once (its tasks are cancelled), and the next one begins with the input, on the state
    /// that the supersteps so far have led to. What a superstep under way has not finished is given up; what it has said stays
    /// said.
    Interrupt,
    /// The round under way is stopped at once, and the next one begins with the input where the thread stood before the round:
    /// on a new branch, which becomes the head. What was done is still in the thread's history, on the branch that was left.
    Rollback,
}

/// Threads in a database, and the graphs that they run. Cheap to clone.
#[derive(Clone)]
pub struct Engine {
    pub(crate) shared: Arc<Shared>,
}

impl Engine {
    /// The database.
    pub fn checkpointer(&self) -> &Arc<dyn Checkpointer> {
        &self.shared.store
    }

    /// The documents beside the threads. An error if the database has no store of them, and the engine was given none.
    pub fn documents(&self) -> Result<Documents, EngineError> {
        self.shared
            .documents
            .clone()
            .ok_or(EngineError::NoDocuments)
    }

    /// The shapes of the graphs, by name.
    pub fn shapes(&self) -> impl Iterator<Item = &Shape> {
        self.shared.graphs.values().map(|graph| graph.shape())
    }

    /// Starts a thread: durable when this returns, idempotent by its id. The update is an object of channels.
    pub async fn start(
        &self,
        thread: impl Into<ThreadId>,
        graph: &str,
        update: &(impl Serialize + ?Sized + Sync),
        options: StartOptions,
    ) -> Result<Started, EngineError> {
        let id = thread.into();
        if let Some(fault) = id.fault() {
            return Err(EngineError::InvalidThreadId {
                id: id.as_str().chars().take(80).collect(),
                fault,
            });
        }
        let input = serde_json::to_value(update)?;
        let input = self.shared.graph(graph)?.read_input(input)?;
        let thread = NewThread {
            id,
            graph: graph.to_owned(),
            parent: None,
            priority: options.priority,
            input,
        };
        let (created, is_running) = create(&self.shared, thread).await?;
        if !is_running {
            self.shared.wakes.due(Some(graph));
        }
        Ok(match created {
            Created::New => Started::New,
            Created::Existing => Started::Existing,
        })
    }

    /// Gives a thread a further input: when it has ended (however), it begins again with this update, on the state it has. What
    /// happens when it has not is up to `busy`. Durable when this returns, unique by its key, whatever `busy` says.
    pub async fn input(
        &self,
        thread: impl Into<ThreadId>,
        key: &str,
        update: &(impl Serialize + ?Sized + Sync),
        busy: Busy,
    ) -> Result<Delivered, EngineError> {
        let id = thread.into();
        let record = self.require(&id).await?;
        let input = serde_json::to_value(update)?;
        self.shared.graph(&record.graph)?.check_input(&input)?;
        if busy == Busy::Reject && !record.status.is_ended() {
            return Err(EngineError::Busy {
                thread: id,
                status: record.status,
            });
        }
        let kind = match busy {
            Busy::Reject | Busy::Enqueue => INPUT,
            Busy::Interrupt => INTERRUPT,
            Busy::Rollback => ROLLBACK,
        };
        let signal = NewSignal {
            thread: id.clone(),
            kind: kind.to_owned(),
            key: format!("{INPUT}:{key}"),
            payload: input,
            revives: true,
        };
        let delivered = self.deliver(signal).await?;
        if preempts(kind) {
            // Whoever runs it finds the input with its lease.
            self.shared.wakes.look_at(&id);
        }
        Ok(delivered)
    }

    /// Sends a signal: durable when this returns, unique by its key.
    pub async fn signal(
        &self,
        thread: impl Into<ThreadId>,
        kind: &str,
        key: &str,
        payload: &(impl Serialize + ?Sized + Sync),
    ) -> Result<Delivered, EngineError> {
        for name in [kind, key] {
            if name.starts_with(RESERVED) {
                return Err(EngineError::ReservedKind(name.to_owned()));
            }
        }
        self.deliver(NewSignal {
            thread: thread.into(),
            kind: kind.to_owned(),
            key: key.to_owned(),
            payload: serde_json::to_value(payload)?,
            revives: false,
        })
        .await
    }

    async fn deliver(&self, signal: NewSignal) -> Result<Delivered, EngineError> {
        let thread = signal.thread.clone();
        match self.shared.store.signal(signal, None).await? {
            SignalOutcome::New => {
                self.shared.wake();
                Ok(Delivered::New)
            }
            SignalOutcome::Duplicate => Ok(Delivered::Duplicate),
            SignalOutcome::MailboxFull => Err(EngineError::MailboxFull(thread)),
            // Only answers are for waits.
            SignalOutcome::UnknownThread | SignalOutcome::NoSuchWait | SignalOutcome::Expired => {
                Err(EngineError::UnknownThread(thread))
            }
        }
    }

    /// Answers an open interrupt. A second answer, one that comes after the question's deadline, or one to a question that is
    /// gone or of another branch, is an error, and so is one to something else that the thread waits for.
    pub async fn answer(
        &self,
        thread: impl Into<ThreadId>,
        interrupt: &str,
        value: &(impl Serialize + ?Sized + Sync),
    ) -> Result<(), EngineError> {
        let thread = thread.into();
        let answer = Answer {
            id: interrupt.to_owned(),
            value: serde_json::to_value(value)?,
        };
        let signal = NewSignal {
            thread: thread.clone(),
            kind: ANSWER.to_owned(),
            key: format!("{ANSWER}:{interrupt}"),
            payload: serde_json::to_value(answer)?,
            revives: false,
        };
        let outcome = if is_no_question(interrupt) {
            SignalOutcome::NoSuchWait
        } else {
            self.shared.store.signal(signal, Some(interrupt)).await?
        };
        let is_expired = match outcome {
            SignalOutcome::New => {
                self.shared.wake();
                return Ok(());
            }
            SignalOutcome::MailboxFull => return Err(EngineError::MailboxFull(thread)),
            SignalOutcome::UnknownThread => return Err(EngineError::UnknownThread(thread)),
            SignalOutcome::Expired => true,
            SignalOutcome::NoSuchWait => self.has_expired(&thread, interrupt).await?,
            SignalOutcome::Duplicate => false,
        };
        let record = self.require(&thread).await?;
        let checkpoint = record.checkpoint;
        let interrupt = interrupt.to_owned();
        if outcome == SignalOutcome::Duplicate {
            return Err(EngineError::AlreadyAnswered {
                thread,
                checkpoint,
                interrupt,
            });
        }
        if is_expired {
            return Err(EngineError::Expired {
                thread,
                checkpoint,
                interrupt,
            });
        }
        let wait = record.waits.iter().find(|wait| wait.id == interrupt);
        if let Some(wait) = wait.filter(|wait| wait.kind != WaitKind::Interrupt) {
            return Err(EngineError::NotAQuestion {
                thread,
                checkpoint,
                wait: interrupt,
                name: wait.name.clone(),
                kind: wait.kind,
            });
        }
        let asked = interrupt
            .split_once('.')
            .and_then(|(branch, _)| branch.parse::<u32>().ok());
        match asked {
            Some(branch) if branch != record.branch => Err(EngineError::OtherBranch {
                thread,
                checkpoint,
                interrupt,
                branch,
                head: record.branch,
            }),
            _ => Err(EngineError::UnknownInterrupt {
                thread,
                checkpoint,
                interrupt,
            }),
        }
    }

    /// Whether a run has found that a question has expired. Its signal is known by its key then; what is sent here is for a wait
    /// that no thread has, so it never arrives.
    async fn has_expired(&self, thread: &ThreadId, interrupt: &str) -> Result<bool, EngineError> {
        let probe = NewSignal {
            thread: thread.clone(),
            kind: EXPIRED.to_owned(),
            key: expiry_key(interrupt),
            payload: Value::Null,
            revives: false,
        };
        let outcome = self.shared.store.signal(probe, Some("")).await?;
        Ok(outcome == SignalOutcome::Duplicate)
    }

    /// Cancels a thread and its children: at once where they run (in another process: as soon as a message gets there, within
    /// a second if it is lost), and when they are claimed next if they sleep.
    pub async fn cancel(
        &self,
        thread: impl Into<ThreadId>,
        reason: &str,
    ) -> Result<CancelOutcome, EngineError> {
        let thread = thread.into();
        let outcome = self
            .shared
            .store
            .cancel(CancelRequest {
                thread: thread.clone(),
                reason: reason.to_owned(),
            })
            .await?;
        match outcome {
            CancelOutcome::UnknownThread => return Err(EngineError::UnknownThread(thread)),
            CancelOutcome::Ended => {}
            CancelOutcome::Requested | CancelOutcome::AlreadyRequested => {
                self.shared.wakes.cancel(&thread, reason);
                self.shared.wake();
            }
        }
        Ok(outcome)
    }

    /// Lets a failed or cancelled thread go on from its last checkpoint: only what failed runs again.
    pub async fn retry(&self, thread: impl Into<ThreadId>) -> Result<(), EngineError> {
        let thread = thread.into();
        match self.shared.store.reopen(&thread).await? {
            Reopened::Yes => {
                self.shared.wake();
                Ok(())
            }
            Reopened::NotEnded(status) => Err(EngineError::NotRetryable { thread, status }),
            Reopened::UnknownThread => Err(EngineError::UnknownThread(thread)),
        }
    }

    /// Forgets what is cached for a node, for instance because the node does something else now. Returns how many results
    /// that were.
    pub async fn clear_cache(&self, graph: &str, node: &str) -> Result<u64, EngineError> {
        let shape = self.shared.graph(graph)?.shape();
        if shape.nodes.iter().all(|known| known.name != node) {
            return Err(EngineError::UnknownNode {
                graph: graph.to_owned(),
                node: node.to_owned(),
            });
        }
        let space = CacheSpace::new(graph, node);
        Ok(self.shared.cache.clear(&space).await?)
    }

    /// Comes back when other processes have been told what there is to tell, or after a second. For programs that come and go:
    /// messages are sent in the background, and a program that ends first leaves the others to their polls.
    pub async fn flush(&self) {
        self.shared.wakes.flush().await;
    }

    /// Deletes a thread with its history. Its children and what it said stay.
    pub async fn delete(&self, thread: impl Into<ThreadId>) -> Result<bool, EngineError> {
        let thread = thread.into();
        let found = self.shared.store.delete_thread(&thread).await?;
        if found {
            self.shared.wakes.look_at(&thread);
        }
        Ok(found)
    }

    /// Grows a new branch from a checkpoint: its state with this update, made as if by a node, whose successors run next
    /// (without a node: what was planned there). The head stays where it is; see [`Engine::set_head`]. Returns the branch.
    pub async fn fork<'n>(
        &self,
        thread: impl Into<ThreadId>,
        checkpoint: u64,
        as_node: impl Into<Option<&'n str>>,
        update: &(impl Serialize + ?Sized + Sync),
    ) -> Result<u32, EngineError> {
        let update = serde_json::to_value(update)?;
        let (thread, as_node) = (thread.into(), as_node.into());
        self.grow(&thread, checkpoint, as_node, Forked::Update(update))
            .await
    }

    /// Like [`Engine::fork`], but with this state in place of the one at the checkpoint: for a thread whose stored state does
    /// not fit its graph any more ([`EngineError::StoredState`]), or is wrong in a way that no update can mend. What is stored
    /// before it is not read again for the new branch.
    pub async fn fork_with_state<'n, S: State>(
        &self,
        thread: impl Into<ThreadId>,
        checkpoint: u64,
        as_node: impl Into<Option<&'n str>>,
        state: &S,
    ) -> Result<u32, EngineError> {
        let (thread, as_node) = (thread.into(), as_node.into());
        let record = self.require(&thread).await?;
        if self.shared.graph(&record.graph)?.state_type() != TypeId::of::<S>() {
            return Err(EngineError::OtherState {
                thread,
                graph: record.graph,
            });
        }
        let channels = state.channels()?;
        self.grow(&thread, checkpoint, as_node, Forked::State(channels))
            .await
    }

    async fn grow(
        &self,
        thread: &ThreadId,
        checkpoint: u64,
        as_node: Option<&str>,
        change: Forked,
    ) -> Result<u32, EngineError> {
        let record = self.require(thread).await?;
        let store = &self.shared.store;
        let rows = store.state_rows(thread, Some(checkpoint)).await?;
        let graph = self.shared.graph(&record.graph)?;
        let new = graph.fork(thread, &record.input, rows, as_node, change)?;
        let (branch, _) = store.fork(thread, new).await?;
        Ok(branch)
    }

    /// Makes a branch the head: the thread goes on from there. A run under way is stopped.
    pub async fn set_head(
        &self,
        thread: impl Into<ThreadId>,
        branch: u32,
    ) -> Result<(), EngineError> {
        let thread = thread.into();
        self.shared.store.set_head(&thread, branch).await?;
        self.shared.wakes.look_at(&thread);
        self.shared.wakes.moved(&thread);
        self.shared.wake();
        Ok(())
    }

    async fn require(&self, thread: &ThreadId) -> Result<ThreadRecord, EngineError> {
        self.shared
            .store
            .thread(thread)
            .await?
            .ok_or_else(|| EngineError::UnknownThread(thread.clone()))
    }
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("store", &self.shared.store.name())
            .field("graphs", &self.shared.graphs.keys())
            .finish_non_exhaustive()
    }
}
