//! What must not be kept: finds `/secret` in an update however it was typed, takes it out wherever it stands (also in what a
//! message replies to), and knows a plain message that looks like a secret that was asked for.

use ports::WaitKind;
use serde_json::{Value, json};
use store::WaitRow;

use crate::update::{Me, is_me, text_of, visible};

/// What a text with `/secret` holds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Told<'a> {
    /// The bot that it is addressed to, if it names one.
    pub(crate) bot: Option<&'a str>,
    /// What follows.
    pub(crate) rest: &'a str,
}

/// Reads `/secret …` leniently: a value must not be kept because somebody mistyped the command.
pub(crate) fn told(text: &str) -> Option<Told<'_>> {
    let mut text = visible(text);
    while let Some(mention) = text.strip_prefix('@') {
        text = visible(mention.split_once(char::is_whitespace)?.1);
    }
    let text = visible(text.strip_prefix(['/', '／'])?);
    let word = text.get(..6)?;
    if !word.eq_ignore_ascii_case("secret") {
        return None;
    }
    let rest = text[6..].strip_prefix(['s', 'S']).unwrap_or(&text[6..]);
    let (bot, rest) = match rest.strip_prefix('@') {
        Some(bot) => {
            let (bot, rest) = bot.split_once(char::is_whitespace).unwrap_or((bot, ""));
            (Some(bot), rest)
        }
        None => (None, rest),
    };
    Some(Told {
        bot,
        rest: rest.trim_matches(|c: char| c.is_whitespace() || matches!(c, ':' | '=')),
    })
}

/// The message of an update that is a secret for us, with what follows the command.
pub(crate) fn secret_message<'a>(update: &'a Value, me: &Me) -> Option<(&'a Value, &'a str)> {
    let message = update
        .get("message")
        .or_else(|| update.get("edited_message"))?;
    let told = told(text_of(message)?)?;
    told.bot
        .is_none_or(|bot| is_me(bot, me))
        .then_some((message, told.rest))
}

/// `NAME VALUE`, also as `NAME=VALUE` and on two lines. Without a value it is empty.
pub(crate) fn name_and_value(rest: &str) -> (&str, &str) {
    let end = rest
        .find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .unwrap_or(rest.len());
    let (name, value) = rest.split_at(end);
    match value.chars().next() {
        Some('=' | ':') => (name, value[1..].trim()),
        Some(c) if c.is_whitespace() => (name, value.trim()),
        Some(_) => ("", rest),
        None => (name, ""),
    }
}

/// Whether services can find a secret under this name.
pub(crate) fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_uppercase())
        && name
            .bytes()
            .all(|b| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_')
}

/// Takes every `/secret …` out of an update, wherever it stands, and what could repeat it. Says whether there was one.
pub(crate) fn scrub(value: &mut Value) -> bool {
    match value {
        Value::String(text) => {
            let found = told(text).is_some_and(|told| !told.rest.is_empty());
            if found {
                "/secret".clone_into(text);
            }
            found
        }
        Value::Array(all) => all.iter_mut().fold(false, |found, one| scrub(one) | found),
        Value::Object(all) => {
            let found = all
                .values_mut()
                .fold(false, |found, one| scrub(one) | found);
            if found {
                forget_quotes(all);
            }
            found
        }
        _ => false,
    }
}

/// Takes the text out of an update's message.
pub(crate) fn blank(update: &mut Value) {
    for kind in ["message", "edited_message"] {
        if let Some(message) = update.get_mut(kind).and_then(Value::as_object_mut) {
            for field in ["text", "caption"] {
                if let Some(text) = message.get_mut(field) {
                    *text = json!("/secret");
                }
            }
            message.remove("reply_to_message");
            forget_quotes(message);
        }
    }
}

fn forget_quotes(message: &mut serde_json::Map<String, Value>) {
    for field in [
        "entities",
        "caption_entities",
        "quote",
        "external_reply",
        "link_preview_options",
    ] {
        message.remove(field);
    }
}

/// The names that a question on the secret path asks for: it shows each as `/secret NAME`.
pub(crate) fn asked_names(wait: &WaitRow) -> Vec<&str> {
    if wait.kind != WaitKind::Secret {
        return Vec::new();
    }
    let mut names: Vec<&str> = wait
        .question
        .split("/secret ")
        .skip(1)
        .map(|rest| {
            let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
            &rest[..end.unwrap_or(rest.len())]
        })
        .filter(|name| is_name(name))
        .collect();
    names.dedup();
    names
}

/// Whether a plain message looks like the value that a question on the secret path asked for: then it is not taken, neither
/// as the secret (it would have been read as a message) nor as a message (it may be the secret). `reply`: it replies to that
/// very question.
pub(crate) fn looks_like_a_value(text: &str, names: &[&str], reply: bool) -> bool {
    let text = text.trim();
    let text = match text.get(..7) {
        Some(word) if word.eq_ignore_ascii_case("secret ") => text[7..].trim(),
        _ => text,
    };
    for name in names {
        let head = text.get(..name.len()).unwrap_or_default();
        if head.eq_ignore_ascii_case(name) {
            let tail = text[name.len()..].trim_start();
            let value = tail
                .strip_prefix(['=', ':'])
                .or_else(|| tail.strip_prefix("is "))
                .unwrap_or(tail)
                .trim();
            if !value.is_empty() && !value.contains(char::is_whitespace) && value != "?" {
                return true;
            }
        }
    }
    let one_word = !text.contains(char::is_whitespace) && !names.contains(&text);
    let strange = text.chars().any(|c| c.is_ascii_digit())
        || text.chars().skip(1).any(char::is_uppercase)
        || text.contains(['_', '+', '/', '=']);
    one_word && (text.len() >= 8 && strange || reply && text.len() >= 6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secret_is_heard_however_it_is_typed() {
        for text in [
            "/secret KEY v",
            "  /secret KEY v",
            "\u{feff}\n/Secret\nKEY\nv",
            "/secret@artel_bot KEY v",
            "@artel_bot /secret KEY v",
            "/ secret KEY v",
            "/secrets KEY v",
            "/secret: KEY v",
            "/secret KEY=v",
        ] {
            let told = told(text).unwrap_or_else(|| panic!("{text:?}"));
            assert_eq!(name_and_value(told.rest), ("KEY", "v"), "{text:?}");
        }
        for text in [
            "secret santa",
            "what is /secret?",
            "/secre",
            "@artel_bot",
            "/",
        ] {
            assert_eq!(told(text), None, "{text:?}");
        }
        assert_eq!(name_and_value("KEY"), ("KEY", ""));
        assert_eq!(name_and_value("KEY a=b c"), ("KEY", "a=b c"));
        assert_eq!(name_and_value("sk-123 KEY"), ("", "sk-123 KEY"));
    }

    #[test]
    fn a_secret_is_taken_out_of_every_corner_of_an_update() {
        let mut update = json!({"update_id": 1, "message": {
            "text": "what about this?",
            "quote": {"text": "canary"},
            "reply_to_message": {"text": "/secret KEY canary", "entities": [{"type": "bot_command"}]},
            "pinned_message": {"caption": " /SECRET@some_bot KEY canary"},
        }});
        assert!(scrub(&mut update));
        assert!(!update.to_string().contains("canary"), "{update}");
        assert_eq!(update["message"]["text"], "what about this?");
        let mut innocent = json!({"message": {"text": "hello", "quote": {"text": "x"}}});
        assert!(!scrub(&mut innocent));
        assert_eq!(innocent["message"]["quote"]["text"], "x");
    }

    #[test]
    fn a_value_typed_as_plain_text_is_told_from_talk() {
        let names = ["WEATHER_API_KEY"];
        for text in [
            "sk-live-51Hx",
            "WEATHER_API_KEY=abc",
            "weather_api_key: abc",
            "WEATHER_API_KEY is abc",
            "secret WEATHER_API_KEY abc",
            "https://user:pw1@host/x",
        ] {
            assert!(looks_like_a_value(text, &names, false), "{text}");
        }
        for text in [
            "hello",
            "Thanks!",
            "WEATHER_API_KEY",
            "WEATHER_API_KEY where do I get it?",
            "where do I get key 12?",
            "WEATHER_API_KEY ?",
        ] {
            assert!(!looks_like_a_value(text, &names, false), "{text}");
        }
        assert!(looks_like_a_value("hunter-two", &names, true));
        assert!(!looks_like_a_value("where do I get it?", &names, true));
    }
}
