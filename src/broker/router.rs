//! The broker's task: acts on what `queue.rs`, `quarantine.rs`, `breaker.rs` and
//! `deaths.rs` decide.
//!
//! One task owns the transport, the queue and the clock; handles and bodies talk
//! to it through a channel. It lives on the main thread, beside a part of the HTTP
//! connections: to pass a request from one thread to another costs more than all
//! that happens to it here. So nothing on this thread may work for long, and
//! nothing in the task waits but the one `select!` of [`Driver::run`]: sends are
//! queued or fail, and a reply goes to the front by `try_send` into a channel that
//! the window bounds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{self, MissedTickBehavior};

use super::awake::Awake;
use super::breaker::{self, Breakers, Change, Verdict};
use super::cost::{Kind, Work};
use super::deaths::{self, Departure, Departures, Storm};
use super::gate::{self, Gate};
use super::lanes::{Rules, Sort};
use super::quarantine::{self, Accused, Fingerprint, Quarantine};
use super::queue::{Effect, Fate, Id, Limits, Peer, Queue, Ticket, Why};
use super::raised::Exceptional;
use super::silences::Silences;
use super::throttle::Throttle;
use super::transport::{Event, Router, Transport, Undeliverable};
use super::troubled::Troubled;
use super::versions::{Asked, Errand, Versions};
use super::{
    Body, Broker, Call, Command, Error, Handle, Item, Lane, Lost, Name as Called, Outcome, Reply,
    Running, Shared, State, Status, Stream, Wait, Worker, name_of,
};
use crate::config;
use crate::directory::{self, Directory};
use crate::protocol::{
    Cancel, Credit, Disconnect, Edition, Failure, Final, Found, HEAD_MAX, Message, Partial,
    ProjectRef, Ready, Reason, Request,
};

/// So many clients and projects are in the status.
const TOP: usize = 5;

/// Why the broker did not start.
#[derive(Debug)]
pub enum StartError {
    Directory {
        parent: PathBuf,
        error: io::Error,
    },
    Socket {
        path: PathBuf,
        error: String,
    },
    Gate {
        address: SocketAddr,
        error: io::Error,
    },
}

impl std::fmt::Display for StartError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Directory { parent, error } => {
                write!(
                    f,
                    "cannot make a private directory in {}: {error}",
                    parent.display()
                )
            }
            Self::Socket { path, error } => write!(f, "cannot bind {}: {error}", path.display()),
            Self::Gate { address, error } => write!(f, "cannot listen on {address}: {error}"),
        }
    }
}

impl std::error::Error for StartError {}

/// Must be called on the one thread of a current_thread runtime, which the broker shares.
pub async fn start(
    config: &config::Broker,
    gate: Option<TcpListener>,
) -> Result<(Handle, Broker), StartError> {
    let flavour = tokio::runtime::Handle::current().runtime_flavor();
    debug_assert_eq!(flavour, tokio::runtime::RuntimeFlavor::CurrentThread);
    let directory = Directory::create(&config.runtime_dir, directory::SERVER).map_err(|error| {
        StartError::Directory {
            parent: config.runtime_dir.clone(),
            error,
        }
    })?;
    let path = directory.path().join("broker.sock");
    let refused = |error: String| StartError::Socket {
        path: path.clone(),
        error,
    };
    let listener = UnixListener::bind(&path).map_err(|error| refused(error.to_string()))?;

    let router = Router::bind(listener)
        .await
        .map_err(|error| refused(error.to_string()))?;

    let shared = Arc::new(Shared::default());
    let (commands, inbox) = mpsc::unbounded_channel();
    let (end, ended) = oneshot::channel();
    let (published, status) = watch::channel(Status::default());
    let driver = Driver::new(
        router,
        config.clone(),
        shared.clone(),
        commands.clone(),
        published,
    );
    tokio::spawn(async move {
        driver.run(inbox).await;
        drop(directory);
        let _ = end.send(());
    });

    let handle = Handle {
        commands: commands.clone(),
        shared,
        status,
    };
    let mut broker = Broker {
        endpoint: format!("ipc://{}", path.display()),
        gate: None,
        commands,
        ended,
        relay: None,
    };
    if let Some(address) = config.gate {
        let listener = match gate {
            Some(listener) => Ok(listener),
            None => TcpListener::bind(address),
        };
        let gate = listener
            .and_then(|listener| Gate::open(listener, path, gate_limits(config)))
            .map_err(|error| StartError::Gate { address, error })?;
        broker.gate = Some(gate.address);
        broker.relay = Some(gate);
    }
    Ok((handle, broker))
}

fn gate_limits(config: &config::Broker) -> gate::Limits {
    gate::Limits {
        handshake: config.gate_handshake,
        idle: config.heartbeat * config.heartbeat_misses * 2,
        peers_max: config.gate_peers_max,
    }
}

/// The queue with its clock, its sockets and its log.
struct Driver<T> {
    config: config::Broker,
    transport: T,
    queue: Queue,
    calls: HashMap<Id, Pending>,
    workers: HashMap<Peer, Member>,
    quarantine: Quarantine,
    silences: Silences,
    breakers: Breakers,
    storm: Storm,
    departures: Departures,
    versions: Versions,
    /// Requests of our own.
    errands: HashMap<Id, Errand>,
    troubled: Troubled,
    exceptional: Exceptional,
    /// What clients have lately, for these.
    patience: Duration,
    /// Some of those that wait may not run any more.
    recheck: bool,
    refusals: Throttle,
    shared: Arc<Shared>,
    /// For the bodies of streams.
    commands: mpsc::UnboundedSender<Command>,
    published: watch::Sender<Status>,
    stop_until: Option<Instant>,
    releasing: bool,
}

/// A call without an end.
struct Pending {
    call: Box<Call>,
    /// Of its project, as the queue knows it.
    name: Called,
    answer: Answer,
    /// While its body is here or when it is needed, whichever is earlier.
    fingerprint: Option<Fingerprint>,
    /// Who has it; None while it waits.
    peer: Option<Peer>,
    /// The next one is its second worker, and why.
    again: Option<&'static str>,
}

/// Where its answer goes.
enum Answer {
    Whole(oneshot::Sender<Result<Reply, Lost>>),
    Stream {
        items: mpsc::Sender<Item>,
        taken: Arc<AtomicU32>,
    },
}

/// A worker that said READY.
struct Member {
    ready: Ready,
    since: Instant,
    serving: Option<Serving>,
    n_served: u64,
    memory_kb: u64,
    /// It said that it leaves.
    leaving: Option<Departure>,
}

/// For status and log, until FINAL.
struct Serving {
    id: Id,
    request_id: String,
    operation: String,
    project: Option<ProjectRef>,
    /// Of the project, as the queue knows it.
    name: Called,
    /// What was known of the project then.
    asked: Asked,
    since: Instant,
    timeout: Duration,
    /// Its time-out was counted.
    timed_out: bool,
    /// The worker was asked to stop: how it ends says little about the request.
    cancelled: bool,
    /// Since then.
    fingerprint: Option<Fingerprint>,
}

impl std::fmt::Display for Member {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ready {
            number,
            pool,
            pid,
            host,
            ..
        } = &self.ready;
        write!(f, "worker {number} of {pool} (pid {pid} on {host})")
    }
}

impl<T: Transport> Driver<T> {
    fn new(
        transport: T,
        config: config::Broker,
        shared: Arc<Shared>,
        commands: mpsc::UnboundedSender<Command>,
        published: watch::Sender<Status>,
    ) -> Self {
        shared.unsent.configure(config.reply_memory);
        Self {
            queue: Queue::new(limits(&config), Instant::now()),
            quarantine: Quarantine::new(quarantine_rules(&config)),
            silences: Silences::default(),
            breakers: Breakers::new(breaker_rules(&config)),
            storm: Storm::new(storm_rules(&config)),
            departures: Departures::default(),
            versions: Versions::new(config.stale, config.broken_for),
            errands: HashMap::new(),
            troubled: Troubled::default(),
            exceptional: Exceptional::default(),
            patience: config.queue_timeout,
            recheck: false,
            config,
            transport,
            calls: HashMap::new(),
            workers: HashMap::new(),
            refusals: Throttle::default(),
            shared,
            commands,
            published,
            stop_until: None,
            releasing: false,
        }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut beat = time::interval(self.config.heartbeat.max(Duration::from_millis(1)));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut alarm = pin!(time::sleep(Duration::ZERO));
        let mut armed = None;
        let mut awake = Awake::new(Instant::now());
        for turn in 1u64.. {
            let due = self.next_deadline();
            // It may ring early, never late; so most turns leave it alone.
            if due.is_some_and(|due| armed.is_none_or(|armed| due < armed)) {
                armed = due;
                alarm.as_mut().reset(due.expect("it is some").into());
            }
            // Every branch is cancel-safe: what is not taken stays queued.
            tokio::select! {
                event = self.transport.next() => self.event(event),
                Some(command) = inbox.recv() => self.obey(command),
                () = alarm.as_mut(), if armed.is_some() => {
                    armed = None;
                    self.tick();
                }
                _ = beat.tick() => self.beat(),
                () = awake.wait() => {}
            }
            awake.running(self.queue.n_running(), Instant::now());
            if self.has_ended() {
                break;
            }
            // The transport's writers are tasks on this thread, and a flood must not starve them.
            if turn % 32 == 0 {
                tokio::task::yield_now().await;
            }
        }
        self.say_goodbye().await;
    }

    fn next_deadline(&self) -> Option<Instant> {
        let queue = self.queue.next_deadline();
        queue.into_iter().chain(self.stop_until).min()
    }

    fn has_ended(&self) -> bool {
        self.stop_until.is_some()
            && self.queue.n_waiting() == 0
            && self.queue.n_running() <= self.n_errands_under_way()
    }

    /// Of whose outcome a server that stops makes no use.
    fn n_errands_under_way(&self) -> usize {
        let under_way = |id: &&Id| self.calls.get(id).is_some_and(|it| it.peer.is_some());
        self.errands.keys().filter(under_way).count()
    }

    fn tick(&mut self) {
        let now = Instant::now();
        if self.stop_until.is_some_and(|until| until <= now) {
            self.queue.abort();
        }
        self.queue.tick(now);
        self.act();
    }

    fn beat(&mut self) {
        let peers: Vec<Peer> = self.workers.keys().cloned().collect();
        for peer in peers {
            self.send(&peer, Message::Heartbeat);
        }
        let now = Instant::now();
        self.quarantine.tick(now);
        self.breakers.tick(now);
        if self.storm.tick(now) {
            tracing::warn!("no worker died for a while: the server may be ready again");
            self.shared.storm.store(false, Ordering::Relaxed);
        }
        self.tick();
    }

    /// Workers hang up when they are told; those that do not lose their connection.
    async fn say_goodbye(&mut self) {
        for peer in self.workers.keys() {
            let message = Message::Disconnect(Disconnect {
                reason: Reason::Stopping,
            });
            let _ = self.transport.send(peer, message.encode());
        }
        let all_gone = async {
            while !self.workers.is_empty() {
                if let Event::Gone(peer) = self.transport.next().await {
                    self.workers.remove(&peer);
                }
            }
        };
        let _ = time::timeout(self.config.heartbeat, all_gone).await;
    }

    // From the front.

    fn obey(&mut self, command: Command) {
        match command {
            Command::Call { id, call, answer } => self.submit(id, call, answer),
            Command::Took { id } => self.took(id),
            Command::Withdraw { id } => {
                self.queue.withdraw(id, Instant::now());
                self.drop_body(id);
            }
            Command::Status => self.publish(),
            Command::TellPools(reason) => self.tell_pools(reason),
            Command::Configure(config) => self.configure(*config),
            Command::Release => self.releasing = true,
            Command::Stop { within } => self.stop(within),
        }
        self.act();
    }

    fn submit(&mut self, id: Id, call: Box<Call>, answer: oneshot::Sender<Result<Reply, Lost>>) {
        let ticket = self.ticket(&call);
        let now = Instant::now();
        if let Some(project) = &call.project {
            self.breakers.asked(project, now);
        }
        let mut pending = Pending::new(call, ticket.project.clone(), Answer::Whole(answer));
        if !pending.call.body.is_empty() && self.quarantine.is_enabled() {
            pending.fingerprint(&self.quarantine);
        }
        self.calls.insert(id, pending);
        match self.objection(id, now) {
            Some(error) => self.answer(id, error),
            None => self.queue.submit(id, ticket, now),
        }
    }

    /// Why the request may not run now.
    fn objection(&mut self, id: Id, now: Instant) -> Option<Error> {
        if self.quarantine.is_empty() && self.breakers.is_quiet() {
            return None;
        }
        let pending = self.calls.get_mut(&id)?;
        if !self.quarantine.is_empty() {
            let fingerprint = pending.fingerprint(&self.quarantine);
            if let Some(left) = self.quarantine.refuses(fingerprint, now) {
                return Some(Error::Quarantined { left });
            }
        }
        let project = pending.call.project.as_ref()?;
        if !self.breakers.is_troubled(project) {
            return None;
        }
        let serving = self.workers.values().filter_map(|it| it.serving.as_ref());
        // Not counting itself, if it had to step back from a worker that lingers.
        let holding = serving.filter(|it| it.id != id && it.project.as_ref() == Some(project));
        let running: Vec<&Serving> = holding.collect();
        let crowd = (running.len(), self.workers.len());
        match self.breakers.admits(project, id, crowd, now) {
            Verdict::Admitted => None,
            Verdict::Probe => {
                let request_id = &pending.call.request_id;
                tracing::warn!(%project, request_id, "this request tries whether the project answers again");
                None
            }
            Verdict::Open { retry_after } => Some(Error::BreakerOpen { retry_after }),
            Verdict::Crowded { limit } => {
                // The first of them is over by then.
                let left = running.iter().map(|it| it.left(now)).min();
                let retry_after = left.unwrap_or_default().max(Duration::from_secs(1));
                Some(Error::ShareTaken { limit, retry_after })
            }
        }
    }

    /// Those that wait and are not let in any more need not wait for it.
    fn recheck_waiting(&mut self) {
        let now = Instant::now();
        let is_waiting = |pending: &Pending| pending.peer.is_none();
        let waiting = self.calls.iter().filter(|(_, it)| is_waiting(it));
        let mut waiting: Vec<Id> = waiting.map(|(id, _)| *id).collect();
        waiting.sort_unstable();
        for id in waiting {
            match self.objection(id, now) {
                // Workers may be free when it is its turn.
                None | Some(Error::ShareTaken { .. }) => {}
                Some(error) => {
                    self.answer(id, error);
                    self.queue.withdraw(id, now);
                }
            }
        }
    }

    fn ticket(&self, call: &Call) -> Ticket {
        let project: Called = call.project_name().into();
        Ticket {
            retry: call.retry,
            cancel: call.cancel,
            timeout: call.timeout,
            client: call.client.clone(),
            sort: Sort::of(&call.operation),
            kind: Kind::of(&project, &call.operation, &call.work),
            cause: call.cause.as_ref().and_then(|it| self.instance(it)),
            project,
        }
    }

    /// The worker that said so of itself in READY.
    fn instance(&self, instance: &str) -> Option<Peer> {
        let is_it = |it: &Member| !instance.is_empty() && it.ready.instance == instance;
        let mut workers = self.workers.iter();
        workers
            .find(|(_, it)| is_it(it))
            .map(|(peer, _)| peer.clone())
    }

    /// The request will not be sent again, and its body may be large.
    fn drop_body(&mut self, id: Id) {
        if let Some(pending) = self.calls.get_mut(&id) {
            pending.call.body = Bytes::new();
        }
    }

    fn took(&mut self, id: Id) {
        if let Some(Pending {
            answer: Answer::Stream { taken, .. },
            ..
        }) = self.calls.get(&id)
        {
            let n = taken.swap(0, Ordering::AcqRel);
            self.queue.took(id, n, Instant::now());
        }
    }

    fn stop(&mut self, within: Duration) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let until = Instant::now() + within;
        self.stop_until = Some(self.stop_until.map_or(until, |earlier| earlier.min(until)));
        self.queue.stop();
    }

    /// What both ends of a connection have agreed upon stays.
    fn configure(&mut self, config: config::Broker) {
        self.config = config::Broker {
            heartbeat: self.config.heartbeat,
            heartbeat_misses: self.config.heartbeat_misses,
            window: self.config.window,
            ..config
        };
        self.queue.configure(limits(&self.config));
        self.versions
            .configure(self.config.stale, self.config.broken_for);
        self.quarantine.configure(quarantine_rules(&self.config));
        self.breakers.configure(breaker_rules(&self.config));
        self.storm.configure(storm_rules(&self.config));
        self.shared.unsent.configure(self.config.reply_memory);
    }

    /// As long as requests wait here, no worker is too many; after that one is enough.
    /// True if somebody was sent away.
    fn release(&mut self) -> bool {
        if !self.releasing || self.queue.n_waiting() > 0 {
            return false;
        }
        let stay = || self.workers.iter().filter(|(_, it)| it.leaving.is_none());
        let idle = stay().find(|(_, it)| it.serving.is_none());
        let Some(peer) = idle.map(|(peer, _)| peer.clone()) else {
            return false;
        };
        if stay().count() < 2 {
            return false;
        }
        self.queue.gone(&peer, Instant::now());
        self.bury(&peer, "it goes to our successor", Some(Departure::Left));
        let reason = Reason::Stopping;
        self.send(&peer, Message::Disconnect(Disconnect { reason }));
        true
    }

    fn tell_pools(&mut self, reason: Reason) {
        let mut told = HashSet::new();
        let pools = self
            .workers
            .iter()
            .map(|(peer, worker)| (peer, &worker.ready.pool_instance));
        let peers: Vec<Peer> = pools
            .filter(|(_, pool)| told.insert(*pool))
            .map(|(peer, _)| peer.clone())
            .collect();
        for peer in peers {
            self.send(&peer, Message::Disconnect(Disconnect { reason }));
        }
    }

    /// Who asks from here on wants a later one.
    fn publish(&self) {
        self.shared.status_wanted.swap(false, Ordering::AcqRel);
        self.published.send_replace(self.status());
    }

    fn status(&self) -> Status {
        let now = Instant::now();
        let workers = self.workers.iter();
        let workers = workers.map(|(peer, it)| it.status(self.queue.open(peer)));
        let mut workers: Vec<Worker> = workers.collect();
        workers
            .sort_by(|a, b| (&a.ready.pool, a.ready.number).cmp(&(&b.ready.pool, b.ready.number)));
        let lane = |(line, n_waiting, n_running): (super::lanes::Line, usize, usize)| Lane {
            name: line.name(),
            n_waiting,
            n_running,
        };
        let (n_long, long_max) = self.queue.long();
        let crowd = self.queue.crowd();
        Status {
            n_waiting: self.queue.n_waiting(),
            n_running: self.queue.n_running(),
            lanes: self.queue.lines().map(lane).into(),
            n_long,
            long_max,
            top_clients: crowd.top_clients(TOP),
            top_projects: crowd.top_projects(TOP),
            workers,
            quarantined: self.quarantine.list(now),
            breakers: self.breakers.list(now),
            stalled: self.queue.stalled(),
            departures: self.departures,
            storm: self.storm.is_on(),
            n_retried: self.shared.metrics.retries.get(),
            bad_layers: self.troubled.list(now),
            exceptions: self.exceptional.list(now),
        }
    }

    // From the workers.

    fn event(&mut self, event: Event) {
        match event {
            Event::Message(peer, frames) => match Message::decode(&frames) {
                Ok(message) => self.received(peer, message),
                Err(error) => self.refuse(&peer, &error.to_string()),
            },
            Event::Gone(peer) => self.lost(&peer, "its connection ended", None),
        }
        self.act();
    }

    fn received(&mut self, peer: Peer, message: Message) {
        match message {
            Message::Ready(ready) => self.ready(peer, ready),
            Message::Partial(partial, bytes) => self.partial(&peer, partial, bytes),
            Message::Final(last, bytes) => self.finished(&peer, last, bytes),
            Message::Heartbeat => {
                if !self.queue.heard(&peer, Instant::now()) {
                    self.send_away(&peer);
                }
            }
            Message::Disconnect(_) => self.leaving(&peer),
            message @ (Message::Request(..) | Message::Credit(_) | Message::Cancel(_)) => {
                self.refuse(&peer, &format!("{} is the server's to say", message.word()));
            }
        }
    }

    fn leaving(&mut self, peer: &Peer) {
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.leaving.get_or_insert(Departure::Left);
        }
        self.queue.leaving(peer, Instant::now());
    }

    fn ready(&mut self, peer: Peer, ready: Ready) {
        let earlier = self.workers.iter().find(|(other, worker)| {
            **other != peer && !ready.instance.is_empty() && worker.ready.instance == ready.instance
        });
        if let Some((earlier, _)) = earlier.map(|(peer, worker)| (peer.clone(), worker)) {
            let departure = Some(Departure::Reconnected);
            self.lost(&earlier, "it connected anew", departure);
            self.transport.close(&earlier);
        }
        if !self.queue.ready(&peer, Instant::now()) {
            return tracing::warn!(worker = %Name(self.workers.get(&peer)), "READY while busy, ignored");
        }
        if let Some(worker) = self.workers.get_mut(&peer) {
            worker.ready = ready;
            return;
        }
        let worker = Member::new(ready);
        let because = worker.ready.born.because;
        self.shared.metrics.took_place(because);
        tracing::info!(%worker, because = because.name(), qgis = worker.ready.versions.qgis, "ready");
        let n_open = u32::try_from(worker.ready.projects.len()).unwrap_or(u32::MAX);
        for project in &worker.ready.projects {
            let name: Called = name_of(Some(project)).into();
            self.queue.opened(&peer, &name, n_open);
        }
        self.workers.insert(peer, worker);
        let answers = self.workers.values().any(|it| it.ready.plugins_answer);
        self.shared.plugins_answer.store(answers, Ordering::Relaxed);
    }

    fn partial(&mut self, peer: &Peer, partial: Partial, bytes: Bytes) {
        let Partial {
            id,
            head,
            edition,
            load_us,
        } = partial;
        let now = Instant::now();
        match self.queue.partial(peer, id, head.is_some(), now) {
            Fate::Drop | Fate::Expelled => return,
            Fate::Stranger => return self.send_away(peer),
            Fate::Deliver => {}
        }
        if let Some(edition) = &edition {
            self.went_out(peer, edition, now);
        }
        let pending = self.calls.get_mut(&id).expect("the queue knows only calls");
        if let Answer::Stream { items, .. } = &pending.answer {
            let items = items.clone();
            self.store(id, bytes, now);
            // Full is impossible within the window. Closed: a withdrawal is on its way.
            let _ = items.try_send(Item::Chunk);
            return;
        }
        pending.call.body = Bytes::new();
        let (items, receiver) = mpsc::channel(self.config.window as usize + 1);
        let taken = Arc::new(AtomicU32::new(0));
        let _ = items.try_send(Item::Chunk);
        let stream = Answer::Stream {
            items,
            taken: taken.clone(),
        };
        let Answer::Whole(answer) = std::mem::replace(&mut pending.answer, stream) else {
            unreachable!("it was checked above");
        };
        let commands = self.commands.clone();
        let stream = Stream {
            id,
            items: receiver,
            taken,
            commands,
            shared: self.shared.clone(),
            ended: false,
        };
        let body = Body {
            state: State::Stream(stream),
            outcome: None,
            queued: pending.call.wait.until(now),
            load: load_us.map(Duration::from_micros),
        };
        let head = head.expect("the queue expels a worker whose reply begins without");
        let request_id = &self.calls[&id].call.request_id;
        self.shared.unsent.begin(id, request_id, now);
        self.store(id, bytes, now);
        // If nobody waits any more, dropping the body withdraws the call.
        let _ = answer.send(Ok(Reply { head, body }));
    }

    /// Until the client takes it, or has to go because all together are too much.
    fn store(&mut self, id: Id, bytes: Bytes, now: Instant) {
        for gone in self.shared.unsent.put(id, bytes, now) {
            self.shared.metrics.failed(Error::ReaderTooSlow.reason());
            tracing::warn!(
                request_id = gone.name,
                bytes = gone.bytes,
                "the memory for replies is full (server.reply_memory): this one goes, whose client \
                 has taken nothing for {:.1} s",
                gone.stood.as_secs_f64()
            );
            // Its worker need not make the rest. One that is done is not known here.
            self.queue.withdraw(gone.id, now);
        }
    }

    fn finished(&mut self, peer: &Peer, last: Final, bytes: Bytes) {
        let has_head = last.head.is_some() || last.failure.is_some();
        let now = Instant::now();
        let was_cancelled = self.serving(peer).is_some_and(|it| it.cancelled);
        if is_success(&last) && !is_free(&last) && !was_cancelled {
            let taken = Duration::from_micros(last.timings.render_us);
            self.queue.took_time(last.id, taken);
        }
        let fate = self
            .queue
            .finished(peer, last.id, has_head, last.leaving, now);
        match fate {
            Fate::Stranger => return self.send_away(peer),
            // Its obituary names the request.
            Fate::Expelled => return,
            Fate::Deliver | Fate::Drop => {}
        }
        self.told_edition(peer, &last, fate, now);
        let worker = self.workers.get_mut(peer);
        if let Some(serving) = worker.and_then(|worker| worker.ended(&last)) {
            if last.failure == Some(Failure::ProjectNotFound) {
                self.queue.found_none(&serving.name);
            }
            self.learn(peer, &serving, &last, now);
        }
        self.storm.answered();
        if !was_cancelled {
            self.clear(last.id, last.failure.is_none());
            self.doubt(&last, now);
        }
        // The worker has its next request before anybody is woken for its last answer.
        self.act();
        self.count_project(last.found);
        if fate == Fate::Deliver {
            let pending = self
                .calls
                .remove(&last.id)
                .expect("the queue knows only calls");
            if let Some(failure) = last.failure {
                self.shared.metrics.failed(failure.reason());
            }
            let queued = pending.call.wait.until(now);
            match pending.answer {
                Answer::Stream { .. } if last.failure.is_none() => {
                    self.store(last.id, bytes, now);
                    pending.answer.end(last, Bytes::new(), queued);
                }
                _ => pending.answer.end(last, bytes, queued),
            }
        }
    }

    /// What the end of a request says about its project and about plugins.
    fn learn(&mut self, peer: &Peer, serving: &Serving, last: &Final, now: Instant) {
        if let Some(raised) = &last.raised {
            self.exceptional.heard(raised, now);
        }
        let Some(project) = &serving.project else {
            return;
        };
        self.troubled.heard(project, last, now);
        if last.found.is_some() {
            self.queue.opened(peer, &serving.name, last.n_projects);
        }
    }

    /// What the answer is made of, or what was loaded ahead.
    fn told_edition(&mut self, peer: &Peer, last: &Final, fate: Fate, now: Instant) {
        let edition = last.edition.as_ref();
        if let Some(errand) = self.errands.remove(&last.id) {
            let version = edition.map(|it| it.version.as_str());
            self.versions.prepared(&errand, version, now);
        } else if let Some(edition) = edition.filter(|_| fate == Fate::Deliver) {
            self.went_out(peer, edition, now);
        }
    }

    /// A client gets an answer that is made of this.
    fn went_out(&mut self, peer: &Peer, edition: &Edition, now: Instant) {
        let serving = self.workers.get(peer).and_then(|it| it.serving.as_ref());
        let Some(serving) = serving else {
            return;
        };
        if let Some(project) = &serving.project {
            self.patience = serving.timeout;
            self.versions
                .answered(peer, project, &serving.asked, edition, now);
        }
    }

    /// Lets a worker load what a changed project is now, while others answer with what it
    /// was. True if there is such a worker.
    fn send_errand(&mut self) -> bool {
        if self.config.stale.is_zero() || self.stop_until.is_some() {
            return false;
        }
        let now = Instant::now();
        let stays = |peer: &Peer| {
            self.workers
                .get(peer)
                .is_some_and(|it| it.leaving.is_none())
        };
        let Some(errand) = self.versions.errand(now, stays) else {
            return false;
        };
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let call = Call {
            request_id: format!("prepare-{id}"),
            method: "GET".into(),
            url: String::new(),
            headers: Vec::new(),
            body: Bytes::new(),
            project: Some(errand.project.clone()),
            operation: "prepare".into(),
            retry: false,
            cancel: false,
            timeout: self.patience,
            trace: None,
            client: "".into(),
            work: Work::default(),
            cause: None,
            visitor: None,
            document: None,
            wait: Wait::since(now),
        };
        tracing::debug!(project = %errand.project, "changed: a worker loads it beside the old one");
        let ticket = self.ticket(&call);
        // Nobody waits for the answer.
        let answer = Answer::Whole(oneshot::channel().0);
        let pending = Pending::new(Box::new(call), ticket.project.clone(), answer);
        self.calls.insert(id, pending);
        let peer = errand.peer.clone();
        self.errands.insert(id, errand);
        self.queue.errand(&peer, id, ticket, now);
        true
    }

    /// Nothing came of it.
    fn give_up_errand(&mut self, id: Id) {
        if let Some(errand) = self.errands.remove(&id) {
            self.versions.prepared(&errand, None, Instant::now());
        }
    }

    fn count_project(&self, found: Option<Found>) {
        let metrics = &self.shared.metrics;
        match found {
            Some(Found::Cached) => metrics.projects_cached.inc(),
            Some(Found::Loaded) => metrics.projects_loaded.inc(),
            Some(Found::Reloaded) => metrics.projects_reloaded.inc(),
            None => {}
        }
    }

    /// A worker ended a request by itself; `well`: with an answer from QGIS.
    fn clear(&mut self, id: Id, well: bool) {
        let Some(pending) = self.calls.get_mut(&id) else {
            return;
        };
        if well && !self.quarantine.is_empty() {
            let fingerprint = pending.fingerprint(&self.quarantine);
            self.quarantine.answered(fingerprint);
        }
        if let Some(project) = &pending.call.project
            && self.breakers.answered(project, id) == Some(Change::Closed)
        {
            tracing::warn!(%project, "the project answers again: its breaker is closed");
        }
    }

    /// From a peer that we do not know, or do not understand.
    fn refuse(&mut self, peer: &Peer, why: &str) {
        if let Some(suppressed) = self.refusals.allow(Instant::now()) {
            let name = Name(self.workers.get(peer));
            tracing::warn!(peer = %hex(peer), worker = %name, why, suppressed, "refused a message");
        }
        self.lost(peer, why, Some(Departure::Refused));
        self.send_away(peer);
    }

    fn send_away(&mut self, peer: &Peer) {
        let message = Message::Disconnect(Disconnect {
            reason: Reason::Unknown,
        });
        let _ = self.transport.send(peer, message.encode());
        self.transport.close(peer);
    }

    /// A worker is gone, or as good as gone. Without a departure it is seen from what it did.
    fn lost(&mut self, peer: &Peer, why: &str, departure: Option<Departure>) {
        let now = Instant::now();
        // Its pool may find out that it stands still before we do, and end it.
        let stood_still =
            self.serving(peer).is_some_and(|it| it.cancelled) && self.queue.is_late(peer, now);
        let departure = departure.or(stood_still.then_some(Departure::Silent));
        self.queue.gone(peer, now);
        self.bury(peer, why, departure);
    }

    fn bury(&mut self, peer: &Peer, why: &str, departure: Option<Departure>) {
        let Some(worker) = self.workers.remove(peer) else {
            return;
        };
        self.versions.gone(peer, Instant::now());
        let departure = self.departure(&worker, departure);
        self.departures.note(departure);
        let reason = departure.name();
        match &worker.serving {
            None => tracing::info!(%worker, why, reason, n_served = worker.n_served, "gone"),
            Some(Serving {
                request_id,
                operation,
                project,
                ..
            }) => {
                let project = project.as_ref().map(ToString::to_string);
                tracing::warn!(%worker, why, reason, request_id, operation, project, "gone while serving");
            }
        }
        self.blame(&worker, departure);
    }

    fn departure(&self, worker: &Member, seen: Option<Departure>) -> Departure {
        match (seen, worker.leaving, &worker.serving) {
            (None | Some(Departure::Silent | Departure::Left), Some(announced), _) => announced,
            (Some(seen), ..) => seen,
            (None, None, None) => Departure::Idle,
            (None, None, Some(serving))
                if !serving.cancelled && self.calls.contains_key(&serving.id) =>
            {
                Departure::Serving
            }
            // It was cancelled, and a worker that cannot stop ends itself.
            (None, None, Some(_)) => Departure::Stuck,
        }
    }

    /// What its end says about its request, its project and the server.
    fn blame(&mut self, worker: &Member, departure: Departure) {
        let now = Instant::now();
        if departure.is_death() && self.storm.died(&worker.ready.pool_instance, now) {
            tracing::error!(
                "workers die faster than they answer: the server is not ready until none died for {:.1} s",
                self.config.storm_period.as_secs_f64()
            );
            self.shared.storm.store(true, Ordering::Relaxed);
        }
        let accused = worker.serving.as_ref().and_then(|it| self.accused(it));
        let held = accused.as_ref().map(|it| it.fingerprint);
        let stood_still =
            departure == Departure::Silent && self.fell_silent_alone(&worker.ready.host, held, now);
        let Some(serving) = &worker.serving else {
            return;
        };
        if departure == Departure::Stuck && !serving.timed_out && serving.had_its_time(now) {
            self.timed_out(serving.project.as_ref(), now);
        }
        let was_killed = match departure {
            Departure::Silent => stood_still,
            _ => departure.is_death() && !serving.cancelled,
        };
        if let Some(accused) = accused.filter(|_| was_killed) {
            self.accuse(&accused, now);
        }
    }

    /// Or others of its machine did so, too.
    fn fell_silent_alone(&mut self, host: &str, held: Option<Fingerprint>, now: Instant) -> bool {
        let within = self.config.heartbeat * 3 / 2;
        let verdict = self.silences.missed(host, held, within, now);
        for innocent in verdict.cleared {
            self.quarantine.take_back(innocent);
        }
        verdict.is_own
    }

    fn fingerprint(&self, serving: &Serving) -> Option<Fingerprint> {
        let pending = self.calls.get(&serving.id);
        let known = pending.and_then(|it| it.fingerprint);
        let known = known.or(serving.fingerprint);
        known.or_else(|| Some(self.quarantine.fingerprint(&pending?.call)))
    }

    fn accused(&self, serving: &Serving) -> Option<Accused> {
        Some(Accused {
            fingerprint: self.fingerprint(serving)?,
            request_id: serving.request_id.clone(),
            operation: serving.operation.clone(),
            project: serving.name.to_string(),
        })
    }

    /// It ended its worker.
    fn accuse(&mut self, accused: &Accused, now: Instant) {
        if !self.quarantine.died(accused, now) {
            return;
        }
        self.recheck = true;
        tracing::warn!(
            request_id = accused.request_id,
            operation = accused.operation,
            project = %accused.project,
            fingerprint = %accused.fingerprint,
            "it ended its workers: quarantined for {:.1} s",
            self.config.quarantine.as_secs_f64()
        );
    }

    /// A worker leaves because of what it answers: a new one is the price of that request.
    fn doubt(&mut self, last: &Final, now: Instant) {
        if !(last.leaving && last.failure == Some(Failure::QgisFailed)) {
            return;
        }
        let quarantine = &self.quarantine;
        let accused = self
            .calls
            .get_mut(&last.id)
            .map(|it| it.accused(quarantine));
        if let Some(accused) = accused {
            self.accuse(&accused, now);
        }
    }

    fn serving(&mut self, peer: &Peer) -> Option<&mut Serving> {
        self.workers.get_mut(peer)?.serving.as_mut()
    }

    fn timed_out(&mut self, project: Option<&ProjectRef>, now: Instant) {
        let Some(project) = project else {
            return;
        };
        if self.breakers.timed_out(project, now) == Some(Change::Opened) {
            self.recheck = true;
            tracing::warn!(
                %project,
                "the project does not answer in time: its breaker is open for {:.1} s",
                self.config.breaker_pause.as_secs_f64()
            );
        }
    }

    // What the queue decided.

    fn act(&mut self) {
        loop {
            let effects = self.queue.effects();
            if effects.is_empty() && std::mem::take(&mut self.recheck) {
                self.recheck_waiting();
                continue;
            }
            if effects.is_empty() && !self.release() && !self.send_errand() {
                break;
            }
            effects.into_iter().for_each(|effect| self.perform(effect));
        }
        self.shared
            .n_serving
            .store(self.queue.n_serving(), Ordering::Relaxed);
    }

    fn perform(&mut self, effect: Effect) {
        match effect {
            Effect::Assign { id, peer, left } => self.assign(id, &peer, left),
            Effect::Requeued { id } => self.requeued(id, "its worker died"),
            Effect::SteppedBack { id } => {
                self.requeued(id, "all workers waited for layers of this server")
            }
            Effect::GaveWay { id } => {
                self.requeued(id, "its project does not answer, and others waited")
            }
            Effect::Stalled { id } => self.stalled(id),
            Effect::Answer { id, error } => self.answer(id, error),
            Effect::Forget { id } => self.forget(id),
            Effect::Credit { peer, id, n } => self.send(&peer, Message::Credit(Credit { id, n })),
            Effect::Cancel { peer, id, grace } => {
                let grace_ms = grace.as_millis() as u64;
                let pending = self.calls.get_mut(&id);
                let fingerprint = pending.map(|it| it.fingerprint(&self.quarantine));
                let serving = self.serving(&peer);
                // It may be asked again, with less patience.
                let is_again = serving.is_some_and(|it| {
                    it.fingerprint = it.fingerprint.or(fingerprint);
                    std::mem::replace(&mut it.cancelled, true)
                });
                if !is_again {
                    self.shared.metrics.cancelled_running.inc();
                }
                self.send(&peer, Message::Cancel(Cancel { id, grace_ms }));
            }
            Effect::Farewell { peer } => {
                self.send(
                    &peer,
                    Message::Disconnect(Disconnect {
                        reason: Reason::Leaving,
                    }),
                );
            }
            Effect::Expel { peer, why } => self.expel(&peer, why),
        }
    }

    fn assign(&mut self, id: Id, peer: &Peer, left: Duration) {
        // Both are there, unless an effect before this one found the worker gone;
        // then the queue knows, and has decided anew.
        if !self.calls.contains_key(&id) || !self.workers.contains_key(peer) {
            return;
        }
        let now = Instant::now();
        if let Some(error) = self.objection(id, now) {
            return self.queue.refused(id, error, now);
        }
        let (pending, worker) = (&self.calls[&id], &self.workers[peer]);
        let call = &pending.call;
        let project = call.project.as_ref();
        let known = project.map(|project| self.versions.asked(project, now));
        let (seen, asked) = known.unwrap_or_default();
        let request = Request {
            id,
            request_id: call.request_id.clone(),
            first_byte_ms: self.patience_of_worker(id, left).as_millis() as u64,
            chunk_ms: self.patience_of_worker(id, call.timeout).as_millis() as u64,
            window: self.config.window,
            method: call.method.clone(),
            url: call.url.clone(),
            headers: call.headers.clone(),
            project: call.project.clone(),
            operation: call.operation.clone(),
            trace: call.trace.clone(),
            visitor: call.visitor.clone(),
            seen,
            prepare: self.errands.contains_key(&id),
            document: call.document.clone(),
        };
        let serving = Serving::of(id, pending, asked);
        let frames = Message::Request(request, call.body.clone()).encode();
        if frames[2].len() > HEAD_MAX {
            let error = Error::RequestTooLarge { limit: HEAD_MAX };
            return self.queue.refused(id, error, Instant::now());
        }
        tracing::debug!(request_id = call.request_id, %worker, "assigned");
        let sent = self.transport.send(peer, frames);
        if sent
            .as_ref()
            .map_or_else(|error| error.may_arrive, |()| true)
        {
            self.dispatched(id, peer, serving);
        }
        if let Err(error) = sent {
            self.undeliverable(peer, "REQUEST", &error);
        }
    }

    /// What may run on without its client is cancelled by us alone: at its deadline while
    /// the client waits, and later if it has left.
    fn patience_of_worker(&self, id: Id, timeout: Duration) -> Duration {
        let runs_on = !self.calls[&id].call.cancel && !self.errands.contains_key(&id);
        match runs_on {
            true => timeout.max(self.config.run_on_timeout),
            false => timeout,
        }
    }

    /// The worker may have it.
    fn dispatched(&mut self, id: Id, peer: &Peer, serving: Serving) {
        if !self.queue.sent(id) {
            self.drop_body(id);
        }
        let line = self.queue.line_of(id);
        if let Some(pending) = self.calls.get_mut(&id) {
            let waited = pending.call.wait.ended(Instant::now());
            if let Some(line) = line {
                self.shared.metrics.waited(line, waited);
            }
            pending.peer = Some(peer.clone());
            if let Some(why) = pending.again.take() {
                self.shared.metrics.retries.inc();
                let (request_id, operation) = (&serving.request_id, &serving.operation);
                tracing::warn!(
                    request_id,
                    operation,
                    why,
                    "is sent once more, to another worker"
                );
            }
        }
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.serving = Some(serving);
        }
    }

    fn stalled(&self, id: Id) {
        let Some(pending) = self.calls.get(&id) else {
            return;
        };
        tracing::warn!(
            project = %pending.name,
            request_id = pending.call.request_id,
            operation = pending.call.operation,
            "the project has not answered for {:.1} s: until it does it leaves workers to others \
             (lanes.stalled_seconds)",
            self.config.stalled.unwrap_or_default().as_secs_f64()
        );
    }

    fn requeued(&mut self, id: Id, why: &'static str) {
        let pending = self.calls.get_mut(&id);
        let pending = pending.expect("the queue knows only calls");
        (pending.peer, pending.again) = (None, Some(why));
        pending.call.wait.begins_again(Instant::now());
    }

    fn answer(&mut self, id: Id, error: Error) {
        self.give_up_errand(id);
        let pending = self.calls.remove(&id).expect("the queue knows only calls");
        let Call {
            request_id,
            operation,
            ..
        } = &*pending.call;
        match error {
            Error::WaitsForItself => tracing::warn!(request_id, operation, %error, "refused"),
            _ => tracing::debug!(request_id, operation, %error, "ended without a reply"),
        }
        self.shared.metrics.failed(error.reason());
        let now = Instant::now();
        match matches!(error, Error::TimedOut { .. }) && self.was_stalled(&pending, now) {
            true => self.timed_out(pending.call.project.as_ref(), now),
            false => self.ended(id, &pending.call, now),
        }
        let queued = Some(pending.call.wait.until(now));
        pending.answer.fail(Lost {
            queued,
            ..error.into()
        });
    }

    /// Whether the overdue request is its project's time-out.
    fn was_stalled(&mut self, pending: &Pending, now: Instant) -> bool {
        let worker = pending.peer.as_ref();
        let worker = worker.and_then(|peer| self.workers.get_mut(peer));
        let Some(serving) = worker.and_then(|worker| worker.serving.as_mut()) else {
            return false;
        };
        serving.timed_out = serving.had_its_time(now);
        serving.timed_out
    }

    fn forget(&mut self, id: Id) {
        self.give_up_errand(id);
        let Some(pending) = self.calls.remove(&id) else {
            return;
        };
        if pending.call.wait.never_ended() {
            self.shared.metrics.cancelled_waiting.inc();
        }
        self.ended(id, &pending.call, Instant::now());
    }

    /// In a way that says nothing about its project.
    fn ended(&mut self, id: Id, call: &Call, now: Instant) {
        if let Some(project) = &call.project {
            self.breakers.ended(project, id, now);
        }
    }

    fn expel(&mut self, peer: &Peer, why: Why) {
        let departure = match why {
            Why::Silent { .. } => Departure::Silent,
            Why::Stuck => Departure::Stuck,
            Why::Left => Departure::Left,
            Why::NotHeld | Why::Headless | Why::Overrun { .. } => Departure::Refused,
        };
        self.bury(peer, &why.to_string(), Some(departure));
        self.send_away(peer);
    }

    /// A peer that takes nothing is gone.
    fn send(&mut self, peer: &Peer, message: Message) {
        let word = message.word();
        if let Err(error) = self.transport.send(peer, message.encode()) {
            self.undeliverable(peer, word, &error);
        }
    }

    fn undeliverable(&mut self, peer: &Peer, word: &str, error: &Undeliverable) {
        let why = format!("{word} cannot be sent: {}", error.why);
        self.lost(peer, &why, None);
        self.transport.close(peer);
    }
}

fn limits(config: &config::Broker) -> Limits {
    Limits {
        queue_max: config.queue_max,
        client_max: config.client_max,
        project_max: config.project_max,
        client_rate: config.client_rate,
        lanes: Rules {
            reserved: config.reserved_workers,
            slow: config.slow,
            reserve: config.reserved_for,
        },
        stalled: config.stalled,
        queue_timeout: config.queue_timeout,
        heartbeat: config.heartbeat,
        silence: config.heartbeat * config.heartbeat_misses,
        window: config.window,
        cancel_grace: config.cancel_grace,
        run_on: config.run_on_timeout,
    }
}

/// Errors are cheap and say nothing about the next answer.
fn is_success(last: &Final) -> bool {
    last.failure.is_none() && last.head.as_ref().is_none_or(|head| head.status < 400)
}

/// The client had it and it was not made, which says nothing about making it.
fn is_free(last: &Final) -> bool {
    last.timings.render_us == 0 && last.head.as_ref().is_some_and(|head| head.status == 304)
}

fn quarantine_rules(config: &config::Broker) -> quarantine::Rules {
    quarantine::Rules {
        period: config.quarantine,
        deaths: config.quarantine_deaths,
    }
}

fn breaker_rules(config: &config::Broker) -> breaker::Rules {
    breaker::Rules {
        timeouts: config.breaker_timeouts,
        window: config.breaker_window,
        pause: config.breaker_pause,
        share: config.breaker_share,
    }
}

fn storm_rules(config: &config::Broker) -> deaths::Rules {
    deaths::Rules {
        deaths: config.storm_deaths,
        period: config.storm_period,
    }
}

impl Pending {
    fn new(call: Box<Call>, name: Called, answer: Answer) -> Self {
        Self {
            call,
            name,
            answer,
            fingerprint: None,
            peer: None,
            again: None,
        }
    }

    fn accused(&mut self, quarantine: &Quarantine) -> Accused {
        Accused {
            fingerprint: self.fingerprint(quarantine),
            request_id: self.call.request_id.clone(),
            operation: self.call.operation.clone(),
            project: self.name.to_string(),
        }
    }

    fn fingerprint(&mut self, quarantine: &Quarantine) -> Fingerprint {
        let known = self.fingerprint;
        let fingerprint = known.unwrap_or_else(|| quarantine.fingerprint(&self.call));
        self.fingerprint = Some(fingerprint);
        fingerprint
    }
}

impl Answer {
    fn end(self, last: Final, bytes: Bytes, queued: Duration) {
        if let Some(failure) = last.failure {
            return self.fail(Lost {
                error: Error::Failed(failure),
                queued: Some(queued),
                timings: Some(last.timings),
            });
        }
        let outcome = Outcome {
            timings: last.timings,
        };
        // In both cases a front that is gone needs no answer.
        match self {
            Self::Stream { items, .. } => drop(items.try_send(Item::Last(outcome))),
            Self::Whole(answer) => {
                let head = last
                    .head
                    .expect("the queue expels a worker whose reply has none");
                let body = Body {
                    state: State::Here(bytes),
                    load: Some(Duration::from_micros(outcome.timings.load_us)),
                    outcome: Some(outcome),
                    queued,
                };
                let _ = answer.send(Ok(Reply { head, body }));
            }
        }
    }

    fn fail(self, lost: Lost) {
        match self {
            Self::Stream { items, .. } => drop(items.try_send(Item::Broken(lost.error))),
            Self::Whole(answer) => drop(answer.send(Err(lost))),
        }
    }
}

impl Serving {
    fn of(id: Id, Pending { call, name, .. }: &Pending, asked: Asked) -> Self {
        Self {
            id,
            name: name.clone(),
            request_id: call.request_id.clone(),
            operation: call.operation.clone(),
            project: call.project.clone(),
            asked,
            since: Instant::now(),
            timeout: call.timeout,
            timed_out: false,
            cancelled: false,
            fingerprint: None,
        }
    }

    /// Until its deadline.
    fn left(&self, now: Instant) -> Duration {
        (self.since + self.timeout).saturating_duration_since(now)
    }

    /// Whether its worker had it for a good part of its time. Otherwise it had
    /// waited for too long, which is not its project's fault.
    fn had_its_time(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) >= self.timeout / 2
    }
}

impl Member {
    fn new(ready: Ready) -> Self {
        Self {
            ready,
            since: Instant::now(),
            serving: None,
            n_served: 0,
            memory_kb: 0,
            leaving: None,
        }
    }

    /// Its request ended, and this is what it was.
    fn ended(&mut self, last: &Final) -> Option<Serving> {
        self.n_served += 1;
        self.memory_kb = last.memory_kb;
        if last.leaving {
            self.leaving = Some(match last.failure {
                Some(Failure::QgisFailed) => Departure::Doubt,
                _ => Departure::Left,
            });
        }
        self.serving.take()
    }

    fn status(&self, projects: Vec<Called>) -> Worker {
        Worker {
            ready: self.ready.clone(),
            n_served: self.n_served,
            connected_for: self.since.elapsed(),
            memory_kb: self.memory_kb,
            projects,
            request: self.serving.as_ref().map(|serving| Running {
                request_id: serving.request_id.clone(),
                operation: serving.operation.clone(),
                project: serving.name.to_string(),
                since: serving.since.elapsed(),
            }),
        }
    }
}

/// A peer in a log line; strangers have no name.
struct Name<'a>(Option<&'a Member>);

impl std::fmt::Display for Name<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(worker) => worker.fmt(f),
            None => f.write_str("a stranger"),
        }
    }
}

fn hex(peer: &[u8]) -> String {
    peer.iter()
        .take(8)
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use std::io::Seek;
    use std::task::{Context, Poll, Waker};

    use super::super::tests::{get, ok};
    use super::*;
    use crate::protocol::{Head, Timings};

    /// A transport that remembers what was sent, and to whom nothing can be.
    #[derive(Default)]
    struct Wire {
        sent: Vec<(Peer, Message)>,
        dead: HashSet<Peer>,
    }

    impl Transport for Wire {
        async fn next(&mut self) -> Event {
            std::future::pending().await
        }

        fn send(&mut self, peer: &Peer, frames: Vec<Bytes>) -> Result<(), Undeliverable> {
            if self.dead.contains(peer) {
                return Err(Undeliverable {
                    why: "it is dead".into(),
                    may_arrive: false,
                });
            }
            let message = Message::decode(&frames).expect("it is ours");
            self.sent.push((peer.clone(), message));
            Ok(())
        }

        fn close(&mut self, _: &Peer) {}
    }

    type Answered = oneshot::Receiver<Result<Reply, Lost>>;

    impl Driver<Wire> {
        fn with_workers(names: &[&'static str]) -> Self {
            let config = config::Config::default().broker;
            let (commands, _) = mpsc::unbounded_channel();
            let (published, _) = watch::channel(Status::default());
            let shared = Arc::default();
            let mut driver = Self::new(Wire::default(), config, shared, commands, published);
            for name in names {
                driver.hear(name, Message::Ready(Ready::default()));
            }
            driver
        }

        fn hear(&mut self, peer: &'static str, message: Message) {
            self.event(Event::Message(peer.into(), message.encode()));
        }

        fn call(&mut self, id: Id, call: Call) -> Answered {
            let (answer, answered) = oneshot::channel();
            let call = Box::new(call);
            self.obey(Command::Call { id, call, answer });
            answered
        }

        fn finish(&mut self, peer: &'static str, id: Id) {
            let head = ok();
            let last = Final {
                id,
                head,
                ..Final::default()
            };
            self.hear(peer, Message::Final(last, Bytes::new()));
        }
    }

    /// A call whose body tells when it was dropped.
    fn post(retry: bool) -> (Call, std::sync::Weak<[u8]>) {
        let body: Arc<[u8]> = Arc::new([7; 1000]);
        let alive = Arc::downgrade(&body);
        let call = Call {
            body: Bytes::from_owner(body),
            retry,
            cancel: false,
            ..get("Transaction")
        };
        (call, alive)
    }

    #[test]
    fn a_body_that_is_not_sent_again_is_dropped_when_it_was_sent() {
        let mut driver = Driver::with_workers(&["a"]);
        let (call, alive) = post(false);
        let _answered = driver.call(1, call);
        driver.transport.sent.clear();
        assert_eq!(alive.strong_count(), 0);
    }

    #[test]
    fn a_body_that_may_be_sent_again_lives_until_the_reply_begins() {
        let mut driver = Driver::with_workers(&["a"]);
        let (call, alive) = post(true);
        let _answered = driver.call(1, call);
        driver.transport.sent.clear();
        assert_eq!(alive.strong_count(), 1);
        let head = ok();
        driver.hear(
            "a",
            Message::Partial(
                Partial {
                    id: 1,
                    head,
                    ..Partial::default()
                },
                Bytes::new(),
            ),
        );
        assert_eq!(alive.strong_count(), 0);
    }

    #[test]
    fn a_body_whose_client_left_is_dropped() {
        let mut driver = Driver::with_workers(&["a"]);
        let (call, alive) = post(true);
        let _answered = driver.call(1, call);
        driver.transport.sent.clear();
        driver.obey(Command::Withdraw { id: 1 });
        assert_eq!((alive.strong_count(), driver.calls.len()), (0, 1));
    }

    #[test]
    fn a_body_that_was_sent_twice_is_not_kept() {
        let mut driver = Driver::with_workers(&["a", "b"]);
        let (call, alive) = post(true);
        let _answered = driver.call(1, call);
        driver.event(Event::Gone("a".into()));
        assert_eq!(driver.transport.sent.len(), 2);
        driver.transport.sent.clear();
        assert_eq!(alive.strong_count(), 0);
    }

    /// The log lines of what `act` does.
    fn logged(act: impl FnOnce()) -> String {
        let mut lines = tempfile::tempfile().unwrap();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(Arc::new(lines.try_clone().unwrap()))
            .finish();
        tracing::subscriber::with_default(subscriber, act);
        lines.rewind().unwrap();
        io::read_to_string(lines).unwrap()
    }

    #[test]
    fn the_obituary_of_a_worker_with_a_wrong_reply_names_its_request() {
        let mut driver = Driver::with_workers(&["a"]);
        let mut answered = driver.call(1, get("GetMap"));
        let last = Final {
            id: 1,
            ..Final::default()
        };
        let headless = Message::Final(last, Bytes::new());
        let lines = logged(|| driver.hear("a", headless));
        assert_eq!(refusal(&mut answered), Error::WorkerDied);
        for part in [
            "gone while serving",
            "began without a head",
            "GetMap",
            "r-1",
        ] {
            assert!(lines.contains(part), "{part} in {lines}");
        }
    }

    #[test]
    fn only_replies_to_what_a_worker_holds_count_as_served() {
        let mut driver = Driver::with_workers(&["a"]);
        let _answered = driver.call(1, get("GetMap"));
        driver.obey(Command::Withdraw { id: 1 });
        driver.finish("a", 1);
        assert_eq!(driver.status().workers[0].n_served, 1);
        let lines = logged(|| driver.finish("a", 1));
        assert!(
            lines.contains("gone") && lines.contains("n_served=1"),
            "{lines}"
        );
    }

    #[test]
    fn however_many_ask_for_the_status_it_is_made_once_and_later() {
        let mut driver = Driver::with_workers(&["a"]);
        let (commands, mut inbox) = mpsc::unbounded_channel();
        let handle = Handle {
            commands,
            shared: driver.shared.clone(),
            status: driver.published.subscribe(),
        };
        let mut cx = Context::from_waker(Waker::noop());
        for n_workers in 1..=2 {
            let mut asking: Vec<_> = (0..100).map(|_| Box::pin(handle.status())).collect();
            for asked in &mut asking {
                assert!(asked.as_mut().poll(&mut cx).is_pending());
            }
            driver.obey(inbox.try_recv().unwrap());
            assert!(inbox.is_empty());
            for mut asked in asking {
                let Poll::Ready(status) = asked.as_mut().poll(&mut cx) else {
                    panic!("no status was published");
                };
                assert_eq!(status.workers.len(), n_workers);
            }
            driver.hear("b", Message::Ready(Ready::default()));
        }
    }

    #[test]
    fn a_head_that_a_worker_would_not_read_is_not_sent() {
        let mut driver = Driver::with_workers(&["a"]);
        let mut answered = driver.call(
            1,
            Call {
                url: "x".repeat(HEAD_MAX),
                ..get("GetMap")
            },
        );
        let refused = refusal(&mut answered);
        assert_eq!(refused, Error::RequestTooLarge { limit: HEAD_MAX });
        assert!(driver.transport.sent.is_empty());
        driver.call(2, get("GetMap"));
        assert_eq!(driver.transport.sent.len(), 1);
    }

    #[test]
    fn a_client_that_leaves_is_counted_by_where_its_request_was() {
        let mut driver = Driver::with_workers(&["a"]);
        let _answered = [1, 2].map(|id| driver.call(id, get("GetMap")));
        driver.obey(Command::Withdraw { id: 2 });
        let metrics = driver.shared.metrics.clone();
        let counted = || {
            (
                metrics.cancelled_waiting.get(),
                metrics.cancelled_running.get(),
            )
        };
        assert_eq!(counted(), (1, 0));
        driver.obey(Command::Withdraw { id: 1 });
        assert_eq!(counted(), (1, 1));
    }

    #[test]
    fn a_busy_worker_tells_whom_it_serves() {
        let mut driver = Driver::with_workers(&["a"]);
        assert!(driver.status().workers[0].request.is_none());
        let _answered = driver.call(1, get("GetMap"));
        let status = driver.status();
        let request = status.workers[0].request.as_ref().expect("it is busy");
        assert_eq!(
            (&*request.request_id, &*request.operation),
            ("r-1", "GetMap")
        );
    }

    #[test]
    fn a_broker_with_a_successor_sends_its_idle_workers_away_but_for_one() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        let mut first = driver.call(1, get("GetMap"));
        let mut second = driver.call(2, get("GetMap"));
        driver.obey(Command::Release);
        assert_eq!(driver.workers.len(), 2, "those that are busy");
        let told = |driver: &Driver<Wire>| {
            let goodbyes = driver.transport.sent.iter().filter(|(_, message)| {
                matches!(message, Message::Disconnect(it) if it.reason == Reason::Stopping)
            });
            goodbyes.count()
        };
        assert_eq!(told(&driver), 1);
        driver.finish("a", 1);
        driver.finish("b", 2);
        assert!(first.try_recv().unwrap().is_ok() && second.try_recv().unwrap().is_ok());
        assert_eq!((driver.workers.len(), told(&driver)), (1, 2));
        // It answers what still comes, and nothing else comes to it.
        let mut late = driver.call(3, get("GetMap"));
        let last = if driver.workers.contains_key(&Peer::from("a")) {
            "a"
        } else {
            "b"
        };
        driver.finish(last, 3);
        assert!(late.try_recv().unwrap().is_ok());
        assert_eq!(driver.workers.len(), 1);
    }

    #[test]
    fn new_settings_bound_the_queue_at_once_and_leave_alone_what_both_ends_agreed_upon() {
        let mut driver = Driver::with_workers(&[]);
        let mut waiting = driver.call(1, get("GetMap"));
        let config = config::Broker {
            queue_max: 1,
            window: 3,
            heartbeat: Duration::from_secs(9),
            ..config::Config::default().broker
        };
        driver.obey(Command::Configure(Box::new(config)));
        let refused = driver.call(2, get("GetMap")).try_recv().unwrap();
        let retry_after = Duration::from_secs(1);
        let full = Error::QueueFull {
            limit: 1,
            retry_after,
        };
        assert_eq!(refused.unwrap_err().error, full);
        assert!(waiting.try_recv().is_err(), "it waits still");
        let default = config::Config::default().broker;
        assert_eq!(driver.config.window, default.window);
        assert_eq!(driver.config.heartbeat, default.heartbeat);
    }

    /// The end of a request for which QGIS took so long.
    fn took(id: Id, status: u16, seconds: u64) -> Final {
        Final {
            id,
            head: ok().map(|head| Head { status, ..head }),
            timings: Timings {
                load_us: 0,
                render_us: seconds * 1_000_000,
            },
            ..Final::default()
        }
    }

    fn n_slow(driver: &Driver<Wire>) -> Option<usize> {
        let lanes = driver.status().lanes;
        let slow = lanes.iter().find(|lane| lane.name == "slow");
        slow.map(|lane| lane.n_running)
    }

    #[test]
    fn what_took_long_waits_among_the_slow_and_what_failed_teaches_nothing() {
        let mut driver = Driver::with_workers(&["a"]);
        for (id, status, expected) in [(1, 500, 0), (2, 200, 0), (3, 200, 1)] {
            let _answered = driver.call(id, get("GetMap"));
            assert_eq!(n_slow(&driver), Some(expected), "{id}");
            driver.hear("a", Message::Final(took(id, status, 60), Bytes::new()));
        }
    }

    #[test]
    fn what_a_client_had_already_does_not_teach_that_it_is_made_in_no_time() {
        let mut driver = Driver::with_workers(&["a"]);
        let mut hear = |id, status, seconds| {
            let _answered = driver.call(id, get("GetCapabilities"));
            let n_slow = n_slow(&driver);
            driver.hear("a", Message::Final(took(id, status, seconds), Bytes::new()));
            n_slow
        };
        hear(1, 200, 60);
        for id in 2..50 {
            assert_eq!(hear(id, 304, 0), Some(1), "{id}");
        }
    }

    #[test]
    fn a_changed_project_is_loaded_ahead_within_the_time_of_a_request() {
        let mut driver = Driver::with_workers(&["a"]);
        driver.config.stale = Duration::from_secs(3600);
        driver
            .versions
            .configure(driver.config.stale, Duration::ZERO);
        for (id, outdated) in [(1, false), (2, false), (3, true)] {
            let _answered = driver.call(id, of_project("city"));
            let edition = Edition {
                place: 7,
                version: "1".into(),
                outdated,
            };
            let last = Final {
                id,
                head: ok(),
                edition: Some(edition),
                ..Final::default()
            };
            driver.hear("a", Message::Final(last, Bytes::new()));
        }
        let asked = driver.transport.sent.iter().rev();
        let errand = asked.filter_map(|(_, message)| match message {
            Message::Request(request, _) if request.prepare => Some(request.clone()),
            _ => None,
        });
        let errand = errand.last().expect("it changed");
        let timeout = get("GetMap").timeout.as_millis();
        assert!(u128::from(errand.first_byte_ms) <= timeout, "{errand:?}");
    }

    #[test]
    fn the_worker_that_asks_is_known_by_its_instance() {
        let mut driver = Driver::with_workers(&[]);
        let instance = "4711".to_owned();
        let ready = Ready {
            instance,
            ..Ready::default()
        };
        driver.hear("a", Message::Ready(ready));
        driver.hear("b", Message::Ready(Ready::default()));
        let cause = |instance: &str| {
            let cause = Some(instance.to_owned());
            driver
                .ticket(&Call {
                    cause,
                    ..get("GetMap")
                })
                .cause
        };
        assert_eq!(cause("4711"), Some("a".into()));
        assert_eq!((cause("4712"), cause("")), (None, None));
    }

    #[test]
    fn a_request_that_could_not_be_sent_goes_to_the_next_worker() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        driver.transport.dead.extend(["a".into(), "b".into()]);
        let mut answered = driver.call(1, get("Transaction"));
        assert_eq!(driver.workers.len(), 1);
        driver.finish("c", 1);
        assert!(answered.try_recv().unwrap().is_ok());
    }

    /// Project `path`, so that breakers have something to look at.
    fn of_project(path: &str) -> Call {
        Call {
            project: Some(ProjectRef {
                alias: "file".into(),
                path: path.into(),
            }),
            ..get("GetMap")
        }
    }

    impl Driver<Wire> {
        fn gone(&mut self, peer: &'static str) {
            self.event(Event::Gone(peer.into()));
        }

        fn n_sent(&self) -> usize {
            let is_request = |(_, message): &&(Peer, Message)| message.word() == "REQUEST";
            self.transport.sent.iter().filter(is_request).count()
        }

        fn count(&self, departure: Departure) -> u64 {
            self.departures.of(departure)
        }
    }

    fn refusal(answered: &mut Answered) -> Error {
        answered.try_recv().unwrap().unwrap_err().error
    }

    #[test]
    fn a_get_that_was_killed_twice_is_refused_without_a_third_worker() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        let poison = || Call {
            retry: true,
            ..of_project("city")
        };
        let mut first = driver.call(1, poison());
        driver.gone("a");
        let lines = logged(|| driver.gone("b"));
        assert_eq!(refusal(&mut first), Error::WorkerDied);
        assert_eq!(lines.matches("quarantined").count(), 1, "{lines}");
        let lines = logged(|| {
            let mut second = driver.call(2, poison());
            assert!(matches!(refusal(&mut second), Error::Quarantined { .. }));
        });
        assert!(!lines.contains("WARN"), "said once: {lines}");
        assert_eq!((driver.n_sent(), driver.status().n_retried), (2, 1));
        let status = driver.status();
        assert_eq!(status.quarantined.len(), 1);
        assert_eq!(status.quarantined[0].n_refused, 1);
        assert_eq!(status.quarantined[0].project, "file:city");
        let _other = driver.call(3, of_project("lake"));
        assert_eq!(driver.n_sent(), 3, "others are served");
    }

    #[test]
    fn copies_that_wait_when_a_quarantine_begins_are_refused_with_it() {
        let mut driver = Driver::with_workers(&["a"]);
        let mut calls = [1, 2, 3].map(|id| driver.call(id, of_project("city")));
        driver.gone("a");
        driver.hear("b", Message::Ready(Ready::default()));
        driver.gone("b");
        assert_eq!(refusal(&mut calls[0]), Error::WorkerDied);
        assert_eq!(refusal(&mut calls[1]), Error::WorkerDied);
        assert!(matches!(refusal(&mut calls[2]), Error::Quarantined { .. }));
        assert!(driver.calls.is_empty() && driver.queue.n_waiting() == 0);
    }

    #[test]
    fn a_post_is_known_again_after_its_body_was_dropped() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        let mut calls = [1, 2, 3].map(|id| {
            let answered = driver.call(id, post(false).0);
            if let Some(peer) = ["a", "b"].get(id as usize - 1) {
                driver.gone(peer);
            }
            answered
        });
        assert!(matches!(refusal(&mut calls[2]), Error::Quarantined { .. }));
        let other = Call {
            body: "<other/>".into(),
            ..post(false).0
        };
        let _answered = driver.call(4, other);
        assert_eq!(driver.n_sent(), 3);
    }

    /// Whoever kills workers at random must not make all requests look guilty.
    #[test]
    fn a_request_whose_second_worker_answers_is_not_suspected() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        for (id, peer) in [(1, "a"), (2, "b")] {
            let retried = Call {
                retry: true,
                ..of_project("city")
            };
            let mut answered = driver.call(id, retried);
            driver.gone(peer);
            let next = if peer == "a" { "b" } else { "c" };
            driver.finish(next, id);
            assert!(answered.try_recv().unwrap().is_ok());
        }
        assert!(driver.quarantine.is_empty());
    }

    #[test]
    fn a_worker_that_said_goodbye_or_was_expelled_accuses_nobody() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        let _calls = [1, 2, 3].map(|id| driver.call(id, of_project("city")));
        let reason = Reason::Leaving;
        driver.hear("a", Message::Disconnect(Disconnect { reason }));
        driver.gone("a");
        driver.finish("b", 77);
        driver.obey(Command::Withdraw { id: 3 });
        driver.gone("c");
        assert!(driver.quarantine.is_empty());
        let counts = [Departure::Left, Departure::Refused, Departure::Stuck];
        assert_eq!(counts.map(|departure| driver.count(departure)), [1; 3]);
    }

    /// What the machine did was not the request's doing, and what one request does it does
    /// to one worker at a time.
    #[test]
    fn a_worker_that_falls_silent_alone_accuses_its_request_though_that_was_cancelled() {
        for (are_two, n_quarantined) in [(false, 1), (true, 0)] {
            let mut driver = Driver::with_workers(&[]);
            let mut now = Instant::now();
            for (id, names) in [(1, ["a", "b"]), (2, ["c", "d"])] {
                driver.silences = Silences::default();
                for name in names {
                    driver.hear(name, Message::Ready(Ready::default()));
                }
                let _answered = driver.call(id, of_project("city"));
                let mut workers = driver.workers.iter();
                let busy = workers.find(|(_, it)| it.serving.is_some());
                let peer = busy.expect("one is busy").0.clone();
                driver.obey(Command::Withdraw { id });
                // A driver reads the real clock, its queue does not.
                for _ in 0..3 {
                    now += driver.config.heartbeat;
                    let living = driver.workers.keys().filter(|it| **it != peer && !are_two);
                    living.for_each(|it| assert!(driver.queue.heard(it, now)));
                    driver.queue.tick(now);
                }
                driver.act();
                assert!(!driver.workers.contains_key(&peer));
            }
            assert_eq!(driver.status().quarantined.len(), n_quarantined);
            let n_silent = if are_two { 4 } else { 2 };
            assert_eq!(driver.count(Departure::Silent), n_silent);
        }
    }

    /// Out of memory, or a C++ exception: each time the price is a worker.
    #[test]
    fn a_request_that_leaves_qgis_in_doubt_twice_is_quarantined() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        for (id, peer) in [(1, "a"), (2, "b")] {
            let mut answered = driver.call(id, of_project("city"));
            let doubt = Final {
                id,
                failure: Some(Failure::QgisFailed),
                leaving: true,
                ..Final::default()
            };
            driver.hear(peer, Message::Final(doubt, Bytes::new()));
            assert_eq!(refusal(&mut answered), Error::Failed(Failure::QgisFailed));
        }
        let mut third = driver.call(3, of_project("city"));
        assert!(matches!(refusal(&mut third), Error::Quarantined { .. }));
    }

    /// Whatever kills them: who can still be served is, so that the server is ready, and
    /// those that were useful are replaced without a pause by their pool.
    #[test]
    fn workers_that_die_one_after_the_other_while_others_answer_are_no_storm() {
        let mut driver = Driver::with_workers(&["a"]);
        for id in 1..200 {
            driver.hear("b", Message::Ready(Ready::default()));
            driver.gone("b");
            let mut answered = driver.call(id, get("GetMap"));
            driver.finish("a", id);
            assert!(answered.try_recv().unwrap().is_ok());
            assert!(!driver.storm.is_on());
        }
        assert_eq!(driver.count(Departure::Idle), 199);
    }

    #[test]
    fn departures_are_counted_by_reason() {
        let mut driver = Driver::with_workers(&["a", "b", "c"]);
        driver.gone("b");
        let _answered = driver.call(1, get("GetMap"));
        driver.gone("a");
        let _answered = driver.call(2, get("GetMap"));
        let doubt = Final {
            id: 2,
            failure: Some(Failure::QgisFailed),
            leaving: true,
            ..Final::default()
        };
        driver.hear("c", Message::Final(doubt, Bytes::new()));
        driver.gone("c");
        let counts: Vec<_> = driver.status().departures.iter().collect();
        for (name, n) in counts {
            let expected = u64::from(["doubt", "idle", "serving"].contains(&name));
            assert_eq!(n, expected, "{name}");
        }
    }

    #[test]
    fn a_storm_of_deaths_turns_readiness_off_and_calm_turns_it_on_again() {
        let mut driver = Driver::with_workers(&[]);
        driver.storm = Storm::new(deaths::Rules {
            deaths: 2,
            period: Duration::from_millis(50),
        });
        let (commands, _inbox) = mpsc::unbounded_channel();
        let handle = Handle {
            commands,
            shared: driver.shared.clone(),
            status: driver.published.subscribe(),
        };
        let of_pool = |pool: &str| {
            Message::Ready(Ready {
                pool_instance: pool.into(),
                ..Ready::default()
            })
        };
        for (peer, pool) in [("a", "p"), ("b", "q"), ("c", "p")] {
            driver.hear(peer, of_pool(pool));
        }
        assert!(handle.is_ready());
        driver.gone("a");
        let lines = logged(|| driver.gone("b"));
        assert!(lines.contains("ERROR") && lines.contains("not ready"));
        assert!(!handle.is_ready() && driver.status().storm);
        let _served = driver.call(1, get("GetMap"));
        assert_eq!(driver.n_sent(), 1, "it serves what it can");
        let end = Instant::now() + Duration::from_secs(10);
        while !handle.is_ready() {
            assert!(Instant::now() < end, "it never calms down");
            driver.beat();
        }
        assert!(!driver.status().storm);
    }

    /// What runs has run for ten seconds; a driver reads the real clock.
    fn age(driver: &mut Driver<Wire>) {
        for worker in driver.workers.values_mut() {
            if let Some(serving) = &mut worker.serving {
                serving.since -= Duration::from_secs(10);
            }
        }
    }

    fn time_out(driver: &mut Driver<Wire>, id: Id) {
        driver.queue.tick(Instant::now() + Duration::from_secs(10));
        driver.act();
        assert!(!driver.calls.contains_key(&id));
    }

    #[test]
    fn time_outs_open_a_breaker_and_a_probe_closes_it() {
        let mut driver = Driver::with_workers(&[]);
        let mut config = driver.config.clone();
        config.breaker_timeouts = 1;
        config.breaker_pause = Duration::from_secs(1);
        driver.breakers = Breakers::new(breaker_rules(&config));
        driver.hear("a", Message::Ready(Ready::default()));
        let mut late = driver.call(1, of_project("city"));
        let mut waits = driver.call(2, of_project("city"));
        age(&mut driver);
        let lines = logged(|| time_out(&mut driver, 1));
        assert!(matches!(refusal(&mut late), Error::TimedOut { .. }));
        // By then its own time had come, too; the next one has not even that to wait for.
        assert!(waits.try_recv().unwrap().is_err());
        assert_eq!(lines.matches("its breaker is open").count(), 1, "{lines}");
        let mut refused = driver.call(3, of_project("city"));
        let Error::BreakerOpen { retry_after } = refusal(&mut refused) else {
            panic!("it is let in");
        };
        assert!(retry_after <= config.breaker_pause);
        assert_eq!(driver.status().breakers[0].n_refused, 1);
        driver.gone("a");
        driver.hear("b", Message::Ready(Ready::default()));
        let mut id = 3;
        while driver.n_sent() < 2 {
            id += 1;
            drop(driver.call(id, of_project("city")));
        }
        let lines = logged(|| driver.finish("b", id));
        assert!(lines.contains("answers again"), "{lines}");
        assert_eq!(driver.status().breakers, []);
        assert!(driver.breakers.is_quiet());
    }

    /// A client's own time-out may be shorter than ours.
    #[test]
    fn a_worker_that_is_stuck_after_its_client_left_counts_as_a_time_out() {
        let mut driver = Driver::with_workers(&["a"]);
        let _answered = driver.call(1, of_project("city"));
        driver.obey(Command::Withdraw { id: 1 });
        age(&mut driver);
        assert!(driver.breakers.is_quiet());
        driver.gone("a");
        assert!(!driver.breakers.is_quiet());
    }

    #[test]
    fn a_request_that_spent_its_time_in_the_queue_accuses_no_project() {
        let mut driver = Driver::with_workers(&["a"]);
        let mut late = driver.call(1, of_project("city"));
        time_out(&mut driver, 1);
        assert!(matches!(refusal(&mut late), Error::TimedOut { .. }));
        driver.gone("a");
        assert!(driver.breakers.is_quiet());
    }

    #[test]
    fn a_project_with_a_time_out_holds_its_share_of_the_workers() {
        let mut driver = Driver::with_workers(&["a", "b", "c", "d"]);
        let _others = driver.call(1, of_project("lake"));
        driver.timed_out(of_project("city").project.as_ref(), Instant::now());
        let mut calls = [2, 3, 4].map(|id| driver.call(id, of_project("city")));
        assert_eq!(driver.n_sent(), 3);
        let Error::ShareTaken { limit, retry_after } = refusal(&mut calls[2]) else {
            panic!("it is let in");
        };
        assert_eq!(limit, 2);
        let timeout = get("GetMap").timeout;
        let left = timeout / 2..=timeout;
        assert!(left.contains(&retry_after), "{retry_after:?}");
        driver.finish("b", 2);
        assert!(calls[0].try_recv().unwrap().is_ok());
        let _again = driver.call(5, of_project("city"));
        assert_eq!(driver.n_sent(), 4);
    }
}
