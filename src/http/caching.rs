//! Documents that clients and caches keep: RFC 9110 clauses 8.8 and 13, RFC 9111.
//!
//! The front reads what a client has and says what it may keep; which copy is still
//! good the worker decides, since it alone knows the project and the plugins.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hyper::Method;
use hyper::header::{
    CACHE_CONTROL, ETAG, HeaderMap, HeaderName, HeaderValue, IF_MODIFIED_SINCE, IF_NONE_MATCH,
    LAST_MODIFIED, VARY,
};
use percent_encoding::percent_decode_str;

use super::route;
use crate::protocol::{Document, Held, Validator};

/// More tags of one client are not looked at, and longer ones are not ours.
const TAGS_MAX: usize = 100;
const TAG_MAX: usize = 100;

/// httpdate knows no year 10000 and panics there.
const DATE_MAX: u64 = 253_402_300_799;

/// What a worker is told of a request and no document depends on. The URL says more
/// than the first two.
const NOT_IN_BASIS: [&str; 10] = [
    "Host",
    "X-Qgis-Forwarded-Url",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Prefix",
    "X-Forwarded-Proto",
    "X-Request-Id",
    "Traceparent",
    "Tracestate",
    "If-None-Match",
];

/// What kind of document a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Capabilities,
    /// A page about a project.
    OfProject,
    /// Whatever an API answers. Its bytes tell its states apart.
    Other,
}

/// What a web service answers, if it is a document.
pub fn of_ows(operation: &str) -> Option<Kind> {
    let is_it = operation.eq_ignore_ascii_case("GetCapabilities");
    is_it.then_some(Kind::Capabilities)
}

/// What an API has at `path`; None for features, which change with their data and bear
/// the time of the answer.
pub fn of_api(path: &str, apis: &[(String, String)], has_project: bool) -> Option<Kind> {
    // What it says encoded is features, too.
    let path = percent_decode_str(path).decode_utf8_lossy();
    let path = route::in_one_spelling(&path, apis);
    let Some(rest) = route::of_features(&path, apis) else {
        return Some(Kind::Other);
    };
    let is = |name: &str| rest.split(['/', '.']).any(|part| part == name);
    match () {
        () if rest.starts_with("/static/") || !has_project => Some(Kind::Other),
        () if is("items") => None,
        () => Some(Kind::OfProject),
    }
}

/// What a worker has to know so that the answer may be kept; None if it may not.
/// `to_qgis` is what QGIS sees of the `headers`.
pub fn document(
    kind: Option<Kind>,
    method: &Method,
    headers: &HeaderMap,
    to_qgis: &[(String, String)],
) -> Option<Document> {
    let kind = kind.filter(|_| matches!(*method, Method::GET | Method::HEAD))?;
    Some(Document {
        dated: kind != Kind::Other,
        fixed: kind == Kind::Capabilities,
        basis: basis(kind, to_qgis),
        held: held(headers),
    })
}

/// Our version and every header that may change the document, in a fixed order.
fn basis(kind: Kind, to_qgis: &[(String, String)]) -> String {
    let counts = |name: &str| match name {
        // An API chooses between JSON and HTML by it.
        "Accept" => kind != Kind::Capabilities,
        _ => !NOT_IN_BASIS.contains(&name),
    };
    let mut lines: Vec<String> = to_qgis
        .iter()
        .filter(|(name, _)| counts(name))
        .map(|(name, value)| format!("\n{name}: {value}"))
        .collect();
    lines.sort();
    env!("CARGO_PKG_VERSION").to_owned() + &lines.concat()
}

/// What the client has. A date counts only without tags (clause 13.1.3).
pub fn held(headers: &HeaderMap) -> Held {
    if !headers.contains_key(IF_NONE_MATCH) {
        return Held {
            since: since(headers),
            ..Held::default()
        };
    }
    let lines: Vec<&[u8]> = headers
        .get_all(IF_NONE_MATCH)
        .iter()
        .map(HeaderValue::as_bytes)
        .collect();
    match lines.join(&b", "[..]).trim_ascii() {
        b"*" => Held {
            any: true,
            ..Held::default()
        },
        list => Held {
            tags: tags(list),
            ..Held::default()
        },
    }
}

/// A date that is none, or several of them, says nothing.
fn since(headers: &HeaderMap) -> Option<u64> {
    let mut dates = headers.get_all(IF_MODIFIED_SINCE).iter();
    let (date, None) = (dates.next()?, dates.next()) else {
        return None;
    };
    let date = httpdate::parse_http_date(date.to_str().ok()?.trim()).ok()?;
    Some(date.duration_since(UNIX_EPOCH).ok()?.as_secs())
}

/// A list of entity tags up to its first mistake (clauses 8.8.3 and 13.1.2). They are
/// compared weakly, so nothing is said of which were weak.
fn tags(mut list: &[u8]) -> Vec<String> {
    let mut tags = Vec::new();
    for _ in 0..TAGS_MAX {
        while let [b' ' | b'\t' | b',', rest @ ..] = list {
            list = rest;
        }
        let opaque = list.strip_prefix(b"W/").unwrap_or(list);
        let Some(rest) = opaque.strip_prefix(b"\"") else {
            break;
        };
        let Some(end) = rest.iter().position(|byte| *byte == b'"') else {
            break;
        };
        let (tag, rest) = (&rest[..end], &rest[end + 1..]);
        if end <= TAG_MAX && tag.iter().all(u8::is_ascii_graphic) {
            tags.push(String::from_utf8_lossy(tag).into_owned());
        }
        list = rest;
    }
    tags
}

/// Says in `headers` what names this state of a document, and who may keep it. Every
/// use asks again whether it is still good: projects change when they like.
pub fn tell(headers: &mut HeaderMap, validator: &Validator, now: SystemTime) {
    let Ok(tag) = HeaderValue::from_str(&format!("\"{}\"", validator.tag)) else {
        return;
    };
    let keep = match validator.private {
        true => "private, no-cache",
        false => "no-cache",
    };
    set(headers, ETAG, tag);
    set(headers, CACHE_CONTROL, HeaderValue::from_static(keep));
    if let Some(date) = validator.modified.and_then(|at| last_modified(at, now)) {
        set(headers, LAST_MODIFIED, date);
    }
}

/// A plugin's own word is stronger.
fn set(headers: &mut HeaderMap, name: HeaderName, value: HeaderValue) {
    headers.entry(name).or_insert(value);
}

/// One address has JSON for one client and HTML for another.
pub fn vary_by_accept(headers: &mut HeaderMap) {
    if headers.contains_key(ETAG) {
        headers.append(VARY, HeaderValue::from_static("Accept"));
    }
}

/// None if it has not come yet (clause 8.8.2.1): somebody's clock is wrong.
fn last_modified(seconds: u64, now: SystemTime) -> Option<HeaderValue> {
    let modified = UNIX_EPOCH.checked_add(Duration::from_secs(seconds.min(DATE_MAX)))?;
    let date = (modified <= now).then(|| httpdate::fmt_http_date(modified))?;
    HeaderValue::from_str(&date).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(HeaderName, &str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in lines {
            headers.append(name, value.parse().expect("a value"));
        }
        headers
    }

    fn tags_of(lines: &[&str]) -> Held {
        let lines: Vec<_> = lines.iter().map(|line| (IF_NONE_MATCH, *line)).collect();
        held(&headers(&lines))
    }

    #[test]
    fn a_client_may_have_several_copies_weak_ones_too() {
        for (lines, expected) in [
            (&["\"a\""][..], &["a"][..]),
            (&["W/\"a\""], &["a"]),
            (&["\"a\", W/\"b,c\" ,\"\""], &["a", "b,c", ""]),
            (&["\"a\"", ", ,\"b\""], &["a", "b"]),
            // What follows a mistake is not guessed at.
            (&["\"a\", b, \"c\""], &["a"]),
            (&["w/\"a\""], &[]),
            (&["a"], &[]),
            (&["\"a"], &[]),
            (&[""], &[]),
            (&["\"a b\", \"c\""], &["c"]),
        ] {
            let held = tags_of(lines);
            assert_eq!(held.tags, expected, "{lines:?}");
            assert!(!held.any && held.since.is_none());
        }
        assert!(tags_of(&[" * "]).any);
        assert_eq!(tags_of(&["*, \"a\""]), Held::default());
        assert_eq!(tags_of(&[&"\"a\",".repeat(1000)]).tags.len(), TAGS_MAX);
    }

    #[test]
    fn a_date_counts_only_without_tags_and_only_if_it_is_one() {
        let dates = |dates: &[&str]| {
            let lines: Vec<_> = dates.iter().map(|it| (IF_MODIFIED_SINCE, *it)).collect();
            held(&headers(&lines)).since
        };
        for date in [
            "Sun, 06 Nov 1994 08:49:37 GMT",
            "Sunday, 06-Nov-94 08:49:37 GMT",
            "Sun Nov  6 08:49:37 1994",
        ] {
            assert_eq!(dates(&[date]), Some(784_111_777), "{date}");
            let both = headers(&[(IF_MODIFIED_SINCE, date), (IF_NONE_MATCH, "\"a\"")]);
            assert_eq!(held(&both).since, None);
        }
        let good = "Sun, 06 Nov 1994 08:49:37 GMT";
        for none in [&["1994-11-06T08:49:37Z"][..], &["yesterday"], &[good, good]] {
            assert_eq!(dates(none), None, "{none:?}");
        }
    }

    #[test]
    fn only_what_is_asked_for_by_get_or_head_may_be_kept() {
        let (none, kind) = (HeaderMap::new(), Some(Kind::Capabilities));
        for method in [Method::GET, Method::HEAD] {
            assert!(document(kind, &method, &none, &[]).is_some(), "{method}");
        }
        assert_eq!(document(kind, &Method::POST, &none, &[]), None);
        assert_eq!(document(None, &Method::GET, &none, &[]), None);
    }

    #[test]
    fn a_document_depends_on_the_headers_that_qgis_sees_and_not_on_who_asks() {
        let of = |kind, lines: &[(&str, &str)]| {
            let lines: Vec<_> = lines
                .iter()
                .map(|(name, value)| (name.to_string(), value.to_string()))
                .collect();
            basis(kind, &lines)
        };
        let plain = of(Kind::Capabilities, &[]);
        let asked = [
            ("Accept", "x"),
            ("X-Request-Id", "1"),
            ("X-Forwarded-For", "::1"),
        ];
        assert_eq!(of(Kind::Capabilities, &asked), plain);
        assert_ne!(of(Kind::OfProject, &asked), plain);
        let two = [("X-Qgis-A", "1"), ("X-Lizmap-B", "2")];
        let turned = [two[1], two[0]];
        assert_ne!(of(Kind::Capabilities, &two), plain);
        assert_eq!(
            of(Kind::Capabilities, &two),
            of(Kind::Capabilities, &turned)
        );
    }

    #[test]
    fn pages_about_a_project_are_dated_and_features_are_not_kept() {
        let apis = [("wfs3", "/wfs3"), ("own", "/own")].map(|(a, b)| (a.into(), b.into()));
        let of = |path| of_api(path, &apis, true);
        for path in [
            "/wfs3",
            "/wfs3.html",
            "/wfs3/collections/places",
            "/ogcapi/conformance",
            "/ows/wfs3/api.json",
        ] {
            assert_eq!(of(path), Some(Kind::OfProject), "{path}");
            assert_eq!(of_api(path, &apis, false), Some(Kind::Other), "{path}");
        }
        for path in [
            "/wfs3/collections/places/items",
            "/wfs3/collections/places/items.json",
            "/wfs3/collections/places/items/5",
            "/wfs3/collections/places/%69tems",
        ] {
            assert_eq!(of(path), None, "{path}");
        }
        for path in ["/wfs3/static/style.css", "/own/items"] {
            assert_eq!(of(path), Some(Kind::Other), "{path}");
        }
    }

    #[test]
    fn what_may_be_kept_has_a_tag_a_date_and_an_owner() {
        let now = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let told = |private, modified| {
            let mut headers = HeaderMap::new();
            let validator = Validator {
                tag: "a1".into(),
                modified,
                private,
            };
            tell(&mut headers, &validator, now);
            let get = |name| headers.get(name).map(|it| it.to_str().unwrap().to_owned());
            (get(ETAG), get(CACHE_CONTROL), get(LAST_MODIFIED))
        };
        let tag = || Some("\"a1\"".to_owned());
        let date = "Sun, 06 Nov 1994 08:49:37 GMT".to_owned();
        assert_eq!(
            told(false, Some(784_111_777)),
            (tag(), Some("no-cache".into()), Some(date))
        );
        let private = Some("private, no-cache".to_owned());
        assert_eq!(told(true, None), (tag(), private, None));
        for later in [1_000_000_001, u64::MAX] {
            assert_eq!(told(false, Some(later)).2, None);
        }
    }

    #[test]
    fn a_plugin_that_says_what_may_be_kept_is_not_overruled() {
        let mut headers = headers(&[(CACHE_CONTROL, "max-age=60")]);
        tell(&mut headers, &Validator::default(), SystemTime::now());
        assert_eq!(headers[CACHE_CONTROL], "max-age=60");
    }

    proptest::proptest! {
        #[test]
        fn no_list_of_tags_panics(list: Vec<u8>) {
            for tag in tags(&list) {
                proptest::prop_assert!(!tag.contains('"') && tag.len() <= TAG_MAX);
            }
        }
    }
}
