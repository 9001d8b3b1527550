//! HTML forms in a request body.

use std::borrow::Cow;

use hyper::header::{CONTENT_TYPE, HeaderMap};
use memchr::memmem;

pub use crate::ogc::ows::FIELDS_MAX;

/// A form becomes part of the URL, and that of the head of a message.
pub const FORM_MAX: usize = crate::protocol::HEAD_MAX / 2;

/// How many bytes a body may have if it starts with `start`: a form has less room
/// than other bodies. XML that calls itself a form (curl does that) is XML.
pub fn limit(headers: &HeaderMap, start: &[u8], body_max: usize) -> usize {
    let is_form = match kind(headers) {
        Some((Kind::Fields, _)) => !is_xml(start),
        Some((Kind::Parts, _)) => true,
        None => false,
    };
    if is_form {
        body_max.min(FORM_MAX)
    } else {
        body_max
    }
}

enum Kind {
    Fields,
    Parts,
}

/// What kind of form the headers announce, and the parameters of that.
fn kind(headers: &HeaderMap) -> Option<(Kind, &str)> {
    let kind = headers.get(CONTENT_TYPE)?.to_str().ok()?;
    let (kind, parameters) = kind.split_once(';').unwrap_or((kind, ""));
    match kind.trim().to_ascii_lowercase().as_str() {
        "application/x-www-form-urlencoded" => Some((Kind::Fields, parameters)),
        "multipart/form-data" => Some((Kind::Parts, parameters)),
        _ => None,
    }
}

/// How far into a body its first character is looked for, since that is done with each
/// piece that comes.
const BLANKS_MAX: usize = 1024;

pub fn is_xml(body: &[u8]) -> bool {
    let body = &body[..body.len().min(BLANKS_MAX)];
    let text = body.strip_prefix("\u{FEFF}".as_bytes()).unwrap_or(body);
    text.trim_ascii_start().starts_with(b"<")
}

/// Whether a body calls itself JSON, of whatever vocabulary.
pub fn is_json(headers: &HeaderMap) -> bool {
    let kind = headers
        .get(CONTENT_TYPE)
        .and_then(|kind| kind.to_str().ok());
    let kind = kind.and_then(|kind| kind.split(';').next());
    kind.is_some_and(|kind| kind.trim().to_ascii_lowercase().ends_with("json"))
}

/// The fields of a form as a query would have them; None when the body is no
/// form.
pub fn of<'a>(headers: &HeaderMap, body: &'a [u8]) -> Option<Cow<'a, [u8]>> {
    match kind(headers)? {
        (Kind::Fields, _) => (!is_xml(body)).then(|| body.into()),
        (Kind::Parts, parameters) => {
            let fields = multipart(body, boundary(parameters)?)?;
            Some(fields.into_bytes().into())
        }
    }
}

/// Whether a form has more fields than anybody asks with.
pub fn has_too_many_fields(form: &[u8]) -> bool {
    memchr::memchr_iter(b'&', form).nth(FIELDS_MAX).is_some()
}

fn boundary(parameters: &str) -> Option<&str> {
    let pairs = parameters
        .split(';')
        .filter_map(|pair| pair.split_once('='));
    let (_, value) = pairs
        .into_iter()
        .find(|(name, _)| name.trim().eq_ignore_ascii_case("boundary"))?;
    let value = value.trim();
    let bare = value
        .strip_prefix('"')
        .and_then(|value| value.strip_suffix('"'))
        .unwrap_or(value);
    // RFC 2046 clause 5.1.1.
    (1..=70).contains(&bare.len()).then_some(bare)
}

/// RFC 7578: each part is a field, files included. None unless it ends as it should.
fn multipart(body: &[u8], boundary: &str) -> Option<String> {
    let delimiter = format!("\r\n--{boundary}").into_bytes();
    // The first delimiter needs no line break before it.
    let mut rest = body
        .strip_prefix(&delimiter[2..])
        .or_else(|| split(body, &delimiter).map(|(_, rest)| rest))?;
    let mut form = form_urlencoded::Serializer::new(String::new());
    for _ in 0..FIELDS_MAX {
        if rest.starts_with(b"--") {
            return Some(form.finish());
        }
        let (_, part) = split(rest, b"\r\n")?;
        let (part, next) = split(part, &delimiter)?;
        let (head, value) = part
            .strip_prefix(b"\r\n")
            .map(|value| (&b""[..], value))
            .or_else(|| split(part, b"\r\n\r\n"))?;
        form.append_pair(&field_name(head)?, &String::from_utf8_lossy(value));
        rest = next;
    }
    None
}

/// The `name` of a part's Content-Disposition.
fn field_name(head: &[u8]) -> Option<String> {
    let head = std::str::from_utf8(head).ok()?;
    let lines = head.lines().filter_map(|line| line.split_once(':'));
    let (_, disposition) = lines
        .into_iter()
        .find(|(name, _)| name.eq_ignore_ascii_case("content-disposition"))?;
    let (_, after) = disposition
        .split_once(" name=\"")
        .or_else(|| disposition.split_once(";name=\""))?;
    after.split_once('"').map(|(name, _)| name.to_owned())
}

fn split<'a>(text: &'a [u8], at: &[u8]) -> Option<(&'a [u8], &'a [u8])> {
    let position = memmem::find(text, at)?;
    Some((&text[..position], &text[position + at.len()..]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn form(kind: &str, body: &str) -> Option<String> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, kind.parse().expect("a value"));
        of(&headers, body.as_bytes()).map(|form| String::from_utf8_lossy(&form).into_owned())
    }

    #[test]
    fn a_form_is_a_query_and_xml_is_not() {
        let kind = "Application/X-WWW-Form-urlencoded; charset=UTF-8";
        assert_eq!(form(kind, "a=b&c").as_deref(), Some("a=b&c"));
        assert_eq!(form(kind, " <a/>"), None);
        assert_eq!(form(kind, "\u{FEFF} <a/>"), None);
        assert_eq!(form("text/xml", "a=b"), None);
    }

    #[test]
    fn a_form_has_less_room_than_other_bodies() {
        let limit = |kind: &str, start: &[u8]| {
            let headers = HeaderMap::from_iter([(CONTENT_TYPE, kind.parse().expect("a value"))]);
            limit(&headers, start, usize::MAX)
        };
        let kind = "application/x-www-form-urlencoded; charset=UTF-8";
        assert_eq!(limit(kind, b"a=b"), FORM_MAX);
        assert_eq!(limit(kind, b"\n<a>"), usize::MAX);
        assert_eq!(limit("multipart/form-data", b"<a>"), FORM_MAX);
        assert_eq!(limit("text/xml", b"a=b"), usize::MAX);
    }

    #[test]
    fn the_parts_of_a_multipart_form_are_fields() {
        let part = |name: &str, value: &str| {
            format!(
                "--x\r\nContent-Disposition: form-data; name=\"{name}\"\r\nX: y\r\n\r\n{value}\r\n"
            )
        };
        let body = format!(
            "{}{}--x--\r\n",
            part("MAP", "a/b"),
            part("F", "<a>\r\n& --x é")
        );
        let expected = "MAP=a%2Fb&F=%3Ca%3E%0D%0A%26+--x+%C3%A9";
        assert_eq!(
            form("multipart/form-data; boundary=x", &body).as_deref(),
            Some(expected)
        );
        assert_eq!(
            form(
                "multipart/form-data; boundary=\"x\"",
                &format!("preamble\r\n{body}")
            )
            .as_deref(),
            Some(expected)
        );
        assert_eq!(
            form("multipart/form-data; boundary=x", "--x--").as_deref(),
            Some("")
        );
        for broken in [
            &body[..body.len() - 6],
            "",
            "--x",
            "--x\r\n\r\nno name\r\n--x--",
        ] {
            assert_eq!(
                form("multipart/form-data; boundary=x", broken),
                None,
                "{broken:?}"
            );
        }
        assert_eq!(form("multipart/form-data", &body), None);
    }

    proptest::proptest! {
        #[test]
        fn no_multipart_panics(body in "(--x|\r\n|[a-z:\"=; -]|name=\")*") {
            let _ = multipart(body.as_bytes(), "x");
        }
    }
}
