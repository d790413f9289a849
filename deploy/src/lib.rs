//! Runs a merged commit as a supervised service.
//!
//! The deployer of this machine, [`LocalDeployer`]: a release is a folder, its service a sandboxed
//! process without a network, its door a Unix socket. A detached [`supervisor`] per project owns
//! the public port on loopback and carries each connection to the release that is live, so that
//! there is no gap between two releases; it goes on when the program ends, restarts what died,
//! and is itself found dead and started again by [`LocalDeployer::reconcile`].
//!
//! What should be is written down first (`state.json`, by the deployer alone) and done second; the
//! supervisor keeps nothing on disk but logs. So it can be killed at any moment, and so can we.
//! Values of secrets go to the supervisor through its socket and are never written.
//!
//! ```text
//! ARTEL_HOME/deploy/{project}/
//!   state.json             what should be: releases, which is live, what is under way
//!   supervisor.json        who supervises: process id, its start time, port
//!   control.sock           how it is told
//!   releases/{n}-{sha}/    the files of a release, read-only for its service
//!   run/{n}/in.sock        the door of a release's service
//!   data/                  the service's own data, `/data` inside; survives releases
//!   logs/                  what the service and the supervisor say, with a cap
//! ```
//!
//! [`mod@unit`] writes the systemd user service that starts the program after a reboot.

mod checks;
mod control;
mod deployer;
mod exchange;
mod failures;
mod layout;
mod log;
mod release;
mod rollout;
mod service;
mod state;
pub mod supervisor;
pub mod unit;

pub use deployer::{LocalDeployer, Options, Reconciled};
