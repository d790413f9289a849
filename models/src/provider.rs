//! Models at their endpoints: roles, fallbacks, tries, and what they cost.

mod broken;
mod native;
mod pass_through;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ports::{
    Ledger, ModelAnswer, ModelCall, ModelError, Models, Role, Spend, Usage, WireAnswer, WireCall,
    WireError, WireFormat, WorkerAnswer, WorkerCall, WorkerModels, WorkerTerms,
};
use serde_json::Value;
use tokio::time::Instant;
use tracing::{Instrument, debug, warn};

use crate::account::{
    WorkerKeys, at_most, call_span, crew_spend, lost_key, note_usage, worker_span, worker_spend,
};
use crate::backoff::{Backoff, TryError, is_passing};
use crate::budget::{Budgets, Estimate, Reservation};
use crate::config::{Config, ConfigError, Price, RetryConfig, Speaks, priced};
use crate::endpoint::{Answer, Endpoint, Shape};
use crate::wire::{self, Completion, Tokens};

/// How often one try may be put in another way because the endpoint refused a part of it.
const MAX_ADAPTATIONS: u32 = 8;

/// Asks the models that are configured for each role. Cheap to clone.
#[derive(Clone)]
pub struct Provider {
    shared: Arc<Shared>,
}

struct Shared {
    native: native::Targets,
    seats: HashMap<Role, Seat>,
    budgets: Budgets,
    retry: RetryConfig,
    total: Duration,
    worker_keys: WorkerKeys,
}

/// Who answers for a role, and within which limits.
struct Seat {
    chain: Vec<Target>,
    max_output_tokens: u32,
    temperature: Option<f64>,
}

/// One model at one endpoint.
struct Target {
    endpoint: Arc<Endpoint>,
    model: String,
    price: Option<Price>,
}

impl Target {
    fn estimate(&self, most: Tokens) -> Estimate {
        let cost = |price: &Price| price.cost_usd(most.input, most.output);
        Estimate {
            tokens: most.input.saturating_add(most.output),
            cost_usd: self.price.as_ref().map(cost),
        }
    }

    fn usage(&self, completion: &Completion, most: Tokens) -> Usage {
        let tokens = completion.tokens_or_estimate(most);
        priced(self.price.as_ref(), tokens.input, tokens.output)
    }
}

impl Provider {
    /// Takes the configuration (with its keys resolved) and the ledger. Roles without a model answer
    /// [`ModelError::NotConfigured`].
    pub fn new(config: &Config, ledger: Arc<dyn Ledger>) -> Result<Self, ConfigError> {
        config.validate()?;
        let mut endpoints = BTreeMap::new();
        for (name, endpoint) in &config.endpoints {
            let endpoint = Endpoint::new(name, endpoint, &config.timeouts)?;
            endpoints.insert(name.as_str(), Arc::new(endpoint));
        }
        let mut seats = HashMap::new();
        for role in [
            Role::Brainstorm,
            Role::Architect,
            Role::Developer,
            Role::Reviewer,
        ] {
            let mut chain = Vec::new();
            for choice in config.chain(role) {
                let (endpoint, model) = choice.parts();
                let Some(endpoint) = endpoints.get(endpoint) else {
                    // Only the default model without the default endpoint comes here: nothing is configured yet.
                    continue;
                };
                if !config.endpoints[choice.parts().0].speaks(Speaks::Chat) {
                    // For workers whose agent speaks what it does.
                    continue;
                }
                chain.push(Target {
                    endpoint: endpoint.clone(),
                    model: model.to_owned(),
                    price: config.prices.get(model).copied(),
                });
            }
            let seat = Seat {
                chain,
                max_output_tokens: config.max_output_tokens(role),
                temperature: config.temperature(role),
            };
            seats.insert(role, seat);
        }
        Ok(Self {
            shared: Arc::new(Shared {
                native: native::Targets::new(config, &endpoints),
                seats,
                budgets: Budgets::new(ledger, config.budget),
                retry: config.retry,
                total: Duration::from_secs(config.timeouts.total_s),
                worker_keys: WorkerKeys::default(),
            }),
        })
    }

    fn seat(&self, role: Role) -> Result<&Seat, ModelError> {
        self.shared
            .seats
            .get(&role)
            .filter(|seat| !seat.chain.is_empty())
            .ok_or(ModelError::NotConfigured)
    }

    fn deadline(&self) -> Instant {
        Instant::now() + self.shared.total
    }

    async fn ask_chain(&self, call: &ModelCall) -> Result<ModelAnswer, ModelError> {
        let seat = self.seat(call.role)?;
        let deadline = self.deadline();
        let most = at_most(call, seat.max_output_tokens);
        let mut failures = Failures::default();
        for target in &seat.chain {
            let mut backoff = Backoff::new(self.shared.retry, deadline);
            loop {
                let estimate = target.estimate(most);
                let reservation = self.shared.budgets.reserve(&call.project, estimate);
                let mut reservation = reservation.await?;
                let tried = seat.ask(target, call, deadline, &mut reservation).await;
                let error = match tried {
                    Ok(completion) => {
                        let usage = target.usage(&completion, most);
                        let spend = crew_spend(call, call.key.clone(), &target.model, usage);
                        reservation.settle(&spend).await?;
                        note_usage(&target.model, &usage);
                        return Ok(ModelAnswer {
                            text: completion.text,
                            model: target.model.clone(),
                            usage,
                            from_tape: false,
                        });
                    }
                    Err(error) => error,
                };
                reservation.settle_lost().await?;
                if !wait_before_next_try(&mut backoff, target, &error).await {
                    failures.push(target, &error, backoff.failed());
                    break;
                }
            }
        }
        Err(failures.into_error())
    }

    async fn complete_chain(&self, call: &WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError> {
        let seat = self.seat(Role::Developer)?;
        if !call.body.is_object() {
            return Err(ModelError::Unavailable {
                endpoint: seat.chain[0].endpoint.shown().to_owned(),
                message: "the worker's request is not a JSON object; nothing was sent".to_owned(),
                status: Some(400),
                retryable: false,
            });
        }
        let deadline = self.deadline();
        let most = seat.worker_at_most(call);
        let mut failures = Failures::default();
        for target in &seat.chain {
            let mut backoff = Backoff::new(self.shared.retry, deadline);
            loop {
                let estimate = target.estimate(most);
                let reservation = self.shared.budgets.reserve(&call.project, estimate);
                let mut reservation = reservation.await?;
                let opened = seat.open_for_worker(target, call, deadline, &mut reservation);
                let error = match opened.await {
                    Ok(Opened::Whole(completion, body)) => {
                        let usage = target.usage(&completion, most);
                        let spend = self.worker_spend(call, &target.model, usage);
                        reservation.settle(&spend).await?;
                        note_usage(&target.model, &usage);
                        return Ok((pass_through::whole(&call.body, body), usage));
                    }
                    Ok(Opened::Stream(answer, first)) => {
                        let pump = pass_through::Pump {
                            provider: self.clone(),
                            call: call.clone(),
                            model: target.model.clone(),
                            price: target.price,
                            shown: target.endpoint.shown().to_owned(),
                            most,
                            reservation,
                        };
                        let stream = pump.start(answer, first);
                        return Ok((WorkerAnswer::Stream(stream), Usage::default()));
                    }
                    Err(error) => error,
                };
                reservation.settle_lost().await?;
                if !wait_before_next_try(&mut backoff, target, &error).await {
                    failures.push(target, &error, backoff.failed());
                    break;
                }
            }
        }
        Err(failures.into_error())
    }

    /// The line of the ledger for a worker's call, under the key that this call takes by it.
    fn worker_spend(&self, call: &WorkerCall, model: &str, usage: Usage) -> Spend {
        worker_spend(call, self.shared.worker_keys.take(call), model, usage)
    }
}

#[async_trait]
impl Models for Provider {
    async fn ask(&self, call: &ModelCall) -> Result<ModelAnswer, ModelError> {
        self.ask_chain(call).instrument(call_span(call)).await
    }

    fn tape(&self) -> Option<String> {
        None
    }
}

#[async_trait]
impl WorkerModels for Provider {
    async fn complete(&self, call: WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError> {
        let span = worker_span(&call);
        self.complete_chain(&call).instrument(span).await
    }

    fn terms(&self, format: Option<WireFormat>) -> WorkerTerms {
        match format {
            Some(format) => self.shared.native.terms(format),
            None => self
                .shared
                .seats
                .get(&Role::Developer)
                .map_or_else(WorkerTerms::default, |seat| {
                    terms(&seat.chain, Some(seat.max_output_tokens.into()))
                }),
        }
    }

    async fn native(&self, call: WireCall) -> Result<(WireAnswer, Usage), WireError> {
        let span = worker_span(&call.call);
        self.native_chain(&call).instrument(span).await
    }
}

/// What a worker's request led to.
enum Opened {
    Whole(Completion, Value),
    Stream(Answer, Vec<String>),
}

impl Seat {
    /// One try of a question of the crew's own.
    async fn ask(
        &self,
        target: &Target,
        call: &ModelCall,
        deadline: Instant,
        reservation: &mut Reservation,
    ) -> Result<Completion, TryError> {
        let mut answer = post(target, deadline, true, || {
            let quirks = target.endpoint.quirks(&target.model);
            let limit = self.max_output_tokens;
            let mut body = wire::request(call, &target.model, limit, self.temperature);
            quirks.adapt(&mut body, call.schema.as_ref());
            body
        })
        .await?;
        let most = at_most(call, self.max_output_tokens);
        let mut completion = match answer.shape().await? {
            Shape::Body(body) => whole(&body)?,
            Shape::Stream(first) => {
                collect(answer, first, most, |so_far| {
                    let usage = target.usage(so_far, most);
                    if let Some(spend) = reservation.risked() {
                        spend.usage = usage;
                    } else {
                        let key = lost_key(&call.key);
                        reservation.at_risk(crew_spend(call, key, &target.model, usage));
                    }
                })
                .await?
            }
        };
        // Whatever is wrong with it, it was answered and is paid for.
        let usage = target.usage(&completion, most);
        let key = lost_key(&call.key);
        reservation.at_risk(crew_spend(call, key, &target.model, usage));
        if completion.text.trim().is_empty() {
            return Err(match completion.finish.as_deref() {
                Some("length") => TryError::lasting(
                    "it used all of its output on thinking and answered nothing: raise the role's max_output_tokens",
                ),
                _ => TryError::transport("it answered nothing"),
            });
        }
        if call.schema.is_some() {
            let bare = wire::bare_json(&completion.text);
            if wire::is_json(bare) {
                completion.text = bare.to_owned();
            } else {
                debug!(
                    "the answer is not JSON although a schema was sent; the next question will carry the schema in its text"
                );
                let lesson = crate::quirks::Quirks::learn_schema_ignored;
                target.endpoint.teach(&target.model, lesson);
            }
        }
        Ok(completion)
    }

    /// The most tokens that an answer to this worker's request may have; with `n`, each of the answers.
    fn worker_limit(&self, call: &WorkerCall) -> u32 {
        let of_job = call.most_output.map(|most| most / answers(&call.body));
        ["max_completion_tokens", "max_tokens"]
            .iter()
            .filter_map(|name| call.body.get(name).and_then(Value::as_u64))
            .chain(of_job)
            .filter_map(|limit| u32::try_from(limit).ok())
            .fold(self.max_output_tokens, u32::min)
            .max(1)
    }

    /// What a worker's request takes at most.
    fn worker_at_most(&self, call: &WorkerCall) -> Tokens {
        Tokens {
            input: wire::estimate_tokens(call.body.to_string().len()),
            output: u64::from(self.worker_limit(call)) * answers(&call.body),
        }
    }

    /// One try of a worker's request, up to the first event of its stream.
    async fn open_for_worker(
        &self,
        target: &Target,
        call: &WorkerCall,
        deadline: Instant,
        reservation: &mut Reservation,
    ) -> Result<Opened, TryError> {
        let mut answer = post(target, deadline, false, || {
            let mut body = call.body.clone();
            body["model"] = target.model.clone().into();
            if let Some(body) = body.as_object_mut() {
                body.remove("max_tokens");
            }
            body["max_completion_tokens"] = self.worker_limit(call).into();
            if let Some(temperature) = self.temperature
                && body.get("temperature").is_none_or(Value::is_null)
            {
                body["temperature"] = temperature.into();
            }
            if wire::wants_stream(&body) {
                if !body["stream_options"].is_object() {
                    body["stream_options"] = serde_json::json!({});
                }
                body["stream_options"]["include_usage"] = true.into();
            }
            let quirks = target.endpoint.quirks(&target.model);
            quirks.adapt_parameters(&mut body);
            body
        })
        .await?;
        match answer.shape().await? {
            Shape::Body(body) => {
                let completion = whole(&body)?;
                Ok(Opened::Whole(completion, body))
            }
            Shape::Stream(first) if wire::wants_stream(&call.body) => {
                for data in &first {
                    if let Ok(chunk) = serde_json::from_str::<Value>(data) {
                        let mut completion = Completion::default();
                        completion.absorb(&chunk);
                        failed(&completion)?;
                    }
                }
                Ok(Opened::Stream(answer, first))
            }
            Shape::Stream(first) => {
                let most = self.worker_at_most(call);
                let completion = collect(answer, first, most, |so_far| {
                    let usage = target.usage(so_far, most);
                    let key = lost_key(call.request.as_str());
                    reservation.at_risk(worker_spend(call, key, &target.model, usage));
                })
                .await?;
                let id = format!("chatcmpl-{}", uuid::Uuid::new_v4().simple());
                let created = jiff::Timestamp::now().as_second();
                let body = completion.to_body(&id, created, &target.model);
                Ok(Opened::Whole(completion, body))
            }
        }
    }
}

/// How many answers a worker's request asks for at once.
fn answers(body: &Value) -> u64 {
    body["n"].as_u64().unwrap_or(1).clamp(1, 128)
}

/// The terms of the dearest of these models; a price for tokens that go into an endpoint's cache counts as one for reading.
fn terms(targets: &[Target], most_output: Option<u64>) -> WorkerTerms {
    let mut terms = WorkerTerms {
        most_output,
        ..WorkerTerms::default()
    };
    for price in targets.iter().filter_map(|target| target.price) {
        let read = price
            .cache_write_per_million_usd
            .unwrap_or(0.0)
            .max(price.input_per_million_usd);
        terms.input_token_usd = terms.input_token_usd.max(read / 1e6);
        terms.output_token_usd = terms
            .output_token_usd
            .max(price.output_per_million_usd / 1e6);
    }
    terms
}

/// Sends what `body` makes, and again in another way while the endpoint refuses a part of it that can be left out.
async fn post(
    target: &Target,
    deadline: Instant,
    own: bool,
    body: impl Fn() -> Value,
) -> Result<Answer, TryError> {
    let mut adapted = 0;
    loop {
        let body = body();
        let error = match target.endpoint.post(&body, deadline).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        adapted += 1;
        let status = error.status.unwrap_or_default();
        let learned = target.endpoint.teach(&target.model, |quirks| {
            quirks.learn(status, &error.message, &body, own)
        });
        if !learned || adapted > MAX_ADAPTATIONS {
            return Err(error);
        }
        debug!(
            endpoint = target.endpoint.shown(),
            model = target.model,
            status,
            "the endpoint refuses a part of the question; asking without it"
        );
    }
}

/// Reads a stream to its end, unless it goes on beyond what was set aside for it. `progressed` is called whenever something came that is paid for.
async fn collect(
    mut answer: Answer,
    first: Vec<String>,
    most: Tokens,
    mut progressed: impl FnMut(&Completion),
) -> Result<Completion, TryError> {
    let mut completion = Completion::default();
    let mut done = false;
    let mut written = 0;
    let mut events = Some(first);
    while let Some(batch) = events.take().filter(|_| !done) {
        for data in batch {
            if data.trim() == "[DONE]" {
                done = true;
                break;
            }
            // What is not JSON is a sign of life, not a part of the answer.
            if let Ok(chunk) = serde_json::from_str::<Value>(&data) {
                if completion.absorb(&chunk) {
                    progressed(&completion);
                }
                failed(&completion)?;
                written += wire::written(&chunk);
                let counted = completion.tokens.map(|tokens| tokens.output);
                // What has ended by itself is read, however long it is: it is paid for.
                if completion.finish.is_none() && wire::is_beyond(most.output, counted, written) {
                    return Err(TryError::lasting(format!(
                        "it pays no heed to the limit of {} tokens that it was given; the answer was cut off",
                        most.output
                    )));
                }
            }
        }
        if completion.finish.is_some() {
            answer.finished();
        }
        if !done {
            events = answer.events().await?;
        }
    }
    if done || completion.finish.is_some() {
        Ok(completion)
    } else {
        Err(TryError::transport(
            "its stream ended before the answer did",
        ))
    }
}

fn whole(body: &Value) -> Result<Completion, TryError> {
    let completion = Completion::from_body(body)
        .ok_or_else(|| TryError::transport("its answer is JSON, but no chat completion"))?;
    failed(&completion)?;
    Ok(completion)
}

/// An error that came with status 200.
fn failed(completion: &Completion) -> Result<(), TryError> {
    match &completion.error {
        None => Ok(()),
        Some((message, code)) => Err(TryError {
            message: format!("it broke off: {message}"),
            status: *code,
            retryable: code.is_none_or(is_passing),
            retry_after: None,
        }),
    }
}

async fn wait_before_next_try(backoff: &mut Backoff, target: &Target, error: &TryError) -> bool {
    let Some(wait) = backoff.next(error) else {
        return false;
    };
    warn!(
        endpoint = target.endpoint.shown(),
        model = target.model,
        failed_tries = backoff.failed(),
        wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX),
        error = error.message,
        "a model gave no answer; trying again"
    );
    tokio::time::sleep(wait).await;
    true
}

/// What every model of a chain said.
#[derive(Default)]
struct Failures {
    texts: Vec<String>,
    endpoint: String,
    status: Option<u16>,
    retryable: bool,
}

impl Failures {
    fn push(&mut self, target: &Target, error: &TryError, tries: u32) {
        let tries = if tries > 1 {
            format!(", after {tries} tries")
        } else {
            String::new()
        };
        target.endpoint.shown().clone_into(&mut self.endpoint);
        self.texts
            .push(format!("{} (model {}{tries})", error.message, target.model));
        self.status = error.status;
        self.retryable |= error.retryable;
        warn!(
            endpoint = self.endpoint,
            model = target.model,
            error = error.message,
            "a model gave no answer"
        );
    }

    fn into_error(self) -> ModelError {
        ModelError::Unavailable {
            endpoint: self.endpoint,
            message: self.texts.join("; then "),
            status: self.status,
            retryable: self.retryable,
        }
    }
}
