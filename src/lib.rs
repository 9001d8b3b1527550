//! qgisserver turns an HTTP request into a call on a QGIS project inside a
//! disposable process, and the answer back into HTTP.
//!
//! A request passes `http → ogc → broker → (ROUTER) → link → qgis → exchange.py → QGIS`
//! and returns the same way. [`run`] puts the parts of the server together;
//! the worker shares [`protocol`], [`config`] and [`log`].

mod admin;
mod broker;
pub mod config;
pub mod descriptors;
pub mod directory;
#[doc(hidden)]
pub mod fuzzing;
mod http;
pub mod log;
mod metrics;
mod ogc;
mod pool;
pub mod protocol;
mod reload;
pub mod sockets;
mod thread;
mod traces;
pub mod upgrade;

use std::future::{Future, pending};
use std::io;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use sd_notify::NotifyState;
use tokio::sync::{mpsc, watch};
use tokio_rustls::TlsAcceptor;

use broker::{Broker, Handle};
use config::{Config, Sources};
use pool::Order;
use reload::Reload;
use sockets::{GATE, MANAGEMENT, Predecessor, Sockets};
use upgrade::Program;

/// Why the server ends before it is told to.
#[derive(Debug)]
pub enum Error {
    Broker(broker::StartError),
    Http(http::Error),
    Management(admin::Error),
    Sockets(io::Error),
    /// The broker's task ended by itself, which is a bug.
    BrokerEnded,
}

impl Error {
    /// What the operator has set is to blame.
    pub fn is_configuration(&self) -> bool {
        matches!(self, Self::Http(http::Error::Traces(_)))
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Broker(error) => error.fmt(f),
            Self::Http(error) => error.fmt(f),
            Self::Management(error) => error.fmt(f),
            Self::Sockets(error) => write!(f, "the sockets cannot be used: {error}"),
            Self::BrokerEnded => write!(f, "the broker ended by itself: this is a bug"),
        }
    }
}

impl std::error::Error for Error {}

/// The project that MAP names, or that a policy or an operator's list names in the same way.
pub fn project(map: &str, finding: &config::Finding) -> Option<protocol::ProjectRef> {
    let known = finding.names();
    let schemes = ogc::guard::Schemes {
        default: &finding.default_scheme,
        known: known.as_deref(),
    };
    ogc::guard::project(map, schemes)
}

/// The worker program of this installation.
pub fn worker_program(config: &Config) -> PathBuf {
    pool::program(&config.pool)
}

/// What the listeners have where they speak TLS: the public one, and the management's.
pub struct Certificates {
    public: Option<TlsAcceptor>,
    management: Option<TlsAcceptor>,
}

/// Those that the settings name, or what only trying shows of the settings: a line for each
/// that cannot be used.
pub fn certificates(config: &Config, sources: &Sources) -> Result<Certificates, Vec<String>> {
    let mut wrong = Vec::new();
    let mut good = |loaded: http::tls::Loaded| {
        let heard = |error: &http::tls::Error| {
            wrong.push(sources.mistake(&error.setting, &error.what()));
        };
        loaded.inspect_err(heard).ok().flatten()
    };
    let (public, management) = load(config);
    let certificates = Certificates {
        public: good(public),
        management: management.and_then(good),
    };
    match wrong.is_empty() {
        true => Ok(certificates),
        false => Err(wrong),
    }
}

/// That of the public listener, and of the management's if there is one.
fn load(config: &Config) -> (http::tls::Loaded, Option<http::tls::Loaded>) {
    let public = http::tls::load("server", config.http.tls.as_ref());
    (public, config.management.as_ref().map(admin::load))
}

/// Serves `sockets` until `shutdown` or a successor's word, then lets running requests
/// end: without a bound but their own after that word, and after `shutdown` within
/// `server.drain_timeout`. Reads `sources`, where `config` came from, again at SIGHUP and when
/// `server.restartmon` changes; starts `program` as successor at SIGUSR2. Must run on a
/// current_thread runtime, as the broker does.
pub async fn run(
    config: Config,
    certificates: Certificates,
    sources: Sources,
    sockets: Sockets,
    program: Program,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let (tell, told) = watch::channel(None);
    let telling = async {
        shutdown.await;
        tell.send_replace(Some(Instant::now()));
        pending().await
    };
    tokio::select! {
        served = run_until(Told(told), config, certificates, sources, sockets, program) => served,
        served = telling => served,
    }
}

async fn run_until(
    told: Told,
    config: Config,
    certificates: Certificates,
    sources: Sources,
    mut sockets: Sockets,
    program: Program,
) -> Result<(), Error> {
    let gate = sockets.others(GATE).map_err(Error::Sockets)?.pop();
    sockets.close_rest();
    let (handle, mut broker) = broker::start(&config.broker, gate)
        .await
        .map_err(Error::Broker)?;
    if let Some(gate) = broker.gate {
        tracing::info!("workers are welcome at tcp://{gate}");
    }
    let server = http::Server::new(config.http.clone(), certificates.public, handle.clone());
    let server = server.map_err(Error::Http)?;
    let server = Arc::new(server);
    let threads = http::threads(&config.http).map_err(Error::Http)?;
    let listeners = sockets.http().map_err(Error::Sockets)?;
    let others = sockets.others(MANAGEMENT).map_err(Error::Sockets)?;
    let management = config
        .management
        .as_ref()
        .map(|config| admin::prepare(config, certificates.management, others, handle.clone()))
        .transpose()
        .map_err(Error::Management)?;
    // From here on nothing can fail: a predecessor may believe us.
    let (orders, keeper) = start_pool(&config, &broker);
    let predecessor = sockets.take_predecessor();
    let (in_force, current) = watch::channel(config.clone());
    let reloading = tokio::spawn(reload::watch(Reload {
        sources,
        server: server.clone(),
        broker: handle.clone(),
        management: management.as_ref().map(|it| it.server.clone()),
        orders: orders.clone(),
        endpoint: broker.endpoint.clone(),
        config: in_force,
    }));
    let may_serve = match predecessor {
        None => {
            let patience = config.pool.start_timeout;
            tokio::spawn(announce(handle.clone(), config.proxy, patience));
            true
        }
        Some(predecessor) => tokio::select! {
            () = succeed(predecessor, &handle, config.proxy) => true,
            _ = told.at() => false,
        },
    };
    let mut end = End::Told;
    let served = if may_serve {
        let mut gate = broker.accepting();
        // A predecessor listens there, too, until it hands over.
        let mut management = management.map(admin::Prepared::start);
        let drain = async {
            let patience = || current.borrow().pool.start_timeout;
            end = tokio::select! {
                _ = told.at() => End::Told,
                pid = upgrade::watch(&program, &sockets, patience) => End::Succeeded { pid },
            };
            // What changes from here on is for others.
            reloading.abort();
            if let End::Succeeded { pid } = end {
                // If we were never ready ourselves, it is.
                let _ = sd_notify::notify(false, &[NotifyState::MainPid(pid), NotifyState::Ready]);
                // Pools and operators that come from here on go there.
                gate.take();
                management.take();
                if config.proxy {
                    handle.release();
                }
            }
            management.iter().for_each(admin::Listening::stopping);
            // Who connects from here on does so to a successor, or to nobody.
            drop(sockets);
        };
        let cut = told.long_ago(&current);
        tokio::select! {
            () = http::serve(server, threads, listeners, drain, cut) => Ok(()),
            () = broker.ended() => Err(Error::BrokerEnded),
        }
    } else {
        Ok(())
    };
    // For systemd the service goes on when another process serves.
    if matches!(end, End::Told) {
        let _ = sd_notify::notify(false, &[NotifyState::Stopping]);
    }
    // Every client has its answer or was cut off. What runs on without one may end, too.
    let run_on = current.borrow().broker.run_on_timeout;
    let mut stopped = pin!(broker.stop(run_on));
    tokio::select! {
        () = stopped.as_mut() => {}
        _ = told.long_ago(&current) => {
            handle.abort();
            stopped.await;
        }
    }
    if let (Some(orders), Some(keeper)) = (orders, keeper) {
        let _ = orders.send(Order::Stop).await;
        let _ = keeper.await;
    }
    tracing::info!("stopped");
    served
}

/// When the server was told to stop, once it was.
struct Told(watch::Receiver<Option<Instant>>);

impl Told {
    async fn at(&self) -> Instant {
        let mut told = self.0.clone();
        let told = told.wait_for(Option::is_some).await;
        told.ok().and_then(|at| *at).unwrap_or_else(Instant::now)
    }

    /// Resolves when that is `server.drain_timeout` ago. A handover alone is in no hurry.
    async fn long_ago(&self, config: &watch::Receiver<Config>) -> Duration {
        let at = self.at().await;
        let patience = config.borrow().drain_timeout;
        tokio::time::sleep_until((at + patience).into()).await;
        patience
    }
}

/// Why a server drains.
#[derive(Clone, Copy)]
enum End {
    Told,
    Succeeded { pid: u32 },
}

/// Waits until requests will be answered, and tells the server whose place we take.
/// One that died meanwhile cannot serve any more, so we do.
async fn succeed(predecessor: Predecessor, handle: &Handle, proxy: bool) {
    until(|| proxy || handle.is_ready() || !predecessor.is_alive()).await;
    tracing::info!("ready");
    predecessor.tell();
}

type Keeper = tokio::task::JoinHandle<()>;

fn start_pool(config: &Config, broker: &Broker) -> (Option<mpsc::Sender<Order>>, Option<Keeper>) {
    if config.proxy {
        return (None, None);
    }
    let recipe = pool::Recipe::new(config, &broker.endpoint);
    let (orders, received) = mpsc::channel(4);
    (
        Some(orders),
        Some(tokio::spawn(pool::keep(recipe, received))),
    )
}

/// Tells systemd and the log that requests will be answered. A proxy has no
/// workers to wait for; without any within `patience` it is said as well, since
/// the server does its part and answers 503 or 504.
async fn announce(handle: Handle, proxy: bool, patience: Duration) {
    let ready = until(|| proxy || handle.is_ready());
    match tokio::time::timeout(patience, ready).await {
        Ok(()) => tracing::info!("ready"),
        Err(_) => tracing::error!(
            "no worker after {patience:?} (worker.start_timeout): requests will time out"
        ),
    }
    let _ = sd_notify::notify(false, &[NotifyState::Ready]);
}

/// Looks again and again whether it `is_so`.
async fn until(is_so: impl Fn() -> bool) {
    let mut look = tokio::time::interval(Duration::from_millis(10));
    while !is_so() {
        look.tick().await;
    }
}
