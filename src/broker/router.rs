//! The broker's task: acts on what `queue.rs` decides.
//!
//! One task owns the transport, the queue and the clock; handles and bodies talk
//! to it through a channel. It lives on the main thread, whose runtime has no
//! other, together with the HTTP connections that this thread serves: to pass a
//! request from one thread to another costs more than all that happens to it
//! here. Nothing in the task waits but the one `select!` of [`Driver::run`]:
//! sends are queued or fail, and a reply goes to the front by `try_send` into a
//! channel that the window bounds.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::SocketAddr;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{self, MissedTickBehavior};

use super::cost::Kind;
use super::gate::{self, Gate};
use super::lanes::{Rules, Sort};
use super::queue::{Effect, Fate, Id, Limits, Peer, Queue, Ticket, Why};
use super::throttle::Throttle;
use super::transport::{Event, Router, Transport, Undeliverable};
use super::{
    Body, Broker, Call, Command, Error, Handle, Item, Lane, Name as Called, Outcome, Reply, Shared,
    State, Status, Stream, Worker,
};
use crate::config;
use crate::directory::{self, Directory};
use crate::protocol::{
    Cancel, Credit, Disconnect, Final, HEAD_MAX, Message, Partial, Ready, Reason, Request,
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
pub async fn start(config: &config::Broker) -> Result<(Handle, Broker), StartError> {
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
        let gate = Gate::open(address, path, gate_limits(config))
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
    refusals: Throttle,
    shared: Arc<Shared>,
    /// For the bodies of streams.
    commands: mpsc::UnboundedSender<Command>,
    published: watch::Sender<Status>,
    stop_until: Option<Instant>,
}

/// A call without an end.
struct Pending {
    call: Box<Call>,
    answer: Answer,
}

/// Where its answer goes.
enum Answer {
    Whole(oneshot::Sender<Result<Reply, Error>>),
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
}

/// For status and log, until FINAL.
struct Serving {
    request_id: String,
    operation: String,
    project: String,
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
        Self {
            queue: Queue::new(limits(&config), Instant::now()),
            config,
            transport,
            calls: HashMap::new(),
            workers: HashMap::new(),
            refusals: Throttle::default(),
            shared,
            commands,
            published,
            stop_until: None,
        }
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Command>) {
        let mut beat = time::interval(self.config.heartbeat.max(Duration::from_millis(1)));
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut alarm = pin!(time::sleep(Duration::ZERO));
        let mut armed = None;
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
            }
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
        self.stop_until.is_some() && self.queue.n_waiting() + self.queue.n_running() == 0
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
            Command::Stop { within } => self.stop(within),
        }
        self.act();
    }

    fn submit(&mut self, id: Id, call: Box<Call>, answer: oneshot::Sender<Result<Reply, Error>>) {
        let ticket = self.ticket(&call);
        self.calls.insert(
            id,
            Pending {
                call,
                answer: Answer::Whole(answer),
            },
        );
        self.queue.submit(id, ticket, Instant::now());
    }

    fn ticket(&self, call: &Call) -> Ticket {
        let project = call.project.as_ref().map(ToString::to_string);
        let project: Called = project.unwrap_or_default().into();
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
        let mut workers: Vec<Worker> = self.workers.values().map(Member::status).collect();
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
        }
    }

    // From the workers.

    fn event(&mut self, event: Event) {
        match event {
            Event::Message(peer, frames) => match Message::decode(&frames) {
                Ok(message) => self.received(peer, message),
                Err(error) => self.refuse(&peer, &error.to_string()),
            },
            Event::Gone(peer) => self.lost(&peer, "its connection ended"),
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
            Message::Disconnect(_) => self.queue.leaving(&peer, Instant::now()),
            message @ (Message::Request(..) | Message::Credit(_) | Message::Cancel(_)) => {
                self.refuse(&peer, &format!("{} is the server's to say", message.word()));
            }
        }
    }

    fn ready(&mut self, peer: Peer, ready: Ready) {
        let earlier = self.workers.iter().find(|(other, worker)| {
            **other != peer && !ready.instance.is_empty() && worker.ready.instance == ready.instance
        });
        if let Some((earlier, _)) = earlier.map(|(peer, worker)| (peer.clone(), worker)) {
            self.lost(&earlier, "it connected anew");
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
        tracing::info!(%worker, qgis = worker.ready.versions.qgis, "ready");
        self.workers.insert(peer, worker);
    }

    fn partial(&mut self, peer: &Peer, partial: Partial, bytes: Bytes) {
        let Partial { id, head } = partial;
        match self.queue.partial(peer, id, head.is_some(), Instant::now()) {
            Fate::Drop | Fate::Expelled => return,
            Fate::Stranger => return self.send_away(peer),
            Fate::Deliver => {}
        }
        let pending = self.calls.get_mut(&id).expect("the queue knows only calls");
        if let Answer::Stream { items, .. } = &pending.answer {
            // Full is impossible within the window. Closed: a withdrawal is on its way.
            let _ = items.try_send(Item::Chunk(bytes));
            return;
        }
        pending.call.body = Bytes::new();
        let (items, receiver) = mpsc::channel(self.config.window as usize + 1);
        let taken = Arc::new(AtomicU32::new(0));
        let _ = items.try_send(Item::Chunk(bytes));
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
            ended: false,
        };
        let body = Body {
            state: State::Stream(stream),
            outcome: None,
        };
        let head = head.expect("the queue expels a worker whose reply begins without");
        // If nobody waits any more, dropping the body withdraws the call.
        let _ = answer.send(Ok(Reply { head, body }));
    }

    fn finished(&mut self, peer: &Peer, last: Final, bytes: Bytes) {
        let has_head = last.head.is_some() || last.failure.is_some();
        let now = Instant::now();
        if is_success(&last) {
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
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.serving = None;
            worker.n_served += 1;
            worker.memory_kb = last.memory_kb;
        }
        if fate == Fate::Deliver {
            let pending = self
                .calls
                .remove(&last.id)
                .expect("the queue knows only calls");
            pending.answer.end(last, bytes);
        }
    }

    /// From a peer that we do not know, or do not understand.
    fn refuse(&mut self, peer: &Peer, why: &str) {
        if let Some(suppressed) = self.refusals.allow(Instant::now()) {
            let name = Name(self.workers.get(peer));
            tracing::warn!(peer = %hex(peer), worker = %name, why, suppressed, "refused a message");
        }
        self.lost(peer, why);
        self.send_away(peer);
    }

    fn send_away(&mut self, peer: &Peer) {
        let message = Message::Disconnect(Disconnect {
            reason: Reason::Unknown,
        });
        let _ = self.transport.send(peer, message.encode());
        self.transport.close(peer);
    }

    /// A worker is gone, or as good as gone.
    fn lost(&mut self, peer: &Peer, why: &str) {
        self.queue.gone(peer, Instant::now());
        self.bury(peer, why);
    }

    fn bury(&mut self, peer: &Peer, why: &str) {
        let Some(worker) = self.workers.remove(peer) else {
            return;
        };
        match &worker.serving {
            None => tracing::info!(%worker, why, n_served = worker.n_served, "gone"),
            Some(Serving {
                request_id,
                operation,
                project,
            }) => {
                tracing::warn!(%worker, why, request_id, operation, project, "gone while serving");
            }
        }
    }

    // What the queue decided.

    fn act(&mut self) {
        loop {
            let effects = self.queue.effects();
            if effects.is_empty() {
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
            Effect::Answer { id, error } => self.answer(id, error),
            Effect::Forget { id } => drop(self.calls.remove(&id)),
            Effect::Credit { peer, id, n } => self.send(&peer, Message::Credit(Credit { id, n })),
            Effect::Cancel { peer, id, grace } => {
                let grace_ms = grace.as_millis() as u64;
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
        let (Some(pending), Some(worker)) = (self.calls.get(&id), self.workers.get(peer)) else {
            return;
        };
        let call = &pending.call;
        let request = Request {
            id,
            request_id: call.request_id.clone(),
            first_byte_ms: left.as_millis() as u64,
            chunk_ms: call.timeout.as_millis() as u64,
            window: self.config.window,
            method: call.method.clone(),
            url: call.url.clone(),
            headers: call.headers.clone(),
            project: call.project.clone(),
            operation: call.operation.clone(),
        };
        let serving = Serving::of(call);
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

    /// The worker may have it.
    fn dispatched(&mut self, id: Id, peer: &Peer, serving: Serving) {
        if !self.queue.sent(id) {
            self.drop_body(id);
        }
        if let Some(worker) = self.workers.get_mut(peer) {
            worker.serving = Some(serving);
        }
    }

    fn requeued(&mut self, id: Id, why: &str) {
        let call = &self
            .calls
            .get(&id)
            .expect("the queue knows only calls")
            .call;
        let Call {
            request_id,
            operation,
            ..
        } = &**call;
        tracing::warn!(
            request_id,
            operation,
            why,
            "is sent once more, to another worker"
        );
    }

    fn answer(&mut self, id: Id, error: Error) {
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
        pending.answer.fail(error);
    }

    fn expel(&mut self, peer: &Peer, why: Why) {
        self.bury(peer, &why.to_string());
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
        self.lost(peer, &format!("{word} cannot be sent: {}", error.why));
        self.transport.close(peer);
    }
}

fn limits(config: &config::Broker) -> Limits {
    Limits {
        queue_max: config.queue_max,
        client_max: config.client_max,
        project_max: config.project_max,
        lanes: Rules {
            reserved: config.reserved_workers,
            slow: config.slow,
            reserve: config.reserved_for,
        },
        queue_timeout: config.queue_timeout,
        heartbeat: config.heartbeat,
        silence: config.heartbeat * config.heartbeat_misses,
        window: config.window,
        cancel_grace: config.cancel_grace,
    }
}

/// Errors are cheap and say nothing about the next answer.
fn is_success(last: &Final) -> bool {
    last.failure.is_none() && last.head.as_ref().is_none_or(|head| head.status < 400)
}

impl Answer {
    fn end(self, last: Final, bytes: Bytes) {
        if let Some(failure) = last.failure {
            return self.fail(Error::Failed(failure));
        }
        let outcome = Outcome {
            timings: last.timings,
            project_modified: last.project_modified,
        };
        // In both cases a front that is gone needs no answer.
        match self {
            Self::Stream { items, .. } => drop(items.try_send(Item::Last(bytes, outcome))),
            Self::Whole(answer) => {
                let head = last
                    .head
                    .expect("the queue expels a worker whose reply has none");
                let body = Body {
                    state: State::Here(bytes),
                    outcome: Some(outcome),
                };
                let _ = answer.send(Ok(Reply { head, body }));
            }
        }
    }

    fn fail(self, error: Error) {
        match self {
            Self::Stream { items, .. } => drop(items.try_send(Item::Broken(error))),
            Self::Whole(answer) => drop(answer.send(Err(error))),
        }
    }
}

impl Serving {
    fn of(call: &Call) -> Self {
        Self {
            request_id: call.request_id.clone(),
            operation: call.operation.clone(),
            project: call
                .project
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
        }
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
        }
    }

    fn status(&self) -> Worker {
        Worker {
            ready: self.ready.clone(),
            serving: self
                .serving
                .as_ref()
                .map(|serving| serving.operation.clone()),
            n_served: self.n_served,
            connected_for: self.since.elapsed(),
            memory_kb: self.memory_kb,
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

    type Answered = oneshot::Receiver<Result<Reply, Error>>;

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
        driver.hear("a", Message::Partial(Partial { id: 1, head }, Bytes::new()));
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
        assert_eq!(answered.try_recv().unwrap().unwrap_err(), Error::WorkerDied);
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
        let refused = answered.try_recv().unwrap().unwrap_err();
        assert_eq!(refused, Error::RequestTooLarge { limit: HEAD_MAX });
        assert!(driver.transport.sent.is_empty());
        driver.call(2, get("GetMap"));
        assert_eq!(driver.transport.sent.len(), 1);
    }

    #[test]
    fn what_took_long_waits_among_the_slow_and_what_failed_teaches_nothing() {
        let mut driver = Driver::with_workers(&["a"]);
        let took = |id, status, seconds: u64| Final {
            id,
            head: ok().map(|head| Head { status, ..head }),
            timings: Timings {
                load_us: 0,
                render_us: seconds * 1_000_000,
            },
            ..Final::default()
        };
        let n_slow = |driver: &Driver<Wire>| {
            let lanes = driver.status().lanes;
            let slow = lanes.iter().find(|lane| lane.name == "slow");
            slow.map(|lane| lane.n_running)
        };
        for (id, status, expected) in [(1, 500, 0), (2, 200, 0), (3, 200, 1)] {
            let _answered = driver.call(id, get("GetMap"));
            assert_eq!(n_slow(&driver), Some(expected), "{id}");
            driver.hear("a", Message::Final(took(id, status, 60), Bytes::new()));
        }
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
}
