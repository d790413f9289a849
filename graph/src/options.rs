//! How a node is run: retries and time limits.

use std::{fmt, sync::Arc, time::Duration};

use crate::{cache::CachePolicy, error::NodeError};

type Predicate = Arc<dyn Fn(&NodeError) -> bool + Send + Sync>;

/// How often, and after how long, a failed task is tried again.
///
/// The default: 3 attempts with the first, 0.5 s before the second, twice as long before each further one, at most 128 s,
/// with jitter; everything is retried but what is [fatal](NodeError::fatal). Attempts are counted in the database.
#[derive(Clone)]
pub struct RetryPolicy {
    pub(crate) first: Duration,
    pub(crate) factor: f64,
    pub(crate) ceiling: Duration,
    pub(crate) attempts: u32,
    pub(crate) jitter: bool,
    pub(crate) retryable: Predicate,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self {
            first: Duration::from_millis(500),
            factor: 2.0,
            ceiling: Duration::from_secs(128),
            attempts: 3,
            jitter: true,
            retryable: Arc::new(|error| !error.is_fatal()),
        }
    }
}

impl RetryPolicy {
    /// How many attempts there are, the first included; at least 1.
    #[must_use]
    pub fn attempts(mut self, attempts: u32) -> Self {
        self.attempts = attempts.max(1);
        self
    }

    /// How long to wait before the second attempt.
    #[must_use]
    pub fn first_interval(mut self, interval: Duration) -> Self {
        self.first = interval;
        self
    }

    /// By what the interval grows with each attempt.
    #[must_use]
    pub fn factor(mut self, factor: f64) -> Self {
        self.factor = factor.max(1.0);
        self
    }

    /// The longest interval.
    #[must_use]
    pub fn ceiling(mut self, ceiling: Duration) -> Self {
        self.ceiling = ceiling;
        self
    }

    /// Whether an interval is a random one between half of it and all of it, so that many failures do not come back at once.
    #[must_use]
    pub fn jitter(mut self, jitter: bool) -> Self {
        self.jitter = jitter;
        self
    }

    /// Which failures are retried. Fatal ones never are.
    #[must_use]
    pub fn when(mut self, retryable: impl Fn(&NodeError) -> bool + Send + Sync + 'static) -> Self {
        self.retryable = Arc::new(move |error| !error.is_fatal() && retryable(error));
        self
    }

    /// How long to wait after the attempt with this number (from 1) has failed.
    pub(crate) fn interval(&self, attempt: u32) -> Duration {
        let exponent = i32::try_from(attempt.saturating_sub(1)).unwrap_or(i32::MAX);
        let seconds =
            (self.first.as_secs_f64() * self.factor.powi(exponent)).min(self.ceiling.as_secs_f64());
        let seconds = if self.jitter {
            seconds * rand::random_range(0.5..=1.0)
        } else {
            seconds
        };
        Duration::try_from_secs_f64(seconds).unwrap_or(self.ceiling)
    }
}

impl fmt::Debug for RetryPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RetryPolicy")
            .field("attempts", &self.attempts)
            .field("first", &self.first)
            .field("factor", &self.factor)
            .field("ceiling", &self.ceiling)
            .field("jitter", &self.jitter)
            .finish_non_exhaustive()
    }
}

/// How a node is run. The default: no retry, no time limit, not deferred, not cached.
#[derive(Clone, Debug, Default)]
pub struct NodeOptions {
    pub(crate) retry: Option<RetryPolicy>,
    pub(crate) timeout: Option<Duration>,
    pub(crate) idle_timeout: Option<Duration>,
    pub(crate) deferred: bool,
    pub(crate) cache: Option<CachePolicy>,
}

impl NodeOptions {
    /// Failures are retried like this.
    #[must_use]
    pub fn retry(mut self, policy: RetryPolicy) -> Self {
        self.retry = Some(policy);
        self
    }

    /// An attempt that takes longer fails.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = Some(timeout);
        self
    }

    /// An attempt that gives no sign of life ([`Context::heartbeat`](crate::Context::heartbeat)) for so long fails.
    #[must_use]
    pub fn idle_timeout(mut self, timeout: Duration) -> Self {
        self.idle_timeout = Some(timeout);
        self
    }

    /// The node runs only when nothing else is left to run.
    #[must_use]
    pub fn deferred(mut self) -> Self {
        self.deferred = true;
        self
    }

    /// Results are kept like this, for all threads of the graph that share the cache, and a task whose result is there does
    /// not run.
    #[must_use]
    pub fn cache(mut self, policy: CachePolicy) -> Self {
        self.cache = Some(policy);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_grow_to_the_ceiling() {
        let policy = RetryPolicy::default().jitter(false);
        let seconds: Vec<f64> = (1..=10)
            .map(|attempt| policy.interval(attempt).as_secs_f64())
            .collect();
        assert_eq!(
            seconds,
            [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 128.0]
        );
        assert_eq!(policy.interval(u32::MAX), Duration::from_secs(128));
    }

    #[test]
    fn jitter_takes_at_most_half_off() {
        let policy = RetryPolicy::default();
        for _ in 0..1000 {
            let interval = policy.interval(3).as_secs_f64();
            assert!((1.0..=2.0).contains(&interval), "{interval}");
        }
    }

    #[test]
    fn a_predicate_cannot_allow_what_is_fatal() {
        let policy = RetryPolicy::default().when(|_| true);
        assert!((policy.retryable)(&NodeError::msg("x")));
        assert!(!(policy.retryable)(&NodeError::msg("x").fatal()));
    }
}
