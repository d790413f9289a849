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

    pub(crate) fn is_stopped(&self) -> bool {
        self.token.is_cancelled()
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
