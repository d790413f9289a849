//! Does errands: checks and deploys, on behalf of threads that sleep meanwhile. An errand is claimed with a lease, done, its
//! outcome recorded, and then sent as a signal; each of these can be repeated after a crash.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use graph::Engine;
use ports::{Deployer, Errand, ErrandOutcome, ErrandWork, Errands, Failure, Forge};
use store::{ClaimedErrand, Store};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::Instrument;

use crate::traces;

const LEASE: Duration = Duration::from_secs(30);
const RENEWAL: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(1);
/// Errands that are done at the same time: checks are whole test suites.
const AT_ONCE: usize = 3;
/// Outcomes that are sent together.
const BATCH: u64 = 50;

/// The crew's port: hands over and takes back.
#[derive(Clone)]
pub struct ErrandDesk {
    store: Store,
    bell: Arc<Notify>,
}

impl ErrandDesk {
    /// A desk on the store.
    pub fn new(store: Store) -> Self {
        Self {
            store,
            bell: Arc::default(),
        }
    }
}

fn failure(error: &store::Error) -> Failure {
    Failure::new("database", error.to_string()).retryable()
}

#[async_trait]
impl Errands for ErrandDesk {
    async fn hand_over(&self, errand: &Errand) -> ports::Result<()> {
        self.store
            .hand_over_errand(errand)
            .await
            .map_err(|error| failure(&error))?;
        self.bell.notify_one();
        Ok(())
    }

    async fn cancel(&self, key: &str) -> ports::Result<()> {
        self.store
            .cancel_errand(key)
            .await
            .map_err(|error| failure(&error))
    }
}

/// Who does them.
#[derive(Clone)]
pub struct Runner {
    /// Where they are handed over.
    pub desk: ErrandDesk,
    /// Runs checks.
    pub forge: Arc<dyn Forge>,
    /// Deploys.
    pub deployer: Arc<dyn Deployer>,
    /// Gets the outcomes.
    pub engine: Engine,
}

impl Runner {
    /// Does errands until the end.
    pub async fn run(self, shutdown: CancellationToken) {
        let room = Arc::new(Semaphore::new(AT_ONCE));
        let tasks = TaskTracker::new();
        while !shutdown.is_cancelled() {
            self.send_outcomes().await;
            let Ok(permit) = room.clone().try_acquire_owned() else {
                self.rest(&shutdown).await;
                continue;
            };
            match self.desk.store.claim_errand(LEASE).await {
                Ok(Some(claimed)) => {
                    let (this, shutdown) = (self.clone(), shutdown.clone());
                    let errand = &claimed.errand;
                    let (kind, project) = match &errand.work {
                        ErrandWork::Checks { project, .. } => ("checks", project),
                        ErrandWork::Deploy(request) => ("deploy", &request.project),
                    };
                    let span = tracing::info_span!(
                        "errand",
                        kind,
                        %project,
                        thread = errand.reply_to,
                        key = errand.key,
                        attempt = claimed.attempt,
                    );
                    traces::join(&span, &errand.reply_to);
                    let attending = async move {
                        this.attend(claimed, &shutdown).await;
                        drop(permit);
                        this.desk.bell.notify_one();
                    };
                    tasks.spawn(attending.instrument(span));
                }
                Ok(None) => self.rest(&shutdown).await,
                Err(error) => {
                    tracing::error!(%error, "errands cannot be claimed");
                    self.rest(&shutdown).await;
                }
            }
        }
        tasks.close();
        tasks.wait().await;
    }

    async fn rest(&self, shutdown: &CancellationToken) {
        tokio::select! {
            () = shutdown.cancelled() => {}
            () = self.desk.bell.notified() => {}
            () = tokio::time::sleep(PATIENCE) => {}
        }
    }

    /// Does one errand, unless it is taken back meanwhile.
    async fn attend(&self, claimed: ClaimedErrand, shutdown: &CancellationToken) {
        let store = &self.desk.store;
        let key = &claimed.errand.key;
        let given_up = async {
            loop {
                tokio::time::sleep(RENEWAL).await;
                match store.renew_errand(key, &claimed.token, LEASE).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(error) => {
                        tracing::warn!(errand = %key, %error, "an errand's lease was not renewed");
                    }
                }
            }
        };
        let outcome = tokio::select! {
            outcome = self.work(&claimed.errand) => outcome,
            () = given_up => {
                tracing::info!(errand = %key, "an errand was taken back");
                return;
            }
            () = shutdown.cancelled() => {
                if let Err(error) = store.give_back_errand(key, &claimed.token).await {
                    tracing::warn!(errand = %key, %error, "an errand was not given back; its lease will run out");
                }
                return;
            }
        };
        if let Err(error) = store.finish_errand(key, &claimed.token, &outcome).await {
            tracing::error!(errand = %key, %error, "an errand's outcome was not recorded; it is done again");
        }
    }

    async fn work(&self, errand: &Errand) -> ErrandOutcome {
        let done = match &errand.work {
            ErrandWork::Checks { project, sha } => self
                .forge
                .run_checks(project, sha)
                .await
                .map(ErrandOutcome::Checks),
            ErrandWork::Deploy(request) => self
                .deployer
                .deploy(request)
                .await
                .map(ErrandOutcome::Deploy),
        };
        done.unwrap_or_else(ErrandOutcome::Failed)
    }

    async fn send_outcomes(&self) {
        let replies = match self.desk.store.undelivered_errands(BATCH).await {
            Ok(replies) => replies,
            Err(error) => {
                tracing::error!(%error, "outcomes of errands cannot be read");
                return;
            }
        };
        for reply in replies {
            let sent = self
                .engine
                .signal(
                    reply.reply_to.as_str(),
                    ErrandOutcome::SIGNAL,
                    &reply.key,
                    &reply.outcome,
                )
                .await;
            match sent {
                Ok(_) | Err(graph::EngineError::UnknownThread(_)) => {
                    if let Err(error) = self.desk.store.errand_delivered(&reply.key).await {
                        tracing::error!(errand = reply.key, %error, "an outcome is sent again, which changes nothing");
                    }
                }
                Err(error) => {
                    tracing::error!(errand = reply.key, %error, "an outcome was not sent; it is tried again");
                }
            }
        }
    }
}
