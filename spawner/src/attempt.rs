//! One attempt of one task, from the request to the result.

use crate::broker::{self, Broker, Said, Status};
use crate::collect::Taken;
use crate::disk;
use crate::docker;
use crate::events::Events;
use crate::places::Places;
use crate::process::{self, Exit};
use crate::reading::Reading;
use crate::remote::Reach;
use crate::runtime::{self, Identity, Worker};
use crate::stop::Stop;
use crate::trouble::{Trouble, chain, kind, tail};
use crate::{Options, keeping, workspace};
use jiff::Timestamp;
use ports::plain;
use protocol::{Check, CheckStatus, EventKind, ResultStatus, SpawnRequest, Usage, WorkerResult};
use sandbox::Reason;
use std::sync::Arc;
use tracing::Instrument as _;

/// Longest summary that goes into a result, in bytes.
const SUMMARY_BYTES: usize = 48 * 1024;

pub(crate) struct Attempt<'a> {
    pub(crate) options: &'a Options,
    pub(crate) request: Arc<SpawnRequest>,
    pub(crate) places: &'a Places,
    pub(crate) events: &'a Events,
    pub(crate) stop: &'a Stop,
    pub(crate) reading: &'a Reading,
}

/// A broker, and the worker that it serves; none when there is nothing left to do for one.
type Equipped = (Broker, Option<Box<dyn Worker>>);

/// What is known at the end, however it came.
#[derive(Default)]
struct Seen {
    usage: Usage,
    summary: String,
}

impl Attempt<'_> {
    /// Runs the attempt. It always comes to a result; dropping it ends the worker without one.
    pub(crate) async fn run(&self) -> WorkerResult {
        let started_at = Timestamp::now();
        let mut seen = Seen::default();
        let outcome = self.work(&mut seen).await;
        // However it ended: nobody needs the way to its broker any more.
        if let Err(error) = broker::forget_folder(&self.places.state) {
            tracing::warn!(%error, "a broker's folder was not removed");
        }
        let status = match &outcome {
            Ok(_) => ResultStatus::Succeeded,
            Err(trouble) => trouble.status,
        };
        let mut result = WorkerResult::of(&self.request, status, started_at);
        let wall = result.finished_at.duration_since(started_at);
        result.usage = Usage {
            wall_s: wall.as_secs_f64().max(0.0),
            ..seen.usage
        };
        result.summary_markdown = bounded(plain(&seen.summary));
        match outcome {
            Ok(taken) => {
                result.checks = checks(&taken);
                result.head_sha = Some(taken.head_sha);
            }
            Err(trouble) => result.failure = Some(trouble.into_failure()),
        }
        result
    }

    async fn work(&self, seen: &mut Seen) -> Result<Taken, Trouble> {
        // Of a former run, whose result is not known.
        let has_report = broker::has_report(&self.request, &self.places.state);
        self.unless_stopped(has_report, self.refuse_what_is_not_here())
            .await?;
        self.events.say(EventKind::Started {
            spawner: self.options.name.clone(),
        });
        // A worker that was adopted may have reported by now: that it is not paid any more is seen to when that is known.
        let (broker, worker) = match self.unless_stopped(true, self.adopted()).await? {
            Some(adopted) => adopted,
            None => self.begun(has_report).await?,
        };
        let exit = match worker {
            Some(worker) => {
                let disk = self.places.disk.as_ref();
                let watch = process::Watch {
                    request: &self.request,
                    broker: &broker,
                    events: self.events,
                    stop: self.stop,
                    unpaid_patience: self.options.unpaid_patience,
                    disk,
                };
                Some(watch.run(worker).instrument(self.span("run")).await)
            }
            None => None,
        };
        seen.usage = broker.usage();
        let exit = exit.transpose()?;
        if let Some(exit) = &exit {
            seen.usage.cpu_s = exit.ended.cpu_s;
            seen.usage.peak_memory_mb = exit.ended.peak_memory_mb;
        }
        let said = broker.said();
        if let Some(said) = &said {
            seen.summary.clone_from(&said.summary);
        }
        if self.stop.is_stopped(said.is_some()) {
            let log = exit.as_ref().map(|exit| exit.tail.as_str());
            return Err(self.stop.trouble().evidence(log.unwrap_or_default()));
        }
        judge(&self.request, said, exit.as_ref(), broker.model_trouble())?;
        drop(broker);
        self.events.phase("pushing");
        let reach = self.reach();
        let take = workspace::deliver(self.places, &self.request, &reach, self.reading);
        let take = self.unless_stopped(true, take);
        let taken = take.instrument(self.span("push")).await?;
        if let Err(error) = std::fs::write(self.places.state.join(keeping::DELIVERED), "") {
            tracing::warn!(%error, "a workspace is kept for longer than it is needed");
        }
        Ok(taken)
    }

    /// The worker that a former process of ours has started for this request, if there is one, with a broker that knows it.
    async fn adopted(&self) -> Result<Option<Equipped>, Trouble> {
        let who = Identity::of(&self.request);
        let limits = self.places.limits(&self.request.limits);
        let adopt = self
            .options
            .runtime
            .adopt(&who, &limits, &self.places.workspace);
        let Some(worker) = adopt.await.map_err(|error| process::failed(&error))? else {
            return Ok(None);
        };
        tracing::info!("a worker that a former spawner has started is watched again");
        self.mounted().await?;
        self.events.phase("adopted");
        let broker = Broker::go_on(
            Arc::clone(&self.request),
            Arc::clone(&self.options.models),
            self.events.clone(),
            &self.places.state,
        )
        .map_err(|error| {
            Trouble::failed(
                kind::LOST,
                "A worker outlived its spawner, but what it needs to go on did not.",
            )
            .status(ResultStatus::Lost)
            .evidence(error.to_string())
        })?;
        Ok(Some((broker, Some(worker))))
    }

    /// A workspace made ready, and a worker started in it, unless the request has its report already.
    async fn begun(&self, has_report: bool) -> Result<Equipped, Trouble> {
        // Whoever worked here before, for whatever request: gone before anything is touched.
        let runtime = self.options.runtime.as_ref();
        let clear = async {
            let cleared = runtime.clear(&Identity::of(&self.request)).await;
            cleared.map_err(|error| process::failed(&error))
        };
        self.unless_stopped(has_report, clear).await?;
        self.unless_stopped(has_report, self.lent()).await?;
        self.unless_stopped(has_report, self.mounted()).await?;
        self.events.phase("cloning");
        let reach = self.reach();
        let prepare = workspace::prepare(runtime, self.places, &self.request, &reach);
        let fresh = self
            .unless_stopped(has_report, prepare)
            .instrument(self.span("clone"))
            .await?;

        self.events.phase("starting");
        let broker = Broker::start(
            Arc::clone(&self.request),
            Arc::clone(&self.options.models),
            self.events.clone(),
            &self.places.state,
        )
        .map_err(|error| {
            Trouble::failed(
                kind::SANDBOX_FAILED,
                "The broker of the worker could not be started.",
            )
            .evidence(error.to_string())
        })?;
        // A report of a run that ended before its result was published stands.
        if broker.said().is_some() {
            return Ok((broker, None));
        }
        let start = process::start(runtime, self.places, &self.request, &broker, fresh);
        // It may work by now, and what it does without a question is taken.
        let unpaid_for_long = async {
            self.stop.stopped().await;
            tokio::time::sleep(self.options.unpaid_patience).await;
        };
        let worker = tokio::select! {
            () = unpaid_for_long => Err(self.stop.trouble()),
            worker = self.unless_stopped(true, start) => worker,
        }?;
        Ok((broker, Some(worker)))
    }

    /// A disk for the workspace, if it is to be one of its own and is not made yet: that of a container that waits, in which the
    /// worker can begin then, if there is one.
    async fn lent(&self) -> Result<(), Trouble> {
        let is_new = self.places.disk.as_ref().is_some_and(|disk| !disk.exists());
        if !is_new || self.request.docker {
            return Ok(());
        }
        let who = Identity::of(&self.request);
        let limits = self.places.limits(&self.request.limits);
        let runtime = &self.options.runtime;
        if let Err(error) = runtime.lend_disk(&who, &limits, &self.places.state).await {
            let error = chain(&error);
            tracing::warn!(
                error,
                "the disk of a container that waits could not be had; another one is made"
            );
        }
        Ok(())
    }

    /// The disk of the workspace, made and mounted, if it is to be one of its own.
    async fn mounted(&self) -> Result<(), Trouble> {
        let Some(image) = self.places.disk.clone() else {
            return Ok(());
        };
        let most_mb = self.request.limits.disk_mb;
        let seat = self.places.seat.clone();
        let mount = move || {
            let mounted = image.mount(most_mb);
            drop(seat);
            mounted
        };
        let mounted = disk::blocking(mount).await;
        mounted.map_err(|error| {
            Trouble::failed(
                kind::CLONE_FAILED,
                "The disk of the workspace cannot be mounted; an admin has to look at the spawner's host.",
            )
            .evidence(chain(&error))
        })
    }

    /// How a repository that is elsewhere is reached.
    fn reach(&self) -> Reach<'_> {
        Reach {
            tokens: self.options.tokens.as_ref(),
            patience: self.options.git_patience,
        }
    }

    /// The span of one step.
    fn span(&self, step: &'static str) -> tracing::Span {
        tracing::info_span!("worker_step", step, request = self.request.request_id)
    }

    /// Does this until it is stopped. With a report of a worker, want of money is no reason to.
    async fn unless_stopped<T>(
        &self,
        has_report: bool,
        work: impl Future<Output = Result<T, Trouble>>,
    ) -> Result<T, Trouble> {
        tokio::select! {
            biased;
            () = self.stop.stopped_with(has_report) => Err(self.stop.trouble()),
            outcome = work => outcome,
        }
    }

    async fn refuse_what_is_not_here(&self) -> Result<(), Trouble> {
        if !self.request.secrets.is_empty() {
            return Err(Trouble::failed(
                kind::UNSUPPORTED,
                "The task needs sealed secrets, which workers of this spawner do not have.",
            ));
        }
        if !self.request.docker {
            return Ok(());
        }
        match self.options.runtime.docker_inside().await {
            Ok(()) => Ok(()),
            Err(
                error @ (runtime::Error::NoDockerInside(_)
                | runtime::Error::Docker(docker::Error::NoRuntime { .. })),
            ) => Err(Trouble::failed(
                kind::UNSUPPORTED,
                format!(
                    "The task needs Docker inside its worker, which this spawner does not have: {error}."
                ),
            )),
            Err(error) => Err(process::failed(&error)),
        }
    }
}

/// What the end of the worker means. Its report decides; without one, how it ended does.
fn judge(
    request: &SpawnRequest,
    said: Option<Said>,
    exit: Option<&Exit>,
    model: Option<(&'static str, String)>,
) -> Result<(), Trouble> {
    let mut log = exit.map(|exit| exit.tail.clone()).unwrap_or_default();
    let disk_full = exit.is_some_and(|exit| exit.disk_full);
    if disk_full {
        let most = request.limits.disk_mb;
        log = format!(
            "{log}\n--- the disk of {most} MiB was full; what was written beyond was refused ---"
        );
    }
    let ended = exit.map(|exit| exit.ended.evidence.as_str());
    let Some(said) = said else {
        let evidence = match ended {
            Some(ended) if !ended.is_empty() => format!("{log}\n--- {ended} ---"),
            _ => log,
        };
        return Err(silent_end(request, exit, model).evidence(evidence));
    };
    // An agent whose command was killed for want of memory says that the command failed.
    let starved = exit.is_some_and(|exit| exit.ended.reason == Reason::Memory);
    if starved && said.status == Status::Failed {
        return Err(silent_end(request, exit, model).evidence(log));
    }
    let starved = disk_full && model.is_none();
    let reason = said.reason.trim();
    let first = reason.lines().next().unwrap_or_default();
    let evidence = format!(
        "{}\n\n--- the agent's reason ---\n{}",
        tail(&log, 4096),
        reason
    );
    match said.status {
        Status::Succeeded => Ok(()),
        Status::Blocked => Err(Trouble::failed(kind::AGENT_BLOCKED, first)
            .status(ResultStatus::Blocked)
            .evidence(evidence)),
        Status::Failed if starved => Err(silent_end(request, exit, model).evidence(evidence)),
        Status::Failed => {
            let trouble = match model {
                Some((kind, words)) => Trouble::failed(kind, words),
                None if reason.starts_with("no commit") => Trouble::failed(
                    kind::NO_COMMIT,
                    "The agent ended without a commit beyond the base.",
                ),
                None if reason.starts_with("cannot run ") => Trouble::failed(
                    kind::AGENT_MISSING,
                    format!(
                        "The agent is not there: {first}. An admin has to install it where workers run (docs/agents.md), or to choose another one with ARTEL_AGENT."
                    ),
                ),
                None => Trouble::failed(kind::AGENT_FAILED, format!("The agent failed: {first}")),
            };
            Err(trouble.evidence(evidence))
        }
    }
}

/// A worker that ended, or was ended, before it reported.
fn silent_end(
    request: &SpawnRequest,
    exit: Option<&Exit>,
    model: Option<(&'static str, String)>,
) -> Trouble {
    let limits = &request.limits;
    let Some(exit) = exit else {
        return Trouble::failed(kind::LOST, "The worker is gone and nothing is known of it.")
            .status(ResultStatus::Lost);
    };
    if exit.idle {
        return Trouble::failed(
            kind::LIMIT_IDLE,
            format!(
                "The worker gave no sign of life for {} s, which is its limit.",
                limits.idle_s
            ),
        )
        .status(ResultStatus::TimedOut);
    }
    match exit.ended.reason {
        Reason::Wall => Trouble::failed(
            kind::LIMIT_WALL,
            format!(
                "The worker ran for {} s, which is its limit.",
                limits.wall_s
            ),
        )
        .status(ResultStatus::TimedOut),
        Reason::Idle => Trouble::failed(kind::LIMIT_IDLE, "The worker was silent for too long.")
            .status(ResultStatus::TimedOut),
        Reason::Memory => Trouble::failed(
            kind::LIMIT_MEMORY,
            format!(
                "The worker used more than {} MiB of memory.",
                limits.memory_mb
            ),
        ),
        Reason::Pids => Trouble::failed(
            kind::LIMIT_PIDS,
            format!("The worker started more than {} processes.", limits.pids),
        ),
        Reason::Cpu => Trouble::failed(
            kind::LIMIT_CPU,
            format!(
                "The worker used more processor time than {} cores for {} s.",
                limits.cpu, limits.wall_s
            ),
        ),
        Reason::Disk => Trouble::failed(
            kind::LIMIT_DISK,
            format!(
                "The worker filled more than {} MiB of disk.",
                limits.disk_mb
            ),
        ),
        Reason::Exited(_) | Reason::Signalled(_)
            if exit.disk_full && exit.ended.from_outside.is_none() && model.is_none() =>
        {
            Trouble::failed(
                kind::LIMIT_DISK,
                format!(
                    "The worker filled the {} MiB of disk that it may use.",
                    limits.disk_mb
                ),
            )
        }
        Reason::Exited(127) => Trouble::failed(
            kind::AGENT_MISSING,
            "The agent's program could not be started in the sandbox.",
        ),
        Reason::Exited(_) | Reason::Signalled(_) | Reason::Stopped => match model {
            _ if exit.ended.from_outside.is_some() => Trouble::failed(
                kind::LOST,
                format!(
                    "The worker was ended from outside ({}); its workspace is kept, and the task can be tried again.",
                    exit.ended.from_outside.as_deref().unwrap_or_default()
                ),
            )
            .status(ResultStatus::Lost),
            Some((kind, words)) => Trouble::failed(kind, words),
            None => Trouble::failed(
                kind::AGENT_FAILED,
                format!("The agent ended without a report ({}).", exit.ended.reason),
            ),
        },
    }
}

fn checks(taken: &Taken) -> Vec<Check> {
    let check = |name: &str, detail: String| Check {
        name: name.to_owned(),
        status: CheckStatus::Passed,
        detail,
    };
    vec![
        check(
            "commits on the branch",
            format!("{} commits, {} files changed", taken.commits, taken.files),
        ),
        check("continues from the base", String::new()),
        check(
            "in the repository",
            format!("branch is at {}", taken.head_sha),
        ),
    ]
}

fn bounded(mut text: String) -> String {
    if text.len() > SUMMARY_BYTES {
        let mut end = SUMMARY_BYTES;
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        text.truncate(end);
        text.push_str("\n[…]");
    }
    text
}
