//! A program under test: its log, its end, and what it may not leave behind.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use tempfile::TempDir;

use super::{SOON, poll};

/// A child with a session and a temporary directory of its own.
pub struct Process {
    child: Child,
    status: Option<ExitStatus>,
    pub log: Log,
    tmp: Arc<TempDir>,
    name: String,
    /// By the test.
    was_killed: bool,
}

impl Process {
    pub fn spawn(
        program: &Path,
        args: &[String],
        tmp: Arc<TempDir>,
        env: Vec<(String, String)>,
    ) -> Self {
        let mut command = Command::new(program);
        if let Some((_, folder)) = env.iter().find(|(name, _)| name == "PWD") {
            command.current_dir(folder);
        }
        command.args(args).env_clear().envs(env);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        // SAFETY: both are async-signal-safe and touch no memory of ours.
        unsafe { command.pre_exec(|| Ok(detach()?)) };
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{}: {error}", program.display()));
        let name = program.file_name().unwrap().to_string_lossy().into_owned();
        let log = Log::read(child.stderr.take().unwrap());
        Self {
            child,
            status: None,
            log,
            tmp,
            name,
            was_killed: false,
        }
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: Signal) {
        super::kill(self.pid(), signal);
    }

    /// How it ended; panics if it goes on for longer than `bound`.
    pub fn wait(&mut self, bound: Duration) -> ExitStatus {
        let status = poll(bound, || self.try_wait());
        status.unwrap_or_else(|| panic!("{} still runs after {bound:?}", self.name))
    }

    pub fn try_wait(&mut self) -> Option<ExitStatus> {
        self.status = self.status.or_else(|| self.child.try_wait().unwrap());
        self.status
    }

    /// SIGTERM, and everything is gone.
    pub fn stop(&mut self) -> ExitStatus {
        if self.try_wait().is_none() {
            self.signal(Signal::SIGTERM);
        }
        let status = self.wait(SOON);
        self.assert_nothing_left();
        status
    }

    /// SIGKILL: it tidies nothing. Its temporary directory may be given to another.
    pub fn kill(&mut self) -> Arc<TempDir> {
        self.signal(Signal::SIGKILL);
        self.wait(SOON);
        self.was_killed = true;
        self.tmp.clone()
    }

    /// No process of its session lives, and its temporary directory is empty. If it was
    /// killed, others have to notice first, and its files are for its successor.
    pub fn assert_nothing_left(&self) {
        let (patience, files): (_, &dyn Fn() -> Vec<String>) = match self.was_killed {
            true => (SOON, &Vec::new),
            false => (Duration::from_secs(2), &|| self.files()),
        };
        let is_alone = || (self.family().is_empty() && files().is_empty()).then_some(());
        poll(patience, is_alone).unwrap_or_else(|| {
            let (name, processes, files) = (&self.name, self.family(), files());
            panic!("{name} left processes {processes:?} and files {files:?}")
        });
    }

    /// Pids and names of all living processes that stem from this one, itself excluded.
    pub fn family(&self) -> BTreeMap<i32, String> {
        let is_ours = |process: &Stat| process.session == self.pid();
        let all = processes()
            .into_iter()
            .filter(|process| process.pid != self.pid() && is_ours(process));
        all.map(|process| (process.pid, process.name)).collect()
    }

    /// Its temporary directory.
    pub fn tmp(&self) -> &Path {
        self.tmp.path()
    }

    pub fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.tmp.path()).unwrap().flatten();
        entries
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .collect()
    }

    /// Memory of the program and everything that stems from it, in kilobytes: what
    /// they allocated, not libraries, whose share depends on who else runs.
    pub fn memory_kb(&self) -> u64 {
        self.family()
            .keys()
            .copied()
            .chain([self.pid()])
            .map(memory_kb)
            .sum()
    }
}

/// What a helper of a test said, which had to succeed.
pub fn succeed(command: &mut Command) -> Output {
    let done = command.output().unwrap();
    let told = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?}: {told}");
    done
}

/// A program that can be run at once. Were it written here, a child that another test starts
/// meanwhile would have it open, too, until it is a program of its own; and what is open for
/// writing cannot be run.
pub fn install(program: &Path, to: &Path) {
    succeed(Command::new("cp").args([program, to]));
}

/// The same of a script for a shell.
pub fn install_script(script: &str, to: &Path) {
    use std::os::unix::fs::PermissionsExt;
    let text = to.with_extension("text");
    std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&text, std::fs::Permissions::from_mode(0o755)).unwrap();
    install(&text, to);
    std::fs::remove_file(text).unwrap();
}

/// A session of its own, which does not outlive the test, even if that is killed.
fn detach() -> nix::Result<()> {
    nix::unistd::setsid()?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "--- log of {} ---\n{}---",
                self.name,
                self.log.interesting()
            );
            let family = self.family();
            let _ = self.child.kill();
            let _ = self.child.wait();
            for pid in family.into_keys() {
                let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
            return;
        }
        self.stop();
    }
}

struct Stat {
    pid: i32,
    name: String,
    session: i32,
}

/// All processes that are not zombies.
fn processes() -> Vec<Stat> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter_map(stat).collect()
}

/// proc(5): `pid (comm) state ppid pgrp session …`; comm may contain anything.
fn stat(pid: i32) -> Option<Stat> {
    let text = String::from_utf8_lossy(&read(pid, "stat")).into_owned();
    let (before, after) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = after.split(' ').collect();
    let is_dead = matches!(*fields.first()?, "Z" | "X");
    let name = before.split_once('(')?.1.to_owned();
    (!is_dead).then_some(Stat {
        pid,
        name,
        session: fields.get(3)?.parse().ok()?,
    })
}

fn read(pid: i32, file: &str) -> Vec<u8> {
    std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default()
}

fn memory_kb(pid: i32) -> u64 {
    let text = String::from_utf8_lossy(&read(pid, "smaps_rollup")).into_owned();
    let line = text.lines().find(|line| line.starts_with("Pss_Anon:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

pub fn parent(pid: i32) -> i32 {
    try_parent(pid).expect("a living process")
}

/// None when the process is gone.
pub fn try_parent(pid: i32) -> Option<i32> {
    let text = String::from_utf8_lossy(&read(pid, "status")).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok()
}

/// The user whom a process runs as; None when it is gone.
pub fn user_of(pid: i32) -> Option<u32> {
    let text = String::from_utf8_lossy(&read(pid, "status")).into_owned();
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    line.split_whitespace().next()?.parse().ok()
}

/// Processor time that it has used so far.
pub fn cpu_time(pid: i32) -> Duration {
    let text = String::from_utf8_lossy(&read(pid, "stat")).into_owned();
    let (_, fields) = text.rsplit_once(") ").expect("a living process");
    let fields: Vec<&str> = fields.split(' ').collect();
    // proc(5): utime and stime, in hundredths of a second.
    let ticks: u64 = fields[11..13]
        .iter()
        .map(|it| it.parse::<u64>().unwrap())
        .sum();
    Duration::from_millis(ticks * 10)
}

pub fn n_threads(pid: i32) -> usize {
    threads(pid).len()
}

/// What the threads of a process are called.
pub fn threads(pid: i32) -> Vec<String> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let names = entries
        .flatten()
        .map(|entry| std::fs::read_to_string(entry.path().join("comm")));
    // One that has just ended has none.
    names.flatten().map(|name| name.trim().to_owned()).collect()
}

/// The regular files that a process holds open.
pub fn open_files(pid: i32) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let targets = entries.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
    targets.filter(|target| target.is_file()).collect()
}

/// A write to its standard error would wait.
pub fn is_log_full(pid: i32) -> bool {
    let mut options = OpenOptions::new();
    let options = options.write(true).custom_flags(libc::O_NONBLOCK);
    let log = options.open(format!("/proc/{pid}/fd/2")).unwrap();
    let mut fds = [PollFd::new(log.as_fd(), PollFlags::POLLOUT)];
    nix::poll::poll(&mut fds, PollTimeout::ZERO) == Ok(0)
}

pub fn is_alive(pid: i32) -> bool {
    stat(pid).is_some()
}

/// What a program wrote to its standard error so far.
#[derive(Clone)]
pub struct Log(Arc<Mutex<Vec<String>>>, Arc<Mutex<()>>);

impl Log {
    fn read(from: impl std::io::Read + Send + 'static) -> Self {
        let log = Self(Arc::default(), Arc::default());
        let (lines, reading) = (log.0.clone(), log.1.clone());
        std::thread::spawn(move || {
            let mut from = BufReader::new(from);
            let mut line = Vec::new();
            while from.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = plain(&line);
                if !is_volume(&text) {
                    lines.lock().unwrap().push(text);
                }
                line.clear();
                drop(reading.lock());
            }
        });
        log
    }

    /// Nobody reads it until what is returned goes.
    pub fn stall(&self) -> MutexGuard<'_, ()> {
        self.1.lock().unwrap()
    }

    pub fn text(&self) -> String {
        self.0.lock().unwrap().join("\n") + "\n"
    }

    /// Without the polling of the tests themselves.
    fn interesting(&self) -> String {
        let text = self.text();
        let lines = text
            .lines()
            .filter(|line| !line.contains("uri=/ready") && !line.contains("uri=/status"));
        lines.map(|line| format!("{line}\n")).collect()
    }

    pub fn count(&self, part: &str) -> usize {
        self.0
            .lock()
            .unwrap()
            .iter()
            .filter(|line| line.contains(part))
            .count()
    }

    /// So many lines contain `part`, as soon as they are here: what a program said is read
    /// some time later.
    pub fn assert_count(&self, part: &str, n: usize) {
        poll(SOON, || (self.count(part) >= n).then_some(()));
        let (found, text) = (self.count(part), self.text());
        assert_eq!(found, n, "lines that say {part:?}:\n{text}");
    }

    /// What `pick` finds in the first line that has it.
    pub fn wait_for<T>(&self, what: &str, pick: impl Fn(&str) -> Option<T>) -> T {
        let found = poll(SOON, || {
            let lines = self.0.lock().unwrap();
            lines.iter().find_map(|line| pick(line))
        });
        found.unwrap_or_else(|| panic!("no log line says {what:?}:\n{}", self.text()))
    }

    /// The first line that contains `part`.
    pub fn wait_line(&self, part: &str) -> String {
        self.wait_for(part, |line| line.contains(part).then(|| line.to_owned()))
    }
}

/// The access lines of tests that ask a million times.
fn is_volume(line: &str) -> bool {
    line.contains("uri=/ows/?SERVICE=ECHO") && line.contains("status=200")
}

/// Without line end and colours.
fn plain(line: &[u8]) -> String {
    let text = String::from_utf8_lossy(line);
    let mut plain = String::new();
    let mut rest = text.trim_end();
    while let Some((before, after)) = rest.split_once("\x1b[") {
        plain.push_str(before);
        rest = after.split_once('m').map_or("", |(_, rest)| rest);
    }
    plain + rest
}
