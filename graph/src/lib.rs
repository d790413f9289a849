//! A durable state-graph engine.

// The code written by the derive says `::graph`, also inside of this crate.
extern crate self as graph;

mod builder;
pub mod checkpoint;
mod command;
pub mod conformance;
mod context;
mod engine;
mod error;
mod follow;
mod ids;
mod journal;
mod memo;
pub mod memory;
mod observer;
mod options;
mod plan;
pub mod postgres;
mod run;
mod serve;
mod shape;
pub mod sqlite;
mod state;
mod stored;
mod svg;
mod waits;

#[doc(hidden)]
#[path = "private.rs"]
pub mod __private;
use __private as private;

pub use builder::{CompileError, CompiledGraph, Fault, Graph, GraphBuilder};
pub use checkpoint::{
    Appended, CancelOutcome, Entry, HistoryFilter, JournalFilter, LeaseRecord as LeaseInfo, Parent,
    Priority, Source, StorageError, ThreadFilter, ThreadRecord as ThreadInfo, ThreadStatus,
    WaitKind, WaitRecord as WaitInfo,
};
pub use command::{Command, END, Goto, Outcome, START, Send};
pub use context::Context;
pub use engine::{Busy, CheckpointInfo, Delivered, Engine, EngineBuilder, StartOptions, Started};
pub use error::{EngineError, NodeError};
pub use follow::{Modes, StreamItem, StreamKind};
pub use graph_derive::State;
pub use ids::{Cursor, IdempotencyKey, MAX_THREAD_ID_BYTES, ThreadId};
pub use journal::Journal;
pub use memory::MemoryCheckpointer;
pub use observer::{Observer, Point};
pub use options::{NodeOptions, RetryPolicy};
pub use serve::ServeOptions;
pub use shape::{EdgeKind, Shape, ShapeEdge, ShapeNode};
pub use postgres::PostgresCheckpointer;
pub use sqlite::SqliteCheckpointer;
pub use state::{Channel, ChannelError, Reducer, State, Update};
pub use waits::{Arrived, ChildEnd, Signal, WaitFor};
