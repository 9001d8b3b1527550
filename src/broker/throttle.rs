//! Log lines that a stranger can cause: a few, then only how many.

use std::time::{Duration, Instant};

const PERIOD: Duration = Duration::from_secs(10);
const LINES: u32 = 10;

/// Lets ten lines through in ten seconds.
#[derive(Debug, Default)]
pub struct Throttle {
    period: Option<Instant>,
    n: u32,
}

impl Throttle {
    /// `Some(n)`: write the line; `n` were suppressed before it.
    pub fn allow(&mut self, now: Instant) -> Option<u32> {
        let mut suppressed = 0;
        if self.period.is_none_or(|period| now >= period + PERIOD) {
            suppressed = self.n.saturating_sub(LINES);
            self.period = Some(now);
            self.n = 0;
        }
        self.n = self.n.saturating_add(1);
        (self.n <= LINES).then_some(suppressed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_ten_lines_and_a_count() {
        let mut throttle = Throttle::default();
        let start = Instant::now();
        let n = (0..1000)
            .filter(|_| throttle.allow(start).is_some())
            .count();
        assert_eq!(n, 10);
        assert_eq!(throttle.allow(start + PERIOD), Some(990));
        assert_eq!(throttle.allow(start + PERIOD), Some(0));
    }
}
