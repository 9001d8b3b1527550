//! What the parent can read of a worker that cannot speak any more.
//!
//! One shared page per worker: the worker writes, its parent reads when the
//! beats stop or the process is gone, to say in the log what it was doing.

use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

const TEXT_MAX: usize = 480;

/// Why a worker ends itself; the parent puts it into words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Farewell {
    None = 0,
    /// The request was overdue or cancelled and QGIS did not stop.
    Stuck = 1,
    /// A C++ exception left QGIS in doubt.
    Doubt = 2,
    /// It was told to leave.
    Told = 3,
    /// QGIS did not start; the log says why.
    NoStart = 4,
    /// A mistake of ours; the log says where.
    Panicked = 5,
}

#[repr(C)]
struct Page {
    beats: AtomicU64,
    n_served: AtomicU64,
    /// Kilobytes that a crashing process had allocated.
    crashed_with: AtomicU64,
    farewell: AtomicU32,
    /// The place in the list of the project that is opened ahead, from 1.
    preloading: AtomicU32,
    length: AtomicU32,
    text: [AtomicU8; TEXT_MAX],
}

/// A page shared by a worker and its parent.
pub struct Board {
    page: std::ptr::NonNull<Page>,
}

// SAFETY: every field of the page is atomic.
unsafe impl Send for Board {}
unsafe impl Sync for Board {}

impl Board {
    /// A new page. Made before the fork, so that both processes map it.
    pub fn new() -> nix::Result<Self> {
        let size = NonZeroUsize::new(size_of::<Page>()).expect("a page is not empty");
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a fresh anonymous mapping aliases nothing; zeros are valid atomics.
        let page = unsafe { mmap_anonymous(None, size, protection, MapFlags::MAP_SHARED)? };
        Ok(Self { page: page.cast() })
    }

    fn page(&self) -> &Page {
        // SAFETY: mapped in `new`, unmapped only in `drop`.
        unsafe { self.page.as_ref() }
    }

    pub fn beat(&self) {
        self.page().beats.fetch_add(1, Ordering::Relaxed);
    }

    pub fn beats(&self) -> u64 {
        self.page().beats.load(Ordering::Relaxed)
    }

    pub fn n_served(&self) -> u64 {
        self.page().n_served.load(Ordering::Relaxed)
    }

    /// From now on the worker serves `what`.
    pub fn begin(&self, what: &str) {
        self.write(what);
    }

    fn write(&self, what: &str) {
        let page = self.page();
        let end = (0..=TEXT_MAX.min(what.len()))
            .rev()
            .find(|&i| what.is_char_boundary(i));
        let bytes = &what.as_bytes()[..end.unwrap_or(0)];
        for (slot, byte) in page.text.iter().zip(bytes) {
            slot.store(*byte, Ordering::Relaxed);
        }
        page.length.store(bytes.len() as u32, Ordering::Release);
    }

    /// The worker is idle again.
    pub fn end(&self) {
        self.page().length.store(0, Ordering::Release);
        self.page().n_served.fetch_add(1, Ordering::Relaxed);
    }

    /// A worker that is not ready yet opens the project at this place of the list.
    pub fn preloading(&self, project: Option<(usize, &str)>) {
        let place = project.map_or(0, |(at, _)| u32::try_from(at + 1).unwrap_or(0));
        self.write(&project.map_or(String::new(), |(_, name)| {
            format!("the opening of {name} ahead")
        }));
        self.page().preloading.store(place, Ordering::Release);
    }

    /// Which one it was when the worker ended.
    pub fn preloaded(&self) -> Option<usize> {
        let place = self.page().preloading.load(Ordering::Acquire);
        (place as usize).checked_sub(1)
    }

    /// What the worker serves; None when it is idle.
    pub fn serving(&self) -> Option<String> {
        let page = self.page();
        let length = page.length.load(Ordering::Acquire) as usize;
        let bytes: Vec<u8> = page
            .text
            .iter()
            .take(length)
            .map(|byte| byte.load(Ordering::Relaxed))
            .collect();
        (length > 0).then(|| String::from_utf8_lossy(&bytes).into_owned())
    }

    /// The process is crashing, and had allocated so many kilobytes. For a signal handler.
    pub fn crash(&self, allocated: u64) {
        self.page().crashed_with.store(allocated, Ordering::Relaxed);
    }

    /// 0 if it did not crash, or could not say.
    pub fn crashed_with(&self) -> u64 {
        self.page().crashed_with.load(Ordering::Relaxed)
    }

    pub fn say_farewell(&self, why: Farewell) {
        self.page().farewell.store(why as u32, Ordering::Relaxed);
    }

    pub fn farewell(&self) -> Farewell {
        match self.page().farewell.load(Ordering::Relaxed) {
            1 => Farewell::Stuck,
            2 => Farewell::Doubt,
            3 => Farewell::Told,
            4 => Farewell::NoStart,
            5 => Farewell::Panicked,
            _ => Farewell::None,
        }
    }
}

impl Drop for Board {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nobody else in this process refers to.
        let _ = unsafe { munmap(self.page.cast(), size_of::<Page>()) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_idle_until_it_begins_and_after_it_ends() {
        let board = Board::new().unwrap();
        assert_eq!(board.serving(), None);
        board.begin("GetMap of file:city");
        assert_eq!(board.serving().as_deref(), Some("GetMap of file:city"));
        board.end();
        assert_eq!((board.serving(), board.n_served()), (None, 1));
    }

    #[test]
    fn a_long_text_is_cut_between_two_characters() {
        let board = Board::new().unwrap();
        board.begin(&"é".repeat(TEXT_MAX));
        assert_eq!(board.serving().unwrap(), "é".repeat(TEXT_MAX / 2));
    }
}
