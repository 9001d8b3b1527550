//! The pool of QGIS processes behind qgisserver: flags → settings → log → Python → pool.

mod board;
mod companions;
mod dealer;
mod documents;
mod drive;
mod environment;
mod gdal;
mod link;
mod loading;
mod machine;
mod memory;
mod patience;
mod places;
mod plugins;
mod pool;
mod preload;
mod projects;
mod qgis;
mod ready;
mod routes;
mod s3;
mod serve;
mod storages;

use std::process::ExitCode;

use nix::sys::signal::Signal;
use qgisserver::config::{self, Action, Config, Sources};
use qgisserver::protocol::Versions;
use qgisserver::{descriptors, log};

use qgis::Zygote;

/// The service cannot be provided (`EX_UNAVAILABLE`).
const UNAVAILABLE: u8 = 69;

fn main() -> ExitCode {
    // A server that reads its settings again may tell us so before we have read ours.
    // SIGTERM may end us until there is something to tidy up.
    pool::hold(Signal::SIGHUP);
    let mut sources = Sources::of_worker(std::env::args_os(), config::environment());
    match sources.read() {
        Ok(Action::Run(config, warnings)) => run(*config, sources, &warnings),
        Ok(Action::Version) => version(),
        Ok(Action::Help(text) | Action::PrintConfig(text) | Action::CheckConfig(_, text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(exit) => {
            eprintln!("qgisserver-worker: {}", exit.message);
            ExitCode::from(u8::try_from(exit.code).unwrap_or(1))
        }
    }
}

fn run(config: Config, sources: Sources, warnings: &[String]) -> ExitCode {
    log::init(&config.log);
    warnings
        .iter()
        .for_each(|warning| tracing::warn!("{warning}"));
    environment::prepare(&config.pool.env, &config.pool.env_allow);
    descriptors::raise_limit();
    let mask = match pool::hold_signals() {
        Ok(mask) => mask,
        Err(error) => {
            tracing::error!(%error, "signals cannot be held");
            return ExitCode::from(UNAVAILABLE);
        }
    };
    // Before Python: newer versions of QGIS make temporary files while they are imported.
    let folder = match pool::Folder::new() {
        Ok(folder) => folder,
        Err(error) => {
            let parent = std::env::temp_dir();
            tracing::error!(folder = %parent.display(), %error, "no place for temporary files (TMPDIR)");
            return ExitCode::from(UNAVAILABLE);
        }
    };
    environment::set_temporary(folder.path());
    if !plugins::install(&config.pool) && config.pool.plugins_strict {
        tracing::error!("not without all plugins (plugins.strict)");
        return ExitCode::from(UNAVAILABLE);
    }
    // Done once for all workers, and from a disk that may still be cold.
    patience::begin(config.pool.start_timeout * 2);
    let zygote = Zygote::start(&config.pool.python, &environment::prefix());
    patience::end();
    let zygote = match zygote {
        Ok(zygote) => zygote,
        Err(error) => {
            tracing::error!("{error}");
            return ExitCode::from(UNAVAILABLE);
        }
    };
    // A local pool ends with its server, whatever ends the server.
    let is_child = config.pool.server.starts_with("ipc://");
    match pool::run(config, sources, zygote, mask, folder, is_child) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the pool cannot go on");
            ExitCode::from(UNAVAILABLE)
        }
    }
}

/// `--version`: ours and those of all that answers.
fn version() -> ExitCode {
    environment::prepare(&Default::default(), &[]);
    let folder = pool::Folder::new();
    if let Ok(folder) = &folder {
        environment::set_temporary(folder.path());
    }
    let python = Config::default().pool.python;
    let versions = match Zygote::start(&python, &environment::prefix()) {
        Ok(zygote) => zygote.versions(),
        Err(error) => {
            eprintln!("qgisserver-worker: {error}");
            Versions {
                worker: env!("CARGO_PKG_VERSION").into(),
                ..Versions::default()
            }
        }
    };
    println!("qgisserver-worker {}", versions.worker);
    let rows = [
        ("QGIS", &versions.qgis),
        ("GDAL", &versions.gdal),
        ("PROJ", &versions.proj),
        ("GEOS", &versions.geos),
        ("Python", &versions.python),
    ];
    for (name, version) in rows {
        println!(
            "{name} {}",
            if version.is_empty() {
                "unknown"
            } else {
                version
            }
        );
    }
    ExitCode::SUCCESS
}

/// The name of this machine, for logs.
fn host() -> String {
    nix::unistd::gethostname()
        .ok()
        .and_then(|name| name.into_string().ok())
        .unwrap_or_else(|| "localhost".into())
}
