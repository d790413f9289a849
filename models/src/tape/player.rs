//! A tape in a model's place: the same ports, the same ledger, the same budget.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use ports::{
    Ledger, ModelAnswer, ModelCall, ModelError, Models, Role, Speaker, Usage, WorkerAnswer,
    WorkerCall, WorkerModels,
};
use tracing::Instrument;
use uuid::Uuid;

use super::{Entry, Question, Tape};
use crate::account::{WorkerKeys, call_span, crew_spend, note_usage, worker_span, worker_spend};
use crate::budget::{Budgets, Estimate};
use crate::config::BudgetLimits;
use crate::wire::{self, Completion, Tokens, ToolCall};

/// Answers from a tape. Cheap to clone.
#[derive(Clone)]
pub struct Player {
    shared: Arc<Shared>,
}

struct Shared {
    tape: Tape,
    model: String,
    budgets: Budgets,
    worker_keys: WorkerKeys,
}

impl Player {
    /// Takes the tape, the ledger, and the limits of projects whose owners set none. A tape has no price: it counts tokens.
    pub fn new(tape: Tape, ledger: Arc<dyn Ledger>, limits: BudgetLimits) -> Self {
        Self {
            shared: Arc::new(Shared {
                model: format!("tape:{}", tape.name()),
                tape,
                budgets: Budgets::new(ledger, limits),
                worker_keys: WorkerKeys::default(),
            }),
        }
    }

    /// The tape.
    pub fn tape(&self) -> &Tape {
        &self.shared.tape
    }

    fn find(&self, question: &Question<'_>) -> Result<&Entry, ModelError> {
        self.shared.tape.find(question).map_err(|hint| {
            ModelError::NotOnTape {
                tape: self.shared.tape.name().to_owned(),
                role: question.role,
                thread: question.thread.to_owned(),
                turn: question.turn,
                hint: format!("{hint}; a tape only knows the run that it recorded: use a model, or record this run with --record FILE"),
            }
        })
    }

    async fn wait(&self) {
        let delay = self.shared.tape.delay_ms();
        if delay > 0 {
            tokio::time::sleep(Duration::from_millis(delay)).await;
        }
    }

    async fn answer(&self, call: &ModelCall) -> Result<ModelAnswer, ModelError> {
        let last = |speaker| {
            let messages = call.messages.iter();
            messages
                .rev()
                .find(|message| message.speaker == speaker)
                .map_or("", |message| message.text.as_str())
        };
        let entry = self.find(&Question {
            role: call.role,
            thread: &call.thread,
            turn: call.turn,
            last_user: last(Speaker::User),
            last_assistant: last(Speaker::Assistant),
        })?;
        let asked: usize = call.messages.iter().map(|message| message.text.len()).sum();
        let usage = usage(entry, asked);
        let reservation = self.shared.budgets.reserve(&call.project, estimate(&usage));
        let reservation = reservation.await?;
        self.wait().await;
        let spend = crew_spend(call, call.key.clone(), &self.shared.model, usage);
        reservation.settle(&spend).await?;
        note_usage(&self.shared.model, &usage);
        Ok(ModelAnswer {
            text: entry.text.clone(),
            model: self.shared.model.clone(),
            usage,
            from_tape: true,
        })
    }

    async fn complete(&self, call: &WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError> {
        let turn = wire::assistant_messages(&call.body);
        let entry = self.find(&Question {
            role: Role::Developer,
            thread: &call.thread,
            turn,
            last_user: &wire::last_text(&call.body, "user"),
            // Workers' answers are not repaired: what they said last belongs to an earlier turn.
            last_assistant: "",
        })?;
        let usage = usage(entry, call.body.to_string().len());
        let reservation = self.shared.budgets.reserve(&call.project, estimate(&usage));
        let reservation = reservation.await?;
        self.wait().await;
        let key = self.shared.worker_keys.take(call);
        let spend = worker_spend(call, key, &self.shared.model, usage);
        reservation.settle(&spend).await?;
        note_usage(&self.shared.model, &usage);
        Ok((self.on_the_wire(call, turn, entry, usage), usage))
    }

    /// The entry as an endpoint would send it, with ids that are the same each time.
    fn on_the_wire(
        &self,
        call: &WorkerCall,
        turn: u32,
        entry: &Entry,
        usage: Usage,
    ) -> WorkerAnswer {
        let id = |what: &str| {
            let name = format!("{}/{}/{turn}/{what}", self.shared.model, call.thread);
            Uuid::new_v5(&Uuid::NAMESPACE_OID, name.as_bytes()).simple()
        };
        let tool_calls: Vec<_> = entry
            .tool_calls
            .iter()
            .enumerate()
            .map(|(index, tool)| ToolCall {
                id: format!("call_{}", id(&index.to_string())),
                ..tool.clone()
            })
            .collect();
        let finish = if tool_calls.is_empty() {
            "stop"
        } else {
            "tool_calls"
        };
        let completion = Completion {
            text: entry.text.clone(),
            tool_calls,
            finish: Some(finish.to_owned()),
            tokens: Some(Tokens {
                input: usage.input_tokens,
                output: usage.output_tokens,
            }),
            ..Completion::default()
        };
        let created = jiff::Timestamp::now().as_second();
        let id = format!("chatcmpl-{}", id("answer"));
        let body = completion.to_body(&id, created, &self.shared.model);
        if wire::wants_stream(&call.body) {
            let events = wire::body_to_events(&body, wire::wants_usage(&call.body));
            WorkerAnswer::Stream(futures::stream::iter(events.into_iter().map(Ok)).boxed())
        } else {
            WorkerAnswer::Json(body)
        }
    }
}

/// The tape's count, or one by the size of question and answer.
fn usage(entry: &Entry, asked_bytes: usize) -> Usage {
    let tokens = entry.tokens.unwrap_or_else(|| {
        let calls = entry.tool_calls.iter();
        let answered = entry.text.len() + calls.map(|call| call.arguments.len()).sum::<usize>();
        Tokens {
            input: (asked_bytes as u64).div_ceil(4),
            output: (answered as u64).div_ceil(4),
        }
    });
    Usage {
        input_tokens: tokens.input,
        output_tokens: tokens.output,
        cost_usd: None,
    }
}

fn estimate(usage: &Usage) -> Estimate {
    Estimate {
        tokens: usage.input_tokens.saturating_add(usage.output_tokens),
        cost_usd: None,
    }
}

#[async_trait]
impl Models for Player {
    async fn ask(&self, call: &ModelCall) -> Result<ModelAnswer, ModelError> {
        self.answer(call).instrument(call_span(call)).await
    }

    fn tape(&self) -> Option<String> {
        Some(self.shared.tape.name().to_owned())
    }
}

#[async_trait]
impl WorkerModels for Player {
    async fn complete(&self, call: WorkerCall) -> Result<(WorkerAnswer, Usage), ModelError> {
        let span = worker_span(&call);
        self.complete(&call).instrument(span).await
    }
}
