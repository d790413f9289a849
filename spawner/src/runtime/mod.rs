//! Where workers run: one trait, two implementations, which pass the same tests.
//!
//! * [`Local`]: bubblewrap on this machine. Its workers die with this process.
//! * [`Containers`]: a Docker engine on this machine. Its workers outlive this process, and the next one adopts them.
//!
//! In both a worker sees its workspace, the folder with the broker's socket, and nothing else of the host; it has only its own
//! loopback, on which the launcher relays to that socket.

mod containers;
mod local;

pub use containers::{Containers, DockerOptions, Warm, wait_for_go};
pub use local::Local;

use async_trait::async_trait;
use protocol::{Size, SpawnRequest};
use sandbox::{Line, Reason};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Where a worker finds its workspace.
pub const WORKSPACE: &str = "/workspace";
/// Where a worker finds the folder of the broker's socket.
const BROKER: &str = "/run/artel/broker";
/// The socket's name in its folder.
pub(crate) const SOCKET: &str = "socket";
/// The relay's port in a network of its own.
const PORT: u16 = 8118;

/// Whose work something is. Goes into labels, and finds a worker again after a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The project.
    pub project: String,
    /// The job.
    pub job: String,
    /// The task.
    pub task: String,
    /// The request.
    pub request: String,
    /// Which attempt of the task it is.
    pub attempt: u32,
}

impl Identity {
    pub(crate) fn of(request: &SpawnRequest) -> Self {
        Self {
            project: request.project_id.clone(),
            job: request.job_id.clone(),
            task: request.task_id.clone(),
            request: request.request_id.clone(),
            attempt: request.attempt,
        }
    }
}

/// What part of an attempt something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The agent: what it did counts, however the spawner fares meanwhile.
    Agent,
    /// Git bringing a workspace up to date: done again when it was interrupted.
    Refresh,
}

/// What runs.
#[derive(Clone, Debug)]
pub enum Inside {
    /// The program that carries [`worker::main`], with these arguments.
    Agent(Vec<String>),
    /// A program of the worker's system, with its arguments.
    Program(Vec<String>),
}

/// What a worker may use.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Wall clock, in seconds.
    pub wall_s: u64,
    /// Processors, as a number of cores.
    pub cpu: f64,
    /// Memory, in MiB.
    pub memory_mb: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Disk, in MiB.
    pub disk_mb: u64,
    /// Whether the runtime has to see to that; the workspace is a disk of this size otherwise.
    pub disk_watched: bool,
}

impl From<&protocol::Limits> for Limits {
    fn from(limits: &protocol::Limits) -> Self {
        Self {
            wall_s: limits.wall_s,
            cpu: limits.cpu,
            memory_mb: limits.memory_mb,
            pids: limits.pids,
            disk_mb: limits.disk_mb,
            disk_watched: true,
        }
    }
}

/// The way out of a worker.
#[derive(Clone, Debug)]
pub struct Relay {
    /// The folder on the host in which the broker's socket is.
    pub folder: PathBuf,
    /// Where the worker's programs find the broker, on its loopback; of [`Runtime::port`].
    pub port: u16,
}

impl Relay {
    fn listen(&self) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, self.port))
    }

    fn socket() -> String {
        format!("{BROKER}/{SOCKET}")
    }
}

/// Something to be run in a workspace.
#[derive(Clone, Debug)]
pub struct Work {
    /// Whose it is.
    pub who: Identity,
    /// What part of the attempt it is.
    pub part: Part,
    /// What runs.
    pub inside: Inside,
    /// Its environment; nothing is inherited but what the worker's system sets.
    pub env: Vec<(String, String)>,
    /// The workspace, on the host; writable at [`WORKSPACE`], where everything starts.
    pub workspace: PathBuf,
    /// What else is seen of the host, read-only: where it is there, and where inside.
    pub shown: Vec<(PathBuf, PathBuf)>,
    /// The way out; none for what needs none.
    pub relay: Option<Relay>,
    /// What it may use.
    pub limits: Limits,
    /// Whether there is nothing in the workspace but a clone, which can be made again.
    pub fresh: bool,
    /// Whether it runs Docker inside; [`Runtime::docker_inside`] says whether it can.
    pub docker: bool,
}

/// The end of a worker and what it used.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// Why.
    pub reason: Reason,
    /// Seconds from start to end.
    pub wall_s: f64,
    /// Processor seconds, as of the last look.
    pub cpu_s: f64,
    /// The most memory that was seen, in MiB.
    pub peak_memory_mb: u64,
    /// What else is known of the end, in a line; may be empty.
    pub evidence: String,
    /// Who else ended it, when neither it nor we did.
    pub from_outside: Option<String>,
}

/// Why a runtime could not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox refused.
    #[error(transparent)]
    Sandbox(#[from] sandbox::Error),
    /// A worker cannot run Docker inside.
    #[error("{0}")]
    NoDockerInside(&'static str),
    /// The engine refused.
    #[error(transparent)]
    Docker(#[from] crate::docker::Error),
    /// Something of this machine is missing.
    #[error("the machine refused {0}")]
    Machine(&'static str, #[source] io::Error),
}

/// A worker that was started.
#[async_trait]
pub trait Worker: Send {
    /// Takes the lines of its output away, to be read elsewhere.
    fn take_lines(&mut self) -> Option<mpsc::Receiver<Line>>;
    /// The end of its output by now.
    fn tail(&self) -> String;
    /// Asks it to end, and kills it after `grace`. Returns at once.
    fn stop(&self, grace: Duration);
    /// Waits for the end. May be called again, and may be cancelled.
    async fn wait(&mut self) -> Result<Ended, Error>;
}

/// A worker of a former process of ours, or what is left of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LeftOver {
    /// The runtime's name of it.
    pub id: String,
    /// Whom it worked for.
    pub who: Identity,
    /// What part of the attempt it was.
    pub part: Part,
    /// What it may use.
    pub size: Size,
    /// Whether it runs now.
    pub running: bool,
    /// When it was made, in seconds since 1970.
    pub made_at_s: i64,
    /// When its wall clock is over, in seconds since 1970.
    pub deadline_s: i64,
}

/// Runs workers.
#[async_trait]
pub trait Runtime: Send + Sync + 'static {
    /// One sentence for people and logs.
    fn describe(&self) -> String;

    /// Whether what it needs is there, as far as this can be told at once.
    fn check(&self) -> Result<(), crate::Error>;

    /// Whether its workers are confined; if not, what they do is known beforehand.
    fn is_confined(&self) -> bool {
        true
    }

    /// User and group of its workers on this machine, when they are not ours: workspaces have to belong to them.
    fn owner(&self) -> Option<(u32, u32)>;

    /// Whether it looks too seldom how large a workspace is to hold back one that grows fast.
    fn looks_seldom(&self) -> bool {
        false
    }

    /// Whether its workers see what this process mounts in a workspace; if not, why.
    async fn sees_mounts(&self) -> Result<(), String> {
        Ok(())
    }

    /// A port for [`Relay`] that is free inside.
    fn port(&self) -> io::Result<u16> {
        Ok(PORT)
    }

    /// Whether a worker could run Docker inside, now.
    async fn docker_inside(&self) -> Result<(), Error> {
        Err(Error::NoDockerInside(
            "workers of this spawner run in a sandbox, not in Docker; choose SPAWNER_RUNTIME=sysbox-runc and install Sysbox as docs/sysbox.md says",
        ))
    }

    /// Starts something. Dropping the [`Worker`] ends it only if [`Runtime::outlives`] says no.
    async fn start(&self, work: &Work) -> Result<Box<dyn Worker>, Error>;

    /// Whether workers outlive this process.
    fn outlives(&self) -> bool {
        false
    }

    /// The agent of this request, if a former process of ours has started it: running, or ended with its evidence.
    async fn adopt(
        &self,
        _who: &Identity,
        _limits: &Limits,
        _workspace: &std::path::Path,
    ) -> Result<Option<Box<dyn Worker>>, Error> {
        Ok(None)
    }

    /// Ends and removes whatever works, or has worked, in the workspace of this task; returns when it is gone.
    async fn clear(&self, _who: &Identity) -> Result<(), Error> {
        Ok(())
    }

    /// Ends and removes what belongs to this request; its result is known.
    async fn discard(&self, _who: &Identity) -> Result<(), Error> {
        Ok(())
    }

    /// Everything that is ours, whoever started it.
    async fn left_over(&self) -> Result<Vec<LeftOver>, Error> {
        Ok(Vec::new())
    }

    /// Ends what is ours and nobody can name any more, as after the death of an engine; says how much that was.
    async fn end_strays(&self) -> Result<usize, Error> {
        Ok(0)
    }

    /// Keeps ready what the next worker needs, until `stop`; then ends and removes it, and returns. `disks` says whether
    /// workspaces are disks of their own.
    async fn keep_warm(&self, _disks: bool, _stop: &CancellationToken) {}

    /// Keeps something that is ready for this request, whose task has no disk yet, and makes the disk of that the task's, in the
    /// folder of its notes (`state`). Returns whether there was something of these limits. [`Runtime::start`] uses it for the
    /// request, [`Runtime::discard`] throws it away.
    async fn lend_disk(
        &self,
        _who: &Identity,
        _limits: &Limits,
        _state: &std::path::Path,
    ) -> Result<bool, Error> {
        Ok(false)
    }

    /// Kills one of [`Runtime::left_over`], leaving its evidence.
    async fn kill(&self, _id: &str) -> Result<(), Error> {
        Ok(())
    }

    /// Removes one of [`Runtime::left_over`].
    async fn remove(&self, _id: &str) -> Result<(), Error> {
        Ok(())
    }
}
