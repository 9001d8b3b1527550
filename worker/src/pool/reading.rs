//! Settings that are read again, by a child: a file system may hang, and the pool may not.
//!
//! The pool has one thread and must not get another, so it forks one more process, which
//! reads, says what it read through a pipe and ends. The pool polls that pipe, and gives
//! up in time.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{ForkResult, Pid, fork, getpid, getppid, pipe2};
use qgisserver::config::Sources;

/// A child that reads settings.
pub struct Reading {
    pid: Pid,
    pipe: File,
    told: Vec<u8>,
    until: Instant,
    /// Its pid may be another's.
    pub is_reaped: bool,
}

impl Reading {
    /// Sound only while the process has one thread.
    pub fn begin(sources: &Sources, bound: Duration) -> std::io::Result<Self> {
        let (ours, theirs) = pipe2(OFlag::O_CLOEXEC)?;
        fcntl(&ours, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let parent = getpid();
        // SAFETY: the process has one thread, so the child's memory is consistent; the
        // child does not touch Python and never returns.
        match unsafe { fork()? } {
            ForkResult::Child => read(sources, theirs, parent),
            ForkResult::Parent { child } => Ok(Self {
                pid: child,
                pipe: ours.into(),
                told: Vec::new(),
                until: Instant::now() + bound,
                is_reaped: false,
            }),
        }
    }

    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// When to give up.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// Has something to read when the child said something or ended.
    pub fn pipe(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// True once the child has said everything.
    pub fn listen(&mut self) -> bool {
        match self.pipe.read_to_end(&mut self.told) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => false,
            Ok(_) | Err(_) => true,
        }
    }

    /// What it said, for [`Sources::hear`].
    pub fn told(&self) -> &[u8] {
        &self.told
    }
}

/// `reader` must not be reaped yet. On some file systems it outlives even this for a while.
pub fn give_up(reader: Pid) {
    let _ = kill(reader, Signal::SIGKILL);
}

/// The life of the child.
fn read(sources: &Sources, pipe: OwnedFd, parent: Pid) -> ! {
    // SAFETY: asks the kernel to end us with our parent, whatever ends it.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
    if getppid() == parent {
        let _ = catch_unwind(AssertUnwindSafe(|| {
            File::from(only(pipe)).write_all(&sources.tell())
        }));
    }
    // SAFETY: ends the process; all that is below us on the stack is our parent's.
    unsafe { libc::_exit(0) }
}

/// Lets go of everything else that is open: should we outlive the pool, its lock on its
/// folder must not live on with us.
fn only(pipe: OwnedFd) -> OwnedFd {
    let fd = pipe.as_raw_fd() as libc::c_uint;
    // SAFETY: what others here own is closed behind their backs; they never run again.
    unsafe {
        libc::close_range(3, fd - 1, 0);
        libc::close_range(fd + 1, libc::c_uint::MAX, 0);
    }
    pipe
}
