//! Watches workers while they run: what they say becomes the record that people see, and what they have used is booked. When
//! their project's budget is used up they are stopped. Losing all of it costs nothing but the view: results do not pass here.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use jiff::{SignedDuration, Timestamp};
use protocol::{EventKind, LIVES, Seen, Size, Transport, WorkerEvent};
use store::{Awaited, Store, WAITING};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

mod output;

use output::Output;

use crate::spending::Tally;

/// How often it is looked for workers that are waited for.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is looked why workers still wait.
const ASK: Duration = Duration::from_secs(5);
/// Workers that are watched at a time; the others are when one of these ends.
const WATCHED: u64 = 128;
/// How much of a spawner's name is told.
const SHOWN_NAME: usize = 60;

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
        let mut output = Output::default();
        while let Some(event) = events.next().await {
            if let Some(line) = output.line(&event) {
                self.store.worker_said(request, &line).await?;
            }
            self.hear(awaited, event).await?;
        }
        if let Some(line) = output.end() {
            self.store.worker_said(request, &line).await?;
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
        let seen = match self.transport.seen_spawners().await {
            Ok(seen) => seen,
            Err(error) => {
                tracing::warn!(%error, "it cannot be seen which spawners live");
                return;
            }
        };
        for awaited in awaited {
            let needs = match self.transport.job_size(awaited.request.as_str()).await {
                Ok(needs) => needs,
                Err(error) => {
                    tracing::warn!(request = %awaited.request, %error, "it cannot be seen what a worker needs");
                    return;
                }
            };
            let why = why_it_waits(needs, &seen);
            if let Err(error) = self.store.worker_waits(&awaited.request, &why).await {
                tracing::warn!(request = %awaited.request, %error, "a worker's phase is not kept");
            }
        }
    }
}

/// Why a worker waits that may use so much; none: that is not known.
fn why_it_waits(needs: Option<Size>, seen: &[Seen]) -> String {
    let fits = |seen: &&&Seen| {
        let size = seen.last.size.unwrap_or(Size::UNLIMITED);
        needs.is_none_or(|needs| needs.fits(size))
    };
    let full = |seen: &&Seen| seen.last.running >= seen.last.capacity;
    let (drain, take): (Vec<&Seen>, Vec<&Seen>) = seen.iter().partition(|seen| seen.last.draining);
    let (alive, silent): (Vec<&Seen>, Vec<&Seen>) =
        take.into_iter().partition(|seen| seen.silent < LIVES);
    let able: Vec<&Seen> = alive.iter().filter(fits).copied().collect();
    if !able.is_empty() {
        return if alive.iter().all(full) {
            format!("{WAITING}: all {} are full", alive.len())
        } else if able.iter().all(full) {
            format!("{WAITING}: those that are large enough are full")
        } else {
            WAITING.to_owned()
        };
    }
    let nobody = match (alive.is_empty(), drain.is_empty()) {
        (true, true) => ": none lives",
        (true, false) => ": none takes jobs",
        (false, _) => " that is large enough",
    };
    match silent.iter().filter(fits).min_by_key(|seen| seen.silent) {
        Some(missed) => {
            let name: String = missed.last.spawner.chars().take(SHOWN_NAME).collect();
            let ago = match missed.silent.as_secs() / 60 {
                0 => "less than a minute".to_owned(),
                minutes => format!("{minutes} min"),
            };
            format!("{WAITING}{nobody}; {name} was last seen {ago} ago")
        }
        None if alive.is_empty() => format!("{WAITING}{nobody}"),
        None => format!("{WAITING}{nobody}: none is known"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A spawner of so many cores that runs so many of its two jobs, and was last heard of so many seconds ago.
    fn seen(name: &str, cores: f64, running: u32, silent_s: u64) -> Seen {
        let mut last = protocol::suite::beat(name, Size::new(cores, 4096));
        last.running = running;
        Seen {
            last,
            silent: Duration::from_secs(silent_s),
        }
    }

    #[test]
    fn why_a_worker_waits_names_who_could_carry_it_and_when_that_was_last_seen() {
        let big = Some(Size::new(8.0, 1000));
        let said = |seen: &[Seen]| why_it_waits(big, seen);
        let (small, large) = (seen("small", 1.0, 0, 2), seen("large", 8.0, 0, 2));
        let (missed, older) = (seen("lost", 8.0, 2, 140), seen("older", 16.0, 0, 300));
        let mut drains = large.clone();
        drains.last.draining = true;
        assert_eq!(said(&[]), "waiting for a spawner: none lives");
        assert_eq!(
            said(&[missed.clone(), older.clone()]),
            "waiting for a spawner: none lives; lost was last seen 2 min ago"
        );
        assert_eq!(
            said(&[small.clone(), older, missed.clone()]),
            "waiting for a spawner that is large enough; lost was last seen 2 min ago"
        );
        assert_eq!(
            said(&[small.clone(), seen("just", 8.0, 0, 45)]),
            "waiting for a spawner that is large enough; just was last seen less than a minute ago"
        );
        assert_eq!(
            said(&[small.clone(), seen("too small", 2.0, 0, 140)]),
            "waiting for a spawner that is large enough: none is known"
        );
        assert_eq!(
            said(&[drains.clone()]),
            "waiting for a spawner: none takes jobs"
        );
        assert_eq!(
            said(&[drains, small.clone()]),
            "waiting for a spawner that is large enough: none is known"
        );
        assert_eq!(
            said(&[small.clone(), large, missed.clone()]),
            "waiting for a spawner"
        );
        let (busy, full) = (seen("busy", 8.0, 2, 2), seen("full", 1.0, 2, 2));
        assert_eq!(
            said(&[small.clone(), busy.clone(), missed]),
            "waiting for a spawner: those that are large enough are full"
        );
        assert_eq!(said(&[busy, full]), "waiting for a spawner: all 2 are full");
        // Of one that a former version has sent nothing is known but that it waits.
        assert_eq!(why_it_waits(None, &[small]), "waiting for a spawner");
        let long = seen(&"x".repeat(500), 8.0, 0, 60);
        assert!(said(&[long]).len() < 200);
    }

    #[test]
    fn the_crew_waits_for_longer_than_a_spawner_that_was_seen_lately_is_waited_for() {
        let margin = Duration::from_secs(nodes::Policy::default().worker_margin_s);
        let given_up = protocol::LATELY + spawner::Capacity::unlimited().grace;
        assert!(margin > given_up * 2, "and clones and pushes besides");
    }
}
