//! The projects of one worker: found under the root, kept while they do not change.
//!
//! One entry per file whatever the client's spelling; least recently used goes
//! first. A project that cannot be read is remembered too, for a few seconds or until
//! its file changes, so that it costs few loads and is back when its database is.

use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant, UNIX_EPOCH};

use lru::LruCache;
use qgisserver::protocol::{Failure, Found, ProjectRef};

/// What tells one state of a project file from another. An older file is as
/// different as a newer one: it may come from a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    modified_ns: u128,
    size: u64,
    device: u64,
    inode: u64,
}

impl Stamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        let modified = metadata
            .modified()?
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok(Self {
            modified_ns: modified.as_nanos(),
            size: metadata.len(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    /// Changes whenever the project does.
    pub fn version(&self) -> String {
        format!("{:x}-{:x}-{:x}", self.modified_ns, self.size, self.inode)
    }

    /// Seconds since 1970.
    pub fn modified(&self) -> u64 {
        (self.modified_ns / 1_000_000_000) as u64
    }
}

struct Entry<P> {
    stamp: Stamp,
    checked: Instant,
    loaded: Instant,
    project: Result<P, Failure>,
}

/// The cache, generic over what a loaded project is so that tests need no QGIS.
pub struct Projects<P> {
    root: PathBuf,
    check_interval: Duration,
    /// How long a project that does not load is remembered.
    broken_for: Duration,
    entries: LruCache<PathBuf, Entry<P>>,
    /// Where the clients' spellings led; resolving one takes a system call per folder.
    spellings: LruCache<String, Spelling>,
}

/// A spelling as it was resolved, and what the file was then. As long as it leads to
/// a file of the same inode, nothing on the way can have made it another one.
struct Spelling {
    whole: PathBuf,
    canonical: PathBuf,
    stamp: Stamp,
}

/// Spellings that are remembered per project.
const SPELLINGS: usize = 4;

impl<P> Projects<P> {
    pub fn new(root: &Path, size: usize, check_interval: Duration, broken_for: Duration) -> Self {
        let size = NonZeroUsize::new(size).unwrap_or(NonZeroUsize::MIN);
        Self {
            root: root.to_owned(),
            check_interval,
            broken_for,
            entries: LruCache::new(size),
            spellings: LruCache::new(size.saturating_mul(NonZeroUsize::new(SPELLINGS).expect("4"))),
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

    /// The canonical path of the project's file. None if it does not exist or is
    /// not below the root, symbolic links followed: the client cannot tell which.
    pub fn find(&mut self, project: &ProjectRef) -> Option<PathBuf> {
        let known = self
            .spellings
            .get(&project.path)
            .filter(|_| project.alias == "file");
        if let Some(known) = known
            && Stamp::of(&known.whole).is_ok_and(|stamp| stamp == known.stamp)
        {
            return Some(known.canonical.clone());
        }
        let found = self.resolve(project)?;
        let canonical = found.canonical.clone();
        self.spellings.put(project.path.clone(), found);
        Some(canonical)
    }

    fn resolve(&self, project: &ProjectRef) -> Option<Spelling> {
        let path = Path::new(&project.path);
        let climbs = path
            .components()
            .any(|part| matches!(part, Component::ParentDir));
        if project.alias != "file" || climbs || project.path.contains('\0') {
            return None;
        }
        let root = self.root.canonicalize().ok()?;
        // An absolute path replaces the root here, and has to lie below it all the same.
        let whole = root.join(path);
        let suffixed = |suffix: &str| PathBuf::from(format!("{}{suffix}", whole.display()));
        let is_project = |path: &Path| path.extension().is_some_and(|s| s == "qgs" || s == "qgz");
        [whole.clone(), suffixed(".qgs"), suffixed(".qgz")]
            .into_iter()
            .filter(|path| is_project(path))
            .filter_map(|whole| Spelling::of(whole).ok())
            .find(|found| found.canonical.starts_with(&root) && found.canonical.is_file())
    }

    /// The project in `path`, loaded by `load` unless it is here and unchanged.
    pub fn get(
        &mut self,
        path: &Path,
        now: Instant,
        load: impl FnOnce(&Path) -> Result<P, Failure>,
    ) -> Result<(&P, Stamp, Found), Failure> {
        let found = match self.is_fresh(path, now)? {
            Some(true) => Found::Cached,
            known => {
                let stamp = Stamp::of(path).map_err(|_| Failure::ProjectNotFound)?;
                // The old one goes first: two copies of a big project may not fit.
                self.entries.pop(path);
                let start = Instant::now();
                let project = load(path);
                if let Err(failure) = &project
                    && !is_of_the_project(*failure)
                {
                    return Err(*failure);
                }
                let entry = Entry {
                    stamp,
                    checked: now,
                    // A load may wait for a database for longer than a failure is remembered.
                    loaded: now + start.elapsed(),
                    project,
                };
                self.entries.put(path.to_owned(), entry);
                if known.is_none() {
                    Found::Loaded
                } else {
                    Found::Reloaded
                }
            }
        };
        let entry = self
            .entries
            .get(path)
            .expect("it was found or put just now");
        match &entry.project {
            Ok(project) => Ok((project, entry.stamp, found)),
            Err(failure) => Err(*failure),
        }
    }

    /// Some(fresh) of a known project, None of an unknown one.
    fn is_fresh(&mut self, path: &Path, now: Instant) -> Result<Option<bool>, Failure> {
        let Some(entry) = self.entries.get_mut(path) else {
            return Ok(None);
        };
        let age = now.saturating_duration_since(entry.loaded);
        if entry.project.is_err() && age >= self.broken_for {
            return Ok(Some(false));
        }
        if now - entry.checked < self.check_interval {
            return Ok(Some(true));
        }
        entry.checked = now;
        match Stamp::of(path) {
            Ok(stamp) => Ok(Some(stamp == entry.stamp)),
            Err(_) => {
                self.entries.pop(path);
                Err(Failure::ProjectNotFound)
            }
        }
    }
}

impl Spelling {
    fn of(whole: PathBuf) -> std::io::Result<Self> {
        let canonical = whole.canonicalize()?;
        let stamp = Stamp::of(&canonical)?;
        Ok(Self {
            whole,
            canonical,
            stamp,
        })
    }
}

/// The project, its data included, is at fault, and not what ran while it was read.
fn is_of_the_project(failure: Failure) -> bool {
    matches!(failure, Failure::ProjectUnreadable | Failure::BadLayers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn at(path: &str) -> ProjectRef {
        ProjectRef {
            alias: "file".into(),
            path: path.into(),
        }
    }

    fn root() -> (tempfile::TempDir, Projects<String>) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("city.qgs"), "one").unwrap();
        fs::write(root.join("sub/town.qgz"), "zip").unwrap();
        fs::write(folder.path().join("secret.qgs"), "no").unwrap();
        let projects = Projects::new(&root, 2, Duration::ZERO, Duration::from_secs(5));
        (folder, projects)
    }

    fn read(path: &Path) -> Result<String, Failure> {
        fs::read_to_string(path).map_err(|_| Failure::ProjectUnreadable)
    }

    #[test]
    fn every_spelling_of_a_project_is_one_file() {
        let (folder, mut projects) = root();
        let whole = folder.path().join("root/city.qgs").canonicalize().unwrap();
        for spelling in [
            "city",
            "city.qgs",
            "./city",
            "sub/../city.qgs",
            whole.to_str().unwrap(),
        ] {
            let expected = (!spelling.contains("..")).then(|| whole.clone());
            assert_eq!(projects.find(&at(spelling)), expected, "{spelling}");
        }
        assert!(projects.find(&at("sub/town")).is_some());
    }

    #[test]
    fn nothing_outside_the_root_is_found() {
        let (folder, mut projects) = root();
        let secret = folder.path().join("secret.qgs");
        std::os::unix::fs::symlink(&secret, folder.path().join("root/link.qgs")).unwrap();
        for path in [
            "../secret",
            "../secret.qgs",
            secret.to_str().unwrap(),
            "link",
            "link.qgs",
            "",
            "/",
            "sub",
            "city\0",
        ] {
            assert_eq!(projects.find(&at(path)), None, "{path}");
        }
        assert_eq!(
            projects.find(&ProjectRef {
                alias: "x".into(),
                path: "city".into()
            }),
            None
        );
    }

    /// A release switched by a symbolic link, and one that leads out.
    #[test]
    fn a_spelling_that_leads_elsewhere_is_resolved_again() {
        let (folder, mut projects) = root();
        let root = folder.path().join("root");
        for name in ["one", "two"] {
            fs::create_dir(root.join(name)).unwrap();
            fs::write(root.join(name).join("map.qgs"), name).unwrap();
        }
        let current = root.join("current");
        let switch = |to: &Path| {
            let _ = fs::remove_file(&current);
            std::os::unix::fs::symlink(to, &current).unwrap();
        };
        let canonical = root.canonicalize().unwrap();
        for name in ["one", "two", "one"] {
            switch(&root.join(name));
            for _ in 0..2 {
                let expected = canonical.join(name).join("map.qgs");
                assert_eq!(projects.find(&at("current/map")), Some(expected));
            }
        }
        fs::write(folder.path().join("map.qgs"), "secret").unwrap();
        switch(folder.path());
        assert_eq!(projects.find(&at("current/map")), None);
    }

    #[test]
    fn a_change_in_either_direction_reloads() {
        let (folder, mut projects) = root();
        let path = folder.path().join("root/city.qgs");
        let now = Instant::now();
        assert_eq!(projects.get(&path, now, read).unwrap().2, Found::Loaded);
        assert_eq!(projects.get(&path, now, read).unwrap().2, Found::Cached);
        let file = fs::File::options().write(true).open(&path).unwrap();
        file.set_modified(UNIX_EPOCH + Duration::from_secs(1))
            .unwrap();
        let (_, stamp, found) = projects.get(&path, now, read).unwrap();
        assert_eq!((found, stamp.modified()), (Found::Reloaded, 1));
    }

    #[test]
    fn within_the_interval_the_file_is_not_looked_at() {
        let (folder, mut projects) = root();
        projects.check_interval = Duration::from_secs(10);
        let path = folder.path().join("root/city.qgs");
        let now = Instant::now();
        projects.get(&path, now, read).unwrap();
        fs::remove_file(&path).unwrap();
        let later = now + Duration::from_secs(9);
        assert_eq!(projects.get(&path, later, read).unwrap().2, Found::Cached);
        let later = now + Duration::from_secs(10);
        assert_eq!(
            projects.get(&path, later, read).unwrap_err(),
            Failure::ProjectNotFound
        );
    }

    #[test]
    fn a_broken_project_is_loaded_again_when_it_changes_or_after_a_while() {
        let (folder, mut projects) = root();
        let path = folder.path().join("root/city.qgs");
        let now = Instant::now();
        let broken = |_: &Path| Err(Failure::BadLayers);
        let never = |_: &Path| -> Result<String, Failure> { panic!("loaded again") };
        assert_eq!(
            projects.get(&path, now, broken).unwrap_err(),
            Failure::BadLayers
        );
        assert_eq!(
            projects.get(&path, now, never).unwrap_err(),
            Failure::BadLayers
        );
        fs::write(&path, "mended").unwrap();
        assert_eq!(projects.get(&path, now, read).unwrap().0, "mended");

        // The file is the same; what it refers to was away.
        let path = folder.path().join("root/sub/town.qgz");
        assert!(projects.get(&path, now, broken).is_err());
        let later = |seconds| now + Duration::from_secs(seconds);
        assert!(projects.get(&path, later(4), never).is_err());
        assert_eq!(projects.get(&path, later(6), read).unwrap().0, "zip");
        assert_eq!(projects.get(&path, later(60), never).unwrap().0, "zip");
    }

    #[test]
    fn a_failure_that_is_not_of_the_project_is_not_remembered() {
        let (folder, mut projects) = root();
        let path = folder.path().join("root/city.qgs");
        let now = Instant::now();
        for failure in [Failure::QgisFailed, Failure::PluginRaised] {
            let got = projects.get(&path, now, |_| Err(failure)).map(|_| ());
            assert_eq!(got, Err(failure));
        }
        assert_eq!(projects.get(&path, now, read).unwrap().0, "one");
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let (folder, mut projects) = root();
        let now = Instant::now();
        let path = |name: &str| {
            let path = folder.path().join("root").join(name);
            fs::write(&path, name).unwrap();
            path
        };
        let [a, b, c] = ["a.qgs", "b.qgs", "c.qgs"].map(path);
        for (path, expected) in [
            (&a, Found::Loaded),
            (&b, Found::Loaded),
            (&a, Found::Cached),
            (&c, Found::Loaded),
            (&a, Found::Cached),
            (&b, Found::Loaded),
        ] {
            assert_eq!(
                projects.get(path, now, read).unwrap().2,
                expected,
                "{path:?}"
            );
        }
    }
}
