//! Somebody whom nobody let in yet: a pairing code lets them in, everything else is answered with one sentence, and not more
//! than once a minute, so that a flood does not flood back.

use std::time::Duration;

use serde_json::Value;
use store::{InboxRow, PairingRefusal};
use tokio::time::Instant;

use super::{Outcome, Reply};
use crate::say::acknowledge;
use crate::update::{Sender, Wants};
use crate::{FRONT, Shared, person, texts};

/// The member that keeps that an update was tried as a pairing code.
const PAIRING: &str = "artel_pairing";
/// A stranger is refused aloud once in this time.
const QUIET: Duration = Duration::from_mins(1);
/// Strangers who are remembered; beyond them nobody is refused aloud for a while.
const REMEMBERED: usize = 10_000;
/// Letters and digits of a pairing code.
const CODE_CHARS: usize = 8;

const REFUSAL: &str =
    "This bot works for the people it knows: send me the pairing code that its terminal shows.";

/// Whether an update was tried as a pairing code before.
pub(super) fn was_pairing(update: &Value) -> bool {
    update[PAIRING] == true
}

pub(super) async fn attend(
    shared: &Shared,
    row: &InboxRow,
    update: &mut Value,
    sender: &Sender,
    wants: &Wants,
) -> Outcome {
    let text = match wants {
        Wants::Words { text, .. } => text.trim(),
        Wants::Command { name, rest, .. } if name == "start" => rest.as_str(),
        Wants::Press { callback, .. } => {
            if may_refuse(shared, sender.user) {
                acknowledge(shared, callback, "This button is not yours.").await;
            }
            return Ok(Reply::Nothing);
        }
        _ => "",
    };
    if !looks_like_a_code(text) {
        return Ok(refusal(shared, sender, REFUSAL));
    }
    // Kept first: should we die after the code counted, this text must not become a message of somebody who is known.
    update[PAIRING] = true.into();
    shared
        .store
        .rewrite_update(FRONT, row.update_id, &update.to_string())
        .await?;
    match shared
        .store
        .pair(&person(sender.user), &sender.name, text)
        .await
    {
        Ok(_) => {
            tracing::info!(user = sender.user, "somebody entered the pairing code");
            Ok(Reply::Say(texts::start(shared.tape.as_deref())))
        }
        Err(PairingRefusal::Database(error)) => Err(error.into()),
        Err(PairingRefusal::Wrong) => Ok(refusal(shared, sender, REFUSAL)),
        Err(other) => Ok(refusal(
            shared,
            sender,
            &texts::sentence(&other.to_string()),
        )),
    }
}

/// Only what looks like a code is tried as one, so that chatter does not use the tries up.
fn looks_like_a_code(text: &str) -> bool {
    text.chars().filter(char::is_ascii_alphanumeric).count() == CODE_CHARS
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '`'))
}

fn refusal(shared: &Shared, sender: &Sender, text: &str) -> Reply {
    if may_refuse(shared, sender.user) {
        Reply::Remark(text.to_owned())
    } else {
        Reply::Nothing
    }
}

fn may_refuse(shared: &Shared, user: i64) -> bool {
    let now = Instant::now();
    let mut refused = shared.refused.lock();
    if refused.len() >= REMEMBERED {
        refused.retain(|_, at| now.duration_since(*at) < QUIET);
        if refused.len() >= REMEMBERED {
            return false;
        }
    }
    match refused.get(&user) {
        Some(at) if now.duration_since(*at) < QUIET => false,
        _ => {
            refused.insert(user, now);
            true
        }
    }
}

#[cfg(test)]
mod tests {
    use super::looks_like_a_code;

    #[test]
    fn chatter_is_no_code() {
        for code in ["ABCD-2345", "abcd2345", "`ABCD-2345`"] {
            assert!(looks_like_a_code(code), "{code}");
        }
        for text in ["hello", "build me a bank", "", "ABCD-2345-6"] {
            assert!(!looks_like_a_code(text), "{text}");
        }
    }
}
