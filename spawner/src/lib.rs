//! Runs coding workers on this machine: for every job a workspace, a sandbox and a broker, and at
//! the end a result that names a commit which is in the repository.
//!
//! * [`Spawner`]: takes jobs from a [`protocol::Transport`] and brings each to one result.
//! * `workspace`, `refresh.sh`: the clone that outlives its workers.
//! * `remote`, `mirror`, [`GitTokens`]: repositories that are elsewhere, the mirror that the tasks of one share, and the
//!   credentials for them.
//! * [`Disk`]: workspaces that are disks of their own, as large as their jobs' limits.
//! * `keeping`: how long mirrors and workspaces are kept.
//! * [`Capacity`]: what workers may use together.
//! * `presence`: which spawners of the same home live.
//! * `broker`: model, proxy and report of one worker, behind a key that ends with it.
//! * [`runtime`]: where workers run: a sandbox on this machine, or containers.
//! * [`docker`]: containers of a Docker engine, made and watched.
//! * `process`: what the worker is given, and how it is watched until its end.
//! * `reconcile`: what is ours and nobody's any more, found and cleared away.
//! * `collect`: takes the commits over, believing nothing that the worker left.
//!
//! *Architecture invariants:* a spawner has no database; what it must not forget is in the transport
//! or beside the workspace. Git never runs, outside the sandbox, with a `.git` that a worker could
//! write. A worker's environment is an explicit list.

mod attempt;
mod broker;
mod capacity;
mod collect;
mod disk;
pub mod docker;
mod events;
mod git;
mod keeping;
mod mirror;
mod places;
mod presence;
mod process;
mod reading;
mod reconcile;
mod remote;
mod remove;
pub mod runtime;
mod seat;
mod service;
mod stop;
mod tokens;
mod trouble;
mod workspace;

pub use capacity::Capacity;
pub use disk::Disk;
pub use keeping::Keep;
pub use service::{Handle, Spawner};
pub use tokens::{AppError, GitHubApp, GitToken, GitTokens, HostToken, NoTokens, TokenError};
pub use trouble::kind;

use ports::WorkerModels;
use protocol::Transport;
use runtime::Runtime;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// A program and the arguments that lead to what we want of it.
#[derive(Clone, Debug)]
pub struct Program {
    /// Where it is, on this machine.
    pub path: PathBuf,
    /// Sub-commands and the like, before our own arguments.
    pub args: Vec<String>,
}

/// What a [`Spawner`] works with.
pub struct Options {
    /// `ARTEL_HOME`; workspaces are in its folder `workspaces`.
    pub home: PathBuf,
    /// Where workers run.
    pub runtime: Arc<dyn Runtime>,
    /// Where jobs come from and results go.
    pub transport: Arc<dyn Transport>,
    /// The models behind the broker.
    pub models: Arc<dyn WorkerModels>,
    /// Mints credentials for repositories that are elsewhere.
    pub tokens: Arc<dyn GitTokens>,
    /// How long the host of such a repository may take to say what it has.
    pub git_patience: Duration,
    /// How long a worker may go on that was told that its budget is used up: it is answered nothing more, but can end the command
    /// that it runs, and report.
    pub unpaid_patience: Duration,
    /// Workers at a time.
    pub max_workers: usize,
    /// What they may use together, and what becomes of jobs that do not fit.
    pub capacity: Capacity,
    /// How a workspace is kept from growing beyond its job's limit.
    pub disk: Disk,
    /// How long mirrors and workspaces are kept.
    pub keep: Keep,
    /// Name of this spawner in events and heartbeats.
    pub name: String,
    /// Makes a worker's span a child of its request's trace context; see [`Continue`].
    pub continue_trace: Continue,
}

/// Makes a span, which nobody has entered yet, a child of a W3C `traceparent`. Returns whether it is now.
pub type Continue = fn(&tracing::Span, &str) -> bool;

impl Options {
    /// The usual choices: four workers at a time, whatever they may use, no credentials for repositories elsewhere, named `local`, traces not
    /// continued.
    pub fn new(
        home: impl Into<PathBuf>,
        runtime: Arc<dyn Runtime>,
        transport: Arc<dyn Transport>,
        models: Arc<dyn WorkerModels>,
    ) -> Self {
        Self {
            home: home.into(),
            runtime,
            transport,
            models,
            tokens: Arc::new(NoTokens),
            git_patience: Duration::from_mins(1),
            unpaid_patience: Duration::from_mins(1),
            max_workers: 4,
            capacity: Capacity::unlimited(),
            disk: Disk::default(),
            keep: Keep::default(),
            name: "local".to_owned(),
            continue_trace: |_, _| false,
        }
    }
}

/// Why a spawner cannot work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No worker may run at all.
    #[error("SPAWNER_MAX_WORKERS is 0; at least one worker has to be allowed")]
    NoRoom,
    /// A program that goes into the sandbox is missing.
    #[error("the program {path} is missing; reinstall artel", path = .path.display())]
    Program {
        /// Where it should be.
        path: PathBuf,
    },
    /// The folder of the workspaces cannot be made.
    #[error("cannot make the folder {path}; check ARTEL_HOME and its permissions", path = .path.display())]
    Home {
        /// The folder.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// Workspaces cannot be disks of their own, and were to be.
    #[error(
        "SPAWNER_DISK is `loop`, and workspaces cannot be disks of their own here: {reason}; give the spawner root, loop devices and the programs, or choose `auto` or `polled`"
    )]
    NoDisks {
        /// Why not.
        reason: String,
    },
    /// The transport cannot be listened to.
    #[error("cannot listen for orders to workers")]
    Transport(#[source] protocol::TransportError),
}

/// Removes every workspace of a project; for a project that is removed. Nothing of it may be running.
pub fn remove_workspaces(home: &Path, project_id: &str) -> io::Result<()> {
    let folder = places::project(home, project_id);
    disk::unmount_all(&folder).map_err(io::Error::other)?;
    places::remove_any(&folder)
}
