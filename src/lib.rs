//! qgisserver turns an HTTP request into a call on a QGIS project inside a
//! disposable process, and the answer back into HTTP.
//!
//! A request passes `http → ogc → broker → (ROUTER) → link → qgis → exchange.py → QGIS`
//! and returns the same way. [`run`] puts the parts of the server together;
//! the worker shares [`protocol`], [`config`] and [`log`].

mod admin;
mod broker;
pub mod config;
pub mod directory;
#[doc(hidden)]
pub mod fuzzing;
mod http;
pub mod log;
mod metrics;
mod ogc;
mod pool;
pub mod protocol;
mod restart;
mod thread;
mod traces;

use std::future::Future;
use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use sd_notify::NotifyState;
use tokio::sync::mpsc;

use broker::{Broker, Handle};
use config::Config;
use pool::Order;
use protocol::Reason;

/// Why the server ends before it is told to.
#[derive(Debug)]
pub enum Error {
    Broker(broker::StartError),
    Http(http::Error),
    Management(admin::Error),
    /// The broker's task ended by itself, which is a bug.
    BrokerEnded,
}

impl Error {
    /// What the operator has set is to blame.
    pub fn is_configuration(&self) -> bool {
        matches!(
            self,
            Self::Http(http::Error::Tls(_) | http::Error::Traces(_))
                | Self::Management(admin::Error::Tls(_))
        )
    }
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Broker(error) => error.fmt(f),
            Self::Http(error) => error.fmt(f),
            Self::Management(error) => error.fmt(f),
            Self::BrokerEnded => write!(f, "the broker ended by itself: this is a bug"),
        }
    }
}

impl std::error::Error for Error {}

/// Sockets that are bound already, so that the process may have lost the right to.
#[derive(Debug, Default)]
pub struct Listeners {
    pub http: Vec<TcpListener>,
    /// Unused unless `config.management` is there.
    pub management: Vec<TcpListener>,
}

/// The worker program of this installation.
pub fn worker_program(config: &Config) -> PathBuf {
    pool::program(&config.pool)
}

/// Serves `listeners` until `shutdown`, then lets running requests end. Restarts
/// the workers at SIGHUP and when `server.restartmon` changes. Must run on a
/// current_thread runtime, as the broker does.
pub async fn run(
    config: Config,
    listeners: Listeners,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let (handle, mut broker) = broker::start(&config.broker).await.map_err(Error::Broker)?;
    if let Some(gate) = broker.gate {
        tracing::info!("workers are welcome at tcp://{gate}");
    }
    let management = config.management.as_ref();
    let management = management
        .map(|config| admin::start(config, listeners.management, handle.clone()))
        .transpose()
        .map_err(Error::Management)?;
    let shutdown = async {
        shutdown.await;
        management.iter().for_each(admin::Listening::stopping);
    };
    let (orders, keeper) = start_pool(&config, &broker);
    tokio::spawn(restart::watch(
        config.clone(),
        restarter(orders.clone(), handle.clone()),
    ));
    tokio::spawn(announce(
        handle.clone(),
        config.proxy,
        config.pool.start_timeout,
    ));
    let drain = config.drain_timeout;
    let served = tokio::select! {
        served = http::serve(Arc::new(config.http), listeners.http, handle, shutdown, drain) => served.map_err(Error::Http),
        () = broker.ended() => Err(Error::BrokerEnded),
    };
    let _ = sd_notify::notify(false, &[NotifyState::Stopping]);
    // Every client has its answer or was cut off: nothing is left to wait for.
    broker.stop(Duration::ZERO).await;
    if let (Some(orders), Some(keeper)) = (orders, keeper) {
        let _ = orders.send(Order::Stop).await;
        let _ = keeper.await;
    }
    tracing::info!("stopped");
    served
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

/// How to restart the workers: the local pool by signal, others through their workers.
fn restarter(orders: Option<mpsc::Sender<Order>>, handle: Handle) -> impl Fn() + Send {
    move || match &orders {
        // A full channel means that it was told already.
        Some(orders) => drop(orders.try_send(Order::Restart)),
        None => handle.tell_pools(Reason::Restart),
    }
}

/// Tells systemd and the log that requests will be answered. A proxy has no
/// workers to wait for; without any within `patience` it is said as well, since
/// the server does its part and answers 503 or 504.
async fn announce(handle: Handle, proxy: bool, patience: Duration) {
    let ready = async {
        let mut look = tokio::time::interval(Duration::from_millis(10));
        while !proxy && !handle.is_ready() {
            look.tick().await;
        }
    };
    match tokio::time::timeout(patience, ready).await {
        Ok(()) => tracing::info!("ready"),
        Err(_) => tracing::error!(
            "no worker after {patience:?} (worker.start_timeout): requests will time out"
        ),
    }
    let _ = sd_notify::notify(false, &[NotifyState::Ready]);
}
