//! The HTTP front: accepts connections, bounds them, hands requests to the
//! broker and drains at the end.
//!
//! `route` says whose a path is, `request` turns a request into a call,
//! `reply` turns what comes back into a response, and `watch` says when a
//! connection has been still for too long.

mod access;
mod addresses;
pub mod body;
mod caching;
mod form;
pub(crate) mod forwarded;
mod malformed;
pub mod pages;
mod policy;
pub mod reply;
mod request;
mod respond;
mod route;
#[cfg(test)]
mod tests;
mod threads;
pub mod tls;
mod trace;
mod watch;
mod work;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use hyper::header::{self, HeaderValue};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use nix::sys::socket::{Backlog, listen};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch as channel};
use tokio::time::{sleep_until, timeout};
use tokio_rustls::TlsAcceptor;

pub use respond::Backend;

use crate::config::Http;
use crate::traces::Traces;
use addresses::{Addresses, Limit, Place};
use malformed::{Bounds, Explaining};
use respond::{Front, Peer};
use threads::{Keeper, Threads};
use watch::{Limits, Verdict, Watch, Watched};

/// Streams that a client reset before we took them; more end the connection.
const RESETS_MAX: usize = 20;

/// Bytes of a reply that one HTTP/2 stream may hold back.
const STREAM_BUFFER: usize = 256 << 10;

/// hyper takes no smaller bound for a request head.
const HEAD_MIN: usize = 8192;

/// The longest pause after an accept that failed for want of descriptors.
const ACCEPT_PAUSE_MAX: Duration = Duration::from_secs(1);

/// Why the front does not start.
#[derive(Debug)]
pub enum Error {
    /// Why no traces can be told.
    Traces(String),
    Threads(io::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Traces(why) => write!(f, "logging.otlp_endpoint: {why}"),
            Self::Threads(error) => write!(f, "no threads (server.http_threads): {error}"),
        }
    }
}

impl std::error::Error for Error {}

/// What a connection is allowed to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Serving,
    /// Finish what runs, take nothing new.
    Draining,
    /// End now.
    Over,
}

/// What all connections share.
pub struct Server<B: Backend> {
    rules: ArcSwap<Rules<B>>,
    permits: Arc<Semaphore>,
    n_permits: AtomicU32,
    addresses: Arc<Addresses>,
}

/// What can change while the server runs. A connection keeps the times that it began
/// with; each request goes by what is in force when it comes.
struct Rules<B> {
    front: Arc<Front<B>>,
    limits: Limits,
    /// For each address.
    connections: Limit,
    bounds: Bounds,
    drain_idle: Duration,
    http1: auto::Builder<TokioExecutor>,
    http2: auto::Builder<TokioExecutor>,
    tls: Option<TlsAcceptor>,
}

/// The threads that connections will live on, started before anybody is told that we serve.
pub fn threads(config: &Http) -> Result<(Threads, Keeper), Error> {
    Threads::start(config.threads).map_err(Error::Threads)
}

/// Serves `listeners` until `shutdown` is over, then lets running requests go on
/// until `cut` is, too, which says how long they had.
pub async fn serve<B: Backend>(
    server: Arc<Server<B>>,
    (threads, keeper): (Threads, Keeper),
    listeners: Vec<TcpListener>,
    shutdown: impl Future<Output = ()> + Send,
    cut: impl Future<Output = Duration> + Send,
) {
    let threads = Arc::new(threads);
    let (phase, phases) = channel::channel(Phase::Serving);
    for listener in listeners {
        tokio::spawn(accept(
            server.clone(),
            threads.clone(),
            listener,
            phases.clone(),
        ));
    }
    shutdown.await;
    phase.send_replace(Phase::Draining);
    tokio::select! {
        () = server.all_closed() => {}
        patience = cut => {
            tracing::warn!(
                "requests are cut off: they ran longer than {:.1} s after the stop (server.drain_timeout)",
                patience.as_secs_f64()
            );
            phase.send_replace(Phase::Over);
            server.all_closed().await;
        }
    }
    keeper.end().await;
}

impl<B: Backend> Server<B> {
    /// With the certificate that `config` names, if it wants one.
    pub fn new(config: Http, tls: Option<TlsAcceptor>, backend: B) -> Result<Self, Error> {
        let traces = config.otlp.as_deref().map(Traces::start).transpose();
        let traces = traces.map_err(Error::Traces)?.map(Arc::new);
        let n_permits = permits(&config);
        Ok(Self {
            rules: ArcSwap::from_pointee(Rules::new(
                &config,
                Front::new(config.clone(), backend, traces),
                tls,
            )),
            permits: Arc::new(Semaphore::new(n_permits as usize)),
            n_permits: AtomicU32::new(n_permits),
            addresses: Arc::default(),
        })
    }

    /// Goes by `config` from now on, whose certificate is `loaded` already. An error is
    /// about that alone: the old one stays, and all else has changed.
    pub fn change(&self, config: Http, loaded: tls::Loaded) -> Result<(), tls::Error> {
        let old = self.rules.load();
        let (tls, loaded) = match loaded {
            Ok(tls) => (tls, Ok(())),
            Err(error) => (old.tls.clone(), Err(error)),
        };
        self.resize(permits(&config));
        let front = old.front.with(config.clone());
        self.rules.store(Arc::new(Rules::new(&config, front, tls)));
        loaded
    }

    /// Fewer connections than there are: those that are open may end, and new ones wait.
    fn resize(&self, now: u32) {
        let before = self.n_permits.swap(now, Ordering::AcqRel);
        if let Some(more @ 1..) = now.checked_sub(before) {
            self.permits.add_permits(more as usize);
        }
        if let Some(less @ 1..) = before.checked_sub(now) {
            let taken = self.permits.clone().acquire_many_owned(less);
            tokio::spawn(async { taken.await.map(OwnedSemaphorePermit::forget) });
        }
    }

    /// Where a connection of `peer` counts; None if its address has enough.
    fn place(&self, peer: SocketAddr) -> Option<Place> {
        let rules = self.rules.load();
        let place = self.addresses.enter(peer.ip(), rules.connections);
        if place.is_none() {
            rules.front.books.metrics.connections_refused.inc();
        }
        place
    }

    /// Every connection gave its permit back.
    async fn all_closed(&self) {
        let all = self.n_permits.load(Ordering::Acquire);
        let _ = self.permits.acquire_many(all).await;
    }
}

impl<B: Backend> Rules<B> {
    fn new(config: &Http, front: Front<B>, tls: Option<TlsAcceptor>) -> Self {
        let limits = Limits {
            header: config.header_timeout,
            idle: config.idle_timeout,
            write: config.write_timeout,
            write_bytes: rate(config.write_rate_min, config.write_timeout),
            linger: config.linger_timeout,
            linger_bytes: config.body_max,
        };
        Self {
            front: Arc::new(front),
            limits,
            connections: Limit::of(config),
            bounds: Bounds::of(config),
            drain_idle: config.drain_idle,
            http1: http1(config),
            http2: http2(config),
            tls,
        }
    }
}

fn permits(config: &Http) -> u32 {
    u32::try_from(config.connections_max)
        .unwrap_or(u32::MAX)
        .clamp(1, 1 << 20)
}

/// What has to come within `time`: something, however low the rate.
fn rate(bytes_per_second: usize, time: Duration) -> usize {
    ((time.as_secs_f64() * bytes_per_second as f64) as usize).max(1)
}

/// Clear text. The bound of the head has room for a URI that is too long, so
/// that most of them are told so.
fn http1(config: &Http) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http1_only();
    // `watch` bounds heads and idleness, apart from each other.
    builder
        .http1()
        .header_read_timeout(None)
        .max_headers(config.headers_max)
        .max_buf_size(HEAD_MIN.max(config.header_max + config.uri_max));
    builder
}

fn http2(config: &Http) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new()).http2_only();
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(config.streams_max)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_send_buf_size(STREAM_BUFFER)
        .max_header_list_size(u32::try_from(config.header_max + config.uri_max).unwrap_or(u32::MAX))
        .keep_alive_interval(config.idle_timeout)
        .keep_alive_timeout(config.header_timeout);
    builder
}

/// Takes connections as long as there are permits for them; the rest waits in
/// the kernel's backlog.
async fn accept<B: Backend>(
    server: Arc<Server<B>>,
    threads: Arc<Threads>,
    listener: TcpListener,
    mut phases: channel::Receiver<Phase>,
) {
    let listener = match deepen(&listener)
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| tokio::net::TcpListener::from_std(listener))
    {
        Ok(listener) => listener,
        Err(error) => return tracing::error!(%error, "a listener cannot be used"),
    };
    let mut pause = Duration::ZERO;
    loop {
        let next = async {
            tokio::time::sleep(pause).await;
            let permit = server
                .permits
                .clone()
                .acquire_owned()
                .await
                .expect("nobody closes the semaphore");
            (permit, listener.accept().await)
        };
        // Dropping `next` loses no connection: accept is cancel safe.
        let (permit, accepted) = tokio::select! {
            next = next => next,
            _ = phases.changed() => return,
        };
        pause = match accepted {
            Ok((tcp, peer)) => {
                if let Some(place) = server.place(peer) {
                    let (server, phases) = (server.clone(), phases.clone());
                    threads.spawn(tcp, move |tcp| {
                        connection(server, tcp, peer, (permit, place), phases)
                    });
                }
                Duration::ZERO
            }
            Err(error) => pause_after(&error, pause),
        };
    }
}

/// The standard library asks the kernel to keep 128 connections for us, and this for as
/// many as it will. Of a burst of more some would be heard only when they try again,
/// which is a second later.
fn deepen(listener: &TcpListener) -> io::Result<()> {
    Ok(listen(listener, Backlog::MAXCONN)?)
}

/// Without descriptors or memory the next accept fails at once, so it has to wait.
pub fn pause_after(error: &io::Error, last: Duration) -> Duration {
    let is_shortage = matches!(
        error.raw_os_error(),
        Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)
    );
    if !is_shortage {
        return Duration::ZERO;
    }
    if last.is_zero() {
        tracing::error!(%error, "no connection can be accepted for now");
    }
    (last * 2).clamp(Duration::from_millis(10), ACCEPT_PAUSE_MAX)
}

async fn connection<B: Backend>(
    server: Arc<Server<B>>,
    tcp: TcpStream,
    client: SocketAddr,
    _room: (OwnedSemaphorePermit, Place),
    phases: channel::Receiver<Phase>,
) {
    let (Ok(()), Ok(local)) = (tcp.set_nodelay(true), tcp.local_addr()) else {
        return; // The client has gone already.
    };
    let rules = server.rules.load_full();
    let _counted = rules.front.books.metrics.connected();
    let watch = Watch::new(rules.limits);
    let io = Watched::new(tcp, watch.clone());
    let peer = |scheme| Peer {
        client,
        local,
        scheme,
    };
    let Some(tls) = &rules.tls else {
        return drive(&server, &rules, false, io, peer("http"), watch, phases).await;
    };
    let mut end = phases.clone();
    let handshake = tokio::select! {
        handshake = timeout(rules.limits.header, tls.accept(io)) => handshake,
        // Draining leaves it alone: its request will be answered.
        _ = end.wait_for(|phase| *phase == Phase::Over) => return,
    };
    let io = match handshake {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return tracing::debug!(%client, %error, "no TLS handshake"),
        Err(_) => return tracing::debug!(%client, "the TLS handshake took too long"),
    };
    let is_http2 = io.get_ref().1.alpn_protocol() == Some(b"h2");
    watch.established(is_http2);
    drive(&server, &rules, is_http2, io, peer("https"), watch, phases).await
}

/// One connection from its first request to its end.
async fn drive<B: Backend, I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    server: &Server<B>,
    rules: &Rules<B>,
    is_http2: bool,
    io: I,
    peer: Peer,
    watch: Arc<Watch>,
    phases: channel::Receiver<Phase>,
) {
    let mut changes = phases.clone();
    let service = service_fn(|request| {
        let front = server.rules.load().front.clone();
        let (running, phases) = (watch.begin(), phases.clone());
        async move {
            let mut response = front.answer(request, peer, running).await;
            if !is_http2 && *phases.borrow() != Phase::Serving {
                let close = HeaderValue::from_static("close");
                response.headers_mut().insert(header::CONNECTION, close);
            }
            Ok::<_, Infallible>(response)
        }
    });
    let builder = if is_http2 { &rules.http2 } else { &rules.http1 };
    let io = Explaining::new(io, watch.clone(), rules.bounds);
    let mut served = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut check = pin!(sleep_until(Instant::now().into()));
    let mut closing = false;
    loop {
        // Leaving the loop drops `served`, and with it the requests of this connection.
        tokio::select! {
            result = served.as_mut() => {
                if let Err(error) = result {
                    tracing::debug!(client = %peer.client, %error, "connection ended");
                }
                return;
            }
            () = check.as_mut() => match watch.verdict() {
                Verdict::Wait(until) => check.as_mut().reset(until.into()),
                Verdict::Cut(why) => {
                    watch.break_off();
                    return tracing::debug!(client = %peer.client, why, "connection cut");
                }
                Verdict::Close if closing => return,
                Verdict::Close => {
                    closing = true;
                    watch.farewell();
                    served.as_mut().graceful_shutdown();
                    check.as_mut().reset((Instant::now() + rules.limits.header).into());
                }
            },
            // Without `serve` nobody will say that it is over.
            changed = changes.changed() => match changed.map(|()| *changes.borrow_and_update()) {
                Ok(Phase::Serving) => {}
                Ok(Phase::Draining) if is_http2 => served.as_mut().graceful_shutdown(),
                // A request may be on its way, and a connection that is closed then
                // looks to its client as if the request had failed.
                Ok(Phase::Draining) => {
                    watch.drain(rules.drain_idle);
                    check.as_mut().reset(Instant::now().into());
                }
                Ok(Phase::Over) | Err(_) => return watch.break_off(),
            },
        }
    }
}
