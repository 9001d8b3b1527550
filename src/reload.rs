//! New settings for a running server: at SIGHUP, when `server.restartmon` changes, and when the
//! operator says so at the management listener.
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
use crate::{admin, http, load, log};

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

/// Reloads at every SIGHUP, every change of `server.restartmon` and every POST for it.
pub async fn watch(mut reload: Reload) {
    let mut hangups = signal(SignalKind::hangup()).expect("SIGHUP can be handled");
    let (mut seen, mut reading) = (Seen::default(), None);
    loop {
        let config = reload.config.borrow().clone();
        let was_touched = tokio::select! {
            _ = hangups.recv() => {
                tracing::info!("SIGHUP: reading the settings again");
                false
            }
            () = posted(&reload.management) => {
                tracing::info!("POST /pool/restart: reading the settings again");
                false
            }
            // Dropping it loses nothing: `seen` has what it waited for.
            file = changed(&config, &mut seen) => {
                let file = file.display();
                tracing::info!(%file, "changed: reading the settings again (server.restartmon)");
                true
            }
        };
        match read(&reload.sources, config.reload_timeout, &mut reading).await {
            Ok(Some(news)) => reload.take_up(news),
            Ok(None) => {}
            // Nobody stands by to touch it once more.
            Err(Late) if was_touched => seen.forget(),
            Err(Late) => {}
        }
    }
}

/// Resolves when the management listener is told to. Dropping it loses nothing.
async fn posted(management: &Option<Arc<admin::Server>>) {
    match management {
        Some(server) => server.restart.notified().await,
        None => pending().await,
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
        let (public, management) = load(&changed.config);
        Ok(Self {
            public,
            management,
            sources,
            changed,
        })
    }
}

type Reading = JoinHandle<Result<News, Exit>>;

/// They may be read well another time.
struct Late;

/// What the files say now, if they can be read within `bound`; None if that is wrong. One
/// thread at most is left waiting for them: `unfinished`.
async fn read(
    sources: &Sources,
    bound: Duration,
    unfinished: &mut Option<Reading>,
) -> Result<Option<News>, Late> {
    if let Some(old) = unfinished
        && timeout(bound, old).await.is_err()
    {
        tracing::error!("settings and certificates are still being read: nothing changes");
        return Err(Late);
    }
    *unfinished = None;
    let sources = sources.clone();
    let mut reading = spawn_blocking(|| News::read(sources));
    match timeout(bound, &mut reading).await {
        Ok(Ok(Ok(news))) => return Ok(Some(news)),
        Ok(Ok(Err(exit))) => log_mistakes(&exit),
        Ok(Err(error)) => tracing::error!(%error, "the settings cannot be read: nothing changes"),
        Err(_) => {
            tracing::error!(
                "settings and certificates cannot be read within {bound:?} \
                 (server.reload_timeout): nothing changes"
            );
            *unfinished = Some(reading);
            return Err(Late);
        }
    }
    Ok(None)
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

type Modified = Option<SystemTime>;

/// `server.restartmon` as it was when we last looked.
#[derive(Default)]
struct Seen {
    path: PathBuf,
    /// None before the first look.
    modified: Option<Modified>,
    /// Before its last change.
    before: Modified,
    /// A look that is not over. Where a file system hangs, one thread at most waits for it.
    look: Option<JoinHandle<Modified>>,
}

impl Seen {
    /// Looks at the file with `stat`.
    async fn has_changed(&mut self, stat: fn(&Path) -> Modified) -> bool {
        let path = &self.path;
        let look = self.look.get_or_insert_with(|| {
            let path = path.clone();
            spawn_blocking(move || stat(&path))
        });
        // Dropped here, it is waited for the next time.
        let now = look.await.ok().flatten();
        self.look = None;
        let Some(before) = self.modified else {
            self.modified = Some(now);
            return false;
        };
        // A file that goes away is being replaced; its successor counts.
        let has_changed = now.is_some() && now != before;
        if has_changed {
            self.before = before;
        }
        self.modified = Some(now.or(before));
        has_changed
    }

    /// The last change is still to be seen.
    fn forget(&mut self) {
        self.modified = Some(self.before);
    }
}

/// Resolves when `server.restartmon` is another than was `seen`, with its path.
async fn changed(config: &Config, seen: &mut Seen) -> PathBuf {
    let Some(path) = &config.restartmon else {
        return pending().await;
    };
    let mut look = interval(config.restartmon_interval.max(Duration::from_millis(10)));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    if seen.path != *path {
        // Another file begins anew.
        *seen = Seen {
            path: path.clone(),
            ..Seen::default()
        };
    }
    loop {
        look.tick().await;
        if seen.has_changed(modified).await {
            return seen.path.clone();
        }
    }
}

fn modified(path: &Path) -> Modified {
    std::fs::metadata(path).ok()?.modified().ok()
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().unwrap()
    }

    #[test]
    fn a_look_that_hangs_is_waited_for_again_and_none_is_begun_beside_it() {
        static N_LOOKS: AtomicUsize = AtomicUsize::new(0);
        static AWAY: Mutex<()> = Mutex::new(());
        fn hanging(_: &Path) -> Modified {
            N_LOOKS.fetch_add(1, Ordering::SeqCst);
            drop(AWAY.lock());
            Some(SystemTime::UNIX_EPOCH)
        }
        let mut seen = Seen {
            modified: Some(None),
            ..Seen::default()
        };
        let runtime = runtime();
        let away = AWAY.lock().unwrap();
        for _ in 0..5 {
            let turn =
                async { timeout(Duration::from_millis(20), seen.has_changed(hanging)).await };
            assert!(runtime.block_on(turn).is_err(), "it hangs");
        }
        drop(away);
        assert!(runtime.block_on(seen.has_changed(hanging)));
        assert_eq!(N_LOOKS.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn a_change_is_seen_once_and_again_when_it_is_forgotten() {
        fn later(_: &Path) -> Modified {
            Some(SystemTime::UNIX_EPOCH)
        }
        let mut seen = Seen::default();
        runtime().block_on(async {
            assert!(!seen.has_changed(|_| None).await, "it is not there yet");
            assert!(seen.has_changed(later).await);
            assert!(!seen.has_changed(later).await);
            seen.forget();
            assert!(seen.has_changed(later).await);
            assert!(!seen.has_changed(|_| None).await, "it is being replaced");
            assert!(!seen.has_changed(later).await);
        });
    }
}
