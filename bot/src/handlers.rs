//! What people say, ask and press: reads an update, asks the front desk, and gives what there is to say at once.
//!
//! Everything the desk is asked for is unique by the update's id, and what depends on how things stand is decided once and
//! kept with the update, so that an update that is handled again after a crash changes nothing twice.

mod commands;
mod secret;
mod stranger;

use ports::{Answer, Answered, Audience, Choice, Failure, Incoming, PersonId, ProjectId, WaitId};
use serde_json::{Value, json};
use store::{ButtonRefusal, InboxRow, PersonRow, Standing, WaitRow};

use crate::ingress::SECRET_OUTCOME;
use crate::say::acknowledge;
use crate::update::{Sender, Wants};
use crate::{FRONT, Shared, person, texts};

/// The member that keeps which wait a plain message answers.
const ANSWERS: &str = "artel_answers";

/// Why an update could not be handled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Trouble {
    /// The front desk could not do it.
    #[error(transparent)]
    Desk(#[from] Failure),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// What there is to say.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Nothing: the crew answers, or nobody has to.
    Nothing,
    /// An answer, which has to arrive.
    Say(String),
    /// A remark, which nobody misses when it does not arrive.
    Remark(String),
}

impl Reply {
    fn say(text: impl Into<String>) -> Self {
        Self::Say(text.into())
    }
}

type Outcome = Result<Reply, Trouble>;

/// Does what an update wants.
pub(crate) async fn attend(
    shared: &Shared,
    row: &InboxRow,
    update: &mut Value,
    sender: &Sender,
    wants: &Wants,
) -> Outcome {
    let who = person(sender.user);
    let known = shared.store.meet(&who, &sender.name).await?;
    match known.standing {
        Standing::Blocked => return Ok(Reply::Nothing),
        Standing::Stranger => return stranger::attend(shared, row, update, sender, wants).await,
        Standing::Allowed | Standing::Admin => {}
    }
    if stranger::was_pairing(update) {
        // Let in at the first try, which was broken off.
        return Ok(Reply::Say(texts::start(shared.tape.as_deref())));
    }
    let chat = sender.chat.to_string();
    let private = sender.chat == sender.user;
    shared
        .store
        .remember_chat(FRONT, &chat, private.then_some(&who))
        .await?;
    let key = format!("{FRONT}:{}", row.update_id);
    match wants {
        Wants::Words { text, .. } => {
            if let Some(reply) = typed_answer(shared, row, update, sender, &known, text).await? {
                return Ok(reply);
            }
            words(shared, sender, &key, text).await
        }
        Wants::Press { callback, token } => press(shared, sender, &key, callback, token).await,
        Wants::Unreadable => Ok(Reply::say(
            "I can only read text so far: please write what you want.",
        )),
        Wants::Edited => Ok(Reply::Remark(
            "I go by what you wrote first: send the correction as a new message.".to_owned(),
        )),
        Wants::Command { name, message, .. } if name == "secret" => {
            Ok(secret::attend(shared, sender, *message, &update[SECRET_OUTCOME]).await)
        }
        Wants::Command { name, rest, .. } => {
            commands::attend(shared, sender, &key, name, rest).await
        }
    }
}

/// Hands a message to the chat's project, or founds one.
async fn words(shared: &Shared, sender: &Sender, key: &str, text: &str) -> Outcome {
    let chat = sender.chat.to_string();
    let current = shared.store.chat(FRONT, &chat).await?;
    let founding = ProjectId::founded_by(key);
    let project = if let Some(project) = current.and_then(|chat| chat.project) {
        project
    } else {
        // Chosen before the message is handed over, so that the answer finds its way.
        shared
            .store
            .set_current_project(FRONT, &chat, Some(&founding))
            .await?;
        founding.clone()
    };
    let founded = project == founding;
    let message = Incoming {
        key: key.to_owned(),
        project: (!founded).then_some(project),
        from: person(sender.user),
        text: text.to_owned(),
        yes: false,
    };
    match shared.desk.message(message).await {
        Ok(_) => Ok(Reply::Nothing),
        Err(failure) => {
            if founded {
                // There is no such project: the next message founds one.
                shared.store.set_current_project(FRONT, &chat, None).await?;
            }
            Err(failure.into())
        }
    }
}

/// The choice that a text is as a whole, by its value or its label; "not approved" is none.
pub(crate) fn choice_in<'a>(options: &'a [Choice], text: &str) -> Option<&'a Choice> {
    let said = text.trim().to_lowercase();
    options.iter().find(|option| {
        [&option.value, &option.label]
            .into_iter()
            .any(|name| name.trim().to_lowercase() == said)
    })
}

/// A plain message that is the answer to the one question that a job or a task asks. The conversation's own questions are
/// read by the conversation; one that fits both is left to it.
async fn typed_answer(
    shared: &Shared,
    row: &InboxRow,
    update: &mut Value,
    sender: &Sender,
    known: &PersonRow,
    text: &str,
) -> Result<Option<Reply>, Trouble> {
    let noted = &update[ANSWERS];
    let again = noted.is_object();
    let (wait, choice) = match (noted["wait"].as_str(), noted["choice"].as_str()) {
        (Some(wait), Some(choice)) => (WaitId::new(wait), choice.to_owned()),
        _ => match answered_by(shared, sender, known, text).await? {
            Some(found) => found,
            None => return Ok(None),
        },
    };
    if !again {
        update[ANSWERS] = json!({"wait": wait.as_str(), "choice": choice});
        shared
            .store
            .rewrite_update(FRONT, row.update_id, &update.to_string())
            .await?;
    }
    let answer = Answer {
        choice: Some(choice),
        text: String::new(),
        by: known.id.to_string(),
    };
    Ok(Some(match shared.desk.answer(&wait, answer).await? {
        Answered::Accepted => Reply::Nothing,
        // Perhaps by ourselves, before a crash.
        _ if again => Reply::Nothing,
        answered => Reply::say(came_of(answered)),
    }))
}

async fn answered_by(
    shared: &Shared,
    sender: &Sender,
    known: &PersonRow,
    text: &str,
) -> Result<Option<(WaitId, String)>, Trouble> {
    let chat = shared.store.chat(FRONT, &sender.chat.to_string()).await?;
    let Some(project) = chat.and_then(|chat| chat.project) else {
        return Ok(None);
    };
    let waits = shared.store.open_waits(Some(&project)).await?;
    let (of_work, of_talk): (Vec<WaitRow>, Vec<WaitRow>) = waits
        .into_iter()
        .partition(|wait| wait.job.is_some() || wait.task.is_some());
    let [wait] = of_work.as_slice() else {
        return Ok(None);
    };
    let Some(choice) = choice_in(&wait.options, text) else {
        return Ok(None);
    };
    let ambiguous = of_talk
        .iter()
        .any(|other| choice_in(&other.options, text).is_some());
    if ambiguous || !may_answer(shared, wait, known).await? {
        return Ok(None);
    }
    Ok(Some((wait.id.clone(), choice.value.clone())))
}

/// The same rule as for buttons.
async fn may_answer(
    shared: &Shared,
    wait: &WaitRow,
    known: &PersonRow,
) -> Result<bool, store::Error> {
    Ok(match wait.audience {
        Audience::Admins => known.standing == Standing::Admin,
        Audience::Owner => owner(shared, &wait.project)
            .await?
            .is_none_or(|owner| owner == known.id),
    })
}

/// The one person who may answer what a project asks its owner. Somebody who founded it elsewhere has no name here; then
/// whoever may talk to the bot may answer.
pub(crate) async fn owner(
    shared: &Shared,
    project: &ProjectId,
) -> Result<Option<PersonId>, store::Error> {
    let project = shared.store.project(project).await?;
    Ok(project
        .and_then(|project| project.owner)
        .filter(|owner| owner.as_str().starts_with("telegram:")))
}

fn came_of(answered: Answered) -> &'static str {
    match answered {
        Answered::Accepted => "Noted.",
        Answered::Already => "This was answered before.",
        Answered::Gone => "This question is gone.",
    }
}

async fn press(
    shared: &Shared,
    sender: &Sender,
    key: &str,
    callback: &str,
    token: &str,
) -> Outcome {
    let who = person(sender.user);
    let word = match shared.store.press_button(token, &who, key).await {
        Ok(press) => {
            let answer = Answer {
                choice: Some(press.choice),
                text: String::new(),
                by: who.to_string(),
            };
            came_of(shared.desk.answer(&press.wait, answer).await?).to_owned()
        }
        Err(ButtonRefusal::Database(error)) => return Err(error.into()),
        Err(refusal) => texts::sentence(&refusal.to_string()),
    };
    acknowledge(shared, callback, &word).await;
    Ok(Reply::Nothing)
}
