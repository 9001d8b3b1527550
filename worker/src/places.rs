//! Where projects are: what a client's name for one leads to, and in which state it is there.
//!
//! One place per project whatever the client's spelling. What is outside of what the
//! operator allows does not exist.

use std::borrow::Cow;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use lru::LruCache;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use qgisserver::config;
use qgisserver::protocol::{CATALOG, FILE, Failure, ProjectRef, Seen};

use crate::routes::{Confined, Routes, Target};
use crate::storages::{Fetched, Storages, Trouble};

/// A project where it lies, as it was when somebody looked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Canonical: no other place has it.
    pub source: Source,
    pub stamp: Stamp,
}

impl Place {
    /// The same place in another state.
    fn at(&self, stamp: Stamp) -> Self {
        let source = self.source.clone();
        Self { source, stamp }
    }

    /// How long ago it changed; None if that is not known, or lies in the future.
    pub fn age(&self) -> Option<Duration> {
        let Stamp::File { modified_ns, .. } = self.stamp else {
            return None;
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
        let age = now.as_nanos().checked_sub(modified_ns)?;
        Some(Duration::from_nanos(age.try_into().ok()?))
    }
}

/// Where a project is read from.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Source {
    File(PathBuf),
    /// A database, an object, or what a handler of the operator's understands.
    Stored(Uri),
}

/// The name of a project in a storage. What a handler is told may have a password in it,
/// which is not shown.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Uri(pub String);

impl Uri {
    pub fn scheme(&self) -> &str {
        self.0.split(':').next().unwrap_or_default()
    }

    /// What the operator calls the project, whichever of the operator's names a client
    /// uses: its scheme, and its name or key there.
    pub fn name(&self) -> String {
        let (before, query) = self.0.split_once('?').unwrap_or((&self.0, ""));
        let named = |key: &str| {
            let value = query.split('&').find_map(|pair| pair.strip_prefix(key));
            value.map(|value| percent_decode_str(value).decode_utf8_lossy())
        };
        let key = || before.splitn(4, '/').nth(3).map(Cow::from);
        let name = match self.scheme() {
            "postgresql" => named("project="),
            "geopackage" => named("projectName="),
            "s3" => key(),
            _ => None,
        };
        match name {
            Some(name) => format!("{}:{name}", self.scheme()),
            None => self.to_string(),
        }
    }

    /// Who is asked: all projects there share one fate. Where that cannot be told, each
    /// project has its own, or a client could close a storage by asking for what it chokes on.
    fn server(&self) -> String {
        let (before, query) = self.0.split_once('?').unwrap_or((&self.0, ""));
        if self.scheme() == "postgresql" {
            let names = |pair: &&str| !pair.starts_with("project=") && !pair.starts_with("schema=");
            let connection = query.split('&').filter(names).collect::<Vec<_>>();
            return format!("{before}?{}", connection.join("&"));
        }
        let authority = before.split_once("://").map(|(_, rest)| rest);
        let authority = authority.and_then(|rest| rest.split('/').next());
        match authority.filter(|authority| !authority.is_empty()) {
            Some(authority) => format!("{}://{authority}", self.scheme()),
            None => before.to_owned(),
        }
    }
}

impl std::fmt::Display for Uri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&config::without_secrets(&self.0))
    }
}

impl std::fmt::Debug for Uri {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Stored(uri) => uri.fmt(f),
        }
    }
}

/// What tells one state of a project from another. An older one is as different as a
/// newer one: it may come from a backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stamp {
    File {
        modified_ns: u128,
        size: u64,
        device: u64,
        inode: u64,
    },
    /// What a storage calls this state, hashed, and seconds since 1970, or 0 if it does
    /// not say.
    Stored {
        tag: u64,
        modified: u64,
        /// Of several objects.
        has_companions: bool,
    },
}

impl Stamp {
    fn of(path: &Path) -> std::io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        let modified = metadata
            .modified()?
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        Ok(Self::File {
            modified_ns: modified.as_nanos(),
            size: metadata.len(),
            device: metadata.dev(),
            inode: metadata.ino(),
        })
    }

    pub fn stored(version: &str, modified: u64) -> Self {
        let mut hasher = DefaultHasher::new();
        version.hash(&mut hasher);
        Self::Stored {
            tag: hasher.finish(),
            modified,
            has_companions: false,
        }
    }

    /// The state of a project in a storage and of what lies beside it there.
    pub fn with_companions(mut self, yes: bool) -> Self {
        if let Self::Stored { has_companions, .. } = &mut self {
            *has_companions = yes;
        }
        self
    }

    pub fn has_companions(&self) -> bool {
        matches!(self, Self::Stored { has_companions, .. } if *has_companions)
    }

    /// Changes whenever the project does.
    pub fn version(&self) -> String {
        match self {
            Self::File {
                modified_ns,
                size,
                inode,
                ..
            } => format!("{modified_ns:x}-{size:x}-{inode:x}"),
            Self::Stored { tag, .. } => format!("{tag:x}"),
        }
    }

    /// Seconds since 1970; None if nobody knows.
    pub fn modified(&self) -> Option<u64> {
        let modified = match self {
            Self::File { modified_ns, .. } => (modified_ns / 1_000_000_000) as u64,
            Self::Stored { modified, .. } => *modified,
        };
        Some(modified).filter(|seconds| *seconds > 0)
    }
}

/// What stands for itself in the path of an URI.
const PATH: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'/')
    .remove(b'.')
    .remove(b'-')
    .remove(b'_');

/// Spellings that are remembered per project.
const SPELLINGS: NonZeroUsize = NonZeroUsize::new(4).expect("it is not zero");

/// Servers that are remembered to be away.
const SERVERS: NonZeroUsize = NonZeroUsize::new(64).expect("it is not zero");

/// The places that clients may name.
pub struct Places {
    routes: Routes,
    storages: Box<dyn Storages>,
    check_interval: Duration,
    /// How long a storage that does not answer is not asked again.
    away_for: Duration,
    /// Where the clients' spellings led; resolving one takes a system call per folder.
    spellings: LruCache<ProjectRef, Spelling>,
    away: LruCache<String, Instant>,
}

/// A spelling as it was resolved, and what was there then.
#[derive(Clone)]
struct Spelling {
    /// Of a file: as long as it leads to one of the same inode, nothing on the way can
    /// have made it another one.
    whole: PathBuf,
    place: Place,
    asked: Instant,
}

impl Places {
    /// Those that the settings tell of, remembered for so many projects.
    pub fn new(pool: &config::Pool, n_projects: NonZeroUsize, storages: Box<dyn Storages>) -> Self {
        Self {
            routes: Routes::new(&pool.rootdir, &pool.finding),
            storages,
            check_interval: pool.check_interval,
            away_for: pool.broken_for,
            spellings: LruCache::new(n_projects.saturating_mul(SPELLINGS)),
            away: LruCache::new(SERVERS),
        }
    }

    /// Where the project is. Not found if it does not exist or is outside of what the
    /// operator allows: the client cannot tell which. A storage is asked again when its
    /// last word is older than the last that clients have `seen` of the project.
    pub fn find(&mut self, project: &ProjectRef, seen: &Seen) -> Result<Place, Failure> {
        self.find_at(project, seen, Instant::now())
    }

    fn find_at(
        &mut self,
        project: &ProjectRef,
        seen: &Seen,
        now: Instant,
    ) -> Result<Place, Failure> {
        if let Some(known) = self.spellings.get(project) {
            let is_fresh = match &known.place.source {
                Source::File(_) => {
                    Stamp::of(&known.whole).is_ok_and(|stamp| stamp == known.place.stamp)
                }
                Source::Stored(_) => {
                    let ago = now.saturating_duration_since(known.asked);
                    seen.trusts(ago, self.check_interval)
                }
            };
            if is_fresh {
                return Ok(known.place.clone());
            }
        }
        let found = self.resolve(project, now);
        match &found {
            Ok(found) => drop(self.spellings.put(project.clone(), found.clone())),
            Err(_) => drop(self.spellings.pop(project)),
        }
        found.map(|found| found.place)
    }

    fn resolve(&mut self, project: &ProjectRef, now: Instant) -> Result<Spelling, Failure> {
        if project.alias == CATALOG {
            return self.listed(&project.path, now);
        }
        let target = self
            .routes
            .target(project)
            .ok_or(Failure::ProjectNotFound)?;
        let uris = match target {
            Target::File(file) => {
                return project_file(&file, now).ok_or(Failure::ProjectNotFound);
            }
            Target::GeoPackage { file, project } => {
                let (_, file) =
                    confined(&file, [file.path.clone()]).ok_or(Failure::ProjectNotFound)?;
                let file =
                    utf8_percent_encode(file.to_str().ok_or(Failure::ProjectNotFound)?, PATH);
                let project = utf8_percent_encode(&project, NON_ALPHANUMERIC);
                vec![Uri(format!("geopackage:{file}?projectName={project}"))]
            }
            Target::Object { bucket, key } => {
                let uri = |key: String| Uri(format!("s3://{bucket}/{key}"));
                suffixed(&key).map(uri).collect()
            }
            Target::Uri(uri) => vec![Uri(uri)],
        };
        for uri in uris {
            if let Some(stamp) = self.ask(&uri, now)? {
                let source = Source::Stored(uri);
                let place = Place { source, stamp };
                let whole = PathBuf::new();
                return Ok(Spelling {
                    whole,
                    place,
                    asked: now,
                });
            }
        }
        Err(Failure::ProjectNotFound)
    }

    /// A project in the catalogue of QGIS, which has those that the operator's folders and
    /// databases have. A link that leads out of its folder leads nowhere.
    fn listed(&mut self, id: &str, now: Instant) -> Result<Spelling, Failure> {
        let listed = self.storages.listed(id);
        let uri = Uri(listed
            .map_err(|trouble| failed(&Uri(format!("{CATALOG}:{id}")), trouble))?
            .ok_or(Failure::ProjectNotFound)?);
        let is_stored = uri.scheme() == "postgresql";
        if !self
            .routes
            .allow(if is_stored { "postgresql" } else { FILE })
        {
            return Err(Failure::ProjectNotFound);
        }
        if is_stored {
            let stamp = self.ask(&uri, now)?.ok_or(Failure::ProjectNotFound)?;
            let source = Source::Stored(uri);
            return Ok(Spelling {
                whole: PathBuf::new(),
                place: Place { source, stamp },
                asked: now,
            });
        }
        let path = PathBuf::from(uri.0);
        let folder = path.parent().ok_or(Failure::ProjectNotFound)?;
        let file = Confined {
            within: folder.into(),
            root: folder.into(),
            path: path.clone(),
        };
        found_file(&file, [path], now).ok_or(Failure::ProjectNotFound)
    }

    /// In which state the project is; None if it is not there.
    fn ask(&mut self, uri: &Uri, now: Instant) -> Result<Option<Stamp>, Failure> {
        self.asked(uri, now, |storages| storages.look(uri))
    }

    /// What a storage says. One that does not answer costs one request its time-out, and
    /// not each.
    fn asked<T>(
        &mut self,
        uri: &Uri,
        now: Instant,
        question: impl FnOnce(&mut dyn Storages) -> Result<T, Trouble>,
    ) -> Result<T, Failure> {
        let server = uri.server();
        if let Some(since) = self.away.peek(&server)
            && now.saturating_duration_since(*since) < self.away_for
        {
            return Err(Failure::StorageAway);
        }
        match question(self.storages.as_mut()) {
            Ok(answer) => {
                if self.away.pop(&server).is_some() {
                    tracing::info!(%uri, "the storage of projects answers again");
                }
                Ok(answer)
            }
            Err(trouble) => {
                if matches!(trouble, Trouble::Away(_)) {
                    self.away.put(server, Instant::now().max(now));
                }
                Err(failed(uri, trouble))
            }
        }
    }

    /// The same place as it is now, however short ago somebody looked; None if nothing is
    /// there.
    pub fn again(&mut self, place: &Place) -> Result<Option<Place>, Failure> {
        self.again_at(place, Instant::now())
    }

    fn again_at(&mut self, place: &Place, now: Instant) -> Result<Option<Place>, Failure> {
        let stamp = match &place.source {
            Source::File(path) => return Ok(Stamp::of(path).ok().map(|stamp| place.at(stamp))),
            Source::Stored(uri) => self.ask(uri, now)?,
        };
        // Who asks by another name within the interval must not go back.
        for (_, known) in self.spellings.iter_mut() {
            if let Some(stamp) = stamp
                && known.place.source == place.source
            {
                (known.place.stamp, known.asked) = (stamp, now);
            }
        }
        Ok(stamp.map(|stamp| place.at(stamp)))
    }

    /// A copy of the project on this machine, unless QGIS itself reads it where it is.
    pub fn fetch(&mut self, place: &Place) -> Result<Option<Fetched>, Failure> {
        match &place.source {
            Source::File(_) => Ok(None),
            Source::Stored(uri) => self.asked(uri, Instant::now(), |storages| storages.fetch(uri)),
        }
    }
}

fn failed(uri: &Uri, trouble: Trouble) -> Failure {
    match trouble {
        Trouble::Away(why) => {
            tracing::error!(%uri, why, "the storage of projects does not answer");
            Failure::StorageAway
        }
        Trouble::Gone => Failure::ProjectNotFound,
        Trouble::TooBig { limit } => {
            tracing::error!(%uri, limit, "the project has more bytes than any should");
            Failure::ProjectUnreadable
        }
        Trouble::Raised(trace) => {
            tracing::error!(%uri, trace, "the handler of projects raised");
            Failure::PluginRaised
        }
    }
}

/// A path that names no project is tried with the suffixes of projects.
fn suffixed(path: &str) -> impl Iterator<Item = String> {
    let all = ["", ".qgs", ".qgz"].map(|suffix| format!("{path}{suffix}"));
    all.into_iter()
        .filter(|path| path.ends_with(".qgs") || path.ends_with(".qgz"))
}

fn project_file(file: &Confined, now: Instant) -> Option<Spelling> {
    let path = file.path.to_str()?;
    found_file(file, suffixed(path).map(PathBuf::from), now)
}

fn found_file(
    file: &Confined,
    paths: impl IntoIterator<Item = PathBuf>,
    now: Instant,
) -> Option<Spelling> {
    let (whole, path) = confined(file, paths)?;
    let stamp = Stamp::of(&path).ok()?;
    let source = Source::File(path);
    let place = Place { source, stamp };
    Some(Spelling {
        whole,
        place,
        asked: now,
    })
}

/// The first of the paths that is a file where the operator allows one, and where it
/// really is.
fn confined(
    file: &Confined,
    paths: impl IntoIterator<Item = PathBuf>,
) -> Option<(PathBuf, PathBuf)> {
    let root = file.root.canonicalize().ok()?;
    if !root.starts_with(file.within.canonicalize().ok()?) {
        return None;
    }
    let really = |whole: PathBuf| whole.canonicalize().ok().map(|path| (whole, path));
    paths
        .into_iter()
        .filter_map(really)
        .find(|(_, path)| path.starts_with(&root) && path.is_file())
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::fs;
    use std::sync::{Arc, Mutex};

    use qgisserver::config::{Base, Finding};

    /// The last that clients saw of a project.
    fn long_ago() -> Seen {
        Seen {
            since_ms: u64::MAX,
            ..Seen::default()
        }
    }

    pub fn at(path: &str) -> ProjectRef {
        named("file", path)
    }

    fn named(alias: &str, path: &str) -> ProjectRef {
        ProjectRef {
            alias: alias.into(),
            path: path.into(),
        }
    }

    /// What storages say, and how often they were asked.
    #[derive(Default)]
    struct Fake {
        projects: BTreeMap<String, Result<Stamp, ()>>,
        listed: BTreeMap<String, String>,
        n_asked: usize,
    }

    impl Storages for Arc<Mutex<Fake>> {
        fn look(&mut self, uri: &Uri) -> Result<Option<Stamp>, Trouble> {
            let mut fake = self.lock().unwrap();
            fake.n_asked += 1;
            let known = fake.projects.get(&uri.0).copied().transpose();
            known.map_err(|()| Trouble::Away("as the test wished".into()))
        }

        fn fetch(&mut self, uri: &Uri) -> Result<Option<Fetched>, Trouble> {
            self.look(uri).map(|_| None)
        }

        fn listed(&mut self, id: &str) -> Result<Option<String>, Trouble> {
            Ok(self.lock().unwrap().listed.get(id).cloned())
        }
    }

    fn places_of(pool: config::Pool, storages: Arc<Mutex<Fake>>) -> Places {
        Places::new(&pool, NonZeroUsize::MIN, Box::new(storages))
    }

    fn pool(root: &Path, schemes: &[(&str, &str)], search_paths: &[(&str, &str)]) -> config::Pool {
        let base = |text: &str| Base::parse(text).unwrap();
        config::Pool {
            rootdir: root.into(),
            finding: Finding {
                allowed: vec!["*".into()],
                schemes: schemes
                    .iter()
                    .map(|(name, text)| (name.to_string(), base(text)))
                    .collect(),
                search_paths: search_paths
                    .iter()
                    .map(|(route, text)| (route.to_string(), base(text)))
                    .collect(),
                ..Finding::default()
            },
            ..config::Config::default().pool
        }
    }

    /// A root with two projects, and a third one beside it.
    pub fn root() -> (tempfile::TempDir, Places) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        fs::create_dir_all(root.join("sub")).unwrap();
        fs::write(root.join("city.qgs"), "one").unwrap();
        fs::write(root.join("sub/town.qgz"), "zip").unwrap();
        fs::write(folder.path().join("secret.qgs"), "no").unwrap();
        let places = places_of(pool(&root, &[], &[]), Arc::default());
        (folder, places)
    }

    fn path(places: &mut Places, project: &ProjectRef) -> Option<PathBuf> {
        match places.find(project, &long_ago()).ok()?.source {
            Source::File(path) => Some(path),
            Source::Stored(uri) => panic!("{uri} is no file"),
        }
    }

    #[test]
    fn every_spelling_of_a_project_is_one_file() {
        let (folder, mut places) = root();
        let whole = folder.path().join("root/city.qgs").canonicalize().unwrap();
        for spelling in [
            "city",
            "city.qgs",
            "./city",
            "sub/../city.qgs",
            whole.to_str().unwrap(),
        ] {
            let expected = (!spelling.contains("..")).then(|| whole.clone());
            assert_eq!(path(&mut places, &at(spelling)), expected, "{spelling}");
        }
        assert!(places.find(&at("sub/town"), &long_ago()).is_ok());
    }

    #[test]
    fn nothing_outside_the_root_is_found() {
        let (folder, mut places) = root();
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
            assert_eq!(
                places.find(&at(path), &long_ago()),
                Err(Failure::ProjectNotFound),
                "{path}"
            );
        }
        let unknown = places.find(&named("postgresql", "city"), &long_ago());
        assert_eq!(unknown, Err(Failure::ProjectNotFound));
    }

    /// A release switched by a symbolic link, and one that leads out.
    #[test]
    fn a_spelling_that_leads_elsewhere_is_resolved_again() {
        let (folder, mut places) = root();
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
                assert_eq!(path(&mut places, &at("current/map")), Some(expected));
            }
        }
        fs::write(folder.path().join("map.qgs"), "secret").unwrap();
        switch(folder.path());
        assert!(places.find(&at("current/map"), &long_ago()).is_err());
    }

    #[test]
    fn folders_of_the_operator_are_as_closed_as_the_root() {
        let (folder, _) = root();
        let root = folder.path().join("root").canonicalize().unwrap();
        let other = folder.path().join("home");
        fs::create_dir_all(other.join("ann/roads")).unwrap();
        fs::create_dir_all(other.join("bob")).unwrap();
        fs::write(other.join("ann/roads/map.qgs"), "ann").unwrap();
        // Bob would like to see what is outside, and what is Ann's.
        std::os::unix::fs::symlink(folder.path(), other.join("bob/out")).unwrap();
        std::os::unix::fs::symlink(&root, other.join("bob/link")).unwrap();
        let home = format!("{}/{{user}}/{{theme}}", other.display());
        let own = format!("file://{}/ann/", other.display());
        let each = format!("{}/{{path}}/roads/map.qgs", other.display());
        let pool = pool(
            &root,
            &[("own", &own), ("each", &each)],
            &[("/home/{user}/{theme}", &home)],
        );
        let mut places = places_of(pool, Arc::default());
        let map = other.canonicalize().unwrap().join("ann/roads/map.qgs");
        for project in [
            at("home/ann/roads/map"),
            named("own", "roads/map"),
            named("own", map.to_str().unwrap()),
            named("each", "ann"),
        ] {
            assert_eq!(path(&mut places, &project), Some(map.clone()), "{project}");
        }
        assert!(places.find(&at("city"), &long_ago()).is_ok());
        for project in [
            at("home/bob/out/secret"),
            at("home/bob/link/city"),
            at("home/bob/../ann/roads/map"),
            at(map.to_str().unwrap()),
            named("own", "../bob/link/city"),
            named("own", root.join("city.qgs").to_str().unwrap()),
        ] {
            assert!(places.find(&project, &long_ago()).is_err(), "{project}");
        }
    }

    #[test]
    fn a_storage_is_asked_once_per_interval_and_not_at_all_while_it_is_away() {
        let fake = Arc::new(Mutex::new(Fake::default()));
        let seconds = Duration::from_secs;
        let pool = config::Pool {
            check_interval: seconds(10),
            broken_for: seconds(5),
            ..pool(
                Path::new("/"),
                &[("pg", "postgresql://me:hush@db/?dbname=gis")],
                &[],
            )
        };
        let mut places = places_of(pool, fake.clone());
        let uri = "postgresql://me@db?dbname=gis&project=city";
        let say = |state: Option<Result<Stamp, ()>>| match state {
            Some(state) => drop(fake.lock().unwrap().projects.insert(uri.into(), state)),
            None => drop(fake.lock().unwrap().projects.remove(uri)),
        };
        let n_asked = || fake.lock().unwrap().n_asked;
        let start = Instant::now();
        let mut find =
            |later| places.find_at(&named("pg", "city"), &long_ago(), start + seconds(later));

        say(Some(Ok(Stamp::stored("a", 1))));
        let place = find(0).unwrap();
        assert_eq!(place.stamp.modified(), Some(1));
        assert_eq!(Stamp::stored("a", 0).modified(), None, "it is not 1970");
        assert!(!format!("{place:?} {}", place.source).contains("hush"));
        say(Some(Ok(Stamp::stored("b", 1))));
        assert_eq!(find(9).unwrap(), place);
        assert_ne!(find(10).unwrap().stamp.version(), place.stamp.version());
        assert_eq!(n_asked(), 2);

        say(Some(Err(())));
        assert_eq!(find(30), Err(Failure::StorageAway));
        say(None);
        assert_eq!(find(34), Err(Failure::StorageAway));
        assert_eq!(n_asked(), 3);
        assert_eq!(find(35), Err(Failure::ProjectNotFound));
        say(Some(Ok(Stamp::stored("b", 1))));
        assert!(find(35).is_ok());
    }

    /// A project that was saved while it was loaded is what it is now, by any name.
    #[test]
    fn a_second_look_at_a_storage_does_not_wait_for_the_interval() {
        let fake = Arc::new(Mutex::new(Fake::default()));
        let pool = config::Pool {
            check_interval: Duration::from_secs(10),
            ..pool(Path::new("/"), &[("s3", "s3://maps/")], &[])
        };
        let mut places = places_of(pool, fake.clone());
        let save = |tag: &str| {
            let stamp = Ok(Stamp::stored(tag, 1));
            let projects = &mut fake.lock().unwrap().projects;
            projects.insert("s3://maps/city.qgs".into(), stamp);
        };
        save("a");
        let start = Instant::now();
        let names = ["city", "city.qgs"].map(|name| named("s3", name));
        let first = names
            .each_ref()
            .map(|name| places.find_at(name, &long_ago(), start).unwrap());
        assert_eq!(first[0], first[1]);
        save("b");
        let second = places.again_at(&first[0], start).unwrap().unwrap();
        assert_ne!(second.stamp, first[0].stamp);
        for name in &names {
            assert_eq!(places.find_at(name, &long_ago(), start), Ok(second.clone()));
        }
        fake.lock().unwrap().projects.clear();
        assert_eq!(places.again_at(&second, start), Ok(None));
    }

    #[test]
    fn a_storage_that_gives_no_copy_is_away_as_if_it_had_not_answered() {
        let fake = Arc::new(Mutex::new(Fake::default()));
        let pool = pool(Path::new("/"), &[("s3", "s3://maps/")], &[]);
        let mut places = places_of(pool, fake.clone());
        let say = |state| {
            let projects = &mut fake.lock().unwrap().projects;
            projects.insert("s3://maps/city.qgs".into(), state);
        };
        say(Ok(Stamp::stored("a", 1)));
        let city = named("s3", "city");
        let place = places.find(&city, &long_ago()).unwrap();
        assert_eq!(places.fetch(&place), Ok(None));
        say(Err(()));
        assert_eq!(places.fetch(&place), Err(Failure::StorageAway));
        let n_asked = fake.lock().unwrap().n_asked;
        assert_eq!(places.fetch(&place), Err(Failure::StorageAway));
        assert_eq!(places.again(&place), Err(Failure::StorageAway));
        assert_eq!(fake.lock().unwrap().n_asked, n_asked, "once is enough");
    }

    #[test]
    fn storages_that_are_asked_apart_are_away_apart() {
        let server = |uri: &str| Uri(uri.into()).server();
        let one = server("postgresql://?service=a&schema=x&project=city");
        assert_eq!(one, server("postgresql://?service=a&schema=y&project=town"));
        assert_ne!(one, server("postgresql://?service=b&schema=x&project=city"));
        assert_eq!(server("s3://maps/a/city.qgs"), server("s3://maps/b.qgs"));
        assert_ne!(server("s3://maps/a.qgs"), server("s3://plans/a.qgs"));
        assert_ne!(
            server("geopackage:/a.gpkg?projectName=x"),
            server("geopackage:/b.gpkg?projectName=x")
        );
        assert_ne!(server("own:a"), server("own:b"));
    }

    #[test]
    fn a_project_in_a_storage_has_one_name_for_the_operator_and_no_secret_in_it() {
        for (uri, name) in [
            (
                "postgresql://me@db?dbname=gis&project=drafts%2Fa%20b",
                "postgresql:drafts/a b",
            ),
            (
                "geopackage:/maps/a.gpkg?projectName=city",
                "geopackage:city",
            ),
            ("s3://maps/drafts/city.qgz", "s3:drafts/city.qgz"),
            ("own:city", "own:city"),
            (
                "own://me:hush@db/city?password=hush",
                "own://me:***@db/city?password=***",
            ),
        ] {
            assert_eq!(Uri(uri.into()).name(), name);
        }
    }

    #[test]
    fn an_object_may_be_named_without_its_suffix() {
        let fake = Arc::new(Mutex::new(Fake::default()));
        let there = Ok(Stamp::stored("x", 1));
        fake.lock()
            .unwrap()
            .projects
            .insert("s3://maps/a/city.qgz".into(), there);
        let pool = pool(Path::new("/"), &[("s3", "s3://maps/a/")], &[]);
        let mut places = places_of(pool, fake);
        for name in ["city", "city.qgz"] {
            let place = places.find(&named("s3", name), &long_ago()).unwrap();
            assert_eq!(place.source.to_string(), "s3://maps/a/city.qgz");
        }
        assert!(places.find(&named("s3", "town"), &long_ago()).is_err());
    }
}
