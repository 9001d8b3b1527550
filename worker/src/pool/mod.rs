//! The pool's parent: forks workers, reaps them and says in the log why they died.
//!
//! Single-threaded for ever: it holds an interpreter with PyQGIS imported and no
//! Qt object, which is the only state from which a fork is sound. It knows pids
//! and exit statuses and nothing about requests.

mod obituary;
mod reading;
pub mod state;
mod temporary;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, kill, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, getpid, getppid};
use qgisserver::config::{self, Config, Sources};
use qgisserver::protocol::{Because, Versions};
use sd_notify::NotifyState;

use crate::board::Board;
use crate::link::{JOINED, Order};
use crate::machine::Machine;
use crate::memory;
use crate::preload::Preload;
use crate::qgis::Zygote;
use crate::serve;
use obituary::{Obituary, megabytes};
use reading::Reading;
use state::{Alarm, Effect, Pool, Recycle, Rules, State, Verdict};
pub use temporary::Folder;

/// Kilobytes below which QGIS could not work.
const LEAST_LIMIT: u64 = 512 << 10;

/// Blocks a signal until the pool reads it.
pub fn hold(signal: Signal) {
    let mask = SigSet::from_iter([signal]);
    let held = sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None);
    held.expect("the mask is valid");
}

/// Blocks the signals that the pool reads when it has time for them: one that comes
/// while Python starts must not end the process.
pub fn hold_signals() -> nix::Result<SigSet> {
    let signals = [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGHUP,
    ];
    let mask: SigSet = signals.into_iter().collect();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&mask), None)?;
    Ok(mask)
}

/// Runs the pool until it is told to stop. `sources`: where `config` came from; `mask`:
/// the held signals; `folder`: for temporary files. `is_child`: started by a server,
/// whose end closes our standard input.
pub fn run(
    config: Config,
    sources: Sources,
    zygote: Zygote,
    mask: SigSet,
    folder: Folder,
    is_child: bool,
) -> std::io::Result<()> {
    Parent::new(config, sources, zygote, mask, folder, is_child)?.watch()
}

struct Parent {
    config: Config,
    sources: Sources,
    /// Of new settings.
    reading: Option<Reading>,
    /// A reader that was given up and is not gone yet.
    stuck: Option<Pid>,
    /// They may have changed since one of these began.
    again: bool,
    /// Of the environment, what changed since Python began.
    variables: BTreeMap<String, Option<String>>,
    zygote: Zygote,
    versions: Versions,
    name: String,
    instance: String,
    pool: Pool,
    workers: BTreeMap<u32, Worker>,
    signals: SignalFd,
    mask: SigSet,
    lifeline: Option<std::io::Stdin>,
    folder: Folder,
    announced: bool,
    machine: Machine,
    preload: Preload,
    /// Kilobytes that a worker may allocate.
    memory_limit: u64,
    weighed_at: Instant,
    /// How many the kernel had killed for want of memory at the last two looks: a
    /// death of a moment ago may be counted already and not be noticed yet.
    n_killed: [u64; 2],
}

struct Worker {
    pid: Pid,
    /// Its own folder for temporary files, which goes with it.
    tmpdir: PathBuf,
    control: UnixStream,
    board: Arc<Board>,
    verdict: Option<Verdict>,
    /// Why it was told to leave.
    dismissed: Option<Because>,
}

fn name(pool: &config::Pool) -> String {
    pool.identity.clone().unwrap_or_else(crate::host)
}

fn rules(pool: &config::Pool, preload: &Preload) -> Rules {
    let opening = match preload.is_empty() {
        true => Duration::ZERO,
        false => pool.preload_timeout,
    };
    Rules {
        workers: pool.workers,
        spares: pool.spares,
        start_timeout: pool.start_timeout + opening,
        drain_timeout: pool.drain_timeout,
        young: pool.young,
        backoff_max: pool.backoff_max,
        heartbeat: pool.heartbeat,
        // One more than the server waits before its request goes elsewhere: it
        // may come back, and ending it would cost its open projects.
        silence_max: pool.heartbeat * (pool.heartbeat_misses + 1),
        recycle: Recycle {
            requests: pool.recycle_requests,
            age: pool.recycle_age,
            memory: pool.recycle_memory.div_ceil(1024),
            high_water_mark: pool.memory_high_water_mark,
        },
        seed: uuid::Uuid::new_v4().as_u128() as u64,
    }
}

impl Parent {
    fn new(
        config: Config,
        sources: Sources,
        zygote: Zygote,
        mask: SigSet,
        folder: Folder,
        is_child: bool,
    ) -> std::io::Result<Self> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&mask, flags)?;
        let machine = Machine::new();
        let preload = Preload::read(&config.pool);
        let memory_limit = memory_limit(config.pool.memory_limit, &machine);
        tracing::info!(
            memory_limit = megabytes(memory_limit),
            "what a worker may allocate (worker.memory_limit)"
        );
        Ok(Self {
            versions: zygote.versions(),
            name: name(&config.pool),
            instance: uuid::Uuid::new_v4().simple().to_string(),
            pool: Pool::new(rules(&config.pool, &preload), Instant::now()),
            preload,
            workers: BTreeMap::new(),
            signals,
            mask,
            lifeline: is_child.then(std::io::stdin),
            folder,
            announced: false,
            n_killed: [machine.n_killed(); 2],
            machine,
            memory_limit,
            weighed_at: Instant::now(),
            variables: BTreeMap::new(),
            config,
            sources,
            reading: None,
            stuck: None,
            again: false,
            zygote,
        })
    }

    fn watch(&mut self) -> std::io::Result<()> {
        while !self.pool.is_finished() {
            self.act();
            self.announce();
            self.wait()?;
            self.read_boards();
            self.weigh();
            self.give_up_reading();
        }
        Ok(())
    }

    fn act(&mut self) {
        for effect in self.pool.step(Instant::now()) {
            match effect {
                Effect::Fork(number) => self.fork(number),
                Effect::Promote(number) => self.promote(number),
                Effect::Dismiss(number) => self.dismiss(number),
                Effect::Kill(number, verdict) => self.kill(number, verdict),
            }
        }
    }

    fn fork(&mut self, number: u32) {
        if let Err(error) = self.try_fork(number) {
            tracing::error!(worker = number, %error, "no process for a worker");
            self.preload.gone(number, None);
            self.pool.fork_failed(number, Instant::now());
        }
    }

    fn try_fork(&mut self, number: u32) -> std::io::Result<()> {
        let board = Arc::new(Board::new()?);
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let tmpdir = self.folder.make(number)?;
        let preload = self.preload.part(number);
        let not_opened = self.preload.not_opened();
        let parent = getpid();
        match self.zygote.fork()? {
            ForkResult::Parent { child } => {
                tracing::debug!(worker = number, pid = child.as_raw(), "forked");
                let worker = Worker {
                    pid: child,
                    tmpdir,
                    control: ours,
                    board,
                    verdict: None,
                    dismissed: None,
                };
                self.workers.insert(number, worker);
                Ok(())
            }
            ForkResult::Child => {
                drop(ours);
                self.become_worker(parent);
                serve::run(serve::Birth {
                    number,
                    pool: &self.config.pool,
                    log: &self.config.log,
                    variables: &self.variables,
                    zygote: &self.zygote,
                    versions: &self.versions,
                    name: &self.name,
                    pool_instance: &self.instance,
                    board,
                    control: theirs,
                    tmpdir,
                    preload,
                    not_opened,
                })
            }
        }
    }

    /// What a forked child must shed before it is a worker of its own.
    fn become_worker(&mut self, parent: Pid) {
        // SAFETY: asks the kernel to end us with our parent, whatever ends it.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
        if getppid() != parent {
            // SAFETY: it died before we asked.
            unsafe { libc::_exit(1) };
        }
        qgisserver::log::forked();
        // What reaches a whole terminal group is the parent's to understand.
        for signal in [libc::SIGINT, libc::SIGHUP] {
            // SAFETY: no handler of ours is replaced.
            unsafe { libc::signal(signal, libc::SIG_IGN) };
        }
        let unblocked = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&self.mask), None);
        unblocked.expect("the mask was valid when it was set");
        memory::limit(self.memory_limit << 10)
            .unwrap_or_else(|error| tracing::warn!(%error, "worker.memory_limit has no effect"));
        memory::volunteer().unwrap_or_else(
            |error| tracing::debug!(%error, "no better one to kill for want of memory than others"),
        );
        // A worker knows its settings; what else was set may be a secret.
        self.sources.wipe();
        // Siblings' sockets: their parent's end must be the parent's alone.
        self.workers.clear();
        self.reading = None;
        self.lifeline = None;
        if let Ok(null) = std::fs::File::open("/dev/null") {
            // SAFETY: both descriptors are ours.
            unsafe { libc::dup2(null.as_raw_fd(), 0) };
        }
    }

    fn promote(&mut self, number: u32) {
        let because = self.pool.because(number);
        if because != Because::Start {
            tracing::info!(worker = number, ?because, "a spare takes the place");
        }
        self.say(number, Order::Promoted(because));
    }

    fn dismiss(&mut self, number: u32) {
        let because = self.pool.end(number);
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.dismissed = because;
        }
        self.say(number, Order::Dismissed);
    }

    fn say(&mut self, number: u32, order: Order) {
        if let Some(worker) = self.workers.get_mut(&number)
            && let Err(error) = worker.control.write_all(&[order.byte()])
        {
            // Its end is noticed by itself.
            tracing::debug!(worker = number, %error, "not told");
        }
    }

    fn kill(&mut self, number: u32, verdict: Verdict) {
        if let Some(worker) = self.workers.get_mut(&number) {
            worker.verdict = Some(verdict);
            // Not reaped yet, so the pid is still its own.
            let _ = kill(worker.pid, Signal::SIGKILL);
        }
    }

    /// Waits for a signal, a word of a worker or of a reader, the end of the server or
    /// the next deadline.
    fn wait(&mut self) -> nix::Result<()> {
        let now = Instant::now();
        let wake = self
            .pool
            .next_wake(now)
            .unwrap_or(now + self.config.pool.heartbeat);
        let pause = wake
            .saturating_duration_since(now)
            .min(self.config.pool.heartbeat)
            .min(self.config.pool.memory_check)
            .min(self.reading_lasts(now));
        // Rounded up, or the last millisecond would be spent spinning.
        let pause =
            PollTimeout::try_from(pause + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX);
        let (signalled, cut, read, spoke) = {
            let mut fds = vec![PollFd::new(self.signals.as_fd(), PollFlags::POLLIN)];
            fds.extend(self.workers.values().map(|worker| {
                let wanted = PollFlags::POLLIN;
                PollFd::new(worker.control.as_fd(), wanted)
            }));
            let reading = self.reading.as_ref().map(Reading::pipe);
            let lifeline = self.lifeline.as_ref().map(AsFd::as_fd);
            let [reading, lifeline] = [reading, lifeline].map(|fd| {
                fds.push(PollFd::new(fd?, PollFlags::POLLIN));
                Some(fds.len() - 1)
            });
            match poll(&mut fds, pause) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error),
            }
            let hot = |fd: &PollFd<'_>| fd.any().unwrap_or(false);
            let numbers: Vec<_> = self.workers.keys().copied().collect();
            let spoke: Vec<_> = numbers
                .into_iter()
                .zip(&fds[1..])
                .filter_map(|(number, fd)| hot(fd).then_some(number))
                .collect();
            let is_hot = |at: Option<usize>| at.is_some_and(|at| hot(&fds[at]));
            (hot(&fds[0]), is_hot(lifeline), is_hot(reading), spoke)
        };
        if signalled {
            self.read_signals()?;
        }
        spoke.into_iter().for_each(|number| self.listen(number));
        if read {
            self.listen_to_reader();
        }
        if cut {
            self.cut();
        }
        Ok(())
    }

    fn read_signals(&mut self) -> nix::Result<()> {
        while let Some(info) = self.signals.read_signal()? {
            match Signal::try_from(info.ssi_signo as i32) {
                Ok(Signal::SIGCHLD) => self.reap(),
                Ok(Signal::SIGHUP) => self.reload(),
                // Ctrl-C in a terminal reaches us as well as the server, which
                // still wants its requests served; its own word is SIGTERM.
                Ok(Signal::SIGINT) if self.lifeline.is_some() => {}
                Ok(signal) => self.stop(signal),
                Err(_) => {}
            }
        }
        Ok(())
    }

    /// A child reads the settings again, because their file system may hang.
    fn reload(&mut self) {
        if self.reading.is_some() || self.stuck.is_some() {
            self.again = true;
            return tracing::warn!(
                "the pool's settings are still being read: once more after that"
            );
        }
        tracing::debug!("SIGHUP: a child reads the pool's settings again");
        match Reading::begin(&self.sources, self.config.reload_timeout) {
            Ok(reading) => self.reading = Some(reading),
            Err(error) => {
                tracing::error!(%error, "no process to read the pool's settings: nothing changes")
            }
        }
    }

    fn reload_if_asked_meanwhile(&mut self) {
        if std::mem::take(&mut self.again) {
            self.reload();
        }
    }

    fn listen_to_reader(&mut self) {
        if let Some(reading) = self.reading.take_if(Reading::listen) {
            self.take_up(reading.told());
            self.reload_if_asked_meanwhile();
        }
    }

    /// How long at most.
    fn reading_lasts(&self, now: Instant) -> Duration {
        let until = self.reading.as_ref().map(Reading::until);
        until.map_or(Duration::MAX, |until| until.saturating_duration_since(now))
    }

    fn give_up_reading(&mut self) {
        let now = Instant::now();
        let Some(reading) = self.reading.take_if(|it| it.until() <= now) else {
            return;
        };
        tracing::error!(
            "the pool's settings cannot be read within {:?} (server.reload_timeout): nothing changes",
            self.config.reload_timeout
        );
        match reading.is_reaped {
            true => self.reload_if_asked_meanwhile(),
            false => {
                reading::give_up(reading.pid());
                self.stuck = Some(reading.pid());
            }
        }
    }

    fn reader_ended(&mut self, pid: Pid) {
        if let Some(reading) = self.reading.as_mut().filter(|it| it.pid() == pid) {
            reading.is_reaped = true;
        }
        if self.stuck.take_if(|stuck| *stuck == pid).is_some() {
            self.reload_if_asked_meanwhile();
        }
    }

    /// With a mistake in the settings nothing changes, and nobody is replaced.
    fn take_up(&mut self, told: &[u8]) {
        let changed = match self.sources.hear(told) {
            Some(Ok(changed)) => changed,
            Some(Err(exit)) => return config::log_mistakes(&exit),
            None => {
                return tracing::error!("who read the pool's settings died of it: nothing changes");
            }
        };
        if self.lifeline.is_none() {
            // The server of a local pool said the same.
            changed.log();
        }
        self.adopt(changed.config);
        tracing::info!("replacing the workers, one after the other");
        self.pool.restart();
    }

    fn adopt(&mut self, config: Config) {
        qgisserver::log::change(&config.log);
        for name in self.config.pool.env.keys() {
            self.variables.insert(name.clone(), None);
        }
        for (name, value) in &config.pool.env {
            self.variables.insert(name.clone(), Some(value.clone()));
        }
        self.name = name(&config.pool);
        self.preload.reread(&config.pool);
        self.pool.configure(rules(&config.pool, &self.preload));
        self.memory_limit = memory_limit(config.pool.memory_limit, &self.machine);
        self.config = config;
    }

    fn stop(&mut self, signal: Signal) {
        tracing::info!(%signal, "stopping: running requests may end");
        let _ = sd_notify::notify(false, &[NotifyState::Stopping]);
        self.pool.stop();
    }

    /// A worker is warm or known to the server, or its socket is at its end, which SIGCHLD explains.
    fn listen(&mut self, number: u32) {
        let Some(worker) = self.workers.get_mut(&number) else {
            return;
        };
        let mut word = [0];
        match (worker.control.read(&mut word), word[0]) {
            (Ok(1), serve::READY) => {
                self.pool.ready(number, Instant::now());
                if let Some(weight) = self.machine.weight(worker.pid) {
                    self.pool.weighed_new(number, weight);
                }
            }
            (Ok(1), JOINED) => self.pool.joined(number),
            _ => {}
        }
    }

    /// The server is gone. Nobody waits for anything any more.
    fn cut(&mut self) {
        tracing::warn!("the server is gone: the pool ends");
        self.lifeline = None;
        self.pool.stop();
        let numbers: Vec<u32> = self.workers.keys().copied().collect();
        numbers
            .into_iter()
            .for_each(|number| self.kill(number, Verdict::Stopping));
        temporary::remove_socket_folder(&self.config.pool.server);
    }

    fn reap(&mut self) {
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(status) => self.bury(status),
            }
        }
    }

    fn bury(&mut self, status: WaitStatus) {
        let Some(pid) = status.pid() else { return };
        let found = self.workers.iter().find(|(_, worker)| worker.pid == pid);
        let Some(number) = found.map(|(number, _)| *number) else {
            return self.reader_ended(pid);
        };
        let worker = self.workers.remove(&number).expect("it was found just now");
        let n_served = worker.board.n_served();
        let mut obituary = Obituary {
            number,
            pid,
            status,
            age: Duration::ZERO,
            n_served,
            was_warm: self.pool.state(number) != Some(State::Starting),
            verdict: worker.verdict,
            farewell: worker.board.farewell(),
            serving: worker.board.serving(),
            dismissed: worker.dismissed,
            crashed_with: worker.board.crashed_with(),
            limit: self.memory_limit,
            kernel_killed: self.kernel_killed(),
        };
        self.preload.gone(number, worker.board.preloaded());
        self.pool.blame(number, obituary.because());
        let age = self.pool.died(number, n_served > 0, Instant::now());
        obituary.age = age.unwrap_or_default();
        // The spare first; everything else can wait.
        self.act();
        temporary::remove(&worker.tmpdir);
        obituary.log();
        let pause = self.pool.backoff(Instant::now());
        if pause > Duration::from_secs(1) {
            tracing::warn!("workers die young: the next one is started in {pause:.1?}");
        }
    }

    /// The kernel killed somebody for want of memory since we asked last.
    fn kernel_killed(&mut self) -> bool {
        let now = self.machine.n_killed();
        let before = std::mem::replace(&mut self.n_killed, [now; 2]);
        now > before[0]
    }

    fn read_boards(&mut self) {
        let now = Instant::now();
        for (number, worker) in &self.workers {
            self.pool.beats(*number, worker.board.beats(), now);
            self.pool.served(*number, worker.board.n_served());
        }
    }

    /// Looks at the memory of everybody, from time to time: the kernel walks through
    /// all pages of a process for it, which takes milliseconds.
    fn weigh(&mut self) {
        if self.weighed_at.elapsed() < self.config.pool.memory_check {
            return;
        }
        self.weighed_at = Instant::now();
        self.n_killed = [self.n_killed[1], self.machine.n_killed()];
        let Some(memory) = self.machine.memory() else {
            return;
        };
        let weigh =
            |(number, worker): (&u32, &Worker)| Some((*number, self.machine.weight(worker.pid)?));
        let weights = self.workers.iter().filter_map(weigh).collect();
        let parent = self.machine.weight(getpid()).unwrap_or_default().share;
        let alarm = self.pool.weighed(&weights, parent, memory);
        if let Some(alarm) = alarm {
            let all = parent + weights.values().map(|weight| weight.share).sum::<u64>();
            self.alarm(alarm, all, memory);
        }
    }

    fn alarm(&self, alarm: Alarm, all: u64, memory: u64) {
        let mark = self.config.pool.memory_high_water_mark;
        let (all, memory) = (megabytes(all), megabytes(memory));
        match alarm {
            Alarm::Recycles(number) => {
                let weight = self.pool.weight(number).unwrap_or_default();
                tracing::warn!(
                    worker = number,
                    takes = megabytes(weight.share),
                    "the pool takes {all} of {memory}, more than {mark} of it \
                     (server.memory_high_water_mark): replacing the largest worker"
                );
            }
            Alarm::Helpless => tracing::warn!(
                "the pool takes {all} of {memory}, more than {mark} of it \
                 (server.memory_high_water_mark), and no worker has grown: fewer workers \
                 (server.workers), fewer open projects (projects.cache.size) or more memory would help"
            ),
        }
    }

    /// Tells systemd and the log, once, that the pool is complete.
    fn announce(&mut self) {
        if !self.announced && self.pool.is_settled() {
            self.announced = true;
            let n_workers = self.config.pool.workers;
            tracing::info!(n_workers, qgis = self.versions.qgis, "the pool is ready");
            let _ = sd_notify::notify(false, &[NotifyState::Ready]);
        }
    }
}

/// Kilobytes that a worker may allocate. One that takes half of what there is has
/// gone astray, and the other half keeps everybody else alive.
fn memory_limit(bytes: u64, machine: &Machine) -> u64 {
    match bytes {
        0 => machine
            .memory()
            .map_or(u64::MAX >> 10, |all| (all / 2).max(LEAST_LIMIT)),
        bytes => bytes >> 10,
    }
}
