//! Failures and replies as HTTP: the only table of statuses.

use std::borrow::Cow;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use hyper::header::{self, HeaderMap, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};

use super::body::{Chunks, Content};
use super::caching;
use crate::broker::{Error, Lost};
use crate::ogc::exception::{self, Exception};
use crate::protocol::{Failure, Head, Timings};

/// Why there is no reply from QGIS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// What came is no request.
    NoHttp,
    /// For its size, by hyper, which does not say which.
    HeadRefused {
        bytes: usize,
        fields: usize,
    },
    NoSuchPath,
    Method {
        allow: &'static str,
    },
    BadHost,
    UriTooLong {
        limit: usize,
    },
    HeadTooLarge {
        limit: usize,
    },
    BodyTooLarge {
        limit: usize,
    },
    /// Percent-encoded, as QGIS wants them.
    FormTooLarge {
        limit: usize,
    },
    TooManyFields {
        limit: usize,
    },
    BodyTimedOut,
    BodyBroken,
    /// No API of QGIS takes such a body.
    BodyType,
    /// The bodies of other requests take all the memory there is for them.
    NoRoom,
    Missing {
        parameter: &'static str,
    },
    NoProject,
    /// A rule of the operator.
    Forbidden,
    /// Rules cannot tell what QGIS would read in it.
    Unclear,
    Panicked,
    Broker(Error),
}

/// Who reads the refusal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Dialect {
    /// RFC 9457.
    #[default]
    Problem,
    Ows {
        service: Option<String>,
        version: Option<String>,
        /// Where QGIS has words of its own, it is these (`server.qgis_refusals`).
        by_qgis: bool,
    },
}

/// What is said about a refusal.
struct Facts {
    status: StatusCode,
    /// OGC exception code.
    code: &'static str,
    /// The parameter that is to blame.
    locator: Option<&'static str>,
    text: String,
    retry_after: Option<u32>,
}

/// Names of projects in texts are cut here.
const NAME_MAX: usize = 200;

/// Headers of one hop, and those that are ours to write.
const NOT_FROM_QGIS: [&str; 14] = [
    "connection",
    "content-length",
    "date",
    "keep-alive",
    "proxy-authenticate",
    "proxy-connection",
    "server",
    "status",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-map-id",
    "x-request-id",
];

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Broker(error)
    }
}

impl From<Lost> for Refusal {
    fn from(lost: Lost) -> Self {
        Self::Broker(lost.error)
    }
}

impl Refusal {
    pub fn project_not_found() -> Self {
        Self::Broker(Error::Failed(Failure::ProjectNotFound))
    }

    /// The table. `project` is what the client called it.
    fn facts(&self, project: Option<&str>) -> Facts {
        use StatusCode as S;
        let name = named(project);
        let (status, code, locator, text): (_, _, _, Cow<'static, str>) = match self {
            Self::NoHttp => (S::BAD_REQUEST, "NoApplicableCode", None, "This is no HTTP request".into()),
            Self::HeadRefused { bytes, fields } => (
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "NoApplicableCode",
                None,
                format!("The headers have more than {bytes} bytes, or are more than {fields}").into(),
            ),
            Self::NoSuchPath => (S::NOT_FOUND, "NoApplicableCode", None, "Invalid resource path".into()),
            Self::Method { allow } => {
                (S::METHOD_NOT_ALLOWED, "OperationNotSupported", None, format!("Allowed are {allow}").into())
            }
            Self::BadHost => (S::BAD_REQUEST, "NoApplicableCode", None, "No valid Host header".into()),
            Self::UriTooLong { limit } => (
                S::URI_TOO_LONG,
                "NoApplicableCode",
                None,
                format!("The URI is longer than {limit} bytes").into(),
            ),
            Self::HeadTooLarge { limit } => (
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "NoApplicableCode",
                None,
                format!("The headers have more than {limit} bytes").into(),
            ),
            Self::BodyTooLarge { limit } => (
                S::PAYLOAD_TOO_LARGE,
                "NoApplicableCode",
                None,
                format!("The body has more than {limit} bytes").into(),
            ),
            Self::FormTooLarge { limit } => (
                S::PAYLOAD_TOO_LARGE,
                "NoApplicableCode",
                None,
                format!("The fields of the form take more than {limit} bytes").into(),
            ),
            Self::TooManyFields { limit } => (
                S::PAYLOAD_TOO_LARGE,
                "NoApplicableCode",
                None,
                format!("The form has more than {limit} fields").into(),
            ),
            Self::BodyTimedOut => {
                (S::REQUEST_TIMEOUT, "NoApplicableCode", None, "The body comes too slowly".into())
            }
            Self::BodyBroken => (S::BAD_REQUEST, "NoApplicableCode", None, "The body ends early".into()),
            Self::BodyType => (
                S::UNSUPPORTED_MEDIA_TYPE,
                "NoApplicableCode",
                None,
                "The body should be JSON".into(),
            ),
            Self::NoRoom => (
                S::SERVICE_UNAVAILABLE,
                "ServerBusy",
                None,
                "Too much is being sent at once".into(),
            ),
            Self::Missing { parameter } => (
                S::BAD_REQUEST,
                "MissingParameterValue",
                Some(*parameter),
                format!("Please provide a {parameter} parameter").into(),
            ),
            Self::NoProject => (
                S::BAD_REQUEST,
                "MissingParameterValue",
                Some("MAP"),
                "No project defined. For OWS services: please provide a SERVICE and a MAP parameter".into(),
            ),
            Self::Forbidden => {
                (S::FORBIDDEN, "NoApplicableCode", None, "This is not allowed here".into())
            }
            Self::Unclear => (
                S::BAD_REQUEST,
                "NoApplicableCode",
                None,
                "The body does not say clearly what it asks for, or not what the query says".into(),
            ),
            Self::Panicked => {
                (S::INTERNAL_SERVER_ERROR, "NoApplicableCode", None, "Internal error of the server".into())
            }
            Self::Broker(Error::QueueFull { .. }) => {
                (S::SERVICE_UNAVAILABLE, "ServerBusy", None, "Too many requests are waiting".into())
            }
            Self::Broker(Error::ClientBusy { limit, .. }) => (
                S::TOO_MANY_REQUESTS,
                "ServerBusy",
                None,
                format!("You have {limit} requests here already").into(),
            ),
            Self::Broker(Error::ClientTooFast { limit, .. }) => (
                S::TOO_MANY_REQUESTS,
                "ServerBusy",
                None,
                format!("You ask more often than {limit} times a second").into(),
            ),
            Self::Broker(Error::ProjectBusy { limit, .. }) => (
                S::SERVICE_UNAVAILABLE,
                "ServerBusy",
                Some("MAP"),
                format!("Project '{name}' has {limit} requests here already").into(),
            ),
            Self::Broker(Error::WaitsForItself) => (
                S::SERVICE_UNAVAILABLE,
                "ServerBusy",
                Some("MAP"),
                "All workers wait for layers of this server".into(),
            ),
            Self::Broker(Error::Stopping) => {
                (S::SERVICE_UNAVAILABLE, "ServerBusy", None, "The server is stopping".into())
            }
            Self::Broker(Error::QueueTimedOut { .. }) => {
                (S::GATEWAY_TIMEOUT, "NoApplicableCode", None, "No worker was free in time".into())
            }
            Self::Broker(Error::TimedOut { .. }) => {
                (S::GATEWAY_TIMEOUT, "NoApplicableCode", None, "Request timeout error".into())
            }
            Self::Broker(Error::WorkerDied) => {
                (S::BAD_GATEWAY, "NoApplicableCode", None, "The worker died before it answered".into())
            }
            Self::Broker(Error::Quarantined { left }) => (
                S::BAD_GATEWAY,
                "NoApplicableCode",
                None,
                format!("This request ended the workers that served it; it is refused for {} s", seconds(*left)).into(),
            ),
            Self::Broker(Error::BreakerOpen { retry_after }) => (
                S::SERVICE_UNAVAILABLE,
                "ServerBusy",
                None,
                format!("The data of project '{name}' does not answer in time; it is tried again in {} s", seconds(*retry_after))
                    .into(),
            ),
            // Its head is out, so that nobody sees this.
            Self::Broker(Error::ReaderTooSlow) => {
                (S::SERVICE_UNAVAILABLE, "ServerBusy", None, "The client reads too slowly".into())
            }
            Self::Broker(Error::ShareTaken { .. }) => (
                S::SERVICE_UNAVAILABLE,
                "ServerBusy",
                None,
                format!("The data of project '{name}' does not answer in time; it has its share of the workers").into(),
            ),
            Self::Broker(Error::RequestTooLarge { limit }) => (
                S::PAYLOAD_TOO_LARGE,
                "NoApplicableCode",
                None,
                format!("URL and headers have more than {limit} bytes").into(),
            ),
            Self::Broker(Error::Failed(failure)) => match failure {
                Failure::ProjectNotFound => {
                    (S::NOT_FOUND, "InvalidParameterValue", Some("MAP"), format!("Project '{name}' not found").into())
                }
                Failure::StorageAway => (
                    S::SERVICE_UNAVAILABLE,
                    "ServerBusy",
                    Some("MAP"),
                    format!("The storage of project '{name}' does not answer").into(),
                ),
                Failure::ProjectUnreadable => (
                    S::UNPROCESSABLE_ENTITY,
                    "NoApplicableCode",
                    Some("MAP"),
                    format!("Cannot read project resource '{name}'").into(),
                ),
                Failure::BadLayers => (
                    S::UNPROCESSABLE_ENTITY,
                    "NoApplicableCode",
                    Some("MAP"),
                    format!("Invalid layers for project '{name}' - strict mode on").into(),
                ),
                Failure::PluginRaised => {
                    (S::INTERNAL_SERVER_ERROR, "NoApplicableCode", None, "A plugin failed".into())
                }
                Failure::QgisFailed | Failure::GaveUp => (S::INTERNAL_SERVER_ERROR, "NoApplicableCode", None, "QGIS failed".into()),
                Failure::TooLarge => (
                    S::INTERNAL_SERVER_ERROR,
                    "NoApplicableCode",
                    None,
                    "The answer is larger than can be made here".into(),
                ),
                Failure::PolicyRaised => {
                    (S::INTERNAL_SERVER_ERROR, "NoApplicableCode", None, "An access policy failed".into())
                }
                Failure::Cancelled => {
                    (S::SERVICE_UNAVAILABLE, "ServerBusy", None, "The request was cancelled".into())
                }
            },
        };
        let retry_after = match self {
            Self::Broker(Error::Stopping) => Some(5),
            Self::Broker(
                Error::BreakerOpen { retry_after }
                | Error::QueueFull { retry_after, .. }
                | Error::ClientBusy { retry_after, .. }
                | Error::ClientTooFast { retry_after, .. }
                | Error::ProjectBusy { retry_after, .. }
                | Error::ShareTaken { retry_after, .. },
            ) => Some(seconds(*retry_after)),
            _ => matches!(status, S::SERVICE_UNAVAILABLE | S::TOO_MANY_REQUESTS).then_some(1),
        };
        Facts {
            status,
            code,
            locator,
            text: text.into_owned(),
            retry_after,
        }
    }

    /// What QGIS's own programs say where they have no project, or none that is well
    /// (`QgsServer::handleRequest` and `QgsConfigCache::project`).
    fn in_words_of_qgis(&self) -> Option<&'static str> {
        let no_project = "Project file error. For OWS services: please provide a SERVICE and a MAP \
                          parameter pointing to a valid QGIS project file";
        match self {
            Self::NoProject => Some(no_project),
            Self::Broker(Error::Failed(failure)) => match failure {
                Failure::ProjectNotFound | Failure::ProjectUnreadable => Some(no_project),
                Failure::BadLayers => Some("Layer(s) not valid"),
                _ => None,
            },
            _ => None,
        }
    }

    /// The refusal as a response in the words of its reader.
    pub fn into_response<C>(
        self,
        dialect: &Dialect,
        project: Option<&str>,
    ) -> Response<Content<C>> {
        let words = match dialect {
            Dialect::Ows { by_qgis: true, .. } => self.in_words_of_qgis(),
            _ => None,
        };
        if let Some(words) = words {
            let text = exception::of_qgis(words);
            return text_response(
                StatusCode::INTERNAL_SERVER_ERROR,
                exception::CONTENT_TYPE,
                text,
            );
        }
        let facts = self.facts(project);
        let (kind, text) = match dialect {
            Dialect::Problem => (
                "application/problem+json",
                problem(facts.status, &facts.text),
            ),
            Dialect::Ows {
                service, version, ..
            } => {
                let exception = Exception {
                    code: facts.code,
                    locator: facts.locator,
                    text: &facts.text,
                };
                (
                    exception::CONTENT_TYPE,
                    exception.to_xml(service.as_deref(), version.as_deref()),
                )
            }
        };
        let mut response = text_response(facts.status, kind, text);
        let headers = response.headers_mut();
        if let Some(seconds) = facts.retry_after {
            headers.insert(header::RETRY_AFTER, seconds.into());
        }
        if let Self::Method { allow } = self {
            headers.insert(header::ALLOW, HeaderValue::from_static(allow));
        }
        response
    }
}

/// RFC 9457; and as clients of py-qgis-server look for it.
pub fn problem(status: StatusCode, detail: &str) -> String {
    serde_json::json!({
        "error": { "message": detail },
        "httpcode": status.as_u16(),
        "type": "about:blank",
        "title": status.canonical_reason().unwrap_or("Error"),
        "status": status.as_u16(),
        "detail": detail,
    })
    .to_string()
}

/// `text` with its type and length.
pub fn text_response<C>(
    status: StatusCode,
    kind: &'static str,
    text: String,
) -> Response<Content<C>> {
    let mut response = Response::new(Content::from(text));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

/// Where the time went, as far as the head of a response can know: for the access log.
/// A failure took its time, too.
#[derive(Debug, Clone, Copy, Default)]
pub struct Known {
    pub queued: Option<Duration>,
    pub load: Option<Duration>,
    pub render: Option<Duration>,
}

impl Known {
    pub fn of<C: Chunks>(body: &C) -> Self {
        Self {
            queued: body.queued(),
            load: body.load(),
            render: body.outcome().map(|outcome| outcome.timings.render()),
        }
    }

    pub fn of_lost(lost: &Lost) -> Self {
        Self {
            queued: lost.queued,
            load: lost.timings.map(Timings::load),
            render: lost.timings.map(Timings::render),
        }
    }

    /// The value of Server-Timing, in milliseconds; None if nothing is known.
    pub fn server_timing(&self) -> Option<HeaderValue> {
        let parts = [
            ("queue", self.queued),
            ("load", self.load),
            ("render", self.render),
        ];
        let known = parts
            .iter()
            .filter_map(|(name, time)| Some((name, (*time)?)));
        let texts: Vec<String> = known
            .map(|(name, time)| format!("{name};dur={}", time.as_micros() as f64 / 1e3))
            .collect();
        HeaderValue::from_str(&texts.join(", "))
            .ok()
            .filter(|value| !value.is_empty())
    }
}

/// What QGIS answered.
pub fn from_qgis<C: Chunks>(
    head: Head,
    body: C,
    request_id: &str,
) -> Result<Response<Content<C>>, Refusal> {
    let Some(status) = status(head.status) else {
        tracing::warn!(
            request_id,
            status = head.status,
            "a worker replied with a status that is none"
        );
        return Err(Refusal::Broker(Error::Failed(Failure::QgisFailed)));
    };
    let content = Content::of_reply(body, head.length)?;
    let mut response = Response::new(if may_have_body(status) {
        content
    } else {
        Content::empty()
    });
    *response.status_mut() = status;
    copy_headers(&head.headers, response.headers_mut(), request_id);
    if let Some(validator) = &head.validator {
        caching::tell(response.headers_mut(), validator, SystemTime::now());
    }
    Ok(response)
}

/// QGIS puts the id of a new feature behind the query of the URL that it was sent to.
pub fn mend_location(headers: &mut HeaderMap, url: &str) {
    let location = headers
        .get(header::LOCATION)
        .and_then(|it| it.to_str().ok());
    let id = location.and_then(|it| it.strip_prefix(url)?.strip_prefix('/'));
    let mended = id
        .zip(url.split_once('?'))
        .and_then(|(id, (path, query))| format!("{path}/{id}?{query}").parse().ok());
    if let Some(mended) = mended {
        headers.insert(header::LOCATION, mended);
    }
}

/// Whether no API of QGIS took the path: then QGIS reads the request as one for
/// a web service, and finds that no service is named. It says so in XML, and what an API
/// tells of data may have the same words in it.
pub fn is_of_no_api<C>(response: &Response<Content<C>>) -> bool {
    let says = |text: &Bytes| {
        let start = || String::from_utf8_lossy(&text[..text.len().min(400)]);
        let says = |words: &str| text.starts_with(b"<?xml") && start().contains(words);
        says("<ServerException>Project file error") || says("code=\"Service configuration error\"")
    };
    match response.body() {
        Content::Here(chunks) => chunks.front().is_some_and(says),
        _ => false,
    }
}

/// RFC 9110 clauses 15.3.5 and 15.4.5.
pub fn may_have_body(status: StatusCode) -> bool {
    !matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// A final status.
fn status(number: u16) -> Option<StatusCode> {
    StatusCode::from_u16(number)
        .ok()
        .filter(|status| (200..600).contains(&status.as_u16()))
}

/// Headers of a reply but for those of one hop. What is no header (a line
/// break of a plugin, say) is dropped rather than sent.
fn copy_headers(from: &[(String, String)], to: &mut HeaderMap, request_id: &str) {
    let hop: Vec<String> = from
        .iter()
        .filter(|(name, _)| name.eq_ignore_ascii_case("connection"))
        .flat_map(|(_, names)| {
            names
                .split(',')
                .map(|name| name.trim().to_ascii_lowercase())
        })
        .collect();
    for (name, value) in from {
        let name = name.to_ascii_lowercase();
        if NOT_FROM_QGIS.contains(&name.as_str()) || hop.contains(&name) {
            continue;
        }
        match (
            HeaderName::from_bytes(name.as_bytes()),
            HeaderValue::from_bytes(value.trim().as_bytes()),
        ) {
            (Ok(name), Ok(value)) => _ = to.append(name, value),
            _ => {
                tracing::warn!(request_id, header = ?name, "a worker replied with a header that is none")
            }
        }
    }
}

/// The name of a project as a header value: what is not visible ASCII is percent-encoded.
pub fn map_id(project: &str) -> HeaderValue {
    use percent_encoding::{CONTROLS, utf8_percent_encode};
    let name = utf8_percent_encode(short(project), CONTROLS).to_string();
    HeaderValue::from_str(&name).expect("controls and non-ASCII are encoded")
}

/// Rounded up, so that who waits for so long does not come too early.
fn seconds(wait: Duration) -> u32 {
    u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX)
}

fn named(project: Option<&str>) -> &str {
    project.map_or("default", short)
}

fn short(name: &str) -> &str {
    first(NAME_MAX, name)
}

/// No more than `max` characters of `text`.
pub fn first(max: usize, text: &str) -> &str {
    // So many bytes are never more characters.
    if text.len() <= max {
        return text;
    }
    let end = text.char_indices().map(|(at, _)| at).nth(max);
    &text[..end.unwrap_or(text.len())]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status_of(refusal: Refusal) -> (u16, Option<String>) {
        let response: Response<Content<()>> = refusal.into_response(&Dialect::Problem, Some("x"));
        let retry = response
            .headers()
            .get("retry-after")
            .map(|value| value.to_str().expect("ASCII").to_owned());
        (response.status().as_u16(), retry)
    }

    #[test]
    fn data_that_have_the_words_of_a_refusal_are_none() {
        let is_refused = |text: &str| {
            let response = text_response::<()>(StatusCode::OK, "text/plain", text.into());
            is_of_no_api(&response)
        };
        let refusal = exception::of_qgis("Project file error. For OWS services: …");
        assert!(is_refused(&refusal));
        assert!(!is_refused(&format!("{{\"name\":\"{refusal}\"}}")));
        assert!(!is_refused(&exception::of_qgis("Layer(s) not valid")));
    }

    #[test]
    fn each_failure_has_its_status() {
        let second = Duration::from_secs(1);
        for (error, status, retry) in [
            (
                Error::QueueFull {
                    limit: 1,
                    retry_after: second,
                },
                503,
                Some("1"),
            ),
            (
                Error::ClientBusy {
                    limit: 1,
                    retry_after: second * 3 / 2,
                },
                429,
                Some("2"),
            ),
            (
                Error::ClientTooFast {
                    limit: 1,
                    retry_after: second / 2,
                },
                429,
                Some("1"),
            ),
            (
                Error::ProjectBusy {
                    limit: 1,
                    retry_after: second * 60,
                },
                503,
                Some("60"),
            ),
            (Error::WaitsForItself, 503, Some("1")),
            (Error::Stopping, 503, Some("5")),
            (Error::QueueTimedOut { after: second }, 504, None),
            (Error::TimedOut { after: second }, 504, None),
            (Error::WorkerDied, 502, None),
            (Error::Quarantined { left: second }, 502, None),
            (
                Error::BreakerOpen {
                    retry_after: second * 5 / 2,
                },
                503,
                Some("3"),
            ),
            (
                Error::ShareTaken {
                    limit: 1,
                    retry_after: second * 7,
                },
                503,
                Some("7"),
            ),
            (Error::RequestTooLarge { limit: 1 }, 413, None),
            (Error::Failed(Failure::ProjectNotFound), 404, None),
            (Error::Failed(Failure::StorageAway), 503, Some("1")),
            (Error::Failed(Failure::ProjectUnreadable), 422, None),
            (Error::Failed(Failure::BadLayers), 422, None),
            (Error::Failed(Failure::PluginRaised), 500, None),
            (Error::Failed(Failure::QgisFailed), 500, None),
            (Error::Failed(Failure::GaveUp), 500, None),
            (Error::Failed(Failure::TooLarge), 500, None),
            (Error::Failed(Failure::Cancelled), 503, Some("1")),
            (Error::Failed(Failure::PolicyRaised), 500, None),
        ] {
            assert_eq!(
                status_of(error.clone().into()),
                (status, retry.map(String::from)),
                "{error:?}"
            );
        }
        for (refusal, status) in [
            (Refusal::NoSuchPath, 404),
            (Refusal::Method { allow: "GET" }, 405),
            (Refusal::BadHost, 400),
            (Refusal::UriTooLong { limit: 1 }, 414),
            (Refusal::HeadTooLarge { limit: 1 }, 431),
            (Refusal::BodyTooLarge { limit: 1 }, 413),
            (Refusal::BodyTimedOut, 408),
            (Refusal::BodyBroken, 400),
            (Refusal::BodyType, 415),
            (
                Refusal::Missing {
                    parameter: "SERVICE",
                },
                400,
            ),
            (Refusal::NoProject, 400),
            (Refusal::Forbidden, 403),
            (Refusal::Unclear, 400),
            (Refusal::Panicked, 500),
        ] {
            assert_eq!(status_of(refusal.clone()), (status, None), "{refusal:?}");
        }
    }

    #[test]
    fn the_name_of_a_project_is_bounded() {
        let long = "é".repeat(10_000);
        let facts = Refusal::project_not_found().facts(Some(&long));
        assert!(facts.text.chars().count() < NAME_MAX + 30);
        assert!(map_id(&long).len() <= 6 * NAME_MAX);
        assert_eq!(map_id("a b/é\n"), "a b/%C3%A9%0A");
    }

    #[test]
    fn headers_of_one_hop_and_those_that_split_a_response_stay_behind() {
        let from = [
            ("Content-Type", "image/png"),
            ("Set-Cookie", "a=1"),
            ("Set-Cookie", "b=2"),
            ("Transfer-Encoding", "chunked"),
            ("Connection", "close, X-Hop"),
            ("X-Hop", "1"),
            ("Content-Length", "7"),
            ("X-Evil", "a\r\nSet-Cookie: c=3"),
            ("X Evil", "a"),
            ("Server", "QGIS"),
        ];
        let from: Vec<(String, String)> = from
            .iter()
            .map(|(n, v)| (n.to_string(), v.to_string()))
            .collect();
        let mut to = HeaderMap::new();
        copy_headers(&from, &mut to, "r-1");
        let mut left: Vec<(&str, &str)> = to
            .iter()
            .map(|(n, v)| (n.as_str(), v.to_str().expect("ASCII")))
            .collect();
        left.sort_unstable();
        assert_eq!(
            left,
            [
                ("content-type", "image/png"),
                ("set-cookie", "a=1"),
                ("set-cookie", "b=2")
            ]
        );
    }

    #[test]
    fn a_new_feature_is_where_its_id_is_part_of_the_path() {
        let url = "http://h/wfs3/collections/a/items?MAP=b/c";
        let mended = |location: &str, url| {
            let mut headers = HeaderMap::new();
            headers.insert(header::LOCATION, location.parse().expect("a value"));
            mend_location(&mut headers, url);
            headers[header::LOCATION]
                .to_str()
                .expect("ASCII")
                .to_owned()
        };
        assert_eq!(
            mended(&format!("{url}/7"), url),
            "http://h/wfs3/collections/a/items/7?MAP=b/c"
        );
        for (location, url) in [("http://h/x/7", "http://h/x"), ("http://h/y?a=/b", url)] {
            assert_eq!(mended(location, url), location);
        }
    }

    #[test]
    fn a_status_must_be_final() {
        assert!(status(200).is_some() && status(501).is_some());
        assert!(status(0).is_none() && status(101).is_none() && status(600).is_none());
    }
}
