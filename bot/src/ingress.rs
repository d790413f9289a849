//! Takes updates in. An update is stored as it came, under its unique id, before the next poll tells the server that it may
//! forget it. The one exception is a message that carries a secret: its value goes into the vault and is nowhere else.

use ports::{Plaintext, ProjectId};
use serde_json::{Value, json};
use store::{Standing, Stored};

use crate::api::{self, Update};
use crate::update::{self, Sender, Wants};
use crate::{Error, FRONT, Shared, backoff, person};

/// The member that ingress adds to the update of a secret, with what became of it.
pub(crate) const SECRET_OUTCOME: &str = "artel_secret";

/// Polls until the end.
pub(crate) async fn run(shared: &Shared) -> Result<(), Error> {
    let mut offset = shared
        .store
        .last_update_id(FRONT)
        .await?
        .map_or(0, |last| last + 1);
    let mut failures = 0;
    loop {
        let answer = tokio::select! {
            () = shared.shutdown.cancelled() => return Ok(()),
            answer = shared.api.updates(offset) => answer,
        };
        let pause = match answer {
            Ok(updates) => match take_in(shared, &updates).await {
                Ok(next) => {
                    offset = next.unwrap_or(offset);
                    failures = 0;
                    continue;
                }
                Err(error) => {
                    // Not acknowledged, so the server keeps them for us.
                    tracing::error!(%error, "updates could not be stored; they are asked for again");
                    backoff(failures)
                }
            },
            Err(error @ (api::Error::Unauthorized | api::Error::Refused { .. })) => {
                return Err(error.into());
            }
            Err(api::Error::RetryAfter { seconds }) => {
                std::time::Duration::from_secs(seconds.min(300))
            }
            Err(error) => {
                tracing::warn!(%error, "no updates");
                backoff(failures)
            }
        };
        failures += 1;
        if !shared.pause(pause).await {
            return Ok(());
        }
    }
}

/// Stores updates; the next offset.
async fn take_in(shared: &Shared, updates: &[Update]) -> Result<Option<i64>, store::Error> {
    let mut next = None;
    for update in updates {
        let kept = match update::read(&update.raw) {
            Some((sender, Wants::Command { name, rest, .. })) if name == "secret" => {
                without_the_secret(shared, update, &sender, &rest).await?
            }
            _ => update.raw.clone(),
        };
        if shared.store.store_update(FRONT, update.id, &kept).await? == Stored::New {
            shared.arrived.notify_one();
        }
        next = Some(update.id + 1);
    }
    Ok(next)
}

/// Puts the value of `/secret NAME VALUE` into the vault and gives the update without it.
async fn without_the_secret(
    shared: &Shared,
    update: &Update,
    sender: &Sender,
    rest: &str,
) -> Result<String, store::Error> {
    let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    let outcome = if value.trim().is_empty() {
        json!({"asked": name})
    } else {
        match secret_of(shared, sender).await? {
            Err(why) => json!({"refused": why}),
            Ok(project) => {
                let value = Plaintext::new(value.trim().to_owned());
                match shared
                    .desk
                    .set_secret(&project, name, value, &person(sender.user))
                    .await
                {
                    Ok(()) => json!({"stored": name}),
                    Err(failure) => json!({"refused": failure.message}),
                }
            }
        }
    };
    let mut kept: Value = serde_json::from_str(&update.raw).unwrap_or_default();
    for field in ["text", "caption"] {
        if kept["message"].get(field).is_some() {
            kept["message"][field] = json!("/secret");
        }
    }
    // What it is a reply to, and how it is formatted, may quote it.
    if let Some(message) = kept["message"].as_object_mut() {
        for field in [
            "entities",
            "caption_entities",
            "quote",
            "reply_to_message",
            "link_preview_options",
        ] {
            message.remove(field);
        }
    }
    kept[SECRET_OUTCOME] = outcome;
    Ok(kept.to_string())
}

/// The project that a chat's secret belongs to, if this person may give it one.
async fn secret_of(
    shared: &Shared,
    sender: &Sender,
) -> Result<Result<ProjectId, &'static str>, store::Error> {
    let allowed = shared
        .store
        .person(&person(sender.user))
        .await?
        .is_some_and(|known| matches!(known.standing, Standing::Allowed | Standing::Admin));
    if !allowed {
        return Ok(Err(
            "it was not stored, because you are not paired with this bot",
        ));
    }
    let chat = shared.store.chat(FRONT, &sender.chat.to_string()).await?;
    Ok(chat
        .and_then(|chat| chat.project)
        .ok_or("it was not stored, because this chat has no project yet: choose one with /project NAME and send it again"))
}
