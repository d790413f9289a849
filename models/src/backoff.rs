//! When a failed try is repeated and after how long.

use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{HeaderMap, RETRY_AFTER};
use tokio::time::Instant;

use crate::config::RetryConfig;

/// Why one try gave no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct TryError {
    /// What happened, for a person; holds no key.
    pub message: String,
    /// The HTTP status, if there was one.
    pub status: Option<u16>,
    /// Whether doing the same again may help.
    pub retryable: bool,
    /// How long the endpoint asked to wait.
    pub retry_after: Option<Duration>,
}

impl TryError {
    /// A failure of the connection or of what came over it.
    pub fn transport(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            status: None,
            retryable: true,
            retry_after: None,
        }
    }

    /// A failure that the same question would meet again.
    pub fn lasting(message: impl Into<String>) -> Self {
        Self {
            retryable: false,
            ..Self::transport(message)
        }
    }
}

/// The waits between the tries of one model.
pub(crate) struct Backoff {
    config: RetryConfig,
    deadline: Instant,
    failed: u32,
}

impl Backoff {
    /// `deadline` bounds the waits together with everything else of the call.
    pub fn new(config: RetryConfig, deadline: Instant) -> Self {
        Self {
            config,
            deadline,
            failed: 0,
        }
    }

    /// How long to wait before the next try; `None` when there is none.
    pub fn next(&mut self, error: &TryError) -> Option<Duration> {
        self.failed += 1;
        if !error.retryable || self.failed >= self.config.tries {
            return None;
        }
        let longest = Duration::from_secs(self.config.max_wait_s);
        let wait = match error.retry_after {
            // Asking earlier than told to would only be refused again.
            Some(told) if told > longest => return None,
            // A little later than told, so that parallel calls do not come back all at once.
            Some(told) => told + told.mul_f64(rand::random::<f64>() * 0.1),
            None => {
                let doubled = Duration::from_millis(self.config.first_wait_ms)
                    .saturating_mul(1 << (self.failed - 1).min(16));
                doubled
                    .min(longest)
                    .mul_f64(0.5 + rand::random::<f64>() * 0.5)
            }
        };
        (Instant::now() + wait < self.deadline).then_some(wait)
    }

    /// How many tries failed so far.
    pub fn failed(&self) -> u32 {
        self.failed
    }
}

/// What `Retry-After` (seconds or an HTTP date) or `retry-after-ms` asks for.
pub(crate) fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let seconds = |text: &str, unit: f64| {
        let value = text.trim().parse::<f64>().ok()? / unit;
        (value.is_finite() && value >= 0.0).then(|| Duration::from_secs_f64(value.min(1e9)))
    };
    if let Some(wait) = text("retry-after-ms").and_then(|text| seconds(text, 1000.0)) {
        return Some(wait);
    }
    let text = text(RETRY_AFTER.as_str())?;
    if let Some(wait) = seconds(text, 1.0) {
        return Some(wait);
    }
    let at = jiff::fmt::rfc2822::parse(text.trim()).ok()?.timestamp();
    Some(Duration::try_from(at.duration_since(now)).unwrap_or(Duration::ZERO))
}

/// Whether a status may pass by itself.
pub(crate) fn is_passing(status: u16) -> bool {
    matches!(status, 408 | 409 | 425 | 429) || (500..600).contains(&status) && status != 501
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff(tries: u32) -> Backoff {
        let config = RetryConfig {
            tries,
            first_wait_ms: 100,
            max_wait_s: 2,
        };
        Backoff::new(config, Instant::now() + Duration::from_mins(1))
    }

    #[test]
    fn waits_grow_within_their_bound_and_end() {
        let mut backoff = backoff(10);
        let error = TryError::transport("x");
        let waits: Vec<_> = std::iter::from_fn(|| backoff.next(&error)).collect();
        assert_eq!(waits.len(), 9);
        assert!(waits[0] >= Duration::from_millis(50) && waits[0] <= Duration::from_millis(100));
        assert!(waits[3] >= Duration::from_millis(400));
        assert!(waits.iter().all(|wait| *wait <= Duration::from_secs(2)));
    }

    #[test]
    fn an_endpoint_is_obeyed_within_the_bound() {
        let told = |seconds| TryError {
            retry_after: Some(Duration::from_secs(seconds)),
            ..TryError::transport("429")
        };
        assert!(backoff(3).next(&told(1)).unwrap() >= Duration::from_secs(1));
        assert_eq!(backoff(3).next(&told(3)), None);
        assert_eq!(backoff(3).next(&TryError::lasting("no")), None);
        let mut late = Backoff::new(RetryConfig::default(), Instant::now());
        assert_eq!(late.next(&told(1)), None);
    }

    #[test]
    fn retry_after_is_read_in_every_form() {
        let now: Timestamp = "2026-05-01T10:00:00Z".parse().unwrap();
        let read = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value.parse().unwrap());
            retry_after(&headers, now)
        };
        assert_eq!(read("retry-after", "7"), Some(Duration::from_secs(7)));
        assert_eq!(
            read("retry-after", "Fri, 01 May 2026 10:00:30 GMT"),
            Some(Duration::from_secs(30))
        );
        assert_eq!(
            read("retry-after", "Fri, 01 May 2026 09:00:00 GMT"),
            Some(Duration::ZERO)
        );
        assert_eq!(read("retry-after", "soon"), None);
        assert_eq!(
            read("retry-after-ms", "250"),
            Some(Duration::from_millis(250))
        );
    }
}
