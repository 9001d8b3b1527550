//! New settings for a running server: at SIGHUP, and when `server.restartmon` changes.
//!
//! All parts take up what is new, and the workers are replaced one after the other.
//! With a mistake in the settings nothing changes.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::{MissedTickBehavior, interval};

use crate::broker::Handle;
use crate::config::{Config, Sources, log_mistakes};
use crate::pool::{Order, Recipe};
use crate::protocol::Reason;
use crate::{http, log};

/// Whoever has to hear of new settings.
pub struct Reload {
    pub sources: Sources,
    pub server: Arc<http::Server<Handle>>,
    pub broker: Handle,
    /// To the local pool, if there is one.
    pub orders: Option<mpsc::Sender<Order>>,
    /// Where the workers of the local pool connect.
    pub endpoint: String,
    /// What is in force.
    pub config: watch::Sender<Config>,
}

/// Reloads at every SIGHUP and every change of `server.restartmon`.
pub async fn watch(mut reload: Reload) {
    let mut hangups = signal(SignalKind::hangup()).expect("SIGHUP can be handled");
    let mut seen = Seen::now(&reload.config.borrow());
    loop {
        let config = reload.config.borrow().clone();
        let mut look = interval(config.restartmon_interval.max(Duration::from_millis(10)));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = hangups.recv() => {
                    tracing::info!("SIGHUP: reading the settings again");
                    break;
                }
                _ = look.tick(), if config.restartmon.is_some() => {
                    if seen.has_changed(&config) {
                        tracing::info!(file = %seen.path(), "changed: reading the settings again (server.restartmon)");
                        break;
                    }
                }
            }
        }
        reload.now();
        seen.follow(&reload.config.borrow());
    }
}

impl Reload {
    fn now(&mut self) {
        let changed = match self.sources.read_again() {
            Ok(changed) => changed,
            Err(exit) => return log_mistakes(&exit),
        };
        changed.log();
        let config = changed.config;
        log::change(&config.log);
        if let Err(error) = self.server.change(config.http.clone()) {
            tracing::error!("{error}: the old certificate stays");
        }
        self.broker.configure(config.broker.clone());
        self.renew_workers(&config);
        self.config.send_replace(config);
    }

    /// The local pool by signal, others through their workers.
    fn renew_workers(&self, config: &Config) {
        tracing::info!("replacing the workers");
        match &self.orders {
            Some(orders) => {
                // A full channel means that it was told already.
                let recipe = Recipe::new(config, &self.endpoint);
                drop(orders.try_send(Order::Renew(recipe)));
            }
            None => self.broker.tell_pools(Reason::Restart),
        }
    }
}

/// `server.restartmon` as it was when we last looked.
struct Seen {
    path: Option<std::path::PathBuf>,
    modified: Option<SystemTime>,
}

impl Seen {
    fn now(config: &Config) -> Self {
        let path = config.restartmon.clone();
        Self {
            modified: path.as_deref().and_then(modified),
            path,
        }
    }

    /// Another file begins anew.
    fn follow(&mut self, config: &Config) {
        if self.path != config.restartmon {
            *self = Self::now(config);
        }
    }

    fn has_changed(&mut self, config: &Config) -> bool {
        let now = config.restartmon.as_deref().and_then(modified);
        // A file that goes away is being replaced; its successor counts.
        let has_changed = now.is_some() && now != self.modified;
        self.modified = now.or(self.modified);
        has_changed
    }

    fn path(&self) -> std::path::Display<'_> {
        self.path.as_deref().unwrap_or(Path::new("")).display()
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
}
