//! The worker's process: what it is given, and how it is watched until it ends.

use crate::broker::Broker;
use crate::events::Events;
use crate::places::Places;
use crate::stop::Stop;
use crate::trouble::{Trouble, kind, tail};
use crate::{Options, Program};
use protocol::{EventKind, SpawnRequest};
use sandbox::{Ended, Job, Limits, Sandbox};
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};

/// Where the worker finds the broker's socket.
const SOCKET: &str = "/run/artel/broker.sock";
/// Where the worker finds the program that carries the agent.
const AGENT: &str = "/run/artel/agent";
/// The relay's port in a network of its own.
const PORT: u16 = 8118;
/// How long a worker may take to end after it was asked to.
const GRACE: Duration = Duration::from_millis(300);
/// How long a worker may take to end after its report.
const FAREWELL: Duration = Duration::from_secs(10);
/// How often the log's end is told, when it changed.
const LOG_EVERY: Duration = Duration::from_secs(2);
/// Most of the log that is told at a time, in bytes.
const LOG_BYTES: usize = 4000;
/// Name and address of whoever commits in a worker.
const AUTHOR: (&str, &str) = ("Artel developer", "developer@artel.invalid");

/// How a worker's process ended.
pub(crate) struct Exit {
    pub(crate) ended: Ended,
    /// The end of what it printed.
    pub(crate) tail: String,
    /// It was silent for too long and was stopped for that.
    pub(crate) idle: bool,
}

/// Runs the worker to its end, whatever that is. A stop ends it within a second.
pub(crate) async fn run(
    options: &Options,
    places: &Places,
    request: &SpawnRequest,
    broker: &Broker,
    events: &Events,
    stop: &Stop,
) -> Result<Exit, Trouble> {
    let failed = |error: &dyn std::error::Error| {
        Trouble::failed(kind::SANDBOX_FAILED, "The worker could not be started.")
            .evidence(error.to_string())
    };
    let job = job(
        &options.sandbox,
        &options.launcher,
        &options.agent,
        places,
        request,
        broker,
    )?
    .map_err(|error| failed(&error))?;
    let mut running = options
        .sandbox
        .spawn(&job)
        .map_err(|error| failed(&error))?;
    let stopper = running.stopper();
    let mut lines = running.take_lines();
    let idle_limit = Duration::from_secs(request.limits.idle_s);
    events.activity().touch();
    events.phase("running");

    let mut tick = tokio::time::interval(Duration::from_millis(250));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut told = (Instant::now(), String::new());
    let (mut stopping, mut idle) = (false, false);
    let mut farewell: Option<Instant> = None;
    let ended = loop {
        tokio::select! {
            ended = running.wait(), if lines.is_none() => break ended,
            line = next_line(&mut lines), if lines.is_some() => match line {
                Some(_) => events.activity().touch(),
                None => lines = None,
            },
            () = stop.stopped(), if !stopping => {
                stopping = true;
                stopper.stop(GRACE);
                lines = None;
            }
            () = broker.wait_said(), if farewell.is_none() => {
                farewell = Some(Instant::now() + FAREWELL);
            }
            _ = tick.tick() => {
                if !stopping && farewell.is_some_and(|end| Instant::now() >= end) {
                    stopping = true;
                    stopper.stop(GRACE);
                }
                if !stopping && farewell.is_none() && events.activity().silence() > idle_limit {
                    (stopping, idle) = (true, true);
                    stopper.stop(GRACE);
                }
                if told.0.elapsed() >= LOG_EVERY {
                    let log = tail(&running.tail(), LOG_BYTES).to_owned();
                    if log != told.1 {
                        events.say(EventKind::Log { tail: log.clone() });
                    }
                    told = (Instant::now(), log);
                }
            }
        }
    };
    let log = running.tail();
    if told.1 != tail(&log, LOG_BYTES) {
        events.say(EventKind::Log {
            tail: tail(&log, LOG_BYTES).to_owned(),
        });
    }
    match ended {
        Ok(ended) => Ok(Exit {
            ended,
            tail: log,
            idle,
        }),
        Err(error) => Err(failed(&error)),
    }
}

async fn next_line(
    lines: &mut Option<tokio::sync::mpsc::Receiver<sandbox::Line>>,
) -> Option<sandbox::Line> {
    match lines {
        Some(lines) => lines.recv().await,
        None => None,
    }
}

/// The sandbox job of a request. The outer error is the request's fault, the inner one the machine's.
fn job(
    sandbox: &Sandbox,
    launcher: &Program,
    agent: &Program,
    places: &Places,
    request: &SpawnRequest,
    broker: &Broker,
) -> Result<io::Result<Job>, Trouble> {
    let mut argv = vec![AGENT.to_owned()];
    argv.extend(agent.args.iter().cloned());
    argv.extend(["--workspace".to_owned(), "/workspace".to_owned()]);
    match request.agent.adapter.as_str() {
        "artel-agent" => {}
        "command" => {
            argv.extend(["command".to_owned(), "--".to_owned()]);
            argv.extend(request.agent.command.iter().cloned());
        }
        name => match worker::adapters::named(name) {
            Some(adapter) => argv.push(adapter.name.to_owned()),
            None => return Err(unknown_agent(name)),
        },
    }
    let port = match relay_port(sandbox) {
        Ok(port) => port,
        Err(error) => return Ok(Err(error)),
    };
    let limits = &request.limits;
    let mut job = Job::new(argv)
        .launcher(&launcher.path, launcher.args.clone())
        .relay_out(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), SOCKET)
        .mount_ro(broker.socket(), SOCKET)
        .mount_ro(&agent.path, AGENT)
        .mount_rw(&places.workspace, "/workspace")
        .cwd("/workspace")
        .limits(Limits {
            memory_mb: limits.memory_mb,
            pids: limits.pids,
            cpu_s: Some(cpu_seconds(limits.cpu, limits.wall_s)),
            wall_s: Some(limits.wall_s),
            // Waiting for a model is silent and no idling: we watch that ourselves.
            idle_s: None,
            file_mb: limits.disk_mb,
            disk_mb: Some(limits.disk_mb),
            ..Limits::default()
        });
    for (name, value) in environment(request, broker.key(), port) {
        job = job.env(name, value);
    }
    Ok(Ok(job))
}

fn unknown_agent(name: &str) -> Trouble {
    let known: Vec<&str> = worker::adapters::ALL
        .iter()
        .map(|adapter| adapter.name)
        .collect();
    Trouble::failed(
        kind::AGENT_MISSING,
        format!(
            "There is no agent {name:?} here; ARTEL_AGENT can be artel-agent, command, {}.",
            known.join(", ")
        ),
    )
}

/// The explicit environment of a worker; nothing is inherited.
fn environment(request: &SpawnRequest, key: &str, port: u16) -> Vec<(&'static str, String)> {
    let broker = format!("http://127.0.0.1:{port}");
    let proxy = format!("http://job:{key}@127.0.0.1:{port}");
    let direct = "127.0.0.1,localhost,::1".to_owned();
    let mut environment = vec![
        ("ARTEL_TASK_ID", request.task_id.clone()),
        ("ARTEL_ATTEMPT", request.attempt.to_string()),
        ("ARTEL_BROKER_URL", broker.clone()),
        ("ARTEL_BROKER_KEY", key.to_owned()),
        (
            "ARTEL_THREAD",
            format!("{}/{}", request.job_id, request.task_id),
        ),
        ("ARTEL_BASE_SHA", request.repository.base_sha.clone()),
        // The limit is kept from outside; the one inside is for what must not wait for ever.
        (
            "ARTEL_WALL_S",
            request.limits.wall_s.saturating_add(5).to_string(),
        ),
        ("ARTEL_IDLE_S", request.limits.idle_s.to_string()),
        ("OPENAI_BASE_URL", format!("{broker}/v1")),
        ("OPENAI_API_KEY", key.to_owned()),
        ("ANTHROPIC_BASE_URL", broker),
        ("ANTHROPIC_API_KEY", key.to_owned()),
        ("HTTP_PROXY", proxy.clone()),
        ("http_proxy", proxy.clone()),
        ("HTTPS_PROXY", proxy.clone()),
        ("https_proxy", proxy),
        ("NO_PROXY", direct.clone()),
        ("no_proxy", direct),
        ("GIT_AUTHOR_NAME", AUTHOR.0.to_owned()),
        ("GIT_AUTHOR_EMAIL", AUTHOR.1.to_owned()),
        ("GIT_COMMITTER_NAME", AUTHOR.0.to_owned()),
        ("GIT_COMMITTER_EMAIL", AUTHOR.1.to_owned()),
        ("GIT_TERMINAL_PROMPT", "0".to_owned()),
    ];
    if let Some(model) = &request.agent.model {
        environment.push(("ARTEL_MODEL", model.clone()));
    }
    if let Some(trace) = &request.trace_context {
        environment.push(("TRACEPARENT", trace.clone()));
    }
    environment
}

/// A worker in a network of its own has every port; one without confinement shares ours.
fn relay_port(sandbox: &Sandbox) -> io::Result<u16> {
    if sandbox.is_confined() {
        return Ok(PORT);
    }
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
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
    use super::*;

    #[test]
    fn processor_time_is_cores_times_wall_clock() {
        assert_eq!(cpu_seconds(2.0, 1800), 3600);
        assert_eq!(cpu_seconds(0.001, 1), 1);
        assert_eq!(cpu_seconds(1e300, u64::MAX), 1_000_000_000);
    }

    #[test]
    fn the_environment_is_the_contract_and_nothing_of_ours() {
        let request = protocol::suite::request("r");
        let environment = environment(&request, "KEY", 8118);
        let get = |name| {
            environment
                .iter()
                .find(|(n, _)| *n == name)
                .map(|(_, v)| v.as_str())
        };
        assert_eq!(get("ARTEL_BROKER_URL"), Some("http://127.0.0.1:8118"));
        assert_eq!(get("OPENAI_BASE_URL"), Some("http://127.0.0.1:8118/v1"));
        assert_eq!(get("HTTPS_PROXY"), Some("http://job:KEY@127.0.0.1:8118"));
        assert_eq!(get("ARTEL_THREAD"), Some("job/task-r"));
        assert_eq!(get("PATH"), None);
    }
}
