//! An HTTP request as a call on a worker.

use std::borrow::Cow;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::net::IpAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt;
use hyper::Method;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap};
use hyper::http::request::Parts;
use percent_encoding::percent_decode_str;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::caching;
use super::form::{self, FIELDS_MAX, FORM_MAX};
use super::forwarded::Base;
use super::reply::{Dialect, Refusal};
use super::{policy, route, work};
use crate::broker::{Call, Name, Wait, Work};
use crate::config::Http;
use crate::metrics::Kind;
use crate::ogc::{guard, ows};
use crate::protocol::{CATALOG, Document, HEAD_MAX, ProjectRef, Trace, Visitor};

/// A longer or stranger `X-Request-Id` is replaced.
const REQUEST_ID_MAX: usize = 128;

/// Room for bodies is given in pieces of this size.
const ROOM_UNIT: usize = 1 << 10;

/// Bodies up to this need no room: those who hold it all cannot keep small
/// requests out, and `connections_max` bounds the sum of these.
pub const SMALL: usize = 64 << 10;

/// What the head of a message has besides URL, headers and project.
const HEAD_REST: usize = 4 << 10;

/// By which a worker names itself when QGIS asks for a layer in it.
const CAUSE: &str = "x-qgisserver-worker";

/// Headers that always reach QGIS, besides those that the operator allows.
const TO_QGIS: [&str; 3] = ["accept", "content-type", "if-none-match"];

/// What the front knows about a request for a worker.
pub struct Asked {
    pub call: Call,
    pub kind: Kind,
    /// The parameters of a form that came as body.
    pub form: Option<String>,
    /// MAP as the client wrote it.
    pub map: Option<String>,
    pub dialect: Dialect,
    /// What policies add to the response.
    pub headers: Vec<(String, String)>,
    /// They tell clients apart.
    pub is_private: bool,
}

/// A request that no worker sees.
pub struct Refused {
    pub refusal: Refusal,
    pub dialect: Dialect,
    pub map: Option<String>,
}

/// Everything about a request but its route.
pub struct Incomplete<'a> {
    pub config: &'a Http,
    pub parts: &'a Parts,
    pub base: &'a Base,
    pub request_id: &'a str,
    pub trace: Option<&'a Trace>,
    pub client: Name,
    pub address: IpAddr,
    /// Some worker has plugins that may answer what is no whole request.
    pub plugins_answer: bool,
}

/// The id that the client gave, if it can stand in logs and headers, or a new one.
pub fn request_id(headers: &HeaderMap) -> String {
    let given = headers
        .get("x-request-id")
        .and_then(|value| value.to_str().ok());
    let is_sane = |id: &&str| {
        (1..=REQUEST_ID_MAX).contains(&id.len()) && id.bytes().all(|byte| byte.is_ascii_graphic())
    };
    given
        .filter(is_sane)
        .map_or_else(|| new_id().to_string(), str::to_owned)
}

/// Random enough to be the only one, and to ask the kernel for each would cost more.
fn new_id() -> Uuid {
    let half = || RandomState::new().build_hasher().finish();
    let bytes = (u128::from(half()) << 64 | u128::from(half())).to_ne_bytes();
    uuid::Builder::from_random_bytes(bytes).into_uuid()
}

/// Memory for the bodies of all requests that no worker has answered yet.
#[derive(Debug, Clone)]
pub struct Room(Arc<Semaphore>);

impl Room {
    pub fn new(bytes: usize) -> Self {
        let units = bytes.div_ceil(ROOM_UNIT);
        Self(Arc::new(Semaphore::new(units.min(Semaphore::MAX_PERMITS))))
    }
}

/// A body that has its room in memory as long as this lives.
#[derive(Debug, Default)]
pub struct Held {
    pub body: Bytes,
    permit: Option<OwnedSemaphorePermit>,
}

impl Held {
    /// Takes room for `bytes` in all.
    fn grow(&mut self, room: &Room, bytes: usize) -> Result<(), Refusal> {
        if bytes <= SMALL {
            return Ok(());
        }
        let has = self
            .permit
            .as_ref()
            .map_or(0, OwnedSemaphorePermit::num_permits);
        let more = u32::try_from(bytes.div_ceil(ROOM_UNIT).saturating_sub(has)).unwrap_or(u32::MAX);
        let more = room
            .0
            .clone()
            .try_acquire_many_owned(more)
            .map_err(|_| Refusal::NoRoom)?;
        match &mut self.permit {
            Some(permit) => permit.merge(more),
            None => self.permit = Some(more),
        }
        Ok(())
    }
}

/// The whole body, or why not; then what is left of it stays there.
pub async fn body(
    config: &Http,
    room: &Room,
    headers: &HeaderMap,
    unread: &mut Option<Incoming>,
) -> Result<Held, Refusal> {
    let Some(incoming) = unread else {
        return Ok(Held::default());
    };
    let after = config.body_timeout;
    let progress = (after.as_secs_f64() * config.body_rate_min as f64) as usize;
    let end = Instant::now() + config.body_time_max;
    // Whoever announces too much is told before anything is read. What starts with
    // `<` may yet be XML.
    let mut limit = form::limit(headers, b"<", config.body_max);
    if incoming.size_hint().lower() > limit as u64 {
        return Err(Refusal::BodyTooLarge { limit });
    }
    let (mut held, mut whole, mut goal) = (Held::default(), BytesMut::new(), progress);
    let mut deadline = end.min(Instant::now() + after);
    loop {
        let frame = timeout_at(deadline, incoming.frame()).await;
        let Some(frame) = frame.map_err(|_| Refusal::BodyTimedOut)? else {
            *unread = None;
            return Ok(Held {
                body: whole.freeze(),
                ..held
            });
        };
        let Ok(data) = frame.map_err(|_| Refusal::BodyBroken)?.into_data() else {
            continue;
        };
        let length = whole.len() + data.len();
        if length > limit {
            return Err(Refusal::BodyTooLarge { limit });
        }
        held.grow(room, length)?;
        whole.extend_from_slice(&data);
        limit = form::limit(headers, &whole, config.body_max);
        let announced = length as u64 + incoming.size_hint().lower();
        if announced > limit as u64 {
            return Err(Refusal::BodyTooLarge { limit });
        }
        if length >= goal {
            goal = length + progress;
            deadline = end.min(Instant::now() + after);
        }
    }
}

/// A long body takes a while to look through, which nobody else should wait for.
async fn is_api_body(kind: &str, body: Bytes) -> bool {
    if body.len() <= SMALL {
        return guard::is_api_body(kind, &body);
    }
    let kind = kind.to_owned();
    let looked = tokio::task::spawn_blocking(move || guard::is_api_body(&kind, &body));
    looked.await.unwrap_or(false)
}

/// How the client wants to be refused: by what the query says or, for XML, the body.
pub fn ows_dialect(kvp: &ows::Kvp, root: Option<&ows::Root>, by_qgis: bool) -> Dialect {
    let of_root = |get: fn(&ows::Root) -> &Option<String>| root.and_then(|root| get(root).clone());
    Dialect::Ows {
        service: kvp.get("SERVICE").or_else(|| of_root(|root| &root.service)),
        version: kvp
            .get("VERSION")
            .or_else(|| kvp.get("ACCEPTVERSIONS"))
            .or_else(|| of_root(|root| &root.version)),
        by_qgis,
    }
}

impl Incomplete<'_> {
    /// To what is no request for a service: plugins may make one of it, policies as well,
    /// or the operator wants QGIS's own words.
    pub fn qgis_may_answer(&self) -> bool {
        self.plugins_answer || self.config.filters || self.config.qgis_refusals
    }

    /// A request for `/ows/`. A form becomes part of the query, and its POST a GET.
    pub async fn ows(&self, mut body: Bytes) -> Result<Asked, Refused> {
        let mut kvp = ows::Kvp::parse(self.query());
        let is_post = self.parts.method == Method::POST;
        let form = is_post
            .then(|| form::of(&self.parts.headers, &body))
            .flatten();
        let is_form = form.is_some();
        let is_absurd = form.as_deref().is_some_and(form::has_too_many_fields);
        if let Some(form) = form {
            if !is_absurd {
                kvp.merge(&form);
            }
            body = Bytes::new();
        }
        if !is_post {
            // QGIS reads the body of a POST and of nothing else.
            body = Bytes::new();
        }
        let listed = self.listed();
        if let Some(listed) = &listed {
            // The path has the last word, and policies look at MAP.
            kvp.set("MAP", &listed.to_string());
        }
        let root = ows::root(&body);
        let mut map = kvp.get("MAP").or_else(|| self.project_header());
        let mut dialect = ows_dialect(&kvp, root.as_ref(), self.config.qgis_refusals);
        let refused = |refusal| Refused {
            refusal,
            dialect: dialect.clone(),
            map: map.clone(),
        };
        if is_absurd {
            return Err(refused(Refusal::TooManyFields { limit: FIELDS_MAX }));
        }
        let method = if is_form {
            Method::GET
        } else {
            self.parts.method.clone()
        };
        let granted = self.admit(method.as_str(), &mut kvp, &body).await;
        let granted = granted.map_err(refused)?;
        map = kvp.get("MAP").or_else(|| self.project_header());
        dialect = ows_dialect(&kvp, root.as_ref(), self.config.qgis_refusals);
        let refused = |refusal| Refused {
            refusal,
            dialect: dialect.clone(),
            map: map.clone(),
        };
        let may_be_part = self.qgis_may_answer();
        // The rest of an XML request stands in its body, where only QGIS looks.
        if body.is_empty() && !may_be_part {
            for parameter in ["SERVICE", "REQUEST"] {
                kvp.get(parameter)
                    .ok_or_else(|| refused(Refusal::Missing { parameter }))?;
            }
        }
        let project = self.project(map.as_deref()).map_err(refused)?;
        if project.is_none() && (!may_be_part || listed.is_some()) {
            return Err(refused(Refusal::NoProject));
        }
        let named = kvp.get("REQUEST").map(|name| ows::operation(&name));
        let in_body = root.map(|root| root.operation);
        let may_cancel = match is_post {
            true => only_reads(named.as_deref(), in_body.as_deref(), body.is_empty()),
            false => named.as_deref().is_none_or(ows::is_read_only),
        };
        let operation = named
            .or(in_body)
            .unwrap_or_else(|| self.parts.method.to_string());
        let service = match &dialect {
            Dialect::Ows { service, .. } => service.as_deref(),
            Dialect::Problem => None,
        };
        let kind = Kind::ows(service, &operation);
        let work = work::of(&kvp, &operation);
        if listed.is_some() && granted.visitor.is_none() {
            // QGIS would repeat it in its links, which have the path.
            kvp.set("MAP", "");
        }
        let query = kvp.to_query();
        let form = is_form.then(|| query.clone());
        // Without a service QGIS looks for an API, at any address that we tell it.
        let names_service = kvp
            .get("SERVICE")
            .is_some_and(|name| !name.trim().is_empty());
        let base = self.base_by(&granted.request_headers);
        let base = match names_service && body.is_empty() {
            true => base,
            false => Cow::Owned(base.below_prefix()),
        };
        let mut call = self.call(&base, method, query, body, project, operation);
        self.add(&mut call, granted.request_headers, granted.visitor);
        call.document = self.document(caching::of_ows(&call.operation), &call);
        call.work = work;
        call.retry = !is_post && may_cancel;
        call.cancel = self.ends_with_client(&call.operation, may_cancel);
        if !fits(&call) {
            let limit = self.config.header_max;
            return Err(refused(match is_form {
                true => Refusal::FormTooLarge { limit: FORM_MAX },
                false => Refusal::HeadTooLarge { limit },
            }));
        }
        Ok(Asked {
            call,
            kind,
            form,
            map,
            dialect,
            headers: granted.response_headers,
            is_private: granted.is_private,
        })
    }

    /// A request for an API, which keeps its own grammar.
    pub async fn api(&self, body: Bytes) -> Result<Asked, Refused> {
        let mut query = ows::api_query(self.query());
        let listed = self.listed();
        if let Some(listed) = &listed {
            query = ows::with_map(&query, &listed.to_string());
        }
        let granted = self.admit_api(self.parts.method.as_str(), &mut query);
        let map = ows::map_of(&query).or_else(|| self.project_header());
        let refused = |refusal| Refused {
            refusal,
            dialect: Dialect::Problem,
            map: map.clone(),
        };
        let granted = granted.map_err(refused)?;
        let kind = self
            .parts
            .headers
            .get(CONTENT_TYPE)
            .and_then(|kind| kind.to_str().ok());
        if !is_api_body(kind.unwrap_or_default(), body.clone()).await {
            return Err(refused(Refusal::BodyType));
        }
        let project = self.project(map.as_deref()).map_err(refused)?;
        if listed.is_some() {
            if project.is_none() {
                return Err(refused(Refusal::NoProject));
            }
            if granted.visitor.is_none() {
                query = ows::with_map(&query, "");
            }
        }
        let method = self.parts.method.clone();
        let may_repeat = matches!(method, Method::GET | Method::HEAD);
        let operation = ows::operation(self.parts.uri.path());
        let base = self.base_by(&granted.request_headers);
        let mut call = self.call(&base, method, query, body, project, operation);
        self.add(&mut call, granted.request_headers, granted.visitor);
        let path = self.parts.uri.path();
        let kind = caching::of_api(path, &self.config.apis, call.project.is_some());
        call.document = self.document(kind, &call);
        call.retry = may_repeat;
        call.cancel = self.ends_with_client(&call.operation, may_repeat);
        if !fits(&call) {
            let limit = self.config.header_max;
            return Err(refused(Refusal::HeadTooLarge { limit }));
        }
        Ok(Asked {
            call,
            kind: Kind::api(self.parts.uri.path()),
            form: None,
            map,
            dialect: Dialect::Problem,
            headers: granted.response_headers,
            is_private: granted.is_private,
        })
    }

    fn document(&self, kind: Option<caching::Kind>, call: &Call) -> Option<Document> {
        let (method, headers) = (&self.parts.method, &self.parts.headers);
        caching::document(kind, method, headers, &call.headers)
    }

    /// Whether it is cancelled when its client leaves, or runs on for its side effects.
    fn ends_with_client(&self, operation: &str, only_reads: bool) -> bool {
        let runs_on = |name: &String| name.eq_ignore_ascii_case(operation);
        let config = self.config;
        (only_reads || config.cancel_writes) && !config.run_on.iter().any(runs_on)
    }

    /// What a worker of ours says of itself when it asks for a layer.
    fn cause(&self) -> Option<String> {
        let instance = self.parts.headers.get(CAUSE)?.to_str().ok()?;
        Some(instance.to_owned())
    }

    fn query(&self) -> &str {
        self.parts.uri.query().unwrap_or_default()
    }

    pub fn project_header(&self) -> Option<String> {
        let value = self.parts.headers.get("x-qgis-project")?;
        let name = String::from_utf8_lossy(value.as_bytes()).trim().to_owned();
        (!name.is_empty()).then_some(name)
    }

    /// None when nobody names a project.
    pub fn project(&self, map: Option<&str>) -> Result<Option<ProjectRef>, Refusal> {
        match map.or(self.config.default_project.as_deref()) {
            None => Ok(None),
            Some(map) => self
                .listed_as(map)
                .or_else(|| guard::project(map, self.schemes()))
                .map(Some)
                .ok_or_else(Refusal::project_not_found),
        }
    }

    /// The project of the catalogue whose path this is.
    fn listed(&self) -> Option<ProjectRef> {
        let path = percent_decode_str(self.parts.uri.path()).decode_utf8_lossy();
        let listed = route::listed(&path, &self.config.apis)?;
        Some(ProjectRef {
            alias: CATALOG.into(),
            path: listed.id.into(),
        })
    }

    /// The same if `map` says so, too: a policy may have made another one of it.
    fn listed_as(&self, map: &str) -> Option<ProjectRef> {
        // Nearly no request is for one of them.
        let listed = map.starts_with(CATALOG).then(|| self.listed())?;
        listed.filter(|listed| listed.to_string() == map)
    }

    fn schemes(&self) -> guard::Schemes<'_> {
        guard::Schemes {
            default: &self.config.default_scheme,
            known: self.config.schemes.as_deref(),
        }
    }

    fn call(
        &self,
        base: &Base,
        method: Method,
        query: String,
        body: Bytes,
        project: Option<ProjectRef>,
        operation: String,
    ) -> Call {
        let path = ows::tidy(self.parts.uri.path().as_bytes());
        let path = policy::in_links(&path, &self.config.apis);
        let separator = if query.is_empty() { "" } else { "?" };
        // QGIS makes the body of a HEAD like that of a GET; the front keeps it back.
        let method = if method == Method::HEAD {
            Method::GET
        } else {
            method
        };
        Call {
            request_id: self.request_id.to_owned(),
            method: method.to_string(),
            url: format!("{}{separator}{query}", base.with(path)),
            headers: self.headers(base, path, body.is_empty()),
            body,
            project,
            operation,
            retry: false,
            cancel: false,
            timeout: self.config.request_timeout,
            trace: self.trace.cloned(),
            document: None,
            client: self.client.clone(),
            work: Work::default(),
            cause: self.cause(),
            visitor: None,
            wait: Wait::since(Instant::now().into_std()),
        }
    }

    /// Where we are: rules of the operator go before what proxies say.
    fn base_by(&self, of_rules: &[(String, String)]) -> Cow<'_, Base> {
        let is_address = |name: &str| name.eq_ignore_ascii_case("x-forwarded-url");
        let said = of_rules.iter().rfind(|(name, _)| is_address(name));
        match said.and_then(|(_, url)| Base::of_url(url)) {
            Some(base) => Cow::Owned(base),
            None => Cow::Borrowed(self.base),
        }
    }

    /// What policies say goes before what the client says.
    fn add(&self, call: &mut Call, headers: Vec<(String, String)>, visitor: Option<Visitor>) {
        for (name, value) in headers {
            let name = title_case(&name.to_ascii_lowercase());
            call.headers.retain(|(known, _)| *known != name);
            call.headers.push((name, value));
        }
        call.visitor = visitor;
    }

    /// Only what is meant for QGIS, in Title-Case because it looks nowhere else.
    /// Host and its like agree with the URL: QGIS prefers them to it.
    fn headers(&self, base: &Base, path: &str, is_bodiless: bool) -> Vec<(String, String)> {
        let mut out = vec![
            ("Host".to_owned(), base.authority.clone()),
            ("X-Request-Id".to_owned(), self.request_id.to_owned()),
            ("X-Qgis-Forwarded-Url".to_owned(), base.with(path)),
        ];
        if self.config.http_proxy {
            out.push(("X-Forwarded-Host".to_owned(), base.authority.clone()));
            out.push(("X-Forwarded-Proto".to_owned(), base.scheme.clone()));
        }
        // A rule may say where we are, too.
        if !base.prefix.is_empty() {
            out.push(("X-Forwarded-Prefix".to_owned(), base.prefix.clone()));
        }
        if let Some(Trace { parent, state }) = self.trace {
            out.push(("Traceparent".to_owned(), parent.clone()));
            let state = state.clone().map(|state| ("Tracestate".to_owned(), state));
            out.extend(state);
        }
        for name in self.parts.headers.keys().map(|name| name.as_str()) {
            if self.reaches_qgis(name) && !(is_bodiless && name == "content-type") {
                out.extend(self.joined(name).map(|value| (title_case(name), value)));
            }
        }
        out
    }

    fn reaches_qgis(&self, name: &str) -> bool {
        if name == "x-qgis-forwarded-url" {
            return false;
        }
        // Whoever may set these sets the addresses in capabilities.
        if name.starts_with("x-qgis-") && name.ends_with("-url") || name == "x-forwarded-for" {
            return self.config.http_proxy;
        }
        let is_allowed = |prefix: &String| !prefix.is_empty() && name.starts_with(prefix.as_str());
        TO_QGIS.contains(&name)
            || self.config.allow_headers.iter().any(is_allowed) && !is_ours(name)
    }

    /// All values of a header as one; None when one is no text.
    fn joined(&self, name: &str) -> Option<String> {
        let values = self.parts.headers.get_all(name).iter();
        let values: Option<Vec<&str>> = values
            .map(|value| std::str::from_utf8(value.as_bytes()).ok())
            .collect();
        values.map(|values| values.join(", "))
    }
}

/// Whether a POST asks for nothing but reading. QGIS may execute what the query
/// names or what the body does, so both have to; a body that says nothing to us
/// may say something to QGIS.
fn only_reads(named: Option<&str>, in_body: Option<&str>, is_bodiless: bool) -> bool {
    named.is_none_or(ows::is_read)
        && match in_body {
            Some(operation) => ows::is_read(operation),
            None => is_bodiless && named.is_some(),
        }
}

/// Whether a message can carry the head of `call`. In JSON a byte of a header or
/// a name takes two at most, that of an URL one.
fn fits(call: &Call) -> bool {
    let size = |pairs: &[(String, String)]| -> usize {
        let sizes = pairs.iter();
        let sizes = sizes.map(|(name, value)| 2 * (name.len() + value.len()) + 8);
        sizes.sum()
    };
    let headers = size(&call.headers);
    let project = call.project.as_ref().map_or(0, |it| 2 * it.path.len());
    let visitor = call.visitor.as_ref().map_or(0, |it| {
        size(&it.headers) + size(&it.said) + 2 * it.path.len()
    });
    // Its basis repeats headers, and its tags were one.
    let document = call.document.as_ref().map_or(0, |_| 2 * headers);
    call.url.len() + headers + project + visitor + document + HEAD_REST <= HEAD_MAX
}

/// Written by the front, whatever the operator's prefixes let through.
fn is_ours(name: &str) -> bool {
    matches!(
        name,
        "host"
            | "x-request-id"
            | "forwarded"
            | "x-forwarded-host"
            | "x-forwarded-prefix"
            | "x-forwarded-proto"
            | "traceparent"
            | "tracestate"
            | CAUSE
    )
}

/// `x-qgis-project` as `X-Qgis-Project`.
fn title_case(name: &str) -> String {
    let mut upper = true;
    let title = |c: char| {
        let c = if upper { c.to_ascii_uppercase() } else { c };
        upper = c == '-';
        c
    };
    name.chars().map(title).collect()
}
