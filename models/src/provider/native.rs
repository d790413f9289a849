//! Workers' requests in other formats than chat completions: to an endpoint that speaks the format, under the job's model,
//! metered and within the budget. Nothing is translated.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ports::{ModelError, Role, Usage, WireAnswer, WireCall, WireError, WireFormat, WirePiece};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{Instrument, Span, warn};

use super::{Failures, Provider, Target, wait_before_next_try};
use crate::account::{lost_key, note_usage, worker_spend};
use crate::backoff::{Backoff, TryError, is_passing};
use crate::budget::Reservation;
use crate::config::{Config, Price, RoleConfig, Speaks};
use crate::endpoint::{Answer, Endpoint, Refused, Shape};
use crate::meter::{Broken, Meter};
use crate::sse;
use crate::wire::{self, Tokens};

/// Pieces that wait for a slow worker.
const CHANNEL: usize = 32;
/// The fewest tokens that Anthropic's models may be told to think in.
const MIN_THINKING: u32 = 1024;

/// Who answers workers in these formats.
pub(super) struct Targets {
    messages: Vec<Target>,
    responses: Vec<Target>,
    /// The developer's limit of an answer, if the configuration has one. Agents set limits that fit their model, so that no
    /// other one is put in their place.
    limit: Option<u32>,
}

impl Targets {
    pub fn new(config: &Config, endpoints: &BTreeMap<&str, Arc<Endpoint>>) -> Self {
        let of = |speaks| {
            let models = config.worker_models(speaks).into_iter();
            models
                .filter_map(|(endpoint, model)| {
                    Some(Target {
                        endpoint: endpoints.get(endpoint.as_str())?.clone(),
                        price: config.prices.get(&model).copied(),
                        model,
                    })
                })
                .collect()
        };
        Self {
            messages: of(Speaks::Messages),
            responses: of(Speaks::Responses),
            limit: config
                .roles
                .get(&Role::Developer)
                .and_then(|role| role.max_output_tokens),
        }
    }

    fn of(&self, format: WireFormat) -> &[Target] {
        match format {
            WireFormat::Messages | WireFormat::CountTokens => &self.messages,
            WireFormat::Responses => &self.responses,
        }
    }
}

fn no_endpoint(format: WireFormat, found: &str) -> WireError {
    ModelError::NoEndpoint {
        format: format.name(),
        advice: format!("{found}{}", format.advice()),
    }
    .into()
}

/// What a request led to.
enum Opened {
    Whole(Value, Meter),
    Stream(Answer, Vec<String>),
}

impl Provider {
    pub(super) async fn native_chain(
        &self,
        call: &WireCall,
    ) -> Result<(WireAnswer, Usage), WireError> {
        let format = call.format;
        let targets = self.shared.native.of(format);
        if targets.is_empty() {
            return Err(no_endpoint(format, ""));
        }
        if let Some(wrong) = wrong_with(&call.call.body) {
            return Err(ModelError::Unavailable {
                endpoint: targets[0].endpoint.shown().to_owned(),
                message: format!("{wrong}; nothing was sent"),
                status: Some(400),
                retryable: false,
            }
            .into());
        }
        let deadline = self.deadline();
        let most = self.native_at_most(call);
        let mut failures = Failures::default();
        let mut last: Option<Refused> = None;
        for target in targets {
            let mut backoff = Backoff::new(self.shared.retry, deadline);
            loop {
                // Counting is not paid for.
                let reservation = if format == WireFormat::CountTokens {
                    None
                } else {
                    let estimate = target.estimate(most);
                    let budgets = &self.shared.budgets;
                    Some(budgets.reserve(&call.call.project, estimate).await?)
                };
                let opened = self.open(target, call, deadline).await;
                let refused = match opened {
                    Ok(Opened::Whole(body, meter)) => {
                        let usage = meter.counts(most).usage(target.price.as_ref());
                        if let Some(reservation) = reservation {
                            self.settle(call, &target.model, usage, reservation).await?;
                        }
                        return Ok((WireAnswer::Json(body), usage));
                    }
                    Ok(Opened::Stream(answer, first)) => {
                        let Some(reservation) = reservation else {
                            return Err(no_endpoint(format, ""));
                        };
                        let pump = Pump {
                            provider: self.clone(),
                            call: call.clone(),
                            model: target.model.clone(),
                            price: target.price,
                            shown: target.endpoint.shown().to_owned(),
                            most,
                            reservation,
                        };
                        let stream = pump.start(answer, first);
                        return Ok((WireAnswer::Stream(stream), Usage::default()));
                    }
                    Err(refused) => refused,
                };
                drop(reservation);
                if !wait_before_next_try(&mut backoff, target, &refused.error).await {
                    failures.push(target, &refused.error, backoff.failed());
                    last = Some(refused);
                    break;
                }
            }
        }
        Err(said(format, failures, last))
    }

    /// What a request takes at most.
    fn native_at_most(&self, call: &WireCall) -> Tokens {
        let asked = limit_name(call.format).and_then(|name| call.call.body[name].as_u64());
        let limit = self.shared.native.limit.map(u64::from);
        let output = match (asked, limit) {
            (Some(asked), Some(limit)) => asked.min(limit),
            (asked, limit) => asked
                .or(limit)
                .unwrap_or(RoleConfig::DEFAULT_MAX_OUTPUT_TOKENS.into()),
        };
        Tokens {
            input: wire::estimate_tokens(call.call.body.to_string().len()),
            output,
        }
    }

    /// One try, up to the first event of its stream.
    async fn open(
        &self,
        target: &Target,
        call: &WireCall,
        deadline: Instant,
    ) -> Result<Opened, Refused> {
        let mut body = call.call.body.clone();
        body["model"] = target.model.clone().into();
        if let (Some(name), Some(limit)) = (limit_name(call.format), self.shared.native.limit) {
            hold_to(&mut body, name, limit);
        }
        let mut answer = target.endpoint.post_native(call, &body, deadline).await?;
        let wanted = wire::wants_stream(&body);
        let mut meter = Meter::new(call.format);
        match answer.shape().await? {
            Shape::Body(body) if !wanted => {
                if !meter.whole(&body) {
                    let what = format!("its answer is JSON, but not in {}", call.format.name());
                    return Err(TryError::transport(what).into());
                }
                Ok(Opened::Whole(body, meter))
            }
            Shape::Stream(first) if wanted => {
                for data in &first {
                    if let Ok(event) = serde_json::from_str::<Value>(data) {
                        meter.event(&event);
                    }
                }
                match meter.broken.take() {
                    Some(broken) if !meter.took_something() => Err(broken.into()),
                    _ => Ok(Opened::Stream(answer, first)),
                }
            }
            Shape::Body(_) => Err(TryError::transport(
                "it answered a request for a stream with a document",
            )
            .into()),
            Shape::Stream(_) => Err(TryError::transport(
                "it answered a request for a document with a stream",
            )
            .into()),
        }
    }

    async fn settle(
        &self,
        call: &WireCall,
        model: &str,
        usage: Usage,
        reservation: Reservation,
    ) -> Result<(), ModelError> {
        // These requests have no turns to be known by: each is a line of its own.
        let key = lost_key(call.call.request.as_str()).replace("#lost-", ":native-");
        let spend = worker_spend(&call.call, key, model, usage);
        reservation.settle(&spend).await?;
        note_usage(model, &usage);
        Ok(())
    }
}

/// What would keep a request from being metered.
fn wrong_with(body: &Value) -> Option<&'static str> {
    if !body.is_object() {
        return Some("the worker's request is not a JSON object");
    }
    (body["background"] == json!(true))
        .then_some("`background` answers cannot be metered; ask without it")
}

/// Where a request says how long its answer may be.
fn limit_name(format: WireFormat) -> Option<&'static str> {
    match format {
        WireFormat::Messages => Some("max_tokens"),
        WireFormat::Responses => Some("max_output_tokens"),
        WireFormat::CountTokens => None,
    }
}

fn hold_to(body: &mut Value, name: &str, limit: u32) {
    if body[name]
        .as_u64()
        .is_some_and(|asked| asked <= limit.into())
    {
        return;
    }
    body[name] = limit.into();
    // An answer has to be longer than what it may think.
    let thinking = body
        .pointer("/thinking/budget_tokens")
        .and_then(Value::as_u64);
    if thinking.is_some_and(|thinking| thinking >= limit.into()) {
        body["thinking"] = if limit > MIN_THINKING {
            json!({"type": "enabled", "budget_tokens": limit - 1})
        } else {
            json!({"type": "disabled"})
        };
    }
}

impl From<Broken> for Refused {
    fn from(broken: Broken) -> Self {
        Self {
            error: TryError {
                message: format!("it broke off: {}", broken.message),
                status: broken.status,
                retryable: broken.status.is_none_or(is_passing),
                retry_after: None,
            },
            body: Some(broken.body),
        }
    }
}

/// What the worker is told in the end.
fn said(format: WireFormat, failures: Failures, last: Option<Refused>) -> WireError {
    let Some(last) = last else {
        return failures.into_error().into();
    };
    let about_model = |body: &Value| body.to_string().contains("model");
    if matches!(last.error.status, Some(404 | 405)) && !last.body.as_ref().is_some_and(about_model)
    {
        let found = format!("{} has no such address; ", failures.endpoint);
        return no_endpoint(format, &found);
    }
    // A key that is refused is ours, and nothing that the worker can mend.
    let ours = matches!(last.error.status, None | Some(401 | 403));
    WireError {
        body: last.body.filter(|_| !ours),
        retry_after_s: last.error.retry_after.map(|wait| wait.as_secs().max(1)),
        error: failures.into_error(),
    }
}

/// Passes a stream on and counts it at its end. A task of its own reads it: when the worker goes away in the middle, what came
/// until then is still counted.
struct Pump {
    provider: Provider,
    call: WireCall,
    model: String,
    price: Option<Price>,
    shown: String,
    most: Tokens,
    reservation: Reservation,
}

type Pieces = mpsc::Sender<Result<WirePiece, WireError>>;

impl Pump {
    fn start(
        self,
        answer: Answer,
        first: Vec<String>,
    ) -> BoxStream<'static, Result<WirePiece, WireError>> {
        let (sender, mut receiver) = mpsc::channel(CHANNEL);
        tokio::spawn(self.run(answer, first, sender).instrument(Span::current()));
        stream::poll_fn(move |context| receiver.poll_recv(context)).boxed()
    }

    async fn run(self, mut answer: Answer, first: Vec<String>, sender: Pieces) {
        let mut meter = Meter::new(self.call.format);
        let ended = self.pass(&mut answer, first, &sender, &mut meter).await;
        let usage = meter.counts(self.most).usage(self.price.as_ref());
        // A stream that broke before anything came of it cost nothing that is known.
        if ended.is_ok() || meter.took_something() {
            let settled = self
                .provider
                .settle(&self.call, &self.model, usage, self.reservation)
                .await;
            let used = match settled {
                Ok(()) => Ok(WirePiece::Used(usage)),
                Err(error) => {
                    let project = &self.call.call.project;
                    warn!(%project, %error, "a worker's call is not in the ledger");
                    Err(error.into())
                }
            };
            let failed = used.is_err();
            // A worker that went away needs no end.
            if sender.send(used).await.is_err() || failed {
                return;
            }
        }
        let last = match ended {
            // Kept back until it was counted: with it the worker has the whole answer.
            Ok(Some(last)) => Ok(WirePiece::Events(last)),
            Ok(None) => return,
            Err(Refused { error, body }) => {
                warn!(
                    endpoint = self.shown,
                    model = self.model,
                    error = error.message,
                    "a worker's stream broke"
                );
                Err(WireError {
                    error: ModelError::Unavailable {
                        endpoint: self.shown,
                        message: format!("{} (model {})", error.message, self.model),
                        status: error.status,
                        retryable: error.retryable,
                    },
                    body,
                    retry_after_s: None,
                })
            }
        };
        let _ = sender.send(last).await;
    }

    /// Passes events on until the answer ends, and gives its last event; none when the worker went away.
    async fn pass(
        &self,
        answer: &mut Answer,
        first: Vec<String>,
        sender: &Pieces,
        meter: &mut Meter,
    ) -> Result<Option<Bytes>, Refused> {
        let mut told = None;
        let mut events = Some(first);
        while let Some(batch) = events {
            let mut piece = Vec::new();
            for data in batch {
                if data.trim() == "[DONE]" {
                    continue;
                }
                // What is not JSON is half an event, or a sign of life.
                let Ok(event) = serde_json::from_str::<Value>(&data) else {
                    continue;
                };
                meter.event(&event);
                if let Some(broken) = meter.broken.take() {
                    if !piece.is_empty() {
                        let _ = sender.send(Ok(WirePiece::Events(piece.into()))).await;
                    }
                    return Err(broken.into());
                }
                if let Some(kind) = event["type"].as_str() {
                    piece.extend_from_slice(format!("event: {kind}\n").as_bytes());
                }
                piece.extend_from_slice(&sse::event(&data));
                if meter.ended {
                    return Ok(Some(piece.into()));
                }
            }
            if !piece.is_empty()
                && sender
                    .send(Ok(WirePiece::Events(piece.into())))
                    .await
                    .is_err()
            {
                return Ok(None);
            }
            // What it took so far, for a broker that may be gone before the end.
            let so_far = meter.took_something().then(|| meter.counts(self.most));
            if let Some(counts) = so_far.filter(|counts| told != Some(*counts)) {
                told = Some(counts);
                let used = counts.usage(self.price.as_ref());
                if sender.send(Ok(WirePiece::Used(used))).await.is_err() {
                    return Ok(None);
                }
            }
            events = tokio::select! {
                events = answer.events() => events?,
                () = sender.closed() => return Ok(None),
            };
        }
        Err(TryError::transport("its stream ended before the answer did").into())
    }
}
