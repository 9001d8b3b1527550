//! What a request is likely to cost, in milliseconds of a worker.
//!
//! A guess from what the request says of itself, times what its like turned out
//! to cost:
//!
//! `cost = base(operation) × (1 + megapixels) × layers × learned`
//!
//! `learned` is a moving average of taken ÷ guessed. It is kept for the same work
//! (project, operation, layers) and, for work that nobody asked for before, for
//! the operation in the project. The table forgets what was unused for longest.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::time::Duration;

use lru::LruCache;

/// Averages that are kept: some 200 kB.
const KNOWN_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("it is not zero");

/// What one new request says weighs so much.
const NOVELTY: f32 = 0.25;

/// An average says how far a guess is off, within reason.
const LEARNED: (f32, f32) = (0.001, 10_000.0);

/// No estimate is beyond: a longer request ends at its deadline.
const COST_MAX: f32 = 600_000.0;

/// More layers than this are one drawing after another, but not so slowly.
const LAYERS_MAX: u32 = 64;

/// What a request says about its size.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Work {
    /// Of the picture.
    pub pixels: u64,
    /// How many layers or feature types; 0 if it does not say.
    pub layers: u32,
    /// What it is about, as a hash: layers, feature types, template.
    pub subject: u64,
    /// Features without any limit.
    pub is_endless: bool,
}

/// Which averages a request belongs to, and its guess.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Kind {
    same: u64,
    alike: u64,
    guess: f32,
}

impl Kind {
    pub fn of(project: &str, operation: &str, work: &Work) -> Self {
        let operation = operation.to_ascii_lowercase();
        let alike = hash((project, &operation));
        Self {
            same: hash((alike, work.subject, work.is_endless)),
            alike,
            guess: guess(&operation, work),
        }
    }
}

fn hash(what: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    what.hash(&mut hasher);
    hasher.finish()
}

fn guess(operation: &str, work: &Work) -> f32 {
    let base = match operation {
        "getprint" => 100.0,
        "getprintatlas" | "getdxf" => 300.0,
        "getcoverage" | "getfeature" | "transaction" => 30.0,
        "getcapabilities" | "getprojectsettings" => 30.0,
        _ => 10.0,
    };
    let megapixels = work.pixels as f32 / 1e6;
    let layers = work.layers.clamp(1, LAYERS_MAX) as f32;
    let all = if work.is_endless { 10.0 } else { 1.0 };
    base * (1.0 + megapixels) * layers * all
}

/// What requests turned out to cost, compared with their guesses.
#[derive(Debug)]
pub struct Costs(LruCache<u64, f32>);

impl Default for Costs {
    fn default() -> Self {
        Self(LruCache::new(KNOWN_MAX))
    }
}

impl Costs {
    /// Milliseconds, one at least.
    pub fn estimate(&mut self, kind: &Kind) -> u32 {
        let same = self.0.get(&kind.same).copied();
        let learned = same.or_else(|| self.0.get(&kind.alike).copied());
        (kind.guess * learned.unwrap_or(1.0)).clamp(1.0, COST_MAX) as u32
    }

    /// One of this kind ran for `ran` and was not done; what took longer before is no
    /// surprise.
    pub fn learn_at_least(&mut self, kind: &Kind, ran: Duration) {
        if ran > Duration::from_millis(self.estimate(kind).into()) {
            self.learn(kind, ran);
        }
    }

    /// One of this kind took `taken`.
    pub fn learn(&mut self, kind: &Kind, taken: Duration) {
        if kind.guess <= 0.0 {
            return;
        }
        let (least, most) = LEARNED;
        let ratio = (taken.as_secs_f32() * 1e3 / kind.guess).clamp(least, most);
        for key in [kind.same, kind.alike] {
            let average = self.0.get_or_insert_mut(key, || ratio);
            *average += (ratio - *average) * NOVELTY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn map(subject: u64, pixels: u64, layers: u32) -> Work {
        Work {
            pixels,
            layers,
            subject,
            is_endless: false,
        }
    }

    fn tile(subject: u64) -> Kind {
        Kind::of("city", "GetMap", &map(subject, 256 * 256, 1))
    }

    #[test]
    fn more_pixels_and_more_layers_cost_more_before_anything_is_known() {
        let mut costs = Costs::default();
        let mut cost = |operation, work| costs.estimate(&Kind::of("city", operation, &work)) as f32;
        assert_eq!(cost("GetMap", map(1, 0, 1)), 10.0);
        assert_eq!(cost("getmap", map(1, 1_000_000, 3)), 60.0);
        assert!(cost("GetPrint", map(1, 8_700_000, 1)) > 900.0);
        let endless = Work {
            is_endless: true,
            ..Work::default()
        };
        assert_eq!(cost("GetFeature", endless), 300.0);
        assert_eq!(cost("GetMap", map(1, u64::MAX, u32::MAX)), COST_MAX);
    }

    #[test]
    fn what_the_same_work_took_is_what_it_will_take() {
        let mut costs = Costs::default();
        for _ in 0..20 {
            costs.learn(&tile(1), 2000 * MS);
            costs.learn(&tile(2), 20 * MS);
        }
        assert!((1990..=2010).contains(&costs.estimate(&tile(1))));
        assert!((15..=25).contains(&costs.estimate(&tile(2))));
    }

    #[test]
    fn work_that_nobody_asked_for_costs_what_its_operation_does_in_the_project() {
        let mut costs = Costs::default();
        costs.learn(&tile(1), 500 * MS);
        assert!((490..=510).contains(&costs.estimate(&tile(2))));
        let elsewhere = Kind::of("village", "GetMap", &map(1, 256 * 256, 1));
        assert_eq!(costs.estimate(&elsewhere), 10);
    }

    #[test]
    fn a_larger_picture_of_the_same_costs_proportionally_more() {
        let mut costs = Costs::default();
        costs.learn(&Kind::of("city", "GetMap", &map(1, 1_000_000, 1)), 100 * MS);
        let large = Kind::of("city", "GetMap", &map(1, 9_000_000, 1));
        assert!((490..=510).contains(&costs.estimate(&large)));
    }

    #[test]
    fn one_slow_answer_is_forgotten_after_some_fast_ones() {
        let mut costs = Costs::default();
        costs.learn(&tile(1), 3000 * MS);
        for _ in 0..10 {
            costs.learn(&tile(1), 30 * MS);
        }
        assert!(costs.estimate(&tile(1)) < 250);
    }

    #[test]
    fn what_was_not_done_is_learned_only_if_it_ran_longer_than_it_should() {
        let mut costs = Costs::default();
        (0..20).for_each(|_| costs.learn(&tile(1), 5000 * MS));
        let before = costs.estimate(&tile(1));
        costs.learn_at_least(&tile(1), 100 * MS);
        assert_eq!(costs.estimate(&tile(1)), before);
        costs.learn_at_least(&tile(1), 20_000 * MS);
        assert!(costs.estimate(&tile(1)) > before);
    }

    #[test]
    fn however_many_kinds_there_are_the_table_is_bounded() {
        let mut costs = Costs::default();
        for subject in 0..20_000 {
            costs.learn(&tile(subject), MS);
        }
        assert_eq!(costs.0.len(), KNOWN_MAX.get());
    }
}
