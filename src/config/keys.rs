//! The table of settings: one row each, and everything else follows from it.
//!
//! Parser, `--help`, `--print-config` and `etc/qgisserver.conf` read these rows.
//! A setting is `section.key`; any of its variables may set it, the first one
//! that is there wins, and `QGSRV_<SECTION>_<KEY>` is always one of them.

use super::kind::{Kind, MANY};
use crate::protocol::BODY_MAX;

/// One row: a setting.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    /// `section.key`; the key follows the last dot.
    pub name: &'static str,
    pub kind: Kind,
    /// As it would stand in a file, so it may refer to other settings.
    pub default: &'static str,
    /// One line that says what it does and in which unit.
    pub help: &'static str,
    /// Variables besides `QGSRV_<SECTION>_<KEY>`, strongest first.
    pub env: &'static [&'static str],
    /// Older names of the setting in files.
    pub older: &'static [&'static str],
    pub flags: &'static [Flag],
    pub state: State,
    /// See [`is_live`].
    pub live: bool,
}

/// Whether setting it does anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    /// Accepted, and a warning says that it is not implemented yet.
    Later,
    /// Accepted, and a warning says why it has no effect.
    Moot(&'static str),
}

/// A flag that sets a setting.
#[derive(Debug, Clone, Copy)]
pub struct Flag {
    pub long: &'static str,
    pub short: Option<char>,
    pub takes: Takes,
    pub programs: &'static [Program],
    /// A second name of the flag.
    pub alias: Option<&'static str>,
    pub hidden: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Takes {
    /// The flag is followed by a value, called so in the help.
    Value(&'static str),
    /// The flag alone stands for this value.
    Nothing { means: &'static str },
}

/// Whose command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    Server,
    Worker,
}

/// Settings whose keys the operator chooses.
#[derive(Debug, Clone, Copy)]
pub struct Family {
    /// What their names start with.
    pub prefix: &'static str,
    /// The rest of the name in the help, such as `<name>`.
    pub pattern: &'static str,
    pub kind: Kind,
    pub help: &'static str,
    /// What their variables start with; the rest, in lower case, is the key.
    pub env_prefix: Option<&'static str>,
    pub state: State,
    /// See [`is_live`].
    pub live: bool,
}

const SERVER: &[Program] = &[Program::Server];
const WORKER: &[Program] = &[Program::Worker];
const BOTH: &[Program] = &[Program::Server, Program::Worker];

const ANY: Kind = Kind::Count { min: 0, max: MANY };
const SOME: Kind = Kind::Count { min: 1, max: MANY };
const SMALL: Kind = Kind::Count { min: 1, max: 1024 };
const SMALL_OR_NONE: Kind = Kind::Count { min: 0, max: 1024 };

/// The HTTP library below has limits of its own; beyond them a setting would lie.
const URI: Kind = Kind::Bytes {
    min: 256,
    max: 65_534,
};
const HEAD: Kind = Kind::Bytes {
    min: 8 << 10,
    max: 16 << 20,
};
const BODY: Kind = Kind::Bytes {
    min: 1,
    max: 1 << 40,
};
const MEMORY: Kind = Kind::Bytes {
    min: 0,
    max: 1 << 50,
};
const RATE: Kind = Kind::Bytes {
    min: 1,
    max: 1 << 30,
};
const CHUNK: Kind = Kind::Bytes {
    min: 1 << 10,
    max: BODY_MAX as u64,
};

const ONE_CONNECTION: State = State::Moot("server and worker share one connection for everything");

impl Setting {
    pub fn section(&self) -> &'static str {
        split(self.name).0
    }

    pub fn key(&self) -> &'static str {
        split(self.name).1
    }

    /// Every variable that sets it, strongest first.
    pub fn variables(&self) -> impl Iterator<Item = String> {
        self.env
            .iter()
            .map(|name| name.to_string())
            .chain([variable(self.name)])
    }

    const fn env(mut self, names: &'static [&'static str]) -> Self {
        self.env = names;
        self
    }

    const fn older(mut self, names: &'static [&'static str]) -> Self {
        self.older = names;
        self
    }

    const fn flags(mut self, flags: &'static [Flag]) -> Self {
        self.flags = flags;
        self
    }

    const fn live(mut self) -> Self {
        self.live = true;
        self
    }

    const fn later(mut self) -> Self {
        self.state = State::Later;
        self
    }

    const fn moot(mut self, why: State) -> Self {
        self.state = why;
        self
    }
}

impl Flag {
    const fn value(long: &'static str, name: &'static str, programs: &'static [Program]) -> Self {
        let takes = Takes::Value(name);
        Self {
            long,
            short: None,
            takes,
            programs,
            alias: None,
            hidden: false,
        }
    }

    const fn short(mut self, short: char) -> Self {
        self.short = Some(short);
        self
    }

    const fn takes(mut self, takes: Takes) -> Self {
        self.takes = takes;
        self
    }

    const fn alias(mut self, long: &'static str) -> Self {
        self.alias = Some(long);
        self
    }

    const fn hidden(mut self) -> Self {
        self.hidden = true;
        self
    }
}

/// The section and the key of a full name.
pub fn split(name: &str) -> (&str, &str) {
    name.rsplit_once('.').unwrap_or(("", name))
}

/// `QGSRV_<SECTION>_<KEY>`.
pub fn variable(name: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() {
            c.to_ascii_uppercase()
        } else {
            '_'
        }
    };
    format!("QGSRV_{}", name.chars().map(plain).collect::<String>())
}

/// The row of `name`, be it the present or an older one.
pub fn setting(name: &str) -> Option<&'static Setting> {
    SETTINGS
        .iter()
        .find(|row| row.name == name || row.older.contains(&name))
}

/// Whether an environment variable may set anything.
pub fn is_variable(name: &str) -> bool {
    name.starts_with("QGSRV_") || SETTINGS.iter().any(|row| row.env.contains(&name))
}

/// The family that `name` belongs to.
pub fn family(name: &str) -> Option<&'static Family> {
    FAMILIES.iter().find(|family| {
        let rest = name.strip_prefix(family.prefix).unwrap_or_default();
        // A route may have dots, in the pattern of a variable above all.
        let is_route = rest.starts_with('/');
        !rest.is_empty()
            && (is_route || rest.contains('.')) == (is_route || family.pattern.contains('.'))
    })
}

const fn row(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Setting {
    Setting {
        name,
        kind,
        default,
        help,
        env: &[],
        older: &[],
        flags: &[],
        state: State::Ready,
        live: false,
    }
}

/// Every setting, in the order of help and sample file.
#[rustfmt::skip]
pub const SETTINGS: &[Setting] = &[
    row("server.port", Kind::Port, "8080", "TCP port for HTTP; 0 takes any free one")
        .env(&["QGSRV_SERVER_HTTP_PORT"])
        .flags(&[Flag::value("port", "PORT", SERVER).short('p')]),
    row("server.interfaces", Kind::Addresses, "0.0.0.0", "IP addresses to listen on, separated by commas")
        .flags(&[Flag::value("bind", "IP", SERVER).short('b')]),
    row("server.workers", SMALL, "2", "worker processes of a pool, each serving one request at a time")
        .flags(&[Flag::value("workers", "NUM", BOTH).short('w')]).live(),
    row("server.http_threads", SMALL, "2", "threads that serve HTTP; the first is the broker's, too")
        .flags(&[Flag::value("jobs", "NUM", SERVER).short('j')]),
    row("server.timeout", Kind::Seconds, "20", "seconds until a reply must begin, and between two parts of it")
        .flags(&[Flag::value("timeout", "SECONDS", SERVER)]).live(),
    row("server.drain_timeout", Kind::SecondsOrZero, "20", "seconds that running requests may take when the server is told to stop; after an upgrade they have but their own bounds").live(),
    row("server.drain_idle", Kind::SecondsOrZero, "1", "seconds that a connection without a request is still kept then, because one may be on its way").live(),
    row("server.setuid", Kind::Text, "", "user to become once the ports are bound; may read certificates and keys")
        .flags(&[Flag::value("setuid", "SETUID", SERVER).short('u')]),
    row("server.proxy", Kind::Bool, "no", "start no local pool: workers join through zmq.bindaddr")
        .flags(&[Flag::value("proxy", "", SERVER).takes(Takes::Nothing { means: "yes" })]),
    row("server.default_project", Kind::Text, "", "project of requests that name none")
        .env(&["QGIS_PROJECT_FILE"]).live(),
    row("server.ssl", Kind::Bool, "no", "serve HTTPS instead of HTTP"),
    row("server.ssl_cert", Kind::Path, "", "PEM file with the certificate chain").live(),
    row("server.ssl_key", Kind::Path, "", "PEM file with the private key").live(),
    row("server.http_proxy", Kind::Bool, "no", "trust Forwarded and X-Forwarded-* headers, because a proxy sets them; of a list what the proxy added counts (server.http_proxies), and where it does not append, it has to replace what clients send under these names").live(),
    row("server.http_proxies", SMALL, "1", "trusted proxies in front of the server, one behind the other, only with server.http_proxy; the entry that the outermost of them added to a list counts, from the end: 1 the last, 2 the last but one; if there are fewer, the first").live(),
    row("server.proxy_url", Kind::Text, "", "public URL to advertise, only with server.http_proxy; empty: what the proxy says").live(),
    row("server.cross_origin", Kind::Bool, "yes", "yes: any site may read replies; no: the Origin is echoed").live(),
    row("server.client_header", Kind::Text, "", "header by which the trusted proxy names the client, only with server.http_proxy; empty: its address as forwarded (X-Forwarded-For, or Forwarded, or X-Real-IP)").live(),
    row("server.run_on", Kind::Words, "", "operations that run to their end though their client left").live(),
    row("server.run_on_timeout", Kind::SecondsOrZero, "120", "seconds that a request may run whose client left, if it runs on; never less than server.timeout").live(),
    row("server.cancel_writes", Kind::Bool, "no", "yes: transactions and POSTs of plugins end when their client leaves; no: they run to their end").live(),
    row("server.qgis_refusals", Kind::Bool, "no", "yes: without SERVICE, REQUEST or a project, or with one that is absent, broken or has invalid layers, web services refuse as QGIS's own programs do, with status 500, or 200, and a ServerException, for which some take a worker's time; no: with 400, 404 or 422 and an OGC exception; the same for the server and its workers").live(),
    row("server.allow_headers", Kind::Words, "X-Qgis-,X-Lizmap-", "prefixes of request headers that reach QGIS").live(),
    row("server.status_page", Kind::Bool, "no", "serve /status").live(),
    row("server.server_timing", Kind::Bool, "no", "say in Server-Timing how long each request waited and took to load and to render").live(),
    row("server.connections_max", SOME, "10000", "open client connections; more have to wait").live(),
    row("server.streams_max", SMALL, "100", "requests at once on one HTTP/2 connection").live(),
    row("server.header_timeout", Kind::Seconds, "10", "seconds for a client to send a request head").live(),
    row("server.body_timeout", Kind::Seconds, "20", "seconds between two looks at whether a request body comes at server.body_rate_min").live(),
    row("server.body_rate_min", RATE, "1K", "bytes per second of a request body; slower clients are refused").live(),
    row("server.body_time_max", Kind::Seconds, "900", "seconds that a request body may take in all").live(),
    row("server.idle_timeout", Kind::Seconds, "75", "seconds that a connection is kept without a request").live(),
    row("server.write_timeout", Kind::Seconds, "60", "seconds between two looks at whether a client takes its reply at server.write_rate_min").live(),
    row("server.write_rate_min", RATE, "1K", "bytes per second of a reply; slower clients are cut off").live(),
    row("server.linger_timeout", Kind::SecondsOrZero, "2", "seconds that a client which was refused may go on sending, so that it reads why").live(),
    row("server.body_max", BODY, "100M", "size of a request body").live(),
    row("server.body_memory", BODY, "400M", "memory for all request bodies together, but for those of up to 64K").live(),
    row("server.reply_memory", BODY, "256M", "memory for large replies that wait for their clients; beyond it the client that has taken nothing for longest is cut off").live(),
    row("server.uri_max", URI, "32K", "size of a request URI").live(),
    row("server.header_max", HEAD, "64K", "size of a request head").live(),
    row("server.headers_max", SMALL, "100", "fields of a request head in HTTP/1").live(),
    row("server.restartmon", Kind::Path, "", "file whose change restarts the workers, one after the other").live(),
    row("server.reload_timeout", Kind::Seconds, "10", "seconds that reading settings and certificates again may take; after them nothing changes").live(),
    row("server.restartmon_check_time", Kind::Milliseconds, "3000", "milliseconds between two looks at server.restartmon").live(),
    row("server.pluginpath", Kind::Paths, "", "directories with QGIS server plugins, separated by colons or commas; of two plugins with one name the first is loaded")
        .env(&["QGSRV_SERVER_PLUGINPATH", "QGIS_PLUGINPATH"]).older(&["worker.qgis.plugins.paths"]).live(),
    row("server.enable_filters", Kind::Bool, "no", "run access policies in Python (entry points py_qgis_server.access_policy) before a request is served; they serve /ows/p/<profile>/"),
    row("server.memory_high_water_mark", Kind::Fraction, "0.9", "part of the memory of the machine, or of the control group, above which the largest worker of a pool is replaced; 0: never").live(),
    row("server.getfeaturelimit", Kind::Integer, "-1", "features that one WFS GetFeature may return; 0 or less: any number").live(),
    row("server.debug_request_id", Kind::Text, "", "value of X-Debug-Id that logs one request in detail")
        .later(),
    row("server.monitor", Kind::Text, "", "name of the monitor that is told about each request")
        .later(),

    row("logging.level", Kind::Level, "info", "how much to log: debug, info, warning or error")
        .flags(&[
            Flag::value("logging", "LEVEL", BOTH),
            Flag::value("debug", "", BOTH).short('d').takes(Takes::Nothing { means: "debug" }),
        ]).live(),
    row("logging.qgis_info", Kind::Bool, "no", "log what QGIS says at level Info, too")
        .env(&["QGSRV_LOGGING_QGIS_INFO", "QGSRV_QGIS_INFO"]).live(),
    row("logging.json", Kind::Bool, "no", "log JSON objects instead of text").live(),
    row("logging.slow_seconds", Kind::SecondsOrZero, "5", "requests that take longer are logged with their full query; 0: none").live(),
    row("logging.otlp_endpoint", Kind::Text, "", "URL of an OpenTelemetry collector that gets traces, such as http://127.0.0.1:4318/v1/traces; empty: none"),

    row("projects.cache.rootdir", Kind::Path, "", "absolute directory of the projects; required")
        .env(&["QGSRV_CACHE_ROOTDIR"]).older(&["cache.rootdir"])
        .flags(&[Flag::value("rootdir", "PATH", BOTH)]).live(),
    row("projects.cache.size", SMALL, "10", "projects that each worker keeps open")
        .env(&["QGSRV_CACHE_SIZE"]).older(&["cache.size"]).live(),
    row("projects.cache.check_interval", Kind::SecondsOrZero, "0", "seconds between two looks for changes of a project; 0: at each request; one in a storage that was deleted is served until the next look")
        .env(&["QGSRV_CACHE_CHECK_INTERVAL"])
        .older(&["cache.check_interval", "projects.cache.refresh_interval", "cache.refresh_interval"]).live(),
    row("projects.cache.broken_seconds", Kind::SecondsOrZero, "5", "seconds for which a worker remembers that a project does not load; 0: each request tries again").live(),
    row("projects.cache.memory", MEMORY, "0", "memory that the open projects of a worker may take together, as measured when they were loaded; 0: half of what the worker may allocate").live(),
    row("projects.cache.settle_seconds", Kind::SecondsOrZero, "2", "seconds for which a project that changed and cannot be read may be half written: meanwhile the old one answers").live(),
    row("projects.cache.stale_seconds", Kind::SecondsOrZero, "0", "seconds for which the old one of a changed project answers while workers load the new one, with which all then answer at once; 0: requests wait for it").live(),
    row("projects.cache.strict_check", Kind::Bool, "yes", "refuse projects that have invalid layers")
        .env(&["QGSRV_CACHE_STRICT_CHECK"]).older(&["cache.strict_check"]).live(),
    row("projects.cache.bad_layers", Kind::Text, "", "what becomes of projects with invalid layers: strict (they are refused), skip (served without them) or retry (the same, and they come back when their sources do); empty: strict or skip, as projects.cache.strict_check says").live(),
    row("projects.cache.bad_layers_of", Kind::Words, "", "exceptions for projects, the first that fits: NAME=POLICY, such as drafts/*=skip; of a storage NAME is postgresql:NAME, geopackage:NAME or s3:KEY, or what a handler is asked for, whichever scheme of the operator leads there").live(),
    row("projects.cache.bad_layers_seconds", Kind::Seconds, "30", "seconds between two tries to get invalid layers back").live(),
    row("projects.cache.trust_layer_metadata", Kind::Bool, "no", "believe extents and keys in the project instead of asking the data")
        .env(&["QGSRV_TRUST_LAYER_METADATA", "QGSRV_CACHE_TRUST_LAYER_METADATA", "QGIS_SERVER_TRUST_LAYER_METADATA"])
        .older(&["cache.trust_layer_metadata"]).live(),
    row("projects.cache.disable_getprint", Kind::Bool, "no", "do not load print layouts")
        .env(&["QGSRV_DISABLE_GETPRINT", "QGSRV_CACHE_DISABLE_GETPRINT", "QGIS_SERVER_DISABLE_GETPRINT"])
        .older(&["cache.disable_getprint"]).live(),
    row("projects.cache.force_readonly_layers", Kind::Bool, "yes", "open layers for reading only (QGIS 3.28 and later)")
        .env(&["QGSRV_CACHE_FORCE_READONLY_LAYERS", "QGIS_SERVER_FORCE_READONLY_LAYERS"])
        .older(&["cache.force_readonly_layers"]).live(),
    row("projects.cache.preload_config", Kind::Path, "", "file that lists projects, one per line, which a worker opens before it is ready, and keeps")
        .env(&["QGSRV_CACHE_PRELOAD_CONFIG"]).older(&["cache.preload_config"]).live(),
    row("projects.cache.restore_projects", Kind::Words, "", "more projects to open and keep so")
        .env(&["CONF_WORKER__RESTORE_PROJECTS"]).live(),
    row("projects.cache.preload_spread", Kind::Bool, "no", "yes: each worker of a pool opens a part of them; no: each opens all").live(),
    row("projects.cache.preload_seconds", Kind::Seconds, "60", "seconds that a worker takes for that, beyond worker.start_timeout; the rest is opened when it is asked for").live(),
    row("projects.cache.insecure", Kind::Bool, "no", "let MAP carry any parameter of a database")
        .env(&["QGSRV_CACHE_INSECURE"]).older(&["cache.insecure"])
        .moot(State::Moot("projects.schemes says how a database is reached, and MAP never does")),
    row("projects.cache.disable_owsurls", Kind::Bool, "no", "do not advertise the service URLs that a project has, but its own address")
        .env(&["QGSRV_CACHE_DISABLE_OWSURLS"]).older(&["cache.disable_owsurls"]).live(),
    row("projects.cache.force_etag", Kind::Bool, "no", "tell states of capabilities apart by their project alone, without drawing them up, as with projects.cache.trust_layer_metadata")
        .env(&["QGSRV_CACHE_FORCE_ETAG"]).older(&["cache.force_etag"]).live(),
    row("projects.cache.default_handler", Kind::Text, "file", "scheme of a MAP that has none")
        .env(&["QGSRV_CACHE_DEFAULT_HANDLER"]).older(&["cache.default_handler"]).live(),
    row("projects.cache.allow_storage_schemes", Kind::Words, "file", "schemes that a MAP may lead to, such as file,postgresql,geopackage,s3; *: any that there is a handler for")
        .env(&["QGSRV_CACHE_ALLOW_STORAGE_SCHEMES"]).older(&["cache.allow_storage_schemes"]).live(),
    row("projects.cache.observers", Kind::Words, "", "names of the observers that are told when a project changes")
        .env(&["QGSRV_CACHE_OBSERVERS"]).older(&["cache.observers"]).later(),
    row("projects.cache.has_observers", Kind::Bool, "no", "workers report changes of projects")
        .later(),
    row("projects.cache.advanced_report", Kind::Bool, "no", "report the memory that each request took")
        .env(&["QGSRV_CACHE_ADVANCED_REPORT"]).older(&["cache.advanced_report"]).later(),

    row("projects.storage.timeout", Kind::Seconds, "5", "seconds for a storage to say in which state a project is").live(),
    row("projects.s3.endpoint", Kind::Text, "", "URL of the S3 server, such as https://s3.example.org; empty: Amazon's")
        .env(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]).live(),
    row("projects.s3.region", Kind::Text, "us-east-1", "its region").env(&["AWS_REGION", "AWS_DEFAULT_REGION"]).live(),
    row("projects.s3.access_key_id", Kind::Text, "", "who we are there; empty: anybody").env(&["AWS_ACCESS_KEY_ID"]).live(),
    row("projects.s3.secret_access_key", Kind::Secret, "", "the secret that goes with it").env(&["AWS_SECRET_ACCESS_KEY"]).live(),
    row("projects.s3.path_style", Kind::Bool, "yes", "name the bucket in the path; no: in the host").live(),

    row("plugins.install", Kind::Words, "", "plugins that are loaded, by the name in their metadata or of their folder; empty: all that are found")
        .older(&["worker.qgis.plugins.install"]).live(),
    row("plugins.strict", Kind::Bool, "no", "a worker does not start when a plugin does not load").live(),
    row("plugins.install_mode", Kind::OneOf(&["external", "auto"]), "external", "auto: plugins.plugin_manager puts plugins.install into the first of server.pluginpath before workers start")
        .older(&["worker.qgis.plugins.install_mode"]),
    row("plugins.plugin_manager", Kind::Text, "qgis-plugin-manager", "the program that does it, looked for in PATH")
        .older(&["worker.qgis.plugins.plugin_manager"]),
    row("plugins.install_timeout", Kind::Seconds, "120", "seconds that it may take in all; after that, workers start with what is there"),

    row("worker.server", Kind::Endpoint, "${zmq:bindaddr}", "the server that a pool joins: HOST, HOST:PORT or tcp://HOST:PORT")
        .flags(&[
            Flag::value("host", "HOST", WORKER).alias("proxy-host"),
            Flag::value("connect", "ENDPOINT", WORKER).hidden(),
        ]),
    row("worker.identity", Kind::Text, "", "name of the pool in logs; empty: the host name")
        .flags(&[Flag::value("identity", "STR", WORKER)]).live(),
    row("worker.spares", SMALL_OR_NONE, "1", "warm workers that wait to replace one that died").live(),
    row("worker.program", Kind::Path, "", "program of the local pool; empty: qgisserver-worker beside this one, then in PATH"),
    row("worker.python", Kind::Path, "/usr/bin/python3", "the Python that QGIS was built for"),
    row("worker.env_allow", Kind::Words, "", "more variables (NAME or PREFIX*) that workers inherit"),
    row("worker.start_timeout", Kind::Seconds, "60", "seconds for a worker to become ready; the pool may take twice as long to import QGIS").live(),
    row("worker.young", Kind::SecondsOrZero, "5", "seconds; a worker that dies younger, without having served, is replaced after a pause").live(),
    row("worker.backoff_max", Kind::SecondsOrZero, "30", "seconds that this pause grows to").live(),
    row("worker.drain_timeout", Kind::SecondsOrZero, "20", "seconds that a running request may take when its pool stops; a worker that is replaced ends it first, and holds up the next for so long").live(),
    row("worker.memory_limit", MEMORY, "0", "memory that one worker may allocate; 0: half of the machine's or the control group's, but 512M at least").live(),
    row("worker.recycle_memory", MEMORY, "0", "resident memory at which a worker is replaced; 0: never").live(),
    row("worker.recycle_seconds", Kind::SecondsOrZero, "0", "age, in seconds, at which a worker is replaced, up to a quarter less; 0: never").live(),
    row("worker.recycle_requests", ANY, "0", "requests after which a worker is replaced, up to a quarter less; 0: never").live(),
    row("worker.memory_check_seconds", Kind::Seconds, "5", "seconds between two looks at the memory of the workers").live(),
    row("worker.chunk_bytes", CHUNK, "256K", "bytes of a streamed reply that travel together").live(),

    row("zmq.hostaddr", Kind::Text, "127.0.0.1", "host part of zmq.bindaddr; loopback only, until connections are encrypted"),
    row("zmq.bindaddr", Kind::Endpoint, "tcp://${zmq:hostaddr}:18080", "where workers of other pools join, with --proxy")
        .env(&["QGSRV_ZMQ_INADDR"]),
    row("zmq.gate_handshake", Kind::Seconds, "5", "seconds for a connection there to introduce itself"),
    row("zmq.gate_peers_max", SOME, "1024", "connections there at the same time"),
    row("zmq.ipcpath", Kind::Path, "/tmp", "directory for the private socket of the local pool")
        .env(&["QGSRV_ZMQ_IPCPATH", "RUNTIME_DIRECTORY", "TMPDIR"]),
    row("zmq.maxqueue", ANY, "1000", "requests that may wait for a worker").live(),
    row("zmq.timeout", Kind::Milliseconds, "15000", "milliseconds that a request may wait for a worker").live(),
    row("zmq.heartbeat", Kind::Seconds, "1", "seconds between two heartbeats of server and worker"),
    row("zmq.heartbeat_misses", SMALL, "2", "heartbeats after which a worker that says nothing is dead"),
    row("zmq.window", SMALL, "16", "parts of a streamed reply that may be under way"),
    row("zmq.cancel_grace", Kind::SecondsOrZero, "1", "seconds for a worker to stop a cancelled request by itself").live(),
    row("zmq.quarantine_seconds", Kind::SecondsOrZero, "300", "seconds that a request which ended its workers is refused; 0: never").live(),
    row("zmq.quarantine_deaths", SMALL, "2", "workers that a request ends, without an answer in between, before it is refused").live(),
    row("zmq.breaker_timeouts", SMALL_OR_NONE, "3", "time-outs, less the answers, after which a project is refused for a while; 0: never").live(),
    row("zmq.breaker_window", Kind::Seconds, "60", "seconds without another time-out after which those before are forgotten").live(),
    row("zmq.breaker_pause", Kind::Seconds, "30", "seconds until one request tries whether such a project answers again").live(),
    row("zmq.breaker_share", Kind::Fraction, "0.5", "part of the workers that a project may hold after a time-out, while others are asked for; one at least").live(),
    row("zmq.storm_deaths", SMALL_OR_NONE, "5", "workers that die in a row, without a reply in between, until /ready says no; 0: any number").live(),
    row("zmq.storm_seconds", Kind::Seconds, "30", "seconds without a death after which it may say yes again").live(),
    row("zmq.identity", Kind::Text, "", "name of the front towards the broker")
        .moot(State::Moot("front and broker are one process; worker.identity names a pool")),
    row("zmq.broadcastaddr", Kind::Text, "", "address of broadcasts to workers")
        .moot(ONE_CONNECTION),
    row("zmq.cache_observer_addr", Kind::Text, "", "address for news about cached projects")
        .env(&["QGSRV_ZMQ_CACHEOBSERVERADDR"]).moot(ONE_CONNECTION),
    row("zmq.supervisor_addr", Kind::Text, "", "address of the supervisor of remote workers")
        .moot(ONE_CONNECTION),

    row("limits.client_connections", Kind::Integer, "-1", "connections of one address (of IPv6, of a /64 network) that may be open, beyond which they are closed at once; 0: any number; -1: half of server.connections_max, but any number with server.http_proxy and from this machine").live(),
    row("limits.client_requests", ANY, "500", "requests of one client that may be here, waiting or running; 0: any number").live(),
    row("limits.client_rate", ANY, "0", "requests of one client a second, on average over ten seconds; 0: any number").live(),
    row("limits.project_requests", ANY, "0", "requests of one project that may be here, waiting or running; 0: any number").live(),
    row("lanes.reserved_workers", Kind::Integer, "-1", "workers that long requests leave alone; -1: a quarter, but two of four and one of two").live(),
    row("lanes.slow_ms", Kind::Milliseconds, "1500", "milliseconds; a request that is likely to take more is long, as every print is").live(),
    row("lanes.reserved_seconds", Kind::SecondsOrZero, "10", "seconds without small requests after which slow ones, but no prints, may have the reserved workers, too").live(),
    row("lanes.stalled_seconds", Kind::SecondsOrZero, "5", "seconds after which a project that answers nothing is stalled, unless what it was asked for is long; it has no more workers than long requests may have, and so has one that never answered, so where projects take longer than that to load, clients wait for it; 0: never").live(),

    row("api.enabled.wfs3", Kind::Bool, "yes", "serve OGC API Features"),
    row("api.enabled.landing_page", Kind::Bool, "no", "serve the catalogue of projects of QGIS at api.endpoints.landing_page; without it that path is a 404"),
    row("api.enabled.lizmap_api", Kind::Bool, "no", "serve the API of the Lizmap plugin")
        .env(&["QGSRV_API_ENABLED_LIZMAP"]),
    row("api.endpoints.wfs3", Kind::Text, "/wfs3", "path of OGC API Features; before QGIS 4 it has to end in /wfs3"),
    row("api.endpoints.landing_page", Kind::Text, "/catalog", "path of the catalogue of projects"),
    row("api.endpoints.lizmap_api", Kind::Text, "/lizmap", "path of the API of the Lizmap plugin")
        .env(&["QGSRV_API_ENDPOINTS_LIZMAP"]),
    row("api:wfs3.QGIS_SERVER_API_WFS3_ROOT_PATH", Kind::Text, "${api.endpoints:wfs3}", "variable for QGIS 4: path of OGC API Features")
        .env(&["QGIS_SERVER_API_WFS3_ROOT_PATH"]),
    row("api:landing_page.QGIS_SERVER_LANDING_PAGE_PREFIX", Kind::Text, "${api.endpoints:landing_page}", "variable for QGIS: path of the catalogue")
        .env(&["QGIS_SERVER_LANDING_PAGE_PREFIX"]),
    row("api:landing_page.QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES", Kind::Text, "${projects.cache:rootdir}", "variable for QGIS: what the catalogue lists")
        .env(&["QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES"]),

    row("metadata.title", Kind::Text, "", "title of the service on the page at /"),
    row("metadata.description", Kind::Text, "", "what the service offers"),
    row("metadata.terms_of_service", Kind::Text, "", "URL of the terms of service"),
    row("metadata.contact_name", Kind::Text, "", "who runs the service"),
    row("metadata.contact_address", Kind::Text, "", "where they are"),
    row("metadata.contact_email", Kind::Text, "", "how to write to them"),
    row("metadata.contact_url", Kind::Text, "", "their site"),
    row("metadata.licence_name", Kind::Text, "", "licence of the service's content"),
    row("metadata.licence_url", Kind::Text, "", "text of that licence"),
    row("metadata.external_doc_description", Kind::Text, "", "what further documentation says"),
    row("metadata.external_doc_url", Kind::Text, "", "where it is"),

    row("management.enabled", Kind::Bool, "no", "serve /ping, /ready, /status, /plugins and /metrics on management.port"),
    row("management.interfaces", Kind::Addresses, "127.0.0.1", "IP addresses to listen on for that; whoever reaches them reads it"),
    row("management.port", Kind::Port, "19876", "TCP port for that; 0 takes any free one"),
    row("management.ssl", Kind::Bool, "no", "serve it over HTTPS"),
    row("management.ssl_cert", Kind::Path, "", "PEM file with its certificate chain").live(),
    row("management.ssl_key", Kind::Path, "", "PEM file with its private key").live(),
    row("management.connections_max", SMALL, "64", "open connections there; more have to wait"),
    row("management.timeout", Kind::Seconds, "10", "seconds for one connection there, which serves one request"),

    row("monitor:amqp.host", Kind::Text, "", "AMQP server that is told about each request")
        .env(&["AMQP_HOST"]).later(),
    row("monitor:amqp.port", Kind::Port, "5672", "its port").env(&["AMQP_PORT"]).later(),
    row("monitor:amqp.vhost", Kind::Text, "/", "its virtual host").env(&["AMQP_VHOST"]).later(),
    row("monitor:amqp.user", Kind::Text, "", "user name there; the password is in the file $AMQPPASSFILE")
        .env(&["AMQP_USER"]).later(),
    row("monitor:amqp.exchange", Kind::Text, "qgis_log", "exchange to publish to").env(&["AMQP_EXCHANGE"]).later(),
    row("monitor:amqp.routing_key", Kind::Text, "", "routing key of the messages").env(&["AMQP_ROUTING"]).later(),
    row("monitor:amqp.default_routing_key", Kind::Text, "", "routing key when a variable part of the other is missing").later(),
    row("monitor:amqp.reconnect_delay", Kind::SecondsOrZero, "5", "seconds before a lost connection is tried again")
        .env(&["AMQP_RECONNECT_DELAY"]).later(),

    row("cache.observers:ban.server_address", Kind::Text, "", "URL that gets a BAN when a project changes").later(),
];

/// Settings whose keys are chosen by the operator.
#[rustfmt::skip]
pub const FAMILIES: &[Family] = &[
    Family { prefix: "projects.schemes.", pattern: "<name>", kind: Kind::Text,
        help: "what a scheme of MAP stands for: file:///dir/ (file:dir/ in the root directory), postgresql://user@host/?dbname=…&schema=…, geopackage:///file.gpkg?projectName={path}, s3://bucket/prefix/ (best .qgz: each look at a .qgs asks for its .qgd and attachments, too)",
        env_prefix: Some("QGSRV_PROJECTS_SCHEMES_"), state: State::Ready, live: true },
    Family { prefix: "projects.search_paths.", pattern: "<route>", kind: Kind::Text,
        help: "where a MAP below a route such as /public, /{user}/{theme} or, in TOML, /{user:[a-z]+} is looked for; the first route that matches wins",
        env_prefix: None, state: State::Ready, live: true },
    Family { prefix: "projects.handlers.", pattern: "<scheme>.<key>", kind: Kind::Text,
        help: "Python class that finds and reads projects of a scheme (handler = package.module.Class), and its options (config.<key>)",
        env_prefix: None, state: State::Ready, live: true },
    Family { prefix: "api.enabled.", pattern: "<name>", kind: Kind::Bool,
        help: "serve an API that a plugin brings",
        env_prefix: Some("QGSRV_API_ENABLED_"), state: State::Ready, live: true },
    Family { prefix: "api.endpoints.", pattern: "<name>", kind: Kind::Text,
        help: "path of that API",
        env_prefix: Some("QGSRV_API_ENDPOINTS_"), state: State::Ready, live: true },
    Family { prefix: "api:", pattern: "<name>.<VARIABLE>", kind: Kind::Text,
        help: "variable for QGIS that goes with an API",
        env_prefix: None, state: State::Ready, live: true },
    Family { prefix: "policies.", pattern: "<name>", kind: Kind::Text,
        help: "a rule, asked in the order of their names: allow | deny | rewrite NAME=value … | request-header Name=value … | response-header Name=value …, then: if NAME=pattern NAME!=pattern …; NAME is a parameter in upper case, path, profile, method, client or header:Name",
        env_prefix: Some("QGSRV_POLICIES_"), state: State::Ready, live: true },
    Family { prefix: "contrib:", pattern: "<name>.<key>", kind: Kind::Text,
        help: "a setting of an access policy in Python",
        env_prefix: None, state: State::Ready, live: true },
    Family { prefix: "extensions:", pattern: "<name>.<key>", kind: Kind::Text,
        help: "a setting of an access policy in Python",
        env_prefix: None, state: State::Ready, live: true },
    Family { prefix: "metadata.", pattern: "<key>", kind: Kind::Text,
        help: "more to say on the page at /",
        env_prefix: Some("QGSRV_METADATA_"), state: State::Ready, live: true },
    Family { prefix: "monitor:", pattern: "<name>.<key>", kind: Kind::Text,
        help: "a setting of a monitor",
        env_prefix: None, state: State::Later, live: false },
    Family { prefix: "cache.observers:", pattern: "<name>.<key>", kind: Kind::Text,
        help: "a setting of an observer",
        env_prefix: None, state: State::Later, live: false },
];

/// Whether a running program takes up a new value when it is told to read its settings
/// again; the others wait for the next start.
pub fn is_live(name: &str) -> bool {
    let row = setting(name);
    row.is_some_and(|row| row.live) || family(name).is_some_and(|family| family.live)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn all_names() -> impl Iterator<Item = &'static str> {
        SETTINGS
            .iter()
            .flat_map(|row| row.older.iter().copied().chain([row.name]))
    }

    #[test]
    fn no_name_variable_or_flag_sets_two_settings() {
        let mut seen = BTreeSet::new();
        for name in all_names() {
            assert!(seen.insert(name.to_owned()), "{name} twice");
        }
        let mut seen = std::collections::BTreeMap::new();
        for row in SETTINGS {
            for variable in row.variables() {
                assert_eq!(*seen.entry(variable).or_insert(row.name), row.name);
            }
        }
        let mut seen = BTreeSet::new();
        for flag in SETTINGS.iter().flat_map(|row| row.flags) {
            assert!(seen.insert(flag.long), "--{} twice", flag.long);
        }
    }

    #[test]
    fn help_is_one_line() {
        for row in SETTINGS {
            assert!(
                !row.help.is_empty() && !row.help.contains('\n'),
                "{}",
                row.name
            );
        }
    }

    #[test]
    fn no_chunk_is_larger_than_the_wire_allows() {
        assert!(CHUNK.parse("8M").is_some());
        assert!(CHUNK.parse("9M").is_none());
    }

    #[test]
    fn a_variable_replaces_what_a_shell_cannot_name() {
        assert_eq!(variable("projects.cache.size"), "QGSRV_PROJECTS_CACHE_SIZE");
        assert_eq!(
            variable("cache.observers:ban.x-y"),
            "QGSRV_CACHE_OBSERVERS_BAN_X_Y"
        );
    }

    #[test]
    fn families_take_what_no_row_names() {
        let of = |name| family(name).map(|family| family.prefix);
        assert_eq!(of("api:wfs3.KEY"), Some("api:"));
        assert_eq!(of("metadata.motto"), Some("metadata."));
        assert_eq!(
            of("cache.observers:ban.server_address"),
            Some("cache.observers:")
        );
        assert_eq!(of("projects.schemes.a.b"), None);
        assert_eq!(of("metadata."), None);
        assert_eq!(of("server.prot"), None);
    }

    #[test]
    fn what_is_live_is_a_setting_that_does_something() {
        let rows = SETTINGS.iter().map(|row| (row.name, row.live, row.state));
        let families = FAMILIES.iter().map(|it| (it.prefix, it.live, it.state));
        for (name, live, state) in rows.chain(families) {
            assert!(!live || state == State::Ready, "{name}");
        }
        assert!(is_live("cache.size") && is_live("metadata.title") && is_live("metadata.motto"));
        assert!(!is_live("server.port") && is_live("projects.schemes.pg"));
    }
}
