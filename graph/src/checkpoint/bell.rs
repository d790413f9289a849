//! Telling other processes that there is something to do.

use async_trait::async_trait;
use futures::stream::BoxStream;

use super::StorageError;

/// The longest message that a [`Bell`] must carry, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 7_500;

/// Carries short messages between the processes that share a database, so that none of them has to poll often.
///
/// Nothing depends on a message but time: what it tells is in the database, and whoever misses it finds it with the next
/// poll. So messages may get lost or come twice, and they never travel inside a commit. The engine decides what to tell and
/// when, sends one message at a time, and puts together what there is to tell while one is under way.
#[async_trait]
pub trait Bell: Send + Sync + 'static {
    /// Whether anybody may be listening. Where it is known that nobody is, nothing is rung.
    fn is_heard(&self) -> bool {
        true
    }

    /// Sends a message of at most [`MAX_MESSAGE_BYTES`] to everybody who listens on the same database, whoever sends it included.
    async fn ring(&self, message: &str) -> Result<(), StorageError>;

    /// Begins to listen: what is sent after this returns is in the stream, in the order in which it was sent. The stream ends
    /// when nothing can be heard any more (a lost connection); then the engine listens again. Dropping it ends listening.
    async fn listen(&self) -> Result<BoxStream<'static, String>, StorageError>;
}
