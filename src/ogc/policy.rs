//! Who may ask what: the operator's rules, applied to what a request means and not to
//! how it is written.
//!
//! A rule is one line: what to do, and if what.
//!
//! | rule | what it does |
//! |---|---|
//! | `allow if client=10.0.0.0/8` | lets the request pass; later rules are not asked |
//! | `deny if SERVICE=WFS` | refuses it with 403; later rules are not asked |
//! | `rewrite MAP=city DPI=96 if profile=city` | sets parameters, and later rules see them |
//! | `request-header X-Role=guest if …` | sets a header that QGIS and its plugins see; X-Forwarded-Url is the address that links begin with |
//! | `response-header Cache-Control=no-store if …` | sets a header of the reply |
//!
//! The first rule that allows or denies decides; a request that none decides about is
//! allowed, so a list of what is allowed ends with `deny`. All conditions of a rule must
//! hold: `NAME=pattern` or `NAME!=pattern`, a pattern being a regular expression for the
//! whole value. Blanks in a value want double quotes around it.
//!
//! | NAME | value |
//! |---|---|
//! | `SERVICE`, `LAYERS`, … in upper case | the parameter, decoded; case matters but in SERVICE and REQUEST |
//! | `LAYERS` | with QUERY_LAYERS, LAYER and those of the maps of a print (`MAP0:LAYERS`); unknown with SLD or SLD_BODY, which name layers, too; a group of layers, such as that of the whole project, is a name of its own |
//! | `TYPENAME` | with the types in FEATUREID, and the collection of an API |
//! | `MAP` | the name of the project below the root, without suffix; not the place that schemes and search paths lead it to, so two names of one project want two patterns; unknown for a project of the catalogue |
//! | `path` | decoded, without `/p/<profile>`, and `/ows/` for `/ows`; `/ows/wfs3` and `/ogcapi` may be read as the path of that API in the settings, too, and what the catalogue has of a project as `/ows/` or that |
//! | `profile` | of `/ows/p/<profile>/` |
//! | `method` | as QGIS sees it: HEAD and the POST of a form are GET |
//! | `client` | no pattern but networks: `10.0.0.0/8,::1` |
//! | `header:Name` | a header of the client |
//!
//! When a value may be read in two ways, each rule errs on the safe side: one that allows
//! wants every reading to match, all others are content with any. So `a,b` in LAYERS is
//! denied for `a` alone, and allowed when both are. With an XML body all parameters but
//! SERVICE and REQUEST are unknown, even if the query has them, since QGIS goes by what
//! stands below the root element: that denies and never allows.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use regex::{Regex, RegexBuilder};

use super::ows;
use crate::protocol::{CATALOG, FILE, HEAD_MAX, ProjectRef, without_suffix};

/// What a compiled pattern may take.
const PATTERN_MAX: usize = 1 << 20;

/// What the body of a POST may say in all, which is as much as a form.
const SAID_MAX: usize = HEAD_MAX / 2;

/// How far into an XML body its root element may reach.
const ROOT_MAX: usize = 64 << 10;

/// The rules of one server, in the order in which they are asked.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Policies {
    rules: Vec<Rule>,
    /// Where projects are, to know one by its absolute path; empty where such a path
    /// may lead elsewhere.
    root: PathBuf,
}

/// A rule as it was written, and what it means.
#[derive(Debug, Clone)]
pub struct Rule {
    name: String,
    text: String,
    action: Action,
    conditions: Vec<Condition>,
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.text) == (&other.name, &other.text)
    }
}

#[derive(Debug, Clone)]
enum Action {
    Allow,
    Deny,
    Rewrite(Pairs),
    RequestHeader(Pairs),
    ResponseHeader(Pairs),
}

pub type Pairs = Vec<(String, String)>;

#[derive(Debug, Clone)]
struct Condition {
    of: Of,
    negated: bool,
    pattern: Pattern,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Of {
    Path,
    Profile,
    Method,
    Client,
    Project,
    Header(String),
    Parameter(String),
}

#[derive(Debug, Clone)]
enum Pattern {
    Text(Regex),
    Networks(Vec<(IpAddr, u8)>),
}

/// What a request means, as far as rules look at it.
pub struct Subject<'a> {
    pub path: &'a str,
    /// The same in the client's own words.
    pub written: &'a str,
    pub profile: Option<&'a str>,
    pub method: &'a str,
    pub client: IpAddr,
    /// None: nobody names one, or it is no name.
    pub project: Option<ProjectRef>,
    /// All values of a header, by its lower-case name.
    pub header: &'a dyn Fn(&str) -> Vec<String>,
    pub parameters: Parameters,
}

/// Parameters by upper-case name, each with all that it may mean.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Parameters {
    values: BTreeMap<String, Vec<String>>,
    /// An XML body says more than its root element does.
    more_in_body: bool,
}

/// What the rules say about a request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Name of the rule that refuses it.
    pub denied_by: Option<String>,
    /// A rule is about this profile, so that it exists.
    pub knows_profile: bool,
    /// Parameters to set; an empty value takes one away.
    pub rewritten: Pairs,
    pub request_headers: Pairs,
    pub response_headers: Pairs,
}

/// What the body of a POST sets, as QGIS reads it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Said {
    pub pairs: Pairs,
    /// Then there is more below its root element.
    is_xml: bool,
}

/// Query and body of a request say different things, or the body says nothing that is
/// certain to be what QGIS reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unclear;

impl Policies {
    /// The rules by name. Those with a mistake are left out: whoever reads settings
    /// reports them and does not start.
    pub fn new<'a>(rules: impl Iterator<Item = (&'a str, &'a str)>, root: &Path) -> Self {
        let rules = rules.filter_map(|(name, text)| Rule::parse(name, text).ok());
        Self {
            rules: rules.collect(),
            root: root.to_owned(),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// Some rule is about profiles, so that there may be some.
    pub fn has_profiles(&self) -> bool {
        self.ask_about(|of| *of == Of::Profile)
    }

    /// Some rule is about projects.
    pub fn tell_projects_apart(&self) -> bool {
        self.ask_about(|of| *of == Of::Project)
    }

    /// What one client may ask another may not, so no answer is for both.
    pub fn tell_clients_apart(&self) -> bool {
        self.ask_about(|of| matches!(of, Of::Client | Of::Header(_)))
    }

    fn ask_about(&self, is_it: impl Fn(&Of) -> bool) -> bool {
        let mut conditions = self.rules.iter().flat_map(|rule| &rule.conditions);
        conditions.any(|condition| is_it(&condition.of))
    }

    /// Asks the rules one after the other. `project` makes of a MAP what the server
    /// would make of it.
    pub fn judge(
        &self,
        mut subject: Subject<'_>,
        project: impl Fn(Option<&str>) -> Option<ProjectRef>,
    ) -> Verdict {
        let mut rules = self.rules.iter();
        let mut verdict = Verdict {
            // Even a rule that is not reached.
            knows_profile: rules.any(|rule| rule.is_about_profile(&subject)),
            ..Verdict::default()
        };
        for rule in &self.rules {
            if !rule.holds(&subject, &self.root) {
                continue;
            }
            match &rule.action {
                Action::Allow => break,
                Action::Deny => {
                    verdict.denied_by = Some(rule.name.clone());
                    break;
                }
                Action::Rewrite(pairs) => {
                    for (name, value) in pairs {
                        subject.parameters.set(name, value);
                        if name == "MAP" {
                            subject.project = project(
                                Some(value)
                                    .filter(|map| !map.is_empty())
                                    .map(String::as_str),
                            );
                        }
                    }
                    verdict.rewritten.extend_from_slice(pairs);
                }
                Action::RequestHeader(pairs) => verdict.request_headers.extend_from_slice(pairs),
                Action::ResponseHeader(pairs) => verdict.response_headers.extend_from_slice(pairs),
            }
        }
        verdict
    }
}

impl Rule {
    /// What `text` says, or what is wrong with it.
    pub fn parse(name: &str, text: &str) -> Result<Self, String> {
        let words = words(text)?;
        let (action, rest) = words
            .split_first()
            .ok_or("expected a rule, such as: deny if SERVICE=WFS")?;
        let (arguments, conditions) = match rest.iter().position(|word| word == "if") {
            Some(at) if at + 1 < rest.len() => (&rest[..at], &rest[at + 1..]),
            Some(_) => return Err("expected a condition after \"if\"".into()),
            None => (rest, &rest[..0]),
        };
        let action = match action.as_str() {
            "allow" | "deny" if !arguments.is_empty() => {
                return Err(format!(
                    "expected \"if\" or nothing after {action:?}, found {:?}",
                    arguments[0]
                ));
            }
            "allow" => Action::Allow,
            "deny" => Action::Deny,
            "rewrite" => Action::Rewrite(pairs(arguments, parameter)?),
            "request-header" => {
                Action::RequestHeader(addressed(pairs(arguments, request_header)?)?)
            }
            "response-header" => Action::ResponseHeader(pairs(arguments, response_header)?),
            other => {
                return Err(format!(
                    "expected allow, deny, rewrite, request-header or response-header, found {other:?}"
                ));
            }
        };
        let conditions = conditions.iter().map(|word| Condition::parse(word));
        Ok(Self {
            name: name.into(),
            text: text.into(),
            action,
            conditions: conditions.collect::<Result<_, _>>()?,
        })
    }

    fn holds(&self, subject: &Subject<'_>, root: &Path) -> bool {
        let allows = matches!(self.action, Action::Allow);
        let mut conditions = self.conditions.iter();
        conditions.all(|condition| condition.holds(subject, root, allows))
    }

    fn is_about_profile(&self, subject: &Subject<'_>) -> bool {
        let Some(profile) = subject.profile else {
            return false;
        };
        self.conditions.iter().any(|condition| {
            condition.of == Of::Profile && !condition.negated && condition.pattern.matches(profile)
        })
    }
}

impl Condition {
    fn parse(word: &str) -> Result<Self, String> {
        let (name, pattern) = word
            .split_once('=')
            .ok_or_else(|| format!("expected NAME=pattern or NAME!=pattern, found {word:?}"))?;
        let (name, negated) = match name.strip_suffix('!') {
            Some(name) => (name, true),
            None => (name, false),
        };
        let of = match name {
            "path" => Of::Path,
            "profile" => Of::Profile,
            "method" => Of::Method,
            "client" => Of::Client,
            "MAP" => Of::Project,
            _ => match name.strip_prefix("header:") {
                Some(name) => Of::Header(header(name)?.to_ascii_lowercase()),
                None => Of::Parameter(parameter(name)?),
            },
        };
        let pattern = match of {
            Of::Client => Pattern::Networks(networks(pattern)?),
            _ => Pattern::Text(regex(pattern, of.ignores_case())?),
        };
        Ok(Self {
            of,
            negated,
            pattern,
        })
    }

    /// See the module about readings. `allows`: this one may not be too generous.
    fn holds(&self, subject: &Subject<'_>, root: &Path, allows: bool) -> bool {
        let Some(values) = self.of.values(subject, root) else {
            return !allows;
        };
        let is_list = matches!(self.of, Of::Parameter(_) | Of::Header(_));
        let any = || {
            let mut values = values.iter();
            values.any(|value| readings(value, is_list).any(|it| self.pattern.matches(&it)))
        };
        let all = || {
            let mut values = values.iter();
            values.all(|value| {
                parts(value, is_list)
                    .iter()
                    .all(|part| self.pattern.matches(part))
            })
        };
        match (self.negated, allows) {
            (false, true) => all(),
            (false, false) => any(),
            (true, true) => !any(),
            (true, false) => !all(),
        }
    }
}

impl Of {
    fn ignores_case(&self) -> bool {
        match self {
            Self::Method => true,
            Self::Parameter(name) => name == "SERVICE" || name == "REQUEST",
            _ => false,
        }
    }

    /// What is absent is empty; None when nobody knows.
    fn values(&self, subject: &Subject<'_>, root: &Path) -> Option<Vec<String>> {
        let some_or_empty = |mut values: Vec<String>| {
            if values.is_empty() {
                values.push(String::new());
            }
            Some(values)
        };
        match self {
            Self::Path => Some(vec![subject.path.into(), subject.written.into()]),
            Self::Profile => Some(vec![subject.profile.unwrap_or_default().into()]),
            Self::Method => Some(vec![subject.method.into()]),
            Self::Client => Some(vec![subject.client.to_string()]),
            Self::Project => match &subject.project {
                None => Some(vec![String::new()]),
                Some(project) => Some(vec![project_name(project, root)?]),
            },
            Self::Header(name) => some_or_empty((subject.header)(name)),
            Self::Parameter(name) => subject.parameters.values(name).and_then(some_or_empty),
        }
    }
}

impl Pattern {
    fn matches(&self, text: &str) -> bool {
        match self {
            Self::Text(regex) => regex.is_match(text),
            Self::Networks(networks) => {
                let address = text.parse::<IpAddr>().map(|it| it.to_canonical());
                address.is_ok_and(|it| networks.iter().any(|network| contains(*network, it)))
            }
        }
    }
}

impl Parameters {
    /// Those of a query and of the body of a POST, if there is no doubt about them.
    pub fn of(kvp: &ows::Kvp, said: &Said) -> Result<Self, Unclear> {
        let mut parameters = Self::default();
        for (name, value) in kvp.pairs() {
            parameters.add(&name, value);
        }
        parameters.more_in_body = said.is_xml;
        for (name, value) in &said.pairs {
            // QGIS goes by the body where both say something.
            let known = parameters
                .values
                .get(name)
                .and_then(|values| values.first());
            if known.is_some_and(|known| !known.is_empty() && !known.eq_ignore_ascii_case(value)) {
                return Err(Unclear);
            }
            if known != Some(value) {
                parameters.add(name, value.clone());
            }
        }
        Ok(parameters)
    }

    /// Those of an API, and what a web service would call the same. Whoever keeps WFS from
    /// somebody means the API that gives the same features, too.
    pub fn of_api(query: &str, path: &str, is_of_features: bool, method: &str) -> Self {
        let mut parameters = Self::default();
        for (name, value) in ows::all_pairs(query) {
            parameters.add(&ows::name(&name), value);
        }
        // QGIS looks for these names, too, wherever the settings put the API.
        let segments = path.split('/').filter(|part| !part.is_empty());
        let mut stems = segments.clone().filter_map(|part| part.split('.').next());
        if is_of_features || stems.any(|stem| ["wfs3", "ogcapi", "collections"].contains(&stem)) {
            let request = match (method, path.contains("/items")) {
                ("GET" | "HEAD", true) => "GetFeature",
                ("GET" | "HEAD", false) => "GetCapabilities",
                _ => "Transaction",
            };
            parameters.set("SERVICE", "WFS");
            parameters.set("REQUEST", request);
            let mut rest = segments.skip_while(|part| *part != "collections").skip(1);
            if let Some(collection) = rest.next() {
                let suffixes = [".json", ".html", ".geojson"].iter();
                let mut names = suffixes.filter_map(|suffix| collection.strip_suffix(suffix));
                parameters.set("TYPENAME", names.next().unwrap_or(collection));
            }
        }
        parameters
    }

    fn add(&mut self, name: &str, value: String) {
        self.values.entry(name.into()).or_default().push(value);
    }

    fn set(&mut self, name: &str, value: &str) {
        match value.is_empty() {
            true => drop(self.values.remove(name)),
            false => drop(self.values.insert(name.into(), vec![value.into()])),
        }
    }

    /// None: nobody knows. Of an XML body QGIS takes its operation from the root element,
    /// and all else that a query says may be said otherwise deeper in it.
    fn values(&self, name: &str) -> Option<Vec<String>> {
        let is_of_root = matches!(name, "SERVICE" | "REQUEST");
        if self.more_in_body && !is_of_root {
            return None;
        }
        let others: Vec<String> = match name {
            "LAYERS" if self.names("SLD") || self.names("SLD_BODY") => return None,
            "LAYERS" => self.other_layers().collect(),
            "TYPENAME" => self.types_of_features().collect(),
            _ => Vec::new(),
        };
        let mut values = self.said(name).to_vec();
        if values.is_empty() && !others.is_empty() {
            // What is absent stays so, whatever else is about the same.
            values.push(String::new());
        }
        values.extend(others);
        Some(values)
    }

    /// Layers that are asked for by another name than LAYERS.
    fn other_layers(&self) -> impl Iterator<Item = String> {
        let is_one = |name: &str| {
            let of_map = name
                .strip_prefix("MAP")
                .and_then(|it| it.strip_suffix(":LAYERS"));
            matches!(name, "QUERY_LAYERS" | "LAYER") || of_map.is_some()
        };
        let all = self.values.iter().filter(move |(name, _)| is_one(name));
        let all = all.flat_map(|(_, values)| values.iter().cloned());
        all.filter(|value| !value.is_empty())
    }

    /// Without the rest of the ids: `places` of `places.5`.
    fn types_of_features(&self) -> impl Iterator<Item = String> {
        let ids = self.said("FEATUREID").iter().map(|ids| ows::decoded(ids));
        let types = |ids: String| -> Vec<String> {
            let ids = parts(&ids, true).into_iter();
            ids.map(|id| id.split('.').next().unwrap_or_default().to_owned())
                .collect()
        };
        ids.filter(|ids| !ids.is_empty()).flat_map(types)
    }

    fn names(&self, name: &str) -> bool {
        self.said(name).iter().any(|value| !value.is_empty())
    }

    fn said(&self, name: &str) -> &[String] {
        self.values.get(name).map_or(&[], Vec::as_slice)
    }
}

/// A project as rules know it, however the client spelt it. None for what may lead to one
/// in a way which only the worker could tell: an absolute path that does not begin with
/// the root, parameters of a storage, a project of the catalogue.
fn project_name(project: &ProjectRef, root: &Path) -> Option<String> {
    let path = without_suffix(&project.path);
    if project.alias == CATALOG {
        return None;
    }
    if project.alias != FILE {
        let is_plain = !path.starts_with('/') && !path.contains(['?', '%', '#']);
        return is_plain.then(|| format!("{}:{path}", project.alias));
    }
    if !path.starts_with('/') {
        return Some(path.into());
    }
    let root = root.to_str().filter(|root| !root.is_empty())?;
    let rest = path.strip_prefix(root.trim_end_matches('/'))?;
    rest.strip_prefix('/').map(str::to_owned)
}

/// The parts of a list, the value itself if it is none; WFS may put them in parentheses.
fn parts(value: &str, is_list: bool) -> Vec<&str> {
    let parts = value.split([',', '(', ')']).map(str::trim);
    let parts: Vec<_> = parts.filter(|part| is_list && !part.is_empty()).collect();
    match parts.is_empty() {
        true => vec![value],
        false => parts,
    }
}

/// Everything that somebody may take a value for.
fn readings(value: &str, is_list: bool) -> impl Iterator<Item = String> {
    let mut all = vec![value.to_owned()];
    if is_list {
        all.push(value.replace('+', " "));
        all.push(ows::decoded(value));
        for part in parts(value, true) {
            all.push(part.to_owned());
            // A name space before the name of a feature type.
            all.extend(part.rsplit_once(':').map(|(_, name)| name.to_owned()));
        }
    }
    all.into_iter()
}

/// Reads the body of a POST as QGIS does: the name and the attributes of an XML document's
/// root element, or else `name=value&…`.
pub fn said(body: &[u8]) -> Result<Said, Unclear> {
    let text = std::str::from_utf8(body).map_err(|_| Unclear)?;
    if text.contains('\0') {
        return Err(Unclear);
    }
    let text = text.strip_prefix('\u{FEFF}').unwrap_or(text).trim_start();
    if !text.starts_with('<') {
        let pairs = distinct(pairs_of_text(text))?;
        return Ok(Said {
            pairs,
            is_xml: false,
        });
    }
    // QGIS reads what is no XML after all as pairs.
    let (_, rest) = text.split_once('&').unwrap_or_default();
    let looks_like_pair = |(name, _): (String, String)| {
        let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-.:".contains(c);
        !name.is_empty() && name.chars().all(is_plain)
    };
    if pairs_of_text(rest).any(looks_like_pair) {
        return Err(Unclear);
    }
    let pairs = distinct(root(text)?.into_iter())?;
    Ok(Said {
        pairs,
        is_xml: true,
    })
}

/// Whether QGIS takes for WMS what names no service; rules and filters should not see
/// less than it does.
pub fn is_guessed_to_be_wms(kvp: &ows::Kvp, said: &Said) -> bool {
    let of = |name: &'static str| {
        let in_body = said.pairs.iter().filter(move |(known, _)| known == name);
        let in_body = in_body.map(|(_, value)| value.clone());
        kvp.get(name).into_iter().chain(in_body)
    };
    let is_of_wms = |it: String| matches!(ows::decoded(&it).as_str(), "GetMap" | "GetFeatureInfo");
    of("SERVICE").all(|it| it.is_empty()) && of("REQUEST").any(is_of_wms)
}

fn pairs_of_text(text: &str) -> impl Iterator<Item = (String, String)> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    pairs.map(|(name, value)| (ows::name(&ows::decoded(name)), ows::decoded(value)))
}

/// Which of two values counts is nothing to bet on, nor what millions of them mean: they
/// are kept, compared and passed on, so there are no more of them than of a form.
fn distinct(pairs: impl Iterator<Item = (String, String)>) -> Result<Pairs, Unclear> {
    let mut seen = BTreeMap::<String, String>::new();
    let mut room = SAID_MAX;
    for (n, (name, value)) in pairs.enumerate() {
        let size = name.len() + value.len();
        room = room.checked_sub(size).ok_or(Unclear)?;
        if n >= ows::FIELDS_MAX {
            return Err(Unclear);
        }
        match seen.get(&name) {
            Some(known) if *known != value => return Err(Unclear),
            _ => drop(seen.insert(name, value)),
        }
    }
    Ok(seen.into_iter().collect())
}

/// REQUEST and the attributes of the root element.
fn root(text: &str) -> Result<Pairs, Unclear> {
    let inner = ows::root_tag(text).ok_or(Unclear)?;
    let is_end = |c: char| c.is_whitespace() || c == '/' || c == '>';
    let end = inner
        .find(is_end)
        .filter(|end| (1..=ROOT_MAX).contains(end))
        .ok_or(Unclear)?;
    let local = inner[..end].rsplit(':').next().unwrap_or_default();
    let mut pairs = vec![("REQUEST".to_owned(), local.to_owned())];
    let mut rest = inner[end..].trim_start();
    while !rest.starts_with(['/', '>']) {
        let (name, after) = rest.split_once('=').ok_or(Unclear)?;
        let after = after.trim_start();
        let quote = after
            .chars()
            .next()
            .filter(|c| matches!(c, '"' | '\''))
            .ok_or(Unclear)?;
        let (value, next) = after[1..].split_once(quote).ok_or(Unclear)?;
        // A reference to a character would have to be read as QGIS does.
        if value.contains(['&', '<']) || inner.len() - next.len() > ROOT_MAX {
            return Err(Unclear);
        }
        let name = name.trim();
        if name != "xmlns" && !name.starts_with("xmlns:") {
            // QGIS looks for a name without its prefix, of which there is one at most.
            let local = name.split_once(':').map_or(name, |(_, local)| local);
            pairs.push((ows::name(local), value.to_owned()));
        }
        rest = next.trim_start();
    }
    Ok(pairs)
}

/// Separated by blanks, except within double quotes.
fn words(text: &str) -> Result<Vec<String>, String> {
    let (mut words, mut word, mut quoted) = (Vec::new(), None::<String>, false);
    for c in text.chars() {
        match c {
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    match quoted {
        true => Err("a double quote is not closed".into()),
        false => Ok(words),
    }
}

fn pairs(words: &[String], name: fn(&str) -> Result<String, String>) -> Result<Pairs, String> {
    if words.is_empty() {
        return Err("expected NAME=value before \"if\"".into());
    }
    let pair = |word: &String| {
        let (left, value) = word
            .split_once('=')
            .ok_or_else(|| format!("expected NAME=value, found {word:?}"))?;
        match value
            .bytes()
            .all(|byte| byte == b' ' || byte.is_ascii_graphic())
        {
            true => Ok((name(left)?, value.to_owned())),
            false => Err(format!(
                "expected a value of visible ASCII, found {value:?}"
            )),
        }
    };
    words.iter().map(pair).collect()
}

/// The address that links begin with is one.
fn addressed(pairs: Pairs) -> Result<Pairs, String> {
    let is_wrong = |(name, url): &&(String, String)| {
        let rest = url.strip_prefix("https://").or(url.strip_prefix("http://"));
        let is_address =
            rest.is_some_and(|rest| !rest.is_empty() && !rest.contains([' ', '?', '#']));
        name.eq_ignore_ascii_case("X-Forwarded-Url") && !is_address
    };
    match pairs.iter().find(is_wrong) {
        None => Ok(pairs),
        Some((_, url)) => Err(format!(
            "expected an address such as https://maps.example/here, found {url:?}"
        )),
    }
}

fn parameter(name: &str) -> Result<String, String> {
    let is_part = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit() || "_-.".contains(c);
    match !name.is_empty() && name.chars().all(is_part) {
        true => Ok(name.into()),
        false => Err(format!(
            "expected path, profile, method, client, header:Name or a parameter in upper case, found {name:?}"
        )),
    }
}

fn header(name: &str) -> Result<String, String> {
    let is_part = |c: char| c.is_ascii_alphanumeric() || "-_".contains(c);
    match !name.is_empty() && name.chars().all(is_part) {
        true => Ok(name.into()),
        false => Err(format!("expected the name of a header, found {name:?}")),
    }
}

/// What says where a message ends and which connection it is on (RFC 9110 clause 7.6.1,
/// RFC 9112 clause 6) is the server's to say.
const OF_CONNECTION: [&str; 9] = [
    "connection",
    "content-length",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "expect",
];

fn header_but(name: &str, ours: &[&str]) -> Result<String, String> {
    let mut reserved = OF_CONNECTION.iter().chain(ours);
    match reserved.any(|it| it.eq_ignore_ascii_case(name)) {
        true => Err(format!(
            "expected a header that is not the server's own, found {name:?}"
        )),
        false => header(name),
    }
}

/// Host agrees with the URL, which QGIS prefers less.
fn request_header(name: &str) -> Result<String, String> {
    header_but(name, &["host"])
}

/// An ETag is compared with what clients send before rules are asked.
fn response_header(name: &str) -> Result<String, String> {
    header_but(name, &["etag"])
}

/// For a whole value. Linear in its length, whatever the pattern.
fn regex(pattern: &str, ignores_case: bool) -> Result<Regex, String> {
    let build = |pattern: &str| {
        RegexBuilder::new(pattern)
            .case_insensitive(ignores_case)
            .dot_matches_new_line(true)
            .size_limit(PATTERN_MAX)
            .build()
    };
    // First for itself: a parenthesis too many must not reach ours.
    let built = build(pattern).and_then(|_| build(&format!("^(?:{pattern})$")));
    built.map_err(|error| match error {
        regex::Error::CompiledTooBig(limit) => {
            format!("{pattern:?} takes more than {limit} bytes")
        }
        error => {
            let text = error.to_string();
            let last = text.lines().last().unwrap_or_default();
            format!(
                "{pattern:?} is no regular expression: {}",
                last.trim_start_matches("error: ")
            )
        }
    })
}

fn networks(text: &str) -> Result<Vec<(IpAddr, u8)>, String> {
    let network = |text: &str| {
        let wrong = || format!("expected networks such as 10.0.0.0/8,::1, found {text:?}");
        let (address, bits) = text.split_once('/').unzip();
        let address: IpAddr = address.unwrap_or(text).parse().map_err(|_| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = bits.map_or(Ok(all), str::parse).map_err(|_| wrong())?;
        (bits <= all).then_some((address, bits)).ok_or_else(wrong)
    };
    text.split(',').map(|text| network(text.trim())).collect()
}

fn contains((network, bits): (IpAddr, u8), address: IpAddr) -> bool {
    let number = |address: IpAddr| match address {
        IpAddr::V4(v4) => (32, u128::from(u32::from(v4))),
        IpAddr::V6(v6) => (128, u128::from(v6)),
    };
    let ((size, network), (other, address)) = (number(network), number(address));
    let left_out = size - u32::from(bits);
    size == other && (left_out == 128 || network >> left_out == address >> left_out)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A request as the rules see it.
    struct Asked<'a> {
        path: &'a str,
        profile: Option<&'a str>,
        query: &'a str,
        body: &'a str,
        client: &'a str,
    }

    const WMS: Asked<'_> = Asked {
        path: "/ows/",
        profile: None,
        query: "SERVICE=WMS&REQUEST=GetMap&MAP=city&LAYERS=a,b",
        body: "",
        client: "10.1.2.3",
    };

    fn project(map: Option<&str>) -> Option<ProjectRef> {
        let path = map?.trim_start_matches("./").to_owned();
        let alias = "file".into();
        Some(ProjectRef { alias, path })
    }

    /// The operator's rule about `pg:secret` must not be passed by another name for it.
    #[test]
    fn a_name_by_which_a_storage_may_find_a_project_too_is_in_doubt() {
        let named = |path: &str| {
            let (alias, path) = ("pg".into(), path.into());
            project_name(&ProjectRef { alias, path }, Path::new("/srv"))
        };
        assert_eq!(named("secret"), Some("pg:secret".into()));
        let listed = ProjectRef {
            alias: CATALOG.into(),
            path: "0123".into(),
        };
        assert_eq!(project_name(&listed, Path::new("/srv")), None);
        for path in ["?project=secret", "/secret", "s%65cret", "secret#"] {
            assert_eq!(named(path), None, "{path}");
        }
    }

    fn verdict(rules: &[&str], asked: &Asked<'_>) -> Verdict {
        for rule in rules {
            Rule::parse("x", rule).unwrap_or_else(|why| panic!("{rule}: {why}"));
        }
        let names: Vec<String> = (0..rules.len()).map(|n| n.to_string()).collect();
        let pairs = names.iter().map(String::as_str).zip(rules.iter().copied());
        let policies = Policies::new(pairs, Path::new("/srv/projects"));
        let kvp = ows::Kvp::parse(asked.query);
        let header = |name: &str| match name {
            "referer" => vec!["https://maps.example/".to_owned()],
            _ => Vec::new(),
        };
        let subject = Subject {
            path: asked.path,
            written: asked.path,
            profile: asked.profile,
            method: "GET",
            client: asked.client.parse().unwrap(),
            project: project(kvp.get("MAP").as_deref()),
            header: &header,
            parameters: Parameters::of(&kvp, &said(asked.body.as_bytes()).unwrap()).unwrap(),
        };
        policies.judge(subject, project)
    }

    fn allowed(rules: &[&str], asked: &Asked<'_>) -> bool {
        verdict(rules, asked).denied_by.is_none()
    }

    #[test]
    fn no_rule_is_passed_by_another_name_for_a_parameter() {
        let rules = ["deny if LAYERS=secret", "deny if SERVICE=WFS"];
        for query in [
            "LAYERS=open&LAYERS%00=secret",
            "LAYERS=open&::layers=secret",
            "SERVICE=WMS&::service%00=WFS",
        ] {
            assert!(!allowed(&rules, &Asked { query, ..WMS }), "{query}");
        }
        for body in [
            "::service=WFS",
            "<GetFeature :::service='WFS'/>",
            "<GetFeature x:service='WFS'/>",
            "<GetFeature xmlnsx:service='WFS'/>",
        ] {
            let query = "";
            assert!(!allowed(&rules, &Asked { query, body, ..WMS }), "{body}");
        }
        let of_api = Parameters::of_api("::bbox%00=1", "/", false, "GET");
        assert_eq!(of_api.said("BBOX"), ["1"]);
    }

    #[test]
    fn the_first_rule_that_decides_wins_and_without_one_all_is_allowed() {
        assert!(allowed(&[], &WMS));
        assert!(allowed(&["deny if SERVICE=WFS"], &WMS));
        assert!(!allowed(&["deny if SERVICE=wms"], &WMS));
        assert!(allowed(&["allow if SERVICE=WMS", "deny"], &WMS));
        let verdict = verdict(&["allow if SERVICE=WFS", "deny", "allow"], &WMS);
        assert_eq!(verdict.denied_by.as_deref(), Some("1"));
    }

    #[test]
    fn all_conditions_of_a_rule_must_hold() {
        for (rule, holds) in [
            ("deny if SERVICE=WMS REQUEST=GetMap", true),
            ("deny if SERVICE=WMS REQUEST=GetPrint", false),
            ("deny if SERVICE=WMS REQUEST!=GetPrint", true),
            ("deny if path=/ows/ method=get", true),
            ("deny if path=/ows", false),
            ("deny if client=10.0.0.0/8,::1", true),
            ("deny if client=10.2.0.0/16", false),
            ("deny if client=0.0.0.0/0", true),
            ("deny if client!=10.1.2.3", false),
            ("deny if header:Referer=https://maps[.]example/.*", true),
            ("deny if header:Referer!=.+", false),
            ("deny if header:X-Lizmap-User!=.+", true),
            ("deny if MAP=cit.", true),
            ("deny if MAP=cit", false),
            ("deny if DPI=\"\"", true),
            ("deny if \"LAYERS=a,b\"", true),
        ] {
            assert_eq!(!allowed(&[rule], &WMS), holds, "{rule}");
        }
    }

    #[test]
    fn of_a_list_one_is_enough_to_deny_and_all_are_needed_to_allow() {
        let of = |layers: &'static str| Asked {
            query: layers,
            ..WMS
        };
        for list in [
            "LAYERS=public,secret",
            "LAYERS=(public)(secret)",
            "LAYERS=ns:secret",
            "LAYERS=public,%20secret",
            "LAYERS=public%2Csecret",
            "LAYERS=public&layers=secret",
            "LAYERS=%2573ecret",
            "LAYERS=secret",
        ] {
            assert!(!allowed(&["deny if LAYERS=secret"], &of(list)), "{list}");
            assert!(
                !allowed(&["allow if LAYERS=public", "deny"], &of(list)),
                "{list}"
            );
        }
        for none in ["", "LAYERS=", "LAYERS=,", "X=public"] {
            assert!(
                !allowed(&["allow if LAYERS=public", "deny"], &of(none)),
                "{none}"
            );
        }
        assert!(allowed(
            &["allow if LAYERS=public", "deny"],
            &of("LAYERS=public,public")
        ));
        assert!(!allowed(
            &["deny if LAYERS!=public"],
            &of("LAYERS=public,secret")
        ));
        assert!(!allowed(
            &["allow if LAYERS!=secret", "deny"],
            &of("LAYERS=public,secret")
        ));
    }

    #[test]
    fn layers_and_types_are_denied_by_whichever_parameter_names_them() {
        fn of(query: &str) -> Asked<'_> {
            Asked { query, ..WMS }
        }
        for more in [
            "QUERY_LAYERS=secret",
            "QUERY_LAYERS=public,secret",
            "LAYER=secret",
            "map0:layers=secret",
            "MAP12%3ALAYERS=secret",
            "SLD=http://maps.example/style",
            "SLD_BODY=<StyledLayerDescriptor/>",
        ] {
            let query = format!("LAYERS=public&{more}");
            let asked = of(&query);
            assert!(!allowed(&["deny if LAYERS=secret"], &asked), "{more}");
            assert!(!allowed(&["deny if LAYERS!=public"], &asked), "{more}");
            let rules = ["allow if LAYERS=public", "deny"];
            assert!(!allowed(&rules, &asked), "{more}");
        }
        let all = of("LAYERS=public&QUERY_LAYERS=public&LAYER=public&SLD=&SLD_BODY=");
        assert!(allowed(&["allow if LAYERS=public", "deny"], &all));
        assert!(allowed(&["deny if LAYERS=secret"], &all));
        // Maps that a print does not name have the layers of the project.
        let absent = of("MAP0:LAYERS=public");
        assert!(!allowed(&["allow if LAYERS=public", "deny"], &absent));
        for ids in [
            "secret.1",
            "public.1,secret.1",
            "(public.1)(secret.1)",
            "s%2565cret.1",
        ] {
            let query = format!("TYPENAME=public&FEATUREID={ids}");
            let asked = of(&query);
            assert!(!allowed(&["deny if TYPENAME=secret"], &asked), "{ids}");
            let rules = ["allow if TYPENAME=public", "deny"];
            assert!(!allowed(&rules, &asked), "{ids}");
        }
        let ids = of("TYPENAME=public&FEATUREID=public.1");
        assert!(allowed(&["allow if TYPENAME=public", "deny"], &ids));
    }

    #[test]
    fn a_project_has_one_name_and_an_unknown_one_is_denied() {
        fn of(query: &str) -> Asked<'_> {
            Asked { query, ..WMS }
        }
        for map in [
            "city",
            "city.qgs",
            "city.qgz",
            "./city",
            "/srv/projects/city",
            "/srv/projects/city.qgs",
        ] {
            let query = format!("MAP={map}");
            let asked = of(query.as_str());
            assert!(!allowed(&["deny if MAP=city"], &asked), "{map}");
            assert!(allowed(&["allow if MAP=city", "deny"], &asked), "{map}");
        }
        let search_paths = Policies::new([].into_iter(), Path::new("")).root;
        let absolute = ProjectRef {
            alias: "file".into(),
            path: "/srv/projects/city".into(),
        };
        assert_eq!(project_name(&absolute, &search_paths), None);
        let elsewhere = of("MAP=/mnt/projects/city");
        assert!(!allowed(&["deny if MAP=city"], &elsewhere));
        assert!(!allowed(&["allow if MAP=.*", "deny"], &elsewhere));
    }

    #[test]
    fn rewriting_is_seen_by_the_rules_below() {
        let verdict = verdict(
            &[
                "rewrite MAP=town DPI=96 if profile=p",
                "request-header X-Role=\"a guest\" if MAP=town",
                "response-header Cache-Control=no-store if DPI=96",
                "deny if MAP=city",
            ],
            &Asked {
                profile: Some("p"),
                ..WMS
            },
        );
        assert_eq!(verdict.denied_by, None);
        assert!(verdict.knows_profile);
        assert_eq!(verdict.rewritten.len(), 2);
        assert_eq!(
            verdict.request_headers,
            [("X-Role".into(), "a guest".into())]
        );
        assert_eq!(verdict.response_headers.len(), 1);
    }

    #[test]
    fn a_profile_is_known_when_a_rule_is_about_it_whatever_decided() {
        let knows = |rules: &[&str], profile| {
            let profile = Some(profile);
            verdict(rules, &Asked { profile, ..WMS }).knows_profile
        };
        assert!(knows(&["allow", "deny if profile=wms SERVICE!=WMS"], "wms"));
        assert!(!knows(&["deny if profile=wms SERVICE!=WMS"], "other"));
        assert!(!knows(&["deny if profile!=wms"], "other"));
    }

    #[test]
    fn what_a_body_says_counts_as_if_the_query_said_it() {
        let body = |body| Asked {
            query: "MAP=city",
            body,
            ..WMS
        };
        for text in [
            "<wfs:GetFeature service=\"WFS\" version='1.1.0'><x/></wfs:GetFeature>",
            "\u{FEFF}<?xml version='1.0'?>\n<!-- a -->\n<GetFeature\n xmlns:a='SERVICE' service = 'WFS'/>",
            "SERVICE=WFS&REQUEST=GetFeature",
            "s%65rvice=WFS&request=GetFeature",
        ] {
            assert!(
                !allowed(&["deny if SERVICE=WFS REQUEST=GetFeature"], &body(text)),
                "{text}"
            );
            assert!(
                allowed(&["allow if SERVICE=WFS", "deny"], &body(text)),
                "{text}"
            );
        }
        // Which feature types it is about stands deeper, and goes before the query.
        let other = Asked {
            query: "MAP=city&SERVICE=WFS&REQUEST=GetFeature&TYPENAME=public",
            body: "<GetFeature service='WFS'><Query typeName='secret'/></GetFeature>",
            ..WMS
        };
        assert!(!allowed(&["deny if TYPENAME=secret"], &other));
        assert!(!allowed(&["allow if TYPENAME=public", "deny"], &other));
        assert!(!allowed(&["deny if TYPENAME!=public"], &other));
        assert!(allowed(
            &["allow if REQUEST=GetFeature MAP=city", "deny"],
            &other
        ));
        let xml = body("<GetFeature service='WFS'><Query typeName='places'/></GetFeature>");
        assert!(!allowed(&["deny if SERVICE=WFS TYPENAME=secret"], &xml));
        assert!(!allowed(&["allow if TYPENAME=places", "deny"], &xml));
        assert!(allowed(&["deny if SERVICE=WMS LAYERS=secret"], &xml));
    }

    #[test]
    fn a_body_that_may_mean_something_else_to_qgis_is_unclear() {
        let of = |query: &str, body: &[u8]| Parameters::of(&ows::Kvp::parse(query), &said(body)?);
        for (query, body) in [
            ("SERVICE=WMS", &b"<GetFeature service='WFS'/>"[..]),
            ("SERVICE=WMS", b"SERVICE=WFS"),
            ("REQUEST=GetMap", b"<GetFeature/>"),
            ("MAP=a", b"<GetFeature map='b'/>"),
            ("", b"SERVICE=WMS&service=WFS"),
            ("", b"<a service='WMS' SERVICE='WFS'/>"),
            ("", b"<a service='WMS' x:SERVICE='WFS'/>"),
            ("", b"<GetMap x:REQUEST='GetFeature'/>"),
            ("", b"<!DOCTYPE a><a/>"),
            ("", b"<a service='W&#70;S'/>"),
            ("", b"<a service='WMS'/>&SERVICE=WFS"),
            ("", b"<a/>&S%45RVICE=WFS"),
            ("", b"<a service=WFS/>"),
            ("", b"<a"),
            ("", b"<"),
            ("", b"<!-- a"),
            ("", b"SERVICE=W\xffS"),
            ("", b"<a/>\0"),
        ] {
            let text = String::from_utf8_lossy(body).into_owned();
            assert_eq!(of(query, body), Err(Unclear), "{query} {text}");
        }
        assert!(
            of(
                "SERVICE=wfs&REQUEST=GetFeature",
                b"<GetFeature service='WFS'/>"
            )
            .is_ok()
        );
        assert!(of("SERVICE=WFS", b"<a service='WFS'>x &amp; y</a>").is_ok());
        assert!(of("SERVICE=X", b"{\"a\": 1}").is_ok());
    }

    #[test]
    fn a_body_that_says_more_than_any_form_is_unclear() {
        let pairs = |n: usize| -> String { (0..n).map(|n| format!("&a{n}=")).collect() };
        let attributes = |n: usize| -> String { (0..n).map(|n| format!(" a{n}=''")).collect() };
        let max = ows::FIELDS_MAX;
        assert_eq!(said(pairs(max).as_bytes()).unwrap().pairs.len(), max);
        assert_eq!(said(pairs(max + 1).as_bytes()), Err(Unclear));
        // Its name is one, too.
        let element = |n: usize| format!("<a{}/>", attributes(n));
        assert_eq!(said(element(max - 1).as_bytes()).unwrap().pairs.len(), max);
        assert_eq!(said(element(max).as_bytes()), Err(Unclear));
        let long = |n: usize| format!("a={}", "x".repeat(n));
        assert!(said(long(SAID_MAX - 1).as_bytes()).is_ok());
        assert_eq!(said(long(SAID_MAX).as_bytes()), Err(Unclear));
    }

    #[test]
    fn a_map_without_a_service_is_one_of_wms_as_qgis_says() {
        let guessed = |query: &str, body: &str| {
            is_guessed_to_be_wms(&ows::Kvp::parse(query), &said(body.as_bytes()).unwrap())
        };
        for (query, body) in [
            ("REQUEST=GetMap", ""),
            ("REQUEST=GetMap", "x=1"),
            ("REQUEST=GetFeatureInfo&SERVICE=", "SERVICE="),
            ("request=Get%4Dap", "{}"),
            ("", "REQUEST=GetMap"),
            ("REQUEST=getmap", "REQUEST=GetMap"),
            ("", "<GetMap/>"),
        ] {
            assert!(guessed(query, body), "{query} {body}");
        }
        for (query, body) in [
            ("REQUEST=getmap", ""),
            ("REQUEST=GetFeature", ""),
            ("", "<GetFeature/>"),
            ("SERVICE=WFS&REQUEST=GetMap", ""),
            ("REQUEST=GetMap", "SERVICE=WFS"),
            ("", "<GetMap service='WFS'/>"),
        ] {
            assert!(!guessed(query, body), "{query} {body}");
        }
    }

    #[test]
    fn features_of_the_api_are_features_of_wfs() {
        let judged = |rule: &str, method: &str, path: &str| {
            let policies = Policies::new([("a", rule)].into_iter(), Path::new(""));
            let is_mounted = path.starts_with("/mounted");
            let subject = Subject {
                path,
                written: path,
                profile: None,
                method,
                client: "::1".parse().unwrap(),
                project: None,
                header: &|_| Vec::new(),
                parameters: Parameters::of_api("limit=1&Limit=2", path, is_mounted, method),
            };
            policies.judge(subject, project).denied_by.is_some()
        };
        for path in [
            "/wfs3",
            "/wfs3.json",
            "/wfs3/collections/places/items",
            "/ogcapi/api",
        ] {
            assert!(judged("deny if SERVICE=WFS", "GET", path), "{path}");
            assert!(
                judged("deny if path=/(wfs3|ogcapi).*", "GET", path),
                "{path}"
            );
        }
        for path in [
            "/maps/wfs3/api",
            "/features/collections.json",
            "/mounted",
            "/mounted/api",
        ] {
            assert!(judged("deny if SERVICE=WFS", "GET", path), "{path}");
        }
        assert!(!judged("deny if SERVICE=WFS", "GET", "/catalog"));
        let items = "/wfs3/collections/places/items";
        assert!(judged(
            "deny if REQUEST=GetFeature TYPENAME=places",
            "GET",
            items
        ));
        assert!(!judged("deny if REQUEST=Transaction", "GET", items));
        assert!(judged("deny if REQUEST=Transaction", "PATCH", items));
        assert!(judged("deny if REQUEST=GetFeature", "HEAD", items));
        assert!(judged("deny if LIMIT=2", "GET", items));
    }

    /// Whoever wrote a rule before another root was known means the same.
    #[test]
    fn a_path_that_has_two_spellings_is_denied_by_either_and_allowed_by_both() {
        let denied = |rule: &str| {
            let rules = [("a", rule), ("b", "deny")];
            let policies = Policies::new(rules.into_iter(), Path::new(""));
            let subject = Subject {
                path: "/wfs3/api",
                written: "/ows/wfs3/api",
                profile: None,
                method: "GET",
                client: "::1".parse().unwrap(),
                project: None,
                header: &|_| Vec::new(),
                parameters: Parameters::default(),
            };
            policies
                .judge(subject, project)
                .denied_by
                .unwrap_or_default()
        };
        assert_eq!(denied("deny if path=/wfs3.*"), "a");
        assert_eq!(denied("deny if path=/ows/wfs3.*"), "a");
        assert_eq!(denied("allow if path=/wfs3.*"), "b");
        assert_eq!(denied("allow if path=/(ows/)?wfs3.*"), "");
    }

    #[test]
    fn each_mistake_says_what_was_expected() {
        for (rule, says) in [
            ("", "expected a rule"),
            ("refuse", "expected allow, deny"),
            ("deny SERVICE=WMS", "expected \"if\" or nothing"),
            ("deny if", "expected a condition"),
            ("deny if SERVICE", "expected NAME=pattern"),
            ("deny if service=WMS", "in upper case, found \"service\""),
            ("deny if SERVICE=(", "is no regular expression"),
            ("deny if SERVICE=a)|(b", "is no regular expression"),
            ("deny if SERVICE=(a{500}){500}", "takes more than"),
            ("deny if client=10.0.0.0/40", "expected networks"),
            ("deny if header:=x", "expected the name of a header"),
            ("rewrite if SERVICE=WMS", "expected NAME=value"),
            ("rewrite MAP", "expected NAME=value, found \"MAP\""),
            ("request-header A\nB=c", "expected NAME=value"),
            ("response-header A=\u{1}", "visible ASCII"),
            ("response-header Content-Length=3", "not the server's own"),
            (
                "response-header transfer-encoding=chunked",
                "not the server's own",
            ),
            ("response-header Connection=close", "not the server's own"),
            ("response-header ETag=x", "not the server's own"),
            ("request-header A=b Host=evil", "not the server's own"),
            (
                "request-header X-Forwarded-Url=/here",
                "expected an address",
            ),
            (
                "request-header x-forwarded-url=https://a/?b",
                "expected an address",
            ),
            ("request-header Content-length=3", "not the server's own"),
            ("deny if SERVICE=\"WMS", "not closed"),
        ] {
            let mistake = Rule::parse("x", rule).expect_err(rule);
            assert!(mistake.contains(says), "{rule}: {mistake}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_body_panics(body in "<?[ -~é]*", bytes: Vec<u8>) {
            let _ = said(&bytes);
            let _ = said(body.as_bytes());
        }

        #[test]
        fn no_rule_panics(text in "(deny|rewrite|if|SERVICE|client|=|!=|[ -~]|\")*") {
            let _ = Rule::parse("x", &text);
        }
    }
}
