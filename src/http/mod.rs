//! The HTTP front: accepts connections, bounds them, hands requests to the
//! broker and drains at the end.
//!
//! `route` says whose a path is, `request` turns a request into a call,
//! `reply` turns what comes back into a response, and `watch` says when a
//! connection has been still for too long.

mod access;
mod body;
mod form;
mod forwarded;
mod pages;
mod reply;
mod request;
mod respond;
mod route;
#[cfg(test)]
mod tests;
mod threads;
mod tls;
mod watch;
mod work;

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch as channel};
use tokio::time::{sleep_until, timeout};
use tokio_rustls::TlsAcceptor;

pub use respond::Backend;

use crate::config::Http;
use respond::{Front, Peer};
use threads::Threads;
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
    Tls(tls::Error),
    Threads(io::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Tls(error) => error.fmt(f),
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
struct Server<B: Backend> {
    front: Arc<Front<B>>,
    limits: Limits,
    http1: auto::Builder<TokioExecutor>,
    http2: auto::Builder<TokioExecutor>,
    tls: Option<TlsAcceptor>,
    permits: Arc<Semaphore>,
    n_permits: u32,
}

/// Serves `listeners` until `shutdown` is over, then lets running requests go on
/// for at most `drain`.
pub async fn serve<B: Backend>(
    config: Arc<Http>,
    listeners: Vec<TcpListener>,
    backend: B,
    shutdown: impl Future<Output = ()> + Send,
    drain: Duration,
) -> Result<(), Error> {
    let threads = Arc::new(Threads::start(config.threads).map_err(Error::Threads)?);
    let server = Arc::new(Server::new(config, backend)?);
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
    if timeout(drain, server.all_closed()).await.is_err() {
        tracing::warn!(
            "requests are cut off: they ran longer than {:.1} s after the stop",
            drain.as_secs_f64()
        );
        phase.send_replace(Phase::Over);
        server.all_closed().await;
    }
    Ok(())
}

impl<B: Backend> Server<B> {
    fn new(config: Arc<Http>, backend: B) -> Result<Self, Error> {
        let tls = config
            .tls
            .as_ref()
            .map(tls::acceptor)
            .transpose()
            .map_err(Error::Tls)?;
        let n_permits = u32::try_from(config.connections_max)
            .unwrap_or(u32::MAX)
            .clamp(1, 1 << 20);
        let limits = Limits {
            header: config.header_timeout,
            idle: config.idle_timeout,
            write: config.write_timeout,
            write_bytes: rate(config.write_rate_min, config.write_timeout),
            linger: config.linger_timeout,
            linger_bytes: config.body_max,
        };
        Ok(Self {
            limits,
            http1: http1(&config),
            http2: http2(&config),
            tls,
            permits: Arc::new(Semaphore::new(n_permits as usize)),
            n_permits,
            front: Arc::new(Front::new(config, backend)),
        })
    }

    /// Every connection gave its permit back.
    async fn all_closed(&self) {
        let _ = self.permits.acquire_many(self.n_permits).await;
    }
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
    let listener = match listener
        .set_nonblocking(true)
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
                let (server, phases) = (server.clone(), phases.clone());
                threads.spawn(tcp, move |tcp| {
                    connection(server, tcp, peer, permit, phases)
                });
                Duration::ZERO
            }
            Err(error) => pause_after(&error, pause),
        };
    }
}

/// Without descriptors or memory the next accept fails at once, so it has to wait.
fn pause_after(error: &io::Error, last: Duration) -> Duration {
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
    _permit: OwnedSemaphorePermit,
    mut phases: channel::Receiver<Phase>,
) {
    let (Ok(()), Ok(local)) = (tcp.set_nodelay(true), tcp.local_addr()) else {
        return; // The client has gone already.
    };
    let watch = Watch::new(server.limits);
    let io = Watched::new(tcp, watch.clone());
    let Some(tls) = &server.tls else {
        let peer = Peer {
            client,
            local,
            scheme: "http",
        };
        return drive(&server, &server.http1, io, peer, watch, phases).await;
    };
    let handshake = tokio::select! {
        handshake = timeout(server.limits.header, tls.accept(io)) => handshake,
        _ = phases.changed() => return,
    };
    let io = match handshake {
        Ok(Ok(io)) => io,
        Ok(Err(error)) => return tracing::debug!(%client, %error, "no TLS handshake"),
        Err(_) => return tracing::debug!(%client, "the TLS handshake took too long"),
    };
    let is_http2 = io.get_ref().1.alpn_protocol() == Some(b"h2");
    watch.established(is_http2);
    let peer = Peer {
        client,
        local,
        scheme: "https",
    };
    let builder = if is_http2 {
        &server.http2
    } else {
        &server.http1
    };
    drive(&server, builder, io, peer, watch, phases).await
}

/// One connection from its first request to its end.
async fn drive<B: Backend, I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    server: &Server<B>,
    builder: &auto::Builder<TokioExecutor>,
    io: I,
    peer: Peer,
    watch: Arc<Watch>,
    mut phases: channel::Receiver<Phase>,
) {
    let service = service_fn(|request| {
        let (front, running) = (server.front.clone(), watch.begin());
        async move { Ok::<_, Infallible>(front.answer(request, peer, running).await) }
    });
    let mut served = pin!(builder.serve_connection(TokioIo::new(io), service));
    let mut check = pin!(sleep_until(Instant::now().into()));
    let mut closing = false;
    if *phases.borrow() != Phase::Serving {
        return; // Accepted in the last moment; nothing was read from it.
    }
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
                    served.as_mut().graceful_shutdown();
                    check.as_mut().reset((Instant::now() + server.limits.header).into());
                }
            },
            // Without `serve` nobody will say that it is over.
            changed = phases.changed() => match changed.map(|()| *phases.borrow_and_update()) {
                Ok(Phase::Serving) => {}
                Ok(Phase::Draining) => served.as_mut().graceful_shutdown(),
                Ok(Phase::Over) | Err(_) => return watch.break_off(),
            },
        }
    }
}
