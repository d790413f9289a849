//! The Telegram front end.
//!
//! Three loops that know nothing of one another but the store. **Ingress** takes updates from the server and stores them as
//! they came, before the server hears that we have them. The **handlers** read what is stored, ask the front desk, and say
//! what there is to say at once. The **sender** delivers the outbox: what the crew says, questions with their buttons, and a
//! job's progress as one message that is edited in place.
//!
//! *Architecture invariant:* this crate knows the front desk and the store. It knows no engine, no model and no project's code.

pub mod api;
mod handlers;
mod ingress;
pub mod markdown;
mod sender;
mod texts;
pub mod update;

use std::sync::Arc;
use std::time::Duration;

use ports::{FrontDesk, PersonId};
use store::{Standing, Store};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::api::Api;

/// The front end's name in the store.
pub const FRONT: &str = "telegram";

/// How long to wait for something new when nobody rings, and between tries of what failed.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest pause between tries while the server is out of reach.
const MAX_BACKOFF: Duration = Duration::from_secs(30);

/// What the bot is told.
pub struct Options {
    /// The bot's token.
    pub token: String,
    /// The Bot API server, such as `https://api.telegram.org`.
    pub server: String,
    /// Users who may talk to it.
    pub allowed_users: Vec<i64>,
    /// Chats that hear what admins must know; a private chat's id is its user's, who is an admin.
    pub admin_chats: Vec<i64>,
    /// How a run from a tape is named, such as `demo`.
    pub tape: Option<String>,
}

/// Why the bot cannot run.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Telegram does not let it.
    #[error(transparent)]
    Api(#[from] api::Error),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] store::Error),
}

/// The bot, ready to run.
pub struct Bot {
    shared: Shared,
}

/// What the loops share.
#[derive(Clone)]
struct Shared {
    api: Api,
    store: Store,
    desk: Arc<dyn FrontDesk>,
    /// Rung when an update was stored.
    arrived: Arc<Notify>,
    /// Rung when the outbox may hold something.
    outbox: Arc<Notify>,
    tape: Option<Arc<str>>,
    shutdown: CancellationToken,
}

impl Bot {
    /// Prepares the bot: who may talk to it is in the store when this returns. `outbox` is rung by whoever moves the
    /// projections on.
    pub async fn new(
        options: Options,
        store: Store,
        desk: Arc<dyn FrontDesk>,
        outbox: Arc<Notify>,
    ) -> Result<Self, Error> {
        let api = Api::new(&options.token, &options.server)?;
        for user in &options.allowed_users {
            store
                .set_standing(&person(*user), Standing::Allowed)
                .await?;
        }
        for chat in options.admin_chats.iter().filter(|chat| **chat > 0) {
            store.set_standing(&person(*chat), Standing::Admin).await?;
        }
        let chats: Vec<String> = options.admin_chats.iter().map(i64::to_string).collect();
        store.set_admin_chats(FRONT, &chats).await?;
        Ok(Self {
            shared: Shared {
                api,
                store,
                desk,
                arrived: Arc::default(),
                outbox,
                tape: options.tape.map(Into::into),
                shutdown: CancellationToken::new(),
            },
        })
    }

    /// Runs until `shutdown`, or until Telegram says that this token will never work.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        self.shared.shutdown = shutdown.child_token();
        let shared = &self.shared;
        let ended = shared.shutdown.clone().drop_guard();
        let result = tokio::try_join!(
            ingress::run(shared),
            handlers::run(shared),
            sender::run(shared)
        );
        drop(ended);
        result.map(|_| ())
    }
}

impl Shared {
    /// Waits for `duration`, or for the end; `false` at the end.
    async fn pause(&self, duration: Duration) -> bool {
        tokio::select! {
            () = self.shutdown.cancelled() => false,
            () = tokio::time::sleep(duration) => true,
        }
    }
}

/// A Telegram user as the rest of the program knows them.
fn person(user: i64) -> PersonId {
    PersonId::new(format!("{FRONT}:{user}"))
}

/// 1, 2, 4, … seconds, up to [`MAX_BACKOFF`].
fn backoff(tries: u32) -> Duration {
    PATIENCE.saturating_mul(1 << tries.min(10)).min(MAX_BACKOFF)
}
