//! New settings for a running server: at SIGHUP, and when `server.restartmon` changes.
//!
//! All parts take up what is new, and the workers are replaced one after the other.
//! With a mistake in the settings nothing changes. Files are read in threads of their
//! own: the one that runs us is the broker's, and a file system may hang.

use std::future::pending;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, spawn_blocking};
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::broker::Handle;
use crate::config::{Changed, Config, Exit, Sources, log_mistakes};
use crate::http::tls;
use crate::pool::{Order, Recipe};
use crate::protocol::Reason;
use crate::{admin, http, log};

/// Whoever has to hear of new settings.
pub struct Reload {
    pub sources: Sources,
    pub server: Arc<http::Server<Handle>>,
    pub broker: Handle,
    pub management: Option<Arc<admin::Server>>,
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
    let (mut seen, mut reading) = (None, None);
    loop {
        let config = reload.config.borrow().clone();
        tokio::select! {
            _ = hangups.recv() => tracing::info!("SIGHUP: reading the settings again"),
            // Dropping it loses one look at a file.
            file = changed(&config, &mut seen) => {
                let file = file.display();
                tracing::info!(%file, "changed: reading the settings again (server.restartmon)");
            }
        }
        if let Some(news) = read(&reload.sources, config.reload_timeout, &mut reading).await {
            reload.take_up(news);
        }
    }
}

/// Settings, and the certificates that they name.
struct News {
    sources: Sources,
    changed: Changed,
    public: tls::Loaded,
    management: Option<tls::Loaded>,
}

impl News {
    fn read(mut sources: Sources) -> Result<Self, Exit> {
        let changed = sources.read_again()?;
        Ok(Self {
            public: tls::load("server", changed.config.http.tls.as_ref()),
            management: changed.config.management.as_ref().map(admin::load),
            sources,
            changed,
        })
    }
}

type Reading = JoinHandle<Result<News, Exit>>;

/// What the files say now, if they can be read within `bound`. One thread at most is left
/// waiting for them: `unfinished`.
async fn read(
    sources: &Sources,
    bound: Duration,
    unfinished: &mut Option<Reading>,
) -> Option<News> {
    if let Some(old) = unfinished
        && timeout(bound, old).await.is_err()
    {
        tracing::error!("settings and certificates are still being read: nothing changes");
        return None;
    }
    *unfinished = None;
    let sources = sources.clone();
    let mut reading = spawn_blocking(|| News::read(sources));
    match timeout(bound, &mut reading).await {
        Ok(Ok(Ok(news))) => return Some(news),
        Ok(Ok(Err(exit))) => log_mistakes(&exit),
        Ok(Err(error)) => tracing::error!(%error, "the settings cannot be read: nothing changes"),
        Err(_) => {
            tracing::error!(
                "settings and certificates cannot be read within {bound:?} \
                 (server.reload_timeout): nothing changes"
            );
            *unfinished = Some(reading);
        }
    }
    None
}

impl Reload {
    fn take_up(&mut self, news: News) {
        self.sources = news.sources;
        news.changed.log();
        let config = news.changed.config;
        log::change(&config.log);
        let changed = self.server.change(config.http.clone(), news.public);
        let managed = self.management.as_ref().zip(news.management);
        let managed = managed.map(|(server, loaded)| server.change(loaded));
        for error in [Some(changed), managed].into_iter().flatten() {
            if let Err(error) = error {
                tracing::error!("{error}: the old certificate stays");
            }
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
    path: PathBuf,
    modified: Option<SystemTime>,
}

impl Seen {
    async fn now(path: &Path) -> Self {
        Self {
            modified: modified(path).await,
            path: path.to_owned(),
        }
    }

    async fn has_changed(&mut self) -> bool {
        let now = modified(&self.path).await;
        // A file that goes away is being replaced; its successor counts.
        let has_changed = now.is_some() && now != self.modified;
        self.modified = now.or(self.modified);
        has_changed
    }
}

/// Resolves when `server.restartmon` is another than was `seen`, with its path.
async fn changed(config: &Config, seen: &mut Option<Seen>) -> PathBuf {
    let Some(path) = &config.restartmon else {
        return pending().await;
    };
    let mut look = interval(config.restartmon_interval.max(Duration::from_millis(10)));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    // Another file begins anew.
    let seen = match seen {
        Some(seen) if seen.path == *path => seen,
        _ => seen.insert(Seen::now(path).await),
    };
    loop {
        look.tick().await;
        if seen.has_changed().await {
            return seen.path.clone();
        }
    }
}

/// On a file system that hangs, nobody else waits for it.
async fn modified(path: &Path) -> Option<SystemTime> {
    let metadata = tokio::fs::metadata(path).await.ok()?;
    metadata.modified().ok()
}
