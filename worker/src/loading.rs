//! How a project is read: at a moment when nobody writes it, as far as that can be told,
//! and with what the operator says about invalid layers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use qgisserver::config::{self, OnBadLayers};
use qgisserver::protocol::{Failure, ProjectRef};

use crate::companions::Companions;
use crate::memory;
use crate::places::{Place, Places, Source};
use crate::projects::Loaded;
use crate::qgis::{Project, Qgis};

/// A file that changed less than this ago may change once more without looking
/// different: the kernel's clock of files ticks a hundred times per second or more.
const TICK: Duration = Duration::from_millis(20);

/// Between two looks at a file that is half written.
const LOOK: Duration = Duration::from_millis(20);

/// A project that changes while it is read is read again, so many times in all.
const TRIES: usize = 3;

/// Names of invalid layers that are told, and bytes of each.
const NAMES_MAX: usize = 20;
const NAME_MAX: usize = 200;

/// What loading goes by, and what it found.
pub struct Loading {
    rootdir: PathBuf,
    settle: Duration,
    bad_layers: config::BadLayers,
    /// Of projects that were refused for them, until somebody is told.
    refused_for: Vec<String>,
}

impl Loading {
    pub fn new(pool: &config::Pool) -> Self {
        Self {
            rootdir: pool.rootdir.clone(),
            settle: pool.settle,
            bad_layers: pool.bad_layers.clone(),
            refused_for: Vec::new(),
        }
    }

    /// Reads the project. `Err` has been logged.
    pub fn load(
        &mut self,
        qgis: &mut Qgis,
        places: &mut Places,
        name: &ProjectRef,
        place: &Place,
    ) -> Result<Loaded<Project>, Failure> {
        let mut n_tries = 0;
        loop {
            n_tries += 1;
            let place = still(places, place)?;
            let beside = Companions::of(&place.source, &[]);
            let loaded = self.read(qgis, places, name, &place)?;
            let is_same = places.again(&place)?.as_ref() == Some(&place) && beside.are_unchanged();
            if is_same || n_tries == TRIES {
                return Ok(Loaded {
                    settled: is_same,
                    ..loaded
                });
            }
            tracing::debug!(project = %name, "it changed while it was read");
        }
    }

    fn read(
        &mut self,
        qgis: &mut Qgis,
        places: &mut Places,
        name: &ProjectRef,
        place: &Place,
    ) -> Result<Loaded<Project>, Failure> {
        // What went just now is not taken off what comes.
        qgis.bury();
        let (start, before) = (Instant::now(), memory::held());
        let policy = self.bad_layers.of(&self.known_as(place));
        let copy = places.fetch(place)?;
        let strict = policy == OnBadLayers::Strict;
        let read = qgis.load(
            &place.source,
            copy.as_ref().map(|copy| copy.0.as_path()),
            strict,
        );
        let read = read.map_err(|unread| {
            self.refused_for = first(&unread.bad_layers);
            unread.failure
        })?;
        let bytes = u64::try_from(memory::held() - before).unwrap_or(0);
        let ms = start.elapsed().as_millis();
        let bad_layers = read.bad_layers;
        tracing::info!(project = %name, ms, kb = bytes >> 10, ?bad_layers, "project loaded");
        Ok(Loaded {
            project: read.project,
            stamp: place.stamp,
            companions: Companions::of(&place.source, &read.embedded),
            bad_layers,
            retry: policy == OnBadLayers::Retry,
            bytes,
            settled: true,
        })
    }

    /// Whether the project may be readable in a moment, because somebody writes it. It
    /// comes back after a part of that moment. `waited`: in all, for this request.
    pub fn may_settle(&self, place: &Place, waited: Duration) -> bool {
        let is_young = place.age().is_some_and(|age| age < self.settle);
        let may = is_young && waited < self.settle;
        if may {
            std::thread::sleep(LOOK);
        }
        may
    }

    /// The layers for which a project was refused just now.
    pub fn take_bad_layers(&mut self) -> Vec<String> {
        std::mem::take(&mut self.refused_for)
    }

    /// The name in settings, one whatever the client's spelling: they share a copy.
    pub fn known_as(&self, place: &Place) -> String {
        let path = match &place.source {
            Source::File(path) => path,
            Source::Stored(uri) => return uri.name(),
        };
        let root = self.rootdir.canonicalize().unwrap_or_default();
        let path = path.strip_prefix(root).unwrap_or(path);
        path.display().to_string()
    }
}

/// The place as it is when it did not change for a tick, or after a few of them.
fn still(places: &mut Places, place: &Place) -> Result<Place, Failure> {
    let mut look = || places.again(place)?.ok_or(Failure::ProjectNotFound);
    for _ in 0..TRIES {
        let now = look()?;
        match now.age() {
            Some(age) if age < TICK => std::thread::sleep(TICK - age),
            _ => return Ok(now),
        }
    }
    look()
}

/// As many names as a message should have.
pub fn first(names: &[String]) -> Vec<String> {
    let short = |name: &String| name.chars().take(NAME_MAX).collect();
    names.iter().take(NAMES_MAX).map(short).collect()
}
