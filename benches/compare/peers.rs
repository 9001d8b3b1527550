//! The three that are compared: each starts in its own way, answers the same
//! queries and is gone when dropped.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::client::Client;

pub const PYTHON: &str = "/usr/bin/python3";
const FASTCGI: &str = "/usr/lib/cgi-bin/qgis_mapserv.fcgi";
const PATIENCE: Duration = Duration::from_secs(60);

/// Folders of one run of the bench; the programs write nowhere else.
pub struct Place {
    pub scratch: PathBuf,
    pub projects: PathBuf,
    pub plugins: PathBuf,
}

impl Place {
    pub fn project(&self, name: &str) -> PathBuf {
        self.projects.join(name).with_extension("qgs")
    }

    /// What all QGIS processes get: Debian's Python first, no display, our plugin.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", &self.scratch)
            .env("TMPDIR", &self.scratch)
            .env("XDG_RUNTIME_DIR", &self.scratch)
            .env("QT_QPA_PLATFORM", "offscreen")
            .env("OPENBLAS_NUM_THREADS", "1")
            .env("QGIS_PLUGINPATH", &self.plugins);
        command
    }
}

/// Where a server is, and how it calls a project.
pub struct Peer {
    pub address: SocketAddr,
    /// Its processes, as far as others do not descend from them.
    pub pids: Vec<u32>,
    path: &'static str,
    map: String,
}

impl Peer {
    pub fn target(&self, query: &str) -> String {
        format!("{}?MAP={}&{query}", self.path, self.map)
    }

    pub fn connect(&self) -> Client {
        Client::connect(self.address).expect("the server listens")
    }
}

/// `handleRequest` in a Python program, with no server around it.
pub struct InProcess {
    child: Child,
    ask: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl InProcess {
    pub fn start(place: &Place, project: &str) -> Self {
        let mut child = place
            .command(PYTHON)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/compare/inprocess.py"))
            .args([place.project(project), place.plugins.clone()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("python3 is installed");
        let ask = child.stdin.take().expect("piped");
        let mut answers = BufReader::new(child.stdout.take().expect("piped"));
        answers.read_line(&mut String::new()).expect("QGIS starts");
        Self {
            child,
            ask,
            answers,
        }
    }

    /// Size of the body, and what each of the calls took.
    pub fn calls(&mut self, count: usize, query: &str) -> (usize, Vec<Duration>) {
        writeln!(self.ask, "{count} {query}").expect("the program listens");
        let mut line = String::new();
        self.answers
            .read_line(&mut line)
            .expect("the program answers");
        let mut numbers = line
            .split_whitespace()
            .map(|n| n.parse::<u64>().expect("a number"));
        let bytes = numbers.next().expect("QGIS answered 200 in-process") as usize;
        (bytes, numbers.map(Duration::from_micros).collect())
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// nginx before `spawn-fcgi` before stock QGIS Server.
pub struct FastCgi {
    nginx: Child,
    qgis: Vec<i32>,
    address: SocketAddr,
}

impl FastCgi {
    pub fn start(place: &Place, processes: usize) -> Self {
        let address = free_address();
        // Those of an earlier one may still be ending, and hold theirs.
        let socket = place.scratch.join(format!("fcgi-{}.sock", address.port()));
        let pids = socket.with_extension("pids");
        let spawned = place
            .command("spawn-fcgi")
            .args(["-M", "0666", "-F", &processes.to_string(), "-s"])
            .arg(&socket)
            .arg("-P")
            .arg(&pids)
            .args(["--", FASTCGI])
            .stdout(Stdio::null())
            .status();
        assert!(spawned.expect("spawn-fcgi is installed").success());
        let qgis = fs::read_to_string(&pids).expect("spawn-fcgi wrote the pids");
        let qgis = qgis
            .split_whitespace()
            .map(|pid| pid.parse().expect("a pid"))
            .collect();
        let config = place.scratch.join("nginx.conf");
        fs::write(&config, nginx_config(place, &socket, address)).expect("scratch is writable");
        let nginx = place
            .command("nginx")
            .arg("-c")
            .arg(&config)
            .args(["-e", "stderr"])
            .spawn();
        let peer = Self {
            nginx: nginx.expect("nginx is installed"),
            qgis,
            address,
        };
        until("nginx listens", || Client::connect(address).ok());
        peer
    }

    pub fn serving(&self, place: &Place, project: &str) -> Peer {
        Peer {
            address: self.address,
            pids: self
                .qgis
                .iter()
                .map(|pid| *pid as u32)
                .chain([self.nginx.id()])
                .collect(),
            path: "/",
            map: place.project(project).display().to_string(),
        }
    }
}

impl Drop for FastCgi {
    fn drop(&mut self) {
        terminate(self.nginx.id() as i32);
        let _ = self.nginx.wait();
        self.qgis.iter().copied().for_each(terminate);
    }
}

/// As in the manuals: defaults, an access log as ours among them. `user` only matters to root.
fn nginx_config(place: &Place, socket: &Path, address: SocketAddr) -> String {
    let (scratch, socket) = (place.scratch.display(), socket.display());
    let user = if fs::metadata("/proc/self")
        .is_ok_and(|me| std::os::unix::fs::MetadataExt::uid(&me) == 0)
    {
        "user root;"
    } else {
        ""
    };
    format!(
        "{user} daemon off; worker_processes 2; pid {scratch}/nginx.pid; error_log stderr crit;
events {{ worker_connections 256; }}
http {{
  access_log {scratch}/access.log; keepalive_requests 1000000;
  client_body_temp_path {scratch}/body; proxy_temp_path {scratch}/proxy; fastcgi_temp_path {scratch}/fastcgi;
  uwsgi_temp_path {scratch}/uwsgi; scgi_temp_path {scratch}/scgi;
  server {{
    listen {address} backlog=512;
    location / {{
      include /etc/nginx/fastcgi_params;
      fastcgi_param SERVER_NAME localhost;
      fastcgi_pass unix:{socket};
    }}
  }}
}}
"
    )
}

/// Ours.
pub struct Server {
    child: Child,
    address: SocketAddr,
    pub started: Instant,
}

impl Server {
    pub fn start(place: &Place, workers: usize) -> Self {
        let started = Instant::now();
        let mut child = place
            .command(env!("CARGO_BIN_EXE_qgisserver"))
            .args([
                "-b",
                "127.0.0.1",
                "-p",
                "0",
                "-w",
                &workers.to_string(),
                "--rootdir",
            ])
            .arg(&place.projects)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("qgisserver is built");
        let address = listening(&mut child);
        Self {
            child,
            address,
            started,
        }
    }

    pub fn serving(&self, project: &str) -> Peer {
        Peer {
            address: self.address,
            pids: vec![self.child.id()],
            path: "/ows/",
            map: project.to_owned(),
        }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        terminate(self.child.id() as i32);
        let _ = self.child.wait();
    }
}

/// The address that the log names; the rest of the log is read and forgotten.
fn listening(child: &mut Child) -> SocketAddr {
    let log = BufReader::new(child.stderr.take().expect("piped"));
    let (found, address) = mpsc::channel();
    std::thread::spawn(move || {
        for line in log.lines().map_while(Result::ok) {
            if let Some((_, rest)) = line.split_once("listening on http://") {
                let end = rest.find(['/', ' ']).unwrap_or(rest.len());
                let _ = found.send(rest[..end].parse().expect("an address follows"));
            }
        }
    });
    address
        .recv_timeout(PATIENCE)
        .expect("qgisserver says where it listens")
}

/// Asks again and again, with pauses too short to blur a measurement in milliseconds.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let since = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            since.elapsed() < PATIENCE,
            "{what}: not within {PATIENCE:?}"
        );
        std::thread::sleep(Duration::from_micros(500));
    }
}

fn terminate(pid: i32) {
    signal(pid, nix::sys::signal::Signal::SIGTERM);
}

pub fn signal(pid: i32, signal: nix::sys::signal::Signal) {
    let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal);
}

fn free_address() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("loopback has a free port");
    listener.local_addr().expect("it is bound")
}
