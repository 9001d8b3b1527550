//! The server: flags → settings → log → signals → ports → privileges → run → exit code.

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use qgisserver::config::{self, Action, Config, Management, Sources};
use qgisserver::sockets::{GATE, Inherited, MANAGEMENT, Sockets};
use qgisserver::upgrade::Program;
use qgisserver::{Certificates, descriptors, log};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// The configuration is wrong (`EX_CONFIG`), as far as only trying shows.
const CONFIGURATION: u8 = 78;
/// The service cannot be provided (`EX_UNAVAILABLE`).
const UNAVAILABLE: u8 = 69;

/// For threads that are about to end.
const TIDY: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let mut sources = Sources::of_server(std::env::args_os(), config::environment());
    match sources.read() {
        Ok(Action::Run(config, warnings)) => {
            log::init(&config.log);
            log_panics();
            warnings
                .iter()
                .for_each(|warning| tracing::warn!("{warning}"));
            serve(*config, sources).unwrap_or_else(|(code, message)| {
                tracing::error!("{message}");
                ExitCode::from(code)
            })
        }
        Ok(Action::Version) => version(),
        Ok(Action::Help(text) | Action::PrintConfig(text)) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Ok(Action::CheckConfig(config, verdict)) => check(&config, &sources, &verdict),
        Err(exit) => {
            eprintln!("qgisserver: {}", exit.message);
            ExitCode::from(u8::try_from(exit.code).unwrap_or(1))
        }
    }
}

/// As everything else: nobody waits long for who reads it.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        log::panicked(panic, "a thread panicked, which is a mistake of qgisserver");
    }));
}

/// `--check-config`: `verdict`, unless the server would not start with it all the same.
fn check(config: &Config, sources: &Sources, verdict: &str) -> ExitCode {
    match as_user(config, sources) {
        Ok(_) => {
            print!("{verdict}");
            ExitCode::SUCCESS
        }
        Err((code, message)) => {
            eprintln!("qgisserver: {message}");
            ExitCode::from(code)
        }
    }
}

/// Becomes the user that the settings name. That one has to be able to read what the server
/// reads now and at each reload.
fn as_user(config: &Config, sources: &Sources) -> Result<Certificates, Failed> {
    become_user(config.setuid.as_deref())?;
    let certificates = qgisserver::certificates(config, sources);
    certificates.map_err(|mistakes| (CONFIGURATION, mistakes.join("\n")))
}

type Failed = (u8, String);

fn serve(config: Config, sources: Sources) -> Result<ExitCode, Failed> {
    let unavailable = |error: std::io::Error| (UNAVAILABLE, error.to_string());
    let program = Program::of_this_process().map_err(unavailable)?;
    let inherited = Inherited::take().map_err(unavailable)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| (UNAVAILABLE, format!("no event loop: {error}")))?;
    // Before the ports: whoever sees us listen may tell us to stop.
    let stop = {
        let _inside = runtime.enter();
        // Heard for good from now on; what they mean is for `reload.rs` and `upgrade.rs` to know.
        drop(signal(SignalKind::hangup()));
        drop(signal(SignalKind::user_defined2()));
        [SignalKind::terminate(), SignalKind::interrupt()]
            .map(|kind| signal(kind).expect("the signal can be handled"))
    };
    let sockets = open(&config, inherited)?;
    let certificates = as_user(&config, &sources)?;
    // The first thread besides this one: from here on the environment stays as it is.
    let _aside = log::aside().map_err(unavailable)?;
    descriptors::raise_limit();
    let outcome = runtime.block_on(async {
        let stopped = stopped(stop);
        qgisserver::run(config, certificates, sources, sockets, program, stopped).await
    });
    // A thread that reads a file may wait for ever.
    runtime.shutdown_timeout(TIDY);
    outcome
        .map(|()| ExitCode::SUCCESS)
        .map_err(|error| match error.is_configuration() {
            true => (CONFIGURATION, error.to_string()),
            false => (UNAVAILABLE, error.to_string()),
        })
}

/// What is listened on for HTTP and the workers, and what for the management.
fn open(config: &Config, inherited: Inherited) -> Result<Sockets, Failed> {
    let opened = Sockets::open(&config.http, inherited);
    let mut sockets = opened.map_err(|taken| not_bound(&HTTP_NAMES, taken))?;
    let found = listeners(sockets.http())?;
    announce("listening on", config.http.tls.is_some(), &found);
    let gate = config.broker.gate.into_iter();
    let opened = sockets.open_others(GATE, gate);
    opened.map_err(|taken| not_bound(&GATE_NAMES, taken))?;
    if let Some(Management {
        interfaces,
        port,
        tls,
        ..
    }) = &config.management
    {
        let addresses = interfaces.iter().map(|ip| SocketAddr::new(*ip, *port));
        let opened = sockets.open_others(MANAGEMENT, addresses);
        opened.map_err(|taken| not_bound(&MANAGEMENT_NAMES, taken))?;
        announce(
            "management at",
            tls.is_some(),
            &listeners(sockets.others(MANAGEMENT))?,
        );
    }
    Ok(sockets)
}

fn listeners(all: std::io::Result<Vec<TcpListener>>) -> Result<Vec<TcpListener>, Failed> {
    all.map_err(|error| (UNAVAILABLE, error.to_string()))
}

/// The settings that say where to listen.
const HTTP_NAMES: [&str; 2] = ["server.interfaces", "server.port"];
const GATE_NAMES: [&str; 1] = ["zmq.bindaddr"];
const MANAGEMENT_NAMES: [&str; 2] = ["management.interfaces", "management.port"];

fn not_bound(names: &[&str], (address, error): (SocketAddr, std::io::Error)) -> Failed {
    let names = names.join(", ");
    (
        CONFIGURATION,
        format!("cannot listen on {address} ({names}): {error}"),
    )
}

fn announce(what: &str, tls: bool, listeners: &[TcpListener]) {
    let scheme = if tls { "https" } else { "http" };
    for address in listeners.iter().flat_map(TcpListener::local_addr) {
        tracing::info!("{what} {scheme}://{address}/");
    }
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
    if is_already(&user) {
        return Ok(());
    }
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

/// As the successor of a server that became it.
fn is_already(user: &nix::unistd::User) -> bool {
    use nix::unistd::{getresgid, getresuid};
    let uid = getresuid().is_ok_and(|it| [it.real, it.effective, it.saved] == [user.uid; 3]);
    let gid = getresgid().is_ok_and(|it| [it.real, it.effective, it.saved] == [user.gid; 3]);
    uid && gid
}

/// Some supervisors signal the process and its group: one wish, told twice.
const SAME_WISH: Duration = Duration::from_millis(500);

/// Resolves at SIGTERM or SIGINT. Another one ends the process at once, be it that it
/// stops or that it makes room for a successor.
async fn stopped([mut terminate, mut interrupt]: [Signal; 2]) {
    let (tell, told) = oneshot::channel();
    tokio::spawn(async move {
        next(&mut terminate, &mut interrupt).await;
        tracing::info!("stopping: running requests may end, a second signal ends them");
        let _ = tell.send(());
        let first = Instant::now();
        while first.elapsed() < SAME_WISH {
            next(&mut terminate, &mut interrupt).await;
        }
        tracing::warn!("stopped by a second signal");
        log::flush();
        std::process::exit(1);
    });
    let _ = told.await;
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
