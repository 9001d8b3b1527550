//! What must hold whatever bytes come: the parsers of what strangers send, for
//! the fuzz targets in `tests/fuzz` and the property tests in `tests/fuzzing.rs`.
//!
//! Each function panics when its parser does, or when it lets through what it
//! is there to keep out. Nothing else may call them.

use bytes::Bytes;
use hyper::header::{FORWARDED, HOST, HeaderMap, HeaderName, HeaderValue};
use hyper::{Uri, Version};

use crate::broker::zmtp::Guard;
use crate::http::forwarded::{Base, Said};
use crate::ogc::{guard, ows};
use crate::protocol::Message;

/// A peer that has shaken hands, so that frames come next.
const OPENING: &[u8] = b"\xff\0\0\0\0\0\0\0\0\x7f\x03\0NULL\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    \0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\
    \x04\x1c\x05READY\x0bSocket-Type\0\0\0\x06DEALER";

/// The guard says the same however the bytes are cut, and nothing after it refused.
pub fn zmtp(bytes: &[u8]) {
    let Some((size, bytes)) = bytes.split_first() else {
        return;
    };
    for opening in [&b""[..], OPENING] {
        let bytes = [opening, bytes].concat();
        let at_once = Guard::new().check(&bytes);
        let mut guard = Guard::new();
        let mut cut = bytes.chunks(usize::from(*size).max(1));
        assert_eq!(cut.try_for_each(|piece| guard.check(piece)), at_once);
        if !opening.is_empty() {
            assert!(guard.is_open(), "the opening is one");
        }
    }
}

/// What is understood is said again in the same way.
pub fn message(bytes: &[u8]) {
    let Ok(message) = Message::decode(&frames(bytes)) else {
        return;
    };
    let again = Message::decode(&message.clone().encode());
    assert_eq!(again.as_ref(), Ok(&message));
}

/// Frames after one another: length in two bytes, then as many bytes.
fn frames(mut bytes: &[u8]) -> Vec<Bytes> {
    let mut frames = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let length = usize::from(u16::from_be_bytes(*length));
        let (frame, rest) = rest.split_at(rest.len().min(length));
        frames.push(Bytes::copy_from_slice(frame));
        bytes = rest;
    }
    frames
}

/// A query that went through us means the same when it is read again, and is one.
pub fn kvp(bytes: &[u8]) {
    let text = String::from_utf8_lossy(bytes);
    let mut kvp = ows::Kvp::parse(&text);
    kvp.merge(bytes);
    let query = kvp.to_query();
    assert_eq!(ows::Kvp::parse(&query), kvp);
    assert_is_query(&query);

    let api = ows::api_query(&text);
    assert_is_query(&api);
    assert_eq!(ows::api_query(&api), api);
    assert!(!ows::names_service(api.as_bytes()), "{api:?}");

    for map in [ows::map_of(&text), kvp.get("MAP")].into_iter().flatten() {
        let any = guard::Schemes {
            default: "file",
            known: None,
        };
        if let Some(project) = guard::project(&map, any) {
            let query = project.path.find('?').filter(|_| project.alias != "file");
            // A query alone is a name, too.
            if query != Some(0) {
                assert_stays_inside(&project.path[..query.unwrap_or(project.path.len())]);
            }
        }
    }
    if let Some(root) = ows::root(bytes) {
        let shown = |name: &str| name.bytes().all(|byte| byte.is_ascii_graphic());
        assert!(shown(&root.operation) && root.operation.len() <= 64);
    }
}

fn assert_is_query(query: &str) {
    let uri = format!("/?{query}").parse::<Uri>();
    assert!(uri.is_ok() || query.len() > 60_000, "{query:?}");
}

/// Below a root, wherever that is.
fn assert_stays_inside(path: &str) {
    let is_plain = |part: &str| !matches!(part, "" | "." | "..");
    let relative = path.strip_prefix('/').unwrap_or(path);
    assert!(relative.split('/').all(is_plain), "{path:?}");
    assert!(!path.contains(['\0', '\\', '\n']), "{path:?}");
}

/// Headers that say where we live: one a line, the first character says which.
pub fn forwarded(bytes: &[u8]) {
    let names = [
        HOST,
        FORWARDED,
        HeaderName::from_static("x-forwarded-url"),
        HeaderName::from_static("x-qgis-forwarded-url"),
        HeaderName::from_static("x-forwarded-proto"),
        HeaderName::from_static("x-forwarded-host"),
        HeaderName::from_static("x-forwarded-port"),
        HeaderName::from_static("x-forwarded-prefix"),
        HeaderName::from_static("x-forwarded-for"),
        HeaderName::from_static("x-real-ip"),
        HeaderName::from_static("x-scheme"),
    ];
    let mut headers = HeaderMap::new();
    for line in bytes.split(|byte| *byte == b'\n') {
        let Some((which, value)) = line.split_first() else {
            continue;
        };
        let name = &names[usize::from(*which) % names.len()];
        if let Ok(value) = HeaderValue::from_bytes(value) {
            headers.append(name, value);
        }
    }
    for proxies in [1, 2] {
        let _ = Said::new(&headers, proxies).client();
    }
    let uri = Uri::from_static("/ows/");
    let Ok(base) = Base::direct("http", &uri, Version::HTTP_11, &headers, "local:1") else {
        return;
    };
    assert_is_base(&base);
    for proxies in [1, 2] {
        let said = Said::new(&headers, proxies);
        assert_is_base(&base.clone().behind_proxy(None, "/ows/", said));
    }
}

/// It stands in documents and headers, so it must be one URL, and as it says.
fn assert_is_base(base: &Base) {
    let url = base.with("/ows/");
    let uri: Uri = url
        .parse()
        .unwrap_or_else(|error| panic!("{url:?}: {error}"));
    assert!(
        matches!(uri.scheme_str(), Some("http" | "https")),
        "{url:?}"
    );
    assert_eq!(
        uri.authority().map(|it| it.as_str()),
        Some(&*base.authority)
    );
    let below = format!("{}/ows/", base.prefix);
    assert_eq!(uri.path(), base.services.as_ref().unwrap_or(&below));
    assert_eq!(uri.query(), None, "{url:?}");
    assert!(!base.authority.contains('@'), "{url:?}");
    assert!(!url.contains(['"', '<', '>', ' ', '\r', '\n']), "{url:?}");
}
