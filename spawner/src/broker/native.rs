//! The model for agents that speak Anthropic's Messages or OpenAI's Responses: their requests go on as they are, under the
//! crew's own name for the model, and what they cost is counted against the job. Errors have the form that their clients read.

use super::ledger::{Question, Reserved};
use super::model::{call_of, estimated_tokens, meaning, no_budget, tell_usage};
use super::{Body, Inner, problem, reach, reply, streamed};
use crate::trouble::kind;
use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use hyper::body::Frame;
use hyper::header::{HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use ports::{ModelError, Usage, WireAnswer, WireCall, WireError, WireFormat, WirePiece};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::io;
use std::sync::Arc;

/// Headers that belong to a format and go on; everything else of the worker's stays here.
const KEPT_HEADERS: [&str; 4] = [
    "anthropic-version",
    "anthropic-beta",
    "openai-beta",
    // Codex says with it in which form its tools come; without it they would not be found.
    "x-openai-internal-codex-responses-lite",
];
/// What Anthropic's endpoint is told when the client does not say it.
const ANTHROPIC_VERSION: &str = "2023-06-01";

/// The headers of a request that go on.
pub(super) fn kept(headers: &HeaderMap) -> Vec<(String, String)> {
    KEPT_HEADERS
        .iter()
        .filter_map(|name| {
            let value = headers.get(*name)?.to_str().ok()?;
            (value.len() <= 1024).then(|| ((*name).to_owned(), value.to_owned()))
        })
        .collect()
}

pub(super) async fn pass(
    inner: &Arc<Inner>,
    format: WireFormat,
    mut headers: Vec<(String, String)>,
    beta: bool,
    body: &Bytes,
) -> Response<Body> {
    let invalid = |message: &str| {
        refusal(
            format,
            StatusCode::BAD_REQUEST,
            "invalid_request_error",
            message,
        )
    };
    let mut parsed: Value = match serde_json::from_slice(body) {
        Ok(value) => value,
        Err(error) => return invalid(&format!("the body is not JSON: {error}")),
    };
    let content = match format {
        WireFormat::Responses => "input",
        WireFormat::Messages | WireFormat::CountTokens => "messages",
    };
    let is_text = content == "input" && parsed[content].is_string();
    if !is_text && !parsed[content].is_array() {
        return invalid(&format!("`{content}` must be a list"));
    }
    if let Some(wrong) = reach::hold(inner, &mut parsed) {
        return invalid(&wrong);
    }
    // The same words in two formats are two questions.
    let mut hash = Sha256::new();
    hash.update(format!("{format:?}\n"));
    hash.update(body);
    let question_hash = hex::encode(hash.finalize());
    if let Some(answer) = inner.ledger.unread(&question_hash) {
        return reply(StatusCode::OK, &answer);
    }
    let limit = match format {
        WireFormat::Responses => &parsed["max_output_tokens"],
        WireFormat::Messages | WireFormat::CountTokens => &parsed["max_tokens"],
    };
    let input = estimated_tokens(body.len());
    let question = Question {
        input,
        most_output: limit.as_u64(),
        terms: inner.models.terms(Some(format)),
    };
    let waiting = inner.events.activity().waiting();
    // Counting costs nothing.
    let reserved = if format == WireFormat::CountTokens {
        None
    } else {
        match inner.ledger.reserve(&question).await {
            Ok(reserved) => Some(reserved),
            Err(refused) => {
                let (status, code, message) = no_budget(inner, refused);
                return refusal(format, status, code, &message);
            }
        }
    };
    let most_output = reserved.as_ref().and_then(|reserved| reserved.most_output);
    let anthropic = format != WireFormat::Responses;
    if anthropic && !headers.iter().any(|(name, _)| name == "anthropic-version") {
        headers.push(("anthropic-version".to_owned(), ANTHROPIC_VERSION.to_owned()));
    }
    let call = WireCall {
        call: call_of(inner, parsed, most_output),
        format,
        headers,
        beta,
    };
    match inner.models.native(call).await {
        Ok((WireAnswer::Json(answer), usage)) => {
            if format != WireFormat::CountTokens {
                let kept = inner
                    .ledger
                    .answered(usage, Some((question_hash, answer.clone())));
                drop(reserved);
                if let Err(error) = kept {
                    let request = &inner.request.request_id;
                    tracing::error!(request, %error, "tokens could not be counted");
                    let message =
                        format!("what the answer cost could not be written to disk ({error})");
                    return refusal(
                        format,
                        StatusCode::SERVICE_UNAVAILABLE,
                        "not_counted",
                        &message,
                    );
                }
                tell_usage(inner);
            }
            reply(StatusCode::OK, &answer)
        }
        Ok((WireAnswer::Stream(pieces), _)) => {
            let counted = Counted {
                inner: Arc::clone(inner),
                reserved,
                format,
                pieces,
                input,
                bytes: 0,
                used: None,
                over: false,
            };
            // The answer counts as waited for until its stream ends.
            let frames = stream::unfold((counted, waiting), |(mut counted, waiting)| async {
                let frame = counted.next().await?;
                Some((frame, (counted, waiting)))
            });
            streamed(frames)
        }
        Err(error) => refused(inner, format, error),
    }
}

/// An error before the answer began, in the endpoint's own words where they are for the worker.
fn refused(inner: &Inner, format: WireFormat, error: WireError) -> Response<Body> {
    let (mut status, kind) = meaning(&error.error);
    let message = error.to_string();
    inner.ledger.failed(kind, &message);
    let mut response = match (error.body, &error.error) {
        (Some(body), ModelError::Unavailable { status: said, .. }) => {
            let said = said.and_then(|said| StatusCode::from_u16(said).ok());
            status = said.unwrap_or(status);
            reply(status, &body)
        }
        _ => refusal(format, status, kind, &message),
    };
    let headers = response.headers_mut();
    if let Some(seconds) = error.retry_after_s {
        headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
    } else if status != StatusCode::TOO_MANY_REQUESTS {
        // It was tried again here, as often as the configuration says; clients of both kinds understand this.
        headers.insert("x-should-retry", HeaderValue::from_static("false"));
    }
    response
}

fn refusal(format: WireFormat, status: StatusCode, code: &str, message: &str) -> Response<Body> {
    match format {
        WireFormat::Messages | WireFormat::CountTokens => anthropic_problem(status, message),
        WireFormat::Responses => problem(status, code, message),
    }
}

/// An error in the form that Anthropic's clients read.
pub(super) fn anthropic_problem(status: StatusCode, message: &str) -> Response<Body> {
    reply(status, &anthropic_error(status, message))
}

fn anthropic_error(status: StatusCode, message: &str) -> Value {
    let kind = match status.as_u16() {
        401 => "authentication_error",
        402 => "billing_error",
        403 => "permission_error",
        404 => "not_found_error",
        413 => "request_too_large",
        429 => "rate_limit_error",
        504 => "timeout_error",
        529 => "overloaded_error",
        400..=499 => "invalid_request_error",
        _ => "api_error",
    };
    json!({"type": "error", "error": {"type": kind, "message": message}})
}

/// A stream on its way to the worker.
struct Counted {
    inner: Arc<Inner>,
    /// What is held of the budget until this is counted.
    reserved: Option<Reserved>,
    format: WireFormat,
    pieces: BoxStream<'static, Result<WirePiece, WireError>>,
    /// The question's size, for a stream that is left before anything is known of its cost.
    input: u64,
    bytes: usize,
    used: Option<Usage>,
    over: bool,
}

impl Counted {
    async fn next(&mut self) -> Option<Result<Frame<Bytes>, io::Error>> {
        while !self.over {
            match self.pieces.next().await {
                Some(Ok(WirePiece::Used(usage))) => self.used = Some(usage),
                Some(Ok(WirePiece::Events(bytes))) => {
                    self.inner.events.activity().touch();
                    self.bytes += bytes.len();
                    return Some(Ok(Frame::data(bytes)));
                }
                Some(Err(error)) => {
                    self.over = true;
                    self.count();
                    let (status, kind) = meaning(&error.error);
                    self.inner.ledger.failed(kind, &error.to_string());
                    // The client reads in its own format why nothing more comes.
                    return Some(Ok(Frame::data(self.last_words(status, kind, error))));
                }
                None => {
                    self.over = true;
                    self.count();
                }
            }
        }
        None
    }

    fn last_words(&self, status: StatusCode, what: &str, error: WireError) -> Bytes {
        let message = error.to_string();
        let event = error.body.unwrap_or_else(|| match self.format {
            WireFormat::Messages | WireFormat::CountTokens => anthropic_error(status, &message),
            WireFormat::Responses => json!({
                "type": "response.failed",
                "response": {
                    "object": "response",
                    "status": "failed",
                    "error": {"code": if what == kind::BUDGET { "insufficient_quota" } else { "server_error" }, "message": message},
                },
            }),
        });
        let name = event["type"].as_str().unwrap_or("error");
        Bytes::from(format!("event: {name}\ndata: {event}\n\n"))
    }

    fn count(&mut self) {
        let usage = self.used.unwrap_or(Usage {
            input_tokens: if self.bytes > 0 { self.input } else { 0 },
            // About four bytes a token, and events are mostly their own form.
            output_tokens: estimated_tokens(self.bytes) / 8,
            cost_usd: None,
        });
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
