//! Workers' requests in other formats than chat completions: to an endpoint that speaks the format, under the job's model,
//! metered and within the budget. Nothing is translated.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ports::{
    ModelError, Role, Usage, WireAnswer, WireCall, WireError, WireFormat, WirePiece, WorkerTerms,
};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tracing::{Instrument, Span, warn};

use super::broken::{broke_off, too_long};
use super::{Failures, Provider, Target, wait_before_next_try};
use crate::account::{lost_key, note_usage, worker_spend};
use crate::backoff::{Backoff, TryError, is_passing};
use crate::budget::{Question, Reservation};
use crate::config::{Config, Price, Speaks};
use crate::endpoint::{Answer, Endpoint, Refused, Shape};
use crate::meter::{Broken, Meter};
use crate::sse;
use crate::wire::{self, Tokens};

/// Pieces that wait for a slow worker.
const CHANNEL: usize = 32;
/// The fewest tokens that Anthropic's models may be told to think in.
const MIN_THINKING: u64 = 1024;
/// Where a bound of ours is refused, it is not lowered below this.
const LEAST_ASKED: u64 = 2048;
/// How long an answer may be where nobody says it: as long as those of today's models get.
const UNSAID_OUTPUT: u64 = 65_536;

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

    /// What the broker has to know beforehand.
    pub fn terms(&self, format: WireFormat) -> WorkerTerms {
        super::terms(self.of(format), self.limit.map(u64::from))
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
        let question = self.native_question(call);
        let mut failures = Failures::default();
        let mut last: Option<Refused> = None;
        for target in targets {
            let mut backoff = Backoff::new(self.shared.retry, deadline);
            loop {
                // Counting is not paid for.
                let (reservation, output) = if format == WireFormat::CountTokens {
                    (None, 0)
                } else {
                    let question = Question {
                        price: target.price,
                        ..question
                    };
                    let budgets = &self.shared.budgets;
                    let reserved = budgets.reserve_up_to(&call.call.project, question).await?;
                    (Some(reserved.0), reserved.1)
                };
                let most = Tokens {
                    input: question.input,
                    output,
                };
                let opened = self.open(target, call, output, deadline).await;
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

    /// What a request takes, and how long its answer may be: as the worker, the configuration and the job's budget allow.
    fn native_question(&self, call: &WireCall) -> Question {
        let asked = limit_name(call.format).and_then(|name| call.call.body[name].as_u64());
        let limit = self.shared.native.limit.map(u64::from);
        let bounds = [asked, limit, call.call.most_output];
        Question {
            input: wire::estimate_tokens(call.call.body.to_string().len()),
            want: bounds.into_iter().flatten().min().unwrap_or(UNSAID_OUTPUT),
            price: None,
        }
    }

    /// Sends a request, its answer bounded. Where the worker set no bound, ours may be more than the model can write at all,
    /// which some endpoints refuse: then less is asked for.
    async fn post(
        &self,
        target: &Target,
        call: &WireCall,
        output: u64,
        deadline: Instant,
    ) -> Result<Answer, Refused> {
        let mut bound = output;
        loop {
            let mut body = call.call.body.clone();
            body["model"] = target.model.clone().into();
            let name = limit_name(call.format);
            let unsaid = name.is_some_and(|name| body[name].is_null());
            // What nobody bounds is as long as the model makes it; a stream that is longer than that is cut.
            if let Some(name) = name.filter(|_| !unsaid || bound < UNSAID_OUTPUT) {
                hold_to(&mut body, name, bound);
            }
            let refused = match target.endpoint.post_native(call, &body, deadline).await {
                Err(refused) => refused,
                answered => return answered,
            };
            let about_bound = matches!(refused.error.status, Some(400 | 422))
                && name.is_some_and(|name| refused.error.message.contains(name));
            if !(unsaid && about_bound && bound >= 2 * LEAST_ASKED) {
                return Err(refused);
            }
            bound /= 2;
        }
    }

    /// One try, up to the first event of its stream.
    async fn open(
        &self,
        target: &Target,
        call: &WireCall,
        output: u64,
        deadline: Instant,
    ) -> Result<Opened, Refused> {
        let mut answer = self.post(target, call, output, deadline).await?;
        let wanted = wire::wants_stream(&call.call.body);
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

/// Bounds the answer that a request asks for.
fn hold_to(body: &mut Value, name: &str, limit: u64) {
    if body[name].as_u64().is_some_and(|asked| asked <= limit) {
        return;
    }
    body[name] = limit.into();
    // An answer has to be longer than what it may think.
    let thinking = body
        .pointer("/thinking/budget_tokens")
        .and_then(Value::as_u64);
    if thinking.is_some_and(|thinking| thinking >= limit) {
        if limit > MIN_THINKING {
            // Half of it is for the answer itself, as far as the smallest thought leaves so much.
            let thinking = (limit / 2).max(MIN_THINKING);
            body["thinking"] = json!({"type": "enabled", "budget_tokens": thinking});
            return;
        }
        body["thinking"] = json!({"type": "disabled"});
        // What clears thoughts is refused where none are thought.
        let edits = body.pointer_mut("/context_management/edits");
        if let Some(edits) = edits.and_then(Value::as_array_mut) {
            edits.retain(|edit| {
                !edit["type"]
                    .as_str()
                    .is_some_and(|kind| kind.starts_with("clear_thinking"))
            });
        }
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

    async fn run(mut self, mut answer: Answer, first: Vec<String>, sender: Pieces) {
        let mut meter = Meter::new(self.call.format);
        let ended = self.pass(&mut answer, first, &sender, &mut meter).await;
        // Nothing more is read.
        drop(answer);
        let limit = self.most.output;
        if matches!(ended, Err(Broke::TooLong)) {
            self.most.output = limit.max(wire::estimate_tokens(meter.written()));
        }
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
            Err(Broke::TooLong) => Err(too_long(self.shown, &self.model, limit).into()),
            Err(Broke::Failed(Refused { error, body })) => Err(WireError {
                error: broke_off(self.shown, &self.model, &error),
                body,
                retry_after_s: None,
            }),
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
    ) -> Result<Option<Bytes>, Broke> {
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
                    return Err(Broke::Failed(broken.into()));
                }
                // One that has ended is whole, however long it is: it is paid for.
                if !meter.ended && meter.is_beyond(self.most.output) {
                    return Err(Broke::TooLong);
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

/// Why a stream did not get to its end.
enum Broke {
    Failed(Refused),
    /// It went on beyond what was set aside for it.
    TooLong,
}

impl From<TryError> for Broke {
    fn from(error: TryError) -> Self {
        Self::Failed(error.into())
    }
}
