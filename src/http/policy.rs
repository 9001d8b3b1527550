//! Access policies on the way of a request: its profile, and what the rules make of it.
//!
//! Rules of the settings are asked here (`ogc/policy.rs`). Filters in Python run in the
//! worker, which is told what they want to know of a client.

use bytes::Bytes;
use hyper::header::{CACHE_CONTROL, HeaderMap, HeaderValue};
use percent_encoding::percent_decode_str;

use super::reply::Refusal;
use super::request::{Incomplete, SMALL};
use super::route::Route;
use crate::config::Http;
use crate::ogc::ows::{self, Kvp};
use crate::ogc::policy::{self, Parameters, Said, Subject, Unclear, Verdict};
use crate::protocol::Visitor;

const PROFILES: &str = "/ows/p/";

/// A path as policies see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    /// Of `/ows/p/<profile>/`, which may have several segments.
    pub profile: Option<String>,
    /// Without the profile; `/ows/` for `/ows`.
    pub rest: String,
}

impl Path {
    /// `raw` is known to decode to text. `/ows` and `/ows/` are the same, and so are all
    /// encodings of a profile.
    pub fn of(raw: &str) -> Self {
        let path = percent_decode_str(raw).decode_utf8_lossy().into_owned();
        if path == "/ows" {
            let (profile, rest) = (None, "/ows/".into());
            return Self { profile, rest };
        }
        let Some(rest) = path.strip_prefix(PROFILES) else {
            let (profile, rest) = (None, path);
            return Self { profile, rest };
        };
        let segments: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
        let api = segments.iter().position(|part| is_api(part));
        let (profile, api) = segments.split_at(api.unwrap_or(segments.len()));
        Self {
            profile: Some(profile.join("/")),
            rest: match api {
                [] => "/ows/".into(),
                api => format!("/{}", api.join("/")),
            },
        }
    }

    /// Whose it is, if it is the path of a profile.
    pub fn route(&self) -> Option<Route> {
        let profile = self
            .profile
            .as_ref()
            .filter(|profile| !profile.is_empty())?;
        // QGIS looks for the names of its APIs anywhere in a path.
        let is_odd = |part: &str| part.starts_with("wfs3") || part.starts_with("ogcapi");
        match self.rest == "/ows/" {
            _ if profile.split('/').any(is_odd) => None,
            true => Some(Route::Ows),
            false => Some(Route::Api),
        }
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

/// The root of an API of QGIS that profiles may have.
fn is_api(part: &str) -> bool {
    matches!(part.split('.').next(), Some("wfs3" | "ogcapi"))
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

/// What a body says to QGIS, where somebody wants to know. A long one takes a while to
/// look through, which nobody else should wait for.
pub async fn said(config: &Http, body: &Bytes) -> Result<Said, Unclear> {
    if config.policies.is_empty() && !config.filters {
        return Ok(Said::default());
    }
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
    pub fn admit(&self, method: &str, kvp: &mut Kvp, has_body: bool) -> Result<Granted, Refusal> {
        if self.config.policies.is_empty() && !self.config.filters {
            return Ok(Granted::default());
        }
        let nothing = Said::default();
        let said = match &self.said {
            Ok(said) if has_body => said,
            Err(Unclear) if has_body => return Err(Refusal::Unclear),
            _ => &nothing,
        };
        let is_served = has_body || self.plugins_answer || self.config.filters;
        if is_served && policy::is_guessed_to_be_wms(kvp, said) {
            kvp.set("SERVICE", "WMS");
        }
        let clear = |kvp: &Kvp| Parameters::of(kvp, said).map_err(|_| Refusal::Unclear);
        if let Some(map) = self.one_spelling(kvp.get("MAP")) {
            kvp.set("MAP", &map);
        }
        let path = Path::of(self.parts.uri.path());
        let map = kvp.get("MAP");
        let verdict = self.judge(method, &path, clear(kvp)?, map.as_deref());
        let mut granted = self.grant(verdict, &path, |name, value| kvp.set(name, value))?;
        if let Some(visitor) = &mut granted.visitor {
            visitor.said = said.pairs.clone();
        }
        // What QGIS would read in the body must not undo what was rewritten.
        clear(kvp)?;
        Ok(granted)
    }

    /// The same for an API, where rules can set the project and nothing else.
    pub fn admit_api(&self, method: &str, query: &mut String) -> Result<Granted, Refusal> {
        if self.config.policies.is_empty() && !self.config.filters {
            return Ok(Granted::default());
        }
        if let Some(map) = self.one_spelling(ows::map_of(query)) {
            *query = ows::with_map(query, &map);
        }
        let path = Path::of(self.parts.uri.path());
        let parameters = Parameters::of_api(query, &path.rest, method);
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
        let named = map.clone().or_else(|| self.project_header());
        let named = named.or_else(|| self.config.default_project.clone());
        let project = self.project(named.as_deref()).ok().flatten();
        let spelt = match project {
            Some(project) if project.alias == self.config.default_scheme => Some(project.path),
            Some(project) => Some(project.to_string()),
            None => named,
        };
        spelt.filter(|spelt| self.config.filters && map.as_ref() != Some(spelt))
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
                "/ogcapi/api",
                "/ows/p/x/y/ogcapi/api",
            ),
        ] {
            let path = Path::of(raw);
            assert_eq!(
                (path.profile.as_deref(), path.rest.as_str()),
                (profile, rest),
                "{raw}"
            );
            assert_eq!(path.whole(), whole, "{raw}");
        }
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
        let route = |raw| Path::of(raw).route();
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
