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
    let mut config = reload.config.borrow().clone();
    let mut seen = Seen::now(&config).await;
    loop {
        let mut look = interval(config.restartmon_interval.max(Duration::from_millis(10)));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = hangups.recv() => {
                    tracing::info!("SIGHUP: reading the settings again");
                    break;
                }
                _ = look.tick(), if config.restartmon.is_some() => {
                    if seen.has_changed(&config).await {
                        tracing::info!(file = %seen.path(), "changed: reading the settings again (server.restartmon)");
                        break;
                    }
                }
            }
        }
        reload.now();
        config = reload.config.borrow().clone();
        seen.follow(&config).await;
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
    async fn now(config: &Config) -> Self {
        let path = config.restartmon.clone();
        Self {
            modified: modified(path.as_deref()).await,
            path,
        }
    }

    /// Another file begins anew.
    async fn follow(&mut self, config: &Config) {
        if self.path != config.restartmon {
            *self = Self::now(config).await;
        }
    }

    async fn has_changed(&mut self, config: &Config) -> bool {
        let now = modified(config.restartmon.as_deref()).await;
        // A file that goes away is being replaced; its successor counts.
        let has_changed = now.is_some() && now != self.modified;
        self.modified = now.or(self.modified);
        has_changed
    }

    fn path(&self) -> std::path::Display<'_> {
        self.path.as_deref().unwrap_or(Path::new("")).display()
    }
}

/// On a file system that hangs, nobody else waits for it.
async fn modified(path: Option<&Path>) -> Option<SystemTime> {
    let metadata = tokio::fs::metadata(path?).await.ok()?;
    metadata.modified().ok()
}
