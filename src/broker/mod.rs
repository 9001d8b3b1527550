//! The broker: takes requests from the front and gives them to workers.
//!
//! [`Handle`] is what the front sees. Behind it one task (`router.rs`)
//! holds the only ROUTER (`transport.rs`) and drives the pure decisions of
//! `queue.rs`, `quarantine.rs`, `breaker.rs` and `deaths.rs`. Workers on this
//! machine connect to a socket in a private directory (`crate::directory`), all
//! others through `gate.rs`.

mod awake;
mod breaker;
mod cost;
mod crowd;
mod deaths;
mod gate;
mod lanes;
mod pace;
mod quarantine;
mod queue;
mod raised;
mod rate;
mod router;
mod silences;
mod standings;
#[cfg(test)]
mod tests;
mod throttle;
mod transport;
mod troubled;
mod turns;
mod unsent;
mod versions;
mod wait;
mod waiting;
pub(crate) mod zmtp;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot, watch};

use crate::config;
use crate::metrics::Metrics;
use crate::protocol::{
    Document, Failure, Head, ProjectRef, Ready, Reason, Timings, Trace, Visitor,
};
use unsent::Unsent;

pub use breaker::Open;
pub use cost::Work;
pub use deaths::Departures;
pub use lanes::Line;
pub use quarantine::Quarantined;
pub use raised::Exceptions;
pub use router::StartError;
pub use throttle::Throttle;
pub use troubled::BadLayers;
pub use wait::Wait;
pub use waiting::Name;

/// Starts the broker: when this returns, workers can connect. `gate`: where the gate
/// listens already, if somebody else has bound it.
pub async fn start(
    config: &config::Broker,
    gate: Option<TcpListener>,
) -> Result<(Handle, Broker), StartError> {
    router::start(config, gate).await
}

/// The running broker. Dropping it stops it at once; [`Broker::stop`] lets requests end.
#[derive(Debug)]
pub struct Broker {
    /// Where local workers connect: `ipc:///…/broker.sock`.
    pub endpoint: String,
    /// Where the gate listens, with the real port.
    pub gate: Option<SocketAddr>,
    commands: mpsc::UnboundedSender<Command>,
    ended: oneshot::Receiver<()>,
    relay: Option<gate::Gate>,
}

impl Broker {
    /// Dropping it lets nobody in through the gate any more; who is inside stays.
    pub fn accepting(&mut self) -> Option<oneshot::Sender<()>> {
        self.relay.as_mut().and_then(gate::Gate::accepting)
    }

    /// Refuses new calls, lets those that are here go on for `within`, and tells
    /// the workers. When it returns, the task has ended and the socket is gone.
    pub async fn stop(mut self, within: Duration) {
        let _ = self.commands.send(Command::Stop { within });
        self.ended().await;
        if let Some(mut gate) = self.relay.take() {
            gate.close().await;
        }
    }

    /// Resolves when the task has ended, which before `stop` is a bug.
    pub async fn ended(&mut self) {
        if !self.ended.is_terminated() {
            let _ = (&mut self.ended).await;
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = self.commands.send(Command::Stop {
            within: Duration::ZERO,
        });
    }
}

/// What handles and bodies tell the task. The channel is unbounded, but each
/// call has at most one `Call`, one `Took` and two `Withdraw` in it, and all
/// who ask for the status share one `Status`.
#[derive(Debug)]
enum Command {
    Call {
        id: u64,
        call: Box<Call>,
        answer: oneshot::Sender<Result<Reply, Lost>>,
    },
    /// The counter of the stream is not zero any more.
    Took {
        id: u64,
    },
    Withdraw {
        id: u64,
    },
    /// Publish a new one.
    Status,
    TellPools(Reason),
    Configure(Box<config::Broker>),
    Release,
    Stop {
        within: Duration,
    },
}

/// What handles can see without asking.
#[derive(Debug, Default)]
struct Shared {
    next_id: AtomicU64,
    n_serving: AtomicUsize,
    stopping: AtomicBool,
    /// Workers die faster than they answer.
    storm: AtomicBool,
    /// Some worker has plugins that may answer what is no whole request.
    plugins_answer: AtomicBool,
    /// A `Command::Status` is on its way.
    status_wanted: AtomicBool,
    unsent: Unsent,
    metrics: Arc<Metrics>,
}

/// A request as the front hands it over.
#[derive(Debug, Clone)]
pub struct Call {
    pub request_id: String,
    pub method: String,
    /// Public URL with query.
    pub url: String,
    /// Title-Case names.
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    pub project: Option<ProjectRef>,
    pub operation: String,
    /// May be sent to a second worker when the first died before the first byte.
    pub retry: bool,
    /// Cancelled when the client leaves; otherwise it runs to its end, within
    /// `server.run_on_timeout`.
    pub cancel: bool,
    pub timeout: Duration,
    pub trace: Option<Trace>,
    pub document: Option<Document>,
    /// Who asks; clients take turns.
    pub client: Name,
    pub work: Work,
    /// `Ready::instance` of the worker that asks, if one of ours does.
    pub cause: Option<String>,
    /// For the access policies of the worker.
    pub visitor: Option<Visitor>,
    /// How long it waits for workers, for who withdraws it.
    pub wait: Wait,
}

impl Call {
    fn project_name(&self) -> String {
        name_of(self.project.as_ref())
    }
}

/// For status and log; empty without a project.
fn name_of(project: Option<&ProjectRef>) -> String {
    project.map(ToString::to_string).unwrap_or_default()
}

/// The answer: its head at once, its body as it comes.
#[derive(Debug)]
pub struct Reply {
    pub head: Head,
    pub body: Body,
}

/// What FINAL says about the request, for headers and logs.
#[derive(Debug, Clone, Default)]
pub struct Outcome {
    pub timings: Timings,
}

/// Chunks of a reply. Taking one sends the worker a credit; dropping the body
/// before its end cancels the request.
#[derive(Debug)]
pub struct Body {
    state: State,
    outcome: Option<Outcome>,
    /// How long its request waited for workers.
    queued: Duration,
    /// How long its worker took to find the project; known before the outcome of a stream.
    load: Option<Duration>,
}

#[derive(Debug)]
enum State {
    /// No more will come from the worker.
    Here(Bytes),
    Stream(Stream),
}

/// The front's end of a stream.
#[derive(Debug)]
struct Stream {
    id: u64,
    items: mpsc::Receiver<Item>,
    taken: Arc<AtomicU32>,
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    ended: bool,
}

/// What passes through the channel of a stream. The bytes are in [`Unsent`].
#[derive(Debug)]
enum Item {
    Chunk,
    Last(Outcome),
    Broken(Error),
}

/// What an item stands for.
enum Part {
    Chunk(Bytes),
    Last(Bytes, Outcome),
    Broken(Error),
}

impl Body {
    /// The next chunk; `None` after the last. An error means that the reply
    /// is cut off and must not be ended normally.
    pub fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Error>>> {
        let stream = match &mut self.state {
            State::Here(bytes) => return Poll::Ready(take(bytes).map(Ok)),
            State::Stream(stream) => stream,
        };
        match ready!(stream.poll_part(cx)) {
            Part::Chunk(bytes) => Poll::Ready(Some(Ok(bytes))),
            Part::Last(mut bytes, outcome) => {
                let last = take(&mut bytes);
                self.end(Some(outcome));
                Poll::Ready(last.map(Ok))
            }
            Part::Broken(error) => {
                self.end(None);
                Poll::Ready(Some(Err(error)))
            }
        }
    }

    /// Present once FINAL was taken; for a reply that was not streamed, from the start.
    pub fn outcome(&self) -> Option<&Outcome> {
        self.outcome.as_ref()
    }

    pub fn queued(&self) -> Duration {
        self.queued
    }

    pub fn load(&self) -> Option<Duration> {
        self.load
    }

    /// No more will come from the worker: the next chunk, if any, is the last.
    pub fn is_complete(&self) -> bool {
        matches!(self.state, State::Here(_))
    }

    fn end(&mut self, outcome: Option<Outcome>) {
        self.outcome = outcome;
        if let State::Stream(stream) = &mut self.state {
            stream.ended = true;
        }
        self.state = State::Here(Bytes::new());
    }
}

fn take(bytes: &mut Bytes) -> Option<Bytes> {
    let bytes = std::mem::take(bytes);
    (!bytes.is_empty()).then_some(bytes)
}

impl Stream {
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Part> {
        loop {
            let outcome = match ready!(self.items.poll_recv(cx)) {
                Some(Item::Chunk) => None,
                Some(Item::Last(outcome)) => Some(outcome),
                Some(Item::Broken(error)) => return Poll::Ready(Part::Broken(error)),
                None => return Poll::Ready(Part::Broken(Error::WorkerDied)),
            };
            let Some(bytes) = self.shared.unsent.take(self.id, Instant::now()) else {
                return Poll::Ready(Part::Broken(Error::ReaderTooSlow));
            };
            if let Some(outcome) = outcome {
                return Poll::Ready(Part::Last(bytes, outcome));
            }
            self.took_one();
            // A part may carry the head alone.
            if !bytes.is_empty() {
                return Poll::Ready(Part::Chunk(bytes));
            }
        }
    }

    /// Credits gather in the counter while the task has not seen the command.
    fn took_one(&self) {
        if self.taken.fetch_add(1, Ordering::AcqRel) == 0 {
            let _ = self.commands.send(Command::Took { id: self.id });
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.unsent.end(self.id);
        if !self.ended {
            let _ = self.commands.send(Command::Withdraw { id: self.id });
        }
    }
}

/// A call without a reply: why, and as much as is known of where its time went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    pub error: Error,
    /// How long it waited for workers.
    pub queued: Option<Duration>,
    /// Of the worker that gave up.
    pub timings: Option<Timings>,
}

impl From<Error> for Lost {
    fn from(error: Error) -> Self {
        Self {
            error,
            queued: None,
            timings: None,
        }
    }
}

/// Why there is no answer from a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    QueueFull {
        limit: usize,
        retry_after: Duration,
    },
    /// Of one client, waiting and running.
    ClientBusy {
        limit: usize,
        retry_after: Duration,
    },
    /// Requests in a second.
    ClientTooFast {
        limit: usize,
        retry_after: Duration,
    },
    /// Of one project, waiting and running.
    ProjectBusy {
        limit: usize,
        retry_after: Duration,
    },
    /// All workers wait for requests like this one, which waits for a worker.
    WaitsForItself,
    /// Waited too long for a worker.
    QueueTimedOut {
        after: Duration,
    },
    TimedOut {
        after: Duration,
    },
    WorkerDied,
    /// URL and headers are more than a worker would read.
    RequestTooLarge {
        limit: usize,
    },
    /// Ended too many workers; refused for so long.
    Quarantined {
        left: Duration,
    },
    /// The project did not answer in time again and again.
    BreakerOpen {
        retry_after: Duration,
    },
    /// The project did not answer in time lately, and holds its share of the workers.
    ShareTaken {
        limit: usize,
        retry_after: Duration,
    },
    /// The memory for replies is full, and its client took nothing for longest.
    ReaderTooSlow,
    /// The server is stopping.
    Stopping,
    /// The worker answered, and there is nothing from QGIS in it.
    Failed(Failure),
}

impl Error {
    /// The word for it in metrics; few words, whatever happens.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::QueueFull { .. } => "queue_full",
            Self::QueueTimedOut { .. } => "queue_timeout",
            Self::TimedOut { .. } => "timeout",
            Self::WorkerDied => "worker_died",
            Self::RequestTooLarge { .. } => "too_large",
            Self::Quarantined { .. } => "quarantined",
            Self::BreakerOpen { .. } => "breaker_open",
            Self::ShareTaken { .. } => "share_taken",
            Self::ClientBusy { .. } => "client_busy",
            Self::ClientTooFast { .. } => "client_too_fast",
            Self::ProjectBusy { .. } => "project_busy",
            Self::WaitsForItself => "waits_for_itself",
            Self::ReaderTooSlow => "reader_too_slow",
            Self::Stopping => "stopping",
            Self::Failed(failure) => failure.reason(),
        }
    }
}

impl std::fmt::Display for Error {
    /// Safe to show to a client.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::QueueFull { limit, .. } => write!(f, "{limit} requests are waiting already"),
            Self::ClientBusy { limit, .. } => {
                write!(f, "the client has {limit} requests here already")
            }
            Self::ClientTooFast { limit, .. } => {
                write!(f, "the client asks more often than {limit} times a second")
            }
            Self::ProjectBusy { limit, .. } => {
                write!(f, "the project has {limit} requests here already")
            }
            Self::WaitsForItself => {
                write!(
                    f,
                    "all workers wait for layers of this server, and this is one"
                )
            }
            Self::QueueTimedOut { after } => {
                write!(f, "no worker was free within {:.1} s", after.as_secs_f64())
            }
            Self::TimedOut { after } => write!(f, "no answer within {:.1} s", after.as_secs_f64()),
            Self::WorkerDied => write!(f, "the worker died"),
            Self::RequestTooLarge { limit } => {
                write!(f, "URL and headers have more than {limit} bytes")
            }
            Self::Quarantined { left } => write!(
                f,
                "it ended its workers and is refused for {:.1} s",
                left.as_secs_f64()
            ),
            Self::BreakerOpen { retry_after } => write!(
                f,
                "the project did not answer in time; another try in {:.1} s",
                retry_after.as_secs_f64()
            ),
            Self::ShareTaken { limit, .. } => write!(
                f,
                "the project did not answer in time and holds {limit} workers already"
            ),
            Self::ReaderTooSlow => write!(
                f,
                "the memory for replies is full (server.reply_memory), and this client takes its own the slowest"
            ),
            Self::Stopping => write!(f, "the server is stopping"),
            Self::Failed(failure) => write!(f, "{failure:?}"),
        }
    }
}

impl std::error::Error for Error {}

/// A snapshot for `/ready` and `/status`.
#[derive(Debug, Clone, Default)]
pub struct Status {
    pub n_waiting: usize,
    pub n_running: usize,
    pub lanes: Vec<Lane>,
    /// Workers with long requests, and how many may have one.
    pub n_long: usize,
    pub long_max: usize,
    /// Those with most requests here, waiting or running.
    pub top_clients: Vec<(Name, usize)>,
    pub top_projects: Vec<(Name, usize)>,
    pub workers: Vec<Worker>,
    /// The latest first, at most a hundred.
    pub quarantined: Vec<Quarantined>,
    /// Projects whose breaker is not closed, the latest first.
    pub breakers: Vec<Open>,
    /// Projects that have not answered for a while.
    pub stalled: Vec<Name>,
    /// Workers that went, by reason.
    pub departures: Departures,
    /// Workers die faster than they answer, so the server is not ready.
    pub storm: bool,
    /// Requests that were sent once more, to another worker.
    pub n_retried: u64,
    /// Projects with invalid layers, the last asked for first.
    pub bad_layers: Vec<BadLayers>,
    /// What plugins raised in requests, the last first.
    pub exceptions: Vec<Exceptions>,
}

/// One of the lines in which requests wait.
#[derive(Debug, Clone)]
pub struct Lane {
    pub name: &'static str,
    pub n_waiting: usize,
    pub n_running: usize,
}

#[derive(Debug, Clone)]
pub struct Worker {
    pub ready: Ready,
    pub n_served: u64,
    pub connected_for: Duration,
    pub memory_kb: u64,
    /// Those that it has open, as far as is known; the last used first.
    pub projects: Vec<Name>,
    pub request: Option<Running>,
}

/// What a busy worker serves.
#[derive(Debug, Clone)]
pub struct Running {
    pub request_id: String,
    pub operation: String,
    pub project: String,
    pub since: Duration,
}

/// The broker, as the front and `run` see it. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    shared: Arc<Shared>,
    status: watch::Receiver<Status>,
}

impl Handle {
    /// The reply to `call`, or why there is none. Dropping the future withdraws
    /// the call: out of the queue, or cancelled if `call.cancel`.
    pub async fn call(&self, call: Call) -> Result<Reply, Lost> {
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        let command = Command::Call {
            id,
            call: Box::new(call),
            answer,
        };
        self.commands.send(command).map_err(|_| Error::Stopping)?;
        let mut guard = Withdrawal {
            id,
            commands: Some(&self.commands),
        };
        let result = answered.await.unwrap_or(Err(Error::Stopping.into()));
        guard.commands = None;
        result
    }

    /// At least one worker serves, workers stay alive, and the server is not stopping.
    pub fn is_ready(&self) -> bool {
        let shared = &self.shared;
        let is = |flag: &AtomicBool| flag.load(Ordering::Relaxed);
        !is(&shared.stopping) && !is(&shared.storm) && shared.n_serving.load(Ordering::Relaxed) > 0
    }

    /// Some worker has plugins that may answer a request without a project or a service.
    pub fn plugins_answer(&self) -> bool {
        self.shared.plugins_answer.load(Ordering::Relaxed)
    }

    /// As it is now. Those who ask at the same time get the same one.
    pub async fn status(&self) -> Status {
        let mut published = self.status.clone();
        published.mark_unchanged();
        // If it was wanted already, the one under way is not made yet.
        if !self.shared.status_wanted.swap(true, Ordering::AcqRel) {
            let _ = self.commands.send(Command::Status);
        }
        match published.changed().await {
            Ok(()) => published.borrow().clone(),
            Err(_) => Status::default(),
        }
    }

    /// What is counted here and in front of it.
    pub fn metrics(&self) -> &Arc<Metrics> {
        &self.shared.metrics
    }

    /// One worker of each pool is told `reason` (`Reason::Restart`): its pool renews itself.
    pub fn tell_pools(&self, reason: Reason) {
        let _ = self.commands.send(Command::TellPools(reason));
    }

    /// Goes by `config` from now on, as far as a running broker can.
    pub fn configure(&self, config: config::Broker) {
        let _ = self.commands.send(Command::Configure(Box::new(config)));
    }

    /// Whatever is here ends now, once the broker was told to stop.
    pub fn abort(&self) {
        let within = Duration::ZERO;
        let _ = self.commands.send(Command::Stop { within });
    }

    /// Another server waits for our workers: those that have nothing to do are sent
    /// away, all but one, which answers what still comes.
    pub fn release(&self) {
        let _ = self.commands.send(Command::Release);
    }
}

/// Withdraws a call when its future is dropped before the answer.
struct Withdrawal<'a> {
    id: u64,
    commands: Option<&'a mpsc::UnboundedSender<Command>>,
}

impl Drop for Withdrawal<'_> {
    fn drop(&mut self) {
        if let Some(commands) = self.commands {
            let _ = commands.send(Command::Withdraw { id: self.id });
        }
    }
}
