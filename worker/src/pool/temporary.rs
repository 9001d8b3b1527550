//! Temporary files of the pool: one folder, one subfolder per worker, nothing left behind.
//!
//! QGIS leaves a folder behind in every process that does not end through its
//! destructors, and ours never do. The pool's folder is locked as long as the
//! pool lives, so that the next pool can tell a dead one's folder from a living one's.

use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use nix::unistd::getpid;

const PREFIX: &str = "qgisserver-pool-";
const LOCK: &str = "lock";

/// The folder of a living pool.
pub struct Folder {
    path: PathBuf,
    n_made: u64,
    _lock: Flock<File>,
}

impl Folder {
    /// Makes the folder, after removing those of pools that died.
    pub fn new() -> nix::Result<Self> {
        let parent = std::env::temp_dir();
        remove_stale(&parent);
        Self::in_folder(&parent).map_err(|error| {
            tracing::error!(folder = %parent.display(), %error, "no place for temporary files");
            nix::errno::Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
        })
    }

    fn in_folder(parent: &Path) -> io::Result<Self> {
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let path = parent.join(format!("{PREFIX}{}-{}", getpid(), &unique[..8]));
        DirBuilder::new().mode(0o700).create(&path)?;
        let lock = File::create(path.join(LOCK))?;
        let lock =
            Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| error)?;
        Ok(Self {
            path,
            n_made: 0,
            _lock: lock,
        })
    }

    /// A fresh subfolder for a worker.
    pub fn make(&mut self, number: u32) -> io::Result<PathBuf> {
        self.n_made += 1;
        let path = self.path.join(format!("{number}-{}", self.n_made));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(path)
    }

    pub fn remove(&self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

fn remove_stale(parent: &Path) {
    let Ok(entries) = fs::read_dir(parent) else {
        return;
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let ours = path
            .file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(PREFIX));
        if ours && is_abandoned(&path) {
            tracing::info!(folder = %path.display(), "removing what a dead pool left");
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Its lock is free. A folder without a lock file may be in the making.
fn is_abandoned(path: &Path) -> bool {
    let lock = File::open(path.join(LOCK));
    lock.is_ok_and(|lock| Flock::lock(lock, FlockArg::LockExclusiveNonblock).is_ok())
}

/// The private folder of a server that was killed: its socket leads nowhere.
pub fn remove_socket_folder(endpoint: &str) {
    let Some(socket) = endpoint.strip_prefix("ipc://").map(Path::new) else {
        return;
    };
    let _ = fs::remove_file(socket);
    let Some(folder) = socket.parent() else {
        return;
    };
    let ours = folder
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("qgisserver-"));
    if ours {
        let _ = fs::remove_dir_all(folder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_folders_of_dead_pools_are_removed() {
        let parent = tempfile::tempdir().unwrap();
        let alive = Folder::in_folder(parent.path()).unwrap();
        let dead = Folder::in_folder(parent.path()).unwrap().path.clone();
        let foreign = parent.path().join("other");
        fs::create_dir(&foreign).unwrap();
        remove_stale(parent.path());
        assert!(alive.path.exists() && foreign.exists() && !dead.exists());
    }

    #[test]
    fn a_worker_gets_a_folder_that_nobody_had_before() {
        let parent = tempfile::tempdir().unwrap();
        let mut folder = Folder::in_folder(parent.path()).unwrap();
        let [first, second] = [(); 2].map(|()| folder.make(1).unwrap());
        assert_ne!(first, second);
        folder.remove();
        assert!(!folder.path.exists());
    }
}
