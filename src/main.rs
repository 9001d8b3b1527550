//! The server: flags → settings → log → signals → ports → privileges → run → exit code.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use qgisserver::config::{self, Action, Config, Http, Management};
use qgisserver::{Listeners, log};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// The configuration is wrong (`EX_CONFIG`), as far as only trying shows.
const CONFIGURATION: u8 = 78;
/// The service cannot be provided (`EX_UNAVAILABLE`).
const UNAVAILABLE: u8 = 69;

fn main() -> ExitCode {
    let environment = config::environment();
    match config::server_command_line(std::env::args_os(), &environment) {
        Ok(Action::Run(config, warnings)) => {
            log::init(&config.log);
            warnings
                .iter()
                .for_each(|warning| tracing::warn!("{warning}"));
            serve(*config).unwrap_or_else(|(code, message)| {
                tracing::error!("{message}");
                ExitCode::from(code)
            })
        }
        Ok(Action::Version) => version(),
        Ok(Action::Help(text) | Action::PrintConfig(text) | Action::CheckConfig(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(exit) => {
            eprintln!("qgisserver: {}", exit.message);
            ExitCode::from(u8::try_from(exit.code).unwrap_or(1))
        }
    }
}

type Failed = (u8, String);

fn serve(config: Config) -> Result<ExitCode, Failed> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| (UNAVAILABLE, format!("no event loop: {error}")))?;
    // Before the ports: whoever sees us listen may tell us to stop.
    let stop = {
        let _inside = runtime.enter();
        // Heard for good from now on; what it means is `restart.rs`'s to know.
        drop(signal(SignalKind::hangup()));
        [SignalKind::terminate(), SignalKind::interrupt()]
            .map(|kind| signal(kind).expect("the signal can be handled"))
    };
    let listeners = bind(&config)?;
    become_user(config.setuid.as_deref())?;
    raise_descriptor_limit();
    let outcome =
        runtime.block_on(async { qgisserver::run(config, listeners, stopped(stop)).await });
    outcome
        .map(|()| ExitCode::SUCCESS)
        .map_err(|error| match error.is_configuration() {
            true => (CONFIGURATION, error.to_string()),
            false => (UNAVAILABLE, error.to_string()),
        })
}

fn bind(config: &Config) -> Result<Listeners, Failed> {
    let scheme = |tls: bool| if tls { "https" } else { "http" };
    let Http {
        interfaces,
        port,
        tls,
        ..
    } = &config.http;
    let what = format!("listening on {}", scheme(tls.is_some()));
    let http = listen("server", interfaces, *port, &what)?;
    let management = match &config.management {
        None => Vec::new(),
        Some(Management {
            interfaces,
            port,
            tls,
            ..
        }) => {
            let what = format!("management at {}", scheme(tls.is_some()));
            listen("management", interfaces, *port, &what)?
        }
    };
    Ok(Listeners { http, management })
}

/// The ports of one section of the settings.
fn listen(
    section: &str,
    interfaces: &[IpAddr],
    port: u16,
    what: &str,
) -> Result<Vec<TcpListener>, Failed> {
    let bind = |interface: &IpAddr| {
        let address = SocketAddr::new(*interface, port);
        let failed = |error| {
            let names = format!("{section}.interfaces, {section}.port");
            (
                CONFIGURATION,
                format!("cannot listen on {address} ({names}): {error}"),
            )
        };
        let listener = TcpListener::bind(address).map_err(failed)?;
        tracing::info!("{what}://{}/", listener.local_addr().map_err(failed)?);
        Ok(listener)
    };
    interfaces.iter().map(bind).collect()
}

/// `--setuid`: the ports are bound, nothing else needs root.
fn become_user(name: Option<&str>) -> Result<(), Failed> {
    let Some(name) = name else { return Ok(()) };
    let failed = |why: String| {
        (
            CONFIGURATION,
            format!("cannot become {name} (--setuid): {why}"),
        )
    };
    let user = nix::unistd::User::from_name(name)
        .map_err(|error| failed(error.to_string()))?
        .ok_or_else(|| failed("there is no such user".into()))?;
    let c_name = std::ffi::CString::new(name).map_err(|error| failed(error.to_string()))?;
    nix::unistd::initgroups(&c_name, user.gid)
        .and_then(|()| nix::unistd::setgid(user.gid))
        .and_then(|()| nix::unistd::setuid(user.uid))
        .map_err(|error| failed(error.to_string()))?;
    // QGIS keeps its profile and its authentication database at home.
    let home = user.dir.into_os_string();
    for (variable, value) in [
        ("HOME", home),
        ("USER", name.into()),
        ("LOGNAME", name.into()),
    ] {
        // SAFETY: there is no other thread yet. The pool inherits the environment.
        unsafe { std::env::set_var(variable, value) };
    }
    Ok(())
}

/// Every connection is a descriptor, and the usual soft limit is 1024.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Some supervisors signal the process and its group: one wish, told twice.
const SAME_WISH: Duration = Duration::from_millis(500);

/// Resolves at SIGTERM or SIGINT. Another one ends the process at once.
async fn stopped([mut terminate, mut interrupt]: [Signal; 2]) {
    next(&mut terminate, &mut interrupt).await;
    tracing::info!("stopping: running requests may end, a second signal ends them");
    tokio::spawn(async move {
        let first = Instant::now();
        while first.elapsed() < SAME_WISH {
            next(&mut terminate, &mut interrupt).await;
        }
        tracing::warn!("stopped by a second signal");
        std::process::exit(1);
    });
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}

/// `--version`: ours, and what the worker program says of QGIS and its libraries.
fn version() -> ExitCode {
    println!("qgisserver {}", env!("CARGO_PKG_VERSION"));
    let program = qgisserver::worker_program(&Config::default());
    match Command::new(&program).arg("--version").output() {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            text.lines().skip(1).for_each(|line| println!("{line}"));
        }
        Err(error) => println!(
            "QGIS unknown: {} does not start: {error}",
            program.display()
        ),
    }
    ExitCode::SUCCESS
}
