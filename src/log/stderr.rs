//! Standard error, for which nobody waits long.
//!
//! Whoever reads our log may stall: a pipe is full, a journal hangs. No request may wait
//! for that, so lines that nobody takes are dropped and counted, and how many they were
//! is said as soon as somebody reads again.
//!
//! | who | writes |
//! |---|---|
//! | a program as it starts, and the pool for ever | itself, and waits [`PATIENCE`] for a reader; not again before there was one |
//! | the server, once it is about to serve | into memory, up to [`ROOM`], and a thread of its own writes it |
//!
//! The pool has no such thread because it forks, and a fork copies none.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, MsgFlags};
use nix::sys::stat::{SFlag, fstat};
use nix::unistd;

/// For the first line that nobody takes.
const PATIENCE: Duration = Duration::from_millis(100);

/// Bytes of lines that wait for the thread.
const ROOM: usize = 4 << 20;

/// After a line there may be more in a moment: they are written together, and who says
/// them has nobody to wake.
const NAP: Duration = Duration::from_millis(10);

/// A pipe takes so many bytes at once or none of them, so that lines of several
/// processes do not mix.
const WHOLE: usize = libc::PIPE_BUF;

/// What lines are written to.
struct Out {
    fd: OwnedFd,
    kind: Kind,
    /// A write would wait.
    waits: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pipe,
    Socket,
    Other,
}

impl Out {
    fn new(fd: OwnedFd) -> Self {
        let kind = match kind_of(&fd) {
            SFlag::S_IFIFO => Kind::Pipe,
            SFlag::S_IFSOCK => Kind::Socket,
            _ => Kind::Other,
        };
        let flags = fcntl(&fd, FcntlArg::F_GETFL).unwrap_or(0);
        Self {
            waits: kind != Kind::Socket && flags & libc::O_NONBLOCK == 0,
            fd,
            kind,
        }
    }

    /// Standard error, which stays as it is for everybody else who writes there, such as
    /// plugins: a flag belongs to what was opened, and all have opened the same.
    fn stderr() -> Self {
        let shared = io::stderr();
        let own = match kind_of(&shared) {
            SFlag::S_IFIFO | SFlag::S_IFCHR => {
                let mut own = OpenOptions::new();
                let own = own.custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
                own.write(true).open("/proc/self/fd/2").ok()
            }
            // Opened once more, a file would be overwritten.
            _ => None,
        };
        let own = own.map(OwnedFd::from);
        let dup = || shared.as_fd().try_clone_to_owned();
        // A program of Rust begins with three open descriptors.
        Self::new(own.unwrap_or_else(|| dup().expect("standard error is open")))
    }

    /// How much of `bytes` was taken before `end`; without one, the reader has all the
    /// time in the world.
    fn write(&self, bytes: &[u8], end: Option<Instant>) -> usize {
        let mut rest = bytes;
        while !rest.is_empty() {
            // Not asked in vain: a socket that takes more is not ready before it is emptier.
            if self.waits && !self.is_ready(end) {
                break;
            }
            match self.put(piece(rest)) {
                Ok(n) => rest = &rest[n..],
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) if self.is_ready(end) => {}
                Err(_) => break,
            }
        }
        bytes.len() - rest.len()
    }

    /// Waits for that until `end`.
    fn is_ready(&self, end: Option<Instant>) -> bool {
        loop {
            let left = end.map(|end| end.saturating_duration_since(Instant::now()));
            let left = left.map(|left| left.try_into().unwrap_or(PollTimeout::MAX));
            let left = left.unwrap_or(PollTimeout::NONE);
            match poll(
                &mut [PollFd::new(self.fd.as_fd(), PollFlags::POLLOUT)],
                left,
            ) {
                Err(Errno::EINTR) => {}
                ready => return ready.is_ok_and(|n| n > 0),
            }
        }
    }

    /// What is taken at once.
    fn put(&self, piece: &[u8]) -> nix::Result<usize> {
        match self.kind {
            Kind::Socket => {
                let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
                socket::send(self.fd.as_raw_fd(), piece, flags)
            }
            // There is room for that much, or poll(2) had not said so.
            Kind::Pipe => unistd::write(&self.fd, &piece[..piece.len().min(WHOLE)]),
            Kind::Other => unistd::write(&self.fd, piece),
        }
    }
}

fn kind_of(fd: impl AsFd) -> SFlag {
    let mode = fstat(fd).map_or(0, |facts| facts.st_mode);
    SFlag::from_bits_truncate(mode) & SFlag::S_IFMT
}

/// Where lines go.
pub struct Outlet {
    out: Out,
    /// Says how many lines were lost.
    confession: fn(u64) -> String,
    lines: Mutex<Lines>,
    /// There is something for the thread to do.
    filled: Condvar,
    /// It did it.
    emptied: Condvar,
    /// Lines, since we last said so, and ever.
    lost: AtomicU64,
    lost_ever: AtomicU64,
}

#[derive(Default)]
struct Lines {
    /// A thread writes.
    aside: bool,
    /// For the thread.
    waiting: Vec<u8>,
    /// It has some that are not out yet.
    writing: bool,
    /// It sleeps until it is woken.
    asleep: bool,
    /// Nobody took the last line.
    stalled: bool,
    /// Only its beginning was taken.
    torn: bool,
}

impl Outlet {
    pub fn stderr(confession: fn(u64) -> String) -> Self {
        Self::new(Out::stderr(), confession)
    }

    fn new(out: Out, confession: fn(u64) -> String) -> Self {
        Self {
            out,
            confession,
            lines: Mutex::default(),
            filled: Condvar::new(),
            emptied: Condvar::new(),
            lost: AtomicU64::new(0),
            lost_ever: AtomicU64::new(0),
        }
    }

    /// Writes one line, or loses it.
    pub fn say(&self, line: &[u8]) {
        let Some(mut lines) = self.try_lock() else {
            return self.lose(1);
        };
        if !lines.aside {
            let mut write = |line: &[u8]| lines.write(&self.out, line);
            return match write(line) {
                true => self.confess(write),
                false => self.lose(1),
            };
        }
        if lines.waiting.len() + line.len() > ROOM {
            return self.lose(1);
        }
        lines.waiting.extend_from_slice(line);
        if mem::take(&mut lines.asleep) {
            self.filled.notify_one();
        }
    }

    /// Lines that nobody took, ever.
    pub fn n_lost(&self) -> u64 {
        self.lost_ever.load(Ordering::Relaxed)
    }

    /// Waits until everything is out, but not for longer than `bound`.
    pub fn flush(&self, bound: Duration) {
        drop(self.emptied(bound));
    }

    /// The lines when everything is out, or after `bound`.
    fn emptied(&self, bound: Duration) -> Option<MutexGuard<'_, Lines>> {
        let is_busy = |lines: &mut Lines| lines.writing || !lines.waiting.is_empty();
        let lines = self.try_lock()?;
        let waited = self.emptied.wait_timeout_while(lines, bound, is_busy);
        let (lines, _) = waited.unwrap_or_else(PoisonError::into_inner);
        Some(lines)
    }

    /// What was lost before a fork is for the parent to say, and a child finds out by
    /// itself who reads. The end of a torn line is missing for both.
    pub fn forked(&self) {
        self.lost.store(0, Ordering::Relaxed);
        self.lost_ever.store(0, Ordering::Relaxed);
        self.lock().stalled = false;
    }

    fn lose(&self, n: u64) {
        self.lost.fetch_add(n, Ordering::Relaxed);
        self.lost_ever.fetch_add(n, Ordering::Relaxed);
    }

    /// What to say of lines that were lost, if `say` can say it now.
    fn confess(&self, say: impl FnOnce(&[u8]) -> bool) {
        let n = self.lost.swap(0, Ordering::Relaxed);
        if n > 0 && !say((self.confession)(n).as_bytes()) {
            self.lost.fetch_add(n, Ordering::Relaxed);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Lines> {
        // A panic in the middle of a line leaves no more than half a line.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`lock`](Self::lock), but who panics does not wait for ever: it may have panicked
    /// in here, and would wait for itself.
    fn try_lock(&self) -> Option<MutexGuard<'_, Lines>> {
        if !thread::panicking() {
            return Some(self.lock());
        }
        let end = Instant::now() + PATIENCE;
        loop {
            match self.lines.try_lock() {
                Ok(lines) => return Some(lines),
                Err(TryLockError::Poisoned(lines)) => return Some(lines.into_inner()),
                Err(TryLockError::WouldBlock) if Instant::now() >= end => return None,
                // A mutex cannot be waited for with a bound.
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Gives the lines to a thread from now on, until what is returned goes.
    pub fn aside(self: &Arc<Self>) -> io::Result<Aside> {
        let own = self.clone();
        let thread = thread::Builder::new().name("log".into());
        thread.spawn(move || own.write_for_ever())?;
        self.lock().aside = true;
        Ok(Aside(self.clone()))
    }

    fn write_for_ever(&self) {
        let mut batch = Vec::new();
        let mut torn = self.lock().torn;
        loop {
            let nothing = |lines: &mut Lines| {
                lines.asleep = lines.waiting.is_empty();
                lines.asleep
            };
            let waited = self.filled.wait_while(self.lock(), nothing);
            let mut lines = waited.unwrap_or_else(PoisonError::into_inner);
            mem::swap(&mut lines.waiting, &mut batch);
            lines.writing = true;
            drop(lines);
            let mut write =
                |lines: &[u8]| write_after(&mut torn, lines, |it| self.out.write(it, None));
            let written = write(&batch);
            match written == batch.len() {
                true => self.confess(|line| write(line) == line.len()),
                // Its reader has gone for good, or its disk is full for now.
                false => self.lose(n_lines(&batch[written..])),
            }
            batch.clear();
            batch.shrink_to(WHOLE);
            let mut lines = self.lock();
            (lines.writing, lines.torn) = (false, torn);
            drop(lines);
            self.emptied.notify_all();
            // Not to be woken for each of the lines that come meanwhile.
            thread::sleep(NAP);
        }
    }
}

/// As long as it lives, a thread writes the log. The last lines get out before it is gone.
pub struct Aside(Arc<Outlet>);

impl Drop for Aside {
    fn drop(&mut self) {
        // Before anybody else says a line, or that would be for a thread that is given up.
        if let Some(mut lines) = self.0.emptied(super::LAST_LINES) {
            lines.aside = false;
        }
    }
}

impl Lines {
    /// False if nobody takes `line`.
    fn write(&mut self, out: &Out, line: &[u8]) -> bool {
        let patience = match self.stalled {
            true => Duration::ZERO,
            false => PATIENCE,
        };
        let end = Some(Instant::now() + patience);
        let written = write_after(&mut self.torn, line, |it| out.write(it, end));
        self.stalled = written < line.len();
        !self.stalled
    }
}

/// How much of `lines` was taken. Where the last one was `torn`, its end comes first.
fn write_after(torn: &mut bool, lines: &[u8], mut write: impl FnMut(&[u8]) -> usize) -> usize {
    if *torn && write(b"\n") == 0 {
        return 0;
    }
    let written = write(lines);
    *torn = written < lines.len() && !matches!(lines[..written], [] | [.., b'\n']);
    written
}

/// As many lines as are written at once, or the first alone.
fn piece(lines: &[u8]) -> &[u8] {
    let end_of = |bytes: &[u8]| memchr::memrchr(b'\n', bytes).map(|at| at + 1);
    let within = end_of(&lines[..lines.len().min(WHOLE)]);
    let first = || memchr::memchr(b'\n', lines).map(|at| at + 1);
    &lines[..within.or_else(first).unwrap_or(lines.len())]
}

fn n_lines(bytes: &[u8]) -> u64 {
    memchr::memchr_iter(b'\n', bytes).count() as u64
}

/// One line at a time for an outlet, as `tracing` writes them.
pub struct Pen(pub Arc<Outlet>);

impl Write for Pen {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.0.say(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use nix::fcntl::OFlag;
    use nix::unistd::pipe2;
    use std::fs::File;
    use std::io::Read;

    use super::*;

    /// Nothing here takes longer unless it hangs.
    const BOUND: Duration = Duration::from_secs(10);

    fn outlet() -> (Arc<Outlet>, File) {
        let (reader, writer) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC).unwrap();
        (
            Arc::new(Outlet::new(Out::new(writer), confession)),
            reader.into(),
        )
    }

    fn confession(n: u64) -> String {
        format!("lost {n}\n")
    }

    fn line(n: usize) -> Vec<u8> {
        format!("{n:>99}\n").into_bytes()
    }

    /// All that is in the pipe now.
    fn read_all(mut from: &File) -> String {
        let mut text = Vec::new();
        // It ends with the news that a read would have to wait.
        let _ = from.read_to_end(&mut text);
        String::from_utf8(text).unwrap()
    }

    #[test]
    fn nobody_waits_twice_for_a_reader_that_stalls_and_what_is_lost_is_told_to_it_later() {
        let (outlet, reader) = outlet();
        let began = Instant::now();
        (0..2000).for_each(|n| outlet.say(&line(n)));
        assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
        let n_taken = n_lines(read_all(&reader).as_bytes());
        assert!(n_taken > 100, "the pipe had room for more than {n_taken}");
        assert_eq!(outlet.n_lost(), 2000 - n_taken);
        outlet.say(b"back\n");
        outlet.say(b"all well\n");
        let told = format!("back\nlost {}\nall well\n", 2000 - n_taken);
        assert_eq!(read_all(&reader), told);
    }

    /// Where somebody else may not open it once more.
    #[test]
    fn a_pipe_that_would_be_waited_for_is_not_written_to_before_it_has_room() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).unwrap();
        let outlet = Outlet::new(Out::new(writer), confession);
        let began = Instant::now();
        (0..2000).for_each(|n| outlet.say(&line(n)));
        assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
        assert!((1..1900).contains(&outlet.n_lost()), "{}", outlet.n_lost());
        drop(reader);
    }

    /// As systemd's journal is one.
    #[test]
    fn a_socket_that_nobody_reads_is_not_waited_for_though_it_would_have_it_so() {
        let (reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        let outlet = Outlet::new(Out::new(writer.into()), confession);
        let began = Instant::now();
        (0..20_000).for_each(|n| outlet.say(&line(n)));
        assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
        reader.set_nonblocking(true).unwrap();
        let n_taken = n_lines(read_all(&File::from(OwnedFd::from(reader))).as_bytes());
        assert!(n_taken > 100, "the socket had room for more than {n_taken}");
        assert_eq!(outlet.n_lost(), 20_000 - n_taken);
    }

    #[test]
    fn a_line_that_was_torn_does_not_run_into_the_next_one() {
        let (outlet, reader) = outlet();
        let mut long = vec![b'x'; 1 << 20];
        long.push(b'\n');
        outlet.say(&long);
        assert_eq!(outlet.n_lost(), 1);
        assert!(!read_all(&reader).contains('\n'));
        outlet.say(b"next\n");
        assert_eq!(read_all(&reader), "\nnext\nlost 1\n");
    }

    /// As on a disk that is full for a while.
    #[test]
    fn what_could_not_be_written_to_its_end_gets_one_before_the_next_line() {
        let (mut torn, mut disk) = (false, Vec::new());
        let mut write = |lines: &[u8], room: usize| {
            let mut room = room;
            write_after(&mut torn, lines, |bytes| {
                let n = bytes.len().min(room);
                room -= n;
                disk.extend_from_slice(&bytes[..n]);
                n
            })
        };
        assert_eq!(write(b"one\ntwo\n", 6), 6);
        assert_eq!(write(b"lost\n", 0), 0);
        assert_eq!(write(b"lost, too\n", 1), 0);
        assert_eq!(write(b"three\nfour\n", 6), 6);
        assert_eq!(write(b"five\n", 9), 5);
        assert_eq!(disk, b"one\ntw\nthree\nfive\n");
    }

    #[test]
    fn a_child_confesses_only_what_it_lost_itself() {
        let (outlet, reader) = outlet();
        (0..2000).for_each(|n| outlet.say(&line(n)));
        assert!(outlet.n_lost() > 0);
        outlet.forked();
        read_all(&reader);
        outlet.say(b"born\n");
        assert_eq!((read_all(&reader).as_str(), outlet.n_lost()), ("born\n", 0));
    }

    #[test]
    fn who_panics_while_it_writes_a_line_does_not_wait_for_itself_to_log_that() {
        struct Hook(Arc<Outlet>);
        impl Drop for Hook {
            fn drop(&mut self) {
                self.0.say(b"it panicked\n");
                self.0.flush(BOUND);
            }
        }
        let (outlet, reader) = outlet();
        let own = outlet.clone();
        let panicking = thread::spawn(move || {
            let _lines = own.lock();
            let _hook = Hook(own.clone());
            panic!("a test of ours");
        });
        let end = Instant::now() + BOUND;
        while !panicking.is_finished() {
            assert!(Instant::now() < end, "it waits for itself");
            thread::yield_now();
        }
        assert_eq!(outlet.n_lost(), 1);
        outlet.say(b"the others go on\n");
        assert!(read_all(&reader).starts_with("the others go on\n"));
    }

    #[test]
    fn with_a_thread_nobody_waits_at_all_and_what_there_is_room_for_comes_out_later() {
        let (outlet, reader) = outlet();
        let aside = outlet.aside().unwrap();
        let n_fit = ROOM / 100;
        (0..n_fit).for_each(|n| outlet.say(&line(n)));
        assert_eq!(outlet.n_lost(), 0);
        // What the thread has and what the pipe holds is no more than twice that.
        (n_fit..4 * n_fit).for_each(|n| outlet.say(&line(n)));
        assert!(outlet.n_lost() >= n_fit as u64);
        // What was lost is said between them, as soon as that can be.
        let (mut taken, mut told) = (Vec::<usize>::new(), 0);
        let (mut text, end) = (String::new(), Instant::now() + BOUND);
        while (taken.len() as u64 + told, told) != (4 * n_fit as u64, outlet.n_lost()) {
            assert!(Instant::now() < end, "{} came, {told} told", taken.len());
            text += &read_all(&reader);
            let whole = text.rfind('\n').map_or(0, |at| at + 1);
            for line in text.drain(..whole).collect::<String>().lines() {
                match line.strip_prefix("lost ") {
                    Some(n) => told += n.parse::<u64>().unwrap(),
                    None => taken.push(line.trim().parse().unwrap()),
                }
            }
        }
        assert!(taken.is_sorted() && taken[..n_fit].iter().copied().eq(0..n_fit));
        drop(aside);
    }

    #[test]
    fn the_last_lines_are_out_before_the_thread_is_given_up() {
        let (outlet, reader) = outlet();
        let aside = outlet.aside().unwrap();
        outlet.say(b"last but one\n");
        drop(aside);
        outlet.say(b"last\n");
        assert_eq!(read_all(&reader), "last but one\nlast\n");
    }

    #[test]
    fn at_the_end_a_reader_that_stalls_is_not_waited_for_for_ever() {
        let (outlet, _reader) = outlet();
        let aside = outlet.aside().unwrap();
        (0..10_000).for_each(|n| outlet.say(&line(n)));
        let began = Instant::now();
        drop(aside);
        assert!(began.elapsed() < BOUND);
    }

    #[test]
    fn lines_are_written_whole_as_many_as_fit_at_once() {
        assert_eq!(piece(b"a\nb\n"), b"a\nb\n");
        let many = line(1).repeat(100);
        assert_eq!(piece(&many).len(), 4000);
        let long = [vec![b'x'; 5000], b"\nshort\n".to_vec()].concat();
        assert_eq!(piece(&long).len(), 5001);
        assert_eq!(piece(b"no end"), b"no end");
    }
}
