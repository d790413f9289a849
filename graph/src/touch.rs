//! Whether a process is in touch with the database, and what it does when it has been out of touch.
//!
//! While the database is away nobody can renew a lease, and when it is back, leases have expired whose runs live on in other
//! processes or in this one. Whoever claims at that moment takes work away that would have been finished. So a process renews its
//! own leases before it claims, and lets the others renew theirs.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

#[derive(Debug)]
pub(crate) struct Touch {
    /// How long a lease holds without renewal.
    lease: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// When the database answered last.
    answered: Instant,
    /// When leases were renewed last.
    renewed: Instant,
    /// It has not answered since.
    lost: bool,
}

impl Touch {
    pub fn new(lease: Duration) -> Self {
        let now = Instant::now();
        Self {
            lease,
            state: Mutex::new(State {
                answered: now,
                renewed: now,
                lost: false,
            }),
        }
    }

    /// The database has answered.
    pub fn found(&self) {
        let mut state = self.state.lock();
        state.answered = Instant::now();
        state.lost = false;
    }

    /// All leases were renewed, as of a request that began at this time.
    pub fn renewed(&self, since: Instant) {
        self.found();
        self.state.lock().renewed = since;
    }

    /// The database has not answered.
    pub fn lost(&self) {
        self.state.lock().lost = true;
    }

    /// Whether leases of this process may have expired, or may soon.
    pub fn must_renew(&self) -> bool {
        let state = self.state.lock();
        state.lost || state.renewed.elapsed() > self.lease / 2
    }

    /// Whether the database has not answered for so long that leases of others may have expired meanwhile.
    pub fn was_long_lost(&self) -> bool {
        let state = self.state.lock();
        state.lost && state.answered.elapsed() > self.lease / 2
    }
}
