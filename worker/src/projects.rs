//! The projects of one worker, kept while they do not change.
//!
//! One entry per place; least recently used goes first when there are too many, or when
//! they take too much memory. Pinned ones stay. An entry has
//!
//! | | what |
//! |---|---|
//! | `current` | the copy that answers |
//! | `next` | what the project is now, loaded ahead, while the server wants all workers to answer with the old one |
//! | `broken` | why what the project is now cannot be loaded; remembered for a few seconds or until it changes, so that it costs few loads and is back when its database is |
//!
//! Which copy answers depends on what clients have seen already ([`Seen`]).

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lru::LruCache;
use qgisserver::protocol::{Edition, Failure, Found, ProjectRef, Seen};

use crate::companions::Companions;
use crate::places::{Place, Source, Stamp};

/// What the cache goes by.
#[derive(Debug, Clone)]
pub struct Rules {
    /// Projects that are not pinned.
    pub size: usize,
    /// What they may take together, the pinned included.
    pub bytes: u64,
    pub check_interval: Duration,
    /// How long a project that does not load is remembered.
    pub broken_for: Duration,
    /// How long the old copy answers while the changed file cannot be read.
    pub settle: Duration,
    /// Between two tries to get invalid layers back.
    pub retry: Duration,
}

/// A project as it was read.
pub struct Loaded<P> {
    pub project: P,
    pub stamp: Stamp,
    pub companions: Companions,
    /// Invalid layers that the operator accepts.
    pub bad_layers: Vec<String>,
    /// They may come back.
    pub retry: bool,
    /// What it takes.
    pub bytes: u64,
    /// It did not change while it was read; otherwise nobody can say which state this is.
    pub settled: bool,
}

/// A loaded project and its state.
pub struct Copy<P> {
    loaded: Loaded<P>,
    version: String,
    /// When it was loaded, or tried once more for its invalid layers.
    at: Instant,
    /// Where its layers are well, and here they were not.
    better: Option<String>,
}

struct Broken {
    stamp: Stamp,
    failure: Failure,
    at: Instant,
    /// The first of several in a row.
    since: Instant,
    /// Nobody waited for it: the next that a client meets is a first one.
    ahead: bool,
}

struct Entry<P> {
    /// What clients call it, up to a few.
    names: Vec<ProjectRef>,
    current: Option<Copy<P>>,
    next: Option<Copy<P>>,
    broken: Option<Broken>,
    checked: Instant,
    /// One of its names is.
    pinned: bool,
}

/// Which copy answers a request: the one that [`Projects::copy`] gives.
#[derive(Debug)]
pub struct Hit {
    pub edition: Edition,
    pub found: Found,
    /// Another one than before: what QGIS derived from that has to be forgotten.
    pub is_new: bool,
}

/// What is known of a place, and answers.
enum Choice {
    Current {
        outdated: bool,
    },
    Next {
        outdated: bool,
    },
    Broken(Failure),
    Load(Found),
    /// For its invalid layers.
    Retry,
}

/// Names per project by which its end is noticed.
const NAMES_MAX: usize = 8;

/// The cache, generic over what a loaded project is so that tests need no QGIS.
pub struct Projects<P> {
    rules: Rules,
    entries: LruCache<Source, Entry<P>>,
    /// What these names lead to stays, also when that becomes another place.
    pinned: HashSet<ProjectRef>,
}

impl<P> Projects<P> {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            entries: LruCache::unbounded(),
            pinned: HashSet::new(),
        }
    }

    /// How many projects are open.
    pub fn n_open(&self) -> u32 {
        let open = self.entries.iter().filter(|(_, it)| it.current.is_some());
        open.count() as u32
    }

    /// The copy of `place` that answers after what clients have `seen`, loaded by `load`
    /// unless it is here.
    pub fn get(
        &mut self,
        name: &ProjectRef,
        place: &Place,
        seen: &Seen,
        now: Instant,
        load: impl FnOnce() -> Result<Loaded<P>, Failure>,
    ) -> Result<Hit, Failure> {
        match self.choose(name, place, seen, now) {
            Choice::Current { outdated } => Ok(self.hit(place, Found::Cached, outdated, false)),
            Choice::Next { outdated } => {
                let entry = self.entry(place);
                entry.current = entry.next.take();
                Ok(self.hit(place, Found::Cached, outdated, true))
            }
            Choice::Broken(failure) => self.fall_back(place, seen, now, failure),
            Choice::Retry => {
                let is_new = match load() {
                    Ok(loaded) => self.retried(place, seen, now, Some(loaded)),
                    Err(failure @ (Failure::QgisFailed | Failure::ProjectNotFound)) => {
                        return Err(failure);
                    }
                    // Whatever is in trouble, the copy that is here is as good as before.
                    Err(_) => self.retried(place, seen, now, None),
                };
                Ok(self.hit(place, Found::Reloaded, false, is_new))
            }
            Choice::Load(found) => {
                self.make_room(place);
                let start = Instant::now();
                match load() {
                    Ok(loaded) => {
                        self.put(place, loaded, now);
                        Ok(self.hit(place, found, false, true))
                    }
                    // A load may wait for a database for longer than a failure is remembered.
                    Err(failure) => self.failed(place, seen, now + start.elapsed(), failure),
                }
            }
        }
    }

    /// The copy that answers for `place` after [`Projects::get`] found one.
    pub fn copy(&self, place: &Place) -> &Copy<P> {
        let entry = self.entries.peek(&place.source);
        let current = entry.and_then(|entry| entry.current.as_ref());
        current.expect("it was found just now")
    }

    /// Loads what the project is now beside what answers, and returns its version. Not
    /// if two copies have no room: nobody waits for this one.
    pub fn prepare(
        &mut self,
        name: &ProjectRef,
        place: &Place,
        now: Instant,
        load: impl FnOnce() -> Result<Loaded<P>, Failure>,
    ) -> Result<(Edition, Found), Failure> {
        let broken_for = self.rules.broken_for;
        let entry = self.known(name, place, now);
        let copies = [&entry.current, &entry.next];
        let here = copies.into_iter().flatten().find(|it| it.is_of(place));
        if let Some(copy) = here {
            return Ok((edition(place, &copy.version, false), Found::Cached));
        }
        let broken = entry.broken.as_ref();
        if let Some(broken) = broken.filter(|it| it.is_of(place, now, broken_for)) {
            return Err(broken.failure);
        }
        entry.next = None;
        let own = entry.bytes();
        if own > 0 && self.bytes() + own > self.rules.bytes {
            tracing::info!(project = %name, "no room to load it beside the old one (projects.cache.memory)");
            return Err(Failure::TooLarge);
        }
        let start = Instant::now();
        let loaded = load();
        let loaded = loaded
            .inspect_err(|failure| self.remember(place, now + start.elapsed(), *failure, true))?;
        let copy = Copy::new(loaded, now);
        let told = edition(place, &copy.version, false);
        let entry = self.entry(place);
        entry.broken = None;
        let was_open = entry.current.is_some();
        *(match was_open {
            true => &mut entry.next,
            false => &mut entry.current,
        }) = Some(copy);
        self.evict(place);
        let found = match was_open {
            true => Found::Reloaded,
            false => Found::Loaded,
        };
        Ok((told, found))
    }

    /// From now on what this name leads to stays, whatever else is asked for.
    pub fn pin(&mut self, name: &ProjectRef) {
        self.pinned.insert(name.clone());
        for (_, entry) in self.entries.iter_mut() {
            entry.pinned |= entry.names.contains(name);
        }
    }

    /// What is open takes all the memory that it may.
    pub fn is_full(&self) -> bool {
        self.bytes() >= self.rules.bytes
    }

    /// There is nothing by this name any more: what it named goes, if it is gone.
    pub fn gone(&mut self, name: &ProjectRef) {
        self.forget(|source, entry| {
            entry.names.contains(name) && file(source).is_none_or(|path| !path.exists())
        });
    }

    /// Drops files that are gone, though nobody asked for them.
    pub fn sweep(&mut self) {
        self.forget(|source, _| file(source).is_some_and(|path| !path.exists()));
    }

    fn forget(&mut self, is_gone: impl Fn(&Source, &Entry<P>) -> bool) {
        let entries = self.entries.iter();
        let gone = entries.filter(|(source, entry)| is_gone(source, entry));
        let gone: Vec<Source> = gone.map(|(source, _)| source.clone()).collect();
        for source in gone {
            self.entries.pop(&source);
        }
    }

    /// The entry of the place, now the last used, made if it is not here.
    fn known(&mut self, name: &ProjectRef, place: &Place, now: Instant) -> &mut Entry<P> {
        let new = || Entry {
            names: Vec::new(),
            current: None,
            next: None,
            broken: None,
            checked: now,
            pinned: false,
        };
        let is_pinned = self.pinned.contains(name);
        let known = self.entries.peek(&place.source);
        if is_pinned && !known.is_some_and(|entry| entry.names.contains(name)) {
            self.unpin_others(name, place);
        }
        let entry = self.entries.get_or_insert_mut_ref(&place.source, new);
        entry.pinned |= is_pinned;
        let has_room = entry.names.len() < NAMES_MAX || is_pinned;
        if has_room && !entry.names.contains(name) {
            entry.names.push(name.clone());
        }
        entry
    }

    /// The name leads to this place now, and to no other any more.
    fn unpin_others(&mut self, name: &ProjectRef, place: &Place) {
        let pinned = &self.pinned;
        for (source, entry) in self.entries.iter_mut() {
            if *source != place.source && entry.pinned {
                entry.names.retain(|it| it != name);
                entry.pinned = entry.names.iter().any(|it| pinned.contains(it));
            }
        }
    }

    fn entry(&mut self, place: &Place) -> &mut Entry<P> {
        let entry = self.entries.peek_mut(&place.source);
        entry.expect("a request finds or makes it first")
    }

    fn hit(&mut self, place: &Place, found: Found, outdated: bool, is_new: bool) -> Hit {
        let entry = self.entry(place);
        let copy = entry.current.as_ref().expect("it was chosen or put");
        Hit {
            edition: edition(place, &copy.version, outdated),
            found,
            is_new,
        }
    }

    fn choose(&mut self, name: &ProjectRef, place: &Place, seen: &Seen, now: Instant) -> Choice {
        let rules = self.rules.clone();
        let is_known = self.entries.contains(&place.source);
        let entry = self.known(name, place, now);
        let checked = std::mem::replace(&mut entry.checked, now);
        if entry.current.is_some()
            && entry.broken.is_none()
            && seen.trusts(now.saturating_duration_since(checked), rules.check_interval)
        {
            entry.checked = checked;
            return Choice::Current { outdated: false };
        }
        let is_now = |copy: &Option<Copy<P>>| copy.as_ref().is_some_and(|it| it.is_of(place));
        let is_allowed =
            |copy: &Option<Copy<P>>| copy.as_ref().is_some_and(|it| seen.allows(&it.version));
        if is_now(&entry.current) {
            (entry.next, entry.broken) = (None, None);
            let current = entry.current.as_ref().expect("it is the one");
            return match current.is_due(seen, now, rules.retry) {
                true => Choice::Retry,
                false => Choice::Current { outdated: false },
            };
        }
        if seen.stale && is_allowed(&entry.current) {
            return Choice::Current { outdated: true };
        }
        let outdated = !is_now(&entry.next);
        if !outdated || (seen.stale && is_allowed(&entry.next)) {
            entry.broken = None;
            return Choice::Next { outdated };
        }
        match &entry.broken {
            Some(broken) if broken.is_of(place, now, rules.broken_for) => {
                Choice::Broken(broken.failure)
            }
            _ if is_known => Choice::Load(Found::Reloaded),
            _ => Choice::Load(Found::Loaded),
        }
    }

    /// Two copies of a big project may not fit.
    fn make_room(&mut self, place: &Place) {
        let taken = self.bytes();
        let limit = self.rules.bytes;
        let entry = self.entry(place);
        entry.next = None;
        let own = entry.bytes();
        if taken + own > limit {
            entry.current = None;
        }
    }

    fn put(&mut self, place: &Place, loaded: Loaded<P>, now: Instant) {
        let entry = self.entry(place);
        entry.current = Some(Copy::new(loaded, now));
        (entry.next, entry.broken) = (None, None);
        self.evict(place);
    }

    /// Keeps what was loaded once more if it has fewer invalid layers.
    fn retried(
        &mut self,
        place: &Place,
        seen: &Seen,
        now: Instant,
        loaded: Option<Loaded<P>>,
    ) -> bool {
        let current = self.entry(place).current.as_mut();
        let current = current.expect("its layers are invalid");
        let n_bad = current.loaded.bad_layers.len();
        match loaded.filter(|it| it.bad_layers.len() < n_bad) {
            Some(better) => {
                self.put(place, better, now);
                true
            }
            None => {
                current.at = now;
                current.better = seen.version.clone();
                false
            }
        }
    }

    fn failed(
        &mut self,
        place: &Place,
        seen: &Seen,
        now: Instant,
        failure: Failure,
    ) -> Result<Hit, Failure> {
        self.remember(place, now, failure, false);
        match is_of_the_project(failure) {
            true => self.fall_back(place, seen, now, failure),
            false => Err(failure),
        }
    }

    /// Of another failure than the project's nothing is kept.
    fn remember(&mut self, place: &Place, now: Instant, failure: Failure, ahead: bool) {
        let entry = self.entry(place);
        if !is_of_the_project(failure) {
            if entry.current.is_none() && entry.broken.is_none() {
                self.entries.pop(&place.source);
            }
            return;
        }
        let before = entry.broken.as_ref().filter(|it| !it.ahead);
        let before = before.filter(|_| entry.current.is_some());
        entry.broken = Some(Broken {
            stamp: place.stamp,
            failure,
            at: now,
            since: before.map_or(now, |it| it.since),
            ahead,
        });
        self.evict(place);
    }

    /// The changed file may be half written: for a moment what was there before answers,
    /// unless clients have seen something newer.
    fn fall_back(
        &mut self,
        place: &Place,
        seen: &Seen,
        now: Instant,
        failure: Failure,
    ) -> Result<Hit, Failure> {
        let settle = self.rules.settle;
        let entry = self.entry(place);
        let since = entry.broken.as_ref().map_or(now, |broken| broken.since);
        let current = entry.current.as_ref();
        let may_answer = failure == Failure::ProjectUnreadable
            && now.saturating_duration_since(since) < settle
            && current.is_some_and(|it| seen.allows(&it.version));
        if !may_answer {
            (entry.current, entry.next) = (None, None);
            return Err(failure);
        }
        Ok(self.hit(place, Found::Cached, true, false))
    }

    fn bytes(&self) -> u64 {
        self.entries.iter().map(|(_, entry)| entry.bytes()).sum()
    }

    /// Down to the rules, but for what is pinned and what is used now.
    fn evict(&mut self, used: &Place) {
        loop {
            let may = |entry: &&Entry<P>| !entry.pinned;
            let n = self.entries.iter().map(|(_, it)| it).filter(may).count();
            if n <= self.rules.size && self.bytes() <= self.rules.bytes {
                return;
            }
            let mut oldest = self.entries.iter().rev();
            let oldest = oldest.find(|(source, it)| !it.pinned && **source != used.source);
            let Some(source) = oldest.map(|(source, _)| source.clone()) else {
                return;
            };
            self.entries.pop(&source);
        }
    }
}

impl<P> Entry<P> {
    fn bytes(&self) -> u64 {
        let copies = [&self.current, &self.next].into_iter().flatten();
        copies.map(|copy| copy.loaded.bytes).sum()
    }
}

fn file(source: &Source) -> Option<&PathBuf> {
    match source {
        Source::File(path) => Some(path),
        Source::Stored(_) => None,
    }
}

/// Between the state of the files and that of the layers.
const BAD: char = '!';

impl<P> Copy<P> {
    fn new(loaded: Loaded<P>, now: Instant) -> Self {
        let mut version = loaded.stamp.version() + &loaded.companions.version();
        if !loaded.bad_layers.is_empty() {
            version.push_str(&format!("{BAD}{:x}", hash(&loaded.bad_layers)));
        }
        if !loaded.settled {
            let moment = SystemTime::now().duration_since(UNIX_EPOCH);
            version.push_str(&format!("~{:x}", moment.unwrap_or_default().as_nanos()));
        }
        Self {
            loaded,
            version,
            at: now,
            better: None,
        }
    }

    /// Of the project, what lies beside it, and which of its layers are invalid.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub fn project(&self) -> &P {
        &self.loaded.project
    }

    pub fn bad_layers(&self) -> &[String] {
        &self.loaded.bad_layers
    }

    /// When it last changed, with what lies beside it; seconds since 1970, if somebody
    /// knows.
    pub fn modified(&self) -> Option<u64> {
        let own = self.loaded.stamp.modified()?;
        Some(own.max(self.loaded.companions.modified().unwrap_or(0)))
    }

    /// The same, unless it may become another one and keep this date: layers come back
    /// without any file changing, and one of several files may be replaced by an older one.
    pub fn dated(&self) -> Option<u64> {
        let loaded = &self.loaded;
        let is_one_file = loaded.companions.are_none() && !loaded.stamp.has_companions();
        let is_so = is_one_file && loaded.bad_layers.is_empty() && loaded.settled;
        self.modified().filter(|_| is_so)
    }

    fn is_of(&self, place: &Place) -> bool {
        let Loaded {
            stamp,
            companions,
            settled,
            ..
        } = &self.loaded;
        *settled && *stamp == place.stamp && companions.are_unchanged()
    }

    /// Whether its invalid layers are looked for once more: from time to time, and when
    /// somebody else has answered with them.
    fn is_due(&self, seen: &Seen, now: Instant, every: Duration) -> bool {
        if !self.loaded.retry || self.loaded.bad_layers.is_empty() {
            return false;
        }
        let files = |version: &str| version.split(BAD).next().map(str::to_owned);
        let other = seen.version.as_deref().filter(|it| *it != self.version);
        let is_better = other.is_some_and(|it| {
            files(it) == files(&self.version) && self.better.as_deref() != Some(it)
        });
        is_better || now.saturating_duration_since(self.at) >= every
    }
}

impl Broken {
    fn is_of(&self, place: &Place, now: Instant, remembered: Duration) -> bool {
        self.stamp == place.stamp && now.saturating_duration_since(self.at) < remembered
    }
}

fn edition(place: &Place, version: &str, outdated: bool) -> Edition {
    Edition {
        place: hash(&place.source),
        version: version.to_owned(),
        outdated,
    }
}

/// The same in all workers of a program.
fn hash(of: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    hasher.finish()
}

/// The project, its data included, is at fault, and not what ran while it was read.
fn is_of_the_project(failure: Failure) -> bool {
    matches!(failure, Failure::ProjectUnreadable | Failure::BadLayers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::places::tests::at;
    use crate::places::{self, Places};
    use std::fs;
    use std::path::Path;

    const S: Duration = Duration::from_secs(1);

    type Cache = Projects<String>;

    /// A folder with `city` and `sub/town`, and what a worker has of them.
    struct Bench {
        folder: tempfile::TempDir,
        places: Places,
        projects: Cache,
        now: Instant,
        seen: Seen,
    }

    /// Who answers, with what, and whether that is what the project is.
    type Told = (String, Found, bool);

    impl Bench {
        fn new() -> Self {
            let (folder, places) = places::tests::root();
            let rules = Rules {
                size: 2,
                bytes: 1000,
                check_interval: Duration::ZERO,
                broken_for: 5 * S,
                settle: 2 * S,
                retry: 30 * S,
            };
            Self {
                folder,
                places,
                projects: Projects::new(rules),
                now: Instant::now(),
                seen: Seen::default(),
            }
        }

        fn file(&self, name: &str) -> PathBuf {
            self.folder.path().join("root").join(name)
        }

        fn write(&self, name: &str, text: &str) {
            fs::write(self.file(name), text).unwrap();
        }

        fn place(&mut self, name: &str) -> Place {
            self.places.find(&at(name), &Seen::default()).unwrap()
        }

        /// What went out is what was seen from now on.
        fn get(&mut self, name: &str) -> Result<Told, Failure> {
            let place = self.place(name);
            self.get_with(name, || read(&place))
        }

        fn get_with(
            &mut self,
            name: &str,
            load: impl FnOnce() -> Result<Loaded<String>, Failure>,
        ) -> Result<Told, Failure> {
            let place = self.place(name);
            let hit = self
                .projects
                .get(&at(name), &place, &self.seen, self.now, load)?;
            self.seen.version = Some(hit.edition.version);
            let text = self.projects.copy(&place).project().clone();
            Ok((text, hit.found, !hit.edition.outdated))
        }

        /// When a project with this text changed, and the date that clients may know it by.
        fn dates(&mut self, text: &str) -> (Option<u64>, Option<u64>) {
            self.write("city.qgs", text);
            set_modified(&self.file("city.qgs"), 10);
            self.get("city").unwrap();
            let place = self.place("city");
            let copy = self.projects.copy(&place);
            (copy.modified(), copy.dated())
        }

        fn prepare(&mut self, name: &str) -> Result<Edition, Failure> {
            let place = self.place(name);
            let load = || read(&place);
            let prepared = self.projects.prepare(&at(name), &place, self.now, load);
            prepared.map(|(edition, _)| edition)
        }
    }

    /// A text that says `broken` is no project; each comma is an invalid layer; each
    /// letter takes a byte.
    fn read(place: &Place) -> Result<Loaded<String>, Failure> {
        let text = fs::read_to_string(file(&place.source).unwrap()).unwrap();
        if text.contains("broken") {
            return Err(Failure::ProjectUnreadable);
        }
        Ok(Loaded {
            stamp: place.stamp,
            companions: Companions::of(&place.source, &[]),
            bad_layers: text.matches(',').map(str::to_owned).collect(),
            retry: true,
            bytes: text.len() as u64,
            settled: !text.contains("moving"),
            project: text,
        })
    }

    fn told(text: &str, found: Found, is_now: bool) -> Result<Told, Failure> {
        Ok((text.into(), found, is_now))
    }

    fn never() -> Result<Loaded<String>, Failure> {
        panic!("loaded again")
    }

    fn set_modified(path: &Path, seconds: u64) {
        let file = fs::File::options().write(true).open(path).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(seconds))
            .unwrap();
    }

    #[test]
    fn a_change_in_either_direction_reloads() {
        let mut bench = Bench::new();
        assert_eq!(bench.get("city"), told("one", Found::Loaded, true));
        assert_eq!(
            bench.get_with("city", never),
            told("one", Found::Cached, true)
        );
        for seconds in [5, 1] {
            set_modified(&bench.file("city.qgs"), seconds);
            assert_eq!(bench.get("city"), told("one", Found::Reloaded, true));
        }
    }

    #[test]
    fn a_change_of_a_file_that_belongs_to_it_reloads() {
        let mut bench = Bench::new();
        bench.get("city").unwrap();
        let mut versions = vec![bench.seen.version.clone()];
        for (file, text) in [
            ("city.qgd", "1"),
            ("city.qgd", "22"),
            ("city_attachments.zip", ""),
        ] {
            bench.write(file, text);
            assert_eq!(
                bench.get("city"),
                told("one", Found::Reloaded, true),
                "{file}"
            );
            assert_eq!(
                bench.get_with("city", never),
                told("one", Found::Cached, true)
            );
            assert!(!versions.contains(&bench.seen.version));
            versions.push(bench.seen.version.clone());
        }
    }

    #[test]
    fn a_project_has_a_date_for_clients_if_no_change_can_keep_it() {
        let mut bench = Bench::new();
        assert_eq!(bench.dates("whole"), (Some(10), Some(10)));
        assert_eq!(bench.dates("with one lost,"), (Some(10), None));
        assert_eq!(bench.dates("moving"), (Some(10), None));
        bench.write("city.qgd", "labels");
        set_modified(&bench.file("city.qgd"), 20);
        assert_eq!(bench.dates("with labels"), (Some(20), None));
    }

    #[test]
    fn what_changed_while_it_was_read_is_read_again() {
        let mut bench = Bench::new();
        bench.write("city.qgs", "moving");
        bench.get("city").unwrap();
        let first = bench.seen.version.clone();
        assert_eq!(bench.get("city"), told("moving", Found::Reloaded, true));
        assert_ne!(bench.seen.version, first);
    }

    #[test]
    fn within_the_interval_a_change_is_not_looked_for_unless_somebody_saw_it() {
        let mut bench = Bench::new();
        bench.projects.rules.check_interval = 10 * S;
        bench.seen.since_ms = 60_000;
        bench.get("city").unwrap();
        bench.write("city.qgs", "another");
        bench.now += 9 * S;
        assert_eq!(bench.get("city"), told("one", Found::Cached, true));
        bench.now += S;
        assert_eq!(bench.get("city"), told("another", Found::Reloaded, true));
        bench.write("city.qgs", "a third");
        bench.now += 2 * S;
        bench.seen.since_ms = 1000;
        assert_eq!(bench.get("city"), told("a third", Found::Reloaded, true));
    }

    #[test]
    fn a_broken_project_is_loaded_again_when_it_changes_or_after_a_while() {
        let mut bench = Bench::new();
        let broken = || Err(Failure::BadLayers);
        assert!(bench.get_with("city", broken).is_err());
        assert_eq!(bench.get_with("city", never), Err(Failure::BadLayers));
        bench.write("city.qgs", "mended");
        assert_eq!(bench.get("city"), told("mended", Found::Reloaded, true));

        // The file is the same; what it refers to was away.
        assert!(bench.get_with("sub/town", broken).is_err());
        bench.now += 4 * S;
        assert!(bench.get_with("sub/town", never).is_err());
        bench.now += 2 * S;
        assert_eq!(bench.get("sub/town"), told("zip", Found::Reloaded, true));
        bench.now += 60 * S;
        assert_eq!(
            bench.get_with("sub/town", never),
            told("zip", Found::Cached, true)
        );
    }

    #[test]
    fn a_failure_that_is_not_of_the_project_is_not_remembered() {
        let mut bench = Bench::new();
        for failure in [Failure::QgisFailed, Failure::PluginRaised] {
            assert_eq!(bench.get_with("city", || Err(failure)), Err(failure));
        }
        assert_eq!(bench.get("city"), told("one", Found::Loaded, true));
    }

    /// For a bounded time, and only if nobody has seen a newer one.
    #[test]
    fn while_a_file_is_half_written_the_old_copy_answers() {
        let mut bench = Bench::new();
        bench.get("city").unwrap();
        for half in ["broken", "broken longer"] {
            bench.write("city.qgs", half);
            assert_eq!(bench.get("city"), told("one", Found::Cached, false));
            assert_eq!(
                bench.get_with("city", never),
                told("one", Found::Cached, false)
            );
            bench.now += S / 2;
        }
        bench.write("city.qgs", "whole");
        assert_eq!(bench.get("city"), told("whole", Found::Reloaded, true));

        bench.write("city.qgs", "broken");
        assert_eq!(bench.get("city"), told("whole", Found::Cached, false));
        bench.now += 3 * S;
        assert_eq!(bench.get("city"), Err(Failure::ProjectUnreadable));
        assert_eq!(bench.projects.n_open(), 0);

        bench.get("sub/town").unwrap();
        bench.write("sub/town.qgz", "broken");
        bench.seen.version = Some("newer".into());
        assert_eq!(bench.get("sub/town"), Err(Failure::ProjectUnreadable));
    }

    #[test]
    fn the_old_copy_answers_until_the_server_wants_the_new_one() {
        let mut bench = Bench::new();
        bench.get("city").unwrap();
        bench.seen.stale = true;
        bench.write("city.qgs", "two");
        assert_eq!(
            bench.get_with("city", never),
            told("one", Found::Cached, false)
        );
        let next = bench.prepare("city").unwrap();
        assert_eq!(bench.prepare("city").unwrap(), next);
        assert_eq!(
            bench.get_with("city", never),
            told("one", Found::Cached, false)
        );
        assert_eq!(bench.projects.bytes(), 6);
        bench.seen.version = Some(next.version);
        assert_eq!(
            bench.get_with("city", never),
            told("two", Found::Cached, true)
        );
        assert_eq!(bench.projects.bytes(), 3);

        // Without the permission the new one answers, which is here already.
        bench.write("city.qgs", "three");
        bench.prepare("city").unwrap();
        bench.seen.stale = false;
        assert_eq!(
            bench.get_with("city", never),
            told("three", Found::Cached, true)
        );
    }

    #[test]
    fn what_cannot_be_loaded_ahead_is_not_tried_again_and_again() {
        let mut bench = Bench::new();
        bench.get("city").unwrap();
        bench.seen.stale = true;
        bench.write("city.qgs", "broken");
        let place = bench.place("city");
        let mut prepare = |later, load: fn(&Place) -> Result<Loaded<String>, Failure>| {
            let load = || load(&place);
            let now = bench.now + later;
            let prepared = bench.projects.prepare(&at("city"), &place, now, load);
            prepared.map(drop)
        };
        let broken = Err(Failure::ProjectUnreadable);
        assert_eq!(prepare(Duration::ZERO, read), broken);
        assert_eq!(prepare(4 * S, |_| never()), broken);
        assert_eq!(
            prepare(6 * S, |_| Err(Failure::QgisFailed)),
            Err(Failure::QgisFailed)
        );
        assert_eq!(
            bench.get_with("city", never),
            told("one", Found::Cached, false)
        );
        // Half written once more when the old one may not be stale any longer.
        bench.seen.stale = false;
        bench.write("city.qgs", "broken anew");
        bench.now += 6 * S;
        assert_eq!(bench.get("city"), told("one", Found::Cached, false));
        bench.write("city.qgs", "two");
        let next = bench.prepare("city").unwrap();
        bench.seen.version = Some(next.version);
        assert_eq!(
            bench.get_with("city", never),
            told("two", Found::Cached, true)
        );
    }

    #[test]
    fn a_worker_without_the_old_copy_answers_with_the_new_one() {
        let mut bench = Bench::new();
        bench.seen.stale = true;
        bench.seen.version = Some("older".into());
        assert_eq!(bench.get("city"), told("one", Found::Loaded, true));
        bench.seen.version = Some("another".into());
        bench.write("city.qgs", "two");
        assert_eq!(bench.get("city"), told("two", Found::Reloaded, true));
    }

    #[test]
    fn invalid_layers_are_tried_again_from_time_to_time_and_when_others_have_them() {
        let mut bench = Bench::new();
        let well = |place: &Place| {
            let loaded = read(place).unwrap();
            Ok(Loaded {
                bad_layers: Vec::new(),
                ..loaded
            })
        };
        for name in ["city.qgs", "sub/town.qgz"] {
            bench.write(name, "lost,");
        }
        let place = bench.place("city");
        bench.get("city").unwrap();
        let bad = bench.seen.version.clone().unwrap();
        bench.now += 29 * S;
        assert_eq!(
            bench.get_with("city", never),
            told("lost,", Found::Cached, true)
        );
        bench.now += S;
        assert_eq!(bench.get("city"), told("lost,", Found::Reloaded, true));
        assert_eq!(
            bench.get_with("city", never),
            told("lost,", Found::Cached, true)
        );
        bench.now += 30 * S;
        for failure in [Failure::ProjectUnreadable, Failure::StorageAway] {
            let trouble = || Err(failure);
            assert!(bench.get_with("city", trouble).is_ok(), "{failure:?}");
            assert!(bench.get_with("city", never).is_ok(), "not at each request");
            bench.now += 30 * S;
        }
        for failure in [Failure::QgisFailed, Failure::ProjectNotFound] {
            assert_eq!(bench.get_with("city", || Err(failure)), Err(failure));
        }
        bench.now += 30 * S;
        assert!(bench.get_with("city", || well(&place)).is_ok());
        assert_ne!(bench.seen.version.as_ref(), Some(&bad));
        bench.now += 30 * S;
        bench.get_with("city", never).unwrap();

        let town = bench.place("sub/town");
        bench.get("sub/town").unwrap();
        let better = town.stamp.version();
        bench.seen.version = Some(better.clone());
        assert_eq!(bench.get("sub/town").unwrap().1, Found::Reloaded);
        bench.seen.version = Some(better);
        assert_eq!(
            bench.get("sub/town").unwrap().1,
            Found::Cached,
            "in vain once"
        );
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_pinned_stay() {
        let mut bench = Bench::new();
        for name in ["a", "b", "c", "pinned"] {
            bench.write(&format!("{name}.qgs"), name);
        }
        bench.get("pinned").unwrap();
        bench.projects.pin(&at("pinned"));
        for (name, expected) in [
            ("a", Found::Loaded),
            ("b", Found::Loaded),
            ("a", Found::Cached),
            ("c", Found::Loaded),
            ("a", Found::Cached),
            ("b", Found::Loaded),
            ("pinned", Found::Cached),
        ] {
            assert_eq!(bench.get(name).unwrap().1, expected, "{name}");
        }
        bench.write("pinned.qgs", "changed");
        assert_eq!(bench.get("pinned"), told("changed", Found::Reloaded, true));
    }

    #[test]
    fn what_is_pinned_stays_so_when_its_file_is_made_anew_or_another_one() {
        let mut bench = Bench::new();
        let link = bench.file("now.qgs");
        for name in ["a", "b", "c", "old", "new"] {
            bench.write(&format!("{name}.qgs"), name);
        }
        std::os::unix::fs::symlink("old.qgs", &link).unwrap();
        bench.get("now").unwrap();
        bench.projects.pin(&at("now"));
        let is_kept = |bench: &mut Bench, text: &str| {
            bench.get("now").unwrap();
            for other in ["a", "b", "c"] {
                bench.get(other).unwrap();
            }
            assert_eq!(bench.get("now"), told(text, Found::Cached, true));
        };
        is_kept(&mut bench, "old");
        fs::remove_file(bench.file("old.qgs")).unwrap();
        bench.projects.sweep();
        bench.write("old.qgs", "anew");
        is_kept(&mut bench, "anew");
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink("new.qgs", &link).unwrap();
        is_kept(&mut bench, "new");
        assert_eq!(bench.projects.n_open(), 3, "and nobody keeps the old one");
    }

    #[test]
    fn what_takes_too_much_memory_goes_though_there_are_few() {
        let mut bench = Bench::new();
        bench.write("a.qgs", &"a".repeat(600));
        bench.write("b.qgs", &"b".repeat(300));
        bench.write("c.qgs", &"c".repeat(2000));
        bench.get("a").unwrap();
        bench.get("b").unwrap();
        assert_eq!((bench.projects.n_open(), bench.projects.bytes()), (2, 900));
        bench.get("sub/town").unwrap();
        bench.write("b.qgs", &"b".repeat(999));
        bench.get("b").unwrap();
        assert_eq!((bench.projects.n_open(), bench.projects.bytes()), (1, 999));
        assert!(!bench.projects.is_full());
        // More than all there is: it is alone.
        bench.get("c").unwrap();
        assert!(bench.projects.is_full());
        assert_eq!((bench.projects.n_open(), bench.projects.bytes()), (1, 2000));
    }

    #[test]
    fn what_has_no_room_beside_its_old_copy_is_not_loaded_ahead() {
        let mut bench = Bench::new();
        bench.write("city.qgs", &"a".repeat(600));
        bench.get("city").unwrap();
        bench.write("city.qgs", &"b".repeat(600));
        let place = bench.place("city");
        let refused = bench
            .projects
            .prepare(&at("city"), &place, bench.now, never);
        assert_eq!(refused.map(drop), Err(Failure::TooLarge));
        assert_eq!(bench.projects.bytes(), 600, "the old one answers");
        // The first copy of another only takes the place of what is not used.
        bench.write("sub/town.qgz", &"c".repeat(600));
        bench.prepare("sub/town").unwrap();
        assert_eq!(bench.projects.bytes(), 600);
    }

    #[test]
    fn what_is_gone_is_freed_when_somebody_asks_or_nobody_does() {
        let mut bench = Bench::new();
        bench.get("city").unwrap();
        bench.get("sub/town").unwrap();
        bench.projects.gone(&at("city"));
        assert_eq!(bench.projects.n_open(), 2, "it is there");
        fs::remove_file(bench.file("city.qgs")).unwrap();
        bench.projects.gone(&at("another"));
        assert_eq!(bench.projects.n_open(), 2);
        bench.projects.gone(&at("city"));
        assert_eq!(bench.projects.n_open(), 1);
        fs::remove_file(bench.file("sub/town.qgz")).unwrap();
        bench.projects.sweep();
        assert_eq!(bench.projects.n_open(), 0);
    }
}
