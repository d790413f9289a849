//! The front desk: the one way from any front end to the crew.

use async_trait::async_trait;
use graph::{Delivered, Engine, EngineError, StartOptions, ThreadFilter, ThreadStatus};
use nodes::signal::{self, Message, Order, OrderKind, SecretSet};
use ports::{
    Answer, Answered, Deployer, Deployment, Event, Failure, FrontDesk, Incoming, JobStatus,
    NoticeSeverity, PersonId, Plaintext, ProjectId, ProjectRecord, Recorded, ServiceOrder,
    StatusReport, TaskId, WaitId, threads,
};
use secrets::Vault;
use store::{FindProject, Store};

use crate::books::Books;

/// The longest message, in bytes.
const MAX_MESSAGE_BYTES: usize = 64 * 1024;

/// The stream of notices that are about no project; no project's id looks like it.
const INSTALLATION: &str = "installation";

/// The front desk.
pub struct Desk {
    engine: Engine,
    store: Store,
    books: Books,
    vault: Vault,
    deployer: deploy::LocalDeployer,
}

fn engine_failure(error: &EngineError) -> Failure {
    Failure::new("engine", error.to_string())
}

fn store_failure(error: &store::Error) -> Failure {
    Failure::new("database", error.to_string()).retryable()
}

impl Desk {
    /// A desk.
    pub fn new(
        engine: Engine,
        store: Store,
        books: Books,
        vault: Vault,
        deployer: deploy::LocalDeployer,
    ) -> Self {
        Self {
            engine,
            store,
            books,
            vault,
            deployer,
        }
    }

    /// The threads of a project's jobs that have not ended.
    async fn running_jobs(&self, project: &ProjectId) -> ports::Result<Vec<String>> {
        let filter = ThreadFilter {
            parent: Some(threads::conversation(project).into()),
            ..ThreadFilter::default()
        };
        let jobs = self
            .engine
            .threads(&filter)
            .await
            .map_err(|error| engine_failure(&error))?;
        Ok(jobs
            .into_iter()
            .filter(|job| {
                !matches!(
                    job.status,
                    ThreadStatus::Done | ThreadStatus::Failed | ThreadStatus::Cancelled
                )
            })
            .map(|job| job.id.to_string())
            .collect())
    }

    async fn order(&self, project: &ProjectId, order: Order) -> ports::Result<()> {
        let key = order.key.clone();
        match self
            .engine
            .signal(threads::conversation(project), signal::ORDER, &key, &order)
            .await
        {
            Ok(_) => Ok(()),
            Err(EngineError::UnknownThread(_)) => Err(no_project(project.as_str())),
            Err(error) => Err(engine_failure(&error)),
        }
    }

    async fn changed(&self, project: &ProjectId, status: &str, by: &PersonId) -> ports::Result<()> {
        let event = Event::ServiceChanged {
            status: status.to_owned(),
            by: by.to_string(),
        };
        let id = format!("service:{}", uuid::Uuid::now_v7());
        self.books
            .write(&id, &Recorded::new(project.clone(), event))
            .await
    }

    async fn remove_workspaces(&self, project: &ProjectId) -> ports::Result<()> {
        let (home, id) = (self.deployer.options().home.clone(), project.to_string());
        tokio::task::spawn_blocking(move || spawner::remove_workspaces(&home, &id))
            .await
            .map_err(std::io::Error::other)
            .and_then(|removed| removed)
            .map_err(|error| {
                Failure::new(
                    "workspaces",
                    format!("the workspaces of {project} cannot be removed: {error}"),
                )
            })
    }

    async fn caught_up(&self) -> ports::Result<()> {
        self.books
            .catch_up()
            .await
            .map(|_| ())
            .map_err(|error| store_failure(&error))
    }
}

fn no_project(name: &str) -> Failure {
    Failure::new(
        "no_project",
        format!("there is no project {name:?}; `artel projects` lists them"),
    )
}

#[async_trait]
impl FrontDesk for Desk {
    #[tracing::instrument(name = "message", skip_all, fields(key = message.key, thread = tracing::field::Empty))]
    async fn message(&self, message: Incoming) -> ports::Result<ProjectId> {
        if message.text.trim().is_empty() {
            return Err(Failure::new(
                "message_empty",
                "The message is empty: write what you want.",
            ));
        }
        if message.text.len() > MAX_MESSAGE_BYTES {
            return Err(Failure::new(
                "message_too_long",
                format!(
                    "The message has {} KiB, and at most {} KiB can be read: send the essence, and put the rest into the repository.",
                    message.text.len() / 1024,
                    MAX_MESSAGE_BYTES / 1024
                ),
            ));
        }
        let project = message
            .project
            .unwrap_or_else(|| ProjectId::founded_by(&message.key));
        let thread = threads::conversation(&project);
        tracing::Span::current().record("thread", &thread);
        let founding = nodes::conversation::found(project.clone(), message.from.clone());
        self.engine
            .start(
                thread.as_str(),
                nodes::conversation::GRAPH,
                &founding,
                StartOptions::default(),
            )
            .await
            .map_err(|error| engine_failure(&error))?;
        let said = Message {
            key: message.key.clone(),
            from: message.from,
            text: self.vault.redactor().redact(&message.text).into_owned(),
            yes: message.yes,
        };
        self.engine
            .signal(thread.as_str(), signal::MESSAGE, &message.key, &said)
            .await
            .map_err(|error| engine_failure(&error))?;
        Ok(project)
    }

    async fn answer(&self, wait: &WaitId, mut answer: Answer) -> ports::Result<Answered> {
        self.caught_up().await?;
        let Some(row) = self
            .store
            .wait(wait)
            .await
            .map_err(|error| store_failure(&error))?
        else {
            return Ok(Answered::Gone);
        };
        if !row.open {
            return Ok(if row.answer.is_some() {
                Answered::Already
            } else {
                Answered::Gone
            });
        }
        answer.text = self.vault.redactor().redact(&answer.text).into_owned();
        let kind = signal::answer(wait);
        match self
            .engine
            .signal(row.thread.as_str(), &kind, &kind, &answer)
            .await
        {
            Ok(Delivered::New) => Ok(Answered::Accepted),
            Ok(Delivered::Duplicate) => Ok(Answered::Already),
            Err(EngineError::UnknownThread(_)) => Ok(Answered::Gone),
            Err(error) => Err(engine_failure(&error)),
        }
    }

    async fn cancel(&self, project: &ProjectId, by: &PersonId) -> ports::Result<bool> {
        let jobs = self.running_jobs(project).await?;
        for job in &jobs {
            self.engine
                .cancel(job.as_str(), &format!("cancelled by {by}"))
                .await
                .map_err(|error| engine_failure(&error))?;
        }
        Ok(!jobs.is_empty())
    }

    async fn redeploy(
        &self,
        project: &ProjectId,
        by: &PersonId,
        key: &str,
        yes: bool,
    ) -> ports::Result<()> {
        self.order(
            project,
            Order {
                key: key.to_owned(),
                by: by.clone(),
                yes,
                what: OrderKind::Deploy,
            },
        )
        .await
    }

    async fn rollback(
        &self,
        project: &ProjectId,
        _by: &PersonId,
        key: &str,
    ) -> ports::Result<Deployment> {
        let deployment = self.deployer.rollback(project, key).await?;
        let event = Event::DeployEnded {
            deployment: deployment.clone(),
        };
        self.books
            .write(
                &format!("rollback:{key}"),
                &Recorded::new(project.clone(), event),
            )
            .await?;
        self.caught_up().await?;
        Ok(deployment)
    }

    async fn service(
        &self,
        project: &ProjectId,
        order: ServiceOrder,
        by: &PersonId,
    ) -> ports::Result<()> {
        let status = match order {
            ServiceOrder::Stop => {
                self.deployer.stop(project).await?;
                "stopped"
            }
            ServiceOrder::Start => {
                self.deployer.start(project).await?;
                "started"
            }
            ServiceOrder::Remove => {
                let worked_on = self.cancel(project, by).await?;
                self.deployer.remove(project).await?;
                // What a worker still holds goes with the next removal.
                if !worked_on {
                    self.remove_workspaces(project).await?;
                }
                "removed"
            }
            ServiceOrder::Archive => {
                self.cancel(project, by).await?;
                self.deployer.stop(project).await?;
                "archived"
            }
        };
        self.changed(project, status, by).await?;
        self.caught_up().await
    }

    async fn retry(
        &self,
        project: &ProjectId,
        task: Option<&TaskId>,
        by: &PersonId,
    ) -> ports::Result<bool> {
        let report = self.status(project).await?;
        let last_failed = report.job.as_ref().is_some_and(|job| {
            job.status == status_word(JobStatus::Failed)
                || job.status == status_word(JobStatus::Cancelled)
        });
        if report.waits.is_empty() && !last_failed {
            return Ok(false);
        }
        let order = Order {
            key: format!("retry:{}", uuid::Uuid::now_v7()),
            by: by.clone(),
            yes: false,
            what: OrderKind::Retry {
                task: task.cloned(),
            },
        };
        self.order(project, order).await?;
        Ok(true)
    }

    async fn set_secret(
        &self,
        project: &ProjectId,
        name: &str,
        value: Plaintext,
        _by: &PersonId,
    ) -> ports::Result<()> {
        self.vault
            .put(project, name, value)
            .await
            .map_err(Failure::from)?;
        for job in self.running_jobs(project).await? {
            let set = SecretSet {
                name: name.to_owned(),
            };
            let key = format!("secret:{}", uuid::Uuid::now_v7());
            match self
                .engine
                .signal(job.as_str(), signal::SECRET, &key, &set)
                .await
            {
                Ok(_) | Err(EngineError::UnknownThread(_)) => {}
                Err(error) => return Err(engine_failure(&error)),
            }
        }
        Ok(())
    }

    async fn find(&self, name: &str) -> ports::Result<ProjectId> {
        self.caught_up().await?;
        match self.store.find_project(name).await {
            Ok(found) => Ok(found.record.id),
            Err(FindProject::Database(error)) => Err(store_failure(&error)),
            Err(error @ FindProject::Ambiguous { .. }) => {
                Err(Failure::new("ambiguous_project", error.to_string()))
            }
            Err(_) => {
                // A project whose first message is stored but not yet worked on is in no projection.
                let founded = ports::Slug::parse(name).is_ok()
                    && self
                        .engine
                        .thread(name)
                        .await
                        .map_err(|error| engine_failure(&error))?
                        .is_some();
                if founded {
                    Ok(ProjectId::new(name))
                } else {
                    Err(no_project(name))
                }
            }
        }
    }

    async fn status(&self, project: &ProjectId) -> ports::Result<StatusReport> {
        self.caught_up().await?;
        self.store
            .status_report(project)
            .await
            .map_err(|error| store_failure(&error))?
            .ok_or_else(|| no_project(project.as_str()))
    }

    async fn projects(&self) -> ports::Result<Vec<ProjectRecord>> {
        self.caught_up().await?;
        let all = self
            .store
            .projects()
            .await
            .map_err(|error| store_failure(&error))?;
        Ok(all
            .into_iter()
            .filter(|project| project.status != "archived")
            .collect())
    }

    async fn notice(
        &self,
        severity: NoticeSeverity,
        fingerprint: &str,
        text: &str,
    ) -> ports::Result<()> {
        let event = Event::AdminNotice {
            severity,
            fingerprint: fingerprint.to_owned(),
            text: self.vault.redactor().redact(text).into_owned(),
        };
        let id = format!("notice:{}", uuid::Uuid::now_v7());
        self.books
            .write(&id, &Recorded::new(ProjectId::from(INSTALLATION), event))
            .await?;
        self.caught_up().await
    }
}

fn status_word(status: JobStatus) -> &'static str {
    match status {
        JobStatus::Deployed => "deployed",
        JobStatus::Failed => "failed",
        JobStatus::Cancelled => "cancelled",
    }
}
