//! Which path is whose.

use hyper::Method;

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
        let builtin = ["/wfs3", "/ogcapi", "/static"];
        let mut roots = builtin
            .into_iter()
            .chain(apis.iter().map(|(_, root)| root.as_str()));
        match path {
            "/" => Some(Self::Root),
            "/ping" => Some(Self::Ping),
            "/ready" => Some(Self::Ready),
            "/status" | "/status/" if status_page => Some(Self::Status),
            "/ows" | "/ows/" => Some(Self::Ows),
            _ if roots.any(|root| is_under(path, root)) => Some(Self::Api),
            _ => None,
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

/// `/wfs3`, `/wfs3/…`, `/wfs3.json`, but not `/wfs3x`.
fn is_under(path: &str, root: &str) -> bool {
    let root = root.trim_end_matches('/');
    let rest = path.strip_prefix(root).filter(|_| !root.is_empty());
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', '.']))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(path: &str) -> Option<Route> {
        Route::of(
            path,
            &[
                ("landing_page".into(), "/catalog".into()),
                ("x".into(), "/a/b/".into()),
            ],
            false,
        )
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
            ("/wfs3/collections/x/items/a-b.geojson", Some(Route::Api)),
            ("/ogcapi/conformance.html", Some(Route::Api)),
            ("/static/x.js", Some(Route::Api)),
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
