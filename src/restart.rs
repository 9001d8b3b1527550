//! When workers are to be replaced: at SIGHUP, and when a file changes.

use std::path::Path;
use std::time::{Duration, SystemTime};

use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval};

use crate::config::Config;

/// Calls `restart` at every SIGHUP and every change of `server.restartmon`.
pub async fn watch(config: Config, restart: impl Fn()) {
    let mut hangups = signal(SignalKind::hangup()).expect("SIGHUP can be handled");
    let path = config.restartmon.as_deref();
    let mut seen = path.and_then(modified);
    let mut look = interval(config.restartmon_interval.max(Duration::from_millis(10)));
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = hangups.recv() => {
                tracing::info!("SIGHUP: replacing the workers");
                restart();
            }
            _ = look.tick(), if path.is_some() => {
                let now = path.and_then(modified);
                // A file that goes away is being replaced; its successor counts.
                if now.is_some() && now != seen {
                    let file = path.unwrap_or(Path::new("")).display();
                    tracing::info!(%file, "changed: replacing the workers (server.restartmon)");
                    restart();
                }
                seen = now.or(seen);
            }
        }
    }
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path)
        .and_then(|metadata| metadata.modified())
        .ok()
}
