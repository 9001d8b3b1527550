//! One request from its head to its response: route, call, answer.

use std::future::{Future, poll_fn};
use std::net::{IpAddr, SocketAddr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use hyper::body::{Body, Incoming};
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode, Version};
use tokio::time::timeout;

use super::access::{Books, Line};
use super::body::{Chunks, Content, Outgoing};
use super::caching;
use super::forwarded::{self, Base, Said};
use super::pages;
use super::policy;
use super::reply::{self, Dialect, Known, Refusal};
use super::request::{self, Asked, Held, Incomplete, Refused, Room};
use super::route::{self, Route};
use super::trace;
use super::watch::Running;
use crate::broker::{self, Call, Lost, Name, Status};
use crate::config::Http;
use crate::metrics::Metrics;
use crate::ogc::guard;
use crate::ogc::ows::Kvp;
use crate::protocol::Head;
use crate::traces::Traces;

/// What we call ourselves in each response.
pub const SERVER: &str = concat!("qgisserver/", env!("CARGO_PKG_VERSION"));

/// How long a browser may remember what OPTIONS said, in seconds.
const PREFLIGHT_AGE: &str = "3600";

/// What the front needs of the broker.
pub trait Backend: Clone + Send + Sync + 'static {
    type Body: Chunks;
    fn call(&self, call: Call) -> impl Future<Output = Result<(Head, Self::Body), Lost>> + Send;
    fn is_ready(&self) -> bool;
    /// Some worker has plugins that may answer what is no whole request.
    fn plugins_answer(&self) -> bool {
        false
    }
    fn status(&self) -> impl Future<Output = Status> + Send;
    /// Where it counts, and the front with it.
    fn metrics(&self) -> Arc<Metrics> {
        Arc::default()
    }
}

impl Backend for broker::Handle {
    type Body = broker::Body;

    async fn call(&self, call: Call) -> Result<(Head, broker::Body), Lost> {
        broker::Handle::call(self, call)
            .await
            .map(|reply| (reply.head, reply.body))
    }

    fn is_ready(&self) -> bool {
        self.is_ready()
    }

    fn plugins_answer(&self) -> bool {
        self.plugins_answer()
    }

    async fn status(&self) -> Status {
        self.status().await
    }

    fn metrics(&self) -> Arc<Metrics> {
        self.metrics().clone()
    }
}

/// Both ends of a connection.
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub client: SocketAddr,
    pub local: SocketAddr,
    pub scheme: &'static str,
}

/// The part of the server that knows no sockets.
pub struct Front<B> {
    config: Http,
    backend: B,
    room: Room,
    pub books: Books,
}

impl<B: Backend> Front<B> {
    pub fn new(config: Http, backend: B, traces: Option<Arc<Traces>>) -> Self {
        let room = Room::new(config.body_memory);
        let books = Books {
            metrics: backend.metrics(),
            slow: config.slow,
            traces,
        };
        Self {
            config,
            backend,
            room,
            books,
        }
    }

    /// The same with other settings.
    pub fn with(&self, config: Http) -> Self {
        let room = match config.body_memory == self.config.body_memory {
            true => self.room.clone(),
            // What is in the old room leaves it in time.
            false => Room::new(config.body_memory),
        };
        let books = Books {
            slow: config.slow,
            ..self.books.clone()
        };
        Self {
            config,
            backend: self.backend.clone(),
            room,
            books,
        }
    }

    /// The response to a request, whatever happens.
    pub async fn answer(
        &self,
        request: Request<Incoming>,
        peer: Peer,
        running: Running,
    ) -> Response<Outgoing<B::Body>> {
        let (parts, incoming) = request.into_parts();
        let mut line = self.line(&parts, peer);
        let request_id = line.request_id.clone();
        let mut unread = Some(incoming).filter(|body| !body.is_end_stream());
        let response = self.respond(&parts, &mut unread, peer, &mut line);
        let response = unless_panicked(response).await;
        let response = response.unwrap_or_else(|| {
            tracing::error!(request_id, "a request panicked");
            Refusal::Panicked.into_response(&dialect(self.route(&parts), &parts), None)
        });
        if unread.is_some() {
            running.leaves_unread();
        }
        let mut response = self.finish(response, &parts, line, running);
        if unread.is_some() && parts.version < Version::HTTP_2 {
            // What is left of the request would be taken for the next one.
            let close = HeaderValue::from_static("close");
            response.headers_mut().insert(header::CONNECTION, close);
        }
        response
    }

    fn client(&self, parts: &Parts, peer: Peer) -> IpAddr {
        let told = self
            .config
            .http_proxy
            .then(|| self.said(parts).client())
            .flatten();
        told.unwrap_or_else(|| peer.client.ip())
    }

    fn said<'a>(&self, parts: &'a Parts) -> Said<'a> {
        Said::new(&parts.headers, self.config.http_proxies)
    }

    /// Who takes turns with others: by address, unless a proxy knows better.
    fn client_name(&self, parts: &Parts, client: IpAddr) -> Name {
        let header = self.config.client_header.as_deref();
        let header = header.filter(|_| self.config.http_proxy);
        let told = header.and_then(|name| forwarded::name(&parts.headers, name));
        told.unwrap_or_else(|| forwarded::network(client)).into()
    }

    fn line(&self, parts: &Parts, peer: Peer) -> Line {
        let mut line = Line::new(
            request::request_id(&parts.headers),
            self.client(parts, peer),
            parts.method.clone(),
            &parts.uri,
            self.books.clone(),
        );
        line.trace = trace::of(&parts.headers);
        line.open_span();
        line
    }

    /// `incoming` is None afterwards if nothing of it is left.
    async fn respond(
        &self,
        parts: &Parts,
        incoming: &mut Option<Incoming>,
        peer: Peer,
        line: &mut Line,
    ) -> Response<Content<B::Body>> {
        let route = self.route(parts);
        let refuse = |refusal: Refusal| refusal.into_response(&dialect(route, parts), None);
        if let Err(refusal) = self.check_size(parts) {
            return refuse(refusal);
        }
        if parts.method == Method::OPTIONS && parts.uri.path() == "*" {
            // RFC 9110 clause 9.3.7: the server as a whole.
            return options(Route::Api, &parts.headers);
        }
        let Some(route) = route else {
            return refuse(Refusal::NoSuchPath);
        };
        if !route.allows(&parts.method) {
            return refuse(Refusal::Method {
                allow: route.allow(),
            });
        }
        let base = match self.base(parts, peer) {
            Ok(base) => base,
            Err(forwarded::BadHost) => return refuse(Refusal::BadHost),
        };
        if parts.method == Method::OPTIONS {
            return options(route, &parts.headers);
        }
        match route {
            Route::Root => {
                pages::root(&base.with("/"), &self.config.metadata, &self.status().await)
            }
            Route::Ping => pages::ping(),
            Route::Ready => pages::ready(self.backend.is_ready()),
            Route::Status => pages::status(&self.status().await),
            Route::Ows | Route::Api => {
                match request::body(&self.config, &self.room, &parts.headers, incoming).await {
                    Ok(held) => self.ask(route, parts, &base, held, line).await,
                    Err(refusal) => refuse(refusal),
                }
            }
        }
    }

    fn route(&self, parts: &Parts) -> Option<Route> {
        let path = parts.uri.path();
        let route = Route::of(path, &self.config.apis, self.config.status_page);
        let route = route.or_else(|| {
            self.config
                .has_profiles()
                .then(|| policy::Path::of(path, &self.config.apis).route(&self.config.apis))?
        });
        route.filter(|_| guard::is_plain_path(path))
    }

    /// A broker that does not say in time how it fares fares badly, and a page shows nothing.
    async fn status(&self) -> Status {
        timeout(self.config.request_timeout, self.backend.status())
            .await
            .unwrap_or_default()
    }

    fn check_size(&self, parts: &Parts) -> Result<(), Refusal> {
        let (uri_max, header_max) = (self.config.uri_max, self.config.header_max);
        if parts
            .uri
            .path_and_query()
            .is_some_and(|target| target.as_str().len() > uri_max)
        {
            return Err(Refusal::UriTooLong { limit: uri_max });
        }
        let size: usize = parts
            .headers
            .iter()
            .map(|(name, value)| name.as_str().len() + value.len())
            .sum();
        match size > header_max {
            true => Err(Refusal::HeadTooLarge { limit: header_max }),
            false => Ok(()),
        }
    }

    fn base(&self, parts: &Parts, peer: Peer) -> Result<Base, forwarded::BadHost> {
        let local = peer.local.to_string();
        let base = Base::direct(
            peer.scheme,
            &parts.uri,
            parts.version,
            &parts.headers,
            &local,
        )?;
        if !self.config.http_proxy {
            return Ok(base);
        }
        let fixed = self.config.proxy_url.as_deref();
        let base = base.behind_proxy(fixed, parts.uri.path(), self.said(parts));
        // Many a proxy passes such a header on from the client, and QGIS would look for
        // an API in it, whatever our rules know about the path that is asked for.
        let apis = &self.config.apis;
        let is_api = fixed.is_none() && base.paths().any(|path| route::names_an_api(path, apis));
        Ok(if is_api { base.at_root() } else { base })
    }

    /// What a worker says.
    async fn ask(
        &self,
        route: Route,
        parts: &Parts,
        base: &Base,
        held: Held,
        line: &mut Line,
    ) -> Response<Content<B::Body>> {
        line.received = held.body.len() as u64;
        let request = Incomplete {
            config: &self.config,
            parts,
            base,
            request_id: &line.request_id,
            trace: line.trace.as_ref(),
            client: self.client_name(parts, line.client),
            address: line.client,
            plugins_answer: self.backend.plugins_answer(),
        };
        let asked = if route == Route::Ows {
            request.ows(held.body.clone()).await
        } else {
            request.api(held.body.clone()).await
        };
        let Asked {
            call,
            kind,
            form,
            map,
            dialect,
            headers,
            is_private,
        } = match asked {
            Ok(asked) => asked,
            Err(Refused {
                refusal,
                dialect,
                map,
            }) => return refusal.into_response(&dialect, map.as_deref()),
        };
        (line.kind, line.form, line.called) = (kind, form, Some(Instant::now()));
        line.wait = Some(call.wait.clone());
        match route {
            Route::Ows if line.form.is_none() => line.keep_xml(&held.body),
            Route::Api => line.keep_json(&parts.headers, &held.body),
            _ => {}
        }
        let has_project = call.project.is_some();
        let is_posted = route == Route::Api && parts.method == Method::POST;
        let posted = is_posted.then(|| call.url.clone());
        let replied = self.backend.call(call).await;
        let known = match &replied {
            Ok((_, body)) => Known::of(body),
            Err(lost) => {
                line.failure = Some(lost.error.reason());
                Known::of_lost(lost)
            }
        };
        let replied = replied.map_err(Refusal::from);
        let response =
            replied.and_then(|(head, body)| reply::from_qgis(head, body, &line.request_id));
        let response = match response {
            Err(refusal) => refusal.into_response(&dialect, map.as_deref()),
            Ok(response)
                if route == Route::Ows
                    && !has_project
                    && !self.config.qgis_refusals
                    && reply::is_of_no_api(&response) =>
            {
                Refusal::NoProject.into_response(&dialect, None)
            }
            Ok(response) if route == Route::Ows => with_map_id(response, map.as_deref()),
            Ok(response) if reply::is_of_no_api(&response) => {
                Refusal::NoSuchPath.into_response(&dialect, None)
            }
            Ok(mut response) => {
                caching::vary_by_accept(response.headers_mut());
                if let Some(url) = posted {
                    reply::mend_location(response.headers_mut(), &url);
                }
                with_map_id(response, map.as_deref())
            }
        };
        let mut response = with_headers(response, &headers);
        response.extensions_mut().insert(known);
        if is_private {
            policy::keep_private(response.headers_mut());
        }
        response
    }

    /// What every response has.
    fn finish(
        &self,
        response: Response<Content<B::Body>>,
        parts: &Parts,
        mut line: Line,
        running: Running,
    ) -> Response<Outgoing<B::Body>> {
        let (mut head, mut content) = response.into_parts();
        let headers = &mut head.headers;
        headers.insert(header::SERVER, HeaderValue::from_static(SERVER));
        headers.insert(
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        );
        if let Ok(id) = HeaderValue::from_str(&line.request_id) {
            headers.insert("x-request-id", id);
        }
        self.share(&parts.headers, headers);
        if let Some(length) = content.len().filter(|_| reply::may_have_body(head.status)) {
            headers.insert(header::CONTENT_LENGTH, length.into());
        }
        if parts.method == Method::HEAD {
            // Dropping a stream here cancels its request.
            content = Content::empty();
        }
        line.status = head.status.as_u16();
        line.answered = Some(Instant::now());
        let known: Known = head.extensions.remove().unwrap_or_default();
        (line.queued, line.load, line.render) = (known.queued, known.load, known.render);
        if self.config.server_timing
            && let Some(timing) = known.server_timing()
        {
            head.headers.append("server-timing", timing);
        }
        Response::from_parts(head, Outgoing::new(content, line, running))
    }

    /// CORS. A cache may keep what is said here for a request without an Origin
    /// and give it to one that has it, so it is the same or says that it varies.
    fn share(&self, request: &HeaderMap, response: &mut HeaderMap) {
        if self.config.cross_origin {
            let all = HeaderValue::from_static("*");
            response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, all.clone());
            if self.config.server_timing {
                // Otherwise browsers keep Server-Timing from scripts of other sites.
                response.insert("timing-allow-origin", all);
            }
            return;
        }
        response.append(header::VARY, HeaderValue::from_static("Origin"));
        if let Some(origin) = request.get(header::ORIGIN) {
            response.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin.clone());
        }
    }
}

fn dialect(route: Option<Route>, parts: &Parts) -> Dialect {
    match route {
        Some(Route::Ows) => {
            let kvp = Kvp::parse(parts.uri.query().unwrap_or_default());
            request::ows_dialect(&kvp, None, false)
        }
        _ => Dialect::Problem,
    }
}

/// OPTIONS asks about us, not about a project: no worker sees it.
fn options<C>(route: Route, request: &HeaderMap) -> Response<Content<C>> {
    let mut response = Response::new(Content::empty());
    let allow = HeaderValue::from_static(route.allow());
    let headers = response.headers_mut();
    headers.insert(header::ALLOW, allow.clone());
    let asked = request.get(header::ACCESS_CONTROL_REQUEST_HEADERS).cloned();
    let default = HeaderValue::from_static("Authorization, Content-Type");
    headers.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        asked.unwrap_or(default),
    );
    if request.contains_key(header::ORIGIN) {
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, allow);
        headers.insert(
            header::ACCESS_CONTROL_MAX_AGE,
            HeaderValue::from_static(PREFLIGHT_AGE),
        );
    }
    *response.status_mut() = StatusCode::OK;
    response
}

/// Caches in front of us purge by this name.
fn with_map_id<T>(mut response: Response<T>, map: Option<&str>) -> Response<T> {
    if let Some(map) = map {
        response
            .headers_mut()
            .insert("x-map-id", reply::map_id(map));
    }
    response
}

/// What the operator's policies add.
fn with_headers<T>(mut response: Response<T>, headers: &[(String, String)]) -> Response<T> {
    for (name, value) in headers {
        let name = HeaderName::try_from(name.as_str());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// None when `future` panicked. The panic's own message is in the log already.
async fn unless_panicked<F: Future>(future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(
        move |cx| match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(cx))) {
            Ok(poll) => poll.map(Some),
            Err(_) => Poll::Ready(None),
        },
    )
    .await
}
