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
//! A serving worker is *outdated* when the pool was told to restart after its birth,
//! or when it is due for recycling. One outdated worker at a time leaves, and only
//! when its successor serves, so that the pool never has fewer workers for it. It may
//! end a long request, which has its own bounds; after [`Rules::drain_timeout`] the next
//! one does not wait for it any more. Only a pool that stops is in a hurry.
//!
//! [`Pool::step`] compares what is with what should be and returns what to do;
//! the driver does it and reports back.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use qgisserver::protocol::Because;

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
    pub recycle: Recycle,
    /// What chance is drawn from.
    pub seed: u64,
}

/// When a worker is replaced although nothing is wrong with it; 0: never.
#[derive(Debug, Clone, Copy, Default)]
pub struct Recycle {
    pub requests: u64,
    pub age: Duration,
    /// Resident, in kilobytes.
    pub memory: u64,
    /// Part of all memory that the whole pool may take.
    pub high_water_mark: f64,
}

/// The memory of a process, in kilobytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Weight {
    pub resident: u64,
    /// Its share of all memory: what several processes have in common counts once in the sum.
    pub share: u64,
    /// Resident and not of a file, whoever shares it: what grows with what a process does.
    pub own: u64,
}

/// A successor has to be smaller by so many kilobytes to be worth it.
const WORTH: u64 = 64 << 10;

/// What was decided after a look at the memory; an operator wants to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alarm {
    /// The pool is above the high-water mark, and this worker will be replaced.
    Recycles(u32),
    /// The pool is above it, and no worker has grown: replacing one would not help.
    Helpless,
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
    n_served: u64,
    /// When it was new, and now.
    weights: Option<(Weight, Weight)>,
    /// Between 0 and 1, so that workers of one age do not leave together.
    chance: f64,
    /// Why it has its place.
    because: Because,
    /// Why it is recycled, or whatever ended it.
    end: Option<Because>,
    /// The pool stops, and waits for it no longer than it has to.
    is_hurried: bool,
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
    /// Why places are empty, oldest first.
    vacancies: VecDeque<Because>,
    n_born: u64,
    /// The pool is above the high-water mark, and that was said.
    is_helpless: bool,
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
            vacancies: VecDeque::new(),
            n_born: 0,
            is_helpless: false,
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
                self.recycle(now);
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

    /// The worker's counter of requests, as just read.
    pub fn served(&mut self, number: u32, n_served: u64) {
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.n_served = n_served;
        }
    }

    /// What a worker weighs that has just become warm.
    pub fn weighed_new(&mut self, number: u32, weight: Weight) {
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.weights = Some((weight, weight));
        }
    }

    /// What each worker weighs, and all of them with their parent; `memory` is what
    /// there is, in kilobytes.
    pub fn weighed(
        &mut self,
        weights: &BTreeMap<u32, Weight>,
        parent: u64,
        memory: u64,
    ) -> Option<Alarm> {
        for (number, worker) in &mut self.workers {
            if let Some(&now) = weights.get(number).filter(|_| worker.is_warm()) {
                let new = worker.weights.map_or(now, |(new, _)| new);
                worker.weights = Some((new, now));
            }
        }
        let all = parent + weights.values().map(|weight| weight.share).sum::<u64>();
        let mark = memory as f64 * self.rules.recycle.high_water_mark;
        if mark == 0.0 || all as f64 <= mark {
            self.is_helpless = false;
            return None;
        }
        if !self.may_recycle() {
            return None;
        }
        let grown = self.serving().filter(|(_, worker)| worker.has_grown());
        let largest = grown
            .max_by_key(|(_, worker)| worker.share())
            .map(|(number, _)| *number);
        match largest {
            Some(number) => {
                self.blame(number, Because::HighWaterMark);
                Some(Alarm::Recycles(number))
            }
            None => {
                let was_helpless = std::mem::replace(&mut self.is_helpless, true);
                (!was_helpless).then_some(Alarm::Helpless)
            }
        }
    }

    /// Why the worker ends or has ended. Say it before [`Pool::died`].
    pub fn blame(&mut self, number: u32, because: Because) {
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.end = Some(because);
        }
    }

    /// Why the worker has its place.
    pub fn because(&self, number: u32) -> Because {
        let worker = self.workers.get(&number);
        worker.map(|worker| worker.because).unwrap_or_default()
    }

    /// Why the worker is told to leave.
    pub fn end(&self, number: u32) -> Option<Because> {
        let worker = self.workers.get(&number)?;
        worker.end_in(self.generation)
    }

    /// What the worker weighed when it was looked at last.
    pub fn weight(&self, number: u32) -> Option<Weight> {
        Some(self.workers.get(&number)?.weights?.1)
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
        } else if useful && worker.born >= self.struck_at {
            // Those that die before they can serve are not all.
            self.strikes = 0;
        }
        if worker.state == State::Serving {
            self.vacate(worker.end.unwrap_or(Because::Exited));
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
        let leaving = self.workers.values().filter(|it| it.is_leaving());
        let next = leaving.map(|it| it.waited_for_until(&self.rules));
        overdue.chain(fork).chain(next.filter(|at| *at > now)).min()
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
        let (mut late_starts, mut places) = (0, 0);
        for (number, worker) in &mut self.workers {
            if worker.overdue_at(&self.rules).is_none_or(|at| at > now) {
                continue;
            }
            late_starts += u32::from(worker.state == State::Starting);
            places += u32::from(worker.state == State::Serving);
            let verdict = match worker.state {
                State::Starting => Verdict::StartTimedOut,
                State::Leaving
                    if worker.is_hurried && now - worker.since >= self.rules.drain_timeout =>
                {
                    Verdict::DrainTimedOut
                }
                State::Leaving | State::Spare | State::Serving | State::Doomed => Verdict::Frozen,
            };
            effects.push(Effect::Kill(*number, verdict));
            worker.enter(State::Doomed, now);
        }
        (0..late_starts).for_each(|_| self.strike(now));
        (0..places).for_each(|_| self.vacate(Because::Frozen));
    }

    fn vacate(&mut self, because: Because) {
        self.vacancies.push_back(because);
        let surplus = self.vacancies.len().saturating_sub(self.rules.workers);
        self.vacancies.drain(..surplus);
    }

    /// Makes one worker outdated that has served, lived or grown enough.
    fn recycle(&mut self, now: Instant) {
        if !self.may_recycle() {
            return;
        }
        let rules = self.rules.recycle;
        let due = self
            .serving()
            .filter_map(|(number, worker)| Some((worker.born, *number, worker.due(&rules, now)?)));
        let oldest = due.min_by_key(|(born, ..)| *born);
        if let Some((_, number, because)) = oldest {
            self.blame(number, because);
        }
    }

    /// Every place is filled, and nobody is being replaced.
    fn may_recycle(&self) -> bool {
        !self.stopping
            && self.is_settled()
            && self.current(State::Serving) == self.count(State::Serving)
    }

    fn serving(&self) -> impl Iterator<Item = (&u32, &Worker)> {
        let serving = |(_, worker): &(&u32, &Worker)| worker.state == State::Serving;
        self.workers.iter().filter(serving)
    }

    fn empty(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        for (number, worker) in &mut self.workers {
            match worker.state {
                State::Serving => {
                    effects.push(Effect::Dismiss(*number));
                    worker.hurry(now);
                }
                State::Starting | State::Spare => {
                    effects.push(Effect::Kill(*number, Verdict::Stopping));
                    worker.enter(State::Doomed, now);
                }
                State::Leaving if !worker.is_hurried => worker.hurry(now),
                State::Leaving | State::Doomed => {}
            }
        }
    }

    /// Outdated workers leave one at a time, each when a warm one has
    /// taken its place and the server knows that one. One that ends a long request
    /// does not hold up the others, as long as there are not too many of its kind.
    fn renew(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let generation = self.generation;
        for (number, worker) in &mut self.workers {
            let idle = matches!(worker.state, State::Spare | State::Starting);
            if idle && worker.generation != generation {
                effects.push(Effect::Kill(*number, Verdict::Replaced));
                worker.enter(State::Doomed, now);
            }
        }
        if self.has_to_wait_for_the_leaving(now)
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

    fn has_to_wait_for_the_leaving(&self, now: Instant) -> bool {
        let mut leaving = self.workers.values().filter(|it| it.is_leaving());
        let is_new = |it: &Worker| it.waited_for_until(&self.rules) > now;
        self.count(State::Leaving) >= self.rules.workers || leaving.any(is_new)
    }

    /// Whoever was promoted is known to the server, or finds none.
    fn all_joined(&self, now: Instant) -> bool {
        let patience = self.rules.silence_max;
        let known = |it: &Worker| it.joined || now - it.since >= patience;
        self.serving().all(|(_, it)| known(it))
    }

    fn dismiss_oldest(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        let generation = self.generation;
        let oldest = self
            .workers
            .iter_mut()
            .filter(|(_, it)| it.state == State::Serving && it.end_in(generation).is_some())
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
        let because = self.next_because();
        let spare = self
            .workers
            .iter_mut()
            .find(|(_, it)| it.state == State::Spare);
        let Some((number, worker)) = spare else {
            return false;
        };
        self.vacancies.pop_front();
        effects.push(Effect::Promote(*number));
        worker.because = because;
        worker.enter(State::Serving, now);
        true
    }

    /// Why the next worker is promoted: for a place that is empty, or will be.
    fn next_because(&self) -> Because {
        let ends =
            |(_, worker): (&u32, &Worker)| Some((worker.born, worker.end_in(self.generation)?));
        let outdated = || {
            self.serving()
                .filter_map(ends)
                .min_by_key(|(born, _)| *born)
        };
        let vacancy = self.vacancies.front().copied();
        vacancy.or_else(|| Some(outdated()?.1)).unwrap_or_default()
    }

    fn fill(&mut self, now: Instant, effects: &mut Vec<Effect>) {
        if self.fork_at > now {
            return;
        }
        while self.wanted() > 0 {
            let number = (1..).find(|number| !self.workers.contains_key(number));
            let number = number.expect("there are fewer workers than numbers");
            self.n_born += 1;
            let chance = chance(self.rules.seed.wrapping_add(self.n_born));
            self.workers
                .insert(number, Worker::new(self.generation, chance, now));
            effects.push(Effect::Fork(number));
        }
    }

    /// How many workers to fork. Spares come after the places are filled, so that
    /// the first answer is not delayed by a reserve.
    fn wanted(&self) -> usize {
        let serving = self.count(State::Serving);
        let reserve = self.current(State::Starting) + self.current(State::Spare);
        let renewing = self.current(State::Serving) != serving;
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
        let current = |worker: &&Worker| worker.end_in(self.generation).is_none();
        self.workers
            .values()
            .filter(current)
            .filter(|worker| worker.state == state)
            .count()
    }
}

impl Worker {
    fn new(generation: u64, chance: f64, now: Instant) -> Self {
        let state = State::Starting;
        Self {
            state,
            generation,
            born: now,
            since: now,
            beats: 0,
            beat_at: now,
            joined: false,
            n_served: 0,
            weights: None,
            chance,
            because: Because::Start,
            end: None,
            is_hurried: false,
        }
    }

    fn is_leaving(&self) -> bool {
        self.state == State::Leaving
    }

    /// While it leaves: until then the next one does not.
    fn waited_for_until(&self, rules: &Rules) -> Instant {
        self.since + rules.drain_timeout
    }

    fn is_warm(&self) -> bool {
        matches!(self.state, State::Spare | State::Serving)
    }

    /// Why it is outdated in a pool of this generation.
    fn end_in(&self, generation: u64) -> Option<Because> {
        self.end
            .or((self.generation != generation).then_some(Because::Restart))
    }

    /// Why it has to be recycled.
    fn due(&self, rules: &Recycle, now: Instant) -> Option<Because> {
        // Up to a quarter earlier than the setting says.
        let spread = 1.0 - self.chance / 4.0;
        let resident = self.weights.map_or(0, |(_, now)| now.resident);
        let requests = (rules.requests as f64 * spread).max(1.0);
        if rules.requests > 0 && self.n_served as f64 >= requests {
            return Some(Because::RecycledRequests);
        }
        if rules.age > Duration::ZERO && now - self.born >= rules.age.mul_f64(spread) {
            return Some(Because::RecycledAge);
        }
        // One that is too large from the start would have successors that are, too.
        (rules.memory > 0 && resident >= rules.memory && self.n_served > 0)
            .then_some(Because::RecycledMemory)
    }

    fn share(&self) -> u64 {
        self.weights.map_or(0, |(_, now)| now.share)
    }

    /// A new one would weigh clearly less. Not the share tells: it grows when siblings die.
    fn has_grown(&self) -> bool {
        self.weights.is_some_and(|(new, now)| {
            let growth = now.own.saturating_sub(new.own);
            growth >= WORTH && growth >= now.share / 5
        })
    }

    fn enter(&mut self, state: State, now: Instant) {
        self.state = state;
        self.since = now;
    }

    /// It leaves, and has not for ever.
    fn hurry(&mut self, now: Instant) {
        self.is_hurried = true;
        self.enter(State::Leaving, now);
    }

    fn overdue_at(&self, rules: &Rules) -> Option<Instant> {
        match self.state {
            State::Starting => Some(self.since + rules.start_timeout),
            // Frozen, it would neither end its request nor leave.
            State::Leaving if self.is_hurried => {
                let silent = self.beat_at + rules.silence_max;
                Some(silent.min(self.since + rules.drain_timeout))
            }
            // Otherwise a long request may end, within its own bounds.
            State::Leaving | State::Spare | State::Serving => {
                Some(self.beat_at + rules.silence_max)
            }
            State::Doomed => None,
        }
    }
}

/// Between 0 and 1, evenly spread over successive numbers: the finalizer of SplitMix64.
fn chance(number: u64) -> f64 {
    let mut z = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)) as f64 / u64::MAX as f64
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
            recycle: Recycle::default(),
            seed: 1,
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
    fn a_useful_worker_that_dies_ends_the_pauses_of_those_before_it() {
        let (mut pool, now) = settled();
        let now = now + Duration::from_secs(1);
        for number in [2, 3] {
            pool.died(number, false, now);
        }
        assert_eq!(pool.backoff(now), Duration::from_millis(500));
        let now = pool.next_wake(now).unwrap();
        assert_eq!(pool.step(now), [Effect::Fork(2)]);
        // What it did was before the strikes, so it says nothing of them.
        pool.died(1, true, now);
        assert_eq!(pool.strikes, 2);
        pool.ready(2, now);
        pool.step(now);
        pool.died(2, true, now);
        assert_eq!(pool.strikes, 0);
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
        for beats in 1..20 {
            let now = now + Duration::from_secs(beats);
            pool.beats(2, beats, now);
            assert_eq!(pool.step(now), []);
        }
        let now = now + Duration::from_secs(20);
        assert_eq!(pool.step(now), [Effect::Kill(2, Verdict::DrainTimedOut)]);
        pool.died(2, true, now);
        assert!(pool.is_finished());
    }

    #[test]
    fn a_frozen_worker_does_not_hold_up_the_end_until_the_drain_timeout() {
        let (mut pool, now) = settled();
        pool.stop();
        pool.step(now);
        let effects = later(&mut pool, now);
        assert_eq!(
            effects,
            [1, 2].map(|number| Effect::Kill(number, Verdict::Frozen))
        );
    }

    /// A settled pool with these rules.
    fn recycling(recycle: Recycle) -> (Pool, Instant) {
        let (mut pool, now) = settled();
        pool.rules.recycle = recycle;
        (pool, now)
    }

    /// What the replacement of `old` by the spare looks like.
    fn assert_replaced(pool: &mut Pool, now: Instant, old: u32, because: Because) {
        let effects = pool.step(now);
        assert!(effects.contains(&Effect::Promote(3)), "{effects:?}");
        assert_eq!(pool.because(3), because);
        assert_eq!(pool.step(now), [], "the server does not know the new one");
        pool.joined(3);
        let effects = pool.step(now);
        assert!(effects.contains(&Effect::Dismiss(old)), "{effects:?}");
        assert_eq!(pool.end(old), Some(because));
        let left = pool.count(State::Serving);
        assert_eq!(left, 2, "the pool has as many workers as before");
        pool.died(old, true, now);
        assert!(pool.vacancies.is_empty(), "its place was filled before");
    }

    #[test]
    fn a_worker_that_served_enough_leaves_when_its_successor_serves() {
        let (mut pool, now) = recycling(Recycle {
            requests: 100,
            ..Recycle::default()
        });
        pool.served(2, 74);
        assert_eq!(pool.step(now), [], "at most a quarter early");
        pool.served(2, 100);
        assert_replaced(&mut pool, now, 2, Because::RecycledRequests);
    }

    #[test]
    fn the_request_of_a_worker_that_is_recycled_may_take_its_time_until_the_pool_stops() {
        let (mut pool, now) = recycling(Recycle {
            requests: 1,
            ..Recycle::default()
        });
        pool.served(1, 1);
        pool.step(now);
        pool.joined(3);
        pool.step(now);
        assert_eq!(pool.state(1), Some(State::Leaving));
        assert_may_take_its_time_until_the_pool_stops(pool, now);
    }

    #[test]
    fn the_request_of_a_worker_that_a_restart_replaces_may_take_its_time_until_the_pool_stops() {
        let (mut pool, now) = renewing();
        pool.step(now);
        assert_may_take_its_time_until_the_pool_stops(pool, now);
    }

    /// One that restarts, and whose first new worker the server knows.
    fn renewing() -> (Pool, Instant) {
        let (mut pool, now) = settled();
        pool.restart();
        pool.step(now);
        pool.died(3, false, now);
        pool.ready(4, now);
        pool.step(now);
        pool.joined(4);
        (pool, now)
    }

    /// Lets everybody beat for so long.
    fn live(pool: &mut Pool, seconds: u64, now: &mut Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        for _ in 0..seconds {
            *now += Duration::from_secs(1);
            let beats = pool.workers.values().map(|it| it.beats).max();
            (1..9).for_each(|number| pool.beats(number, beats.unwrap_or(0) + 1, *now));
            effects.extend(pool.step(*now));
        }
        effects
    }

    fn assert_may_take_its_time_until_the_pool_stops(mut pool: Pool, mut now: Instant) {
        assert_eq!(pool.state(1), Some(State::Leaving));
        live(&mut pool, 50, &mut now);
        assert_eq!(pool.state(1), Some(State::Leaving));
        pool.stop();
        let effects = live(&mut pool, 19, &mut now);
        assert!(
            !effects.iter().any(|it| matches!(it, Effect::Kill(1, _))),
            "{effects:?}"
        );
        let effects = live(&mut pool, 2, &mut now);
        assert!(
            effects.contains(&Effect::Kill(1, Verdict::DrainTimedOut)),
            "{effects:?}"
        );
    }

    #[test]
    fn a_long_request_of_one_does_not_keep_the_others_from_being_replaced() {
        let (mut pool, mut now) = renewing();
        assert_eq!(pool.step(now), [Effect::Dismiss(1), Effect::Fork(3)]);
        pool.ready(3, now);
        assert_eq!(live(&mut pool, 19, &mut now), []);
        assert_eq!(live(&mut pool, 1, &mut now), [Effect::Promote(3)]);
        pool.joined(3);
        let effects = pool.step(now);
        assert!(effects.contains(&Effect::Dismiss(2)), "{effects:?}");
        // Restart it as often as you like: they do not become ever more.
        for _ in 0..3 {
            pool.restart();
            for number in 1..9 {
                if pool.state(number) == Some(State::Doomed) {
                    pool.died(number, false, now);
                }
                pool.ready(number, now);
                pool.joined(number);
            }
            live(&mut pool, 30, &mut now);
        }
        assert_eq!(pool.count(State::Leaving), 2);
        assert_eq!(pool.count(State::Serving), 2);
        for number in [1, 2] {
            pool.died(number, true, now);
        }
        assert_eq!(pool.count(State::Leaving), 0);
    }

    #[test]
    fn workers_that_are_due_together_leave_one_after_the_other() {
        let (mut pool, now) = recycling(Recycle {
            requests: 10,
            ..Recycle::default()
        });
        pool.served(1, 10);
        pool.served(2, 10);
        let mut left = Vec::new();
        for _ in 0..10 {
            for effect in pool.step(now) {
                if let Effect::Dismiss(number) = effect {
                    left.push(number);
                }
            }
            assert!(pool.count(State::Serving) >= 2 && pool.count(State::Leaving) <= 1);
            for number in 1..9 {
                match pool.state(number) {
                    Some(State::Leaving) => drop(pool.died(number, true, now)),
                    _ => {
                        pool.ready(number, now);
                        pool.joined(number);
                    }
                }
            }
        }
        left.sort();
        assert_eq!(left, [1, 2]);
    }

    #[test]
    fn workers_of_one_age_do_not_grow_old_together() {
        let (mut pool, now) = recycling(Recycle {
            age: Duration::from_secs(1000),
            ..Recycle::default()
        });
        assert_eq!(pool.step(now), []);
        let mut ages: Vec<_> = (750..=1000)
            .filter(|age| {
                let now = now + Duration::from_secs(*age);
                let due = pool.workers[&1].due(&pool.rules.recycle, now);
                due.is_some() != pool.workers[&2].due(&pool.rules.recycle, now).is_some()
            })
            .collect();
        assert!(ages.len() > 20, "{ages:?}");
        let both = now + Duration::from_secs(ages.pop().unwrap() + 1);
        for number in [1, 2, 3] {
            pool.beats(number, 1, both);
        }
        assert_replaced(&mut pool, both, 1, Because::RecycledAge);
    }

    /// Of the first three workers, in megabytes.
    fn weights(shares: [u64; 3]) -> BTreeMap<u32, Weight> {
        let weight = |megabytes: u64| Weight {
            resident: (megabytes + 50) << 10,
            share: megabytes << 10,
            own: megabytes << 10,
        };
        (1..).zip(shares.map(weight)).collect()
    }

    #[test]
    fn a_worker_that_grew_too_large_is_replaced_once_it_was_of_use() {
        let (mut pool, now) = recycling(Recycle {
            memory: 1000 << 10,
            ..Recycle::default()
        });
        pool.weighed(&weights([2000, 900, 100]), 100 << 10, 1 << 40);
        assert_eq!(pool.step(now), [], "it was born so");
        pool.served(1, 1);
        assert_replaced(&mut pool, now, 1, Because::RecycledMemory);
    }

    #[test]
    fn above_the_high_water_mark_the_largest_worker_goes_and_then_the_next() {
        let (mut pool, now) = recycling(Recycle {
            high_water_mark: 0.5,
            ..Recycle::default()
        });
        let look = |pool: &mut Pool, shares| pool.weighed(&weights(shares), 100 << 10, 2000 << 10);
        assert_eq!(look(&mut pool, [100, 100, 100]), None);
        assert_eq!(look(&mut pool, [300, 400, 100]), None, "900 of 1000");
        assert_eq!(look(&mut pool, [300, 501, 100]), Some(Alarm::Recycles(2)));
        assert_eq!(look(&mut pool, [900, 501, 100]), None, "one at a time");
        assert_replaced(&mut pool, now, 2, Because::HighWaterMark);
        assert_eq!(look(&mut pool, [900, 0, 110]), Some(Alarm::Recycles(1)));
    }

    #[test]
    fn nobody_is_replaced_when_that_would_not_help() {
        let (mut pool, now) = recycling(Recycle {
            high_water_mark: 0.5,
            ..Recycle::default()
        });
        pool.rules.workers = 3;
        let look = |pool: &mut Pool, shares| pool.weighed(&weights(shares), 100 << 10, 2000 << 10);
        assert_eq!(look(&mut pool, [500, 500, 500]), None, "not complete yet");
        pool.rules.workers = 2;
        let mut look = |shares| look(&mut pool, shares);
        assert_eq!(look([500, 500, 500]), Some(Alarm::Helpless));
        assert_eq!(look([510, 520, 500]), None, "it is said once");
        assert_eq!(look([100, 100, 100]), None);
        assert_eq!(look([600, 520, 500]), Some(Alarm::Helpless));
        assert_eq!(pool.step(now), []);
    }

    #[test]
    fn a_successor_knows_what_became_of_the_one_before() {
        let (mut pool, now) = settled();
        assert_eq!(pool.because(1), Because::Start);
        pool.blame(1, Because::Killed);
        pool.died(1, true, now);
        pool.step(now);
        assert_eq!(pool.because(3), Because::Killed);
        pool.ready(1, now);
        let frozen = now + Duration::from_secs(2);
        pool.step(frozen);
        (1..4).for_each(|number| pool.beats(number, u64::from(number != 2), frozen));
        pool.step(now + Duration::from_secs(3));
        assert_eq!(pool.because(1), Because::Frozen);
        let (mut pool, now) = settled();
        pool.restart();
        pool.step(now);
        pool.ready(4, now);
        pool.step(now);
        assert_eq!(pool.because(4), Because::Restart);
    }

    #[derive(Debug, Clone)]
    enum Event {
        Ready(u32),
        Beats(u32),
        Died(u32),
        Restart,
        Wait(u64),
        Joined(u32),
        Served(u32, u64),
        Weighed(u32, u64),
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
            4 => (1u32..6).prop_map(Event::Joined),
            4 => (1u32..6, 0u64..100).prop_map(|(number, n)| Event::Served(number, n)),
            4 => (1u32..6, 0u64..3000).prop_map(|(number, n)| Event::Weighed(number, n)),
        ];
        proptest::collection::vec(event, 0..200)
    }

    proptest::proptest! {
        /// Never more places filled than there are, and left alone the pool always settles.
        #[test]
        fn whatever_happens_the_pool_settles(events in events()) {
            let mut now = Instant::now();
            let recycle = Recycle {
                requests: 50,
                age: Duration::from_secs(3600),
                memory: 2000 << 10,
                high_water_mark: 0.5,
            };
            let mut pool = Pool::new(Rules { recycle, ..rules() }, now);
            let mut beats = 0;
            for event in events {
                match event {
                    Event::Ready(number) => pool.ready(number, now),
                    Event::Beats(number) => { beats += 1; pool.beats(number, beats, now) }
                    Event::Died(number) => drop(pool.died(number, false, now)),
                    Event::Restart => pool.restart(),
                    Event::Wait(ms) => now += Duration::from_millis(ms),
                    Event::Joined(number) => pool.joined(number),
                    Event::Served(number, n) => pool.served(number, n),
                    Event::Weighed(number, share) => {
                        let (share, own) = (share << 10, share << 10);
                        let weight = Weight { resident: share, share, own };
                        pool.weighed(&[(number, weight)].into(), 100 << 10, 4000 << 10);
                    }
                }
                let before = pool.count(State::Serving);
                let effects = pool.step(now);
                assert!(pool.count(State::Serving) <= rules().workers + 1);
                let n = |wanted: fn(&Effect) -> bool| effects.iter().filter(|it| wanted(it)).count();
                let dismissed = n(|it| matches!(it, Effect::Dismiss(_)));
                assert!(dismissed == 0 || before > rules().workers, "whoever leaves has a successor");
                assert!(dismissed <= 1, "one at a time");
                assert!(pool.count(State::Leaving) <= rules().workers, "not ever more");
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
