//! A front desk that writes down what it is asked for, and fails when it is told to.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use parking_lot::Mutex;
use ports::{
    Answer, Answered, Deployment, Failure, FrontDesk, Incoming, NoticeSeverity, PersonId,
    Plaintext, ProjectId, ProjectRecord, Result, ServiceOrder, StatusReport, TaskId, WaitId,
};
use tokio::sync::Notify;

#[derive(Default)]
pub struct Desk {
    /// Messages by key: the same message twice is one.
    pub messages: Mutex<BTreeMap<String, Incoming>>,
    /// Messages in the order in which they came, as often as they came.
    pub heard: Mutex<Vec<String>>,
    pub answers: Mutex<Vec<(WaitId, Answer)>>,
    pub secrets: Mutex<Vec<(ProjectId, String, String)>>,
    pub orders: Mutex<Vec<String>>,
    pub notices: Mutex<Vec<(String, String)>>,
    pub projects: Mutex<Vec<ProjectRecord>>,
    /// How often, and how, messages fail.
    pub failing: Mutex<Option<(u32, Failure)>>,
    /// A rollback waits for it.
    pub rolled_back: Notify,
    /// Every message takes this long.
    pub slowness: Mutex<Duration>,
}

impl Desk {
    pub fn add(&self, slug: &str) {
        self.projects.lock().push(ProjectRecord {
            id: ProjectId::new(slug),
            slug: slug.to_owned(),
            name: slug.to_owned(),
            status: "running".to_owned(),
            url: None,
            repository: None,
            cost_usd: None,
            tokens: 0,
        });
    }

    pub fn fail(&self, times: u32, failure: Failure) {
        *self.failing.lock() = Some((times, failure));
    }

    fn failure(&self) -> Option<Failure> {
        let mut failing = self.failing.lock();
        let (times, failure) = failing.as_mut()?;
        *times = times.checked_sub(1)?;
        Some(failure.clone())
    }

    fn order(&self, text: String) {
        self.orders.lock().push(text);
    }
}

#[async_trait]
impl FrontDesk for Desk {
    async fn message(&self, message: Incoming) -> Result<ProjectId> {
        let slowness = *self.slowness.lock();
        tokio::time::sleep(slowness).await;
        if message.text.trim().is_empty() {
            return Err(Failure::new(
                "message_empty",
                "The message is empty: write what you want.",
            ));
        }
        if message.text.len() > 64 * 1024 {
            return Err(Failure::new(
                "message_too_long",
                "The message has 65 KiB, and at most 64 KiB can be read.",
            ));
        }
        if let Some(failure) = self.failure() {
            return Err(failure);
        }
        self.heard.lock().push(message.text.clone());
        let project = message
            .project
            .clone()
            .unwrap_or_else(|| ProjectId::founded_by(&message.key));
        self.messages.lock().insert(message.key.clone(), message);
        Ok(project)
    }

    async fn answer(&self, wait: &WaitId, answer: Answer) -> Result<Answered> {
        let mut answers = self.answers.lock();
        if answers.iter().any(|(answered, _)| answered == wait) {
            return Ok(Answered::Already);
        }
        answers.push((wait.clone(), answer));
        Ok(Answered::Accepted)
    }

    async fn cancel(&self, project: &ProjectId, _by: &PersonId) -> Result<bool> {
        self.order(format!("cancel {project}"));
        Ok(false)
    }

    async fn redeploy(
        &self,
        project: &ProjectId,
        _by: &PersonId,
        key: &str,
        _yes: bool,
    ) -> Result<()> {
        self.order(format!("deploy {project} {key}"));
        Ok(())
    }

    async fn rollback(
        &self,
        project: &ProjectId,
        _by: &PersonId,
        _key: &str,
    ) -> Result<Deployment> {
        self.order(format!("rollback {project}"));
        self.rolled_back.notified().await;
        Err(Failure::new(
            "no_release",
            "there is no release to go back to",
        ))
    }

    async fn service(
        &self,
        project: &ProjectId,
        order: ServiceOrder,
        _by: &PersonId,
    ) -> Result<()> {
        self.order(format!("{order:?} {project}"));
        Ok(())
    }

    async fn retry(
        &self,
        project: &ProjectId,
        task: Option<&TaskId>,
        _by: &PersonId,
    ) -> Result<bool> {
        self.order(format!("retry {project} {task:?}"));
        Ok(true)
    }

    async fn set_secret(
        &self,
        project: &ProjectId,
        name: &str,
        value: Plaintext,
        _by: &PersonId,
    ) -> Result<()> {
        self.secrets
            .lock()
            .push((project.clone(), name.to_owned(), value.expose().to_owned()));
        Ok(())
    }

    async fn find(&self, name: &str) -> Result<ProjectId> {
        self.projects
            .lock()
            .iter()
            .find(|project| project.slug == name)
            .map(|project| project.id.clone())
            .ok_or_else(|| {
                Failure::new(
                    "no_project",
                    format!("there is no project {name:?}; `artel projects` lists them"),
                )
            })
    }

    async fn status(&self, project: &ProjectId) -> Result<StatusReport> {
        let known = self
            .projects
            .lock()
            .iter()
            .find(|known| known.id == *project)
            .cloned();
        Ok(StatusReport {
            project: known.ok_or_else(|| Failure::new("no_project", "there is no such project"))?,
            job: None,
            tasks: Vec::new(),
            waits: Vec::new(),
            deployments: Vec::new(),
        })
    }

    async fn projects(&self) -> Result<Vec<ProjectRecord>> {
        Ok(self.projects.lock().clone())
    }

    async fn notice(&self, _severity: NoticeSeverity, fingerprint: &str, text: &str) -> Result<()> {
        self.notices
            .lock()
            .push((fingerprint.to_owned(), text.to_owned()));
        Ok(())
    }
}
