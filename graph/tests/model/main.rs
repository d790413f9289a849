//! That leases, signals and children are right, whatever happens in whatever order: all orders within limits, on the database
//! in memory; and random orders beyond them on the others, which must do what the one in memory does.
//!
//! The nodes of a graph are left out, and so is time, but for leases that expire. What is explored is what a run asks of the
//! database, and what the database makes of it. `make soak` goes further.

mod explore;
mod flaws;
mod others;
mod promises;
mod run;
#[path = "../storage/mod.rs"]
mod storage;
mod world;

/// A number of the long form, when `ARTEL_SOAK` asks for it, else of the short one.
fn long<T>(long: T, short: T) -> T {
    if std::env::var_os("ARTEL_SOAK").is_some() {
        long
    } else {
        short
    }
}
