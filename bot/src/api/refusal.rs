//! What a server says instead of success, and what it means for us: try later, try otherwise, or never again.

/// The pause when a server asks for patience without saying how much, in seconds.
const UNTOLD_S: u64 = 5;
/// How much of a server's words is repeated, in characters.
const QUOTED: usize = 200;

/// What a call came to instead of success.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server asks for patience.
    #[error("Telegram asks to wait {seconds} s")]
    RetryAfter {
        /// How long.
        seconds: u64,
    },
    /// The server does not want this and never will: the chat is gone, the bot is blocked, the method is unknown.
    #[error("Telegram refused it: {message}")]
    Refused {
        /// Its code, such as 403.
        code: u16,
        /// Its words.
        message: String,
    },
    /// The message is not there any more, or cannot be edited any more.
    #[error("the message is gone: {message}")]
    Gone {
        /// The server's words.
        message: String,
    },
    /// The message shows that already.
    #[error("the message shows that already")]
    NotModified,
    /// The formatting was not understood; the same text without it will be.
    #[error("Telegram cannot read the formatting: {message}")]
    Formatting {
        /// Its words.
        message: String,
    },
    /// The group goes by another id now.
    #[error("the group became the supergroup {chat}")]
    Moved {
        /// The id.
        chat: i64,
    },
    /// The token is wrong or was revoked.
    #[error("Telegram does not know this bot token: check TELEGRAM_BOT_TOKEN")]
    Unauthorized,
    /// Another program polls with the same token, or a webhook takes the updates.
    #[error(
        "something else takes this bot's updates ({message}): stop the other program, delete the webhook, or use a bot of your own"
    )]
    Conflict {
        /// The server's words.
        message: String,
    },
    /// The server was not reached, or answered what nobody understands. It may have done what was asked.
    #[error(
        "the Bot API server at {server} did not answer as expected: {message}; check TELEGRAM_API_URL and the network"
    )]
    Unreachable {
        /// The server, without the token.
        server: String,
        /// What happened.
        message: String,
    },
}

/// The part of an answer that explains a refusal.
#[derive(serde::Deserialize)]
pub(super) struct Words {
    #[serde(default)]
    error_code: Option<u16>,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    parameters: Option<Parameters>,
}

#[derive(serde::Deserialize)]
struct Parameters {
    #[serde(default)]
    retry_after: Option<u64>,
    #[serde(default)]
    migrate_to_chat_id: Option<i64>,
}

impl Words {
    /// What it means, with the status of HTTP and the header `Retry-After` for servers that say it only there.
    pub(super) fn into_error(self, server: &str, status: u16, retry_after: Option<u64>) -> Error {
        let code = self.error_code.unwrap_or(status);
        let message = quoted(&self.description.unwrap_or_default());
        let told = self.parameters.as_ref().and_then(|told| told.retry_after);
        if code == 429 || told.is_some() {
            return Error::RetryAfter {
                seconds: told.or(retry_after).unwrap_or(UNTOLD_S),
            };
        }
        if let Some(chat) = self.parameters.and_then(|told| told.migrate_to_chat_id) {
            return Error::Moved { chat };
        }
        match code {
            401 => Error::Unauthorized,
            409 => Error::Conflict { message },
            408 => unreachable(server, code, &message),
            400..=499 => refused(code, message),
            _ => unreachable(server, code, &message),
        }
    }
}

fn refused(code: u16, message: String) -> Error {
    let words = message.to_lowercase();
    let says = |part: &str| words.contains(part);
    if says("parse entities") || says("unsupported start tag") || says("entity_bounds_invalid") {
        Error::Formatting { message }
    } else if says("message is not modified") || says("message_not_modified") {
        Error::NotModified
    } else if says("message to edit not found")
        || says("message to delete not found")
        || says("message can't be edited")
        || says("message_id_invalid")
    {
        Error::Gone { message }
    } else {
        Error::Refused { code, message }
    }
}

/// An answer that is not the Bot API's: a proxy's page, half a text. Only what says plainly that it is about our request is
/// taken for the last word.
pub(super) fn unreadable(
    server: &str,
    status: u16,
    retry_after: Option<u64>,
    body: &[u8],
) -> Error {
    let start = &body[..body.len().min(4 * QUOTED)];
    let message = quoted(&String::from_utf8_lossy(start));
    match status {
        429 => Error::RetryAfter {
            seconds: retry_after.unwrap_or(UNTOLD_S),
        },
        400 | 413 | 414 => Error::Refused {
            code: status,
            message,
        },
        _ => unreachable(server, status, &message),
    }
}

fn unreachable(server: &str, code: u16, message: &str) -> Error {
    Error::Unreachable {
        server: server.to_owned(),
        message: format!("{code} {message}"),
    }
}

/// On one line, and not too much of it.
fn quoted(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(QUOTED).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(status: u16, json: &str) -> Error {
        let words: Words = serde_json::from_str(json).unwrap();
        words.into_error("https://server", status, None)
    }

    #[test]
    fn a_refusal_is_told_from_a_failure_of_the_server() {
        let described = |code: u16, text: &str| {
            error(
                code,
                &format!(r#"{{"error_code":{code},"description":"{text}"}}"#),
            )
        };
        assert!(matches!(
            described(403, "Forbidden: bot was blocked by the user"),
            Error::Refused { code: 403, .. }
        ));
        assert!(matches!(
            described(
                400,
                "Bad Request: can't parse entities: Unsupported start tag"
            ),
            Error::Formatting { .. }
        ));
        assert!(matches!(
            described(
                400,
                "Bad Request: message is not modified: exactly the same"
            ),
            Error::NotModified
        ));
        assert!(matches!(
            described(400, "Bad Request: message to edit not found"),
            Error::Gone { .. }
        ));
        assert!(matches!(
            described(500, "Internal Server Error"),
            Error::Unreachable { .. }
        ));
        assert!(matches!(
            described(409, "Conflict: terminated by other getUpdates request"),
            Error::Conflict { .. }
        ));
        assert!(matches!(
            error(400, r#"{"parameters":{"migrate_to_chat_id":-100}}"#),
            Error::Moved { chat: -100 }
        ));
    }

    #[test]
    fn patience_is_read_wherever_a_server_writes_it() {
        let seconds = |error: Error| match error {
            Error::RetryAfter { seconds } => seconds,
            other => panic!("{other}"),
        };
        assert_eq!(
            seconds(error(429, r#"{"parameters":{"retry_after":7}}"#)),
            7
        );
        assert_eq!(seconds(error(429, "{}")), UNTOLD_S);
        assert_eq!(seconds(unreadable("s", 429, Some(3), b"<html>")), 3);
    }

    #[test]
    fn a_page_of_html_is_no_last_word_unless_it_is_about_our_request() {
        let of = |status| unreadable("https://server", status, None, b"<html>\n<b>nginx</b>");
        assert!(matches!(of(502), Error::Unreachable { .. }));
        assert!(matches!(of(200), Error::Unreachable { .. }));
        assert!(matches!(of(404), Error::Unreachable { .. }));
        assert!(matches!(of(413), Error::Refused { .. }));
    }
}
