//! How often each client may ask: so many requests a second, on average over
//! [`WINDOW`], which may all come at once.
//!
//! The generic cell rate algorithm of ITU-T I.371: each request moves the clock of its
//! client on by its share of a second, and whose clock is too far ahead has to wait.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::waiting::Name;

/// Over which the average is taken.
const WINDOW: Duration = Duration::from_secs(10);

/// Clients are forgotten no earlier than when there are so many.
const FEW: usize = 1024;

#[derive(Debug, Default)]
pub struct Rates {
    clocks: HashMap<Name, Instant>,
    /// With so many clients, look for those whose clock is behind.
    sweep_at: usize,
}

impl Rates {
    /// How long `client` has to wait with its request; None, and counted, if it may ask
    /// now. `rate`: in a second; 0: any number.
    pub fn ask(&mut self, client: &Name, rate: usize, now: Instant) -> Option<Duration> {
        if rate == 0 {
            self.clocks.clear();
            return None;
        }
        let share = Duration::from_secs(1).div_f64(rate as f64);
        let clock = self.clocks.get(client).map_or(now, |clock| now.max(*clock));
        let ahead = clock - now + share;
        if ahead > WINDOW.max(share) {
            return Some(ahead - WINDOW);
        }
        self.clocks.insert(client.clone(), clock + share);
        if self.clocks.len() > self.sweep_at.max(FEW) {
            self.clocks.retain(|_, clock| *clock > now);
            self.sweep_at = self.clocks.len() * 2;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_client_may_ask_at_its_rate_and_for_ten_seconds_at_once() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        let mut ask = |client: &str, at| rates.ask(&Name::from(client), 2, now + at);
        let at_once = (0..100)
            .filter(|_| ask("x", Duration::ZERO).is_none())
            .count();
        assert_eq!(at_once, 20);
        assert_eq!(ask("x", Duration::ZERO), Some(S / 2));
        assert_eq!(
            ask("y", Duration::ZERO),
            None,
            "others have clocks of their own"
        );
        let later = (0..100)
            .filter(|i| ask("x", S + S * *i / 100).is_none())
            .count();
        assert_eq!(
            later, 3,
            "two for the second before, one for the half after it"
        );
        let rested = (0..100).filter(|_| ask("x", 100 * S).is_none()).count();
        assert_eq!(rested, 20);
    }

    #[test]
    fn without_a_limit_nobody_waits_and_nothing_is_kept() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        rates.ask(&Name::from("x"), 1, now);
        let refused = (0..100).filter_map(|_| rates.ask(&Name::from("x"), 0, now));
        assert_eq!(refused.count(), 0);
        assert!(rates.clocks.is_empty());
    }

    #[test]
    fn a_million_clients_are_forgotten_once_their_clocks_are_behind() {
        let (mut rates, now) = (Rates::default(), Instant::now());
        for i in 0..1_000_000u32 {
            let at = now + S * i / 1000;
            rates.ask(&Name::from(i.to_string()), 1, at);
        }
        assert!(rates.clocks.len() < 4 * 1000, "{}", rates.clocks.len());
    }
}
