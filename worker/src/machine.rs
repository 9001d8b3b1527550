//! The memory of the machine as the kernel tells it: how much there is, who takes
//! how much of it, and whether somebody was killed for want of it.
//!
//! In a control group (a container, a unit of systemd) there is no more than its
//! limit, or its parents' limits, whatever the machine has.

use std::fs;
use std::path::{Path, PathBuf};

use nix::unistd::Pid;

use crate::pool::state::Weight;

/// Where the kernel tells.
pub struct Machine {
    proc: PathBuf,
    /// Folders of our control group and of those around it, the innermost first.
    groups: Vec<PathBuf>,
}

impl Machine {
    pub fn new() -> Self {
        Self::below(Path::new("/"))
    }

    fn below(root: &Path) -> Self {
        let proc = root.join("proc");
        let groups = groups(&proc, &root.join("sys/fs/cgroup"));
        Self { proc, groups }
    }

    /// Kilobytes that we and everybody else around us may use together.
    pub fn memory(&self) -> Option<u64> {
        let machine = field(&self.proc.join("meminfo"), "MemTotal:");
        let limits = self.groups.iter().filter_map(|group| {
            let limit = number(&group.join("memory.max"));
            limit.or_else(|| number(&group.join("memory.limit_in_bytes")))
        });
        limits.map(|bytes| bytes / 1024).chain(machine).min()
    }

    /// None if the process is gone. Costs milliseconds.
    pub fn weight(&self, pid: Pid) -> Option<Weight> {
        let rollup = self.proc.join(pid.to_string()).join("smaps_rollup");
        let text = fs::read_to_string(rollup).ok()?;
        Some(Weight {
            resident: find(&text, "Rss:")?,
            share: find(&text, "Pss:")?,
            own: find(&text, "Anonymous:")?,
        })
    }

    /// How many processes the kernel has killed for want of memory: in our control
    /// group where it says so, otherwise on the whole machine.
    pub fn n_killed(&self) -> u64 {
        let group = self.groups.first();
        let of_group = group.and_then(|group| {
            field(&group.join("memory.events"), "oom_kill ")
                .or_else(|| field(&group.join("memory.oom_control"), "oom_kill "))
        });
        of_group
            .or_else(|| field(&self.proc.join("vmstat"), "oom_kill "))
            .unwrap_or(0)
    }
}

/// The folder that `/proc/self/cgroup` names, and all above it. Where the folder is
/// not there we are in a container that sees its own group at the top.
fn groups(proc: &Path, mount: &Path) -> Vec<PathBuf> {
    let text = fs::read_to_string(proc.join("self/cgroup")).unwrap_or_default();
    let line = |wanted: &str| {
        let lines = text
            .lines()
            .filter_map(|line| line.split_once(':')?.1.split_once(':'));
        let mut lines =
            lines.filter(|(controllers, _)| controllers.split(',').any(|it| it == wanted));
        lines
            .next()
            .map(|(_, path)| path.trim_start_matches('/').to_owned())
    };
    let (mount, path) = match (line("memory"), line("")) {
        (Some(path), _) => (mount.join("memory"), path),
        (None, Some(path)) => (mount.to_owned(), path),
        (None, None) => return Vec::new(),
    };
    let folder = mount.join(path);
    let all = folder.ancestors().take_while(|it| it.starts_with(&mount));
    all.filter(|it| it.is_dir()).map(Path::to_owned).collect()
}

/// `max` is no number, and no limit.
fn number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn field(path: &Path, name: &str) -> Option<u64> {
    find(&fs::read_to_string(path).ok()?, name)
}

/// The number after `name` at the beginning of a line.
fn find(text: &str, name: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(name))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine of 1 GB with these files.
    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let root = tempfile::tempdir().unwrap();
        let meminfo = ("proc/meminfo", "MemFree: 5 kB\nMemTotal:  1048576 kB\n");
        for (path, text) in files.iter().chain([&meminfo]) {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let machine = Machine::below(root.path());
        (root, machine)
    }

    #[test]
    fn without_control_groups_there_is_what_the_machine_has() {
        let (_root, machine) = machine(&[("proc/vmstat", "x 1\noom_kill 3\n")]);
        assert_eq!((machine.memory(), machine.n_killed()), (Some(1 << 20), 3));
    }

    #[test]
    fn the_narrowest_limit_of_all_groups_around_us_holds() {
        let (_root, machine) = machine(&[
            ("proc/self/cgroup", "0::/a.slice/b.service\n"),
            ("sys/fs/cgroup/a.slice/memory.max", "104857600\n"),
            ("sys/fs/cgroup/a.slice/b.service/memory.max", "max\n"),
            (
                "sys/fs/cgroup/a.slice/b.service/memory.events",
                "oom 9\noom_kill 2\n",
            ),
        ]);
        assert_eq!((machine.memory(), machine.n_killed()), (Some(100 << 10), 2));
    }

    #[test]
    fn the_first_version_of_control_groups_is_understood() {
        let unlimited = "9223372036854771712\n";
        let (_root, machine) = machine(&[
            (
                "proc/self/cgroup",
                "5:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", unlimited),
            (
                "sys/fs/cgroup/memory/docker/1/memory.limit_in_bytes",
                "52428800\n",
            ),
            (
                "sys/fs/cgroup/memory/docker/1/memory.oom_control",
                "under_oom 0\noom_kill 7\n",
            ),
        ]);
        assert_eq!((machine.memory(), machine.n_killed()), (Some(50 << 10), 7));
    }

    /// A container may name its group as the host does and see it at the top.
    #[test]
    fn a_group_that_is_not_where_it_is_said_to_be_is_at_the_top() {
        let (_root, machine) = machine(&[
            ("proc/self/cgroup", "0::/docker/1\n"),
            ("sys/fs/cgroup/memory.max", "52428800\n"),
        ]);
        assert_eq!(machine.memory(), Some(50 << 10));
    }

    #[test]
    fn this_machine_tells_what_this_process_weighs() {
        let machine = Machine::new();
        let weight = machine.weight(nix::unistd::getpid()).unwrap();
        assert!(
            weight.share > 0 && weight.share <= weight.resident,
            "{weight:?}"
        );
        assert!(machine.memory().unwrap() > weight.resident);
        assert_eq!(machine.weight(Pid::from_raw(i32::MAX)), None);
    }
}
