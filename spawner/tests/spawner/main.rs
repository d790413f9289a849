//! The spawner end to end: real Git, the real sandbox, the durable transport, scripted models. What holds for containers too is
//! compiled a second time, in `tests/containers`.

mod abandoned;
mod bad_input;
mod broker;
mod capacity;
mod crash;
mod disk;
mod full_disk;
mod githost;
mod github;
mod github_app;
mod hostile;
mod leftovers;
mod limits;
mod reach;
mod remote;
mod stage;
mod stops;
mod unconfined;
mod working;

/// Whether workers are containers.
const IN_DOCKER: bool = false;
