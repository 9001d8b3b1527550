//! How long Python and QGIS may take to be imported.
//!
//! The pool's parent has one thread, which an import can hold for ever: a plugin's
//! module on a file system that does not answer, a library that waits for a lock.
//! So the kernel watches: its alarm ends the process, and whoever started it
//! starts it again.

use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::Duration;

/// The service cannot be provided (`EX_UNAVAILABLE`).
const UNAVAILABLE: i32 = 69;

/// What to say, ready to be written: a handler can neither format nor log.
static LAST_WORDS: AtomicPtr<String> = AtomicPtr::new(std::ptr::null_mut());

/// From now on the process ends when [`end`] is not called within `limit`.
pub fn begin(limit: Duration) {
    let words = format!(
        "qgisserver-worker: Python and QGIS were not imported within {limit:?}, \
         twice worker.start_timeout: giving up\n"
    );
    LAST_WORDS.store(Box::into_raw(Box::new(words)), Ordering::Release);
    // SAFETY: the handler does only what is allowed in one.
    unsafe { libc::signal(libc::SIGALRM, expired as *const () as libc::sighandler_t) };
    set_alarm(limit);
}

/// The imports are done.
pub fn end() {
    set_alarm(Duration::ZERO);
    // SAFETY: back to what it was.
    unsafe { libc::signal(libc::SIGALRM, libc::SIG_DFL) };
}

/// Zero: none.
fn set_alarm(after: Duration) {
    let timer = libc::itimerval {
        it_interval: libc::timeval {
            tv_sec: 0,
            tv_usec: 0,
        },
        it_value: libc::timeval {
            tv_sec: after.as_secs().try_into().unwrap_or(libc::time_t::MAX),
            tv_usec: after.subsec_micros().into(),
        },
    };
    // SAFETY: the timer is a valid one, and the old one is not asked for.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
}

extern "C" fn expired(_signal: libc::c_int) {
    let mut stderr = libc::pollfd {
        fd: libc::STDERR_FILENO,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: null or a text that is never freed; poll, write and _exit are allowed in a
    // handler.
    unsafe {
        if let Some(words) = LAST_WORDS.load(Ordering::Acquire).as_ref()
            // Nobody may read it, and then a write would wait for ever.
            && libc::poll(&mut stderr, 1, 0) == 1
        {
            libc::write(libc::STDERR_FILENO, words.as_ptr().cast(), words.len());
        }
        libc::_exit(UNAVAILABLE)
    }
}
