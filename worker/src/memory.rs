//! The memory of a worker process: how it is taken, kept and given back.
//!
//! QGIS spends much of a request on allocating, two fifths of a GetFeature for
//! GeoJSON. So the worker brings jemalloc, under the names of libc's functions,
//! which makes QGIS, GDAL and Python use it, too. jemalloc keeps what was freed for
//! a while, because pages that come and go cost more than what is done with them.

use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

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
            self.kilobytes = resident_kilobytes().unwrap_or(0);
        }
        self.kilobytes
    }
}

/// The second field of `/proc/self/statm` counts pages.
fn resident_kilobytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    // SAFETY: asks for a constant.
    let page_size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    Some(pages * page_size.max(0) as u64 / 1024)
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    /// Bytes that this thread has ever taken from jemalloc.
    fn taken() -> u64 {
        let (mut taken, mut size) = (0_u64, size_of::<u64>());
        // SAFETY: the name ends with NUL, and the value has the size that is announced.
        let error = unsafe {
            tikv_jemalloc_sys::mallctl(
                c"thread.allocated".as_ptr(),
                (&raw mut taken).cast(),
                &raw mut size,
                std::ptr::null_mut(),
                0,
            )
        };
        assert_eq!(error, 0);
        taken
    }

    #[test]
    fn what_c_allocates_comes_from_jemalloc() {
        let before = taken();
        // SAFETY: strdup allocates inside libc what we free.
        unsafe {
            let copy = libc::strdup(CString::new(vec![b'x'; 1 << 20]).unwrap().as_ptr());
            libc::free(copy.cast());
        }
        // Once for the original, once for the copy.
        assert!(taken() - before >= 2 << 20);
    }

    #[test]
    fn what_was_freed_goes_back_to_the_kernel() {
        let mut blocks: Vec<_> = (0..100).map(|_| vec![1_u8; 1 << 20]).collect();
        let last = blocks.pop();
        let full = resident_kilobytes().unwrap();
        drop(blocks);
        give_back();
        let left = resident_kilobytes().unwrap();
        assert!(
            full > 100 << 10 && left < full - (90 << 10),
            "{left} of {full}"
        );
        drop(last);
    }
}
