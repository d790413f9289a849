//! What is said while a job runs: bounded, in order, and never in the way of the work.

use ports::plain;
use protocol::{EventKind, SpawnRequest, Transport, WorkerEvent};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Events that wait to be published; more are dropped.
const WAITING: usize = 256;
/// How long one event may take to be published.
const PATIENCE: Duration = Duration::from_secs(2);
/// Most refusals of the proxy that are told.
const MAX_REFUSALS: u32 = 50;

/// The events of one run of a request.
#[derive(Clone)]
pub(crate) struct Events {
    sender: mpsc::Sender<EventKind>,
    refusals: Arc<AtomicU32>,
    /// Whether it was said that the worker runs.
    runs: Arc<Mutex<bool>>,
    activity: Activity,
}

impl Events {
    /// Starts publishing. The task ends when every clone is gone, or soon after.
    pub(crate) fn start(
        transport: Arc<dyn Transport>,
        request: Arc<SpawnRequest>,
    ) -> (Self, JoinHandle<()>) {
        let (sender, mut receiver) = mpsc::channel::<EventKind>(WAITING);
        let publisher = tokio::spawn(async move {
            let mut seq = 0;
            while let Some(kind) = receiver.recv().await {
                seq += 1;
                let event = WorkerEvent::new(&request, seq, kind);
                let sent = tokio::time::timeout(PATIENCE, transport.publish_event(&event)).await;
                if !matches!(sent, Ok(Ok(()))) {
                    let id = &request.request_id;
                    tracing::warn!(request = id, seq, "event {seq} of {id} was not published");
                }
            }
        });
        let events = Self {
            sender,
            refusals: Arc::default(),
            runs: Arc::default(),
            activity: Activity::new(),
        };
        (events, publisher)
    }

    /// Says something. When too much waits already, it is not said. What is a worker's is made plain, because people read it on
    /// their terminals.
    pub(crate) fn say(&self, mut kind: EventKind) {
        match &mut kind {
            EventKind::Progress { text, .. } => *text = plain(text),
            EventKind::Log { tail } => *tail = plain(tail),
            _ => {}
        }
        let _ = self.sender.try_send(kind);
    }

    pub(crate) fn phase(&self, name: impl Into<String>) {
        self.say(EventKind::Phase { name: name.into() });
    }

    /// Says that the worker runs, once. It may have told of its first step before whoever started it is back to say so.
    pub(crate) fn runs(&self) {
        let mut runs = self.runs.lock().unwrap_or_else(PoisonError::into_inner);
        if !*runs {
            self.phase("running");
            *runs = true;
        }
    }

    /// Says which step the worker is at.
    pub(crate) fn step(&self, step: u32) {
        self.runs();
        self.phase(format!("running: step {step}"));
    }

    pub(crate) fn refused(&self, host: &str, reason: &str) {
        if self.refusals.fetch_add(1, Ordering::Relaxed) < MAX_REFUSALS {
            tracing::warn!(
                host,
                reason,
                "a worker asked for an address and was refused"
            );
            self.say(EventKind::Refused {
                host: host.chars().take(300).collect(),
                reason: reason.to_owned(),
            });
        }
    }

    /// Signs of life of the worker.
    pub(crate) fn activity(&self) -> &Activity {
        &self.activity
    }
}

/// When the worker was last seen doing something, and whether it waits for an answer of ours.
#[derive(Clone)]
pub(crate) struct Activity {
    born: Instant,
    last_ms: Arc<AtomicU64>,
    waiting: Arc<AtomicU32>,
}

/// The worker waits for us while this lives.
pub(crate) struct Waiting(Activity);

impl Activity {
    fn new() -> Self {
        Self {
            born: Instant::now(),
            last_ms: Arc::default(),
            waiting: Arc::default(),
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// A sign of life.
    pub(crate) fn touch(&self) {
        self.last_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// The worker waits for an answer of ours: that is not idling.
    pub(crate) fn waiting(&self) -> Waiting {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        Waiting(self.clone())
    }

    /// How long there was no sign of life.
    pub(crate) fn silence(&self) -> Duration {
        if self.waiting.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let last = self.last_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.now_ms().saturating_sub(last))
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.touch();
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waiting_for_an_answer_of_ours_is_not_idling() {
        let activity = Activity::new();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(activity.silence(), Duration::from_secs(5));
        let waiting = activity.waiting();
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(activity.silence(), Duration::ZERO);
        drop(waiting);
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(activity.silence(), Duration::from_secs(1));
    }

    #[tokio::test]
    async fn a_worker_that_tells_of_its_first_step_at_once_was_said_to_run_before() {
        let (sender, mut said) = mpsc::channel(WAITING);
        let events = Events {
            sender,
            refusals: Arc::default(),
            runs: Arc::default(),
            activity: Activity::new(),
        };
        events.step(1);
        events.runs();
        events.step(2);
        drop(events);
        let mut phases = Vec::new();
        while let Some(kind) = said.recv().await {
            if let EventKind::Phase { name } = kind {
                phases.push(name);
            }
        }
        assert_eq!(phases, ["running", "running: step 1", "running: step 2"]);
    }
}
