//! The memory of a worker process: how it is taken, kept and given back.
//!
//! QGIS spends much of a request on allocating, two fifths of a GetFeature for
//! GeoJSON. So the worker brings jemalloc, under the names of libc's functions,
//! which makes QGIS, GDAL and Python use it, too. jemalloc keeps what was freed for
//! a while, because pages that come and go cost more than what is done with them.

use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::board::Board;

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What jemalloc reads before anything else runs; the variable `MALLOC_CONF` adds to it.
/// By itself it would keep the addresses of what it returns to the kernel, and they
/// count against the limit: after one large image no other would find room.
#[unsafe(export_name = "malloc_conf")]
static CONF: Conf = Conf(c"retain:false".as_ptr());

#[repr(transparent)]
struct Conf(*const libc::c_char);

// SAFETY: it points to a constant.
unsafe impl Sync for Conf {}

/// Returns to the kernel what is free, but for what threads keep at hand.
pub fn give_back() {
    // `arena.MALLCTL_ARENAS_ALL.purge` of jemalloc(3).
    let (none, nothing) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the name ends with NUL, and this control neither reads nor writes a value.
    let error = unsafe {
        tikv_jemalloc_sys::mallctl(
            c"arena.4096.purge".as_ptr(),
            none,
            std::ptr::null_mut(),
            nothing,
            0,
        )
    };
    debug_assert_eq!(error, 0, "jemalloc knows the control");
}

/// Bytes that this thread has allocated and not freed. What others free for it still
/// counts, and what it frees for others is taken off, so only a difference over some
/// work means something.
pub fn held() -> i64 {
    let read = |name| i64::try_from(counter(name)).unwrap_or(i64::MAX);
    read(c"thread.allocated") - read(c"thread.deallocated")
}

/// Of jemalloc(3), for this thread.
fn counter(name: &std::ffi::CStr) -> u64 {
    let (mut value, mut size) = (0_u64, size_of::<u64>());
    // SAFETY: the name ends with NUL, and the value has the size that is announced.
    let error = unsafe {
        tikv_jemalloc_sys::mallctl(
            name.as_ptr(),
            (&raw mut value).cast(),
            &raw mut size,
            std::ptr::null_mut(),
            0,
        )
    };
    debug_assert_eq!(error, 0, "jemalloc knows the counter");
    value
}

/// What this process may allocate.
pub fn allowed() -> u64 {
    getrlimit(Resource::RLIMIT_DATA).map_or(u64::MAX, |(soft, _)| soft)
}

/// From now on this process and its threads allocate no more than `bytes`: what goes
/// beyond fails, which QGIS and Python report, instead of taking the machine down.
pub fn limit(bytes: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_DATA)?;
    let bytes = bytes.min(hard);
    setrlimit(Resource::RLIMIT_DATA, bytes, bytes)
}

/// When the kernel has to kill somebody for want of memory, this process is the one:
/// it is replaced at once, which the server and the pool's parent are not.
pub fn volunteer() -> std::io::Result<()> {
    const FILE: &str = "/proc/self/oom_score_adj";
    let inherited: i32 = std::fs::read_to_string(FILE)?.trim().parse().unwrap_or(0);
    std::fs::write(FILE, (inherited + 500).min(1000).to_string())
}

static CRASH_BOARD: AtomicPtr<Board> = AtomicPtr::new(std::ptr::null_mut());

/// From now on a crash leaves on `board` how much this process had allocated: some
/// code ends with abort() when it gets no memory, and some writes to where nothing is.
pub fn tell_of_crashes(board: Arc<Board>) {
    // Never freed: a crash may come at any time.
    CRASH_BOARD.store(Arc::into_raw(board).cast_mut(), Ordering::Release);
    // SAFETY: the handler does only what is allowed in one. It runs once, and the
    // signal then does what it would have done without it.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = crashed as *const () as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
        for signal in [libc::SIGABRT, libc::SIGSEGV, libc::SIGBUS] {
            libc::sigaction(signal, &action, std::ptr::null_mut());
        }
    }
}

extern "C" fn crashed(signal: libc::c_int) {
    // SAFETY: null or a board that is never freed; a page of atomics.
    if let Some(board) = unsafe { CRASH_BOARD.load(Ordering::Acquire).as_ref() } {
        board.crash(statm(ALLOCATED));
    }
    // A fault is repeated by returning; a signal that was sent has to be sent again.
    // SAFETY: allowed in a handler.
    unsafe { libc::raise(signal) };
}

/// What counts against the limit.
const ALLOCATED: usize = 5;

/// What is in memory, shared pages included.
const RESIDENT: usize = 1;

/// A field of `/proc/self/statm`, which counts pages. Neither allocates nor locks, as
/// befits a signal handler; 0 if it cannot be had.
fn statm(field: usize) -> u64 {
    let mut text = [0_u8; 256];
    // SAFETY: open, read and close are allowed in a handler; the buffer is ours.
    let n = unsafe {
        let file = libc::open(
            c"/proc/self/statm".as_ptr(),
            libc::O_RDONLY | libc::O_CLOEXEC,
        );
        let n = libc::read(file, text.as_mut_ptr().cast(), text.len());
        libc::close(file);
        usize::try_from(n).unwrap_or(0)
    };
    let digits = text[..n]
        .split(|byte| *byte == b' ')
        .nth(field)
        .unwrap_or(b"");
    let digits = digits.iter().filter(|byte| byte.is_ascii_digit());
    let pages = digits.fold(0_u64, |pages, digit| pages * 10 + u64::from(digit - b'0'));
    kilobytes(pages)
}

/// Resident memory, read at most once per second: reading costs as much as a small request.
#[derive(Default)]
pub struct Resident {
    read_at: Option<Instant>,
    kilobytes: u64,
}

impl Resident {
    pub fn kilobytes(&mut self) -> u64 {
        if self
            .read_at
            .is_none_or(|at| at.elapsed() > Duration::from_secs(1))
        {
            self.read_at = Some(Instant::now());
            self.kilobytes = statm(RESIDENT);
        }
        self.kilobytes
    }
}

fn kilobytes(pages: u64) -> u64 {
    // SAFETY: asks for a constant.
    let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages * page_size.max(0) as u64 / 1024
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use nix::sys::signal::Signal;
    use nix::sys::wait::{WaitStatus, waitpid};
    use nix::unistd::ForkResult;

    use super::*;

    /// Runs `work` in a process of its own and returns how that ended.
    fn apart(work: impl FnOnce()) -> WaitStatus {
        // SAFETY: the child does nothing that another thread of the test may hold up.
        match unsafe { nix::unistd::fork() }.unwrap() {
            ForkResult::Child => {
                work();
                // SAFETY: the test's own destructors are the parent's.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => waitpid(child, None).unwrap(),
        }
    }

    #[test]
    fn beyond_the_limit_an_allocation_fails_and_the_process_goes_on() {
        let ended = apart(|| {
            limit(1 << 30).unwrap();
            let mut much = Vec::<u8>::new();
            let failed = much.try_reserve_exact(2 << 30).is_err();
            let fits = Vec::<u8>::new().try_reserve_exact(100 << 20).is_ok();
            // SAFETY: as in `apart`.
            unsafe { libc::_exit(i32::from(!(failed && fits))) }
        });
        assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
    }

    /// Many sizes, so that none fits into the place of another.
    #[test]
    fn what_was_freed_does_not_count_against_the_limit() {
        let ended = apart(|| {
            limit(1 << 30).unwrap();
            let failed = (1..40).find(|n| {
                let size = (n * 20) << 20;
                let failed = Vec::<u8>::new().try_reserve_exact(size).is_err();
                give_back();
                failed
            });
            // SAFETY: as in `apart`.
            unsafe { libc::_exit(failed.unwrap_or(0) as i32) }
        });
        assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
    }

    #[test]
    fn a_crash_leaves_word_of_how_much_was_allocated() {
        let board = Arc::new(Board::new().unwrap());
        for (signal, crash) in [
            (Signal::SIGABRT, (|| std::process::abort()) as fn()),
            (Signal::SIGSEGV, || {
                // SAFETY: it is not; the process ends here.
                unsafe { std::ptr::null_mut::<u8>().write_volatile(1) }
            }),
        ] {
            board.crash(0);
            let ended = apart(|| {
                tell_of_crashes(board.clone());
                let much = vec![1_u8; 200 << 20];
                std::hint::black_box(&much);
                crash();
            });
            assert!(
                matches!(ended, WaitStatus::Signaled(_, it, _) if it == signal),
                "{ended:?}"
            );
            assert!(board.crashed_with() > 200 << 10, "{}", board.crashed_with());
        }
    }

    #[test]
    fn what_c_allocates_comes_from_jemalloc() {
        let before = counter(c"thread.allocated");
        // SAFETY: strdup allocates inside libc what we free.
        unsafe {
            let copy = libc::strdup(CString::new(vec![b'x'; 1 << 20]).unwrap().as_ptr());
            libc::free(copy.cast());
        }
        // Once for the original, once for the copy.
        assert!(counter(c"thread.allocated") - before >= 2 << 20);
    }

    #[test]
    fn what_is_held_is_what_was_taken_and_not_freed() {
        let before = held();
        let kept = vec![1_u8; 3 << 20];
        drop(std::hint::black_box(vec![1_u8; 5 << 20]));
        let taken = held() - before;
        assert!((3 << 20..4 << 20).contains(&taken), "{taken}");
        drop(std::hint::black_box(kept));
    }

    #[test]
    fn what_was_freed_goes_back_to_the_kernel() {
        let mut blocks: Vec<_> = (0..100).map(|_| vec![1_u8; 1 << 20]).collect();
        let last = blocks.pop();
        let full = statm(RESIDENT);
        drop(blocks);
        give_back();
        let left = statm(RESIDENT);
        assert!(
            full > 100 << 10 && left < full - (90 << 10),
            "{left} of {full}"
        );
        drop(last);
    }
}
