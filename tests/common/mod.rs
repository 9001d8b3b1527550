//! Runs the real programs for the tests beside this folder.
//!
//! A [`Server`] is `qgisserver` with its pool on a free port; [`Server::stub`]
//! gives it workers that obey (see `tests/stub`), [`Server::real`] the example
//! projects and real QGIS. When it is dropped it is told to stop, and then
//! nothing may be left: no process, no temporary file.
#![allow(dead_code)] // Every test program uses another part.

pub mod client;
pub mod http;
pub mod load;
pub mod native;
pub mod process;
pub mod relay;
pub mod tls;
pub mod wire;

use std::collections::BTreeMap;
use std::io::Write;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

pub use http::Reply;
use process::Process;

/// No event that a test waits for takes longer, even on a busy machine.
pub const SOON: Duration = Duration::from_secs(20);

/// A management listener on a port of its own.
pub const MANAGED: &str = "management.enabled = yes\nmanagement.port = 0";

/// `tests/`, `examples/` and the programs.
pub fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn program(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_qgisserver")).with_file_name(name);
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --workspace`",
        path.display()
    );
    path
}

/// Held by tests that need the whole machine, against others of the same program.
pub fn alone() -> MutexGuard<'static, ()> {
    static MACHINE: Mutex<()> = Mutex::new(());
    // Another test that failed has nothing to do with this one.
    MACHINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The value that `question` finally has, or None when it has none within `bound`.
pub fn poll<T>(bound: Duration, mut question: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + bound;
    loop {
        let is_last = Instant::now() > end;
        let answer = question();
        if answer.is_some() || is_last {
            return answer;
        }
        // Other processes do not tell us what they do: they are looked at now and then.
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The value that `question` finally has, asked again and again up to the bound.
pub fn eventually<T>(what: &str, question: impl FnMut() -> Option<T>) -> T {
    poll(SOON, question).unwrap_or_else(|| panic!("{what}: not within {SOON:?}"))
}

/// What came of the work, and how long it took.
pub fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    (work(), start.elapsed())
}

/// What the catalogue of QGIS calls a project.
pub fn md5(path: &Path) -> String {
    let mut program = Command::new("md5sum")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = program.stdin.take().unwrap();
    stdin
        .write_all(path.as_os_str().as_encoded_bytes())
        .unwrap();
    drop(stdin);
    let said = program.wait_with_output().unwrap().stdout;
    String::from_utf8(said).unwrap()[..32].to_owned()
}

/// What the workers of a server run: the stub or QGIS, on which projects.
pub struct World {
    folder: TempDir,
    is_stub: bool,
    variables: Vec<(String, String)>,
}

impl World {
    /// Workers that obey, and the projects `city` and `corrupt`.
    pub fn stub() -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
            is_stub: true,
            variables: Vec::new(),
        };
        copy(&source("tests/stub"), &world.path("stub"));
        std::fs::create_dir(world.path("stub/control")).unwrap();
        std::fs::create_dir(world.path("projects")).unwrap();
        std::fs::write(world.path("projects/city.qgs"), "<qgis/>").unwrap();
        std::fs::write(world.path("projects/corrupt.qgs"), "corrupt").unwrap();
        world
    }

    /// QGIS, and a copy of the example projects.
    pub fn real() -> Self {
        let world = Self {
            folder: tempfile::tempdir().unwrap(),
            is_stub: false,
            variables: Vec::new(),
        };
        copy(&source("examples/projects"), &world.path("projects"));
        world
    }

    /// Workers that have the service ECHO, too, and note in a journal what they run.
    pub fn with_echo(self) -> Self {
        std::fs::create_dir(self.path("journal")).unwrap();
        copy(&source("tests/data/echo"), &self.path("plugins"));
        self
    }

    /// What ECHO noted: `+` and the tag of a request that began, `-` of one that ended.
    pub fn journal(&self) -> Vec<String> {
        let files = std::fs::read_dir(self.path("journal")).unwrap().flatten();
        let notes = files.map(|file| std::fs::read_to_string(file.path()).unwrap());
        let lines = notes.map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>());
        lines.flatten().collect()
    }

    /// With a variable more in the environment of the programs.
    pub fn with(mut self, name: &str, value: &Path) -> Self {
        self.variables.push((name.to_owned(), text(value)));
        self
    }

    /// For programs that become another user.
    pub fn open_to_everybody(&self) {
        use std::os::unix::fs::PermissionsExt;
        let open = |mode| std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(self.folder.path(), open(0o755)).unwrap();
        std::fs::set_permissions(self.path("stub/control"), open(0o777)).unwrap();
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn projects(&self) -> PathBuf {
        self.path("projects")
    }

    /// Tells the stub: from now on `name` is there.
    pub fn tell(&self, name: &str) {
        std::fs::write(self.path("stub/control").join(name), "").unwrap();
    }

    pub fn untell(&self, name: &str) {
        std::fs::remove_file(self.path("stub/control").join(name)).unwrap();
    }

    /// How often the stub noted `name`.
    pub fn count(&self, name: &str) -> usize {
        let noted = std::fs::read_to_string(self.path("stub/control").join(name));
        noted.map_or(0, |text| text.lines().count())
    }

    pub fn wait_count(&self, name: &str, n: usize) {
        eventually(&format!("{name} noted {n} times"), || {
            (self.count(name) >= n).then_some(())
        });
    }

    /// Environment of the programs: nothing of this process but what they need.
    fn environment(&self, tmp: &TempDir) -> Vec<(String, String)> {
        let mut env = vec![
            ("PATH".to_owned(), std::env::var("PATH").unwrap_or_default()),
            ("TMPDIR".to_owned(), text(tmp.path())),
            ("HOME".to_owned(), text(&self.path("home"))),
            ("LANG".to_owned(), "C.UTF-8".to_owned()),
            // Which of them do workers see?
            ("MY_SECRET".to_owned(), "secret".to_owned()),
            ("ALLOWED_BY_THE_OPERATOR".to_owned(), "1".to_owned()),
        ];
        if self.is_stub {
            env.push(("PYTHONPATH".to_owned(), text(&self.path("stub"))));
            env.push(("PYTHONDONTWRITEBYTECODE".to_owned(), "1".to_owned()));
        }
        env.extend(self.variables.iter().cloned());
        env
    }

    fn settings(&self, own: &str) -> BTreeMap<String, String> {
        let mut all = BTreeMap::from([
            (
                "server.workers".to_owned(),
                if self.is_stub { "2" } else { "1" }.to_owned(),
            ),
            ("projects.cache.rootdir".to_owned(), text(&self.projects())),
        ]);
        if self.path("journal").exists() {
            let path = text(&self.path("plugins"));
            all.insert("server.pluginpath".to_owned(), path);
        }
        for line in own.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (name, value) = line.split_once('=').expect("settings are `name = value`");
            all.insert(name.trim().to_owned(), value.trim().to_owned());
        }
        all
    }
}

fn flags(settings: BTreeMap<String, String>) -> Vec<String> {
    let flags = settings.into_iter();
    flags
        .flat_map(|(name, value)| ["--set".into(), format!("{name}={value}")])
        .collect()
}

fn text(path: &Path) -> String {
    path.to_str()
        .expect("temporary directories have plain names")
        .to_owned()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        match path.is_dir() {
            true if entry.file_name() == "__pycache__" => {}
            true => copy(&path, &target),
            false => drop(std::fs::copy(&path, &target).unwrap()),
        }
    }
}

/// A running `qgisserver`.
pub struct Server {
    // Dropped, that is stopped, before the projects go.
    pub process: Process,
    pub world: World,
    pub address: SocketAddr,
    /// Where workers of other pools join; only with `--proxy`.
    pub gate: Option<SocketAddr>,
    n_workers: usize,
}

impl Server {
    /// A server with workers that obey, ready to serve.
    pub fn stub(settings: &str) -> Self {
        Self::start(World::stub(), settings).ready()
    }

    /// A server with QGIS and the example projects, ready to serve.
    pub fn real(settings: &str) -> Self {
        Self::start(World::real(), settings).ready()
    }

    /// A server without workers. Give it a [`Pool`].
    pub fn proxy(world: World, settings: &str) -> Self {
        let gate = free_address();
        Self::proxy_at(world, SocketAddr::from(([127, 0, 0, 1], 0)), gate, settings)
    }

    pub fn proxy_at(world: World, http: SocketAddr, gate: SocketAddr, settings: &str) -> Self {
        Self::proxy_in(tmp(), world, http, gate, settings)
    }

    /// As if it were the successor of the one that had this temporary directory.
    pub fn proxy_in(
        tmp: Arc<TempDir>,
        world: World,
        http: SocketAddr,
        gate: SocketAddr,
        settings: &str,
    ) -> Self {
        let own = format!(
            "server.proxy = yes\nzmq.bindaddr = tcp://{gate}\nserver.port = {}",
            http.port()
        );
        Self {
            gate: Some(gate),
            ..Self::start_in(tmp, world, &format!("{own}\n{settings}"))
        }
    }

    /// A server that listens, but may have no worker yet.
    pub fn start(world: World, settings: &str) -> Self {
        Self::start_in(tmp(), world, settings)
    }

    /// A server whose other settings are in a file, so that they can change; `settings`
    /// stand on the command line. `program` is a copy of it, which can be replaced.
    pub fn start_from(world: World, program: &Path, file: &Path, settings: &str) -> Self {
        let tmp = tmp();
        let own = "server.port = 0\nserver.interfaces = 127.0.0.1\nserver.status_page = yes";
        let mut settings = world.settings(&format!("{own}\n{settings}"));
        settings.remove("server.workers");
        let worker = text(&self::program("qgisserver-worker"));
        settings.entry("worker.program".into()).or_insert(worker);
        let mut args = flags(settings);
        args.extend(["-c".into(), text(file)]);
        let process = Process::spawn(program, &args, tmp.clone(), world.environment(&tmp));
        Self {
            address: listening(&process),
            process,
            world,
            gate: None,
            n_workers: 2,
        }
    }

    fn start_in(tmp: Arc<TempDir>, world: World, settings: &str) -> Self {
        let own = "server.port = 0\nserver.interfaces = 127.0.0.1\nserver.status_page = yes";
        let settings = world.settings(&format!("{own}\n{settings}"));
        let n_workers = settings["server.workers"].parse().unwrap();
        program("qgisserver-worker");
        let process = Process::spawn(
            &program("qgisserver"),
            &flags(settings),
            tmp.clone(),
            world.environment(&tmp),
        );
        Self {
            address: listening(&process),
            process,
            world,
            gate: None,
            n_workers,
        }
    }

    /// A server that speaks HTTPS, which the other questions here do not.
    pub fn start_tls(world: World, settings: &str) -> Self {
        let server = Self::start_in(tmp(), world, settings);
        server.process.log.wait_line(" ready");
        server
    }

    pub fn ready(self) -> Self {
        self.wait_workers(self.n_workers);
        self.wait_ready();
        self
    }

    pub fn wait_ready(&self) {
        eventually("a worker is ready", || {
            (self.get("/ready").status == 200).then_some(())
        });
    }

    pub fn wait_workers(&self, n: usize) {
        eventually(&format!("{n} workers"), || {
            (self.workers().len() == n).then_some(())
        });
    }

    /// So many workers, and none of `gone`; how few there were on the way.
    pub fn wait_replaced(&self, gone: &[i32], n: usize) -> usize {
        let mut fewest = usize::MAX;
        eventually(&format!("{n} workers, and none of {gone:?}"), || {
            let now = self.workers();
            fewest = fewest.min(now.len());
            let is_done = now.len() == n && now.iter().all(|pid| !gone.contains(pid));
            is_done.then_some(fewest)
        })
    }

    /// The address of its management listener, see [`MANAGED`].
    pub fn management(&self) -> String {
        self.process.log.wait_for("management at ", |line| {
            let (_, rest) = line.split_once("management at ")?;
            let (address, _) = rest.split_once("/ ").unwrap_or((rest, ""));
            Some(address.trim_end_matches('/').to_owned())
        })
    }

    pub fn managed(&self, path: &str) -> Reply {
        let url = format!("{}{path}", self.management());
        http::ask("GET", &url, &[], b"").unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub fn get(&self, path: &str) -> Reply {
        self.try_get(path)
            .unwrap_or_else(|error| panic!("{path}: {error}"))
    }

    pub fn try_get(&self, path: &str) -> Result<Reply, String> {
        http::ask("GET", &self.url(path), &[], b"")
    }

    pub fn post(&self, path: &str, content_type: &str, body: &[u8]) -> Reply {
        self.request("POST", path, &[("Content-Type", content_type)], body)
    }

    pub fn request(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Reply {
        http::ask(method, &self.url(path), headers, body)
            .unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// An open connection, for what no client would send or wait for.
    pub fn connect(&self) -> TcpStream {
        http::connect(self.address)
    }

    pub fn status(&self) -> Value {
        let reply = self.get("/status");
        assert_eq!(reply.status, 200, "{}", reply.text());
        serde_json::from_slice(&reply.body).expect("/status is JSON")
    }

    /// Pids of the workers that are connected, as `/status` tells.
    pub fn workers(&self) -> Vec<i32> {
        let status = self.status();
        let workers = status["workers"]
            .as_array()
            .expect("/status lists the workers");
        let mut pids: Vec<i32> = workers
            .iter()
            .map(|worker| worker["pid"].as_i64().expect("a worker has a pid") as i32)
            .collect();
        pids.sort();
        pids
    }

    /// The reply to a request that the stub carries out.
    pub fn act(&self, what: &str) -> Reply {
        self.get(&path_of(what))
    }

    /// The same in the background.
    pub fn act_later(&self, what: &str) -> std::thread::JoinHandle<Result<Reply, String>> {
        let url = self.url(&path_of(what));
        std::thread::spawn(move || http::ask("GET", &url, &[], b""))
    }

    /// The same as a POST, which may not be sent twice.
    pub fn act_once(&self, what: &str) -> Reply {
        self.post(&path_of(what), "text/xml", b"<Transaction/>")
    }

    /// The same in the background.
    pub fn act_once_later(&self, what: &str) -> std::thread::JoinHandle<Result<Reply, String>> {
        let url = self.url(&path_of(what));
        let headers = [("Content-Type", "text/xml")];
        std::thread::spawn(move || http::ask("POST", &url, &headers, b"<Transaction/>"))
    }

    /// A transaction whose client leaves once it has put the mark `running`.
    pub fn leave_behind(&self, what: &str) {
        let mut leaver = self.connect();
        let body = "<Transaction/>";
        let head = format!(
            "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/xml\r\nContent-Length: {}",
            path_of(what),
            body.len()
        );
        write!(leaver, "{head}\r\n\r\n{body}").unwrap();
        self.world.wait_count("running", 1);
    }

    pub fn signal(&self, signal: Signal) {
        self.process.signal(signal);
    }
}

fn listening(process: &Process) -> SocketAddr {
    process.log.wait_for("listening on ", |line| {
        let url = line.split("listening on ").nth(1)?;
        let rest = url.split("://").nth(1)?;
        rest.split(['/', ' ']).next()?.parse().ok()
    })
}

/// The path that asks for what a project has.
pub fn capabilities(map: &str) -> String {
    format!("/ows/?MAP={map}&SERVICE=WMS&VERSION=1.3.0&REQUEST=GetCapabilities")
}

/// Path and query of a GetMap that makes the stub do `what`.
pub fn path_of(what: &str) -> String {
    format!("/ows/?MAP=city&SERVICE=WMS&REQUEST=GetMap&{what}")
}

/// A running `qgisserver-worker`.
pub struct Pool {
    pub process: Process,
}

impl Pool {
    pub fn start(world: &World, gate: SocketAddr, settings: &str) -> Self {
        Self::start_in(tmp(), world, gate, settings)
    }

    /// Its number of workers and whatever else is in `file`.
    pub fn start_from(world: &World, gate: SocketAddr, file: &Path) -> Self {
        let mut settings = world.settings("");
        settings.remove("server.workers");
        let mut args = flags(settings);
        args.extend(["-c".into(), text(file)]);
        Self::spawn(tmp(), world, gate, args)
    }

    pub fn start_in(tmp: Arc<TempDir>, world: &World, gate: SocketAddr, settings: &str) -> Self {
        Self::spawn(tmp, world, gate, flags(world.settings(settings)))
    }

    fn spawn(tmp: Arc<TempDir>, world: &World, gate: SocketAddr, mut args: Vec<String>) -> Self {
        args.push(format!("--host=127.0.0.1:{}", gate.port()));
        let env = world.environment(&tmp);
        Self {
            process: Process::spawn(&program("qgisserver-worker"), &args, tmp, env),
        }
    }
}

/// Short, because the name of a socket may not be long.
pub fn tmp() -> Arc<TempDir> {
    use std::os::unix::fs::PermissionsExt;
    let tmp = tempfile::Builder::new().prefix("qs").tempdir().unwrap();
    // A server that becomes somebody else puts its files here, too.
    let open = std::fs::Permissions::from_mode(0o777);
    std::fs::set_permissions(tmp.path(), open).unwrap();
    Arc::new(tmp)
}

/// An address that was free a moment ago, for who cannot have any port or has to have the
/// same one twice. It is below those that the kernel gives to connections and to who wants
/// any, and programs that run beside this one look elsewhere.
pub fn free_address() -> SocketAddr {
    const EACH: u16 = 64;
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_240 + (std::process::id() % 350) as u16 * EACH;
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let mut ports = (0..EACH).map(|_| first + NEXT.fetch_add(1, Ordering::Relaxed) % EACH);
    let port = ports.find(is_free).expect("one of them is free");
    SocketAddr::from(([127, 0, 0, 1], port))
}

pub fn kill(pid: i32, signal: Signal) {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}
