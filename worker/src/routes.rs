//! What a client's name for a project leads to, as the operator's settings say.
//!
//! Pure: nothing is opened or asked here. A name that leads nowhere is None, and so is one
//! that says more than the operator left open.

use std::path::{Component, Path, PathBuf};

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};
use qgisserver::config::{Base, Finding, Part, route};
use qgisserver::protocol::{FILE, ProjectRef};

/// Where to look.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    File(Confined),
    /// A project inside of a file.
    GeoPackage {
        file: Confined,
        project: String,
    },
    /// An object; the suffix may be missing.
    Object {
        bucket: String,
        key: String,
    },
    /// What QGIS or a handler understands.
    Uri(String),
}

/// A file that counts only if it is below `root`, and that below `within`, links followed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Confined {
    pub within: PathBuf,
    pub root: PathBuf,
    pub path: PathBuf,
}

/// The operator's names for places.
pub struct Routes {
    root: Base,
    finding: Finding,
    search_paths: Vec<(Vec<Part>, Base)>,
}

/// A client's name, taken apart.
struct Name<'a> {
    path: &'a str,
    query: Vec<(String, String)>,
}

/// A base with the variables of its route filled in.
struct Spot {
    base: Base,
    /// How much of the path the operator wrote as it stands; None: all of it.
    border: Option<usize>,
    /// Whether the operator left room for the client's path in the path, and in the query.
    path_in_path: bool,
    path_in_query: bool,
}

/// Variables of a route, by name.
type Variables<'a> = Vec<(&'a str, &'a str)>;

const PATH: &str = "{path}";

/// Schemes that no handler of the operator's is asked about.
const BUILT_IN: [&str; 4] = [FILE, "geopackage", "postgresql", "s3"];

/// What stands for itself in a query.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');

impl Routes {
    pub fn new(root: &Path, finding: &Finding) -> Self {
        Self {
            root: Base {
                scheme: FILE.into(),
                authority: String::new(),
                path: root.to_string_lossy().into_owned(),
                query: String::new(),
            },
            search_paths: search_paths(finding),
            finding: finding.clone(),
        }
    }

    /// Whether any project may come from there.
    pub fn allow(&self, scheme: &str) -> bool {
        self.finding.allows(scheme)
    }

    pub fn target(&self, project: &ProjectRef) -> Option<Target> {
        let (path, query) = match project.path.split_once('?') {
            Some((path, query)) if project.alias != FILE => (path, query),
            _ => (project.path.as_str(), ""),
        };
        let climbs = Path::new(path)
            .components()
            .any(|part| part == Component::ParentDir);
        if climbs || project.path.contains('\0') {
            return None;
        }
        let name = Name {
            path,
            query: pairs(query),
        };
        if project.alias == self.finding.default_scheme
            && let Some((spot, rest)) = self.searched(path)
        {
            return self.lead(
                &spot,
                &Name {
                    path: &rest,
                    ..name
                },
            );
        }
        let base = self.base(&project.alias)?;
        self.lead(&with(&base, &Vec::new()), &name)
    }

    /// What a scheme stands for. A database or a bucket is there by the operator's word
    /// alone; a handler of the operator's is asked whatever it understands.
    fn base(&self, alias: &str) -> Option<Base> {
        if let Some(base) = self.finding.schemes.get(alias) {
            return Some(self.absolute(base));
        }
        match alias {
            FILE => Some(self.root.clone()),
            "geopackage" => Some(Base {
                scheme: alias.into(),
                ..self.root.clone()
            }),
            "postgresql" | "s3" => None,
            _ => Some(Base {
                scheme: alias.into(),
                authority: String::new(),
                path: String::new(),
                query: String::new(),
            }),
        }
    }

    /// A relative folder lies in the root directory.
    fn absolute(&self, base: &Base) -> Base {
        let is_path = matches!(base.scheme.as_str(), FILE | "geopackage");
        let path = match is_path && !base.path.starts_with('/') {
            true => format!("{}/{}", self.root.path, base.path),
            false => base.path.clone(),
        };
        Base {
            path,
            ..base.clone()
        }
    }

    /// The first route that `path` lies below, and what is left of the path.
    fn searched(&self, path: &str) -> Option<(Spot, String)> {
        let parts: Vec<&str> = parts(path).collect();
        self.search_paths.iter().find_map(|(route, base)| {
            let (variables, rest) = matched(route, &parts)?;
            // A folder is no project.
            let is_folder = rest.is_empty() && matches!(base.scheme.as_str(), FILE | "s3");
            (!is_folder).then(|| (with(&self.absolute(base), &variables), rest.join("/")))
        })
    }

    fn lead(&self, spot: &Spot, name: &Name) -> Option<Target> {
        let base = &spot.base;
        if !self.finding.allows(&base.scheme) {
            return None;
        }
        match base.scheme.as_str() {
            FILE => name
                .query
                .is_empty()
                .then(|| file(spot, name.path))
                .flatten()
                .map(Target::File),
            "geopackage" => geopackage(spot, name),
            "postgresql" => postgresql(spot, name),
            "s3" => name
                .query
                .is_empty()
                .then(|| object(spot, name.path))
                .flatten(),
            _ => other(spot, name),
        }
    }
}

/// What is no route was a mistake of the settings, and leads nowhere.
fn search_paths(finding: &Finding) -> Vec<(Vec<Part>, Base)> {
    let all = finding.search_paths.iter();
    all.filter_map(|(text, base)| Some((route(text).ok()?, base.clone())))
        .collect()
}

fn parts(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|part| !part.is_empty())
}

fn matched<'a>(route: &'a [Part], path: &[&'a str]) -> Option<(Variables<'a>, Vec<&'a str>)> {
    let (head, rest) = path.split_at_checked(route.len())?;
    let mut variables = Vec::new();
    for (part, value) in route.iter().zip(head) {
        match part {
            // What is put in must not be taken for room to put more in.
            Part::Variable { .. } if value.contains(['{', '}']) => return None,
            Part::Variable {
                pattern: Some(pattern),
                ..
            } if !pattern.is_match(value) => return None,
            Part::Variable { name, .. } => variables.push((name.as_str(), *value)),
            Part::Fixed(text) if text == value => {}
            Part::Fixed(_) => return None,
        }
    }
    Some((variables, rest.to_vec()))
}

fn with(base: &Base, variables: &Variables) -> Spot {
    let is_url = !BUILT_IN.contains(&base.scheme.as_str());
    let put = |text: String, name: &str, value: &str| text.replace(&format!("{{{name}}}"), value);
    let path = variables
        .iter()
        .fold(base.path.clone(), |path, (name, value)| match is_url {
            true => put(path, name, &escaped(value)),
            false => put(path, name, value),
        });
    let query = variables
        .iter()
        .fold(base.query.clone(), |query, (name, value)| {
            put(query, name, &encoded(value))
        });
    let border = literal(&base.path).len();
    // A variable may have this name, too.
    let is_free = !variables
        .iter()
        .any(|(name, _)| PATH == format!("{{{name}}}"));
    Spot {
        border: (border < base.path.len()).then_some(border),
        path_in_path: is_free && base.path.contains(PATH),
        path_in_query: is_free && base.query.contains(PATH),
        base: Base {
            path,
            query,
            ..base.clone()
        },
    }
}

/// The folders of a template before its first variable.
fn literal(template: &str) -> &str {
    match template.find('{') {
        None => template,
        Some(n) => &template[..template[..n].rfind('/').map_or(0, |slash| slash + 1)],
    }
}

fn file(spot: &Spot, path: &str) -> Option<Confined> {
    if path.is_empty() {
        return None;
    }
    let root = &spot.base.path;
    if spot.path_in_path {
        let within = &root[..spot.border.unwrap_or_else(|| literal(root).len())];
        return Some(Confined {
            within: within.into(),
            root: within.into(),
            path: root.replace(PATH, path.trim_start_matches('/')).into(),
        });
    }
    if spot.path_in_query {
        // The name goes where no file looks at it, and the file is always the same.
        let within = Path::new(root).parent()?;
        return Some(Confined {
            within: within.into(),
            root: within.into(),
            path: root.into(),
        });
    }
    Some(Confined {
        within: root[..spot.border.unwrap_or(root.len())].into(),
        root: root.into(),
        // An absolute path replaces the root here, and has to lie below it all the same.
        path: Path::new(root).join(path),
    })
}

/// The file is the base's, or the client names one below it and says which project.
fn geopackage(spot: &Spot, name: &Name) -> Option<Target> {
    let base = &spot.base;
    let has_path = spot.path_in_query;
    if !base.path.ends_with(".gpkg") && !has_path {
        let project =
            value(&name.query, "projectName").or_else(|| value(&name.query, "project"))?;
        let file = file(spot, name.path)?;
        return Some(Target::GeoPackage { file, project });
    }
    let project = match has_path {
        true => value(&pairs(&filled(&base.query, name.path)?), "projectName")?,
        false => named(name)?,
    };
    let path = PathBuf::from(&base.path);
    let within: PathBuf = match spot.border {
        Some(n) => base.path[..n].into(),
        None => path.parent()?.into(),
    };
    let root = within.clone();
    let file = Confined { within, root, path };
    Some(Target::GeoPackage { file, project })
}

/// A client names the project. What else it says must be what the operator said.
fn postgresql(spot: &Spot, name: &Name) -> Option<Target> {
    let base = &spot.base;
    let has_path = spot.path_in_query;
    let query = match has_path {
        true => filled(&base.query, name.path)?,
        false => base.query.clone(),
    };
    let mut own = pairs(&query);
    let database = base.path.trim_matches('/');
    if !database.is_empty() && value(&own, "dbname").is_none() {
        own.push(("dbname".into(), database.into()));
    }
    let agrees = |(key, said): &(String, String)| {
        key == "project" || value(&own, key).is_some_and(|own| own == *said)
    };
    if !name.query.iter().all(agrees) {
        return None;
    }
    let project = match value(&own, "project") {
        Some(project) if has_path => project,
        Some(project) => named(name)
            .is_none_or(|named| named == project)
            .then_some(project)?,
        None => named(name)?,
    };
    own.retain(|(key, _)| key != "project");
    own.push(("project".into(), project));
    // The password is in a file: QGIS tells the name of a project to whoever asks.
    let authority = match base.credentials() {
        ("", _) => base.host().to_owned(),
        (user, _) => format!("{user}@{}", base.host()),
    };
    Some(Target::Uri(format!(
        "postgresql://{authority}?{}",
        query_of(&own)
    )))
}

fn object(spot: &Spot, path: &str) -> Option<Target> {
    let base = &spot.base;
    let path = path.trim_matches('/');
    if path.is_empty() {
        return None;
    }
    let prefix = &base.path;
    let key = match spot.path_in_path {
        true => prefix.replace(PATH, path),
        false => format!("{}/{path}", prefix.trim_matches('/')),
    };
    Some(Target::Object {
        bucket: base.authority.clone(),
        key: key.trim_start_matches('/').into(),
    })
}

/// As py-qgis-server composes it: what the operator wrote in the query wins.
fn other(spot: &Spot, name: &Name) -> Option<Target> {
    let base = &spot.base;
    let own = &base.path;
    let query = match spot.path_in_query {
        true => filled(&base.query, name.path)?,
        false => base.query.clone(),
    };
    let said = escaped(name.path);
    let path = match (spot.path_in_path, spot.path_in_query) {
        (true, _) => own.replace(PATH, said.trim_matches('/')),
        (false, true) => own.clone(),
        _ if own.is_empty() => said,
        _ => format!("{}/{}", own.trim_end_matches('/'), said.trim_matches('/')),
    };
    let mut pairs = pairs(&query);
    let more = name
        .query
        .iter()
        .filter(|(key, _)| value(&pairs, key).is_none());
    let more: Vec<_> = more.cloned().collect();
    pairs.extend(more);
    let authority = match base.authority.is_empty() && !path.starts_with('/') {
        true => String::new(),
        false => format!("//{}", base.authority),
    };
    let query = match pairs.is_empty() {
        true => String::new(),
        false => format!("?{}", query_of(&pairs)),
    };
    // An URL has no underscores there, and its handler splits it as one.
    let scheme = base.scheme.replace('_', "-");
    Some(Target::Uri(format!("{scheme}:{authority}{path}{query}")))
}

/// The project by the query, or else by the path.
fn named(name: &Name) -> Option<String> {
    let path = name.path.trim_matches('/');
    let said = value(&name.query, "project").or_else(|| value(&name.query, "projectName"));
    said.or_else(|| (!path.is_empty()).then(|| path.into()))
}

/// A query with the client's path in it; None if there is none.
fn filled(query: &str, path: &str) -> Option<String> {
    let path = path.trim_matches('/');
    (!path.is_empty()).then(|| query.replace(PATH, &encoded(path)))
}

fn value(pairs: &[(String, String)], key: &str) -> Option<String> {
    let found = pairs.iter().find(|(name, _)| name == key);
    found
        .map(|(_, value)| value.clone())
        .filter(|value| !value.is_empty())
}

fn pairs(query: &str) -> Vec<(String, String)> {
    let decoded = |text: &str| percent_decode_str(text).decode_utf8_lossy().into_owned();
    let pair = |pair: &str| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (decoded(key), decoded(value))
    };
    query
        .split('&')
        .filter(|pair| !pair.is_empty())
        .map(pair)
        .collect()
}

fn query_of(pairs: &[(String, String)]) -> String {
    let pair = |(key, value): &(String, String)| format!("{}={}", encoded(key), encoded(value));
    pairs.iter().map(pair).collect::<Vec<_>>().join("&")
}

/// A path as a part of an URL. Who splits that drops what follows a `#` and all line ends,
/// or takes it for something else, so a project would have more names than its own.
fn escaped(path: &str) -> String {
    let escaped = |c: char| match c {
        '?' | '#' | '%' | ';' | '\0'..='\x1f' | '\x7f' => format!("%{:02X}", c as u32),
        _ => c.to_string(),
    };
    path.chars().map(escaped).collect()
}

fn encoded(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(schemes: &[(&str, &str)], search_paths: &[(&str, &str)]) -> Routes {
        let base = |text: &str| Base::parse(text).unwrap();
        let finding = Finding {
            allowed: vec!["*".into()],
            schemes: schemes
                .iter()
                .map(|(name, text)| (name.to_string(), base(text)))
                .collect(),
            search_paths: search_paths
                .iter()
                .map(|(route, text)| (route.to_string(), base(text)))
                .collect(),
            ..Finding::default()
        };
        Routes::new(Path::new("/root"), &finding)
    }

    #[test]
    fn a_variable_takes_what_its_pattern_fits_as_a_whole() {
        let routes = routes(
            &[],
            &[
                ("/{user:[a-z]{2,3}|root}/maps", "/home/{user}"),
                ("/{user:[0-9.]+}", "/n/{user}"),
            ],
        );
        let within = |path| match target(&routes, path) {
            Some(Target::File(it)) => it.path.to_string_lossy().into_owned(),
            other => panic!("{path}: {other:?}"),
        };
        assert_eq!(within("ann/maps/city"), "/home/ann/city");
        assert_eq!(within("root/maps/city"), "/home/root/city");
        assert_eq!(within("1.2/city"), "/n/1.2/city");
        for path in [
            "anna/maps/city",
            "rooted/maps/city",
            "Ann/maps/city",
            "a1/city",
        ] {
            assert_eq!(within(path), format!("/root/{path}"));
        }
    }

    fn target(routes: &Routes, name: &str) -> Option<Target> {
        let (alias, path) = name.split_once(':').unwrap_or(("file", name));
        routes.target(&ProjectRef {
            alias: alias.into(),
            path: path.into(),
        })
    }

    fn at(within: &str, root: &str, path: &str) -> Option<Target> {
        Some(Target::File(Confined {
            within: within.into(),
            root: root.into(),
            path: path.into(),
        }))
    }

    fn uri(text: &str) -> Option<Target> {
        Some(Target::Uri(text.into()))
    }

    #[test]
    fn a_scheme_stands_for_a_folder_or_for_a_pattern() {
        let routes = routes(
            &[
                ("own", "file:///srv/own/"),
                ("each", "/srv/each/{path}/map.qgs"),
            ],
            &[],
        );
        assert_eq!(target(&routes, "city"), at("/root", "/root", "/root/city"));
        assert_eq!(
            target(&routes, "own:a/city"),
            at("/srv/own/", "/srv/own/", "/srv/own/a/city")
        );
        assert_eq!(
            target(&routes, "own:/etc/x"),
            at("/srv/own/", "/srv/own/", "/etc/x")
        );
        assert_eq!(
            target(&routes, "each:a"),
            at("/srv/each/", "/srv/each/", "/srv/each/a/map.qgs")
        );
        for name in [
            "own:?a=b",
            "own:a/../../x",
            "../x",
            "a\0",
            "postgresql:x",
            "s3:x",
        ] {
            assert_eq!(target(&routes, name), None, "{name:?}");
        }
    }

    #[test]
    fn a_relative_folder_lies_in_the_root_directory() {
        let routes = routes(
            &[
                ("foo", "file:foobar/"),
                ("bar", "file:foobar?data={path}"),
                ("gpkg", "geopackage:all.gpkg"),
            ],
            &[("/{user}", "file:homes/{user}")],
        );
        let foobar = "/root/foobar/";
        assert_eq!(
            target(&routes, "foo:city"),
            at(foobar, foobar, "/root/foobar/city")
        );
        assert_eq!(
            target(&routes, "bar:city"),
            at("/root", "/root", "/root/foobar")
        );
        assert_eq!(
            target(&routes, "ann/city"),
            at("/root/homes/", "/root/homes/ann", "/root/homes/ann/city")
        );
        let Some(Target::GeoPackage { file, .. }) = target(&routes, "gpkg:city") else {
            panic!("no file");
        };
        assert_eq!(file.path, Path::new("/root/all.gpkg"));
    }

    #[test]
    fn the_first_route_that_matches_wins() {
        let routes = routes(
            &[],
            &[
                ("/public/", "/srv/public"),
                ("/{user}/{theme}", "/srv/home/{user}/maps/{theme}"),
                ("/", "/srv/rest/"),
            ],
        );
        let public = at("/srv/public", "/srv/public", "/srv/public/a/b");
        assert_eq!(target(&routes, "public/a/b"), public);
        assert_eq!(target(&routes, "/public/a/b"), public);
        let home = "/srv/home/ann/maps/roads";
        assert_eq!(
            target(&routes, "ann/roads/city"),
            at("/srv/home/", home, &format!("{home}/city"))
        );
        assert_eq!(
            target(&routes, "city"),
            at("/srv/rest/", "/srv/rest/", "/srv/rest/city")
        );
        assert_eq!(
            target(&routes, "ann/city"),
            at("/srv/rest/", "/srv/rest/", "/srv/rest/ann/city")
        );
    }

    #[test]
    fn a_database_gets_the_name_of_a_project_and_nothing_else_from_a_client() {
        let routes = routes(
            &[
                ("pg", "postgresql://maps@db:5433/?dbname=gis&schema=maps"),
                ("one", "postgresql:///?service=gis&schema=s&project={path}"),
                ("uri", "postgresql://me:hush@db/gis"),
            ],
            &[("/{schema}", "postgresql:///?service=gis&schema={schema}")],
        );
        let city = uri("postgresql://maps@db:5433?dbname=gis&schema=maps&project=city");
        for name in [
            "pg:city",
            "pg:/city",
            "pg:?project=city",
            "pg:?dbname=gis&project=city",
        ] {
            assert_eq!(target(&routes, name), city, "{name}");
        }
        for name in [
            "pg:?project=a&dbname=b",
            "pg:a?host=h",
            "pg:a?service=x",
            "pg:?dbname=gis",
            "one:?project=x",
        ] {
            assert_eq!(target(&routes, name), None, "{name}");
        }
        assert_eq!(
            target(&routes, "one:a&host=b"),
            uri("postgresql://?service=gis&schema=s&project=a%26host%3Db")
        );
        assert_eq!(
            target(&routes, "uri:a b"),
            uri("postgresql://me@db?dbname=gis&project=a%20b")
        );
        assert_eq!(
            target(&routes, "x&host=h/city"),
            uri("postgresql://?service=gis&schema=x%26host%3Dh&project=city")
        );
    }

    #[test]
    fn a_geopackage_is_a_file_with_projects() {
        let routes = routes(
            &[
                ("all", "geopackage:///srv/all.gpkg"),
                ("same", "geopackage:///srv/all.gpkg?projectName={path}"),
                ("dir", "geopackage:///srv/gpkg/"),
            ],
            &[],
        );
        let package = |within: &str, path: &str, project: &str| {
            let file = Confined {
                within: within.into(),
                root: within.into(),
                path: path.into(),
            };
            Some(Target::GeoPackage {
                file,
                project: project.into(),
            })
        };
        let all = package("/srv", "/srv/all.gpkg", "city");
        assert_eq!(target(&routes, "all:city"), all);
        assert_eq!(target(&routes, "same:city"), all);
        let one = package("/srv/gpkg/", "/srv/gpkg/a.gpkg", "city");
        assert_eq!(target(&routes, "dir:a.gpkg?projectName=city"), one);
        let own = package("/root", "/root/a.gpkg", "x");
        assert_eq!(target(&routes, "geopackage:a.gpkg?projectName=x"), own);
        assert_eq!(target(&routes, "geopackage:a.gpkg"), None);
    }

    #[test]
    fn an_object_lies_below_its_prefix() {
        let routes = routes(
            &[
                ("s3", "s3://maps/public/"),
                ("each", "s3://maps/{path}/map.qgs"),
                ("top", "s3://maps"),
            ],
            &[],
        );
        let object = |key: &str| {
            Some(Target::Object {
                bucket: "maps".into(),
                key: key.into(),
            })
        };
        assert_eq!(target(&routes, "s3:a/city"), object("public/a/city"));
        assert_eq!(target(&routes, "s3:/city"), object("public/city"));
        assert_eq!(target(&routes, "each:a"), object("a/map.qgs"));
        assert_eq!(target(&routes, "top:city"), object("city"));
    }

    #[test]
    fn a_handler_hears_the_operators_words_first() {
        let routes = routes(&[("x", "own://host/dir/?a=1"), ("y", "own:{path}")], &[]);
        assert_eq!(
            target(&routes, "x:city?a=2&b=3"),
            uri("own://host/dir/city?a=1&b=3")
        );
        assert_eq!(target(&routes, "y:city"), uri("own:city"));
        assert_eq!(target(&routes, "own:city?k=v"), uri("own:city?k=v"));
        assert_eq!(target(&routes, "own:/city"), uri("own:///city"));
        assert_eq!(target(&routes, "my_own:city"), uri("my-own:city"));
    }

    #[test]
    fn what_a_client_says_is_no_room_for_more() {
        let routes = routes(
            &[],
            &[
                ("/f/{user}", "/srv/home/{user}"),
                ("/t/{user}/{theme}", "/srv/{user}/{theme}"),
                ("/o/{user}", "s3://maps/{user}"),
                ("/g/{user}", "geopackage:///srv/{user}"),
                ("/h/{user}", "own://host/{user}/{theme}"),
                ("/path/{path}", "/srv/{path}"),
            ],
        );
        for name in ["f/{path}/bob/city", "t/{theme}/x/city", "o/{path}/bob/city"] {
            assert_eq!(
                target(&routes, name),
                at("/root", "/root", &format!("/root/{name}"))
            );
        }
        for name in ["g/{path}/a.gpkg", "h/{path}/bob", "h/{theme}/bob"] {
            let Some(Target::File(file)) = target(&routes, name) else {
                panic!("{name}");
            };
            assert_eq!(file.root, Path::new("/root"), "{name}");
        }
        // What is left of the path may hold what it likes.
        assert_eq!(
            target(&routes, "f/ann/{user}"),
            at("/srv/home/", "/srv/home/ann", "/srv/home/ann/{user}")
        );
        assert_eq!(
            target(&routes, "path/a/city"),
            at("/srv/", "/srv/a", "/srv/a/city")
        );
    }

    #[test]
    fn a_project_of_a_handler_has_no_second_name() {
        let routes = routes(
            &[("x", "own://host/dir/"), ("y", "own:/{path}/map")],
            &[("/u/{user}", "own://host/{user}/"), ("/", "own://host/")],
        );
        for (name, expected) in [
            ("own:city#x", "own:city%23x"),
            ("own:city%23x", "own:city%2523x"),
            ("own:city;x", "own:city%3Bx"),
            ("own:ci\n\tty", "own:ci%0A%09ty"),
            ("own:cité a", "own:cité a"),
            ("x:city#x?b=3", "own://host/dir/city%23x?b=3"),
            ("y:city#x", "own:///city%23x/map"),
            ("city?a=b#c", "own://host/city%3Fa=b%23c"),
            ("u/ann#/city", "own://host/ann%23/city"),
            ("u/ann?/city", "own://host/ann%3F/city"),
        ] {
            assert_eq!(target(&routes, name), uri(expected), "{name}");
        }
    }

    #[test]
    fn what_is_not_allowed_leads_nowhere() {
        let mut routes = routes(
            &[("pg", "postgresql:///?service=x"), ("own", "/srv")],
            &[("/p", "s3://b/")],
        );
        routes.finding.allowed = vec!["file".into()];
        for name in [
            "pg:city",
            "p/city",
            "other:city",
            "geopackage:a.gpkg?projectName=b",
        ] {
            assert_eq!(target(&routes, name), None, "{name}");
        }
        assert!(target(&routes, "own:city").is_some());
        routes.finding.allowed = vec!["postgresql".into()];
        assert!(target(&routes, "city").is_none() && target(&routes, "pg:city").is_some());
    }

    proptest::proptest! {
        /// Whatever the client says, the operator's connection stays as it is.
        #[test]
        fn no_name_makes_a_connection(path in "[^?]*", query in ".*") {
            let routes = routes(&[("pg", "postgresql://me@db/?dbname=gis&project={path}")], &[]);
            if let Some(Target::Uri(uri)) = target(&routes, &format!("pg:{path}?{query}")) {
                let (connection, project) = uri.rsplit_once('=').unwrap();
                proptest::prop_assert_eq!(connection, "postgresql://me@db?dbname=gis&project");
                proptest::prop_assert!(!project.contains(['&', '=', '#', '/']));
            }
        }
    }
}
