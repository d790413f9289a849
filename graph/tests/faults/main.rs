//! Faults at every moment, and what they leave behind: the old state or the new one, in a database that goes on.
//!
//! Each module is a kind of fault. Long forms run in `make soak`, which sets the numbers in the environment; whatever is
//! random comes from a seed that is printed, and that can be given again.

mod beginnings;
mod connections;
mod database;
mod graphs;
mod kills;
mod load;
mod operations;
mod proxy;
mod restarts;
mod round_trips;
mod statements;
#[path = "../storage/mod.rs"]
mod storage;

/// A number of the long form, when `ARTEL_SOAK` asks for it, else of the short one.
fn long<T>(long: T, short: T) -> T {
    if std::env::var_os("ARTEL_SOAK").is_some() {
        long
    } else {
        short
    }
}

/// Blocks a thread that may block.
#[expect(clippy::disallowed_methods, reason = "it is no thread of a runtime")]
fn block(milliseconds: u64) {
    std::thread::sleep(std::time::Duration::from_millis(milliseconds));
}
