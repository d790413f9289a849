//! A durable state-graph engine.
//!
//! A *graph* is a state, nodes and edges; a *thread* is one run of it through time, kept in a database. A thread sleeps in the
//! database; a *signal* wakes it; a *run* (a lease) takes it through *supersteps*, each of them one commit: checkpoint, events,
//! new children, consumed signals, all or nothing. When nothing is left to do but wait, the run ends and the thread sleeps
//! again, for a second or for a month. Whoever kills the process loses nothing.
//!
//! It knows no chat, no model and no project. What it promises, statement by statement with the tests, is in
//! `docs/semantics.md` beside this crate.
//!
//! # An example
//! A thread that asks its question, waits however long it takes, and pays once:
//!
//! ```
//! use std::sync::Arc;
//!
//! use graph::{
//!     Context, END, Engine, Graph, MemoryCheckpointer, NodeError, START, ServeOptions, StartOptions, State, ThreadStatus,
//! };
//! use serde::{Deserialize, Serialize};
//!
//! fn add(total: &mut u32, more: u32) {
//!     *total += more;
//! }
//!
//! /// Each field is a channel; the attribute says how updates become its value.
//! #[derive(Clone, Debug, Default, Serialize, Deserialize, State)]
//! struct Order {
//!     #[channel(append)]
//!     log: Vec<String>,
//!     #[channel(reduce = add)]
//!     cost: u32,
//!     item: Option<String>,
//! }
//!
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! let order = Graph::<Order>::builder("order")
//!     .node("ask", |_: Arc<Order>, ctx: Context| async move {
//!         ctx.emit("questions", "asked", &ctx.interrupt_id("item"))?;
//!         // The thread sleeps here, in the database, until somebody answers. Then the node runs again, and this returns.
//!         let item: String = ctx.interrupt("item", "What would you like?").await?;
//!         Ok(OrderUpdate::default().item(Some(item)))
//!     })
//!     .node("pay", |order: Arc<Order>, ctx: Context| async move {
//!         // Remembered in the database: whatever happens to the process, it is not paid twice.
//!         let receipt: String = ctx
//!             .step("charge", |key| async move { Ok::<_, NodeError>(format!("receipt {key}")) })
//!             .await?;
//!         let item = order.item.clone().unwrap_or_default();
//!         Ok(OrderUpdate::default().cost(5).log(vec![format!("{item}: {receipt}")]))
//!     })
//!     .edge(START, "ask")
//!     .edge("ask", "pay")
//!     .edge("pay", END)
//!     .compile()?;
//!
//! let engine = Engine::builder(Arc::new(MemoryCheckpointer::new())).graph(order).build().await?;
//! engine.start("order:1", "order", &OrderUpdate::default(), StartOptions::default()).await?;
//! engine.run_due(ServeOptions::default()).await?;
//!
//! let waiting = engine.thread("order:1").await?.ok_or("it was started")?;
//! assert_eq!(waiting.status, ThreadStatus::Waiting);
//! engine.answer("order:1", &waiting.waits[0].id, "tea").await?;
//! engine.run_due(ServeOptions::default()).await?;
//!
//! let state: Order = engine.state("order:1").await?;
//! assert_eq!((state.cost, state.log.len()), (5, 1));
//! # Ok(())
//! # }
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(example()).unwrap();
//! ```
//!
//! A program that lives long calls [`Engine::serve`] instead of [`Engine::run_due`].
//!
//! # Where things are
//! [`Graph`] builds, [`Context`] is what a node has besides the state, [`Engine`] starts, signals, serves and looks, [`Journal`]
//! is what was said. Databases implement [`checkpoint::Checkpointer`]: [`MemoryCheckpointer`], [`SqliteCheckpointer`],
//! [`PostgresCheckpointer`]; [`conformance`] is the suite that each of them passes.

// The code written by the derive says `::graph`, also inside of this crate.
extern crate self as graph;

mod brisk;
mod builder;
pub mod cache;
pub mod checkpoint;
mod command;
pub mod conformance;
mod context;
pub mod documents;
mod engine;
mod error;
mod folding;
mod follow;
pub mod guide;
mod host;
mod ids;
mod journal;
mod kept;
mod memo;
pub mod memory;
mod nest;
mod observer;
mod options;
mod plan;
pub mod postgres;
mod retention;
mod room;
mod run;
mod serve;
mod shape;
pub mod sqlite;
mod state;
mod stored;
mod subgraph;
mod svg;
mod touch;
mod traced;
mod unfit;
mod waits;
mod wakes;

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;
use __private as private;

pub use builder::{CompileError, CompiledGraph, Fault, Graph, GraphBuilder};
pub use cache::{Cache, CachePolicy};
pub use checkpoint::{
    Appended, CancelOutcome, DeleteFilter, Deleted, Entry, HistoryFilter, JournalFilter, Keep,
    LeaseRecord as LeaseInfo, Parent, Priority, Source, StorageError, StoredPart, ThreadFilter,
    ThreadRecord as ThreadInfo, ThreadStatus, WaitKind, WaitRecord as WaitInfo,
};
pub use command::{Command, END, Goto, Outcome, START, Send};
pub use context::Context;
pub use documents::{Document, DocumentKey, DocumentStore, Documents, Namespace};
pub use engine::{
    Busy, CheckpointInfo, Delivered, Engine, EngineBuilder, StartOptions, Started, SubgraphInfo,
};
pub use error::{ChildError, EngineError, NodeError, TaskFailure};
pub use follow::{MessageChunk, Modes, StreamItem, StreamKind, TaskResult, Trigger};
pub use graph_derive::State;
pub use ids::{Cursor, IdempotencyKey, MAX_THREAD_ID_BYTES, ThreadId};
pub use journal::Journal;
pub use memory::MemoryCheckpointer;
pub use observer::{Observer, Point};
pub use options::{NodeOptions, RetryPolicy};
pub use postgres::PostgresCheckpointer;
pub use retention::{PruneOutcome, RetentionPolicy, SweepOptions, Swept};
pub use serve::ServeOptions;
pub use shape::{EdgeKind, Shape, ShapeEdge, ShapeNode};
pub use sqlite::SqliteCheckpointer;
pub use state::{Channel, ChannelError, Reducer, State, Update};
pub use subgraph::{SubgraphMemory, SubgraphOptions};
pub use unfit::StoredState;
pub use waits::{Arrived, ChildEnd, Reply, Signal, WaitFor};
