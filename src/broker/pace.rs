//! How fast requests are served, and with it when one that was refused may come again.
//!
//! `waiting × what one took on average ÷ workers`: the time until those are served that
//! wait now. It is a guess, so it has bounds: a second, because there was no room just
//! now, and a minute, because clients leave and work is forgotten.

use std::time::Duration;

const LEAST: Duration = Duration::from_secs(1);
const MOST: Duration = Duration::from_secs(60);

/// What one more request says weighs so much.
const NOVELTY: f64 = 0.05;

/// A moving average of how long requests keep their workers.
#[derive(Debug, Default)]
pub struct Pace(Option<f64>);

impl Pace {
    /// One kept its worker for so long.
    pub fn took(&mut self, time: Duration) {
        let time = time.as_secs_f64();
        let mean = self.0.get_or_insert(time);
        *mean += (time - *mean) * NOVELTY;
    }

    /// When to come again if so many wait for so many workers.
    pub fn retry_after(&self, n_waiting: usize, n_workers: usize) -> Duration {
        let seconds = n_waiting as f64 * self.0.unwrap_or(0.0) / n_workers.max(1) as f64;
        Duration::try_from_secs_f64(seconds).map_or(MOST, |it| it.clamp(LEAST, MOST))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn pace(times: &[Duration]) -> Pace {
        let mut pace = Pace::default();
        times.iter().for_each(|time| pace.took(*time));
        pace
    }

    #[test]
    fn it_is_the_time_in_which_those_that_wait_are_served() {
        let half = pace(&[500 * MS; 3]);
        assert_eq!(half.retry_after(40, 2), 10_000 * MS);
        assert_eq!(half.retry_after(40, 4), 5_000 * MS);
        assert_eq!(half.retry_after(10, 4), 1_250 * MS);
    }

    #[test]
    fn it_is_a_second_at_least_and_a_minute_at_most() {
        assert_eq!(pace(&[]).retry_after(1000, 1), LEAST);
        assert_eq!(pace(&[MS]).retry_after(10, 2), LEAST);
        assert_eq!(pace(&[5000 * MS]).retry_after(1000, 2), MOST);
        assert_eq!(pace(&[Duration::MAX]).retry_after(usize::MAX, 0), MOST);
        assert_eq!(pace(&[1000 * MS]).retry_after(7, 0), 7000 * MS);
    }

    #[test]
    fn one_slow_request_among_many_changes_little_and_many_change_it() {
        let mut pace = pace(&[100 * MS; 50]);
        pace.took(20_000 * MS);
        assert!(pace.retry_after(10, 1) < 12_000 * MS);
        (0..100).for_each(|_| pace.took(2000 * MS));
        assert!(pace.retry_after(10, 1) > 19_000 * MS);
    }
}
