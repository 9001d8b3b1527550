//! One log line per request, written and counted when its reply is over, and one more
//! when it was slow.

use std::borrow::Cow;
use std::net::IpAddr;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use hyper::header::HeaderMap;
use hyper::{Method, Uri};
use memchr::memmem::Finder;
use percent_encoding::{percent_decode, percent_decode_str};
use tokio::runtime::Handle;

use super::form;
use super::reply::first;
use crate::broker::Wait;
use crate::config::SECRET_WORDS;
use crate::metrics::{self, Kind, Metrics};
use crate::protocol::Trace;
use crate::traces::{Facts, Open, Traces};

/// Longer targets are cut in the log.
const TARGET_MAX: usize = 2048;

/// So much of an XML or JSON body is logged: all of nearly every query.
const BODY_MAX: usize = 4096;

/// 499 is what nginx calls a client that left before the answer.
const CLIENT_LEFT: u16 = 499;

/// The line; dropping it leads to its being written, after the connection had its
/// turn to write the end of the reply: a client need not wait for our log.
#[derive(Debug)]
pub struct Line(Option<Entry>);

/// What it says; dropping it writes it.
#[derive(Debug)]
pub struct Entry {
    pub request_id: String,
    pub client: IpAddr,
    pub method: Method,
    uri: Uri,
    /// The parameters of a form, when they came as a body.
    pub form: Option<String>,
    /// The beginning of a body that is XML; only if the request may yet be slow.
    xml: Option<String>,
    /// The same of one that calls itself JSON.
    json: Option<String>,
    pub trace: Option<Trace>,
    span: Option<Open>,
    pub kind: Kind,
    pub status: u16,
    /// Why there is no reply from QGIS, in the words of the metrics.
    pub failure: Option<&'static str>,
    /// Of the bodies.
    pub received: u64,
    pub bytes: u64,
    pub end: End,
    /// How long it waited for a worker, whether it got one or not.
    pub queued: Option<Duration>,
    /// Tells the same while there is no answer.
    pub wait: Option<Wait>,
    /// What the worker took to find the project and to answer, once it has said so.
    pub load: Option<Duration>,
    pub render: Option<Duration>,
    since: Instant,
    /// When the broker was asked.
    pub called: Option<Instant>,
    /// When its response began.
    pub answered: Option<Instant>,
    taken: Duration,
    streamed: Option<Duration>,
    books: Books,
}

/// Where a request is counted, and what is slow.
#[derive(Debug, Clone)]
pub struct Books {
    pub metrics: Arc<Metrics>,
    /// None: nothing is.
    pub slow: Option<Duration>,
    /// None: nobody is told.
    pub traces: Option<Arc<Traces>>,
}

/// How a reply ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Whole,
    /// Nobody fetched the rest.
    ClientLeft,
    /// We had no rest.
    CutOff,
}

impl Line {
    /// A request without a reply so far.
    pub fn new(
        request_id: String,
        client: IpAddr,
        method: Method,
        uri: &Uri,
        books: Books,
    ) -> Self {
        Self(Some(Entry {
            request_id,
            client,
            method,
            uri: uri.clone(),
            form: None,
            xml: None,
            json: None,
            trace: None,
            span: None,
            kind: Kind::PAGE,
            status: CLIENT_LEFT,
            failure: None,
            received: 0,
            bytes: 0,
            end: End::ClientLeft,
            queued: None,
            wait: None,
            load: None,
            render: None,
            since: Instant::now(),
            called: None,
            answered: None,
            taken: Duration::ZERO,
            streamed: None,
            books,
        }))
    }
}

const THERE: &str = "only dropping takes it away";

impl Deref for Line {
    type Target = Entry;

    fn deref(&self) -> &Entry {
        self.0.as_ref().expect(THERE)
    }
}

impl DerefMut for Line {
    fn deref_mut(&mut self) -> &mut Entry {
        self.0.as_mut().expect(THERE)
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        let mut entry = self.0.take().expect(THERE);
        entry.taken = entry.since.elapsed();
        entry.streamed = entry.answered.map(|answered| answered.elapsed());
        if let (None, Some(wait)) = (entry.answered, &entry.wait) {
            entry.queued = Some(wait.until(Instant::now()));
        }
        // The task of a connection writes what it has before another task runs.
        if let Ok(runtime) = Handle::try_current() {
            drop(runtime.spawn(async { drop(entry) }));
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.count();
        self.log();
        self.close_span();
        if self.books.slow.is_some_and(|slow| self.taken >= slow) {
            self.complain();
        }
    }
}

impl Entry {
    /// Tells the collector, if there is one, and the worker who its parent is.
    pub fn open_span(&mut self) {
        let Some(traces) = &self.books.traces else {
            return;
        };
        let span = traces.begin(self.trace.as_ref());
        self.trace = Some(span.trace(self.trace.take()));
        self.span = Some(span);
    }

    /// What XML asks for stands in its body alone.
    pub fn keep_xml(&mut self, body: &[u8]) {
        if self.books.slow.is_some() && form::is_xml(body) {
            self.xml = beginning(body, behind_a_tag);
        }
    }

    /// And so does what an API is told.
    pub fn keep_json(&mut self, headers: &HeaderMap, body: &[u8]) {
        if self.books.slow.is_some() && form::is_json(headers) && !body.is_empty() {
            self.json = beginning(body, outside_of_strings);
        }
    }

    fn close_span(&self) {
        let (Some(traces), Some(span)) = (&self.books.traces, &self.span) else {
            return;
        };
        let facts = Facts {
            request_id: &self.request_id,
            method: self.method.as_str(),
            path: first(TARGET_MAX, self.uri.path()),
            kind: self.kind,
            status: self.status,
            called: self.called,
            queued: self.queued,
            load: self.load,
            render: self.render(),
        };
        traces.close(span, &facts);
    }

    /// None if it failed before QGIS was asked.
    fn render(&self) -> Option<Duration> {
        let was_asked = |it: &Duration| self.failure.is_none() || !it.is_zero();
        self.render.filter(was_asked)
    }

    fn trace_id(&self) -> Option<&str> {
        self.trace.as_ref().map(Trace::id)
    }

    fn target(&self) -> &str {
        self.uri
            .path_and_query()
            .map_or("", |target| target.as_str())
    }

    fn count(&self) {
        self.books.metrics.replied(&metrics::Request {
            kind: self.kind,
            status: self.status,
            taken: self.taken,
            load: self.load,
            render: self.render(),
            received: self.received,
            sent: self.bytes,
        });
    }

    fn log(&self) {
        let end = match self.end {
            End::Whole => "whole",
            End::ClientLeft => "client left",
            End::CutOff => "cut off",
        };
        tracing::info!(
            target: "access",
            request_id = self.request_id,
            trace_id = self.trace_id(),
            client = %self.client,
            method = %self.method,
            uri = &*without_secrets(first(TARGET_MAX, self.target())),
            status = self.status,
            failure = self.failure,
            bytes = self.bytes,
            ms = ms(self.taken),
            queue_ms = self.queued.map(ms),
            load_ms = self.load.map(ms),
            render_ms = self.render().map(ms),
            stream_ms = self.streamed.map(ms),
            end,
        );
    }

    /// The whole of the query, so that it can be asked again.
    fn complain(&self) {
        tracing::warn!(
            target: "slow",
            request_id = self.request_id,
            trace_id = self.trace_id(),
            client = %self.client,
            method = %self.method,
            uri = &*without_secrets(self.target()),
            form = self.form.as_deref().map(without_secrets).as_deref(),
            xml = self.xml.as_deref().map(xml_without_secrets).as_deref(),
            json = self.json.as_deref().map(json_without_secrets).as_deref(),
            status = self.status,
            failure = self.failure,
            ms = ms(self.taken),
            queue_ms = self.queued.map(ms),
            load_ms = self.load.map(ms),
            render_ms = self.render().map(ms),
            stream_ms = self.streamed.map(ms),
            "took longer than logging.slow_seconds"
        );
    }
}

fn ms(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e3
}

/// `target` with stars for the values of parameters that look secret.
fn without_secrets(target: &str) -> Cow<'_, str> {
    let (path, query) = match target.split_once('?') {
        Some((path, query)) => (Some(path), query),
        None if target.starts_with('/') => return target.into(),
        None => (None, target),
    };
    // Nearly always nothing is, and one look at the whole finds that out.
    if !is_secret(query) {
        return target.into();
    }
    let shown = |pair| match (is_secret(pair), pair.split_once('=')) {
        (true, Some((key, _))) => format!("{key}=***"),
        _ => pair.to_owned(),
    };
    let pairs: Vec<String> = query.split('&').map(shown).collect();
    match path {
        Some(path) => format!("{path}?{}", pairs.join("&")).into(),
        None => pairs.join("&").into(),
    }
}

/// Whether a name that looks secret is followed by a value: the pair's own, or one
/// within it, as in an address that is a value.
fn is_secret(text: &str) -> bool {
    let plain = percent_decode_str(text)
        .decode_utf8_lossy()
        .to_ascii_lowercase();
    let has_value = |word: &Finder| {
        let at = word.find(plain.as_bytes());
        at.is_some_and(|at| plain[at..].contains(['=', ':']))
    };
    FINDERS.iter().any(has_value) || has_userinfo(&plain)
}

/// A long one is cut where `end` says, so that no half of a secret remains by which it is
/// not known as one. None of what has other characters than we could read.
fn beginning(body: &[u8], end: fn(&str) -> Option<usize>) -> Option<String> {
    let text = String::from_utf8_lossy(&body[..body.len().min(BODY_MAX)]);
    let end = match body.len() > BODY_MAX {
        true => end(&text)?,
        false => text.len(),
    };
    (!text.contains('\0')).then(|| text[..end].to_owned())
}

fn behind_a_tag(xml: &str) -> Option<usize> {
    Some(xml.rfind('>')? + 1)
}

/// Half a number is no secret.
fn outside_of_strings(json: &str) -> Option<usize> {
    let (mut begun, mut is_escaped) = (None, false);
    for (at, byte) in json.bytes().enumerate() {
        begun = match (byte, begun) {
            (b'"', None) => Some(at),
            (b'"', Some(_)) if !is_escaped => None,
            _ => begun,
        };
        is_escaped = begun.is_some() && byte == b'\\' && !is_escaped;
    }
    Some(begun.unwrap_or(json.len()))
}

fn xml_without_secrets(xml: &str) -> Cow<'_, str> {
    up_to_secrets(xml, str::to_owned)
}

fn json_without_secrets(json: &str) -> Cow<'_, str> {
    up_to_secrets(json, unescaped)
}

/// `body` up to the first name that looks secret: its value may be an attribute, an element,
/// a member or the literal of a filter, and end anywhere. Nothing of it where one shows
/// before that, but only in what the text is `meant` to say, or once that is decoded.
fn up_to_secrets(body: &str, meant: impl Fn(&str) -> String) -> Cow<'_, str> {
    let found = secret_in(&body.to_ascii_lowercase());
    let before = found.as_ref().map_or(body, |it| &body[..it.start]);
    let meant = meant(before);
    let decoded: Vec<u8> = percent_decode(meant.as_bytes()).collect();
    let decoded = String::from_utf8_lossy(&decoded);
    let is_hidden = |text: &str| secret_in(&text.to_ascii_lowercase()).is_some();
    if is_hidden(&meant) || is_hidden(&decoded) {
        return "***".into();
    }
    match found {
        Some(it) => format!("{}***", &body[..it.end]).into(),
        None => body.into(),
    }
}

/// The first word, whose secret begins behind it, or the place of one in an address.
fn secret_in(plain: &str) -> Option<Range<usize>> {
    let behind = |(word, finder): (&str, &Finder)| {
        let at = finder.find(plain.as_bytes())?;
        Some(at..at + word.len())
    };
    let words = SECRET_WORDS.into_iter().zip(FINDERS.iter());
    let in_address = |at: &usize| {
        let rest = plain[*at..].split(|c: char| c.is_whitespace() || "/?#<>\"'".contains(c));
        rest.into_iter().next().is_some_and(|it| it.contains('@'))
    };
    let addresses = plain.match_indices("://").map(|(at, _)| at + 3);
    let address = addresses.filter(in_address).min().map(|at| at..at);
    let all = words.filter_map(behind).chain(address);
    all.min_by_key(|it| it.end)
}

/// JSON with its characters as they are meant, as far as they could make up a word or an
/// address.
fn unescaped(json: &str) -> String {
    let json = json.replace("\\/", "/");
    let mut parts = json.split("\\u");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..4)
            .and_then(|it| u32::from_str_radix(it, 16).ok());
        match code.and_then(char::from_u32) {
            Some(c) => {
                text.push(c);
                text.push_str(&part[4..]);
            }
            None => text.push_str(part),
        }
    }
    text
}

/// Every line asks all of them.
static FINDERS: LazyLock<[Finder<'static>; SECRET_WORDS.len()]> =
    LazyLock::new(|| SECRET_WORDS.map(Finder::new));

/// `http://user:password@host`.
fn has_userinfo(plain: &str) -> bool {
    let authority = |rest: &str| {
        rest.split(['/', '?', '#'])
            .next()
            .is_some_and(|authority| authority.contains('@'))
    };
    plain.contains('@') && plain.split("://").skip(1).any(authority)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_not_logged_and_nothing_else_is_hidden() {
        for (target, logged) in [
            ("/ows/?MAP=city&LAYERS=a", "/ows/?MAP=city&LAYERS=a"),
            ("/ows/?PassWord=x&MAP=a", "/ows/?PassWord=***&MAP=a"),
            ("/ows/?MAP=a&access_token=x", "/ows/?MAP=a&access_token=***"),
            ("/ows/?%74oken=x", "/ows/?%74oken=***"),
            ("/ows/?a:password=x&b=1", "/ows/?a:password=***&b=1"),
            ("/ows/?SLD=http://h/%3Ftoken%3Dx", "/ows/?SLD=***"),
            ("/ows/?SLD=http://me:pw@h/x", "/ows/?SLD=***"),
            ("/ows/?FILTER=a@b", "/ows/?FILTER=a@b"),
            ("/ows/?LAYERS=tokens", "/ows/?LAYERS=tokens"),
            ("MAP=a&pwd=x", "MAP=a&pwd=***"),
            ("/token=x", "/token=x"),
        ] {
            assert_eq!(without_secrets(target), logged);
        }
    }

    #[test]
    fn secrets_in_xml_are_not_logged_and_nothing_before_them_is_hidden() {
        for (xml, logged) in [
            ("<GetFeature><Query typeNames=\"a@b\"/>", None),
            ("<a xmlns=\"http://www.opengis.net/wfs\">b@c</a>", None),
            ("<Password>x</Password>", Some("<Passw***")),
            ("<a PWD='x'/>", Some("<a PWD***")),
            (
                "<Name>api_key</Name><Literal>x</Literal>",
                Some("<Name>api_key***"),
            ),
            (
                "<a href=\"http://me:pw@h/x\"/>",
                Some("<a href=\"http://***"),
            ),
            ("<a href=\"http://h/?%74oken=x\"/>", Some("***")),
            ("<a href=\"http://h/?%74oken=x\" pwd=\"y\"/>", Some("***")),
        ] {
            assert_eq!(xml_without_secrets(xml), logged.unwrap_or(xml));
        }
    }

    #[test]
    fn secrets_in_json_are_not_logged_and_nothing_before_them_is_hidden() {
        for (json, logged) in [
            (r#"{"name": "a@b", "url": "http:\/\/h\/?a=\u00e9"}"#, None),
            (
                r#"{"name": "x", "Password": "y"}"#,
                Some(r#"{"name": "x", "Passw***"#),
            ),
            (r#"{"a": "http://me:pw@h/x"}"#, Some(r#"{"a": "http://***"#)),
            (r#"{"a": "http:\/\/me:pw@h\/x"}"#, Some("***")),
            (r#"{"a": "http:\/\/me:pw@h\/x", "token": 1}"#, Some("***")),
            (r#"{"p\u0061ssword": "x", "token": 1}"#, Some("***")),
            (r#"{"p\u0061ssword": "x"}"#, Some("***")),
            (r#"{"a": "\u00257Ax", "b": "?\u002574oken=x"}"#, Some("***")),
        ] {
            assert_eq!(json_without_secrets(json), logged.unwrap_or(json));
        }
    }

    #[test]
    fn long_json_is_cut_before_a_string_that_does_not_end() {
        let beginning = |json: &str| beginning(json.as_bytes(), outside_of_strings);
        let xs = "x".repeat(BODY_MAX);
        for start in [r#"{"a":"#, r#"{"a":"b\\","c":"#, r#"{"a":"b\"c","d":"#] {
            let json = format!("{start}\"{xs}\"}}");
            assert_eq!(beginning(&json).as_deref(), Some(start));
        }
        let numbers = format!("[{}", "1,".repeat(BODY_MAX));
        assert_eq!(beginning(&numbers).map(|it| it.len()), Some(BODY_MAX));
    }

    #[test]
    fn a_long_body_is_cut_behind_a_tag() {
        let beginning = |xml: &[u8]| beginning(xml, behind_a_tag);
        assert_eq!(beginning(b"<a> b").as_deref(), Some("<a> b"));
        let long = format!(
            "<a>{}<b href=\"http://me:{}@h\"/>",
            "é".repeat(9),
            "x".repeat(BODY_MAX)
        );
        assert_eq!(beginning(long.as_bytes()).as_deref(), Some("<a>"));
        assert_eq!(beginning("<".repeat(BODY_MAX + 1).as_bytes()), None);
        assert_eq!(beginning(b"<\0a\0>\0"), None, "UTF-16 hides what is secret");
    }

    #[test]
    fn a_long_target_is_cut_between_two_characters() {
        assert_eq!(
            first(TARGET_MAX, &"é".repeat(3000)).chars().count(),
            TARGET_MAX
        );
        assert_eq!(first(TARGET_MAX, "/x"), "/x");
    }
}
