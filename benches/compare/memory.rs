//! What processes and their descendants use, from /proc.

use std::collections::BTreeMap;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Kilobytes that the process has resident.
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

fn tree(root: u32) -> Vec<u32> {
    let parents = parents();
    let mut found = vec![root];
    let mut at = 0;
    while at < found.len() {
        let parent = found[at];
        found.extend(
            parents
                .iter()
                .filter(|(_, p)| **p == parent)
                .map(|(pid, _)| pid),
        );
        at += 1;
    }
    found
}

fn parents() -> BTreeMap<u32, u32> {
    let entries = fs::read_dir("/proc").expect("/proc is mounted");
    let pids = entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    pids.filter_map(|pid| Some((pid, stat(pid, 1)? as u32)))
        .collect()
}

/// A field of /proc/PID/stat, counted from the closing parenthesis of the name,
/// which may contain anything.
fn stat(pid: u32, field: usize) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(')')?
        .1
        .split_whitespace()
        .nth(field)?
        .parse()
        .ok()
}

/// Processor time of the processes and all that descends from them, as long as it lives.
pub fn cpu(roots: &[u32]) -> Duration {
    let pids = roots.iter().copied().flat_map(tree);
    let ticks: u64 = pids
        .filter_map(|pid| Some(stat(pid, 11)? + stat(pid, 12)?))
        .sum();
    // Linux counts 100 ticks a second towards programs, whatever it does inside.
    Duration::from_millis(ticks * 10)
}

/// Looks every few milliseconds and remembers the most.
pub struct Watch {
    start: u64,
    stop: Arc<AtomicBool>,
    most: JoinHandle<u64>,
}

impl Watch {
    /// From now on, the processes and all that descend from them.
    pub fn start(roots: &[u32]) -> Self {
        let pids: Vec<u32> = roots.iter().copied().flat_map(tree).collect();
        let total = move || pids.iter().copied().map(resident).sum::<u64>();
        let start = total();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let most = std::thread::spawn(move || {
            let mut most = start;
            while !stopped.load(Ordering::Relaxed) {
                most = most.max(total());
                std::thread::sleep(Duration::from_millis(5));
            }
            most
        });
        Self { start, stop, most }
    }

    pub fn most_above_start(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.most.join().expect("reading /proc does not panic") - self.start
    }
}
