//! Parts of the work that go on beside each other.

use std::future::Future;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// Parts that go on beside each other until they are told to stop.
pub(super) struct Parts {
    pub(super) shutdown: CancellationToken,
    running: JoinSet<(&'static str, anyhow::Result<()>)>,
}

impl Parts {
    pub(super) fn new(shutdown: CancellationToken) -> Self {
        Self {
            shutdown,
            running: JoinSet::new(),
        }
    }

    pub(super) fn add<F, Fut>(&mut self, name: &'static str, run: F)
    where
        F: FnOnce(CancellationToken) -> Fut,
        Fut: Future<Output = anyhow::Result<()>> + Send + 'static,
    {
        let run = run(self.shutdown.clone());
        self.running.spawn(async move { (name, run.await) });
    }

    /// Comes back when a part ends.
    pub(super) async fn ended(&mut self) -> Option<(&'static str, anyhow::Result<()>)> {
        Some(match self.running.join_next().await? {
            Ok(ended) => ended,
            Err(error) => {
                let error = anyhow::anyhow!(error).context("a part of the program panicked");
                ("panicked", Err(error))
            }
        })
    }
}
