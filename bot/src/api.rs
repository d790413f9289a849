//! Calls to a Bot API server: teloxide's requests for what we send, and a long poll of our own for what comes, because an
//! update is kept as it came and teloxide would give us only what it understood.

use std::time::Duration;

use serde_json::value::RawValue;
use teloxide::payloads::{AnswerCallbackQuerySetters, EditMessageTextSetters, SendMessageSetters};
use teloxide::requests::Requester;
use teloxide::types::{
    CallbackQueryId, ChatId, InlineKeyboardButton, InlineKeyboardMarkup, LinkPreviewOptions,
    MessageId, ParseMode,
};
use teloxide::{ApiError, RequestError};

/// How long the server may hold a poll open, in seconds; ours waits a little longer before it gives up on the connection.
const POLL_S: u64 = 25;

/// What a call came to instead of success.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server asks for patience.
    #[error("Telegram asks to wait {seconds} s")]
    RetryAfter {
        /// How long.
        seconds: u64,
    },
    /// The server does not want this and never will: the chat is gone, the bot is blocked, the message was deleted.
    #[error("Telegram refused it: {message}")]
    Refused {
        /// Its words.
        message: String,
    },
    /// The formatting was not understood; the same text without it will be.
    #[error("Telegram cannot read the formatting: {message}")]
    Formatting {
        /// Its words.
        message: String,
    },
    /// The token is wrong or was revoked.
    #[error("Telegram does not know this bot token: check TELEGRAM_BOT_TOKEN")]
    Unauthorized,
    /// Another program polls with the same token.
    #[error("another program takes this bot's updates: stop it, or use a bot of your own")]
    Conflict,
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

/// A bot on a server.
#[derive(Clone)]
pub struct Api {
    bot: teloxide::Bot,
    http: reqwest::Client,
    server: String,
}

/// An update as it came.
pub struct Update {
    /// Unique and growing.
    pub id: i64,
    /// The JSON text.
    pub raw: String,
}

#[derive(serde::Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default)]
    result: Option<Vec<Box<RawValue>>>,
    #[serde(default)]
    error_code: Option<u16>,
    #[serde(default)]
    description: String,
    #[serde(default)]
    parameters: Parameters,
}

#[derive(Default, serde::Deserialize)]
struct Parameters {
    #[serde(default)]
    retry_after: Option<u64>,
}

#[derive(serde::Deserialize)]
struct UpdateId {
    update_id: i64,
}

impl Api {
    /// A bot with this token on this server, such as `https://api.telegram.org`.
    pub fn new(token: &str, server: &str) -> Result<Self, Error> {
        let unreachable = |message: String| Error::Unreachable {
            server: server.to_owned(),
            message,
        };
        let url = url::Url::parse(server).map_err(|error| unreachable(error.to_string()))?;
        let http = reqwest::Client::builder()
            .connect_timeout(Duration::from_secs(10))
            .timeout(Duration::from_secs(POLL_S + 15))
            .build()
            .map_err(|error| unreachable(error.without_url().to_string()))?;
        Ok(Self {
            bot: teloxide::Bot::new(token).set_api_url(url),
            http,
            server: server.trim_end_matches('/').to_owned(),
        })
    }

    /// Waits for updates from `offset` on, which tells the server that all before it are safe with us.
    pub async fn updates(&self, offset: i64) -> Result<Vec<Update>, Error> {
        let unreachable = |message: String| Error::Unreachable {
            server: self.server.clone(),
            message,
        };
        let url = format!("{}/bot{}/getUpdates", self.server, self.bot.token());
        let body = serde_json::json!({
            "offset": offset,
            "limit": 100,
            "timeout": POLL_S,
            "allowed_updates": ["message", "callback_query"],
        });
        let answer = self
            .http
            .post(url)
            .json(&body)
            .send()
            .await
            .map_err(|error| unreachable(error.without_url().to_string()))?;
        let answer: Answer = answer
            .json()
            .await
            .map_err(|error| unreachable(error.without_url().to_string()))?;
        if !answer.ok {
            return Err(match (answer.error_code, answer.parameters.retry_after) {
                (_, Some(seconds)) => Error::RetryAfter { seconds },
                (Some(401 | 404), _) => Error::Unauthorized,
                (Some(409), _) => Error::Conflict,
                _ => unreachable(answer.description),
            });
        }
        let mut updates = Vec::new();
        for raw in answer.result.unwrap_or_default() {
            // One that has no id could be neither stored nor acknowledged: it can only be said.
            match serde_json::from_str::<UpdateId>(raw.get()) {
                Ok(UpdateId { update_id }) => {
                    updates.push(Update {
                        id: update_id,
                        raw: raw.get().to_owned(),
                    });
                }
                Err(error) => tracing::warn!(%error, "an update without an id was left out"),
            }
        }
        Ok(updates)
    }

    /// The bot's user name: shows that server and token work.
    pub async fn name(&self) -> Result<String, Error> {
        let me = self
            .bot
            .get_me()
            .await
            .map_err(|error| self.error(&error))?;
        Ok(me
            .user
            .username
            .clone()
            .unwrap_or_else(|| me.user.first_name.clone()))
    }

    /// Sends HTML, or the same words plain when the server refuses the formatting. Gives the message's id.
    pub async fn send(&self, chat: i64, html: &str, buttons: &[Vec<Button>]) -> Result<i64, Error> {
        match self.send_once(chat, html, true, buttons).await {
            Err(Error::Formatting { .. }) => {
                self.send_once(chat, &crate::markdown::plain(html), false, buttons)
                    .await
            }
            other => other,
        }
    }

    async fn send_once(
        &self,
        chat: i64,
        text: &str,
        html: bool,
        buttons: &[Vec<Button>],
    ) -> Result<i64, Error> {
        let mut request = self
            .bot
            .send_message(ChatId(chat), text)
            .link_preview_options(no_preview());
        if html {
            request = request.parse_mode(ParseMode::Html);
        }
        if !buttons.is_empty() {
            request = request.reply_markup(keyboard(buttons));
        }
        match request.await {
            Ok(message) => Ok(i64::from(message.id.0)),
            Err(error) => {
                // It may have been sent, and only the server's description of it be of a kind that the client does not know.
                if let RequestError::InvalidJson { raw, .. } = &error
                    && let Some(id) = sent_id(raw)
                {
                    return Ok(id);
                }
                Err(self.error(&error))
            }
        }
    }

    /// Replaces the text and the buttons of a message.
    pub async fn edit(
        &self,
        chat: i64,
        message: i64,
        html: &str,
        buttons: &[Vec<Button>],
    ) -> Result<(), Error> {
        match self.edit_once(chat, message, html, true, buttons).await {
            Err(Error::Formatting { .. }) => {
                self.edit_once(chat, message, &crate::markdown::plain(html), false, buttons)
                    .await
            }
            other => other,
        }
    }

    async fn edit_once(
        &self,
        chat: i64,
        message: i64,
        text: &str,
        html: bool,
        buttons: &[Vec<Button>],
    ) -> Result<(), Error> {
        let mut request = self
            .bot
            .edit_message_text(ChatId(chat), message_id(message)?, text)
            .link_preview_options(no_preview())
            .reply_markup(keyboard(buttons));
        if html {
            request = request.parse_mode(ParseMode::Html);
        }
        match request.await {
            Ok(_) | Err(RequestError::Api(ApiError::MessageNotModified)) => Ok(()),
            Err(RequestError::InvalidJson { raw, .. }) if sent_id(&raw).is_some() => Ok(()),
            Err(error) => Err(self.error(&error)),
        }
    }

    /// Deletes a message; one that is gone is deleted.
    pub async fn delete(&self, chat: i64, message: i64) -> Result<(), Error> {
        match self
            .bot
            .delete_message(ChatId(chat), message_id(message)?)
            .await
        {
            Ok(_) | Err(RequestError::Api(ApiError::MessageToDeleteNotFound)) => Ok(()),
            Err(error) => Err(self.error(&error)),
        }
    }

    /// Ends the little clock on a button, with a word about what came of it.
    pub async fn acknowledge(&self, callback: &str, text: &str) -> Result<(), Error> {
        self.bot
            .answer_callback_query(CallbackQueryId(callback.to_owned()))
            .text(text.chars().take(190).collect::<String>())
            .await
            .map(|_| ())
            .map_err(|error| self.error(&error))
    }

    /// Puts the commands into the client's menu: an optional nicety that some servers do not have.
    pub async fn offer_commands(&self, commands: &[(&str, &str)]) -> Result<(), Error> {
        let commands: Vec<_> = commands
            .iter()
            .map(|(name, about)| teloxide::types::BotCommand::new(*name, *about))
            .collect();
        self.bot
            .set_my_commands(commands)
            .await
            .map(|_| ())
            .map_err(|error| self.error(&error))
    }

    fn error(&self, error: &RequestError) -> Error {
        let unreachable = |message: String| Error::Unreachable {
            server: self.server.clone(),
            message,
        };
        match error {
            RequestError::RetryAfter(seconds) => Error::RetryAfter {
                seconds: u64::from(seconds.seconds()),
            },
            RequestError::Api(ApiError::InvalidToken) => Error::Unauthorized,
            RequestError::Api(ApiError::CantParseEntities(message)) => Error::Formatting {
                message: message.clone(),
            },
            RequestError::Api(error) => Error::Refused {
                message: error.to_string(),
            },
            RequestError::MigrateToChatId(chat) => Error::Refused {
                message: format!("the group became the supergroup {chat}"),
            },
            RequestError::InvalidJson { raw, .. } => unreachable(raw.chars().take(200).collect()),
            // Its text holds the address, and the address holds the token.
            RequestError::Network(error) => unreachable(innermost(error.as_ref())),
            RequestError::Io(error) => unreachable(error.to_string()),
        }
    }
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let Some(mut cause) = error.source() else {
        return "no connection".to_owned();
    };
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// A button: its label, and what comes back when it is pressed (at most 64 bytes).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Button {
    /// What stands on it.
    pub label: String,
    /// What comes back.
    pub token: String,
}

fn keyboard(rows: &[Vec<Button>]) -> InlineKeyboardMarkup {
    InlineKeyboardMarkup::new(rows.iter().map(|row| {
        row.iter()
            .map(|button| {
                InlineKeyboardButton::callback(button.label.clone(), button.token.clone())
            })
            .collect::<Vec<_>>()
    }))
}

fn no_preview() -> LinkPreviewOptions {
    LinkPreviewOptions {
        is_disabled: true,
        url: None,
        prefer_small_media: false,
        prefer_large_media: false,
        show_above_text: false,
    }
}

fn message_id(message: i64) -> Result<MessageId, Error> {
    i32::try_from(message)
        .map(MessageId)
        .map_err(|_| Error::Refused {
            message: format!("{message} is no message id"),
        })
}

fn sent_id(raw: &str) -> Option<i64> {
    let answer: serde_json::Value = serde_json::from_str(raw).ok()?;
    (answer["ok"] == true)
        .then(|| answer["result"]["message_id"].as_i64())
        .flatten()
}
