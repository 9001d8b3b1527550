//! What a client may ask: which names of projects and which paths reach a worker.
//!
//! A refusal is not an answer of its own. What is forbidden looks exactly like
//! what does not exist, so nobody learns from us what lies outside the root.

use super::ows;
use crate::protocol::ProjectRef;

/// Longer names of projects exist on no file system that we serve from.
const NAME_MAX: usize = 1024;

/// The project that `map` names, if a client may name it so.
///
/// `file:` before a path is the same as no scheme. An absolute path stays
/// absolute: only the worker knows the root, and says whether it contains it.
pub fn project(map: &str) -> Option<ProjectRef> {
    if map.len() > NAME_MAX || map.chars().any(is_odd) {
        return None;
    }
    let path = without_file_scheme(map)?;
    let parts: Vec<&str> = path
        .split('/')
        .filter(|part| !matches!(*part, "" | "."))
        .collect();
    if parts.is_empty()
        || parts.contains(&"..")
        || parts[0].starts_with("vsi") && path.starts_with('/')
    {
        return None;
    }
    let root = if path.starts_with('/') { "/" } else { "" };
    Some(ProjectRef {
        alias: "file".into(),
        path: format!("{root}{}", parts.join("/")),
    })
}

/// Whether a URL path may reach a worker: what it decodes to has no odd
/// characters and climbs nowhere.
pub fn is_plain_path(path: &str) -> bool {
    let Ok(path) = percent_encoding::percent_decode_str(path).decode_utf8() else {
        return false;
    };
    !path.chars().any(is_odd) && !path.split('/').any(|part| part == "..")
}

/// Whether a body may reach an API. QGIS reads what does not call itself JSON as
/// XML or a form, and a `service` in there makes an OWS request of it.
pub fn is_api_body(content_type: &str, body: &[u8]) -> bool {
    let text = body
        .strip_prefix("\u{FEFF}".as_bytes())
        .unwrap_or(body)
        .trim_ascii_start();
    content_type.contains("json") || !(text.starts_with(b"<") || ows::names_service(text))
}

/// Control characters end up in logs and C strings, a backslash is a separator
/// elsewhere, and U+FFFD says that the client did not send UTF-8.
fn is_odd(c: char) -> bool {
    c.is_control() || matches!(c, '\\' | '\u{FFFD}')
}

/// None for any scheme but `file`, and for `file://host/…`.
fn without_file_scheme(map: &str) -> Option<&str> {
    let Some((scheme, path)) = map.split_once(':') else {
        return Some(map);
    };
    let is_file = scheme.eq_ignore_ascii_case("file");
    match path.strip_prefix("//") {
        _ if !is_file || path.contains(':') => None,
        None => Some(path),
        Some(path) => path.starts_with('/').then_some(path),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(map: &str) -> Option<String> {
        project(map).map(|project| project.path)
    }

    #[test]
    fn a_relative_path_is_one_project_however_it_is_written() {
        for map in [
            "a/b", "./a/b", "a//b", "file:a/b", "FILE:a/b", "a/./b", "a/b/",
        ] {
            assert_eq!(path(map).as_deref(), Some("a/b"), "{map}");
        }
        assert_eq!(path("city.qgs").as_deref(), Some("city.qgs"));
        assert_eq!(path("Zürich ~ 2").as_deref(), Some("Zürich ~ 2"));
    }

    #[test]
    fn an_absolute_path_is_left_to_the_worker() {
        assert_eq!(path("/srv/a.qgs").as_deref(), Some("/srv/a.qgs"));
        assert_eq!(path("file:///srv/a.qgs").as_deref(), Some("/srv/a.qgs"));
    }

    #[test]
    fn what_could_leave_the_root_or_the_host_names_nothing() {
        for map in [
            "",
            ".",
            "/",
            "file:",
            "file:///",
            "..",
            "../a",
            "a/../b",
            "a/..",
            "/srv/../etc",
            "a\0b",
            "a\nb",
            "a\\..\\b",
            "C:\\a",
            "postgresql:?dbname=x",
            "geopackage:/a.gpkg",
            "file:a:b",
            "http://host/a.qgs",
            "file://host/a.qgs",
            "/vsicurl/http/a.qgs",
            "//vsimem/a",
            "a\u{FFFD}",
        ] {
            assert_eq!(path(map), None, "{map:?}");
        }
        assert_eq!(path(&"a".repeat(NAME_MAX + 1)), None);
    }

    #[test]
    fn a_path_that_climbs_is_not_plain() {
        for path in [
            "/static/../x",
            "/static/%2e%2e/x",
            "/static/..%2fx",
            "/static/%00",
            "/a%5cb",
            "/%ff",
        ] {
            assert!(!is_plain_path(path), "{path}");
        }
        for path in [
            "/wfs3/collections/a..b/items/{1}",
            "/wfs3/collections/Z%C3%BCrich",
            "/",
        ] {
            assert!(is_plain_path(path), "{path}");
        }
    }

    #[test]
    fn a_body_cannot_make_another_request_of_an_api_request() {
        for body in [
            "SERVICE=WMS",
            "a=b&s%65rvice=WMS",
            " <a service='WFS'/>",
            "\u{FEFF}<a/>",
            "{&SERVICE=x}",
        ] {
            assert!(!is_api_body("", body.as_bytes()), "{body}");
        }
        assert!(is_api_body(
            "application/geo+json",
            b"{\"url\": \"x?a&SERVICE=WMS\"}"
        ));
        assert!(
            is_api_body("", b"{}") && is_api_body("", b"") && is_api_body("text/plain", b"a=b")
        );
    }

    proptest::proptest! {
        #[test]
        fn no_name_climbs(map in ".*") {
            if let Some(project) = project(&map) {
                proptest::prop_assert!(project.path.split('/').all(|part| part != ".."));
                proptest::prop_assert!(!project.path.contains(['\0', '\\', ':']));
            }
        }
    }
}
