//! The projects of one worker, kept while they do not change.
//!
//! One entry per place; least recently used goes first. A project that cannot be read
//! is remembered too, for a few seconds or until its file changes, so that it costs few
//! loads and is back when its database is.

use std::num::NonZeroUsize;
use std::time::{Duration, Instant};

use lru::LruCache;
use qgisserver::protocol::{Failure, Found};

use crate::places::{Place, Source, Stamp};

struct Entry<P> {
    stamp: Stamp,
    checked: Instant,
    loaded: Instant,
    project: Result<P, Failure>,
}

/// The cache, generic over what a loaded project is so that tests need no QGIS.
pub struct Projects<P> {
    check_interval: Duration,
    /// How long a project that does not load is remembered.
    broken_for: Duration,
    entries: LruCache<Source, Entry<P>>,
}

impl<P> Projects<P> {
    pub fn new(size: NonZeroUsize, check_interval: Duration, broken_for: Duration) -> Self {
        Self {
            check_interval,
            broken_for,
            entries: LruCache::new(size),
        }
    }

    /// How many projects are open.
    pub fn n_open(&self) -> u32 {
        let open = self
            .entries
            .iter()
            .filter(|(_, entry)| entry.project.is_ok());
        open.count() as u32
    }

    /// The project of `place`, loaded by `load` unless it is here and unchanged.
    pub fn get(
        &mut self,
        place: &Place,
        now: Instant,
        load: impl FnOnce(&Place) -> Result<P, Failure>,
    ) -> Result<(&P, Stamp, Found), Failure> {
        let found = match self.is_fresh(place, now) {
            Some(true) => Found::Cached,
            known => {
                // The old one goes first: two copies of a big project may not fit.
                self.entries.pop(&place.source);
                let start = Instant::now();
                let project = load(place);
                if let Err(failure) = &project
                    && !is_of_the_project(*failure)
                {
                    return Err(*failure);
                }
                let entry = Entry {
                    stamp: place.stamp,
                    checked: now,
                    // A load may wait for a database for longer than a failure is remembered.
                    loaded: now + start.elapsed(),
                    project,
                };
                self.entries.put(place.source.clone(), entry);
                if known.is_none() {
                    Found::Loaded
                } else {
                    Found::Reloaded
                }
            }
        };
        let entry = self
            .entries
            .get(&place.source)
            .expect("it was found or put just now");
        match &entry.project {
            Ok(project) => Ok((project, entry.stamp, found)),
            Err(failure) => Err(*failure),
        }
    }

    /// Some(fresh) of a known project, None of an unknown one.
    fn is_fresh(&mut self, place: &Place, now: Instant) -> Option<bool> {
        let entry = self.entries.get_mut(&place.source)?;
        let age = now.saturating_duration_since(entry.loaded);
        if entry.project.is_err() && age >= self.broken_for {
            return Some(false);
        }
        if now - entry.checked < self.check_interval {
            return Some(true);
        }
        entry.checked = now;
        Some(place.stamp == entry.stamp)
    }
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
    use std::time::UNIX_EPOCH;

    const S: Duration = Duration::from_secs(1);

    /// Two at a time, out of a folder with two.
    fn projects() -> (tempfile::TempDir, Places, Projects<String>) {
        let (folder, places) = places::tests::root();
        let size = NonZeroUsize::new(2).unwrap();
        (folder, places, Projects::new(size, Duration::ZERO, 5 * S))
    }

    fn read(place: &Place) -> Result<String, Failure> {
        let Source::File(path) = &place.source else {
            panic!("all of these are files");
        };
        fs::read_to_string(path).map_err(|_| Failure::ProjectUnreadable)
    }

    #[test]
    fn a_change_in_either_direction_reloads() {
        let (folder, mut places, mut projects) = projects();
        let now = Instant::now();
        let mut get = || {
            let place = places.find(&at("city")).unwrap();
            let (_, stamp, found) = projects.get(&place, now, read).unwrap();
            (found, stamp.modified())
        };
        assert_eq!(get().0, Found::Loaded);
        assert_eq!(get().0, Found::Cached);
        let path = folder.path().join("root/city.qgs");
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(UNIX_EPOCH + S).unwrap();
        assert_eq!(get(), (Found::Reloaded, 1));
    }

    #[test]
    fn within_the_interval_a_change_is_not_looked_for() {
        let (folder, mut places, mut projects) = projects();
        projects.check_interval = 10 * S;
        let now = Instant::now();
        let mut get = |later| {
            let place = places.find(&at("city")).unwrap();
            projects.get(&place, now + later, read).unwrap().0.clone()
        };
        assert_eq!(get(Duration::ZERO), "one");
        fs::write(folder.path().join("root/city.qgs"), "another").unwrap();
        assert_eq!(get(9 * S), "one");
        assert_eq!(get(10 * S), "another");
    }

    #[test]
    fn a_broken_project_is_loaded_again_when_it_changes_or_after_a_while() {
        let (folder, mut places, mut projects) = projects();
        let now = Instant::now();
        let broken = |_: &Place| Err(Failure::BadLayers);
        let never = |_: &Place| -> Result<String, Failure> { panic!("loaded again") };
        let city = places.find(&at("city")).unwrap();
        assert!(projects.get(&city, now, broken).is_err());
        let known = projects.get(&city, now, never).unwrap_err();
        assert_eq!(known, Failure::BadLayers);
        fs::write(folder.path().join("root/city.qgs"), "mended").unwrap();
        let city = places.find(&at("city")).unwrap();
        assert_eq!(projects.get(&city, now, read).unwrap().0, "mended");

        // The file is the same; what it refers to was away.
        let town = places.find(&at("sub/town")).unwrap();
        assert!(projects.get(&town, now, broken).is_err());
        assert!(projects.get(&town, now + 4 * S, never).is_err());
        assert_eq!(projects.get(&town, now + 6 * S, read).unwrap().0, "zip");
        assert_eq!(projects.get(&town, now + 60 * S, never).unwrap().0, "zip");
    }

    #[test]
    fn a_failure_that_is_not_of_the_project_is_not_remembered() {
        let (_folder, mut places, mut projects) = projects();
        let city = places.find(&at("city")).unwrap();
        let now = Instant::now();
        for failure in [Failure::QgisFailed, Failure::PluginRaised] {
            let got = projects.get(&city, now, |_| Err(failure)).map(|_| ());
            assert_eq!(got, Err(failure));
        }
        assert_eq!(projects.get(&city, now, read).unwrap().0, "one");
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let (folder, mut places, mut projects) = projects();
        for name in ["a", "b", "c"] {
            fs::write(folder.path().join(format!("root/{name}.qgs")), name).unwrap();
        }
        for (name, expected) in [
            ("a", Found::Loaded),
            ("b", Found::Loaded),
            ("a", Found::Cached),
            ("c", Found::Loaded),
            ("a", Found::Cached),
            ("b", Found::Loaded),
        ] {
            let place = places.find(&at(name)).unwrap();
            let found = projects.get(&place, Instant::now(), read).unwrap().2;
            assert_eq!(found, expected, "{name}");
        }
    }
}
