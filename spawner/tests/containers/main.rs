//! The spawner end to end once more, with workers in containers of a real engine (`scripts/with-docker` starts one).

mod adoption;
#[path = "../spawner/bad_input.rs"]
mod bad_input;
#[path = "../spawner/broker.rs"]
mod broker;
#[path = "../spawner/disk.rs"]
mod disk;
#[path = "../spawner/hostile.rs"]
mod hostile;
mod image;
mod killed;
#[path = "../spawner/leftovers.rs"]
mod leftovers;
#[path = "../spawner/limits.rs"]
mod limits;
mod missing;
#[path = "../spawner/reach.rs"]
mod reach;
#[path = "../spawner/stage.rs"]
mod stage;
mod strays;
mod sysbox;
mod warm;
mod warm_disks;
#[path = "../spawner/working.rs"]
mod working;

/// Whether workers are containers.
const IN_DOCKER: bool = true;
