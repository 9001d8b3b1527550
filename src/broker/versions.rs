//! Which state of each project clients have seen, so that none of them is sent back in
//! time by a worker that has an older copy.
//!
//! Decisions only. Versions have no order of their own: a project may come back from a
//! backup. What orders them is that each was on disk before it went out. So a worker that
//! looked at the disk after a version first went out answers with that one or a newer one:
//!
//! 1. *When* something new went out goes with each request (`Seen::since_ms`), and who
//!    looked before that looks again. A project that is not known here is always looked at.
//! 2. *What* goes out goes with it, too, if that is certain, which it is of an answer to a
//!    request that was given away when nothing was under way that could have been newer:
//!    each request remembers its epoch, and whatever goes out anew begins another.
//!
//! With `projects.cache.stale_seconds` the copy of that version goes on answering when the
//! project changed. Meanwhile its holders load the new one beside it, one holder at a time
//! so that the others can serve, and then all answer with it at once. If one that has no
//! copy answers before, or the time is up, the new one is what goes out, and who
//! does not have it yet loads it first.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;

use super::queue::Peer;
use crate::protocol::{Edition, ProjectRef, Seen};

/// Projects that are remembered; of others workers are asked for the newest.
const PLACES_MAX: NonZeroUsize = NonZeroUsize::new(4096).expect("it is not zero");
/// Spellings of their names.
const NAMES_MAX: NonZeroUsize = NonZeroUsize::new(4 * 4096).expect("it is not zero");
/// Late answers are not older than so many versions, or are taken for new.
const OUT_MAX: usize = 8;
/// At least, before a worker tries once more to load what it could not.
const PAUSE_MIN: Duration = Duration::from_millis(500);

/// When a request was given to its worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Asked {
    place: Option<u64>,
    epoch: u64,
}

/// A worker that shall load what its project is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errand {
    pub place: u64,
    pub project: ProjectRef,
    pub peer: Peer,
}

/// What is known of all projects.
#[derive(Debug)]
pub struct Versions {
    /// For how long an old copy may answer; zero: not at all.
    stale_max: Duration,
    /// Before a worker tries once more to load what it could not.
    pause: Duration,
    names: LruCache<ProjectRef, u64>,
    places: LruCache<u64, Record>,
    /// Of all epochs of all projects.
    n_epochs: u64,
    /// Places whose change is being prepared.
    changing: BTreeSet<u64>,
}

#[derive(Debug)]
struct Record {
    epoch: u64,
    /// When something new went out.
    since: Instant,
    serving: Option<String>,
    /// What went out lately.
    out: Vec<String>,
    /// Workers whose last answer was what goes out.
    holders: BTreeSet<Peer>,
    change: Option<Change>,
}

/// What goes out is not what the project is.
#[derive(Debug)]
struct Change {
    project: ProjectRef,
    since: Instant,
    /// What the last holder found, and who has that.
    version: Option<String>,
    prepared: BTreeSet<Peer>,
    preparing: Option<Peer>,
    not_before: Instant,
}

impl Versions {
    pub fn new(stale_max: Duration, pause: Duration) -> Self {
        Self {
            stale_max,
            pause: pause.max(PAUSE_MIN),
            names: LruCache::new(NAMES_MAX),
            places: LruCache::new(PLACES_MAX),
            n_epochs: 0,
            changing: BTreeSet::new(),
        }
    }

    pub fn configure(&mut self, stale_max: Duration, pause: Duration) {
        self.stale_max = stale_max;
        self.pause = pause.max(PAUSE_MIN);
    }

    /// A request is given to a worker now: what the worker has to know, and what is to be
    /// remembered until it answers.
    pub fn asked(&mut self, project: &ProjectRef, now: Instant) -> (Seen, Asked) {
        let place = self.names.get(project).copied();
        let record = place.and_then(|place| self.places.get(&place));
        let Some(record) = record else {
            return Default::default();
        };
        let asked = Asked {
            place,
            epoch: record.epoch,
        };
        (record.seen(self.stale_max, now), asked)
    }

    /// An answer goes out.
    pub fn answered(
        &mut self,
        peer: &Peer,
        project: &ProjectRef,
        asked: &Asked,
        edition: &Edition,
        now: Instant,
    ) {
        let Edition {
            place,
            version,
            outdated,
        } = edition;
        if self.names.get(project) != Some(place) {
            self.names.put(project.clone(), *place);
        }
        self.n_epochs += 1;
        let next = self.n_epochs;
        // What other requests that are under way found is not known of a new record.
        let new = || Record::new(next, now);
        let record = self.places.get_or_insert_mut(*place, new);
        let is_certain = asked.place == Some(*place) && asked.epoch == record.epoch;
        record.went_out(version, is_certain, next, now);
        if record.serving.as_ref() != Some(version) {
            record.holders.remove(peer);
        } else {
            record.holders.insert(peer.clone());
            if *outdated && record.change.is_none() {
                record.change = Some(Change::new(project, now));
            }
        }
        match record.change {
            Some(_) => self.changing.insert(*place),
            None => self.changing.remove(place),
        };
    }

    /// The next holder that should load a changed project, for whom `may` says yes.
    pub fn errand(&mut self, now: Instant, may: impl Fn(&Peer) -> bool) -> Option<Errand> {
        let places: Vec<u64> = self.changing.iter().copied().collect();
        places
            .into_iter()
            .find_map(|place| self.errand_of(place, now, &may))
    }

    fn errand_of(
        &mut self,
        place: u64,
        now: Instant,
        may: impl Fn(&Peer) -> bool,
    ) -> Option<Errand> {
        let record = self.places.peek_mut(&place);
        let changing = record.and_then(Record::changing);
        // After that requests wait for it, and who is asked loads it.
        let in_time = changing.filter(|(_, change)| now < change.since + self.stale_max);
        let Some((record, change)) = in_time else {
            self.changing.remove(&place);
            return None;
        };
        if change.preparing.is_some() || now < change.not_before {
            return None;
        }
        let mut missing = record.difference(&change.prepared);
        let peer = missing.find(|peer| may(peer))?.clone();
        change.preparing = Some(peer.clone());
        Some(Errand {
            place,
            project: change.project.clone(),
            peer,
        })
    }

    /// How a holder's errand ended; None if it could not load the project.
    pub fn prepared(&mut self, errand: &Errand, version: Option<&str>, now: Instant) {
        self.n_epochs += 1;
        let next = self.n_epochs;
        let Some(record) = self.places.peek_mut(&errand.place) else {
            return;
        };
        let Some(change) = &mut record.change else {
            return;
        };
        if change.preparing.as_ref() != Some(&errand.peer) {
            return;
        }
        change.preparing = None;
        match version {
            None => change.not_before = now + self.pause,
            Some(version) => change.add(&errand.peer, version),
        }
        record.flip_if_ready(next, now);
    }

    /// A worker is gone, and all its copies.
    pub fn gone(&mut self, peer: &Peer, now: Instant) {
        for (_, record) in self.places.iter_mut() {
            self.n_epochs += 1;
            record.gone(peer, self.n_epochs, now);
        }
    }
}

impl Record {
    fn new(epoch: u64, now: Instant) -> Self {
        Self {
            epoch,
            since: now,
            serving: None,
            out: Vec::new(),
            holders: BTreeSet::new(),
            change: None,
        }
    }

    fn seen(&self, stale_max: Duration, now: Instant) -> Seen {
        let since = self.change.as_ref().map_or(now, |change| change.since);
        let since_ms = now.saturating_duration_since(self.since).as_millis();
        Seen {
            since_ms: since_ms.try_into().unwrap_or(u64::MAX),
            version: self.serving.clone(),
            stale: now.saturating_duration_since(since) < stale_max,
        }
    }

    fn went_out(&mut self, version: &str, is_certain: bool, next: u64, now: Instant) {
        if self.serving.as_deref() == Some(version) {
            return;
        }
        match is_certain {
            true => self.serve(version, next, now),
            // Late: something newer went out while it was made.
            false if self.out.iter().any(|it| it == version) => self.since = now,
            // Newer or older than what goes out.
            false => {
                self.begin(next, now);
                self.remember(version);
            }
        }
    }

    fn serve(&mut self, version: &str, next: u64, now: Instant) {
        self.begin(next, now);
        self.remember(version);
        self.serving = Some(version.to_owned());
    }

    fn begin(&mut self, epoch: u64, now: Instant) {
        self.epoch = epoch;
        self.since = now;
        self.serving = None;
        self.holders.clear();
        self.change = None;
    }

    fn remember(&mut self, version: &str) {
        self.out.retain(|it| it != version);
        self.out.push(version.to_owned());
        let surplus = self.out.len().saturating_sub(OUT_MAX);
        self.out.drain(..surplus);
    }

    fn changing(&mut self) -> Option<(&BTreeSet<Peer>, &mut Change)> {
        Some((&self.holders, self.change.as_mut()?))
    }

    /// Once all that answer with the old one have the new one.
    fn flip_if_ready(&mut self, next: u64, now: Instant) {
        let Some(change) = &mut self.change else {
            return;
        };
        let is_ready = self.holders.is_subset(&change.prepared);
        if let Some(version) = change.version.take_if(|_| is_ready) {
            let prepared = std::mem::take(&mut change.prepared);
            self.serve(&version, next, now);
            self.holders = prepared;
        }
    }

    fn gone(&mut self, peer: &Peer, next: u64, now: Instant) {
        self.holders.remove(peer);
        if let Some(change) = &mut self.change {
            change.prepared.remove(peer);
            change.preparing.take_if(|it| it == peer);
            // Otherwise what it had loaded might be served by nobody.
            if !change.prepared.is_empty() {
                self.flip_if_ready(next, now);
            }
        }
    }
}

impl Change {
    fn new(project: &ProjectRef, now: Instant) -> Self {
        Self {
            project: project.clone(),
            since: now,
            version: None,
            prepared: BTreeSet::new(),
            preparing: None,
            not_before: now,
        }
    }

    /// It changed once more when the versions differ: those before have to load it again.
    fn add(&mut self, peer: &Peer, version: &str) {
        if self.version.as_deref() != Some(version) {
            self.version = Some(version.to_owned());
            self.prepared.clear();
        }
        self.prepared.insert(peer.clone());
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const S: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    fn city() -> ProjectRef {
        ProjectRef {
            alias: "file".into(),
            path: "city".into(),
        }
    }

    fn peer(n: usize) -> Peer {
        Peer::from(vec![n as u8])
    }

    fn edition(version: &str, outdated: bool) -> Edition {
        Edition {
            place: 7,
            version: version.into(),
            outdated,
        }
    }

    struct Bench {
        versions: Versions,
        now: Instant,
    }

    impl Bench {
        fn new(stale_max: Duration) -> Self {
            Self {
                versions: Versions::new(stale_max, S),
                now: Instant::now(),
            }
        }

        fn ask(&mut self) -> (Seen, Asked) {
            self.versions.asked(&city(), self.now)
        }

        fn answer(&mut self, worker: usize, asked: &Asked, version: &str, outdated: bool) {
            let edition = edition(version, outdated);
            let peer = peer(worker);
            self.versions
                .answered(&peer, &city(), asked, &edition, self.now);
        }

        fn serve(&mut self, worker: usize, version: &str) {
            let asked = self.ask().1;
            self.answer(worker, &asked, version, false);
        }
    }

    #[test]
    fn of_an_unknown_project_the_newest_is_wanted() {
        let mut bench = Bench::new(60 * S);
        let (seen, _) = bench.ask();
        assert_eq!(seen, Seen::default());
        assert!(!seen.trusts(Duration::ZERO, 60 * S) && !seen.allows("1"));
    }

    #[test]
    fn who_looked_before_something_new_went_out_looks_again() {
        let mut bench = Bench::new(Duration::ZERO);
        bench.serve(1, "1");
        bench.serve(1, "1");
        bench.now += 5 * S;
        let (seen, _) = bench.ask();
        assert!(seen.trusts(4 * S, 60 * S) && seen.allows("1") && !seen.stale);
        assert!(!seen.trusts(4 * S, 3 * S), "the interval is over");
        bench.serve(2, "2");
        bench.now += S;
        let (seen, _) = bench.ask();
        assert!(!seen.trusts(4 * S, 60 * S) && seen.trusts(S / 2, 60 * S));
        assert!(seen.allows("2") && !seen.allows("1"));
    }

    #[test]
    fn a_late_answer_does_not_bring_the_old_one_back() {
        let mut bench = Bench::new(60 * S);
        bench.serve(1, "1");
        bench.serve(1, "1");
        let late = bench.ask().1;
        bench.serve(2, "2");
        bench.answer(1, &late, "1", false);
        assert!(bench.ask().0.allows("2"));
        // This one may be newer than the one that came first.
        let late = bench.ask().1;
        bench.serve(2, "3");
        bench.answer(1, &late, "4", false);
        assert_eq!(bench.ask().0.version, None);
        bench.serve(1, "4");
        assert!(bench.ask().0.allows("4"));
    }

    #[test]
    fn all_holders_answer_with_the_new_one_at_once() {
        let mut bench = Bench::new(60 * S);
        bench.serve(1, "1");
        bench.serve(1, "1");
        bench.serve(2, "1");
        assert_eq!(bench.versions.errand(bench.now, |_| true), None);
        let asked = bench.ask().1;
        bench.answer(1, &asked, "1", true);
        let first = bench.versions.errand(bench.now, |_| true).unwrap();
        let other = bench.versions.errand(bench.now, |_| true);
        assert_eq!(other, None, "one at a time");
        bench.versions.prepared(&first, Some("2"), bench.now);
        let (seen, late) = bench.ask();
        assert!(seen.allows("1") && seen.stale, "not all have it");
        let second = bench.versions.errand(bench.now, |_| true).unwrap();
        assert_ne!(first.peer, second.peer);
        bench.versions.prepared(&second, Some("2"), bench.now);
        assert!(bench.ask().0.allows("2"));
        bench.answer(1, &late, "1", true);
        assert!(bench.ask().0.allows("2"));
        assert_eq!(bench.versions.errand(bench.now, |_| true), None);
    }

    #[test]
    fn a_change_that_cannot_be_prepared_is_waited_for_at_last() {
        let mut bench = Bench::new(60 * S);
        bench.serve(1, "1");
        bench.serve(1, "1");
        let asked = bench.ask().1;
        bench.answer(1, &asked, "1", true);
        let errand = bench.versions.errand(bench.now, |_| true).unwrap();
        bench.versions.prepared(&errand, None, bench.now);
        let soon = bench.now + S * 3 / 4;
        assert_eq!(bench.versions.errand(soon, |_| true), None, "a pause");
        let errand = bench.versions.errand(bench.now + S, |_| true).unwrap();
        bench.versions.prepared(&errand, None, bench.now + S);
        assert!(bench.ask().0.stale);
        bench.now += 60 * S;
        assert!(!bench.ask().0.stale);
        assert_eq!(bench.versions.errand(bench.now, |_| true), None);
    }

    #[test]
    fn a_holder_that_is_gone_is_not_waited_for() {
        let mut bench = Bench::new(60 * S);
        for worker in [1, 1, 2, 3] {
            bench.serve(worker, "1");
        }
        let asked = bench.ask().1;
        bench.answer(1, &asked, "1", true);
        let one = bench
            .versions
            .errand(bench.now, |it| *it == peer(1))
            .unwrap();
        bench.versions.prepared(&one, Some("2"), bench.now);
        let two = bench
            .versions
            .errand(bench.now, |it| *it == peer(2))
            .unwrap();
        bench.versions.gone(&two.peer, bench.now);
        assert!(bench.ask().0.allows("1"));
        bench.versions.prepared(&two, Some("2"), bench.now);
        bench.versions.gone(&peer(3), bench.now);
        assert!(bench.ask().0.allows("2"));
    }

    /// A worker as `worker/src/projects.rs` is one: what it has, and when it looked.
    #[derive(Debug, Clone, Default)]
    struct Copies {
        looked: Option<Instant>,
        current: Option<u32>,
        next: Option<u32>,
    }

    impl Copies {
        fn answer(&mut self, seen: &Seen, disk: u32, now: Instant, interval: Duration) -> Edition {
            let told = |version: u32| edition(&version.to_string(), version != disk);
            if let (Some(current), Some(looked)) = (self.current, self.looked)
                && seen.trusts(now - looked, interval)
            {
                return edition(&current.to_string(), false);
            }
            self.looked = Some(now);
            if self.current == Some(disk) {
                return told(disk);
            }
            let allowed = |it: &u32| seen.stale && seen.allows(&it.to_string());
            if let Some(current) = self.current.filter(allowed) {
                return told(current);
            }
            self.current = Some(self.next.take().filter(allowed).unwrap_or(disk));
            told(self.current.unwrap())
        }
    }

    /// What a random hand does next.
    #[derive(Debug, Clone)]
    enum Step {
        Change,
        Pass(u16),
        /// A request is given to a worker that has none.
        Give(usize),
        /// It looks and loads.
        Look(usize),
        /// Its answer arrives.
        Arrive(usize),
        Errand,
        Die(usize),
    }

    const WORKERS: usize = 3;

    fn step() -> impl Strategy<Value = Step> {
        let worker = 0..WORKERS;
        prop_oneof![
            1 => Just(Step::Change),
            2 => (0u16..4000).prop_map(Step::Pass),
            6 => worker.clone().prop_map(Step::Give),
            6 => worker.clone().prop_map(Step::Look),
            6 => worker.clone().prop_map(Step::Arrive),
            2 => Just(Step::Errand),
            1 => worker.prop_map(Step::Die),
        ]
    }

    struct Busy {
        seen: Seen,
        asked: Asked,
        errand: Option<Errand>,
        /// The newest that had gone out when it was given away.
        floor: u32,
        found: Option<Edition>,
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        /// Whatever happens in whatever order: a request that begins after an answer
        /// went out is not answered with something older.
        #[test]
        fn no_client_is_sent_back_in_time(
            steps in proptest::collection::vec(step(), 0..120),
            stale in 0u32..3,
            interval in 0u32..3,
        ) {
            let mut bench = Bench::new(stale * 2 * S);
            let interval = interval * S;
            let (mut disk, mut newest) = (1u32, 0u32);
            let mut copies = vec![Copies::default(); WORKERS];
            let mut busy: Vec<Option<Busy>> = (0..WORKERS).map(|_| None).collect();
            for step in steps {
                bench.now += MS;
                let now = bench.now;
                match step {
                    Step::Change => disk += 1,
                    Step::Pass(ms) => bench.now += MS * u32::from(ms),
                    Step::Give(at) if busy[at].is_none() => {
                        let (seen, asked) = bench.ask();
                        busy[at] = Some(Busy { seen, asked, errand: None, floor: newest, found: None });
                    }
                    Step::Errand => {
                        let free = |it: &Peer| busy[usize::from(it[0])].is_none();
                        if let Some(errand) = bench.versions.errand(now, free) {
                            let at = usize::from(errand.peer[0]);
                            busy[at] = Some(Busy {
                                seen: Seen::default(),
                                asked: Asked::default(),
                                errand: Some(errand),
                                floor: 0,
                                found: None,
                            });
                        }
                    }
                    Step::Look(at) => {
                        let Some(request) = &mut busy[at] else { continue };
                        if request.found.is_some() {
                            continue;
                        }
                        request.found = Some(match request.errand {
                            None => copies[at].answer(&request.seen, disk, now, interval),
                            Some(_) => {
                                if copies[at].current != Some(disk) {
                                    copies[at].next = Some(disk);
                                }
                                edition(&disk.to_string(), false)
                            }
                        });
                    }
                    Step::Arrive(at) => {
                        let Some(request) = busy[at].take_if(|it| it.found.is_some()) else { continue };
                        let found = request.found.unwrap();
                        match request.errand {
                            Some(errand) => bench.versions.prepared(&errand, Some(&found.version), now),
                            None => {
                                let version: u32 = found.version.parse().unwrap();
                                prop_assert!(version >= request.floor, "{version} after {}", request.floor);
                                newest = newest.max(version);
                                bench.answer(at, &request.asked, &found.version, found.outdated);
                            }
                        }
                    }
                    Step::Die(at) => {
                        (copies[at], busy[at]) = (Copies::default(), None);
                        bench.versions.gone(&peer(at), now);
                    }
                    Step::Give(_) => {}
                }
            }
        }
    }
}
