//! The typed result of all settings: what the rest of the program reads.
//!
//! `keys.rs` has one row per setting, `layers.rs` turns defaults, environment,
//! file and command line into values that remember their origin; this file
//! checks them together and hands each part its own section.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

/// Everything a program of ours needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub http: Http,
    pub broker: Broker,
    pub pool: Pool,
    pub log: Log,
    /// No local pool; workers come through the gate (`--proxy`).
    pub proxy: bool,
    /// User to become after the ports are bound (`--setuid`).
    pub setuid: Option<String>,
    /// `server.restartmon`: a change of this file's mtime restarts the workers one after the other.
    pub restartmon: Option<PathBuf>,
    pub restartmon_interval: Duration,
    /// After SIGTERM, how long running requests may go on.
    pub drain_timeout: Duration,
}

/// The HTTP front.
#[derive(Debug, Clone, PartialEq)]
pub struct Http {
    pub interfaces: Vec<IpAddr>,
    /// 0 takes any free port, which the log then names.
    pub port: u16,
    /// Threads of the HTTP runtime (`-j`).
    pub threads: usize,
    pub tls: Option<Tls>,
    /// Honour forwarded headers.
    pub http_proxy: bool,
    /// Fixed public base URL; only with `http_proxy`.
    pub proxy_url: Option<String>,
    /// True: `Access-Control-Allow-Origin: *`; false: the Origin is echoed.
    pub cross_origin: bool,
    /// Prefixes, lower-case, of request headers that reach QGIS.
    pub allow_headers: Vec<String>,
    /// `/status` on the public port.
    pub status_page: bool,
    /// `QGIS_PROJECT_FILE`: the project of requests that name none.
    pub default_project: Option<String>,
    pub connections_max: usize,
    /// Time for a request head, also how long a new connection may stay silent.
    pub header_timeout: Duration,
    /// Time between two reads of a request body.
    pub body_timeout: Duration,
    /// How long a kept-alive connection may be idle.
    pub idle_timeout: Duration,
    /// How long a client may take nothing of a reply before its connection is cut.
    pub write_timeout: Duration,
    pub body_max: usize,
    pub uri_max: usize,
    pub header_max: usize,
    /// `server.timeout`: until the first byte of a reply, and between two chunks.
    pub request_timeout: Duration,
    /// QGIS APIs that are enabled: name and root path (`landing_page` → `/catalog`).
    pub apis: Vec<(String, String)>,
    /// `[metadata]`, shown at `/`.
    pub metadata: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tls {
    pub cert: PathBuf,
    pub key: PathBuf,
}

/// The broker.
#[derive(Debug, Clone, PartialEq)]
pub struct Broker {
    /// Where the gate listens for workers of other pools; only in proxy mode.
    pub gate: Option<SocketAddr>,
    /// Parent of the private directory of the ipc socket.
    pub runtime_dir: PathBuf,
    /// `zmq.maxqueue`: requests that wait for a worker.
    pub queue_max: usize,
    /// `zmq.timeout`: how long a request may wait for a worker.
    pub queue_timeout: Duration,
    pub heartbeat: Duration,
    /// Heartbeats a peer may miss before it is dead.
    pub heartbeat_misses: u32,
    /// Unacknowledged chunks of a stream.
    pub window: u32,
    /// Between CANCEL and the exit of a worker that did not stop.
    pub cancel_grace: Duration,
}

/// The pool and its workers.
#[derive(Debug, Clone, PartialEq)]
pub struct Pool {
    pub workers: usize,
    /// Warm workers in reserve.
    pub spares: usize,
    /// The program to start as local pool; None looks beside `qgisserver`, then in PATH.
    pub program: Option<PathBuf>,
    /// Name of the pool in logs.
    pub identity: Option<String>,
    /// Where the server is: `ipc:///path` or `tcp://host:port`.
    pub server: String,
    /// Absolute and existing, unless in proxy mode.
    pub rootdir: PathBuf,
    pub python: PathBuf,
    pub plugin_paths: Vec<PathBuf>,
    /// A worker must be ready within this time.
    pub start_timeout: Duration,
    /// A worker that dies younger is replaced with back-off.
    pub young: Duration,
    pub backoff_max: Duration,
    pub heartbeat: Duration,
    pub heartbeat_misses: u32,
    /// Bytes of a stream that are collected before they are sent.
    pub chunk_bytes: usize,
    /// How long a worker that was told to leave may go on with its request.
    pub drain_timeout: Duration,
    /// Projects in the cache of a worker.
    pub cache_size: usize,
    pub check_interval: Duration,
    /// Invalid layers make a project unavailable.
    pub strict_check: bool,
    pub trust_layer_metadata: bool,
    pub disable_getprint: bool,
    pub force_readonly_layers: bool,
    /// Environment variables for QGIS, from `api:<name>` sections.
    pub env: BTreeMap<String, String>,
    /// More names (`NAME` or `PREFIX*`) that workers may inherit from the environment.
    pub env_allow: Vec<String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Log {
    pub level: tracing::Level,
    /// Relay QGIS's own messages of level Info, too.
    pub qgis_info: bool,
    /// JSON instead of text.
    pub json: bool,
}

impl Default for Config {
    /// What the table of settings says when nobody sets anything; a test in
    /// `layers.rs` keeps the two equal.
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            http: Http {
                interfaces: vec![IpAddr::from([0, 0, 0, 0])],
                port: 8080,
                threads: 2,
                tls: None,
                http_proxy: false,
                proxy_url: None,
                cross_origin: true,
                allow_headers: vec!["x-qgis-".into(), "x-lizmap-".into()],
                status_page: false,
                default_project: None,
                connections_max: 10_000,
                header_timeout: seconds(10),
                body_timeout: seconds(20),
                idle_timeout: seconds(75),
                write_timeout: seconds(60),
                body_max: 100 << 20,
                uri_max: 32 << 10,
                header_max: 64 << 10,
                request_timeout: seconds(20),
                apis: Vec::new(),
                metadata: BTreeMap::new(),
            },
            broker: Broker {
                gate: None,
                runtime_dir: std::env::temp_dir(),
                queue_max: 1000,
                queue_timeout: seconds(15),
                heartbeat: seconds(1),
                heartbeat_misses: 3,
                window: 16,
                cancel_grace: seconds(1),
            },
            pool: Pool {
                workers: 2,
                spares: 1,
                program: None,
                identity: None,
                server: "tcp://127.0.0.1:18080".into(),
                rootdir: PathBuf::new(),
                python: PathBuf::from("/usr/bin/python3"),
                plugin_paths: Vec::new(),
                start_timeout: seconds(60),
                young: seconds(5),
                backoff_max: seconds(30),
                heartbeat: seconds(1),
                heartbeat_misses: 3,
                chunk_bytes: 256 << 10,
                drain_timeout: seconds(20),
                cache_size: 10,
                check_interval: Duration::ZERO,
                strict_check: true,
                trust_layer_metadata: false,
                disable_getprint: false,
                force_readonly_layers: true,
                env: BTreeMap::new(),
                env_allow: Vec::new(),
            },
            log: Log { level: tracing::Level::INFO, qgis_info: false, json: false },
            proxy: false,
            setuid: None,
            restartmon: None,
            restartmon_interval: Duration::from_millis(3000),
            drain_timeout: seconds(20),
        }
    }
}
