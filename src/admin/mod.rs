//! The management listener: how the server fares, for those who run it.
//!
//! | path | what |
//! |---|---|
//! | `/ping` | this process answers |
//! | `/ready` | a request would find a worker, and the server is not stopping |
//! | `/status` | pools, workers, queue, losses, as JSON (`health.rs`) |
//! | `/metrics` | the same and all counters, for Prometheus (`metrics.rs`) |
//! | `/plugins`, `/plugins/<name>` | what became of each plugin, with its traceback (`plugins.rs`) |
//! | `/`, `/pool`, `/cache` | links, workers and their projects as in py-qgis-server (`pool.rs`) |
//! | POST `/pool/restart` | replaces the workers one after the other, like SIGHUP |
//!
//! A port of its own, on loopback unless the operator says otherwise: none of this
//! is on the public one. A connection serves one request and has a bound in time,
//! so nobody holds a place for long.

mod health;
mod metrics;
mod plugins;
mod pool;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::future::poll_fn;
use std::net::TcpListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{self, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

use crate::broker::{Handle, Status};
use crate::config;
use crate::http;

/// hyper takes no smaller one.
const HEAD_MAX: usize = 8192;

/// Pages that are only looked at.
const PAGES: [&str; 7] = [
    "", "/ping", "/ready", "/status", "/metrics", "/pool", "/cache",
];

const RESTART: &str = "/pool/restart";

/// Why the listener does not start.
#[derive(Debug)]
pub enum Error {
    Listener(std::io::Error),
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Listener(error) => write!(f, "management.interfaces: {error}"),
        }
    }
}

impl std::error::Error for Error {}

/// What the pages are made of, and the certificate.
pub struct Server {
    broker: Handle,
    since: Instant,
    stopping: AtomicBool,
    tls: ArcSwapOption<TlsAcceptor>,
    permits: Arc<Semaphore>,
    timeout: Duration,
    /// The operator wants new workers.
    pub restart: Notify,
}

/// The running listener. Dropping it ends it.
pub struct Listening {
    server: Arc<Server>,
    task: tokio::task::JoinHandle<()>,
}

impl Listening {
    /// The server takes no more requests: it is not ready any more.
    pub fn stopping(&self) {
        self.server.stopping.store(true, Ordering::Relaxed);
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Everything that may go wrong has gone well; nobody is served yet.
pub struct Prepared {
    pub server: Arc<Server>,
    listeners: Vec<tokio::net::TcpListener>,
}

/// On the runtime of the caller, with the certificate that `config` names, if it wants one.
pub fn prepare(
    config: &config::Management,
    tls: Option<TlsAcceptor>,
    listeners: Vec<TcpListener>,
    broker: Handle,
) -> Result<Prepared, Error> {
    let server = Arc::new(Server {
        broker,
        since: Instant::now(),
        stopping: AtomicBool::new(false),
        tls: ArcSwapOption::from_pointee(tls),
        permits: Arc::new(Semaphore::new(config.connections_max)),
        timeout: config.timeout,
        restart: Notify::new(),
    });
    let usable = |listener: TcpListener| {
        listener.set_nonblocking(true)?;
        tokio::net::TcpListener::from_std(listener)
    };
    let listeners = listeners.into_iter().map(usable);
    let listeners = listeners.collect::<std::io::Result<_>>();
    Ok(Prepared {
        server,
        listeners: listeners.map_err(Error::Listener)?,
    })
}

impl Prepared {
    /// Begins to serve.
    pub fn start(self) -> Listening {
        let Self { server, listeners } = self;
        let task = tokio::spawn(accept(server.clone(), listeners));
        Listening { server, task }
    }
}

/// The certificate of the listener. One request per connection needs no HTTP/2.
pub fn load(config: &config::Management) -> http::tls::Loaded {
    let loaded = http::tls::load("management", config.tls.as_ref())?;
    Ok(loaded.map(|tls| {
        let mut config = rustls::ServerConfig::clone(tls.config());
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }))
}

/// Takes connections as long as there are permits for them; the rest waits in the
/// kernel's backlog. One task for all listeners: of several, each would hold a permit
/// while it waits, and with few permits some would be deaf.
async fn accept(server: Arc<Server>, listeners: Vec<tokio::net::TcpListener>) {
    let (mut pause, mut first) = (Duration::ZERO, 0);
    loop {
        tokio::time::sleep(pause).await;
        let permits = server.permits.clone();
        let permit = permits.acquire_owned().await;
        let permit = permit.expect("nobody closes the semaphore");
        pause = match next(&listeners, &mut first).await {
            Ok(tcp) => {
                tokio::spawn(connection(server.clone(), tcp, permit));
                Duration::ZERO
            }
            Err(error) => http::pause_after(&error, pause),
        };
    }
}

/// The next connection to any of them; they take turns in being asked `first`.
async fn next(
    listeners: &[tokio::net::TcpListener],
    first: &mut usize,
) -> std::io::Result<TcpStream> {
    poll_fn(|cx| {
        let (before, from) = listeners.split_at(*first % listeners.len().max(1));
        for listener in from.iter().chain(before) {
            if let Poll::Ready(accepted) = listener.poll_accept(cx) {
                *first += 1;
                return Poll::Ready(accepted.map(|(tcp, _)| tcp));
            }
        }
        Poll::Pending
    })
    .await
}

/// Slow heads, slow readers and slow handshakes end at the same bound.
async fn connection(server: Arc<Server>, tcp: TcpStream, _permit: OwnedSemaphorePermit) {
    let served = async {
        match server.tls.load_full() {
            None => drive(&server, tcp).await,
            Some(tls) => match tls.accept(tcp).await {
                Ok(io) => drive(&server, io).await,
                Err(error) => tracing::debug!(%error, "management: no TLS handshake"),
            },
        }
    };
    if timeout(server.timeout, served).await.is_err() {
        tracing::debug!("management: a connection was too slow (management.timeout)");
    }
}

async fn drive(server: &Server, io: impl AsyncRead + AsyncWrite + Unpin) {
    let service = service_fn(|request: Request<Incoming>| async move {
        Ok::<_, Infallible>(server.answer(&request).await)
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(server.timeout)
        .keep_alive(false)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(io), service)
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "management: connection ended");
    }
}

impl Server {
    /// What connects from now on gets the certificate that was `loaded`.
    pub fn change(&self, loaded: http::tls::Loaded) -> Result<(), http::tls::Error> {
        self.tls.store(loaded?.map(Arc::new));
        Ok(())
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        let mut response = match self.page(request).await {
            Ok((kind, text)) => page(StatusCode::OK, kind, text),
            Err(refusal) => refusal.into_response(),
        };
        let headers = response.headers_mut();
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        // hyper keeps the body of a HEAD back, and announces its length.
        response
    }

    async fn page(&self, request: &Request<Incoming>) -> Result<(&'static str, String), Refusal> {
        let path = request.uri().path();
        let path = path.strip_suffix('/').unwrap_or(path);
        if path == RESTART {
            return self.restart(request).map(|page| (JSON, page));
        }
        let plugin = path
            .strip_prefix("/plugins")
            .filter(|rest| rest.is_empty() || rest.starts_with('/'));
        if !PAGES.contains(&path) && plugin.is_none() {
            return Err(Refusal::NoSuchPath);
        }
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(Refusal::Method { allow: "GET, HEAD" });
        }
        if let Some(name) = plugin {
            return self.plugins(name).await.map(|page| (JSON, page));
        }
        match path {
            "" => Ok((JSON, pool::links(&self.base(request)))),
            "/pool" => Ok((JSON, pool::report(&self.status().await?))),
            "/cache" => Ok((JSON, pool::cached(&self.status().await?))),
            "/ping" => Ok((JSON, health::ok())),
            "/ready" => match self.is_ready() {
                true => Ok((JSON, health::ready())),
                false => Err(Refusal::NotReady),
            },
            "/status" => {
                let (broker, up) = (self.status().await?, self.since.elapsed());
                let counted = self.broker.metrics();
                Ok((JSON, health::status(self.is_ready(), up, &broker, counted)))
            }
            _ => {
                let page = metrics::page(
                    self.broker.metrics(),
                    &self.status().await?,
                    self.is_ready(),
                );
                Ok((metrics::CONTENT_TYPE, page))
            }
        }
    }

    /// No page of another site may do that in the name of who reads it: browsers say from
    /// where a POST comes.
    fn restart(&self, request: &Request<Incoming>) -> Result<String, Refusal> {
        if request.method() != Method::POST {
            return Err(Refusal::Method { allow: "POST" });
        }
        let is_of_page = |name: &str| request.headers().contains_key(name);
        if ["origin", "sec-fetch-site"].into_iter().any(is_of_page) {
            return Err(Refusal::OfBrowser);
        }
        self.restart.notify_one();
        Ok(health::ok())
    }

    fn base(&self, request: &Request<Incoming>) -> String {
        let scheme = if self.tls.load().is_some() {
            "https"
        } else {
            "http"
        };
        let host = request.headers().get(header::HOST);
        let host = host.and_then(|host| host.to_str().ok()).unwrap_or_default();
        format!("{scheme}://{host}")
    }

    /// All of them, or the one whose name follows the slash.
    async fn plugins(&self, rest: &str) -> Result<String, Refusal> {
        let broker = self.status().await?;
        let name = percent_encoding::percent_decode_str(rest).decode_utf8_lossy();
        match name.trim_matches('/') {
            "" => Ok(plugins::list(&broker)),
            name => plugins::one(&broker, name).ok_or(Refusal::NoSuchPath),
        }
    }

    fn is_ready(&self) -> bool {
        self.broker.is_ready() && !self.stopping.load(Ordering::Relaxed)
    }

    /// A broker that does not answer is worse news than any page has.
    async fn status(&self) -> Result<Status, Refusal> {
        let patience = self.timeout / 2;
        timeout(patience, self.broker.status())
            .await
            .map_err(|_| Refusal::BrokerSilent)
    }
}

const JSON: &str = "application/json;charset=utf-8";

/// Why there is no page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    NoSuchPath,
    Method { allow: &'static str },
    OfBrowser,
    NotReady,
    BrokerSilent,
}

impl Refusal {
    /// In the words of RFC 9457.
    fn into_response(self) -> Response<Full<Bytes>> {
        let (status, detail) = match self {
            Self::NoSuchPath => (StatusCode::NOT_FOUND, "No such page"),
            Self::Method { .. } => (StatusCode::METHOD_NOT_ALLOWED, "See Allow"),
            Self::OfBrowser => (StatusCode::FORBIDDEN, "Not for pages of a browser"),
            Self::NotReady => (StatusCode::SERVICE_UNAVAILABLE, "No worker is ready"),
            Self::BrokerSilent => (
                StatusCode::SERVICE_UNAVAILABLE,
                "The broker does not answer",
            ),
        };
        let problem = http::reply::problem(status, detail);
        let mut response = page(status, "application/problem+json", problem);
        if let Self::Method { allow } = self {
            let allow = HeaderValue::from_static(allow);
            response.headers_mut().insert(header::ALLOW, allow);
        }
        response
    }
}

fn page(status: StatusCode, kind: &'static str, text: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static(kind);
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
