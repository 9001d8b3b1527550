//! Temporary files of the pool: one folder, one subfolder per worker, nothing left behind.
//!
//! QGIS leaves a folder behind in every process that does not end through its
//! destructors, and ours never do.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use qgisserver::directory::{self, Directory};

/// A killed server closes our lifeline before it lets go of its lock.
const TIME_TO_DIE: Duration = Duration::from_secs(2);

/// The folder of a living pool; removed with this value.
pub struct Folder {
    directory: Directory,
    n_made: u64,
}

impl Folder {
    /// Makes the folder, after removing those of pools that died.
    pub fn new() -> io::Result<Self> {
        Self::in_folder(&std::env::temp_dir())
    }

    fn in_folder(parent: &Path) -> io::Result<Self> {
        let directory = Directory::create(parent, directory::POOL)?;
        Ok(Self {
            directory,
            n_made: 0,
        })
    }

    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A fresh subfolder for a worker.
    pub fn make(&mut self, number: u32) -> io::Result<PathBuf> {
        self.n_made += 1;
        let path = self
            .directory
            .path()
            .join(format!("{number}-{}", self.n_made));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(path)
    }
}

/// The private directory of a server that was killed: its socket leads nowhere.
pub fn remove_socket_folder(endpoint: &str) {
    let socket = endpoint.strip_prefix("ipc://").map(Path::new);
    if let Some(folder) = socket.and_then(Path::parent) {
        directory::remove_when_stale(folder, directory::SERVER, TIME_TO_DIE);
    }
}

/// The worker is dead; so are its files.
pub fn remove(folder: &Path) {
    let _ = fs::remove_dir_all(folder);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_gets_a_folder_that_nobody_had_before() {
        let parent = tempfile::tempdir().unwrap();
        let mut folder = Folder::in_folder(parent.path()).unwrap();
        let [first, second] = [(); 2].map(|()| folder.make(1).unwrap());
        assert_ne!(first, second);
        drop(folder);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }
}
