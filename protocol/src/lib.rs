//! The messages between the crew and the spawners: what a coding job is, what became of it, what is
//! said on the way, and how the messages travel.
//!
//! * [`SpawnRequest`], [`WorkerResult`], [`WorkerEvent`], [`Control`]: the types, version 1. Unknown
//!   fields are ignored, unknown versions are refused ([`decode`]).
//! * [`names`]: the literal names of streams, channels and keys.
//! * [`Transport`]: how messages travel. [`local`] is the in-process one, durable in a folder;
//!   [`redis`](mod@redis) is the one between processes and machines; [`suite`] is what every transport has to pass.
//!
//! It is not the place for anything that runs a job (see `spawner`) or decides about one (see
//! `nodes`). *Architecture invariant:* this crate depends on nothing of ours.

mod control;
pub mod decode;
mod event;
pub mod local;
pub mod names;
pub mod redis;
mod request;
mod result;
mod room;
pub mod schemas;
pub mod suite;
mod transport;

pub use self::redis::RedisTransport;
pub use control::{Control, ControlMessage, Heartbeat};
pub use decode::DecodeError;
pub use event::{EventKind, WorkerEvent};
pub use local::LocalTransport;
pub use request::{
    Agent, Limits, Network, Repository, SealedSecret, Source, SpawnRequest, TaskBrief,
};
pub use result::{Check, CheckStatus, Failure, ResultStatus, Usage, WorkerResult};
pub use room::{Room, Rooms, Size};
pub use transport::{
    ControlStream, EventStream, JobDelivery, LATELY, LIVES, Published, ResultDelivery, Seen,
    Transport, TransportError,
};

/// The version of every message that this crate writes, and the only one that it reads.
pub const VERSION: u32 = 1;

/// An error with its causes, in one line. It may repeat what is wrong in a message, and is cut to a bound.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    shortened(&text).to_owned()
}

/// The beginning of a reason: most that is kept of one, so that whoever writes messages does not write its length.
fn shortened(reason: &str) -> &str {
    const REASON_BYTES: usize = 1024;
    let mut end = reason.len().min(REASON_BYTES);
    while !reason.is_char_boundary(end) {
        end -= 1;
    }
    &reason[..end]
}

/// A message as JSON, if it is not too large.
fn encode<T: serde::Serialize>(message: &T, limit: usize) -> Result<String, TransportError> {
    let text = serde_json::to_string(message)
        .map_err(|e| TransportError::Message(DecodeError::Json(e)))?;
    if text.len() > limit {
        return Err(TransportError::Message(DecodeError::TooLarge {
            bytes: text.len(),
            limit,
        }));
    }
    Ok(text)
}
