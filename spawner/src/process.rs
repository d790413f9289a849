//! The worker's process: what it is given, and how it is watched until it ends.

use crate::broker::Broker;
use crate::disk::Image;
use crate::docker;
use crate::events::Events;
use crate::places::Places;
use crate::runtime::{
    self, Ended, Identity, Inside, Part, Relay, Runtime, WORKSPACE, Work, Worker,
};
use crate::stop::Stop;
use crate::trouble::{Trouble, chain, kind, tail};
use protocol::{EventKind, ResultStatus, SpawnRequest};
use std::time::Duration;
use tokio::time::{Instant, MissedTickBehavior};

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
    /// The disk of its workspace was full, at its end or before.
    pub(crate) disk_full: bool,
}

/// Starts the agent of a request. `fresh` says whether there is nothing but a clone in its workspace.
pub(crate) async fn start(
    runtime: &dyn Runtime,
    places: &Places,
    request: &SpawnRequest,
    broker: &Broker,
    fresh: bool,
) -> Result<Box<dyn Worker>, Trouble> {
    let args = agent_args(request)?;
    let port = runtime
        .port()
        .map_err(|error| failed(&runtime::Error::Machine("a port for the relay", error)))?;
    let work = Work {
        who: Identity::of(request),
        part: Part::Agent,
        inside: Inside::Agent(args),
        env: environment(request, broker.key(), port)
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect(),
        workspace: places.workspace.clone(),
        shown: Vec::new(),
        relay: Some(Relay {
            folder: broker.folder().to_owned(),
            port,
        }),
        limits: places.limits(&request.limits),
        fresh,
        docker: request.docker,
    };
    runtime.start(&work).await.map_err(|error| failed(&error))
}

/// Why there is no worker.
pub(crate) fn failed(error: &runtime::Error) -> Trouble {
    if let runtime::Error::Docker(docker::Error::Gone { .. }) = error {
        return Trouble::failed(
            kind::LOST,
            "The worker is gone and nothing is known of its end.",
        )
        .status(ResultStatus::Lost)
        .evidence(chain(error));
    }
    if let runtime::Error::Docker(
        docker::Error::OnlyTheName { .. } | docker::Error::Unmarked { .. },
    ) = error
    {
        return Trouble::failed(
            kind::UNSUPPORTED,
            format!("The worker could not be run: {error}."),
        )
        .evidence(chain(error));
    }
    if let runtime::Error::Docker(docker::Error::NoImage { .. }) = error {
        return Trouble::failed(
            kind::IMAGE_MISSING,
            format!("The worker could not be run: {error}. An admin of the spawner's host has to bring it there, or to name another one in WORKER_IMAGE."),
        )
        .evidence(chain(error));
    }
    Trouble::failed(
        kind::SANDBOX_FAILED,
        format!(
            "The worker could not be run: {error}. An admin has to look at the spawner's host."
        ),
    )
    .evidence(chain(error))
}

/// What is known of a worker that is watched.
pub(crate) struct Watch<'a> {
    pub(crate) request: &'a SpawnRequest,
    pub(crate) broker: &'a Broker,
    pub(crate) events: &'a Events,
    pub(crate) stop: &'a Stop,
    /// How long it may go on whose budget is used up.
    pub(crate) unpaid_patience: Duration,
    pub(crate) disk: Option<&'a Image>,
}

impl Watch<'_> {
    /// Watches a worker to its end, whatever that is. A stop for good ends it within a second. One that is not paid any more is
    /// answered no further question; it has a while for the command that it runs and for its report.
    pub(crate) async fn run(&self, mut running: Box<dyn Worker>) -> Result<Exit, Trouble> {
        let Self {
            request,
            broker,
            events,
            stop,
            disk,
            ..
        } = *self;
        let mut lines = running.take_lines();
        let idle_limit = Duration::from_secs(request.limits.idle_s);
        events.activity().touch();
        events.runs();

        let mut tick = tokio::time::interval(Duration::from_millis(250));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut told = (Instant::now(), String::new());
        let (mut stopping, mut idle) = (false, false);
        let is_full = || disk.is_some_and(Image::is_full);
        let mut disk_full = false;
        // When it has to have ended, where that is known.
        let (mut farewell, mut unpaid): (Option<Instant>, Option<Instant>) = (None, None);
        let ended = loop {
            tokio::select! {
                ended = running.wait(), if lines.is_none() => break ended,
                line = next_line(&mut lines), if lines.is_some() => match line {
                    Some(_) => events.activity().touch(),
                    None => lines = None,
                },
                () = stop.stopped_for_good(), if !stopping => {
                    stopping = true;
                    running.stop(GRACE);
                    lines = None;
                }
                () = stop.stopped(), if unpaid.is_none() && !stop.is_stopped(true) => {
                    unpaid = Some(Instant::now() + self.unpaid_patience);
                    broker.end_of_budget();
                    events.phase("ending: the budget is used up");
                }
                () = broker.wait_said(), if farewell.is_none() => {
                    farewell = Some(Instant::now() + FAREWELL);
                }
                _ = tick.tick() => {
                    disk_full = disk_full || is_full();
                    let ends = [farewell, unpaid].into_iter().flatten().min();
                    if !stopping && ends.is_some_and(|end| Instant::now() >= end) {
                        stopping = true;
                        running.stop(GRACE);
                    }
                    if !stopping && farewell.is_none() && events.activity().silence() > idle_limit {
                        (stopping, idle) = (true, true);
                        running.stop(GRACE);
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
                disk_full: disk_full || is_full(),
            }),
            Err(error) => Err(failed(&error)),
        }
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

/// The arguments of the program that carries the agent.
fn agent_args(request: &SpawnRequest) -> Result<Vec<String>, Trouble> {
    let mut args = vec!["--workspace".to_owned(), WORKSPACE.to_owned()];
    match request.agent.adapter.as_str() {
        "artel-agent" => {}
        "command" => {
            args.extend(["command".to_owned(), "--".to_owned()]);
            args.extend(request.agent.command.iter().cloned());
        }
        name => match worker::adapters::named(name) {
            Some(adapter) => args.push(adapter.name.to_owned()),
            None => return Err(unknown_agent(name)),
        },
    }
    Ok(args)
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
    .evidence(format!("the request asks for the adapter {name:?}"))
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
    if request.docker {
        // Its root works in a workspace that belongs to another user, which Git would refuse.
        environment.extend([
            ("GIT_CONFIG_COUNT", "1".to_owned()),
            ("GIT_CONFIG_KEY_0", "safe.directory".to_owned()),
            ("GIT_CONFIG_VALUE_0", WORKSPACE.to_owned()),
        ]);
    }
    if let Some(model) = &request.agent.model {
        environment.push(("ARTEL_MODEL", model.clone()));
    }
    if let Some(trace) = &request.trace_context {
        environment.push(("TRACEPARENT", trace.clone()));
    }
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

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
