//! The sample file, the command lines and the table of settings say the same.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use qgisserver::config::{self, Action, Config, Exit, Sources};

type Environment = BTreeMap<String, String>;

fn server(args: &[&str], env: &Environment) -> Result<Action, Exit> {
    let args = ["qgisserver"].iter().chain(args).map(OsString::from);
    Sources::of_server(args, env.clone()).read()
}

fn run(args: &[&str], env: &Environment) -> (Config, Vec<String>) {
    match server(args, env) {
        Ok(Action::Run(config, warnings)) => (*config, warnings),
        other => panic!("{other:?}"),
    }
}

fn printed(args: &[&str], env: &Environment) -> String {
    let args: Vec<_> = ["--print-config"].iter().chain(args).copied().collect();
    match server(&args, env) {
        Ok(Action::PrintConfig(text)) => text,
        other => panic!("{other:?}"),
    }
}

fn env(pairs: &[(&str, &str)]) -> Environment {
    pairs
        .iter()
        .map(|(name, text)| (name.to_string(), text.to_string()))
        .collect()
}

/// The value and the origin that `--print-config` shows for a setting.
fn shown<'a>(printed: &'a str, name: &str) -> (&'a str, &'a str) {
    let line = printed
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(" ="));
    let (value, origin) = line
        .unwrap_or_else(|| panic!("{name} in {printed}"))
        .rsplit_once("# ")
        .unwrap();
    (value.trim(), origin)
}

fn file(name: &str, text: &str) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (dir, path)
}

#[test]
fn the_sample_file_is_made_from_the_table() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc/qgisserver.conf");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(&path, config::sample()).unwrap();
    }
    let text = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text == config::sample(),
        "etc/qgisserver.conf differs from the table of settings; \
         write it again with: UPDATE=1 cargo test --test config"
    );
}

#[test]
fn the_sample_file_changes_nothing() {
    let (_dir, path) = file("q.conf", &config::sample());
    let (config, warnings) = run(&["--proxy", "-c", &path], &env(&[]));
    let (without, _) = run(&["--proxy"], &env(&[]));
    assert_eq!(
        Config {
            forwarded: without.forwarded.clone(),
            ..config
        },
        without
    );
    assert_eq!(warnings, [""; 0]);
}

/// Otherwise a reader who uncomments a line would not get what it shows.
#[test]
fn every_line_of_the_sample_file_is_the_default_when_uncommented() {
    let uncomment = |line: &str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with(|c: char| c.is_ascii_alphabetic()) => rest.to_owned(),
        _ => line.to_owned(),
    };
    let text: Vec<_> = config::sample().lines().map(uncomment).collect();
    let (_dir, path) = file("q.conf", &text.join("\n"));
    let with_file = printed(&["-c", &path], &env(&[]));
    let without = printed(&[], &env(&[]));
    assert_eq!(with_file.lines().count(), without.lines().count());
    for line in without.lines() {
        let (name, _) = line.split_once(" =").unwrap();
        let (value, origin) = shown(&with_file, name);
        assert_eq!(value, shown(&without, name).0, "{name}");
        assert!(origin.starts_with(&format!("{path}:")), "{name}: {origin}");
    }
}

/// What administrators of py-qgis-server have in their files and containers.
#[test]
fn every_setting_and_variable_of_py_qgis_server_is_accepted() {
    for (name, variable, text) in PY_QGIS_SERVER {
        if !variable.is_empty() {
            let printed = printed(&[], &env(&[(variable, text)]));
            assert_eq!(
                shown(&printed, name),
                (*text, format!("environment {variable}").as_str())
            );
        }
        let (section, key) = name.rsplit_once('.').unwrap();
        let (_dir, path) = file("q.conf", &format!("[{section}]\n{key} = {text}\n"));
        let printed = printed(&["-c", &path], &env(&[]));
        assert_eq!(shown(&printed, name), (*text, format!("{path}:2").as_str()));
    }
}

#[test]
fn older_names_of_files_and_variables_are_accepted() {
    let text = "[cache]\nsize = 3\nrootdir = /data\nstrict_check = no\n\
                [zmq]\nbindaddr = tcp://127.0.0.1:7000\nmaxqueue = 4\ntimeout = 500\n";
    let (_dir, path) = file("q.conf", text);
    let in_file = printed(&["-c", &path], &env(&[]));
    assert_eq!(shown(&in_file, "projects.cache.size").0, "3");
    assert_eq!(shown(&in_file, "projects.cache.rootdir").0, "/data");
    assert_eq!(shown(&in_file, "projects.cache.strict_check").0, "no");
    assert_eq!(shown(&in_file, "zmq.bindaddr").0, "tcp://127.0.0.1:7000");
    assert_eq!(shown(&in_file, "zmq.maxqueue").0, "4");
    assert_eq!(shown(&in_file, "zmq.timeout").0, "500");
    for (variable, name) in [
        ("QGSRV_ZMQ_BINDADDR", "zmq.bindaddr"),
        ("QGSRV_ZMQ_INADDR", "zmq.bindaddr"),
        ("QGSRV_QGIS_INFO", "logging.qgis_info"),
        ("QGSRV_SERVER_PORT", "server.port"),
        ("QGSRV_PROJECTS_CACHE_ROOTDIR", "projects.cache.rootdir"),
    ] {
        let text = if name == "zmq.bindaddr" {
            "tcp://127.0.0.1:1"
        } else {
            "1"
        };
        let printed = printed(&[], &env(&[(variable, text)]));
        assert_eq!(shown(&printed, name).1, format!("environment {variable}"));
    }
}

#[test]
fn toml_and_ini_make_the_same_configuration() {
    let ini = "[server]\nport = 8081\ninterfaces = 127.0.0.1, ::1\nhttp_proxy = yes\n\
               [projects.cache]\nsize = 3\n[metadata]\ntitle = Maps\n";
    let toml = "[server]\nport = 8081\ninterfaces = ['127.0.0.1', '::1']\nhttp_proxy = true\n\
                [projects.cache]\nsize = 3\n[metadata]\ntitle = 'Maps'\n";
    let read = |name: &str, text: &str| {
        let (_dir, path) = file(name, text);
        let (config, _) = run(&["--proxy", "-c", &path], &env(&[]));
        Config {
            forwarded: vec![],
            ..config
        }
    };
    assert_eq!(read("q.conf", ini), read("q.toml", toml));
    assert_eq!(read("q.conf", ini).http.port, 8081);
}

#[test]
fn mistakes_of_all_layers_come_together() {
    let (_dir, path) = file(
        "q.conf",
        "[zmq]\nmaxqueue = many\n\n[server]\nssl\nsll = yes\n",
    );
    let env = env(&[("QGSRV_SERVER_TIMEOUT", "0")]);
    let exit = server(&["-c", &path, "-p", "99999"], &env).expect_err("nothing is right");
    assert_eq!(exit.code, 78);
    let lines: Vec<_> = exit.message.lines().collect();
    assert_eq!(lines, [
        format!("{path}:5: expected [section] or key = value, found \"ssl\""),
        format!("{path}:6: server.sll: unknown setting; did you mean server.ssl?"),
        "--port: server.port: expected a port, 0 to 65535, found \"99999\"".into(),
        "QGSRV_SERVER_TIMEOUT: server.timeout: expected seconds, at least 0.001, found \"0\"".into(),
        format!("{path}:2: zmq.maxqueue: expected a count, found \"many\""),
        "projects.cache.rootdir: is required: the absolute directory of the projects (--rootdir or QGSRV_CACHE_ROOTDIR)".into(),
    ]);
}

#[test]
fn limits_that_could_never_be_met_are_refused() {
    let (_dir, path) = file(
        "q.conf",
        "[server]\ninterfaces = 127.0.0.1,::1\nconnections_max = 1\nbody_max = 1K\nbody_memory = 1000\n[worker]\nmemory_limit = 100M\n",
    );
    let exit = server(&["-c", &path, "--rootdir", "/tmp"], &env(&[])).expect_err("all are wrong");
    let mut lines: Vec<_> = exit.message.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            format!(
                "{path}:3: server.connections_max: expected at least one for each of the 2 server.interfaces, found 1"
            ),
            format!(
                "{path}:5: server.body_memory: expected at least server.body_max, 1024 bytes, found 1000"
            ),
            format!(
                "{path}:7: worker.memory_limit: expected 0 or at least 256M, found 104857600 bytes"
            ),
        ]
    );
}

#[rustfmt::skip]
const PY_QGIS_SERVER: &[(&str, &str, &str)] = &[
    ("server.port", "QGSRV_SERVER_HTTP_PORT", "81"),
    ("server.interfaces", "QGSRV_SERVER_INTERFACES", "127.0.0.1"),
    ("server.workers", "QGSRV_SERVER_WORKERS", "3"),
    ("server.timeout", "QGSRV_SERVER_TIMEOUT", "21"),
    ("server.enable_filters", "QGSRV_SERVER_ENABLE_FILTERS", "yes"),
    ("server.http_proxy", "QGSRV_SERVER_HTTP_PROXY", "yes"),
    ("server.proxy_url", "QGSRV_SERVER_PROXY_URL", "https://maps/"),
    ("server.restartmon", "QGSRV_SERVER_RESTARTMON", "/f"),
    ("server.restartmon_check_time", "QGSRV_SERVER_RESTARTMON_CHECK_TIME", "1000"),
    ("server.ssl", "QGSRV_SERVER_SSL", "yes"),
    ("server.ssl_cert", "QGSRV_SERVER_SSL_CERT", "/c"),
    ("server.ssl_key", "QGSRV_SERVER_SSL_KEY", "/k"),
    ("server.cross_origin", "QGSRV_SERVER_CROSS_ORIGIN", "no"),
    ("server.status_page", "QGSRV_SERVER_STATUS_PAGE", "yes"),
    ("server.allow_headers", "QGSRV_SERVER_ALLOW_HEADERS", "X-A-"),
    ("server.memory_high_water_mark", "QGSRV_SERVER_MEMORY_HIGH_WATER_MARK", "0.5"),
    ("server.getfeaturelimit", "QGSRV_SERVER_GETFEATURELIMIT", "10"),
    ("server.pluginpath", "QGSRV_SERVER_PLUGINPATH", "/p"),
    ("server.pluginpath", "QGIS_PLUGINPATH", "/p"),
    ("server.debug_request_id", "QGSRV_SERVER_DEBUG_REQUEST_ID", "x"),
    ("server.monitor", "QGSRV_SERVER_MONITOR", "amqp"),
    ("server.default_project", "QGIS_PROJECT_FILE", "world"),
    ("logging.level", "QGSRV_LOGGING_LEVEL", "DEBUG"),
    ("logging.qgis_info", "QGSRV_LOGGING_QGIS_INFO", "yes"),
    ("api.endpoints.landing_page", "QGSRV_API_ENDPOINTS_LANDING_PAGE", "/c"),
    ("api.endpoints.lizmap_api", "QGSRV_API_ENDPOINTS_LIZMAP", "/l"),
    ("api.endpoints.own", "", "/own"),
    ("api.enabled.landing_page", "QGSRV_API_ENABLED_LANDING_PAGE", "yes"),
    ("api.enabled.lizmap_api", "QGSRV_API_ENABLED_LIZMAP", "yes"),
    ("api.enabled.own", "", "yes"),
    ("api:landing_page.QGIS_SERVER_LANDING_PAGE_PREFIX", "", "/c"),
    ("api:own.KEY", "", "x"),
    ("projects.cache.size", "QGSRV_CACHE_SIZE", "11"),
    ("projects.cache.rootdir", "QGSRV_CACHE_ROOTDIR", "/data"),
    ("projects.cache.strict_check", "QGSRV_CACHE_STRICT_CHECK", "no"),
    ("projects.cache.insecure", "QGSRV_CACHE_INSECURE", "yes"),
    ("projects.cache.preload_config", "QGSRV_CACHE_PRELOAD_CONFIG", "/f"),
    ("projects.cache.trust_layer_metadata", "QGSRV_TRUST_LAYER_METADATA", "yes"),
    ("projects.cache.trust_layer_metadata", "QGIS_SERVER_TRUST_LAYER_METADATA", "1"),
    ("projects.cache.disable_getprint", "QGSRV_DISABLE_GETPRINT", "yes"),
    ("projects.cache.disable_getprint", "QGIS_SERVER_DISABLE_GETPRINT", "true"),
    ("projects.cache.disable_owsurls", "QGSRV_CACHE_DISABLE_OWSURLS", "yes"),
    ("projects.cache.force_etag", "QGSRV_CACHE_FORCE_ETAG", "yes"),
    ("projects.cache.default_handler", "QGSRV_CACHE_DEFAULT_HANDLER", "postgres"),
    ("projects.cache.allow_storage_schemes", "QGSRV_CACHE_ALLOW_STORAGE_SCHEMES", "*"),
    ("projects.cache.check_interval", "QGSRV_CACHE_CHECK_INTERVAL", "60"),
    ("projects.cache.observers", "QGSRV_CACHE_OBSERVERS", "ban"),
    ("projects.cache.advanced_report", "QGSRV_CACHE_ADVANCED_REPORT", "yes"),
    ("projects.cache.force_readonly_layers", "QGIS_SERVER_FORCE_READONLY_LAYERS", "no"),
    ("projects.cache.has_observers", "", "yes"),
    ("projects.schemes.store", "QGSRV_PROJECTS_SCHEMES_STORE", "file:///store/"),
    ("zmq.identity", "QGSRV_ZMQ_IDENTITY", "x"),
    ("zmq.maxqueue", "QGSRV_ZMQ_MAXQUEUE", "5"),
    ("zmq.timeout", "QGSRV_ZMQ_TIMEOUT", "100"),
    ("zmq.hostaddr", "QGSRV_ZMQ_HOSTADDR", "*"),
    ("zmq.bindaddr", "QGSRV_ZMQ_INADDR", "tcp://*:18080"),
    ("zmq.broadcastaddr", "QGSRV_ZMQ_BROADCASTADDR", "tcp://*:18090"),
    ("zmq.cache_observer_addr", "QGSRV_ZMQ_CACHEOBSERVERADDR", "tcp://*:18091"),
    ("zmq.ipcpath", "", "/tmp"),
    ("zmq.supervisor_addr", "QGSRV_ZMQ_SUPERVISOR_ADDR", "tcp://*:18092"),
    ("monitor:amqp.routing_key", "AMQP_ROUTING", "x"),
    ("monitor:amqp.default_routing_key", "", "x"),
    ("monitor:amqp.host", "AMQP_HOST", "h"),
    ("monitor:amqp.user", "AMQP_USER", "u"),
    ("monitor:amqp.vhost", "AMQP_VHOST", "v"),
    ("monitor:amqp.port", "AMQP_PORT", "1"),
    ("monitor:amqp.exchange", "AMQP_EXCHANGE", "e"),
    ("monitor:amqp.reconnect_delay", "AMQP_RECONNECT_DELAY", "6"),
    ("management.enabled", "QGSRV_MANAGEMENT_ENABLED", "yes"),
    ("management.interfaces", "QGSRV_MANAGEMENT_INTERFACES", "::1"),
    ("management.port", "QGSRV_MANAGEMENT_PORT", "1"),
    ("management.ssl", "QGSRV_MANAGEMENT_SSL", "yes"),
    ("management.ssl_cert", "QGSRV_MANAGEMENT_SSL_CERT", "/c"),
    ("management.ssl_key", "QGSRV_MANAGEMENT_SSL_KEY", "/k"),
    ("metadata.title", "", "t"),
    ("metadata.description", "", "d"),
    ("metadata.terms_of_service", "", "t"),
    ("metadata.contact_name", "", "n"),
    ("metadata.contact_address", "", "a"),
    ("metadata.contact_email", "", "e"),
    ("metadata.contact_url", "", "u"),
    ("metadata.licence_name", "", "n"),
    ("metadata.licence_url", "", "u"),
    ("metadata.external_doc_description", "", "d"),
    ("metadata.external_doc_url", "", "u"),
    ("cache.observers:ban.server_address", "QGSRV_CACHE_OBSERVERS_BAN_SERVER_ADDRESS", "http://varnish"),
];

#[test]
fn management_is_off_and_on_loopback_unless_the_operator_says_otherwise() {
    let with = |lines: &[&str]| {
        let sets = lines.iter().flat_map(|line| ["--set", line]);
        let args: Vec<_> = ["--proxy"].into_iter().chain(sets).collect();
        server(&args, &env(&[]))
    };
    let run = |lines: &[&str]| match with(lines) {
        Ok(Action::Run(config, warnings)) => (config.management, warnings.join("\n")),
        other => panic!("{other:?}"),
    };
    assert_eq!(run(&[]).0, None);
    let (management, warnings) = run(&["management.enabled=yes"]);
    let management = management.expect("it is enabled");
    assert!(management.interfaces.iter().all(|it| it.is_loopback()));
    assert!(!warnings.contains("management"), "{warnings}");
    let (_, warnings) = run(&["management.enabled=yes", "management.interfaces=0.0.0.0"]);
    assert!(warnings.contains("management.interfaces: whoever reaches 0.0.0.0"));
    for (lines, named) in [
        (
            &["management.enabled=yes", "management.ssl=yes"][..],
            "management.ssl_cert: is required with management.ssl",
        ),
        (
            &["logging.otlp_endpoint=collector:4318"],
            "logging.otlp_endpoint: expected http://",
        ),
    ] {
        let exit = with(lines).expect_err(named);
        assert!(exit.message.contains(named), "{}", exit.message);
    }
}
