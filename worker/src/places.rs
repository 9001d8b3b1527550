//! Where projects are: what a client's name for one leads to, and in which state it is there.
//!
//! One place per project whatever the client's spelling. What is outside of what the
//! operator allows does not exist.

use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::time::UNIX_EPOCH;

use lru::LruCache;
use qgisserver::protocol::ProjectRef;

/// A project where it lies, as it was when somebody looked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// Canonical: no other place has it.
    pub path: PathBuf,
    pub stamp: Stamp,
}

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

/// Spellings that are remembered per project.
const SPELLINGS: NonZeroUsize = NonZeroUsize::new(4).expect("it is not zero");

/// The places that clients may name.
pub struct Places {
    root: PathBuf,
    /// Where the clients' spellings led; resolving one takes a system call per folder.
    spellings: LruCache<String, Spelling>,
}

/// A spelling as it was resolved, and what the file was then. As long as it leads to
/// a file of the same inode, nothing on the way can have made it another one.
struct Spelling {
    whole: PathBuf,
    place: Place,
}

impl Places {
    /// Those below `root`, remembered for so many projects.
    pub fn new(root: &Path, n_projects: NonZeroUsize) -> Self {
        Self {
            root: root.to_owned(),
            spellings: LruCache::new(n_projects.saturating_mul(SPELLINGS)),
        }
    }

    /// Where the project is. None if it does not exist or is not below the root,
    /// symbolic links followed: the client cannot tell which.
    pub fn find(&mut self, project: &ProjectRef) -> Option<Place> {
        let known = self
            .spellings
            .get(&project.path)
            .filter(|_| project.alias == "file");
        if let Some(known) = known
            && Stamp::of(&known.whole).is_ok_and(|stamp| stamp == known.place.stamp)
        {
            return Some(known.place.clone());
        }
        let found = self.resolve(project)?;
        let place = found.place.clone();
        self.spellings.put(project.path.clone(), found);
        Some(place)
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
            .find(|found| found.place.path.starts_with(&root) && found.place.path.is_file())
    }
}

impl Spelling {
    fn of(whole: PathBuf) -> std::io::Result<Self> {
        let path = whole.canonicalize()?;
        let stamp = Stamp::of(&path)?;
        Ok(Self {
            whole,
            place: Place { path, stamp },
        })
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use std::fs;

    pub fn at(path: &str) -> ProjectRef {
        ProjectRef {
            alias: "file".into(),
            path: path.into(),
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
        let places = Places::new(&root, NonZeroUsize::MIN);
        (folder, places)
    }

    fn path(places: &mut Places, name: &str) -> Option<PathBuf> {
        places.find(&at(name)).map(|place| place.path)
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
            assert_eq!(path(&mut places, spelling), expected, "{spelling}");
        }
        assert!(places.find(&at("sub/town")).is_some());
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
            assert_eq!(places.find(&at(path)), None, "{path}");
        }
        assert_eq!(
            places.find(&ProjectRef {
                alias: "x".into(),
                path: "city".into()
            }),
            None
        );
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
                assert_eq!(path(&mut places, "current/map"), Some(expected));
            }
        }
        fs::write(folder.path().join("map.qgs"), "secret").unwrap();
        switch(folder.path());
        assert_eq!(places.find(&at("current/map")), None);
    }
}
