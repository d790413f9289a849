//! Where workers run, with what, and whence they get what they need.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use ports::WorkerModels;
use protocol::Transport;
use sandbox::Sandbox;
use spawner::runtime::{Containers, DockerOptions, Local, Runtime, Warm};
use spawner::{GitHubApp, GitTokens, HostToken, NoTokens};

use crate::app::App;
use crate::config::{Config, GitHubLogin};

/// The name of the spawner in a process that does all the work alone.
pub(super) const SPAWNER: &str = "local";

/// What a spawner in this process needs.
pub struct Workers {
    /// Who runs them: the spawner's name in events, heartbeats and the labels of containers.
    pub name: String,
    /// The data folder.
    pub home: PathBuf,
    /// Where workers run.
    pub runtime: Arc<dyn Runtime>,
    /// Where jobs come from.
    pub transport: Arc<dyn Transport>,
    /// Who answers them.
    pub models: Arc<dyn WorkerModels>,
    /// Whence credentials for repositories elsewhere come.
    pub tokens: Arc<dyn GitTokens>,
    /// At a time.
    pub max: usize,
    /// What they may use together.
    pub capacity: spawner::Capacity,
    /// How their workspaces are kept small.
    pub disk: spawner::Disk,
}

/// The credentials that the configuration has for repositories elsewhere.
pub fn git_tokens(config: &Config) -> anyhow::Result<Arc<dyn GitTokens>> {
    let api = &config.github_api_url;
    Ok(match &config.github {
        Some(GitHubLogin::Token(token)) => {
            match HostToken::github(api, token.expose().to_owned()) {
                Some(token) => Arc::new(token),
                None => Arc::new(NoTokens),
            }
        }
        Some(GitHubLogin::App(id, key)) => Arc::new(GitHubApp::new(api, id, key)?),
        None => Arc::new(NoTokens),
    })
}

/// What all workers of this machine may use together.
pub fn capacity(config: &Config) -> spawner::Capacity {
    let waiting = config.docker_runtime.as_ref().map_or(0, |_| config.warm);
    spawner::Capacity::detect(config.worker_cpus, config.worker_memory_mb, waiting)
}

impl Workers {
    /// Those of a program that has everything.
    pub(super) async fn of(
        app: &App,
        transport: Arc<dyn Transport>,
        tokens: Arc<dyn GitTokens>,
        name: &str,
    ) -> anyhow::Result<Self> {
        let home = app.home.path();
        Ok(Self {
            name: name.to_owned(),
            home: home.to_owned(),
            runtime: runtime(&app.config, home, name, &app.sandbox, &app.program).await?,
            transport,
            models: app.worker_models.clone(),
            tokens,
            max: app.config.max_workers,
            capacity: capacity(&app.config),
            disk: app.config.worker_disk,
        })
    }
}

/// Where workers run, as the configuration says, of a spawner of this name.
pub async fn runtime(
    config: &Config,
    home: &Path,
    name: &str,
    sandbox: &Sandbox,
    program: &Path,
) -> anyhow::Result<Arc<dyn Runtime>> {
    Ok(match containers(config, home, name).await? {
        Some(containers) => Arc::new(containers),
        None => Arc::new(Local::new(sandbox.clone(), program)),
    })
}

/// Workers in Docker, if the configuration says so, of a spawner of this name.
pub async fn containers(
    config: &Config,
    home: &Path,
    name: &str,
) -> anyhow::Result<Option<Containers>> {
    let Some(runtime) = &config.docker_runtime else {
        return Ok(None);
    };
    let options = DockerOptions {
        host: Some(config.docker_host.clone()),
        runtime: runtime.clone(),
        image: config.worker_image.clone(),
        spawner: name.to_owned(),
        home: home.to_owned(),
        warm: Warm {
            count: config.warm,
            limits: (&config.policy()?.limits).into(),
        },
    };
    let containers = Containers::connect(options).await;
    let containers = containers.with_context(|| {
        if config.is_default("SPAWNER_RUNTIME") {
            format!("workers cannot run in Docker with {runtime}, the default of the full size; SPAWNER_RUNTIME=bubblewrap has them run in a sandbox of this machine")
        } else {
            format!("workers cannot run in Docker (SPAWNER_RUNTIME={runtime})")
        }
    })?;
    Ok(Some(containers))
}
