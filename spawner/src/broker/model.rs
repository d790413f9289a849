//! The model behind the broker: the worker's request goes on under the crew's own name for it, and
//! what it costs is counted against the job before the worker gets the answer.

use super::ledger::{Question, Refused, Reserved};
use super::{Body, Inner, problem, reach, reply, streamed};
use crate::trouble::kind;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hyper::body::Frame;
use hyper::{Response, StatusCode};
use ports::{
    JobId, ModelError, ProjectId, RequestId, TaskId, Usage, WorkerAnswer, WorkerCall, WorkerTerms,
    threads,
};
use protocol::EventKind;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::io;
use std::sync::Arc;

/// Longest line of a stream that is looked at for its usage, in bytes.
const MAX_LINE: usize = 64 * 1024;

pub(super) async fn complete(inner: &Arc<Inner>, body: Bytes) -> Response<Body> {
    let mut parsed: Value = match serde_json::from_slice(&body) {
        Ok(value) => value,
        Err(error) => {
            let wrong = format!("the body is not JSON: {error}");
            return problem(StatusCode::BAD_REQUEST, "invalid_request_error", &wrong);
        }
    };
    if !parsed["messages"].is_array() {
        let wrong = "`messages` must be a list";
        return problem(StatusCode::BAD_REQUEST, "invalid_request_error", wrong);
    }
    if let Some(wrong) = reach::hold(inner, &mut parsed) {
        return problem(StatusCode::BAD_REQUEST, "invalid_request_error", &wrong);
    }
    let question_hash = hex::encode(Sha256::digest(&body));
    if let Some(answer) = inner.ledger.unread(&question_hash) {
        return reply(StatusCode::OK, &answer);
    }
    let input = estimated_tokens(body.len());
    let question = question(inner, &parsed, input);
    let waiting = inner.events.activity().waiting();
    let reserved = match inner.ledger.reserve(&question).await {
        Ok(reserved) => reserved,
        Err(refused) => {
            let (status, code, message) = no_budget(inner, refused);
            return problem(status, code, &message);
        }
    };
    let shows_usage = parsed["stream_options"]["include_usage"] == json!(true);
    if parsed["stream"] == json!(true) {
        // A worker that does not ask what it costs is counted all the same.
        if !parsed["stream_options"].is_object() {
            parsed["stream_options"] = json!({});
        }
        parsed["stream_options"]["include_usage"] = json!(true);
    }
    let call = call_of(inner, parsed, reserved.most_output);
    let answered = inner.models.complete(call).await;
    match answered {
        Ok((WorkerAnswer::Json(answer), usage)) => {
            let kept = inner
                .ledger
                .answered(usage, Some((question_hash, answer.clone())));
            drop(reserved);
            if let Err(error) = kept {
                return not_counted(inner, &error);
            }
            tell_usage(inner);
            reply(StatusCode::OK, &answer)
        }
        Ok((WorkerAnswer::Stream(events), usage)) => {
            let counted = Counted {
                inner: Arc::clone(inner),
                reserved: Some(reserved),
                events,
                known: usage,
                input,
                shows_usage,
                least_output: 0,
                line: Vec::new(),
                seen: None,
                bytes: 0,
                over: false,
            };
            // The answer counts as waited for until its stream ends.
            let frames = stream::unfold((counted, waiting), |(mut counted, waiting)| async {
                let frame = counted.next().await?;
                Some((frame, (counted, waiting)))
            });
            streamed(frames)
        }
        Err(error) => refused(inner, &error),
    }
}

/// What a question in chat completions may take, in all of its choices.
fn question(inner: &Inner, body: &Value, input: u64) -> Question {
    let choices = body["n"].as_u64().unwrap_or(1).clamp(1, 128);
    let all = |each: u64| each.saturating_mul(choices);
    let asked = ["max_completion_tokens", "max_tokens"]
        .iter()
        .filter_map(|name| body[*name].as_u64())
        .min();
    let terms = inner.models.terms(None);
    Question {
        input,
        most_output: asked.map(all),
        terms: WorkerTerms {
            most_output: terms.most_output.map(all),
            ..terms
        },
    }
}

/// What a worker is told whose question the job's budget does not allow, or not now.
pub(super) fn no_budget(inner: &Inner, refused: Refused) -> (StatusCode, &'static str, String) {
    match refused {
        Refused::Spent(message) => {
            inner.ledger.failed(kind::BUDGET, &message);
            (StatusCode::PAYMENT_REQUIRED, kind::BUDGET, message)
        }
        Refused::Held(message) => (StatusCode::TOO_MANY_REQUESTS, "too_much_at_once", message),
    }
}

/// A worker's question; who asks is known from the socket.
pub(super) fn call_of(inner: &Inner, body: Value, most_output: Option<u64>) -> WorkerCall {
    let project = ProjectId::new(&inner.request.project_id);
    let job = JobId::new(&inner.request.job_id);
    let task = TaskId::new(&inner.request.task_id);
    let thread = threads::task(&project, &job, &task);
    WorkerCall {
        request: RequestId::new(&inner.request.request_id),
        thread: threads::within_project(&thread).to_owned(),
        project,
        job,
        task,
        body,
        most_output,
    }
}

/// The models that a worker can ask for: the one it was given, in the form of OpenAI's list and of Anthropic's.
pub(super) fn list(inner: &Inner) -> Response<Body> {
    let model = inner.request.agent.model.as_deref().unwrap_or("default");
    reply(
        StatusCode::OK,
        &json!({
            "object": "list",
            "data": [{
                "id": model, "object": "model", "created": 0, "owned_by": "artel",
                "type": "model", "display_name": model, "created_at": "1970-01-01T00:00:00Z",
            }],
            "first_id": model, "last_id": model, "has_more": false,
        }),
    )
}

pub(super) fn estimated_tokens(bytes: usize) -> u64 {
    u64::try_from(bytes / 4).unwrap_or(u64::MAX)
}

pub(super) fn tell_usage(inner: &Inner) {
    inner.events.say(EventKind::Usage {
        usage: inner.ledger.usage(),
    });
}

fn not_counted(inner: &Inner, error: &io::Error) -> Response<Body> {
    tracing::error!(request = inner.request.request_id, %error, "tokens could not be counted");
    problem(
        StatusCode::SERVICE_UNAVAILABLE,
        "not_counted",
        &format!("what the answer cost could not be written to disk ({error})"),
    )
}

/// A model error as OpenAI's clients read it.
fn refused(inner: &Inner, error: &ModelError) -> Response<Body> {
    let (status, kind) = meaning(error);
    let message = error.to_string();
    inner.ledger.failed(kind, &message);
    problem(status, kind, &message)
}

/// The status and the kind of a model error. What trying again cannot mend is not a 429 or 5xx.
pub(super) fn meaning(error: &ModelError) -> (StatusCode, &'static str) {
    match error {
        ModelError::Budget { .. } | ModelError::TooLong { .. } => {
            (StatusCode::PAYMENT_REQUIRED, kind::BUDGET)
        }
        ModelError::NotOnTape { .. } => (StatusCode::NOT_FOUND, kind::NOT_ON_TAPE),
        ModelError::NotConfigured | ModelError::NoEndpoint { .. } => {
            (StatusCode::FORBIDDEN, kind::NO_MODEL)
        }
        ModelError::Unavailable {
            status: Some(429), ..
        } => (StatusCode::TOO_MANY_REQUESTS, kind::MODEL_UNAVAILABLE),
        ModelError::Unavailable {
            retryable: false,
            status: Some(status @ 400..=499),
            ..
        } => (
            StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_GATEWAY),
            kind::MODEL_UNAVAILABLE,
        ),
        ModelError::Unavailable { .. } => (StatusCode::BAD_GATEWAY, kind::MODEL_UNAVAILABLE),
        // Disks fill and empty again: worth another try.
        ModelError::Ledger { .. } => (StatusCode::SERVICE_UNAVAILABLE, kind::MODEL_UNAVAILABLE),
    }
}

/// A stream on its way to the worker, read along for what it costs.
struct Counted {
    inner: Arc<Inner>,
    /// What is held of the budget until this is counted.
    reserved: Option<Reserved>,
    events: BoxStream<'static, Result<Bytes, ModelError>>,
    /// What was known before it began.
    known: Usage,
    /// The question's size, for a stream that does not tell its usage.
    input: u64,
    /// Whether the worker asked for the usage and so knows an event without a choice.
    shows_usage: bool,
    /// What it wrote at least, where it was cut for being too long.
    least_output: u64,
    line: Vec<u8>,
    seen: Option<Usage>,
    bytes: usize,
    over: bool,
}

impl Counted {
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, io::Error>> {
        if self.over {
            return None;
        }
        let ended = loop {
            match self.events.next().await {
                Some(Ok(bytes)) => {
                    self.inner.events.activity().touch();
                    if !self.look(&bytes) || self.shows_usage {
                        return Some(Ok(Frame::data(bytes)));
                    }
                }
                Some(Err(error)) => break Some(error),
                None => break None,
            }
        };
        self.over = true;
        if let Some(ModelError::TooLong { limit, .. }) = ended {
            self.least_output = limit;
        }
        self.count();
        let error = ended?;
        let (message, (_, kind)) = (error.to_string(), meaning(&error));
        self.inner.ledger.failed(kind, &message);
        if kind == kind::BUDGET {
            // Asking again does not help, so the client has to see more than a connection that broke.
            let event =
                json!({"error": {"message": message, "type": kind, "code": kind, "param": null}});
            return Some(Ok(Frame::data(format!("data: {event}\n\n").into())));
        }
        Some(Err(io::Error::other(message)))
    }

    /// Finds `usage` in the events that pass. True: these are one event, which tells the usage and nothing else.
    fn look(&mut self, bytes: &[u8]) -> bool {
        let mut only_usage = self.line.is_empty() && bytes.ends_with(b"\n\n");
        self.bytes += bytes.len();
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < MAX_LINE {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            if line.is_empty() {
                continue;
            }
            let data = line.strip_prefix(b"data:").unwrap_or_default();
            let Ok(value) = serde_json::from_slice::<Value>(data) else {
                only_usage = false;
                continue;
            };
            only_usage &=
                value["usage"].is_object() && value["choices"].as_array().is_none_or(Vec::is_empty);
            let usage = &value["usage"];
            if let (Some(input_tokens), Some(output_tokens)) = (
                usage["prompt_tokens"].as_u64(),
                usage["completion_tokens"].as_u64(),
            ) {
                self.seen = Some(Usage {
                    input_tokens,
                    output_tokens,
                    cost_usd: usage["cost"].as_f64(),
                });
            }
        }
        only_usage
    }

    fn count(&mut self) {
        let known = self.known.input_tokens + self.known.output_tokens > 0;
        let mut usage = match self.seen {
            _ if known => self.known,
            Some(seen) => seen,
            // Neither side told: about four bytes a token, and events are mostly their own form.
            None => Usage {
                input_tokens: self.input,
                output_tokens: estimated_tokens(self.bytes) / 8,
                cost_usd: None,
            },
        };
        usage.output_tokens = usage.output_tokens.max(self.least_output);
        if let Err(error) = self.inner.ledger.answered(usage, None) {
            let request = &self.inner.request.request_id;
            tracing::error!(request, %error, "tokens of a stream could not be counted");
        }
        drop(self.reserved.take());
        tell_usage(&self.inner);
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        // The worker went away in the middle: what came so far was paid for.
        if !self.over {
            self.over = true;
            self.count();
        }
    }
}
