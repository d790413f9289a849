//! Runs a command confined on Linux with [bubblewrap](https://github.com/containers/bubblewrap).
//!
//! One mechanism for coding workers, for a repository's own CI command and for deployed services:
//! an explicit list of mounts (never the whole root, never a home directory), own user, PID, IPC,
//! UTS, mount, cgroup and network namespaces (loopback only), uid 1000 without capabilities even
//! when we are root, a filter of system calls, an explicit environment, and limits of memory, processes, CPU, time, silence,
//! file size and disk whose breach is a typed [`Reason`].
//!
//! ```no_run
//! # async fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use sandbox::{Job, Limits, Sandbox};
//!
//! let sandbox = Sandbox::detect()?;
//! let job = Job::new(["python3", "-m", "unittest"])
//!     .mount_rw("/srv/work/tree", "/workspace")
//!     .cwd("/workspace")
//!     .limits(Limits { memory_mb: 512, wall_s: Some(120), ..Limits::default() });
//! let output = sandbox.run(&job).await?;
//! println!("{}: {}", output.ended.reason, output.tail);
//! # Ok(()) }
//! ```
//!
//! The way in and out of a sandbox is a Unix socket that the caller mounts; [`relay`] joins it to
//! a loopback port inside, [`launcher`] is the small program that does so before the command.
//!
//! Not for: images, containers, or anything that needs root inside. Nothing here knows what it runs.

mod bubblewrap;
mod cgroup;
mod clean;
mod descriptors;
mod detect;
mod direct;
mod disk;
mod error;
mod job;
pub mod launcher;
mod lines;
mod lookout;
mod output;
pub mod relay;
mod running;
mod seccomp;
mod spawning;
mod tree;

pub use descriptors::detached;
pub use detect::{Sandbox, Unavailable, Unconfined};
pub use disk::{exceeds, exceeds_mb, used_mb};
pub use error::Error;
pub use job::{Job, Limits, Stdin};
pub use lines::{Line, Splitter, Tail};
pub use running::{Ended, Output, Reason, Running, Stopper};
