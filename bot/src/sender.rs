//! Delivers the outbox. What is to be said is a projection of the journal; what was delivered is kept apart, so that nothing
//! is said twice. Telegram has no idempotency key: should we die between its acceptance and our record of it, that one
//! message comes twice.
//!
//! A text that needs several messages is recorded after each of them: the delivery's message id is a list of them, divided by
//! commas, and an edit changes each one in its place.

use std::fmt::Write as _;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use ports::{Audience, PersonId};
use store::{Delivery, IntentKind, NewButton};
use tokio::task::JoinSet;

use crate::api::{self, Button};
use crate::{Error, FRONT, GRACE, Shared, handlers, markdown};

/// Deliveries that are under way at the same time, each in a chat of its own.
const AT_ONCE: usize = 20;
/// How long a button can be pressed: longer than anybody thinks about a question.
const BUTTON_LIFE: SignedDuration = SignedDuration::from_hours(24 * 30);
/// How many buttons stand beside each other.
const ROW: usize = 2;
/// How often the record of a delivery is tried: without it the message is sent once more.
const RECORD_TRIES: u32 = 4;
/// The longest pause that a server gets when it asks for patience.
const LONGEST: Duration = Duration::from_hours(1);
/// Questions whose buttons are remembered until they are shown.
const REMEMBERED: usize = 200;

/// Delivers until the end.
pub(crate) async fn run(shared: &Shared) -> Result<(), Error> {
    let mut under_way = JoinSet::new();
    let mut failures = 0;
    while !shared.shutdown.is_cancelled() {
        let free = AT_ONCE.saturating_sub(under_way.len());
        if free > 0 {
            match shared.store.next_deliveries(FRONT, free).await {
                Ok(deliveries) => {
                    failures = 0;
                    for delivery in deliveries {
                        let shared = shared.clone();
                        under_way.spawn(async move { deliver(&shared, &delivery).await });
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "the outbox cannot be read");
                    failures += 1;
                    shared.pause(shared.backoff(failures)).await;
                }
            }
        }
        tokio::select! {
            () = shared.shutdown.cancelled() => {}
            () = shared.outbox.notified() => {}
            Some(_) = under_way.join_next() => {}
            () = tokio::time::sleep(shared.patience) => {}
        }
    }
    // What is on its way gets the time to be recorded.
    let rest = async { while under_way.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(GRACE, rest).await;
    Ok(())
}

async fn deliver(shared: &Shared, delivery: &Delivery) {
    let outcome = match delivery.chat.parse::<i64>() {
        Ok(chat) => match buttons(shared, delivery).await {
            Ok(buttons) => transmit(shared, chat, delivery, &buttons).await,
            Err(error) => {
                // The delivery is ours for a minute; then it is taken anew.
                tracing::error!(intent = delivery.intent, %error, "the buttons of a question could not be stored");
                return;
            }
        },
        Err(_) => Err(api::Error::Refused {
            code: 400,
            message: "the chat's id is no number".to_owned(),
        }),
    };
    if outcome.is_ok() {
        shared.buttons.lock().remove(&key_of(delivery));
    }
    let mut tries = 0;
    while let Err(error) = record(shared, delivery, &outcome).await {
        tracing::error!(intent = delivery.intent, %error, "a delivery could not be recorded");
        tries += 1;
        if tries == RECORD_TRIES || !shared.pause(shared.backoff(tries)).await {
            return;
        }
    }
    if let Err(error) = &outcome
        && is_final(error)
        && delivery.audience == Audience::Owner
    {
        let text = format!(
            "Telegram does not take messages for the chat {}, so its people do not hear of the project {}: {error}",
            delivery.chat, delivery.project
        );
        let fingerprint = format!("telegram.refused:{}", delivery.chat);
        shared.notice(&fingerprint, &text).await;
    }
}

fn is_final(error: &api::Error) -> bool {
    !matches!(
        error,
        api::Error::RetryAfter { .. }
            | api::Error::Unreachable { .. }
            | api::Error::Conflict { .. }
            | api::Error::Unauthorized
    )
}

/// Records what became of a delivery.
async fn record(
    shared: &Shared,
    delivery: &Delivery,
    outcome: &Result<String, api::Error>,
) -> Result<(), store::Error> {
    let chat = &delivery.chat;
    match outcome {
        Ok(messages) => shared.store.delivery_sent(delivery, messages).await,
        Err(error) if is_final(error) => {
            tracing::warn!(chat, intent = delivery.intent, %error, "a message was refused");
            shared
                .store
                .delivery_failed(delivery, &error.to_string())
                .await
        }
        Err(error) => {
            let pause = match error {
                api::Error::RetryAfter { seconds } => {
                    Duration::from_secs((*seconds).max(1)).min(LONGEST)
                }
                _ => shared.backoff(delivery.attempts),
            };
            tracing::warn!(chat, %error, "a message waits for the server");
            shared
                .store
                .retry_delivery(delivery, pause, &error.to_string())
                .await
        }
    }
}

/// Sends or edits; the ids of the messages that show it now.
async fn transmit(
    shared: &Shared,
    chat: i64,
    delivery: &Delivery,
    buttons: &[Vec<Button>],
) -> Result<String, api::Error> {
    let pieces = markdown::to_messages(&text(delivery));
    let shown = delivery.message_id.as_deref().unwrap_or_default();
    let mut shown: Vec<i64> = shown.split(',').filter_map(|id| id.parse().ok()).collect();
    let last = pieces.len() - 1;
    for (at, piece) in pieces.iter().enumerate() {
        let buttons = if at == last { buttons } else { &[] };
        if let Some(message) = shown.get(at) {
            match shared.api.edit(chat, *message, piece, buttons).await {
                Ok(()) => continue,
                // Somebody deleted it, or it is too old to be edited: say it anew.
                Err(api::Error::Gone { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let message = shared.api.send(chat, piece, buttons).await?;
        match shown.get_mut(at) {
            Some(gone) => *gone = message,
            None => shown.push(message),
        }
        if at < last
            && let Err(error) = shared
                .store
                .delivery_progress(delivery, &joined(&shown))
                .await
        {
            tracing::error!(intent = delivery.intent, %error, "a part of a delivery could not be recorded");
        }
    }
    // The text became shorter.
    for message in shown.drain(pieces.len()..) {
        if let Err(error) = shared.api.delete(chat, message).await {
            tracing::debug!(chat, %error, "the end of an old text stays");
        }
    }
    Ok(joined(&shown))
}

fn joined(messages: &[i64]) -> String {
    let ids: Vec<String> = messages.iter().map(ToString::to_string).collect();
    ids.join(",")
}

fn text(delivery: &Delivery) -> String {
    let mut text = delivery.text.clone();
    let _ = match (&delivery.kind, &delivery.wait) {
        (IntentKind::Question, Some(wait)) if !wait.open => {
            let answer = match &wait.answer {
                Some(answer) => wait
                    .options
                    .iter()
                    .find(|option| option.value == *answer)
                    .map_or(answer.as_str(), |option| option.label.as_str()),
                None => "withdrawn",
            };
            write!(text, "\n\n**→ {answer}**")
        }
        (IntentKind::Notice, _) if delivery.times > 1 => {
            write!(text, "\n\n({} times)", delivery.times)
        }
        _ => Ok(()),
    };
    text
}

fn key_of(delivery: &Delivery) -> (String, i64) {
    (delivery.intent.clone(), delivery.revision)
}

/// The buttons of a question that is still open, stored before they are shown. A question that is tried again shows the same.
async fn buttons(shared: &Shared, delivery: &Delivery) -> Result<Vec<Vec<Button>>, store::Error> {
    let Some(wait) = delivery.wait.as_ref().filter(|wait| wait.open) else {
        return Ok(Vec::new());
    };
    let made = shared.buttons.lock().get(&key_of(delivery)).cloned();
    if let Some(made) = made {
        return Ok(made);
    }
    let owner: Option<PersonId> = match wait.audience {
        Audience::Owner => handlers::owner(shared, &wait.project).await?,
        Audience::Admins => None,
    };
    let mut buttons = Vec::with_capacity(wait.options.len());
    for option in &wait.options {
        let stored = shared
            .store
            .new_button(&NewButton {
                wait: &wait.id,
                choice: &option.value,
                audience: wait.audience,
                owner: owner.as_ref(),
                revision: delivery.revision,
                expires_at: Timestamp::now() + BUTTON_LIFE,
            })
            .await?;
        buttons.push(Button {
            label: ports::plain(&option.label),
            token: stored.token,
        });
    }
    let rows: Vec<Vec<Button>> = buttons.chunks(ROW).map(<[Button]>::to_vec).collect();
    let mut remembered = shared.buttons.lock();
    if remembered.len() >= REMEMBERED {
        remembered.clear();
    }
    remembered.insert(key_of(delivery), rows.clone());
    Ok(rows)
}
