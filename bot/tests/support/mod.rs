//! A bot on a store of its own, a Bot API server over HTTP, and a front desk that writes down what it is asked for.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod desk;
pub mod telegram;

use std::sync::Arc;
use std::time::Duration;

use bot::{Bot, Options};
use desk::Desk;
use ports::{Audience, Choice, Event, OpenWait, PersonId, ProjectId, Recorded, WaitId, WaitKind};
use serde_json::{Value, json};
use store::{JournalEntry, Location, Projector, Store};
use telegram::{TOKEN, Telegram};
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const OWNER: i64 = 4_200_001;
pub const FRIEND: i64 = 4_200_002;
pub const ADMIN: i64 = 4_200_003;
pub const STRANGER: i64 = 4_200_666;
pub const GROUP: i64 = -777;
/// Bound of every wait; much more than a busy machine needs.
pub const SOON: Duration = Duration::from_mins(1);
/// The unit of all pauses of the bot here.
pub const PATIENCE: Duration = Duration::from_millis(20);

pub struct World {
    pub telegram: Telegram,
    pub store: Store,
    pub desk: Arc<Desk>,
    pub outbox: Arc<Notify>,
    folder: tempfile::TempDir,
    projector: Projector,
    cursor: i64,
}

pub struct Running {
    task: JoinHandle<Result<(), bot::Error>>,
    shutdown: CancellationToken,
}

impl Running {
    /// As `kill -9` would end it: nothing gets a chance to be finished.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }

    /// SIGTERM.
    pub async fn stop(self) {
        self.shutdown.cancel();
        let ended = tokio::time::timeout(SOON, self.task).await;
        ended.expect("it ends").unwrap().unwrap();
    }

    /// Its end, when it ends by itself.
    pub async fn ended(self) -> Result<(), bot::Error> {
        let ended = tokio::time::timeout(SOON, self.task).await;
        ended.expect("it ends by itself").unwrap()
    }
}

/// The one provider of TLS, which the program installs at its start.
pub fn provide_crypto() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

impl World {
    pub async fn new() -> Self {
        provide_crypto();
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&Location::Sqlite(folder.path().join("artel.db")))
            .await
            .unwrap();
        Self {
            telegram: Telegram::start().await,
            projector: Projector::new(&store),
            desk: Arc::new(Desk::default()),
            outbox: Arc::default(),
            cursor: 0,
            store,
            folder,
        }
    }

    /// A world with a bot that runs.
    pub async fn running() -> (Self, Running) {
        let world = Self::new().await;
        let running = world.start().await;
        (world, running)
    }

    pub async fn start(&self) -> Running {
        let options = Options {
            token: TOKEN.to_owned(),
            server: self.telegram.url.clone(),
            allowed_users: vec![OWNER, FRIEND],
            admin_chats: vec![ADMIN],
            tape: None,
        };
        let bot = Bot::new(
            options,
            self.store.clone(),
            self.desk.clone(),
            self.outbox.clone(),
        )
        .await
        .unwrap()
        .with_patience(PATIENCE);
        let shutdown = CancellationToken::new();
        Running {
            task: tokio::spawn(bot.run(shutdown.clone())),
            shutdown,
        }
    }

    /// What a process had in hand when it was killed is handed out again at once.
    pub async fn break_leases(&self) {
        self.store.break_leases().await.unwrap();
    }

    /// Forgets how often updates were tried: a test may kill more often than an update is tried.
    pub async fn forget_tries(&self) {
        sqlx::query("UPDATE inbox SET attempts = 0")
            .execute(self.store.sqlite_pool().unwrap())
            .await
            .unwrap();
    }

    /// Something happened in a project.
    pub async fn tell(&mut self, project: &ProjectId, job: Option<&str>, event: Event) {
        let recorded = Recorded {
            project: project.clone(),
            job: job.map(Into::into),
            task: None,
            event,
        };
        let entry = JournalEntry {
            cursor: self.cursor + 1,
            stream: recorded.stream().to_owned(),
            number: self.cursor + 1,
            name: recorded.event.name().to_owned(),
            payload: serde_json::to_value(&recorded).unwrap(),
            at: jiff::Timestamp::now(),
        };
        self.projector.apply(self.cursor, &[entry]).await.unwrap();
        self.cursor += 1;
        self.outbox.notify_one();
    }

    /// A project of the owner's that this chat talks about.
    pub async fn project_in(&mut self, name: &str, chat: i64) -> ProjectId {
        let project = ProjectId::new(name);
        let chat = chat.to_string();
        self.store
            .remember_chat("telegram", &chat, None)
            .await
            .unwrap();
        self.store
            .set_current_project("telegram", &chat, Some(&project))
            .await
            .unwrap();
        let owner = PersonId::new(format!("telegram:{OWNER}"));
        self.tell(&project, None, Event::ProjectFounded { owner })
            .await;
        project
    }

    pub async fn say(&mut self, project: &ProjectId, key: &str, text: &str) {
        let event = Event::Said {
            key: key.to_owned(),
            to: Audience::Owner,
            kind: ports::SaidKind::News,
            text: text.to_owned(),
        };
        self.tell(project, None, event).await;
    }

    pub async fn ask(&mut self, project: &ProjectId, job: Option<&str>, wait: OpenWait) {
        let event = Event::WaitOpened {
            thread: format!("{project}/{}", job.unwrap_or("conversation")),
            interrupt: format!("answer:{}", wait.id),
            wait,
        };
        self.tell(project, job, event).await;
    }

    /// Waits until every update that was sent is dealt with.
    pub async fn settled(&self) {
        eventually("every update is dealt with", || async {
            let next = self.telegram.next_update().await;
            (self.telegram.acknowledged().await >= next
                && self
                    .store
                    .unhandled_updates("telegram", 10)
                    .await
                    .unwrap()
                    .is_empty())
            .then_some(())
        })
        .await;
    }

    /// What people see in a chat, in order.
    pub async fn texts(&self, chat: i64) -> Vec<String> {
        self.telegram
            .messages()
            .await
            .into_values()
            .filter(|seen| seen.chat == chat && !seen.deleted)
            .map(|seen| seen.text)
            .collect()
    }

    /// Whether a text stands anywhere in what we keep.
    pub fn keeps(&self, text: &str) -> bool {
        std::fs::read_dir(self.folder.path())
            .unwrap()
            .any(|file| contains(&std::fs::read(file.unwrap().path()).unwrap(), text))
    }
}

fn contains(haystack: &[u8], needle: &str) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle.as_bytes())
}

pub fn help_wait(id: &str) -> OpenWait {
    OpenWait {
        id: WaitId::new(id),
        kind: WaitKind::Help,
        question: "**The tests fail.** What now?".to_owned(),
        options: vec![
            Choice::new("retry", "Try again"),
            Choice::new("give_up", "Give up"),
        ],
        free_text: true,
        audience: Audience::Owner,
    }
}

pub fn secret_wait(id: &str) -> OpenWait {
    OpenWait {
        kind: WaitKind::Secret,
        question: "Missing:\n- `WEATHER_API_KEY`: send `/secret WEATHER_API_KEY` here.".to_owned(),
        options: vec![
            Choice::new("check", "It is set"),
            Choice::new("give_up", "Give up"),
        ],
        free_text: false,
        ..help_wait(id)
    }
}

/// A message in a group.
pub fn in_group(person: i64, text: &str) -> impl FnOnce(i64) -> Value {
    let text = text.to_owned();
    move |message| {
        json!({"message": {
            "message_id": message, "date": 1_700_000_000,
            "chat": {"id": GROUP, "type": "group", "title": "People"},
            "from": {"id": person, "is_bot": false, "first_name": "Ada"},
            "text": text,
        }})
    }
}

/// The Bot API's refusal.
pub fn refusal(code: u16, description: &str) -> Value {
    json!({"ok": false, "error_code": code, "description": description})
}

pub fn patience(seconds: u64) -> Value {
    json!({
        "ok": false, "error_code": 429, "description": "Too Many Requests: retry later",
        "parameters": {"retry_after": seconds},
    })
}

/// Tries until it holds, within a bound.
pub async fn eventually<F, Fut, T>(what: &str, mut attempt: F) -> T
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Option<T>>,
{
    let until = tokio::time::Instant::now() + SOON;
    loop {
        if let Some(value) = attempt().await {
            return value;
        }
        assert!(
            tokio::time::Instant::now() < until,
            "not within {SOON:?}: {what}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
