//! What the engine promises, one test per statement of `docs/semantics.md`, each on every database.

mod bad_input;
mod breakpoints;
mod caching;
mod cancelling;
mod children;
mod cleaning;
mod corruption;
mod crashes;
mod deadlines;
mod deferred;
mod documents;
mod expiry;
mod failure;
mod following;
mod graphs;
mod handlers;
mod inputs;
mod inside;
mod journal;
mod lab;
mod leases;
mod looking;
mod outages;
mod preempted;
mod releases;
mod retention;
mod sharing;
mod starts;
#[path = "../storage/mod.rs"]
mod storage;
mod streams;
mod subgraphs;
mod supersteps;
mod travel;
mod waits;
mod wakes;
