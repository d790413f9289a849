//! What is said about a message that carried a secret: ingress has dealt with the value, here the message is deleted.

use serde_json::Value;

use super::Reply;
use crate::Shared;
use crate::update::Sender;

const DELETED: &str = "I deleted your message";
const NOT_DELETED: &str = "I could **not** delete your message, so please delete it yourself";

/// Deletes the message, unless there was nothing in it, and says what became of it.
pub(super) async fn attend(
    shared: &Shared,
    sender: &Sender,
    message: i64,
    outcome: &Value,
) -> Reply {
    let name = |member: &str| outcome[member].as_str().unwrap_or("NAME");
    let (held_something, text) = if let Some(name) = outcome["stored"].as_str() {
        (true, format!("`{name}` is stored; {{}}."))
    } else if let Some(why) = outcome["refused"].as_str() {
        (true, format!("{{}}; {}.", why.trim_end_matches('.')))
    } else if outcome.get("plain").is_some() {
        let how = how(name("plain"));
        (
            true,
            format!(
                "That looked like the secret itself, which is not taken from an ordinary message; {{}} and kept nothing of it. {how} If it was something else, say it in a sentence."
            ),
        )
    } else if outcome["gone"] == true {
        let how = how(name("asked"));
        (
            true,
            format!("There was no name with a value in it; {{}} and kept nothing of it. {how}"),
        )
    } else {
        (false, how(name("asked")))
    };
    if !held_something {
        return Reply::Say(text);
    }
    let deleted = match shared.api.delete(sender.chat, message).await {
        Ok(()) => DELETED,
        Err(error) => {
            tracing::warn!(%error, "a message with a secret could not be deleted");
            NOT_DELETED
        }
    };
    let text = text.replacen("{}", deleted, 1);
    Reply::Say(capital(&text))
}

fn how(name: &str) -> String {
    format!(
        "Send `/secret {name} VALUE` in one message: I put the value into the vault and delete the message."
    )
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(chars).collect()
    })
}
