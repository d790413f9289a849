//! Everything outside of the crew, in memory: scripted models, workers, errands, and the rest. Each effect is written down
//! under its idempotency key, so that a test can see whether something was done twice.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use async_trait::async_trait;
use nodes::{Crew, Policy};
use parking_lot::Mutex;
use ports::{
    Allocations, CheckResult, CheckStatus, ChecksReport, Deployment, DeploymentStatus, Errand,
    ErrandOutcome, ErrandWork, Errands, Failure, Ledger, ModelAnswer, ModelCall, ModelError,
    Models, ProjectId, Record, RequestId, Result, Role, SecretHandle, Slug, Spend, Spent,
    StatusReport, Usage, Vault, Workers,
};
use protocol::{ResultStatus, SpawnRequest, WorkerResult};
use serde_json::Value;

use crate::forge::MemoryForge;

/// What a worker does with a task.
#[derive(Clone)]
pub enum Work {
    /// Commits these files and succeeds.
    Commit(Vec<(&'static str, &'static str)>),
    /// Says that it succeeded, having changed nothing.
    Nothing,
    /// Says that it succeeded with a commit that is nowhere.
    Invented,
    /// Fails with this kind and message.
    Fails(&'static str, &'static str),
    /// Says nothing until it is told to.
    Held(Box<Work>),
}

/// What has still to be delivered to a thread.
#[derive(Clone)]
pub struct Due {
    pub thread: String,
    pub kind: String,
    pub key: String,
    pub payload: Value,
}

#[derive(Default)]
pub struct State {
    pub answers: BTreeMap<(Role, String, u32), String>,
    pub asked: Vec<ModelCall>,
    pub tape: Option<String>,
    pub out_of_money: bool,
    pub works: BTreeMap<String, Vec<Work>>,
    pub requests: BTreeMap<String, SpawnRequest>,
    pub submits: u32,
    pub cancelled_workers: BTreeSet<String>,
    pub held: BTreeMap<String, Due>,
    pub failing_checks: BTreeMap<String, u32>,
    pub deploys: Vec<Deploy>,
    pub errands: BTreeMap<String, Errand>,
    pub cancelled_errands: BTreeSet<String>,
    pub hold_checks: bool,
    pub due: Vec<Due>,
    pub secrets: BTreeSet<String>,
    pub secret_value: Option<String>,
    pub ports: Vec<u16>,
    pub port_panics: bool,
    pub report: Option<StatusReport>,
    pub spent: Spent,
}

/// What a scripted model writes.
pub struct Script(String);

impl From<Value> for Script {
    fn from(value: Value) -> Self {
        Self(value.to_string())
    }
}

impl From<&Value> for Script {
    fn from(value: &Value) -> Self {
        Self(value.to_string())
    }
}

impl From<String> for Script {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Script {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

/// How a deploy goes.
#[derive(Clone, Copy)]
pub enum Deploy {
    Live,
    RolledBack,
    Fails(&'static str),
}

/// See the module.
#[derive(Clone, Default)]
pub struct World {
    pub state: Arc<Mutex<State>>,
    pub forge: Arc<MemoryForge>,
}

impl World {
    pub fn crew(&self, policy: Policy) -> Crew {
        let it = Arc::new(self.clone());
        Crew {
            models: it.clone(),
            forge: self.forge.clone(),
            workers: it.clone(),
            vault: it.clone(),
            allocations: it.clone(),
            errands: it.clone(),
            record: it.clone(),
            ledger: it,
            policy,
            traceparent: Arc::new(|| None),
        }
    }

    /// Scripts a model's answer.
    pub fn answer(&self, role: Role, thread: &str, turn: u32, answer: impl Into<Script>) -> &Self {
        self.state
            .lock()
            .answers
            .insert((role, thread.to_owned(), turn), answer.into().0);
        self
    }

    /// Scripts what the workers of a task do, attempt by attempt; the last one goes on for ever.
    pub fn works(&self, thread: &str, works: &[Work]) -> &Self {
        self.state
            .lock()
            .works
            .insert(thread.to_owned(), works.to_vec());
        self
    }

    /// Lets a held worker end.
    pub fn release(&self, thread: &str) {
        let mut state = self.state.lock();
        let keys: Vec<String> = state
            .held
            .keys()
            .filter(|id| {
                id.rsplit_once('.')
                    .is_some_and(|(name, _)| name.ends_with(&thread.replace('/', ".")))
            })
            .cloned()
            .collect();
        assert!(!keys.is_empty(), "no worker of {thread} is held");
        for key in keys {
            let due = state.held.remove(&key).expect("held");
            state.due.push(due);
        }
    }

    pub fn held(&self, thread: &str) -> bool {
        let name = thread.replace('/', ".");
        self.state.lock().held.keys().any(|id| {
            id.rsplit_once('.')
                .is_some_and(|(found, _)| found.ends_with(&name))
        })
    }

    /// The keys of all questions to models: a question that was asked twice under one key counts once.
    pub fn questions(&self) -> BTreeSet<String> {
        self.state
            .lock()
            .asked
            .iter()
            .map(|call| call.key.clone())
            .collect()
    }

    /// The prompts of a role, as one text each.
    pub fn prompts(&self, role: Role) -> Vec<String> {
        self.state
            .lock()
            .asked
            .iter()
            .filter(|call| call.role == role)
            .map(|call| {
                call.messages
                    .iter()
                    .map(|message| message.text.as_str())
                    .collect::<Vec<_>>()
                    .join("\n")
            })
            .collect()
    }
}

#[async_trait]
impl Models for World {
    async fn ask(&self, call: &ModelCall) -> std::result::Result<ModelAnswer, ModelError> {
        let mut state = self.state.lock();
        if state.out_of_money && state.spent.limit_tokens.is_none() {
            return Err(ModelError::Budget {
                project: call.project.clone(),
                spent: "100 tokens".into(),
                limit: "100 tokens".into(),
            });
        }
        state.asked.push(call.clone());
        let key = (call.role, call.thread.clone(), call.turn);
        let Some(text) = state.answers.get(&key).cloned() else {
            return Err(ModelError::NotOnTape {
                tape: "test".into(),
                role: call.role,
                thread: call.thread.clone(),
                turn: call.turn,
                hint: "script it".into(),
            });
        };
        Ok(ModelAnswer {
            text,
            model: "scripted".into(),
            usage: Usage::default(),
            from_tape: true,
        })
    }

    fn tape(&self) -> Option<String> {
        self.state.lock().tape.clone()
    }
}

#[async_trait]
impl Workers for World {
    async fn submit(&self, request: &SpawnRequest) -> Result<()> {
        request
            .validate()
            .map_err(|error| Failure::new("bad_request", error.to_string()))?;
        let mut state = self.state.lock();
        state.submits += 1;
        let id = request.request_id.clone();
        if state.requests.contains_key(&id) {
            return Ok(());
        }
        state.requests.insert(id.clone(), request.clone());
        let reply_to = nodes::thread_of_request(&RequestId::new(id.clone())).expect("a thread");
        let thread = ports::threads::within_project(&reply_to).to_owned();
        let attempt = request.attempt as usize;
        let script = state.works.get(&thread).cloned().unwrap_or_default();
        let work = script
            .get(attempt - 1)
            .or(script.last())
            .cloned()
            .unwrap_or(Work::Commit(vec![]));
        let (work, hold) = match work {
            Work::Held(work) => (*work, true),
            work => (work, false),
        };
        let mut result = WorkerResult::of(request, ResultStatus::Succeeded, request.created_at);
        result.finished_at = request.created_at;
        result.summary_markdown = format!("did {}", request.task_id);
        result.usage.input_tokens = 10;
        match work {
            Work::Commit(files) => {
                let files: Vec<(String, String)> = if files.is_empty() {
                    vec![(format!("{}.py", request.task_id), format!("# {attempt}"))]
                } else {
                    files
                        .iter()
                        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
                        .collect()
                };
                let head = self.forge.push(
                    &request.repository.branch,
                    &request.repository.base_sha,
                    &files,
                );
                result.head_sha = Some(head.to_string());
            }
            Work::Nothing => result.head_sha = Some(request.repository.base_sha.clone()),
            Work::Invented => result.head_sha = Some("f".repeat(40)),
            Work::Fails(kind, message) => {
                result.status = ResultStatus::Failed;
                result.failure = Some(protocol::Failure {
                    kind: kind.to_owned(),
                    message: message.to_owned(),
                    evidence: "the end of the log".to_owned(),
                });
            }
            Work::Held(_) => unreachable!("unpacked"),
        }
        let due = Due {
            thread: reply_to,
            kind: ports::RESULT_SIGNAL.to_owned(),
            key: format!("worker:{id}"),
            payload: serde_json::to_value(&result).expect("plain data"),
        };
        if hold {
            state.held.insert(id, due);
        } else {
            state.due.push(due);
        }
        Ok(())
    }

    async fn cancel(&self, request: &RequestId) -> Result<()> {
        let mut state = self.state.lock();
        state.held.remove(request.as_str());
        state.cancelled_workers.insert(request.to_string());
        Ok(())
    }
}

#[async_trait]
impl Errands for World {
    async fn hand_over(&self, errand: &Errand) -> Result<()> {
        let mut state = self.state.lock();
        if state.errands.contains_key(&errand.key) {
            return Ok(());
        }
        state.errands.insert(errand.key.clone(), errand.clone());
        let outcome = match &errand.work {
            ErrandWork::Checks { sha, .. } => {
                if state.hold_checks {
                    return Ok(());
                }
                let left = state
                    .failing_checks
                    .entry(errand.reply_to.clone())
                    .or_default();
                let fails = *left > 0;
                *left = left.saturating_sub(1);
                let status = if fails {
                    CheckStatus::Failed
                } else {
                    CheckStatus::Passed
                };
                ErrandOutcome::Checks(ChecksReport {
                    sha: sha.clone(),
                    status,
                    checks: vec![CheckResult {
                        name: "checks".into(),
                        status,
                        detail: if fails {
                            "AssertionError: 1 != 2".into()
                        } else {
                            String::new()
                        },
                    }],
                })
            }
            ErrandWork::Deploy(request) => {
                let deploys = state
                    .errands
                    .values()
                    .filter(|errand| matches!(errand.work, ErrandWork::Deploy(_)))
                    .count();
                let how = state
                    .deploys
                    .get(deploys - 1)
                    .copied()
                    .unwrap_or(Deploy::Live);
                let deployment = |status, check| {
                    ErrandOutcome::Deploy(Deployment {
                        release: deploys as u64,
                        sha: request.sha.clone(),
                        status,
                        url: format!("http://127.0.0.1:{}/", request.port),
                        checks: vec![CheckResult {
                            name: "it is healthy".into(),
                            status: check,
                            detail: "expected status 200, got 500".into(),
                        }],
                        live_release: None,
                    })
                };
                match how {
                    Deploy::Live => deployment(DeploymentStatus::Live, CheckStatus::Passed),
                    Deploy::RolledBack => deployment(DeploymentStatus::Failed, CheckStatus::Failed),
                    Deploy::Fails(kind) => ErrandOutcome::Failed(Failure::new(
                        kind,
                        format!("the deploy failed: {kind}"),
                    )),
                }
            }
        };
        state.due.push(Due {
            thread: errand.reply_to.clone(),
            kind: ErrandOutcome::SIGNAL.to_owned(),
            key: errand.key.clone(),
            payload: serde_json::to_value(&outcome).expect("plain data"),
        });
        Ok(())
    }

    async fn cancel(&self, key: &str) -> Result<()> {
        self.state.lock().cancelled_errands.insert(key.to_owned());
        Ok(())
    }
}

#[async_trait]
impl Vault for World {
    async fn names(&self, _: &ProjectId) -> Result<Vec<String>> {
        Ok(self.state.lock().secrets.iter().cloned().collect())
    }

    async fn grant(&self, project: &ProjectId, name: &str) -> Result<SecretHandle> {
        if !self.state.lock().secrets.contains(name) {
            return Err(Failure::new("secret_missing", format!("{name} is missing")));
        }
        Ok(SecretHandle {
            project: project.clone(),
            name: name.to_owned(),
        })
    }

    fn redact(&self, text: &str) -> String {
        match &self.state.lock().secret_value {
            Some(value) => text.replace(value.as_str(), "secret://x"),
            None => text.to_owned(),
        }
    }
}

#[async_trait]
impl Allocations for World {
    async fn port(&self, _: &ProjectId, avoid: Option<u16>) -> Result<u16> {
        let mut state = self.state.lock();
        assert!(!state.port_panics, "a defect");
        match state.ports.last().copied() {
            Some(port) if Some(port) != avoid => Ok(port),
            last => {
                let port = last.unwrap_or(8000) + 1;
                state.ports.push(port);
                Ok(port)
            }
        }
    }

    async fn release(&self, _: &ProjectId) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Record for World {
    async fn status(&self, _: &ProjectId) -> Result<Option<StatusReport>> {
        Ok(self.state.lock().report.clone())
    }

    async fn free_slug(&self, _: &ProjectId, wanted: &Slug) -> Result<Slug> {
        Ok(wanted.clone())
    }
}

#[async_trait]
impl Ledger for World {
    async fn spent(&self, _: &ProjectId) -> Result<Spent> {
        Ok(self.state.lock().spent)
    }

    async fn record(&self, _: &Spend) -> Result<()> {
        Ok(())
    }
}
