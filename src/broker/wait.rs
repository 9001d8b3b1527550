//! How long a request has waited for workers so far. Told while it lasts, since whoever
//! leaves before the answer hears nothing from it.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Shared by who asks and the broker. A clone is the same wait.
#[derive(Debug, Clone)]
pub struct Wait(Arc<Mutex<Waited>>);

#[derive(Debug)]
struct Waited {
    /// None while it has a worker.
    since: Option<Instant>,
    /// For workers that it had.
    before: Duration,
}

impl Wait {
    pub fn since(now: Instant) -> Self {
        let waited = Waited {
            since: Some(now),
            before: Duration::ZERO,
        };
        Self(Arc::new(Mutex::new(waited)))
    }

    /// In all.
    pub fn until(&self, now: Instant) -> Duration {
        let waited = self.waited();
        let this_time = waited
            .since
            .map(|since| now.saturating_duration_since(since));
        waited.before + this_time.unwrap_or_default()
    }

    /// It has a worker, after `this_time`.
    pub(super) fn ended(&self, this_time: Duration) {
        let mut waited = self.waited();
        waited.since = None;
        waited.before += this_time;
    }

    /// It has lost its worker.
    pub(super) fn begins_again(&self, now: Instant) {
        self.waited().since = Some(now);
    }

    fn waited(&self) -> MutexGuard<'_, Waited> {
        self.0
            .lock()
            .expect("no code that holds this lock can panic")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_counts_is_the_time_without_a_worker() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (wait, seconds) = (Wait::since(start), Duration::from_secs);
        assert_eq!(wait.until(at(2)), seconds(2));
        wait.clone().ended(seconds(3));
        assert_eq!(wait.until(at(9)), seconds(3));
        wait.begins_again(at(10));
        assert_eq!(wait.until(at(14)), seconds(7));
    }
}
