//! Calls to a Bot API server. What we send are teloxide's requests; the calls are made here, because the client of teloxide
//! sleeps on a server's errors without being asked, hides the code of an error, and takes only answers that it understands
//! to the last field. Every call has a bound, no error holds the token, and redirects are not followed, for the token is part
//! of the address.

mod refusal;

use std::sync::Arc;
use std::time::Duration;

use ports::Plaintext;
use reqwest::header::RETRY_AFTER;
use serde::Serialize;
use serde_json::value::RawValue;
use teloxide::payloads::{
    AnswerCallbackQuery, AnswerCallbackQuerySetters, DeleteMessage, EditMessageText,
    EditMessageTextSetters, GetMe, SendMessage, SendMessageSetters, SetMyCommands,
};
use teloxide::requests::Payload;
use teloxide::types::{
    BotCommand, CallbackQueryId, ChatId, InlineKeyboardButton, InlineKeyboardMarkup,
    LinkPreviewOptions, MessageId, ParseMode,
};

pub use refusal::Error;

/// How long the server may hold a poll open, in seconds; ours waits a little longer before it gives up on the connection.
const POLL_S: u64 = 25;
/// How long any other call may take. Four of them fit into the minute that a delivery is ours.
const CALL: Duration = Duration::from_secs(12);
/// Updates that are taken at once.
const BATCH: u32 = 100;

/// A bot on a server.
#[derive(Clone)]
pub struct Api {
    http: reqwest::Client,
    /// `https://host:port/path`, without user and password for showing.
    shown: String,
    server: String,
    token: Arc<Plaintext>,
}

/// An update as it came.
pub struct Update {
    /// Unique and growing.
    pub id: i64,
    /// The JSON text.
    pub raw: String,
}

/// A button: its label, and what comes back when it is pressed (at most 64 bytes).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Button {
    /// What stands on it.
    pub label: String,
    /// What comes back.
    pub token: String,
}

#[derive(serde::Deserialize)]
struct Answer {
    ok: bool,
    #[serde(default)]
    result: Option<Box<RawValue>>,
    #[serde(flatten)]
    refusal: refusal::Words,
}

#[derive(serde::Deserialize)]
struct UpdateId {
    update_id: i64,
}

#[derive(serde::Deserialize)]
struct Sent {
    #[serde(default)]
    message_id: i64,
}

#[derive(serde::Deserialize)]
struct User {
    #[serde(default)]
    username: Option<String>,
    #[serde(default)]
    first_name: String,
}

impl Api {
    /// A bot with this token on this server, such as `https://api.telegram.org`.
    pub fn new(token: &str, server: &str) -> Result<Self, Error> {
        let failed = |message: String| Error::Unreachable {
            server: "TELEGRAM_API_URL".to_owned(),
            message,
        };
        let mut shown = url::Url::parse(server).map_err(|error| failed(error.to_string()))?;
        // A server behind a password: that is nobody's to read either.
        let _ = shown.set_username("");
        let _ = shown.set_password(None);
        shown.set_query(None);
        let http = reqwest::Client::builder()
            .connect_timeout(CALL)
            .timeout(CALL)
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .build()
            .map_err(|error| failed(error.without_url().to_string()))?;
        Ok(Self {
            http,
            shown: shown.as_str().trim_end_matches('/').to_owned(),
            server: server.trim_end_matches('/').to_owned(),
            token: Arc::new(Plaintext::new(token.to_owned())),
        })
    }

    /// The bot's own id, which its token begins with.
    pub fn id(&self) -> Option<i64> {
        self.token.expose().split(':').next()?.parse().ok()
    }

    /// Waits for updates from `offset` on, which tells the server that all before it are safe with us. 0: from the first one
    /// that the server still has.
    pub async fn updates(&self, offset: i64) -> Result<Vec<Update>, Error> {
        let body = serde_json::json!({
            "offset": offset,
            "limit": BATCH,
            "timeout": POLL_S,
            "allowed_updates": ["message", "edited_message", "callback_query"],
        });
        let patience = Duration::from_secs(POLL_S + 15);
        let result = match self.post("getUpdates", &body, patience).await {
            Err(Error::Refused { code: 404, .. }) => return Err(Error::Unauthorized),
            other => other?,
        };
        let all: Vec<Box<RawValue>> = self.read(&result)?;
        let mut updates = Vec::new();
        for raw in &all {
            // One that has no id could be neither stored nor acknowledged: it can only be said.
            match serde_json::from_str::<UpdateId>(raw.get()) {
                Ok(UpdateId { update_id }) => updates.push(Update {
                    id: update_id,
                    raw: raw.get().to_owned(),
                }),
                Err(error) => tracing::warn!(%error, "an update without an id was left out"),
            }
        }
        if updates.is_empty() && !all.is_empty() {
            return Err(self.unreachable("its updates have no ids"));
        }
        Ok(updates)
    }

    /// The bot's user name: shows that server and token work.
    pub async fn name(&self) -> Result<String, Error> {
        let result = match self.call(&GetMe::new()).await {
            Err(Error::Refused { code: 404, .. }) => return Err(Error::Unauthorized),
            other => other?,
        };
        let user: User = self.read(&result)?;
        Ok(user.username.unwrap_or(user.first_name))
    }

    /// Sends HTML, or the same words plain when the server refuses the formatting. Gives the message's id.
    pub async fn send(&self, chat: i64, html: &str, buttons: &[Vec<Button>]) -> Result<i64, Error> {
        match self.send_html(chat, html, buttons).await {
            // The group became a supergroup, which goes by another id.
            Err(Error::Moved { chat }) => self.send_html(chat, html, buttons).await,
            other => other,
        }
    }

    async fn send_html(
        &self,
        chat: i64,
        html: &str,
        buttons: &[Vec<Button>],
    ) -> Result<i64, Error> {
        let mut request = SendMessage::new(ChatId(chat), html).link_preview_options(no_preview());
        if !buttons.is_empty() {
            request = request.reply_markup(keyboard(buttons));
        }
        let formatted = request.clone().parse_mode(ParseMode::Html);
        let result = match self.call(&formatted).await {
            Err(Error::Formatting { .. }) => {
                request.text = crate::markdown::plain(html);
                self.call(&request).await?
            }
            other => other?,
        };
        // It was sent, whatever the server says about it; an id that we cannot read is one that cannot be edited.
        Ok(serde_json::from_str::<Sent>(result.get()).map_or(0, |sent| sent.message_id))
    }

    /// Replaces the text and the buttons of a message.
    pub async fn edit(
        &self,
        chat: i64,
        message: i64,
        html: &str,
        buttons: &[Vec<Button>],
    ) -> Result<(), Error> {
        match self.edit_html(chat, message, html, buttons).await {
            Err(Error::Moved { chat }) => self.edit_html(chat, message, html, buttons).await,
            other => other,
        }
    }

    async fn edit_html(
        &self,
        chat: i64,
        message: i64,
        html: &str,
        buttons: &[Vec<Button>],
    ) -> Result<(), Error> {
        let mut request = EditMessageText::new(ChatId(chat), message_id(message)?, html)
            .link_preview_options(no_preview())
            .reply_markup(keyboard(buttons));
        let formatted = request.clone().parse_mode(ParseMode::Html);
        let answer = match self.call(&formatted).await {
            Err(Error::Formatting { .. }) => {
                request.text = crate::markdown::plain(html);
                self.call(&request).await
            }
            other => other,
        };
        match answer {
            Ok(_) | Err(Error::NotModified) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Deletes a message; one that is gone is deleted.
    pub async fn delete(&self, chat: i64, message: i64) -> Result<(), Error> {
        let request = DeleteMessage::new(ChatId(chat), message_id(message)?);
        match self.call(&request).await {
            Ok(_) | Err(Error::Gone { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Ends the little clock on a button, with a word about what came of it.
    pub async fn acknowledge(&self, callback: &str, text: &str) -> Result<(), Error> {
        let request = AnswerCallbackQuery::new(CallbackQueryId(callback.to_owned()))
            .text(text.chars().take(190).collect::<String>());
        self.call(&request).await.map(|_| ())
    }

    /// Puts the commands into the client's menu: an optional nicety that some servers do not have.
    pub async fn offer_commands(&self, commands: &[(&str, &str)]) -> Result<(), Error> {
        let commands = commands
            .iter()
            .map(|(name, about)| BotCommand::new(*name, *about));
        self.call(&SetMyCommands::new(commands)).await.map(|_| ())
    }

    async fn call<P: Payload + Serialize>(&self, request: &P) -> Result<Box<RawValue>, Error> {
        // Servers differ in whether they care: the documentation writes `sendMessage`.
        let (first, rest) = P::NAME.split_at(1);
        let method = first.to_lowercase() + rest;
        self.post(&method, request, CALL).await
    }

    async fn post<B: Serialize>(
        &self,
        method: &str,
        body: &B,
        patience: Duration,
    ) -> Result<Box<RawValue>, Error> {
        let url = format!("{}/bot{}/{method}", self.server, self.token.expose());
        let network = |error: reqwest::Error| self.unreachable(&innermost(&error.without_url()));
        let response = self
            .http
            .post(url)
            .timeout(patience)
            .json(body)
            .send()
            .await
            .map_err(network)?;
        let status = response.status().as_u16();
        let retry_after = response
            .headers()
            .get(RETRY_AFTER)
            .and_then(|value| value.to_str().ok()?.parse().ok());
        let body = response.bytes().await.map_err(network)?;
        match serde_json::from_slice::<Answer>(&body) {
            Ok(Answer {
                ok: true, result, ..
            }) => Ok(result.unwrap_or_default()),
            Ok(answer) => Err(answer.refusal.into_error(&self.shown, status, retry_after)),
            Err(_) => Err(refusal::unreadable(&self.shown, status, retry_after, &body)),
        }
    }

    fn read<'a, T: serde::Deserialize<'a>>(&self, result: &'a RawValue) -> Result<T, Error> {
        serde_json::from_str(result.get()).map_err(|error| self.unreachable(&error.to_string()))
    }

    fn unreachable(&self, message: &str) -> Error {
        Error::Unreachable {
            server: self.shown.clone(),
            message: message.to_owned(),
        }
    }
}

/// The cause below all others: what is above repeats it, or tells the address.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
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
        .ok()
        .filter(|id| *id > 0)
        .map(MessageId)
        .ok_or_else(|| Error::Gone {
            message: format!("{message} is no message id"),
        })
}
