//! Messages between engines that share threads in memory.

use async_trait::async_trait;
use futures::stream::{BoxStream, StreamExt, unfold};
use tokio::sync::broadcast::{self, error::RecvError};

use crate::checkpoint::{Bell, StorageError};

/// How many messages a listener may lag behind.
const CAPACITY: usize = 256;

#[derive(Clone, Debug)]
pub(super) struct MemoryBell(broadcast::Sender<String>);

impl Default for MemoryBell {
    fn default() -> Self {
        Self(broadcast::channel(CAPACITY).0)
    }
}

#[async_trait]
impl Bell for MemoryBell {
    fn is_heard(&self) -> bool {
        self.0.receiver_count() > 0
    }

    async fn ring(&self, message: &str) -> Result<(), StorageError> {
        // Nobody listens: nobody needs to know.
        let _ = self.0.send(message.to_owned());
        Ok(())
    }

    async fn listen(&self) -> Result<BoxStream<'static, String>, StorageError> {
        let heard = unfold(self.0.subscribe(), |mut receiver| async move {
            match receiver.recv().await {
                Ok(message) => Some((message, receiver)),
                // Whoever listens again looks at everything.
                Err(RecvError::Lagged(_) | RecvError::Closed) => None,
            }
        });
        Ok(heard.boxed())
    }
}
