//! The private directory of the ipc socket: made, locked, and removed after the dead.
//!
//! `<runtime_dir>/qgisserver-<pid>-<random>`, mode 0700, with a file `lock`
//! that the living server holds with flock. What nobody holds is stale.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

const PREFIX: &str = "qgisserver-";

/// Exists as long as this value.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    _lock: File,
}

impl Directory {
    /// A new one under `parent`; those of dead servers there are removed first.
    pub fn create(parent: &Path) -> io::Result<Self> {
        remove_stale(parent);
        let random = &uuid::Uuid::new_v4().simple().to_string()[..8];
        let name = format!("{PREFIX}{}-{random}", std::process::id());
        // It gets its name when it is locked, or another server might find it stale.
        let unnamed = parent.join(format!(".{name}"));
        DirBuilder::new().mode(0o700).create(&unnamed)?;
        let lock = File::create(unnamed.join("lock"))?;
        lock.lock()?;
        let path = parent.join(name);
        fs::rename(&unnamed, &path)?;
        Ok(Self { path, _lock: lock })
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the private directory");
        }
    }
}

fn remove_stale(parent: &Path) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for path in entries
        .map(|entry| entry.path())
        .filter(|path| is_ours(path))
    {
        if is_stale(&path) && fs::remove_dir_all(&path).is_ok() {
            tracing::info!(path = %path.display(), "removed the directory of a server that died");
        }
    }
}

/// By name and owner; a link is not followed.
fn is_ours(path: &Path) -> bool {
    let named = path
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
    let uid = nix::unistd::geteuid().as_raw();
    named && fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid)
}

fn is_stale(path: &Path) -> bool {
    match File::open(path.join("lock")) {
        Ok(lock) => !matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
        Err(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_private_and_ends_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::create(parent.path()).unwrap();
        let path = directory.join("broker.sock").parent().unwrap().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        drop(directory);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_what_nobody_holds_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let living = Directory::create(parent.path()).unwrap();
        let dead = parent.path().join("qgisserver-1-dead");
        let foreign = parent.path().join("qgisserver-notes");
        for path in [&dead, &foreign] {
            fs::create_dir(path).unwrap();
        }
        File::create(dead.join("lock")).unwrap();
        let other = Directory::create(parent.path()).unwrap();
        assert!(living.path.exists() && other.path.exists());
        assert!(!dead.exists());
        assert!(foreign.exists(), "without a lock it may be anybody's");
    }
}
