//! Which projects answer, and which may be waiting for a source that does not.
//!
//! Decisions only: events and their times come in.
//!
//! | a project is | event | and becomes |
//! |---|---|---|
//! | new | an answer, or a worker that has it open | sound |
//! | new or sound | a request that was not expected to be long runs for `lanes.stalled_seconds`, and nothing was answered since it began | stalled |
//! | stalled | an answer, whatever it says | sound |
//! | stalled | ten minutes without another such request | new |
//!
//! A new project has no more workers than long requests may have together
//! ([`super::lanes::Rules::long_max`]), and all stalled projects have no more together:
//! the others are for projects that answer. The only project that is known is not kept
//! from any worker, because it stalls nobody else.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::waiting::Name;

/// Projects that are remembered; of more, those that answered longest ago are new again.
const SOUND_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("it is not zero");
const STALLED_MAX: NonZeroUsize = NonZeroUsize::new(256).expect("it is not zero");

/// Nobody may ask for it again.
const STALLED_FOR: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    New,
    Sound,
    Stalled,
}

#[derive(Debug)]
pub struct Standings {
    /// When they answered last.
    sound: LruCache<Name, Instant>,
    /// When that was noticed last.
    stalled: LruCache<Name, Instant>,
}

impl Default for Standings {
    fn default() -> Self {
        Self {
            sound: LruCache::new(SOUND_MAX),
            stalled: LruCache::new(STALLED_MAX),
        }
    }
}

impl Standings {
    /// What is of no project waits for the source of none.
    pub fn of(&self, project: &Name) -> Standing {
        if project.is_empty() || self.is_only(project) {
            return Standing::Sound;
        }
        if self.is_stalled(project) {
            return Standing::Stalled;
        }
        match self.sound.contains(project) {
            true => Standing::Sound,
            false => Standing::New,
        }
    }

    /// No other is known.
    fn is_only(&self, project: &Name) -> bool {
        let mut known = self.sound.iter().chain(self.stalled.iter());
        known.all(|(name, _)| name == project)
    }

    pub fn is_stalled(&self, project: &Name) -> bool {
        self.any_is_stalled() && self.stalled.contains(project)
    }

    /// Those that are, the last noticed first.
    pub fn stalled(&self) -> Vec<Name> {
        self.stalled.iter().map(|(name, _)| name.clone()).collect()
    }

    pub fn any_is_stalled(&self) -> bool {
        !self.stalled.is_empty()
    }

    /// A worker answered, or began to.
    pub fn answered(&mut self, project: &Name, now: Instant) {
        if self.any_is_stalled() {
            self.stalled.pop(project);
        }
        match self.sound.get_mut(project) {
            Some(answered) => *answered = now,
            None => drop(self.sound.put(project.clone(), now)),
        }
    }

    /// A worker has loaded it, which says nothing new about what is stalled. True if it
    /// was new.
    pub fn opened(&mut self, project: &Name, now: Instant) -> bool {
        let is_new = !self.is_stalled(project) && !self.sound.contains(project);
        if is_new {
            self.sound.put(project.clone(), now);
        }
        is_new
    }

    /// There is no such project, so it keeps nobody from anything.
    pub fn is_none(&mut self, project: &Name) {
        self.sound.pop(project);
    }

    /// One of its requests runs for too long. True if it is stalled with that.
    pub fn overran(&mut self, project: &Name, began: Instant, now: Instant) -> bool {
        let answered = self.sound.peek(project);
        if project.is_empty() || answered.is_some_and(|answered| *answered > began) {
            return false;
        }
        self.sound.pop(project);
        self.stalled.put(project.clone(), now).is_none()
    }

    /// Forgets what was noticed long ago. To be called now and then.
    pub fn tick(&mut self, now: Instant) {
        let is_old = |at: &Instant| now.saturating_duration_since(*at) >= STALLED_FOR;
        while self.stalled.peek_lru().is_some_and(|(_, at)| is_old(at)) {
            self.stalled.pop_lru();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    fn name(of: &str) -> Name {
        of.into()
    }

    #[test]
    fn a_project_is_new_until_it_answers_and_stalled_until_it_does_again() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        let city = name("city");
        standings.answered(&name("lake"), start);
        assert_eq!(standings.of(&city), Standing::New);
        standings.answered(&city, start);
        assert_eq!(standings.of(&city), Standing::Sound);
        assert!(standings.overran(&city, start + S, start + 6 * S));
        assert!(
            !standings.overran(&city, start + S, start + 6 * S),
            "it is said once"
        );
        assert_eq!(standings.of(&city), Standing::Stalled);
        assert!(!standings.opened(&city, start + 9 * S));
        assert_eq!(standings.of(&city), Standing::Stalled);
        standings.answered(&city, start + 9 * S);
        assert_eq!(standings.of(&city), Standing::Sound);
        assert!(!standings.any_is_stalled());
    }

    #[test]
    fn a_request_that_runs_long_while_others_are_answered_stalls_no_project() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        standings.answered(&name("city"), start + S);
        assert!(!standings.overran(&name("city"), start, start + 5 * S));
        assert_eq!(standings.of(&name("city")), Standing::Sound);
    }

    #[test]
    fn the_only_project_and_what_has_none_are_kept_from_no_worker() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        assert_eq!(standings.of(&name("city")), Standing::Sound);
        assert!(standings.overran(&name("city"), start, start + 5 * S));
        assert_eq!(standings.of(&name("city")), Standing::Sound, "nobody waits");
        assert_eq!(standings.of(&name("lake")), Standing::New);
        standings.answered(&name("lake"), start + 6 * S);
        assert_eq!(standings.of(&name("city")), Standing::Stalled);
        assert!(!standings.overran(&name(""), start, start));
        assert_eq!(standings.of(&name("")), Standing::Sound);
    }

    #[test]
    fn a_project_that_a_worker_has_open_is_not_new() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        standings.answered(&name("lake"), start);
        assert!(standings.opened(&name("city"), start));
        assert_eq!(standings.of(&name("city")), Standing::Sound);
    }

    #[test]
    fn names_that_strangers_invent_are_no_projects() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        standings.answered(&name("invented"), start);
        standings.is_none(&name("invented"));
        assert_eq!(standings.of(&name("city")), Standing::Sound, "the only one");
    }

    #[test]
    fn a_stalled_project_that_nobody_asks_for_is_forgotten() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        standings.overran(&name("city"), start, start);
        standings.overran(&name("lake"), start, start + S);
        standings.overran(&name("city"), start, start + 2 * S);
        standings.tick(start + 600 * S);
        assert_eq!(standings.stalled().len(), 2);
        standings.tick(start + 601 * S);
        assert_eq!(standings.stalled(), [name("city")]);
    }

    #[test]
    fn the_tables_are_bounded() {
        let (mut standings, start) = (Standings::default(), Instant::now());
        for n in 0..10_000 {
            standings.answered(&name(&format!("sound {n}")), start);
            standings.overran(&name(&format!("stalled {n}")), start, start);
        }
        assert_eq!(standings.sound.len(), SOUND_MAX.get());
        assert_eq!(standings.stalled.len(), STALLED_MAX.get());
    }
}
