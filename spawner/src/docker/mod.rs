//! Containers of a Docker engine, as far as workers need them: checked, confined, watched, and cleared away.
//!
//! * [`Engine`]: the connection (API version negotiated), its runtime, images, and which containers are ours.
//! * `spec.rs`: a worker as a container: what it sees, what it may use, whose it is.
//! * `running.rs`: a container that runs: its output, what it uses, its end with the evidence.
//! * `system.rs`: what it writes beside the folders that it was given.
//! * `abandoned.rs`: what homes have left whose spawners never come back.
//! * `unbegun.rs`: what an engine leaves that is killed before a container begins.
//!
//! Nothing here knows a job, a broker or a repository. *Architecture invariant:* only containers with our label are ever
//! stopped or removed, of another home only when they have been over for a week; and processes that have our home as their
//! workspace and no engine that knows them.

mod abandoned;
mod away;
mod mark;
mod noticed;
mod output;
mod running;
mod spec;
mod system;
mod unbegun;

use bollard::Docker;
use bollard::errors::Error as DockerError;
use bollard::models::{ContainerStateStatusEnum, ContainerSummaryStateEnum, SystemInfo};
use bollard::query_parameters::{
    CreateContainerOptionsBuilder, CreateImageOptionsBuilder, KillContainerOptionsBuilder,
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
};
use futures::TryStreamExt as _;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use away::{AGAIN, PATIENCE, patiently, with_absences};
use mark::Mark;
use running::Past;
pub use running::{Ended, Running, Stopper};
pub use spec::{HOME, HOME_LABEL, LABEL, Limits, Mount, SYSBOX, Spec};

/// How long one request to the engine may take, in seconds. Waiting, logs and statistics are streams and have no such bound.
const REQUEST_S: u64 = 60;
/// How long an image may take to be pulled.
const PULL: Duration = Duration::from_mins(15);

/// What can go wrong with an engine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `DOCKER_HOST` is not an address of an engine.
    #[error(
        "DOCKER_HOST is {host:?}, which is no address of a Docker engine; it looks like unix:///var/run/docker.sock"
    )]
    Address {
        /// What it is.
        host: String,
        /// Why it cannot be used.
        #[source]
        source: Box<DockerError>,
    },
    /// The engine is on another machine, where our workspaces are not.
    #[error(
        "DOCKER_HOST is {host:?}; workspaces are folders of this machine, so the engine has to be here too: a Unix socket, such as unix:///var/run/docker.sock"
    )]
    Remote {
        /// What it is.
        host: String,
    },
    /// Nobody answers, or not in time.
    #[error(
        "the Docker engine at {host} does not answer; check that it runs, that DOCKER_HOST names its socket, and that this user may use it"
    )]
    Unreachable {
        /// Its address.
        host: String,
        /// The last answer.
        #[source]
        source: Box<DockerError>,
    },
    /// The engine lacks the runtime.
    #[error(
        "the Docker engine has no runtime {runtime:?} (it has {known}); install it (docs/sysbox.md) or choose another one openly with SPAWNER_RUNTIME"
    )]
    NoRuntime {
        /// What was asked for.
        runtime: String,
        /// What there is.
        known: String,
    },
    /// What is called Sysbox makes no user namespace.
    #[error(
        "the Docker engine's runtime \"sysbox-runc\" has no more than the name of Sysbox: root in its containers is root of this machine (uid_map {uid_map}); an admin has to install Sysbox under that name (docs/sysbox.md), or to choose another runtime openly with SPAWNER_RUNTIME"
    )]
    OnlyTheName {
        /// The container's table of users.
        uid_map: String,
    },
    /// Whether it does cannot be seen.
    #[error(
        "it cannot be seen whether the Docker engine's runtime \"sysbox-runc\" is Sysbox ({reason}); the spawner has to see the engine's processes in its /proc, or an admin to choose another runtime openly with SPAWNER_RUNTIME"
    )]
    Unmarked {
        /// Why not.
        reason: String,
    },
    /// There is no such image, and it may not or cannot be had.
    #[error("the image {image} is not there: {reason}")]
    NoImage {
        /// Its name.
        image: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// The engine refused.
    #[error("the Docker engine refused {action}")]
    Refused {
        /// What was asked for.
        action: &'static str,
        /// Its words.
        #[source]
        source: Box<DockerError>,
    },
    /// The engine died, or was ended, while it started a container, which it cannot start now that it is back.
    #[error(
        "the Docker engine went away while it started a container, which it cannot start any more"
    )]
    Spoilt {
        /// Its words when it was back.
        #[source]
        source: Box<DockerError>,
    },
    /// The container is gone, and nothing is known of its end.
    #[error("the container {container} is gone, and nothing is known of its end")]
    Gone {
        /// Which.
        container: String,
    },
}

impl Error {
    /// Whether the engine itself failed, and not what it was asked for.
    pub fn is_failure(&self) -> bool {
        match self {
            Self::Refused { source, .. } => matches!(
                **source,
                DockerError::DockerResponseServerError {
                    status_code: 500..,
                    ..
                }
            ),
            // It may have ended before we looked.
            Self::Unmarked { .. } => true,
            _ => false,
        }
    }

    fn refused(action: &'static str) -> impl FnOnce(DockerError) -> Self {
        move |source| Self::Refused {
            action,
            source: Box::new(source),
        }
    }
}

/// A container that carries our label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// The engine's id of it.
    pub id: String,
    /// All labels.
    pub labels: HashMap<String, String>,
    /// Whether it runs now.
    pub running: bool,
    /// When it was made, in seconds since 1970.
    pub created_s: i64,
}

/// An engine that answers and has the runtime.
#[derive(Clone)]
pub struct Engine {
    docker: Docker,
    socket: PathBuf,
    runtime: String,
    version: String,
    processors: Option<u32>,
    mark: Arc<Mark>,
    /// Its storage counts the image with what a container writes.
    counts_image: bool,
    /// It has said that its storage has no quotas.
    no_quotas: Arc<AtomicBool>,
}

impl Engine {
    /// Connects to `host` (`DOCKER_HOST`; the usual socket if absent) and checks that it has the runtime.
    pub async fn connect(host: Option<&str>, runtime: &str) -> Result<Self, Error> {
        let host = host.unwrap_or("unix:///var/run/docker.sock");
        let docker = Docker::connect_with_host(host).map_err(|source| {
            let (host, source) = (host.to_owned(), Box::new(source));
            match *source {
                // The address is fine, but nobody is there.
                DockerError::SocketNotFoundError(_) => Error::Unreachable { host, source },
                _ => Error::Address { host, source },
            }
        })?;
        let unreachable = |source| Error::Unreachable {
            host: host.to_owned(),
            source: Box::new(source),
        };
        let docker = docker
            .with_timeout(Duration::from_secs(REQUEST_S))
            .negotiate_version()
            .await
            .map_err(unreachable)?;
        let about = docker.info().await.map_err(unreachable)?;
        has_runtime(&about, runtime)?;
        Ok(Self {
            docker,
            socket: host.trim_start_matches("unix://").into(),
            runtime: runtime.to_owned(),
            version: about.server_version.unwrap_or_default(),
            processors: about.ncpu.and_then(|count| u32::try_from(count).ok()),
            mark: Arc::default(),
            counts_image: about.driver.as_deref() == Some("btrfs"),
            no_quotas: Arc::default(),
        })
    }

    /// Whether the engine has [`SYSBOX`] now, under which a container may run Docker inside.
    pub async fn has_sysbox(&self) -> Result<(), Error> {
        let about = self.docker.info().await;
        has_runtime(
            &about.map_err(Error::refused("to tell its runtimes"))?,
            SYSBOX,
        )
    }

    /// Whether the engine sees what is mounted here: it lives in the same mount namespace. If not, why.
    pub async fn shares_mounts(&self) -> Result<(), String> {
        let untold = |error: std::io::Error| {
            format!(
                "it cannot be told whether the Docker engine sees what is mounted here: {error}"
            )
        };
        let stream = tokio::net::UnixStream::connect(&self.socket).await;
        let peer = stream.map_err(untold)?.peer_cred().map_err(untold)?;
        // Nobody that we could know, when it is outside of our process namespace.
        let pid = peer.pid().filter(|pid| *pid > 0).ok_or_else(elsewhere)?;
        let namespace =
            |whose: &str| std::fs::read_link(format!("/proc/{whose}/ns/mnt")).map_err(untold);
        if namespace("self")? == namespace(&pid.to_string())? {
            Ok(())
        } else {
            Err(elsewhere())
        }
    }

    /// For people, such as `docker 28.2.2 with sysbox-runc`.
    pub fn describe(&self) -> String {
        format!("docker {} with {}", self.version, self.runtime)
    }

    /// The id of an image: of one that is there, else of one that is pulled because its name pins it by digest. The id names
    /// the same image for ever, whatever a tag is moved to.
    pub async fn image(&self, name: &str) -> Result<String, Error> {
        if let Some(id) = self.present(name).await? {
            return Ok(id);
        }
        let missing = |reason: String| Error::NoImage {
            image: name.to_owned(),
            reason,
        };
        if !name.contains("@sha256:") {
            return Err(missing(
                "it is not on this machine, and only an image that is pinned by digest (NAME@sha256:…) is pulled; `make image` builds artel-worker:dev".to_owned(),
            ));
        }
        let options = CreateImageOptionsBuilder::default()
            .from_image(name)
            .build();
        let pull = self
            .docker
            .create_image(Some(options), None, None)
            .try_for_each(|_| async { Ok(()) });
        match tokio::time::timeout(PULL, pull).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return Err(missing(format!("it cannot be pulled: {error}"))),
            Err(_) => return Err(missing(format!("it was not pulled within {PULL:?}"))),
        }
        self.present(name)
            .await?
            .ok_or_else(|| missing("it was pulled, and is not there all the same".to_owned()))
    }

    async fn present(&self, name: &str) -> Result<Option<String>, Error> {
        match patiently(|| self.docker.inspect_image(name)).await {
            Ok(image) => Ok(image.id),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(Error::refused("to look at an image")(error)),
        }
    }

    /// Makes a container, which does not run yet, and returns its id. One of the same name that is ours and does not run is
    /// in the way and is removed.
    pub async fn create(&self, spec: &Spec) -> Result<String, Error> {
        if spec.docker_inside {
            self.has_sysbox().await?;
        }
        if spec.docker_inside || self.runtime == SYSBOX {
            self.mark.asked.store(true, Ordering::Relaxed);
        }
        let options = || {
            CreateContainerOptionsBuilder::default()
                .name(&spec.name)
                .build()
        };
        let image_mb = self.counted_mb(spec).await?;
        let body = || {
            let mut body = spec.body(&self.runtime, self.processors);
            if let Some(host) = &mut body.host_config
                && !self.no_quotas.load(Ordering::Relaxed)
            {
                host.storage_opt = spec.quota(image_mb);
            }
            body
        };
        let create = || self.docker.create_container(Some(options()), body());
        let made = match patiently(create).await {
            Err(DockerError::DockerResponseServerError {
                status_code: 409, ..
            }) => {
                self.remove(&spec.name).await?;
                patiently(create).await
            }
            Err(error) if spec.quota(image_mb).is_some() && has_no_quotas(&error) => {
                if !self.no_quotas.swap(true, Ordering::Relaxed) {
                    tracing::info!(
                        %error,
                        "the engine's storage has no quotas; how much workers with Docker inside write into their system is measured"
                    );
                }
                patiently(create).await
            }
            made => made,
        };
        Ok(made.map_err(Error::refused("to make a container"))?.id)
    }

    /// What of the image counts for a quota of the container, in MiB.
    async fn counted_mb(&self, spec: &Spec) -> Result<u64, Error> {
        if !self.counts_image || spec.quota(0).is_none() {
            return Ok(0);
        }
        let image = patiently(|| self.docker.inspect_image(&spec.image)).await;
        let size = image.map_err(Error::refused("to look at an image"))?.size;
        let bytes = u64::try_from(size.unwrap_or_default()).unwrap_or_default();
        Ok(bytes.div_ceil(1 << 20))
    }

    /// Starts a container that was made, and watches it.
    pub async fn start(&self, id: &str, limits: &Limits) -> Result<Running, Error> {
        // Before it starts, so that nothing of what it says first is missed.
        let running = Running::watch(
            self.docker.clone(),
            id.to_owned(),
            limits.clone(),
            Past::None,
        );
        self.begin(id).await?;
        running.started();
        Ok(running)
    }

    /// Starts a container that was made, and leaves it alone. In Sysbox it has to show that it is.
    pub async fn begin(&self, id: &str) -> Result<(), Error> {
        // Starting what was started already is fine.
        let (started, absences) = with_absences(|| self.docker.start_container(id, None)).await;
        started.map_err(|source| match source {
            DockerError::DockerResponseServerError {
                status_code: 500.., ..
            } if absences > 0 => Error::Spoilt {
                source: Box::new(source),
            },
            source => Error::refused("to start a container")(source),
        })?;
        self.is_what_it_is_called(id).await
    }

    /// Watches a container that waits, and begins now.
    pub fn watch(&self, id: &str, limits: &Limits) -> Running {
        let running = Running::watch(
            self.docker.clone(),
            id.to_owned(),
            limits.clone(),
            Past::None,
        );
        running.started();
        running
    }

    /// Watches a container that somebody else has started, such as a former process of ours.
    pub fn adopt(&self, id: &str, limits: &Limits) -> Running {
        self.watch_on(id, limits, Duration::ZERO, false)
    }

    fn watch_on(&self, id: &str, limits: &Limits, age: Duration, over: bool) -> Running {
        let running = Running::watch(
            self.docker.clone(),
            id.to_owned(),
            limits.clone(),
            Past::Adopted { age, over },
        );
        running.started();
        running
    }

    /// Watches the container of this name, if a spawner of `home` has made and started it: it runs, with what is left of its wall clock,
    /// or has ended and tells how. One that was made and never started is no more than a name.
    /// `since` is when it began, if that is not when it was started.
    pub async fn find_and_adopt(
        &self,
        name: &str,
        home: &str,
        limits: &Limits,
        since: Option<jiff::Timestamp>,
    ) -> Result<Option<Running>, Error> {
        let about = match patiently(|| self.docker.inspect_container(name, None)).await {
            Ok(about) => about,
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(Error::refused("to look at a container")(error)),
        };
        let labels = about.config.and_then(|config| config.labels);
        let is_ours = labels.is_some_and(|labels| is_of(&labels, home));
        let (Some(id), Some(state)) = (about.id, about.state) else {
            return Ok(None);
        };
        let never_ran = matches!(
            state.status,
            None | Some(ContainerStateStatusEnum::CREATED | ContainerStateStatusEnum::REMOVING)
        );
        if !is_ours || never_ran {
            return Ok(None);
        }
        let time =
            |text: Option<String>| text.and_then(|text| text.parse::<jiff::Timestamp>().ok());
        let began = since.or_else(|| time(state.started_at));
        let runs = state.running.unwrap_or(false);
        let until = if runs {
            Some(jiff::Timestamp::now())
        } else {
            time(state.finished_at)
        };
        let age = began
            .zip(until)
            .and_then(|(began, until)| Duration::try_from(until.duration_since(began)).ok())
            .unwrap_or_default();
        Ok(Some(self.watch_on(&id, limits, age, !runs)))
    }

    /// The exit code of a container that has ended.
    pub async fn ended_with(&self, id: &str) -> Result<Option<i64>, Error> {
        match patiently(|| self.docker.inspect_container(id, None)).await {
            Ok(about) => Ok(about.state.and_then(|state| {
                let ended = state.status == Some(ContainerStateStatusEnum::EXITED);
                state.exit_code.filter(|_| ended)
            })),
            Err(error) if is_missing(&error) => Ok(None),
            Err(error) => Err(Error::refused("to look at a container")(error)),
        }
    }

    /// Kills a container, and leaves what is known of its end.
    pub async fn kill(&self, id: &str) -> Result<(), Error> {
        let options = KillContainerOptionsBuilder::default()
            .signal("SIGKILL")
            .build();
        match self.docker.kill_container(id, Some(options)).await {
            // It is not there, or does not run any more.
            Ok(())
            | Err(DockerError::DockerResponseServerError {
                status_code: 404 | 409,
                ..
            }) => Ok(()),
            Err(error) => Err(Error::refused("to kill a container")(error)),
        }
    }

    /// All containers of the spawners of this home ([`HOME_LABEL`]), whether they run or not.
    pub async fn ours(&self, home: &str) -> Result<Vec<Found>, Error> {
        let label = format!("{LABEL}.spawner");
        let options = ListContainersOptionsBuilder::default()
            .all(true)
            .filters(&HashMap::from([("label", vec![label])]))
            .build();
        let found = patiently(|| self.docker.list_containers(Some(options.clone())))
            .await
            .map_err(Error::refused("to list containers"))?;
        Ok(found
            .into_iter()
            .filter_map(|container| {
                Some(Found {
                    id: container.id?,
                    labels: container.labels.unwrap_or_default(),
                    running: container.state == Some(ContainerSummaryStateEnum::RUNNING),
                    created_s: container.created.unwrap_or_default(),
                })
            })
            .filter(|found| is_of(&found.labels, home))
            .collect())
    }

    /// Removes a container of ours, ending it if it runs, and confirms that it is gone. One that is not there is gone.
    pub async fn remove(&self, id: &str) -> Result<(), Error> {
        let about = match patiently(|| self.docker.inspect_container(id, None)).await {
            Ok(about) => about,
            Err(error) if is_missing(&error) => return Ok(()),
            Err(error) => return Err(Error::refused("to look at a container")(error)),
        };
        let labels = about.config.and_then(|config| config.labels);
        let is_ours =
            labels.is_some_and(|labels| labels.keys().any(|label| label.starts_with(LABEL)));
        if !is_ours {
            return Err(Error::Refused {
                action: "to remove a container that is not ours",
                source: Box::new(DockerError::DockerResponseServerError {
                    status_code: 409,
                    message: format!("the container {id} does not carry the label {LABEL}"),
                }),
            });
        }
        let options = || {
            RemoveContainerOptionsBuilder::default()
                .force(true)
                .v(true)
                .build()
        };
        let deadline = tokio::time::Instant::now() + PATIENCE;
        loop {
            match self.docker.remove_container(id, Some(options())).await {
                Ok(()) => {}
                Err(error) if is_missing(&error) => return Ok(()),
                // Somebody else removes it, or it is not quite dead yet.
                Err(error) if tokio::time::Instant::now() < deadline => {
                    tracing::debug!(%error, container = id, "not removed yet");
                    tokio::time::sleep(AGAIN).await;
                }
                Err(error) => return Err(Error::refused("to remove a container")(error)),
            }
        }
    }
}

/// Whether a container with these labels is one of this home. Those of a former version have the home where others have the
/// spawner's name.
fn is_of(labels: &HashMap<String, String>, home: &str) -> bool {
    let named = |name| labels.get(&format!("{LABEL}.{name}"));
    named(HOME_LABEL)
        .or_else(|| named("spawner"))
        .map(String::as_str)
        == Some(home)
}

fn has_runtime(about: &SystemInfo, runtime: &str) -> Result<(), Error> {
    let runtimes = about.runtimes.iter().flatten().map(|(name, _)| name);
    let mut known: Vec<&str> = runtimes.map(String::as_str).collect();
    if known.contains(&runtime) {
        return Ok(());
    }
    known.sort_unstable();
    Err(Error::NoRuntime {
        runtime: runtime.to_owned(),
        known: known.join(", "),
    })
}

/// Whether this says that the engine's storage cannot bound the system of a container.
fn has_no_quotas(error: &DockerError) -> bool {
    let DockerError::DockerResponseServerError { message, .. } = error else {
        return false;
    };
    let message = message.to_lowercase();
    ["storage-opt", "storage opt", "quota"]
        .iter()
        .any(|words| message.contains(words))
}

fn elsewhere() -> String {
    "the Docker engine does not see what is mounted here: it runs in another mount namespace"
        .to_owned()
}

fn is_missing(error: &DockerError) -> bool {
    matches!(
        error,
        DockerError::DockerResponseServerError {
            status_code: 404,
            ..
        }
    )
}
