//! Access policies on the way of a request: its profile, and what the rules make of it.
//!
//! Rules of the settings are asked here (`ogc/policy.rs`). Filters in Python run in the
//! worker, which is told what they want to know of a client.

use bytes::Bytes;
use hyper::header::{CACHE_CONTROL, HeaderMap, HeaderValue};
use percent_encoding::percent_decode_str;

use super::reply::Refusal;
use super::request::{Incomplete, SMALL};
use super::route::{self, Route};
use crate::ogc::ows::{self, Kvp};
use crate::ogc::policy::{self, Parameters, Said, Subject, Unclear, Verdict};
use crate::protocol::Visitor;

const PROFILES: &str = "/ows/p/";

/// A path as policies see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Of `/ows/p/<profile>/`, which may have several segments.
    pub profile: Option<String>,
    /// Without the profile; `/ows/` for `/ows`, and OGC API Features where the settings
    /// put it, by whichever of its roots it was asked for.
    pub rest: String,
    /// The same as it was written.
    written: String,
}

impl Path {
    /// `raw` is known to decode to text. `/ows` and `/ows/` are the same, and so are all
    /// encodings of a profile.
    pub fn of(raw: &str, apis: &[(String, String)]) -> Self {
        let path = percent_decode_str(raw).decode_utf8_lossy().into_owned();
        let (profile, written) = match path.strip_prefix(PROFILES) {
            Some(rest) => split(rest, apis),
            None if path == "/ows" => (None, "/ows/".into()),
            None => (None, path),
        };
        Self {
            profile,
            rest: route::in_one_spelling(&written, apis),
            written,
        }
    }

    /// Whose it is, if it is the path of a profile.
    pub fn route(&self, apis: &[(String, String)]) -> Option<Route> {
        let profile = self
            .profile
            .as_ref()
            .filter(|profile| !profile.is_empty())?;
        if route::names_an_api(&format!("/{profile}"), apis) {
            return None;
        }
        let route = Route::of(&self.written, apis, false)?;
        let is_served = match route {
            Route::Ows => true,
            // QGIS would look for one in the profile, too.
            Route::Api => profile.split('/').all(|part| part != "collections"),
            _ => false,
        };
        is_served.then_some(route)
    }

    /// The whole of it again, in one spelling.
    fn whole(&self) -> String {
        match &self.profile {
            None => self.rest.clone(),
            Some(profile) if self.rest == "/ows/" => format!("{PROFILES}{profile}/"),
            Some(profile) => format!("{PROFILES}{profile}{}", self.rest),
        }
    }
}

/// A path as links have it: with py-qgis-server no slash follows a profile.
pub fn in_links<'a>(path: &'a str, apis: &[(String, String)]) -> &'a str {
    let is_profile = path.starts_with(PROFILES) && Path::of(path, apis).rest == "/ows/";
    match is_profile {
        true => path.trim_end_matches('/'),
        false => path,
    }
}

/// The profile, and what follows it: `/ows/` or OGC API Features.
fn split(rest: &str, apis: &[(String, String)]) -> (Option<String>, String) {
    let segments = rest.split('/').filter(|part| !part.is_empty());
    let whole: String = segments.flat_map(|part| ["/", part]).collect();
    let is_api = |tail: &str| {
        let stem = tail[1..].split(['/', '.']).next();
        matches!(stem, Some("wfs3" | "ogcapi")) || route::of_features(tail, apis).is_some()
    };
    let mut tails = whole.match_indices('/').map(|(at, _)| at);
    let api = tails.find(|at| is_api(&whole[*at..]));
    let (profile, api) = whole.split_at(api.unwrap_or(whole.len()));
    let profile = profile.strip_prefix('/').unwrap_or_default();
    let rest = if api.is_empty() { "/ows/" } else { api };
    (Some(profile.into()), rest.into())
}

/// What a request may do, and what goes with it.
#[derive(Debug, Default)]
pub struct Granted {
    pub request_headers: Vec<(String, String)>,
    pub response_headers: Vec<(String, String)>,
    /// Another client may have another answer, or none.
    pub is_private: bool,
    /// For the filters of the worker.
    pub visitor: Option<Visitor>,
}

/// What a body says to QGIS. A long one takes a while to look through, which nobody else
/// should wait for.
async fn said(body: &Bytes) -> Result<Said, Unclear> {
    if body.len() <= SMALL {
        return policy::said(body);
    }
    let body = body.clone();
    let looked = tokio::task::spawn_blocking(move || policy::said(&body)).await;
    looked.unwrap_or(Err(Unclear))
}

/// No cache gives to one client what another one got.
pub fn keep_private(headers: &mut HeaderMap) {
    let said = headers
        .get(CACHE_CONTROL)
        .and_then(|value| value.to_str().ok());
    let value = match said.unwrap_or_default() {
        said if said.contains("private") || said.contains("no-store") => return,
        "" => "private".to_owned(),
        said => format!(
            "private, {}",
            said.replace("public", "").trim_matches([',', ' '])
        ),
    };
    if let Ok(value) = HeaderValue::from_str(&value) {
        headers.insert(CACHE_CONTROL, value);
    }
}

impl Incomplete<'_> {
    /// Asks the rules about an OWS request, and rewrites it as they say.
    pub async fn admit(
        &self,
        method: &str,
        kvp: &mut Kvp,
        body: &Bytes,
    ) -> Result<Granted, Refusal> {
        if !self.config.has_policies() {
            return Ok(Granted::default());
        }
        let said = said(body).await.map_err(|_| Refusal::Unclear)?;
        let is_served = !body.is_empty() || self.qgis_may_answer();
        if is_served && policy::is_guessed_to_be_wms(kvp, &said) {
            kvp.set("SERVICE", "WMS");
        }
        let clear = |kvp: &Kvp| Parameters::of(kvp, &said).map_err(|_| Refusal::Unclear);
        if let Some(map) = self.one_spelling(kvp.get("MAP")) {
            kvp.set("MAP", &map);
        }
        let path = Path::of(self.parts.uri.path(), &self.config.apis);
        let map = kvp.get("MAP");
        let verdict = self.judge(method, &path, clear(kvp)?, map.as_deref());
        let mut granted = self.grant(verdict, &path, |name, value| kvp.set(name, value))?;
        if !said.pairs.is_empty() {
            // What QGIS would read in the body must not undo what was rewritten.
            clear(kvp)?;
        }
        if let Some(visitor) = &mut granted.visitor {
            visitor.said = said.pairs;
        }
        Ok(granted)
    }

    /// The same for an API, where rules can set the project and nothing else.
    pub fn admit_api(&self, method: &str, query: &mut String) -> Result<Granted, Refusal> {
        if !self.config.has_policies() {
            return Ok(Granted::default());
        }
        if let Some(map) = self.one_spelling(ows::map_of(query)) {
            *query = ows::with_map(query, &map);
        }
        let path = Path::of(self.parts.uri.path(), &self.config.apis);
        let features = route::of_features(&path.rest, &self.config.apis);
        let below = features.unwrap_or(&path.rest);
        let parameters = Parameters::of_api(query, below, features.is_some(), method);
        let map = ows::map_of(query);
        let verdict = self.judge(method, &path, parameters, map.as_deref());
        self.grant(verdict, &path, |name, value| {
            if name == "MAP" {
                *query = ows::with_map(query, value);
            }
        })
    }

    /// For filters, which look at MAP alone: the project, wherever it is named, in one
    /// spelling. None if they have it already.
    fn one_spelling(&self, map: Option<String>) -> Option<String> {
        if !self.config.filters {
            return None;
        }
        let named = map.clone().or_else(|| self.project_header());
        let named = named.or_else(|| self.config.default_project.clone());
        let project = self.project(named.as_deref()).ok().flatten();
        let spelt = match project {
            Some(project) if project.alias == self.config.default_scheme => Some(project.path),
            Some(project) => Some(project.to_string()),
            None => named,
        };
        spelt.filter(|spelt| map.as_ref() != Some(spelt))
    }

    fn judge(
        &self,
        method: &str,
        path: &Path,
        parameters: Parameters,
        map: Option<&str>,
    ) -> Verdict {
        let named = |map: Option<&str>| {
            let map = map.map(str::to_owned).or_else(|| self.project_header());
            self.project(map.as_deref()).ok().flatten()
        };
        let header = |name: &str| {
            let values = self.parts.headers.get_all(name).iter();
            let values = values.map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
            values.collect()
        };
        let subject = Subject {
            path: &path.rest,
            written: &path.written,
            profile: path.profile.as_deref(),
            method: if method == "HEAD" { "GET" } else { method },
            client: self.address,
            project: named(map),
            header: &header,
            parameters,
        };
        self.config.policies.judge(subject, named)
    }

    fn grant(
        &self,
        verdict: Verdict,
        path: &Path,
        mut set: impl FnMut(&str, &str),
    ) -> Result<Granted, Refusal> {
        if let Some(rule) = verdict.denied_by {
            tracing::info!(
                request_id = self.request_id,
                rule,
                "refused by an access policy"
            );
            return Err(Refusal::Forbidden);
        }
        if path.profile.is_some() && !verdict.knows_profile && !self.config.filters {
            return Err(Refusal::NoSuchPath);
        }
        for (name, value) in &verdict.rewritten {
            set(name, value);
        }
        Ok(Granted {
            request_headers: verdict.request_headers,
            response_headers: verdict.response_headers,
            is_private: self.config.filters || self.config.policies.tell_clients_apart(),
            visitor: self
                .config
                .filters
                .then(|| self.visitor(path, verdict.knows_profile)),
        })
    }

    fn visitor(&self, path: &Path, is_known: bool) -> Visitor {
        let headers = self.parts.headers.iter();
        let headers = headers.filter_map(|(name, value)| {
            let value = std::str::from_utf8(value.as_bytes()).ok()?;
            Some((name.as_str().to_owned(), value.to_owned()))
        });
        Visitor {
            address: self.address.to_string(),
            path: path.whole(),
            is_known,
            headers: headers.collect(),
            said: Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_has_one_spelling_and_its_rest_is_a_path_without_it() {
        for (raw, profile, rest, whole) in [
            ("/ows", None, "/ows/", "/ows/"),
            ("/ows/", None, "/ows/", "/ows/"),
            ("/wfs3/a%20b", None, "/wfs3/a b", "/wfs3/a b"),
            ("/ows/p/x", Some("x"), "/ows/", "/ows/p/x/"),
            ("/ows/p/%78/", Some("x"), "/ows/", "/ows/p/x/"),
            ("/ows/p//x//y/", Some("x/y"), "/ows/", "/ows/p/x/y/"),
            ("/ows/p/x/wfs3", Some("x"), "/wfs3", "/ows/p/x/wfs3"),
            (
                "/ows/p/x%2Fwfs3.json",
                Some("x"),
                "/wfs3.json",
                "/ows/p/x/wfs3.json",
            ),
            (
                "/ows/p/x/y/ogcapi/api",
                Some("x/y"),
                "/wfs3/api",
                "/ows/p/x/y/wfs3/api",
            ),
            ("/ows/wfs3/api", None, "/wfs3/api", "/wfs3/api"),
            ("/ows/%77fs3.json", None, "/wfs3.json", "/wfs3.json"),
            ("/ogcapi", None, "/wfs3", "/wfs3"),
            ("/ogcapix", None, "/ogcapix", "/ogcapix"),
        ] {
            let path = Path::of(raw, &apis("/wfs3"));
            assert_eq!(
                (path.profile.as_deref(), path.rest.as_str()),
                (profile, rest),
                "{raw}"
            );
            assert_eq!(path.whole(), whole, "{raw}");
        }
    }

    fn apis(features: &str) -> Vec<(String, String)> {
        vec![("wfs3".into(), features.into())]
    }

    #[test]
    fn an_api_has_one_path_where_the_settings_put_it() {
        let rest = |raw| Path::of(raw, &apis("/features/")).rest;
        for raw in [
            "/features/collections/x",
            "/ogcapi/collections/x",
            "/ows/wfs3/collections/x",
            "/ows/p/a/features/collections/x",
            "/ows/p/a/ogcapi/collections/x",
        ] {
            assert_eq!(rest(raw), "/features/collections/x", "{raw}");
        }
        assert_eq!(rest("/wfs3/x"), "/wfs3/x");
    }

    #[test]
    fn links_to_a_profile_have_no_slash_behind_it() {
        for (path, linked) in [
            ("/ows/p/all/", "/ows/p/all"),
            ("/ows/p/all", "/ows/p/all"),
            ("/ows/p/a/b//", "/ows/p/a/b"),
            ("/ows/p/all/wfs3/", "/ows/p/all/wfs3/"),
            ("/ows/", "/ows/"),
            ("/wfs3/", "/wfs3/"),
        ] {
            assert_eq!(in_links(path, &[]), linked, "{path}");
        }
    }

    #[test]
    fn a_profile_has_the_apis_that_the_settings_have() {
        let route = |raw, apis: &[_]| Path::of(raw, apis).route(apis);
        for raw in ["/ows/p/x/wfs3/collections", "/ows/p/x/ogcapi"] {
            assert_eq!(route(raw, &apis("/wfs3")), Some(Route::Api), "{raw}");
            assert_eq!(route(raw, &[]), None, "{raw}");
        }
        let elsewhere = apis("/features");
        let collections = "/ows/p/x/features/collections";
        assert_eq!(route(collections, &elsewhere), Some(Route::Api));
        assert_eq!(route("/ows/p/x/wfs3/collections", &elsewhere), None);
        assert_eq!(route("/ows/p/featuresx", &elsewhere), None);
        let hidden = "/ows/p/collections/x/items/wfs3";
        assert_eq!(route(hidden, &apis("/wfs3")), None);
        let catalog = [("landing_page".into(), "/catalog/".into())];
        assert_eq!(route("/ows/p/x/catalog", &catalog), None);
        assert_eq!(route("/ows/p/x", &catalog), Some(Route::Ows));
        assert_eq!(route("/ows/p/x/wfs3/nothing", &apis("/wfs3")), None);
    }

    #[test]
    fn what_is_private_stays_so_whatever_was_said_of_it() {
        for (said, then) in [
            (None, "private"),
            (Some("no-cache"), "private, no-cache"),
            (Some("public, max-age=9"), "private, max-age=9"),
            (Some("private"), "private"),
            (Some("no-store"), "no-store"),
        ] {
            let mut headers = HeaderMap::new();
            headers.extend(said.map(|said| (CACHE_CONTROL, HeaderValue::from_static(said))));
            keep_private(&mut headers);
            assert_eq!(headers[CACHE_CONTROL], then, "{said:?}");
        }
    }

    #[test]
    fn a_profile_leads_to_ows_or_to_an_api_and_never_to_both() {
        let route = |raw| Path::of(raw, &apis("/wfs3")).route(&apis("/wfs3"));
        assert_eq!(route("/ows/p/x"), Some(Route::Ows));
        assert_eq!(route("/ows/p/x/wfs3/collections"), Some(Route::Api));
        for raw in [
            "/ows/",
            "/ows/p/",
            "/ows/p//",
            "/ows/p/wfs3",
            "/ows/p/wfs3x",
            "/ows/p/a/ogcapix/",
            "/owsp/x",
        ] {
            assert_eq!(route(raw), None, "{raw}");
        }
    }
}
