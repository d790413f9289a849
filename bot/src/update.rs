//! What an update says, as far as it concerns us. An update is kept as it came; this reads it leniently, because servers
//! and years differ: what is not understood is no error, it is nothing for us.

use serde_json::Value;

/// Who we are in the chats: needed in groups, where not every word is for us.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Me {
    /// The bot's id.
    pub id: Option<i64>,
    /// Its user name, without `@`, once the server told it.
    pub name: Option<String>,
}

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
        /// The message that it is a reply to.
        reply_to: Option<i64>,
    },
    /// A button.
    Press {
        /// To acknowledge it with.
        callback: String,
        /// What stood behind the button.
        token: String,
    },
    /// A message that holds no text: a picture, a voice.
    Unreadable,
    /// A message that was written before has another text now.
    Edited,
}

/// Kinds of content that people send besides text. Service messages (somebody joined, a title changed) have none of them.
const CONTENT: [&str; 10] = [
    "photo",
    "voice",
    "document",
    "audio",
    "video",
    "sticker",
    "video_note",
    "location",
    "contact",
    "poll",
];

/// Reads an update; `None` when it is nothing for us.
pub fn read(update: &Value, me: &Me) -> Option<(Sender, Wants)> {
    if let Some(query) = update.get("callback_query") {
        return pressed(query);
    }
    let edited = update.get("edited_message");
    let message = update.get("message").or(edited)?;
    if message["from"]["is_bot"].as_bool() == Some(true) {
        return None;
    }
    let sender = Sender {
        chat: message["chat"]["id"].as_i64()?,
        user: message["from"]["id"].as_i64()?,
        name: name_of(&message["from"]),
    };
    let id = message["message_id"].as_i64()?;
    let group = sender.chat != sender.user;
    let replied = &message["reply_to_message"];
    let mut for_us = !group || (me.id.is_some() && replied["from"]["id"].as_i64() == me.id);
    let Some(text) = text_of(message) else {
        let content = CONTENT.iter().any(|kind| message.get(kind).is_some());
        return (content && for_us && edited.is_none()).then_some((sender, Wants::Unreadable));
    };
    let mut text = visible(&text.replace('\0', "")).to_owned();
    if let Some(rest) = without_mention(&text, me) {
        text = rest;
        for_us = true;
    }
    let command = command(&text);
    // A secret is a secret also where it stood first under a mistyped command.
    let secret = matches!(&command, Some((name, ..)) if name == "secret");
    if edited.is_some() && !secret {
        return for_us.then_some((sender, Wants::Edited));
    }
    let wants = match command {
        Some((_, Some(bot), _)) if !is_me(&bot, me) => return None,
        Some((name, _, rest)) => Wants::Command {
            name,
            rest,
            message: id,
        },
        None if !for_us => return None,
        None => Wants::Words {
            text,
            message: id,
            reply_to: replied["message_id"].as_i64(),
        },
    };
    Some((sender, wants))
}

fn pressed(query: &Value) -> Option<(Sender, Wants)> {
    let user = query["from"]["id"].as_i64()?;
    let sender = Sender {
        chat: query["message"]["chat"]["id"].as_i64().unwrap_or(user),
        user,
        name: name_of(&query["from"]),
    };
    let wants = Wants::Press {
        callback: query["id"].as_str()?.to_owned(),
        token: query["data"].as_str().unwrap_or_default().to_owned(),
    };
    Some((sender, wants))
}

/// The text of a message, or what stands below its picture.
pub fn text_of(message: &Value) -> Option<&str> {
    message["text"]
        .as_str()
        .or_else(|| message["caption"].as_str())
}

/// A text without the white and the invisible before it.
pub fn visible(text: &str) -> &str {
    text.trim_start_matches(|c: char| {
        c.is_whitespace() || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2060}' | '\u{feff}')
    })
}

/// Whether a name after `@` is ours; before the server told our name, whatever can be a bot's.
pub fn is_me(name: &str, me: &Me) -> bool {
    match &me.name {
        Some(mine) => mine.eq_ignore_ascii_case(name),
        None => name.to_lowercase().ends_with("bot"),
    }
}

/// The text without the first mention of us; `None` when we are not mentioned.
fn without_mention(text: &str, me: &Me) -> Option<String> {
    for (at, _) in text.match_indices('@') {
        let before = text[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_' || c == '/') {
            continue;
        }
        let name: String = text[at + 1..]
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric() || *c == '_')
            .collect();
        if is_me(&name, me) {
            let (head, tail) = (&text[..at], &text[at + 1 + name.len()..]);
            // `@bot, do it` and `do it, @bot` are both `do it`; `/status@bot` is a command and not meant here.
            let command = head.trim_start().starts_with('/') && !head.contains(char::is_whitespace);
            if command {
                continue;
            }
            let tail = if head.trim().is_empty() {
                tail.trim_start_matches(|c: char| c.is_whitespace() || matches!(c, ',' | ':'))
            } else {
                tail
            };
            return Some(format!("{head}{tail}").trim().to_owned());
        }
    }
    None
}

/// Name, addressee and rest of a command.
fn command(text: &str) -> Option<(String, Option<String>, String)> {
    let text = visible(text).strip_prefix('/')?;
    let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
    let (name, bot) = match word.split_once('@') {
        Some((name, bot)) => (name, Some(bot.to_owned())),
        None => (word, None),
    };
    let fits = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
    fits.then(|| (name.to_lowercase(), bot, rest.trim().to_owned()))
}

fn name_of(person: &Value) -> String {
    let name = |field: &str| person[field].as_str().filter(|name| !name.is_empty());
    name("first_name")
        .or_else(|| name("username"))
        .unwrap_or("somebody")
        .chars()
        .filter(|c| !c.is_control())
        .take(60)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn me() -> Me {
        Me {
            id: Some(99),
            name: Some("artel_bot".to_owned()),
        }
    }

    fn said(chat: i64, text: &str) -> Value {
        json!({"update_id": 1, "message": {
            "message_id": 5, "chat": {"id": chat}, "from": {"id": 7, "first_name": "Ada"}, "text": text,
        }})
    }

    fn wants(chat: i64, text: &str) -> Option<Wants> {
        read(&said(chat, text), &me()).map(|(_, wants)| wants)
    }

    #[test]
    fn a_command_is_read_with_and_without_the_bots_name() {
        for text in [
            "/Status@artel_bot notes",
            "  /status notes",
            "\u{200b}/STATUS\nnotes",
        ] {
            let Some(Wants::Command { name, rest, .. }) = wants(7, text) else {
                panic!("{text:?}");
            };
            assert_eq!((name.as_str(), rest.as_str()), ("status", "notes"));
        }
        for words in ["/ home", "hello /status", "/usr/bin"] {
            assert!(
                matches!(wants(7, words), Some(Wants::Words { .. })),
                "{words}"
            );
        }
    }

    #[test]
    fn in_a_group_only_what_is_for_us_is_read() {
        let text = |wants| match wants {
            Some(Wants::Words { text, .. }) => Some(text),
            Some(Wants::Command { name, .. }) => Some(format!("/{name}")),
            _ => None,
        };
        for (said, read) in [
            ("I had lunch", None),
            ("@artel_bot, build a shop", Some("build a shop")),
            (
                "please build a shop @Artel_Bot",
                Some("please build a shop"),
            ),
            ("@other_bot build", None),
            ("mail me@artel_bot", None),
            ("/status", Some("/status")),
            ("/status@artel_bot", Some("/status")),
            ("/status@other_bot", None),
            ("@artel_bot /status", Some("/status")),
        ] {
            assert_eq!(text(wants(-30, said)).as_deref(), read, "{said}");
        }
        let mut reply = said(-30, "yes");
        reply["message"]["reply_to_message"] = json!({"message_id": 4, "from": {"id": 99}});
        assert!(matches!(
            read(&reply, &me()),
            Some((
                _,
                Wants::Words {
                    reply_to: Some(4),
                    ..
                }
            ))
        ));
    }

    #[test]
    fn what_nobody_knows_yet_is_no_error() {
        for raw in [
            json!(null),
            json!([]),
            json!({"update_id": 1}),
            json!({"update_id": 1, "hologram": {}}),
            json!({"message": {"chat": {}}}),
            json!({"message": 7}),
            json!({"callback_query": []}),
        ] {
            assert_eq!(read(&raw, &me()), None, "{raw}");
        }
        let photo = json!({"message": {"message_id": 1, "chat": {"id": 7}, "from": {"id": 7}, "photo": []}});
        assert_eq!(read(&photo, &me()).unwrap().1, Wants::Unreadable);
    }

    #[test]
    fn a_press_without_its_message_still_counts() {
        let press = json!({"callback_query": {"id": "9", "from": {"id": 7}, "data": "tok"}});
        let (sender, wants) = read(&press, &me()).unwrap();
        assert_eq!(sender.chat, 7);
        assert_eq!(
            wants,
            Wants::Press {
                callback: "9".into(),
                token: "tok".into(),
            }
        );
    }
}
