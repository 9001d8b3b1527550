//! How workers went, counted; and whether they go faster than they answer.
//!
//! Decisions only. A storm begins with `deaths` workers that died one after the
//! other without a reply in between, and is over when nobody died for a `period`.
//! Then one more death is enough, until a reply or a second `period` without a
//! death: a pool that backs off makes its deaths rare, not harmless. Workers of
//! one pool that die in the same moment are one death: that of their parent.
//!
//! As long as some worker answers, others may die at any rate and it is no storm: who can
//! be served is, so that the server is ready. Nor need their pool slow down: it pauses for
//! workers that die young without having served, and to start another for one that has
//! takes as long as QGIS does.

use std::time::{Duration, Instant};

/// Deaths of one pool within it have one cause.
const MOMENT: Duration = Duration::from_millis(250);

/// How a worker went, as far as the server can see.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Departure {
    /// As it said that it would: restart, recycling, stop.
    Left,
    /// It took itself out after a request that left QGIS in doubt, out of memory included.
    Doubt,
    /// Its connection ended while it was idle.
    Idle,
    /// Its connection ended while it held a request.
    Serving,
    /// No sign of life.
    Silent,
    /// It did not end a request that was overdue or that nobody waited for.
    Stuck,
    /// What it said is against the protocol.
    Refused,
    /// Its connection was replaced by another one of its own.
    Reconnected,
}

impl Departure {
    pub const ALL: [Self; 8] = [
        Self::Left,
        Self::Doubt,
        Self::Idle,
        Self::Serving,
        Self::Silent,
        Self::Stuck,
        Self::Refused,
        Self::Reconnected,
    ];

    /// For status, metrics and log.
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Doubt => "doubt",
            Self::Idle => "idle",
            Self::Serving => "serving",
            Self::Silent => "silent",
            Self::Stuck => "stuck",
            Self::Refused => "refused",
            Self::Reconnected => "reconnected",
        }
    }

    /// It may have been the request's doing.
    pub fn is_death(self) -> bool {
        matches!(self, Self::Idle | Self::Serving | Self::Silent)
    }
}

/// How many went in which way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Departures([u64; Departure::ALL.len()]);

impl Departures {
    pub fn note(&mut self, departure: Departure) {
        self.0[departure as usize] += 1;
    }

    pub fn of(&self, departure: Departure) -> u64 {
        self.0[departure as usize]
    }

    /// All of them, those that never happened included.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Departure::ALL
            .map(|it| (it.name(), self.of(it)))
            .into_iter()
    }
}

/// The settings that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How many deaths are a storm; zero: there is none.
    pub deaths: u32,
    pub period: Duration,
}

/// Whether workers die faster than they answer.
#[derive(Debug)]
pub struct Storm {
    rules: Rules,
    n_deaths: u32,
    /// The last death, and in which pool.
    last: Option<(Instant, String)>,
    is_on: bool,
}

impl Storm {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            n_deaths: 0,
            last: None,
            is_on: false,
        }
    }

    /// Other rules from now on; what is known stays.
    pub fn configure(&mut self, rules: Rules) {
        self.rules = rules;
    }

    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// A worker of `pool` died. True if a storm begins with that.
    pub fn died(&mut self, pool: &str, now: Instant) -> bool {
        let since = |at: Instant| now.saturating_duration_since(at);
        let is_one =
            matches!(&self.last, Some((at, other)) if other == pool && since(*at) < MOMENT);
        let is_row = matches!(&self.last, Some((at, _)) if since(*at) < self.rules.period * 2);
        if is_one && self.n_deaths > 0 {
            return false;
        }
        self.n_deaths = if is_row { self.n_deaths + 1 } else { 1 };
        self.last = Some((now, pool.to_owned()));
        let begins = !self.is_on && self.rules.deaths > 0 && self.n_deaths >= self.rules.deaths;
        self.is_on |= begins;
        begins
    }

    /// A worker answered a request.
    pub fn answered(&mut self) {
        self.n_deaths = 0;
    }

    /// True if a storm ends. To be called now and then.
    pub fn tick(&mut self, now: Instant) -> bool {
        let period = self.rules.period;
        let is_calm = self
            .last
            .as_ref()
            .is_none_or(|(at, _)| now.saturating_duration_since(*at) >= period);
        let ends = self.is_on && is_calm;
        self.is_on &= !ends;
        ends
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn storm() -> Storm {
        Storm::new(Rules {
            deaths: 3,
            period: 10 * S,
        })
    }

    #[test]
    fn deaths_in_a_row_are_a_storm_until_it_is_calm() {
        let (mut storm, now) = (storm(), Instant::now());
        assert!(!storm.died("p", now));
        assert!(!storm.died("p", now + S));
        assert!(storm.died("p", now + 2 * S));
        assert!(!storm.died("p", now + 3 * S), "it is one already");
        storm.answered();
        assert!(!storm.tick(now + 12 * S) && storm.is_on());
        assert!(storm.tick(now + 13 * S) && !storm.is_on());
        assert!(!storm.tick(now + 14 * S), "it is said once");
    }

    #[test]
    fn workers_that_answer_before_they_die_are_no_storm() {
        let (mut storm, now) = (storm(), Instant::now());
        for second in 0..60 {
            storm.answered();
            assert!(!storm.died("p", now + second * S));
            assert!(!storm.died("p", now + second * S + S / 2));
        }
    }

    #[test]
    fn deaths_that_are_far_between_are_no_storm() {
        let (mut storm, now) = (storm(), Instant::now());
        assert!((0..9).all(|n| !storm.died("p", now + n * 20 * S)));
    }

    #[test]
    fn after_a_storm_one_more_death_is_enough_unless_somebody_answered() {
        for answered in [false, true] {
            let (mut storm, now) = (storm(), Instant::now());
            assert!((0..3).any(|n| storm.died("p", now + n * S)));
            assert!(storm.tick(now + 12 * S));
            if answered {
                storm.answered();
            }
            assert_eq!(storm.died("p", now + 13 * S), !answered);
        }
    }

    #[test]
    fn the_death_of_a_pool_is_one_death() {
        let (mut storm, now) = (storm(), Instant::now());
        assert!((0..16).all(|_| !storm.died("p", now)));
        assert!(!storm.died("q", now));
        assert!(storm.died("p", now + S));
    }

    #[test]
    fn each_departure_is_counted_under_its_own_name() {
        let mut departures = Departures::default();
        for (n, departure) in Departure::ALL.into_iter().enumerate() {
            (0..=n).for_each(|_| departures.note(departure));
        }
        let counts: Vec<_> = departures.iter().collect();
        assert_eq!(counts[0], ("left", 1));
        assert_eq!(counts[7], ("reconnected", 8));
        let mut names: Vec<_> = counts.iter().map(|(name, _)| name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), Departure::ALL.len());
    }
}
