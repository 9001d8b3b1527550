//! Default < environment < file < command line: which text wins, and where it came from.
//!
//! Nothing here stops at the first mistake. A wrong text is noted with its
//! origin and its default takes its place, so that the rest can be looked at, too.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::keys::{self, FAMILIES, SETTINGS, State};
use super::kind::{Kind, Value};

/// How deep settings may refer to each other; as in Python's configparser.
const DEPTH_MAX: usize = 10;

/// Values in this section of a file are no settings; others may refer to them.
const VARIABLES: &str = "DEFAULT";

/// Variables of container images that look like settings.
const FOREIGN: [&str; 3] = ["QGSRV_USER", "QGSRV_DISPLAY_XVFB", "QGSRV_XVFB_ARGS"];

/// Variables of py-qgis-server that look like no setting, and what they are for.
const MISSED: [(&str, &str); 4] = [
    ("QGSRV_MONITOR_TAG_", "a label of messages to a monitor"),
    ("AMQP_GLOBAL_TAG_", "a label of messages to a monitor"),
    ("AMQPPASSFILE", "the password of a monitor"),
    ("PY_QGIS_SERVER_REQUEST_LOG", "a log of requests for tests"),
];

/// What has such a word in its name, a setting or a parameter of a request, has a value
/// that is nobody's business.
pub const SECRET_WORDS: [&str; 9] = [
    "passw",
    "pwd",
    "token",
    "secret",
    "apikey",
    "api_key",
    "api-key",
    "signature",
    "credential",
];

/// The environment, as the caller wants us to see it.
pub type Environment = BTreeMap<String, String>;

/// Where a text came from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    Default,
    Environment(String),
    /// Line 0 is the file as a whole.
    File {
        path: PathBuf,
        line: usize,
    },
    /// As the user typed it: `--port`, `--set server.port`.
    Flag(String),
}

/// What one layer says about one setting.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Given {
    /// As written there; perhaps an older name, perhaps no name at all.
    pub name: String,
    pub text: String,
    pub origin: Origin,
}

/// Something that must be corrected before we run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    pub origin: Origin,
    /// The setting; empty when the mistake is about none.
    pub name: String,
    pub what: String,
}

/// One setting after all layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    /// With all references replaced.
    pub text: String,
    pub value: Value,
    pub origin: Origin,
}

/// Every row of the table and every member of a family that was given.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings(pub BTreeMap<String, Entry>);

/// All layers together.
#[derive(Debug, Clone, PartialEq)]
pub struct Merged {
    pub settings: Settings,
    pub mistakes: Vec<Mistake>,
    pub warnings: Vec<String>,
}

/// Puts the layers on top of each other.
pub fn merge(env: &Environment, file: Vec<Given>, flags: Vec<Given>) -> Merged {
    let mut texts = Texts::defaults();
    let mut mistakes = Vec::new();
    for given in from_environment(env) {
        texts.set(given, &mut mistakes);
    }
    mistakes.extend(twice(&file));
    for given in file.into_iter().chain(flags) {
        texts.set(given, &mut mistakes);
    }
    let settings = texts.into_settings(&mut mistakes);
    let mut warnings = strangers(env);
    warnings.extend(missing(env));
    warnings.extend(without_effect(&settings));
    Merged {
        settings,
        mistakes,
        warnings,
    }
}

impl Settings {
    /// # Panics
    /// When no row of the table has this name.
    pub fn entry(&self, name: &str) -> &Entry {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("{name} is a row of the table"))
    }

    /// Name, text and origin of each.
    pub fn texts(self) -> impl Iterator<Item = (String, String, Origin)> {
        let all = self.0.into_iter();
        all.map(|(name, entry)| (name, entry.text, entry.origin))
    }

    /// The given members of a family: their keys and texts.
    pub fn members<'a>(&'a self, prefix: &'a str) -> impl Iterator<Item = (&'a str, &'a Entry)> {
        let all = self.0.iter();
        all.filter_map(move |(name, entry)| Some((name.strip_prefix(prefix)?, entry)))
    }
}

impl Entry {
    /// None unless `text` is what the setting `name` accepts.
    pub fn understood(name: &str, text: String, origin: Origin) -> Option<Self> {
        Some(Self {
            value: kind(name)?.parse(&text)?,
            text,
            origin,
        })
    }
}

impl Origin {
    pub fn file(path: impl Into<PathBuf>, line: usize) -> Self {
        Self::File {
            path: path.into(),
            line,
        }
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => write!(f, "default"),
            Self::Environment(variable) => write!(f, "environment {variable}"),
            Self::File { path, line: 0 } => write!(f, "{}", path.display()),
            Self::File { path, line } => write!(f, "{}:{line}", path.display()),
            Self::Flag(flag) => write!(f, "{flag}"),
        }
    }
}

impl Mistake {
    pub fn new(origin: &Origin, name: &str, what: impl Into<String>) -> Self {
        Self {
            origin: origin.clone(),
            name: name.into(),
            what: what.into(),
        }
    }

    fn unexpected(origin: &Origin, name: &str, kind: Kind, text: &str) -> Self {
        let what = format!(
            "expected {}, found {:?}",
            kind.expected(),
            shown(name, text)
        );
        Self::new(origin, name, what)
    }

    /// The command line is to blame, not the configuration.
    pub fn is_usage(&self) -> bool {
        matches!(self.origin, Origin::Flag(_))
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.origin {
            Origin::Default => {}
            Origin::Environment(variable) => write!(f, "{variable}: ")?,
            origin => write!(f, "{origin}: ")?,
        }
        if !self.name.is_empty() {
            write!(f, "{}: ", self.name)?;
        }
        write!(f, "{}", self.what)
    }
}

/// `text` as others may see it: without passwords.
pub fn shown(name: &str, text: &str) -> String {
    let (_, key) = keys::split(name);
    if kind(name) == Some(Kind::Secret) || is_secret(key) {
        return if text.is_empty() {
            String::new()
        } else {
            "***".into()
        };
    }
    without_secrets(text)
}

/// By its name.
fn is_secret(key: &str) -> bool {
    let key = key.to_ascii_lowercase();
    SECRET_WORDS.iter().any(|word| key.contains(word))
}

/// A URI without its passwords.
pub fn without_secrets(text: &str) -> String {
    without_password(&without_userinfo(text))
}

/// `…?password=hush&…` loses it, too.
fn without_password(text: &str) -> String {
    let Some((before, query)) = text.split_once('?') else {
        return text.into();
    };
    let pairs = query.split('&').map(|pair| match pair.split_once('=') {
        Some((key, _)) if is_secret(key) => format!("{key}=***"),
        _ => pair.into(),
    });
    format!("{before}?{}", pairs.collect::<Vec<_>>().join("&"))
}

/// `scheme://user:password@host` loses its password.
fn without_userinfo(text: &str) -> String {
    let Some((scheme, rest)) = text.split_once("://") else {
        return text.into();
    };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority
        .rsplit_once('@')
        .and_then(|(userinfo, _)| userinfo.split_once(':'))
    {
        Some((user, password)) => {
            let after = &rest[user.len() + 1 + password.len()..];
            format!("{scheme}://{user}:***{after}")
        }
        None => text.into(),
    }
}

/// What the environment says, in the order of the table.
fn from_environment(env: &Environment) -> Vec<Given> {
    let given = |name: &str, variable: String, text: &String| Given {
        name: name.into(),
        text: text.clone(),
        origin: Origin::Environment(variable),
    };
    // An empty variable is one that is not set: that is how containers unset them.
    let is_set = |variable: &String| env.get(variable).filter(|text| !text.trim().is_empty());
    let rows = SETTINGS.iter().filter_map(|row| {
        row.variables()
            .find_map(|variable| is_set(&variable).map(|text| given(row.name, variable, text)))
    });
    let members = env
        .keys()
        .filter(|variable| row_of(variable).is_none())
        .filter_map(|variable| {
            let name = member_of(variable)?;
            is_set(variable).map(|text| given(&name, variable.clone(), text))
        });
    rows.chain(members).collect()
}

fn row_of(variable: &str) -> Option<&'static str> {
    let row = SETTINGS
        .iter()
        .find(|row| row.variables().any(|name| name == variable))?;
    Some(row.name)
}

/// The member of a family that a variable sets: `QGSRV_METADATA_TITLE` sets `metadata.title`.
fn member_of(variable: &str) -> Option<String> {
    FAMILIES.iter().find_map(|family| {
        let key = variable.strip_prefix(family.env_prefix?)?;
        (!key.is_empty()).then(|| format!("{}{}", family.prefix, key.to_ascii_lowercase()))
    })
}

/// Variables that look like settings and are none.
fn strangers(env: &Environment) -> Vec<String> {
    let is_foreign = |name: &str| FOREIGN.iter().any(|foreign| name.starts_with(foreign));
    let known: Vec<String> = SETTINGS.iter().flat_map(|row| row.variables()).collect();
    env.keys()
        .filter(|name| name.starts_with("QGSRV_") && !is_foreign(name) && missed(name).is_none())
        .filter(|name| row_of(name).is_none() && member_of(name).is_none())
        .map(|name| {
            let meant = did_you_mean(name, known.iter().map(String::as_str));
            format!("{name} is no variable of ours and is ignored{meant}")
        })
        .collect()
}

/// Variables that another server knows and this one does not, not yet.
fn missing(env: &Environment) -> impl Iterator<Item = String> {
    env.keys().filter_map(|name| {
        let what = missed(name)?;
        Some(format!("{name} ({what}) is not implemented yet"))
    })
}

fn missed(name: &str) -> Option<&'static str> {
    let row = MISSED.iter().find(|(start, _)| name.starts_with(start));
    row.map(|(_, what)| *what)
}

/// Settings that somebody turned on in vain.
fn without_effect(settings: &Settings) -> Vec<String> {
    let is_given = |entry: &Entry| entry.origin != Origin::Default && !entry.value.is_off();
    let given = settings.0.iter().filter(|(_, entry)| is_given(entry));
    given
        .filter_map(|(name, entry)| match state(name) {
            State::Ready => None,
            State::Later => Some(format!(
                "{name} ({}) is accepted but not implemented yet",
                entry.origin
            )),
            State::Moot(why) => Some(format!("{name} ({}) has no effect: {why}", entry.origin)),
        })
        .collect()
}

/// Second mentions within one file; only the last could count, and nobody means that.
fn twice(file: &[Given]) -> Vec<Mistake> {
    let mut first = BTreeMap::new();
    let mut mistakes = Vec::new();
    for given in file {
        let name = present_name(&given.name);
        match first.get(name) {
            None => drop(first.insert(name, &given.origin)),
            Some(origin) => {
                mistakes.push(Mistake::new(
                    &given.origin,
                    &given.name,
                    format!("set twice, first in {origin}"),
                ));
            }
        }
    }
    mistakes
}

fn present_name(name: &str) -> &str {
    keys::setting(name).map_or(name, |row| row.name)
}

fn kind(name: &str) -> Option<Kind> {
    let row = keys::setting(name).map(|row| row.kind);
    row.or_else(|| keys::family(name).map(|family| family.kind))
}

fn state(name: &str) -> State {
    let row = keys::setting(name).map(|row| row.state);
    row.or_else(|| keys::family(name).map(|family| family.state))
        .unwrap_or(State::Ready)
}

fn unknown(given: &Given) -> Mistake {
    if !given.name.contains('.') {
        return Mistake::new(&given.origin, &given.name, "stands in no section");
    }
    let known = SETTINGS.iter().map(|row| row.name);
    let meant = did_you_mean(&given.name, known);
    Mistake::new(
        &given.origin,
        &given.name,
        format!("unknown setting{meant}"),
    )
}

fn did_you_mean<'a>(word: &str, known: impl Iterator<Item = &'a str>) -> String {
    let close = known
        .map(|name| (strsim::normalized_damerau_levenshtein(word, name), name))
        .filter(|(likeness, _)| *likeness > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    close.map_or_else(String::new, |(_, name)| format!("; did you mean {name}?"))
}

/// The winning texts so far, as written.
struct Texts {
    settings: BTreeMap<String, (String, Origin)>,
    variables: BTreeMap<String, String>,
}

impl Texts {
    fn defaults() -> Self {
        let row = |row: &keys::Setting| (row.name.into(), (row.default.into(), Origin::Default));
        Self {
            settings: SETTINGS.iter().map(row).collect(),
            variables: BTreeMap::new(),
        }
    }

    fn set(&mut self, given: Given, mistakes: &mut Vec<Mistake>) {
        if let Some(key) = given
            .name
            .strip_prefix(VARIABLES)
            .and_then(|key| key.strip_prefix('.'))
        {
            self.variables.insert(key.into(), given.text);
        } else if kind(&given.name).is_some() {
            self.settings
                .insert(present_name(&given.name).into(), (given.text, given.origin));
        } else {
            mistakes.push(unknown(&given));
        }
    }

    /// Replaces references and understands every text. A wrong one is replaced
    /// by its default and everything is read again, because others may refer
    /// to it; what is wrong only because of that is not reported a second time.
    fn into_settings(mut self, mistakes: &mut Vec<Mistake>) -> Settings {
        let is_given = |mistake: &&Mistake| mistake.origin != Origin::Default;
        let (mut entries, mut wrong) = self.read();
        mistakes.extend(wrong.iter().filter(is_given).cloned());
        while wrong.iter().any(|mistake| is_given(&mistake)) {
            wrong.iter().for_each(|mistake| self.reset(&mistake.name));
            (entries, wrong) = self.read();
        }
        // What is left are defaults spoilt by texts that are right where they stand.
        let (mut pristine, _) = Self::defaults().read();
        for mistake in wrong {
            entries.extend(pristine.remove_entry(&mistake.name));
            mistakes.push(mistake);
        }
        Settings(entries)
    }

    fn reset(&mut self, name: &str) {
        match keys::setting(name) {
            Some(row) => drop(
                self.settings
                    .insert(name.into(), (row.default.into(), Origin::Default)),
            ),
            None => drop(self.settings.remove(name)),
        }
    }

    fn read(&self) -> (BTreeMap<String, Entry>, Vec<Mistake>) {
        let mut mistakes = Vec::new();
        let mut entries = BTreeMap::new();
        for (name, (text, origin)) in &self.settings {
            match self.entry(name, text, origin) {
                Ok(entry) => drop(entries.insert(name.clone(), entry)),
                Err(mistake) => mistakes.push(mistake),
            }
        }
        (entries, mistakes)
    }

    fn entry(&self, name: &str, text: &str, origin: &Origin) -> Result<Entry, Mistake> {
        let kind = kind(name).expect("only known settings are set");
        let text = self
            .expand(name, text, 0)
            .map_err(|what| Mistake::new(origin, name, what))?;
        match kind.parse(&text) {
            Some(value) => Ok(Entry {
                value,
                origin: origin.clone(),
                text,
            }),
            None => Err(Mistake::unexpected(origin, name, kind, &text)),
        }
    }

    /// `${section:key}`, `${key}` of the same section, and `$$` for a dollar.
    fn expand(&self, name: &str, text: &str, depth: usize) -> Result<String, String> {
        if depth > DEPTH_MAX {
            return Err("refers to itself".into());
        }
        let Some((before, after)) = text.split_once('$') else {
            return Ok(text.into());
        };
        let (piece, rest) = if let Some(rest) = after.strip_prefix('$') {
            ("$".to_owned(), rest)
        } else if let Some(reference) = after.strip_prefix('{') {
            let (reference, rest) = reference.split_once('}').ok_or("${ without }")?;
            (self.refer(name, reference, depth)?, rest)
        } else {
            ("$".to_owned(), after)
        };
        Ok(format!(
            "{before}{piece}{}",
            self.expand(name, rest, depth)?
        ))
    }

    fn refer(&self, name: &str, reference: &str, depth: usize) -> Result<String, String> {
        let (section, key) = reference
            .rsplit_once(':')
            .unwrap_or((keys::split(name).0, reference));
        let target = format!("{section}.{key}");
        let target = present_name(&target);
        let text = self.settings.get(target).map(|(text, _)| text);
        let text = text.or_else(|| self.variables.get(key));
        let text = text.ok_or_else(|| format!("${{{reference}}} names no setting"))?;
        self.expand(target, text, depth + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn env(pairs: &[(&str, &str)]) -> Environment {
        pairs
            .iter()
            .map(|(name, text)| (name.to_string(), text.to_string()))
            .collect()
    }

    fn file(lines: &[(&str, &str)]) -> Vec<Given> {
        let line = |(i, (name, text)): (usize, &(&str, &str))| Given {
            name: name.to_string(),
            text: text.to_string(),
            origin: Origin::file("q.conf", i + 1),
        };
        lines.iter().enumerate().map(line).collect()
    }

    fn flag(flag: &str, name: &str, text: &str) -> Vec<Given> {
        vec![Given {
            name: name.into(),
            text: text.into(),
            origin: Origin::Flag(flag.into()),
        }]
    }

    fn from_file(lines: &[(&str, &str)]) -> Merged {
        merge(&env(&[]), file(lines), vec![])
    }

    fn messages(merged: &Merged) -> Vec<String> {
        merged.mistakes.iter().map(Mistake::to_string).collect()
    }

    #[test]
    fn every_default_is_of_its_kind() {
        let merged = from_file(&[]);
        assert_eq!(messages(&merged), [""; 0]);
        assert_eq!(merged.settings.0.len(), SETTINGS.len());
    }

    #[test]
    fn the_later_layer_wins_and_is_remembered() {
        let environment = env(&[
            ("QGSRV_SERVER_HTTP_PORT", "1"),
            ("QGSRV_SERVER_WORKERS", "11"),
        ]);
        let in_file = file(&[
            ("server.port", "2"),
            ("server.workers", "12"),
            ("zmq.maxqueue", "5"),
        ]);
        let merged = merge(&environment, in_file, flag("--port", "server.port", "3"));
        let get = |name| {
            let entry = merged.settings.entry(name);
            (entry.text.as_str(), entry.origin.to_string())
        };
        assert_eq!(get("server.port"), ("3", "--port".into()));
        assert_eq!(get("server.workers"), ("12", "q.conf:2".into()));
        assert_eq!(get("zmq.maxqueue"), ("5", "q.conf:3".into()));
        assert_eq!(get("server.timeout"), ("20", "default".into()));
        let merged = merge(&environment, vec![], vec![]);
        let entry = merged.settings.entry("server.port");
        assert_eq!(
            entry.origin.to_string(),
            "environment QGSRV_SERVER_HTTP_PORT"
        );
    }

    #[test]
    fn all_mistakes_are_reported_at_once_with_their_place() {
        let merged = merge(
            &env(&[("QGSRV_SERVER_HTTP_PORT", "many")]),
            file(&[
                ("zmq.maxqueue", "lots"),
                ("server.prot", "1"),
                ("lonely", "1"),
                ("server.ssl", "maybe"),
            ]),
            flag("--workers", "server.workers", "0"),
        );
        let mut found = messages(&merged);
        found.sort();
        assert_eq!(
            found,
            [
                "--workers: server.workers: expected a count from 1 to 1024, found \"0\"",
                "QGSRV_SERVER_HTTP_PORT: server.port: expected a port, 0 to 65535, found \"many\"",
                "q.conf:1: zmq.maxqueue: expected a count, found \"lots\"",
                "q.conf:2: server.prot: unknown setting; did you mean server.port?",
                "q.conf:3: lonely: stands in no section",
                "q.conf:4: server.ssl: expected yes or no, found \"maybe\"",
            ]
        );
    }

    #[test]
    fn older_names_still_work() {
        let merged = from_file(&[
            ("cache.size", "7"),
            ("cache.rootdir", "/data"),
            ("zmq.maxqueue", "8"),
        ]);
        assert_eq!(messages(&merged), [""; 0]);
        assert_eq!(
            merged.settings.entry("projects.cache.size").value,
            Value::Count(7)
        );
        assert_eq!(
            merged.settings.entry("projects.cache.rootdir").text,
            "/data"
        );
    }

    #[test]
    fn one_setting_may_not_stand_twice_in_a_file_under_any_name() {
        let merged = from_file(&[("cache.size", "7"), ("projects.cache.size", "8")]);
        assert_eq!(
            messages(&merged),
            ["q.conf:2: projects.cache.size: set twice, first in q.conf:1"]
        );
    }

    #[test]
    fn the_first_variable_that_is_set_wins_and_an_empty_one_is_not_set() {
        let both = env(&[
            ("QGSRV_SERVER_PLUGINPATH", ""),
            ("QGIS_PLUGINPATH", "/plugins"),
        ]);
        let merged = merge(&both, vec![], vec![]);
        assert_eq!(merged.settings.entry("server.pluginpath").text, "/plugins");
        let both = env(&[
            ("QGSRV_SERVER_PLUGINPATH", "/mine"),
            ("QGIS_PLUGINPATH", "/plugins"),
        ]);
        let merged = merge(&both, vec![], vec![]);
        assert_eq!(merged.settings.entry("server.pluginpath").text, "/mine");
    }

    #[test]
    fn references_follow_the_winning_texts() {
        let merged = merge(
            &env(&[("QGSRV_ZMQ_HOSTADDR", "::1")]),
            file(&[
                ("zmq.bindaddr", "tcp://[${hostaddr}]:7000"),
                ("DEFAULT.data", "/srv"),
                ("projects.cache.rootdir", "${data}/$$1/a$b"),
            ]),
            vec![],
        );
        assert_eq!(messages(&merged), [""; 0]);
        assert_eq!(
            merged.settings.entry("zmq.bindaddr").text,
            "tcp://[::1]:7000"
        );
        assert_eq!(
            merged.settings.entry("worker.server").text,
            "tcp://[::1]:7000"
        );
        assert_eq!(
            merged.settings.entry("projects.cache.rootdir").text,
            "/srv/$1/a$b"
        );
        let listed = "api:landing_page.QGIS_SERVER_LANDING_PAGE_PROJECTS_DIRECTORIES";
        assert_eq!(merged.settings.entry(listed).text, "/srv/$1/a$b");
    }

    #[test]
    fn references_to_nothing_or_to_themselves_are_mistakes() {
        let merged = from_file(&[
            ("server.setuid", "${nobody:there}"),
            ("server.monitor", "${monitor}"),
            ("server.proxy_url", "${open"),
        ]);
        let mut found = messages(&merged);
        found.sort();
        assert_eq!(
            found,
            [
                "q.conf:1: server.setuid: ${nobody:there} names no setting",
                "q.conf:2: server.monitor: refers to itself",
                "q.conf:3: server.proxy_url: ${ without }",
            ]
        );
    }

    #[test]
    fn a_default_that_refers_to_a_mistake_is_not_blamed() {
        let merged = from_file(&[("zmq.bindaddr", "nonsense://")]);
        assert_eq!(merged.mistakes.len(), 1, "{:?}", messages(&merged));
        assert_eq!(
            merged.settings.entry("worker.server").text,
            "tcp://127.0.0.1:18080"
        );
    }

    #[test]
    fn a_default_that_refers_to_a_wrong_text_of_the_right_kind_is_reported() {
        let merged = from_file(&[("zmq.hostaddr", "two words")]);
        assert!(
            messages(&merged)[0].contains("found \"tcp://two words:18080\""),
            "{:?}",
            messages(&merged)
        );
        assert_eq!(merged.settings.0.len(), SETTINGS.len());
    }

    #[test]
    fn families_are_open_to_files_and_variables() {
        let merged = merge(
            &env(&[
                ("QGSRV_PROJECTS_SCHEMES_STORE", "file:///store/"),
                ("QGSRV_API_ENABLED_LIZMAP", "yes"),
            ]),
            file(&[
                ("api:wfs3.SOME_KEY", "x"),
                ("metadata.motto", "m"),
                ("cache.observers:ban.server_address", "s"),
            ]),
            vec![],
        );
        assert_eq!(messages(&merged), [""; 0]);
        let settings = &merged.settings;
        assert_eq!(
            settings.entry("projects.schemes.store").text,
            "file:///store/"
        );
        assert_eq!(
            settings.entry("api.enabled.lizmap_api").value,
            Value::Bool(true)
        );
        assert_eq!(
            settings
                .members("metadata.")
                .filter(|(_, e)| e.text == "m")
                .count(),
            1
        );
        assert_eq!(settings.entry("api:wfs3.SOME_KEY").text, "x");
    }

    #[test]
    fn what_has_no_effect_yet_says_so_unless_it_is_off() {
        let merged = from_file(&[
            ("server.monitor", "amqp"),
            ("server.enable_filters", "no"),
            ("server.getfeaturelimit", "-1"),
            ("zmq.broadcastaddr", "tcp://127.0.0.1:18090"),
        ]);
        assert_eq!(
            merged.warnings,
            [
                "server.monitor (q.conf:1) is accepted but not implemented yet",
                "zmq.broadcastaddr (q.conf:4) has no effect: server and worker share one connection for everything",
            ]
        );
    }

    #[test]
    fn variables_of_another_server_that_do_nothing_here_are_a_warning() {
        let names = ["AMQPPASSFILE", "AMQP_GLOBAL_TAG_A", "QGSRV_MONITOR_TAG_B"];
        let merged = merge(&env(&names.map(|name| (name, "x"))), vec![], vec![]);
        assert_eq!(
            merged.warnings,
            [
                "AMQPPASSFILE (the password of a monitor) is not implemented yet",
                "AMQP_GLOBAL_TAG_A (a label of messages to a monitor) is not implemented yet",
                "QGSRV_MONITOR_TAG_B (a label of messages to a monitor) is not implemented yet",
            ]
        );
    }

    #[test]
    fn a_misspelt_variable_is_a_warning() {
        let merged = merge(
            &env(&[("QGSRV_SERVER_WORKRES", "4"), ("QGSRV_USER", "1:1")]),
            vec![],
            vec![],
        );
        assert_eq!(
            merged.warnings,
            [
                "QGSRV_SERVER_WORKRES is no variable of ours and is ignored; did you mean QGSRV_SERVER_WORKERS?"
            ]
        );
    }

    #[test]
    fn passwords_are_not_shown() {
        assert_eq!(shown("monitor:amqp.password", "x"), "***");
        assert_eq!(
            shown("projects.schemes.pg", "postgres://me:x:y@h/db?a@b"),
            "postgres://me:***@h/db?a@b"
        );
        assert_eq!(
            shown("projects.schemes.pg", "file:///a:b@c"),
            "file:///a:b@c"
        );
        assert_eq!(
            shown(
                "projects.schemes.pg",
                "postgresql://h/?dbname=x&Password=y&schema=z"
            ),
            "postgresql://h/?dbname=x&Password=***&schema=z"
        );
        assert_eq!(shown("server.port", "80"), "80");
    }
}
