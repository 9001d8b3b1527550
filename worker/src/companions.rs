//! Files that belong to a project and lie beside it: a change of one is a change of the
//! project.
//!
//! QGIS keeps the auxiliary storage of `city.qgs` (moved labels) in `city.qgd` and its
//! attachments in `city_attachments.zip`; a `.qgz` has both inside. Layers and groups
//! may be embedded from other projects.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::places::Source;

/// The companions of a project, as they were when somebody looked.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Companions(Vec<(PathBuf, Option<Look>)>);

/// What tells one state of a file from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Look {
    modified: (i64, i64),
    size: u64,
    inode: u64,
}

impl Companions {
    /// Those of a project, if it is a file, and the projects that it embeds.
    pub fn of(project: &Source, embedded: &[PathBuf]) -> Self {
        let beside = match project {
            Source::File(path) => beside(path),
            Source::Stored(_) => None,
        };
        let beside = beside.into_iter().flatten();
        let all = beside.chain(embedded.iter().cloned());
        Self(all.map(|path| (path.clone(), look(&path))).collect())
    }

    pub fn are_unchanged(&self) -> bool {
        self.0.iter().all(|(path, was)| look(path) == *was)
    }

    pub fn are_none(&self) -> bool {
        self.there().next().is_none()
    }

    /// When the last of them changed, in seconds since 1970.
    pub fn modified(&self) -> Option<u64> {
        let seconds = |(_, look): (_, &Look)| u64::try_from(look.modified.0).ok();
        self.there().filter_map(seconds).max()
    }

    fn there(&self) -> impl Iterator<Item = (&PathBuf, &Look)> {
        let all = self.0.iter();
        all.filter_map(|(path, look)| Some((path, look.as_ref()?)))
    }

    /// Part of the project's version; empty if there are none.
    pub fn version(&self) -> String {
        let mut hasher = DefaultHasher::new();
        let there: Vec<_> = self.there().collect();
        there.hash(&mut hasher);
        match there.is_empty() {
            true => String::new(),
            false => format!("+{:x}", hasher.finish()),
        }
    }
}

fn look(path: &Path) -> Option<Look> {
    let metadata = std::fs::metadata(path).ok()?;
    Some(Look {
        modified: (metadata.mtime(), metadata.mtime_nsec()),
        size: metadata.len(),
        inode: metadata.ino(),
    })
}

fn beside(path: &Path) -> Option<Vec<PathBuf>> {
    let names = names(path.file_name()?.to_str()?);
    let files = names.into_iter().map(|name| path.with_file_name(name));
    Some(files.collect())
}

/// What QGIS looks for beside a project of this file name. It takes the name up to its
/// first or its last dot, which differs by version.
pub fn names(project: &str) -> Vec<String> {
    let Some(whole) = project.strip_suffix(".qgs") else {
        return Vec::new();
    };
    let short = whole.split('.').next().unwrap_or(whole);
    let mut stems = vec![whole, short];
    stems.dedup();
    let names = |stem| [format!("{stem}.qgd"), format!("{stem}_attachments.zip")];
    stems.into_iter().flat_map(names).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    #[test]
    fn what_lies_beside_a_project_or_is_embedded_is_part_of_its_state() {
        let folder = tempfile::tempdir().unwrap();
        let path = Source::File(folder.path().join("city.qgs"));
        let other = folder.path().join("other.qgs");
        fs::write(&other, "1").unwrap();
        let embedded = [other.clone()];
        let mut versions = vec![Companions::of(&path, &[]).version()];
        assert_eq!(versions[0], "");
        for (file, text) in [
            ("city.qgd", "1"),
            ("city_attachments.zip", "1"),
            ("city_attachments.zip", "22"),
            ("other.qgs", "22"),
        ] {
            let before = Companions::of(&path, &embedded);
            fs::write(folder.path().join(file), text).unwrap();
            assert!(!before.are_unchanged(), "{file}");
            let after = Companions::of(&path, &embedded);
            assert!(after.are_unchanged());
            versions.push(after.version());
        }
        fs::remove_file(folder.path().join("city.qgd")).unwrap();
        versions.push(Companions::of(&path, &embedded).version());
        let mut different = versions.clone();
        different.sort();
        different.dedup();
        assert_eq!(different.len(), versions.len(), "{versions:?}");
    }

    #[test]
    fn the_last_change_of_what_is_there_counts() {
        let folder = tempfile::tempdir().unwrap();
        let path = Source::File(folder.path().join("city.qgs"));
        let nothing = Companions::of(&path, &[]);
        assert!(nothing.are_none() && nothing.modified().is_none());
        for (name, seconds) in [("city.qgd", 20), ("city_attachments.zip", 10)] {
            let file = fs::File::create(folder.path().join(name)).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            file.set_modified(time).unwrap();
            let companions = Companions::of(&path, &[]);
            assert!(!companions.are_none());
            assert_eq!(companions.modified(), Some(20));
        }
    }

    #[test]
    fn a_whole_archive_has_no_companions() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("city.qgd"), "of another").unwrap();
        let companions = Companions::of(&Source::File(folder.path().join("city.qgz")), &[]);
        assert_eq!(companions, Companions::default());
    }
}
