//! Stopping one attempt from elsewhere, with the reason.

use crate::trouble::{Trouble, kind};
use protocol::ResultStatus;
use std::sync::{Arc, OnceLock};
use tokio_util::sync::CancellationToken;

/// Why an attempt is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The crew cancelled the request.
    Cancelled,
    /// The budget that pays for it is used up.
    Unpaid,
    /// A later attempt of the same task wants the workspace.
    Superseded,
}

/// A request to stop; the first reason stands.
#[derive(Clone, Default)]
pub(crate) struct Stop {
    token: CancellationToken,
    why: Arc<OnceLock<Why>>,
}

impl Stop {
    pub(crate) fn stop(&self, why: Why) {
        // A second reason changes nothing.
        let _ = self.why.set(why);
        self.token.cancel();
    }

    pub(crate) async fn stopped(&self) {
        self.token.cancelled().await;
    }

    /// Stopped, and also what the worker has made before is not wanted any more. That a budget is used up only ends what
    /// still spends.
    pub(crate) async fn stopped_for_good(&self) {
        self.stopped().await;
        if self.why.get() == Some(&Why::Unpaid) {
            std::future::pending::<()>().await;
        }
    }

    /// Whether it was stopped, and nothing is left to be judged: a report of a worker that is not paid any more stands.
    pub(crate) fn is_stopped(&self, has_report: bool) -> bool {
        self.token.is_cancelled() && !(has_report && self.why.get() == Some(&Why::Unpaid))
    }

    /// What the attempt's result says.
    pub(crate) fn trouble(&self) -> Trouble {
        match self.why.get() {
            Some(Why::Superseded) => superseded(),
            Some(Why::Unpaid) => Trouble::failed(
                kind::BUDGET,
                "The budget of the project is used up, so the worker was stopped; its workspace is kept.",
            ),
            Some(Why::Cancelled) | None => Trouble::cancelled(),
        }
    }
}

/// What the result of an attempt says that came too late.
pub(crate) fn superseded() -> Trouble {
    Trouble::failed(
        kind::SUPERSEDED,
        "A later attempt of the same task has taken its place.",
    )
    .status(ResultStatus::Cancelled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    async fn ends(stop: &Stop) -> bool {
        let wait = tokio::time::timeout(Duration::from_mins(1), stop.stopped_for_good());
        wait.await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_worker_has_reported_before_its_budget_was_used_up_is_taken() {
        let stop = Stop::default();
        assert!(!stop.is_stopped(false) && !ends(&stop).await);
        stop.stop(Why::Unpaid);
        assert!(stop.is_stopped(false));
        assert!(!stop.is_stopped(true) && !ends(&stop).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_report_changes_nothing_about_what_was_cancelled() {
        for why in [Why::Cancelled, Why::Superseded] {
            let stop = Stop::default();
            stop.stop(why);
            assert!(stop.is_stopped(false) && stop.is_stopped(true) && ends(&stop).await);
        }
    }
}
