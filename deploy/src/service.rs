//! One release's process: started, its lines logged, started again when it dies, ended.

use std::collections::{BTreeMap, VecDeque};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use sandbox::{Ended, Job, Limits, Reason, Sandbox};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::control::{Phase, ReleaseStatus, Start};
use crate::layout::{DOOR, Layout, private_directory, remove_directory};
use crate::log::Log;

/// The port that a service listens on, in a network of its own.
const PORT_INSIDE: u16 = 8080;
/// Where the folder of the door is inside.
const DOORWAY: &str = "/run/artel/io";
/// How long a service may take to end when it is asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How long connections to a release that is not live any more may go on.
const LET_GO: Duration = Duration::from_secs(4);
/// Longest line that is kept, in characters.
const LINE_CHARS: usize = 4000;
/// Lines kept as evidence.
const TAIL_LINES: usize = 40;
/// Starts within [`WINDOW`] before it counts as failed.
const MOST_STARTS: usize = 5;
const WINDOW: Duration = Duration::from_mins(2);
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// A shorter value is not looked for in the log: it would be found everywhere.
const SECRET_BYTES: usize = 6;

/// Who runs services, and how.
#[derive(Debug, Clone)]
pub(crate) struct Ground {
    pub layout: Layout,
    pub sandbox: Sandbox,
    pub launcher: PathBuf,
    pub launcher_args: Vec<String>,
}

/// A release that is being run.
pub(crate) struct Service {
    number: u64,
    progress: Arc<Mutex<Progress>>,
    connections: Arc<()>,
    /// What is wanted of it.
    wish: watch::Sender<Wish>,
    task: JoinHandle<()>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// To run; when it ends, that is that.
    Once,
    /// To run always.
    Always,
    /// To end.
    End,
}

struct Progress {
    phase: Phase,
    restarts: u32,
    last_end: Option<String>,
    tail: VecDeque<String>,
}

impl Service {
    pub(crate) fn start(ground: Ground, start: Start) -> Self {
        let progress = Arc::new(Mutex::new(Progress {
            phase: Phase::Running,
            restarts: 0,
            last_end: None,
            tail: VecDeque::new(),
        }));
        let (wish, wishes) = watch::channel(Wish::Once);
        let number = start.release;
        let keeper = Keeper {
            ground,
            start,
            progress: Arc::clone(&progress),
            wishes,
        };
        Self {
            number,
            progress,
            connections: Arc::new(()),
            wish,
            task: tokio::spawn(keeper.keep()),
        }
    }

    /// From now on it is started again when it dies.
    pub(crate) fn keep_alive(&self) {
        self.wish.send_if_modified(|wish| {
            let changes = *wish == Wish::Once;
            if changes {
                *wish = Wish::Always;
            }
            changes
        });
    }

    /// What every connection to it holds.
    pub(crate) fn connections(&self) -> Arc<()> {
        Arc::clone(&self.connections)
    }

    /// Waits, within a bound, until the connections to it are over.
    pub(crate) async fn let_go(&self) {
        let until = tokio::time::Instant::now() + LET_GO;
        while Arc::strong_count(&self.connections) > 1 && tokio::time::Instant::now() < until {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends it: asks, waits, kills.
    pub(crate) async fn end(self) {
        let _ = self.wish.send(Wish::End);
        let _ = self.task.await;
    }

    pub(crate) fn status(&self) -> ReleaseStatus {
        let progress = hold(&self.progress);
        ReleaseStatus {
            release: self.number,
            phase: progress.phase,
            restarts: progress.restarts,
            last_end: progress.last_end.clone(),
            tail: progress.tail.iter().cloned().collect(),
        }
    }
}

struct Keeper {
    ground: Ground,
    start: Start,
    progress: Arc<Mutex<Progress>>,
    wishes: watch::Receiver<Wish>,
}

impl Keeper {
    async fn keep(mut self) {
        let mut starts: VecDeque<Instant> = VecDeque::new();
        let mut pause = FIRST_PAUSE;
        loop {
            starts.retain(|at| at.elapsed() < WINDOW);
            starts.push_back(Instant::now());
            let begun = Instant::now();
            let end = self.run_once().await;
            if *self.wishes.borrow() == Wish::End {
                return;
            }
            if begun.elapsed() > WINDOW {
                pause = FIRST_PAUSE;
            }
            let again = *self.wishes.borrow() == Wish::Always && starts.len() < MOST_STARTS;
            {
                let mut progress = hold(&self.progress);
                let times = starts.len();
                progress.last_end = Some(if again || times == 1 {
                    end
                } else {
                    format!(
                        "started {times} times within {} s, then {end}",
                        WINDOW.as_secs()
                    )
                });
                progress.phase = if again { Phase::Waiting } else { Phase::Failed };
            }
            if !again {
                // Kept for its evidence until it is retired.
                end_wished(&mut self.wishes).await;
                return;
            }
            let ending = end_wished(&mut self.wishes);
            if tokio::time::timeout(pause, ending).await.is_ok() {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            let mut progress = hold(&self.progress);
            progress.restarts += 1;
            progress.phase = Phase::Running;
        }
    }

    /// Runs it to its end; how it ended, in words.
    async fn run_once(&mut self) -> String {
        match self.try_run_once().await {
            Ok(ended) => words(&ended),
            Err(error) => {
                let cause = std::error::Error::source(&error).map(|cause| format!(": {cause}"));
                format!(
                    "it could not be started: {error}{}",
                    cause.unwrap_or_default()
                )
            }
        }
    }

    async fn try_run_once(&mut self) -> Result<Ended, sandbox::Error> {
        let job = self.job()?;
        let mut running = self.ground.sandbox.spawn(&job)?;
        let mut log = Log::open(&self.ground.layout.log()).ok();
        let secrets = self.start.secrets.clone();
        loop {
            tokio::select! {
                line = running.next_line() => {
                    let Some(line) = line else { break };
                    let text = words_of(line.text, &secrets);
                    // A full disk must not end the service.
                    if let Some(log) = &mut log {
                        let _ = log.line(&text);
                    }
                    let mut progress = hold(&self.progress);
                    if progress.tail.len() == TAIL_LINES {
                        progress.tail.pop_front();
                    }
                    progress.tail.push_back(text.chars().take(2000).collect());
                }
                () = end_wished(&mut self.wishes) => return running.stop(GRACE).await,
            }
        }
        running.wait().await
    }

    fn job(&self) -> Result<Job, sandbox::Error> {
        let failed = |doing| move |source| sandbox::Error::Start { doing, source };
        let doorway = self.ground.layout.run(self.start.release);
        // The last process may have left anything here.
        remove_directory(&doorway)
            .and_then(|()| private_directory(&doorway))
            .map_err(failed("making the folder of the service's socket"))?;
        let port = if self.ground.sandbox.is_confined() {
            PORT_INSIDE
        } else {
            // Without a network of its own it needs a port that is free on this machine.
            std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
                .and_then(|listener| Ok(listener.local_addr()?.port()))
                .map_err(failed("looking for a free port"))?
        };
        let mut job = Job::new(&self.start.command)
            .mount_ro(&self.start.tree, "/app")
            .mount_rw(self.ground.layout.data(), "/data")
            .mount_rw(&doorway, DOORWAY)
            .cwd("/app")
            .env("HOST", "127.0.0.1")
            .env("PORT", port.to_string())
            .env("DATA_DIR", "/data")
            // What a Python service prints is seen when it prints it.
            .env("PYTHONUNBUFFERED", "1")
            .limits(Limits {
                memory_mb: 1024,
                pids: 512,
                cpu_s: None,
                wall_s: None,
                idle_s: None,
                file_mb: 1024,
                disk_mb: Some(4096),
                tmp_mb: 128,
                output_mb: u64::MAX >> 20,
            })
            .launcher(&self.ground.launcher, self.ground.launcher_args.clone())
            .relay_in(
                format!("{DOORWAY}/{DOOR}"),
                SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            );
        for (name, value) in &self.start.secrets {
            job = job.env(name, value);
        }
        Ok(job)
    }
}

/// Waits until it should end. Nobody left to wish anything means the same.
async fn end_wished(wishes: &mut watch::Receiver<Wish>) {
    let _ = wishes.wait_for(|wish| *wish == Wish::End).await;
}

fn words(ended: &Ended) -> String {
    let after = ended.wall_s;
    match ended.reason {
        Reason::Exited(127) => {
            format!("its program was not found (exit code 127) after {after:.1} s")
        }
        reason => format!("{reason} after {after:.1} s"),
    }
}

/// A line of a service as people may see it. What hides a secret by a control character in its middle shows it once that is
/// gone, and a secret may have such characters itself: so it is looked for twice.
fn words_of(line: String, secrets: &BTreeMap<String, String>) -> String {
    let text = redact(ports::plain(&redact(line, secrets)), secrets);
    let more = text.chars().count().saturating_sub(LINE_CHARS);
    if more == 0 {
        return text;
    }
    let kept: String = text.chars().take(LINE_CHARS).collect();
    format!("{kept}… ({more} more characters)")
}

fn redact(mut line: String, secrets: &BTreeMap<String, String>) -> String {
    for (name, value) in secrets {
        if value.len() >= SECRET_BYTES && line.contains(value.as_str()) {
            line = line.replace(value.as_str(), &format!("[secret {name}]"));
        }
    }
    line
}

fn hold(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_secrets_do_not_reach_the_log() {
        let secrets = BTreeMap::from([
            ("TOKEN".to_owned(), "hunter2hunter2".to_owned()),
            ("SHORT".to_owned(), "a".to_owned()),
        ]);
        let line = redact("token=hunter2hunter2 a".into(), &secrets);
        assert_eq!(line, "token=[secret TOKEN] a");
    }
}
