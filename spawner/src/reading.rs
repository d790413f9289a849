//! Where Git reads what a worker has made: in a sandbox of its own, wherever there is one.
//!
//! Packs, their indexes and loose objects come from the worker as they are, and are read by a large program. In here a hole in it
//! is no hole in the spawner: it sees the system's programs, the worker's objects, one file for its answer, and nothing else; no
//! network, no credential, and no more memory, time and processes than it needs.

use crate::git::Error;
use crate::runtime::Runtime;
use sandbox::{Job, Limits, Reason, Sandbox, Stdin};
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Where the repository is that lends the worker's objects.
pub(crate) const VIEW: &str = "/run/artel/view";
/// Where these are.
pub(crate) const OBJECTS: &str = "/run/artel/objects";
/// Where Git writes what it has to say.
const ANSWER: &str = "/run/artel/answer";
/// Runs a command whose answer may be of any bytes; what it complains of goes where the sandbox keeps it.
const SCRIPT: &str = "answer=$1; shift; exec \"$@\" >\"$answer\"";
/// Most that one command may answer, in MiB; more than the most that is taken over.
const ANSWER_MB: u64 = 768;

/// What keeps Git's own use of memory below the limit, however long the history is.
const SETTINGS: [&str; 7] = [
    "core.packedGitWindowSize=16m",
    "core.packedGitLimit=256m",
    "core.deltaBaseCacheLimit=64m",
    "core.bigFileThreshold=16m",
    "pack.windowMemory=128m",
    "pack.deltaCacheSize=64m",
    "pack.threads=1",
];

/// How Git is confined; none: there is no sandbox here, and it runs beside us.
#[derive(Clone, Debug, Default)]
pub(crate) struct Reading(Option<Confined>);

/// Git in a sandbox.
#[derive(Clone, Debug)]
pub(crate) struct Confined {
    sandbox: Sandbox,
    /// Host paths that are shown read-only, and where.
    shown: Vec<(PathBuf, PathBuf)>,
    /// Where programs are looked for instead of in the system's folders.
    path: Option<String>,
    /// The file for what Git answers; one command at a time.
    answer: PathBuf,
}

impl Reading {
    /// Looks once what there is, and says in the log if there is nothing.
    pub(crate) async fn find(runtime: &dyn Runtime) -> Self {
        if !runtime.is_confined() {
            // Its commands are known beforehand, and so is what they leave.
            return Self(None);
        }
        let found = tokio::task::spawn_blocking(Sandbox::detect).await;
        let sandbox = match found {
            Ok(Ok(sandbox)) => sandbox,
            Ok(Err(reason)) => return Self::missing(&reason.to_string()),
            Err(error) => return Self::missing(&error.to_string()),
        };
        let trial = Job::new(["git", "--version"]).limits(limits(Duration::from_secs(30)));
        match sandbox.run(&trial).await {
            Ok(output) if output.ended.success() => Self(Some(Confined::new(sandbox))),
            Ok(output) => Self::missing(&format!(
                "git {}: {}",
                output.ended.reason,
                output.tail.trim()
            )),
            Err(error) => Self::missing(&crate::trouble::chain(&error)),
        }
    }

    fn missing(reason: &str) -> Self {
        tracing::warn!(
            reason,
            "Git reads what workers have made without a sandbox, because it cannot be confined here"
        );
        Self(None)
    }

    /// In this sandbox.
    #[cfg(test)]
    pub(crate) fn within(confined: Confined) -> Self {
        Self(Some(confined))
    }

    /// Git in the sandbox, which is shown these host paths and answers in a file of this name; none: there is no sandbox.
    pub(crate) fn confined(
        &self,
        shown: Vec<(PathBuf, PathBuf)>,
        answer: PathBuf,
    ) -> Option<Confined> {
        let mut confined = self.0.clone()?;
        confined.shown.extend(shown);
        confined.answer = answer;
        Some(confined)
    }

    /// Whether there is a sandbox.
    pub(crate) fn is_confined(&self) -> bool {
        self.0.is_some()
    }
}

impl Confined {
    pub(crate) fn new(sandbox: Sandbox) -> Self {
        Self {
            sandbox,
            shown: Vec::new(),
            path: None,
            answer: PathBuf::new(),
        }
    }

    /// With another `git`, which is in this folder of the host.
    #[cfg(test)]
    pub(crate) fn with_programs(mut self, folder: PathBuf) -> Self {
        self.shown.push((folder, "/run/artel/programs".into()));
        self.path = Some("/run/artel/programs:/usr/bin:/bin".to_owned());
        self
    }

    /// Runs Git with these words and this environment; gives what it answered, from the beginning, and how long that is.
    pub(crate) async fn run(
        &self,
        env: &[(&str, &str)],
        settings: &[&str],
        words: &[&str],
        input: Option<Vec<u8>>,
        time: Duration,
    ) -> Result<(File, u64), Error> {
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(true);
        let answer = options.open(&self.answer).map_err(Error::Start)?;
        let script = ["sh", "-c", SCRIPT, "sh", ANSWER, "git"];
        let own = SETTINGS.iter().chain(settings);
        let own = own.flat_map(|setting| ["-c", setting]);
        let argv = script.into_iter().chain(own).chain(words.iter().copied());
        let mut job = Job::new(argv)
            .limits(limits(time))
            .mount_rw(&self.answer, ANSWER);
        for (name, value) in env {
            job = job.env(*name, *value);
        }
        if let Some(path) = &self.path {
            job = job.env("PATH", path);
        }
        for (host, guest) in &self.shown {
            job = job.mount_ro(host, guest);
        }
        if let Some(input) = input {
            job = job.stdin(Stdin::Bytes(input));
        }
        let output = self.sandbox.run(&job).await.map_err(Error::Confine)?;
        let shown = || shown(words);
        match output.ended.reason {
            Reason::Exited(0) => {
                let length = answer.metadata().map_err(Error::Start)?.len();
                Ok((answer, length))
            }
            Reason::Exited(127) => Err(Error::Start(io::Error::other(output.tail))),
            Reason::Exited(code) => Err(Error::Failed {
                command: shown(),
                code: Some(code),
                said: output.tail.trim().to_owned(),
            }),
            Reason::Wall => Err(Error::Time(shown(), time)),
            reason => Err(Error::Ended {
                command: shown(),
                reason,
                said: output.tail.trim().to_owned(),
            }),
        }
    }
}

/// The command as people are told of it.
fn shown(words: &[&str]) -> String {
    // Behind the folder.
    let words = words.iter().skip(2).take(4).copied();
    words.collect::<Vec<_>>().join(" ")
}

fn limits(time: Duration) -> Limits {
    Limits {
        memory_mb: 1536,
        pids: 16,
        wall_s: Some(time.as_secs()),
        file_mb: ANSWER_MB,
        tmp_mb: 16,
        output_mb: 1,
        ..Limits::default()
    }
}
