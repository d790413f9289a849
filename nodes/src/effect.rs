//! How nodes touch the world: a durable step around a port's call, where a node leads, and the two ways in which it can stop.

use std::future::Future;

use graph::{Context, NodeError};
use jiff::{SignedDuration, Timestamp};
use ports::Failure;
use serde::{Serialize, de::DeserializeOwned};

/// How often a call that failed in a passing way is made.
const TRIES: u32 = 3;

/// Where a node's work leads.
pub(crate) enum Next {
    /// To this node.
    Node(&'static str),
    /// To the end of the thread.
    End,
}

/// Why a node's work stops.
pub(crate) enum Stop {
    /// The engine's business: a suspension, a cancellation, a failure of the engine itself.
    Engine(NodeError),
    /// Something that a person has to look at.
    Trouble(Failure),
}

impl From<NodeError> for Stop {
    fn from(error: NodeError) -> Self {
        Self::Engine(error)
    }
}

impl From<Failure> for Stop {
    fn from(failure: Failure) -> Self {
        Self::Trouble(failure)
    }
}

/// Calls a port once and remembers what came of it, failures included. Failures that may pass are tried again after a pause,
/// during which the thread sleeps.
pub(crate) async fn effect<T, F, Fut>(ctx: &Context, name: &str, call: F) -> Result<T, Stop>
where
    T: Serialize + DeserializeOwned,
    F: Fn() -> Fut,
    Fut: Future<Output = ports::Result<T>>,
{
    let mut tried = 1;
    loop {
        let outcome: Result<T, Failure> = ctx
            .step(name, |_| async { Ok::<_, NodeError>(call().await) })
            .await?;
        match outcome {
            Ok(value) => return Ok(value),
            Err(failure) if failure.retryable && tried < TRIES => {
                let pause = i64::from(tried) * 2;
                let until = clock(ctx, "clock").await? + SignedDuration::from_secs(pause);
                ctx.sleep_until(&format!("{name}: pause"), until).await?;
                tried += 1;
            }
            Err(failure) => return Err(Stop::Trouble(failure)),
        }
    }
}

/// The time, the same in every re-run.
pub(crate) async fn clock(ctx: &Context, name: &str) -> Result<Timestamp, NodeError> {
    ctx.step(name, |_| async { Ok::<_, NodeError>(Timestamp::now()) })
        .await
}

/// A time that many seconds after another.
pub(crate) fn later(from: Timestamp, seconds: u64) -> Timestamp {
    let seconds = i64::try_from(seconds).unwrap_or(i64::MAX);
    from.checked_add(SignedDuration::from_secs(seconds))
        .unwrap_or(Timestamp::MAX)
}
