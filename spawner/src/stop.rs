//! Stopping one attempt from elsewhere, with the reason.

use crate::trouble::{Trouble, kind};
use protocol::ResultStatus;
use std::sync::Arc;
use tokio::sync::watch;

/// Why an attempt is stopped, the weakest reason first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Why {
    /// The budget that pays for it is used up.
    Unpaid,
    /// A later attempt of the same task wants the workspace.
    Superseded,
    /// The crew cancelled the request.
    Cancelled,
}

/// A request to stop; the strongest reason stands, whenever it comes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Stop(Arc<watch::Sender<Option<Why>>>);

impl Stop {
    pub(crate) fn stop(&self, why: Why) {
        self.0.send_if_modified(|before| {
            let is_stronger = Some(why) > *before;
            if is_stronger {
                *before = Some(why);
            }
            is_stronger
        });
    }

    fn why(&self) -> Option<Why> {
        *self.0.borrow()
    }

    pub(crate) async fn stopped(&self) {
        self.reaches(Why::Unpaid).await;
    }

    /// Stopped, and also what the worker has made before is not wanted any more. That a budget is used up only ends what
    /// still spends.
    pub(crate) async fn stopped_for_good(&self) {
        self.reaches(Why::Superseded).await;
    }

    /// Stopped, while there is a report of its worker or not.
    pub(crate) async fn stopped_with(&self, has_report: bool) {
        if has_report {
            self.stopped_for_good().await;
        } else {
            self.stopped().await;
        }
    }

    /// Waits for a reason that is at least as strong as this one.
    async fn reaches(&self, least: Why) {
        let mut reasons = self.0.subscribe();
        // Who says so cannot be gone: we are among them.
        let _ = reasons.wait_for(|why| *why >= Some(least)).await;
    }

    /// Whether it was stopped, and nothing is left to be judged: a report of a worker that is not paid any more stands.
    pub(crate) fn is_stopped(&self, has_report: bool) -> bool {
        let least = if has_report {
            Why::Superseded
        } else {
            Why::Unpaid
        };
        self.why() >= Some(least)
    }

    /// What the attempt's result says.
    pub(crate) fn trouble(&self) -> Trouble {
        match self.why() {
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

    #[tokio::test(start_paused = true)]
    async fn the_strongest_reason_stands_in_whatever_order_they_come() {
        let all = [Why::Unpaid, Why::Superseded, Why::Cancelled];
        for (one, first) in all.into_iter().enumerate() {
            for (two, second) in all.into_iter().enumerate() {
                let stop = Stop::default();
                stop.stop(first);
                let waits = tokio::spawn({
                    let stop = stop.clone();
                    async move { ends(&stop).await }
                });
                tokio::task::yield_now().await;
                stop.stop(second);
                assert_eq!(stop.why(), Some(all[one.max(two)]), "{first:?}, {second:?}");
                let heard = waits.await.unwrap();
                assert_eq!(heard, one.max(two) > 0, "{first:?}, {second:?}");
            }
        }
    }
}
