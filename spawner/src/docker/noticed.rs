//! What the engine tells of a container beside its state: who has sent it a signal, and when the engine was away.

use bollard::Docker;
use bollard::query_parameters::EventsOptionsBuilder;
use futures::StreamExt as _;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::AGAIN;

/// Most signals that are kept.
const SIGNALS: usize = 16;

/// What the engine told of a container while it was watched.
#[derive(Debug, Default)]
pub(super) struct Noticed {
    /// Signals that were sent through the engine.
    signals: Vec<String>,
    /// How often the engine went away.
    breaks: u32,
}

impl Noticed {
    /// Who ended a container that ended with this code, if that was neither itself nor we, who have sent it nothing.
    pub(super) fn outside(&self, exit_code: i64) -> Option<String> {
        // What ends by a signal says 128 and its number; 255 is what an engine says that does not know.
        if !matches!(exit_code, 129..=192 | 255 | -1) {
            return None;
        }
        if let Some(signal) = self.signals.last() {
            return Some(format!(
                "somebody else had the engine send it signal {signal}"
            ));
        }
        (self.breaks > 0).then(|| "the engine went away while it ran".to_owned())
    }
}

/// Keeps what the engine tells of a container, until its end; asks for what it missed when the engine was away.
pub(super) async fn witness(
    docker: Docker,
    id: String,
    age: Duration,
    noticed: Arc<Mutex<Noticed>>,
) {
    let age = i64::try_from(age.as_secs()).unwrap_or(i64::MAX);
    let mut since = jiff::Timestamp::now()
        .as_second()
        .saturating_sub(age)
        .saturating_sub(1)
        .to_string();
    loop {
        let filters = HashMap::from([
            ("type", vec!["container".to_owned()]),
            ("container", vec![id.clone()]),
            (
                "event",
                ["kill", "die", "destroy"].map(str::to_owned).into(),
            ),
        ]);
        let options = EventsOptionsBuilder::default()
            .since(&since)
            .filters(&filters)
            .build();
        let events = docker.events(Some(options));
        tokio::pin!(events);
        while let Some(Ok(event)) = events.next().await {
            if let Some(at) = event.time_nano {
                // Behind this one.
                since = nanos(at.saturating_add(1));
            }
            match event.action.as_deref() {
                Some("kill") => {
                    let attributes = event.actor.and_then(|actor| actor.attributes);
                    let signal = attributes.and_then(|mut all| all.remove("signal"));
                    let mut noticed = lock(&noticed);
                    if noticed.signals.len() < SIGNALS {
                        noticed.signals.push(signal.unwrap_or_default());
                    }
                }
                Some("die" | "destroy") => return,
                _ => {}
            }
        }
        lock(&noticed).breaks += 1;
        tokio::time::sleep(AGAIN).await;
    }
}

/// A moment as the engine takes it: seconds, a point, nine digits.
fn nanos(at: i64) -> String {
    format!("{}.{:09}", at / 1_000_000_000, at % 1_000_000_000)
}

fn lock(noticed: &Mutex<Noticed>) -> MutexGuard<'_, Noticed> {
    noticed.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_end_from_outside_is_told_from_an_end_of_its_own() {
        let mut noticed = Noticed::default();
        assert_eq!(noticed.outside(137), None, "it did that itself");
        noticed.breaks = 1;
        assert_eq!(noticed.outside(1), None, "it did that itself");
        let words = |noticed: &Noticed| noticed.outside(137).unwrap();
        assert!(words(&noticed).contains("went away"));
        noticed.signals.push("9".to_owned());
        assert!(words(&noticed).contains("signal 9"));
        assert_eq!(nanos(1_700_000_000_000_000_042), "1700000000.000000042");
    }
}
