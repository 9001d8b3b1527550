//! The typed result of all settings: what the rest of the program reads.
//!
//! `keys.rs` has one row per setting, `layers.rs` turns defaults, environment,
//! file and command line into values that remember their origin; this file
//! hands each part its own section, and `check.rs` looks at them together.

mod bad_layers;
mod check;
mod command_line;
mod file;
mod finding;
mod keys;
mod kind;
mod layers;
mod print;
mod sources;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

pub use bad_layers::{BadLayers, OnBadLayers};
pub use command_line::{Action, Exit};
pub use finding::{Base, Finding, Handler, Part, S3, Secret, route};
pub use layers::{Environment, SECRET_WORDS, without_secrets};
pub use print::sample;
pub use sources::{Changed, Sources, log_mistakes};

use kind::Value;
use layers::Settings;

use crate::ogc::policy::Policies;
use crate::protocol::FILE;

/// Everything a program of ours needs to know.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub http: Http,
    pub broker: Broker,
    pub pool: Pool,
    pub log: Log,
    /// None unless it is enabled.
    pub management: Option<Management>,
    /// No local pool; workers come through the gate (`--proxy`).
    pub proxy: bool,
    /// User to become after the ports are bound (`--setuid`).
    pub setuid: Option<String>,
    /// `server.restartmon`: a change of this file's mtime restarts the workers one after the other.
    pub restartmon: Option<PathBuf>,
    pub restartmon_interval: Duration,
    /// For reading settings and certificates again.
    pub reload_timeout: Duration,
    /// After SIGTERM, how long running requests may go on.
    pub drain_timeout: Duration,
    /// See [`Config::pool_args`].
    pub forwarded: Vec<OsString>,
}

/// The HTTP front.
#[derive(Debug, Clone, PartialEq)]
pub struct Http {
    pub interfaces: Vec<IpAddr>,
    /// 0 takes any free port, which the log then names.
    pub port: u16,
    /// Threads that serve HTTP, the main one among them (`-j`).
    pub threads: usize,
    pub tls: Option<Tls>,
    /// Honour forwarded headers.
    pub http_proxy: bool,
    /// Trusted proxies that append to lists of forwarded addresses; only with `http_proxy`.
    pub http_proxies: usize,
    /// Fixed public base URL; only with `http_proxy`.
    pub proxy_url: Option<String>,
    /// Lower-case name of the header that names the client; only with `http_proxy`.
    pub client_header: Option<String>,
    /// Operations that are not cancelled when their client leaves, besides
    /// those that may write.
    pub run_on: Vec<String>,
    /// Those that may write are cancelled, too.
    pub cancel_writes: bool,
    /// Web services refuse in the words of QGIS's own programs.
    pub qgis_refusals: bool,
    /// True: `Access-Control-Allow-Origin: *`; false: the Origin is echoed.
    pub cross_origin: bool,
    /// Prefixes, lower-case, of request headers that reach QGIS.
    pub allow_headers: Vec<String>,
    /// `/status` on the public port.
    pub status_page: bool,
    /// `QGIS_PROJECT_FILE`: the project of requests that name none.
    pub default_project: Option<String>,
    pub connections_max: usize,
    /// Of one address; 0: any number, None: what leaves others some.
    pub client_connections: Option<usize>,
    /// HTTP/2 requests at once on one connection.
    pub streams_max: u32,
    /// Time for a request head, also how long a new connection may stay silent.
    pub header_timeout: Duration,
    /// Within it comes what `body_rate_min` says of a request body, or its end.
    pub body_timeout: Duration,
    /// Bytes per second.
    pub body_rate_min: usize,
    /// Time for a whole request body.
    pub body_time_max: Duration,
    /// How long a kept-alive connection may be idle.
    pub idle_timeout: Duration,
    /// How long an idle one is still kept when the server drains.
    pub drain_idle: Duration,
    /// Within it a client takes what `write_rate_min` says, or all there is.
    pub write_timeout: Duration,
    /// Bytes per second.
    pub write_rate_min: usize,
    /// How long the rest of a refused request is read and thrown away.
    pub linger_timeout: Duration,
    pub body_max: usize,
    /// For all bodies that are not small.
    pub body_memory: usize,
    pub uri_max: usize,
    pub header_max: usize,
    /// Header fields of an HTTP/1 request.
    pub headers_max: usize,
    /// `server.timeout`: until the first byte of a reply, and between two chunks.
    pub request_timeout: Duration,
    /// QGIS APIs that are enabled: name and root path (`landing_page` → `/catalog`).
    pub apis: Vec<(String, String)>,
    /// Say in every reply where the time went.
    pub server_timing: bool,
    /// `logging.slow_seconds`: what takes longer is logged in full.
    pub slow: Option<Duration>,
    /// `logging.otlp_endpoint`: the URL that gets traces.
    pub otlp: Option<String>,
    /// `[metadata]`, shown at `/`.
    pub metadata: BTreeMap<String, String>,
    /// Scheme of a MAP that has none.
    pub default_scheme: String,
    /// Schemes that a MAP may have; None where only the pools know them.
    pub schemes: Option<Vec<String>>,
    /// `[policies]`: who may ask what.
    pub policies: Policies,
    /// Workers have access policies in Python, which have to agree.
    pub filters: bool,
}

impl Http {
    /// Somebody may be refused, or asks whether to.
    pub fn has_policies(&self) -> bool {
        self.filters || !self.policies.is_empty()
    }

    /// There may be something at `/ows/p/<profile>/`.
    pub fn has_profiles(&self) -> bool {
        self.filters || self.policies.has_profiles()
    }
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
    /// For a connection at the gate to say what it is; a worker needs a millisecond.
    pub gate_handshake: Duration,
    /// Connections at the gate; each costs two descriptors and some 100 kB.
    pub gate_peers_max: usize,
    /// Parent of the private directory of the ipc socket.
    pub runtime_dir: PathBuf,
    /// `zmq.maxqueue`: requests that wait for a worker.
    pub queue_max: usize,
    /// Requests of one client and of one project; 0: any number.
    pub client_max: usize,
    pub project_max: usize,
    /// Requests of one client in a second; 0: any number.
    pub client_rate: usize,
    /// Workers that long requests leave alone; None: what suits their number.
    pub reserved_workers: Option<usize>,
    /// What is likely to take longer is long.
    pub slow: Duration,
    /// How long workers stay reserved after the last small request.
    pub reserved_for: Duration,
    /// What runs for longer is long, and its project stalled if it answers nothing; None: never.
    pub stalled: Option<Duration>,
    /// `zmq.timeout`: how long a request may wait for a worker.
    pub queue_timeout: Duration,
    pub heartbeat: Duration,
    /// After so many heartbeats without a sign of life a worker is dead.
    pub heartbeat_misses: u32,
    /// Unacknowledged chunks of a stream.
    pub window: u32,
    /// Between CANCEL and the exit of a worker that did not stop.
    pub cancel_grace: Duration,
    /// For parts of replies that no connection has taken yet.
    pub reply_memory: usize,
    /// How long a request may run that does so without its client.
    pub run_on_timeout: Duration,
    /// How long a request that ended its workers is refused; zero: never.
    pub quarantine: Duration,
    pub quarantine_deaths: u32,
    /// Time-outs that open the breaker of a project; zero: none do.
    pub breaker_timeouts: u32,
    pub breaker_window: Duration,
    pub breaker_pause: Duration,
    /// Of the workers, for a project that had a time-out.
    pub breaker_share: f64,
    /// Deaths in a row that are a storm; zero: none are.
    pub storm_deaths: u32,
    pub storm_period: Duration,
    /// How long an old copy of a changed project may answer; zero: not at all.
    pub stale: Duration,
    /// How long what does not load is remembered.
    pub broken_for: Duration,
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
    /// Names of the plugins that are loaded; empty: all.
    pub plugins: Vec<String>,
    pub plugins_strict: bool,
    /// Program that puts these plugins into the first path before workers start.
    pub plugin_manager: Option<String>,
    pub plugin_timeout: Duration,
    /// Access policies in Python are run.
    pub filters: bool,
    /// What they may know of the settings: sections with keys and texts.
    pub filter_settings: BTreeMap<String, BTreeMap<String, String>>,
    /// A worker must be ready within this time.
    pub start_timeout: Duration,
    /// A worker that dies younger is replaced with back-off.
    pub young: Duration,
    pub backoff_max: Duration,
    /// Bytes that a worker may allocate; 0: half of what there is.
    pub memory_limit: u64,
    /// Part of the memory above which the largest worker is replaced; 0: never.
    pub memory_high_water_mark: f64,
    /// Bytes at which a worker is replaced; 0: never. So are the next two.
    pub recycle_memory: u64,
    pub recycle_age: Duration,
    pub recycle_requests: u64,
    pub memory_check: Duration,
    pub heartbeat: Duration,
    pub heartbeat_misses: u32,
    /// Bytes of a stream that are collected before they are sent.
    pub chunk_bytes: usize,
    /// How long QGIS may take to stop before its worker exits.
    pub cancel_grace: Duration,
    /// How long a worker that was told to leave may go on with its request.
    pub drain_timeout: Duration,
    /// Projects in the cache of a worker.
    pub cache_size: usize,
    pub check_interval: Duration,
    /// How long a worker remembers that a project does not load.
    pub broken_for: Duration,
    /// Where projects are.
    pub finding: Finding,
    /// Bytes for open projects; 0: half of what the worker may allocate.
    pub cache_memory: u64,
    /// How long a file that cannot be read may be half written.
    pub settle: Duration,
    pub bad_layers: BadLayers,
    /// `projects.cache.preload_config`: a file of names.
    pub preload_file: Option<PathBuf>,
    /// More names.
    pub restore_projects: Vec<String>,
    /// Each worker opens a part of them.
    pub preload_spread: bool,
    pub preload_timeout: Duration,
    pub trust_layer_metadata: bool,
    pub disable_getprint: bool,
    pub force_readonly_layers: bool,
    /// Projects say nothing of their addresses.
    pub disable_owsurls: bool,
    /// What QGIS refuses with status 200 keeps that.
    pub qgis_refusals: bool,
    /// A project's state tells states of its capabilities apart, whatever its data do.
    pub force_etag: bool,
    /// Features of one GetFeature; None: any number.
    pub feature_limit: Option<u32>,
    /// Environment variables for QGIS, from `api:<name>` sections.
    pub env: BTreeMap<String, String>,
    /// More names (`NAME` or `PREFIX*`) that workers may inherit from the environment.
    pub env_allow: Vec<String>,
}

/// The listener for those who run the server.
#[derive(Debug, Clone, PartialEq)]
pub struct Management {
    pub interfaces: Vec<IpAddr>,
    pub port: u16,
    pub tls: Option<Tls>,
    pub connections_max: usize,
    /// For one request, from its connection to the last byte of its reply.
    pub timeout: Duration,
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
    /// What the table of settings says when nobody sets anything; a test
    /// below keeps the two equal.
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            http: Http {
                interfaces: vec![IpAddr::from([0, 0, 0, 0])],
                port: 8080,
                threads: 2,
                tls: None,
                http_proxy: false,
                http_proxies: 1,
                proxy_url: None,
                client_header: None,
                run_on: Vec::new(),
                cancel_writes: false,
                qgis_refusals: false,
                cross_origin: true,
                allow_headers: vec!["x-qgis-".into(), "x-lizmap-".into()],
                status_page: false,
                default_project: None,
                connections_max: 10_000,
                client_connections: None,
                streams_max: 100,
                header_timeout: seconds(10),
                body_timeout: seconds(20),
                body_rate_min: 1 << 10,
                body_time_max: seconds(900),
                idle_timeout: seconds(75),
                drain_idle: seconds(1),
                write_timeout: seconds(60),
                write_rate_min: 1 << 10,
                linger_timeout: seconds(2),
                body_max: 100 << 20,
                body_memory: 400 << 20,
                uri_max: 32 << 10,
                header_max: 64 << 10,
                headers_max: 100,
                request_timeout: seconds(20),
                apis: vec![("wfs3".into(), "/wfs3".into())],
                server_timing: false,
                slow: Some(seconds(5)),
                otlp: None,
                metadata: BTreeMap::new(),
                default_scheme: FILE.into(),
                schemes: Finding::default().names(),
                policies: Policies::default(),
                filters: false,
            },
            broker: Broker {
                gate: None,
                gate_handshake: seconds(5),
                gate_peers_max: 1024,
                runtime_dir: PathBuf::from("/tmp"),
                queue_max: 1000,
                client_max: 500,
                project_max: 0,
                client_rate: 0,
                reserved_workers: None,
                slow: Duration::from_millis(1500),
                reserved_for: seconds(10),
                stalled: Some(seconds(5)),
                queue_timeout: seconds(15),
                heartbeat: seconds(1),
                heartbeat_misses: 2,
                window: 16,
                cancel_grace: seconds(1),
                reply_memory: 256 << 20,
                run_on_timeout: seconds(120),
                quarantine: seconds(300),
                quarantine_deaths: 2,
                breaker_timeouts: 3,
                breaker_window: seconds(60),
                breaker_pause: seconds(30),
                breaker_share: 0.5,
                storm_deaths: 5,
                storm_period: seconds(30),
                stale: Duration::ZERO,
                broken_for: seconds(5),
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
                plugins: Vec::new(),
                plugins_strict: false,
                plugin_manager: None,
                plugin_timeout: seconds(120),
                filters: false,
                filter_settings: BTreeMap::new(),
                start_timeout: seconds(60),
                young: seconds(5),
                backoff_max: seconds(30),
                memory_limit: 0,
                memory_high_water_mark: 0.9,
                recycle_memory: 0,
                recycle_age: Duration::ZERO,
                recycle_requests: 0,
                memory_check: seconds(5),
                heartbeat: seconds(1),
                heartbeat_misses: 2,
                chunk_bytes: 256 << 10,
                cancel_grace: seconds(1),
                drain_timeout: seconds(20),
                cache_size: 10,
                check_interval: Duration::ZERO,
                broken_for: seconds(5),
                finding: Finding::default(),
                cache_memory: 0,
                settle: seconds(2),
                bad_layers: BadLayers {
                    rule: OnBadLayers::Strict,
                    exceptions: Vec::new(),
                    every: seconds(30),
                },
                preload_file: None,
                restore_projects: Vec::new(),
                preload_spread: false,
                preload_timeout: seconds(60),
                trust_layer_metadata: false,
                disable_getprint: false,
                force_readonly_layers: true,
                disable_owsurls: false,
                qgis_refusals: false,
                force_etag: false,
                feature_limit: None,
                env: BTreeMap::from([
                    ("QGIS_SERVER_API_WFS3_ROOT_PATH".into(), "/wfs3".into()),
                    ("QGIS_SERVER_DISABLED_APIS".into(), "Landing Page".into()),
                ]),
                env_allow: Vec::new(),
            },
            log: Log {
                level: tracing::Level::INFO,
                qgis_info: false,
                json: false,
            },
            management: None,
            proxy: false,
            setuid: None,
            restartmon: None,
            restartmon_interval: Duration::from_millis(3000),
            reload_timeout: seconds(10),
            drain_timeout: seconds(20),
            forwarded: Vec::new(),
        }
    }
}

/// The environment of this process; variables that are not UTF-8 are not ours.
pub fn environment() -> Environment {
    let text = |(name, text): (OsString, OsString)| {
        Some((name.into_string().ok()?, text.into_string().ok()?))
    };
    std::env::vars_os().filter_map(text).collect()
}

impl Config {
    /// What `qgisserver` appends to start `qgisserver-worker` as local pool with
    /// the same settings: the file, what the command line overrode, and what both have
    /// to agree about, whatever the file says by then. The environment is inherited; the
    /// caller adds `--connect ENDPOINT`.
    pub fn pool_args(&self) -> Vec<OsString> {
        let Broker {
            heartbeat,
            heartbeat_misses,
            window,
            ..
        } = &self.broker;
        let agreed = [
            format!("zmq.heartbeat={}", heartbeat.as_secs_f64()),
            format!("zmq.heartbeat_misses={heartbeat_misses}"),
            format!("zmq.window={window}"),
        ];
        let agreed = agreed.map(|it| ["--set".into(), it.into()]);
        let forwarded = self.forwarded.iter().cloned();
        forwarded.chain(agreed.into_iter().flatten()).collect()
    }

    /// Hands every setting to its part; what they mean together is looked at in `check.rs`.
    fn read(settings: &Settings) -> Self {
        Self {
            http: Http::read(settings),
            broker: Broker::read(settings),
            pool: Pool::read(settings),
            log: Log::read(settings),
            management: settings
                .bool("management.enabled")
                .then(|| Management::read(settings)),
            proxy: settings.bool("server.proxy"),
            setuid: settings.text("server.setuid"),
            restartmon: settings.path("server.restartmon"),
            restartmon_interval: settings.duration("server.restartmon_check_time"),
            reload_timeout: settings.duration("server.reload_timeout"),
            drain_timeout: settings.duration("server.drain_timeout"),
            forwarded: Vec::new(),
        }
    }
}

impl Http {
    fn read(settings: &Settings) -> Self {
        let finding = Finding::read(settings);
        // The pools of other machines have settings of their own.
        let schemes = finding.names().filter(|_| !settings.bool("server.proxy"));
        Self {
            interfaces: settings.addresses("server.interfaces"),
            port: port("server.port", settings),
            threads: settings.size("server.http_threads"),
            tls: tls("server", settings),
            http_proxy: settings.bool("server.http_proxy"),
            http_proxies: settings.size("server.http_proxies"),
            proxy_url: settings.text("server.proxy_url"),
            client_header: settings
                .text("server.client_header")
                .map(|name| name.to_ascii_lowercase()),
            run_on: settings.words("server.run_on"),
            cancel_writes: settings.bool("server.cancel_writes"),
            qgis_refusals: settings.bool("server.qgis_refusals"),
            cross_origin: settings.bool("server.cross_origin"),
            allow_headers: lower_case(settings.words("server.allow_headers")),
            status_page: settings.bool("server.status_page"),
            default_project: settings.text("server.default_project"),
            connections_max: settings.size("server.connections_max"),
            client_connections: usize::try_from(settings.integer("limits.client_connections")).ok(),
            streams_max: settings.small("server.streams_max"),
            header_timeout: settings.duration("server.header_timeout"),
            body_timeout: settings.duration("server.body_timeout"),
            body_rate_min: settings.size("server.body_rate_min"),
            body_time_max: settings.duration("server.body_time_max"),
            idle_timeout: settings.duration("server.idle_timeout"),
            drain_idle: settings.duration("server.drain_idle"),
            write_timeout: settings.duration("server.write_timeout"),
            write_rate_min: settings.size("server.write_rate_min"),
            linger_timeout: settings.duration("server.linger_timeout"),
            body_max: settings.size("server.body_max"),
            body_memory: settings.size("server.body_memory"),
            uri_max: settings.size("server.uri_max"),
            header_max: settings.size("server.header_max"),
            headers_max: settings.size("server.headers_max"),
            request_timeout: settings.duration("server.timeout"),
            apis: apis(settings),
            server_timing: settings.bool("server.server_timing"),
            otlp: settings.text("logging.otlp_endpoint"),
            slow: Some(settings.duration("logging.slow_seconds")).filter(|slow| !slow.is_zero()),
            metadata: present("metadata.", settings),
            default_scheme: finding.default_scheme,
            schemes,
            policies: policies(settings),
            filters: settings.bool("server.enable_filters"),
        }
    }
}

impl Broker {
    fn read(settings: &Settings) -> Self {
        let address = settings
            .text("zmq.bindaddr")
            .filter(|_| settings.bool("server.proxy"));
        Self {
            gate: address.and_then(|address| kind::loopback(&address).ok()),
            gate_handshake: settings.duration("zmq.gate_handshake"),
            gate_peers_max: settings.size("zmq.gate_peers_max"),
            runtime_dir: settings.path("zmq.ipcpath").unwrap_or_default(),
            queue_max: settings.size("zmq.maxqueue"),
            client_max: settings.size("limits.client_requests"),
            project_max: settings.size("limits.project_requests"),
            client_rate: settings.size("limits.client_rate"),
            reserved_workers: usize::try_from(settings.integer("lanes.reserved_workers")).ok(),
            slow: settings.duration("lanes.slow_ms"),
            reserved_for: settings.duration("lanes.reserved_seconds"),
            stalled: Some(settings.duration("lanes.stalled_seconds")).filter(|it| !it.is_zero()),
            queue_timeout: settings.duration("zmq.timeout"),
            heartbeat: settings.duration("zmq.heartbeat"),
            heartbeat_misses: settings.small("zmq.heartbeat_misses"),
            window: settings.small("zmq.window"),
            cancel_grace: settings.duration("zmq.cancel_grace"),
            reply_memory: settings.size("server.reply_memory"),
            run_on_timeout: settings.duration("server.run_on_timeout"),
            quarantine: settings.duration("zmq.quarantine_seconds"),
            quarantine_deaths: settings.small("zmq.quarantine_deaths"),
            breaker_timeouts: settings.small("zmq.breaker_timeouts"),
            breaker_window: settings.duration("zmq.breaker_window"),
            breaker_pause: settings.duration("zmq.breaker_pause"),
            breaker_share: settings.fraction("zmq.breaker_share"),
            storm_deaths: settings.small("zmq.storm_deaths"),
            storm_period: settings.duration("zmq.storm_seconds"),
            stale: settings.duration("projects.cache.stale_seconds"),
            broken_for: settings.duration("projects.cache.broken_seconds"),
        }
    }
}

impl Pool {
    fn read(settings: &Settings) -> Self {
        Self {
            workers: settings.size("server.workers"),
            spares: settings.size("worker.spares"),
            program: settings.path("worker.program"),
            identity: settings.text("worker.identity"),
            server: settings
                .text("worker.server")
                .expect("an endpoint is not empty"),
            rootdir: settings.path("projects.cache.rootdir").unwrap_or_default(),
            python: settings.path("worker.python").unwrap_or_default(),
            plugin_paths: settings.paths("server.pluginpath"),
            plugins: settings.words("plugins.install"),
            plugins_strict: settings.bool("plugins.strict"),
            plugin_manager: settings
                .text("plugins.plugin_manager")
                .filter(|_| settings.text("plugins.install_mode").as_deref() == Some("auto")),
            plugin_timeout: settings.duration("plugins.install_timeout"),
            filters: settings.bool("server.enable_filters"),
            filter_settings: filter_settings(settings),
            start_timeout: settings.duration("worker.start_timeout"),
            young: settings.duration("worker.young"),
            backoff_max: settings.duration("worker.backoff_max"),
            memory_limit: settings.count("worker.memory_limit"),
            memory_high_water_mark: settings.fraction("server.memory_high_water_mark"),
            recycle_memory: settings.count("worker.recycle_memory"),
            recycle_age: settings.duration("worker.recycle_seconds"),
            recycle_requests: settings.count("worker.recycle_requests"),
            memory_check: settings.duration("worker.memory_check_seconds"),
            heartbeat: settings.duration("zmq.heartbeat"),
            heartbeat_misses: settings.small("zmq.heartbeat_misses"),
            chunk_bytes: settings.size("worker.chunk_bytes"),
            cancel_grace: settings.duration("zmq.cancel_grace"),
            drain_timeout: settings.duration("worker.drain_timeout"),
            cache_size: settings.size("projects.cache.size"),
            check_interval: settings.duration("projects.cache.check_interval"),
            broken_for: settings.duration("projects.cache.broken_seconds"),
            finding: Finding::read(settings),
            cache_memory: settings.count("projects.cache.memory"),
            settle: settings.duration("projects.cache.settle_seconds"),
            bad_layers: BadLayers::read(settings),
            preload_file: settings.path("projects.cache.preload_config"),
            restore_projects: settings.words("projects.cache.restore_projects"),
            preload_spread: settings.bool("projects.cache.preload_spread"),
            preload_timeout: settings.duration("projects.cache.preload_seconds"),
            trust_layer_metadata: settings.bool("projects.cache.trust_layer_metadata"),
            disable_getprint: settings.bool("projects.cache.disable_getprint"),
            force_readonly_layers: settings.bool("projects.cache.force_readonly_layers"),
            disable_owsurls: settings.bool("projects.cache.disable_owsurls"),
            qgis_refusals: settings.bool("server.qgis_refusals"),
            force_etag: settings.bool("projects.cache.force_etag"),
            feature_limit: feature_limit(settings),
            env: variables(settings),
            env_allow: settings.words("worker.env_allow"),
        }
    }
}

/// Not even 0 is a limit, as in py-qgis-server: nobody means a WFS without features.
fn feature_limit(settings: &Settings) -> Option<u32> {
    let limit = u32::try_from(settings.integer("server.getfeaturelimit")).ok();
    limit.filter(|limit| *limit > 0)
}

impl BadLayers {
    /// What cannot be read was reported by `check.rs`.
    fn read(settings: &Settings) -> Self {
        let rule = settings.text("projects.cache.bad_layers");
        let exceptions = settings.words("projects.cache.bad_layers_of");
        let by_check = match settings.bool("projects.cache.strict_check") {
            true => OnBadLayers::Strict,
            false => OnBadLayers::Skip,
        };
        Self {
            rule: rule
                .and_then(|it| OnBadLayers::parse(&it))
                .unwrap_or(by_check),
            exceptions: exceptions
                .iter()
                .filter_map(|it| bad_layers::exception(it).ok())
                .collect(),
            every: settings.duration("projects.cache.bad_layers_seconds"),
        }
    }
}

impl Management {
    fn read(settings: &Settings) -> Self {
        Self {
            interfaces: settings.addresses("management.interfaces"),
            port: port("management.port", settings),
            tls: tls("management", settings),
            connections_max: settings.size("management.connections_max"),
            timeout: settings.duration("management.timeout"),
        }
    }
}

impl Log {
    fn read(settings: &Settings) -> Self {
        Self {
            level: settings.level("logging.level"),
            qgis_info: settings.bool("logging.qgis_info"),
            json: settings.bool("logging.json"),
        }
    }
}

fn port(name: &str, settings: &Settings) -> u16 {
    u16::try_from(settings.count(name)).expect("a port has 16 bits")
}

fn tls(section: &str, settings: &Settings) -> Option<Tls> {
    let path = |key: &str| {
        settings
            .path(&format!("{section}.{key}"))
            .unwrap_or_default()
    };
    settings.bool(&format!("{section}.ssl")).then(|| Tls {
        cert: path("ssl_cert"),
        key: path("ssl_key"),
    })
}

/// The enabled APIs that have a path.
fn apis(settings: &Settings) -> Vec<(String, String)> {
    let enabled = settings
        .members("api.enabled.")
        .filter(|(_, entry)| entry.value == Value::Bool(true));
    let path = |name: &str| {
        settings
            .0
            .get(&format!("api.endpoints.{name}"))
            .map(|entry| entry.text.clone())
    };
    enabled
        .filter_map(|(name, _)| Some((name.to_owned(), path(name)?)))
        .collect()
}

/// The variables that go with APIs. What only the table gives is left out
/// while its API is off: QGIS should not hear of it.
fn variables(settings: &Settings) -> BTreeMap<String, String> {
    let apis = apis(settings);
    let is_wanted = |api: &str, entry: &layers::Entry| {
        entry.origin != layers::Origin::Default || apis.iter().any(|(name, _)| name == api)
    };
    let said = settings
        .members("api:")
        .filter_map(|(name, entry)| Some((name.rsplit_once('.')?, entry)))
        .filter(|((api, _), entry)| is_wanted(api, entry))
        .map(|((_, variable), entry)| (variable.to_owned(), entry.text.clone()));
    disabled(&apis).into_iter().chain(said).collect()
}

/// QGIS has its catalogue at the root unless it is told where else or, by this variable, that
/// there is none. What a proxy is said to have before a path could lead there.
fn disabled(apis: &[(String, String)]) -> Option<(String, String)> {
    let is_enabled = apis.iter().any(|(name, _)| name == "landing_page");
    (!is_enabled).then(|| ("QGIS_SERVER_DISABLED_APIS".into(), "Landing Page".into()))
}

fn policies(settings: &Settings) -> Policies {
    let rules = settings.members("policies.");
    let rules = rules.map(|(name, entry)| (name, entry.text.as_str()));
    // A search path may lead what looks like a path below the root elsewhere.
    let root = match settings.members("projects.search_paths.").next() {
        None => settings.path("projects.cache.rootdir"),
        Some(_) => None,
    };
    Policies::new(rules, &root.unwrap_or_default())
}

/// What filters written for other servers read: sections and keys have their names.
fn filter_settings(settings: &Settings) -> BTreeMap<String, BTreeMap<String, String>> {
    let mut sections = BTreeMap::<_, BTreeMap<_, _>>::new();
    if !settings.bool("server.enable_filters") {
        return sections;
    }
    for (name, entry) in &settings.0 {
        let (section, key) = keys::split(name);
        let is_theirs = section.starts_with("contrib:") || section.starts_with("extensions:");
        if is_theirs || matches!(section, "server" | "projects.cache") {
            let section = sections.entry(section.to_owned()).or_default();
            section.insert(key.to_owned(), entry.text.clone());
        }
    }
    sections
}

fn present(prefix: &str, settings: &Settings) -> BTreeMap<String, String> {
    let all = settings
        .members(prefix)
        .map(|(key, entry)| (key.to_owned(), entry.text.clone()));
    all.filter(|(_, text)| !text.is_empty()).collect()
}

fn lower_case(words: Vec<String>) -> Vec<String> {
    words.iter().map(|word| word.to_lowercase()).collect()
}

/// The rows of the table, typed. Asking for another type than the row's is a
/// bug that every test of the defaults finds.
macro_rules! typed {
    ($($name:ident, $kind:ident -> $type:ty;)*) => {
        impl Settings {
            $(fn $name(&self, name: &str) -> $type {
                match &self.entry(name).value {
                    Value::$kind(value) => value.clone(),
                    other => unreachable!("{name} is {other:?}"),
                }
            })*
        }
    };
}

typed! {
    bool, Bool -> bool;
    count, Count -> u64;
    integer, Integer -> i64;
    duration, Duration -> Duration;
    fraction, Fraction -> f64;
    words, Words -> Vec<String>;
    paths, Paths -> Vec<PathBuf>;
    addresses, Addresses -> Vec<IpAddr>;
    level, Level -> tracing::Level;
}

impl Settings {
    fn text(&self, name: &str) -> Option<String> {
        match &self.entry(name).value {
            Value::Text(text) => Some(text.clone()).filter(|text| !text.is_empty()),
            other => unreachable!("{name} is {other:?}"),
        }
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        match &self.entry(name).value {
            Value::Path(path) => Some(path.clone()).filter(|path| !path.as_os_str().is_empty()),
            other => unreachable!("{name} is {other:?}"),
        }
    }

    fn size(&self, name: &str) -> usize {
        usize::try_from(self.count(name)).unwrap_or(usize::MAX)
    }

    fn small(&self, name: &str) -> u32 {
        u32::try_from(self.count(name)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(lines: &[(&str, &str)]) -> Settings {
        let given = |(name, text): &(&str, &str)| layers::Given {
            name: name.to_string(),
            text: text.to_string(),
            origin: layers::Origin::file("q.conf", 1),
        };
        let merged = layers::merge(&BTreeMap::new(), lines.iter().map(given).collect(), vec![]);
        assert_eq!(merged.mistakes, []);
        merged.settings
    }

    #[test]
    fn the_default_is_what_the_table_says() {
        assert_eq!(Config::read(&settings(&[])), Config::default());
    }

    #[test]
    fn every_part_finds_its_settings() {
        let config = Config::read(&settings(&[
            ("server.interfaces", "127.0.0.1, ::1"),
            ("server.allow_headers", "X-Own-"),
            ("server.timeout", "1.5"),
            ("server.pluginpath", "/a:/b"),
            ("server.proxy", "yes"),
            ("zmq.bindaddr", "tcp://127.0.0.1:0"),
            ("zmq.timeout", "250"),
            ("projects.cache.size", "3"),
            ("metadata.title", "Maps"),
            ("metadata.motto", "m"),
            ("logging.level", "WARNING"),
        ]));
        assert_eq!(config.http.interfaces.len(), 2);
        assert_eq!(config.http.allow_headers, ["x-own-"]);
        assert_eq!(config.http.request_timeout, Duration::from_millis(1500));
        assert_eq!(
            config.pool.plugin_paths,
            [PathBuf::from("/a"), PathBuf::from("/b")]
        );
        assert_eq!(config.broker.gate, Some("127.0.0.1:0".parse().unwrap()));
        assert_eq!(config.broker.queue_timeout, Duration::from_millis(250));
        assert_eq!(config.pool.cache_size, 3);
        assert_eq!(config.http.metadata.len(), 2);
        assert_eq!(config.log.level, tracing::Level::WARN);
    }

    #[test]
    fn a_pool_joins_the_gate_of_the_same_file_unless_told_otherwise() {
        let server = |lines| Config::read(&settings(lines)).pool.server;
        assert_eq!(
            server(&[("zmq.bindaddr", "tcp://127.0.0.1:7000")]),
            "tcp://127.0.0.1:7000"
        );
        assert_eq!(
            server(&[("worker.server", "localhost")]),
            "tcp://127.0.0.1:18080"
        );
    }

    #[test]
    fn only_a_positive_number_of_features_is_a_limit() {
        let limit = |text| {
            let lines = [("server.getfeaturelimit", text)];
            Config::read(&settings(&lines)).pool.feature_limit
        };
        assert_eq!(
            ["-1", "0", "1", "10"].map(limit),
            [None, None, Some(1), Some(10)]
        );
    }

    #[test]
    fn an_enabled_api_brings_its_path_and_its_variables() {
        let config = Config::read(&settings(&[
            ("api.enabled.landing_page", "yes"),
            ("api.enabled.own", "yes"),
            ("api.endpoints.own", "/own"),
            ("api.endpoints.off", "/off"),
            ("projects.cache.rootdir", "/data"),
            ("api:other.KEY", "x"),
        ]));
        let pairs = [
            ("landing_page", "/catalog"),
            ("own", "/own"),
            ("wfs3", "/wfs3"),
        ];
        assert_eq!(
            config.http.apis,
            pairs.map(|(name, path)| (name.into(), path.into()))
        );
        let variables: Vec<_> = config
            .pool
            .env
            .iter()
            .map(|(k, v)| (k.as_str(), v.as_str()))
            .collect();
        assert_eq!(
            variables,
            [
                ("KEY", "x"),
                ("QGIS_SERVER_API_WFS3_ROOT_PATH", "/wfs3"),
                ("QGIS_SERVER_LANDING_PAGE_PREFIX", "/catalog"),
                ("QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES", "/data"),
            ]
        );
    }
}
