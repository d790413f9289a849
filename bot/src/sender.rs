//! Delivers the outbox. What is to be said is a projection of the journal; what was delivered is kept apart, so that nothing
//! is said twice. Telegram has no idempotency key: should we die between its acceptance and our record of it, that one
//! message comes twice.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use ports::{Audience, PersonId};
use store::{Delivery, IntentKind, NewButton};

use crate::api::{self, Button};
use crate::{Error, FRONT, PATIENCE, Shared, backoff, markdown};

/// Deliveries that are taken together.
const BATCH: usize = 20;
/// How long a button can be pressed: longer than anybody thinks about a question.
const BUTTON_LIFE: SignedDuration = SignedDuration::from_hours(24 * 30);
/// How many buttons stand beside each other.
const ROW: usize = 2;

/// Delivers until the end.
pub(crate) async fn run(shared: &Shared) -> Result<(), Error> {
    let mut failures = 0;
    while !shared.shutdown.is_cancelled() {
        match shared.store.next_deliveries(FRONT, BATCH).await {
            Ok(deliveries) if deliveries.is_empty() => {
                failures = 0;
                tokio::select! {
                    () = shared.shutdown.cancelled() => {}
                    () = shared.outbox.notified() => {}
                    () = tokio::time::sleep(PATIENCE) => {}
                }
            }
            Ok(deliveries) => {
                for delivery in deliveries {
                    if let Err(error) = deliver(shared, &delivery).await {
                        tracing::error!(intent = delivery.intent, %error, "a delivery could not be recorded");
                        failures += 1;
                        shared.pause(backoff(failures)).await;
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "the outbox cannot be read");
                failures += 1;
                shared.pause(backoff(failures)).await;
            }
        }
    }
    Ok(())
}

async fn deliver(shared: &Shared, delivery: &Delivery) -> Result<(), store::Error> {
    let Ok(chat) = delivery.chat.parse::<i64>() else {
        return shared
            .store
            .delivery_failed(delivery, "the chat's id is no number")
            .await;
    };
    let buttons = buttons(shared, delivery).await?;
    match transmit(shared, chat, delivery, &buttons).await {
        Ok(message) => {
            shared
                .store
                .delivery_sent(delivery, &message.to_string())
                .await
        }
        Err(api::Error::RetryAfter { seconds }) => {
            let pause = Duration::from_secs(seconds.clamp(1, 3600));
            shared
                .store
                .retry_delivery(delivery, pause, "the server asked to wait")
                .await
        }
        Err(
            error @ (api::Error::Unreachable { .. }
            | api::Error::Conflict
            | api::Error::Unauthorized),
        ) => {
            tracing::warn!(chat, %error, "a message waits for the server");
            shared
                .store
                .retry_delivery(delivery, backoff(delivery.attempts), &error.to_string())
                .await
        }
        Err(error) => {
            tracing::warn!(chat, intent = delivery.intent, %error, "a message was refused");
            shared
                .store
                .delivery_failed(delivery, &error.to_string())
                .await
        }
    }
}

/// Sends or edits; the id of the message that now shows it.
async fn transmit(
    shared: &Shared,
    chat: i64,
    delivery: &Delivery,
    buttons: &[Vec<Button>],
) -> Result<i64, api::Error> {
    let mut pieces = markdown::to_messages(&text(delivery));
    let last = pieces.pop().unwrap_or_default();
    if let Some(message) = delivery
        .message_id
        .as_ref()
        .and_then(|id| id.parse::<i64>().ok())
    {
        match shared.api.edit(chat, message, &last, buttons).await {
            Ok(()) => return Ok(message),
            // Somebody deleted it, or it is too old to be edited: say it anew.
            Err(api::Error::Refused { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    for piece in pieces {
        shared.api.send(chat, &piece, &[]).await?;
    }
    shared.api.send(chat, &last, buttons).await
}

fn text(delivery: &Delivery) -> String {
    let mut text = delivery.text.clone();
    match (&delivery.kind, &delivery.wait) {
        (IntentKind::Question, Some(wait)) if !wait.open => {
            let answer = match &wait.answer {
                Some(answer) => wait
                    .options
                    .iter()
                    .find(|option| option.value == *answer)
                    .map_or(answer.as_str(), |option| option.label.as_str()),
                None => "withdrawn",
            };
            text.push_str(&format!("\n\n**→ {answer}**"));
        }
        (IntentKind::Notice, _) if delivery.times > 1 => {
            text.push_str(&format!("\n\n({} times)", delivery.times));
        }
        _ => {}
    }
    text
}

/// The buttons of a question that is still open, stored before they are shown.
async fn buttons(shared: &Shared, delivery: &Delivery) -> Result<Vec<Vec<Button>>, store::Error> {
    let Some(wait) = delivery.wait.as_ref().filter(|wait| wait.open) else {
        return Ok(Vec::new());
    };
    let owner = match wait.audience {
        Audience::Owner => shared
            .store
            .project(&wait.project)
            .await?
            .and_then(|project| project.owner),
        Audience::Admins => None,
    };
    // Somebody who founded it elsewhere has no name here; then whoever may talk to the bot may press.
    let owner: Option<PersonId> = owner.filter(|owner| owner.as_str().starts_with("telegram:"));
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
            label: option.label.clone(),
            token: stored.token,
        });
    }
    Ok(buttons.chunks(ROW).map(<[Button]>::to_vec).collect())
}
