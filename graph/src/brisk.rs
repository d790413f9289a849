//! Which nodes are done the moment they begin, by how long they took lately.
//!
//! Tasks that run at the same time run on several processors, and handing one to another processor takes longer than most nodes
//! that only look at the state and decide. Such nodes are run where the superstep is; the first one that takes its time is
//! handed over as before, and so is its node from then on.

use std::{
    sync::atomic::{AtomicU8, Ordering},
    time::Duration,
};

/// About what handing a task to another processor costs.
const SHORT: Duration = Duration::from_micros(20);
/// After so many short runs in a row, the next one is expected to be short.
const ENOUGH: u8 = 3;

/// How many of a node's last runs in a row were short.
#[derive(Debug, Default)]
pub(crate) struct Brisk(AtomicU8);

impl Brisk {
    pub fn expected(&self) -> bool {
        self.0.load(Ordering::Relaxed) >= ENOUGH
    }

    /// Waiting counts as well: who waits is not done the moment it begins.
    pub fn note(&self, took: Duration) {
        let short = if took <= SHORT {
            // Two at the same moment may count as one.
            self.0.load(Ordering::Relaxed).saturating_add(1).min(ENOUGH)
        } else {
            0
        };
        self.0.store(short, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_is_brisk_after_some_short_runs_until_a_long_one() {
        let brisk = Brisk::default();
        for _ in 0..ENOUGH {
            assert!(!brisk.expected());
            brisk.note(SHORT);
        }
        assert!(brisk.expected());
        brisk.note(SHORT + Duration::from_micros(1));
        assert!(!brisk.expected());
    }
}
