//! The model behind the broker: the worker's request goes on under the crew's own name for it, and
//! what it costs is counted against the job before the worker gets the answer.

use super::ledger::Reserved;
use super::{Body, Inner, problem, reach, reply, streamed};
use crate::trouble::kind;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hyper::body::Frame;
use hyper::{Response, StatusCode};
use ports::{
    JobId, ModelError, ProjectId, RequestId, TaskId, Usage, WorkerAnswer, WorkerCall, threads,
};
use protocol::EventKind;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::io;
use std::sync::Arc;

/// Output tokens that are reserved when a request does not bound them.
pub(super) const EXPECTED_OUTPUT: u64 = 1024;
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
    let expected = parsed["max_completion_tokens"]
        .as_u64()
        .or(parsed["max_tokens"].as_u64())
        .map_or(EXPECTED_OUTPUT, |most| most.min(EXPECTED_OUTPUT));
    let input = estimated_tokens(body.len());
    let reserved = match inner.ledger.reserve(input + expected) {
        Ok(reserved) => reserved,
        Err(spent) => {
            inner.ledger.failed(kind::BUDGET, &spent.message);
            return problem(StatusCode::PAYMENT_REQUIRED, "budget", &spent.message);
        }
    };
    let call = call_of(inner, parsed);
    let waiting = inner.events.activity().waiting();
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

/// A worker's question; who asks is known from the socket.
pub(super) fn call_of(inner: &Inner, body: Value) -> WorkerCall {
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
        ModelError::Budget { .. } => (StatusCode::PAYMENT_REQUIRED, kind::BUDGET),
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
        match self.events.next().await {
            Some(Ok(bytes)) => {
                self.inner.events.activity().touch();
                self.look(&bytes);
                Some(Ok(Frame::data(bytes)))
            }
            Some(Err(error)) => {
                self.over = true;
                let message = error.to_string();
                let kind = match error {
                    ModelError::Budget { .. } => kind::BUDGET,
                    ModelError::NotOnTape { .. } => kind::NOT_ON_TAPE,
                    _ => kind::MODEL_UNAVAILABLE,
                };
                self.count();
                self.inner.ledger.failed(kind, &message);
                Some(Err(io::Error::other(message)))
            }
            None => {
                self.over = true;
                self.count();
                None
            }
        }
    }

    /// Finds `usage` in the events that pass.
    fn look(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len();
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < MAX_LINE {
                    self.line.push(*byte);
                }
                continue;
            }
            let line = std::mem::take(&mut self.line);
            let data = line.strip_prefix(b"data:").unwrap_or_default();
            let Ok(value) = serde_json::from_slice::<Value>(data) else {
                continue;
            };
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
    }

    fn count(&mut self) {
        let known = self.known.input_tokens + self.known.output_tokens > 0;
        let usage = match self.seen {
            _ if known => self.known,
            Some(seen) => seen,
            // Neither side told: about four bytes a token, and events are mostly their own form.
            None => Usage {
                input_tokens: self.input,
                output_tokens: estimated_tokens(self.bytes) / 8,
                cost_usd: None,
            },
        };
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
