//! What can go wrong before a command runs or while it is watched. A command that ran and ended
//! badly is no error: see [`crate::Reason`].

use std::path::PathBuf;

/// A job that could not be started or watched.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Commands cannot be confined here, so none runs.
    #[error("commands only run in a sandbox, and there is none: {0}")]
    Unavailable(#[from] crate::Unavailable),
    /// The job asks for something that makes no sense.
    #[error("the sandbox job is not usable: {0}")]
    Job(String),
    /// A host path of a mount is missing or unreadable.
    #[error("cannot mount {path} into the sandbox; check that it exists and is readable", path = .host.display())]
    Mount {
        /// The path on the host.
        host: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// The operating system refused something that is needed to start a process.
    #[error("cannot start the sandbox: {doing} failed")]
    Start {
        /// What was being done.
        doing: &'static str,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
    /// Bubblewrap ended before the command began.
    #[error("the sandbox could not be set up, the command never began: {message}")]
    Setup {
        /// What bubblewrap said.
        message: String,
    },
    /// A file descriptor of whoever started us would reach the sandbox and cannot be closed.
    #[error(
        "file descriptor {0} was inherited from whoever started this program and would be open inside the sandbox; install bash, or start the program without it"
    )]
    InheritedDescriptor(u32),
    /// The watcher of a running job is gone (its runtime ended).
    #[error("the watcher of the sandbox ended before the command did; the command was killed")]
    Lost,
}

impl Error {
    pub(crate) fn start(doing: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Start { doing, source }
    }
}
