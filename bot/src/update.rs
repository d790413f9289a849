//! What an update says, as far as it concerns us. An update is kept as it came; this reads it leniently, because servers
//! and years differ: what is not understood is no error, it is nothing for us.

use ports::Slug;
use serde_json::Value;

/// Where an update comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sender {
    /// The chat to answer in.
    pub chat: i64,
    /// The person.
    pub user: i64,
    /// Their name, for people.
    pub name: String,
}

/// What an update wants.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Wants {
    /// A command, without its slash and without `@bot`, with the rest of the text.
    Command {
        /// In lower case.
        name: String,
        /// What follows.
        rest: String,
        /// The message.
        message: i64,
    },
    /// Plain words.
    Words {
        /// The text.
        text: String,
        /// The message.
        message: i64,
    },
    /// A button.
    Press {
        /// To acknowledge it with.
        callback: String,
        /// What stood behind the button.
        token: String,
        /// The message with the button.
        message: Option<i64>,
    },
    /// A message that holds no text: a picture, a voice.
    Unreadable,
}

/// Reads an update; `None` when it is nothing for us.
pub fn read(raw: &str) -> Option<(Sender, Wants)> {
    let update: Value = serde_json::from_str(raw).ok()?;
    if let Some(query) = update.get("callback_query") {
        let message = query.get("message");
        let user = query["from"]["id"].as_i64()?;
        let sender = Sender {
            chat: message
                .and_then(|message| message["chat"]["id"].as_i64())
                .unwrap_or(user),
            user,
            name: name_of(&query["from"]),
        };
        let wants = Wants::Press {
            callback: query["id"].as_str()?.to_owned(),
            token: query["data"].as_str().unwrap_or_default().to_owned(),
            message: message.and_then(|message| message["message_id"].as_i64()),
        };
        return Some((sender, wants));
    }
    let message = update.get("message")?;
    if message["from"]["is_bot"].as_bool() == Some(true) {
        return None;
    }
    let sender = Sender {
        chat: message["chat"]["id"].as_i64()?,
        user: message["from"]["id"].as_i64()?,
        name: name_of(&message["from"]),
    };
    let id = message["message_id"].as_i64()?;
    let Some(text) = message["text"]
        .as_str()
        .or_else(|| message["caption"].as_str())
    else {
        // Service messages (somebody joined, a title changed) have neither text nor content of a person.
        let content = [
            "photo",
            "voice",
            "document",
            "audio",
            "video",
            "sticker",
            "video_note",
            "location",
            "contact",
        ];
        return content
            .iter()
            .any(|kind| message.get(kind).is_some())
            .then_some((sender, Wants::Unreadable));
    };
    let wants = match command(text) {
        Some((name, rest)) => Wants::Command {
            name,
            rest,
            message: id,
        },
        None => Wants::Words {
            text: text.to_owned(),
            message: id,
        },
    };
    Some((sender, wants))
}

fn command(text: &str) -> Option<(String, String)> {
    let text = text.strip_prefix('/')?;
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let name = word.split('@').next()?;
    let fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    fits.then(|| (name.to_lowercase(), rest.trim().to_owned()))
}

fn name_of(person: &Value) -> String {
    let name = |field: &str| person[field].as_str().filter(|name| !name.is_empty());
    name("first_name")
        .or_else(|| name("username"))
        .unwrap_or("somebody")
        .chars()
        .take(60)
        .collect()
}

/// Splits `/status notes` style rests into a project's name and what follows it, when the first word can be one.
pub fn project_and_rest(rest: &str) -> (Option<&str>, &str) {
    let (word, tail) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
    if Slug::parse(word).is_ok() {
        (Some(word), tail.trim())
    } else {
        (None, rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_read_with_and_without_the_bots_name() {
        let text = |text: &str| {
            format!(
                r#"{{"update_id":1,"message":{{"message_id":5,"chat":{{"id":7}},"from":{{"id":7,"first_name":"Ada"}},"text":"{text}"}}}}"#
            )
        };
        let (_, wants) = read(&text("/Status@artel_bot notes")).unwrap();
        assert_eq!(
            wants,
            Wants::Command {
                name: "status".into(),
                rest: "notes".into(),
                message: 5
            }
        );
        for words in ["/ home", "hello /status", "/usr/bin"] {
            assert!(
                matches!(read(&text(words)).unwrap().1, Wants::Words { .. }),
                "{words}"
            );
        }
    }

    #[test]
    fn what_nobody_knows_yet_is_no_error() {
        for raw in [
            "",
            "[]",
            r#"{"update_id":1}"#,
            r#"{"update_id":1,"hologram":{}}"#,
            r#"{"message":{"chat":{}}}"#,
        ] {
            assert_eq!(read(raw), None, "{raw}");
        }
        let photo = r#"{"message":{"message_id":1,"chat":{"id":7},"from":{"id":7},"photo":[]}}"#;
        assert_eq!(read(photo).unwrap().1, Wants::Unreadable);
    }

    #[test]
    fn a_press_without_its_message_still_counts() {
        let (sender, wants) =
            read(r#"{"callback_query":{"id":"9","from":{"id":7},"data":"tok"}}"#).unwrap();
        assert_eq!(sender.chat, 7);
        assert_eq!(
            wants,
            Wants::Press {
                callback: "9".into(),
                token: "tok".into(),
                message: None
            }
        );
    }
}
