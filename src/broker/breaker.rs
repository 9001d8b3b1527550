//! Projects whose data does not answer: they must not hold all workers.
//!
//! Decisions only: events and `now` come in. Each project has a breaker:
//!
//! | state | event | becomes |
//! |---|---|---|
//! | closed | a time-out, `timeouts` of them outweighing answers | open |
//! | open | a request after `pause` | probing: that request is the probe |
//! | probing | the probe is answered | closed, and all is forgotten |
//! | probing | a time-out | open |
//! | probing | the probe ends in another way | open; the next request is the probe |
//!
//! Open and probing refuse everything but the probe. A time-out is a request
//! that a worker had for a good part of its time and did not answer by its
//! deadline, whoever still waited; to have waited in the queue for too long says
//! nothing about a project. An answer takes one time-out
//! back, whatever it says: a source that fails at once stalls nobody. A `window`
//! without a time-out takes back all.
//!
//! While some are left, the project may hold no more than its `share` of the
//! workers, if other projects are asked for as well: alone it stalls nobody else.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::queue::Id;
use crate::protocol::ProjectRef;

/// Projects with a time-out that are remembered.
const TABLE_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("it is not zero");

/// The settings that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// How many open a breaker; zero: none ever opens, and there are no shares.
    pub timeouts: u32,
    pub window: Duration,
    pub pause: Duration,
    pub share: f64,
}

/// Whether a request may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    Admitted,
    /// It is the one that tries whether the project answers again.
    Probe,
    /// The breaker is open.
    Open {
        retry_after: Duration,
    },
    /// The project has its share of the workers.
    Crowded {
        limit: usize,
    },
}

/// What others should hear of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    Opened,
    Closed,
}

/// One breaker that is not closed, as the status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    pub project: String,
    pub is_probing: bool,
    /// How long it has been so, probes that failed included.
    pub since: Duration,
    /// Until the next probe.
    pub left: Duration,
    pub n_refused: u64,
}

/// The breakers of all projects that had a time-out lately.
#[derive(Debug)]
pub struct Breakers {
    rules: Rules,
    troubled: LruCache<ProjectRef, Breaker>,
    latest: Option<ProjectRef>,
    /// When a request was for another project than the one before.
    mixed: Option<Instant>,
}

#[derive(Debug)]
struct Breaker {
    n_timeouts: u32,
    /// The last time-out.
    last: Instant,
    state: State,
    opened: Instant,
    n_refused: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Closed,
    Open { until: Instant },
    Probing { probe: Id },
}

impl Breakers {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            troubled: LruCache::new(TABLE_MAX),
            latest: None,
            mixed: None,
        }
    }

    /// Other rules from now on; what is known stays, unless breakers are switched off.
    pub fn configure(&mut self, rules: Rules) {
        self.rules = rules;
        if rules.timeouts == 0 {
            self.troubled.clear();
        }
    }

    /// No project is in trouble, so that no request needs to be looked at.
    pub fn is_quiet(&self) -> bool {
        self.troubled.is_empty()
    }

    /// Only then can it be refused.
    pub fn is_troubled(&self, project: &ProjectRef) -> bool {
        self.troubled.contains(project)
    }

    /// A request for `project` arrived.
    pub fn asked(&mut self, project: &ProjectRef, now: Instant) {
        if self.latest.as_ref() == Some(project) {
            return;
        }
        if self.latest.replace(project.clone()).is_some() {
            self.mixed = Some(now);
        }
    }

    /// Whether request `id` may run now, while the project holds `running` of all `workers`.
    pub fn admits(
        &mut self,
        project: &ProjectRef,
        id: Id,
        (running, workers): (usize, usize),
        now: Instant,
    ) -> Verdict {
        let is_alone = self
            .mixed
            .is_none_or(|at| now.saturating_duration_since(at) >= self.rules.window);
        let Some(breaker) = self.troubled.get_mut(project) else {
            return Verdict::Admitted;
        };
        match breaker.state {
            State::Closed => {
                let limit = share(self.rules.share, workers);
                match is_alone || running < limit || breaker.is_calm(&self.rules, now) {
                    true => Verdict::Admitted,
                    false => Verdict::Crowded { limit },
                }
            }
            State::Probing { probe } if probe == id => Verdict::Admitted,
            State::Probing { .. } => breaker.refuse(self.rules.pause),
            State::Open { until } if until > now => breaker.refuse(until - now),
            State::Open { .. } => {
                breaker.state = State::Probing { probe: id };
                Verdict::Probe
            }
        }
    }

    /// A worker had a request and did not answer by the deadline.
    pub fn timed_out(&mut self, project: &ProjectRef, now: Instant) -> Option<Change> {
        let rules = self.rules;
        if rules.timeouts == 0 {
            return None;
        }
        let breaker = self
            .troubled
            .get_or_insert_mut(project.clone(), || Breaker::new(now));
        if breaker.is_calm(&rules, now) {
            breaker.n_timeouts = 0;
        }
        breaker.n_timeouts = breaker.n_timeouts.saturating_add(1);
        breaker.last = now;
        let until = now + rules.pause;
        match breaker.state {
            State::Closed if breaker.n_timeouts >= rules.timeouts => {
                (breaker.opened, breaker.n_refused) = (now, 0);
                breaker.state = State::Open { until };
                Some(Change::Opened)
            }
            State::Probing { .. } => {
                breaker.state = State::Open { until };
                Some(Change::Opened)
            }
            // It ran already when the breaker opened.
            State::Closed | State::Open { .. } => None,
        }
    }

    /// A worker answered.
    pub fn answered(&mut self, project: &ProjectRef, id: Id) -> Option<Change> {
        let breaker = self.troubled.peek_mut(project)?;
        match breaker.state {
            State::Closed => {
                breaker.n_timeouts = breaker.n_timeouts.saturating_sub(1);
                if breaker.n_timeouts == 0 {
                    self.troubled.pop(project);
                }
                None
            }
            State::Probing { probe } if probe == id => {
                self.troubled.pop(project);
                Some(Change::Closed)
            }
            // It ran already when the breaker opened; the probe will tell.
            State::Probing { .. } | State::Open { .. } => None,
        }
    }

    /// A request ended in another way, which says nothing about the project.
    pub fn ended(&mut self, project: &ProjectRef, id: Id, now: Instant) {
        if let Some(breaker) = self.troubled.peek_mut(project)
            && breaker.state == (State::Probing { probe: id })
        {
            breaker.state = State::Open { until: now };
        }
    }

    /// Forgets projects that are calm. To be called now and then.
    pub fn tick(&mut self, now: Instant) {
        let calm: Vec<ProjectRef> = self
            .troubled
            .iter()
            .filter(|(_, it)| it.state == State::Closed && it.is_calm(&self.rules, now))
            .map(|(project, _)| project.clone())
            .collect();
        for project in calm {
            self.troubled.pop(&project);
        }
    }

    /// The breakers that are not closed, the latest first.
    pub fn list(&self, now: Instant) -> Vec<Open> {
        let mut list: Vec<Open> = self
            .troubled
            .iter()
            .filter(|(_, breaker)| breaker.state != State::Closed)
            .map(|(project, breaker)| Open {
                project: project.to_string(),
                is_probing: matches!(breaker.state, State::Probing { .. }),
                since: now.saturating_duration_since(breaker.opened),
                left: match breaker.state {
                    State::Open { until } => until.saturating_duration_since(now),
                    State::Closed | State::Probing { .. } => Duration::ZERO,
                },
                n_refused: breaker.n_refused,
            })
            .collect();
        list.sort_by_key(|open| open.since);
        list
    }
}

impl Breaker {
    fn new(now: Instant) -> Self {
        Self {
            n_timeouts: 0,
            last: now,
            state: State::Closed,
            opened: now,
            n_refused: 0,
        }
    }

    fn is_calm(&self, rules: &Rules, now: Instant) -> bool {
        now.saturating_duration_since(self.last) >= rules.window
    }

    fn refuse(&mut self, retry_after: Duration) -> Verdict {
        self.n_refused += 1;
        Verdict::Open { retry_after }
    }
}

/// One worker at least: without any the project would never be well again.
fn share(share: f64, workers: usize) -> usize {
    ((workers as f64 * share) as usize).max(1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn rules() -> Rules {
        Rules {
            timeouts: 3,
            window: 60 * S,
            pause: 30 * S,
            share: 0.5,
        }
    }

    fn project(path: &str) -> ProjectRef {
        ProjectRef {
            alias: "file".into(),
            path: path.into(),
        }
    }

    /// Breakers, their clock, and a project in trouble.
    struct Bench {
        breakers: Breakers,
        now: Instant,
        city: ProjectRef,
    }

    impl Bench {
        fn new() -> Self {
            let now = Instant::now();
            let mut breakers = Breakers::new(rules());
            let city = project("city");
            for path in ["city", "lake"] {
                breakers.asked(&project(path), now);
            }
            Self {
                breakers,
                now,
                city,
            }
        }

        fn opened() -> Self {
            let mut bench = Self::new();
            assert_eq!(bench.time_out(), None);
            assert_eq!(bench.time_out(), None);
            assert_eq!(bench.time_out(), Some(Change::Opened));
            bench
        }

        fn time_out(&mut self) -> Option<Change> {
            self.breakers.timed_out(&self.city, self.now)
        }

        fn admits(&mut self, id: Id, running: usize) -> Verdict {
            self.breakers.admits(&self.city, id, (running, 4), self.now)
        }

        fn answered(&mut self, id: Id) -> Option<Change> {
            self.breakers.answered(&self.city, id)
        }
    }

    #[test]
    fn three_time_outs_open_the_breaker_of_their_project_alone() {
        let mut bench = Bench::opened();
        bench.now += 10 * S;
        let retry_after = 20 * S;
        assert_eq!(bench.admits(1, 0), Verdict::Open { retry_after });
        let lake = project("lake");
        let other = bench.breakers.admits(&lake, 2, (4, 4), bench.now);
        assert_eq!(other, Verdict::Admitted);
        let [open] = &bench.breakers.list(bench.now)[..] else {
            panic!("one is open");
        };
        assert_eq!((&*open.project, open.is_probing), ("file:city", false));
        assert_eq!((open.since, open.left, open.n_refused), (10 * S, 20 * S, 1));
    }

    #[test]
    fn after_the_pause_one_request_tries_and_its_answer_closes_the_breaker() {
        let mut bench = Bench::opened();
        bench.now += 30 * S;
        assert_eq!(bench.admits(1, 0), Verdict::Probe);
        assert_eq!(bench.admits(1, 0), Verdict::Admitted, "asked again");
        assert!(matches!(bench.admits(2, 0), Verdict::Open { .. }));
        assert!(bench.breakers.list(bench.now)[0].is_probing);
        assert_eq!(bench.answered(7), None, "an old one");
        assert_eq!(bench.answered(1), Some(Change::Closed));
        assert_eq!(bench.admits(3, 4), Verdict::Admitted);
        assert!(bench.breakers.is_quiet());
    }

    #[test]
    fn a_probe_that_times_out_opens_the_breaker_again() {
        let mut bench = Bench::opened();
        bench.now += 30 * S;
        assert_eq!(bench.admits(1, 0), Verdict::Probe);
        bench.now += 20 * S;
        assert_eq!(bench.time_out(), Some(Change::Opened));
        let retry_after = 30 * S;
        assert_eq!(bench.admits(2, 0), Verdict::Open { retry_after });
        assert_eq!(bench.breakers.list(bench.now)[0].since, 50 * S);
    }

    #[test]
    fn a_probe_whose_client_leaves_lets_the_next_one_try() {
        let mut bench = Bench::opened();
        bench.now += 30 * S;
        assert_eq!(bench.admits(1, 0), Verdict::Probe);
        bench.breakers.ended(&bench.city, 9, bench.now);
        assert!(matches!(bench.admits(2, 0), Verdict::Open { .. }));
        bench.breakers.ended(&bench.city, 1, bench.now);
        assert_eq!(bench.admits(3, 0), Verdict::Probe);
    }

    #[test]
    fn a_time_out_of_before_does_not_prolong_the_pause() {
        let mut bench = Bench::opened();
        bench.now += 20 * S;
        assert_eq!(bench.time_out(), None);
        bench.now += 10 * S;
        assert_eq!(bench.admits(1, 0), Verdict::Probe);
    }

    #[test]
    fn answers_and_time_take_time_outs_back() {
        let mut bench = Bench::new();
        bench.time_out();
        bench.time_out();
        bench.answered(1);
        assert_eq!(bench.time_out(), None);
        bench.now += 60 * S;
        assert_eq!(bench.time_out(), None, "the first again");
        bench.answered(2);
        assert!(bench.breakers.is_quiet());
    }

    #[test]
    fn after_a_time_out_a_project_may_hold_its_share() {
        let mut bench = Bench::new();
        assert_eq!(bench.admits(1, 4), Verdict::Admitted);
        bench.time_out();
        assert_eq!(bench.admits(2, 1), Verdict::Admitted);
        assert_eq!(bench.admits(3, 2), Verdict::Crowded { limit: 2 });
        bench.answered(2);
        assert_eq!(bench.admits(4, 4), Verdict::Admitted);
    }

    #[test]
    fn a_project_that_is_alone_may_hold_all_workers() {
        let mut bench = Bench::new();
        bench.breakers.asked(&bench.city, bench.now);
        bench.now += 30 * S;
        bench.time_out();
        bench.now += 30 * S;
        let last = bench.admits(1, 2);
        assert_eq!(last, Verdict::Admitted, "the lake was long ago");
        bench.breakers.asked(&project("lake"), bench.now);
        assert_eq!(bench.admits(2, 2), Verdict::Crowded { limit: 2 });
    }

    #[test]
    fn a_share_is_one_worker_at_least() {
        assert_eq!([0, 1, 2, 3, 16].map(|n| share(0.5, n)), [1, 1, 1, 1, 8]);
        assert_eq!(share(0.0, 16), 1);
        assert_eq!(share(1.0, 16), 16);
    }

    #[test]
    fn without_a_number_of_time_outs_there_are_no_breakers() {
        let mut breakers = Breakers::new(Rules {
            timeouts: 0,
            ..rules()
        });
        let now = Instant::now();
        assert!((0..9).all(|_| breakers.timed_out(&project("city"), now).is_none()));
        assert!(breakers.is_quiet());
    }

    #[test]
    fn the_table_is_bounded() {
        let (mut breakers, now) = (Breakers::new(rules()), Instant::now());
        for n in 0..1000 {
            breakers.timed_out(&project(&n.to_string()), now);
        }
        assert_eq!(breakers.troubled.len(), TABLE_MAX.get());
    }

    proptest! {
        /// Whatever happens, an open breaker lets one probe through at a time, never
        /// earlier than its pause after a time-out, and a project that answers is free.
        #[test]
        fn a_breaker_probes_one_at_a_time_and_recovers(
            events in prop::collection::vec((0u8..5, 0u64..20), 1..200),
        ) {
            let mut bench = Bench::new();
            let (mut next, mut probe, mut opened) = (0, None, None);
            let mut running = Vec::new();
            for (event, seconds) in events {
                bench.now += Duration::from_secs(seconds);
                match event {
                    0 | 1 => {
                        next += 1;
                        match bench.admits(next, running.len()) {
                            Verdict::Admitted => {
                                prop_assert_eq!((probe, opened), (None, None));
                                running.push(next);
                            }
                            Verdict::Probe => {
                                prop_assert_eq!(probe, None);
                                prop_assert!(opened.is_some_and(|until| until <= bench.now));
                                probe = Some(next);
                                running.push(next);
                            }
                            Verdict::Open { retry_after } => {
                                prop_assert!(opened.is_some() || probe.is_some());
                                prop_assert!(retry_after <= 30 * S && !retry_after.is_zero());
                            }
                            Verdict::Crowded { limit } => prop_assert!(running.len() >= limit),
                        }
                    }
                    2 if !running.is_empty() => {
                        running.remove(0);
                        if bench.time_out() == Some(Change::Opened) {
                            (probe, opened) = (None, Some(bench.now + 30 * S));
                        }
                    }
                    3 if !running.is_empty() => {
                        let id = running.pop().expect("it is not empty");
                        let closed = bench.answered(id) == Some(Change::Closed);
                        prop_assert_eq!(closed, probe == Some(id));
                        if closed {
                            (probe, opened) = (None, None);
                        }
                    }
                    4 if !running.is_empty() => {
                        let id = running.remove(0);
                        bench.breakers.ended(&bench.city, id, bench.now);
                        if probe == Some(id) {
                            (probe, opened) = (None, Some(bench.now));
                        }
                    }
                    _ => bench.breakers.tick(bench.now),
                }
                let is_open = !bench.breakers.list(bench.now).is_empty();
                prop_assert_eq!(is_open, opened.is_some() || probe.is_some());
            }
            // The source is well again.
            bench.now += 100 * S;
            for id in running {
                bench.breakers.ended(&bench.city, id, bench.now);
            }
            for id in 1000..1010 {
                if matches!(bench.admits(id, 0), Verdict::Admitted | Verdict::Probe) {
                    bench.answered(id);
                }
            }
            prop_assert!(bench.breakers.list(bench.now).is_empty());
        }
    }

    #[test]
    fn breakers_that_are_switched_off_refuse_nobody() {
        let (mut breakers, now) = (Breakers::new(rules()), Instant::now());
        for _ in 0..rules().timeouts {
            breakers.timed_out(&project("a"), now);
        }
        let admits = |breakers: &mut Breakers| breakers.admits(&project("a"), 1, (0, 2), now);
        assert!(matches!(admits(&mut breakers), Verdict::Open { .. }));
        breakers.configure(Rules {
            timeouts: 0,
            ..rules()
        });
        assert_eq!(admits(&mut breakers), Verdict::Admitted);
    }
}
