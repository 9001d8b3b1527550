//! Who is who in a pool: decisions only, told the time, touching nothing.
//!
//! | state | from | on |
//! |---|---|---|
//! | starting | fork | |
//! | spare | starting | it says that it is warm |
//! | serving | spare | a place is free |
//! | leaving | serving | told to leave once its request is done (restart, stop) |
//! | doomed | any | killed; the kernel has not confirmed it yet |
//! | gone | any | the kernel says so |
//!
//! [`Pool::step`] compares what is with what should be and returns what to do;
//! the driver does it and reports back.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Bounds and sizes; see the settings of the same names.
#[derive(Debug, Clone)]
pub struct Rules {
    pub workers: usize,
    pub spares: usize,
    pub start_timeout: Duration,
    pub drain_timeout: Duration,
    /// A worker that dies younger, without having served, is a strike.
    pub young: Duration,
    pub backoff_max: Duration,
    /// How often workers beat.
    pub heartbeat: Duration,
    /// A worker whose beats stop for this long is frozen.
    pub silence_max: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Starting,
    Spare,
    Serving,
    Leaving,
    Doomed,
}

#[derive(Debug)]
struct Worker {
    state: State,
    generation: u64,
    born: Instant,
    /// When it entered its state.
    since: Instant,
    beats: u64,
    beat_at: Instant,
    /// The server knows it.
    joined: bool,
}

/// What the driver has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Fork a worker with this number.
    Fork(u32),
    /// Let the spare connect.
    Promote(u32),
    /// Tell it to leave once its request is done.
    Dismiss(u32),
    Kill(u32, Verdict),
}

/// Why the pool kills a worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    StartTimedOut,
    DrainTimedOut,
    Frozen,
    Replaced,
    Stopping,
}

/// All workers of a pool. A number names a worker as long as it lives, from 1.
#[derive(Debug)]
pub struct Pool {
    rules: Rules,
    workers: BTreeMap<u32, Worker>,
    generation: u64,
    stopping: bool,
    /// Deaths of the young since somebody last grew up, and when the last one was.
    strikes: u32,
    struck_at: Instant,
    fork_at: Instant,
    stepped_at: Instant,
}

impl Pool {
    pub fn new(rules: Rules, now: Instant) -> Self {
        let workers = BTreeMap::new();
        Self {
            rules,
            workers,
            generation: 0,
            stopping: false,
            strikes: 0,
            struck_at: now,
            fork_at: now,
            stepped_at: now,
        }
    }

    /// What to do now. Call it after every event and when [`Pool::next_wake`] comes.
    pub fn step(&mut self, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        self.forgive_a_pause(now);
        self.forget_strikes(now);
        self.kill_overdue(now, &mut effects);
        match self.stopping {
            true => self.empty(now, &mut effects),
            false => {
                self.renew(now, &mut effects);
                self.promote(now, &mut effects);
                self.fill(now, &mut effects);
            }
        }
        effects
    }

    /// The driver could not fork: try again after a pause.
    pub fn fork_failed(&mut self, number: u32, now: Instant) {
        self.workers.remove(&number);
        self.strike(now);
    }

    pub fn ready(&mut self, number: u32, now: Instant) {
        if let Some(worker) = self.workers.get_mut(&number)
            && worker.state == State::Starting
        {
            worker.enter(State::Spare, now);
            worker.beat_at = now;
        }
    }

    /// The server knows the worker.
    pub fn joined(&mut self, number: u32) {
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.joined = true;
        }
    }

    /// The worker's counter of beats, as just read.
    pub fn beats(&mut self, number: u32, beats: u64, now: Instant) {
        if let Some(worker) = self.workers.get_mut(&number)
            && worker.beats != beats
        {
            worker.beats = beats;
            worker.beat_at = now;
        }
    }

    /// The worker is gone; returns how old it became. `useful`: it had served requests.
    /// Dying young without having been useful is a strike, and strikes slow the pool down.
    pub fn died(&mut self, number: u32, useful: bool, now: Instant) -> Option<Duration> {
        let worker = self.workers.remove(&number)?;
        let age = now - worker.born;
        let young = match worker.state {
            State::Starting => true,
            State::Spare | State::Serving => age < self.rules.young && !useful,
            State::Leaving | State::Doomed => false,
        };
        if young {
            self.strike(now);
        }
        Some(age)
    }

    /// Goes by `rules` from now on.
    pub fn configure(&mut self, rules: Rules) {
        self.rules = rules;
    }

    /// Replace every worker, one after the other.
    pub fn restart(&mut self) {
        self.generation += 1;
    }

    /// Let everybody finish and go.
    pub fn stop(&mut self) {
        self.stopping = true;
    }

    pub fn is_finished(&self) -> bool {
        self.stopping && self.workers.is_empty()
    }

    /// Every place is filled by a worker of the current generation.
    pub fn is_settled(&self) -> bool {
        self.current(State::Serving) >= self.rules.workers && self.count(State::Leaving) == 0
    }

    pub fn state(&self, number: u32) -> Option<State> {
        self.workers.get(&number).map(|worker| worker.state)
    }

    /// When `step` has something to do if nothing happens before.
    pub fn next_wake(&self, now: Instant) -> Option<Instant> {
        let overdue = self
            .workers
            .values()
            .filter_map(|worker| worker.overdue_at(&self.rules));
        let fork = (self.fork_at > now && !self.stopping).then_some(self.fork_at);
        overdue.chain(fork).min()
    }

    /// How long no worker is forked because too many died young.
    pub fn backoff(&self, now: Instant) -> Duration {
        self.fork_at.saturating_duration_since(now)
    }

    /// While the pool itself stood still (SIGSTOP, a suspended machine) its workers
    /// did, too, or could not be heard.
    fn forgive_a_pause(&mut self, now: Instant) {
        let pause = now.saturating_duration_since(self.stepped_at);
        self.stepped_at = now;
        if pause > self.rules.heartbeat * 2 {
            for worker in self.workers.values_mut() {
                worker.beat_at = now.min(worker.beat_at + pause);
                worker.since = now.min(worker.since + pause);
            }
        }
    }

    /// A worker that was forked after the last strike has grown up.
    fn forget_strikes(&mut self, now: Instant) {
        let grown = |worker: &Worker| {
            matches!(worker.state, State::Spare | State::Serving)
                && worker.born >= self.struck_at
                && now - worker.born >= self.rules.young
        };
        if self.workers.values().any(grown) {
            self.strikes = 0;
        }
    }

    fn kill_overdue(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let mut late_starts = 0;
        for (number, worker) in &mut self.workers {
            if worker.overdue_at(&self.rules).is_none_or(|at| at > now) {
                continue;
            }
            late_starts += u32::from(worker.state == State::Starting);
            let verdict = match worker.state {
                State::Starting => Verdict::StartTimedOut,
                State::Leaving => Verdict::DrainTimedOut,
                State::Spare | State::Serving | State::Doomed => Verdict::Frozen,
            };
            effects.push(Effect::Kill(*number, verdict));
            worker.enter(State::Doomed, now);
        }
        (0..late_starts).for_each(|_| self.strike(now));
    }

    fn empty(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        for (number, worker) in &mut self.workers {
            match worker.state {
                State::Serving => {
                    effects.push(Effect::Dismiss(*number));
                    worker.enter(State::Leaving, now);
                }
                State::Starting | State::Spare => {
                    effects.push(Effect::Kill(*number, Verdict::Stopping));
                    worker.enter(State::Doomed, now);
                }
                State::Leaving | State::Doomed => {}
            }
        }
    }

    /// Workers of an older generation leave one at a time, each when a warm one has
    /// taken its place and the server knows that one.
    fn renew(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let generation = self.generation;
        for (number, worker) in &mut self.workers {
            let idle = matches!(worker.state, State::Spare | State::Starting);
            if idle && worker.generation != generation {
                effects.push(Effect::Kill(*number, Verdict::Replaced));
                worker.enter(State::Doomed, now);
            }
        }
        if self.count(State::Leaving) > 0
            || self.current(State::Serving) == self.count(State::Serving)
        {
            return;
        }
        match self.count(State::Serving) > self.rules.workers {
            true if self.all_joined(now) => self.dismiss_oldest(now, effects),
            true => {}
            false => drop(self.promote_one(now, effects)),
        }
    }

    /// Whoever was promoted is known to the server, or finds none.
    fn all_joined(&self, now: Instant) -> bool {
        let patience = self.rules.silence_max;
        let mut serving = self
            .workers
            .values()
            .filter(|it| it.state == State::Serving);
        serving.all(|it| it.joined || now - it.since >= patience)
    }

    fn dismiss_oldest(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let generation = self.generation;
        let oldest = self
            .workers
            .iter_mut()
            .filter(|(_, it)| it.state == State::Serving && it.generation != generation)
            .min_by_key(|(_, it)| it.born);
        if let Some((number, worker)) = oldest {
            effects.push(Effect::Dismiss(*number));
            worker.enter(State::Leaving, now);
        }
    }

    fn promote(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        while self.count(State::Serving) < self.rules.workers && self.promote_one(now, effects) {}
    }

    /// False if there is no spare.
    fn promote_one(&mut self, now: Instant, effects: &mut Vec<Effect>) -> bool {
        let spare = self
            .workers
            .iter_mut()
            .find(|(_, it)| it.state == State::Spare);
        let Some((number, worker)) = spare else {
            return false;
        };
        effects.push(Effect::Promote(*number));
        worker.enter(State::Serving, now);
        true
    }

    fn fill(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.fork_at > now {
            return;
        }
        while self.wanted() > 0 {
            let number = (1..).find(|number| !self.workers.contains_key(number));
            let number = number.expect("there are fewer workers than numbers");
            self.workers
                .insert(number, Worker::new(self.generation, now));
            effects.push(Effect::Fork(number));
        }
    }

    /// How many workers to fork. Spares come after the places are filled, so that
    /// the first answer is not delayed by a reserve.
    fn wanted(&self) -> usize {
        let serving = self.count(State::Serving);
        let reserve = self.current(State::Starting) + self.current(State::Spare);
        let renewing = self
            .workers
            .values()
            .any(|worker| worker.generation != self.generation && worker.state == State::Serving);
        let spares = self.rules.spares.max(usize::from(renewing));
        let target = match serving < self.rules.workers {
            true => self.rules.workers,
            false => self.rules.workers + spares,
        };
        target.saturating_sub(serving + reserve)
    }

    fn strike(&mut self, now: Instant) {
        let pause = Duration::from_millis(250) * 2u32.saturating_pow(self.strikes.min(20));
        self.fork_at = now + pause.min(self.rules.backoff_max);
        self.strikes = self.strikes.saturating_add(1);
        self.struck_at = now;
    }

    fn count(&self, state: State) -> usize {
        self.workers
            .values()
            .filter(|worker| worker.state == state)
            .count()
    }

    fn current(&self, state: State) -> usize {
        let current = |worker: &&Worker| worker.generation == self.generation;
        self.workers
            .values()
            .filter(current)
            .filter(|worker| worker.state == state)
            .count()
    }
}

impl Worker {
    fn new(generation: u64, now: Instant) -> Self {
        let state = State::Starting;
        Self {
            state,
            generation,
            born: now,
            since: now,
            beats: 0,
            beat_at: now,
            joined: false,
        }
    }

    fn enter(&mut self, state: State, now: Instant) {
        self.state = state;
        self.since = now;
    }

    fn overdue_at(&self, rules: &Rules) -> Option<Instant> {
        match self.state {
            State::Starting => Some(self.since + rules.start_timeout),
            State::Leaving => Some(self.since + rules.drain_timeout),
            State::Spare | State::Serving => Some(self.beat_at + rules.silence_max),
            State::Doomed => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules() -> Rules {
        let seconds = Duration::from_secs;
        Rules {
            workers: 2,
            spares: 1,
            start_timeout: seconds(60),
            drain_timeout: seconds(20),
            young: seconds(5),
            backoff_max: seconds(30),
            heartbeat: seconds(1),
            silence_max: seconds(3),
        }
    }

    /// A pool with two workers serving and one spare, and its clock.
    fn settled() -> (Pool, Instant) {
        let now = Instant::now();
        let mut pool = Pool::new(rules(), now);
        assert_eq!(pool.step(now), [Effect::Fork(1), Effect::Fork(2)]);
        pool.ready(1, now);
        assert_eq!(pool.step(now), [Effect::Promote(1)]);
        pool.ready(2, now);
        assert_eq!(pool.step(now), [Effect::Promote(2), Effect::Fork(3)]);
        pool.ready(3, now);
        (1..3).for_each(|number| pool.joined(number));
        assert_eq!(pool.step(now), []);
        (pool, now)
    }

    /// The first thing that happens when nothing else does.
    fn later(pool: &mut Pool, now: Instant) -> Vec<Effect> {
        let seconds = (1..100).map(|seconds| now + Duration::from_secs(seconds));
        let mut effects = seconds.map(|now| pool.step(now));
        effects.find(|effects| !effects.is_empty()).unwrap()
    }

    #[test]
    fn the_spare_steps_in_at_once_and_is_replaced() {
        let (mut pool, now) = settled();
        pool.died(1, false, now);
        assert_eq!(pool.step(now), [Effect::Promote(3)]);
        let later = now + Duration::from_secs(1);
        assert_eq!(pool.step(later), [Effect::Fork(1)]);
    }

    #[test]
    fn a_useful_worker_that_dies_is_replaced_without_a_pause() {
        let (mut pool, now) = settled();
        pool.died(2, true, now);
        assert_eq!(pool.step(now), [Effect::Promote(3), Effect::Fork(2)]);
    }

    #[test]
    fn workers_that_die_at_start_are_forked_ever_more_slowly() {
        let mut now = Instant::now();
        let mut pool = Pool::new(rules(), now);
        pool.step(now);
        pool.died(1, false, now);
        pool.died(2, false, now);
        assert_eq!(pool.step(now), []);
        assert_eq!(pool.backoff(now), Duration::from_millis(500));
        for _ in 0..20 {
            now = pool.next_wake(now).unwrap();
            for effect in pool.step(now) {
                if let Effect::Fork(number) = effect {
                    pool.died(number, false, now);
                }
            }
        }
        assert_eq!(pool.backoff(now), rules().backoff_max);
    }

    #[test]
    fn a_worker_without_a_beat_is_killed_once_and_replaced() {
        let (mut pool, now) = settled();
        let now = now + Duration::from_secs(2);
        pool.step(now);
        [1, 3]
            .into_iter()
            .for_each(|number| pool.beats(number, 7, now));
        let now = now + Duration::from_secs(1);
        let effects = pool.step(now);
        let expected = [Effect::Kill(2, Verdict::Frozen), Effect::Promote(3)];
        assert!(
            expected.iter().all(|effect| effects.contains(effect)),
            "{effects:?}"
        );
        assert!(!pool.step(now).contains(&expected[0]));
    }

    #[test]
    fn a_start_that_takes_too_long_is_killed() {
        let now = Instant::now();
        let mut pool = Pool::new(rules(), now);
        pool.step(now);
        let effects = later(&mut pool, now);
        assert_eq!(
            effects,
            [1, 2].map(|number| Effect::Kill(number, Verdict::StartTimedOut))
        );
    }

    #[test]
    fn a_restart_replaces_one_after_the_other_each_known_before_the_old_one_leaves() {
        let (mut pool, now) = settled();
        pool.restart();
        assert_eq!(
            pool.step(now),
            [Effect::Kill(3, Verdict::Replaced), Effect::Fork(4)]
        );
        pool.died(3, false, now);
        pool.ready(4, now);
        assert_eq!(pool.step(now), [Effect::Promote(4)]);
        assert_eq!(pool.step(now), [], "the server does not know the new one");
        pool.joined(4);
        assert_eq!(pool.step(now), [Effect::Dismiss(1), Effect::Fork(3)]);
        pool.ready(3, now);
        assert_eq!(pool.step(now), [], "the first one has not left yet");
        pool.died(1, true, now);
        assert_eq!(pool.step(now), [Effect::Promote(3)]);
        pool.joined(3);
        assert_eq!(pool.step(now), [Effect::Dismiss(2), Effect::Fork(1)]);
        pool.died(2, true, now);
        pool.ready(1, now);
        assert_eq!(pool.step(now), []);
        assert!(pool.is_settled());
    }

    #[test]
    fn a_pool_grows_and_shrinks_with_a_restart_and_never_has_too_few() {
        for workers in [1, 2, 4] {
            let (mut pool, now) = settled();
            pool.configure(Rules { workers, ..rules() });
            pool.restart();
            let mut fewest = usize::MAX;
            let everything_happens = (0..100).all(|_| {
                let effects = pool.step(now);
                fewest = fewest.min(pool.count(State::Serving));
                for effect in &effects {
                    match *effect {
                        Effect::Fork(number) => pool.ready(number, now),
                        Effect::Promote(number) => pool.joined(number),
                        Effect::Dismiss(number) | Effect::Kill(number, _) => {
                            pool.died(number, true, now);
                        }
                    }
                }
                !effects.is_empty()
            });
            assert!(
                !everything_happens && pool.is_settled(),
                "{workers}: {pool:?}"
            );
            assert_eq!(pool.count(State::Serving), workers);
            assert_eq!(pool.current(State::Serving), workers);
            assert!(fewest >= workers.min(2), "{fewest} of {workers}");
        }
    }

    #[test]
    fn a_restart_without_a_server_does_not_wait_for_it() {
        let (mut pool, now) = settled();
        pool.restart();
        pool.step(now);
        pool.ready(4, now);
        pool.step(now);
        let mut now = now;
        for beat in 1..4 {
            now += Duration::from_secs(1);
            (1..9).for_each(|number| pool.beats(number, beat, now));
            pool.step(now);
        }
        assert_eq!(pool.state(1), Some(State::Leaving));
    }

    #[test]
    fn a_restart_without_spares_still_warms_the_new_one_first() {
        let now = Instant::now();
        let one = Rules {
            workers: 1,
            spares: 0,
            ..rules()
        };
        let mut pool = Pool::new(one, now);
        pool.step(now);
        pool.ready(1, now);
        assert_eq!(pool.step(now), [Effect::Promote(1)]);
        pool.joined(1);
        pool.restart();
        assert_eq!(pool.step(now), [Effect::Fork(2)]);
        pool.ready(2, now);
        assert_eq!(pool.step(now), [Effect::Promote(2)]);
        pool.joined(2);
        assert_eq!(pool.step(now), [Effect::Dismiss(1)]);
    }

    #[test]
    fn a_pause_of_the_pool_itself_is_nobody_s_silence() {
        let (mut pool, now) = settled();
        let now = now + Duration::from_secs(3600);
        assert_eq!(pool.step(now), []);
    }

    #[test]
    fn workers_that_die_once_they_are_ready_are_forked_ever_more_slowly() {
        let mut now = Instant::now();
        let mut pool = Pool::new(rules(), now);
        for _ in 0..20 {
            now = pool.next_wake(now).unwrap_or(now).max(now);
            for effect in pool.step(now) {
                if let Effect::Fork(number) = effect {
                    pool.ready(number, now);
                    pool.died(number, false, now);
                }
            }
        }
        assert_eq!(pool.backoff(now), rules().backoff_max);
    }

    #[test]
    fn stopping_dismisses_the_busy_kills_the_rest_and_forks_nobody() {
        let (mut pool, now) = settled();
        pool.stop();
        let effects = pool.step(now);
        assert_eq!(
            effects,
            [
                Effect::Dismiss(1),
                Effect::Dismiss(2),
                Effect::Kill(3, Verdict::Stopping)
            ]
        );
        for number in [1, 3] {
            pool.died(number, true, now);
        }
        assert!(!pool.is_finished());
        assert_eq!(
            later(&mut pool, now),
            [Effect::Kill(2, Verdict::DrainTimedOut)]
        );
        pool.died(2, true, now);
        assert!(pool.is_finished());
    }

    #[derive(Debug, Clone)]
    enum Event {
        Ready(u32),
        Beats(u32),
        Died(u32),
        Restart,
        Wait(u64),
    }

    fn events() -> impl proptest::strategy::Strategy<Value = Vec<Event>> {
        use proptest::prelude::*;
        let number = 1u32..6;
        let event = prop_oneof![
            4 => number.clone().prop_map(Event::Ready),
            4 => number.clone().prop_map(Event::Beats),
            2 => number.prop_map(Event::Died),
            1 => Just(Event::Restart),
            3 => (0u64..4000).prop_map(Event::Wait),
        ];
        proptest::collection::vec(event, 0..200)
    }

    proptest::proptest! {
        /// Never more places filled than there are, and left alone the pool always settles.
        #[test]
        fn whatever_happens_the_pool_settles(events in events()) {
            let mut now = Instant::now();
            let mut pool = Pool::new(rules(), now);
            let mut beats = 0;
            for event in events {
                match event {
                    Event::Ready(number) => pool.ready(number, now),
                    Event::Beats(number) => { beats += 1; pool.beats(number, beats, now) }
                    Event::Died(number) => drop(pool.died(number, false, now)),
                    Event::Restart => pool.restart(),
                    Event::Wait(ms) => now += Duration::from_millis(ms),
                }
                pool.step(now);
                assert!(pool.count(State::Serving) <= rules().workers + 1);
            }
            for _ in 0..100 {
                now += Duration::from_secs(1);
                beats += 1;
                for effect in pool.step(now) {
                    if let Effect::Kill(number, _) | Effect::Dismiss(number) = effect {
                        pool.died(number, true, now);
                    }
                }
                for number in 1..100 {
                    if pool.state(number) == Some(State::Doomed) || pool.state(number) == Some(State::Leaving) {
                        pool.died(number, true, now);
                    }
                    pool.ready(number, now);
                    pool.joined(number);
                    pool.beats(number, beats, now);
                }
            }
            pool.step(now);
            assert!(pool.is_settled(), "{pool:?}");
        }
    }
}
