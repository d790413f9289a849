//! Handles what ingress stored: reads an update, asks the front desk, says what there is to say at once.
//!
//! Everything the desk is asked for is unique by the update's id, so that an update which is handled again after a crash
//! changes nothing twice.

use std::collections::HashSet;
use std::sync::Arc;

use parking_lot::Mutex;
use ports::{Answer, Answered, Failure, Incoming, ProjectId, TaskId};
use serde_json::Value;
use store::{ButtonRefusal, InboxFailure, InboxRow, PairingRefusal, Standing};

use crate::ingress::SECRET_OUTCOME;
use crate::update::{self, Sender, Wants, project_and_rest};
use crate::{Error, FRONT, PATIENCE, Shared, api, backoff, markdown, person, texts};

/// Updates that are looked at together.
const BATCH: u64 = 50;

/// Why an update could not be handled.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    /// The front desk could not do it; the person hears why.
    #[error(transparent)]
    Desk(#[from] Failure),
    /// The database failed; it is tried again.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// The program ends; it is handled after the next start.
    #[error("the program is stopping")]
    Stopping,
}

/// Handles updates until the end.
pub(crate) async fn run(shared: &Shared) -> Result<(), Error> {
    offer_commands(shared).await;
    // Orders that take long (a rollback) do not hold up the others.
    let slow: Arc<Mutex<HashSet<i64>>> = Arc::default();
    let mut failures = 0;
    while !shared.shutdown.is_cancelled() {
        match handle_stored(shared, &slow).await {
            Ok(0) => {
                failures = 0;
                tokio::select! {
                    () = shared.shutdown.cancelled() => {}
                    () = shared.arrived.notified() => {}
                    () = tokio::time::sleep(PATIENCE) => {}
                }
            }
            Ok(_) => failures = 0,
            Err(error) => {
                tracing::error!(%error, "the inbox cannot be read");
                failures += 1;
                shared.pause(backoff(failures)).await;
            }
        }
    }
    Ok(())
}

async fn offer_commands(shared: &Shared) {
    if let Err(error) = shared.api.offer_commands(texts::COMMANDS).await {
        tracing::debug!(%error, "the server has no menu of commands");
    }
}

/// How many updates were looked at.
async fn handle_stored(
    shared: &Shared,
    slow: &Arc<Mutex<HashSet<i64>>>,
) -> Result<usize, store::Error> {
    let mut looked_at = 0;
    for row in shared.store.unhandled_updates(FRONT, BATCH).await? {
        if shared.shutdown.is_cancelled() {
            break;
        }
        if slow.lock().contains(&row.update_id)
            || !shared.store.begin_update(FRONT, row.update_id).await?
        {
            continue;
        }
        looked_at += 1;
        if is_slow(&row) {
            slow.lock().insert(row.update_id);
            let (shared, slow) = (shared.clone(), slow.clone());
            tokio::spawn(async move {
                let id = row.update_id;
                handle(&shared, row).await;
                slow.lock().remove(&id);
            });
        } else {
            handle(shared, row).await;
        }
    }
    Ok(looked_at)
}

fn is_slow(row: &InboxRow) -> bool {
    matches!(update::read(&row.raw), Some((_, Wants::Command { name, .. })) if name == "rollback")
}

/// Handles one update to its end: handled, put back, or put aside.
async fn handle(shared: &Shared, row: InboxRow) {
    let Some((sender, wants)) = update::read(&row.raw) else {
        finish(shared, row.update_id).await;
        return;
    };
    let outcome = attend(shared, &row, &sender, wants).await;
    let outcome = match outcome {
        // What the desk could not do is an answer too.
        Err(Trouble::Desk(failure)) => say(shared, sender.chat, &failure.message).await,
        other => other,
    };
    match outcome {
        Ok(()) => finish(shared, row.update_id).await,
        Err(Trouble::Stopping) => {}
        Err(trouble) => {
            tracing::error!(update = row.update_id, error = %trouble, "an update could not be handled");
            let words = trouble.to_string();
            if let Ok(InboxFailure::Dead) = shared
                .store
                .update_failed(FRONT, row.update_id, &words)
                .await
            {
                tracing::error!(
                    update = row.update_id,
                    "an update was put aside after too many tries"
                );
            }
            shared.pause(PATIENCE).await;
        }
    }
}

async fn finish(shared: &Shared, update: i64) {
    if let Err(error) = shared.store.update_handled(FRONT, update).await {
        tracing::error!(update, %error, "an update was handled but not marked; it is handled again, which changes nothing");
    }
}

/// Says something at once, however long the server lets us wait; only the end of the program or the server's refusal ends it.
async fn say(shared: &Shared, chat: i64, markdown: &str) -> Result<(), Trouble> {
    for html in markdown::to_messages(markdown) {
        let mut tries = 0;
        loop {
            let pause = match shared.api.send(chat, &html, &[]).await {
                Ok(_) => break,
                Err(api::Error::RetryAfter { seconds }) => std::time::Duration::from_secs(seconds),
                Err(error @ (api::Error::Unreachable { .. } | api::Error::Conflict)) => {
                    tracing::warn!(%error, "an answer waits for the server");
                    backoff(tries)
                }
                Err(error) => {
                    tracing::warn!(chat, %error, "an answer was refused");
                    return Ok(());
                }
            };
            tries += 1;
            if !shared.pause(pause).await {
                return Err(Trouble::Stopping);
            }
        }
    }
    Ok(())
}

async fn attend(
    shared: &Shared,
    row: &InboxRow,
    sender: &Sender,
    wants: Wants,
) -> Result<(), Trouble> {
    let who = person(sender.user);
    let known = shared.store.meet(&who, &sender.name).await?;
    match known.standing {
        Standing::Blocked => return Ok(()),
        Standing::Stranger => return stranger(shared, sender, &wants).await,
        Standing::Allowed | Standing::Admin => {}
    }
    let chat = sender.chat.to_string();
    let private = sender.chat == sender.user;
    shared
        .store
        .remember_chat(FRONT, &chat, private.then_some(&who))
        .await?;
    let key = format!("{FRONT}:{}", row.update_id);
    match wants {
        Wants::Words { text, .. } => words(shared, sender, &key, &text).await,
        Wants::Press {
            callback, token, ..
        } => press(shared, sender, &key, &callback, &token).await,
        Wants::Unreadable => {
            say(
                shared,
                sender.chat,
                "I can only read text so far: please write what you want.",
            )
            .await
        }
        Wants::Command {
            name,
            rest,
            message,
        } if name == "secret" => secret(shared, sender, message, &rest, &row.raw).await,
        Wants::Command { name, rest, .. } => command(shared, sender, &key, &name, &rest).await,
    }
}

/// Somebody whom nobody let in yet: a pairing code lets them in, everything else is answered with one sentence.
async fn stranger(shared: &Shared, sender: &Sender, wants: &Wants) -> Result<(), Trouble> {
    const REFUSAL: &str =
        "This bot works for the people it knows: send me the pairing code that its terminal shows.";
    let text = match wants {
        Wants::Words { text, .. } => text.trim(),
        Wants::Command { name, rest, .. } if name == "start" => rest.as_str(),
        Wants::Press { callback, .. } => {
            acknowledge(shared, callback, "This button is not yours.").await;
            return Ok(());
        }
        _ => "",
    };
    // Only what looks like a code is tried as one, so that chatter does not use the tries up.
    let looks_like_one = (4..=32).contains(&text.len()) && !text.contains(char::is_whitespace);
    if !looks_like_one {
        return say(shared, sender.chat, REFUSAL).await;
    }
    match shared
        .store
        .pair(&person(sender.user), &sender.name, text)
        .await
    {
        Ok(_) => {
            tracing::info!(user = sender.user, "somebody entered the pairing code");
            say(shared, sender.chat, &texts::start(shared.tape.as_deref())).await
        }
        Err(PairingRefusal::Database(error)) => Err(error.into()),
        Err(PairingRefusal::Wrong) => say(shared, sender.chat, REFUSAL).await,
        Err(refusal) => say(shared, sender.chat, &refusal.to_string()).await,
    }
}

async fn acknowledge(shared: &Shared, callback: &str, text: &str) {
    if let Err(error) = shared.api.acknowledge(callback, text).await {
        // The little clock on the button goes away by itself.
        tracing::debug!(%error, "a press was not acknowledged");
    }
}

async fn words(shared: &Shared, sender: &Sender, key: &str, text: &str) -> Result<(), Trouble> {
    let chat = sender.chat.to_string();
    let current = shared
        .store
        .chat(FRONT, &chat)
        .await?
        .and_then(|chat| chat.project);
    let project = match current {
        Some(project) => project,
        None => {
            // Chosen before the message is handed over, so that the answer finds its way.
            let project = ProjectId::founded_by(key);
            shared
                .store
                .set_current_project(FRONT, &chat, Some(&project))
                .await?;
            project
        }
    };
    let founded = project == ProjectId::founded_by(key);
    shared
        .desk
        .message(Incoming {
            key: key.to_owned(),
            project: (!founded).then_some(project),
            from: person(sender.user),
            text: text.to_owned(),
            yes: false,
        })
        .await?;
    Ok(())
}

async fn press(
    shared: &Shared,
    sender: &Sender,
    key: &str,
    callback: &str,
    token: &str,
) -> Result<(), Trouble> {
    let who = person(sender.user);
    let word = match shared.store.press_button(token, &who, key).await {
        Ok(press) => {
            let answer = Answer {
                choice: Some(press.choice),
                text: String::new(),
                by: who.to_string(),
            };
            match shared.desk.answer(&press.wait, answer).await? {
                Answered::Accepted => "Noted.",
                Answered::Already => "This was answered before.",
                Answered::Gone => "This question is gone.",
            }
            .to_owned()
        }
        Err(ButtonRefusal::Database(error)) => return Err(error.into()),
        Err(refusal) => refusal.to_string(),
    };
    acknowledge(shared, callback, &word).await;
    Ok(())
}

async fn secret(
    shared: &Shared,
    sender: &Sender,
    message: i64,
    rest: &str,
    raw: &str,
) -> Result<(), Trouble> {
    let raw: Value = serde_json::from_str(raw).unwrap_or_default();
    let outcome = &raw[SECRET_OUTCOME];
    let text = if let Some(name) = outcome["stored"].as_str() {
        format!("`{name}` is stored; I deleted your message.")
    } else if let Some(why) = outcome["refused"].as_str() {
        format!("I deleted your message; {why}.")
    } else {
        let name = outcome["asked"]
            .as_str()
            .filter(|name| !name.is_empty())
            .unwrap_or("NAME");
        return say(
            shared,
            sender.chat,
            &format!("Send `/secret {name} VALUE` in one message; I put the value into the vault and delete the message. {rest}"),
        )
        .await;
    };
    if let Err(error) = shared.api.delete(sender.chat, message).await {
        tracing::warn!(%error, "a message with a secret could not be deleted");
        return say(
            shared,
            sender.chat,
            &text.replace(
                "I deleted your message",
                "I could **not** delete your message, so please delete it yourself",
            ),
        )
        .await;
    }
    say(shared, sender.chat, &text).await
}

/// The project that a command is about: the one it names, or the chat's.
async fn meant(shared: &Shared, sender: &Sender, name: Option<&str>) -> Result<ProjectId, Trouble> {
    if let Some(name) = name {
        return Ok(shared.desk.find(name).await?);
    }
    let chat = shared.store.chat(FRONT, &sender.chat.to_string()).await?;
    chat.and_then(|chat| chat.project).ok_or_else(|| {
        Failure::new(
            "no_project",
            "This chat has no project yet: describe one, or choose one with /project NAME.",
        )
        .into()
    })
}

async fn command(
    shared: &Shared,
    sender: &Sender,
    key: &str,
    name: &str,
    rest: &str,
) -> Result<(), Trouble> {
    let who = person(sender.user);
    let chat = sender.chat.to_string();
    let (named, tail) = project_and_rest(rest);
    let answer = match name {
        "start" => texts::start(shared.tape.as_deref()),
        "help" => texts::help(),
        "new" => {
            shared.store.set_current_project(FRONT, &chat, None).await?;
            if !rest.is_empty() {
                return words(shared, sender, key, rest).await;
            }
            "Describe it in your next message.".to_owned()
        }
        "projects" => texts::projects(&shared.desk.projects().await?),
        "project" => {
            let project = meant(shared, sender, named).await?;
            shared
                .store
                .set_current_project(FRONT, &chat, Some(&project))
                .await?;
            texts::status(&shared.desk.status(&project).await?)
        }
        "status" => {
            let project = meant(shared, sender, named).await?;
            texts::status(&shared.desk.status(&project).await?)
        }
        "deploy" => {
            let project = meant(shared, sender, named).await?;
            shared.desk.redeploy(&project, &who, key, false).await?;
            return Ok(());
        }
        "rollback" => {
            let project = meant(shared, sender, named).await?;
            let deployment = shared.desk.rollback(&project, &who, key).await?;
            format!(
                "Release {} is live again at {}.",
                deployment.release, deployment.url
            )
        }
        "retry" => {
            let (project, task) = match named {
                Some(word) if shared.desk.find(word).await.is_ok() => {
                    (meant(shared, sender, named).await?, tail)
                }
                _ => (meant(shared, sender, None).await?, rest),
            };
            let task = (!task.is_empty()).then(|| TaskId::new(task));
            if shared.desk.retry(&project, task.as_ref(), &who).await? {
                "It is tried again.".to_owned()
            } else {
                "Nothing waits for another try.".to_owned()
            }
        }
        "cancel" => {
            let project = meant(shared, sender, named).await?;
            if shared.desk.cancel(&project, &who).await? {
                return Ok(());
            }
            "No job is running.".to_owned()
        }
        other => format!("I do not know /{other}. What I know:\n\n{}", texts::help()),
    };
    say(shared, sender.chat, &answer).await
}
