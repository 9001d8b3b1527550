//! Private directories for what dies with a process: made, locked, and removed after the dead.
//!
//! `<parent>/<prefix>-<pid>-<random>`, mode 0700, with a file `lock` that the
//! living process holds with flock. What nobody holds is stale.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Prefix of the directories of servers: their ipc sockets.
pub const SERVER: &str = "qgisserver";

/// Prefix of the directories of pools: temporary files of their workers.
pub const POOL: &str = "qgisserver-pool";

/// A process that needs longer to lock what it made is dead.
const TIME_TO_LOCK: Duration = Duration::from_secs(60);

/// Exists as long as this value.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    _lock: File,
}

impl Directory {
    /// A new one under `parent`; those of dead processes there, with the same
    /// prefix, are removed first.
    pub fn create(parent: &Path, prefix: &str) -> io::Result<Self> {
        remove_stale(parent, prefix);
        let random = &uuid::Uuid::new_v4().simple().to_string()[..8];
        let name = format!("{prefix}-{}-{random}", std::process::id());
        // It gets its name when it is locked, or another process might find it stale.
        let unnamed = parent.join(format!(".{name}"));
        DirBuilder::new().mode(0o700).create(&unnamed)?;
        let lock = File::create(unnamed.join("lock"))?;
        lock.lock()?;
        let path = parent.join(name);
        fs::rename(&unnamed, &path)?;
        Ok(Self { path, _lock: lock })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the private directory");
        }
    }
}

/// Removes the directory at `path` if it is one of ours with `prefix`, and its process is dead.
fn remove_if_stale(path: &Path, prefix: &str) {
    if is_ours(path, prefix) && is_stale(path) && fs::remove_dir_all(path).is_ok() {
        tracing::info!(path = %path.display(), "removed what a process left that died");
    }
}

/// The same, where the process may be about to die.
pub fn remove_when_stale(path: &Path, prefix: &str, patience: Duration) {
    let end = Instant::now() + patience;
    remove_if_stale(path, prefix);
    while is_ours(path, prefix) && Instant::now() < end {
        // The end of a process cannot be waited for by anybody but its parent.
        std::thread::sleep(Duration::from_millis(5));
        remove_if_stale(path, prefix);
    }
}

/// Removes what process `pid` had under `parent`; it died, and who holds its lock still
/// is about to die, too.
pub fn remove_of(pid: u32, parent: &Path, prefix: &str, patience: Duration) {
    let own = format!("{prefix}-{pid}-");
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.trim_start_matches('.').starts_with(&own) {
            remove_when_stale(&entry.path(), prefix, patience);
        }
    }
}

fn remove_stale(parent: &Path, prefix: &str) {
    let entries = fs::read_dir(parent).into_iter().flatten().flatten();
    for entry in entries {
        remove_if_stale(&entry.path(), prefix);
    }
}

/// By name and owner; a link is not followed.
fn is_ours(path: &Path, prefix: &str) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_prefix('.').unwrap_or(&name);
    let rest = name
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('-'));
    let named = rest
        .and_then(|rest| rest.split_once('-'))
        .is_some_and(|(pid, random)| {
            pid.bytes().all(|byte| byte.is_ascii_digit())
                && random.len() == 8
                && random.bytes().all(|byte| byte.is_ascii_hexdigit())
        });
    let uid = nix::unistd::geteuid().as_raw();
    named && fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir() && meta.uid() == uid)
}

fn is_stale(path: &Path) -> bool {
    let lock = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOFOLLOW)
        .open(path.join("lock"));
    match lock {
        Ok(lock) => !matches!(lock.try_lock(), Err(TryLockError::WouldBlock)),
        Err(_) => is_old(path),
    }
}

fn is_old(path: &Path) -> bool {
    let made = fs::metadata(path).and_then(|meta| meta.modified());
    made.is_ok_and(|made| made.elapsed().is_ok_and(|age| age > TIME_TO_LOCK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_is_private_and_ends_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let directory = Directory::create(parent.path(), "qgisserver").unwrap();
        let path = directory.path().to_owned();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o700);
        drop(directory);
        assert_eq!(fs::read_dir(parent.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_what_nobody_holds_is_removed() {
        let parent = tempfile::tempdir().unwrap();
        let living = Directory::create(parent.path(), "qgisserver").unwrap();
        let make = |name: &str, lock: bool, age: Duration| {
            let path = parent.path().join(name);
            fs::create_dir(&path).unwrap();
            if lock {
                File::create(path.join("lock")).unwrap();
            }
            let made = std::time::SystemTime::now() - age;
            File::open(&path).unwrap().set_modified(made).unwrap();
            path
        };
        let (new, old) = (Duration::ZERO, 2 * TIME_TO_LOCK);
        let gone = [
            make("qgisserver-1-0123abcd", true, new),
            make(".qgisserver-1-0123abcd", true, new),
            make(".qgisserver-2-0123abcd", false, old),
        ];
        let kept = [
            make(".qgisserver-3-0123abcd", false, new),
            make("qgisserver-notes", false, old),
            make("qgisserver-1-notmine!", true, old),
            make("qgisserver-pool-1-0123abcd", true, old),
        ];
        let other = Directory::create(parent.path(), "qgisserver").unwrap();
        assert!(living.path.exists() && other.path.exists());
        assert!(gone.iter().all(|path| !path.exists()), "{gone:?}");
        assert!(kept.iter().all(|path| path.exists()), "{kept:?}");
    }

    /// A pipe called `lock` would hold up whoever opens it.
    #[test]
    fn what_somebody_else_put_there_holds_up_nobody() {
        let parent = tempfile::tempdir().unwrap();
        let trap = parent.path().join("qgisserver-1-0123abcd");
        fs::create_dir(&trap).unwrap();
        nix::unistd::mkfifo(&trap.join("lock"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        Directory::create(parent.path(), "qgisserver").unwrap();
    }
}
