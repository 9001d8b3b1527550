//! What settings must mean together, and on this machine.
//!
//! A single text was understood before; here files are opened and addresses
//! judged, each program looking only at what it will use itself.

use std::fs;
use std::path::Path;

use nix::unistd::{AccessFlags, access};

use super::bad_layers::{self, OnBadLayers};
use super::keys::Program;
use super::kind::loopback;
use super::layers::{Mistake, Settings};
use super::{Config, Http, finding};
use crate::ogc::policy::Rule;

/// When the settings are looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    Start,
    /// The old ones are in force. A certificate that cannot be read does not keep the
    /// rest from changing: whoever loads it says so, and goes on with the old one.
    Running,
}

/// Everything that would only fail later.
pub fn mistakes(
    config: &Config,
    settings: &Settings,
    program: Program,
    moment: Moment,
) -> Vec<Mistake> {
    let is_server = program == Program::Server;
    let mut found = Found {
        settings,
        mistakes: Vec::new(),
    };
    if !(is_server && config.proxy) {
        found.note(
            "projects.cache.rootdir",
            root_directory(&config.pool.rootdir),
        );
    }
    if is_server {
        found.note("zmq.ipcpath", socket_directory(&config.broker.runtime_dir));
    }
    if let (true, Some(program)) = (is_server && !config.proxy, &config.pool.program) {
        found.note("worker.program", executable(program));
    }
    let is_start = moment == Moment::Start;
    if let (true, Some(tls)) = (is_server && is_start, &config.http.tls) {
        found.note("server.ssl_cert", readable(&tls.cert, "server.ssl"));
        found.note("server.ssl_key", readable(&tls.key, "server.ssl"));
    }
    let management = config.management.as_ref().filter(|_| is_server && is_start);
    if let Some(tls) = management.and_then(|management| management.tls.as_ref()) {
        found.note("management.ssl_cert", readable(&tls.cert, "management.ssl"));
        found.note("management.ssl_key", readable(&tls.key, "management.ssl"));
    }
    if is_server && config.proxy {
        found.note(
            "zmq.bindaddr",
            address(&settings.text("zmq.bindaddr").unwrap_or_default()),
        );
    }
    if !is_server && !config.pool.server.starts_with("ipc://") {
        found.note("worker.server", address(&config.pool.server));
    }
    let policy = settings.text("projects.cache.bad_layers");
    found.note("projects.cache.bad_layers", policy_word(policy.as_deref()));
    for text in settings.words("projects.cache.bad_layers_of") {
        let exception = bad_layers::exception(&text).map(drop);
        found.note("projects.cache.bad_layers_of", exception);
    }
    found.note("worker.memory_limit", enough(config.pool.memory_limit));
    if is_server {
        found.note("server.body_memory", room(&config.http));
        found.note("server.connections_max", turns(&config.http));
    }
    if let Some(url) = &config.http.otlp {
        found.note("logging.otlp_endpoint", collector(url));
    }
    if let Some(url) = &config.http.proxy_url {
        found.note("server.proxy_url", web_address(url));
    }
    for (name, entry) in settings.members("policies.") {
        let rule = Rule::parse(name, &entry.text).map(drop);
        found.note(&format!("policies.{name}"), rule);
    }
    for (name, path) in &config.http.apis {
        found.note(&format!("api.endpoints.{name}"), root_path(path));
    }
    for (name, _) in settings.members("api.enabled.") {
        found.note(&format!("api.enabled.{name}"), endpoint_of(name, settings));
    }
    for (name, what) in finding::mistakes(settings) {
        found.note(&name, Err(what));
    }
    if let Some(url) = &config.pool.finding.s3.endpoint {
        found.note("projects.s3.endpoint", web_address(url));
    }
    found.mistakes
}

/// The default project is a file that the root directory does not have, and nothing else
/// can lead to it.
fn is_out_of_reach(config: &Config) -> bool {
    let (pool, finding) = (&config.pool, &config.pool.finding);
    let has_other_ways = !finding.schemes.is_empty() || !finding.search_paths.is_empty();
    let project = config.http.default_project.as_deref().unwrap_or_default();
    if has_other_ways || !project.starts_with('/') || pool.rootdir.as_os_str().is_empty() {
        return false;
    }
    let really = |path: &Path| path.canonicalize().unwrap_or(path.to_owned());
    !really(Path::new(project)).starts_with(really(&pool.rootdir))
}

/// What works, but hardly as meant.
pub fn warnings(config: &Config) -> Vec<String> {
    let mut warnings = Vec::new();
    if config.http.proxy_url.is_some() && !config.http.http_proxy {
        warnings.push("server.proxy_url has no effect without server.http_proxy".into());
    }
    if is_out_of_reach(config) {
        warnings.push(
            "server.default_project is not below projects.cache.rootdir: who names no project gets 404"
                .into(),
        );
    }
    if config.pool.filters && config.http.status_page {
        warnings.push(
            "server.enable_filters: filters are not asked about /status (server.status_page), which anybody reads"
                .into(),
        );
    }
    if config.pool.plugin_manager.is_some() && config.pool.plugin_paths.is_empty() {
        warnings.push("plugins.install_mode has no effect without server.pluginpath".into());
    }
    let open = config
        .management
        .iter()
        .flat_map(|management| &management.interfaces)
        .filter(|interface| !interface.is_loopback());
    for interface in open {
        warnings.push(format!(
            "management.interfaces: whoever reaches {interface} reads /status, /plugins and /metrics"
        ));
    }
    warnings.extend(finding::warnings(&config.pool.finding));
    warnings.extend(ambiguous_projects(config));
    let s3 = &config.pool.finding.s3;
    if s3.access_key_id.is_some() != s3.secret_access_key.is_some() {
        warnings.push(
            "projects.s3: without both access_key_id and secret_access_key S3 is asked as anybody"
                .into(),
        );
    }
    if let Some(file) = &config.pool.preload_file
        && let Err(error) = fs::File::open(file)
    {
        warnings.push(format!(
            "projects.cache.preload_config: {}: {error}: nothing is opened ahead",
            file.display()
        ));
    }
    for path in config
        .pool
        .plugin_paths
        .iter()
        .filter(|path| !path.is_dir())
    {
        warnings.push(format!(
            "server.pluginpath: {} is not a directory",
            path.display()
        ));
    }
    warnings
}

/// A project that has two names passes a rule that knows one of them.
fn ambiguous_projects(config: &Config) -> Option<String> {
    let finding = &config.pool.finding;
    let is_plain = finding.schemes.is_empty() && finding.search_paths.is_empty();
    let is_ambiguous = config.http.policies.tell_projects_apart() && !is_plain;
    is_ambiguous.then(|| {
        "policies: rules about MAP go by the name that a client gives, not by where projects.schemes and projects.search_paths lead it: a project that has two names wants both in its rules".into()
    })
}

const LEAST_MEMORY: u64 = 256 << 20;

struct Found<'a> {
    settings: &'a Settings,
    mistakes: Vec<Mistake>,
}

impl Found<'_> {
    fn note(&mut self, name: &str, result: Result<(), String>) {
        if let Err(what) = result {
            self.mistakes
                .push(Mistake::new(&self.settings.entry(name).origin, name, what));
        }
    }
}

fn root_directory(path: &Path) -> Result<(), String> {
    match path.as_os_str().is_empty() {
        true => Err("is required: the absolute directory of the projects (--rootdir or QGSRV_CACHE_ROOTDIR)".into()),
        false => directory(path),
    }
}

/// The name of a socket is no longer than 107 bytes, and we add to the directory's.
fn socket_directory(path: &Path) -> Result<(), String> {
    match path.as_os_str().len() {
        ..=64 => directory(path),
        n => Err(format!(
            "expected a directory whose name has at most 64 bytes, found {n}"
        )),
    }
}

fn directory(path: &Path) -> Result<(), String> {
    match path.is_absolute() && path.is_dir() {
        true => Ok(()),
        false => Err(format!(
            "expected an absolute directory that exists, found {:?}",
            path
        )),
    }
}

/// A name without a folder is looked for in PATH when it is needed.
fn executable(program: &Path) -> Result<(), String> {
    let is_name = program.parent() == Some(Path::new(""));
    match is_name || program.is_file() && access(program, AccessFlags::X_OK).is_ok() {
        true => Ok(()),
        false => Err(format!("expected a program, found {program:?}")),
    }
}

fn readable(path: &Path, with: &str) -> Result<(), String> {
    if path.as_os_str().is_empty() {
        return Err(format!("is required with {with}: a PEM file"));
    }
    let opened = fs::File::open(path).map(drop);
    opened.map_err(|error| format!("cannot read {}: {error}", path.display()))
}

fn address(endpoint: &str) -> Result<(), String> {
    loopback(endpoint).map(drop)
}

/// A body that alone is too long for the memory would be refused for ever as one too many.
fn room(http: &Http) -> Result<(), String> {
    match http.body_memory >= http.body_max {
        true => Ok(()),
        false => Err(format!(
            "expected at least server.body_max, {} bytes, found {}",
            http.body_max, http.body_memory
        )),
    }
}

fn policy_word(word: Option<&str>) -> Result<(), String> {
    match word.map(|word| (word, OnBadLayers::parse(word))) {
        Some((word, None)) => Err(format!("expected strict, skip or retry, found {word:?}")),
        _ => Ok(()),
    }
}

/// QGIS itself takes half of that.
fn enough(memory_limit: u64) -> Result<(), String> {
    match memory_limit {
        0 | LEAST_MEMORY.. => Ok(()),
        bytes => Err(format!("expected 0 or at least 256M, found {bytes} bytes")),
    }
}

/// Each listener holds the place of the connection that it waits for.
fn turns(http: &Http) -> Result<(), String> {
    match (http.connections_max, http.interfaces.len()) {
        (max, n) if max >= n => Ok(()),
        (max, n) => Err(format!(
            "expected at least one for each of the {n} server.interfaces, found {max}"
        )),
    }
}

fn web_address(url: &str) -> Result<(), String> {
    let rest = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"));
    match rest.is_some_and(|rest| !rest.is_empty() && !rest.contains(char::is_whitespace)) {
        true => Ok(()),
        false => Err(format!("expected http://… or https://…, found {url:?}")),
    }
}

/// Spans say what clients ask, so a collector elsewhere is for a proxy of its own to reach.
fn collector(url: &str) -> Result<(), String> {
    match url.starts_with("http://") {
        true => web_address(url),
        false => Err(format!("expected http://…, found {url:?}")),
    }
}

fn root_path(path: &str) -> Result<(), String> {
    match path.starts_with('/') && path.len() > 1 {
        true => Ok(()),
        false => Err(format!("expected a path such as /catalog, found {path:?}")),
    }
}

fn endpoint_of(name: &str, settings: &Settings) -> Result<(), String> {
    match settings.0.contains_key(&format!("api.endpoints.{name}")) {
        true => Ok(()),
        false => Err(format!("needs its path: api.endpoints.{name} = /…")),
    }
}
