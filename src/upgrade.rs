//! Another program takes our place: at SIGUSR2 it is started with our sockets, and once
//! it can serve we stop accepting connections, and end when the last running request
//! has: each has bounds of its own. SIGTERM sets them one more, as ever.
//!
//! The sockets are open all the time, in one of the two programs or in both, so nobody
//! is refused. Until the successor says that a worker of its own is warm it accepts
//! nothing; when it fails we go on as if nothing had been.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use command_fds::{CommandFdExt, FdMapping};
use nix::sys::signal::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{sleep, timeout};

use crate::pool;
use crate::sockets::{PREDECESSOR, READY, Sockets};

/// For a successor that failed to tidy up.
const PATIENCE: Duration = Duration::from_secs(5);

/// How this program was started, and how its successor will be.
#[derive(Debug, Clone)]
pub struct Program {
    path: PathBuf,
    args: Vec<OsString>,
}

impl Program {
    /// Must be called before the file may be replaced, and before anybody changes the
    /// working directory.
    pub fn of_this_process() -> io::Result<Self> {
        let args: Vec<OsString> = std::env::args_os().collect();
        let running = std::env::current_exe()?;
        let called = args.first().map(PathBuf::from).unwrap_or_default();
        // By the path that was called, which may be a link that will lead elsewhere; the
        // kernel's answer is where it led to.
        let path = found(&called).filter(|path| is_same(path, &running));
        Ok(Self {
            path: path.unwrap_or(running),
            args,
        })
    }
}

/// As a shell finds it.
fn found(called: &Path) -> Option<PathBuf> {
    if called.components().count() > 1 {
        return std::path::absolute(called).ok();
    }
    let path = std::env::var_os("PATH")?;
    let mut candidates = std::env::split_paths(&path).map(|folder| folder.join(called));
    candidates.find(|candidate| candidate.is_file())
}

fn is_same(path: &Path, running: &Path) -> bool {
    path.canonicalize().is_ok_and(|path| path == *running)
}

/// Resolves with its pid when a successor serves. `patience`: how long it may take.
pub async fn watch(program: &Program, sockets: &Sockets, patience: impl Fn() -> Duration) -> u32 {
    let mut asked = signal(SignalKind::user_defined2()).expect("SIGUSR2 can be handled");
    loop {
        asked.recv().await;
        if std::process::id() == 1 {
            // A container ends with its first process, successor or not.
            tracing::error!("SIGUSR2: the first process of a container has no successor");
            continue;
        }
        tracing::info!(program = %program.path.display(), "SIGUSR2: starting a successor");
        match succeed(program, sockets, patience()).await {
            Ok(pid) => {
                tracing::info!(pid, "the successor serves: running requests may end");
                return pid;
            }
            Err(why) => tracing::error!("{why}: this server goes on"),
        }
    }
}

async fn succeed(program: &Program, sockets: &Sockets, patience: Duration) -> Result<u32, String> {
    let (mut successor, mut pipe) = start(program, sockets)
        .map_err(|error| format!("{} does not start: {error}", program.path.display()))?;
    let mut said = Vec::new();
    let ready = async {
        let mut word = (&mut pipe).take(READY.len() as u64);
        // Without a word its end says why.
        if word.read_to_end(&mut said).await.is_err() || said != READY {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = ready => Ok(successor.release()),
        status = successor.child().wait() => {
            successor.release();
            let status = status.map_err(|error| error.to_string())?;
            let how = status.signal().map(|n| format!("signal {n}"));
            let how = how.unwrap_or_else(|| format!("status {}", status.code().unwrap_or(-1)));
            Err(format!("the successor ended with {how} before it could serve"))
        }
        () = sleep(patience) => {
            successor.end().await;
            Err(format!(
                "the successor could not serve within {:.1} s (worker.start_timeout)",
                patience.as_secs_f64()
            ))
        }
    }
}

fn start(program: &Program, sockets: &Sockets) -> io::Result<(Successor, pipe::Receiver)> {
    let (reader, writer) = io::pipe()?;
    let (names, descriptors) = sockets.to_pass_on(writer.into())?;
    let mut command = Command::new(&program.path);
    let (name, args) = program.args.split_first().expect("a program has a name");
    command
        .arg0(name)
        .args(args)
        .env("LISTEN_FDS", names.len().to_string())
        .env("LISTEN_FDNAMES", names.join(":"))
        .env(PREDECESSOR, std::process::id().to_string());
    let mappings = (3..)
        .zip(descriptors)
        .map(|(child_fd, parent_fd)| FdMapping {
            parent_fd,
            child_fd,
        });
    command
        .fd_mappings(mappings.collect())
        .map_err(io::Error::other)?;
    let child = command.spawn()?;
    // Our copy of the pipe's other end goes with `command`.
    Ok((
        Successor(Some(child)),
        pipe::Receiver::from_owned_fd(reader.into())?,
    ))
}

/// Told to end when it is dropped before its time.
struct Successor(Option<Child>);

impl Successor {
    fn child(&mut self) -> &mut Child {
        self.0.as_mut().expect("it was not released")
    }

    /// From now on it lives its own life.
    fn release(&mut self) -> u32 {
        let child = self.0.take();
        child.and_then(|child| child.id()).unwrap_or(0)
    }

    async fn end(&mut self) {
        pool::signal(self.child(), Signal::SIGTERM);
        if timeout(PATIENCE, self.child().wait()).await.is_err() {
            let _ = self.child().kill().await;
        }
        self.0 = None;
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        if let Some(child) = &self.0 {
            pool::signal(child, Signal::SIGTERM);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_is_known_by_the_path_that_was_called_as_long_as_it_leads_to_it() {
        let folder = tempfile::tempdir().unwrap();
        let (one, link) = (folder.path().join("one"), folder.path().join("link"));
        std::fs::write(&one, "").unwrap();
        std::os::unix::fs::symlink(&one, &link).unwrap();
        let one = one.canonicalize().unwrap();
        assert_eq!(found(&link), Some(link.clone()));
        assert!(is_same(&link, &one));
        assert!(!is_same(Path::new("/bin/sh"), &one));
        assert!(!is_same(&folder.path().join("none"), &one));
    }

    #[test]
    fn a_name_without_a_folder_is_looked_for_as_a_shell_does() {
        let shell = found(Path::new("sh")).expect("every system has one");
        assert!(shell.is_absolute() && shell.is_file());
        assert_eq!(found(Path::new("no-such-program-anywhere")), None);
        assert!(found(Path::new("./here")).unwrap().is_absolute());
    }

    #[tokio::test]
    async fn a_successor_that_says_something_else_is_not_believed() {
        let program = |script: &str| Program {
            path: "/bin/sh".into(),
            args: ["sh", "-c", script].map(OsString::from).into(),
        };
        let sockets = Sockets::default();
        let patience = Duration::from_secs(20);
        let good = program("printf 'READY=1\\n' >&3; exec 3>&-; sleep 0.1");
        assert!(succeed(&good, &sockets, patience).await.is_ok());
        let bad = program("printf 'READY=2\\n' >&3; exit 4");
        let why = succeed(&bad, &sockets, patience).await.unwrap_err();
        assert!(why.contains("status 4"), "{why}");
        let silent = program("exec sleep 100");
        let why = succeed(&silent, &sockets, Duration::from_millis(50)).await;
        assert!(why.unwrap_err().contains("worker.start_timeout"));
    }
}
