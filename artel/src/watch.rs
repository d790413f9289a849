//! Watches workers while they run: what they say becomes the record that people see, and what they have used is booked. When
//! their project's budget is used up they are stopped. Losing all of it costs nothing but the view: results do not pass here.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use protocol::{EventKind, Transport, WorkerEvent};
use store::{Awaited, Store, WAITING};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::spending::Tally;

/// How often it is looked for workers that are waited for.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is looked why workers still wait.
const ASK: Duration = Duration::from_secs(5);
/// Workers that are watched at a time; the others are when one of these ends.
const WATCHED: u64 = 128;

/// What is needed to watch.
#[derive(Clone)]
pub struct Watch {
    /// Where the record is.
    pub store: Store,
    /// Where workers speak.
    pub transport: Arc<dyn Transport>,
    /// Books what they used, where their spawner cannot.
    pub tally: Option<Tally>,
    /// How long the crew waits for a worker.
    pub patience: Duration,
}

impl Watch {
    /// Watches until the end.
    pub async fn run(self, shutdown: CancellationToken) {
        let mut watching = JoinSet::new();
        let mut watched: HashSet<String> = HashSet::new();
        let mut asked: Option<Instant> = None;
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                Some(ended) = watching.join_next(), if !watching.is_empty() => {
                    if let Ok(request) = ended {
                        watched.remove(&request);
                    }
                    continue;
                }
                () = tokio::time::sleep(LOOK) => {}
            }
            let awaited = match self.store.awaited_workers(WATCHED).await {
                Ok(awaited) => awaited,
                Err(error) => {
                    tracing::warn!(%error, "it cannot be seen which workers run");
                    continue;
                }
            };
            if !awaited.is_empty() && asked.is_none_or(|asked| asked.elapsed() >= ASK) {
                asked = Some(Instant::now());
                self.tell_why_they_wait(&awaited).await;
            }
            for awaited in awaited {
                if watched.insert(awaited.request.to_string()) {
                    let this = self.clone();
                    watching.spawn(async move {
                        if let Err(error) = this.watch(&awaited).await {
                            tracing::warn!(request = %awaited.request, "a worker is not watched for now: {error:#}");
                            tokio::time::sleep(ASK).await;
                        }
                        awaited.request.to_string()
                    });
                }
            }
        }
    }

    /// Watches one worker to its end.
    async fn watch(&self, awaited: &Awaited) -> anyhow::Result<()> {
        let request = &awaited.request;
        let patience = SignedDuration::try_from(self.patience)?;
        let until = Timestamp::now().checked_add(patience)?;
        self.store.worker_awaited(awaited, until).await?;
        let mut events = self.transport.events(request.as_str()).await?;
        while let Some(event) = events.next().await {
            self.hear(awaited, event).await?;
        }
        self.store.worker_ended(request).await?;
        Ok(())
    }

    async fn hear(&self, awaited: &Awaited, event: WorkerEvent) -> anyhow::Result<()> {
        let request = &awaited.request;
        match event.kind {
            EventKind::Started { spawner } => {
                self.store.worker_taken_up(request, &spawner).await?;
            }
            EventKind::Phase { name } => {
                let name: String = name.chars().take(100).collect();
                self.store.worker_phase(request, &name, event.at).await?;
            }
            EventKind::Usage { usage } => {
                let Some(tally) = &self.tally else {
                    return Ok(());
                };
                if tally.book(request.as_str(), &usage).await?
                    && tally.is_used_up(&awaited.project).await?
                {
                    tracing::warn!(%request, project = %awaited.project, "the budget is used up; the worker is stopped");
                    self.transport.unpaid(request.as_str()).await?;
                }
            }
            EventKind::Progress { .. } | EventKind::Log { .. } | EventKind::Refused { .. } => {}
        }
        Ok(())
    }

    /// Says of those that no spawner has taken up why that is.
    async fn tell_why_they_wait(&self, awaited: &[Awaited]) {
        let why = match self.transport.spawners().await {
            Ok(spawners) if spawners.is_empty() => format!("{WAITING}: none lives"),
            Ok(spawners) if spawners.iter().all(|beat| beat.running >= beat.capacity) => {
                format!("{WAITING}: all {} are full", spawners.len())
            }
            Ok(_) => WAITING.to_owned(),
            Err(error) => {
                tracing::warn!(%error, "it cannot be seen which spawners live");
                return;
            }
        };
        for awaited in awaited {
            if let Err(error) = self.store.worker_waits(&awaited.request, &why).await {
                tracing::warn!(request = %awaited.request, %error, "a worker's phase is not kept");
            }
        }
    }
}
