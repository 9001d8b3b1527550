//! Which path is whose.

use hyper::Method;
use percent_encoding::percent_decode_str;

/// Who answers a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    /// What this server is.
    Root,
    /// Alive?
    Ping,
    /// Able to serve?
    Ready,
    /// Workers and queue.
    Status,
    /// OGC web services of QGIS.
    Ows,
    /// An API of QGIS, built in or enabled by the operator.
    Api,
}

impl Route {
    /// Paths are case-sensitive. `apis` are names and root paths.
    pub fn of(path: &str, apis: &[(String, String)], status_page: bool) -> Option<Self> {
        match path {
            "/" => Some(Self::Root),
            "/ping" => Some(Self::Ping),
            "/ready" => Some(Self::Ready),
            "/status" | "/status/" if status_page => Some(Self::Status),
            "/ows" | "/ows/" => Some(Self::Ows),
            _ => Self::of_qgis(path, apis),
        }
    }

    /// QGIS decodes a path before it looks for names in it, so we do.
    fn of_qgis(path: &str, apis: &[(String, String)]) -> Option<Self> {
        let path = percent_decode_str(path).decode_utf8_lossy();
        match listed(&path, apis) {
            Some(Listed { rest: "/ows/", .. }) => Some(Self::Ows),
            Some(listed) => is_of_features(listed.rest).then_some(Self::Api),
            // QGIS would open a project that it finds the name of anywhere in there.
            None if of_projects(&path, apis).is_some() => None,
            None => is_of_an_api(&path, apis).then_some(Self::Api),
        }
    }

    /// The methods that it understands, as Allow lists them.
    pub fn allow(self) -> &'static str {
        match self {
            Self::Root | Self::Ping | Self::Ready | Self::Status => "GET, HEAD, OPTIONS",
            Self::Ows => "GET, POST, HEAD, OPTIONS",
            Self::Api => "GET, POST, HEAD, PUT, DELETE, PATCH, OPTIONS",
        }
    }

    pub fn allows(self, method: &Method) -> bool {
        self.allow()
            .split(", ")
            .any(|allowed| allowed == method.as_str())
    }
}

/// By this name the settings call OGC API Features.
pub const FEATURES: &str = "wfs3";

/// And by this the catalogue of projects.
const CATALOG: &str = "landing_page";

/// Of what the catalogue calls a project: an MD5 sum.
const ID_LENGTH: usize = 32;

/// Where that has been or will be, besides where the settings put it: in QGIS 4 and in
/// older servers.
const FEATURES_TOO: [&str; 2] = ["/ogcapi", "/ows/wfs3"];

/// What OGC API Features has below its root; QGIS answers all else with the landing page.
const OF_FEATURES: [&str; 5] = ["", "api", "collections", "conformance", "static"];

fn is_of_an_api(path: &str, apis: &[(String, String)]) -> bool {
    if let Some(rest) = of_features(path, apis) {
        return is_of_features(rest);
    }
    let mut rests = apis.iter().filter_map(|(_, root)| below(path, root));
    rests.any(|rest| !names_features(rest, apis))
}

/// QGIS would give such a path to the API of features, wherever in it the name stands.
pub fn names_features(path: &str, apis: &[(String, String)]) -> bool {
    let own = features_root(apis).into_iter();
    own.chain(["/wfs3", "/ogcapi"])
        .any(|name| path.contains(name))
}

/// The same for any API that the settings have.
pub fn names_an_api(path: &str, apis: &[(String, String)]) -> bool {
    let path = &*percent_decode_str(path).decode_utf8_lossy();
    let roots = apis.iter().map(|(_, root)| root.trim_end_matches('/'));
    let mut roots = roots.filter(|root| !root.is_empty());
    names_features(path, apis) || roots.any(|root| path.contains(root))
}

/// QGIS looks for its names anywhere in a path, and takes the collection behind the last
/// `collections` for the one that is asked for; everybody else would take the first.
fn is_of_features(rest: &str) -> bool {
    let segments = rest.strip_prefix('/').unwrap_or(rest);
    let mut stems = segments.split('/').map(|part| part.split('.').next());
    match stems.next().flatten() {
        // Its root, or that as JSON or HTML.
        Some("") | None => !segments.contains('/'),
        Some(first) => {
            OF_FEATURES.contains(&first) && stems.all(|stem| stem != Some("collections"))
        }
    }
}

fn features_root(apis: &[(String, String)]) -> Option<&str> {
    let own = apis.iter().find(|(name, _)| name == FEATURES);
    own.map(|(_, root)| root.trim_end_matches('/'))
        .filter(|root| !root.is_empty())
}

/// What follows the root path of OGC API Features in `path`.
pub fn of_features<'a>(path: &'a str, apis: &[(String, String)]) -> Option<&'a str> {
    let mut roots = [features_root(apis)?].into_iter().chain(FEATURES_TOO);
    roots.find_map(|root| below(path, root))
}

/// A project of the catalogue, and what is asked of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Listed<'a> {
    /// What the catalogue calls the project.
    pub id: &'a str,
    /// `/ows/`, or what follows the root of OGC API Features.
    pub rest: &'a str,
}

/// What the pages of the catalogue link to: `/catalog/project/<id>/` has the services of
/// a project, and `/catalog/project/<id>/wfs3` its features, wherever those are otherwise.
pub fn listed<'a>(path: &'a str, apis: &[(String, String)]) -> Option<Listed<'a>> {
    let (id, rest) = of_projects(path, apis)?.split_at_checked(ID_LENGTH)?;
    let is_digit = |byte: u8| byte.is_ascii_digit() || matches!(byte, b'a'..=b'f');
    if !id.bytes().all(is_digit) {
        return None;
    }
    if matches!(rest, "" | "/") {
        return Some(Listed { id, rest: "/ows/" });
    }
    let own = features_root(apis)?;
    let mut roots = [own, "/wfs3", "/ogcapi"].into_iter();
    let rest = roots.find_map(|root| below(rest, root))?;
    Some(Listed { id, rest })
}

/// What follows the folder in which the catalogue has its projects.
fn of_projects<'a>(path: &'a str, apis: &[(String, String)]) -> Option<&'a str> {
    let (_, root) = apis.iter().find(|(name, _)| name == CATALOG)?;
    below(path, root)?.strip_prefix("/project/")
}

/// `path` as if services and OGC API Features were asked for where the settings put them.
pub fn in_one_spelling(path: &str, apis: &[(String, String)]) -> String {
    let rest = match listed(path, apis) {
        Some(Listed { rest: "/ows/", .. }) => return "/ows/".into(),
        Some(listed) => Some(listed.rest),
        None => of_features(path, apis),
    };
    match (features_root(apis), rest) {
        (Some(root), Some(rest)) => format!("{root}{rest}"),
        _ => path.to_owned(),
    }
}

/// The rest of `/wfs3`, `/wfs3/…` and `/wfs3.json`, but not of `/wfs3x`.
fn below<'a>(path: &'a str, root: &str) -> Option<&'a str> {
    let root = root.trim_end_matches('/');
    let rest = path.strip_prefix(root).filter(|_| !root.is_empty())?;
    (rest.is_empty() || rest.starts_with(['/', '.'])).then_some(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apis() -> Vec<(String, String)> {
        vec![
            ("wfs3".into(), "/wfs3".into()),
            ("landing_page".into(), "/catalog".into()),
            ("x".into(), "/a/b/".into()),
        ]
    }

    fn route(path: &str) -> Option<Route> {
        Route::of(path, &apis(), false)
    }

    #[test]
    fn every_path_has_one_owner() {
        for (path, owner) in [
            ("/", Some(Route::Root)),
            ("/ping", Some(Route::Ping)),
            ("/ready", Some(Route::Ready)),
            ("/ows", Some(Route::Ows)),
            ("/ows/", Some(Route::Ows)),
            ("/wfs3", Some(Route::Api)),
            ("/wfs3/", Some(Route::Api)),
            ("/wfs3.json", Some(Route::Api)),
            ("/ows/wfs3/collections", Some(Route::Api)),
            ("/wfs3/collections/x/items/a-b.geojson", Some(Route::Api)),
            ("/ogcapi/conformance.html", Some(Route::Api)),
            ("/wfs3/static/x.js", Some(Route::Api)),
            ("/wfs3/api.openapi3", Some(Route::Api)),
            ("/wfs3/nothing", None),
            ("/wfs3/%63ollections/x/items", Some(Route::Api)),
            ("/wfs3/collections/x%2Fitems", Some(Route::Api)),
            ("/wfs3.json/collections/x/items", None),
            ("/wfs3/.json/collections/x/items", None),
            ("/wfs3/collections/x/collections/y/items", None),
            ("/wfs3/collections/x%2Fcollections/y/items", None),
            ("/wfs3/collections/x/%63ollections/y/items", None),
            ("/wfs3/api/collections/y/items", None),
            ("/wfs3/static/collections/y/items", None),
            ("/ows/wfs3/conformance/collections/y/items", None),
            ("/catalog/wfs3/collections/y/items", None),
            ("/catalog%2Fwfs3/collections/y/items", None),
            ("/a/b/ogcapi/collections/y/items", None),
            ("/wfs3//", None),
            ("/wfs3/apix", None),
            ("/static/x.js", None),
            ("/catalog", Some(Route::Api)),
            ("/catalog/", Some(Route::Api)),
            ("/a/b", Some(Route::Api)),
            ("/a/b/c", Some(Route::Api)),
            ("/a", None),
            ("/wfs3x", None),
            ("/OWS/", None),
            ("/ows//", None),
            ("/ows/x", None),
            ("/status", None),
            ("*", None),
            ("", None),
        ] {
            assert_eq!(route(path), owner, "{path:?}");
        }
        assert_eq!(Route::of("/status", &[], true), Some(Route::Status));
    }

    #[test]
    fn a_project_of_the_catalogue_has_services_and_features_and_nothing_else() {
        let id = "0123456789abcdef0123456789abcdef";
        for (path, owner, spelt) in [
            (format!("/catalog/project/{id}"), Some(Route::Ows), "/ows/"),
            (format!("/catalog/project/{id}/"), Some(Route::Ows), "/ows/"),
            (
                format!("/catalog/project/{id}/wfs3"),
                Some(Route::Api),
                "/wfs3",
            ),
            (
                format!("/catalog/project/{id}/ogcapi/api.json"),
                Some(Route::Api),
                "/wfs3/api.json",
            ),
            (
                format!("/catalog/project/{id}/wfs3/collections/x/items"),
                Some(Route::Api),
                "/wfs3/collections/x/items",
            ),
            (
                format!("/catalog/project/{id}/wfs3/nothing"),
                None,
                "/wfs3/nothing",
            ),
        ] {
            assert_eq!(route(&path), owner, "{path}");
            assert_eq!(in_one_spelling(&path, &apis()), spelt, "{path}");
        }
        assert_eq!(route(&format!("/%63atalog/project/{id}")), Some(Route::Ows));
        for path in [
            format!("/catalog/project/{id}/x"),
            format!("/catalog/project/{id}//"),
            format!("/catalog/project/{id}/x/wfs3/collections"),
            format!("/catalog/project/{id}0/wfs3"),
            format!("/catalog/project/{}/wfs3", id.to_uppercase()),
            format!("/catalog/project/x/{id}"),
            format!("/catalog/project/x%2F{id}"),
            "/catalog/project/".into(),
            format!("/a/b/project/{id}/wfs3"),
        ] {
            assert_eq!(route(&path), None, "{path}");
        }
        // Without them the pages of the catalogue have nothing to link to.
        let alone = [("landing_page".to_owned(), "/catalog".to_owned())];
        let of = |path: String| Route::of(&path, &alone, false);
        assert_eq!(of(format!("/catalog/project/{id}/wfs3")), None);
        assert_eq!(of(format!("/catalog/project/{id}/")), Some(Route::Ows));
    }

    #[test]
    fn an_api_that_is_off_has_no_path() {
        for path in ["/wfs3", "/ogcapi", "/ows/wfs3"] {
            assert_eq!(Route::of(path, &[], false), None, "{path}");
        }
        let elsewhere = [("wfs3".to_owned(), "/maps/wfs3".to_owned())];
        let of = |path| Route::of(path, &elsewhere, false);
        assert_eq!(of("/maps/wfs3/collections"), Some(Route::Api));
        assert_eq!(of("/wfs3/collections"), None);
    }

    #[test]
    fn an_api_at_the_root_does_not_take_everything() {
        assert_eq!(Route::of("/x", &[("x".into(), "/".into())], false), None);
    }

    #[test]
    fn methods_are_as_allow_says() {
        assert!(Route::Ows.allows(&Method::POST) && !Route::Ows.allows(&Method::PUT));
        assert!(Route::Api.allows(&Method::PATCH) && !Route::Ping.allows(&Method::POST));
        assert!(!Route::Api.allows(&Method::TRACE) && !Route::Api.allows(&Method::CONNECT));
    }
}
