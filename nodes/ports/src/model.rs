//! Language models: what is asked, what is answered, what it cost.

use std::fmt;

use async_trait::async_trait;
use bytes::Bytes;
use futures::stream::BoxStream;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{Actor, Failure, JobId, ProjectId, RequestId, TaskId};

/// Who in the crew asks. Each role has its own model, temperature and limits in the configuration.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Talks with people.
    Brainstorm,
    /// Splits the work.
    Architect,
    /// Writes code, in a worker.
    Developer,
    /// Reads diffs.
    Reviewer,
}

impl Role {
    /// The name in the configuration, in tapes and in the ledger.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Brainstorm => "brainstorm",
            Self::Architect => "architect",
            Self::Developer => "developer",
            Self::Reviewer => "reviewer",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who said a message of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Speaker {
    /// The crew's instructions.
    System,
    /// The task at hand, with everything from outside marked as data.
    User,
    /// What the model said earlier.
    Assistant,
}

/// One message of a prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who said it.
    pub speaker: Speaker,
    /// What was said.
    pub text: String,
}

/// A JSON Schema that the answer must follow.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Schema {
    /// The type's name, such as `Plan`.
    pub name: String,
    /// The schema.
    pub schema: Value,
}

/// One question to a model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelCall {
    /// Who asks.
    pub role: Role,
    /// For which project the tokens are spent.
    pub project: ProjectId,
    /// For which job.
    pub job: Option<JobId>,
    /// For which task.
    pub task: Option<TaskId>,
    /// The thread's name within the project, as `threads::within_project` gives it; part of a tape's key.
    pub thread: String,
    /// How many turns this role has taken in this thread, from 0; part of a tape's key. A turn that only answered a
    /// question does not count, so that small talk does not shift what comes after it.
    pub turn: u32,
    /// Unique for this question and the same on every try: what the ledger counts it under.
    pub key: String,
    /// The prompt.
    pub messages: Vec<Message>,
    /// The form of the answer, if it is not free text.
    pub schema: Option<Schema>,
}

/// Tokens and money.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens read.
    pub input_tokens: u64,
    /// Tokens written.
    pub output_tokens: u64,
    /// US dollars; `None` when no price is known.
    pub cost_usd: Option<f64>,
}

/// What a model answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelAnswer {
    /// The text; JSON when a schema was asked for and the model kept to it, which the caller checks.
    pub text: String,
    /// The model that answered.
    pub model: String,
    /// What it took.
    pub usage: Usage,
    /// Whether it came from a tape.
    #[serde(default)]
    pub from_tape: bool,
}

/// Why a model gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// Asking would pass the project's budget; nothing was sent.
    #[error(
        "the budget of project {project} does not allow this: {spent} of {limit} spent; raise the budget to go on"
    )]
    Budget {
        /// The project.
        project: ProjectId,
        /// What is spent and reserved, with its unit, such as `1.20 USD`.
        spent: String,
        /// The limit, with its unit.
        limit: String,
    },
    /// The tape has nothing under this key.
    #[error("the tape {tape} has no answer for role {role}, thread {thread}, turn {turn}: {hint}")]
    NotOnTape {
        /// The tape's name or file.
        tape: String,
        /// The role that asked.
        role: Role,
        /// The thread within the project.
        thread: String,
        /// The turn.
        turn: u32,
        /// What to do.
        hint: String,
    },
    /// No endpoint that speaks a worker's wire format is configured.
    #[error(
        "the agent speaks {format}, and no endpoint for that is configured: {advice}, or choose another agent with ARTEL_AGENT"
    )]
    NoEndpoint {
        /// The format, as a person calls it.
        format: &'static str,
        /// What to configure.
        advice: String,
    },
    /// A streamed answer went on beyond what was set aside for it; it was cut off, and what came is paid.
    #[error(
        "the model endpoint {endpoint} pays no heed to the limit of {limit} tokens that it was given, which is what the budget has for this answer; the answer was cut off"
    )]
    TooLong {
        /// The endpoint's address, without credentials.
        endpoint: String,
        /// What was set aside, in output tokens.
        limit: u64,
    },
    /// No model is configured.
    #[error(
        "no model is configured: set OPENAI_BASE_URL, OPENAI_API_KEY and ARTEL_MODEL, or run `artel init`"
    )]
    NotConfigured,
    /// Every try and every fallback failed.
    #[error("the model endpoint {endpoint} gave no answer: {message}")]
    Unavailable {
        /// The endpoint's address, without credentials.
        endpoint: String,
        /// What happened last.
        message: String,
        /// The HTTP status, if there was one.
        status: Option<u16>,
        /// Whether waiting may help.
        retryable: bool,
    },
    /// The ledger could not be read or written: without it nothing is spent.
    #[error("what the project spends cannot be counted: {source}")]
    Ledger {
        /// What the ledger said.
        source: Failure,
    },
}

impl ModelError {
    /// The same as a failure that can be shown and stored.
    pub fn to_failure(&self) -> Failure {
        let failure = |kind: &str| Failure::new(kind, self.to_string());
        match self {
            Self::Budget { .. } => failure("budget").actor(Actor::Owner),
            Self::TooLong { .. } => failure("budget").actor(Actor::Admin),
            Self::NotOnTape { .. } => failure("not_on_tape").actor(Actor::Admin),
            Self::NotConfigured | Self::NoEndpoint { .. } => {
                failure("no_model").actor(Actor::Admin)
            }
            Self::Ledger { source } => Failure {
                message: self.to_string(),
                ..source.clone()
            },
            Self::Unavailable { retryable, .. } => {
                let failure = failure("model_unavailable").actor(Actor::Admin);
                if *retryable {
                    failure.retryable()
                } else {
                    failure
                }
            }
        }
    }
}

/// Models for the crew itself.
#[async_trait]
pub trait Models: Send + Sync {
    /// Asks, with retries and fallbacks, within the project's budget. What was spent is in the ledger when this returns.
    async fn ask(&self, call: &ModelCall) -> Result<ModelAnswer, ModelError>;

    /// The name of the tape that answers instead of a model, if one does: whoever speaks of the run says so.
    fn tape(&self) -> Option<String>;
}

/// A worker's request to a model, as the broker received it.
#[derive(Clone, Debug)]
pub struct WorkerCall {
    /// The worker's request: its key in the ledger.
    pub request: RequestId,
    /// The project that pays.
    pub project: ProjectId,
    /// Its job.
    pub job: JobId,
    /// Its task.
    pub task: TaskId,
    /// The thread's name within the project; part of a tape's key. The turn is the number of assistant messages in `body`.
    pub thread: String,
    /// The body of `POST /v1/chat/completions`. Its `model` may be replaced by the role's.
    pub body: Value,
    /// The most tokens that the job's budget has for the answer, all choices together; `None`: it sets no bound. Not a part
    /// of the body, so that the same question is the same on a tape whatever is left of a budget.
    pub most_output: Option<u64>,
}

/// On what terms a worker's question is answered: what a broker has to know beforehand to hold a job to its budget.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WorkerTerms {
    /// The most tokens of one answer, where the configuration has a limit.
    pub most_output: Option<u64>,
    /// US dollars for a token read, at the dearest of the models that may answer; zero where no price is known.
    pub input_token_usd: f64,
    /// US dollars for a token written, at the dearest of the models that may answer; zero where no price is known.
    pub output_token_usd: f64,
}

/// Fewer output tokens than this are no answer that anybody could use.
pub const LEAST_OUTPUT: u64 = 1024;
/// So many output tokens an answer may have even if they are more than half of what is left.
const SHARED_OUTPUT: u64 = 4096;

/// The output tokens of an answer that wants so many, where a budget has room for so many. More than half of what is left goes to
/// one answer only where the half is small: an agent that asks again sends all of this once more, and others may ask beside it.
pub fn fair_output(want: u64, room: u64) -> u64 {
    want.min(room).min((room / 2).max(SHARED_OUTPUT))
}

/// The answer to a worker, in the wire format of OpenAI's chat completions.
pub enum WorkerAnswer {
    /// The whole body.
    Json(Value),
    /// Server-sent events, as the request's `stream: true` asked for. What it cost is counted when the stream ends.
    Stream(BoxStream<'static, Result<Bytes, ModelError>>),
}

/// A wire format of workers' clients beside OpenAI's chat completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WireFormat {
    /// Anthropic's Messages.
    Messages,
    /// Anthropic's count of the tokens of a message that is not sent.
    CountTokens,
    /// OpenAI's Responses.
    Responses,
}

impl WireFormat {
    /// What a person calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Messages | Self::CountTokens => "Anthropic's Messages",
            Self::Responses => "OpenAI's Responses",
        }
    }

    /// What to configure so that there is an endpoint for it.
    pub fn advice(self) -> &'static str {
        match self {
            Self::Messages | Self::CountTokens => {
                "set ANTHROPIC_API_KEY (and ANTHROPIC_BASE_URL for an endpoint of your own, ANTHROPIC_MODEL for its model)"
            }
            Self::Responses => {
                "set OPENAI_BASE_URL, OPENAI_API_KEY and ARTEL_MODEL for an endpoint that has /v1/responses"
            }
        }
    }
}

/// A worker's request in another wire format, as the broker received it.
#[derive(Clone, Debug)]
pub struct WireCall {
    /// Who asks, with the body in that format.
    pub call: WorkerCall,
    /// The format.
    pub format: WireFormat,
    /// Headers that belong to the format, such as `anthropic-version`; never credentials.
    pub headers: Vec<(String, String)>,
    /// Whether the client asked at the address with `?beta=true`.
    pub beta: bool,
}

/// The answer to a [`WireCall`], in its format.
pub enum WireAnswer {
    /// The whole body.
    Json(Value),
    /// The events, as the request's `stream: true` asked for. An error is the last piece.
    Stream(BoxStream<'static, Result<WirePiece, WireError>>),
}

/// A piece of a streamed answer.
#[derive(Clone, Debug, PartialEq)]
pub enum WirePiece {
    /// Whole events, for the worker.
    Events(Bytes),
    /// What the answer took so far, for the broker; it replaces what was said before.
    Used(Usage),
}

/// Why a [`WireCall`] has no answer, or its stream no end.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct WireError {
    /// Why.
    #[source]
    pub error: ModelError,
    /// The endpoint's own error in the format of the call, when it is for the worker to read: a prompt that is too long, say.
    pub body: Option<Value>,
    /// How many seconds the endpoint asked to wait.
    pub retry_after_s: Option<u64>,
}

impl From<ModelError> for WireError {
    fn from(error: ModelError) -> Self {
        Self {
            error,
            body: None,
            retry_after_s: None,
        }
    }
}

/// Models for workers, behind the broker.
#[async_trait]
pub trait WorkerModels: Send + Sync {
    /// Passes the request on, metered and within the project's budget. `Json` answers come with their usage, so that the
    /// broker can hold the job to its own limit as well.
    async fn complete(&self, call: WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError>;

    /// The terms of questions in another format, or of chat completions (`None`). Whoever costs nothing has none.
    fn terms(&self, _format: Option<WireFormat>) -> WorkerTerms {
        WorkerTerms::default()
    }

    /// The same for a client that speaks another wire format; the request goes to an endpoint of that format and is not
    /// translated. Whoever has none, a tape for one, refuses.
    async fn native(&self, call: WireCall) -> Result<(WireAnswer, Usage), WireError> {
        Err(ModelError::NoEndpoint {
            format: call.format.name(),
            advice: call.format.advice().to_owned(),
        }
        .into())
    }
}

/// One line of the ledger.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spend {
    /// Unique: the same spending is counted once.
    pub id: String,
    /// Who pays.
    pub project: ProjectId,
    /// For which job.
    pub job: Option<JobId>,
    /// For which task.
    pub task: Option<TaskId>,
    /// Which role asked.
    pub role: Role,
    /// Which model answered.
    pub model: String,
    /// What it took.
    pub usage: Usage,
}

/// What a project has spent, and what it may.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// US dollars, where prices are known.
    pub cost_usd: f64,
    /// Tokens read and written.
    pub tokens: u64,
    /// Limit in US dollars, as raised by its owner; `None`: the configuration's.
    pub limit_usd: Option<f64>,
    /// Limit in tokens, as raised by its owner; `None`: the configuration's.
    pub limit_tokens: Option<u64>,
}

/// The ledger of what was spent; durable at once, because money stays spent when a task fails.
#[async_trait]
pub trait Ledger: Send + Sync {
    /// What a project has spent so far.
    async fn spent(&self, project: &ProjectId) -> crate::Result<Spent>;

    /// Writes one line; the same id twice is one line.
    async fn record(&self, spend: &Spend) -> crate::Result<()>;
}
