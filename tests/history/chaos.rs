//! Breaks what it may, at random, and writes down what it broke.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use nix::unistd::Pid;

use super::dice::Dice;
use crate::common::Server;
use crate::common::process::{Process, try_parent};
use crate::common::relay::{Link, Relay, Towards};

/// What the harness may do, how often, and for how long.
pub struct Plan {
    pub seed: u64,
    /// Between two faults, on average.
    pub pause: Duration,
    /// A worker that says nothing for so long is dead to the server.
    pub silence: Duration,
    /// The parent of the pool is killed, too; somebody starts a new one.
    pub parents: bool,
}

/// What was done, by the worker it was done to.
#[derive(Debug, Default)]
pub struct Faults {
    pub by_pid: BTreeMap<i32, usize>,
    pub by_kind: BTreeMap<&'static str, usize>,
}

impl Faults {
    fn note(&mut self, kind: &'static str, pid: i32) {
        *self.by_pid.entry(pid).or_default() += 1;
        *self.by_kind.entry(kind).or_default() += 1;
    }
}

/// Those that may be hit.
pub struct Targets<'a> {
    pub server: &'a Server,
    /// Whose children the workers are.
    pub pool: &'a Process,
    pub relay: Option<&'a Relay>,
}

struct Chaos<'a> {
    plan: &'a Plan,
    targets: Targets<'a>,
    dice: Dice,
    faults: Faults,
    /// Stopped processes, and when they go on.
    stopped: Vec<(Instant, i32)>,
}

/// Breaks things until `done`, and counts them for those who wait for it.
pub fn run(plan: &Plan, targets: Targets, done: &AtomicBool, n_faults: &AtomicUsize) -> Faults {
    let mut chaos = Chaos {
        plan,
        targets,
        dice: Dice::new(plan.seed, u64::MAX),
        faults: Faults::default(),
        stopped: Vec::new(),
    };
    while !done.load(Ordering::Relaxed) {
        let pause = plan.pause.as_millis() as u64;
        let pause = Duration::from_millis(chaos.dice.between(pause / 2, pause * 3 / 2));
        chaos.sleep(pause, done);
        chaos.strike();
        n_faults.store(chaos.faults.by_kind.values().sum(), Ordering::Relaxed);
    }
    chaos.wake(|_| true);
    chaos.faults
}

impl Chaos<'_> {
    /// Passes the time until the next fault, waking those whose time has come.
    fn sleep(&mut self, time: Duration, done: &AtomicBool) {
        let end = Instant::now() + time;
        while Instant::now() < end && !done.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(5));
            let now = Instant::now();
            self.wake(|at| at <= now);
        }
    }

    fn wake(&mut self, is_due: impl Fn(Instant) -> bool) {
        for (at, pid) in std::mem::take(&mut self.stopped) {
            match is_due(at) {
                true => self.signal(pid, Signal::SIGCONT),
                false => self.stopped.push((at, pid)),
            }
        }
    }

    fn strike(&mut self) {
        let soon = self.dice.between(10, 200);
        let soon = Duration::from_millis(soon).min(self.plan.silence / 4);
        let long = self.plan.silence + Duration::from_millis(self.dice.between(100, 800));
        let direction = match self.dice.between(0, 2) {
            0 => Towards::Server,
            _ => Towards::Worker,
        };
        match self.dice.between(0, 100) {
            0..25 => self.kill("SIGKILL", Signal::SIGKILL),
            25..32 => self.kill("SIGSEGV", Signal::SIGSEGV),
            32..39 => self.kill("SIGABRT", Signal::SIGABRT),
            39..50 => self.freeze("stopped for a moment", soon),
            50..56 => self.freeze("frozen", long),
            56..58 if self.plan.parents => self.kill_the_parent(),
            58..70 => self.link("cut", |link| link.cut()),
            70..85 => self.link("torn", |link| link.tear(direction)),
            85..94 => self.link("slow", |link| link.hold(soon)),
            94..100 => self.link("silent", |link| link.hold(long)),
            _ => {}
        }
    }

    /// One of the workers that the server knows.
    fn victim(&mut self) -> Option<i32> {
        let workers = self.targets.server.workers();
        self.dice.pick(&workers).copied()
    }

    fn kill(&mut self, kind: &'static str, signal: Signal) {
        if let Some(pid) = self.victim() {
            self.faults.note(kind, pid);
            self.signal(pid, signal);
        }
    }

    fn freeze(&mut self, kind: &'static str, time: Duration) {
        if let Some(pid) = self.victim() {
            self.faults.note(kind, pid);
            self.signal(pid, Signal::SIGSTOP);
            self.stopped.push((Instant::now() + time, pid));
        }
    }

    fn link(&mut self, kind: &'static str, hurt: impl FnOnce(&Link)) {
        let links = self.targets.relay.map(Relay::links).unwrap_or_default();
        if let Some(link) = self.dice.pick(&links) {
            self.faults.note(kind, link.pid());
            hurt(link);
        }
    }

    /// And with it all its children, which are asked for while it cannot have more.
    fn kill_the_parent(&mut self) {
        let Some(worker) = self.victim() else { return };
        let Some(parent) = try_parent(worker) else {
            return;
        };
        if !self.is_ours(parent) {
            return;
        }
        self.signal(parent, Signal::SIGSTOP);
        for pid in self.targets.pool.family().into_keys() {
            if try_parent(pid) == Some(parent) {
                self.faults.note("with its parent", pid);
            }
        }
        self.signal(parent, Signal::SIGKILL);
    }

    fn is_ours(&self, pid: i32) -> bool {
        self.targets.pool.family().contains_key(&pid)
    }

    /// The number may be another's by now, so it is looked at first.
    fn signal(&self, pid: i32, signal: Signal) {
        if self.is_ours(pid) {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
        }
    }
}
