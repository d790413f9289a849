//! Takes updates in. An update is stored as it came, under its unique id, before the next poll tells the server that it may
//! forget it. The one exception is what must not be kept: the value of a secret goes into the vault and is nowhere else, and
//! what looks like one is thrown away. The update is stored without it, with a member that says what became of it.

use std::time::Duration;

use ports::{Failure, Plaintext, ProjectId, WaitKind};
use serde_json::{Value, json};
use store::{Standing, Stored, WaitRow};
use tokio::time::Instant;

use crate::api::{self, Update};
use crate::private::{self, asked_names, is_name};
use crate::update::{self, Me, Sender, Wants};
use crate::{Error, FRONT, Shared, person};

/// The member that ingress adds to the update of a secret, with what became of it.
pub(crate) const SECRET_OUTCOME: &str = "artel_secret";

/// Polls in a row that may say that the token is unknown: a server that just starts says so of every token.
const TRIES_OF_TOKEN: u32 = 3;
/// Polls in a row that may meet another program's, before an admin hears of it: a restart meets the one before it.
const CONFLICTS: u32 = 3;
/// How long a secret waits for earlier messages of its chat, which may choose the project that it is for.
const BEFORE_IT: Duration = Duration::from_secs(20);
/// How long the vault may take for one secret, and how often it is tried.
const VAULT: Duration = Duration::from_secs(20);
const VAULT_TRIES: u32 = 3;
/// Updates that are looked through for such messages.
const PENDING: u64 = 500;

/// Polls until the end.
pub(crate) async fn run(shared: &Shared) -> Result<(), Error> {
    // From the first one that the server has: what we stored before is known by its id. An offset remembered from yesterday
    // would throw updates away when the server counts anew.
    let mut offset = 0;
    let (mut failures, mut unknown, mut conflicts) = (0, 0, 0);
    loop {
        let asked = Instant::now();
        let answer = tokio::select! {
            () = shared.shutdown.cancelled() => return Ok(()),
            answer = shared.api.updates(offset) => answer,
        };
        let pause = match answer {
            Ok(updates) => {
                (unknown, conflicts) = (0, 0);
                match take_in(shared, &updates, &mut offset).await {
                    Ok(new) => {
                        failures = 0;
                        // A server that does not hold a poll open, or forgets nothing, is not asked without a pause.
                        if new == 0 && asked.elapsed() < shared.patience {
                            shared.patience
                        } else {
                            continue;
                        }
                    }
                    Err(error) => {
                        // Not acknowledged, so the server keeps them for us.
                        tracing::error!(%error, "updates could not be stored; they are asked for again");
                        shared.backoff(failures)
                    }
                }
            }
            Err(api::Error::Unauthorized) => {
                unknown += 1;
                if unknown >= TRIES_OF_TOKEN {
                    return Err(api::Error::Unauthorized.into());
                }
                shared.backoff(failures)
            }
            Err(api::Error::RetryAfter { seconds }) => Duration::from_secs(seconds.clamp(1, 300)),
            Err(error) => {
                tracing::warn!(%error, "no updates");
                if matches!(error, api::Error::Conflict { .. }) {
                    conflicts += 1;
                    if conflicts == CONFLICTS {
                        shared.notice("telegram.conflict", &error.to_string()).await;
                    }
                }
                shared.backoff(failures)
            }
        };
        failures += 1;
        if !shared.pause(pause).await {
            return Ok(());
        }
    }
}

/// Stores updates and moves the offset on; how many were new.
async fn take_in(
    shared: &Shared,
    updates: &[Update],
    offset: &mut i64,
) -> Result<usize, store::Error> {
    let mut new = 0;
    for update in updates {
        let kept = keepable(shared, update).await?;
        if shared.store.store_update(FRONT, update.id, &kept).await? == Stored::New {
            new += 1;
            shared.arrived.notify_one();
        }
        *offset = (*offset).max(update.id + 1);
    }
    Ok(new)
}

/// What of an update may be kept: all of it, as it came, unless it holds a secret.
async fn keepable(shared: &Shared, update: &Update) -> Result<String, store::Error> {
    let Ok(mut value) = serde_json::from_str::<Value>(&update.raw) else {
        // Nothing that we could read, so nothing for us; nor can it be searched for secrets.
        return Ok(json!({"update_id": update.id}).to_string());
    };
    let me = shared.me();
    if let Some((_, rest)) = private::secret_message(&value, &me) {
        let outcome = secret(shared, update.id, &value, &me, rest).await?;
        private::scrub(&mut value);
        private::blank(&mut value);
        value[SECRET_OUTCOME] = outcome;
        return Ok(value.to_string());
    }
    if let Some(name) = unasked_value(shared, &value, &me).await? {
        private::scrub(&mut value);
        private::blank(&mut value);
        value[SECRET_OUTCOME] = json!({"plain": name});
        return Ok(value.to_string());
    }
    if private::scrub(&mut value) {
        return Ok(value.to_string());
    }
    Ok(update.raw.clone())
}

/// Puts the value of `/secret NAME VALUE` into the vault, and says what became of it without naming anything but a name.
async fn secret(
    shared: &Shared,
    update: i64,
    value: &Value,
    me: &Me,
    rest: &str,
) -> Result<Value, store::Error> {
    // Read as the handlers will read it: with nothing in it, it is a command for us.
    let mut bare = value.clone();
    private::blank(&mut bare);
    let Some((sender, _)) = update::read(&bare, me) else {
        return Ok(json!({}));
    };
    if !may_give(shared, &sender).await? {
        return Ok(
            json!({"refused": "it was not stored, because you are not paired with this bot"}),
        );
    }
    let waits = secret_waits(shared, &sender).await?;
    let asked: Vec<&str> = waits.iter().flat_map(asked_names).collect();
    let (word, given) = private::name_and_value(rest);
    let known = asked.iter().find(|name| name.eq_ignore_ascii_case(word));
    let Some(name) = known.copied().or(is_name(word).then_some(word)) else {
        // The word may be the value itself: it is not repeated.
        return Ok(json!({"asked": asked.first(), "gone": !rest.is_empty()}));
    };
    if given.is_empty() {
        return Ok(match known {
            Some(name) => json!({"asked": name}),
            None => json!({"asked": asked.first(), "gone": true}),
        });
    }
    if asked.iter().any(|name| name.eq_ignore_ascii_case(given)) {
        return Ok(
            json!({"refused": "it was not stored, because the name comes first and then the value"}),
        );
    }
    if !settled(shared, update, &sender).await? {
        return Ok(
            json!({"refused": "it was not stored, because your earlier messages are still being worked on, and one of them may choose another project: send it again in a minute"}),
        );
    }
    let chat = shared.store.chat(FRONT, &sender.chat.to_string()).await?;
    let Some(project) = chat.and_then(|chat| chat.project) else {
        return Ok(
            json!({"refused": "it was not stored, because this chat has no project yet: choose one with /project NAME and send it again"}),
        );
    };
    Ok(match put(shared, &sender, &project, name, given).await {
        Ok(()) => json!({"stored": name}),
        Err(failure) => json!({"refused": format!("it was not stored: {}", failure.message)}),
    })
}

/// Tries a few times, as long as trying again may help.
async fn put(
    shared: &Shared,
    sender: &Sender,
    project: &ProjectId,
    name: &str,
    value: &str,
) -> ports::Result<()> {
    let mut tries = 0;
    loop {
        let by = person(sender.user);
        let value = Plaintext::new(value.to_owned());
        let stored = shared.desk.set_secret(project, name, value, &by);
        let failure = match tokio::time::timeout(VAULT, stored).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(failure)) => failure,
            Err(_) => {
                Failure::new("vault_slow", "the vault took too long: send it again").retryable()
            }
        };
        tries += 1;
        if !failure.retryable || tries == VAULT_TRIES || !shared.pause(shared.backoff(tries)).await
        {
            return Err(failure);
        }
    }
}

async fn may_give(shared: &Shared, sender: &Sender) -> Result<bool, store::Error> {
    let known = shared.store.person(&person(sender.user)).await?;
    Ok(known.is_some_and(|known| matches!(known.standing, Standing::Allowed | Standing::Admin)))
}

/// The open questions for secrets of the projects that a chat hears of.
async fn secret_waits(shared: &Shared, sender: &Sender) -> Result<Vec<WaitRow>, store::Error> {
    let mut waits = shared.store.open_waits(None).await?;
    waits.retain(|wait| wait.kind == WaitKind::Secret);
    if !waits.is_empty() {
        let chat = sender.chat.to_string();
        let projects = shared.store.chat_projects(FRONT, &chat).await?;
        waits.retain(|wait| projects.contains(&wait.project));
    }
    Ok(waits)
}

/// Waits, within a bound, until no earlier update of the chat can change the project that it talks about.
async fn settled(shared: &Shared, update: i64, sender: &Sender) -> Result<bool, store::Error> {
    let until = Instant::now() + BEFORE_IT;
    loop {
        let me = shared.me();
        let before = shared.store.unhandled_updates(FRONT, PENDING).await?;
        let pending = before
            .iter()
            .filter(|row| row.update_id < update)
            .any(|row| {
                let value: Value = serde_json::from_str(&row.raw).unwrap_or_default();
                match update::read(&value, &me) {
                    Some((earlier, Wants::Words { .. })) => earlier.chat == sender.chat,
                    Some((earlier, Wants::Command { name, .. })) => {
                        earlier.chat == sender.chat && matches!(name.as_str(), "new" | "project")
                    }
                    _ => false,
                }
            });
        if !pending {
            return Ok(true);
        }
        if Instant::now() > until || !shared.pause(Duration::from_millis(50)).await {
            return Ok(false);
        }
    }
}

/// The name of the secret that a plain message seems to hold, though it was asked for on the secret path; `None` inside when
/// several were asked for.
async fn unasked_value(
    shared: &Shared,
    value: &Value,
    me: &Me,
) -> Result<Option<Option<String>>, store::Error> {
    let edited;
    let value = if let Some(message) = value.get("edited_message") {
        edited = json!({"message": message});
        &edited
    } else {
        value
    };
    let Some((sender, Wants::Words { text, reply_to, .. })) = update::read(value, me) else {
        return Ok(None);
    };
    if !may_give(shared, &sender).await? {
        return Ok(None);
    }
    for wait in secret_waits(shared, &sender).await? {
        let choice = crate::handlers::choice_in(&wait.options, &text).is_some();
        let chat = sender.chat.to_string();
        let shown = shared.store.message_of_wait(FRONT, &chat, &wait.id).await?;
        let reply = reply_to.is_some_and(|id| {
            shown.is_some_and(|shown| shown.split(',').any(|one| one == id.to_string()))
        });
        let names = asked_names(&wait);
        if !choice && private::looks_like_a_value(&text, &names, reply) {
            let name = match names.as_slice() {
                [one] => Some((*one).to_owned()),
                _ => None,
            };
            return Ok(Some(name));
        }
    }
    Ok(None)
}
