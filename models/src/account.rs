//! What a call stands under: its line of the ledger and its span. The same for models and tapes.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use ports::{ModelCall, Role, Spend, Usage, WorkerCall, threads};
use tracing::{Span, debug, field::Empty, info_span};

use crate::wire::{self, Tokens};

/// The keys under which workers' calls stand in the ledger: `{request}:{turn}`, and `{request}:{turn}.2` and so on when a
/// worker asks again at the same turn, because that is paid again.
#[derive(Default)]
pub(crate) struct WorkerKeys {
    taken: Mutex<HashMap<String, HashMap<u32, u32>>>,
}

impl WorkerKeys {
    /// More workers than ever run together; beyond, what ended long ago is forgotten with the rest.
    const MAX_REQUESTS: usize = 4096;

    /// The key of a call that is about to be counted.
    pub fn take(&self, call: &WorkerCall) -> String {
        let (request, turn) = (call.request.as_str(), wire::assistant_messages(&call.body));
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.len() >= Self::MAX_REQUESTS && !taken.contains_key(request) {
            taken.clear();
        }
        let count = taken
            .entry(request.to_owned())
            .or_default()
            .entry(turn)
            .or_default();
        *count += 1;
        match *count {
            1 => format!("{request}:{turn}"),
            more => format!("{request}:{turn}.{more}"),
        }
    }
}

/// The line of the ledger for a worker's call.
pub(crate) fn worker_spend(call: &WorkerCall, id: String, model: &str, usage: Usage) -> Spend {
    Spend {
        id,
        project: call.project.clone(),
        job: Some(call.job.clone()),
        task: Some(call.task.clone()),
        role: Role::Developer,
        model: model.to_owned(),
        usage,
    }
}

/// The line of the ledger for a call of the crew's own.
pub(crate) fn crew_spend(call: &ModelCall, id: String, model: &str, usage: Usage) -> Spend {
    Spend {
        id,
        project: call.project.clone(),
        job: call.job.clone(),
        task: call.task.clone(),
        role: call.role,
        model: model.to_owned(),
        usage,
    }
}

/// What a try took that came to no answer is paid as well, each time.
pub(crate) fn lost_key(key: &str) -> String {
    format!("{key}#lost-{}", uuid::Uuid::new_v4().simple())
}

/// What a question takes at most, by its text, its schema (which it may carry twice) and a little for each message.
pub(crate) fn at_most(call: &ModelCall, max_output_tokens: u32) -> Tokens {
    let text: usize = call
        .messages
        .iter()
        .map(|message| message.text.len() + 16)
        .sum();
    let schema = call
        .schema
        .as_ref()
        .map_or(0, |schema| 2 * schema.schema.to_string().len() + 200);
    Tokens {
        input: wire::estimate_tokens(text + schema),
        output: max_output_tokens.into(),
    }
}

/// The span of a call of the crew's own; it never holds what was asked or answered.
pub(crate) fn call_span(call: &ModelCall) -> Span {
    info_span!(
        "model_call",
        role = %call.role,
        project = %call.project,
        job = call.job.as_ref().map(ports::JobId::as_str),
        task = call.task.as_ref().map(ports::TaskId::as_str),
        thread = crew_thread(call),
        turn = call.turn,
        model = Empty,
        input_tokens = Empty,
        output_tokens = Empty,
        cost_usd = Empty,
    )
}

/// The full name of the thread that asks, as the engine's spans have it.
fn crew_thread(call: &ModelCall) -> String {
    match (&call.job, &call.task) {
        (Some(job), Some(task)) => threads::task(&call.project, job, task),
        (Some(job), None) => threads::job(&call.project, job),
        _ => threads::conversation(&call.project),
    }
}

/// The span of a worker's call.
pub(crate) fn worker_span(call: &WorkerCall) -> Span {
    info_span!(
        "model_call",
        role = %Role::Developer,
        project = call.project.as_str(),
        job = call.job.as_str(),
        task = call.task.as_str(),
        request = call.request.as_str(),
        thread = threads::task(&call.project, &call.job, &call.task),
        turn = wire::assistant_messages(&call.body),
        model = Empty,
        input_tokens = Empty,
        output_tokens = Empty,
        cost_usd = Empty,
    )
}

/// Completes the current span.
pub(crate) fn note_usage(model: &str, usage: &Usage) {
    let span = Span::current();
    span.record("model", model);
    span.record("input_tokens", usage.input_tokens);
    span.record("output_tokens", usage.output_tokens);
    if let Some(cost) = usage.cost_usd {
        span.record("cost_usd", cost);
    }
    debug!(
        model,
        usage.input_tokens, usage.output_tokens, "a model answered"
    );
}
