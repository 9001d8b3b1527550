//! What an operator copies to /etc: systemd accepts the units, supervisord runs the programs.

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use common::process::is_alive;
use common::{free_address, http, kill, poll, source};
use nix::sys::signal::Signal;
use qgisserver::config::Config;

const PATIENCE: Duration = Duration::from_secs(90);
const CAPABILITIES: &str = "/ows/?SERVICE=WMS&REQUEST=GetCapabilities&MAP=world";

#[test]
fn systemd_finds_no_fault_in_the_units() {
    let folder = tempfile::tempdir().unwrap();
    let units = installed(folder.path(), "systemd");
    let verify = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(&units)
        .output()
        .expect("systemd-analyze is installed (Debian package systemd)");
    let said = String::from_utf8_lossy(&verify.stderr).into_owned();
    assert!(verify.status.success(), "{said}");
    let about_us: Vec<_> = said
        .lines()
        .filter(|line| line.contains("qgisserver"))
        .collect();
    assert_eq!(about_us, Vec::<&str>::new());
    assert_eq!(units.len(), 4);
}

#[test]
fn nobody_is_killed_while_the_server_still_drains() {
    let drain = Config::default()
        .drain_timeout
        .max(Config::default().pool.drain_timeout);
    for path in services() {
        assert!(
            seconds(&path, "TimeoutStopSec=") > drain,
            "{}",
            path.display()
        );
    }
    assert!(seconds(&source("etc/supervisord.conf"), "stopwaitsecs=") > drain);
}

#[test]
fn reload_is_a_rolling_restart_in_every_unit() {
    for path in services() {
        let unit = fs::read_to_string(&path).unwrap();
        assert!(
            unit.contains("\nExecReload=/bin/kill -HUP $MAINPID\n"),
            "{}",
            path.display()
        );
        assert!(unit.contains("\nType=notify\n"), "{}", path.display());
    }
}

#[test]
fn systemd_is_told_when_the_server_is_ready_and_when_it_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Notifying::start(folder.path(), "qgisserver", &[]);
    server.says("READY=1");
    server.ends_after("STOPPING=1");
}

#[test]
fn systemd_is_told_which_process_succeeds_and_that_nothing_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut server = Notifying::start(folder.path(), "qgisserver", &[]);
    server.says("READY=1");
    kill(server.child.id() as i32, Signal::SIGUSR2);
    let successor = server.next();
    let told: Vec<_> = successor.lines().collect();
    assert_eq!(told[1..], ["READY=1"], "{successor}");
    let pid = told[0].strip_prefix("MAINPID=").expect(&successor);
    let pid = pid.parse().unwrap();
    let status = eventually("the end", String::new, || server.child.try_wait().unwrap());
    assert!(status.success(), "{status}");
    kill(pid, Signal::SIGTERM);
    assert_eq!(server.next().trim(), "STOPPING=1", "and not before");
    gone(&[pid]);
}

#[test]
fn systemd_is_told_when_a_pool_is_ready_and_when_it_stops() {
    let folder = tempfile::tempdir().unwrap();
    let mut proxy = Notifying::start(folder.path(), "qgisserver", &["--proxy"]);
    proxy.says("READY=1");
    let mut pool = Notifying::start(folder.path(), "qgisserver-worker", &[]);
    pool.says("READY=1");
    pool.ends_after("STOPPING=1");
    proxy.ends_after("STOPPING=1");
}

#[test]
fn supervisord_starts_restarts_and_stops_the_server_and_leaves_nobody_behind() {
    let supervisor = Supervisor::start();
    let first = supervisor.serving("qgisserver", 1);
    let family = supervisor.family("qgisserver");
    assert!(family.len() >= 3, "server, pool and worker: {family:?}");

    supervisor.control(&["restart", "qgisserver"]);
    gone(&family);
    let second = supervisor.serving("qgisserver", 2);
    assert!(
        supervisor.pid("qgisserver") != Some(family[0]),
        "{first} then {second}"
    );

    let family = supervisor.family("qgisserver");
    supervisor.control(&["stop", "qgisserver"]);
    gone(&family);
    assert!(get(&second).is_none(), "nobody listens any more");
}

#[test]
fn supervisord_replaces_a_server_that_was_killed() {
    let supervisor = Supervisor::start();
    supervisor.serving("qgisserver", 1);
    let family = supervisor.family("qgisserver");
    kill(family[0], Signal::SIGKILL);
    gone(&family);
    supervisor.serving("qgisserver", 2);
}

#[test]
fn supervisord_runs_server_and_workers_apart() {
    let supervisor = Supervisor::start();
    supervisor.serving("qgisserver", 1);
    supervisor.control(&["stop", "qgisserver"]);

    supervisor.control(&["start", "qgisserver-worker", "qgisserver-proxy"]);
    let base = supervisor.serving("qgisserver-proxy", 1);
    supervisor.control(&["restart", "qgisserver-worker"]);
    assert_eq!(
        capabilities(&base),
        Some(200),
        "a new pool joined the same server"
    );

    let family: Vec<_> = ["qgisserver-proxy", "qgisserver-worker"]
        .iter()
        .flat_map(|name| supervisor.family(name))
        .collect();
    supervisor.control(&["stop", "all"]);
    gone(&family);
}

/// A program of ours that believes that systemd started it.
struct Notifying {
    socket: UnixDatagram,
    child: Child,
}

impl Notifying {
    fn start(folder: &Path, program: &str, flags: &[&str]) -> Self {
        let path = folder.join(format!("{program}.notify"));
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let file = folder.join("qgisserver.conf");
        if !file.exists() {
            fs::write(&file, settings()).unwrap();
        }
        let child = Command::new(programs().join(program))
            .args(flags)
            .arg("-c")
            .arg(&file)
            .env("NOTIFY_SOCKET", &path)
            .env("RUNTIME_DIRECTORY", folder)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        Self { socket, child }
    }

    fn next(&self) -> String {
        let mut message = [0; 4096];
        let n = self.socket.recv(&mut message).expect("a message");
        String::from_utf8_lossy(&message[..n]).into_owned()
    }

    /// Waits for the word; others, such as STATUS, may come before it.
    fn says(&self, word: &str) {
        loop {
            let message = self.next();
            if message.lines().any(|line| line == word) {
                return;
            }
        }
    }

    fn ends_after(&mut self, word: &str) {
        kill(self.child.id() as i32, Signal::SIGTERM);
        self.says(word);
        let status = eventually("the end", String::new, || self.child.try_wait().unwrap());
        assert!(status.success(), "{status}");
    }
}

impl Drop for Notifying {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A supervisord with our programs on the example projects, in a folder of its own.
struct Supervisor {
    folder: tempfile::TempDir,
    child: Child,
}

impl Supervisor {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let programs = installed(folder.path(), "etc");
        let programs = programs
            .iter()
            .find(|path| path.ends_with("supervisord.conf"))
            .unwrap();
        let here = folder.path().display();
        fs::write(folder.path().join("qgisserver.conf"), settings()).unwrap();
        fs::write(
            folder.path().join("daemon.conf"),
            format!(
                "[supervisord]\nnodaemon=true\nlogfile={here}/supervisord.log\npidfile={here}/supervisord.pid\n\
                 childlogdir={here}\n\
                 [unix_http_server]\nfile={here}/control.sock\n\
                 [supervisorctl]\nserverurl=unix://{here}/control.sock\n\
                 [rpcinterface:supervisor]\n\
                 supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n\
                 [include]\nfiles={}\n",
                programs.display()
            ),
        )
        .unwrap();
        let child = Command::new("/usr/bin/supervisord")
            .arg("-c")
            .arg(folder.path().join("daemon.conf"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("supervisord is installed (Debian package supervisor)");
        Self { folder, child }
    }

    fn ctl(&self, words: &[&str]) -> Output {
        Command::new("/usr/bin/supervisorctl")
            .arg("-c")
            .arg(self.folder.path().join("daemon.conf"))
            .args(words)
            .output()
            .expect("supervisorctl is installed (Debian package supervisor)")
    }

    fn control(&self, words: &[&str]) {
        let done = self.ctl(words);
        assert!(
            done.status.success(),
            "{words:?}: {}",
            String::from_utf8_lossy(&done.stdout)
        );
    }

    fn log(&self, program: &str) -> String {
        fs::read_to_string(self.folder.path().join(format!("{program}.log"))).unwrap_or_default()
    }

    /// The base URL of the nth life of the program, once QGIS answers there.
    fn serving(&self, program: &str, life: usize) -> String {
        let base = eventually(
            &format!("life {life} of {program}"),
            || self.log(program),
            || {
                let log = self.log(program);
                let line = log
                    .lines()
                    .filter(|line| line.contains("listening on http://"))
                    .nth(life - 1)?;
                let url = &line[line.find("http://")?..];
                url.split_whitespace()
                    .next()
                    .map(|url| url.trim_end_matches('/').to_owned())
            },
        );
        eventually(
            "GetCapabilities",
            || self.log(program),
            || (capabilities(&base) == Some(200)).then_some(()),
        );
        base
    }

    fn pid(&self, program: &str) -> Option<i32> {
        let said = self.ctl(&["pid", program]).stdout;
        String::from_utf8_lossy(&said)
            .trim()
            .parse()
            .ok()
            .filter(|pid| *pid > 0)
    }

    /// The program and all that descends from it.
    fn family(&self, program: &str) -> Vec<i32> {
        let mut found = vec![self.pid(program).expect("it runs")];
        let mut at = 0;
        while at < found.len() {
            found.extend(children(found[at]));
            at += 1;
        }
        found
    }
}

impl Drop for Supervisor {
    /// supervisord takes its programs along before it leaves.
    fn drop(&mut self) {
        kill(self.child.id() as i32, Signal::SIGTERM);
        poll(PATIENCE, || self.child.try_wait().ok().flatten());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Any port, the examples, one worker; the gate on a port that was free a moment ago.
fn settings() -> String {
    let gate = free_address();
    format!(
        "[server]\ninterfaces=127.0.0.1\nport=0\nworkers=1\n\
         [projects.cache]\nrootdir={}\n\
         [zmq]\nhostaddr=127.0.0.1\nbindaddr=tcp://{gate}\n",
        source("examples/projects").display()
    )
}

fn services() -> impl Iterator<Item = PathBuf> {
    let all = files("systemd").into_iter();
    all.filter(|path| path.extension().is_some_and(|it| it == "service"))
}

/// Where this build's programs are.
fn programs() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_qgisserver"))
        .parent()
        .unwrap()
}

/// Copies of the files of a folder that name this build's programs and `folder`
/// where they name those of an installed system.
fn installed(folder: &Path, from: &str) -> Vec<PathBuf> {
    let programs = programs();
    let worker = fs::metadata(programs.join("qgisserver-worker"))
        .expect("the worker is built: cargo build --workspace");
    assert!(worker.permissions().mode() & 0o100 != 0);
    files(from)
        .into_iter()
        .map(|path| {
            let here = folder.to_str().unwrap();
            let text = fs::read_to_string(&path)
                .unwrap()
                .replace("/usr/bin/", &format!("{}/", programs.display()))
                .replace("/etc/qgisserver.conf", &format!("{here}/qgisserver.conf"))
                .replace("/var/log/supervisor/", &format!("{here}/"))
                .replace("HOME=\"/var/lib/qgisserver\"", &format!("HOME=\"{here}\""))
                .replace("user=www-data\n", "");
            let copy = folder.join(path.file_name().unwrap());
            fs::write(&copy, text).unwrap();
            copy
        })
        .collect()
}

fn files(folder: &str) -> Vec<PathBuf> {
    fs::read_dir(source(folder))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.is_file())
        .collect()
}

/// The least of the values that a file gives to a key.
fn seconds(file: &Path, key: &str) -> Duration {
    let text = fs::read_to_string(file).unwrap();
    let values = text
        .lines()
        .filter_map(|line| line.strip_prefix(key)?.parse().ok());
    Duration::from_secs(
        values
            .min()
            .unwrap_or_else(|| panic!("{} says {key}", file.display())),
    )
}

fn capabilities(base: &str) -> Option<u16> {
    get(&format!("{base}{CAPABILITIES}"))
}

/// The status, or None when nobody answers.
fn get(url: &str) -> Option<u16> {
    http::ask("GET", url, &[], b"")
        .ok()
        .map(|reply| reply.status)
}

fn children(pid: i32) -> Vec<i32> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    lists
        .flat_map(|list| {
            list.split_whitespace()
                .map(|pid| pid.parse().unwrap())
                .collect::<Vec<_>>()
        })
        .collect()
}

/// Waits until none of the processes runs; one that nobody has reaped yet runs no more.
fn gone(family: &[i32]) {
    let left = || {
        family
            .iter()
            .filter(|pid| is_alive(**pid))
            .collect::<Vec<_>>()
    };
    let say = || format!("{:?}", left());
    eventually("the end of all processes", say, || {
        left().is_empty().then_some(())
    });
}

/// Asks until there is an answer; without one in time, says what `state` says.
fn eventually<T>(what: &str, state: impl Fn() -> String, ask: impl FnMut() -> Option<T>) -> T {
    poll(PATIENCE, ask).unwrap_or_else(|| panic!("{what}: not within {PATIENCE:?}: {}", state()))
}
