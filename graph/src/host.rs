//! What all clones of an engine share, and what the engine knows of a graph without knowing its state's type.

use std::{any::TypeId, collections::BTreeMap, sync::Arc, time::Duration};

use futures::future::BoxFuture;
use serde_json::Value;

use crate::{
    builder::Compiled,
    cache::Cache,
    checkpoint::{
        Bell, Channels, Checkpointer, Claim, Commit, Input, Loaded, NewCheckpoint, StateRow,
        StateRows, StorageError, StoredPart, ThreadRecord, ThreadStatus,
    },
    documents::Documents,
    error::EngineError,
    follow::Bus,
    ids::ThreadId,
    kept::{Held, restore},
    nest::Pasts,
    observer::{Observer, Point},
    plan::Plan,
    room::Rooms,
    run::{Controls, Forked, Run, RunShared, Unfit, end_thread, forked, watch},
    shape::Shape,
    state::{ChannelError, Extent, State, Update, rebuild, snapshot, updates_of},
    unfit::StoredState,
    waits::{is_input, readable},
    wakes::Wakes,
};

/// After so many runs of a thread have died without committing anything, it fails instead of killing the next process.
///
/// Only leases that somebody else had to take over count: while the database is away nobody takes any, and when it is back, those
/// whose processes live are renewed first (see [`Touch`](crate::touch::Touch)).
const MAX_TAKEOVERS: u32 = 20;

/// A graph, whatever its state.
pub(crate) trait AnyGraph: Send + Sync {
    fn name(&self) -> &str;
    fn shape(&self) -> &Shape;
    fn state_type(&self) -> TypeId;
    /// Reads a first update. An error if it does not fit.
    fn read_input(&self, input: Value) -> Result<Input, ChannelError>;
    /// Whether a further update fits.
    fn check_input(&self, input: &Value) -> Result<(), ChannelError>;
    fn values(&self, input: &Input, rows: StateRows) -> Result<Value, ChannelError>;
    /// What a checkpoint holds when what was before it goes.
    fn snapshot(&self, input: &Input, rows: StateRows) -> Result<Channels, ChannelError>;
    /// The updates whose effect, one after the other, is that of a row.
    fn updates(&self, row: &StateRow) -> Vec<Value>;
    /// The nodes that run first.
    fn entry(&self, input: &Input) -> Vec<String>;
    /// What is stored, channel by channel.
    fn stored(&self, input: &Input, rows: StateRows) -> Result<StoredState, ChannelError>;
    fn fork(
        &self,
        thread: &ThreadId,
        input: &Input,
        rows: StateRows,
        as_node: Option<&str>,
        change: Forked,
    ) -> Result<NewCheckpoint, EngineError>;
    fn run(
        self: Arc<Self>,
        engine: Arc<Shared>,
        claim: Claim,
        controls: Controls,
        grace: Duration,
    ) -> BoxFuture<'static, Result<(), StorageError>>;
}

impl<S: State> AnyGraph for Compiled<S> {
    fn name(&self) -> &str {
        &self.name
    }

    fn shape(&self) -> &Shape {
        &self.shape
    }

    fn state_type(&self) -> TypeId {
        TypeId::of::<S>()
    }

    fn read_input(&self, input: Value) -> Result<Input, ChannelError> {
        let update = S::Update::read(&input)?;
        Ok(Input::read(input, update))
    }

    fn check_input(&self, input: &Value) -> Result<(), ChannelError> {
        S::Update::read(input).map(|_| ())
    }

    fn values(&self, input: &Input, mut rows: StateRows) -> Result<Value, ChannelError> {
        let state: Arc<S> = restore(input, &mut rows)?;
        Ok(Value::Object(state.channels()?))
    }

    fn snapshot(&self, input: &Input, mut rows: StateRows) -> Result<Channels, ChannelError> {
        let pasts = Pasts::of(&rows);
        let extent = Extent::on::<S>(&rows.rows);
        let state: Arc<S> = restore(input, &mut rows)?;
        let mut snapshot = snapshot(&*state, extent)?;
        pasts.put(&mut snapshot);
        Ok(snapshot)
    }

    fn stored(&self, input: &Input, rows: StateRows) -> Result<StoredState, ChannelError> {
        StoredState::read::<S>(&self.name, input, rows)
    }

    fn updates(&self, row: &StateRow) -> Vec<Value> {
        updates_of::<S>(row)
    }

    fn entry(&self, input: &Input) -> Vec<String> {
        rebuild::<S>(input, Vec::new())
            .ok()
            .and_then(|state| Plan::entry(self, &state).ok())
            .map(|plan| plan.names())
            .unwrap_or_default()
    }

    fn fork(
        &self,
        thread: &ThreadId,
        input: &Input,
        rows: StateRows,
        as_node: Option<&str>,
        change: Forked,
    ) -> Result<NewCheckpoint, EngineError> {
        forked(self, thread, input, rows, as_node, change)
    }

    fn run(
        self: Arc<Self>,
        engine: Arc<Shared>,
        claim: Claim,
        controls: Controls,
        grace: Duration,
    ) -> BoxFuture<'static, Result<(), StorageError>> {
        Box::pin(async move {
            let mut claim = claim;
            let mut dropped = Vec::new();
            let (mut loaded, unreadable) = match read::<S>(&engine, &mut claim).await {
                Ok(loaded) => (loaded, None),
                // The next run would find the same, and the one after that.
                Err(error) if error.is_unreadable() => {
                    dropped = match error.unreadable_signal() {
                        Some(number) => vec![number],
                        None => in_the_way(&engine, &claim.thread.id).await?,
                    };
                    (unread(&claim.thread), Some(error))
                }
                Err(error) => return Err(error),
            };
            let takeovers = claim.takeovers;
            let cancel = loaded.thread.cancel.clone();
            let shared = RunShared::new(engine, claim.lease, controls.clone(), &mut loaded);
            let shared = Arc::new(shared);
            if let Some(reason) = cancel {
                controls.request_cancel(reason);
            }
            let fault = if let Some(error) = unreadable {
                shared.fail(error);
                None
            } else if takeovers >= MAX_TAKEOVERS {
                Some(format!(
                    "{takeovers} runs in a row have died before they could commit anything; find out why before you retry it"
                ))
            } else {
                match Run::new(self, shared.clone(), loaded, grace) {
                    Ok(mut run) => {
                        // Broken runs say why below.
                        tokio::select! {
                            _ = run.go() => {}
                            () = watch(&shared) => {}
                        }
                        None
                    }
                    Err(Unfit(fault)) => {
                        // An input would make the thread due again, for ever: it cannot be taken before the program fits.
                        dropped = shared
                            .mailbox
                            .lock()
                            .discard_if(|signal| is_input(&signal.kind));
                        Some(fault)
                    }
                }
            };
            let fault = match (fault, shared.take_trouble()) {
                (Some(fault), _) => fault,
                // No run could do better: what the node handed back is at fault, not the database.
                (None, Some(error @ StorageError::Unstorable { .. })) => error.to_string(),
                (None, Some(error)) if error.is_unreadable() => {
                    // It would be in the way of every run to come.
                    dropped.extend(error.unreadable_signal());
                    error.to_string()
                }
                (None, Some(trouble)) => return Err(trouble),
                (None, None) => return Ok(()),
            };
            tracing::error!(thread = %shared.thread, graph = %shared.graph, error = %fault, "thread failed");
            let mut commit = Commit::on(shared.base());
            commit.consumed = dropped;
            let status = ThreadStatus::Failed;
            end_thread(
                &shared,
                &mut commit,
                status,
                Some(&fault),
                Value::Null,
                None,
            );
            // What goes wrong now is told below.
            let _ = shared.commit(commit).await;
            match shared.take_trouble() {
                Some(trouble) => Err(trouble),
                None => Ok(()),
            }
        })
    }
}

/// What a run needs of its thread.
async fn read<S: State>(engine: &Shared, claim: &mut Claim) -> Result<Loaded, StorageError> {
    let thread = &claim.lease.thread;
    if let Some(what) = claim.unreadable.take() {
        return Err(StorageError::Unreadable {
            thread: thread.clone(),
            part: StoredPart::Row,
            what,
        });
    }
    let mut loaded = match claim.loaded.take() {
        Some(loaded) => *loaded,
        None => engine.store.load(&claim.lease).await?,
    };
    readable(thread, &loaded.mailbox)?;
    let state = &mut loaded.state;
    let kept = state.state.as_ref();
    if kept.is_some_and(|kept| Held::<S>::of(kept).is_none()) {
        // It was kept for another state's type, so it has to be rebuilt.
        let checkpoint = Some(state.checkpoint);
        *state = engine.store.state_rows(thread, checkpoint).await?;
    }
    Ok(loaded)
}

/// Signals that would make a thread due again, for ever, which cannot be read: inputs, which cannot be taken, and what is itself
/// unreadable.
async fn in_the_way(engine: &Shared, thread: &ThreadId) -> Result<Vec<u64>, StorageError> {
    match engine.store.mailbox(thread, 0).await {
        Ok((signals, _)) => Ok(signals
            .into_iter()
            .filter(|signal| is_input(&signal.kind))
            .map(|signal| signal.number)
            .collect()),
        Err(error) if error.is_unreadable() => Ok(error.unreadable_signal().into_iter().collect()),
        Err(error) => Err(error),
    }
}

/// What is known of a thread that cannot be read: enough to end it.
fn unread(thread: &ThreadRecord) -> Loaded {
    let mut loaded = Loaded::fresh(thread, 0, thread.updated_at);
    loaded.state.checkpoint = thread.checkpoint;
    loaded.state.step = thread.step;
    loaded
}

/// Behind all clones of an [`Engine`](crate::Engine).
pub(crate) struct Shared {
    pub store: Arc<dyn Checkpointer>,
    pub graphs: BTreeMap<String, Arc<dyn AnyGraph>>,
    pub bus: Bus,
    pub cache: Arc<dyn Cache>,
    pub documents: Option<Documents>,
    observer: Option<Arc<dyn Observer>>,
    pub wakes: Arc<Wakes>,
    pub rooms: Rooms,
}

impl Shared {
    pub fn new(
        store: Arc<dyn Checkpointer>,
        graphs: BTreeMap<String, Arc<dyn AnyGraph>>,
        observer: Option<Arc<dyn Observer>>,
        cache: Arc<dyn Cache>,
        documents: Option<Documents>,
        bell: Option<Arc<dyn Bell>>,
        poll: Duration,
    ) -> Self {
        Self {
            cache,
            documents,
            wakes: Arc::new(Wakes::new(bell, poll, graphs.keys().cloned())),
            store,
            graphs,
            bus: Bus::default(),
            observer,
            rooms: Rooms::default(),
        }
    }

    pub fn graph(&self, name: &str) -> Result<&Arc<dyn AnyGraph>, EngineError> {
        self.graphs
            .get(name)
            .ok_or_else(|| EngineError::UnknownGraph {
                graph: name.to_owned(),
                known: self
                    .graphs
                    .keys()
                    .map(|name| format!("`{name}`"))
                    .collect::<Vec<_>>()
                    .join(", "),
            })
    }

    pub fn observe(&self, point: &Point<'_>) {
        if let Some(observer) = &self.observer {
            observer.on(point);
        }
    }

    /// Something may be due: whoever runs threads should look.
    pub fn wake(&self) {
        self.wakes.due(None);
    }

    /// The journal has new entries.
    pub fn journal_grew(&self) {
        self.wakes.journal_grew();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.wakes.gone.cancel();
    }
}
