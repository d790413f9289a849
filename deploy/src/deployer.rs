//! The deployer of this machine: orders in, releases live.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use ports::{
    Actor, DeployRequest, Deployer, Deployment, DeploymentStatus, Failure, ProjectId, Result,
    SecretResolver, ServiceState,
};
use sandbox::Sandbox;

use crate::control::{self, Order, Phase, Start, Status};
use crate::exchange::Place;
use crate::layout::{Layout, Lock, remove_directory};
use crate::rollout::Rollout;
use crate::state::{Pending, Release, State};
use crate::supervisor::{EXIT_ALREADY, EXIT_PORT_TAKEN, Identity, start_ticks};
use crate::{checks, failures, log, release};

/// How long a supervisor may take until it can be told something.
const AWAKE: Duration = Duration::from_secs(15);
/// How often a new supervisor tries to get its port.
const PORT_TRIES: u32 = 4;
/// How long a live service may take to answer its health check when it is asked how it is.
const PULSE: Duration = Duration::from_secs(3);

/// What a deployer needs to know.
#[derive(Clone)]
pub struct Options {
    /// The program's home folder; releases live in `deploy/` under it.
    pub home: PathBuf,
    /// How commands are confined. The supervisors use the same kind.
    pub sandbox: Sandbox,
    /// The program that carries [`crate::supervisor::main`] and [`sandbox::launcher::main`].
    pub program: PathBuf,
    /// The words that lead to the supervisor, such as `internal supervise`.
    pub supervise_args: Vec<String>,
    /// The words that lead to the launcher, such as `internal launch`.
    pub launch_args: Vec<String>,
    /// Gives the values of granted secrets.
    pub secrets: Arc<dyn SecretResolver>,
    /// How long a new release may take to answer its health check, in seconds.
    pub ready_s: u64,
}

/// Runs releases on this machine. Cheap to clone.
#[derive(Clone)]
pub struct LocalDeployer {
    pub(crate) options: Options,
}

/// What [`LocalDeployer::reconcile`] found and did for a project.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reconciled {
    /// Its service runs as it should.
    Running,
    /// It was stopped on purpose, or nothing was deployed yet.
    Idle,
    /// It did not run and was started again.
    Started,
    /// It runs no longer and could not be brought back.
    Failed(Failure),
}

impl LocalDeployer {
    /// A deployer; nothing is touched before the first order.
    pub fn new(options: Options) -> Self {
        Self { options }
    }

    /// What it was given.
    pub fn options(&self) -> Options {
        self.options.clone()
    }

    /// Looks at every project: starts supervisors that died, and services that should run. Called
    /// when the program starts.
    pub async fn reconcile(&self) -> Vec<(ProjectId, Reconciled)> {
        let mut looking = tokio::task::JoinSet::new();
        let entries = std::fs::read_dir(Layout::all(&self.options.home));
        for entry in entries.into_iter().flatten().flatten() {
            let Some(project) = entry.file_name().to_str().map(ProjectId::from) else {
                continue;
            };
            // One project that is busy for minutes does not keep the others waiting.
            let deployer = self.clone();
            looking.spawn(async move {
                let outcome = deployer.reconcile_one(&project).await;
                (project, outcome.unwrap_or_else(Reconciled::Failed))
            });
        }
        let mut found = looking.join_all().await;
        found.sort_by(|(a, _), (b, _)| a.cmp(b));
        found
    }

    async fn reconcile_one(&self, project: &ProjectId) -> Result<Reconciled> {
        let layout = self.layout(project)?;
        if !layout.state().exists() {
            return Ok(Reconciled::Idle);
        }
        let _lock = layout.lock().await?;
        let Some(state) = State::load(&layout)? else {
            return Ok(Reconciled::Idle);
        };
        let Some(live) = state.live() else {
            return Ok(Reconciled::Idle);
        };
        if state.stopped {
            return Ok(Reconciled::Idle);
        }
        if let Ok(status) = control::tell(&layout, &Order::Status).await
            && status.live == state.live
            && status.ports == [state.port]
            && let Some(running) = status.release(live.number)
        {
            if running.phase == Phase::Failed {
                let message = format!("release {} does not stay alive", live.number);
                let failure = Failure::new("service_failed", message);
                return Ok(Reconciled::Failed(failure.evidence(running.evidence())));
            }
            return Ok(Reconciled::Running);
        }
        tracing::info!(project = %project, release = live.number, "starting a service that should run");
        self.run(&layout, live, state.port, "start after a restart")
            .await?;
        control::tell(&layout, &switch(live.number, state.port)).await?;
        Ok(Reconciled::Started)
    }

    pub(crate) fn layout(&self, project: &ProjectId) -> Result<Layout> {
        Layout::new(&self.options.home, project)
    }

    /// The project's folder, locked, and what is written down there.
    async fn open(&self, project: &ProjectId) -> Result<(Layout, Lock, State)> {
        let layout = self.layout(project)?;
        let nothing = || {
            let message = format!("nothing was deployed for project {project} yet");
            Failure::new("not_deployed", message)
        };
        if !layout.state().exists() {
            return Err(nothing());
        }
        let lock = layout.lock().await?;
        let state = State::load(&layout)?.ok_or_else(nothing)?;
        Ok((layout, lock, state))
    }

    /// Has the supervisor run a release, and starts the supervisor first if there is none.
    #[tracing::instrument(name = "deploy_step", skip_all, fields(step = "start", project = %layout.project(), release = release.number, purpose))]
    pub(crate) async fn run(
        &self,
        layout: &Layout,
        release: &Release,
        port: u16,
        purpose: &str,
    ) -> Result<Status> {
        let mut secrets = std::collections::BTreeMap::new();
        for handle in &release.secrets {
            let purpose = format!("{purpose}, release {}", release.number);
            let value = self.options.secrets.resolve(handle, &purpose).await?;
            secrets.insert(handle.name.clone(), value.expose().to_owned());
        }
        self.awake(layout, &layout.project(), port).await?;
        control::tell(layout, &Order::Listen { port }).await?;
        let start = Start {
            release: release.number,
            tree: layout.tree(release.number, &release.sha),
            command: release.service.command.clone(),
            secrets,
        };
        Ok(control::tell(layout, &Order::Run(start)).await?)
    }

    /// Makes sure that there is a supervisor that listens to us.
    async fn awake(&self, layout: &Layout, project: &ProjectId, port: u16) -> Result<()> {
        match control::tell(layout, &Order::Status).await {
            Ok(_) => return Ok(()),
            Err(control::Error::Nobody(_)) => {}
            // Alive, but it does not answer as it should: it is replaced.
            Err(_) => kill(layout).await,
        }
        let mut child = self.spawn_supervisor(layout, project, port)?;
        let until = tokio::time::Instant::now() + AWAKE;
        let mut refused = 1;
        loop {
            if control::tell(layout, &Order::Status).await.is_ok() {
                return Ok(());
            }
            let ended = child.try_wait().ok().flatten();
            if let Some(status) = ended {
                let code = status.code().and_then(|code| u8::try_from(code).ok());
                match code {
                    // The port of a supervisor that was killed is free in a moment.
                    Some(EXIT_PORT_TAKEN) if refused == PORT_TRIES => {
                        return Err(failures::port_taken(port));
                    }
                    Some(EXIT_PORT_TAKEN) => {
                        refused += 1;
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        child = self.spawn_supervisor(layout, project, port)?;
                    }
                    // Another one is about to listen, or a killed one is not quite dead.
                    Some(EXIT_ALREADY) if tokio::time::Instant::now() < until => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        child = self.spawn_supervisor(layout, project, port)?;
                    }
                    _ => {
                        let said = log::last_lines(&layout.supervisor_log(), 5).unwrap_or_default();
                        let message = format!("the service's supervisor ended at once ({status})");
                        return Err(failures::supervisor(&message).evidence(said.join("\n")));
                    }
                }
            }
            if tokio::time::Instant::now() > until {
                kill(layout).await;
                let message = format!(
                    "the service's supervisor did not answer within {} s",
                    AWAKE.as_secs()
                );
                return Err(failures::supervisor(&message));
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Starts a supervisor that outlives us: nothing of ours is open in it, and its environment is
    /// an explicit list.
    fn spawn_supervisor(
        &self,
        layout: &Layout,
        project: &ProjectId,
        port: u16,
    ) -> Result<tokio::process::Child> {
        let options = &self.options;
        options.sandbox.check().map_err(|reason| {
            failures::supervisor(&format!(
                "a service only runs in a sandbox, and there is none: {reason}"
            ))
        })?;
        let path = layout.supervisor_log();
        let file = |error: std::io::Error| failures::file("writing", &path, &error);
        // Its own words are few: a fresh file for each supervisor is cap enough.
        let errors = std::fs::File::create(&path).map_err(file)?;
        let mut command = sandbox::detached(&options.program)
            .map_err(|error| failures::supervisor(&error.to_string()))?;
        command
            .args(&options.supervise_args)
            .arg("--home")
            .arg(&options.home)
            .args(["--project", project.as_str()])
            .args(["--port", &port.to_string()])
            .arg("--launcher")
            .arg(&options.program);
        for word in &options.launch_args {
            command.args(["--launcher-arg", word]);
        }
        if !options.sandbox.is_confined() {
            command.arg("--unconfined");
        }
        command
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", "/")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(errors);
        tokio::process::Command::from(command)
            .kill_on_drop(false)
            .spawn()
            .map_err(|error| failures::supervisor(&format!("the supervisor cannot start: {error}")))
    }
}

#[async_trait]
impl Deployer for LocalDeployer {
    #[tracing::instrument(skip_all, fields(project = %request.project, sha = %request.sha, key = request.key))]
    async fn deploy(&self, request: &DeployRequest) -> Result<Deployment> {
        let layout = self.layout(&request.project)?;
        layout.create()?;
        let lock = layout.lock().await?;
        let mut state = State::load(&layout)?
            .unwrap_or_else(|| State::new(request.project.clone(), request.port));
        if let Some(deployment) = state.answer(&request.key) {
            return Ok(deployment);
        }
        let resumed = matches!(&state.pending, Some(pending) if pending.key == request.key);
        if !resumed {
            self.begin(&layout, &mut state, request).await?;
        }
        let rollout = Rollout {
            deployer: self,
            layout: &layout,
            lock: &lock,
            acceptance: &request.acceptance,
            port: request.port,
            key: &request.key,
        };
        rollout.carry_out(&mut state).await
    }

    #[tracing::instrument(skip_all, fields(%project, key))]
    async fn rollback(&self, project: &ProjectId, key: &str) -> Result<Deployment> {
        let (layout, lock, mut state) = self.open(project).await?;
        if let Some(deployment) = state.answer(key) {
            return Ok(deployment);
        }
        let resumed = matches!(&state.pending, Some(pending) if pending.key == key);
        if !resumed {
            let target = state.previous_good().map(|release| release.number);
            let target = target.ok_or_else(|| {
                let message = "there is no earlier good release of this service to go back to";
                Failure::new("no_previous_release", message).actor(Actor::Owner)
            })?;
            state.pending = Some(Pending {
                key: key.to_owned(),
                release: target,
                before: state.live,
                switched: false,
                checks: Vec::new(),
            });
            state.save(&layout)?;
        }
        let port = state.port;
        let rollout = Rollout {
            deployer: self,
            layout: &layout,
            lock: &lock,
            // What it passed once was asked of it, not of the data that came later.
            acceptance: &[],
            port,
            key,
        };
        rollout.carry_out(&mut state).await
    }

    #[tracing::instrument(name = "stop_service", skip_all, fields(%project))]
    async fn stop(&self, project: &ProjectId) -> Result<()> {
        let (layout, _lock, mut state) = self.open(project).await?;
        state.stopped = true;
        if let Some(live) = state.live
            && let Some(release) = state.release_mut(live)
        {
            release.status = DeploymentStatus::Stopped;
        }
        state.save(&layout)?;
        end(&layout).await
    }

    #[tracing::instrument(name = "start_service", skip_all, fields(%project))]
    async fn start(&self, project: &ProjectId) -> Result<Deployment> {
        let (layout, lock, mut state) = self.open(project).await?;
        let live = state.live().cloned().ok_or_else(|| {
            let message = "no release of this service ever passed its checks; deploy it first";
            Failure::new("not_deployed", message)
        })?;
        self.run(&layout, &live, state.port, "start").await?;
        control::tell(&layout, &switch(live.number, state.port)).await?;
        state.stopped = false;
        if let Some(release) = state.release_mut(live.number) {
            release.status = DeploymentStatus::Live;
        }
        state.save(&layout)?;
        let rollout = Rollout {
            deployer: self,
            layout: &layout,
            lock: &lock,
            acceptance: &[],
            port: state.port,
            key: "",
        };
        let ready = rollout.ready(&live).await;
        let status = if checks::passed(std::slice::from_ref(&ready)) {
            DeploymentStatus::Live
        } else {
            DeploymentStatus::Failed
        };
        Ok(Deployment {
            release: live.number,
            sha: live.sha,
            status,
            url: state.url(),
            checks: vec![ready],
            live_release: None,
        })
    }

    #[tracing::instrument(name = "remove_service", skip_all, fields(%project))]
    async fn remove(&self, project: &ProjectId) -> Result<()> {
        let layout = self.layout(project)?;
        if !layout.root().exists() {
            return Ok(());
        }
        let _lock = layout.lock().await?;
        end(&layout).await?;
        remove_directory(layout.root())
            .map_err(|error| failures::file("removing", layout.root(), &error))
    }

    async fn state(&self, project: &ProjectId) -> Result<ServiceState> {
        let layout = self.layout(project)?;
        let mut found = ServiceState {
            running: false,
            healthy: false,
            release: None,
            sha: None,
            url: None,
            trouble: None,
        };
        let Some(state) = State::load(&layout)? else {
            return Ok(found);
        };
        let Some(live) = state.live() else {
            return Ok(found);
        };
        found.release = Some(live.number);
        found.sha = Some(live.sha.clone());
        found.url = Some(state.url());
        if state.stopped {
            return Ok(found);
        }
        match control::tell(&layout, &Order::Status).await {
            Ok(status) => match status.release(live.number) {
                Some(running) if status.live == state.live => {
                    found.running = running.phase == Phase::Running;
                    if running.phase != Phase::Running {
                        found.trouble = Some(running.evidence());
                    }
                }
                _ => found.trouble = Some("its supervisor runs another release".to_owned()),
            },
            Err(error) => found.trouble = Some(format!("its supervisor does not answer: {error}")),
        }
        if found.running {
            let path = &live.service.health;
            match checks::health(&Place::Port(state.port), path, PULSE).await {
                Ok(()) => found.healthy = true,
                Err(seen) => found.trouble = Some(format!("GET {path}: {seen}")),
            }
        }
        Ok(found)
    }

    async fn logs(&self, project: &ProjectId, lines: usize) -> Result<Vec<String>> {
        let path = self.layout(project)?.log();
        tokio::task::spawn_blocking(move || {
            log::last_lines(&path, lines).map_err(|error| failures::file("reading", &path, &error))
        })
        .await
        .map_err(|error| failures::supervisor(&error.to_string()))?
    }
}

impl LocalDeployer {
    /// Takes a number, puts the files in their place, and writes down that it has begun.
    #[tracing::instrument(name = "deploy_step", skip_all, fields(step = "unpack", project = %request.project))]
    async fn begin(
        &self,
        layout: &Layout,
        state: &mut State,
        request: &DeployRequest,
    ) -> Result<()> {
        let repository = request.repository.path.as_deref().ok_or_else(|| {
            let message =
                "this machine deploys from local repositories only, and this one has no path";
            Failure::new("no_local_repository", message).actor(Actor::Admin)
        })?;
        let manifest = release::manifest(repository, &request.sha).await?;
        let number = state.last_release + 1;
        let tree: &Path = &layout.tree(number, &request.sha);
        release::export(repository, &request.sha, tree).await?;
        state.last_release = number;
        state.releases.push(Release {
            number,
            sha: request.sha.clone(),
            service: manifest.service,
            secrets: request.secrets.clone(),
            acceptance: request.acceptance.clone(),
            status: DeploymentStatus::Failed,
            good: false,
            at: Timestamp::now(),
        });
        state.pending = Some(Pending {
            key: request.key.clone(),
            release: number,
            before: state.live,
            switched: false,
            checks: Vec::new(),
        });
        state.save(layout)
    }
}

pub(crate) fn switch(release: u64, port: u16) -> Order {
    Order::Switch { release, port }
}

/// Ends the supervisor and with it all that it runs.
pub(crate) async fn end(layout: &Layout) -> Result<()> {
    match control::tell(layout, &Order::Shutdown).await {
        Err(control::Error::Nobody(_)) => {}
        Ok(_) => {
            // It said its last word before it was gone.
            let gone = gone(layout, Duration::from_secs(5)).await;
            if !gone {
                kill(layout).await;
            }
        }
        Err(_) => kill(layout).await,
    }
    Ok(())
}

/// Kills a supervisor that does not listen. What it runs dies with it.
async fn kill(layout: &Layout) {
    if let Some(pid) = alive(layout) {
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        gone(layout, Duration::from_secs(5)).await;
    }
}

async fn gone(layout: &Layout, within: Duration) -> bool {
    let until = tokio::time::Instant::now() + within;
    while alive(layout).is_some() {
        if tokio::time::Instant::now() > until {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    true
}

/// The supervisor's process, if it is the one that wrote its identity down.
fn alive(layout: &Layout) -> Option<rustix::process::Pid> {
    let text = std::fs::read(layout.supervisor()).ok()?;
    let identity: Identity = serde_json::from_slice(&text).ok()?;
    if start_ticks(identity.pid)? != identity.start_ticks || is_zombie(identity.pid) {
        return None;
    }
    rustix::process::Pid::from_raw(identity.pid.cast_signed())
}

fn is_zombie(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| {
        stat.rfind(')')
            .is_some_and(|end| stat[end..].starts_with(") Z"))
    })
}
