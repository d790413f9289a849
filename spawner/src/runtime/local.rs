//! Workers in a sandbox on this machine.

use super::{BROKER, Ended, Error, Inside, PORT, Relay, Runtime, WORKSPACE, Work, Worker};
use crate::Program;
use async_trait::async_trait;
use sandbox::{Job, Limits, Line, Running, Sandbox, Stopper};
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;
use tokio::sync::mpsc;

/// Where the worker finds the program that carries the agent.
const AGENT: &str = "/run/artel/agent";

/// Workers in a [`Sandbox`]; they die with this process.
#[derive(Clone, Debug)]
pub struct Local {
    /// How they are confined.
    pub sandbox: Sandbox,
    /// The program that carries [`sandbox::launcher::main`].
    pub launcher: Program,
    /// The program that carries [`worker::main`].
    pub agent: Program,
}

impl Local {
    /// `program` carries both `internal launch` and `internal agent`.
    pub fn new(sandbox: Sandbox, program: impl Into<PathBuf>) -> Self {
        let path = program.into();
        let program = |word: &str| Program {
            path: path.clone(),
            args: vec!["internal".to_owned(), word.to_owned()],
        };
        Self {
            sandbox,
            launcher: program("launch"),
            agent: program("agent"),
        }
    }

    fn job(&self, work: &Work) -> Job {
        let limits = &work.limits;
        let mut job = match &work.inside {
            Inside::Program(argv) => Job::new(argv),
            Inside::Agent(args) => {
                let mut argv = vec![AGENT.to_owned()];
                argv.extend(self.agent.args.iter().chain(args).cloned());
                Job::new(argv).mount_ro(&self.agent.path, AGENT)
            }
        };
        if let Some(relay) = &work.relay {
            job = job
                .launcher(&self.launcher.path, self.launcher.args.clone())
                .relay_out(relay.listen(), Relay::socket())
                .mount_ro(&relay.folder, BROKER);
        }
        for (host, guest) in &work.shown {
            job = job.mount_ro(host, guest);
        }
        for (name, value) in &work.env {
            job = job.env(name, value);
        }
        job.mount_rw(&work.workspace, WORKSPACE)
            .cwd(WORKSPACE)
            .limits(Limits {
                memory_mb: limits.memory_mb,
                pids: limits.pids,
                cpu_s: Some(cpu_seconds(limits.cpu, limits.wall_s)),
                wall_s: Some(limits.wall_s),
                // Waiting for a model is silent and no idling: that is watched elsewhere.
                idle_s: None,
                file_mb: limits.disk_mb,
                disk_mb: limits.disk_watched.then_some(limits.disk_mb),
                ..Limits::default()
            })
    }
}

#[async_trait]
impl Runtime for Local {
    fn describe(&self) -> String {
        self.sandbox.describe()
    }

    fn check(&self) -> Result<(), crate::Error> {
        for program in [&self.launcher, &self.agent] {
            if !program.path.is_file() {
                return Err(crate::Error::Program {
                    path: program.path.clone(),
                });
            }
        }
        Ok(())
    }

    fn is_confined(&self) -> bool {
        self.sandbox.is_confined()
    }

    fn owner(&self) -> Option<(u32, u32)> {
        None
    }

    /// A worker in a network of its own has every port; one without confinement shares ours.
    fn port(&self) -> io::Result<u16> {
        if self.sandbox.is_confined() {
            return Ok(PORT);
        }
        Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
            .local_addr()?
            .port())
    }

    async fn start(&self, work: &Work) -> Result<Box<dyn Worker>, Error> {
        let running = self.sandbox.spawn(&self.job(work))?;
        Ok(Box::new(Confined {
            stopper: running.stopper(),
            running,
        }))
    }
}

struct Confined {
    running: Running,
    stopper: Stopper,
}

#[async_trait]
impl Worker for Confined {
    fn take_lines(&mut self) -> Option<mpsc::Receiver<Line>> {
        self.running.take_lines()
    }

    fn tail(&self) -> String {
        self.running.tail()
    }

    fn stop(&self, grace: Duration) {
        self.stopper.stop(grace);
    }

    async fn wait(&mut self) -> Result<Ended, Error> {
        let ended = self.running.wait().await?;
        Ok(Ended {
            reason: ended.reason,
            wall_s: ended.wall_s,
            cpu_s: ended.cpu_s,
            peak_memory_mb: ended.peak_memory_mb,
            evidence: String::new(),
            from_outside: None,
        })
    }
}

/// So many cores for the whole time: the bound on processor time.
#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss
)] // bounded just before
fn cpu_seconds(cores: f64, wall_s: u64) -> u64 {
    let seconds = cores * wall_s as f64;
    seconds.ceil().clamp(1.0, 1e9) as u64
}

#[cfg(test)]
mod tests {
    use super::cpu_seconds;

    #[test]
    fn processor_time_is_cores_times_wall_clock() {
        assert_eq!(cpu_seconds(2.0, 1800), 3600);
        assert_eq!(cpu_seconds(0.001, 1), 1);
        assert_eq!(cpu_seconds(1e300, u64::MAX), 1_000_000_000);
    }
}
