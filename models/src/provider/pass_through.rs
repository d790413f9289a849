//! A stream that goes through to a worker while it is metered.
//!
//! The stream is read by a task of its own: when a worker goes away in the middle, what came until then is still counted.

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::{self, BoxStream};
use ports::{ModelError, WorkerAnswer, WorkerCall};
use serde_json::Value;
use tokio::sync::mpsc;
use tracing::{Instrument, Span, warn};

use super::broken::{broke_off, too_long};
use super::{Provider, failed};
use crate::account::note_usage;
use crate::backoff::TryError;
use crate::budget::Reservation;
use crate::config::{Price, priced};
use crate::endpoint::Answer;
use crate::sse;
use crate::wire::{self, Completion, Tokens};

/// Events that wait for a slow worker.
const CHANNEL: usize = 32;

/// A whole answer in the form that the worker asked for.
pub(super) fn whole(request: &Value, body: Value) -> WorkerAnswer {
    if wire::wants_stream(request) {
        let events = wire::body_to_events(&body, wire::wants_usage(request));
        WorkerAnswer::Stream(stream::iter(events.into_iter().map(Ok)).boxed())
    } else {
        WorkerAnswer::Json(body)
    }
}

/// What is needed to pass a stream on and to count it at its end.
pub(super) struct Pump {
    pub provider: Provider,
    pub call: WorkerCall,
    pub model: String,
    pub price: Option<Price>,
    pub shown: String,
    pub most: Tokens,
    pub reservation: Reservation,
}

impl Pump {
    pub fn start(
        self,
        answer: Answer,
        first: Vec<String>,
    ) -> BoxStream<'static, Result<Bytes, ModelError>> {
        let (sender, mut receiver) = mpsc::channel(CHANNEL);
        tokio::spawn(self.run(answer, first, sender).instrument(Span::current()));
        stream::poll_fn(move |context| receiver.poll_recv(context)).boxed()
    }

    async fn run(
        mut self,
        mut answer: Answer,
        first: Vec<String>,
        sender: mpsc::Sender<Result<Bytes, ModelError>>,
    ) {
        let mut completion = Completion::default();
        let ended = self
            .pass(&mut answer, first, &sender, &mut completion)
            .await;
        // Nothing more is read.
        drop(answer);
        let limit = self.most.output;
        if let Err(Broke::TooLong { written }) = &ended {
            self.most.output = limit.max(wire::estimate_tokens(*written));
        }
        // A stream that broke before anything came of it cost nothing that is known.
        if ended.is_ok() || completion.size() > 0 || completion.tokens.is_some() {
            let tokens = completion.tokens_or_estimate(self.most);
            let usage = priced(self.price.as_ref(), tokens.input, tokens.output);
            let spend = self.provider.worker_spend(&self.call, &self.model, usage);
            if let Err(error) = self.reservation.settle(&spend).await {
                warn!(project = %spend.project, %error, "a worker's call is not in the ledger");
                let _ = sender.send(Err(error)).await;
                return;
            }
            note_usage(&self.model, &usage);
        }
        let last = match ended {
            Ok(()) => Ok(sse::event("[DONE]")),
            Err(Broke::TooLong { .. }) => Err(too_long(self.shown, &self.model, limit)),
            Err(Broke::Failed(error)) => Err(broke_off(self.shown, &self.model, &error)),
        };
        // A worker that went away needs no end.
        let _ = sender.send(last).await;
    }

    /// Passes events on until the stream ends or the worker goes away.
    async fn pass(
        &self,
        answer: &mut Answer,
        first: Vec<String>,
        sender: &mpsc::Sender<Result<Bytes, ModelError>>,
        completion: &mut Completion,
    ) -> Result<(), Broke> {
        let mut written = 0;
        let with_usage = wire::wants_usage(&self.call.body);
        let mut events = Some(first);
        while let Some(batch) = events {
            for data in batch {
                if data.trim() == "[DONE]" {
                    return Ok(());
                }
                if let Ok(chunk) = serde_json::from_str::<Value>(&data) {
                    completion.absorb(&chunk);
                    failed(completion)?;
                    written += wire::written(&chunk);
                    let counted = completion.tokens.map(|tokens| tokens.output);
                    // One that has ended is whole, however long it is: it is paid for.
                    if completion.finish.is_none()
                        && wire::is_beyond(self.most.output, counted, written)
                    {
                        return Err(Broke::TooLong { written });
                    }
                    let choices = chunk.get("choices").and_then(Value::as_array);
                    if !with_usage && choices.is_none_or(Vec::is_empty) {
                        // The worker did not ask for the usage and may not know a chunk without a choice.
                        continue;
                    }
                }
                if sender.send(Ok(sse::event(&data))).await.is_err() {
                    return Ok(());
                }
            }
            if completion.finish.is_some() {
                answer.finished();
            }
            events = tokio::select! {
                events = answer.events() => events?,
                () = sender.closed() => return Ok(()),
            };
        }
        if completion.finish.is_some() {
            Ok(())
        } else {
            Err(Broke::Failed(TryError::transport(
                "its stream ended before the answer did",
            )))
        }
    }
}

/// Why a stream did not get to its end.
enum Broke {
    Failed(TryError),
    /// It went on beyond what was set aside for it.
    TooLong {
        written: usize,
    },
}

impl From<TryError> for Broke {
    fn from(error: TryError) -> Self {
        Self::Failed(error)
    }
}
