//! The Telegram front end.
//!
//! Three loops that know nothing of one another but the store. **Ingress** takes updates from the server and stores them as
//! they came, before the server hears that we have them; only secrets are taken out. The **lanes** bring what is stored to its
//! end, chat by chat: handlers ask the front desk, and what there is to say at once is said. The **sender** delivers the
//! outbox: what the crew says, questions with their buttons, and a job's progress as one message that is edited in place.
//!
//! *Architecture invariant:* this crate knows the front desk and the store. It knows no engine, no model and no project's code.

pub mod api;
mod handlers;
mod ingress;
mod lanes;
pub mod markdown;
mod private;
mod say;
mod sender;
mod texts;
pub mod update;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use ports::{FrontDesk, NoticeSeverity, PersonId};
use store::{Standing, Store};
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::api::{Api, Button};
use crate::update::Me;

/// The front end's name in the store.
pub const FRONT: &str = "telegram";

/// How long to wait for something new when nobody rings, and between the first tries of what failed.
const PATIENCE: Duration = Duration::from_secs(1);
/// The longest pause between tries while the server is out of reach, in patiences.
const MOST_PATIENCES: u32 = 30;
/// How long what is under way may take when the program ends.
const GRACE: Duration = Duration::from_secs(5);
/// How long a notice to the admins may take to be written.
const NOTICE: Duration = Duration::from_secs(20);

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

/// Questions whose buttons are stored and not shown yet, by intent and revision.
type Buttons = Arc<Mutex<HashMap<(String, i64), Vec<Vec<Button>>>>>;

/// What the loops share.
#[derive(Clone)]
struct Shared {
    api: Api,
    store: Store,
    desk: Arc<dyn FrontDesk>,
    me: Arc<RwLock<Me>>,
    /// Rung when an update was stored, or a lane became free.
    arrived: Arc<Notify>,
    /// Rung when the outbox may hold something.
    outbox: Arc<Notify>,
    /// When strangers were refused last.
    refused: Arc<Mutex<HashMap<i64, Instant>>>,
    buttons: Buttons,
    tape: Option<Arc<str>>,
    patience: Duration,
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
        admit(&options, &store).await?;
        let me = Me {
            id: api.id(),
            name: None,
        };
        Ok(Self {
            shared: Shared {
                api,
                store,
                desk,
                me: Arc::new(RwLock::new(me)),
                arrived: Arc::default(),
                outbox,
                refused: Arc::default(),
                buttons: Arc::default(),
                tape: options.tape.map(Into::into),
                patience: PATIENCE,
                shutdown: CancellationToken::new(),
            },
        })
    }

    /// Another unit for all pauses than a second: between tries, and for looking whether there is something new.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.shared.patience = patience;
        self
    }

    /// Runs until `shutdown`, or until Telegram says that this token will never work.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Error> {
        self.shared.shutdown = shutdown.child_token();
        let shared = &self.shared;
        let ended = shared.shutdown.clone().drop_guard();
        let result = tokio::try_join!(
            introduce(shared),
            ingress::run(shared),
            lanes::run(shared),
            sender::run(shared)
        );
        drop(ended);
        result.map(|_| ())
    }
}

/// Gives people the standing that the configuration names. Whoever had theirs only from an earlier configuration loses it;
/// whoever entered a pairing code keeps it.
async fn admit(options: &Options, store: &Store) -> Result<(), Error> {
    let admins: Vec<PersonId> = options
        .admin_chats
        .iter()
        .filter(|chat| **chat > 0)
        .map(|chat| person(*chat))
        .collect();
    let allowed: Vec<PersonId> = options.allowed_users.iter().copied().map(person).collect();
    for known in store.people().await? {
        let ours = known.id.as_str().starts_with("telegram:");
        let fallen = match known.standing {
            Standing::Admin => !admins.contains(&known.id),
            Standing::Allowed => known.paired_at.is_none() && !allowed.contains(&known.id),
            Standing::Stranger | Standing::Blocked => false,
        };
        if ours && fallen {
            let standing = match known.paired_at {
                Some(_) => Standing::Allowed,
                None => Standing::Stranger,
            };
            store.set_standing(&known.id, standing).await?;
        }
    }
    for user in &allowed {
        store.set_standing(user, Standing::Allowed).await?;
    }
    for admin in &admins {
        store.set_standing(admin, Standing::Admin).await?;
    }
    let chats: Vec<String> = options.admin_chats.iter().map(i64::to_string).collect();
    store.set_admin_chats(FRONT, &chats).await?;
    Ok(())
}

/// Learns our name, which groups need, and puts the commands into the menu: both are niceties that a server may not have.
async fn introduce(shared: &Shared) -> Result<(), Error> {
    let mut tries = 0;
    loop {
        let answer = tokio::select! {
            () = shared.shutdown.cancelled() => return Ok(()),
            answer = shared.api.name() => answer,
        };
        match answer {
            Ok(name) => {
                tracing::info!(name, "the bot is reachable");
                shared.me.write().name = Some(name);
                break;
            }
            Err(
                error @ (api::Error::Unreachable { .. }
                | api::Error::RetryAfter { .. }
                | api::Error::Conflict { .. }),
            ) => {
                tracing::debug!(%error, "the bot's name is not known yet");
            }
            Err(error) => {
                tracing::debug!(%error, "the server does not tell the bot's name");
                break;
            }
        }
        tries += 1;
        if !shared.pause(shared.backoff(tries)).await {
            return Ok(());
        }
    }
    tokio::select! {
        () = shared.shutdown.cancelled() => {}
        answer = shared.api.offer_commands(texts::COMMANDS) => {
            if let Err(error) = answer {
                tracing::debug!(%error, "the server has no menu of commands");
            }
        }
    }
    Ok(())
}

impl Shared {
    /// Waits for `duration`, or for the end; `false` at the end.
    async fn pause(&self, duration: Duration) -> bool {
        tokio::select! {
            () = self.shutdown.cancelled() => false,
            () = tokio::time::sleep(duration) => true,
        }
    }

    /// 1, 2, 4, … patiences, up to [`MOST_PATIENCES`], and a little more or less, so that not everything is tried at once.
    fn backoff(&self, tries: u32) -> Duration {
        let full = self
            .patience
            .saturating_mul((1_u32 << tries.min(10)).min(MOST_PATIENCES));
        full.mul_f64(rand::random_range(0.8..1.2))
    }

    fn me(&self) -> Me {
        self.me.read().clone()
    }

    /// Tells the admins; when even that fails, the log is what is left.
    async fn notice(&self, fingerprint: &str, text: &str) {
        tracing::error!(fingerprint, "{text}");
        let told = self.desk.notice(NoticeSeverity::Warning, fingerprint, text);
        match tokio::time::timeout(NOTICE, told).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(fingerprint, %error, "no admin could be told"),
            Err(_) => tracing::error!(fingerprint, "no admin could be told in time"),
        }
    }
}

/// A Telegram user as the rest of the program knows them.
fn person(user: i64) -> PersonId {
    PersonId::new(format!("{FRONT}:{user}"))
}
