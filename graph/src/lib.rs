//! A durable state-graph engine.

pub mod checkpoint;
mod ids;

pub use ids::{Cursor, IdempotencyKey, MAX_THREAD_ID_BYTES, ThreadId};
