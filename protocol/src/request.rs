//! What a coding job is: everything that a spawner must know to run one attempt of one task.

use crate::{DecodeError, VERSION};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// One attempt of one task, to be run by a worker. Version 1.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SpawnRequest {
    /// Version of the message: 1.
    pub version: u32,
    /// Identifies this request; letters, digits, `.`, `_`, `:` and `-`, at most 128.
    pub request_id: String,
    /// The project that the task belongs to.
    pub project_id: String,
    /// The job that the task belongs to.
    pub job_id: String,
    /// The task.
    pub task_id: String,
    /// Which attempt of the task this is, from 1.
    pub attempt: u32,
    /// Grows with every attempt of a task; given by the crew, echoed back, checked by the crew.
    pub fencing_token: u64,
    /// Where the work starts and where it goes.
    pub repository: Repository,
    /// What is to be done.
    pub task: TaskBrief,
    /// Who does it.
    pub agent: Agent,
    /// What it may use up.
    pub limits: Limits,
    /// Whether the worker needs Docker inside.
    #[serde(default)]
    pub docker: bool,
    /// What it may reach.
    #[serde(default)]
    pub network: Network,
    /// Secrets, sealed to the spawner.
    #[serde(default)]
    pub secrets: Vec<SealedSecret>,
    /// W3C `traceparent` of the step that asked for the job.
    #[serde(default)]
    pub trace_context: Option<String>,
    /// When the crew made the request.
    pub created_at: Timestamp,
}

/// The repository of a task: where to clone from, where to start, which branch to leave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Repository {
    /// A local path or a URL.
    #[serde(flatten)]
    pub source: Source,
    /// The commit to start from, in full (40 or 64 hexadecimal digits).
    pub base_sha: String,
    /// The branch that carries the work, without `refs/heads/`.
    pub branch: String,
    /// Whether the task may change what the code host runs by itself (`.github/workflows`).
    #[serde(default)]
    pub workflows: bool,
}

/// Where a repository is: exactly one of the two.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Source {
    /// A bare repository on the spawner's machine.
    Path(String),
    /// A URL for `git clone`.
    CloneUrl(String),
}

/// What is to be done, as the developer reads it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TaskBrief {
    /// One line.
    pub title: String,
    /// The whole description, in Markdown; on a send-back it carries the review's comments.
    pub body_markdown: String,
    /// What must hold for the task to be done.
    #[serde(default)]
    pub acceptance: Vec<String>,
}

/// The program that does the work.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Agent {
    /// Name of the adapter: `artel-agent`, `command`, …
    pub adapter: String,
    /// Argument vector for the adapter `command`; empty otherwise.
    #[serde(default)]
    pub command: Vec<String>,
    /// Model to ask for; none means the role's default.
    #[serde(default)]
    pub model: Option<String>,
}

/// What one attempt may use up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Limits {
    /// Wall clock, in seconds.
    pub wall_s: u64,
    /// Longest time without a sign of life (progress, output, model call), in seconds.
    pub idle_s: u64,
    /// Processors, as a number of cores.
    pub cpu: f64,
    /// Memory, in MiB.
    pub memory_mb: u64,
    /// Processes and threads.
    pub pids: u64,
    /// Disk, in MiB.
    pub disk_mb: u64,
    /// Tokens, input and output together; none means that only the project's budget counts.
    #[serde(default)]
    pub tokens: Option<u64>,
    /// Money, in US dollars; none means that only the project's budget counts.
    #[serde(default)]
    pub cost_usd: Option<f64>,
}

impl Default for Limits {
    /// What a task of ordinary size needs: half an hour, 2 GiB, 2 cores.
    fn default() -> Self {
        Self {
            wall_s: 1800,
            idle_s: 600,
            cpu: 2.0,
            memory_mb: 2048,
            pids: 256,
            disk_mb: 2048,
            tokens: None,
            cost_usd: None,
        }
    }
}

/// Hosts that a worker may reach through the broker's proxy; nothing else is reachable.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Network {
    /// `host:port` or `*.host:port`.
    #[serde(default)]
    pub allow: Vec<String>,
}

/// A secret that only the spawner can open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct SealedSecret {
    /// Name of the environment variable.
    pub name: String,
    /// The handle it was resolved from, `secret://project/{id}/{name}`.
    pub handle: String,
    /// The value, age-encrypted to the spawner's recipient, armored.
    pub sealed: String,
}

impl SpawnRequest {
    /// Checks what the types cannot say: version, identifiers, commit, branch, limits.
    pub fn validate(&self) -> Result<(), DecodeError> {
        if self.version != VERSION {
            return Err(DecodeError::Version {
                found: self.version.into(),
                supported: VERSION,
            });
        }
        check_request_id(&self.request_id)?;
        for (field, value) in [
            ("project_id", &self.project_id),
            ("job_id", &self.job_id),
            ("task_id", &self.task_id),
        ] {
            if value.is_empty() || value.len() > 256 || value.chars().any(char::is_control) {
                return Err(DecodeError::invalid(
                    field,
                    "must have 1 to 256 bytes and no control characters",
                ));
            }
        }
        if self.attempt == 0 {
            return Err(DecodeError::invalid("attempt", "counts from 1"));
        }
        let sha = &self.repository.base_sha;
        if !matches!(sha.len(), 40 | 64) || !sha.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(DecodeError::invalid(
                "repository.base_sha",
                "must be a full commit id of 40 or 64 hexadecimal digits",
            ));
        }
        if !is_branch_name(&self.repository.branch) {
            return Err(DecodeError::invalid(
                "repository.branch",
                "is not a valid Git branch name",
            ));
        }
        if self.agent.adapter.is_empty() {
            return Err(DecodeError::invalid("agent.adapter", "is empty"));
        }
        if self.agent.adapter == "command" && self.agent.command.is_empty() {
            return Err(DecodeError::invalid(
                "agent.command",
                "the adapter `command` needs an argument vector",
            ));
        }
        let limits = &self.limits;
        for (field, value) in [
            ("limits.wall_s", limits.wall_s),
            ("limits.idle_s", limits.idle_s),
            ("limits.memory_mb", limits.memory_mb),
            ("limits.pids", limits.pids),
            ("limits.disk_mb", limits.disk_mb),
        ] {
            if value == 0 {
                return Err(DecodeError::invalid(field, "must be greater than 0"));
            }
        }
        if !limits.cpu.is_finite() || limits.cpu <= 0.0 {
            return Err(DecodeError::invalid("limits.cpu", "must be greater than 0"));
        }
        Ok(())
    }
}

/// Refuses request ids that could not be a file name or a part of a key.
pub(crate) fn check_request_id(id: &str) -> Result<(), DecodeError> {
    let fits = (1..=128).contains(&id.len())
        && !id.starts_with('.')
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b':' | b'-'));
    if fits {
        Ok(())
    } else {
        Err(DecodeError::invalid(
            "request_id",
            "must have 1 to 128 letters, digits, `.`, `_`, `:` or `-`, and not start with `.`",
        ))
    }
}

/// Whether `name` may be a branch: the rules of `git check-ref-format --branch`, a little stricter.
fn is_branch_name(name: &str) -> bool {
    (1..=200).contains(&name.len())
        && !name.starts_with(['-', '/', '.'])
        && !name.ends_with(['/', '.'])
        && !name.contains("..")
        && !name.contains("//")
        && !name.contains("@{")
        && !name.contains("/.")
        && name != "@"
        && name != "HEAD"
        && name.split('/').all(|part| {
            !std::path::Path::new(part)
                .extension()
                .is_some_and(|e| e.eq_ignore_ascii_case("lock"))
        })
        && name.chars().all(|c| {
            !c.is_control()
                && !c.is_whitespace()
                && !matches!(c, '~' | '^' | ':' | '?' | '*' | '[' | '\\')
        })
}
