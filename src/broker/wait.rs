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
    /// For workers that it had; None while it never had one.
    before: Option<Duration>,
}

impl Wait {
    pub fn since(now: Instant) -> Self {
        let waited = Waited {
            since: Some(now),
            before: None,
        };
        Self(Arc::new(Mutex::new(waited)))
    }

    /// In all.
    pub fn until(&self, now: Instant) -> Duration {
        let waited = self.waited();
        let this_time = waited
            .since
            .map(|since| now.saturating_duration_since(since));
        waited.before.unwrap_or_default() + this_time.unwrap_or_default()
    }

    pub(super) fn never_ended(&self) -> bool {
        self.waited().before.is_none()
    }

    /// It has a worker. How long that took this time.
    pub(super) fn ended(&self, now: Instant) -> Duration {
        let mut waited = self.waited();
        let since = waited.since.take();
        let this_time = since.map_or(Duration::ZERO, |it| now.saturating_duration_since(it));
        waited.before = Some(waited.before.unwrap_or_default() + this_time);
        this_time
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
        assert!(wait.never_ended());
        assert_eq!(wait.clone().ended(at(3)), seconds(3));
        assert!(!wait.never_ended());
        assert_eq!(wait.until(at(9)), seconds(3));
        wait.begins_again(at(10));
        assert_eq!(wait.until(at(14)), seconds(7));
        assert_eq!(wait.ended(at(15)), seconds(5));
        assert_eq!(wait.until(at(20)), seconds(8));
    }
}
