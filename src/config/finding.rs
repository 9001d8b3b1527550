//! Where projects are: what the operator's names for places stand for.
//!
//! Pure: nothing is opened or asked here. `worker/src/routes.rs` applies it to what a
//! client calls a project.

use std::collections::BTreeMap;
use std::time::Duration;

use regex::Regex;

use super::layers::{Entry, Origin, Settings};
use crate::protocol::{FILE, alias};

/// How projects are found, and which storages may be asked.
#[derive(Debug, Clone, PartialEq)]
pub struct Finding {
    /// Scheme of a MAP that has none.
    pub default_scheme: String,
    /// Schemes that a MAP may lead to; `*` is any.
    pub allowed: Vec<String>,
    /// What the operator's schemes stand for.
    pub schemes: BTreeMap<String, Base>,
    /// Routes in their order, and what they lead to.
    pub search_paths: Vec<(String, Base)>,
    pub handlers: BTreeMap<String, Handler>,
    /// For a storage to say in which state a project is.
    pub timeout: Duration,
    pub s3: S3,
}

/// What stands before the client's part of a name. Path and query may have templates.
#[derive(Clone, PartialEq, Eq)]
pub struct Base {
    /// In lower case; `postgres` is `postgresql`.
    pub scheme: String,
    /// User, password, host and port, or a bucket.
    pub authority: String,
    /// Of files it may be relative to the root directory.
    pub path: String,
    /// Without the question mark.
    pub query: String,
}

/// What stands between two slashes of a route.
#[derive(Debug, Clone)]
pub enum Part {
    Fixed(String),
    Variable {
        name: String,
        /// For the whole part; None: anything.
        pattern: Option<Regex>,
    },
}

/// A class of the operator's that reads projects.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Handler {
    /// `package.module.Class`
    pub import: String,
    pub config: BTreeMap<String, String>,
}

/// Where objects are, and who we are there.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct S3 {
    /// `https://host:port`; None is Amazon's.
    pub endpoint: Option<String>,
    pub region: String,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    /// The bucket is the first part of the path, and not of the host.
    pub path_style: bool,
}

/// What no log shows.
#[derive(Clone, PartialEq)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("***")
    }
}

/// Values may be passwords.
impl std::fmt::Debug for Handler {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {:?}", self.import, self.config.keys())
    }
}

/// User and password are in the authority, or in the query.
impl std::fmt::Debug for Base {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}://***{}", self.scheme, self.path)
    }
}

impl Default for Finding {
    fn default() -> Self {
        Self {
            default_scheme: FILE.into(),
            allowed: vec![FILE.into()],
            schemes: BTreeMap::new(),
            search_paths: Vec::new(),
            handlers: BTreeMap::new(),
            timeout: Duration::from_secs(5),
            s3: S3 {
                region: "us-east-1".into(),
                path_style: true,
                ..S3::default()
            },
        }
    }
}

const SCHEMES: &str = "projects.schemes.";
const SEARCH_PATHS: &str = "projects.search_paths.";
const HANDLERS: &str = "projects.handlers.";

impl Finding {
    pub(super) fn read(settings: &Settings) -> Self {
        let allowed = settings.words("projects.cache.allow_storage_schemes");
        Self {
            default_scheme: settings
                .text("projects.cache.default_handler")
                .map_or(FILE.into(), |name| alias(&name)),
            allowed: allowed.iter().map(|name| alias(name)).collect(),
            schemes: schemes(settings),
            search_paths: search_paths(settings),
            handlers: handlers(settings),
            timeout: settings.duration("projects.storage.timeout"),
            s3: S3 {
                endpoint: settings.text("projects.s3.endpoint"),
                region: settings.text("projects.s3.region").unwrap_or_default(),
                access_key_id: settings.text("projects.s3.access_key_id"),
                secret_access_key: settings.text("projects.s3.secret_access_key").map(Secret),
                path_style: settings.bool("projects.s3.path_style"),
            },
        }
    }

    /// Whether a MAP may lead there.
    pub fn allows(&self, scheme: &str) -> bool {
        self.allowed
            .iter()
            .any(|name| name == "*" || name == scheme)
    }

    /// What a MAP may begin with; None if that cannot be told.
    pub fn names(&self) -> Option<Vec<String>> {
        let any = self.allowed.iter().any(|name| name == "*");
        let own = [&self.default_scheme]
            .into_iter()
            .chain(self.schemes.keys());
        (!any).then(|| own.chain(&self.allowed).cloned().collect())
    }
}

/// What is wrong with the names, by setting.
pub(super) fn mistakes(settings: &Settings) -> Vec<(String, String)> {
    let bases = [SCHEMES, SEARCH_PATHS].into_iter().flat_map(|prefix| {
        let members = settings.members(prefix);
        members.filter_map(move |(key, entry)| {
            let wrong = Base::parse(&entry.text).err().or_else(|| {
                let is_path = prefix == SEARCH_PATHS;
                is_path.then(|| route(key).err()).flatten()
            })?;
            Some((format!("{prefix}{key}"), wrong))
        })
    });
    let handlers = settings.members(HANDLERS).filter_map(|(key, entry)| {
        let (_, option) = key.split_once('.')?;
        let wrong = match option {
            "handler" if entry.text.contains('.') => return None,
            "handler" => format!("expected package.module.Class, found {:?}", entry.text),
            _ if option.starts_with("config.") => return None,
            _ => "expected handler or config.<key>".into(),
        };
        Some((format!("{HANDLERS}{key}"), wrong))
    });
    bases.chain(handlers).collect()
}

/// Places that exist only on paper.
pub(super) fn warnings(finding: &Finding) -> Vec<String> {
    let schemes = finding.schemes.iter();
    let schemes = schemes.map(|(name, base)| (SCHEMES, name, base));
    let routes = finding.search_paths.iter();
    let routes = routes.map(|(route, base)| (SEARCH_PATHS, route, base));
    schemes
        .chain(routes)
        .filter(|(_, _, base)| !finding.allows(&base.scheme))
        .map(|(prefix, name, base)| {
            let scheme = &base.scheme;
            format!("{prefix}{name} leads to {scheme}, which projects.cache.allow_storage_schemes does not allow: nothing is found there")
        })
        .collect()
}

fn schemes(settings: &Settings) -> BTreeMap<String, Base> {
    let members = settings.members(SCHEMES);
    let base = |(name, entry): (&str, &Entry)| Some((alias(name), Base::parse(&entry.text).ok()?));
    members.filter_map(base).collect()
}

/// In the order of the file, because the first one that matches wins. Those from
/// elsewhere have no order but their names', and come first.
fn search_paths(settings: &Settings) -> Vec<(String, Base)> {
    let mut members: Vec<_> = settings.members(SEARCH_PATHS).collect();
    members.sort_by_key(|(_, entry)| match &entry.origin {
        Origin::File { line, .. } => *line,
        _ => 0,
    });
    let base =
        |(route, entry): (&str, &Entry)| Some((route.to_owned(), Base::parse(&entry.text).ok()?));
    members.into_iter().filter_map(base).collect()
}

fn handlers(settings: &Settings) -> BTreeMap<String, Handler> {
    let mut all = BTreeMap::<String, Handler>::new();
    for (key, entry) in settings.members(HANDLERS) {
        let Some((name, option)) = key.split_once('.') else {
            continue;
        };
        let handler = all.entry(alias(name)).or_default();
        match option.strip_prefix("config.") {
            Some(option) => drop(handler.config.insert(option.into(), entry.text.clone())),
            None => handler.import = entry.text.clone(),
        }
    }
    all.retain(|_, handler| !handler.import.is_empty());
    all
}

/// `/static/part/{variable}/{variable:pattern}`
pub fn route(text: &str) -> Result<Vec<Part>, String> {
    let parts = text.split('/').filter(|part| !part.is_empty());
    let parts: Option<Vec<Part>> = parts.map(Part::parse).collect();
    parts.filter(|_| text.starts_with('/')).ok_or_else(|| {
        format!("expected a route such as /public, /{{user}}/{{theme}} or /{{user:[a-z]+}}, found {text:?}")
    })
}

impl Part {
    fn parse(text: &str) -> Option<Self> {
        let Some(variable) = text.strip_prefix('{') else {
            let is_fixed = text != ".." && !text.contains(['{', '}']);
            return is_fixed.then(|| Self::Fixed(text.into()));
        };
        let variable = variable.strip_suffix('}')?;
        let (name, pattern) = match variable.split_once(':') {
            Some((name, pattern)) => (name, Some(whole(pattern)?)),
            None => (variable, None),
        };
        let name = is_name(name).then(|| name.to_owned())?;
        Some(Self::Variable { name, pattern })
    }
}

/// As a pattern for all of a part: one that fits in the middle would let others in.
fn whole(pattern: &str) -> Option<Regex> {
    // Alone first: it might close the parenthesis.
    Regex::new(pattern).ok()?;
    Regex::new(&format!("^(?:{pattern})$")).ok()
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl Base {
    /// `scheme://authority/path?query`, or an absolute path.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let is_scheme = |name: &str| {
            !name.is_empty()
                && name
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b"+-._".contains(&b))
        };
        let (name, rest) = match text.split_once(':') {
            _ if text.starts_with('/') => (FILE, text),
            Some((name, rest)) if is_scheme(name) => (name, rest),
            _ => return Err("expected an absolute directory or scheme://…".into()),
        };
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, path) = match rest.strip_prefix("//").filter(|_| text != rest) {
            Some(rest) => rest.split_at(rest.find('/').unwrap_or(rest.len())),
            None => ("", rest),
        };
        let base = Self {
            scheme: alias(name),
            authority: authority.into(),
            path: path.into(),
            query: query.into(),
        };
        base.check().map(|()| base)
    }

    /// User and password, as they stand before the host.
    pub fn credentials(&self) -> (&str, Option<&str>) {
        let userinfo = self
            .authority
            .rsplit_once('@')
            .map_or("", |(userinfo, _)| userinfo);
        match userinfo.split_once(':') {
            Some((user, password)) => (user, Some(password)),
            None => (userinfo, None),
        }
    }

    /// Host and port.
    pub fn host(&self) -> &str {
        self.authority
            .rsplit_once('@')
            .map_or(&self.authority, |(_, host)| host)
    }

    /// A host that a client could name would be asked whatever it is.
    fn check(&self) -> Result<(), String> {
        if self.authority.contains(['{', '}']) {
            return Err("a host or bucket cannot be a variable".into());
        }
        let hosts = [
            "host", "hostaddr", "port", "user", "password", "passfile", "service", "authcfg",
        ];
        for pair in self.query.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            if hosts.contains(&key) && value.contains('{') {
                return Err(format!("{key} cannot be a variable"));
            }
            if key == "password" && self.scheme == "postgresql" {
                return Err(
                    "expected the password before the host, or in libpq's service or password file"
                        .into(),
                );
            }
        }
        match self.scheme.as_str() {
            FILE if !self.authority.is_empty() => Err("expected file:///…".into()),
            FILE if self.path.split('/').any(|part| part == "..") => Err("climbs".into()),
            "s3" if self.authority.is_empty() => Err("expected s3://bucket/…".into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::layers::{Given, merge};
    use super::*;

    fn finding(lines: &[(&str, &str)]) -> (Finding, Vec<String>) {
        let given = |(line, (name, text)): (usize, &(&str, &str))| Given {
            name: name.to_string(),
            text: text.to_string(),
            origin: Origin::file("q.conf", line + 1),
        };
        let lines = lines.iter().enumerate().map(given).collect();
        let merged = merge(&BTreeMap::new(), lines, vec![]);
        assert_eq!(merged.mistakes, []);
        let wrong = mistakes(&merged.settings);
        let wrong = wrong
            .into_iter()
            .map(|(name, what)| format!("{name}: {what}"));
        (Finding::read(&merged.settings), wrong.collect())
    }

    #[test]
    fn search_paths_keep_the_order_of_the_file() {
        let (finding, wrong) = finding(&[
            ("projects.search_paths./z", "/srv/z"),
            (
                "projects.search_paths./{user}/{theme}",
                "/srv/{user}/{theme}",
            ),
            ("projects.search_paths./a", "file:///srv/a/"),
            (r"projects.search_paths./{n:[a-z.]{2,3}}", "/srv/{n}"),
        ]);
        assert!(wrong.is_empty(), "{wrong:?}");
        let routes: Vec<_> = finding
            .search_paths
            .iter()
            .map(|(route, _)| route.as_str())
            .collect();
        assert_eq!(routes, ["/z", "/{user}/{theme}", "/a", "/{n:[a-z.]{2,3}}"]);
        assert_eq!(finding.search_paths[0].1.scheme, FILE);
    }

    #[test]
    fn a_scheme_is_a_scheme_however_it_is_written() {
        let (finding, wrong) = finding(&[
            (
                "projects.schemes.My-Maps",
                "postgres://maps@db/?dbname=maps",
            ),
            ("projects.cache.allow_storage_schemes", "file, postgres"),
        ]);
        assert!(wrong.is_empty(), "{wrong:?}");
        let base = &finding.schemes["my_maps"];
        assert_eq!(
            (base.scheme.as_str(), base.authority.as_str()),
            ("postgresql", "maps@db")
        );
        assert!(finding.allows("postgresql") && !finding.allows("s3"));
        assert_eq!(warnings(&finding), [""; 0]);
        assert!(!format!("{finding:?}").contains("maps@db"));
    }

    #[test]
    fn what_a_client_must_not_choose_is_no_variable() {
        let (_, wrong) = finding(&[
            ("projects.schemes.a", "postgresql://{path}/?dbname=x"),
            ("projects.schemes.b", "postgresql:///?service={path}"),
            ("projects.schemes.c", "s3:///x"),
            ("projects.schemes.d", "file:a/../../b"),
            ("projects.schemes.f", "file://host/b"),
            ("projects.schemes.g", "postgresql://db/?password=hush"),
            ("projects.schemes.e", "nonsense"),
            ("projects.search_paths.x", "/srv"),
            ("projects.search_paths./{a b}", "/srv"),
            ("projects.search_paths./{a:[}", "/srv"),
            ("projects.search_paths./{a:x)|(y}", "/srv"),
            ("projects.search_paths./{a:b/c}", "/srv"),
            ("projects.search_paths./{:b}", "/srv"),
            ("projects.handlers.x.handler", "nonsense"),
            ("projects.handlers.x.other", "y"),
        ]);
        assert_eq!(wrong.len(), 15, "{wrong:?}");
        assert!(!wrong.concat().contains("hush"));
    }

    #[test]
    fn what_leads_to_a_forbidden_scheme_is_named() {
        let (finding, _) = finding(&[("projects.schemes.pg", "postgresql:///?service=x")]);
        let warnings = warnings(&finding);
        assert!(
            warnings[0].starts_with("projects.schemes.pg leads to postgresql"),
            "{warnings:?}"
        );
        assert_eq!(finding.names().unwrap(), ["file", "pg", "file"]);
    }

    #[test]
    fn a_handler_has_its_class_and_its_options() {
        let (finding, wrong) = finding(&[
            ("projects.handlers.own.handler", "own.storage.Maps"),
            ("projects.handlers.own.config.password", "hush"),
        ]);
        assert!(wrong.is_empty(), "{wrong:?}");
        let handler = &finding.handlers["own"];
        assert_eq!(handler.import, "own.storage.Maps");
        assert_eq!(handler.config["password"], "hush");
        assert!(!format!("{finding:?}").contains("hush"));
    }
}
