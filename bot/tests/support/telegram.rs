//! A Bot API server for tests: speaks the protocol over HTTP, remembers what it was told, and lets a test be the people.
//! The tests of the whole program use it too.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::any;
use serde_json::{Value, json};
use tokio::sync::{Mutex, Notify};

/// A message as people see it now.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub chat: i64,
    pub text: String,
    /// Label and callback data of each button.
    pub buttons: Vec<(String, String)>,
    pub edits: usize,
    pub deleted: bool,
}

#[derive(Default)]
struct World {
    next_update: i64,
    next_message: i64,
    updates: Vec<Value>,
    /// Every `offset` that was asked for: what was acknowledged.
    acknowledged: i64,
    messages: BTreeMap<i64, Seen>,
    calls: Vec<(String, Value)>,
    /// Answers to give instead, once each, by method in lower case.
    refusals: Vec<(String, u16, String)>,
    /// Methods that this server does not know, in lower case.
    unknown: Vec<String>,
}

/// The server. Dropping it leaves the port.
#[derive(Clone)]
pub struct Telegram {
    world: Arc<Mutex<World>>,
    changed: Arc<Notify>,
    pub url: String,
}

pub const TOKEN: &str = "123456789:AAE-test-token-of-the-double-000000";

impl Telegram {
    pub async fn start() -> Self {
        Self::start_on("127.0.0.1").await
    }

    /// On another address of this machine.
    pub async fn start_on(address: &str) -> Self {
        let listener = tokio::net::TcpListener::bind((address, 0)).await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let telegram = Self {
            world: Arc::default(),
            changed: Arc::default(),
            url,
        };
        telegram.world.lock().await.next_update = 1000;
        let app = Router::new()
            .route("/{bot}/{method}", any(serve))
            .with_state(telegram.clone());
        tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        telegram
    }

    async fn push(&self, make: impl FnOnce(i64, i64) -> Value) -> i64 {
        let mut world = self.world.lock().await;
        let update = world.next_update;
        world.next_update += 1;
        world.next_message += 1;
        let message = world.next_message;
        let mut value = make(update, message);
        value["update_id"] = update.into();
        world.updates.push(value);
        drop(world);
        self.changed.notify_waiters();
        message
    }

    /// An update as a test makes it; `{message}` may hold the number of a message.
    pub async fn update(&self, make: impl FnOnce(i64) -> Value) -> i64 {
        self.push(|_, message| make(message)).await
    }

    /// A person writes in a private chat. Gives the message's id.
    pub async fn write(&self, person: i64, text: &str) -> i64 {
        let text = text.to_owned();
        self.push(|_, message| {
            json!({"message": {
                "message_id": message,
                "date": 1_700_000_000,
                "chat": {"id": person, "type": "private", "first_name": "Ada"},
                "from": {"id": person, "is_bot": false, "first_name": "Ada", "language_code": "en"},
                "text": text,
                "a_field_of_tomorrow": {"x": 1},
            }})
        })
        .await
    }

    /// A person presses a button.
    pub async fn press(&self, person: i64, message: i64, data: &str) {
        let data = data.to_owned();
        self.push(|update, _| {
            json!({"callback_query": {
                "id": format!("cb{update}"),
                "from": {"id": person, "is_bot": false, "first_name": "Ada"},
                "chat_instance": "1",
                "data": data,
                "message": {"message_id": message, "date": 1_700_000_000, "chat": {"id": person, "type": "private"}},
            }})
        })
        .await;
    }

    /// An update of a kind that nobody knows yet.
    pub async fn strange_update(&self) {
        self.push(|_, _| json!({"hologram": {"depth": 3}})).await;
    }

    /// The next call of a method gets this answer instead.
    pub async fn refuse_once(&self, method: &str, answer: Value) {
        let status = answer["error_code"].as_u64().unwrap_or(400);
        self.answer_once(method, u16::try_from(status).unwrap(), &answer.to_string())
            .await;
    }

    /// The next call of a method gets this status and this text, whatever it is.
    pub async fn answer_once(&self, method: &str, status: u16, body: &str) {
        let answer = (method.to_lowercase(), status, body.to_owned());
        self.world.lock().await.refusals.push(answer);
    }

    /// The next calls of a method are answered as they should be; what was planned for it comes after them.
    pub async fn pass(&self, method: &str, times: usize) {
        let mut world = self.world.lock().await;
        for _ in 0..times {
            world
                .refusals
                .push((method.to_lowercase(), 0, String::new()));
        }
    }

    /// From now on the server does not know a method.
    pub async fn forget_method(&self, method: &str) {
        let mut world = self.world.lock().await;
        world.unknown.push(method.to_lowercase());
    }

    /// Somebody deletes a message that the bot sent.
    pub async fn lose(&self, message: i64) {
        self.world.lock().await.messages.remove(&message);
    }

    /// Every message that was sent, by id.
    pub async fn messages(&self) -> BTreeMap<i64, Seen> {
        self.world.lock().await.messages.clone()
    }

    /// Every call of a method, in lower case.
    pub async fn calls(&self, method: &str) -> Vec<Value> {
        let world = self.world.lock().await;
        world
            .calls
            .iter()
            .filter(|(name, _)| name == method)
            .map(|(_, body)| body.clone())
            .collect()
    }

    /// The id that the next update gets.
    pub async fn next_update(&self) -> i64 {
        self.world.lock().await.next_update
    }

    /// The highest offset that was asked for.
    pub async fn acknowledged(&self) -> i64 {
        self.world.lock().await.acknowledged
    }

    /// Waits until a message fits.
    pub async fn wait_for(
        &self,
        what: &str,
        within: Duration,
        fits: impl Fn(&Seen) -> bool,
    ) -> (i64, Seen) {
        let found = tokio::time::timeout(within, async {
            loop {
                let waiting = self.changed.notified();
                if let Some((id, seen)) = self
                    .messages()
                    .await
                    .into_iter()
                    .find(|(_, seen)| !seen.deleted && fits(seen))
                {
                    return (id, seen);
                }
                let _ = tokio::time::timeout(Duration::from_millis(200), waiting).await;
            }
        })
        .await;
        if let Ok(found) = found {
            return found;
        }
        panic!(
            "no message within {within:?}: {what}; there are {:#?}",
            self.messages().await
        )
    }
}

async fn serve(
    State(telegram): State<Telegram>,
    Path((bot, method)): Path<(String, String)>,
    body: axum::body::Bytes,
) -> (axum::http::StatusCode, String) {
    let method = method.to_lowercase();
    let planned = {
        let mut world = telegram.world.lock().await;
        let at = world.refusals.iter().position(|(name, ..)| *name == method);
        at.map(|at| world.refusals.remove(at))
            .filter(|(_, status, _)| *status != 0)
    };
    let (status, text) = if let Some((_, status, text)) = planned {
        let body: Value = serde_json::from_slice(&body).unwrap_or_default();
        telegram.world.lock().await.calls.push((method, body));
        (status, text)
    } else {
        let (status, value) = answer(&telegram, &bot, &method, &body).await;
        (status, value.to_string())
    };
    telegram.changed.notify_waiters();
    (axum::http::StatusCode::from_u16(status).unwrap(), text)
}

fn message_of(id: i64, seen: &Seen) -> Value {
    json!({
        "message_id": id,
        "date": 1_700_000_000,
        "chat": {"id": seen.chat, "type": if seen.chat < 0 { "group" } else { "private" }, "first_name": "Ada", "title": "People"},
        "from": {"id": 123_456_789, "is_bot": true, "first_name": "Artel", "username": "artel_bot"},
        "text": seen.text,
    })
}

fn buttons_of(body: &Value) -> Vec<(String, String)> {
    body["reply_markup"]["inline_keyboard"]
        .as_array()
        .into_iter()
        .flatten()
        .flat_map(|row| row.as_array().cloned().unwrap_or_default())
        .map(|button| {
            let text = |name: &str| button[name].as_str().unwrap_or_default().to_owned();
            assert!(
                text("callback_data").len() <= 64,
                "Telegram allows 64 bytes: {button}"
            );
            (text("text"), text("callback_data"))
        })
        .collect()
}

async fn answer(telegram: &Telegram, bot: &str, method: &str, body: &[u8]) -> (u16, Value) {
    if bot != format!("bot{TOKEN}") {
        return (
            401,
            json!({"ok": false, "error_code": 401, "description": "Unauthorized"}),
        );
    }
    let body: Value = serde_json::from_slice(body).unwrap_or_default();
    {
        let mut world = telegram.world.lock().await;
        world.calls.push((method.to_owned(), body.clone()));
        if world.unknown.iter().any(|name| name == method) {
            return (
                404,
                json!({"ok": false, "error_code": 404, "description": "Not Found: method not found"}),
            );
        }
    }
    let number = |name: &str| {
        body[name]
            .as_i64()
            .or_else(|| body[name].as_str()?.parse().ok())
    };
    let result = match method {
        "getme" => json!({
            "id": 123_456_789, "is_bot": true, "first_name": "Artel", "username": "artel_bot",
            "can_join_groups": true, "can_read_all_group_messages": false, "supports_inline_queries": false,
            "can_connect_to_business": false, "has_main_web_app": false,
        }),
        "getupdates" => {
            let offset = number("offset").unwrap_or(0);
            let timeout = u64::try_from(number("timeout").unwrap_or(0))
                .unwrap()
                .min(50);
            let until = tokio::time::Instant::now() + Duration::from_secs(timeout);
            loop {
                let waiting = telegram.changed.notified();
                {
                    let mut world = telegram.world.lock().await;
                    world.acknowledged = world.acknowledged.max(offset);
                    let fresh: Vec<Value> = world
                        .updates
                        .iter()
                        .filter(|update| update["update_id"].as_i64().unwrap() >= offset)
                        .cloned()
                        .collect();
                    if !fresh.is_empty() || tokio::time::Instant::now() >= until {
                        break json!(fresh);
                    }
                }
                let _ = tokio::time::timeout_at(until, waiting).await;
            }
        }
        "sendmessage" => {
            let mut world = telegram.world.lock().await;
            world.next_message += 1;
            let id = world.next_message;
            let seen = Seen {
                chat: number("chat_id").unwrap(),
                text: body["text"].as_str().unwrap().to_owned(),
                buttons: buttons_of(&body),
                ..Seen::default()
            };
            assert!(
                seen.text.chars().count() <= 4096,
                "Telegram allows 4096 characters"
            );
            let message = message_of(id, &seen);
            world.messages.insert(id, seen);
            message
        }
        "editmessagetext" | "editmessagereplymarkup" => {
            let mut world = telegram.world.lock().await;
            let id = number("message_id").unwrap();
            let Some(seen) = world.messages.get_mut(&id) else {
                return (
                    400,
                    json!({"ok": false, "error_code": 400, "description": "Bad Request: message to edit not found"}),
                );
            };
            let text = body["text"]
                .as_str()
                .map_or_else(|| seen.text.clone(), str::to_owned);
            let buttons = buttons_of(&body);
            if text == seen.text && buttons == seen.buttons {
                return (
                    400,
                    json!({"ok": false, "error_code": 400, "description": "Bad Request: message is not modified: specified new message content and reply markup are exactly the same as a current content and reply markup of the message"}),
                );
            }
            seen.text = text;
            seen.buttons = buttons;
            seen.edits += 1;
            message_of(id, seen)
        }
        "deletemessage" => {
            let mut world = telegram.world.lock().await;
            let id = number("message_id").unwrap();
            world.messages.entry(id).or_default().deleted = true;
            json!(true)
        }
        "answercallbackquery" | "deletewebhook" | "sendchataction" => json!(true),
        // What this server does not know: reactions, menus and whatever comes.
        _ => {
            return (
                404,
                json!({"ok": false, "error_code": 404, "description": "Not Found: method not found"}),
            );
        }
    };
    (200, json!({"ok": true, "result": result}))
}
