//! A durable state-graph engine.

pub mod checkpoint;
pub mod conformance;
mod ids;
pub mod sqlite;
mod stored;

pub use ids::{Cursor, IdempotencyKey, MAX_THREAD_ID_BYTES, ThreadId};
